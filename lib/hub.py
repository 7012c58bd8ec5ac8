"""The general part of PST's data from the hub: the paper's data sets of Table 7, each by its form.

Used with `data.general_source: hub`; data/general_datasets.yaml lists the sets.
"""

import ast
import json
import re
from itertools import accumulate

import yaml

from lib.experiment import Config
from lib.runs import ROOT, seeded_rng
from lib.text import tag

# In a message, these would end it for a tokenizer of the configs here (Qwen's has all of them).
# What else the policy's own takes for one shows when PST encodes, and is skipped and counted there.
# Not every <|...|>: ms_agent writes <|startofthink|>, which is text to them.
CONTROL = re.compile(
    r"<\|(?:endoftext|im_(?:start|end)|fim_(?:prefix|middle|suffix|pad)|repo_name|file_sep"
    r"|(?:vision|image|video)_(?:start|end|pad)|(?:object_ref|box|quad)_(?:start|end))\|>"
)

# What the data sets call the speaker of a turn -> the role of a chat message.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function-call": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function-response": "tool",
    "function_response": "tool",
}


def hub_general(config: Config, sources: list[dict] | None = None) -> list[dict]:
    """`data.general` examples {"messages", "tools", "kind"} of Table 7's data sets, streamed with
    `datasets`, in shares by the paper's quantities, no conversation twice, shuffled.

    `sources` (for tests): [{load: {arguments of load_dataset}, form, weight, kind}]; by default
    those of data/general_datasets.yaml, which may give `hub`, a name there, in place of `load`.
    Records that cannot be read and copies are skipped and counted, and a set that ends short of its
    share is said. SystemExit if a set cannot be loaded or does not read as its form.
    """
    sources = sources or read_sources()
    whole = sum(source["weight"] for source in sources)
    ends = [
        config.data.general * weight / whole
        for weight in accumulate(source["weight"] for source in sources)
    ]
    items, seen = [], set()
    for source, begin, end in zip(sources, [0, *ends], ends):
        share = round(end) - round(begin)  # so that the rounded shares add up
        items += read_source(source, share, config.seed, seen)
    seeded_rng(config.seed, "hub").shuffle(items)
    return items


def read_sources() -> list[dict]:
    """The data sets of data/general_datasets.yaml."""
    text = (ROOT / "data" / "general_datasets.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["datasets"]


def check_sources(config: Config) -> None:
    """SystemExit if the config takes general data from the hub, and a data set cannot be loaded."""
    if config.data.general_source == "hub":
        for source in read_sources():
            open_stream(source, source.get("hub") or source["load"])


def read_source(source, share, seed, seen):
    """`share` examples of one data set, or as many as it has. `seen`: the conversations so far, as
    texts; it grows."""
    name = source.get("hub") or source["load"]
    items, unreadable, copies = [], 0, 0
    for record in open_stream(source, name).shuffle(seed=seed, buffer_size=2000):
        if len(items) >= share:
            break
        try:
            # A JSONL set read as lines (`load: {path: text, ...}`) loses a broken line; read as
            # JSON it would lose all that follows.
            record = json.loads(record["text"]) if set(record) == {"text"} else record
            messages, tools = to_messages(record, source["form"])
        except ValueError as e:
            unreadable += 1
            if unreadable > 100 + share - len(items):
                raise SystemExit(f"error: {name} does not read as `{source['form']}`: {e}") from e
            continue
        text = " ".join(" ".join(message["content"] for message in messages).lower().split())
        if text in seen:
            copies += 1
            continue
        seen.add(text)
        items.append({"messages": messages, "tools": tools, "kind": source["kind"]})
    short = share - len(items)
    print(
        f"  {name}: {unreadable} unreadable records and {copies} copies skipped"
        + (f"; it ended {short} short of its share" if short > 0 else "")
    )
    return items


def open_stream(source, name):
    """A data set as a stream of records. SystemExit if it cannot be loaded."""
    from datasets import load_dataset

    try:
        load = source.get("load") or {"path": source["hub"]}
        return load_dataset(**load, split="train", streaming=True)
    except Exception as e:
        # Offline, a wrong name, a gated set, a script: `datasets` has an exception for each.
        fault = f"{type(e).__name__}: {' '.join(str(e).split()):.200}"
        raise SystemExit(
            f"error: {name} cannot be loaded ({fault}); "
            "give it a `load:` of its own in data/general_datasets.yaml, such as "
            "{path: text, data_files: FILES}, or take it out there"
        ) from e


def to_messages(record: dict, form: str) -> tuple[list[dict], list[dict] | None]:
    """A hub record as (messages, tools). Forms: alpaca, sharegpt, xlam.

    ValueError: the record is not of that form, or no dialogue to train on. M3IT's pictures are left
    out: the policies here read text.
    """
    tools = None
    try:
        if form == "alpaca":
            messages = alpaca_messages(record)
        elif form == "sharegpt":
            messages = sharegpt_messages(record)
        else:
            messages, tools = xlam_messages(record)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, SyntaxError) as e:
        raise ValueError(f"not a {form} record: {e!r}") from e

    whole = messages and all(isinstance(m["content"], str) and m["content"] for m in messages)
    if not whole or messages[-1]["role"] != "assistant":
        raise ValueError(f"not a {form} record: keys {sorted(record)}")
    opener = next(m["role"] for m in messages if m["role"] != "system")
    if opener != "user" or any(CONTROL.search(m["content"]) for m in messages):
        raise ValueError("a dialogue that the user does not open, or with a control token in it")
    return messages, tools


def alpaca_messages(record):
    """A question in one or more columns, and its answer."""
    asked = [record.get(k) for k in ("instruction", "input", "inputs", "prompt", "question")]
    answers = [record.get(k) for k in ("output", "response", "answer", "outputs")]
    question = "\n".join(str(text) for text in asked if text)
    answer = next((text for text in answers if text), None)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sharegpt_messages(record):
    """Turns {from, value} or {role, content}; the system message may have a column of its own."""
    turns = record.get("conversations") or record.get("messages") or []
    if isinstance(turns, str):
        # ms_agent's card reads its column so; JSON strings of turns pass too.
        turns = ast.literal_eval(turns)
    if isinstance(turns, dict):
        # Columns of turns, as `datasets` once stored lists of records.
        turns = [
            {"from": role, "value": text}
            for role, text in zip(turns["from"], turns["value"], strict=True)
        ]
    columns = ("system", "system_message", "function_description")
    opening = "\n".join(record[k] for k in columns if record.get(k))
    if opening and turns[0].get("from", turns[0].get("role")) != "system":
        turns = [{"role": "system", "content": opening}, *turns]
    return [
        {
            "role": ROLES[turn.get("from", turn.get("role"))],
            "content": turn.get("value", turn.get("content")),
        }
        for turn in turns
    ]


def xlam_messages(record):
    """A query, the functions it may call, and the calls; as JSON in columns."""
    calls = json.loads(record["answers"])
    messages = [
        {"role": "user", "content": record["query"]},
        {"role": "assistant", "content": "\n".join(tag("tool_call", call) for call in calls)},
    ]
    return messages, [xlam_function(function) for function in json.loads(record["tools"])]


def xlam_function(function):
    """An xlam function as JSON Schema. xlam lists parameters flat; an argument without a default is
    required."""
    required = [name for name, param in function["parameters"].items() if "default" not in param]
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description", ""),
            "parameters": {
                "type": "object",
                "properties": function["parameters"],
                "required": required,
            },
        },
    }
