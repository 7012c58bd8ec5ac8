"""The scripts as a user runs them, by subprocess on configs/smoke.yaml.

A whole run, starting again, kills, refusals, and the commands of README and docs/.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.experiment import load_config  # noqa: E402

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
SCRIPTS = ("make_data.py", "train_pst.py", "train_vrl.py", "bench.py")
QUICK = ("bench.tasks=2", "bench.sampled=false")  # changes what is measured, not what is trained


def command(script, name, *more):
    return [sys.executable, script, "--config", "configs/smoke.yaml", f"name={name}", *more]


def finish(script, name, *more, timeout=240):
    """Run a script to its end: CompletedProcess with .seconds."""
    began = time.time()
    done = subprocess.run(
        command(script, name, *more),
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    done.seconds = time.time() - began
    return done


def start(script, name, *more):
    return subprocess.Popen(
        command(script, name, *more),
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(process, test, seconds=150):
    """Wait until test() holds while the process runs."""
    limit = time.time() + seconds
    while not test():
        assert process.poll() is None, (
            f"the run ended with {process.returncode} before what the test waits for"
        )
        assert time.time() < limit, "the run did not get there in time"
        time.sleep(0.02)


def kill(process):
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "the run ended before it was killed"


def metrics(run, phase):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if m["phase"] == phase]


def table(text):
    """The before/after table of train_vrl.py's output."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(r"held-out\s+PST", line))
    return lines[first : next(i for i in range(first, len(lines)) if not lines[i].strip())]


def refused(done, *parts):
    """The script ended with one clear line, without a traceback."""
    error = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr + done.stdout, (
        done.stderr[-2000:]
    )
    assert (
        error[-1].startswith("error: ") and sum(line.startswith("error") for line in error) == 1
    ), done.stderr[-2000:]
    for part in parts:
        assert part in error[-1], error[-1]


@pytest.fixture(scope="module")
def folders():
    """Names of run folders under runs/, removed at the end whatever happens."""
    names = []

    def new(what):
        names.append(f"test-{what}-{uuid.uuid4().hex[:8]}")
        return names[-1]

    yield new
    for name in names:
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


@pytest.fixture(scope="module")
def smoke(folders):
    """One undisturbed run of the whole pipeline: (name, its folder, CompletedProcess)."""
    name = folders("smoke")
    return name, ROOT / "runs" / name, finish("train_vrl.py", name)


def test_smoke_run_ends_with_table_curve_and_trajectory(smoke):
    name, run, done = smoke
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.seconds < 150
    rows = table(done.stdout)
    for label in (
        "greedy R_vrt",
        "greedy R_plan",
        "sampled R_vrt",
        "sampled R_result",
        "arithmetic (exact match)",
        "instruction (exact match)",
        "function (exact match)",
    ):
        row = next(r for r in rows if r.startswith(label))
        assert (
            all(0 <= float(x) <= 1 for x in row[len(label) :].split() if x != "-")
            and len(row[len(label) :].split()) >= 2
        )
    first, end = map(done.stdout.index, ("held-out, greedy", "sampler against trainer after"))
    intervals = done.stdout[first:end]
    assert re.search(r"^R_vrt +12( +\d\.\d{3}){2} +[+-]\d\.\d{3}  \[.+\]$", intervals, re.M)
    assert re.search(r"^R_vrt, \w+", intervals, re.M) and "3 steps are too few" in intervals
    assert all(len(line) <= 100 for line in intervals.splitlines())
    for label, head in (
        ("curve", b"\x89PNG"),
        ("trajectory", b"task "),
        ("all pages", b"<!DOCTYPE"),
    ):
        path = ROOT / re.search(rf"^{label}: +(\S+)$", done.stdout, re.M).group(1)
        assert path.parent == run and path.read_bytes().startswith(head)
    assert (
        "<plan>" in (run / "trajectory.txt").read_text()
        or metrics(run, "eval")[-1]["greedy"]["reward"] == 0
    )


def test_smoke_metrics_hold_every_phase(smoke):
    _, run, _ = smoke
    pst, vrl, evals = (metrics(run, phase) for phase in ("pst", "vrl", "eval"))
    pst = [m for m in pst if "loss" in m]
    assert {m["stage"] for m in pst} == {0, 1, 2}
    assert pst[-1]["loss"] < pst[0]["loss"]
    assert [m["step"] for m in vrl] == [1, 2, 3] and [m["step"] for m in evals] == [0, 3]
    for name, of_step in zip(("before", "after"), evals):
        kept = json.loads((run / "vrl" / f"{name}.json").read_text())
        assert len(kept["tasks"]) == 12 and kept["step"] == of_step["step"]
        assert "tasks" not in of_step
    for m in vrl:
        flat = m["groups"].get("flat", 0) == 4  # nothing to learn from: no update, no ratio
        assert (
            0 <= m["reward"] <= 1
            and m["gap_max"] < 1e-3
            and (flat or m["ratio"] == pytest.approx(1, abs=1e-3))
        )
        assert m["groups"]["groups"] == 4 and sum(m["ended"].values()) == 16
        assert {
            "plan",
            "fine",
            "tool",
            "format",
            "result",
            "traj",
            "cons",
            "entropy",
            "grad_norm",
            "var_total",
            "var_plan",
            "var_tool",
        } <= set(m)
    for step in (1, 2, 3):
        records = (run / "vrl" / "rollouts" / f"step-{step}.jsonl").read_text().splitlines()
        assert len(records) == 16 and {"reward", "advantage", "calls", "plan", "ended"} <= set(
            json.loads(records[0])
        )


def test_smoke_leaves_safetensors_and_json_only(smoke):
    _, run, _ = smoke
    kinds = {p.suffix for p in run.rglob("*") if p.is_file()}
    texts = {".json", ".jsonl", ".yaml", ".txt", ".jinja", ".md", ".html"}
    assert kinds <= {".safetensors", ".png", *texts}, kinds


def test_same_command_again_trains_nothing_and_gives_the_same_table(smoke):
    name, run, first = smoke
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    lines = (run / "metrics.jsonl").read_text()
    again = finish("train_vrl.py", name)
    assert again.returncode == 0, again.stderr[-3000:]
    assert table(again.stdout) == table(first.stdout)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == before and len(
        before
    ) >= 3
    assert (run / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("script", ["make_data.py", "train_pst.py"])
def test_a_finished_phase_alone_returns_at_once(smoke, script):
    name, run, _ = smoke
    before = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "metrics.jsonl"
    }
    trained = [m for m in metrics(run, "pst") if "loss" in m]
    done = finish(script, name)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.seconds < (10 if script == "make_data.py" else 40)
    assert {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "metrics.jsonl"
    } == before
    assert [m for m in metrics(run, "pst") if "loss" in m] == trained


def test_bench_measures_the_run_and_keeps_what_it_measured(smoke):
    name, run, _ = smoke
    done = finish("bench.py", name, *QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((run / "bench" / "results.json").read_text())
    assert list(results) == ["untrained", "pst", "vrl"] and results["vrl"]["from"] == "step-3"
    assert all(r["n"] == 2 and r["seed"] == 0 for r in results.values())
    assert re.search(r"untrained +pst +vrl", done.stdout) and "n = 2 held-out tasks" in done.stdout
    rows = [line for line in done.stdout.splitlines() if re.match(r"(greedy|exact match)  ", line)]
    assert len(rows) >= 9
    shown = subprocess.run(
        [sys.executable, "bench.py", "--table", f"runs/{name}"],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert (
        shown.returncode == 0
        and [line for line in shown.stdout.splitlines() if line in rows] == rows
    )


def test_rewards_script_explains_a_run_s_rollouts(smoke):
    _, run, _ = smoke
    done = subprocess.run(
        [sys.executable, "rewards.py", str(run / "vrl" / "rollouts" / "step-1.jsonl")],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    totals = [
        json.loads(line)["reward"]["total"]
        for line in (run / "vrl" / "rollouts" / "step-1.jsonl").read_text().splitlines()
    ]
    assert done.returncode == 0, done.stderr
    assert re.findall(r"R_vrt (\d\.\d{3}) =", done.stdout) == [f"{t:.3f}" for t in totals]


def test_another_config_on_the_same_folder_is_refused(smoke):
    name, _, _ = smoke
    for script, override, where in (
        ("make_data.py", "seed=1", "`seed` is 0 there and 1 now"),
        ("bench.py", "vrl.lr=0.5", "`vrl.lr` is 0.0005 there and 0.5 now"),
    ):
        refused(finish(script, name, override), name, where)


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["vrl.stpes=3"], ["`vrl.stpes`", "`vrl.steps`"]),
        (["vrl.steps=many"], ["`vrl.steps`", "'many'"]),
        (["vrl.steps"], ["vrl.steps=3"]),
    ],
)
def test_bad_override_is_one_line(folders, overrides, parts):
    name = folders("bad")
    refused(finish("make_data.py", name, *overrides), *parts)
    assert not (ROOT / "runs" / name).exists()


def test_bench_before_training_says_what_to_do(folders):
    refused(finish("bench.py", folders("empty")), "no data yet", "train_vrl.py")


# Smoke's own policy earns no reward, so its VRL changes no weight. These tasks are short, and this
# reward gives parts of the way.
LEARNS = (
    "data.max_steps=2",
    "data.queries=252",
    "data.general=100",
    "pst.rows_per_step=1",
    "pst.micro_rows=1",
    "vrl.group_size=6",
    "reward.form=plan+fine",
    *QUICK,
)


@pytest.fixture(scope="module")
def learner(folders):
    """A finished PST and an undisturbed VRL on it whose steps change the weights.

    (overrides, the VRL's folder)
    """
    base, name = folders("learn"), folders("learn-vrl")
    more = (*LEARNS, f"pst.init_from=runs/{base}/pst/final")
    for done in (finish("train_pst.py", base, *LEARNS), finish("train_vrl.py", name, *more)):
        assert done.returncode == 0, done.stderr[-3000:]
    return more, ROOT / "runs" / name


@pytest.fixture(scope="module")
def killed_in_pst(folders):
    """The name of a smoke run whose PST was killed after a checkpoint and started again."""
    name = folders("kill-pst")
    run, rng = ROOT / "runs" / name, random.Random(20)
    process = start("train_pst.py", name, *QUICK)
    wait_for(process, lambda: list((run / "pst").glob("stage-1-step-*0")))
    time.sleep(rng.random())
    kill(process)
    assert not (run / "pst" / "final").exists(), "killed too late"
    done = finish("train_pst.py", name, *QUICK)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr[-3000:]
    return name


def test_pst_killed_and_started_again_ends_with_the_same_weights(smoke, killed_in_pst):
    run = ROOT / "runs" / killed_in_pst
    assert (run / "pst/final/model.safetensors").read_bytes() == (
        smoke[1] / "pst/final/model.safetensors"
    ).read_bytes()
    assert not list(run.rglob("*.tmp")), "drafts of the killed run were left behind"


def test_vrl_is_the_same_whether_pst_ran_in_its_process_or_before(smoke, killed_in_pst):
    done = finish("train_vrl.py", killed_in_pst, *QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    there = (ROOT / "runs" / killed_in_pst / "vrl" / "step-3" / "model.safetensors").read_bytes()
    assert there == (smoke[1] / "vrl" / "step-3" / "model.safetensors").read_bytes()


def test_vrl_killed_and_started_again_ends_with_the_same_weights(learner, folders):
    """SIGKILL at a random moment after VRL's first checkpoint; the second start ends the same."""
    more, whole = learner
    assert all(m["grad_norm"] > 0 for m in metrics(whole, "vrl")), (
        "VRL changes nothing here, so the test shows nothing"
    )
    name, rng = folders("kill-vrl"), random.Random(21)
    run = ROOT / "runs" / name
    process = start("train_vrl.py", name, *more)
    wait_for(process, lambda: (run / "vrl" / "step-1").is_dir())
    time.sleep(rng.random() * min(m["step_s"] for m in metrics(whole, "vrl")))
    kill(process)
    assert not (run / "vrl" / "step-3").exists(), "killed too late"

    done = finish("train_vrl.py", name, *more)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr[-3000:]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (run / "vrl" / "step-3" / file).read_bytes() == (
            whole / "vrl" / "step-3" / file
        ).read_bytes(), file
    assert (run / "vrl/step-3/model.safetensors").read_bytes() != (
        run / "vrl/step-2/model.safetensors"
    ).read_bytes()
    last = {m["step"]: m["reward"] for m in metrics(run, "vrl")}
    assert last == {m["step"]: m["reward"] for m in metrics(whole, "vrl")} and len(last) == 3
    assert not list(run.rglob("*.tmp")), "drafts of the killed run were left behind"

    file = run / "vrl" / "step-3" / "model.safetensors"  # a checkpoint that was cut off is named
    file.write_bytes(file.read_bytes()[:1000])
    refused(finish("train_vrl.py", name, *more), "vrl/step-3/model.safetensors", "cut off")


def test_ctrl_c_in_vrl_loses_only_the_current_step(learner, folders):
    more, _ = learner
    name = folders("ctrl-c")
    run = ROOT / "runs" / name
    process = start("train_vrl.py", name, *more, "vrl.steps=400", "vrl.save_every=100")
    try:
        wait_for(
            process, lambda: (run / "metrics.jsonl").is_file() and len(metrics(run, "vrl")) >= 2
        )
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    done, kept = (
        len(metrics(run, "vrl")),
        [int(p.name.split("-")[1]) for p in (run / "vrl").glob("step-*") if p.is_dir()],
    )
    assert done < 400 and kept and max(kept) >= done - 1, (
        f"{done} steps were done, checkpoints of steps {kept} are left"
    )


@pytest.mark.parametrize("script", SCRIPTS + ("rewards.py",))
def test_help(script):
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0 and script in done.stdout and "Traceback" not in done.stderr
    assert script == "rewards.py" or "--config" in done.stdout


@pytest.mark.parametrize("script", ["env.py", "rewards.py", "make_data.py", "bench.py"])
def test_help_needs_no_torch(script):
    heavy = ("torch", "transformers", "datasets", "vllm", "matplotlib")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({heavy!r}))\n"
        f"sys.argv = [{script!r}, '--help']; sys.path.insert(0, '.')\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_readme_commands_are_those_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for line in (
        "pip install -r requirements.txt",
        "pytest",
        "python train_vrl.py --config configs/quick.yaml",
    ):
        assert line in readme, line
        assert re.search(rf"^{re.escape(line)}|&& {re.escape(line)}", ci, re.M), line
    assert "vrl.steps=3" in ci
    for script, config in re.findall(r"python (\w+\.py) --config (\S+\.yaml)", readme + ci):
        assert (ROOT / script).is_file() and (ROOT / config).is_file(), (script, config)
    assert re.search(r"ruff. check \.$", ci, re.M) and re.search(
        r"ruff. format --check \.$", ci, re.M
    )


def shell_commands(path):
    """The commands in a Markdown page's bash blocks, and of a shell script, each as its words."""
    text = path.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S) if path.suffix == ".md" else [text]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.search(r"\w+\.py\b", line)]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/data.md",
        "docs/node.md",
        "docs/judge.md",
        "docs/bench.md",
        "docs/gpu.md",
        "docs/scale.md",
        "docs/transfer.md",
    ],
)
def test_commands_of_the_pages_are_true(page):
    """Scripts and config files are there, keys are keys, switches are the script's."""
    elsewhere = {"transfer": "lib/transfer.py"}  # where a command's switches stand
    commands = [words for words in shell_commands(ROOT / page) if "pip" not in words]
    assert commands
    for words in commands:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        given = words[script + 1 :]
        source = (ROOT / elsewhere.get((given or [""])[0], words[script])).read_text()
        for option in (word for word in given if word.startswith("--") and word != "--config"):
            assert f'"{option}"' in source, (words, option)
        if "--config" in given:
            config = given[given.index("--config") + 1]
            load_config(ROOT / config, [word for word in given if re.match(r"[\w.]+=", word)])


def test_requirements_alone_need_no_cuda():
    names = {
        re.split(r"[<>=]", line)[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    }
    assert {"torch", "transformers", "peft", "tokenizers", "pytest", "hypothesis"} <= names
    assert not names & {"vllm", "flash-attn", "bitsandbytes"}
