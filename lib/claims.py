"""What an agent says of its work: its thoughts and the answer's summary (all rules are ours).

The records hold no meaning; but numbers and ids can be held against them, a text against the
request and the replies, and its length against the expert's. R_format counts what is found here.
"""

import re
from collections import Counter

from lib.lineage import Media, looked_at
from lib.scenarios import HAN
from lib.words import (
    WORD,
    content_words,
    has_gibberish,
    is_foreign,
    language_of,
    language_wanted,
)

# A thought has at least so many different words; Chinese characters count as words.
THOUGHT_WORDS = 3

# A number in a summary that says something of what was made. Ours.
STATED = re.compile(
    r"(?P<size>\b\d{2,5} ?[x×] ?\d{2,5}\b)|(?P<shape>\b\d{1,2}:\d{1,2}\b)"
    r"|(?P<seconds>\b\d+(?:\.\d+)?)(?:-| )?(?:s|secs?|seconds?)\b"
    r"|(?P<zh_seconds>\d+(?:\.\d+)?)\s?秒"
    r"|(?P<large>\b(?:\d{1,2}[kK]|\d{3,4}p)\b)"
    r"|(?P<count>\b\d{1,3}) (?:images?|pictures?|videos?|films?|clips?|shots?|scenes?"
    r"|(?:refined )?prompts?|scripts?|(?:story)?boards?|texts?|recordings?|songs?|tracks?|pages?)\b"
    r"|(?P<count_of>\b\d{1,3}) of \d{1,3}\b"
    r"|(?P<zh_count>\d{1,3})\s?(?:张|个镜头|个片段|份|首)"
    r"|(?P<id>\b(?:in|img|vid|aud|txt|html|data)_\d+)\b"
)


def is_true(stated: re.Match, made: list[dict]) -> bool:
    """Whether a number that a summary states is true of some of what was made: a size, a shape, a
    length, a number, or an id."""
    kind, said = stated.lastgroup, stated[stated.lastgroup].replace(" ", "")
    if kind == "id":
        return any(a["id"] == said for a in made)
    if "count" in kind:
        counts = Counter(a["kind"] for a in made).values()
        return int(said) in {0, *counts, *(a["shots"] for a in made)}
    if "seconds" in kind:
        lengths = [a["duration_s"] for a in made if a["duration_s"]]
        return any(abs(float(said) - seconds) <= max(0.5, 0.05 * seconds) for seconds in lengths)
    seen = [a for a in made if a["width"]]
    if kind == "size":
        return any(f"{a['width']}x{a['height']}" == said.replace("×", "x") for a in seen)
    if kind == "shape":
        across, down = map(int, said.split(":"))
        fits = [
            a
            for a in seen
            if across and down and abs(a["width"] * down / (a["height"] * across) - 1) < 0.1
        ]
        return bool(fits)
    side = 0.9 * (1000 if said[-1] in "kK" else 1) * int(said[:-1])
    measure = max if said[-1] in "kK" else min
    return any(measure(a["width"], a["height"]) >= side for a in seen)


def summary_faults(trajectory: dict) -> int:
    """Faults of an answer: a summary of fewer than THOUGHT_WORDS different words, one that
    states something untrue, an id that is handed over twice; and two where the summary is in
    another script than the client's language, so that he cannot read it.

    What the request itself says may be said again, true or not: R_result looks at that. So may
    the subject and the style with their numbers.
    """
    answer = trajectory["answer"]
    if not answer:
        return 0
    task = trajectory["task"]
    c = task["constraints"]
    summary = str(answer.get("summary") or "")
    words = [word for word in content_words(summary) if not word.isdigit()]
    for phrase in (c["subject"], c["style"] or ""):
        summary = summary.replace(phrase, " ") if phrase else summary
    untrue = [
        found for found in STATED.finditer(summary) if not is_true(found, trajectory["artifacts"])
    ]
    lies = bool(untrue) and any(
        not {found[0], found[found.lastgroup]} & numbers_asked(task) for found in untrue
    )
    handed = answer.get("deliverables", [])
    n_faults = (len(words) < THOUGHT_WORDS) + lies + (len(set(handed)) < len(handed))
    return n_faults + 2 * is_unread(summary, task)


# English words to one Chinese character that a Chinese client's summary may have: a tiny policy
# says "Made as asked: 1张图". Ours.
MIXED = 4


def is_unread(summary: str, task: dict) -> bool:
    """Whether a summary is in another script than the language of the request.

    >>> task = {"request": "一张图", "constraints": {}}
    >>> is_unread("Done, it lies in one file.", task), is_unread("Made as asked: 1张图", task)
    (True, False)
    """
    language = language_wanted(task.get("request") or task["constraints"]["subject"])
    if language != "zh":
        return is_foreign(summary, language)
    latin = sum(word.isalpha() and word.isascii() for word in WORD.findall(ID.sub("", summary)))
    return latin > MIXED * len(HAN.findall(summary))


def numbers_asked(task: dict) -> set[str]:
    """What a request states, in its words or its constraints, as a summary may repeat it."""
    c = task["constraints"]
    asked = {str(value) for value in (*c.values(), *(c.get("wish") or {}).values())}
    for found in STATED.finditer(task.get("request", "")):
        asked |= {found[0], found[found.lastgroup]}
    return asked


# ---------------------------------------------------------------------------- thoughts
# Characters of a first thought, of a later one and of a summary that are too many: more than two to
# four times the full expert's longest.
LONGEST = {"first": 2400, "later": 1500, "summary": 600}
# A reply that is repeated begins with so many characters of its own.
QUOTE = 40
# Of an English request's thought, the share in Chinese characters that is too much.
CHINESE = 0.3
ID = re.compile(r"\b(?:in|img|vid|aud|txt|html|data)_\d+\b")
# What a request asks for, as a first thought may state it: the constraint, and its patterns.
FIGURES = {
    "duration_s": re.compile(
        r"\b(?P<en>\d+(?:\.\d+)?)(?:-| )?(?:s|secs?|seconds?)\b|(?P<zh>\d+(?:\.\d+)?)\s?秒"
    ),
    "images": re.compile(
        r"\b(?P<en>\d{1,3}) (?:images?|pictures?|posters?)\b|(?P<zh>\d{1,3})\s?张"
    ),
    "shots": re.compile(r"\b(?P<en>\d{1,3}) shots?\b|(?P<zh>\d{1,3})\s?个镜头"),
    "aspect_ratio": re.compile(r"\b(?P<en>\d{1,2}:\d{1,2})\b"),
}


def thought_faults(text: str, task: dict, known: set[str], replies: list[str], first: bool) -> list:
    """What is wrong with a turn's thought, by name: long, foreign, copied, unknown_id, gibberish.

    `known`: ids of the media that are there; `replies`: those of the turn before.

    >>> thought_faults("I trim vid_9.", {"request": "a film"}, {"vid_1"}, [], False)
    ['unknown_id']
    """
    found = []
    if len(text) > LONGEST["first" if first else "later"]:
        found.append("long")
    if is_chinese(text, task):
        found.append("foreign")
    request = task.get("request", "").strip()
    if request and 2 * len(request) > len(text) and request in text:
        found.append("copied")
    elif "{" in text and any(len(r) >= QUOTE and r[:QUOTE] in text for r in replies):
        found.append("copied")
    if "_" in text and any(i not in known for i in ID.findall(text)):
        found.append("unknown_id")
    if has_gibberish(text, content_words(request)):
        found.append("gibberish")
    return found


def is_chinese(text: str, task: dict) -> bool:
    """Whether a text is mostly Chinese though the request is English. The other way round is free:
    tiny policies think in English alone."""
    if text.isascii() or "zh" in (task.get("language"), language_of(task.get("request", ""))):
        return False
    return is_foreign(text, "en") and len(HAN.findall(text)) > CHINESE * len(text)


def is_rambling(summary: str, request: str) -> bool:
    """Whether a summary is far too long, or gibberish."""
    return len(summary) > LONGEST["summary"] or has_gibberish(summary, content_words(request))


def thoughts_of(messages: list[dict]) -> list[str]:
    """What each of the agent's turns thinks."""
    own = [message["content"] for message in messages if message["role"] == "assistant"]
    return [text[: text.find("</think>")] if "</think>" in text else text for text in own]


def is_misread(text: str, c: dict) -> bool:
    """Whether a first thought states figures of a kind that the request states, and never its own.

    >>> is_misread("a film of 27 s, 3 x 8 = 24 s", {"duration_s": 20})
    True
    >>> is_misread("3 x 8 = 24 s, trim to 20 s", {"duration_s": 20})
    False
    """
    for name, pattern in FIGURES.items():
        if not c.get(name):
            continue
        said = {found[found.lastgroup] for found in pattern.finditer(text)}
        wanted = c[name] if name == "aspect_ratio" else f"{c[name]:g}"
        if said and wanted not in said:
            return True
    return False


# ---------------------------------------------------------------------------- work that is claimed
# What a thought may claim of the work: looks at media by their ids, and at how many; how many
# calls. Ahead of each pattern words of which it needs one: most texts need no closer reading. Ours.
ONE_ID = r"(?:in|img|vid|aud|txt|html|data)_\d+"
LISTED = rf"{ONE_ID}(?:(?:, | and |, and |、|和|及){ONE_ID})*"
LOOKED = (
    ("ooked ", "een ", "hecked ", "sharp", "clean", "flawless", "过", "清晰", "瑕疵"),
    re.compile(
        rf"(?:[Ll]ooked(?: \w+)? at|[Ss]een|[Cc]hecked) {LISTED}"
        rf"|(?:看|[检核]查)过了?\s?{LISTED}"
        rf"|{LISTED}(?:,?(?: is| are| look| looks)?(?: all)? (?:sharp|clean|flawless)\b"
        r"|(?:都|全)?(?:画面)?清晰|，?(?:都|全)?没有瑕疵)"
    ),
)
N_LOOKED = (
    ("media ", "ooked at ", "看过"),
    re.compile(
        r"(\d+) (?:media|pictures|images|clips) (?:looked at|seen|checked)"
        r"|ooked at (\d+)\b|看过(\d+)"
    ),
)
N_CALLS = (
    ("calls: ", "of calls", "calls in", "calls so", "calls al", "次调用"),
    re.compile(
        r"(?<!\d )calls: (\d+)|number of calls:? (\d+)"
        r"|(\d+) calls (?:in all|in total|altogether|so far)|共(\d+)次调用"
    ),
)
# A price of the whole stands behind one of these, or is "in all". It may be off by a factor, and by
# so many dollars: services fail.
DOLLARS = re.compile(r"\$(\d+(?:\.\d+)?)(?![\d.]*\d| (?:a|an|per|each)\b)( in all| in total)?")
PRICED = ("bout ", "pend ", "otal ", "otals ", "预计", "约", "总共", "合计")
PRICE_OFF, PRICE_SLACK = 2.0, 0.02


def claimed(text: str, claim: tuple) -> list[str]:
    """What a text claims of one kind.

    >>> claimed("I looked at img_1, img_2: clean. 2 media looked at, calls: 4.", LOOKED)
    ['looked at img_1, img_2']
    """
    words, pattern = claim
    for word in words:
        if word in text:
            return [found[found.lastindex or 0] for found in pattern.finditer(text)]
    return []


def untrue_thoughts(trajectory: dict, media: Media) -> set[int]:
    """The turns, from 0, whose thought or summary claims what the records refute: a look at a
    medium that no analysis had before, more media looked at than there were, another number of
    calls, and in the first turn a price of the whole that is off by more than PRICE_OFF from what
    was paid."""
    calls = trajectory["calls"]
    thoughts = thoughts_of(trajectory.get("messages", []))[: len(trajectory["turns"])]
    if thoughts and trajectory["answer"]:
        thoughts[-1] += f"\n{trajectory['answer'].get('summary')}"
    untrue = set()
    for n, text in enumerate(thoughts):
        looks, n_looked, n_calls = (claimed(text, kind) for kind in (LOOKED, N_LOOKED, N_CALLS))
        if looks or n_looked or n_calls:
            before = [call for call in calls if call["turn"] <= n]
            seen = set().union(*(looked_at(call) for call in before if call["status"] == "ok"))
            lies = [
                set(ID.findall(" ".join(looks))) - seen,
                [k for k in n_looked if int(k) > len(seen)],
                [k for k in n_calls if int(k) != len(before)],
            ]
            if any(lies):
                untrue.add(n)
    if thoughts and media.handed:
        for found in DOLLARS.finditer(thoughts[0]):
            whole = found[2] or thoughts[0].endswith(PRICED, 0, found.start())
            if whole and is_other_price(float(found[1]), calls, media):
                untrue.add(0)
    return untrue


def is_other_price(said: float, calls: list[dict], media: Media) -> bool:
    """Whether a price is far from what was paid, with or without what was made in vain."""
    paid = [call.get("price_usd", 0.0) for call in calls]
    needed = [
        price
        for call, price in zip(calls, paid)
        if not call["outputs"] or not media.behind.isdisjoint(call["outputs"])
    ]
    least, most = sum(needed) / PRICE_OFF, sum(paid) * PRICE_OFF
    return not least - PRICE_SLACK <= said <= most + PRICE_SLACK
