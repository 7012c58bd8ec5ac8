"""People's scores on VisGenBench (Sec. 5.1.2, 5.3): the sheet to give them on, the VLM-Grader's calibration to them, and Tables 3, 5 and 6."""

import csv
import io
import json
import math

from lib.lineage import deliverables
from lib.media import data_uri, from_tool, moments, real_file, stills, thumbnail
from lib.runs import digest, each_line, seeded_rng, write_atomic
from lib.text import fill_template, to_json

GATE = {
    "spearman": 0.7,
    "n": 30,
}  # of a dimension, n counts its tasks; ours; below it, it is "uncalibrated"
SHEET_COLUMNS = (
    "task",
    "item",
    "dimension",
    "modality",
    "model",
    "s_rate",
    "scale",
    "human",
    "scorer",
    "rubric",
)
DRAWS, FOLDS = 2000, 5


def model_of(folder):
    """(code, name) of a benchmark folder runs/<name>/bench/<agent>-<subset>: sheets show neither, and their files only the code."""
    name = "/".join((folder.resolve().parents[1].name, folder.name))
    return f"model-{digest(name, size=3)}", name


# ---------------------------------------------------------------------------- the scoring sheet
def export_sheet(folders, config, n):
    """Write FOLDER/sheet.html, a page that stands alone, and FOLDER/sheet.csv, the same rows to fill in elsewhere. People score each rubric item of
    each task from 0 to 5 and do not see whose work it is: tasks of all the folders given stand mixed, and `model` is a code, which `calibrate` and
    `human` turn back when they are given the folders too. --n: as many tasks, drawn by seed; else all. Tasks with nothing handed over are not on the
    sheet: `s_rate`, the share of the model's tasks of that modality with the right kind handed over, counts them. Films are shown as stills."""
    tasks, rows = [], []
    for folder in folders:
        played = list(each_line(folder / "trajectories.jsonl"))
        handed = [
            [a for a in deliverables(t) if a["kind"] == t["task"]["modality"]] for t in played
        ]
        s_rate = {
            kind: sum(bool(h) for h, t in zip(handed, played) if t["task"]["modality"] == kind)
            / max(1, sum(t["task"]["modality"] == kind for t in played))
            for kind in ("image", "video")
        }
        tasks += [
            {
                "task": t["task"],
                "handed": h,
                "model": model_of(folder)[0],
                "s_rate": s_rate[t["task"]["modality"]],
            }
            for t, h in zip(played, handed)
            if h and t["task"].get("rubric")
        ]
    chosen = seeded_rng(config.seed, "sheet").sample(tasks, min(n or len(tasks), len(tasks)))
    for t in chosen:
        task = t["task"]
        t["media"] = [{**a, "pictures": look(a), "real": from_tool(a)} for a in t.pop("handed")]
        whole = {
            "task": task["id"],
            "dimension": task["dimension"],
            "modality": task["modality"],
            "model": t["model"],
            "s_rate": t["s_rate"],
            "scale": 5,
            "human": "",
            "scorer": "",
        }
        t["rows"] = [
            {**whole, "item": i, "rubric": item} for i, item in enumerate(task["rubric"], 1)
        ]
        rows += t["rows"]
    file = io.StringIO()
    writer = csv.DictWriter(file, SHEET_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folders[0] / "sheet.csv", file.getvalue())
    key = digest([r["task"] + r["model"] for r in rows])
    stand_ins = sum(not a["real"] for t in chosen for a in t["media"])
    write_atomic(
        folders[0] / "sheet.html",
        fill_template(
            "templates/sheet.jinja",
            tasks=chosen,
            columns=SHEET_COLUMNS,
            key=key,
            stand_ins=stand_ins,
        ),
    )
    print(
        f"{folders[0] / 'sheet.html'} and sheet.csv: {len(chosen)} of {len(tasks)} tasks, {len(rows)} items to score; then `python bench.py "
        f"calibrate scores.csv {' '.join(map(str, folders))}` and `python bench.py human scores.csv`"
    )


def look(artifact):
    """The small pictures of one artifact on a page: of its file where there is a real one, else stand-ins, one a shot."""
    if path := real_file(artifact):
        places = moments(artifact, 8) if artifact["kind"] == "video" else (0,)
        return [data_uri(picture) for _, picture in stills(path, places, side=400)]
    return [thumbnail(artifact, shot, most=240) for shot in range(artifact["shots"] or 1)]


# ---------------------------------------------------------------------------- reading scores
def number(row, name, most):
    """row[name] as a number from 0 to `most`. ValueError says what is wrong."""
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise ValueError(f"has {name} {row[name]!r}; a number from 0 to {most} is right")
    return value


def read_scores(path, needed):
    """([row], lines skipped, scale) of a CSV of people's scores, `human` as they gave it. Separator: comma, or semicolon where the head has one.

    A line that cannot be used is said by its number and skipped; a line without a score is only counted. scale: 5, unless no score is above 1 and no
    column `scale` says 5. SystemExit for a missing file or column.
    """
    if not path.is_file():
        raise SystemExit(
            f"error: {path} is missing; `python bench.py sheet FOLDER` makes a sheet that saves one"
        )
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    mark = ";" if ";" in lines[0] else ","
    names = [name.strip() for name in next(csv.reader([lines[0].rstrip("\r")], delimiter=mark), [])]
    lacking = [name for name in needed if name not in names] + ["task or item"] * (
        not {"task", "item"} & set(names)
    )
    if lacking:
        raise SystemExit(
            f"error: {path} has no column {', '.join(lacking)}; its columns are {', '.join(names) or 'none'}"
        )
    rows, bad, empty = [], 0, 0
    for n, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            cells = next(csv.reader([line.rstrip("\r")], delimiter=mark, strict=True))
            if len(cells) != len(names):
                raise ValueError(f"has {len(cells)} cells; the head has {len(names)}")
            row = {name: cell.strip() for name, cell in zip(names, cells)}
            if not row["human"]:
                empty += 1
                continue
            row["human"] = number(row, "human", 5)
            if row.get("grader"):
                row["grader"] = number(row, "grader", 1)
            if "s_rate" in needed:
                row["s_rate"] = number(row, "s_rate", 1)
            for name in (
                "dimension",
                "task" if "task" in names else "item",
                *(name for name in ("model", "modality") if name in needed),
            ):
                if not row[name]:
                    raise ValueError(f"has no {name}")
            if "modality" in needed and row["modality"] not in ("image", "video"):
                raise ValueError(f"has modality {row['modality']!r}; image or video is right")
            rows.append(row)
        except (csv.Error, ValueError) as e:
            bad += 1
            print(f"  {path}, line {n} {e}: skipped")
    scale = 5 if any(row["human"] > 1 or row.get("scale") == "5" for row in rows) else 1
    print(
        f"{path}: {len(rows)} scores, {bad} lines skipped, {empty} without a score; people's scale is taken as 0 to {scale}"
        + ("" if scale == 5 else ", since none is above 1")
    )
    return rows, bad, scale


# ---------------------------------------------------------------------------- calibration
def rank_order(values):
    """Ranks from 1, ties at their mean."""
    import numpy

    _, place, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    return (numpy.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x, y):
    """Spearman's rho of two arrays, ties at their mean rank; None where one of them is constant."""
    import numpy

    x, y = rank_order(x) - (len(x) + 1) / 2, rank_order(y) - (len(y) + 1) / 2
    spread = numpy.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread) if spread else None


def kendall(x, y):
    """Kendall's tau-b of two arrays; None where one of them is constant."""
    import numpy

    signs = [(numpy.sign(x[i] - x), numpy.sign(y[i] - y)) for i in range(len(x))]
    spread = math.sqrt(sum((a * a).sum() for a, _ in signs) * sum((b * b).sum() for _, b in signs))
    return float(sum((a * b).sum() for a, b in signs) / spread) if spread else None


def fit_map(grader, human):
    """(a, b) of human = a * grader + b by least squares with a >= 0."""
    away = grader - grader.mean()
    spread = (away * away).sum()
    a = max(0.0, float((away * (human - human.mean())).sum() / spread)) if spread else 0.0
    return a, float(human.mean() - a * grader.mean())


def apply_map(a, b, grader):
    """Calibrated scores, cut to [0, 1]."""
    import numpy

    return numpy.clip(a * grader + b, 0.0, 1.0)


def fit_dimension(units, seed):
    """The report of one dimension from its units [(task, model, grader, human)], scores in [0, 1]: map, agreement before and after it, 95 % intervals.

    Folds and bootstrap draw whole tasks, since what several models did on one task is not independent; the bootstrap draws the out-of-fold errors and
    fits nothing anew. `error_out` is None with a single task.
    """
    import numpy

    g, h = (numpy.array([u[i] for u in units], dtype=float) for i in (2, 3))
    tasks = sorted({u[0] for u in units})
    seeded_rng(seed, "folds").shuffle(tasks)
    fold = numpy.array([tasks.index(u[0]) % FOLDS for u in units])
    a, b = fit_map(g, h)
    out = numpy.full(len(g), numpy.nan)
    for k in range(min(FOLDS, len(tasks)) if len(tasks) > 1 else 0):
        out[fold == k] = apply_map(*fit_map(g[fold != k], h[fold != k]), g[fold == k])
    errors = abs(out - h)
    rng, members = (
        numpy.random.default_rng(seed),
        [numpy.array([i for i, u in enumerate(units) if u[0] == t]) for t in tasks],
    )
    drawn = [
        numpy.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        for _ in range(DRAWS)
    ]
    interval = lambda values: (
        [float(v) for v in numpy.quantile(values, (0.025, 0.975))] if len(values) else None
    )  # noqa: E731
    rho, whole = spearman(g, h), len(tasks) > 1
    return {
        "n": len(g),
        "tasks": len(tasks),
        "a": a,
        "b": b,
        "spearman": rho,
        "kendall": kendall(g, h),
        "spearman_95": interval(
            [r for some in drawn if (r := spearman(g[some], h[some])) is not None]
        ),
        "error_before": float(abs(g - h).mean()),
        "error_in": float(abs(apply_map(a, b, g) - h).mean()),
        "error_out": float(errors.mean()) if whole else None,
        "error_out_95": interval([errors[some].mean() for some in drawn]) if whole else None,
        "calibrated": rho is not None and rho >= GATE["spearman"] and len(tasks) >= GATE["n"],
    }


def calibrate(paths, config, n):
    """`calibrate scores.csv [FOLDER ...]`: per dimension the map human = a * grader + b, a >= 0, by least squares, then cut to the scale (our reading
    of the paper's "meta-evaluation intensity"), cross-validated in 5 folds by task; writes calibration.json beside the CSV, for bench.calibration.

    Columns of the CSV: dimension; task (or item); human, from 0 to 1, or from 0 to 5 as soon as one is above 1 or a column scale says 5; grader, from
    0 to 1, which is looked up in the folders' grades where it is left out; and, if you like, model. Several rows of one task, dimension and
    model (items, scorers) are averaged. A dimension with a Spearman below 0.7 or fewer than 30 tasks is "uncalibrated"."""
    import numpy

    path, known, names, graders = paths[0], {}, {}, set()
    for folder in paths[1:]:
        code, name = model_of(folder)
        names[code] = name
        for g in (g for file in sorted(folder.glob("grades*.jsonl")) for g in each_line(file)):
            known |= {
                (m, d, g["id"]): score
                for m in (code, name)
                for d, score in (g["vlm"] or {}).items()
            }
            graders |= {g["graded_by"]} if g.get("graded_by") else set()
    if len(graders) > 1:
        raise SystemExit(
            f"error: {len(graders)} VLM-Graders (model, endpoint or prompt) graded the folders; one map is of one grader: give folders of one"
        )
    rows, bad, scale = read_scores(path, ("dimension", "human"))
    groups, lost = {}, 0
    for row in rows:
        task, model = (
            row["task"] if "task" in row else row["item"],
            row.get("model", next(iter(names)) if len(names) == 1 else ""),
        )
        score = (
            row["grader"]
            if row.get("grader", "") != ""
            else known.get((model, row["dimension"], task))
        )
        if score is None:
            lost += 1
        else:
            groups.setdefault((row["dimension"], task, names.get(model, model)), []).append(
                (score, row["human"] / scale)
            )
    if not groups:
        raise SystemExit(
            f"error: {path} has no score on what the grader graded; give a column `grader`, or folders whose grades.jsonl has `vlm`"
        )
    units = {}
    for (dimension, task, model), pairs in groups.items():
        units.setdefault(dimension, []).append(
            (task, model, *(sum(p[i] for p in pairs) / len(pairs) for i in (0, 1)))
        )
    found = {d: fit_dimension(some, config.seed) for d, some in sorted(units.items())}
    show = lambda v, form="6.3f": "-".rjust(6) if v is None else f"{v:{form}}"  # noqa: E731
    span = lambda v: "[     -,      -]" if v is None else f"[{v[0]:6.3f}, {v[1]:6.3f}]"  # noqa: E731
    print(
        f"{lost} scores without one of the grader's. Errors are mean absolute ones, from 0 to 1; intervals are 95 %, by bootstrap over tasks"
    )
    print(
        f"{'':12}{'n':>5} {'a':>6} {'b':>6} {'rho':>6} {'':16} {'tau':>6}   error: before   in fold    out of fold"
    )
    for d, f in found.items():
        print(
            f"{d:12}{f['n']:5} {f['a']:6.3f} {f['b']:6.3f} {show(f['spearman'])} {span(f['spearman_95'])} {show(f['kendall'])}   "
            f"{f['error_before']:13.3f} {f['error_in']:9.3f} {show(f['error_out'])} {span(f['error_out_95'])} {'calibrated' if f['calibrated'] else 'uncalibrated'}"
        )
    models = {}
    for model in sorted({u[1] for some in units.values() for u in some} - {""}):
        own = [
            (u[2], float(apply_map(found[d]["a"], found[d]["b"], u[2])), u[3])
            for d, some in units.items()
            for u in some
            if u[1] == model
        ]
        models[model] = dict(
            zip(("grader", "calibrated", "human"), (sum(v) / len(own) for v in zip(*own))),
            n=len(own),
        )
        m = models[model]
        print(
            f"model {model}: grader {m['grader']:.3f}, after the map {m['calibrated']:.3f}, people {m['human']:.3f}, n = {m['n']}"
        )
    agreement = None
    if len(models) > 1:
        means = [numpy.array([m[k] for m in models.values()]) for k in ("calibrated", "human")]
        agreement = {
            "models": len(models),
            "spearman": spearman(*means),
            "kendall": kendall(*means),
            "error": float(abs(means[0] - means[1]).mean()),
        }
        print(
            f"means of {len(models)} models: rho {show(agreement['spearman'])}, tau {show(agreement['kendall'])}, error {agreement['error']:.3f}"
        )
    target = path.with_name("calibration.json")
    write_atomic(
        target,
        to_json(
            {
                "scores": path.name,
                "scale": scale,
                "seed": config.seed,
                "gate": GATE,
                "graded_by": sorted(graders),
                "skipped": bad,
                "without_grader": lost,
                "dimensions": found,
                "models": models,
                "agreement": agreement,
            }
        ),
    )
    print(f"{target} is written")


def calibrated_grades(grades, path):
    """The grades with `vlm, calibrated` {dimension: score}, by the maps of calibration.json. A dimension below the gate is left out, and said."""
    if not path.is_file():
        raise SystemExit(
            f"error: config key `bench.calibration` names {path}, which is missing; `python bench.py calibrate scores.csv` makes it"
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    every, of = found["dimensions"], set(found["graded_by"])
    if of and any(g.get("graded_by") not in of for g in grades if g["vlm"]):
        raise SystemExit(
            f"error: {path} was fitted to another VLM-Grader (model, endpoint or prompt) than graded here; calibrate again with this one"
        )
    maps = {d: m for d, m in every.items() if m["calibrated"]}
    print(
        f"{path}: calibrated {', '.join(maps) or 'none'}; every other dimension is uncalibrated and left out"
    )
    mapped = lambda scores: {
        d: float(apply_map(maps[d]["a"], maps[d]["b"], v)) for d, v in scores.items() if d in maps
    }  # noqa: E731
    return [{**g, "vlm, calibrated": mapped(g["vlm"] or {})} for g in grades]


# ---------------------------------------------------------------------------- Tables 3, 5 and 6
def overall(s_rate, human):
    """Table 3's Overall Score of {"image": ..., "video": ...}, cut to two decimals as the paper's rows are.

    >>> overall({"image": 0.99, "video": 0.96}, {"image": 3.53, "video": 3.49})
    3.42
    """
    return (
        math.floor(
            (s_rate["image"] * human["image"] + s_rate["video"] * human["video"]) / 2 * 100 + 1e-9
        )
        / 100
    )


def detail(s_rate, human):
    """A row of Table 5 or 6 from {dimension: people's mean score}: ({dimension: success rate x score}, success rate x modality's score, that score).

    The paper's rows are exact products of scores with two decimals; the modality's score is the mean over its dimensions, with two decimals.
    """
    cut = {d: math.floor(v * 100 + 0.5 + 1e-9) / 100 for d, v in human.items()}
    whole = math.floor(sum(cut.values()) / len(cut) * 100 + 0.5 + 1e-9) / 100
    return {d: s_rate * v for d, v in cut.items()}, s_rate * whole, whole


def human_tables(paths, config, n):
    """`human scores.csv [FOLDER ...]`: the paper's Tables 3, 5 and 6 from people's scores. Columns of the CSV: model, modality (image or video),
    dimension, task or item, human (0 to 5) and s_rate, the model's success rate on that modality (0 to 1). Folders turn codes into models' names."""
    rows, _, scale = read_scores(paths[0], ("model", "modality", "dimension", "human", "s_rate"))
    names, rates, scores = dict(map(model_of, paths[1:])), {}, {}
    if scale != 5:
        raise SystemExit(
            f"error: {paths[0]} has no score above 1; Tables 3, 5 and 6 are on the scale from 0 to 5 (a column `scale` of 5 says so)"
        )
    for row in rows:
        model = names.get(row["model"], row["model"])
        if rates.setdefault((model, row["modality"]), row["s_rate"]) != row["s_rate"]:
            raise SystemExit(
                f"error: {paths[0]} gives {model} two success rates on {row['modality']} tasks: "
                f"{rates[model, row['modality']]} and {row['s_rate']}"
            )
        scores.setdefault((model, row["modality"]), {}).setdefault(row["dimension"], []).append(
            row["human"]
        )
    mean = {key: {d: sum(v) / len(v) for d, v in some.items()} for key, some in scores.items()}
    found = {key: detail(rates[key], some) for key, some in mean.items()}
    for modality, table in (("image", "Table 5"), ("video", "Table 6")):
        for (model, kind), (products, whole, _) in sorted(found.items()):
            if kind == modality:
                print(
                    f"{table}  {model}: "
                    + ", ".join(f"{d} {v:.4f}" for d, v in products.items())
                    + f", Overall {whole:.4f}"
                )
    for model in sorted({model for model, _ in found}):
        kinds = {
            kind: found[model, kind][2] for kind in ("image", "video") if (model, kind) in found
        }
        text = ", ".join(
            f"{kind} success {rates[model, kind]:.2%} score {v:.2f}" for kind, v in kinds.items()
        )
        print(
            f"Table 3  {model}: {text}, Overall "
            + (
                f"{overall({k: rates[model, k] for k in kinds}, kinds):.2f}"
                if len(kinds) == 2
                else "- (needs both modalities)"
            )
        )
