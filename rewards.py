"""LtrReward: the Long Trajectory Reasoning Reward of VisionCreator (Sec. 4.3.2 and 4.3.4).

    R_vrt = R_plan x R_fine[R_tool + R_format + R_result + R_traj + R_cons]

Every part is one function of a trajectory record (env.VisGenEnv.trajectory) and returns a number in [0, 1] with its
named sub-scores. The paper names the parts and says what they look at; weights, grades and tolerances are not given,
so those here are ours, stand in configs/experiment.py and are said to be ours at the function. Rewards read the environment's
records, never the rendered text of tool messages. No torch: a reader can play with this file anywhere.

    python rewards.py trajectories.jsonl                 # scores with their reasons, sub-score by sub-score
    python rewards.py trajectories.jsonl --html          # also as a page beside the file
    python rewards.py trajectories.jsonl reward.form=result+format reward.judge=openai reward.llm.url=http://127.0.0.1:8123/v1
"""

import math
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import yaml

from configs.experiment import ROOT, RewardConfig, read_config, read_jsonl, write_atomic
from configs.llm import Endpoint, ask, run_jobs
from env import load_tools, page, tool_signature

FACETS = ("requirement", "coherence", "executability", "atomicity", "optimality")
PARTS = ("tool", "format", "result", "traj", "cons")


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


@lru_cache(maxsize=256)
def category(tool):
    """A tool's heading in Table 9; '' for 'llm' and unknown tools."""
    return load_tools().get(tool, {}).get("category", "")


@lru_cache(maxsize=256)
def makes(tool):
    """Kind of artifact that a tool makes; 'text' for 'llm' steps, unknown tools, and a search, whose finds nobody made."""
    return load_tools()[tool]["makes"] if tool in load_tools() and not tool.startswith("tool_search") else "text"


@lru_cache(maxsize=256)
def takes(tool):
    """Kinds of media that a tool cannot do without, a set for each required media parameter."""
    entry = load_tools().get(tool, {})
    required = entry.get("parameters", {}).get("required", [])
    return [set(m["kinds"]) for name, m in entry.get("media", {}).items() if name in required and not {"or_text", "inside"} & set(m)]


def generates_clip(tool):
    """Whether a tool makes new footage (text or image to video)."""
    return category(tool) in ("Text-to-Video", "Image-to-Video")


@lru_cache(maxsize=4096)
def words(text):
    """Content words of a phrase, lower case, articles left out; each Chinese character counts as a word.

    >>> words("The Café, 一只狐狸") == {"café", *"一只狐狸"}
    True
    """
    return frozenset(re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text.lower())) - {"a", "an", "the"}


def shows(text, subject):
    """Whether a text names the subject: at least half of its words (ours)."""
    return 2 * len(words(text) & words(subject)) >= len(words(subject))


def requirement_facet(plan, c):
    """Requirement Fulfillment, binary: carrying the plan out would give the asked modality and quantity of the asked subject.

    Counts are read from the goals, a convention of ours. A picture is a means and not counted where its goal calls it a reference
    and a later step that makes pictures builds on it. A film that another step turns into a film is not the last one.
    """
    kind = "image" if c["images"] else "video"
    if not any(shows(s["goal"], c["subject"]) for s in plan if makes(s["tool"]) in ("image", "video")):
        return 0.0
    used = {a for s in plan if makes(s["tool"]) == kind and (kind == "image" or any("video" in k for k in takes(s["tool"]))) for a in s["after"]}
    made = sum(stated_count(s["goal"], kind) for s in plan if makes(s["tool"]) == kind and not (
        s["id"] in used and (kind == "video" or s["goal"].startswith("reference"))))
    clips = sum(stated_count(s["goal"], "video") for s in plan if generates_clip(s["tool"]))
    return float(made == (c["images"] or c["videos"]) and (not c["shots"] or clips == c["shots"] * c["videos"]))


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
    for expert in (expand_workflow(name, c) for name in fitting_workflows(c)):
        # An alternative that the workflow allows counts as the tool it replaces.
        same = {tool: s["tools"][0] for s in expert for tool in s["tools"]}
        nodes = Counter(same.get(s["tool"], s["tool"]) for s in plan)
        edges = Counter((same.get(tool_of.get(a), tool_of.get(a)), same.get(s["tool"], s["tool"])) for s in plan for a in s["after"])
        wanted = {s["id"]: s["tool"] for s in expert}
        scores = [f1(nodes, Counter(wanted.values())),
                  f1(edges, Counter((wanted[a], s["tool"]) for s in expert for a in s["after"]))]
        best = max(best, sum(scores) / 2)
    return best


def weigh_facets(facets, plan, task, config):
    """R_plan from its facets: their weighted mean. A plan of more than `long_plan` times the steps of the shortest expert plan is scaled
    down by its length (ours): one facet of five would hardly see that nobody can follow it."""
    weight = config.facet_weights
    shortest = min(len(expand_workflow(name, task["constraints"])) for name in fitting_workflows(task["constraints"]))
    return min(1.0, config.long_plan * shortest / len(plan)) * sum(weight[f] * facets[f] for f in FACETS) / sum(weight[f] for f in FACETS)


def plan_reward(plan, task, config, pool):
    """R_plan (Sec. 4.3.2): weighted mean of the five facets of the vPlanJudger, by rule. Returns (score, facets).

    An absent or unreadable plan scores 0 in every facet.

    >>> t = example()
    >>> plan_reward(t["plan"], t["task"], RewardConfig(), t["task"]["pool"])[0], plan_reward([], t["task"], RewardConfig(), ())[0]
    (1.0, 0.0)
    """
    if not plan:
        return 0.0, dict.fromkeys(FACETS, 0.0)
    facets = {"requirement": requirement_facet(plan, task["constraints"]), "coherence": coherence_facet(plan, task["inputs"]),
              "executability": executability_facet(plan, pool), "atomicity": atomicity_facet(plan),
              "optimality": optimality_facet(plan, task["constraints"])}
    return weigh_facets(facets, plan, task, config), facets


def example():
    """The trajectory of data/example.jsonl, for the doctests below: three shots of one object, with music."""
    return read_jsonl(ROOT / "data" / "example.jsonl")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Lineage: what a delivered artifact really consists of


def deliverables(trajectory):
    """Artifacts that the answer hands over: made in this episode (not attached, not found), each once, in the answer's order."""
    answer = trajectory["answer"] or {}
    by_id = {a["id"]: a for a in trajectory["artifacts"] if a["tool"] != "user" and makes(a["tool"]) == a["kind"]}
    return [by_id[i] for i in dict.fromkeys(answer.get("deliverables", [])) if i in by_id]


def read_media(trajectory):
    """An episode's artifacts in the order of their making: `by_id`; `above`, {id: ids of it and of all that it was made from};
    `footage`, {id: ids of the films that it consists of, which were made of no other film; a picture's is itself}; and `looks`.

    looks, {id: key}: the same key for what looks alike (a convention of ours, since records hold no pixels): what one seed and prompt
    made, clips of one picture told the same, and, where no consistency is asked, a picture and its edits. Without a seed every call
    gives something new, and the n of one call differ. A film looks like its footage.
    """
    by_id, above, footage, looks, calls = {}, {}, {}, {}, Counter()
    for a in trajectory["artifacts"]:
        i, written, parents = a["id"], a["arguments"], [p["id"] for p in a["parents"] if p["id"] in above]
        by_id[i], above[i] = a, {i}.union(*(above[p] for p in parents))
        films = [p for p in parents if by_id[p]["kind"] == a["kind"] == "video"]
        footage[i] = list(dict.fromkeys(f for p in films for f in footage[p])) or [i]
        pictures = [p for p in parents if by_id[p]["kind"] == a["kind"] == "image" and by_id[p]["tool"] != "user"]
        if films:
            seen = {looks[f] for f in footage[i]}
            looks[i] = seen.pop() if len(seen) == 1 else tuple(sorted(map(str, seen)))
        elif pictures and not trajectory["task"]["constraints"]["consistency"]:
            looks[i] = looks[pictures[0]]
        elif "seed" in written or category(a["tool"]) == "Image-to-Video":
            call = (a["tool"], written.get("prompt"), written.get("seed"), *parents)
            looks[i] = (*call, calls[call] % written.get("n", 1))
            calls[call] += 1
        else:
            looks[i] = i
    return SimpleNamespace(by_id=by_id, above=above, footage=footage, looks=looks)


def heard(film, media, config):
    """{id: seconds} of the films and sounds that can still be heard in a film; what is muted or replaced on the way is not."""
    found, todo = {}, [(film, film["duration_s"])]
    while todo:
        a, seconds = todo.pop()
        if a["id"] in found or a["kind"] == "video" and not a["has_audio"]:
            continue
        found[a["id"]], written = seconds, a["arguments"]
        for p in (media.by_id[p["id"]] for p in a["parents"]):
            laid = p["id"] == written.get("audio")
            volume = written.get("volume", 1) * (written.get("audio_volume", 1) if laid else written.get("original_volume", 1))
            dropped = written.get("keep_original_audio") is False or (written.get("audio") and not laid and written.get("audio_mode") == "replace")
            if volume >= config.quiet and not dropped and p["kind"] in ("video", "audio"):
                todo.append((p, seconds if a["kind"] == "audio" else min(seconds, p["duration_s"])))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# R_fine: rule-based parts. Each returns (score, named sub-scores)


def unrepaired(calls):
    """The failed calls that nothing repaired. A success repairs the two failures before it, as after two retries, of its tool or, where
    it makes pictures or clips, of one that makes them from the same (ours)."""
    lost, open_ = [], {}
    for call in calls:
        group = category(call["name"])
        failed = open_.setdefault(group if "-to-" in group else call["name"], [])
        if call["status"] == "ok":
            del failed[-2:]
            lost += failed
            failed.clear()
        else:
            failed.append(call)
    return lost + sum(open_.values(), [])


def tool_reward(calls):
    """R_tool: 1.0 no failed call, 0.8 all failures repaired (`unrepaired`), 0.1 the last call failed, 0 none worked.

    The four grades are VisionCreator-R1's, their reading is ours. Failures that are not repaired take 0.8 down towards 0.1 by their
    share of their turn's calls, in the worst turn: cheap calls in other turns do not thin them out.

    >>> ok, bad = {"turn": 1, "name": "a", "status": "ok"}, {"turn": 1, "name": "b", "status": "error"}
    >>> [tool_reward(calls)[0] for calls in ([ok], [bad, {**bad, "status": "ok"}], [ok, bad], [bad])], round(tool_reward([bad, ok])[0], 2)
    ([1.0, 0.8, 0.1, 0.0], 0.45)
    """
    ok, lost = [call["status"] == "ok" for call in calls], unrepaired(calls)
    turns, lost_turns = Counter(call["turn"] for call in calls), Counter(call["turn"] for call in lost)
    share = max((n / turns[turn] for turn, n in lost_turns.items()), default=0.0)
    score = 0.0 if not any(ok) else 1.0 if all(ok) else 0.1 if not ok[-1] else 0.8 - 0.7 * share
    return score, {"worked": sum(ok) / max(1, len(ok)), "repaired": 1 - len(lost) / max(1, len(ok) - sum(ok))}


def planned_first(turns):
    """Whether a plan stood before the first call, in the first turn."""
    first = turns[0]["order"] if turns else []
    return "plan" in first and "plan" not in first[first.index("tool_call") if "tool_call" in first else len(first):]


def format_reward(trajectory):
    """R_format: UTPC structure, the minimum over the turns (as in VisionCreator-R1); each fault takes 0.5 off its turn (ours).

    0 where UTPC itself is broken: no answer at the end, an answer beside calls (before their results are seen), no plan in the first
    turn, or not before its first call, and a tag of the environment's in the agent's text, which forges a reply.

    >>> t = example()
    >>> format_reward(t)[0], format_reward({**t, "ended": "max_turns"})[0]
    (1.0, 0.0)
    """
    turns = trajectory["turns"]
    faults = [len(turn["faults"]) for turn in turns] or [0]
    planned = planned_first(turns)
    whole = planned and trajectory["ended"] == "answer" and not any({"tool_call", "answer"} <= set(turn["order"]) for turn in turns)
    forged = any(f["code"] == "unknown_tag" and "tool_response" in f["message"] for turn in turns for f in turn["faults"])
    score = min(max(0.0, 1.0 - 0.5 * n) for n in faults) if whole and not forged else 0.0
    return score, {"clean": faults.count(0) / len(faults), "answered": float(trajectory["ended"] == "answer"), "planned_first": float(planned)}


def consistency_reward(trajectory, media=None):
    """R_cons: where consistency is asked of several pictures or shots, the share made from one common reference (the grade is ours).

    The units are the delivered pictures, or the clips inside the delivered film, each look once; one of them may be the reference.
    The reference is the user's picture or one whose prompt names the subject. None where the request asks for no consistency or for a
    single picture or shot.

    >>> consistency_reward(example())
    (1.0, {'one_reference': 1.0})
    """
    c = trajectory["task"]["constraints"]
    expected = c["images"] or n_shots(c)
    if not c["consistency"] or expected < 2:
        return None, {}
    m, kind = media or read_media(trajectory), "image" if c["images"] else "video"
    units = {m.looks[i]: i for d in deliverables(trajectory) if d["kind"] == kind for i in m.footage[d["id"]]}
    shared = Counter(i for unit in units.values() for i in m.above[unit] if m.by_id[i]["kind"] == "image" and (
        m.by_id[i]["tool"] == "user" or shows(str(m.by_id[i]["arguments"].get("prompt", "")), c["subject"])))
    together, units = min(max(shared.values(), default=0), expected), max(expected, len(units))
    return max(0, together - 1) / (units - 1), {"one_reference": together / units}


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


@lru_cache(maxsize=4096)
def told(text, wanted, long):
    """Share of the wanted words in one prompt; 0 for one of more than `long` words, or that says most of its words again and again (ours).

    >>> told("a red fox at dusk", words("a red fox"), 200), told("a wall, " + "red fox, " * 9, words("a red fox"), 200)
    (1.0, 0.0)
    """
    said = words(text)
    return len(wanted & said) / len(wanted) if wanted and len(text.split()) <= min(long, 2 * len(said) + 4) else 0.0


def on_topic(item, media, wanted, config):
    """Share of the wanted words in the best prompt behind a picture; in a film, of its worst clip, since one prompt must not stand for all."""
    return min(max((told(str(media.by_id[i]["arguments"].get(name, "")), wanted, config.long_prompt) for i in media.above[part]
                    for name in ("prompt", "topic") if makes(media.by_id[i]["tool"]) in ("image", "video")), default=0.0) for part in media.footage[item])


AUDIO_MAKERS = {"music": {"tool_music_suno"}, "narration": {"tool_tts_generation", "tool_tts_composite"},
                "sfx": {"tool_sound_fx_gen"}, "subtitles": {"tool_subtitle_add_text"}}


def audio_check(part, film, media, subject, config):
    """Whether a film has a sound part: music or effects over half of it, a narration or captions that name the subject (ours)."""
    audible = heard(film, media, config) if part != "subtitles" else media.above[film["id"]]
    for a in (media.by_id[i] for i in audible if media.by_id[i]["tool"] in AUDIO_MAKERS[part]):
        written = a["arguments"]
        if part == "subtitles":
            text = " ".join(cue["text"] for cue in written.get("subtitles", ()) if cue["end"] - cue["start"] >= config.shown_s)
        else:
            text = " ".join([str(written.get("text", "")), *(s["text"] for s in written.get("segments", ()))])
        if audible[a["id"]] >= film["duration_s"] / 2 if part in ("music", "sfx") else words(text) & words(subject):
            return True
    return False


def on_the_beat(film, media, config):
    """Whether beats were found in a music that is heard in the film, before the film that lays it under its clips was cut. That the cuts then fall
    on them is not checked: clips have lengths of whole seconds, and no workflow here trims each to the beat."""
    order = {i: n for n, i in enumerate(media.by_id)}
    timed = {p["id"]: order[a["id"]] for a in reversed(media.by_id.values()) if a["tool"] == "tool_beat_detect" for p in a["parents"]
             if any(media.by_id[i]["tool"] in ("tool_music_suno", "user") for i in media.above[p["id"]])}
    films = [a for i in heard(film, media, config) if (a := media.by_id[i])["kind"] == "video"]
    return any(timed.get(p["id"], math.inf) < order[a["id"]] for a in films for p in a["parents"])


def result_reward(trajectory, config, media=None):
    """R_result: how far what the answer hands over meets every constraint that the request states (grades ours).

    Score = mean of the checks x (0.1 + 0.9 x the worst of them squared), 0 without the right modality: VisionCreator-R1 has {0, 1}, and
    a wish that is missed is not made up for by the others, while the mean keeps a slope. Each check looks at the records and their lineage:
    copies count as one, a film's length and shots are at most those of its footage, and what is muted or stretched does not count.

    >>> score, checks = result_reward(example(), RewardConfig())
    >>> score, list(checks)
    (1.0, ['count', 'duration', 'shots', 'music'])
    """
    c = trajectory["task"]["constraints"]
    handed = deliverables(trajectory)
    kind, wanted = ("image", c["images"]) if c["images"] else ("video", c["videos"])
    items = [a for a in handed if a["kind"] == kind]
    if not items:
        return 0.0, {"modality": 0.0}
    m = media or read_media(trajectory)
    # A film's own footage: each look once, however often it is repeated, slowed down or cut; and nothing of which no word was asked for.
    asked = words(c["subject"]) | words(c["style"] or "")
    own = {a["id"]: list({m.looks[i]: m.by_id[i] for i in m.footage[a["id"]] if on_topic(i, m, asked, config)}.values()) for a in items}

    def share(test):
        return sum(map(test, items)) / len(items)

    checks = {"count": min(len({m.looks[a["id"]] for a in items}), wanted) / max(sum(a["kind"] in ("image", "video", "audio") for a in handed), wanted)}
    if c["aspect_ratio"]:
        w, h = map(int, c["aspect_ratio"].split(":"))
        # Its footage has the shape too, or was cropped to it: not stretched, turned on its side or set between black bars.
        right = {i: abs(a["width"] * h / (a["height"] * w) - 1) <= config.aspect_tolerance for i, a in m.by_id.items() if a["kind"] == kind}
        ops = {a["id"]: {op["op"] for i in m.above[a["id"]] for op in m.by_id[i]["arguments"].get("operations", ())} for a in items}
        checks["aspect"] = share(lambda a: right[a["id"]] and not a.get("letterboxed") and (
            all(right[i] for i in m.footage[a["id"]]) or "crop" in ops[a["id"]] and not {"resize", "rotate"} & ops[a["id"]]))
    if c["duration_s"]:
        checks["duration"] = share(lambda a: near(min(a["duration_s"], sum(r["duration_s"] for r in own[a["id"]])), c["duration_s"],
                                                  config.duration_tolerance))
    if c["shots"]:
        seen = {a["id"]: sum(n >= config.shown_s * a["fps"] for n in a["shot_frames"]) for a in items}
        checks["shots"] = share(lambda a: min(count_score(n, c["shots"]) for n in (
            a["shots"], min(seen[a["id"]], sum(r["shots"] for r in own[a["id"]])))))
    if c["resolution"]:      # the pictures and clips that went into it too: enlarging adds no detail
        long, least = (max, 2048) if c["resolution"] == "2K" else (min, (1 - config.size_tolerance) * int(c["resolution"].rstrip("p")))
        checks["resolution"] = share(lambda a: all(long(r["width"], r["height"]) >= least for r in (m.by_id[i] for i in m.above[a["id"]])
                                                   if r["kind"] == kind and r["tool"] != "user"))
    if c["transparent"]:
        checks["transparent"] = share(lambda a: a["arguments"].get("background") == "transparent")
    if c["web_page"]:
        shown = [{p["id"] for p in a["parents"]} for a in handed if a["kind"] == "html"]
        checks["web_page"] = float(any(ids >= {a["id"] for a in items} for ids in shown))
    for part in c["audio"]:
        checks[part] = share(lambda a: audio_check(part, a, m, c["subject"], config))
    if c["beat"]:
        checks["beat"] = share(lambda a: on_the_beat(a, m, config))
    if c["input"]:
        checks["input"] = share(lambda a: any(m.by_id[i]["tool"] == "user" for i in m.above[a["id"]]))
    mean, worst = sum(checks.values()) / len(checks), min(checks.values())
    return mean * (0.1 + 0.9 * worst ** 2), checks


def deeds(calls, plans):
    """(planned, executed): the share of the last plan's tool steps that were carried out, and the share of the calls that the plan of
    their time holds. Repaired failures are no calls of their own here, nor are calls that complete a partial result."""
    ok = [call for call in calls if call["status"] == "ok"]
    short = Counter(call["name"] for call in ok if 0 < len(call["outputs"]) < call["arguments"].get("n", 1))
    done = Counter({name: max(1, n - short[name]) for name, n in Counter(call["name"] for call in ok).items()})
    steps, held = Counter(), 0
    for p, following in zip(plans, [*plans[1:], {"turn": math.inf}]):
        steps = Counter(s["tool"] for s in p["plan"] if s["tool"] != "llm")
        held += (steps & Counter(call["name"] for call in ok if p["turn"] <= call["turn"] < following["turn"])).total()
    tried = done.total() + len(unrepaired(calls))
    return (steps & done).total() / max(1, steps.total()), min(1.0, held / max(1, tried))


def coherence_reward(trajectory, config, media=None):
    """R_traj: planning intent against executed actions, by rule in place of the paper's LLM evaluator (the grades are ours).

    planned, executed: see `deeds`; wired: share of what was made from what in the deliverables that the last plan foresaw; on_topic:
    share of the request's subject and style words in the prompts behind the deliverables, over those asked or delivered, whichever are
    more, and 0 under a plan that never names the subject. Score = min(planned, executed, wired) x on_topic: none makes up for another.

    >>> coherence_reward(example(), RewardConfig())
    (1.0, {'planned': 1.0, 'executed': 1.0, 'wired': 1.0, 'on_topic': 1.0})
    """
    c, m = trajectory["task"]["constraints"], media or read_media(trajectory)
    planned, executed = deeds(trajectory["calls"], trajectory["plans"])
    plan = trajectory["plans"][-1]["plan"] if trajectory["plans"] else []
    kind, asked = ("image", c["images"]) if c["images"] else ("video", c["videos"])
    handed = [a["id"] for a in deliverables(trajectory) if a["kind"] == kind]
    items = {m.looks[i]: i for i in handed}.values()
    tool_of = {s["id"]: s["tool"] for s in plan}
    foreseen = {(tool_of.get(a), s["tool"]) for s in plan for a in s["after"]}
    edges = {(m.by_id[p["id"]]["tool"], m.by_id[i]["tool"]) for item in items for i in m.above[item] for p in m.by_id[i]["parents"]
             if m.by_id[p["id"]]["tool"] != "user"}
    wired = len(edges & foreseen) / len(edges) if edges else 1.0
    wanted = words(c["subject"]) | words(c["style"] or "")
    topics = sorted((on_topic(item, m, wanted, config) for item in items), reverse=True)
    topic = any(shows(s["goal"], c["subject"]) for s in plan) * sum(topics[:asked]) / max(len(handed), asked)
    return min(planned, executed, wired) * topic, {"planned": planned, "executed": executed, "wired": wired, "on_topic": topic}


# ---------------------------------------------------------------------------------------------------------------------
# The LLM judge: R_plan's vPlanJudger and R_traj's evaluator (configs/llm.py is its client). A failed judgement is missing, never 0


ASKED = Counter()      # verdicts, failures, requests and tokens of this process, for the caps
SCORE = {"type": "object", "properties": {"reason": {"type": "string"}, "score": {"type": "number", "minimum": 0, "maximum": 1}},
         "required": ["reason", "score"], "additionalProperties": False}


def ask_all(llm, questions):
    """Verdicts {name: {reason, score}} on questions (template, names, values), in order; None where one failed, SystemExit above a cap."""
    judge = Endpoint(llm, "reward.llm", "the judge", "verdicts", ASKED)
    return run_jobs(judge, lambda question: ask(judge, question[0], dict.fromkeys(question[1], SCORE), question[2]), questions,
                    "LLM judge" if len(questions) >= 500 else "")


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
    for x in (x for x in found if x["judged"]):
        plan, (task, calls, answer) = x["judged"], (x["trajectory"][k] for k in ("task", "calls", "answer"))
        experts = [{**{k: load_workflows()[name][k] for k in ("title", "practice")},
                    "steps": [{k: s[k] for k in ("id", "tool", "goal", "after")} for s in expand_workflow(name, task["constraints"])]}
                   for name in list(nearest_workflows(task["constraints"]))[:config.llm.neighbours]]
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
        x["plan"] = weigh_facets(x["facets"], x["judged"], x["trajectory"]["task"], config)


def combine(plan, parts, config):
    """R_vrt from R_plan and the parts that apply (None is left out, not given away), for each of the config's forms."""
    here = {p: v for p, v in parts.items() if v is not None}
    weight = {p: config.weights[p] for p in here}
    fine = sum(weight[p] * here[p] for p in here) / sum(weight.values())
    both = (here["result"] + here["format"]) / 2
    total = {"plan*fine": plan * fine, "plan*(result+format)": plan * both, "result+format": both,
             "plan+fine": (plan + sum(weight[p] * here[p] for p in here)) / (1 + sum(weight.values()))}[config.form]
    return {"total": total, "plan": plan, "fine": fine, **parts}


def judged_plan(trajectory, config, pool):
    """(plan, R_plan, facets) of the plan that counts; None and zeros where none stood before the first call. What is written well once the work is
    done is no plan, and does not make up for a bad one before it: of several the worst one counts."""
    plans = [p["plan"] for p in trajectory["plans"]] if planned_first(trajectory["turns"]) else []
    return min(((p, *plan_reward(p, trajectory["task"], config, pool)) for p in plans or [None]), key=lambda judged: judged[1])


def ltr_reward(trajectory, config, pool=None):
    """LtrReward of one trajectory: {total, plan, fine, tool, format, result, traj, cons, facets, checks, reasons}.

    `pool`: tools that the agent was told of (default all 36). `cons` is None where consistency does not apply. `reasons`: an LLM
    judge's words. Where it failed its scores are NaN, and so is what is made of them.
    """
    return ltr_rewards([trajectory], config, [pool])[0]


def ltr_rewards(trajectories, config, pools=None):
    """ltr_reward of many trajectories; an LLM judges `reward.llm.concurrency` of them at once."""
    found = []
    for t, pool in zip(trajectories, pools or [None] * len(trajectories)):
        pool = set(load_tools()) if pool is None else set(pool)
        plan, score, facets = judged_plan(t, config, pool)
        media = read_media(t)
        parts = {"tool": tool_reward(t["calls"]), "format": format_reward(t), "result": result_reward(t, config, media),
                 "traj": coherence_reward(t, config, media), "cons": consistency_reward(t, media)}
        found.append({"trajectory": t, "pool": pool, "judged": plan, "plan": score, "facets": facets, "parts": {p: s for p, (s, _) in parts.items()},
                      "checks": {name: value for _, checks in parts.values() for name, value in checks.items()}, "reasons": {}})
    if config.judge == "openai":
        judge_by_llm(found, config)
    return [{**combine(x["plan"], x["parts"], config), **{k: x[k] for k in ("facets", "checks", "reasons")}} for x in found]


def explain(trajectory, reward, config):
    """Rows [name, score, weight, reason in words] of one trajectory's reward: the parts, the sub-scores of each two spaces in."""
    c = trajectory["task"]["constraints"]
    handed, name = deliverables(trajectory), fitting_workflows(c)[0]
    plan, _, _ = judged_plan(trajectory, config, set(trajectory.get("pool") or load_tools()))
    text = page("templates/reasons.jinja", t={**trajectory, "plan": plan or []}, c=c, reward=reward, config=config, handed=handed,
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
