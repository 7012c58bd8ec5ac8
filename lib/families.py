"""Families of requests that need the tools which the 15 workflows leave aside (data/families.yaml).

A family is data: a wish in words, what the user attaches, the expert's workflow and the names of
the checks in lib/wishes.py. Here a request of a family is drawn, and what comes with it is made.
All of it is ours: the paper names 36 tools and does not say what its requests need them for.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lib.scenarios import english_words, read_yaml
from lib.toolbox import chance, load_tools

# What a request may want handed over in place of a picture or film: the kind of artifact it is.
DELIVERABLES = {
    "prompt": "text",
    "script": "text",
    "board": "text",
    "speech": "audio",
    "music": "audio",
    "recording": "audio",
}


@lru_cache(maxsize=1)
def load_families() -> dict[str, dict]:
    """data/families.yaml's families by name."""
    return read_yaml("families.yaml")["families"]


@lru_cache(maxsize=1)
def family_workflows() -> dict[str, dict]:
    """The families' workflows, in the form of data/workflows.yaml; each serves its family alone."""
    fields = ("title", "practice", "modality", "steps")
    return {
        name: {**{k: family[k] for k in fields}, "requires": [name], "fits": []}
        for name, family in load_families().items()
    }


def asked_kind(c: dict) -> str:
    """The kind of artifact that a request wants. `c`: its constraints."""
    if deliver := c.get("deliver"):
        return DELIVERABLES[deliver]
    return "image" if c["images"] else "video"


# ---------------------------------------------------------------------------- drawing a request
def draw_wish(rng, name: str, language: str) -> dict:
    """The constraints that a request of this family has beside subject and style."""
    family = load_families()[name]
    drawn = {key: rng.choice(values) for key, values in family["draws"].items()}
    wish = {}
    for slot, values in family["wish"].items():
        if values == "address":
            wish[slot] = draw_address(rng)
        else:
            wish[slot] = rng.choice(values[language] if isinstance(values, dict) else values)
    return {**drawn, "family": name, "deliver": family.get("deliver"), "wish": wish}


def draw_address(rng):
    """The address of a page that the simulated web has; a share of pages cannot be read, always
    the same ones (lib/behaviours.py, search)."""
    dead_share = load_tools()["tool_search_content"]["output"]["dead_urls"]
    while True:
        words = rng.sample(english_words(), 3)
        url = f"https://www.{words[0]}-{words[1]}.org/{words[2]}"
        if chance("", url, "dead") >= dead_share:
            return url


def wish_sentence(choose: Callable[[list], str], c: dict, words: list[str]) -> str:
    """The family's wish in the one of these sentences that `choose` takes, its slots filled."""
    return choose(words).format(**c["wish"])


# ---------------------------------------------------------------------------- reading it again
@lru_cache
def family_patterns(language: str) -> dict[str, list[tuple[str, str]]]:
    """{family: [(piece, pattern) of each of its sentences]}, as lib.reading.clause_patterns."""
    slots = read_yaml("families.yaml")["slots"]

    def recognise(text):
        piece = max(re.split(r"{\w+}", text), key=len)
        pattern = re.sub(
            r"\\{(\w+)\\}", lambda slot: f"(?P<{slot[1]}>{slots[slot[1]]})", re.escape(text)
        )
        return piece, pattern

    lists = ("en", "bench") if language == "en" else (language,)
    return {
        name: [recognise(text) for which in lists for text in family["words"][which]]
        for name, family in load_families().items()
    }


def read_wish(match: re.Match) -> dict:
    """{slot: value} of a sentence that was found; what is written in figures is a number."""
    return {
        slot: int(value) if value.isdigit() else value for slot, value in match.groupdict().items()
    }


# ---------------------------------------------------------------------------- what is attached
# Each takes (random numbers, the constraints, the language) and returns records of media without
# ids; `flawed` is what only an analysis tool shows.
def medium(kind: str, **fields: Any) -> dict:
    """A record of a medium that the user attaches."""
    return {"kind": kind, "width": None, "height": None, "duration_s": None, **fields}


def picture(rng, c, language):
    """One picture."""
    width, height = rng.choice([(1024, 1024), (1280, 960), (960, 1280), (1600, 900)])
    return [medium("image", width=width, height=height)]


def mask(rng, c, language):
    """A mask for the picture before it: it takes that one's size, see attach_media."""
    return [medium("image", of_size="before")]


def pictures(rng, c, language):
    """As many pictures as the wish says."""
    return [picture(rng, c, language)[0] for _ in range(c["wish"]["attached"])]


def film(rng, c, language):
    """One film of a few shots, with sound."""
    seconds, shots = rng.choice([6.0, 8.0, 10.0, 12.0]), rng.randint(1, 3)
    return [
        medium("video", width=1920, height=1080, duration_s=seconds, shots=shots, has_audio=True)
    ]


def all_but_one_flawed(rng, takes):
    """The takes, all of them flawed but one."""
    good = rng.randrange(len(takes))
    return [{**take, "flawed": i != good} for i, take in enumerate(takes)]


def picture_takes(rng, c, language):
    """Pictures of which one has no flaw."""
    return all_but_one_flawed(rng, pictures(rng, c, language))


def film_takes(rng, c, language):
    """Films of one shot, longer than what is asked for, of which one has no flaw."""
    takes = []
    for _ in range(c["wish"]["attached"]):
        seconds = c["duration_s"] + rng.choice([1.0, 2.5, 4.0])
        takes.append(medium("video", width=1920, height=1080, duration_s=seconds, has_audio=True))
    return all_but_one_flawed(rng, takes)


def recording_takes(rng, c, language):
    """Sounds, longer than what is asked for, of which one has no flaw."""
    takes = []
    for _ in range(c["wish"]["attached"]):
        takes.append(medium("audio", duration_s=c["duration_s"] + rng.choice([2.0, 5.5, 9.0])))
    return all_but_one_flawed(rng, takes)


SENTENCES = {
    "en": [
        "Today we look at {subject}.",
        "It stands where nobody expects it.",
        "Come closer and you see how it was made.",
        "Every part of it has a reason.",
        "People pass by and stop for a moment.",
        "An old neighbour still knows its story.",
        "It began with a simple idea.",
        "Then came long evenings of work.",
        "Rain and sun have left their traces.",
        "Some laugh, some grow quiet.",
        "Tomorrow it will look a little different.",
        "That is why we keep coming back.",
    ],
    "zh": [
        "今天来看{subject}。",
        "它就在没人留意的地方。",
        "走近一点，能看清它是怎么做的。",
        "每一处都有讲究。",
        "路过的人会停下来看一眼。",
        "老邻居还记得它的来历。",
        "起初只是一个简单的念头。",
        "后来是许多个忙碌的夜晚。",
        "风雨和阳光都留下了痕迹。",
        "有人笑了，有人安静下来。",
        "明天它又会有点不一样。",
        "所以我们总会再来。",
    ],
}


def some_sentences(rng, c, language, n):
    """n sentences, the first of which names the subject."""
    first, *others = SENTENCES[language]
    chosen = sorted(rng.sample(range(len(others)), n - 1))
    return [first.format(subject=c["subject"]), *(others[i] for i in chosen)]


def script(rng, c, language):
    """A script of a few sentences."""
    return [medium("text", text=" ".join(some_sentences(rng, c, language, 6)))]


def long_text(rng, c, language):
    """A text that is too long for captions."""
    return [medium("text", text=" ".join(some_sentences(rng, c, language, 12)))]


def board(rng, c, language):
    """A storyboard of three to six shots, each of its own length."""
    shots = []
    for i, sentence in enumerate(some_sentences(rng, c, language, rng.randint(3, 6)), 1):
        seconds = rng.choice([2, 3, 4, 5, 6])
        shots.append({"index": i, "duration": seconds, "description": sentence[:80]})
    text = "; ".join(f"{s['index']}) {s['duration']} s {s['description']}" for s in shots)
    return [medium("text", text=text, shot_list=shots)]


ATTACH = {
    make.__name__: make
    for make in (
        picture,
        mask,
        pictures,
        film,
        picture_takes,
        film_takes,
        recording_takes,
        script,
        long_text,
        board,
    )
}


def attach_media(rng, c: dict, language: str) -> list[dict]:
    """The media that come with a request of a family, as records of a task's `inputs`."""
    media = []
    for name in load_families()[c["family"]]["attach"]:
        media += ATTACH[name](rng, c, language)
    for before, item in zip(media, media[1:]):
        if item.pop("of_size", None):
            item |= {"width": before["width"], "height": before["height"]}
    return [{"id": f"in_{i}", **item} for i, item in enumerate(media, 1)]
