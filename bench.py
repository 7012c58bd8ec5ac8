"""VisGenBench (Sec. 5): play it, measure and grade it, set it beside the paper; and the policies of a run on held-out tasks.

python bench.py --config configs/tiny.yaml                          # untrained, PST, PST + VRL of runs/tiny on its held-out tasks
python bench.py --table runs/tiny runs/tiny-1 runs/tiny-2           # mean and spread over runs that are measured
python bench.py --config configs/tiny.yaml --agent policy           # VisGenBench-104; --subset, --no-files, --sampled
python bench.py report runs/tiny/bench/policy-104                   # report.html: columns, failures, trajectories with films that play
python bench.py demo runs/tiny/vrl/rollouts/step-1.jsonl [ID]       # demo.html: one trajectory (Fig. 12)
python bench.py tables FOLDER ...                                   # the paper's tables with rows of ours, runs/<name>/bench/<agent>-<subset>
python bench.py compare FOLDER_A FOLDER_B                           # paired tests on the same tasks; several seeds: A0,A1,A2 B0,B1,B2
python bench.py ablate configs/ablations/ --seeds 3 --jobs 2        # Table 4's rows; without a folder: what data/ablations.json holds
python bench.py controls FOLDER --set llm.url=...             # does the VLM-Grader look at the media? shuffled, grey, again
python bench.py sheet FOLDER [FOLDER ...]                           # a blind sheet for people to score on, HTML and CSV
python bench.py calibrate scores.csv [FOLDER ...]                   # the VLM-Grader's scores against people's; human scores.csv: Tables 3, 5, 6
python bench.py media [FOLDER]                                      # draw the media database, data/media/, or add your own files to it
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lib.ablate import ablate
from lib.experiment import command_line, load_config
from lib.grader import controls, subjective_grades
from lib.human import calibrate, export_sheet, human_tables
from lib.lineage import content_words, deliverables, on_topic, read_media
from lib.media import SUFFIXES, from_tool, materialize, media, probe, real_file
from lib.pages import pages
from lib.runs import (
    ROOT,
    append_jsonl,
    cut_tail,
    each_line,
    open_run,
    read_jsonl,
    write_atomic,
    write_jsonl,
)
from lib.tables import SUBJECTIVE, columns_of, compare, tables
from lib.tasks import BENCH
from lib.text import to_json
from make_data import make_trajectories
from rewards import PARTS, consistency_reward


# ---------------------------------------------------------------------------- measuring policies
def stages_of(config, run):
    """{name: where its weights stand} of what the run has: untrained, pst, vrl (the last checkpoint)."""
    from lib.checkpoints import list_checkpoints

    final, saved = (
        ROOT / config.pst.init_from if config.pst.init_from else run / "pst" / "final",
        list_checkpoints(run / "vrl"),
    )
    return {
        "untrained": None,
        **({"pst": final} if final.is_dir() else {}),
        **({"vrl": saved[-1]} if saved else {}),
    }


def load_stage(config, run, name, device, tokenizer):
    """The policy of a run as one of stages_of has it, in fp32 and frozen."""
    from lib.checkpoints import read_checkpoint, restore
    from lib.engine_check import sync_sampler
    from lib.policy import add_lora, load_policy
    from train_pst import base_policy

    stages = stages_of(config, run)
    from_base = name == "untrained" or (name == "vrl" and config.vrl.start == "base")
    start = (
        partial(base_policy, config, run, tokenizer, device)
        if from_base
        else partial(load_policy, stages["pst"], config, tokenizer, device)
    )
    model = start().float()
    if name == "vrl":
        policy = (
            add_lora(config, start(), norm=config.vrl.norm_lr > 0)
            if config.vrl.tune == "lora"
            else model
        )
        restore(policy, [], *read_checkpoint(config, stages["vrl"]))
        sync_sampler(model, policy)
    return model.eval().requires_grad_(False)


def measure(config, run):
    """Evaluate each policy that the run has; a policy measured before is not measured again. Returns {policy: figures}."""
    from lib.evaluation import evaluate
    from lib.policy import load_tokenizer, set_up

    path, stages = run / "bench" / "results.json", stages_of(config, run)
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    device, tokenizer = set_up(config), load_tokenizer(config, run)
    tasks = read_jsonl(run / "data" / "heldout.jsonl")[: config.bench.tasks]
    print(f"bench: {len(tasks)} held-out tasks, each policy about a minute")
    for name in ("untrained", "pst", "vrl"):
        origin = stages["vrl"].name if name == "vrl" and "vrl" in stages else name
        if (
            name not in stages
            or name in results
            and (results[name]["n"], results[name]["from"]) == (len(tasks), origin)
        ):
            print(f"  {name}: {'measured before' if name in stages else 'not trained in this run'}")
            continue
        figures, _ = evaluate(
            load_stage(config, run, name, device, tokenizer), tokenizer, tasks, config, run, name
        )
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
    print(
        f"\n{len(many)} run(s), seeds {sorted({r[names[0]]['seed'] for r in many})}, n = {', '.join(map(str, sorted(n)))} held-out tasks; "
        "judge: rules; environment: VisGenEnv"
        + ("; mean +- standard deviation over runs" if len(many) > 1 else "")
    )
    print(f"{'':26}" + "".join(f"{name:>18}" for name in names))
    for i, (label, _) in enumerate(rows_of(many[0][names[0]])):
        cells = []
        for name in names:
            values = [v for r in many if (v := list(rows_of(r[name]))[i][1]) is not None]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        print(f"{label:26}" + "".join(f"{c:>18}" for c in cells))


CHUNK = 64  # tasks that a policy plays at once; each lot is saved
QUICKEST = {
    "image": ".jpg",
    "video": ".mov",
    "audio": ".wav",
}  # to write and to probe: PNG takes four times as long as JPEG, and AAC longer than PCM


def bench_tasks(subset, run):
    """VisGenBench's tasks: all 1200, its stratified 104, N of them evenly spread, or a run's held-out tasks (`heldout`)."""
    if subset == "heldout":
        return read_jsonl(run / "data" / "heldout.jsonl")
    tasks = list(each_line(BENCH))
    if subset == "104":
        return [t for t in tasks if t["in_104"]]
    if not subset.isdecimal() or not 1 <= int(subset) <= len(tasks):
        raise SystemExit(
            f"error: --subset is {subset!r}; it must be 104, heldout or a number from 1 to {len(tasks)}"
        )
    return [tasks[i * len(tasks) // int(subset)] for i in range(int(subset))]


def policy_of(config, run, folder):
    """Whose trajectories `folder` holds: the last policy of the run, such as "runs/tiny/vrl/step-60". SystemExit: none, or another one played there."""
    name, where = list(stages_of(config, run).items())[-1]
    if name == "untrained":
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} has no trained policy; `python train_vrl.py --config ...` trains one"
        )
    where, kept = os.path.relpath(where, ROOT), folder / "policy.json"
    before = (
        json.loads(kept.read_text(encoding="utf-8"))["policy"]
        if kept.is_file()
        else "a policy that is not known"
    )
    if (folder / "trajectories.jsonl").is_file() and before != where:
        raise SystemExit(
            f"error: {folder} holds what {before} played, and the run's policy is {where} now; remove that folder, or move it away"
        )
    write_atomic(kept, to_json({"policy": where}))
    done = name == "vrl" and where.endswith(f"/step-{config.vrl.steps}")
    print(
        f"policy: {where}"
        + (
            ""
            if done
            else f"; VRL has not ended (vrl.steps is {config.vrl.steps})"
            if name == "vrl"
            else ", before VRL"
        )
    )
    return where


def act(agent, tasks, config, run, folder, temperature=0.0):
    """Every task played once by the agent, in VisGenEnv: trajectories.jsonl in `folder`, appended as they come, so a stopped run goes on."""
    path = folder / "trajectories.jsonl"
    if agent != "policy":
        write_jsonl(folder / "queries.jsonl", tasks)
        make_trajectories(
            replace(
                config,
                data=replace(config.data, agent="openai" if agent == "openai" else "scripted"),
            ),
            folder,
        )
    else:
        from lib.evaluation import score_rollouts
        from lib.policy import load_tokenizer, set_up
        from lib.sampler import sample_rollouts

        cut_tail(path)
        made = {t["task"]["id"] for t in each_line(path)} if path.is_file() else set()
        left, device, tokenizer = (
            [t for t in tasks if t["id"] not in made],
            set_up(config),
            load_tokenizer(config, run),
        )
        model = (
            load_stage(config, run, list(stages_of(config, run))[-1], device, tokenizer)
            if left
            else None
        )
        for at in range(0, len(left), CHUNK):
            rollouts = sample_rollouts(
                model,
                tokenizer,
                left[at : at + CHUNK],
                config,
                temperature,
                seed=config.seed,
                progress=f"from task {at}",
            )
            score_rollouts(rollouts, config)
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
                faults.append(
                    f"{trajectory['task']['id']}: {a['id']} cannot be decoded from {path.name}, so it counts as not handed over: {e}"
                )
                continue
            booked = {
                **{k: a[k] for k in ("kind", "width", "height", "n_frames", "has_audio")},
                "cuts": a["shots"] and a["shots"] - 1,
            }
            faults += [
                f"{trajectory['task']['id']}: {a['id']} has {k} {found[k]} in its file and {v} in its record"
                for k, v in booked.items()
                if found[k] is not None and v is not None and found[k] != v
            ]
            if (
                a["duration_s"]
                and found["duration_s"]
                and abs(a["duration_s"] - found["duration_s"]) > 0.03
            ):
                faults.append(
                    f"{trajectory['task']['id']}: {a['id']} lasts {found['duration_s']} s in its file and {a['duration_s']} s in its record"
                )
    return seen, faults


def booked_files(trajectory):
    """measure_files from the simulator's records alone (--no-files): much faster, and no evidence."""
    return {
        a["id"]: {
            **{k: a[k] for k in ("kind", "width", "height", "n_frames", "duration_s", "has_audio")},
            "cuts": a["shots"] and a["shots"] - 1,
        }
        for a in deliverables(trajectory)
        if a["kind"] in SUFFIXES
    }, []


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
    close = lambda f: abs(f["duration_s"] - c["duration_s"]) / c["duration_s"]  # noqa: E731
    graded = (
        [1.0 if close(f) <= config.duration_tolerance else max(0.0, 1.0 - close(f)) for f in right]
        if c["duration_s"]
        else []
    )
    return {
        "s_rate": float(bool(right)),
        "amount": float(len(right) == c["images"] + c["videos"]),
        "duration": (sum(graded) / max(1, len(graded)) if c["duration_s"] else None),
        "storyboard": (
            sum(f["cuts"] + 1 == c["shots"] for f in right) / max(1, len(right))
            if c["shots"]
            else None
        ),
    }


def structural_scores(trajectory, config):
    """What records can show of the subjective dimensions, each in [0, 1]: a stand-in for the VLM-Grader under a name of its own (all ours).

    match: share of the subject's words in the prompt behind each delivered picture or clip, the worst one; object, scene: made from one reference;
    style: the style's words in the prompts, or one reference where the request names no style; variety: share of deliverables that look different by seed and
    prompt, times the share of distinct prompts. creative: None, since no record shows an idea.
    """
    task, media = trajectory["task"], read_media(trajectory)
    c, items = (
        task["constraints"],
        [a for a in deliverables(trajectory) if a["kind"] == task["modality"]],
    )
    if not items:
        return dict.fromkeys(SUBJECTIVE, 0.0) | {"creative": None}
    together, _ = consistency_reward(trajectory, media)
    looks = {media.looks[a["id"]] for a in items}
    prompts = {
        str(media.by_id[part]["arguments"].get("prompt", ""))
        for a in items
        for part in media.footage[a["id"]]
    }
    parts = sum(len(media.footage[a["id"]]) for a in items)
    said = lambda text: min(on_topic(a["id"], media, content_words(text), config) for a in items)  # noqa: E731
    return {
        "creative": None,
        "match": said(c["subject"]),
        "object": together,
        "scene": together,
        "style": said(c["style"]) if c["style"] else together,
        "variety": len(looks) / len(items) * len(prompts) / parts,
    }


def grade(trajectory, config, with_files):
    """One line of grades.jsonl: what the task's columns are made of, from its trajectory."""
    task = trajectory["task"]
    files, faults = (measure_files if with_files else booked_files)(trajectory)
    return {
        "id": task["id"],
        "modality": task["modality"],
        "dimension": task["dimension"],
        "scenario": task["scenario"],
        "files": files,
        "faults": faults,
        **objective_scores(task, files, config.reward),
        "structural": structural_scores(trajectory, config.reward),
        "vlm": None,
    }


def grade_all(trajectories, config, folder, with_files):
    """grades.jsonl of `folder`, a line a task in the tasks' order; made on all cores, appended as it comes, and gone on with where it stopped."""
    path = folder / ("grades.jsonl" if with_files else "grades-from-records.jsonl")
    cut_tail(path)
    done = {g["id"]: g for g in each_line(path)} if path.is_file() else {}
    left = [t for t in trajectories if t["task"]["id"] not in done]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(
            partial(grade, config=config, with_files=with_files),
            left,
            chunksize=1 if with_files else 50,
        )
        for g in tqdm(
            work,
            total=len(left),
            desc="files measured" if with_files else "records read",
            unit="task",
            mininterval=1,
            disable=not left,
        ):
            append_jsonl(path, [g])
            done[g["id"]] = g
    return [done[t["task"]["id"]] for t in trajectories]


def run_bench(config, run, agent, subset, with_files, sampled=False):
    """VisGenBench for one agent: play, measure, grade, print. Returns the folder, runs/<name>/bench/<agent>-<subset>[-sampled]/."""
    folder, began = run / "bench" / (f"{agent}-{subset}" + "-sampled" * sampled), time.time()
    tasks = bench_tasks(subset, run)
    who = {"expert": "scripted", "openai": config.llm.model}.get(agent) or policy_of(
        config, run, folder
    )
    trajectories = act(agent, tasks, config, run, folder, temperature=float(sampled))
    if not trajectories:
        raise SystemExit(f"error: no task of --subset {subset} was played; the lines above say why")
    played = time.time()
    grades = grade_all(trajectories, config, folder, with_files)
    measured = time.time()
    grades, grader, grading = subjective_grades(
        trajectories,
        grades,
        config,
        folder / ("grades.jsonl" if with_files else "grades-from-records.jsonl"),
    )
    faults = [f for g in grades for f in g["faults"]]
    decoder = {"expert": "scripted", "openai": f"temperature {config.llm.temperature:g}"}.get(
        agent, "temperature 1" if sampled else "greedy"
    )
    found = {
        "agent": agent,
        "who": who,
        "subset": subset,
        "tasks": len(tasks),
        "played": len(trajectories),
        "seed": config.seed,
        "files": with_files,
        "grader": grader,
        **grading,
        "judge": config.reward.judge,
        "decoder": decoder,
        "fidelity": config.rollout.fidelity,
        "columns": columns_of(grades, grader),
        "faults": faults,
    }
    write_atomic(folder / "columns.json", to_json(found))
    print(
        f"{agent} on {len(tasks)} tasks, {len(trajectories)} played: {played - began:.0f} s to play, {measured - played:.0f} s to "
        f"{'write files and measure them' if with_files else 'read the records; nothing was measured'}"
    )
    print(
        f"{len(faults)} disagreements between files and records"
        + "".join(f"\n  {f}" for f in faults[:10])
    )
    print(
        f"the six subjective columns are the {grader} grader's"
        + (f": {grading['grading']}" if grading["grading"] else "")
    )
    for column, c in found["columns"].items():
        print(
            f"  {column:12}"
            + (
                f"{c['mean']:.3f}  [{c['low']:.3f}, {c['high']:.3f}]  n = {c['n']}"
                if c
                else "not graded"
            )
        )
    return folder


def grading(command, arguments):
    """`bench.py controls | sheet | calibrate | human`: the command's own --help says what it reads and writes."""
    run = {
        "controls": controls,
        "sheet": export_sheet,
        "calibrate": calibrate,
        "human": human_tables,
    }[command]
    parser = argparse.ArgumentParser(
        prog=f"bench.py {command}",
        description=run.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        help="the CSV of scores (calibrate, human), then folders runs/<name>/bench/<agent>-<subset>",
    )
    parser.add_argument("--n", type=int, help="tasks in the sample (controls, sheet)")
    parser.add_argument(
        "--config",
        default=str(ROOT / "configs" / "tiny.yaml"),
        help="for `seed` and `llm` (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="config values on top, such as llm.url=...",
    )
    args = parser.parse_args(arguments)
    for folder in args.paths[command in ("calibrate", "human") :]:
        if not (folder / "trajectories.jsonl").is_file():
            raise SystemExit(
                f"error: {folder / 'trajectories.jsonl'} is missing; `python bench.py --config ... --agent ...` makes such folders"
            )
    if args.n is not None and args.n < 1:
        raise SystemExit(f"error: --n is {args.n}; it must be at least 1")
    run(args.paths, load_config(args.config, args.set), args.n)


def main():
    if sys.argv[1:2] and sys.argv[1] in ("controls", "sheet", "calibrate", "human"):
        return grading(sys.argv[1], sys.argv[2:])
    if sys.argv[1:2] == ["media"]:
        return media(sys.argv[2:], ROOT / "data" / "media")
    if sys.argv[1:2] in (["report"], ["demo"]):
        return pages(sys.argv[1], sys.argv[2:])
    if command := {"tables": tables, "compare": compare, "ablate": ablate}.get(
        "".join(sys.argv[1:2])
    ):
        return command(sys.argv[2:])
    if len(sys.argv) > 2 and sys.argv[1] == "--table":
        paths = [Path(p) / "bench" / "results.json" for p in sys.argv[2:]]
        for path in paths:
            if not path.is_file():
                raise SystemExit(
                    f"error: {path} is missing; `python bench.py --config ... name={path.parent.parent.name}` makes it"
                )
        many = []
        for path in paths:
            try:
                many.append(json.loads(path.read_text(encoding="utf-8")))
            except json.JSONDecodeError as e:
                raise SystemExit(
                    f"error: {path} is cut off ({e.msg}); remove it and measure again"
                ) from e
            if not many[-1]:
                raise SystemExit(f"error: {path} holds no policy; remove it and measure again")
        return print_table(many)
    options = [
        (
            "--agent",
            None,
            "VisGenBench: who acts: expert (VisionAgent, scripted), openai (VisionAgent by section llm), policy (what the run trained)",
        ),
        ("--subset", None, "VisGenBench: 104 (default), a number up to 1200, or heldout"),
    ]
    switches = [
        ("--no-files", "VisGenBench: read the simulator's records, measure no files"),
        ("--sampled", "VisGenBench: the policy plays at temperature 1, not greedy"),
    ]
    config, given = command_line(__doc__, switches, options)
    run = open_run(config)
    if "--agent" in given:
        if given["--agent"] not in ("expert", "openai", "policy"):
            raise SystemExit(f"error: --agent is {given['--agent']!r}; expert, openai or policy")
        run_bench(
            config,
            run,
            given["--agent"],
            given.get("--subset", "104"),
            "--no-files" not in given,
            "--sampled" in given,
        )
        return
    if not (run / "data" / "done.json").is_file():
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} has no data yet; `python train_vrl.py --config ...` makes the run"
        )
    print_table([measure(config, run)])


if __name__ == "__main__":
    main()
