"""VisGenEnv: 36 simulated tools of visual creation (Sec. 4.3.1, Table 9); no model, no network, no torch.

tools.yaml says what each tool takes, refuses and costs, and how it fails; here are what it makes, the agent's text (UTPC), the episode, and
a console. Nothing the agent writes can raise: each call gets a reply, and a refused call's reply says which parameter is wrong and why.
"""
import argparse
import copy
import hashlib
import json
import math
import re
import sys
import time
from functools import lru_cache
from itertools import accumulate, filterfalse, islice
from operator import contains, ge, itemgetter, le

import jinja2
import orjson
import yaml

from configs.experiment import ROOT, RolloutConfig

ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)   # what is written here holds no cycles
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(ROOT / "data"), auto_reload=False)

# ---------------------------------------------------------------------------- the tools as data
def to_json(obj):
    """The one JSON style of this project, for what the agent writes and what it reads."""
    return ENCODER.encode(obj)

def page(path, **names):
    """A template of data/, filled in."""
    return PAGES.get_template(path).render(names).strip()

@lru_cache(maxsize=1)
def read_sheet():
    """tools.yaml, with what its entries leave out and the patterns that moderation searches for."""
    sheet = yaml.load((ROOT / "tools.yaml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    words, providers = sheet["defaults"]["blocked_words"], sheet["defaults"]["providers"]
    for name, tool in sheet["tools"].items():
        tool = sheet["tools"][name] = {"name": name, **sheet["defaults"]["entry"], **tool, "provider": providers[tool["provider"]]}
        tool["blank"] = {param: schema.get("default") for param, schema in tool["parameters"]["properties"].items()}
    for category in words:   # a word ends where its letters end, so that "gored" passes; Chinese has no such ends
        words[category] = re.compile(f"(?<![a-z])(?:{'|'.join(map(re.escape, words[category]))})(?![a-z])", re.IGNORECASE)
    return sheet

def load_tools():
    """The tools of Table 9 by name, in its order. Read once and shared: do not modify."""
    return read_sheet()["tools"]

def load_defaults():
    """What all tools share: failure rates, limits, providers and blocked words, from the head of tools.yaml."""
    return read_sheet()["defaults"]

def tool_schemas(names):
    """The named tools in OpenAI's form, as chat templates take them in `tools`."""
    return [{"type": "function", "function": {part: load_tools()[name][part] for part in ("name", "description", "parameters")}} for name in names]

def tool_signature(name):
    """One line such as `tool_text2image_gemini(prompt, aspect_ratio="1:1", n=1)`; a `?` marks an optional one."""
    required, blank = load_tools()[name]["parameters"]["required"], load_tools()[name]["blank"]
    optional = [p + "?" if value is None else f"{p}={to_json(value)}" for p, value in blank.items() if p not in required]
    return f"{name}({', '.join(required + optional)})"

@lru_cache(maxsize=256)
def system_text(style, pool):
    """The system message for a pool of tool names; with `schema` the chat template itself lists the tools."""
    listing = {"names": " ".join(pool), "signature": "\n" + "\n".join(map(tool_signature, pool)), "schema": ""}[style]
    return page("prompts/system.jinja", tools_text=listing, brief=style == "names")

@lru_cache(maxsize=8)
def media_files(kind):
    """Files of the media database; without a database, names that one would have; none for kinds without stand-ins."""
    index, suffix = ROOT / "data/media/index.jsonl", load_defaults()["kinds"][kind].get("stand_in")
    rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()] if index.exists() else []
    return [row["path"] for row in rows if row["kind"] == kind] or [f"{kind}/{i:04d}.{suffix}" for i in range(100 if suffix else 0)]

def draw(seed, index, purpose):
    """A number in [0, 1) that depends on nothing but its arguments, in any process."""
    return (int.from_bytes(hashlib.blake2b(f"{seed}|{index}|{purpose}".encode(), digest_size=8).digest(), "big") >> 11) / 2 ** 53

# ---------------------------------------------------------------------------- validation
class ToolError(Exception):
    """A refused or failed call: code, param, message, retryable. VisGenEnv turns it into the reply's error object."""

def refuse(param, message, code="invalid_parameter", retryable=False):
    raise ToolError(code, param, message, retryable)

TYPES = {"string": (str,), "boolean": (bool,), "array": (list,), "object": (dict,), "number": (int, float), "integer": (int, float)}
KEYWORDS = {   # of JSON Schema: what must hold of its bound and a value, and the words for it
    "type": (lambda kind, value: type(value) in TYPES[kind] and (kind != "integer" or value % 1 == 0), "be of type {}"),   # 8.0 is the integer 8
    "enum": (contains, "be one of {}"),
    "minimum": (le, "be at least {}"),
    "maximum": (ge, "be at most {}"),
    "minLength": (lambda least, value: len(value) >= least and not value.isspace(), "have at least {} characters, not only spaces"),
    "maxLength": (lambda most, value: len(value) <= most, "have at most {} characters"),
    "minItems": (lambda least, value: len(value) >= least, "have at least {} items"),
    "maxItems": (lambda most, value: len(value) <= most, "have at most {} items"),
    "pattern": (re.search, "match {}"),
}

def check(value, schema, where):
    """Raise ToolError when a value does not fit its JSON Schema; `where` is its path, such as subtitles[0].end."""
    for keyword, bound in schema.items():
        if keyword in KEYWORDS and not KEYWORDS[keyword][0](bound, value):
            refuse(where, f"{where} must {KEYWORDS[keyword][1].format(bound)}, got {to_json(value):.40}")
    if "properties" in schema:   # names first, then required ones, then values: the order in which a reader would mend it
        properties, inside = schema["properties"], where + "." if where else ""
        for name in filterfalse(properties.__contains__, value):
            refuse(f"{inside}{name:.40}", f"unknown parameter {to_json(name):.40}; known: {', '.join(properties)}", "unknown_parameter")
        for name in filterfalse(value.__contains__, schema["required"]):
            refuse(inside + name, f"{inside}{name} is required", "missing_parameter")
        for name, item in value.items():
            check(item, properties[name], inside + name)
    for i, item in enumerate(value) if "items" in schema else ():
        check(item, schema["items"], f"{where}[{i}]")

sides = itemgetter("width", "height")
LIMITS = {   # of a medium, true where it is within the service's limit; tools.yaml holds the codes and messages
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
        ids = [(f"{param}[{i}]", media_id) for i, media_id in enumerate(given)] if many else [(param, given)]
        if inside:   # ids lie one level deeper
            ids = [(f"{where}.{inside}[{i}]", media_id) for where, item in ids for i, media_id in enumerate(item.get(inside, ()))]
        for where, media_id in ids:
            if media_id not in artifacts:
                known = ", ".join([i for i, m in artifacts.items() if m["kind"] in limits["kinds"]][-12:]) or "none"
                refuse(where, f"{where}: no media {to_json(media_id):.40} here; known {limits['kinds'][0]} ids: {known}", "file_not_found")
            for name, rule in load_defaults()["media_limits"].items():
                if name in limits and not LIMITS[name](artifacts[media_id], limits[name]):
                    refuse(where, rule["message"].format(where=where, m=artifacts[media_id], limit=limits[name]), rule["code"])
            parents.append({"id": media_id, "role": limits["role"]})
        a[param] = [artifacts[media_id] for _, media_id in ids] if many else artifacts[given]
    return parents

RULES = {   # checks across fields, of a rule's entry in tools.yaml and the call's parameters, true where all is well; the last five give warnings
    "how_many_given": lambda r, a: r["least"] <= sum(a[name] is not None for name in r["of"]) <= r["most"],
    "one_of": lambda r, a: a[r["of"]] in r["values"],
    "lengths": lambda r, a: all(len(a[name] or "") <= most for name, most in r["most"].items()),
    "prompt_tokens": lambda r, a: a["prompt"].isascii() or len(a["prompt"]) + 3 * len(re.findall(r["wide"], a["prompt"])) <= 4096,
    "shots_count": lambda r, a: None in (a["shot_durations"], a["n_shots"]) or len(a["shot_durations"]) == a["n_shots"],
    "shots_sum": lambda r, a: None in (a["shot_durations"], a["total_duration"]) or abs(sum(a["shot_durations"]) - a["total_duration"]) <= 0.1 + 1e-9,
    "start_before_end": lambda r, a: a["start"] < (a[r["of"]]["duration_s"] if a["end"] is None else a["end"]),
    "end_inside": lambda r, a: (a["end"] or 0) <= a[r["of"]]["duration_s"] + 1e-5,
    "spans_a_frame": lambda r, a: whole(min(a["end"], a["video"]["duration_s"]) - a["start"], a["video"]["fps"]) >= 1,
    "loops_fit": lambda r, a: a["video"]["n_frames"] * math.prod(step.get("count", 1) for step in a["operations"]) <= 10 ** 6,
    "transition_fits": lambda r, a: a["transition_duration"] * 2 < min(clip["duration_s"] for clip in a["videos"]),
    "few_images": lambda r, a: len(a["images"] or ()) + a["n"] * r["outputs"] <= r["most"],
    "shots_fit": lambda r, a: a["storyboard"] or 1 <= a["duration"] / a["n_shots"] <= 8,
    "storyboard_fits": lambda r, a: not a["storyboard"] or max(shot["duration"] for shot in a["storyboard"]["shot_list"]) <= 8,
    "factor_in_range": lambda r, a: a["target_duration"] is None or 0.25 <= a["video"]["duration_s"] / a["target_duration"] <= 4,
    "sides_fit": lambda r, a: all(r["least"] <= int(side) <= r["most"] for side in re.findall("[0-9]{2,}", a["size"] or "")),
    "mask_fits": lambda r, a: a["mask"] is None or [sides(a["mask"])] == [sides(image) for image in a["images"]],
    "hardly_cropped": lambda r, a: abs(math.log(a["image"]["width"] / a["image"]["height"] * a["made"][0]["height"] / a["made"][0]["width"])) <= 0.05,
    "audio_lasts": lambda r, a: a["audio"] is None or a["audio"]["duration_s"] >= a["made"][0]["duration_s"] - 0.05,
    "one_size": lambda r, a: not a["made"][0]["letterboxed"],
    "has_beats": lambda r, a: a["made"][0]["beat_times"],
    "short_shots": lambda r, a: max(shot["duration"] for shot in a["made"][0]["shot_list"]) <= 10,
}

def broken(rules, a):
    """The rules that do not hold and apply (`when` parameters have these values), one after the other."""
    return (rule for rule in rules if not RULES[rule["rule"]](rule, a) and all(a[p] in values for p, values in rule.get("when", {}).items()))

# ---------------------------------------------------------------------------- UTPC
TAGS = ("think", "plan", "tool_call", "answer")
BLOCK = re.compile(r"<(NAME)>((?:[^<]++|<(?!/\1>|(?:NAME)>))*+)(</\1>)?".replace("NAME", "|".join(TAGS)))   # up to its end, or to what opens next
ODD = re.compile(r"</?([A-Za-z_-]++)>")   # outside of blocks: another tag, or the close of what is not open
FORGED = re.compile(r"<(?=/?(?:think|plan|tool_call|tool_response|answer)\b)")   # what could open or close a turn, beside control tokens
MAX_TAGS = 2000     # of a turn; a megabyte of tags would otherwise give as many faults and replies
MAX_DEPTH, MAX_NODES = 32, 10_000   # of a block of JSON: no call needs more, and copying much deeper ones would exhaust Python's stack

def clean(text):
    """The text without lone surrogates, which no file and no tokenizer can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")

def read_json(text):
    """Strict JSON -> value; of a key written twice, the last one counts. ValueError for bad JSON, NaN, lone surrogates and too much nesting."""
    nodes = text.count("[") + text.count("{")
    value = orjson.loads(text) if nodes <= MAX_NODES else None
    level = [value] if nodes > MAX_DEPTH else []
    for _ in range(MAX_DEPTH if level else 0):
        level = [child for node in level if isinstance(node, (dict, list)) for child in (node.values() if isinstance(node, dict) else node)]
    if level or nodes > MAX_NODES:
        raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_NODES} lists and objects")
    return value

def parse_utpc(text):
    """What a turn says, and what is wrong with it (Sec. 3.1). Never raises; linear in len(text). Blocks beyond MAX_TAGS are text.

    Returns {think [str], plan list|None, calls [{name, arguments, error, pos}], answer dict|None, order [tag], faults [{code, pos, message}]}.
    A tag that opens inside another one ends it: a lost closing tag costs one block. Each call gets a reply, so `calls` has unreadable ones too.
    """
    text, end, cut = clean(text), 0, set()
    found = {"think": [], "plan": None, "calls": [], "answer": None, "order": [], "faults": []}
    order = found["order"]

    def fault(code, pos, message):
        found["faults"].append({"code": code, "pos": pos, "message": f"{message:.160}"})
        return f"{message:.160}"

    for match in [*islice(BLOCK.finditer(text), MAX_TAGS), None]:
        pos = match.start() if match else len(text)
        for odd in islice(ODD.finditer(text, end, pos), MAX_TAGS) if end < pos else ():
            code = "unknown_tag" if odd[1] not in TAGS else "nested_tag" if odd[1] in cut else "stray_close"
            fault(code, odd.start(), f"{odd[0]} is none of the four tags, or closes nothing")
        if end < pos and ODD.sub("", text[end:pos]).strip():
            fault("text_outside_tags", end, "text outside the four tags")
        if not match:
            break
        tag, body, closed = match.groups()
        end, value, error = match.end(), body.strip(), None
        if not closed:
            cut.add(tag)
            fault("unclosed_tag", pos, f"<{tag}> is not closed, or not before another tag opens")
        if (tag in ("plan", "answer") and found["calls"]) or (tag == "tool_call" and "answer" in order) or (tag != "think" and not order):
            fault("wrong_order", pos, "a turn is <think>, then maybe <plan>, then calls or an <answer>")
        if tag in order and tag != "tool_call":
            fault("duplicate_tag", pos, f"a second <{tag}> in one turn")
        if not value:
            error = fault("empty_tag", pos, f"<{tag}> is empty")
        elif tag != "think":
            try:
                value = read_json(body)
                check(value, load_defaults()["utpc"][tag], tag)
            except ValueError as wrong:
                error = fault("bad_json", pos, f"the {tag} is not valid JSON: {wrong}")
            except ToolError as wrong:
                error = fault(f"bad_{tag.removeprefix('tool_')}", pos, wrong.args[2])
        if tag == "think":
            found["think"].append(value)
        elif tag == "tool_call":
            found["calls"].append({**({"name": None, "arguments": None} if error else value), "error": error, "pos": pos})
        elif not error and tag not in order:
            found[tag] = value
        order.append(tag)
    if not order:
        fault("wrong_order", 0, "a turn begins with <think>")
    return found

# ---------------------------------------------------------------------------- media records and their arithmetic
def record(kind, **fields):
    """A new artifact with every field of the Artifact record. A video is the list of its shots' lengths in frames; all about its time follows."""
    made = {**load_defaults()["record"], "kind": kind, "has_audio": kind == "audio", "format": load_defaults()["kinds"][kind]["format"], **fields}
    if shots := made.get("shot_frames"):
        made.update(shots=len(shots), n_frames=sum(shots), duration_s=round(sum(shots) / made["fps"], 6))
    return made

def recut(clip, place=int, **changes):
    """A video like `clip` whose frame i comes to lie at place(i), and its cuts and sounds with it. What lost all its sound has none."""
    cuts = sorted(map(place, accumulate(clip["shot_frames"], initial=0)))
    sounds = clip["sound_frames"] and [span for span in (sorted(map(place, span)) for span in clip["sound_frames"]) if span[1] > span[0]]
    heard = clip["has_audio"] and sounds != []
    return record(**{**clip, "format": "mp4", "shot_frames": spread(cuts), "sound_frames": sounds or None, "has_audio": heard, **changes})

def whole(seconds, fps):
    """Whole frames of a time, exact for up to six decimals; a margin of 1/2000 frame absorbs that durations are shown rounded."""
    return (round(seconds * 1_000_000) * round(fps * 1000) + 500_000) // 10 ** 9

def spread(marks):
    """Lengths between marks in frames; what has none is no shot."""
    return [b - a for a, b in zip(marks, marks[1:]) if b > a]

def frame_size(table, a, sources):
    """Sides in pixels: in the last source's aspect (`area`); from `sizes` by aspect ratio, if need be the nearest to the first source; or as told."""
    size = a.get("size") or a.get("resolution") or a.get("mode") or "auto"
    if size in table.get("area", ()):
        scale, multiple = math.sqrt(table["area"][size] / math.prod(sides(sources[-1]))), table["multiple_of"]
        return [max(1, round(side * scale / multiple)) * multiple for side in sides(sources[-1])]
    if size not in table.get("sizes", ()):
        return [int(side) for side in re.split("[x*:]", size)]
    sizes, (width, height) = table["sizes"][size], sides(sources[0]) if sources else (1, 1)
    return sizes[a.get("aspect_ratio") or min(sizes, key=lambda name: abs(math.log(sizes[name][0] * height / (sizes[name][1] * width))))]

def speech_seconds(speech, args, words):
    """Length of a spoken text: characters / rate / speed, and pauses at punctuation (all rates are assumptions)."""
    language = args["language"]
    if language == "en" and 2 * len(re.findall(r"[\u4e00-\u9fff]", words)) > len(words):
        language = "zh"   # the service hears the language: the default must not make Chinese three times too fast
    pauses = sum(seconds * len(re.findall(mark, words)) for mark, seconds in speech["pauses"].items())
    return round(len(words) / speech["chars_per_second"][language] / args["speed"] + pauses + speech["tail_s"], 2)

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
        made = record("image", **size, format=a.get("output_format", "png"), watermark=bool(a.get("watermark") or a.get("logo_add")))
    else:
        cropped = bool(sources) and "sizes" in table and sources[0]["width"] * size["height"] != sources[0]["height"] * size["width"]
        shots, sounds = [int(a["duration"]) * table["fps"]], a.get("generate_audio", False)
        made = record("video", **size, fps=table["fps"], shot_frames=shots, has_audio=sounds, cropped=cropped)
    return [dict(made) for _ in range(int(a.get("n", 1)))], {}

def pipeline(env, tool, a):
    """A storyboard's shots, or equal ones, each cut from the shortest Veo clip that covers it; these clips are what costs (`billed_s`)."""
    table, n = tool["output"], int(a["n_shots"])
    lengths = [shot["duration"] for shot in a["storyboard"]["shot_list"]] if a["storyboard"] else [a["duration"] / n] * n
    billed = sum(min(seconds for seconds in table["clips_s"] if seconds >= length - 1e-6) for length in lengths)
    shots = spread([whole(done, table["fps"]) for done in accumulate(lengths, initial=0)])
    (width, height), sounds = table["sizes"][a["aspect_ratio"]], a["with_music"] or a["with_narration"]
    return [record("video", width=width, height=height, fps=table["fps"], shot_frames=shots, has_audio=sounds, billed_s=billed)], {}

def music(env, tool, a):
    """Two songs; nobody can set their length. Tempo and first beat are for tool_beat_detect to find."""
    table, words = tool["output"], set(f"{a['prompt']} {a['style'] or ''}".lower().split())
    (shortest, longest), pace = table["duration_s"], next((pace for pace in ("fast", "slow") if words & set(table[pace])), "other")
    slow, fast = table["bpm"][pace]
    return [record("audio", **table["file"], duration_s=round(shortest + (longest - shortest) * env.draw(f"length {i}"), 1),
                   bpm=round(slow + (fast - slow) * env.draw(f"bpm {i}")), beat_offset_s=round(env.draw(f"offset {i}") / 2, 2))
            for i in range(table["songs"])], {}

def sound(env, tool, a):
    """Speech lasts as long as its text; an effect as long as its video, as asked, or as its prompt is wordy."""
    table = tool["output"]
    if "text" in a:
        return [record("audio", **table["file"], format=a["format"], duration_s=speech_seconds(table, a, a["text"]), n_chars=len(a["text"]))], {}
    seconds = a["duration"] or min(30, table["seconds_per_word"] * len(a["prompt"].split()))
    return [record("audio", **table["file"], duration_s=round(float(a["video"]["duration_s"] if a["video"] else seconds), 3))], {}

def tts_composite(env, tool, a):
    """Speech over a video that keeps its own duration; speech that does not fit is refused with both numbers."""
    clip, segments = a["video"], a["segments"] or [{"start": 0, "text": a["text"]}]
    spoken = [(s["start"], s["start"] + speech_seconds(tool["output"], a, s["text"])) for s in segments]
    check_intervals(spoken, clip, "segments" if a["segments"] else "text", "; shorten the text or raise speed")
    speech = {"speech_s": round(spoken[-1][1], 2)}
    return [recut(clip, has_audio=True, sound_frames=None, spoken_chars=sum(len(s["text"]) for s in segments), **speech)], speech

def composite(env, tool, a):
    """Clips in order; a crossfade of c s shortens by c (n - 1); size and fps are the largest of the clips."""
    clips, sound = a["videos"], a["audio"]
    width, height, fps = (max(clip[name] for clip in clips) for name in ("width", "height", "fps"))
    letterboxed, fps = any(sides(clip) != (width, height) for clip in clips), a["fps"] or fps
    if short := load_defaults()["sizes"].get(a["resolution"]):   # H.264 wants even sides
        width, height = (round(side * short / min(width, height) / 2) * 2 for side in (width, height))
    cuts, sounds, clock, overlap = [], [], 0.0, a["transition_duration"] if a["transition"] == "crossfade" else 0   # seconds
    for clip in clips:
        while cuts and cuts[-1] > clock - 1e-9:
            cuts.pop()   # a shot that is over before the crossfade ends is no cut of its own
        cuts += [clock + done / clip["fps"] for done in accumulate(clip["shot_frames"][:-1], initial=0)]
        sounds += [[clock + edge / clip["fps"] for edge in span] for span in clip["sound_frames"] or [[0, clip["n_frames"]]] * clip["has_audio"]]
        clock += clip["n_frames"] / clip["fps"] - overlap
    if sound:   # over the clips' own sound, or in its place, from the beginning
        sounds = [[0, min(sound["duration_s"], clock + overlap)], *(sounds if a["audio_mode"] == "mix" else ())]
    shots, heard, silence = spread([whole(cut, fps) for cut in [*cuts, clock + overlap]]), sorted([whole(edge, fps) for edge in span] for span in sounds), 0
    for first, end in heard:
        silence = max(silence, end) if first <= silence else silence   # where it begins; at the end, if the sound has no gap
    return [record("video", width=width, height=height, fps=fps, shot_frames=shots, letterboxed=letterboxed, has_audio=bool(heard),
                   sound_frames=heard if heard and silence < sum(shots) else None)], {}

def postprocess(env, tool, a):
    """Operations in order: only resize, crop and rotate change the size, only loop the duration."""
    clip, needs = a["video"], tool["output"]["needs"]
    width, height = sides(clip)
    for i, step in enumerate(a["operations"]):
        op, where = step["op"], f"operations[{i}]"
        for name in [name for name in needs.get(op, ()) if name not in step]:
            refuse(f"{where}.{name}", f"{where}.{name} is required by {op}", "missing_parameter")
        if op == "crop" and (step.get("x", 0) + step["width"] > width or step.get("y", 0) + step["height"] > height):
            refuse(where, f"{where}: the crop lies outside the frame of {width}x{height}")
        if op in ("resize", "crop"):
            width, height = (int(step[side]) // 2 * 2 for side in ("width", "height"))   # H.264 wants even sides
        elif op == "rotate" and step["angle"] != 180:
            width, height = height, width
        elif op == "reverse":
            clip = recut(clip, lambda frame, n=clip["n_frames"]: n - frame)
        elif op == "loop":
            times, n = range(int(step["count"])), clip["n_frames"]
            sounds = clip["sound_frames"] and [[edge + i * n for edge in span] for i in times for span in clip["sound_frames"]]
            clip = record(**{**clip, "shot_frames": clip["shot_frames"] * len(times), "sound_frames": sounds})
    return [recut(clip, width=width, height=height)], {}

def trim(env, tool, a):
    clip, fps = a["video"], a["video"]["fps"]
    n_frames = whole(min(a["end"], clip["duration_s"]) - a["start"], fps)
    first = min(whole(a["start"], fps), clip["n_frames"] - n_frames)
    return [recut(clip, lambda frame: min(max(frame - first, 0), n_frames))], {}

def speed(env, tool, a):
    """Duration / factor in whole frames; the sound is sped up too."""
    clip = a["video"]
    n_frames = max(1, whole(a["target_duration"] or clip["n_frames"] / clip["fps"] / a["factor"], clip["fps"]))
    return [recut(clip, lambda frame: frame * n_frames // clip["n_frames"])], {}

def audio_cut(env, tool, a):
    source, bpm = a["audio"], a["audio"].get("bpm")
    seconds = a["loop_to"] or min(math.inf if a["end"] is None else a["end"], source["duration_s"]) - a["start"]
    if a["fade_in"] + a["fade_out"] > seconds + 1e-6:
        refuse("fade_out", f"fade_in + fade_out is longer than the audio ({seconds:g} s)")
    offset = round((source.get("beat_offset_s", 0.0) - a["start"]) % (60 / bpm), 3) if bpm else None
    return [{**source, "format": "mp3", "duration_s": round(max(float(seconds), 0.001), 3), "beat_offset_s": offset}], {}

def beats(env, tool, a):
    """Beat i lies at offset + 60 i / bpm; speech, effects and audio under 2 s have none."""
    source = a["audio"]
    tempo, offset = float(source.get("bpm") or 0) * (source["duration_s"] >= 2), source.get("beat_offset_s") or 0.0
    n_beats = min(int(a["max_beats"] or 10000), math.ceil((source["duration_s"] - offset) * tempo / 60 - 1e-9))
    times = [round(offset + i * 60 / tempo, 3) for i in range(n_beats)]
    return [record("data", tempo=tempo, beat_times=times)], {"tempo": tempo, "n_beats": n_beats, "first_beats": times[:4]}

def subtitles(env, tool, a):
    clip, cues = a["video"], a["subtitles"]
    check_intervals([(cue["start"], cue["end"]) for cue in cues], clip, "subtitles")
    return [recut(clip, n_cues=clip.get("n_cues", 0) + len(cues))], {}

def write_text(env, tool, a, **more):
    """A text from the tool's template, no longer than asked: a refined prompt, a script in scenes of one length, a summary, ..."""
    n = int(a.get("n_scenes") or max(1, round((a.get("duration") or 0) / 8)))
    text = page(tool["output"]["template"], **a, **more, output=tool["output"], scenes=[(a.get("duration") or 0) / n] * n)
    text = " ".join(text.split()[:int(a["max_words"])]) if "max_words" in a else text[:int(a.get("max_chars", len(text)))]
    seen = {"n_chars": len(text), "brief": text[:197] + "..." * (len(text) > 197)}   # the reply shows the beginning
    return [record("text", text=text, **seen, lasts_s=a.get("duration"), n_scenes=a.get("n_scenes"), **more)], {}

def search(env, tool, a):
    """Results of a query, or the text of pages, some of which fail: what is no address always, others by their name."""
    urls, dead = a["urls"] or [], tool["output"]["dead_urls"] * env.scale
    failed = [url for url in urls if not url.startswith(("http://", "https://")) or draw("", url, "dead") < dead]
    credits = (1 + (a["extract_depth" if urls else "search_depth"] == "advanced")) * math.ceil(len(urls or [0]) / 5)
    more, results = {"failed_results": len(failed)} if failed else {}, [*range(int(a["max_results"]) if a["query"] else 0)]
    return write_text(env, tool, a, failed=failed, results=results, credits=credits)[0], more

def storyboard(env, tool, a):
    """Shots whose durations sum to the total, on a grid of 0.1 s. What the call leaves out follows from the script."""
    script, views, timed = a["script"], tool["output"]["views"], a["shot_durations"] or []
    total = a["total_duration"] or sum(timed) or script.get("lasts_s")
    n = int(a["n_shots"] or len(timed) or script.get("n_scenes") or math.ceil((total or 32) / 8))
    marks = [round((total or 8 * n) * i / n, 1) for i in range(n)] + [total or 8 * n]
    lengths, subject = timed or [round(b - a, 6) for a, b in zip(marks, marks[1:])], " ".join(script["text"][:200].split()[:8])
    shots = [{"index": i + 1, "duration": length, "description": f"{views[i % 4]}, {subject}"[:80]} for i, length in enumerate(lengths)]
    return write_text(env, tool, a, shot_list=shots)[0], {"n_shots": n}

def polish(env, tool, a):
    """Better wording, the same shots and durations; with a script, its narration is dealt out to the shots."""
    given, words = a["storyboard"]["shot_list"], a["script"]["text"].split() if "script" in a else []
    marks = [len(words) * i // len(given) for i in range(len(given) + 1)]
    shots = [{**shot, "description": shot["description"].removesuffix(", detailed") + ", detailed", "narration": " ".join(words[start:end])}
             for shot, start, end in zip(given, marks, marks[1:])]
    return write_text(env, tool, a, shot_list=shots)[0], {"n_shots": len(shots)}

def analysis(env, tool, a):
    """An answer from the records: a few of the prompt's words, lest the agent verify itself against its own, and flaws of a fixed share of media."""
    seen = []
    for medium in a["media"][:4]:
        words = re.findall(r"[^\W\d_]{4,}", str(medium["arguments"].get("prompt", ""))[:400])
        some = {words[int(draw(env.seed, medium["id"], k) * len(words))] for k in range(3)} if words else ()
        flawed = medium["kind"] != "audio" and draw(env.seed, medium["id"], "flaw") < load_defaults()["flaw_share"] * env.scale
        seen.append({**medium, "words": ", ".join(sorted(some)), "flawed": flawed})
    return [], {"answer": page("templates/analysis.jinja", seen=seen, more=max(0, len(a["media"]) - 4))}

def inspire(env, tool, a):
    sizes = [tool["output"]["sizes"][int(env.draw(i) * len(tool["output"]["sizes"]))] for i in range(int(a["n"]))]
    return [record("image", width=width, height=height, tags=a["query"].split()[:3]) for width, height in sizes], {}

def todo(env, tool, a):
    """A to-do list that lives as long as the episode."""
    known = {} if a["action"] == "clear" else dict(env.todo)
    for i, task in enumerate(a["tasks"] if a["action"] in ("create", "update") else ()):
        if a["action"] == "update" and task["id"] not in env.todo:
            refuse(f"tasks[{i}].id", f"no task {task['id']}; known tasks: {', '.join(map(str, env.todo)) or 'none'}")
        known[task["id"]] = {"title": "", "status": "todo", **known.get(task["id"], {}), **task}
    env.todo = known
    return [], {"tasks": [f"{number} {task['status']}: {task['title'][:40]}" for number, task in known.items()][:50]}

def html(env, tool, a):
    return [record("html", n_media=len(a["sections"]))], {"n_media": len(a["sections"])}   # find_media put the media there

BEHAVIOURS = {make.__name__: make for make in (generate, pipeline, music, sound, tts_composite, composite, postprocess, trim, speed, audio_cut, beats,
                                               subtitles, write_text, search, storyboard, polish, analysis, inspire, todo, html)}

# ---------------------------------------------------------------------------- price, time, fidelity, replies
AMOUNTS = {   # what a rate of tools.yaml is multiplied by; other rates are per unit of the outputs' field of that name, such as duration_s
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
        rates = {name: rate[a[rates["by"]]] if isinstance(rate, dict) else rate for name, rate in rates.items() if name != "by"}
    if "typical" in rates:
        chance, low, usual, high = draw("latency"), rates["min"], rates["typical"], rates["max"]
        return low + (usual - low) * min(1, 2 * chance) + (high - usual) * max(0, 2 * chance - 1)
    return sum([rate * (AMOUNTS[name](made, given) if name in AMOUNTS else sum(m[name] for m in made)) for name, rate in rates.items()])

def deviate(outputs, more):
    """What an unfaithful simulator returns, never a faithful outcome: an item less (unannounced), a wrong size or duration, or else a failure."""
    if not outputs or outputs[0]["kind"] not in ("image", "video", "audio"):
        refuse(None, "internal error, try again", "service_error", True)
    if len(outputs) > 1:
        return outputs[:-1], {}
    if "shot_frames" in outputs[0]:
        return [recut(outputs[0], lambda frame: frame * 4 // 5 if outputs[0]["n_frames"] > 1 else frame * 2)], more
    return [{**outputs[0], **{name: outputs[0][name] * 2 for name in ("width", "height", "duration_s") if outputs[0][name]}}], more

def describe(kind, outputs, more):
    """The reply's fields: ids, then what a kind of artifact shows; one value if all outputs share it, else a list."""
    shown = {"ids": [output["id"] for output in outputs]} if outputs else {}
    for name, field in load_defaults()["kinds"][kind]["shows"].items():
        values = [output[field] if field else f"{output['width']}x{output['height']}" for output in outputs]
        shown[name] = values[0] if values.count(values[0]) == len(values) else values
    return {**shown, **more}

# ---------------------------------------------------------------------------- the environment
class VisGenEnv:
    """One episode at a time, all state in the instance. Same seed, same calls: same replies. copy.deepcopy forks an episode."""
    def __init__(self, rollout=RolloutConfig()):
        self.rollout, self.scale, self.ended = rollout, rollout.failure_scale, "not started"

    def reset(self, task, seed):
        """Opening messages and info {"pool": names, "tools": schemas or None}. ValueError for a pool of unknown tools."""
        self.pool = list(task.get("pool") or load_tools()) if self.rollout.tool_pool == "task" else list(load_tools())
        if unknown := [name for name in self.pool if name not in load_tools()]:
            raise ValueError(f"task {task.get('id')}: its pool names {unknown}, which tools.yaml does not have")
        self.task, self.seed, self.ended = task, seed, None
        self.calls, self.turns, self.plans, self.plan, self.answer = [], [], [], None, None
        self.artifacts, self.counts, self.todo, self.used = {}, {}, {}, {}
        self.virtual_s, self.turn_began, self.price_usd, self.errors = 0.0, 0.0, 0.0, 0
        lines = [task["request"]] + [self.attach(f"in_{i + 1}", given) for i, given in enumerate(task.get("inputs") or [])]
        self.messages = [{"role": "system", "content": system_text(self.rollout.tools, tuple(self.pool))},
                         {"role": "user", "content": clean("\n".join(lines)).replace("<|", "< |")}]
        self.info = {"pool": self.pool, "tools": tool_schemas(self.pool) if self.rollout.tools == "schema" else None}
        return list(self.messages), self.info

    def attach(self, media_id, given):
        """A medium that the user attached becomes an artifact; returns the line that tells the agent about it."""
        kind, fps, n = given["kind"], given.get("fps") or 24, given.get("shots") or 1
        more = {"fps": fps, "shot_frames": spread([whole(given["duration_s"], fps) * i // n for i in range(n + 1)])} if kind == "video" else {}
        more["has_audio"] = kind == "audio" or (kind == "video" and bool(given.get("has_audio")))
        more["media"] = given.get("media") or self.stand_ins(kind, media_id)[0]      # the user's own file, if the task names it
        self.artifacts[media_id] = record(**{**given, **more, "id": media_id, "tool": "user"})
        return load_defaults()["kinds"][kind]["attached"].format_map(self.artifacts[media_id])

    def draw(self, purpose):
        """A number in [0, 1) from the episode's seed and the number of the current call."""
        return draw(self.seed, len(self.calls), purpose)

    def stand_ins(self, kind, key, n=1):
        """Files of the media database for n media: neighbours, so that they differ; the same key shows the same ones."""
        files = media_files(kind)
        first = int(draw(self.seed, key, "media") * len(files)) if files else 0
        return [files[(first + i) % len(files)] if files else None for i in range(n)]

    def step(self, text):
        """One turn -> (a tool message per call, 0.0: rewards.py gives it, terminated, truncated, info). RuntimeError after the episode's end."""
        if self.ended:
            raise RuntimeError(f"the episode is over ({self.ended}); call reset first")
        turn = parse_utpc(text)
        self.messages.append({"role": "assistant", "content": clean(text)})
        self.turn_began = self.virtual_s     # the calls of one turn run side by side
        self.turns.append({"faults": turn["faults"], "order": turn["order"]})
        if turn["plan"] is not None:
            self.plans.append({"turn": len(self.turns), "plan": turn["plan"]})
            self.plan = turn["plan"] if len(self.turns) == 1 else self.plan
        replies = [{"role": "tool", "content": FORGED.sub(r"\\u003c", to_json(self.call(call)).replace("<|", "< |"))} for call in turn["calls"]]
        self.messages += replies
        if turn["answer"] is not None:
            self.ended, self.answer = "answer", turn["answer"]
        elif not turn["calls"] or self.errors >= load_defaults()["max_errors"]:
            self.ended = "malformed"
        elif len(self.turns) >= self.rollout.max_turns:
            self.ended = "max_turns"
        return (replies, 0.0, self.ended in ("answer", "malformed"), self.ended == "max_turns",
                {"turn": len(self.turns), "ended": self.ended, "faults": turn["faults"]})

    def call(self, call):
        """Run one parsed call, keep its record, and return the reply."""
        record = {"turn": len(self.turns), "name": call["name"], "arguments": call["arguments"], "status": "ok", "error": None,
                  "outputs": [], "virtual_s": 0.0, "price_usd": 0.0}
        deviates = self.rollout.fidelity < 1 and self.draw("fidelity") >= self.rollout.fidelity
        try:
            if self.errors >= load_defaults()["max_errors"]:
                refuse(None, f"{self.errors} calls of this episode failed; it ends here", "too_many_errors")
            if call["error"]:
                refuse(None, call["error"], "bad_call")
            if call["name"] not in self.pool:
                refuse("name", f"no tool {to_json(call['name']):.40} here; the tools are {', '.join(self.pool):.300}", "unknown_tool")
            reply = self.run(load_tools()[call["name"]], call["arguments"], record, deviates)
        except ToolError as error:
            self.errors += 1
            code, param, message, retryable = ("service_error", None, "internal error, try again", True) if deviates else error.args
            if code in load_defaults()["invalid"]:     # in the service's manner
                message = load_tools()[call["name"]]["provider"]["invalid"] + message
            record["status"], record["virtual_s"] = "error", record["virtual_s"] or load_defaults()["refused_s"]
            record["error"] = {"code": code, "param": param, "message": message, "retryable": retryable}
            reply = {"error": record["error"]}
            self.virtual_s = max(self.virtual_s, round(self.turn_began + record["virtual_s"], 3))
        self.calls.append(record)
        return reply

    def run(self, tool, written, record, deviates):
        """Validate, fail as services fail, make the outputs, file them. Raises ToolError."""
        check(written, tool["parameters"], "")
        a = {**tool["blank"], **written}
        parents = find_media(self.artifacts, tool, a)
        for rule in broken(tool["rules"], a):
            refuse(rule["param"], rule["message"].format_map(a), rule.get("code", "invalid_parameter"))
        if self.scale:
            self.screen(tool, a)
        outputs, more = BEHAVIOURS[tool["behaviour"]](self, tool, a)
        a["made"] = outputs
        for note in broken(tool["notes"], a):
            more.setdefault("warning", note["message"].format_map(a))
        given = [self.artifacts[parent["id"]] for parent in parents]
        start = max([self.turn_began, *[medium["made_s"] for medium in given]])   # it waits for them
        if self.scale:
            self.meter(tool, a, start)
            self.fail(tool, record)
            outputs, more = self.lose(tool, a, outputs, more)
        if deviates:
            outputs, more = deviate(outputs, more)
        record["virtual_s"] = round(bill(tool["virtual_seconds"], a, outputs, given, self.draw), 3)
        record["price_usd"] = round(bill(tool["price_usd"], a, outputs, given), 6)
        end = round(start + record["virtual_s"], 3)
        for limit in tool["limits"][:1]:
            self.used.setdefault(limit["of"], []).append((start, end, len(outputs)))
        kind, count, prefix = tool["makes"], self.counts.get(tool["makes"], 0), load_defaults()["kinds"][tool["makes"]].get("prefix")
        self.counts[kind] = count + len(outputs)
        key = f"{written['seed']} {written['prompt']}" if "seed" in written else f"{kind} {count}"
        for i, (output, file) in enumerate(zip(outputs, self.stand_ins(kind, key, len(outputs))), count + 1):
            output.update(id=f"{prefix}_{i}", tool=tool["name"], arguments=written, media=file, made_s=end, parents=parents)
            self.artifacts[output["id"]] = output
            record["outputs"].append(output["id"])
        self.virtual_s, self.price_usd = max(self.virtual_s, end), round(self.price_usd + record["price_usd"], 6)
        return describe(kind, outputs, more)

    def screen(self, tool, a):
        """Moderation of the prompt: the same prompt always gets the same verdict, right or wrong."""
        provider, words = tool["provider"], load_defaults()["blocked_words"]
        categories = provider["screens"] + [more for param, table in tool["also_screened"].items() for more in table.get(a[param], ())]
        for param in tool["screened"]:
            text = a[param] or ""
            hits = [(category, hit[0]) for category in categories if (hit := words[category].search(text))]
            if text and not hits and draw("", provider["blocked"], text) < load_defaults()["false_block"] * self.scale:
                hits = [("other", max(re.findall(r"\w+", text), key=len, default="")[:20])]
            for category, word in hits[-1:]:
                message = provider["blocked"].format(code=provider.get("codes", {}).get(category), category=category, word=word)
                refuse(param, message, "content_blocked")

    def meter(self, tool, a, start):
        """Rate limits, jobs at a time, and used-up packs, by the virtual clock. Only the last does not end by waiting."""
        for limit in tool["limits"]:
            amount = sum(end > start if "jobs" in limit else (n if "items" in limit else 1) * (began > start - limit["window_s"])
                         for began, end, n in self.used.get(limit["of"], ()))
            if amount + (int(a["n"]) if "items" in limit else 1) > (limit.get("jobs") or limit.get("calls") or limit["items"]):
                refuse(None, limit["message"], limit["code"], limit["code"] != "quota_exhausted")

    def fail(self, tool, record):
        """Failures that a retry mends, from the episode's seed and the number of the call; of several steps any may fail. A timeout takes longest."""
        timeout, both = (self.scale * len(tool["steps"]) * share for share in load_defaults()["failures"][tool["call"]])
        if both and (chance := self.draw("failure")) < both:
            step, code = tool["steps"][int(chance / both * len(tool["steps"]))], "timeout" if chance < timeout else "service_error"
            if code == "timeout":
                record["virtual_s"] = round(bill(tool["virtual_seconds"], {**tool["blank"], **record["arguments"]}, draw=lambda _: 1 - 1e-9), 3)
            refuse(None, (f"step {step}: " if step else "") + tool["provider"][code], code, True)

    def lose(self, tool, a, outputs, more):
        """Items that were filtered or not made: the rest comes with a warning; if none is left, the call has failed."""
        loss, n = tool["no_output"], len(outputs)
        talks = "asks_text" in loss and re.search(load_defaults()["asks_text"], a["prompt"], re.IGNORECASE)
        chance = loss["asks_text" if talks else "per_item"] * self.scale
        kept = [output for i, output in enumerate(outputs) if not chance or self.draw(f"item {i}") >= chance]
        message = loss["message"].format(k=len(kept), n=n, lost=n - len(kept))
        if n and not kept:
            refuse(None, message, "no_output", True)
        return kept, {**more, "warning": message} if len(kept) < n else more

    def trajectory(self):
        """The Trajectory record; `reward` is filled by rewards.py."""
        names = ("task", "messages", "calls", "plan", "plans", "answer", "ended", "seed", "turns", "virtual_s", "price_usd")
        return {**{name: copy.copy(getattr(self, name)) for name in names}, "artifacts": list(self.artifacts.values()), "reward": {}}

# ---------------------------------------------------------------------------- console, tables, speed
def studio(**rollout):
    """An episode with the media of `defaults.studio`. With its seed, the first call meets no transient failure at scale 1."""
    env = VisGenEnv(RolloutConfig(**{"failure_scale": 0, "max_turns": 10 ** 9, **rollout}))
    env.reset({"id": "studio", "request": "Make what you like.", "inputs": load_defaults()["studio"]}, seed=1)
    return env

def read_cases():
    return [json.loads(line) for line in (ROOT / "data/fidelity.jsonl").read_text(encoding="utf-8").splitlines()]

def audit():
    """C_tool of the documented (D, S, T) and of the assumed (A, M) cases: ({tool: [right, all, right, all]}, deviations in words)."""
    table, deviations = {name: [0, 0, 0, 0] for name in load_tools()}, []
    for case in read_cases():
        env, row = studio(failure_scale=case["failure_scale"]), table[case["tool"]]
        reply = env.call({"name": case["tool"], "arguments": case["arguments"], "error": None})
        ids, error = reply.get("ids", ()), reply.get("error", {})
        got = {**(env.artifacts[ids[0]] if ids else {}), **env.calls[-1], **reply, **error,
               "error": error.get("code"), "count": len(ids), "warning": "warning" in reply}
        wrong = {field: got.get(field) for field, right in case["expect"].items() if got.get(field) != right}
        column = 0 if case["mark"] in "DST" else 2
        row[column], row[column + 1] = row[column] + (not wrong), row[column + 1] + 1
        if wrong:
            deviations.append(f"{case['tool']} {to_json(case['arguments']):.90} ({case['source']}): {case['expect']}, got {wrong}")
    return table, deviations

def print_audit():
    table, deviations = audit()
    print(page("templates/audit.jinja", table={**table, "all": [sum(column) for column in zip(*table.values())]}, deviations=deviations))

def print_speed(seconds=2.0):
    """Calls per second of CPU time in the best round, alone and with the agent's text read and the replies written, six calls a turn."""
    cases = [case for case in read_cases() if not case["failure_scale"] and len(to_json(case["arguments"])) <= 300]
    for words in ("valid", "refused"):
        calls = [{"name": c["tool"], "arguments": c["arguments"], "error": None} for c in cases if ("error" in c["expect"]) == (words == "refused")]
        blocks = [f"<tool_call>{to_json({'name': call['name'], 'arguments': call['arguments']})}</tool_call>" for call in calls]
        turns = ["<think>Go.</think>" + "".join(blocks[i:i + 6]) for i in range(0, len(blocks), 6)]
        for name, given, rounds in (("call", calls, []), ("step", turns, [])):
            while sum(rounds) < seconds:
                env = studio()
                env.errors = -10 ** 9     # this is no episode: ten refusals must not end it
                act, began = getattr(env, name), time.process_time()
                list(map(act, given))
                rounds.append(time.process_time() - began)
            print(f"{len(calls) / min(rounds):8.0f} {words} calls/s by `{name}`, in the best of {len(rounds)} rounds")
        print(f"         the mix: {len(calls)} cases of data/fidelity.jsonl, of {len({call['name'] for call in calls})} tools")

def console():
    """Read `tool {"argument": ...}` from the keyboard; show the reply, the new media, the clock and the bill."""
    env = studio(failure_scale=1.0)
    print(env.messages[1]["content"], '\nType a call such as  tool_text2image_gpt {"prompt": "a fox"}  or  quit.')
    for line in filter(None, map(str.strip, sys.stdin)):
        if line == "quit" or env.ended:
            return
        name, _, arguments = line.partition(" ")
        replies, *_ = env.step(f'<think>.</think><tool_call>{{"name": {to_json(name)}, "arguments": {arguments or "{}"}}}</tool_call>')
        print(*[reply["content"] for reply in replies], sep="\n")
        for media_id in env.calls[-1]["outputs"]:
            print("   ", {k: v for k, v in env.artifacts[media_id].items() if v not in (None, [], {}) and k not in ("arguments", "tool")})
        print(f"    clock {env.virtual_s:.1f} s, bill ${env.price_usd:.3f}, failed calls {env.errors}", "(the episode is over)" * bool(env.ended))

def main():
    parser = argparse.ArgumentParser(description="A console on one episode of VisGenEnv; with a switch, a table instead.")
    for switch, show, doc in (
            ("--tools", lambda: print(page("templates/tools.jinja", tools=load_tools(), signature=tool_signature)), "the 36 tools"),
            ("--audit", print_audit, "C_tool by data/fidelity.jsonl"), ("--speed", print_speed, "tool calls per second on this core")):
        parser.add_argument(switch, dest="show", action="store_const", const=show, default=console, help=doc)
    parser.parse_args().show()

if __name__ == "__main__":
    main()
