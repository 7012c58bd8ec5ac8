"""What VisGenData is like: Fig. 5's figures, its diversity, and the picture of them (`python make_data.py statistics`); a run's curve and table."""

import re
from collections import Counter

from lib.runs import ROOT, each_line, read_jsonl, write_atomic
from lib.text import to_json
from rewards import PARTS

BENCH = ROOT / "data" / "visgenbench.jsonl"


def word_runs(text, n=5):
    """The runs of n words in a text: what n-gram overlap is counted in."""
    some = re.findall(r"\w+", text.lower())
    return {tuple(some[i : i + n]) for i in range(len(some) - n + 1)}


def statistics_of(config, folder):
    """Fig. 5's figures of visgen.jsonl, and its diversity, as a dict.

    Actions are UTPC's blocks: the paper's a_t are reasoning tokens, planning steps and tool calls. Tokens are the run's tokenizer's, all messages and
    listed tools; where there is none, a quarter of the characters, which is said.
    """
    count, unit = lambda text: len(text) // 4, "characters / 4"  # noqa: E731
    if (folder / "tokenizer").is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        count, unit = (
            lambda text: len(tokenizer(text)["input_ids"]),
            f"tokens of the run's BPE of {len(tokenizer)}",
        )  # noqa: E731
    rows, plans, runs, requests = [], {}, set(), set()
    for t in each_line(folder / "visgen.jsonl"):
        task = t["task"]
        rows.append(
            {
                "actions": sum(len(turn["order"]) for turn in t["turns"]),
                "calls": len(t["calls"]),
                "scenario": task["scenario"],
                "difficulty": task["difficulty"],
                "tokens": count(
                    to_json(t["tools"]) * bool(t["tools"])
                    + "\n".join(m["content"] for m in t["messages"])
                ),
            }
        )
        plans.setdefault(task["scenario"], set()).add(
            to_json([(step["tool"], step["after"]) for step in t["plan"] or []])
        )
        requests.add(task["request"])
        runs |= word_runs(task["request"])
    if not rows:
        raise SystemExit(
            f"error: {folder / 'visgen.jsonl'} holds no trajectory; lower `data.min_reward` or raise `data.queries`"
        )
    bench = [word_runs(task["request"]) for task in each_line(BENCH)]
    hard = [r for r in rows if r["difficulty"] == "hard"]
    share = lambda some, test: sum(map(test, some)) / max(1, len(some))  # noqa: E731
    return {
        "rows": rows,
        "n": len(rows),
        "unit": unit,
        "types": Counter(r["scenario"] for r in rows),
        "difficulty": Counter(r["difficulty"] for r in rows),
        "mean": {k: sum(r[k] for r in rows) / len(rows) for k in ("actions", "calls", "tokens")},
        "requests": len(requests),
        "over_20": {k: share(rows, lambda r: r[k] > 20) for k in ("actions", "calls")},
        "hard_20": {k: share(hard, lambda r: r[k] >= 20) for k in ("actions", "calls")},
        "hard": len(hard),
        "over_32k": share(rows, lambda r: r["tokens"] > 32_000),
        "plans": sorted(map(len, plans.values())),
        "overlap": sum(len(b & runs) for b in bench) / sum(map(len, bench)),
    }


def plot_statistics(found, path):
    """Fig. 5 as a picture: actions, tokens, task types, difficulty, with the paper's means as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    for ax, name, label, mean in (
        (axes[0, 0], "actions", "actions of a trajectory", 15),
        (axes[0, 1], "tokens", found["unit"], 29_000),
    ):
        ax.hist([r[name] for r in found["rows"]], bins=40)
        ax.axvline(
            mean,
            color="black",
            linestyle="--",
            label=f"the paper's mean, {mean:,} {'tokens' if name == 'tokens' else 'steps'}",
        )
        ax.axvline(
            found["mean"][name], color="tab:orange", label=f"mean here, {found['mean'][name]:.1f}"
        )
        ax.set(xlabel=label, ylabel="trajectories")
        ax.legend()
    names, sizes = zip(*found["types"].most_common())
    axes[1, 0].bar(names, sizes)
    axes[1, 0].tick_params(axis="x", rotation=90, labelsize=6)
    axes[1, 0].set(ylabel="trajectories", title=f"{len(names)} task types")
    axes[1, 1].bar(*zip(*((k, found["difficulty"][k]) for k in ("easy", "medium", "hard"))))
    axes[1, 1].set(ylabel="trajectories", title="difficulty")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_curve(run):
    """curve.png: R_vrt and its parts over VRL steps, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {m["step"]: m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == "vrl"}
    held = {
        m["step"]: m["greedy"]["reward"]
        for m in read_jsonl(run / "metrics.jsonl")
        if m["phase"] == "eval"
    }
    loss = [
        (m["step"], m["loss"], m["stage"])
        for m in read_jsonl(run / "metrics.jsonl")
        if m["phase"] == "pst" and "loss" in m
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[2, 3])
    for stage in sorted({s for _, _, s in loss}):
        left.plot(
            [t for t, _, s in loss if s == stage],
            [x for _, x, s in loss if s == stage],
            label=f"stage {stage}" if stage else "base",
        )
    left.set(
        xlabel="step of the stage", ylabel="loss on the agent's tokens", title="PST", yscale="log"
    )
    for part, style in (
        ("reward", {"color": "black", "lw": 2}),
        ("plan", {}),
        *((p, {"lw": 0.8}) for p in PARTS),
    ):
        steps = [s for s in sorted(lines) if lines[s][part] is not None]
        right.plot(
            steps,
            [lines[s][part] for s in steps],
            label="R_vrt" if part == "reward" else f"R_{part}",
            **style,
        )
    right.plot(
        sorted(held),
        [held[s] for s in sorted(held)],
        "o--",
        color="black",
        label="R_vrt held-out, greedy",
    )
    right.set(
        xlabel="VRL step",
        title="VRL: mean over the step's rollouts at temperature 1",
        ylim=(None, 1.01),
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(
                fontsize=7,
                **({"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if axis is right else {}),
            )
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=110)
    plt.close(figure)


def print_before_after(before, after):
    """The before/after table on held-out tasks."""
    print(f"\n{'held-out':24}{'PST':>10}{'PST + VRL':>12}")
    for mode in ("greedy", "sampled"):
        if mode not in before:
            continue
        for name in ("reward", "strict", "plan", "fine", *PARTS):
            a, b = (x[mode].get(name) for x in (before, after))
            label = {"reward": "R_vrt", "strict": "R_vrt > 0.99"}.get(name, f"R_{name}")
            print(
                f"{mode + ' ' + label:24}"
                + "".join(
                    f"{'-' if x is None else format(x, '.3f'):>{w}}" for x, w in ((a, 10), (b, 12))
                )
            )
    for name in before["general"]:
        print(
            f"{name + ' (exact match)':24}{before['general'][name]:>10.3f}{after['general'][name]:>12.3f}"
        )


def write_trajectory(trajectory, path):
    """One finished trajectory as text to read: request, turns, replies, reward parts."""
    reward = trajectory["reward"]
    lines = [
        f"task {trajectory['task']['id']} ({trajectory['task']['scenario']}, {trajectory['task']['difficulty']}), ended: {trajectory['ended']}",
        f"R_vrt {reward['total']:.3f} = plan {reward['plan']:.3f} x fine {reward['fine']:.3f}; "
        + ", ".join(f"{p} {reward[p]:.2f}" for p in PARTS if reward[p] is not None),
        "",
    ]
    for m in trajectory["messages"]:
        lines += [f"--- {m['role']}", m["content"], ""]
    write_atomic(path, "\n".join(lines))
