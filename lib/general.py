"""The general part of PST's data (Table 7), made offline: small questions with one right answer.

lib/hub.py reads the paper's own data sets in its place (data.general_source: hub). All kinds of
question, their wordings and shares are ours. Kind `reading` is lib/reading_exercises.py's.
"""

import hashlib

from lib.experiment import Config, DataConfig
from lib.reading_exercises import reading_exercise
from lib.runs import seeded_rng
from lib.scenarios import odd_words
from lib.text import tag, to_json


def make_general(config: Config, n: int, split: str, use: str = "general") -> list[dict]:
    """n general examples, kinds in the config's ratio; held-out questions never occur in training.

    A question belongs to one split by the digest of its text: every tenth is held out. Held-out
    questions are distinct; SystemExit where there are too few of them. `use`: what they are for;
    another use has other examples.
    """
    kinds = []
    for kind, weight in config.data.general_kinds.items():
        kinds += [kind] * (weight if split == "train" else min(weight, 1))
    rng = seeded_rng(config.seed, use, split)
    items, seen = [], set()
    for _ in range(200 * n + 1000):
        if len(items) == n:
            return items
        item = general_item(rng, kinds[len(items) % len(kinds)], config.data)
        question = item["messages"][0]["content"]
        hashed = hashlib.blake2b(question.encode(), digest_size=4).hexdigest()
        side = "heldout" if int(hashed, 16) % 10 == 0 else "train"
        if side == split and (split == "train" or question not in seen):
            seen.add(question)
            items.append(item)
    raise SystemExit(
        f"error: config key `data.general_heldout`: no more than {len(items)} distinct held-out "
        "questions exist; lower it"
    )


def general_item(rng, kind: str, data: DataConfig) -> dict:
    """One general example {"messages", "tools", "kind"}; its last message is the right answer.

    `kind`: arithmetic | copy | instruction | function, a function below each, or reading. `tools`
    is None, but for a function call. `data` limits what the requests of reading ask for.
    """
    tools = None
    if kind == "arithmetic":
        question, answer = arithmetic(rng)
    elif kind == "copy":
        question, answer = copy_words(rng)
    elif kind == "instruction":
        question, answer = instruction(rng)
    elif kind == "reading":
        question, answer = reading_exercise(rng, data)
    else:
        question, answer, tools = function_call(rng)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "tools": tools, "kind": kind}


def arithmetic(rng):
    """A sum, a difference, a product, or the number of equal parts that reach a total."""
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    m, n = rng.randint(2, 9), rng.randint(2, 9)
    return rng.choice(
        [
            (f"What is {a} + {b}?", f"{a} + {b} = {a + b}"),
            (f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}"),
            (f"What is {m} x {n}?", f"{m} x {n} = {m * n}"),
            (f"How many parts of {m} make {m * n}?", f"{n} x {m} = {m * n}, so {n}"),
        ]
    )


def copy_words(rng):
    """Words, said again; sometimes other words stand behind them, which are not to be said."""
    words = " ".join(odd_words(rng, rng.randint(3, 14)))
    others = " ".join(odd_words(rng, rng.randint(0, 14)))
    leave_out = f". Leave out: {others}" if rng.random() < 0.4 else ""
    return f"Repeat: {words}{leave_out}", f": {words}"


def instruction(rng):
    """Words doubled, turned round, picked, counted, written as JSON or looked up."""
    words = odd_words(rng, rng.randint(3, 16))
    text = " ".join(words)
    names = ["color", "city", "pet", "day", "song", "tool"]
    pairs = dict(zip(rng.sample(names, 3), words))
    asked = rng.choice(list(pairs))
    listed = "; ".join(f"{name} is {word}" for name, word in pairs.items())
    as_json = to_json({names[0]: f"the {text}"})
    return rng.choice(
        [
            (f"Repeat twice: {text}", f": {text}, {text}"),
            (f"Write these words backwards: {text}", f": {' '.join(reversed(words))}"),
            (f"What is the last word? {text}", f": {words[-1]}"),
            (f"What is the first word? {text}", f": {words[0]}"),
            (f"How many words? {text}", f": {len(words)}"),
            (f"What comes after {words[0]}? {text}", f": {words[1]}"),
            (f"Please write the {text} for {names[0]}, as JSON.", as_json),
            (f"{listed}. Which {asked}?", f": {pairs[asked]}"),
        ]
    )


def function_call(rng):
    """A call by the JSON Schema of one or two made-up functions (never one of the 36 tools)."""
    functions = []
    for _ in range(rng.randint(1, 2)):
        params = {}
        for _ in range(rng.randint(1, 3)):
            param = odd_words(rng, 1)[0]
            params[param] = rng.choice(["string", "integer", "words"])
        functions.append((odd_words(rng, 1)[0] + "_" + odd_words(rng, 1)[0], params))
    name, params = rng.choice(functions)
    values = {param: argument(rng, kind) for param, kind in params.items()}
    wording = rng.choice(["Call {f} with {v}.", "Please use {f}: {v}.", "{v} for {f}, please."])
    stated = [f"{param} {value}" for param, value in rng.sample(list(values.items()), len(values))]
    answer = tag("tool_call", {"name": name, "arguments": values})
    tools = [function_schema(name, params) for name, params in functions]
    return wording.format(f=name, v=" and ".join(stated)), answer, tools


def argument(rng, kind):
    """A value for an argument: a number, or an article with one word or three."""
    if kind == "integer":
        return rng.randint(0, 60)
    return " ".join(["a", *odd_words(rng, 1 if kind == "string" else 3)])


def function_schema(name, params):
    """A made-up function as a chat template's `tools` takes it; all its arguments are required."""
    properties = {
        param: {"type": "integer" if kind == "integer" else "string"}
        for param, kind in params.items()
    }
    schema = {"type": "object", "required": list(params), "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}
