"""What the 36 tools of tools.yaml do (Sec. 4.3.1, Table 9): validation, whole-frame media arithmetic, behaviours, price and time.

A tool is an entry of tools.yaml (JSON Schema, limits, sizes, prices) plus one behaviour function below, which says what media
come out, as records with exact attributes. A refusal is a ToolError that says which parameter is wrong and what would be right.
"""
import hashlib
import json
import math
import re
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import jinja2
import yaml

ROOT = Path(__file__).resolve().parent
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)   # what is written here holds no cycles

# ---------------------------------------------------------------------------- the tools as data
def to_json(obj):
    """The one JSON style of this project, for what the agent writes and what it reads."""
    return ENCODER.encode(obj)

@lru_cache(maxsize=256)
def template(text):
    return jinja2.Template(text)

@lru_cache(maxsize=1)
def read_sheet():
    """tools.yaml, with what its entries leave out and the patterns that moderation searches for."""
    sheet = yaml.load((ROOT / "tools.yaml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    words, providers = sheet["defaults"]["blocked_words"], sheet["defaults"]["providers"]
    blank = {"media": {}, "rules": [], "screened": [], "also_screened": {}, "output": {}, "limits": [], "no_output": None, "steps": []}
    for name, tool in sheet["tools"].items():
        tool = sheet["tools"][name] = {"name": name, **blank, **tool, "provider": providers[tool["provider"]]}
        tool["defaults"] = {p: s["default"] for p, s in tool["parameters"]["properties"].items() if "default" in s}
    for category in words:   # a word ends where its letters end, so that "gored" passes; Chinese has no such ends
        words[category] = re.compile(f"(?<![a-z])(?:{'|'.join(map(re.escape, words[category]))})(?![a-z])", re.IGNORECASE)
    return sheet

@lru_cache(maxsize=1)
def load_tools():
    """The tools of Table 9 by name, in its order. Read once and shared: do not modify."""
    return read_sheet()["tools"]

@lru_cache(maxsize=1)
def load_defaults():
    """What all tools share: failure rates, limits, providers and blocked words, from the head of tools.yaml."""
    return read_sheet()["defaults"]

def tool_schemas(names):
    """The named tools in OpenAI's form, as chat templates take them in `tools`."""
    return [{"type": "function", "function": {part: load_tools()[name][part] for part in ("name", "description", "parameters")}}
            for name in names]

def tool_signature(name):
    """One line such as `tool_text2image_gemini(prompt, aspect_ratio="1:1", n=1)`; a `?` marks an optional one."""
    required, defaults = load_tools()[name]["parameters"]["required"], load_tools()[name]["defaults"]
    optional = [p for p in load_tools()[name]["parameters"]["properties"] if p not in required]
    return f"{name}({', '.join(required + [f'{p}={to_json(defaults[p])}' if p in defaults else p + '?' for p in optional])})"

def draw(seed, index, purpose):
    """A number in [0, 1) that depends on nothing but its arguments, in any process."""
    digest = hashlib.blake2b(f"{seed}|{index}|{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2 ** 53

# ---------------------------------------------------------------------------- validation
class ToolError(Exception):
    """A refused or failed call: code, param, message, retryable. VisGenEnv turns it into the reply's error object."""

# Four kinds of failure ask for four reactions. These codes: mend the arguments. content_blocked: reword. service_error, timeout,
# no_output, rate_limited and concurrency_limit: the same call again, now or later. quota_exhausted: another tool.
INVALID = {"invalid_parameter", "missing_parameter", "unknown_parameter", "file_not_found", "wrong_kind", "bad_media",
           "unsupported_format", "media_too_large", "media_too_small"}

# JSON's exact types, so that true is no number; the name for messages; the keys of bounds; their unit.
TYPES = {"string": ((str,), "a string", "minLength", "maxLength", " characters"), "boolean": ((bool,), "true or false", "", "", ""),
         "array": ((list,), "a list", "minItems", "maxItems", " items"), "object": ((dict,), "an object", "", "", ""),
         "integer": ((int,), "an integer", "minimum", "maximum", ""), "number": ((int, float), "a number", "minimum", "maximum", "")}

def refuse(param, message, code="invalid_parameter", retryable=False):
    raise ToolError(code, param, message, retryable)

def show(value):
    """A short form of a refused value for a message."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = to_json(value)
    return text if len(text) <= 36 else text[:33] + "..."

def bounds(low, high, unit=""):
    return f"at least {low}{unit}" if high is None else f"{low}{unit}" if low == high else f"{low or 0} to {high}{unit}"

def check(value, schema, where):
    """Raise ToolError when a value does not fit its JSON Schema; `where` is its path, such as subtitles[0].end."""
    kind = schema["type"]
    types, words, lowest, highest, unit = TYPES[kind]
    if type(value) not in types and not (kind == "integer" and type(value) is float and value.is_integer()):   # 8.0 is the integer 8
        refuse(where, f"{where} must be {words}, got {show(value)}")
    if "enum" in schema:
        if value not in schema["enum"]:
            refuse(where, f"{where} must be one of {', '.join(map(str, schema['enum']))}, got {show(value)}")
    elif kind == "object":   # names first, then required ones, then values: the order in which a reader would mend it
        properties = schema.get("properties")
        if properties is None:
            return
        prefix = f"{where}." if where else ""
        if not value.keys() <= properties.keys():
            name = next(name for name in value if name not in properties)
            known = ", ".join(properties)
            refuse(f"{prefix}{name:.40}", f"unknown parameter {show(name)}; known: {known}", "unknown_parameter")
        for name in schema["required"]:
            if name not in value:
                refuse(prefix + name, f"{prefix}{name} is required", "missing_parameter")
        for name, item in value.items():
            check(item, properties[name], prefix + name)
    elif kind != "boolean":
        low, high, size = schema.get(lowest), schema.get(highest), len(value) if unit else value
        if (low is not None and size < low) or (high is not None and size > high):
            refuse(where, f"{where} must {'have' if unit else 'be'} {bounds(low, high, unit)}, got {show(size)}")
        if kind == "array":
            for i, item in enumerate(value):
                check(item, schema["items"], f"{where}[{i}]")
        elif kind == "string" and (value.isspace() if low else "pattern" in schema and not re.search(schema["pattern"], value)):
            refuse(where, f"{where} must be {schema.get('description', 'text')}, got {show(value)}")

def find_medium(artifacts, media_id, limits, where):
    """The artifact of that id, if it is of the right kind and within the service's limits for a medium."""
    kinds, found = limits["kinds"], artifacts.get(media_id)
    if found is None:
        known = ", ".join([i for i, artifact in artifacts.items() if artifact["kind"] in kinds][-12:]) or "none"
        refuse(where, f"{where}: no media {show(media_id)} in this session; known {kinds[0]} ids: {known}", "file_not_found")
    if found["kind"] not in kinds or ("has" in limits and limits["has"] not in found):
        needed = "storyboard" if "has" in limits else kinds[0]
        refuse(where, f"{where} is '{media_id}', of kind {found['kind']}; kind {needed} is needed", "wrong_kind")
    if found["format"] not in limits.get("formats", (found["format"],)):
        refuse(where, f"{where} is a {found['format']} file; {', '.join(limits['formats'])} are read", "unsupported_format")
    width, height, (low, high) = found["width"], found["height"], limits.get("side_px", (None, None))
    if low and (min(width, height) < low or max(width, height) > (high or math.inf)):
        code = "media_too_small" if min(width, height) < low else "media_too_large"
        refuse(where, f"{where} is {width}x{height}; each side must be {bounds(low, high)} pixels", code)
    most = limits.get("aspect")
    if most and max(width, height) > most * min(width, height):
        refuse(where, f"{where} is {width}x{height}; its aspect ratio must lie between 1:{most} and {most}:1", "bad_media")
    low, high = limits.get("duration_s", (None, None))
    if high and not low <= found["duration_s"] <= high:
        refuse(where, f"{where} lasts {found['duration_s']} s; it must last {bounds(low, high, ' s')}", "bad_media")
    return found

def find_media(artifacts, tool, args):
    """(parameter -> artifact or list of artifacts, parents [{id, role}]) of one call."""
    media, parents = {}, []
    if not tool["media"]:
        return media, parents
    for param, limits in tool["media"].items():
        value = args.get(param)
        if value is None or (limits.get("or_text") and value not in artifacts):
            continue
        many = isinstance(value, list)
        found = [find_medium(artifacts, media_id, limits, f"{param}[{i}]" if many else param)
                 for i, media_id in enumerate(value if many else [value])]
        media[param] = found if many else found[0]
        parents += [{"id": artifact["id"], "role": limits["role"]} for artifact in found]
    return media, parents

# Checks across fields, of (tool, arguments, media), true where all is well; tools.yaml holds whom to blame and the message.
RULES = {
    "exactly_one": lambda t, a, m: (t["exactly_one"][0] in a) != (t["exactly_one"][1] in a),
    "not_both": lambda t, a, m: not (t["not_both"][0] in a and t["not_both"][1] in a),
    "prompt_tokens": lambda t, a, m: a.setdefault("tokens", tokens(a["prompt"])) <= 1024,   # the message names the number
    "compression": lambda t, a, m: a["output_compression"] == 100 or a["output_format"] != "png",
    "described": lambda t, a, m: a["custom_mode"] or len(a["prompt"]) <= 500,
    "custom_given": lambda t, a, m: not a["custom_mode"] or ("style" in a and "title" in a),
    "song_limits": lambda t, a, m: a["model"] != "V4" or (len(a["prompt"]) <= 3000 and len(a.get("style", "")) <= 200
                                                          and len(a.get("title", "")) <= 80),
    "shots_sum": lambda t, a, m: "shot_durations" not in a or (
        len(a["shot_durations"]) == a.get("n_shots", len(a["shot_durations"]))
        and abs(sum(a["shot_durations"]) - a.get("total_duration", sum(a["shot_durations"]))) <= 0.1 + 1e-9),
    "start_before_end": lambda t, a, m: a["start"] < a.get("end", (m.get("video") or m["audio"])["duration_s"]),
    "end_inside": lambda t, a, m: a.get("end", 0) <= (m.get("video") or m["audio"])["duration_s"] + 1e-5,
    "transition_fits": lambda t, a, m: a["transition"] == "none" or a["transition_duration"] * 2 < min(
        clip["duration_s"] for clip in m["videos"]),
    "tail_needs_pro": lambda t, a, m: "image_tail" not in a or a["mode"] == "pro",
    "transparency": lambda t, a, m: (a["background"], a["output_format"]) != ("transparent", "jpeg"),
    "references_plus_outputs": lambda t, a, m: len(a.get("images", [])) + a["n"] <= 15,
    "shots_fit_generator": lambda t, a, m: m or 1 <= a["duration"] / a["n_shots"] <= t["longest_shot_s"],
    "factor_in_range": lambda t, a, m: "target_duration" not in a or .25 <= m["video"]["duration_s"] / a["target_duration"] <= 4,
    "tasks_given": lambda t, a, m: a["action"] in ("list", "clear") or "tasks" in a,
    "sides_fit": lambda t, a, m: all(t["side_px"][0] <= int(side) <= t["side_px"][1]
                                     for side in re.findall("[0-9]{2,}", a.get("size", ""))),
    "mask_fits": lambda t, a, m: "mask" not in m or (len(m["images"]) == 1 and sides(m["mask"]) == sides(m["images"][0])),
}

# ---------------------------------------------------------------------------- media records and their arithmetic
BLANK = {"id": None, "kind": None, "width": None, "height": None, "duration_s": None, "fps": None, "n_frames": None,
         "has_audio": False, "shots": None, "format": None, "made_s": 0.0, "parents": [], "tool": None, "arguments": {}, "media": None}
FORMAT = {"image": "png", "video": "mp4", "audio": "mp3", "text": "txt", "html": "html", "data": "json"}

def record(kind, **fields):
    """A new artifact; every field of the Artifact record exists in every artifact."""
    return {**BLANK, "kind": kind, "format": FORMAT[kind], **fields}

def sides(artifact):
    return artifact["width"], artifact["height"]

def video(width, height, shot_frames, fps, has_audio, **more):
    """A video is the list of its shots' lengths in frames; everything about time follows from it. `sound_frames` lists the spans
    [first, end) that sound: a track may exist and be silent in parts, as after joining silent and sounding clips."""
    n_frames = sum(shot_frames)
    return record("video", width=width, height=height, duration_s=round(n_frames / fps, 6), fps=fps, n_frames=n_frames, has_audio=has_audio,
                  shots=len(shot_frames), shot_frames=shot_frames, **{"sound_frames": [[0, n_frames]] if has_audio else [], **more})

def recut(clip, shot_frames, **changes):
    """A video like `clip` with other shots; its sound is stretched to the new length unless `sound_frames` says otherwise."""
    old, new = clip["n_frames"], sum(shot_frames)
    changes.setdefault("sound_frames", within([[a * new // old, b * new // old] for a, b in clip["sound_frames"]], new))
    names = ("width", "height", "fps", "has_audio", "n_cues", "speech_s")
    return video(**{**{name: clip[name] for name in names if name in clip}, **changes, "shot_frames": shot_frames})

def within(spans, n_frames):
    """Spans in order, cut to 0..n_frames; those that touch become one."""
    kept = []
    for first, end in sorted((max(0, a), min(n_frames, b)) for a, b in spans):
        if kept and first <= kept[-1][1]:
            kept[-1][1] = max(kept[-1][1], end)
        elif first < end:
            kept.append([first, end])
    return kept

def audio(duration_s, **more):
    return record("audio", duration_s=round(float(duration_s), 3), has_audio=True, **more)

def micro(seconds):
    """Whole microseconds: from here on, a time written with up to six decimals is exact."""
    return round(seconds * 1_000_000)

def whole(microseconds, fps):
    """Whole frames of a time, as a writer counts them; a margin of 1/2000 frame absorbs that durations are shown rounded."""
    return (microseconds * round(fps * 1000) + 500_000) // 10 ** 9

def stretch(shot_frames, n_frames):
    """The same cuts on another number of frames; shots that vanish are dropped."""
    total = sum(shot_frames)
    marks = [0] + [done * n_frames // total for done in accumulate(shot_frames)]
    return [b - a for a, b in zip(marks, marks[1:]) if b > a]

def join(clips, overlap_s, fps):
    """(shots, spans that sound) of clips played after each other, each pair sharing a crossfade of `overlap_s` seconds."""
    common = math.lcm(*(round(clip["fps"] * 1000) for clip in clips))   # a tick of 1 / (common * 10^6) s divides every frame
    starts, spans, clock, overlap = [], [], 0, micro(overlap_s) * common
    for clip in clips:
        while starts and starts[-1] >= clock:
            starts.pop()   # a shot that is over before the crossfade ends is no cut of its own
        ticks = 10 ** 9 * common // round(clip["fps"] * 1000)
        starts += [clock + done * ticks for done in accumulate(clip["shot_frames"][:-1], initial=0)]
        spans += [[clock + first * ticks, clock + end * ticks] for first, end in clip["sound_frames"]]
        clock += clip["n_frames"] * ticks - overlap

    def frame(moment):
        return (moment * round(fps * 1000) // common + 500_000) // 10 ** 9

    marks = [frame(moment) for moment in (*starts, clock + overlap)]
    return [b - a for a, b in zip(marks, marks[1:]) if b > a], [[frame(first), frame(end)] for first, end in spans]

def tokens(text):
    """About how many tokens a text has: a Chinese character is one, four others are one (an assumption)."""
    wide = 0 if text.isascii() else len(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]", text))
    return wide + math.ceil((len(text) - wide) / 4)

def nearest_ratio(ratios, width, height):
    """The name in `ratios` ("16:9": pixels) whose shape is closest, on a logarithmic scale."""
    return min(ratios, key=lambda name: abs(math.log(ratios[name][0] * height / (ratios[name][1] * width))))

def keep_aspect(source, area, multiple):
    """Sides in the source's aspect with about `area` pixels, each a multiple of `multiple`."""
    scale = math.sqrt(area / (source["width"] * source["height"]))
    return [max(1, round(side * scale / multiple)) * multiple for side in sides(source)]

def speech_seconds(speech, args, words):
    """Length of a spoken text: characters / rate / speed, and pauses at punctuation (all rates are assumptions)."""
    language = args["language"]
    if language == "en" and 2 * len(re.findall(r"[\u4e00-\u9fff]", words)) > len(words):
        language = "zh"   # the service hears the language: the default must not make Chinese three times too fast
    commas, stops = re.findall(r"[,;\u3001\uff0c\uff1b]", words), re.findall(r"[.!?]+(?=\s|$)|[\u3002\uff01\uff1f]+", words)
    spoken = len(words) / speech["chars_per_second"][language] / args["speed"]
    return round(spoken + len(commas) * speech["comma_s"] + len(stops) * speech["stop_s"] + speech["tail_s"], 2)

def check_intervals(intervals, clip, param, hint=""):
    """Speech and subtitles lie in order and inside the video: MoviePy would lengthen the file, so it is refused."""
    free_from = 0
    for i, (start, end) in enumerate(intervals):
        if not free_from - 1e-6 <= start < end <= clip["duration_s"] + 1e-5:
            refuse(f"{param}[{i}]", f"{param}[{i}] spans {start:g} to {end:g} s; it must begin after the one ahead "
                   f"({free_from:g} s) and end within the video ({clip['duration_s']} s){hint}")
        free_from = end

# ---------------------------------------------------------------------------- behaviours
# Each takes (env, tool, args with defaults, media) and returns (new records, further fields of the reply).

def make_images(env, tool, args, media):
    """Text to image and image editing: the size follows from the parameters as at the service."""
    table, size, sources = tool["output"], args.get("size") or args.get("resolution"), media.get("images") or []
    sizes = table["auto"] if size == "auto" else table.get("sizes", {}) if size is None else table.get("sizes", {}).get(size)
    if "area" in table and size is None:
        width, height = keep_aspect(sources[-1], table["area"], table["multiple_of"])
    elif sizes:
        width, height = sizes[args.get("aspect_ratio") or nearest_ratio(sizes, *(sides(sources[0]) if sources else (1, 1)))]
    else:
        width, height = map(int, re.split("[x*:]", size))
    note = {"warning": "works best with at most 3 images"} if len(sources) > table.get("best_inputs", 99) else {}
    file = {"format": args.get("output_format", "png"), "watermark": bool(args.get("watermark", args.get("logo_add", False)))}
    return [record("image", width=width, height=height, **file) for _ in range(int(args.get("n", 1)))], note

def make_video(env, tool, args, media):
    """Veo: pixels by resolution and aspect ratio. Kling: pixels by the image's aspect and the mode; silent."""
    table, first, note, cropped = tool["output"], media.get("image"), {}, False
    if "area" in table:
        width, height = keep_aspect(first, table["area"][args["mode"]], table["multiple_of"])
    else:
        sizes = table["sizes"][args["resolution"]]
        width, height = sizes[args.get("aspect_ratio") or nearest_ratio(sizes, *sides(first))]
        cropped = bool(first) and first["width"] * height != first["height"] * width
        if cropped and abs(math.log(first["width"] * height / (first["height"] * width))) > 0.05:   # under 5 % nobody sees it
            note = {"warning": f"image {first['width']}x{first['height']} was cropped to {width}x{height}"}
    clip = video(width, height, [int(args["duration"]) * table["fps"]], table["fps"], args.get("generate_audio", False), cropped=cropped)
    return [dict(clip) for _ in range(int(args.get("n", 1)))], note

def pipeline(env, tool, args, media):
    """Script or storyboard, silent clips, music, narration and the cut in one call; no references. Each shot is cut from the
    shortest Veo clip that covers it, and the clips are what costs (`billed_s`)."""
    board = media.get("storyboard", {"shot_list": [{"duration": args["duration"] / int(args["n_shots"])}] * int(args["n_shots"])})
    lengths = [shot["duration"] for shot in board["shot_list"]]
    if media and max(lengths) > tool["longest_shot_s"]:
        refuse("storyboard", f"storyboard has a shot of {max(lengths):g} s; a shot lasts at most {tool['longest_shot_s']} s")
    width, height = tool["output"]["sizes"]["720p"][args["aspect_ratio"]]
    marks = [whole(micro(done), tool["output"]["fps"]) for done in accumulate(lengths, initial=0)]
    shots = [b - a for a, b in zip(marks, marks[1:]) if b > a]
    billed = sum(min(s for s in load_tools()["tool_text2video_veo"]["parameters"]["properties"]["duration"]["enum"] if s >= length - 1e-6)
                 for length in lengths)
    return [video(width, height, shots, tool["output"]["fps"], args["with_music"] or args["with_narration"], billed_s=billed)], {}

def music(env, tool, args, media):
    """Two songs; nobody can set their length. Tempo and first beat are for tool_beat_detect to find."""
    table, words = tool["output"], set(f"{args['prompt']} {args.get('style', '')}".lower().split())
    (shortest, longest), pace = table["duration_s"], next((pace for pace in ("fast", "slow") if words & set(table[pace])), "other")
    slow, fast = table["bpm"][pace]
    return [audio(round(shortest + (longest - shortest) * env.draw(f"length {i}"), 1), sample_rate=table["sample_rate"],
                  channels=table["channels"], bpm=round(slow + (fast - slow) * env.draw(f"bpm {i}")),
                  beat_offset_s=round(env.draw(f"offset {i}") / 2, 2)) for i in range(table["songs"])], {}

def sound(env, tool, args, media):
    """Speech lasts as long as its text; an effect as long as its video, as asked, or as its prompt is wordy."""
    table, file = tool["output"], {"sample_rate": tool["output"]["sample_rate"], "channels": tool["output"]["channels"]}
    if "text" in args:
        return [audio(speech_seconds(table, args, args["text"]), format=args["format"], n_chars=len(args["text"]), **file)], {}
    chosen = min(30, table["seconds_per_word"] * len(args["prompt"].split()))
    return [audio(media["video"]["duration_s"] if media else args.get("duration", chosen), **file)], {}

def tts_composite(env, tool, args, media):
    """Speech over a video that keeps its own duration; speech that does not fit is refused with both numbers."""
    segments = args.get("segments") or [{"start": 0, "text": args["text"]}]
    spoken = [(s["start"], s["start"] + speech_seconds(tool["output"], args, s["text"])) for s in segments]
    check_intervals(spoken, media["video"], "segments" if "segments" in args else "text", "; shorten the text or raise speed")
    clip, speech = media["video"], {"speech_s": round(spoken[-1][1], 2)}
    heard = clip["sound_frames"] * (args["keep_original_audio"] and args["original_volume"] > 0)
    heard = within(heard + [[whole(micro(second), clip["fps"]) for second in span] for span in spoken], clip["n_frames"])
    n_chars = sum(len(segment["text"]) for segment in segments)
    return [recut(clip, clip["shot_frames"], has_audio=True, sound_frames=heard, spoken_chars=n_chars, **speech)], speech

def composite(env, tool, args, media):
    """Clips in order; a crossfade of c s shortens by c (n - 1); size and fps are the largest of the clips."""
    clips, sound = media["videos"], media.get("audio")
    width, height, fps = (max(clip[name] for clip in clips) for name in ("width", "height", "fps"))
    letterboxed, fps = any(sides(clip) != (width, height) for clip in clips), args.get("fps", fps)
    if short := load_defaults()["sizes"].get(args["resolution"]):   # H.264 wants even sides
        width, height = (round(side * short / min(width, height) / 2) * 2 for side in (width, height))
    shots, spans = join(clips, args["transition_duration"] if args["transition"] == "crossfade" else 0, fps)
    replaced = sound and args["audio_mode"] == "replace"
    kept = any(clip["has_audio"] for clip in clips) and not replaced
    added = [[0, whole(micro(sound["duration_s"]), fps)]] if sound and args["audio_volume"] > 0 else []
    spans = added if replaced else spans + added
    film = video(width, height, shots, fps, bool(sound or kept), sound_frames=within(spans, sum(shots)), letterboxed=letterboxed)
    if sound and sound["duration_s"] < film["duration_s"] - 0.05:
        return [film], {"warning": f"the audio ends at {sound['duration_s']} s; silence until {film['duration_s']} s"}
    return [film], {"warning": f"clips of other sizes stand on black in {width}x{height}"} if letterboxed else {}

def postprocess(env, tool, args, media):
    """Operations in order: only resize, crop and rotate change the size, only loop the duration."""
    clip = media["video"]
    width, height, shots, heard = clip["width"], clip["height"], clip["shot_frames"], clip["sound_frames"]
    for i, step in enumerate(args["operations"]):
        op, where = step["op"], f"operations[{i}]"
        for name in tool["output"]["needs"].get(op, []):
            if name not in step:
                refuse(f"{where}.{name}", f"{where}.{name} is required by {op}", "missing_parameter")
        if op == "crop" and (step.get("x", 0) + step["width"] > width or step.get("y", 0) + step["height"] > height):
            refuse(where, f"{where}: the crop lies outside the frame of {width}x{height}")
        if op in ("resize", "crop"):
            width, height = (int(step[side]) // 2 * 2 for side in ("width", "height"))   # H.264 wants even sides
        elif op == "rotate" and step["angle"] != 180:
            width, height = height, width
        elif op == "reverse":
            shots, heard = shots[::-1], [[sum(shots) - b, sum(shots) - a] for a, b in reversed(heard)]
        elif op == "loop":
            n, total = int(step["count"]), sum(shots)
            if n * total > 10 ** 6:
                refuse(where, f"{where}: the video would exceed 1000000 frames")
            shots, heard = shots * n, within([[a + k * total, b + k * total] for k in range(n) for a, b in heard], n * total)
    return [recut(clip, shots, width=width, height=height, sound_frames=heard)], {}

def trim(env, tool, args, media):
    clip, fps = media["video"], media["video"]["fps"]
    start, length = micro(args["start"]), min(micro(args["end"]), micro(clip["duration_s"])) - micro(args["start"])
    n_frames = whole(length, fps)
    if n_frames < 1:
        refuse("end", f"start..end must span at least one frame ({1 / fps:.4f} s)")
    first = min(whole(start, fps), clip["n_frames"] - n_frames)
    sounding = within([[a - first, b - first] for a, b in clip["sound_frames"]], n_frames)
    kept = [min(done, first + n_frames) - max(done - frames, first)
            for frames, done in zip(clip["shot_frames"], accumulate(clip["shot_frames"]))]
    return [recut(clip, [frames for frames in kept if frames > 0], sound_frames=sounding)], {}

def speed(env, tool, args, media):
    """Duration / factor in whole frames; the sound is sped up too."""
    clip = media["video"]
    if "factor" in args:     # the margin of 1/2000 frame, as in `whole`
        factor = micro(args["factor"])
        n_frames = (clip["n_frames"] * 2000 * 1_000_000 + factor) // (2000 * factor)
    else:
        n_frames = whole(micro(args["target_duration"]), clip["fps"])
    return [recut(clip, stretch(clip["shot_frames"], max(1, n_frames)))], {}

def audio_cut(env, tool, args, media):
    source, more = media["audio"], {}
    if source.get("bpm"):
        offset = (source.get("beat_offset_s", 0.0) - args["start"]) % (60 / source["bpm"])
        more = {"bpm": source["bpm"], "beat_offset_s": round(offset, 3)}
    seconds = args.get("loop_to", min(args.get("end", math.inf), source["duration_s"]) - args["start"])
    if args["fade_in"] + args["fade_out"] > seconds + 1e-6:
        refuse("fade_out", f"fade_in + fade_out is longer than the audio ({seconds:g} s)")
    return [audio(max(seconds, 0.001), **{**{name: source[name] for name in ("sample_rate", "channels") if name in source}, **more})], {}

def beats(env, tool, args, media):
    """Beat i lies at offset + 60 i / bpm; speech, effects and audio under 2 s have none."""
    source = media["audio"]
    if source["duration_s"] < 2 or not source.get("bpm"):
        return [record("data", tempo=0.0, beat_times=[])], {"tempo": 0.0, "n_beats": 0, "warning": "no beats found"}
    tempo, offset, beat = float(source["bpm"]), source.get("beat_offset_s", 0.0), 60 / source["bpm"]
    n_beats = min(int(args.get("max_beats", 10000)), math.ceil((source["duration_s"] - offset) / beat - 1e-9))
    times = [round(offset + i * beat, 3) for i in range(n_beats)]
    return [record("data", tempo=tempo, beat_times=times)], {"tempo": tempo, "n_beats": len(times), "first_beats": times[:4]}

def subtitles(env, tool, args, media):
    check_intervals([(cue["start"], cue["end"]) for cue in args["subtitles"]], media["video"], "subtitles")
    n_cues = media["video"].get("n_cues", 0) + len(args["subtitles"])
    return [recut(media["video"], media["video"]["shot_frames"], n_cues=n_cues)], {}

def write_text(env, tool, args, media):
    """A text from the tool's template in tools.yaml: a refined prompt, a script, a summary, search results."""
    written = template(tool["output"]["template"]).render({**args, **media}).strip()
    made = record("text", text=written, n_chars=len(written), language=args.get("language"))
    if "narration_chars_per_second" in tool["output"]:   # a script knows how much speech fits it
        made["narration_chars"] = int(tool["output"]["narration_chars_per_second"][args["language"]] * args["duration"])
    return [made], {}

def search(env, tool, args, media):
    """Results of a query, or the text of pages, some of which fail: what is no address always, others by their name."""
    dead = [url for url in args.get("urls", []) if not url.startswith(("http://", "https://"))
            or draw("", url, "dead") < tool["output"]["dead_urls"] * env.scale]
    (made,), _ = write_text(env, tool, {**args, "failed": dead}, media)
    advanced = 2 if args["extract_depth" if "urls" in args else "search_depth"] == "advanced" else 1
    return [{**made, "credits": advanced * math.ceil(len(args.get("urls", [0])) / 5)}], {"failed_results": len(dead)} if dead else {}

def storyboard(env, tool, args, media):
    """Shots whose durations sum to the total, on a grid of 0.1 s; a shot over 10 s is flagged."""
    source = media.get("script", BLANK)
    given = {"duration": None, **load_tools().get(source["tool"], {"defaults": {}})["defaults"], **source["arguments"]}
    timed = args.get("shot_durations")
    total = args.get("total_duration") or (sum(timed) if timed else given["duration"])
    n_shots = int(args.get("n_shots") or (len(timed) if timed else given.get("n_scenes") or math.ceil((total or 32) / 8)))
    total = total or 8 * n_shots
    marks = [round(total * i / n_shots, 1) for i in range(n_shots)] + [total]
    subject = " ".join(source.get("text", args["script"])[:200].split()[:8])
    views = [tool["output"]["views"][i % 4] for i in range(n_shots)]
    return storyboard_of([{"index": i + 1, "duration": timed[i] if timed else round(marks[i + 1] - marks[i], 6), "camera": views[i],
                           "description": f"{views[i]}, {subject}"[:80], "first_frame_prompt": f"{subject}, {views[i]}",
                           "characters": args.get("characters", [])} for i in range(n_shots)])

def storyboard_of(shots):
    text = "; ".join(f"{shot['index']}) {shot['duration']:g} s {shot['description']}" for shot in shots)
    long = {"warning": "shots over 10 s are longer than any generator makes"} if max(s["duration"] for s in shots) > 10 else {}
    return [record("text", text=text, n_chars=len(text), shot_list=shots, **long)], {"n_shots": len(shots), **long}

def polish(env, tool, args, media):
    """Better wording, the same shots and durations; with a script, its narration is dealt out to the shots."""
    shots, words = media["storyboard"]["shot_list"], media["script"]["text"].split() if "script" in media else []
    n = len(shots)
    return storyboard_of([{**shot, "description": shot["description"].removesuffix(", detailed") + ", detailed",
                           "narration": " ".join(words[len(words) * i // n:len(words) * (i + 1) // n])}
                          for i, shot in enumerate(shots)])

def analysis(env, tool, args, media):
    """An answer from the records, with a few of the prompt's words: with the whole prompt the agent would verify itself
    against its own words. A fixed share of the pictures and clips has a flaw to report."""
    seen = []
    for found in media["media"][:4]:
        words = re.findall(r"[^\W\d_]{4,}", str(found["arguments"].get("prompt", ""))[:400])
        some = {words[int(draw(env.seed, found["id"], k) * len(words))] for k in range(3)} if words else ()
        flawed = found["kind"] != "audio" and draw(env.seed, found["id"], "flaw") < load_defaults()["flaw_share"] * env.scale
        seen.append({**found, "words": ", ".join(sorted(some)), "flawed": flawed})
    return [], {"answer": template(tool["output"]["template"]).render(seen=seen, more=len(media["media"]) - 4).strip()}

def inspire(env, tool, args, media):
    sizes = [tool["output"]["sizes"][int(env.draw(i) * len(tool["output"]["sizes"]))] for i in range(int(args["n"]))]
    return [record("image", width=width, height=height, tags=args["query"].split()[:3]) for width, height in sizes], {}

def todo(env, tool, args, media):
    """A to-do list that lives as long as the episode."""
    tasks = args["tasks"] if args["action"] in ("create", "update") else []
    for i, task in enumerate(tasks):
        if args["action"] == "update" and task["id"] not in env.todo:
            refuse(f"tasks[{i}].id", f"no task {task['id']}; known tasks: {', '.join(map(str, env.todo)) or 'none'}")
    new = {task["id"]: {"title": "", "status": "todo", **env.todo.get(task["id"], {}), **task} for task in tasks}
    env.todo = {} if args["action"] == "clear" else {**env.todo, **new}
    return [], {"tasks": [f"{number} {task['status']}: {task['title'][:40]}" for number, task in env.todo.items()][:50]}

def html(env, tool, args, media):
    """A page; every medium it names must exist, and becomes one of its parents."""
    limits = {"kinds": ["image", "video", "audio", "text", "data"]}
    parents = [find_medium(env.artifacts, media_id, limits, f"sections[{i}].media_ids[{j}]")
               for i, section in enumerate(args["sections"]) for j, media_id in enumerate(section.get("media_ids", []))]
    lineage = [{"id": parent["id"], "role": "source"} for parent in parents]
    return [record("html", n_media=len(parents), parents=lineage)], {"n_media": len(parents)}

BEHAVIOURS = {function.__name__: function for function in (
    make_images, make_video, pipeline, music, sound, tts_composite, composite, postprocess, trim, speed, audio_cut, beats,
    subtitles, write_text, search, storyboard, polish, analysis, inspire, todo, html)}

# ---------------------------------------------------------------------------- price, time, fidelity
# What a rate of tools.yaml is multiplied by: of the outputs, and of the media that went in.
AMOUNTS = {
    "call": lambda made, given: 1,
    "base": lambda made, given: 1,
    "item": lambda made, given: len(made),
    "square_item": lambda made, given: sum(m["width"] == m["height"] for m in made),
    "other_item": lambda made, given: sum(m["width"] != m["height"] for m in made),
    "second": lambda made, given: sum(m.get("billed_s") or m["duration_s"] or 0 for m in made),
    "small_second": lambda made, given: sum(m["duration_s"] for m in made if min(sides(m)) <= 720),
    "large_second": lambda made, given: sum(m["duration_s"] for m in made if min(sides(m)) > 720),
    "char": lambda made, given: sum(m.get("n_chars", 0) for m in made),
    "spoken_char": lambda made, given: sum(m["spoken_chars"] for m in made),
    "credit": lambda made, given: sum(m["credits"] for m in made),
    "input_item": lambda made, given: len(given),
    "input_second": lambda made, given: sum(m["duration_s"] for m in given),
}

def row(rates, args):
    """The rates that hold for these arguments: `by` names the parameter that picks from each table."""
    if "by" not in rates:
        return rates
    return {name: value[args[rates["by"]]] if isinstance(value, dict) else value for name, value in rates.items() if name != "by"}

def tally(rates, args, made, given):
    """Sum of rates times amounts: US dollars of `price_usd`, virtual seconds of `virtual_seconds`."""
    return sum([rate * AMOUNTS[name](made, given) for name, rate in row(rates, args).items()])

def latency(times, chance):
    """Virtual seconds of a service: half the calls take less than the typical time."""
    low, high = (times["min"], times["typical"]) if chance < 0.5 else (times["typical"], times["max"])
    return low + (high - low) * (2 * chance % 1)

def deviate(outputs, more):
    """What an unfaithful simulator returns: a missing item (unannounced), a wrong size or duration, or else a failure. None of
    it can be a faithful outcome of the same call, so that the total variation between the two is the share of deviations."""
    if not outputs or outputs[0]["kind"] not in ("image", "video", "audio"):
        refuse(None, "internal error, try again", "service_error", True)
    if len(outputs) > 1:
        return outputs[:-1], {}
    o = outputs[0]
    if o["kind"] == "video":
        shorter = recut(o, stretch(o["shot_frames"], o["n_frames"] * 4 // 5 or 2))
        return [{**o, **{name: shorter[name] for name in ("shot_frames", "n_frames", "duration_s", "shots", "sound_frames")}}], more
    wrong = {"duration_s": o["duration_s"] + 1} if o["kind"] == "audio" else {"width": o["width"] * 2, "height": o["height"] * 2}
    return [{**o, **wrong}], more
