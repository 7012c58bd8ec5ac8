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
    python rewards.py trajectories.jsonl reward.form=result+format reward.judge=openai \\
        llm.url=http://127.0.0.1:8123/v1
"""

import math
import re
import sys
from collections import Counter
from pathlib import Path

from lib.experiment import LlmConfig, RewardConfig, read_config
from lib.judge import FACETS, Scored, judge_by_llm
from lib.lineage import Media, content_words, deliverables, heard, on_topic, read_media, shows
from lib.runs import ROOT, read_jsonl, run_command, write_atomic
from lib.text import fill_template
from lib.toolbox import category, generates_clip, load_tools, makes, takes
from lib.workflows import expand_workflow, fitting_workflows, load_workflows, n_shots

PARTS = ("tool", "format", "result", "traj", "cons")

# Seconds that a caption or a shot must stand to be seen. Ours.
SHOWN_S = 0.5

# What a part returns: its score, and the sub-scores that it was made from by name, all in [0, 1].
PartScore = tuple[float, dict[str, float]]


def example() -> dict:
    """The trajectory of data/example.jsonl, for the doctests: three shots of one object, music."""
    return read_jsonl(ROOT / "data" / "example.jsonl")[0]


def asked_for(c: dict) -> tuple[str, int]:
    """("image" or "video", how many) a request asks for. `c`: its constraints, here as below."""
    return ("image", c["images"]) if c["images"] else ("video", c["videos"])


# ---------------------------------------------------------------------------- R_plan
# The vPlanJudger's five facets, by rule. lib/judge.py has the LLM that the paper uses.
KIND_WORDS = {
    "image": r"images?|pictures?|posters?|frames?|illustrations?",
    "video": r"clips?|videos?|films?",
}


def stated_count(goal: str, kind: str) -> int:
    """The number that a plan step's goal states for what it makes; 1 where it states none.

    >>> stated_count("4 images of a lantern", "image"), stated_count("clip 2 of a kite", "video")
    (4, 1)
    """
    found = re.search(rf"\b(\d{{1,3}}) (?:{KIND_WORDS[kind]})\b", goal)
    return int(found.group(1)) if found else 1


def requirement_facet(plan: list[dict], c: dict) -> float:
    """Requirement Fulfillment, 0 or 1: the plan would make what is asked for.

    That is the modality, the quantity and the subject. Counts are read from the goals, a convention
    of ours. A picture is a means and not counted where its goal calls it a reference and a later
    step that makes pictures builds on it. A film that another step turns into a film is not counted
    either.
    """
    kind, wanted = asked_for(c)
    visual = [step for step in plan if makes(step["tool"]) in ("image", "video")]
    if not any(shows(step["goal"], c["subject"]) for step in visual):
        return 0.0

    makers = [step for step in plan if makes(step["tool"]) == kind]
    built_on = set()
    for step in makers:
        takes_film = any("video" in kinds for kinds in takes(step["tool"]))
        if kind == "image" or takes_film:
            built_on.update(step["after"])
    made = 0
    for step in makers:
        may_be_means = kind == "video" or step["goal"].startswith("reference")
        if not (step["id"] in built_on and may_be_means):
            made += stated_count(step["goal"], kind)

    clips = sum(stated_count(s["goal"], "video") for s in plan if generates_clip(s["tool"]))
    right_clips = not c["shots"] or clips == c["shots"] * c["videos"]
    return float(made == wanted and right_clips)


def coherence_facet(plan: list[dict], inputs: list[dict]) -> float:
    """Logical Coherence of the plan in itself, before anything is done (the grade is ours).

    The share of steps that come after what they need, and get each kind of media that they need,
    from those steps or from the user's `inputs`. R_traj, which compares plan and deeds, is another
    thing: see traj_reward.
    """
    given = {i["kind"] for i in inputs}
    kind_made = {}
    good = 0
    for step in plan:
        fed = given | {kind_made[a] for a in step["after"] if a in kind_made}
        in_order = all(a in kind_made for a in step["after"])
        supplied = all(kinds & fed for kinds in takes(step["tool"]))
        own_id = step["id"] not in kind_made
        good += in_order and supplied and own_id
        kind_made[step["id"]] = makes(step["tool"])
    return good / len(plan)


def executability_facet(plan: list[dict], pool: set[str]) -> float:
    """Pragmatic Executability: share of steps by a tool of the pool, or by an LLM (grade ours)."""
    return sum(step["tool"] in pool or step["tool"] == "llm" for step in plan) / len(plan)


def atomicity_facet(plan: list[dict]) -> float:
    """Decomposition Atomicity: share of steps that make one thing (grade ours).

    Such a step is said in 2 to 16 words, without "then" or a semicolon, and only once.
    """
    times = Counter((step["tool"], step["goal"]) for step in plan)
    good = 0
    for step in plan:
        brief = 2 <= len(step["goal"].split()) <= 16
        several = re.search(r"\bthen\b|;", step["goal"])
        good += brief and not several and times[step["tool"], step["goal"]] == 1
    return good / len(plan)


def f1(found: Counter, wanted: Counter) -> float:
    """Harmonic mean of precision and recall of two multisets; 1 for two empty ones."""
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def plan_graph(plan: list[dict], counts_as: dict[str, str]) -> tuple[Counter, Counter]:
    """A plan as two multisets: its tools, and (tool, tool) for each step that feeds another.

    `counts_as`: {tool: the tool that it is counted as}. An unknown id feeds as None.
    """
    tool_of = {step["id"]: counts_as.get(step["tool"], step["tool"]) for step in plan}
    nodes, edges = Counter(), Counter()
    for step in plan:
        tool = counts_as.get(step["tool"], step["tool"])
        nodes[tool] += 1
        edges.update((tool_of.get(a), tool) for a in step["after"])
    return nodes, edges


def optimality_facet(plan: list[dict], c: dict) -> float:
    """Expert-Guided Optimality: nearness to the best expert reference plan (the measure is ours).

    Half by the tools, half by what feeds what, each as F1. Steps beyond the expert's cost
    precision; a reference image (identity) or a beat step that is missing costs recall.
    """
    best = 0.0
    for name in fitting_workflows(c):
        expert = expand_workflow(name, c)
        # An alternative that the workflow allows counts as the tool it replaces.
        counts_as = {tool: step["tools"][0] for step in expert for tool in step["tools"]}
        nodes, edges = plan_graph(plan, counts_as)
        expert_nodes, expert_edges = plan_graph(expert, {})
        best = max(best, (f1(nodes, expert_nodes) + f1(edges, expert_edges)) / 2)
    return best


def weigh_facets(
    facets: dict[str, float], plan: list[dict], task: dict, config: RewardConfig
) -> float:
    """R_plan from its facets: their weighted mean, scaled down for a plan that is too long (ours).

    Too long is more than `long_plan` times the steps of the shortest expert plan: one facet of five
    would hardly see that nobody can follow it.
    """
    c = task["constraints"]
    shortest = min(len(expand_workflow(name, c)) for name in fitting_workflows(c))
    brevity = min(1.0, config.long_plan * shortest / len(plan))
    weight = config.facet_weights
    weighted = sum(weight[f] * facets[f] for f in FACETS)
    return brevity * weighted / sum(weight[f] for f in FACETS)


def plan_reward(
    plan: list[dict] | None, task: dict, config: RewardConfig, pool: set[str]
) -> PartScore:
    """R_plan (Sec. 4.3.2) by rule: (score, the five facets of the vPlanJudger).

    An absent or unreadable plan scores 0 in every facet. `pool`: the tools that the agent has.

    >>> t = example()
    >>> plan_reward(t["plan"], t["task"], RewardConfig(), t["task"]["pool"])[0]
    1.0
    >>> plan_reward([], t["task"], RewardConfig(), ())[0]
    0.0
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


def tool_reward(calls: list[dict]) -> PartScore:
    """R_tool: execution success, with graded penalties for intermediate and final failures.

    1.0 no failed call, 0.8 all failures repaired (`unrepaired`), 0.1 the last call failed, 0 none
    worked. The four grades are VisionCreator-R1's, their reading is ours. Failures that are not
    repaired take 0.8 down towards 0.1 by their share of their turn's calls, in the worst turn:
    cheap calls in other turns do not thin them out.

    >>> ok, bad = [{"turn": 1, "name": n, "status": s} for n, s in (("a", "ok"), ("b", "error"))]
    >>> episodes = [ok], [bad, {**bad, "status": "ok"}], [ok, bad], [bad]
    >>> [tool_reward(calls)[0] for calls in episodes]
    [1.0, 0.8, 0.1, 0.0]
    >>> round(tool_reward([bad, ok])[0], 2)
    0.45
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
    return score, {
        "worked": sum(ok) / max(1, len(ok)),
        "repaired": 1 - len(lost) / max(1, n_failed),
    }


# ---------------------------------------------------------------------------- R_format (rule)
def planned_first(turns: list[dict]) -> bool:
    """Whether the first turn holds a plan before its first call, and none after it."""
    order = turns[0]["order"] if turns else []
    first_call = order.index("tool_call") if "tool_call" in order else len(order)
    return "plan" in order[:first_call] and "plan" not in order[first_call:]


def format_reward(trajectory: dict) -> PartScore:
    """R_format: UTPC structure, the minimum over the turns, as in VisionCreator-R1.

    Each fault takes 0.5 off its turn (ours). 0 where UTPC itself is broken: no answer at the end;
    an answer beside calls, before their results are seen; no plan in the first turn, or not before
    its first call; or a tag of the environment's in the agent's text, which forges a reply.

    >>> t = example()
    >>> format_reward(t)[0], format_reward({**t, "ended": "max_turns"})[0]
    (1.0, 0.0)
    """
    turns = trajectory["turns"]
    n_faults = [len(turn["faults"]) for turn in turns] or [0]
    planned = planned_first(turns)
    answered = trajectory["ended"] == "answer"
    hasty = any({"tool_call", "answer"} <= set(turn["order"]) for turn in turns)
    forged = any(
        fault["code"] == "unknown_tag" and "tool_response" in fault["message"]
        for turn in turns
        for fault in turn["faults"]
    )
    score = 0.0
    if planned and answered and not hasty and not forged:
        score = min(max(0.0, 1.0 - 0.5 * n) for n in n_faults)
    return score, {
        "clean": n_faults.count(0) / len(n_faults),
        "answered": float(answered),
        "planned_first": float(planned),
    }


# ---------------------------------------------------------------------------- R_result (effect)
def near(value: float, wanted: float, tolerance: float) -> float:
    """1 within the relative tolerance; outside it at most half, falling with the distance (ours).

    >>> near(8.0, 8, 0.05), near(6.0, 8, 0.05), near(16.0, 8, 0.05)
    (1.0, 0.375, 0.0)
    """
    off = abs(value - wanted) / wanted
    return 1.0 if off <= tolerance else 0.5 * max(0.0, 1.0 - off)


def count_score(found: int, wanted: int) -> float:
    """Share of a wanted number, too many costing like too few (ours).

    >>> count_score(4, 4), count_score(3, 4), count_score(5, 4)
    (1.0, 0.75, 0.8)
    """
    return min(found, wanted) / max(found, wanted) if found and wanted else 0.0


def own_footage(
    item: dict, asked: frozenset[str], media: Media, config: RewardConfig
) -> list[dict]:
    """A film's own clips: each look once, however often it is repeated, slowed down or cut.

    Clips whose prompts say none of the `asked` words are left out.
    """
    by_look = {}
    for i in media.footage[item["id"]]:
        if on_topic(i, media, asked):
            by_look[media.looks[i]] = media.by_id[i]
    return list(by_look.values())


def amount_check(items: list[dict], handed: list[dict], wanted: int, media: Media) -> float:
    """Different pictures or films handed over, as a share of the wanted number.

    Other media beside them count as too many; a text or a page does not.
    """
    different = {media.looks[item["id"]] for item in items}
    n_media = sum(a["kind"] in ("image", "video", "audio") for a in handed)
    return min(len(different), wanted) / max(n_media, wanted)


def has_aspect(artifact: dict, aspect_ratio: str, tolerance: float) -> bool:
    """Whether width to height is as asked, such as "16:9", within the relative tolerance."""
    w, h = map(int, aspect_ratio.split(":"))
    return abs(artifact["width"] * h / (artifact["height"] * w) - 1) <= tolerance


def aspect_check(item: dict, aspect_ratio: str, media: Media, config: RewardConfig) -> bool:
    """Whether a picture or film has the asked shape, and came by it honestly.

    Its footage has the shape too, or was cropped to it: not stretched, turned on its side or set
    between black bars.
    """
    tolerance = config.aspect_tolerance
    if not has_aspect(item, aspect_ratio, tolerance) or item.get("letterboxed"):
        return False
    footage = [media.by_id[i] for i in media.footage[item["id"]]]
    if all(has_aspect(clip, aspect_ratio, tolerance) for clip in footage):
        return True
    operations = set()
    for i in media.above[item["id"]]:
        operations |= {op["op"] for op in media.by_id[i]["arguments"].get("operations", ())}
    return "crop" in operations and not operations & {"resize", "rotate"}


def duration_check(film: dict, own: list[dict], wanted: float, config: RewardConfig) -> float:
    """How near a film's length (s) is to the wanted one; it has no more than its `own` footage."""
    seconds = min(film["duration_s"], sum(clip["duration_s"] for clip in own))
    return near(seconds, wanted, config.duration_tolerance)


def shots_check(film: dict, own: list[dict], wanted: int, config: RewardConfig) -> float:
    """How near a film's number of shots is to the wanted one, the worse of two counts.

    All its shots; and those that stand long enough to be seen, at most the shots of its `own`
    footage.
    """
    seen = sum(n_frames >= SHOWN_S * film["fps"] for n_frames in film["shot_frames"])
    different = min(seen, sum(clip["shots"] for clip in own))
    return min(count_score(film["shots"], wanted), count_score(different, wanted))


def is_large(artifact: dict, resolution: str, config: RewardConfig) -> bool:
    """Whether the long side has 2048 pixels ("2K"), or the short side about 720 ("720p")."""
    sides = (artifact["width"], artifact["height"])
    if resolution == "2K":
        return max(sides) >= 2048
    return min(sides) >= (1 - config.size_tolerance) * int(resolution.rstrip("p"))


def resolution_check(item: dict, resolution: str, media: Media, config: RewardConfig) -> bool:
    """Whether an item is large enough, and so is all that it was made from: enlarging adds nothing.

    What the user attached is as it is.
    """
    sources = [media.by_id[i] for i in media.above[item["id"]]]
    made = [a for a in sources if a["kind"] == item["kind"] and a["tool"] != "user"]
    return all(is_large(a, resolution, config) for a in made)


def web_page_check(items: list[dict], handed: list[dict]) -> float:
    """1 if some page that was handed over shows all the items."""
    ids = {item["id"] for item in items}
    pages = [a for a in handed if a["kind"] == "html"]
    return float(any(ids <= {p["id"] for p in page["parents"]} for page in pages))


AUDIO_MAKERS = {
    "music": {"tool_music_suno"},
    "narration": {"tool_tts_generation", "tool_tts_composite"},
    "sfx": {"tool_sound_fx_gen"},
    "subtitles": {"tool_subtitle_add_text"},
}


def spoken_text(arguments: dict) -> str:
    """All that a speech tool was told to say."""
    segments = [segment["text"] for segment in arguments.get("segments", ())]
    return " ".join([str(arguments.get("text", "")), *segments])


def caption_text(arguments: dict, least_s: float) -> str:
    """The captions that stand for at least `least_s` seconds."""
    cues = arguments.get("subtitles", ())
    return " ".join(cue["text"] for cue in cues if cue["end"] - cue["start"] >= least_s)


def audio_check(part: str, film: dict, media: Media, subject: str, config: RewardConfig) -> bool:
    """Whether a film has music, narration, sfx or subtitles that count (ours).

    Music and effects must be heard over half of it; a narration that is heard, or captions, must
    say a word of the subject.
    """
    found = media.above[film["id"]] if part == "subtitles" else heard(film, media)
    for i in found:
        source = media.by_id[i]
        if source["tool"] not in AUDIO_MAKERS[part]:
            continue
        if part in ("music", "sfx"):
            counts = found[i] >= film["duration_s"] / 2
        elif part == "narration":
            counts = content_words(spoken_text(source["arguments"])) & content_words(subject)
        else:
            text = caption_text(source["arguments"], SHOWN_S)
            counts = content_words(text) & content_words(subject)
        if counts:
            return True
    return False


def beat_check(film: dict, media: Media, config: RewardConfig) -> bool:
    """Whether a film was cut to music whose beats were known (ours).

    Beats were found in a music that is heard in it, before the film that lays this music under its
    clips was made. That the cuts then fall on them is not checked: clips have lengths of whole
    seconds, and no workflow here trims each to the beat.
    """
    order = {i: n for n, i in enumerate(media.by_id)}
    beats_found_at = {}
    for a in media.by_id.values():
        if a["tool"] != "tool_beat_detect":
            continue
        for parent in a["parents"]:
            tools = {media.by_id[i]["tool"] for i in media.above[parent["id"]]}
            if tools & {"tool_music_suno", "user"}:
                beats_found_at.setdefault(parent["id"], order[a["id"]])
    for i in heard(film, media):
        made = media.by_id[i]
        if made["kind"] == "video" and any(
            beats_found_at.get(parent["id"], math.inf) < order[i] for parent in made["parents"]
        ):
            return True
    return False


def share(values: list) -> float:
    """Mean over the items handed over, of scores or of truths."""
    return sum(values) / len(values)


def result_checks(
    items: list[dict], handed: list[dict], c: dict, media: Media, config: RewardConfig
) -> dict[str, float]:
    """{name: score} of every constraint that the request states, and of no other.

    `items`: the pictures or films among what was handed over. Each check looks at the records and
    their lineage: copies count as one, a film's length and shots are at most those of its footage,
    and what is muted or stretched does not count.
    """
    _, wanted = asked_for(c)
    asked = content_words(c["subject"]) | content_words(c["style"] or "")
    own = {a["id"]: own_footage(a, asked, media, config) for a in items}

    checks = {"count": amount_check(items, handed, wanted, media)}
    if c["aspect_ratio"]:
        checks["aspect"] = share([aspect_check(a, c["aspect_ratio"], media, config) for a in items])
    if c["duration_s"]:
        seconds = c["duration_s"]
        checks["duration"] = share(
            [duration_check(a, own[a["id"]], seconds, config) for a in items]
        )
    if c["shots"]:
        checks["shots"] = share([shots_check(a, own[a["id"]], c["shots"], config) for a in items])
    if c["resolution"]:
        size = c["resolution"]
        checks["resolution"] = share([resolution_check(a, size, media, config) for a in items])
    if c["transparent"]:
        backgrounds = [a["arguments"].get("background") for a in items]
        checks["transparent"] = share([b == "transparent" for b in backgrounds])
    if c["web_page"]:
        checks["web_page"] = web_page_check(items, handed)
    for part in c["audio"]:
        checks[part] = share([audio_check(part, a, media, c["subject"], config) for a in items])
    if c["beat"]:
        checks["beat"] = share([beat_check(a, media, config) for a in items])
    if c["input"]:
        sources = [{media.by_id[i]["tool"] for i in media.above[a["id"]]} for a in items]
        checks["input"] = share(["user" in tools for tools in sources])
    return checks


def result_reward(trajectory: dict, config: RewardConfig, media: Media | None = None) -> PartScore:
    """R_result: how far what the answer hands over meets what the request states (grades ours).

    Score = mean of the checks x (0.1 + 0.9 x the worst of them squared), 0 without the right
    modality. VisionCreator-R1 has {0, 1}: a wish that is missed is not made up for by the others,
    while the mean keeps a slope.

    >>> score, checks = result_reward(example(), RewardConfig())
    >>> score, list(checks)
    (1.0, ['count', 'duration', 'shots', 'music'])
    """
    c = trajectory["task"]["constraints"]
    kind, _ = asked_for(c)
    handed = deliverables(trajectory)
    items = [a for a in handed if a["kind"] == kind]
    if not items:
        return 0.0, {"modality": 0.0}
    checks = result_checks(items, handed, c, media or read_media(trajectory), config)
    mean = sum(checks.values()) / len(checks)
    worst = min(checks.values())
    return mean * (0.1 + 0.9 * worst**2), checks


# ---------------------------------------------------------------------------- R_traj (effect)
def tools_of(plan: list[dict]) -> Counter:
    """How often each tool stands in a plan; what an LLM does itself is no call."""
    return Counter(step["tool"] for step in plan if step["tool"] != "llm")


def done_calls(calls: list[dict]) -> Counter:
    """Successful calls by tool. Calls that complete a partial result are none of their own."""
    worked = [call for call in calls if call["status"] == "ok"]
    partial = Counter(
        call["name"] for call in worked if 0 < len(call["outputs"]) < call["arguments"].get("n", 1)
    )
    times = Counter(call["name"] for call in worked)
    return Counter({name: max(1, n - partial[name]) for name, n in times.items()})


def planned_share(calls: list[dict], plans: list[dict]) -> float:
    """Share of the last plan's tool steps that were carried out (ours)."""
    steps = tools_of(plans[-1]["plan"]) if plans else Counter()
    return (steps & done_calls(calls)).total() / max(1, steps.total())


def executed_share(calls: list[dict], plans: list[dict]) -> float:
    """Share of the calls that the plan of their time holds (ours).

    Failures that were repaired are no calls of their own here, the others are.
    """
    held = 0
    ends = [plan["turn"] for plan in plans[1:]] + [math.inf]
    for plan, end in zip(plans, ends):
        under_it = Counter(
            call["name"]
            for call in calls
            if call["status"] == "ok" and plan["turn"] <= call["turn"] < end
        )
        held += (tools_of(plan["plan"]) & under_it).total()
    tried = done_calls(calls).total() + len(unrepaired(calls))
    return min(1.0, held / max(1, tried))


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
        sources = [media.by_id[parent["id"]]["tool"] for parent in made["parents"]]
        wired |= {(source, made["tool"]) for source in sources if source != "user"}
    return len(wired & foreseen) / len(wired) if wired else 1.0


def traj_reward(trajectory: dict, config: RewardConfig, media: Media | None = None) -> PartScore:
    """R_traj: planning intent against executed actions (the grades are ours).

    By rule, in place of the paper's LLM evaluator (lib/judge.py). It looks at plan and deeds;
    whether the plan is sound in itself is coherence_facet's business. Sub-scores:

    planned, executed, wired: see planned_share, executed_share and wired_share.
    on_topic: share of the request's subject and style words in the prompts behind the deliverables,
    over the number asked or handed over, whichever is more; 0 under a plan that never names the
    subject.

    Score = min(planned, executed, wired) x on_topic: none makes up for another.

    >>> traj_reward(example(), RewardConfig())
    (1.0, {'planned': 1.0, 'executed': 1.0, 'wired': 1.0, 'on_topic': 1.0})
    """
    c = trajectory["task"]["constraints"]
    media = media or read_media(trajectory)
    plans = trajectory["plans"]
    last_plan = plans[-1]["plan"] if plans else []
    kind, n_asked = asked_for(c)
    handed = [a["id"] for a in deliverables(trajectory) if a["kind"] == kind]
    different = list({media.looks[i]: i for i in handed}.values())

    planned = planned_share(trajectory["calls"], plans)
    executed = executed_share(trajectory["calls"], plans)
    wired = wired_share(different, last_plan, media)
    topic = 0.0
    if any(shows(step["goal"], c["subject"]) for step in last_plan):
        asked = content_words(c["subject"]) | content_words(c["style"] or "")
        best = sorted((on_topic(i, media, asked) for i in different), reverse=True)
        topic = sum(best[:n_asked]) / max(len(handed), n_asked)
    return min(planned, executed, wired) * topic, {
        "planned": planned,
        "executed": executed,
        "wired": wired,
        "on_topic": topic,
    }


# ---------------------------------------------------------------------------- R_cons (rule)
def may_be_reference(artifact: dict, subject: str) -> bool:
    """Whether it is a picture that the user attached, or one whose prompt names the subject."""
    if artifact["kind"] != "image":
        return False
    prompt = str(artifact["arguments"].get("prompt", ""))
    return artifact["tool"] == "user" or shows(prompt, subject)


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
    for item in deliverables(trajectory):
        if item["kind"] == kind:
            units |= {media.looks[i]: i for i in media.footage[item["id"]]}
    made_from = Counter()
    for unit in units.values():
        made_from.update(
            i for i in media.above[unit] if may_be_reference(media.by_id[i], c["subject"])
        )
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


def judged_plan(
    trajectory: dict, config: RewardConfig, pool: set[str]
) -> tuple[list[dict] | None, float, dict[str, float]]:
    """(plan, R_plan, facets) of the plan that counts; None and zeros where none came first.

    What is written well once the work is done is no plan, and does not make up for a bad one before
    it: of several the worst one counts (ours).
    """
    plans = [None]
    if trajectory["plans"] and planned_first(trajectory["turns"]):
        plans = [p["plan"] for p in trajectory["plans"]]
    judged = [(plan, *plan_reward(plan, trajectory["task"], config, pool)) for plan in plans]
    return min(judged, key=lambda found: found[1])


def score_by_rules(trajectory: dict, config: RewardConfig, pool: set[str]) -> Scored:
    """R_plan and all parts of R_fine of one trajectory, offline."""
    media = read_media(trajectory)
    plan, plan_score, facets = judged_plan(trajectory, config, pool)
    found = {
        "tool": tool_reward(trajectory["calls"]),
        "format": format_reward(trajectory),
        "result": result_reward(trajectory, config, media),
        "traj": traj_reward(trajectory, config, media),
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
    name = fitting_workflows(c)[0]
    expert = {"title": load_workflows()[name]["title"], "n": len(expand_workflow(name, c))}
    text = fill_template(
        "templates/reasons.jinja",
        t={**trajectory, "plan": plan or []},
        c=c,
        reward=reward,
        config=config,
        handed=handed,
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


def main():
    """Print the rewards of a JSONL file of trajectories part by part, with their reasons.

    `--html` writes them to a page beside the file as well.
    """
    arguments = sys.argv[1:]
    plain = [a for a in arguments if not a.startswith("-")]
    files = [a for a in plain if "=" not in a]
    overrides = [a for a in plain if "=" in a]
    if len(files) != 1 or set(arguments) - {*files, *overrides, "--html"}:
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
