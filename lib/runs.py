"""A run: its folder and files, its seeds, and Ctrl-C.

Text files are written whole or not at all, JSON lines are appended, and everything random comes
from `seeded_rng`, which gives the same numbers for the same parts in every process.
"""

import hashlib
import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


# --------------------------------------------------------------------------------------------------
# The run's folder
def open_run(config) -> Path:
    """Create runs/<name>/ with the resolved Config, or continue it.

    SystemExit if the folder belongs to another config. The sections `bench` and `llm` may differ:
    what is measured, and whom the judge and VisionAgent ask.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise SystemExit(
            f"error: config key `name` is {config.name!r}; it names a folder under runs/: "
            "letters, digits, '.', '_' and '-'"
        )
    run = ROOT / "runs" / config.name
    resolved = asdict(config)
    path = run / "config.yaml"
    if path.is_file():
        refuse_another_config(run, yaml.safe_load(path.read_text(encoding="utf-8")), resolved)
    elif run.exists() and any(run.iterdir()):
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} is not empty and has no config.yaml; "
            "choose another name (name=...)"
        )
    else:
        write_atomic(path, yaml.safe_dump(resolved, sort_keys=False))
    return run


def refuse_another_config(run: Path, there: dict, now: dict) -> None:
    """SystemExit with the first key in which the run's config and the one of now differ."""
    for section, new in now.items():
        old = there.get(section)
        if section in ("bench", "llm") or old == new:
            continue
        where = section
        if isinstance(new, dict) and isinstance(old, dict):
            name = first_difference(old, new)
            where = f"{section}.{name}"
            old, new = old.get(name, "absent"), new.get(name, "absent")
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} belongs to another config: "
            f"`{where}` is {old!r} there and {new!r} now; "
            "give this run a name of its own (name=...) or remove the folder"
        )


def first_difference(old: dict, new: dict) -> str:
    """The first key that two sections do not share with the same value."""
    for name in {**new, **old}:
        if old.get(name, "absent") != new.get(name, "absent"):
            return name
    raise ValueError("the two sections are the same")


# --------------------------------------------------------------------------------------------------
# Files
def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all, whoever else writes it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def json_lines(records: Iterable[Any]) -> str:
    """Records as JSON, one a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write records as JSON lines, whole or not at all."""
    write_atomic(path, json_lines(records))


def append_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Append records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json_lines(records))


def append_metrics(run: Path, record: dict) -> None:
    """Append one record to the run's metrics.jsonl."""
    append_jsonl(run / "metrics.jsonl", [record])


def read_jsonl(path: Path) -> list[Any]:
    """The records of a file that a script wrote.

    SystemExit names a missing file, or the line that is not JSON.
    """
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing; `python train_vrl.py --config ...` makes it")
    records = []
    # Not splitlines(): a string may hold U+2028 and the like, which is no end of a JSON line.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise SystemExit(
                f"error: {path}, line {number} is not JSON ({e.msg}); "
                "remove the file to make it again"
            ) from e
    return records


def each_line(path: Path, numbered: bool = False) -> Iterator[Any]:
    """The records of a JSONL file that people may have edited, one at a time.

    numbered: (line number, record) instead. A line that is not JSON is reported with its number and
    skipped, and how many there were is said at the end. SystemExit for a missing file.
    """
    if not path.is_file():
        raise SystemExit(
            f"error: {path} is missing; `python make_data.py --help` says which command makes it"
        )
    broken = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            # UnicodeDecodeError is a ValueError too, without `msg`.
            except ValueError as e:
                if line.strip():
                    broken += 1
                    reason = getattr(e, "msg", None) or e
                    print(f"  {path}, line {number} is not JSON ({reason}): skipped")
                continue
            yield (number, record) if numbered else record
    if broken:
        print(f"  {path}: {broken} broken lines skipped")


def cut_tail(path: Path) -> None:
    """Take the last line off a JSONL file if a break cut it short, and say so."""
    text = path.read_bytes() if path.is_file() else b""
    end = text.rfind(b"\n") + 1
    if end < len(text):
        print(f"{path}: the last line was broken off and is made again")
        os.truncate(path, end)


def drop_metrics(run: Path, unwanted: Callable[[dict], bool]) -> None:
    """Take lines out of the run's metrics.jsonl: what is done again must not stand there twice."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return
    records = read_jsonl(path)
    kept = [record for record in records if not unwanted(record)]
    if len(kept) < len(records):
        write_jsonl(path, kept)


# --------------------------------------------------------------------------------------------------
# Seeds
def digest(*parts, size: int = 16) -> str:
    """2 x size hexadecimal digits that depend on the parts alone, the same in every process."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=size).hexdigest()


def seeded_rng(*parts) -> random.Random:
    """A random.Random that depends on the parts alone."""
    return random.Random(int(digest(*parts, size=8), 16))


# --------------------------------------------------------------------------------------------------
# Ctrl-C
class StopSwitch:
    """Ctrl-C while it is entered only sets `on`, so that a step is finished and saved.

    A second Ctrl-C stops at once. Outside the main thread, where Python takes no signals, `on`
    stays False.
    """

    def __enter__(self):
        self.on = False
        self.in_main = threading.current_thread() is threading.main_thread()
        if self.in_main:
            self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, number, frame):
        self.on = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        if self.in_main:
            signal.signal(signal.SIGINT, self.before)
