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
    """The same greedy episodes with transformers' `generate`, which reads every history again at every turn. For --speed only."""
    envs, histories, prompts = [], [], []
    for task in tasks:
        envs.append(VisGenEnv(config.rollout))
        messages, info = envs[-1].reset(task, seeded_rng(0, "env", task["id"]).getrandbits(31))
        histories.append(encode_prompt(tokenizer, messages, info["tools"]))
        prompts.append(len(histories[-1]))
    sampled, live = 0, list(range(len(tasks)))
    while live:
        width, device = max(len(histories[r]) for r in live), model.device
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(histories[r])) + histories[r] for r in live],
            device=device,
        )  # (b, width)
        mask = torch.tensor(
            [[0] * (width - len(histories[r])) + [1] * len(histories[r]) for r in live],
            device=device,
        )
        new = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=config.rollout.max_turn_tokens,
        )[:, width:].tolist()
        going = []
        for r, tokens in zip(live, new):
            turn = (
                tokens[: tokens.index(tokenizer.eos_token_id) + 1]
                if tokenizer.eos_token_id in tokens
                else tokens
            )
            turn = turn[: config.model.max_len - len(histories[r])]
            histories[r] += turn
            sampled += len(turn)
            if turn[-1] == tokenizer.eos_token_id:
                messages, _, terminated, truncated, _ = envs[r].step(tokenizer.decode(turn[:-1]))
                if not (terminated or truncated):
                    histories[r] += encode_tool_messages(tokenizer, messages)
                    going += [r] if len(histories[r]) < config.model.max_len else []
        live = going
    return histories, sampled


def compare_speed(model, tokenizer, tasks, config, n=64):
    """Print the tokens/s of our sampler and of transformers' generate on the same multi-turn greedy episodes."""
    tasks = [t for t in tasks if t["modality"] == "video"][:n]
    sample_rollouts(model, tokenizer, tasks[:4], config, 0.0, seed=0)  # first calls are slow
    start = time.time()
    ours = sample_rollouts(model, tokenizer, tasks, config, 0.0, seed=0)
    middle = time.time()
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # generate as it comes, with transformers' own attention
    histories, theirs = generate_rollouts(model, tokenizer, tasks, config)
    end = time.time()
    model.set_attn_implementation(attention)
    sampled, turns = (
        sum(sum(r.loss_mask) for r in ours),
        mean(len(r.trajectory["turns"]) for r in ours),
    )
    same = sum(r.ids == h for r, h in zip(ours, histories))
    print(
        f"{len(tasks)} trajectories, {turns:.1f} turns and {mean(len(r.ids) for r in ours):.0f} tokens each, greedy, "
        f"{torch.get_num_threads()} threads; {same} of {len(tasks)} token for token the same\n"
        f"ours                   {sampled:7} tokens  {middle - start:6.1f} s  {sampled / (middle - start):7.0f} tokens/s\n"
        f"transformers generate  {theirs:7} tokens  {end - middle:6.1f} s  {theirs / (end - middle):7.0f} tokens/s\n"
        f"ratio {sampled / (middle - start) * (end - middle) / theirs:.1f}"
    )


def main():
    config, _ = command_line(__doc__)
    run, device = open_run(config), set_up(config)
    tokenizer = load_tokenizer(config, run)
    model = load_policy(run / "pst" / "final", config, tokenizer, device)
    sampler = model.float().eval().requires_grad_(False)
    compare_speed(sampler, tokenizer, read_jsonl(run / "data" / "train.jsonl"), config)


if __name__ == "__main__":
    main()
