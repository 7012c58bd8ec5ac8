"""lib.tasks."""

import hashlib
import json
import re
from functools import lru_cache

import yaml

from lib.experiment import DataConfig
from lib.runs import ROOT, seeded_rng
from lib.text import to_json
from lib.toolbox import load_tools
from lib.workflows import expand_workflow, fitting_workflows, load_workflows, n_shots

BENCH_WORDS = ROOT / "data" / "visgenbench.yaml"


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: requests in words, with the constraints that the words state
def split_list(items, held, split):
    """What a split may use of a written list: three disjoint parts. The last `held` items are held out; of the others, expert
    trajectories (visgen) use three quarters and VRL's tasks (train) the rest: VRL meets requests for which nobody has shown the way."""
    shown, rest = items[: len(items) - held], len(items) - held - (len(items) - held) // 4
    return {"heldout": items[len(items) - held :], "train": shown[rest:], "visgen": shown[:rest]}[
        split
    ]


NO_CONSTRAINTS = {
    "images": 0,
    "videos": 0,
    "duration_s": None,
    "shots": None,
    "aspect_ratio": None,
    "resolution": None,
    "consistency": [],
    "audio": [],
    "beat": False,
    "transparent": False,
    "web_page": False,
    "input": False,
    "storyboard": False,
    "subject": "",
    "style": None,
}
HAN = re.compile("[\u4e00-\u9fff]")  # a Chinese character: a text that holds one is Chinese


def choose_constraints(rng, scenario, config):
    """What one request will ask for, within what the scenario makes plausible. Durations in seconds."""
    s, c = scenario, json.loads(json.dumps(NO_CONSTRAINTS))
    if s["modality"] == "image":
        low, high = s["counts"]
        high = max(low, min(high, config.max_images))
        c["images"] = rng.randint((low + high + 1) // 2 if config.long else low, high)
        c["input"] = s["input"] and rng.random() < (1.0 if s["title"] == "Stylization" else 0.4)
        kind = (
            ""
            if c["input"]
            else rng.choice([k for k in ("transparent", "large", "html") if s[k]] + ["", ""])
        )
        c["transparent"], c["web_page"] = kind == "transparent", kind == "html"
        c["resolution"] = "2K" if kind == "large" else None
        if (
            c["images"] > 1
            and s["consistency"]
            and kind in ("", "html")
            and rng.random() < (0.9 if config.long else 0.6)
        ):
            c["consistency"] = [rng.choice(s["consistency"])]
        aspects = (
            [a for a in s["aspects"] if a in ("1:1", "3:2", "2:3")]
            if kind == "transparent"
            else s["aspects"]
        )
        c["aspect_ratio"] = rng.choice(aspects) if aspects and rng.random() < 0.7 else None
        c["storyboard"] = s["title"] == "Storyboards"
    else:
        c["videos"] = (
            rng.randint(*s["counts"]) if rng.random() < (0.1 if config.long else 0.3) else 1
        )
        most = min(s["shots"][1] * (2 if config.long else 1), config.max_shots)
        if c["videos"] > 1:
            c["duration_s"] = rng.choice([None, 4, 6, 8])
        elif most >= 2 and rng.random() < (0.95 if config.long else 0.6):
            c["shots"] = rng.randint(max(2, most // 2) if config.long else 2, most)
            c["duration_s"] = rng.choice(
                [None] + [c["shots"] * k + extra for k in (4, 5, 6, 8) for extra in (0, 0, -1, -2)]
            )
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
            c["audio"] = [
                a
                for a in parts
                if a != "sfx" or ("music" not in parts and (c["duration_s"] or 0) <= 60)
            ]
        c["beat"] = "music" in c["audio"] and n_shots(c) > 1 and rng.random() < 0.4
    return c


def combination(c):
    """A request's combination of constraints as one string; subject and style aside."""
    return to_json({k: v for k, v in c.items() if k not in ("subject", "style")})


def combination_split(c):
    """Which split a combination of constraints belongs to: every sixth is never shown in training."""
    return (
        "heldout"
        if int(hashlib.blake2b(combination(c).encode(), digest_size=4).hexdigest(), 16) % 6 == 0
        else "train"
    )


def count_phrase(rng, n, noun, language):
    """A number and a noun in words a user would use: 'a logo', 'three logos', '3 logos', '三个标志'."""
    one, many = noun
    if n == 1 and language == "en":
        return rng.choice([("an " if one[0] in "aeiouAEIOU" else "a ") + one, f"one {one}"])
    number = rng.choice([str(n), load_scenarios(language)["number_words"][n]])
    return f"{number} {many}" if language == "en" else number + rng.choice(noun)


def choose_subject(rng, group, split):
    """A written subject or, two times in three outside the held-out split, one put together from the words of written ones, common
    words and made-up ones ("a braided velour lantern"): nobody learns these by heart, so the policy has to read them. Shares ours."""
    written = group if split == "bench" else split_list(group, len(group) // 5, split)
    if split in ("bench", "heldout") or rng.random() < 0.33:
        return rng.choice(written)
    if HAN.search(
        written[0]
    ):  # the measure word and the thing of one, the description of the other
        one, other = rng.sample(written, 2)
        return one[:2] + other[2 : other.index("的")] + one[one.index("的") :]
    words = [w for phrase in written for w in phrase.split()[1:] if len(w) > 2]
    while True:
        some = [
            rng.choice(words) if rng.random() < 0.5 else word
            for word in odd_words(rng, rng.randint(1, 4))
        ]
        phrase = ("an " if some[0][0] in "aeiou" else "a ") + " ".join(some)
        if phrase not in group:
            return phrase


@lru_cache
def bench_book():
    """The written material of VisGenBench's tasks: the scenarios with the words of data/visgenbench.yaml in place of their own."""
    words, book = (
        yaml.load(
            BENCH_WORDS.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        ),
        load_scenarios("en"),
    )
    return {
        **book,
        **words,
        "frames": [],
        "scenarios": {
            name: {**s, "wordings": words["wordings"][name]}
            for name, s in book["scenarios"].items()
        },
    }


def make_task(
    rng, split, config, scenario_name=None, language="en", dimension=None, suits=lambda c: True
):
    """One task record (design: Records). Wordings and subjects of a split are its own; combinations of constraints of training are its own.

    `suits`: what else the constraints must be; `dimension`: VisGenBench's, which decides what else the request says. None if nothing suits.
    """
    book, shown = (
        bench_book() if split == "bench" else load_scenarios(language),
        split in ("visgen", "train"),
    )
    part = (
        (lambda items, held: items)
        if split == "bench"
        else lambda items, held: split_list(items, held, split)
    )  # noqa: E731
    name = scenario_name or rng.choice(list(book["scenarios"]))
    s = book["scenarios"][name]
    clauses = {k: part(v, 2) for k, v in book["clauses"].items()}
    for _ in range(1000):
        c = choose_constraints(rng, s, config)
        if (
            (combination_split(c) == "train") == shown
            and suits(c)
            and len(expand_workflow(fitting_workflows(c)[0], c)) <= config.max_steps
        ):
            break
    else:
        if dimension:
            return None
        raise RuntimeError(
            f"scenario {name}: no combination of constraints of the {split} split in 1000 draws"
        )
    c["subject"] = thing = choose_subject(rng, book["subjects"][rng.choice(s["subjects"])], split)
    details = rng.sample(book["details"], 2) if dimension == "match" else []
    c["subject"] += f" with {details[0]} and {details[1]}" if details else ""
    if rng.random() < 0.6:
        styles = part(book["styles"], len(book["styles"]) // 6)
        c["style"] = rng.choice(styles)
        if shown and rng.random() < 0.6:
            c["style"] = (
                " ".join(odd_words(rng, rng.randint(1, 3)))
                if language == "en"
                else "与".join(rng.sample(styles, 2))
            )
    said = [rng.choice(book[dimension])] if dimension in ("creative", "variety") else []
    for kind, value in (
        ("duration", c["duration_s"]),
        ("shots", c["shots"]),
        ("aspect", c["aspect_ratio"]),
        ("resolution_video", c["videos"] and c["resolution"]),
        ("large", c["resolution"] == "2K"),
        ("transparent", c["transparent"]),
        ("html", c["web_page"]),
        ("input", c["input"] and "in_1"),
        ("object", "object" in c["consistency"] and s["consistency_word"]),
        ("scene", "scene" in c["consistency"]),
        ("style", "style" in c["consistency"]),
        *((a, True) for a in c["audio"]),
        ("beat", c["beat"]),
    ):
        if value:
            value = (
                rng.choice([value, book["number_words"].get(value, value)])
                if kind == "shots"
                else value
            )
            said.append(re.sub(r"{\w+}", str(value), rng.choice(clauses[kind])))
    if shown:  # irrelevant detail; that of other requests stands in their wordings
        said += [
            re.sub("{word}", lambda _: odd_words(rng, 1)[0], rng.choice(book["asides"]))
            for _ in range(rng.choice([0, 0, 1, 2]))
        ]
    rng.shuffle(said)
    what = count_phrase(rng, c["images"] or c["videos"], s["noun"], language)
    style = book["grammar"]["style"].format(c["style"]) if c["style"] else ""
    framed = shown and rng.random() < 0.5
    wordings = split_list(book["frames"], 0, split) if framed else part(s["wordings"], 3)
    request = rng.choice(wordings).format(
        what=what, subject=c["subject"], style=style, extras=book["grammar"]["between"].join(said)
    )
    inputs = (
        [
            {"id": "in_1", "kind": "image", "width": w, "height": h, "duration_s": None}
            for w, h in [rng.choice([(1024, 1024), (1280, 960), (960, 1280), (1600, 900)])]
        ]
        if c["input"]
        else []
    )
    workflow, pool = task_agent(request)
    asked = sum(bool(v) for k, v in c.items() if k not in ("images", "videos", "subject"))
    words = {"subject": thing, **{f"detail_{i}": d for i, d in enumerate(details, 1)}}
    rubric = (
        {
            "rubric": [
                item.format(**words) for item in book["rubrics"][s["modality"]].get(dimension, [])
            ]
        }
        if dimension
        else {}
    )
    return {
        "id": "",
        "split": split,
        "modality": s["modality"],
        "scenario": name,
        "dimension": dimension
        or ("duration" if c["duration_s"] else "storyboard" if c["shots"] else "amount"),
        "request": " ".join(request.split()),
        "language": language,
        "inputs": inputs,
        "constraints": c,
        "difficulty": "easy" if asked <= 1 else "medium" if asked <= 3 else "hard",
        "workflow": workflow,
        "pool": pool,
        **rubric,
    }


def make_tasks(n, split, config, seed):
    """n distinct task records, the scenarios of the config's languages in turn, so that each gives tasks."""
    kinds, tasks = (
        [
            (name, language)
            for language in config.languages
            for name in load_scenarios(language)["scenarios"]
        ],
        {},
    )
    rng = seeded_rng(seed, "tasks", split, n)
    while len(tasks) < n:
        task = make_task(rng, split, config, *kinds[len(tasks) % len(kinds)])
        tasks.setdefault(task["request"], {**task, "id": f"{split}-{len(tasks):05d}"})
    return list(tasks.values())


# What a request must ask for, to be a task of a dimension of VisGenBench (Table 1); the others suit any request.
SUITS = {
    "object": lambda c: "object" in c["consistency"],
    "scene": lambda c: "scene" in c["consistency"],
    "style": lambda c: "style" in c["consistency"],
    "variety": lambda c: c["images"] + c["videos"] > 1 and not c["consistency"],
    "duration": lambda c: c["duration_s"],
    "storyboard": lambda c: c["shots"],
}


def make_bench():
    """VisGenBench's 1,200 tasks with Table 1's composition, the scenarios in turn; `in_104` marks the stratified subset VisGenBench-104.

    Ours where the paper is silent: every third image task comes with the user's picture, every other video task of a scenario is long.
    """
    book, tasks = bench_book(), {}
    sizes = [
        (modality, dimension, n)
        for modality, row in book["composition"].items()
        for dimension, n in row.items()
    ]
    exact = {key: 104 * n / 1200 for *key, n in sizes for key in [tuple(key)]}
    few = {key: int(x) for key, x in exact.items()}
    for key in sorted(exact, key=lambda key: few[key] - exact[key])[
        : 104 - sum(few.values())
    ]:  # the largest remainders
        few[key] += 1
    for modality, dimension, n in sizes:
        rng, names, made, tries = (
            seeded_rng("VisGenBench", modality, dimension),
            [k for k, s in book["scenarios"].items() if s["modality"] == modality],
            0,
            0,
        )
        rng.shuffle(names)
        while made < n:
            tries += 1
            lone, limits = made % 3 == 0, DataConfig(**book["limits"], long=made % 2 == 0)
            task = make_task(
                rng,
                "bench",
                limits,
                names[tries % len(names)],
                dimension=dimension,
                suits=lambda c: (
                    SUITS.get(dimension, bool)(c)
                    and (c["input"] or modality == "video" or not lone)
                ),
            )
            if task is None or task["request"] in tasks:
                continue
            in_104 = (made + 1) * few[modality, dimension] // n > made * few[
                modality, dimension
            ] // n  # spread over the stratum
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
    slot = {
        "d": r"\d+",
        "k": number,
        "a": r"\d+:\d+",
        "r": r"\d+p",
        "id": r"in_\d+",
        "thing": "|".join(sorted({s["consistency_word"] for s in book["scenarios"].values()})),
    }
    # Each with its longest piece outside slots: to look for that first is much cheaper than the pattern.
    clause = {
        kind: [
            (
                max(re.split(r"{\w+}", text), key=len),
                re.sub(r"\\{(\w+)\\}", lambda m: f"({slot[m[1]]})", re.escape(text)),
            )
            for text in texts
        ]
        for kind, own in book["clauses"].items()
        for texts in [own + (bench["clauses"][kind] if bench else [])]
    }
    nouns = sorted(
        {(n, name) for name, s in book["scenarios"].items() for n in s["noun"]},
        key=lambda x: -len(x[0]),
    )
    noun = [
        (re.compile(book["grammar"]["noun"].format(number, re.escape(n)), re.I), name)
        for n, name in nouns
    ]
    # A request is matched with its noun phrase ("two posters") taken out, so a frame is one pattern for all scenarios.
    # The longest first: "Design {what} for {subject}" would also fit "Design {what} for a game about {subject}".
    texts = {
        name: sorted(s["wordings"] + book["frames"], key=len, reverse=True)
        + (bench["scenarios"][name]["wordings"] if bench else [])
        for name, s in book["scenarios"].items()
    }
    slots = book["grammar"]["slots"]
    pattern = {
        t: re.compile(
            re.sub(
                r"\\{(\w+)\\}", lambda m: slots[m[1]], re.escape(t.replace(" {extras}", "{extras}"))
            ),
            re.I,
        )
        for t in {t for some in texts.values() for t in some}
    }
    wording = {name: [pattern[text] for text in some] for name, some in texts.items()}
    return clause, noun, wording


def read_request(request):
    """TaskAgent's reading: the constraints that a request states, from its text alone."""
    language = "zh" if HAN.search(request) else "en"
    book, (clause, nouns, wordings) = load_scenarios(language), reading_patterns(language)
    numbers = {w: n for n, w in book["number_words"].items()} | {"a": 1, "an": 1}
    number = lambda text: numbers.get(text.lower()) or int(text)  # noqa: E731
    said = {
        kind: next(
            (m for piece, p in patterns if piece in request and (m := re.search(p, request))), None
        )
        for kind, patterns in clause.items()
    }
    c = json.loads(json.dumps(NO_CONSTRAINTS))
    phrase, name = next(((m, name) for p, name in nouns if (m := p.search(request))), (None, None))
    scenario = book["scenarios"].get(name, {"modality": "image", "title": ""})
    c["images" if scenario["modality"] == "image" else "videos"] = (
        number(phrase.group(1)) if phrase else 1
    )
    for field, kind, read in (
        ("duration_s", "duration", int),
        ("shots", "shots", number),
        ("aspect_ratio", "aspect", str),
        ("resolution", "resolution_video", str),
    ):
        c[field] = read(said[kind].group(1)) if said[kind] else None
    c["resolution"] = "2K" if said["large"] else c["resolution"]
    c["transparent"], c["web_page"], c["beat"], c["input"] = (
        bool(said[k]) for k in ("transparent", "html", "beat", "input")
    )
    c["consistency"] = [k for k in ("object", "scene", "style") if said[k]]
    # In the order in which the request names them.
    c["audio"] = sorted(
        (k for k in ("music", "narration", "sfx", "subtitles") if said[k]),
        key=lambda k: said[k].start(),
    )
    c["storyboard"] = scenario["title"] == "Storyboards"
    rest = request[: phrase.start()] + "\0" + request[phrase.end() :] if phrase else request
    m = next((m for p in wordings.get(name, []) if (m := p.search(rest))), None)
    c["subject"], c["style"] = (m["subject"], m["style"]) if m else (request, None)
    return c


def task_agent(request):
    """TaskAgent (Fig. 4): read the request, choose the workflow and the pool of tools: its own and six others at random, so that
    a policy has something to choose from. The task type is the one whose noun the request uses; the workflow follows from what it asks for."""
    c = read_request(request)
    workflow = fitting_workflows(c)[0]
    own = {t for s in load_workflows()[workflow]["steps"] for t in s["tool"]}
    other = seeded_rng("pool", request).sample([t for t in load_tools() if t not in own], 6)
    return workflow, [t for t in load_tools() if t in own or t in other]


def facts_of(c):
    """The request's constraints in a fixed, short form: '3 images, watercolor, 16:9, same object'."""
    n, kind = (c["images"], "image") if c["images"] else (c["videos"], "video")
    parts = [
        f"{n} {kind}{'s' * (n > 1)}",
        c["style"],
        c["shots"] and f"{c['shots']} shots",
        c["duration_s"] and f"{c['duration_s']} s",
        c["aspect_ratio"],
        c["resolution"],
        *(f"same {k}" for k in c["consistency"]),
        *c["audio"],
        c["beat"] and "on the beat",
        c["transparent"] and "transparent",
        c["web_page"] and "web page",
        c["input"] and "from in_1",
    ]
    return ", ".join(p for p in parts if p)


@lru_cache
def load_scenarios(language):
    """data/scenarios.yaml: the 42 task types of Table 8, their wordings, and the subjects, styles and clauses that fill them; zh: scenarios_zh.yaml."""
    if language not in ("en", "zh"):
        raise SystemExit(f"error: config key `data.languages` holds {language!r}; allowed: en, zh")
    text = (
        ROOT / "data" / ("scenarios.yaml" if language == "en" else "scenarios_zh.yaml")
    ).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@lru_cache(maxsize=1)
def english_words():
    """The words of data/words.txt, in order."""
    lines = (ROOT / "data" / "words.txt").read_text(encoding="utf-8").splitlines()
    return sorted({word for line in lines if not line.startswith("#") for word in line.split()})


@lru_cache(maxsize=1)
def common_words():
    """Words of three letters or more, in order: of data/words.txt and of the training subjects and styles."""
    book = load_scenarios("en")
    shown = [g[: len(g) - len(g) // 5] for g in book["subjects"].values()] + [
        book["styles"][: len(book["styles"]) - len(book["styles"]) // 6]
    ]
    return sorted(
        w
        for w in {*english_words(), *(w for phrase in sum(shown, []) for w in phrase.split())}
        if len(w) > 2 and w.isalpha()
    )


def odd_words(rng, n):
    """n words: common ones and, four in ten, made-up ones, which begin like one and end like another, so that no one knows them by heart.

    One time in three nearly all are made up, and of four words' parts: pieces come again, and a copy must know more than the last one. Shares ours.
    """
    few = rng.random() < 0.33
    of, words = rng.sample(common_words(), 4) if few else common_words(), []
    for _ in range(n):
        a, b = rng.choice(of), rng.choice(of)
        plain = rng.random() < (0.1 if few else 0.6)
        words.append(
            a
            if plain
            else a[: rng.randint(2, max(2, len(a) - 2))] + b[-rng.randint(2, max(2, len(b) - 2)) :]
        )
    return words
