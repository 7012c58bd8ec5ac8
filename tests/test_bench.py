"""bench.py's tables on made-up results."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from rewards import PARTS  # noqa: E402
from bench import print_table, rows_of  # noqa: E402


def figures(reward, cons=0.5, n=128, seed=0, sampled=True):
    """Made-up figures of one policy."""
    scores = {"reward": reward, "strict": 0.25, "plan": 0.75, "fine": 0.5, **dict.fromkeys(PARTS, 0.875), "cons": cons}
    return {"greedy": scores, **({"sampled": {**scores, "reward": reward / 2}} if sampled else {}),
            "general": {"arithmetic": 0.1, "instruction": 0.2, "function": 0.3, "general": 0.2}, "n": n, "seed": seed}


def run_of(a, b, c, **more):
    return {"untrained": figures(a, **more), "pst": figures(b, **more), "vrl": figures(c, **more)}


def cells(text, label):
    """The cells of one row of a printed table."""
    row = next(line for line in text.splitlines() if line.startswith(label + " "))
    return row[26:].replace(" +- ", "+-").split()


def test_rows_of_names_every_figure():
    rows = dict(rows_of(figures(0.5)))
    assert len(rows) == 2 * (4 + len(PARTS)) + 4
    assert rows["greedy  R_vrt"] == 0.5 and rows["sampled  R_vrt"] == 0.25 and rows["greedy  R_vrt > 0.99"] == 0.25
    assert rows["greedy  R_plan"] == 0.75 and rows["greedy  R_cons"] == 0.5 and rows["exact match  function"] == 0.3
    assert not any(label.startswith("sampled") for label, _ in rows_of(figures(0.5, sampled=False)))


def test_one_run_has_no_spread(capsys):
    print_table([run_of(0.0, 0.5, 0.95)])
    text = capsys.readouterr().out
    assert cells(text, "greedy  R_vrt") == ["0.000", "0.500", "0.950"] and "+-" not in text
    assert "1 run(s), seeds [0], n = 128 held-out tasks" in text and "judge: rules" in text


def test_mean_and_sample_standard_deviation(capsys):
    print_table([run_of(0.0, 0.5, v, seed=s) for s, v in enumerate((0.9, 0.95, 1.0))])
    text = capsys.readouterr().out
    assert cells(text, "greedy  R_vrt") == ["0.000+-0.000", "0.500+-0.000", "0.950+-0.050"]      # by n - 1; by n it would be 0.041
    assert cells(text, "sampled  R_vrt")[2] == "0.475+-0.025"
    assert "3 run(s), seeds [0, 1, 2]" in text and "standard deviation" in text


def test_missing_cons(capsys):
    print_table([run_of(0.1, 0.5, 0.9, cons=None)])
    assert cells(capsys.readouterr().out, "greedy  R_cons") == ["-", "-", "-"]
    print_table([run_of(0.1, 0.5, 0.9, cons=None), run_of(0.1, 0.5, 0.9, cons=0.4)])
    assert cells(capsys.readouterr().out, "greedy  R_cons") == ["0.400", "0.400", "0.400"]       # the mean of those that have it


def test_only_policies_that_every_run_has(capsys):
    whole = run_of(0.1, 0.5, 0.9)
    print_table([whole, {k: v for k, v in whole.items() if k != "vrl"}])
    text = capsys.readouterr().out
    assert cells(text, "") == ["untrained", "pst"] and len(cells(text, "greedy  R_vrt")) == 2


def test_different_numbers_of_tasks_are_shown(capsys):
    print_table([run_of(0.1, 0.5, 0.9, n=64), run_of(0.1, 0.5, 0.9, n=128)])
    assert "n = 64, 128 held-out tasks" in capsys.readouterr().out


def bench(*args):
    return subprocess.run([sys.executable, "bench.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_table_reads_runs_and_names_a_missing_file(tmp_path):
    folder = tmp_path / "seven" / "bench"
    folder.mkdir(parents=True)
    missing = bench("--table", str(tmp_path / "seven"))
    assert missing.returncode != 0 and "Traceback" not in missing.stderr
    assert missing.stderr.startswith(f"error: {folder / 'results.json'} is missing") and "name=seven" in missing.stderr
    (folder / "results.json").write_text(json.dumps(run_of(0.1, 0.5, 0.9)))
    shown = bench("--table", str(tmp_path / "seven"))
    assert shown.returncode == 0 and cells(shown.stdout, "greedy  R_vrt") == ["0.100", "0.500", "0.900"]


@pytest.mark.parametrize("text", ["{\"untrained\": ", "{}"])
def test_table_of_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "x" / "bench").mkdir(parents=True)
    (tmp_path / "x" / "bench" / "results.json").write_text(text)
    done = bench("--table", str(tmp_path / "x"))
    assert done.returncode != 0 and "Traceback" not in done.stderr and "results.json" in done.stderr


def test_table_without_a_run_says_what_to_give():
    done = bench("--table")
    assert done.returncode != 0 and "Traceback" not in done.stderr and "--table" in done.stderr
