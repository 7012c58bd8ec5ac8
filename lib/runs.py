"""lib.runs."""

import hashlib
import json
import os
import random
import re
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# The run: its folder and files, its seeds, Ctrl-C
def write_atomic(path, text):
    """Write a text file so that it is there whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def open_run(config):
    """Create runs/<name>/ with the resolved config, or continue it; SystemExit if it belongs to another config.

    `bench` and `llm` may differ: what is measured, and whom the judge and VisionAgent ask.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise SystemExit(
            f"error: config key `name` is {config.name!r}; it names a folder under runs/: letters, digits, '.', '_' and '-'"
        )
    run = ROOT / "runs" / config.name
    resolved = asdict(config)
    path = run / "config.yaml"
    if path.is_file():
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, value in resolved.items():
            if section in ("bench", "llm") or there.get(section) == value:
                continue
            where, old, new = section, there.get(section), value
            if isinstance(value, dict) and isinstance(old, dict):
                inner = next(
                    k for k in {**value, **old} if old.get(k, "absent") != value.get(k, "absent")
                )
                where, old, new = (
                    f"{section}.{inner}",
                    old.get(inner, "absent"),
                    value.get(inner, "absent"),
                )
            raise SystemExit(
                f"error: {run.relative_to(ROOT)} belongs to another config: `{where}` is {old!r} there and {new!r} now; "
                f"give this run a name of its own (name=...) or remove the folder"
            )
    elif run.exists() and any(run.iterdir()):
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} is not empty and has no config.yaml; choose another name (name=...)"
        )
    else:
        write_atomic(path, yaml.safe_dump(resolved, sort_keys=False))
    return run


def write_jsonl(path, records):
    """Write records as JSON lines, whole or not at all."""
    write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_jsonl(path):
    """Read JSON lines. SystemExit names a missing file, or the line that is not JSON."""
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing; `python train_vrl.py --config ...` makes it")
    records = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise SystemExit(
                f"error: {path}, line {i} is not JSON ({e.msg}); remove the file to make it again"
            ) from e
    return records


def each_line(path, numbered=False):
    """The records of a JSONL file that people may have edited, one at a time; `numbered`: (line number, record). A line that is not JSON is
    reported with its number and skipped, and their number is said at the end. SystemExit for a missing file."""
    if not path.is_file():
        raise SystemExit(
            f"error: {path} is missing; `python make_data.py --help` says which command makes it"
        )
    bad = 0
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as e:  # UnicodeDecodeError among them
                bad += bool(line.strip())
                if line.strip():
                    print(
                        f"  {path}, line {n} is not JSON ({getattr(e, 'msg', None) or e}): skipped"
                    )
                continue
            yield (n, record) if numbered else record
    if bad:
        print(f"  {path}: {bad} broken lines skipped")


def cut_tail(path):
    """Take the last line off a JSONL file if a break cut it short; says so."""
    text = path.read_bytes() if path.is_file() else b""
    end = text.rfind(b"\n") + 1
    if end < len(text):
        print(f"{path}: the last line was broken off and is made again")
        os.truncate(path, end)


def append_jsonl(path, records):
    """Append records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def append_metrics(run, record):
    """Append one record to the run's metrics.jsonl."""
    append_jsonl(run / "metrics.jsonl", [record])


def digest(*parts, size=16):
    """2 x size hexadecimal digits that depend on the parts alone, the same in every process."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=size).hexdigest()


def seeded_rng(*parts):
    """A random.Random that depends on the parts alone."""
    return random.Random(int(digest(*parts, size=8), 16))


class StopSwitch:
    """Ctrl-C while it is entered only sets `on`, so that a step is finished and saved; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.on, self.main = False, threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, number, frame):
        self.on = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.before)
