"""What a stated wish is worth: the reward of carrying it out against that of leaving it out.

For each kind of wish, on tasks that state it: the scripted expert plays the request as it stands,
and the request without this wish, as a lazy agent would who leaves it out of plan and deeds. Both
are scored on the request as it stands. Services fail as they do (failure_scale 1), or twice as
often. A wish must be worth more than what carrying it out risks: at least 0.2 of R_vrt, and 0.1
where failures are twice as frequent (both ours).

    python tests/price_of_wishes.py [tasks]        # by default 300 of each kind, about 5 minutes
"""

import sys
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from env import VisGenEnv  # noqa: E402
from lib import expert  # noqa: E402
from lib.experiment import DataConfig, RewardConfig, RolloutConfig  # noqa: E402
from lib.reading import read_request  # noqa: E402
from lib.runs import read_jsonl  # noqa: E402
from lib.tasks import BENCH, make_tasks  # noqa: E402
from rewards import ltr_reward  # noqa: E402

LEAST = {1.0: 0.2, 2.0: 0.1}


def without_sound(kind):
    """Leaves one kind of sound out; the beat goes with the music."""

    def leave_out(c):
        beat = c["beat"] and kind != "music"
        return {**c, "audio": [a for a in c["audio"] if a != kind], "beat": beat}

    return leave_out


def without_consistency(kind):
    """Leaves one kind of consistency out."""

    def leave_out(c):
        return {**c, "consistency": [k for k in c["consistency"] if k != kind]}

    return leave_out


# Of each kind of wish: whether constraints state it, and the constraints without it.
WISHES = {
    **{
        f"consistency: {kind}": (
            lambda c, kind=kind: kind in c["consistency"] and applies(c),
            without_consistency(kind),
        )
        for kind in ("object", "scene", "style")
    },
    **{
        kind: (lambda c, kind=kind: kind in c["audio"], without_sound(kind))
        for kind in ("music", "narration", "sfx", "subtitles")
    },
    "style": (lambda c: c["style"], lambda c: {**c, "style": None}),
    "variety": (lambda c: c["variety"], lambda c: {**c, "variety": False}),
    "beat": (lambda c: c["beat"], lambda c: {**c, "beat": False}),
    "duration": (
        # Where the shots are not stated either, they follow from the duration.
        lambda c: c["duration_s"] and c["duration_s"] != 4 * max(1, c["shots"] or 1),
        lambda c: {**c, "duration_s": None, "shots": c["shots"] or None},
    ),
    "shots": (lambda c: c["shots"] and c["shots"] > 1, lambda c: {**c, "shots": None}),
    "aspect": (
        lambda c: c["aspect_ratio"] not in (None, "1:1" if c["images"] else "16:9"),
        lambda c: {**c, "aspect_ratio": None},
    ),
    "resolution": (lambda c: c["resolution"], lambda c: {**c, "resolution": None}),
    "transparent": (lambda c: c["transparent"], lambda c: {**c, "transparent": False}),
    "web page": (lambda c: c["web_page"], lambda c: {**c, "web_page": False}),
    "input": (lambda c: c["input"], lambda c: {**c, "input": False}),
}


def applies(c):
    """Whether there are several pictures or shots to be alike."""
    return c["images"] > 1 or (c["shots"] or 0) > 1


@cache
def pool(n):
    """n requests of training, and those of VisGenBench that ask for variety, as no other does."""
    varied = [t for t in read_jsonl(BENCH) if t["constraints"]["variety"]]
    return make_tasks(n, "train", DataConfig(families=0), 0) + varied


def tasks_with(states, n):
    """At most n tasks that state a wish."""
    return [t for t in pool(2400 if n > 20 else 600) if states(t["constraints"])][:n]


def play(task, scale, seed, leave_out, monkeypatch):
    """R_vrt of the expert's episode; `leave_out` changes what it reads in the request."""
    monkeypatch.setattr(expert, "read_request", lambda text: leave_out(read_request(text)))
    env = VisGenEnv(RolloutConfig(failure_scale=scale, tool_pool="all"))
    # In full it gives each picture a prompt of its own, variety asked or not.
    thoughts = "short" if task["constraints"]["variety"] else "full"
    trajectory = expert.vision_agent(task, env, seed, thoughts=thoughts)
    return ltr_reward(trajectory, RewardConfig(), env.pool)["total"]


def price(kind, n, scale, monkeypatch):
    """(mean reward with the wish, mean reward without it, number of tasks)."""
    states, leave_out = WISHES[kind]
    tasks = tasks_with(states, n)
    kept = [play(t, scale, i, lambda c: c, monkeypatch) for i, t in enumerate(tasks)]
    left_out = [play(t, scale, i, leave_out, monkeypatch) for i, t in enumerate(tasks)]
    return mean(kept), mean(left_out), len(tasks)


def main():
    """Print the table."""
    n = int(sys.argv[1]) if sys.argv[1:] else 300
    print(f"{'wish':22}{'tasks':>6}" + "".join(f"{f'failures x{s:g}':>26}" for s in LEAST))
    print(f"{'':28}" + f"{'kept':>10}{'left out':>9}{'price':>7}" * 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for kind in WISHES:
            row = ""
            for scale, least in LEAST.items():
                kept, left_out, found = price(kind, n, scale, monkeypatch)
                mark = " " if kept - left_out >= least else "!"
                row += f"{kept:10.3f}{left_out:9.3f}{kept - left_out:6.3f}{mark}"
            print(f"{kind:22}{found:6}{row}", flush=True)


if __name__ == "__main__":
    main()
