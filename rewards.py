"""LtrReward: the Long Trajectory Reasoning Reward of VisionCreator (Sec. 4.3.2 and 4.3.4).

    R_vrt = R_plan x R_fine[R_tool + R_format + R_result + R_traj + R_cons]

Every part is one function of a trajectory record (env.VisGenEnv.trajectory) and returns a number in [0, 1] with its
named sub-scores. The paper names the parts and says what they look at; weights, grades and tolerances are not given,
so those here are ours, stand in lib/experiment.py and are said to be ours at the function. Rewards read the environment's
records, never the rendered text of tool messages. No torch: a reader can play with this file anywhere.

    python rewards.py trajectories.jsonl                 # scores with their reasons, sub-score by sub-score
    python rewards.py trajectories.jsonl --html          # also as a page beside the file
    python rewards.py trajectories.jsonl reward.form=result+format reward.judge=openai llm.url=http://127.0.0.1:8123/v1
"""

import math
import re
import sys
from collections import Counter
from pathlib import Path

from lib.experiment import LlmConfig, RewardConfig, read_config
from lib.judge import FACETS, judge_by_llm
from lib.lineage import content_words, deliverables, heard, on_topic, read_media, shows
from lib.runs import ROOT, read_jsonl, write_atomic
from lib.text import fill_template
from lib.toolbox import category, generates_clip, load_tools, makes, takes
from lib.workflows import expand_workflow, fitting_workflows, load_workflows, n_shots

PARTS = ("tool", "format", "result", "traj", "cons")
# Ours: seconds that a caption or a shot must stand to be seen. No config key: a convention of sight.
SHOWN_S = 0.5
# ---------------------------------------------------------------------------------------------------------------------
# R_plan: the vPlanJudger's five facets, by rule
KIND_WORDS = {
    "image": r"images?|pictures?|posters?|frames?|illustrations?",
    "video": r"clips?|videos?|films?",
}


def stated_count(goal, kind):
    """The number that a plan step's goal states for what it makes; 1 where it states none.

    >>> stated_count("4 images of a paper lantern", "image"), stated_count("clip 2 of a kite", "video")
    (4, 1)
    """
    found = re.search(rf"\b(\d{{1,3}}) (?:{KIND_WORDS[kind]})\b", goal)
    return int(found.group(1)) if found else 1


def requirement_facet(plan, c):
    """Requirement Fulfillment, binary: carrying the plan out would give the asked modality and quantity of the asked subject.

    Counts are read from the goals, a convention of ours. A picture is a means and not counted where its goal calls it a reference
    and a later step that makes pictures builds on it. A film that another step turns into a film is not the last one.
    """
    kind = "image" if c["images"] else "video"
    if not any(
        shows(s["goal"], c["subject"]) for s in plan if makes(s["tool"]) in ("image", "video")
    ):
        return 0.0
    used = {
        a
        for s in plan
        if makes(s["tool"]) == kind
        and (kind == "image" or any("video" in k for k in takes(s["tool"])))
        for a in s["after"]
    }
    made = sum(
        stated_count(s["goal"], kind)
        for s in plan
        if makes(s["tool"]) == kind
        and not (s["id"] in used and (kind == "video" or s["goal"].startswith("reference")))
    )
    clips = sum(stated_count(s["goal"], "video") for s in plan if generates_clip(s["tool"]))
    return float(
        made == (c["images"] or c["videos"])
        and (not c["shots"] or clips == c["shots"] * c["videos"])
    )


def coherence_facet(plan, inputs):
    """Logical Coherence (grade ours): share of steps that come after what they need, and get each kind of media that they need."""
    seen, good = {}, 0
    given = {i["kind"] for i in inputs}
    for s in plan:
        fed = {seen[a] for a in s["after"] if a in seen} | given
        good += (
            all(a in seen for a in s["after"])
            and all(kinds & fed for kinds in takes(s["tool"]))
            and s["id"] not in seen
        )
        seen[s["id"]] = makes(s["tool"])
    return good / len(plan)


def executability_facet(plan, pool):
    """Pragmatic Executability (grade ours): share of steps whose tool is in the pool, or that an LLM does itself."""
    return sum(s["tool"] in pool or s["tool"] == "llm" for s in plan) / len(plan)


def atomicity_facet(plan):
    """Decomposition Atomicity (grades ours): share of steps that make one thing, said in 2 to 16 words, and said only once."""
    repeated = Counter((s["tool"], s["goal"]) for s in plan)
    one = [
        2 <= len(s["goal"].split()) <= 16
        and not re.search(r"\bthen\b|;", s["goal"])
        and repeated[s["tool"], s["goal"]] == 1
        for s in plan
    ]
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
        edges = Counter(
            (same.get(tool_of.get(a), tool_of.get(a)), same.get(s["tool"], s["tool"]))
            for s in plan
            for a in s["after"]
        )
        wanted = {s["id"]: s["tool"] for s in expert}
        scores = [
            f1(nodes, Counter(wanted.values())),
            f1(edges, Counter((wanted[a], s["tool"]) for s in expert for a in s["after"])),
        ]
        best = max(best, sum(scores) / 2)
    return best


def weigh_facets(facets, plan, task, config):
    """R_plan from its facets: their weighted mean. A plan of more than `long_plan` times the steps of the shortest expert plan is scaled
    down by its length (ours): one facet of five would hardly see that nobody can follow it."""
    weight = config.facet_weights
    shortest = min(
        len(expand_workflow(name, task["constraints"]))
        for name in fitting_workflows(task["constraints"])
    )
    return (
        min(1.0, config.long_plan * shortest / len(plan))
        * sum(weight[f] * facets[f] for f in FACETS)
        / sum(weight[f] for f in FACETS)
    )


def plan_reward(plan, task, config, pool):
    """R_plan (Sec. 4.3.2): weighted mean of the five facets of the vPlanJudger, by rule. Returns (score, facets).

    An absent or unreadable plan scores 0 in every facet.

    >>> t = example()
    >>> plan_reward(t["plan"], t["task"], RewardConfig(), t["task"]["pool"])[0], plan_reward([], t["task"], RewardConfig(), ())[0]
    (1.0, 0.0)
    """
    if not plan:
        return 0.0, dict.fromkeys(FACETS, 0.0)
    facets = {
        "requirement": requirement_facet(plan, task["constraints"]),
        "coherence": coherence_facet(plan, task["inputs"]),
        "executability": executability_facet(plan, pool),
        "atomicity": atomicity_facet(plan),
        "optimality": optimality_facet(plan, task["constraints"]),
    }
    return weigh_facets(facets, plan, task, config), facets


def example():
    """The trajectory of data/example.jsonl, for the doctests below: three shots of one object, with music."""
    return read_jsonl(ROOT / "data" / "example.jsonl")[0]


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
    turns, lost_turns = (
        Counter(call["turn"] for call in calls),
        Counter(call["turn"] for call in lost),
    )
    share = max((n / turns[turn] for turn, n in lost_turns.items()), default=0.0)
    score = 0.0 if not any(ok) else 1.0 if all(ok) else 0.1 if not ok[-1] else 0.8 - 0.7 * share
    return score, {
        "worked": sum(ok) / max(1, len(ok)),
        "repaired": 1 - len(lost) / max(1, len(ok) - sum(ok)),
    }


def planned_first(turns):
    """Whether a plan stood before the first call, in the first turn."""
    first = turns[0]["order"] if turns else []
    return (
        "plan" in first
        and "plan" not in first[first.index("tool_call") if "tool_call" in first else len(first) :]
    )


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
    whole = (
        planned
        and trajectory["ended"] == "answer"
        and not any({"tool_call", "answer"} <= set(turn["order"]) for turn in turns)
    )
    forged = any(
        f["code"] == "unknown_tag" and "tool_response" in f["message"]
        for turn in turns
        for f in turn["faults"]
    )
    score = min(max(0.0, 1.0 - 0.5 * n) for n in faults) if whole and not forged else 0.0
    return score, {
        "clean": faults.count(0) / len(faults),
        "answered": float(trajectory["ended"] == "answer"),
        "planned_first": float(planned),
    }


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
    units = {
        m.looks[i]: i
        for d in deliverables(trajectory)
        if d["kind"] == kind
        for i in m.footage[d["id"]]
    }
    shared = Counter(
        i
        for unit in units.values()
        for i in m.above[unit]
        if m.by_id[i]["kind"] == "image"
        and (
            m.by_id[i]["tool"] == "user"
            or shows(str(m.by_id[i]["arguments"].get("prompt", "")), c["subject"])
        )
    )
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


AUDIO_MAKERS = {
    "music": {"tool_music_suno"},
    "narration": {"tool_tts_generation", "tool_tts_composite"},
    "sfx": {"tool_sound_fx_gen"},
    "subtitles": {"tool_subtitle_add_text"},
}


def audio_check(part, film, media, subject, config):
    """Whether a film has a sound part: music or effects over half of it, a narration or captions that name the subject (ours)."""
    audible = heard(film, media, config) if part != "subtitles" else media.above[film["id"]]
    for a in (media.by_id[i] for i in audible if media.by_id[i]["tool"] in AUDIO_MAKERS[part]):
        written = a["arguments"]
        if part == "subtitles":
            text = " ".join(
                cue["text"]
                for cue in written.get("subtitles", ())
                if cue["end"] - cue["start"] >= SHOWN_S
            )
        else:
            text = " ".join(
                [str(written.get("text", "")), *(s["text"] for s in written.get("segments", ()))]
            )
        if (
            audible[a["id"]] >= film["duration_s"] / 2
            if part in ("music", "sfx")
            else content_words(text) & content_words(subject)
        ):
            return True
    return False


def on_the_beat(film, media, config):
    """Whether beats were found in a music that is heard in the film, before the film that lays it under its clips was cut. That the cuts then fall
    on them is not checked: clips have lengths of whole seconds, and no workflow here trims each to the beat."""
    order = {i: n for n, i in enumerate(media.by_id)}
    timed = {
        p["id"]: order[a["id"]]
        for a in reversed(media.by_id.values())
        if a["tool"] == "tool_beat_detect"
        for p in a["parents"]
        if any(media.by_id[i]["tool"] in ("tool_music_suno", "user") for i in media.above[p["id"]])
    }
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
    asked = content_words(c["subject"]) | content_words(c["style"] or "")
    own = {
        a["id"]: list(
            {
                m.looks[i]: m.by_id[i] for i in m.footage[a["id"]] if on_topic(i, m, asked, config)
            }.values()
        )
        for a in items
    }

    def share(test):
        return sum(map(test, items)) / len(items)

    checks = {
        "count": min(len({m.looks[a["id"]] for a in items}), wanted)
        / max(sum(a["kind"] in ("image", "video", "audio") for a in handed), wanted)
    }
    if c["aspect_ratio"]:
        w, h = map(int, c["aspect_ratio"].split(":"))
        # Its footage has the shape too, or was cropped to it: not stretched, turned on its side or set between black bars.
        right = {
            i: abs(a["width"] * h / (a["height"] * w) - 1) <= config.aspect_tolerance
            for i, a in m.by_id.items()
            if a["kind"] == kind
        }
        ops = {
            a["id"]: {
                op["op"]
                for i in m.above[a["id"]]
                for op in m.by_id[i]["arguments"].get("operations", ())
            }
            for a in items
        }
        checks["aspect"] = share(
            lambda a: (
                right[a["id"]]
                and not a.get("letterboxed")
                and (
                    all(right[i] for i in m.footage[a["id"]])
                    or "crop" in ops[a["id"]]
                    and not {"resize", "rotate"} & ops[a["id"]]
                )
            )
        )
    if c["duration_s"]:
        checks["duration"] = share(
            lambda a: near(
                min(a["duration_s"], sum(r["duration_s"] for r in own[a["id"]])),
                c["duration_s"],
                config.duration_tolerance,
            )
        )
    if c["shots"]:
        seen = {a["id"]: sum(n >= SHOWN_S * a["fps"] for n in a["shot_frames"]) for a in items}
        checks["shots"] = share(
            lambda a: min(
                count_score(n, c["shots"])
                for n in (a["shots"], min(seen[a["id"]], sum(r["shots"] for r in own[a["id"]])))
            )
        )
    if c["resolution"]:  # the pictures and clips that went into it too: enlarging adds no detail
        long, least = (
            (max, 2048)
            if c["resolution"] == "2K"
            else (min, (1 - config.size_tolerance) * int(c["resolution"].rstrip("p")))
        )
        checks["resolution"] = share(
            lambda a: all(
                long(r["width"], r["height"]) >= least
                for r in (m.by_id[i] for i in m.above[a["id"]])
                if r["kind"] == kind and r["tool"] != "user"
            )
        )
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
        checks["input"] = share(
            lambda a: any(m.by_id[i]["tool"] == "user" for i in m.above[a["id"]])
        )
    mean, worst = sum(checks.values()) / len(checks), min(checks.values())
    return mean * (0.1 + 0.9 * worst**2), checks


def deeds(calls, plans):
    """(planned, executed): the share of the last plan's tool steps that were carried out, and the share of the calls that the plan of
    their time holds. Repaired failures are no calls of their own here, nor are calls that complete a partial result."""
    ok = [call for call in calls if call["status"] == "ok"]
    short = Counter(
        call["name"] for call in ok if 0 < len(call["outputs"]) < call["arguments"].get("n", 1)
    )
    done = Counter(
        {name: max(1, n - short[name]) for name, n in Counter(call["name"] for call in ok).items()}
    )
    steps, held = Counter(), 0
    for p, following in zip(plans, [*plans[1:], {"turn": math.inf}]):
        steps = Counter(s["tool"] for s in p["plan"] if s["tool"] != "llm")
        held += (
            steps
            & Counter(call["name"] for call in ok if p["turn"] <= call["turn"] < following["turn"])
        ).total()
    tried = done.total() + len(unrepaired(calls))
    return (steps & done).total() / max(1, steps.total()), min(1.0, held / max(1, tried))


def traj_reward(trajectory, config, media=None):
    """R_traj: planning intent against executed actions, by rule in place of the paper's LLM evaluator (the grades are ours).

    planned, executed: see `deeds`; wired: share of what was made from what in the deliverables that the last plan foresaw; on_topic:
    share of the request's subject and style words in the prompts behind the deliverables, over those asked or delivered, whichever are
    more, and 0 under a plan that never names the subject. Score = min(planned, executed, wired) x on_topic: none makes up for another.

    >>> traj_reward(example(), RewardConfig())
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
    edges = {
        (m.by_id[p["id"]]["tool"], m.by_id[i]["tool"])
        for item in items
        for i in m.above[item]
        for p in m.by_id[i]["parents"]
        if m.by_id[p["id"]]["tool"] != "user"
    }
    wired = len(edges & foreseen) / len(edges) if edges else 1.0
    wanted = content_words(c["subject"]) | content_words(c["style"] or "")
    topics = sorted((on_topic(item, m, wanted, config) for item in items), reverse=True)
    topic = (
        any(shows(s["goal"], c["subject"]) for s in plan)
        * sum(topics[:asked])
        / max(len(handed), asked)
    )
    return min(planned, executed, wired) * topic, {
        "planned": planned,
        "executed": executed,
        "wired": wired,
        "on_topic": topic,
    }


def combine(plan, parts, config):
    """R_vrt from R_plan and the parts that apply (None is left out, not given away), for each of the config's forms."""
    here = {p: v for p, v in parts.items() if v is not None}
    weight = {p: config.weights[p] for p in here}
    fine = sum(weight[p] * here[p] for p in here) / sum(weight.values())
    both = (here["result"] + here["format"]) / 2
    total = {
        "plan*fine": plan * fine,
        "plan*(result+format)": plan * both,
        "result+format": both,
        "plan+fine": (plan + sum(weight[p] * here[p] for p in here)) / (1 + sum(weight.values())),
    }[config.form]
    return {"total": total, "plan": plan, "fine": fine, **parts}


def judged_plan(trajectory, config, pool):
    """(plan, R_plan, facets) of the plan that counts; None and zeros where none stood before the first call. What is written well once the work is
    done is no plan, and does not make up for a bad one before it: of several the worst one counts."""
    plans = [p["plan"] for p in trajectory["plans"]] if planned_first(trajectory["turns"]) else []
    return min(
        ((p, *plan_reward(p, trajectory["task"], config, pool)) for p in plans or [None]),
        key=lambda judged: judged[1],
    )


def ltr_reward(trajectory, config, pool=None, llm=None):
    """LtrReward of one trajectory: {total, plan, fine, tool, format, result, traj, cons, facets, checks, reasons}.

    `pool`: tools that the agent was told of (default all 36). `cons` is None where consistency does not apply. `reasons`: an LLM
    judge's words. Where it failed its scores are NaN, and so is what is made of them.
    """
    return ltr_rewards([trajectory], config, [pool], llm)[0]


def ltr_rewards(trajectories, config, pools=None, llm=None):
    """ltr_reward of many trajectories; an LLM (`llm`) judges `llm.concurrency` of them at once."""
    found = []
    for t, pool in zip(trajectories, pools or [None] * len(trajectories)):
        pool = set(load_tools()) if pool is None else set(pool)
        plan, score, facets = judged_plan(t, config, pool)
        media = read_media(t)
        parts = {
            "tool": tool_reward(t["calls"]),
            "format": format_reward(t),
            "result": result_reward(t, config, media),
            "traj": traj_reward(t, config, media),
            "cons": consistency_reward(t, media),
        }
        found.append(
            {
                "trajectory": t,
                "pool": pool,
                "judged": plan,
                "plan": score,
                "facets": facets,
                "parts": {p: s for p, (s, _) in parts.items()},
                "checks": {
                    name: value for _, checks in parts.values() for name, value in checks.items()
                },
                "reasons": {},
            }
        )
    if config.judge == "openai":
        judge_by_llm(found, llm)
        for x in (x for x in found if x["judged"]):
            x["plan"] = weigh_facets(x["facets"], x["judged"], x["trajectory"]["task"], config)
    return [
        {
            **combine(x["plan"], x["parts"], config),
            **{k: x[k] for k in ("facets", "checks", "reasons")},
        }
        for x in found
    ]


def explain(trajectory, reward, config):
    """Rows [name, score, weight, reason in words] of one trajectory's reward: the parts, the sub-scores of each two spaces in."""
    c = trajectory["task"]["constraints"]
    handed, name = deliverables(trajectory), fitting_workflows(c)[0]
    plan, _, _ = judged_plan(trajectory, config, set(trajectory.get("pool") or load_tools()))
    text = fill_template(
        "templates/reasons.jinja",
        t={**trajectory, "plan": plan or []},
        c=c,
        reward=reward,
        config=config,
        handed=handed,
        sizes=" and ".join(
            f"{a['width']}x{a['height']}"
            for a in handed
            if a["kind"] == ("image" if c["images"] else "video")
        ),
        expert={"title": load_workflows()[name]["title"], "n": len(expand_workflow(name, c))},
    )
    return [line.split("\t") for line in text.split("\n")]


def main():
    """Print the rewards of a JSONL file of trajectories part by part, with reasons; --html writes them to a page beside the file."""
    files, items = (
        [a for a in sys.argv[1:] if not a.startswith("-") and ("=" in a) == wanted]
        for wanted in (False, True)
    )
    if len(files) != 1 or set(sys.argv[1:]) - {*files, *items, "--html"}:
        print(__doc__)
        raise SystemExit(0 if "-h" in sys.argv or "--help" in sys.argv else 2)
    file = Path(files[0])
    given = read_config({"reward": RewardConfig(), "llm": LlmConfig()}, None, items)
    config = given["reward"]
    trajectories = read_jsonl(file)
    rewards = ltr_rewards(trajectories, config, [t.get("pool") for t in trajectories], given["llm"])
    head = f"R_vrt {{total:.3f}} {'=' if config.form == 'plan*fine' else f'({config.form}) of'} plan {{plan:.3f}} x fine {{fine:.3f}}"
    pages = [
        {**t, "head": head.format(**r), "rows": explain(t, r, config)}
        for t, r in zip(trajectories, rewards)
    ]
    for p in pages:
        print(
            f"{p['task']['id']}  {p['head']}   ended: {p['ended']}\n"
            f"  {p['task']['request']}\n  {'part':16}{'score':>7}{'weight':>8}  reason"
        )
        print(
            "".join(
                f"  {name:16}{score:>7}{weight:>8}  {reason}\n"
                for name, score, weight, reason in p["rows"]
            )
        )
    if "--html" in sys.argv:
        page_file = file.with_name(file.name + ".html")
        write_atomic(
            page_file,
            fill_template(
                "templates/rewards.jinja",
                file=file.name,
                form=config.form,
                judge=config.judge,
                pages=pages,
            ),
        )
        print(f"the same as a page: {page_file}")


if __name__ == "__main__":
    main()
