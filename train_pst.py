"""The policy, and Progressive Specialization Training (Sec. 4.2): supervised fine-tuning in two stages.

Stage s trains on D_s = D_gen(share_s) + lambda x D_vis (500K, then 200K of the general mix, whose sets Table 7 lists; Table 4: lambda = 3),
every agent token with the same weight. What the policy is (model, tokenizer, chat template, LoRA, log-probabilities)
stands here as well; train_vrl.py and bench.py import it.

    python train_pst.py --config configs/tiny.yaml                    # goes on where an earlier run stopped
    python train_pst.py --config configs/tiny.yaml --show-batch       # one packed row, trained tokens in green
    python train_pst.py --config configs/tiny.yaml pst.tune=lora name=tiny-lora
    accelerate launch --config_file configs/fsdp.yaml train_pst.py --config ...       # several ranks, weights spread over them (lib/ranks.py)

A policy from scratch first gets a base, which can copy (`base_policy`); the paper starts from a pretrained model.
Writes runs/<name>/base/final and pst/final (the policy, fp32 safetensors, tokenizer beside it), pst/stage-I-step-N and metrics.jsonl.
"""

import bisect
import math
import time
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from lib import fsdp, ranks
from lib.checkpoints import (
    config_digest,
    list_checkpoints,
    read_checkpoint,
    restore,
    save_checkpoint,
    trained_parameters,
)
from lib.evaluation import general_exact_match, greedy_answers
from lib.experiment import Stage, command_line
from lib.policy import (
    add_lora,
    build_policy,
    encode_trajectory,
    finished_policy,
    load_policy,
    load_tokenizer,
    merge_lora,
    save_policy,
    set_up,
    token_logprobs,
    use_autocast,
)
from lib.quantize import adamw, wants_nf4
from lib.runs import StopSwitch, append_metrics, open_run, read_jsonl, seeded_rng
from lib.vision import pictures_of, show_pictures
from make_data import ensure_data

BASE_LR = 0.01  # peak learning rate of AdamW on the base's exercises
MIN_LR = 0.05  # the rate's fall ends at this share of its peak
MAX_GRAD_NORM = 1.0  # the gradient is clipped to this norm; ours, the usual one of SFT
LOG_EVERY = 20  # optimizer steps between two lines of metrics.jsonl


# ---------------------------------------------------------------------------------------------------------------------
# Rows, mixtures, steps
def pack(lengths, row_len):
    """Examples to rows of at most `row_len` tokens, best fit decreasing; returns lists of example indices.

    >>> pack([5, 3, 4, 2], 7)
    [[0, 3], [2, 1]]
    """
    rows, free = [], []  # free: sorted (tokens left, row)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_len:
            raise ValueError(
                f"example {i} has {lengths[i]} tokens, a row holds {row_len}: raise `pst.row_len`"
            )
        at = bisect.bisect_left(free, (lengths[i], -1))
        left, row = free.pop(at) if at < len(free) else (row_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def make_row(examples, row_len, pad_id):
    """One packed row: input_ids, position_ids, loss_mask, each int64 (row_len,).

    Positions restart with every example, which is how attention knows them apart; the padding at the end is an example of
    its own with mask 0, whatever its id. The first token of an example is never trained: what comes before is not its own.
    """
    ids, positions, mask = [], [], []
    for tokens, trained, *_ in examples:
        ids += tokens
        positions += range(len(tokens))
        mask += [0, *trained[1:]]
    pad = row_len - len(ids)
    if pad < 0:
        raise ValueError(f"examples of {len(ids)} tokens do not fit a row of {row_len}")
    return (
        torch.tensor(ids + [pad_id] * pad),
        torch.tensor(positions + list(range(pad))),
        torch.tensor(mask + [0] * pad),
    )


def pack_steps(config, examples, order, rng):
    """A stream of example indices as optimizer steps: lists of rows, a row is a list of indices.

    Packing sorts by length, so it sees a window of the stream at a time, and its rows are shuffled again.
    """
    window, rows = 64 * config.pst.rows_per_step, []
    for at in range(0, len(order), window):
        part = order[at : at + window]
        new = [
            [part[i] for i in row]
            for row in pack([len(examples[i][0]) for i in part], config.pst.row_len)
        ]
        rng.shuffle(new)
        rows += new
    return [
        rows[i : i + config.pst.rows_per_step]
        for i in range(0, len(rows), config.pst.rows_per_step)
    ]


def stage_steps(config, stage, visgen, general):
    """All optimizer steps of a stage, its mixture in rows."""
    return pack_steps(
        config,
        [*general, *visgen],
        stage_order(config, stage, visgen, general),
        seeded_rng("pst rows", config.seed, stage),
    )


def encode_records(tokenizer, records, row_len, what):
    """Records with `messages` and `tools` as (ids, loss_mask), or (ids, loss_mask, pictures) where the user's are there and the model is a Qwen3-VL.

    SystemExit names a record that cannot be trained on.
    """
    examples = []
    for i, record in enumerate(
        tqdm(
            records,
            desc=f"encode {what}",
            leave=False,
            disable=len(records) < 1000 or ranks.rank() > 0,
        )
    ):
        try:
            messages = show_pictures(tokenizer, record.get("task") or {}, record["messages"])
            shown = pictures_of(messages)
            examples.append(
                (
                    *encode_trajectory(tokenizer, messages, record.get("tools")),
                    *([shown] if shown else []),
                )
            )
        except (ValueError, KeyError) as e:
            raise SystemExit(f"error: {what}, record {i}: {e}") from e
        if len(examples[-1][0]) > row_len:
            raise SystemExit(
                f"error: {what}, record {i} has {len(examples[-1][0])} tokens, a row holds {row_len}; "
                f"raise `pst.row_len`, or make the data shorter"
            )
    return examples


def encode_data(config, run, tokenizer):
    """The general mix and D_vis of a run, encoded."""
    return [
        encode_records(tokenizer, read_jsonl(run / "data" / name), config.pst.row_len, name)
        for name in ("general.jsonl", "visgen.jsonl")
    ]


def make_optimizers(config, model, stage):
    """The optimizers of one stage, as a list: AdamW alone, or (`pst.optimizer: muon`) Muon beside it for the blocks' matrices.

    Every group keeps its peak learning rate as `peak`; embeddings and matrices decay, vectors do not.
    """
    trained, p = trained_parameters(model), config.pst
    matrices = [
        n
        for n, w in trained.items()
        if p.optimizer == "muon" and w.dim() == 2 and "embed" not in n and "lm_head" not in n
    ]
    rest = [n for n in trained if n not in matrices]
    groups = [
        {
            "names": names,
            "params": [trained[n] for n in names],
            "weight_decay": decay,
            "peak": stage.lr,
        }
        for names, decay in (
            ([n for n in rest if trained[n].dim() > 1], p.weight_decay),
            ([n for n in rest if trained[n].dim() < 2], 0.0),
        )
        if names
    ]
    optimizers = (
        [adamw(p.optimizer, groups, lr=stage.lr, betas=(0.9, 0.98), foreach=True)] if groups else []
    )  # an adapter is matrices alone
    if matrices:
        group = {
            "names": matrices,
            "params": [trained[n] for n in matrices],
            "peak": stage.matrix_lr,
        }
        optimizers.append(
            torch.optim.Muon([group], lr=stage.matrix_lr, weight_decay=p.weight_decay)
        )
    return optimizers


# ---------------------------------------------------------------------------------------------------------------------
# Training
def lr_share(config, step, steps):
    """Share of the peak learning rate at step `step` (from 0) of `steps`: a linear rise, the peak, a linear fall to min_lr."""
    rise, fall = (
        max(1, round(share * steps)) for share in (config.pst.warmup, config.pst.cooldown)
    )
    low = MIN_LR
    return min(1.0, (step + 1) / rise, low + (1 - low) * (steps - 1 - step) / fall)


def make_batch(rows, examples, pad_id, device):
    """Rows of example indices as input_ids, position_ids, loss_mask (B, T); T is the longest row, not `row_len`."""
    length = max(sum(len(examples[i][0]) for i in row) for row in rows)
    made = [make_row([examples[i] for i in row], length, pad_id) for row in rows]
    return [torch.stack(x).to(device) for x in zip(*made)]


def row_pictures(rows, examples):
    """(row, first token, pictures) of each example with pictures, of rows of example indices."""
    starts = [[sum(len(examples[i][0]) for i in row[:k]) for k in range(len(row))] for row in rows]
    return [
        (r, start, examples[i][2])
        for r, row in enumerate(rows)
        for i, start in zip(row, starts[r])
        if len(examples[i]) > 2
    ]


def backward_step(config, model, rows, examples, pad_id, device):
    """Gradient of one optimizer step in micro-batches; returns (loss, tokens, loss tokens), loss in nats a loss token.

    The divisor is the count of loss tokens of the whole step, so any split into micro-batches and over ranks gives the same gradient.
    """
    mine = ranks.share(rows)
    parts = [
        mine[i : i + config.pst.micro_rows] for i in range(0, len(mine), config.pst.micro_rows)
    ]
    batches = [
        (*make_batch(part, examples, pad_id, device), row_pictures(part, examples))
        for part in parts
    ]
    loss_tokens = int(ranks.total(sum(int(mask[:, 1:].sum()) for _, _, mask, _ in batches)))
    # FSDP's passes are collective: a rank with fewer rows reads one more without a loss.
    for _ in range(
        math.ceil(math.ceil(len(rows) / ranks.world()) / config.pst.micro_rows) - len(batches)
    ):
        ids, positions, mask = make_batch(rows[:1], examples, pad_id, device)
        batches.append((ids, positions, 0 * mask, row_pictures(rows[:1], examples)))
    sharded = getattr(model, "sharded_logprobs", None)
    total = 0.0
    for ids, positions, mask, pictures in batches:
        logps = (sharded or partial(token_logprobs, model))(
            ids, positions, mask[:, 1:], autocast=use_autocast(config, device), pictures=pictures
        )  # (B, T-1)
        loss = -logps.sum() / loss_tokens
        (
            loss * ranks.world() if sharded else loss
        ).backward()  # FSDP takes the mean over ranks, not the sum
        total += loss.item()
    ranks.sum_gradients(trained_parameters(model).values())
    return ranks.total(total), sum(len(examples[i][0]) for row in rows for i in row), loss_tokens


def train_stage(
    config, run, number, part, model, examples, steps, pad_id, device, start=None, stop_at=None
):
    """One stage of PST (or the base, number 0): `steps` over encoded `examples`, learning rates of `part`. `start`: its read checkpoint.

    Saves every `save_every` steps and at the end. On Ctrl-C (or before step `stop_at`, for tests) saves and exits with 130.
    """
    if fsdp.use_fsdp():
        if (config.pst.tune, config.pst.optimizer) != ("full", "adamw"):
            raise SystemExit(
                f"error: FSDP spreads all weights and AdamW's moments, got pst.tune={config.pst.tune} "
                f"pst.optimizer={config.pst.optimizer}; set pst.tune=full pst.optimizer=adamw, or launch without configs/fsdp.yaml"
            )
        fsdp.shard(model, "sharded_logprobs", token_logprobs)
    optimizers, name = make_optimizers(config, model, part), f"stage {number}" if number else "base"
    first, window = 0, {"loss": 0.0, "tokens": 0, "loss_tokens": 0}
    if start:
        restore(model, optimizers, *start)
        first, window = start[2]["step"], start[2]["window"]
    model.train()
    tokens = [sum(len(examples[i][0]) for row in step for i in row) for step in steps]
    began = time.perf_counter()
    if first < len(
        steps
    ):  # a pass whose gradient is thrown away tells how long the stage will take
        backward_step(config, model, steps[first], examples, pad_id, device)
        model.zero_grad()
    seconds = (
        (time.perf_counter() - began)
        * sum(tokens[first:])
        / max(1, tokens[first] if first < len(steps) else 1)
    )
    fill = sum(tokens) / (sum(map(len, steps)) * config.pst.row_len)
    print(
        f"{name}: {sum(tokens):,} tokens in {len(steps):,} steps of {config.pst.rows_per_step} rows, {fill:.0%} full, "
        f"lr {part.lr:g}; from step {first}, about {seconds / 60:.1f} min",
        flush=True,
    )

    def save(step):
        state = {"stage": number, "step": step, "window": window, "config": config_digest(config)}
        save_checkpoint(
            run / ("pst" if number else "base") / f"stage-{number}-step-{step}",
            model,
            optimizers,
            state,
        )

    bar = tqdm(
        total=sum(tokens),
        initial=sum(tokens[:first]),
        unit="tok",
        unit_scale=True,
        desc=name,
        mininterval=2,
        disable=ranks.rank() > 0,
    )
    logged_at, logged_tokens = time.perf_counter(), 0
    with StopSwitch() as stop, bar:
        for step in range(first, len(steps)):
            if ranks.total(stop.on or step == stop_at):
                save(step)
                bar.close()
                print(
                    f"stopped: {name} is saved at step {step} of {len(steps)}; the same command goes on from there"
                )
                raise SystemExit(130)
            share = lr_share(config, step, len(steps))
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = share * group["peak"]
            loss, n, loss_tokens = backward_step(
                config, model, steps[step], examples, pad_id, device
            )
            norm = fsdp.full_tensor(
                torch.nn.utils.clip_grad_norm_(trained_parameters(model).values(), MAX_GRAD_NORM)
            ).item()
            if not math.isfinite(norm):
                raise SystemExit(
                    f"error: the gradient of {name}, step {step} is {norm} (loss {loss}); lower its `lr`, or set model.autocast=false"
                )
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            window["loss"] += loss * loss_tokens
            window["tokens"] += n
            window["loss_tokens"] += loss_tokens
            logged_tokens += n
            bar.update(n)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == len(steps):
                mean = window["loss"] / window["loss_tokens"]
                speed = logged_tokens / (time.perf_counter() - logged_at)
                record = {
                    "phase": "pst",
                    "stage": number,
                    "step": step + 1,
                    "loss": mean,
                    "tokens": window["tokens"],
                    "loss_tokens": window["loss_tokens"],
                    "tok_s": round(speed, 1),
                    "lr": share * part.lr,
                    "grad_norm": norm,
                }
                if ranks.rank() == 0:
                    append_metrics(run, record)
                bar.set_postfix(loss=f"{mean:.4f}", step=f"{step + 1}/{len(steps)}", refresh=False)
                window = {"loss": 0.0, "tokens": 0, "loss_tokens": 0}
                logged_at, logged_tokens = time.perf_counter(), 0
            if (step + 1) % config.pst.save_every == 0 or step + 1 == len(steps):
                save(step + 1)


def base_policy(config, run, tokenizer, device, quantize=False):
    """The policy before PST: `model.path`, or a Qwen3 from scratch after `model.base_examples` copying exercises. `quantize`: in nf4.

    The paper starts from a pretrained model, which can read and copy; random weights cannot, and D_vis alone does not teach it
    (configs/tiny.yaml has the figures). The result is kept in runs/<name>/base/final.
    """
    # An ablation that takes another run's PST takes its base as well.
    homes = [run] + (
        [finished_policy(config.pst.init_from).parents[1]] if config.pst.init_from else []
    )
    final, policy = (
        next(
            (h / "base" / "final" for h in homes if (h / "base" / "final").is_dir()),
            run / "base" / "final",
        ),
        config.model,
    )
    if policy.path or not policy.base_examples:
        return build_policy(config, tokenizer, device, quantize)
    if ranks.agreed(final.is_dir()):
        return load_policy(final, config, tokenizer, device, quantize)
    model = build_policy(config, tokenizer, device)
    examples = encode_records(
        tokenizer, read_jsonl(run / "data" / "base.jsonl"), config.pst.row_len, "base.jsonl"
    )
    steps = pack_steps(
        config, examples, list(range(len(examples))), seeded_rng("base rows", config.seed)
    )
    saved = list_checkpoints(run / "base")
    start = read_checkpoint(config, saved[-1]) if saved else None
    train_stage(
        config,
        run,
        0,
        Stage(lr=BASE_LR),
        model,
        examples,
        steps,
        tokenizer.pad_token_id,
        device,
        start=start,
    )
    save_policy(model, tokenizer, final)
    return load_policy(final, config, tokenizer, device, quantize) if quantize else model


def base_folder(config, run, tokenizer, device):
    """The folder of the policy before PST, made if it is not there, for an engine that loads by itself."""
    base_policy(config, run, tokenizer, device)
    folder = run / "base" / "final"
    if not folder.is_dir():
        raise SystemExit(
            "error: vLLM loads the policy from a folder, and random weights have none; set model.base_examples or model.path"
        )
    return folder


def train_pst(config, run):
    """Run the stages of PST that are not done yet; returns the folder of the finished policy."""
    final = run / "pst" / "final"
    if config.pst.init_from:
        return finished_policy(config.pst.init_from)
    if ranks.agreed(final.is_dir()):  # it was renamed into place, so it is whole
        return final
    device, quantize = set_up(config), wants_nf4(config, "pst")
    ranks.first(lambda: ensure_data(config, run))
    tokenizer = load_tokenizer(config, run)
    general, visgen = encode_data(config, run, tokenizer)
    model = base_policy(config, run, tokenizer, device, quantize)
    if config.pst.tune == "lora":
        model = add_lora(config, model)
    every, trained = [
        sum(p.numel() for p in x) for x in (model.parameters(), trained_parameters(model).values())
    ]
    marked = sum(sum(x[1]) for x in general + visgen) / sum(len(x[1]) for x in general + visgen)
    bf16 = "bfloat16" if use_autocast(config, device) else config.model.dtype
    print(
        f"PST: {every:,} parameters, {trained:,} trained, {bf16} on {device} ({torch.get_num_threads()} threads); "
        f"{len(visgen):,} trajectories, {len(general):,} general examples, {marked:.0%} of tokens trained",
        flush=True,
    )
    saved = list_checkpoints(run / "pst")
    start = read_checkpoint(config, saved[-1]) if saved else None
    if start:
        print(f"continuing from {saved[-1]}")
    for stage, part in enumerate(config.pst.stages):
        if start and start[2]["stage"] > stage + 1:
            continue
        steps = stage_steps(config, stage, visgen, general)
        print(mix_of(config, stage, steps, visgen, general))
        train_stage(
            config,
            run,
            stage + 1,
            part,
            model,
            [*general, *visgen],
            steps,
            tokenizer.pad_token_id,
            device,
            start=start,
        )
        start = None
    if config.pst.tune == "lora" and (
        ranks.rank() == 0 or not quantize
    ):  # the whole base in fp32 has room once in a node's memory
        plain = replace(config, model=replace(config.model, dtype="float32"))
        fresh = (
            load_policy(
                config.model.path or run / "base" / "final", plain, tokenizer, torch.device("cpu")
            )
            if quantize
            else None
        )
        model = merge_lora(model, fresh)
    save_policy(model, tokenizer, final)
    return final


def show_batch(config, run):
    """Print the first packed row of stage 1, trained tokens in green."""
    ensure_data(config, run)
    tokenizer = load_tokenizer(config, run)
    general, visgen = encode_data(config, run, tokenizer)
    row = stage_steps(config, 0, visgen, general)[0][0]
    for i in row:
        ids, mask = [*general, *visgen][i][:2]
        cut = [0] + [k for k in range(1, len(ids)) if mask[k] != mask[k - 1]] + [len(ids)]
        print(
            "".join(
                f"\033[32m{tokenizer.decode(ids[a:b])}\033[0m"
                if mask[a]
                else tokenizer.decode(ids[a:b])
                for a, b in zip(cut, cut[1:])
            )
            + f"\n--- {len(ids)} tokens, {sum(mask)} trained"
        )


def main():
    config, given = command_line(
        __doc__, [("--show-batch", "print one packed row with the trained tokens marked, and exit")]
    )
    run = ranks.first(lambda: open_run(config))
    if "--show-batch" in given:
        return show_batch(config, run)
    began = time.perf_counter()
    final = train_pst(config, run)
    device = set_up(config)
    ranks.first(lambda: ensure_data(config, run))
    tokenizer = load_tokenizer(config, run)
    model = load_policy(final, config, tokenizer, device)
    shares = general_exact_match(
        partial(greedy_answers, model, tokenizer, device=device),
        tokenizer,
        read_jsonl(run / "data" / "general_heldout.jsonl"),
    )
    if ranks.rank():
        return
    append_metrics(
        run,
        {
            "phase": "pst",
            "general_exact_match": shares,
            "seconds": round(time.perf_counter() - began, 1),
        },
    )
    print("general exact match, greedy: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    print(f"finished policy: {final}")


if __name__ == "__main__":
    ranks.run(main)


# ---------------------------------------------------------------------------------------------------------------------
# The mixture of a PST stage (Sec. 4.2, Table 4): D = a share of D_gen U repeat x D_vis
def general_part(config, stage, lengths):
    """Indices of the general examples of stage `stage` (from 0), after those of the stages before (around the end, if they run out).

    The share is of their number, or of their tokens (`unit: tokens`; `lengths`: of each example), exact but for the last example.
    """
    at = 0
    for s in config.pst.stages[: stage + 1]:
        sizes = lengths if s.unit == "tokens" else [1] * len(lengths)
        part, wanted = [], round(s.general * sum(sizes))
        while wanted > 0:
            part.append(at % len(lengths))
            wanted -= sizes[at % len(lengths)]
            at += 1
    return part


def stage_examples(config, stage, visgen, general, epoch=0):
    """The mixture of stage `stage` (from 0) in seeded order: indices into [*general, *visgen], which are encoded examples (ids, mask).

    `general` share of the general examples, and each of D_vis `repeat` times.
    """
    order = general_part(config, stage, [len(ids) for ids, _ in general])
    order += [len(general) + i for i in range(len(visgen))] * config.pst.stages[stage].repeat
    seeded_rng("pst order", config.seed, stage, epoch).shuffle(order)
    return order


def stage_order(config, stage, visgen, general):
    """Stage `stage` (from 0) as one stream of indices into [*general, *visgen] (encoded examples), of `tokens` tokens if that is set."""
    lengths, wanted = [len(x[0]) for x in [*general, *visgen]], config.pst.stages[stage].tokens
    order, epoch, total = [], 0, 0
    while True:
        fresh = stage_examples(config, stage, visgen, general, epoch)
        if not fresh:
            raise SystemExit(
                f"error: stage {stage + 1} has no examples; raise `pst.stages[{stage}].general` or `.repeat`"
            )
        for i in fresh:
            if wanted and total >= wanted:
                break
            order.append(i)
            total += lengths[i]
        epoch += 1
        if total >= wanted:
            return order


def mix_of(config, stage, steps, visgen, general):
    """What a stage trains on, in words: examples and tokens of either kind in its steps, and how much of one pass over its mixture that is."""
    pool, used = [*general, *visgen], [i for step in steps for row in step for i in row]
    tokens = lambda some: sum(len(pool[i][0]) for i in some)  # noqa: E731
    parts = [[i for i in used if i < len(general)], [i for i in used if i >= len(general)]]
    whole, s = tokens(stage_examples(config, stage, visgen, general)), config.pst.stages[stage]
    return (
        f"stage {stage + 1} mixes {len(parts[0]):,} general examples ({tokens(parts[0]):,} tokens; {s.general:g} of the {s.unit} of {len(general):,}) with "
        f"{len(parts[1]):,} of VisGenData ({tokens(parts[1]):,} tokens; {len(visgen):,} x {s.repeat}): {tokens(used) / whole:.0%} of one pass"
    )
