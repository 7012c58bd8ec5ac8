"""Our own sampler: multi-turn rollouts of VisGenEnv, played side by side with the policy in torch.

All rollouts decode together, one token a pass, and keep their keys and values over all turns. vLLM
(lib/vllm_engine.py) is the faster way on a GPU; `sample_rollouts` calls whichever it is given.
"""

import math
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from env import VisGenEnv
from lib import ranks
from lib.experiment import Config
from lib.policy import text_model
from lib.rollout import Rollout, extend, go_on, open_rollouts
from lib.vision import model_inputs
from lib.vllm_engine import VllmEngine, play_in_vllm

# Prompts, or tool messages, that the model reads at once.
READ_LANES = 32
# Positions by which the KV cache grows.
ROOM = 256


@torch.inference_mode()
def sample_rollouts(
    model: torch.nn.Module | VllmEngine,
    tokenizer,
    tasks: list[dict],
    config: Config,
    temperature: float,
    seed: int,
    group_size: int = 1,
    progress: str | None = None,
) -> list[Rollout]:
    """Play group_size episodes of each task in VisGenEnv; Rollouts with their trajectories.

    Token in, token out: sampled ids are kept as they are and only new tool messages are encoded.
    temperature 0 is greedy. Sampling is from the full softmax: no top-p, top-k or min-p. `progress`
    is the label of a progress bar; None shows none.
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
    sampler = BatchSampler(model, tokenizer, rollouts, envs, config, temperature, seed)
    sampler.read_prompts()
    while sampler.playing():
        sampled = sampler.sample()
        bar.update(sampler.reply(sampled))
        sampler.read()
    bar.close()
    return rollouts


def sample_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a lane from softmax(logits), (b, V) -> (b,).

    From the full distribution, by inverting its running sum.
    """
    running = logits.double().softmax(-1).cumsum(-1)  # (b, V)
    uniform = torch.rand(
        len(logits), 1, dtype=torch.double, generator=generator, device=logits.device
    )  # (b, 1)
    tokens = torch.searchsorted(running, uniform * running[:, -1:], right=True)[:, 0]  # (b,)
    return tokens.clamp(max=logits.shape[-1] - 1)


def read_tokens(
    model: torch.nn.Module,
    cache: "SlotCache",
    lanes: list[int] | None,
    chunks: list[list[int]],
    starts: list[int],
    pictures: list[tuple] | tuple = (),
) -> torch.Tensor:
    """Feed new tokens of some lanes; the logits after the last one of each, (b, V) in fp32.

    lanes: their numbers (b), or None for all of them. chunks: a token list a lane, padded here,
    empty for a lane that reads nothing. starts: the position of each chunk's first token. pictures:
    (place in `lanes`, 0, pictures) of prompts with pictures.
    """
    device = model.device
    longest = max(map(len, chunks))
    length = torch.tensor([len(c) for c in chunks], device=device)  # (b,)
    ids = torch.tensor([c + [0] * (longest - len(c)) for c in chunks], device=device)  # (b, t)
    steps = torch.arange(longest, device=device)  # (t,)
    real = steps < length[:, None]  # (b, t)
    positions = (torch.tensor(starts, device=device)[:, None] + steps) * real  # (b, t)
    numbers = None if lanes is None else torch.tensor(lanes, device=device)
    visible = cache.aim(numbers, positions, real)
    mask = torch.arange(visible, device=device) <= positions[:, :, None]  # (b, t, visible)
    inputs = {"input_ids": ids, "position_ids": positions}
    if cache.shift is not None:
        shift = cache.shift if lanes is None else cache.shift[lanes]  # (b, 1)
        inputs = model_inputs(model, ids, positions, pictures, shift)
        if pictures:
            # Of the last token, which is text.
            moved = inputs["position_ids"][1] - positions  # (b, t)
            cache.shift[lanes] = moved.gather(1, length[:, None] - 1)
    hidden = text_model(model)(
        **inputs, attention_mask=mask[:, None], past_key_values=cache, use_cache=True
    ).last_hidden_state  # (b, t, D)
    last = hidden[torch.arange(len(chunks), device=device), (length - 1).clamp(min=0)]  # (b, D)
    return model.lm_head(last).float()


@torch.inference_mode()
def score_rollout(model: torch.nn.Module, rollout: Rollout) -> torch.Tensor:
    """The sampler's log-probabilities, (n,) in nats, of a rollout's tokens with loss mask 1.

    The tokens are given, but read as they are when they are sampled: the prompt in one pass, the
    agent's one by one, a reply with the end of turn before it, all through the KV cache.
    """
    places = [i for i, of_agent in enumerate(rollout.loss_mask) if of_agent]
    cache = SlotCache(model, 1)
    logprobs = []
    start = 0
    for place in places:
        chunk = rollout.ids[start:place]
        lanes = None if len(chunk) == 1 else [0]  # as BatchSampler.read has it
        pictures = [(0, 0, rollout.pictures)] if rollout.pictures and start == 0 else ()
        logits = read_tokens(model, cache, lanes, [chunk], [start], pictures)  # (1, V)
        logprobs.append(logits.log_softmax(-1)[0, rollout.ids[place]])
        start = place
    return torch.stack(logprobs)


@dataclass
class Lane:
    """A rollout while it is played: its number in BatchSampler.lanes is its place in the cache."""

    rollout: Rollout
    env: VisGenEnv
    # The rollout's last tokens, which the model has not read.
    unread: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def ready(self) -> bool:
        """All is read: the next token can be sampled."""
        return not self.ended and not self.unread

    @property
    def going(self) -> bool:
        """A token was sampled and its turn goes on."""
        return len(self.unread) == 1

    @property
    def resting(self) -> bool:
        """Its turn has ended; the end of turn and the environment's reply wait to be read."""
        return len(self.unread) > 1


class BatchSampler:
    """Rollouts played side by side by one model, a lane of the KV cache each.

    `sample` a token of every lane that has read all it holds; `reply` where that token ended a
    turn; `read` what is new. A lane whose turn has ended rests until an eighth of the lanes do;
    then their tool messages are read in one pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        rollouts: list[Rollout],
        envs: list[VisGenEnv],
        config: Config,
        temperature: float,
        seed: int,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.temperature = temperature
        # Each rank samples its own stream. The environments' seeds depend on `seed` alone.
        self.generator = torch.Generator(device=model.device).manual_seed(seed + ranks.rank())
        self.lanes = [Lane(r, env, unread=r.ids[:]) for r, env in zip(rollouts, envs)]
        self.cache = SlotCache(model, len(rollouts))
        vocabulary = model.config.get_text_config().vocab_size
        # After the last token that each lane has read.
        self.logits = torch.zeros(len(rollouts), vocabulary, device=model.device)  # (lanes, V)

    def playing(self) -> bool:
        """Whether some episode has not ended."""
        return any(not lane.ended for lane in self.lanes)

    def read_prompts(self) -> None:
        """Read each group's shared prompt once, and copy it to the group's other lanes."""
        first_of = {}  # group id -> its first lane
        for number, lane in enumerate(self.lanes):
            first_of.setdefault(lane.rollout.group_id, number)
        self.read_lanes(list(first_of.values()))
        for number, lane in enumerate(self.lanes):
            first = first_of[lane.rollout.group_id]
            if number != first:
                self.cache.copy_lane(first, number, len(lane.unread))
                self.logits[number] = self.logits[first]
                lane.unread = []

    def sample(self) -> list[Lane]:
        """Append one token to the rollout of every lane that is ready; returns these lanes."""
        ready = [n for n, lane in enumerate(self.lanes) if lane.ready]
        logits = self.logits[ready]  # (b, V)
        if self.temperature:
            logits = logits / self.temperature
            tokens = sample_tokens(logits, self.generator)  # (b,)
        else:
            tokens = logits.argmax(-1)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]  # (b,)
        for number, token, logprob in zip(ready, tokens.tolist(), logprobs.tolist()):
            lane = self.lanes[number]
            extend(lane.rollout, [token], trained=True, logprobs=[logprob])
            lane.unread = [token]
        return [self.lanes[number] for number in ready]

    def reply(self, sampled: list[Lane]) -> int:
        """Let the environment answer the turns that ended; returns how many episodes ended."""
        ended = 0
        for lane in sampled:
            reply = go_on(lane.rollout, lane.env, self.tokenizer, self.config)
            if reply is None:
                lane.ended = True
                lane.unread = []
                ended += 1
            else:
                lane.unread += reply
        self.drop_ended()
        return ended

    def drop_ended(self) -> None:
        """Free the lanes of ended episodes, once these are a tenth of more than 8 lanes."""
        live = [n for n, lane in enumerate(self.lanes) if not lane.ended]
        if len(self.lanes) > 8 and len(live) <= 0.9 * len(self.lanes):
            self.cache.keep(live)
            self.logits = self.logits[live]
            self.lanes = [self.lanes[n] for n in live]

    def read(self) -> None:
        """Read the new token of every turn that goes on, and the tool messages once enough rest."""
        going = [lane for lane in self.lanes if lane.going]
        resting = [n for n, lane in enumerate(self.lanes) if lane.resting]
        if going:
            # All lanes go in, the resting ones empty: padding costs less than gathering the others'
            # cache. What this leaves as a resting lane's logits is replaced before it samples.
            chunks = [lane.unread if lane.going else [] for lane in self.lanes]
            starts = [len(lane.rollout.ids) - 1 for lane in self.lanes]
            self.logits = read_tokens(self.model, self.cache, None, chunks, starts)
            for lane in going:
                lane.unread = []
        if 8 * len(resting) >= len(going) + len(resting):
            self.read_lanes(resting)

    def read_lanes(self, numbers: list[int]) -> None:
        """Read all that is unread of these lanes, READ_LANES of them at a time."""
        for at in range(0, len(numbers), READ_LANES):
            part = numbers[at : at + READ_LANES]
            lanes = [self.lanes[n] for n in part]
            chunks = [lane.unread for lane in lanes]
            starts = [len(lane.rollout.ids) - len(lane.unread) for lane in lanes]
            # Pictures stand in prompts, which start at 0.
            pictures = [
                (i, 0, lane.rollout.pictures)
                for i, lane in enumerate(lanes)
                if lane.rollout.pictures and starts[i] == 0
            ]
            self.logits[part] = read_tokens(self.model, self.cache, part, chunks, starts, pictures)
            for lane in lanes:
                lane.unread = []


class SlotCache:
    """A static KV cache with a write position a lane, as transformers' attention layers use one.

    A lane's token at position p lies in slot p + 1, whatever the other lanes do: they may be at
    different turns. Slot 0 takes the writes of padding and is never seen. Keys and values are
    (lanes, heads, slots, head_dim) a layer; room is added ROOM slots at a time.
    """

    def __init__(self, model: torch.nn.Module, lanes: int):
        c = model.config.get_text_config()
        head_dim = getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
        shape = (lanes, c.num_key_value_heads, ROOM, head_dim)
        self.keys = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(c.num_hidden_layers)
        ]
        self.values = [torch.zeros_like(k) for k in self.keys]
        # What the next forward pass is about, set by `aim`.
        self.lanes = None
        self.slots = None
        self.visible = None
        # Of a Qwen3-VL: rotary position minus position, of what comes after a lane's pictures.
        self.shift = None
        if hasattr(model.base_model, "visual"):
            self.shift = torch.zeros(lanes, 1, dtype=torch.long, device=model.device)

    def aim(self, lanes: torch.Tensor | None, positions: torch.Tensor, real: torch.Tensor) -> int:
        """Say which lanes (b,) (None: all) the next forward pass is about, and where they write.

        positions (b, t); padding is not `real` (b, t). Returns how many positions attention sees.
        """
        self.lanes = lanes
        self.slots = torch.where(real, positions + 1, 0)  # (b, t)
        self.visible = int(positions.max()) + 1
        missing = self.visible + 1 - self.keys[0].shape[2]
        if missing > 0:
            room = ROOM * math.ceil(missing / ROOM)
            self.keys = [torch.nn.functional.pad(k, (0, 0, 0, room)) for k in self.keys]
            self.values = [torch.nn.functional.pad(v, (0, 0, 0, room)) for v in self.values]
        return self.visible

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (b, heads, t, head_dim) of one layer; all visible ones of `lanes`.

        transformers calls it, in every attention layer.
        """
        return (
            self.write(self.keys[layer], keys),
            self.write(self.values[layer], values),
        )

    def write(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Put `new` (b, heads, t, head_dim) into `store`; returns (b, heads, visible, head_dim)."""
        lanes = self.lanes
        if lanes is None:
            lanes = torch.arange(store.shape[0], device=store.device)
        store[lanes[:, None], :, self.slots] = new.transpose(1, 2)
        seen = store if self.lanes is None else store[lanes]
        return seen[:, :, 1 : self.visible + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks for it to place tokens; positions are always given, so 0 will do."""
        return 0

    def keep(self, lanes: list[int]) -> None:
        """Drop all lanes but these."""
        self.keys = [k[lanes] for k in self.keys]
        self.values = [v[lanes] for v in self.values]
        if self.shift is not None:
            self.shift = self.shift[lanes]

    def copy_lane(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one lane to another."""
        for store in self.keys + self.values:
            store[target, :, 1 : length + 1] = store[source, :, 1 : length + 1]
        if self.shift is not None:
            self.shift[target] = self.shift[source]
