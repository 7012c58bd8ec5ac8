"""lib.sampler."""

import math

import torch
from tqdm import tqdm

from lib import ranks
from lib.policy import text_model
from lib.rollout import extend, go_on, open_rollouts
from lib.vision import model_inputs
from lib.vllm_engine import VllmEngine, play_in_vllm

# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


READ_ROWS = 32  # prompts or tool messages that the model reads at once


class SlotCache:
    """A static KV cache with a write position per row, in the form in which transformers' attention layers use a cache.

    Row r's token at position p lies in slot p + 1, whatever the other rows do: rows may be at different turns. Slot 0 takes
    the writes of padding and is never seen. Room is added 256 slots at a time.
    """

    def __init__(self, model, rows):
        c = model.config.get_text_config()
        shape = (
            rows,
            c.num_key_value_heads,
            256,
            getattr(c, "head_dim", c.hidden_size // c.num_attention_heads),
        )
        self.keys = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(c.num_hidden_layers)
        ]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.rows = self.slots = self.visible = None
        # Of a Qwen3-VL: rotary position minus position, of what comes after a row's pictures.
        self.shift = (
            torch.zeros(rows, 1, dtype=torch.long, device=model.device)
            if hasattr(model.base_model, "visual")
            else None
        )

    def aim(self, rows, positions, real):
        """Set what the next forward pass is about: its rows (b,) (None: all) and where they write; padding is not `real` (b, t).

        Returns the number of positions that attention sees.
        """
        self.rows, self.slots, self.visible = (
            rows,
            torch.where(real, positions + 1, 0),
            int(positions.max()) + 1,
        )
        if self.visible + 1 > self.keys[0].shape[2]:
            room = 256 * math.ceil((self.visible + 1 - self.keys[0].shape[2]) / 256)
            self.keys, self.values = (
                [torch.nn.functional.pad(x, (0, 0, 0, room)) for x in xs]
                for xs in (self.keys, self.values)
            )
        return self.visible

    def update(self, keys, values, layer, *args, **kwargs):
        """Write keys and values (b, heads, t, head_dim) of one layer; return all visible slots of the rows."""
        out = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            rows = (
                torch.arange(store.shape[0], device=store.device)
                if self.rows is None
                else self.rows
            )
            store[rows[:, None], :, self.slots] = new.transpose(1, 2)
            out.append((store if self.rows is None else store[rows])[:, :, 1 : self.visible + 1])
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
            store[target, :, 1 : length + 1] = store[source, :, 1 : length + 1]
        if self.shift is not None:
            self.shift[target] = self.shift[source]


def read_tokens(model, cache, rows, chunks, starts, pictures=()):
    """Feed new tokens of some rows and return the logits after the last one of each, (b, vocabulary).

    rows: cache rows (b,), or None for all of them; chunks: a token list a row, padded here, empty for a row that rests;
    starts: position of each chunk's first token; pictures: (place in `rows`, 0, pictures) of prompts with pictures.
    """
    device, longest = model.device, max(map(len, chunks))
    length = torch.tensor([len(c) for c in chunks], device=device)
    ids = torch.tensor([c + [0] * (longest - len(c)) for c in chunks], device=device)  # (b, t)
    steps = torch.arange(longest, device=device)
    real = steps < length[:, None]  # (b, t)
    positions = (torch.tensor(starts, device=device)[:, None] + steps) * real  # (b, t)
    visible = cache.aim(
        None if rows is None else torch.tensor(rows, device=device), positions, real
    )
    mask = torch.arange(visible, device=device) <= positions[:, :, None]  # (b, t, slots)
    read = {"input_ids": ids, "position_ids": positions}
    if cache.shift is not None:
        read = model_inputs(
            model, ids, positions, pictures, cache.shift if rows is None else cache.shift[rows]
        )
        if pictures:
            cache.shift[rows] = (read["position_ids"][1] - positions).gather(
                1, length[:, None] - 1
            )  # of the last token, which is text
    hidden = text_model(model)(
        **read, attention_mask=mask[:, None], past_key_values=cache, use_cache=True
    ).last_hidden_state  # (b, t, hidden)
    return model.lm_head(
        hidden[torch.arange(len(chunks), device=device), (length - 1).clamp(min=0)]
    ).float()


def sample_tokens(scores, generator):
    """One token a row from softmax(scores), (b, vocabulary) -> (b,): the full distribution, by inverting its running sum."""
    running = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(
        running,
        torch.rand(len(scores), 1, dtype=torch.double, generator=generator, device=scores.device)
        * running[:, -1:],
        right=True,
    )[:, 0].clamp(max=scores.shape[-1] - 1)


@torch.inference_mode()
def sample_rollouts(
    model, tokenizer, tasks, config, temperature, seed, group_size=1, progress=None
):
    """Play group_size episodes of each task in VisGenEnv with the policy `model`; returns Rollouts with their trajectories.

    Token in, token out: sampled ids are kept as they are and only new tool messages are encoded. All rows decode together;
    a row whose turn has ended rests until an eighth of the rows do, then their tool messages are read in one pass.
    temperature 0 is greedy. Sampling is from the full softmax: no top-p, top-k or min-p. vLLM: play_in_vllm.
    """
    rollouts, envs = open_rollouts(tokenizer, tasks, config, seed, group_size)
    bar = tqdm(
        total=len(rollouts),
        desc=progress,
        unit="rollout",
        leave=False,
        disable=progress is None,
        mininterval=1,
    )
    if isinstance(model, VllmEngine):
        return play_in_vllm(model, rollouts, envs, tokenizer, config, temperature, seed, bar)
    settings, device = config.rollout, model.device
    generator = torch.Generator(device=device).manual_seed(
        seed + ranks.rank()
    )  # environments depend on `seed` alone
    unread = {
        r: out.ids[:] for r, out in enumerate(rollouts)
    }  # rollout -> its last tokens, which the model has not read yet
    cache = SlotCache(model, len(rollouts))
    live = list(range(len(rollouts)))  # the rollout in each cache row; None once it has ended
    logits = torch.zeros(
        len(rollouts), model.config.get_text_config().vocab_size, device=device
    )  # of each cache row, after its last token

    # The prompts; a group's shared prompt is read once.
    group = [r for r in live if rollouts[r].group_id != rollouts[r - 1].group_id or r == 0]
    for part in (group[i : i + READ_ROWS] for i in range(0, len(group), READ_ROWS)):
        shown = [(i, 0, rollouts[r].pictures) for i, r in enumerate(part) if rollouts[r].pictures]
        logits[part] = read_tokens(
            model, cache, part, [unread[r] for r in part], [0] * len(part), shown
        )
    for r in live:
        if r % group_size:
            first = r - r % group_size
            cache.copy_row(first, r, len(unread[first]))
            logits[r] = logits[first]
    unread.clear()

    while any(r is not None for r in live):
        # Sample one token of every row that is not resting.
        rows = [i for i, r in enumerate(live) if r is not None and r not in unread]
        scores = logits[rows] / temperature if temperature else logits[rows]  # (b, vocabulary)
        tokens = sample_tokens(scores, generator) if temperature else scores.argmax(-1)
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
            logits = read_tokens(
                model, cache, None, chunks, starts
            )  # a resting row's are read before it samples
        if resting and (8 * len(resting) >= len(going) + len(resting)):
            for part in (resting[i : i + READ_ROWS] for i in range(0, len(resting), READ_ROWS)):
                chunks = [unread.pop(live[i]) for i in part]
                starts = [len(rollouts[live[i]].ids) - len(c) for i, c in zip(part, chunks)]
                logits[part] = read_tokens(model, cache, part, chunks, starts)
    bar.close()
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------
# Engine: the sampler's weights, its checks, evaluation
