"""What a VRL run shows at its end: the curve, the table before and after, a trajectory to read."""

from pathlib import Path

from lib.reading_exercises import reading_rows
from lib.runs import read_jsonl, write_atomic
from rewards import PARTS


def plot_curve(run: Path) -> None:
    """curve.png from metrics.jsonl: PST's loss over the steps of each stage; R_vrt and its parts
    over VRL's steps, with R_vrt on held-out tasks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_jsonl(run / "metrics.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[2, 3])
    plot_losses(left, [m for m in metrics if m["phase"] == "pst" and "loss" in m])
    # A step that was made again after a break stands there twice; the last one counts.
    plot_rewards(
        right,
        {m["step"]: m for m in metrics if m["phase"] == "vrl"},
        {m["step"]: m["greedy"]["reward"] for m in metrics if m["phase"] == "eval"},
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize=7)
    if right.lines:
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=110)
    plt.close(figure)


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


def plot_rewards(axis, metrics, held_out):
    """R_vrt and its parts. `metrics`: {step: its metrics}; `held_out`: {step: mean, greedy}."""
    styles = {"reward": {"color": "black", "lw": 2}, "plan": {}}
    for part in ("reward", "plan", *PARTS):
        steps = [step for step in sorted(metrics) if metrics[step][part] is not None]
        axis.plot(
            steps,
            [metrics[step][part] for step in steps],
            label="R_vrt" if part == "reward" else f"R_{part}",
            **styles.get(part, {"lw": 0.8}),
        )
    steps = sorted(held_out)
    scores = [held_out[step] for step in steps]
    axis.plot(steps, scores, "o--", color="black", label="R_vrt held-out, greedy")
    axis.set(
        xlabel="VRL step",
        title="VRL: mean over the step's rollouts at temperature 1",
        ylim=(None, 1.01),
    )


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
