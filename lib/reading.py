"""The scripted TaskAgent (Sec. 3.1, Fig. 4): what a request asks for, read from its words alone.

It knows every wording of data/, so that it reads each request without a fault; any other reader (an
LLM, a policy) has to understand.
"""

import copy
import re
from functools import cache, lru_cache

from lib.families import family_patterns, load_families, read_wish
from lib.runs import seeded_rng
from lib.scenarios import HAN, bench_book, load_scenarios
from lib.toolbox import load_tools
from lib.workflows import LOOK_FROM, fitting_workflows, load_workflows, n_shots

# What a request can ask for; this one asks for nothing. Field by field the `constraints` of a task.
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
    "variety": False,
    "subject": "",
    "style": None,
    # Of a family of data/families.yaml: its name, what is handed over in place of a picture or
    # film (lib.families.DELIVERABLES), and what its sentence says, by slot.
    "family": None,
    "deliver": None,
    "wish": {},
}


def task_agent(request: str) -> tuple[str, list[str]]:
    """TaskAgent (Fig. 4): (workflow, pool of tools) for a request.

    The task type is the one whose noun the request uses; the workflow follows from what it asks
    for. The pool is the workflow's own tools, those that look at several pictures or clips,
    and six others at random, so that a policy has something to choose from (six is ours).
    """
    c = read_request(request)
    workflow = fitting_workflows(c)[0]
    own = {tool for step in load_workflows()[workflow]["steps"] for tool in step["tool"]}
    rest = [tool for tool in load_tools() if tool not in own]
    pool = own.union(seeded_rng("pool", request).sample(rest, 6), tools_to_look(c))
    return workflow, [tool for tool in load_tools() if tool in pool]


def tools_to_look(c: dict) -> set[str]:
    """The analysis tools for what a request makes, where that are several pictures or clips."""
    if c["deliver"] or max(c["images"], c["videos"] and max(c["videos"], n_shots(c))) < LOOK_FROM:
        return set()
    return {"tool_image_analysis"} | ({"tool_video_analysis"} if c["videos"] else set())


def read_request(request: str) -> dict:
    """The constraints that a request states, from its text alone, for the caller to change. A
    request of no known wording is one image (or what its noun says), and all of its text is the
    subject. What the user attached stands in lines of its own below it, and is not read."""
    return copy.deepcopy(read_text(request.split("\n[in_1: ")[0]))


# A request is read by whoever makes the task, then by the agent that plays it.
@lru_cache(maxsize=64)
def read_text(request):
    """read_request of the text, shared by all who ask: not to be changed."""
    language = "zh" if HAN.search(request) else "en"
    book = load_scenarios(language)
    said = {
        kind: find_clause(patterns, request) for kind, patterns in clause_patterns(language).items()
    }
    noun, name = find_noun(request, language)
    scenario = book["scenarios"].get(name, {"modality": "image", "title": ""})

    c = copy.deepcopy(NO_CONSTRAINTS)
    amount = "images" if scenario["modality"] == "image" else "videos"
    c[amount] = read_number(noun[1], book) if noun else 1
    if said["duration"]:
        c["duration_s"] = int(said["duration"][1])
    if said["shots"]:
        c["shots"] = read_number(said["shots"][1], book)
    if said["aspect"]:
        c["aspect_ratio"] = said["aspect"][1]
    if said["resolution_video"]:
        c["resolution"] = said["resolution_video"][1]
    if said["large"]:
        c["resolution"] = "2K"
    c["transparent"] = bool(said["transparent"])
    c["web_page"] = bool(said["html"])
    c["beat"] = bool(said["beat"])
    c["input"] = bool(said["input"])
    c["consistency"] = [kind for kind in ("object", "scene", "style") if said[kind]]
    sounds = [kind for kind in ("music", "narration", "sfx", "subtitles") if said[kind]]
    # In the order in which the request names them.
    c["audio"] = sorted(sounds, key=lambda kind: said[kind].start())
    c["storyboard"] = scenario["title"] == "Storyboards"
    c["variety"] = any(sentence in request for sentence in bench_book(language)["variety"])
    for name_of_family, patterns in family_patterns(language).items():
        if match := find_clause(patterns, request):
            c["family"], c["wish"] = name_of_family, read_wish(match)
            c["deliver"] = load_families()[name_of_family].get("deliver")
            break

    # The noun phrase stands for itself as one character, so that a wording is one pattern.
    rest = request[: noun.start()] + "\0" + request[noun.end() :] if noun else request
    c["subject"] = request
    for pattern in wording_patterns(language).get(name, []):
        if match := pattern.search(rest):
            c["subject"], c["style"] = match["subject"], match["style"]
            break
    return c


def find_clause(patterns, request):
    """The match of the first of the (piece, pattern) pairs that the request holds; or None."""
    for piece, pattern in patterns:
        if piece in request and (match := compiled(pattern).search(request)):
            return match
    return None


# re itself keeps 512 patterns, and the clauses are more.
compiled = cache(re.compile)


def find_noun(request, language):
    """(match, scenario name) of what is to be made: "two posters"; (None, None) where no noun of a
    task type stands in the request."""
    lower = request.lower()
    for noun, pattern, name in noun_patterns(language):
        if noun in lower and (match := pattern.search(request)):
            return match, name
    return None, None


def read_number(text, book):
    """A number in figures or in words, or an article, as an int."""
    numbers = {word: number for number, word in book["number_words"].items()}
    return {**numbers, "a": 1, "an": 1}.get(text.lower()) or int(text)


def number_pattern(book):
    """A pattern of all numbers that read_number takes."""
    return "|".join([r"\d+", "an?", *book["number_words"].values()])


@lru_cache
def clause_patterns(language: str) -> dict[str, list[tuple[str, str]]]:
    """{kind of constraint: [(piece, pattern) of each of its written clauses]}.

    The piece is the clause's longest text outside of slots: to look for that first is much cheaper
    than the pattern, which is compiled only when it is needed.
    """
    book = load_scenarios(language)
    slots = {
        "d": r"\d+",
        "k": number_pattern(book),
        "a": r"\d+:\d+",
        "r": r"\d+p",
        "id": r"in_\d+",
        "thing": "|".join(sorted({s["consistency_word"] for s in book["scenarios"].values()})),
    }

    def recognise(text):
        piece = max(re.split(r"{\w+}", text), key=len)
        pattern = re.sub(r"\\{(\w+)\\}", lambda slot: f"({slots[slot[1]]})", re.escape(text))
        return piece, pattern

    texts = {kind: list(written) for kind, written in book["clauses"].items()}
    for kind, written in bench_book(language)["clauses"].items():
        texts[kind.split("_")[0] if kind.startswith("duration") else kind] += written
    return {kind: [recognise(text) for text in written] for kind, written in texts.items()}


@lru_cache
def noun_patterns(language: str) -> list[tuple[str, re.Pattern, str]]:
    """[(noun in lower case, pattern of a number and the noun, scenario name)], the longest noun
    first. To look for the noun alone is much cheaper."""
    book = load_scenarios(language)
    nouns = {
        (noun, name) for name, scenario in book["scenarios"].items() for noun in scenario["noun"]
    }
    number, pattern = number_pattern(book), book["grammar"]["noun"]
    return [
        (noun.lower(), re.compile(pattern.format(number, re.escape(noun)), re.I), name)
        for noun, name in sorted(nouns, key=lambda pair: -len(pair[0]))
    ]


@lru_cache
def wording_patterns(language: str) -> dict[str, list[re.Pattern]]:
    """{scenario name: patterns of its wordings, with groups `subject` and `style`}.

    A request is matched with its noun phrase ("two posters") taken out, so a frame is one pattern
    for all scenarios.
    """
    book = load_scenarios(language)
    slots = book["grammar"]["slots"]

    @cache
    def pattern_of(text):
        # What stands before a wording is of no interest, and may be nothing.
        text = re.escape(text.removeprefix("{extras} ").replace(" {extras}", "{extras}"))
        return re.compile(re.sub(r"\\{(\w+)\\}", lambda slot: slots[slot[1]], text), re.I)

    patterns = {}
    for name, scenario in book["scenarios"].items():
        # The longest first: "Design {what} for {subject}" would also fit
        # "Design {what} for a game about {subject}".
        texts = sorted(scenario["wordings"] + book["frames"], key=len, reverse=True)
        if name in bench_book(language)["scenarios"]:
            texts += bench_book(language)["scenarios"][name]["wordings"]
        patterns[name] = [pattern_of(text) for text in texts]
    return patterns


def facts_of(c: dict) -> str:
    """Constraints in a fixed, short form, in the language of the request: '3 images, watercolor,
    16:9, same object'."""
    return fact_words(c)["between"].join(fact for _, fact in named_facts(c))


def fact_words(c: dict) -> dict[str, str]:
    """How facts are worded (`facts` in data/scenarios*.yaml), in the language of the subject."""
    return load_scenarios("zh" if HAN.search(c["subject"]) else "en")["facts"]


def kinds_of_wish(c: dict) -> list[str]:
    """The kinds of wish that constraints state: "consistency: object", "music", "duration", ...

    Not the amount, which every request states, nor what a family's sentence says: that is the wish
    `family`.
    """
    kinds = []
    for kind, _, value in asked_for(c):
        if kind != "amount":
            kinds.append(f"consistency: {value}" if kind == "consistency" else kind)
    return kinds


def named_facts(c: dict) -> list[tuple[str, str]]:
    """(kind of wish, fact) of all that constraints ask for, in facts_of's order."""
    words = fact_words(c)
    facts = [(kind, words.get(name, "{}").format(value)) for kind, name, value in asked_for(c)]
    for slot, value in c["wish"].items():
        wording = words.get(slot, slot.replace("_", " ") + " {}")
        facts.append(("wish", wording.format(value)))
    return facts


def asked_for(c: dict) -> list[tuple]:
    """(kind of wish, what is asked for by its name in fact_words, the value) of constraints."""
    n, amount = (c["images"], "image") if c["images"] else (c["videos"], "video")
    family = c["family"] or ""
    asked = [
        ("amount", f"{amount}s" if n > 1 else amount, n),
        ("style", "style", c["style"]),
        ("shots", "shots", c["shots"]),
        ("duration", "duration", c["duration_s"]),
        ("aspect", "aspect", c["aspect_ratio"]),
        ("resolution", "resolution", c["resolution"]),
        *(("consistency", f"same_{kind}", kind) for kind in c["consistency"]),
        *((sound, sound, sound) for sound in c["audio"]),
        ("beat", "beat", c["beat"]),
        ("transparent", "transparent", c["transparent"] and "transparent"),
        ("web page", "web_page", c["web_page"]),
        ("input", "input", c["input"]),
        ("variety", "variety", c["variety"]),
        ("family", family, family.replace("_", " ")),
    ]
    return [(kind, name, value) for kind, name, value in asked if value]
