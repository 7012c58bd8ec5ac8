"""The simulator's records as real files, files measured, and the media database (Sec. 4.3.1).

`materialize` writes a PNG, MP4 or WAV with exactly a record's attributes; `probe` decodes a file
and says what it holds. The media database, data/media/, is such files with an index of them:
`python bench.py media`. What a stand-in shows is a card: lib/cards.py.
"""

import base64
import html
import io
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from lib.cards import card
from lib.runs import read_jsonl, write_jsonl
from lib.text import to_json
from lib.toolbox import media_files

# A cut lies between two frames whose colours, on 32 x 32 pixels, differ by more than this on
# average, of 255 (ours).
CUT = 24
# Hz, unless the record names one: a millisecond, and a frame at 24, 25 or 30 fps, is then a whole
# number of samples.
SAMPLE_RATE = 48_000
# Drawn files of each kind. lib/toolbox.py names as many when there is no database, so that records
# are the same either way.
PER_KIND = 100
SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".mov"),
    "audio": (".wav", ".mp3"),
}
# What probe says of a file.
ATTRIBUTES = ("kind", "width", "height", "n_frames", "fps", "duration_s", "has_audio", "cuts")


# ---------------------------------------------------------------------------- pictures of records
def data_uri(picture, quality: int = 85) -> str:
    """A Pillow picture as a JPEG in a data URI."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail(artifact: dict, shot: int, most: int = 400) -> str:
    """One shot (or the picture) as a data URI, at most `most` pixels a side: for an HTML page."""
    scale = most / max(artifact["width"], artifact["height"])
    width = max(2, round(artifact["width"] * scale))
    height = max(2, round(artifact["height"] * scale))
    small = {**artifact, "width": width, "height": height}
    return data_uri(card(small, shot, artifact["shots"] or 1), quality=80)


# ---------------------------------------------------------------------------- looking into files
def moments(artifact: dict, most: int) -> list[float]:
    """Where to look at a film, as shares of its length: up to `most` moments, evenly over it.

    Of several shots each gets as many moments, at least one. Of more shots than `most`, some get
    none.
    """
    lengths = artifact.get("shot_frames") or [1]
    n_shots, total = len(lengths), sum(lengths)
    each = max(1, most // n_shots)
    kept = range(n_shots)
    if n_shots > most:
        kept = sorted({i * n_shots // most for i in range(most)})
    found = []
    for i in kept:
        begin = sum(lengths[:i])
        for j in range(each):
            found.append((begin + lengths[i] * (2 * j + 1) / (2 * each)) / total)
    return found


def stills(path: Path, places=(0.5,), side: int = 768) -> list[tuple]:
    """[(seconds, Pillow picture of at most `side` pixels a side)] of a picture's or film's file.

    `places`: shares of its length, which rise. av.FFmpegError or ValueError for a file that cannot
    be decoded.
    """
    import av

    seen, frame = [], None
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        length = stream.duration * fraction(stream.time_base) if stream.duration else 0
        wanted = [share * float(length) for share in places]
        for frame in file.decode(stream):
            while len(seen) < len(wanted) and (frame.time or 0.0) >= wanted[len(seen)] - 1e-6:
                seen.append((frame.time or 0.0, frame.to_image()))
            if len(seen) == len(wanted):
                break
        if frame is None:
            raise ValueError(f"{path}: no frame can be decoded")
        # What lies past the last frame's begin shows the last frame.
        for _ in range(len(wanted) - len(seen)):
            seen.append((frame.time or 0.0, frame.to_image()))
    for _, picture in seen:
        picture.thumbnail((side, side))
    return seen


def fraction(rational) -> Fraction:
    """A number that PyAV gives, as a Fraction: av 18 has Fractions itself, av 19 a type of its own
    that is neither int nor float."""
    return Fraction(rational.numerator, rational.denominator)


def real_file(artifact: dict) -> Path | None:
    """The file of an artifact whose `media` names one that is there, by an absolute path.

    Such a file is your own, or a real tool's. None for a stand-in.
    """
    path = Path(artifact["media"] or "")
    return path if path.is_absolute() and path.is_file() else None


def from_tool(artifact: dict) -> bool:
    """Whether a real tool made the file of `real_file`.

    The media database's files (`bench.py media`) stand in for what no tool made.
    """
    path = real_file(artifact)
    return path is not None and str(path) not in media_files(artifact["kind"])


# ---------------------------------------------------------------------------- records into files
def materialize(artifact: dict, path: Path) -> None:
    """Write the file that a record describes; the path's suffix chooses the form.

    Pictures: PNG, JPEG or WebP. Films: MP4 (H.264, with AAC if it sounds) or MOV (PCM, quicker).
    Sounds: WAV or MP3. Else text. Size, frames, fps, duration (to the audio sample), sound track
    and cuts are the record's, the content is a stand-in. An odd side gives 4:4:4 colour, which
    browsers may not play. ValueError for a suffix that cannot hold the kind.
    """
    path = Path(path)
    kind, suffix = artifact["kind"], path.suffix.lower()
    if kind in SUFFIXES and suffix not in SUFFIXES[kind]:
        raise ValueError(
            f"{path.name}: kind {kind} of {artifact['id']} can be written as "
            f"{', '.join(SUFFIXES[kind])}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file with its full name is whole.
    part = path.with_name(path.name + ".tmp")
    if kind == "image":
        write_picture(artifact, part, suffix)
    elif kind == "video":
        encode(artifact, part, suffix[1:], "aac" if suffix == ".mp4" else "pcm_s16le")
    elif kind == "audio":
        encode(artifact, part, suffix[1:], "pcm_s16le" if suffix == ".wav" else "libmp3lame")
    elif kind == "text":
        part.write_text(artifact["text"], encoding="utf-8")
    elif kind == "html":
        part.write_text(html_page(artifact["arguments"]), encoding="utf-8")
    else:
        part.write_text(to_json(artifact), encoding="utf-8")
    part.replace(path)


def write_picture(artifact: dict, path: Path, suffix: str) -> None:
    """Write a picture as PNG, WebP or, for any other suffix, JPEG."""
    picture = card(artifact, 0, 1)
    if suffix == ".png":
        picture.save(path, "PNG", compress_level=1)
    else:
        picture.save(path, "WEBP" if suffix == ".webp" else "JPEG", quality=90)


def html_page(arguments: dict) -> str:
    """The page that tool_html_builder makes of its arguments: title and sections, media by id."""
    body = ""
    for section in arguments["sections"]:
        heading, text = html.escape(section["heading"]), html.escape(section.get("text", ""))
        body += f"<h2>{heading}</h2>\n<p>{text}</p>\n"
        for media_id in section.get("media_ids", []):
            body += f"<p>[{html.escape(media_id)}]</p>\n"
    title = html.escape(arguments["title"])
    return f"<!DOCTYPE html>\n<meta charset=utf-8>\n<title>{title}</title>\n{body}"


def encode(artifact: dict, path: Path, container: str, codec: str) -> None:
    """Write a film or a sound; `container` and `codec` (of the sound) are FFmpeg's names.

    Sound goes in beside the frames it belongs to, so that neither has to wait in memory.
    """
    import av

    rate = artifact.get("sample_rate") or SAMPLE_RATE
    with av.open(str(path), "w", format=container) as file:
        if artifact["kind"] == "video":
            steps_per_s = Fraction(str(artifact["fps"]))
            seconds = artifact["n_frames"] / steps_per_s
            steps = frames(artifact)
            picture_stream = add_picture_stream(file, artifact, steps_per_s)
        else:
            # A sound alone is written a second a step.
            steps_per_s = Fraction(1)
            seconds = artifact["duration_s"]
            steps = [None] * math.ceil(seconds)
        sound_stream = add_sound_stream(file, artifact, rate, codec)
        n_samples = round(seconds * rate)
        written = 0
        for i, frame in enumerate(steps):
            if frame is not None:
                frame.pts = i
                frame.time_base = 1 / steps_per_s
                frame.duration = 1
                file.mux(picture_stream.encode(frame))
            end = min(round((i + 1) * rate / steps_per_s), n_samples)
            # At least a second at a time, and what is left at the end.
            if sound_stream and (end - written >= rate or end == n_samples > written):
                file.mux(sound_stream.encode(sound_frame(artifact, written, end, rate, codec)))
                written = end
        for stream in file.streams:
            file.mux(stream.encode(None))


def add_picture_stream(file, artifact: dict, fps: Fraction):
    """An H.264 stream for the film's frames in an open PyAV file."""
    options = {"preset": "ultrafast", "qp": "30", "aq-mode": "0"}
    stream = file.add_stream("libx264", rate=fps, options=options)
    stream.width = artifact["width"]
    stream.height = artifact["height"]
    stream.pix_fmt = pixel_format(artifact)
    stream.time_base = 1 / fps
    # The number of threads is written into the file, whose bytes must not depend on the machine.
    stream.thread_count = 1
    return stream


def add_sound_stream(file, artifact: dict, rate: int, codec: str):
    """A stream for the artifact's sound in an open PyAV file; None for a silent film."""
    if not artifact["has_audio"]:
        return None
    quick = {
        "aac": {"aac_coder": "fast", "b": "24000"},
        "libmp3lame": {"compression_level": "9"},
    }
    options = quick.get(codec, {})
    return file.add_stream(codec, rate=rate, layout=sound_layout(artifact), options=options)


def sound_layout(artifact: dict) -> str:
    """FFmpeg's name of the artifact's channels."""
    return "mono" if (artifact.get("channels") or 1) == 1 else "stereo"


def pixel_format(artifact: dict) -> str:
    """FFmpeg's name of how a video's pixels are kept.

    yuv444p where a side is odd: colour at half size has no place for it.
    """
    return "yuv444p" if artifact["width"] % 2 or artifact["height"] % 2 else "yuv420p"


def frames(artifact: dict) -> Iterator:
    """A video's frames in order, as PyAV's, in `pixel_format`.

    A shot is one frame whose brightness changes in place, so use it before you ask for the next. In
    each shot a square crosses the picture and a bar grows: a report shows motion, and neither is
    large enough to be taken for a cut.
    """
    import av
    import numpy

    width, height = artifact["width"], artifact["height"]
    total, shots = artifact["n_frames"], artifact["shots"]
    lengths = artifact.get("shot_frames")
    if not lengths:
        lengths = [total * (i + 1) // shots - total * i // shots for i in range(shots)]
    side = min(width, height) // 6
    for shot, length in enumerate(lengths):
        picture = av.VideoFrame.from_image(card(artifact, shot, len(lengths)))
        still = picture.reformat(format=pixel_format(artifact))
        plane = still.planes[0]
        # A view of the frame's own memory, (height, width).
        bright = numpy.frombuffer(plane, numpy.uint8).reshape(-1, plane.line_size)[:height, :width]
        y = (height - side) * (1 + shot % 3) // 4
        under = bright[y : y + side].copy()
        x = 0
        for i in range(length):
            # Put back only what the last frame changed.
            bright[y : y + side, x : x + side] = under[:, x : x + side]
            x = (width - side) * i // length
            bright[y : y + side, x : x + side] = 255 - under[:, x : x + side]
            bright[height - height // 40 :, width * i // length : width * (i + 1) // length] = 128
            yield still


def sound(artifact: dict, first: int, end: int, rate: int, channels: int):
    """Samples `first` to `end` of an artifact's sound, (channels, samples), between -1 and 1.

    A plucked note a beat, at the record's tempo where it has one. A video is silent outside its
    `sound_frames`, where the record lists them.
    """
    import numpy

    rng = random.Random(f"{artifact['id']} {to_json(artifact['arguments'])}")
    pitches = (220.0, 247.5, 275.0, 330.0, 366.7, 440.0)  # Hz
    notes = numpy.array([rng.choice(pitches) for _ in range(16)])
    beat = 60 / (artifact.get("bpm") or rng.randint(70, 150))  # seconds
    clock = numpy.arange(first, end) / rate
    number, since = numpy.divmod(clock - (artifact.get("beat_offset_s") or 0.0), beat)
    tone = numpy.sin(2 * numpy.pi * notes[number.astype(int) % 16] * since)
    wave = 0.3 * tone * numpy.exp(-6 * since)
    if artifact.get("sound_frames"):
        frame = clock * artifact["fps"]
        heard = [(frame >= a) & (frame < b) for a, b in artifact["sound_frames"]]
        wave *= numpy.any(heard, axis=0)
    return numpy.tile(wave.astype("float32"), (channels, 1))


def sound_frame(artifact: dict, first: int, end: int, rate: int, codec: str):
    """Samples `first` to `end` of an artifact's sound as a PyAV frame, in the codec's form."""
    import av

    wave = sound(artifact, first, end, rate, artifact.get("channels") or 1)
    form = "fltp"
    if codec == "pcm_s16le":
        # 16 bits, the channels' samples in turn.
        wave = (wave * 32767).astype("int16").T.reshape(1, -1)
        form = "s16"
    heard = av.AudioFrame.from_ndarray(wave, form, sound_layout(artifact))
    heard.sample_rate = rate
    heard.pts = first
    heard.time_base = Fraction(1, rate)
    return heard


# ---------------------------------------------------------------------------- files measured
def probe(path: Path) -> dict:
    """What a file holds, by decoding it whole: {attribute: value}, the names in ATTRIBUTES.

    None where the kind has no such thing. `cuts` counts jumps above CUT; in real films a flash or a
    fast pan also counts, a dissolve does not. av.FFmpegError (a ValueError or OSError) for a file
    that cannot be decoded; ValueError for one without picture and sound.
    """
    import av

    seen = dict.fromkeys(ATTRIBUTES)
    with av.open(str(path)) as file:
        # FFmpeg would make a film of any text.
        if file.format.name == "tty":
            raise ValueError("a text, not a picture, clip or sound")
        seen["has_audio"] = bool(file.streams.audio)
        # A song's cover is no film.
        cover = av.stream.Disposition.attached_pic
        films = [s for s in file.streams.video if not s.disposition & cover]
        if films:
            stream = films[0]
            n_frames, cuts = count_frames(file, stream)
            if not n_frames:
                raise ValueError("no frame can be decoded")
            seen.update(width=stream.width, height=stream.height)
            if file.format.name == "image2" or file.format.name.endswith("_pipe"):
                return {**seen, "kind": "image"}
            rate = fraction(stream.average_rate)
            seconds = n_frames / rate
            if stream.duration:
                seconds = stream.duration * fraction(stream.time_base)
            return {
                **seen,
                "kind": "video",
                "n_frames": n_frames,
                "fps": int(rate) if rate.denominator == 1 else float(rate),
                "duration_s": round(float(seconds), 6),
                "cuts": cuts,
            }
        if file.streams.audio:
            n_samples = sum(frame.samples for frame in file.decode(audio=0))
            seconds = n_samples / file.streams.audio[0].rate
            return {**seen, "kind": "audio", "duration_s": round(seconds, 6)}
    raise ValueError("neither picture nor sound in it")


def count_frames(file, stream) -> tuple[int, int]:
    """(frames, cuts) of a PyAV video stream, decoded whole.

    A cut is a jump above CUT of the averages over 32 x 32 fields. They are taken only where single
    pixels, one of each field, jump by half of it: those are quicker to read, and but by chance they
    differ no less.
    """
    import numpy
    from av.video.reformatter import VideoReformatter

    # One for the film: building it costs as much as ten frames.
    reformatter = VideoReformatter()

    def small(frame, how):
        """(32, 32, 3) integers, by "POINT" (one pixel a field) or "AREA" (a field's average)."""
        picture = reformatter.reformat(frame, 32, 32, "rgb24", interpolation=how)
        return picture.to_ndarray().astype("int16")

    def difference(one, other):
        return float(numpy.abs(one - other).mean())

    n_frames, cuts = 0, 0
    before, pixels_before = None, None
    for frame in file.decode(stream):
        pixels = small(frame, "POINT")
        if before is not None and difference(pixels, pixels_before) > CUT / 2:
            cuts += difference(small(frame, "AREA"), small(before, "AREA")) > CUT
        before, pixels_before = frame, pixels
        n_frames += 1
    return n_frames, cuts


# ---------------------------------------------------------------------------- the media database
def make_media_database(folder: Path, per_kind: int = PER_KIND, seed: int = 0) -> list[dict]:
    """Draw `per_kind` small pictures, clips and sounds into `folder`.

    Returns the records of its index: probe's, with `path` relative to the folder.
    """
    records = []
    for kind, suffix in (("image", "png"), ("video", "mp4"), ("audio", "wav")):
        for i in range(per_kind):
            name = f"{kind}/{i:04d}.{suffix}"
            rng = random.Random(f"{seed} {kind} {i}")
            materialize(database_artifact(kind, i, seed, rng), folder / name)
            records.append({"path": name, **probe(folder / name)})
    return records


def database_artifact(kind: str, i: int, seed: int, rng: random.Random) -> dict:
    """The record of the database's i-th file of a kind; sizes and seconds are ours."""
    width, height = rng.choice(((320, 180), (180, 320), (240, 240), (320, 240)))
    fps = rng.choice((24, 25, 30))
    seconds = rng.randint(4, 12) / 4
    bpm = rng.randint(70, 150)
    silent = kind == "image" or (kind == "video" and rng.random() < 0.5)
    return {
        "id": f"{kind} {i}",
        "kind": kind,
        "arguments": {"seed": seed},
        "width": width,
        "height": height,
        "fps": fps,
        "n_frames": int(seconds * fps),
        "shots": rng.randint(1, 4),
        "duration_s": seconds,
        "has_audio": not silent,
        "bpm": bpm,
        "sample_rate": 24_000,
        "channels": 1,
    }


def index_folder(folder: Path) -> tuple[list[dict], list[str]]:
    """Probe every file under `folder` but hidden ones, and say which are left out and why.

    Returns (records with absolute paths, names of the files left out).
    """
    import av

    records, bad = [], []
    found = (p for p in folder.resolve().rglob("*") if p.is_file() and not p.name.startswith("."))
    for path in sorted(found):
        try:
            records.append({"path": str(path), **probe(path)})
        except (av.FFmpegError, ValueError, OSError) as e:
            bad.append(path.name)
            print(f"  left out: {path}: {getattr(e, 'strerror', None) or e}")
    return records, bad


def media(arguments: list[str], database: Path) -> None:
    """`bench.py media [FOLDER]`: write `database`/index.jsonl anew, for drawn files or FOLDER's.

    The other records of the index stay. SystemExit for what is no folder.
    """
    if len(arguments) > 1 or (arguments and not Path(arguments[0]).is_dir()):
        raise SystemExit(
            f"error: {' '.join(arguments)} is not a folder; `python bench.py media FOLDER` "
            "indexes one"
        )
    index = database / "index.jsonl"
    before = read_jsonl(index) if index.is_file() else []
    if arguments:
        folder = Path(arguments[0])
        records, bad = index_folder(folder)
        kept = [r for r in before if not Path(r["path"]).is_relative_to(folder.resolve())]
    else:
        records, bad = make_media_database(database), []
        kept = [r for r in before if Path(r["path"]).is_absolute()]
    database.mkdir(parents=True, exist_ok=True)
    write_jsonl(index, kept + records)
    counts = ", ".join(f"{sum(r['kind'] == kind for r in records)} {kind}" for kind in SUFFIXES)
    total = len(kept) + len(records)
    print(f"{index}: {counts} added, {len(bad)} left out, {total} in all")
