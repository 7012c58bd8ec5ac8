"""Causal attention over packed rows, in which each example sees itself alone.

It is torch's own on any device (`model.attn: auto`); flash-attn is a choice for those who have it.
"""

import importlib.util
import inspect
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.experiment import Config

# Mean tokens of an example up to which torch's varlen kernel is faster on a GPU than a call an
# example. Ours, between the two shapes measured on an H100 (docs/gpu.md): 1,024 tokens, 3.2 against
# 5.9 ms, and 4,096, 23.1 against 17.4.
SHORT = 2048


def attention_name(config: Config, device: torch.device) -> str:
    """The name by which transformers knows the attention that `model.attn` means.

    `auto` is `packed_sdpa`, `flash_attention_2` is `packed_varlen`, flash-attn's kernel. SystemExit
    if that is asked for and cannot be had.
    """
    from transformers.utils import is_flash_attn_2_available

    register_attention()
    wanted = config.model.attn
    if wanted == "sdpa":
        return wanted
    if wanted == "auto":
        return "packed_sdpa"
    if device.type != "cuda" or not is_flash_attn_2_available():
        raise SystemExit(
            f"error: config key `model.attn` is flash_attention_2, which needs a CUDA device (this "
            f"is {device.type}) and the package flash-attn; set model.attn=auto"
        )
    return "packed_varlen"


def register_attention() -> None:
    """Tell transformers about `packed_sdpa` and `packed_flash`.

    The latter's name there has no "flash" in it: of any such name transformers wants a package, and
    a Qwen3-VL's tower other arguments.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in (("packed_sdpa", packed_sdpa), ("packed_varlen", packed_flash)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, packed_mask)


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
    """Causal attention in which each packed example sees itself alone.

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
        if varlen_is_faster(query, len(starts)):
            return all_examples(query, key, value, starts, scaling), None
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
    grouped = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    # Not view: CUDA's kernels return (batch, groups, kv heads, d) in memory, a transposed tensor.
    return out.reshape(batch, 1, heads, width)


def each_example(
    query: Tensor, key: Tensor, value: Tensor, starts: list[int], scaling: float | None
) -> Tensor:
    """Attention of each example alone, an sdpa call each: (B, T, heads, d).

    `starts`: see `example_starts`. A key head is read as it is by its group of query heads where
    the device's kernel can, and copied for each where it cannot.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    batch, heads, length, width = query.shape
    sizes = [end - start for start, end in zip(starts, starts[1:] + [batch * length])]
    grouped = key.shape[1] < heads and reads_grouped_heads(query, key, value)
    if not grouped:
        groups = heads // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outs = []
    examples = zip(*(end_to_end(x).split(sizes) for x in (query, key, value)))
    for example in examples:
        q, k, v = (x.transpose(0, 1)[None] for x in example)  # (1, heads, size, d)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).reshape(batch, length, heads, width)


def end_to_end(x: Tensor) -> Tensor:
    """(B, heads, T, d) as (B x T, heads, d): the rows one after another."""
    return x.transpose(1, 2).flatten(0, 1)


def reads_grouped_heads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether sdpa has a kernel here that reads a key head for several query heads.

    It has on a CPU (measured: 2 to 6 % faster than copies), and in 16 bits on a GPU with flash
    kernels. Elsewhere on a GPU `enable_gqa` would fall back to the plain product, T x T in memory.
    """
    if query.device.type == "cpu":
        return True
    if query.device.type != "cuda":
        return False
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def varlen_is_faster(query: Tensor, examples: int) -> bool:
    """Whether `all_examples` takes these packed rows: 16 bits, on a GPU, examples up to SHORT.

    query (B, heads, T, d). The kernel wants compute capability 8.0.
    """
    batch, _, length, _ = query.shape
    short = examples > batch and batch * length <= SHORT * examples
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    if not short or not in_16_bits or query.device.type != "cuda":
        return False
    return has_varlen() and torch.cuda.get_device_capability(query.device) >= (8, 0)


@cache
def has_varlen() -> bool:
    """Whether this torch has the varlen kernel for grouped heads; the one that we pin has."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def all_examples(
    query: Tensor, key: Tensor, value: Tensor, starts: list[int], scaling: float | None
) -> Tensor:
    """`each_example` in one call of torch's varlen kernel, in 16 bits on a GPU alone."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, width = query.shape
    bounds, longest = example_bounds(query, starts)
    out = varlen_attn(
        end_to_end(query),
        end_to_end(key),
        end_to_end(value),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=key.shape[1] < heads,
    )
    return out.reshape(batch, length, heads, width)


def example_bounds(query: Tensor, starts: list[int]) -> tuple[Tensor, int]:
    """Where examples begin and the last one ends, int32 (examples + 1,), and the longest one.

    query: (B, heads, T, d); the form that varlen kernels take.
    """
    batch, _, length, _ = query.shape
    bounds = torch.tensor([*starts, batch * length], dtype=torch.int32)
    return bounds.to(query.device), int(bounds.diff().max())


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
    bounds, longest = example_bounds(query, example_starts(position_ids, batch, length))
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
