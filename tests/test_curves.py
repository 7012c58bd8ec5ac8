"""`bench.py curves`: what it prints of runs, against numbers worked out by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import curves  # noqa: E402


def run_of(folder, before, after, steps):
    """A finished run: R_vrt of its held-out tasks before and after VRL, and of VRL's steps."""
    (folder / "vrl").mkdir(parents=True)
    for name, values in (("before", before), ("after", after)):
        tasks = [
            {"id": i, "reward": v, "strict": float(v > 0.99), "cons": None}
            for i, v in enumerate(values)
        ]
        (folder / "vrl" / f"{name}.json").write_text(json.dumps({"tasks": tasks}))
    lines = [json.dumps({"phase": "vrl", "step": i, "reward": v}) for i, v in enumerate(steps, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_means_differences_and_seeds(tmp_path, capsys):
    one = run_of(tmp_path / "a", [0.2, 0.4], [0.6, 0.8], [0.1] * 10 + [0.5] * 10)
    two = run_of(tmp_path / "b", [0.4, 0.6], [0.4, 1.0], [0.3] * 10 + [0.5] * 10)
    curves.curves([f"{one},{two}", "--out", str(tmp_path / "curve.png")])
    said = capsys.readouterr().out
    held_out = next(line.split() for line in said.split("\n") if line.endswith("]"))
    # Means of the seeds' means: (.3 + .5) / 2, (.7 + .7) / 2.
    assert held_out[4:7] == ["0.400", "0.700", "+0.300"]
    own = next(line for line in said.split("\n") if "own tasks" in line)
    assert own.split()[5:8] == ["0.200", "0.500", "+0.300"]
    assert own.endswith("by run: +0.400 +0.200")
    assert "R_cons" not in said  # no task has it
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_legend_names_what_seeds_share(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    groups = {
        ",".join(run_of(tmp_path / name, [0.2], [0.6], [0.1, 0.5]) for name in names): words
        for names, words in (
            (("quick", "quick-1", "quick-2"), "quick, 3 seeds"),
            (("no_kl-9", "no_kl-10", "no_kl-11"), "no_kl, 3 seeds"),
            (("tiny-1", "other"), "tiny-1 + other, 2 seeds"),
            (("alone-7",), "alone-7"),
        )
    }
    runs = {group: [Path(name) for name in group.split(",")] for group in groups}
    curves.plot_groups(runs, tmp_path / "curve.png")
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert legend[::2] == [f"{words}: own tasks" for words in groups.values()]
    assert legend[1::2] == [f"{words}: held out, greedy" for words in groups.values()]


def test_tasks_are_paired_by_id_and_a_missing_score_leaves_its_task_out(tmp_path):
    run = Path(run_of(tmp_path / "a", [0.2, 0.4, 0.6], [0.3, 0.5, 0.7], [0.1]))
    after = json.loads((run / "vrl" / "after.json").read_text())
    after["tasks"] = [after["tasks"][2], {**after["tasks"][0], "reward": None}, after["tasks"][1]]
    (run / "vrl" / "after.json").write_text(json.dumps(after))
    assert curves.held_out(run, "reward") == ([0.4, 0.6], [0.5, 0.7])


def test_a_run_that_is_not_finished_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nothing/vrl/after.json is missing"):
        curves.curves([str(tmp_path / "nothing")])
