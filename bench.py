"""VisGenBench (Sec. 5): play it, measure and grade it, set it beside the paper; and the policies of
a run on its held-out tasks.

python bench.py --config configs/tiny.yaml                  # untrained, PST, VRL of runs/tiny
python bench.py --table runs/tiny runs/tiny-1 runs/tiny-2   # mean and spread over measured runs
python bench.py curves runs/quick runs/no-kl                # VRL's curves in one picture
python bench.py --config configs/tiny.yaml --agent policy   # VisGenBench-104; --subset, --sampled
python bench.py --config configs/tiny.yaml --export FOLDER  # the last policy with a card, for a hub
python bench.py step runs/tiny 12                           # a page: a step of GRPO, token by token
python bench.py try "A logo for a bakery"                   # the newest run's policy on a request

A FOLDER is what --agent made, runs/<name>/bench/<agent>-<subset>:

python bench.py report FOLDER                       # report.html: columns, failures, films
python bench.py demo [FILE.jsonl [ID]]              # demo.html: trajectories (Fig. 12)
python bench.py tables FOLDER ...                   # the paper's tables with rows of ours
python bench.py compare FOLDER_A FOLDER_B           # paired tests; several seeds: A0,A1 B0,B1
python bench.py ablate configs/ablations/ --seeds 3 # Table 4's rows
python bench.py ablate                              # what data/ablations.json holds of them
python bench.py controls FOLDER --set llm.url=...   # does the VLM-Grader look at the media?
python bench.py sheet FOLDER [FOLDER ...]           # a blind sheet for people to score on
python bench.py calibrate scores.csv [FOLDER ...]   # the VLM-Grader's scores against people's
python bench.py human scores.csv [FOLDER ...]       # Tables 3, 5 and 6 from people's scores
python bench.py transfer --config configs/tiny.yaml # from the simulator to real tools: Sec. 4.3.3
python bench.py media [FOLDER]                      # draw the media database, or add your files
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lib.ablate import ablate
from lib.calibration import calibrate
from lib.experiment import Config, RewardConfig, command_line, load_config
from lib.families import asked_kind
from lib.grader import controls, subjective_grades
from lib.human import export_sheet, human_tables
from lib.lineage import deliverables, on_topic, read_media
from lib.media import SUFFIXES, from_tool, materialize, media, probe, real_file
from lib.pages import demo_command, report_command, write_index
from lib.reading_exercises import reading_rows
from lib.runs import (
    ROOT,
    append_jsonl,
    cut_tail,
    each_line,
    find_run,
    nearest,
    open_run,
    read_jsonl,
    run_command,
    worker_pool,
    write_atomic,
    write_jsonl,
)
from lib.tables import SUBJECTIVE, columns_of, compare, grades_name, tables
from lib.tasks import BENCH
from lib.text import fill_template, to_json
from lib.transfer import transfer
from lib.try_it import try_it
from lib.words import content_words
from make_data import make_trajectories
from rewards import PARTS, consistency_reward

CHUNK = 64  # tasks that a policy plays at once; each lot is saved
# The quickest forms to write and to probe: PNG takes four times as long as JPEG, AAC longer than
# PCM.
QUICKEST = {"image": ".jpg", "video": ".mov", "audio": ".wav"}


# ---------------------------------------------------------------------------- VisGenBench (Sec. 5)
def run_bench(
    config: Config, run: Path, agent: str, subset: str, with_files: bool, sampled: bool = False
) -> Path:
    """VisGenBench for one agent: play, measure, grade, print. Returns the folder that holds it all.

    It is runs/<name>/bench/<agent>-<subset>[-sampled]/. `agent`: expert, openai or policy.
    """
    folder = run / "bench" / (f"{agent}-{subset}" + "-sampled" * sampled)
    began = time.time()
    tasks = bench_tasks(subset, run)
    if agent == "expert":
        who = decoder = "scripted"
    elif agent == "openai":
        who, decoder = config.llm.model, f"temperature {config.llm.temperature:g}"
    else:
        who = policy_of(config, run, folder)
        decoder = "temperature 1" if sampled else "greedy"
    trajectories = act(agent, tasks, config, run, folder, temperature=float(sampled))
    if not trajectories:
        raise SystemExit(f"error: no task of --subset {subset} was played; the lines above say why")
    played = time.time()
    grades = grade_all(trajectories, config, folder, with_files)
    measured = time.time()
    path = folder / grades_name(with_files)
    grades, grader, grading = subjective_grades(trajectories, grades, config, path)
    head = {
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
        "faults": [fault for g in grades for fault in g["faults"]],
    }
    write_atomic(folder / "columns.json", to_json(head))
    print_bench(head, played - began, measured - played)
    write_index(run)
    return folder


def bench_tasks(subset: str, run: Path) -> list[dict]:
    """VisGenBench's tasks: all 1200, its stratified 104, N of them evenly spread, or `heldout`.

    The last are the run's held-out tasks. SystemExit for any other subset.
    """
    if subset == "heldout":
        return read_jsonl(run / "data" / "heldout.jsonl")
    tasks = list(each_line(BENCH))
    if subset == "104":
        return [t for t in tasks if t["in_104"]]
    if not subset.isdecimal() or not 1 <= int(subset) <= len(tasks):
        raise SystemExit(
            f"error: --subset is {subset!r}; it must be 104, heldout or a number from 1 to "
            f"{len(tasks)}"
        )
    n = int(subset)
    return [tasks[i * len(tasks) // n] for i in range(n)]


def print_bench(head: dict, play_s: float, measure_s: float) -> None:
    """Print what columns.json holds, and how long it took."""
    done = "write files and measure them"
    if not head["files"]:
        done = "read the records; nothing was measured"
    print(
        f"{head['agent']} on {head['tasks']} tasks, {head['played']} played: {play_s:.0f} s to "
        f"play, {measure_s:.0f} s to {done}"
    )
    print(f"{len(head['faults'])} disagreements between files and records")
    for fault in head["faults"][:10]:
        print(f"  {fault}")
    grading = f": {head['grading']}" if head["grading"] else ""
    print(f"the six subjective columns are the {head['grader']} grader's{grading}")
    for column, c in head["columns"].items():
        shown = "not graded"
        if c:
            shown = f"{c['mean']:.3f}  [{c['low']:.3f}, {c['high']:.3f}]  n = {c['n']}"
        print(f"  {column:12}{shown}")


# ---------------------------------------------------------------------------- playing
def last_policy(config: Config, run: Path) -> tuple[str, Path]:
    """The name (pst or vrl) and folder of the run's last policy, on a device that is there.

    SystemExit if there is none.
    """
    from lib.policy import set_up

    name, where = list(stages_of(config, run).items())[-1]
    if name == "untrained":
        raise SystemExit(
            f"error: {os.path.relpath(run, ROOT)} has no trained policy; "
            "`python train_vrl.py --config ...` trains one"
        )
    set_up(config)
    return name, where


def policy_of(config: Config, run: Path, folder: Path) -> str:
    """Whose trajectories `folder` holds: the run's last policy, such as "runs/tiny/vrl/step-60".

    SystemExit if there is none, or if another one has played there.
    """
    name, where = last_policy(config, run)
    where = Path(os.path.relpath(where, ROOT)).as_posix()
    kept = folder / "policy.json"
    before = "a policy that is not known"
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))["policy"]
    if (folder / "trajectories.jsonl").is_file() and before != where:
        raise SystemExit(
            f"error: {folder} holds what {before} played, and the run's policy is {where} now; "
            "remove that folder, or move it away"
        )
    write_atomic(kept, to_json({"policy": where}))
    note = ""
    if name != "vrl":
        note = ", before VRL"
    elif not where.endswith(f"/step-{config.vrl.steps}"):
        note = f"; VRL has not ended (vrl.steps is {config.vrl.steps})"
    print(f"policy: {where}{note}")
    return where


def act(
    agent: str, tasks: list[dict], config: Config, run: Path, folder: Path, temperature: float = 0.0
) -> list[dict]:
    """Every task played once by the agent, in VisGenEnv, into trajectories.jsonl of `folder`.

    Returns the trajectories in the tasks' order, without those that could not be played. They are
    appended as they come, so a stopped run goes on.
    """
    path = folder / "trajectories.jsonl"
    if agent == "policy":
        play_policy(tasks, config, run, path, temperature)
    else:
        write_jsonl(folder / "queries.jsonl", tasks)
        data = replace(config.data, agent="openai" if agent == "openai" else "scripted")
        make_trajectories(replace(config, data=data), folder)
    found = {t["task"]["id"]: t for t in each_line(path)}
    return [found[t["id"]] for t in tasks if t["id"] in found]


def play_policy(
    tasks: list[dict], config: Config, run: Path, path: Path, temperature: float
) -> None:
    """Append what the run's last policy does on the tasks that `path` does not hold yet."""
    from lib.evaluation import score_rollouts
    from lib.policy import set_up
    from lib.sampler import sample_rollouts
    from lib.tokens import load_tokenizer

    cut_tail(path)
    made = {t["task"]["id"] for t in each_line(path)} if path.is_file() else set()
    left = [t for t in tasks if t["id"] not in made]
    device, tokenizer = set_up(config), load_tokenizer(config, run)
    if not left:
        return
    stage = list(stages_of(config, run))[-1]
    policy = load_stage(config, run, stage, device, tokenizer)
    for at in range(0, len(left), CHUNK):
        rollouts = sample_rollouts(
            policy,
            tokenizer,
            left[at : at + CHUNK],
            config,
            temperature,
            seed=config.seed,
            progress=f"from task {at}",
        )
        score_rollouts(rollouts, config)
        append_jsonl(path, [r.trajectory for r in rollouts])


# ---------------------------------------------------------------------------- measuring, grading
def grade_all(
    trajectories: list[dict], config: Config, folder: Path, with_files: bool
) -> list[dict]:
    """The grades of `folder`, a line a task in its grades.jsonl, in the tasks' order.

    Made on all cores, appended as they come, and gone on with where they stopped.
    """
    path = folder / grades_name(with_files)
    cut_tail(path)
    done = {g["id"]: g for g in each_line(path)} if path.is_file() else {}
    left = [t for t in trajectories if t["task"]["id"] not in done]
    with worker_pool() as pool:
        work = pool.map(
            partial(grade, config=config, with_files=with_files),
            left,
            chunksize=1 if with_files else 50,
        )
        bar = tqdm(
            work,
            total=len(left),
            desc="files measured" if with_files else "records read",
            unit="task",
            mininterval=1,
            disable=not left,
        )
        for g in bar:
            append_jsonl(path, [g])
            done[g["id"]] = g
    return [done[t["task"]["id"]] for t in trajectories]


def grade(trajectory: dict, config: Config, with_files: bool) -> dict:
    """One line of grades.jsonl: what the task's columns are made of, from its trajectory."""
    task = trajectory["task"]
    if with_files:
        files, faults = measure_files(trajectory)
    else:
        files, faults = booked_files(trajectory), []
    # A text is its record: there is nothing to decode.
    texts = [a for a in deliverables(trajectory) if a["kind"] == "text"]
    files |= {a["id"]: booked(a) for a in texts if asked_kind(task["constraints"]) == "text"}
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


def measure_files(trajectory: dict) -> tuple[dict[str, dict], list[str]]:
    """What the answer hands over, written as files and probed: ({id: what probe saw}, faults).

    The simulator's books are not believed: sizes, frames, seconds and cuts are counted on the
    decoded pixels. Where file and record disagree, that is a fault of ours, said in words. The file
    that a real tool made is probed as it is; one that cannot be decoded is a fault as well.
    """
    seen, faults = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for a in media_handed_over(trajectory):
            where = f"{trajectory['task']['id']}: {a['id']}"
            path = Path(folder) / f"{a['id']}{QUICKEST[a['kind']]}"
            if from_tool(a):
                path = real_file(a)
            else:
                materialize(a, path)
            try:
                seen[a["id"]] = probe(path)
            except (ValueError, OSError) as e:
                faults.append(
                    f"{where} cannot be decoded from {path.name}, so it counts as not handed "
                    f"over: {e}"
                )
                continue
            faults += [f"{where} {text}" for text in disagreements(seen[a["id"]], booked(a))]
    return seen, faults


def media_handed_over(trajectory: dict) -> list[dict]:
    """The answer's pictures, films and sounds."""
    return [a for a in deliverables(trajectory) if a["kind"] in SUFFIXES]


def booked(artifact: dict) -> dict:
    """An artifact's record in the form of `probe`."""
    return {
        "kind": artifact["kind"],
        "width": artifact["width"],
        "height": artifact["height"],
        "n_frames": artifact["n_frames"],
        "duration_s": artifact["duration_s"],
        "has_audio": artifact["has_audio"],
        "cuts": artifact["shots"] and artifact["shots"] - 1,
    }


def disagreements(seen: dict, record: dict) -> list[str]:
    """What a file has otherwise than its record, in words. Seconds may differ by 0.03 (ours)."""
    faults = []
    for name in ("kind", "width", "height", "n_frames", "has_audio", "cuts"):
        found, said = seen[name], record[name]
        if found is not None and said is not None and found != said:
            faults.append(f"has {name} {found} in its file and {said} in its record")
    found, said = seen["duration_s"], record["duration_s"]
    if found and said and abs(said - found) > 0.03:
        faults.append(f"lasts {found} s in its file and {said} s in its record")
    return faults


def booked_files(trajectory: dict) -> dict[str, dict]:
    """measure_files from the simulator's records alone (--no-files): faster, and no evidence."""
    return {a["id"]: booked(a) for a in media_handed_over(trajectory)}


def objective_scores(task: dict, files: dict[str, dict], config: RewardConfig) -> dict:
    """S-Rate and the objective columns of one task from its measured files (the grades are ours).

    None where the request states no such thing. s_rate: a picture (or film, or what a family of
    requests wants in its place) was delivered where one was asked for. amount: as many as asked, 1
    or 0. duration: 1 within the tolerance, else 1 less the relative error, at least 0, the mean
    over films; the paper's column is real-valued too. storyboard: as many shots, counted by cuts, 1
    or 0, the mean.

    >>> wanted = {"images": 0, "videos": 1, "duration_s": 10, "shots": 2}
    >>> files = {"vid_1": {"kind": "video", "duration_s": 8.0, "cuts": 1}}
    >>> objective_scores({"modality": "video", "constraints": wanted}, files, RewardConfig())
    {'s_rate': 1.0, 'amount': 1.0, 'duration': 0.8, 'storyboard': 1.0}
    """
    c = task["constraints"]
    kind = asked_kind(c)
    right = [f for f in files.values() if f["kind"] == kind]
    duration, storyboard = None, None
    if c["duration_s"] and kind != "text":
        durations = []
        for f in right:
            error = abs(f["duration_s"] - c["duration_s"]) / c["duration_s"]
            durations.append(1.0 if error <= config.duration_tolerance else max(0.0, 1.0 - error))
        duration = sum(durations) / max(1, len(right))
    if c["shots"] and kind == "video":
        storyboard = sum(f["cuts"] + 1 == c["shots"] for f in right) / max(1, len(right))
    return {
        "s_rate": float(bool(right)),
        "amount": float(len(right) == c["images"] + c["videos"]),
        "duration": duration,
        "storyboard": storyboard,
    }


def structural_scores(trajectory: dict, config: RewardConfig) -> dict[str, float | None]:
    """What records can show of the subjective dimensions, each in [0, 1] (all of it ours).

    It stands in for the VLM-Grader under a name of its own. match: share of the subject's words in
    the prompt behind each delivered picture or clip, the worst one; object, scene: made from one
    reference; style: the style's words in the prompts, or one reference where the request names no
    style; variety: share of deliverables that look different by seed and prompt, times the share of
    distinct prompts. creative: None, since no record shows an idea.
    """
    task, seen = trajectory["task"], read_media(trajectory)
    c = task["constraints"]
    items = [a for a in deliverables(trajectory) if a["kind"] == task["modality"]]
    if not items:
        return dict.fromkeys(SUBJECTIVE, 0.0) | {"creative": None}
    together, _ = consistency_reward(trajectory, seen)
    looks = {seen.looks[a["id"]] for a in items}
    parts = [part for a in items for part in seen.footage[a["id"]]]
    prompts = {str(seen.by_id[part]["arguments"].get("prompt", "")) for part in parts}

    def said(text):
        return min(on_topic(a["id"], seen, content_words(text)) for a in items)

    return {
        "creative": None,
        "match": said(c["subject"]),
        "object": together,
        "scene": together,
        "style": said(c["style"]) if c["style"] else together,
        "variety": len(looks) / len(items) * len(prompts) / len(parts),
    }


# ---------------------------------------------------------------------------- a run's policies
def stages_of(config: Config, run: Path) -> dict[str, Path | None]:
    """{name: where its weights stand} of what the run has: untrained, pst, vrl (the last step)."""
    from lib.checkpoints import list_checkpoints

    stages = {"untrained": None}
    final = run / "pst" / "final"
    if config.pst.init_from:
        final = ROOT / config.pst.init_from
    if final.is_dir():
        stages["pst"] = final
    saved = list_checkpoints(run / "vrl")
    if saved:
        stages["vrl"] = saved[-1]
    return stages


def load_stage(config: Config, run: Path, name: str, device, tokenizer):
    """The policy of a run as one of stages_of has it, in fp32 and frozen, on a torch.device."""
    from lib.checkpoints import read_checkpoint, restore
    from lib.engine_check import sync_sampler
    from lib.policy import add_lora, load_policy
    from train_pst import base_policy

    stages = stages_of(config, run)

    def start():
        """What the stage's training began with; the stage itself but for VRL."""
        if name == "untrained" or (name == "vrl" and config.vrl.start == "base"):
            return base_policy(config, run, tokenizer, device)
        return load_policy(stages["pst"], config, tokenizer, device)

    model = start().float()
    if name == "vrl":
        policy = model
        if config.vrl.tune == "lora":
            policy = add_lora(config, start(), norm=config.vrl.norm_lr > 0)
        restore(policy, [], *read_checkpoint(config, stages["vrl"]))
        sync_sampler(model, policy)
    return model.eval().requires_grad_(False)


def policy_to_try(config: Config, run: Path) -> tuple:
    """(the run's last policy, its tokenizer). SystemExit if none is trained."""
    from lib.policy import set_up
    from lib.tokens import load_tokenizer

    name, where = last_policy(config, run)
    print(f"policy   {os.path.relpath(where, ROOT)}")
    tokenizer = load_tokenizer(config, run)
    return load_stage(config, run, name, set_up(config), tokenizer), tokenizer


def export_policy(config: Config, run: Path, folder: Path) -> None:
    """Write the run's last policy as transformers and vLLM load it, any adapter merged, with a
    model card (README.md), as a hub takes it. SystemExit: no policy, or the folder is there."""
    if folder.exists():
        raise SystemExit(f"error: {folder} is there already; give a new folder")
    name, where = last_policy(config, run)

    from lib.policy import save_policy, set_up
    from lib.tokens import load_tokenizer

    tokenizer = load_tokenizer(config, run)
    model = load_stage(config, run, name, set_up(config), tokenizer)
    evaluations = {}
    for when in ("before", "after"):
        path = run / "vrl" / f"{when}.json"
        if path.is_file():
            evaluations[when] = json.loads(path.read_text(encoding="utf-8"))
    card = fill_template(
        "templates/policy_card.jinja",
        config=config,
        config_text=(run / "config.yaml").read_text(encoding="utf-8").strip(),
        stage=name,
        step=where.name.removeprefix("step-") if name == "vrl" else None,
        n_parameters=sum(p.numel() for p in model.parameters()),
        evaluations=evaluations,
        parts=PARTS,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_policy(model, tokenizer, folder)
    write_atomic(folder / "README.md", card + "\n")
    print(f"{folder}: the policy after {name.upper()}, its tokenizer, and README.md, its card")


def measure(config: Config, run: Path) -> dict[str, dict]:
    """Evaluate each policy that the run has on its held-out tasks. Returns {policy: figures}.

    A policy measured before is not measured again.
    """
    from lib.evaluation import evaluate
    from lib.policy import set_up
    from lib.tokens import load_tokenizer

    path = run / "bench" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stages = stages_of(config, run)
    device, tokenizer = set_up(config), load_tokenizer(config, run)
    tasks = read_jsonl(run / "data" / "heldout.jsonl")[: config.bench.tasks]
    print(f"bench: {len(tasks)} held-out tasks, each policy about a minute")
    for name in ("untrained", "pst", "vrl"):
        if name not in stages:
            print(f"  {name}: not trained in this run")
            continue
        origin = stages["vrl"].name if name == "vrl" else name
        if name in results:
            before = results[name]
            if (before["n"], before["from"]) == (len(tasks), origin):
                print(f"  {name}: measured before")
                continue
        policy = load_stage(config, run, name, device, tokenizer)
        figures, _ = evaluate(policy, tokenizer, tasks, config, run, name)
        results[name] = {**figures, "n": len(tasks), "seed": config.seed, "from": origin}
        write_atomic(path, to_json(results))
        write_index(run)
    return results


def print_table(runs: list[dict[str, dict]]) -> None:
    """Print the mean and, over several runs, the spread (sample standard deviation) of each figure.

    `runs`: measure's results, a dict a run. Policies that some run lacks are left out.
    """
    names = [name for name in ("untrained", "pst", "vrl") if all(name in run for run in runs)]
    counts = sorted({run[name]["n"] for run in runs for name in names})
    seeds = sorted({run[names[0]]["seed"] for run in runs})
    print(
        f"\n{len(runs)} run(s), seeds {seeds}, n = {', '.join(map(str, counts))} held-out tasks; "
        "judge: rules; environment: VisGenEnv"
        + ("; mean +- standard deviation over runs" if len(runs) > 1 else "")
    )
    print(f"{'':26}" + "".join(f"{name:>18}" for name in names))
    rows = {name: [dict(rows_of(run[name])) for run in runs] for name in names}
    for label in rows[names[0]][0]:
        # What some run did not measure has no row.
        if not all(label in own for name in names for own in rows[name]):
            continue
        cells = [mean_and_spread([own[label] for own in rows[name]]) for name in names]
        print(f"{label:26}" + "".join(f"{cell:>18}" for cell in cells))


def rows_of(figures: dict) -> Iterator[tuple[str, float | None]]:
    """The table's rows of one policy: (label, value)."""
    for mode in ("greedy", "sampled"):
        if mode in figures:
            yield f"{mode}  R_vrt", figures[mode]["reward"]
            yield f"{mode}  R_vrt > 0.99", figures[mode]["strict"]
            for part in ("plan", "fine", *PARTS):
                yield f"{mode}  R_{part}", figures[mode][part]
    for kind, share in figures["general"].items():
        yield f"exact match  {kind}", share
    yield from reading_rows(figures)


def mean_and_spread(values: list[float | None]) -> str:
    """A cell of the table; a part that applied to no task (None) is left out."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    spread = f" +- {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{spread}"


# ---------------------------------------------------------------------------- the commands
def table_command(arguments: list[str]) -> None:
    """`bench.py --table RUN ...`: the table over runs that are measured."""
    paths = [Path(argument) / "bench" / "results.json" for argument in arguments]
    for path in paths:
        if not path.is_file():
            raise SystemExit(
                f"error: {path} is missing; "
                f"`python bench.py --config ... name={path.parent.parent.name}` makes it"
            )
    runs = []
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as e:
            raise SystemExit(
                f"error: {path} is cut off ({e.msg}); remove it and measure again"
            ) from e
        if not results:
            raise SystemExit(f"error: {path} holds no policy; remove it and measure again")
        runs.append(results)
    print_table(runs)


def controls_command(arguments: list[str]) -> None:
    """`bench.py controls FOLDER`."""
    given, config = scoring_arguments("controls", controls.__doc__, arguments)
    check_folders(given.paths)
    controls(given.paths[0], config, given.n)


def sheet_command(arguments: list[str]) -> None:
    """`bench.py sheet FOLDER [FOLDER ...]`."""
    given, config = scoring_arguments("sheet", export_sheet.__doc__, arguments)
    check_folders(given.paths)
    export_sheet(given.paths, config, given.n)


def calibrate_command(arguments: list[str]) -> None:
    """`bench.py calibrate scores.csv [FOLDER ...]`."""
    given, config = scoring_arguments("calibrate", calibrate.__doc__, arguments)
    check_folders(given.paths[1:])
    calibrate(given.paths[0], given.paths[1:], config.seed)


def human_command(arguments: list[str]) -> None:
    """`bench.py human scores.csv [FOLDER ...]`."""
    given, _ = scoring_arguments("human", human_tables.__doc__, arguments)
    check_folders(given.paths[1:])
    human_tables(given.paths[0], given.paths[1:])


def scoring_arguments(
    command: str, description: str, arguments: list[str]
) -> tuple[argparse.Namespace, Config]:
    """The arguments that the four commands on scores share, and the config they name."""
    parser = argparse.ArgumentParser(
        prog=f"bench.py {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        help="the CSV of scores (calibrate, human), then folders "
        "runs/<name>/bench/<agent>-<subset>",
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
    given = parser.parse_args(arguments)
    if given.n is not None and given.n < 1:
        raise SystemExit(f"error: --n is {given.n}; it must be at least 1")
    return given, load_config(given.config, given.set)


def check_folders(folders: list[Path]) -> None:
    """SystemExit for a folder that `--agent` did not make."""
    for folder in folders:
        if not (folder / "trajectories.jsonl").is_file():
            raise SystemExit(
                f"error: {folder / 'trajectories.jsonl'} is missing; "
                "`python bench.py --config ... --agent ...` makes such folders"
            )


def media_command(arguments: list[str]) -> None:
    """`bench.py media [FOLDER]`."""
    media(arguments, ROOT / "data" / "media")


def transfer_command(arguments: list[str]) -> None:
    """`bench.py transfer`."""
    transfer(arguments, load_stage)


def curves_command(arguments: list[str]) -> None:
    """`bench.py curves`: see lib/curves.py, with which torch comes along."""
    from lib.curves import curves

    curves(arguments)


def try_command(arguments: list[str]) -> None:
    """`bench.py try "REQUEST"`."""
    try_it(arguments, policy_to_try)


def step_command(arguments: list[str]) -> None:
    """`bench.py step RUN N`: see lib/step_page.py, with which torch comes along."""
    from lib.step_page import step_page
    from train_vrl import replay

    step_page(arguments, replay)


COMMANDS = {
    "report": report_command,
    "demo": demo_command,
    "tables": tables,
    "compare": compare,
    "curves": curves_command,
    "step": step_command,
    "try": try_command,
    "ablate": ablate,
    "controls": controls_command,
    "sheet": sheet_command,
    "calibrate": calibrate_command,
    "human": human_command,
    "media": media_command,
    "transfer": transfer_command,
}


def main() -> None:
    """A command of COMMANDS, `--table`, VisGenBench (`--agent`), or the run's own policies."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    arguments = sys.argv[2:]
    if name in COMMANDS:
        COMMANDS[name](arguments)
    elif name == "--table" and arguments:
        table_command(arguments)
    elif name.isalpha():
        raise SystemExit(
            f"error: no command {name!r}; the nearest is `{nearest(name, COMMANDS)}`, and "
            "`python bench.py --help` lists all"
        )
    else:
        measure_run()


def measure_run() -> None:
    """`bench.py --config ... [--agent ...]`: one run's policies, or one agent on VisGenBench."""
    options = [
        (
            "--agent",
            None,
            "VisGenBench: who acts: expert (VisionAgent, scripted), openai (VisionAgent by section "
            "llm), policy (what the run trained)",
        ),
        ("--subset", None, "VisGenBench: 104 (default), a number up to 1200, or heldout"),
        ("--export", None, "write the run's last policy with its card into this new folder"),
    ]
    switches = [
        ("--no-files", "VisGenBench: read the simulator's records, measure no files"),
        ("--sampled", "VisGenBench: the policy plays at temperature 1, not greedy"),
    ]
    config, given = command_line(__doc__, switches, options)
    run = find_run(config)
    if "--agent" in given:
        agent, subset = given["--agent"], given.get("--subset", "104")
        if agent not in ("expert", "openai", "policy"):
            raise SystemExit(f"error: --agent is {agent!r}; expert, openai or policy")
        # Both refuse what cannot be played before the run's folder is made.
        bench_tasks(subset, run)
        if agent == "policy":
            last_policy(config, run)
        open_run(config)
        run_bench(config, run, agent, subset, "--no-files" not in given, "--sampled" in given)
        return
    if not (run / "data" / "done.json").is_file():
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} has no data yet; "
            "`python train_vrl.py --config ...` makes the run"
        )
    if "--export" in given:
        export_policy(config, run, Path(given["--export"]))
        return
    print_table([measure(config, run)])


if __name__ == "__main__":
    run_command(main)
