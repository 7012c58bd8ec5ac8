"""bench.py's page of one training step (Sec. 4.3, GRPO): the rollouts of a task side by side, their
rewards and advantages, and which tokens the update pushed up and down.

The push of a token is its log-probability after the step less that before it, in nats, at the same
place of the same rollout. train_vrl.replay makes the two policies.
"""

import argparse
import difflib
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from lib.evaluation import score_rollouts
from lib.experiment import Config, load_config
from lib.pages import refresh_index
from lib.rollout import Rollout
from lib.runs import read_jsonl, write_atomic
from lib.sampler import sample_rollouts
from lib.text import fill_template
from lib.tokens import load_tokenizer
from rewards import PARTS

# Tasks that a page shows, and of the pushed tokens those that it lists. Ours.
TASKS = 4
MOST = 6
# Levels of colour, and the share of tokens whose push has less than the full one.
LEVELS = 4
BELOW_FULL = 0.95
# Tokens of a rollout, and characters of a reply, that are shown. Ours.
TOKENS = 600
REPLY = 160


# ---------------------------------------------------------------------------- the command
def step_page(arguments: list[str], replay: Callable) -> None:
    """`bench.py step RUN N`: write RUN/step-N.html. replay: train_vrl's.

    SystemExit: a step that the run has not made, or whose rollouts are not kept.
    """
    parser = argparse.ArgumentParser(prog="bench.py step", description=step_page.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, such as runs/quick")
    parser.add_argument("step", type=int, help="a step of VRL, from 1")
    parser.add_argument(
        "--tasks",
        type=int,
        default=TASKS,
        help="tasks shown, those whose rewards differ most (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    if given.tasks < 1:
        raise SystemExit(f"error: --tasks is {given.tasks}; it must be at least 1")
    if not (given.run / "config.yaml").is_file():
        raise SystemExit(f"error: {given.run} is no run: config.yaml is missing there")
    record = step_record(given.run, given.step)
    config = load_config(given.run / "config.yaml")
    tokenizer = load_tokenizer(config, given.run)

    def play(sampler, rollouts: list[Rollout], seed: int) -> list[Rollout]:
        """The greedy episodes of the tasks that are shown, in the same environments."""
        tasks = [group[0].task for group in chosen(rollouts, given.tasks)]
        played = sample_rollouts(sampler, tokenizer, tasks, config, 0.0, seed)
        score_rollouts(played, config)
        return played

    again = replay(config, given.run, given.step, tokenizer, play)
    ran, now = record["grad_norm"], again["figures"]["grad_norm"]
    if not math.isclose(ran, now, rel_tol=0.01, abs_tol=1e-9):
        print(
            f"warning: the gradient's norm was {ran:.4g} in the run and is {now:.4g} here, so the "
            "pushes are not quite the run's: another machine, another thread count, other files?"
        )
    page = fill_template(
        "templates/step.jinja", **page_of(again, record, config, tokenizer, given.tasks)
    )
    target = given.run / f"step-{given.step}.html"
    write_atomic(target, page)
    refresh_index(target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def step_record(run: Path, step: int) -> dict:
    """The line of metrics.jsonl of a step of VRL (from 1). SystemExit if there is none."""
    records = {m["step"]: m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == "vrl"}
    if step not in records:
        done = f"it has steps 1 to {max(records)}" if records else "it has made no step of VRL yet"
        raise SystemExit(f"error: {run} has no step {step}; {done}")
    return records[step]


# ---------------------------------------------------------------------------- the page's content
def groups_of(rollouts: list[Rollout]) -> list[list[Rollout]]:
    """The rollouts of each task, in the order of tasks."""
    groups = {}
    for r in rollouts:
        groups.setdefault(r.group_id, []).append(r)
    return list(groups.values())


def spread(group: list[Rollout]) -> float:
    """Standard deviation (of a sample, n - 1) of a group's rewards; 0 of fewer than two scores."""
    scores = [r.reward for r in group if not math.isnan(r.reward)]
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def chosen(rollouts: list[Rollout], n: int) -> list[list[Rollout]]:
    """The n groups whose rewards differ most, the most first: they teach most."""
    return sorted(groups_of(rollouts), key=spread, reverse=True)[:n]


def page_of(again: dict, record: dict, config: Config, tokenizer, n: int) -> dict:
    """What templates/step.jinja shows of a step that was done again (train_vrl.replay)."""
    rollouts = again["rollouts"]
    before, after = again["logprobs"]
    pushes = {}  # id of a rollout -> the push of each of its own tokens
    for r, old, new in zip(rollouts, before, after):
        pushes[id(r)] = [b - a for a, b in zip(old, new)]
    shown = chosen(rollouts, n)
    full = full_colour([p for group in shown for r in group for p in pushes[id(r)]])
    places = {group[0].group_id: place for place, group in enumerate(shown, 1)}
    groups = []
    for group, old, new in zip(shown, *again["looks"]):
        cards = []
        for number, r in enumerate(group, 1):
            cards.append({"number": number, **card_of(r, pushes[id(r)], full, tokenizer)})
        cards.sort(key=lambda card: card["advantage"], reverse=True)
        answers = greedy(old, new, tokenizer)
        groups.append({**of_group(group, places), "cards": cards, "greedy": answers})
    return {
        "record": record,
        "figures": again["figures"],
        "config": config,
        "parts": PARTS,
        "all_groups": [of_group(group, places) for group in groups_of(rollouts)],
        "groups": groups,
        "full": full,
        "levels": LEVELS,
        "most": most_pushed(groups),
        "dots": dots(rollouts, pushes),
        "means": {
            name: mean_push([pushes[id(r)] for r in rollouts if sign * r.advantage > 0])
            for name, sign in (("above", 1), ("below", -1))
        },
    }


def of_group(group: list[Rollout], places: dict[int, int]) -> dict:
    """A group's task, its place on the page (None: not shown), and its rewards."""
    scores = [r.reward for r in group if not math.isnan(r.reward)]
    return {
        "task": group[0].task,
        "place": places.get(group[0].group_id),
        "rewards": [r.reward for r in group],
        "mean": statistics.mean(scores) if scores else None,
        "spread": spread(group),
        "signal": any(r.signal for r in group),
    }


def full_colour(pushes: list[float]) -> float:
    """The push, in nats, from which a token has the full colour: BELOW_FULL of them have less.

    >>> full_colour([0.0] * 50 + [-0.2] * 50)
    0.2
    """
    sizes = sorted(map(abs, pushes))
    return sizes[int(BELOW_FULL * (len(sizes) - 1))] if sizes else 0.0


def level_of(push: float, full: float) -> int:
    """The colour of a push: -LEVELS (down) to LEVELS (up).

    >>> level_of(0.1, 0.2), level_of(-5, 0.2), level_of(0.01, 0.2), level_of(0.0, 0.0)
    (2, -4, 0, 0)
    """
    share = min(1.0, abs(push) / full) if full else 0.0
    return round(LEVELS * math.copysign(share, push))


def card_of(r: Rollout, pushes: list[float], full: float, tokenizer) -> dict:
    """What the page shows of one rollout; `turns`: [{"pieces", "replies", "cut"}]."""
    replies = replies_of(r.trajectory)
    turns, at, left = [], 0, TOKENS
    for number, ids in enumerate(agents_turns(r)):
        here = pushes[at : at + len(ids)]
        pieces = []
        for text, push in pieces_of(tokenizer, ids[:left], here[:left]):
            pieces.append({"text": text, "push": push, "level": level_of(push, full)})
        turns.append(
            {
                "pieces": pieces,
                "cut": max(0, len(ids) - left),
                "replies": replies[number] if number < len(replies) else [],
            }
        )
        at += len(ids)
        left = max(0, left - len(ids))
    return {
        "reward": r.trajectory["reward"],
        "total": r.reward,
        "advantage": r.advantage,
        "ended": r.trajectory["ended"],
        "change": sum(pushes),
        "tokens": len(pushes),
        "turns": turns,
    }


def agents_turns(r: Rollout) -> list[list[int]]:
    """The ids of each of the agent's turns, its end of turn with them."""
    turns, inside = [], 0
    for token, of_agent in zip(r.ids, r.loss_mask):
        if of_agent and not inside:
            turns.append([])
        if of_agent:
            turns[-1].append(token)
        inside = of_agent
    return turns


def replies_of(trajectory: dict) -> list[list[str]]:
    """The environment's replies to each turn of the agent, abridged."""
    turns = []
    for message in trajectory["messages"]:
        if message["role"] == "assistant":
            turns.append([])
        elif turns:
            text = message["content"]
            turns[-1].append(text if len(text) <= REPLY else text[:REPLY] + " …")
    return turns


def pieces_of(tokenizer, ids: list[int], pushes: list[float]) -> list[tuple[str, float]]:
    """(text, push) of tokens in order; tokens that are one character together are one piece."""
    pieces, waiting, push = [], [], 0.0
    for token, more in zip(ids, pushes):
        waiting.append(token)
        push += more
        text = tokenizer.decode(waiting)
        # A character of several bytes may be cut between two tokens.
        if not text.endswith("\ufffd"):
            pieces.append((text, push))
            waiting, push = [], 0.0
    if waiting:
        pieces.append((tokenizer.decode(waiting), push))
    return pieces


def most_pushed(groups: list[dict]) -> dict[str, list[dict]]:
    """The MOST pieces of the shown rollouts pushed furthest {"up", "down"}, each with its place."""
    found = []
    for task, group in enumerate(groups, 1):
        for card in group["cards"]:
            for turn in card["turns"]:
                texts = [piece["text"] for piece in turn["pieces"]]
                for i, piece in enumerate(turn["pieces"]):
                    ahead, behind = "".join(texts[:i])[-24:], "".join(texts[i + 1 :])[:16]
                    place = {"task": task, "ahead": ahead, "behind": behind}
                    place["rollout"] = card["number"]
                    found.append({**piece, **place, "advantage": card["advantage"]})
    found.sort(key=lambda piece: piece["push"])
    return {
        "up": [piece for piece in found[: -MOST - 1 : -1] if piece["push"] > 0],
        "down": [piece for piece in found[:MOST] if piece["push"] < 0],
    }


def mean_push(pushes: list[list[float]]) -> dict | None:
    """{"rollouts", "token": mean push of a token, "whole": mean change of a whole rollout}."""
    tokens = [p for of_rollout in pushes for p in of_rollout]
    if not tokens:
        return None
    return {
        "rollouts": len(pushes),
        "token": statistics.mean(tokens),
        "whole": statistics.mean(map(sum, pushes)),
    }


def dots(rollouts: list[Rollout], pushes: dict[int, list[float]]) -> dict:
    """Every rollout as a point of a drawing: advantage to the right, the change of its whole
    log-probability upwards, each as a share (-1 to 1) of the largest; {"x", "y", "points"}."""
    changes = [sum(pushes[id(r)]) for r in rollouts]
    x = max(abs(r.advantage) for r in rollouts) or 1.0
    y = max(map(abs, changes)) or 1.0
    points = [(r.advantage / x, change / y) for r, change in zip(rollouts, changes)]
    return {"x": x, "y": y, "points": points}


# ---------------------------------------------------------------------------- before and after
def greedy(old: Rollout, new: Rollout, tokenizer) -> dict:
    """The policy's greedy answer to a task before and after the step, differences marked."""
    texts = [tokenizer.decode([t for turn in agents_turns(r) for t in turn]) for r in (old, new)]
    sides = []
    for r, parts in zip((old, new), differences(*texts)):
        sides.append({"reward": r.reward, "logprob": sum(r.logprobs), "parts": parts})
    return {"same": texts[0] == texts[1], "before": sides[0], "after": sides[1]}


def differences(old: str, new: str) -> tuple[list, list]:
    """Two texts, each as [(text, whether the other lacks it)], word by word.

    >>> differences("a red fox", "a fox.")
    ([('a ', False), ('red ', True), ('fox', False)], [('a ', False), ('fox', False), ('.', True)])
    """
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (old, new))
    of_old, of_new = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for parts, words in ((of_old, a[i:j]), (of_new, b[k:m])):
            if words:
                parts.append(("".join(words), kind != "equal"))
    return of_old, of_new
