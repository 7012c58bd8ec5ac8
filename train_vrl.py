"""Virtual Reinforcement Learning (Sec. 4.3): GRPO in VisGenEnv under LtrReward, from the PST policy.

One step: 24 tasks x 4 rollouts -> R_vrt of each -> advantages inside each group -> one update of the LoRA adapter (vrl.norm_lr: of the final norm too).
This file holds the sampler (batched, a static KV cache kept over turns), the GRPO loss as one pure function of tensors,
and the loop. On several GPUs (lib/ranks.py) each rank plays and trains its share of the tasks; all ranks take the same step.
Left out: asynchronous rollouts, several nodes, value networks; see the README for where to find those.

    python train_vrl.py --config configs/tiny.yaml                 # the whole paper at a small scale: data, PST, VRL
    python train_vrl.py --config configs/tiny.yaml vrl.steps=3 name=short
    accelerate launch --num_processes 8 train_vrl.py --config configs/qwen3vl-8b.yaml      # without GPUs: torchrun --nproc_per_node 2
"""

import math
import resource
import time
from collections import Counter, defaultdict

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
from lib.engine_check import check_engine, check_reference, sync_sampler
from lib.evaluation import (
    cached_evaluation,
    evaluate,
    gather_rollouts,
    mean,
    play_share,
    score_rollouts,
    summary,
)
from lib.experiment import command_line
from lib.figures import plot_curve, print_before_after, write_trajectory
from lib.policy import (
    add_lora,
    load_policy,
    set_up,
    token_logprobs,
    use_autocast,
)
from lib.quantize import adamw, wants_nf4
from lib.runs import ROOT, StopSwitch, append_metrics, open_run, read_jsonl, seeded_rng, write_jsonl
from lib.tokens import load_tokenizer
from lib.vllm_engine import VllmEngine
from make_data import ensure_data
from rewards import PARTS
from train_pst import base_folder, base_policy, train_pst


# ---------------------------------------------------------------------------------------------------------------------
# GRPO: pure functions of tensors
def group_advantages(rewards, group_ids, how, flat=1e-6):
    """Advantage of each rollout inside its own group: (reward - mean) [/ std]. Returns (advantages, counts of groups).

    Groups are found by id, in any order and of any size. A NaN reward (failed judge) gets advantage 0 and is left out of
    mean and std; a group without spread gets 0 throughout. `how`: mean_std (GRPO, 2402.03300) or mean (Dr. GRPO, 2503.20783).

    >>> group_advantages([0.0, 1.0, 0.5, 0.5], [7, 7, 3, 3], "mean")[0]
    [-0.5, 0.5, 0.0, 0.0]
    """
    members = defaultdict(list)
    for i, (reward, group) in enumerate(zip(rewards, group_ids)):
        if not math.isnan(reward):
            members[group].append(i)
    advantages, counts = (
        [0.0] * len(rewards),
        Counter(groups=len(set(group_ids)), unscored=sum(map(math.isnan, rewards))),
    )
    for rows in members.values():
        values = [rewards[i] for i in rows]
        if max(values) - min(values) <= flat:
            counts["flat"] += 1
            counts["flat_good"] += values[0] > 0.95
            continue
        mean = sum(values) / len(values)
        std = (
            (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
            if how == "mean_std"
            else 1.0
        )
        for i in rows:
            advantages[i] = (rewards[i] - mean) / std
    return advantages, counts


def grpo_loss(
    logprobs,
    old_logprobs,
    advantages,
    loss_mask,
    config,
    normalizer,
    ref_logprobs=None,
    sampler_logprobs=None,
):
    """The clipped policy-gradient loss of one micro-batch, and sums for the metrics.

    logprobs, old_logprobs, ref_logprobs, sampler_logprobs, loss_mask: (B, T); advantages: (B,); normalizer: loss tokens
    (loss_mean token) or sequences (sequence) of the WHOLE optimizer step over all ranks, so that micro-batch losses add up.

        L = - sum_t w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) / normalizer + kl_coef KL,   r_t = pi / pi_old
    """
    mask = loss_mask.to(logprobs.dtype)
    log_ratio = (logprobs - old_logprobs) * mask
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    if (
        config.ratio == "sequence"
    ):  # GSPO 2507.18071: one length-normalised ratio a sequence, its gradient spread over the tokens
        whole = log_ratio.sum(-1, keepdim=True) / length
        log_ratio = (whole.detach() + logprobs - logprobs.detach()) * mask
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # (B, T)
    if (
        config.tis_cap and sampler_logprobs is not None
    ):  # the sampler's kernels differ from the trainer's: truncated importance weight
        gain = gain * (old_logprobs - sampler_logprobs).exp().clamp(max=config.tis_cap).detach()
    per_token = -gain
    if ref_logprobs is not None:  # Theorem 4.1's action bias: KL(pi || pi_pst), the k3 estimate
        gap = (ref_logprobs - logprobs) * mask
        kl = gap.exp() - gap - 1
        per_token = per_token + config.kl_coef * kl
    weight = mask / length if config.loss_mean == "sequence" else mask
    loss = (per_token * weight).sum() / normalizer
    with torch.no_grad():
        sums = {
            "ratio": (ratio * mask).sum(),
            "clipped": ((ratio != clipped) * mask).sum(),
            "tokens": mask.sum(),
        }
        if ref_logprobs is not None:
            sums["kl"] = (kl * mask).sum()
    return loss, sums


def micro_batches(rollouts, micro_tokens):
    """Rollouts sorted by length and cut so that rows x longest row stays within micro_tokens: little padding, bounded memory."""
    batches, rows = [], []
    for r in sorted(rollouts, key=lambda r: len(r.ids), reverse=True):
        if rows and (len(rows) + 1) * len(rows[0].ids) > micro_tokens:
            batches.append(rows)
            rows = []
        rows.append(r)
    return batches + [rows] if rows else batches


def collate(rollouts, device):
    """Right-padded tensors of some rollouts; masks follow lengths, never token ids."""
    longest = max(len(r.ids) for r in rollouts)

    def stack(name, dtype):
        return torch.tensor(
            [getattr(r, name) + [0] * (longest - len(r.ids)) for r in rollouts],
            dtype=dtype,
            device=device,
        )

    return {
        "input_ids": stack("ids", torch.long),
        "loss_mask": stack("loss_mask", torch.bool),  # (B, T)
        "sampler_logprobs": stack("logprobs", torch.float32)[:, 1:],  # (B, T - 1)
        "position_ids": torch.arange(longest, device=device).expand(len(rollouts), -1),
        "advantages": torch.tensor(
            [r.advantage for r in rollouts], dtype=torch.float32, device=device
        ),  # (B,)
        "pictures": [(i, 0, r.pictures) for i, r in enumerate(rollouts) if r.pictures],
    }


def batch_logprobs(model, batch, config, temperature=1.0):
    """Trainer log-probabilities of the agent's tokens, (B, T - 1), and their mean entropy."""
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


def update(policy, optimizer, rollouts, config):
    """GRPO update on the rollouts that carry signal. Returns metrics; every normaliser is counted over the whole step first.

    Every rank has all rollouts of the step, reads its share of each minibatch, and takes the same optimizer steps.
    """
    v, device = config.vrl, next(policy.parameters()).device
    trained = [
        r
        for r in rollouts
        if r.advantage
        and not (v.mask_truncated and r.trajectory["ended"] in ("max_tokens", "max_turns"))
    ]
    sums, grad_norm, gaps = Counter(), 0.0, []
    with_ref, with_old = v.kl_coef > 0, v.minibatches > 1
    order = seeded_rng(config.seed, "minibatches", len(trained)).sample(trained, len(trained))
    size = math.ceil(len(order) / v.minibatches) or 1
    minis = [
        sorted(order[i : i + size], key=lambda r: len(r.ids), reverse=True)
        for i in range(0, len(order), size)
    ]
    mine = {
        id(r) for mini in minis for r in ranks.share(mini)
    }  # by length, so that ranks have about as much to read
    known = {}
    if (
        with_ref or with_old
    ):  # pi_pst and pi_old once, before the first optimizer step changes the policy
        with torch.no_grad():
            for rows in micro_batches([r for r in trained if id(r) in mine], v.micro_tokens):
                batch = collate(rows, device)
                old = (
                    batch_logprobs(policy, batch, config, config.rollout.temperature)[0]
                    if with_old
                    else None
                )
                ref = None
                if with_ref:
                    with policy.disable_adapter():
                        ref = batch_logprobs(policy, batch, config, config.rollout.temperature)[0]
                for i, r in enumerate(rows):
                    known[id(r)] = [
                        x[i, : len(r.ids) - 1] if x is not None else None for x in (old, ref)
                    ]
    for mini in minis:
        normalizer = sum(sum(r.loss_mask) for r in mini) if v.loss_mean == "token" else len(mini)
        for rows in micro_batches(ranks.share(mini), v.micro_tokens):
            batch = collate(rows, device)
            logprobs, entropy = batch_logprobs(policy, batch, config, config.rollout.temperature)
            fill = [
                torch.nn.utils.rnn.pad_sequence([known[id(r)][k] for r in rows], batch_first=True)
                if wanted
                else None
                for k, wanted in ((0, with_old), (1, with_ref))
            ]
            # One update on fresh rollouts: pi_old is this very pi, the ratio is 1 and its gradient is not 0.
            old = fill[0] if with_old else logprobs.detach()
            mask = batch["loss_mask"][:, 1:]
            loss, some = grpo_loss(
                logprobs,
                old,
                batch["advantages"],
                mask,
                v,
                normalizer,
                fill[1],
                batch["sampler_logprobs"] if config.rollout.engine == "vllm" else None,
            )
            loss.backward()
            sums.update({k: float(x) for k, x in some.items()})
            gaps.append((logprobs.detach() - batch["sampler_logprobs"])[mask].abs().cpu())
            sums.update(
                loss=float(loss.detach()),
                entropy=float((entropy * mask).sum()),
                read=batch["input_ids"].numel(),
            )
        ranks.sum_gradients(trained_parameters(policy).values())
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(trained_parameters(policy).values(), v.max_grad_norm)
        )
        if not math.isfinite(grad_norm):
            raise SystemExit(
                f"error: the gradient norm of the GRPO update is {grad_norm} (loss {ranks.total(sums['loss'])}); "
                "the last checkpoint is whole; lower `vrl.lr`, or set model.autocast=false"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    every = ranks.gather([sums])
    sums = {
        k: sum(s[k] for s in every)
        for k in ("loss", "ratio", "clipped", "entropy", "kl", "tokens", "read")
    }
    tokens, gap = (
        sums["tokens"] or 1,
        torch.cat(ranks.gather(gaps) or [torch.zeros(1)]),
    )  # gap: sampler against trainer, nats, every token
    return {
        "loss": sums["loss"],
        "grad_norm": grad_norm,
        "ratio": sums["ratio"] / tokens,
        "clipped": sums["clipped"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "kl": sums["kl"] / tokens if with_ref else None,
        "gap_mean": float(gap.mean()),
        "gap_p99": float(gap.quantile(0.99)),
        "gap_max": float(gap.max()),
        "trained": len(trained),
        "loss_tokens": int(sums["tokens"]),
        "read_tokens": int(sums["read"]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The loop
def step_tasks(tasks, config, step):
    """The tasks of one step: the training tasks in a seeded order, a new order each time round."""
    n, orders, picked = config.vrl.tasks_per_step, {}, []
    for i in range(step * n, (step + 1) * n):
        turn, at = divmod(i, len(tasks))
        if turn not in orders:
            orders[turn] = seeded_rng(config.seed, "vrl tasks", turn).sample(
                range(len(tasks)), len(tasks)
            )
        picked.append(tasks[orders[turn][at]])
    return picked


def part_variances(rollouts):
    """Mean over groups of each reward part's variance inside the group: a part that is equal over the group teaches nothing."""
    groups = defaultdict(list)
    for r in rollouts:
        groups[r.group_id].append(r.trajectory["reward"])
    spread = {}
    for part in ("total", "plan", *PARTS):
        values = [
            [w[part] for w in g if w[part] is not None and not math.isnan(w[part])]
            for g in groups.values()
        ]
        spread[f"var_{part}"] = mean(
            sum((x - sum(v) / len(v)) ** 2 for x in v) / len(v) for v in values if v
        )
    return spread


def lr_share(v, step):
    """Share of the peak learning rate at step `step` (from 0): a linear rise over `warmup` steps, 1, a linear fall over the last `cooldown`.

    >>> from configs.experiment import VrlConfig
    >>> [lr_share(VrlConfig(steps=6, warmup=2, cooldown=4), step) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / max(1, v.warmup), (v.steps - step) / max(1, v.cooldown))


def make_optimizer(policy, v):
    """AdamW (`vrl.optimizer`) on the adapter (or all weights) at `lr` and, where it is trained beside the adapter, on the final norm at `norm_lr`."""
    named = trained_parameters(policy)
    norm = {n for n in named if ".modules_to_save." in n}
    groups = [
        {"names": names, "params": [named[n] for n in names], "peak": peak}
        for names, peak in (([n for n in named if n not in norm], v.lr), (sorted(norm), v.norm_lr))
        if names
    ]
    return adamw(v.optimizer, groups, lr=v.lr, betas=(0.9, 0.95), weight_decay=v.weight_decay)


def train(config, run, policy, sampler, tokenizer, tasks, stop=None):
    """The VRL loop: ROLLOUT, SCORE, UPDATE, SYNC, LOG, SAVE. Continues from the last complete checkpoint.

    stop: a StopSwitch; once it is on (Ctrl-C), the step is finished and saved, then the script exits with 130.
    """
    v, vllm = config.vrl, isinstance(sampler, VllmEngine)
    optimizer = make_optimizer(policy, v)
    saved, first = list_checkpoints(run / "vrl"), 0
    if saved:
        checkpoint = read_checkpoint(config, saved[-1])
        restore(policy, [optimizer], *checkpoint)
        first = checkpoint[-1]["step"]
        print(f"continuing from {saved[-1]}")
    sync_sampler(sampler, policy)
    print(
        f"VRL: steps {first} to {v.steps}, {v.tasks_per_step} tasks x {v.group_size} rollouts = {v.tasks_per_step * v.group_size} a step",
        flush=True,
    )
    bar = tqdm(
        range(first, v.steps),
        initial=first,
        total=v.steps,
        desc="VRL",
        unit="step",
        mininterval=1,
        disable=ranks.rank() > 0,
    )
    for step in bar:
        start = time.time()
        rollouts = play_share(
            sampler,
            tokenizer,
            step_tasks(tasks, config, step),
            config,
            config.rollout.temperature,
            seed=seeded_rng(config.seed, "rollouts", step).getrandbits(31),
            group_size=v.group_size,
        )
        ranks.barrier()
        sampled = time.time()
        if vllm:
            sampler.sleep()
        score_rollouts(rollouts, config)
        rollouts = gather_rollouts(rollouts)
        advantages, groups = group_advantages(
            [r.reward for r in rollouts], [r.group_id for r in rollouts], v.advantage
        )
        for r, a in zip(rollouts, advantages):
            r.advantage = a
        scored = time.time()
        for g in optimizer.param_groups:
            g["lr"] = g["peak"] * lr_share(v, step)
        figures = update(policy, optimizer, rollouts, config)
        if vllm:
            sampler.wake()
        if (
            figures["trained"] or not vllm
        ):  # without signal nothing changed; vLLM's engine holds a sync without a change for a fault
            sync_sampler(sampler, policy)
        if vllm:
            figures |= {
                "sync_gap": check_engine(sampler, policy, tokenizer, tasks[0], config, turns=1),
                "prompt_cached": sampler.cached_share(),
            }
        updated = time.time()
        new = sum(sum(r.loss_mask) for r in rollouts)
        now = summary(rollouts)
        record = {
            "phase": "vrl",
            "step": step + 1,
            **now,
            **figures,
            "groups": dict(groups),
            **part_variances(rollouts),
            "lr": optimizer.param_groups[0]["lr"],
            "sampled_tokens": new,
            "sample_tok_s": round(new / (sampled - start)),
            "update_tok_s": round(figures["read_tokens"] / (updated - scored)),
            "sample_s": round(sampled - start, 2),
            "update_s": round(updated - scored, 2),
            "step_s": round(time.time() - start, 2),
        }
        cut = sum(now["ended"].get(k, 0) for k in ("max_tokens", "max_turns")) / len(rollouts)
        if cut > 0.2 and ranks.rank() == 0:
            tqdm.write(
                f"warning: step {step + 1}: {cut:.0%} of the rollouts hit a limit; raise rollout.max_turn_tokens, rollout.max_turns or model.max_len"
            )
        if ranks.rank() == 0:
            append_metrics(run, record)
            write_jsonl(
                run / "vrl" / "rollouts" / f"step-{step + 1}.jsonl",
                [{**r.trajectory, "advantage": r.advantage} for r in rollouts],
            )
        ranks.barrier()  # what rank 0 writes is there before any rank ends the run
        if groups["unscored"] > config.llm.max_failures * max(20, len(rollouts)):
            raise SystemExit(
                f"error: the judge failed on {groups['unscored']} of {len(rollouts)} rollouts of step {step + 1}, config key "
                f"`llm.max_failures` allows {config.llm.max_failures:.0%}; "
                f"they stand in {run / 'vrl' / 'rollouts' / f'step-{step + 1}.jsonl'} with reward NaN"
            )
        bar.set_postfix_str(
            f"R_vrt {now['reward']:.3f} plan {now['plan']:.2f} fine {now['fine']:.2f} flat {groups['flat']}/{groups['groups']} "
            f"{record['sample_tok_s']} tok/s"
        )
        stopped = bool(
            ranks.total(stop is not None and stop.on)
        )  # Ctrl-C may reach one rank a step later than another
        if (step + 1) % v.save_every == 0 or step + 1 == v.steps or stopped:
            save_checkpoint(
                run / "vrl" / f"step-{step + 1}",
                policy,
                [optimizer],
                {"step": step + 1, "config": config_digest(config)},
            )
        if stopped:
            bar.close()
            print(
                f"stopped: VRL is saved at step {step + 1} of {v.steps}; the same command goes on from there"
            )
            raise SystemExit(130)


def main():
    """Data, PST, VRL, evaluation: whatever is not there yet, in order."""
    config, _ = command_line(__doc__)
    if config.vrl.tune == "full" and config.vrl.kl_coef:
        raise SystemExit(
            "error: vrl.kl_coef needs the adapter (pi_pst is the policy with the adapter off); set vrl.tune=lora or vrl.kl_coef=0"
        )
    if config.vrl.tune == "full" and config.vrl.norm_lr:
        raise SystemExit(
            "error: vrl.norm_lr is of the norm beside an adapter; with vrl.tune=full it is trained at vrl.lr: set vrl.norm_lr=0"
        )
    if config.rollout.engine == "vllm" and (config.vrl.tune == "full" or config.vrl.norm_lr):
        raise SystemExit(
            "error: vLLM is given the LoRA adapter alone: with rollout.engine=vllm set vrl.tune=lora and vrl.norm_lr=0"
        )
    if config.rollout.temperature <= 0:
        raise SystemExit(
            f"error: rollout.temperature is {config.rollout.temperature}; training samples, so it must be above 0"
        )
    began, run, quantize = (
        time.time(),
        ranks.first(lambda: open_run(config)),
        wants_nf4(config, "vrl"),
    )
    device = set_up(config)
    ranks.first(lambda: ensure_data(config, run))
    final = train_pst(config, run) if config.vrl.start == "pst" else None
    tokenizer = load_tokenizer(config, run)
    load = lambda *nf4: (
        load_policy(final, config, tokenizer, device, *nf4)
        if config.vrl.start == "pst"  # noqa: E731
        else base_policy(config, run, tokenizer, device, *nf4)
    )
    if (
        config.rollout.engine == "vllm"
    ):  # first, since it takes its share of the card's memory as it finds it
        folder = final or config.model.path or base_folder(config, run, tokenizer, device)
        sampler = VllmEngine(folder, config, device, bf16=use_autocast(config, device))
    else:
        sampler = load().float().eval().requires_grad_(False)
    policy = (
        add_lora(config, load(quantize), norm=config.vrl.norm_lr > 0)
        if config.vrl.tune == "lora"
        else load()
    )
    policy.train()  # without it model.gradient_checkpointing does nothing; there is no dropout to switch on
    heldout = read_jsonl(run / "data" / "heldout.jsonl")[: config.bench.tasks]
    gap = check_engine(sampler, policy, tokenizer, heldout[0], config)
    if config.vrl.tune == "lora":
        check_reference(policy, tokenizer, heldout[0], config, sampler)
    every, trained = (
        sum(p.numel() for p in policy.parameters()),
        sum(p.numel() for p in trained_parameters(policy).values()),
    )
    print(
        f"policy: {every:,} parameters, {trained:,} of them trained; sampler against trainer {gap:.1e} nats"
    )

    def measure(step):
        figures, rollouts = evaluate(
            sampler,
            tokenizer,
            heldout,
            config,
            run,
            "held-out after VRL" if step else "held-out before VRL",
        )
        if ranks.rank() == 0:
            append_metrics(run, {"phase": "eval", "step": step, **figures})
        return {
            **figures,
            "example": max(
                rollouts, key=lambda r: (r.reward, len(r.trajectory["calls"]))
            ).trajectory,
        }

    before = cached_evaluation(run / "vrl" / "before.json", lambda: measure(0))
    with StopSwitch() as stop:
        train(
            config, run, policy, sampler, tokenizer, read_jsonl(run / "data" / "train.jsonl"), stop
        )
    after_gap = check_engine(sampler, policy, tokenizer, heldout[0], config)
    after = cached_evaluation(run / "vrl" / "after.json", lambda: measure(config.vrl.steps))
    if ranks.rank():
        return
    plot_curve(run)
    write_trajectory(after["example"], run / "trajectory.txt")
    print_before_after(before, after)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\nsampler against trainer after the last sync {after_gap:.1e} nats; {time.time() - began:.0f} s, peak memory {peak:.1f} GiB"
    )
    print(
        f"curve:      {(run / 'curve.png').relative_to(ROOT)}\ntrajectory: {(run / 'trajectory.txt').relative_to(ROOT)}"
    )


if __name__ == "__main__":
    ranks.run(main)
