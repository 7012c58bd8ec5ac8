"""Records against real files: what materialize writes, what probe sees, MoviePy; the database."""

import hashlib
import json
import os
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from env import VisGenEnv  # noqa: E402
from lib import media as media_files  # noqa: E402
from lib import toolbox  # noqa: E402
from lib.experiment import RolloutConfig  # noqa: E402
from lib.media import (  # noqa: E402
    CUT,
    frames,
    index_folder,
    make_media_database,
    materialize,
    media,
    probe,
)
from lib.text import to_json  # noqa: E402
from lib.toolbox import load_tools  # noqa: E402

MEDIA = ("image", "video", "audio")


def fresh(inputs, seed=7):
    env = VisGenEnv(RolloutConfig(failure_scale=0, tool_pool="all", max_turns=1000))
    env.reset({"id": "t", "request": "Make a film.", "inputs": inputs}, seed)
    return env


def call(env, name, **args):
    """One call -> (the new artifacts, the reply)."""
    (reply,), *_ = env.step(
        f"<think>Go.</think>\n<tool_call>{to_json({'name': name, 'arguments': args})}</tool_call>"
    )
    reply = json.loads(reply["content"])
    return [env.artifacts[i] for i in reply.get("ids", [])], reply


def clip(**more):
    """A video record, without an episode."""
    made = {
        "id": "vid_1",
        "kind": "video",
        "width": 64,
        "height": 36,
        "fps": 24,
        "n_frames": 24,
        "shots": 1,
        "has_audio": False,
        "arguments": {"prompt": "a fox"},
        **more,
    }
    return {**made, "duration_s": round(made["n_frames"] / made["fps"], 6)}


def song(**more):
    return {
        "id": "aud_1",
        "kind": "audio",
        "width": None,
        "height": None,
        "fps": None,
        "n_frames": None,
        "shots": None,
        "has_audio": True,
        "duration_s": 1.5,
        "arguments": {"prompt": "rain"},
        **more,
    }


def differences(artifact, path):
    """[(field, record, file)] of all that the file has otherwise than its record."""
    seen, names = probe(path), ("kind", "width", "height", "has_audio", "n_frames", "fps")
    found = [(name, artifact[name], seen[name]) for name in names if artifact[name] != seen[name]]
    # a record counts microseconds, or milliseconds for sounds; a sound's file can be off by half
    # a sample
    slack = 0.5 / 22_050 if artifact["kind"] == "audio" else 1.1e-6
    if artifact["kind"] != "image" and abs(artifact["duration_s"] - seen["duration_s"]) > slack:
        found.append(("duration_s", artifact["duration_s"], seen["duration_s"]))
    if artifact["kind"] == "video" and artifact["shots"] != seen["cuts"] + 1:
        found.append(("shots", artifact["shots"], seen["cuts"] + 1))
    return found


# ----------------------------------------------------------------- random chains of tools, as files


def some_inputs(rng):
    """What a user might attach: small, of odd sizes and rates too."""

    def film():
        return {
            "kind": "video",
            "width": rng.choice((64, 90, 160, 161, 320)),
            "height": rng.choice((36, 64, 90, 91, 180)),
            "duration_s": rng.randint(5, 30) / 10,
            "fps": rng.choice((12, 24, 25, 30, 50, 29.97, 23.976)),
            "shots": rng.randint(1, 4),
            "has_audio": rng.random() < 0.5,
        }

    return [
        {"kind": "image", "width": rng.randint(384, 700), "height": rng.randint(384, 700)},
        film(),
        film(),
        film(),
        {"kind": "audio", "duration_s": rng.randint(10, 80) / 10, "bpm": rng.randint(70, 150)},
    ]


def some_call(env, rng):
    """A tool and arguments that should be valid on what the episode holds."""
    held = {kind: [a for a in env.artifacts.values() if a["kind"] == kind] for kind in MEDIA}
    short = [
        v
        for v in held["video"]
        if v["n_frames"] * v["width"] * v["height"] < 9e7 and v["duration_s"] < 20
    ]
    film, picture, heard = rng.choice(short), rng.choice(held["image"]), rng.choice(held["audio"])
    seconds = film["duration_s"]
    start = round(rng.uniform(0, seconds * 0.5), 2)
    end = round(rng.uniform(start + 0.1, max(seconds, start + 0.1)), 2)
    step = rng.choice(
        (
            {
                "op": "crop",
                "width": rng.randint(2, film["width"]),
                "height": rng.randint(2, film["height"]),
            },
            {"op": "resize", "width": rng.randint(2, 400), "height": rng.randint(2, 400)},
            {"op": "rotate", "angle": rng.choice((90, 180, 270))},
            {"op": "reverse"},
            {"op": "denoise"},
            {"op": "loop", "count": rng.randint(1, 3)},
            {"op": "fade_in", "seconds": 0.2},
        )
    )
    properties = {name: tool["parameters"]["properties"] for name, tool in load_tools().items()}

    def pick(tool, param):
        return rng.choice(properties[tool][param]["enum"])

    edits = (
        ("tool_video_trim_edit", {"video": film["id"], "start": start, "end": end}),
        ("tool_video_speed_adjust", {"video": film["id"], "factor": round(rng.uniform(0.5, 4), 2)}),
        (
            "tool_video_speed_adjust",
            {"video": film["id"], "target_duration": round(seconds * rng.uniform(0.4, 2), 1)},
        ),
        (
            "tool_video_composite",
            {
                "videos": [rng.choice(short)["id"] for _ in range(rng.randint(2, 3))],
                "transition": "none",
                "audio": heard["id"],
            },
        ),
        (
            "tool_video_composite",
            {
                "videos": [film["id"], rng.choice(short)["id"]],
                "transition": "crossfade",
                "transition_duration": rng.choice((0.04, 0.1, 0.15)),
                "fps": rng.choice((24, 25, 30)),
            },
        ),
        ("tool_video_postprocess", {"video": film["id"], "operations": [step]}),
        (
            "tool_subtitle_add_text",
            {
                "video": film["id"],
                "subtitles": [{"start": 0, "end": round(seconds / 2, 2), "text": "Hello"}],
            },
        ),
        ("tool_tts_composite", {"video": film["id"], "text": "Oh", "speed": 4}),
        (
            "tool_audio_edit_cut",
            {
                "audio": heard["id"],
                "start": round(rng.uniform(0, heard["duration_s"] * 0.4), 2),
                "end": round(heard["duration_s"] * rng.uniform(0.5, 1), 2),
            },
        ),
        ("tool_audio_edit_cut", {"audio": heard["id"], "loop_to": rng.randint(5, 120) / 10}),
        (
            "tool_tts_generation",
            {"text": "The city wakes before the sun does, and so does she."[: rng.randint(3, 52)]},
        ),
        ("tool_sound_fx_gen", {"prompt": "rain", "duration": rng.randint(5, 80) / 10}),
    )
    pictures = (
        (
            "tool_text2image_gemini",
            {"prompt": "a fox", "aspect_ratio": pick("tool_text2image_gemini", "aspect_ratio")},
        ),
        ("tool_text2image_qwen", {"prompt": "a fox", "size": pick("tool_text2image_qwen", "size")}),
        (
            "tool_text2image_hunyuan",
            {"prompt": "a fox", "resolution": pick("tool_text2image_hunyuan", "resolution")},
        ),
        ("tool_text2image_gpt", {"prompt": "a fox"}),
        ("tool_search_inspire", {"query": "lighthouse", "n": 2}),
        (
            "tool_text2image_seed",
            {"prompt": "a fox", "aspect_ratio": pick("tool_text2image_seed", "aspect_ratio")},
        ),
        ("tool_image_edit_qwen", {"images": [picture["id"]], "prompt": "at night"}),
        ("tool_image_edit_gemini", {"images": [picture["id"]], "prompt": "at night"}),
    )
    # full-size clips of several seconds, and songs of minutes: few, as they cost most of the time
    long = (
        (
            "tool_text2video_veo",
            {
                "prompt": "waves",
                "duration": 4,
                "generate_audio": rng.random() < 0.5,
                "aspect_ratio": rng.choice(("16:9", "9:16")),
            },
        ),
        ("tool_image2video_keling", {"image": picture["id"], "prompt": "zoom in"}),
        (
            "tool_video_auto_pipeline",
            {
                "topic": "a harbour",
                "duration": rng.randint(40, 60) / 10,
                "n_shots": rng.randint(1, 4),
            },
        ),
        ("tool_music_suno", {"prompt": "calm piano"}),
    )
    return rng.choice(rng.choices((edits, pictures, long), (80, 16, 4))[0])


@pytest.mark.parametrize("group", range(10))
def test_files_are_what_the_records_say(group, tmp_path):
    """Ten groups of at least 24 artifacts each, from chains of valid calls."""
    wrong, done, calls, refused = [], 0, 0, 0
    for seed in range(100 * group, 100 * group + 3):
        rng = random.Random(seed)
        env = fresh(some_inputs(rng), seed)
        for _ in range(10):
            name, args = some_call(env, rng)
            _, reply = call(env, name, **args)
            calls, refused = calls + 1, refused + ("error" in reply)
        for artifact in env.artifacts.values():
            suffixes = media_files.SUFFIXES[artifact["kind"]]
            path = (
                tmp_path
                / f"a{suffixes[0] if (artifact['duration_s'] or 0) > 60 else rng.choice(suffixes)}"
            )  # a song's MP3 takes 5 s
            materialize(artifact, path)
            wrong += [
                (seed, artifact["id"], artifact["tool"], *found)
                for found in differences(artifact, path)
            ]
            done += 1
            assert path.stat().st_size > 0 and not list(tmp_path.glob("*.tmp"))
            path.unlink()
    assert not wrong, wrong
    assert done >= 24 and refused <= calls // 4, (done, calls, refused)


def test_a_wrong_record_is_noticed(tmp_path):
    """Every attribute that the chains compare can be told from the file.

    One frame, one pixel, one millisecond, one cut.
    """
    film, tone = clip(shots=3, has_audio=True), song()
    materialize(film, tmp_path / "a.mp4")
    materialize(tone, tmp_path / "a.mp3")
    assert not differences(film, tmp_path / "a.mp4") and not differences(tone, tmp_path / "a.mp3")
    for name, value in {
        "width": 66,
        "height": 34,
        "fps": 25,
        "n_frames": 25,
        "has_audio": False,
        "shots": 4,
        "duration_s": 1.001,
        "kind": "image",
    }.items():
        found = differences({**film, name: value}, tmp_path / "a.mp4")
        assert [f for f, *_ in found] == [name], (name, found)
    assert [f for f, *_ in differences({**tone, "duration_s": 1.501}, tmp_path / "a.mp3")] == [
        "duration_s"
    ]


# ---------------------------------------------------------------------------- single files


@pytest.mark.parametrize(
    "record",
    [
        clip(n_frames=1),
        clip(n_frames=1, has_audio=True),
        clip(width=2, height=2, n_frames=5, shots=5),
        clip(width=853, height=479, has_audio=True),
        clip(width=2, height=2000, n_frames=3),
        clip(fps=23.976, n_frames=50),
        clip(fps=29.97, n_frames=31, shots=31),
        clip(fps=60, n_frames=7),
        song(duration_s=0.001),
        song(duration_s=4.37, sample_rate=24_000, channels=1),
        song(duration_s=0.5, sample_rate=44_100),
    ],
)
def test_small_and_odd_files(record, tmp_path):
    for suffix in media_files.SUFFIXES[record["kind"]]:
        materialize(record, tmp_path / f"a{suffix}")
        assert not differences(record, tmp_path / f"a{suffix}")


def test_a_shot_of_one_frame_is_a_cut_and_motion_is_none():
    """Unequal shots stand where the record has them; the margin to CUT is wide on both sides."""
    import numpy

    record = clip(n_frames=30, shots=4, shot_frames=[1, 20, 2, 7])
    small = [
        frame.to_ndarray()[: record["height"] : 2, ::2].astype(int) for frame in frames(record)
    ]  # brightness
    jumps = [float(numpy.abs(b - a).mean()) for a, b in zip(small, small[1:])]
    at = [i + 1 for i, jump in enumerate(jumps) if jump > CUT]
    assert len(small) == 30 and at == [1, 21, 23]
    assert (
        min(jumps[i - 1] for i in at) > 2 * CUT
        and max(j for i, j in enumerate(jumps) if i + 1 not in at) < CUT / 2
    )


def test_grain_is_no_cut_and_does_not_hide_one(tmp_path):
    """Single pixels change in every frame of a grainy film; the fields' averages change once."""
    import av
    import numpy

    rng = numpy.random.default_rng(0)
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"preset": "ultrafast", "qp": "10"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for low in [0] * 6 + [100] * 6:
            picture = rng.integers(low, low + 150, (240, 320, 3)).astype("uint8")
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode(None))
    assert (probe(tmp_path / "a.mp4")["n_frames"], probe(tmp_path / "a.mp4")["cuts"]) == (12, 1)


def test_numbers_of_a_file_are_plain_ones(tmp_path):
    """av 18 gives Fractions, av 19 numbers of its own that are neither int nor float."""

    class Rational:
        numerator, denominator = 30_000, 1001

    assert media_files.fraction(Rational()) == Fraction(30_000, 1001)
    materialize(clip(fps=30, n_frames=45), tmp_path / "a.mp4")
    seen = probe(tmp_path / "a.mp4")
    assert (type(seen["fps"]), type(seen["duration_s"])) == (int, float)
    assert (seen["fps"], seen["duration_s"], seen["n_frames"]) == (30, 1.5, 45)
    ((second, picture),) = media_files.stills(tmp_path / "a.mp4", (0.5,))
    assert abs(second - 0.75) < 0.05 and picture.size == (64, 36)


def test_frames_are_made_one_at_a_time():
    import tracemalloc

    record = clip(width=320, height=180, n_frames=300, shots=2)
    sum(1 for _ in frames(record))  # fonts and modules are loaded now
    tracemalloc.start()
    count = sum(1 for _ in frames(record))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 300 and peak < 6 * 320 * 180 * 3


def test_silence_where_the_record_has_no_sound():
    record = clip(n_frames=48, has_audio=True, sound_frames=[[24, 48], [36, 48]])
    heard = media_files.sound(record, 0, 96_000, 48_000, 2)
    assert (
        heard.shape == (2, 96_000)
        and not heard[:, :48_000].any()
        and 0.1 < abs(heard[:, 48_000:]).max() < 0.4
    )


def test_beats_are_where_the_record_has_them():
    """120 bpm from 0.35 s on: the envelope jumps at 0.35, 0.85, 1.35 s."""
    import numpy

    loud = (
        numpy.abs(media_files.sound(song(bpm=120, beat_offset_s=0.35), 0, 96_000, 48_000, 1)[0])
        .reshape(-1, 480)
        .max(axis=1)
    )  # 10 ms each
    assert [i for i in range(1, 200) if loud[i] > 2 * loud[i - 1]] == [35, 85, 135, 185]


def test_same_artifact_same_bytes_another_one_others(tmp_path):
    """In this process and in one with another hash seed; ids and prompts tell stand-ins apart."""

    def digest(record, name):
        materialize(record, tmp_path / name)
        return hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()

    picture = {**clip(), "kind": "image"}
    film = clip(has_audio=True, shots=2)
    for record, suffix in (
        (film, ".mp4"),
        (film, ".mov"),
        (song(), ".wav"),
        (song(), ".mp3"),
        (picture, ".png"),
        (picture, ".jpg"),
    ):
        first = digest(record, "a" + suffix)
        assert digest(record, "b" + suffix) == first
        assert digest({**record, "id": "other_1"}, "c" + suffix) != first
        assert digest({**record, "arguments": {"prompt": "an owl"}}, "d" + suffix) != first
        path = str(tmp_path / ("e" + suffix))
        code = f"from lib.media import materialize; materialize({record!r}, {path!r})"
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "5"},
        )
        assert hashlib.sha256((tmp_path / ("e" + suffix)).read_bytes()).hexdigest() == first


def test_texts_are_written_as_text(tmp_path):
    env = fresh(
        [
            {"kind": "image", "width": 64, "height": 64},
            {"kind": "audio", "duration_s": 10.0, "bpm": 120},
        ]
    )
    (script,), _ = call(env, "tool_video_script_gen", topic="a lighthouse", duration=30)
    (page,), _ = call(
        env,
        "tool_html_builder",
        title="Sea & <b>",
        sections=[{"heading": "one", "text": "a < b", "media_ids": ["in_1"]}],
    )
    (beats,), _ = call(env, "tool_beat_detect", audio="in_2")
    for artifact, name in ((script, "a.txt"), (page, "a.html"), (beats, "a.json")):
        materialize(artifact, tmp_path / "new" / name)
    assert (tmp_path / "new/a.txt").read_text(encoding="utf-8") == script["text"]
    written = (tmp_path / "new/a.html").read_text(encoding="utf-8")
    assert (
        "<title>Sea &amp; &lt;b&gt;</title>" in written
        and "a &lt; b" in written
        and "in_1" in written
    )
    assert (
        json.loads((tmp_path / "new/a.json").read_text(encoding="utf-8"))["beat_times"]
        == beats["beat_times"]
    )


def test_a_suffix_that_cannot_hold_the_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kind video of vid_1 can be written as .mp4"):
        materialize(clip(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ the same edits by MoviePy


def open_clip(path):
    """MoviePy's clip of a file, as long as the film is.

    MoviePy reads the duration that ffmpeg prints, which is in hundredths (25 frames at 24 fps are
    1.04 s, of which it makes 24) and counts sound that goes on after the last frame, as in the
    films MoviePy writes.
    """
    from moviepy import VideoFileClip

    film, seen = VideoFileClip(str(path)), probe(path)
    seconds = seen["n_frames"] / seen["fps"]
    assert seconds - 0.0051 < film.duration < seconds + 1 / seen["fps"] + 0.0051
    return film.with_duration(seconds)


def effect_of(step):
    """MoviePy's effect of one step of tool_video_postprocess."""
    from moviepy import vfx

    if step["op"] == "loop":
        return vfx.Loop(n=step["count"])
    if step["op"] == "rotate":
        return vfx.Rotate(step["angle"])
    if step["op"] == "crop":
        return vfx.Crop(x1=0, y1=0, width=step["width"], height=step["height"])
    if step["op"] == "resize":
        return vfx.Resize((step["width"], step["height"]))
    return {"reverse": vfx.TimeMirror}[step["op"]]()


def edit(name, args, files, out):
    """One tool's call by MoviePy on files by id; writes `out`.

    Returns the clip's duration in s and its fps as MoviePy has them.
    """
    from moviepy import (
        AudioFileClip,
        CompositeAudioClip,
        CompositeVideoClip,
        TextClip,
        concatenate_videoclips,
        vfx,
    )

    opened = [open_clip(files[i]) for i in args.get("videos", [args.get("video")])]
    film = opened[0]
    if name == "tool_video_trim_edit":
        film = film.subclipped(args["start"], min(args["end"], film.duration))
    elif name == "tool_video_speed_adjust":
        film = film.with_speed_scaled(
            factor=args.get("factor"), final_duration=args.get("target_duration")
        )
    elif name == "tool_subtitle_add_text":
        cues = [
            TextClip(text=cue["text"], font_size=12, color="white")
            .with_start(cue["start"])
            .with_end(cue["end"])
            for cue in args["subtitles"]
        ]
        film = CompositeVideoClip([film, *cues])
    elif name == "tool_video_composite":
        overlap = args["transition_duration"] if args.get("transition") == "crossfade" else 0
        fading = [c.with_effects([vfx.CrossFadeIn(overlap)]) if overlap else c for c in opened[1:]]
        film = concatenate_videoclips([film, *fading], method="compose", padding=-overlap)
        if "audio" in args:
            opened.append(AudioFileClip(str(files[args["audio"]])))
            heard = (
                [opened[-1]]
                if args.get("audio_mode") == "replace" or film.audio is None
                else [film.audio, opened[-1]]
            )
            film = film.with_audio(CompositeAudioClip(heard).with_duration(film.duration))
    elif name == "tool_video_postprocess":
        # MoviePy 2.2 raises an IndexError where it mirrors or loops a file's sound
        made = film.without_audio()
        for step in args["operations"]:
            made = made.with_effects([effect_of(step)])
        film = (
            made.with_audio(CompositeAudioClip([film.audio]).with_duration(made.duration))
            if film.audio
            else made
        )
    fps = args.get("fps") or film.fps
    film.write_videofile(
        str(out),
        fps=fps,
        codec="libx264",
        preset="ultrafast",
        audio_codec="aac",
        threads=1,
        temp_audiofile_path=str(out.parent),
        logger=None,
    )
    for each in opened:
        each.close()
    return film.duration, fps


def compare(artifact, name, args, files, folder):
    """Edit with MoviePy, hold the file against the record, and file it for the next edit.

    Returns the frames that MoviePy lost to binary fractions: int(0.6 * 30) is right,
    int((0.7 - 0.1) * 30) is 17. Then the next edit starts from the record's own file.
    """
    out = folder / f"{artifact['id']}.mp4"
    seconds, fps = edit(name, args, files, out)
    found, lost = (
        [f for f in differences(artifact, out) if f[0] != "shots"],
        0,
    )  # a real crossfade leaves no cut to count
    if [field for field, *_ in found] == ["n_frames", "duration_s"]:
        lost = artifact["n_frames"] - probe(out)["n_frames"]
        assert lost == 1 and artifact["n_frames"] - 1e-5 < seconds * fps < artifact["n_frames"], (
            name,
            args,
            found,
            seconds,
            fps,
        )
        materialize(artifact, out)
        found = []
    assert not found, (name, args, found)
    files[artifact["id"]] = out
    return lost


def studio(folder, *lengths, fps=24, seed=7):
    """(an episode with 64x36 clips of these lengths and a song of 2 s, their files by id)."""
    env = fresh(
        [
            {
                "kind": "video",
                "width": 64,
                "height": 36,
                "duration_s": s,
                "fps": fps,
                "shots": 1 + i % 3,
                "has_audio": i % 2 == 0,
            }
            for i, s in enumerate(lengths)
        ]
        + [{"kind": "audio", "duration_s": 2.0}],
        seed,
    )
    files = {}
    for artifact in env.artifacts.values():
        files[artifact["id"]] = (
            folder / f"{artifact['id']}{media_files.SUFFIXES[artifact['kind']][0]}"
        )
        materialize(artifact, files[artifact["id"]])
    return env, files


def test_golden_chain_in_moviepy(tmp_path):
    """facts/tools.md, section 5, by MoviePy itself: 552, 441, 501 and 342 frames."""
    env, files = studio(tmp_path, 8, 8, 8, 10)
    chain = [
        (
            "tool_video_composite",
            {
                "videos": ["in_1", "in_2", "in_3"],
                "transition": "crossfade",
                "transition_duration": 0.5,
            },
            552,
        ),
        ("tool_video_speed_adjust", {"video": "vid_1", "factor": 1.25}, 441),
        ("tool_video_speed_adjust", {"video": "vid_1", "factor": 1.1}, 501),
        ("tool_video_speed_adjust", {"video": "in_4", "factor": 0.7}, 342),
    ]
    for name, args, n_frames in chain:
        (made,), _ = call(env, name, **args)
        assert (
            compare(made, name, args, files, tmp_path) == 0
            and made["n_frames"] == n_frames == probe(files[made["id"]])["n_frames"]
        )


def moviepy_call(env, rng, step):
    """The next edit of a chain: each kind in turn, on the newest film."""
    film = [a for a in env.artifacts.values() if a["kind"] == "video"][-1]
    seconds, video = film["duration_s"], {"video": film["id"]}
    start = round(rng.uniform(0, 0.4) * seconds, 1)
    return (
        ("tool_video_trim_edit", {**video, "start": start, "end": round(seconds - 0.1, 1)}),
        (
            "tool_video_composite",
            {
                "videos": ["in_1", film["id"], "in_2"],
                "transition": "crossfade",
                "transition_duration": rng.choice((0.1, 0.2, 0.25)),
            },
        ),
        ("tool_video_speed_adjust", {**video, "factor": round(rng.uniform(0.6, 2), 2)}),
        (
            "tool_subtitle_add_text",
            {**video, "subtitles": [{"start": 0.1, "end": 0.4, "text": "Hi"}]},
        ),
        (
            "tool_video_composite",
            {
                "videos": [film["id"], "in_2"],
                "audio": "in_3",
                "audio_mode": rng.choice(("mix", "replace")),
            },
        ),
        (
            "tool_video_speed_adjust",
            {**video, "target_duration": round(seconds * rng.uniform(0.5, 1.4), 1)},
        ),
        (
            "tool_video_postprocess",
            {
                **video,
                "operations": [
                    {"op": "crop", "width": 48, "height": 32},
                    {"op": "rotate", "angle": 90},
                    {"op": "reverse"},
                    {"op": "resize", "width": 40, "height": 40},
                ],
            },
        ),
        ("tool_video_postprocess", {**video, "operations": [{"op": "loop", "count": 2}]}),
    )[step % 8]


@pytest.mark.parametrize("fps", [24, 25, 30])
@pytest.mark.parametrize("seed", range(2))
def test_random_chains_in_moviepy(fps, seed, tmp_path):
    """Eight edits in a row, each on MoviePy's own file of the one before.

    Frames, size and sound are the record's.
    """
    rng = random.Random(f"{fps} {seed}")
    env, files = studio(
        tmp_path, rng.randint(8, 15) / 10, rng.randint(8, 15) / 10, fps=fps, seed=seed
    )
    lost = 0
    for step in range(8):
        name, args = moviepy_call(env, rng, step + seed)
        (made,), reply = call(env, name, **args)
        lost += compare(made, name, args, files, tmp_path)
    print(f"{fps} fps, seed {seed}: {lost} of 8 edits lost a frame in MoviePy")
    assert lost <= 3


# ---------------------------------------------------------------------------- the media database


def test_the_drawn_database_is_the_one_that_records_name(tmp_path, monkeypatch):
    """The index is read; and the same files are named when there is none.

    So no record depends on the database.
    """

    def stand_ins():
        toolbox.media_files.cache_clear()
        env = fresh(
            [
                {"kind": kind, "width": 64, "height": 64, "duration_s": 4.0}
                for kind in MEDIA
                for _ in range(30)
            ]
        )
        return [artifact["media"] for artifact in env.artifacts.values()]

    fresh([])  # the prompt's template is read before the root moves
    rows = make_media_database(tmp_path / "data/media", per_kind=3)
    monkeypatch.setattr(toolbox, "ROOT", tmp_path)
    without = stand_ins()
    assert len(set(without)) > 60
    (tmp_path / "data/media/index.jsonl").write_text(
        "".join(to_json(row) + "\n" for row in rows), encoding="utf-8"
    )
    assert set(stand_ins()) == {row["path"] for row in rows} and len(rows) == 9
    toolbox.media_files.cache_clear()
    names = {
        f"{kind}/{i:04d}.{suffix}"
        for kind, suffix in zip(MEDIA, ("png", "mp4", "wav"))
        for i in range(media_files.PER_KIND)
    }
    assert {row["path"] for row in rows} | set(without) <= names
    for row in rows:
        assert row == {"path": row["path"], **probe(tmp_path / "data/media" / row["path"])}


def test_drawing_is_seeded(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_media_database(tmp_path / name, per_kind=1, seed=seed)
    for file in ("image/0000.png", "video/0000.mp4", "audio/0000.wav"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_a_users_folder_is_added_and_bad_files_are_named(tmp_path, monkeypatch, capsys):
    database, own = tmp_path / "media", tmp_path / "mine"
    monkeypatch.setattr(
        media_files, "make_media_database", lambda folder: make_media_database(folder, per_kind=1)
    )
    media([], database)
    materialize(clip(shots=2, has_audio=True), own / "deep/film.mp4")
    materialize(song(), own / "song.mp3")
    materialize({**clip(), "kind": "image"}, own / "picture.jpg")
    whole = (own / "deep/film.mp4").read_bytes()
    (own / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    (own / "notes.txt").write_text("buy milk\n", encoding="utf-8")
    (own / ".hidden").write_text("x", encoding="utf-8")
    capsys.readouterr()
    for _ in range(2):  # again: nothing twice
        media([str(own)], database)
        said = capsys.readouterr().out
        assert (
            "broken.mp4: Invalid data" in said and "notes.txt: " in said and ".hidden" not in said
        )
        assert "1 image, 1 video, 1 audio added, 2 left out, 6 in all" in said
    rows = [
        json.loads(line)
        for line in (database / "index.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    mine = {Path(row["path"]).name: row for row in rows if Path(row["path"]).is_absolute()}
    assert set(mine) == {"film.mp4", "song.mp3", "picture.jpg"}
    film = mine["film.mp4"]
    assert [
        film[name] for name in ("kind", "width", "height", "n_frames", "cuts", "has_audio")
    ] == ["video", 64, 36, 24, 1, True]
    media([], database)  # drawing again keeps the user's rows
    assert "3 in all" not in (said := capsys.readouterr().out) and "6 in all" in said


def test_text_that_ffmpeg_would_play_is_no_film(tmp_path):
    (tmp_path / "notes.ans").write_text("notes of mine\n", encoding="utf-8")
    rows, bad = index_folder(tmp_path)
    assert (rows, bad) == ([], ["notes.ans"])


def test_a_missing_folder_is_one_line():
    done = subprocess.run(
        [sys.executable, "bench.py", "media", "/no/such/folder"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: /no/such/folder is not a folder")
