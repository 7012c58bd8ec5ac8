"""Tokens a second of our sampler against transformers' generate, on a run that has finished PST.

python tests/measure_speed.py --config configs/tiny.yaml
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from env import VisGenEnv  # noqa: E402
from lib.evaluation import mean  # noqa: E402
from lib.experiment import command_line  # noqa: E402
from lib.policy import load_policy, set_up  # noqa: E402
from lib.runs import open_run, read_jsonl, seeded_rng  # noqa: E402
from lib.sampler import sample_rollouts  # noqa: E402
from lib.tokens import encode_prompt, encode_tool_messages, load_tokenizer  # noqa: E402


def generate_rollouts(model, tokenizer, tasks, config):
    """The same greedy episodes with transformers' `generate`, which reads all again at every turn.

    Returns the ids of each episode, and how many tokens were sampled.
    """
    stop = tokenizer.eos_token_id
    envs, histories = [], []
    for task in tasks:
        env = VisGenEnv(config.rollout)
        messages, info = env.reset(task, seeded_rng(0, "env", task["id"]).getrandbits(31))
        envs.append(env)
        histories.append(encode_prompt(tokenizer, messages, info["tools"]))
    sampled = 0
    live = list(range(len(tasks)))
    while live:
        turns = greedy_turns(model, tokenizer, [histories[i] for i in live], config)
        going = []
        for i, turn in zip(live, turns):
            turn = turn[: config.model.max_len - len(histories[i])]
            histories[i] += turn
            sampled += len(turn)
            if turn[-1] != stop:
                continue
            messages, _, terminated, truncated, _ = envs[i].step(tokenizer.decode(turn[:-1]))
            if terminated or truncated:
                continue
            histories[i] += encode_tool_messages(tokenizer, messages)
            if len(histories[i]) < config.model.max_len:
                going.append(i)
        live = going
    return histories, sampled


def greedy_turns(model, tokenizer, histories, config):
    """One turn after each history, up to its end of turn, as lists of ids."""
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    width = max(map(len, histories))
    padding = [width - len(h) for h in histories]
    ids = [[pad] * n + h for n, h in zip(padding, histories)]
    mask = [[0] * n + [1] * len(h) for n, h in zip(padding, histories)]
    new = model.generate(
        torch.tensor(ids, device=model.device),  # (b, width)
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=pad,
        max_new_tokens=config.rollout.max_turn_tokens,
    )[:, width:].tolist()
    return [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in new]


def compare_speed(model, tokenizer, tasks, config, n=64):
    """Print the tokens a second of our sampler and of `generate` on the same greedy episodes."""
    tasks = [t for t in tasks if t["modality"] == "video"][:n]
    sample_rollouts(model, tokenizer, tasks[:4], config, 0.0, seed=0)  # first calls are slow
    start = time.time()
    rollouts = sample_rollouts(model, tokenizer, tasks, config, 0.0, seed=0)
    ours_s = time.time() - start
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # generate as it comes, with transformers' own attention
    start = time.time()
    histories, theirs = generate_rollouts(model, tokenizer, tasks, config)
    theirs_s = time.time() - start
    model.set_attn_implementation(attention)
    ours = sum(sum(r.loss_mask) for r in rollouts)
    turns = mean(len(r.trajectory["turns"]) for r in rollouts)
    tokens = mean(len(r.ids) for r in rollouts)
    same = sum(r.ids == history for r, history in zip(rollouts, histories))
    print(
        f"{len(tasks)} trajectories, {turns:.1f} turns and {tokens:.0f} tokens each, greedy, "
        f"{torch.get_num_threads()} threads; {same} of {len(tasks)} token for token the same"
    )
    for who, sampled, seconds in (
        ("ours", ours, ours_s),
        ("transformers generate", theirs, theirs_s),
    ):
        rate = sampled / seconds
        print(f"{who:22} {sampled:7} tokens  {seconds:6.1f} s  {rate:7.0f} tokens/s")
    print(f"ratio {ours / ours_s * theirs_s / theirs:.1f}")


def main():
    config, _ = command_line(__doc__)
    run, device = open_run(config), set_up(config)
    tokenizer = load_tokenizer(config, run)
    model = load_policy(run / "pst" / "final", config, tokenizer, device)
    sampler = model.float().eval().requires_grad_(False)
    compare_speed(sampler, tokenizer, read_jsonl(run / "data" / "train.jsonl"), config)


if __name__ == "__main__":
    main()
