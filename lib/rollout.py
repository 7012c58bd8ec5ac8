"""One episode as the policy sees it: token ids, loss mask, the sampler's log-probabilities, and its environment's replies."""

import math
from dataclasses import dataclass, field

from env import VisGenEnv
from lib.runs import seeded_rng
from lib.tokens import encode_prompt, encode_tool_messages
from lib.vision import pictures_of, show_pictures


@dataclass
class Rollout:
    """One episode, from the first token to its advantage."""

    task: dict
    group_id: int
    seed: int  # of the environment; a group shares it
    ids: list = field(default_factory=list)  # all tokens, as sampled or as encoded once
    loss_mask: list = field(
        default_factory=list
    )  # 1 on the agent's own tokens, end of turn included
    logprobs: list = field(default_factory=list)  # the sampler's, 0 where loss_mask is 0
    turn_start: int = 0  # where the current turn's tokens begin
    written: int = 0  # tokens of the agent's so far
    pictures: list = field(default_factory=list)  # the user's, in the prompt (lib/vision.py)
    trajectory: dict = None
    reward: float = math.nan
    advantage: float = 0.0


def extend(rollout, tokens, trained, logprobs=None):
    """Append tokens to a rollout; ids, loss mask and log-probabilities grow by the same call."""
    rollout.ids += tokens
    rollout.loss_mask += [int(trained)] * len(tokens)
    rollout.logprobs += logprobs or [0.0] * len(tokens)
    if trained:
        rollout.written += len(tokens)
    else:
        rollout.turn_start = len(rollout.ids)


def open_rollouts(tokenizer, tasks, config, seed, group_size):
    """group_size Rollouts of each task, with their prompts, and their environments: a group shares prompt and environment seed."""
    rollouts, envs = [], []
    for group_id, task in enumerate(tasks):
        env_seed = seeded_rng(seed, "env", task["id"]).getrandbits(31)
        for _ in range(group_size):
            rollouts.append(Rollout(task, group_id, env_seed))
            envs.append(VisGenEnv(config.rollout))
            messages, info = envs[-1].reset(task, env_seed)
            messages = show_pictures(tokenizer, task, messages)
            rollouts[-1].pictures = pictures_of(messages)
            if rollouts[-1].pictures and config.rollout.engine == "vllm":
                raise SystemExit(
                    f"error: task {task['id']} has a picture for the policy, and vLLM is given none here; set rollout.engine=transformers"
                )
            prompt = encode_prompt(tokenizer, messages, info["tools"])
            if len(prompt) >= config.model.max_len // 2:
                raise SystemExit(
                    f"error: task {task['id']}: its prompt has {len(prompt)} tokens, half of model.max_len {config.model.max_len} or more; "
                    "raise model.max_len, or shorten the prompt by `rollout.tools: names`"
                )
            extend(rollouts[-1], prompt, trained=False)
    return rollouts, envs


def go_on(rollout, env, tokenizer, config):
    """After a sampled token: the environment replies if it ended a turn. Returns the ids of the reply, [] inside a turn, None at the episode's end."""
    token, reply, ended, settings = rollout.ids[-1], [], None, config.rollout
    if token == tokenizer.eos_token_id:
        messages, _, terminated, truncated, _ = env.step(
            tokenizer.decode(rollout.ids[rollout.turn_start : -1])
        )
        if terminated or truncated:
            ended = env.ended
        else:
            reply = encode_tool_messages(tokenizer, messages)
            extend(rollout, reply, trained=False)
    elif token >= len(tokenizer):  # a padded row of the vocabulary, which no text has
        ended = "malformed"
    elif len(rollout.ids) - rollout.turn_start >= settings.max_turn_tokens:
        ended = "max_tokens"
    if not ended and (len(rollout.ids) >= config.model.max_len):
        ended = "max_tokens"
    if ended:
        close(rollout, env, ended)
    return None if ended else reply


def close(rollout, env, ended):
    """End an episode. One that was cut here ends as `ended`: the environment has not seen its unfinished turn."""
    env.ended = env.ended or ended
    rollout.trajectory = {**env.trajectory(), "pool": env.pool}
