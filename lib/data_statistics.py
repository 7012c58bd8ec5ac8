"""What VisGenData is like: Fig. 5's figures, its diversity, and the picture of them.

`python make_data.py statistics` prints them beside the paper's.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from lib.runs import each_line
from lib.tasks import BENCH
from lib.text import to_json
from lib.tokenizer import train_tokenizer


def statistics_of(folder: Path) -> dict:
    """Fig. 5's figures of visgen.jsonl, and its diversity, by the names that the templates use.

    Actions are UTPC's blocks: the paper's a_t are reasoning tokens, planning steps and tool calls.
    Tokens are those of all messages and listed tools, and `said` those of the messages alone, both
    of COUNTED trajectories at equal distances. SystemExit if there is no trajectory.
    """
    counted = counted_texts(folder)
    count, unit = token_counter(folder, [said for said, _ in counted.values()])
    count_tools = lru_cache(maxsize=4096)(count)  # many trajectories list the same
    lengths = {i: (count(said), count_tools(tools)) for i, (said, tools) in counted.items()}
    rows, plans, runs, requests = [], {}, set(), set()
    for i, trajectory in enumerate(each_line(folder / "visgen.jsonl")):
        task = trajectory["task"]
        row = {
            "actions": sum(len(turn["order"]) for turn in trajectory["turns"]),
            "calls": len(trajectory["calls"]),
            "scenario": task["scenario"],
            "difficulty": task["difficulty"],
        }
        if i in lengths:
            row |= {"said": lengths[i][0], "tokens": sum(lengths[i])}
        rows.append(row)
        shape = to_json([(step["tool"], step["after"]) for step in trajectory["plan"] or []])
        plans.setdefault(task["scenario"], set()).add(shape)
        requests.add(task["request"])
        runs |= word_runs(task["request"])
    if not rows:
        raise SystemExit(
            f"error: {folder / 'visgen.jsonl'} holds no trajectory; lower `data.min_reward` or "
            "raise `data.queries`"
        )

    hard = [row for row in rows if row["difficulty"] == "hard"]
    bench = [word_runs(task["request"]) for task in each_line(BENCH)]
    # {what is counted: its values}, the tokens' of fewer rows.
    values = {
        name: [row[name] for row in rows if name in row]
        for name in ("actions", "calls", "tokens", "said")
    }
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
    return {
        "rows": rows,
        "n": len(rows),
        "unit": unit,
        "types": Counter(row["scenario"] for row in rows),
        "difficulty": Counter(row["difficulty"] for row in rows),
        "mean": means,
        "counted": len(lengths),
        "quartiles": {name: quartiles(numbers) for name, numbers in values.items()},
        "requests": len(requests),
        "over_20": {name: share_over(rows, name, 20) for name in ("actions", "calls")},
        # Of the hard ones, those with 20 and more.
        "hard_20": {name: share_over(hard, name, 19) for name in ("actions", "calls")},
        "hard": len(hard),
        "over_32k": sum(n > 32_000 for n in values["tokens"]) / len(values["tokens"]),
        "plans": sorted(len(shapes) for shapes in plans.values()),
        # Of the bench's runs of five words, those that occur in the data too.
        "overlap": sum(len(some & runs) for some in bench) / sum(len(some) for some in bench),
    }


# Trajectories whose tokens are counted, and tokens of the vocabulary that is trained where the run
# has none. Both ours.
COUNTED = 1000
VOCABULARY = 16_384
GRADES = ("easy", "medium", "hard")


def counted_texts(folder: Path) -> dict[int, tuple[str, str]]:
    """{place in visgen.jsonl: (its messages, its tools' schemas)} of at most COUNTED trajectories,
    at equal distances."""
    n = sum(1 for _ in each_line(folder / "visgen.jsonl"))
    step = max(1, n // COUNTED)
    found = {}
    for i, trajectory in enumerate(each_line(folder / "visgen.jsonl")):
        if i % step == 0 and len(found) < COUNTED:
            said = "\n".join(message["content"] for message in trajectory["messages"])
            found[i] = said, to_json(trajectory["tools"]) if trajectory["tools"] else ""
    return found


def token_counter(folder: Path, texts: list[str]) -> tuple[Callable[[str], int], str]:
    """(how many tokens a text has, what is counted): those of the run's tokenizer or, where there
    is none, of a byte-level BPE that is trained on `texts`."""
    from transformers import AutoTokenizer

    path = folder / "tokenizer"
    whose = "the run's BPE"
    if not path.is_dir():
        path, whose = folder / "bpe", "a BPE trained on them"
        if not path.is_dir():
            train_tokenizer(texts, 2, VOCABULARY, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    unit = f"tokens of {whose}, of {len(tokenizer):,}"
    return (lambda text: len(tokenizer(text)["input_ids"])), unit


def word_runs(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """The runs of n words in a text: what n-gram overlap is counted in."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def share_over(rows, name, limit):
    """The share of rows in which a whole number is over a limit."""
    return sum(row[name] > limit for row in rows) / max(1, len(rows))


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile, each of them a value that occurs.

    >>> quartiles([1, 2, 3, 4, 100])
    [2, 3, 4]
    """
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75)]


def bins_of(values: list[int], most: int = 40) -> list[float]:
    """Edges of equally wide bins for whole numbers, at most `most`.

    A width that is no whole number would give some bins one number more than others: combs, where
    there are none.

    >>> bins_of([1, 2, 4])
    [0.5, 1.5, 2.5, 3.5, 4.5]
    """
    first, last = min(values), max(values)
    width = (last - first) // most + 1
    n_bins = (last - first) // width + 1
    return [first - 0.5 + width * i for i in range(n_bins + 1)]


def plot_statistics(found: dict, path: Path) -> None:
    """Fig. 5 as a picture of distributions: actions and tokens, by difficulty; actions of each task
    type; tool calls of each difficulty.

    Median and quartiles stand beside the paper's means: a mean lies between the humps of two kinds
    of task, where few are. `found`: statistics_of the data.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((actions, tokens), (types, calls)) = plt.subplots(
        2, 2, figsize=(12, 9), constrained_layout=True
    )
    plot_histogram(actions, found["rows"], "actions", 15, "steps")
    plot_histogram(tokens, found["rows"], "tokens", 29_000, "tokens")
    actions.set(xlabel="actions of a trajectory")
    tokens.set(xlabel=found["unit"])
    plot_boxes(types, found["rows"], "scenario", "actions")
    types.tick_params(axis="x", rotation=90, labelsize=6)
    types.set(ylabel="actions", title=f"actions of {len(found['types'])} task types (trajectories)")
    plot_boxes(calls, found["rows"], "difficulty", "calls")
    calls.set(ylabel="tool calls", title="tool calls by difficulty (trajectories)")
    calls.text(0.02, 0.95, "box: quartiles; whiskers: 5 to 95 %", transform=calls.transAxes)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_histogram(axis, rows: list[dict], name: str, paper_mean: int, unit: str) -> None:
    """How many trajectories have which value, a colour a difficulty, with median and quartiles."""
    rows = [row for row in rows if name in row]
    values = [row[name] for row in rows]
    by_grade = [[row[name] for row in rows if row["difficulty"] == grade] for grade in GRADES]
    axis.hist(
        by_grade,
        bins=bins_of(values),
        stacked=True,
        color=("#9ecae1", "#4292c6", "#084594"),
        label=GRADES,
    )
    low, middle, high = quartiles(values)
    axis.axvspan(
        low, high, color="tab:orange", alpha=0.2, label=f"quartiles, {low:,.0f} to {high:,.0f}"
    )
    axis.axvline(middle, color="tab:orange", label=f"median, {middle:,.0f} {unit}")
    paper_label = f"the paper's mean, {paper_mean:,} {unit}"
    axis.axvline(paper_mean, color="black", linestyle="--", label=paper_label)
    axis.set(ylabel="trajectories")
    axis.legend()


def plot_boxes(axis, rows: list[dict], by: str, name: str) -> None:
    """A box for the values of each group of trajectories, by rising median; labels count them."""
    groups = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row[name])
    ordered = sorted(groups.items(), key=lambda group: quartiles(group[1])[1])
    labels = [f"{group.replace('_', ' ')} ({len(values)})" for group, values in ordered]
    boxes = [values for _, values in ordered]
    axis.boxplot(boxes, tick_labels=labels, whis=(5, 95), showfliers=False)
