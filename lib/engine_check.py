"""The sampler's weights: how it gets the policy's, and whether sampler and trainer agree.

A sampler that has missed an update, or computes something else than the trainer, makes GRPO
off-policy without a word. So both score the same tokens, at the start and after an adapter sync.
"""

from dataclasses import replace

import torch

from lib.experiment import Config
from lib.policy import token_logprobs
from lib.quantize import base_weight
from lib.rollout import Rollout
from lib.sampler import sample_rollouts
from lib.vllm_engine import VllmEngine

# Differences of log-probabilities that are allowed, in nats. Both are ours: in float32 sampler and
# trainer differ by the order of sums, elsewhere their kernels differ by rounding.
EXACT_GAP = 1e-4
ROUNDED_GAP = 1.0


def sync_sampler(sampler: torch.nn.Module | VllmEngine, policy: torch.nn.Module) -> None:
    """Give the sampler the policy's weights; vLLM gets the adapter alone.

    Our own gets a fresh fp32 merge of base and adapter, never undone in place: merging and
    unmerging again and again would drift.
    """
    if isinstance(sampler, VllmEngine):
        return sampler.take_adapter(policy)
    plain = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    target = dict(sampler.named_parameters())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if hasattr(module, "get_delta_weight"):
                merged = base_weight(module.base_layer) + module.get_delta_weight("default")
                target[name + ".weight"].copy_(merged)
        for name, p in plain.named_parameters():
            if not any(part in name for part in (".base_layer.", "lora_", ".original_module.")):
                target[name.replace(".modules_to_save.default", "")].copy_(p)


def agent_logprobs(policy: torch.nn.Module, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """(trainer's, sampler's) log-probabilities (n,) of the agent's tokens of one rollout."""
    device = next(policy.parameters()).device
    ids = torch.tensor([rollout.ids], device=device)  # (1, T)
    mask = torch.tensor([rollout.loss_mask], dtype=torch.bool, device=device)[:, 1:]  # (1, T - 1)
    positions = torch.arange(ids.shape[1], device=device)[None]  # (1, T)
    pictures = [(0, 0, rollout.pictures)] if rollout.pictures else []
    trainers = token_logprobs(policy, ids, positions, mask, pictures=pictures)  # (1, T - 1)
    samplers = torch.tensor([rollout.logprobs], device=device)[:, 1:]  # (1, T - 1)
    return trainers[mask], samplers[mask]


def check_engine(
    sampler: torch.nn.Module | VllmEngine,
    policy: torch.nn.Module,
    tokenizer,
    task: dict,
    config: Config,
    turns: int = 0,
) -> float:
    """Play one episode and compare sampler with trainer; the gap of log-probabilities, in nats.

    The gap is the largest difference in float32. In 16 bits it is the 99th percentile, because the
    rarest of many sampled tokens may be far off by rounding. SystemExit above what is allowed.
    turns: play that many short turns, not the whole episode, for a check after every sync.
    """
    if turns:
        short_turn = min(64, config.rollout.max_turn_tokens)
        short = replace(config.rollout, max_turns=turns, max_turn_tokens=short_turn)
        config = replace(config, rollout=short)
    rollout = sample_rollouts(sampler, tokenizer, [task], config, 1.0, seed=0)[0]
    with torch.no_grad():
        trainers, samplers = agent_logprobs(policy, rollout)
    gaps = (trainers - samplers).abs()  # (n,)
    exact = policy.dtype == torch.float32 and getattr(sampler, "exact", True)
    if exact:
        gap, allowed, measure = float(gaps.max()), EXACT_GAP, "largest"
    else:
        gap, allowed = float(gaps.quantile(0.99)), ROUNDED_GAP
        measure = "99th percentile of the"
    if not gap <= allowed:  # NaN is a disagreement as well
        raise SystemExit(
            f"error: sampler and trainer disagree on {sum(rollout.loss_mask)} tokens of a fixed "
            f"prompt: {measure} difference of log-probabilities {gap:.2e}, allowed {allowed:.0e}; "
            "the sampler does not hold the policy's weights"
        )
    return gap


def check_reference(
    policy: torch.nn.Module,
    tokenizer,
    task: dict,
    config: Config,
    sampler: torch.nn.Module | VllmEngine,
) -> None:
    """KL to pi_pst (adapter off) is 0 before the first step. SystemExit with the number if not."""
    rollout = sample_rollouts(sampler, tokenizer, [task], config, 1.0, seed=0)[0]
    with torch.no_grad():
        now, _ = agent_logprobs(policy, rollout)
        with policy.disable_adapter():
            ref, _ = agent_logprobs(policy, rollout)
    kl = float(((ref - now).exp() - (ref - now) - 1).sum())
    if kl != 0.0:
        raise SystemExit(
            f"error: KL to the PST policy is {kl:.2e} at step 0, it must be 0: "
            "the adapter does not start at zero"
        )
