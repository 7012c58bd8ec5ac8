"""lib.grader."""

import base64
import io
import os
import statistics
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from lib.human import calibrated_grades
from lib.lineage import deliverables
from lib.llm import Endpoint, ask, bill, run_jobs
from lib.media import SUFFIXES, data_uri, from_tool, materialize, moments, real_file, stills
from lib.runs import ROOT, digest, read_jsonl, seeded_rng, write_atomic, write_jsonl
from lib.tables import SUBJECTIVE
from lib.text import to_json

# ---------------------------------------------------------------------------- the VLM-Grader (Sec. 5.1.2) and its controls; people's scores
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
MOST_PICTURES, MOST_FRAMES = 12, 8  # of a request, and of one film


def pictures_to_grade(trajectory):
    """What the VLM-Grader looks at: {"pictures": [(label, JPEG data URI)], "delivered": words, "left_out": how many are not shown, "real": real files}.

    The deliverables of the asked kind, a picture or up to 8 frames a film, at most 12 in all, of up to 768 pixels a side, read from files. An
    artifact whose `media` names a file that is there, by an absolute path, shows that file. Any other shows the simulator's stand-in, drawn without regard to
    the prompt: a VLM's scores of stand-ins, or of the media database's files, test this code and say nothing about an agent, and the report says so.
    """
    kind = trajectory["task"]["modality"]
    items = [a for a in deliverables(trajectory) if a["kind"] == kind]
    found = {
        "pictures": [],
        "delivered": [],
        "left_out": max(0, len(items) - MOST_PICTURES),
        "real": sum(map(from_tool, items)),
    }
    with tempfile.TemporaryDirectory() as folder:
        for i, a in enumerate(items, 1):
            seconds = f", {a['duration_s']} s" if kind == "video" else ""
            found["delivered"].append(
                f"{'film' if kind == 'video' else 'picture'} {i}, {a['width']}x{a['height']}{seconds}"
            )
            if i > MOST_PICTURES:
                continue
            path = real_file(a)
            if not path:
                path = Path(folder) / f"{i}{SUFFIXES[kind][0]}"
                materialize({**a, "has_audio": False}, path)
            places = (
                moments(a, min(MOST_FRAMES, MOST_PICTURES // min(len(items), MOST_PICTURES)))
                if kind == "video"
                else (0,)
            )
            found["pictures"] += [
                (f"film {i}, {at:.1f} s" if kind == "video" else f"picture {i}", data_uri(p))
                for at, p in stills(path, places)
            ]
    return found


async def grade_one(endpoint, task, shown, again=0):
    """(score, answers) of one task: the share of yes over the rubric's answerable items, and [{"seen", "answer"}] in their order.

    Nothing of the asked kind handed over: (0.0, []), unasked. No reply: (None, None). No item answerable: (None, answers).
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
    found = await ask(endpoint, GRADER, schema, values, shown["pictures"], again)
    if found is None:
        return None, None
    known = [found[i]["answer"] == "yes" for i in schema if found[i]["answer"] != "cannot tell"]
    return sum(known) / len(known) if known else None, [found[i] for i in schema]


def grade_by_vlm(trajectories, grades, config, path):
    """Write the VLM-Grader's scores into the grades' `vlm` {dimension: score} and `items`, and the grades to `path`. Returns the report's line, and `by`.

    Only tasks of the six subjective dimensions are asked about. Each lot is saved, so a stopped run goes on; a task that failed stays None and is
    asked again next time, as is every task when model or prompt are others (`graded_by`). SystemExit above `max_failures`.
    """
    llm = replace(config.llm, temperature=0.0)
    endpoint = Endpoint(llm, "the VLM-Grader", "tasks", Counter())
    by = digest(
        llm.url, llm.model, llm.temperature, (ROOT / "data" / GRADER).read_text(encoding="utf-8")
    )
    pairs = [
        (t, g)
        for t, g in zip(trajectories, grades)
        if g["dimension"] in SUBJECTIVE and t["task"].get("rubric")
    ]
    left = [(t, g) for t, g in pairs if g.get("graded_by") != by or g["items"] is None]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, len(left), CHUNK):
            lot = left[at : at + CHUNK]
            shown = list(pool.map(pictures_to_grade, [t for t, _ in lot]))
            found = run_jobs(
                endpoint,
                lambda pair: grade_one(endpoint, pair[0]["task"], pair[1]),
                [(t, s) for (t, _), s in zip(lot, shown)],
                f"VLM-Grader, from task {at} of {len(left)}",
            )
            for (_, g), (score, items), s in zip(lot, found, shown):
                g.update(
                    vlm=None if score is None else {g["dimension"]: score},
                    items=items,
                    graded_by=by,
                    media=len(s["delivered"]),
                    real=s["real"],
                )
            write_jsonl(path, grades)
    failed, silent = (
        sum(g["vlm"] is None and (g["items"] is None) == lost for _, g in pairs)
        for lost in (True, False)
    )
    real, media = (sum(g[name] for _, g in pairs) for name in ("real", "media"))
    print(f"VLM-Grader: {bill(endpoint)}")
    return (
        f"VLM-Grader {llm.model}: {len(pairs)} tasks, {failed} failed, {silent} with no answerable item; {real} of {media} "
        "media are a tool's real files"
        + ("; the others are stand-ins, and their scores mean nothing" if real < media else "")
    ), by


def subjective_grades(trajectories, grades, config, path):
    """(grades, the name of their grader, {"grading": a line on it, "graded_by": what two runs must share to be compared}) of the subjective columns.

    After a calibration, dimensions below its gate are left out; the grades that count are in `path` as well.
    """
    if config.bench.grader == "structural":
        return grades, "structural", {"grading": "", "graded_by": "structural"}
    line, by = grade_by_vlm(trajectories, grades, config, path)
    if not config.bench.calibration:
        return grades, "vlm", {"grading": line, "graded_by": by}
    maps = ROOT / config.bench.calibration
    grades = calibrated_grades(grades, maps)
    write_jsonl(path, grades)
    return (
        grades,
        "vlm, calibrated",
        {"grading": line, "graded_by": f"{by} {digest(maps.read_text(encoding='utf-8'))}"},
    )


def controls(folders, config, n):
    """Does the VLM-Grader look at the media? For FOLDER (runs/<name>/bench/<agent>-<subset>) it grades a drawn sample (--n tasks, 40 unless told)
    with the right media, with another task's (shuffled), with grey ones (blank), and with the right ones again; writes FOLDER/controls.json. Items on
    how media agree among themselves (object, scene, style, variety) may rightly hold for another task's media; grey ones must fall in every dimension."""
    from PIL import Image

    folder, llm = folders[0], replace(config.llm, temperature=0.0)
    tried = [
        t
        for t in read_jsonl(folder / "trajectories.jsonl")
        if t["task"]["dimension"] in SUBJECTIVE and t["task"].get("rubric")
    ]
    handed = [t for t in tried if any(a["kind"] == t["task"]["modality"] for a in deliverables(t))]
    if not handed:
        raise SystemExit(
            f"error: {folder / 'trajectories.jsonl'} has no task of a subjective dimension with media handed over: nothing to grade"
        )
    chosen = seeded_rng(config.seed, "controls").sample(handed, min(n or 40, len(handed)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shown = list(pool.map(pictures_to_grade, chosen))
    jobs, ring = [], list(zip(chosen, shown)) * 2
    for i, (t, s) in enumerate(zip(chosen, shown)):
        others = [
            o
            for u, o in ring[i + 1 : i + len(chosen)]
            if u["task"]["modality"] == t["task"]["modality"]
        ]
        sizes = [
            (label, Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size)
            for label, uri in s["pictures"]
        ]
        blank = {
            **s,
            "pictures": [
                (label, data_uri(Image.new("RGB", size, (128, 128, 128)))) for label, size in sizes
            ],
        }
        jobs += [("right", t, s, 0), ("blank", t, blank, 0), ("again", t, s, 1)] + [
            ("shuffled", t, o, 0) for o in others[:1]
        ]
    endpoint = Endpoint(llm, "the VLM-Grader", "tasks", Counter())
    found = run_jobs(
        endpoint, lambda job: grade_one(endpoint, job[1]["task"], *job[2:]), jobs, "controls"
    )
    by = {(job[0], job[1]["task"]["id"]): result for job, result in zip(jobs, found)}
    dimension, report, warnings = {t["task"]["id"]: t["task"]["dimension"] for t in chosen}, {}, []
    for name in ("all", *SUBJECTIVE):
        ids = [i for i in dimension if name in ("all", dimension[i])]
        some = {
            kind: [by[kind, i][0] for i in ids if by.get((kind, i), (None,))[0] is not None]
            for kind in ("right", "shuffled", "blank")
        }
        report[name] = {"n": len(ids)} | {
            kind: statistics.mean(v) if v else None for kind, v in some.items()
        }
        if name == "all":
            warnings += [
                f"no score of {kind} media: requests failed, or no item was answerable"
                for kind, v in some.items()
                if not v
            ]
        for kind in ("shuffled", "blank") if some["right"] else ():
            if some[kind] and report[name]["right"] - report[name][kind] < 0.3:
                warnings.append(
                    f"{name}: {kind} media get {report[name][kind]:.2f}, right ones {report[name]['right']:.2f}: not 0.3 lower"
                )
    twice = [
        (a["answer"], b["answer"])
        for i in dimension
        for a, b in zip(by["right", i][1] or (), by["again", i][1] or ())
    ]
    report["test_retest"] = {
        "items": len(twice),
        "same": sum(a == b for a, b in twice) / len(twice) if twice else None,
    }
    write_atomic(
        folder / "controls.json",
        to_json(
            {"model": llm.model, "failed": endpoint.asked["failed"], **report, "warnings": warnings}
        ),
    )
    show = lambda v: "-" if v is None else f"{v:.3f}"  # noqa: E731
    print(f"{'':10}{'n':>5}{'right':>10}{'shuffled':>10}{'blank':>10}")
    for name in ("all", *SUBJECTIVE):
        print(
            f"{name:10}{report[name]['n']:5}"
            + "".join(f"{show(report[name][kind]):>10}" for kind in ("right", "shuffled", "blank"))
        )
    print(
        f"test and retest: {show(report['test_retest']['same'])} of {len(twice)} answers are the same; {endpoint.asked['failed']} of {len(jobs)} "
        f"requests failed; {bill(endpoint)}"
    )
    print(
        "\n".join(f"WARNING: {w}" for w in warnings)
        or "right media score at least 0.3 above shuffled and grey ones"
    )
