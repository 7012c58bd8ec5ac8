"""VisGenEnv: an episode with 36 simulated tools of visual creation (Sec. 4.3.1, Table 9). It needs
no model, no network and no torch.

The agent writes UTPC text (Sec. 3.1); parse_utpc reads it, and each tool call in it gets one reply.
tools.yaml says what a tool takes, refuses and costs, and how it fails; lib/toolbox.py checks that,
and lib/behaviours.py makes the outputs. Here are the episode with its clock, its price and its
failures, and below it a console. Nothing that the agent writes can raise: a refused call's reply
says which parameter is wrong and why.
"""

import argparse
import copy
import json
import math
import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any

from lib.behaviours import BEHAVIOURS, deviate, new_artifact, shot_lengths
from lib.claims import thought_faults
from lib.dials import deviating_part, fail_or_not, other_price, refuse_settings, told_otherwise
from lib.experiment import RolloutConfig
from lib.runs import ROOT, run_command
from lib.text import clean, fill_template, is_json, read_json, tag, to_json
from lib.toolbox import (
    ToolError,
    bill,
    broken,
    chance,
    check_schema,
    describe,
    find_media,
    load_defaults,
    load_tools,
    media_files,
    refuse,
    tool_schemas,
    tool_signature,
    whole_frames,
)
from lib.words import content_words


@lru_cache(maxsize=256)
def system_text(style: str, pool: tuple[str, ...]) -> str:
    """The system message for a pool of tool names.

    style: how it lists the tools, as names, as signatures, or (`schema`) not at all, since the chat
    template does.
    """
    listing = {
        "names": " ".join(pool),
        "signature": "\n" + "\n".join(map(tool_signature, pool)),
        "schema": "",
    }[style]
    return fill_template("prompts/system.jinja", tools_text=listing, brief=style == "names")


# --------------------------------------------------------------------- UTPC: what the agent writes
TAGS = ("think", "plan", "tool_call", "answer")
ANY_TAG = "|".join(TAGS)

# A block is a tag, its body, and its end. A body goes on to its own end or to the next tag that
# opens. A search is linear: what follows the body is optional, so nothing is ever given back. (The
# possessive `++` and `*+` would say so, but Python 3.11.0 to 3.11.4, Debian's among them, reads
# them wrongly inside of a group.)
BLOCK = re.compile(rf"<({ANY_TAG})>((?:[^<]+|<(?!/\1>|(?:{ANY_TAG})>))*)(</\1>)?")
# Outside of blocks: another tag, or the end of one that is not open.
ODD_TAG = re.compile(r"</?([A-Za-z_-]+)>")
# In a tool's reply: what could open or close a turn, beside the control tokens `<|...|>`.
FORGED_TAG = re.compile(r"<(?=/?(?:think|plan|tool_call|tool_response|answer)\b)")
# In the agent's text, wherever it stands: a reply or a control token that only others write.
FORGED_REPLY = re.compile(r"</?(?:tool_response|tools)\b|<\|\w+\|>")
# Of a turn (ours). A megabyte of tags would otherwise give as many faults and replies.
MAX_TAGS = 2000


def parse_utpc(text: str) -> dict:
    """What a turn says, and what is wrong with it (Sec. 3.1): never raises, linear in len(text).

    Returns
        think   [text of each block]
        plan    list of steps, or None
        calls   [{name, arguments, error, pos}]: an unreadable call has an error and is listed too,
                because each call gets a reply
        answer  {deliverables, summary}, or None
        order   [tag of each block]
        faults  [{code, pos, message}]

    A tag that opens inside of another block ends that block, so that a lost closing tag costs one
    block. Blocks beyond MAX_TAGS are text.
    """
    text = clean(text)
    turn = {"think": [], "plan": None, "calls": [], "answer": None, "order": [], "faults": []}
    unclosed = set()
    end = 0
    for block in islice(BLOCK.finditer(text), MAX_TAGS):
        name, body, closing = block.groups()
        check_outside(text, end, block.start(), unclosed, turn["faults"])
        check_place(name, block.start(), bool(closing), turn)
        if not closing:
            unclosed.add(name)
        add_block(name, body, block.start(), turn)
        end = block.end()
    check_outside(text, end, len(text), unclosed, turn["faults"])
    if not turn["order"]:
        add_fault(turn["faults"], "wrong_order", 0, "a turn begins with <think>")
    return turn


def add_fault(faults: list[dict], code: str, pos: int, message: str) -> str:
    """Note a fault at a position of the text; returns its message, cut to 160 characters."""
    message = f"{message:.160}"
    faults.append({"code": code, "pos": pos, "message": message})
    return message


def check_outside(text: str, start: int, end: int, unclosed: set, faults: list[dict]) -> None:
    """Faults of what stands between two blocks: tags that are none of ours, and text."""
    if start == end:
        return
    for odd in islice(ODD_TAG.finditer(text, start, end), MAX_TAGS):
        if odd[1] not in TAGS:
            code = "unknown_tag"
        elif odd[1] in unclosed:
            code = "nested_tag"
        else:
            code = "stray_close"
        message = f"{odd[0]} is none of the four tags, or closes nothing"
        add_fault(faults, code, odd.start(), message)
    if ODD_TAG.sub("", text[start:end]).strip():
        add_fault(faults, "text_outside_tags", start, "text outside the four tags")


def check_place(name: str, pos: int, closed: bool, turn: dict) -> None:
    """Faults of a block's tag: not closed, not in its place, or there before."""
    faults, order = turn["faults"], turn["order"]
    if not closed:
        message = f"<{name}> is not closed, or not before another tag opens"
        add_fault(faults, "unclosed_tag", pos, message)
    too_late = name in ("plan", "answer") and turn["calls"]
    after_answer = name == "tool_call" and "answer" in order
    before_think = name != "think" and not order
    if too_late or after_answer or before_think:
        message = "a turn is <think>, then maybe <plan>, then calls or an <answer>"
        add_fault(faults, "wrong_order", pos, message)
    if name in order and name != "tool_call":
        add_fault(faults, "duplicate_tag", pos, f"a second <{name}> in one turn")


def add_block(name: str, body: str, pos: int, turn: dict) -> None:
    """Put a block into the turn; what cannot be read is a fault. Of plans and answers the first
    block counts."""
    value, error = read_body(name, body, pos, turn["faults"])
    if name == "think":
        turn["think"].append(value)
    elif name == "tool_call":
        call = {"name": None, "arguments": None} if error else value
        turn["calls"].append({**call, "error": error, "pos": pos})
    elif not error and name not in turn["order"]:
        turn[name] = value
    turn["order"].append(name)


def read_body(name: str, body: str, pos: int, faults: list[dict]) -> tuple[Any, str | None]:
    """(value, None) of a block's body; or (anything, what is wrong with it)."""
    text = body.strip()
    if not text:
        return text, add_fault(faults, "empty_tag", pos, f"<{name}> is empty")
    if name == "think":
        return text, None
    try:
        value = read_json(body)
        check_schema(value, load_defaults()["utpc"][name], name)
    except ValueError as error:
        return None, add_fault(faults, "bad_json", pos, f"the {name} is not valid JSON: {error}")
    except ToolError as error:
        _, _, message, _ = error.args
        return None, add_fault(faults, f"bad_{name.removeprefix('tool_')}", pos, message)
    return value, None


# ----------------------------------------------------------------------------- the environment
class VisGenEnv:
    """One episode at a time, with all its state in the instance; copy.deepcopy forks an episode.

    Same seed, same calls: same replies. reset and step return in Gymnasium's order. The virtual
    clock and the price meter run along; nothing sleeps.
    """

    def __init__(self, rollout: RolloutConfig | None = None):
        self.rollout = rollout or RolloutConfig()
        self.failure_scale = self.rollout.failure_scale
        self.ended = "not started"

    def reset(self, task: dict, seed: Any) -> tuple[list[dict], dict]:
        """Begin an episode: (opening messages, {"pool": tool names, "tools": schemas or None}).

        ValueError for a task whose pool names a tool that does not exist.
        """
        self.pool = list(load_tools())
        if self.rollout.tool_pool == "task":
            self.pool = list(task.get("pool") or load_tools())
        if unknown := [name for name in self.pool if name not in load_tools()]:
            raise ValueError(
                f"task {task.get('id')}: its pool names {unknown}, which tools.yaml does not have"
            )
        self.task, self.seed, self.ended = task, seed, None
        # What the agent did. `plan` is the first turn's; `plans` has the later ones too.
        self.turns, self.calls, self.plans = [], [], []
        self.n_replies = 0  # of the turn before
        self.plan, self.answer = None, None
        # What the tools keep: artifacts by id, how many there are of a kind, the to-do list, and
        # (start, end, number of outputs) of the calls that count against a limit.
        self.artifacts, self.counts, self.todo, self.used = {}, {}, {}, {}
        self.virtual_s, self.turn_began, self.price_usd, self.errors = 0.0, 0.0, 0.0, 0
        lines = [task["request"]]
        for i, given in enumerate(task.get("inputs") or [], 1):
            lines.append(self.attach(f"in_{i}", given))
        request = clean("\n".join(lines)).replace("<|", "< |")
        self.messages = [
            {"role": "system", "content": system_text(self.rollout.tools, tuple(self.pool))},
            {"role": "user", "content": request},
        ]
        schemas = tool_schemas(self.pool) if self.rollout.tools == "schema" else None
        self.info = {"pool": self.pool, "tools": schemas}
        return list(self.messages), self.info

    def attach(self, media_id: str, given: dict) -> str:
        """Make an artifact of a medium that the user attached; returns the line that tells the
        agent about it."""
        kind = given["kind"]
        fields = {}
        if kind == "video":
            fps, n_shots = given.get("fps") or 24, given.get("shots") or 1
            n_frames = whole_frames(given["duration_s"], fps)
            cuts = [n_frames * i // n_shots for i in range(n_shots + 1)]
            fields = {"fps": fps, "shot_frames": shot_lengths(cuts)}
        has_sound = kind == "video" and bool(given.get("has_audio"))
        fields["has_audio"] = kind == "audio" or has_sound
        if kind == "audio" and given.get("bpm"):
            # What has a beat is music.
            fields["music"] = [[0.0, given["duration_s"], 1.0]]
        # The user's own file, if the task names it.
        fields["media"] = given.get("media") or self.stand_ins(kind, media_id)[0]
        artifact = new_artifact(**{**given, **fields, "id": media_id, "tool": "user"})
        self.artifacts[media_id] = artifact
        return load_defaults()["kinds"][kind]["attached"].format_map(artifact)

    def chance(self, purpose: Any) -> float:
        """A number in [0, 1) from the episode's seed and the number of the current call."""
        return chance(self.seed, len(self.calls), purpose)

    def stand_ins(self, kind: str, key: str, n: int = 1) -> list[str | None]:
        """Files of the media database for n media (Sec. 4.3.1: "random samples"): neighbours, so
        that they differ. The same key shows the same ones."""
        files = media_files(kind)
        if not files:
            return [None] * n
        first = int(chance(self.seed, key, "media") * len(files))
        return [files[(first + i) % len(files)] for i in range(n)]

    def step(self, text: str) -> tuple[list[dict], float, bool, bool, dict]:
        """One turn of the agent: (replies, reward, terminated, truncated, info).

        replies: a tool message for each call, in order. The reward is 0.0: rewards.py gives it, of
        the whole episode. RuntimeError after the episode's end.
        """
        if self.ended:
            raise RuntimeError(f"the episode is over ({self.ended}); call reset first")
        turn = self.read_turn(text)
        # The calls of one turn run side by side: what one makes is not there for another.
        self.turn_began = self.virtual_s
        there = dict(self.artifacts)
        replies = [tool_message(self.call(call, there)) for call in turn["calls"]]
        self.messages += replies
        self.n_replies = len(replies)
        self.answer = turn["answer"]
        self.ended = self.why_ended(turn)
        info = {"turn": len(self.turns), "ended": self.ended, "faults": turn["faults"]}
        terminated = self.ended in ("answer", "malformed")
        return replies, 0.0, terminated, self.ended == "max_turns", info

    def read_turn(self, text: str) -> dict:
        """Keep what a turn says, but run none of its calls; returns it as parse_utpc does."""
        turn = parse_utpc(text)
        self.messages.append({"role": "assistant", "content": clean(text)})
        thoughts = " ".join(turn["think"])
        last = [m["content"] for m in self.messages[-1 - self.n_replies : -1]]
        idle = thought_faults(thoughts, self.task, self.artifacts.keys(), last, not self.turns)
        self.turns.append(
            {
                "faults": turn["faults"],
                "order": turn["order"],
                # For R_format: different words thought, whether a reply is forged anywhere, and
                # what is wrong with the thought, if anything is.
                "thought": sum(not word.isdigit() for word in content_words(thoughts)),
                "forged": bool(FORGED_REPLY.search(text)),
                **({"idle": idle} if idle else {}),
            }
        )
        if turn["plan"] is not None:
            self.plans.append({"turn": len(self.turns), "plan": turn["plan"]})
            if len(self.turns) == 1:
                self.plan = turn["plan"]
        return turn

    def why_ended(self, turn: dict) -> str | None:
        """What ends the episode with this turn: answer, malformed, max_turns; or None."""
        if turn["answer"] is not None:
            return "answer"
        if not turn["calls"] or self.errors >= load_defaults()["max_errors"]:
            return "malformed"
        if len(self.turns) >= self.rollout.max_turns:
            return "max_turns"
        return None

    def call(self, call: dict, there: dict[str, dict] | None = None) -> dict:
        """Run one call as parse_utpc found it; keeps the outcome in `calls`, returns the reply.

        there: the artifacts that it may name, by id. Without them the call is a turn of its own.
        Whatever happens to the call, nothing but its record and the clock changes unless it
        succeeds; a service that deviates may bill a failed one (lib/dials.py).
        """
        if there is None:
            there, self.turn_began = self.artifacts, self.virtual_s
        if not call["error"] and not is_json([call["name"], call["arguments"]]):
            call = {"name": None, "arguments": None, "error": "the call is not JSON"}
        outcome = {
            "turn": len(self.turns),
            "name": call["name"],
            "arguments": call["arguments"],
            "status": "ok",
            "error": None,
            "outputs": [],
            "virtual_s": 0.0,
            "price_usd": 0.0,
        }
        # Where this call deviates, if it does: "observation", "action", "transition", "reward".
        part = None
        if self.rollout.fidelity < 1:
            part = deviating_part(self.rollout, self.seed, len(self.calls), call)
        try:
            if part == "action":
                refuse_settings(call)
            tool = self.find_tool(call)
            reply = self.run_tool(tool, call["arguments"], there, outcome, part)
        except ToolError as error:
            reply = self.error_reply(error, outcome, part)
        self.calls.append(outcome)
        return told_otherwise(reply) if part == "observation" else reply

    def find_tool(self, call: dict) -> dict:
        """The entry of the tool that a call names. ToolError if it cannot be called."""
        if self.errors >= load_defaults()["max_errors"]:
            message = f"{self.errors} calls of this episode failed; it ends here"
            refuse(None, message, "too_many_errors")
        if call["error"]:
            refuse(None, call["error"], "bad_call")
        if call["name"] not in self.pool:
            known = f"the tools are {', '.join(self.pool):.300}"
            refuse("name", f"no tool {to_json(call['name']):.40} here; {known}", "unknown_tool")
        return load_tools()[call["name"]]

    def error_reply(self, error: ToolError, outcome: dict, part: str | None) -> dict:
        """The reply to a call that failed, in the service's manner; it takes time as well.

        A service that deviates (`part`) gives another failure instead, or bills this one.
        """
        self.errors += 1
        code, param, message, retryable = error.args
        if part == "transition":
            code, param, retryable = "service_error", None, True
            message = "internal error, try again"
        elif part == "reward":
            outcome["price_usd"] = other_price(0)
            self.price_usd = round(self.price_usd + outcome["price_usd"], 6)
        if code in load_defaults()["invalid"]:
            message = load_tools()[outcome["name"]]["provider"]["invalid"] + message
        outcome["status"] = "error"
        outcome["error"] = {
            "code": code,
            "param": param,
            "message": message,
            "retryable": retryable,
        }
        outcome["virtual_s"] = outcome["virtual_s"] or load_defaults()["refused_s"]
        self.virtual_s = max(self.virtual_s, round(self.turn_began + outcome["virtual_s"], 3))
        return {"error": outcome["error"]}

    def run_tool(
        self, tool: dict, written: dict, there: dict, outcome: dict, part: str | None
    ) -> dict:
        """Check the arguments, fail as services fail, make the outputs and file them (Sec. 4.3.1:
        parameter validation, state transitions, output specifications). Returns the reply.

        written: the arguments as the agent wrote them; there: what they may name; outcome: what
        `call` keeps, to be filled in; part: where the service deviates (lib/dials.py). ToolError
        for every refusal and failure; the episode's state changes after the last of them.
        """
        check_schema(written, tool["parameters"], "")
        args = {**tool["blank"], **written}
        parents = find_media(there, self.artifacts, tool, args)
        for rule in broken(tool["rules"], args):
            message = rule["message"].format_map(args)
            refuse(rule["param"], message, rule.get("code", "invalid_parameter"))
        self.moderate(tool, args)

        outputs, more = BEHAVIOURS[tool["behaviour"]](self, tool, args)
        args["made"] = outputs
        for note in broken(tool["notes"], args):
            more.setdefault("warning", note["message"].format_map(args))

        given = [there[parent["id"]] for parent in parents]
        start = self.turn_began
        self.check_limits(tool, args, start)
        self.fail_by_accident(tool, outcome)
        outputs, more = self.lose_outputs(tool, args, outputs, more)
        if part == "transition":
            fail_or_not(self.chance("fails"))
            outputs, more = deviate(outputs, more)

        seconds = bill(tool["virtual_seconds"], args, outputs, given, self.chance)
        outcome["virtual_s"] = round(seconds, 3)
        outcome["price_usd"] = round(bill(tool["price_usd"], args, outputs, given), 6)
        if part == "reward":
            outcome["price_usd"] = other_price(outcome["price_usd"])
        end = round(start + outcome["virtual_s"], 3)
        self.virtual_s = max(self.virtual_s, end)
        self.price_usd = round(self.price_usd + outcome["price_usd"], 6)
        self.todo = more.pop("todo", self.todo)
        # Once for each model that a limit counts, though several limits may count one.
        for model in dict.fromkeys(limit["of"] for limit in tool["limits"]):
            counted = (start, end, len(outputs))
            self.used.setdefault(model, []).extend([counted] * (2 if part == "reward" else 1))
        self.file_outputs(tool, written, parents, outputs, end)
        outcome["outputs"] = [output["id"] for output in outputs]
        return describe(tool["makes"], outputs, more)

    def file_outputs(
        self, tool: dict, written: dict, parents: list[dict], outputs: list[dict], made_s: float
    ) -> None:
        """Give new artifacts their ids, their files and their origin, and keep them."""
        kind = tool["makes"]
        count = self.counts.get(kind, 0)
        self.counts[kind] = count + len(outputs)
        # A seed shows the same pictures again.
        key = f"{written['seed']} {written['prompt']}" if "seed" in written else f"{kind} {count}"
        files = self.stand_ins(kind, key, len(outputs))
        # A share of what is generated has a flaw; made again by its seed, it has it again.
        flaw_share = 0
        if tool["behaviour"] in ("generate", "pipeline"):
            flaw_share = load_defaults()["flaw_share"] * self.failure_scale
        for i, (output, file) in enumerate(zip(outputs, files), count + 1):
            if flaw_share and chance(self.seed, f"{key} {i - count}", "flaw") < flaw_share:
                output["flawed"] = True
            output["id"] = f"{load_defaults()['kinds'][kind]['prefix']}_{i}"
            output["tool"] = tool["name"]
            output["arguments"] = written
            output["media"] = file
            output["made_s"] = made_s
            output["parents"] = parents
            self.artifacts[output["id"]] = output

    # The four ways in which a service fails a call that is well-formed. The paper gives no failure
    # rates: these and their rules are ours, by tools.yaml. Moderation and limits are rules of the
    # service and hold at every failure_scale; accidents scale, a wrong verdict among them.
    def moderate(self, tool: dict, args: dict) -> None:
        """Refuse a prompt as the provider's moderation would: the same prompt always gets the same
        verdict, right or wrong."""
        provider, defaults = tool["provider"], load_defaults()
        categories = list(provider["screens"])
        for param, further in tool["also_screened"].items():
            categories += further.get(args[param], ())
        for param in tool["screened"]:
            text = args[param] or ""
            verdict = None
            for category in categories:
                if hit := defaults["blocked_words"][category].search(text):
                    verdict = category, hit[0]
            if text and not verdict:
                false_share = defaults["false_block"] * self.failure_scale
                if chance("", provider["blocked"], text) < false_share:
                    longest = max(re.findall(r"\w+", text), key=len, default="")
                    verdict = "other", longest[:20]
            if verdict:
                category, word = verdict
                code = provider.get("codes", {}).get(category)
                message = provider["blocked"].format(code=code, category=category, word=word)
                refuse(param, message, "content_blocked")

    def check_limits(self, tool: dict, args: dict, start: float) -> None:
        """Refuse a call above a rate limit, the most jobs at a time, or a used-up pack, by the
        virtual clock. All but the pack end by waiting."""
        for limit in tool["limits"]:
            used = self.used.get(limit["of"], ())
            wanted = 1
            if "jobs" in limit:
                most = limit["jobs"]
                amount = sum(end > start for _, end, _ in used)
            else:
                opens = start - limit["window_s"]
                recent = [n_outputs for began, _, n_outputs in used if began > opens]
                if "items" in limit:
                    most, amount, wanted = limit["items"], sum(recent), int(args["n"])
                else:
                    most, amount = limit["calls"], len(recent)
            if amount + wanted > most:
                ends_by_waiting = limit["code"] != "quota_exhausted"
                refuse(None, limit["message"], limit["code"], ends_by_waiting)

    def fail_by_accident(self, tool: dict, outcome: dict) -> None:
        """Fail a share of calls, from the episode's seed and the number of the call. A retry mends
        it. Of several steps any may fail; a timeout takes as long as a call can."""
        defaults, steps = load_defaults(), tool["steps"]
        timeout_share, failure_share = (
            self.failure_scale * len(steps) * share for share in defaults["failures"][tool["call"]]
        )
        if not failure_share:
            return
        chance = self.chance("failure")
        if chance >= failure_share:
            return
        step = steps[int(chance / failure_share * len(steps))]
        code = "timeout" if chance < timeout_share else "service_error"
        if code == "timeout":
            args = {**tool["blank"], **outcome["arguments"]}
            longest = bill(tool["virtual_seconds"], args, chance_of=lambda purpose: 1 - 1e-9)
            outcome["virtual_s"] = round(longest, 3)
        where = f"step {step}: " if step else ""
        refuse(None, where + tool["provider"][code], code, True)

    def lose_outputs(
        self, tool: dict, args: dict, outputs: list[dict], more: dict
    ) -> tuple[list[dict], dict]:
        """Filter a share of the outputs: the rest comes with a warning in `more`. If none is left,
        the call has failed."""
        loss = tool["no_output"]
        share = loss["per_item"]
        if "asks_text" in loss:
            asks_text = load_defaults()["asks_text"]
            if re.search(asks_text, args["prompt"], re.IGNORECASE):
                share = loss["asks_text"]
        share *= self.failure_scale
        if not share:
            return outputs, more
        kept = [output for i, output in enumerate(outputs) if self.chance(f"item {i}") >= share]
        if len(kept) == len(outputs):
            return outputs, more
        n_lost = len(outputs) - len(kept)
        message = loss["message"].format(k=len(kept), n=len(outputs), lost=n_lost)
        if not kept:
            refuse(None, message, "no_output", True)
        return kept, {**more, "warning": message}

    def trajectory(self) -> dict:
        """The Trajectory record; `reward` is filled by rewards.py."""
        record = {
            "task": self.task,
            "messages": self.messages,
            "calls": self.calls,
            "plan": self.plan,
            "plans": self.plans,
            "answer": self.answer,
            "ended": self.ended,
            "seed": self.seed,
            "turns": self.turns,
            "virtual_s": self.virtual_s,
            "price_usd": self.price_usd,
        }
        # Copies, one level deep: the episode may go on.
        record = {name: copy.copy(value) for name, value in record.items()}
        return {**record, "artifacts": list(self.artifacts.values()), "reward": {}}


def tool_message(reply: dict) -> dict:
    """A reply as a message. What it quotes cannot open or close a turn, as text or as a token."""
    content = to_json(reply).replace("<|", "< |")
    return {"role": "tool", "content": FORGED_TAG.sub(r"\\u003c", content)}


# ------------------------------------------------------------------------ console, audit, speed
def studio(**rollout: Any) -> VisGenEnv:
    """An episode with the media of `defaults.studio`, without failures and without an end of turns
    unless `rollout` says otherwise. By its seed, the first call meets no accident at scale 1."""
    env = VisGenEnv(RolloutConfig(**{"failure_scale": 0, "max_turns": 10**9, **rollout}))
    inputs = load_defaults()["studio"]
    env.reset({"id": "studio", "request": "Make what you like.", "inputs": inputs}, seed=1)
    return env


def read_cases() -> list[dict]:
    """The cases of data/fidelity.jsonl: a tool's arguments, and what the real service would do."""
    text = (ROOT / "data/fidelity.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def call_of(case: dict) -> dict:
    """A case as parse_utpc would find its call."""
    return {"name": case["tool"], "arguments": case["arguments"], "error": None}


# Of audit()'s table: where the cases of a mark are counted.
COLUMN_OF_MARK = {"D": 0, "S": 0, "T": 0, "A": 2, "M": 2, "P": 4}


def audit() -> tuple[dict[str, list[int]], list[str]]:
    """C_tool, the simulator's fidelity, as the share of cases that it gets right.

    Returns ({tool: [right, all, right, all, right, all]}, deviations in words): of documented cases
    (marks D, S and T), which make C_tool; of assumed ones (A and M); and of disputed ones (P). Of
    those, two hosts of a service, or two of its documents, say different things: `source` names
    both, and the case expects what the simulator follows.
    """
    table = {name: [0, 0, 0, 0, 0, 0] for name in load_tools()}
    deviations = []
    for case in read_cases():
        got = play_case(case)
        expected = case["expect"]
        wrong = {field: got.get(field) for field in expected if got.get(field) != expected[field]}
        column = COLUMN_OF_MARK[case["mark"]]
        row = table[case["tool"]]
        row[column] += not wrong
        row[column + 1] += 1
        if wrong:
            call = f"{case['tool']} {to_json(case['arguments']):.90} ({case['source']})"
            deviations.append(f"{call}: {expected}, got {wrong}")
    return table, deviations


def play_case(case: dict) -> dict:
    """All that came of a case's call: the fields of the first artifact, the outcome, the reply."""
    env = studio(failure_scale=case["failure_scale"])
    reply = env.call(call_of(case))
    ids, error = reply.get("ids", ()), reply.get("error", {})
    artifact = env.artifacts[ids[0]] if ids else {}
    return {
        **artifact,
        **env.calls[-1],
        **reply,
        **error,
        "error": error.get("code"),
        "count": len(ids),
        "warning": "warning" in reply,
    }


def print_tools() -> None:
    """`--tools`: Table 9 with each tool's signature."""
    print(fill_template("templates/tools.jinja", tools=load_tools(), signature=tool_signature))


def print_audit() -> None:
    """`--audit`: the table of audit(), then every deviation."""
    table, deviations = audit()
    table["all"] = [sum(column) for column in zip(*table.values())]
    print(fill_template("templates/audit.jinja", table=table, deviations=deviations))


def print_speed() -> None:
    """`--speed`: calls per second of CPU time, by `call` alone and by `step`, with the agent's text
    read and the replies written, six calls a turn."""
    cases = []
    for case in read_cases():
        if not case["failure_scale"] and len(to_json(case["arguments"])) <= 300:
            cases.append(case)
    for kind in ("valid", "refused"):
        chosen = [case for case in cases if ("error" in case["expect"]) == (kind == "refused")]
        calls = [call_of(case) for case in chosen]
        written = [{"name": case["tool"], "arguments": case["arguments"]} for case in chosen]
        blocks = [tag("tool_call", call) for call in written]
        # Six a turn, dealt out so that no turn has many calls of one tool: a service takes so many
        # jobs at once.
        n_turns = math.ceil(len(blocks) / 6)
        turns = ["<think>Go.</think>" + "".join(blocks[i::n_turns]) for i in range(n_turns)]
        print_rate(VisGenEnv.call, calls, kind)
        print_rate(VisGenEnv.step, turns, kind)
        n_tools = len({call["name"] for call in calls})
        print(f"         the mix: {len(calls)} cases of data/fidelity.jsonl, of {n_tools} tools")


def print_rate(act: Callable, given: list, kind: str, seconds: float = 2.0) -> None:
    """One line: how fast `act` goes through all that is given, in the best round of `seconds`, each
    on a new episode, so that no limit of a service is reached. SystemExit if a call ends as none of
    its kind does, because then something else was measured."""
    rounds = []
    while sum(rounds) < seconds:
        env = studio()
        # This is no episode: ten refusals must not end it.
        env.errors = -(10**9)
        began = time.process_time()
        for item in given:
            act(env, item)
        rounds.append(time.process_time() - began)
    status = "error" if kind == "refused" else "ok"
    for call in env.calls:
        if call["status"] != status:
            raise SystemExit(f"error: a call to be timed as {kind} was not: {to_json(call):.300}")
    rate = len(env.calls) / min(rounds)
    best = f"in the best of {len(rounds)} rounds"
    print(f"{rate:8.0f} {kind} calls/s by `{act.__name__}`, {best}")


HINT = 'Type a call such as  tool_text2image_gpt {"prompt": "a fox"}  or  help  or  quit.'
HELP = """A line is a tool's name and its arguments as JSON:
    tool_text2image_gpt {"prompt": "a fox"}
    tool_text2video_veo {"prompt": "a fox", "duration": 8}
help TOOL shows the arguments of one; `python env.py --tools` prints all; quit or Ctrl-D ends.
The tools: """


def console() -> None:
    """Without a switch: read `tool {"argument": ...}` from the keyboard; show the reply, the new
    media, the clock and the bill."""
    env = studio(failure_scale=1.0)
    print(env.messages[1]["content"], f"\n{HINT}")
    for line in filter(None, map(str.strip, sys.stdin)):
        if line in ("quit", "exit") or env.ended:
            return
        if line.split()[0] in ("help", "?"):
            print_help(line.split()[1:])
            continue
        name, _, arguments = line.partition(" ")
        call = f'{{"name": {to_json(name)}, "arguments": {arguments or "{}"}}}'
        replies, *_ = env.step(tag("think", ".") + tag("tool_call", call))
        print(*[reply["content"] for reply in replies], sep="\n")
        for media_id in env.calls[-1]["outputs"]:
            print("   ", shown_fields(env.artifacts[media_id]))
        bill_line = f"    clock {env.virtual_s:.1f} s, bill ${env.price_usd:.3f}"
        over = "(the episode is over)" if env.ended else ""
        print(f"{bill_line}, failed calls {env.errors}", over)


def print_help(names: list[str]) -> None:
    """How to write a line of the console, or the signature of the tools named."""
    for name in names:
        print(tool_signature(name) if name in load_tools() else f"no tool {name}")
    if not names:
        print(HELP + ", ".join(load_tools()))


def shown_fields(artifact: dict) -> dict:
    """The fields of an artifact that hold something, but those that repeat the call."""
    return {
        name: value
        for name, value in artifact.items()
        if value not in (None, [], {}) and name not in ("arguments", "tool")
    }


def main() -> None:
    """A console, or with a switch a table."""
    parser = argparse.ArgumentParser(
        description="A console on one episode of VisGenEnv; with a switch, a table instead."
    )
    switches = {
        "--tools": (print_tools, "the 36 tools"),
        "--audit": (print_audit, "C_tool by data/fidelity.jsonl"),
        "--speed": (print_speed, "tool calls per second on this core"),
    }
    parser.set_defaults(show=console)
    for switch, (show, doc) in switches.items():
        parser.add_argument(switch, dest="show", action="store_const", const=show, help=doc)
    parser.parse_args().show()


if __name__ == "__main__":
    run_command(main)
