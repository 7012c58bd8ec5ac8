"""VisGenEnv: 36 simulated tools of visual creation (Sec. 4.3.1, Table 9); no model, no network, no torch.

A tool is an entry of tools.yaml (JSON Schema, limits, sizes, prices) plus one behaviour function below, which says what media
come out, as records with exact attributes. Nothing the agent writes can raise: each call gets one reply, and a refused call's
reply says which parameter is wrong and what would be right.
"""
import copy
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path

import jinja2
import yaml

ROOT = Path(__file__).resolve().parent
ENCODER = json.JSONEncoder(ensure_ascii=False)
TAGS = ("think", "plan", "tool_call", "answer")
MAX_TAGS = 2000     # of a turn; a megabyte of tags would otherwise give as many faults and replies
MAX_NODES = 10_000  # lists and objects in one block of JSON
MAX_DEPTH = 32      # no tool's arguments nest deeper, and copying much deeper ones would exhaust Python's stack

# ---------------------------------------------------------------------------- configuration, tools
def key(default, doc):
    """A config key with its one-line explanation; lists and dicts get a fresh copy per instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})

@dataclass(frozen=True)
class RolloutConfig:
    """Section `rollout` of a config file: what the environment and the sampler are told."""
    tools: str = key("names", "how the system message lists the tools: schema, signature or names")
    tool_pool: str = key("task", "which tools the agent has: the task's pool (task) or all 36 (all)")
    max_turns: int = key(12, "turns after which an episode without an answer is cut off")
    failure_scale: float = key(1.0, "multiplies every failure rate of tools.yaml; 0 switches failures off")
    temperature: float = key(1.0, "of training rollouts, which come from the full softmax: no top-p, top-k or min-p")
    max_turn_tokens: int = key(448, "tokens after which an unfinished turn ends the episode as max_tokens")
    read_rows: int = key(32, "rows that the sampler's model reads at once when prompts and tool messages come in")
    fidelity: float = key(1.0, "C_tool of the simulator: 1 - fidelity of the calls deviate from the real service")

    def __post_init__(self):
        fine = {"tools": self.tools in ("schema", "signature", "names"), "tool_pool": self.tool_pool in ("task", "all"),
                "max_turns": self.max_turns >= 1, "fidelity": 0 <= self.fidelity <= 1, "failure_scale": self.failure_scale >= 0}
        for name in [name for name in fine if not fine[name]]:
            doc = self.__dataclass_fields__[name].metadata["doc"]
            raise ValueError(f"rollout.{name} cannot be {getattr(self, name)!r}: {doc}")

@lru_cache(maxsize=8)
def read_tools_file(path):
    sheet = yaml.load(Path(path).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    words = "|".join(re.escape(word) for word in sheet["defaults"]["blocked_words"])
    sheet["defaults"]["blocked"] = re.compile(f"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE)
    for name, tool in sheet["tools"].items():
        tool = sheet["tools"][name] = {"name": name, "media": {}, "rules": [], "screened": [], "output": {}, **tool}
        tool["provider"] = sheet["defaults"]["providers"][tool["provider"]]
        tool["defaults"] = {p: s["default"] for p, s in tool["parameters"]["properties"].items() if "default" in s}
    return sheet

def load_tools(path=ROOT / "tools.yaml"):
    """The tools of Table 9 by name, in its order. Read once and shared: do not modify."""
    return read_tools_file(str(path))["tools"]

def load_defaults(path=ROOT / "tools.yaml"):
    """What all tools share: failure rates, limits and blocked words, from the head of tools.yaml."""
    return read_tools_file(str(path))["defaults"]

def tool_schemas(names):
    """The named tools in OpenAI's form, as chat templates take them in `tools`."""
    return [{"type": "function", "function": {part: load_tools()[name][part] for part in ("name", "description", "parameters")}}
            for name in names]

def tool_signature(name):
    """One line such as `tool_text2image_gemini(prompt, aspect_ratio="1:1", n=1)`; a `?` marks an optional one."""
    required, defaults = load_tools()[name]["parameters"]["required"], load_tools()[name]["defaults"]
    optional = [p for p in load_tools()[name]["parameters"]["properties"] if p not in required]
    return f"{name}({', '.join(required + [f'{p}={to_json(defaults[p])}' if p in defaults else p + '?' for p in optional])})"

def to_json(obj):
    """The one JSON style of this project, for what the agent writes and what it reads."""
    return ENCODER.encode(obj)

@lru_cache(maxsize=256)
def template(text):
    return jinja2.Template(text)

@lru_cache(maxsize=256)
def system_text(style, pool):
    """The system message for a pool of tool names; with `schema` the chat template itself lists the tools."""
    listing = {"names": " ".join(pool), "signature": "\n" + "\n".join(map(tool_signature, pool)), "schema": ""}[style]
    return template((ROOT / "data/prompts/system.jinja").read_text(encoding="utf-8")).render(tools_text=listing, brief=style == "names").strip()

@lru_cache(maxsize=1)
def media_files():
    """Files of the media database by kind; without a database, names that one would have."""
    index, suffix = ROOT / "data/media/index.jsonl", {"image": "png", "video": "mp4", "audio": "wav"}
    rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()] if index.exists() else []
    return {kind: [row["path"] for row in rows if row["kind"] == kind] or [f"{kind}/{i:04d}.{suffix[kind]}" for i in range(100)]
            for kind in suffix}

def draw(seed, index, purpose):
    """A number in [0, 1) that depends on nothing but its arguments, in any process."""
    digest = hashlib.blake2b(f"{seed}|{index}|{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2 ** 53

# ---------------------------------------------------------------------------- validation
class ToolError(Exception):
    """A refused or failed call: code, param, message, retryable. VisGenEnv turns it into the reply's error object."""

TYPES = {"string": (str, "a string", "minLength", "maxLength", " characters"), "boolean": (bool, "true or false"),
         "array": (list, "a list", "minItems", "maxItems", " items"), "object": (dict, "an object"),
         "integer": (int, "an integer", "minimum", "maximum", ""), "number": ((int, float), "a number", "minimum", "maximum", "")}

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
    integral = kind == "integer" and isinstance(value, float) and value.is_integer()   # JSON's 8.0 is the integer 8
    if not (isinstance(value, TYPES[kind][0]) or integral) or (isinstance(value, bool) and kind != "boolean"):
        refuse(where, f"{where} must be {TYPES[kind][1]}, got {show(value)}")
    if "enum" in schema:
        if value not in schema["enum"]:
            refuse(where, f"{where} must be one of {', '.join(map(str, schema['enum']))}, got {show(value)}")
    elif kind not in ("boolean", "object"):
        _, _, lowest, highest, unit = TYPES[kind]
        low, high, size = schema.get(lowest), schema.get(highest), len(value) if unit else value
        if (low is not None and size < low) or (high is not None and size > high):
            refuse(where, f"{where} must {'have' if unit else 'be'} {bounds(low, high, unit)}, got {show(size)}")
        if kind == "string" and (value.isspace() if low else "pattern" in schema and not re.search(schema["pattern"], value)):
            refuse(where, f"{where} must be {schema.get('description', 'text')}, got {show(value)}")
        for i, item in enumerate(value if kind == "array" else ()):
            check(item, schema["items"], f"{where}[{i}]")
    elif "properties" in schema:   # names first, then required ones, then values: the order in which a reader would mend it
        prefix, properties = f"{where}." if where else "", schema["properties"]
        for name in value:
            if name not in properties:
                known = ", ".join(properties)
                refuse(f"{prefix}{name:.40}", f"unknown parameter {show(name)}; known: {known}", "unknown_parameter")
        for name in schema["required"]:
            if name not in value:
                refuse(prefix + name, f"{prefix}{name} is required", "missing_parameter")
        for name, item in value.items():
            check(item, properties[name], prefix + name)

def find_medium(artifacts, media_id, limits, where):
    """The artifact of that id, if it is of the right kind and within the service's limits for a medium."""
    kinds, found = limits["kinds"], artifacts.get(media_id)
    if found is None:
        known = ", ".join([i for i, artifact in artifacts.items() if artifact["kind"] in kinds][-12:]) or "none"
        refuse(where, f"{where}: no media {show(media_id)} in this session; known {kinds[0]} ids: {known}", "file_not_found")
    if found["kind"] not in kinds or ("has" in limits and limits["has"] not in found):
        needed = "storyboard" if "has" in limits else kinds[0]
        refuse(where, f"{where} is '{media_id}', of kind {found['kind']}; kind {needed} is needed", "wrong_kind")
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
    "start_before_end": lambda t, a, m: a["start"] < a.get("end", (m.get("video") or m["audio"])["duration_s"]),
    "end_inside": lambda t, a, m: a.get("end", 0) <= (m.get("video") or m["audio"])["duration_s"] + 1e-5,
    "transition_fits": lambda t, a, m: a["transition"] == "none" or a["transition_duration"] * 2 < min(
        clip["duration_s"] for clip in m["videos"]),
    "tail_needs_pro": lambda t, a, m: "image_tail" not in a or a["mode"] == "pro",
    "transparency": lambda t, a, m: (a["background"], a["output_format"]) != ("transparent", "jpeg"),
    "references_plus_outputs": lambda t, a, m: len(a.get("images", [])) + a["n"] <= 15,
    "shots_fit_generator": lambda t, a, m: 1 <= a["duration"] / a["n_shots"] <= t["longest_shot_s"],
    "factor_in_range": lambda t, a, m: "target_duration" not in a or .25 <= m["video"]["duration_s"] / a["target_duration"] <= 4,
    "tasks_given": lambda t, a, m: a["action"] in ("list", "clear") or "tasks" in a,
    "sides_fit": lambda t, a, m: all(t["side_px"][0] <= int(side) <= t["side_px"][1]
                                     for side in re.findall("[0-9]{2,}", a.get("size", ""))),
    "mask_fits": lambda t, a, m: "mask" not in m or (len(m["images"]) == 1 and sides(m["mask"]) == sides(m["images"][0])),
}

# ---------------------------------------------------------------------------- UTPC
TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z_ -]{0,23})>")
LOOKALIKES = {"think", "thinking", "thought", "plan", "planning", "toolcall", "toolcalls", "functioncall", "answer",
              "finalanswer", "toolresponse"}

def clean(text):
    """The text without lone surrogates, which no file and no tokenizer can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")

def unique_pairs(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return dict(pairs)

def no_constant(name):
    raise ValueError(f"{name} is not JSON")

DECODER = json.JSONDecoder(object_pairs_hook=unique_pairs, parse_constant=no_constant)

def read_json(text):
    """Strict JSON -> value. ValueError for bad JSON, duplicate keys, NaN, lone surrogates and deep nesting."""
    if text.count("[") + text.count("{") > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES} lists and objects")
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if "\\u" in text and (written := to_json(value)) != clean(written):
        raise ValueError("half of a surrogate pair in a string")
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, (dict, list))
                 for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")

def split_tags(text, fault):
    """[(tag, body, pos)] of a turn, in one pass. A tag that opens inside another one ends it, so that a lost closing tag
    costs one block and not the rest of the turn."""
    last_close = {name: text.rfind(f"</{name}>") for name in TAGS}
    blocks, opened, start, opened_at, outside = [], None, 0, 0, 0
    for match in islice(TAG.finditer(text), MAX_TAGS):
        pos, closing, name = match.start(), match[1], match[2]
        if name not in TAGS and (opened or re.sub("[_ -]", "", name.lower()) not in LOOKALIKES):
            continue
        if not opened and text[outside:pos].strip():
            fault("text_outside_tags", outside, "text outside the four tags")
        outside = match.end()
        if opened and (name == opened or not closing):
            blocks.append((opened, text[start:pos], opened_at))
        if name not in TAGS:
            fault("unknown_tag", pos, f"<{name}> is none of <think>, <plan>, <tool_call>, <answer>")
        elif closing and name != opened:
            fault("stray_close", pos, f"</{name}> closes nothing")
        elif closing:
            opened = None
        else:
            if opened:
                nested = opened != name and last_close[opened] > pos
                fault(*(("nested_tag", pos) if nested else ("unclosed_tag", opened_at)), f"<{name}> opens inside <{opened}>")
            opened, start, opened_at = name, match.end(), pos
    if opened:
        blocks.append((opened, text[start:], opened_at))
        fault("unclosed_tag", opened_at, f"<{opened}> is not closed")
    elif text[outside:].strip():
        fault("text_outside_tags", outside, "text outside the four tags")
    return blocks

def parse_utpc(text):
    """What a turn says, and what is wrong with it (Sec. 3.1). Never raises; linear in len(text). Tags beyond MAX_TAGS are text.

    Returns {think [str], plan list|None, calls [{name, arguments, error, pos}], answer dict|None, order [tag], faults [{code,
    pos, message}]}. A call that cannot be read stays in `calls` with its error, because every call gets one reply. That a
    first turn lacks its plan is for the reader to see: the parser does not know the turn.
    """
    text = clean(text)
    found = {"think": [], "plan": None, "calls": [], "answer": None, "order": [], "faults": []}
    order = found["order"]

    def fault(code, pos, message):
        found["faults"].append({"code": code, "pos": pos, "message": f"{message:.160}"})

    for tag, body, pos in split_tags(text, fault):
        if (tag == "think") == bool(order) and "think" not in order:
            fault("wrong_order", pos, "a turn begins with <think>")
        elif (tag in ("plan", "answer") and found["calls"]) or (tag == "tool_call" and "answer" in order):
            fault("wrong_order", pos, "the plan comes before the calls, and an answer without any")
        if tag in order and tag != "tool_call":
            fault("duplicate_tag", pos, f"a second <{tag}> in one turn")
        value, error = None, f"<{tag}> is empty"
        if not body.strip():
            fault("empty_tag", pos, error)
        elif tag != "think":
            try:
                value = read_json(body)
                check(value, load_defaults()["utpc"][tag], tag)
                error = None
            except (ValueError, ToolError) as wrong:
                unread = isinstance(wrong, ValueError)
                error = f"the {tag} is not valid JSON: {wrong}" if unread else wrong.args[2]
                fault("bad_json" if unread else f"bad_{tag.removeprefix('tool_')}", pos, error)
        if tag == "think":
            found["think"].append(body.strip())
        elif tag == "tool_call":
            read = {"name": None, "arguments": None} if error else value
            found["calls"].append({**read, "error": error, "pos": pos})
        elif not error and tag not in order:
            found[tag] = value
        order.append(tag)
    if not order:
        fault("wrong_order", 0, "a turn begins with <think>")
    return found

# ---------------------------------------------------------------------------- media records and their arithmetic
BLANK = {"id": None, "kind": None, "width": None, "height": None, "duration_s": None, "fps": None, "n_frames": None,
         "has_audio": False, "shots": None, "parents": [], "tool": None, "arguments": {}, "media": None}

def record(kind, **fields):
    """A new artifact; every field of the Artifact record exists in every artifact."""
    return {**BLANK, "kind": kind, **fields}

def sides(artifact):
    return artifact["width"], artifact["height"]

def video(width, height, shot_frames, fps, has_audio, **more):
    """A video is the list of its shots' lengths in frames; everything about time follows from it."""
    n_frames = sum(shot_frames)
    return record("video", width=width, height=height, duration_s=round(n_frames / fps, 6), fps=fps, n_frames=n_frames,
                  has_audio=has_audio, shots=len(shot_frames), shot_frames=shot_frames, **more)

def recut(clip, shot_frames, **changes):
    """A video like `clip` with other shots."""
    names = ("width", "height", "fps", "has_audio", "n_cues", "speech_s")
    return video(**{**{name: clip[name] for name in names if name in clip}, **changes, "shot_frames": shot_frames})

def audio(duration_s, **more):
    return record("audio", duration_s=round(float(duration_s), 3), has_audio=True, **more)

def exact(number):
    """The decimal that was written, as a fraction: 0.1 is 1/10 here."""
    return Fraction(number) if isinstance(number, int) else Fraction(str(number))

def whole(frames):
    """Whole frames, as a writer counts them; the margin absorbs that durations are shown with six decimals."""
    return int(frames + Fraction(1, 2000))

def stretch(shot_frames, n_frames):
    """The same cuts on another number of frames; shots that vanish are dropped."""
    total = sum(shot_frames)
    marks = [0] + [done * n_frames // total for done in accumulate(shot_frames)]
    return [b - a for a, b in zip(marks, marks[1:]) if b > a]

def join(clips, overlap, fps):
    """Shots of clips played after each other, each pair sharing `overlap` seconds (a crossfade)."""
    starts, clock = [], Fraction(0)
    for clip in clips:
        while starts and starts[-1] >= clock:
            starts.pop()   # a shot that is over before the crossfade ends is no cut of its own
        moment = clock
        for frames in clip["shot_frames"]:
            starts.append(moment)
            moment += frames / exact(clip["fps"])
        clock = moment - overlap
    marks = [whole(start * fps) for start in starts] + [whole((clock + overlap) * fps)]
    return [b - a for a, b in zip(marks, marks[1:]) if b > a]

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
    return [record("image", width=width, height=height) for _ in range(int(args.get("n", 1)))], note

def make_video(env, tool, args, media):
    """Veo: pixels by resolution and aspect ratio. Kling: pixels by the image's aspect and the mode; silent."""
    table, first, note = tool["output"], media.get("image"), {}
    if "area" in table:
        width, height = keep_aspect(first, table["area"][args["mode"]], table["multiple_of"])
    else:
        sizes = table["sizes"][args["resolution"]]
        width, height = sizes[args.get("aspect_ratio") or nearest_ratio(sizes, *sides(first))]
        if first and abs(math.log(first["width"] * height / (first["height"] * width))) > 0.05:   # under 5 % nobody sees it
            note = {"warning": f"image {first['width']}x{first['height']} was cropped to {width}x{height}"}
    clip = video(width, height, [int(args["duration"]) * table["fps"]], table["fps"], args.get("generate_audio", False), **note)
    return [dict(clip) for _ in range(int(args.get("n", 1)))], note

def pipeline(env, tool, args, media):
    """Script, clips, music, narration and the cut in one call: shots of equal length, no references."""
    width, height = tool["output"]["sizes"]["720p"][args["aspect_ratio"]]
    shots = stretch([1] * int(args["n_shots"]), whole(exact(args["duration"]) * tool["output"]["fps"]))
    return [video(width, height, shots, tool["output"]["fps"], args["with_music"] or args["with_narration"])], {}

def music(env, tool, args, media):
    """Two songs; nobody can set their length. Tempo and first beat are for tool_beat_detect to find."""
    (shortest, longest), (slow, fast) = tool["output"]["duration_s"], tool["output"]["bpm"]
    return [audio(round(shortest + (longest - shortest) * env.draw(f"length {i}"), 1),
                  bpm=round(slow + (fast - slow) * env.draw(f"bpm {i}")), beat_offset_s=round(env.draw(f"offset {i}") / 2, 2))
            for i in range(tool["output"]["songs"])], {}

def sound(env, tool, args, media):
    """Speech lasts as long as its text, an effect as long as its video or as asked."""
    seconds = media["video"]["duration_s"] if media else args.get("duration")
    return [audio(seconds or speech_seconds(tool["output"], args, args["text"]))], {}

def tts_composite(env, tool, args, media):
    """Speech over a video that keeps its own duration; speech that does not fit is refused with both numbers."""
    segments = args.get("segments") or [{"start": 0, "text": args["text"]}]
    spoken = [(s["start"], s["start"] + speech_seconds(tool["output"], args, s["text"])) for s in segments]
    check_intervals(spoken, media["video"], "segments" if "segments" in args else "text", "; shorten the text or raise speed")
    speech = {"speech_s": round(spoken[-1][1], 2)}
    return [recut(media["video"], media["video"]["shot_frames"], has_audio=True, **speech)], speech

def composite(env, tool, args, media):
    """Clips in order; a crossfade of c s shortens by c (n - 1); size and fps are the largest of the clips."""
    clips, sound = media["videos"], media.get("audio")
    overlap = exact(args["transition_duration"]) if args["transition"] == "crossfade" else 0
    width, height, fps = (max(clip[name] for clip in clips) for name in ("width", "height", "fps"))
    fps = args.get("fps", fps)
    kept = any(clip["has_audio"] for clip in clips) and not (sound and args["audio_mode"] == "replace")
    film = video(width, height, join(clips, overlap, exact(fps)), fps, bool(sound or kept))
    if sound and sound["duration_s"] < film["duration_s"] - 0.05:
        film["warning"] = f"the audio ends at {sound['duration_s']} s; silence until {film['duration_s']} s"
    elif len({(clip["width"], clip["height"]) for clip in clips}) > 1:
        film["warning"] = f"clips of other sizes stand on black in {width}x{height}"
    return [film], {"warning": film["warning"]} if "warning" in film else {}

def postprocess(env, tool, args, media):
    """Operations in order: only resize, crop and rotate change the size, only loop the duration."""
    clip = media["video"]
    width, height, shots = clip["width"], clip["height"], clip["shot_frames"]
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
        elif op in ("reverse", "loop"):
            shots = shots[::-1] if op == "reverse" else shots * int(step["count"])
        if sum(shots) > 10 ** 6:
            refuse(where, f"{where}: the video would exceed 1000000 frames")
    return [recut(clip, shots, width=width, height=height)], {}

def trim(env, tool, args, media):
    clip, fps = media["video"], exact(media["video"]["fps"])
    start, end = exact(args["start"]) * fps, min(exact(args["end"]) * fps, clip["n_frames"])
    n_frames = whole(end - start)
    if n_frames < 1:
        refuse("end", f"start..end must span at least one frame ({1 / clip['fps']:.4f} s)")
    first = min(whole(start), clip["n_frames"] - n_frames)
    kept = [min(done, first + n_frames) - max(done - frames, first)
            for frames, done in zip(clip["shot_frames"], accumulate(clip["shot_frames"]))]
    return [recut(clip, [frames for frames in kept if frames > 0])], {}

def speed(env, tool, args, media):
    """Duration / factor in whole frames; the sound is sped up too."""
    clip = media["video"]
    n_frames = exact(args["target_duration"]) * exact(clip["fps"]) if "factor" not in args else \
        clip["n_frames"] / exact(args["factor"])
    return [recut(clip, stretch(clip["shot_frames"], max(1, whole(n_frames))))], {}

def audio_cut(env, tool, args, media):
    source, more = media["audio"], {}
    if source.get("bpm"):
        offset = (source.get("beat_offset_s", 0.0) - args["start"]) % (60 / source["bpm"])
        more = {"bpm": source["bpm"], "beat_offset_s": round(offset, 3)}
    seconds = args.get("loop_to", min(args.get("end", math.inf), source["duration_s"]) - args["start"])
    if args["fade_in"] + args["fade_out"] > seconds + 1e-6:
        refuse("fade_out", f"fade_in + fade_out is longer than the audio ({seconds:g} s)")
    return [audio(max(seconds, 0.001), **more)], {}

def beats(env, tool, args, media):
    """Beat i lies at offset + 60 i / bpm; speech, effects and audio under 2 s have none."""
    source = media["audio"]
    if source["duration_s"] < 2 or not source.get("bpm"):
        return [record("data", tempo=0.0, beat_times=[])], {"tempo": 0.0, "n_beats": 0, "warning": "no beats found"}
    tempo, offset, beat = float(source["bpm"]), source.get("beat_offset_s", 0.0), 60 / source["bpm"]
    times = [round(offset + i * beat, 3) for i in range(math.ceil((source["duration_s"] - offset) / beat - 1e-9))]
    return [record("data", tempo=tempo, beat_times=times)], {"tempo": tempo, "n_beats": len(times), "first_beats": times[:4]}

def subtitles(env, tool, args, media):
    check_intervals([(cue["start"], cue["end"]) for cue in args["subtitles"]], media["video"], "subtitles")
    n_cues = media["video"].get("n_cues", 0) + len(args["subtitles"])
    return [recut(media["video"], media["video"]["shot_frames"], n_cues=n_cues)], {}

def write_text(env, tool, args, media):
    """A text from the tool's template in tools.yaml: a refined prompt, a script, a summary, search results."""
    written = template(tool["output"]["template"]).render({**args, **media}).strip()
    return [record("text", text=written, n_chars=len(written))], {}

def storyboard(env, tool, args, media):
    """Shots whose durations sum to the total, on a grid of 0.1 s; a shot over 10 s is flagged."""
    source = media.get("script", BLANK)
    given = {"duration": None, **load_tools().get(source["tool"], {"defaults": {}})["defaults"], **source["arguments"]}
    total = args.get("total_duration") or given["duration"]
    n_shots = int(args.get("n_shots") or given.get("n_scenes") or math.ceil((total or 32) / 8))
    total = total or 8 * n_shots
    marks = [round(total * i / n_shots, 1) for i in range(n_shots)] + [total]
    subject = " ".join(source.get("text", args["script"])[:200].split()[:8])
    return storyboard_of([{"index": i + 1, "duration": round(marks[i + 1] - marks[i], 6), "description":
                           f"{tool['output']['views'][i % 4]}, {subject}"[:80]} for i in range(n_shots)])

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
    subtitles, write_text, storyboard, polish, analysis, inspire, todo, html)}

# ---------------------------------------------------------------------------- price, time, replies
FORGED = re.compile(r"<(?=/?(?:think|plan|tool_call|tool_response|answer)\b)")
PREFIX = {"image": "img", "video": "vid", "audio": "aud", "text": "txt", "html": "html", "data": "data"}

def price(tool, args, outputs):
    """US dollars of a successful call, for what was returned."""
    rates = tool["price_usd"]
    rate = {name: value[args[rates["by"]]] if isinstance(value, dict) else value for name, value in rates.items()}
    if "not_square" in rate and outputs and outputs[0]["width"] != outputs[0]["height"]:
        rate["per_item"] *= rate["not_square"]
    if "per_second_silent" in rate and outputs and not outputs[0]["has_audio"]:
        rate["per_second"] = rate["per_second_silent"]
    return (rate.get("per_call", 0) + rate.get("per_item", 0) * len(outputs)
            + rate.get("per_second", 0) * sum(output["duration_s"] or 0 for output in outputs))

def virtual_seconds(tool, outputs, chance):
    """How long the real call would take: a draw whose median is the typical time, or a sum by the size of what was made."""
    times = tool["virtual_seconds"]
    if "typical" in times:
        low, high = (times["min"], times["typical"]) if chance < 0.5 else (times["typical"], times["max"])
        return low + (high - low) * (2 * chance % 1)
    return (times["base"] + times.get("per_output_second", 0) * sum(output["duration_s"] or 0 for output in outputs)
            + times.get("per_char", 0) * sum(output.get("n_chars", 0) for output in outputs))

def disarm(text):
    """Text from outside cannot open or close a chat turn."""
    return text.replace("<|", "< |") if "<|" in text else text

def reply_text(reply):
    """A reply as JSON in which neither control tokens nor the four tags survive."""
    body = to_json(reply)
    return FORGED.sub(r"\\u003c", disarm(body)) if "<" in body else body

def describe(outputs, more, limit):
    """The reply's fields: ids, then attributes; one value if all outputs share it, else a list."""
    columns = {"size": [o["width"] and f"{o['width']}x{o['height']}" for o in outputs],
               "duration_s": [o["duration_s"] for o in outputs],
               "sound": [o["has_audio"] for o in outputs if o["kind"] == "video"],
               "text": [o["text"][:limit] + "..." * (len(o["text"]) > limit) for o in outputs if o["kind"] == "text"]}
    shown = {name: values[0] if values.count(values[0]) == len(values) else values
             for name, values in columns.items() if values and values[0] is not None}
    return {**({"ids": [output["id"] for output in outputs]} if outputs else {}), **shown, **more}

def deviate(outputs):
    """What an unfaithful simulator returns (fidelity < 1): a missing item, a wrong size or duration, or else a failure."""
    if not outputs or outputs[0]["kind"] not in ("image", "video", "audio"):
        refuse(None, "internal error, try again", "service_error", True)
    if len(outputs) > 1:
        return outputs[:-1]
    return [recut(o, stretch(o["shot_frames"], max(1, o["n_frames"] * 4 // 5))) if o["kind"] == "video" else
            {**o, "duration_s": round(o["duration_s"] * 0.8, 3)} if o["kind"] == "audio" else
            {**o, "width": o["width"] // 2, "height": o["height"] // 2} for o in outputs]

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
        self.artifacts, self.counts, self.todo = {}, {}, {}
        self.virtual_s, self.price_usd, self.errors = 0.0, 0.0, 0
        lines = [task["request"]] + [self.attach(f"in_{i + 1}", given) for i, given in enumerate(task.get("inputs") or [])]
        self.messages = [{"role": "system", "content": system_text(self.rollout.tools, tuple(self.pool))},
                         {"role": "user", "content": disarm(clean("\n".join(lines)))}]
        self.info = {"pool": self.pool, "tools": tool_schemas(self.pool) if self.rollout.tools == "schema" else None}
        return list(self.messages), self.info

    def attach(self, media_id, given):
        """A medium that the user attached becomes an artifact; returns the line that tells the agent about it."""
        kind, made = given["kind"], record(**{**given, "has_audio": given["kind"] == "audio"})
        if kind == "video":
            frames = whole(exact(given["duration_s"]) * exact(given.get("fps") or 24))
            made = video(*sides(given), stretch([1] * (given.get("shots") or 1), frames), given.get("fps") or 24,
                         bool(given.get("has_audio")))
        self.artifacts[media_id] = {**made, "id": media_id, "tool": "user", "media": self.stand_in(kind, media_id)}
        size = f" {made['width']}x{made['height']}" if kind in ("image", "video") else ""
        seconds = f" {made['duration_s']:.1f} s" if kind in ("audio", "video") else ""
        return f"[{media_id}: {kind}{size}{seconds}]" + (f" {made['text']}" if kind == "text" else "")

    def draw(self, purpose):
        """A number in [0, 1) from the episode's seed and the number of the current call."""
        return draw(self.seed, len(self.calls), purpose)

    def stand_in(self, kind, media_id):
        files = media_files().get(kind)
        return files[int(draw(self.seed, media_id, "media") * len(files))] if files else None

    def step(self, text):
        """One turn of the agent -> (tool messages, one per call in order, 0.0, terminated, truncated, info). The reward is
        LtrReward's business, on the finished record. RuntimeError after the episode's end."""
        if self.ended:
            raise RuntimeError(f"the episode is over ({self.ended}); call reset first")
        turn = parse_utpc(text)
        self.messages.append({"role": "assistant", "content": clean(text)})
        self.turns.append({"faults": turn["faults"], "order": turn["order"]})
        if turn["plan"] is not None:
            self.plans.append({"turn": len(self.turns), "plan": turn["plan"]})
            self.plan = turn["plan"] if len(self.turns) == 1 else self.plan
        replies = [{"role": "tool", "content": reply_text(self.call(call))} for call in turn["calls"]]
        self.messages += replies
        if turn["answer"] is not None:
            self.ended, self.answer = "answer", turn["answer"]
        elif not turn["calls"] or self.errors >= load_defaults()["max_errors"]:
            self.ended = "malformed"
        elif len(self.turns) >= self.rollout.max_turns:
            self.ended = "max_turns"
        return (replies, 0.0, self.ended in ("answer", "malformed"), self.ended == "max_turns",
                {"turn": len(self.turns), "ended": self.ended, "faults": turn["faults"]})

    def stop(self, ended):
        """End an episode from outside, such as by the sampler's `max_tokens`."""
        self.ended = self.ended or ended

    def call(self, call):
        """Run one parsed call, keep its record, and return the reply."""
        record = {"turn": len(self.turns), "name": call["name"], "arguments": call["arguments"], "status": "ok", "error": None,
                  "outputs": [], "virtual_s": 0.0, "price_usd": 0.0}
        try:
            if self.errors >= load_defaults()["max_errors"]:
                refuse(None, f"{self.errors} calls of this episode failed; it ends here", "too_many_errors")
            if call["error"]:
                refuse(None, call["error"][:160], "bad_call")
            if call["name"] not in self.pool:
                names = ", ".join(self.pool[:10]) + f" and {len(self.pool) - 10} more" * (len(self.pool) > 10)
                refuse("name", f"no tool {show(call['name'])} here; the tools are {names}", "unknown_tool")
            reply = self.run(load_tools()[call["name"]], call["arguments"], record)
        except ToolError as error:
            self.errors += 1
            record["status"], record["virtual_s"] = "error", record["virtual_s"] or load_defaults()["refused_s"]
            record["error"] = dict(zip(("code", "param", "message", "retryable"), error.args))
            reply = {"error": record["error"]}
        self.calls.append(record)
        self.virtual_s = round(self.virtual_s + record["virtual_s"], 3)
        self.price_usd = round(self.price_usd + record["price_usd"], 6)
        return reply

    def run(self, tool, written, record):
        """Validate, fail as services fail, make the outputs, file them. Raises ToolError."""
        args = {**tool["defaults"], **written}
        try:
            check(written, tool["parameters"], "")
            media, parents = find_media(self.artifacts, tool, args)
            for rule in tool["rules"]:
                if not RULES[rule["rule"]](tool, args, media):
                    refuse(rule["param"], rule["message"].format(**{**args, **media}), rule.get("code", "invalid_parameter"))
            for param in tool["screened"] if self.scale else []:   # the same prompt always gives the same verdict
                if hit := load_defaults()["blocked"].search(args.get(param) or ""):
                    refuse(param, tool["provider"]["blocked"].format(word=hit[0]), "content_blocked")
            outputs, more = BEHAVIOURS[tool["behaviour"]](self, tool, args, media)
        except ToolError as error:
            code, param, message, _ = error.args
            refuse(param, message if code == "content_blocked" else tool["provider"]["invalid"] + message, code)
        self.fail(tool, record)
        if self.rollout.fidelity < 1 and self.draw("fidelity") >= self.rollout.fidelity:
            outputs = deviate(outputs)
        for output in outputs:
            kind = output["kind"]
            self.counts[kind] = self.counts.get(kind, 0) + 1
            output["id"] = f"{PREFIX[kind]}_{self.counts[kind]}"
            output["tool"], output["arguments"], output["media"] = tool["name"], written, self.stand_in(kind, output["id"])
            output["parents"] = output["parents"] or parents
            self.artifacts[output["id"]] = output
        record["outputs"] = [output["id"] for output in outputs]
        record["price_usd"] = round(price(tool, args, outputs), 6)
        record["virtual_s"] = round(virtual_seconds(tool, outputs, self.draw("latency")), 3)
        return describe(outputs, more, load_defaults()["reply_chars"])

    def fail(self, tool, record):
        """Failures that a retry mends, from the episode's seed and the number of the call."""
        timeout, transient = (load_defaults()[kind][tool["call"]] * self.scale for kind in ("timeout", "transient"))
        chance = self.draw("failure") if transient else 1.0
        if chance < timeout:
            record["virtual_s"] = tool["virtual_seconds"].get("max", 60)
            refuse(None, tool["provider"]["timeout"], "timeout", True)
        if chance < timeout + transient:
            refuse(None, tool["provider"]["transient"], "service_error", True)

    def trajectory(self):
        """The Trajectory record; `reward` is filled by rewards.py."""
        names = ("task", "messages", "calls", "plan", "plans", "answer", "ended", "seed", "turns", "virtual_s", "price_usd")
        state = {name: copy.copy(getattr(self, name)) for name in names}
        return {**state, "artifacts": list(self.artifacts.values()), "reward": {}}
