"""The LLM evaluators of LtrReward: R_plan's vPlanJudger and R_traj's (Sec. 4.3.2).

With `reward.judge: openai`, their verdicts take the place of the scores that rewards.py gives by
rule. Their prompts are data/prompts/plan_judge.jinja and trajectory_judge.jinja, the client is
lib/llm.py. A judgement that fails is missing (NaN), never 0: a broken judge is not the agent's
fault. What the agent wrote so that no judge can read it is: that scores 0 and is not asked about.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from lib.experiment import LlmConfig
from lib.families import load_families
from lib.llm import Endpoint, ask, run_jobs
from lib.text import to_json
from lib.toolbox import tool_signature
from lib.wishes import wish_words
from lib.workflows import expand_workflow, load_workflows, nearest_workflows

# The five facets of a plan (Sec. 4.3.2). The first is binary and stays the rule's.
FACETS = ("requirement", "coherence", "executability", "atomicity", "optimality")
JUDGED_FACETS = FACETS[1:]
# Workflows shown as expert plans, nearest to the request first (ours).
NEIGHBOURS = 3
# The most characters of plan, calls and answer that a judge is shown; with its own words they fit
# into 32k tokens. An expert's of 60 steps have about 20,000. Ours.
MOST_CHARS = 60_000
# What would end a judge's turn or begin another one, as chat models write it.
CONTROL_TOKEN = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
# From this many questions on, a progress bar is shown.
MANY = 500
# Verdicts, failures, requests and tokens of this process, for the caps on cost and failures.
ASKED = Counter()
# The JSON Schema of one verdict; the reason comes first, so that the score follows from it.
SCORE = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "required": ["reason", "score"],
    "additionalProperties": False,
}

# A question: the prompt's template, the names to give verdicts on, and what fills the template.
Question = tuple[str, tuple[str, ...], dict]


@dataclass
class Scored:
    """One trajectory with its scores: first the rules', then, where it is asked, the LLM's."""

    trajectory: dict
    pool: set[str]
    # The plan that counts (rewards.judged_plan), None without one; and R_plan with its facets.
    plan: list[dict] | None
    plan_score: float
    facets: dict[str, float]
    # R_fine's parts, None where one does not apply, and the named sub-scores of them all.
    parts: dict[str, float | None]
    checks: dict[str, float]
    # The LLM's words, by facet or part.
    reasons: dict[str, str] = field(default_factory=dict)


def expert_plans(c: dict) -> list[dict]:
    """Reference plans {title, practice, steps} for a request with the constraints `c`.

    The paper retrieves expert plans; here they are the workflows of the request's modality,
    nearest in needs first, unrolled for its own constraints (ours).
    """
    plans = []
    for name in list(nearest_workflows(c))[:NEIGHBOURS]:
        workflow = load_workflows()[name]
        steps = [
            {key: step[key] for key in ("id", "tool", "goal", "after")}
            for step in expand_workflow(name, c)
        ]
        plans.append({"title": workflow["title"], "practice": workflow["practice"], "steps": steps})
    return plans


def what_is_wanted(c: dict) -> dict:
    """What a request of a family wants, for prompts/wanted.jinja: `deliver` (what is handed over
    in place of a picture or film, None otherwise), `wish` (its values by slot) and what its checks
    look for, in words; nothing of all this for any other request. `c`: its constraints."""
    names = load_families()[c["family"]]["checks"] if c.get("family") else []
    return {
        "deliver": c.get("deliver"),
        "wish": c.get("wish") or {},
        "checks_in_words": [wish_words()[name] for name in names],
    }


def plan_question(s: Scored) -> Question:
    """What the vPlanJudger is asked: request, pool, expert plans, what the rules counted, plan."""
    task = s.trajectory["task"]
    values = {
        "request": task["request"],
        "inputs": task["inputs"],
        **what_is_wanted(task["constraints"]),
        "pool": [tool_signature(tool) for tool in sorted(s.pool)],
        "facets": dict(s.facets),
        "experts": expert_plans(task["constraints"]),
        "plan": s.plan,
    }
    return "prompts/plan_judge.jinja", FACETS, values


def match_steps(
    plan: list[dict], calls: list[dict]
) -> tuple[list[tuple[dict, int | None, str | None]], list[int]]:
    """Which call carries out which step of a plan: (rows, numbers of the calls left over).

    A row is (step, its call's number from 1, that call's status), with None for a step without a
    call. A step takes the first free call of its tool, successful ones before failed ones.
    """
    free = dict(enumerate(calls, 1))
    rows = []
    for step in plan:
        candidates = [number for number in free if free[number]["name"] == step["tool"]]
        worked = [number for number in candidates if free[number]["status"] == "ok"]
        if candidates:
            number = min(worked or candidates)
            rows.append((step, number, free.pop(number)["status"]))
        else:
            rows.append((step, None, None))
    return rows, list(free)


def trajectory_question(s: Scored) -> Question:
    """What R_traj's evaluator is asked: request, plan, calls, which call is which step, answer."""
    calls = s.trajectory["calls"]
    rows, spare = match_steps(s.plan, calls)
    values = {
        "request": s.trajectory["task"]["request"],
        **what_is_wanted(s.trajectory["task"]["constraints"]),
        "plan": s.plan,
        "calls": calls,
        "matched": rows,
        "spare": spare,
        "checks": s.checks,
        "answer": s.trajectory["answer"],
    }
    return "prompts/trajectory_judge.jinja", ("traj",), values


def ask_all(llm: LlmConfig, questions: list[Question]) -> list[dict | None]:
    """Verdicts {name: {reason, score}} on questions, in their order; None where one failed.

    The judge is greedy, whatever `llm.temperature` says. SystemExit above a cap of lib/llm.py.
    """
    judge = Endpoint(replace(llm, temperature=0.0), "the judge", "verdicts", ASKED)

    async def answer(question):
        template, names, values = question
        return await ask(judge, template, dict.fromkeys(names, SCORE), values)

    title = "LLM judge" if len(questions) >= MANY else ""
    return run_jobs(judge, answer, questions, title)


def take_over(
    verdict: dict | None, names: tuple[str, ...], scores: dict, reasons: dict[str, str]
) -> None:
    """Put a verdict's scores and reasons in place; NaN where there is none."""
    for name in names:
        if verdict:
            scores[name] = verdict[name]["score"]
            reasons[name] = verdict[name]["reason"]
        else:
            scores[name] = math.nan
            reasons[name] = "the judge gave no readable verdict"


def unreadable(s: Scored) -> str:
    """Why no judge can read what the agent wrote; "" where one can. It is the agent's fault."""
    t = s.trajectory
    calls = [[call["name"], call["arguments"]] for call in t["calls"]]
    written = to_json([s.plan, calls, t["answer"]])
    if len(written) > MOST_CHARS:
        return f"the agent wrote {len(written)} characters, a judge reads {MOST_CHARS}"
    if found := CONTROL_TOKEN.search(written):
        return f"the agent wrote the control token {found[0]}"
    return ""


def judge_by_llm(scored: list[Scored], llm: LlmConfig) -> None:
    """Put the LLM evaluators' verdicts in place of the rules' scores of plan facets and R_traj.

    Changes `facets`, `parts` and `reasons` of each; the caller then weighs the facets again. What
    is binary, Requirement Fulfillment, stays the rule's. An episode without a plan has 0 in all of
    this and is not asked about, nor is one that the agent made unreadable.
    """
    asked = []
    for s in scored:
        reason = s.plan and unreadable(s)
        if reason:
            s.facets.update(dict.fromkeys(FACETS, 0.0))
            s.parts["traj"] = 0.0
            s.reasons.update(dict.fromkeys((*FACETS, "traj"), reason))
        elif s.plan:
            asked.append(s)
    questions = []
    for s in asked:
        questions += [plan_question(s), trajectory_question(s)]
    verdicts = ask_all(llm, questions)
    for s, on_plan, on_trajectory in zip(asked, verdicts[::2], verdicts[1::2]):
        take_over(on_plan, JUDGED_FACETS, s.facets, s.reasons)
        take_over(on_trajectory, ("traj",), s.parts, s.reasons)
