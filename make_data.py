"""Tasks, VisionAgent, VisGenData, the general mix and the tokenizer (Sec. 3).

One YAML describes one experiment (configs/*.yaml); lib/experiment.py lists every key with its default and meaning.
Data go to runs/<name>/data/: heldout.jsonl and train.jsonl (task requests), visgen.jsonl (expert trajectories),
general.jsonl and general_heldout.jsonl (the general part of PST), base.jsonl and tokenizer/ (policies from scratch); done.json has counts.

    python make_data.py --config configs/tiny.yaml              # all of it, for one experiment
    python make_data.py --config configs/tiny.yaml data.queries=200 seed=1
    python make_data.py --keys                                  # every config key, default and meaning

The stages of Fig. 3 one by one, by default of configs/visgen.yaml, the paper's scale; each reads the file of the one before and goes on where it stopped:

    python make_data.py queries | trajectories | filter         # queries.jsonl, trajectories.jsonl, visgen.jsonl with the reasons of removal
    python make_data.py review [--verdicts FILE]                # review.html for a human; reads back what it saved
    python make_data.py visgen --queries 20000                  # all of them
    python make_data.py statistics | card                       # Fig. 5 beside the paper's figures; a data card
    python make_data.py metacognition                           # VisionAgent with and without it
    python make_data.py bench                                   # write data/visgenbench.jsonl again
"""

import json
import math
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import yaml
from tqdm import tqdm

from env import VisGenEnv
from lib.experiment import command_line
from lib.figures import BENCH, plot_statistics, statistics_of
from lib.general import general_item, make_general
from lib.hub import hub_general
from lib.llm_agent import llm_agents
from lib.review import export_review, key_of, read_verdicts
from lib.runs import (
    ROOT,
    append_jsonl,
    cut_tail,
    each_line,
    open_run,
    read_jsonl,
    seeded_rng,
    write_atomic,
    write_jsonl,
)
from lib.tasks import HAN, facts_of, make_bench, make_tasks, read_request
from lib.text import fill_template, tag, to_json
from lib.tokenizer import train_tokenizer
from lib.toolbox import clip_lengths, load_tools, makes, tool_schemas
from lib.workflows import clip_seconds, expand_workflow, fitting_workflows, n_shots
from rewards import PARTS, ltr_rewards


@lru_cache(maxsize=1)
def load_voice():
    """data/voice.yaml: how the scripted MetaAgent words its thinking."""
    return yaml.safe_load((ROOT / "data" / "voice.yaml").read_text(encoding="utf-8"))


def route_of(c, steps):
    """MetaAgent's reasoning about clip lengths: '2 clips of 8 s make 16 s, trim to 15.'"""
    clip = next((clip_lengths(s["tool"]) for s in steps if s["key"] == "clip"), None)
    if not clip:
        return "One call." if len(steps) == 1 else f"{len(steps)} steps."
    shots, seconds = n_shots(c), clip_seconds(c, clip)
    trim = "".join(
        f", {s['key']} to {c['duration_s']}" for s in steps if s["key"] in ("trim", "speed")
    )
    return f"{shots} x {seconds} = {shots * seconds} s{trim}."


GPT_SIZES = {"1:1": "1024x1024", "3:2": "1536x1024", "2:3": "1024x1536", None: "1024x1024"}


def call_arguments(step, c, made, fed, voice, rng):
    """Arguments of a plan step's call. `made`: step key -> ids that came back; `fed`: ids from the steps that this one follows."""
    tool, key_, i = step["tool"], step["key"], step["index"]
    look = c["subject"] + (f", {c['style']}" if c["style"] else "")
    # Optional arguments are written only where the request asks for something.
    aspect = {"aspect_ratio": c["aspect_ratio"]} if c["aspect_ratio"] else {}
    several = {"n": step["expect"]} if step["expect"] > 1 else {}
    film = [
        *made.get("caption", []),
        *made.get("voice", []),
        *made.get("speed", []),
        *made.get("trim", []),
        *made.get("join", []),
        *made.get("clip", []),
    ]
    if key_ in ("image", "large", "ref", "frame", "cutout") and tool.startswith("tool_text2image"):
        prompt = f"{look}, {voice['views'][i % len(voice['views'])]}" if key_ == "frame" else look
        if tool == "tool_text2image_gpt":
            return {
                "prompt": prompt,
                "size": GPT_SIZES[c["aspect_ratio"]],
                **several,
                "background": "transparent",
            }
        large = {"size": "2K"} if tool == "tool_text2image_seed" and c["resolution"] == "2K" else {}
        return {"prompt": prompt, **large, **aspect, **several}
    if key_ in ("edit", "frame", "restyle"):
        source = made.get("image") or made.get("ref") or ["in_1"]
        prompt = (
            look
            if key_ == "restyle"
            else f"same subject, {voice['views'][i % len(voice['views'])]}"
        )
        return {
            "images": source[:1],
            "prompt": prompt,
            **(aspect if key_ == "restyle" else {}),
            **several,
        }
    if key_ == "clip":
        seconds = clip_seconds(c, clip_lengths(tool))
        if tool == "tool_image2video_keling":
            return {
                "image": fed[0],
                "prompt": voice["motions"][i % len(voice["motions"])],
                "duration": seconds,
                **({"mode": "pro"} if c["resolution"] == "1080p" else {}),
            }
        view = f", {voice['views'][i % len(voice['views'])]}" if n_shots(c) > 1 else ""
        return {
            "prompt": look + view,
            "duration": seconds,
            **aspect,
            **({"resolution": "1080p"} if c["resolution"] else {}),
            **several,
        }
    if key_ == "board":
        return {"script": c["subject"], "n_shots": c["images"]}
    if key_ == "page":
        return {
            "title": c["subject"],
            "sections": [
                {"heading": c["subject"], "media_ids": made["image"] + made.get("edit", [])}
            ],
        }
    if key_ == "music":
        return {"prompt": rng.choice(voice["music"])}
    if key_ == "sfx":
        return {
            "prompt": rng.choice(voice["sfx"]),
            "duration": min(30, c["duration_s"] or n_shots(c) * 5),
        }
    if key_ == "beat":
        return {"audio": made["music"][0]}
    if key_ == "join":
        sound = made.get("music") or made.get("sfx")
        return {"videos": made["clip"], **({"audio": sound[0]} if sound else {})}
    if key_ == "trim":
        return {"video": film[0], "start": 0, "end": c["duration_s"]}
    if key_ == "speed":
        return {"video": film[0], "target_duration": c["duration_s"]}
    if key_ == "voice":
        return {
            "video": film[0],
            "text": f"这是{c['subject']}。"
            if HAN.search(c["subject"])
            else f"This is {c['subject']}.",
        }
    return {
        "video": film[0],
        "subtitles": [{"start": 0, "end": 2, "text": c["subject"]}],
    }  # caption


def jobs_at_once(tool):
    """How many calls of a tool its service documents to run side by side (infinite where tools.yaml has no such limit)."""
    return min(
        (limit["jobs"] for limit in load_tools()[tool].get("limits", []) if "jobs" in limit),
        default=math.inf,
    )


def as_asked(reply, c):
    """Whether a tool's reply on a picture or film has the seconds and the shape that the request asks for, within 5 %; what it does not say passes."""
    width, height = map(int, reply.get("size", "1x1").split("x"))
    across, down = map(int, (c["aspect_ratio"] or f"{width}:{height}").split(":"))
    seconds = c["duration_s"] and reply.get("duration_s")
    return abs(width * down / (height * across) - 1) <= 0.05 and (
        not seconds or abs(seconds / c["duration_s"] - 1) <= 0.05
    )


METACOGNITION = ("plan check", "recovery", "verification")


def vision_agent(task, env, seed, mind=METACOGNITION):
    """Run the scripted VisionAgent on one task in VisGenEnv and return its trajectory (Sec. 3.1).

    All steps whose inputs are there are called in one turn. Metacognition is what `mind` holds (the paper names none of it in detail; ours):
    plan check: the clips' lengths are added up and held against the request, so that a step trims them or speeds them up, and no more jobs
    are begun in one turn than the service documents;
    recovery: errors are met by class: a retryable call is made up to three times in all, anything else moves the step to the workflow's
    next tool, with a revised plan; without it every failed call is repeated once; a step that still fails ends the work;
    verification: what came back is counted, a step that brought less than it should is carried on, and the answer says so where seconds, shape or
    number are not what was asked; without it any result will do.
    """
    rng, voice = seeded_rng(seed, "agent", task["id"]), load_voice()
    messages, _ = env.reset(task, seed)
    c = read_request(messages[-1]["content"])
    workflow = fitting_workflows(c)[0]
    steps = expand_workflow(workflow, c)
    clip = next((clip_lengths(s["tool"]) for s in steps if s["key"] == "clip"), None)
    if (
        clip and "plan check" not in mind
    ):  # whatever length the clips come to passes for the length asked for
        steps = expand_workflow(
            workflow, {**c, "shots": n_shots(c), "duration_s": n_shots(c) * clip_seconds(c, clip)}
        )
    for s in steps:
        many = {
            "image": c["images"] if not any(t["key"] == "edit" for t in steps) else 1,
            "large": c["images"],
            "cutout": c["images"],
            "edit": c["images"] - 1,
            "restyle": c["images"],
            "clip": max(1, c["videos"]),
        }
        s["expect"], s["tries"], s["ids"] = many.get(s["key"], 1), 0, []
    plan = [{k: s[k] for k in ("id", "tool", "goal", "after")} for s in steps]
    facts, blocks, open_steps = facts_of(c), [], list(steps)
    think = rng.choice(voice["start"]).format(facts=facts, route=route_of(c, steps))
    done, replied = set(), {}
    while True:
        ready = [s for s in open_steps if set(s["after"]) <= done]
        if not ready:
            break
        if "plan check" in mind:
            ready = [
                s
                for i, s in enumerate(ready)
                if sum(t["tool"] == s["tool"] for t in ready[:i]) < jobs_at_once(s["tool"])
            ]
        blocks = [tag("think", think)] + ([tag("plan", plan)] if plan else []) + blocks
        made = {}
        for s in steps:
            made.setdefault(s["key"], []).extend(s["ids"])
        made = {k: v for k, v in made.items() if v}
        calls = [
            {
                "name": s["tool"],
                "arguments": call_arguments(
                    s, c, made, [i for a in s["after"] for i in steps[a - 1]["ids"]], voice, rng
                ),
            }
            for s in ready
        ]
        replies, _, terminated, truncated, _ = env.step(
            "\n".join(blocks + [tag("tool_call", call) for call in calls])
        )
        if terminated or truncated:
            return env.trajectory()
        plan, blocks, trouble = None, [], None
        for s, reply in zip(ready, map(lambda m: json.loads(m["content"]), replies)):
            s["tries"] += 1
            if "error" in reply:
                retry, others = s["tries"] < 2, []
                if "recovery" in mind:
                    retry, others = (
                        reply["error"]["retryable"] and s["tries"] < 3,
                        s["tools"][s["tools"].index(s["tool"]) + 1 :],
                    )
                trouble = (reply["error"]["code"], "retry" if retry else "switch")
                if not retry and others:
                    s["tool"], s["tries"] = others[0], 0
                    plan = [{k: t[k] for k in ("id", "tool", "goal", "after")} for t in steps]
                elif not retry:
                    open_steps.clear()
                continue
            s["ids"] += reply["ids"][:1] if s["key"] == "music" else reply["ids"]
            replied.update(dict.fromkeys(reply["ids"], reply))
            s["expect"] -= len(reply["ids"])
            if (
                s["expect"] <= 0 or "verification" not in mind
            ) and s in open_steps:  # a partial result leaves the rest of the step open
                done.add(s["id"])
                open_steps.remove(s)
        upcoming = [s for s in open_steps if set(s["after"]) <= done]
        names = ", ".join(i for s in ready for i in s["ids"]) or "nothing"
        if trouble:
            think = rng.choice(voice["error"]).format(
                error=trouble[0], move=voice["moves"][trouble[1]]
            )
        else:
            think = rng.choice(voice["next"]).format(
                made=names,
                next=", ".join(dict.fromkeys(s["goal"].split(" of ")[0] for s in upcoming)),
            )
    kind = "image" if c["images"] else "video"
    groups = [s["ids"] for s in steps if makes(s["tool"]) == kind and s["ids"]]
    ids = [i for group in (groups if kind == "image" else groups[-1:]) for i in group]
    whole = len(done) == len(steps) and (
        "verification" not in mind or all(as_asked(replied[i], c) for i in ids)
    )
    made = ", ".join(ids) or "nothing"
    think = rng.choice(voice["done" if whole else "short"]).format(made=made, facts=facts)
    pages = [i for s in steps if s["key"] == "page" for i in s["ids"]]
    env.step(
        "\n".join(
            [
                tag("think", think),
                tag(
                    "answer",
                    {
                        "deliverables": ids + pages,
                        "summary": rng.choice(voice["summary" if whole else "part"]).format(
                            made=made, facts=facts
                        ),
                    },
                ),
            ]
        )
    )
    return env.trajectory()


# ---------------------------------------------------------------------------------------------------------------------
# The funnel of Fig. 3: queries -> trajectories -> LtrReward's filter -> human review -> VisGenData. Every stage reads the files of the one before
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


def make_queries(config, folder):
    """Stage 1: queries.jsonl, the task records that VisionAgent is asked; kept if it is there (it may be your own). Returns the tasks."""
    path, n = folder / "queries.jsonl", config.data.queries
    if not path.is_file():
        write_jsonl(
            path,
            make_tasks(
                n, "visgen", config.data, seeded_rng(config.seed, "queries").getrandbits(31)
            ),
        )
    tasks = []
    for line, task in each_line(path, numbered=True):
        lacks = sorted(TASK_FIELDS - set(task)) if isinstance(task, dict) else ["everything"]
        if lacks:
            print(f"  {path}, line {line} is no task record: it lacks {', '.join(lacks)}; skipped")
        else:
            tasks.append(task)
    return tasks


def make_trajectories(config, folder):
    """Stage 2: trajectories.jsonl, what VisionAgent did on each query and LtrReward; appended as it comes, so a stopped run goes on."""
    path, tasks, made, env = (
        folder / "trajectories.jsonl",
        make_queries(config, folder),
        {},
        VisGenEnv(config.rollout),
    )
    cut_tail(path)
    if path.is_file():
        asked = {task["id"]: task["request"] for task in tasks}
        for t in each_line(path):
            if asked.get(t["task"]["id"], t["task"]["request"]) != t["task"]["request"]:
                raise SystemExit(
                    f"error: {path} has another request for {t['task']['id']} than queries.jsonl; remove it, or give the run a name of its own"
                )
            made |= {t["task"]["id"]: math.isnan(t["reward"]["total"])}
        if any(made.values()):  # what a judge had no verdict on is played and judged again
            write_jsonl(path, (t for t in each_line(path) if not made[t["task"]["id"]]))
    left = [task for task in tasks if made.get(task["id"], True)]
    if config.data.agent == "openai":
        some, _ = llm_agents(left, config, folder / "agent.jsonl")
        for trajectory, reward in zip(
            some, ltr_rewards(some, config.reward, [t["pool"] for t in some], config.llm)
        ):
            trajectory["reward"] = reward
        return append_jsonl(path, some)
    with tqdm(
        total=len(left), desc="VisionAgent", unit="task", mininterval=1, disable=not left
    ) as bar:
        for at in range(0, len(left), 200):
            some, pools = [], []
            for task in left[at : at + 200]:
                some.append(
                    vision_agent(
                        task, env, seeded_rng(config.seed, "visgen", task["id"]).getrandbits(31)
                    )
                )
                pools.append(env.pool)
            for trajectory, reward in zip(
                some, ltr_rewards(some, config.reward, pools, config.llm)
            ):
                trajectory["reward"] = reward
            append_jsonl(path, some)
            bar.update(len(some))


def sift(trajectories, config):
    """Stage 3, the algorithmic filter: {id: review.key_of it} of what is kept, in order, and rows {id, stage, reason} of what goes.

    What LtrReward passes is thinned out to `data.per_type` a task type: first one trajectory of each plan, then a second of each, and so on,
    so that rare plans stay and common ones do not fill the data (ours; the paper keeps 6k of 16k by LtrReward and VLM-Grader).
    """
    passed, removed, alike, keys = {}, [], Counter(), {}
    for t in trajectories:
        task, reward = t["task"], t["reward"]
        plan = (
            task["scenario"],
            to_json([(step["tool"], step["after"]) for step in t["plan"] or []]),
        )
        if t["ended"] != "answer":
            removed.append(
                {"id": task["id"], "stage": "trajectories", "reason": f"no answer ({t['ended']})"}
            )
        elif math.isnan(reward["total"]):
            removed.append(
                {
                    "id": task["id"],
                    "stage": "filter",
                    "reason": "the LLM judge gave no verdict; `trajectories` asks it again",
                }
            )
        elif reward["total"] < config.data.min_reward:
            worst = min(
                (p for p in ("plan", *PARTS) if reward[p] is not None), key=lambda p: reward[p]
            )
            removed.append(
                {
                    "id": task["id"],
                    "stage": "filter",
                    "reason": f"LtrReward below {config.data.min_reward}, lowest in {worst}",
                }
            )
        else:
            alike[plan] += 1
            keys[task["id"]] = key_of(t)
            passed.setdefault(task["scenario"], []).append(
                (alike[plan], len(passed.get(task["scenario"], [])), task["id"])
            )
    most, extra = config.data.per_type, set()
    for rows in passed.values():
        extra |= {i for _, _, i in sorted(rows)[most:]} if most else set()
    kept = sorted(i for rows in passed.values() for _, _, i in rows if i not in extra)
    removed += [
        {
            "id": i,
            "stage": "filter",
            "reason": f"{most} of its task type stay, and enough of them have its plan",
        }
        for i in sorted(extra)
    ]
    return {i: keys[i] for i in kept}, removed


def make_visgen(config, folder):
    """Stage 4 and the result: visgen.jsonl (whole trajectories), chat.jsonl (messages and tools alone), removed.jsonl, funnel.json. Returns the counts.

    What no human has judged is labelled unreviewed; nothing else is claimed about it.
    """
    path, verdict_path = folder / "trajectories.jsonl", folder / "verdicts.jsonl"
    kept, removed = sift(each_line(path), config)
    seen = {*kept, *(r["id"] for r in removed)}
    absent = (
        "no reply from the LLM's endpoint" if config.data.agent == "openai" else "no trajectory yet"
    )
    removed += [
        {"id": task["id"], "stage": "trajectories", "reason": absent}
        for task in make_queries(config, folder)
        if task["id"] not in seen
    ]
    verdicts = read_verdicts(verdict_path, kept) if verdict_path.is_file() else {}
    dropped = {i for i in kept if verdicts.get(i, {}).get("verdict") == "drop"}
    removed += [
        {
            "id": i,
            "stage": "review",
            "reason": f"dropped by a human: {verdicts[i]['reason'] or 'no reason given'}",
        }
        for i in kept
        if i in dropped
    ]
    wanted, listed, visgen = set(kept) - dropped, config.rollout.tools == "schema", []
    for t in (t for t in each_line(path) if t["task"]["id"] in wanted):
        pool = t.get("pool") or (
            t["task"]["pool"] if config.rollout.tool_pool == "task" else list(load_tools())
        )
        visgen.append(
            {
                **t,
                "tools": tool_schemas(pool) if listed else None,
                "review": "kept by a human" if t["task"]["id"] in verdicts else "unreviewed",
            }
        )
    write_jsonl(folder / "visgen.jsonl", visgen)
    write_jsonl(folder / "chat.jsonl", map(chat_record, visgen))
    write_jsonl(folder / "removed.jsonl", removed)
    gone = Counter(r["stage"] for r in removed)
    counts = {
        "queries": len(kept) - len(dropped) + len(removed),
        "reviewed": len(verdicts),
        "reasons": Counter(f"{r['stage']}: {r['reason']}" for r in removed),
    }
    counts["answered"] = counts["queries"] - gone["trajectories"]
    counts |= {"candidates": counts["answered"] - gone["filter"], "kept": len(visgen)}
    write_atomic(folder / "funnel.json", to_json(counts))
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# What metacognition is worth (Sec. 3.1)
def metacognition(config, run, n=1000):
    """Success of VisionAgent with and without metacognition, and without each part, on the same n requests, which no other split uses by its seed.

    Success: an answer that meets every constraint that the request states (R_result 1). Written to metacognition.json beside the paper's figures."""
    tasks, env, rows = (
        make_tasks(
            n, "visgen", config.data, seeded_rng(config.seed, "metacognition").getrandbits(31)
        ),
        VisGenEnv(config.rollout),
        [],
    )
    arms = {
        "with metacognition": METACOGNITION,
        **{
            f"without {part}": tuple(p for p in METACOGNITION if p != part)
            for part in METACOGNITION
        },
        "thinking alone": (),
    }
    for name, mind in arms.items():
        made = [
            (
                vision_agent(
                    task,
                    env,
                    seeded_rng(config.seed, "metacognition", task["id"]).getrandbits(31),
                    mind,
                ),
                env.pool,
            )
            for task in tqdm(tasks, desc=name)
        ]
        rewards = ltr_rewards(
            [t for t, _ in made], config.reward, [pool for _, pool in made], config.llm
        )
        rows.append(
            {
                "agent": name,
                "n": n,
                "success": sum(r["result"] > 1 - 1e-9 for r in rewards) / n,
                "reward": sum(r["total"] for r in rewards) / n,
                "calls": sum(len(t["calls"]) for t, _ in made) / n,
            }
        )
    write_atomic(run / "metacognition.json", to_json(rows))
    print(
        fill_template(
            "templates/metacognition.jinja", rows=rows, scale=config.rollout.failure_scale
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Commands
COMMANDS = (
    "queries",
    "trajectories",
    "filter",
    "review",
    "visgen",
    "statistics",
    "card",
    "bench",
    "metacognition",
)


def ensure_data(config, run):
    """Make runs/<name>/data/ if it is not there whole; each file is written whole or not at all."""
    folder, data = run / "data", config.data
    if (folder / "done.json").is_file():
        return
    start = time.time()
    print(
        f"data: {data.queries} queries, {data.general} general examples, {data.heldout_tasks} held-out tasks -> {folder.relative_to(ROOT)} "
        "(about a minute)",
        flush=True,
    )
    for split, n in (("heldout", data.heldout_tasks), ("train", data.train_tasks)):
        write_jsonl(
            folder / f"{split}.jsonl",
            make_tasks(n, split, data, seeded_rng(config.seed, split).getrandbits(31)),
        )
    make_trajectories(config, folder)
    counts = make_visgen(config, folder)
    visgen = read_jsonl(folder / "visgen.jsonl")
    if not visgen:
        raise SystemExit(
            "error: no trajectory passed `data.min_reward`; lower it or raise `data.queries`"
        )
    general = (
        make_general(config, data.general, "train")
        if data.general_source == "offline"
        else hub_general(config)
    )
    write_jsonl(folder / "general.jsonl", general)
    rng = seeded_rng(config.seed, "base")
    write_jsonl(
        folder / "base.jsonl",
        [general_item(rng, "copy") for _ in range(config.model.base_examples)],
    )
    write_jsonl(
        folder / "general_heldout.jsonl", make_general(config, data.general_heldout, "heldout")
    )
    if not config.model.path:
        texts = [f"{m['role']}\n{m['content']}" for r in visgen for m in r["messages"]]
        texts += [
            f"{to_json(r['tools'])}\n{m['content']}"
            for r in general[: len(visgen)]
            for m in r["messages"]
        ]
        train_tokenizer(texts, len(visgen) // 40, config.model.vocab_size, folder / "tokenizer")
    calls = Counter(call["name"] for r in visgen for call in r["calls"])
    counts |= {
        "general": len(general),
        "seconds": round(time.time() - start, 1),
        "tools_used": len(calls),
    }
    print(
        f"  funnel: {counts['queries']} queries -> {counts['answered']} answered -> {counts['kept']} kept by LtrReward >= {data.min_reward} "
        f"(no human review, unreviewed); {len(calls)} tools used; {counts['seconds']} s"
    )
    write_atomic(folder / "done.json", to_json(counts))


def write_bench():
    """Write data/visgenbench.jsonl, which is fixed: whoever changes words or rules gives it a new version."""
    tasks = make_bench()
    write_jsonl(BENCH, tasks)
    print(f"{BENCH}: {len(tasks)} tasks, {sum(t['in_104'] for t in tasks)} of them VisGenBench-104")


def review(config, folder, file):
    """Take in a verdict file that the sheet saved, if one is given, and write a sheet of what nobody has judged yet."""
    kept, _ = sift(each_line(folder / "trajectories.jsonl"), config)
    path, judged = folder / "verdicts.jsonl", {}
    if file:
        judged = read_verdicts(Path(file), kept)
        append_jsonl(path, [{"id": i, **verdict} for i, verdict in judged.items()])
    if path.is_file():
        judged = read_verdicts(path, kept)
    export_review(config, folder, [i for i in kept if i not in judged])


def print_statistics(config, folder, template):
    """Fig. 5's figures or the data card, printed; the picture goes to statistics.png."""
    found = statistics_of(config, folder)
    plot_statistics(found, folder / "statistics.png")
    counts = json.loads((folder / "funnel.json").read_text(encoding="utf-8"))
    print(
        fill_template(
            f"templates/{template}.jinja", folder=folder, config=config, counts=counts, **found
        )
    )


def main():
    """Make all data of one experiment, or run one stage of the funnel (see the top of this file)."""
    command = next((a for a in sys.argv[1:] if a in COMMANDS), "")
    if command:
        sys.argv.remove(command)
    elif sys.argv[1:] and sys.argv[1].isalpha():
        raise SystemExit(
            f"error: no command {sys.argv[1]!r}; commands: {', '.join(COMMANDS)}; without one, all data of a config are made"
        )
    options = [
        ("--queries", "data.queries", "data.queries, in short"),
        ("--verdicts", None, "a file that the review sheet saved (command review)"),
    ]
    config, given = command_line(
        __doc__, options=options, default="visgen.yaml" if command else "tiny.yaml"
    )
    if "--verdicts" in given and command != "review":
        raise SystemExit("error: --verdicts belongs to `python make_data.py review`")
    if command == "bench":
        return write_bench()
    run = open_run(config)
    folder = run / "data"
    if command == "queries":
        print(f"{folder / 'queries.jsonl'}: {len(make_queries(config, folder))} queries")
    if command in ("trajectories", "visgen"):
        make_trajectories(config, folder)
        print(
            f"{folder / 'trajectories.jsonl'}: "
            + ", ".join(
                f"{n} ended with {end}"
                for end, n in Counter(
                    t["ended"] for t in each_line(folder / "trajectories.jsonl")
                ).items()
            )
        )
    if command in ("filter", "visgen", "review"):
        if command != "filter":
            review(config, folder, given.get("--verdicts"))
        print(
            fill_template(
                "templates/funnel.jinja",
                folder=folder,
                config=config,
                **make_visgen(config, folder),
            )
        )
    if command in ("statistics", "card", "visgen"):
        print_statistics(config, folder, "card" if command == "card" else "statistics")
    if command == "metacognition":
        metacognition(config, run)
    if not command:
        ensure_data(config, run)
        print(f"data are in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()


def chat_record(t):
    """{"messages", "tools"} as `datasets`, TRL's SFTTrainer and the OpenAI API take it. They want tool replies to answer calls of their own
    format, and UTPC's calls are text, so a reply goes back as the user's text, in the tags that Qwen's template gives it."""
    messages = []
    for m in t["messages"]:
        if m["role"] != "tool":
            messages.append({"role": m["role"], "content": m["content"]})
        elif messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + tag("tool_response", m["content"])
        else:
            messages.append({"role": "user", "content": tag("tool_response", m["content"])})
    return {"messages": messages, **({"tools": t["tools"]} if t["tools"] else {})}
