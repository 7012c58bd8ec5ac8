"""VisGenEnv through other trainers' doors: TRL, OpenEnv, Gymnasium; VisGenData in `datasets`.

What is not installed skips its tests: `pip install "trl>=1.16,<2" "openenv>=0.10,<0.11"`.
"""

import json
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from env import VisGenEnv, parse_utpc  # noqa: E402
from lib import for_trl  # noqa: E402
from lib.expert import vision_agent  # noqa: E402
from lib.experiment import DataConfig, RewardConfig, RolloutConfig  # noqa: E402
from lib.tasks import make_tasks  # noqa: E402
from lib.toolbox import check_schema, load_tools, tool_schemas  # noqa: E402
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
    task = min(TASKS, key=lambda task: task["constraints"]["images"] or 9)
    [row] = for_trl.rows([task], NAMES)
    messages = expert_episode(task, row["seed"], thoughts="short")["messages"]
    ids, mask = encode_trajectory(tokenizer, messages)
    labels = [i if m else -100 for i, m in zip(ids, mask)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.15:
            break

    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
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
    print(json.dumps(log, indent=1))
    assert trainer.state.global_step == 2 and len(log) == 2
    assert all(entry["tools/call_frequency"] > 0 for entry in log)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed
