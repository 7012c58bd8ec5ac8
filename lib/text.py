"""Text as every part of the project writes and reads it: JSON in one style, read strictly; the
templates of data/, filled in; and the blocks of UTPC (Sec. 3.1). No tools and no model."""

import json
from typing import Any

import jinja2
import orjson

from lib.runs import ROOT

# What is written here holds no cycles.
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(ROOT / "data"), auto_reload=False)

# The most levels, and lists and objects, of a JSON text (ours). No call needs more, and copying
# a much deeper one would exhaust Python's stack.
MAX_DEPTH = 32
MAX_NODES = 10_000


def to_json(value: Any) -> str:
    """The one JSON style of this project, for what the agent writes and what it reads."""
    return ENCODER.encode(value)


def read_json(text: str) -> Any:
    """The value of a text in strict JSON; of a key written twice, the last one counts.

    ValueError for bad JSON, NaN, lone surrogates, more than MAX_DEPTH levels, and more than
    MAX_NODES lists and objects. These are counted by their brackets before anything is read, so
    brackets inside of strings count too.
    """
    nodes = text.count("[") + text.count("{")
    value = orjson.loads(text) if nodes <= MAX_NODES else None
    if nodes > MAX_NODES or (nodes > MAX_DEPTH and is_too_deep(value)):
        raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_NODES} lists and objects")
    return value


def is_json(value: Any) -> bool:
    """Whether a value is what read_json could have read: no NaN, no lone surrogate, no tuple, no
    integer beyond 64 bits, and no more levels or nodes."""
    try:
        return read_json(orjson.dumps(value).decode()) == value
    except (TypeError, ValueError):
        return False


def is_too_deep(value: Any) -> bool:
    """Whether anything lies more than MAX_DEPTH levels inside of `value`; without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = []
        for node in level:
            if isinstance(node, dict):
                inside += node.values()
            elif isinstance(node, list):
                inside += node
        level = inside
    return bool(level)


def clean(text: str) -> str:
    """The text with `?` in place of lone surrogates, which no file and no tokenizer can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def fill_template(path: str, **names: Any) -> str:
    """A template of data/, filled in, without white space at its ends."""
    return TEMPLATES.get_template(path).render(names).strip()


def tag(name: str, body: Any) -> str:
    """One block of UTPC: a text as it is, anything else as JSON."""
    return f"<{name}>{body if isinstance(body, str) else to_json(body)}</{name}>"
