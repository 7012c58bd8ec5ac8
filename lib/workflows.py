"""Expert workflows, and how one is unrolled for a request: the reference plans of R_plan.

data/workflows.yaml holds 15 templates (Sec. 3.1), each a graph of steps; data/families.yaml adds
one for each family of requests that need the other tools. They are VisionAgent's know-how, and the
"expert reference plans" that the vPlanJudger compares with (Sec. 4.3.2). The paper says that there
are 15; what is in them is ours. `c` is a task's constraints throughout.
"""

import math
import re
from functools import lru_cache

import yaml

from lib.families import family_workflows
from lib.runs import ROOT
from lib.toolbox import bill, clip_lengths, load_tools


@lru_cache(maxsize=1)
def load_workflows() -> dict[str, dict]:
    """The templates of data/workflows.yaml by name, with shared lists of steps spliced in, and
    after them those of data/families.yaml, one a family."""
    text = (ROOT / "data" / "workflows.yaml").read_text(encoding="utf-8")
    workflows = yaml.safe_load(text)["workflows"]
    for flow in workflows.values():
        steps = []
        for entry in flow["steps"]:
            steps += entry if isinstance(entry, list) else [entry]
        flow["steps"] = steps
    return workflows | family_workflows()


# From so many pictures or clips on, an expert looks at what came out before going on: what is
# handed over was seen. Ours.
LOOK_FROM = 1


# ---------------------------------------------------------------------------- which one fits
def n_shots(c: dict) -> int:
    """Shots of a film: as asked, else as many clips of at most 8 s as its duration needs."""
    if c["shots"]:
        return c["shots"]
    return math.ceil(c["duration_s"] / 8) if c["duration_s"] else 1


def needs(c: dict) -> set[str]:
    """What a request asks of a workflow, in the vocabulary of data/workflows.yaml; one of a family
    asks for its family, whose workflow serves all of it."""
    if c.get("family"):
        return {c["family"]}
    if c["images"]:
        several_alike = bool(c["consistency"]) and c["images"] > 1
        found = {
            "many": c["images"] > 1,
            "large": c["resolution"] == "2K",
            "transparent": c["transparent"],
            "web_page": c["web_page"],
            "consistent": several_alike,
            "input": c["input"],
            "text": c["storyboard"] and several_alike,
        }
    else:
        found = {
            "shots": n_shots(c) > 1,
            "square": c["aspect_ratio"] == "1:1",
            "beat": c["beat"],
            "consistent": bool(c["consistency"]) and n_shots(c) > 1,
            **dict.fromkeys(c["audio"], True),
        }
    return {need for need, present in found.items() if present}


def nearest_workflows(c: dict) -> dict[str, int]:
    """{name: misfit} of the modality's workflows, best first, then in file order; shared, so do
    not modify. See `misfits`."""
    return misfits("image" if c["images"] else "video", frozenset(needs(c)))


@lru_cache(maxsize=4096)
def misfits(modality: str, wanted: frozenset[str]) -> dict[str, int]:
    """{name: misfit} of a modality's workflows for these needs, in the order of nearest_workflows.

    The misfit (ours) counts needs that it does not serve, and needs that it presupposes and that
    the request does not have; these twice where it is a family's, which is of no use to others.
    """
    families = family_workflows()
    misfit = {}
    for name, flow in load_workflows().items():
        if flow["modality"] == modality:
            unserved = wanted - {*flow["requires"], *flow["fits"]}
            absent = set(flow["requires"]) - wanted
            misfit[name] = len(unserved) + len(absent) * (2 if name in families else 1)
    return dict(sorted(misfit.items(), key=lambda item: item[1]))


def fitting_workflows(c: dict) -> list[str]:
    """Names of the workflows with the smallest misfit, in file order."""
    misfit = nearest_workflows(c)
    least = min(misfit.values())
    return [name for name, count in misfit.items() if count == least]


# ---------------------------------------------------------------------------- unrolling it
# Seconds by which a shot that is cut to the beat may have to be longer than its even share: the
# space between two beats at the slowest tempo. Seconds that a trim at the film's end leaves of its
# last shot at least. Both ours.
BEAT_SLACK_S = 1.0
LAST_SHOT_S = 1.0


def clip_seconds(c: dict, lengths: tuple) -> list[float]:
    """Seconds to generate for each shot, of the lengths that a generator offers.

    Together the shortest that fill the asked duration, as even as that allows; where each clip is
    cut for itself (`needs_cuts`), each long enough for its part. The first length where no duration
    is asked, the longest where none is enough.

    >>> clip_seconds({"shots": 3, "duration_s": 15, "beat": False}, (4, 6, 8))  # trimmed by 1 s
    [6, 6, 4]
    """
    n, wanted = n_shots(c), c["duration_s"]
    if not wanted:
        return [lengths[0]] * n
    if needs_cuts(c, lengths):
        slack = BEAT_SLACK_S if c["beat"] else 0
        enough = [s for s in lengths if s >= wanted / n + slack]
        return [enough[0] if enough else lengths[-1]] * n
    return list(filled(n, wanted, lengths))


@lru_cache(maxsize=4096)
def filled(n: int, wanted: float, lengths: tuple) -> tuple[float, ...]:
    """The lengths of n clips that together last at least `wanted`: one after the other is made a
    step longer until they do."""
    base = max([i for i, s in enumerate(lengths) if s * n <= wanted], default=0)
    chosen = [base] * n
    at = 0
    while sum(lengths[i] for i in chosen) < wanted and min(chosen) < len(lengths) - 1:
        chosen[at % n] = min(chosen[at % n] + 1, len(lengths) - 1)
        at += 1
    return tuple(lengths[i] for i in chosen)


def needs_cuts(c: dict, lengths: tuple) -> bool:
    """Whether each clip is cut for itself before the join: to the beat, or because a trim at the
    film's end would leave too little of its last shot."""
    if n_shots(c) == 1:
        return False
    if c["beat"]:
        return True
    if not c["duration_s"]:
        return False
    seconds = filled(n_shots(c), c["duration_s"], lengths)
    return sum(seconds) - c["duration_s"] > seconds[-1] - LAST_SHOT_S


def finishing_needs(flow: list[dict], c: dict) -> set[str]:
    """Which of the steps cut, join and trim a film needs; they follow from clip lengths."""
    generator = next((step["tool"][0] for step in flow if step["key"] == "clip"), None)
    if not generator:
        return set()
    found = set()
    lengths = clip_lengths(generator)
    if needs_cuts(c, lengths):
        found.add("cut")
    elif c["duration_s"] and sum(clip_seconds(c, lengths)) != c["duration_s"]:
        found.add("trim")
    if n_shots(c) > 1 or {"music", "sfx"} & needs(c):
        found.add("join")
    return found


def times_of(step: dict, c: dict) -> int:
    """How often a template's step stands in the plan: once, once a shot, once for each picture that
    remains beside the reference; once a picture or a medium attached, in a family's workflow; or
    once for each picture or film, see `made_apart`."""
    if step.get("repeat") == "images":
        return c["images"]
    if step.get("repeat") == "attached":
        return (c.get("wish") or {}).get("attached", 1)
    if step.get("repeat") == "shots" and c["videos"] <= 1:
        return n_shots(c)
    if step.get("repeat") == "rest":
        return c["images"] - 1
    if made_apart(step, c):
        return max(c["images"], c["videos"])
    return 1


def made_apart(step: dict, c: dict) -> bool:
    """Whether each picture or film of a step gets a call and a description of its own: where
    variety is asked, and where several views of the user's picture are to be alike."""
    several = "{n} images" in step["goal"] or (step["key"] == "clip" and c["videos"] > 1)
    return several and bool(c.get("variety") or (step["key"] == "restyle" and c["consistency"]))


def step_goal(step: dict, index: int, times: int, c: dict) -> str:
    """The goal of a template's step for one request, the `index`-th (from 0) of `times` alike."""
    goal = step["goal"]
    if made_apart(step, c):
        goal = goal.replace("{n} images", "image {i}").replace("clip of", "clip {i} of")
    # The subject is said with the first of several shots; a single shot has no number.
    if index > 0:
        goal = goal.replace(" of {subject}", "")
    if times == 1 and step.get("repeat") != "rest":
        goal = goal.replace(" {i}", "")
    goal = goal.format(
        # The pictures edited from the first one are counted on from it.
        i=index + (2 if step.get("repeat") == "rest" else 1),
        n=c["images"] or c["videos"],
        shots=n_shots(c),
        subject=c["subject"],
    )
    if step["key"] == "clip" and c["videos"] > 1 and times == 1:
        goal = goal.replace("clip", f"{c['videos']} clips", 1)
    return goal


def step_after(feeds: list[list[int]], index: int, times: int) -> list[int]:
    """Ids that the `index`-th of `times` alike steps comes after. `feeds`: ids by feeding step.

    A feeding step that is repeated as often is paired with it, shot by shot.
    """
    after = set()
    for ids in feeds:
        paired = times > 1 and len(ids) == times
        after.update([ids[index]] if paired else ids)
    return sorted(after)


def expand_workflow(name: str, c: dict) -> list[dict]:
    """Unroll a workflow for one request, as a plan that an expert would write.

    Returns plan steps {id, tool, goal, after}, each with the expert's own {key, index, tools}:
    the template's step, which of its repetitions this is, and all tools that may do it.
    """
    flow = load_workflows()[name]["steps"]
    wanted = needs(c) | finishing_needs(flow, c)
    steps = []
    # Ids of the plan steps that a template's step became, by its key.
    made = {}
    # Keys that feed a step which is left out: what comes after it comes after these.
    feeds_of_absent = {}
    for step in flow:
        feeds = []
        for key in step["after"]:
            feeds += [key] if key in made else feeds_of_absent.get(key, [])
        if step.get("when", "") and step["when"] not in wanted:
            feeds_of_absent[step["key"]] = feeds
            continue
        times = times_of(step, c)
        first = len(steps) + 1
        for index in range(times):
            steps.append(
                {
                    "id": first + index,
                    "tool": step["tool"][0],
                    "goal": step_goal(step, index, times, c),
                    "after": step_after([made[key] for key in feeds], index, times),
                    "key": step["key"],
                    "index": index,
                    "tools": step["tool"],
                }
            )
        made[step["key"]] = list(range(first, first + times))
    return steps


# What an expert's plan depends on, beside the subject and how much is attached.
SHAPED_BY = ("images", "videos", "shots", "duration_s", "resolution", "beat", "family") + (
    ("transparent", "web_page", "input", "storyboard", "variety")
)
SAYS_HOW_MANY = re.compile(r"\d|\b(?:each|every)\b")


def shape_of(c: dict) -> tuple:
    """What requests with the same experts but for the subject have in common, to be looked up by.

    The subject is part of it only where it has a number, which may be read as that of the step.
    """
    subject = c["subject"] if SAYS_HOW_MANY.search(c["subject"]) else "it"
    attached = (c.get("wish") or {}).get("attached", 1)
    shown = (c["aspect_ratio"] == "1:1", bool(c["consistency"]), tuple(c["audio"]))
    return (subject, attached, *shown, *map(c.get, SHAPED_BY))


@lru_cache(maxsize=4096)
def experts(shape: tuple) -> list[tuple[str, list[dict], float]]:
    """(name, plan, price in US dollars) of each workflow that fits requests of a shape (`shape_of`)
    best; shared, so do not modify. The price is an estimate from tools.yaml, without retries."""
    subject, attached, square, consistency, audio, *values = shape
    c = dict(zip(SHAPED_BY, values)) | {"subject": subject, "wish": {"attached": attached}}
    c |= {"aspect_ratio": "1:1" if square else None, "consistency": consistency, "audio": audio}
    found = []
    for name in fitting_workflows(c):
        steps = expand_workflow(name, c)
        found.append((name, steps, sum(step_price(step, c) for step in steps)))
    return found


def step_price(step: dict, c: dict) -> float:
    """What the one call of an expert's plan step costs, with the tool's default arguments."""
    tool = load_tools().get(step["tool"])
    if not tool:
        return 0.0
    seconds = c["duration_s"] or 5.0
    if lengths := clip_lengths(step["tool"]):
        seconds = max(clip_seconds(c, lengths))
    number = NUMBER_MADE.search(step["goal"])
    n_made = int(number[1]) if number else 1
    # An analysis looks at all that is attached.
    looks = tool["makes"] == "nothing"
    n_given = (c.get("wish") or {}).get("attached", 1) if looks else n_made
    return call_price(step["tool"], seconds, n_made, n_given, c["resolution"] == "1080p")


# The number that an expert's goal states for what one call makes.
NUMBER_MADE = re.compile(r"\b(\d+) (?:images|clips)\b")


@lru_cache(maxsize=4096)
def call_price(name: str, seconds: float, n_made: int, n_given: int, full_hd: bool) -> float:
    """What one call of a tool costs that takes and makes so many media of so many seconds."""
    tool = load_tools()[name]
    stub = {"width": 1024, "height": 1536, "duration_s": seconds, "n_chars": 500}
    stub |= {"spoken_chars": 15 * seconds, "billed_s": seconds, "credits": 1}
    arguments = tool["blank"]
    if full_hd and "mode" in arguments:
        arguments = {**arguments, "mode": "pro"}
    return bill(tool["price_usd"], arguments, [stub] * n_made, [stub] * n_given)
