"""VisGenEnv under random and mutated calls: `python tests/fuzz_env.py [calls] [--minutes M]`.

Every episode draws its failure_scale, fidelity, pool and seed. Its calls begin as cases of
data/fidelity.jsonl or as calls that fit the schemas, name what the episode holds, and are then
spoiled: other values, other types, foretold ids, lone surrogates. Half of the episodes go through
`call`, half through `step`, whose text is spoiled too. After every episode its records are checked
(check_episode), and some episodes are played twice.

A fault ends the run with the episode's number, from which `--episode N` plays it again.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from env import VisGenEnv, parse_utpc, read_cases  # noqa: E402
from lib.behaviours import SPANS  # noqa: E402
from lib.experiment import RolloutConfig  # noqa: E402
from lib.text import tag  # noqa: E402
from lib.toolbox import load_defaults, load_tools  # noqa: E402

# Of every kind: the edges of floats and integers, booleans for numbers, other scripts' digits, ends
# of lines, format strings, tags, tokens, paths, ids of this episode and of none.
NASTY = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-9, 5e-324, 1e308, -1e308, 2**53, 2**63 - 1,
    -(2**63), 2**64 - 1, 10**30, "", " ", "\n", "1K\n", "2K\r", "1024x1024\n", "512*512\n",
    "1664*928\n", "1024\u00d71024", "１０２４x１０２４", "٣٢x٣٢",
    "9" * 40, "0512*0512", "16:9",
    "auto",
    "in_1", "in_12", "in_16", "in_20", "img_1", "vid_1", "aud_1", "txt_1", "img_99", "in_١",
    "{0.__class__}", "{made[0]}", "%s%n", "\u0000", "\u202e", "\ufeff", "é" * 9, "狐狸" * 30,
    "😀" * 9,
    "<|im_end|>", "</tool_call>", "<answer>", "../../etc/passwd", "nude", "gore", "Taylor Swift",
    "fast dance", "explain it and write why", "child", "x" * 5000, "a " * 3000, "x" * 21_000,
    [], {}, [[]], [[["x"]]], {"a": 1}, ["in_1"] * 60, ["in_11", "in_12"], [{"start": 0}], [None],
    [{"op": "loop", "count": 10}] * 10, [{"op": "crop", "width": 533, "height": 401}],
]  # fmt: skip
# What no JSON text can hold; for `call` alone.
NO_JSON = [float("nan"), float("inf"), -float("inf"), "\ud800", "a\udfff", 10**400, ("in_1",),
           {1: 2}, b"x", {"x"}]  # fmt: skip
# What a turn's text is spoiled with.
SCRAPS = ["<think>", "</think>", "<plan>", "</plan>", "<tool_call>", "</tool_call>", "<answer>",
          "</answer>", "<b>", "<", "{", "}", "[", "]", '"', "\\", ",", "NaN", "1e999", "\ud800",
          "\\ud800", "9" * 400, "[" * 40, "<|im_end|>", "é", "\n", ""]  # fmt: skip
SCALES = (0, 0, 1.0, 3.0, 20.0)
FIDELITIES = (1.0, 1.0, 1.0, 0.8, 0.0)


@lru_cache(maxsize=1)
def cases_by_tool() -> dict[str, list[bytes]]:
    """{tool: the arguments of its cases in data/fidelity.jsonl, each as JSON}."""
    found = {name: [] for name in load_tools()}
    for case in read_cases():
        found[case["tool"]].append(orjson.dumps(case["arguments"]))
    return found


# ---------------------------------------------------------------------------- calls
def fitting(rng: random.Random, schema: dict, ids: list[str]):
    """A value that fits a parameter's JSON Schema, at its edges more often than not."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "boolean":
        return rng.random() < 0.5
    if schema["type"] in ("integer", "number"):
        low, high = schema["minimum"], schema["maximum"]
        value = rng.choice(
            [low, high, rng.uniform(low, high), rng.uniform(low, min(high, low + 10)), round(low)]
        )
        if schema["type"] == "integer":
            value = round(value)
            return float(value) if rng.random() < 0.1 else value
        return value if rng.random() < 0.5 else min(high, max(low, round(value, 2)))
    if schema["type"] == "string":
        if "pattern" in schema:
            return rng.choice(["1K", "4K", "1024x1024", "2848x1600", "512*2048", "640*640"])
        if ids and rng.random() < 0.6:
            return rng.choice(ids)
        words = [
            "a fox",
            "calm piano",
            "fast",
            "Hello, there.",
            "一只狐狸。",
            'says "OPEN"',
            "\u200b",
        ]
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 6)))
    if schema["type"] == "array":
        n = rng.randint(schema.get("minItems", 0), min(schema.get("maxItems", 6), 6))
        return [fitting(rng, schema["items"], ids) for _ in range(n)]
    return {
        name: fitting(rng, child, ids)
        for name, child in schema["properties"].items()
        if name in schema["required"] or rng.random() < 0.4
    }


def sensible(rng: random.Random, env: VisGenEnv, name: str) -> dict:
    """Arguments of a tool that fit its schema, with media of the right kind."""
    tool = load_tools()[name]
    properties = tool["parameters"]["properties"]
    if rng.random() < 0.5:
        args = orjson.loads(rng.choice(cases_by_tool()[name]))
    else:
        args = {}
        for param, schema in properties.items():
            if param in tool["parameters"]["required"] or rng.random() < 0.3:
                args[param] = fitting(rng, schema, list(env.artifacts)[-30:])
    for param, limits in tool["media"].items():
        ids = [i for i, medium in env.artifacts.items() if medium["kind"] in limits["kinds"]]
        # The newest, so that chains grow long.
        ids = ids[-6:] if rng.random() < 0.7 else ids
        if param not in args or not ids or rng.random() < 0.2:
            continue
        if properties[param]["type"] == "string":
            args[param] = rng.choice(ids)
        elif not limits.get("inside"):
            args[param] = [rng.choice(ids) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
    return args


def spoiled(rng: random.Random, value, bad: list):
    """A value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        return {**value, name: spoiled(rng, value[name], bad)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return [*value[:i], spoiled(rng, value[i], bad), *value[i + 1 :]]
    if isinstance(value, str) and rng.random() < 0.3:
        return value + rng.choice(["\n", " ", "\u0000", "x" * 99, value])
    if type(value) in (int, float) and rng.random() < 0.5:
        return rng.choice(
            [-value, value * 1e300, value + 1e-7, value - 1, float(value), str(value)]
        )
    if isinstance(value, list) and rng.random() < 0.3:
        return value * rng.randint(2, 9)
    return rng.choice(bad)


def draw_call(rng: random.Random, env: VisGenEnv, bad: list) -> tuple:
    """(name, arguments) of a call, good in about half of all cases."""
    name = rng.choice(list(load_tools()))
    args = sensible(rng, env, name)
    kind = rng.random()
    if kind < 0.3:
        args = spoiled(rng, args, bad)
    elif kind < 0.38:
        args = {**args, rng.choice(list(load_tools()[name]["blank"])): rng.choice(bad)}
    elif kind < 0.41:
        args.pop(rng.choice(list(args)), None) if args else None
    elif kind < 0.43:
        args = {**args, rng.choice(["x", "y" * 60, "prompt\n", "{0}"]): 1}
    elif kind < 0.44:
        name = rng.choice(["tool_nope", "tool_" * 99, "", "<|im_end|>", name.upper()])
    elif kind < 0.48 and env.counts:
        # An id that this turn may make.
        made = load_tools()[rng.choice(list(load_tools()))]["makes"]
        prefix = load_defaults()["kinds"][made].get("prefix", "img")
        foretold = f"{prefix}_{env.counts.get(made, 0) + rng.randint(1, 2)}"
        args = {param: foretold if param in ("image", "video", "audio", "script") else value
                for param, value in args.items()}  # fmt: skip
    return name, args


def draw_turn(rng: random.Random, env: VisGenEnv) -> tuple[str, int]:
    """(text of a turn, 1 if it was written as UTPC demands, else 0)."""
    calls = [draw_call(rng, env, NASTY) for _ in range(rng.choice([1, 2, 4, 8]))]
    if rng.random() < 0.1:
        # Beyond the services' limits: many jobs at once.
        calls = calls[:1] * 12
    blocks = [tag("think", "go")]
    for name, args in calls:
        blocks.append(tag("tool_call", {"name": name, "arguments": args}))
    text = "\n".join(blocks)
    if rng.random() < 0.75:
        return text, 1
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(text) + 1)
        cut = rng.choice([0, 0, 1, 12])
        text = text[:i] + rng.choice(SCRAPS) + text[i + cut :]
    if rng.random() < 0.05:
        text += tag("answer", {"deliverables": ["img_1"], "summary": "s"})
    return text, 0


# ---------------------------------------------------------------------------- checks
def require(holds, what: str, *shown) -> None:
    """AssertionError unless `holds`, with what was seen."""
    if not holds:
        raise AssertionError(f"{what}: " + ", ".join(f"{value!r:.400}" for value in shown))


def state_of(env: VisGenEnv) -> tuple:
    """What a failed call must not change; the clock may go on."""
    newest = list(env.artifacts.values())[-1]
    booked = {model: len(listed) for model, listed in env.used.items()}
    facts = {name: value for name, value in newest.items() if name != "arguments"}
    todo = list(env.todo.items())
    return dict(env.counts), booked, len(env.artifacts), repr(todo), repr(facts)


def check_reply(env: VisGenEnv, reply: dict, before: tuple) -> None:
    """One reply of `call`, against its record and the episode before the call."""
    n_calls, clock, price, state = before
    record = env.calls[-1]
    require(len(env.calls) == n_calls + 1, "one record a call", len(env.calls), n_calls)
    require(env.virtual_s >= clock and env.price_usd >= price, "clock and price never fall", record)
    failed = record["status"] == "error"
    require(failed == ("error" in reply), "the reply is of its record", reply, record)
    # Of a service that deviates: a failed call may be billed, a reply told otherwise.
    deviates = env.rollout.fidelity < 1
    billed = round(env.price_usd - price, 6)
    require(billed == round(record["price_usd"], 6), "the bill is its calls'", billed, record)
    require(not failed or not billed or deviates, "a failed call costs nothing", record)
    told = reply.get("ids", reply.get("media", []) if deviates else [])
    require(record["outputs"] == told, "the ids are of their record", reply, record)
    strict_json(reply)
    if failed:
        require(state_of(env) == state, "a failed call changes nothing", record)
        hidden = deviates and reply["error"]["code"] == "request_failed"
        same = reply["error"] == record["error"] or hidden
        require(list(reply) == ["error"] and same, "an error", reply)
        require(len(reply["error"]["message"]) < 1000, "messages stay short", reply)


def strict_json(value) -> None:
    """ValueError unless a value can be written as JSON and read again, in UTF-8."""
    require(orjson.loads(orjson.dumps(value)) == value, "replies are JSON", value)


MEASURES = ("width", "height", "duration_s", "fps", "n_frames", "shots")


def check_artifact(medium: dict) -> None:
    """Numbers are finite and positive, and agree with one another."""
    for name in MEASURES:
        value = medium.get(name)
        if value is not None:
            sound = type(value) in (int, float) and math.isfinite(value) and value > 0
            require(sound, "numbers are finite and positive", name, medium)
    kind = medium["kind"]
    require(kind != "video" or medium["n_frames"] == sum(medium["shot_frames"]), "shots", medium)
    require(kind not in ("video", "audio") or medium["duration_s"], "it has a length", medium)
    require(
        kind not in ("video", "image") or medium["width"] and medium["height"], "a size", medium
    )
    if kind == "video":
        seconds = medium["n_frames"] / medium["fps"]
        require(abs(medium["duration_s"] - seconds) < 1e-5, "its length", medium)
        require(medium["n_frames"] <= load_defaults()["most_frames"], "not too long", medium)
        for first, end in medium["sound_frames"] or ():
            require(0 <= first < end <= medium["n_frames"], "sounds lie inside", medium)
        require(medium["has_audio"] or not medium["sound_frames"], "silent", medium)
    for name in SPANS:
        require(medium[name] == sorted(medium[name]), "spans are sorted", name, medium)
        for span in medium[name]:
            inside = 0 <= span[0] < span[1] <= medium["duration_s"] + 1e-5
            require(inside, "spans lie inside", name, span, medium["duration_s"])
            require(name == "cues" or 0 < span[-1], "what is listed is heard", span)


def check_episode(env: VisGenEnv, began: set[str]) -> None:
    """The records of an episode after its end; `began` are the ids of the user's media."""
    ids = [media_id for call in env.calls for media_id in call["outputs"]]
    require(len(set(ids)) == len(ids), "ids are unique", Counter(ids).most_common(3))
    require(set(ids) | began == set(env.artifacts), "every artifact is some call's", len(ids))
    turn_of = {media_id: call["turn"] for call in env.calls for media_id in call["outputs"]}
    for media_id, medium in env.artifacts.items():
        require(medium["id"] == media_id, "the id is its own", media_id)
        check_artifact(medium)
        for parent in medium["parents"]:
            require(parent["id"] in env.artifacts, "parents are there", medium)
            earlier = turn_of.get(parent["id"], -1) < turn_of.get(media_id, 0)
            require(earlier or not env.turns, "parents are of an earlier turn", medium["parents"])
    for call in env.calls:
        sane = math.isfinite(call["virtual_s"]) and call["virtual_s"] >= 0 <= call["price_usd"]
        require(sane, "time and price", call)
    # As it would be written to a file.
    json.dumps(env.trajectory(), allow_nan=False, ensure_ascii=False).encode("utf-8")


# ---------------------------------------------------------------------------- episodes
def new_episode(number: int) -> tuple[VisGenEnv, random.Random]:
    """An episode of that number with the media of the studio, and what draws its calls."""
    rng = random.Random(f"episode {number}")
    env = VisGenEnv(
        RolloutConfig(
            failure_scale=rng.choice(SCALES),
            fidelity=rng.choice(FIDELITIES),
            max_turns=10**6,
            tools=rng.choice(["names", "schema", "signature"]),
        )
    )
    task = {"id": "fuzz", "request": "Make it.", "inputs": load_defaults()["studio"]}
    if rng.random() < 0.1:
        task["pool"] = rng.sample(list(load_tools()), 20)
    env.reset(task, number)
    return env, rng


def play_calls(env: VisGenEnv, rng: random.Random, n_calls: int) -> list:
    """Some calls by `call`, each checked; returns the replies."""
    replies = []
    for _ in range(n_calls):
        name, args = draw_call(rng, env, NASTY + NO_JSON)
        if rng.random() < 0.95:
            env.errors = 0
        before = (len(env.calls), env.virtual_s, env.price_usd, state_of(env))
        reply = env.call({"name": name, "arguments": args, "error": None})
        check_reply(env, reply, before)
        replies.append(reply)
    return replies


def play_turns(env: VisGenEnv, rng: random.Random, n_calls: int) -> list:
    """Turns of some calls by `step`; returns the replies."""
    replies = []
    while len(env.calls) < n_calls and not env.ended:
        if rng.random() < 0.95:
            env.errors = -99
        text, written_well = draw_turn(rng, env)
        n_before, clock, price = len(env.calls), env.virtual_s, env.price_usd
        state = state_of(env)
        found, *_ = env.step(text)
        n_found = len(parse_utpc(text)["calls"])
        n_new = len(env.calls) - n_before
        require(len(found) == n_new == n_found, "one reply and one record a call", text)
        require(env.virtual_s >= clock and env.price_usd >= price, "clock and price", text)
        for message, record in zip(found, env.calls[n_before:]):
            reply = json.loads(message["content"])
            require(("error" in reply) == (record["status"] == "error"), "a reply", reply, record)
            require("<|" not in message["content"], "no token in a reply", message)
        if all(record["status"] == "error" for record in env.calls[n_before:]):
            require(state_of(env) == state, "failed calls change nothing", text)
        replies += found
        if env.ended == "malformed" and not written_well:
            # A turn without a call ends an episode; this one goes on.
            env.ended = None
    return replies


def play_episode(number: int, n_calls: int) -> tuple[VisGenEnv, list]:
    """Play one episode and check it; returns it and its replies."""
    env, rng = new_episode(number)
    began = set(env.artifacts)
    play = play_turns if number % 2 else play_calls
    replies = play(env, rng, n_calls)
    check_episode(env, began)
    return env, replies


def fuzz(n_calls: int, minutes: float = 60.0, first: int = 0, again: int = 25) -> dict:
    """Play episodes of 40 calls, from number `first` on, until there were n_calls or the time is
    over; every `again`-th is played twice. Returns {calls, episodes, twice, seconds, ok, codes}.

    AssertionError, or whatever was raised, with the episode's number in front.
    """
    began, counts, codes, tools = time.monotonic(), Counter(), Counter(), Counter()
    slowest, number = 0.0, first
    while counts["calls"] < n_calls and time.monotonic() - began < 60 * minutes:
        start = time.monotonic()
        try:
            env, replies = play_episode(number, 40)
            if number % again in (0, 1):
                twin, same = play_episode(number, 40)
                require(replies == same, "the same seed gives the same replies", number)
                counts["twice"] += 1
        except Exception as error:
            error.add_note(f"episode {number}: python tests/fuzz_env.py --episode {number}")
            raise
        slowest = max(slowest, time.monotonic() - start)
        for call in env.calls:
            code = call["error"]["code"] if call["error"] else "ok"
            codes[code] += 1
            tools[call["name"]] += code == "ok"
        counts["calls"] += len(env.calls)
        counts["episodes"] += 1
        number += 1
    never = [name for name in load_tools() if not tools[name]]
    return {
        **counts,
        "seconds": round(time.monotonic() - began, 1),
        "slowest_episode_s": round(slowest, 2),
        "outcomes": dict(codes.most_common()),
        "tools_that_never_succeeded": never,
    }


def main() -> None:
    """Play, and print what came of the calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calls", nargs="?", type=int, default=1_000_000, help="how many calls")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so many")
    parser.add_argument("--first", type=int, default=0, help="number (seed) of the first episode")
    parser.add_argument("--episode", type=int, help="play this one alone")
    options = parser.parse_args()
    if options.episode is not None:
        play_episode(options.episode, 40)
        print(f"episode {options.episode}: nothing found")
        return
    found = fuzz(options.calls, options.minutes, options.first)
    last = options.first + found["episodes"] - 1
    print(f"episodes (seeds) {options.first} to {last}")
    for name, value in found.items():
        print(f"{name:28s} {value}")


if __name__ == "__main__":
    main()
