"""Config keys, which values they refuse alone and together, and the house's rules on the files."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.experiment import (  # noqa: E402
    Config,
    DataConfig,
    RewardConfig,
    RolloutConfig,
    Stage,
    build,
    load_config,
    print_keys,
)

WIDTH = 100
# Imports point to the left: a script imports lib/ and the scripts before it.
SCRIPTS = ("env", "rewards", "make_data", "train_pst", "train_vrl", "bench")
# What a reader may play with anywhere, and so what a module of lib/ may use where it is about it.
LIGHT = ("env", "rewards")


def tracked(*patterns):
    """Files that git knows, or would take, as paths from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in sorted(set(listed.stdout.split("\n"))) if (ROOT / path).is_file()]


# --- the keys


def leaf_keys(section=Config, prefix=""):
    """(name, its field) of every key that is no section; of a list of stages also the stage's."""
    for f in fields(section):
        value = getattr(section(), f.name)
        if is_dataclass(value):
            yield from leaf_keys(type(value), f"{prefix}{f.name}.")
            continue
        yield f"{prefix}{f.name}", f
        if f.type == list[Stage]:
            yield from leaf_keys(Stage, f"{prefix}{f.name}[].")


def test_every_key_says_what_it_is_for():
    for name, f in leaf_keys():
        assert len(f.metadata["doc"]) >= 8, name
        one_of = f.metadata["one_of"]
        if one_of and name != "model.dtype":
            missing = [value for value in one_of if value not in f.metadata["doc"]]
            assert not missing, f"{name} may be {missing[0]}, and nothing says what that is"


def test_every_default_says_whose_it_is():
    """At the key or at its section: the paper's, a cited paper's, or ours."""
    whose = re.compile(r"\bours\b|\bpaper\b")
    for f in fields(Config):
        if is_dataclass(getattr(Config(), f.name)):
            assert whose.search(f.metadata["doc"]), f.name


def test_there_are_no_more_keys_than_a_reader_can_bear():
    """155 at its worst. A new key needs a user who sets it; otherwise a constant with a reason."""
    keys = [name for name, _ in leaf_keys() if "[]" not in name]
    assert len(keys) <= 117, len(keys)


def test_print_keys_shows_the_keys_of_a_stage_too(capsys):
    print_keys(Config)
    lines = capsys.readouterr().out.splitlines()
    for name, f in leaf_keys():
        shown = [line for line in lines if line.startswith(f"{name} = ")]
        assert len(shown) == 1 and shown[0].endswith(f"# {f.metadata['doc']}"), name
        json.loads(shown[0].split(" = ", 1)[1].split("   # ")[0])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rollout": {"tools": "scheme"}}, "rollout.tools is 'scheme'; allowed: schema, signature"),
        ({"vrl": {"group_size": 0}}, "vrl.group_size is 0; it must be at least 2"),
        ({"llm": {"max_failures": 2}}, "llm.max_failures is 2.0; it must be at least 0 and at mo"),
        ({"rollout": {"gpu_memory": 0.001}}, "rollout.gpu_memory is 0.001; it must be at least 0"),
        ({"pst": {"stages": [{"unit": "words"}]}}, "pst.stages[0].unit is 'words'; allowed: exam"),
    ],
)
def test_a_value_that_its_key_does_not_allow(values, message):
    with pytest.raises(SystemExit) as e:
        build(Config(), values)
    assert str(e.value).startswith(f"error: config key {message}")


def test_limits_themselves_are_allowed():
    assert RolloutConfig(gpu_memory=0.01).gpu_memory == 0.01
    assert RolloutConfig(gpu_memory=1.0, fidelity=0.0).fidelity == 0


def test_a_default_list_or_dict_is_copied_for_each_instance():
    RewardConfig().weights["tool"] = 7.0
    DataConfig().languages.append("fr")
    assert RewardConfig().weights["tool"] == 0.5 and DataConfig().languages == ["en"]


def test_configs_share_no_dict():
    Config().reward.weights["tool"] = 7.0
    assert Config().reward.weights["tool"] == 0.5


def number_keys():
    """(name, field, default) of every key that is a number, a number of a stage, or of a dict."""
    for name, f in leaf_keys():
        default = f.default_factory()
        if isinstance(default, dict):
            yield from ((f"{name}.{part}", f, number) for part, number in default.items())
        elif type(default) in (int, float):
            yield name, f, default


def load_with(folder, name, value):
    """A config with one key set; a stage's stands in the first of two stages."""
    stage = name.removeprefix("pst.stages[].")
    if stage != name:
        name, value = "pst.stages", [{stage: value}, {}]
    for part in reversed(name.split(".")):
        value = {part: value}
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump(value))
    return load_config(path)


@pytest.mark.parametrize("name, f, default", list(number_keys()), ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("odd", [0, -1, float("nan"), float("inf"), 1e18])
def test_a_useless_number_is_refused_or_has_a_meaning(tmp_path, name, f, default, odd):
    """Only 0 may have one, and then the key's text says which."""
    if type(default) is int and odd == odd and abs(odd) < float("inf"):
        odd = int(odd)
    try:
        load_with(tmp_path, name, type(default)(odd) if odd == 0 else odd)
    except SystemExit as e:
        asked = name.replace("[]", "[0]")
        assert str(e).startswith("error: ") and "\n" not in str(e)
        assert asked in str(e) or asked.rpartition(".")[0] in str(e), str(e)
        return
    says = re.search(
        r"\b0:? (is|all|none|no|left|each|switches|it|leave|VisGenData|the|greedy)\b|"
        r"\b0: \w+|also 0",
        f.metadata["doc"],
    )
    assert odd == 0 and says, f"{name}={odd} is taken, and nothing says what it means"


def test_what_has_no_number_but_is_useless(tmp_path):
    for text, message in (
        ("device: mps", "config key device is 'mps', which is not supported; set device=cpu"),
        ("device: gpu", "config key device is 'gpu'; allowed: auto, cpu, cuda"),
        ("bench: {grader: nonsense}", "config key bench.grader is 'nonsense'; allowed: structural"),
        ("pst: {stages: []}", "config key pst.stages is empty"),
        ("data: {languages: []}", "config key data.languages is empty"),
        ("pst: {stages: [{}, {general: 0, repeat: 0}]}", "pst.stages[1] has general 0 and repeat"),
        (
            "reward: {weights: {tool: 0, format: 0, result: 0, traj: 0, cons: 0}}",
            "config key reward.weights are all 0",
        ),
        (
            "reward: {weights: {tool: 0, format: 0, result: 0, traj: 0}}",
            "reward.weights has nothing above 0 but cons",
        ),
        ("model: {heads: 5, kv_heads: 2}", "model.heads is 5 and model.kv_heads 2"),
        ("model: {head_dim: 31}", "model.head_dim is 31; rotary positions"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(SystemExit) as e:
            load_config(tmp_path / "a.yaml")
        assert str(e.value).startswith(f"error: {message}") and "\n" not in str(e.value)


@pytest.mark.parametrize("phase", ["pst", "vrl"])
def test_all_weights_are_not_trained_in_bfloat16(tmp_path, phase):
    """Steps of usual rates would be rounded away."""
    (tmp_path / "a.yaml").write_text("model: {dtype: bfloat16}\npst: {tune: lora}\n")
    load_config(tmp_path / "a.yaml")
    with pytest.raises(SystemExit, match=f"{phase}.tune=full with model.dtype=bfloat16 rounds"):
        load_config(tmp_path / "a.yaml", [f"{phase}.tune=full"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["vrl.tune=full", "vrl.kl_coef=0.1"], "vrl.kl_coef needs the adapter"),
        (["rollout.engine=vllm", "vrl.tune=full"], "vLLM is given the LoRA adapter alone"),
        (["rollout.engine=vllm", "vrl.norm_lr=0.1"], "vLLM is given the LoRA adapter alone"),
        (["rollout.temperature=0"], "rollout.temperature is 0.0; training samples, so it must be"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_when_a_config_is_loaded(
    tmp_path, overrides, message
):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as e:
        load_config(tmp_path / "a.yaml", overrides)
    assert str(e.value).startswith(f"error: {message}") and "\n" not in str(e.value)
    for alone in overrides[:-1]:
        load_config(tmp_path / "a.yaml", [alone])


# --- the files


def wide_lines(patterns):
    """ "path:number" of each line over the width."""
    found = []
    for path in tracked(*patterns):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        found += [f"{path}:{n}" for n, line in enumerate(lines, 1) if len(line) > WIDTH]
    return found


@pytest.mark.parametrize("pattern", ["*.py", "*.md", "configs/*.yaml"])
def test_no_line_is_wider_than_100_columns(pattern):
    wide = wide_lines([pattern])
    assert not wide, f"{len(wide)} lines, the first: {', '.join(wide[:10])}"


def test_configs_hold_yaml_and_data_no_code():
    assert {Path(path).suffix for path in tracked("configs")} == {".yaml"}
    assert not [path for path in tracked("data") if path.endswith(".py")]


def test_readme_names_code_that_is_there():
    """`rewards.combine`, `lib.media.probe` and `lib.llm` in README and docs/ are what they say."""
    known = {}
    for path in tracked("*.py"):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        known[path[:-3].replace("/", ".")] = {getattr(node, "name", None) for node in tree.body}
    for page in tracked("README.md", "docs"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:lib\.)?\w+(?:\.\w+)*)`", text):
            module, _, thing = name.rpartition(".")
            if module in known and thing != "py":
                assert thing in known[module], f"{page}: {name}"
            assert not name.startswith("lib.") or {name, module} & set(known), f"{page}: {name}"
        for path in re.findall(r"`((?:lib|data|configs|tests|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"


# --- imports


def imports_of(path, everywhere):
    """Project modules that a file imports: at module level, or `everywhere` in it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {f"lib.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.startswith("lib.") or name in SCRIPTS}


def module_name(path):
    return path[:-3].replace("/", ".")


def test_a_script_imports_only_scripts_below_it():
    for i, script in enumerate(SCRIPTS):
        above = imports_of(f"{script}.py", everywhere=True) & set(SCRIPTS[i:])
        assert not above, f"{script}.py imports {', '.join(sorted(above))}"


def test_lib_imports_no_script_but_env_and_rewards():
    for path in tracked("lib/*.py"):
        heavy = imports_of(path, everywhere=True) & set(SCRIPTS) - set(LIGHT)
        assert not heavy, f"{path} imports {', '.join(sorted(heavy))}"


def test_imports_do_not_go_round():
    """At module level: a module of lib/ may import env or rewards, which then do without it."""
    graph = {
        module_name(path): imports_of(path, everywhere=False)
        for path in tracked("lib/*.py", *(f"{script}.py" for script in SCRIPTS))
    }
    done, open_path = set(), []

    def visit(name):
        assert name not in open_path, f"imports go round: {' -> '.join([*open_path, name])}"
        if name in done or name not in graph:
            return
        open_path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        open_path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("script", LIGHT)
def test_env_and_rewards_import_at_once_and_without_torch(script):
    code = (
        "import sys, time; began = time.process_time()\n"
        f"import {script}\n"
        "print(time.process_time() - began, 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        took, with_torch = done.stdout.split()
        assert with_torch == "False"
        seconds.append(float(took))
    assert min(seconds) < 0.5, seconds
