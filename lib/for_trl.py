"""VisGenEnv for TRL's GRPOTrainer, by its `environment_factory` (TRL 1.16, transformers 5.13 on):

    pip install "trl>=1.16,<2"
    python -m lib.for_trl runs/quick/pst/final runs/quick/data/train.jsonl --out runs/trl

VisGenTools has `reset` and the 36 tools of tools.yaml as methods with types and docstrings, from
which TRL makes the schemas; `reward` is LtrReward of finished rollouts. The policy writes UTPC as
with our own trainer: TRL reads the calls out of a turn, and the rest of it (thought, plan, answer)
is read here, for the reward.

What differs from VisGenEnv.step, since TRL hands over one call at a time: the calls of one turn run
one after the other, so that a call can use what an earlier one of its turn made, and the limits of
jobs at once never bind; and all 36 tools are there (`rollout.tool_pool: all`).
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Literal

from env import VisGenEnv, tool_message
from lib.experiment import RewardConfig, RolloutConfig
from lib.runs import ROOT, read_jsonl, run_command, seeded_rng
from lib.text import tag, to_json
from lib.toolbox import load_tools
from rewards import ltr_rewards

# How the system message lists the tools: not at all with `schema`, since the chat template does.
ROLLOUT = RolloutConfig(tools="schema", tool_pool="all")

PYTHON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "object": dict}

# How transformers reads a turn: the calls go to `tool_calls`, everything else stays text.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {
            "close_pattern": r"<\|im_end\|>\s*",
            "content": "text",
            "repeats": True,
            "join": "",
        },
    },
}


# ------------------------------------------------------------------ the tools as Python methods
def type_of(schema: dict) -> Any:
    """The Python type of a JSON Schema of tools.yaml, as transformers reads types."""
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if schema["type"] == "array":
        return list[type_of(schema["items"])]
    return PYTHON_TYPES[schema["type"]]


def words_of(schema: dict) -> str:
    """A parameter's description, with what a Python type cannot say: its other JSON Schema."""
    further = {k: v for k, v in schema.items() if k not in ("type", "enum", "description")}
    text = " ".join(str(schema.get("description", "")).split())
    return f"{text} {to_json(further)}".strip() if further else text or "see the tool"


def tool_method(name: str) -> Callable:
    """The method of VisGenTools that calls a tool, typed and documented from tools.yaml."""
    tool = load_tools()[name]
    properties, required = tool["parameters"]["properties"], tool["parameters"]["required"]

    def method(self, /, **arguments):
        return self._call(name, arguments)

    parameters = [Parameter("self", Parameter.POSITIONAL_ONLY)]
    annotations = {}
    for param, schema in properties.items():
        default = Parameter.empty if param in required else tool["blank"].get(param)
        annotation = type_of(schema) | None if default is None else type_of(schema)
        annotations[param] = annotation
        parameters.append(
            Parameter(param, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    lines = [f"    {param}: {words_of(schema)}" for param, schema in properties.items()]
    method.__name__ = method.__qualname__ = name
    method.__doc__ = "\n".join([" ".join(tool["description"].split()), "", "Args:", *lines])
    method.__annotations__ = {**annotations, "return": str}
    method.__signature__ = Signature(parameters, return_annotation=str)
    return method


class VisGenTools:
    """One rollout's environment, as TRL's `environment_factory` makes it; reset begins another.

    Every public method but `reset` is a tool of Table 9 and returns what the agent reads.
    """

    def __init__(self, rollout: RolloutConfig = ROLLOUT, reward: RewardConfig | None = None):
        self._rollout = rollout
        self._reward = reward or RewardConfig()

    def reset(self, *, task: str, seed: int, **row: Any) -> None:
        """Begin the episode of a row of `rows`; its prompt is the opening already."""
        self._env = VisGenEnv(self._rollout)
        self._env.reset(json.loads(task), seed)

    def _call(self, name: str, arguments: dict) -> str:
        call = {"name": name, "arguments": arguments, "error": None}
        return tool_message(self._env.call(call))["content"]

    def _trajectory(self, completion: list[dict]) -> dict:
        """The Trajectory of the episode, once TRL has the rollout's messages."""
        env = copy.deepcopy(self._env)
        ran, env.calls = iter(env.calls), []
        # A thought is judged by what was there when it was written: the user's media, then those
        # of the calls before it.
        made = env.artifacts
        env.artifacts = {i: medium for i, medium in made.items() if medium["tool"] == "user"}
        for message in completion:
            if message["role"] == "tool":
                env.messages.append({"role": "tool", "content": message["content"]})
                env.n_replies += 1
                continue
            turn = env.read_turn(text_of(message))
            env.n_replies = 0
            env.answer = turn["answer"]
            for call in message.get("tool_calls") or unreadable(turn):
                file_call(env, call.get("function", call), ran)
                for i in env.calls[-1]["outputs"] if env.calls else ():
                    env.artifacts[i] = made[i]
        env.artifacts = made
        env.ended = why_ended(env, completion)
        return env.trajectory()


for _name in load_tools():
    setattr(VisGenTools, _name, tool_method(_name))


# ------------------------------------------------------------------ the reward
def reward(
    environments: list[VisGenTools],
    completions: list[list[dict]],
    log_metric: Callable | None = None,
    **more: Any,
) -> list[float]:
    """LtrReward of finished rollouts, for `reward_funcs`. The means of R_plan and R_fine go to
    TRL's log. A judge that fails gives NaN, which TRL leaves out."""
    trajectories = [
        environment._trajectory(completion)
        for environment, completion in zip(environments, completions, strict=True)
    ]
    found = ltr_rewards(trajectories, environments[0]._reward)
    for part in ("plan", "fine"):
        if log_metric:
            log_metric(part, sum(r[part] for r in found) / len(found))
    return [r["total"] for r in found]


def text_of(message: dict) -> str:
    """A turn as the policy wrote it, from the message that TRL read out of it."""
    thought = message.get("reasoning_content")
    calls = [tag("tool_call", call["function"]) for call in message.get("tool_calls") or []]
    return "".join([tag("think", thought) if thought else "", message["content"], *calls])


def unreadable(turn: dict) -> list[dict]:
    """The calls of a turn that TRL could not read, so that none of its calls ran."""
    return [call for call in turn["calls"] if call["error"]]


def file_call(env: VisGenEnv, call: dict, ran: Any) -> None:
    """Put a call of the latest turn into the episode: the record of one that ran, or a new one if
    TRL refused it. One that never ran, since the rollout was cut before, leaves none."""
    if call["name"] in load_tools() and isinstance(call["arguments"], dict):
        if record := next(ran, None):
            env.calls.append({**record, "turn": len(env.turns)})
    else:
        env.call({"error": None, **call})


def why_ended(env: VisGenEnv, completion: list[dict]) -> str:
    """What ended the rollout: answer, max_turns (TRL's limits of calls or tokens), malformed."""
    if env.answer is not None:
        return "answer"
    cut = completion[-1]["role"] == "tool" or completion[-1].get("tool_calls")
    return "max_turns" if cut else "malformed"


# ------------------------------------------------------------------ what the trainer is given
def rows(tasks: list[dict], rollout: RolloutConfig = ROLLOUT, seed: int = 0) -> list[dict]:
    """Tasks as rows of a data set: prompt (the opening messages), task (JSON), seed."""
    env = VisGenEnv(rollout)
    made = []
    for task in tasks:
        env_seed = seeded_rng(seed, "env", task["id"]).getrandbits(31)
        prompt, _ = env.reset(task, env_seed)
        made.append({"prompt": prompt, "task": to_json(task), "seed": env_seed})
    return made


def prepare_tokenizer(tokenizer: Any, rollout: RolloutConfig = ROLLOUT, template: str = "chatml"):
    """Give a ChatML tokenizer our template, which changes no earlier turn, and the way in which
    UTPC's calls are read. `template`: chatml, or qwen3 for Qwen's models. Returns the tokenizer."""
    path = ROOT / "data" / "templates" / f"{template}.jinja"
    # Where the system message lists the tools, TRL's schemas of them are left out.
    head = "" if rollout.tools == "schema" else "{%- set tools = none -%}"
    tokenizer.chat_template = head + path.read_text(encoding="utf-8")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def make_trainer(
    model: Any,
    tokenizer: Any,
    tasks: list[dict],
    args: Any,
    rollout: RolloutConfig = ROLLOUT,
    reward_config: RewardConfig | None = None,
) -> Any:
    """TRL's GRPOTrainer on VisGenEnv. model: a folder, a hub name or a model; tokenizer: from
    prepare_tokenizer; args: a GRPOConfig."""
    from datasets import Dataset
    from trl import GRPOTrainer

    return GRPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows(tasks, rollout, args.seed)),
        environment_factory=partial(VisGenTools, rollout, reward_config),
        reward_funcs=reward,
    )


def main() -> None:
    """Train a policy with TRL, by the paper's 4 rollouts a task."""
    parser = argparse.ArgumentParser(prog="python -m lib.for_trl")
    parser.add_argument("model", help="a policy's folder or hub name, such as runs/NAME/pst/final")
    parser.add_argument("tasks", type=Path, help="JSONL of tasks: runs/NAME/data/train.jsonl")
    parser.add_argument("--out", default="runs/trl", help="folder of the trained policy")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tasks-per-step", type=int, default=24)
    parser.add_argument("--tools", choices=("schema", "signature", "names"), default="names")
    parser.add_argument("--template", choices=("chatml", "qwen3"), default="chatml")
    parser.add_argument("--max-tokens", type=int, default=768, help="of a rollout, replies too")
    parser.add_argument("--vllm", action="store_true", help="rollouts by vLLM, on the same GPUs")
    given = parser.parse_args()
    try:
        import torch
        from transformers import AutoTokenizer
        from trl import GRPOConfig
    except ImportError as e:
        raise SystemExit(f'error: {e}; `pip install "trl>=1.16,<2"`') from e

    rollout = RolloutConfig(tools=given.tools, tool_pool="all")
    args = GRPOConfig(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=given.tasks_per_step,
        num_generations=4,
        max_completion_length=given.max_tokens,
        max_tool_calling_iterations=rollout.max_turns,
        use_vllm=given.vllm,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        logging_steps=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    prepare_tokenizer(tokenizer, rollout, given.template)
    trainer = make_trainer(given.model, tokenizer, read_jsonl(given.tasks), args, rollout)
    trainer.train()
    trainer.save_model(given.out)


if __name__ == "__main__":
    run_command(main)
