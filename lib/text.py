"""lib.text."""

import json

import jinja2
import orjson

from lib.runs import ROOT

ENCODER = json.JSONEncoder(
    ensure_ascii=False, check_circular=False
)  # what is written here holds no cycles
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(ROOT / "data"), auto_reload=False)


# ---------------------------------------------------------------------------- the tools as data
def to_json(obj):
    """The one JSON style of this project, for what the agent writes and what it reads."""
    return ENCODER.encode(obj)


def fill_template(path, **names):
    """A template of data/, filled in."""
    return PAGES.get_template(path).render(names).strip()


MAX_DEPTH, MAX_NODES = (
    32,
    10_000,
)  # of a block of JSON: no call needs more, and copying much deeper ones would exhaust Python's stack


def clean(text):
    """The text without lone surrogates, which no file and no tokenizer can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def read_json(text):
    """Strict JSON -> value; of a key written twice, the last one counts. ValueError for bad JSON, NaN, lone surrogates and too much nesting."""
    nodes = text.count("[") + text.count("{")
    value = orjson.loads(text) if nodes <= MAX_NODES else None
    level = [value] if nodes > MAX_DEPTH else []
    for _ in range(MAX_DEPTH if level else 0):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if level or nodes > MAX_NODES:
        raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_NODES} lists and objects")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The general part of PST (Table 7): generated here, or read from the hub
def tag(name, body):
    """One UTPC block."""
    return f"<{name}>{body if isinstance(body, str) else to_json(body)}</{name}>"
