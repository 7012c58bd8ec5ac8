"""The 36 tools as data, and what follows from tools.yaml alone: the checks of a call's arguments,
its price and time, and what a reply shows. lib/behaviours.py makes what the tools make; env.py
plays the episode. No torch.

The paper names the tools (Table 9) and asks for "parameter validation" and "output specifications"
(Sec. 4.3.1); parameters, limits, prices and words are those of real services, see tools.yaml.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from operator import contains, ge, itemgetter, le
from typing import Any, NoReturn

import yaml

from lib.runs import ROOT
from lib.text import to_json


# ------------------------------------------------------------------------- the tools as data
@lru_cache(maxsize=1)
def read_sheet() -> dict:
    """tools.yaml, with what its entries leave out and the patterns that moderation searches for."""
    text = (ROOT / "tools.yaml").read_text(encoding="utf-8")
    sheet = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    defaults, tools = sheet["defaults"], sheet["tools"]
    for name, entry in tools.items():
        tool = {"name": name, **defaults["entry"], **entry}
        tool["provider"] = defaults["providers"][tool["provider"]]
        properties = tool["parameters"]["properties"]
        # The arguments of a call that gives none: a parameter's default, or None.
        tool["blank"] = {param: schema.get("default") for param, schema in properties.items()}
        tools[name] = tool
    for topic, words in defaults["blocked_words"].items():
        # A word ends where its letters end, so that "gored" passes; Chinese has no such ends.
        any_word = "|".join(map(re.escape, words))
        pattern = re.compile(f"(?<![a-z])(?:{any_word})(?![a-z])", re.IGNORECASE)
        defaults["blocked_words"][topic] = pattern
    return sheet


def load_tools() -> dict[str, dict]:
    """The tools of Table 9 by name, in its order. Read once and shared: do not modify."""
    return read_sheet()["tools"]


def load_defaults() -> dict:
    """What all tools share, from the head of tools.yaml: failure rates, limits, providers, ..."""
    return read_sheet()["defaults"]


def tool_schemas(names: Iterable[str]) -> list[dict]:
    """The named tools in OpenAI's form, as chat templates take them in `tools`."""
    schemas = []
    for name in names:
        tool = load_tools()[name]
        function = {part: tool[part] for part in ("name", "description", "parameters")}
        schemas.append({"type": "function", "function": function})
    return schemas


def tool_signature(name: str) -> str:
    """One line, such as `tool_text2image_gemini(prompt, aspect_ratio="1:1", n=1)`; a `?` marks an
    optional parameter without a default."""
    tool = load_tools()[name]
    shown = list(tool["parameters"]["required"])
    for param, default in tool["blank"].items():
        if param not in tool["parameters"]["required"]:
            shown.append(f"{param}?" if default is None else f"{param}={to_json(default)}")
    return f"{name}({', '.join(shown)})"


@lru_cache(maxsize=256)
def category(tool: str) -> str:
    """A tool's heading in Table 9; '' for 'llm' and unknown tools."""
    return load_tools().get(tool, {}).get("category", "")


@lru_cache(maxsize=256)
def makes(tool: str) -> str:
    """The kind of artifact that a tool makes; 'text' for 'llm' steps, unknown tools, and a search,
    whose finds nobody made."""
    if tool not in load_tools() or tool.startswith("tool_search"):
        return "text"
    return load_tools()[tool]["makes"]


@lru_cache(maxsize=256)
def brings(tool: str) -> str:
    """The kind of artifact that comes back from a tool, made or found; 'text' for 'llm' steps and
    unknown tools."""
    return load_tools().get(tool, {}).get("makes", "text")


@lru_cache(maxsize=256)
def takes(tool: str) -> list[set[str]]:
    """The media that a tool cannot do without: a set of kinds for each required parameter."""
    if tool not in load_tools():
        return []
    entry = load_tools()[tool]
    return [
        set(limits["kinds"])
        for param, limits in entry["media"].items()
        if param in entry["parameters"]["required"] and not {"or_text", "inside"} & set(limits)
    ]


@lru_cache(maxsize=256)
def generates_clip(tool: str) -> bool:
    """Whether a tool makes new footage (text or image to video)."""
    return category(tool) in ("Text-to-Video", "Image-to-Video")


@lru_cache(maxsize=256)
def clip_lengths(tool: str) -> tuple[int, ...]:
    """The durations (s) of clips that a video generator offers; () for other tools."""
    if tool not in load_tools():
        return ()
    properties = load_tools()[tool]["parameters"]["properties"]
    return tuple(properties.get("duration", {}).get("enum", ()))


def jobs_at_once(tool: str) -> float:
    """How many calls of a tool its service documents to run side by side; infinite where tools.yaml
    has no such limit."""
    limits = load_tools()[tool].get("limits", [])
    return min((limit["jobs"] for limit in limits if "jobs" in limit), default=math.inf)


@lru_cache(maxsize=8)
def media_files(kind: str) -> list[str]:
    """The media database's files of one kind (Sec. 4.3.1). Without a database: the names that one
    would have, so that no record depends on it; none for kinds that have no stand-ins."""
    index = ROOT / "data/media/index.jsonl"
    if index.exists():
        records = map(json.loads, index.read_text(encoding="utf-8").splitlines())
        if files := [record["path"] for record in records if record["kind"] == kind]:
            return files
    suffix = load_defaults()["kinds"][kind].get("stand_in")
    return [f"{kind}/{i:04d}.{suffix}" for i in range(100)] if suffix else []


def chance(seed: Any, index: Any, purpose: Any) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, in any process."""
    key = f"{seed}|{index}|{purpose}".encode("utf-8", "replace")
    first_bytes = hashlib.blake2b(key, digest_size=8).digest()
    # The upper 53 bits: as many as a float holds exactly.
    return (int.from_bytes(first_bytes, "big") >> 11) / 2**53


# ------------------------------------------------------------------- the size and time of a medium
# (width, height) of an artifact, in pixels.
sides = itemgetter("width", "height")


def whole_frames(seconds: float, fps: float) -> int:
    """A time in whole frames, exact for up to six decimals. A margin of 1/2000 frame absorbs that
    durations are shown rounded."""
    return (round(seconds * 1_000_000) * round(fps * 1000) + 500_000) // 10**9


# ------------------------------------------------------------------ parameter validation (4.3.1)
class ToolError(Exception):
    """A refused or failed call: code, param (or None), message, retryable. VisGenEnv turns it into
    the reply's error object."""


def refuse(
    param: str | None, message: str, code: str = "invalid_parameter", retryable: bool = False
) -> NoReturn:
    """Raise the ToolError of a call; `param` is the parameter to blame, if there is one."""
    raise ToolError(code, param, message, retryable)


TYPES = {
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "number": (int, float),
    "integer": (int, float),
}


def is_of_type(kind: str, value: Any) -> bool:
    """Whether a value is of a JSON type; 8.0 is the integer 8, and true is no number."""
    return type(value) in TYPES[kind] and (kind != "integer" or value % 1 == 0)


def is_written(least: int, value: str) -> bool:
    """Whether a text has `least` characters, and not only spaces."""
    return len(value) >= least and not value.isspace()


# Keywords of JSON Schema: what must hold of (its bound, a value), and the words for it.
KEYWORDS = {
    "type": (is_of_type, "be of type {}"),
    "enum": (contains, "be one of {}"),
    "minimum": (le, "be at least {}"),
    "maximum": (ge, "be at most {}"),
    "minLength": (is_written, "have at least {} characters, not only spaces"),
    "maxLength": (lambda most, value: len(value) <= most, "have at most {} characters"),
    "minItems": (lambda least, value: len(value) >= least, "have at least {} items"),
    "maxItems": (lambda most, value: len(value) <= most, "have at most {} items"),
    "pattern": (re.fullmatch, "match {}"),
}


def check_schema(value: Any, schema: dict, where: str) -> None:
    """Raise ToolError when a value does not fit its JSON Schema.

    `where` is the value's path in the arguments, such as subtitles[0].end. In an object, unknown
    names are refused first, then missing ones, then values: the order in which a reader would mend
    them.
    """
    for keyword, bound in schema.items():
        if keyword in KEYWORDS:
            holds, demand = KEYWORDS[keyword]
            if not holds(bound, value):
                refuse(where, f"{where} must {demand.format(bound)}, got {to_json(value):.40}")
    if "properties" in schema:
        properties = schema["properties"]
        inside = f"{where}." if where else ""
        for name in value:
            if name not in properties:
                known = f"known: {', '.join(properties)}"
                message = f"unknown parameter {to_json(name):.40}; {known}"
                refuse(f"{inside}{name:.40}", message, "unknown_parameter")
        for name in schema["required"]:
            if name not in value:
                refuse(inside + name, f"{inside}{name} is required", "missing_parameter")
        for name, item in value.items():
            check_schema(item, properties[name], inside + name)
    if "items" in schema:
        for i, item in enumerate(value):
            check_schema(item, schema["items"], f"{where}[{i}]")


# Limits of a medium, true where (the medium, the tool's limit) is within the service's; tools.yaml
# holds the codes and messages.
LIMITS = {
    "kinds": lambda medium, kinds: medium["kind"] in kinds,
    "has": lambda medium, name: name in medium,
    "formats": lambda medium, formats: medium["format"] in formats,
    "least_px": lambda medium, least: min(sides(medium)) >= least,
    "most_px": lambda medium, most: max(sides(medium)) <= most,
    "aspect": lambda medium, most: max(sides(medium)) <= most * min(sides(medium)),
    "duration_s": lambda medium, span: span[0] <= medium["duration_s"] <= span[1],
}


# What looks like an id is never taken for a text.
MEDIA_ID = re.compile("(?:in|img|vid|aud|txt|html|data)_[0-9]+")


def find_media(
    there: dict[str, dict], artifacts: dict[str, dict], tool: dict, args: dict
) -> list[dict]:
    """Put artifacts in place of the ids in `args`; returns the call's parents [{id, role}].

    there: the artifacts that a call may name, by id; `artifacts` are all of the episode's, with
    what was made since the turn began. Where a parameter takes an id or a text, the text becomes
    {"text": ...}. ToolError for an id that is not there, and for a medium of the wrong kind or
    beyond the service's limits.
    """
    parents = []
    for param, limits in tool["media"].items():
        given = args[param]
        if given is None:
            continue
        if limits.get("or_text") and given not in there and not MEDIA_ID.fullmatch(given):
            args[param] = {"text": given}
            continue
        places = media_places(param, given, limits.get("inside"))
        for where, media_id in places:
            check_medium(there, artifacts, media_id, limits, where)
            parents.append({"id": media_id, "role": limits["role"]})
        media = [there[media_id] for _, media_id in places]
        args[param] = media if isinstance(given, list) else media[0]
    return parents


def media_places(param: str, given: Any, inside: str | None) -> list[tuple[str, str]]:
    """(path in the arguments, id) of each medium that a parameter names.

    A parameter names one medium, or a list of them; or, with `inside`, a list of objects, of which
    each may hold a list of ids under that name.
    """
    if not isinstance(given, list):
        return [(param, given)]
    if not inside:
        return [(f"{param}[{i}]", media_id) for i, media_id in enumerate(given)]
    places = []
    for i, item in enumerate(given):
        for k, media_id in enumerate(item.get(inside, ())):
            places.append((f"{param}[{i}].{inside}[{k}]", media_id))
    return places


def check_medium(
    there: dict[str, dict], artifacts: dict[str, dict], media_id: str, limits: dict, where: str
) -> None:
    """Raise ToolError unless the id is an artifact's that is there and within a parameter's limits.

    The calls of one turn run side by side, so that what one makes is not there for another.
    """
    if media_id not in there:
        known = [name for name, medium in there.items() if medium["kind"] in limits["kinds"]]
        shown = ", ".join(known[-12:]) or "none"
        message = f"{where}: no media {to_json(media_id):.40} here"
        if media_id in artifacts:
            message = f"{where}: {media_id} is made in this turn; its id can be used from the next"
            message += " turn on"
        message += f"; known {limits['kinds'][0]} ids: {shown}"
        refuse(where, message, "file_not_found")
    medium = there[media_id]
    for name, rule in load_defaults()["media_limits"].items():
        if name in limits and not LIMITS[name](medium, limits[name]):
            message = rule["message"].format(where=where, m=medium, limit=limits[name])
            refuse(where, message, rule["code"])


# ------------------------------------------------------------------------ rules across fields
# Each takes a rule's entry in tools.yaml and the call's arguments, in which media stand for ids and
# None for what was left out, and is true where all is well.
def how_many_given(rule: dict, args: dict) -> bool:
    """Of some parameters, at least and at most so many are given."""
    given = sum(args[name] is not None for name in rule["of"])
    return rule["least"] <= given <= rule["most"]


def lengths(rule: dict, args: dict) -> bool:
    """No text is longer than its most characters."""
    return all(len(args[name] or "") <= most for name, most in rule["most"].items())


def prompt_tokens(rule: dict, args: dict) -> bool:
    """A wide character, such as a Chinese one, is a token; of others, four are one (ours)."""
    prompt = args["prompt"]
    return prompt.isascii() or len(prompt) + 3 * len(re.findall(rule["wide"], prompt)) <= 4096


def shots_count(rule: dict, args: dict) -> bool:
    """There are as many durations as shots."""
    durations, n_shots = args["shot_durations"], args["n_shots"]
    return durations is None or n_shots is None or len(durations) == n_shots


def shots_sum(rule: dict, args: dict) -> bool:
    """The durations sum to the total."""
    durations, total = args["shot_durations"], args["total_duration"]
    return durations is None or total is None or abs(sum(durations) - total) <= 0.1 + 1e-9


def start_before_end(rule: dict, args: dict) -> bool:
    """The start lies before the end, which is the medium's own if none is given."""
    end = args[rule["of"]]["duration_s"] if args["end"] is None else args["end"]
    return args["start"] < end


def spans_a_frame(rule: dict, args: dict) -> bool:
    """Between start and end lies a frame of the video."""
    video = args["video"]
    return whole_frames(min(args["end"], video["duration_s"]) - args["start"], video["fps"]) >= 1


def transition_fits(rule: dict, args: dict) -> bool:
    """Two transitions fit into the shortest clip."""
    shortest = min(clip["duration_s"] for clip in args["videos"])
    return args["transition_duration"] * 2 < shortest


def few_images(rule: dict, args: dict) -> bool:
    """Images taken and images made are not too many together."""
    return len(args["images"] or ()) + args["n"] * rule["outputs"] <= rule["most"]


def shots_fit(rule: dict, args: dict) -> bool:
    """Without a storyboard, each of the equal shots lasts 1 to 8 s."""
    return bool(args["storyboard"]) or 1 <= args["duration"] / args["n_shots"] <= 8


def storyboard_fits(rule: dict, args: dict) -> bool:
    """No shot of a storyboard lasts more than 8 s."""
    return not args["storyboard"] or longest_shot(args["storyboard"]) <= 8


def factor_in_range(rule: dict, args: dict) -> bool:
    """A target duration speeds the video up or down by 4 at most."""
    target = args["target_duration"]
    return target is None or 0.25 <= args["video"]["duration_s"] / target <= 4


def sides_fit(rule: dict, args: dict) -> bool:
    """Both sides of a size such as 1024x768 are within bounds."""
    numbers = map(int, re.findall("[0-9]{2,}", args["size"] or ""))
    return all(rule["least"] <= side <= rule["most"] for side in numbers)


def pixels_fit(rule: dict, args: dict) -> bool:
    """A size such as 1024x768 has so many pixels, and sides of no more than some aspect ratio."""
    width, height = map(int, re.findall("[0-9]{2,}", args["size"]) or (0, 0))
    if not width:
        # A name, such as 2K.
        return True
    longer, shorter = max(width, height), min(width, height)
    return rule["least"] <= width * height <= rule["most"] and longer <= rule["aspect"] * shorter


def mask_fits(rule: dict, args: dict) -> bool:
    """A mask goes with one image, of its size."""
    mask, images = args["mask"], args["images"]
    return mask is None or [sides(mask)] == [sides(image) for image in images]


def hardly_cropped(rule: dict, args: dict) -> bool:
    """The clip has the image's aspect ratio, within 5 %."""
    image, clip = args["image"], args["made"][0]
    stretch = image["width"] / image["height"] * clip["height"] / clip["width"]
    return abs(math.log(stretch)) <= 0.05


def audio_lasts(rule: dict, args: dict) -> bool:
    """The audio is no shorter than the film."""
    audio, film = args["audio"], args["made"][0]
    return audio is None or audio["duration_s"] >= film["duration_s"] - 0.05


def longest_shot(storyboard: dict) -> float:
    """Seconds of a storyboard's longest shot."""
    return max(shot["duration"] for shot in storyboard["shot_list"])


RULES = {
    "how_many_given": how_many_given,
    "one_of": lambda rule, args: args[rule["of"]] in rule["values"],
    "lengths": lengths,
    "prompt_tokens": prompt_tokens,
    "shots_count": shots_count,
    "shots_sum": shots_sum,
    "start_before_end": start_before_end,
    "end_inside": lambda rule, args: (args["end"] or 0) <= args[rule["of"]]["duration_s"] + 1e-5,
    "spans_a_frame": spans_a_frame,
    "transition_fits": transition_fits,
    "few_images": few_images,
    "shots_fit": shots_fit,
    "storyboard_fits": storyboard_fits,
    "factor_in_range": factor_in_range,
    "sides_fit": sides_fit,
    "pixels_fit": pixels_fit,
    "mask_fits": mask_fits,
    # These give warnings: they also read what the call has made.
    "hardly_cropped": hardly_cropped,
    "audio_lasts": audio_lasts,
    "one_size": lambda rule, args: not args["made"][0]["letterboxed"],
    "has_beats": lambda rule, args: args["made"][0]["beat_times"],
    "short_shots": lambda rule, args: longest_shot(args["made"][0]) <= 10,
}


def broken(rules: list[dict], args: dict) -> Iterator[dict]:
    """The rules that do not hold and apply (`when` parameters have these values), in order."""
    for rule in rules:
        if RULES[rule["rule"]](rule, args):
            continue
        when = rule.get("when", {})
        if all(args[param] in values for param, values in when.items()):
            yield rule


# -------------------------------------------------------------------------- price, time, replies
# What a rate of tools.yaml is multiplied by, of (new artifacts, media taken). Other rates are per
# unit of the new artifacts' field of that name, such as duration_s.
AMOUNTS = {
    "call": lambda made, given: 1,
    "item": lambda made, given: len(made),
    "square_item": lambda made, given: sum(m["width"] == m["height"] for m in made),
    "other_item": lambda made, given: sum(m["width"] != m["height"] for m in made),
    "large_second": lambda made, given: sum(m["duration_s"] for m in made if min(sides(m)) > 720),
    "input_item": lambda made, given: len(given),
    "input_second": lambda made, given: sum(m["duration_s"] for m in given),
}


def bill(
    rates: dict,
    args: dict,
    made: list[dict] | tuple = (),
    given: list[dict] | tuple = (),
    chance_of: Callable[[str], float] | None = None,
) -> float:
    """What a call costs, in US dollars or in virtual seconds.

    rates: from tools.yaml; either {amount: rate}, or {min, typical, max} of a time that varies.
    `by` names the parameter that picks from rates which are tables.
    made, given: the new artifacts, and the media that the call takes.
    chance_of: gives the chance, in [0, 1), of a purpose; only a time that varies asks it.
    """
    if "by" in rates:
        picked = args[rates["by"]]
        rates = {
            name: rate[picked] if isinstance(rate, dict) else rate
            for name, rate in rates.items()
            if name != "by"
        }
    if "typical" in rates:
        return latency(rates, chance_of("latency"))
    parts = []
    for name, rate in rates.items():
        if name in AMOUNTS:
            amount = AMOUNTS[name](made, given)
        else:
            amount = sum(artifact[name] for artifact in made)
        parts.append(rate * amount)
    return sum(parts)


def latency(rates: dict, chance: float) -> float:
    """Seconds for a chance in [0, 1): min at 0, typical at 1/2, max at 1, linear in between."""
    low, usual, high = rates["min"], rates["typical"], rates["max"]
    return low + (usual - low) * min(1, 2 * chance) + (high - usual) * max(0, 2 * chance - 1)


def describe(kind: str, outputs: list[dict], more: dict) -> dict:
    """The fields of a reply: ids, what this kind of artifact shows, and `more`. A field is one
    value if all outputs share it, else a list."""
    shown = {"ids": [output["id"] for output in outputs]} if outputs else {}
    for name, field in load_defaults()["kinds"][kind]["shows"].items():
        if field:
            values = [output[field] for output in outputs]
        else:
            values = [f"{output['width']}x{output['height']}" for output in outputs]
        same = values.count(values[0]) == len(values)
        shown[name] = values[0] if same else values
    return {**shown, **more}
