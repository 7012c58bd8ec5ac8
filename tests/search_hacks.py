"""A search for ways to have LtrReward for less: random edits of honest episodes, replayed.

Each try takes the scripted expert's episode of a task and makes one to three edits to its plan,
calls, thoughts or answer, by a seed: drop, merge or reorder turns, drop a call or a plan step, pass
a film by a step of its finishing, share one prompt, shorten a sound, a caption or a thought, hand
over one id twice, skip looks and recovery. The real simulator plays it; ids are kept: what a later
call names is what the edited call brought. One try of three is played with failures and flaws.

Printed are, for each kind of edit, how many of its episodes stay above 0.9 of R_vrt, how many of
those take less than the expert's (fewer calls, a lower price, less text), and the best of them;
and the cheapest episode of all. A human reads these: none may be an episode that a person would
reject. docs/reward.md says which shortcuts a person accepts.

    python tests/search_hacks.py [tries] [seed] [JSONL]   # by default 3000 tries; finds to a file
"""

import copy
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from env import VisGenEnv  # noqa: E402
from lib.experiment import DataConfig, RewardConfig, RolloutConfig  # noqa: E402
from lib.expert import vision_agent  # noqa: E402
from lib.lineage import looks_into  # noqa: E402
from lib.runs import read_jsonl, seeded_rng  # noqa: E402
from lib.tasks import BENCH, make_tasks  # noqa: E402
from lib.text import tag, to_json  # noqa: E402
from lib.toolbox import category, load_tools, makes  # noqa: E402
from rewards import ltr_reward  # noqa: E402

GOOD = 0.9
# Tasks a search draws from, the share of them that is from the families, and tasks of VisGenBench
# beside them that ask for variety.
N_TASKS, FAMILIES, N_VARIED = 240, 0.3, 30


def environment(risky):
    """The simulator, with failures and flaws where `risky`."""
    return VisGenEnv(RolloutConfig(failure_scale=float(risky), tool_pool="all"))


def episode_of(task, seed, risky):
    """The expert's episode as something to edit: plans and calls by turn, thoughts, answer; None
    where it has no answer. A call has `outs`, the ids that it brought; `alias` says which id
    stands for another."""
    t = vision_agent(task, environment(risky), seed)
    if t["ended"] != "answer":
        return None
    turns = sorted({call["turn"] for call in t["calls"]})
    groups = [[] for _ in turns]
    for call in t["calls"]:
        group = groups[turns.index(call["turn"])]
        outs, failed = call["outputs"], call["status"] != "ok"
        said = {"name": call["name"], "arguments": call["arguments"], "outs": outs}
        group.append(said | {"failed": failed})
    said = [m["content"] for m in t["messages"] if m["role"] == "assistant"]
    thinks = [text.split("<think>")[1].split("</think>")[0] for text in said]
    return {
        "plans": {str(turns.index(p["turn"])): p["plan"] for p in t["plans"]},
        "groups": groups,
        "thinks": thinks[:-1],
        "last": thinks[-1],
        "hand": t["answer"]["deliverables"],
        "summary": t["answer"]["summary"],
        "alias": {},
    }


def renamed(value, names):
    """A value with the ids in it replaced by `names`."""
    if isinstance(value, dict):
        return {key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def replay(task, e, seed, risky):
    """The record of the edited episode, and how long its text is."""
    env = environment(risky)
    env.reset(task, seed)
    names, n_chars = {}, 0

    def now(value):
        while (found := renamed(value, e["alias"])) != value:
            value = found
        return renamed(value, names)

    for i, group in enumerate(e["groups"]):
        text = tag("think", e["thinks"][i % len(e["thinks"])])
        if str(i) in e["plans"]:
            text += tag("plan", e["plans"][str(i)])
        for call in group:
            said = {"name": call["name"], "arguments": now(call["arguments"])}
            text += tag("tool_call", said)
        n_chars += len(text)
        if env.ended:
            break
        replies = env.step(text)[0]
        for call, reply in zip(group, replies):
            ids = json.loads(reply["content"]).get("ids", [])
            names |= dict(zip(call["outs"], ids))
    answer = {"deliverables": now(e["hand"]), "summary": now_words(e["summary"], names)}
    text = tag("think", e["last"]) + tag("answer", answer)
    if not env.ended:
        env.step(text)
    return env.trajectory(), n_chars + len(text)


def now_words(text, names):
    """A text whose ids are those of now."""
    return " ".join(names.get(word.strip(".,:"), word) for word in text.split(" "))


# ---------------------------------------------------------------- what an edit takes hold of
def all_calls(e):
    return [call for group in e["groups"] for call in group]


def some_call(rng, e, fits=lambda call: True):
    """A random call that fits; None where there is none."""
    fitting = [call for call in all_calls(e) if fits(call)]
    return rng.choice(fitting) if fitting else None


def has_prompt(call):
    return "prompt" in call["arguments"] and makes(call["name"]) in ("image", "video")


def remove_call(e, call):
    """Take a call out, and its turn where nothing else is in it."""
    for i, group in enumerate(e["groups"]):
        if any(call is other for other in group):
            group[:] = [other for other in group if other is not call]
            if not group:
                remove_turn(e, i)
            return


def remove_turn(e, i):
    """Take a turn without calls out. Its plan goes to the next turn that has none."""
    plans = {}
    for key, plan in sorted(e["plans"].items(), key=lambda item: int(item[0])):
        at = int(key) - (int(key) > i)
        plans[str(at)] = plan
    e["plans"] = plans
    del e["groups"][i]
    if len(e["thinks"]) > 1:
        del e["thinks"][min(i, len(e["thinks"]) - 1)]


def remove_step(e, fits):
    """Take the first plan step that fits out of each plan; what came after it comes after what it
    came after."""
    for plan in e["plans"].values():
        step = next((s for s in plan if fits(s)), None)
        if step:
            plan.remove(step)
            for s in plan:
                if step["id"] in s["after"]:
                    s["after"] = sorted({*s["after"], *step["after"]} - {step["id"]})


def drop_step_of(e, call):
    remove_step(e, lambda s: s["tool"] == call["name"])


def media_in(call):
    """The first medium that a call takes."""
    for name in ("video", "audio", "image", "videos", "images", "media"):
        if value := call["arguments"].get(name):
            return value[0] if isinstance(value, list) else value
    return None


def pass_by(e, call):
    """What a call would have brought is what it would have taken."""
    source = media_in(call)
    if source:
        e["alias"] |= dict.fromkeys(call["outs"], source)
    remove_call(e, call)


def finishes(call):
    return media_in(call) and call["outs"] and makes(call["name"]) in ("video", "audio")


def insert_after(e, call, name, outs, **arguments):
    """A new turn behind a call's."""
    i = next(n for n, group in enumerate(e["groups"]) if any(call is c for c in group))
    new = {"name": name, "arguments": arguments, "outs": outs, "failed": False}
    e["groups"].insert(i + 1, [new])
    e["thinks"].insert(i + 1, e["thinks"][i % len(e["thinks"])])
    plans = e["plans"].items()
    e["plans"] = {str(int(k) + (int(k) > i)): plan for k, plan in plans}
    for plan in e["plans"].values():
        maker = next((s for s in plan if s["tool"] == call["name"]), None)
        number = max(s["id"] for s in plan) + 1
        after = [maker["id"]] if maker else []
        plan.append({"id": number, "tool": name, "goal": "make it ready", "after": after})


# ---------------------------------------------------------------- edits: (rng, episode) -> None
def drop_call(rng, e):
    remove_call(e, some_call(rng, e))


def drop_call_and_step(rng, e):
    call = some_call(rng, e)
    remove_call(e, call)
    drop_step_of(e, call)


def pass_by_call(rng, e):
    if call := some_call(rng, e, finishes):
        pass_by(e, call)


def pass_by_call_and_step(rng, e):
    if call := some_call(rng, e, finishes):
        pass_by(e, call)
        drop_step_of(e, call)


def drop_looks(rng, e):
    for call in [c for c in all_calls(e) if looks_into(c["name"])]:
        remove_call(e, call)


def drop_looks_and_steps(rng, e):
    drop_looks(rng, e)
    for plan in e["plans"].values():
        for _ in range(len(plan)):
            remove_step({"plans": {"": plan}}, lambda s: looks_into(s["tool"]))


def look_at_less(rng, e):
    if call := some_call(rng, e, lambda c: len(c["arguments"].get("media") or ()) > 1):
        call["arguments"]["media"] = call["arguments"]["media"][:1]


def skip_recovery(rng, e):
    for call in [c for c in all_calls(e) if c["failed"]]:
        remove_call(e, call)


def stop_at_failure(rng, e):
    """What was made again after a failure, or a look, is not: the first success stands for it."""
    made = [c for c in all_calls(e) if has_prompt(c) and c["outs"]]
    for first in made:
        for later in made:
            same = first["name"] == later["name"] and later is not first
            words = first["arguments"]["prompt"]
            if same and later["arguments"]["prompt"].startswith(words[:60]):
                e["alias"] |= dict(zip(later["outs"], first["outs"]))
                remove_call(e, later)
                return


def merge_turns(rng, e):
    if len(e["groups"]) > 1:
        i = rng.randrange(len(e["groups"]) - 1)
        e["groups"][i] += e["groups"][i + 1]
        e["groups"][i + 1] = []
        remove_turn(e, i + 1)


def merge_all_turns(rng, e):
    while len(e["groups"]) > 1:
        merge_turns(rng, e)


def split_turn(rng, e):
    i = rng.randrange(len(e["groups"]))
    if len(e["groups"][i]) > 1 and len(e["plans"]) == 1:
        e["groups"][i : i + 1] = [[call] for call in e["groups"][i]]


def reorder_turns(rng, e):
    if len(e["groups"]) > 1:
        i = rng.randrange(len(e["groups"]) - 1)
        e["groups"][i], e["groups"][i + 1] = e["groups"][i + 1], e["groups"][i]


def swap_prompts(rng, e):
    one, other = some_call(rng, e, has_prompt), some_call(rng, e, has_prompt)
    if one:
        a, b = one["arguments"], other["arguments"]
        a["prompt"], b["prompt"] = b["prompt"], a["prompt"]


def same_prompt(rng, e):
    one, other = some_call(rng, e, has_prompt), some_call(rng, e, has_prompt)
    if one:
        one["arguments"]["prompt"] = other["arguments"]["prompt"]


def one_prompt_for_all(rng, e):
    one = some_call(rng, e, has_prompt)
    for call in filter(has_prompt, all_calls(e) if one else ()):
        call["arguments"]["prompt"] = one["arguments"]["prompt"]


def one_prompt_and_a_word(rng, e):
    one = some_call(rng, e, has_prompt)
    for i, call in enumerate(filter(has_prompt, all_calls(e) if one else ())):
        word = rng.choice(["left", "dusk", f"take {i}", "again", "nice", "x" + "yzabc"[i % 5]])
        call["arguments"]["prompt"] = f"{one['arguments']['prompt']}, {word}"


def bare_prompt(rng, e):
    for call in filter(has_prompt, all_calls(e)):
        call["arguments"]["prompt"] = e["look"]


def bare_prompt_and_a_word(rng, e):
    words = rng.sample(["left", "dusk", "far", "rain", "red", "soft", "tall", "old", "low"], 9)
    for i, call in enumerate(filter(has_prompt, all_calls(e))):
        call["arguments"]["prompt"] = f"{e['look']}, {words[i % 9]}"


def negate_prompt(rng, e):
    if call := some_call(rng, e, has_prompt):
        words = rng.choice(["no {}", "erase {}", "a wall without {}", "{}, cut to black", "not {}"])
        call["arguments"]["prompt"] = words.format(call["arguments"]["prompt"])


def shorten_prompt(rng, e):
    if call := some_call(rng, e, has_prompt):
        words = call["arguments"]["prompt"].split()
        call["arguments"]["prompt"] = " ".join(words[: rng.randint(1, len(words))])


def drop_style(rng, e):
    for call in filter(has_prompt, all_calls(e)) if e["style"] else ():
        told = call["arguments"]["prompt"]
        call["arguments"]["prompt"] = told.replace(e["style"], "").replace(" in  style", "")


def texts_of(call):
    return call["arguments"].get("segments") or call["arguments"].get("subtitles") or ()


def fewer_texts(rng, e):
    if call := some_call(rng, e, texts_of):
        del texts_of(call)[rng.randint(1, len(texts_of(call))) :]


def every_second_text(rng, e):
    if call := some_call(rng, e, lambda c: len(texts_of(c)) > 1):
        del texts_of(call)[1::2]


def one_long_text(rng, e):
    """One caption or passage that stands for all."""
    if call := some_call(rng, e, lambda c: len(texts_of(c)) > 1):
        items = texts_of(call)
        if "end" in items[0]:
            items[0]["end"] = items[-1]["end"]
        del items[1:]


def same_texts(rng, e):
    if call := some_call(rng, e, texts_of):
        for item in texts_of(call):
            item["text"] = texts_of(call)[0]["text"]


def shorten_texts(rng, e):
    if call := some_call(rng, e, texts_of):
        share = rng.random()
        for item in texts_of(call):
            item["text"] = item["text"][: max(1, int(share * len(item["text"])))]


def has_sound(call):
    return "audio" in call["arguments"] and "videos" in call["arguments"]


def quiet(rng, e):
    volume = rng.choice([0, 0.05, 0.1, 0.2, 0.3, 0.4])
    if call := some_call(rng, e, has_sound):
        call["arguments"]["audio_volume"] = volume
    elif call := some_call(rng, e, lambda c: c["name"] == "tool_audio_edit_cut"):
        call["arguments"]["volume"] = volume


def quiet_under_speech(rng, e):
    if call := some_call(rng, e, lambda c: c["name"] == "tool_tts_composite"):
        call["arguments"] |= rng.choice(
            [{"keep_original_audio": False}, {"original_volume": rng.choice([0, 0.1, 0.2, 0.4])}]
        )


def shorten_sound(rng, e):
    if call := some_call(rng, e, lambda c: c["name"] == "tool_sound_fx_gen"):
        call["arguments"]["duration"] = rng.choice([0.5, 1, 2, 3, 5])


def cut_sound(rng, e):
    """A cut of the music, short or in a loop, in its place."""
    music = some_call(rng, e, lambda c: makes(c["name"]) == "audio" and c["outs"])
    user = some_call(rng, e, has_sound)
    if music and user:
        end = rng.choice([1, 2, 4, 6, 8, 9, 10, 12])
        more = rng.choice([{}, {"loop_to": 30}, {"fade_out": end / 2}])
        source = user["arguments"]["audio"]
        insert_after(e, music, "tool_audio_edit_cut", ["cut"], audio=source, end=end, **more)
        user["arguments"]["audio"] = "cut"


def fade_sound(rng, e):
    if call := some_call(rng, e, lambda c: c["name"] == "tool_audio_edit_cut"):
        call["arguments"] |= rng.choice([{"fade_in": 4}, {"fade_out": 10}, {"start": 2}])


OPERATIONS = (
    {"op": "reverse"},
    {"op": "rotate", "angle": 180},
    {"op": "color", "value": "black and white"},
    {"op": "fade_out", "seconds": 3},
    {"op": "resize", "width": 320, "height": 180},
)


def spoil_film(rng, e):
    """One more thing done to the film that is handed over."""
    film = some_call(rng, e, lambda c: set(c["outs"]) & set(e["hand"]) and c["outs"][0][0] == "v")
    if film:
        name, source = rng.choice(film["outs"]), "tool_video_postprocess"
        more = {"operations": [rng.choice(OPERATIONS)]}
        if rng.random() < 0.3:
            source, more = "tool_video_speed_adjust", {"factor": rng.choice([0.5, 1.05, 2])}
        e["hand"] = renamed(e["hand"], {name: "spoilt"})
        insert_after(e, film, source, ["spoilt"], video=name, **more)


def change_number(rng, e):
    names = ("duration", "end", "n", "target_duration", "max_words", "max_chars", "n_shots")
    if call := some_call(rng, e, lambda c: set(names) & set(c["arguments"])):
        name = rng.choice([name for name in names if name in call["arguments"]])
        call["arguments"][name] = rng.choice([1, 2, 3, 4, 5, 6, 8, 10, 12])


def drop_argument(rng, e):
    if call := some_call(rng, e, lambda c: c["arguments"]):
        call["arguments"].pop(rng.choice(list(call["arguments"])), None)


def drop_options(rng, e):
    """No option of any call that says how large, long or what shape."""
    names = rng.sample(["resolution", "aspect_ratio", "size", "mode", "duration", "background"], 3)
    for call in all_calls(e):
        for name in names:
            call["arguments"].pop(name, None)


def silent_clips(rng, e):
    for call in all_calls(e):
        if "generate_audio" in load_tools().get(call["name"], {}).get("blank", {}):
            call["arguments"]["generate_audio"] = False


def cheap_clips(rng, e):
    """The shortest clips, slowed down to their length."""
    calls = [c for c in all_calls(e) if "-to-Video" in category(c["name"]) and has_prompt(c)]
    for call in calls:
        call["arguments"]["duration"] = 4 if "veo" in call["name"] else 5
    join = some_call(rng, e, lambda c: c["name"] == "tool_video_composite")
    if calls and join and e["seconds"]:
        name = "tool_video_speed_adjust"
        outs = [f"slow {join['outs'][0]}"]
        later = all_calls(e)[[c is join for c in all_calls(e)].index(True) + 1 :]
        names = {join["outs"][0]: outs[0]}
        for call in later:
            call["arguments"] = renamed(call["arguments"], names)
        e["hand"] = renamed(e["hand"], names)
        insert_after(e, join, name, outs, video=join["outs"][0], target_duration=e["seconds"])


def halve_a_clip(rng, e):
    """Two shots out of one clip: trims of it in place of another."""
    join = some_call(rng, e, lambda c: len(c["arguments"].get("videos") or ()) > 1)
    if join:
        videos = join["arguments"]["videos"]
        gone = videos[-1]
        maker = some_call(rng, e, lambda c: gone in c["outs"])
        first = some_call(rng, e, lambda c: videos[0] in c["outs"])
        if maker and first and maker is not first:
            name, source = "tool_video_trim_edit", videos[0]
            insert_after(e, first, name, ["half 1"], video=source, start=0, end=3)
            insert_after(e, first, name, ["half 2"], video=source, start=3, end=6)
            videos[0], videos[-1] = "half 1", "half 2"
            remove_call(e, maker)


def other_tool(rng, e):
    """A call by another tool of the same kind, with what arguments that tool knows."""
    call = some_call(rng, e, lambda c: "-to-" in category(c["name"]))
    if call:
        same = [n for n in load_tools() if category(n) == category(call["name"])]
        name = rng.choice(same)
        known = load_tools()[name]["parameters"]["properties"]
        for plan in e["plans"].values():
            for step in plan:
                step["tool"] = name if step["tool"] == call["name"] else step["tool"]
        for c in all_calls(e):
            if c["name"] == call["name"] and c is not call:
                c["arguments"] = {k: v for k, v in c["arguments"].items() if k in known}
                c["name"] = name
        call["arguments"] = {k: v for k, v in call["arguments"].items() if k in known}
        call["name"] = name


# What makes the same without a medium before it.
FROM_WORDS = {
    "tool_image2video_keling": "tool_text2video_veo",
    "tool_image2video_veo3": "tool_text2video_veo",
    "tool_image_edit_gemini": "tool_text2image_gemini",
    "tool_image_edit_qwen": "tool_text2image_qwen",
    "tool_image_edit_gpt": "tool_text2image_gpt",
}


def without_reference(rng, e):
    """Pictures and clips from words alone, not from the reference or the user's picture; what
    then leads to nothing is not made."""
    tools = {}
    for call in all_calls(e):
        if call["name"] in FROM_WORDS:
            tools[call["name"]] = name = FROM_WORDS[call["name"]]
            known = load_tools()[name]["parameters"]["properties"]
            call["name"] = name
            told = call["arguments"].items()
            call["arguments"] = {k: v for k, v in told if k in known and k not in ("images", "n")}
            if name == "tool_text2video_veo":
                call["arguments"]["duration"] = rng.choice([4, 6, 8])
    for plan in e["plans"].values():
        for step in plan:
            step["tool"] = tools.get(step["tool"], step["tool"])
    if tools:
        named = to_json([c["arguments"] for c in all_calls(e)]) + to_json(e["hand"])
        for call in list(all_calls(e)):
            if call["outs"] and not any(f'"{i}"' in named for i in call["outs"]):
                remove_call(e, call)
                drop_step_of(e, call)


def one_call_for_all(rng, e):
    """One call with `n` in place of several of a tool."""
    call = some_call(rng, e, lambda c: has_prompt(c) and c["outs"])
    if not call or "n" not in load_tools()[call["name"]]["parameters"]["properties"]:
        return
    same = [c for c in all_calls(e) if c["name"] == call["name"]]
    first = same[0]
    if len(same) > 1:
        first["outs"] = [i for c in same for i in c["outs"]]
        first["arguments"]["n"] = len(first["outs"])
        for other in same[1:]:
            remove_call(e, other)
        for plan in e["plans"].values():
            steps = [s for s in plan if s["tool"] == call["name"]]
            for step in steps[1:]:
                plan.remove(step)
                for s in plan:
                    s["after"] = sorted(
                        {steps[0]["id"] if a == step["id"] else a for a in s["after"]}
                    )
            if steps:
                word = "clips" if makes(call["name"]) == "video" else "images"
                steps[0]["goal"] = f"{len(first['outs'])} {word} of {e['subject']}"


def reuse_id(rng, e):
    call = some_call(rng, e, lambda c: len(c["arguments"].get("videos") or ()) > 1)
    if call:
        videos = call["arguments"]["videos"]
        videos[rng.randrange(len(videos))] = rng.choice(videos)
    elif e["hand"]:
        e["hand"] = [e["hand"][0]] * len(e["hand"])


def reuse_and_save(rng, e):
    """One clip or picture in the place of another, which is not made."""
    made = [c for c in all_calls(e) if has_prompt(c) and c["outs"]]
    if len(made) > 1:
        one, other = rng.sample(made, 2)
        e["alias"] |= dict.fromkeys(other["outs"], one["outs"][0])
        remove_call(e, other)


def same_frame(rng, e):
    one = some_call(rng, e, lambda c: "image" in c["arguments"])
    for call in all_calls(e) if one else ():
        if "image" in call["arguments"]:
            call["arguments"]["image"] = one["arguments"]["image"]


def same_frame_and_save(rng, e):
    """All clips from one frame; the others are not made, nor planned."""
    one = some_call(rng, e, lambda c: "image" in c["arguments"])
    if not one:
        return
    same_frame(rng, e)
    frame = one["arguments"]["image"]
    for call in [c for c in all_calls(e) if makes(c["name"]) == "image" and has_prompt(c)]:
        named = to_json([c["arguments"] for c in all_calls(e)])
        if frame not in call["outs"] and not any(f'"{i}"' in named for i in call["outs"]):
            remove_call(e, call)
            drop_step_of(e, call)


def drop_step(rng, e):
    plan = rng.choice(list(e["plans"].values()))
    plan.remove(rng.choice(plan))


def drop_edge(rng, e):
    step = rng.choice(rng.choice(list(e["plans"].values())))
    if step["after"]:
        step["after"].remove(rng.choice(step["after"]))


def drop_all_edges(rng, e):
    for plan in e["plans"].values():
        for step in plan:
            step["after"] = []


def shorten_goals(rng, e):
    for plan in e["plans"].values():
        for i, step in enumerate(plan):
            if e["subject"] not in step["goal"]:
                step["goal"] = f"do {i + 1}"


def llm_steps(rng, e):
    """One step of the plan is left to a language model."""
    step = rng.choice(rng.choice(list(e["plans"].values())))
    step["tool"] = "llm"


def drop_revision(rng, e):
    if len(e["plans"]) > 1:
        first = min(e["plans"], key=int)
        e["plans"] = {first: e["plans"][first]}


def short_thoughts(rng, e):
    text = rng.choice([".", "ok", "I go", "a a a a", "1 2 3", "I go on.", "Now the next."])
    e["thinks"] = [text] * len(e["thinks"])


def short_last_thought(rng, e):
    e["last"] = rng.choice([".", "I go on.", "All is done.", "ok ok ok"])


def short_summary(rng, e):
    e["summary"] = rng.choice(["", "Done.", "All is done.", "here you are", "The film, 99 s."])


def hand_over_less(rng, e):
    if e["hand"]:
        e["hand"] = e["hand"][: rng.randint(0, len(e["hand"]) - 1)]


def hand_over_more(rng, e):
    made = [i for call in all_calls(e) for i in call["outs"]]
    e["hand"] = e["hand"] + [rng.choice([*made, "in_1"])]


def fewer_items(rng, e):
    """Fewer sections, media, tasks or references in a list that a call takes."""
    names = ("sections", "tasks", "images", "media", "operations", "urls")
    call = some_call(rng, e, lambda c: any(c["arguments"].get(n) for n in names))
    if call:
        name = next(n for n in names if call["arguments"].get(n))
        items = call["arguments"][name]
        items.remove(rng.choice(items))


def bare_page(rng, e):
    for call in all_calls(e):
        for section in call["arguments"].get("sections", ()):
            section.pop(rng.choice(["text", "heading", "media_ids"]), None)


EDITS = (
    *(drop_call, drop_call_and_step, pass_by_call, pass_by_call_and_step),
    *(drop_looks, drop_looks_and_steps, look_at_less, skip_recovery, stop_at_failure),
    *(merge_turns, merge_all_turns, split_turn, reorder_turns),
    *(swap_prompts, same_prompt, one_prompt_for_all, one_prompt_and_a_word, bare_prompt),
    *(bare_prompt_and_a_word, negate_prompt, shorten_prompt, drop_style),
    *(fewer_texts, every_second_text, one_long_text, same_texts, shorten_texts),
    *(quiet, quiet_under_speech, shorten_sound, cut_sound, fade_sound, spoil_film),
    *(change_number, drop_argument, drop_options, silent_clips, cheap_clips, halve_a_clip),
    *(other_tool, without_reference, one_call_for_all),
    *(reuse_id, reuse_and_save, same_frame, same_frame_and_save),
    *(drop_step, drop_edge, drop_all_edges, shorten_goals, llm_steps, drop_revision),
    *(short_thoughts, short_last_thought, short_summary),
    *(hand_over_less, hand_over_more, fewer_items, bare_page),
)


def honest_episodes(seed):
    """(task, environment's seed, risky, the expert's episode, its record, its text's length)."""
    found = []
    varied = [t for t in read_jsonl(BENCH) if t["constraints"]["variety"]]
    tasks = make_tasks(N_TASKS, "train", DataConfig(families=FAMILIES), seed)
    for i, task in enumerate([*tasks, *seeded_rng("varied", seed).sample(varied, N_VARIED)]):
        risky = i % 3 == 2
        e = episode_of(task, i, risky)
        if e:
            c = task["constraints"]
            e["look"] = c["subject"] + (f", {c['style']}" if c["style"] else "")
            e |= {"subject": c["subject"], "style": c["style"], "seconds": c["duration_s"]}
            found.append((task, i, risky, e, *replay(task, e, i, risky)))
    return found


def search(tries, seed):
    """(edits, expert, edited, honest reward, reward, saved, record) of each changed episode; saved:
    calls, US dollars and characters less than the expert's."""
    rng = seeded_rng("search hacks", seed)
    honest = honest_episodes(seed)
    rewards = {}
    for _ in range(tries):
        at = rng.randrange(len(honest))
        task, env_seed, risky, expert, record, n_chars = honest[at]
        if at not in rewards:
            rewards[at] = ltr_reward(record, RewardConfig())["total"]
        e = copy.deepcopy(expert)
        names = []
        for edit in rng.sample(EDITS, rng.choice([1, 1, 1, 2, 3])):
            before = to_json(e)
            if all(e["plans"].values()) and e["groups"] and all(e["groups"]):
                edit(rng, e)
            if to_json(e) != before:
                names.append(edit.__name__)
        if not names or not e["groups"] or not e["plans"] or not all(e["plans"].values()):
            continue
        edited, n_edited = replay(task, e, env_seed, risky)
        reward = ltr_reward(edited, RewardConfig())["total"]
        saved = (
            len(record["calls"]) - len(edited["calls"]),
            round(record["price_usd"] - edited["price_usd"], 4),
            n_chars - n_edited,
        )
        yield names, expert, e, rewards[at], reward, saved, edited, risky


def main():
    """Print what the search finds."""
    tries = int(sys.argv[1]) if sys.argv[1:] else 3000
    seed = int(sys.argv[2]) if sys.argv[2:] else 0
    out = open(sys.argv[3], "a", encoding="utf-8") if sys.argv[3:] else None
    times, kept, saving, best, cheapest = Counter(), Counter(), Counter(), {}, None
    for names, expert, e, honest, reward, saved, record, risky in search(tries, seed):
        key = "+".join(sorted(names))
        times[key] += 1
        if reward <= GOOD:
            continue
        kept[key] += 1
        saving[key] += max(saved[:2]) > 0 or saved[2] > 20
        task = record["task"]
        find = {
            "key": key,
            "reward": round(reward, 3),
            "honest": round(honest, 3),
            "saved": saved,
            "risky": risky,
            "request": task["request"],
            "asked": {k: v for k, v in task["constraints"].items() if v},
            "changes": difference(expert, e),
        }
        if key not in best or (saved, reward) > (best[key]["saved"], best[key]["reward"]):
            best[key] = find
        if cheapest is None or saved > cheapest["saved"]:
            cheapest = find
        if out:
            out.write(to_json(find) + "\n")
            out.flush()
    print(f"{times.total()} changed episodes, {kept.total()} of them above {GOOD}")
    print("cheapest against its expert:", to_json(cheapest))
    for key, n in kept.most_common():
        if "+" not in key:
            found = best[key]
            print(f"\n{key}: {n} of {times[key]}, {saving[key]} for less; saved {found['saved']}")
            print(f"  {found['reward']} ({found['honest']}) {found['request']}")
            print(f"  {to_json(found['changes']):.600}")


def difference(expert, e):
    """What an edit changed."""
    parts = {}
    for name in e:
        if e[name] != expert[name]:
            parts[name] = e[name]
    if "groups" in parts:
        old, new = all_calls(expert), all_calls(e)
        parts["groups"] = {
            "gone": [call for call in old if call not in new],
            "new": [call for call in new if call not in old],
        }
    return parts


if __name__ == "__main__":
    main()
