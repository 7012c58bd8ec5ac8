"""Art direction: the words of prompts, music and scripts that the scripted expert writes (ours).

What a film or set has in common and what each shot has of its own is put together from the
fragments of data/direction.yaml, by the request's task type, subject and language. A seed decides,
and the same step always gets the same words: a call that is repeated is repeated unchanged.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from lib.reading import find_noun
from lib.runs import seeded_rng
from lib.scenarios import HAN, load_scenarios, read_yaml
from lib.words import content_words
from lib.workflows import n_shots

# Words by which a request says that a film is watched on a phone. Ours.
PHONE = re.compile(
    r"\b(?:for|on) (?:\w+ )?(?:smart)?phones?\b|\bvertical\b"
    r"|手机上|竖屏|抖音"
)


@lru_cache(maxsize=1)
def load_direction() -> dict:
    """data/direction.yaml."""
    return read_yaml("direction.yaml")


@dataclass
class Direction:
    """One request's art direction: `c`, its constraints; `language`, `task_type` (a scenario's
    name, or "") and `group`, the kind of subject; `shape`, the ratio that its media have."""

    c: dict
    language: str
    task_type: str
    group: str
    shape: str | None
    seed: int
    _shuffled: dict = field(default_factory=dict)

    def pick(self, *path: str, at: int) -> str:
        """Item `at` of a list of fragments, in an order of this request's own; from its end on, it
        begins anew. What would show a change that is to come later is left out."""
        if path not in self._shuffled:
            items = load_direction()[self.language]
            for name in path:
                items = items[name]
            change = content_words(self.c["wish"].get("change") or "")
            items = [text for text in items if not change & content_words(text)] or list(items)
            seeded_rng(self.seed, *path).shuffle(items)
            self._shuffled[path] = items
        items = self._shuffled[path]
        return items[at % len(items)]


def direct(request: str, c: dict, seed: int) -> Direction:
    """The art direction of a request. `request`: its text; `c`: what it asks for, as it was read
    from the text."""
    language = "zh" if HAN.search(request) else "en"
    _, name = find_noun(request, language)
    group = group_of(c["subject"], name, language)
    shape = c["aspect_ratio"] or implied_shape(request, c, name)
    return Direction(c, language, name or "", group, shape, seed)


def group_of(subject: str, name: str | None, language: str) -> str:
    """The kind of a subject (product, brand, ...): of its task type's kinds the one that lists it,
    or has a subject of the same last word; the first one otherwise."""
    book = load_scenarios(language)
    kinds = book["scenarios"].get(name, {"subjects": ["product"]})["subjects"]
    known = load_direction()[language]["scenes"]
    last = subject[-1:] if language == "zh" else subject.split()[-1:]
    for kind in kinds:
        if kind in known and subject in book["subjects"][kind]:
            return kind
    for kind in kinds:
        tails = [s[-1:] if language == "zh" else s.split()[-1:] for s in book["subjects"][kind]]
        if kind in known and last in tails:
            return kind
    return next((kind for kind in kinds if kind in known), "product")


def implied_shape(request: str, c: dict, name: str | None) -> str | None:
    """The shape that follows from the use where none is stated: 16:9 for a film, 9:16 on a phone, a
    task type's usual one for pictures; None where the user's picture or a size decides."""
    if c["videos"]:
        shape = load_direction()["shapes"].get(name, "16:9")
        return "9:16" if PHONE.search(request) else shape
    if c["input"] or "exact_size" in c["wish"]:
        return None
    return load_direction()["shapes"].get(name)


# ---------------------------------------------------------------------------- prompts
def look_of(c: dict, language: str = "en") -> str:
    """The subject in its style, as part of a sentence.

    >>> look_of({"subject": "a fox", "style": "pastel"})
    'a fox in pastel style'
    """
    subject, style = c["subject"], c["style"]
    if not style:
        return subject
    if language == "zh":
        return f"{style.removesuffix('风格')}风格的{subject}"
    return f"{subject} in {style.removesuffix(' style')} style"


def thing_of(c: dict) -> str:
    """The subject without its article or measure word."""
    if HAN.search(c["subject"]):
        return c["subject"][2:] if c["subject"].startswith("一") else c["subject"]
    return re.sub(r"^(?:an?|the) ", "", c["subject"])


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def filled(d: Direction, kind: str, at: int, **slots: str) -> str:
    """A prompt of a kind from the fragments; a slot's name with a capital begins a sentence."""
    slots = {"look": look_of(d.c, d.language), **slots}
    slots |= {capital(name): capital(text) for name, text in slots.items()}
    return d.pick("prompt", kind, at=at).format(**slots)


def shot_words(d: Direction, index: int) -> dict[str, str]:
    """What shot `index` of a film shows: {view, set, act, light, move}. The place and the light are
    one for all shots where the scene is to stay the same; otherwise two shots share them."""
    n = n_shots(d.c)
    if index == 0:
        view = d.pick("opening", at=0)
    elif index == n - 1 and n > 2:
        view = d.pick("closing", at=0)
    else:
        view = d.pick("middle", at=index)
    place = 0 if "scene" in d.c["consistency"] else index // 2
    return {
        "view": view,
        "set": d.pick("scenes", d.group, "sets", at=place),
        "act": d.pick("scenes", d.group, "acts", at=index),
        "light": d.pick("lights", at=place),
        "move": d.pick("moves", at=index),
    }


def clip_prompt(d: Direction, index: int) -> str:
    """The prompt of a film's shot, or of film `index` of several."""
    return filled(d, "clip", index, **shot_words(d, index))


def frame_prompt(d: Direction, index: int) -> str:
    """The prompt of a shot's first frame."""
    return filled(d, "frame", index, **shot_words(d, index))


def ref_prompt(d: Direction) -> str:
    """The prompt of the picture that all frames are made from."""
    return filled(d, "ref", 0)


def picture_prompt(d: Direction, index: int, n: int = 1) -> str:
    """The prompt of picture `index` of a set; of `n` pictures of one call, what they share."""
    kind = load_direction()["pictures"].get(d.task_type, "scene")
    place = 0 if "scene" in d.c["consistency"] else index
    words = {
        "view": d.pick("pictures", kind, "views", at=index),
        "extra": d.pick("pictures", kind, "extras", at=0 if d.c["consistency"] else index),
        "set": d.pick("scenes", d.group, "sets", at=place),
        "light": d.pick("lights", at=place),
    }
    return filled(d, "series" if n > 1 else kind, index, **words)


def edit_prompt(d: Direction, prompt: str, index: int) -> str:
    """A prompt as an edit of the reference picture."""
    return d.pick("prompt", "keep", at=index).format(thing=thing_of(d.c), prompt=prompt)


def sharper(d: Direction, prompt: str, tries: int) -> str:
    """A prompt for another take of what came back with a flaw, the `tries`-th (from 1)."""
    comma, stop = ("，", "。") if d.language == "zh" else (", ", ".")
    return prompt.rstrip(".。") + comma + d.pick("prompt", "again", at=tries - 1) + stop


# ---------------------------------------------------------------------------- sound
def voice_of(d: Direction) -> str:
    """How the task type's films speak: sell, brand, appeal, event, teach, tale, drama or play."""
    return load_direction()["voices"].get(d.task_type, "sell")


def music_prompt(d: Direction, seconds: float) -> str:
    """The prompt of the music for a film, or a piece, of so many seconds."""
    rng = seeded_rng(d.seed, "music")
    mood = d.pick("music", voice_of(d), at=0)
    slots = {"mood": mood, "Mood": capital(mood), "thing": thing_of(d.c)}
    slots |= {"bpm": rng.randrange(68, 132, 2), "s": f"{seconds:g}"}
    return d.pick("music", "prompt", at=0).format(**slots)


def sounds_prompt(d: Direction) -> str:
    """The prompt of a film's sound effects: two of what is heard where it plays."""
    comma = "，" if d.language == "zh" else ", "
    return comma.join(d.pick("scenes", d.group, "sounds", at=i) for i in (0, 1))


# ---------------------------------------------------------------------------- what is said
def script_of(
    d: Direction, seconds: float, spoken: Callable[[str], float]
) -> list[tuple[float, list[str]]]:
    """[(start, sentences)] of a narration over a film: it opens with the subject, closes, and
    leaves air. `spoken`: the seconds that a text takes. No sentence comes twice.

    The film is divided into parts of about SEGMENT_S; each part says what it has time for, and all
    together fill a share of the film, smaller in a long one."""
    n = max(1, round(seconds / SEGMENT_S))
    room = seconds / n
    share = 0.9 if seconds <= 20 else 0.75 if seconds <= 45 else 0.66
    lines = lines_of(d)
    closing = closing_of(d)
    line, total, segments = next(lines), 0.0, []
    if spoken(line) > room - 0.1:
        line = short_opening(d, lambda text: spoken(text) <= room - 0.1)
    for i in range(n):
        said = []
        while line and spoken(join(d, [*said, line])) <= room - 0.1:
            if said and total + spoken(join(d, [*said, line])) > share * room * (i + 1):
                break
            said.append(line)
            line = next(lines, None)
        if i == n - 1 and seconds >= 12 and spoken(join(d, [*said, closing])) <= room - 0.1:
            said.append(closing)
        if said:
            total += spoken(join(d, said))
            segments.append((round(i * room, 1), said))
    return segments or [(0.0, [line])]


# Seconds of film that a part of the narration goes with. Ours.
SEGMENT_S = 8


def lines_of(d: Direction):
    """Sentences for a film, each once: one names the subject, then what its kind of film says."""
    subject = {"subject": d.c["subject"], "thing": thing_of(d.c)}
    yield capital(d.pick("lines", voice_of(d), "open", at=0).format(**subject))
    for i in range(len(load_direction()[d.language]["lines"][voice_of(d)]["more"])):
        yield d.pick("lines", voice_of(d), "more", at=i)


def short_opening(d: Direction, fits: Callable[[str], bool]) -> str:
    """The longest sentence that names the subject and fits a film of few seconds; the subject alone
    where none does."""
    openings = load_direction()[d.language]["lines"][voice_of(d)]["open"]
    look, stop = ("看，", "。") if d.language == "zh" else ("Look, ", ".")
    texts = [text.format(subject=d.c["subject"], thing=thing_of(d.c)) for text in openings]
    texts.append(f"{look}{d.c['subject']}{stop}")
    return max(filter(fits, map(capital, texts)), key=len, default=capital(d.c["subject"]) + stop)


def closing_of(d: Direction) -> str:
    """The last sentence of a film."""
    return d.pick("lines", voice_of(d), "close", at=0).format(thing=thing_of(d.c))


def join(d: Direction, sentences: list[str]) -> str:
    """Sentences one behind the other."""
    return ("" if d.language == "zh" else " ").join(sentences)
