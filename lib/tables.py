"""VisGenBench's columns, the paper's Tables 2 to 4 beside rows of ours, and two agents compared.

`columns_of` makes the ten columns and O-Score of graded tasks; `tables` and `compare` are commands
of bench.py. Intervals are 95 % ones, by bootstrap; the paper prints none.
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import yaml

from lib.runs import ROOT, read_jsonl
from rewards import PARTS

SUBJECTIVE = ("creative", "match", "object", "scene", "style", "variety")
OBJECTIVE = ("amount", "duration", "storyboard")
COLUMNS = (*SUBJECTIVE, *OBJECTIVE, "s_rate")  # the order of the paper's tables
PAPER = ROOT / "data" / "paper_tables.yaml"


# ---------------------------------------------------------------------------- reading
def read_paper() -> dict:
    """data/paper_tables.yaml as a dict: the paper's tables, its rows in words, its orderings."""
    return yaml.safe_load(PAPER.read_text(encoding="utf-8"))


def read_bench(folder: str | Path) -> tuple[dict, dict, dict]:
    """(head, {task id: grade}, {task id: trajectory}) of a folder that `--agent` wrote.

    The head is columns.json. SystemExit names what is missing.
    """
    folder = Path(folder)
    path = folder / "columns.json"
    if not path.is_file():
        raise SystemExit(
            f"error: {path} is missing; `python bench.py --config ... --agent ...` makes it; "
            "give the folder runs/<name>/bench/<agent>-<subset>"
        )
    head = json.loads(path.read_text(encoding="utf-8"))
    for key in ("grader", "judge", "decoder", "fidelity", "who", "graded_by"):
        if key not in head:
            raise SystemExit(
                f"error: {path} does not say its {key}; give its bench.py command again, which "
                "plays nothing anew"
            )
    grades = read_jsonl(folder / grades_name(head["files"]))
    trajectories = read_jsonl(folder / "trajectories.jsonl")
    return (
        head,
        {g["id"]: g for g in grades},
        {t["task"]["id"]: t for t in trajectories},
    )


def grades_name(with_files: bool) -> str:
    """The name of a bench folder's grades: of measured files, or from records alone."""
    return "grades.jsonl" if with_files else "grades-from-records.jsonl"


# ---------------------------------------------------------------------------- the ten columns
def own_score(grade: dict, grader: str) -> float | None:
    """The score that a grade counts with in its own dimension's column.

    None if nobody could grade it, or the request states no such thing.
    """
    dimension = grade["dimension"]
    if dimension in OBJECTIVE:
        return grade[dimension]
    return (grade[grader] or {}).get(dimension)


def column_scores(grades: Iterable[dict], column: str, grader: str) -> dict[str, float]:
    """{task id: score} of one column: the tasks of its dimension that are graded.

    S-Rate counts all tasks (Sec. 5.1).
    """
    found = {}
    for g in grades:
        if column == "s_rate":
            score = g["s_rate"]
        elif column == g["dimension"]:
            score = own_score(g, grader)
        else:
            continue
        if score is not None:
            found[g["id"]] = score
    return found


def columns_of(grades: list[dict], grader: str = "structural", resamples: int = 2000) -> dict:
    """{column: {"mean", "low", "high", "n"}} of the ten columns and O-Score, their plain mean.

    Intervals are 95 % ones, by bootstrap over tasks. A column that nobody could grade is None, and
    O-Score is over the others; its n counts columns. statistics.StatisticsError for no grades.
    """
    import numpy

    rng = numpy.random.default_rng(0)
    found = {}
    for column in COLUMNS:
        scores = numpy.array(list(column_scores(grades, column, grader).values()), dtype=float)
        if not len(scores):
            found[column] = None
            continue
        low, high = bootstrap(scores, rng, resamples)
        found[column] = {"mean": float(scores.mean()), "low": low, "high": high, "n": len(scores)}
    # A task counts in S-Rate and in its own column at once, so its influence is resampled.
    influence = numpy.array(list(per_task(grades, [], grader)["o_score"].values()))
    low, high = bootstrap(influence, rng, resamples)
    means = [f["mean"] for f in found.values() if f]
    o_score = {"mean": sum(means) / len(means), "low": low, "high": high, "n": len(means)}
    return {**found, "o_score": o_score}


def per_task(grades: list[dict], trajectories: Iterable[dict], grader: str) -> dict[str, dict]:
    """{figure: {task id: value}}: the graded columns, o_score, R_vrt and its parts.

    A figure is the mean of its values. R_vrt is plan x fine, whatever form a run was trained on. A
    task's value of o_score is its influence: O-Score plus its weighted distances from its columns'
    means. What a judge failed on (NaN) is left out.
    """
    columns = {}
    for column in COLUMNS:
        if scores := column_scores(grades, column, grader):
            columns[column] = scores
    means = {column: statistics.mean(scores.values()) for column, scores in columns.items()}
    o_score = statistics.mean(means.values())

    def influence(task_id):
        return o_score + sum(
            (scores[task_id] - means[column]) * len(grades) / len(scores) / len(columns)
            for column, scores in columns.items()
            if task_id in scores
        )

    figures = {**columns, "o_score": {g["id"]: influence(g["id"]) for g in grades}}
    rewards = {t["task"]["id"]: t["reward"] for t in trajectories}
    figures["R_vrt"] = {
        i: r["plan"] * r["fine"]
        for i, r in rewards.items()
        if not math.isnan(r["plan"]) and not math.isnan(r["fine"])
    }
    for part in ("plan", "fine", *PARTS):
        figures[f"R_{part}"] = {
            i: r[part]
            for i, r in rewards.items()
            if r[part] is not None and not math.isnan(r[part])
        }
    return figures


# ---------------------------------------------------------------------------- intervals and tests
def bootstrap(values, rng, resamples: int) -> tuple[float, float]:
    """(low, high): the 95 % bootstrap interval of the mean of an array of values (n,)."""
    import numpy

    low, high = numpy.quantile(resampled_means(values, rng, resamples), (0.025, 0.975))
    return float(low), float(high)


def resampled_means(values, rng, resamples: int):
    """The means (resamples,) of as many draws, with replacement, of an array of values (n,)."""
    picked = rng.integers(len(values), size=(resamples, len(values)))
    return values[picked].mean(axis=1)


def unpaired(a, b, resamples: int = 10_000) -> dict:
    """Two lists of values that have nothing to do with each other: {"difference", "low", "high"}.

    The difference of the means is B - A, with its 95 % bootstrap interval over the values of each.
    """
    import numpy

    rng = numpy.random.default_rng(0)
    a = numpy.asarray(a, dtype=float)
    b = numpy.asarray(b, dtype=float)
    drawn = resampled_means(b, rng, resamples) - resampled_means(a, rng, resamples)
    low, high = numpy.quantile(drawn, (0.025, 0.975))
    return {"difference": float(b.mean() - a.mean()), "low": float(low), "high": float(high)}


def paired(a, b, resamples: int = 10_000) -> dict:
    """Two agents on the same tasks, values (n,) each: {"a", "b", "difference", "low", ..., "n"}.

    The difference is B - A, with its 95 % bootstrap interval over tasks; p is of a two-sided
    sign-flip permutation test.
    """
    import numpy

    rng = numpy.random.default_rng(0)
    a = numpy.asarray(a, dtype=float)
    b = numpy.asarray(b, dtype=float)
    difference = b - a
    n = len(difference)
    low, high = bootstrap(difference, rng, resamples)
    signs = rng.integers(2, size=(resamples, n)) * 2 - 1
    flipped = signs @ difference / n
    as_far = (abs(flipped) >= abs(difference.mean()) - 1e-12).sum()
    # The signs as they came count as one of the flips, so p is never 0.
    p = (1 + as_far) / (1 + resamples)
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p": float(p),
        "n": n,
    }


def interval(by_seed: list, resamples: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): the mean of the seeds' means and its 95 % bootstrap interval.

    `by_seed`: one array of values a seed. Seeds are resampled, then tasks inside each; of one seed
    only tasks. Three seeds show little of their spread: the interval is rather too narrow.
    """
    import numpy

    rng = numpy.random.default_rng(0)
    n_seeds = len(by_seed)
    by_seed = [numpy.asarray(values, dtype=float) for values in by_seed]
    picked = rng.integers(n_seeds, size=(resamples, n_seeds))
    means = numpy.zeros(resamples)
    for column in picked.T:
        for s, values in enumerate(by_seed):
            at = column == s
            tasks = rng.integers(len(values), size=(at.sum(), len(values)))
            means[at] += values[tasks].mean(axis=1) / n_seeds
    low, high = numpy.quantile(means, (0.025, 0.975))
    return float(numpy.mean([v.mean() for v in by_seed])), float(low), float(high)


# ---------------------------------------------------------------------------- the paper's tables
def tables(args: list[str]) -> None:
    """`bench.py tables FOLDER ...`: print Tables 2, 3 and 4 with a row of ours for each argument.

    An argument is a folder of `--agent`, or several (seeds) with commas between.
    """
    ours = []
    for name in dict.fromkeys(args):
        runs = [read_bench(folder) for folder in name.split(",")]
        by_seed = [
            per_task(list(grades.values()), trajectories.values(), head["grader"])
            for head, grades, trajectories in runs
        ]
        ours.append((by_seed, head_line(name, [head for head, _, _ in runs])))
    print_tables(ours)


def head_line(name: str, heads: list[dict]) -> str:
    """What a row of ours rests on, from the heads of its runs (columns.json)."""

    def said(key):
        return ", ".join(sorted({str(head[key]) for head in heads}))

    files = "files measured" if all(h["files"] for h in heads) else "from records, no file measured"
    line = (
        f"{name}: agent {said('agent')} ({said('who')}); environment VisGenEnv, a simulator, "
        f"C_tool {said('fidelity')}; grader {said('grader')}, {files}; "
        f"judge of R_vrt {said('judge')}; decoder {said('decoder')}; seeds {said('seed')}; "
        f"tasks {said('subset')}, n = {said('played')}"
    )
    if any(head["played"] != head["tasks"] for head in heads):
        line += f" played of {said('tasks')}"
    for grading in sorted({head["grading"] for head in heads} - {""}):
        line += f"; {grading}"
    return line


def print_tables(ours: list[tuple]) -> None:
    """Print the paper's tables with our rows below Tables 2 and 4.

    `ours`: [([per_task's figures, one dict a seed], what the row rests on)].
    """
    paper = read_paper()
    for number, what in (
        (2, "VisGenBench, VLM evaluation, real services"),
        (3, "human evaluation"),
        (4, "ablations, VisGenBench-104"),
    ):
        digits = 2 if number == 3 else 3
        print(f"\nTable {number} of the paper: {what}")
        print_row("", paper["table_3_columns" if number == 3 else "columns"])
        for name, values in paper[f"table_{number}"].items():
            print_row(name, [f"{v:.{digits}f}" for v in values])
        if number == 3:
            print("  no row of ours: nobody has judged by eye")
            continue
        for i, (by_seed, _) in enumerate(ours, 1):
            print_our_row(i, by_seed, paper["columns"])
    notes = [f"({i}) {text}" for i, (_, text) in enumerate(ours, 1)]
    print("\n" + "\n".join(notes) + "\n" + paper["not_comparable"])


def print_row(name: str, cells: list[str]) -> None:
    """Print one row of a table of the paper."""
    print(f"  {name:22}" + "".join(f"{cell:>13}" for cell in cells))


def print_our_row(i: int, by_seed: list[dict], columns: list[str]) -> None:
    """Print the i-th row of ours: means, intervals and numbers of tasks, a line each."""
    means, intervals, counts = [], [], []
    for column in columns:
        if not all(column in figures for figures in by_seed):
            means.append("not graded")
            intervals.append("")
            counts.append("")
            continue
        mean, low, high = interval([list(figures[column].values()) for figures in by_seed])
        means.append(f"{mean:.3f}")
        intervals.append(f"{low:.3f}-{high:.3f}")
        counts.append(", ".join(sorted({str(len(figures[column])) for figures in by_seed})))
    print_row(f"ours ({i})", means)
    print_row("  95 % interval", intervals)
    print_row("  n", counts)


# ---------------------------------------------------------------------------- two agents compared
def compare(args: list[str], resamples: int = 10_000) -> dict[str, dict]:
    """`bench.py compare A B`: two agents on the same tasks; prints and returns {figure: paired's}.

    Each is a folder of `--agent`, or several (seeds) with commas between; a task's value is its
    mean over the seeds. SystemExit: graders or judges that differ, or no task in common.
    """
    if len(args) != 2:
        raise SystemExit(
            "error: compare takes two folders of `--agent`: python bench.py compare A B; seeds "
            "with commas: A0,A1 B0,B1"
        )
    sides = [[read_bench(folder) for folder in side.split(",")] for side in args]
    runs = sides[0] + sides[1]
    check_comparable([head for head, _, _ in runs])
    for name, side in zip(args, sides):
        print(head_line(name, [head for head, _, _ in side]))
    warn_of_differences([head for head, _, _ in runs])
    ids = common_tasks(runs)
    figures = [
        [
            per_task([grades[i] for i in ids], [trajectories[i] for i in ids], head["grader"])
            for head, grades, trajectories in side
        ]
        for side in sides
    ]
    return print_comparison(figures, ids, comparable_figures(figures[0] + figures[1]), resamples)


def check_comparable(heads: list[dict]) -> None:
    """SystemExit unless one grader, with one model and prompt, and one judge scored all runs."""
    for key, fix in (
        ("grader", "let one grader grade both"),
        ("graded_by", "let one model, prompt and calibration grade both"),
        ("judge", "let one judge score both (reward.judge)"),
    ):
        seen = {head[key] for head in heads}
        if len(seen) > 1:
            raise SystemExit(
                f"error: the {key} is not the same in all folders: {', '.join(sorted(seen))}; "
                f"their scores are different things; {fix}"
            )


def warn_of_differences(heads: list[dict]) -> None:
    """Say what the runs differ in, and what the intervals do not hold of several seeds."""
    if len(heads) > 2:
        print(
            "take care: seeds are averaged and tasks drawn, so intervals and p hold for these "
            "seeds; what other seeds would do is not in them"
        )
    for key in ("subset", "decoder", "files", "fidelity"):
        seen = {str(head[key]) for head in heads}
        if len(seen) > 1:
            print(f"take care: `{key}` differs: {', '.join(sorted(seen))}")


def common_tasks(runs: list[tuple]) -> list[str]:
    """Ids of the tasks that all runs have, with the same request. SystemExit if there are none.

    `runs`: read_bench's. Ids alone do not tell: held-out tasks of another seed have the same.
    """
    requests = [
        {i: trajectories[i]["task"]["request"] for i in grades if i in trajectories}
        for _, grades, trajectories in runs
    ]
    first = requests[0]
    ids = [i for i in first if all(other.get(i) == first[i] for other in requests)]
    if not ids:
        raise SystemExit(
            "error: the folders have no task in common (same id, same request); compare runs on "
            "the same tasks, such as --subset 104"
        )
    if any(len(other) != len(ids) for other in requests):
        print(
            f"take care: {len(ids)} tasks are in all folders, which have "
            f"{', '.join(str(len(other)) for other in requests)}; only those are compared"
        )
    return ids


def comparable_figures(figures: list[dict]) -> list[str]:
    """The figures that all runs have; no O-Score where some run lacks a column."""
    labels = [label for label in figures[0] if all(label in f for f in figures)]
    if any(column in f and column not in labels for f in figures for column in COLUMNS):
        labels.remove("o_score")
        print("take care: not every column is graded in all folders, so O-Scores are not compared")
    return labels


def print_comparison(
    sides: list[list[dict]], ids: list[str], labels: list[str], resamples: int
) -> dict[str, dict]:
    """Print a row for each figure, A's and B's seeds beside it; returns {figure: paired's}.

    `sides`: per_task's figures of A's seeds and of B's.
    """
    several = len(sides[0]) + len(sides[1]) > 2
    print(
        f"\n{'':12}{'A':>8}{'B':>8}{'B - A':>9}  {'95 % interval':18}{'p':>7}{'n':>6}"
        + "   mean of each seed: A | B" * several
    )
    table = {}
    for label in labels:
        by_seed = [[figures[label] for figures in side] for side in sides]
        same = [i for i in ids if all(i in values for side in by_seed for values in side)]
        if not same:
            continue
        a, b = ([sum(values[i] for values in side) / len(side) for i in same] for side in by_seed)
        row = table[label] = paired(a, b, resamples)
        line = (
            f"{label:12}{row['a']:8.3f}{row['b']:8.3f}{row['difference']:+9.3f}"
            f"  [{row['low']:+.3f}, {row['high']:+.3f}]  {row['p']:7.4f}{row['n']:6}"
        )
        if several:
            line += "   " + " | ".join(seed_means(side, same) for side in by_seed)
        print(line)
    print(
        f"{resamples:,} draws of tasks; with {len(table)} figures about {0.05 * len(table):.1f} "
        "come out below p = 0.05 by chance alone"
    )
    return table


def seed_means(by_seed: list[dict], ids: list[str]) -> str:
    """The mean over the tasks of each seed's values, in words."""
    return " ".join(f"{statistics.mean(values[i] for i in ids):.3f}" for values in by_seed)
