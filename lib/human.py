"""People's scores on VisGenBench (Sec. 5.1.2, 5.3): the sheet to give them on, and Tables 3, 5, 6.

`export_sheet` writes a blind sheet, `read_scores` reads what people saved, `human_tables` prints
the paper's tables of them. lib/calibration.py fits the VLM-Grader to the same scores.
"""

import csv
import io
import math
from pathlib import Path

from lib.cards import with_cards
from lib.experiment import Config
from lib.lineage import deliverables
from lib.media import data_uri, from_tool, moments, real_file, stills, thumbnail
from lib.runs import digest, each_line, seeded_rng, write_atomic
from lib.tables import SUBJECTIVE
from lib.text import fill_template

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


def model_of(folder: Path) -> tuple[str, str]:
    """(code, name) of a benchmark folder runs/<name>/bench/<agent>-<subset>.

    Sheets show neither, and their files only the code.
    """
    name = "/".join((folder.resolve().parents[1].name, folder.name))
    return f"model-{digest(name, size=3)}", name


# ---------------------------------------------------------------------------- the scoring sheet
def export_sheet(folders: list[Path], config: Config, n: int | None) -> None:
    """Write FOLDER/sheet.html, a page that stands alone, and FOLDER/sheet.csv, the same rows.

    The CSV is there to be filled in elsewhere. People score each rubric item of each task from 0 to
    5 and do not see whose work it is: tasks of all the folders given stand mixed, and `model` is a
    code, which `calibrate` and `human` turn back when they are given the folders too. --n: as many
    tasks, chosen by seed; else all. Tasks with nothing handed over are not on the sheet: `s_rate`,
    the share of the model's tasks of that modality with the right kind handed over, counts them.
    Films are shown as stills."""
    entries = [entry for folder in folders for entry in sheet_entries(folder)]
    rng = seeded_rng(config.seed, "sheet")
    chosen = rng.sample(entries, min(n or len(entries), len(entries)))
    for entry in chosen:
        entry["media"] = [
            {**a, "pictures": look(a), "real": from_tool(a)} for a in entry.pop("handed")
        ]
        entry["rows"] = sheet_rows(entry)
    rows = [row for entry in chosen for row in entry["rows"]]
    write_atomic(folders[0] / "sheet.csv", sheet_csv(rows))
    page = fill_template(
        "templates/sheet.jinja",
        tasks=chosen,
        columns=SHEET_COLUMNS,
        key=digest([row["task"] + row["model"] for row in rows]),
        stand_ins=sum(not a["real"] for entry in chosen for a in entry["media"]),
    )
    write_atomic(folders[0] / "sheet.html", page)
    print(
        f"{folders[0] / 'sheet.html'} and sheet.csv: {len(chosen)} of {len(entries)} tasks, "
        f"{len(rows)} items to score; then `python bench.py calibrate scores.csv "
        f"{' '.join(map(str, folders))}` and `python bench.py human scores.csv`"
    )


def sheet_entries(folder: Path) -> list[dict]:
    """A bench folder's tasks that can be scored: {"task", "handed", "model", "s_rate"} each."""
    played = list(each_line(folder / "trajectories.jsonl"))
    handed = [
        [with_cards(a, t) for a in deliverables(t) if a["kind"] == t["task"]["modality"]]
        for t in played
    ]
    s_rate = {}
    for kind in ("image", "video"):
        right = [bool(h) for h, t in zip(handed, played) if t["task"]["modality"] == kind]
        s_rate[kind] = sum(right) / max(1, len(right))
    code, _ = model_of(folder)
    return [
        {"task": t["task"], "handed": h, "model": code, "s_rate": s_rate[t["task"]["modality"]]}
        for t, h in zip(played, handed)
        if h and t["task"].get("rubric") and t["task"]["dimension"] in SUBJECTIVE
    ]


def look(artifact: dict) -> list[str]:
    """Small pictures of one artifact for a page: of its real file, else stand-ins, one a shot."""
    if path := real_file(artifact):
        places = moments(artifact, 8) if artifact["kind"] == "video" else (0,)
        return [data_uri(picture) for _, picture in stills(path, places, side=400)]
    return [thumbnail(artifact, shot) for shot in range(artifact["shots"] or 1)]


def sheet_rows(entry: dict) -> list[dict]:
    """The rows of the CSV of one task, one a rubric item; `human` and `scorer` are to be filled."""
    task = entry["task"]
    return [
        {
            "task": task["id"],
            "item": i,
            "dimension": task["dimension"],
            "modality": task["modality"],
            "model": entry["model"],
            "s_rate": entry["s_rate"],
            "scale": 5,
            "human": "",
            "scorer": "",
            "rubric": item,
        }
        for i, item in enumerate(task["rubric"], 1)
    ]


def sheet_csv(rows: list[dict]) -> str:
    """The sheet's rows as the text of a CSV file."""
    file = io.StringIO()
    writer = csv.DictWriter(file, SHEET_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# ---------------------------------------------------------------------------- reading scores
def read_scores(path: Path, needed: tuple[str, ...]) -> tuple[list[dict], int, int]:
    """([row], lines skipped, scale) of a CSV of people's scores, `human` as they gave it.

    The separator is a comma, or a semicolon where the head has one. A line that cannot be used is
    said by its number and skipped; a line without a score is only counted. The scale is 5, unless
    no score is above 1 and no column `scale` says 5. SystemExit for a missing file or column.
    """
    if not path.is_file():
        raise SystemExit(
            f"error: {path} is missing; `python bench.py sheet FOLDER` makes a sheet that saves one"
        )
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    separator = ";" if ";" in lines[0] else ","
    head = next(csv.reader([lines[0].rstrip("\r")], delimiter=separator), [])
    names = [name.strip() for name in head]
    lacking = [name for name in needed if name not in names]
    if "task" not in names and "item" not in names:
        lacking.append("task or item")
    if lacking:
        raise SystemExit(
            f"error: {path} has no column {', '.join(lacking)}; its columns are "
            f"{', '.join(names) or 'none'}"
        )
    rows, bad, empty = [], 0, 0
    for n, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            row = read_line(line, separator, names, needed)
        except (csv.Error, ValueError) as e:
            bad += 1
            print(f"  {path}, line {n} {e}: skipped")
            continue
        if row["human"] == "":
            empty += 1
        else:
            rows.append(row)
    scale = 5 if any(row["human"] > 1 or row.get("scale") == "5" for row in rows) else 1
    print(
        f"{path}: {len(rows)} scores, {bad} lines skipped, {empty} without a score; people's scale "
        f"is taken as 0 to {scale}" + ("" if scale == 5 else ", since none is above 1")
    )
    return rows, bad, scale


def read_line(line: str, separator: str, names: list[str], needed: tuple[str, ...]) -> dict:
    """{column: cell} of one line, its scores and rates as numbers; `human` is "" without a score.

    csv.Error or ValueError says what is wrong with it.
    """
    cells = next(csv.reader([line.rstrip("\r")], delimiter=separator, strict=True))
    if len(cells) != len(names):
        raise ValueError(f"has {len(cells)} cells; the head has {len(names)}")
    row = {name: cell.strip() for name, cell in zip(names, cells)}
    if not row["human"]:
        return row
    row["human"] = number(row, "human", 5)
    if row.get("grader"):
        row["grader"] = number(row, "grader", 1)
    if "s_rate" in needed:
        row["s_rate"] = number(row, "s_rate", 1)
    filled = ["dimension", "task" if "task" in names else "item"]
    filled += [name for name in ("model", "modality") if name in needed]
    for name in filled:
        if not row[name]:
            raise ValueError(f"has no {name}")
    if "modality" in needed and row["modality"] not in ("image", "video"):
        raise ValueError(f"has modality {row['modality']!r}; image or video is right")
    return row


def number(row: dict, name: str, most: float) -> float:
    """row[name] as a number from 0 to `most`. ValueError says what is wrong."""
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise ValueError(f"has {name} {row[name]!r}; a number from 0 to {most} is right")
    return value


# ---------------------------------------------------------------------------- Tables 3, 5 and 6
def human_tables(path: Path, folders: list[Path]) -> None:
    """`human scores.csv [FOLDER ...]`: the paper's Tables 3, 5 and 6 from people's scores.

    Columns of the CSV: model, modality (image or video), dimension, task or item, human (0 to 5)
    and s_rate, the model's success rate on that modality (0 to 1). Folders turn codes into models'
    names."""
    rows, _, scale = read_scores(path, ("model", "modality", "dimension", "human", "s_rate"))
    if scale != 5:
        raise SystemExit(
            f"error: {path} has no score above 1; Tables 3, 5 and 6 are on the scale from 0 "
            "to 5 (a column `scale` of 5 says so)"
        )
    names = dict(model_of(folder) for folder in folders)
    # {(model, modality): success rate}, and {(model, modality): {dimension: [people's scores]}}
    rates, scores = {}, {}
    for row in rows:
        model = names.get(row["model"], row["model"])
        key = (model, row["modality"])
        if rates.setdefault(key, row["s_rate"]) != row["s_rate"]:
            raise SystemExit(
                f"error: {path} gives {model} two success rates on {row['modality']} tasks: "
                f"{rates[key]} and {row['s_rate']}"
            )
        scores.setdefault(key, {}).setdefault(row["dimension"], []).append(row["human"])
    details = {}
    for key, by_dimension in scores.items():
        means = {d: sum(values) / len(values) for d, values in by_dimension.items()}
        details[key] = detail(rates[key], means)
    print_details(details)
    print_overall(rates, details)


def detail(s_rate: float, human: dict[str, float]) -> tuple[dict, float, float]:
    """A row of Table 5 or 6 from {dimension: people's mean score}, which is from 0 to 5.

    Returns ({dimension: success rate x score}, success rate x modality's score, that score). The
    paper's rows are exact products of scores with two decimals; the modality's score is the mean
    over its dimensions, with two decimals.
    """
    rounded = {d: math.floor(v * 100 + 0.5 + 1e-9) / 100 for d, v in human.items()}
    mean = sum(rounded.values()) / len(rounded)
    whole = math.floor(mean * 100 + 0.5 + 1e-9) / 100
    return {d: s_rate * v for d, v in rounded.items()}, s_rate * whole, whole


def overall(s_rate: dict[str, float], human: dict[str, float]) -> float:
    """Table 3's Overall Score of {"image": ..., "video": ...}.

    It is cut to two decimals as the paper's rows are.

    >>> overall({"image": 0.99, "video": 0.96}, {"image": 3.53, "video": 3.49})
    3.42
    """
    exact = (s_rate["image"] * human["image"] + s_rate["video"] * human["video"]) / 2
    return math.floor(exact * 100 + 1e-9) / 100


def print_details(details: dict[tuple, tuple]) -> None:
    """Print Tables 5 and 6; `details`: {(model, modality): what `detail` returns}."""
    for modality, table in (("image", "Table 5"), ("video", "Table 6")):
        for (model, kind), (products, whole, _) in sorted(details.items()):
            if kind == modality:
                cells = ", ".join(f"{d} {v:.4f}" for d, v in products.items())
                print(f"{table}  {model}: {cells}, Overall {whole:.4f}")


def print_overall(rates: dict[tuple, float], details: dict[tuple, tuple]) -> None:
    """Print Table 3; both arguments are by (model, modality)."""
    for model in sorted({model for model, _ in details}):
        kinds = [kind for kind in ("image", "video") if (model, kind) in details]
        s_rate = {kind: rates[model, kind] for kind in kinds}
        human = {kind: details[model, kind][2] for kind in kinds}
        text = ", ".join(
            f"{kind} success {s_rate[kind]:.2%} score {human[kind]:.2f}" for kind in kinds
        )
        total = "- (needs both modalities)"
        if len(kinds) == 2:
            total = f"{overall(s_rate, human):.2f}"
        print(f"Table 3  {model}: {text}, Overall {total}")
