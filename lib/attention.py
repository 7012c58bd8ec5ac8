"""Causal attention over packed rows, in which each example sees itself alone: torch's sdpa on any device, flash-attn on CUDA where installed."""

from functools import cache

import torch
import torch.nn.functional as F


def packed_mask(**arguments):
    """The attention mask for `packed_sdpa`: none where its causal, per-example call needs none; else that of sdpa."""
    from transformers.masking_utils import sdpa_mask

    plain = arguments.get("attention_mask") is None and arguments.get("local_size") is None
    return (
        None
        if plain and arguments["q_length"] == arguments["kv_length"]
        else sdpa_mask(**arguments)
    )


def example_starts(position_ids, batch, length):
    """Where examples begin in B rows of T tokens laid end to end, a list; a row's first token always begins one."""
    first = (position_ids == 0).expand(batch, length).clone()
    first[:, 0] = True
    return first.flatten().nonzero().flatten().tolist()


def packed_sdpa(
    module, query, key, value, attention_mask, position_ids=None, scaling=None, **kwargs
):
    """Causal attention in which each packed example sees itself alone: one sdpa call an example.

    query (B, heads, T, d), key and value (B, kv heads, T, d), position_ids (B, T) restarting at 0 with every example.
    The same result as sdpa with a block-diagonal mask, which computes the T x T square: three times slower on our rows.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    batch, heads, length, width = query.shape
    if (
        length == 1
    ):  # a step with a cache: the query heads of a group read their key head as it is, not a copy each
        out = F.scaled_dot_product_attention(
            query.view(batch, key.shape[1], -1, width), key, value, attention_mask, scale=scaling
        )
        return out.view(batch, 1, heads, width), None
    if attention_mask is None and position_ids is not None and length == key.shape[2]:
        starts = example_starts(position_ids, batch, length)
        if len(starts) > batch:
            sizes = [b - a for a, b in zip(starts, starts[1:] + [batch * length])]
            key, value = (repeat_kv(x, heads // key.shape[1]) for x in (key, value))
            parts = zip(
                *(
                    x.transpose(1, 2).reshape(-1, heads, width).split(sizes)
                    for x in (query, key, value)
                )
            )
            out = [
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in part), is_causal=True, scale=scaling
                )[0]
                for part in parts
            ]  # each (heads, size, d)
            return torch.cat([x.transpose(0, 1) for x in out]).view(
                batch, length, heads, width
            ), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def packed_flash(
    module, query, key, value, attention_mask, position_ids=None, scaling=None, **kwargs
):
    """`packed_sdpa` by flash-attn's varlen kernel wherever that can: 16 bits, no mask. float32 and a step with a cache go packed_sdpa's way.

    transformers' flash_attention_2 by itself sees packed examples in a batch of one row alone; with more rows they would see each other.
    """
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    batch, _, length, _ = query.shape
    if (
        attention_mask is not None
        or position_ids is None
        or length != key.shape[2]
        or value.dtype == torch.float32
    ):
        return packed_sdpa(
            module, query, key, value, attention_mask, position_ids, scaling, **kwargs
        )
    bounds = torch.tensor(
        [*example_starts(position_ids, batch, length), batch * length],
        dtype=torch.int32,
        device=query.device,
    )
    longest = int(bounds.diff().max())
    return _flash_attention_forward(
        *(x.transpose(1, 2) for x in (query, key, value)),
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
    ), None


@cache
def warn_once(text):
    print(f"warning: {text}", flush=True)


def attention_name(config, device):
    """The attention that `model.attn` means: `auto` is flash-attn (`packed_flash`) on CUDA where installed, else packed_sdpa.

    Its registered name has no "flash" in it: of any such name transformers wants a package, and a Qwen3-VL's tower other arguments.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import is_flash_attn_2_available

    for name, function in (("packed_sdpa", packed_sdpa), ("packed_varlen", packed_flash)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, packed_mask)
    wanted, install = config.model.attn, "pip install flash-attn --no-build-isolation"
    if wanted == "flash_attention_2" and not (
        device.type == "cuda" and is_flash_attn_2_available()
    ):
        raise SystemExit(
            f"error: config key `model.attn` is flash_attention_2, which needs a CUDA device (this is {device.type}) and flash-attn "
            f"({install}); or set model.attn=auto"
        )
    if wanted == "auto" and device.type == "cuda" and not is_flash_attn_2_available():
        warn_once(
            f"flash-attn is not installed, attention is torch's sdpa, an example at a time; install it by: {install}"
        )
    if wanted in ("auto", "flash_attention_2"):
        return (
            "packed_varlen"
            if device.type == "cuda" and is_flash_attn_2_available()
            else "packed_sdpa"
        )
    return wanted
