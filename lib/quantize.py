"""lib.quantize."""

import torch


def need_bitsandbytes(key):
    """The module bitsandbytes; SystemExit with its install line where it is missing. `key`: what asks for it."""
    try:
        import bitsandbytes
    except ImportError as e:
        raise SystemExit(
            f"error: {key} needs bitsandbytes ({e}); install it by: pip install 'bitsandbytes>=0.50,<0.51'"
        ) from e
    return bitsandbytes


def wants_nf4(config, phase):
    """Whether phase `pst` or `vrl` loads its policy in 4 bits; SystemExit if it trains all weights: a quantized base is frozen."""
    if config.model.quantize == "none":
        return False
    if getattr(config, phase).tune == "full":
        raise SystemExit(
            f"error: config key `model.quantize` is nf4, a base that stays frozen, and {phase}.tune=full trains it; "
            f"set {phase}.tune=lora, or model.quantize=none"
        )
    return bool(need_bitsandbytes("config key `model.quantize`: nf4"))


def base_weight(layer):
    """The weight that a linear layer computes with, (out, in): 4 bits as the numbers they stand for."""
    state = getattr(layer.weight, "quant_state", None)
    return (
        layer.weight
        if state is None
        else need_bitsandbytes("a 4-bit base").functional.dequantize_4bit(layer.weight.data, state)
    )


def adamw(kind, groups, **settings):
    """AdamW over parameter groups: torch's, or (`adamw8bit`) bitsandbytes' with its moments in 8 bits."""
    if kind == "adamw8bit":
        settings.pop("foreach", None)
        return need_bitsandbytes("optimizer adamw8bit").optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)
