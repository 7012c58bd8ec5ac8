"""VisGenEnv through other trainers' doors: TRL, OpenEnv, Gymnasium; VisGenData in `datasets`.

What is not installed skips its tests: `pip install "trl>=1.16,<2" "openenv>=0.10,<0.11"`.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from env import VisGenEnv, parse_utpc  # noqa: E402
from lib import for_trl  # noqa: E402
from lib.experiment import DataConfig, RewardConfig, RolloutConfig  # noqa: E402
from lib.expert import vision_agent  # noqa: E402
from lib.tasks import make_tasks  # noqa: E402
from lib.toolbox import load_tools, tool_schemas  # noqa: E402
from rewards import ltr_reward  # noqa: E402

NAMES = RolloutConfig(tools="names", tool_pool="all", failure_scale=0)
TASKS = make_tasks(12, "train", DataConfig(), 3)


def expert_episode(task, seed, rollout=NAMES, thoughts="full"):
    """The expert's trajectory of a task."""
    return vision_agent(task, VisGenEnv(rollout), seed, thoughts=thoughts)


def test_every_key_of_a_tools_schema_is_one_of_json_schema():
    known = set("type enum minimum maximum minLength maxLength minItems maxItems pattern".split())
    known |= set("description default properties required items additionalProperties".split())

    def check(schema, where):
        assert set(schema) <= known, (where, set(schema) - known)
        for name, inner in schema.get("properties", {}).items():
            check(inner, f"{where}.{name}")
        if "items" in schema:
            check(schema["items"], f"{where}[]")

    for name, tool in load_tools().items():
        check(tool["parameters"], name)


# ---------------------------------------------------------------------------- TRL
def as_trl_reads(text):
    """A turn as TRL reads it out of a policy's text, through transformers."""
    from transformers.utils.chat_parsing import parse_response

    return parse_response(text + "<|im_end|>", for_trl.RESPONSE_TEMPLATE, prefix="")


def play_as_trl(tools, texts):
    """The messages of a rollout that writes `texts`, its calls run as GRPOTrainer runs them."""
    completion = []
    for text in texts:
        message = as_trl_reads(text)
        completion.append(message)
        for call in message.get("tool_calls") or []:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            method = getattr(tools, name, None)
            said = method(**arguments) if method else str({"error": f"Tool {name} not found."})
            completion.append({"role": "tool", "name": name, "content": said})
    return completion


def test_the_methods_say_what_tools_yaml_says():
    from transformers.utils import get_json_schema

    tools = for_trl.VisGenTools()
    public = {name for name in dir(tools) if not name.startswith("_")}
    assert public == {"reset", *load_tools()} and len(public) == 37
    for schema in tool_schemas(load_tools()):
        ours = schema["function"]
        found = get_json_schema(getattr(tools, ours["name"]))["function"]
        assert found["name"] == ours["name"]
        assert found["description"] == " ".join(ours["description"].split())
        properties = ours["parameters"]["properties"]
        assert list(found["parameters"]["properties"]) == list(properties)
        assert found["parameters"].get("required", []) == ours["parameters"]["required"]
        for param, given in found["parameters"]["properties"].items():
            wanted = properties[param]
            assert given["type"] == wanted["type"], (ours["name"], param)
            assert given.get("enum") == wanted.get("enum")
            for key in ("minimum", "maximum", "minLength", "maxItems", "items"):
                assert key not in wanted or f'"{key}": ' in given["description"]


@pytest.mark.parametrize("task", TASKS[:6], ids=lambda task: task["id"])
def test_an_episode_through_trl_is_the_one_that_step_plays(task):
    """One call a turn: what comes back, what is recorded and the reward are VisGenEnv.step's."""
    [row] = for_trl.rows([task], NAMES)
    env = VisGenEnv(NAMES)
    opening, _ = env.reset(task, row["seed"])
    assert row["prompt"] == opening

    texts = []
    for message in expert_episode(task, row["seed"])["messages"]:
        if message["role"] != "assistant":
            continue
        before, *calls = message["content"].split("<tool_call>")
        texts += [before + "".join("<tool_call>" + call for call in calls[:1])]
        texts += ["<think>and the next</think><tool_call>" + call for call in calls[1:]]
    replies = [said for text in texts for said in env.step(text)[0]]
    wanted = env.trajectory()

    tools = for_trl.VisGenTools(NAMES, RewardConfig())
    tools.reset(**row)
    completion = play_as_trl(tools, texts)
    assert [m["content"] for m in completion if m["role"] == "tool"] == [
        reply["content"] for reply in replies
    ]
    found = tools._trajectory(completion)
    for part in ("calls", "artifacts", "plan", "plans", "answer", "ended", "turns", "price_usd"):
        assert found[part] == wanted[part], part
    logged = {}
    rewards = for_trl.reward([tools] * 2, [completion] * 2, log_metric=logged.__setitem__)
    reference = ltr_reward(wanted, RewardConfig())
    assert rewards == [reference["total"]] * 2 and rewards[0] > 0
    assert logged == {"plan": reference["plan"], "fine": reference["fine"]}


def test_what_trl_refuses_is_an_error_of_the_episode():
    task = TASKS[0]
    plan = '<plan>[{"id": 1, "tool": "tool_nope", "goal": "x", "after": []}]</plan>'
    call = '<tool_call>{"name": "NAME", "arguments": {"prompt": "a fox"}}</tool_call>'
    no_tool = f"<think>I look for a tool.</think>{plan}" + call.replace("NAME", "tool_nope")
    no_json = '<think>And now a broken call.</think><tool_call>{"name": </tool_call>'
    good = "<think>I draw a fox now.</think>" + call.replace("NAME", "tool_text2image_gpt")
    last = '<think>All is done.</think><answer>{"deliverables": ["img_1"], "summary": "x"}</answer>'
    tools = for_trl.VisGenTools(NAMES)

    def ended(texts):
        tools.reset(**for_trl.rows([task], NAMES)[0])
        completion = play_as_trl(tools, texts)
        return tools._trajectory(completion)

    found = ended([no_tool, good, last])
    assert [c["error"] and c["error"]["code"] for c in found["calls"]] == ["unknown_tool", None]
    assert [c["turn"] for c in found["calls"]] == [1, 2] and found["ended"] == "answer"
    assert [turn["faults"] for turn in found["turns"]] == [[], [], []]

    # TRL takes a turn that it cannot read for text, and the rollout ends there.
    tools.reset(**for_trl.rows([task], NAMES)[0])
    found = tools._trajectory([{"role": "assistant", "content": no_json}])
    assert [c["error"]["code"] for c in found["calls"]] == ["bad_call"]
    assert found["ended"] == "malformed" and found["turns"][0]["faults"]

    # Cut by TRL's limit of turns: the last call never ran, and there is no record of it.
    tools.reset(**for_trl.rows([task], NAMES)[0])
    found = tools._trajectory([as_trl_reads(good)])
    assert found["calls"] == [] and found["ended"] == "max_turns"
    assert parse_utpc(for_trl.text_of(as_trl_reads(good)))["faults"] == []


def test_a_thought_is_judged_by_what_was_there_when_it_was_written():
    task = TASKS[0]
    call = (
        '<tool_call>{"name": "tool_text2image_gpt", "arguments": {"prompt": "a fox"}}</tool_call>'
    )
    answer = '<answer>{"deliverables": ["img_1"], "summary": "A fox."}</answer>'
    env = VisGenEnv(NAMES)
    [row] = for_trl.rows([task], NAMES)
    env.reset(task, row["seed"])
    texts = [f"<think>Now I look at img_1, made before.</think>{call}"]
    [reply] = env.step(texts[0])[0]
    texts.append(f"<think>{reply['content']}</think>{call}")
    env.step(texts[1])
    texts.append(f"<think>Here are img_1 and img_2.</think>{answer}")
    env.step(texts[2])

    tools = for_trl.VisGenTools(NAMES)
    tools.reset(**row)
    found = tools._trajectory(play_as_trl(tools, texts))
    assert found["turns"] == env.turns and found["artifacts"] == list(env.artifacts.values())
    assert [turn.get("idle") for turn in env.turns][::2] == [["unknown_id"], None]


def test_two_steps_of_trl(tmp_path):
    """GRPOTrainer on the tiny base, which has first learnt one expert episode by heart: rollouts
    call tools, their rewards differ, and both steps change the policy."""
    pytest.importorskip("trl", reason='TRL is not installed: pip install "trl>=1.16,<2"')
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig

    from lib.tokens import encode_trajectory

    torch.manual_seed(0)
    base = ROOT / "data" / "base"
    tokenizer = for_trl.prepare_tokenizer(AutoTokenizer.from_pretrained(base), NAMES)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    task = TASKS[2]
    [row] = for_trl.rows([task], NAMES)
    messages = expert_episode(task, row["seed"], thoughts="short")["messages"]
    ids, mask = encode_trajectory(tokenizer, messages)
    labels = [i if m else -100 for i, m in zip(ids, mask)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.012:
            break

    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=len(ids),
        max_tool_calling_iterations=6,
        learning_rate=1e-4,
        temperature=1.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = for_trl.make_trainer(model, tokenizer, [task], args, NAMES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert trainer.state.global_step == 2 and len(log) == 2
    for entry in log:
        print({name: entry[name] for name in ("reward", "reward_std", "plan", "fine", "grad_norm")})
        assert entry["tools/call_frequency"] > 0.5 and 0 < entry["reward"] < 1
        assert entry["reward_std"] > 0 and entry["grad_norm"] > 0
        assert 0 < entry["plan"] <= 1 and 0 < entry["fine"] <= 1
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------- Gymnasium
def test_gymnasium_makes_and_checks_it():
    import gymnasium
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make("lib.for_gymnasium:VisGenEnv-v0", render_mode="ansi")
    assert env.spec.id == "VisGenEnv-v0"
    check_env(env.unwrapped)


def test_an_episode_through_gymnasium_is_the_one_that_step_plays():
    import gymnasium

    env = gymnasium.make("lib.for_gymnasium:VisGenEnv-v0", rollout=NAMES)
    task = TASKS[3]
    seen, info = env.reset(seed=5, options={"task": task})
    assert task["request"] in seen and info["task"] == task
    inner = env.unwrapped.episode
    trajectory = expert_episode(task, inner.seed)
    turns = [m["content"] for m in trajectory["messages"] if m["role"] == "assistant"]
    total = 0.0
    for text in turns:
        assert env.action_space.contains(text)
        seen, reward, terminated, truncated, info = env.step(text)
        assert env.observation_space.contains(seen)
        total += reward
    assert terminated and not truncated
    assert {**info["trajectory"], "reward": {}} == {**trajectory, "reward": {}}
    assert total == reward == ltr_reward(trajectory, RewardConfig())["total"] > 0.5

    one = gymnasium.make("VisGenEnv-v0")
    assert one.reset(seed=1)[0] == one.reset(seed=1)[0] != one.reset(seed=2)[0]


# ---------------------------------------------------------------------------- OpenEnv
@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of an OpenEnv server on loopback, with TASKS as its tasks."""
    pytest.importorskip(
        "openenv", reason='OpenEnv is not installed: pip install "openenv>=0.10,<0.11"'
    )
    tasks = tmp_path_factory.mktemp("served") / "tasks.jsonl"
    tasks.write_text("\n".join(map(json.dumps, TASKS)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lib.for_openenv", "--port", str(port), "--tasks", str(tasks)]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        limit = time.time() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.time() < limit, "the server did not start"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def test_an_episode_through_openenv_is_the_one_that_step_plays(served):
    from openenv.core import GenericEnvClient

    rollout = RolloutConfig()
    with GenericEnvClient(base_url=served).sync() as client:
        opened = client.reset(seed=7, index=3, episode_id="mine")
        inner = VisGenEnv(rollout)
        messages, _ = inner.reset(TASKS[3], 7)
        assert opened.observation["messages"] == messages and not opened.done
        trajectory = vision_agent(TASKS[3], inner, 7)
        turns = [m["content"] for m in trajectory["messages"] if m["role"] == "assistant"]
        replies = []
        for text in turns:
            result = client.step({"text": text})
            replies += result.observation["messages"]
            assert result.done == (text is turns[-1])
        assert replies == [m for m in trajectory["messages"] if m["role"] == "tool"]
        pool = TASKS[3]["pool"]
        wanted = ltr_reward(trajectory, RewardConfig(), pool)
        assert result.reward == wanted["total"] > 0.5
        assert result.observation["ended"] == "answer"
        assert result.observation["parts"]["plan"] == wanted["plan"]
        state = client.state()
        assert (state["episode_id"], state["task_id"]) == ("mine", TASKS[3]["id"])
        assert state["step_count"] == len(turns) and state["ended"] == "answer"
        assert state["calls"] == len(trajectory["calls"])

        # Its own task, and two sessions beside each other.
        given = client.reset(seed=1, task=TASKS[8])
        assert TASKS[8]["request"] in given.observation["messages"][1]["content"]
        with GenericEnvClient(base_url=served).sync() as other:
            other.reset(seed=1, index=0)
            other.step({"text": "not a turn"})
            assert other.state()["ended"] == "malformed"
        assert client.state()["ended"] is None
        with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
            client.step({"words": "no such field"})


def test_openenv_finds_its_own_rules_kept(served):
    from openenv.cli._validation import validate_running_environment
    from openenv.validation.parsers.openenv_yaml import OpenEnvYamlParser

    report = validate_running_environment(served, timeout_s=30)
    assert report["passed"], report["criteria"]
    manifest = OpenEnvYamlParser().parse(ROOT / "docs" / "openenv")
    assert manifest.name == "visgenenv" and manifest.reward.range == (0.0, 1.0)


# ---------------------------------------------------------------------------- hubs
@pytest.mark.parametrize("tools", ["names", "schema"])
def test_visgendata_loads_with_datasets(tmp_path, monkeypatch, tools):
    """As written, but for reals: they come back to ten digits."""
    import datasets

    from lib.runs import read_jsonl, write_jsonl
    from make_data import chat_record, listed_tools

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rollout = RolloutConfig(tools=tools)
    trajectories = []
    for task in TASKS:
        made = expert_episode(task, 1, rollout)
        made["reward"] = ltr_reward(made, RewardConfig(), task["pool"])
        trajectories.append({**made, "tools": listed_tools(made, rollout), "review": "unreviewed"})
    written = {"visgen": trajectories, "chat": [chat_record(t) for t in trajectories]}
    for name, records in written.items():
        file = tmp_path / f"{name}.jsonl"
        write_jsonl(file, records)
        loaded = datasets.load_dataset(
            "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(loaded) == len(records)
        for found, record in zip(loaded, read_jsonl(file)):
            assert rounded(found) == rounded(record)


def rounded(value):
    """A JSON value with its reals at nine digits, whole ones as integers."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 9) if isinstance(value, float) else value


def test_an_exported_policy_has_a_card_and_loads(request):
    import shutil

    import torch
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import bench
    from lib.experiment import load_config
    from lib.runs import open_run

    config = load_config(ROOT / "configs/quick.yaml", ["name=test-export"])
    folder = ROOT / "runs/test-export"
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    shutil.rmtree(folder, ignore_errors=True)
    run = open_run(config)
    with pytest.raises(SystemExit, match="has no trained policy"):
        bench.export_policy(config, run, run / "hub")
    shutil.copytree(ROOT / "data/base", run / "pst/final")
    (run / "vrl").mkdir()
    parts = dict.fromkeys(("plan", "fine", *bench.PARTS, "strict"), 0.25)
    before = {"greedy": {"reward": 0.125, **parts, "cons": None}}
    (run / "vrl/before.json").write_text(json.dumps(before))
    bench.export_policy(config, run, run / "hub")
    with pytest.raises(SystemExit, match="is there already"):
        bench.export_policy(config, run, run / "hub")

    card = ModelCard.load(run / "hub/README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.language == ["en"] and card.data.base_model is None
    assert "| reward | 0.125 |" in card.text and "| cons | - |" in card.text
    assert "after PST" in card.text and "name: test-export" in card.text
    model = AutoModelForCausalLM.from_pretrained(run / "hub", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data/base", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))
    template = (ROOT / "data/templates/chatml.jinja").read_text()
    assert AutoTokenizer.from_pretrained(run / "hub").chat_template == template


# ---------------------------------------------------------------------------- SkyRL
def test_an_episode_through_skyrl_gym_is_the_one_that_step_plays(tmp_path):
    pytest.importorskip("skyrl_gym", reason="skyrl-gym is not installed: pip install skyrl-gym")
    import skyrl_gym

    from lib import for_skyrl

    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "rows.jsonl"
    tasks.write_text("\n".join(map(json.dumps, TASKS)))
    for_skyrl.write_rows(str(tasks), str(out))
    row = json.loads(out.read_text().splitlines()[3])
    prompt = row.pop("prompt")
    for_skyrl.register()
    env = skyrl_gym.make(row.pop("env_class"), env_config={}, extras={**row, "max_turns": 32})
    assert env.init(prompt)[0] == prompt

    trajectory = vision_agent(TASKS[3], VisGenEnv(for_skyrl.ROLLOUT), row["seed"])
    turns = [m["content"] for m in trajectory["messages"] if m["role"] == "assistant"]
    outputs = [env.step(text + "<|im_end|>") for text in turns]
    assert [said for output in outputs for said in output["observations"]] == [
        m for m in trajectory["messages"] if m["role"] == "tool"
    ]
    assert [output["done"] for output in outputs] == [False] * (len(turns) - 1) + [True]
    wanted = ltr_reward(trajectory, RewardConfig(), TASKS[3]["pool"])
    assert sum(output["reward"] for output in outputs) == wanted["total"] > 0.5
    assert env.get_metrics()["plan"] == wanted["plan"]


# ---------------------------------------------------------------------------- the page
def test_the_page_names_options_that_are_there():
    page = (ROOT / "docs/scale.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"-m (lib\.for_\w+)(.*)", page)
    assert {module for module, _ in commands} >= {"lib.for_trl", "lib.for_openenv", "lib.for_skyrl"}
    for module, words in commands:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        options = re.findall(r"--[a-z-]+", words)
        assert all(f'"{option}"' in source for option in options), (module, options)


@pytest.mark.parametrize("module", ["for_trl", "for_openenv", "for_skyrl"])
def test_a_missing_package_is_one_line(module, tmp_path):
    """As where it is not installed: a package of the name that cannot be imported."""
    package = {"for_trl": "trl", "for_openenv": "openenv", "for_skyrl": "skyrl_gym"}[module]
    (tmp_path / f"{package}.py").write_text("raise ImportError('no such package')")
    arguments = ["data/base", "data/visgenbench.jsonl"] if module == "for_trl" else []
    done = subprocess.run(
        [sys.executable, "-m", f"lib.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: no such package")
    assert "pip install" in done.stderr and len(done.stderr.splitlines()) == 1
