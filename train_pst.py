"""Progressive Specialization Training (PST, Sec. 4.2): supervised fine-tuning in two stages.

L_SFT is the mean of -log pi(a | o) over the agent's own tokens, every one with the same weight.
Stage s trains on D_s = D_gen(share_s) U lambda x D_vis: 500K, then 200K of the general mix, whose
sets Table 7 lists, and lambda = 3 (Table 4). Read on: the mixture, packing, a batch, one optimizer
step, a stage, all of PST. The policy itself (model, LoRA, log-probabilities) is lib/policy.py, and
its tokens and loss masks are lib/tokens.py.

    python train_pst.py --config configs/tiny.yaml         # goes on where an earlier run stopped
    python train_pst.py --config configs/tiny.yaml --show-batch    # one row, what is trained marked
    python train_pst.py --config configs/tiny.yaml pst.tune=lora name=tiny-lora
    accelerate launch --config_file configs/fsdp.yaml train_pst.py --config ...      # lib/fsdp.py

A policy from scratch first gets a base, which copies and reads (`base_policy`); the paper has a
pretrained model. `--base data/base` makes that of tiny.yaml and stops there. Writes
runs/<name>/base/final and pst/final (the policy, fp32 safetensors, tokenizer beside it),
pst/stage-I-step-N and metrics.jsonl.
"""

import bisect
import math
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
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
from lib.checks import check_training
from lib.evaluation import general_exact_match, greedy_answers
from lib.experiment import Config, Stage, command_line
from lib.policy import (
    add_lora,
    build_policy,
    load_policy,
    merge_lora,
    save_policy,
    set_up,
    token_logprobs,
    use_autocast,
)
from lib.quantize import adamw, wants_nf4
from lib.reading_exercises import reading_accuracy, reading_line, reading_tasks, shows_reading
from lib.runs import (
    ROOT,
    StopSwitch,
    append_metrics,
    cut_tail,
    drop_metrics,
    open_run,
    read_jsonl,
    seeded_rng,
)
from lib.tokens import encode_trajectory, finished_policy, load_tokenizer, pretrained
from lib.track import open_trackers
from lib.vision import pictures_of, show_pictures
from make_data import ensure_data

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The paper gives no values of its optimizer; these are ours.
BASE_LR = 0.01  # peak learning rate of AdamW on the base's exercises
MIN_LR = 0.05  # the rate's fall ends at this share of its peak
# The gradient is clipped to this norm; ours, the usual one of SFT.
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.98)  # of AdamW
PACK_WINDOW = 64  # examples that are packed together, for each row of a step
LOG_EVERY = 20  # optimizer steps between two lines of metrics.jsonl

# An example is (ids, loss mask), or (ids, loss mask, pictures) where a Qwen3-VL reads the user's.
# A row is a list of indices of examples that stand in it one after another, a step a list of rows.
Example = tuple
Row = list[int]
Step = list[Row]


# --------------------------------------------------------------------------------------------------
# Data
def encode_data(
    config: Config, run: Path, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[Example]]:
    """The general mix (D_gen) and VisGenData (D_vis) of a run, encoded.

    General records that cannot be trained on are skipped; SystemExit names such a trajectory, which
    is our own.
    """
    return [
        encode_records(tokenizer, read_jsonl(run / "data" / name), config.pst.row_len, name, skips)
        for name, skips in (("general.jsonl", True), ("visgen.jsonl", False))
    ]


def encode_records(
    tokenizer: "PreTrainedTokenizerBase",
    records: list[dict],
    row_len: int,
    what: str,
    skips: bool = False,
) -> list[Example]:
    """Records with `messages` and `tools` as examples.

    A record that cannot be encoded, or is longer than a row of `row_len` tokens, ends the run: the
    SystemExit names it, and `what` names the records there. `skips`: it is left out and counted
    instead, as strangers' data want it; SystemExit if that leaves nothing.
    """
    examples = []
    faults = []  # (kind of fault, its text) of what is skipped
    quiet = len(records) < 1000 or ranks.rank() > 0
    bar = tqdm(records, desc=f"encode {what}", leave=False, disable=quiet)
    for i, record in enumerate(bar):
        fault = None
        try:
            messages = show_pictures(tokenizer, record.get("task") or {}, record["messages"])
            ids, mask = encode_trajectory(tokenizer, messages, record.get("tools"))
        except (ValueError, KeyError) as e:
            fault = ("cannot be encoded", f"{what}, record {i}: {e}")
        else:
            if len(ids) > row_len:
                fault = (
                    "longer than a row",
                    f"{what}, record {i} has {len(ids)} tokens, a row holds {row_len}; "
                    f"raise `pst.row_len`, or make the data shorter",
                )
        if fault and not skips:
            raise SystemExit(f"error: {fault[1]}")
        if fault:
            faults.append(fault)
            continue
        pictures = pictures_of(messages)
        examples.append((ids, mask, pictures) if pictures else (ids, mask))
    if faults:
        say_skipped(what, len(records), faults)
    return examples


def say_skipped(what: str, n_records: int, faults: list[tuple[str, str]]) -> None:
    """Say how many records are left out, by reason. SystemExit if that is all of them."""
    if len(faults) == n_records:
        raise SystemExit(f"error: no record of {what} can be trained on; the first: {faults[0][1]}")
    counts = Counter(kind for kind, _ in faults)
    said = ", ".join(
        f"{counts[kind]:,} {kind}" for kind in ("cannot be encoded", "longer than a row")
    )
    print(f"{what}: {len(faults):,} of {n_records:,} records skipped ({said}); {faults[0][1]}")


def count_tokens(examples: list[Example], indices: Iterable[int]) -> int:
    """Tokens of the examples with these indices."""
    return sum(len(examples[i][0]) for i in indices)


def step_tokens(examples: list[Example], rows: Step) -> int:
    """Tokens of one optimizer step, without padding."""
    return sum(count_tokens(examples, row) for row in rows)


# --------------------------------------------------------------------------------------------------
# The mixture of a stage (Sec. 4.2, Table 4): D = a share of D_gen U lambda x D_vis
def general_part(config: Config, stage: int, lengths: list[int]) -> list[int]:
    """Indices of the general examples of stage `stage` (from 0).

    A stage takes those after the stages before it (around the end, if they run out). The share is
    of their number, or of their tokens (`unit: tokens`; `lengths`: of each example), exact but for
    the last example. That stages do not overlap is ours.
    """
    at = 0
    for earlier in config.pst.stages[: stage + 1]:
        sizes = lengths if earlier.unit == "tokens" else [1] * len(lengths)
        wanted = round(earlier.general * sum(sizes))
        part = []
        while wanted > 0:
            i = at % len(lengths)
            part.append(i)
            wanted -= sizes[i]
            at += 1
    return part


def stage_examples(
    config: Config, stage: int, visgen: list[Example], general: list[Example], epoch: int = 0
) -> list[int]:
    """The mixture of stage `stage` (from 0) in seeded order: indices into [*general, *visgen].

    `general` share of the general examples, and each of D_vis `repeat` (lambda) times.
    """
    order = general_part(config, stage, [len(example[0]) for example in general])
    specialised = [len(general) + i for i in range(len(visgen))]
    order += specialised * config.pst.stages[stage].repeat
    seeded_rng("pst order", config.seed, stage, epoch).shuffle(order)
    return order


def stage_order(
    config: Config, stage: int, visgen: list[Example], general: list[Example]
) -> list[int]:
    """Stage `stage` (from 0) as one stream of indices into [*general, *visgen].

    It is the mixture once, or `tokens` tokens of it if that is set: cut, or cycled in fresh orders.
    SystemExit if the mixture is empty.
    """
    examples = [*general, *visgen]
    wanted = config.pst.stages[stage].tokens
    order, tokens, epoch = [], 0, 0
    while True:
        mixture = stage_examples(config, stage, visgen, general, epoch)
        if not mixture:
            raise SystemExit(
                f"error: stage {stage + 1} has no examples; "
                f"raise `pst.stages[{stage}].general` or `.repeat`"
            )
        for i in mixture:
            if wanted and tokens >= wanted:
                break
            order.append(i)
            tokens += len(examples[i][0])
        epoch += 1
        if tokens >= wanted:
            return order


def mix_of(
    config: Config, stage: int, steps: list[Step], visgen: list[Example], general: list[Example]
) -> str:
    """What a stage trains on, in words.

    Examples and tokens of either kind in its steps, and how much of one pass over its mixture that
    is.
    """
    examples = [*general, *visgen]
    settings = config.pst.stages[stage]
    used = [i for step in steps for row in step for i in row]
    of_general = [i for i in used if i < len(general)]
    of_visgen = [i for i in used if i >= len(general)]
    one_pass = stage_examples(config, stage, visgen, general)
    share = count_tokens(examples, used) / count_tokens(examples, one_pass)
    return (
        f"stage {stage + 1} mixes {len(of_general):,} general examples "
        f"({count_tokens(examples, of_general):,} tokens; "
        f"{settings.general:g} of the {settings.unit} of {len(general):,}) with "
        f"{len(of_visgen):,} of VisGenData ({count_tokens(examples, of_visgen):,} tokens; "
        f"{len(visgen):,} x {settings.repeat}): {share:.0%} of one pass"
    )


# --------------------------------------------------------------------------------------------------
# Packing (ours): short examples share a row
def pack(lengths: list[int], row_len: int) -> list[Row]:
    """Examples to rows of at most `row_len` tokens, best fit decreasing: lists of indices.

    ValueError names an example that is longer than a row.

    >>> pack([5, 3, 4, 2], 7)
    [[0, 3], [2, 1]]
    """
    rows = []
    free = []  # sorted (tokens left, row)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_len:
            raise ValueError(
                f"example {i} has {lengths[i]} tokens, a row holds {row_len}: raise `pst.row_len`"
            )
        at = bisect.bisect_left(free, (lengths[i], -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = row_len, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def pack_steps(
    config: Config, examples: list[Example], order: list[int], rng: random.Random
) -> list[Step]:
    """A stream of example indices as optimizer steps.

    Packing sorts by length, so it sees a window of the stream at a time, and its rows are shuffled
    again.
    """
    per_step = config.pst.rows_per_step
    window = PACK_WINDOW * per_step
    rows = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        packed = pack([len(examples[i][0]) for i in part], config.pst.row_len)
        fresh = [[part[place] for place in row] for row in packed]
        rng.shuffle(fresh)
        rows += fresh
    return [rows[i : i + per_step] for i in range(0, len(rows), per_step)]


def stage_steps(
    config: Config, stage: int, visgen: list[Example], general: list[Example]
) -> list[Step]:
    """All optimizer steps of stage `stage` (from 0), its mixture in rows."""
    order = stage_order(config, stage, visgen, general)
    rng = seeded_rng("pst rows", config.seed, stage)
    return pack_steps(config, [*general, *visgen], order, rng)


# --------------------------------------------------------------------------------------------------
# A batch
def make_row(examples: list[Example], row_len: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """One packed row: input_ids, position_ids, loss_mask, each int64 (row_len,).

    Positions restart with every example, which is how attention knows them apart; the padding at
    the end is an example of its own with mask 0, whatever its id. The first token of an example is
    never trained: what comes before is not its own. ValueError if they do not fit.
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


def make_batch(
    rows: list[Row], examples: list[Example], pad_id: int, device: torch.device
) -> list[Tensor]:
    """Rows as input_ids, position_ids, loss_mask, each int64 (B, T).

    T is the longest row, not `row_len`.
    """
    length = max(count_tokens(examples, row) for row in rows)
    made = [make_row([examples[i] for i in row], length, pad_id) for row in rows]
    return [torch.stack(tensors).to(device) for tensors in zip(*made)]


def row_pictures(rows: list[Row], examples: list[Example]) -> list[tuple]:
    """(row, first token, pictures) of each example with pictures in these rows."""
    found = []
    for number, row in enumerate(rows):
        start = 0
        for i in row:
            ids, _, *pictures = examples[i]
            if pictures:
                found.append((number, start, pictures[0]))
            start += len(ids)
    return found


def micro_batches(
    config: Config, rows: Step, examples: list[Example], pad_id: int, device: torch.device
) -> list[tuple]:
    """This rank's rows of a step as batches that one forward pass holds (`micro_rows`).

    A batch is (input_ids, position_ids, loss_mask, pictures). Batches that only keep this rank in
    step with others have nothing but zeros as their loss mask.
    """
    size = config.pst.micro_rows
    mine = ranks.share(rows)
    batches = []
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        batches.append((*make_batch(part, examples, pad_id, device), row_pictures(part, examples)))
    for _ in range(fsdp.missing_passes(len(rows), size, len(batches))):
        ids, positions, mask = make_batch(rows[:1], examples, pad_id, device)
        batches.append((ids, positions, 0 * mask, row_pictures(rows[:1], examples)))
    return batches


# --------------------------------------------------------------------------------------------------
# One optimizer step
def backward_step(
    config: Config,
    model: torch.nn.Module,
    rows: Step,
    examples: list[Example],
    pad_id: int,
    device: torch.device,
) -> tuple[float, int, int]:
    """Gradient of L_SFT (Sec. 4.2) over one optimizer step, in micro-batches.

    Returns the loss in nats a loss token, all tokens, and loss tokens. The divisor is the count of
    loss tokens of the whole step, so any split into micro-batches and over ranks gives the same
    gradient.
    """
    batches = micro_batches(config, rows, examples, pad_id, device)
    loss_tokens = int(ranks.total(sum(int(mask[:, 1:].sum()) for _, _, mask, _ in batches)))
    total = 0.0
    for batch in batches:
        logprobs = batch_logprobs(config, model, batch)  # (B, T-1), 0 where nothing is trained
        loss = -logprobs.sum() / loss_tokens
        loss.backward()
        total += loss.item()
    ranks.sum_gradients(trained_parameters(model).values())
    return ranks.total(total), step_tokens(examples, rows), loss_tokens


def batch_logprobs(config: Config, model: torch.nn.Module, batch: tuple) -> Tensor:
    """log pi(a | o) of a batch's loss tokens, (B, T-1), 0 at the others."""
    ids, positions, mask, pictures = batch
    logprobs_of = fsdp.through_shards(token_logprobs, model)
    autocast = use_autocast(config, ids.device)
    return logprobs_of(ids, positions, mask[:, 1:], autocast=autocast, pictures=pictures)


def make_optimizers(
    config: Config, model: torch.nn.Module, rates: Stage
) -> list[torch.optim.Optimizer]:
    """The optimizers, with the peak learning rates of a stage.

    AdamW alone, or (`pst.optimizer: muon`) Muon beside it for the blocks' matrices. Every group
    keeps its peak rate as `peak`, and as `rate` which key of a stage that is; embeddings and
    matrices decay, vectors do not.
    """
    trained = trained_parameters(model)
    matrices, decaying, others = [], [], []
    for name, weight in trained.items():
        in_block = "embed" not in name and "lm_head" not in name
        if config.pst.optimizer == "muon" and weight.dim() == 2 and in_block:
            matrices.append(name)
        elif weight.dim() > 1:
            decaying.append(name)
        else:
            others.append(name)

    def group_of(names: list[str], rate: str) -> dict:
        params = [trained[name] for name in names]
        return {"names": names, "params": params, "rate": rate, "peak": getattr(rates, rate)}

    decay = config.pst.weight_decay
    groups = []  # of AdamW; none for an adapter, which is matrices alone, under Muon
    if decaying:
        groups.append({**group_of(decaying, "lr"), "weight_decay": decay})
    if others:
        groups.append({**group_of(others, "lr"), "weight_decay": 0.0})
    optimizers = []
    if groups:
        optimizer = adamw(config.pst.optimizer, groups, lr=rates.lr, betas=BETAS, foreach=True)
        optimizers.append(optimizer)
    if matrices:
        group = group_of(matrices, "matrix_lr")
        optimizers.append(torch.optim.Muon([group], lr=rates.matrix_lr, weight_decay=decay))
    return optimizers


def set_peaks(optimizers: list[torch.optim.Optimizer], rates: Stage) -> None:
    """Set every group's peak learning rate to that of a stage."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = getattr(rates, group["rate"])


def lr_share(config: Config, step: int, steps: int) -> float:
    """Share of the peak learning rate at step `step` (from 0) of `steps`, those of all stages.

    A linear rise (`warmup`), the peak, a linear fall (`cooldown`) to MIN_LR: one curve over all of
    PST, which is ours. With a rise and a fall in each stage, two stages came out below one.
    """
    rise = max(1, round(config.pst.warmup * steps))
    rising = (step + 1) / rise
    falling = 1.0
    if config.pst.cooldown:
        fall = max(1, round(config.pst.cooldown * steps))
        falling = MIN_LR + (1 - MIN_LR) * (steps - 1 - step) / fall
    return min(1.0, rising, falling)


def lr_shares(config: Config, stage_sizes: list[int], stage: int) -> list[float]:
    """`lr_share` of each step of stage `stage` (from 0); stage_sizes: the steps of every stage."""
    before = sum(stage_sizes[:stage])
    steps = range(before, before + stage_sizes[stage])
    return [lr_share(config, step, sum(stage_sizes)) for step in steps]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def apply_gradient(
    config: Config,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss: float,
    where: str,
) -> float:
    """Clip the gradient, let the optimizers step, clear it; returns its norm before clipping.

    SystemExit if the norm is no finite number; `where` and `loss` tell of the step there.
    """
    parameters = trained_parameters(model).values()
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    norm = fsdp.full_tensor(norm).item()
    if not math.isfinite(norm):
        raise SystemExit(
            f"error: the gradient of {where} is {norm} (loss {loss}); "
            f"lower its `lr`, or set model.autocast=false"
        )
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return norm


# --------------------------------------------------------------------------------------------------
# One stage
def train_stage(
    config: Config,
    run: Path,
    number: int,
    rates: Stage,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    examples: list[Example],
    steps: list[Step],
    shares: list[float],
    pad_id: int,
    device: torch.device,
    start: tuple | None = None,
    stop_at: int | None = None,
) -> None:
    """One stage of PST (from 1; 0 is the base): `steps` over encoded `examples`.

    `rates` holds the peak learning rates and `shares` each step's share of them; `start` is the
    checkpoint to go on from, as it was read. Saves every `save_every` steps and at the end. On
    Ctrl-C (or before step `stop_at`, for tests) saves and exits with 130.
    """
    set_peaks(optimizers, rates)
    first, window = 0, empty_window()
    if start:
        weights, moments, state = start
        restore(model, optimizers, weights, moments, state)
        first, window = state["step"], state["window"]
    if ranks.rank() == 0:
        # Lines of steps that a break lost and that are done again, and a line that it tore.
        cut_tail(run / "metrics.jsonl")
        drop_metrics(run, partial(comes_after, number=number, step=first))
    model.train()
    tokens = [step_tokens(examples, rows) for rows in steps]
    name = f"stage {number}" if number else "base"
    seconds = estimate_seconds(config, model, examples, steps, tokens, first, pad_id, device)
    print_stage(config, name, rates, steps, tokens, first, seconds)
    log = StageLog(run, number, name, tokens, first, window)
    save = partial(save_stage, config, run, number, model, optimizers)

    with StopSwitch() as stop, log.bar:
        for step, rows in enumerate(steps[first:], first):
            # Ctrl-C may have reached one rank alone.
            if ranks.total(stop.on or step == stop_at):
                save(step, log.window)
                log.say_stopped(step)
                raise SystemExit(130)
            set_learning_rates(optimizers, shares[step])
            loss, _, loss_tokens = backward_step(config, model, rows, examples, pad_id, device)
            norm = apply_gradient(config, model, optimizers, loss, f"{name}, step {step}")
            log.add(loss, tokens[step], loss_tokens)
            last = step + 1 == len(steps)
            if (step + 1) % LOG_EVERY == 0 or last:
                log.write(step + 1, shares[step] * rates.lr, norm)
            if (step + 1) % config.pst.save_every == 0 or last:
                save(step + 1, log.window)


def comes_after(record: dict, number: int, step: int) -> bool:
    """Whether a line of metrics.jsonl is of a step of PST (or the base) after `step` of a stage."""
    if record.get("phase") != "pst" or "stage" not in record:
        return False
    same_folder = (record["stage"] > 0) == (number > 0)
    return same_folder and (record["stage"], record["step"]) > (number, step)


def estimate_seconds(
    config: Config,
    model: torch.nn.Module,
    examples: list[Example],
    steps: list[Step],
    tokens: list[int],
    first: int,
    pad_id: int,
    device: torch.device,
) -> float:
    """How long the steps from `first` will take; `tokens`: of each step.

    A pass over the first of them, whose gradient is thrown away, is timed.
    """
    if first == len(steps):
        return 0.0
    began = time.perf_counter()
    backward_step(config, model, steps[first], examples, pad_id, device)
    model.zero_grad()
    return (time.perf_counter() - began) * sum(tokens[first:]) / max(1, tokens[first])


def print_stage(
    config: Config,
    name: str,
    rates: Stage,
    steps: list[Step],
    tokens: list[int],
    first: int,
    seconds: float,
) -> None:
    """Say how much a stage trains on, and how long that will take."""
    n_rows = sum(len(rows) for rows in steps)
    fill = sum(tokens) / (n_rows * config.pst.row_len)
    print(
        f"{name}: {sum(tokens):,} tokens in {len(steps):,} steps of {config.pst.rows_per_step} "
        f"rows, {fill:.0%} full, lr {rates.lr:g}; from step {first}, about {seconds / 60:.1f} min",
        flush=True,
    )


def save_stage(
    config: Config,
    run: Path,
    number: int,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    window: dict,
) -> None:
    """Write the checkpoint of stage `number` after `step` steps."""
    folder = run / ("pst" if number else "base") / f"stage-{number}-step-{step}"
    state = {"stage": number, "step": step, "window": window, "config": config_digest(config)}
    save_checkpoint(folder, model, optimizers, state)


def empty_window() -> dict:
    """Sums over the steps since the last line of metrics.jsonl; a checkpoint keeps them."""
    return {"loss": 0.0, "tokens": 0, "loss_tokens": 0}


class StageLog:
    """What a stage shows: a bar, and a line of metrics.jsonl every LOG_EVERY steps."""

    def __init__(
        self, run: Path, number: int, name: str, tokens: list[int], first: int, window: dict
    ):
        self.run = run
        self.number = number
        self.name = name
        self.n_steps = len(tokens)
        self.window = window
        self.bar = tqdm(
            total=sum(tokens),
            initial=sum(tokens[:first]),
            unit="tok",
            unit_scale=True,
            desc=name,
            mininterval=2,
            disable=ranks.rank() > 0,
        )
        self.start_clock()

    def start_clock(self) -> None:
        """Speed is counted from here: a checkpoint's window is older than this process."""
        self.began = time.perf_counter()
        self.tokens = 0

    def add(self, loss: float, tokens: int, loss_tokens: int) -> None:
        """Count one optimizer step."""
        self.window["loss"] += loss * loss_tokens
        self.window["tokens"] += tokens
        self.window["loss_tokens"] += loss_tokens
        self.tokens += tokens
        self.bar.update(tokens)

    def write(self, step: int, lr: float, grad_norm: float) -> None:
        """Append a line after `step` steps, and begin a new window."""
        loss = self.window["loss"] / self.window["loss_tokens"]
        record = {
            "phase": "pst",
            "stage": self.number,
            "step": step,
            "loss": loss,
            "tokens": self.window["tokens"],
            "loss_tokens": self.window["loss_tokens"],
            "tok_s": round(self.tokens / (time.perf_counter() - self.began), 1),
            "lr": lr,
            "grad_norm": grad_norm,
        }
        if ranks.rank() == 0:
            append_metrics(self.run, record)
        self.bar.set_postfix(loss=f"{loss:.4f}", step=f"{step}/{self.n_steps}", refresh=False)
        self.window = empty_window()
        self.start_clock()

    def say_stopped(self, step: int) -> None:
        """Say that the stage stops before step `step` (from 0), and how to go on."""
        self.bar.close()
        print(
            f"stopped: {self.name} is saved at step {step} of {self.n_steps}; "
            f"the same command goes on from there"
        )


# --------------------------------------------------------------------------------------------------
# The base: the policy before PST
def base_policy(
    config: Config,
    run: Path,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
    quantize: bool = False,
) -> "PreTrainedModel":
    """The policy before PST: `model.path`, or random weights that have learnt to copy and read.

    The paper starts from a pretrained model, which can read and copy; random weights cannot, and
    D_vis alone does not teach it (docs/learning.md has figures). So a Qwen3 from scratch is
    trained on `model.base_examples` copying exercises and `model.base_general` general examples
    first (ours), and kept in runs/<name>/base/final. `quantize`: in nf4.
    """
    final = find_base(config, run)
    if config.model.path or not (config.model.base_examples or config.model.base_general):
        return build_policy(config, tokenizer, device, quantize)
    if ranks.agreed(final.is_dir()):
        return load_policy(final, config, tokenizer, device, quantize)
    model = train_base(config, run, tokenizer, device)
    save_policy(model, tokenizer, final)
    log_reading(config, run, model, tokenizer, "base")
    if quantize:
        return load_policy(final, config, tokenizer, device, quantize)
    return model


def write_base(config: Config, run: Path, folder: Path) -> None:
    """Train the base (`base_policy`) and write it into a folder in bfloat16, half the bytes: other
    experiments start from it by `model.path`."""
    ranks.first(lambda: ensure_data(config, run))
    tokenizer = load_tokenizer(config, run)
    model = base_policy(config, run, tokenizer, set_up(config))
    if ranks.rank() == 0:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"the base is in {folder}")


def find_base(config: Config, run: Path) -> Path:
    """The folder of the base: where it is, or in this run, where it will be.

    An ablation that takes another run's PST takes its base as well.
    """
    own = run / "base" / "final"
    if not config.pst.init_from:
        return own
    other = finished_policy(config.pst.init_from).parents[1] / "base" / "final"
    return other if other.is_dir() and not own.is_dir() else own


def train_base(
    config: Config, run: Path, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> "PreTrainedModel":
    """A Qwen3 from scratch after its exercises, copying first; goes on from a checkpoint."""
    model = build_policy(config, tokenizer, device)
    records = read_jsonl(run / "data" / "base.jsonl")
    examples = encode_records(tokenizer, records, config.pst.row_len, "base.jsonl")
    rng = seeded_rng("base rows", config.seed)
    steps = pack_steps(config, examples, list(range(len(examples))), rng)
    start = last_checkpoint(config, run / "base")
    rates = Stage(lr=BASE_LR)
    fsdp.shard_if_asked(config, model)
    optimizers = make_optimizers(config, model, rates)
    shares = lr_shares(config, [len(steps)], 0)
    what = (examples, steps, shares, tokenizer.pad_token_id, device)
    train_stage(config, run, 0, rates, model, optimizers, *what, start=start)
    return model


def log_reading(
    config: Config,
    run: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    phase: str,
) -> None:
    """Print how well the policy reads requests, and keep it in metrics.jsonl.

    Nothing where no exercise shows it reading. All ranks call it; `phase`: base | pst.
    """
    if not shows_reading(config):
        return
    answers = partial(greedy_answers, model, tokenizer, device=model.device)
    reading = reading_accuracy(answers, tokenizer, reading_tasks(config))
    if ranks.rank() == 0:
        append_metrics(run, {"phase": "reading", "after": phase, "reading": reading})
        print(f"reading after {phase}, requests whose facts are all right: {reading_line(reading)}")


def last_checkpoint(config: Config, folder: Path, say: bool = False) -> tuple | None:
    """Weights, moments and state of the newest checkpoint in a folder; None if there is none.

    `say`: print which it is.
    """
    saved = list_checkpoints(folder)
    if not saved:
        return None
    start = read_checkpoint(config, saved[-1])
    if say:
        print(f"continuing from {saved[-1]}")
    return start


def base_folder(
    config: Config, run: Path, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> Path | str:
    """The folder, or hub name, of the policy before PST, made if it is not there.

    For an engine that loads by itself. SystemExit if the policy has no folder.
    """
    if config.model.path:
        return pretrained(config)
    base_policy(config, run, tokenizer, device)
    folder = run / "base" / "final"
    if not folder.is_dir():
        raise SystemExit(
            "error: vLLM loads the policy from a folder, and random weights have none; "
            "set model.base_examples or model.path"
        )
    return folder


# --------------------------------------------------------------------------------------------------
# All of PST
def train_pst(config: Config, run: Path) -> Path:
    """Run the stages of PST that are not done yet; returns the folder of the finished policy."""
    if config.pst.init_from:
        return finished_policy(config.pst.init_from)
    final = run / "pst" / "final"
    if ranks.agreed(final.is_dir()):  # it was renamed into place, so it is whole
        return final
    device = set_up(config)
    quantize = wants_nf4(config, "pst")
    ranks.first(lambda: ensure_data(config, run))
    tokenizer = load_tokenizer(config, run)
    general, visgen = encode_data(config, run, tokenizer)
    model = base_policy(config, run, tokenizer, device, quantize)
    if config.pst.tune == "lora":
        model = add_lora(config, model)
    print_pst(config, model, visgen, general, device)
    train_stages(config, run, model, visgen, general, tokenizer.pad_token_id, device)
    if config.pst.tune == "lora":
        model = merged_policy(config, run, model, tokenizer, quantize)
    save_policy(model, tokenizer, final)
    return final


def print_pst(
    config: Config,
    model: torch.nn.Module,
    visgen: list[Example],
    general: list[Example],
    device: torch.device,
) -> None:
    """Say what is trained on what."""
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in trained_parameters(model).values())
    masks = [mask for _, mask, *_ in general + visgen]
    marked = sum(sum(mask) for mask in masks) / sum(len(mask) for mask in masks)
    dtype = "bfloat16" if use_autocast(config, device) else config.model.dtype
    print(
        f"PST: {n_all:,} parameters, {n_trained:,} trained, {dtype} on {device} "
        f"({torch.get_num_threads()} threads); {len(visgen):,} trajectories, "
        f"{len(general):,} general examples, {marked:.0%} of tokens trained",
        flush=True,
    )


def train_stages(
    config: Config,
    run: Path,
    model: torch.nn.Module,
    visgen: list[Example],
    general: list[Example],
    pad_id: int,
    device: torch.device,
) -> None:
    """Train the stages from the last checkpoint on.

    One curve of the learning rate goes over all of them, and the optimizers' moments go with it:
    without a rise of its own a stage could not begin with none.
    """
    examples = [*general, *visgen]
    stages = config.pst.stages
    start = last_checkpoint(config, run / "pst", say=True)
    fsdp.shard_if_asked(config, model)
    optimizers = make_optimizers(config, model, stages[0])
    steps_of = [stage_steps(config, stage, visgen, general) for stage in range(len(stages))]
    sizes = [len(steps) for steps in steps_of]
    for stage, (rates, steps) in enumerate(zip(stages, steps_of)):
        number = stage + 1
        if start and start[2]["stage"] > number:
            continue
        print(mix_of(config, stage, steps, visgen, general))
        what = (examples, steps, lr_shares(config, sizes, stage), pad_id, device)
        train_stage(config, run, number, rates, model, optimizers, *what, start=start)
        start = None


def merged_policy(
    config: Config,
    run: Path,
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    quantize: bool,
) -> torch.nn.Module:
    """The policy with its adapter merged in fp32.

    A quantized one is merged into its base anew, on rank 0 alone: the whole base in fp32 has room
    once in a node's memory. The other ranks keep `model`.
    """
    if not quantize:
        return merge_lora(model)
    if ranks.rank() > 0:
        return model
    plain = replace(config, model=replace(config.model, dtype="float32"))
    source = pretrained(config) if config.model.path else run / "base" / "final"
    return merge_lora(model, load_policy(source, plain, tokenizer, torch.device("cpu")))


def show_batch(config: Config, run: Path) -> None:
    """Print the first packed row of stage 1, trained tokens in green."""
    ensure_data(config, run)
    tokenizer = load_tokenizer(config, run)
    general, visgen = encode_data(config, run, tokenizer)
    examples = [*general, *visgen]
    first_step = stage_steps(config, 0, visgen, general)[0]
    for i in first_step[0]:
        ids, mask, *_ = examples[i]
        print(colored(tokenizer, ids, mask))
        print(f"--- {len(ids)} tokens, {sum(mask)} trained")


def colored(tokenizer: "PreTrainedTokenizerBase", ids: list[int], mask: list[int]) -> str:
    """Tokens as text, those with mask 1 in a terminal's green."""
    changes = [k for k in range(1, len(ids)) if mask[k] != mask[k - 1]]
    text = ""
    for start, end in zip([0, *changes], [*changes, len(ids)]):
        piece = tokenizer.decode(ids[start:end])
        text += f"\033[32m{piece}\033[0m" if mask[start] else piece
    return text


def main() -> None:
    """Train by PST, then measure the finished policy on held-out general items."""
    switch = ("--show-batch", "print one packed row with the trained tokens marked, and exit")
    option = ("--base", None, "train the base alone, and put it into this folder in bfloat16")
    config, given = command_line(__doc__, [switch], [option])
    shown = "--show-batch" in given
    if "--base" in given and (config.model.path or not config.model.base_examples):
        raise SystemExit(
            "error: --base trains a base from scratch: config key `model.path` must be empty, and "
            "`model.base_examples` above 0; configs/base.yaml is such a config"
        )
    check_training(config, () if shown or config.pst.init_from else ("pst",))
    run = ranks.first(lambda: open_run(config))
    if shown:
        return show_batch(config, run)
    if ranks.rank() == 0:
        cut_tail(run / "metrics.jsonl")
        open_trackers(config, run)
    if "--base" in given:
        return write_base(config, run, ROOT / given["--base"])
    began = time.perf_counter()
    final = train_pst(config, run)
    device = set_up(config)
    ranks.first(lambda: ensure_data(config, run))
    tokenizer = load_tokenizer(config, run)
    model = load_policy(final, config, tokenizer, device)
    answers = partial(greedy_answers, model, tokenizer, device=device)
    heldout = read_jsonl(run / "data" / "general_heldout.jsonl")
    shares = general_exact_match(answers, tokenizer, heldout)
    log_reading(config, run, model, tokenizer, "pst")
    if ranks.rank() > 0:
        return
    seconds = round(time.perf_counter() - began, 1)
    cut_tail(run / "metrics.jsonl")
    drop_metrics(run, lambda record: "general_exact_match" in record)
    append_metrics(run, {"phase": "pst", "general_exact_match": shares, "seconds": seconds})
    said = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
    print(f"general exact match, greedy: {said}")
    print(f"finished policy: {final}")


if __name__ == "__main__":
    ranks.run(main)
