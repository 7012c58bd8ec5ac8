"""The sampler's weights: how it gets the policy's, and whether sampler and trainer agree.

A sampler that has missed an update, or computes something else than the trainer, makes GRPO
off-policy without a word. So one fixed sequence is scored by both, with and without the adapter, at
the start and after every sync: the trainer as it trains (in bfloat16 where training multiplies in
it), our own sampler token by token through its cache, vLLM as a prompt.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from lib.experiment import Config
from lib.policy import token_logprobs, use_autocast
from lib.quantize import base_weight
from lib.rollout import Rollout
from lib.sampler import sample_rollouts, score_rollout
from lib.vllm_engine import VllmEngine

# Differences of log-probabilities that are allowed: (device, arithmetic): (figure, nats), all ours.
# In float32 sampler and trainer differ by the order of sums. In bfloat16 a rare token may be far
# off by rounding, so the largest says little. In 4 bits vLLM has another base: 8 bits.
ALLOWED = {
    ("cpu", "float32"): ("max", 1e-4),  # 3e-6 seen (tiny.yaml, smoke.yaml)
    ("cuda", "float32"): ("max", 1e-3),  # 1.11e-4 seen (an H100)
    ("cpu", "bfloat16"): ("p99", 0.5),  # 0.08 seen (SmolLM2-135M in autocast, sampled in float32)
    ("cuda", "bfloat16"): ("p99", 0.5),  # 0.12 seen (SmolLM2-135M by vLLM, an H100)
    ("cpu", "4 bits"): ("p99", 1.0),
    ("cuda", "4 bits"): ("p99", 1.0),  # not seen yet
}
# The adapter's effect is compared once it is so many times the gap that is there without it. Then
# the sampler's must be this share of the trainer's, or up to that. Ours.
VISIBLE = 3.0
SHARE = (0.5, 1.5)
# Of the fixed sequence these tokens of each of the first turns are scored. Ours: our own sampler
# reads them one by one after every step.
TURNS = 2
TURN_TOKENS = 64


# --------------------------------------------------------------------------------------------------
# Sync
def sync_sampler(
    sampler: torch.nn.Module | VllmEngine, policy: torch.nn.Module, changed: bool = True
) -> None:
    """Give the sampler the policy's weights; vLLM gets the adapter alone.

    Our own gets a fresh fp32 merge of base and adapter, never undone in place: merging and
    unmerging again and again would drift. changed: whether the update must have moved the adapter;
    vLLM holds a sync without a change for a fault.
    """
    if isinstance(sampler, VllmEngine):
        return sampler.take_adapter(policy, changed)
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


# --------------------------------------------------------------------------------------------------
# The fixed sequence
@dataclass
class FixedSequence:
    """What sampler and trainer score, and what each says of it before any training."""

    # An episode, its loss mask 1 on the tokens that are scored.
    rollout: Rollout
    # Log-probabilities (n,) of the policy that VRL starts from: without the adapter.
    samplers: torch.Tensor
    trainers: torch.Tensor


def fixed_sequence(
    sampler: torch.nn.Module | VllmEngine,
    policy: torch.nn.Module,
    tokenizer,
    task: dict,
    config: Config,
) -> FixedSequence:
    """Play one seeded episode of `task` and keep it for `check_engine`.

    Our own sampler must hold the policy that VRL starts from: call this before the first sync of a
    trained adapter.
    """
    rollout = sample_rollouts(sampler, tokenizer, [task], config, 1.0, seed=0)[0]
    rollout = scored_part(rollout, config.model.max_len - 1)  # vLLM needs room for one token more
    without = policy.disable_adapter() if hasattr(policy, "disable_adapter") else nullcontext()
    with without:
        trainers = trainer_logprobs(policy, rollout, config)
    return FixedSequence(rollout, sampler_logprobs(sampler, rollout, adapter=False), trainers)


def scored_part(rollout: Rollout, most: int) -> Rollout:
    """The first TURN_TOKENS of the agent's tokens of each of the first TURNS turns.

    Those keep loss mask 1; what comes after the last of them, or after `most` tokens, is cut off.
    """
    mask = []
    turns = taken = before = 0
    for of_agent in rollout.loss_mask[:most]:
        if of_agent and not before:
            turns += 1
            taken = 0
        taken += of_agent
        mask.append(int(of_agent and turns <= TURNS and taken <= TURN_TOKENS))
        before = of_agent
    end = max(i for i, scored in enumerate(mask) if scored) + 1
    return replace(
        rollout,
        ids=rollout.ids[:end],
        loss_mask=mask[:end],
        logprobs=rollout.logprobs[:end],
    )


def sampler_logprobs(
    sampler: torch.nn.Module | VllmEngine, rollout: Rollout, adapter: bool = True
) -> torch.Tensor:
    """The sampler's log-probabilities (n,) of the scored tokens, on the CPU.

    adapter: of vLLM, with the adapter or without; our own has it in its weights.
    """
    if isinstance(sampler, VllmEngine):
        return sampler.score(rollout, adapter)
    return score_rollout(sampler, rollout).cpu()


@torch.no_grad()
def trainer_logprobs(policy: torch.nn.Module, rollout: Rollout, config: Config) -> torch.Tensor:
    """The trainer's log-probabilities (n,) of the scored tokens, on the CPU; as it trains."""
    device = next(policy.parameters()).device
    ids = torch.tensor([rollout.ids], device=device)  # (1, T)
    mask = torch.tensor([rollout.loss_mask], dtype=torch.bool, device=device)[:, 1:]  # (1, T - 1)
    positions = torch.arange(ids.shape[1], device=device)[None]  # (1, T)
    logprobs = token_logprobs(
        policy,
        ids,
        positions,
        mask,
        autocast=use_autocast(config, device),
        pictures=[(0, 0, rollout.pictures)] if rollout.pictures else [],
    )  # (1, T - 1)
    return logprobs[mask].cpu()


# --------------------------------------------------------------------------------------------------
# The checks
def check_engine(
    sampler: torch.nn.Module | VllmEngine,
    policy: torch.nn.Module,
    fixed: FixedSequence,
    config: Config,
) -> dict:
    """Compare sampler and trainer on the fixed sequence; the figures, for metrics.jsonl.

    `sync_gap_mean`, `sync_gap_p99`, `sync_gap_max`: the absolute difference of their
    log-probabilities, in nats. `adapter_effect`: by how many nats training has changed the
    trainer's, in the mean. `adapter_share`: how much of that is found in the sampler's, 1 where
    they agree; None while it is too small to be seen above rounding. SystemExit with the numbers
    where one is not allowed.
    """
    samplers = sampler_logprobs(sampler, fixed.rollout)
    trainers = trainer_logprobs(policy, fixed.rollout, config)
    gap = gap_figures(samplers, trainers)
    before = gap_figures(fixed.samplers, fixed.trainers)
    effect = float((trainers - fixed.trainers).abs().mean())
    share = None
    if effect > VISIBLE * before["mean"]:
        share = effect_share(samplers - fixed.samplers, trainers - fixed.trainers)
    kind = (next(policy.parameters()).device.type, arithmetic(sampler, policy, config))
    figure, allowed = ALLOWED[kind]
    told = (
        f"{len(samplers)} tokens of a fixed sequence ({kind[0]}, {kind[1]}): {in_words(gap)}, "
        f"without the adapter {in_words(before)}"
    )
    if not before[figure] <= allowed:  # NaN is a disagreement as well
        raise SystemExit(
            f"error: sampler and trainer disagree on {told}; allowed is {figure} {allowed:.0e}. "
            "They differ without the adapter, so they compute differently, or hold other base "
            "weights: look at model.attn, model.dtype and the folder that the sampler loaded"
        )
    if share is not None and not SHARE[0] <= share <= SHARE[1]:
        raise SystemExit(
            f"error: training has changed the trainer's log-probabilities by {effect:.2e} nats in "
            f"the mean, and {share:.0%} of that is found in the sampler's, on {told}. The sampler "
            "does not hold the policy's weights: the adapter is missing there (0%), an old one, or "
            "at another scale"
        )
    if not gap[figure] <= allowed:
        raise SystemExit(
            f"error: sampler and trainer disagree on {told}; allowed is {figure} {allowed:.0e}. "
            "They agree without the adapter, so the sampler does not hold the policy's weights: "
            "its adapter is not the trainer's"
        )
    figures = {f"sync_gap_{name}": value for name, value in gap.items()}
    return {**figures, "adapter_effect": effect, "adapter_share": share}


def gap_figures(samplers: torch.Tensor, trainers: torch.Tensor) -> dict[str, float]:
    """Mean, 99th percentile and maximum of the absolute differences (n,), in nats."""
    gaps = (samplers - trainers).abs()
    return {
        "mean": float(gaps.mean()),
        "p99": float(gaps.quantile(0.99)),
        "max": float(gaps.max()),
    }


def in_words(gap: dict[str, float]) -> str:
    """A gap as a message has it."""
    return f"mean {gap['mean']:.2e}, p99 {gap['p99']:.2e}, max {gap['max']:.2e} nats"


def effect_share(samplers: torch.Tensor, trainers: torch.Tensor) -> float:
    """How much of what training changed in the trainer's log-probabilities the sampler's show.

    Both (n,): change of each token's. 1 where they agree, 0 where the sampler's have not changed or
    changed at random. Rounding falls out of the sum, so bfloat16 hides no missing adapter.
    """
    return float((samplers * trainers.sign()).sum() / trainers.abs().sum())


def arithmetic(
    sampler: torch.nn.Module | VllmEngine, policy: torch.nn.Module, config: Config
) -> str:
    """In what the coarser of sampler and trainer multiplies: float32, bfloat16 or 4 bits."""
    if config.model.quantize == "nf4":
        return "4 bits"
    trains_in_float32 = policy.dtype == torch.float32 and not use_autocast(config, policy.device)
    return "float32" if trains_in_float32 and getattr(sampler, "exact", True) else "bfloat16"


def check_reference(policy: torch.nn.Module, fixed: FixedSequence, config: Config) -> None:
    """KL to pi_pst (adapter off) is 0 before the first step. SystemExit with the number if not.

    Exactly 0: the same kernels read the same tokens, and an adapter at zero adds zeros.
    """
    gap = fixed.trainers - trainer_logprobs(policy, fixed.rollout, config)
    kl = float((gap.exp() - gap - 1).sum())
    if kl != 0.0:
        raise SystemExit(
            f"error: KL to the PST policy is {kl:.2e} at step 0, it must be 0: "
            "the adapter does not start at zero"
        )
