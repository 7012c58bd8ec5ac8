"""How much of a VRL step's gradient is signal, by how the loss is put together. Not a test.

    python tests/measure_signal.py 8 configs/quick.yaml

Plays 8 steps with the PST policy of runs/<name>, without an update between them, and prints
for each form of the loss the mean cosine of a step's gradient with the sum of the other steps'. 1:
all steps say the same; with one step in a hundred of signal, 0.1 or less. Compare only within one
run of this script.
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_vrl  # noqa: E402
from lib.evaluation import score_rollouts  # noqa: E402
from lib.experiment import load_config  # noqa: E402
from lib.policy import load_policy, set_up, trained_parameters  # noqa: E402
from lib.runs import read_jsonl  # noqa: E402
from lib.sampler import sample_rollouts  # noqa: E402
from lib.tokens import load_tokenizer  # noqa: E402

FORMS = [
    {"loss_mean": "token", "advantage": "mean"},
    {"loss_mean": "token", "advantage": "mean_std"},
    {"loss_mean": "sequence", "advantage": "mean"},
    {"loss_mean": "sequence", "advantage": "mean_std"},
]


def gradient(policy, rollouts, config):
    """The gradient of one step, all parameters in a row."""
    policy.zero_grad(set_to_none=True)
    train_vrl.set_advantages(rollouts, config.vrl.advantage)
    trained, _ = train_vrl.select_trained(rollouts, config.vrl)
    train_vrl.add_gradient(policy, (trained, []), config, Counter(), [])
    return torch.cat([p.grad.flatten() for p in trained_parameters(policy).values()])


def main(argv):
    steps = int(argv[0])
    config = load_config(argv[1], argv[2:])
    run = ROOT / "runs" / config.name
    device = set_up(config)
    tokenizer = load_tokenizer(config, run)
    policy = load_policy(run / "pst" / "final", config, tokenizer, device).float()
    tasks = read_jsonl(run / "data" / "train.jsonl")
    gradients = [[] for _ in FORMS]
    rewards = []
    for step in range(steps):
        rollouts = sample_rollouts(
            policy.eval(),
            tokenizer,
            train_vrl.step_tasks(tasks, config, step),
            config,
            config.rollout.temperature,
            seed=step,
            group_size=config.vrl.group_size,
        )
        score_rollouts(rollouts, config)
        rewards += [r.reward for r in rollouts]
        for of_form, form in zip(gradients, FORMS):
            vrl = replace(config.vrl, **form)
            of_form.append(gradient(policy, rollouts, replace(config, vrl=vrl)))
    print(f"{len(rewards)} rollouts, R_vrt {sum(rewards) / len(rewards):.3f}")
    for of_form, form in zip(gradients, FORMS):
        total = sum(of_form)
        near = [torch.cosine_similarity(g, total - g, dim=0) for g in of_form]
        print(f"{sum(near) / steps:.3f}  {' '.join(f'{k}={v}' for k, v in form.items())}")


if __name__ == "__main__":
    main(sys.argv[1:])
