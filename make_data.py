"""Tasks, VisionAgent, VisGenData, the general mix and the tokenizer (Sec. 3).

One YAML describes one experiment (configs/*.yaml); configs/experiment.py lists every key with its default and meaning.
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

import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import yaml
from tqdm import tqdm

from configs.experiment import (ROOT, DataConfig, append_jsonl, command_line, cut_tail, draw, each_line, open_run, read_jsonl, write_atomic,
                                write_jsonl)
from configs.llm import Endpoint, Failed, bill, chat, check_failures, cost, make_request, read_object, read_text, run_jobs
from data.figures import BENCH, draw_statistics, statistics_of
from data.general import chat_record, general_item, hub_general, load_scenarios, make_general, odd_words, tag, train_tokenizer
from data.review import export_review, key_of, read_verdicts
from env import VisGenEnv, load_defaults, load_tools, page, to_json, tool_schemas, tool_signature
from rewards import PARTS, clip_lengths, clip_seconds, expand_workflow, fitting_workflows, load_workflows, ltr_rewards, makes, n_shots

BENCH_WORDS = ROOT / "data" / "visgenbench.yaml"

# ---------------------------------------------------------------------------------------------------------------------
# Tasks: requests in words, with the constraints that the words state


def split_list(items, held, split):
    """What a split may use of a written list: three disjoint parts. The last `held` items are held out; of the others, expert
    trajectories (visgen) use three quarters and VRL's tasks (train) the rest: VRL meets requests for which nobody has shown the way."""
    shown, rest = items[:len(items) - held], len(items) - held - (len(items) - held) // 4
    return {"heldout": items[len(items) - held:], "train": shown[rest:], "visgen": shown[:rest]}[split]


NO_CONSTRAINTS = {"images": 0, "videos": 0, "duration_s": None, "shots": None, "aspect_ratio": None, "resolution": None,
                  "consistency": [], "audio": [], "beat": False, "transparent": False, "web_page": False, "input": False,
                  "storyboard": False, "subject": "", "style": None}
HAN = re.compile("[\u4e00-\u9fff]")      # a Chinese character: a text that holds one is Chinese


def draw_constraints(rng, scenario, config):
    """What one request will ask for, within what the scenario makes plausible. Durations in seconds."""
    s, c = scenario, json.loads(json.dumps(NO_CONSTRAINTS))
    if s["modality"] == "image":
        low, high = s["counts"]
        high = max(low, min(high, config.max_images))
        c["images"] = rng.randint((low + high + 1) // 2 if config.long else low, high)
        c["input"] = s["input"] and rng.random() < (1.0 if s["title"] == "Stylization" else 0.4)
        kind = "" if c["input"] else rng.choice([k for k in ("transparent", "large", "html") if s[k]] + ["", ""])
        c["transparent"], c["web_page"] = kind == "transparent", kind == "html"
        c["resolution"] = "2K" if kind == "large" else None
        if c["images"] > 1 and s["consistency"] and kind in ("", "html") and rng.random() < (0.9 if config.long else 0.6):
            c["consistency"] = [rng.choice(s["consistency"])]
        aspects = [a for a in s["aspects"] if a in ("1:1", "3:2", "2:3")] if kind == "transparent" else s["aspects"]
        c["aspect_ratio"] = rng.choice(aspects) if aspects and rng.random() < 0.7 else None
        c["storyboard"] = s["title"] == "Storyboards"
    else:
        c["videos"] = rng.randint(*s["counts"]) if rng.random() < (0.1 if config.long else 0.3) else 1
        most = min(s["shots"][1] * (2 if config.long else 1), config.max_shots)
        if c["videos"] > 1:
            c["duration_s"] = rng.choice([None, 4, 6, 8])
        elif most >= 2 and rng.random() < (0.95 if config.long else 0.6):
            c["shots"] = rng.randint(max(2, most // 2) if config.long else 2, most)
            c["duration_s"] = rng.choice([None] + [c["shots"] * k + extra for k in (4, 5, 6, 8) for extra in (0, 0, -1, -2)])
        else:
            c["duration_s"] = rng.choice([None, 4, 5, 6, 7, 8, 10, 12, 16][: 9 if most >= 2 else 6])
        aspects = [a for a in s["aspects"] if a != "1:1" or c["videos"] == 1]
        c["aspect_ratio"] = rng.choice(aspects) if rng.random() < 0.6 else None
        c["resolution"] = "1080p" if rng.random() < 0.2 else None
        if n_shots(c) > 1 and s["consistency"] and rng.random() < (0.9 if config.long else 0.5):
            c["consistency"] = [rng.choice(s["consistency"])]
        if s["audio"] and c["videos"] == 1 and rng.random() < 0.6:
            parts = rng.sample(s["audio"], min(len(s["audio"]), rng.choice([1, 1, 2])))
            # One composite takes one sound track, so music and designed effects are asked for apart.
            # No call makes more than 30 s of effects, and they are to be heard over half of the film.
            c["audio"] = [a for a in parts if a != "sfx" or ("music" not in parts and (c["duration_s"] or 0) <= 60)]
        c["beat"] = "music" in c["audio"] and n_shots(c) > 1 and rng.random() < 0.4
    return c


def combination(c):
    """A request's combination of constraints as one string; subject and style aside."""
    return to_json({k: v for k, v in c.items() if k not in ("subject", "style")})


def combination_split(c):
    """Which split a combination of constraints belongs to: every sixth is never shown in training."""
    return "heldout" if int(hashlib.blake2b(combination(c).encode(), digest_size=4).hexdigest(), 16) % 6 == 0 else "train"


def count_phrase(rng, n, noun, language):
    """A number and a noun in words a user would use: 'a logo', 'three logos', '3 logos', '三个标志'."""
    one, many = noun
    if n == 1 and language == "en":
        return rng.choice([("an " if one[0] in "aeiouAEIOU" else "a ") + one, f"one {one}"])
    number = rng.choice([str(n), load_scenarios(language)["number_words"][n]])
    return f"{number} {many}" if language == "en" else number + rng.choice(noun)


def draw_subject(rng, group, split):
    """A written subject or, two times in three outside the held-out split, one put together from the words of written ones, common
    words and made-up ones ("a braided velour lantern"): nobody learns these by heart, so the policy has to read them. Shares ours."""
    written = group if split == "bench" else split_list(group, len(group) // 5, split)
    if split in ("bench", "heldout") or rng.random() < 0.33:
        return rng.choice(written)
    if HAN.search(written[0]):      # the measure word and the thing of one, the description of the other
        one, other = rng.sample(written, 2)
        return one[:2] + other[2:other.index("的")] + one[one.index("的"):]
    words = [w for phrase in written for w in phrase.split()[1:] if len(w) > 2]
    while True:
        some = [rng.choice(words) if rng.random() < 0.5 else word for word in odd_words(rng, rng.randint(1, 4))]
        phrase = ("an " if some[0][0] in "aeiou" else "a ") + " ".join(some)
        if phrase not in group:
            return phrase


@lru_cache
def bench_book():
    """The written material of VisGenBench's tasks: the scenarios with the words of data/visgenbench.yaml in place of their own."""
    words, book = yaml.load(BENCH_WORDS.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)), load_scenarios("en")
    return {**book, **words, "frames": [], "scenarios": {name: {**s, "wordings": words["wordings"][name]} for name, s in book["scenarios"].items()}}


def make_task(rng, split, config, scenario_name=None, language="en", dimension=None, suits=lambda c: True):
    """One task record (design: Records). Wordings and subjects of a split are its own; combinations of constraints of training are its own.

    `suits`: what else the constraints must be; `dimension`: VisGenBench's, which decides what else the request says. None if nothing suits.
    """
    book, shown = bench_book() if split == "bench" else load_scenarios(language), split in ("visgen", "train")
    part = (lambda items, held: items) if split == "bench" else lambda items, held: split_list(items, held, split)      # noqa: E731
    name = scenario_name or rng.choice(list(book["scenarios"]))
    s = book["scenarios"][name]
    clauses = {k: part(v, 2) for k, v in book["clauses"].items()}
    for _ in range(1000):
        c = draw_constraints(rng, s, config)
        if (combination_split(c) == "train") == shown and suits(c) and len(expand_workflow(fitting_workflows(c)[0], c)) <= config.max_steps:
            break
    else:
        if dimension:
            return None
        raise RuntimeError(f"scenario {name}: no combination of constraints of the {split} split in 1000 draws")
    c["subject"] = thing = draw_subject(rng, book["subjects"][rng.choice(s["subjects"])], split)
    details = rng.sample(book["details"], 2) if dimension == "match" else []
    c["subject"] += f" with {details[0]} and {details[1]}" if details else ""
    if rng.random() < 0.6:
        styles = part(book["styles"], len(book["styles"]) // 6)
        c["style"] = rng.choice(styles)
        if shown and rng.random() < 0.6:
            c["style"] = " ".join(odd_words(rng, rng.randint(1, 3))) if language == "en" else "与".join(rng.sample(styles, 2))
    said = [rng.choice(book[dimension])] if dimension in ("creative", "variety") else []
    for kind, value in (("duration", c["duration_s"]), ("shots", c["shots"]), ("aspect", c["aspect_ratio"]),
                        ("resolution_video", c["videos"] and c["resolution"]), ("large", c["resolution"] == "2K"),
                        ("transparent", c["transparent"]), ("html", c["web_page"]), ("input", c["input"] and "in_1"),
                        ("object", "object" in c["consistency"] and s["consistency_word"]), ("scene", "scene" in c["consistency"]),
                        ("style", "style" in c["consistency"]), *((a, True) for a in c["audio"]), ("beat", c["beat"])):
        if value:
            value = rng.choice([value, book["number_words"].get(value, value)]) if kind == "shots" else value
            said.append(re.sub(r"{\w+}", str(value), rng.choice(clauses[kind])))
    if shown:      # irrelevant detail; that of other requests stands in their wordings
        said += [re.sub("{word}", lambda _: odd_words(rng, 1)[0], rng.choice(book["asides"])) for _ in range(rng.choice([0, 0, 1, 2]))]
    rng.shuffle(said)
    what = count_phrase(rng, c["images"] or c["videos"], s["noun"], language)
    style = book["grammar"]["style"].format(c["style"]) if c["style"] else ""
    framed = shown and rng.random() < 0.5
    wordings = split_list(book["frames"], 0, split) if framed else part(s["wordings"], 3)
    request = rng.choice(wordings).format(what=what, subject=c["subject"], style=style, extras=book["grammar"]["between"].join(said))
    inputs = [{"id": "in_1", "kind": "image", "width": w, "height": h, "duration_s": None}
              for w, h in [rng.choice([(1024, 1024), (1280, 960), (960, 1280), (1600, 900)])]] if c["input"] else []
    workflow, pool = task_agent(request)
    asked = sum(bool(v) for k, v in c.items() if k not in ("images", "videos", "subject"))
    words = {"subject": thing, **{f"detail_{i}": d for i, d in enumerate(details, 1)}}
    rubric = {"rubric": [item.format(**words) for item in book["rubrics"][s["modality"]].get(dimension, [])]} if dimension else {}
    return {"id": "", "split": split, "modality": s["modality"], "scenario": name,
            "dimension": dimension or ("duration" if c["duration_s"] else "storyboard" if c["shots"] else "amount"),
            "request": " ".join(request.split()), "language": language, "inputs": inputs, "constraints": c,
            "difficulty": "easy" if asked <= 1 else "medium" if asked <= 3 else "hard", "workflow": workflow, "pool": pool, **rubric}


def make_tasks(n, split, config, seed):
    """n distinct task records, the scenarios of the config's languages in turn, so that each gives tasks."""
    kinds, tasks = [(name, language) for language in config.languages for name in load_scenarios(language)["scenarios"]], {}
    rng = draw(seed, "tasks", split, n)
    while len(tasks) < n:
        task = make_task(rng, split, config, *kinds[len(tasks) % len(kinds)])
        tasks.setdefault(task["request"], {**task, "id": f"{split}-{len(tasks):05d}"})
    return list(tasks.values())


# What a request must ask for, to be a task of a dimension of VisGenBench (Table 1); the others suit any request.
SUITS = {"object": lambda c: "object" in c["consistency"], "scene": lambda c: "scene" in c["consistency"], "style": lambda c: "style" in c["consistency"],
         "variety": lambda c: c["images"] + c["videos"] > 1 and not c["consistency"], "duration": lambda c: c["duration_s"], "storyboard": lambda c: c["shots"]}


def make_bench():
    """VisGenBench's 1,200 tasks with Table 1's composition, the scenarios in turn; `in_104` marks the stratified subset VisGenBench-104.

    Ours where the paper is silent: every third image task comes with the user's picture, every other video task of a scenario is long.
    """
    book, tasks = bench_book(), {}
    sizes = [(modality, dimension, n) for modality, row in book["composition"].items() for dimension, n in row.items()]
    exact = {key: 104 * n / 1200 for *key, n in sizes for key in [tuple(key)]}
    few = {key: int(x) for key, x in exact.items()}
    for key in sorted(exact, key=lambda key: few[key] - exact[key])[:104 - sum(few.values())]:      # the largest remainders
        few[key] += 1
    for modality, dimension, n in sizes:
        rng, names, made, tries = draw("VisGenBench", modality, dimension), [k for k, s in book["scenarios"].items() if s["modality"] == modality], 0, 0
        rng.shuffle(names)
        while made < n:
            tries += 1
            lone, limits = made % 3 == 0, DataConfig(**book["limits"], long=made % 2 == 0)
            task = make_task(rng, "bench", limits, names[tries % len(names)], dimension=dimension, suits=lambda c: SUITS.get(dimension, bool)(c) and (
                c["input"] or modality == "video" or not lone))
            if task is None or task["request"] in tasks:
                continue
            in_104 = (made + 1) * few[modality, dimension] // n > made * few[modality, dimension] // n      # spread over the stratum
            tasks[task["request"]] = {**task, "id": f"vgb1-{len(tasks) + 1:04d}", "in_104": in_104}
            made += 1
    return list(tasks.values())


# ---------------------------------------------------------------------------------------------------------------------
# VisionAgent (Sec. 3.1, Fig. 4), scripted: TaskAgent reads and routes, MetaAgent thinks, plans, calls and verifies


@lru_cache
def reading_patterns(language):
    """How the scripted TaskAgent recognises each constraint in a request: the written clauses turned into patterns."""
    book, bench = load_scenarios(language), bench_book() if language == "en" else None
    number = "|".join([r"\d+", "an?", *book["number_words"].values()])
    slot = {"d": r"\d+", "k": number, "a": r"\d+:\d+", "r": r"\d+p", "id": r"in_\d+",
            "thing": "|".join(sorted({s["consistency_word"] for s in book["scenarios"].values()}))}
    # Each with its longest piece outside slots: to look for that first is much cheaper than the pattern.
    clause = {kind: [(max(re.split(r"{\w+}", text), key=len), re.sub(r"\\{(\w+)\\}", lambda m: f"({slot[m[1]]})", re.escape(text))) for text in texts]
              for kind, own in book["clauses"].items() for texts in [own + (bench["clauses"][kind] if bench else [])]}
    nouns = sorted({(n, name) for name, s in book["scenarios"].items() for n in s["noun"]}, key=lambda x: -len(x[0]))
    noun = [(re.compile(book["grammar"]["noun"].format(number, re.escape(n)), re.I), name) for n, name in nouns]
    # A request is matched with its noun phrase ("two posters") taken out, so a frame is one pattern for all scenarios.
    # The longest first: "Design {what} for {subject}" would also fit "Design {what} for a game about {subject}".
    texts = {name: sorted(s["wordings"] + book["frames"], key=len, reverse=True) + (bench["scenarios"][name]["wordings"] if bench else [])
             for name, s in book["scenarios"].items()}
    slots = book["grammar"]["slots"]
    pattern = {t: re.compile(re.sub(r"\\{(\w+)\\}", lambda m: slots[m[1]], re.escape(t.replace(" {extras}", "{extras}"))), re.I)
               for t in {t for some in texts.values() for t in some}}
    wording = {name: [pattern[text] for text in some] for name, some in texts.items()}
    return clause, noun, wording


def read_request(request):
    """TaskAgent's reading: the constraints that a request states, from its text alone."""
    language = "zh" if HAN.search(request) else "en"
    book, (clause, nouns, wordings) = load_scenarios(language), reading_patterns(language)
    numbers = {w: n for n, w in book["number_words"].items()} | {"a": 1, "an": 1}
    number = lambda text: numbers.get(text.lower()) or int(text)      # noqa: E731
    said = {kind: next((m for piece, p in patterns if piece in request and (m := re.search(p, request))), None) for kind, patterns in clause.items()}
    c = json.loads(json.dumps(NO_CONSTRAINTS))
    phrase, name = next(((m, name) for p, name in nouns if (m := p.search(request))), (None, None))
    scenario = book["scenarios"].get(name, {"modality": "image", "title": ""})
    c["images" if scenario["modality"] == "image" else "videos"] = number(phrase.group(1)) if phrase else 1
    for field, kind, read in (("duration_s", "duration", int), ("shots", "shots", number), ("aspect_ratio", "aspect", str),
                              ("resolution", "resolution_video", str)):
        c[field] = read(said[kind].group(1)) if said[kind] else None
    c["resolution"] = "2K" if said["large"] else c["resolution"]
    c["transparent"], c["web_page"], c["beat"], c["input"] = (bool(said[k]) for k in ("transparent", "html", "beat", "input"))
    c["consistency"] = [k for k in ("object", "scene", "style") if said[k]]
    # In the order in which the request names them.
    c["audio"] = sorted((k for k in ("music", "narration", "sfx", "subtitles") if said[k]), key=lambda k: said[k].start())
    c["storyboard"] = scenario["title"] == "Storyboards"
    rest = request[:phrase.start()] + "\0" + request[phrase.end():] if phrase else request
    m = next((m for p in wordings.get(name, []) if (m := p.search(rest))), None)
    c["subject"], c["style"] = (m["subject"], m["style"]) if m else (request, None)
    return c


def task_agent(request):
    """TaskAgent (Fig. 4): read the request, choose the workflow and the pool of tools: its own and six others at random, so that
    a policy has something to choose from. The task type is the one whose noun the request uses; the workflow follows from what it asks for."""
    c = read_request(request)
    workflow = fitting_workflows(c)[0]
    own = {t for s in load_workflows()[workflow]["steps"] for t in s["tool"]}
    other = draw("pool", request).sample([t for t in load_tools() if t not in own], 6)
    return workflow, [t for t in load_tools() if t in own or t in other]


@lru_cache(maxsize=1)
def load_voice():
    """data/voice.yaml: how the scripted MetaAgent words its thinking."""
    return yaml.safe_load((ROOT / "data" / "voice.yaml").read_text(encoding="utf-8"))


def facts_of(c):
    """The request's constraints in a fixed, short form: '3 images, watercolor, 16:9, same object'."""
    n, kind = (c["images"], "image") if c["images"] else (c["videos"], "video")
    parts = [f"{n} {kind}{'s' * (n > 1)}", c["style"], c["shots"] and f"{c['shots']} shots", c["duration_s"] and f"{c['duration_s']} s",
             c["aspect_ratio"], c["resolution"], *(f"same {k}" for k in c["consistency"]), *c["audio"], c["beat"] and "on the beat",
             c["transparent"] and "transparent", c["web_page"] and "web page", c["input"] and "from in_1"]
    return ", ".join(p for p in parts if p)


def route_of(c, steps):
    """MetaAgent's reasoning about clip lengths: '2 clips of 8 s make 16 s, trim to 15.'"""
    clip = next((clip_lengths(s["tool"]) for s in steps if s["key"] == "clip"), None)
    if not clip:
        return "One call." if len(steps) == 1 else f"{len(steps)} steps."
    shots, seconds = n_shots(c), clip_seconds(c, clip)
    trim = "".join(f", {s['key']} to {c['duration_s']}" for s in steps if s["key"] in ("trim", "speed"))
    return f"{shots} x {seconds} = {shots * seconds} s{trim}."


GPT_SIZES = {"1:1": "1024x1024", "3:2": "1536x1024", "2:3": "1024x1536", None: "1024x1024"}


def call_arguments(step, c, made, fed, voice, rng):
    """Arguments of a plan step's call. `made`: step key -> ids that came back; `fed`: ids from the steps that this one follows."""
    tool, key_, i = step["tool"], step["key"], step["index"]
    look = c["subject"] + (f", {c['style']}" if c["style"] else "")
    # Optional arguments are written only where the request asks for something.
    aspect = {"aspect_ratio": c["aspect_ratio"]} if c["aspect_ratio"] else {}
    several = {"n": step["expect"]} if step["expect"] > 1 else {}
    film = [*made.get("caption", []), *made.get("voice", []), *made.get("speed", []), *made.get("trim", []), *made.get("join", []), *made.get("clip", [])]
    if key_ in ("image", "large", "ref", "frame", "cutout") and tool.startswith("tool_text2image"):
        prompt = f"{look}, {voice['views'][i % len(voice['views'])]}" if key_ == "frame" else look
        if tool == "tool_text2image_gpt":
            return {"prompt": prompt, "size": GPT_SIZES[c["aspect_ratio"]], **several, "background": "transparent"}
        large = {"size": "2K"} if tool == "tool_text2image_seed" and c["resolution"] == "2K" else {}
        return {"prompt": prompt, **large, **aspect, **several}
    if key_ in ("edit", "frame", "restyle"):
        source = made.get("image") or made.get("ref") or ["in_1"]
        prompt = look if key_ == "restyle" else f"same subject, {voice['views'][i % len(voice['views'])]}"
        return {"images": source[:1], "prompt": prompt, **(aspect if key_ == "restyle" else {}), **several}
    if key_ == "clip":
        seconds = clip_seconds(c, clip_lengths(tool))
        if tool == "tool_image2video_keling":
            return {"image": fed[0], "prompt": voice["motions"][i % len(voice["motions"])], "duration": seconds,
                    **({"mode": "pro"} if c["resolution"] == "1080p" else {})}
        view = f", {voice['views'][i % len(voice['views'])]}" if n_shots(c) > 1 else ""
        return {"prompt": look + view, "duration": seconds, **aspect, **({"resolution": "1080p"} if c["resolution"] else {}), **several}
    if key_ == "board":
        return {"script": c["subject"], "n_shots": c["images"]}
    if key_ == "page":
        return {"title": c["subject"], "sections": [{"heading": c["subject"], "media_ids": made["image"] + made.get("edit", [])}]}
    if key_ == "music":
        return {"prompt": rng.choice(voice["music"])}
    if key_ == "sfx":
        return {"prompt": rng.choice(voice["sfx"]), "duration": min(30, c["duration_s"] or n_shots(c) * 5)}
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
        return {"video": film[0], "text": f"这是{c['subject']}。" if HAN.search(c["subject"]) else f"This is {c['subject']}."}
    return {"video": film[0], "subtitles": [{"start": 0, "end": 2, "text": c["subject"]}]}      # caption


def jobs_at_once(tool):
    """How many calls of a tool its service documents to run side by side (infinite where tools.yaml has no such limit)."""
    return min((limit["jobs"] for limit in load_tools()[tool].get("limits", []) if "jobs" in limit), default=math.inf)


def as_asked(reply, c):
    """Whether a tool's reply on a picture or film has the seconds and the shape that the request asks for, within 5 %; what it does not say passes."""
    width, height = map(int, reply.get("size", "1x1").split("x"))
    across, down = map(int, (c["aspect_ratio"] or f"{width}:{height}").split(":"))
    seconds = c["duration_s"] and reply.get("duration_s")
    return abs(width * down / (height * across) - 1) <= 0.05 and (not seconds or abs(seconds / c["duration_s"] - 1) <= 0.05)


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
    rng, voice = draw(seed, "agent", task["id"]), load_voice()
    messages, _ = env.reset(task, seed)
    c = read_request(messages[-1]["content"])
    workflow = fitting_workflows(c)[0]
    steps = expand_workflow(workflow, c)
    clip = next((clip_lengths(s["tool"]) for s in steps if s["key"] == "clip"), None)
    if clip and "plan check" not in mind:      # whatever length the clips come to passes for the length asked for
        steps = expand_workflow(workflow, {**c, "shots": n_shots(c), "duration_s": n_shots(c) * clip_seconds(c, clip)})
    for s in steps:
        many = {"image": c["images"] if not any(t["key"] == "edit" for t in steps) else 1, "large": c["images"],
                "cutout": c["images"], "edit": c["images"] - 1, "restyle": c["images"], "clip": max(1, c["videos"])}
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
            ready = [s for i, s in enumerate(ready) if sum(t["tool"] == s["tool"] for t in ready[:i]) < jobs_at_once(s["tool"])]
        blocks = [tag("think", think)] + ([tag("plan", plan)] if plan else []) + blocks
        made = {}
        for s in steps:
            made.setdefault(s["key"], []).extend(s["ids"])
        made = {k: v for k, v in made.items() if v}
        calls = [{"name": s["tool"], "arguments": call_arguments(s, c, made, [i for a in s["after"] for i in steps[a - 1]["ids"]], voice, rng)}
                 for s in ready]
        replies, _, terminated, truncated, _ = env.step("\n".join(blocks + [tag("tool_call", call) for call in calls]))
        if terminated or truncated:
            return env.trajectory()
        plan, blocks, trouble = None, [], None
        for s, reply in zip(ready, map(lambda m: json.loads(m["content"]), replies)):
            s["tries"] += 1
            if "error" in reply:
                retry, others = s["tries"] < 2, []
                if "recovery" in mind:
                    retry, others = reply["error"]["retryable"] and s["tries"] < 3, s["tools"][s["tools"].index(s["tool"]) + 1:]
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
            if (s["expect"] <= 0 or "verification" not in mind) and s in open_steps:      # a partial result leaves the rest of the step open
                done.add(s["id"])
                open_steps.remove(s)
        upcoming = [s for s in open_steps if set(s["after"]) <= done]
        names = ", ".join(i for s in ready for i in s["ids"]) or "nothing"
        if trouble:
            think = rng.choice(voice["error"]).format(error=trouble[0], move=voice["moves"][trouble[1]])
        else:
            think = rng.choice(voice["next"]).format(made=names, next=", ".join(dict.fromkeys(s["goal"].split(" of ")[0] for s in upcoming)))
    kind = "image" if c["images"] else "video"
    groups = [s["ids"] for s in steps if makes(s["tool"]) == kind and s["ids"]]
    ids = [i for group in (groups if kind == "image" else groups[-1:]) for i in group]
    whole = len(done) == len(steps) and ("verification" not in mind or all(as_asked(replied[i], c) for i in ids))
    made = ", ".join(ids) or "nothing"
    think = rng.choice(voice["done" if whole else "short"]).format(made=made, facts=facts)
    pages = [i for s in steps if s["key"] == "page" for i in s["ids"]]
    env.step("\n".join([tag("think", think), tag("answer", {"deliverables": ids + pages,
                                                            "summary": rng.choice(voice["summary" if whole else "part"]).format(made=made, facts=facts)})]))
    return env.trajectory()


# ---------------------------------------------------------------------------------------------------------------------
# VisionAgent by an LLM (`data.agent: openai`): the same two agents, whose words are a model's


async def route_by_llm(endpoint, task):
    """TaskAgent (Fig. 4): {scenario, workflow, tools} for a request, from its text and attached media alone. configs.llm.Failed if none is had."""
    scenarios, workflows, tools = load_scenarios("en")["scenarios"], load_workflows(), load_tools()
    one_of = lambda names: {"type": "string", "enum": list(names)}      # noqa: E731
    form = {"scenario": one_of(scenarios), "workflow": one_of(workflows), "tools": {"type": "array", "items": one_of(tools)}}
    values = {"request": task["request"], "inputs": task["inputs"], "scenarios": scenarios, "workflows": workflows,
              "tools": [tool_signature(name) for name in tools]}
    return await chat(endpoint, lambda attempt: make_request(endpoint.llm, "prompts/task_agent.jinja", form, values, attempt), read_object)


def guide_of(route, env, n):
    """What MetaAgent is told beside the environment's messages: how to work, the chosen workflow and the n - 1 nearest to it, the pool's schemas."""
    flows = load_workflows()
    chosen = flows[route["workflow"]]
    apart = lambda flow: len({*flow["requires"], *flow["fits"]} ^ {*chosen["requires"], *chosen["fits"]})      # noqa: E731
    near = sorted((f for f in flows.values() if f["modality"] == chosen["modality"]), key=lambda f: (f is not chosen, apart(f)))
    return page("prompts/meta_agent.jinja", scenario=load_scenarios("en")["scenarios"][route["scenario"]]["title"], workflows=near[:n],
                tools=[to_json(schema["function"]) for schema in tool_schemas(env.pool)], most_turns=env.rollout.max_turns,
                most_errors=load_defaults()["max_errors"])


async def vision_agent_by_llm(endpoint, task, config):
    """Run VisionAgent on one task in VisGenEnv: TaskAgent routes, MetaAgent writes turns until the episode ends (Sec. 3.1). Returns the trajectory
    with its `tools`, its `pool` and what TaskAgent said (`agent`). configs.llm.Failed if the endpoint gives some turn no reply.

    The calls are text, so a tool message goes back as the user's: endpoints take the role `tool` only for calls of their own. A turn that is cut
    off at `max_tokens` is played as it is. The guide stands in the requests, not in the trajectory: the policy has to do without.
    """
    route, seed = await route_by_llm(endpoint, task), draw(config.seed, "visgen", task["id"]).getrandbits(31)
    own = {tool for step in load_workflows()[route["workflow"]]["steps"] for tool in step["tool"]}
    env = VisGenEnv(config.rollout)
    opening, info = env.reset({**task, "workflow": route["workflow"], "pool": [t for t in load_tools() if t in own or t in route["tools"]]}, seed)
    guide = guide_of(route, env, endpoint.llm.neighbours)
    said = [{"role": "system", "content": f"{opening[0]['content']}\n\n{guide}"}, *opening[1:]]
    while not env.ended:
        text = await chat(endpoint, lambda attempt: {"model": endpoint.llm.model, "messages": list(said), "temperature": endpoint.llm.temperature,
                                                     "seed": seed + attempt, "max_tokens": endpoint.llm.max_tokens},
                          lambda reply, _: read_text(reply)[0])
        replies, *_ = env.step(text)
        responses = "\n".join(f"<tool_response>{reply['content']}</tool_response>" for reply in replies)
        said += [{"role": "assistant", "content": text}, {"role": "user", "content": responses}]
    return {**env.trajectory(), "tools": info["tools"], "pool": env.pool, "agent": {"model": endpoint.llm.model, **route}}


def read_finished(path, tasks):
    """{task id: trajectory} of a file of llm_agents; a last line that was broken off is cut from it. SystemExit where it has other requests."""
    cut_tail(path)
    finished = {t["task"]["id"]: t for t in (each_line(path) if path.is_file() else [])}
    for task in tasks:
        if task["id"] in finished and finished[task["id"]]["task"]["request"] != task["request"]:
            raise SystemExit(f"error: {path} has another request for task {task['id']}; remove the file, or choose another name (name=...)")
    return finished


def llm_agents(tasks, config, path):
    """VisionAgent by the LLM of `data.llm` on many tasks at once: (trajectories in the tasks' order, counts).

    Each finished trajectory is a line of the file `path` at once; tasks that stand there are not made again. A task whose endpoint failed for good is
    left out and counted with its reason. SystemExit with the counts above `max_failures` or `max_run_tokens`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_finished(path, tasks)
    todo, left_out, asked = [t for t in tasks if t["id"] not in done], {}, Counter()
    found, endpoint = len(tasks) - len(todo), Endpoint(config.data.llm, "data.llm", "VisionAgent", "replies", asked)
    with open(path, "a", encoding="utf-8") as file:
        async def job(task):
            try:
                done[task["id"]] = await vision_agent_by_llm(endpoint, task, config)
            except Failed as e:
                left_out[task["id"]] = str(e)
                check_failures(endpoint, len(left_out), len(left_out) + asked["made"], "tasks", e)
                return
            asked["made"] += 1
            file.write(to_json(done[task["id"]]) + "\n")
            file.flush()

        try:
            run_jobs(endpoint, job, todo, "VisionAgent")
        finally:
            print(f"VisionAgent by {endpoint.llm.model}: {len(tasks)} tasks, {found} made before, {asked['made']} now, {len(left_out)} left out; "
                  f"{bill(endpoint)}")
            for reason, n in Counter(left_out.values()).most_common():
                print(f"  {n} left out: {reason}")
    counts = {"tasks": len(tasks), "before": found, "made": asked["made"], "left_out": left_out, "requests": asked["requests"],
              "tokens_in": asked["tokens"] - asked["tokens_out"], "tokens_out": asked["tokens_out"], "usd": cost(endpoint)}
    return [done[task["id"]] for task in tasks if task["id"] in done], counts


# ---------------------------------------------------------------------------------------------------------------------
# The funnel of Fig. 3: queries -> trajectories -> LtrReward's filter -> human review -> VisGenData. Every stage reads the files of the one before


TASK_FIELDS = {"id", "split", "modality", "scenario", "dimension", "request", "language", "inputs", "constraints", "difficulty", "workflow", "pool"}


def make_queries(config, folder):
    """Stage 1: queries.jsonl, the task records that VisionAgent is asked; kept if it is there (it may be your own). Returns the tasks."""
    path, n = folder / "queries.jsonl", config.data.queries
    if not path.is_file():
        write_jsonl(path, make_tasks(n, "visgen", config.data, draw(config.seed, "queries").getrandbits(31)))
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
    path, tasks, made, env = folder / "trajectories.jsonl", make_queries(config, folder), {}, VisGenEnv(config.rollout)
    cut_tail(path)
    if path.is_file():
        asked = {task["id"]: task["request"] for task in tasks}
        for t in each_line(path):
            if asked.get(t["task"]["id"], t["task"]["request"]) != t["task"]["request"]:
                raise SystemExit(f"error: {path} has another request for {t['task']['id']} than queries.jsonl; remove it, or give the run a name of its own")
            made |= {t["task"]["id"]: math.isnan(t["reward"]["total"])}
        if any(made.values()):      # what a judge had no verdict on is played and judged again
            write_jsonl(path, (t for t in each_line(path) if not made[t["task"]["id"]]))
    left = [task for task in tasks if made.get(task["id"], True)]
    if config.data.agent == "openai":
        some, _ = llm_agents(left, config, folder / "agent.jsonl")
        for trajectory, reward in zip(some, ltr_rewards(some, config.reward, [t["pool"] for t in some])):
            trajectory["reward"] = reward
        return append_jsonl(path, some)
    with tqdm(total=len(left), desc="VisionAgent", unit="task", mininterval=1, disable=not left) as bar:
        for at in range(0, len(left), 200):
            some, pools = [], []
            for task in left[at:at + 200]:
                some.append(vision_agent(task, env, draw(config.seed, "visgen", task["id"]).getrandbits(31)))
                pools.append(env.pool)
            for trajectory, reward in zip(some, ltr_rewards(some, config.reward, pools)):
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
        plan = task["scenario"], to_json([(step["tool"], step["after"]) for step in t["plan"] or []])
        if t["ended"] != "answer":
            removed.append({"id": task["id"], "stage": "trajectories", "reason": f"no answer ({t['ended']})"})
        elif math.isnan(reward["total"]):
            removed.append({"id": task["id"], "stage": "filter", "reason": "the LLM judge gave no verdict; `trajectories` asks it again"})
        elif reward["total"] < config.data.min_reward:
            worst = min((p for p in ("plan", *PARTS) if reward[p] is not None), key=lambda p: reward[p])
            removed.append({"id": task["id"], "stage": "filter", "reason": f"LtrReward below {config.data.min_reward}, lowest in {worst}"})
        else:
            alike[plan] += 1
            keys[task["id"]] = key_of(t)
            passed.setdefault(task["scenario"], []).append((alike[plan], len(passed.get(task["scenario"], [])), task["id"]))
    most, extra = config.data.per_type, set()
    for rows in passed.values():
        extra |= {i for _, _, i in sorted(rows)[most:]} if most else set()
    kept = sorted(i for rows in passed.values() for _, _, i in rows if i not in extra)
    removed += [{"id": i, "stage": "filter", "reason": f"{most} of its task type stay, and enough of them have its plan"} for i in sorted(extra)]
    return {i: keys[i] for i in kept}, removed


def make_visgen(config, folder):
    """Stage 4 and the result: visgen.jsonl (whole trajectories), chat.jsonl (messages and tools alone), removed.jsonl, funnel.json. Returns the counts.

    What no human has judged is labelled unreviewed; nothing else is claimed about it.
    """
    path, verdict_path = folder / "trajectories.jsonl", folder / "verdicts.jsonl"
    kept, removed = sift(each_line(path), config)
    seen = {*kept, *(r["id"] for r in removed)}
    absent = "no reply from the LLM's endpoint" if config.data.agent == "openai" else "no trajectory yet"
    removed += [{"id": task["id"], "stage": "trajectories", "reason": absent} for task in make_queries(config, folder) if task["id"] not in seen]
    verdicts = read_verdicts(verdict_path, kept) if verdict_path.is_file() else {}
    dropped = {i for i in kept if verdicts.get(i, {}).get("verdict") == "drop"}
    removed += [{"id": i, "stage": "review", "reason": f"dropped by a human: {verdicts[i]['reason'] or 'no reason given'}"} for i in kept if i in dropped]
    wanted, listed, visgen = set(kept) - dropped, config.rollout.tools == "schema", []
    for t in (t for t in each_line(path) if t["task"]["id"] in wanted):
        pool = t.get("pool") or (t["task"]["pool"] if config.rollout.tool_pool == "task" else list(load_tools()))
        visgen.append({**t, "tools": tool_schemas(pool) if listed else None, "review": "kept by a human" if t["task"]["id"] in verdicts else "unreviewed"})
    write_jsonl(folder / "visgen.jsonl", visgen)
    write_jsonl(folder / "chat.jsonl", map(chat_record, visgen))
    write_jsonl(folder / "removed.jsonl", removed)
    gone = Counter(r["stage"] for r in removed)
    counts = {"queries": len(kept) - len(dropped) + len(removed), "reviewed": len(verdicts), "reasons": Counter(f"{r['stage']}: {r['reason']}" for r in removed)}
    counts["answered"] = counts["queries"] - gone["trajectories"]
    counts |= {"candidates": counts["answered"] - gone["filter"], "kept": len(visgen)}
    write_atomic(folder / "funnel.json", to_json(counts))
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# What metacognition is worth (Sec. 3.1)


def metacognition(config, run, n=1000):
    """Success of VisionAgent with and without metacognition, and without each part, on the same n requests, which no other split uses by its seed.

    Success: an answer that meets every constraint that the request states (R_result 1). Written to metacognition.json beside the paper's figures."""
    tasks, env, rows = make_tasks(n, "visgen", config.data, draw(config.seed, "metacognition").getrandbits(31)), VisGenEnv(config.rollout), []
    arms = {"with metacognition": METACOGNITION, **{f"without {part}": tuple(p for p in METACOGNITION if p != part) for part in METACOGNITION},
            "thinking alone": ()}
    for name, mind in arms.items():
        made = [(vision_agent(task, env, draw(config.seed, "metacognition", task["id"]).getrandbits(31), mind), env.pool) for task in tqdm(tasks, desc=name)]
        rewards = ltr_rewards([t for t, _ in made], config.reward, [pool for _, pool in made])
        rows.append({"agent": name, "n": n, "success": sum(r["result"] > 1 - 1e-9 for r in rewards) / n, "reward": sum(r["total"] for r in rewards) / n,
                     "calls": sum(len(t["calls"]) for t, _ in made) / n})
    write_atomic(run / "metacognition.json", to_json(rows))
    print(page("templates/metacognition.jinja", rows=rows, scale=config.rollout.failure_scale))


# ---------------------------------------------------------------------------------------------------------------------
# Commands

COMMANDS = ("queries", "trajectories", "filter", "review", "visgen", "statistics", "card", "bench", "metacognition")


def ensure_data(config, run):
    """Make runs/<name>/data/ if it is not there whole; each file is written whole or not at all."""
    folder, data = run / "data", config.data
    if (folder / "done.json").is_file():
        return
    start = time.time()
    print(f"data: {data.queries} queries, {data.general} general examples, {data.heldout_tasks} held-out tasks -> {folder.relative_to(ROOT)} "
          "(about a minute)", flush=True)
    for split, n in (("heldout", data.heldout_tasks), ("train", data.train_tasks)):
        write_jsonl(folder / f"{split}.jsonl", make_tasks(n, split, data, draw(config.seed, split).getrandbits(31)))
    make_trajectories(config, folder)
    counts = make_visgen(config, folder)
    visgen = read_jsonl(folder / "visgen.jsonl")
    if not visgen:
        raise SystemExit("error: no trajectory passed `data.min_reward`; lower it or raise `data.queries`")
    general = make_general(config, data.general, "train") if data.general_source == "offline" else hub_general(config)
    write_jsonl(folder / "general.jsonl", general)
    rng = draw(config.seed, "base")
    write_jsonl(folder / "base.jsonl", [general_item(rng, "copy") for _ in range(config.model.base_examples)])
    write_jsonl(folder / "general_heldout.jsonl", make_general(config, data.general_heldout, "heldout"))
    if not config.model.path:
        texts = [f"{m['role']}\n{m['content']}" for r in visgen for m in r["messages"]]
        texts += [f"{to_json(r['tools'])}\n{m['content']}" for r in general[:len(visgen)] for m in r["messages"]]
        train_tokenizer(texts, len(visgen) // 40, config.model.vocab_size, folder / "tokenizer")
    calls = Counter(call["name"] for r in visgen for call in r["calls"])
    counts |= {"general": len(general), "seconds": round(time.time() - start, 1), "tools_used": len(calls)}
    print(f"  funnel: {counts['queries']} queries -> {counts['answered']} answered -> {counts['kept']} kept by LtrReward >= {data.min_reward} "
          f"(no human review, unreviewed); {len(calls)} tools used; {counts['seconds']} s")
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
    draw_statistics(found, folder / "statistics.png")
    counts = json.loads((folder / "funnel.json").read_text(encoding="utf-8"))
    print(page(f"templates/{template}.jinja", folder=folder, config=config, counts=counts, **found))


def main():
    """Make all data of one experiment, or run one stage of the funnel (see the top of this file)."""
    command = next((a for a in sys.argv[1:] if a in COMMANDS), "")
    if command:
        sys.argv.remove(command)
    elif sys.argv[1:] and sys.argv[1].isalpha():
        raise SystemExit(f"error: no command {sys.argv[1]!r}; commands: {', '.join(COMMANDS)}; without one, all data of a config are made")
    options = [("--queries", "data.queries", "data.queries, in short"), ("--verdicts", None, "a file that the review sheet saved (command review)")]
    config, given = command_line(__doc__, options=options, default="visgen.yaml" if command else "tiny.yaml")
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
        print(f"{folder / 'trajectories.jsonl'}: " + ", ".join(f"{n} ended with {end}" for end, n in Counter(
            t["ended"] for t in each_line(folder / "trajectories.jsonl")).items()))
    if command in ("filter", "visgen", "review"):
        if command != "filter":
            review(config, folder, given.get("--verdicts"))
        print(page("templates/funnel.jinja", folder=folder, config=config, **make_visgen(config, folder)))
    if command in ("statistics", "card", "visgen"):
        print_statistics(config, folder, "card" if command == "card" else "statistics")
    if command == "metacognition":
        metacognition(config, run)
    if not command:
        ensure_data(config, run)
        print(f"data are in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
