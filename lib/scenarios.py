"""The written material of requests: task types, wordings, subjects, styles and words (data/).

Whoever writes a request (lib/tasks.py) and whoever reads one (lib/reading.py) work from the same
lists.
"""

import re
from functools import lru_cache

import yaml

from lib.runs import ROOT

HAN = re.compile("[\u4e00-\u9fff]")  # a Chinese character: a text that holds one is Chinese


def read_yaml(name):
    """A YAML file of data/; by libyaml where it is there, which is much faster."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((ROOT / "data" / name).read_text(encoding="utf-8"), loader)


@lru_cache
def load_scenarios(language: str) -> dict:
    """data/scenarios.yaml (zh: scenarios_zh.yaml): the 42 task types of Table 8 with their
    wordings, and the subjects, styles and clauses that fill them. SystemExit for another
    language."""
    if language not in ("en", "zh"):
        raise SystemExit(f"error: config key `data.languages` holds {language!r}; allowed: en, zh")
    return read_yaml("scenarios.yaml" if language == "en" else "scenarios_zh.yaml")


@lru_cache
def bench_book(language: str = "en") -> dict:
    """The written material of VisGenBench's tasks: load_scenarios(language) with the words of
    data/visgenbench.yaml (zh: visgenbench_zh.yaml) in place of its own, and the task types that
    these have wordings for.

    The rubrics are English in both: the grader's prompt is, and scores of the same items compare.
    """
    book, english = load_scenarios(language), read_yaml("visgenbench.yaml")
    words = english if language == "en" else read_yaml("visgenbench_zh.yaml")
    scenarios = {
        name: {**scenario, "wordings": words["wordings"][name]}
        for name, scenario in book["scenarios"].items()
        if name in words["wordings"]
    }
    return {
        **book,
        **words,
        "rubrics": english["rubrics"],
        "contradictions": book["contradictions"] + words["contradictions"],
        "frames": [],
        "scenarios": scenarios,
    }


def split_list(items: list, held: int, split: str) -> list:
    """What a split may use of a written list: three disjoint parts, and all of it for the bench.

    The last `held` items are held out; of the others, expert trajectories (visgen) use three
    quarters and VRL's tasks (train) the rest: VRL meets requests for which nobody has shown the
    way. Reading exercises use both of these parts. The shares are ours.
    """
    if split == "bench":
        return items
    for_training = len(items) - held
    shown = for_training - for_training // 4
    parts = {
        "visgen": items[:shown],
        "train": items[shown:for_training],
        "heldout": items[for_training:],
        "reading": items[:for_training],
    }
    return parts[split]


@lru_cache
def material(split: str, language: str) -> dict:
    """load_scenarios (or bench_book) and the families' `wishes` in words, every list of wordings,
    clauses, frames and each group of styles cut to what the split may use of it. `subjects` stay
    whole: choose_subject cuts them.

    Reading exercises have the wordings, clauses, wishes and frames of all splits: they teach the
    language, as pretraining does, and never what to do.
    """
    book = bench_book(language) if split == "bench" else load_scenarios(language)
    styles = {
        group: split_list(names, len(names) // 6, split) for group, names in book["styles"].items()
    }
    if split == "reading":
        families = read_yaml("families.yaml")["families"]
        wishes = {name: family["words"][language] for name, family in families.items()}
        return {**book, "wishes": wishes, "styles": styles}
    scenarios = {
        name: {**scenario, "wordings": split_list(scenario["wordings"], 3, split)}
        for name, scenario in book["scenarios"].items()
    }
    clauses = {kind: split_list(texts, 2, split) for kind, texts in book["clauses"].items()}
    # VisGenBench asks for families in English alone.
    spoken = "bench" if split == "bench" else language
    wishes = {
        name: split_list(family["words"][spoken], 2, split)
        for name, family in read_yaml("families.yaml")["families"].items()
    }
    return {
        **book,
        "scenarios": scenarios,
        "clauses": clauses,
        "wishes": wishes,
        "styles": styles,
        "frames": split_list(book["frames"], 0, split),
    }


@lru_cache(maxsize=1)
def english_words() -> list[str]:
    """The words of data/words.txt, in order."""
    lines = (ROOT / "data" / "words.txt").read_text(encoding="utf-8").splitlines()
    return sorted({word for line in lines if not line.startswith("#") for word in line.split()})


@lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """All English words, in lower case, that the written material of data/ holds."""
    words = set(english_words())
    for file in (
        "scenarios.yaml",
        "visgenbench.yaml",
        "families.yaml",
        "direction.yaml",
        "voice.yaml",
    ):
        text = (ROOT / "data" / file).read_text(encoding="utf-8").lower()
        words.update(re.findall(r"[a-z]+", text))
    return frozenset(words)


@lru_cache(maxsize=1)
def common_words() -> list[str]:
    """Words of three letters or more, in order: those of data/words.txt and of all English subjects
    and styles, word by word. Of the held-out ones no phrase is shown; but a policy that has never
    written a word cannot copy it, and a pretrained one has written them all."""
    book = load_scenarios("en")
    phrases = [
        phrase for kind in ("styles", "subjects") for g in book[kind].values() for phrase in g
    ]
    words = {*english_words(), *(word for phrase in phrases for word in phrase.split())}
    return sorted(word for word in words if len(word) > 2 and WORD.fullmatch(word))


WORD = re.compile("[A-Za-z]+(?:[-'][A-Za-z]+)*")


def odd_words(rng, n: int, alike: float = 0.33) -> list[str]:
    """n words: common ones and, four in ten, made-up ones, which begin like one word and end like
    another, so that no one knows them by heart.

    With chance `alike` nearly all are made up, and of four words' parts: pieces come again, and a
    copy must know more than the last one. The shares are ours.
    """
    few = rng.random() < alike
    parts = rng.sample(common_words(), 4) if few else common_words()
    share_of_common = 0.1 if few else 0.6
    words = []
    for _ in range(n):
        first, last = rng.choice(parts), rng.choice(parts)
        if rng.random() < share_of_common:
            words.append(first)
            continue
        beginning = first[: rng.randint(2, max(2, len(first) - 2))]
        words.append(beginning + last[-rng.randint(2, max(2, len(last) - 2)) :])
    return words
