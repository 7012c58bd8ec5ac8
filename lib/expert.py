"""VisionAgent, scripted (Sec. 3.1, Fig. 4): expert work on one request, as VisGenData shows it.

TaskAgent reads the request and routes it (lib/reading.py); MetaAgent thinks (lib/thinking.py),
plans, calls, looks and verifies, with the words of lib/direction.py. lib/llm_agent.py is the same
by an LLM.
"""

import json
import math
import re
from collections import Counter
from itertools import islice
from typing import Any

from env import VisGenEnv
from lib.behaviours import speech_seconds
from lib.direction import (
    clip_prompt,
    closing_of,
    direct,
    edit_prompt,
    frame_prompt,
    join,
    lines_of,
    look_of,
    music_prompt,
    picture_prompt,
    ref_prompt,
    script_of,
    sharper,
    sounds_prompt,
)
from lib.families import asked_kind
from lib.reading import read_request
from lib.runs import seeded_rng
from lib.scenarios import HAN
from lib.text import tag
from lib.thinking import (
    LOOKS_AT,
    RETAKES,
    SHAPED,
    Job,
    first_thought,
    has_shape,
    last_words,
    lengths_of_clips,
    load_voice,
    next_thought,
    size_of_reply,
)
from lib.toolbox import clip_lengths, jobs_at_once, load_defaults, load_tools, makes
from lib.workflows import (
    LOOK_FROM,
    clip_seconds,
    expand_workflow,
    fitting_workflows,
    n_shots,
)

METACOGNITION = ("plan check", "recovery", "verification")


def vision_agent(
    task: dict,
    env: VisGenEnv,
    seed: int,
    mind: tuple[str, ...] = METACOGNITION,
    thoughts: str = "full",
) -> dict:
    """Run the scripted VisionAgent on one task in VisGenEnv and return its trajectory (Sec. 3.1).

    All steps whose inputs are there are called in one turn. `thoughts`: `data.thoughts`. Short
    ones are for a tiny policy: a sentence a turn, English, prompts of a few words, no looks.
    Metacognition is what `mind` holds (the paper names none of it in detail; ours):
    plan check: the plan is held against the request, so that no wish is overlooked (`overlook`);
        the clips' lengths are added up, so that a step trims them; and no more jobs are begun in
        one turn than the service documents;
    recovery: errors are met by class (see `recover`); without it every failed call is repeated
        once; a step that still fails ends the work;
    verification: what came back is counted, a step that brought less than it should is carried on,
        several media are looked at and those with a flaw made again (see `with_looks`), and the
        answer says so where seconds, shape or number are not what was asked; without it any result
        will do.
    """
    messages, _ = env.reset(task, seed)
    message = messages[-1]["content"]
    c = read_request(message)
    rng = seeded_rng(seed, "agent", task["id"])
    if "plan check" not in mind:
        c = overlook(c, rng)
    if thoughts == "full":
        job = Job(c, attached_media(message), make_plan(c, mind, apart=True), mind, None, rng)
        direct_job(job, message, env.pool, seed)
    else:
        job = Job(c, attached_media(message), make_plan(c, mind), mind, None, rng)
    plan = shown_plan(job.steps)
    think = first_thought(job)
    ready = ready_steps(job)
    while ready:
        calls = [{"name": step["tool"], "arguments": call_arguments(step, job)} for step in ready]
        blocks = [tag("think", think)]
        if plan:
            blocks.append(tag("plan", plan))
        blocks += [tag("tool_call", call) for call in calls]
        messages, _, terminated, truncated, _ = env.step("\n".join(blocks))
        if terminated or truncated:
            return env.trajectory()

        job.calls += len(calls)
        plan, trouble, given_up = None, [], False
        for step, call, message in zip(ready, calls, messages):
            reply = json.loads(message["content"])
            step["tries"] += 1
            if "error" not in reply:
                take_in(step, call["arguments"], reply, job)
                continue
            step["failed"] = step["tool"]
            move = recover(step, reply["error"], mind)
            trouble.append((step, reply["error"], move))
            if move == "switch":
                plan = shown_plan(job.steps)
            given_up = given_up or (move == "give up" and not can_do_without(step))
        called, ready = ready, [] if given_up else ready_steps(job)
        think = next_thought(job, called, ready, trouble)
    env.step(final_turn(job))
    return env.trajectory()


def direct_job(job: Job, message: str, pool: list[str], seed: int) -> None:
    """Give a job art direction and, where results are verified, looks in its plan."""
    job.direction = direct(message.split("\n[in_1: ")[0], job.c, seed)
    job.direction.shape = drawn_shape(job)
    if "verification" in job.mind:
        job.steps = with_looks(job.steps, pool)


def drawn_shape(job: Job) -> str | None:
    """The shape that the request's media get: as asked; or as the use implies, where a step draws
    them from words, of gpt-image-1's three shapes the nearest; or None."""
    keys = {step["key"] for step in job.steps}
    shape = job.direction.shape
    if job.c["aspect_ratio"] or not shape or not keys & SHAPED:
        return job.c["aspect_ratio"]
    if "cutout" in keys and shape not in GPT_SIZES:
        across, down = map(int, shape.split(":"))
        return "3:2" if across > down else "2:3"
    return shape


# The wishes of which one may be overlooked, and what is read without it; of fewer than MANY_WISHES
# none is. Ours: with it thinking alone succeeds about as often as in the paper (72 % / 1.3).
OVERLOOKED = {
    "style": {"style": None},
    "aspect_ratio": {"aspect_ratio": None},
    "resolution": {"resolution": None},
    "audio": {"audio": [], "beat": False},
    "beat": {"beat": False},
}
MANY_WISHES = 3


def overlook(c: dict, rng: Any) -> dict:
    """What a request asks for less one of its many wishes, as an agent reads it that never holds
    its plan against the request. The workflow is the same without it, so that its tools are at
    hand."""
    wishes = [name for name in OVERLOOKED if c[name]]
    workflow = fitting_workflows(c)[0]
    readings = [{**c, **OVERLOOKED[name]} for name in wishes]
    readings = [less for less in readings if fitting_workflows(less)[0] == workflow]
    return rng.choice(readings) if readings and len(wishes) >= MANY_WISHES else c


# The keys of steps that make all pictures, or clips, of a request in one call.
SEVERAL = ("image", "large", "cutout", "restyle", "clip", "masked", "manner")
# Characters that the expert shows in a second of captions. Ours.
READ_EN, READ_ZH = 18, 9
# How many references the expert looks for. Ours.
REFERENCES = 3


def make_plan(c, mind, apart=False):
    """The steps of the workflow that fits the request best, each with the state of its work; with
    `apart` each picture and film is a step with a prompt of its own. The state:
    `expect` (results still to come), `tries` (calls of its tool), `reworded` (how often its prompt
    was said anew), `ids` (what came), `done`; `n`, the results it is to bring, and `retakes`, how
    often it was made again."""
    workflow = fitting_workflows(c)[0]
    c = {**c, "variety": c["variety"] or apart}
    steps = expand_workflow(workflow, c)
    lengths = lengths_of_clips(steps)
    if lengths and "plan check" not in mind:
        # Whatever length the clips come to passes for the length asked for.
        seconds = sum(clip_seconds(c, lengths))
        c = {**c, "shots": n_shots(c), "duration_s": seconds}
        steps = expand_workflow(workflow, c)
    # With an edit in the plan, one image is made and the others are edits of it; so it is where
    # each picture or film is a step of its own.
    edited = any(step["key"] == "edit" for step in steps)
    times = Counter(step["key"] for step in steps)
    for step in steps:
        several = step["key"] in SEVERAL
        alone = edited or times[step["key"]] > 1
        expect = max(1, c["images"], c["videos"]) if several and not alone else 1
        expect = REFERENCES if step["key"] == "inspire" else expect
        step |= at_start(expect)
    return steps


def at_start(expect: int) -> dict:
    """The state of a step's work before its first call."""
    return {
        "n": expect,
        "expect": expect,
        "tries": 0,
        "reworded": 0,
        "retakes": 0,
        "ids": [],
        "done": False,
        "reply": {},
    }


def shown_plan(steps):
    """The plan as UTPC's <plan> block shows it."""
    return [{k: step[k] for k in ("id", "tool", "goal", "after")} for step in steps]


# ---------------------------------------------------------------------------- looking
def with_looks(steps: list[dict], pool: list[str]) -> list[dict]:
    """The plan with looks at what it makes, renumbered: where several pictures or clips of a kind
    are made, one look over up to LOOKS_AT of them, and one at a picture that several others are to
    be made from. What builds on them waits for the look.

    A look is a step with the key "inspect"; `sees` holds (step, which of its results) of each."""
    makers = {}
    for step in steps:
        if load_tools().get(step["tool"], {}).get("behaviour") == "generate":
            kind = makes(step["tool"])
            if f"tool_{kind}_analysis" in pool:
                makers.setdefault(step["key"], []).append(step)
    looks = []  # (the last maker, look)
    for key, group in makers.items():
        units = [(step, i) for step in group for i in range(step["expect"])]
        children = sum(group[0]["id"] in step["after"] for step in steps if step["key"] in DERIVED)
        if len(units) >= LOOK_FROM or (key in ("ref", "image") and children >= LOOK_FROM):
            for first in range(0, len(units), LOOKS_AT):
                sees = units[first : first + LOOKS_AT]
                looks.append((group[-1], look_step(sees, len(looks))))
    return renumbered(steps, looks)


# Keys of steps that are made from a reference picture.
DERIVED = ("edit", "frame")


def look_step(sees: list[tuple[dict, int]], index: int) -> dict:
    """A look at these results, as a plan's step without a number."""
    maker = sees[0][0]
    kind = makes(maker["tool"])
    what = {"image": "pictures", "video": "clips"}[kind] if len(sees) > 1 else "picture"
    tool = f"tool_{kind}_analysis"
    goal = f"look at the {what} for flaws, part {index + 1}"
    return {
        "tool": tool,
        "goal": goal,
        "key": "inspect",
        "index": index,
        "tools": [tool],
        "sees": sees,
        "maker": maker["tool"],
        "rounds": 0,
        "looked": [],
        "flawed": [],
        "seen": set(),
        "bad": set(),
        **at_start(1),
    }


def renumbered(steps: list[dict], looks: list[tuple[dict, dict]]) -> list[dict]:
    """The plan with each look behind the last maker of its kind. What came after a maker comes
    after the looks at it too, unless it is made side by side with it."""
    order = []
    for step in steps:
        order.append(step)
        order += [look for last, look in looks if last is step]
    number = {id(step): i for i, step in enumerate(order, 1)}
    by_old = {step["id"]: step for step in steps}
    for step in order:
        if step["key"] == "inspect":
            continue
        before = [by_old[i] for i in step["after"]]
        seen_by = [
            look
            for _, look in looks
            if any(maker is b for maker, _ in look["sees"] for b in before)
        ]
        step["after"] = sorted({number[id(s)] for s in (*before, *seen_by)})
    for step in order:
        step["id"] = number[id(step)]
        if step["key"] == "inspect":
            step["after"] = sorted({number[id(maker)] for maker, _ in step["sees"]})
    return order


def take_look(look: dict, reply: dict, asked: list[str]) -> None:
    """Read what an analysis said of media: those with a flaw go back to the steps that made them,
    RETAKES times at most; then the look is done."""
    flawed = {text.split(":")[0] for text in reply["answer"].split(". ") if ", flaw:" in text}
    look["looked"] = asked
    look["flawed"] = [i for i in asked if i in flawed]
    look["bad"] |= flawed
    look["tries"] = 0
    look["reply"] = reply
    look["done"] = not look["flawed"] or look["rounds"] == RETAKES
    if look["done"]:
        return
    look["rounds"] += 1
    for maker, which in look["sees"]:
        if maker["ids"][which] in flawed:
            maker.setdefault("again", []).append(which)
            maker["expect"] = len(maker["again"])
            maker |= {"done": False, "tries": 0, "retakes": look["rounds"]}


def can_do_without(step: dict) -> bool:
    """Whether the work goes on where a call fails for good: a look that is not to be had, or what
    was only to replace something with a flaw, which then stays."""
    if step["key"] != "inspect" and not step.get("again"):
        return False
    step |= {"again": [], "expect": 0, "done": True}
    return True


def unseen(look: dict) -> list[str]:
    """The ids that a look has still to see: those that it has not seen."""
    ids = [maker["ids"][which] for maker, which in look["sees"] if which < len(maker["ids"])]
    return [i for i in ids if i not in look["seen"]]


# ---------------------------------------------------------------------------- turn by turn
def open_steps(steps):
    """The steps that are not done, and whose inputs are there."""
    done = {step["id"] for step in steps if step["done"]}
    return [step for step in steps if not step["done"] and done.issuperset(step["after"])]


def ready_steps(job):
    """The steps to call in the next turn; with the plan check no more of a tool than its service
    runs side by side. A look that has nothing new to see is done."""
    for step in open_steps(job.steps):
        if step["key"] == "inspect" and not unseen(step):
            step["done"] = True
    if "plan check" not in job.mind:
        return open_steps(job.steps)
    ready, begun = [], Counter()
    for step in open_steps(job.steps):
        if begun[step["tool"]] < jobs_at_once(step["tool"]):
            ready.append(step)
        begun[step["tool"]] += 1
    return ready


def take_in(step, arguments, reply, job):
    """Note what a call brought. A partial result leaves the rest of the step open, where it is
    verified. Of several songs the first is used. What is made again takes the place of what had a
    flaw."""
    step["said"] = arguments
    if step["key"] == "inspect":
        take_look(step, reply, arguments["media"])
        step["seen"].update(arguments["media"])
        return
    ids = reply.get("ids", [])
    if step.get("again"):
        places, step["again"] = step["again"][: len(ids)], step["again"][len(ids) :]
        step["swapped"] = [(step["ids"][place], i) for place, i in zip(places, ids)]
        for place, i in zip(places, ids):
            step["ids"][place] = i
    else:
        step["ids"] += ids[:1] if step["key"] in ("music", "song") else ids
    step["expect"] -= len(ids)
    step["reply"] = reply
    answered = makes(step["tool"]) == "nothing"
    step["done"] = step["expect"] <= 0 or answered or "verification" not in job.mind
    job.replies |= dict.fromkeys(step["ids"], reply)
    if step["key"] == "beat" and job.direction:
        seconds = clip_seconds(job.c, lengths_of_clips(job.steps))
        step["cuts"] = cut_points(job.c, seconds, reply)[1:-1]


def recover(step, error, mind):
    """What becomes of a step whose call failed: "retry", "switch", "reword" or "give up".

    With recovery a retryable call is made up to three times in all, and anything else moves the
    step to the workflow's next tool, if it has one. A prompt that moderation blocks where no tool
    is left is said in other words. Without recovery every call is made twice.
    """
    if "recovery" not in mind:
        return "retry" if step["tries"] < 2 else "give up"
    if error["retryable"] and step["tries"] < 3:
        return "retry"
    others = step["tools"][step["tools"].index(step["tool"]) + 1 :]
    if others:
        step["tool"], step["tries"] = others[0], 0
        return "switch"
    blocked = error["code"] == "content_blocked" and error["param"] == "prompt"
    if blocked and step["reworded"] < len(load_voice()["short"]["rewordings"]):
        step["reworded"] += 1
        return "reword"
    return "give up"


def final_turn(job):
    """The last turn: hand over what was made, and say so where it is not all, or not as asked."""
    c, steps = job.c, job.steps
    kind = asked_kind(c)
    groups = [
        step["ids"]
        for step in steps
        if makes(step["tool"]) == kind and step["ids"] and step["key"] != "inspire"
    ]
    if kind != "image":
        # A film as the last step left it; of several films, each is a step of its own or of one.
        groups = groups[-max(1, c["videos"]) :]
    ids = [i for group in groups for i in group]
    whole = all(step["done"] for step in steps)
    if "verification" in job.mind:
        whole = whole and all(as_asked(job.replies[i], c) for i in ids)
    thought, summary = last_words(job, ids, whole)
    pages = [i for step in steps if step["key"] == "page" for i in step["ids"]]
    answer = {"deliverables": ids + pages, "summary": summary}
    return "\n".join([tag("think", thought), tag("answer", answer)])


def as_asked(reply, c):
    """Whether a tool's reply on a picture or film has the seconds and the shape that the request
    asks for, the shape within 5 % and a tenth of a second; what it does not say passes."""
    size = size_of_reply(reply)
    if size and c["aspect_ratio"] and not has_shape(size, c["aspect_ratio"]):
        return False
    seconds = c["duration_s"] and reply.get("duration_s")
    return not seconds or abs(seconds - c["duration_s"]) <= 0.1


# ---------------------------------------------------------------------------- arguments of a call
GPT_SIZES = {"1:1": "1024x1024", "3:2": "1536x1024", "2:3": "1024x1536"}


def call_arguments(step: dict, job: Job) -> dict:
    """The arguments of a plan step's call, by its key in data/workflows.yaml. Optional ones are
    written only where the request, or the use, asks for something; but no service's mark is left
    on, and a wish for one is met by other tools."""
    made = {}  # step key -> ids that came back
    for other in job.steps:
        if other["ids"]:
            made.setdefault(other["key"], []).extend(other["ids"])
    if step["key"] in WISHES:
        arguments = WISHES[step["key"]](step, job, made)
    else:
        arguments = usual_arguments(step, job, made)
    if "watermark" in load_tools()[step["tool"]]["parameters"]["properties"]:
        arguments["watermark"] = False
    change = job.c["wish"].get("change")
    if change and step["key"] in ("frame", "clip") and 2 * step["index"] >= n_shots(job.c):
        arguments["prompt"] += f", {change}"
    if step["retakes"]:
        arguments["prompt"] = sharper(job.direction, arguments["prompt"], step["retakes"])
    if step["reworded"]:
        chinese = HAN.search(arguments["prompt"])
        words = load_voice()["short"]["rewordings_zh" if chinese else "rewordings"]
        arguments["prompt"] += f", {words[step['reworded'] - 1]}"
    return arguments


def usual_arguments(step, job, made):
    """The arguments of a step of the 15 workflows. `made`: {step key: ids that came back}."""
    key, c, steps = step["key"], job.c, job.steps
    if key == "inspect":
        ways = job.voice["question"]
        return {"media": unseen(step), "question": ways[step["index"] % len(ways)]}
    if key in ("image", "large", "ref", "frame", "cutout"):
        if step["tool"].startswith("tool_text2image"):
            return picture_arguments(step, job)
    if key in ("edit", "frame", "restyle"):
        return edit_arguments(step, job, made)
    fed = [i for after in step["after"] for i in steps[after - 1]["ids"]]
    if key == "clip":
        return clip_arguments(step, job, fed)
    if key == "cut":
        return cut_arguments(step, c, steps, fed)
    if key == "board":
        return {"script": board_script(job), "n_shots": c["images"]}
    if key == "page":
        return page_arguments(job, made)
    if key == "music":
        return {"prompt": music_words(job)}
    if key == "sfx":
        seconds = min(30, c["duration_s"] or n_shots(c) * 5)
        return {"prompt": sound_words(job), "duration": seconds}
    if key == "beat":
        return {"audio": made["music"][0]}
    if key == "join":
        sound = made.get("music") or made.get("sfx")
        videos = made.get("cut") or made["clip"]
        return {"videos": videos, **({"audio": sound[0]} if sound else {})}
    return film_arguments(key, job)


def music_words(job):
    """The prompt of a film's music."""
    if not job.direction:
        return job.rng.choice(job.voice["music"])
    lengths = lengths_of_clips(job.steps) or (8,)
    return music_prompt(job.direction, job.c["duration_s"] or sum(clip_seconds(job.c, lengths)))


def sound_words(job):
    """The prompt of a film's sound effects."""
    return sounds_prompt(job.direction) if job.direction else job.rng.choice(job.voice["sfx"])


def board_script(job):
    """What a storyboard is written from: the subject and, in full, what each of its frames shows;
    as much as one prompt takes."""
    if not job.direction:
        return job.c["subject"]
    n = job.c["images"]
    return " ".join(f"{i + 1}. {picture_prompt(job.direction, i)}" for i in range(n))[:1500]


def page_arguments(job, made):
    """The page with all pictures, named after the subject; what was read for it stands beside."""
    c = job.c
    media = made["image"] + made.get("edit", [])
    section = {"heading": c["subject"], "media_ids": media}
    read = next((s["reply"]["text"] for s in job.steps if s["key"] == "read"), None)
    if read:
        section["text"] = read
    elif job.direction:
        lines = lines_of(job.direction)
        said = [next(lines) for _ in range(3)]
        section["text"] = join(job.direction, [*said, closing_of(job.direction)])
    return {"title": c["subject"], "sections": [section]}


def film_arguments(key, job):
    """What is done to the film as the latest step left it: trimmed, spoken over, subtitled."""
    c = job.c
    finishing = ("caption", "voice", "trim", "join", "clip")  # the latest first
    latest = min(
        (s for s in job.steps if s["ids"] and s["key"] in finishing),
        key=lambda s: finishing.index(s["key"]),
    )
    film = latest["ids"][0]
    if key == "trim":
        return {"video": film, "start": 0, "end": c["duration_s"]}
    seconds = latest["reply"]["duration_s"]
    chinese = bool(HAN.search(c["subject"]))
    language = {"language": "zh"} if chinese else {}
    if job.direction:
        spoken = any(step["key"] == "voice" for step in job.steps)
        segments, cues = said_and_shown(job.direction, seconds, spoken)
    else:
        voice = job.voice["lines_zh" if chinese else "lines"]
        segments = narration(film_lines(c, voice, job.rng), seconds, chinese)
        cues = captions(film_lines(c, voice, job.rng), seconds)
        for step in job.steps:
            if step["key"] == "voice" and step["done"]:
                parts = [
                    (s["start"], SENTENCE.findall(s["text"])) for s in step["said"]["segments"]
                ]
                cues = spoken_captions(parts, seconds, chinese)
    if key == "voice":
        return {"video": film, "segments": segments, **language}
    return {"video": film, "subtitles": cues, **language}


def said_and_shown(direction, seconds, spoken):
    """(segments of speech, captions) of a film of so many seconds. The captions are what is spoken,
    each sentence as long as it is heard; a film that is not spoken over has one every few
    seconds."""
    chinese = direction.language == "zh"
    parts = script_of(direction, seconds, lambda text: spoken_seconds(text, chinese))
    segments = [{"start": start, "text": join(direction, said)} for start, said in parts]
    if not spoken:
        return segments, captions(lines_of(direction), seconds)
    return segments, spoken_captions(parts, seconds, chinese)


def spoken_captions(parts, seconds, chinese):
    """Cues of what is spoken, [(start, sentences)]: each sentence stands from when it is heard to
    the next one, the last of a part a little longer."""
    cues = []
    for (start, said), after in zip(parts, [*(start for start, _ in parts[1:]), seconds]):
        at = start
        for i, text in enumerate(said, 1):
            end = start + spoken_seconds(("" if chinese else " ").join(said[:i]), chinese)
            if i == len(said):
                end = min(after, start + 1.25 * (end - start) + 1)
            end = math.floor(10 * end) / 10
            cues.append({"start": round(at, 1), "end": end, "text": text})
            at = end
    return cues


def spoken_seconds(text, chinese):
    """How long the text-to-speech service takes for a text."""
    speech = load_tools()["tool_tts_composite"]["output"]
    return speech_seconds(speech, {"language": "zh" if chinese else "en", "speed": 1.0}, text)


def film_lines(c, lines, rng):
    """What can be said of a film, without an end: what it shows, then more in a random order."""
    first = [line.format(subject=c["subject"], style=c["style"]) for line in lines["first"]]
    if not c["style"]:
        first = first[:1]
    yield from first
    while True:
        yield from rng.sample(lines["more"], len(lines["more"]))


def narration(lines, seconds, chinese):
    """Segments {start, text} of speech, spread over the film: as many sentences in each as it has
    time for, at least half of it spoken."""
    n = max(1, round(seconds / SEGMENT_S))
    segments = []
    line = next(lines)
    for i in range(n):
        start, room = i * seconds / n, seconds / n - 0.1
        text = ""
        while spoken_seconds(join_lines(text, line, chinese), chinese) <= room:
            text, line = join_lines(text, line, chinese), next(lines)
        if text:
            segments.append({"start": round(start, 1), "text": text})
    return segments or [{"start": 0, "text": line}]


def join_lines(text, line, chinese):
    """Two sentences one behind the other."""
    return text + ("" if chinese or not text else " ") + line


def captions(lines, seconds):
    """Cues {start, end, text} that cover the film, each short enough to be read in its time."""
    lines = list(islice(lines, max(1, math.ceil(seconds / CUE_S))))
    n = len(lines)
    cues = []
    for i, text in enumerate(lines):
        start, end = (math.floor(10 * seconds * k / n) / 10 for k in (i, i + 1))
        cues.append({"start": start, "end": end, "text": text})
    return cues


# A sentence of a spoken text.
SENTENCE = re.compile(r"[^\s.。][^.。]*[.。]?")
# Seconds of film that a segment of narration, and a caption, goes with. Ours.
SEGMENT_S = 8
CUE_S = 5


def cut_arguments(step, c, steps, fed):
    """A trim of one clip to its part of the film: to the beat where that is asked, else in equal
    parts."""
    beat = next((other["reply"] for other in steps if other["key"] == "beat"), {})
    generator = next(other["tool"] for other in steps if other["key"] == "clip")
    seconds = clip_seconds(c, clip_lengths(generator))
    fps = load_tools()[generator]["output"]["fps"]
    times = cut_points(c, seconds, beat)
    marks = [round(t * fps) for t in times]
    n_frames = marks[step["index"] + 1] - marks[step["index"]]
    # Rounded up: a tool counts whole frames.
    end = math.ceil(1000 * n_frames / fps) / 1000
    return {"video": fed[-1], "start": 0, "end": min(end, seconds[step["index"]])}


def cut_points(c, seconds, beat):
    """The times (s) at which a film's shots begin, and its end. `seconds`: of the clips; `beat`:
    the beat detector's reply, {} without one. Of the beats at which a cut can lie, since a shot is
    no longer than its clip, the nearest to equal parts; the last one where no length is asked."""
    n, wanted = len(seconds), c["duration_s"]
    gap = 60 / beat["tempo"] if beat.get("tempo") else 0
    times = [0.0]
    for i in range(1, n + 1):
        latest = times[-1] + seconds[i - 1]
        earliest = times[-1] + 1
        ideal = latest
        if wanted:
            ideal = wanted * i / n
            earliest = max(earliest, wanted - sum(seconds[i:]))
        if wanted and i == n:
            times.append(wanted)
            continue
        best = min(max(ideal, earliest), latest)
        if gap:
            first = beat["first_beats"][0]
            k = round((best - first) / gap)
            near = [first + (k + step) * gap for step in (-1, 0, 1)]
            fitting = [t for t in near if earliest <= t <= latest]
            best = min(fitting, key=lambda t: abs(t - ideal), default=best)
        times.append(best)
    return times


def picture_words(step, job):
    """The prompt of a picture: of a reference, a film's frame, one of a set, or a set."""
    if not job.direction:
        view = f", {view_of(step, job.c)}" if step["n"] == 1 else ""
        return brief_look(job.c) + view
    if step["key"] == "ref":
        return ref_prompt(job.direction)
    if step["key"] == "frame":
        return frame_prompt(job.direction, step["index"])
    # The first picture and those edited from it are counted together.
    first = 1 if step["key"] == "edit" else 0
    return picture_prompt(job.direction, step["index"] + first, step["n"])


def picture_arguments(step, job):
    """A call that makes pictures from text: subject, style and, of a single picture, the view."""
    c = job.c
    arguments = {"prompt": picture_words(step, job)}
    if step["tool"] == "tool_text2image_gpt":
        arguments["size"] = gpt_size(c, job)
        return arguments | number_of(step) | {"background": "transparent"}
    if step["tool"] == "tool_text2image_seed" and c["resolution"] == "2K":
        arguments["size"] = "2K"
    return arguments | shape_of(step, job) | number_of(step)


def edit_arguments(step, job, made):
    """A call that makes pictures from one that is there: another view of it, or its style anew."""
    c = job.c
    source = made.get("image") or made.get("ref") or ["in_1"]
    prompt = picture_words(step, job)
    if job.direction:
        prompt = edit_prompt(job.direction, prompt, step["index"])
    aspect = aspect_of(c) if step["key"] == "restyle" else {}
    if aspect and step["tool"] == "tool_image_edit_qwen":
        aspect = {"size": size_of(c["aspect_ratio"])}
    if step["key"] != "restyle" and step["tool"] == "tool_image_edit_qwen":
        # Gemini's edits have the size of the reference. A film of other sizes would get black bars.
        size = size_of_reply(job.replies[source[0]])
        fits = max(map(int, size.split("x"))) <= QWEN_SIDE
        aspect = {"size": size.replace("x", "*") if fits else size_of(size.replace("x", ":"))}
    return {"images": source[:1], "prompt": prompt, **aspect, **number_of(step)}


# The longest side that Qwen's edit makes, as tools.yaml has it.
QWEN_SIDE = 2048


def size_of(ratio: str) -> str:
    """Sides of about a megapixel in that ratio, as Qwen's edit takes them.

    >>> size_of("16:9")
    '1360*768'
    """
    width, height = map(int, ratio.split(":"))
    sides = [math.sqrt(2**20 * a / b) for a, b in ((width, height), (height, width))]
    return "*".join(str(round(side / 16) * 16) for side in sides)


def clip_words(step, job):
    """The prompt of a clip; of one that moves a frame also how it moves."""
    if job.direction:
        return clip_prompt(job.direction, step["index"])
    prompt = brief_look(job.c)
    if step["n"] == 1:
        prompt += f", {view_of(step, job.c)}"
    if step["tool"] == "tool_image2video_keling":
        prompt += f", {nth(load_voice()['short']['motions'], step['index'])}"
    return prompt


def clip_arguments(step, job, fed):
    """A call that makes a clip, from text or from a frame. `fed`: ids from the steps before it."""
    c = job.c
    clips = clip_seconds(c, clip_lengths(step["tool"]))
    seconds = clips[min(step["index"], len(clips) - 1)]
    prompt = clip_words(step, job)
    if step["tool"] == "tool_image2video_keling":
        mode = {"mode": "pro"} if c["resolution"] == "1080p" else {}
        return {"image": fed[0], "prompt": prompt, "duration": seconds, **mode}
    resolution = {"resolution": "1080p"} if c["resolution"] else {}
    arguments = {"prompt": prompt, "duration": seconds, **shape_of(step, job), **resolution}
    if load_defaults()["blocked_words"]["child"].search(prompt):
        # Veo blocks children unless it is told that they may be shown.
        arguments["person_generation"] = "allow_all"
    return arguments | number_of(step)


def view_of(step, c):
    """The view of a step's picture or clip in few words, in the request's language; each has its
    own."""
    views = load_voice()["short"]["views_zh" if HAN.search(c["subject"]) else "views"]
    if step["key"] == "ref":
        return views[-1]
    # The first picture and those edited from it are counted together.
    first = 1 if step["key"] == "edit" else 0
    return nth(views, step["index"] + first)


def brief_look(c):
    """The subject in its style, in few words."""
    return f"{c['subject']}, {c['style']}" if c["style"] else c["subject"]


def aspect_of(c):
    """The argument for a shape that the request asks for."""
    return {"aspect_ratio": c["aspect_ratio"]} if c["aspect_ratio"] else {}


def shape_of(step, job):
    """The argument for the shape that the request, or else the use, asks for. A film's frames are
    16:9 even where thoughts are short: a clip has the shape of its frame."""
    if job.c["aspect_ratio"]:
        return aspect_of(job.c)
    ratio = job.direction.shape if job.direction else None
    if not job.direction and job.c["videos"] and step["key"] in ("ref", "frame"):
        ratio = "16:9"
    return {"aspect_ratio": ratio} if ratio else {}


def gpt_size(c, job=None):
    """gpt-image-1's size for a shape: as asked, or as the use implies."""
    implied = job.direction.shape if job and job.direction else None
    return GPT_SIZES[c["aspect_ratio"] or implied or "1:1"]


def number_of(step):
    """The argument for several results of one call."""
    return {"n": step["expect"]} if step["expect"] > 1 else {}


def nth(items, i):
    """Item i of a list that begins anew at its end."""
    return items[i % len(items)]


# ---------------------------------------------------------------------------- the families' calls
# Those of data/families.yaml, by a step's key. Each takes (the step, the job, {step key: ids that
# came back}).
ATTACHED = re.compile(r"^\[(in_\d+): (\w+)(?: (\d+)x(\d+))?(?: ([\d.]+) s)?", re.M)


def attached_media(message: str) -> dict[str, dict]:
    """{id: {kind, width, height, duration_s}} of what the user's message says of its media."""
    return {
        found[1]: {
            "kind": found[2],
            "width": int(found[3] or 0),
            "height": int(found[4] or 0),
            "duration_s": float(found[5] or 0),
        }
        for found in ATTACHED.finditer(message)
    }


def language_of(text):
    """The argument for a language that is not English."""
    return {"language": "zh"} if HAN.search(text) else {}


def pictured(step, job):
    """What one of several pictures shows."""
    if job.direction:
        return picture_prompt(job.direction, step["index"])
    return f"{brief_look(job.c)}, {view_of(step, job.c)}"


def drawn(step, job):
    """The prompt of a picture that is made from others; in few words subject and style."""
    if job.direction:
        return picture_prompt(job.direction, step["index"], step["n"])
    return brief_look(job.c)


def refine_call(step, job, made):
    """A prompt to be refined."""
    style = {"style": job.c["style"]} if job.c["style"] else {}
    limit = {"max_chars": job.c["wish"]["max_chars"]}
    return {
        "prompt": job.c["subject"],
        "target": "image",
        **style,
        **limit,
        **language_of(job.c["subject"]),
    }


def exact_call(step, job, made):
    """A picture of an exact size; the services write sizes differently."""
    size = job.c["wish"]["exact_size"]
    if step["tool"] == "tool_text2image_qwen":
        return {"prompt": pictured(step, job), "size": size.replace("x", "*")}
    return {"prompt": pictured(step, job), "size": size}


def marked_call(step, job, made):
    """A picture with the service's visible mark."""
    size = job.c["wish"]["exact_size"].replace("x", ":")
    return {"prompt": pictured(step, job), "resolution": size, "logo_add": True}


def asked_size(c):
    """The argument of gpt-image-1 for a shape that the request asks for."""
    return {"size": gpt_size(c)} if c["aspect_ratio"] else {}


def masked_call(step, job, made):
    """An edit of the masked part."""
    arguments = {"images": ["in_1"], "mask": "in_2", "prompt": drawn(step, job)}
    return arguments | asked_size(job.c) | number_of(step)


def combine_call(step, job, made):
    """One picture from all references."""
    arguments = {"images": list(job.attached), "prompt": drawn(step, job)}
    if step["tool"] == "tool_image_edit_gpt":
        return arguments | asked_size(job.c)
    return arguments | aspect_of(job.c)


def sized_call(step, job, made):
    """An edit in another size."""
    size = job.c["wish"]["exact_size"].replace("x", "*")
    return {"images": ["in_1"], "prompt": drawn(step, job), "size": size}


def inspire_call(step, job, made):
    """A search for references."""
    query = look_of(job.c, job.direction.language) if job.direction else brief_look(job.c)
    return {"query": query[:400], "n": step["expect"]}


def manner_call(step, job, made):
    """Pictures after the references found."""
    arguments = {"images": made["inspire"][:3], "prompt": drawn(step, job)}
    return arguments | (aspect_of(job.c) or {"aspect_ratio": "1:1"}) | number_of(step)


def read_call(step, job, made):
    """What stands at the address."""
    return {"urls": [job.c["wish"]["url"]]}


def look_call(step, job, made):
    """All takes, looked at in one call."""
    question = job.voice["question"][0] if job.direction else "Which of these has a flaw?"
    return {"media": list(job.attached), "question": question}


def listen_call(step, job, made):
    """One take, listened to."""
    return {"media": [list(job.attached)[step["index"]]], "question": "Does it have a flaw?"}


def the_good_one(steps, attached):
    """The id of the take in which no analysis found a flaw; the first where none was looked at."""
    answers = " ".join(s["reply"]["answer"] for s in steps if s["key"] in ("look", "listen"))
    flawed = {text.split(":")[0] for text in answers.split(". ") if "flaw" in text}
    return next((i for i in attached if i not in flawed), next(iter(attached)))


def pick_call(step, job, made):
    """An edit of the picture without a flaw."""
    good = the_good_one(job.steps, job.attached)
    shape = aspect_of(job.c)
    if shape and step["tool"] == "tool_image_edit_qwen":
        across, down = map(int, job.c["aspect_ratio"].split(":"))
        scale = math.sqrt(1024 * 1024 / (across * down))
        shape = {"size": f"{round(across * scale)}*{round(down * scale)}"}
    return {"images": [good], "prompt": drawn(step, job), **shape}


def shorten_call(step, job, made):
    """The film without a flaw, cut to length."""
    return {"video": the_good_one(job.steps, job.attached), "start": 0, "end": job.c["duration_s"]}


def clean_call(step, job, made):
    """The recording without a flaw, cut to length."""
    return {"audio": the_good_one(job.steps, job.attached), "end": job.c["duration_s"]}


def script_call(step, job, made):
    """A script of the asked length."""
    subject = job.c["subject"]
    return {"topic": subject, "duration": job.c["duration_s"], **language_of(subject)}


def polish_call(step, job, made):
    """The user's board, reworded."""
    return {"storyboard": "in_1", "instructions": f"{job.c['subject']}: {job.c['wish']['mood']}"}


def merge_call(step, job, made):
    """The user's script, put into the user's board."""
    mood = f"{job.c['subject']}: {job.c['wish']['mood']}"
    return {"script": "in_1", "storyboard": "in_2", "instructions": mood}


def animate_call(step, job, made):
    """The user's picture, moving and sounding."""
    resolution = {"resolution": job.c["resolution"]} if job.c["resolution"] else {}
    prompt = f"{job.c['subject']}, gentle movement"
    if job.direction:
        prompt = clip_prompt(job.direction, 0)
    arguments = {"image": "in_1", "prompt": prompt}
    return arguments | {"duration": job.c["duration_s"], **aspect_of(job.c), **resolution}


def speak_call(step, job, made):
    """A speech about the subject."""
    subject = job.c["subject"]
    text = f"请看{subject}。" if HAN.search(subject) else f"Let me tell you about {subject}."
    if job.direction:
        lines = lines_of(job.direction)
        said = [next(lines) for _ in range(SPOKEN)]
        text = join(job.direction, [*said, closing_of(job.direction)])
    return {"text": text, "voice": job.c["wish"]["voice"], **language_of(subject)}


# Sentences of a speech, beside the last one. Ours.
SPOKEN = 4


def crop_call(step, job, made):
    """The largest crop of the asked shape out of the middle of the user's film."""
    width, height = job.attached["in_1"]["width"], job.attached["in_1"]["height"]
    across, down = map(int, job.c["aspect_ratio"].split(":"))
    scale = min(width / across, height / down)
    w, h = (int(side * scale) // 2 * 2 for side in (across, down))
    crop = {"op": "crop", "width": w, "height": h, "x": (width - w) // 2, "y": (height - h) // 2}
    return {"video": "in_1", "operations": [crop]}


def watermark_call(step, job, made):
    """The user's film with a watermark."""
    return {"video": "in_1", "operations": [{"op": "watermark", "value": job.c["wish"]["mark"]}]}


def loop_call(step, job, made):
    """The user's film, again and again."""
    return {"video": "in_1", "operations": [{"op": "loop", "count": job.c["wish"]["times"]}]}


def pace_call(step, job, made):
    """The user's film, faster or slower."""
    return {"video": "in_1", "target_duration": job.c["wish"]["seconds"]}


def draft_call(step, job, made):
    """A whole film in one call."""
    length = {"duration": job.c["duration_s"], "n_shots": job.c["shots"]}
    topic = clip_prompt(job.direction, 0) if job.direction else brief_look(job.c)
    return {"topic": topic, **length, **aspect_of(job.c)}


def song_call(step, job, made):
    """Music about the subject."""
    if job.direction:
        return {"prompt": music_prompt(job.direction, job.c["duration_s"])}
    return {"prompt": f"music for {job.c['subject']}"}


def cut_music_call(step, job, made):
    """The song, cut to length with a fade."""
    return {"audio": made["song"][0], "end": job.c["duration_s"], "fade_out": 2}


def summary_call(step, job, made):
    """A summary of the attached text, as short as the service makes it."""
    return {"content": "in_1", "max_words": 20, **language_of(job.c["subject"])}


def sum_caption_call(step, job, made):
    """What can be read of the summary in the film's time, dealt out over it, in captions of a few
    words; each stands as long as it is."""
    text = next(s["reply"]["text"] for s in job.steps if s["key"] == "summary").removesuffix("...")
    seconds = job.c["duration_s"]
    room = seconds * (READ_ZH if HAN.search(text) else READ_EN)
    words = text.split()
    while len(words) > 1 and len(" ".join(words)) > room:
        words.pop()
    n = max(1, min(len(words), round(seconds / CUE_S)))
    parts = [" ".join(words[len(words) * i // n : len(words) * (i + 1) // n]) for i in range(n)]
    total = sum(map(len, parts))
    cues, end = [], 0.0
    for i, part in enumerate(parts):
        start = end
        end = math.floor(100 * seconds * sum(map(len, parts[: i + 1])) / total) / 100
        cues.append({"start": start, "end": end, "text": part})
    return {"video": made["clip"][0], "subtitles": cues}


def list_call(step, job, made):
    """The other steps, as a to-do list."""
    others = [s for s in job.steps if s["tool"] != "tool_task_manager"]
    return {"action": "create", "tasks": [{"id": s["id"], "title": s["goal"]} for s in others]}


def tick_call(step, job, made):
    """The to-do list, ticked off."""
    others = [s for s in job.steps if s["tool"] != "tool_task_manager"]
    return {"action": "update", "tasks": [{"id": s["id"], "status": "done"} for s in others]}


WISHES = {
    "refine": refine_call,
    "exact": exact_call,
    "marked": marked_call,
    "masked": masked_call,
    "combine": combine_call,
    "sized": sized_call,
    "inspire": inspire_call,
    "manner": manner_call,
    "read": read_call,
    "look": look_call,
    "listen": listen_call,
    "pick": pick_call,
    "shorten": shorten_call,
    "clean": clean_call,
    "script": script_call,
    "polish": polish_call,
    "merge": merge_call,
    "animate": animate_call,
    "speak": speak_call,
    "crop": crop_call,
    "watermark": watermark_call,
    "loop": loop_call,
    "pace": pace_call,
    "draft": draft_call,
    "song": song_call,
    "cut_music": cut_music_call,
    "summary": summary_call,
    "sum_caption": sum_caption_call,
    "list": list_call,
    "tick": tick_call,
}
