"""lib.judge."""

import math
from collections import Counter
from dataclasses import replace

from lib.llm import Endpoint, ask, run_jobs
from lib.toolbox import tool_signature
from lib.workflows import expand_workflow, load_workflows, nearest_workflows

FACETS = ("requirement", "coherence", "executability", "atomicity", "optimality")
# ---------------------------------------------------------------------------------------------------------------------
# The LLM judge: R_plan's vPlanJudger and R_traj's evaluator (lib/llm.py is its client). A failed judgement is missing, never 0
NEIGHBOURS = 3  # workflows shown as expert plans, nearest to the request first
ASKED = Counter()  # verdicts, failures, requests and tokens of this process, for the caps
SCORE = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "required": ["reason", "score"],
    "additionalProperties": False,
}


def ask_all(llm, questions):
    """Verdicts {name: {reason, score}} on questions (template, names, values), in order; None where one failed, SystemExit above a cap."""
    judge = Endpoint(replace(llm, temperature=0.0), "the judge", "verdicts", ASKED)
    return run_jobs(
        judge,
        lambda question: ask(judge, question[0], dict.fromkeys(question[1], SCORE), question[2]),
        questions,
        "LLM judge" if len(questions) >= 500 else "",
    )


def match_steps(plan, calls):
    """Rows (step, number of the call that carries it out or None, its status), successful calls first; and the numbers of the calls left over."""
    free, rows = dict(enumerate(calls, 1)), []
    for step in plan:
        number = min(
            (i for i in free if free[i]["name"] == step["tool"]),
            key=lambda i: (free[i]["status"] != "ok", i),
            default=None,
        )
        rows.append((step, number, free.pop(number)["status"] if number else None))
    return rows, list(free)


def judge_by_llm(found, llm):
    """Put the LLM evaluators' verdicts in place of the rules' scores of plan and trajectory, NaN where none came; add their reasons.

    Retrieval of expert plans: the modality's workflows, unrolled for the task's own constraints, nearest in needs first. What is binary, Requirement
    Fulfillment, stays the rule's. An episode without a plan has 0 in all of this and is not asked about.
    """
    asked = []
    for x in (x for x in found if x["judged"]):
        plan, (task, calls, answer) = (
            x["judged"],
            (x["trajectory"][k] for k in ("task", "calls", "answer")),
        )
        experts = [
            {
                **{k: load_workflows()[name][k] for k in ("title", "practice")},
                "steps": [
                    {k: s[k] for k in ("id", "tool", "goal", "after")}
                    for s in expand_workflow(name, task["constraints"])
                ],
            }
            for name in list(nearest_workflows(task["constraints"]))[:NEIGHBOURS]
        ]
        rows, spare = match_steps(plan, calls)
        asked += [
            (
                x,
                x["facets"],
                "prompts/plan_judge.jinja",
                FACETS,
                {
                    "request": task["request"],
                    "inputs": task["inputs"],
                    "pool": [tool_signature(tool) for tool in sorted(x["pool"])],
                    "facets": dict(x["facets"]),
                    "experts": experts,
                    "plan": plan,
                },
            )
        ]
        asked += [
            (
                x,
                x["parts"],
                "prompts/trajectory_judge.jinja",
                ("traj",),
                {
                    "request": task["request"],
                    "plan": plan,
                    "calls": calls,
                    "matched": rows,
                    "spare": spare,
                    "checks": x["checks"],
                    "answer": answer,
                },
            )
        ]
    for (x, scores, _, names, _), verdict in zip(asked, ask_all(llm, [a[2:] for a in asked])):
        for name in (n for n in names if n != "requirement"):
            scores[name] = verdict[name]["score"] if verdict else math.nan
            x["reasons"][name] = (
                verdict[name]["reason"] if verdict else "the judge gave no readable verdict"
            )
