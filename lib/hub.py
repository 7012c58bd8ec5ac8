"""lib.hub."""

import ast
import json
import re
from itertools import accumulate

import yaml

from lib.runs import ROOT, seeded_rng
from lib.text import tag

CONTROL = re.compile(r"<\|(?:endoftext|im_start|im_end)\|>")


def to_messages(record, form):
    """A hub record as (messages, tools). Forms: alpaca, sharegpt, xlam. ValueError: the record is not of that form.

    M3IT's pictures are left out: the policies here read text."""
    try:
        if form == "alpaca":
            ask = "\n".join(
                str(record[k])
                for k in ("instruction", "input", "inputs", "prompt", "question")
                if record.get(k)
            )
            reply = next(
                (record[k] for k in ("output", "response", "answer", "outputs") if record.get(k)),
                None,
            )
            messages, tools = (
                [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}],
                None,
            )
        elif form == "sharegpt":
            roles = {
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
            turns = record.get("conversations") or record.get("messages") or []
            turns = (
                ast.literal_eval(turns) if isinstance(turns, str) else turns
            )  # ms_agent's card reads its column so; JSON strings of turns pass too
            if isinstance(
                turns, dict
            ):  # columns of turns, as `datasets` once stored lists of records
                turns = [
                    {"from": role, "value": text}
                    for role, text in zip(turns["from"], turns["value"], strict=True)
                ]
            opening = "\n".join(
                record[k]
                for k in ("system", "system_message", "function_description")
                if record.get(k)
            )
            turns = (
                [{"role": "system", "content": opening}]
                if opening and turns[0].get("from", turns[0].get("role")) != "system"
                else []
            ) + list(turns)
            messages, tools = (
                [
                    {
                        "role": roles[t.get("from", t.get("role"))],
                        "content": t.get("value", t.get("content")),
                    }
                    for t in turns
                ],
                None,
            )
        else:
            calls = json.loads(record["answers"])
            # xlam lists parameters flat; an argument without a default is required.
            tools = [
                {
                    "type": "function",
                    "function": {
                        "name": t["name"],
                        "description": t.get("description", ""),
                        "parameters": {
                            "type": "object",
                            "properties": t["parameters"],
                            "required": [
                                p for p, d in t["parameters"].items() if "default" not in d
                            ],
                        },
                    },
                }
                for t in json.loads(record["tools"])
            ]
            messages = [
                {"role": "user", "content": record["query"]},
                {"role": "assistant", "content": "\n".join(tag("tool_call", c) for c in calls)},
            ]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, SyntaxError) as e:
        raise ValueError(f"not a {form} record: {e!r}") from e
    if (
        not messages
        or not all(isinstance(m["content"], str) and m["content"] for m in messages)
        or messages[-1]["role"] != "assistant"
    ):
        raise ValueError(f"not a {form} record: keys {sorted(record)}")
    if next(m["role"] for m in messages if m["role"] != "system") != "user" or any(
        CONTROL.search(m["content"]) for m in messages
    ):
        raise ValueError("a dialogue that the user does not open, or with a control token in it")
    return messages, tools


def hub_general(config, sources=None):
    """data.general examples from Table 7's data sets, streamed with `datasets`, shares by the paper's quantities, no conversation twice.

    `sources` (tests): [{load: {...arguments of load_dataset}, form, weight, kind}]; default data/general_datasets.yaml. Records that cannot be read
    and copies are skipped and counted, and a set that ends short of its share is said. SystemExit if a set does not read as its form.
    """
    from datasets import load_dataset

    sources = (
        sources
        or yaml.safe_load((ROOT / "data" / "general_datasets.yaml").read_text(encoding="utf-8"))[
            "datasets"
        ]
    )
    items, seen, ends = (
        [],
        set(),
        [
            config.data.general * w / sum(s["weight"] for s in sources)
            for w in accumulate(s["weight"] for s in sources)
        ],
    )
    for s, begin, end in zip(sources, [0, *ends], ends):
        name, share, bad, copies = (
            s.get("hub") or s["load"],
            round(end) - round(begin),
            0,
            0,
        )  # the rounded shares add up
        try:
            stream = load_dataset(
                **(s.get("load") or {"path": s["hub"]}), split="train", streaming=True
            )
        except Exception as e:  # offline, a wrong name, a gated set, a loading script: `datasets` has an exception for each
            raise SystemExit(
                f"error: {name} cannot be loaded ({type(e).__name__}: {' '.join(str(e).split()):.200}); give it a `load:` of its own in "
                "data/general_datasets.yaml, such as {path: text, data_files: FILES}, or take it out there"
            ) from e
        for record in stream.shuffle(seed=config.seed, buffer_size=2000):
            if share <= 0:
                break
            try:
                # A JSONL set read as lines (`load: {path: text, ...}`) loses a broken line; read as JSON it would lose all that follows.
                record = json.loads(record["text"]) if set(record) == {"text"} else record
                messages, tools = to_messages(record, s["form"])
            except ValueError as e:
                bad += 1
                if bad > 100 + share:
                    raise SystemExit(f"error: {name} does not read as `{s['form']}`: {e}") from e
                continue
            said = " ".join(" ".join(m["content"] for m in messages).lower().split())
            if said in seen:
                copies += 1
                continue
            seen.add(said)
            items.append({"messages": messages, "tools": tools, "kind": s["kind"]})
            share -= 1
        print(
            f"  {name}: {bad} unreadable records and {copies} copies skipped"
            + (f"; it ended {share} short of its share" if share > 0 else "")
        )
    seeded_rng(config.seed, "hub").shuffle(items)
    return items
