"""What the data are made from: the written scenarios, words, the general mix of PST (Table 7) and the tokenizer of a policy from scratch.

The general mix is generated here (`make_general`), or read from the hub by name (`hub_general`, data.general_source: hub).
"""

import hashlib

from lib.runs import seeded_rng
from lib.tasks import odd_words
from lib.text import tag, to_json


def general_item(rng, kind):
    """One general example: {"messages", "tools", "kind"}; the last message is the one right answer.

    arithmetic: sums, differences, products and the number of equal parts that reach a total; copy: words, said again;
    instruction: doubling, reversing, picking and looking up words; function: a call by a random JSON Schema (never one of the 36 tools).
    """
    tools = None
    if kind == "arithmetic":
        a, b = rng.randint(1, 40), rng.randint(1, 40)
        m, n = rng.randint(2, 9), rng.randint(2, 9)
        ask, reply = rng.choice(
            [
                (f"What is {a} + {b}?", f"{a} + {b} = {a + b}"),
                (f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}"),
                (f"What is {m} x {n}?", f"{m} x {n} = {m * n}"),
                (f"How many parts of {m} make {m * n}?", f"{n} x {m} = {m * n}, so {n}"),
            ]
        )
    elif kind == "copy":
        some, other = (" ".join(odd_words(rng, rng.randint(low, 14))) for low in (3, 0))
        ask, reply = (
            f"Repeat: {some}" + (f". Leave out: {other}" if rng.random() < 0.4 else ""),
            f": {some}",
        )
    elif kind == "instruction":
        some = odd_words(rng, rng.randint(3, 16))
        text, names = " ".join(some), ["color", "city", "pet", "day", "song", "tool"]
        pairs = dict(zip(rng.sample(names, 3), some))
        looked = rng.choice(list(pairs))
        ask, reply = rng.choice(
            [
                (f"Repeat twice: {text}", f": {text}, {text}"),
                (f"Write these words backwards: {text}", f": {' '.join(reversed(some))}"),
                (f"What is the last word? {text}", f": {some[-1]}"),
                (f"What is the first word? {text}", f": {some[0]}"),
                (f"How many words? {text}", f": {len(some)}"),
                (f"What comes after {some[0]}? {text}", f": {some[1]}"),
                (
                    f"Please write the {text} for {names[0]}, as JSON.",
                    to_json({names[0]: f"the {text}"}),
                ),
                (
                    "; ".join(f"{k} is {v}" for k, v in pairs.items()) + f". Which {looked}?",
                    f": {pairs[looked]}",
                ),
            ]
        )
    else:
        tools = []
        for _ in range(rng.randint(1, 2)):
            params = {
                odd_words(rng, 1)[0]: rng.choice(["string", "integer", "words"])
                for _ in range(rng.randint(1, 3))
            }
            tools.append((odd_words(rng, 1)[0] + "_" + odd_words(rng, 1)[0], params))
        name, params = rng.choice(tools)
        values = {
            p: rng.randint(0, 60)
            if t == "integer"
            else " ".join(["a", *odd_words(rng, 1 if t == "string" else 3)])
            for p, t in params.items()
        }
        ask = rng.choice(
            ["Call {f} with {v}.", "Please use {f}: {v}.", "{v} for {f}, please."]
        ).format(
            f=name,
            v=" and ".join(f"{p} {v}" for p, v in rng.sample(list(values.items()), len(values))),
        )
        tools = [
            {
                "type": "function",
                "function": {
                    "name": f,
                    "parameters": {
                        "type": "object",
                        "required": list(ps),
                        "properties": {
                            p: {"type": "integer" if t == "integer" else "string"}
                            for p, t in ps.items()
                        },
                    },
                },
            }
            for f, ps in tools
        ]
        reply = tag("tool_call", {"name": name, "arguments": values})
    return {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}],
        "tools": tools,
        "kind": kind,
    }


def make_general(config, n, split):
    """n offline general examples, kinds in the config's ratio; held-out questions never occur in training.

    A question belongs to one split by the digest of its text: every tenth is held out.
    """
    kinds = [
        k for k, w in config.data.general_kinds.items() for _ in range(w if split == "train" else 1)
    ]
    rng, items, seen = seeded_rng(config.seed, "general", split), [], set()
    for _ in range(200 * n + 1000):
        if len(items) == n:
            return items
        item = general_item(rng, kinds[len(items) % len(kinds)])
        text = item["messages"][0]["content"]
        held = int(hashlib.blake2b(text.encode(), digest_size=4).hexdigest(), 16) % 10 == 0
        if held == (split == "heldout") and (split == "train" or text not in seen):
            seen.add(text)
            items.append(item)
    raise SystemExit(
        f"error: config key `data.general_heldout`: no more than {len(items)} distinct held-out questions exist; lower it"
    )
