"""LtrReward: the Long Trajectory Reasoning Reward of VisionCreator (Sec. 4.3.2 and 4.3.4).

    R_vrt = R_plan x R_fine[R_tool + R_format + R_result + R_traj + R_cons]

Every part is one function of a trajectory record (env.VisGenEnv.trajectory) and returns a number in [0, 1] with its
named sub-scores. The paper names the parts and says what they look at; weights, grades and tolerances are not given,
so those here are ours, stand in RewardConfig and are said to be ours at the function. Rewards read the environment's
records, never the rendered text of tool messages. No torch: a reader can play with this file anywhere.

    python rewards.py trajectories.jsonl                 # scores with their reasons, sub-score by sub-score
    python rewards.py trajectories.jsonl --html          # also as a page beside the file
    python rewards.py trajectories.jsonl reward.form=result+format reward.judge=openai reward.llm.url=http://127.0.0.1:8123/v1
"""

import difflib
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import threading
from collections import Counter
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from env import ROOT, key, load_tools, page, to_json, tool_signature
from judge import JudgeConfig, ask_all

FORMS = ("plan*fine", "plan*(result+format)", "result+format", "plan+fine")
FACETS = ("requirement", "coherence", "executability", "atomicity", "optimality")
PARTS = ("tool", "format", "result", "traj", "cons")


@dataclass(frozen=True)
class RewardConfig:
    """LtrReward. The paper gives the parts and the product; every number below is ours."""

    form: str = key("plan*fine", "plan*fine: RL4, the paper's | plan*(result+format): RL2, RL3 | result+format: RL1 | "
                                 "plan+fine: a mean over all, the sum of VisionCreator-R1")
    judge: str = key("rules", "of R_plan and R_traj: rules (offline, deterministic, ours) | openai (the paper's LLM evaluators, see llm)")
    weights: dict = key({part: 1.0 for part in PARTS}, "of R_fine's parts; equal, as in VisionCreator-R1")
    facet_weights: dict = key({"requirement": 2.0, "coherence": 1.0, "executability": 1.0, "atomicity": 1.0, "optimality": 1.0},
                              "of R_plan's facets; the binary one counts double, since the rest is idle without it")
    duration_tolerance: float = key(0.05, "relative; a 4 s step between clip lengths never passes, a cut frame always does")
    size_tolerance: float = key(0.05, "relative, on the short side of 720p and 1080p; Kling's 1904x1088 passes")
    aspect_tolerance: float = key(0.05, "relative; 1344x768 passes as 16:9 (1.6 % off), 1344x704 does not (7.4 %)")
    llm: JudgeConfig = key(JudgeConfig(), "the LLM judge")


# ---------------------------------------------------------------------------------------------------------------------
# Config files, records, seeds and Ctrl-C, for the scripts that build on this one


def read_config(config, path, overrides=()):
    """`config` with a YAML file (None: none) on top, its `extends:` chain beneath, `section.key=value` strings above. SystemExit names what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = path and Path(path)
    if path and not path.is_file():
        known = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")))
        raise SystemExit(f"error: no config file {path}; configs here: {known}")
    for item in overrides:
        if "=" not in item:
            raise SystemExit(f"error: {item!r} is no override; write section.key=value, such as vrl.steps=3")
    try:
        sources = OmegaConf.load(path) if path else OmegaConf.create(), OmegaConf.from_dotlist(list(overrides))
        values, over = (OmegaConf.to_container(c, resolve=True) for c in sources)
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise SystemExit(f"error: {' or '.join(map(str, filter(None, (path, *overrides))))} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise SystemExit(f"error: {path} must hold `section:` entries, got a {type(values).__name__}")
    parent = values.pop("extends", None)
    return build(build(read_config(config, path.parent / parent) if parent else config, values), over)


def build(default, values, where=""):
    """`default` with YAML values in place of its own, at any depth; each must have its default's type, a list is replaced whole.

    SystemExit names the key of a wrong type, and for an unknown key the nearest known one.
    """
    known = {f.name: getattr(default, f.name) for f in fields(default)} if is_dataclass(default) else default
    if isinstance(known, dict) and isinstance(values, dict):
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise SystemExit(f"error: unknown config key `{where}{name}`; the nearest known key is `{where}{near}`")
        try:
            return type(default)(**{**known, **{name: build(known[name], value, f"{where}{name}.") for name, value in values.items()}})
        except ValueError as e:
            raise SystemExit(f"error: config key {e}") from e
    if isinstance(known, list) and isinstance(values, list) and known and is_dataclass(known[0]):
        return [build(type(known[0])(), value, f"{where[:-1]}[{i}].") for i, value in enumerate(values)]
    if type(values) is not type(known) and (type(known), type(values)) != (float, int):
        kind = "section of keys" if is_dataclass(default) else type(known).__name__
        raise SystemExit(f"error: config key `{where[:-1]}` must be of type {kind}, got {values!r} ({type(values).__name__})")
    return type(known)(values)


def write_atomic(path, text):
    """Write a text file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_jsonl(path, records):
    """Write records as JSON lines, whole or not at all."""
    write_atomic(path, "".join(to_json(r) + "\n" for r in records))


def read_jsonl(path):
    """Read JSON lines. SystemExit names a missing file, or the line that is not JSON."""
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing; `python train_vrl.py --config ...` makes it")
    records = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise SystemExit(f"error: {path}, line {i} is not JSON ({e.msg}); remove the file to make it again") from e
    return records


def print_keys(cls, values=None, where=""):
    """Print every config key with its default and meaning."""
    values = values or cls()
    for f in fields(cls):
        value = getattr(values, f.name)
        if is_dataclass(value):
            print(f"\n{where}{f.name}:  # {f.metadata['doc']}")
            print_keys(type(value), value, f"{where}{f.name}.")
        else:
            shown = [asdict(v) for v in value] if isinstance(value, list) and value and is_dataclass(value[0]) else value
            print(f"{where}{f.name} = {to_json(shown)}   # {f.metadata['doc']}")


def read_arguments(doc, switches, cls):
    """A script's command line: (config file, overrides, set of the switches given). `--keys` prints the keys of `cls` and exits."""
    import argparse

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"), help="experiment file (default: %(default)s)")
    parser.add_argument("--keys", action="store_true", help="print every config key with its default and meaning")
    for switch, text in switches:
        parser.add_argument(switch, action="store_true", help=text)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config values on top of the file's")
    args = parser.parse_args()
    if args.keys:
        print_keys(cls)
        raise SystemExit(0)
    return args.config, args.overrides, {switch for switch, _ in switches if getattr(args, switch.lstrip("-").replace("-", "_"))}


def open_run(config):
    """Create runs/<name>/ with the resolved config, or continue it; SystemExit if it belongs to another config.

    The `bench` section may differ: it changes what is measured, not what is trained.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise SystemExit(f"error: config key `name` is {config.name!r}; it names a folder under runs/: letters, digits, '.', '_' and '-'")
    run = ROOT / "runs" / config.name
    resolved = asdict(config)
    path = run / "config.yaml"
    if path.is_file():
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, value in resolved.items():
            if section == "bench" or there.get(section) == value:
                continue
            where, old, new = section, there.get(section), value
            if isinstance(value, dict) and isinstance(old, dict):
                inner = next(k for k in {**value, **old} if old.get(k, "absent") != value.get(k, "absent"))
                where, old, new = f"{section}.{inner}", old.get(inner, "absent"), value.get(inner, "absent")
            raise SystemExit(f"error: {run.relative_to(ROOT)} belongs to another config: `{where}` is {old!r} there and {new!r} now; "
                             f"give this run a name of its own (name=...) or remove the folder")
    elif run.exists() and any(run.iterdir()):
        raise SystemExit(f"error: {run.relative_to(ROOT)} is not empty and has no config.yaml; choose another name (name=...)")
    else:
        write_atomic(path, yaml.safe_dump(resolved, sort_keys=False))
    return run


def append_metrics(run, record):
    """Append one record to the run's metrics.jsonl."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(to_json(record) + "\n")


def draw(*parts):
    """A random.Random that depends on the parts alone, the same in every process."""
    return random.Random(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big"))


class StopSwitch:
    """Ctrl-C while it is entered only sets `on`, so that a step is finished and saved; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.on, self.main = False, threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, number, frame):
        self.on = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.before)


# ---------------------------------------------------------------------------------------------------------------------
# Expert references: workflow graphs unrolled for one request


@lru_cache(maxsize=1)
def load_workflows():
    """The 15 workflow templates of data/workflows.yaml, shared lists of steps spliced in."""
    text = (ROOT / "data" / "workflows.yaml").read_text(encoding="utf-8")
    workflows = yaml.safe_load(text)["workflows"]
    for flow in workflows.values():
        flow["steps"] = [s for entry in flow["steps"] for s in (entry if isinstance(entry, list) else [entry])]
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


def clip_lengths(tool):
    """Clip durations (s) that a video generator offers, from its JSON Schema; () for other tools."""
    return tuple(load_tools().get(tool, {}).get("parameters", {}).get("properties", {}).get("duration", {}).get("enum", ()))


def needs(c):
    """What a request asks of a workflow, as the words used in data/workflows.yaml. `c`: a task's constraints."""
    if c["images"]:
        found = {"many": c["images"] > 1, "large": c["resolution"] == "2K", "transparent": c["transparent"],
                 "web_page": c["web_page"], "consistent": bool(c["consistency"]) and c["images"] > 1, "input": c["input"],
                 "text": c["storyboard"] and c["images"] > 1 and bool(c["consistency"])}
    else:
        found = {"shots": n_shots(c) > 1, "square": c["aspect_ratio"] == "1:1", "beat": c["beat"],
                 "consistent": bool(c["consistency"]) and n_shots(c) > 1, **{a: True for a in c["audio"]}}
    return {need for need, present in found.items() if present}


def nearest_workflows(c):
    """{name: misfit} of the modality's workflows, best first, then in file order; misfit: needs left unserved + needs presupposed but absent."""
    wanted, modality = needs(c), "image" if c["images"] else "video"
    misfit = {name: len(wanted - {*f["requires"], *f["fits"]}) + len(set(f["requires"]) - wanted)
              for name, f in load_workflows().items() if f["modality"] == modality}
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
    words = {"n": c["images"] or c["videos"], "rest": c["images"] - 1, "shots": shots, "subject": c["subject"]}
    steps, made, wires = [], {}, {}      # made: key -> ids of its steps; wires: key -> keys that feed it once gaps are closed
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
            steps.append({"id": len(steps) + 1, "tool": step["tool"][0], "goal": goal, "after": after,
                          "key": step["key"], "index": i, "tools": step["tool"]})
            made[step["key"]].append(len(steps))
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# R_plan: the vPlanJudger's five facets, by rule


KIND_WORDS = {"image": r"images?|pictures?|posters?|frames?|illustrations?", "video": r"clips?|videos?|films?"}


def stated_count(goal, kind):
    """The number that a plan step's goal states for what it makes; 1 where it states none.

    >>> stated_count("4 images of a paper lantern", "image"), stated_count("clip 2 of a kite", "video")
    (4, 1)
    """
    found = re.search(rf"\b(\d{{1,3}}) (?:{KIND_WORDS[kind]})\b", goal)
    return int(found.group(1)) if found else 1


def makes(tool):
    """Kind of artifact that a tool makes ('llm' steps and unknown tools make text)."""
    return load_tools()[tool]["makes"] if tool in load_tools() else "text"


def takes(tool):
    """Kinds of media that a tool cannot do without, a set for each required media parameter."""
    entry = load_tools().get(tool, {})
    required = entry.get("parameters", {}).get("required", [])
    return [set(m["kinds"]) for name, m in entry.get("media", {}).items() if name in required and not {"or_text", "inside"} & set(m)]


def generates_clip(tool):
    """Whether a tool makes new footage (text or image to video)."""
    return load_tools().get(tool, {}).get("category") in ("Text-to-Video", "Image-to-Video")


def requirement_facet(plan, c):
    """Requirement Fulfillment, binary (counts are read from the goals, a convention of ours): carrying the plan out would give the asked modality and quantity."""
    if c["images"]:
        made = sum(stated_count(s["goal"], "image") for s in plan
                   if makes(s["tool"]) == "image" and not s["goal"].startswith("reference"))
        return float(made == c["images"])
    # A film that another step turns into a film is not the last one; a step that only looks at it changes nothing.
    used = {a for s in plan if makes(s["tool"]) == "video" and any("video" in kinds for kinds in takes(s["tool"])) for a in s["after"]}
    final = sum(stated_count(s["goal"], "video") for s in plan if makes(s["tool"]) == "video" and s["id"] not in used)
    clips = sum(stated_count(s["goal"], "video") for s in plan if generates_clip(s["tool"]))
    return float(final == c["videos"] and (not c["shots"] or clips == c["shots"] * c["videos"]))


def coherence_facet(plan, inputs):
    """Logical Coherence (grade ours): share of steps that come after what they need, and get each kind of media that they need."""
    seen, good = {}, 0
    given = {i["kind"] for i in inputs}
    for s in plan:
        fed = {seen[a] for a in s["after"] if a in seen} | given
        good += all(a in seen for a in s["after"]) and all(kinds & fed for kinds in takes(s["tool"])) and s["id"] not in seen
        seen[s["id"]] = makes(s["tool"])
    return good / len(plan)


def executability_facet(plan, pool):
    """Pragmatic Executability (grade ours): share of steps whose tool is in the pool, or that an LLM does itself."""
    return sum(s["tool"] in pool or s["tool"] == "llm" for s in plan) / len(plan)


def atomicity_facet(plan):
    """Decomposition Atomicity (grades ours): share of steps that make one thing, said in 2 to 16 words, and said only once."""
    repeated = Counter((s["tool"], s["goal"]) for s in plan)
    one = [2 <= len(s["goal"].split()) <= 16 and not re.search(r"\bthen\b|;", s["goal"]) and repeated[s["tool"], s["goal"]] == 1
           for s in plan]
    return sum(one) / len(plan)


def f1(found, wanted):
    """Harmonic mean of precision and recall of two multisets (Counters); 1 for two empty ones."""
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def optimality_facet(plan, c):
    """Expert-Guided Optimality: nearness to the best expert reference, half by steps, half by what feeds what (ours).

    Steps beyond the expert's, a missing reference image (identity) or beat step each cost precision or recall.
    """
    best = 0.0
    tool_of = {s["id"]: s["tool"] for s in plan}
    for name in fitting_workflows(c):
        expert = expand_workflow(name, c)
        # An alternative that the workflow allows counts as the tool it replaces.
        same = {tool: s["tools"][0] for s in expert for tool in s["tools"]}
        nodes = Counter(same.get(s["tool"], s["tool"]) for s in plan)
        edges = Counter((same.get(tool_of.get(a), tool_of.get(a)), same.get(s["tool"], s["tool"])) for s in plan for a in s["after"])
        wanted = {s["id"]: s["tool"] for s in expert}
        scores = [f1(nodes, Counter(wanted.values())),
                  f1(edges, Counter((wanted[a], s["tool"]) for s in expert for a in s["after"]))]
        best = max(best, sum(scores) / 2)
    return best


def plan_reward(plan, task, config, pool):
    """R_plan (Sec. 4.3.2): weighted mean of the five facets of the vPlanJudger, by rule. Returns (score, facets).

    An absent or unreadable plan scores 0 in every facet.
    """
    if not plan:
        return 0.0, dict.fromkeys(FACETS, 0.0)
    c = task["constraints"]
    facets = {"requirement": requirement_facet(plan, c), "coherence": coherence_facet(plan, task["inputs"]),
              "executability": executability_facet(plan, pool), "atomicity": atomicity_facet(plan),
              "optimality": optimality_facet(plan, c)}
    weight = config.facet_weights
    return sum(weight[f] * facets[f] for f in FACETS) / sum(weight[f] for f in FACETS), facets


# ---------------------------------------------------------------------------------------------------------------------
# R_fine: rule-based parts


def tool_reward(calls):
    """R_tool: 1.0 no failed call, 0.8 all failures repaired, 0.1 the last call failed, 0 none worked.

    The four grades are VisionCreator-R1's, their reading is ours. A failure is repaired by a later successful call of the
    same tool; failures that are not repaired take 0.8 down towards 0.1 by their share of the calls.

    >>> ok, bad = {"name": "a", "status": "ok"}, {"name": "a", "status": "error"}
    >>> tool_reward([ok]), tool_reward([bad, ok]), tool_reward([ok, bad]), tool_reward([bad])
    (1.0, 0.8, 0.1, 0.0)
    """
    ok = [call["status"] == "ok" for call in calls]
    if not any(ok):
        return 0.0
    if all(ok):
        return 1.0
    if not ok[-1]:
        return 0.1
    last_ok = {call["name"]: i for i, call in enumerate(calls) if call["status"] == "ok"}
    lost = sum(not good and last_ok.get(call["name"], -1) < i for i, (good, call) in enumerate(zip(ok, calls)))
    return 0.8 - 0.7 * lost / len(calls)


def format_reward(trajectory):
    """R_format: UTPC structure, the minimum over the turns (as in VisionCreator-R1); each fault takes 0.5 off its turn (ours).

    A first turn that calls tools without a plan, and an episode that does not end in an answer, score 0.
    """
    turns = trajectory["turns"]
    if trajectory["ended"] != "answer" or not turns or ("tool_call" in turns[0]["order"] and not trajectory["plan"]):
        return 0.0
    return min(max(0.0, 1.0 - 0.5 * len(turn["faults"])) for turn in turns)


def ancestors(artifact, by_id):
    """Ids of an artifact and of everything it was made from."""
    seen, todo = set(), [artifact["id"]]
    while todo:
        i = todo.pop()
        if i not in seen and i in by_id:
            seen.add(i)
            todo += [p["id"] for p in by_id[i]["parents"]]
    return seen


def deliverables(trajectory):
    """Artifacts that the answer hands over: made in this episode, each once, in the answer's order."""
    answer = trajectory["answer"] or {}
    by_id = {a["id"]: a for a in trajectory["artifacts"] if a["tool"] != "user"}
    return [by_id[i] for i in dict.fromkeys(answer.get("deliverables", [])) if i in by_id]


def consistency_reward(trajectory):
    """R_cons: where consistency is asked of several pictures or shots, the share made from one common reference (the grade is ours).

    The units are the delivered pictures, or the clips inside the delivered film; one of them may be the reference itself.
    None where the request asks for no consistency or for a single picture or shot.
    """
    c = trajectory["task"]["constraints"]
    expected = c["images"] or n_shots(c)
    if not c["consistency"] or expected < 2:
        return None
    by_id = {a["id"]: a for a in trajectory["artifacts"]}
    units = [a for a in deliverables(trajectory) if a["kind"] == "image"] if c["images"] else [
        by_id[i] for i in sorted({i for d in deliverables(trajectory) for i in ancestors(d, by_id)}) if generates_clip(by_id[i]["tool"])]
    shared = Counter(i for unit in units for i in ancestors(unit, by_id) if by_id[i]["kind"] == "image")
    together = max(shared.values(), default=0)
    return max(0, min(together, expected) - 1) / (max(expected, len(units)) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# R_fine: effect-based parts


def near(value, wanted, tolerance):
    """1 within the relative tolerance; outside it at most half, falling with the distance (ours).

    >>> near(8.0, 8, 0.05), near(6.0, 8, 0.05), near(16.0, 8, 0.05)
    (1.0, 0.375, 0.0)
    """
    off = abs(value - wanted) / wanted
    return 1.0 if off <= tolerance else 0.5 * max(0.0, 1.0 - off)


def count_score(found, wanted):
    """Share of a wanted number, too many costing like too few (ours).

    >>> count_score(4, 4), count_score(3, 4), count_score(5, 4)
    (1.0, 0.75, 0.8)
    """
    return min(found, wanted) / max(found, wanted) if found and wanted else 0.0


AUDIO_MAKERS = {"music": {"tool_music_suno"}, "narration": {"tool_tts_generation", "tool_tts_composite"},
                "sfx": {"tool_sound_fx_gen"}, "subtitles": {"tool_subtitle_add_text"}}


def result_reward(trajectory, config):
    """R_result: the mean over every constraint that the request states, 0 if the right modality is not delivered at all (grades ours).

    Returns (score, checks). Each check looks at the records of what the answer hands over, never at the agent's words.
    """
    c = trajectory["task"]["constraints"]
    handed = deliverables(trajectory)
    kind, wanted = ("image", c["images"]) if c["images"] else ("video", c["videos"])
    items = [a for a in handed if a["kind"] == kind]
    if not items:
        return 0.0, {"modality": 0.0}
    by_id = {a["id"]: a for a in trajectory["artifacts"]}
    lineage = {a["id"]: ancestors(a, by_id) for a in items}
    tools = {a["id"]: {by_id[i]["tool"] for i in lineage[a["id"]]} for a in items}

    def share(test):
        return sum(map(test, items)) / len(items)

    checks = {"count": count_score(len(items), wanted)}
    if c["aspect_ratio"]:
        w, h = map(int, c["aspect_ratio"].split(":"))
        checks["aspect"] = share(lambda a: abs(a["width"] * h / (a["height"] * w) - 1) <= config.aspect_tolerance)
    if c["duration_s"]:
        checks["duration"] = share(lambda a: near(a["duration_s"], c["duration_s"], config.duration_tolerance))
    if c["shots"]:
        checks["shots"] = share(lambda a: count_score(a["shots"], c["shots"]))
    if c["resolution"] == "2K":
        checks["resolution"] = share(lambda a: max(a["width"], a["height"]) >= 2048)
    elif c["resolution"]:
        checks["resolution"] = share(lambda a: min(a["width"], a["height"]) >= (1 - config.size_tolerance) * int(c["resolution"].rstrip("p")))
    if c["transparent"]:
        checks["transparent"] = share(lambda a: a["arguments"].get("background") == "transparent")
    if c["web_page"]:
        shown = [{p["id"] for p in a["parents"]} for a in handed if a["kind"] == "html"]
        checks["web_page"] = max((share(lambda a: a["id"] in ids) for ids in shown), default=0.0)
    for part in c["audio"]:
        checks[part] = share(lambda a: bool(AUDIO_MAKERS[part] & tools[a["id"]]))
    if c["beat"]:
        timed = {p["id"] for a in trajectory["artifacts"] if a["tool"] == "tool_beat_detect" for p in a["parents"]}
        checks["beat"] = share(lambda a: bool(timed & lineage[a["id"]]))
    if c["input"]:
        checks["input"] = share(lambda a: any(by_id[i]["tool"] == "user" for i in lineage[a["id"]]))
    return sum(checks.values()) / len(checks), checks


def words(text):
    """Content words of a phrase, lower case, articles left out."""
    return set(re.findall(r"[a-z0-9]+", text.lower())) - {"a", "an", "the"}


def coherence_reward(trajectory):
    """R_traj: planning intent against executed actions, by rule in place of the paper's LLM evaluator. Returns (score, parts).

    planned: share of the plan's tool steps that were carried out; executed: share of successful calls that the plan holds;
    on_topic: share of the request's subject and style words that reached the prompts from which the deliverables were made.
    Score = mean(planned, executed) x on_topic (ours).
    """
    plan, c = trajectory["plan"] or [], trajectory["task"]["constraints"]
    steps = Counter(s["tool"] for s in plan if s["tool"] != "llm")
    done = Counter(call["name"] for call in trajectory["calls"] if call["status"] == "ok")
    met = (steps & done).total()
    planned = met / steps.total() if steps else 0.0
    executed = met / done.total() if done else 0.0
    by_id = {a["id"]: a for a in trajectory["artifacts"]}
    wanted = words(c["subject"]) | words(c["style"] or "")
    items = [a for a in deliverables(trajectory) if a["kind"] == ("image" if c["images"] else "video")]
    said = [words(" ".join(str(by_id[i]["arguments"].get("prompt", "")) for i in ancestors(a, by_id))) for a in items]
    on_topic = sum(len(wanted & s) / len(wanted) for s in said) / len(said) if said and wanted else float(bool(said))
    parts = {"planned": planned, "executed": executed, "on_topic": on_topic}
    return (planned + executed) / 2 * on_topic, parts


# ---------------------------------------------------------------------------------------------------------------------
# The LLM judge: R_plan's vPlanJudger and R_traj's evaluator

def match_steps(plan, calls):
    """Rows (step, number of the call that carries it out or None, its status), successful calls first; and the numbers of the calls left over."""
    free, rows = dict(enumerate(calls, 1)), []
    for step in plan:
        number = min((i for i in free if free[i]["name"] == step["tool"]), key=lambda i: (free[i]["status"] != "ok", i), default=None)
        rows.append((step, number, free.pop(number)["status"] if number else None))
    return rows, list(free)


def judge_by_llm(found, config):
    """Put the LLM evaluators' verdicts in place of the rules' scores of plan and trajectory, NaN where none came; add their reasons.

    Retrieval of expert plans: the modality's workflows, unrolled for the task's own constraints, nearest in needs first. What is binary, Requirement
    Fulfillment, stays the rule's. An episode without a plan has 0 in all of this and is not asked about.
    """
    asked = []
    for x in (x for x in found if x["trajectory"]["plan"]):
        task, plan, calls, answer = (x["trajectory"][k] for k in ("task", "plan", "calls", "answer"))
        experts = [{"title": load_workflows()[name]["title"], "steps": [{k: s[k] for k in ("id", "tool", "goal", "after")} for s in
                    expand_workflow(name, task["constraints"])]} for name in list(nearest_workflows(task["constraints"]))[:config.llm.neighbours]]
        rows, spare = match_steps(plan, calls)
        asked += [(x, x["facets"], "prompts/plan_judge.jinja", FACETS, {
            "request": task["request"], "inputs": task["inputs"], "pool": [tool_signature(tool) for tool in sorted(x["pool"])],
            "facets": dict(x["facets"]), "experts": experts, "plan": plan})]
        asked += [(x, x["parts"], "prompts/trajectory_judge.jinja", ("traj",), {
            "request": task["request"], "plan": plan, "calls": calls, "matched": rows, "spare": spare, "checks": x["checks"], "answer": answer})]
    for (x, scores, _, names, _), verdict in zip(asked, ask_all(config.llm, [a[2:] for a in asked])):
        for name in (n for n in names if n != "requirement"):
            scores[name] = verdict[name]["score"] if verdict else math.nan
            x["reasons"][name] = verdict[name]["reason"] if verdict else "the judge gave no readable verdict"
        x["plan"] = sum(config.facet_weights[f] * x["facets"][f] for f in FACETS) / sum(config.facet_weights[f] for f in FACETS)


# ---------------------------------------------------------------------------------------------------------------------


def combine(plan, parts, config):
    """R_vrt from R_plan and the parts that apply (None is left out, not given away), for each of the config's forms."""
    if config.form not in FORMS:
        raise SystemExit(f"error: config key `reward.form` must be one of {', '.join(FORMS)}; got {config.form!r}")
    here = {p: v for p, v in parts.items() if v is not None}
    weight = {p: config.weights[p] for p in here}
    fine = sum(weight[p] * here[p] for p in here) / sum(weight.values())
    both = (here["result"] + here["format"]) / 2
    total = {"plan*fine": plan * fine, "plan*(result+format)": plan * both, "result+format": both,
             "plan+fine": (plan + sum(weight[p] * here[p] for p in here)) / (1 + sum(weight.values()))}[config.form]
    return {"total": total, "plan": plan, "fine": fine, **parts}


def ltr_reward(trajectory, config, pool=None):
    """LtrReward of one trajectory: {total, plan, fine, tool, format, result, traj, cons, facets, checks, reasons}.

    `pool`: tools that the agent was told of (default all 36). `cons` is None where consistency does not apply. `reasons`: an LLM
    judge's words. Where it failed its scores are NaN, and so is what is made of them.
    """
    return ltr_rewards([trajectory], config, [pool])[0]


def ltr_rewards(trajectories, config, pools=None):
    """ltr_reward of many trajectories; an LLM judges `reward.llm.concurrency` of them at once."""
    if config.judge not in ("rules", "openai"):
        raise SystemExit(f"error: config key `reward.judge` must be rules or openai; got {config.judge!r}")
    found = []
    for t, pool in zip(trajectories, pools or [None] * len(trajectories)):
        pool = set(load_tools()) if pool is None else set(pool)
        plan, facets = plan_reward(t["plan"], t["task"], config, pool)
        result, checks = result_reward(t, config)
        traj, coherence = coherence_reward(t)
        parts = {"tool": tool_reward(t["calls"]), "format": format_reward(t), "result": result, "traj": traj, "cons": consistency_reward(t)}
        found.append({"trajectory": t, "pool": pool, "plan": plan, "facets": facets, "parts": parts, "checks": {**checks, **coherence}, "reasons": {}})
    if config.judge == "openai":
        judge_by_llm(found, config)
    return [{**combine(x["plan"], x["parts"], config), **{k: x[k] for k in ("facets", "checks", "reasons")}} for x in found]


def explain(trajectory, reward, config):
    """Rows [name, score, weight, reason in words] of one trajectory's reward: the parts, the sub-scores of each two spaces in."""
    c = trajectory["task"]["constraints"]
    handed, name = deliverables(trajectory), fitting_workflows(c)[0]
    text = page("templates/reasons.jinja", t={**trajectory, "plan": trajectory["plan"] or []}, c=c, reward=reward, config=config, handed=handed,
                sizes=" and ".join(f"{a['width']}x{a['height']}" for a in handed if a["kind"] == ("image" if c["images"] else "video")),
                expert={"title": load_workflows()[name]["title"], "n": len(expand_workflow(name, c))})
    return [line.split("\t") for line in text.split("\n")]


def main():
    """Print the rewards of a JSONL file of trajectories part by part, with reasons; --html writes them to a page beside the file."""
    files, items = ([a for a in sys.argv[1:] if not a.startswith("-") and ("=" in a) == wanted] for wanted in (False, True))
    if len(files) != 1 or set(sys.argv[1:]) - {*files, *items, "--html"}:
        print(__doc__)
        raise SystemExit(0 if "-h" in sys.argv or "--help" in sys.argv else 2)
    file, config = Path(files[0]), read_config({"reward": RewardConfig()}, None, items)["reward"]
    trajectories = read_jsonl(file)
    rewards = ltr_rewards(trajectories, config, [t.get("pool") for t in trajectories])
    head = f"R_vrt {{total:.3f}} {'=' if config.form == 'plan*fine' else f'({config.form}) of'} plan {{plan:.3f}} x fine {{fine:.3f}}"
    pages = [{**t, "head": head.format(**r), "rows": explain(t, r, config)} for t, r in zip(trajectories, rewards)]
    for p in pages:
        print(f"{p['task']['id']}  {p['head']}   ended: {p['ended']}\n"
              f"  {p['task']['request']}\n  {'part':16}{'score':>7}{'weight':>8}  reason")
        print("".join(f"  {name:16}{score:>7}{weight:>8}  {reason}\n" for name, score, weight, reason in p["rows"]))
    if "--html" in sys.argv:
        page_file = file.with_name(file.name + ".html")
        write_atomic(page_file, page("templates/rewards.jinja", file=file.name, form=config.form, judge=config.judge, pages=pages))
        print(f"the same as a page: {page_file}")


if __name__ == "__main__":
    main()
