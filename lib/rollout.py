"""One episode as the policy sees it: token ids, loss mask, log-probabilities, and what its
environment replies. Both engines (lib/sampler.py, lib/vllm_engine.py) play rollouts by these steps.
"""

import math
from dataclasses import dataclass, field

import torch

from env import VisGenEnv
from lib.experiment import Config
from lib.runs import seeded_rng
from lib.tokens import encode_prompt, encode_tool_messages
from lib.vision import pictures_of, show_pictures


@dataclass
class Rollout:
    """One episode, from the first token to its advantage. Lists of tokens have length T."""

    task: dict
    # Place of the task in the step's list; the rollouts of one task are a group.
    group_id: int
    # Of the environment; a group shares it.
    seed: int
    # All tokens, as sampled or as encoded once.
    ids: list[int] = field(default_factory=list)
    # 1 on the agent's own tokens, end of turn included.
    loss_mask: list[int] = field(default_factory=list)
    # The sampler's, in nats; 0 where loss_mask is 0.
    logprobs: list[float] = field(default_factory=list)
    # Where the current turn's tokens begin.
    turn_start: int = 0
    # The user's pictures in the prompt (lib/vision.py).
    pictures: list[tuple] = field(default_factory=list)
    trajectory: dict | None = None
    # R_vrt; NaN while it is not known.
    reward: float = math.nan
    advantage: float = 0.0
    # False: not in the policy gradient, since it has no score or its group's rewards are all alike.
    signal: bool = True
    # The trainer's, (T - 1,), set by train_vrl.py's update where the loss needs them: pi_old is the
    # policy before the step's first optimizer step, pi_pst the one that VRL starts from.
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None


def open_rollouts(
    tokenizer, tasks: list[dict], config: Config, seed: int, group_size: int
) -> tuple[list[Rollout], list[VisGenEnv]]:
    """group_size Rollouts of each task, with their prompts, and the environment of each.

    A group shares its prompt and its environment's seed. SystemExit: a prompt that leaves the
    episode less than half of `model.max_len`, or a picture that vLLM is not given.
    """
    rollouts = []
    envs = []
    for group_id, task in enumerate(tasks):
        env_seed = seeded_rng(seed, "env", task["id"]).getrandbits(31)
        for _ in range(group_size):
            env = VisGenEnv(config.rollout)
            rollout = Rollout(task, group_id, env_seed)
            write_prompt(rollout, env, tokenizer, config)
            rollouts.append(rollout)
            envs.append(env)
    return rollouts, envs


def write_prompt(rollout: Rollout, env: VisGenEnv, tokenizer, config: Config) -> None:
    """Reset the environment and put the tokens of its opening messages into the rollout."""
    task = rollout.task
    messages, info = env.reset(task, rollout.seed)
    messages = show_pictures(tokenizer, task, messages)
    rollout.pictures = pictures_of(messages)
    if rollout.pictures and config.rollout.engine == "vllm":
        raise SystemExit(
            f"error: task {task['id']} has a picture for the policy, and vLLM is given none here; "
            "set rollout.engine=transformers"
        )
    prompt = encode_prompt(tokenizer, messages, info["tools"])
    if len(prompt) >= config.model.max_len // 2:
        raise SystemExit(
            f"error: task {task['id']}: its prompt has {len(prompt)} tokens, half of model.max_len "
            f"{config.model.max_len} or more; raise model.max_len, or shorten the prompt by "
            "`rollout.tools: names`"
        )
    extend(rollout, prompt, trained=False)


def extend(
    rollout: Rollout, tokens: list[int], trained: bool, logprobs: list[float] | None = None
) -> None:
    """Append tokens to a rollout; ids, loss mask and log-probabilities grow by the same call."""
    rollout.ids += tokens
    rollout.loss_mask += [int(trained)] * len(tokens)
    rollout.logprobs += logprobs or [0.0] * len(tokens)
    if not trained:
        rollout.turn_start = len(rollout.ids)


def go_on(rollout: Rollout, env: VisGenEnv, tokenizer, config: Config) -> list[int] | None:
    """After sampled tokens: the environment replies if the last of them ended a turn.

    Returns the ids of the reply, which the rollout then holds; [] inside a turn; None at the
    episode's end, when the rollout has its trajectory. A reply that leaves no room below
    `model.max_len` ends the episode.
    """
    token = rollout.ids[-1]
    turn_tokens = len(rollout.ids) - rollout.turn_start
    reply = []
    ended = None
    if token == tokenizer.eos_token_id:
        text = tokenizer.decode(rollout.ids[rollout.turn_start : -1])
        messages, _, terminated, truncated, _ = env.step(text)
        if terminated or truncated:
            ended = env.ended
        else:
            reply = encode_tool_messages(tokenizer, messages)
            extend(rollout, reply, trained=False)
    elif token >= len(tokenizer):  # a padded row of the vocabulary, which no text has
        ended = "malformed"
    elif turn_tokens >= config.rollout.max_turn_tokens:
        ended = "max_tokens"
    if not ended and len(rollout.ids) >= config.model.max_len:
        ended = "max_tokens"
    if ended:
        close(rollout, env, ended)
        return None
    return reply


def close(rollout: Rollout, env: VisGenEnv, ended: str) -> None:
    """End an episode and keep its trajectory.

    One that was cut here ends as `ended`: the environment has not seen its unfinished turn. Tokens
    after the agent's last one go: a reply that nobody reads is not trained, and would make the
    rollout longer than `model.max_len`.
    """
    while rollout.loss_mask and not rollout.loss_mask[-1]:
        for tokens in (rollout.ids, rollout.loss_mask, rollout.logprobs):
            tokens.pop()
    env.ended = env.ended or ended
    rollout.trajectory = {**env.trajectory(), "pool": env.pool}
