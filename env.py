"""VisGenEnv: 36 simulated tools of visual creation (Sec. 4.3.1, Table 9); no model, no network, no torch.

tools.yaml says what each tool takes, refuses and costs, and how it fails; here are what it makes, the agent's text (UTPC), the episode, and
a console. Nothing the agent writes can raise: each call gets a reply, and a refused call's reply says which parameter is wrong and why.
"""

import argparse
import copy
import json
import re
import sys
import time
from functools import lru_cache
from itertools import islice

from lib.experiment import RolloutConfig
from lib.runs import ROOT
from lib.text import clean, fill_template, read_json, to_json
from lib.toolbox import (
    BEHAVIOURS,
    ToolError,
    bill,
    broken,
    chance,
    check_schema,
    describe,
    deviate,
    find_media,
    load_defaults,
    load_tools,
    media_files,
    new_artifact,
    refuse,
    shot_lengths,
    tool_schemas,
    tool_signature,
    whole_frames,
)


@lru_cache(maxsize=256)
def system_text(style, pool):
    """The system message for a pool of tool names; with `schema` the chat template itself lists the tools."""
    listing = {
        "names": " ".join(pool),
        "signature": "\n" + "\n".join(map(tool_signature, pool)),
        "schema": "",
    }[style]
    return fill_template("prompts/system.jinja", tools_text=listing, brief=style == "names")


# ---------------------------------------------------------------------------- UTPC
TAGS = ("think", "plan", "tool_call", "answer")
BLOCK = re.compile(
    r"<(NAME)>((?:[^<]++|<(?!/\1>|(?:NAME)>))*+)(</\1>)?".replace("NAME", "|".join(TAGS))
)  # up to its end, or to what opens next
ODD = re.compile(
    r"</?([A-Za-z_-]++)>"
)  # outside of blocks: another tag, or the close of what is not open
FORGED = re.compile(
    r"<(?=/?(?:think|plan|tool_call|tool_response|answer)\b)"
)  # what could open or close a turn, beside control tokens
MAX_TAGS = 2000  # of a turn; a megabyte of tags would otherwise give as many faults and replies


def parse_utpc(text):
    """What a turn says, and what is wrong with it (Sec. 3.1). Never raises; linear in len(text). Blocks beyond MAX_TAGS are text.

    Returns {think [str], plan list|None, calls [{name, arguments, error, pos}], answer dict|None, order [tag], faults [{code, pos, message}]}.
    A tag that opens inside another one ends it: a lost closing tag costs one block. Each call gets a reply, so `calls` has unreadable ones too.
    """
    text, end, cut = clean(text), 0, set()
    found = {"think": [], "plan": None, "calls": [], "answer": None, "order": [], "faults": []}
    order = found["order"]

    def fault(code, pos, message):
        found["faults"].append({"code": code, "pos": pos, "message": f"{message:.160}"})
        return f"{message:.160}"

    for match in [*islice(BLOCK.finditer(text), MAX_TAGS), None]:
        pos = match.start() if match else len(text)
        for odd in islice(ODD.finditer(text, end, pos), MAX_TAGS) if end < pos else ():
            code = (
                "unknown_tag"
                if odd[1] not in TAGS
                else "nested_tag"
                if odd[1] in cut
                else "stray_close"
            )
            fault(code, odd.start(), f"{odd[0]} is none of the four tags, or closes nothing")
        if end < pos and ODD.sub("", text[end:pos]).strip():
            fault("text_outside_tags", end, "text outside the four tags")
        if not match:
            break
        tag, body, closed = match.groups()
        end, value, error = match.end(), body.strip(), None
        if not closed:
            cut.add(tag)
            fault("unclosed_tag", pos, f"<{tag}> is not closed, or not before another tag opens")
        if (
            (tag in ("plan", "answer") and found["calls"])
            or (tag == "tool_call" and "answer" in order)
            or (tag != "think" and not order)
        ):
            fault(
                "wrong_order",
                pos,
                "a turn is <think>, then maybe <plan>, then calls or an <answer>",
            )
        if tag in order and tag != "tool_call":
            fault("duplicate_tag", pos, f"a second <{tag}> in one turn")
        if not value:
            error = fault("empty_tag", pos, f"<{tag}> is empty")
        elif tag != "think":
            try:
                value = read_json(body)
                check_schema(value, load_defaults()["utpc"][tag], tag)
            except ValueError as wrong:
                error = fault("bad_json", pos, f"the {tag} is not valid JSON: {wrong}")
            except ToolError as wrong:
                error = fault(f"bad_{tag.removeprefix('tool_')}", pos, wrong.args[2])
        if tag == "think":
            found["think"].append(value)
        elif tag == "tool_call":
            found["calls"].append(
                {
                    **({"name": None, "arguments": None} if error else value),
                    "error": error,
                    "pos": pos,
                }
            )
        elif not error and tag not in order:
            found[tag] = value
        order.append(tag)
    if not order:
        fault("wrong_order", 0, "a turn begins with <think>")
    return found


# ---------------------------------------------------------------------------- the environment
class VisGenEnv:
    """One episode at a time, all state in the instance. Same seed, same calls: same replies. copy.deepcopy forks an episode."""

    def __init__(self, rollout=RolloutConfig()):
        self.rollout, self.scale, self.ended = rollout, rollout.failure_scale, "not started"

    def reset(self, task, seed):
        """Opening messages and info {"pool": names, "tools": schemas or None}. ValueError for a pool of unknown tools."""
        self.pool = (
            list(task.get("pool") or load_tools())
            if self.rollout.tool_pool == "task"
            else list(load_tools())
        )
        if unknown := [name for name in self.pool if name not in load_tools()]:
            raise ValueError(
                f"task {task.get('id')}: its pool names {unknown}, which tools.yaml does not have"
            )
        self.task, self.seed, self.ended = task, seed, None
        self.calls, self.turns, self.plans, self.plan, self.answer = [], [], [], None, None
        self.artifacts, self.counts, self.todo, self.used = {}, {}, {}, {}
        self.virtual_s, self.turn_began, self.price_usd, self.errors = 0.0, 0.0, 0.0, 0
        lines = [task["request"]] + [
            self.attach(f"in_{i + 1}", given) for i, given in enumerate(task.get("inputs") or [])
        ]
        self.messages = [
            {"role": "system", "content": system_text(self.rollout.tools, tuple(self.pool))},
            {"role": "user", "content": clean("\n".join(lines)).replace("<|", "< |")},
        ]
        self.info = {
            "pool": self.pool,
            "tools": tool_schemas(self.pool) if self.rollout.tools == "schema" else None,
        }
        return list(self.messages), self.info

    def attach(self, media_id, given):
        """A medium that the user attached becomes an artifact; returns the line that tells the agent about it."""
        kind, fps, n = given["kind"], given.get("fps") or 24, given.get("shots") or 1
        more = (
            {
                "fps": fps,
                "shot_frames": shot_lengths(
                    [whole_frames(given["duration_s"], fps) * i // n for i in range(n + 1)]
                ),
            }
            if kind == "video"
            else {}
        )
        more["has_audio"] = kind == "audio" or (kind == "video" and bool(given.get("has_audio")))
        more["media"] = (
            given.get("media") or self.stand_ins(kind, media_id)[0]
        )  # the user's own file, if the task names it
        self.artifacts[media_id] = new_artifact(**{**given, **more, "id": media_id, "tool": "user"})
        return load_defaults()["kinds"][kind]["attached"].format_map(self.artifacts[media_id])

    def draw(self, purpose):
        """A number in [0, 1) from the episode's seed and the number of the current call."""
        return chance(self.seed, len(self.calls), purpose)

    def stand_ins(self, kind, key, n=1):
        """Files of the media database for n media: neighbours, so that they differ; the same key shows the same ones."""
        files = media_files(kind)
        first = int(chance(self.seed, key, "media") * len(files)) if files else 0
        return [files[(first + i) % len(files)] if files else None for i in range(n)]

    def step(self, text):
        """One turn -> (a tool message per call, 0.0: rewards.py gives it, terminated, truncated, info). RuntimeError after the episode's end."""
        if self.ended:
            raise RuntimeError(f"the episode is over ({self.ended}); call reset first")
        turn = parse_utpc(text)
        self.messages.append({"role": "assistant", "content": clean(text)})
        self.turn_began = self.virtual_s  # the calls of one turn run side by side
        self.turns.append({"faults": turn["faults"], "order": turn["order"]})
        if turn["plan"] is not None:
            self.plans.append({"turn": len(self.turns), "plan": turn["plan"]})
            self.plan = turn["plan"] if len(self.turns) == 1 else self.plan
        replies = [
            {
                "role": "tool",
                "content": FORGED.sub(r"\\u003c", to_json(self.call(call)).replace("<|", "< |")),
            }
            for call in turn["calls"]
        ]
        self.messages += replies
        if turn["answer"] is not None:
            self.ended, self.answer = "answer", turn["answer"]
        elif not turn["calls"] or self.errors >= load_defaults()["max_errors"]:
            self.ended = "malformed"
        elif len(self.turns) >= self.rollout.max_turns:
            self.ended = "max_turns"
        return (
            replies,
            0.0,
            self.ended in ("answer", "malformed"),
            self.ended == "max_turns",
            {"turn": len(self.turns), "ended": self.ended, "faults": turn["faults"]},
        )

    def call(self, call):
        """Run one parsed call, keep its record, and return the reply."""
        record = {
            "turn": len(self.turns),
            "name": call["name"],
            "arguments": call["arguments"],
            "status": "ok",
            "error": None,
            "outputs": [],
            "virtual_s": 0.0,
            "price_usd": 0.0,
        }
        deviates = self.rollout.fidelity < 1 and self.draw("fidelity") >= self.rollout.fidelity
        try:
            if self.errors >= load_defaults()["max_errors"]:
                refuse(
                    None,
                    f"{self.errors} calls of this episode failed; it ends here",
                    "too_many_errors",
                )
            if call["error"]:
                refuse(None, call["error"], "bad_call")
            if call["name"] not in self.pool:
                refuse(
                    "name",
                    f"no tool {to_json(call['name']):.40} here; the tools are {', '.join(self.pool):.300}",
                    "unknown_tool",
                )
            reply = self.run(load_tools()[call["name"]], call["arguments"], record, deviates)
        except ToolError as error:
            self.errors += 1
            code, param, message, retryable = (
                ("service_error", None, "internal error, try again", True)
                if deviates
                else error.args
            )
            if code in load_defaults()["invalid"]:  # in the service's manner
                message = load_tools()[call["name"]]["provider"]["invalid"] + message
            record["status"], record["virtual_s"] = (
                "error",
                record["virtual_s"] or load_defaults()["refused_s"],
            )
            record["error"] = {
                "code": code,
                "param": param,
                "message": message,
                "retryable": retryable,
            }
            reply = {"error": record["error"]}
            self.virtual_s = max(self.virtual_s, round(self.turn_began + record["virtual_s"], 3))
        self.calls.append(record)
        return reply

    def run(self, tool, written, record, deviates):
        """Validate, fail as services fail, make the outputs, file them. Raises ToolError."""
        check_schema(written, tool["parameters"], "")
        a = {**tool["blank"], **written}
        parents = find_media(self.artifacts, tool, a)
        for rule in broken(tool["rules"], a):
            refuse(
                rule["param"], rule["message"].format_map(a), rule.get("code", "invalid_parameter")
            )
        if self.scale:
            self.screen(tool, a)
        outputs, more = BEHAVIOURS[tool["behaviour"]](self, tool, a)
        a["made"] = outputs
        for note in broken(tool["notes"], a):
            more.setdefault("warning", note["message"].format_map(a))
        given = [self.artifacts[parent["id"]] for parent in parents]
        start = max([self.turn_began, *[medium["made_s"] for medium in given]])  # it waits for them
        if self.scale:
            self.meter(tool, a, start)
            self.fail(tool, record)
            outputs, more = self.lose(tool, a, outputs, more)
        if deviates:
            outputs, more = deviate(outputs, more)
        record["virtual_s"] = round(bill(tool["virtual_seconds"], a, outputs, given, self.draw), 3)
        record["price_usd"] = round(bill(tool["price_usd"], a, outputs, given), 6)
        end = round(start + record["virtual_s"], 3)
        for limit in tool["limits"][:1]:
            self.used.setdefault(limit["of"], []).append((start, end, len(outputs)))
        kind, count, prefix = (
            tool["makes"],
            self.counts.get(tool["makes"], 0),
            load_defaults()["kinds"][tool["makes"]].get("prefix"),
        )
        self.counts[kind] = count + len(outputs)
        key = f"{written['seed']} {written['prompt']}" if "seed" in written else f"{kind} {count}"
        for i, (output, file) in enumerate(
            zip(outputs, self.stand_ins(kind, key, len(outputs))), count + 1
        ):
            output.update(
                id=f"{prefix}_{i}",
                tool=tool["name"],
                arguments=written,
                media=file,
                made_s=end,
                parents=parents,
            )
            self.artifacts[output["id"]] = output
            record["outputs"].append(output["id"])
        self.virtual_s, self.price_usd = (
            max(self.virtual_s, end),
            round(self.price_usd + record["price_usd"], 6),
        )
        return describe(kind, outputs, more)

    def screen(self, tool, a):
        """Moderation of the prompt: the same prompt always gets the same verdict, right or wrong."""
        provider, words = tool["provider"], load_defaults()["blocked_words"]
        categories = provider["screens"] + [
            more
            for param, table in tool["also_screened"].items()
            for more in table.get(a[param], ())
        ]
        for param in tool["screened"]:
            text = a[param] or ""
            hits = [
                (category, hit[0])
                for category in categories
                if (hit := words[category].search(text))
            ]
            if (
                text
                and not hits
                and chance("", provider["blocked"], text)
                < load_defaults()["false_block"] * self.scale
            ):
                hits = [("other", max(re.findall(r"\w+", text), key=len, default="")[:20])]
            for category, word in hits[-1:]:
                message = provider["blocked"].format(
                    code=provider.get("codes", {}).get(category), category=category, word=word
                )
                refuse(param, message, "content_blocked")

    def meter(self, tool, a, start):
        """Rate limits, jobs at a time, and used-up packs, by the virtual clock. Only the last does not end by waiting."""
        for limit in tool["limits"]:
            amount = sum(
                end > start
                if "jobs" in limit
                else (n if "items" in limit else 1) * (began > start - limit["window_s"])
                for began, end, n in self.used.get(limit["of"], ())
            )
            if amount + (int(a["n"]) if "items" in limit else 1) > (
                limit.get("jobs") or limit.get("calls") or limit["items"]
            ):
                refuse(None, limit["message"], limit["code"], limit["code"] != "quota_exhausted")

    def fail(self, tool, record):
        """Failures that a retry mends, from the episode's seed and the number of the call; of several steps any may fail. A timeout takes longest."""
        timeout, both = (
            self.scale * len(tool["steps"]) * share
            for share in load_defaults()["failures"][tool["call"]]
        )
        if both and (chance := self.draw("failure")) < both:
            step, code = (
                tool["steps"][int(chance / both * len(tool["steps"]))],
                "timeout" if chance < timeout else "service_error",
            )
            if code == "timeout":
                record["virtual_s"] = round(
                    bill(
                        tool["virtual_seconds"],
                        {**tool["blank"], **record["arguments"]},
                        draw=lambda _: 1 - 1e-9,
                    ),
                    3,
                )
            refuse(None, (f"step {step}: " if step else "") + tool["provider"][code], code, True)

    def lose(self, tool, a, outputs, more):
        """Items that were filtered or not made: the rest comes with a warning; if none is left, the call has failed."""
        loss, n = tool["no_output"], len(outputs)
        talks = "asks_text" in loss and re.search(
            load_defaults()["asks_text"], a["prompt"], re.IGNORECASE
        )
        chance = loss["asks_text" if talks else "per_item"] * self.scale
        kept = [
            output
            for i, output in enumerate(outputs)
            if not chance or self.draw(f"item {i}") >= chance
        ]
        message = loss["message"].format(k=len(kept), n=n, lost=n - len(kept))
        if n and not kept:
            refuse(None, message, "no_output", True)
        return kept, {**more, "warning": message} if len(kept) < n else more

    def trajectory(self):
        """The Trajectory record; `reward` is filled by rewards.py."""
        names = (
            "task",
            "messages",
            "calls",
            "plan",
            "plans",
            "answer",
            "ended",
            "seed",
            "turns",
            "virtual_s",
            "price_usd",
        )
        return {
            **{name: copy.copy(getattr(self, name)) for name in names},
            "artifacts": list(self.artifacts.values()),
            "reward": {},
        }


# ---------------------------------------------------------------------------- console, tables, speed
def studio(**rollout):
    """An episode with the media of `defaults.studio`. With its seed, the first call meets no transient failure at scale 1."""
    env = VisGenEnv(RolloutConfig(**{"failure_scale": 0, "max_turns": 10**9, **rollout}))
    env.reset(
        {"id": "studio", "request": "Make what you like.", "inputs": load_defaults()["studio"]},
        seed=1,
    )
    return env


def read_cases():
    return [
        json.loads(line)
        for line in (ROOT / "data/fidelity.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def audit():
    """C_tool of the documented (D, S, T) and of the assumed (A, M) cases: ({tool: [right, all, right, all]}, deviations in words)."""
    table, deviations = {name: [0, 0, 0, 0] for name in load_tools()}, []
    for case in read_cases():
        env, row = studio(failure_scale=case["failure_scale"]), table[case["tool"]]
        reply = env.call({"name": case["tool"], "arguments": case["arguments"], "error": None})
        ids, error = reply.get("ids", ()), reply.get("error", {})
        got = {
            **(env.artifacts[ids[0]] if ids else {}),
            **env.calls[-1],
            **reply,
            **error,
            "error": error.get("code"),
            "count": len(ids),
            "warning": "warning" in reply,
        }
        wrong = {
            field: got.get(field)
            for field, right in case["expect"].items()
            if got.get(field) != right
        }
        column = 0 if case["mark"] in "DST" else 2
        row[column], row[column + 1] = row[column] + (not wrong), row[column + 1] + 1
        if wrong:
            deviations.append(
                f"{case['tool']} {to_json(case['arguments']):.90} ({case['source']}): {case['expect']}, got {wrong}"
            )
    return table, deviations


def print_audit():
    table, deviations = audit()
    print(
        fill_template(
            "templates/audit.jinja",
            table={**table, "all": [sum(column) for column in zip(*table.values())]},
            deviations=deviations,
        )
    )


def print_speed(seconds=2.0):
    """Calls per second of CPU time in the best round, alone and with the agent's text read and the replies written, six calls a turn."""
    cases = [
        case
        for case in read_cases()
        if not case["failure_scale"] and len(to_json(case["arguments"])) <= 300
    ]
    for words in ("valid", "refused"):
        calls = [
            {"name": c["tool"], "arguments": c["arguments"], "error": None}
            for c in cases
            if ("error" in c["expect"]) == (words == "refused")
        ]
        blocks = [
            f"<tool_call>{to_json({'name': call['name'], 'arguments': call['arguments']})}</tool_call>"
            for call in calls
        ]
        turns = [
            "<think>Go.</think>" + "".join(blocks[i : i + 6]) for i in range(0, len(blocks), 6)
        ]
        for name, given, rounds in (("call", calls, []), ("step", turns, [])):
            while sum(rounds) < seconds:
                env = studio()
                env.errors = -(10**9)  # this is no episode: ten refusals must not end it
                act, began = getattr(env, name), time.process_time()
                list(map(act, given))
                rounds.append(time.process_time() - began)
            print(
                f"{len(calls) / min(rounds):8.0f} {words} calls/s by `{name}`, in the best of {len(rounds)} rounds"
            )
        print(
            f"         the mix: {len(calls)} cases of data/fidelity.jsonl, of {len({call['name'] for call in calls})} tools"
        )


def console():
    """Read `tool {"argument": ...}` from the keyboard; show the reply, the new media, the clock and the bill."""
    env = studio(failure_scale=1.0)
    print(
        env.messages[1]["content"],
        '\nType a call such as  tool_text2image_gpt {"prompt": "a fox"}  or  quit.',
    )
    for line in filter(None, map(str.strip, sys.stdin)):
        if line == "quit" or env.ended:
            return
        name, _, arguments = line.partition(" ")
        replies, *_ = env.step(
            f'<think>.</think><tool_call>{{"name": {to_json(name)}, "arguments": {arguments or "{}"}}}</tool_call>'
        )
        print(*[reply["content"] for reply in replies], sep="\n")
        for media_id in env.calls[-1]["outputs"]:
            print(
                "   ",
                {
                    k: v
                    for k, v in env.artifacts[media_id].items()
                    if v not in (None, [], {}) and k not in ("arguments", "tool")
                },
            )
        print(
            f"    clock {env.virtual_s:.1f} s, bill ${env.price_usd:.3f}, failed calls {env.errors}",
            "(the episode is over)" * bool(env.ended),
        )


def main():
    parser = argparse.ArgumentParser(
        description="A console on one episode of VisGenEnv; with a switch, a table instead."
    )
    for switch, show, doc in (
        (
            "--tools",
            lambda: print(
                fill_template("templates/tools.jinja", tools=load_tools(), signature=tool_signature)
            ),
            "the 36 tools",
        ),
        ("--audit", print_audit, "C_tool by data/fidelity.jsonl"),
        ("--speed", print_speed, "tool calls per second on this core"),
    ):
        parser.add_argument(
            switch, dest="show", action="store_const", const=show, default=console, help=doc
        )
    parser.parse_args().show()


if __name__ == "__main__":
    main()
