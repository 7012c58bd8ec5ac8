"""LtrReward: the Long Trajectory Reasoning Reward of VisionCreator (Sec. 4.3.2 and 4.3.4).

    R_vrt = R_plan x R_fine[R_tool + R_format + R_result + R_traj + R_cons]

Each part is a function of a trajectory record (env.VisGenEnv.trajectory). It returns a score in
[0, 1] and named sub-scores. Read the parts in the paper's order, then how they combine.

The paper names the parts and says what they look at. It gives no weights, grades or tolerances:
those are ours, stand in lib/experiment.py (RewardConfig), and are said to be ours at the function.
Rewards read the environment's records, never the rendered text of tool messages. There is no torch
here: a reader can play with this file anywhere.

    python rewards.py trajectories.jsonl           # scores with their reasons, part by part
    python rewards.py trajectories.jsonl --html    # also as a page beside the file
    python rewards.py trajectories.jsonl --speed   # how many a second, in place of their scores
    python rewards.py trajectories.jsonl reward.form=result+format reward.judge=openai \\
        llm.url=http://127.0.0.1:8123/v1
"""

import gc
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lib.claims import (
    THOUGHT_WORDS,
    is_misread,
    is_rambling,
    summary_faults,
    thoughts_of,
    untrue_thoughts,
)
from lib.experiment import LlmConfig, RewardConfig, read_config
from lib.families import asked_kind
from lib.judge import FACETS, Scored, judge_by_llm
from lib.lineage import (
    LOOKS,
    Media,
    deliverables,
    looked_at,
    looks_into,
    on_topic,
    prompt_of,
    read_media,
)
from lib.result_checks import result_checks
from lib.runs import ROOT, read_jsonl, run_command, write_atomic
from lib.spoiling import names_strangers
from lib.text import fill_template
from lib.toolbox import brings, category, generates_clip, load_tools, makes, takes
from lib.wishes import wish_checks, wish_words
from lib.words import (
    content_words,
    name_subject,
    positive_words,
    shows,
)
from lib.workflows import experts, load_workflows, n_shots, shape_of

PARTS = ("tool", "format", "result", "traj", "cons")

# What a part returns: its score, and the sub-scores that it was made from by name, all in [0, 1].
PartScore = tuple[float, dict[str, float]]


def example() -> dict:
    """The trajectory of data/example.jsonl, for the doctests: three shots of one object, music."""
    return read_jsonl(ROOT / "data" / "example.jsonl")[0]


def asked_for(c: dict) -> tuple[str, int]:
    """(kind of artifact, how many) a request asks for. `c`: its constraints, here as below.

    The kind is image or video; of some families of requests (data/families.yaml) text or audio.
    """
    return asked_kind(c), c["images"] or c["videos"]


# ---------------------------------------------------------------------------- R_plan
# The vPlanJudger's five facets, by rule. lib/judge.py has the LLM that the paper uses.
KIND_WORDS = {
    "image": r"images?|pictures?|posters?|frames?|illustrations?",
    "video": r"clips?|videos?|films?",
    "text": r"\w*\s?(?:prompts?|scripts?|boards?|texts?)",
    "audio": r"recordings?|songs?|pieces? of music|tracks?",
}
# The same in Chinese, with its measure word.
KIND_WORDS_ZH = {
    "image": "张图|张海报|幅画|幅插画",
    "video": "个片段|段视频|条视频|段影片",
    "text": "份[\u4e00-\u9fff]{0,2}(?:提示词|脚本|分镜|文字)",
    "audio": "段录音|段音乐|首歌|首曲子",
}
COUNTS = {
    kind: re.compile(
        rf"\b(\d{{1,3}}) (?:{words})\b|(?<![第\d])(\d{{1,3}})(?:{KIND_WORDS_ZH[kind]})"
    )
    for kind, words in KIND_WORDS.items()
}
EACH = re.compile(r"\b(?:each|every)\b|每[张个条段帧]")
SEVERAL = re.compile(r"\bthen\b|;|；|然后")
# A word of a goal; in Chinese two characters.
GOAL_WORD = re.compile("[\u4e00-\u9fff]{1,2}|[^\\s\u4e00-\u9fff]+")


@lru_cache(maxsize=8192)
def stated_count(goal: str, kind: str) -> int:
    """The number that a plan step's goal states for what it makes; 1 where it states none.

    >>> stated_count("4 images of a lantern", "image"), stated_count("clip 2 of a kite", "video")
    (4, 1)
    >>> stated_count("4张图片：一盏灯笼", "image"), stated_count("第2个片段", "video")
    (4, 1)
    """
    found = COUNTS[kind].search(goal)
    return int(found[1] or found[2]) if found else 1


def is_circular(plan: list[dict]) -> bool:
    """Whether some step comes after itself, directly or by way of others."""
    before = set()
    for step in plan:
        if step["id"] in before or not before.issuperset(step["after"]):
            break
        before.add(step["id"])
    else:  # every step comes after earlier ones alone, as in most plans
        return False
    feeds = {}
    for step in plan:
        feeds.setdefault(step["id"], set()).update(step["after"])
    open_ids = set(feeds)
    n_open = None
    while n_open != len(open_ids):
        n_open = len(open_ids)
        for i in feeds:
            if feeds[i].isdisjoint(open_ids):
                open_ids.discard(i)
    return bool(open_ids)


@lru_cache(maxsize=256)
def kin(tool: str) -> str:
    """What a tool is counted as where plan and deeds are compared: its category for those that make
    pictures or clips, which may stand in for one another, else itself (ours)."""
    makes_media = "-to-" in category(tool) and makes(tool) in ("image", "video")
    return category(tool) if makes_media else tool


@lru_cache(maxsize=256)
def by_results(tool: str) -> bool:
    """Whether a tool is counted by its results, and not by its calls: where it makes media."""
    return "-to-" in category(tool) and makes(tool) in KIND_WORDS


@lru_cache(maxsize=8192)
def units_of_step(tool: str, goal: str) -> int:
    """How many results, or calls, a plan step stands for: the number that its goal states; any
    number where it says "each", "every" or "all" of what is there already."""
    if by_results(tool):
        return stated_count(goal, makes(tool))
    return 99 if EACH.search(goal) else 1


def units_of_plan(plan: list[dict]) -> Counter:
    """{what it counts as: how many results or calls are planned}; what an LLM does is none."""
    units = Counter()
    for step in plan:
        if step["tool"] != "llm":
            units[kin(step["tool"])] += units_of_step(step["tool"], step["goal"])
    return units


def units_done(calls: list[dict]) -> Counter:
    """The same of calls that worked: results of those that make pictures or clips, else calls."""
    units = Counter()
    for call in calls:
        if call["status"] == "ok":
            name = call["name"]
            units[kin(name)] += len(call["outputs"]) if by_results(name) else 1
    return units


def lacks_a_step(plan: list[dict], needed: Counter) -> bool:
    """Whether what was handed over took results or calls that the plan does not hold."""
    return bool(needed - units_of_plan(plan))


def requirement_facet(plan: list[dict], c: dict, needed: Counter | None = None) -> float:
    """Requirement Fulfillment, 0 or 1: the plan would make what is asked for.

    That is the modality, the quantity and the subject. Counts are read from the goals, a convention
    of ours. A picture is a means and not counted where its goal calls it a reference and a later
    step that makes pictures builds on it. A film that another step turns into a film is not counted
    either. Two rules of ours: a circular plan makes nothing, since none of its steps can begin; and
    `needed`, the units that stand behind what was handed over in the end, must be in the plan: what
    lacks a step that was needed would not have made it.
    """
    kind, wanted = asked_for(c)
    visual = [step for step in plan if makes(step["tool"]) in ("image", "video", kind)]
    if not any(shows(step["goal"], c["subject"]) for step in visual):
        return 0.0
    if is_circular(plan) or lacks_a_step(plan, needed or Counter()):
        return 0.0

    # What a language model does itself is no artifact.
    makers = [s for s in plan if makes(s["tool"]) == kind and s["tool"] in load_tools()]
    built_on = set()
    for step in makers:
        builds = any(kind in kinds for kinds in takes(step["tool"]))
        if kind == "image" or builds:
            built_on.update(step["after"])
    made = 0
    for step in makers:
        may_be_means = kind != "image" or step["goal"].startswith(("reference", "参考图"))
        if not (step["id"] in built_on and may_be_means):
            made += stated_count(step["goal"], kind)

    clips = sum(stated_count(s["goal"], "video") for s in plan if generates_clip(s["tool"]))
    # One call of the pipeline makes a whole film of as many shots as it is told; a text or sound
    # has none.
    whole_films = any(s["tool"] == "tool_video_auto_pipeline" for s in plan) and not clips
    has_clips = kind == "video" and not whole_films
    right_clips = not c["shots"] or not has_clips or clips == c["shots"] * c["videos"]
    return float(made == wanted and right_clips)


def coherence_facet(plan: list[dict], inputs: list[dict]) -> float:
    """Logical Coherence of the plan in itself, before anything is done (the grade is ours).

    The share of steps that come after what they need, and get each kind of media that they need,
    from those steps or from the user's `inputs`; 0 for a circular plan, of which no step is in an
    order. R_traj, which compares plan and deeds, is another thing: see traj_reward.
    """
    if is_circular(plan):
        return 0.0
    given = {i["kind"] for i in inputs}
    kind_made = {}
    good = 0
    for step in plan:
        known = [kind_made[a] for a in step["after"] if a in kind_made]
        in_order = len(known) == len(step["after"])
        fed = given.union(known)
        supplied = all(kinds & fed for kinds in takes(step["tool"]))
        own_id = step["id"] not in kind_made
        good += in_order and supplied and own_id
        kind_made[step["id"]] = brings(step["tool"])
    return good / len(plan)


def executability_facet(plan: list[dict], pool: set[str]) -> float:
    """Pragmatic Executability: share of steps by a tool of the pool, or by an LLM (grade ours)."""
    return sum(step["tool"] in pool or step["tool"] == "llm" for step in plan) / len(plan)


# Words that say nothing of what a step makes or does. Ours.
VAGUE = frozenset(
    """do does done doing make go on it its this that these what is in of to and or thing things
    step steps part next now continue proceed work task job stuff ok some something start begin
    finish more again first second third last another
    第 步 做 下 一 继 续 这 那 个 它""".split()
)


@lru_cache(maxsize=8192)
def says_one_thing(goal: str, subject: str = "") -> bool:
    """Whether a goal is said in 2 to 16 words, without "then" or a semicolon, and one of its words
    says what is done. The request's subject counts as one word, however it is said.

    >>> says_one_thing("image of a cat; 1 of 9", "a cat; 1 of 9"), says_one_thing("a cat; a dog")
    (True, False)
    >>> says_one_thing("clip 2"), says_one_thing("step 2")
    (True, False)
    """
    own = goal.replace(subject, "it", 1) if subject else goal
    n_words, n_own = len(GOAL_WORD.findall(goal)), len(GOAL_WORD.findall(own))
    if n_words < 2 or n_own > 16 or SEVERAL.search(own):
        return False
    return not all(word in VAGUE or word.isdigit() for word in content_words(goal))


def atomicity_facet(plan: list[dict], subject: str = "") -> float:
    """Decomposition Atomicity: share of steps that make one thing (grade ours).

    Such a step `says_one_thing`, and says it only once. `subject`: the request's.
    """
    times = Counter((step["tool"], step["goal"]) for step in plan)
    atoms = sum(n == 1 and says_one_thing(goal, subject) for (_, goal), n in times.items())
    return atoms / len(plan)


def f1(found: Counter, wanted: Counter) -> float:
    """Harmonic mean of precision and recall of two multisets; 1 for two empty ones."""
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def plan_graph(plan: list[dict], counts_as: dict[str, str]) -> tuple[Counter, Counter]:
    """A plan as two multisets: its tools, and (tool, tool) for each step that feeds another.

    A step that makes n pictures or clips counts as n, so that one call for all and a call for each
    are the same plan. `counts_as`: {tool: the tool that it is counted as}. An unknown id feeds as
    None.
    """
    made = {}
    for step in plan:
        units = min(units_of_step(step["tool"], step["goal"]), 99)
        made[step["id"]] = (counts_as.get(step["tool"], step["tool"]), units)
    nodes, edges = Counter(), Counter()
    for step in plan:
        tool = counts_as.get(step["tool"], step["tool"])
        _, units = made[step["id"]]
        nodes[tool] += units
        for a in set(step["after"]):
            source, n_fed = made.get(a, (None, 1))
            edges[source, tool] += max(n_fed, units)
    return nodes, edges


@dataclass(frozen=True)
class Expert:
    """What is asked of an expert's plan: how often it has each tool, what alternatives count as,
    its graph (`plan_graph`), how many results and calls it stands for, its price (US dollars)."""

    tools: Counter
    counts_as: dict[str, str]
    nodes: Counter
    edges: Counter
    n_units: int
    price: float


@lru_cache(maxsize=4096)
def measured_experts(shape: tuple) -> list[Expert]:
    """The experts of requests of a shape, see lib/workflows.py; shared, so do not modify."""
    return [
        Expert(
            tools=Counter(step["tool"] for step in plan),
            # An alternative that the workflow allows counts as the tool it replaces.
            counts_as={tool: step["tools"][0] for step in plan for tool in step["tools"]},
            **dict(zip(("nodes", "edges"), plan_graph(plan, {}))),
            n_units=units_of_plan(plan).total(),
            price=price,
        )
        for _, plan, price in experts(shape)
    ]


def without_looks(plan: list[dict], tools: Counter) -> list[dict]:
    """A plan without the looks at its own media that the expert has not (`tools` are the expert's,
    with how often; ours): as many as see each picture and film once, up to LOOKS of one tool's at a
    time, since to check what came out is good practice. What came after a look comes after what the
    look came after, where it came after none of that itself."""
    planned = Counter(step["tool"] for step in plan if looks_into(step["tool"]))
    if planned <= tools:
        return plan
    known = tools & planned
    made = Counter()
    for step in plan:
        if makes(step["tool"]) in ("image", "video"):
            made[step["tool"]] += stated_count(step["goal"], makes(step["tool"]))
    left = sum(math.ceil(n / LOOKS) for n in made.values())
    gone = {}
    kept = []
    for step in plan:
        after = dict.fromkeys(a for a in step["after"] if a not in gone)
        for look in step["after"]:
            if look in gone and after.keys().isdisjoint(gone[look]):
                after |= dict.fromkeys(gone[look])
        if known[step["tool"]] > 0:
            known[step["tool"]] -= 1
            kept.append({**step, "after": list(after)})
        elif looks_into(step["tool"]) and left > 0:
            left -= 1
            gone[step["id"]] = list(after)
        else:
            kept.append({**step, "after": list(after)})
    return kept


def optimality_facet(plan: list[dict], c: dict) -> float:
    """Expert-Guided Optimality: nearness to the best expert reference plan (the measure is ours).

    Half by the tools, half by what feeds what, each as F1. Steps beyond the expert's cost
    precision, but for a look at what was made (`without_looks`); a reference image (identity) or a
    beat step that is missing costs recall.
    """
    best = 0.0
    for expert in measured_experts(shape_of(c)):
        nodes, edges = plan_graph(without_looks(plan, expert.tools), expert.counts_as)
        best = max(best, (f1(nodes, expert.nodes) + f1(edges, expert.edges)) / 2)
    return best


def weigh_facets(
    facets: dict[str, float], plan: list[dict], task: dict, config: RewardConfig
) -> float:
    """R_plan from its facets: their weighted mean, scaled down for a plan that is too long (ours).

    Too long is more than `long_plan` times the results that the shortest expert plan makes on its
    way: one facet of five would hardly see that nobody can follow it.
    """
    models = measured_experts(shape_of(task["constraints"]))
    shortest = min(expert.n_units for expert in models)
    n_steps = min(len(without_looks(plan, expert.tools)) for expert in models)
    brevity = min(1.0, config.long_plan * shortest / max(1, n_steps))
    weight = config.facet_weights
    weighted = sum(weight[f] * facets[f] for f in FACETS)
    return brevity * weighted / sum(weight[f] for f in FACETS)


def plan_reward(
    plan: list[dict] | None,
    task: dict,
    config: RewardConfig,
    pool: set[str],
    needed: Counter | None = None,
) -> PartScore:
    """R_plan (Sec. 4.3.2) by rule: (score, the five facets of the vPlanJudger).

    An absent or unreadable plan scores 0 in every facet. `pool`: the tools that the agent has.
    `needed`: the units behind what was handed over, see requirement_facet.

    >>> t = example()
    >>> plan_reward(t["plan"], t["task"], RewardConfig(), t["task"]["pool"])[0]
    1.0
    >>> plan_reward([], t["task"], RewardConfig(), ())[0]
    0.0
    """
    if not plan:
        return 0.0, dict.fromkeys(FACETS, 0.0)
    facets = {
        "requirement": requirement_facet(plan, task["constraints"], needed),
        "coherence": coherence_facet(plan, task["inputs"]),
        "executability": executability_facet(plan, pool),
        "atomicity": atomicity_facet(plan, task["constraints"]["subject"]),
        "optimality": optimality_facet(plan, task["constraints"]),
    }
    return weigh_facets(facets, plan, task, config), facets


# ---------------------------------------------------------------------------- R_tool (rule)
def repaired_by(tool: str) -> str:
    """What a success must share with a failure to repair it (ours).

    Its category for tools that make pictures or clips, such as Text-to-Image; else the tool.
    """
    return category(tool) if "-to-" in category(tool) else tool


def unrepaired(calls: list[dict]) -> list[dict]:
    """The failed calls that nothing repaired.

    A success repairs the two failures before it, as after two retries, of its tool or, where it
    makes pictures or clips, of one that makes them from the same (ours).
    """
    if all(call["status"] == "ok" for call in calls):
        return []
    lost = []
    waiting = {}
    for call in calls:
        failed = waiting.setdefault(repaired_by(call["name"]), [])
        if call["status"] == "ok":
            lost += failed[:-2]
            failed.clear()
        else:
            failed.append(call)
    for failed in waiting.values():
        lost += failed
    return lost


# Failures that come from the service and not from the agent. Of a failed call's weight they have
# a quarter. Both ours.
ACCIDENTS = {"timeout", "service_error", "no_output", "content_blocked"}
ACCIDENT_WEIGHT = 0.25


def failure_weight(call: dict) -> float:
    """How much a call counts as failed: 1, a quarter for an accident, 0 where it worked."""
    if call["status"] == "ok":
        return 0.0
    code = (call.get("error") or {}).get("code")
    return ACCIDENT_WEIGHT if code in ACCIDENTS else 1.0


def tool_reward(calls: list[dict], useful: float = 1.0) -> PartScore:
    """R_tool: execution success, with graded penalties for intermediate and final failures.

    1.0 no failed call, at most 0.8 all failures repaired (`unrepaired`), at most 0.1 the last call
    failed, 0 none worked. The four grades are VisionCreator-R1's, their reading is ours. Failures
    that are not repaired take 0.8 down towards 0.1 by their share of their turn's calls, in the
    worst turn: cheap calls in other turns do not thin them out. All of it is taken by `useful`, the
    share of calls and price that was of use (`useful_share`, ours), so that each further failure
    and each needless call costs.

    >>> ok, bad = [{"turn": 1, "name": n, "status": s} for n, s in (("a", "ok"), ("b", "error"))]
    >>> episodes = [ok], [bad, {**bad, "status": "ok"}], [ok, bad], [bad]
    >>> [tool_reward(calls)[0] for calls in episodes]
    [1.0, 0.8, 0.1, 0.0]
    >>> round(tool_reward([bad, ok])[0], 2), tool_reward([ok, ok], useful=0.5)[0]
    (0.45, 0.5)
    """
    ok = [call["status"] == "ok" for call in calls]
    lost = unrepaired(calls)
    calls_of_turn = Counter(call["turn"] for call in calls)
    lost_of_turn = Counter(call["turn"] for call in lost)
    worst_share = max((n / calls_of_turn[turn] for turn, n in lost_of_turn.items()), default=0.0)
    if not any(ok):
        score = 0.0
    elif all(ok):
        score = 1.0
    elif not ok[-1]:
        score = 0.1
    else:
        score = 0.8 - 0.7 * worst_share
    n_failed = len(ok) - sum(ok)
    return score * useful, {
        "worked": sum(ok) / max(1, len(ok)),
        "repaired": 1 - len(lost) / max(1, n_failed),
        "useful": useful,
    }


# ---------------------------------------------------------------------------- waste
def searches_for(call: dict, media: Media) -> bool:
    """Whether a call is no search by words, or one that names the request's subject (ours)."""
    if not call["name"].startswith("tool_search"):
        return True
    arguments = call["arguments"] or {}
    if "query" not in arguments:
        return True
    return name_subject(positive_words(str(arguments["query"]), media.subject), media.subject)


# What a look for flaws asks about; the legs of a spider are none of it. Ours.
FLAWS_ASKED = re.compile(
    r"flaw|blur|sharp|crisp|broken|whole|clean|clear|defect|imperfect|artifact|distort|deform|spoil"
    r"|damag|glitch|nois|crackl|fault|wrong|quality|as asked"
    r"|瑕疵|模糊|残缺|清晰|清楚|完整|干净|缺陷|毛病|变形|破损|杂音|质量"
)


def is_needless(call: dict, media: Media) -> bool:
    """Whether a call is of no use whatever it brought (ours): a search for something else than the
    subject; a look that is told one medium twice, or that asks of the agent's own nothing about
    flaws; a storyboard of characters that the request does not name."""
    arguments = call["arguments"] or {}
    if looks_into(call["name"]):
        seen = [media.by_id[i] for i in looked_at(call) if i in media.by_id]
        listed = arguments.get("media")
        twice = isinstance(listed, list) and len(set(map(str, listed))) < len(listed)
        own = any(a["tool"] != "user" for a in seen)
        return twice or own and not FLAWS_ASKED.search(str(arguments.get("question")).lower())
    return names_strangers(call, media) or not searches_for(call, media)


# Options of a search that cost twice. No wish asks for them.
DOUBLE = ("search_depth", "extract_depth")


def is_double(call: dict) -> bool:
    """Whether a search was paid twice for an option."""
    arguments = call["arguments"] or {}
    return call["name"].startswith("tool_search") and any(
        arguments.get(name) == "advanced" for name in DOUBLE
    )


def use_of_call(call: dict, used: set[str], media: Media) -> float:
    """Of what a call brought, the share that went into what was handed over (ours).

    Each picture and clip counts; of two songs, one is enough. Beats found, and a look at a picture,
    are of use where the medium looked at is. What `is_needless` is of none.
    """
    if is_needless(call, media):
        return 0.0
    outputs = [i for i in call["outputs"] if i in media.by_id]
    if not outputs:
        return float(bool(used & looked_at(call)))
    first = media.by_id[outputs[0]]
    if first["kind"] == "data":
        return float(any(p["id"] in used for p in first["parents"]))
    n_used = len(used.intersection(outputs))
    if first["kind"] in ("image", "video"):
        return n_used / len(outputs)
    return float(n_used > 0)


def useful_share(trajectory: dict, media: Media, config: RewardConfig) -> float:
    """Share of the calls that were of use, by their price against the expert's (ours).

    A failed call is of none, an accident of the service's in part (`failure_weight`). Of use is a
    call by what it brought (`use_of_call`); and, whatever came of it, as many calls of a tool as
    the expert plan has, such as a search whose finds go into words. A first look at what is handed
    over or led to it, before it is built on, is of use, and so is a take that a look showed flawed
    and that was made again (`retaken`). Sound that is ordered again though some is used counts
    as a failure as well, and a search at double price (`is_double`) as half. A price above `dear`
    times the expert's takes the share down by as much, and so does what options cost that no wish
    asks for (`plain_share`).
    """
    worked = [call for call in trajectory["calls"] if call["status"] == "ok"]
    if not worked:
        return 1.0
    c = trajectory["task"]["constraints"]
    models = measured_experts(shape_of(c))
    left = Counter(models[0].tools)
    used = media.behind | media.retaken
    if all(a["kind"] != asked_for(c)[0] for a in media.handed):
        # Another kind than the one asked for is of use to nobody.
        used = set()
    useful = 0.0
    failed = sum(map(failure_weight, trajectory["calls"]))
    idle = []
    looked = set()
    for call in worked:
        share = use_of_call(call, used, media)
        if is_double(call):
            useful -= 0.5
        if not call["outputs"]:
            if share:
                # A second look at the same is none, nor is one at what was built on before.
                share = float(bool(used & looked_at(call) - looked))
                looked |= looked_at(call)
        elif makes(call["name"]) in ("image", "video"):
            # A look at a film is late where it was asked for after all was joined.
            looked |= built_on(call, media)
        if share:
            left[call["name"]] -= 1
            useful += share
        elif not is_needless(call, media):
            idle.append(call["name"])
    # Sound that is ordered again though the first was good.
    failed += sum(makes(name) == "audio" and left[name] < models[0].tools[name] for name in idle)
    for name in idle:
        if left[name] > 0 and makes(name) not in ("image", "video", "audio"):
            left[name] -= 1
            useful += 1
    price = sum(call.get("price_usd", 0.0) for call in worked)
    allowed = config.dear * max(expert.price for expert in models)
    thrift = min(1.0, allowed / price) if price > allowed > 0 else 1.0
    return max(0.0, useful) / (len(worked) + failed) * min(thrift, plain_share(worked, c))


def built_on(call: dict, media: Media) -> set[str]:
    """Ids of the agent's own media that a call's results were made from."""
    made = [media.by_id[i] for i in call["outputs"] if i in media.by_id]
    parents = {p["id"] for a in made for p in a["parents"]}
    return {i for i in parents if i in media.by_id and media.by_id[i]["tool"] != "user"}


def plain_share(worked: list[dict], c: dict) -> float:
    """Share of the price that the same calls cost without dear options that no wish needs (ours).

    Dearer than its default is an option of a tool by tools.yaml's prices, such as `quality: high`
    or `mode: pro`. A resolution that is asked for needs it, and a last frame needs Kling's pro,
    unless it is the first one again.
    """
    if c["resolution"]:
        return 1.0
    paid = plain = 0.0
    for call in worked:
        price = call.get("price_usd", 0.0)
        paid += price
        first = call["arguments"].get("image")
        has_tail = call["arguments"].get("image_tail", first) != first
        plain += price * (1.0 if has_tail else option_price(call))
    return plain / paid if paid else 1.0


@lru_cache(maxsize=256)
def priced_by(tool: str) -> str | None:
    """The option that decides on a tool's price, if one does."""
    return load_tools()[tool]["price_usd"].get("by") if tool in load_tools() else None


def option_price(call: dict) -> float:
    """What a call's default option costs as a share of the option taken; 1 where it is no less."""
    option = priced_by(call["name"])
    if not option:
        return 1.0
    tool = load_tools()[call["name"]]
    default, taken = tool["blank"].get(option), call["arguments"].get(option)
    if taken is None or taken == default:
        return 1.0
    tables = [rates for rates in tool["price_usd"].values() if isinstance(rates, dict)]
    return min([1.0, *(rates[default] / rates[taken] for rates in tables)])


# ---------------------------------------------------------------------------- R_format (rule)
def planned_first(turns: list[dict]) -> bool:
    """Whether the first turn holds a plan before its first call, and none after it."""
    order = turns[0]["order"] if turns else []
    first_call = order.index("tool_call") if "tool_call" in order else len(order)
    return "plan" in order[:first_call] and "plan" not in order[first_call:]


# What thoughts and plans that say nothing, or nothing true, take of R_format, once. Ours: 0.05 of
# the whole reward at most, as a tiny policy thinks in few words and loses sight of them.
IDLE_THOUGHT = 0.2


def is_idle_talk(trajectory: dict, media: Media) -> bool:
    """Whether a turn's thought, or the summary, has a fault of lib/claims.py that costs little; a
    plan is the one before it; or what a look showed flawed is handed over as though it were
    clean."""
    plans = [plan["plan"] for plan in trajectory["plans"]]
    if any(plan == before for before, plan in zip(plans, plans[1:])):
        return True
    if any(turn.get("idle") for turn in trajectory["turns"]):
        return True
    thoughts = thoughts_of(trajectory.get("messages", []))
    if thoughts and is_misread(thoughts[0], trajectory["task"]["constraints"]):
        return True
    summary = str((trajectory["answer"] or {}).get("summary") or "")
    return is_rambling(summary, media.request) or is_blind(summary, media)


def is_blind(summary: str, media: Media) -> bool:
    """Whether a flaw that a look showed was let be: nothing was made again, and the summary does
    not say so."""
    if not media.shown & media.behind or media.retaken:
        return False
    return not FLAW.search(summary.lower())


# Words by which an answer owns up to a flaw. Ours.
FLAW = re.compile(r"\b(?:flaw|blur|defect|imperfect)|瑕疵|模糊|缺陷")


def format_reward(trajectory: dict, media: Media | None = None) -> PartScore:
    """R_format: UTPC structure, the minimum over the turns, as in VisionCreator-R1.

    Each fault takes 0.5 off its turn (ours), and a `<think>` of fewer than THOUGHT_WORDS different
    words is one, and one that claims what the records refute (`untrue_thoughts`); so are those of
    the answer (`summary_faults`). 0 where UTPC itself is broken: no answer at the end; an answer
    beside calls, before their results are seen; no plan in the first turn, or not before its first
    call; no thought in any turn; or a tag of the environment's anywhere in the agent's text, in a
    thought or in an argument as well, which forges a reply.
    IDLE_THOUGHT off the whole, once, for thoughts that repeat, mislead or never end
    (lib/claims.py), for a plan that is given again word for word, and for a flaw that was seen and
    let be (`is_idle_talk`).

    >>> t = example()
    >>> format_reward(t)[0], format_reward({**t, "ended": "max_turns"})[0]
    (1.0, 0.0)
    """
    turns = trajectory["turns"]
    thinks = [turn.get("thought", THOUGHT_WORDS) >= THOUGHT_WORDS for turn in turns] or [False]
    n_faults = [len(turn["faults"]) + (not thought) for turn, thought in zip(turns, thinks)] or [0]
    n_faults[-1] += summary_faults(trajectory)
    media = media or read_media(trajectory)
    for turn in untrue_thoughts(trajectory, media):
        n_faults[turn] += 1
    planned = planned_first(turns)
    answered = trajectory["ended"] == "answer"
    hasty = any({"tool_call", "answer"} <= set(turn["order"]) for turn in turns)
    forged = any(turn.get("forged") for turn in turns) or any(
        fault["code"] == "unknown_tag" and "tool_response" in fault["message"]
        for turn in turns
        for fault in turn["faults"]
    )
    thinking = sum(thinks) / len(thinks)
    score = 0.0
    if planned and answered and not hasty and not forged:
        score = min(thinking, *(max(0.0, 1.0 - 0.5 * n) for n in n_faults))
    if score and is_idle_talk(trajectory, media):
        score = max(0.0, score - IDLE_THOUGHT)
    return score, {
        "clean": n_faults.count(0) / len(n_faults),
        "answered": float(answered),
        "planned_first": float(planned),
    }


# ---------------------------------------------------------------------------- R_result (effect)
def result_reward(trajectory: dict, config: RewardConfig, media: Media | None = None) -> PartScore:
    """R_result: how far what the answer hands over meets what the request states (grades ours).

    Score = mean of the checks x (0.1 + 0.9 x the worst of them squared), 0 without the right
    modality. VisionCreator-R1 has {0, 1}: a wish that is missed is not made up for by the others,
    while the mean keeps a slope.

    >>> score, checks = result_reward(example(), RewardConfig())
    >>> score, list(checks)
    (1.0, ['count', 'duration', 'shots', 'style', 'music'])
    """
    c = trajectory["task"]["constraints"]
    kind, _ = asked_for(c)
    media = media or read_media(trajectory)
    handed = media.handed
    items = [a for a in handed if a["kind"] == kind]
    if not items:
        return 0.0, {"modality": 0.0}
    claimed = trajectory["answer"]["deliverables"]
    task, calls = trajectory["task"], trajectory["calls"]
    checks = result_checks(items, handed, claimed, task, media, config, calls)
    checks |= wish_checks(items, trajectory, media)
    mean = sum(checks.values()) / len(checks)
    worst = min(checks.values())
    return mean * (0.1 + 0.9 * worst**2), checks


# ---------------------------------------------------------------------------- R_traj (effect)
def planned_share(planned: Counter, calls: list[dict]) -> float:
    """Share of what the last plan holds, in units (`planned`), that was carried out (ours)."""
    done = units_done(calls)
    # "Each" in a goal stands for as many as there were.
    planned = Counter({name: n if n < 99 else max(1, done[name]) for name, n in planned.items()})
    return (planned & done).total() / max(1, planned.total())


def executed_share(units: list[Counter], calls: list[dict], plans: list[dict]) -> float:
    """Share of what was done that was planned (ours), the least of three: all of it by the last
    plan; each call by the plan of its time. So a plan that is revised after the deed holds for the
    deed as well, and one that was dropped holds for what was done under it. `units`: units_of_plan
    of each plan.

    Failures that were repaired are nothing that was done here; the others are calls that nobody
    planned, so that their share of the calls is a third measure.
    """
    if not plans:
        return 0.0
    lost = len(unrepaired(calls))
    worked = sum(call["status"] == "ok" for call in calls)
    done = units_done(calls)
    whole = (units[-1] & done).total()
    held = 0
    ends = [plan["turn"] for plan in plans[1:]] + [math.inf]
    for plan, planned, end in zip(plans, units, ends):
        under_it = [call for call in calls if plan["turn"] <= call["turn"] < end]
        done_then = units_done(under_it) if len(under_it) < len(calls) else done
        held += (planned & done_then).total()
    share_planned = min(whole, held) / max(1, done.total())
    return min(1.0, share_planned, worked / max(1, worked + lost))


def wired_share(items: list[str], plan: list[dict], media: Media) -> float:
    """Share of what was made from what, behind the `items`, that the plan foresaw (ours).

    Counted in pairs of tools, each once; what the user attached is left out. 1 where nothing was
    made from anything.
    """
    tool_of = {step["id"]: step["tool"] for step in plan}
    foreseen = {(tool_of.get(a), step["tool"]) for step in plan for a in step["after"]}
    behind = set().union(*(media.above[item] for item in items))
    wired = set()
    for made in (media.by_id[i] for i in behind):
        for parent in made["parents"]:
            source = media.by_id[parent["id"]]["tool"]
            if source != "user":
                wired.add((source, made["tool"]))
    return len(wired & foreseen) / len(wired) if wired else 1.0


# What a flaw takes of a picture or clip that the agent made and handed over. Ours.
FLAWED = 0.5


def flawed_share(item: str, media: Media) -> float:
    """Of a picture, or of a film's clips, the share that the agent made with a flaw."""
    parts = [media.by_id[i] for i in media.footage[item]]
    return sum(bool(a.get("flawed")) and a["tool"] != "user" for a in parts) / len(parts)


def without_retakes(trajectory: dict, media: Media) -> list[dict]:
    """The calls without what no plan can foresee: looks at media of the agent's own, and takes that
    a look showed flawed."""
    calls = []
    for call in trajectory["calls"]:
        seen = looked_at(call) if call["status"] == "ok" else set()
        if seen and all(media.by_id[i]["tool"] != "user" for i in seen):
            continue
        if media.retaken.isdisjoint(call["outputs"]):
            calls.append(call)
        elif kept := [i for i in call["outputs"] if i not in media.retaken]:
            calls.append({**call, "outputs": kept})
    return calls


def traj_reward(
    trajectory: dict, config: RewardConfig, media: Media | None = None, useful: float = 1.0
) -> PartScore:
    """R_traj: planning intent against executed actions (the grades are ours).

    By rule, in place of the paper's LLM evaluator (lib/judge.py). It looks at plan and deeds;
    whether the plan is sound in itself is coherence_facet's business. Sub-scores:

    planned, executed, wired: see planned_share, executed_share and wired_share.
    on_topic: share of the request's subject and style words in the prompts behind the deliverables,
    over the number asked or handed over, whichever is more; 0 under a plan that never names the
    subject. A picture or clip of the agent's with a flaw that a look would have shown counts half.

    Score = (min(planned, executed, wired) x useful) squared x on_topic; `useful` is the share of
    calls and price that was of use (`useful_share`). None makes up for another.

    >>> traj_reward(example(), RewardConfig())
    (1.0, {'planned': 1.0, 'executed': 1.0, 'wired': 1.0, 'on_topic': 1.0})
    """
    c = trajectory["task"]["constraints"]
    media = media or read_media(trajectory)
    plans = trajectory["plans"]
    last_plan = plans[-1]["plan"] if plans else []
    kind, n_asked = asked_for(c)
    handed = [a["id"] for a in media.handed if a["kind"] == kind]
    different = list({media.looks[i]: i for i in handed}.values())

    units = [units_of_plan(plan["plan"]) for plan in plans]
    planned = planned_share(units[-1] if plans else Counter(), trajectory["calls"])
    executed = executed_share(units, without_retakes(trajectory, media), plans)
    wired = wired_share(different, last_plan, media)
    topic = 0.0
    if any(shows(step["goal"], c["subject"]) for step in last_plan):
        best = sorted(
            (on_topic(i, media, media.topic) * (1 - FLAWED * flawed_share(i, media)))
            for i in different
        )[::-1]
        topic = sum(best[:n_asked]) / max(len(handed), n_asked)
    return (min(planned, executed, wired) * useful) ** 2 * topic, {
        "planned": planned,
        "executed": executed,
        "wired": wired,
        "on_topic": topic,
    }


# ---------------------------------------------------------------------------- R_cons (rule)
def may_be_reference(artifact: dict, subject: frozenset[str]) -> bool:
    """Whether it is a picture that the user attached, or one whose prompt names the subject (its
    content words)."""
    if artifact["kind"] != "image":
        return False
    if artifact["tool"] == "user":
        return True
    return name_subject(positive_words(prompt_of(artifact), subject), subject)


def consistency_reward(
    trajectory: dict, media: Media | None = None
) -> tuple[float | None, dict[str, float]]:
    """R_cons: reference-based generation where consistency is required (the grade is ours).

    The share of pictures or shots that were made from one common reference. They are the delivered
    pictures, or the clips inside the delivered film, each look once; one of them may be the
    reference. (None, {}) where the request asks for no consistency, or for a single picture or
    shot: the part does not apply.

    >>> consistency_reward(example())
    (1.0, {'one_reference': 1.0})
    """
    c = trajectory["task"]["constraints"]
    expected = c["images"] or n_shots(c)
    if not c["consistency"] or expected < 2:
        return None, {}
    media = media or read_media(trajectory)
    kind, _ = asked_for(c)
    units = {}
    for item in media.handed:
        if item["kind"] == kind:
            units |= {media.looks[i]: i for i in media.footage[item["id"]]}
    references = {i for i, a in media.by_id.items() if may_be_reference(a, media.subject)}
    made_from = Counter()
    for unit in units.values():
        made_from.update(media.above[unit] & references)
    together = min(max(made_from.values(), default=0), expected)
    n_units = max(expected, len(units))
    return max(0, together - 1) / (n_units - 1), {"one_reference": together / n_units}


# ---------------------------------------------------------------------------- R_vrt
def combine(plan: float, parts: dict[str, float | None], config: RewardConfig) -> dict:
    """R_vrt (Sec. 4.3.4) from R_plan and the parts: {total, plan, fine, and every part}.

    R_fine is the weighted mean of the parts that apply: one that is None is left out, not given
    away. RL1 to RL4 are the rows of Table 4.
    """
    applying = {part: score for part, score in parts.items() if score is not None}
    weights = {part: config.weights[part] for part in applying}
    weighted = sum(weights[part] * applying[part] for part in applying)
    fine = weighted / sum(weights.values())
    result_and_format = (applying["result"] + applying["format"]) / 2
    if config.form == "plan*fine":  # RL4, the paper's
        total = plan * fine
    elif config.form == "plan*(result+format)":  # RL2, RL3
        total = plan * result_and_format
    elif config.form == "result+format":  # RL1
        total = result_and_format
    else:  # "plan+fine": the sum of VisionCreator-R1, as a mean
        total = (plan + weighted) / (1 + sum(weights.values()))
    return {"total": total, "plan": plan, "fine": fine, **parts}


def needed_units(trajectory: dict, media: Media) -> Counter:
    """What it took to make what was handed over, in units of `units_of_plan`."""
    used = media.behind
    units = Counter()
    for call in trajectory["calls"]:
        if call["status"] != "ok" or not call["outputs"] or not use_of_call(call, used, media):
            continue
        into = sum(i in used for i in call["outputs"])
        units[kin(call["name"])] += into if by_results(call["name"]) else 1
    return units


def judged_plan(
    trajectory: dict, config: RewardConfig, pool: set[str], media: Media | None = None
) -> tuple[list[dict] | None, float, dict[str, float]]:
    """(plan, R_plan, facets) of the plan that counts; None and zeros where none came first.

    What is written well once the work is done is no plan, and does not make up for a bad one before
    it; one that is revised to something cheaper does not hold for what was done: of several the
    worst one counts (ours).
    """
    plans = [None]
    if trajectory["plans"] and planned_first(trajectory["turns"]):
        plans = [p["plan"] for p in trajectory["plans"]]
    needed = needed_units(trajectory, media or read_media(trajectory))
    task = trajectory["task"]
    judged = [(plan, *plan_reward(plan, task, config, pool, needed)) for plan in plans]
    return min(judged, key=lambda found: found[1])


def score_by_rules(trajectory: dict, config: RewardConfig, pool: set[str]) -> Scored:
    """R_plan and all parts of R_fine of one trajectory, offline."""
    media = read_media(trajectory)
    plan, plan_score, facets = judged_plan(trajectory, config, pool, media)
    useful = useful_share(trajectory, media, config)
    found = {
        "tool": tool_reward(trajectory["calls"], useful),
        "format": format_reward(trajectory, media),
        "result": result_reward(trajectory, config, media),
        "traj": traj_reward(trajectory, config, media, useful),
        "cons": consistency_reward(trajectory, media),
    }
    checks = {}
    for _, sub_scores in found.values():
        checks |= sub_scores
    parts = {part: score for part, (score, _) in found.items()}
    return Scored(trajectory, pool, plan, plan_score, facets, parts, checks)


def ltr_rewards(
    trajectories: list[dict],
    config: RewardConfig,
    pools: list | None = None,
    llm: LlmConfig | None = None,
) -> list[dict]:
    """ltr_reward of many trajectories; an LLM (`llm`) judges `llm.concurrency` of them at once."""
    scored = []
    for trajectory, pool in zip(trajectories, pools or [None] * len(trajectories)):
        pool = set(load_tools()) if pool is None else set(pool)
        scored.append(score_by_rules(trajectory, config, pool))
    if config.judge == "openai":
        judge_by_llm(scored, llm)
        for s in scored:
            if s.plan:
                s.plan_score = weigh_facets(s.facets, s.plan, s.trajectory["task"], config)
    return [
        {
            **combine(s.plan_score, s.parts, config),
            "facets": s.facets,
            "checks": s.checks,
            "reasons": s.reasons,
        }
        for s in scored
    ]


def ltr_reward(
    trajectory: dict,
    config: RewardConfig,
    pool: list[str] | None = None,
    llm: LlmConfig | None = None,
) -> dict:
    """LtrReward of one trajectory.

    Returns {total, plan, fine, tool, format, result, traj, cons, facets, checks, reasons}. `cons`
    is None where consistency does not apply. `facets` are R_plan's, `checks` the sub-scores of the
    other parts, `reasons` an LLM judge's words. Where that failed its scores are NaN, and so is
    what is made of them. `pool`: the tools that the agent was told of (default all 36).
    """
    return ltr_rewards([trajectory], config, [pool], llm)[0]


# ---------------------------------------------------------------------------- in words
def explain(trajectory: dict, reward: dict, config: RewardConfig) -> list[list[str]]:
    """Rows [name, score, weight, reason in words] of one trajectory's reward.

    The parts stand in their order, the sub-scores of each behind it, two spaces in.
    """
    c = trajectory["task"]["constraints"]
    kind, _ = asked_for(c)
    handed = deliverables(trajectory)
    sizes = [f"{a['width']}x{a['height']}" for a in handed if a["kind"] == kind]
    plan, _, _ = judged_plan(trajectory, config, set(trajectory.get("pool") or load_tools()))
    name, steps, _ = experts(shape_of(c))[0]
    expert = {"title": load_workflows()[name]["title"], "n": len(steps)}
    text = fill_template(
        "templates/reasons.jinja",
        t={**trajectory, "plan": plan or []},
        c=c,
        reward=reward,
        config=config,
        handed=handed,
        kind=kind,
        wishes=wish_words(),
        sizes=" and ".join(sizes),
        expert=expert,
    )
    return [line.split("\t") for line in text.split("\n")]


def headline(reward: dict, config: RewardConfig) -> str:
    """The product of one trajectory's reward in a line, with the form where it is another."""
    is_product = "=" if config.form == "plan*fine" else f"({config.form}) of"
    return (
        f"R_vrt {reward['total']:.3f} {is_product} plan {reward['plan']:.3f} "
        f"x fine {reward['fine']:.3f}"
    )


def print_explained(t: dict) -> None:
    """Print one trajectory's `head` and `rows` as a table."""
    print(f"{t['task']['id']}  {t['head']}   ended: {t['ended']}")
    print(f"  {t['task']['request']}")
    print(f"  {'part':16}{'score':>7}{'weight':>8}  reason")
    for name, score, weight, reason in t["rows"]:
        print(f"  {name:16}{score:>7}{weight:>8}  {reason}")
    print()


# Trajectories of a batch that is timed.
BATCH = 250


def print_speed(
    trajectories: list[dict], pools: list, config: RewardConfig, llm: LlmConfig
) -> None:
    """`--speed`: trajectories scored per second of CPU time, in the best of a file's batches.

    Each is scored once: nothing of it is known from an earlier pass. So a file of other tasks each
    time, such as visgen.jsonl, gives the least speed; rollouts share what one task needs.
    """
    ltr_rewards(trajectories[:1], config, pools[:1], llm)  # reads the tables of tools and workflows
    # What was read from the file is left out of the collector's walks: it is not the reward's.
    gc.collect()
    gc.freeze()
    n = max(1, len(trajectories) // BATCH)
    size = len(trajectories) // n
    rates = []
    for start in range(0, n * size, size):
        batch = slice(start, start + size)
        began = time.process_time()
        ltr_rewards(trajectories[batch], config, pools[batch], llm)
        rates.append(size / (time.process_time() - began))
    n_calls = sum(len(t["calls"]) for t in trajectories) / len(trajectories)
    rate = f"{max(rates):.0f} trajectories/s of {n_calls:.1f} calls each"
    print(f"{rate}, in the best of {n} batches of {size}")


def main():
    """Print the rewards of a JSONL file of trajectories part by part, with their reasons.

    `--html` writes them to a page beside the file as well; `--speed` times them instead.
    """
    arguments = sys.argv[1:]
    plain = [a for a in arguments if not a.startswith("-")]
    files = [a for a in plain if "=" not in a]
    overrides = [a for a in plain if "=" in a]
    if len(files) != 1 or set(arguments) - {*files, *overrides, "--html", "--speed"}:
        print(__doc__)
        raise SystemExit(0 if {"-h", "--help"} & set(arguments) else 2)

    file = Path(files[0])
    given = read_config({"reward": RewardConfig(), "llm": LlmConfig()}, None, overrides)
    config = given["reward"]
    trajectories = read_jsonl(file)
    for number, record in enumerate(trajectories, 1):
        if not isinstance(record, dict) or not {"task", "calls", "turns"} <= record.keys():
            is_task = isinstance(record, dict) and "request" in record
            what = "a task, which nobody has played" if is_task else "no trajectory"
            raise SystemExit(
                f"error: {file}, record {number} is {what}; rewards are of trajectories, such as "
                "runs/NAME/data/visgen.jsonl or runs/NAME/vrl/rollouts/step-1.jsonl"
            )
    pools = [t.get("pool") for t in trajectories]
    if "--speed" in arguments:
        if not trajectories:
            raise SystemExit(f"error: {file} is empty; the speed is of trajectories that it holds")
        print_speed(trajectories, pools, config, given["llm"])
        return
    rewards = ltr_rewards(trajectories, config, pools, given["llm"])

    explained = []
    for t, reward in zip(trajectories, rewards):
        rows = explain(t, reward, config)
        explained.append({**t, "head": headline(reward, config), "rows": rows})
    for t in explained:
        print_explained(t)
    if "--html" in arguments:
        page_file = file.with_name(file.name + ".html")
        page = fill_template(
            "templates/rewards.jinja",
            file=file.name,
            form=config.form,
            judge=config.judge,
            explained=explained,
        )
        write_atomic(page_file, page)
        print(f"the same as a page: {page_file}")


if __name__ == "__main__":
    run_command(main)
