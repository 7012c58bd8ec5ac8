"""lib.evaluation."""

import json
import math
from collections import Counter
from functools import partial

import torch

from env import parse_utpc
from lib import ranks
from lib.runs import read_jsonl, write_atomic
from lib.sampler import sample_rollouts
from lib.text import to_json
from lib.tokens import END_OF_TURN, encode_prompt
from lib.vllm_engine import VllmEngine
from rewards import PARTS, ltr_rewards


def score_rollouts(rollouts, config):
    """Fill in LtrReward (Sec. 4.3.2) of finished rollouts."""
    rewards = ltr_rewards(
        [r.trajectory for r in rollouts],
        config.reward,
        [r.trajectory["pool"] for r in rollouts],
        config.llm,
    )
    for r, reward in zip(rollouts, rewards):
        r.trajectory["reward"], r.reward = reward, reward["total"]


def play_share(model, tokenizer, tasks, config, temperature, seed, group_size=1, progress=None):
    """sample_rollouts of this rank's share of `tasks`; group_id is a task's place in `tasks`."""
    mine = ranks.share(range(len(tasks)))
    rollouts = (
        sample_rollouts(
            model,
            tokenizer,
            [tasks[i] for i in mine],
            config,
            temperature,
            seed=seed,
            group_size=group_size,
            progress=None if ranks.rank() else progress,
        )
        if mine
        else []
    )
    for r in rollouts:
        r.group_id = mine[r.group_id]
    return rollouts


def gather_rollouts(rollouts):
    """The rollouts of all ranks, in the order of tasks, on every rank."""
    return sorted(ranks.gather(rollouts), key=lambda r: r.group_id)


def mean(values):
    """Mean of what is there: None and NaN are left out; None for nothing."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    return sum(values) / len(values) if values else None


def summary(rollouts):
    """Mean R_vrt, its parts, and how episodes ended."""
    rewards = [r.trajectory["reward"] for r in rollouts]
    return {
        "reward": mean(w["total"] for w in rewards),
        **{k: mean(w[k] for w in rewards) for k in ("plan", "fine", *PARTS)},
        "strict": mean(float(w["total"] > 0.99) for w in rewards if not math.isnan(w["total"])),
        "ended": dict(Counter(r.trajectory["ended"] for r in rollouts)),
        "tokens": mean(len(r.ids) for r in rollouts),
        "turns": mean(len(r.trajectory["turns"]) for r in rollouts),
    }


def evaluate(model, tokenizer, tasks, config, run, progress="held-out"):
    """Held-out R_vrt with its parts, greedy and sampled, and general exact match. Returns (figures, greedy rollouts)."""
    out, kept = {}, None
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        if name == "greedy" or config.bench.sampled:
            rollouts = play_share(
                model,
                tokenizer,
                tasks,
                config,
                temperature,
                seed=config.seed,
                progress=f"{progress}, {name}",
            )
            score_rollouts(rollouts, config)
            rollouts = gather_rollouts(rollouts)
            out[name], kept = summary(rollouts), kept or rollouts
    greedy = (
        model.answers
        if isinstance(model, VllmEngine)
        else partial(greedy_answers, model, device=model.device)
    )
    out["general"] = general_exact_match(
        partial(greedy, tokenizer), tokenizer, read_jsonl(run / "data" / "general_heldout.jsonl")
    )
    return out, kept


def cached_evaluation(path, compute):
    """Read an evaluation that is already there, or compute it and write it (figures, one trajectory). All ranks call it."""
    if ranks.agreed(path.is_file()):
        return json.loads(path.read_text(encoding="utf-8"))
    result = compute()
    if ranks.rank() == 0:
        write_atomic(path, to_json(result))
    return result


def greedy_answers(model, tokenizer, prompts, device, batch=64, max_new_tokens=96):
    """Greedy answers to prompts (lists of ids), as lists of ids without the end of turn."""
    from transformers import GenerationConfig

    stop, pad = tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=pad
    )
    answers = {}
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor(
            [[pad] * (width - len(prompts[i])) + prompts[i] for i in part], device=device
        )  # (b, width)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=device
        )
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, generation_config=settings)[
                :, width:
            ].tolist()
        answers.update(
            {i: new[: new.index(stop)] if stop in new else new for i, new in zip(part, out)}
        )
    return [answers[i] for i in range(len(prompts))]


def general_exact_match(answers, tokenizer, items):
    """Share of held-out general items answered exactly, by kind; "general" is the mean of the kinds. answers: a function of prompts, greedy_answers' kind.

    The last message of an item is the expected answer. Text is compared after strip; a function call by name and arguments.
    """
    mine = ranks.share(items)
    said = answers([encode_prompt(tokenizer, x["messages"][:-1], x.get("tools")) for x in mine])
    hits = ranks.gather(
        [
            (
                x["kind"],
                same_answer(tokenizer.decode(new).strip(), x["messages"][-1]["content"], x["kind"]),
            )
            for x, new in zip(mine, said)
        ]
    )
    shares = {
        kind: sum(hit for k, hit in hits if k == kind) / sum(k == kind for k, _ in hits)
        for kind in sorted({k for k, _ in hits})
    }
    return (
        dict(shares, general=sum(shares.values()) / len(shares))
        if shares
        else {"general": math.nan}
    )


def same_answer(said, expected, kind):
    """Whether an answer is the expected one: the same calls for kind "function", else the same text."""
    if kind == "function":
        calls = [parse_utpc(text)["calls"] for text in (said, expected)]
        if calls[1]:
            ours, theirs = ([(c["name"], c["arguments"]) for c in x] for x in calls)
            return ours == theirs and not any(c["error"] for c in calls[0])
    return said.strip() == expected.strip()
