"""README's commands, each one: what runs it, and that its script takes it; CITATION.cff."""

import errno
import re
import shlex
import sys
import uuid
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from test_ends import no_network, no_write, run  # noqa: E402

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
# A command that is right goes on until it lacks what this test keeps from it: another run, and a
# disk to write to.
LACKS = re.compile(
    r"^error: .*(Read-only file system|no data yet|is missing|no finished policy|no such run"
    "|no finished run)",
    re.M,
)


def commands_of(text):
    """The commands of a page: each line of its bash blocks, at `&&` too, and each `...` beside the
    text that begins like one."""
    joined = text.replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", joined, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    plain = " ".join(re.sub(r"```.*?```", "", joined, flags=re.S).split())
    lines += re.findall(r"`((?:python\S*|pytest|pip|torchrun|accelerate) [^`]+)`", plain)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in dict.fromkeys(parts) if part and not part.startswith("#")]


COMMANDS = commands_of(TEXT)


def check_git(words):
    """Nobody can run it here: no address is made up for the repository."""
    assert words[:2] == ["clone", "<this repository's address>"]


def check_pip(words):
    """.ci/run installs the same file into a fresh environment; the CPU's torch is that version."""
    if words == ["install", "-r", "requirements.txt"]:
        assert f"pip {' '.join(words)}" in CI
        return
    needed = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert words[:1] == ["install"] and re.search(rf"^{re.escape(words[1])}$", needed, re.M)
    assert words[2:] == ["--index-url", "https://download.pytorch.org/whl/cpu"]


def check_pytest(words):
    assert all((ROOT / word).is_file() for word in words), words
    assert words or re.search(r"&& pytest$", CI, re.M)


def check_venv(words):
    """An allowed Python; .ci/run makes its environments in the same way."""
    allowed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert words[:2] == ["-m", "venv"] and 'requires-python = ">=3.11' in allowed
    assert "-m venv" in CI


def check_python(words):
    """A script with these words. It plays in a fork that can neither write nor reach a network."""
    script, *given = words
    assert (ROOT / script).is_file(), script
    if script.startswith("tests/"):  # without arguments; test_env.py runs a short part of it
        assert not given
        return
    if script == "rewards.py":
        given = ["data/example.jsonl" if word == "FILE" else word for word in given]
    if "--config" in given:  # a run that is there would go on, and take its time
        given = [word for word in given if not word.startswith("name=")]
        given.append(f"name=test-readme-{uuid.uuid4().hex[:8]}")

    def apart():
        no_network()
        no_write(errno.EROFS, ROOT)

    done = run([script, *given], apart)
    refused = done.code == 1 and LACKS.search(done.err)
    assert "Traceback" not in done.err and (done.code == 0 or refused), done.err[-1000:]


CHECKS = {
    "git": check_git,
    "cd": lambda words: None,
    "python3.11": check_venv,
    "source": lambda words: None,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_right(command):
    program, *words = shlex.split(command)
    CHECKS[program](words)


def test_all_of_them_are_found():
    scripts = {shlex.split(c)[1] for c in COMMANDS if c.startswith("python ")}
    assert {"env.py", "rewards.py", "make_data.py", "train_vrl.py", "bench.py"} <= scripts
    named = re.findall(r"^python \S+\.py|`python\s\S+\.py", TEXT, re.M)
    assert len(named) <= sum(c.startswith("python ") for c in COMMANDS) >= 12


@pytest.mark.parametrize(
    "command",
    [
        "python train_vrl.py --config configs/quik.yaml",
        "python train_vrl.py --config configs/tiny.yaml vrl.stpes=3",
        "python train_vrl.py --confg configs/tiny.yaml",
        "python train_vlr.py --config configs/tiny.yaml",
        "python bench.py --tabel runs/tiny",
        "python bench.py crves runs/quick",
        "python env.py --tols",
        "pip install torch==1.0 --index-url https://download.pytorch.org/whl/cpu",
        "pytest tests/test_medai.py",
        "git clone https://example.org/visioncreator visioncreator",
    ],
)
def test_a_wrong_command_would_be_found(command):
    program, *words = shlex.split(command)
    with pytest.raises(AssertionError):
        CHECKS[program](words)


def test_citation_names_the_paper_and_this_software():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= cited.keys()
    assert f'version = "{cited["version"]}"' in project and cited["type"] == "software"
    assert cited["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    (paper,) = cited["references"]
    assert len(paper["authors"]) == 14 and paper["type"] == "article" and paper["year"] == 2026
    number = paper["url"].split("/")[-1]
    assert f"[{number}]({paper['url']})" in TEXT and f"*{paper['title'].split(':')[0]}:" in TEXT
    assert paper["title"] in " ".join(TEXT.split())
