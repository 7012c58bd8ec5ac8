"""lib.workflows."""

import math
from functools import lru_cache

import yaml

from lib.runs import ROOT
from lib.toolbox import clip_lengths


# ---------------------------------------------------------------------------------------------------------------------
# Expert references: workflow graphs unrolled for one request
@lru_cache(maxsize=1)
def load_workflows():
    """The 15 workflow templates of data/workflows.yaml, shared lists of steps spliced in."""
    text = (ROOT / "data" / "workflows.yaml").read_text(encoding="utf-8")
    workflows = yaml.safe_load(text)["workflows"]
    for flow in workflows.values():
        flow["steps"] = [
            s for entry in flow["steps"] for s in (entry if isinstance(entry, list) else [entry])
        ]
    return workflows


def n_shots(c):
    """Shots of a film: as asked, else as many clips of at most 8 s as its duration needs."""
    return c["shots"] or (math.ceil(c["duration_s"] / 8) if c["duration_s"] else 1)


def clip_seconds(c, lengths):
    """Shortest clip that a generator offers (`lengths`, s) with which the shots fill the duration; the longest if none does.

    >>> clip_seconds({"shots": 3, "duration_s": 20}, (4, 6, 8))      # 3 x 8 = 24, later trimmed to 20
    8
    """
    if not c["duration_s"]:
        return lengths[0]
    return next((s for s in lengths if s * n_shots(c) >= c["duration_s"]), lengths[-1])


def needs(c):
    """What a request asks of a workflow, as the words used in data/workflows.yaml. `c`: a task's constraints."""
    if c["images"]:
        found = {
            "many": c["images"] > 1,
            "large": c["resolution"] == "2K",
            "transparent": c["transparent"],
            "web_page": c["web_page"],
            "consistent": bool(c["consistency"]) and c["images"] > 1,
            "input": c["input"],
            "text": c["storyboard"] and c["images"] > 1 and bool(c["consistency"]),
        }
    else:
        found = {
            "shots": n_shots(c) > 1,
            "square": c["aspect_ratio"] == "1:1",
            "beat": c["beat"],
            "consistent": bool(c["consistency"]) and n_shots(c) > 1,
            **{a: True for a in c["audio"]},
        }
    return {need for need, present in found.items() if present}


def nearest_workflows(c):
    """{name: misfit} of the modality's workflows, best first, then in file order; misfit: needs left unserved + needs presupposed but absent."""
    wanted, modality = needs(c), "image" if c["images"] else "video"
    misfit = {
        name: len(wanted - {*f["requires"], *f["fits"]}) + len(set(f["requires"]) - wanted)
        for name, f in load_workflows().items()
        if f["modality"] == modality
    }
    return dict(sorted(misfit.items(), key=lambda item: item[1]))


def fitting_workflows(c):
    """Names of the workflows that leave the fewest needs unserved and presuppose the fewest that are absent, in file order."""
    misfit = nearest_workflows(c)
    return [name for name, m in misfit.items() if m == min(misfit.values())]


def expand_workflow(name, c):
    """Unroll a workflow for one request: plan steps {id, tool, goal, after} plus the expert's own {key, index, tools}."""
    flow = load_workflows()[name]["steps"]
    wanted, shots = needs(c), n_shots(c)
    clip = next((s["tool"][0] for s in flow if s["key"] == "clip"), None)
    if clip:
        seconds = clip_seconds(c, clip_lengths(clip))
        if c["duration_s"] and seconds * shots != c["duration_s"]:
            # A trim that would take the whole last shot away is a change of speed instead.
            wanted.add("trim" if c["duration_s"] > seconds * (shots - 1) else "speed")
        if shots > 1 or {"music", "sfx"} & wanted:
            wanted.add("join")
    words = {
        "n": c["images"] or c["videos"],
        "rest": c["images"] - 1,
        "shots": shots,
        "subject": c["subject"],
    }
    steps, made, wires = (
        [],
        {},
        {},
    )  # made: key -> ids of its steps; wires: key -> keys that feed it once gaps are closed
    for step in flow:
        feeds = [k for a in step["after"] for k in ([a] if a in made else wires.get(a, []))]
        if step.get("when", "") and step["when"] not in wanted:
            wires[step["key"]] = feeds
            continue
        times = shots if step.get("repeat") == "shots" else 1
        made[step["key"]] = []
        for i in range(times):
            after = [made[k][i] if times > 1 and len(made[k]) == times else made[k] for k in feeds]
            after = sorted({j for a in after for j in (a if isinstance(a, list) else [a])})
            # The subject is said with the first of several shots; a single shot has no number.
            goal = step["goal"].replace(" of {subject}", "") if i else step["goal"]
            goal = (goal if times > 1 else goal.replace(" {i}", "")).format(i=i + 1, **words)
            if step["key"] == "clip" and c["videos"] > 1:
                goal = goal.replace("clip", f"{c['videos']} clips", 1)
            steps.append(
                {
                    "id": len(steps) + 1,
                    "tool": step["tool"][0],
                    "goal": goal,
                    "after": after,
                    "key": step["key"],
                    "index": i,
                    "tools": step["tool"],
                }
            )
            made[step["key"]].append(len(steps))
    return steps
