"""The paper's Tables 2 to 4 beside rows of ours, and their statistics: intervals, paired tests, orderings, Table 4's rows as table and picture."""

import json
import statistics
from pathlib import Path

import yaml

from lib.runs import ROOT, read_jsonl
from rewards import PARTS

# ---------------------------------------------------------------------------- VisGenBench (Sec. 5.1): act, measure on files, grade
SUBJECTIVE = ("creative", "match", "object", "scene", "style", "variety")
OBJECTIVE = ("amount", "duration", "storyboard")
COLUMNS = (*SUBJECTIVE, *OBJECTIVE, "s_rate")  # the order of the paper's tables


def own_score(g, grader):
    """The score that a grade counts with in its own dimension's column; None if nobody could grade it."""
    return (
        g[g["dimension"]] if g["dimension"] in OBJECTIVE else (g[grader] or {}).get(g["dimension"])
    )


def columns_of(grades, grader="structural", draws=2000):
    """{column: {"mean", "low", "high", "n"}} of the paper's ten columns and their plain mean, O-Score: 95 % bootstrap intervals over tasks.

    A column is the mean over the tasks of its dimension, S-Rate over all tasks. A column that nobody could grade is None, and O-Score is over the others.
    """
    import numpy

    rng, found = numpy.random.default_rng(0), {}
    for column in COLUMNS:
        values = numpy.array(
            [
                v
                for g in grades
                if column in ("s_rate", g["dimension"])
                and (v := g["s_rate"] if column == "s_rate" else own_score(g, grader)) is not None
            ],
            dtype=float,
        )
        if not len(values):
            found[column] = None
            continue
        means = values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1)
        low, high = numpy.quantile(means, (0.025, 0.975))
        found[column] = {
            "mean": float(values.mean()),
            "low": float(low),
            "high": float(high),
            "n": len(values),
        }
    whole = numpy.array(
        list(per_task(grades, [], grader)["o_score"].values())
    )  # a task counts in S-Rate and in its own column at once
    low, high = numpy.quantile(
        whole[rng.integers(len(whole), size=(draws, len(whole)))].mean(axis=1), (0.025, 0.975)
    )
    means = [f["mean"] for f in found.values() if f]
    return {
        **found,
        "o_score": {
            "mean": sum(means) / len(means),
            "low": float(low),
            "high": float(high),
            "n": len(means),
        },
    }


# ---------------------------------------------------------------------------- the paper's tables, two runs side by side, ablations (Sec. 5.2 to 5.4)
def read_bench(folder):
    """(head, {task id: grade}, {task id: trajectory}) of a folder that `--agent` wrote. SystemExit names what is missing."""
    folder = Path(folder)
    if not (folder / "columns.json").is_file():
        raise SystemExit(
            f"error: {folder / 'columns.json'} is missing; `python bench.py --config ... --agent ...` makes it; give the folder "
            "runs/<name>/bench/<agent>-<subset>"
        )
    head = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
    for key in ("grader", "judge", "decoder", "fidelity", "who", "graded_by"):
        if key not in head:
            raise SystemExit(
                f"error: {folder / 'columns.json'} does not say its {key}; give its bench.py command again, which plays nothing anew"
            )
    grades = read_jsonl(folder / ("grades.jsonl" if head["files"] else "grades-from-records.jsonl"))
    return (
        head,
        {g["id"]: g for g in grades},
        {t["task"]["id"]: t for t in read_jsonl(folder / "trajectories.jsonl")},
    )


def per_task(grades, trajectories, grader):
    """{figure: {task id: value}}: the graded columns, o_score, R_vrt (plan x fine, whatever form a run was trained on) and its parts.

    A figure is the mean of its values. A task's value of o_score is its influence: O-Score plus its weighted distances from its columns' means.
    """
    found = {
        c: {
            g["id"]: v
            for g in grades
            if c in ("s_rate", g["dimension"])
            and (v := g[c] if c in (*OBJECTIVE, "s_rate") else (g[grader] or {}).get(c)) is not None
        }
        for c in COLUMNS
    }
    means = {c: statistics.mean(v.values()) for c, v in found.items() if v}
    found, o_score = {c: found[c] for c in means}, statistics.mean(means.values())
    found["o_score"] = {
        g["id"]: o_score
        + sum(
            (v[g["id"]] - means[c]) * len(grades) / len(v) / len(found)
            for c, v in found.items()
            if g["id"] in v
        )
        for g in grades
    }
    rewards = {t["task"]["id"]: t["reward"] for t in trajectories}
    found["R_vrt"] = {
        i: r["plan"] * r["fine"]
        for i, r in rewards.items()
        if r["plan"] == r["plan"] and r["fine"] == r["fine"]
    }
    for part in ("plan", "fine", *PARTS):
        found[f"R_{part}"] = {
            i: r[part] for i, r in rewards.items() if r[part] is not None and r[part] == r[part]
        }
    return found


def tables(args):
    """Print Tables 2, 3 and 4 with our rows; each of `args` is a folder of `--agent`, or several (seeds) with commas between."""
    ours = {arg: [read_bench(f) for f in arg.split(",")] for arg in args}
    print_tables(
        [
            (
                [per_task(list(g.values()), t.values(), h["grader"]) for h, g, t in runs],
                head_line(name, [h for h, _, _ in runs]),
            )
            for name, runs in ours.items()
        ]
    )


def compare(args, draws=10_000):
    """Two agents, each a folder of `--agent` or several (seeds) with commas between, on the same tasks: prints and returns {figure: `paired`'s}.

    A task's value is its mean over the seeds. SystemExit: graders or judges that differ, or no task in common.
    """
    if len(args) != 2:
        raise SystemExit(
            "error: compare takes two folders of `--agent`: python bench.py compare A B; seeds with commas: A0,A1 B0,B1"
        )
    sides = [[read_bench(f) for f in side.split(",")] for side in args]
    every = [run for side in sides for run in side]
    for key, fix in (
        ("grader", "let one grader grade both"),
        ("graded_by", "let one model, prompt and calibration grade both"),
        ("judge", "let one judge score both (reward.judge)"),
    ):
        if len(seen := {h[key] for h, _, _ in every}) > 1:
            raise SystemExit(
                f"error: the {key} is not the same in all folders: {', '.join(sorted(seen))}; their scores are different things; {fix}"
            )
    print("\n".join(head_line(name, [h for h, _, _ in side]) for name, side in zip(args, sides)))
    if len(every) > 2:
        print(
            "take care: seeds are averaged and tasks drawn, so intervals and p hold for these seeds; what other seeds would do is not in them"
        )
    for key in ("subset", "decoder", "files", "fidelity"):
        if len(seen := {str(h[key]) for h, _, _ in every}) > 1:
            print(f"take care: `{key}` differs: {', '.join(sorted(seen))}")
    asked = [{i: t[i]["task"]["request"] for i in g if i in t} for _, g, t in every]
    ids = [i for i in asked[0] if all(a.get(i) == asked[0][i] for a in asked)]
    if not ids:
        raise SystemExit(
            "error: the folders have no task in common (same id, same request); compare runs on the same tasks, such as --subset 104"
        )
    if any(len(a) != len(ids) for a in asked):
        print(
            f"take care: {len(ids)} tasks are in all folders, which have {', '.join(str(len(a)) for a in asked)}; only those are compared"
        )
    found = [
        [per_task([g[i] for i in ids], [t[i] for i in ids], h["grader"]) for h, g, t in side]
        for side in sides
    ]
    flat, table = found[0] + found[1], {}
    labels = [k for k in flat[0] if all(k in f for f in flat)]
    if any(c in f and c not in labels for f in flat for c in COLUMNS):
        labels.remove("o_score")
        print("take care: not every column is graded in all folders, so O-Scores are not compared")
    print(
        f"\n{'':12}{'A':>8}{'B':>8}{'B - A':>9}  {'95 % interval':18}{'p':>7}{'n':>6}"
        + "   mean of each seed: A | B" * (len(flat) > 2)
    )
    for label in labels:
        if same := [i for i in ids if all(i in f[label] for f in flat)]:
            of = lambda side: [sum(f[label][i] for f in side) / len(side) for i in same]  # noqa: E731
            t = table[label] = paired(of(found[0]), of(found[1]), draws)
            each = " | ".join(
                " ".join(f"{statistics.mean(f[label][i] for i in same):.3f}" for f in side)
                for side in found
            )
            print(
                f"{label:12}{t['a']:8.3f}{t['b']:8.3f}{t['difference']:+9.3f}  [{t['low']:+.3f}, {t['high']:+.3f}]  {t['p']:7.4f}{t['n']:6}"
                + f"   {each}" * (len(flat) > 2)
            )
    print(
        f"{draws:,} draws of tasks; with {len(table)} figures about {0.05 * len(table):.1f} come out below p = 0.05 by chance alone"
    )
    return table


PAPER = ROOT / "data" / "paper_tables.yaml"


def read_paper():
    """data/paper_tables.yaml as a dict."""
    return yaml.safe_load(PAPER.read_text(encoding="utf-8"))


def paired(a, b, draws=10_000):
    """Two agents on the same tasks, values (n,) each: B - A, its 95 % bootstrap interval over tasks, p of a two-sided sign-flip permutation test."""
    import numpy

    rng, a, b = (
        numpy.random.default_rng(0),
        numpy.asarray(a, dtype=float),
        numpy.asarray(b, dtype=float),
    )
    d = b - a
    low, high = numpy.quantile(
        d[rng.integers(len(d), size=(draws, len(d)))].mean(axis=1), (0.025, 0.975)
    )
    flips = (rng.integers(2, size=(draws, len(d))) * 2 - 1) @ d / len(d)
    p = (1 + (abs(flips) >= abs(d.mean()) - 1e-12).sum()) / (
        1 + draws
    )  # the draw as it came counts as one, so p is never 0
    found = {"a": a.mean(), "b": b.mean(), "difference": d.mean(), "low": low, "high": high, "p": p}
    return {**{k: float(v) for k, v in found.items()}, "n": len(d)}


def interval(by_seed, draws=10_000):
    """(mean, low, high): the mean of the seeds' means and its 95 % bootstrap interval; `by_seed`: one array of values a seed.

    Seeds are drawn, then tasks inside each; of one seed only tasks. Three seeds show little of their spread: the interval is rather too narrow.
    """
    import numpy

    rng, means = numpy.random.default_rng(0), numpy.zeros(draws)
    picked, by_seed = (
        rng.integers(len(by_seed), size=(draws, len(by_seed))),
        [numpy.asarray(v, dtype=float) for v in by_seed],
    )
    for column in picked.T:
        for s, values in enumerate(by_seed):
            at = column == s
            means[at] += values[rng.integers(len(values), size=(at.sum(), len(values)))].mean(
                axis=1
            ) / len(by_seed)
    return (
        float(numpy.mean([v.mean() for v in by_seed])),
        *map(float, numpy.quantile(means, (0.025, 0.975))),
    )


def head_line(name, heads):
    """What a row of ours rests on, from the heads of its runs (columns.json)."""
    said = lambda key: ", ".join(sorted({str(h[key]) for h in heads}))  # noqa: E731
    return (
        f"{name}: agent {said('agent')} ({said('who')}); environment VisGenEnv, a simulator, C_tool {said('fidelity')}; grader {said('grader')}, "
        f"{'files measured' if all(h['files'] for h in heads) else 'from records, no file measured'}; judge of R_vrt {said('judge')}; decoder "
        f"{said('decoder')}; seeds {said('seed')}; tasks {said('subset')}, n = {said('played')}"
        + (f" played of {said('tasks')}" if any(h["played"] != h["tasks"] for h in heads) else "")
        + "".join(f"; {line}" for line in sorted({h["grading"] for h in heads} - {""}))
    )


def print_tables(ours):
    """The paper's tables with our rows below Tables 2 and 4; `ours`: [([{figure: {task id: value}} a seed], what the row rests on)]."""
    paper = read_paper()
    line = lambda name, cells: print(f"  {name:22}" + "".join(f"{c:>13}" for c in cells))  # noqa: E731
    for number, what in (
        (2, "VisGenBench, VLM evaluation, real services"),
        (3, "human evaluation"),
        (4, "ablations, VisGenBench-104"),
    ):
        print(f"\nTable {number} of the paper: {what}")
        line("", paper["table_3_columns" if number == 3 else "columns"])
        for name, values in paper[f"table_{number}"].items():
            line(name, [f"{v:.2f}" if number == 3 else f"{v:.3f}" for v in values])
        if number == 3:
            print("  no row of ours: nobody has judged by eye")
            continue
        for i, (found, _) in enumerate(ours, 1):
            cells = {
                c: interval([list(f[c].values()) for f in found])
                for c in paper["columns"]
                if all(c in f for f in found)
            }
            line(
                f"ours ({i})",
                [f"{cells[c][0]:.3f}" if c in cells else "not graded" for c in paper["columns"]],
            )
            line(
                "  95 % interval",
                [
                    "{1:.3f}-{2:.3f}".format(*cells[c]) if c in cells else ""
                    for c in paper["columns"]
                ],
            )
            line(
                "  n",
                [
                    ", ".join(sorted({str(len(f[c])) for f in found})) if c in cells else ""
                    for c in paper["columns"]
                ],
            )
    print(
        "\n"
        + "\n".join(f"({i}) {text}" for i, (_, text) in enumerate(ours, 1))
        + "\n"
        + paper["not_comparable"]
    )
