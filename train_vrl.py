"""Virtual Reinforcement Learning (Sec. 4.3): GRPO in VisGenEnv under LtrReward, from PST's policy.

One step: 24 tasks x 4 rollouts (Sec. 4.3.1; tiny.yaml has 16 x 8) -> R_vrt of each -> advantages
inside each group -> one update of the LoRA adapter (and, with vrl.norm_lr, of the final norm), or
of all weights (vrl.tune).

This file holds the advantages, the loss as a pure function of tensors, the batches, the update and
the loop, in that order. Read beside it `token_logprobs` in lib/policy.py, which scores tokens;
lib/sampler.py plays the rollouts. On several GPUs (lib/ranks.py) each rank plays and trains its
share; all ranks take the same step. Left out: asynchronous rollouts, several nodes, value networks;
see the README for where to find those.

    python train_vrl.py --config configs/tiny.yaml      # the whole paper, small: data, PST, VRL
    python train_vrl.py --config configs/tiny.yaml vrl.steps=3 name=short
    accelerate launch --num_processes 8 train_vrl.py --config configs/qwen3vl-8b.yaml
    torchrun --nproc_per_node 2 train_vrl.py --config configs/smoke.yaml device=cpu
"""

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib import ranks
from lib.checkpoints import (
    config_digest,
    list_checkpoints,
    read_checkpoint,
    restore,
    save_checkpoint,
    trained_parameters,
)
from lib.checks import check_training
from lib.engine_check import (
    FixedSequence,
    check_engine,
    check_reference,
    fixed_sequence,
    sync_sampler,
)
from lib.evaluation import (
    cached_evaluation,
    evaluate,
    examples_to_read,
    gather_rollouts,
    part_variances,
    play_share,
    score_rollouts,
    summary,
    task_records,
    what_is_measured,
)
from lib.experiment import Config, VrlConfig, command_line
from lib.figures import (
    MOVING,
    mean_of_last,
    plot_curve,
    print_before_after,
    print_intervals,
    print_own_tasks,
    say_if_too_short,
    vrl_metrics,
    write_trajectories,
)
from lib.pages import write_index
from lib.policy import add_lora, load_policy, set_up, token_logprobs, use_autocast
from lib.quantize import adamw, wants_nf4
from lib.rollout import Rollout, open_rollouts
from lib.runs import (
    ROOT,
    StopSwitch,
    append_metrics,
    cut_tail,
    drop_metrics,
    open_run,
    peak_memory_gib,
    read_jsonl,
    seeded_rng,
    write_jsonl,
)
from lib.tokens import load_tokenizer
from lib.track import open_trackers
from lib.vllm_engine import VllmEngine
from make_data import ensure_data
from train_pst import base_folder, base_policy, train_pst

# Rewards of a group that lie closer together than FLAT teach nothing. A flat group above GOOD is
# counted as solved. Both numbers are ours.
FLAT = 1e-6
GOOD = 0.95
# Share of rollouts cut off by a limit above which a step is warned of. Ours.
MANY_CUT = 0.2
# curve.png is drawn again every DRAW_STEPS steps, and at most every DRAW_S seconds: drawing takes
# 0.4 s of a core, so it costs at most 2 % of a run's time. Both numbers are ours.
DRAW_STEPS = 5
DRAW_S = 20.0


# --------------------------------------------------------------------------------------------------
# Advantages
def group_advantages(
    rewards: list[float], group_ids: list, how: str, flat: float = FLAT
) -> tuple[list[float], Counter]:
    """Advantage of each rollout inside its own group: (reward - mean) [/ std].

    Returns (advantages, counts of groups). Groups are found by id, in any order and of any size. A
    NaN reward (failed judge) gets advantage 0 and is left out of mean and std (of a sample, n - 1);
    a group without spread gets 0 throughout. `how`: mean_std (GRPO, 2402.03300) or mean (Dr. GRPO,
    2503.20783).

    >>> group_advantages([0.0, 1.0, 0.5, 0.5], [7, 7, 3, 3], "mean")[0]
    [-0.5, 0.5, 0.0, 0.0]
    """
    members = scored_members(rewards, group_ids)
    counts = Counter(groups=len(set(group_ids)), unscored=sum(map(math.isnan, rewards)))
    advantages = [0.0] * len(rewards)
    for places in members.values():
        values = [rewards[i] for i in places]
        if is_flat(values, flat):
            counts["flat"] += 1
            counts["flat_good"] += values[0] > GOOD
            continue
        mean = sum(values) / len(values)
        std = 1.0
        if how == "mean_std":
            std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        for i in places:
            advantages[i] = (rewards[i] - mean) / std
    return advantages, counts


def scored_members(rewards: list[float], group_ids: list) -> dict:
    """{group id: places in `rewards` of its members that have a score}."""
    members = defaultdict(list)
    for i, (reward, group) in enumerate(zip(rewards, group_ids)):
        if not math.isnan(reward):
            members[group].append(i)
    return members


def is_flat(rewards: list[float], flat: float = FLAT) -> bool:
    """Whether a group's rewards are too much alike to teach anything."""
    return max(rewards) - min(rewards) <= flat


def set_advantages(rollouts: list[Rollout], how: str) -> Counter:
    """Fill in `advantage` and `signal` of a step's rollouts; returns the counts of groups.

    A group with spread has signal as a whole: in one of .5 .6 .7 .6 two rollouts have advantage 0
    or a rounding error beside it, and are trained like the others.
    """
    rewards = [r.reward for r in rollouts]
    group_ids = [r.group_id for r in rollouts]
    advantages, counts = group_advantages(rewards, group_ids, how)
    members = scored_members(rewards, group_ids)
    for i, (r, advantage) in enumerate(zip(rollouts, advantages)):
        places = members[r.group_id]
        r.advantage = advantage
        r.signal = i in places and not is_flat([rewards[place] for place in places])
    return counts


# --------------------------------------------------------------------------------------------------
# The loss
def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    config: VrlConfig,
    normalizer: int,
    ref_logprobs: torch.Tensor | None = None,
    sampler_logprobs: torch.Tensor | None = None,
    kl_normalizer: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped policy-gradient loss of one micro-batch, and sums over tokens for the metrics.

    logprobs, old_logprobs, ref_logprobs, sampler_logprobs, loss_mask: (B, T); advantages: (B,);
    normalizer: loss tokens (loss_mean token) or sequences (sequence) of the WHOLE optimizer step
    over all ranks, so that micro-batch losses add up. kl_normalizer: the same count of all that the
    KL is taken over, which groups without signal belong to; None: as many.

        r_t = pi / pi_old
        L = - sum_t w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) / normalizer
            + kl_coef sum_t w_t KL_t / kl_normalizer

    over the agent's tokens t; w_t is 1 (token), or 1 / length of its sequence (sequence).
    """
    mask = loss_mask.to(logprobs.dtype)  # (B, T)
    length = mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    log_ratio = (logprobs - old_logprobs) * mask  # (B, T)
    if config.ratio == "sequence":
        # GSPO 2507.18071: one length-normalised ratio a sequence, its gradient over all tokens.
        whole = log_ratio.sum(-1, keepdim=True) / length  # (B, 1)
        log_ratio = (whole.detach() + logprobs - logprobs.detach()) * mask  # (B, T)
    ratio = log_ratio.exp()  # (B, T)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)  # (B, T)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # (B, T)
    if config.tis_cap and sampler_logprobs is not None:
        # Truncated importance weight: the sampler's kernels differ from the trainer's.
        importance = (old_logprobs - sampler_logprobs).exp()  # (B, T)
        gain = gain * importance.clamp(max=config.tis_cap).detach()
    weight = mask / length if config.loss_mean == "sequence" else mask  # (B, T)
    loss = -(gain * weight).sum() / normalizer
    if ref_logprobs is not None:
        # Theorem 4.1's action bias, KL(pi || pi_pst), of tokens that pi sampled. k3 estimates its
        # value, but k3's gradient is that of KL(pi_pst || pi). The right one is k2's: the mean of
        # log(pi / pi_pst) grad log pi. So: the value of k3, the gradient of k2.
        gap = (ref_logprobs - logprobs) * mask  # (B, T)
        k2 = gap**2 / 2
        k3 = gap.exp() - gap - 1
        kl = k2 + (k3 - k2).detach()  # (B, T)
        loss = loss + config.kl_coef * (kl * weight).sum() / (kl_normalizer or normalizer)
    with torch.no_grad():
        sums = {
            "ratio": (ratio * mask).sum(),
            "clipped": ((ratio != clipped) * mask).sum(),
            "tokens": mask.sum(),
        }
        if ref_logprobs is not None:
            sums["kl"] = (kl * mask).sum()
    return loss, sums


# --------------------------------------------------------------------------------------------------
# Batches
def micro_batches(rollouts: list[Rollout], micro_tokens: int) -> list[list[Rollout]]:
    """Rollouts sorted by length and cut into batches: little padding, bounded memory.

    A batch of more than one rollout has at most micro_tokens tokens, padding included; one rollout
    has at most `model.max_len`.
    """
    batches = []
    batch = []
    for r in sorted(rollouts, key=lambda r: len(r.ids), reverse=True):
        longest = len(batch[0].ids) if batch else 0
        if batch and (len(batch) + 1) * longest > micro_tokens:
            batches.append(batch)
            batch = []
        batch.append(r)
    if batch:
        batches.append(batch)
    return batches


def collate(rollouts: list[Rollout], device: torch.device | str) -> dict:
    """Right-padded tensors of some rollouts; masks follow lengths, never token ids."""
    longest = max(len(r.ids) for r in rollouts)

    def padded(lists: list[list], dtype: torch.dtype) -> torch.Tensor:
        rows = [x + [0] * (longest - len(x)) for x in lists]
        return torch.tensor(rows, dtype=dtype, device=device)  # (B, T)

    sampler_logprobs = padded([r.logprobs for r in rollouts], torch.float32)[:, 1:]  # (B, T - 1)
    advantages = [r.advantage for r in rollouts]
    return {
        "input_ids": padded([r.ids for r in rollouts], torch.long),  # (B, T)
        "position_ids": torch.arange(longest, device=device).expand(len(rollouts), -1),  # (B, T)
        "loss_mask": padded([r.loss_mask for r in rollouts], torch.bool),  # (B, T)
        "sampler_logprobs": sampler_logprobs,
        "advantages": torch.tensor(advantages, dtype=torch.float32, device=device),  # (B,)
        # (row, first token of the example, its pictures), as lib/vision.py takes them.
        "pictures": [(i, 0, r.pictures) for i, r in enumerate(rollouts) if r.pictures],
    }


def batch_logprobs(
    model: torch.nn.Module, batch: dict, config: Config, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's (log-probabilities, entropies) of the agent's tokens, (B, T - 1) each.

    0 at all other tokens. Entropies come without gradient.
    """
    return token_logprobs(
        model,
        batch["input_ids"],
        batch["position_ids"],
        batch["loss_mask"][:, 1:],
        temperature=temperature,
        autocast=use_autocast(config, batch["input_ids"].device),
        entropy=True,
        pictures=batch["pictures"],
    )


# --------------------------------------------------------------------------------------------------
# The update
def update(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: list[Rollout],
    config: Config,
) -> dict:
    """GRPO update: one optimizer step a minibatch.

    The policy gradient is of the rollouts that carry signal, the KL of all. Returns the figures for
    metrics.jsonl. Every rank has all rollouts of the step, reads its share of each minibatch, and
    takes the same optimizer steps. SystemExit: the gradient is not finite.
    """
    v = config.vrl
    trained, anchored = select_trained(rollouts, v)
    minibatches = split_minibatches(trained, anchored, config)
    fill_in_logprobs(policy, own_share(minibatches), config)
    sums = Counter()  # over this rank's tokens, of all minibatches
    gaps = []  # sampler against trainer, of each of these tokens, in nats
    grad_norm = 0.0
    for minibatch in minibatches:
        add_gradient(policy, minibatch, config, sums, gaps)
        parameters = trained_parameters(policy).values()
        ranks.sum_gradients(parameters)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, v.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise SystemExit(
                f"error: the gradient norm of the GRPO update is {grad_norm} (loss "
                f"{ranks.total(sums['loss'])}); the last checkpoint is whole; lower `vrl.lr`, or "
                "set model.autocast=false"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update_metrics(sums, gaps, grad_norm, len(trained), len(anchored), v)


def needs_old(v: VrlConfig) -> bool:
    """Whether pi_old has to be kept: with one optimizer step a batch it is the policy itself."""
    return v.minibatches > 1


def needs_ref(v: VrlConfig) -> bool:
    """Whether the loss has the KL to pi_pst."""
    return v.kl_coef > 0


def select_trained(rollouts: list[Rollout], v: VrlConfig) -> tuple[list[Rollout], list[Rollout]]:
    """(rollouts of the policy gradient, the others that the KL alone is taken of).

    The former carry signal; the latter are none without a KL. With mask_truncated those that a
    limit cut off are in neither.
    """
    kept = rollouts
    if v.mask_truncated:
        kept = [r for r in rollouts if r.trajectory["ended"] not in ("max_tokens", "max_turns")]
    trained = [r for r in kept if r.signal]
    anchored = [r for r in kept if not r.signal] if needs_ref(v) else []
    return trained, anchored


# (trained, anchored) of one optimizer step.
Minibatch = tuple[list[Rollout], list[Rollout]]


def split_minibatches(
    trained: list[Rollout], anchored: list[Rollout], config: Config
) -> list[Minibatch]:
    """The rollouts in a seeded order, cut into at most `vrl.minibatches` parts.

    Both kinds are cut apart from each other, so that the KL changes nothing about the policy
    gradient.
    """
    parts = [split(kind, config) for kind in (trained, anchored)]
    return list(itertools.zip_longest(*parts, fillvalue=[]))


def split(rollouts: list[Rollout], config: Config) -> list[list[Rollout]]:
    """Rollouts in a seeded order, cut into parts.

    Each part is sorted by length, so that the ranks' shares of it have about as much to read.
    """
    order = seeded_rng(config.seed, "minibatches", len(rollouts)).sample(rollouts, len(rollouts))
    size = math.ceil(len(order) / config.vrl.minibatches) or 1
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    return [sorted(part, key=lambda r: len(r.ids), reverse=True) for part in parts]


def own_share(minibatches: list[Minibatch]) -> list[Rollout]:
    """This rank's share of all minibatches."""
    return [r for minibatch in minibatches for kind in minibatch for r in ranks.share(kind)]


def loss_weight(rollouts: list[Rollout], v: VrlConfig) -> int:
    """What a loss over rollouts is divided by: their loss tokens, or how many they are."""
    if v.loss_mean == "token":
        return sum(sum(r.loss_mask) for r in rollouts)
    return len(rollouts)


@torch.no_grad()
def fill_in_logprobs(policy: torch.nn.Module, rollouts: list[Rollout], config: Config) -> None:
    """Set old_logprobs and ref_logprobs of rollouts, (T - 1,) each, where the loss needs them.

    Before the first optimizer step changes the policy: pi_old is what it is now, pi_pst is it with
    the adapter off.
    """
    v = config.vrl
    if not (needs_old(v) or needs_ref(v)):
        return
    device = next(policy.parameters()).device
    temperature = config.rollout.temperature
    for part in micro_batches(rollouts, v.micro_tokens):
        batch = collate(part, device)
        if needs_old(v):
            old, _ = batch_logprobs(policy, batch, config, temperature)  # (B, T - 1)
            for r, logprobs in zip(part, old):
                r.old_logprobs = logprobs[: len(r.ids) - 1]
        if needs_ref(v):
            with policy.disable_adapter():
                ref, _ = batch_logprobs(policy, batch, config, temperature)  # (B, T - 1)
            for r, logprobs in zip(part, ref):
                r.ref_logprobs = logprobs[: len(r.ids) - 1]


def add_gradient(
    policy: torch.nn.Module,
    minibatch: Minibatch,
    config: Config,
    sums: Counter,
    gaps: list[torch.Tensor],
) -> None:
    """The backward pass of this rank's share of one minibatch, in micro-batches.

    Adds up gradients in the policy, figures in `sums`, and in `gaps` how far sampler and trainer
    are apart at each of the agent's tokens.
    """
    v = config.vrl
    device = next(policy.parameters()).device
    trained, anchored = minibatch
    # Of the whole minibatch, over all ranks: any split into micro-batches gives the same gradient.
    normalizer = loss_weight(trained, v) or 1
    kl_normalizer = loss_weight(trained + anchored, v)
    parts = [(part, True) for part in micro_batches(ranks.share(trained), v.micro_tokens)]
    parts += [(part, False) for part in micro_batches(ranks.share(anchored), v.micro_tokens)]
    for part, signal in parts:
        batch = collate(part, device)
        mask = batch["loss_mask"][:, 1:]  # (B, T - 1)
        logprobs, entropy = batch_logprobs(policy, batch, config, config.rollout.temperature)
        if needs_old(v):
            old = padded_logprobs([r.old_logprobs for r in part])  # (B, T - 1)
        else:
            # One update on fresh rollouts: pi_old is this very pi. The ratio is 1, its gradient is
            # not 0.
            old = logprobs.detach()
        ref = padded_logprobs([r.ref_logprobs for r in part]) if needs_ref(v) else None
        loss, loss_sums = grpo_loss(
            logprobs,
            old,
            batch["advantages"],
            mask,
            v,
            normalizer,
            ref_logprobs=ref,
            sampler_logprobs=batch["sampler_logprobs"],
            kl_normalizer=kl_normalizer,
        )
        loss.backward()
        sums.update(loss=float(loss.detach()), read=batch["input_ids"].numel())
        if needs_ref(v):
            sums.update(kl=float(loss_sums["kl"]), kl_tokens=float(loss_sums["tokens"]))
        if signal:
            sums.update({name: float(loss_sums[name]) for name in ("ratio", "clipped", "tokens")})
            sums.update(entropy=float((entropy * mask).sum()))
        gap = (logprobs.detach() - batch["sampler_logprobs"])[mask].abs()  # (agent's tokens,)
        gaps.append(gap.cpu())


def padded_logprobs(logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of some rollouts, (T_i - 1,) each, as (B, T - 1)."""
    return torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True)


def update_metrics(
    sums: Counter,
    gaps: list[torch.Tensor],
    grad_norm: float,
    trained: int,
    anchored: int,
    v: VrlConfig,
) -> dict:
    """The figures of an update, over all ranks: means a token, `gap` in nats. Collective.

    `kl` and `gap` are of all rollouts that were read, the other means of the trained ones.
    """
    of_ranks = ranks.gather([sums])
    names = ("loss", "ratio", "clipped", "entropy", "kl", "kl_tokens", "tokens", "read")
    total = {name: sum(s[name] for s in of_ranks) for name in names}
    tokens = total["tokens"] or 1
    gap = torch.cat(ranks.gather(gaps) or [torch.zeros(1)])
    return {
        "loss": total["loss"],
        "grad_norm": grad_norm,
        "ratio": total["ratio"] / tokens,
        "clipped": total["clipped"] / tokens,
        "entropy": total["entropy"] / tokens,
        "kl": total["kl"] / (total["kl_tokens"] or 1) if needs_ref(v) else None,
        "gap_mean": float(gap.mean()),
        "gap_p99": float(gap.quantile(0.99)),
        "gap_max": float(gap.max()),
        "trained": trained,
        "anchored": anchored,
        "loss_tokens": int(total["tokens"]),
        "read_tokens": int(total["read"]),
    }


# --------------------------------------------------------------------------------------------------
# The loop
def train(
    config: Config,
    run: Path,
    policy: torch.nn.Module,
    sampler: torch.nn.Module | VllmEngine,
    tokenizer,
    tasks: list[dict],
    fixed: FixedSequence,
    stop: StopSwitch | None = None,
) -> None:
    """The VRL loop (Sec. 4.3). Continues from the last complete checkpoint in run/vrl.

    fixed: what sampler and trainer are compared on after every sync. stop: once it is on (Ctrl-C),
    the step is finished and saved, then the script exits with 130. SystemExit: the judge failed too
    often, or sampler and trainer disagree.
    """
    v = config.vrl
    with_vllm = config.rollout.engine == "vllm"
    optimizer = make_optimizer(policy, v)
    first = resume(config, run, policy, optimizer)
    sync_sampler(sampler, policy)
    rewards = [m["reward"] for m in vrl_metrics(run).values()]
    drawn = -math.inf  # when the curve was, in seconds
    bar = announce(v, first)
    for step in bar:
        times = {"began": time.time()}

        # ROLLOUT
        rollouts = play_share(
            sampler,
            tokenizer,
            step_tasks(tasks, config, step),
            config,
            config.rollout.temperature,
            seed=rollout_seed(config, step),
            group_size=v.group_size,
        )
        ranks.barrier()
        times["sampled"] = time.time()

        # SCORE
        if with_vllm:
            sampler.sleep()
        score_rollouts(rollouts, config)
        rollouts = gather_rollouts(rollouts)

        # ADVANTAGES
        groups = set_advantages(rollouts, v.advantage)
        times["scored"] = time.time()

        # UPDATE
        set_rate(optimizer, v, step)
        figures = update(policy, optimizer, rollouts, config)

        # SYNC
        if with_vllm:
            sampler.wake()
            figures["prompt_cached"] = sampler.cached_share()
        # A gradient of exact zeros, such as that of no rollout at all, moves nothing by itself.
        sync_sampler(sampler, policy, changed=figures["grad_norm"] > 0)
        times["updated"] = time.time()
        figures |= check_engine(sampler, policy, fixed, config)

        lr = optimizer.param_groups[0]["lr"]
        record = step_record(step + 1, rollouts, figures, groups, lr, times)
        log_step(run, record, rollouts)
        check_judge(config, run, step + 1, len(rollouts), groups["unscored"])
        rewards.append(record["reward"])
        bar.set_postfix_str(step_line(record, rewards))

        # SAVE. Ctrl-C may reach one rank a step later than another.
        stopped = bool(ranks.total(stop is not None and stop.on))
        if (step + 1) % v.save_every == 0 or step + 1 == v.steps or stopped:
            state = {"step": step + 1, "config": config_digest(config)}
            save_checkpoint(run / "vrl" / f"step-{step + 1}", policy, [optimizer], state)

        # DRAW
        if ranks.rank() == 0 and (stopped or is_drawn(step + 1, time.time() - drawn)):
            plot_curve(run)
            drawn = time.time()
        if stopped:
            bar.close()
            print(
                f"stopped: VRL is saved at step {step + 1} of {v.steps}; "
                "the same command goes on from there"
            )
            raise SystemExit(130)


def make_optimizer(policy: torch.nn.Module, v: VrlConfig) -> torch.optim.Optimizer:
    """AdamW (`vrl.optimizer`) on the adapter (or all weights) at the peak rate `lr`.

    The final norm has the peak rate `norm_lr`, where that is given: it scales all logits, and few
    numbers carry much of the signal. Every parameter group keeps its peak rate as `peak`.
    """
    trained = trained_parameters(policy)
    norm = []
    if v.norm_lr:
        norm = sorted(
            n for n in trained if ".modules_to_save." in n or n.endswith("model.norm.weight")
        )
    rest = [name for name in trained if name not in norm]
    groups = []
    for names, peak in ((rest, v.lr), (norm, v.norm_lr)):
        if names:
            params = [trained[name] for name in names]
            groups.append({"names": names, "params": params, "peak": peak})
    return adamw(v.optimizer, groups, lr=v.lr, betas=(0.9, 0.95), weight_decay=v.weight_decay)


def resume(
    config: Config, run: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Restore the last checkpoint, if there is one; returns how many steps are done.

    Lines of metrics.jsonl of later steps go: those steps are done again.
    """
    saved = list_checkpoints(run / "vrl")
    done = 0
    if saved:
        weights, moments, state = read_checkpoint(config, saved[-1])
        restore(policy, [optimizer], weights, moments, state)
        print(f"continuing from {saved[-1]}")
        done = state["step"]
    if ranks.rank() == 0:
        drop_metrics(run, lambda m: m["phase"] == "vrl" and m["step"] > done)
    return done


def step_tasks(tasks: list[dict], config: Config, step: int) -> list[dict]:
    """The tasks of one step: the training tasks in a seeded order, a new order each time round."""
    size = config.vrl.tasks_per_step
    orders = {}  # round -> the order of its tasks
    picked = []
    for i in range(step * size, (step + 1) * size):
        turn, at = divmod(i, len(tasks))
        if turn not in orders:
            rng = seeded_rng(config.seed, "vrl tasks", turn)
            orders[turn] = rng.sample(range(len(tasks)), len(tasks))
        picked.append(tasks[orders[turn][at]])
    return picked


def rollout_seed(config: Config, step: int) -> int:
    """The seed of a step's rollouts (from 0)."""
    return seeded_rng(config.seed, "rollouts", step).getrandbits(31)


def set_rate(optimizer: torch.optim.Optimizer, v: VrlConfig, step: int) -> None:
    """Set the learning rates of a step (from 0)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_share(v, step)


def lr_share(v: VrlConfig, step: int) -> float:
    """Share of the peak learning rate at step `step` (from 0).

    A linear rise over `warmup` steps, 1, a linear fall over the last `cooldown` steps.

    >>> from lib.experiment import VrlConfig
    >>> [lr_share(VrlConfig(steps=6, warmup=2, cooldown=4), step) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / max(1, v.warmup), (v.steps - step) / max(1, v.cooldown))


# --------------------------------------------------------------------------------------------------
# What is told and kept of a step
def announce(v: VrlConfig, first: int) -> tqdm:
    """Say what the loop will do; its progress bar, which counts steps from `first`."""
    print(
        f"VRL: steps {first} to {v.steps}, {v.tasks_per_step} tasks x {v.group_size} rollouts = "
        f"{v.tasks_per_step * v.group_size} a step",
        flush=True,
    )
    return tqdm(
        range(first, v.steps),
        initial=first,
        total=v.steps,
        desc="VRL",
        unit="step",
        mininterval=1,
        disable=ranks.rank() > 0,
    )


def step_record(
    step: int, rollouts: list[Rollout], figures: dict, groups: Counter, lr: float, times: dict
) -> dict:
    """The line of metrics.jsonl of one step (from 1). times: when what was done, in seconds."""
    sampled_tokens = sum(sum(r.loss_mask) for r in rollouts)
    sample_s = times["sampled"] - times["began"]
    update_s = times["updated"] - times["scored"]
    return {
        "phase": "vrl",
        "step": step,
        **summary(rollouts),
        **figures,
        "groups": dict(groups),
        **part_variances(rollouts),
        "lr": lr,
        "sampled_tokens": sampled_tokens,
        "sample_tok_s": round(sampled_tokens / sample_s),
        "update_tok_s": round(figures["read_tokens"] / update_s),
        "sample_s": round(sample_s, 2),
        "update_s": round(update_s, 2),
        "step_s": round(time.time() - times["began"], 2),
    }


def log_step(run: Path, record: dict, rollouts: list[Rollout]) -> None:
    """Write a step's record and rollouts; warn of many cut off. Rank 0 writes, all call it."""
    if ranks.rank() == 0:
        cut = sum(record["ended"].get(how, 0) for how in ("max_tokens", "max_turns"))
        if cut / len(rollouts) > MANY_CUT:
            tqdm.write(
                f"warning: step {record['step']}: {cut / len(rollouts):.0%} of the rollouts hit a "
                "limit; raise rollout.max_turn_tokens, rollout.max_turns or model.max_len"
            )
        append_metrics(run, record)
        write_jsonl(rollout_file(run, record["step"]), [kept_rollout(r) for r in rollouts])
    ranks.barrier()  # what rank 0 writes is there before any rank ends the run


def is_drawn(step: int, seconds: float) -> bool:
    """Whether the curve is drawn after a step (from 1), `seconds` after it was drawn last."""
    return step % DRAW_STEPS == 0 and seconds >= DRAW_S


def step_line(record: dict, rewards: list[float | None]) -> str:
    """What the progress bar says of a step. rewards: R_vrt of all steps up to it."""
    groups = record["groups"]
    scores = []
    for label, score in (
        (f"R_vrt of {min(MOVING, len(rewards))} steps", mean_of_last(rewards)),
        ("of this", record["reward"]),
        ("plan", record["plan"]),
        ("fine", record["fine"]),
    ):
        # None where the judge failed on every rollout
        scores.append(f"{label} -" if score is None else f"{label} {score:.3f}")
    return (
        f"{', '.join(scores)}, "
        f"flat {groups.get('flat', 0)}/{groups['groups']}, {record['sample_tok_s']} tok/s"
    )


def rollout_file(run: Path, step: int) -> Path:
    """Where the rollouts of a step (from 1) are kept."""
    return run / "vrl" / "rollouts" / f"step-{step}.jsonl"


def check_judge(config: Config, run: Path, step: int, rollouts: int, unscored: int) -> None:
    """SystemExit if the judge failed on more rollouts of a step than `llm.max_failures` allows."""
    if unscored > config.llm.max_failures * max(20, rollouts):
        raise SystemExit(
            f"error: the judge failed on {unscored} of {rollouts} rollouts of step {step}, config "
            f"key `llm.max_failures` allows {config.llm.max_failures:.0%}; they stand in "
            f"{rollout_file(run, step)} with reward NaN"
        )


# --------------------------------------------------------------------------------------------------
# A step again, from what is kept of it
def kept_rollout(r: Rollout) -> dict:
    """What a line of a step's rollouts holds: all that `update` needs to be done again.

    logprobs: the sampler's at the agent's own tokens, None at all others.
    """
    logprobs = [p if of_agent else None for p, of_agent in zip(r.logprobs, r.loss_mask)]
    return {**r.trajectory, "advantage": r.advantage, "ids": r.ids, "logprobs": logprobs}


def read_rollouts(config: Config, run: Path, step: int, tokenizer) -> list[Rollout]:
    """A step's rollouts (from 1) as `update` took them. SystemExit if they hold no tokens."""
    records = read_jsonl(rollout_file(run, step))
    if not all("ids" in record for record in records):
        raise SystemExit(
            f"error: {rollout_file(run, step)} holds no tokens (`ids`), so the step cannot be done "
            "again; a run that is made now keeps them"
        )
    size = config.vrl.group_size
    tasks = [record["task"] for record in records[::size]]
    rollouts, _ = open_rollouts(tokenizer, tasks, config, rollout_seed(config, step - 1), size)
    for r, record in zip(rollouts, records, strict=True):
        r.ids = record["ids"]
        r.loss_mask = [int(p is not None) for p in record["logprobs"]]
        r.logprobs = [p or 0.0 for p in record["logprobs"]]
        r.trajectory = record
        r.reward = record["reward"]["total"]
    set_advantages(rollouts, config.vrl.advantage)
    return rollouts


def replay(
    config: Config,
    run: Path,
    step: int,
    tokenizer,
    look: Callable[[torch.nn.Module, list, int], Any],
) -> dict:
    """The update of a finished step (from 1) again; nothing is sampled or written.

    No run keeps the weights of each step. The policy before this one comes from the newest
    checkpoint below it, or from what VRL starts with, by the updates of the steps between, each
    from its kept rollouts. Returns the step's `rollouts`, what `update` gives (`figures`), and as
    (before, after) `logprobs`, those of each rollout's own tokens, and `looks`, what
    look(sampler, rollouts, seed of the step) makes of the policy.
    """
    v = config.vrl
    kept = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(run / "vrl")}
    first = max((n for n in kept if n < step), default=0)
    steps = [read_rollouts(config, run, n, tokenizer) for n in range(first + 1, step + 1)]
    rollouts = steps[-1]
    device = set_up(config)
    pst_folder = train_pst(config, run) if v.start == "pst" else None
    sampler = start_policy(config, run, pst_folder, tokenizer, device)
    sampler = sampler.float().eval().requires_grad_(False)
    policy = make_policy(config, run, pst_folder, tokenizer, device, wants_nf4(config, "vrl"))
    optimizer = make_optimizer(policy, v)
    if first:
        restore(policy, [optimizer], *read_checkpoint(config, kept[first]))
    sides = []
    for done, of_step in enumerate(tqdm(steps, desc="updates again", unit="step"), first):
        if done + 1 == step:
            sides.append(look_at(policy, sampler, rollouts, config, step, look))
        set_rate(optimizer, v, done)
        figures = update(policy, optimizer, of_step, config)
    sides.append(look_at(policy, sampler, rollouts, config, step, look))
    logprobs, looks = zip(*sides)
    return {"rollouts": rollouts, "figures": figures, "logprobs": logprobs, "looks": looks}


@torch.no_grad()
def look_at(
    policy: torch.nn.Module,
    sampler: torch.nn.Module,
    rollouts: list[Rollout],
    config: Config,
    step: int,
    look: Callable,
) -> tuple[list[list[float]], Any]:
    """(log-probabilities, in nats, of each rollout's own tokens; what `look` makes of the policy).

    As the update reads them. The sampler gets the policy's weights.
    """
    device = next(policy.parameters()).device
    found = {}
    for part in micro_batches(rollouts, config.vrl.micro_tokens):
        batch = collate(part, device)
        logprobs, _ = batch_logprobs(policy, batch, config, config.rollout.temperature)
        for r, of_rollout, mask in zip(part, logprobs, batch["loss_mask"][:, 1:]):
            found[id(r)] = of_rollout[mask].tolist()
    sync_sampler(sampler, policy)
    looked = look(sampler, rollouts, rollout_seed(config, step - 1))
    return [found[id(r)] for r in rollouts], looked


# --------------------------------------------------------------------------------------------------
# The command
def main() -> None:
    """Data, PST, VRL, evaluation: whatever is not there yet, in order."""
    config, _ = command_line(__doc__)
    began = time.time()
    with_pst = config.vrl.start == "pst" and not config.pst.init_from
    check_training(config, ("pst", "vrl") if with_pst else ("vrl",))
    run = ranks.first(lambda: open_run(config))
    if ranks.rank() == 0:
        cut_tail(run / "metrics.jsonl")
        open_trackers(config, run)
    quantize = wants_nf4(config, "vrl")
    device = set_up(config)
    ranks.first(lambda: ensure_data(config, run))
    pst_folder = train_pst(config, run) if config.vrl.start == "pst" else None
    tokenizer = load_tokenizer(config, run)

    # The sampler first: vLLM takes its share of the card's memory as it finds it.
    sampler = make_sampler(config, run, pst_folder, tokenizer, device)
    policy = make_policy(config, run, pst_folder, tokenizer, device, quantize)
    heldout = read_jsonl(run / "data" / "heldout.jsonl")[: config.bench.tasks]
    if config.rollout.engine != "vllm":
        sync_sampler(sampler, policy)  # of a base in 4 bits it takes what these round to
    fixed = fixed_sequence(sampler, policy, tokenizer, heldout[0], config)
    gap = check_engine(sampler, policy, fixed, config)
    if config.vrl.tune == "lora":
        check_reference(policy, fixed, config)
    every = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in trained_parameters(policy).values())
    print(
        f"policy: {every:,} parameters, {trained:,} of them trained; "
        f"sampler against trainer: {gap_text(gap)}"
    )

    before = cached_evaluation(
        run / "vrl" / "before.json",
        what_is_measured(config, config.vrl.start, heldout),
        lambda: measure(config, run, sampler, tokenizer, heldout, 0),
    )
    train_tasks = read_jsonl(run / "data" / "train.jsonl")
    with StopSwitch() as stop:
        train(config, run, policy, sampler, tokenizer, train_tasks, fixed, stop)
    gap = check_engine(sampler, policy, fixed, config)
    after = cached_evaluation(
        run / "vrl" / "after.json",
        what_is_measured(config, f"vrl/step-{config.vrl.steps}", heldout),
        lambda: measure(config, run, sampler, tokenizer, heldout, config.vrl.steps),
    )
    if ranks.rank() == 0:
        report(run, before, after, gap, began)
        say_if_too_short(before, after)


def start_policy(
    config: Config,
    run: Path,
    pst_folder: Path | None,
    tokenizer,
    device: torch.device,
    quantize: bool = False,
) -> torch.nn.Module:
    """The policy that VRL starts from: PST's, or without PST (RL3 of Table 4) the base's."""
    if pst_folder:
        return load_policy(pst_folder, config, tokenizer, device, quantize)
    return base_policy(config, run, tokenizer, device, quantize)


def make_sampler(
    config: Config, run: Path, pst_folder: Path | None, tokenizer, device: torch.device
) -> torch.nn.Module | VllmEngine:
    """Who samples: vLLM, or a frozen fp32 copy of the policy for lib/sampler.py."""
    if config.rollout.engine == "vllm":
        folder = pst_folder or base_folder(config, run, tokenizer, device)
        return VllmEngine(folder, config, device, bf16=use_autocast(config, device))
    model = start_policy(config, run, pst_folder, tokenizer, device)
    return model.float().eval().requires_grad_(False)


def make_policy(
    config: Config,
    run: Path,
    pst_folder: Path | None,
    tokenizer,
    device: torch.device,
    quantize: bool,
) -> torch.nn.Module:
    """What is trained: an adapter on the frozen start (`vrl.tune: lora`), or all weights.

    PST's result is merged by now, so that "adapter off" is pi_pst.
    """
    if config.vrl.tune == "lora":
        base = start_policy(config, run, pst_folder, tokenizer, device, quantize)
        policy = add_lora(config, base, norm=config.vrl.norm_lr > 0)
    else:
        policy = start_policy(config, run, pst_folder, tokenizer, device)
    # Without it model.gradient_checkpointing does nothing; there is no dropout to switch on.
    return policy.train()


def measure(
    config: Config,
    run: Path,
    sampler: torch.nn.Module | VllmEngine,
    tokenizer,
    heldout: list[dict],
    step: int,
) -> dict:
    """Evaluate the policy after `step` steps: the figures, and of the greedy episodes a record
    each and some to read."""
    progress = "held-out after VRL" if step else "held-out before VRL"
    figures, rollouts = evaluate(sampler, tokenizer, heldout, config, run, progress)
    if ranks.rank() == 0:
        # What was measured before on other tasks has no place beside it.
        drop_metrics(run, lambda m: m["phase"] == "eval" and m["step"] == step)
        append_metrics(run, {"phase": "eval", "step": step, **figures})
    return {
        **figures,
        "step": step,
        "tasks": task_records(rollouts),
        "examples": examples_to_read(rollouts),
    }


def gap_text(figures: dict) -> str:
    """How far sampler and trainer are apart, as it is printed."""
    gaps = [f"{name} {figures[f'sync_gap_{name}']:.1e}" for name in ("mean", "p99", "max")]
    return f"{', '.join(gaps)} nats"


def report(run: Path, before: dict, after: dict, gap: dict, began: float) -> None:
    """Draw the curve, write trajectories out, print what VRL changed."""
    plot_curve(run)
    trajectory = run / "trajectory.txt"
    write_trajectories(after["examples"], trajectory)
    print_before_after(before, after)
    print_intervals(before["tasks"], after["tasks"])
    print_own_tasks(run)
    peak = peak_memory_gib()
    memory = "" if peak is None else f", peak memory {peak:.1f} GiB"
    print(
        f"\nsampler against trainer after the last sync: {gap_text(gap)}; "
        f"{time.time() - began:.0f} s{memory}"
    )
    print(f"curve:      {(run / 'curve.png').relative_to(ROOT)}")
    print(f"trajectory: {trajectory.relative_to(ROOT)}")
    print(f"all pages:  {write_index(run).relative_to(ROOT)}")


if __name__ == "__main__":
    ranks.run(main)
