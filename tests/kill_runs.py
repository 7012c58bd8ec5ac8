"""Does a run that is killed again and again end as one that was left alone? A command, no test.

Data, PST, VRL and bench of a config run once undisturbed. Then they run again in a fresh folder,
are killed (SIGKILL) at random moments and started anew by the same command, until --kills kills
have fallen, over as many fresh folders as that takes. Every file of these runs has to be the
undisturbed one's: weights bit for bit, all else but for measured times.

    python tests/kill_runs.py                      # 20 kills of configs/smoke.yaml, ten minutes
    python tests/kill_runs.py --kills 5 --seed 3 --minutes 20

Prints a table of the kills. Exits with 1 if a file differs, a command fails by itself, or the time
is over. The folders runs/kill-... are removed at the end unless something was wrong.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.runs import seeded_rng  # noqa: E402

COMMANDS = (
    ("train_pst.py",),
    ("train_vrl.py",),
    ("bench.py",),
    ("bench.py", "--agent", "policy", "--subset", "8"),
)
# What is measured by a clock, and so differs from run to run.
TIMES = {
    "seconds",
    "tok_s",
    "sample_tok_s",
    "update_tok_s",
    "sample_s",
    "update_s",
    "step_s",
    "play_s",
    "measure_s",
}
SHARE_KILLED = 0.8  # of the starts; the others go on to the command's end
MOST_KILLS = 3  # of one command in one folder


def start(command: tuple, config: str, name: str, log: Path) -> subprocess.Popen:
    """The command on one thread, in a process group of its own, its output in a file."""
    script, *options = command
    line = [sys.executable, script, "--config", config, *options, f"name={name}", "threads=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "a") as file:
        return subprocess.Popen(
            line,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_or_kill(process: subprocess.Popen, moment: float | None) -> int | None:
    """The exit code, or None if it ran past `moment` seconds and was killed with its children."""
    try:
        return process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def undisturbed(config: str, name: str, log: Path) -> list[float]:
    """Run all commands; the seconds of each. SystemExit if one fails."""
    took = []
    for command in COMMANDS:
        began = time.monotonic()
        if wait_or_kill(start(command, config, name, log), None):
            raise SystemExit(f"error: {' '.join(command)} failed undisturbed; see {log}")
        took.append(time.monotonic() - began)
    return took


def last_line(log: Path) -> str:
    """What a command said last before it was killed; of a progress bar its last state."""
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return " ".join(next((line for line in reversed(lines) if line.strip()), "").split())[:60]


# --------------------------------------------------------------------------------------------------
# Comparing
def without_times(value, name: str):
    """A JSON value without what a clock measured, and with the run's name taken out."""
    if isinstance(value, dict):
        return {k: without_times(v, name) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [without_times(v, name) for v in value]
    return value.replace(name, "RUN") if isinstance(value, str) else value


def content(path: Path, name: str):
    """What has to be equal of a file."""
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()), name)
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line), name) for line in path.read_text().splitlines()]
    if path.suffix in (".yaml", ".txt", ".md"):
        return path.read_text().replace(name, "RUN")
    return path.read_bytes()


CURVES = ("curve.png", "index.html")


def files_of(run: Path) -> dict[str, Path]:
    """Files of a run by their path in it; drafts that a kill left and the drawn curve are none, nor
    the page that shows it."""
    found = {}
    for path in run.rglob("*"):
        inside = path.relative_to(run)
        draft = any(part.endswith((".tmp", ".old")) for part in inside.parts)
        if path.is_file() and not draft and path.name not in CURVES:
            found[str(inside)] = path
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What the second run has otherwise than the first, a line a file."""
    ours, theirs = files_of(one), files_of(other)
    found = [f"{name} is only in {one.name}" for name in sorted(set(ours) - set(theirs))]
    found += [f"{name} is only in {other.name}" for name in sorted(set(theirs) - set(ours))]
    for name in sorted(set(ours) & set(theirs)):
        if content(ours[name], one.name) != content(theirs[name], other.name):
            found.append(f"{name} differs")
    return found


# --------------------------------------------------------------------------------------------------
# The command
def killed_run(
    config: str, name: str, log: Path, took: list[float], left: int, rng, end: float
) -> list[tuple]:
    """All commands in a fresh folder with up to `left` kills: (command, second, last words) each.

    SystemExit if a command fails by itself or the clock passes `end`.
    """
    kills = []
    for command, seconds in zip(COMMANDS, took):
        code, before = None, len(kills)
        while code is None:
            if time.monotonic() > end:
                raise SystemExit(f"error: the time is over after {len(kills)} kills of {name}")
            moment = None
            may_fall = len(kills) < left and len(kills) < before + MOST_KILLS
            if may_fall and rng.random() < SHARE_KILLED:
                moment = rng.uniform(0.1, seconds)
            log.write_text("")
            code = wait_or_kill(start(command, config, name, log), moment)
            if code is None:
                kills.append((" ".join(command), moment, last_line(log)))
                print(f"{len(kills):3}  {name}  {kills[-1][0]:36} {moment:5.1f} s  {kills[-1][2]}")
            elif code:
                said = last_line(log)
                raise SystemExit(f"error: {' '.join(command)} of {name} ended with {code}: {said}")
    return kills


def main() -> None:
    """Run, kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/smoke.yaml")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="stop after so long")
    args = parser.parse_args()
    runs = ROOT / "runs"
    for old in runs.glob("kill-*"):
        shutil.rmtree(old)
    runs.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    log = runs / "kill-runs.log"
    took = undisturbed(args.config, "kill-none", log)
    print("undisturbed: " + ", ".join(f"{seconds:.0f} s" for seconds in took), flush=True)

    rng = seeded_rng("kill runs", args.seed)
    fell, wrong, rounds = 0, [], 0
    while fell < args.kills:
        rounds += 1
        name = f"kill-{rounds}"
        fell += len(killed_run(args.config, name, log, took, args.kills - fell, rng, end))
        wrong += [f"{name}: {text}" for text in differences(runs / "kill-none", runs / name)]
    n_files = len(files_of(runs / "kill-none"))
    print(f"{fell} kills in {rounds} runs of {n_files} files: {len(wrong)} differences")
    for text in wrong:
        print(f"  {text}")
    if wrong:
        raise SystemExit(1)
    for made in [*runs.glob("kill-*/"), log]:
        shutil.rmtree(made) if made.is_dir() else made.unlink()


if __name__ == "__main__":
    main()
