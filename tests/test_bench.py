"""bench.py's table on made-up results; tasks played, measured on files and graded.

Also: a bench stopped and gone on with; whose policy it was.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench as B  # noqa: E402
from bench import print_table, rows_of  # noqa: E402
from lib import media, tables  # noqa: E402
from lib.experiment import Config, load_config  # noqa: E402
from lib.runs import ROOT, read_jsonl  # noqa: E402
from rewards import PARTS  # noqa: E402


def figures(reward, cons=0.5, n=128, seed=0, sampled=True):
    """Made-up figures of one policy."""
    scores = {
        "reward": reward,
        "strict": 0.25,
        "plan": 0.75,
        "fine": 0.5,
        **dict.fromkeys(PARTS, 0.875),
        "cons": cons,
    }
    return {
        "greedy": scores,
        **({"sampled": {**scores, "reward": reward / 2}} if sampled else {}),
        "general": {"arithmetic": 0.1, "instruction": 0.2, "function": 0.3, "general": 0.2},
        "n": n,
        "seed": seed,
    }


def run_of(a, b, c, **more):
    return {"untrained": figures(a, **more), "pst": figures(b, **more), "vrl": figures(c, **more)}


def cells(text, label):
    """The cells of one row of a printed table."""
    row = next(line for line in text.splitlines() if line.startswith(label + " "))
    return row[26:].replace(" +- ", "+-").split()


def test_rows_of_names_every_figure():
    rows = dict(rows_of(figures(0.5)))
    assert len(rows) == 2 * (4 + len(PARTS)) + 4
    assert (
        rows["greedy  R_vrt"] == 0.5
        and rows["sampled  R_vrt"] == 0.25
        and rows["greedy  R_vrt > 0.99"] == 0.25
    )
    assert (
        rows["greedy  R_plan"] == 0.75
        and rows["greedy  R_cons"] == 0.5
        and rows["exact match  function"] == 0.3
    )
    assert not any(label.startswith("sampled") for label, _ in rows_of(figures(0.5, sampled=False)))


def test_one_run_has_no_spread(capsys):
    print_table([run_of(0.0, 0.5, 0.95)])
    text = capsys.readouterr().out
    assert cells(text, "greedy  R_vrt") == ["0.000", "0.500", "0.950"] and "+-" not in text
    assert "1 run(s), seeds [0], n = 128 held-out tasks" in text and "judge: rules" in text


def test_mean_and_sample_standard_deviation(capsys):
    print_table([run_of(0.0, 0.5, v, seed=s) for s, v in enumerate((0.9, 0.95, 1.0))])
    text = capsys.readouterr().out
    assert cells(text, "greedy  R_vrt") == [
        "0.000+-0.000",
        "0.500+-0.000",
        "0.950+-0.050",
    ]  # by n - 1; by n it would be 0.041
    assert cells(text, "sampled  R_vrt")[2] == "0.475+-0.025"
    assert "3 run(s), seeds [0, 1, 2]" in text and "standard deviation" in text


def test_missing_cons(capsys):
    print_table([run_of(0.1, 0.5, 0.9, cons=None)])
    assert cells(capsys.readouterr().out, "greedy  R_cons") == ["-", "-", "-"]
    print_table([run_of(0.1, 0.5, 0.9, cons=None), run_of(0.1, 0.5, 0.9, cons=0.4)])
    assert cells(capsys.readouterr().out, "greedy  R_cons") == [
        "0.400",
        "0.400",
        "0.400",
    ]  # the mean of those that have it


def test_only_policies_that_every_run_has(capsys):
    whole = run_of(0.1, 0.5, 0.9)
    print_table([whole, {k: v for k, v in whole.items() if k != "vrl"}])
    text = capsys.readouterr().out
    assert cells(text, "") == ["untrained", "pst"] and len(cells(text, "greedy  R_vrt")) == 2


def test_different_numbers_of_tasks_are_shown(capsys):
    print_table([run_of(0.1, 0.5, 0.9, n=64), run_of(0.1, 0.5, 0.9, n=128)])
    assert "n = 64, 128 held-out tasks" in capsys.readouterr().out


def bench(*args):
    return subprocess.run(
        [sys.executable, "bench.py", *args], cwd=ROOT, capture_output=True, text=True
    )


def test_table_reads_runs_and_names_a_missing_file(tmp_path):
    folder = tmp_path / "seven" / "bench"
    folder.mkdir(parents=True)
    missing = bench("--table", str(tmp_path / "seven"))
    assert missing.returncode != 0 and "Traceback" not in missing.stderr
    assert (
        missing.stderr.startswith(f"error: {folder / 'results.json'} is missing")
        and "name=seven" in missing.stderr
    )
    (folder / "results.json").write_text(json.dumps(run_of(0.1, 0.5, 0.9)))
    shown = bench("--table", str(tmp_path / "seven"))
    assert shown.returncode == 0 and cells(shown.stdout, "greedy  R_vrt") == [
        "0.100",
        "0.500",
        "0.900",
    ]


@pytest.mark.parametrize("text", ['{"untrained": ', "{}"])
def test_table_of_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "x" / "bench").mkdir(parents=True)
    (tmp_path / "x" / "bench" / "results.json").write_text(text)
    done = bench("--table", str(tmp_path / "x"))
    assert done.returncode != 0 and "Traceback" not in done.stderr and "results.json" in done.stderr


def test_table_without_a_run_says_what_to_give():
    done = bench("--table")
    assert done.returncode != 0 and "Traceback" not in done.stderr and "--table" in done.stderr


# ---------------------------------------------------------------------- playing, measuring, grading


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """(config, run, folder) of six tasks of VisGenBench, played by the expert, files measured."""
    run = tmp_path_factory.mktemp("run")
    config = load_config(ROOT / "configs" / "tiny.yaml")
    return config, run, B.run_bench(config, run, "expert", "6", True)


def test_a_bench_is_measured_on_files_without_a_fault(benched):
    head, grades, trajectories = tables.read_bench(benched[2])
    assert (
        head["played"] == head["tasks"] == 6
        and head["files"]
        and head["faults"] == []
        and head["who"] == "scripted"
    )
    seen = [f for g in grades.values() for f in g["files"].values()]
    assert {"image", "video"} <= {f["kind"] for f in seen} and all(
        f["cuts"] is not None for f in seen if f["kind"] == "video"
    )
    for i, t in trajectories.items():
        assert grades[i] == json.loads(json.dumps(B.grade(t, benched[0], with_files=True)))
        assert grades[i]["files"].keys() == B.booked_files(t).keys()


def test_a_stopped_bench_goes_on_and_a_done_one_is_not_made_again(benched, tmp_path, monkeypatch):
    config, run, folder = benched
    shutil.copytree(run, tmp_path / "again")
    copy = tmp_path / "again" / "bench" / "expert-6"
    whole = {
        name: (copy / name).read_bytes()
        for name in ("trajectories.jsonl", "grades.jsonl", "columns.json")
    }
    for name in ("trajectories.jsonl", "grades.jsonl"):
        (copy / name).write_bytes(b"".join(whole[name].splitlines(True)[:3]) + b'{"id": "cut o')
    B.run_bench(config, tmp_path / "again", "expert", "6", True)
    assert {name: (copy / name).read_bytes() for name in whole} == whole
    monkeypatch.setattr(B, "grade", lambda *_, **__: 1 / 0)  # neither played nor measured now
    B.run_bench(config, tmp_path / "again", "expert", "6", True)
    assert {name: (copy / name).read_bytes() for name in whole} == whole


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_frames": -7}, "n_frames"),
        ({"shots": 1}, "cuts"),
        ({"width": 2}, "width"),
        ({"has_audio": None}, "has_audio"),
    ],
)
def test_a_file_unlike_its_record_is_a_fault_of_ours(benched, monkeypatch, change, words):
    """The file is written from a changed record: what is counted on it wins, and that is said."""
    film = min(
        (
            t
            for t in read_jsonl(benched[2] / "trajectories.jsonl")
            if t["task"]["modality"] == "video"
        ),
        key=lambda t: t["artifacts"][-1]["n_frames"] or 0,
    )
    write = media.materialize

    def other(a, path):
        if a["kind"] != "video":
            return write(a, path)
        new = {**a, **{k: not a[k] if v is None else a[k] + v for k, v in change.items()}}
        write(
            {
                **new,
                "shot_frames": None
                if "shots" in change or "n_frames" in change
                else a["shot_frames"],
            },
            path,
        )

    monkeypatch.setattr(B, "materialize", other)
    seen, faults = B.measure_files(film)
    assert faults and any(words in f and film["task"]["id"] in f for f in faults), faults


def test_nothing_played_is_said(benched, tmp_path, monkeypatch):
    monkeypatch.setattr(B, "act", lambda *_, **__: [])
    with pytest.raises(SystemExit, match="no task of --subset 5 was played"):
        B.run_bench(benched[0], tmp_path, "openai", "5", False)


def test_another_policy_does_not_go_on_with_what_one_has_played(tmp_path, monkeypatch, capsys):
    config, folder, stages = Config(), tmp_path / "bench", {"untrained": None}
    monkeypatch.setattr(B, "stages_of", lambda *_: stages)
    with pytest.raises(SystemExit, match="no trained policy"):
        B.policy_of(config, ROOT / "runs" / "x", folder)
    stages["pst"] = ROOT / "runs" / "x" / "pst" / "final"
    assert (
        B.policy_of(config, ROOT / "runs" / "x", folder) == "runs/x/pst/final"
        and "before VRL" in capsys.readouterr().out
    )
    (folder / "trajectories.jsonl").write_text("")
    assert B.policy_of(config, ROOT / "runs" / "x", folder) == "runs/x/pst/final"
    stages["vrl"] = ROOT / "runs" / "x" / "vrl" / "step-3"
    with pytest.raises(
        SystemExit, match="runs/x/pst/final played, and the run's policy is runs/x/vrl/step-3 now"
    ):
        B.policy_of(config, ROOT / "runs" / "x", folder)
    (folder / "trajectories.jsonl").unlink()
    capsys.readouterr()
    assert (
        B.policy_of(config, ROOT / "runs" / "x", folder) == "runs/x/vrl/step-3"
        and "VRL has not ended" in capsys.readouterr().out
    )


def test_keys_may_stand_on_both_sides_of_an_option():
    done = bench(
        "--config", "configs/smoke.yaml", "name=test-keys", "--agent", "nobody", "bench.nothing=1"
    )
    assert done.returncode == 1 and "unknown config key `bench.nothing`" in done.stderr
