"""What the 36 tools make: the record of an artifact, the arithmetic of its size and time, and the
twenty behaviours that tools.yaml names (Sec. 4.3.1: "state transitions" and "output
specifications"). How long, how large and how many follow from the arguments as at the real
services; nothing is drawn or rendered. No torch.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import accumulate, chain, pairwise
from operator import add
from typing import Any

from lib.text import fill_template
from lib.toolbox import chance, load_defaults, refuse, sides, whole_frames


# ------------------------------------------------------------------ artifacts and their arithmetic
def new_artifact(kind: str, **fields: Any) -> dict:
    """An artifact with every field of its record (`defaults.record` of tools.yaml).

    A video is given by fps and `shot_frames`, its shots' lengths in frames; all else about its time
    follows.
    """
    made = {
        **load_defaults()["record"],
        "kind": kind,
        "has_audio": kind == "audio",
        "format": load_defaults()["kinds"][kind]["format"],
        **fields,
    }
    if shots := made.get("shot_frames"):
        made["shots"] = len(shots)
        made["n_frames"] = sum(shots)
        made["duration_s"] = round(sum(shots) / made["fps"], 6)
    return made


# What lies at a time of a film or a sound: lists of [start_s, end_s, ...], see `defaults.record` of
# tools.yaml. They go along when it is cut.
SPANS = ("cues", "speech", "music", "sfx")


def moved_spans(medium: dict, move: Callable[[float], float]) -> dict[str, list]:
    """{field: spans} of a medium whose second t comes to lie at move(t). `move` may turn the time
    round and put times on one another: what is left without a length is gone."""
    moved = {}
    for name in SPANS:
        if medium[name]:
            spans = [[*sorted(map(move, span[:2])), *span[2:]] for span in medium[name]]
            moved[name] = sorted(span for span in spans if span[0] < span[1])
    return moved


def louder(spans: dict[str, list], volume: float) -> dict[str, list]:
    """Spans of a sound that is turned up or down; what nobody hears is gone, captions stay."""
    heard = {}
    for name, listed in spans.items():
        if name != "cues":
            listed = [[*span[:-1], round(span[-1] * volume, 6)] for span in listed]
            listed = [span for span in listed if span[-1] > 0]
        heard[name] = listed
    return heard


def added_spans(*parts: dict[str, list]) -> dict[str, list]:
    """{field: spans} of all parts together, in the order of time."""
    return {name: sorted(chain(*(part.get(name, ()) for part in parts))) for name in SPANS}


def check_frames(seconds: float, fps: float, where: str) -> None:
    """Raise ToolError unless a film of so many seconds has a frame, and no more than the simulator
    keeps: MoviePy fails on an empty file, and the most is ours."""
    n_frames, most = whole_frames(seconds, fps), load_defaults()["most_frames"]
    if not 1 <= n_frames <= most:
        refuse(where, f"{where}: the film would have {n_frames} frames; it can have 1 to {most}")


# What can be seen all over a picture, and in each film that shows it.
ON_THE_PICTURE = ("flawed", "watermark", "logo")


def shot_lengths(marks: list[int]) -> list[int]:
    """Lengths between marks in frames; what has none is no shot."""
    return [end - start for start, end in pairwise(marks) if end > start]


def recut(clip: dict, place: Callable[[int], int] = int, **changes: Any) -> dict:
    """A video like `clip` whose frame i comes to lie at place(i), and its cuts, sounds and captions
    with it.

    `place` may turn the order round, and put frames on one another: a shot or a sound that is left
    without a frame is gone, and a video that lost all its sounds is silent. `changes` are further
    fields. As it stands, `int` moves nothing.
    """
    cuts = sorted(map(place, accumulate(clip["shot_frames"], initial=0)))
    # Spans of frames [first, end), or None: then the sound, if there is any, lasts throughout.
    sounds = clip["sound_frames"]
    if sounds:
        moved = [sorted(map(place, span)) for span in sounds]
        sounds = [span for span in moved if span[1] > span[0]]
    fps = clip["fps"]
    record = {
        **clip,
        **moved_spans(clip, lambda second: round(place(whole_frames(second, fps)) / fps, 6)),
        "format": "mp4",
        "shot_frames": shot_lengths(cuts),
        "sound_frames": sounds or None,
        "has_audio": clip["has_audio"] and sounds != [],
        **changes,
    }
    return new_artifact(**record)


def frame_size(table: dict, args: dict, sources: list[dict]) -> list[int]:
    """[width, height] in pixels, by a tool's `output` table and what the call asks for.

    By `area`: as many pixels, in the last source's aspect ratio. By `sizes`: as the aspect ratio
    that is asked for, or else the one nearest to the first source's. Else: as written, "1024x768".
    """
    size = args.get("size") or args.get("resolution") or args.get("mode") or "auto"
    if size in table.get("area", ()):
        source = sides(sources[-1])
        multiple = table["multiple_of"]
        scale = math.sqrt(table["area"][size] / math.prod(source))
        return [max(1, round(side * scale / multiple)) * multiple for side in source]
    if size in table.get("sizes", ()):
        sizes = table["sizes"][size]
        return sizes[args.get("aspect_ratio") or nearest_ratio(sizes, sources)]
    return [int(side) for side in re.split("[x*:]", size)]


def nearest_ratio(sizes: dict[str, list[int]], sources: list[dict]) -> str:
    """Of {aspect ratio: [width, height]}, the name nearest to the first source, or to a square."""
    width, height = sides(sources[0]) if sources else (1, 1)

    def distance(name: str) -> float:
        return abs(math.log(sizes[name][0] * height / (sizes[name][1] * width)))

    return min(sizes, key=distance)


def speech_seconds(speech: dict, args: dict, text: str) -> float:
    """Seconds of a spoken text: characters / rate / speed, and pauses at punctuation. `speech`
    holds the rates, which are all assumptions of ours."""
    language = args["language"]
    if language == "en" and 2 * len(re.findall(r"[\u4e00-\u9fff]", text)) > len(text):
        # The service hears the language: the default must not make Chinese three times too fast.
        language = "zh"
    marks = speech["pauses"].items()
    pauses = sum(seconds * len(re.findall(mark, text)) for mark, seconds in marks)
    spoken = len(text) / speech["chars_per_second"][language] / args["speed"]
    return round(spoken + pauses + speech["tail_s"], 2)


def check_intervals(
    intervals: list[tuple[float, float]], clip: dict, param: str, hint: str = ""
) -> None:
    """Raise ToolError unless (start, end), in seconds, lie in order and inside the video. MoviePy
    would lengthen the file instead."""
    free_from = 0
    for i, (start, end) in enumerate(intervals):
        if not free_from - 1e-6 <= start < end <= clip["duration_s"] + 1e-5:
            where = f"{param}[{i}]"
            message = f"{where} spans {start:g} to {end:g} s; it must begin after the one ahead"
            message += f" ({free_from:g} s) and end within the video ({clip['duration_s']} s){hint}"
            refuse(where, message)
        free_from = end


# --------------------------------------------------------------------------------- behaviours
# Each takes (the episode, the tool's entry, the call's arguments) and returns (new artifacts,
# further fields of the reply). In the arguments, None stands for what was left out, and media for
# their ids. An episode is read for its seed, its chances and its to-do list, and never changed: the
# call may still fail.
Made = tuple[list[dict], dict]


def generate(env: Any, tool: dict, args: dict) -> Made:
    """Images or clips: size and number follow from the arguments as at the service."""
    table = tool["output"]
    sources = args.get("images") or ([args["image"]] if "image" in args else [])
    width, height = frame_size(table, args, sources)
    if tool["makes"] == "image":
        made = new_artifact(
            "image",
            width=width,
            height=height,
            format=args.get("output_format", "png"),
            watermark=bool(args.get("watermark")),
            logo=bool(args.get("logo_add")),
            masked=bool(args.get("mask")),
            has_alpha=args.get("background") == "transparent",
        )
    else:
        # Where sizes are fixed, a source of another aspect ratio loses its edges.
        cropped = False
        if sources and "sizes" in table:
            cropped = sources[0]["width"] * height != sources[0]["height"] * width
        made = new_artifact(
            "video",
            width=width,
            height=height,
            fps=table["fps"],
            shot_frames=[int(args["duration"]) * table["fps"]],
            has_audio=args.get("generate_audio", False),
            cropped=cropped,
            # What its first frame shows, the clip shows.
            **{name: any(source[name] for source in sources) for name in ON_THE_PICTURE},
        )
    return [dict(made) for _ in range(int(args.get("n", 1)))], {}


def pipeline(env: Any, tool: dict, args: dict) -> Made:
    """A storyboard's shots, or equal ones, each cut from the shortest Veo clip that covers it. The
    seconds of these clips are what costs (`billed_s`)."""
    table, n_shots = tool["output"], int(args["n_shots"])
    if args["storyboard"]:
        seconds = [shot["duration"] for shot in args["storyboard"]["shot_list"]]
    else:
        seconds = [args["duration"] / n_shots] * n_shots
    billed_s = 0
    for shot_s in seconds:
        billed_s += min(clip_s for clip_s in table["clips_s"] if clip_s >= shot_s - 1e-6)
    cuts = [whole_frames(cut_s, table["fps"]) for cut_s in accumulate(seconds, initial=0)]
    width, height = table["sizes"][args["aspect_ratio"]]
    end_s = cuts[-1] / table["fps"]
    if args["storyboard"]:
        told = [shot.get("narration", "") for shot in args["storyboard"]["shot_list"]]
    else:
        told = [args["topic"]]
    film = new_artifact(
        "video",
        width=width,
        height=height,
        fps=table["fps"],
        shot_frames=shot_lengths(cuts),
        has_audio=args["with_music"] or args["with_narration"],
        music=[[0.0, end_s, 1.0]] if args["with_music"] else [],
        speech=[[0.0, end_s, " ".join(told), 1.0]] if args["with_narration"] else [],
        billed_s=billed_s,
    )
    return [film], {}


def music(env: Any, tool: dict, args: dict) -> Made:
    """Two songs; nobody can set their length. Tempo and first beat are for tool_beat_detect to
    find."""
    table = tool["output"]
    # Without custom_mode the service takes nothing but the prompt.
    style = args["style"] if args["custom_mode"] else None
    words = set(f"{args['prompt']} {style or ''}".lower().split())
    named = (pace for pace in ("fast", "slow") if words & set(table[pace]))
    slowest, fastest = table["bpm"][next(named, "other")]
    shortest, longest = table["duration_s"]
    songs = []
    for i in range(table["songs"]):
        seconds = round(shortest + (longest - shortest) * env.chance(f"length {i}"), 1)
        song = new_artifact(
            "audio",
            **table["file"],
            duration_s=seconds,
            music=[[0.0, seconds, 1.0]],
            bpm=round(slowest + (fastest - slowest) * env.chance(f"bpm {i}")),
            beat_offset_s=round(env.chance(f"offset {i}") / 2, 2),
        )
        songs.append(song)
    return songs, {}


def sound(env: Any, tool: dict, args: dict) -> Made:
    """Speech lasts as long as its text; an effect as long as its video, as asked, or as its prompt
    is wordy."""
    table = tool["output"]
    if "text" in args:
        seconds = speech_seconds(table, args, args["text"])
        speech = new_artifact(
            "audio",
            **table["file"],
            format=args["format"],
            duration_s=seconds,
            n_chars=len(args["text"]),
            speech=[[0.0, seconds, args["text"], 1.0]],
        )
        return [speech], {}
    if args["video"]:
        seconds = args["video"]["duration_s"]
    else:
        wordy_s = table["seconds_per_word"] * len(args["prompt"].split())
        seconds = args["duration"] or min(30, wordy_s)
    seconds = round(float(seconds), 3)
    effect = new_artifact("audio", **table["file"], duration_s=seconds, sfx=[[0.0, seconds, 1.0]])
    return [effect], {}


def tts_composite(env: Any, tool: dict, args: dict) -> Made:
    """Speech over a video that keeps its own duration; speech that does not fit is refused with
    both numbers."""
    param = "segments" if args["segments"] else "text"
    segments = args["segments"] or [{"start": 0, "text": args["text"]}]
    spoken = []
    for segment in segments:
        seconds = speech_seconds(tool["output"], args, segment["text"])
        spoken.append((segment["start"], segment["start"] + seconds))
    check_intervals(spoken, args["video"], param, "; shorten the text or raise speed")
    speech_s = round(spoken[-1][1], 2)
    clip, fps = args["video"], args["video"]["fps"]
    speech, sounds = [], []
    for segment, span_s in zip(segments, spoken):
        span = [min(whole_frames(edge_s, fps), clip["n_frames"]) for edge_s in span_s]
        sounds.append(span)
        speech.append([*(round(frame / fps, 6) for frame in span), segment["text"], 1.0])
    volume = args["original_volume"] if args["keep_original_audio"] else 0
    if volume and clip["has_audio"]:
        sounds += clip["sound_frames"] or [[0, clip["n_frames"]]]
    film = recut(
        clip,
        has_audio=True,
        sound_frames=with_gaps(sounds, clip["n_frames"]),
        spoken_chars=sum(len(segment["text"]) for segment in segments),
        speech_s=speech_s,
        **added_spans(louder({name: clip[name] for name in SPANS}, volume), {"speech": speech}),
    )
    return [film], {"speech_s": speech_s}


def composite(env: Any, tool: dict, args: dict) -> Made:
    """Clips in order; a crossfade of c s shortens by c (n - 1); size and fps are the largest of the
    clips, unless the call says otherwise."""
    clips, audio = args["videos"], args["audio"]
    width = max(clip["width"] for clip in clips)
    height = max(clip["height"] for clip in clips)
    letterboxed = any(sides(clip) != (width, height) for clip in clips)
    fps = args["fps"] or max(clip["fps"] for clip in clips)
    if short_side := load_defaults()["sizes"].get(args["resolution"]):
        shorter = min(width, height)
        # MoviePy rounds down, and keeps an odd side.
        width, height = (side * short_side // shorter for side in (width, height))

    overlap_s = args["transition_duration"] if args["transition"] == "crossfade" else 0
    cuts_s, sounds_s, spans, end_s = join_clips(clips, overlap_s)
    volume = args["audio_volume"]
    if audio and args["audio_mode"] == "replace":
        sounds_s, spans = [], {"cues": spans["cues"]}
    if audio and volume > 0:
        # Over the clips' own sound, or in its place, from the beginning.
        sounds_s.append([0, min(audio["duration_s"], end_s)])
        spans = added_spans(spans, louder({name: audio[name] for name in SPANS}, volume))

    check_frames(end_s, fps, "videos")
    shots = shot_lengths([whole_frames(cut_s, fps) for cut_s in [*cuts_s, end_s]])
    n_frames = sum(shots)
    sounds = [[whole_frames(edge_s, fps) for edge_s in span] for span in sounds_s]

    def on_a_frame(second: float) -> float:
        return round(min(whole_frames(second, fps), n_frames) / fps, 6)

    film = new_artifact(
        "video",
        width=width,
        height=height,
        fps=fps,
        shot_frames=shots,
        letterboxed=letterboxed,
        has_audio=bool(sounds),
        sound_frames=with_gaps(sounds, n_frames),
        **{name: any(clip[name] for clip in clips) for name in ON_THE_PICTURE},
        **moved_spans({**dict.fromkeys(SPANS), **spans}, on_a_frame),
    )
    return [film], {}


def join_clips(
    clips: list[dict], overlap_s: float
) -> tuple[list[float], list[list[float]], dict[str, list], float]:
    """Where all lies in clips that follow one another, each beginning `overlap_s` before the one
    ahead ends: (starts of shots, [start, end] of sounds, spans, the film's end), in seconds."""
    cuts_s, sounds_s, spans, start_s = [], [], [], 0.0
    for clip in clips:
        while cuts_s and cuts_s[-1] > start_s - 1e-9:
            # A shot that is over before the crossfade ends is no cut of its own.
            cuts_s.pop()
        for frame in accumulate(clip["shot_frames"][:-1], initial=0):
            cuts_s.append(start_s + frame / clip["fps"])
        throughout = [[0, clip["n_frames"]]] if clip["has_audio"] else []
        for span in clip["sound_frames"] or throughout:
            sounds_s.append([start_s + edge / clip["fps"] for edge in span])
        spans.append(moved_spans(clip, partial(add, start_s)))
        start_s += clip["n_frames"] / clip["fps"] - overlap_s
    return cuts_s, sounds_s, added_spans(*spans), start_s + overlap_s


def with_gaps(sounds: list[list[int]], n_frames: int) -> list[list[int]] | None:
    """Spans of sound [first, end) in order, as an artifact keeps them: None where they leave no gap
    in a film of `n_frames`, or where there are none."""
    sounds = sorted(sounds)
    silence = 0
    for first, end in sounds:
        if first <= silence:
            silence = max(silence, end)
    return sounds if sounds and silence < n_frames else None


def postprocess(env: Any, tool: dict, args: dict) -> Made:
    """Operations in order: only resize, crop and rotate change the size, only loop the duration."""
    clip = args["video"]
    width, height = sides(clip)
    for i, step in enumerate(args["operations"]):
        op, where = step["op"], f"operations[{i}]"
        for name in tool["output"]["needs"].get(op, ()):
            if name not in step:
                message = f"{where}.{name} is required by {op}"
                refuse(f"{where}.{name}", message, "missing_parameter")
        if op == "crop":
            right = step.get("x", 0) + step["width"]
            bottom = step.get("y", 0) + step["height"]
            if right > width or bottom > height:
                refuse(where, f"{where}: the crop lies outside the frame of {width}x{height}")
        if op in ("resize", "crop"):
            # MoviePy keeps odd sides; its file is then yuv444p, since colour at half size has no
            # place for them.
            width, height = (int(step[side]) for side in ("width", "height"))
        elif op == "rotate" and step["angle"] != 180:
            width, height = height, width
        elif op == "reverse":
            clip = reversed_clip(clip)
        elif op == "loop":
            check_frames(clip["n_frames"] / clip["fps"] * step["count"], clip["fps"], where)
            clip = looped_clip(clip, int(step["count"]))
        elif op == "watermark":
            clip = {**clip, "watermark": True}
    return [recut(clip, width=width, height=height)], {}


def reversed_clip(clip: dict) -> dict:
    """A video played backwards."""
    n_frames = clip["n_frames"]
    return recut(clip, lambda frame: n_frames - frame)


def looped_clip(clip: dict, times: int) -> dict:
    """A video played several times in a row."""
    sounds = clip["sound_frames"]
    if sounds:
        starts = [i * clip["n_frames"] for i in range(times)]
        sounds = [[edge + start for edge in span] for start in starts for span in sounds]
    length_s = clip["n_frames"] / clip["fps"]
    rounds = [moved_spans(clip, partial(add, i * length_s)) for i in range(times)]
    record = {
        **clip,
        "shot_frames": clip["shot_frames"] * times,
        "sound_frames": sounds,
        **added_spans(*rounds),
    }
    return new_artifact(**record)


def trim(env: Any, tool: dict, args: dict) -> Made:
    """What lies between two times, in whole frames."""
    clip = args["video"]
    seconds = min(args["end"], clip["duration_s"]) - args["start"]
    n_frames = whole_frames(seconds, clip["fps"])
    first = min(whole_frames(args["start"], clip["fps"]), clip["n_frames"] - n_frames)
    return [recut(clip, lambda frame: min(max(frame - first, 0), n_frames))], {}


def speed(env: Any, tool: dict, args: dict) -> Made:
    """Duration / factor in whole frames; the sound is sped up too."""
    clip = args["video"]
    seconds = args["target_duration"] or clip["n_frames"] / clip["fps"] / args["factor"]
    check_frames(seconds, clip["fps"], "target_duration" if args["target_duration"] else "factor")
    n_frames = whole_frames(seconds, clip["fps"])
    return [recut(clip, lambda frame: frame * n_frames // clip["n_frames"])], {}


def audio_cut(env: Any, tool: dict, args: dict) -> Made:
    """What lies between two times, or a loop of a length; the beats stay where they sound."""
    source = args["audio"]
    end = math.inf if args["end"] is None else args["end"]
    seconds = args["loop_to"] or min(end, source["duration_s"]) - args["start"]
    if args["fade_in"] + args["fade_out"] > seconds + 1e-6:
        refuse("fade_out", f"fade_in + fade_out is longer than the audio ({seconds:g} s)")
    offset_s = None
    if bpm := source.get("bpm"):
        offset_s = round((source.get("beat_offset_s", 0.0) - args["start"]) % (60 / bpm), 3)
    seconds = round(max(float(seconds), 0.001), 3)
    piece_s = max(min(end, source["duration_s"]) - args["start"], 0.001)
    made = {
        **source,
        "format": "mp3",
        "duration_s": seconds,
        "beat_offset_s": offset_s,
        **louder(looped_spans(source, args["start"], piece_s, seconds), args["volume"]),
    }
    return [made], {}


def looped_spans(source: dict, start_s: float, piece_s: float, seconds: float) -> dict[str, list]:
    """Spans of the piece of a sound that begins at `start_s`, played again and again for so many
    seconds. A span over all of the piece goes on from one round to the next; of the others, the
    first hundred rounds are listed."""
    first = moved_spans(source, lambda second: min(max(second - start_s, 0.0), piece_s))
    looped = {}
    for name, spans in first.items():
        looped[name] = []
        for start, end, *what in spans:
            throughout = end - start > piece_s - 1e-3
            n_rounds = 1 if throughout else min(100, math.ceil(seconds / piece_s))
            for began in (i * piece_s for i in range(n_rounds)):
                edges = [start, seconds] if throughout else [start + began, end + began]
                edges = [round(min(edge, seconds), 6) for edge in edges]
                if edges[0] < edges[1]:
                    looped[name].append([*edges, *what])
        looped[name].sort()
    return looped


def beats(env: Any, tool: dict, args: dict) -> Made:
    """Beat i lies at offset + 60 i / bpm; speech, effects and audio under 2 s have none."""
    source = args["audio"]
    tempo = float(source.get("bpm") or 0) if source["duration_s"] >= 2 else 0.0
    offset_s = source.get("beat_offset_s") or 0.0
    in_audio = math.ceil((source["duration_s"] - offset_s) * tempo / 60 - 1e-9)
    n_beats = min(int(args["max_beats"] or 10000), in_audio)
    times = [round(offset_s + i * 60 / tempo, 3) for i in range(n_beats)]
    reply = {"tempo": tempo, "n_beats": n_beats, "first_beats": times[:4]}
    return [new_artifact("data", tempo=tempo, beat_times=times)], reply


def subtitles(env: Any, tool: dict, args: dict) -> Made:
    """The same video with texts burnt in, each at its time."""
    clip, cues = args["video"], args["subtitles"]
    check_intervals([(cue["start"], cue["end"]) for cue in cues], clip, "subtitles")
    fps = clip["fps"]
    written = []
    for cue in cues:
        frames = [min(whole_frames(cue[edge], fps), clip["n_frames"]) for edge in ("start", "end")]
        written.append([*(round(frame / fps, 6) for frame in frames), cue["text"]])
    # A cue that falls between two frames is never seen.
    seen = [cue for cue in written if cue[0] < cue[1]]
    return [recut(clip, cues=sorted(clip["cues"] + seen))], {}


def write_text(env: Any, tool: dict, args: dict, **more: Any) -> Made:
    """A text from the tool's template, no longer than asked: a refined prompt, a script in scenes
    of one length, a summary, ... `more` is for the template and for the record."""
    seconds = args.get("duration") or 0
    n_scenes = int(args.get("n_scenes") or max(1, round(seconds / 8)))
    scenes = [seconds / n_scenes] * n_scenes
    template = tool["output"]["template"]
    text = fill_template(template, **args, **more, output=tool["output"], scenes=scenes)
    if "max_words" in args:
        text = " ".join(text.split()[: int(args["max_words"])])
    else:
        text = text[: int(args.get("max_chars", len(text)))]
    made = new_artifact(
        "text",
        text=text,
        n_chars=len(text),
        # The reply shows the beginning.
        brief=text[:197] + "..." if len(text) > 197 else text,
        lasts_s=args.get("duration"),
        n_scenes=args.get("n_scenes"),
        **more,
    )
    return [made], {}


def search(env: Any, tool: dict, args: dict) -> Made:
    """Results of a query, or the text of pages. Some pages fail: what is no address always, others
    by their name."""
    urls = args["urls"] or []
    dead_share = tool["output"]["dead_urls"] * env.failure_scale
    failed = []
    for url in urls:
        is_address = url.startswith(("http://", "https://"))
        if not is_address or chance("", url, "dead") < dead_share:
            failed.append(url)
    depth = args["extract_depth" if urls else "search_depth"]
    credits = (2 if depth == "advanced" else 1) * math.ceil(len(urls or [0]) / 5)
    results = list(range(int(args["max_results"]))) if args["query"] else []
    made, _ = write_text(env, tool, args, failed=failed, results=results, credits=credits)
    return made, {"failed_results": len(failed)} if failed else {}


def storyboard(env: Any, tool: dict, args: dict) -> Made:
    """Shots whose durations sum to the total, on a grid of 0.1 s. What the call leaves out follows
    from the script."""
    script, views = args["script"], tool["output"]["views"]
    timed = args["shot_durations"] or []
    total = args["total_duration"] or sum(timed) or script.get("lasts_s")
    told = args["n_shots"] or len(timed) or script.get("n_scenes")
    n_shots = int(told or math.ceil((total or 32) / 8))
    if timed:
        seconds = timed
    else:
        total = total or 8 * n_shots
        # On a grid of 0.1 s, unless the shots are too short for it.
        decimals = 1 if total >= 0.2 * n_shots else 3
        marks = [round(total * i / n_shots, decimals) for i in range(n_shots)] + [total]
        seconds = [round(end - start, 6) for start, end in pairwise(marks)]
    subject = " ".join(script["text"][:200].split()[:8])
    shots = []
    for i, shot_s in enumerate(seconds):
        description = f"{views[i % 4]}, {subject}"[:80]
        shots.append({"index": i + 1, "duration": shot_s, "description": description})
    made, _ = write_text(env, tool, args, shot_list=shots)
    return made, {"n_shots": n_shots}


def polish(env: Any, tool: dict, args: dict) -> Made:
    """Better wording, the same shots and durations; with a script, its narration is dealt out to
    the shots."""
    given = args["storyboard"]["shot_list"]
    words = args["script"]["text"].split() if "script" in args else []
    marks = [len(words) * i // len(given) for i in range(len(given) + 1)]
    shots = []
    for shot, (start, end) in zip(given, pairwise(marks)):
        wording = {
            "description": shot["description"].removesuffix(", detailed") + ", detailed",
            "narration": " ".join(words[start:end]),
        }
        shots.append({**shot, **wording})
    made, _ = write_text(env, tool, args, shot_list=shots)
    return made, {"n_shots": len(shots)}


def analysis(env: Any, tool: dict, args: dict) -> Made:
    """An answer from the records. It shows a few words of the medium's prompt, lest the agent
    verify itself against its own, and whether it is flawed."""
    seen = []
    for medium in args["media"][:4]:
        prompt = str(medium["arguments"].get("prompt", ""))[:400]
        words = re.findall(r"[^\W\d_]{4,}", prompt)
        shown = set()
        if words:
            for k in range(3):
                shown.add(words[int(chance(env.seed, medium["id"], k) * len(words))])
        seen.append({**medium, "words": ", ".join(sorted(shown))})
    unseen = max(0, len(args["media"]) - 4)
    return [], {"answer": fill_template("templates/analysis.jinja", seen=seen, more=unseen)}


def inspire(env: Any, tool: dict, args: dict) -> Made:
    """Pictures found for a query, in some of the sizes that the web has."""
    sizes = tool["output"]["sizes"]
    tags = args["query"].split()[:3]
    found = []
    for i in range(int(args["n"])):
        width, height = sizes[int(env.chance(i) * len(sizes))]
        found.append(new_artifact("image", width=width, height=height, tags=tags))
    return found, {}


def todo(env: Any, tool: dict, args: dict) -> Made:
    """A to-do list that lives as long as the episode. The new one is the field `todo`, which the
    episode keeps once the call has succeeded."""
    action = args["action"]
    known = {} if action == "clear" else dict(env.todo)
    for i, task in enumerate(args["tasks"] if action in ("create", "update") else ()):
        if action == "update" and task["id"] not in env.todo:
            ids = ", ".join(map(str, env.todo)) or "none"
            refuse(f"tasks[{i}].id", f"no task {task['id']}; known tasks: {ids}")
        known[task["id"]] = {"title": "", "status": "todo", **known.get(task["id"], {}), **task}
    lines = [f"{number} {task['status']}: {task['title'][:40]}" for number, task in known.items()]
    return [], {"tasks": lines[:50], "todo": known}


def html(env: Any, tool: dict, args: dict) -> Made:
    """A page that shows media; find_media has checked their ids."""
    n_media = len(args["sections"])
    return [new_artifact("html", n_media=n_media)], {"n_media": n_media}


BEHAVIOURS = {
    make.__name__: make
    for make in (
        generate,
        pipeline,
        music,
        sound,
        tts_composite,
        composite,
        postprocess,
        trim,
        speed,
        audio_cut,
        beats,
        subtitles,
        write_text,
        search,
        storyboard,
        polish,
        analysis,
        inspire,
        todo,
        html,
    )
}


# ------------------------------------------------------------------------------------ fidelity
def deviate(outputs: list[dict], more: dict) -> Made:
    """What an unfaithful simulator returns (C_tool < 1, assumption A.1), never a faithful outcome:
    an item less, unannounced; a wrong size or duration; or else a failure. The kinds are ours."""
    if not outputs or outputs[0]["kind"] not in ("image", "video", "audio"):
        refuse(None, "internal error, try again", "service_error", True)
    if len(outputs) > 1:
        return outputs[:-1], {}
    made = outputs[0]
    if "shot_frames" not in made:
        measures = [name for name in ("width", "height", "duration_s") if made[name]]
        return [{**made, **{name: made[name] * 2 for name in measures}}], more
    if made["n_frames"] > 1:
        return [recut(made, lambda frame: frame * 4 // 5)], more
    return [recut(made, lambda frame: frame * 2)], more
