"""VisionAgent, scripted (Sec. 3.1, Fig. 4): expert work on one request, as VisGenData shows it.

TaskAgent reads the request and routes it (lib/reading.py); MetaAgent thinks, plans, calls and
verifies. lib/llm_agent.py is the same by an LLM. How it words what it thinks: data/voice.yaml.
"""

import json
import math
import re
from collections import Counter
from functools import lru_cache

import yaml

from env import VisGenEnv
from lib.behaviours import speech_seconds
from lib.families import asked_kind
from lib.reading import facts_of, read_request
from lib.runs import ROOT, seeded_rng
from lib.scenarios import HAN
from lib.text import tag
from lib.toolbox import clip_lengths, load_defaults, load_tools, makes
from lib.workflows import clip_seconds, expand_workflow, fitting_workflows, n_shots

METACOGNITION = ("plan check", "recovery", "verification")


def vision_agent(
    task: dict, env: VisGenEnv, seed: int, mind: tuple[str, ...] = METACOGNITION
) -> dict:
    """Run the scripted VisionAgent on one task in VisGenEnv and return its trajectory (Sec. 3.1).

    All steps whose inputs are there are called in one turn. Metacognition is what `mind` holds (the
    paper names none of it in detail; ours):
    plan check: the clips' lengths are added up and held against the request, so that a step trims
        them or speeds them up, and no more jobs are begun in one turn than the service documents;
    recovery: errors are met by class (see `recover`); without it every failed call is repeated
        once; a step that still fails ends the work;
    verification: what came back is counted, a step that brought less than it should is carried on,
        and the answer says so where seconds, shape or number are not what was asked; without it any
        result will do.
    """
    rng, voice = seeded_rng(seed, "agent", task["id"]), load_voice()
    messages, _ = env.reset(task, seed)
    c = read_request(messages[-1]["content"])
    attached = attached_media(messages[-1]["content"])
    steps = make_plan(c, mind)
    plan = shown_plan(steps)
    replies = {}  # media id -> the reply that brought it
    think = rng.choice(voice["start"]).format(facts=facts_of(c), route=route_of(c, steps))
    ready = ready_steps(steps, mind)
    while ready:
        calls = [
            {
                "name": step["tool"],
                "arguments": call_arguments(step, c, steps, voice, rng, attached),
            }
            for step in ready
        ]
        blocks = [tag("think", think)]
        if plan:
            blocks.append(tag("plan", plan))
        blocks += [tag("tool_call", call) for call in calls]
        messages, _, terminated, truncated, _ = env.step("\n".join(blocks))
        if terminated or truncated:
            return env.trajectory()

        plan, trouble, given_up = None, None, False
        for step, message in zip(ready, messages):
            reply = json.loads(message["content"])
            step["tries"] += 1
            if "error" not in reply:
                take_in(step, reply, mind)
                replies |= dict.fromkeys(step["ids"], reply)
                continue
            move = recover(step, reply["error"], mind)
            trouble = (reply["error"]["code"], move)
            if move == "switch":
                plan = shown_plan(steps)
            given_up = given_up or move == "give up"
        think = reflect(ready, steps, trouble, voice, rng)
        ready = [] if given_up else ready_steps(steps, mind)
    env.step(final_turn(c, steps, replies, mind, voice, rng))
    return env.trajectory()


@lru_cache(maxsize=1)
def load_voice() -> dict:
    """data/voice.yaml: how the scripted MetaAgent words its thinking."""
    return yaml.safe_load((ROOT / "data" / "voice.yaml").read_text(encoding="utf-8"))


# The keys of steps that make all pictures, or clips, of a request in one call.
SEVERAL = ("image", "large", "cutout", "restyle", "clip", "masked", "manner")
# Characters that the expert shows in a second of captions. Ours.
READ_EN, READ_ZH = 18, 9
# How many references the expert looks for. Ours.
REFERENCES = 3


def make_plan(c, mind):
    """The steps of the workflow that fits the request best, each with the state of its work:
    `expect` (results still to come), `tries` (calls of its tool), `reworded` (how often its prompt
    was said anew), `ids` (what came), `done`."""
    workflow = fitting_workflows(c)[0]
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
        step |= {"expect": expect, "tries": 0, "reworded": 0}
        step |= {"ids": [], "done": False, "reply": {}}
    return steps


def lengths_of_clips(steps):
    """The seconds that the plan's first video generator offers; None where it has none."""
    return next((clip_lengths(step["tool"]) for step in steps if step["key"] == "clip"), None)


def shown_plan(steps):
    """The plan as UTPC's <plan> block shows it."""
    return [{k: step[k] for k in ("id", "tool", "goal", "after")} for step in steps]


def route_of(c, steps):
    """MetaAgent's reasoning about clip lengths: '2 x 8 = 16 s, trim to 15.'"""
    lengths = lengths_of_clips(steps)
    if not lengths:
        return "One call." if len(steps) == 1 else f"{len(steps)} steps."
    seconds = clip_seconds(c, lengths)
    alike = f"{len(seconds)} x {seconds[0]}"
    total = alike if len(set(seconds)) == 1 else " + ".join(map(str, seconds))
    keys = {step["key"] for step in steps}
    change = f", trim to {c['duration_s']}" if "trim" in keys else ""
    if "cut" in keys:
        to_length = f", {c['duration_s']} s in all" if c["duration_s"] else ""
        change = f", trim each clip{' to the beat' if c['beat'] else ''}{to_length}"
    return f"{total} = {sum(seconds)} s{change}."


def open_steps(steps):
    """The steps that are not done, and whose inputs are there."""
    done = {step["id"] for step in steps if step["done"]}
    return [step for step in steps if not step["done"] and done.issuperset(step["after"])]


def ready_steps(steps, mind):
    """The steps to call in the next turn; with the plan check no more of a tool than its service
    runs side by side."""
    if "plan check" not in mind:
        return open_steps(steps)
    ready, begun = [], Counter()
    for step in open_steps(steps):
        if begun[step["tool"]] < jobs_at_once(step["tool"]):
            ready.append(step)
        begun[step["tool"]] += 1
    return ready


def jobs_at_once(tool: str) -> float:
    """How many calls of a tool its service documents to run side by side; infinite where tools.yaml
    has no such limit."""
    limits = load_tools()[tool].get("limits", [])
    return min((limit["jobs"] for limit in limits if "jobs" in limit), default=math.inf)


def take_in(step, reply, mind):
    """Note what a call brought. A partial result leaves the rest of the step open, where it is
    verified. Of several songs the first is used."""
    ids = reply.get("ids", [])
    step["ids"] += ids[:1] if step["key"] in ("music", "song") else ids
    step["expect"] -= len(ids)
    step["reply"] = reply
    answered = makes(step["tool"]) == "nothing"
    step["done"] = step["expect"] <= 0 or answered or "verification" not in mind


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
    if blocked and step["reworded"] < len(load_voice()["rewordings"]):
        step["reworded"] += 1
        return "reword"
    return "give up"


def reflect(called, steps, trouble, voice, rng):
    """MetaAgent's thinking on the replies to the steps called: what went wrong, as (code, move), or
    what came back and what is next."""
    if trouble:
        code, move = trouble
        return rng.choice(voice["error"]).format(error=code, move=voice["moves"][move])
    made = ", ".join(i for step in called for i in step["ids"]) or "nothing"
    goals = dict.fromkeys(step["goal"].split(" of ")[0] for step in open_steps(steps))
    return rng.choice(voice["next"]).format(made=made, next=", ".join(goals))


def final_turn(c, steps, replies, mind, voice, rng):
    """The last turn: hand over what was made, and say so where it is not all, or not as asked."""
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
    if "verification" in mind:
        whole = whole and all(as_asked(replies[i], c) for i in ids)
    slots = {"made": ", ".join(ids) or "nothing", "facts": facts_of(c)}
    think = rng.choice(voice["done" if whole else "short"]).format(**slots)
    summary = rng.choice(voice["summary" if whole else "part"]).format(**slots)
    pages = [i for step in steps if step["key"] == "page" for i in step["ids"]]
    answer = {"deliverables": ids + pages, "summary": summary}
    return "\n".join([tag("think", think), tag("answer", answer)])


def as_asked(reply, c):
    """Whether a tool's reply on a picture or film has the seconds and the shape that the request
    asks for, the shape within 5 % and a tenth of a second; what it does not say passes."""
    width, height = map(int, reply.get("size", "1x1").split("x"))
    across, down = map(int, (c["aspect_ratio"] or f"{width}:{height}").split(":"))
    if abs(width * down / (height * across) - 1) > 0.05:
        return False
    seconds = c["duration_s"] and reply.get("duration_s")
    return not seconds or abs(seconds - c["duration_s"]) <= 0.1


# ---------------------------------------------------------------------------- arguments of a call
GPT_SIZES = {"1:1": "1024x1024", "3:2": "1536x1024", "2:3": "1024x1536", None: "1024x1024"}


def call_arguments(
    step: dict, c: dict, steps: list[dict], voice: dict, rng, attached: dict[str, dict]
) -> dict:
    """The arguments of a plan step's call, by its key in data/workflows.yaml. Optional ones are
    written only where the request asks for something. `attached`: see attached_media."""
    made = {}  # step key -> ids that came back
    for other in steps:
        if other["ids"]:
            made.setdefault(other["key"], []).extend(other["ids"])
    if step["key"] in WISHES:
        arguments = WISHES[step["key"]](step, c, steps, made, attached)
    else:
        arguments = usual_arguments(step, c, steps, made, voice, rng)
    change = c["wish"].get("change")
    if change and step["key"] in ("frame", "clip") and 2 * step["index"] >= n_shots(c):
        arguments["prompt"] += f", {change}"
    if step["reworded"]:
        words = voice["rewordings_zh" if HAN.search(arguments["prompt"]) else "rewordings"]
        arguments["prompt"] += f", {words[step['reworded'] - 1]}"
    return arguments


def usual_arguments(step, c, steps, made, voice, rng):
    """The arguments of a step of the 15 workflows. `made`: {step key: ids that came back}."""
    key = step["key"]
    if key in ("image", "large", "ref", "frame", "cutout"):
        if step["tool"].startswith("tool_text2image"):
            return picture_arguments(step, c, voice)
    if key in ("edit", "frame", "restyle"):
        return edit_arguments(step, c, made, voice)
    fed = [i for after in step["after"] for i in steps[after - 1]["ids"]]
    if key == "clip":
        return clip_arguments(step, c, fed, voice)
    if key == "cut":
        return cut_arguments(step, c, steps, fed)
    if key == "board":
        return {"script": c["subject"], "n_shots": c["images"]}
    if key == "page":
        media = made["image"] + made.get("edit", [])
        section = {"heading": c["subject"], "media_ids": media}
        read = next((s["reply"]["text"] for s in steps if s["key"] == "read"), None)
        if read:
            section["text"] = read
        return {"title": c["subject"], "sections": [section]}
    if key == "music":
        return {"prompt": rng.choice(voice["music"])}
    if key == "sfx":
        seconds = min(30, c["duration_s"] or n_shots(c) * 5)
        return {"prompt": rng.choice(voice["sfx"]), "duration": seconds}
    if key == "beat":
        return {"audio": made["music"][0]}
    if key == "join":
        sound = made.get("music") or made.get("sfx")
        videos = made.get("cut") or made["clip"]
        return {"videos": videos, **({"audio": sound[0]} if sound else {})}
    return film_arguments(key, c, steps, voice, rng)


def film_arguments(key, c, steps, voice, rng):
    """What is done to the film as the latest step left it: trimmed, spoken over, subtitled."""
    finishing = ("caption", "voice", "trim", "join", "clip")  # the latest first
    latest = min(
        (s for s in steps if s["ids"] and s["key"] in finishing),
        key=lambda s: finishing.index(s["key"]),
    )
    film = latest["ids"][0]
    if key == "trim":
        return {"video": film, "start": 0, "end": c["duration_s"]}
    seconds = latest["reply"]["duration_s"]
    chinese = bool(HAN.search(c["subject"]))
    language = {"language": "zh"} if chinese else {}
    lines = film_lines(c, voice["lines_zh" if chinese else "lines"], rng)
    if key == "voice":
        return {"video": film, "segments": narration(lines, seconds, chinese), **language}
    return {"video": film, "subtitles": captions(lines, seconds, chinese), **language}


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
    speech = load_tools()["tool_tts_composite"]["output"]
    said = {"language": "zh" if chinese else "en", "speed": 1.0}
    n = max(1, round(seconds / SEGMENT_S))
    segments = []
    line = next(lines)
    for i in range(n):
        start, room = i * seconds / n, seconds / n - 0.1
        text = ""
        while speech_seconds(speech, said, join_lines(text, line, chinese)) <= room:
            text, line = join_lines(text, line, chinese), next(lines)
        if text:
            segments.append({"start": round(start, 1), "text": text})
    return segments or [{"start": 0, "text": line}]


def join_lines(text, line, chinese):
    """Two sentences one behind the other."""
    return text + ("" if chinese or not text else " ") + line


def captions(lines, seconds, chinese):
    """Cues {start, end, text} that cover the film, each short enough to be read in its time."""
    n = max(1, math.ceil(seconds / CUE_S))
    cues = []
    for i in range(n):
        start, end = (math.floor(10 * seconds * k / n) / 10 for k in (i, i + 1))
        cues.append({"start": start, "end": end, "text": next(lines)})
    return cues


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
    marks = [round(t * fps) for t in cut_points(c, seconds, beat)]
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


def picture_arguments(step, c, voice):
    """A call that makes pictures from text: subject, style and, of a single picture, the view."""
    prompt = look_of(c)
    if step["expect"] == 1:
        prompt += f", {view_of(step, c, voice)}"
    arguments = {"prompt": prompt}
    if step["tool"] == "tool_text2image_gpt":
        arguments["size"] = GPT_SIZES[c["aspect_ratio"]]
        return arguments | number_of(step) | {"background": "transparent"}
    if step["tool"] == "tool_text2image_seed" and c["resolution"] == "2K":
        arguments["size"] = "2K"
    return arguments | aspect_of(c) | number_of(step)


def edit_arguments(step, c, made, voice):
    """A call that makes pictures from one that is there: another view of it, or its style anew."""
    source = made.get("image") or made.get("ref") or ["in_1"]
    prompt = look_of(c)
    aspect = aspect_of(c) if step["key"] == "restyle" else {}
    if aspect and step["tool"] == "tool_image_edit_qwen":
        aspect = {"size": size_of(c["aspect_ratio"])}
    if step["expect"] == 1:
        prompt += f", {view_of(step, c, voice)}"
    return {"images": source[:1], "prompt": prompt, **aspect, **number_of(step)}


def size_of(ratio: str) -> str:
    """Sides of about a megapixel in that ratio, as Qwen's edit takes them.

    >>> size_of("16:9")
    '1360*768'
    """
    width, height = map(int, ratio.split(":"))
    sides = [math.sqrt(2**20 * a / b) for a, b in ((width, height), (height, width))]
    return "*".join(str(round(side / 16) * 16) for side in sides)


def clip_arguments(step, c, fed, voice):
    """A call that makes a clip, from text or from a frame. `fed`: ids from the steps before it."""
    clips = clip_seconds(c, clip_lengths(step["tool"]))
    seconds = clips[min(step["index"], len(clips) - 1)]
    prompt = look_of(c)
    if step["expect"] == 1:
        prompt += f", {view_of(step, c, voice)}"
    if step["tool"] == "tool_image2video_keling":
        prompt += f", {nth(voice['motions'], step['index'])}"
        mode = {"mode": "pro"} if c["resolution"] == "1080p" else {}
        return {"image": fed[0], "prompt": prompt, "duration": seconds, **mode}
    resolution = {"resolution": "1080p"} if c["resolution"] else {}
    arguments = {"prompt": prompt, "duration": seconds, **aspect_of(c), **resolution}
    if load_defaults()["blocked_words"]["child"].search(prompt):
        # Veo blocks children unless it is told that they may be shown.
        arguments["person_generation"] = "allow_all"
    return arguments | number_of(step)


def view_of(step, c, voice):
    """The view of a step's picture or clip, in the request's language; each has its own."""
    views = voice["views_zh" if HAN.search(c["subject"]) else "views"]
    if step["key"] == "ref":
        return views[-1]
    # The first picture and those edited from it are counted together.
    first = 1 if step["key"] == "edit" else 0
    return nth(views, step["index"] + first)


# ---------------------------------------------------------------------------- the families' calls
# Those of data/families.yaml, by a step's key. Each takes (the step, the constraints, all steps,
# {step key: ids that came back}, what is attached).
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


def pictured(step, c):
    """What one of several pictures shows."""
    return f"{look_of(c)}, {view_of(step, c, load_voice())}"


def refine_call(step, c, steps, made, attached):
    """A prompt to be refined."""
    style = {"style": c["style"]} if c["style"] else {}
    limit = {"max_chars": c["wish"]["max_chars"]}
    return {
        "prompt": c["subject"],
        "target": "image",
        **style,
        **limit,
        **language_of(c["subject"]),
    }


def exact_call(step, c, steps, made, attached):
    """A picture of an exact size; the services write sizes differently."""
    size = c["wish"]["exact_size"]
    if step["tool"] == "tool_text2image_qwen":
        return {"prompt": pictured(step, c), "size": size.replace("x", "*")}
    return {"prompt": pictured(step, c), "size": size, "watermark": False}


def marked_call(step, c, steps, made, attached):
    """A picture with the service's visible mark."""
    size = c["wish"]["exact_size"].replace("x", ":")
    return {"prompt": pictured(step, c), "resolution": size, "logo_add": True}


def gpt_size(c):
    """The argument of gpt-image-1 for a shape that the request asks for."""
    return {"size": GPT_SIZES[c["aspect_ratio"]]} if c["aspect_ratio"] else {}


def masked_call(step, c, steps, made, attached):
    """An edit of the masked part."""
    arguments = {"images": ["in_1"], "mask": "in_2", "prompt": look_of(c)}
    return arguments | gpt_size(c) | number_of(step)


def combine_call(step, c, steps, made, attached):
    """One picture from all references."""
    arguments = {"images": list(attached), "prompt": look_of(c)}
    if step["tool"] == "tool_image_edit_gpt":
        return arguments | gpt_size(c)
    return arguments | aspect_of(c)


def sized_call(step, c, steps, made, attached):
    """An edit in another size."""
    size = c["wish"]["exact_size"].replace("x", "*")
    return {"images": ["in_1"], "prompt": look_of(c), "size": size}


def inspire_call(step, c, steps, made, attached):
    """A search for references."""
    return {"query": look_of(c)[:400], "n": step["expect"]}


def manner_call(step, c, steps, made, attached):
    """Pictures after the references found."""
    arguments = {"images": made["inspire"][:3], "prompt": look_of(c)}
    return arguments | (aspect_of(c) or {"aspect_ratio": "1:1"}) | number_of(step)


def read_call(step, c, steps, made, attached):
    """What stands at the address."""
    return {"urls": [c["wish"]["url"]]}


def look_call(step, c, steps, made, attached):
    """All takes, looked at in one call."""
    return {"media": list(attached), "question": "Which of these has a flaw?"}


def listen_call(step, c, steps, made, attached):
    """One take, listened to."""
    return {"media": [list(attached)[step["index"]]], "question": "Does it have a flaw?"}


def the_good_one(steps, attached):
    """The id of the take in which no analysis found a flaw; the first where none was looked at."""
    answers = " ".join(s["reply"]["answer"] for s in steps if s["key"] in ("look", "listen"))
    flawed = {text.split(":")[0] for text in answers.split(". ") if "flaw" in text}
    return next((i for i in attached if i not in flawed), next(iter(attached)))


def pick_call(step, c, steps, made, attached):
    """An edit of the picture without a flaw."""
    good = the_good_one(steps, attached)
    shape = aspect_of(c)
    if shape and step["tool"] == "tool_image_edit_qwen":
        across, down = map(int, c["aspect_ratio"].split(":"))
        scale = math.sqrt(1024 * 1024 / (across * down))
        shape = {"size": f"{round(across * scale)}*{round(down * scale)}"}
    return {"images": [good], "prompt": look_of(c), **shape}


def shorten_call(step, c, steps, made, attached):
    """The film without a flaw, cut to length."""
    return {"video": the_good_one(steps, attached), "start": 0, "end": c["duration_s"]}


def clean_call(step, c, steps, made, attached):
    """The recording without a flaw, cut to length."""
    return {"audio": the_good_one(steps, attached), "end": c["duration_s"]}


def script_call(step, c, steps, made, attached):
    """A script of the asked length."""
    return {"topic": c["subject"], "duration": c["duration_s"], **language_of(c["subject"])}


def polish_call(step, c, steps, made, attached):
    """The user's board, reworded."""
    return {"storyboard": "in_1", "instructions": f"{c['subject']}: {c['wish']['mood']}"}


def merge_call(step, c, steps, made, attached):
    """The user's script, put into the user's board."""
    mood = f"{c['subject']}: {c['wish']['mood']}"
    return {"script": "in_1", "storyboard": "in_2", "instructions": mood}


def animate_call(step, c, steps, made, attached):
    """The user's picture, moving and sounding."""
    resolution = {"resolution": c["resolution"]} if c["resolution"] else {}
    arguments = {"image": "in_1", "prompt": f"{c['subject']}, gentle movement"}
    return arguments | {"duration": c["duration_s"], **aspect_of(c), **resolution}


def speak_call(step, c, steps, made, attached):
    """A speech about the subject."""
    subject = c["subject"]
    text = f"请看{subject}。" if HAN.search(subject) else f"Let me tell you about {subject}."
    return {"text": text, "voice": c["wish"]["voice"], **language_of(subject)}


def crop_call(step, c, steps, made, attached):
    """The largest crop of the asked shape out of the middle of the user's film."""
    width, height = attached["in_1"]["width"], attached["in_1"]["height"]
    across, down = map(int, c["aspect_ratio"].split(":"))
    scale = min(width / across, height / down)
    w, h = (int(side * scale) // 2 * 2 for side in (across, down))
    crop = {"op": "crop", "width": w, "height": h, "x": (width - w) // 2, "y": (height - h) // 2}
    return {"video": "in_1", "operations": [crop]}


def watermark_call(step, c, steps, made, attached):
    """The user's film with a watermark."""
    return {"video": "in_1", "operations": [{"op": "watermark", "value": c["wish"]["mark"]}]}


def loop_call(step, c, steps, made, attached):
    """The user's film, again and again."""
    return {"video": "in_1", "operations": [{"op": "loop", "count": c["wish"]["times"]}]}


def pace_call(step, c, steps, made, attached):
    """The user's film, faster or slower."""
    return {"video": "in_1", "target_duration": c["wish"]["seconds"]}


def draft_call(step, c, steps, made, attached):
    """A whole film in one call."""
    length = {"duration": c["duration_s"], "n_shots": c["shots"]}
    return {"topic": look_of(c), **length, **aspect_of(c)}


def song_call(step, c, steps, made, attached):
    """Music about the subject."""
    return {"prompt": f"music for {c['subject']}"}


def cut_music_call(step, c, steps, made, attached):
    """The song, cut to length with a fade."""
    return {"audio": made["song"][0], "end": c["duration_s"], "fade_out": 2}


def summary_call(step, c, steps, made, attached):
    """A summary of the attached text, as short as the service makes it."""
    return {"content": "in_1", "max_words": 20, **language_of(c["subject"])}


def sum_caption_call(step, c, steps, made, attached):
    """What can be read of the summary in the film's time, dealt out over it, in captions of a few
    words; each stands as long as it is."""
    text = next(s["reply"]["text"] for s in steps if s["key"] == "summary").removesuffix("...")
    seconds = c["duration_s"]
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


def list_call(step, c, steps, made, attached):
    """The other steps, as a to-do list."""
    others = [s for s in steps if s["tool"] != "tool_task_manager"]
    return {"action": "create", "tasks": [{"id": s["id"], "title": s["goal"]} for s in others]}


def tick_call(step, c, steps, made, attached):
    """The to-do list, ticked off."""
    others = [s for s in steps if s["tool"] != "tool_task_manager"]
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


def look_of(c):
    """The subject in its style."""
    return f"{c['subject']}, {c['style']}" if c["style"] else c["subject"]


def aspect_of(c):
    """The argument for a shape that the request asks for."""
    return {"aspect_ratio": c["aspect_ratio"]} if c["aspect_ratio"] else {}


def number_of(step):
    """The argument for several results of one call."""
    return {"n": step["expect"]} if step["expect"] > 1 else {}


def nth(items, i):
    """Item i of a list that begins anew at its end."""
    return items[i % len(items)]
