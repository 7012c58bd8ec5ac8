"""bitsandbytes: a frozen base in 4 bits (nf4) under an adapter, and AdamW's moments in 8 bits.

Both are ours, to fit a large policy on a small GPU; the paper names neither.
"""

from types import ModuleType

import torch
from torch import Tensor

from lib import fsdp
from lib.experiment import Config


def need_bitsandbytes(key: str) -> ModuleType:
    """The module bitsandbytes; SystemExit with its install line where it is missing.

    `key`: what asks for it.
    """
    try:
        import bitsandbytes
    except ImportError as e:
        raise SystemExit(
            f"error: {key} needs bitsandbytes ({e}); "
            f"install it by: pip install 'bitsandbytes>=0.50,<0.51'"
        ) from e
    return bitsandbytes


# --------------------------------------------------------------------------------------------------
# A base in 4 bits
def wants_nf4(config: Config, phase: str) -> bool:
    """Whether phase `pst` or `vrl` loads its policy in 4 bits.

    SystemExit if that phase trains all weights: a quantized base is frozen.
    """
    if config.model.quantize == "none":
        return False
    if getattr(config, phase).tune == "full":
        raise SystemExit(
            f"error: config key `model.quantize` is nf4, a base that stays frozen, and "
            f"{phase}.tune=full trains it; set {phase}.tune=lora, or model.quantize=none"
        )
    return bool(need_bitsandbytes("config key `model.quantize`: nf4"))


def nf4_settings(device: torch.device) -> dict:
    """What transformers' from_pretrained is told to load linear layers in nf4, on `device`.

    The LM head and a vision tower stay as they are.
    """
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.visual"],
    )
    return {"device_map": {"": device}, "quantization_config": settings}


def keep_nf4_layout(model: torch.nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights on a CPU.

    Without gradients they would do so in place, in a layout that `base_weight` cannot read.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def base_weight(layer: torch.nn.Module) -> Tensor:
    """The weight that a linear layer computes with, (out, in): 4 bits as the numbers they mean."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    functional = need_bitsandbytes("a 4-bit base").functional
    return functional.dequantize_4bit(layer.weight.data, state)


# --------------------------------------------------------------------------------------------------
# Moments in 8 bits
def adamw(kind: str, groups: list[dict], **settings) -> torch.optim.Optimizer:
    """AdamW over parameter groups.

    It is torch's, or (`adamw8bit`) bitsandbytes' with its moments in 8 bits.
    """
    if kind == "adamw8bit":
        settings.pop("foreach", None)
        return need_bitsandbytes("optimizer adamw8bit").optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


def moment_to_save(key: str, value: Tensor | int) -> Tensor | None:
    """One entry of an optimizer's state for one parameter as a tensor that safetensors takes.

    Collective, and None on ranks but the first. bitsandbytes counts steps in an int, and all its
    parameters share one table of 8-bit levels (qmap), which safetensors refuses.
    """
    if key.startswith("qmap"):
        return value.clone()
    return fsdp.to_rank_0(torch.as_tensor(value))


def moments_to_load(saved: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor | int]:
    """The opposite: all entries of one parameter's state, spread over the ranks as it is."""
    in_8_bits = "state1" in saved
    state = {}
    for key, value in saved.items():
        if key == "step" and in_8_bits:
            state[key] = int(value)
        else:
            state[key] = fsdp.distribute(value, parameter)
    return state
