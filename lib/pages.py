"""What bench.py's pages show of trajectories: each turn and call, the plan as a graph, films that play, and why episodes fall short."""

import argparse
import base64
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from env import parse_utpc
from lib.experiment import Config, load_config
from lib.lineage import deliverables
from lib.media import materialize, thumbnail
from lib.runs import each_line, seeded_rng, write_atomic
from lib.scenarios import load_scenarios
from lib.tables import own_score, read_paper
from lib.text import fill_template, to_json
from lib.toolbox import makes
from rewards import PARTS, explain, ltr_reward, unrepaired

# ---------------------------------------------------------------------------- pages: the report of a bench folder, the demo of one trajectory
LOWEST = 10  # trajectories that a report always shows


def report(folder, config, most):
    """report.html of a bench folder. Its cards, lowest first: the LOWEST by own column's score, then R_vrt, and others by seed, `most` in all."""
    if most < LOWEST:
        raise SystemExit(
            f"error: --most is {most}; at least {LOWEST}, since the {LOWEST} lowest are always shown"
        )
    if not (folder / "columns.json").is_file():
        raise SystemExit(
            f"error: {folder} has no columns.json; `python bench.py --config ... --agent expert` makes runs/<name>/bench/expert-104"
        )
    found = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
    grades = {
        g["id"]: g
        for g in each_line(
            folder / ("grades.jsonl" if found["files"] else "grades-from-records.jsonl")
        )
    }
    played = {
        t["task"]["id"]: {**t, "own": own_score(g, found["grader"]), "s_rate": g["s_rate"]}
        for t in each_line(folder / "trajectories.jsonl")
        if (g := grades.get(t["task"]["id"]))
    }.values()
    if not played:
        raise SystemExit(
            f"error: {folder} holds no trajectory with a grade; remove it and run the bench again"
        )
    order = sorted(
        played,
        key=lambda t: [
            min(known([score]), default=1.0) for score in (t["own"], t["reward"]["total"])
        ],
    )
    others = range(LOWEST, len(order))
    some = order[:LOWEST] + [
        order[i]
        for i in sorted(
            seeded_rng(config.seed, "report").sample(others, min(len(others), most - LOWEST))
        )
    ]
    names = dict.fromkeys(
        [*load_scenarios("en")["scenarios"], *(t["task"]["scenario"] for t in played)]
    )
    of = {name: [t for t in played if t["task"]["scenario"] == name] for name in names}
    write_atomic(
        folder / "report.html",
        fill_template(
            "templates/report.jinja",
            found=found,
            config=config,
            paper=read_paper(),
            cards=cards_of(some, config),
            n=len(played),
            calls=sum(len(t["calls"]) for t in played),
            rewards={
                part: figures_of([t["reward"][part] for t in played])
                for part in ("total", "plan", "fine", *PARTS)
            },
            failures=failures_of(played),
            spent={k: figures_of([t[k] for t in played]) for k in ("virtual_s", "price_usd")},
            scenarios=[
                (
                    name,
                    len(ts),
                    figures_of([t["own"] for t in ts]),
                    figures_of([t["s_rate"] for t in ts]),
                )
                for name, ts in of.items()
            ],
        ),
    )
    print(
        f"{folder / 'report.html'}: {(folder / 'report.html').stat().st_size / 1e6:.1f} MB, {len(some)} of {len(played)} trajectories as cards"
    )


def pages(command, arguments):
    """`bench.py report FOLDER [--most N]` and `bench.py demo FILE.jsonl [ID]`, under the config of the run that the folder or file lies in."""
    parser = argparse.ArgumentParser(prog=f"bench.py {command}")
    parser.add_argument(
        "path",
        type=Path,
        help="runs/<name>/bench/<agent>-<subset>"
        if command == "report"
        else "a JSONL file of trajectories",
    )
    more = {
        "report": (
            "--most",
            {"type": int, "default": 60, "help": "most trajectories shown (default: %(default)s)"},
        ),
        "demo": (
            "id",
            {"nargs": "?", "help": "task.id of the trajectory (default: the first one's)"},
        ),
    }[command]
    parser.add_argument(more[0], **more[1])
    given = parser.parse_args(arguments)
    config = next(
        (
            load_config(p / "config.yaml")
            for p in given.path.resolve().parents
            if (p / "config.yaml").is_file()
        ),
        Config(),
    )
    if command == "report":
        return report(given.path, config, given.most)
    chosen = next(
        (t for t in each_line(given.path) if "calls" in t and given.id in (None, t["task"]["id"])),
        None,
    )
    if chosen is None:
        raise SystemExit(
            f"error: {given.path} has no trajectory{f' {given.id!r}; its id stands at task.id' if given.id else '; a task is none yet'}"
        )
    write_atomic(
        given.path.with_name("demo.html"),
        fill_template("templates/demo.jinja", card=cards_of([chosen], config)[0]),
    )
    print(f"{given.path.with_name('demo.html')}: {chosen['task']['id']}")


CLIPS, CLIP_S, CLIP_PX, SHOTS = (
    24,
    120,
    240,
    24,
)  # of a page: films that play, their most seconds and pixels a side, pictures a film: below 25 MB


def known(values):
    """Those that are numbers: None is not graded, NaN a judge that failed."""
    return [v for v in values if v is not None and v == v]


def figures_of(values):
    """{"n", "mean", "total", "most"} of the known values; None if there are none."""
    values = known(values)
    return (
        {
            "n": len(values),
            "mean": statistics.mean(values),
            "total": sum(values),
            "most": max(values),
        }
        if values
        else None
    )


def plan_graph(plan):
    """A plan as a drawing: its steps with column (one right of all that they come after) and row, and arrows between indices of steps.

    >>> g = plan_graph([{"id": 1, "tool": "llm", "after": []}, {"id": 2, "tool": "llm", "after": [1]}, {"id": 3, "tool": "llm", "after": [1, 9]}])
    >>> [(s["column"], s["row"]) for s in g["steps"]], g["arrows"]
    ([(0, 0), (1, 0), (1, 1)], [(0, 1), (0, 2)])
    """
    steps, arrows, place, rows = [], [], {}, Counter()
    for i, step in enumerate(plan):
        before = sorted({place[k] for k in step["after"] if k in place})
        column = max((steps[b]["column"] + 1 for b in before), default=0)
        steps.append({**step, "column": column, "row": rows[column], "makes": makes(step["tool"])})
        arrows += [(b, i) for b in before]
        rows[column] += 1
        place[step["id"]] = i
    return {
        "steps": steps,
        "arrows": arrows,
        "columns": len(rows),
        "rows": max(rows.values(), default=0),
    }


def turns_of(t):
    """A trajectory's turns: what parse_utpc reads in each, the text where that has faults, and the calls with arguments, reply and repair."""
    lost, replies = (
        {id(c) for c in unrepaired(t["calls"])},
        [m["content"] for m in t["messages"] if m["role"] == "tool"],
    )
    calls = [
        {
            **c,
            "number": n,
            "reply": reply,
            "lost": id(c) in lost,
            "written": [
                (k, v if isinstance(v, str) else to_json(v))
                for k, v in (c["arguments"] or {}).items()
            ],
        }
        for n, (c, reply) in enumerate(zip(t["calls"], replies, strict=True), 1)
    ]
    said = [m["content"] for m in t["messages"] if m["role"] == "assistant"]
    return [
        {
            **u,
            "text": text if u["faults"] else "",
            "calls": [c for c in calls if c["turn"] == n],
            "plan": u["plan"] and plan_graph(u["plan"]),
        }
        for n, text in enumerate(said, 1)
        for u in [parse_utpc(text)]
    ]


def small_clip(film):
    """A film with the same frames, cuts and sound, CLIP_PX pixels a side at most, as a data URI."""
    scale = min(1, CLIP_PX / max(film["width"], film["height"])) / 2
    sides = {
        k: 2 * max(1, round(film[k] * scale)) for k in ("width", "height")
    }  # even, since browsers may not play 4:4:4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        materialize({**film, **sides}, path)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def cards_of(trajectories, config):
    """What a page shows of each trajectory. The first CLIPS films up to CLIP_S seconds play; the others are storyboards alone."""
    cards, left = [], CLIPS
    for t in tqdm(trajectories, desc="cards", unit="card", mininterval=1):
        shown = [
            {
                **a,
                "pictures": [
                    thumbnail(a, i) for i in range(min(SHOTS, a["shots"] or 1)) if a["width"]
                ],
            }
            for a in deliverables(t)
        ]
        for a in [a for a in shown if a["kind"] == "video" and a["duration_s"] <= CLIP_S][:left]:
            a["clip"], left = small_clip(a), left - 1
        reward = t["reward"] or ltr_reward(t, config.reward, t.get("pool"), config.llm)
        cards.append(
            {
                **t,
                "turns": turns_of(t),
                "graph": plan_graph(t["plan"] or []),
                "shown": shown,
                "reward": reward,
                "rows": explain(t, reward, config.reward),
            }
        )
    return cards


def failures_of(trajectories):
    """Why episodes fall short: {"ended": {how: n}, "codes": {code: [failed calls, repaired]}, "checks": {check: [n below 1, n, mean]}}."""
    codes, repaired, checks = Counter(), Counter(), {}
    for t in trajectories:
        lost = {id(c) for c in unrepaired(t["calls"])}
        codes.update(c["error"]["code"] for c in t["calls"] if c["error"])
        repaired.update(c["error"]["code"] for c in t["calls"] if c["error"] and id(c) not in lost)
        for name, score in t["reward"]["checks"].items():
            checks.setdefault(name, []).extend(known([score]))
    return {
        "ended": Counter(t["ended"] for t in trajectories),
        "codes": {code: [n, repaired[code]] for code, n in codes.items()},
        "checks": {
            name: [sum(v < 1 for v in scores), len(scores), statistics.mean(scores)]
            for name, scores in checks.items()
            if scores
        },
    }
