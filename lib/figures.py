"""What a VRL run shows: the curve while it runs; at its end the tables, and episodes to read."""

import io
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lib.evaluation import mean
from lib.reading_exercises import reading_rows
from lib.runs import read_jsonl, write_atomic
from lib.tables import bootstrap, paired, unpaired
from rewards import PARTS

# Steps of a moving mean, and of the first and the last steps that are compared: each step plays
# other tasks, so its R_vrt alone says little. Ours.
MOVING = 10
# Fewer tasks, or steps, are not worth an interval. Ours.
LEAST = 5
RESAMPLES = 10_000


# --------------------------------------------------------------------------------------------------
# The curve
def vrl_metrics(run: Path) -> dict[int, dict]:
    """{step: its line of metrics.jsonl} of VRL's steps so far, in order; {} before the first."""
    path = run / "metrics.jsonl"
    metrics = read_jsonl(path) if path.is_file() else []
    # A step that was made again after a break stands there twice; the last one counts.
    found = {m["step"]: m for m in metrics if m["phase"] == "vrl"}
    return dict(sorted(found.items()))


def mean_of_last(values: list[float | None]) -> float | None:
    """Mean of the last MOVING values; None is left out; None for nothing.

    >>> mean_of_last([0.0, None, 0.5])
    0.25
    """
    return mean(values[-MOVING:])


def plot_curve(run: Path) -> None:
    """curve.png, of what is there so far: PST's loss over the steps of each stage; R_vrt and its
    parts over VRL's steps, with R_vrt on held-out tasks before and after."""
    from matplotlib.figure import Figure

    losses = [m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == "pst" and "loss" in m]
    figure = Figure(figsize=(9, 3.8))  # inches; a page shows it about 850 pixels wide
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    plot_losses(left, losses)
    plot_rewards(right, vrl_metrics(run))
    plot_held_out(right, run)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize=8)
    if right.lines:
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    # Whole or not at all: somebody may look at it at any time.
    write_atomic(run / "curve.png", picture.getvalue())


def plot_losses(axis, metrics):
    """PST's loss, a line a stage; stage 0 is the base model's training."""
    for stage in sorted({m["stage"] for m in metrics}):
        of_stage = [m for m in metrics if m["stage"] == stage]
        axis.plot(
            [m["step"] for m in of_stage],
            [m["loss"] for m in of_stage],
            label=f"stage {stage}" if stage else "base",
        )
    axis.set(
        xlabel="step of the stage",
        ylabel="loss on the agent's tokens",
        title="PST",
        yscale="log",
    )


def plot_rewards(axis, metrics):
    """R_vrt of each step and its moving mean; its parts, thin. metrics: {step: its metrics}."""
    rewards = [m["reward"] for m in metrics.values()]
    means = [mean_of_last(rewards[:n]) for n in range(1, len(rewards) + 1)]
    plot_series(axis, metrics, rewards, label="R_vrt of a step", color="black", alpha=0.4)
    label = f"mean of {MOVING} steps"
    plot_series(axis, metrics, means, label=label, color="black", lw=2.5)
    for part in ("plan", *PARTS):
        plot_series(axis, metrics, [m[part] for m in metrics.values()], label=f"R_{part}", lw=0.7)
    axis.set(
        xlabel="VRL step",
        title="VRL: rollouts at temperature 1",
        ylim=(None, 1.01),
    )
    axis.locator_params(axis="x", integer=True)


def plot_series(axis, steps, values, **style):
    """A line through the values that are there."""
    there = [(step, value) for step, value in zip(steps, values) if value is not None]
    axis.plot([step for step, _ in there], [value for _, value in there], **style)


def plot_held_out(axis, run):
    """R_vrt on held-out tasks, as far as it was measured: points with intervals over tasks."""
    import numpy

    points = []
    for name in ("before", "after"):
        path = run / "vrl" / f"{name}.json"
        measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        rewards = [r["reward"] for r in measured.get("tasks", []) if r["reward"] is not None]
        if rewards:
            low, high = bootstrap(numpy.array(rewards), numpy.random.default_rng(0), RESAMPLES)
            points.append((measured["step"], mean(rewards), low, high))
    if not points:
        return
    steps, means, lows, highs = numpy.array(points).T  # (points,) each
    axis.errorbar(
        steps,
        means,
        yerr=abs(numpy.array([lows, highs]) - means),  # (2, points)
        fmt="o",
        color="crimson",
        capsize=4,
        zorder=3,
        label="held-out, greedy,\nwith 95 % interval",
    )


# --------------------------------------------------------------------------------------------------
# The tables
def print_before_after(before: dict, after: dict) -> None:
    """The table on held-out tasks before and after VRL.

    Both as lib.evaluation gives them: {"greedy": means, "sampled": means where they were measured,
    "general": {kind: exact match}, "reading": lib.reading_exercises's, where it was measured}.
    """
    print(f"\n{'held-out':24}{'PST':>10}{'PST + VRL':>12}")
    labels = {"reward": "R_vrt", "strict": "R_vrt > 0.99"}
    for mode in ("greedy", "sampled"):
        if mode not in before:
            continue
        for name in ("reward", "strict", "plan", "fine", *PARTS):
            label = f"{mode} {labels.get(name, f'R_{name}')}"
            print_line(label, before[mode].get(name), after[mode].get(name))
    for kind, matches in before["general"].items():
        print_line(f"{kind} (exact match)", matches, after["general"][kind])
    for (label, first), (_, second) in zip(reading_rows(before), reading_rows(after)):
        print_line(label, first, second)


def print_line(label, before, after):
    """A line of the table; None is printed as a dash."""
    first = "-" if before is None else f"{before:.3f}"
    second = "-" if after is None else f"{after:.3f}"
    print(f"{label:24}{first:>10}{second:>12}")


def print_intervals(before: list[dict], after: list[dict]) -> None:
    """The table of R_vrt on held-out tasks before and after VRL with intervals, also by difficulty
    and by kind of wish.

    before, after: lib.evaluation.task_records of the same tasks. What fewer than LEAST tasks have
    is left out, and named.
    """
    later = {record["id"]: record for record in after}
    pairs = [(record, later[record["id"]]) for record in before]
    head = f"{'n':>5}{'before':>8}{'after':>8}{'difference':>12}  95 % interval"
    print(f"\n{'held-out, greedy':30}{head}")
    few = []
    shown = 0
    for label, values in rows_of(pairs):
        if len(values) < LEAST:
            few.append(f"{label.removeprefix('R_vrt, ')} ({len(values)})")
            continue
        row = paired(*zip(*values), resamples=RESAMPLES)
        shown += 1
        print(
            f"{label:30}{row['n']:5}{row['a']:8.3f}{row['b']:8.3f}{row['difference']:+12.3f}"
            f"  [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    if shown:
        print_wrapped(
            f"Intervals are over tasks ({RESAMPLES:,} draws), of this seed alone; about "
            f"{0.05 * shown:.1f} of these {shown} miss the true difference by chance."
        )
    if few:
        print_wrapped(f"Left out, with fewer than {LEAST} tasks: {', '.join(few)}.")


def rows_of(pairs: list[tuple[dict, dict]]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """(label, (value before, value after) of each task that has both) of print_intervals's rows."""
    for label, name in (("R_vrt", "reward"), ("R_vrt > 0.99", "strict"), ("R_cons", "cons")):
        yield label, values_of(pairs, name)
    for difficulty in ("easy", "medium", "hard"):
        of_it = [pair for pair in pairs if pair[0]["difficulty"] == difficulty]
        yield f"R_vrt, {difficulty}", values_of(of_it, "reward")
    for wish in sorted({wish for record, _ in pairs for wish in record["wishes"]}):
        of_it = [pair for pair in pairs if wish in pair[0]["wishes"]]
        yield f"R_vrt, {wish}", values_of(of_it, "reward")


def values_of(pairs: list[tuple[dict, dict]], name: str) -> list[tuple[float, float]]:
    """(before, after) of one value of the records, where both are there."""
    values = [(first[name], second[name]) for first, second in pairs]
    return [pair for pair in values if None not in pair]


def print_own_tasks(run: Path) -> None:
    """R_vrt sampled over VRL's own tasks: the last steps against the first ones."""
    rewards = [m["reward"] for m in vrl_metrics(run).values() if m["reward"] is not None]
    n = min(MOVING, len(rewards) // 2)
    what = "R_vrt sampled over VRL's own tasks"
    if n < LEAST:
        print(f"\n{what}: {len(rewards)} steps are too few to compare the last with the first.")
        return
    first, last = rewards[:n], rewards[-n:]
    row = unpaired(first, last, RESAMPLES)
    print(
        f"\n{what}: first {n} steps {mean(first):.3f}, last {n} {mean(last):.3f},\n"
        f"difference {row['difference']:+.3f}, 95 % interval over steps "
        f"[{row['low']:+.3f}, {row['high']:+.3f}]"
    )


def print_wrapped(text: str) -> None:
    """Print a text in lines of at most 100 columns."""
    print(textwrap.fill(text, 100))


def say_if_too_short(before: dict, after: dict) -> None:
    """Say so where no held-out task was ever scored above 0: such a table is no fault of the code.

    before, after: as in print_before_after.
    """
    measured = [
        run[mode] for run in (before, after) for mode in ("greedy", "sampled") if mode in run
    ]
    if any(figures["reward"] for figures in measured):
        return
    print(
        "R_vrt is 0 throughout: this run is too short to learn, which is normal for "
        "configs/smoke.yaml (it shows that every phase runs); next: python train_vrl.py --config "
        "configs/tiny.yaml"
    )


# --------------------------------------------------------------------------------------------------
# Episodes to read
def write_trajectories(examples: dict[str, dict], path: Path) -> None:
    """Some finished trajectories as text to read, one after the other: {label: trajectory}."""
    texts = [trajectory_text(trajectory, label) for label, trajectory in examples.items()]
    rule = "=" * 100 + "\n"
    write_atomic(path, rule.join(texts))


def trajectory_text(trajectory: dict, label: str) -> str:
    """One trajectory: its label, request, turns, replies, reward parts."""
    task, reward = trajectory["task"], trajectory["reward"]
    parts = ", ".join(f"{part} {reward[part]:.2f}" for part in PARTS if reward[part] is not None)
    lines = [
        f"task {task['id']} ({task['scenario']}, {task['difficulty']}): {label} held-out episodes, "
        f"greedy; ended: {trajectory['ended']}",
        f"R_vrt {reward['total']:.3f} = plan {reward['plan']:.3f} x fine {reward['fine']:.3f}; "
        + parts,
        "",
    ]
    for message in trajectory["messages"]:
        lines += [f"--- {message['role']}", message["content"], ""]
    return "\n".join(lines)
