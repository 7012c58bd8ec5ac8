"""VisGenEnv: 36 simulated tools of visual creation (Sec. 4.3.1, Table 9).

Text in the UTPC format goes in, tool results come out; no model, no GPU, no network, no torch. A tool is an
entry of tools.yaml (its JSON Schema, limits, sizes, prices) plus one behaviour function below, which says what
media come out. Media are records with exact attributes: whole frames, rational time. Nothing the agent writes
can raise: each call gets one reply, and a refused call's reply says which parameter is wrong and what would be right.

Reading order: configuration and tools, the UTPC parser, validation, rules, behaviours, VisGenEnv.
"""
import copy
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import jinja2
import yaml

ROOT = Path(__file__).resolve().parent
TAGS = ("think", "plan", "tool_call", "answer")
ENDINGS = ("answer", "max_turns", "max_tokens", "malformed")
MAX_FAULTS = 100  # a turn of a megabyte of tags would otherwise hold as many faults
MAX_DEPTH = 32    # deeper JSON cannot be a tool's arguments, and copying it would exhaust the stack


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
        for name, allowed in (("tools", ("schema", "signature", "names")), ("tool_pool", ("task", "all"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"rollout.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.max_turns < 1:
            raise ValueError(f"rollout.max_turns is {self.max_turns}; it must be at least 1")
        if not 0 <= self.fidelity <= 1:
            raise ValueError(f"rollout.fidelity is {self.fidelity}; it must lie in 0..1")
        if not 0 <= self.failure_scale:
            raise ValueError(f"rollout.failure_scale is {self.failure_scale}; it must not be negative")


@lru_cache(maxsize=8)
def read_tools_file(path):
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sheet = yaml.load(Path(path).read_text(encoding="utf-8"), loader)
    for name, tool in sheet["tools"].items():
        properties = tool["parameters"]["properties"]
        tool["name"] = name
        tool["defaults"] = {param: schema["default"] for param, schema in properties.items() if "default" in schema}
        tool["provider"] = sheet["defaults"]["providers"][tool["provider"]]
        for missing in ("media", "output"):
            tool.setdefault(missing, {})
        for missing in ("rules", "screened"):
            tool.setdefault(missing, [])
    return sheet


def load_tools(path=ROOT / "tools.yaml"):
    """The tools of Table 9 by name, in its order. Read once and shared: do not modify."""
    return read_tools_file(str(path))["tools"]


@lru_cache(maxsize=8)
def load_defaults(path=ROOT / "tools.yaml"):
    """Failure rates, limits and blocked words that all tools share, from the head of tools.yaml."""
    defaults = dict(read_tools_file(str(path))["defaults"])
    words = "|".join(re.escape(word) for word in defaults["blocked_words"])
    defaults["blocked"] = re.compile(f"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE)
    return defaults


def tool_schemas(names):
    """The named tools in OpenAI's form, as chat templates take them in `tools`."""
    tools = load_tools()
    return [{"type": "function", "function": {"name": name, "description": tools[name]["description"],
                                              "parameters": tools[name]["parameters"]}} for name in names]


def tool_signature(name):
    """One line such as `tool_text2image_gemini(prompt, aspect_ratio="1:1", n=1)`; a `?` marks an optional one."""
    tool = load_tools()[name]
    required = tool["parameters"]["required"]
    parts = list(required)
    for param in tool["parameters"]["properties"]:
        if param not in required:
            parts.append(f"{param}={to_json(tool['defaults'][param])}" if param in tool["defaults"] else f"{param}?")
    return f"{name}({', '.join(parts)})"


def to_json(obj):
    """The one JSON style of this project, for what the agent writes and what it reads."""
    return json.dumps(obj, ensure_ascii=False)


@lru_cache(maxsize=256)
def system_text(style, pool):
    """The system message for a pool of tool names; with `schema` the chat template itself lists the tools."""
    listing = {"names": " ".join, "signature": lambda names: "\n" + "\n".join(map(tool_signature, names)),
               "schema": lambda names: ""}[style](pool)
    template = (ROOT / "data" / "prompts" / "system.jinja").read_text(encoding="utf-8")
    return jinja2.Template(template, undefined=jinja2.StrictUndefined).render(tools_text=listing, brief=style == "names").strip()


@lru_cache(maxsize=1)
def stand_ins():
    """Files of the media database by kind; without a database, names that one would have."""
    index = ROOT / "data" / "media" / "index.jsonl"
    files = {"image": [], "video": [], "audio": []}
    if index.exists():
        for line in index.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            files[row["kind"]].append(row["path"])
    suffix = {"image": "png", "video": "mp4", "audio": "wav"}
    return {kind: paths or [f"{kind}/{i:04d}.{suffix[kind]}" for i in range(100)] for kind, paths in files.items()}


def draw(seed, index, purpose):
    """A number in [0, 1) that depends on nothing but its arguments, in any process."""
    digest = hashlib.blake2b(f"{seed}|{index}|{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2 ** 53


# ---------------------------------------------------------------------------- UTPC

TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z_ -]{0,23})>")
LOOKALIKES = {"thinking", "thought", "thoughts", "planning", "plans", "toolcalls", "tool", "call", "functioncall",
              "answers", "finalanswer", "toolresponse", "toolresult", "think", "plan", "toolcall", "answer"}


def clean(text):
    """The text without lone surrogates, which no file and no tokenizer can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def unique_pairs(pairs):
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r:.60}")
    return table


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


def read_json(text):
    """Strict JSON -> (value, None) or (None, what is wrong). Duplicate keys, NaN and deep nesting are refused."""
    try:
        value = json.loads(text, object_pairs_hook=unique_pairs, parse_constant=no_constant)
    except RecursionError:
        return None, f"nested deeper than {MAX_DEPTH} levels"
    except ValueError as error:
        return None, str(error)
    if "\\ud" in text or "\\uD" in text:
        if to_json(value) != clean(to_json(value)):
            return None, "half of a surrogate pair in a string"
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, (dict, list))
                 for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return value, None
    return None, f"nested deeper than {MAX_DEPTH} levels"


def plan_fault(plan):
    """None, or what keeps a JSON value from being a plan: a non-empty list of {id, tool, goal, after}."""
    if not isinstance(plan, list) or not plan:
        return "a plan is a non-empty JSON list of steps"
    for i, step in enumerate(plan):
        if not isinstance(step, dict) or set(step) != {"id", "tool", "goal", "after"}:
            return f"step {i + 1} must have exactly the keys id, tool, goal, after"
        if type(step["id"]) is not int or not isinstance(step["tool"], str) or not isinstance(step["goal"], str):
            return f"step {i + 1}: id is an integer, tool and goal are strings"
        if not isinstance(step["after"], list) or any(type(other) is not int for other in step["after"]):
            return f"step {i + 1}: after is a list of step ids"
    return None


def answer_fault(answer):
    """None, or what keeps a JSON value from being an answer."""
    if not isinstance(answer, dict) or set(answer) != {"deliverables", "summary"}:
        return "an answer has exactly the keys deliverables and summary"
    if not isinstance(answer["deliverables"], list) or any(not isinstance(i, str) for i in answer["deliverables"]):
        return "deliverables is a list of ids"
    return None if isinstance(answer["summary"], str) else "summary is a string"


def read_call(body, pos):
    """One tool call -> ({name, arguments, error, pos}, fault code or None)."""
    value, wrong = read_json(body)
    call = {"name": None, "arguments": None, "error": None, "pos": pos}
    if wrong:
        call["error"] = f"the call is not valid JSON: {wrong:.100}"
        return call, "bad_json"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        call["error"] = 'a call is an object {"name": "...", "arguments": {...}}'
        return call, "bad_call"
    call["name"] = value["name"]
    if not isinstance(value.get("arguments"), dict):
        call["error"] = "arguments must be a JSON object"
        return call, "bad_call"
    call["arguments"] = value["arguments"]
    return call, None if len(value) == 2 else "bad_call"


def split_tags(text, fault):
    """[(tag, body, pos)] of a turn. A tag that opens inside another one ends it, so that a lost closing tag costs
    one block and not the rest of the turn. One pass: linear in the text."""
    marks = [match for match in TAG.finditer(text)]
    closes_left, blocks, swallowed = {}, [], {}
    for match in marks:
        if match[1]:
            closes_left[match[2]] = closes_left.get(match[2], 0) + 1
    opened, body_start, opened_at, outside = None, 0, 0, 0
    for match in marks:
        closing, name = bool(match[1]), match[2]
        if name not in TAGS:
            if re.sub("[_ -]", "", name.lower()) in LOOKALIKES and opened is None:
                fault("unknown_tag", match.start(), f"<{name}> is none of <think>, <plan>, <tool_call>, <answer>")
                if not text[outside:match.start()].isspace() and outside < match.start():
                    fault("text_outside_tags", outside, "text outside the four tags")
                outside = match.end()
            continue
        if closing:
            closes_left[name] -= 1
            if opened == name:
                blocks.append((name, text[body_start:match.start()], opened_at))
                opened, outside = None, match.end()
            elif swallowed.get(name):
                swallowed[name] -= 1
                outside = match.end() if opened is None else outside
            else:
                fault("stray_close", match.start(), f"</{name}> closes nothing")
                outside = match.end() if opened is None else outside
            continue
        if opened is None:
            if outside < match.start() and not text[outside:match.start()].isspace():
                fault("text_outside_tags", outside, "text outside the four tags")
        else:
            blocks.append((opened, text[body_start:match.start()], opened_at))
            if opened != name and closes_left.get(opened, 0) > swallowed.get(opened, 0):
                swallowed[opened] = swallowed.get(opened, 0) + 1
                fault("nested_tag", match.start(), f"<{name}> inside <{opened}>")
            else:
                fault("unclosed_tag", opened_at, f"<{opened}> is not closed before <{name}>")
        opened, body_start, opened_at = name, match.end(), match.start()
    if opened is not None:
        blocks.append((opened, text[body_start:], opened_at))
        fault("unclosed_tag", opened_at, f"<{opened}> is not closed")
    elif outside < len(text) and not text[outside:].isspace():
        fault("text_outside_tags", outside, "text outside the four tags")
    return blocks


def parse_utpc(text):
    """What a turn says, and what is wrong with it (Sec. 3.1). Never raises; linear in len(text).

    Returns {think [str], plan list|None, calls [{name, arguments, error, pos}], answer dict|None, order [tag],
    faults [{code, pos, message}]}. A call that cannot be read stays in `calls` with its error, because every
    call gets one reply. At most MAX_FAULTS faults are listed. Whether a first turn lacks its plan is the
    reader's business: the parser does not know the turn.
    """
    text = clean(text)
    found = {"think": [], "plan": None, "calls": [], "answer": None, "order": [], "faults": []}

    def fault(code, pos, message):
        if len(found["faults"]) < MAX_FAULTS:
            found["faults"].append({"code": code, "pos": pos, "message": message})

    seen = {}
    for tag, body, pos in split_tags(text, fault):
        if not found["order"] and tag != "think":
            fault("wrong_order", pos, "a turn begins with <think>")
        if tag in seen and tag != "tool_call":
            fault("duplicate_tag", pos, f"a second <{tag}> in one turn")
        if tag == "think" and "think" not in seen and found["order"]:
            fault("wrong_order", pos, "<think> comes first")
        if tag == "plan" and "tool_call" in seen:
            fault("wrong_order", pos, "<plan> comes before the calls")
        found["order"].append(tag)
        first = seen.setdefault(tag, pos) == pos
        empty = not body or body.isspace()
        if empty:
            fault("empty_tag", pos, f"<{tag}> is empty")
        if tag == "think":
            found["think"].append(body.strip())
        elif tag == "tool_call":
            call, code = read_call(body, pos)
            found["calls"].append(call)
            if code and not empty:
                fault(code, pos, call["error"] or "a call has no keys but name and arguments")
        elif not empty:
            value, wrong = read_json(body)
            code = "bad_json" if wrong else f"bad_{tag}"
            wrong = wrong or (plan_fault(value) if tag == "plan" else answer_fault(value))
            if wrong:
                fault(code, pos, f"{wrong:.150}")
            elif first:
                found[tag] = value
    if "answer" in seen and "tool_call" in seen:
        fault("wrong_order", seen["answer"], "a turn with an answer makes no calls")
    if not seen:
        fault("wrong_order", 0, "a turn begins with <think>")
    return found


# ---------------------------------------------------------------------------- validation

class ToolError(Exception):
    """A refused or failed call; VisGenEnv turns it into the reply's error object."""

    def __init__(self, code, param, message, retryable=False):
        super().__init__(message)
        self.code, self.param, self.message, self.retryable = code, param, message, retryable


TYPES = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
         "object": (dict,)}
NAMED = {"string": "a string", "integer": "an integer", "number": "a number", "boolean": "true or false",
         "array": "a list", "object": "an object"}


def show(value):
    """A short form of a refused value for a message."""
    if isinstance(value, str):
        return to_json(value if len(value) <= 30 else value[:30] + "...")
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10 ** 15:
        return "a number beyond 1e15"
    return to_json(value)


def bounds(low, high, unit=""):
    if low is not None and high is not None:
        return f"{low} to {high}{unit}" if low != high else f"{low}{unit}"
    return f"at least {low}{unit}" if high is None else f"at most {high}{unit}"


def check(value, schema, where):
    """Raise ToolError when a value does not fit its JSON Schema; `where` is its path, such as subtitles[0].end."""
    kind = schema["type"]
    fits = isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        fits = True  # JSON has one kind of number: 8.0 is the integer 8
    if not fits:
        raise ToolError("invalid_parameter", where, f"{where} must be {NAMED[kind]}, got {show(value)}")
    if "enum" in schema:
        if value not in schema["enum"]:
            allowed = ", ".join(map(str, schema["enum"]))
            raise ToolError("invalid_parameter", where, f"{where} must be one of {allowed}, got {show(value)}")
    elif kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        if not ((low is None or value >= low) and (high is None or value <= high) and value - value == 0):
            raise ToolError("invalid_parameter", where, f"{where} must be {bounds(low, high)}, got {show(value)}")
    elif kind == "string":
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if len(value) < low or (high is not None and len(value) > high) or (low and value.isspace()):
            blank = "blank text" if value.isspace() else len(value)
            raise ToolError("invalid_parameter", where,
                            f"{where} must have {bounds(low, high, ' characters')}, got {blank}")
    elif kind == "array":
        low, high = schema.get("minItems"), schema.get("maxItems")
        if (low is not None and len(value) < low) or (high is not None and len(value) > high):
            raise ToolError("invalid_parameter", where,
                            f"{where} must have {bounds(low, high, ' items')}, got {len(value)}")
        for i, item in enumerate(value):
            check(item, schema["items"], f"{where}[{i}]")
    elif kind == "object":
        check_object(value, schema, where + ".", where)


def check_object(value, schema, prefix, owner):
    """Names first, then required ones, then values: the order in which a reader would mend a call."""
    properties = schema["properties"]
    for name in value:
        if name not in properties:
            raise ToolError("unknown_parameter", f"{prefix}{name:.40}",
                            f"unknown parameter {show(name)}; {owner} takes {', '.join(properties)}")
    for name in schema["required"]:
        if name not in value:
            raise ToolError("missing_parameter", prefix + name, f"{prefix}{name} is required")
    for name, item in value.items():
        check(item, properties[name], prefix + name)


def find_medium(artifacts, media_id, kinds, where):
    """The artifact of that id. Raises ToolError: unknown ids list the known ones of the right kind."""
    found = artifacts.get(media_id)
    if found is None:
        known = [other for other, artifact in artifacts.items() if artifact["kind"] in kinds][-12:]
        raise ToolError("file_not_found", where, f"{where}: no media {show(media_id)} in this session; "
                        f"known {kinds[0]} ids: {', '.join(known) or 'none'}")
    if found["kind"] not in kinds:
        article = {"image": "an", "audio": "an"}
        raise ToolError("wrong_kind", where, f"{where} is '{media_id}', {article.get(found['kind'], 'a')} "
                        f"{found['kind']}; {article.get(kinds[0], 'a')} {kinds[0]} is needed")
    return found


def check_medium(artifact, limits, where):
    """The limits that a service sets on a medium: sides, aspect ratio, duration, being a storyboard."""
    if "has" in limits and not artifact.get(limits["has"]):
        raise ToolError("wrong_kind", where, f"{where} is '{artifact['id']}', a text without shots; "
                        "a storyboard of tool_video_shot_gen is needed")
    width, height, duration = artifact["width"], artifact["height"], artifact["duration_s"]
    if "side_px" in limits:
        low, high = limits["side_px"]
        if min(width, height) < low or max(width, height) > high:
            code = "media_too_small" if min(width, height) < low else "media_too_large"
            wanted = f"between {low} and {high}" if high < 100000 else f"at least {low}"
            raise ToolError(code, where, f"{where} is {width}x{height}; each side must be {wanted} pixels")
    if "aspect" in limits and max(width, height) > limits["aspect"] * min(width, height):
        raise ToolError("bad_media", where, f"{where} is {width}x{height}; its aspect ratio must lie between "
                        f"1:{limits['aspect']} and {limits['aspect']}:1")
    if "duration_s" in limits and not limits["duration_s"][0] <= duration <= limits["duration_s"][1]:
        raise ToolError("bad_media", where, f"{where} lasts {duration} s; it must last "
                        f"{bounds(*limits['duration_s'], ' s')}")


def find_media(artifacts, tool, args):
    """(parameter -> artifact or list of artifacts, parents [{id, role}]) of one call."""
    media, parents = {}, []
    for param, limits in tool["media"].items():
        value = args.get(param)
        if value is None or (limits.get("or_text") and value not in artifacts):
            continue
        found = []
        for i, media_id in enumerate(value if isinstance(value, list) else [value]):
            where = f"{param}[{i}]" if isinstance(value, list) else param
            artifact = find_medium(artifacts, media_id, limits["kinds"], where)
            check_medium(artifact, limits, where)
            found.append(artifact)
            parents.append({"id": media_id, "role": limits["role"]})
        media[param] = found if isinstance(value, list) else found[0]
    return media, parents


# ---------------------------------------------------------------------------- rules across fields

def rule_exactly_one(tool, args, media):
    first, second = tool["exactly_one"]
    if (first in args) == (second in args):
        problem = "both are given" if first in args else "none is given"
        code = "invalid_parameter" if first in args else "missing_parameter"
        raise ToolError(code, first, f"give either {first} or {second}; {problem}")


def rule_start_before_end(tool, args, media):
    duration = (media.get("video") or media["audio"])["duration_s"]
    start, end = args["start"], args.get("end", duration)
    if end > duration + 1e-5:
        raise ToolError("invalid_parameter", "end", f"end ({end}) should be smaller or equal to the clip's "
                        f"duration ({duration}).")
    if start >= end:
        raise ToolError("invalid_parameter", "start", f"start ({start}) should be smaller than end ({end}).")


def rule_transition_fits(tool, args, media):
    shortest = min(clip["duration_s"] for clip in media["videos"])
    if args["transition"] != "none" and args["transition_duration"] >= shortest / 2:
        raise ToolError("invalid_parameter", "transition_duration", f"transition_duration "
                        f"{args['transition_duration']} s must be less than half of the shortest clip ({shortest} s)")


def rule_tail_needs_pro(tool, args, media):
    if "image_tail" in args and args["mode"] != "pro":
        raise ToolError("invalid_parameter", "image_tail", "image_tail is supported by mode pro only, got mode std")


def rule_mask_fits(tool, args, media):
    if "mask" in media:
        image, mask = media["images"][0], media["mask"]
        if len(media["images"]) > 1:
            raise ToolError("invalid_parameter", "mask", "a mask needs exactly one image, got "
                            f"{len(media['images'])}")
        if (image["width"], image["height"]) != (mask["width"], mask["height"]):
            raise ToolError("bad_media", "mask", f"mask and image must be the same size: {mask['width']}x"
                            f"{mask['height']} is not {image['width']}x{image['height']}")


def rule_transparency(tool, args, media):
    if args["background"] == "transparent" and args["output_format"] == "jpeg":
        raise ToolError("invalid_parameter", "background", "transparent needs output_format png or webp, got jpeg")


def rule_references_plus_outputs(tool, args, media):
    total = len(args.get("images", [])) + args["n"]
    if total > 15:
        raise ToolError("invalid_parameter", "n", f"references plus outputs must be at most 15, got {total}")


def rule_custom_size(tool, args, media):
    size, custom = args.get("size"), tool["custom"]
    if size is None or size in custom["names"]:
        return
    match = re.fullmatch(r"([0-9]{3,4})[%s]([0-9]{3,4})" % re.escape(custom["separator"]), size)
    low, high = custom["side_px"]
    if not match or not all(low <= int(side) <= high for side in match.groups()):
        names = ", ".join(custom["names"]) + " or " if custom["names"] else ""
        raise ToolError("invalid_parameter", "size", f"size must be {names}WIDTH{custom['separator']}HEIGHT with sides "
                        f"of {low} to {high}, got {show(size)}")


def rule_shots_fit_generator(tool, args, media):
    shot = args["duration"] / args["n_shots"]
    if not 1 <= shot <= tool["longest_shot_s"]:
        raise ToolError("invalid_parameter", "n_shots", f"{args['duration']} s in {args['n_shots']} shots is "
                        f"{shot:.1f} s a shot; a shot lasts 1 to {tool['longest_shot_s']} s")


RULES = {name[5:]: function for name, function in list(globals().items()) if name.startswith("rule_")}


# ---------------------------------------------------------------------------- media records and their arithmetic

BLANK = {"id": None, "kind": None, "width": None, "height": None, "duration_s": None, "fps": None, "n_frames": None,
         "has_audio": False, "shots": None, "parents": [], "tool": None, "arguments": {}, "media": None}


def image(width, height, **more):
    return {**BLANK, "kind": "image", "width": width, "height": height, **more}


def video(width, height, shot_frames, fps, has_audio, **more):
    """A video is the list of its shots' lengths in frames; everything about time follows from it."""
    n_frames = sum(shot_frames)
    return {**BLANK, "kind": "video", "width": width, "height": height, "duration_s": round(n_frames / fps, 6),
            "fps": fps, "n_frames": n_frames, "has_audio": has_audio, "shots": len(shot_frames),
            "shot_frames": shot_frames, **more}


def recut(clip, shot_frames, **changes):
    """A video like `clip` with other shots."""
    carried = {name: clip[name] for name in ("n_cues", "speech_s") if name in clip}
    return video(**{"width": clip["width"], "height": clip["height"], "fps": clip["fps"],
                    "has_audio": clip["has_audio"], **carried, **changes, "shot_frames": shot_frames})


def audio(duration_s, **more):
    return {**BLANK, "kind": "audio", "duration_s": round(float(duration_s), 3), "has_audio": True, **more}


def text(body, **more):
    return {**BLANK, "kind": "text", "text": body, "n_chars": len(body), **more}


def exact(number):
    """The decimal that was written, as a fraction: 0.1 is 1/10 here."""
    return Fraction(number) if isinstance(number, int) else Fraction(str(number))


def length(clip):
    """A video's duration in seconds, exact."""
    return clip["n_frames"] / exact(clip["fps"])


def whole(frames):
    """Whole frames, as a writer counts them; the margin absorbs that durations are shown with six decimals."""
    return int(frames + Fraction(1, 2000))


def stretch(shot_frames, n_frames):
    """The same cuts on another number of frames; shots that vanish are dropped."""
    total, done, marks = sum(shot_frames), 0, [0]
    for frames in shot_frames:
        done += frames
        marks.append(done * n_frames // total)
    return [b - a for a, b in zip(marks, marks[1:]) if b > a]


def window(shot_frames, start, n_frames):
    """The parts of the shots that lie in start .. start + n_frames."""
    kept, position = [], 0
    for frames in shot_frames:
        part = min(position + frames, start + n_frames) - max(position, start)
        kept += [part] if part > 0 else []
        position += frames
    return kept


def join(clips, overlap, fps):
    """Shots of clips played after each other, each pair sharing `overlap` seconds (a crossfade)."""
    starts, clock = [], Fraction(0)
    for clip in clips:
        rate, moment = exact(clip["fps"]), clock
        for frames in clip["shot_frames"]:
            starts.append(moment)
            moment += frames / rate
        clock = moment - overlap
        while len(starts) > 1 and clip is not clips[-1] and starts[-1] >= clock:
            starts.pop()  # a shot that is over before the crossfade ends is no cut of its own
    marks = [whole(start * fps) for start in starts] + [whole((clock + overlap) * fps)]
    return [b - a for a, b in zip(marks, marks[1:]) if b > a]


def nearest_ratio(ratios, width, height):
    """The name in `ratios` ("16:9": pixels) whose shape is closest, on a logarithmic scale."""
    return min(ratios, key=lambda name: abs(math.log(ratios[name][0] * height / (ratios[name][1] * width))))


def keep_aspect(width, height, area, multiple):
    """Sides with the same aspect and about `area` pixels, each a multiple of `multiple`."""
    scale = math.sqrt(area / (width * height))
    return [max(1, round(side * scale / multiple)) * multiple for side in (width, height)]


def speech_seconds(speech, words, speed, language):
    """Length of a spoken text (facts/tools.md 3.5): characters / rate / speed, and pauses at punctuation."""
    if language == "en" and 2 * len(re.findall(r"[\u4e00-\u9fff]", words)) > len(words):
        language = "zh"  # the service hears the language; the parameter's default must not make Chinese three times too fast
    commas = len(re.findall(r"[,;,、;]", words))
    stops = len(re.findall(r"[.!?]+(?=\s|$)|[。!?]+", words))
    spoken = len(words) / speech["chars_per_second"][language] / speed
    return round(spoken + commas * speech["comma_s"] + stops * speech["stop_s"] + speech["tail_s"], 2)


def aspect_warning(image_record, width, height):
    """Generators crop a picture whose shape is not the clip's; under 5 % nobody sees it."""
    change = image_record["width"] * height / (image_record["height"] * width)
    return {} if abs(math.log(change)) < 0.05 else {
        "warning": f"image {image_record['width']}x{image_record['height']} was cropped to {width}x{height}"}


# ---------------------------------------------------------------------------- behaviours
# Each takes (env, tool, args with defaults, media) and returns (new records, further fields of the reply).

def make_images(env, tool, args, media):
    """Text to image and image editing: the size follows from the parameters as at the service."""
    table, size = tool["output"], args.get("size") or args.get("resolution")
    sources = media.get("images") or []
    if "area" in table and size is None:
        source = sources[-1]
        width, height = keep_aspect(source["width"], source["height"], table["area"], table["multiple_of"])
    elif size == "auto":
        ratio = nearest_ratio(table["auto"], sources[0]["width"], sources[0]["height"]) if sources else "1:1"
        width, height = table["auto"][ratio]
    elif "sizes" in table and (size is None or size in table["sizes"]):
        sizes = table["sizes"] if size is None else table["sizes"][size]
        ratio = args.get("aspect_ratio") or nearest_ratio(sizes, sources[0]["width"], sources[0]["height"])
        width, height = sizes[ratio]
    else:
        width, height = map(int, re.split("[x*:]", size))
    best = tool["media"].get("images", {}).get("best_items", 99)
    note = {"warning": f"works best with at most {best} images"} if len(sources) > best else {}
    return [image(width, height) for _ in range(int(args.get("n", 1)))], note


def make_video(env, tool, args, media):
    """Veo: pixels by resolution and aspect ratio. Kling: pixels by the image's aspect and the mode; silent."""
    table, first, note = tool["output"], media.get("image"), {}
    if "area" in table:
        width, height = keep_aspect(first["width"], first["height"], table["area"][args["mode"]], table["multiple_of"])
    else:
        sizes = table["sizes"][args["resolution"]]
        width, height = sizes[args.get("aspect_ratio") or nearest_ratio(sizes, first["width"], first["height"])]
        note = aspect_warning(first, width, height) if first else {}
    sound = not table.get("silent") and args["generate_audio"]
    frames = int(args["duration"]) * table["fps"]
    return [video(width, height, [frames], table["fps"], sound, **note) for _ in range(int(args.get("n", 1)))], note


def pipeline(env, tool, args, media):
    """Script, clips, music, narration and the cut in one call: shots of equal length, no references."""
    table = tool["output"]
    width, height = table["sizes"]["720p"][args["aspect_ratio"]]
    n_frames = whole(exact(args["duration"]) * table["fps"])
    shots = stretch([1] * int(args["n_shots"]), n_frames)
    return [video(width, height, shots, table["fps"], args["with_music"] or args["with_narration"])], {}


def music(env, tool, args, media):
    """Two songs; nobody can set their length. Tempo and first beat are for tool_beat_detect to find."""
    def between(low, high, purpose):
        return low + (high - low) * env.draw(purpose)
    table = tool["output"]
    return [audio(round(between(*table["duration_s"], f"length {i}"), 1), bpm=round(between(*table["bpm"], f"bpm {i}")),
                  beat_offset_s=round(between(0, 0.5, f"offset {i}"), 2)) for i in range(table["songs"])], {}


def sound_fx(env, tool, args, media):
    return [audio(media["video"]["duration_s"] if "video" in media else args["duration"])], {}


def tts(env, tool, args, media):
    seconds = speech_seconds(tool["output"], args["text"], args["speed"], args["language"])
    return [audio(seconds, speech_s=seconds, n_chars=len(args["text"]))], {}


def tts_composite(env, tool, args, media):
    """Speech over a video that keeps its own duration; speech that does not fit is refused with both numbers."""
    clip, free_from = media["video"], 0
    segments = args.get("segments") or [{"start": 0, "text": args["text"]}]
    for i, segment in enumerate(segments):
        where = f"segments[{i}]" if "segments" in args else "text"
        spoken = speech_seconds(tool["output"], segment["text"], args["speed"], args["language"])
        if segment["start"] < free_from - 1e-6:
            raise ToolError("invalid_parameter", where, f"{where} starts at {segment['start']} s, before the speech "
                            f"ahead of it ends at {free_from:.2f} s")
        free_from = segment["start"] + spoken
        if free_from > clip["duration_s"] + 1e-6:
            raise ToolError("invalid_parameter", where, f"{where}: the speech ends at {free_from:.2f} s, the video at "
                            f"{clip['duration_s']} s; shorten the text or raise speed (up to 1.3 sounds natural)")
    return [recut(clip, clip["shot_frames"], has_audio=True, speech_s=round(free_from, 2))], {"speech_s": round(free_from, 2)}


def composite(env, tool, args, media):
    """Clips in order; a crossfade of c s shortens by c (n - 1); size and fps are the largest of the clips."""
    clips, sound = media["videos"], media.get("audio")
    overlap = exact(args["transition_duration"]) if args["transition"] == "crossfade" else Fraction(0)
    fps = args.get("fps") or max(clip["fps"] for clip in clips)
    keeps = any(clip["has_audio"] for clip in clips) and not (sound and args["audio_mode"] == "replace")
    film = video(max(clip["width"] for clip in clips), max(clip["height"] for clip in clips),
                 join(clips, overlap, exact(fps)), fps, bool(keeps or sound))
    if len({(clip["width"], clip["height"]) for clip in clips}) > 1:
        film["warning"] = f"clips of other sizes stand on black in {film['width']}x{film['height']}"
    if sound and sound["duration_s"] < film["duration_s"] - 0.05:
        film["warning"] = f"the audio ends at {sound['duration_s']} s; silence until {film['duration_s']} s"
    return [film], {"warning": film["warning"]} if "warning" in film else {}


def postprocess(env, tool, args, media):
    """Operations in order: only resize, crop and rotate change the size, only loop the duration."""
    clip = media["video"]
    width, height, shots = clip["width"], clip["height"], clip["shot_frames"]
    for i, step in enumerate(args["operations"]):
        where = f"operations[{i}]"
        needs = {"resize": ["width", "height"], "crop": ["width", "height"], "rotate": ["angle"], "loop": ["count"],
                 "fade_in": ["seconds"], "fade_out": ["seconds"]}.get(step["op"], [])
        for name in needs:
            if name not in step:
                raise ToolError("missing_parameter", f"{where}.{name}", f"{where}.{name} is required by {step['op']}")
        if step["op"] == "crop":
            right, bottom = step.get("x", 0) + step["width"], step.get("y", 0) + step["height"]
            if right > width or bottom > height:
                raise ToolError("invalid_parameter", where, f"{where}: the crop reaches {right}x{bottom}, outside the "
                                f"frame of {width}x{height}")
        if step["op"] in ("resize", "crop"):
            width, height = (int(step[side]) // 2 * 2 for side in ("width", "height"))  # H.264 wants even sides
        elif step["op"] == "rotate" and step["angle"] != 180:
            width, height = height, width
        elif step["op"] == "reverse":
            shots = shots[::-1]
        elif step["op"] == "loop":
            shots = shots * int(step["count"])
        elif step["op"].startswith("fade") and step["seconds"] > sum(shots) / clip["fps"]:
            raise ToolError("invalid_parameter", f"{where}.seconds", f"{where}.seconds {step['seconds']} is longer "
                            f"than the video ({sum(shots) / clip['fps']:.2f} s)")
        if sum(shots) > 10 ** 6:
            raise ToolError("invalid_parameter", where, f"{where}: the video would exceed 1000000 frames")
    return [recut(clip, shots, width=width, height=height)], {}


def trim(env, tool, args, media):
    clip = media["video"]
    rate, start = exact(clip["fps"]), exact(args["start"])
    n_frames = whole((min(exact(args["end"]), length(clip)) - start) * rate)
    first = min(whole(start * rate), clip["n_frames"] - n_frames)
    if n_frames < 1:
        raise ToolError("invalid_parameter", "end", f"start..end must span at least one frame ({1 / clip['fps']:.4f} s)")
    return [recut(clip, window(clip["shot_frames"], first, n_frames))], {}


def speed(env, tool, args, media):
    """Duration / factor in whole frames; the sound is sped up too."""
    clip = media["video"]
    if "factor" in args:
        n_frames = whole(clip["n_frames"] / exact(args["factor"]))
    else:
        factor = clip["duration_s"] / args["target_duration"]
        if not 0.25 <= factor <= 4:
            raise ToolError("invalid_parameter", "target_duration", f"target_duration {args['target_duration']} s needs "
                            f"factor {factor:.2f}; the factor must be 0.25 to 4 (the video lasts {clip['duration_s']} s)")
        n_frames = whole(exact(args["target_duration"]) * exact(clip["fps"]))
    if n_frames < 1:
        raise ToolError("invalid_parameter", "factor", "the result would be shorter than one frame")
    return [recut(clip, stretch(clip["shot_frames"], n_frames))], {}


def audio_cut(env, tool, args, media):
    source = media["audio"]
    seconds = min(args.get("end", source["duration_s"]), source["duration_s"]) - args["start"]
    more = {name: source[name] for name in ("bpm", "speech_s") if name in source}
    if source.get("bpm"):
        beat = 60 / source["bpm"]
        more["beat_offset_s"] = round((source["beat_offset_s"] - args["start"]) % beat, 3)
    seconds = args.get("loop_to", seconds)
    if args["fade_in"] + args["fade_out"] > seconds + 1e-6:
        raise ToolError("invalid_parameter", "fade_out", f"fade_in + fade_out is {args['fade_in'] + args['fade_out']} s, "
                        f"longer than the audio ({seconds:g} s)")
    if seconds < 0.01:
        raise ToolError("invalid_parameter", "end", "start..end must span at least 0.01 s")
    return [audio(seconds, **more)], {}


def beats(env, tool, args, media):
    """Beat i lies at offset + 60 i / bpm; speech and effects have none. Audio under 2 s gives an empty list."""
    source = media["audio"]
    if source["duration_s"] < 2 or not source.get("bpm"):
        data = {**BLANK, "kind": "data", "tempo": 0.0, "beat_times": []}
        return [data], {"tempo": 0.0, "n_beats": 0, "warning": "no beats found"}
    beat, offset = 60 / source["bpm"], source["beat_offset_s"]
    times = [round(offset + i * beat, 3) for i in range(math.ceil((source["duration_s"] - offset) / beat - 1e-9))]
    data = {**BLANK, "kind": "data", "tempo": float(source["bpm"]), "beat_times": times}
    return [data], {"tempo": data["tempo"], "n_beats": len(times), "first_beats": times[:4]}


def subtitles(env, tool, args, media):
    """Cues in order and inside the video: one past its end would lengthen the file in MoviePy, so it is refused."""
    clip, free_from = media["video"], 0
    for i, cue in enumerate(args["subtitles"]):
        where = f"subtitles[{i}]"
        if cue["end"] <= cue["start"]:
            raise ToolError("invalid_parameter", f"{where}.end", f"{where}.end ({cue['end']}) must be after its start "
                            f"({cue['start']})")
        if cue["start"] < free_from - 1e-6:
            raise ToolError("invalid_parameter", f"{where}.start", f"{where}.start ({cue['start']}) is before the end of "
                            f"the cue ahead ({free_from}); cues must be in order")
        free_from = cue["end"]
        if free_from > clip["duration_s"] + 1e-5:
            raise ToolError("invalid_parameter", f"{where}.end", f"{where}.end ({free_from}) is past the video's end "
                            f"({clip['duration_s']} s)")
    return [recut(clip, clip["shot_frames"], n_cues=clip.get("n_cues", 0) + len(args["subtitles"]))], {}


def refine(env, tool, args, media):
    """The prompt stays word for word, so that quoted strings and names survive; detail is added behind it."""
    detail = {"image": "clear composition, soft natural light, fine detail",
              "video": "slow camera move, soft natural light, steady motion"}[args["target"]]
    style = f", {args['style']}" if args.get("style") else ""
    return [text(f"{args['prompt'].strip()}{style}, {detail}"[:int(args["max_chars"])], form="prompt")], {}


def script(env, tool, args, media):
    n_scenes = int(args.get("n_scenes") or max(1, round(args["duration"] / 8)))
    share = args["duration"] / n_scenes
    body = " ".join(f"Scene {i + 1} ({share:.1f} s): {args['topic'].strip()[:120]}, part {i + 1}." for i in range(n_scenes))
    return [text(body, form="script", n_scenes=n_scenes, script_s=args["duration"],
                 narration_chars=int(15 * args["duration"]))], {"n_scenes": n_scenes}


def storyboard_text(shots):
    return "; ".join(f"{shot['index']}) {shot['duration']:g} s {shot['description']}" for shot in shots)


def storyboard(env, tool, args, media):
    """Shots whose durations sum to the total, on a grid of 0.1 s; a shot over 10 s is flagged."""
    source = media.get("script", {})
    total = args.get("total_duration") or source.get("script_s")
    n_shots = int(args.get("n_shots") or source.get("n_scenes") or (math.ceil(total / 8) if total else 4))
    total = total or 8 * n_shots
    marks = [round(total * i / n_shots, 1) for i in range(n_shots)] + [total]
    subject = " ".join(source.get("text", args["script"]).split()[:8])
    views = ("wide shot", "medium shot", "close-up", "tracking shot")
    shots = [{"index": i + 1, "duration": round(marks[i + 1] - marks[i], 6),
              "description": f"{views[i % 4]}, {subject}"[:80]} for i in range(n_shots)]
    too_long = [shot["index"] for shot in shots if shot["duration"] > 10]
    note = {"warning": f"shots {too_long[:5]} are longer than any generator makes (10 s)"} if too_long else {}
    return [text(storyboard_text(shots), form="storyboard", shot_list=shots, **note)], {"n_shots": n_shots, **note}


def polish(env, tool, args, media):
    """Better wording, the same shots and durations; with a script, its narration is dealt out to the shots."""
    shots = [dict(shot) for shot in media["storyboard"]["shot_list"]]
    words = media["script"]["text"].split() if "script" in media else []
    for i, shot in enumerate(shots):
        shot["description"] = shot["description"].removesuffix(", detailed") + ", detailed"
        if words:
            shot["narration"] = " ".join(words[len(words) * i // len(shots):len(words) * (i + 1) // len(shots)])
    return [text(storyboard_text(shots), form="storyboard", shot_list=shots)], {"n_shots": len(shots)}


def summary(env, tool, args, media):
    words = media.get("content", {}).get("text", args["content"]).split()
    return [text(" ".join(words[:int(args["max_words"])]), form="summary")], {}


def analysis(env, tool, args, media):
    """An answer from the records, with a few of the prompt's words: never the prompt whole, else the agent would
    verify itself against its own words. A fixed share of the media has one flaw to report."""
    sentences = []
    for record in media["media"][:4]:
        facts = [record["kind"]]
        facts += [f"{record['width']}x{record['height']}"] if record["width"] else []
        facts += [f"{record['duration_s']:g} s"] if record["duration_s"] else []
        facts += [f"{record['shots']} shot{'s' if record['shots'] > 1 else ''}",
                  "with sound" if record["has_audio"] else "silent"] if record["kind"] == "video" else []
        words = re.findall(r"[^\W\d_]{4,}", str(record["arguments"].get("prompt", ""))[:400])
        picked = sorted({words[int(draw(env.seed, record["id"], f"word {k}") * len(words))] for k in range(3)}) if words else []
        facts += ["shows " + ", ".join(picked)] if picked else []
        if record["kind"] != "audio" and draw(env.seed, record["id"], "flaw") < env.defaults["flaw_share"] * env.scale:
            facts.append("flaw: " + ("hands look wrong", "text is unreadable", "edges are blurred")[
                int(draw(env.seed, record["id"], "which flaw") * 3)])
        sentences.append(f"{record['id']}: {', '.join(facts)}.")
    more = len(media["media"]) - len(sentences)
    return [], {"answer": " ".join(sentences) + (f" And {more} more like these." if more else "")}


def search(env, tool, args, media):
    """Tavily: results of a query, or the text of URLs, of which some fail while the call succeeds."""
    if "query" in args:
        lines = [f"{i + 1}. {args['query'].strip()[:80]}: notes from source {i + 1}" for i in range(int(args["max_results"]))]
        return [text("\n".join(lines), form="search")], {"n_results": len(lines)}
    failed = [url for url in args["urls"] if not re.match(r"https?://[^\s/]+\.[^\s/]+", url)]
    good = [url for url in args["urls"] if url not in failed]
    if not good:
        raise ToolError("invalid_parameter", "urls", f"no valid URL in urls; the first is {show(args['urls'][0])}")
    note = {"failed": [url[:60] for url in failed[:5]]} if failed else {}
    return [text("\n".join(f"{url}: page text" for url in good), form="search")], {"n_results": len(good), **note}


def inspire(env, tool, args, media):
    sizes = tool["output"]["sizes"]
    return [image(*sizes[int(env.draw(f"size {i}") * len(sizes))], tags=args["query"].split()[:3])
            for i in range(int(args["n"]))], {}


def todo(env, tool, args, media):
    """A to-do list that lives as long as the episode."""
    action, tasks = args["action"], args.get("tasks")
    if action in ("create", "update") and not tasks:
        raise ToolError("missing_parameter", "tasks", f"tasks is required by action {action}")
    if action == "clear":
        env.todo.clear()
    elif action in ("create", "update"):
        for i, task in enumerate(tasks):
            number = int(task["id"])
            if action == "update" and number not in env.todo:
                known = ", ".join(map(str, env.todo)) or "none"
                raise ToolError("invalid_parameter", f"tasks[{i}].id", f"no task {number}; known tasks: {known}")
            if action == "create" and "title" not in task:
                raise ToolError("missing_parameter", f"tasks[{i}].title", f"tasks[{i}].title is required by action create")
        for task in tasks:
            old = env.todo.get(int(task["id"]), {"status": "todo"}) if action == "update" else {"status": "todo"}
            env.todo[int(task["id"])] = {**old, **task}
    return [], {"tasks": [f"{number} {task['status']}: {task['title'][:40]}" for number, task in list(env.todo.items())[:50]]}


def html(env, tool, args, media):
    """A page; every medium it names must exist, and becomes one of its parents."""
    parents = []
    for i, section in enumerate(args["sections"]):
        for j, media_id in enumerate(section.get("media_ids", [])):
            find_medium(env.artifacts, media_id, ("image", "video", "audio", "text", "data"), f"sections[{i}].media_ids[{j}]")
            parents.append({"id": media_id, "role": "source"})
    page = {**BLANK, "kind": "html", "title": args["title"], "n_media": len(parents), "parents": parents}
    return [page], {"n_sections": len(args["sections"]), "n_media": len(parents)}


BEHAVIOURS = {f.__name__: f for f in (
    make_images, make_video, pipeline, music, sound_fx, tts, tts_composite, composite, postprocess, trim, speed, audio_cut,
    beats, subtitles, refine, script, storyboard, polish, summary, analysis, search, inspire, todo, html)}


# ---------------------------------------------------------------------------- price and time

def price(tool, args, outputs):
    """US dollars of a successful call, for what was returned."""
    rates, seconds = tool["price_usd"], sum(output["duration_s"] or 0 for output in outputs)
    rate = {name: value[args[rates["by"]]] if isinstance(value, dict) else value for name, value in rates.items()}
    silent = "per_second_silent" in rate and outputs and not outputs[0]["has_audio"]
    per_item = rate.get("per_item", 0)
    if "not_square" in rate and outputs and outputs[0]["width"] != outputs[0]["height"]:
        per_item *= rate["not_square"]
    spoken = len(args.get("text") or "") + sum(len(part["text"]) for part in args.get("segments") or [])
    return (rate.get("per_call", 0) + per_item * len(outputs) + rate.get("per_1k_chars", 0) * spoken / 1000
            + (rate["per_second_silent"] if silent else rate.get("per_second", 0)) * seconds)


def virtual_seconds(tool, outputs, media, chance):
    """How long the real call would take: a triangular draw, or a sum by the size of the work."""
    times = tool["virtual_seconds"]
    if "typical" in times:
        low, mode, high = times["min"], times["typical"], times["max"]
        if chance * (high - low) < mode - low:
            return low + math.sqrt(chance * (high - low) * (mode - low))
        return high - math.sqrt((1 - chance) * (high - low) * (high - mode))
    made = sum(output["duration_s"] or 0 for output in outputs)
    full_hd = outputs and min(outputs[0]["width"] or 0, outputs[0]["height"] or 0) >= 1080
    rate = times.get("per_output_second_1080p" if full_hd else "per_output_second", times.get("per_output_second", 0))
    heard = sum(record["duration_s"] or 0 for record in media.get("media", [])) if "per_input_second" in times else 0
    written = sum(output.get("n_chars") or 0 for output in outputs)
    return times["base"] + rate * made + times.get("per_input_second", 0) * heard + times.get("per_char", 0) * written


# ---------------------------------------------------------------------------- replies

FORGED = re.compile(r"<(?=/?(?:think|plan|tool_call|tool_response|answer)\b)")
PREFIX = {"image": "img", "video": "vid", "audio": "aud", "text": "txt", "html": "html", "data": "data"}


def disarm(text):
    """Text from outside cannot open or close a chat turn."""
    return text.replace("<|", "< |") if "<|" in text else text


def reply_text(reply):
    """A reply as JSON in which neither control tokens nor the four tags survive."""
    body = to_json(reply)
    return FORGED.sub(r"\\u003c", disarm(body)) if "<" in body else body


def describe(outputs, more, reply_chars):
    """The reply's fields: ids, then attributes; one value if all outputs share it, else a list."""
    reply = {"ids": [output["id"] for output in outputs]} if outputs else {}

    def attribute(name, values):
        if values and values[0] is not None:
            reply[name] = values[0] if values.count(values[0]) == len(values) else values

    attribute("size", [f"{o['width']}x{o['height']}" if o["width"] else None for o in outputs])
    attribute("duration_s", [int(s) if s and s == int(s) else s for s in (o["duration_s"] for o in outputs)])
    attribute("sound", [o["has_audio"] if o["kind"] == "video" else None for o in outputs])
    reply.update(more)
    for output in outputs:
        if output["kind"] == "text":
            body = output["text"]
            reply["text"] = body if len(body) <= reply_chars else body[:reply_chars - 3] + "..."
    return reply


def deviate(outputs, chance):
    """What an unfaithful simulator would return instead (fidelity < 1): a missing item, a wrong size or duration.
    Returns None where nothing about the outputs can be wrong; the call then fails."""
    if len(outputs) > 1 and chance < 0.5:
        return outputs[:-1]
    changed = []
    for output in outputs:
        if output["kind"] == "video":
            changed.append(recut(output, stretch(output["shot_frames"], max(1, output["n_frames"] * 4 // 5))))
        elif output["kind"] == "audio":
            changed.append({**output, "duration_s": round(output["duration_s"] * 0.8, 3)})
        elif output["kind"] == "image":
            changed.append({**output, "width": output["width"] // 2, "height": output["height"] // 2})
    return changed or None


# ---------------------------------------------------------------------------- the environment

class VisGenEnv:
    """One episode at a time: reset(task, seed), then step(text) until terminated or truncated.

    Same seed, same calls: same replies. All state is in the instance and small; copy.deepcopy forks an episode.
    """

    def __init__(self, rollout=RolloutConfig()):
        self.rollout = rollout
        self.scale = rollout.failure_scale
        self.tools, self.defaults = load_tools(), load_defaults()
        self.ended = "not started"

    def __deepcopy__(self, memo):
        twin = object.__new__(type(self))
        shared = {"tools": self.tools, "defaults": self.defaults, "rollout": self.rollout}  # read only
        twin.__dict__ = {**copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in shared}, memo), **shared}
        return twin

    def reset(self, task, seed):
        """Opening messages and {"pool": names, "tools": schemas or None}. ValueError for a pool of unknown tools."""
        pool = task.get("pool") if self.rollout.tool_pool == "task" else None
        self.pool = list(pool or self.tools)
        unknown = [name for name in self.pool if name not in self.tools]
        if unknown:
            raise ValueError(f"task {task.get('id')}: pool names {unknown}, which tools.yaml does not have")
        self.task, self.seed, self.ended = task, seed, None
        self.calls, self.turns, self.plans, self.plan, self.answer = [], [], [], None, None
        self.artifacts, self.counts, self.todo = {}, {}, {}
        self.virtual_s = self.price_usd = 0.0
        self.errors = 0
        lines = [disarm(clean(task["request"]))]
        for i, given in enumerate(task.get("inputs") or [], 1):
            lines.append(self.attach(f"in_{i}", given))
        self.messages = [{"role": "system", "content": system_text(self.rollout.tools, tuple(self.pool))},
                         {"role": "user", "content": "\n".join(lines)}]
        self.info = {"pool": self.pool,
                     "tools": tool_schemas(self.pool) if self.rollout.tools == "schema" else None}
        return list(self.messages), self.info

    def attach(self, media_id, given):
        """A medium that the user attached becomes an artifact; returns the line that tells the agent about it."""
        kind, width, height = given["kind"], given.get("width"), given.get("height")
        if kind == "image":
            record = image(width or 1024, height or 1024)
        elif kind == "video":
            fps = given.get("fps") or 24
            frames = whole(exact(given.get("duration_s") or 8) * exact(fps))
            record = video(width or 1280, height or 720, stretch([1] * (given.get("shots") or 1), frames), fps,
                           bool(given.get("has_audio")))
        elif kind == "audio":
            record = audio(given.get("duration_s") or 30, bpm=given.get("bpm", 0), beat_offset_s=0.0)
        else:
            record = text(given.get("text") or "")
        record.update(id=media_id, tool="user", media=given.get("media") or self.stand_in(kind, media_id))
        self.artifacts[media_id] = record
        size = f" {record['width']}x{record['height']}" if record["width"] else ""
        length_s = f" {record['duration_s']:.1f} s" if record["duration_s"] else ""
        return f"[{media_id}: {kind}{size}{length_s}]" + (f" {disarm(clean(record['text']))}" if kind == "text" else "")

    def draw(self, purpose):
        """A number in [0, 1) from the episode's seed and the number of the current call."""
        return draw(self.seed, len(self.calls), purpose)

    def stand_in(self, kind, media_id):
        files = stand_ins().get(kind)
        return files[int(draw(self.seed, media_id, "media") * len(files))] if files else None

    def step(self, text):
        """One turn of the agent -> (tool messages, 0.0, terminated, truncated, info). Every call gets one message,
        in order. The reward is LtrReward's business, on the finished record; RuntimeError after the episode's end."""
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
        elif not turn["calls"] or self.errors >= self.defaults["max_errors"]:
            self.ended = "malformed"
        elif len(self.turns) >= self.rollout.max_turns:
            self.ended = "max_turns"
        info = {"turn": len(self.turns), "ended": self.ended, "faults": turn["faults"]}
        return replies, 0.0, self.ended in ("answer", "malformed"), self.ended == "max_turns", info

    def stop(self, ended):
        """End an episode from outside: the sampler's `max_tokens`."""
        if ended not in ENDINGS:
            raise ValueError(f"ended is {ended!r}; allowed: {', '.join(ENDINGS)}")
        self.ended = self.ended or ended

    def call(self, call):
        """Run one parsed call, keep its record, and return the reply."""
        name, args = call["name"], call["arguments"]
        record = {"turn": len(self.turns), "name": name, "arguments": args, "status": "ok", "error": None, "outputs": [],
                  "virtual_s": 0.0, "price_usd": 0.0}
        try:
            if self.errors >= self.defaults["max_errors"]:
                raise ToolError("too_many_errors", None, f"{self.errors} calls of this episode failed; it ends here")
            if call["error"]:
                raise ToolError("bad_call", None, call["error"])
            if name not in self.pool:
                more = f" and {len(self.pool) - 10} more" if len(self.pool) > 10 else ""
                raise ToolError("unknown_tool", "name", f"no tool {show(name)} here; the tools are "
                                f"{', '.join(self.pool[:10])}{more}")
            reply = self.run(self.tools[name], args, record)
        except ToolError as error:
            self.errors += 1
            record["status"] = "error"
            record["error"] = {"code": error.code, "param": error.param, "message": error.message,
                               "retryable": error.retryable}
            record["virtual_s"] = record["virtual_s"] or self.defaults["refused_s"]
            reply = {"error": record["error"]}
        self.calls.append(record)
        self.virtual_s += record["virtual_s"]
        self.price_usd += record["price_usd"]
        return reply

    def run(self, tool, written, record):
        """Validate, fail as services fail, make the outputs. Raises ToolError."""
        provider = tool["provider"]
        args = {**tool["defaults"], **written}
        try:
            check_object(written, tool["parameters"], "", tool["name"])
            media, parents = find_media(self.artifacts, tool, args)
            for rule in tool["rules"]:
                RULES[rule](tool, args, media)
            self.fail(tool, args, record)
            outputs, more = BEHAVIOURS[tool["behaviour"]](self, tool, args, media)
        except ToolError as error:
            if provider["invalid"] and not error.message.startswith(tuple(provider.values())):
                error.message = f"{provider['invalid']}: {error.message}"
            raise
        if self.rollout.fidelity < 1 and self.draw("fidelity") >= self.rollout.fidelity:
            outputs = deviate(outputs, self.draw("deviation"))
            if outputs is None:
                raise ToolError("service_error", None, "internal error, try again", True)
        for output in outputs:
            kind = output["kind"]
            self.counts[kind] = number = self.counts.get(kind, 0) + 1
            output["id"] = media_id = f"{PREFIX[kind]}_{number}"
            output["tool"], output["arguments"], output["media"] = tool["name"], written, self.stand_in(kind, media_id)
            output["parents"] = output["parents"] or parents
            self.artifacts[media_id] = output
        record["outputs"] = [output["id"] for output in outputs]
        record["price_usd"] = round(price(tool, args, outputs), 6)
        record["virtual_s"] = round(virtual_seconds(tool, outputs, media, self.draw("latency")), 3)
        return describe(outputs, more, self.defaults["reply_chars"])

    def fail(self, tool, args, record):
        """The failures that come from the prompt (content_blocked) or from nowhere (transient, timeout)."""
        if not self.scale:
            return
        provider = tool["provider"]
        for param in tool["screened"]:
            words = args.get(param) or ""
            hit = self.defaults["blocked"].search(words)
            false_alarm = self.defaults["false_block"] * self.scale
            if hit or (false_alarm and draw("false block", words, tool["name"]) < false_alarm):
                raise ToolError("content_blocked", param, provider["blocked"].format(word=hit[0] if hit else "sensitive"))
        timeout = self.defaults["timeout"][tool["call"]] * self.scale
        chance = self.draw("failure") if tool["call"] != "local" else 1.0
        if chance < timeout:
            record["virtual_s"] = tool["virtual_seconds"].get("max", 60)
            raise ToolError("timeout", None, provider["timeout"], True)
        if chance < timeout + self.defaults["transient"][tool["call"]] * self.scale:
            raise ToolError("service_error", None, provider["transient"], True)

    def trajectory(self):
        """The Trajectory record; `reward` is filled by rewards.py."""
        return {"task": self.task, "messages": list(self.messages), "calls": list(self.calls),
                "artifacts": list(self.artifacts.values()), "plan": self.plan, "plans": list(self.plans),
                "answer": self.answer, "ended": self.ended, "reward": {}, "seed": self.seed,
                "virtual_s": round(self.virtual_s, 3), "price_usd": round(self.price_usd, 6), "turns": list(self.turns)}
