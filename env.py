"""VisGenEnv: 36 simulated tools of visual creation (Sec. 4.3.1, Table 9); no model, no network, no torch.

What a tool does is in tools.yaml and tools.py; here are the agent's text (UTPC), the episode, and a console to play with it.
Nothing the agent writes can raise: each call gets one reply, and a refused call's reply says which parameter is wrong and what
would be right.
"""
import argparse
import copy
import json
import re
import time
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from tools import (BEHAVIOURS, INVALID, ROOT, RULES, ToolError, check, deviate, draw, find_media, latency, load_defaults, load_tools, micro,
                   record, refuse, row, show, sides, stretch, tally, template, to_json, tool_schemas, tool_signature, video,
                   whole)  # noqa: F401

TAGS = ("think", "plan", "tool_call", "answer")
MAX_TAGS = 2000     # of a turn; a megabyte of tags would otherwise give as many faults and replies
MAX_NODES = 10_000  # lists and objects in one block of JSON
MAX_DEPTH = 32      # no tool's arguments nest deeper, and copying much deeper ones would exhaust Python's stack

# ---------------------------------------------------------------------------- configuration
def key(default, doc):
    """A config key with its one-line explanation; lists and dicts get a fresh copy per instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})

@dataclass(frozen=True)
class RolloutConfig:
    """Section `rollout` of a config file: what the environment and the sampler are told."""
    tools: str = key("names", "how the system message lists the tools: schema, signature or names")
    tool_pool: str = key("task", "which tools the agent has: the task's pool (task) or all 36 (all)")
    max_turns: int = key(12, "turns after which an episode without an answer is cut off")
    failure_scale: float = key(1.0, "multiplies every failure rate of tools.yaml; 0 switches failures off")
    temperature: float = key(1.0, "of training rollouts, which come from the full softmax: no top-p, top-k or min-p")
    max_turn_tokens: int = key(448, "tokens after which an unfinished turn ends the episode as max_tokens")
    read_rows: int = key(32, "rows that the sampler's model reads at once when prompts and tool messages come in")
    fidelity: float = key(1.0, "C_tool of the simulator: 1 - fidelity of the calls deviate from the real service")

    def __post_init__(self):
        fine = {"tools": self.tools in ("schema", "signature", "names"), "tool_pool": self.tool_pool in ("task", "all"),
                "max_turns": self.max_turns >= 1, "fidelity": 0 <= self.fidelity <= 1, "failure_scale": self.failure_scale >= 0}
        for name in [name for name in fine if not fine[name]]:
            doc = self.__dataclass_fields__[name].metadata["doc"]
            raise ValueError(f"rollout.{name} cannot be {getattr(self, name)!r}: {doc}")

@lru_cache(maxsize=256)
def system_text(style, pool):
    """The system message for a pool of tool names; with `schema` the chat template itself lists the tools."""
    listing = {"names": " ".join(pool), "signature": "\n" + "\n".join(map(tool_signature, pool)), "schema": ""}[style]
    return template((ROOT / "data/prompts/system.jinja").read_text(encoding="utf-8")).render(tools_text=listing, brief=style == "names").strip()

@lru_cache(maxsize=1)
def media_files():
    """Files of the media database by kind; without a database, names that one would have."""
    index, suffix = ROOT / "data/media/index.jsonl", {"image": "png", "video": "mp4", "audio": "wav"}
    rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()] if index.exists() else []
    return {kind: [row["path"] for row in rows if row["kind"] == kind] or [f"{kind}/{i:04d}.{suffix[kind]}" for i in range(100)]
            for kind in suffix}

# ---------------------------------------------------------------------------- UTPC
TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z_ -]{0,23})>")
LOOKALIKES = {"think", "thinking", "thought", "plan", "planning", "toolcall", "toolcalls", "functioncall", "answer",
              "finalanswer", "toolresponse"}

def clean(text):
    """The text without lone surrogates, which no file and no tokenizer can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")

def unique_pairs(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return found

def no_constant(name):
    raise ValueError(f"{name} is not JSON")

DECODER = json.JSONDecoder(object_pairs_hook=unique_pairs, parse_constant=no_constant)

def read_json(text):
    """Strict JSON -> value. ValueError for bad JSON, duplicate keys, NaN, lone surrogates and deep nesting."""
    text = text.strip(" \t\r\n")
    nodes = text.count("[") + text.count("{")
    if nodes > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES} lists and objects")
    try:
        value, end = DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if end < len(text):
        raise ValueError(f"extra data after {end} characters")
    if "\\u" in text and (written := to_json(value)) != clean(written):
        raise ValueError("half of a surrogate pair in a string")
    if nodes <= MAX_DEPTH:
        return value
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, (dict, list))
                 for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")

def split_tags(text, fault):
    """[(tag, body, pos)] of a turn, in one pass. A tag that opens inside another one ends it, so that a lost closing tag
    costs one block and not the rest of the turn."""
    last_close = {}      # looked up once a name, and only if a tag opens inside another one
    blocks, opened, start, opened_at, outside = [], None, 0, 0, 0
    for match in islice(TAG.finditer(text), MAX_TAGS):
        (pos, end), (closing, name) = match.span(), match.groups()
        if name not in TAGS and (opened or re.sub("[_ -]", "", name.lower()) not in LOOKALIKES):
            continue
        if not opened and outside < pos and text[outside:pos].strip():
            fault("text_outside_tags", outside, "text outside the four tags")
        outside = end
        if opened and (name == opened or not closing):
            blocks.append((opened, text[start:pos], opened_at))
        if name not in TAGS:
            fault("unknown_tag", pos, f"<{name}> is none of <think>, <plan>, <tool_call>, <answer>")
        elif closing and name != opened:
            fault("stray_close", pos, f"</{name}> closes nothing")
        elif closing:
            opened = None
        else:
            if opened:
                if opened not in last_close:
                    last_close[opened] = text.rfind(f"</{opened}>")
                nested = opened != name and last_close[opened] > pos
                fault(*(("nested_tag", pos) if nested else ("unclosed_tag", opened_at)), f"<{name}> opens inside <{opened}>")
            opened, start, opened_at = name, end, pos
    if opened:
        blocks.append((opened, text[start:], opened_at))
        fault("unclosed_tag", opened_at, f"<{opened}> is not closed")
    elif text[outside:].strip():
        fault("text_outside_tags", outside, "text outside the four tags")
    return blocks

def parse_utpc(text):
    """What a turn says, and what is wrong with it (Sec. 3.1). Never raises; linear in len(text). Tags beyond MAX_TAGS are text.

    Returns {think [str], plan list|None, calls [{name, arguments, error, pos}], answer dict|None, order [tag], faults [{code,
    pos, message}]}. A call that cannot be read stays in `calls` with its error, because every call gets one reply. That a
    first turn lacks its plan is for the reader to see: the parser does not know the turn.
    """
    text = clean(text)
    found = {"think": [], "plan": None, "calls": [], "answer": None, "order": [], "faults": []}
    order = found["order"]

    def fault(code, pos, message):
        found["faults"].append({"code": code, "pos": pos, "message": f"{message:.160}"})

    for tag, body, pos in split_tags(text, fault):
        if (tag == "think") == bool(order) and "think" not in order:
            fault("wrong_order", pos, "a turn begins with <think>")
        elif (tag in ("plan", "answer") and found["calls"]) or (tag == "tool_call" and "answer" in order):
            fault("wrong_order", pos, "the plan comes before the calls, and an answer without any")
        if tag in order and tag != "tool_call":
            fault("duplicate_tag", pos, f"a second <{tag}> in one turn")
        value, error = None, f"<{tag}> is empty"
        if not body.strip():
            fault("empty_tag", pos, error)
        elif tag != "think":
            try:
                value = read_json(body)
                check(value, load_defaults()["utpc"][tag], tag)
                error = None
            except (ValueError, ToolError) as wrong:
                unread = isinstance(wrong, ValueError)
                error = f"the {tag} is not valid JSON: {wrong}" if unread else wrong.args[2]
                fault("bad_json" if unread else f"bad_{tag.removeprefix('tool_')}", pos, error)
        if tag == "think":
            found["think"].append(body.strip())
        elif tag == "tool_call":
            call = {"name": None, "arguments": None} if error else value
            call.update(error=error, pos=pos)
            found["calls"].append(call)
        elif not error and tag not in order:
            found[tag] = value
        order.append(tag)
    if not order:
        fault("wrong_order", 0, "a turn begins with <think>")
    return found

# ---------------------------------------------------------------------------- replies
FORGED = re.compile(r"<(?=/?(?:think|plan|tool_call|tool_response|answer)\b)")
PREFIX = {"image": "img", "video": "vid", "audio": "aud", "text": "txt", "html": "html", "data": "data"}

def disarm(text):
    """Text from outside cannot open or close a chat turn."""
    return text.replace("<|", "< |") if "<|" in text else text

def reply_text(reply):
    """A reply as JSON in which neither control tokens nor the four tags survive."""
    body = to_json(reply)
    return FORGED.sub(r"\\u003c", disarm(body)) if "<" in body else body

def describe(outputs, more, limit):
    """The reply's fields: ids, then attributes; one value if all outputs share it, else a list. Outputs are of one kind."""
    if not outputs:
        return more
    kind, columns = outputs[0]["kind"], {}
    if kind in ("image", "video"):
        columns["size"] = [f"{output['width']}x{output['height']}" for output in outputs]
    if kind in ("video", "audio"):
        columns["duration_s"] = [output["duration_s"] for output in outputs]
    if kind == "video":
        columns["sound"] = [output["has_audio"] for output in outputs]
    if kind == "text":
        columns["text"] = [output["text"][:limit] + "..." * (len(output["text"]) > limit) for output in outputs]
    shown = {name: values[0] if values.count(values[0]) == len(values) else values for name, values in columns.items()}
    return {"ids": [output["id"] for output in outputs], **shown, **more}

# ---------------------------------------------------------------------------- the environment
class VisGenEnv:
    """One episode at a time, all state in the instance. Same seed, same calls: same replies. copy.deepcopy forks an episode."""
    def __init__(self, rollout=RolloutConfig()):
        self.rollout, self.scale, self.ended = rollout, rollout.failure_scale, "not started"

    def reset(self, task, seed):
        """Opening messages and info {"pool": names, "tools": schemas or None}. ValueError for a pool of unknown tools."""
        self.pool = list(task.get("pool") or load_tools()) if self.rollout.tool_pool == "task" else list(load_tools())
        if unknown := [name for name in self.pool if name not in load_tools()]:
            raise ValueError(f"task {task.get('id')}: its pool names {unknown}, which tools.yaml does not have")
        self.task, self.seed, self.ended = task, seed, None
        self.calls, self.turns, self.plans, self.plan, self.answer = [], [], [], None, None
        self.artifacts, self.counts, self.todo, self.used = {}, {}, {}, {}
        self.virtual_s, self.turn_began, self.price_usd, self.errors = 0.0, 0.0, 0.0, 0
        lines = [task["request"]] + [self.attach(f"in_{i + 1}", given) for i, given in enumerate(task.get("inputs") or [])]
        self.messages = [{"role": "system", "content": system_text(self.rollout.tools, tuple(self.pool))},
                         {"role": "user", "content": disarm(clean("\n".join(lines)))}]
        self.info = {"pool": self.pool, "tools": tool_schemas(self.pool) if self.rollout.tools == "schema" else None}
        return list(self.messages), self.info

    def attach(self, media_id, given):
        """A medium that the user attached becomes an artifact; returns the line that tells the agent about it."""
        kind, made = given["kind"], record(**{**given, "has_audio": given["kind"] == "audio"})
        if kind == "video":
            frames = whole(micro(given["duration_s"]), given.get("fps") or 24)
            made = video(*sides(given), stretch([1] * (given.get("shots") or 1), frames), given.get("fps") or 24,
                         bool(given.get("has_audio")), format=given.get("format", "mp4"))
        self.artifacts[media_id] = {**made, "id": media_id, "tool": "user", "media": self.stand_ins(kind, media_id)[0]}
        size = f" {made['width']}x{made['height']}" if kind in ("image", "video") else ""
        seconds = f" {made['duration_s']:.1f} s" if kind in ("audio", "video") else ""
        return f"[{media_id}: {kind}{size}{seconds}]" + (f" {made['text']}" if kind == "text" else "")

    def draw(self, purpose):
        """A number in [0, 1) from the episode's seed and the number of the current call."""
        return draw(self.seed, len(self.calls), purpose)

    def stand_ins(self, kind, key, n=1):
        """Files of the media database for n media: neighbours, so that they differ; the same key shows the same ones."""
        files = media_files().get(kind)
        if not files:
            return [None] * n
        first = int(draw(self.seed, key, "media") * len(files))
        return [files[(first + i) % len(files)] for i in range(n)]

    def step(self, text):
        """One turn of the agent -> (tool messages, one per call in order, 0.0, terminated, truncated, info). The reward is
        LtrReward's business, on the finished record. RuntimeError after the episode's end."""
        if self.ended:
            raise RuntimeError(f"the episode is over ({self.ended}); call reset first")
        turn = parse_utpc(text)
        self.messages.append({"role": "assistant", "content": clean(text)})
        self.turn_began = self.virtual_s     # the calls of one turn run side by side
        self.turns.append({"faults": turn["faults"], "order": turn["order"]})
        if turn["plan"] is not None:
            self.plans.append({"turn": len(self.turns), "plan": turn["plan"]})
            self.plan = turn["plan"] if len(self.turns) == 1 else self.plan
        replies = [{"role": "tool", "content": reply_text(self.call(call))} for call in turn["calls"]]
        self.messages += replies
        if turn["answer"] is not None:
            self.ended, self.answer = "answer", turn["answer"]
        elif not turn["calls"] or self.errors >= load_defaults()["max_errors"]:
            self.ended = "malformed"
        elif len(self.turns) >= self.rollout.max_turns:
            self.ended = "max_turns"
        return (replies, 0.0, self.ended in ("answer", "malformed"), self.ended == "max_turns",
                {"turn": len(self.turns), "ended": self.ended, "faults": turn["faults"]})

    def stop(self, ended):
        """End an episode from outside, such as by the sampler's `max_tokens`."""
        self.ended = self.ended or ended

    def call(self, call):
        """Run one parsed call, keep its record, and return the reply."""
        record = {"turn": len(self.turns), "name": call["name"], "arguments": call["arguments"], "status": "ok", "error": None,
                  "outputs": [], "virtual_s": 0.0, "price_usd": 0.0}
        deviates = self.rollout.fidelity < 1 and self.draw("fidelity") >= self.rollout.fidelity
        try:
            if self.errors >= load_defaults()["max_errors"]:
                refuse(None, f"{self.errors} calls of this episode failed; it ends here", "too_many_errors")
            if call["error"]:
                refuse(None, call["error"][:160], "bad_call")
            if call["name"] not in self.pool:
                names = ", ".join(self.pool[:10]) + f" and {len(self.pool) - 10} more" * (len(self.pool) > 10)
                refuse("name", f"no tool {show(call['name'])} here; the tools are {names}", "unknown_tool")
            reply = self.run(load_tools()[call["name"]], call["arguments"], record, deviates)
        except ToolError as error:
            self.errors += 1
            code, param, message, retryable = ("service_error", None, "internal error, try again", True) if deviates else error.args
            if code in INVALID:     # in the service's manner
                message = load_tools()[call["name"]]["provider"]["invalid"] + message
            record["status"], record["virtual_s"] = "error", record["virtual_s"] or load_defaults()["refused_s"]
            record["error"] = {"code": code, "param": param, "message": message, "retryable": retryable}
            reply = {"error": record["error"]}
            self.virtual_s = max(self.virtual_s, round(self.turn_began + record["virtual_s"], 3))
        self.calls.append(record)
        return reply

    def run(self, tool, written, record, deviates):
        """Validate, fail as services fail, make the outputs, file them. Raises ToolError."""
        args = {**tool["defaults"], **written}
        check(written, tool["parameters"], "")
        media, parents = find_media(self.artifacts, tool, args)
        for rule in tool["rules"]:
            if not RULES[rule["rule"]](tool, args, media):
                refuse(rule["param"], rule["message"].format(**{**args, **media}), rule.get("code", "invalid_parameter"))
        if self.scale:
            self.screen(tool, args)
        outputs, more = BEHAVIOURS[tool["behaviour"]](self, tool, args, media)
        parents = outputs[0]["parents"] if outputs and outputs[0]["parents"] else parents   # a page finds its own
        given = [self.artifacts[parent["id"]] for parent in parents]
        start = max(self.turn_began, *[artifact["made_s"] for artifact in given]) if given else self.turn_began   # it waits for them
        if self.scale:
            self.meter(tool, args, start)
        self.fail(tool, record)
        if self.scale and tool["no_output"]:
            outputs, more = self.lose(tool, args, outputs, more)
        if deviates:
            outputs, more = deviate(outputs, more)
        times = row(tool["virtual_seconds"], args)
        seconds = latency(times, self.draw("latency")) if "typical" in times else tally(times, args, outputs, given)
        record["virtual_s"], record["price_usd"] = round(seconds, 3), round(tally(tool["price_usd"], args, outputs, given), 6)
        end = round(start + seconds, 3)
        for limit in tool["limits"][:1]:
            self.used.setdefault(limit["of"], []).append((start, end, len(outputs)))
        if outputs:
            kind, count = outputs[0]["kind"], self.counts.get(outputs[0]["kind"], 0)
            self.counts[kind] = count + len(outputs)
            key = f"{args['seed']} {args['prompt']}" if "seed" in args else f"{kind} {count}"
            for i, (output, file) in enumerate(zip(outputs, self.stand_ins(kind, key, len(outputs))), count + 1):
                output.update(id=f"{PREFIX[kind]}_{i}", tool=tool["name"], arguments=written, media=file, made_s=end, parents=parents)
                self.artifacts[output["id"]] = output
            record["outputs"] = [output["id"] for output in outputs]
        self.virtual_s, self.price_usd = max(self.virtual_s, end), round(self.price_usd + record["price_usd"], 6)
        return describe(outputs, more, load_defaults()["reply_chars"])

    def screen(self, tool, args):
        """Moderation of the prompt: the same prompt always gets the same verdict, right or wrong."""
        provider, words = tool["provider"], load_defaults()["blocked_words"]
        more = [category for param, table in tool["also_screened"].items() for category in table.get(args[param], ())]
        for param in tool["screened"]:
            text, blocked = args.get(param) or "", None
            for category in provider["screens"] + more:
                if hit := words[category].search(text):
                    blocked = {"category": category, "word": hit[0]}
            if text and draw("", provider["blocked"], text) < load_defaults()["false_block"] * self.scale:
                blocked = blocked or {"category": "other", "word": max(re.findall(r"\w+", text), key=len, default="")[:20]}
            if blocked:
                code = provider.get("codes", {}).get(blocked["category"])
                refuse(param, provider["blocked"].format(code=code, **blocked), "content_blocked")

    def meter(self, tool, args, start):
        """Rate limits, jobs at a time, and used-up packs, by the virtual clock. Only the last does not end by waiting."""
        for limit in tool["limits"]:
            used = self.used.get(limit["of"], ())
            amount = sum(end > start if "jobs" in limit else (n if "items" in limit else 1) * (began > start - limit["window_s"])
                         for began, end, n in used)
            most = limit.get("jobs") or limit.get("calls") or limit["items"]
            if amount + (int(args["n"]) if "items" in limit else 1) > most:
                refuse(None, limit["message"], limit["code"], limit["code"] != "quota_exhausted")

    def fail(self, tool, record):
        """Failures that a retry mends, from the episode's seed and the number of the call; of several steps, any may fail."""
        if not self.scale:
            return
        steps = tool["steps"] or [""]
        timeout, transient = (load_defaults()[kind][tool["call"]] * self.scale * len(steps) for kind in ("timeout", "transient"))
        chance = self.draw("failure") if transient else 1.0
        if chance < timeout + transient:
            step = "step " * bool(tool["steps"]) + steps[int(chance / (timeout + transient) * len(steps))] + ": " * bool(tool["steps"])
            if chance < timeout:
                record["virtual_s"] = row(tool["virtual_seconds"], {**tool["defaults"], **record["arguments"]}).get("max", 60)
                refuse(None, step + tool["provider"]["timeout"], "timeout", True)
            refuse(None, step + tool["provider"]["transient"], "service_error", True)

    def lose(self, tool, args, outputs, more):
        """Items that were filtered or not made: the rest comes with a warning; if none is left, the call has failed."""
        loss, n = tool["no_output"], len(outputs)
        talks = "asks_text" in loss and re.search(load_defaults()["asks_text"], args["prompt"], re.IGNORECASE)
        chance = loss["asks_text" if talks else "per_item"] * self.scale
        kept = [output for i, output in enumerate(outputs) if self.draw(f"item {i}") >= chance]
        if len(kept) == n:
            return outputs, more
        message = loss["message"].format(k=len(kept), n=n, lost=n - len(kept))
        if not kept:
            refuse(None, message, "no_output", True)
        return kept, {**more, "warning": message}

    def trajectory(self):
        """The Trajectory record; `reward` is filled by rewards.py."""
        names = ("task", "messages", "calls", "plan", "plans", "answer", "ended", "seed", "turns", "virtual_s", "price_usd")
        state = {name: copy.copy(getattr(self, name)) for name in names}
        return {**state, "artifacts": list(self.artifacts.values()), "reward": {}}


# ---------------------------------------------------------------------------- console, table, audit, speed
def studio(**rollout):
    """An episode in which the media of `defaults.studio` are attached as in_1, in_2, ... With its seed, the first call meets no
    transient failure at scale 1, so that a case of moderation shows moderation."""
    env = VisGenEnv(RolloutConfig(**{"failure_scale": 0, "max_turns": 10 ** 9, **rollout}))
    env.reset({"id": "studio", "request": "Make what you like.", "inputs": load_defaults()["studio"]}, seed=1)
    return env

def read_cases():
    return [json.loads(line) for line in (ROOT / "data/fidelity.jsonl").read_text(encoding="utf-8").splitlines()]

def outcome(env, name, arguments):
    """What one call did, in the terms of data/fidelity.jsonl: the error's code and param, or the first output and the bill."""
    reply = env.call({"name": name, "arguments": arguments, "error": None})
    if "error" in reply:
        return {"error": reply["error"]["code"], "param": reply["error"]["param"]}
    made = [env.artifacts[i] for i in reply.get("ids", [])] or [{}]
    size = f"{made[0]['width']}x{made[0]['height']}" if made[0].get("width") else None
    return {**made[0], "count": len(reply.get("ids", [])), "size": size, "price_usd": env.calls[-1]["price_usd"],
            "virtual_s": env.calls[-1]["virtual_s"], "warning": "warning" in reply, **{k: v for k, v in reply.items() if k != "warning"}}

def audit():
    """C_tool by data/fidelity.jsonl: ({tool: [documented right, documented, assumed right, assumed]}, deviations in words)."""
    table, deviations = {name: [0, 0, 0, 0] for name in load_tools()}, []
    for case in read_cases():
        got = outcome(studio(failure_scale=case["failure_scale"]), case["tool"], case["arguments"])
        wrong = {name: got.get(name) for name, value in case["expect"].items() if got.get(name) != value}
        column = 2 * (case["mark"] not in "DST")
        table[case["tool"]][column] += not wrong
        table[case["tool"]][column + 1] += 1
        if wrong:
            deviations.append(f"{case['tool']} {to_json(case['arguments']):.90} ({case['source']}, {case['mark']}): {case['expect']}, got {wrong}")
    return table, deviations

def print_audit():
    """Print C_tool per tool and over all; documented are marks D, S and T of facts, assumed are M and A."""
    table, deviations = audit()
    table["all"] = [sum(column) for column in zip(*table.values())]
    print(f"{'C_tool':31} documented        assumed")
    for name, (good, n, good_a, n_a) in table.items():
        print(f"{name:31}", *(f"{a / b:6.3f} of {b:<4}" if b else f"{'-':14}" for a, b in ((good, n), (good_a, n_a))))
    print("\n".join(deviations))

def print_tools():
    for name, tool in load_tools().items():
        print(f"{name:29} {tool['category']:26} {tool['makes']:8} {tool['call']:6} {tool['stands_for']}\n    {tool_signature(name)}")

def print_speed(seconds=3.0, calls_a_turn=6):
    """Tool calls per second of CPU time on this core, parsing and reply text included: the best round, as other processes slow
    a shared machine's cores down, and the mean. The mix: the cases of data/fidelity.jsonl in order, without those that need
    failures or whose arguments exceed 300 characters, six calls a turn."""
    for words, refused in (("valid", False), ("refused", True)):
        cases = [case for case in read_cases() if ("error" in case["expect"]) == refused and not case["failure_scale"]
                 and len(to_json(case["arguments"])) <= 300]
        blocks = [f"<tool_call>{to_json({'name': case['tool'], 'arguments': case['arguments']})}</tool_call>" for case in cases]
        turns = ["<think>Go.</think>" + "".join(blocks[i:i + calls_a_turn]) for i in range(0, len(blocks), calls_a_turn)]
        rounds = []
        while sum(rounds) < seconds:
            env = studio()
            env.errors = -10 ** 9     # this is no episode: ten refusals must not end it
            began = time.process_time()
            for text in turns:
                env.step(text)
            rounds.append(time.process_time() - began)
        print(f"{len(cases) / min(rounds):8.0f} {words} calls/s in the best of {len(rounds)} rounds, {len(cases) * len(rounds) / sum(rounds):.0f} "
              f"in the mean; mix: {len(cases)} cases of {len({case['tool'] for case in cases})} tools, {calls_a_turn} calls a turn")

def typed_lines():
    """What is typed at the prompt, until `quit` or the end of the input."""
    line = ""
    while line != "quit":
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line and line != "quit":
            yield line

def console():
    """Read `tool {"argument": ...}` from the keyboard; show the reply, the new media, the clock and the bill."""
    env = studio(failure_scale=1.0)
    print(env.messages[1]["content"], '\nType a call such as  tool_text2image_gpt {"prompt": "a fox"}  or  quit.')
    for line in typed_lines():
        name, _, arguments = line.partition(" ")
        n_before = len(env.artifacts)
        replies, *_ = env.step(f'<think>.</think><tool_call>{{"name": {to_json(name)}, "arguments": {arguments or "{}"}}}</tool_call>')
        for reply in replies:
            print(reply["content"])
        for artifact in islice(env.artifacts.values(), n_before, None):
            print("   ", {k: v for k, v in artifact.items() if v not in (None, [], {}) and k not in ("arguments", "tool")})
        print(f"    clock {env.virtual_s:.1f} s, bill ${env.price_usd:.3f}, failed calls {env.errors}")
        if env.ended:
            print("The episode is over:", env.ended)
            return

def main():
    parser = argparse.ArgumentParser(description="A console on one episode of VisGenEnv; with a switch, a table instead.")
    switches = {"--tools": print_tools, "--audit": print_audit, "--speed": print_speed}
    for switch, doc in zip(switches, ("the 36 tools", "C_tool by data/fidelity.jsonl", "tool calls per second on this core")):
        parser.add_argument(switch, dest="show", action="store_const", const=switches[switch], default=console, help=doc)
    parser.parse_args().show()

if __name__ == "__main__":
    main()
