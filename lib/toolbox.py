"""lib.toolbox."""

import hashlib
import json
import math
import re
from functools import lru_cache
from itertools import accumulate, filterfalse
from operator import contains, ge, itemgetter, le

import yaml

from lib.runs import ROOT
from lib.text import fill_template, to_json


@lru_cache(maxsize=1)
def read_sheet():
    """tools.yaml, with what its entries leave out and the patterns that moderation searches for."""
    sheet = yaml.load(
        (ROOT / "tools.yaml").read_text(encoding="utf-8"),
        getattr(yaml, "CSafeLoader", yaml.SafeLoader),
    )
    words, providers = sheet["defaults"]["blocked_words"], sheet["defaults"]["providers"]
    for name, tool in sheet["tools"].items():
        tool = sheet["tools"][name] = {
            "name": name,
            **sheet["defaults"]["entry"],
            **tool,
            "provider": providers[tool["provider"]],
        }
        tool["blank"] = {
            param: schema.get("default")
            for param, schema in tool["parameters"]["properties"].items()
        }
    for category in (
        words
    ):  # a word ends where its letters end, so that "gored" passes; Chinese has no such ends
        words[category] = re.compile(
            f"(?<![a-z])(?:{'|'.join(map(re.escape, words[category]))})(?![a-z])", re.IGNORECASE
        )
    return sheet


def load_tools():
    """The tools of Table 9 by name, in its order. Read once and shared: do not modify."""
    return read_sheet()["tools"]


def load_defaults():
    """What all tools share: failure rates, limits, providers and blocked words, from the head of tools.yaml."""
    return read_sheet()["defaults"]


def tool_schemas(names):
    """The named tools in OpenAI's form, as chat templates take them in `tools`."""
    return [
        {
            "type": "function",
            "function": {
                part: load_tools()[name][part] for part in ("name", "description", "parameters")
            },
        }
        for name in names
    ]


def tool_signature(name):
    """One line such as `tool_text2image_gemini(prompt, aspect_ratio="1:1", n=1)`; a `?` marks an optional one."""
    required, blank = load_tools()[name]["parameters"]["required"], load_tools()[name]["blank"]
    optional = [
        p + "?" if value is None else f"{p}={to_json(value)}"
        for p, value in blank.items()
        if p not in required
    ]
    return f"{name}({', '.join(required + optional)})"


@lru_cache(maxsize=8)
def media_files(kind):
    """Files of the media database; without a database, names that one would have; none for kinds without stand-ins."""
    index, suffix = ROOT / "data/media/index.jsonl", load_defaults()["kinds"][kind].get("stand_in")
    rows = (
        [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
        if index.exists()
        else []
    )
    return [row["path"] for row in rows if row["kind"] == kind] or [
        f"{kind}/{i:04d}.{suffix}" for i in range(100 if suffix else 0)
    ]


def chance(seed, index, purpose):
    """A number in [0, 1) that depends on nothing but its arguments, in any process."""
    return (
        int.from_bytes(
            hashlib.blake2b(f"{seed}|{index}|{purpose}".encode(), digest_size=8).digest(), "big"
        )
        >> 11
    ) / 2**53


# ---------------------------------------------------------------------------- validation
class ToolError(Exception):
    """A refused or failed call: code, param, message, retryable. VisGenEnv turns it into the reply's error object."""


def refuse(param, message, code="invalid_parameter", retryable=False):
    raise ToolError(code, param, message, retryable)


TYPES = {
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "number": (int, float),
    "integer": (int, float),
}
KEYWORDS = {  # of JSON Schema: what must hold of its bound and a value, and the words for it
    "type": (
        lambda kind, value: type(value) in TYPES[kind] and (kind != "integer" or value % 1 == 0),
        "be of type {}",
    ),  # 8.0 is the integer 8
    "enum": (contains, "be one of {}"),
    "minimum": (le, "be at least {}"),
    "maximum": (ge, "be at most {}"),
    "minLength": (
        lambda least, value: len(value) >= least and not value.isspace(),
        "have at least {} characters, not only spaces",
    ),
    "maxLength": (lambda most, value: len(value) <= most, "have at most {} characters"),
    "minItems": (lambda least, value: len(value) >= least, "have at least {} items"),
    "maxItems": (lambda most, value: len(value) <= most, "have at most {} items"),
    "pattern": (re.search, "match {}"),
}


def check_schema(value, schema, where):
    """Raise ToolError when a value does not fit its JSON Schema; `where` is its path, such as subtitles[0].end."""
    for keyword, bound in schema.items():
        if keyword in KEYWORDS and not KEYWORDS[keyword][0](bound, value):
            refuse(
                where,
                f"{where} must {KEYWORDS[keyword][1].format(bound)}, got {to_json(value):.40}",
            )
    if (
        "properties" in schema
    ):  # names first, then required ones, then values: the order in which a reader would mend it
        properties, inside = schema["properties"], where + "." if where else ""
        for name in filterfalse(properties.__contains__, value):
            refuse(
                f"{inside}{name:.40}",
                f"unknown parameter {to_json(name):.40}; known: {', '.join(properties)}",
                "unknown_parameter",
            )
        for name in filterfalse(value.__contains__, schema["required"]):
            refuse(inside + name, f"{inside}{name} is required", "missing_parameter")
        for name, item in value.items():
            check_schema(item, properties[name], inside + name)
    for i, item in enumerate(value) if "items" in schema else ():
        check_schema(item, schema["items"], f"{where}[{i}]")


sides = itemgetter("width", "height")
LIMITS = {  # of a medium, true where it is within the service's limit; tools.yaml holds the codes and messages
    "kinds": lambda m, kinds: m["kind"] in kinds,
    "has": lambda m, name: name in m,
    "formats": lambda m, formats: m["format"] in formats,
    "least_px": lambda m, least: min(sides(m)) >= least,
    "most_px": lambda m, most: max(sides(m)) <= most,
    "aspect": lambda m, most: max(sides(m)) <= most * min(sides(m)),
    "duration_s": lambda m, span: span[0] <= m["duration_s"] <= span[1],
}


def find_media(artifacts, tool, a):
    """Put artifacts in place of ids, if they are of the right kind and within the service's limits; returns the call's parents [{id, role}]."""
    parents = []
    for param, limits in tool["media"].items():
        given = a[param]
        if limits.get("or_text") and given not in artifacts:
            a[param], given = {"text": given}, None
        if given is None:
            continue
        many, inside = isinstance(given, list), limits.get("inside")
        ids = (
            [(f"{param}[{i}]", media_id) for i, media_id in enumerate(given)]
            if many
            else [(param, given)]
        )
        if inside:  # ids lie one level deeper
            ids = [
                (f"{where}.{inside}[{i}]", media_id)
                for where, item in ids
                for i, media_id in enumerate(item.get(inside, ()))
            ]
        for where, media_id in ids:
            if media_id not in artifacts:
                known = (
                    ", ".join(
                        [i for i, m in artifacts.items() if m["kind"] in limits["kinds"]][-12:]
                    )
                    or "none"
                )
                refuse(
                    where,
                    f"{where}: no media {to_json(media_id):.40} here; known {limits['kinds'][0]} ids: {known}",
                    "file_not_found",
                )
            for name, rule in load_defaults()["media_limits"].items():
                if name in limits and not LIMITS[name](artifacts[media_id], limits[name]):
                    refuse(
                        where,
                        rule["message"].format(
                            where=where, m=artifacts[media_id], limit=limits[name]
                        ),
                        rule["code"],
                    )
            parents.append({"id": media_id, "role": limits["role"]})
        a[param] = [artifacts[media_id] for _, media_id in ids] if many else artifacts[given]
    return parents


RULES = {  # checks across fields, of a rule's entry in tools.yaml and the call's parameters, true where all is well; the last five give warnings
    "how_many_given": lambda r, a: (
        r["least"] <= sum(a[name] is not None for name in r["of"]) <= r["most"]
    ),
    "one_of": lambda r, a: a[r["of"]] in r["values"],
    "lengths": lambda r, a: all(len(a[name] or "") <= most for name, most in r["most"].items()),
    "prompt_tokens": lambda r, a: (
        a["prompt"].isascii()
        or len(a["prompt"]) + 3 * len(re.findall(r["wide"], a["prompt"])) <= 4096
    ),
    "shots_count": lambda r, a: (
        None in (a["shot_durations"], a["n_shots"]) or len(a["shot_durations"]) == a["n_shots"]
    ),
    "shots_sum": lambda r, a: (
        None in (a["shot_durations"], a["total_duration"])
        or abs(sum(a["shot_durations"]) - a["total_duration"]) <= 0.1 + 1e-9
    ),
    "start_before_end": lambda r, a: (
        a["start"] < (a[r["of"]]["duration_s"] if a["end"] is None else a["end"])
    ),
    "end_inside": lambda r, a: (a["end"] or 0) <= a[r["of"]]["duration_s"] + 1e-5,
    "spans_a_frame": lambda r, a: (
        whole_frames(min(a["end"], a["video"]["duration_s"]) - a["start"], a["video"]["fps"]) >= 1
    ),
    "loops_fit": lambda r, a: (
        a["video"]["n_frames"] * math.prod(step.get("count", 1) for step in a["operations"])
        <= 10**6
    ),
    "transition_fits": lambda r, a: (
        a["transition_duration"] * 2 < min(clip["duration_s"] for clip in a["videos"])
    ),
    "few_images": lambda r, a: len(a["images"] or ()) + a["n"] * r["outputs"] <= r["most"],
    "shots_fit": lambda r, a: a["storyboard"] or 1 <= a["duration"] / a["n_shots"] <= 8,
    "storyboard_fits": lambda r, a: (
        not a["storyboard"] or max(shot["duration"] for shot in a["storyboard"]["shot_list"]) <= 8
    ),
    "factor_in_range": lambda r, a: (
        a["target_duration"] is None or 0.25 <= a["video"]["duration_s"] / a["target_duration"] <= 4
    ),
    "sides_fit": lambda r, a: all(
        r["least"] <= int(side) <= r["most"] for side in re.findall("[0-9]{2,}", a["size"] or "")
    ),
    "mask_fits": lambda r, a: (
        a["mask"] is None or [sides(a["mask"])] == [sides(image) for image in a["images"]]
    ),
    "hardly_cropped": lambda r, a: (
        abs(
            math.log(
                a["image"]["width"]
                / a["image"]["height"]
                * a["made"][0]["height"]
                / a["made"][0]["width"]
            )
        )
        <= 0.05
    ),
    "audio_lasts": lambda r, a: (
        a["audio"] is None or a["audio"]["duration_s"] >= a["made"][0]["duration_s"] - 0.05
    ),
    "one_size": lambda r, a: not a["made"][0]["letterboxed"],
    "has_beats": lambda r, a: a["made"][0]["beat_times"],
    "short_shots": lambda r, a: max(shot["duration"] for shot in a["made"][0]["shot_list"]) <= 10,
}


def broken(rules, a):
    """The rules that do not hold and apply (`when` parameters have these values), one after the other."""
    return (
        rule
        for rule in rules
        if not RULES[rule["rule"]](rule, a)
        and all(a[p] in values for p, values in rule.get("when", {}).items())
    )


# ---------------------------------------------------------------------------- media records and their arithmetic
def new_artifact(kind, **fields):
    """A new artifact with every field of the Artifact record. A video is the list of its shots' lengths in frames; all about its time follows."""
    made = {
        **load_defaults()["record"],
        "kind": kind,
        "has_audio": kind == "audio",
        "format": load_defaults()["kinds"][kind]["format"],
        **fields,
    }
    if shots := made.get("shot_frames"):
        made.update(
            shots=len(shots), n_frames=sum(shots), duration_s=round(sum(shots) / made["fps"], 6)
        )
    return made


def recut(clip, place=int, **changes):
    """A video like `clip` whose frame i comes to lie at place(i), and its cuts and sounds with it. What lost all its sound has none."""
    cuts = sorted(map(place, accumulate(clip["shot_frames"], initial=0)))
    sounds = clip["sound_frames"] and [
        span
        for span in (sorted(map(place, span)) for span in clip["sound_frames"])
        if span[1] > span[0]
    ]
    heard = clip["has_audio"] and sounds != []
    return new_artifact(
        **{
            **clip,
            "format": "mp4",
            "shot_frames": shot_lengths(cuts),
            "sound_frames": sounds or None,
            "has_audio": heard,
            **changes,
        }
    )


def whole_frames(seconds, fps):
    """Whole frames of a time, exact for up to six decimals; a margin of 1/2000 frame absorbs that durations are shown rounded."""
    return (round(seconds * 1_000_000) * round(fps * 1000) + 500_000) // 10**9


def shot_lengths(marks):
    """Lengths between marks in frames; what has none is no shot."""
    return [b - a for a, b in zip(marks, marks[1:]) if b > a]


def frame_size(table, a, sources):
    """Sides in pixels: in the last source's aspect (`area`); from `sizes` by aspect ratio, if need be the nearest to the first source; or as told."""
    size = a.get("size") or a.get("resolution") or a.get("mode") or "auto"
    if size in table.get("area", ()):
        scale, multiple = (
            math.sqrt(table["area"][size] / math.prod(sides(sources[-1]))),
            table["multiple_of"],
        )
        return [max(1, round(side * scale / multiple)) * multiple for side in sides(sources[-1])]
    if size not in table.get("sizes", ()):
        return [int(side) for side in re.split("[x*:]", size)]
    sizes, (width, height) = table["sizes"][size], sides(sources[0]) if sources else (1, 1)
    return sizes[
        a.get("aspect_ratio")
        or min(
            sizes,
            key=lambda name: abs(math.log(sizes[name][0] * height / (sizes[name][1] * width))),
        )
    ]


def speech_seconds(speech, args, words):
    """Length of a spoken text: characters / rate / speed, and pauses at punctuation (all rates are assumptions)."""
    language = args["language"]
    if language == "en" and 2 * len(re.findall(r"[\u4e00-\u9fff]", words)) > len(words):
        language = "zh"  # the service hears the language: the default must not make Chinese three times too fast
    pauses = sum(
        seconds * len(re.findall(mark, words)) for mark, seconds in speech["pauses"].items()
    )
    return round(
        len(words) / speech["chars_per_second"][language] / args["speed"]
        + pauses
        + speech["tail_s"],
        2,
    )


def check_intervals(intervals, clip, param, hint=""):
    """Speech and subtitles lie in order and inside the video: MoviePy would lengthen the file, so it is refused."""
    free_from = 0
    for i, (start, end) in enumerate(intervals):
        if not free_from - 1e-6 <= start < end <= clip["duration_s"] + 1e-5:
            fine = f"begin after the one ahead ({free_from:g} s) and end within the video ({clip['duration_s']} s){hint}"
            refuse(f"{param}[{i}]", f"{param}[{i}] spans {start:g} to {end:g} s; it must {fine}")
        free_from = end


# ---------------------------------------------------------------------------- behaviours
# Each: (env, tool, a) -> (new records, further fields of the reply). `a` has the call's parameters, None where one is left out, and media for ids.
def generate(env, tool, a):
    """Images or clips: size and number follow from the parameters as at the service."""
    table, sources = tool["output"], a.get("images") or ([a["image"]] if "image" in a else [])
    size = dict(zip(("width", "height"), frame_size(table, a, sources)))
    if tool["makes"] == "image":
        made = new_artifact(
            "image",
            **size,
            format=a.get("output_format", "png"),
            watermark=bool(a.get("watermark") or a.get("logo_add")),
        )
    else:
        cropped = (
            bool(sources)
            and "sizes" in table
            and sources[0]["width"] * size["height"] != sources[0]["height"] * size["width"]
        )
        shots, sounds = [int(a["duration"]) * table["fps"]], a.get("generate_audio", False)
        made = new_artifact(
            "video", **size, fps=table["fps"], shot_frames=shots, has_audio=sounds, cropped=cropped
        )
    return [dict(made) for _ in range(int(a.get("n", 1)))], {}


def pipeline(env, tool, a):
    """A storyboard's shots, or equal ones, each cut from the shortest Veo clip that covers it; these clips are what costs (`billed_s`)."""
    table, n = tool["output"], int(a["n_shots"])
    lengths = (
        [shot["duration"] for shot in a["storyboard"]["shot_list"]]
        if a["storyboard"]
        else [a["duration"] / n] * n
    )
    billed = sum(
        min(seconds for seconds in table["clips_s"] if seconds >= length - 1e-6)
        for length in lengths
    )
    shots = shot_lengths(
        [whole_frames(done, table["fps"]) for done in accumulate(lengths, initial=0)]
    )
    (width, height), sounds = (
        table["sizes"][a["aspect_ratio"]],
        a["with_music"] or a["with_narration"],
    )
    return [
        new_artifact(
            "video",
            width=width,
            height=height,
            fps=table["fps"],
            shot_frames=shots,
            has_audio=sounds,
            billed_s=billed,
        )
    ], {}


def music(env, tool, a):
    """Two songs; nobody can set their length. Tempo and first beat are for tool_beat_detect to find."""
    table, words = tool["output"], set(f"{a['prompt']} {a['style'] or ''}".lower().split())
    (shortest, longest), pace = (
        table["duration_s"],
        next((pace for pace in ("fast", "slow") if words & set(table[pace])), "other"),
    )
    slow, fast = table["bpm"][pace]
    return [
        new_artifact(
            "audio",
            **table["file"],
            duration_s=round(shortest + (longest - shortest) * env.draw(f"length {i}"), 1),
            bpm=round(slow + (fast - slow) * env.draw(f"bpm {i}")),
            beat_offset_s=round(env.draw(f"offset {i}") / 2, 2),
        )
        for i in range(table["songs"])
    ], {}


def sound(env, tool, a):
    """Speech lasts as long as its text; an effect as long as its video, as asked, or as its prompt is wordy."""
    table = tool["output"]
    if "text" in a:
        return [
            new_artifact(
                "audio",
                **table["file"],
                format=a["format"],
                duration_s=speech_seconds(table, a, a["text"]),
                n_chars=len(a["text"]),
            )
        ], {}
    seconds = a["duration"] or min(30, table["seconds_per_word"] * len(a["prompt"].split()))
    return [
        new_artifact(
            "audio",
            **table["file"],
            duration_s=round(float(a["video"]["duration_s"] if a["video"] else seconds), 3),
        )
    ], {}


def tts_composite(env, tool, a):
    """Speech over a video that keeps its own duration; speech that does not fit is refused with both numbers."""
    clip, segments = a["video"], a["segments"] or [{"start": 0, "text": a["text"]}]
    spoken = [
        (s["start"], s["start"] + speech_seconds(tool["output"], a, s["text"])) for s in segments
    ]
    check_intervals(
        spoken, clip, "segments" if a["segments"] else "text", "; shorten the text or raise speed"
    )
    speech = {"speech_s": round(spoken[-1][1], 2)}
    return [
        recut(
            clip,
            has_audio=True,
            sound_frames=None,
            spoken_chars=sum(len(s["text"]) for s in segments),
            **speech,
        )
    ], speech


def composite(env, tool, a):
    """Clips in order; a crossfade of c s shortens by c (n - 1); size and fps are the largest of the clips."""
    clips, sound = a["videos"], a["audio"]
    width, height, fps = (max(clip[name] for clip in clips) for name in ("width", "height", "fps"))
    letterboxed, fps = any(sides(clip) != (width, height) for clip in clips), a["fps"] or fps
    if short := load_defaults()["sizes"].get(a["resolution"]):  # H.264 wants even sides
        width, height = (
            round(side * short / min(width, height) / 2) * 2 for side in (width, height)
        )
    cuts, sounds, clock, overlap = (
        [],
        [],
        0.0,
        a["transition_duration"] if a["transition"] == "crossfade" else 0,
    )  # seconds
    for clip in clips:
        while cuts and cuts[-1] > clock - 1e-9:
            cuts.pop()  # a shot that is over before the crossfade ends is no cut of its own
        cuts += [
            clock + done / clip["fps"] for done in accumulate(clip["shot_frames"][:-1], initial=0)
        ]
        sounds += [
            [clock + edge / clip["fps"] for edge in span]
            for span in clip["sound_frames"] or [[0, clip["n_frames"]]] * clip["has_audio"]
        ]
        clock += clip["n_frames"] / clip["fps"] - overlap
    if sound:  # over the clips' own sound, or in its place, from the beginning
        sounds = [
            [0, min(sound["duration_s"], clock + overlap)],
            *(sounds if a["audio_mode"] == "mix" else ()),
        ]
    shots, heard, silence = (
        shot_lengths([whole_frames(cut, fps) for cut in [*cuts, clock + overlap]]),
        sorted([whole_frames(edge, fps) for edge in span] for span in sounds),
        0,
    )
    for first, end in heard:
        silence = (
            max(silence, end) if first <= silence else silence
        )  # where it begins; at the end, if the sound has no gap
    return [
        new_artifact(
            "video",
            width=width,
            height=height,
            fps=fps,
            shot_frames=shots,
            letterboxed=letterboxed,
            has_audio=bool(heard),
            sound_frames=heard if heard and silence < sum(shots) else None,
        )
    ], {}


def postprocess(env, tool, a):
    """Operations in order: only resize, crop and rotate change the size, only loop the duration."""
    clip, needs = a["video"], tool["output"]["needs"]
    width, height = sides(clip)
    for i, step in enumerate(a["operations"]):
        op, where = step["op"], f"operations[{i}]"
        for name in [name for name in needs.get(op, ()) if name not in step]:
            refuse(f"{where}.{name}", f"{where}.{name} is required by {op}", "missing_parameter")
        if op == "crop" and (
            step.get("x", 0) + step["width"] > width or step.get("y", 0) + step["height"] > height
        ):
            refuse(where, f"{where}: the crop lies outside the frame of {width}x{height}")
        if op in ("resize", "crop"):
            width, height = (
                int(step[side]) // 2 * 2 for side in ("width", "height")
            )  # H.264 wants even sides
        elif op == "rotate" and step["angle"] != 180:
            width, height = height, width
        elif op == "reverse":
            clip = recut(clip, lambda frame, n=clip["n_frames"]: n - frame)
        elif op == "loop":
            times, n = range(int(step["count"])), clip["n_frames"]
            sounds = clip["sound_frames"] and [
                [edge + i * n for edge in span] for i in times for span in clip["sound_frames"]
            ]
            clip = new_artifact(
                **{**clip, "shot_frames": clip["shot_frames"] * len(times), "sound_frames": sounds}
            )
    return [recut(clip, width=width, height=height)], {}


def trim(env, tool, a):
    clip, fps = a["video"], a["video"]["fps"]
    n_frames = whole_frames(min(a["end"], clip["duration_s"]) - a["start"], fps)
    first = min(whole_frames(a["start"], fps), clip["n_frames"] - n_frames)
    return [recut(clip, lambda frame: min(max(frame - first, 0), n_frames))], {}


def speed(env, tool, a):
    """Duration / factor in whole frames; the sound is sped up too."""
    clip = a["video"]
    n_frames = max(
        1,
        whole_frames(
            a["target_duration"] or clip["n_frames"] / clip["fps"] / a["factor"], clip["fps"]
        ),
    )
    return [recut(clip, lambda frame: frame * n_frames // clip["n_frames"])], {}


def audio_cut(env, tool, a):
    source, bpm = a["audio"], a["audio"].get("bpm")
    seconds = (
        a["loop_to"]
        or min(math.inf if a["end"] is None else a["end"], source["duration_s"]) - a["start"]
    )
    if a["fade_in"] + a["fade_out"] > seconds + 1e-6:
        refuse("fade_out", f"fade_in + fade_out is longer than the audio ({seconds:g} s)")
    offset = round((source.get("beat_offset_s", 0.0) - a["start"]) % (60 / bpm), 3) if bpm else None
    return [
        {
            **source,
            "format": "mp3",
            "duration_s": round(max(float(seconds), 0.001), 3),
            "beat_offset_s": offset,
        }
    ], {}


def beats(env, tool, a):
    """Beat i lies at offset + 60 i / bpm; speech, effects and audio under 2 s have none."""
    source = a["audio"]
    tempo, offset = (
        float(source.get("bpm") or 0) * (source["duration_s"] >= 2),
        source.get("beat_offset_s") or 0.0,
    )
    n_beats = min(
        int(a["max_beats"] or 10000), math.ceil((source["duration_s"] - offset) * tempo / 60 - 1e-9)
    )
    times = [round(offset + i * 60 / tempo, 3) for i in range(n_beats)]
    return [new_artifact("data", tempo=tempo, beat_times=times)], {
        "tempo": tempo,
        "n_beats": n_beats,
        "first_beats": times[:4],
    }


def subtitles(env, tool, a):
    clip, cues = a["video"], a["subtitles"]
    check_intervals([(cue["start"], cue["end"]) for cue in cues], clip, "subtitles")
    return [recut(clip, n_cues=clip.get("n_cues", 0) + len(cues))], {}


def write_text(env, tool, a, **more):
    """A text from the tool's template, no longer than asked: a refined prompt, a script in scenes of one length, a summary, ..."""
    n = int(a.get("n_scenes") or max(1, round((a.get("duration") or 0) / 8)))
    text = fill_template(
        tool["output"]["template"],
        **a,
        **more,
        output=tool["output"],
        scenes=[(a.get("duration") or 0) / n] * n,
    )
    text = (
        " ".join(text.split()[: int(a["max_words"])])
        if "max_words" in a
        else text[: int(a.get("max_chars", len(text)))]
    )
    seen = {
        "n_chars": len(text),
        "brief": text[:197] + "..." * (len(text) > 197),
    }  # the reply shows the beginning
    return [
        new_artifact(
            "text", text=text, **seen, lasts_s=a.get("duration"), n_scenes=a.get("n_scenes"), **more
        )
    ], {}


def search(env, tool, a):
    """Results of a query, or the text of pages, some of which fail: what is no address always, others by their name."""
    urls, dead = a["urls"] or [], tool["output"]["dead_urls"] * env.scale
    failed = [
        url
        for url in urls
        if not url.startswith(("http://", "https://")) or chance("", url, "dead") < dead
    ]
    credits = (1 + (a["extract_depth" if urls else "search_depth"] == "advanced")) * math.ceil(
        len(urls or [0]) / 5
    )
    more, results = (
        {"failed_results": len(failed)} if failed else {},
        [*range(int(a["max_results"]) if a["query"] else 0)],
    )
    return write_text(env, tool, a, failed=failed, results=results, credits=credits)[0], more


def storyboard(env, tool, a):
    """Shots whose durations sum to the total, on a grid of 0.1 s. What the call leaves out follows from the script."""
    script, views, timed = a["script"], tool["output"]["views"], a["shot_durations"] or []
    total = a["total_duration"] or sum(timed) or script.get("lasts_s")
    n = int(a["n_shots"] or len(timed) or script.get("n_scenes") or math.ceil((total or 32) / 8))
    marks = [round((total or 8 * n) * i / n, 1) for i in range(n)] + [total or 8 * n]
    lengths, subject = (
        timed or [round(b - a, 6) for a, b in zip(marks, marks[1:])],
        " ".join(script["text"][:200].split()[:8]),
    )
    shots = [
        {"index": i + 1, "duration": length, "description": f"{views[i % 4]}, {subject}"[:80]}
        for i, length in enumerate(lengths)
    ]
    return write_text(env, tool, a, shot_list=shots)[0], {"n_shots": n}


def polish(env, tool, a):
    """Better wording, the same shots and durations; with a script, its narration is dealt out to the shots."""
    given, words = (
        a["storyboard"]["shot_list"],
        a["script"]["text"].split() if "script" in a else [],
    )
    marks = [len(words) * i // len(given) for i in range(len(given) + 1)]
    shots = [
        {
            **shot,
            "description": shot["description"].removesuffix(", detailed") + ", detailed",
            "narration": " ".join(words[start:end]),
        }
        for shot, start, end in zip(given, marks, marks[1:])
    ]
    return write_text(env, tool, a, shot_list=shots)[0], {"n_shots": len(shots)}


def analysis(env, tool, a):
    """An answer from the records: a few of the prompt's words, lest the agent verify itself against its own, and flaws of a fixed share of media."""
    seen = []
    for medium in a["media"][:4]:
        words = re.findall(r"[^\W\d_]{4,}", str(medium["arguments"].get("prompt", ""))[:400])
        some = (
            {words[int(chance(env.seed, medium["id"], k) * len(words))] for k in range(3)}
            if words
            else ()
        )
        flawed = (
            medium["kind"] != "audio"
            and chance(env.seed, medium["id"], "flaw") < load_defaults()["flaw_share"] * env.scale
        )
        seen.append({**medium, "words": ", ".join(sorted(some)), "flawed": flawed})
    return [], {
        "answer": fill_template(
            "templates/analysis.jinja", seen=seen, more=max(0, len(a["media"]) - 4)
        )
    }


def inspire(env, tool, a):
    sizes = [
        tool["output"]["sizes"][int(env.draw(i) * len(tool["output"]["sizes"]))]
        for i in range(int(a["n"]))
    ]
    return [
        new_artifact("image", width=width, height=height, tags=a["query"].split()[:3])
        for width, height in sizes
    ], {}


def todo(env, tool, a):
    """A to-do list that lives as long as the episode."""
    known = {} if a["action"] == "clear" else dict(env.todo)
    for i, task in enumerate(a["tasks"] if a["action"] in ("create", "update") else ()):
        if a["action"] == "update" and task["id"] not in env.todo:
            refuse(
                f"tasks[{i}].id",
                f"no task {task['id']}; known tasks: {', '.join(map(str, env.todo)) or 'none'}",
            )
        known[task["id"]] = {"title": "", "status": "todo", **known.get(task["id"], {}), **task}
    env.todo = known
    return [], {
        "tasks": [
            f"{number} {task['status']}: {task['title'][:40]}" for number, task in known.items()
        ][:50]
    }


def html(env, tool, a):
    return [new_artifact("html", n_media=len(a["sections"]))], {
        "n_media": len(a["sections"])
    }  # find_media put the media there


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
# ---------------------------------------------------------------------------- price, time, fidelity, replies
AMOUNTS = {  # what a rate of tools.yaml is multiplied by; other rates are per unit of the outputs' field of that name, such as duration_s
    "call": lambda made, given: 1,
    "item": lambda made, given: len(made),
    "square_item": lambda made, given: sum(m["width"] == m["height"] for m in made),
    "other_item": lambda made, given: sum(m["width"] != m["height"] for m in made),
    "large_second": lambda made, given: sum(m["duration_s"] for m in made if min(sides(m)) > 720),
    "input_item": lambda made, given: len(given),
    "input_second": lambda made, given: sum(m["duration_s"] for m in given),
}


def bill(rates, a, made=(), given=(), draw=None):
    """US dollars or virtual seconds: rates times amounts, or a draw around the typical time. `by`: a parameter that picks from tables of rates."""
    if "by" in rates:
        rates = {
            name: rate[a[rates["by"]]] if isinstance(rate, dict) else rate
            for name, rate in rates.items()
            if name != "by"
        }
    if "typical" in rates:
        chance, low, usual, high = draw("latency"), rates["min"], rates["typical"], rates["max"]
        return low + (usual - low) * min(1, 2 * chance) + (high - usual) * max(0, 2 * chance - 1)
    return sum(
        [
            rate * (AMOUNTS[name](made, given) if name in AMOUNTS else sum(m[name] for m in made))
            for name, rate in rates.items()
        ]
    )


def deviate(outputs, more):
    """What an unfaithful simulator returns, never a faithful outcome: an item less (unannounced), a wrong size or duration, or else a failure."""
    if not outputs or outputs[0]["kind"] not in ("image", "video", "audio"):
        refuse(None, "internal error, try again", "service_error", True)
    if len(outputs) > 1:
        return outputs[:-1], {}
    if "shot_frames" in outputs[0]:
        return [
            recut(
                outputs[0],
                lambda frame: frame * 4 // 5 if outputs[0]["n_frames"] > 1 else frame * 2,
            )
        ], more
    return [
        {
            **outputs[0],
            **{
                name: outputs[0][name] * 2
                for name in ("width", "height", "duration_s")
                if outputs[0][name]
            },
        }
    ], more


def describe(kind, outputs, more):
    """The reply's fields: ids, then what a kind of artifact shows; one value if all outputs share it, else a list."""
    shown = {"ids": [output["id"] for output in outputs]} if outputs else {}
    for name, field in load_defaults()["kinds"][kind]["shows"].items():
        values = [
            output[field] if field else f"{output['width']}x{output['height']}"
            for output in outputs
        ]
        shown[name] = values[0] if values.count(values[0]) == len(values) else values
    return {**shown, **more}


def clip_lengths(tool):
    """Clip durations (s) that a video generator offers, from its JSON Schema; () for other tools."""
    return tuple(
        load_tools()
        .get(tool, {})
        .get("parameters", {})
        .get("properties", {})
        .get("duration", {})
        .get("enum", ())
    )


@lru_cache(maxsize=256)
def category(tool):
    """A tool's heading in Table 9; '' for 'llm' and unknown tools."""
    return load_tools().get(tool, {}).get("category", "")


@lru_cache(maxsize=256)
def makes(tool):
    """Kind of artifact that a tool makes; 'text' for 'llm' steps, unknown tools, and a search, whose finds nobody made."""
    return (
        load_tools()[tool]["makes"]
        if tool in load_tools() and not tool.startswith("tool_search")
        else "text"
    )


@lru_cache(maxsize=256)
def takes(tool):
    """Kinds of media that a tool cannot do without, a set for each required media parameter."""
    entry = load_tools().get(tool, {})
    required = entry.get("parameters", {}).get("required", [])
    return [
        set(m["kinds"])
        for name, m in entry.get("media", {}).items()
        if name in required and not {"or_text", "inside"} & set(m)
    ]


def generates_clip(tool):
    """Whether a tool makes new footage (text or image to video)."""
    return category(tool) in ("Text-to-Video", "Image-to-Video")
