"""A search for ways to have LtrReward for less: random edits of honest episodes, replayed.

Each try takes the scripted expert's episode of a task and makes one to three edits to its plan,
calls, thoughts or answer, by a seed: drop a call, merge or split turns, swap or negate prompts,
shorten a sound, hand over the same id, drop plan steps, shorten thoughts. The real simulator plays
it. Printed are the cheapest episode (fewest calls, then least price) above 0.9 of R_vrt, and each
kind of edit that stays above 0.9 with how often. A human reads these: none may be an episode that a
person would reject. What the edits of BREAKS leave out is asked for, so none of them may stay.

    python tests/search_hacks.py [tries] [seed]        # by default 3000 tries
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
from lib.runs import seeded_rng  # noqa: E402
from lib.tasks import make_tasks  # noqa: E402
from lib.text import tag, to_json  # noqa: E402
from lib.toolbox import makes  # noqa: E402
from rewards import ltr_reward  # noqa: E402

GOOD = 0.9


def episode_of(task):
    """The expert's episode as something to edit: plan, calls by turn, thought, deliverables."""
    env = VisGenEnv(RolloutConfig(failure_scale=0.0, tool_pool="all"))
    t = vision_agent(task, env, 3)
    groups = {}
    for call in t["calls"]:
        chosen = {"name": call["name"], "arguments": call["arguments"]}
        groups.setdefault(call["turn"], []).append(chosen)
    return {
        "plan": t["plan"],
        "groups": list(groups.values()),
        "think": "I look at what came back and go on with the plan.",
        "hand": t["answer"]["deliverables"],
    }


def replay(task, e):
    """The record of the edited episode."""
    env = VisGenEnv(RolloutConfig(failure_scale=0.0, tool_pool="all"))
    env.reset(task, 3)
    for i, group in enumerate(e["groups"]):
        text = tag("think", e["think"]) + ("" if i else tag("plan", e["plan"]))
        if not env.ended:
            env.step(text + "".join(tag("tool_call", call) for call in group))
    if not env.ended:
        answer = {"deliverables": e["hand"], "summary": "All of it is done."}
        env.step(tag("think", e["think"]) + tag("answer", answer))
    return env.trajectory()


# ---------------------------------------------------------------- edits: (rng, episode) -> None
def some_call(rng, e, fits=lambda call: True):
    """A random call that fits; None where there is none."""
    fitting = [call for group in e["groups"] for call in group if fits(call)]
    return rng.choice(fitting) if fitting else None


def has_prompt(call):
    return "prompt" in call["arguments"] and makes(call["name"]) in ("image", "video")


def drop_call(rng, e):
    group = rng.choice(e["groups"])
    group.remove(rng.choice(group))
    e["groups"] = [group for group in e["groups"] if group]


def drop_call_and_step(rng, e):
    call = some_call(rng, e)
    for group in e["groups"]:
        if call in group:
            group.remove(call)
            break
    e["groups"] = [group for group in e["groups"] if group]
    step = next((s for s in e["plan"] if s["tool"] == call["name"]), None)
    if step:
        e["plan"].remove(step)
        for s in e["plan"]:
            s["after"] = [a for a in s["after"] if a != step["id"]]


def merge_turns(rng, e):
    if len(e["groups"]) > 1:
        i = rng.randrange(len(e["groups"]) - 1)
        e["groups"][i] += e["groups"].pop(i + 1)


def split_turn(rng, e):
    i = rng.randrange(len(e["groups"]))
    e["groups"][i : i + 1] = [[call] for call in e["groups"][i]]


def same_prompt(rng, e):
    one, other = some_call(rng, e, has_prompt), some_call(rng, e, has_prompt)
    if one:
        one["arguments"]["prompt"] = other["arguments"]["prompt"]


def one_prompt_for_all(rng, e):
    one = some_call(rng, e, has_prompt)
    for group in e["groups"] if one else ():
        for call in group:
            if has_prompt(call):
                call["arguments"]["prompt"] = one["arguments"]["prompt"]


def negate_prompt(rng, e):
    if call := some_call(rng, e, has_prompt):
        words = rng.choice(["no {}", "erase {}", "a wall without {}", "{}, cut to black", "not {}"])
        call["arguments"]["prompt"] = words.format(call["arguments"]["prompt"])


def shorten_prompt(rng, e):
    if call := some_call(rng, e, has_prompt):
        words = call["arguments"]["prompt"].split()
        call["arguments"]["prompt"] = " ".join(words[: rng.randint(1, len(words))])


def shorten_text(rng, e):
    call = some_call(rng, e, lambda c: {"segments", "subtitles"} & set(c["arguments"]))
    if call:
        name = "segments" if "segments" in call["arguments"] else "subtitles"
        items = call["arguments"][name]
        call["arguments"][name] = items[: rng.randint(1, len(items))]
        item = rng.choice(call["arguments"][name])
        item["text"] = item["text"][: rng.randint(1, len(item["text"]))]


def shorten_sound(rng, e):
    if call := some_call(rng, e, lambda c: c["name"] == "tool_sound_fx_gen"):
        call["arguments"]["duration"] = rng.choice([0.5, 1, 2, 3])
    elif call := some_call(
        rng, e, lambda c: "audio" in c["arguments"] and "videos" in c["arguments"]
    ):
        call["arguments"]["audio_volume"] = rng.choice([0, 0.05, 0.1, 0.2, 0.3])


def change_number(rng, e):
    names = ("duration", "end", "n")
    if call := some_call(rng, e, lambda c: set(names) & set(c["arguments"])):
        name = next(name for name in names if name in call["arguments"])
        call["arguments"][name] = rng.choice([1, 2, 4, 5, 6, 8, 10])


def drop_argument(rng, e):
    if call := some_call(rng, e):
        call["arguments"].pop(rng.choice(list(call["arguments"])), None)


def reuse_id(rng, e):
    call = some_call(rng, e, lambda c: len(c["arguments"].get("videos") or ()) > 1)
    if call:
        videos = call["arguments"]["videos"]
        videos[rng.randrange(len(videos))] = rng.choice(videos)
    else:
        e["hand"] = [e["hand"][0]] * len(e["hand"])


def same_frame(rng, e):
    one = some_call(rng, e, lambda c: "image" in c["arguments"])
    if one:
        for group in e["groups"]:
            for call in group:
                if "image" in call["arguments"]:
                    call["arguments"]["image"] = one["arguments"]["image"]


def drop_step(rng, e):
    step = rng.choice(e["plan"])
    e["plan"].remove(step)


def drop_edge(rng, e):
    step = rng.choice(e["plan"])
    if step["after"]:
        step["after"].remove(rng.choice(step["after"]))


def short_thought(rng, e):
    e["think"] = rng.choice([".", "ok", "I go", "a a a a", "1 2 3", "I go on."])


def hand_over_less(rng, e):
    e["hand"] = e["hand"][: rng.randint(0, len(e["hand"]) - 1)]


def hand_over_more(rng, e):
    e["hand"] = e["hand"] + [rng.choice(["img_1", "vid_1", "aud_1", "in_1"])]


# Edits that leave a result as a person wants it, or nearly: only what they save is of interest.
HARMLESS = (split_turn, drop_edge, shorten_prompt, change_number, same_prompt, drop_argument)
BREAKS = (
    drop_call,
    drop_call_and_step,
    merge_turns,
    one_prompt_for_all,
    negate_prompt,
    shorten_text,
    shorten_sound,
    reuse_id,
    same_frame,
    drop_step,
    short_thought,
    hand_over_less,
    hand_over_more,
)


def search(tries, seed):
    """(record, edits, changed, reward) of each try above GOOD whose episode was changed."""
    rng = seeded_rng("search hacks", seed)
    tasks = make_tasks(126, "train", DataConfig(families=0), seed)
    honest = [(task, episode_of(task)) for task in tasks]
    for _ in range(tries):
        task, expert = rng.choice(honest)
        e = copy.deepcopy(expert)
        edits = rng.sample(BREAKS + HARMLESS, rng.choice([1, 1, 2, 3]))
        names = []
        for edit in edits:
            before = to_json(e)
            if e["plan"] and e["groups"] and e["hand"] and all(e["groups"]):
                edit(rng, e)
            if to_json(e) != before:
                names.append(edit.__name__)
        if names:
            record = replay(task, e)
            total = ltr_reward(record, RewardConfig())["total"]
            yield record, names, e, expert, total


def main():
    """Print what the search finds."""
    tries = int(sys.argv[1]) if sys.argv[1:] else 3000
    seed = int(sys.argv[2]) if sys.argv[2:] else 0
    times, kept, shown, cheapest = Counter(), Counter(), {}, None
    for record, names, e, expert, total in search(tries, seed):
        key = "+".join(sorted(names))
        times[key] += 1
        if total <= GOOD:
            continue
        kept[key] += 1
        shown.setdefault(key, (total, record["task"]["request"], difference(expert, e)))
        saved = len(record["calls"]) - sum(map(len, expert["groups"])), record["price_usd"]
        if cheapest is None or saved < cheapest[0]:
            cheapest = (saved, key, total, record["task"]["request"])
    print(f"{times.total()} changed episodes, {kept.total()} of them above {GOOD}")
    print("cheapest against its expert (calls, price):", cheapest)
    for key, n in kept.most_common(40):
        total, request, changes = shown[key]
        print(f"\n{key}: {n} of {times[key]}\n  {total:.3f} {request}\n  {changes:.600}")


def difference(expert, e):
    """What an edit changed, as JSON."""
    parts = {}
    for name in e:
        if e[name] != expert[name]:
            parts[name] = e[name]
    if "groups" in parts:
        old = [call for group in expert["groups"] for call in group]
        new = [call for group in e["groups"] for call in group]
        parts["groups"] = {
            "gone": [call for call in old if call not in new],
            "new": [call for call in new if call not in old],
        }
    return json.dumps(parts, ensure_ascii=False)


if __name__ == "__main__":
    main()
