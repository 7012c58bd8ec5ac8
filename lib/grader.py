"""The VLM-Grader (Sec. 5.1.2): a vision model scores a rubric's items on what was handed over.

`subjective_grades` is bench.py's way in. `controls` asks whether a grader looks at the media at
all. The prompt, data/prompts/vlm_grader.jinja, and the limits here are ours.
"""

import base64
import io
import statistics
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lib.calibration import calibrated_grades
from lib.cards import with_cards
from lib.experiment import Config
from lib.lineage import deliverables
from lib.llm import Endpoint, ask, bill, run_jobs
from lib.media import SUFFIXES, data_uri, from_tool, materialize, moments, real_file, stills
from lib.runs import (
    ROOT,
    digest,
    read_jsonl,
    seeded_rng,
    worker_pool,
    write_atomic,
    write_jsonl,
)
from lib.tables import SUBJECTIVE
from lib.text import to_json

# The JSON Schema of one item's answer.
ANSWER = {
    "type": "object",
    "properties": {
        "seen": {"type": "string"},
        "answer": {"type": "string", "enum": ["yes", "no", "cannot tell"]},
    },
    "required": ["seen", "answer"],
    "additionalProperties": False,
}
GRADER = "prompts/vlm_grader.jinja"
CHUNK = 64  # tasks graded at once; each lot is saved
MOST_PICTURES = 12  # of a request
MOST_FRAMES = 8  # of one film
MARGIN = 0.3  # by which right media must score above wrong ones (ours)


# ---------------------------------------------------------------------------- grading
def subjective_grades(
    trajectories: list[dict], grades: list[dict], config: Config, path: Path
) -> tuple[list[dict], str, dict]:
    """(grades, the name of their grader, {"grading", "graded_by"}) of the subjective columns.

    grading: a line on it; graded_by: what two runs must share to be compared. After a calibration,
    dimensions below its gate are left out; the grades that count are in `path` as well.
    """
    if config.bench.grader == "structural":
        return grades, "structural", {"grading": "", "graded_by": "structural"}
    line, by = grade_by_vlm(trajectories, grades, config, path)
    if not config.bench.calibration:
        return grades, "vlm", {"grading": line, "graded_by": by}
    maps = ROOT / config.bench.calibration
    grades = calibrated_grades(grades, maps)
    write_jsonl(path, grades)
    by = f"{by} {digest(maps.read_text(encoding='utf-8'))}"
    return grades, "vlm, calibrated", {"grading": line, "graded_by": by}


def grade_by_vlm(
    trajectories: list[dict], grades: list[dict], config: Config, path: Path
) -> tuple[str, str]:
    """Write the VLM-Grader's scores into the grades, and the grades to `path`.

    Each grade gets `vlm` {dimension: score}, `items`, `graded_by`, `media` and `real`. Returns the
    report's line, and `graded_by`. Only tasks of the six subjective dimensions are asked about.
    Each lot is saved, so a stopped run goes on; a task that failed stays None and is asked again
    next time, as is every task when model or prompt are others. SystemExit above `max_failures`.
    """
    endpoint = greedy_endpoint(config)
    llm = endpoint.llm
    prompt = (ROOT / "data" / GRADER).read_text(encoding="utf-8")
    by = digest(llm.url, llm.model, llm.temperature, prompt)
    pairs = [
        (t, g)
        for t, g in zip(trajectories, grades)
        if g["dimension"] in SUBJECTIVE and t["task"].get("rubric")
    ]
    left = [(t, g) for t, g in pairs if g.get("graded_by") != by or g["items"] is None]

    async def job(item):
        trajectory, shown = item
        return await grade_one(endpoint, trajectory["task"], shown)

    with worker_pool() as pool:
        for at in range(0, len(left), CHUNK):
            lot = left[at : at + CHUNK]
            shown = list(pool.map(pictures_to_grade, [t for t, _ in lot]))
            items = [(t, s) for (t, _), s in zip(lot, shown)]
            title = f"VLM-Grader, from task {at} of {len(left)}"
            found = run_jobs(endpoint, job, items, title)
            for (_, g), (score, answers), s in zip(lot, found, shown):
                g["vlm"] = None if score is None else {g["dimension"]: score}
                g["items"] = answers
                g["graded_by"] = by
                g["media"] = len(s["delivered"])
                g["real"] = s["real"]
            write_jsonl(path, grades)
    print(f"VLM-Grader: {bill(endpoint)}")
    return grading_line(llm.model, [g for _, g in pairs]), by


def greedy_endpoint(config: Config) -> Endpoint:
    """Section llm as the grader uses it: at temperature 0."""
    return Endpoint(replace(config.llm, temperature=0.0), "the VLM-Grader", "tasks", Counter())


def grading_line(model: str, grades: list[dict]) -> str:
    """What the scores of the graded tasks rest on, in words."""
    unscored = [g for g in grades if g["vlm"] is None]
    failed = sum(g["items"] is None for g in unscored)
    real = sum(g["real"] for g in grades)
    media = sum(g["media"] for g in grades)
    line = (
        f"VLM-Grader {model}: {len(grades)} tasks, {failed} failed, {len(unscored) - failed} with "
        f"no answerable item; {real} of {media} media are a tool's real files"
    )
    if real < media:
        line += "; the others are stand-ins, and their scores mean nothing"
    return line


def pictures_to_grade(trajectory: dict) -> dict:
    """What the VLM-Grader looks at: {"pictures", "delivered", "left_out", "real"}.

    pictures: [(label, JPEG data URI)] of the deliverables of the asked kind, a picture or up to 8
    frames a film, at most 12 in all, of up to 768 pixels a side, read from files; delivered: each
    in words; left_out: how many are not shown; real: how many are a tool's real files.

    An artifact whose `media` names a file that is there, by an absolute path, shows that file. Any
    other shows the simulator's stand-in, a card with the prompt's words, which says so: a VLM's
    scores of stand-ins, or of the media database's files, test this code and say nothing about an
    agent, and the report says so.
    """
    kind = trajectory["task"]["modality"]
    film = kind == "video"
    items = [a for a in deliverables(trajectory) if a["kind"] == kind]
    pictures, delivered = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, a in enumerate(items, 1):
            name = f"film {i}" if film else f"picture {i}"
            seconds = f", {a['duration_s']} s" if film else ""
            delivered.append(f"{name}, {a['width']}x{a['height']}{seconds}")
            if i > MOST_PICTURES:
                continue
            path = real_file(a)
            if not path:
                path = Path(folder) / f"{i}{SUFFIXES[kind][0]}"
                materialize({**with_cards(a, trajectory), "has_audio": False}, path)
            places = (0,)
            if film:
                each = MOST_PICTURES // min(len(items), MOST_PICTURES)
                places = moments(a, min(MOST_FRAMES, each))
            for at, picture in stills(path, places):
                label = f"{name}, {at:.1f} s" if film else name
                pictures.append((label, data_uri(picture)))
    return {
        "pictures": pictures,
        "delivered": delivered,
        "left_out": max(0, len(items) - MOST_PICTURES),
        "real": sum(from_tool(a) for a in items),
    }


async def grade_one(
    endpoint: Endpoint, task: dict, shown: dict, again: int = 0
) -> tuple[float | None, list[dict] | None]:
    """(score, answers) of one task: the share of yes over the rubric's answerable items.

    answers: [{"seen", "answer"}] in the items' order. Nothing of the asked kind handed over:
    (0.0, []), unasked. No reply: (None, None). No item answerable: (None, answers). Another `again`
    asks the same anew.
    """
    if not shown["pictures"]:
        return 0.0, []
    values = {
        "request": task["request"],
        "rubric": task["rubric"],
        "modality": task["modality"],
        "delivered": shown["delivered"],
        "left_out": shown["left_out"],
        "labels": [label for label, _ in shown["pictures"]],
    }
    schema = {str(i): ANSWER for i in range(1, len(task["rubric"]) + 1)}
    reply = await ask(endpoint, GRADER, schema, values, shown["pictures"], again)
    if reply is None:
        return None, None
    answers = [reply[i] for i in schema]
    answerable = [a["answer"] == "yes" for a in answers if a["answer"] != "cannot tell"]
    return sum(answerable) / len(answerable) if answerable else None, answers


# ---------------------------------------------------------------------------- controls
def controls(folder: Path, config: Config, n: int | None) -> None:
    """Does the VLM-Grader look at the media?

    For FOLDER (runs/<name>/bench/<agent>-<subset>) it grades a sample (--n tasks by seed, 40
    unless told) with the right media, with another task's (shuffled), with grey ones (blank), and
    with the right ones again; writes FOLDER/controls.json. Items on how media agree among
    themselves (object, scene, style, variety) may rightly hold for another task's media; grey ones
    must fall in every dimension."""
    chosen = choose_handed_over(folder, n or 40, config.seed)
    with worker_pool() as pool:
        shown = list(pool.map(pictures_to_grade, chosen))
    jobs = control_jobs(chosen, shown)
    endpoint = greedy_endpoint(config)

    async def job(item):
        _, trajectory, seen, again = item
        return await grade_one(endpoint, trajectory["task"], seen, again)

    found = run_jobs(endpoint, job, jobs, "controls")
    results = {(kind, t["task"]["id"]): result for (kind, t, _, _), result in zip(jobs, found)}
    dimensions = {t["task"]["id"]: t["task"]["dimension"] for t in chosen}
    means = control_means(results, dimensions)
    retest = retest_agreement(results, dimensions)
    warnings = control_warnings(means)
    report = {
        "model": endpoint.llm.model,
        "failed": endpoint.asked["failed"],
        **means,
        "test_retest": retest,
        "warnings": warnings,
    }
    write_atomic(folder / "controls.json", to_json(report))
    print_controls(means)
    print(
        f"test and retest: {cell(retest['same'])} of {retest['items']} answers are the same; "
        f"{endpoint.asked['failed']} of {len(jobs)} requests failed; {bill(endpoint)}"
    )
    lines = [f"WARNING: {w}" for w in warnings]
    print("\n".join(lines) or f"right media score at least {MARGIN} above shuffled and grey ones")


def choose_handed_over(folder: Path, n: int, seed: int) -> list[dict]:
    """Up to `n` trajectories of subjective dimensions with media handed over, chosen by seed."""
    path = folder / "trajectories.jsonl"
    handed = []
    for t in read_jsonl(path):
        task = t["task"]
        graded = task["dimension"] in SUBJECTIVE and task.get("rubric")
        if graded and any(a["kind"] == task["modality"] for a in deliverables(t)):
            handed.append(t)
    if not handed:
        raise SystemExit(
            f"error: {path} has no task of a subjective dimension with media handed over: nothing "
            "to grade"
        )
    return seeded_rng(seed, "controls").sample(handed, min(n, len(handed)))


def control_jobs(chosen: list[dict], shown: list[dict]) -> list[tuple]:
    """[(kind of control, trajectory, what is shown, again)]: right, blank, again, shuffled.

    Shuffled are the next task's media of the same modality; a task that is alone in its modality
    has none.
    """
    jobs = []
    for i, (t, s) in enumerate(zip(chosen, shown)):
        jobs += [("right", t, s, 0), ("blank", t, grey(s), 0), ("again", t, s, 1)]
        for step in range(1, len(chosen)):
            other = (i + step) % len(chosen)
            if chosen[other]["task"]["modality"] == t["task"]["modality"]:
                jobs.append(("shuffled", t, shown[other], 0))
                break
    return jobs


def grey(shown: dict) -> dict:
    """What pictures_to_grade found, with grey pictures of the same sizes."""
    from PIL import Image

    pictures = []
    for label, uri in shown["pictures"]:
        size = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size
        pictures.append((label, data_uri(Image.new("RGB", size, (128, 128, 128)))))
    return {**shown, "pictures": pictures}


def control_means(results: dict[tuple, tuple], dimensions: dict[str, str]) -> dict[str, dict]:
    """{"all" or a dimension: {"n": tasks, "right", "shuffled", "blank": mean score or None}}.

    `results`: {(kind of control, task id): (score, answers)}; `dimensions`: {task id: dimension}.
    """
    report = {}
    for name in ("all", *SUBJECTIVE):
        ids = [i for i, dimension in dimensions.items() if name in ("all", dimension)]
        report[name] = {"n": len(ids)}
        for kind in ("right", "shuffled", "blank"):
            scores = [results[kind, i][0] for i in ids if (kind, i) in results]
            known = [score for score in scores if score is not None]
            report[name][kind] = statistics.mean(known) if known else None
    return report


def control_warnings(means: dict[str, dict]) -> list[str]:
    """What the means say against the grader, in words."""
    warnings = [
        f"no score of {kind} media: requests failed, or no item was answerable"
        for kind in ("right", "shuffled", "blank")
        if means["all"][kind] is None
    ]
    for name, scores in means.items():
        right = scores["right"]
        for kind in ("shuffled", "blank"):
            wrong = scores[kind]
            if right is not None and wrong is not None and right - wrong < MARGIN:
                warnings.append(
                    f"{name}: {kind} media get {wrong:.2f}, right ones {right:.2f}: "
                    f"not {MARGIN} lower"
                )
    return warnings


def retest_agreement(results: dict[tuple, tuple], dimensions: dict[str, str]) -> dict:
    """{"items", "same"}: items answered twice, and the share of them with the same answer."""
    same = []
    for i in dimensions:
        first, second = results["right", i][1] or (), results["again", i][1] or ()
        same += [a["answer"] == b["answer"] for a, b in zip(first, second)]
    return {"items": len(same), "same": sum(same) / len(same) if same else None}


def print_controls(means: dict[str, dict]) -> None:
    """Print the means as a table."""
    print(f"{'':10}{'n':>5}{'right':>10}{'shuffled':>10}{'blank':>10}")
    for name, scores in means.items():
        cells = "".join(f"{cell(scores[kind]):>10}" for kind in ("right", "shuffled", "blank"))
        print(f"{name:10}{scores['n']:5}{cells}")


def cell(value: float | None) -> str:
    """A number with three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"
