"""VisGenData's funnel, and all data of one experiment (Sec. 3). VisionAgent is lib/expert.py.

One YAML describes one experiment (configs/*.yaml); lib/experiment.py lists every key. Data go to
runs/<name>/data/: heldout.jsonl and train.jsonl (task requests), visgen.jsonl (expert
trajectories), general.jsonl and general_heldout.jsonl (the general part of PST), base.jsonl and
tokenizer/ (for policies from scratch); done.json has counts.

    python make_data.py --config configs/tiny.yaml       # all of it, for one experiment
    python make_data.py --config configs/tiny.yaml data.queries=200 seed=1
    python make_data.py --keys                           # every config key, default and meaning

The stages of Fig. 3 one by one, by default of configs/visgen.yaml, the paper's scale; each reads
the file of the one before and goes on where it stopped:

    python make_data.py queries                          # queries.jsonl: what users ask
    python make_data.py trajectories                     # trajectories.jsonl: what VisionAgent did
    python make_data.py filter                           # visgen.jsonl; removed.jsonl says why
    python make_data.py review [--verdicts FILE]         # review.html for a human; reads it back
    python make_data.py visgen --queries 20000           # all of them
    python make_data.py statistics | card                # Fig. 5 beside the paper's; a data card
    python make_data.py metacognition                    # VisionAgent with and without it
    python make_data.py bench                            # write data/visgenbench.jsonl again
    python make_data.py example                          # write data/example.jsonl again
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from env import VisGenEnv
from lib.data_statistics import plot_statistics, statistics_of
from lib.experiment import Config, command_line
from lib.expert import METACOGNITION, vision_agent
from lib.general import general_item, make_general
from lib.hub import check_sources, hub_general
from lib.llm_agent import llm_agents
from lib.reading import find_noun, read_request, task_agent
from lib.review import export_review, key_of, read_verdicts
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
    seeded_rng,
    write_atomic,
    write_jsonl,
)
from lib.scenarios import HAN, read_yaml
from lib.tasks import BENCH, difficulty_of, dimension_of, make_bench, make_tasks
from lib.text import fill_template, tag, to_json
from lib.tokenizer import train_tokenizer
from lib.toolbox import load_tools, tool_schemas
from rewards import PARTS, ltr_rewards

# ---------------------------------------------------------------------------- the funnel of Fig. 3
# queries -> trajectories -> LtrReward's filter -> human review -> VisGenData. Every stage reads the
# files of the one before.
TASK_FIELDS = {
    "id",
    "split",
    "modality",
    "scenario",
    "dimension",
    "request",
    "language",
    "inputs",
    "constraints",
    "difficulty",
    "workflow",
    "pool",
}


def make_queries(config: Config, folder: Path) -> list[dict]:
    """Stage 1: queries.jsonl, the task records that VisionAgent is asked; kept if it is there (it
    may be your own). Returns the tasks; a line that is no task record is named and skipped."""
    path = folder / "queries.jsonl"
    if not path.is_file():
        seed = seeded_rng(config.seed, "queries").getrandbits(31)
        write_jsonl(path, make_tasks(config.data.queries, "visgen", config.data, seed))
    tasks = []
    for line, task in each_line(path, numbered=True):
        lacks = sorted(TASK_FIELDS - set(task)) if isinstance(task, dict) else ["everything"]
        if lacks:
            print(f"  {path}, line {line} is no task record: it lacks {', '.join(lacks)}; skipped")
        else:
            tasks.append(task)
    return tasks


def make_trajectories(config: Config, folder: Path) -> None:
    """Stage 2: trajectories.jsonl, what VisionAgent did on each query, with its LtrReward; appended
    as it comes, so a stopped run goes on."""
    path = folder / "trajectories.jsonl"
    tasks = make_queries(config, folder)
    cut_tail(path)
    judged = judged_before(path, tasks) if path.is_file() else set()
    left = [task for task in tasks if task["id"] not in judged]
    if config.data.agent == "openai":
        made, _ = llm_agents(left, config, folder / "agent.jsonl")
        add_rewards(made, [trajectory["pool"] for trajectory in made], config)
        append_jsonl(path, made)
        return
    env = VisGenEnv(config.rollout)
    bar = tqdm(total=len(left), desc="VisionAgent", unit="task", mininterval=1, disable=not left)
    with bar:
        for start in range(0, len(left), 200):
            made, pools = [], []
            for task in left[start : start + 200]:
                seed = seeded_rng(config.seed, "visgen", task["id"]).getrandbits(31)
                mind = mind_of(config, task)
                made.append(vision_agent(task, env, seed, mind, config.data.thoughts))
                pools.append(env.pool)
            add_rewards(made, pools, config)
            append_jsonl(path, made)
            bar.update(len(made))


def mind_of(config: Config, task: dict) -> tuple[str, ...]:
    """The parts of metacognition that VisionAgent has on a task: all, less its lapses."""
    rng = seeded_rng(config.seed, "lapses", task["id"])
    return tuple(part for part in METACOGNITION if rng.random() >= config.data.lapses)


def judged_before(path, tasks):
    """The ids of the trajectories that stand in the file with a reward. What a judge had no verdict
    on is taken out of it, to be played and judged again. SystemExit for another request."""
    requests = {task["id"]: task["request"] for task in tasks}
    unjudged = {}  # task id -> whether its reward is NaN
    for trajectory in each_line(path):
        task = trajectory["task"]
        if requests.get(task["id"], task["request"]) != task["request"]:
            raise SystemExit(
                f"error: {path} has another request for {task['id']} than queries.jsonl; remove it"
                ", or give the run a name of its own"
            )
        unjudged[task["id"]] = math.isnan(trajectory["reward"]["total"])
    if any(unjudged.values()):
        write_jsonl(path, (t for t in each_line(path) if not unjudged[t["task"]["id"]]))
    return {i for i, again in unjudged.items() if not again}


def add_rewards(trajectories, pools, config):
    """Give each trajectory its LtrReward. `pools`: the tools that each could call."""
    rewards = ltr_rewards(trajectories, config.reward, pools, config.llm)
    for trajectory, reward in zip(trajectories, rewards):
        trajectory["reward"] = reward


def sift(trajectories: Iterable[dict], config: Config) -> tuple[dict[str, str], list[dict]]:
    """Stage 3, the algorithmic filter: {id: review.key_of it} of what is kept, in order, and
    records {id, stage, reason} of what goes.
    """
    keys, removed = {}, []
    for trajectory in trajectories:
        i = trajectory["task"]["id"]
        if fault := fault_of(trajectory, config.data):
            stage, reason = fault
            removed.append({"id": i, "stage": stage, "reason": reason})
        else:
            keys[i] = key_of(trajectory)
    return {i: keys[i] for i in sorted(keys)}, removed


def fault_of(trajectory, data):
    """(stage, reason) for which a trajectory is not fit for VisGenData; None if it is. `data`: the
    config's section."""
    reward, min_reward = trajectory["reward"], data.min_reward
    if trajectory["ended"] != "answer":
        return "trajectories", f"no answer ({trajectory['ended']})"
    if math.isnan(reward["total"]):
        return "filter", "the LLM judge gave no verdict; `trajectories` asks it again"
    if reward["total"] < min_reward:
        parts = [part for part in ("plan", *PARTS) if reward[part] is not None]
        worst = min(parts, key=lambda part: reward[part])
        return "filter", f"LtrReward below {min_reward}, lowest in {worst}"
    # Short thoughts look at nothing, so a flaw is no fault of theirs.
    if data.thoughts == "full" and hands_over_flaw(trajectory):
        return "filter", "a flaw in what is handed over, as a VLM-Grader would see"
    return None


def hands_over_flaw(trajectory):
    """Whether a picture, film or recording that is handed over has a flaw. False without answer."""
    handed = (trajectory["answer"] or {"deliverables": ()})["deliverables"]
    return any(a.get("flawed") and a["id"] in handed for a in trajectory["artifacts"])


def make_visgen(config: Config, folder: Path) -> dict:
    """Stage 4 and the result: visgen.jsonl (whole trajectories), chat.jsonl (messages and tools
    alone), removed.jsonl, funnel.json. Returns the counts.

    What no human has judged is labelled unreviewed; nothing else is claimed about it.
    """
    path, verdict_path = folder / "trajectories.jsonl", folder / "verdicts.jsonl"
    kept, removed = sift(each_line(path), config)
    removed += without_trajectory(config, folder, {*kept, *(record["id"] for record in removed)})
    verdicts = read_verdicts(verdict_path, kept) if verdict_path.is_file() else {}
    dropped = [i for i in kept if i in verdicts and verdicts[i]["verdict"] == "drop"]
    for i in dropped:
        reason = f"dropped by a human: {verdicts[i]['reason'] or 'no reason given'}"
        removed.append({"id": i, "stage": "review", "reason": reason})

    wanted = set(kept).difference(dropped)
    # One at a time: 20,000 trajectories are several GB in memory.
    write_jsonl(folder / "visgen.jsonl", kept_records(path, wanted, verdicts, config))
    write_jsonl(folder / "chat.jsonl", map(chat_record, each_line(folder / "visgen.jsonl")))
    write_jsonl(folder / "removed.jsonl", removed)

    gone = Counter(record["stage"] for record in removed)
    queries = len(wanted) + len(removed)
    answered = queries - gone["trajectories"]
    counts = {
        "queries": queries,
        "reviewed": len(verdicts),
        "reasons": Counter(f"{record['stage']}: {record['reason']}" for record in removed),
        "answered": answered,
        "candidates": answered - gone["filter"],
        "kept": len(wanted),
    }
    write_atomic(folder / "funnel.json", to_json(counts))
    return counts


def kept_records(path, wanted, verdicts, config):
    """The trajectories that are kept, each with its tools' schemas and who reviewed it."""
    for trajectory in each_line(path):
        i = trajectory["task"]["id"]
        if i in wanted:
            review = "kept by a human" if i in verdicts else "unreviewed"
            tools = listed_tools(trajectory, config.rollout)
            yield {**trajectory, "tools": tools, "review": review}


def without_trajectory(config, folder, seen):
    """Records of removal for the queries that VisionAgent has not played."""
    by_llm = config.data.agent == "openai"
    reason = "no reply from the LLM's endpoint" if by_llm else "no trajectory yet"
    return [
        {"id": task["id"], "stage": "trajectories", "reason": reason}
        for task in make_queries(config, folder)
        if task["id"] not in seen
    ]


def listed_tools(trajectory, rollout):
    """The JSON Schemas of the tools that the agent was given; None where the chat template does not
    list them."""
    if rollout.tools != "schema":
        return None
    if trajectory.get("pool"):
        return tool_schemas(trajectory["pool"])
    if rollout.tool_pool == "task":
        return tool_schemas(trajectory["task"]["pool"])
    return tool_schemas(list(load_tools()))


def chat_record(trajectory: dict) -> dict:
    """{"messages", "tools"} as `datasets`, TRL's SFTTrainer and the OpenAI API take it.

    They want tool replies to answer calls of their own format, and UTPC's calls are text, so a
    reply goes back as the user's text, in the tags that Qwen's template gives it.
    """
    messages = []
    for message in trajectory["messages"]:
        if message["role"] != "tool":
            messages.append({"role": message["role"], "content": message["content"]})
            continue
        response = tag("tool_response", message["content"])
        if messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + response
        else:
            messages.append({"role": "user", "content": response})
    return {"messages": messages, **({"tools": trajectory["tools"]} if trajectory["tools"] else {})}


# ---------------------------------------------------------------------------- metacognition
def metacognition(config: Config, run: Path, n: int = 1000) -> None:
    """What metacognition is worth (Sec. 3.1): success of VisionAgent with it, without it, and
    without each part of it, on the same n requests, which no other split uses by its seed.

    Success: an answer that meets every constraint that the request states (R_result 1). `flawed`:
    the share that hands over a medium with a flaw, which breaks no wish. Written to
    metacognition.json and printed beside the paper's figures.
    """
    seed = seeded_rng(config.seed, "metacognition").getrandbits(31)
    tasks = make_tasks(n, "visgen", config.data, seed)
    arms = {"with metacognition": METACOGNITION}
    for part in METACOGNITION:
        arms[f"without {part}"] = tuple(other for other in METACOGNITION if other != part)
    arms["thinking alone"] = ()
    rows = []
    env = VisGenEnv(config.rollout)
    for name, mind in arms.items():
        made, pools = [], []
        for task in tqdm(tasks, desc=name):
            seed = seeded_rng(config.seed, "metacognition", task["id"]).getrandbits(31)
            made.append(vision_agent(task, env, seed, mind, config.data.thoughts))
            pools.append(env.pool)
        rewards = ltr_rewards(made, config.reward, pools, config.llm)
        rows.append(
            {
                "agent": name,
                "n": n,
                "success": sum(reward["result"] > 1 - 1e-9 for reward in rewards) / n,
                "flawed": sum(map(hands_over_flaw, made)) / n,
                "reward": sum(reward["total"] for reward in rewards) / n,
                "calls": sum(len(trajectory["calls"]) for trajectory in made) / n,
            }
        )
    write_atomic(run / "metacognition.json", to_json(rows))
    scale = config.rollout.failure_scale
    print(fill_template("templates/metacognition.jinja", rows=rows, scale=scale))


# ---------------------------------------------------------------------------- examples
EXAMPLES = ROOT / "data" / "example.jsonl"


def make_examples(config: Config) -> list[dict]:
    """The trajectories of data/examples.yaml's requests, each with its reward and its `lesson`. The
    tools are listed by name, so that they can be read."""
    env = VisGenEnv(replace(config.rollout, tools="names"))
    examples = []
    for example in read_yaml("examples.yaml"):
        trajectory = vision_agent(example_task(example), env, example["seed"])
        pool = {"pool": env.pool, "lesson": example["lesson"]}
        examples.append(trajectory | pool)
    add_rewards(examples, [trajectory["pool"] for trajectory in examples], config)
    return examples


def example_task(example: dict) -> dict:
    """The task record of a request that was written by hand."""
    request = example["request"]
    c = read_request(request)
    workflow, pool = task_agent(request)
    language = "zh" if HAN.search(request) else "en"
    return {
        "id": example["id"],
        "split": "example",
        "modality": "image" if c["images"] else "video",
        "scenario": find_noun(request, language)[1],
        "dimension": dimension_of(c),
        "request": request,
        "language": language,
        "inputs": [],
        "constraints": c,
        "difficulty": difficulty_of(c),
        "workflow": workflow,
        "pool": pool,
    }


def write_examples(config: Config) -> None:
    """Write data/example.jsonl."""
    examples = make_examples(config)
    write_jsonl(EXAMPLES, examples)
    for example in examples:
        print(f"  {example['task']['id']}: R_vrt {example['reward']['total']:.3f}")
    print(f"{EXAMPLES}: {len(examples)} trajectories; `python bench.py demo` shows them")


# ---------------------------------------------------------------------------- an experiment's data
def ensure_data(config: Config, run: Path) -> None:
    """Make runs/<name>/data/ if it is not there whole; each file is written whole or not at all.
    SystemExit if no trajectory is good enough."""
    folder, data = run / "data", config.data
    if (folder / "done.json").is_file():
        return
    start = time.time()
    print(
        f"data: {data.queries} queries, {data.general} general examples, {data.heldout_tasks} "
        f"held-out tasks -> {folder.relative_to(ROOT)} (about a minute)",
        flush=True,
    )
    for split, n in (("heldout", data.heldout_tasks), ("train", data.train_tasks)):
        seed = seeded_rng(config.seed, split).getrandbits(31)
        write_jsonl(folder / f"{split}.jsonl", make_tasks(n, split, data, seed))
    make_trajectories(config, folder)
    counts = make_visgen(config, folder)
    visgen = read_jsonl(folder / "visgen.jsonl")
    if not visgen:
        raise SystemExit(
            "error: no trajectory passed `data.min_reward`; lower it or raise `data.queries`"
        )
    general = write_general(config, folder)
    if not config.model.path:
        make_tokenizer(visgen, general, config.model.vocab_size, folder)
    tools_used = len({call["name"] for trajectory in visgen for call in trajectory["calls"]})
    counts |= {
        "general": len(general),
        "seconds": round(time.time() - start, 1),
        "tools_used": tools_used,
    }
    print(
        f"  funnel: {counts['queries']} queries -> {counts['answered']} answered -> "
        f"{counts['kept']} kept by LtrReward >= {data.min_reward} (no human review, unreviewed); "
        f"{tools_used} tools used; {counts['seconds']} s"
    )
    write_atomic(folder / "done.json", to_json(counts))


def write_general(config, folder):
    """Write general.jsonl (PST's general part), base.jsonl (words to copy, then other general
    examples, for a base policy from scratch), general_heldout.jsonl; returns the general part."""
    if config.data.general_source == "offline":
        general = make_general(config, config.data.general, "train")
    else:
        general = hub_general(config)
    write_jsonl(folder / "general.jsonl", general)
    rng = seeded_rng(config.seed, "base")
    base = [general_item(rng, "copy", config.data) for _ in range(config.model.base_examples)]
    base += make_general(config, config.model.base_general, "train", "base")
    write_jsonl(folder / "base.jsonl", base)
    heldout = make_general(config, config.data.general_heldout, "heldout")
    write_jsonl(folder / "general_heldout.jsonl", heldout)
    return general


def make_tokenizer(visgen, general, vocab_size, folder):
    """tokenizer/, trained on VisGenData and as many general examples; what stands in fewer than one
    of 40 trajectories is rare."""
    texts = [
        f"{message['role']}\n{message['content']}"
        for trajectory in visgen
        for message in trajectory["messages"]
    ]
    texts += [
        f"{to_json(item['tools'])}\n{message['content']}"
        for item in general[: len(visgen)]
        for message in item["messages"]
    ]
    train_tokenizer(texts, len(visgen) // 40, vocab_size, folder / "tokenizer")


# ---------------------------------------------------------------------------- commands
COMMANDS = (
    "queries",
    "trajectories",
    "filter",
    "review",
    "visgen",
    "statistics",
    "card",
    "bench",
    "example",
    "metacognition",
)

# Commands on data that are there -> the file that they read. The run's own config.yaml is theirs.
SOURCES = {
    "filter": "trajectories.jsonl",
    "review": "trajectories.jsonl",
    "statistics": "visgen.jsonl",
    "card": "visgen.jsonl",
}


def need_file(path: Path, config: Config) -> None:
    """SystemExit if the file of an earlier stage is missing."""
    if not path.is_file():
        stage = "trajectories" if path.name == "trajectories.jsonl" else "visgen"
        raise SystemExit(
            f"error: {path} is missing; `python make_data.py {stage} name={config.name}` makes it"
        )


def review(config: Config, folder: Path, file: str | None) -> None:
    """Take in a verdict file that the sheet saved, if one is given, and write a sheet of what
    nobody has judged yet."""
    kept, _ = sift(each_line(folder / "trajectories.jsonl"), config)
    path = folder / "verdicts.jsonl"
    if file:
        verdicts = read_verdicts(Path(file), kept)
        append_jsonl(path, [{"id": i, **verdict} for i, verdict in verdicts.items()])
    judged = read_verdicts(path, kept) if path.is_file() else {}
    export_review(config, folder, [i for i in kept if i not in judged])


def write_bench() -> None:
    """Write data/visgenbench.jsonl, which is fixed: whoever changes words or rules gives it a new
    version."""
    tasks = make_bench()
    write_jsonl(BENCH, tasks)
    print(f"{BENCH}: {len(tasks)} tasks, {sum(t['in_104'] for t in tasks)} of them VisGenBench-104")


def print_endings(path):
    """How many trajectories ended how."""
    endings = Counter(trajectory["ended"] for trajectory in each_line(path))
    print(f"{path}: {', '.join(f'{n} ended with {end}' for end, n in endings.items())}")


def print_funnel(config, folder):
    """Make VisGenData and print what was removed at each stage."""
    counts = make_visgen(config, folder)
    print(fill_template("templates/funnel.jinja", folder=folder, config=config, **counts))


def print_statistics(config, folder, template):
    """Fig. 5's figures, with the picture in statistics.png, or the data card; both printed."""
    found = statistics_of(folder)
    if template == "statistics":
        plot_statistics(found, folder / "statistics.png")
    counts = json.loads((folder / "funnel.json").read_text(encoding="utf-8"))
    path = f"templates/{template}.jinja"
    print(fill_template(path, folder=folder, config=config, counts=counts, **found))


def take_command():
    """The command among the arguments, taken out of them; "" without one. SystemExit for a word in
    its place that is none."""
    for argument in sys.argv[1:]:
        if argument in COMMANDS:
            sys.argv.remove(argument)
            return argument
    if sys.argv[1:] and sys.argv[1].isalpha():
        raise SystemExit(
            f"error: no command {sys.argv[1]!r}; the nearest is `{nearest(sys.argv[1], COMMANDS)}`;"
            f" commands: {', '.join(COMMANDS)}; without one, all data of a config are made"
        )
    return ""


def main() -> None:
    """Make all data of one experiment, or run one stage of the funnel (see the file's top)."""
    command = take_command()
    options = [
        ("--queries", "data.queries", "data.queries, in short"),
        ("--verdicts", None, "a file that the review sheet saved (command review)"),
    ]
    default = "visgen.yaml" if command else "tiny.yaml"
    config, given = command_line(
        __doc__, options=options, default=default, of_run=command in SOURCES
    )
    if "--verdicts" in given and command != "review":
        raise SystemExit("error: --verdicts belongs to `python make_data.py review`")
    if command == "bench":
        write_bench()
        return
    if command == "example":
        write_examples(config)
        return

    run = find_run(config)
    folder = run / "data"
    if command in SOURCES:
        need_file(folder / SOURCES[command], config)
    else:
        if not command and not (folder / "done.json").is_file():
            check_sources(config)
        open_run(config)
    if command == "queries":
        print(f"{folder / 'queries.jsonl'}: {len(make_queries(config, folder))} queries")
    if command in ("trajectories", "visgen"):
        make_trajectories(config, folder)
        print_endings(folder / "trajectories.jsonl")
    if command in ("review", "visgen"):
        review(config, folder, given.get("--verdicts"))
    if command in ("filter", "review", "visgen"):
        print_funnel(config, folder)
    if command in ("statistics", "visgen"):
        print_statistics(config, folder, "statistics")
    if command == "card":
        print_statistics(config, folder, "card")
    if command == "metacognition":
        metacognition(config, run)
    if not command:
        ensure_data(config, run)
        print(f"data are in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    run_command(main)
