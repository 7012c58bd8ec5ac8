"""Virtual Reinforcement Learning (Sec. 4.3): GRPO in VisGenEnv under LtrReward, from the PST policy.

One step: 24 tasks x 4 rollouts -> R_vrt of each -> advantages inside each group -> one update of the LoRA adapter (vrl.norm_lr: of the final norm too).
This file holds the sampler (batched, a static KV cache kept over turns), the GRPO loss as one pure function of tensors,
and the loop. On several GPUs (configs/ranks.py) each rank plays and trains its share of the tasks; all ranks take the same step.
Left out: asynchronous rollouts, several nodes, value networks; see the README for where to find those.

    python train_vrl.py --config configs/tiny.yaml                 # the whole paper at a small scale: data, PST, VRL
    python train_vrl.py --config configs/tiny.yaml vrl.steps=3 name=short
    python train_vrl.py --config configs/tiny.yaml --speed         # our sampler against transformers' generate
    accelerate launch --num_processes 8 train_vrl.py --config configs/qwen3vl-8b.yaml      # without GPUs: torchrun --nproc_per_node 2
"""

import json
import math
import resource
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from tqdm import tqdm

from configs import ranks
from configs.checkpoints import config_digest, list_checkpoints, read_checkpoint, restore, save_checkpoint, trained_parameters
from configs.experiment import ROOT, StopSwitch, append_metrics, command_line, draw, open_run, read_jsonl, write_atomic, write_jsonl
from configs.vllm_engine import VllmEngine
from data.figures import draw_curve, print_table, write_trajectory
from data.vision import pictures_of, place, show_pictures
from env import VisGenEnv, to_json
from make_data import ensure_data
from rewards import PARTS, ltr_rewards
from train_pst import (adamw, add_lora, base_folder, base_policy, base_weight, encode_prompt, encode_tool_messages, general_exact_match,
                       greedy_answers, load_policy, load_tokenizer, set_up, text_model, token_logprobs, train_pst, use_autocast, wants_nf4)

# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


@dataclass
class Rollout:
    """One episode, from the first token to its advantage."""

    task: dict
    group_id: int
    seed: int                                           # of the environment; a group shares it
    ids: list = field(default_factory=list)             # all tokens, as sampled or as encoded once
    loss_mask: list = field(default_factory=list)       # 1 on the agent's own tokens, end of turn included
    logprobs: list = field(default_factory=list)        # the sampler's, 0 where loss_mask is 0
    turn_start: int = 0                                 # where the current turn's tokens begin
    written: int = 0                                    # tokens of the agent's so far
    pictures: list = field(default_factory=list)        # the user's, in the prompt (data/vision.py)
    trajectory: dict = None
    reward: float = math.nan
    advantage: float = 0.0


def extend(rollout, tokens, trained, logprobs=None):
    """Append tokens to a rollout; ids, loss mask and log-probabilities grow by the same call."""
    rollout.ids += tokens
    rollout.loss_mask += [int(trained)] * len(tokens)
    rollout.logprobs += logprobs or [0.0] * len(tokens)
    if trained:
        rollout.written += len(tokens)
    else:
        rollout.turn_start = len(rollout.ids)


class SlotCache:
    """A static KV cache with a write position per row, in the form in which transformers' attention layers use a cache.

    Row r's token at position p lies in slot p + 1, whatever the other rows do: rows may be at different turns. Slot 0 takes
    the writes of padding and is never seen. Room is added 256 slots at a time.
    """

    def __init__(self, model, rows):
        c = model.config.get_text_config()
        shape = (rows, c.num_key_value_heads, 256, getattr(c, "head_dim", c.hidden_size // c.num_attention_heads))
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(c.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.rows = self.slots = self.visible = None
        # Of a Qwen3-VL: rotary position minus position, of what comes after a row's pictures.
        self.shift = torch.zeros(rows, 1, dtype=torch.long, device=model.device) if hasattr(model.base_model, "visual") else None

    def aim(self, rows, positions, real):
        """Set what the next forward pass is about: its rows (b,) (None: all) and where they write; padding is not `real` (b, t).

        Returns the number of positions that attention sees.
        """
        self.rows, self.slots, self.visible = rows, torch.where(real, positions + 1, 0), int(positions.max()) + 1
        if self.visible + 1 > self.keys[0].shape[2]:
            room = 256 * math.ceil((self.visible + 1 - self.keys[0].shape[2]) / 256)
            self.keys, self.values = ([torch.nn.functional.pad(x, (0, 0, 0, room)) for x in xs] for xs in (self.keys, self.values))
        return self.visible

    def update(self, keys, values, layer, *args, **kwargs):
        """Write keys and values (b, heads, t, head_dim) of one layer; return all visible slots of the rows."""
        out = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            rows = torch.arange(store.shape[0], device=store.device) if self.rows is None else self.rows
            store[rows[:, None], :, self.slots] = new.transpose(1, 2)
            out.append((store if self.rows is None else store[rows])[:, :, 1: self.visible + 1])
        return tuple(out)

    def get_seq_length(self, layer=0):
        """transformers asks for it to place tokens; positions are always given, so it does not matter."""
        return 0

    def keep(self, rows):
        """Drop all rows but these."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.shift = self.shift if self.shift is None else self.shift[rows]

    def copy_row(self, source, target, length):
        """Copy the first `length` positions of one row to another: a group's shared prompt is read once."""
        for store in self.keys + self.values:
            store[target, :, 1: length + 1] = store[source, :, 1: length + 1]
        if self.shift is not None:
            self.shift[target] = self.shift[source]


def read_tokens(model, cache, rows, chunks, starts, pictures=()):
    """Feed new tokens of some rows and return the logits after the last one of each, (b, vocabulary).

    rows: cache rows (b,), or None for all of them; chunks: a token list a row, padded here, empty for a row that rests;
    starts: position of each chunk's first token; pictures: (place in `rows`, 0, pictures) of prompts with pictures.
    """
    device, longest = model.device, max(map(len, chunks))
    length = torch.tensor([len(c) for c in chunks], device=device)
    ids = torch.tensor([c + [0] * (longest - len(c)) for c in chunks], device=device)                          # (b, t)
    steps = torch.arange(longest, device=device)
    real = steps < length[:, None]                                                                             # (b, t)
    positions = (torch.tensor(starts, device=device)[:, None] + steps) * real                                  # (b, t)
    visible = cache.aim(None if rows is None else torch.tensor(rows, device=device), positions, real)
    mask = torch.arange(visible, device=device) <= positions[:, :, None]                                       # (b, t, slots)
    read = {"input_ids": ids, "position_ids": positions}
    if cache.shift is not None:
        read = place(model, ids, positions, pictures, cache.shift if rows is None else cache.shift[rows])
        if pictures:
            cache.shift[rows] = (read["position_ids"][1] - positions).gather(1, length[:, None] - 1)      # of the last token, which is text
    hidden = text_model(model)(**read, attention_mask=mask[:, None], past_key_values=cache, use_cache=True).last_hidden_state   # (b, t, hidden)
    return model.lm_head(hidden[torch.arange(len(chunks), device=device), (length - 1).clamp(min=0)]).float()


def draw_tokens(scores, generator):
    """One token a row from softmax(scores), (b, vocabulary) -> (b,): the full distribution, by inverting its running sum."""
    running = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(running, torch.rand(len(scores), 1, dtype=torch.double, generator=generator, device=scores.device)
                              * running[:, -1:], right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def open_rollouts(tokenizer, tasks, config, seed, group_size):
    """group_size Rollouts of each task, with their prompts, and their environments: a group shares prompt and environment seed."""
    rollouts, envs = [], []
    for group_id, task in enumerate(tasks):
        env_seed = draw(seed, "env", task["id"]).getrandbits(31)
        for _ in range(group_size):
            rollouts.append(Rollout(task, group_id, env_seed))
            envs.append(VisGenEnv(config.rollout))
            messages, info = envs[-1].reset(task, env_seed)
            messages = show_pictures(tokenizer, task, messages)
            rollouts[-1].pictures = pictures_of(messages)
            if rollouts[-1].pictures and config.rollout.engine == "vllm":
                raise SystemExit(f"error: task {task['id']} has a picture for the policy, and vLLM is given none here; set rollout.engine=transformers")
            prompt = encode_prompt(tokenizer, messages, info["tools"])
            if len(prompt) >= config.model.max_len // 2:
                raise SystemExit(f"error: task {task['id']}: its prompt has {len(prompt)} tokens, half of model.max_len {config.model.max_len} or more; "
                                 "raise model.max_len, or shorten the prompt by `rollout.tools: names`")
            extend(rollouts[-1], prompt, trained=False)
    return rollouts, envs


def go_on(rollout, env, tokenizer, config):
    """After a sampled token: the environment replies if it ended a turn. Returns the ids of the reply, [] inside a turn, None at the episode's end."""
    token, reply, ended, settings = rollout.ids[-1], [], None, config.rollout
    if token == tokenizer.eos_token_id:
        messages, _, terminated, truncated, _ = env.step(tokenizer.decode(rollout.ids[rollout.turn_start:-1]))
        if terminated or truncated:
            ended = env.ended
        else:
            reply = encode_tool_messages(tokenizer, messages)
            extend(rollout, reply, trained=False)
    elif token >= len(tokenizer):        # a padded row of the vocabulary, which no text has
        ended = "malformed"
    elif len(rollout.ids) - rollout.turn_start >= settings.max_turn_tokens:
        ended = "max_tokens"
    if not ended and (len(rollout.ids) >= config.model.max_len or 0 < settings.max_rollout_tokens <= rollout.written):
        ended = "max_tokens"
    if ended:
        close(rollout, env, ended)
    return None if ended else reply


def close(rollout, env, ended):
    """End an episode. One that was cut here ends as `ended`: the environment has not seen its unfinished turn."""
    env.ended = env.ended or ended
    rollout.trajectory = {**env.trajectory(), "pool": env.pool}


@torch.inference_mode()
def sample_rollouts(model, tokenizer, tasks, config, temperature, seed, group_size=1, progress=None):
    """Play group_size episodes of each task in VisGenEnv with the policy `model`; returns Rollouts with their trajectories.

    Token in, token out: sampled ids are kept as they are and only new tool messages are encoded. All rows decode together;
    a row whose turn has ended rests until an eighth of the rows do, then their tool messages are read in one pass.
    temperature 0 is greedy. Sampling is from the full softmax: no top-p, top-k or min-p. vLLM: play_in_vllm.
    """
    rollouts, envs = open_rollouts(tokenizer, tasks, config, seed, group_size)
    bar = tqdm(total=len(rollouts), desc=progress, unit="rollout", leave=False, disable=progress is None, mininterval=1)
    if isinstance(model, VllmEngine):
        return play_in_vllm(model, rollouts, envs, tokenizer, config, temperature, seed, bar)
    settings, device = config.rollout, model.device
    generator = torch.Generator(device=device).manual_seed(seed + ranks.rank())      # environments depend on `seed` alone
    unread = {r: out.ids[:] for r, out in enumerate(rollouts)}      # rollout -> its last tokens, which the model has not read yet
    cache = SlotCache(model, len(rollouts))
    live = list(range(len(rollouts)))        # the rollout in each cache row; None once it has ended
    logits = torch.zeros(len(rollouts), model.config.get_text_config().vocab_size, device=device)      # of each cache row, after its last token

    # The prompts; a group's shared prompt is read once.
    group = [r for r in live if rollouts[r].group_id != rollouts[r - 1].group_id or r == 0]
    for part in (group[i:i + settings.read_rows] for i in range(0, len(group), settings.read_rows)):
        shown = [(i, 0, rollouts[r].pictures) for i, r in enumerate(part) if rollouts[r].pictures]
        logits[part] = read_tokens(model, cache, part, [unread[r] for r in part], [0] * len(part), shown)
    for r in live:
        if r % group_size:
            first = r - r % group_size
            cache.copy_row(first, r, len(unread[first]))
            logits[r] = logits[first]
    unread.clear()

    while any(r is not None for r in live):
        # Sample one token of every row that is not resting.
        rows = [i for i, r in enumerate(live) if r is not None and r not in unread]
        scores = logits[rows] / temperature if temperature else logits[rows]                                    # (b, vocabulary)
        tokens = draw_tokens(scores, generator) if temperature else scores.argmax(-1)
        logprobs = scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
        for i, token, logprob in zip(rows, tokens.tolist(), logprobs):
            r = live[i]
            extend(rollouts[r], [token], trained=True, logprobs=[logprob])
            reply = go_on(rollouts[r], envs[r], tokenizer, config)
            if reply is None:
                live[i] = None
                bar.update()
            else:
                unread[r] = [token, *reply]
        # Read the sampled token of every row whose turn goes on; ended turns rest, with their tool messages, until enough do.
        if len(live) > 8 and sum(r is not None for r in live) <= 0.9 * len(live):
            kept = [i for i, r in enumerate(live) if r is not None]
            cache.keep(kept)
            logits, live = logits[kept], [live[i] for i in kept]
        resting = [i for i, r in enumerate(live) if r is not None and len(unread[r]) > 1]
        going = {i for i, r in enumerate(live) if r is not None and len(unread[r]) == 1}
        if going:
            # All rows go in, the resting ones empty: a row of padding costs less than gathering the others' cache.
            chunks = [unread.pop(r) if i in going else [] for i, r in enumerate(live)]
            starts = [len(rollouts[r].ids) - 1 if r is not None else 0 for r in live]
            logits = read_tokens(model, cache, None, chunks, starts)      # a resting row's are read before it samples
        if resting and (8 * len(resting) >= len(going) + len(resting)):
            for part in (resting[i:i + settings.read_rows] for i in range(0, len(resting), settings.read_rows)):
                chunks = [unread.pop(live[i]) for i in part]
                starts = [len(rollouts[live[i]].ids) - len(c) for i, c in zip(part, chunks)]
                logits[part] = read_tokens(model, cache, part, chunks, starts)
    bar.close()
    return rollouts


def play_in_vllm(engine, rollouts, envs, tokenizer, config, temperature, seed, bar):
    """Continuous batching over turns: the moment a turn ends, the environment replies and the next turn is queued; nobody waits for the others.

    Seeds are of the rollout and turn, so what one samples does not depend on the others (but for rounding, in bfloat16).
    """
    settings, members, turns = config.rollout, Counter(), Counter()
    names = []
    for out in rollouts:
        names.append((out.task["id"], members[out.group_id]))
        members[out.group_id] += 1

    def queue(r):
        out = rollouts[r]
        room = min(settings.max_turn_tokens, config.model.max_len - len(out.ids),
                   settings.max_rollout_tokens - out.written if settings.max_rollout_tokens else math.inf)
        engine.submit(f"{r}-{turns[r]}", out.ids, room, temperature, draw(seed, *names[r], turns[r]).getrandbits(31), tokenizer.eos_token_id)
        turns[r] += 1

    for r in range(len(rollouts)):
        queue(r)
    end = time.time() + (settings.deadline_s or math.inf)
    while engine.engine.has_unfinished_requests():
        for name, tokens, logprobs in engine.step():
            r = int(name.split("-")[0])
            cut = next((i for i, t in enumerate(tokens, 1) if t >= len(tokenizer)), None)      # a padded row of the vocabulary ends the episode
            extend(rollouts[r], tokens[:cut], trained=True, logprobs=logprobs[:cut])
            if go_on(rollouts[r], envs[r], tokenizer, config) is None:
                bar.update()
            else:
                queue(r)
        if time.time() > end:
            late = [r for r, out in enumerate(rollouts) if out.trajectory is None]
            engine.engine.abort_request([f"{r}-{turns[r] - 1}" for r in late])
            for r in late:
                close(rollouts[r], envs[r], "max_tokens")
    bar.close()
    return rollouts


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
    advantages, counts = [0.0] * len(rewards), Counter(groups=len(set(group_ids)), unscored=sum(map(math.isnan, rewards)))
    for rows in members.values():
        values = [rewards[i] for i in rows]
        if max(values) - min(values) <= flat:
            counts["flat"] += 1
            counts["flat_good"] += values[0] > 0.95
            continue
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if how == "mean_std" else 1.0
        for i in rows:
            advantages[i] = (rewards[i] - mean) / std
    return advantages, counts


def grpo_loss(logprobs, old_logprobs, advantages, loss_mask, config, normalizer, ref_logprobs=None, sampler_logprobs=None):
    """The clipped policy-gradient loss of one micro-batch, and sums for the metrics.

    logprobs, old_logprobs, ref_logprobs, sampler_logprobs, loss_mask: (B, T); advantages: (B,); normalizer: loss tokens
    (loss_mean token) or sequences (sequence) of the WHOLE optimizer step over all ranks, so that micro-batch losses add up.

        L = - sum_t w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) / normalizer + kl_coef KL,   r_t = pi / pi_old
    """
    mask = loss_mask.to(logprobs.dtype)
    log_ratio = (logprobs - old_logprobs) * mask
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    if config.ratio == "sequence":      # GSPO 2507.18071: one length-normalised ratio a sequence, its gradient spread over the tokens
        whole = log_ratio.sum(-1, keepdim=True) / length
        log_ratio = (whole.detach() + logprobs - logprobs.detach()) * mask
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])                            # (B, T)
    if config.tis_cap and sampler_logprobs is not None:      # the sampler's kernels differ from the trainer's: truncated importance weight
        gain = gain * (old_logprobs - sampler_logprobs).exp().clamp(max=config.tis_cap).detach()
    per_token = -gain
    if ref_logprobs is not None:        # Theorem 4.1's action bias: KL(pi || pi_pst), the k3 estimate
        gap = (ref_logprobs - logprobs) * mask
        kl = gap.exp() - gap - 1
        per_token = per_token + config.kl_coef * kl
    weight = mask / length if config.loss_mean == "sequence" else mask
    loss = (per_token * weight).sum() / normalizer
    with torch.no_grad():
        sums = {"ratio": (ratio * mask).sum(), "clipped": ((ratio != clipped) * mask).sum(), "tokens": mask.sum()}
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
        return torch.tensor([getattr(r, name) + [0] * (longest - len(r.ids)) for r in rollouts], dtype=dtype, device=device)

    return {"input_ids": stack("ids", torch.long), "loss_mask": stack("loss_mask", torch.bool),                # (B, T)
            "sampler_logprobs": stack("logprobs", torch.float32)[:, 1:],                                        # (B, T - 1)
            "position_ids": torch.arange(longest, device=device).expand(len(rollouts), -1),
            "advantages": torch.tensor([r.advantage for r in rollouts], dtype=torch.float32, device=device),   # (B,)
            "pictures": [(i, 0, r.pictures) for i, r in enumerate(rollouts) if r.pictures]}


def batch_logprobs(model, batch, config, temperature=1.0):
    """Trainer log-probabilities of the agent's tokens, (B, T - 1), and their mean entropy."""
    return token_logprobs(model, batch["input_ids"], batch["position_ids"], batch["loss_mask"][:, 1:], temperature=temperature,
                          autocast=use_autocast(config, batch["input_ids"].device), entropy=True, pictures=batch["pictures"])


def update(policy, optimizer, rollouts, config):
    """GRPO update on the rollouts that carry signal. Returns metrics; every normaliser is counted over the whole step first.

    Every rank has all rollouts of the step, reads its share of each minibatch, and takes the same optimizer steps.
    """
    v, device = config.vrl, next(policy.parameters()).device
    trained = [r for r in rollouts if r.advantage and not (v.mask_truncated and r.trajectory["ended"] in ("max_tokens", "max_turns"))]
    sums, grad_norm, gaps = Counter(), 0.0, []
    with_ref, with_old = v.kl_coef > 0, v.minibatches > 1
    order = draw(config.seed, "minibatches", len(trained)).sample(trained, len(trained))
    size = math.ceil(len(order) / v.minibatches) or 1
    minis = [sorted(order[i:i + size], key=lambda r: len(r.ids), reverse=True) for i in range(0, len(order), size)]
    mine = {id(r) for mini in minis for r in ranks.share(mini)}      # by length, so that ranks have about as much to read
    known = {}
    if with_ref or with_old:      # pi_pst and pi_old once, before the first optimizer step changes the policy
        with torch.no_grad():
            for rows in micro_batches([r for r in trained if id(r) in mine], v.micro_tokens):
                batch = collate(rows, device)
                old = batch_logprobs(policy, batch, config, config.rollout.temperature)[0] if with_old else None
                ref = None
                if with_ref:
                    with policy.disable_adapter():
                        ref = batch_logprobs(policy, batch, config, config.rollout.temperature)[0]
                for i, r in enumerate(rows):
                    known[id(r)] = [x[i, : len(r.ids) - 1] if x is not None else None for x in (old, ref)]
    for mini in minis:
        normalizer = sum(sum(r.loss_mask) for r in mini) if v.loss_mean == "token" else len(mini)
        for rows in micro_batches(ranks.share(mini), v.micro_tokens):
            batch = collate(rows, device)
            logprobs, entropy = batch_logprobs(policy, batch, config, config.rollout.temperature)
            fill = [torch.nn.utils.rnn.pad_sequence([known[id(r)][k] for r in rows], batch_first=True) if wanted else None
                    for k, wanted in ((0, with_old), (1, with_ref))]
            # One update on fresh rollouts: pi_old is this very pi, the ratio is 1 and its gradient is not 0.
            old = fill[0] if with_old else logprobs.detach()
            mask = batch["loss_mask"][:, 1:]
            loss, some = grpo_loss(logprobs, old, batch["advantages"], mask, v, normalizer, fill[1],
                                   batch["sampler_logprobs"] if config.rollout.engine == "vllm" else None)
            loss.backward()
            sums.update({k: float(x) for k, x in some.items()})
            gaps.append((logprobs.detach() - batch["sampler_logprobs"])[mask].abs().cpu())
            sums.update(loss=float(loss.detach()), entropy=float((entropy * mask).sum()), read=batch["input_ids"].numel())
        ranks.sum_gradients(trained_parameters(policy).values())
        grad_norm = float(torch.nn.utils.clip_grad_norm_(trained_parameters(policy).values(), v.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise SystemExit(f"error: the gradient norm of the GRPO update is {grad_norm} (loss {ranks.total(sums['loss'])}); "
                             "the last checkpoint is whole; lower `vrl.lr`, or set model.autocast=false")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    every = ranks.gather([sums])
    sums = {k: sum(s[k] for s in every) for k in ("loss", "ratio", "clipped", "entropy", "kl", "tokens", "read")}
    tokens, gap = sums["tokens"] or 1, torch.cat(ranks.gather(gaps) or [torch.zeros(1)])      # gap: sampler against trainer, nats, every token
    return {"loss": sums["loss"], "grad_norm": grad_norm, "ratio": sums["ratio"] / tokens, "clipped": sums["clipped"] / tokens,
            "entropy": sums["entropy"] / tokens, "kl": sums["kl"] / tokens if with_ref else None, "gap_mean": float(gap.mean()),
            "gap_p99": float(gap.quantile(0.99)), "gap_max": float(gap.max()), "trained": len(trained), "loss_tokens": int(sums["tokens"]), "read_tokens": int(sums["read"])}


# ---------------------------------------------------------------------------------------------------------------------
# Engine: the sampler's weights, its checks, evaluation


def sync_sampler(sampler, policy):
    """Give the sampler the policy's weights: a fresh fp32 merge of base and adapter, never undone in place; vLLM gets the adapter alone."""
    if isinstance(sampler, VllmEngine):
        return sampler.take_adapter(policy)
    plain = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    target = dict(sampler.named_parameters())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if hasattr(module, "get_delta_weight"):
                target[name + ".weight"].copy_(base_weight(module.base_layer) + module.get_delta_weight("default"))
        for name, p in plain.named_parameters():
            if not any(part in name for part in (".base_layer.", "lora_", ".original_module.")):
                target[name.replace(".modules_to_save.default", "")].copy_(p)


def check_engine(sampler, policy, tokenizer, task, config, turns=0):
    """Sampler and trainer agree on a fixed prompt: the largest difference of log-probabilities (outside float32 its 99th percentile), in nats.

    SystemExit above rollout.max_gap. turns: play that many short turns instead of the whole episode, for a check after every sync.
    """
    short = replace(config, rollout=replace(config.rollout, max_turns=turns, max_turn_tokens=min(64, config.rollout.max_turn_tokens))) if turns else config
    rollout = sample_rollouts(sampler, tokenizer, [task], short, 1.0, seed=0)[0]
    batch = collate([rollout], next(policy.parameters()).device)
    exact = policy.dtype == torch.float32 and getattr(sampler, "exact", True)      # elsewhere kernels differ by rounding
    threshold = config.rollout.max_gap or (1e-4 if exact else 1.0)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy, batch["input_ids"], batch["position_ids"], batch["loss_mask"][:, 1:], entropy=True,
                                     pictures=batch["pictures"])
    gaps = (logprobs - batch["sampler_logprobs"])[batch["loss_mask"][:, 1:]].abs()
    gap = float(gaps.max() if exact else gaps.quantile(0.99))      # in 16 bits the rarest of many sampled tokens may be far off by rounding
    if not gap <= threshold:
        raise SystemExit(f"error: sampler and trainer disagree on {sum(rollout.loss_mask)} tokens of a fixed prompt: {'largest' if exact else '99th percentile of the'}"
                         f" difference of log-probabilities {gap:.2e}, allowed {threshold:.0e}; the sampler does not hold the policy's weights")
    return gap


def check_reference(policy, tokenizer, task, config, sampler):
    """KL to pi_pst (adapter off) is 0 before the first step. SystemExit with the number otherwise."""
    batch = collate(sample_rollouts(sampler, tokenizer, [task], config, 1.0, seed=0), next(policy.parameters()).device)
    with torch.no_grad():
        now = batch_logprobs(policy, batch, config)[0]
        with policy.disable_adapter():
            ref = batch_logprobs(policy, batch, config)[0]
    kl = float(((ref - now).exp() - (ref - now) - 1).sum())
    if kl != 0.0:
        raise SystemExit(f"error: KL to the PST policy is {kl:.2e} at step 0, it must be 0: the adapter does not start at zero")


def score(rollouts, config):
    """Fill in LtrReward (Sec. 4.3.2) of finished rollouts."""
    rewards = ltr_rewards([r.trajectory for r in rollouts], config.reward, [r.trajectory["pool"] for r in rollouts])
    for r, reward in zip(rollouts, rewards):
        r.trajectory["reward"], r.reward = reward, reward["total"]


def play_share(model, tokenizer, tasks, config, temperature, seed, group_size=1, progress=None):
    """sample_rollouts of this rank's share of `tasks`; group_id is a task's place in `tasks`."""
    mine = ranks.share(range(len(tasks)))
    rollouts = sample_rollouts(model, tokenizer, [tasks[i] for i in mine], config, temperature, seed=seed, group_size=group_size,
                               progress=None if ranks.rank() else progress) if mine else []
    for r in rollouts:
        r.group_id = mine[r.group_id]
    return rollouts


def gather_rollouts(rollouts):
    """The rollouts of all ranks, in the order of tasks, on every rank."""
    return sorted(ranks.gather(rollouts), key=lambda r: r.group_id)


def mean(values):
    """Mean of what is there: None and NaN are left out; None for nothing."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    return sum(values) / len(values) if values else None


def summary(rollouts):
    """Mean R_vrt, its parts, and how episodes ended."""
    rewards = [r.trajectory["reward"] for r in rollouts]
    return {"reward": mean(w["total"] for w in rewards), **{k: mean(w[k] for w in rewards) for k in ("plan", "fine", *PARTS)},
            "strict": mean(float(w["total"] > 0.99) for w in rewards if not math.isnan(w["total"])),
            "ended": dict(Counter(r.trajectory["ended"] for r in rollouts)),
            "tokens": mean(len(r.ids) for r in rollouts), "turns": mean(len(r.trajectory["turns"]) for r in rollouts)}


def evaluate(model, tokenizer, tasks, config, run, progress="held-out"):
    """Held-out R_vrt with its parts, greedy and sampled, and general exact match. Returns (figures, greedy rollouts)."""
    out, kept = {}, None
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        if name == "greedy" or config.bench.sampled:
            rollouts = play_share(model, tokenizer, tasks, config, temperature, seed=config.seed, progress=f"{progress}, {name}")
            score(rollouts, config)
            rollouts = gather_rollouts(rollouts)
            out[name], kept = summary(rollouts), kept or rollouts
    greedy = model.answers if isinstance(model, VllmEngine) else partial(greedy_answers, model, device=model.device)
    out["general"] = general_exact_match(partial(greedy, tokenizer), tokenizer, read_jsonl(run / "data" / "general_heldout.jsonl"))
    return out, kept


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def step_tasks(tasks, config, step):
    """The tasks of one step: the training tasks in a seeded order, a new order each time round."""
    n, orders, picked = config.vrl.tasks_per_step, {}, []
    for i in range(step * n, (step + 1) * n):
        turn, at = divmod(i, len(tasks))
        if turn not in orders:
            orders[turn] = draw(config.seed, "vrl tasks", turn).sample(range(len(tasks)), len(tasks))
        picked.append(tasks[orders[turn][at]])
    return picked


def part_spread(rollouts):
    """Mean over groups of each reward part's variance inside the group: a part that is equal over the group teaches nothing."""
    groups = defaultdict(list)
    for r in rollouts:
        groups[r.group_id].append(r.trajectory["reward"])
    spread = {}
    for part in ("total", "plan", *PARTS):
        values = [[w[part] for w in g if w[part] is not None and not math.isnan(w[part])] for g in groups.values()]
        spread[f"var_{part}"] = mean(sum((x - sum(v) / len(v)) ** 2 for x in v) / len(v) for v in values if v)
    return spread


def learning_rate(v, step):
    """Share of the peak learning rate at step `step` (from 0): a linear rise over `warmup` steps, 1, a linear fall over the last `cooldown`.

    >>> from configs.experiment import VrlConfig
    >>> [learning_rate(VrlConfig(steps=6, warmup=2, cooldown=4), step) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / max(1, v.warmup), (v.steps - step) / max(1, v.cooldown))


def make_optimizer(policy, v):
    """AdamW (`vrl.optimizer`) on the adapter (or all weights) at `lr` and, where it is trained beside the adapter, on the final norm at `norm_lr`."""
    named = trained_parameters(policy)
    norm = {n for n in named if ".modules_to_save." in n}
    groups = [{"names": names, "params": [named[n] for n in names], "peak": peak}
              for names, peak in (([n for n in named if n not in norm], v.lr), (sorted(norm), v.norm_lr)) if names]
    return adamw(v.optimizer, groups, lr=v.lr, betas=(0.9, v.beta2), weight_decay=v.weight_decay)


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
    print(f"VRL: steps {first} to {v.steps}, {v.tasks_per_step} tasks x {v.group_size} rollouts = {v.tasks_per_step * v.group_size} a step", flush=True)
    bar = tqdm(range(first, v.steps), initial=first, total=v.steps, desc="VRL", unit="step", mininterval=1, disable=ranks.rank() > 0)
    for step in bar:
        start = time.time()
        rollouts = play_share(sampler, tokenizer, step_tasks(tasks, config, step), config, config.rollout.temperature,
                              seed=draw(config.seed, "rollouts", step).getrandbits(31), group_size=v.group_size)
        ranks.barrier()
        sampled = time.time()
        if vllm:
            sampler.sleep()
        score(rollouts, config)
        rollouts = gather_rollouts(rollouts)
        advantages, groups = group_advantages([r.reward for r in rollouts], [r.group_id for r in rollouts], v.advantage)
        for r, a in zip(rollouts, advantages):
            r.advantage = a
        scored = time.time()
        for g in optimizer.param_groups:
            g["lr"] = g["peak"] * learning_rate(v, step)
        figures = update(policy, optimizer, rollouts, config)
        if vllm:
            sampler.wake()
        if figures["trained"] or not vllm:      # without signal nothing changed; vLLM's engine holds a sync without a change for a fault
            sync_sampler(sampler, policy)
        if vllm:
            figures |= {"sync_gap": check_engine(sampler, policy, tokenizer, tasks[0], config, turns=1), "prompt_cached": sampler.cached_share()}
        updated = time.time()
        new = sum(sum(r.loss_mask) for r in rollouts)
        now = summary(rollouts)
        record = {"phase": "vrl", "step": step + 1, **now, **figures, "groups": dict(groups), **part_spread(rollouts),
                  "lr": optimizer.param_groups[0]["lr"], "sampled_tokens": new, "sample_tok_s": round(new / (sampled - start)),
                  "update_tok_s": round(figures["read_tokens"] / (updated - scored)), "sample_s": round(sampled - start, 2),
                  "update_s": round(updated - scored, 2), "step_s": round(time.time() - start, 2)}
        cut = sum(now["ended"].get(k, 0) for k in ("max_tokens", "max_turns")) / len(rollouts)
        if cut > 0.2 and ranks.rank() == 0:
            tqdm.write(f"warning: step {step + 1}: {cut:.0%} of the rollouts hit a limit; raise rollout.max_turn_tokens, rollout.max_turns or model.max_len")
        if ranks.rank() == 0:
            append_metrics(run, record)
            write_jsonl(run / "vrl" / "rollouts" / f"step-{step + 1}.jsonl", [{**r.trajectory, "advantage": r.advantage} for r in rollouts])
        ranks.barrier()      # what rank 0 writes is there before any rank ends the run
        if groups["unscored"] > config.reward.llm.max_failures * max(20, len(rollouts)):
            raise SystemExit(f"error: the judge failed on {groups['unscored']} of {len(rollouts)} rollouts of step {step + 1}, config key "
                             f"`reward.llm.max_failures` allows {config.reward.llm.max_failures:.0%}; "
                             f"they stand in {run / 'vrl' / 'rollouts' / f'step-{step + 1}.jsonl'} with reward NaN")
        bar.set_postfix_str(f"R_vrt {now['reward']:.3f} plan {now['plan']:.2f} fine {now['fine']:.2f} flat {groups['flat']}/{groups['groups']} "
                            f"{record['sample_tok_s']} tok/s")
        stopped = bool(ranks.total(stop is not None and stop.on))      # Ctrl-C may reach one rank a step later than another
        if (step + 1) % v.save_every == 0 or step + 1 == v.steps or stopped:
            save_checkpoint(run / "vrl" / f"step-{step + 1}", policy, [optimizer], {"step": step + 1, "config": config_digest(config)}, keep=v.keep)
        if stopped:
            bar.close()
            print(f"stopped: VRL is saved at step {step + 1} of {v.steps}; the same command goes on from there")
            raise SystemExit(130)


def generate_rollouts(model, tokenizer, tasks, config):
    """The same greedy episodes with transformers' `generate`, which reads every history again at every turn. For --speed only."""
    envs, histories, prompts = [], [], []
    for task in tasks:
        envs.append(VisGenEnv(config.rollout))
        messages, info = envs[-1].reset(task, draw(0, "env", task["id"]).getrandbits(31))
        histories.append(encode_prompt(tokenizer, messages, info["tools"]))
        prompts.append(len(histories[-1]))
    sampled, live = 0, list(range(len(tasks)))
    while live:
        width, device = max(len(histories[r]) for r in live), model.device
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(histories[r])) + histories[r] for r in live], device=device)  # (b, width)
        mask = torch.tensor([[0] * (width - len(histories[r])) + [1] * len(histories[r]) for r in live], device=device)
        new = model.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                             max_new_tokens=config.rollout.max_turn_tokens)[:, width:].tolist()
        going = []
        for r, tokens in zip(live, new):
            turn = tokens[: tokens.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in tokens else tokens
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
    sample_rollouts(model, tokenizer, tasks[:4], config, 0.0, seed=0)       # first calls are slow
    start = time.time()
    ours = sample_rollouts(model, tokenizer, tasks, config, 0.0, seed=0)
    middle = time.time()
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")                                     # generate as it comes, with transformers' own attention
    histories, theirs = generate_rollouts(model, tokenizer, tasks, config)
    end = time.time()
    model.set_attn_implementation(attention)
    sampled, turns = sum(sum(r.loss_mask) for r in ours), mean(len(r.trajectory["turns"]) for r in ours)
    same = sum(r.ids == h for r, h in zip(ours, histories))
    print(f"{len(tasks)} trajectories, {turns:.1f} turns and {mean(len(r.ids) for r in ours):.0f} tokens each, greedy, "
          f"{torch.get_num_threads()} threads; {same} of {len(tasks)} token for token the same\n"
          f"ours                   {sampled:7} tokens  {middle - start:6.1f} s  {sampled / (middle - start):7.0f} tokens/s\n"
          f"transformers generate  {theirs:7} tokens  {end - middle:6.1f} s  {theirs / (end - middle):7.0f} tokens/s\n"
          f"ratio {sampled / (middle - start) * (end - middle) / theirs:.1f}")


def cached_evaluation(path, compute):
    """Read an evaluation that is already there, or compute it and write it (figures, one trajectory). All ranks call it."""
    if ranks.agreed(path.is_file()):
        return json.loads(path.read_text(encoding="utf-8"))
    result = compute()
    if ranks.rank() == 0:
        write_atomic(path, to_json(result))
    return result


def main():
    """Data, PST, VRL, evaluation: whatever is not there yet, in order."""
    from configs.plan import OPTIONS, SWITCH, asked_for_plan

    config, switches = command_line(__doc__, [("--speed", "measure our sampler against transformers' generate, then stop"), SWITCH], OPTIONS)
    if asked_for_plan(config, switches):
        return
    if config.vrl.tune == "full" and config.vrl.kl_coef:
        raise SystemExit("error: vrl.kl_coef needs the adapter (pi_pst is the policy with the adapter off); set vrl.tune=lora or vrl.kl_coef=0")
    if config.vrl.tune == "full" and config.vrl.norm_lr:
        raise SystemExit("error: vrl.norm_lr is of the norm beside an adapter; with vrl.tune=full it is trained at vrl.lr: set vrl.norm_lr=0")
    if config.rollout.engine == "vllm" and (config.vrl.tune == "full" or config.vrl.norm_lr):
        raise SystemExit("error: vLLM is given the LoRA adapter alone: with rollout.engine=vllm set vrl.tune=lora and vrl.norm_lr=0")
    if config.rollout.temperature <= 0:
        raise SystemExit(f"error: rollout.temperature is {config.rollout.temperature}; training samples, so it must be above 0")
    began, run, quantize = time.time(), ranks.first(lambda: open_run(config)), wants_nf4(config, "vrl")
    device = set_up(config)
    ranks.first(lambda: ensure_data(config, run))
    final = train_pst(config, run) if config.vrl.start == "pst" else None
    tokenizer = load_tokenizer(config, run)
    load = lambda *nf4: (load_policy(final, config, tokenizer, device, *nf4) if config.vrl.start == "pst"      # noqa: E731
                         else base_policy(config, run, tokenizer, device, *nf4))
    if config.rollout.engine == "vllm":      # first, since it takes its share of the card's memory as it finds it
        folder = final or config.model.path or base_folder(config, run, tokenizer, device)
        sampler = VllmEngine(folder, config, device, bf16=use_autocast(config, device))
    else:
        sampler = load().float().eval().requires_grad_(False)
    if "--speed" in switches:
        return compare_speed(sampler, tokenizer, read_jsonl(run / "data" / "train.jsonl"), config)
    policy = add_lora(config, load(quantize), norm=config.vrl.norm_lr > 0) if config.vrl.tune == "lora" else load()
    policy.train()      # without it model.gradient_checkpointing does nothing; there is no dropout to switch on
    heldout = read_jsonl(run / "data" / "heldout.jsonl")[: config.bench.tasks]
    gap = check_engine(sampler, policy, tokenizer, heldout[0], config)
    if config.vrl.tune == "lora":
        check_reference(policy, tokenizer, heldout[0], config, sampler)
    every, trained = sum(p.numel() for p in policy.parameters()), sum(p.numel() for p in trained_parameters(policy).values())
    print(f"policy: {every:,} parameters, {trained:,} of them trained; sampler against trainer {gap:.1e} nats")

    def measure(step):
        figures, rollouts = evaluate(sampler, tokenizer, heldout, config, run, "held-out after VRL" if step else "held-out before VRL")
        if ranks.rank() == 0:
            append_metrics(run, {"phase": "eval", "step": step, **figures})
        return {**figures, "example": max(rollouts, key=lambda r: (r.reward, len(r.trajectory["calls"]))).trajectory}

    before = cached_evaluation(run / "vrl" / "before.json", lambda: measure(0))
    with StopSwitch() as stop:
        train(config, run, policy, sampler, tokenizer, read_jsonl(run / "data" / "train.jsonl"), stop)
    after_gap = check_engine(sampler, policy, tokenizer, heldout[0], config)
    after = cached_evaluation(run / "vrl" / "after.json", lambda: measure(config.vrl.steps))
    if ranks.rank():
        return
    draw_curve(run)
    write_trajectory(after["example"], run / "trajectory.txt")
    print_table(before, after)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nsampler against trainer after the last sync {after_gap:.1e} nats; {time.time() - began:.0f} s, peak memory {peak:.1f} GiB")
    print(f"curve:      {(run / 'curve.png').relative_to(ROOT)}\ntrajectory: {(run / 'trajectory.txt').relative_to(ROOT)}")


if __name__ == "__main__":
    ranks.run(main)
