"""What a policy is worth: playing tasks over all ranks, LtrReward of what was played, and exact
match on general items (what PST must not forget). Used by train_vrl.py, train_pst.py and bench.py.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from env import parse_utpc
from lib import ranks
from lib.experiment import Config
from lib.reading import kinds_of_wish
from lib.reading_exercises import reading_accuracy, reading_tasks, shows_reading
from lib.rollout import Rollout
from lib.runs import read_jsonl, write_atomic
from lib.sampler import sample_rollouts
from lib.text import to_json
from lib.tokens import END_OF_TURN, encode_prompt
from lib.vllm_engine import VllmEngine
from rewards import PARTS, ltr_rewards

# What is kept of each held-out task, beside the means over all.
RECORD = ("id", "difficulty", "wishes", "reward", "strict", "cons")


# --------------------------------------------------------------------------------------------------
# Rollouts and their rewards
def play_share(
    model: torch.nn.Module | VllmEngine,
    tokenizer,
    tasks: list[dict],
    config: Config,
    temperature: float,
    seed: int,
    group_size: int = 1,
    progress: str | None = None,
) -> list[Rollout]:
    """sample_rollouts of this rank's share of `tasks`; group_id is a task's place in `tasks`."""
    mine = ranks.share(range(len(tasks)))
    if not mine:
        return []
    rollouts = sample_rollouts(
        model,
        tokenizer,
        [tasks[i] for i in mine],
        config,
        temperature,
        seed=seed,
        group_size=group_size,
        progress=None if ranks.rank() else progress,
    )
    for r in rollouts:
        r.group_id = mine[r.group_id]
    return rollouts


def score_rollouts(rollouts: list[Rollout], config: Config) -> None:
    """Fill in LtrReward (Sec. 4.3.2) of finished rollouts."""
    rewards = ltr_rewards(
        [r.trajectory for r in rollouts],
        config.reward,
        [r.trajectory["pool"] for r in rollouts],
        config.llm,
    )
    for r, reward in zip(rollouts, rewards):
        r.trajectory["reward"] = reward
        r.reward = reward["total"]


def gather_rollouts(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts of all ranks, in the order of tasks, on every rank."""
    return sorted(ranks.gather(rollouts), key=lambda r: r.group_id)


def mean(values) -> float | None:
    """Mean of what is there: None and NaN are left out; None for nothing."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    return sum(values) / len(values) if values else None


def summary(rollouts: list[Rollout]) -> dict:
    """Mean R_vrt, its parts, and how episodes ended. `strict`: the share with R_vrt above 0.99."""
    rewards = [r.trajectory["reward"] for r in rollouts]
    totals = [reward["total"] for reward in rewards]
    parts = {part: mean(reward[part] for reward in rewards) for part in ("plan", "fine", *PARTS)}
    return {
        "reward": mean(totals),
        **parts,
        "strict": mean(float(total > 0.99) for total in totals if not math.isnan(total)),
        "ended": dict(Counter(r.trajectory["ended"] for r in rollouts)),
        "tokens": mean(len(r.ids) for r in rollouts),
        "turns": mean(len(r.trajectory["turns"]) for r in rollouts),
    }


def part_variances(rollouts: list[Rollout]) -> dict:
    """Mean over groups of each reward part's variance inside the group, as `var_<part>`.

    A part that is equal over the group teaches nothing. None: no group has the part.
    """
    groups = defaultdict(list)
    for r in rollouts:
        groups[r.group_id].append(r.trajectory["reward"])
    found = {}
    for part in ("total", "plan", *PARTS):
        variances = []
        for rewards in groups.values():
            values = [w[part] for w in rewards if w[part] is not None and not math.isnan(w[part])]
            if values:
                center = sum(values) / len(values)
                variances.append(sum((x - center) ** 2 for x in values) / len(values))
        found[f"var_{part}"] = mean(variances)
    return found


# --------------------------------------------------------------------------------------------------
# Evaluation
def evaluate(
    model: torch.nn.Module | VllmEngine,
    tokenizer,
    tasks: list[dict],
    config: Config,
    run: Path,
    progress: str = "held-out",
) -> tuple[dict, list[Rollout]]:
    """Held-out R_vrt with its parts, greedy and sampled, general exact match, and reading where
    the policy is shown it. Returns (figures, greedy rollouts). All ranks call it.
    """
    modes = {"greedy": 0.0}
    if config.bench.sampled:
        modes["sampled"] = 1.0
    figures = {}
    played = {}
    for mode, temperature in modes.items():
        rollouts = play_share(
            model,
            tokenizer,
            tasks,
            config,
            temperature,
            seed=config.seed,
            progress=f"{progress}, {mode}",
        )
        score_rollouts(rollouts, config)
        played[mode] = gather_rollouts(rollouts)
        figures[mode] = summary(played[mode])
    if isinstance(model, VllmEngine):
        answers = partial(model.answers, tokenizer)
    else:
        answers = partial(greedy_answers, model, tokenizer, device=model.device)
    items = read_jsonl(run / "data" / "general_heldout.jsonl")
    figures["general"] = general_exact_match(answers, tokenizer, items)
    if shows_reading(config):
        figures["reading"] = reading_accuracy(answers, tokenizer, reading_tasks(config))
    return figures, played["greedy"]


def cached_evaluation(path: Path, measured: dict, compute: Callable[[], dict]) -> dict:
    """Read an evaluation that is already there, or compute and write it. All ranks call it.

    measured: what it measures, as JSON keeps it. A file of another policy, other tasks or another
    reward is computed anew, so that only like stands beside like.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if ranks.agreed(found.get("measured") == measured):
        return json.loads(path.read_text(encoding="utf-8"))
    result = {"measured": measured, **compute()}
    if ranks.rank() == 0:
        write_atomic(path, to_json(result))
    return result


def what_is_measured(config: Config, policy: str, tasks: list[dict]) -> dict:
    """What decides the figures of `evaluate` beside the weights; `policy` names those."""
    return {
        "policy": policy,
        "tasks": [task["id"] for task in tasks],
        "sampled": config.bench.sampled,
        "reward": asdict(config.reward),
        "judge": config.llm.model if config.reward.judge == "openai" else "rules",
        "record": list(RECORD),
    }


def task_records(rollouts: list[Rollout]) -> list[dict]:
    """What an episode came to, task by task, with RECORD's keys.

    strict: 1.0 if R_vrt is above 0.99, else 0.0. None: the judge failed, or there is no R_cons.
    """
    records = []
    for r in rollouts:
        scored = not math.isnan(r.reward)
        cons = r.trajectory["reward"]["cons"]
        values = (
            r.task["id"],
            r.task["difficulty"],
            kinds_of_wish(r.task["constraints"]),
            r.reward if scored else None,
            float(r.reward > 0.99) if scored else None,
            mean([cons]),
        )
        records.append(dict(zip(RECORD, values, strict=True)))
    return records


def examples_to_read(rollouts: list[Rollout]) -> dict[str, dict]:
    """The best, the median and the worst of scored episodes: {label: trajectory}.

    Of fewer than three each stands there once. Without any score: the first episode.
    """
    scored = [r for r in rollouts if not math.isnan(r.reward)]
    if not scored:
        return {f"first of {len(rollouts)}, none scored": rollouts[0].trajectory}
    # Of equal rewards the longer episode is the better reading.
    ranked = sorted(scored, key=lambda r: (r.reward, len(r.trajectory["calls"])))
    places = {"best": len(ranked) - 1, "median": (len(ranked) - 1) // 2, "worst": 0}
    examples = {}
    shown = set()
    for label, place in places.items():
        if place not in shown:
            examples[f"{label} of {len(scored)}"] = ranked[place].trajectory
            shown.add(place)
    return examples


# --------------------------------------------------------------------------------------------------
# General exact match
def greedy_answers(
    model: torch.nn.Module,
    tokenizer,
    prompts: list[list[int]],
    device: torch.device,
    batch: int = 64,
    max_new_tokens: int = 96,
) -> list[list[int]]:
    """Greedy answers to prompts (lists of ids), as lists of ids without the end of turn."""
    from transformers import GenerationConfig

    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    pad = tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=pad
    )
    model.eval()
    answers = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(by_length), batch):
        part = by_length[at : at + batch]
        width = max(len(prompts[i]) for i in part)
        padding = [width - len(prompts[i]) for i in part]
        ids = torch.tensor(
            [[pad] * n + prompts[i] for i, n in zip(part, padding)], device=device
        )  # (b, width)
        mask = torch.tensor(
            [[0] * n + [1] * (width - n) for n in padding], device=device
        )  # (b, width)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, generation_config=settings)
        for i, new in zip(part, out[:, width:].tolist()):
            answers[i] = new[: new.index(stop)] if stop in new else new
    return [answers[i] for i in range(len(prompts))]


def general_exact_match(
    answers: Callable[[list[list[int]]], list[list[int]]], tokenizer, items: list[dict]
) -> dict:
    """Share of held-out general items answered exactly, by kind; "general": mean of the kinds.

    answers: what answers a list of prompts, such as greedy_answers with its model and tokenizer.
    The last message of an item is the expected answer. Text is compared after strip; a function
    call by name and arguments. All ranks call it.
    """
    mine = ranks.share(items)
    prompts = [encode_prompt(tokenizer, x["messages"][:-1], x.get("tools")) for x in mine]
    hits = []
    for item, new in zip(mine, answers(prompts)):
        said = tokenizer.decode(new).strip()
        expected = item["messages"][-1]["content"]
        hits.append((item["kind"], same_answer(said, expected, item["kind"])))
    by_kind = defaultdict(list)
    for kind, hit in ranks.gather(hits):
        by_kind[kind].append(hit)
    if not by_kind:
        return {"general": math.nan}
    shares = {kind: sum(by_kind[kind]) / len(by_kind[kind]) for kind in sorted(by_kind)}
    return {**shares, "general": sum(shares.values()) / len(shares)}


def same_answer(said: str, expected: str, kind: str) -> bool:
    """Whether an answer is the expected one: the same calls for "function", else the same text."""
    if kind == "function":
        ours = parse_utpc(said)["calls"]
        theirs = parse_utpc(expected)["calls"]
        if theirs:
            well_formed = not any(call["error"] for call in ours)
            return well_formed and names_and_arguments(ours) == names_and_arguments(theirs)
    return said.strip() == expected.strip()


def names_and_arguments(calls: list[dict]) -> list[tuple]:
    """What calls ask for, in order."""
    return [(call["name"], call["arguments"]) for call in calls]
