"""The simulator's records as real files, and files measured: `materialize` writes a PNG, MP4 or WAV with exactly a record's attributes, `probe`
decodes a file and says what it holds. The media database (Sec. 4.3.1), data/media/, is such files with an index: `python bench.py media`.
"""

import base64
import html
import io
import math
import random
from fractions import Fraction
from pathlib import Path

from lib.runs import read_jsonl, write_jsonl
from lib.text import to_json
from lib.toolbox import media_files

CUT = 24  # of 255: a cut lies between two frames whose colours, on 32 x 32 pixels, differ by more than this on average
SAMPLE_RATE = 48_000  # Hz, unless the record names one: a millisecond, and a frame at 24, 25 or 30 fps, is a whole number of samples
PER_KIND = 100  # drawn files of each kind, named as env.py names them when there are none: so records are the same either way
SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".mov"),
    "audio": (".wav", ".mp3"),
}


# ---------------------------------------------------------------------------- records into files
def background(artifact, shot, of):
    """The still part of one shot: a colour field, three shapes, the artifact's id and the shot's number. Shots are light and dark
    in turn, so that every cut shows whatever the colours are; id and arguments seed the rest."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = artifact["width"], artifact["height"]
    rng = random.Random(f"{artifact['id']} {to_json(artifact['arguments'])} {shot}")
    low, high = (20, 105) if shot % 2 else (150, 235)
    colours = [tuple(rng.randint(low, high) for _ in "rgb") for _ in range(19)]
    field = Image.new("RGB", (4, 4))
    field.putdata(colours[:16])
    picture = field.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for colour in colours[16:]:
        x, y, radius = (
            rng.randrange(width),
            rng.randrange(height),
            max(1, min(width, height) * rng.uniform(0.05, 0.15)),
        )
        draw.regular_polygon(
            (x, y, radius), rng.choice((3, 4, 6, 60)), rotation=rng.randrange(90), fill=colour
        )
    size = min(height // 6, width // 8)
    if size >= 6:  # pixels; smaller letters cannot be read
        words = (
            f"{artifact['id']}\n{shot + 1} of {of}"
            if artifact["kind"] == "video"
            else str(artifact["id"])
        )
        draw.multiline_text(
            (size // 2, size // 2),
            words,
            fill="white" if shot % 2 else "black",
            font=ImageFont.load_default(size),
        )
    return picture


def thumbnail(artifact, shot, most=180):
    """One shot (or the picture) as a data URI of at most `most` pixels a side, for pages that stand alone."""
    scale = most / max(artifact["width"], artifact["height"])
    small = {
        **artifact,
        "width": max(2, round(artifact["width"] * scale)),
        "height": max(2, round(artifact["height"] * scale)),
    }
    return data_uri(background(small, shot, artifact["shots"] or 1), quality=80)


def data_uri(picture, quality=85):
    """A Pillow picture as a JPEG in a data URI."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def moments(artifact, most):
    """Where to look at a film, as shares of its length: up to `most` moments, evenly over it; of several shots each gets as many, at least one. Of
    more shots than `most`, some get none."""
    lengths = artifact.get("shot_frames") or [1]
    each, total = max(1, most // len(lengths)), sum(lengths)
    kept = (
        sorted({i * len(lengths) // most for i in range(most)})
        if len(lengths) > most
        else range(len(lengths))
    )
    return [
        (sum(lengths[:i]) + lengths[i] * (2 * j + 1) / (2 * each)) / total
        for i in kept
        for j in range(each)
    ]


def stills(path, places=(0.5,), side=768):
    """[(seconds, Pillow picture of at most `side` pixels a side)] of a picture's or film's file, at the given shares of its length, which rise.

    av.FFmpegError or ValueError for a file that cannot be decoded."""
    import av

    with av.open(str(path)) as file:
        stream, seen, frame = file.streams.video[0], [], None
        length = float(stream.duration * stream.time_base) if stream.duration else 0.0
        wanted = [share * length for share in places]
        for frame in file.decode(stream):
            while len(seen) < len(wanted) and (frame.time or 0.0) >= wanted[len(seen)] - 1e-6:
                seen.append((frame.time or 0.0, frame.to_image()))
            if len(seen) == len(wanted):
                break
        if frame is None:
            raise ValueError(f"{path}: no frame can be decoded")
        seen += [
            (frame.time or 0.0, frame.to_image()) for _ in wanted[len(seen) :]
        ]  # past the last frame's begin
    for _, picture in seen:
        picture.thumbnail((side, side))
    return seen


def real_file(artifact):
    """The file of an artifact whose `media` names one that is there, by an absolute path: your own, or a real tool's. None for a stand-in."""
    path = Path(artifact["media"] or "")
    return path if path.is_absolute() and path.is_file() else None


def from_tool(artifact):
    """Whether a real tool made the file of `real_file`: the media database's files, `bench.py media`, stand in for what no tool made."""
    path = real_file(artifact)
    return path is not None and str(path) not in media_files(artifact["kind"])


def pixel_format(artifact):
    """FFmpeg's name of how a video's pixels are kept."""
    return "yuv444p" if artifact["width"] % 2 or artifact["height"] % 2 else "yuv420p"


def frames(artifact):
    """A video's frames in order, as PyAV's (yuv420p; yuv444p where a side is odd: colour at half size has no place for it). A shot is one frame whose
    brightness changes in place, so use it before you ask for the next. In each shot a square crosses the picture and a bar grows: a report shows motion,
    and neither is large enough to be taken for a cut."""
    import av
    import numpy

    width, height, total, shots = (
        artifact[name] for name in ("width", "height", "n_frames", "shots")
    )
    lengths = artifact.get("shot_frames") or [
        total * (i + 1) // shots - total * i // shots for i in range(shots)
    ]
    side = min(width, height) // 6
    for shot, length in enumerate(lengths):
        still = av.VideoFrame.from_image(background(artifact, shot, len(lengths))).reformat(
            format=pixel_format(artifact)
        )
        plane = still.planes[0]
        bright = numpy.frombuffer(plane, numpy.uint8).reshape(-1, plane.line_size)[:height, :width]
        y = (height - side) * (1 + shot % 3) // 4
        under, x = bright[y : y + side].copy(), 0
        for i in range(length):
            bright[y : y + side, x : x + side] = under[
                :, x : x + side
            ]  # only what the last frame changed
            x = (width - side) * i // length
            bright[y : y + side, x : x + side] = 255 - under[:, x : x + side]
            bright[height - height // 40 :, width * i // length : width * (i + 1) // length] = 128
            yield still


def sound(artifact, first, end, rate, channels):
    """Samples `first` to `end` of an artifact's sound, channels x samples between -1 and 1: a plucked note a beat, at the record's
    tempo where it has one. A video is silent outside its `sound_frames`, where the record lists them."""
    import numpy

    rng = random.Random(f"{artifact['id']} {to_json(artifact['arguments'])}")
    notes = numpy.array(
        [rng.choice((220.0, 247.5, 275.0, 330.0, 366.7, 440.0)) for _ in range(16)]
    )  # Hz
    beat = 60 / (artifact.get("bpm") or rng.randint(70, 150))  # seconds
    clock = numpy.arange(first, end) / rate
    number, since = numpy.divmod(clock - (artifact.get("beat_offset_s") or 0.0), beat)
    wave = (
        0.3
        * numpy.sin(2 * numpy.pi * notes[number.astype(int) % 16] * since)
        * numpy.exp(-6 * since)
    )
    if artifact.get("sound_frames"):
        wave *= numpy.any(
            [
                (clock * artifact["fps"] >= a) & (clock * artifact["fps"] < b)
                for a, b in artifact["sound_frames"]
            ],
            axis=0,
        )
    return numpy.tile(wave.astype("float32"), (channels, 1))


def encode(artifact, path, container, codec):
    """Write a video or an audio. Sound goes in beside the frames it belongs to, so that neither has to wait in memory."""
    import av

    rate, channels = artifact.get("sample_rate") or SAMPLE_RATE, artifact.get("channels") or 1
    layout, quick = (
        "mono" if channels == 1 else "stereo",
        {"aac": {"aac_coder": "fast", "b": "24000"}, "libmp3lame": {"compression_level": "9"}},
    )
    with av.open(str(path), "w", format=container) as file:
        fps, seconds, steps, done = (
            Fraction(1),
            artifact["duration_s"],
            [None] * math.ceil(artifact["duration_s"]),
            0,
        )  # a second a step
        if artifact["kind"] == "video":
            fps, steps = Fraction(str(artifact["fps"])), frames(artifact)
            tick = 1 / fps
            seconds = artifact["n_frames"] / fps
            picture = file.add_stream(
                "libx264", rate=fps, options={"preset": "ultrafast", "qp": "30", "aq-mode": "0"}
            )
            picture.width, picture.height = artifact["width"], artifact["height"]
            picture.pix_fmt = pixel_format(artifact)
            picture.time_base, picture.thread_count = (
                tick,
                1,
            )  # the number of threads is written into the file
        whole = round(seconds * rate)  # samples
        track = (
            file.add_stream(codec, rate=rate, layout=layout, options=quick.get(codec, {}))
            if artifact["has_audio"]
            else None
        )
        for i, frame in enumerate(steps):
            if frame is not None:
                frame.pts, frame.time_base, frame.duration = i, tick, 1
                file.mux(picture.encode(frame))
            end = min(round((i + 1) * rate / fps), whole)
            if track and (end - done >= rate or end == whole > done):  # a second at a time
                wave, form = sound(artifact, done, end, rate, channels), "fltp"
                if codec == "pcm_s16le":  # 16 bits, the channels' samples in turn
                    wave, form = (wave * 32767).astype("int16").T.reshape(1, -1), "s16"
                heard = av.AudioFrame.from_ndarray(wave, form, layout)
                heard.sample_rate, heard.pts, heard.time_base, done = (
                    rate,
                    done,
                    Fraction(1, rate),
                    end,
                )
                file.mux(track.encode(heard))
        for stream in file.streams:
            file.mux(stream.encode(None))


def materialize(artifact, path):
    """Write the file that a record describes: PNG, JPEG or WebP; MP4 (H.264, with AAC if it sounds) or MOV (PCM, quicker); WAV or MP3; text. The path's
    suffix chooses. Size, frames, fps, duration (to the audio sample), sound track and cuts are the record's, the content is a
    stand-in. An odd side gives 4:4:4 colour, which browsers may not play. ValueError for a suffix that cannot hold the kind."""
    path = Path(path)
    kind, suffix = artifact["kind"], path.suffix.lower()
    if kind in SUFFIXES and suffix not in SUFFIXES[kind]:
        raise ValueError(
            f"{path.name}: kind {kind} of {artifact['id']} can be written as {', '.join(SUFFIXES[kind])}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")  # a file with its full name is whole
    if kind == "image":
        form = {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")
        background(artifact, 0, 1).save(
            part, form, **({"compress_level": 1} if form == "PNG" else {"quality": 90})
        )
    elif kind == "video":
        encode(artifact, part, suffix[1:], "aac" if suffix == ".mp4" else "pcm_s16le")
    elif kind == "audio":
        encode(artifact, part, suffix[1:], "pcm_s16le" if suffix == ".wav" else "libmp3lame")
    elif kind == "text":
        part.write_text(artifact["text"], encoding="utf-8")
    elif kind == "html":
        page = artifact["arguments"]
        body = "".join(
            f"<h2>{html.escape(section['heading'])}</h2>\n<p>{html.escape(section.get('text', ''))}</p>\n"
            + "".join(
                f"<p>[{html.escape(media_id)}]</p>\n" for media_id in section.get("media_ids", [])
            )
            for section in page["sections"]
        )
        part.write_text(
            f"<!DOCTYPE html>\n<meta charset=utf-8>\n<title>{html.escape(page['title'])}</title>\n{body}",
            encoding="utf-8",
        )
    else:
        part.write_text(to_json(artifact), encoding="utf-8")
    part.replace(path)


def probe(path):
    """What a file holds, by decoding it whole: kind, width, height, n_frames, fps, duration_s, has_audio, cuts (None where the kind has
    none). A cut is a jump above CUT, looked for where single pixels jump by half of it; in real films a flash or a fast pan also
    counts, a dissolve does not. av.FFmpegError (a ValueError or OSError) for a file that cannot be decoded; ValueError for one
    without picture and sound."""
    import av
    import numpy
    from av.video.reformatter import VideoReformatter

    seen = dict.fromkeys(
        ("kind", "width", "height", "n_frames", "fps", "duration_s", "has_audio", "cuts")
    )
    with av.open(str(path)) as file:
        if file.format.name == "tty":  # FFmpeg would make a film of any text
            raise ValueError("a text, not a picture, clip or sound")
        moving = [
            s for s in file.streams.video if not s.disposition & av.stream.Disposition.attached_pic
        ]  # a song's cover is no film
        seen["has_audio"] = bool(file.streams.audio)
        if moving:
            stream, before, count, cuts, reformatter = (
                moving[0],
                None,
                0,
                0,
                VideoReformatter(),
            )  # one for the film: building it costs ten frames
            small = lambda picture, how: (
                reformatter.reformat(picture, 32, 32, "rgb24", interpolation=how)
                .to_ndarray()
                .astype("int16")
            )  # noqa: E731
            differ = lambda one, other: float(numpy.abs(one - other).mean())  # noqa: E731
            for frame in file.decode(stream):
                pixels = small(
                    frame, "POINT"
                )  # one of each of the 32 x 32 fields: quicker than their averages, and but by chance they differ no less
                if before is not None and differ(pixels, before_pixels) > CUT / 2:
                    cuts += differ(small(frame, "AREA"), small(before, "AREA")) > CUT
                before, before_pixels, count = frame, pixels, count + 1
            if not count:
                raise ValueError("no frame can be decoded")
            seen.update(kind="video", width=stream.width, height=stream.height)
            if file.format.name == "image2" or file.format.name.endswith("_pipe"):
                return {**seen, "kind": "image"}
            rate = stream.average_rate
            seconds = stream.duration * stream.time_base if stream.duration else count / rate
            return {
                **seen,
                "n_frames": count,
                "fps": int(rate) if rate.denominator == 1 else float(rate),
                "duration_s": round(float(seconds), 6),
                "cuts": cuts,
            }
        if file.streams.audio:
            rate = file.streams.audio[0].rate
            return {
                **seen,
                "kind": "audio",
                "duration_s": round(sum(frame.samples for frame in file.decode(audio=0)) / rate, 6),
            }
    raise ValueError("neither picture nor sound in it")


# ---------------------------------------------------------------------------- the media database
def make_media_database(folder, per_kind=PER_KIND, seed=0):
    """Draw `per_kind` small pictures, clips and sounds into `folder`; returns the rows of its index, paths relative to it."""
    rows = []
    for kind, suffix in (("image", "png"), ("video", "mp4"), ("audio", "wav")):
        for i in range(per_kind):
            rng, name = random.Random(f"{seed} {kind} {i}"), f"{kind}/{i:04d}.{suffix}"
            width, height = rng.choice(((320, 180), (180, 320), (240, 240), (320, 240)))
            fps, seconds, bpm = (
                rng.choice((24, 25, 30)),
                rng.randint(4, 12) / 4,
                rng.randint(70, 150),
            )
            n_frames, silent = (
                int(seconds * fps),
                kind == "image" or (kind == "video" and rng.random() < 0.5),
            )
            materialize(
                {
                    "id": f"{kind} {i}",
                    "kind": kind,
                    "arguments": {"seed": seed},
                    "width": width,
                    "height": height,
                    "fps": fps,
                    "n_frames": n_frames,
                    "shots": rng.randint(1, 4),
                    "duration_s": seconds,
                    "has_audio": not silent,
                    "bpm": bpm,
                    "sample_rate": 24_000,
                    "channels": 1,
                },
                folder / name,
            )
            rows.append({"path": name, **probe(folder / name)})
    return rows


def index_folder(folder):
    """Probe every file under `folder` but hidden ones. Returns (rows with absolute paths, names of files left out); says why."""
    import av

    rows, bad = [], []
    for path in sorted(
        p for p in folder.resolve().rglob("*") if p.is_file() and not p.name.startswith(".")
    ):
        try:
            rows.append({"path": str(path), **probe(path)})
        except (av.FFmpegError, ValueError, OSError) as e:
            bad.append(path.name)
            print(f"  left out: {path}: {getattr(e, 'strerror', None) or e}")
    return rows, bad


def media(arguments, database):
    """`bench.py media [FOLDER]`: write `database`/index.jsonl anew for the drawn files, or for the files of FOLDER; the other rows stay."""
    if len(arguments) > 1 or (arguments and not Path(arguments[0]).is_dir()):
        raise SystemExit(
            f"error: {' '.join(arguments)} is not a folder; `python bench.py media FOLDER` indexes one"
        )
    index, bad = database / "index.jsonl", []
    before = read_jsonl(index) if index.is_file() else []
    if arguments:
        rows, bad = index_folder(Path(arguments[0]))
        kept = [
            row
            for row in before
            if not Path(row["path"]).is_relative_to(Path(arguments[0]).resolve())
        ]
    else:
        rows, kept = (
            make_media_database(database),
            [row for row in before if Path(row["path"]).is_absolute()],
        )
    database.mkdir(parents=True, exist_ok=True)
    write_jsonl(index, kept + rows)
    counts = ", ".join(f"{sum(row['kind'] == kind for row in rows)} {kind}" for kind in SUFFIXES)
    print(f"{index}: {counts} added, {len(bad)} left out, {len(kept) + len(rows)} in all")
