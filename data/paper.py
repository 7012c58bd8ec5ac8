"""The paper's Tables 2 to 4 beside rows of ours, and their statistics: intervals, paired tests, orderings, Table 4's rows as table and picture."""

import os
from dataclasses import asdict
from pathlib import Path

import yaml

from configs.experiment import ROOT, load_config, write_atomic

PAPER = ROOT / "data" / "paper_tables.yaml"
# An ablation's row: `objective` is the mean of S-Rate and, where a task states them, Amount, Duration and Storyboard.
FIGURES = {"R_vrt": "R_vrt greedy", "R_vrt sampled": "R_vrt at temperature 1", "s_rate": "S-Rate", "objective": "objective columns"}


def read_paper():
    """data/paper_tables.yaml as a dict."""
    return yaml.safe_load(PAPER.read_text(encoding="utf-8"))


def paired(a, b, draws=10_000):
    """Two agents on the same tasks, values (n,) each: B - A, its 95 % bootstrap interval over tasks, p of a two-sided sign-flip permutation test."""
    import numpy

    rng, a, b = numpy.random.default_rng(0), numpy.asarray(a, dtype=float), numpy.asarray(b, dtype=float)
    d = b - a
    low, high = numpy.quantile(d[rng.integers(len(d), size=(draws, len(d)))].mean(axis=1), (0.025, 0.975))
    flips = (rng.integers(2, size=(draws, len(d))) * 2 - 1) @ d / len(d)
    p = (1 + (abs(flips) >= abs(d.mean()) - 1e-12).sum()) / (1 + draws)      # the draw as it came counts as one, so p is never 0
    found = {"a": a.mean(), "b": b.mean(), "difference": d.mean(), "low": low, "high": high, "p": p}
    return {**{k: float(v) for k, v in found.items()}, "n": len(d)}


def interval(by_seed, draws=10_000):
    """(mean, low, high): the mean of the seeds' means and its 95 % bootstrap interval; `by_seed`: one array of values a seed.

    Seeds are drawn, then tasks inside each; of one seed only tasks. Three seeds show little of their spread: the interval is rather too narrow.
    """
    import numpy

    rng, means = numpy.random.default_rng(0), numpy.zeros(draws)
    picked, by_seed = rng.integers(len(by_seed), size=(draws, len(by_seed))), [numpy.asarray(v, dtype=float) for v in by_seed]
    for column in picked.T:
        for s, values in enumerate(by_seed):
            at = column == s
            means[at] += values[rng.integers(len(values), size=(at.sum(), len(values)))].mean(axis=1) / len(by_seed)
    return (float(numpy.mean([v.mean() for v in by_seed])), *map(float, numpy.quantile(means, (0.025, 0.975))))


def row_config(folder, row, seed, scale):
    """Write runs/ablate/<row>-<seed>.yaml: the row's config with data/ablate.yaml (`scale`) on top. Returns (path, [what it changes])."""
    source = Path(folder) / f"{row.lower()}.yaml"
    if not source.is_file():
        raise SystemExit(f"error: row {row} has no config: {source} is missing; write it (`extends: ../tiny.yaml` and what the row changes)")
    plain, over = load_config(source), scale["config"]
    stages = [{**asdict(s), "tokens": round(s.tokens * scale["tokens"])} for s in plain.pst.stages]
    shared = {"init_from": f"runs/ablate-v7-{seed}/pst/final"} if plain.pst.init_from else {}
    values = {**over, "name": f"ablate-{row}-{seed}", "seed": seed, "pst": {**over.get("pst", {}), "stages": stages, **shared}}
    path = ROOT / "runs" / "ablate" / f"{row}-{seed}.yaml"
    write_atomic(path, yaml.safe_dump({"extends": os.path.relpath(source.resolve(), path.parent), **values}, sort_keys=False))
    old, new = asdict(plain), asdict(load_config(path))
    keys = [(part, k) for part in over for k in new[part] if new[part][k] != old[part][k] and k not in ("stages", "init_from")]
    return path, [f"{part}.{k} {old[part][k]} -> {new[part][k]}" for part, k in keys]


def head_line(name, heads):
    """What a row of ours rests on, from the heads of its runs (columns.json)."""
    said = lambda key: ", ".join(sorted({str(h[key]) for h in heads}))      # noqa: E731
    return (f"{name}: agent {said('agent')} ({said('who')}); environment VisGenEnv, a simulator, C_tool {said('fidelity')}; grader {said('grader')}, "
            f"{'files measured' if all(h['files'] for h in heads) else 'from records, no file measured'}; judge of R_vrt {said('judge')}; decoder "
            f"{said('decoder')}; seeds {said('seed')}; tasks {said('subset')}, n = {said('played')}"
            + (f" played of {said('tasks')}" if any(h["played"] != h["tasks"] for h in heads) else "")
            + "".join(f"; {line}" for line in sorted({h["grading"] for h in heads} - {""})))


def print_tables(ours):
    """The paper's tables with our rows below Tables 2 and 4; `ours`: [([{figure: {task id: value}} a seed], what the row rests on)]."""
    paper = read_paper()
    line = lambda name, cells: print(f"  {name:22}" + "".join(f"{c:>13}" for c in cells))      # noqa: E731
    for number, what in ((2, "VisGenBench, VLM evaluation, real services"), (3, "human evaluation"), (4, "ablations, VisGenBench-104")):
        print(f"\nTable {number} of the paper: {what}")
        line("", paper["table_3_columns" if number == 3 else "columns"])
        for name, values in paper[f"table_{number}"].items():
            line(name, [f"{v:.2f}" if number == 3 else f"{v:.3f}" for v in values])
        if number == 3:
            print("  no row of ours: nobody has judged by eye")
            continue
        for i, (found, _) in enumerate(ours, 1):
            cells = {c: interval([list(f[c].values()) for f in found]) for c in paper["columns"] if all(c in f for f in found)}
            line(f"ours ({i})", [f"{cells[c][0]:.3f}" if c in cells else "not graded" for c in paper["columns"]])
            line("  95 % interval", ["{1:.3f}-{2:.3f}".format(*cells[c]) if c in cells else "" for c in paper["columns"]])
            line("  n", [", ".join(sorted({str(len(f[c])) for f in found})) if c in cells else "" for c in paper["columns"]])
    print("\n" + "\n".join(f"({i}) {text}" for i, (_, text) in enumerate(ours, 1)) + "\n" + paper["not_comparable"])


def verdict(rows, claim, figure):
    """(verdict, the row set against, B - A, low, high, seeds) of one claimed ordering; rows: {row: {seed: {"values": {figure: values}}}}.

    Paired by seed and task, over the seeds that both rows have; of several `worse` rows the best one that was run counts.
    """
    better, others = rows.get(claim["better"], {}), []
    for name in claim["worse"]:
        if seeds := sorted(set(better) & set(rows.get(name, {}))):
            pairs = [[x - y for x, y in zip(better[s]["values"][figure], rows[name][s]["values"][figure], strict=True)] for s in seeds]
            others.append((*interval(pairs), name, len(seeds)))
    if not others:
        return "not run", "", 0.0, 0.0, 0.0, 0
    middle, low, high, name, n = min(others)
    return "holds" if low > 0 else "does not hold" if high < 0 else "within noise", name, middle, low, high, n


def print_ablations(result, path):
    """Print the ablation's table and its orderings beside the paper's claims; both go beside `path` as text, the table as a picture too."""
    paper, rows, lines = read_paper(), result["rows"], []
    say = lines.append
    table = {row: {k: interval([s["values"][k] for s in rows[row].values()]) for k in FIGURES} for row in paper["rows"] if row in rows}
    n = sorted({len(s["values"]["R_vrt"]) for r in rows.values() for s in r.values()})
    say(f"Table 4's rows at the scale of data/ablate.yaml: environment VisGenEnv, nothing measured on files, judge rules; n = "
        f"{', '.join(map(str, n))} held-out tasks a seed; means, 95 % intervals over seeds and tasks; decoder greedy but in the second column")
    say(f"{'':5}{'seeds':>6}" + "".join(f"{title:>26}" for title in FIGURES.values()) + f"{'paper O-Score':>15}{'seconds':>9}  what")
    for row, cells in table.items():
        say(f"{row:5}{len(rows[row]):6}" + "".join(f"{'{:.3f} [{:.3f}, {:.3f}]'.format(*c):>26}" for c in cells.values())
            + f"{paper['table_4'][row][-1]:15.3f}{max(s['seconds'] for s in rows[row].values()):9}  {paper['rows'][row]}")
    say("\nThe paper's orderings (Sec. 5.4, there by O-Score): the difference, its 95 % interval over the seeds and tasks that both rows have")
    say(f"{'':28}" + "".join(f"{title:46}" for title in FIGURES.values()))
    for claim in paper["orderings"]:
        cells = []
        for said, other, middle, low, high, n in (verdict(rows, claim, figure) for figure in FIGURES):
            cells.append(f"{said} {middle:+.3f} [{low:+.3f}, {high:+.3f}] {other}" if n else said)
        note = f" ({claim['note']})" if "note" in claim else ""
        say(f"{claim['better'] + ' > ' + ' '.join(claim['worse']):28}" + "".join(f"{c:46}" for c in cells) + claim["claim"] + note)
    print("\n" + "\n".join(lines))
    write_atomic(path.with_suffix(".txt"), "\n".join(lines) + "\n")
    draw_ablations(table, {row: paper["table_4"][row][-1] for row in table}, path.with_suffix(".png"))
    print(f"\ntext: {path.with_suffix('.txt')}; picture: {path.with_suffix('.png')}")


def draw_ablations(table, printed, path):
    """The table as a picture: each figure of each row with its interval; `printed`: {row: the paper's O-Score}, grey, beside ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FIGURES), figsize=(15, 0.35 * len(table) + 1.8), sharey=True, constrained_layout=True)
    for ax, (name, title) in zip(axes, FIGURES.items()):
        for at, cells in enumerate(table.values()):
            middle, low, high = cells[name]
            ax.plot([low, high], [at, at], color="tab:blue")
            ax.plot(middle, at, "o", color="tab:blue")
        ax.set(title=title, yticks=range(len(table)), yticklabels=list(table), xlim=(-0.02, 1.02))
        ax.grid(axis="x", alpha=0.3)
    axes[-1].plot(list(printed.values()), range(len(printed)), "x", color="grey", label="the paper's, another grader and tasks")
    axes[-1].legend(fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle("Table 4's rows at a small scale: means and 95 % intervals over seeds and held-out tasks", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
