"""`bench.py curves`: the curves of several runs in one picture, such as seeds, or two rewards."""

import argparse
import io
import json
import os
from pathlib import Path

from lib.figures import MOVING, mean_of_last, vrl_metrics
from lib.runs import ROOT, write_atomic
from lib.tables import interval

# What is compared on held-out tasks: {its name in a task's record: how it is called}.
HELD_OUT = {"reward": "R_vrt", "strict": "R_vrt > 0.99", "cons": "R_cons"}


def curves(args: list[str]) -> None:
    """`bench.py curves GROUP [GROUP ...] [--out FILE]`: draw and print VRL's curves.

    A GROUP is a run's folder, or several, its seeds, with commas between. SystemExit where a run
    is not finished.
    """
    parser = argparse.ArgumentParser(prog="bench.py curves", description=curves.__doc__)
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--out", default="curves.png", help="the picture (default: %(default)s)")
    given = parser.parse_args(args)
    groups = {group: [find_finished(name) for name in group.split(",")] for group in given.groups}
    plot_groups(groups, Path(given.out))
    print(f"{'':28}{'before':>8}{'after':>8}{'difference':>12}  95 % interval over seeds and tasks")
    for group, runs in groups.items():
        print(f"{group}, {len(runs)} run{'s' * (len(runs) > 1)}")
        for key, label in HELD_OUT.items():
            print_held_out(f"  held out, greedy: {label}", [held_out(run, key) for run in runs])
        print_own(runs)
    print(f"{given.out}")


def name_of(runs: list[str]) -> str:
    """What a group's runs are called together: the name that they share, and how many seeds.

    >>> name_of(["runs/quick", "runs/quick-1", "runs/quick-2"]), name_of(["runs/quick-1"])
    ('quick, 3 seeds', 'quick-1')
    """
    names = [Path(run).name for run in runs]
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names).rstrip("0123456789").rstrip("-_")
    return f"{shared or ' + '.join(names)}, {len(names)} seeds"


def find_finished(name: str) -> Path:
    """The folder of a run whose VRL is finished. SystemExit if it is not."""
    for run in (Path(name), ROOT / name):
        if (run / "vrl" / "after.json").is_file():
            return run
    raise SystemExit(
        f"error: {name} is no run whose VRL is finished: {name}/vrl/after.json is missing"
    )


def held_out(run: Path, key: str) -> tuple[list[float], list[float]]:
    """(before, after): a figure of each held-out task that has it both times, paired by id."""
    records = []
    for name in ("before", "after"):
        tasks = json.loads((run / "vrl" / f"{name}.json").read_text(encoding="utf-8"))["tasks"]
        records.append({task["id"]: task[key] for task in tasks if task[key] is not None})
    before, after = records
    shared = sorted(before.keys() & after.keys())
    return [float(before[i]) for i in shared], [float(after[i]) for i in shared]


def print_held_out(label: str, pairs: list[tuple[list[float], list[float]]]) -> None:
    """A line: means before and after, and their difference with its interval."""
    pairs = [(before, after) for before, after in pairs if before]
    if not pairs:
        return
    changes = [[b - a for a, b in zip(before, after)] for before, after in pairs]
    difference, low, high = interval(changes)
    before, after = (sum(sum(p[i]) / len(p[i]) for p in pairs) / len(pairs) for i in (0, 1))
    print(f"{label:28}{before:8.3f}{after:8.3f}{difference:+12.3f}  [{low:+.3f}, {high:+.3f}]")


def print_own(runs: list[Path]) -> None:
    """A line: R_vrt sampled over VRL's own tasks, the first and the last steps of each run."""
    firsts, lasts = [], []
    for run in runs:
        rewards = [m["reward"] for m in vrl_metrics(run).values() if m["reward"] is not None]
        n = min(MOVING, len(rewards) // 2)
        if n:
            firsts.append(sum(rewards[:n]) / n)
            lasts.append(sum(rewards[-n:]) / n)
    if firsts:
        first, last = sum(firsts) / len(firsts), sum(lasts) / len(lasts)
        each = " ".join(f"{b - a:+.3f}" for a, b in zip(firsts, lasts))
        label = f"  own tasks: first, last {MOVING}"
        print(f"{label:28}{first:8.3f}{last:8.3f}{last - first:+12.3f}  by run: {each}")


def plot_groups(groups: dict[str, list[Path]], path: Path) -> None:
    """Each run's moving mean thin, a group's mean bold; held-out means before and after as points,
    a line between them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8))  # inches; a page shows it about 850 pixels wide
    axis = figure.subplots()
    for i, (group, runs) in enumerate(groups.items()):
        color = f"C{i}"
        name = name_of(group.split(","))
        lines = []
        for run in runs:
            metrics = vrl_metrics(run)
            rewards = [m["reward"] for m in metrics.values()]
            line = [mean_of_last(rewards[:n]) for n in range(1, len(rewards) + 1)]
            axis.plot(list(metrics), line, color=color, lw=1, alpha=0.5)
            lines.append(line)
        n_steps = min(map(len, lines))
        bold = [sum(line[n] for line in lines) / len(lines) for n in range(n_steps)]
        axis.plot(range(1, n_steps + 1), bold, color=color, lw=2.5, label=f"{name}: own tasks")
        pairs = [held_out(run, "reward") for run in runs]
        before, after = (sum(sum(p[k]) / len(p[k]) for p in pairs) / len(pairs) for k in (0, 1))
        points = [before, after]
        axis.plot([0, n_steps], points, "o--", color=color, lw=1, label=f"{name}: held out, greedy")
    axis.set(
        xlabel="VRL step",
        ylabel="R_vrt",
        title=f"VRL: rollouts at temperature 1, mean of {MOVING} steps",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomic(path, picture.getvalue())
