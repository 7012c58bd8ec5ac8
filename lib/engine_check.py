"""The sampler's weights, and whether sampler and trainer agree."""

from dataclasses import replace

import torch

from lib.policy import token_logprobs
from lib.quantize import base_weight
from lib.sampler import sample_rollouts
from lib.vllm_engine import VllmEngine


def agent_logprobs(policy, rollout):
    """(trainer's, sampler's) log-probabilities (n,) of the agent's tokens of one rollout."""
    device = next(policy.parameters()).device
    ids = torch.tensor([rollout.ids], device=device)  # (1, T)
    mask = torch.tensor([rollout.loss_mask], dtype=torch.bool, device=device)[:, 1:]  # (1, T - 1)
    positions = torch.arange(ids.shape[1], device=device)[None]
    pictures = [(0, 0, rollout.pictures)] if rollout.pictures else []
    logprobs = token_logprobs(policy, ids, positions, mask, pictures=pictures)
    return logprobs[mask], torch.tensor([rollout.logprobs], device=device)[:, 1:][mask]


def sync_sampler(sampler, policy):
    """Give the sampler the policy's weights: a fresh fp32 merge of base and adapter, never undone in place; vLLM gets the adapter alone."""
    if isinstance(sampler, VllmEngine):
        return sampler.take_adapter(policy)
    plain = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    target = dict(sampler.named_parameters())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if hasattr(module, "get_delta_weight"):
                target[name + ".weight"].copy_(
                    base_weight(module.base_layer) + module.get_delta_weight("default")
                )
        for name, p in plain.named_parameters():
            if not any(part in name for part in (".base_layer.", "lora_", ".original_module.")):
                target[name.replace(".modules_to_save.default", "")].copy_(p)


def check_engine(sampler, policy, tokenizer, task, config, turns=0):
    """Sampler and trainer agree on a fixed prompt: the largest difference of log-probabilities (outside float32 its 99th percentile), in nats.

    SystemExit above a threshold. turns: play that many short turns instead of the whole episode, for a check after every sync.
    """
    short = (
        replace(
            config,
            rollout=replace(
                config.rollout,
                max_turns=turns,
                max_turn_tokens=min(64, config.rollout.max_turn_tokens),
            ),
        )
        if turns
        else config
    )
    rollout = sample_rollouts(sampler, tokenizer, [task], short, 1.0, seed=0)[0]
    exact = policy.dtype == torch.float32 and getattr(
        sampler, "exact", True
    )  # elsewhere kernels differ by rounding
    threshold = 1e-4 if exact else 1.0
    with torch.no_grad():
        ours, theirs = agent_logprobs(policy, rollout)
    gaps = (ours - theirs).abs()
    gap = float(
        gaps.max() if exact else gaps.quantile(0.99)
    )  # in 16 bits the rarest of many sampled tokens may be far off by rounding
    if not gap <= threshold:
        raise SystemExit(
            f"error: sampler and trainer disagree on {sum(rollout.loss_mask)} tokens of a fixed prompt: {'largest' if exact else '99th percentile of the'}"
            f" difference of log-probabilities {gap:.2e}, allowed {threshold:.0e}; the sampler does not hold the policy's weights"
        )
    return gap


def check_reference(policy, tokenizer, task, config, sampler):
    """KL to pi_pst (adapter off) is 0 before the first step. SystemExit with the number otherwise."""
    rollout = sample_rollouts(sampler, tokenizer, [task], config, 1.0, seed=0)[0]
    with torch.no_grad():
        now, _ = agent_logprobs(policy, rollout)
        with policy.disable_adapter():
            ref, _ = agent_logprobs(policy, rollout)
    kl = float(((ref - now).exp() - (ref - now) - 1).sum())
    if kl != 0.0:
        raise SystemExit(
            f"error: KL to the PST policy is {kl:.2e} at step 0, it must be 0: the adapter does not start at zero"
        )
