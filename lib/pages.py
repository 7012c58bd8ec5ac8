"""A run's pages: report.html of a bench folder, demo.html of trajectories (Fig. 12), index.html.

A card shows a trajectory: each turn and call, the plan as a graph, films that play. Whatever an
agent wrote is escaped by the templates; pages stand alone and ask for nothing else.
"""

import argparse
import base64
import json
import math
import statistics
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from env import parse_utpc
from lib.cards import with_cards
from lib.experiment import Config, load_config
from lib.lineage import deliverables
from lib.media import materialize, thumbnail
from lib.runs import ROOT, each_line, seeded_rng, write_atomic
from lib.scenarios import load_scenarios
from lib.tables import OBJECTIVE, grades_name, own_score, paired, read_paper
from lib.text import fill_template, to_json
from lib.toolbox import makes
from rewards import PARTS, explain, ltr_reward, unrepaired

LOWEST = 10  # trajectories that a report always shows
# What keeps a page below 25 MB: films that play, their most seconds and pixels a side, and pictures
# of one film.
CLIPS = 24
CLIP_S = 120
CLIP_PX = 360
SHOTS = 24
# Trajectories that a demo shows of a file. Ours.
DEMOS = 5
# What the index says of a page, by the first word of its name.
PAGES = {
    "episodes": "the best, the median and the worst held-out episode after VRL",
    "step": "one step of VRL: rollouts, advantages, what was pushed up and down",
    "report": "VisGenBench: columns, failures, films",
    "demo": "trajectories, with their films",
    "sheet": "the scoring sheet",
    "review": "candidates of the data for a human to review",
    "trajectories": "rewards taken apart",
    "trajectory": "the same episodes as text",
    "statistics": "the data's figures",
}


# ---------------------------------------------------------------------------- the commands
def report_command(arguments: list[str]) -> None:
    """`bench.py report FOLDER [--most N]`, under the config of the run that the folder lies in."""
    parser = argparse.ArgumentParser(prog="bench.py report")
    parser.add_argument("path", type=Path, help="runs/<name>/bench/<agent>-<subset>")
    parser.add_argument(
        "--most", type=int, default=60, help="most trajectories shown (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    report(given.path, config_of(given.path), given.most)
    refresh_index(given.path)


def demo_command(arguments: list[str]) -> None:
    """`bench.py demo [FILE.jsonl [ID]]`: write demo.html beside the file, with the trajectory of
    that id, or the first DEMOS; without a file those of data/example.jsonl.

    Under the config of the run that the file lies in. SystemExit: no such trajectory.
    """
    parser = argparse.ArgumentParser(prog="bench.py demo")
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        default=ROOT / "data" / "example.jsonl",
        help="a JSONL file of trajectories (default: data/example.jsonl)",
    )
    parser.add_argument(
        "id", nargs="?", help=f"task.id of the trajectory (default: the first {DEMOS} of the file)"
    )
    given = parser.parse_args(arguments)
    config = config_of(given.path)
    chosen = []
    for record in each_line(given.path):
        # A task has no calls yet.
        if "calls" in record and given.id in (None, record["task"]["id"]):
            chosen.append(record)
        if len(chosen) == (1 if given.id else DEMOS):
            break
    if not chosen:
        lacking = "; a task is none yet"
        if given.id:
            lacking = f" {given.id!r}; its id stands at task.id"
        raise SystemExit(f"error: {given.path} has no trajectory{lacking}")
    target = given.path.with_name("demo.html")
    write_atomic(target, fill_template("templates/demo.jinja", cards=cards_of(chosen, config)))
    print(f"{target}: {', '.join(record['task']['id'] for record in chosen)}")
    refresh_index(given.path)


def run_of(path: Path) -> Path | None:
    """The folder of the run that a file or folder lies in; None outside a run."""
    for parent in path.resolve().parents:
        if (parent / "config.yaml").is_file():
            return parent
    return None


def config_of(path: Path) -> Config:
    """The config of the run that a file or folder lies in; the defaults outside a run."""
    run = run_of(path)
    return load_config(run / "config.yaml") if run else Config()


# ---------------------------------------------------------------------------- the run's index
def refresh_index(path: Path) -> None:
    """Write the index of the run that a file or folder lies in anew; nothing outside a run."""
    if run := run_of(path):
        write_index(run)


def write_index(run: Path) -> Path:
    """Write index.html of a run's folder, of what is there: the curve, the tables, and a link to
    each of its pages. Returns its path."""
    config = config_of(run / "index.html")
    before, after = (read_json(run / "vrl" / f"{name}.json") for name in ("before", "after"))
    if after:
        write_episodes(run, after["examples"], config)
    curve = run / "curve.png"
    picture = base64.b64encode(curve.read_bytes()).decode() if curve.is_file() else ""
    heads = sorted((run / "bench").glob("*/columns.json"))
    pages = [path.relative_to(run) for path in run.rglob("*.html") if path.name != "index.html"]
    others = [Path(name) for name in ("trajectory.txt", "data/statistics.png")]
    links = sorted(pages, key=page_order) + [path for path in others if (run / path).is_file()]
    page = fill_template(
        "templates/index.jinja",
        config=config,
        curve=picture and f"data:image/png;base64,{picture}",
        held_out=before_after(before, after) if after else [],
        n=len(after["tasks"]) if after else 0,
        policies=read_json(run / "bench" / "results.json"),
        benches=[(head.parent.name, read_json(head)) for head in heads],
        links=[(path.as_posix(), PAGES.get(path.stem.split("-")[0])) for path in links],
    )
    write_atomic(run / "index.html", page)
    return run / "index.html"


def page_order(path: Path) -> tuple:
    """Pages of the run itself first; step-2 before step-10."""
    number = path.stem.split("-")[-1]
    return len(path.parts), path.parent, len(number) * number.isdecimal(), path.name


def read_json(path: Path) -> dict:
    """A JSON file's object; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_episodes(run: Path, examples: dict[str, dict], config: Config) -> None:
    """episodes.html: the best, the median and the worst held-out episode after VRL.

    `examples`: {label: trajectory} of vrl/after.json; the page is kept while it is the newer one.
    """
    target = run / "episodes.html"
    measured = run / "vrl" / "after.json"
    if target.is_file() and target.stat().st_mtime > measured.stat().st_mtime:
        return
    chosen = [{**t, "lesson": f"{label} held-out episodes"} for label, t in examples.items()]
    if chosen:
        write_atomic(target, fill_template("templates/demo.jinja", cards=cards_of(chosen, config)))


def before_after(before: dict, after: dict) -> list[tuple]:
    """[(label, mean before, mean after, interval of the difference where tasks tell it)], greedy.

    before, after: VRL's evaluations, vrl/before.json and vrl/after.json.
    """
    later = {record["id"]: record for record in after["tasks"]}
    rows = []
    for name in ("reward", "strict", "plan", "fine", *PARTS):
        known = [(r.get(name), later[r["id"]].get(name)) for r in before["tasks"]]
        pairs = [pair for pair in known if None not in pair]
        label = {"reward": "R_vrt", "strict": "R_vrt > 0.99"}.get(name, f"R_{name}")
        difference = paired(*zip(*pairs)) if len(pairs) > 1 else None
        rows.append((label, before["greedy"][name], after["greedy"][name], difference))
    return rows


# ---------------------------------------------------------------------------- the report
def report(folder: Path, config: Config, most: int) -> None:
    """Write report.html of a bench folder, with `most` cards. SystemExit: nothing to report."""
    if most < LOWEST:
        raise SystemExit(
            f"error: --most is {most}; at least {LOWEST}, since the {LOWEST} lowest are always "
            "shown"
        )
    if not (folder / "columns.json").is_file():
        raise SystemExit(
            f"error: {folder} has no columns.json; `python bench.py --config ... --agent expert` "
            "makes runs/<name>/bench/expert-104"
        )
    head = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
    played = graded_trajectories(folder, head)
    if not played:
        raise SystemExit(
            f"error: {folder} holds no trajectory with a grade; remove it and run the bench again"
        )
    shown = lowest_and_others(played, most, config.seed)
    parts = ("total", "plan", "fine", *PARTS)
    page = fill_template(
        "templates/report.jinja",
        found=head,
        config=config,
        paper=read_paper(),
        objective=("s_rate", *OBJECTIVE),
        seen=head["grader"] != "structural" and not any(t["stand_ins"] for t in played),
        cards=cards_of(shown, config),
        n=len(played),
        calls=sum(len(t["calls"]) for t in played),
        rewards={part: figures_of([t["reward"][part] for t in played]) for part in parts},
        failures=failures_of(played),
        spent={name: figures_of([t[name] for t in played]) for name in ("virtual_s", "price_usd")},
        scenarios=by_scenario(played),
    )
    target = folder / "report.html"
    write_atomic(target, page)
    size = target.stat().st_size / 1e6
    print(f"{target}: {size:.1f} MB, {len(shown)} of {len(played)} trajectories as cards")


def graded_trajectories(folder: Path, head: dict) -> list[dict]:
    """The folder's trajectories that have a grade, each with `own` column's score, `s_rate` and how
    many `stand_ins` a VLM was shown."""
    grades = {g["id"]: g for g in each_line(folder / grades_name(head["files"]))}
    found = {}
    for t in each_line(folder / "trajectories.jsonl"):
        task_id = t["task"]["id"]
        if grade := grades.get(task_id):
            found[task_id] = {
                **t,
                "own": own_score(grade, head["grader"]),
                "s_rate": grade["s_rate"],
                "stand_ins": grade.get("media", 0) - grade.get("real", 0),
            }
    return list(found.values())


def lowest_and_others(played: list[dict], most: int, seed: int) -> list[dict]:
    """The LOWEST trajectories by own column's score, then R_vrt, and others by seed, `most` in all.

    In the order of their scores, the lowest first; what has no score counts as 1.
    """

    def key(t):
        return [1.0 if is_unknown(score) else score for score in (t["own"], t["reward"]["total"])]

    order = sorted(played, key=key)
    others = range(LOWEST, len(order))
    rng = seeded_rng(seed, "report")
    picked = sorted(rng.sample(others, min(len(others), most - LOWEST)))
    return order[:LOWEST] + [order[i] for i in picked]


def by_scenario(played: list[dict]) -> list[tuple]:
    """[(scenario, tasks, figures of the own column, figures of S-Rate)], Table 8's names first."""
    names = [*load_scenarios("en")["scenarios"], *(t["task"]["scenario"] for t in played)]
    found = []
    for name in dict.fromkeys(names):
        some = [t for t in played if t["task"]["scenario"] == name]
        own = figures_of([t["own"] for t in some])
        found.append((name, len(some), own, figures_of([t["s_rate"] for t in some])))
    return found


def is_unknown(value: float | None) -> bool:
    """Whether a score is missing: None is not graded, NaN a judge that failed."""
    return value is None or math.isnan(value)


def figures_of(values: list) -> dict | None:
    """{"n", "mean", "total", "most"} of the known values; None if there are none."""
    known = [v for v in values if not is_unknown(v)]
    if not known:
        return None
    return {
        "n": len(known),
        "mean": statistics.mean(known),
        "total": sum(known),
        "most": max(known),
    }


def failures_of(trajectories: list[dict]) -> dict:
    """Why episodes fall short: {"ended", "codes", "checks"}.

    ended: {how: n}; codes: {error code: [failed calls, repaired ones]}; checks: {a reward's check:
    [n below 1, n, mean]}.
    """
    failed, repaired, checks = Counter(), Counter(), {}
    for t in trajectories:
        lost = {id(call) for call in unrepaired(t["calls"])}
        for call in t["calls"]:
            if not call["error"]:
                continue
            failed[call["error"]["code"]] += 1
            repaired[call["error"]["code"]] += id(call) not in lost
        for name, score in t["reward"]["checks"].items():
            known = checks.setdefault(name, [])
            if not is_unknown(score):
                known.append(score)
    return {
        "ended": Counter(t["ended"] for t in trajectories),
        "codes": {code: [n, repaired[code]] for code, n in failed.items()},
        "checks": {
            name: [sum(score < 1 for score in scores), len(scores), statistics.mean(scores)]
            for name, scores in checks.items()
            if scores
        },
    }


# ---------------------------------------------------------------------------- cards
def cards_of(trajectories: list[dict], config: Config) -> list[dict]:
    """What a page shows of each trajectory.

    The first CLIPS films of up to CLIP_S seconds play; the others are storyboards alone.
    """
    cards, clips_left = [], CLIPS
    few = len(trajectories) <= DEMOS
    for t in tqdm(trajectories, desc="cards", unit="card", mininterval=1, disable=few):
        shown = []
        for a in (with_cards(a, t) for a in deliverables(t)):
            shots = range(min(SHOTS, a["shots"] or 1))
            pictures = [thumbnail(a, shot) for shot in shots if a["width"]]
            shown.append({**a, "pictures": pictures})
        for a in shown:
            if a["kind"] == "video" and a["duration_s"] <= CLIP_S and clips_left:
                a["clip"] = small_clip(a)
                clips_left -= 1
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


def small_clip(film: dict) -> str:
    """A film with the same frames, cuts and sound, at most CLIP_PX pixels a side, as a data URI."""
    scale = min(1, CLIP_PX / max(film["width"], film["height"])) / 2
    # Even sides, since browsers may not play 4:4:4.
    sides = {side: 2 * max(1, round(film[side] * scale)) for side in ("width", "height")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        materialize({**film, **sides}, path)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def turns_of(trajectory: dict) -> list[dict]:
    """A trajectory's turns: what parse_utpc reads in each, with `text`, `calls` and `plan`.

    text: as written, where it has faults. calls: with arguments, reply, and whether the call was
    `lost`, that is failed and not repaired. plan: as plan_graph has it.
    """
    lost = {id(call) for call in unrepaired(trajectory["calls"])}
    replies = [m["content"] for m in trajectory["messages"] if m["role"] == "tool"]
    calls = []
    for n, (call, reply) in enumerate(zip(trajectory["calls"], replies, strict=True), 1):
        written = [
            (name, value if isinstance(value, str) else to_json(value))
            for name, value in (call["arguments"] or {}).items()
        ]
        more = {"number": n, "reply": reply, "lost": id(call) in lost, "written": written}
        calls.append({**call, **more})
    texts = [m["content"] for m in trajectory["messages"] if m["role"] == "assistant"]
    turns = []
    for n, text in enumerate(texts, 1):
        turn = parse_utpc(text)
        turns.append(
            {
                **turn,
                "text": text if turn["faults"] else "",
                "calls": [call for call in calls if call["turn"] == n],
                "plan": turn["plan"] and plan_graph(turn["plan"]),
            }
        )
    return turns


def plan_graph(plan: list[dict]) -> dict:
    """A plan as a drawing: its steps with column and row, and arrows between indices of steps.

    A step's column is one right of all that it comes after.

    >>> steps = [{"id": 1, "after": []}, {"id": 2, "after": [1]}, {"id": 3, "after": [1, 9]}]
    >>> g = plan_graph([{"tool": "llm", **step} for step in steps])
    >>> [(s["column"], s["row"]) for s in g["steps"]], g["arrows"]
    ([(0, 0), (1, 0), (1, 1)], [(0, 1), (0, 2)])
    """
    steps, arrows, rows = [], [], Counter()
    # {a step's id: its index in `steps`}; what names a later or unknown step is left out.
    place = {}
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
