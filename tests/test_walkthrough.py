"""docs/walkthrough.ipynb: it runs from top to bottom (smaller), and was committed as it ran."""

import re
import shutil
import uuid
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "walkthrough.ipynb"

# One task type in written words, the expert alone, half a minute of training: by then the episodes
# of a group differ in their plans and parts, added up.
SMALL = """
    data.scenarios=[product_images] data.invented=false data.queries=150
    data.general=20 data.general_heldout=4 data.train_tasks=42 data.heldout_tasks=2
    'pst.stages=[{general: 0, repeat: 3, lr: 0.01, matrix_lr: 0.006, tokens: 200000}]'
    vrl.steps=2 vrl.tasks_per_step=2 vrl.group_size=4 reward.form=plan+fine
"""


@pytest.fixture
def name(monkeypatch):
    """Of the page's run, which is removed."""
    made = f"test-walkthrough-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("WALKTHROUGH", f"{SMALL} name={made} threads=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield made
    shutil.rmtree(ROOT / "runs" / made, ignore_errors=True)


def code_cells(page):
    return [cell for cell in page.cells if cell.cell_type == "code"]


def said(page):
    """What the page's code printed."""
    outputs = [output for cell in code_cells(page) for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def check_outputs(page):
    """By hand and by train_vrl.py came to the same; the step was a step; the curve is there."""
    text = said(page)
    norm = float(re.search(r"norm of the gradient (\S+)", text).group(1))
    assert norm > 0.01, "all groups are flat: the step by hand shows nothing"
    differences = re.findall(r"^(.+): largest difference (\S+)$", text, re.M)
    assert len(differences) == 4
    for what, difference in differences:
        assert float(difference) < 1e-3, what
    rows = re.findall(r"^ +\d\.\d\d +[+-]\d\.\d{3} +\d+ .* ([+-]?\d+\.\d\d)$", text, re.M)
    assert len(rows) == 8 and any(float(change) for change in rows)
    table = re.findall(r"^(\w[\w ]+?)  +((?:\d\.\d\d *){7})$", text, re.M)
    first, *spoilt = [float(scores.split()[0]) for _, scores in table]
    assert first == 1 and len(spoilt) == 6 and max(spoilt) < 0.9
    assert "image/png" in code_cells(page)[-1].outputs[-1].data


def test_it_runs_from_top_to_bottom(name):
    page = nbformat.read(PAGE, as_version=4)
    for cell in code_cells(page):
        cell.outputs = []
    where = {"metadata": {"path": str(PAGE.parent)}}
    NotebookClient(page, timeout=900, kernel_name="python3", resources=where).execute()
    check_outputs(page)
    assert (ROOT / "runs" / name / "vrl" / "step-2").is_dir()


def test_it_is_committed_as_it_ran():
    page = nbformat.read(PAGE, as_version=4)
    nbformat.validate(page)
    assert PAGE.stat().st_size < 400_000
    cells = code_cells(page)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}
    check_outputs(page)
    text = "\n".join(cell.source for cell in cells)
    assert max(map(len, text.splitlines())) <= 100
    assert str(ROOT) not in said(page) and "/root/" not in said(page)
