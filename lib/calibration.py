"""The VLM-Grader's calibration to people's scores (Sec. 5.1.2): agreement, a map, and its gate.

The paper calibrates "so that means and rankings agree with human experts" and gives no procedure;
the linear map, the cross-validation and the gate are ours.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from lib.human import model_of, read_scores
from lib.runs import each_line, seeded_rng, write_atomic
from lib.text import to_json

# A dimension below either is "uncalibrated"; n counts its tasks. Ours.
GATE = {"spearman": 0.7, "n": 30}
RESAMPLES = 2000  # of the bootstrap
FOLDS = 5


class Unit(NamedTuple):
    """What is calibrated: one model's work on one task in a dimension, both scores in [0, 1]."""

    task: str
    model: str
    grader: float
    human: float


# ---------------------------------------------------------------------------- agreement
def rank_order(values):
    """Ranks from 1 of an array (n,), ties at their mean."""
    import numpy

    _, place, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    return (numpy.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x, y) -> float | None:
    """Spearman's rho of two arrays, ties at their mean rank; None where one of them is constant."""
    import numpy

    x = rank_order(x) - (len(x) + 1) / 2
    y = rank_order(y) - (len(y) + 1) / 2
    norm = numpy.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm else None


def kendall(x, y) -> float | None:
    """Kendall's tau-b of two arrays; None where one of them is constant."""
    import numpy

    signs = [(numpy.sign(x[i] - x), numpy.sign(y[i] - y)) for i in range(len(x))]
    norm = math.sqrt(sum((a * a).sum() for a, _ in signs) * sum((b * b).sum() for _, b in signs))
    return float(sum((a * b).sum() for a, b in signs) / norm) if norm else None


# ---------------------------------------------------------------------------- the map
def fit_map(grader, human) -> tuple[float, float]:
    """(a, b) of human = a * grader + b by least squares with a >= 0, from arrays (n,)."""
    away = grader - grader.mean()
    squares = (away * away).sum()
    a = max(0.0, float((away * (human - human.mean())).sum() / squares)) if squares else 0.0
    return a, float(human.mean() - a * grader.mean())


def apply_map(a: float, b: float, grader):
    """Calibrated scores, cut to [0, 1]."""
    import numpy

    return numpy.clip(a * grader + b, 0.0, 1.0)


def fit_dimension(units: list[Unit], seed: int) -> dict:
    """The report of one dimension: its map, agreement before and after it, 95 % intervals.

    Folds and bootstrap take whole tasks, since what several models did on one task is not
    independent; the bootstrap resamples the out-of-fold errors and fits nothing anew. `error_out`
    is None with a single task.
    """
    import numpy

    grader = numpy.array([u.grader for u in units], dtype=float)
    human = numpy.array([u.human for u in units], dtype=float)
    tasks = sorted({u.task for u in units})
    seeded_rng(seed, "folds").shuffle(tasks)
    whole = len(tasks) > 1
    a, b = fit_map(grader, human)
    errors = abs(out_of_fold(units, tasks, grader, human) - human)
    resampled = resample_tasks(units, tasks, seed)
    rho = spearman(grader, human)
    rhos = [spearman(grader[some], human[some]) for some in resampled]
    return {
        "n": len(grader),
        "tasks": len(tasks),
        "a": a,
        "b": b,
        "spearman": rho,
        "kendall": kendall(grader, human),
        "spearman_95": middle_95([r for r in rhos if r is not None]),
        "error_before": float(abs(grader - human).mean()),
        "error_in": float(abs(apply_map(a, b, grader) - human).mean()),
        "error_out": float(errors.mean()) if whole else None,
        "error_out_95": middle_95([errors[some].mean() for some in resampled]) if whole else None,
        "calibrated": rho is not None and rho >= GATE["spearman"] and len(tasks) >= GATE["n"],
    }


def out_of_fold(units: list[Unit], tasks: list[str], grader, human):
    """Calibrated scores (n,), each by a map that did not see its task; NaN with a single task."""
    import numpy

    fold = numpy.array([tasks.index(u.task) % FOLDS for u in units])
    found = numpy.full(len(grader), numpy.nan)
    if len(tasks) == 1:
        return found
    for k in range(min(FOLDS, len(tasks))):
        a, b = fit_map(grader[fold != k], human[fold != k])
        found[fold == k] = apply_map(a, b, grader[fold == k])
    return found


def resample_tasks(units: list[Unit], tasks: list[str], seed: int) -> list:
    """RESAMPLES arrays of indices into `units`: those of as many tasks, with replacement."""
    import numpy

    rng = numpy.random.default_rng(seed)
    members = [numpy.array([i for i, u in enumerate(units) if u.task == t]) for t in tasks]
    found = []
    for _ in range(RESAMPLES):
        picked = rng.integers(len(members), size=len(members))
        found.append(numpy.concatenate([members[i] for i in picked]))
    return found


def middle_95(values: list) -> list[float] | None:
    """[low, high] between which 95 % of the values lie; None for none."""
    import numpy

    return [float(v) for v in numpy.quantile(values, (0.025, 0.975))] if len(values) else None


# ---------------------------------------------------------------------------- the command
def calibrate(path: Path, folders: list[Path], seed: int) -> None:
    """`calibrate scores.csv [FOLDER ...]`: per dimension the map human = a * grader + b, a >= 0.

    It is fitted by least squares, then cut to the scale (our reading of the paper's
    "meta-evaluation intensity"), and cross-validated in 5 folds by task. Writes calibration.json
    beside the CSV, for bench.calibration.

    Columns of the CSV: dimension; task (or item); human, from 0 to 1, or from 0 to 5 as soon as one
    is above 1 or a column scale says 5; grader, from 0 to 1, which is looked up in the folders'
    grades where it is left out; and, if you like, model. Several rows of one task, dimension and
    model (items, scorers) are averaged. A dimension with a Spearman below 0.7 or fewer than 30
    tasks is "uncalibrated"."""
    graded, names, graders = read_graded(folders)
    rows, bad, scale = read_scores(path, ("dimension", "human"))
    units, lost = pair_scores(rows, scale, graded, names)
    if not units:
        raise SystemExit(
            f"error: {path} has no score on what the grader graded; give a column `grader`, or "
            "folders whose grades.jsonl has `vlm`"
        )
    dimensions = {d: fit_dimension(some, seed) for d, some in sorted(units.items())}
    print_dimensions(dimensions, lost)
    models = compare_models(units, dimensions)
    result = {
        "scores": path.name,
        "scale": scale,
        "seed": seed,
        "gate": GATE,
        "graded_by": sorted(graders),
        "skipped": bad,
        "without_grader": lost,
        "dimensions": dimensions,
        "models": models,
        "agreement": model_agreement(models),
    }
    target = path.with_name("calibration.json")
    write_atomic(target, to_json(result))
    print(f"{target} is written")


def read_graded(folders: list[Path]) -> tuple[dict, dict, set]:
    """What the VLM-Grader gave in bench folders: (scores, names, graders).

    scores: {(model, dimension, task): score}, the model by its code and by its name; names: {code:
    name}; graders: digests of model, endpoint and prompt. SystemExit if they are several.
    """
    scores, names, graders = {}, {}, set()
    for folder in folders:
        code, name = model_of(folder)
        names[code] = name
        for file in sorted(folder.glob("grades*.jsonl")):
            for grade in each_line(file):
                for dimension, score in (grade["vlm"] or {}).items():
                    scores[code, dimension, grade["id"]] = score
                    scores[name, dimension, grade["id"]] = score
                if grade.get("graded_by"):
                    graders.add(grade["graded_by"])
    if len(graders) > 1:
        raise SystemExit(
            f"error: {len(graders)} VLM-Graders (model, endpoint or prompt) graded the folders; "
            "one map is of one grader: give folders of one"
        )
    return scores, names, graders


def pair_scores(
    rows: list[dict], scale: int, graded: dict, names: dict
) -> tuple[dict[str, list[Unit]], int]:
    """({dimension: [Unit]}, rows without a grader's score) of people's rows.

    A row's own column `grader` goes before what the folders hold. Rows of one task, dimension and
    model are averaged. With one folder the rows need no column `model`.
    """
    only_model = next(iter(names)) if len(names) == 1 else ""
    groups, lost = {}, 0
    for row in rows:
        dimension = row["dimension"]
        task = row["task"] if "task" in row else row["item"]
        model = row.get("model", only_model)
        score = row.get("grader", "")
        if score == "":
            score = graded.get((model, dimension, task))
        if score is None:
            lost += 1
            continue
        key = (dimension, task, names.get(model, model))
        groups.setdefault(key, []).append((score, row["human"] / scale))
    units = {}
    for (dimension, task, model), pairs in groups.items():
        grader = sum(score for score, _ in pairs) / len(pairs)
        human = sum(score for _, score in pairs) / len(pairs)
        units.setdefault(dimension, []).append(Unit(task, model, grader, human))
    return units, lost


def print_dimensions(dimensions: dict[str, dict], lost: int) -> None:
    """Print fit_dimension's reports as a table."""
    print(
        f"{lost} scores without one of the grader's. Errors are mean absolute ones, from 0 to 1; "
        "intervals are 95 %, by bootstrap over tasks"
    )
    print(
        f"{'':12}{'n':>5} {'a':>6} {'b':>6} {'rho':>6} {'':16} {'tau':>6}   "
        "error: before   in fold    out of fold"
    )
    for name, f in dimensions.items():
        print(
            f"{name:12}{f['n']:5} {f['a']:6.3f} {f['b']:6.3f} "
            f"{number_cell(f['spearman'])} {interval_cell(f['spearman_95'])} "
            f"{number_cell(f['kendall'])}   {f['error_before']:13.3f} {f['error_in']:9.3f} "
            f"{number_cell(f['error_out'])} {interval_cell(f['error_out_95'])} "
            f"{'calibrated' if f['calibrated'] else 'uncalibrated'}"
        )


def number_cell(value: float | None) -> str:
    """Six characters: a number with three decimals, or a dash."""
    return "-".rjust(6) if value is None else f"{value:6.3f}"


def interval_cell(value: list[float] | None) -> str:
    """An interval in brackets, or dashes."""
    low, high = value or (None, None)
    return f"[{number_cell(low)}, {number_cell(high)}]"


def compare_models(units: dict[str, list[Unit]], dimensions: dict[str, dict]) -> dict[str, dict]:
    """{model: {"grader", "calibrated", "human", "n"}}: mean scores over its units; prints them."""
    found = {}
    for model in sorted({u.model for some in units.values() for u in some} - {""}):
        own = []
        for dimension, some in units.items():
            a, b = dimensions[dimension]["a"], dimensions[dimension]["b"]
            for u in some:
                if u.model == model:
                    own.append((u.grader, float(apply_map(a, b, u.grader)), u.human))
        grader, calibrated, human = (sum(scores) / len(own) for scores in zip(*own))
        found[model] = {"grader": grader, "calibrated": calibrated, "human": human, "n": len(own)}
        print(
            f"model {model}: grader {grader:.3f}, after the map {calibrated:.3f}, "
            f"people {human:.3f}, n = {len(own)}"
        )
    return found


def model_agreement(models: dict[str, dict]) -> dict | None:
    """How calibrated means and people's means of the models agree; None for fewer than two."""
    import numpy

    if len(models) < 2:
        return None
    calibrated = numpy.array([m["calibrated"] for m in models.values()])
    human = numpy.array([m["human"] for m in models.values()])
    found = {
        "models": len(models),
        "spearman": spearman(calibrated, human),
        "kendall": kendall(calibrated, human),
        "error": float(abs(calibrated - human).mean()),
    }
    print(
        f"means of {len(models)} models: rho {number_cell(found['spearman'])}, "
        f"tau {number_cell(found['kendall'])}, error {found['error']:.3f}"
    )
    return found


def calibrated_grades(grades: list[dict], path: Path) -> list[dict]:
    """The grades with `vlm, calibrated` {dimension: score}, by the maps of calibration.json.

    A dimension below the gate is left out, and said. SystemExit for a missing file or one that was
    fitted to another grader.
    """
    if not path.is_file():
        raise SystemExit(
            f"error: config key `bench.calibration` names {path}, which is missing; "
            "`python bench.py calibrate scores.csv` makes it"
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    graders = set(found["graded_by"])
    if graders and any(g.get("graded_by") not in graders for g in grades if g["vlm"]):
        raise SystemExit(
            f"error: {path} was fitted to another VLM-Grader (model, endpoint or prompt) than "
            "graded here; calibrate again with this one"
        )
    maps = {d: (m["a"], m["b"]) for d, m in found["dimensions"].items() if m["calibrated"]}
    print(
        f"{path}: calibrated {', '.join(maps) or 'none'}; every other dimension is uncalibrated "
        "and left out"
    )
    mapped = []
    for g in grades:
        scores = (g["vlm"] or {}).items()
        own = {d: float(apply_map(*maps[d], score)) for d, score in scores if d in maps}
        mapped.append({**g, "vlm, calibrated": own})
    return mapped
