"""Trackers: TensorBoard for real where it is installed, W&B and Trackio as modules that note calls.

With `pip install tensorboard` its test runs too.
"""

import doctest
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from test_ends import TINY  # noqa: E402

from lib import track  # noqa: E402
from lib.checks import check_training  # noqa: E402
from lib.experiment import Config, load_config  # noqa: E402
from lib.runs import ROOT as REPOSITORY  # noqa: E402
from lib.runs import append_metrics, find_run, open_run, read_jsonl  # noqa: E402

RECORDS = (
    {"phase": "pst", "stage": 1, "step": 20, "loss": 0.5, "lr": 0.01},
    {"phase": "pst", "stage": 2, "step": 20, "loss": 0.25, "lr": 0.01},
    {"phase": "reading", "after": "pst", "reading": {"heldout": {"facts": 0.75}}},
    {"phase": "eval", "step": 0, "greedy": {"reward": 0.5, "cons": None}},
    {"phase": "vrl", "step": 1, "reward": 0.25, "groups": {"groups": 16, "flat": 2}},
)
RESUMED = {"phase": "vrl", "step": 2, "reward": 0.5, "groups": {"groups": 16}}

# Stands for a package: each call is a line of the file $CALLS.
MODULE = """
import json, os

class Error(Exception):
    pass

def note(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([__name__, *call], default=str) + "\\n")

class Run:
    def define_metric(self, name, step_metric):
        note("define_metric", name, step_metric)

    def log(self, values, step=None):
        note("log", values, step)

def init(**settings):
    if os.environ.get("NO_KEY"):
        raise Error("No API key configured.")
    note("init", settings)
    return Run()
"""


@pytest.fixture
def run(tmp_path):
    """A run's folder."""
    folder = tmp_path / "a-run"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: a-run\n")
    yield folder
    track.OPEN.clear()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """MODULE as `wandb` and as `trackio`; returns a function that reads the calls so far."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(MODULE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    yield lambda: read_jsonl(tmp_path / "calls.jsonl")
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def settings(*names):
    return replace(Config(), name="a-run", track=list(names))


def points(records):
    """{(whose/name, step): number} of lines of metrics.jsonl."""
    found = {}
    for record in records:
        whose = "-".join(str(record[k]) for k in ("phase", "stage", "after") if k in record)
        for name, number in track.numbers(record):
            found[f"{whose}/{name}", record.get("step", 0)] = number
    return found


def test_doctests():
    result = doctest.testmod(track)
    assert result.attempted and not result.failed


def test_names_are_those_of_metrics_jsonl():
    assert points(RECORDS) == {
        ("pst-1/loss", 20): 0.5,
        ("pst-1/lr", 20): 0.01,
        ("pst-2/loss", 20): 0.25,
        ("pst-2/lr", 20): 0.01,
        ("reading-pst/reading.heldout.facts", 0): 0.75,
        ("eval/greedy.reward", 0): 0.5,
        ("vrl/reward", 1): 0.25,
        ("vrl/groups.groups", 1): 16,
        ("vrl/groups.flat", 1): 2,
    }


def test_tensorboard_holds_what_metrics_jsonl_holds(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track.open_trackers(settings("tensorboard"), run)
    for record in RECORDS:
        append_metrics(run, record)
    track.OPEN.clear()  # another process goes on
    track.open_trackers(settings("tensorboard"), run)
    append_metrics(run, RESUMED)

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    assert shown == pytest.approx(points(read_jsonl(run / "metrics.jsonl")))
    assert ("vrl/reward", 2) in shown and ("vrl/reward", 1) in shown


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_its_track(run, modules, name):
    for records in (RECORDS, [RESUMED]):
        track.open_trackers(settings(name), run)
        for record in records:
            append_metrics(run, record)
    os.utime(run / "config.yaml", (0, 0))  # a run of that name that was made anew
    track.open_trackers(settings(name), run)

    opened = [call[2] for call in modules() if call[1] == "init"]
    assert all(o["project"] == "visioncreator" and o["resume"] == "allow" for o in opened)
    assert opened[0]["config"]["vrl"]["steps"] == Config().vrl.steps
    key = "id" if name == "wandb" else "name"
    first, resumed, anew = (o[key] for o in opened)
    assert first == resumed != anew and first.startswith("a-run-")

    sent = {}
    for _, _, values, step in (call for call in modules() if call[1] == "log"):
        if name == "wandb":
            # its own count of steps only rises: PST's second stage begins at 1 again
            assert step is None
            (step,) = (values.pop(k) for k in list(values) if k.endswith("/step"))
        sent |= {(k, step): number for k, number in values.items()}
    assert sent == points([*RECORDS, RESUMED])
    axes = {tuple(call[2:]) for call in modules() if call[1] == "define_metric"}
    assert (("vrl/*", "vrl/step") in axes) == (name == "wandb")


def test_two_runs_of_one_process_are_kept_apart(run, tmp_path, modules):
    track.open_trackers(settings("wandb"), run)
    append_metrics(tmp_path / "another", RESUMED)
    assert [call[1] for call in modules()] == ["init"]


def test_off_by_default(run):
    code = "import sys, train_vrl; print({'tensorboard', 'wandb', 'trackio'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
    track.open_trackers(Config(), run)
    assert track.OPEN[run] == [] and Config().track == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_before_the_run_is_made(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    run_name = f"test-track-{uuid.uuid4().hex[:8]}"
    config = load_config("configs/smoke.yaml", [f"name={run_name}", f"track=[{name}]"])
    for phases in (("pst",), ("pst", "vrl")):
        with pytest.raises(SystemExit, match=f"`track` names {name}.*pip install {name}"):
            check_training(config, phases)
    assert not (REPOSITORY / "runs" / run_name).exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(SystemExit, match="track is 'wandbb'; allowed: tensorboard, wandb, trackio"):
        load_config("configs/smoke.yaml", ["track=[wandbb]"])


def test_an_account_that_is_missing_is_one_line(run, modules, monkeypatch):
    monkeypatch.setenv("NO_KEY", "1")
    with pytest.raises(SystemExit, match="No API key.*WANDB_MODE=offline"):
        track.open_trackers(settings("wandb"), run)


def test_a_run_may_go_on_with_another_tracker(monkeypatch, tmp_path):
    monkeypatch.setattr("lib.runs.ROOT", tmp_path)
    made = open_run(settings())
    assert find_run(settings("wandb")) == made
    # that of a run before there was this key
    text = (made / "config.yaml").read_text()
    (made / "config.yaml").write_text(text.replace("track: []\n", ""))
    assert find_run(settings()) == made
    with pytest.raises(SystemExit, match="`seed` is 0 there and 1 now"):
        find_run(replace(settings(), seed=1))


def test_a_whole_run_sends_every_line_of_metrics_jsonl(modules):
    name = f"test-track-{uuid.uuid4().hex[:8]}"
    made = ROOT / "runs" / name
    words = [sys.executable, "train_vrl.py", "--config", "configs/smoke.yaml", f"name={name}"]
    try:
        done = subprocess.run(
            [*words, *TINY, "track=[trackio]"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        records = read_jsonl(made / "metrics.jsonl")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    assert {record["phase"] for record in records} == {"pst", "eval", "vrl"}
    sent = {}
    for _, _, values, step in (call for call in modules() if call[1] == "log"):
        sent |= {(k, step): number for k, number in values.items()}
    assert sent == points(records)
