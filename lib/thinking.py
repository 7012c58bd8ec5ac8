"""What the scripted MetaAgent thinks (Sec. 3.1): data/voice.yaml, filled with what it knows.

In the first turn what was understood and weighed, with the tools' prices, lengths and limits of
tools.yaml; in later ones what the replies showed and what follows; at the end the checks that were
made, with their numbers. In the request's language. `short` is one sentence, for a tiny policy.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lib.direction import Direction, capital, thing_of
from lib.families import asked_kind
from lib.reading import facts_of
from lib.scenarios import load_scenarios, read_yaml
from lib.toolbox import clip_lengths, jobs_at_once, load_tools, makes
from lib.workflows import clip_seconds, n_shots, step_price

# How often flawed media are made again before they are taken as they are. Ours.
RETAKES = 2


@dataclass
class Job:
    """One request at work: `c`, what it asks for; `attached`, what the user's message says of its
    media; the plan's `steps` with their state; `direction`, None where thoughts are short; `mind`,
    the parts of metacognition; `replies`, {media id: the reply that brought it}; `calls`, how many
    were made."""

    c: dict
    attached: dict[str, dict]
    steps: list[dict]
    mind: tuple[str, ...]
    direction: Direction | None
    rng: Any
    replies: dict[str, dict] = field(default_factory=dict)
    calls: int = 0

    @property
    def voice(self) -> dict:
        """The words: `short`, or those of the request's language."""
        return load_voice()[self.direction.language if self.direction else "short"]


@lru_cache(maxsize=1)
def load_voice() -> dict:
    """data/voice.yaml: how the scripted MetaAgent words its thinking."""
    return read_yaml("voice.yaml")


def say(job: Job, *path: str, **slots: Any) -> str:
    """One of the ways to say something, its slots filled; {thing} is the request's subject."""
    ways = job.voice
    for name in path:
        ways = ways[name]
    way = job.rng.choice(ways)
    return way.format(**{"thing": thing_of(job.c), **slots})


def listed(job: Job, items: Iterable[Any]) -> str:
    """Things in a row, by the language's comma."""
    return job.voice["comma"].join(map(str, items))


def sentences(job: Job, parts: Iterable[str]) -> str:
    """Sentences one behind the other, each with a capital; what is empty is left out."""
    between = "" if job.direction.language == "zh" else " "
    return between.join(opened(part) for part in parts if part)


def opened(text: str) -> str:
    """A sentence with a capital, unless an id or a tool's name begins it."""
    return text if "_" in text.split(" ")[0] else capital(text)


def number(value: float) -> str:
    """A number as one says it: at most two decimals, three below one tenth.

    >>> number(15.0), number(0.28), number(7.333), number(0.039)
    ('15', '0.28', '7.33', '0.039')
    """
    return f"{round(value, 2 if value >= 0.1 else 3):g}"


# ---------------------------------------------------------------------------- names of things
def short_name(tool: str) -> str:
    """A tool's name without what all of them begin with."""
    return tool.removeprefix("tool_")


def price_of(job: Job, tool: str) -> tuple[str, str]:
    """(US dollars, "a picture" or the like) of a tool with its default arguments."""
    rates = dict(load_tools()[tool]["price_usd"])
    default = load_tools()[tool]["blank"].get(rates.pop("by", None))
    units = job.voice["units"]
    for unit, rate in rates.items():
        if unit in units:
            return number(rate[default] if isinstance(rate, dict) else rate), units[unit]
    return "0", units["call"]


def kind_words(job: Job, n: int) -> str:
    """What the request wants, in words: "films", or its task type's noun."""
    noun = load_scenarios(job.direction.language)["scenarios"].get(job.direction.task_type)
    if noun and not job.c["deliver"]:
        # A Chinese noun comes with its measure word.
        if job.direction.language == "zh":
            return noun["noun"][0][1:]
        return noun["noun"][0 if n == 1 else 1]
    return job.voice["kinds"][asked_kind(job.c)][0 if n == 1 else 1]


def stage(job: Job, steps: list[dict]) -> str:
    """What steps of one key do, in words."""
    step = steps[0]
    ways = job.voice["stages"].get(step["key"], job.voice["stages"]["other"]).split("|")
    n = sum(len(step.get("sees", ())) or max(1, step["expect"]) for step in steps)
    return ways[-1 if n > 1 else 0].format(
        n=n,
        thing=thing_of(job.c),
        goal=step["goal"][:1].lower() + step["goal"][1:],
        first=step["index"] + 2,
        s=job.c["duration_s"],
        n_clips=n_shots(job.c),
    )


def stages(job: Job, steps: list[dict]) -> list[str]:
    """What these steps do, those of one key together, in order."""
    by_key = {}
    for step in steps:
        by_key.setdefault(step["key"], []).append(step)
    return [stage(job, alike) for alike in by_key.values()]


def wanted_facts(job: Job) -> str:
    """What the request asks for, in a row."""
    if job.direction.language == "en":
        return facts_of(job.c)
    c, words = job.c, job.voice["facts"]
    facts = [words["images" if c["images"] else "videos"].format(n=c["images"] or c["videos"])]
    filled = {
        "style": {"style": (c["style"] or "").removesuffix("风格")},
        "shots": {"n": c["shots"]},
        "duration": {"s": c["duration_s"]},
        "aspect": {"ratio": c["aspect_ratio"]},
        "resolution": {"resolution": c["resolution"]},
    }
    facts += [words[name].format(**slots) for name, slots in filled.items() if any(slots.values())]
    facts += [words["look" if kind == "style" else kind] for kind in c["consistency"]]
    facts += [words[kind] for kind in c["audio"]]
    flags = ("beat", "transparent", "web_page", "input", "variety")
    facts += [words[name] for name in flags if c[name]]
    facts += [str(value) for value in c["wish"].values()]
    return listed(job, facts)


# ---------------------------------------------------------------------------- the first turn
def first_thought(job: Job) -> str:
    """What was understood, what follows from the use, what was weighed, in which order, for how
    much."""
    if not job.direction:
        facts = facts_of(job.c)
        return say(job, "start", facts=facts, route=route_of(job))
    parts = [say(job, "understood", facts=wanted_facts(job))]
    parts += understood(job)
    parts += weighed(job)
    parts += [order_of(job), cost_of(job)]
    return sentences(job, parts)


def understood(job: Job) -> list[str]:
    """What the request implies, beside what it says."""
    c, d = job.c, job.direction
    n = c["images"] or n_shots(c)
    found = []
    if c["aspect_ratio"] and makes(job.steps[-1]["tool"]) != "text":
        found.append(say(job, "shape_asked", ratio=c["aspect_ratio"]))
    elif d.shape:
        use = job.voice["use"].get(d.task_type)
        if not use:
            on_phone = "phone" if d.shape == "9:16" else "film"
            use = job.voice["use"][on_phone if c["videos"] else "other"]
        found.append(
            say(job, "shape_implied", ratio=d.shape, use=use.format(what=kind_words(job, n)))
        )
    if c["resolution"] in ("720p", "1080p") and d.shape:
        across, down = map(int, d.shape.split(":"))
        short = int(c["resolution"][:-1])
        long = round(short * max(across, down) / min(across, down) / 2) * 2
        pixels = f"{long}x{short}" if across >= down else f"{short}x{long}"
        found.append(
            say(job, "size_implied", ratio=d.shape, resolution=c["resolution"], pixels=pixels)
        )
    if c["consistency"] and n > 1:
        found.append(say(job, "alike", c["consistency"][0], n=n))
    if c["variety"]:
        found.append(say(job, "differ", n=n))
    if c["input"] and "in_1" in job.attached:
        given = job.attached["in_1"]
        found.append(say(job, "from_user", size=f"{given['width']}x{given['height']}"))
    if c["videos"] and not c["family"]:
        found.append(sound_wanted(job))
    if c["duration_s"] and not c["shots"] and n > 1:
        most = max(clip_lengths(maker_of(job)["tool"]) or (8,))
        found.append(say(job, "shots_open", s=c["duration_s"], most=most, n=n))
    return found


# Keys of steps whose results get the shape that the use implies.
SHAPED = {"image", "large", "cutout", "ref", "frame", "clip"}


def sound_wanted(job: Job) -> str:
    """What is to be heard, or that nothing is."""
    c = job.c
    if c["beat"]:
        return say(job, "beat", s=c["duration_s"] or "?", n=n_shots(c)) if c["duration_s"] else ""
    if not c["audio"]:
        return say(job, "silent")
    names = job.voice.get("facts", {})
    return say(job, "sound", sounds=listed(job, [names.get(kind, kind) for kind in c["audio"]]))


def maker_of(job: Job) -> dict:
    """The step that makes the request's clips or pictures; the first step where none does."""
    for keys in (("clip",), ("image", "large", "cutout", "restyle")):
        for step in job.steps:
            if step["key"] in keys:
                return step
    return job.steps[0]


def weighed(job: Job) -> list[str]:
    """Which tool and why, by price, lengths and limits; how lengths are reached."""
    step = maker_of(job)
    tool = step["tool"]
    price, unit = price_of(job, tool)
    others = [other for other in step["tools"] if other != tool]
    slots = {"tool": short_name(tool), "price": price, "unit": unit}
    found = []
    if others:
        slots["other"] = short_name(others[0])
        slots["price_other"] = price_of(job, others[0])[0]
        choice = say(job, "choice_first", **slots)
        found.append(say(job, "weighed", **slots, choice=choice))
    else:
        found.append(say(job, "only_tool" if price != "0" else "free_tool", **slots))
    lengths = clip_lengths(tool) if step["key"] == "clip" else ()
    if lengths and job.c["duration_s"]:
        offered = listed(job, lengths)
        found.append(say(job, "lengths", **slots, lengths=offered, route=route_of(job)))
        over = sum(clip_seconds(job.c, lengths)) - job.c["duration_s"]
        if over > 0 and "plan check" in job.mind:
            found.append(say(job, "trim_why", over=number(over)))
    for jobs, alike in busy_services(job):
        turns = math.ceil(len(alike) / jobs)
        name = short_name(alike[0]["tool"])
        found.append(say(job, "jobs", tool=name, jobs=jobs, n=len(alike), turns=turns))
    looks = [step for step in job.steps if step["key"] == "inspect"]
    if looks:
        n = sum(len(look["sees"]) for look in looks)
        way = "looks" if n > 1 else "look"
        found.append(say(job, way, n=n, per=min(n, LOOKS_AT)))
    return found


# The most media that one look takes in. tools.yaml's analysis tools show four.
LOOKS_AT = 4


def busy_services(job: Job) -> list[tuple[int, list[dict]]]:
    """[(jobs at once, steps)] of the tools that have more steps than run side by side."""
    by_tool = {}
    for step in job.steps:
        by_tool.setdefault(step["tool"], []).append(step)
    return [
        (int(jobs_at_once(tool)), alike)
        for tool, alike in by_tool.items()
        if "plan check" in job.mind and len(alike) > jobs_at_once(tool)
    ]


def order_of(job: Job) -> str:
    """The steps in order, those of one key together."""
    if len(job.steps) == 1:
        return ""
    arrow = " → " if job.direction.language == "zh" else ", then "
    return say(job, "order", order=arrow.join(stages(job, job.steps)))


def cost_of(job: Job) -> str:
    """How many steps, and what they cost by tools.yaml."""
    cost = number(sum(step_price(step, job.c) for step in job.steps))
    if len(job.steps) == 1:
        return say(job, "one_step", cost=cost)
    return say(job, "cost", steps=len(job.steps), cost=cost)


def route_of(job: Job) -> str:
    """How the clips' lengths come to the film's: '2 x 8 = 16 s, trim to 15.'"""
    c, steps = job.c, job.steps
    keys = {step["key"] for step in steps}
    lengths = lengths_of_clips(steps)
    if not lengths:
        return "One call." if len(steps) == 1 else f"{len(steps)} steps."
    seconds = clip_seconds(c, lengths)
    alike = f"{len(seconds)} x {seconds[0]}"
    total = alike if len(set(seconds)) == 1 else " + ".join(map(str, seconds))
    if not job.direction:
        change = f", trim to {c['duration_s']}" if "trim" in keys else ""
        if "cut" in keys:
            to_length = f", {c['duration_s']} s in all" if c["duration_s"] else ""
            change = f", trim each clip{' to the beat' if c['beat'] else ''}{to_length}"
        return f"{total} = {sum(seconds)} s{change}."
    words = job.voice["route"]
    route = words["total"].format(sum=total, total=sum(seconds))
    if "trim" in keys:
        route += words["trim"].format(s=c["duration_s"])
    if "cut" in keys:
        route += words["cut"] + (words["beat"] if c["beat"] else "")
        route += words["whole"].format(s=c["duration_s"]) if c["duration_s"] else ""
    return route + words["end"]


def lengths_of_clips(steps: list[dict]) -> tuple | None:
    """The seconds that the plan's first video generator offers; None where it has none."""
    return next((clip_lengths(step["tool"]) for step in steps if step["key"] == "clip"), None)


# ---------------------------------------------------------------------------- later turns
def next_thought(job: Job, called: list[dict], ready: list[dict], trouble: list[tuple]) -> str:
    """What the replies to the steps called showed, and what follows. `trouble`: (step, the error,
    what is done about it) of each call that failed."""
    if not job.direction:
        return short_next(job, called, trouble)
    failed = [step["id"] for step, _, _ in trouble]
    came = [step for step in called if step["id"] not in failed]
    parts = [came_back(job, steps) for steps in together(came)]
    parts += [failed_words(job, *case) for case in trouble[:2]]
    again = [step["id"] for step, _, move in trouble if move != "give up"]
    new = [step for step in ready if step["id"] not in again]
    if new:
        names = stages(job, new)
        n = len(ready)
        way = "next_n" if n > 1 and not trouble else "next"
        parts.append(say(job, way, next=listed(job, names), n=n))
    return sentences(job, parts)


def short_next(job: Job, called: list[dict], trouble: list[tuple]) -> str:
    """The same in a sentence."""
    if trouble:
        _, error, move = trouble[-1]
        return say(job, "error", error=error["code"], move=job.voice["moves"][move])
    done = {step["id"] for step in job.steps if step["done"]}
    free = [s for s in job.steps if not s["done"] and done.issuperset(s["after"])]
    made = ", ".join(i for step in called for i in step["ids"]) or "nothing"
    goals = dict.fromkeys(step["goal"].split(" of ")[0] for step in free)
    return say(job, "next", made=made, next=", ".join(goals))


def together(steps: list[dict]) -> list[list[dict]]:
    """Steps of one key and turn, together; looks each for itself."""
    by_key = {}
    for step in steps:
        key = (step["key"], step["id"] if step["key"] == "inspect" else 0)
        by_key.setdefault(key, []).append(step)
    return list(by_key.values())


def came_back(job: Job, steps: list[dict]) -> str:
    """What the steps of one key brought: ids, sizes, seconds, and what that means."""
    step = steps[0]
    reply, kind = step["reply"], makes(step["tool"])
    if step["key"] == "inspect":
        return seen_words(job, step)
    retaken = [(old, new) for s in steps for old, new in s.pop("swapped", ())]
    if retaken:
        old, new = (listed(job, ids) for ids in zip(*retaken))
        return say(job, "retaken", ids=new, old=old)
    ids = [i for s in steps for i in s["ids"]]
    slots = {"ids": listed(job, ids), "size": size_of_reply(reply)}
    if any(s["expect"] > 0 and not s["done"] for s in steps):
        n = sum(s["expect"] for s in steps)
        return say(job, "missing", n=n, tool=short_name(step["tool"]))
    if step["key"] == "inspire":
        return say(job, "found_came", **slots)
    if kind == "image":
        return say(job, "pictures_came", **slots, shape=shape_words(job, slots["size"]))
    if kind == "video":
        return films_came(job, steps, slots)
    if kind == "audio":
        return sound_came(job, step, slots)
    if kind == "html":
        return say(job, "page_came", **slots, n=reply.get("n_media", 0))
    if "tempo" in reply:
        return beats_came(job, step)
    if "answer" in reply:
        return say(job, "answer_came", answer=reply["answer"].strip().rstrip(".") + ".")
    if "tasks" in reply:
        return say(job, "list_came", n=len(reply["tasks"]))
    if "text" in reply:
        return say(job, "text_came", **slots, chars=len(reply["text"]))
    return ""


def size_of_reply(reply: dict) -> str:
    """The size in a reply; of several sizes the first."""
    size = reply.get("size", "")
    return size[0] if isinstance(size, list) else size


def shape_words(job: Job, size: str) -> str:
    """Whether a size has the shape that is wanted, in words."""
    ratio = job.direction.shape
    if not ratio:
        return say(job, "shape_free")
    return say(job, "shape_right" if has_shape(size, ratio) else "shape_wrong", ratio=ratio)


def has_shape(size: str, ratio: str) -> bool:
    """Whether a size such as "1344x768" has a shape such as "16:9", within 5 %."""
    width, height = map(int, size.split("x"))
    across, down = map(int, ratio.split(":"))
    return abs(width * down / (height * across) - 1) <= 0.05


def films_came(job: Job, steps: list[dict], slots: dict) -> str:
    """Clips with their lengths and sum, or the film as it stands."""
    lasting = []
    for step in steps:
        seconds = step["reply"].get("duration_s", 0)
        lasting += seconds if isinstance(seconds, list) else [seconds] * len(step["ids"])
    total = number(sum(lasting))
    if steps[0]["key"] in ("clip", "cut") and len(lasting) > 1:
        seconds = " + ".join(map(number, lasting))
        return say(job, "clips_came", **slots, seconds=seconds, total=total)
    way = "clip_came" if steps[0]["key"] == "clip" else "film_came"
    return say(job, way, **slots, total=total)


def sound_came(job: Job, step: dict, slots: dict) -> str:
    """Music or another sound, with its length beside the film's."""
    seconds = step["reply"].get("duration_s", 0)
    total = number(seconds[0] if isinstance(seconds, list) else seconds)
    if step["key"] == "music":
        lengths = lengths_of_clips(job.steps) or (8,)
        needed = job.c["duration_s"] or sum(clip_seconds(job.c, lengths))
        return say(job, "music_came", **slots, total=total, s=number(needed))
    return say(job, "sound_came", **slots, total=total)


def beats_came(job: Job, step: dict) -> str:
    """Tempo and first beat, and where the cuts go."""
    reply = step["reply"]
    tempo = reply["tempo"] or 1.0
    cuts = [number(t) for t in step.get("cuts", [])] or ["0"]
    return say(
        job,
        "beats_came",
        bpm=number(tempo),
        gap=number(60 / tempo),
        first=number((reply["first_beats"] or [0])[0]),
        cuts=listed(job, cuts),
    )


def seen_words(job: Job, look: dict) -> str:
    """What a look showed, and what is done about it."""
    flawed, seen = look["flawed"], look["looked"]
    if not flawed:
        return say(job, "clean", ids=listed(job, seen))
    ids = listed(job, flawed)
    if look["done"]:
        return say(job, "flaw_kept", ids=ids, most=RETAKES)
    if len(flawed) > 1:
        return say(job, "flaws", ids=ids, try_=look["rounds"], most=RETAKES)
    price, _ = price_of(job, look["maker"])
    return say(job, "flaw", ids=ids, try_=look["rounds"], most=RETAKES, price=price)


def failed_words(job: Job, step: dict, error: dict, move: str) -> str:
    """Of which class a failure is, and why it is met as it is."""
    way = say(job, "moves", move, try_=step["tries"] + 1, new=short_name(step["tool"]))
    known = job.voice["errors"]
    code = error["code"] if error["code"] in known else "other"
    tool = short_name(step["failed"])
    return say(job, "errors", code, tool=tool, move=way, code=error["code"], why=error["param"])


# ---------------------------------------------------------------------------- the last turn
def last_words(job: Job, ids: list[str], whole: bool) -> tuple[str, str]:
    """(thought, summary) of the last turn. `ids`: what is handed over; `whole`: all as asked."""
    if not job.direction:
        slots = {"made": ", ".join(ids) or "nothing", "facts": facts_of(job.c)}
        thought = say(job, "done" if whole else "short", **slots)
        return thought, say(job, "summary" if whole else "part", **slots)
    checks = checks_of(job, ids)
    done = listed(job, [text for _, text in checks])
    named = listed(job, ids) or job.voice["nothing"]
    thought = say(job, "done" if whole else "short_of", ids=named, checks=done)
    shown = [text for name, text in checks if name in SHOWN]
    what = kind_words(job, len(ids))
    summary = say(
        job,
        "summary" if whole else "part",
        what=what,
        What=capital(what),
        checks=listed(job, shown),
    )
    return opened(thought), opened(summary)


# The checks that the user is told of.
SHOWN = ("amount", "seconds", "shots", "shape", "off_shape")


def checks_of(job: Job, ids: list[str]) -> list[tuple[str, str]]:
    """[(name, words with numbers)] of what was checked before handing over, by the replies."""
    c = job.c
    wanted = c["images"] or c["videos"]
    n = min(len(ids), wanted) if asked_kind(c) != "image" else len(ids)
    found = [("amount", {"have": n, "want": wanted, "what": kind_words(job, wanted)})]
    replies = [job.replies[i] for i in ids]
    sizes = [size_of_reply(reply) for reply in replies if reply.get("size")]
    seconds = [reply["duration_s"] for reply in replies if reply.get("duration_s")]
    if c["duration_s"] and seconds:
        last = seconds[-1][0] if isinstance(seconds[-1], list) else seconds[-1]
        found.append(("seconds", {"want": number(c["duration_s"]), "have": number(last)}))
    if c["shots"] and any(step["key"] == "clip" for step in job.steps):
        made = sum(len(step["ids"]) for step in job.steps if step["key"] == "clip")
        found.append(("shots", {"have": made, "want": c["shots"]}))
    if sizes and job.direction.shape:
        right = all(has_shape(size, job.direction.shape) for size in sizes)
        slots = {"size": sizes[0], "ratio": job.direction.shape}
        if right or c["aspect_ratio"]:
            found.append(("shape" if right else "off_shape", slots))
    if sizes and c["resolution"]:
        found.append(("resolution", {"resolution": c["resolution"], "size": sizes[0]}))
    found += sound_checks(job)
    found += [("calls", {"calls": job.calls})]
    return [(name, say(job, "check", name, **slots)) for name, slots in found]


def sound_checks(job: Job) -> list[tuple[str, dict]]:
    """The same of references, sound, captions, cuts, looks and pages."""
    by_key = {}
    for step in job.steps:
        if step["done"]:
            by_key.setdefault(step["key"], []).append(step)
    found = []
    if job.c["consistency"]:
        first = (by_key.get("ref") or by_key.get("image") or [{"ids": []}])[0]["ids"][:1]
        found += [("reference", {"id": i}) for i in first]
    for name in ("music", "sfx"):
        found += [(name, {"id": step["ids"][0]}) for step in by_key.get(name, ()) if step["ids"]]
    for step in by_key.get("voice", ()):
        found.append(("narration", {"n": len(step["said"]["segments"])}))
    for step in by_key.get("caption", ()):
        cues = step["said"]["subtitles"]
        found.append(("subtitles", {"n": len(cues), "end": number(cues[-1]["end"])}))
    if job.c["beat"] and "cut" in by_key:
        found.append(("beat", {"n": len(by_key["cut"]) - 1}))
    looks = by_key.get("inspect", ())
    if looks:
        n = len({i for look in looks for i in look["seen"]})
        left = 0
        for look in looks:
            kept = [maker["ids"][at] for maker, at in look["sees"] if at < len(maker["ids"])]
            left += len(look["bad"].intersection(kept))
        found.append(("clean", {"n": n, "flawed": left}))
    if job.c["transparent"]:
        found.append(("transparent", {}))
    found += [("page", {"id": step["ids"][0]}) for step in by_key.get("page", ())]
    return found
