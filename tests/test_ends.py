"""How commands end: Ctrl-C, a closed pipe, a full disk, a read-only folder, no network.

All commands of README and docs/, on one tiny run. Each runs in a fork of this process, which has
imported everything already, with a fault of the machine put in below Python's own files: one line
on stderr, an exit code that is not 0, and nothing lost that was finished.
"""

import ast
import errno
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import threading
import traceback
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402
import train_vrl  # noqa: E402
from lib import data_statistics, runs, toolbox  # noqa: E402
from lib.figures import say_if_too_short  # noqa: E402
from lib.runs import append_jsonl, peak_memory_gib, read_jsonl  # noqa: E402

# Every fork has what these import.
LOADED = (bench, train_vrl)
TINY = (
    "model.base_examples=8",
    "data.queries=42",
    "data.general=40",
    "data.general_heldout=4",
    "data.train_tasks=42",
    "data.heldout_tasks=2",
    "pst.stages=[{general: 0.2, repeat: 1, tokens: 3000}]",
    "vrl.steps=1",
    "vrl.tasks_per_step=2",
    "vrl.group_size=2",
    "rollout.max_turn_tokens=20",
    "bench.tasks=2",
)


# --------------------------------------------------------------------------------------------------
# A command in a fork, with a fault
def under(path, folder):
    return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(str(folder))


def no_write(number, folder):
    """Files and folders of `folder` cannot be opened for writing, made or renamed."""

    def hook(event, args):
        writes = event == "open" and (
            (isinstance(args[1], str) and set(args[1]) & set("wax+"))
            or (args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR))
        )
        if (writes or event in ("os.mkdir", "os.rename")) and under(args[0], folder):
            raise OSError(number, os.strerror(number), str(args[0]))

    sys.addaudithook(hook)


def ctrl_c(folder):
    """Ctrl-C as the first file of `folder` is opened that holds no code."""
    pressed = []

    def hook(event, args):
        if pressed or event != "open" or not under(args[0], folder):
            return
        if not str(args[0]).endswith((".py", ".pyc")):
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    sys.addaudithook(hook)


def no_network():
    def hook(event, args):
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    sys.addaudithook(hook)


def file_size(limit):
    """No file may grow beyond `limit` bytes, whoever writes it: a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def run(words, fault=None, closed=False, stdin="", cwd=ROOT):
    """A command's words in a fork: .code, .out, .err. `closed`: nobody reads its output."""
    pipes = {name: os.pipe() for name in ("in", "out", "err")}
    os.write(pipes["in"][1], stdin.encode())
    os.close(pipes["in"][1])
    child = os.fork()
    if not child:
        play(words, fault, closed, cwd, pipes)
    os.close(pipes["in"][0])
    texts = {}

    def drain(name):
        with open(pipes[name][0], encoding="utf-8") as file:
            texts[name] = file.read()

    readers = []
    for name in ("out", "err"):
        os.close(pipes[name][1])
        if name == "out" and closed:
            os.close(pipes[name][0])
            texts[name] = ""
            continue
        readers.append(threading.Thread(target=drain, args=[name]))
        readers[-1].start()
    _, status = os.waitpid(child, 0)
    for reader in readers:
        reader.join(10)
    return SimpleNamespace(
        code=os.waitstatus_to_exitcode(status), out=texts["out"], err=texts["err"]
    )


def play(words, fault, closed, cwd, pipes):
    """The fork's part: what Python does with a script, and its end."""
    code = 97
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(pipes["in"][0], 0)
        os.dup2(pipes["out"][1], 1)
        os.dup2(pipes["err"][1], 2)
        for ends in pipes.values():
            for end in ends[: 2 if ends is not pipes["in"] else 1]:
                os.close(end)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
        os.chdir(cwd)
        sys.argv = list(words)
        if fault:
            fault()
        code = 0
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 99
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        code = 98
    sys.stderr.flush()
    os._exit(code)


def one_line(done, code, *parts):
    """It ended with the code and one line on stderr, beside bars and warnings of libraries."""
    said = [line for line in done.err.splitlines() if re.match(r"(error|stopped)\b", line)]
    assert "Traceback" not in done.err + done.out, done.err[-2000:]
    assert done.code == code and len(said) == 1, (done.code, done.err[-2000:])
    for part in parts:
        assert part in said[0], said[0]


def snapshot(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --------------------------------------------------------------------------------------------------
# One tiny run, and the commands on it
@pytest.fixture(scope="module")
def tiny():
    """The name of a finished run with two bench folders and the files of the funnel."""
    name = f"test-ends-{uuid.uuid4().hex[:8]}"
    given = ["--config", "configs/smoke.yaml", f"name={name}", *TINY]
    try:
        for words in (
            ["train_vrl.py", *given],
            ["bench.py", *given],
            ["bench.py", *given, "--agent", "policy", "--subset", "2", "--no-files"],
            ["bench.py", *given, "--agent", "expert", "--subset", "12", "--no-files"],
            ["make_data.py", "visgen", *given],
        ):
            done = run(words)
            assert done.code == 0, (words, done.err[-3000:])
            if words[0] == "train_vrl.py":
                assert "too short to learn" in done.out and "configs/tiny.yaml" in done.out
        yield name
    finally:
        for path in (ROOT / "runs").glob(f"{name}*"):
            shutil.rmtree(path, ignore_errors=True)


# (words, what it writes to: "" nothing, "run" into the run, None: it takes too long to wait for).
# {run} is the run's folder, {given} its config. One for each script and command that stands in
# README and docs/.
COMMANDS = {
    "train_vrl": ("train_vrl.py {given}", "run"),
    "train_pst": ("train_pst.py {given}", "run"),
    "make_data": ("make_data.py {given}", ""),
    "visgen": ("make_data.py visgen {given}", "run"),
    "review": ("make_data.py review name={name}", "run"),
    "statistics": ("make_data.py statistics name={name}", "run"),
    "card": ("make_data.py card name={name}", ""),
    "keys": ("make_data.py --keys", ""),
    "metacognition": ("make_data.py metacognition {given}", None),
    "rewards": ("rewards.py {run}/vrl/rollouts/step-1.jsonl", ""),
    "html": ("rewards.py {run}/vrl/rollouts/step-1.jsonl --html", "run"),
    "console": ("env.py", ""),
    "tools": ("env.py --tools", ""),
    "audit": ("env.py --audit", ""),
    "bench": ("bench.py {given}", ""),
    "agent": ("bench.py {given} --agent policy --subset 2 --no-files", "run"),
    "table": ("bench.py --table {run}", ""),
    "report": ("bench.py report {run}/bench/expert-12", "run"),
    "demo": ("bench.py demo {run}/bench/expert-12/trajectories.jsonl", "run"),
    "tables": ("bench.py tables {run}/bench/expert-12", ""),
    "compare": ("bench.py compare {run}/bench/expert-12 {run}/bench/expert-12", ""),
    "curves": ("bench.py curves {run} --out {run}/curves.png", "run"),
    "step": ("bench.py step {run} 1", "run"),
    "try": ("bench.py try 'A logo for a fox' --run {run}", "run"),
    "sheet": ("bench.py sheet {run}/bench/expert-12", "run"),
    "ablate": ("bench.py ablate", ""),
    "transfer": (
        "bench.py transfer {given} --no-training --tasks 1 --rollouts 1 --fidelities 1,0.5 "
        "--outcomes 1",
        "run",
    ),
}
# They read no file of the run.
APART = ("keys", "console", "tools", "audit", "ablate", "metacognition")


def words_of(command, name):
    text, _ = COMMANDS[command]
    given = ["--config", "configs/smoke.yaml", f"name={name}", *TINY]
    words = []
    for word in shlex.split(text):
        words += given if word == "{given}" else [word.format(run=f"runs/{name}", name=name)]
    return words


def test_all_commands_of_the_pages_are_here():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"(\w+\.py)((?: [^`\n#]*)?)", text)
    named = {
        (script, word)
        for script, more in found
        for word in re.findall(r"(?<![=/\w-])(?:--)?[a-z]+(?![/.=\w])", more)
        if (ROOT / script).is_file()
        and (
            word in ("--tools", "--audit", "--keys", "--table", "--agent")
            or f'"{word}"' in (ROOT / script).read_text(encoding="utf-8").split("COMMANDS =")[-1]
        )
    }
    here = {(words.split()[0], word) for words, _ in COMMANDS.values() for word in words.split()}
    lacking = {(script, word) for script, word in named if word.isalpha() or word[:2] == "--"}
    lacking = {pair for pair in lacking - here if pair[1] not in OTHERS}
    assert len(named) > 8 and not lacking


# Options of the commands above, and what has tests of its own (test_grader.py, test_doors.py).
OTHERS = (
    "--help",
    "--verdicts",
    "--queries",
    "--most",
    "--subset",
    "--export",
    "--sampled",
    "--set",
    "--n",
    "--no-files",
    "--html",
    "--seeds",
    "--jobs",
    "--only",
    "--config",
    "--show-batch",
    "--runs",
    "--no-training",
    "--tasks",
    "--fidelities",
    "controls",
    "calibrate",
    "human",
    "media",
    "expert",  # of --agent, as policy, which is above
)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "metacognition"])
def test_a_closed_pipe(tiny, command):
    one_line(run(words_of(command, tiny), closed=True), 141, "nobody reads")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "keys"])
def test_ctrl_c(tiny, command):
    toolbox.read_sheet.cache_clear()  # the fork has what this process has read
    before = snapshot(ROOT / "runs" / tiny)
    folder = ROOT if command in APART else ROOT / "runs" / tiny
    done = run(words_of(command, tiny), lambda: ctrl_c(folder))
    one_line(done, 130, "Ctrl-C")
    after = snapshot(ROOT / "runs" / tiny)
    assert after.keys() >= before.keys() and not [p for p in after if p.endswith(".tmp")]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("command", [c for c, (_, writes) in COMMANDS.items() if writes])
def test_a_folder_that_takes_nothing(tiny, command, number):
    folder = ROOT / "runs" / tiny
    before = snapshot(folder)
    done = run(words_of(command, tiny), lambda: no_write(number, folder))
    if command == "agent":  # all of it was played and measured before
        before.pop("bench/policy-2/columns.json")
    one_line(done, 1, os.strerror(number), "what was finished is kept")
    assert snapshot(folder).items() >= before.items()


@pytest.mark.parametrize("command", [c for c, (_, writes) in COMMANDS.items() if writes == ""])
def test_what_only_reads_needs_no_writing(tiny, command):
    done = run(
        words_of(command, tiny),
        lambda: no_write(errno.EROFS, ROOT),
        stdin='tool_text2image_gpt {"prompt": "a fox"}\nquit\n',
    )
    assert done.code == 0 and done.out, done.err[-2000:]


# --------------------------------------------------------------------------------------------------
# Nothing finished is lost
def test_a_full_disk_and_once_more(tiny):
    """Files that cannot grow beyond 100 kB: what stands there is whole, and the data come out as
    they would have."""
    name = f"{tiny}-full"
    words = ["make_data.py", "--config", "configs/smoke.yaml", f"name={name}", *TINY]
    done = run(words, lambda: file_size(100_000))
    one_line(done, 1, "no room left")
    data = ROOT / "runs" / name / "data"
    assert not list(data.rglob("*.tmp"))
    for path in data.glob("*.jsonl"):
        read_jsonl(path)
    assert run(words).code == 0
    for file in ("visgen.jsonl", "general.jsonl", "train.jsonl"):
        assert (data / file).read_bytes() == (ROOT / "runs" / tiny / "data" / file).read_bytes()


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [{"n": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            append_jsonl(path, [{"text": "x" * 3000}])
        with pytest.raises(OSError):
            runs.write_atomic(tmp_path / "b.txt", "x" * 3000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_jsonl(path) == [{"n": 1}] and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_fault_of_the_code_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        runs.run_command(main)
    with pytest.raises(FileNotFoundError):
        runs.run_command(lambda: open("/no/such/file"))
    try:
        raise OSError("cannot load") from OSError(errno.ENOSPC, "No space left on device")
    except OSError as e:
        assert "no room left" in runs.reason_of(e)


# --------------------------------------------------------------------------------------------------
# What is refused leaves nothing behind
@pytest.mark.parametrize(
    "script, given, said",
    [
        ("train_vrl.py", ["device=cuda"], "`device` is cuda"),
        ("train_pst.py", ["device=cuda"], "`device` is cuda"),
        ("train_vrl.py", ["model.quantize=nf4", "pst.tune=lora"], "bitsandbytes"),
        ("train_pst.py", ["model.quantize=nf4"], "pst.tune=lora"),
        ("train_vrl.py", ["vrl.optimizer=adamw8bit"], "bitsandbytes"),
        ("train_pst.py", ["pst.optimizer=adamw8bit"], "bitsandbytes"),
        ("train_vrl.py", ["rollout.engine=vllm", "vrl.norm_lr=0"], "vllm"),
        ("train_vrl.py", ["model.attn=flash_attention_2"], "flash"),
        ("train_vrl.py", ["model.path=runs/nothing-here"], "`model.path`"),
        ("train_pst.py", ["model.path=nobody/no-such-model"], "`model.path`"),
        ("train_vrl.py", ["pst.init_from=runs/nothing/pst/final"], "`pst.init_from`"),
        ("train_pst.py", ["data.general_source=hub"], "cannot be loaded"),
        ("make_data.py", ["data.general_source=hub"], "cannot be loaded"),
        ("make_data.py", ["review"], "trajectories.jsonl is missing"),
        ("make_data.py", ["filter"], "trajectories.jsonl is missing"),
        ("make_data.py", ["statistics"], "visgen.jsonl is missing"),
        ("make_data.py", ["card"], "visgen.jsonl is missing"),
        ("bench.py", [], "no data yet"),
        ("bench.py", ["--agent", "policy"], "no trained policy"),
        ("bench.py", ["--agent", "expert", "--subset", "0"], "--subset"),
        ("bench.py", ["--agent", "me"], "--agent"),
        ("bench.py", ["--agent", "expert", "--subset", "heldout"], "is missing"),
    ],
)
def test_a_refused_run_leaves_nothing(script, given, said):
    if said == "bitsandbytes" or said == "vllm":
        if __import__("importlib.util").util.find_spec(said):
            pytest.skip(f"{said} is installed here")
    name = f"test-refused-{uuid.uuid4().hex[:8]}"
    done = run([script, "--config", "configs/smoke.yaml", f"name={name}", *given], no_network)
    try:
        one_line(done, 1, said)
        assert not (ROOT / "runs" / name).exists()
    finally:
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def test_what_reads_takes_the_folder_s_own_config(tiny):
    """U4: the run was made with 42 queries; the commands that read do not ask for that again."""
    for command in ("statistics", "card", "filter", "review"):
        done = run(["make_data.py", command, f"name={tiny}"])
        assert done.code == 0 and done.out, (command, done.err[-2000:])
    done = run(["make_data.py", "card", f"name={tiny}", "--queries", "7"])
    one_line(done, 1, "`data.queries` is 42 there and 7 now")


def test_rewards_of_tasks_are_refused_in_words(tiny):
    done = run(["rewards.py", f"runs/{tiny}/data/heldout.jsonl"])
    one_line(done, 1, "record 1 is a task, which nobody has played")
    done = run(["rewards.py", f"runs/{tiny}/data/general.jsonl"])
    one_line(done, 1, "record 1 is no trajectory")


# --------------------------------------------------------------------------------------------------
# From elsewhere, mistyped, and asked for help
def test_configs_are_found_from_another_folder(tmp_path):
    done = run(["make_data.py", "--config", "configs/no.yaml"], cwd=tmp_path)
    one_line(done, 1, str(tmp_path / "configs/no.yaml"), str(ROOT / "configs/no.yaml"))
    name = f"test-refused-{uuid.uuid4().hex[:8]}"
    done = run(["bench.py", "--config", "configs/smoke.yaml", f"name={name}"], cwd=tmp_path)
    one_line(done, 1, "no data yet")


@pytest.mark.parametrize(
    "words, nearest",
    [
        (["bench.py", "repotr", "runs/x"], "`report`"),
        (["bench.py", "tabels"], "`tables`"),
        (["make_data.py", "statistcs"], "`statistics`"),
    ],
)
def test_a_mistyped_command_names_the_nearest(words, nearest):
    one_line(run(words), 1, nearest)


def test_help_in_the_console_is_no_failed_call():
    lines = 'help\n?\nhelp tool_tts_generation\ntool_text2image_gpt {"prompt": "a fox"}\nquit\n'
    done = run(["env.py"], stdin=lines)
    assert done.code == 0 and done.out.count("The tools: ") == 2
    assert "tool_tts_generation(" in done.out and "failed calls 0" in done.out
    assert done.out.count("clock") == 1


# --------------------------------------------------------------------------------------------------
# Other systems
def test_memory_is_gib_on_every_system(monkeypatch):
    used = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory_gib() == 3
    monkeypatch.setattr(sys, "platform", "darwin")
    used.ru_maxrss = 3 * 2**30
    assert peak_memory_gib() == 3
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_gib() is None


def test_text_is_utf_8_and_nothing_is_of_unix_alone():
    """Windows reads text in another encoding unless told, and has neither fork nor `resource`."""
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                whose = getattr(getattr(node.func, "value", None), "id", "")
                modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
                binary = any(isinstance(m, str) and "b" in m for m in modes[:1])
                method = isinstance(node.func, ast.Attribute)
                text = method and name in ("read_text", "write_text")
                text = text or (name == "open" and not method)
                if text and not binary:
                    keys = {k.arg for k in node.keywords}
                    assert "encoding" in keys or "devnull" in ast.unparse(node), where
                assert (whose, name) not in UNIX, where
            if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset == 0:
                names = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not names & {"resource", "fcntl", "pwd", "termios"}, where


UNIX = {("os", name) for name in ("fork", "getuid", "uname", "sched_getaffinity", "mkfifo")}


def test_ci_runs_every_python_that_is_allowed():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))[
        "jobs"
    ]
    allowed = re.search(
        r'requires-python = ">=3.(\d+),<3.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    pythons = [f"3.{minor}" for minor in range(*map(int, allowed.groups()))]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == pythons
    assert jobs["elsewhere"]["strategy"]["matrix"]["system"] == ["macos-latest", "windows-latest"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert {"ruff check .", "ruff format --check .", "pytest"} <= set(steps)


# --------------------------------------------------------------------------------------------------
# A picture of what was counted
def test_the_picture_shows_two_humps_by_quartiles():
    values = [5] * 30 + [25] * 70
    assert data_statistics.quartiles(values) == [5, 25, 25]
    assert data_statistics.quartiles([7]) == [7, 7, 7]
    for numbers in ([1], [3, 9], list(range(200)), [0, 39], [0, 40]):
        edges = data_statistics.bins_of(numbers)
        assert len(edges) <= 42 and edges[0] < min(numbers) and edges[-1] > max(numbers)
        assert {b - a for a, b in zip(edges, edges[1:])} == {edges[1] - edges[0]}
        assert (edges[1] - edges[0]) % 1 == 0


def test_every_panel_of_the_statistics_shows_a_distribution(tmp_path, monkeypatch):
    """Histograms that count each trajectory; boxes of each task type and difficulty."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        {"actions": n, "calls": n // 2, "tokens": 100 * n, "scenario": kind, "difficulty": grade}
        for grade, kind, lengths in (
            ("easy", "icon_design", [3, 4, 5]),
            ("hard", "movies", [2, 40, 40, 70]),
        )
        for n in lengths
    ]
    found = {"rows": rows, "unit": "tokens", "types": {"icon_design": 3, "movies": 4}}
    data_statistics.plot_statistics(found, tmp_path / "statistics.png")
    actions, tokens, types, calls = drawn[0].axes
    for axis in (actions, tokens):
        assert sum(bar.get_height() for bars in axis.containers for bar in bars) == 7
        assert max(bar.get_height() for bar in axis.containers[2]) == 2  # the two of 40
    for axis, labels, middle in (
        (types, ["icon design (3)", "movies (4)"], [4, 40]),
        (calls, ["easy (3)", "hard (4)"], [2, 20]),
    ):
        assert [label.get_text() for label in axis.get_xticklabels()] == labels
        medians = [line.get_ydata()[0] for line in axis.lines if line.get_color() == "C1"]
        assert medians == middle


def test_a_run_that_learns_says_nothing_of_its_length(capsys):
    zero, some = {"reward": 0.0}, {"reward": 0.01}
    say_if_too_short({"greedy": zero, "sampled": zero}, {"greedy": zero, "sampled": some})
    assert capsys.readouterr().out == ""
    say_if_too_short({"greedy": zero}, {"greedy": zero})
    assert "too short to learn" in capsys.readouterr().out
