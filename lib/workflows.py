"""Expert workflows, and how one is unrolled for a request: the reference plans of R_plan.

data/workflows.yaml holds 15 templates (Sec. 3.1), each a graph of steps; data/families.yaml adds
one for each family of requests that need the other tools. They are VisionAgent's know-how, and the
"expert reference plans" that the vPlanJudger compares with (Sec. 4.3.2). The paper says that there
are 15; what is in them is ours. `c` is a task's constraints throughout.
"""

import math
from functools import lru_cache

import yaml

from lib.families import family_workflows
from lib.runs import ROOT
from lib.toolbox import clip_lengths


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
    """{name: misfit} of the modality's workflows, best first, then in file order.

    The misfit (ours) counts needs that it does not serve, and needs that it presupposes and that
    the request does not have.
    """
    wanted = needs(c)
    modality = "image" if c["images"] else "video"
    misfit = {}
    for name, flow in load_workflows().items():
        if flow["modality"] == modality:
            unserved = wanted - {*flow["requires"], *flow["fits"]}
            absent = set(flow["requires"]) - wanted
            misfit[name] = len(unserved) + len(absent)
    return dict(sorted(misfit.items(), key=lambda item: item[1]))


def fitting_workflows(c: dict) -> list[str]:
    """Names of the workflows with the smallest misfit, in file order."""
    misfit = nearest_workflows(c)
    least = min(misfit.values())
    return [name for name, count in misfit.items() if count == least]


# ---------------------------------------------------------------------------- unrolling it
def clip_seconds(c: dict, lengths: tuple) -> float:
    """Shortest clip (s) of those that a generator offers with which the shots fill the duration.

    The longest where none does, the first where no duration is asked.

    >>> clip_seconds({"shots": 3, "duration_s": 20}, (4, 6, 8))  # 3 x 8 = 24, later trimmed to 20
    8
    """
    if not c["duration_s"]:
        return lengths[0]
    enough = (s for s in lengths if s * n_shots(c) >= c["duration_s"])
    return next(enough, lengths[-1])


def finishing_needs(flow: list[dict], c: dict) -> set[str]:
    """Which of the steps join, trim and speed a film needs; they follow from clip lengths."""
    generator = next((step["tool"][0] for step in flow if step["key"] == "clip"), None)
    if not generator:
        return set()
    found = set()
    shots = n_shots(c)
    seconds = clip_seconds(c, clip_lengths(generator))
    if c["duration_s"] and seconds * shots != c["duration_s"]:
        # A trim that would take the whole last shot away is a change of speed instead.
        found.add("trim" if c["duration_s"] > seconds * (shots - 1) else "speed")
    if shots > 1 or {"music", "sfx"} & needs(c):
        found.add("join")
    return found


def step_goal(step: dict, index: int, times: int, c: dict) -> str:
    """The goal of a template's step for one request, the `index`-th (from 0) of `times` alike."""
    goal = step["goal"]
    # The subject is said with the first of several shots; a single shot has no number.
    if index > 0:
        goal = goal.replace(" of {subject}", "")
    if times == 1:
        goal = goal.replace(" {i}", "")
    goal = goal.format(
        i=index + 1,
        n=c["images"] or c["videos"],
        rest=c["images"] - 1,
        shots=n_shots(c),
        subject=c["subject"],
    )
    if step["key"] == "clip" and c["videos"] > 1:
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


def repeats(step: dict, c: dict) -> int:
    """How often a template's step stands in the plan of one request."""
    repeat = step.get("repeat")
    if repeat == "shots":
        return n_shots(c)
    if repeat == "images":
        return c["images"]
    return c["wish"]["attached"] if repeat == "attached" else 1


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
        times = repeats(step, c)
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
