"""Causal attention over packed rows, in which each example sees itself alone.

It is torch's sdpa on any device, and flash-attn on CUDA where that is installed.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.experiment import Config

INSTALL_FLASH = "pip install flash-attn --no-build-isolation"


def attention_name(config: Config, device: torch.device) -> str:
    """The name by which transformers knows the attention that `model.attn` means.

    `auto` is flash-attn (`packed_flash`) on CUDA where installed, else `packed_sdpa`. SystemExit if
    flash-attn is asked for and cannot be had.
    """
    from transformers.utils import is_flash_attn_2_available

    register_attention()
    wanted = config.model.attn
    if wanted == "sdpa":
        return wanted
    flash = device.type == "cuda" and is_flash_attn_2_available()
    if wanted == "flash_attention_2" and not flash:
        raise SystemExit(
            f"error: config key `model.attn` is flash_attention_2, which needs a CUDA device (this "
            f"is {device.type}) and flash-attn ({INSTALL_FLASH}); or set model.attn=auto"
        )
    if device.type == "cuda" and not flash:
        warn_once(
            f"flash-attn is not installed, attention is torch's sdpa, an example at a time; "
            f"install it by: {INSTALL_FLASH}"
        )
    return "packed_varlen" if flash else "packed_sdpa"


def register_attention() -> None:
    """Tell transformers about `packed_sdpa` and `packed_flash`.

    The latter's name there has no "flash" in it: of any such name transformers wants a package, and
    a Qwen3-VL's tower other arguments.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in (("packed_sdpa", packed_sdpa), ("packed_varlen", packed_flash)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, packed_mask)


@cache
def warn_once(text: str) -> None:
    """Print a warning; the same one is printed once a process."""
    print(f"warning: {text}", flush=True)


def packed_mask(**arguments) -> Tensor | None:
    """The attention mask for `packed_sdpa`, by the arguments of transformers' sdpa_mask.

    There is none where the causal call per example needs none.
    """
    from transformers.masking_utils import sdpa_mask

    no_mask = arguments.get("attention_mask") is None and arguments.get("local_size") is None
    if no_mask and arguments["q_length"] == arguments["kv_length"]:
        return None
    return sdpa_mask(**arguments)


def example_starts(position_ids: Tensor, batch: int, length: int) -> list[int]:
    """Where examples begin in B rows of T tokens laid end to end.

    position_ids (B, T) or (1, T) restart at 0; a row's first token always begins an example.
    """
    first = (position_ids == 0).expand(batch, length).clone()
    first[:, 0] = True
    return first.flatten().nonzero().flatten().tolist()


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention in which each packed example sees itself alone: one sdpa call an example.

    query (B, heads, T, d), key and value (B, kv heads, T, d), position_ids (B, T) restarting at 0
    with every example; gives (B, T, heads, d), and no attention weights. The same result as sdpa
    with a block-diagonal mask, which computes the T x T square: three times slower on our rows.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, _, length, _ = query.shape
    if length == 1:
        return one_step(query, key, value, attention_mask, scaling), None
    if attention_mask is None and position_ids is not None and length == key.shape[2]:
        starts = example_starts(position_ids, batch, length)
        if len(starts) > batch:
            return each_example(query, key, value, starts, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def one_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """One new token that reads a cache: (B, 1, heads, d).

    The query heads of a group read their key head as it is, not a copy each.
    """
    batch, heads, _, width = query.shape
    grouped = query.view(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.view(batch, 1, heads, width)


def each_example(
    query: Tensor, key: Tensor, value: Tensor, starts: list[int], scaling: float | None
) -> Tensor:
    """Attention of each example alone: (B, T, heads, d). `starts`: see `example_starts`."""
    from transformers.integrations.sdpa_attention import repeat_kv

    batch, heads, length, width = query.shape
    sizes = [end - start for start, end in zip(starts, starts[1:] + [batch * length])]
    groups = heads // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)

    def split(x: Tensor) -> tuple[Tensor, ...]:  # each (size, heads, d)
        return x.transpose(1, 2).reshape(-1, heads, width).split(sizes)

    outs = []
    for example in zip(split(query), split(key), split(value)):
        q, k, v = (x.transpose(0, 1)[None] for x in example)  # (1, heads, size, d)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[0]
        outs.append(out.transpose(0, 1))
    return torch.cat(outs).view(batch, length, heads, width)


def packed_flash(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`packed_sdpa` by flash-attn's varlen kernel wherever that can: 16 bits, no mask.

    float32 and a step with a cache go packed_sdpa's way. transformers' flash_attention_2 by itself
    sees packed examples in a batch of one row alone; with more rows they would see each other.
    """
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    batch, _, length, _ = query.shape
    packed = attention_mask is None and position_ids is not None and length == key.shape[2]
    if not packed or value.dtype == torch.float32:
        return packed_sdpa(
            module, query, key, value, attention_mask, position_ids, scaling, **kwargs
        )
    bounds = torch.tensor(
        [*example_starts(position_ids, batch, length), batch * length],
        dtype=torch.int32,
        device=query.device,
    )
    longest = int(bounds.diff().max())
    out = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        length,
        is_causal=True,
        softmax_scale=scaling,
        target_dtype=value.dtype,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        attn_implementation="flash_attention_2",
    )
    return out, None
