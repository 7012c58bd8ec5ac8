"""Tasks: requests in words, with the constraints that the words state; and VisGenBench's (Table 1).

A task is made the other way round from how it is read: constraints are chosen, said in written
wordings, and lib/reading.py finds them in the words again. The shares and chances here are ours.
"""

import copy
import hashlib
import re
from collections import Counter
from functools import partial

from lib.experiment import DataConfig
from lib.families import asked_kind, attach_media, draw_wish, load_families, wish_sentence
from lib.reading import NO_CONSTRAINTS, task_agent
from lib.runs import ROOT, seeded_rng
from lib.scenarios import (
    HAN,
    bench_book,
    load_scenarios,
    material,
    odd_words,
    split_list,
)
from lib.text import to_json
from lib.workflows import expand_workflow, fitting_workflows, n_shots

BENCH = ROOT / "data" / "visgenbench.jsonl"
# The splits that a policy learns from: expert trajectories, VRL's tasks, reading exercises.
TRAINING = ("visgen", "train", "reading")
# The dimensions of VisGenBench in which requests of a family take part.
FAMILIAR = ("match", "amount", "duration")
# Those that ask for one thing, place or look in all pictures or shots.
ALIKE = ("object", "scene", "style")
# Of VisGenBench's tasks, these many are in Chinese.
CHINESE = 200
# The families that come round more than once in VisGenBench: few others attach sound or film.
OFTEN = {
    "best_recording": 8,
    "best_film": 4,
    "film_crop": 2,
    "film_watermark": 2,
    "film_loop": 2,
    "film_pace": 2,
    "long_job": 2,
}


def make_tasks(n: int, split: str, config: DataConfig, seed: int) -> list[dict]:
    """n task records of distinct requests, the scenarios of the config's languages in turn, so that
    each gives tasks."""
    kinds = task_types(config)
    rng = seeded_rng(seed, "tasks", split, n)
    tasks = {}
    while len(tasks) < n:
        name, language = kinds[len(tasks) % len(kinds)]
        task = make_task(rng, split, config, name, language)
        tasks.setdefault(task["request"], {**task, "id": f"{split}-{len(tasks):05d}"})
    return list(tasks.values())


def task_types(config: DataConfig) -> list[tuple[str, str]]:
    """(name, language) of each task type of `data.languages` and `data.scenarios`.

    SystemExit for a name that none of these languages has.
    """
    every = [
        (name, language)
        for language in config.languages
        for name in load_scenarios(language)["scenarios"]
    ]
    if config.scenarios == ["all"]:
        return every
    names = {name for name, _ in every}
    for name in config.scenarios:
        if name not in names:
            raise SystemExit(
                f"error: config key `data.scenarios` holds {name!r}; allowed: all alone, or some "
                f"of {', '.join(sorted(names))}"
            )
    return [(name, language) for name, language in every if name in config.scenarios]


def make_task(
    rng,
    split: str,
    config: DataConfig,
    scenario_name: str | None = None,
    language: str = "en",
    dimension: str | None = None,
    with_picture: bool = False,
    family: str | None = None,
    used: Counter | None = None,
) -> dict | None:
    """One task record, with an empty id.

    `split`: visgen | train | heldout | bench | reading; its wordings and subjects are its own, and
    so are the combinations of constraints of training; `reading` has the subjects, styles and
    combinations of training, in the wordings of all splits but the bench. `dimension`:
    VisGenBench's, which decides what else the request says; `with_picture`: only a request that
    comes with the user's picture will do; `family`: one of data/families.yaml, otherwise
    `data.families` decides by chance; `used`: how often each text stands in a set of tasks so far:
    the least used are taken, and counted; without it chance decides. None if no constraints suit
    the dimension; RuntimeError if none of a scenario belong to the split.
    """
    book = material(split, language)
    name = scenario_name or rng.choice(list(book["scenarios"]))
    scenario = book["scenarios"][name]
    family = family or choose_family(rng, scenario, config)
    c = fitting_constraints(
        rng, scenario, split, config, dimension, with_picture, (family, language)
    )
    if c is None and dimension:
        return None
    if c is None:
        raise RuntimeError(
            f"scenario {name}: no combination of constraints of the {split} split in 1000 draws"
        )

    choose = rng.choice if used is None else partial(least_used, rng, used)
    # Copying made-up words is what SFT teaches; VRL is about what to do with a request.
    invented = config.invented and split in ("visgen", "reading")
    group = book["subjects"][rng.choice(scenario["subjects"])]
    thing = choose_subject(rng, group, split, invented, choose)
    details = rng.sample(book["details"], 2) if dimension == "match" else []
    c["subject"] = book["detailed"].format(thing, *details) if details else thing
    styled = not family or load_families()[family]["styled"]
    styles = fitting_styles(book, scenario, c["subject"])
    c["style"] = choose_style(rng, styles, language, invented, choose) if styled else None
    c["variety"] = dimension == "variety"
    request = word_request(rng, c, scenario, book, split, language, dimension, invented, choose)
    if family:
        inputs = attach_media(rng, c, language)
    else:
        inputs = [choose_picture(rng)] if c["input"] else []
    workflow, pool = task_agent(request)
    task = {
        "id": "",
        "split": split,
        "modality": scenario["modality"],
        "scenario": name,
        "dimension": dimension or dimension_of(c),
        "request": " ".join(request.split()),
        "language": language,
        "inputs": inputs,
        "constraints": c,
        "difficulty": difficulty_of(c),
        "workflow": workflow,
        "pool": pool,
    }
    if dimension:
        slots = {"subject": thing, **{f"detail_{i}": d for i, d in enumerate(details, 1)}}
        items = book["rubrics"][scenario["modality"]].get(dimension, [])
        if family:
            items = items + load_families()[family]["rubric"]
        task["rubric"] = [item.format(**slots) for item in items]
    return task


# ---------------------------------------------------------------------------- what is asked for
def choose_family(rng, scenario, config):
    """One of data/families.yaml's families of the scenario's modality, or None: an ordinary
    request."""
    if not config.families or rng.random() >= config.families:
        return None
    families = load_families().items()
    return rng.choice([n for n, f in families if f["modality"] == scenario["modality"]])


def fitting_constraints(rng, scenario, split, config, dimension, with_picture, family):
    """Constraints whose combination belongs to the split, which suit a dimension and need at most
    `data.max_steps` steps. `family`: (name or None, language). None where a thousand tries find
    none."""
    side = "train" if split in TRAINING else "heldout"
    for _ in range(1000):
        if family[0]:
            c = {**copy.deepcopy(NO_CONSTRAINTS), **draw_wish(rng, *family)}
            c["storyboard"] = scenario["title"] == "Storyboards"
        else:
            c = choose_constraints(rng, scenario, config)
        if combination_split(c) != side or not suits(c, dimension):
            continue
        if with_picture and not c["input"]:
            continue
        if len(expand_workflow(fitting_workflows(c)[0], c)) <= config.max_steps:
            return c
    return None


def choose_constraints(rng, scenario: dict, config: DataConfig) -> dict:
    """What one request will ask for, within what the scenario makes plausible; durations in
    seconds. With `data.long` above 1 it asks for more of everything."""
    if scenario["modality"] == "image":
        return choose_image_constraints(rng, scenario, config)
    return choose_video_constraints(rng, scenario, config)


def choose_image_constraints(rng, scenario, config):
    """How many images, from the user's picture or of a special kind, how alike, of which shape."""
    c = copy.deepcopy(NO_CONSTRAINTS)
    low, high = scenario["counts"]
    high = max(low, min(high * config.long, config.max_images))
    c["images"] = rng.randint((low + high + 1) // 2 if config.long > 1 else low, high)
    share_of_inputs = 1.0 if scenario["title"] == "Stylization" else 0.4
    c["input"] = scenario["input"] and rng.random() < share_of_inputs

    kind = ""
    if not c["input"]:
        kinds = [kind for kind in ("transparent", "large", "html") if scenario[kind]]
        kind = rng.choice([*kinds, "", ""])
    c["transparent"] = kind == "transparent"
    c["web_page"] = kind == "html"
    c["resolution"] = "2K" if kind == "large" else None

    can_be_alike = c["images"] > 1 and scenario["consistency"] and kind in ("", "html")
    if can_be_alike and rng.random() < (0.9 if config.long > 1 else 0.6):
        c["consistency"] = [rng.choice(scenario["consistency"])]

    aspects = scenario["aspects"]
    if kind == "transparent":
        aspects = [aspect for aspect in aspects if aspect in ("1:1", "3:2", "2:3")]
    c["aspect_ratio"] = rng.choice(aspects) if aspects and rng.random() < 0.7 else None
    c["storyboard"] = scenario["title"] == "Storyboards"
    return c


def choose_video_constraints(rng, scenario, config):
    """How many films, of how many shots and seconds, which shape, how alike, with which sound."""
    c = copy.deepcopy(NO_CONSTRAINTS)
    several = rng.random() < (0.1 if config.long > 1 else 0.3)
    c["videos"] = rng.randint(*scenario["counts"]) if several else 1

    most_shots = min(scenario["shots"][1] * config.long, config.max_shots)
    if c["videos"] > 1:
        c["duration_s"] = rng.choice([None, 4, 6, 8])
    elif most_shots >= 2 and rng.random() < (0.95 if config.long > 1 else 0.6):
        fewest = max(2, most_shots // 2) if config.long > 1 else 2
        c["shots"] = rng.randint(fewest, most_shots)
        # Whole clips, and half of the time a second or two less, which has to be trimmed.
        durations = [c["shots"] * s + more for s in (4, 5, 6, 8) for more in (0, 0, -1, -2)]
        c["duration_s"] = rng.choice([None, *durations])
    else:
        durations = [None, 4, 5, 6, 7, 8]
        if most_shots >= 2:
            durations += [10, 12, 16]
        c["duration_s"] = rng.choice(durations)

    aspects = [aspect for aspect in scenario["aspects"] if aspect != "1:1" or c["videos"] == 1]
    c["aspect_ratio"] = rng.choice(aspects) if rng.random() < 0.6 else None
    c["resolution"] = "1080p" if rng.random() < 0.2 else None
    can_be_alike = n_shots(c) > 1 and scenario["consistency"]
    if can_be_alike and rng.random() < (0.9 if config.long > 1 else 0.5):
        c["consistency"] = [rng.choice(scenario["consistency"])]
    sounds = [kind for kind in scenario["audio"] if kind in config.sounds]
    if sounds and c["videos"] == 1 and rng.random() < 0.6:
        c["audio"] = choose_sound(rng, sounds, c["duration_s"])
    beat = "music" in c["audio"] and n_shots(c) > 1 and rng.random() < 0.4
    # A cut moves to the nearest beat, so a shot must have a second to spare: no clip of Veo's
    # lasts more than 8 s.
    c["beat"] = beat and (c["duration_s"] or 0) <= 7 * n_shots(c)
    return c


def choose_sound(rng, kinds, duration_s):
    """One or two of a scenario's kinds of sound, less the effects where they cannot be had."""
    sounds = rng.sample(kinds, min(len(kinds), rng.choice([1, 1, 2])))
    # One composite takes one sound track, so music and designed effects are asked for apart.
    # No call makes more than 30 s of effects, and they are to be heard over half of the film.
    if "music" in sounds or (duration_s or 0) > 60:
        return [kind for kind in sounds if kind != "sfx"]
    return sounds


def combination(c: dict) -> str:
    """A request's combination of constraints as one string; subject and style aside, and what only
    families have where it is of none, so that these move no other combination to another side."""
    # The scenario says `storyboard`, and a family has too few combinations for two of each. Variety
    # is VisGenBench's alone.
    aside = ["storyboard"] if c.get("family") else ["family", "deliver", "wish", "variety"]
    return to_json({k: v for k, v in c.items() if k not in ("subject", "style", *aside)})


def combination_split(c: dict) -> str:
    """Which side a combination of constraints belongs to, `train` or `heldout`: every sixth is
    never shown in training (ours). A request for nothing but a number of pictures or films combines
    nothing, and is training's: nobody could learn from longer lists that one may end there."""
    apart = ("subject", "style", "images", "videos", "storyboard", "variety")
    if not any(value for name, value in c.items() if name not in apart):
        return "train"
    hashed = hashlib.blake2b(combination(c).encode(), digest_size=4).hexdigest()
    return "heldout" if int(hashed, 16) % 6 == 0 else "train"


def suits(c: dict, dimension: str | None) -> bool:
    """Whether a request with these constraints can be a task of a dimension of VisGenBench."""
    if dimension in ALIKE:
        return dimension in c["consistency"]
    if dimension == "variety":
        return c["images"] + c["videos"] > 1 and not c["consistency"]
    if dimension == "duration":
        return bool(c["duration_s"]) and asked_kind(c) != "text"
    if dimension == "match":
        return not c["deliver"]
    if dimension == "storyboard":
        return bool(c["shots"])
    return True


def dimension_of(c):
    """The dimension of VisGenBench that measures a request of training best."""
    if c["duration_s"]:
        return "duration"
    return "storyboard" if c["shots"] else "amount"


def difficulty_of(c):
    """easy, medium or hard, by how many things a request asks for (ours)."""
    asked = sum(
        bool(v) for k, v in c.items() if k not in ("images", "videos", "subject", "variety")
    )
    if asked <= 1:
        return "easy"
    return "medium" if asked <= 3 else "hard"


def least_used(rng, used: Counter, texts: list[str]) -> str:
    """One of the texts that were used least so far, which is counted as used."""
    fewest = min(used[text] for text in texts)
    text = rng.choice([text for text in texts if used[text] == fewest])
    used[text] += 1
    return text


def choose_subject(rng, group: list[str], split: str, invented: bool, choose=None) -> str:
    """One of the split's subjects of a group or, where `invented` two times in three, one put
    together from their words: nobody learns these by heart, so the policy has to read them."""
    written = split_list(group, len(group) // 5, split)
    if not invented or rng.random() < 0.33:
        return (choose or rng.choice)(written)
    return compose_chinese(rng, written) if HAN.search(written[0]) else compose(rng, written, group)


def compose(rng, written, group):
    """A subject of one to four words, those of written ones, common and made-up ones, that is not
    written anywhere in the group: "a braided velour lantern"."""
    words = {word for subject in written for word in subject.split()[1:] if len(word) > 2}
    words = sorted(word for word in words if word.isalpha() and word.islower())
    while True:
        chosen = [
            rng.choice(words) if rng.random() < 0.5 else odd_word
            for odd_word in odd_words(rng, rng.randint(1, 4), alike=0)
        ]
        article = "an" if chosen[0][0].lower() in "aeiou" else "a"
        subject = f"{article} {' '.join(chosen)}"
        if subject not in group:
            return subject


def compose_chinese(rng, written):
    """The measure word and the thing of one written subject, the description of another."""
    one, other = rng.sample(written, 2)
    return one[:2] + other[2 : other.index("的")] + one[one.index("的") :]


def fitting_styles(book: dict, scenario: dict, subject: str) -> list[str]:
    """The styles that suit a task type, less those that `contradictions` rules out for this
    subject: nobody asks for a red kite in black and white."""
    barred = [style for said, style in book["contradictions"] if re.search(said, subject)]
    styles = [style for group in scenario["styles"] for style in book["styles"][group]]
    return [style for style in styles if not any(re.search(bar, style) for bar in barred)]


def choose_style(rng, styles: list[str], language: str, invented: bool, choose) -> str | None:
    """One of the styles, where `invented` often one put together from words; or None."""
    if rng.random() >= 0.6:
        return None
    style = choose(styles)
    if not invented or rng.random() >= 0.6:
        return style
    if language == "en":
        return " ".join(odd_words(rng, rng.randint(1, 3), alike=0))
    return "与".join(rng.sample(styles, 2))


def choose_picture(rng):
    """A picture that the user attaches."""
    width, height = rng.choice([(1024, 1024), (1280, 960), (960, 1280), (1600, 900)])
    return {"id": "in_1", "kind": "image", "width": width, "height": height, "duration_s": None}


# ---------------------------------------------------------------------------- how it is said
def word_request(rng, c, scenario, book, split, language, dimension, invented, choose):
    """A request in words: one wording, filled with what is to be made, and one sentence for each
    other constraint, in any order."""
    sentences = [choose(book[dimension])] if dimension in ("creative", "variety") else []
    sentences += word_constraints(rng, c, scenario, book, choose)
    if c["family"]:
        sentences.append(wish_sentence(choose, c, book["wishes"][c["family"]]))
    if split in TRAINING:
        # Irrelevant detail; that of other requests stands in their wordings.
        asides = [text for text in book["asides"] if invented or "{word}" not in text]
        for aside in rng.sample(asides, rng.choice([0, 0, 1, 2])):
            sentences.append(re.sub("{word}", lambda _: odd_words(rng, 1, alike=0)[0], aside))
    rng.shuffle(sentences)
    what = count_phrase(rng, c["images"] or c["videos"], scenario["noun"], language)
    framed = split in TRAINING and rng.random() < 0.5
    wording = choose(book["frames"] if framed else scenario["wordings"])
    return wording.format(
        what=what,
        subject=c["subject"],
        style=book["grammar"]["style"].format(c["style"]) if c["style"] else "",
        extras=book["grammar"]["between"].join(sentences),
    )


def word_constraints(rng, c, scenario, book, choose):
    """A sentence for each constraint that the wording itself does not say."""
    duration = "duration"
    if "duration_each" in book["clauses"] and c["videos"] > 1:
        duration = "duration_each"
    elif "duration_sound" in book["clauses"] and asked_kind(c) == "audio":
        duration = "duration_sound"
    # {kind of clause: what fills its slot}; what is false is not asked for.
    stated = {
        duration: c["duration_s"],
        "shots": c["shots"],
        "aspect": c["aspect_ratio"],
        "resolution_video": c["videos"] and c["resolution"],
        "large": c["resolution"] == "2K",
        "transparent": c["transparent"],
        "html": c["web_page"],
        "input": c["input"] and "in_1",
        "object": "object" in c["consistency"] and scenario["consistency_word"],
        "scene": "scene" in c["consistency"],
        "style": "style" in c["consistency"],
        **dict.fromkeys(c["audio"], True),
        "beat": c["beat"],
    }
    sentences = []
    for kind, value in stated.items():
        if not value:
            continue
        if kind == "shots":
            value = rng.choice([value, book["number_words"].get(value, value)])
        sentences.append(re.sub(r"{\w+}", str(value), choose(book["clauses"][kind])))
    return sentences


def count_phrase(rng, n: int, noun: list[str], language: str) -> str:
    """A number and a noun (one, many) as a user would say them: 'a logo', 'three logos', '3 logos',
    '三个标志'."""
    one, many = noun
    if n == 1 and language == "en":
        article = "an" if one[0] in "aeiouAEIOU" else "a"
        return rng.choice([f"{article} {one}", f"one {one}"])
    number = rng.choice([str(n), load_scenarios(language)["number_words"][n]])
    return f"{number} {many}" if language == "en" else number + rng.choice(noun)


# ---------------------------------------------------------------------------- VisGenBench
def make_bench() -> list[dict]:
    """VisGenBench's 1,200 tasks with Table 1's composition, the scenarios in turn; `in_104` marks
    the stratified subset VisGenBench-104.

    Ours where the paper is silent: CHINESE of the tasks are in Chinese, every third image task
    comes with the user's picture, three tasks in four are long, and of the English tasks of the
    strata FAMILIAR every fifth (video: two in five) is of a family of data/families.yaml. Of
    texts, the least used is always taken.
    """
    book = bench_book("en")
    sizes = {
        (modality, dimension): n
        for modality, row in book["composition"].items()
        for dimension, n in row.items()
    }
    in_subset, in_chinese = shares_of(104, sizes), shares_of(CHINESE, sizes)
    used = Counter()
    tasks = {}
    for (modality, dimension), n in sizes.items():
        rng = seeded_rng("VisGenBench", modality, dimension)
        families = families_for(modality, dimension)
        chinese = set(rng.sample(range(n), in_chinese[modality, dimension]))
        few = in_subset[modality, dimension]
        english = of_family = 0
        for made in range(n):
            language, family = "zh", None
            if made not in chinese:
                language = "en"
                english += 1
                if families and english % 5 in ((2, 4) if modality == "video" else (4,)):
                    family = families[of_family % len(families)]
                    of_family += 1
            task = next_task(rng, modality, dimension, made, language, family, tasks, used)
            # The subset is laid over the stratum evenly: task i is in it where i * few / n passes
            # a whole number.
            in_104 = (made + 1) * few // n > made * few // n
            tasks[task["request"]] = {**task, "id": f"vgb2-{len(tasks) + 1:04d}", "in_104": in_104}
    return list(tasks.values())


def next_task(rng, modality, dimension, made, language, family, tasks, used):
    """The task number `made` of a stratum, of the task type that has the fewest so far and gives
    one; `tasks`: those made, by their requests."""
    book = bench_book(language)
    with_picture = modality == "image" and made % 3 == 0 and not family
    names = [
        name
        for name, scenario in book["scenarios"].items()
        if scenario["modality"] == modality
        and (scenario.get("input") or not with_picture)
        and (dimension not in ALIKE or dimension in scenario["consistency"])
    ]
    rng.shuffle(names)
    names.sort(key=lambda name: used[name])
    limits = bench_book("en")["limits"]
    for name in names * 10:
        task = make_task(
            rng,
            "bench",
            DataConfig(**limits, long=1 if made % 4 == 1 else 2, families=0.0),
            name,
            language,
            dimension=dimension,
            with_picture=with_picture,
            family=family,
            used=used,
        )
        if task and task["request"] not in tasks:
            used[name] += 1
            return task
    raise RuntimeError(f"VisGenBench: no task of {modality}, {dimension}, {language}, {family}")


def families_for(modality, dimension):
    """The families whose requests suit one of FAMILIAR, the dimensions that have any, each as often
    as its turn comes round (OFTEN)."""
    rng = seeded_rng("families")
    families = [
        name
        for name, family in load_families().items()
        if family["modality"] == modality
        and dimension in FAMILIAR
        and suits({**NO_CONSTRAINTS, **draw_wish(rng, name, "en")}, dimension)
        for _ in range(OFTEN.get(name, 1))
    ]
    rng.shuffle(families)
    return families


def shares_of(total, sizes):
    """`total` divided over strata by their sizes, in whole numbers: what is left over after
    rounding down goes to the largest remainders."""
    exact = {key: total * n / sum(sizes.values()) for key, n in sizes.items()}
    shares = {key: int(share) for key, share in exact.items()}
    by_remainder = sorted(exact, key=lambda key: shares[key] - exact[key])
    for key in by_remainder[: total - sum(shares.values())]:
        shares[key] += 1
    return shares
