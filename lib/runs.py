"""A run: its folder and files, its seeds, how a command ends, and Ctrl-C.

Text files are written whole or not at all, JSON lines are appended, and everything random comes
from `seeded_rng`, which gives the same numbers for the same parts in every process.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import random
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import orjson
import yaml

from lib.track import track

ROOT = Path(__file__).resolve().parents[1]
# What a run may go on under: what is measured, whom the judge and VisionAgent ask, who is told.
MAY_DIFFER = ("bench", "llm", "track")

# What the machine, not the code, can refuse, by the number that the system gives it.
DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}
NO_NETWORK = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ETIMEDOUT,
}
# Errors of the hub's client and of what it sends its requests by, as module and class.
HUB_ERRORS = (
    ("huggingface_hub.errors", "HfHubHTTPError"),
    ("huggingface_hub.errors", "OfflineModeIsEnabled"),
    ("huggingface_hub.errors", "LocalEntryNotFoundError"),
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("requests", "ConnectionError"),
)

Made = TypeVar("Made")


# --------------------------------------------------------------------------------------------------
# The run's folder
def open_run(config) -> Path:
    """Create runs/<name>/ with the resolved Config, or continue it.

    It is the first thing that a command writes, so whatever may refuse the command comes before.
    SystemExit as find_run.
    """
    run = find_run(config)
    path = run / "config.yaml"
    if not path.is_file():
        write_atomic(path, yaml.safe_dump(asdict(config), sort_keys=False))
    return run


def find_run(config) -> Path:
    """The folder runs/<name>/, which may not be there yet; writes nothing.

    SystemExit if it belongs to another config; only MAY_DIFFER may differ.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise SystemExit(
            f"error: config key `name` is {config.name!r}; it names a folder under runs/: "
            "letters, digits, '.', '_' and '-'"
        )
    run = ROOT / "runs" / config.name
    path = run / "config.yaml"
    if path.is_file():
        refuse_another_config(run, yaml.safe_load(path.read_text(encoding="utf-8")), asdict(config))
    elif run.exists() and not run.is_dir():
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} is a file, not a folder; choose another name "
            "(name=...)"
        )
    elif run.exists() and any(run.iterdir()):
        raise SystemExit(
            f"error: {run.relative_to(ROOT)} is not empty and has no config.yaml; "
            "choose another name (name=...)"
        )
    return run


def refuse_another_config(run: Path, there: dict, now: dict) -> None:
    """SystemExit with the first key in which the run's config and the one of now differ."""
    for section, new in now.items():
        old = there.get(section)
        if section in MAY_DIFFER or old == new:
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
def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, whoever else writes it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        # The same bytes on every system: Windows would end lines of text otherwise.
        draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(draft, path)
    except BaseException:
        # A full disk needs the room, and nobody else would take the draft away.
        draft.unlink(missing_ok=True)
        raise


def json_lines(records: Iterable[Any]) -> str:
    """Records as JSON, one a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write records as JSON lines, whole or not at all."""
    write_atomic(path, json_lines(records))


def append_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Append records as JSON lines, all of them or none where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_size if path.is_file() else 0
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json_lines(records))
    except OSError:
        if path.is_file():
            os.truncate(path, before)
        raise


def append_metrics(run: Path, record: dict) -> None:
    """Append one record to the run's metrics.jsonl, and send it to the run's trackers."""
    append_jsonl(run / "metrics.jsonl", [record])
    track(run, record)


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
                record = read_record(line)
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


def read_record(line: bytes) -> Any:
    """A JSON line; by orjson, which is much faster, where it holds no NaN."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


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
# Several processes
@contextlib.contextmanager
def worker_pool() -> Iterator[ProcessPoolExecutor]:
    """A process for each core; on an error or Ctrl-C what waits is not begun.

    Each starts afresh, since a fork of a process with threads (FFmpeg's, torch's) may hang, and
    leaves Ctrl-C to this one.
    """
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), leave_ctrl_c)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def leave_ctrl_c() -> None:
    """Let the process that started this one take Ctrl-C for both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------
# How a command ends
def run_command(main: Callable[[], Made]) -> Made | None:
    """Call main() as a script does; what the user or the machine does to it is one line on stderr.

    Ctrl-C exits with 130, a reader of the output that has gone (`| head`) with 141, as shells have
    it; a full disk, a folder that cannot be written and a network that is not there with 1. Any
    other exception is a fault of the code and keeps its traceback.
    """
    try:
        made = main()
        # Here, where a reader that has gone is noticed: Python would write the rest at its end.
        sys.stdout.flush()
        return made
    except KeyboardInterrupt:
        end_with("stopped by Ctrl-C; the same command goes on from what is saved", 130)
    except BrokenPipeError:
        # Nothing more can be written there, by Python's end neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end_with("stopped: nobody reads the output any more", 141)
    except Exception as e:
        reason = reason_of(e)
        if not reason:
            raise
        raise SystemExit(f"error: {reason}") from e


def end_with(line: str, code: int) -> None:
    """Print a line to stderr, if somebody reads that, and exit with the code."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(code)


def reason_of(error: BaseException) -> str | None:
    """What the machine refused, in words; None for an error that is the code's.

    A library may have put an error of its own on top of it.
    """
    seen = []
    cause = error
    while cause is not None and cause not in seen:
        if reason := reason_of_one(cause):
            return reason
        seen.append(cause)
        cause = cause.__cause__
    return None


def reason_of_one(error: BaseException) -> str | None:
    """reason_of, without what lies beneath the error."""
    words = " ".join(str(error).split())
    if isinstance(error, hub_errors()) or isinstance(error, socket.gaierror):
        return f"the network or the hub cannot be reached: {words:.300}"
    number = getattr(error, "errno", None)
    if not isinstance(error, OSError):
        # safetensors and tokenizers hand on the system's error as text.
        found = re.search(r"os error (\d+)", words)
        number = int(found.group(1)) if found else None
    if number in DISK_FULL:
        return f"no room left to write: {words}; what was finished is kept, so make room and go on"
    if number in NOT_WRITABLE:
        return f"cannot read or write: {words}; what was finished is kept"
    if number in NO_NETWORK:
        return f"the network cannot be reached: {words}"
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of the known words that is most like a mistyped one."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def hub_errors() -> tuple[type, ...]:
    """HUB_ERRORS as classes, of the modules that are loaded."""
    loaded = [(sys.modules[module], name) for module, name in HUB_ERRORS if module in sys.modules]
    return tuple(getattr(module, name) for module, name in loaded)


def peak_memory_gib() -> float | None:
    """The most memory that this process has held so far, GiB; None on Windows, which does not say.

    Linux counts it in KiB, macOS in bytes.
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


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
