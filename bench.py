"""VisGenBench (Sec. 5): play it, measure and grade it, set it beside the paper; and the policies of a run on held-out tasks.

    python bench.py --config configs/tiny.yaml                          # untrained, PST, PST + VRL of runs/tiny on its held-out tasks
    python bench.py --table runs/tiny runs/tiny-1 runs/tiny-2           # mean and spread over runs that are measured
    python bench.py --config configs/tiny.yaml --agent policy           # VisGenBench-104; --subset, --no-files, --sampled
    python bench.py report runs/tiny/bench/policy-104                   # report.html: columns, failures, trajectories with films that play
    python bench.py demo runs/tiny/vrl/rollouts/step-1.jsonl [ID]       # demo.html: one trajectory (Fig. 12)
    python bench.py tables FOLDER ...                                   # the paper's tables with rows of ours, runs/<name>/bench/<agent>-<subset>
    python bench.py compare FOLDER_A FOLDER_B                           # paired tests on the same tasks; several seeds: A0,A1,A2 B0,B1,B2
    python bench.py ablate configs/ablations/ --seeds 3 --jobs 2        # Table 4's rows; without a folder: what data/ablations.json holds
    python bench.py controls FOLDER --set bench.llm.url=...             # does the VLM-Grader look at the media? shuffled, grey, again
    python bench.py sheet FOLDER [FOLDER ...]                           # a blind sheet for people to score on, HTML and CSV
    python bench.py calibrate scores.csv [FOLDER ...]                   # the VLM-Grader's scores against people's; human scores.csv: Tables 3, 5, 6
    python bench.py media [FOLDER]                                      # draw the media database, data/media/, or add your own files to it
"""

import argparse
import base64
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml
from tqdm import tqdm

from configs.experiment import (ROOT, Config, append_jsonl, command_line, cut_tail, digest, draw, each_line, load_config, open_run, read_jsonl,
                                write_atomic, write_jsonl)
from configs.llm import Endpoint, ask, bill, run_jobs
from data.cards import cards_of, failures_of, figures_of, known
from data.figures import BENCH
from data.general import load_scenarios
from data.human import calibrate, calibrated_grades, export_sheet, human_tables
from data.media import SUFFIXES, data_uri, from_tool, materialize, media, moments, probe, real_file, stills
from data.paper import FIGURES, head_line, paired, print_ablations, print_tables, read_paper, row_config
from env import page, to_json
from make_data import make_trajectories
from rewards import PARTS, consistency_reward, deliverables, on_topic, read_media, words

# ---------------------------------------------------------------------------- measuring policies


def stages_of(config, run):
    """{name: where its weights stand} of what the run has: untrained, pst, vrl (the last checkpoint)."""
    from configs.checkpoints import list_checkpoints

    final, saved = ROOT / config.pst.init_from if config.pst.init_from else run / "pst" / "final", list_checkpoints(run / "vrl")
    return {"untrained": None, **({"pst": final} if final.is_dir() else {}), **({"vrl": saved[-1]} if saved else {})}


def load_stage(config, run, name, device, tokenizer):
    """The policy of a run as one of stages_of has it, in fp32 and frozen."""
    from configs.checkpoints import read_checkpoint, restore
    from train_pst import add_lora, base_policy, load_policy
    from train_vrl import sync_sampler

    stages = stages_of(config, run)
    from_base = name == "untrained" or (name == "vrl" and config.vrl.start == "base")
    start = partial(base_policy, config, run, tokenizer, device) if from_base else partial(load_policy, stages["pst"], config, tokenizer, device)
    model = start().float()
    if name == "vrl":
        policy = add_lora(config, start(), norm=config.vrl.norm_lr > 0) if config.vrl.tune == "lora" else model
        restore(policy, [], *read_checkpoint(config, stages["vrl"]))
        sync_sampler(model, policy)
    return model.eval().requires_grad_(False)


def measure(config, run):
    """Evaluate each policy that the run has; a policy measured before is not measured again. Returns {policy: figures}."""
    from train_pst import load_tokenizer, set_up
    from train_vrl import evaluate

    path, stages = run / "bench" / "results.json", stages_of(config, run)
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    device, tokenizer = set_up(config), load_tokenizer(config, run)
    tasks = read_jsonl(run / "data" / "heldout.jsonl")[: config.bench.tasks]
    print(f"bench: {len(tasks)} held-out tasks, each policy about a minute")
    for name in ("untrained", "pst", "vrl"):
        origin = stages["vrl"].name if name == "vrl" and "vrl" in stages else name
        if name not in stages or name in results and (results[name]["n"], results[name]["from"]) == (len(tasks), origin):
            print(f"  {name}: {'measured before' if name in stages else 'not trained in this run'}")
            continue
        figures, _ = evaluate(load_stage(config, run, name, device, tokenizer), tokenizer, tasks, config, run, name)
        results[name] = {**figures, "n": len(tasks), "seed": config.seed, "from": origin}
        write_atomic(path, to_json(results))
    return results


def rows_of(figures):
    """The table's rows of one policy: (label, value)."""
    for mode in ("greedy", "sampled"):
        if mode in figures:
            yield f"{mode}  R_vrt", figures[mode]["reward"]
            yield f"{mode}  R_vrt > 0.99", figures[mode]["strict"]
            for part in ("plan", "fine", *PARTS):
                yield f"{mode}  R_{part}", figures[mode][part]
    for kind, share in figures["general"].items():
        yield f"exact match  {kind}", share


def print_table(many):
    """Print mean and, over several runs, the spread (sample standard deviation). `many`: a results dict a run."""
    names = [n for n in ("untrained", "pst", "vrl") if all(n in r for r in many)]
    n = {r[name]["n"] for r in many for name in names}
    print(f"\n{len(many)} run(s), seeds {sorted({r[names[0]]['seed'] for r in many})}, n = {', '.join(map(str, sorted(n)))} held-out tasks; "
          "judge: rules; environment: VisGenEnv" + ("; mean +- standard deviation over runs" if len(many) > 1 else ""))
    print(f"{'':26}" + "".join(f"{name:>18}" for name in names))
    for i, (label, _) in enumerate(rows_of(many[0][names[0]])):
        cells = []
        for name in names:
            values = [v for r in many if (v := list(rows_of(r[name]))[i][1]) is not None]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        print(f"{label:26}" + "".join(f"{c:>18}" for c in cells))


# ---------------------------------------------------------------------------- VisGenBench (Sec. 5.1): act, measure on files, grade

SUBJECTIVE = ("creative", "match", "object", "scene", "style", "variety")
OBJECTIVE = ("amount", "duration", "storyboard")
COLUMNS = (*SUBJECTIVE, *OBJECTIVE, "s_rate")      # the order of the paper's tables
QUICKEST = {"image": ".jpg", "video": ".mov", "audio": ".wav"}      # to write and to probe: PNG takes four times as long as JPEG, and AAC longer than PCM


def bench_tasks(subset, run):
    """VisGenBench's tasks: all 1200, its stratified 104, N of them evenly spread, or a run's held-out tasks (`heldout`)."""
    if subset == "heldout":
        return read_jsonl(run / "data" / "heldout.jsonl")
    tasks = list(each_line(BENCH))
    if subset == "104":
        return [t for t in tasks if t["in_104"]]
    if not subset.isdecimal() or not 1 <= int(subset) <= len(tasks):
        raise SystemExit(f"error: --subset is {subset!r}; it must be 104, heldout or a number from 1 to {len(tasks)}")
    return [tasks[i * len(tasks) // int(subset)] for i in range(int(subset))]


def policy_of(config, run, folder):
    """Whose trajectories `folder` holds: the last policy of the run, such as "runs/tiny/vrl/step-60". SystemExit: none, or another one played there."""
    name, where = list(stages_of(config, run).items())[-1]
    if name == "untrained":
        raise SystemExit(f"error: {run.relative_to(ROOT)} has no trained policy; `python train_vrl.py --config ...` trains one")
    where, kept = os.path.relpath(where, ROOT), folder / "policy.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["policy"] if kept.is_file() else "a policy that is not known"
    if (folder / "trajectories.jsonl").is_file() and before != where:
        raise SystemExit(f"error: {folder} holds what {before} played, and the run's policy is {where} now; remove that folder, or move it away")
    write_atomic(kept, to_json({"policy": where}))
    done = name == "vrl" and where.endswith(f"/step-{config.vrl.steps}")
    print(f"policy: {where}" + ("" if done else f"; VRL has not ended (vrl.steps is {config.vrl.steps})" if name == "vrl" else ", before VRL"))
    return where


def act(agent, tasks, config, run, folder, temperature=0.0):
    """Every task played once by the agent, in VisGenEnv: trajectories.jsonl in `folder`, appended as they come, so a stopped run goes on."""
    path = folder / "trajectories.jsonl"
    if agent != "policy":
        write_jsonl(folder / "queries.jsonl", tasks)
        make_trajectories(replace(config, data=replace(config.data, agent="openai" if agent == "openai" else "scripted")), folder)
    else:
        from train_pst import load_tokenizer, set_up
        from train_vrl import sample_rollouts, score

        cut_tail(path)
        made = {t["task"]["id"] for t in each_line(path)} if path.is_file() else set()
        left, device, tokenizer = [t for t in tasks if t["id"] not in made], set_up(config), load_tokenizer(config, run)
        model = load_stage(config, run, list(stages_of(config, run))[-1], device, tokenizer) if left else None
        for at in range(0, len(left), config.bench.chunk):
            rollouts = sample_rollouts(model, tokenizer, left[at:at + config.bench.chunk], config, temperature, seed=config.seed,
                                       progress=f"from task {at}")
            score(rollouts, config)
            append_jsonl(path, [r.trajectory for r in rollouts])
    found = {t["task"]["id"]: t for t in each_line(path)}
    return [found[t["id"]] for t in tasks if t["id"] in found]


def measure_files(trajectory):
    """What the answer hands over, written as files and probed: {id: what probe saw}, and in words where file and record disagree.

    The simulator's books are not believed: sizes, frames, seconds and cuts are counted on the decoded pixels. A disagreement is a fault of ours. The
    file that a real tool made is probed as it is; one that cannot be decoded is a fault as well.
    """
    seen, faults = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for a in (a for a in deliverables(trajectory) if a["kind"] in SUFFIXES):
            path = Path(folder) / f"{a['id']}{QUICKEST[a['kind']]}"
            if from_tool(a):
                path = real_file(a)
            else:
                materialize(a, path)
            try:
                found = seen[a["id"]] = probe(path)
            except (ValueError, OSError) as e:
                faults.append(f"{trajectory['task']['id']}: {a['id']} cannot be decoded from {path.name}, so it counts as not handed over: {e}")
                continue
            booked = {**{k: a[k] for k in ("kind", "width", "height", "n_frames", "has_audio")}, "cuts": a["shots"] and a["shots"] - 1}
            faults += [f"{trajectory['task']['id']}: {a['id']} has {k} {found[k]} in its file and {v} in its record" for k, v in booked.items()
                       if found[k] is not None and v is not None and found[k] != v]
            if a["duration_s"] and found["duration_s"] and abs(a["duration_s"] - found["duration_s"]) > 0.03:
                faults.append(f"{trajectory['task']['id']}: {a['id']} lasts {found['duration_s']} s in its file and {a['duration_s']} s in its record")
    return seen, faults


def booked_files(trajectory):
    """measure_files from the simulator's records alone (--no-files): much faster, and no evidence."""
    return {a["id"]: {**{k: a[k] for k in ("kind", "width", "height", "n_frames", "duration_s", "has_audio")}, "cuts": a["shots"] and a["shots"] - 1}
            for a in deliverables(trajectory) if a["kind"] in SUFFIXES}, []


def objective_scores(task, files, config):
    """S-Rate and the objective columns of one task from its measured files; None where the request states no such thing (grades ours).

    s_rate: a picture (or film) was delivered where one was asked for. amount: as many as asked, 1 or 0. duration: 1 within the tolerance, else 1 less the
    relative error, at least 0, the mean over films; the paper's column is real-valued too. storyboard: as many shots, counted by cuts, 1 or 0, the mean.

    >>> from rewards import RewardConfig
    >>> task = {"modality": "video", "constraints": {"images": 0, "videos": 1, "duration_s": 10, "shots": 2}}
    >>> objective_scores(task, {"vid_1": {"kind": "video", "duration_s": 8.0, "cuts": 1}}, RewardConfig())
    {'s_rate': 1.0, 'amount': 1.0, 'duration': 0.8, 'storyboard': 1.0}
    """
    c, right = task["constraints"], [f for f in files.values() if f["kind"] == task["modality"]]
    close = lambda f: abs(f["duration_s"] - c["duration_s"]) / c["duration_s"]      # noqa: E731
    graded = [1.0 if close(f) <= config.duration_tolerance else max(0.0, 1.0 - close(f)) for f in right] if c["duration_s"] else []
    return {"s_rate": float(bool(right)), "amount": float(len(right) == c["images"] + c["videos"]),
            "duration": (sum(graded) / max(1, len(graded)) if c["duration_s"] else None),
            "storyboard": (sum(f["cuts"] + 1 == c["shots"] for f in right) / max(1, len(right)) if c["shots"] else None)}


def structural_scores(trajectory, config):
    """What records can show of the subjective dimensions, each in [0, 1]: a stand-in for the VLM-Grader under a name of its own (all ours).

    match: share of the subject's words in the prompt behind each delivered picture or clip, the worst one; object, scene: made from one reference;
    style: the style's words in the prompts, or one reference where the request names no style; variety: share of deliverables that look different by seed and
    prompt, times the share of distinct prompts. creative: None, since no record shows an idea.
    """
    task, media = trajectory["task"], read_media(trajectory)
    c, items = task["constraints"], [a for a in deliverables(trajectory) if a["kind"] == task["modality"]]
    if not items:
        return dict.fromkeys(SUBJECTIVE, 0.0) | {"creative": None}
    together, _ = consistency_reward(trajectory, media)
    looks = {media.looks[a["id"]] for a in items}
    prompts = {str(media.by_id[part]["arguments"].get("prompt", "")) for a in items for part in media.footage[a["id"]]}
    parts = sum(len(media.footage[a["id"]]) for a in items)
    said = lambda text: min(on_topic(a["id"], media, words(text), config) for a in items)      # noqa: E731
    return {"creative": None, "match": said(c["subject"]), "object": together, "scene": together,
            "style": said(c["style"]) if c["style"] else together, "variety": len(looks) / len(items) * len(prompts) / parts}


def grade(trajectory, config, with_files):
    """One line of grades.jsonl: what the task's columns are made of, from its trajectory."""
    task = trajectory["task"]
    files, faults = (measure_files if with_files else booked_files)(trajectory)
    return {"id": task["id"], "modality": task["modality"], "dimension": task["dimension"], "scenario": task["scenario"], "files": files, "faults": faults,
            **objective_scores(task, files, config.reward), "structural": structural_scores(trajectory, config.reward), "vlm": None}


def grade_all(trajectories, config, folder, with_files):
    """grades.jsonl of `folder`, a line a task in the tasks' order; made on all cores, appended as it comes, and gone on with where it stopped."""
    path = folder / ("grades.jsonl" if with_files else "grades-from-records.jsonl")
    cut_tail(path)
    done = {g["id"]: g for g in each_line(path)} if path.is_file() else {}
    left = [t for t in trajectories if t["task"]["id"] not in done]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(partial(grade, config=config, with_files=with_files), left, chunksize=1 if with_files else 50)
        for g in tqdm(work, total=len(left), desc="files measured" if with_files else "records read", unit="task", mininterval=1, disable=not left):
            append_jsonl(path, [g])
            done[g["id"]] = g
    return [done[t["task"]["id"]] for t in trajectories]


def own_score(g, grader):
    """The score that a grade counts with in its own dimension's column; None if nobody could grade it."""
    return g[g["dimension"]] if g["dimension"] in OBJECTIVE else (g[grader] or {}).get(g["dimension"])


def columns_of(grades, grader="structural", draws=2000):
    """{column: {"mean", "low", "high", "n"}} of the paper's ten columns and their plain mean, O-Score: 95 % bootstrap intervals over tasks.

    A column is the mean over the tasks of its dimension, S-Rate over all tasks. A column that nobody could grade is None, and O-Score is over the others.
    """
    import numpy

    rng, found = numpy.random.default_rng(0), {}
    for column in COLUMNS:
        values = numpy.array([v for g in grades if column in ("s_rate", g["dimension"]) and
                              (v := g["s_rate"] if column == "s_rate" else own_score(g, grader)) is not None], dtype=float)
        if not len(values):
            found[column] = None
            continue
        means = values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1)
        low, high = numpy.quantile(means, (0.025, 0.975))
        found[column] = {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}
    whole = numpy.array(list(per_task(grades, [], grader)["o_score"].values()))      # a task counts in S-Rate and in its own column at once
    low, high = numpy.quantile(whole[rng.integers(len(whole), size=(draws, len(whole)))].mean(axis=1), (0.025, 0.975))
    means = [f["mean"] for f in found.values() if f]
    return {**found, "o_score": {"mean": sum(means) / len(means), "low": float(low), "high": float(high), "n": len(means)}}


def run_bench(config, run, agent, subset, with_files, sampled=False):
    """VisGenBench for one agent: play, measure, grade, print. Returns the folder, runs/<name>/bench/<agent>-<subset>[-sampled]/."""
    folder, began = run / "bench" / (f"{agent}-{subset}" + "-sampled" * sampled), time.time()
    tasks = bench_tasks(subset, run)
    who = {"expert": "scripted", "openai": config.data.llm.model}.get(agent) or policy_of(config, run, folder)
    trajectories = act(agent, tasks, config, run, folder, temperature=float(sampled))
    if not trajectories:
        raise SystemExit(f"error: no task of --subset {subset} was played; the lines above say why")
    played = time.time()
    grades = grade_all(trajectories, config, folder, with_files)
    measured = time.time()
    grades, grader, grading = subjective_grades(trajectories, grades, config, folder / ("grades.jsonl" if with_files else "grades-from-records.jsonl"))
    faults = [f for g in grades for f in g["faults"]]
    decoder = {"expert": "scripted", "openai": f"temperature {config.data.llm.temperature:g}"}.get(agent, "temperature 1" if sampled else "greedy")
    found = {"agent": agent, "who": who, "subset": subset, "tasks": len(tasks), "played": len(trajectories), "seed": config.seed, "files": with_files,
             "grader": grader, **grading, "judge": config.reward.judge, "decoder": decoder, "fidelity": config.rollout.fidelity,
             "columns": columns_of(grades, grader), "faults": faults}
    write_atomic(folder / "columns.json", to_json(found))
    print(f"{agent} on {len(tasks)} tasks, {len(trajectories)} played: {played - began:.0f} s to play, {measured - played:.0f} s to "
          f"{'write files and measure them' if with_files else 'read the records; nothing was measured'}")
    print(f"{len(faults)} disagreements between files and records" + "".join(f"\n  {f}" for f in faults[:10]))
    print(f"the six subjective columns are the {grader} grader's" + (f": {grading['grading']}" if grading["grading"] else ""))
    for column, c in found["columns"].items():
        print(f"  {column:12}" + (f"{c['mean']:.3f}  [{c['low']:.3f}, {c['high']:.3f}]  n = {c['n']}" if c else "not graded"))
    return folder


# ---------------------------------------------------------------------------- pages: the report of a bench folder, the demo of one trajectory

LOWEST = 10      # trajectories that a report always shows


def report(folder, config, most):
    """report.html of a bench folder. Its cards, lowest first: the LOWEST by own column's score, then R_vrt, and others by seed, `most` in all."""
    if most < LOWEST:
        raise SystemExit(f"error: --most is {most}; at least {LOWEST}, since the {LOWEST} lowest are always shown")
    if not (folder / "columns.json").is_file():
        raise SystemExit(f"error: {folder} has no columns.json; `python bench.py --config ... --agent expert` makes runs/<name>/bench/expert-104")
    found = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
    grades = {g["id"]: g for g in each_line(folder / ("grades.jsonl" if found["files"] else "grades-from-records.jsonl"))}
    played = {t["task"]["id"]: {**t, "own": own_score(g, found["grader"]), "s_rate": g["s_rate"]}
              for t in each_line(folder / "trajectories.jsonl") if (g := grades.get(t["task"]["id"]))}.values()
    if not played:
        raise SystemExit(f"error: {folder} holds no trajectory with a grade; remove it and run the bench again")
    order = sorted(played, key=lambda t: [min(known([score]), default=1.0) for score in (t["own"], t["reward"]["total"])])
    others = range(LOWEST, len(order))
    some = order[:LOWEST] + [order[i] for i in sorted(draw(config.seed, "report").sample(others, min(len(others), most - LOWEST)))]
    names = dict.fromkeys([*load_scenarios("en")["scenarios"], *(t["task"]["scenario"] for t in played)])
    of = {name: [t for t in played if t["task"]["scenario"] == name] for name in names}
    write_atomic(folder / "report.html", page(
        "templates/report.jinja", found=found, config=config, paper=read_paper(), cards=cards_of(some, config), n=len(played),
        calls=sum(len(t["calls"]) for t in played),
        rewards={part: figures_of([t["reward"][part] for t in played]) for part in ("total", "plan", "fine", *PARTS)}, failures=failures_of(played),
        spent={k: figures_of([t[k] for t in played]) for k in ("virtual_s", "price_usd")},
        scenarios=[(name, len(ts), figures_of([t["own"] for t in ts]), figures_of([t["s_rate"] for t in ts])) for name, ts in of.items()]))
    print(f"{folder / 'report.html'}: {(folder / 'report.html').stat().st_size / 1e6:.1f} MB, {len(some)} of {len(played)} trajectories as cards")


def pages(command, arguments):
    """`bench.py report FOLDER [--most N]` and `bench.py demo FILE.jsonl [ID]`, under the config of the run that the folder or file lies in."""
    parser = argparse.ArgumentParser(prog=f"bench.py {command}")
    parser.add_argument("path", type=Path, help="runs/<name>/bench/<agent>-<subset>" if command == "report" else "a JSONL file of trajectories")
    more = {"report": ("--most", {"type": int, "default": 60, "help": "most trajectories shown (default: %(default)s)"}),
            "demo": ("id", {"nargs": "?", "help": "task.id of the trajectory (default: the first one's)"})}[command]
    parser.add_argument(more[0], **more[1])
    given = parser.parse_args(arguments)
    config = next((load_config(p / "config.yaml") for p in given.path.resolve().parents if (p / "config.yaml").is_file()), Config())
    if command == "report":
        return report(given.path, config, given.most)
    chosen = next((t for t in each_line(given.path) if "calls" in t and given.id in (None, t["task"]["id"])), None)
    if chosen is None:
        raise SystemExit(f"error: {given.path} has no trajectory{f' {given.id!r}; its id stands at task.id' if given.id else '; a task is none yet'}")
    write_atomic(given.path.with_name("demo.html"), page("templates/demo.jinja", card=cards_of([chosen], config)[0]))
    print(f"{given.path.with_name('demo.html')}: {chosen['task']['id']}")


# ---------------------------------------------------------------------------- the VLM-Grader (Sec. 5.1.2) and its controls; people's scores

ANSWER = {"type": "object", "properties": {"seen": {"type": "string"}, "answer": {"type": "string", "enum": ["yes", "no", "cannot tell"]}},
          "required": ["seen", "answer"], "additionalProperties": False}
GRADER = "prompts/vlm_grader.jinja"
MOST_PICTURES, MOST_FRAMES = 12, 8      # of a request, and of one film


def pictures_of(trajectory):
    """What the VLM-Grader looks at: {"pictures": [(label, JPEG data URI)], "delivered": words, "left_out": how many are not shown, "real": real files}.

    The deliverables of the asked kind, a picture or up to 8 frames a film, at most 12 in all, of up to 768 pixels a side, read from files. An
    artifact whose `media` names a file that is there, by an absolute path, shows that file. Any other shows the simulator's stand-in, drawn without regard to
    the prompt: a VLM's scores of stand-ins, or of the media database's files, test this code and say nothing about an agent, and the report says so.
    """
    kind = trajectory["task"]["modality"]
    items = [a for a in deliverables(trajectory) if a["kind"] == kind]
    found = {"pictures": [], "delivered": [], "left_out": max(0, len(items) - MOST_PICTURES), "real": sum(map(from_tool, items))}
    with tempfile.TemporaryDirectory() as folder:
        for i, a in enumerate(items, 1):
            seconds = f", {a['duration_s']} s" if kind == "video" else ""
            found["delivered"].append(f"{'film' if kind == 'video' else 'picture'} {i}, {a['width']}x{a['height']}{seconds}")
            if i > MOST_PICTURES:
                continue
            path = real_file(a)
            if not path:
                path = Path(folder) / f"{i}{SUFFIXES[kind][0]}"
                materialize({**a, "has_audio": False}, path)
            places = moments(a, min(MOST_FRAMES, MOST_PICTURES // min(len(items), MOST_PICTURES))) if kind == "video" else (0,)
            found["pictures"] += [(f"film {i}, {at:.1f} s" if kind == "video" else f"picture {i}", data_uri(p)) for at, p in stills(path, places)]
    return found


async def grade_one(endpoint, task, shown, again=0):
    """(score, answers) of one task: the share of yes over the rubric's answerable items, and [{"seen", "answer"}] in their order.

    Nothing of the asked kind handed over: (0.0, []), unasked. No reply: (None, None). No item answerable: (None, answers).
    """
    if not shown["pictures"]:
        return 0.0, []
    values = {"request": task["request"], "rubric": task["rubric"], "modality": task["modality"], "delivered": shown["delivered"],
              "left_out": shown["left_out"], "labels": [label for label, _ in shown["pictures"]]}
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
    llm, endpoint = config.bench.llm, Endpoint(config.bench.llm, "bench.llm", "the VLM-Grader", "tasks", Counter())
    by = digest(llm.url, llm.model, llm.temperature, (ROOT / "data" / GRADER).read_text(encoding="utf-8"))
    pairs = [(t, g) for t, g in zip(trajectories, grades) if g["dimension"] in SUBJECTIVE and t["task"].get("rubric")]
    left = [(t, g) for t, g in pairs if g.get("graded_by") != by or g["items"] is None]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, len(left), config.bench.chunk):
            lot = left[at:at + config.bench.chunk]
            shown = list(pool.map(pictures_of, [t for t, _ in lot]))
            found = run_jobs(endpoint, lambda pair: grade_one(endpoint, pair[0]["task"], pair[1]), [(t, s) for (t, _), s in zip(lot, shown)],
                             f"VLM-Grader, from task {at} of {len(left)}")
            for (_, g), (score, items), s in zip(lot, found, shown):
                g.update(vlm=None if score is None else {g["dimension"]: score}, items=items, graded_by=by, media=len(s["delivered"]), real=s["real"])
            write_jsonl(path, grades)
    failed, silent = (sum(g["vlm"] is None and (g["items"] is None) == lost for _, g in pairs) for lost in (True, False))
    real, media = (sum(g[name] for _, g in pairs) for name in ("real", "media"))
    print(f"VLM-Grader: {bill(endpoint)}")
    return (f"VLM-Grader {llm.model}: {len(pairs)} tasks, {failed} failed, {silent} with no answerable item; {real} of {media} "
            "media are a tool's real files" + ("; the others are stand-ins, and their scores mean nothing" if real < media else "")), by


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
    return grades, "vlm, calibrated", {"grading": line, "graded_by": f"{by} {digest(maps.read_text(encoding='utf-8'))}"}


def controls(folders, config, n):
    """Does the VLM-Grader look at the media? For FOLDER (runs/<name>/bench/<agent>-<subset>) it grades a drawn sample (--n tasks, 40 unless told)
    with the right media, with another task's (shuffled), with grey ones (blank), and with the right ones again; writes FOLDER/controls.json. Items on
    how media agree among themselves (object, scene, style, variety) may rightly hold for another task's media; grey ones must fall in every dimension."""
    from PIL import Image

    folder, llm = folders[0], config.bench.llm
    tried = [t for t in read_jsonl(folder / "trajectories.jsonl") if t["task"]["dimension"] in SUBJECTIVE and t["task"].get("rubric")]
    handed = [t for t in tried if any(a["kind"] == t["task"]["modality"] for a in deliverables(t))]
    if not handed:
        raise SystemExit(f"error: {folder / 'trajectories.jsonl'} has no task of a subjective dimension with media handed over: nothing to grade")
    chosen = draw(config.seed, "controls").sample(handed, min(n or 40, len(handed)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shown = list(pool.map(pictures_of, chosen))
    jobs, ring = [], list(zip(chosen, shown)) * 2
    for i, (t, s) in enumerate(zip(chosen, shown)):
        others = [o for u, o in ring[i + 1:i + len(chosen)] if u["task"]["modality"] == t["task"]["modality"]]
        sizes = [(label, Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size) for label, uri in s["pictures"]]
        blank = {**s, "pictures": [(label, data_uri(Image.new("RGB", size, (128, 128, 128)))) for label, size in sizes]}
        jobs += [("right", t, s, 0), ("blank", t, blank, 0), ("again", t, s, 1)] + [("shuffled", t, o, 0) for o in others[:1]]
    endpoint = Endpoint(llm, "bench.llm", "the VLM-Grader", "tasks", Counter())
    found = run_jobs(endpoint, lambda job: grade_one(endpoint, job[1]["task"], *job[2:]), jobs, "controls")
    by = {(job[0], job[1]["task"]["id"]): result for job, result in zip(jobs, found)}
    dimension, report, warnings = {t["task"]["id"]: t["task"]["dimension"] for t in chosen}, {}, []
    for name in ("all", *SUBJECTIVE):
        ids = [i for i in dimension if name in ("all", dimension[i])]
        some = {kind: [by[kind, i][0] for i in ids if by.get((kind, i), (None,))[0] is not None] for kind in ("right", "shuffled", "blank")}
        report[name] = {"n": len(ids)} | {kind: statistics.mean(v) if v else None for kind, v in some.items()}
        if name == "all":
            warnings += [f"no score of {kind} media: requests failed, or no item was answerable" for kind, v in some.items() if not v]
        for kind in ("shuffled", "blank") if some["right"] else ():
            if some[kind] and report[name]["right"] - report[name][kind] < 0.3:
                warnings.append(f"{name}: {kind} media get {report[name][kind]:.2f}, right ones {report[name]['right']:.2f}: not 0.3 lower")
    twice = [(a["answer"], b["answer"]) for i in dimension for a, b in zip(by["right", i][1] or (), by["again", i][1] or ())]
    report["test_retest"] = {"items": len(twice), "same": sum(a == b for a, b in twice) / len(twice) if twice else None}
    write_atomic(folder / "controls.json", to_json({"model": llm.model, "failed": endpoint.asked["failed"], **report, "warnings": warnings}))
    show = lambda v: "-" if v is None else f"{v:.3f}"      # noqa: E731
    print(f"{'':10}{'n':>5}{'right':>10}{'shuffled':>10}{'blank':>10}")
    for name in ("all", *SUBJECTIVE):
        print(f"{name:10}{report[name]['n']:5}" + "".join(f"{show(report[name][kind]):>10}" for kind in ("right", "shuffled", "blank")))
    print(f"test and retest: {show(report['test_retest']['same'])} of {len(twice)} answers are the same; {endpoint.asked['failed']} of {len(jobs)} "
          f"requests failed; {bill(endpoint)}")
    print("\n".join(f"WARNING: {w}" for w in warnings) or "right media score at least 0.3 above shuffled and grey ones")


def grading(command, arguments):
    """`bench.py controls | sheet | calibrate | human`: the command's own --help says what it reads and writes."""
    run = {"controls": controls, "sheet": export_sheet, "calibrate": calibrate, "human": human_tables}[command]
    parser = argparse.ArgumentParser(prog=f"bench.py {command}", description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="the CSV of scores (calibrate, human), then folders runs/<name>/bench/<agent>-<subset>")
    parser.add_argument("--n", type=int, help="tasks in the sample (controls, sheet)")
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"), help="for `seed` and `bench.llm` (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="config values on top, such as bench.llm.url=...")
    args = parser.parse_args(arguments)
    for folder in args.paths[command in ("calibrate", "human"):]:
        if not (folder / "trajectories.jsonl").is_file():
            raise SystemExit(f"error: {folder / 'trajectories.jsonl'} is missing; `python bench.py --config ... --agent ...` makes such folders")
    if args.n is not None and args.n < 1:
        raise SystemExit(f"error: --n is {args.n}; it must be at least 1")
    run(args.paths, load_config(args.config, args.set), args.n)


# ---------------------------------------------------------------------------- the paper's tables, two runs side by side, ablations (Sec. 5.2 to 5.4)

def read_bench(folder):
    """(head, {task id: grade}, {task id: trajectory}) of a folder that `--agent` wrote. SystemExit names what is missing."""
    folder = Path(folder)
    if not (folder / "columns.json").is_file():
        raise SystemExit(f"error: {folder / 'columns.json'} is missing; `python bench.py --config ... --agent ...` makes it; give the folder "
                         "runs/<name>/bench/<agent>-<subset>")
    head = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
    for key in ("grader", "judge", "decoder", "fidelity", "who", "graded_by"):
        if key not in head:
            raise SystemExit(f"error: {folder / 'columns.json'} does not say its {key}; give its bench.py command again, which plays nothing anew")
    grades = read_jsonl(folder / ("grades.jsonl" if head["files"] else "grades-from-records.jsonl"))
    return head, {g["id"]: g for g in grades}, {t["task"]["id"]: t for t in read_jsonl(folder / "trajectories.jsonl")}


def per_task(grades, trajectories, grader):
    """{figure: {task id: value}}: the graded columns, o_score, R_vrt (plan x fine, whatever form a run was trained on) and its parts.

    A figure is the mean of its values. A task's value of o_score is its influence: O-Score plus its weighted distances from its columns' means.
    """
    found = {c: {g["id"]: v for g in grades if c in ("s_rate", g["dimension"])
                 and (v := g[c] if c in (*OBJECTIVE, "s_rate") else (g[grader] or {}).get(c)) is not None} for c in COLUMNS}
    means = {c: statistics.mean(v.values()) for c, v in found.items() if v}
    found, o_score = {c: found[c] for c in means}, statistics.mean(means.values())
    found["o_score"] = {g["id"]: o_score + sum((v[g["id"]] - means[c]) * len(grades) / len(v) / len(found) for c, v in found.items() if g["id"] in v)
                        for g in grades}
    rewards = {t["task"]["id"]: t["reward"] for t in trajectories}
    found["R_vrt"] = {i: r["plan"] * r["fine"] for i, r in rewards.items() if r["plan"] == r["plan"] and r["fine"] == r["fine"]}
    for part in ("plan", "fine", *PARTS):
        found[f"R_{part}"] = {i: r[part] for i, r in rewards.items() if r[part] is not None and r[part] == r[part]}
    return found


def tables(args):
    """Print Tables 2, 3 and 4 with our rows; each of `args` is a folder of `--agent`, or several (seeds) with commas between."""
    ours = {arg: [read_bench(f) for f in arg.split(",")] for arg in args}
    print_tables([([per_task(list(g.values()), t.values(), h["grader"]) for h, g, t in runs], head_line(name, [h for h, _, _ in runs]))
                  for name, runs in ours.items()])


def compare(args, draws=10_000):
    """Two agents, each a folder of `--agent` or several (seeds) with commas between, on the same tasks: prints and returns {figure: `paired`'s}.

    A task's value is its mean over the seeds. SystemExit: graders or judges that differ, or no task in common.
    """
    if len(args) != 2:
        raise SystemExit("error: compare takes two folders of `--agent`: python bench.py compare A B; seeds with commas: A0,A1 B0,B1")
    sides = [[read_bench(f) for f in side.split(",")] for side in args]
    every = [run for side in sides for run in side]
    for key, fix in (("grader", "let one grader grade both"), ("graded_by", "let one model, prompt and calibration grade both"),
                     ("judge", "let one judge score both (reward.judge)")):
        if len(seen := {h[key] for h, _, _ in every}) > 1:
            raise SystemExit(f"error: the {key} is not the same in all folders: {', '.join(sorted(seen))}; their scores are different things; {fix}")
    print("\n".join(head_line(name, [h for h, _, _ in side]) for name, side in zip(args, sides)))
    if len(every) > 2:
        print("take care: seeds are averaged and tasks drawn, so intervals and p hold for these seeds; what other seeds would do is not in them")
    for key in ("subset", "decoder", "files", "fidelity"):
        if len(seen := {str(h[key]) for h, _, _ in every}) > 1:
            print(f"take care: `{key}` differs: {', '.join(sorted(seen))}")
    asked = [{i: t[i]["task"]["request"] for i in g if i in t} for _, g, t in every]
    ids = [i for i in asked[0] if all(a.get(i) == asked[0][i] for a in asked)]
    if not ids:
        raise SystemExit("error: the folders have no task in common (same id, same request); compare runs on the same tasks, such as --subset 104")
    if any(len(a) != len(ids) for a in asked):
        print(f"take care: {len(ids)} tasks are in all folders, which have {', '.join(str(len(a)) for a in asked)}; only those are compared")
    found = [[per_task([g[i] for i in ids], [t[i] for i in ids], h["grader"]) for h, g, t in side] for side in sides]
    flat, table = found[0] + found[1], {}
    labels = [k for k in flat[0] if all(k in f for f in flat)]
    if any(c in f and c not in labels for f in flat for c in COLUMNS):
        labels.remove("o_score")
        print("take care: not every column is graded in all folders, so O-Scores are not compared")
    print(f"\n{'':12}{'A':>8}{'B':>8}{'B - A':>9}  {'95 % interval':18}{'p':>7}{'n':>6}" + "   mean of each seed: A | B" * (len(flat) > 2))
    for label in labels:
        if same := [i for i in ids if all(i in f[label] for f in flat)]:
            of = lambda side: [sum(f[label][i] for f in side) / len(side) for i in same]      # noqa: E731
            t = table[label] = paired(of(found[0]), of(found[1]), draws)
            each = " | ".join(" ".join(f"{statistics.mean(f[label][i] for i in same):.3f}" for f in side) for side in found)
            print(f"{label:12}{t['a']:8.3f}{t['b']:8.3f}{t['difference']:+9.3f}  [{t['low']:+.3f}, {t['high']:+.3f}]  {t['p']:7.4f}{t['n']:6}"
                  + f"   {each}" * (len(flat) > 2))
    print(f"{draws:,} draws of tasks; with {len(table)} figures about {0.05 * len(table):.1f} come out below p = 0.05 by chance alone")
    return table


def run_row(row, seed, path, home):
    """Train and measure one row, each step a process on one thread, or read a done one: {"values": {figure: values in the tasks' order}, "seconds"}.

    `home`: None, or a call that waits for the seed's v7 and returns its config file: data and base are the same for all rows, and copied from there.
    `seconds` are of the call that finished the row, so of a row that was stopped and went on only the last part.
    """
    config = load_config(path)
    run, log = ROOT / "runs" / config.name, path.with_suffix(".log")
    if (run / "bench" / "row.json").is_file():
        return json.loads((run / "bench" / "row.json").read_text(encoding="utf-8"))
    if home and ((first := load_config(home())).data, first.model) == (config.data, config.model):
        for part in (p for p in ("data", "base/final") if not (run / p).is_dir()):
            shutil.copytree(ROOT / "runs" / first.name / part, run / f"{part}.tmp", dirs_exist_ok=True)
            os.rename(run / f"{part}.tmp", run / part)
    began = time.time()      # without the wait for v7
    train = ["train_vrl.py" if row.startswith("RL") else "train_pst.py", "bench.tasks=8", "bench.sampled=false"]
    measure = ["bench.py", "--agent", "policy", "--subset", "heldout", "--no-files"]
    for script, *more in (train, measure, [*measure, "--sampled"]):
        with open(log, "a", encoding="utf-8") as out:
            done = subprocess.run([sys.executable, script, "--config", str(path), *more], cwd=ROOT, stdout=out, stderr=out,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            last = (log.read_text(encoding="utf-8").splitlines() or ["it said nothing"])[-1]
            raise SystemExit(f"error: {row}-{seed}: {script} ended with {done.returncode}: {last} ({log})")
    _, grades, greedy = read_bench(run / "bench" / "policy-heldout")
    sampled = read_bench(run / "bench" / "policy-heldout-sampled")[2]
    values = {"R_vrt": {i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in greedy.items()},      # whatever form the row was trained on
              "R_vrt sampled": {i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in sampled.items()},
              "s_rate": {i: g["s_rate"] for i, g in grades.items()},
              # Not the O-Score: of these few tasks one or none is in a column, so one task would make a tenth of it.
              "objective": {i: statistics.mean(g[k] for k in ("s_rate", *OBJECTIVE) if g[k] is not None) for i, g in grades.items()}}
    result = {"values": {k: [round(x, 4) for _, x in sorted(v.items())] for k, v in values.items()}, "seconds": round(time.time() - began)}
    write_atomic(run / "bench" / "row.json", to_json(result))
    return result


def ablate(args):
    """Train and measure Table 4's rows (Sec. 5.4) at a small scale, or print a result; done rows are not made again."""
    parser = argparse.ArgumentParser(prog="bench.py ablate", description=ablate.__doc__)
    parser.add_argument("folder", nargs="?", help="of the rows' configs: v1.yaml ... rl4.yaml")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to n - 1 (default 1)")
    parser.add_argument("--only", help="rows, with commas between (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, one thread each (default 1)")
    parser.add_argument("--out", help="the result, whose rows are not made again (default: runs/ablate/ablations.json; without a folder data/ablations.json)")
    given = parser.parse_args(args)
    out = Path(given.out or (ROOT / ("runs/ablate" if given.folder else "data") / "ablations.json"))
    if not given.folder:
        if not out.is_file():
            raise SystemExit(f"error: {out} is missing; `python bench.py ablate configs/ablations/` makes it")
        return print_ablations(json.loads(out.read_text(encoding="utf-8")), out)
    known, scale = list(read_paper()["rows"]), yaml.safe_load((ROOT / "data" / "ablate.yaml").read_text(encoding="utf-8"))
    only = given.only.split(",") if given.only else known
    if unknown := [row for row in only if row not in known]:
        raise SystemExit(f"error: --only names {unknown[0]}; rows: {', '.join(known)}")
    if given.seeds < 1 or given.jobs < 1:
        raise SystemExit(f"error: --seeds is {given.seeds} and --jobs {given.jobs}; both must be at least 1")
    if set(scale) != {"tokens", "config"}:
        raise SystemExit(f"error: data/ablate.yaml holds {', '.join(scale)}; it must hold `tokens` and `config`")
    before = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if before and before["scale"] != scale:
        raise SystemExit(f"error: {out} was made at another scale than data/ablate.yaml has now; give --out another file, or move that one away")
    rows = before.get("rows", {})
    left = [(row, s) for s in range(given.seeds) for row in only if str(s) not in rows.get(row, {})]
    # v7 of a seed comes first: its data, base and PST are the others'.
    wanted = [("v7", s) for s in range(given.seeds) if any(seed == s for _, seed in left)] + [key for key in left if key[0] != "v7"]
    made = {key: row_config(given.folder, *key, scale) for key in wanted}
    for path, _ in made.values():
        open_run(load_config(path))
    print(f"{len(wanted)} rows to make, each config changed by " + "; ".join(next(iter(made.values()), (None, ["nothing"]))[1]) +
          f"; tokens of each stage x {scale['tokens']}")
    failed, futures = [], {}
    with ThreadPoolExecutor(given.jobs) as pool:
        for row, seed in wanted:
            def home(seed=seed):
                futures["v7", seed].result()
                return made["v7", seed][0]
            futures[row, seed] = pool.submit(run_row, row, seed, made[row, seed][0], None if row == "v7" else home)
        names = {future: key for key, future in futures.items()}
        try:
            for i, future in enumerate(as_completed(names), 1):
                row, seed = names[future]
                if isinstance(future.exception(), SystemExit):
                    failed.append(f"{row}-{seed}")
                    print(f"{row}-{seed}, {i} of {len(wanted)}: {future.exception()}", flush=True)
                    continue
                rows.setdefault(row, {})[str(seed)] = result = future.result()
                means = ", ".join(f"{FIGURES[k]} {statistics.mean(v):.3f}" for k, v in result["values"].items())
                print(f"{row}-{seed}, {i} of {len(wanted)}: {means}; {result['seconds']} s", flush=True)
                write_atomic(out, to_json({"scale": scale, "rows": rows}))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit("stopped: the same command goes on from there") from None
    if rows:
        print_ablations({"rows": rows}, out)
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(wanted)} rows failed: {', '.join(failed)}; the same command tries them again")


def main():
    if sys.argv[1:2] and sys.argv[1] in ("controls", "sheet", "calibrate", "human"):
        return grading(sys.argv[1], sys.argv[2:])
    if sys.argv[1:2] == ["media"]:
        return media(sys.argv[2:], ROOT / "data" / "media")
    if sys.argv[1:2] in (["report"], ["demo"]):
        return pages(sys.argv[1], sys.argv[2:])
    if command := {"tables": tables, "compare": compare, "ablate": ablate}.get("".join(sys.argv[1:2])):
        return command(sys.argv[2:])
    if len(sys.argv) > 2 and sys.argv[1] == "--table":
        paths = [Path(p) / "bench" / "results.json" for p in sys.argv[2:]]
        for path in paths:
            if not path.is_file():
                raise SystemExit(f"error: {path} is missing; `python bench.py --config ... name={path.parent.parent.name}` makes it")
        many = []
        for path in paths:
            try:
                many.append(json.loads(path.read_text(encoding="utf-8")))
            except json.JSONDecodeError as e:
                raise SystemExit(f"error: {path} is cut off ({e.msg}); remove it and measure again") from e
            if not many[-1]:
                raise SystemExit(f"error: {path} holds no policy; remove it and measure again")
        return print_table(many)
    options = [("--agent", None, "VisGenBench: who acts: expert (VisionAgent, scripted), openai (VisionAgent by data.llm), policy (what the run trained)"),
               ("--subset", None, "VisGenBench: 104 (default), a number up to 1200, or heldout")]
    switches = [("--no-files", "VisGenBench: read the simulator's records, measure no files"),
                ("--sampled", "VisGenBench: the policy plays at temperature 1, not greedy")]
    config, given = command_line(__doc__, switches, options)
    run = open_run(config)
    if "--agent" in given:
        if given["--agent"] not in ("expert", "openai", "policy"):
            raise SystemExit(f"error: --agent is {given['--agent']!r}; expert, openai or policy")
        run_bench(config, run, given["--agent"], given.get("--subset", "104"), "--no-files" not in given, "--sampled" in given)
        return
    if not (run / "data" / "done.json").is_file():
        raise SystemExit(f"error: {run.relative_to(ROOT)} has no data yet; `python train_vrl.py --config ...` makes the run")
    print_table([measure(config, run)])


if __name__ == "__main__":
    main()
