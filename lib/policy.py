"""The policy: the model from scratch or from a folder, its LoRA adapter, and log-probabilities.

`plain_logprobs` is what L_SFT and GRPO need, in a few lines, for reading. `token_logprobs` gives
the same numbers in less memory, and is what everything calls.
"""

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib import fsdp, ranks
from lib.attention import attention_name
from lib.experiment import Config
from lib.quantize import keep_nf4_layout, nf4_settings
from lib.tokens import END_OF_TURN, pretrained
from lib.vision import model_inputs

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logits that exist at once, 256 MB in fp32: 2**26 / vocabulary positions go through the LM head
# together.
CHUNK_ELEMENTS = 2**26
LEAST_CHUNK = 64  # positions


# --------------------------------------------------------------------------------------------------
# Set-up
def set_up(config: Config) -> torch.device:
    """Set threads, seeds and determinism; returns the device that `config.device` means.

    On a CPU the same seed and thread count give the same bits; another thread count sums in another
    order. SystemExit if a GPU is asked for and there is none.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: config key `device` is cuda, and torch sees no GPU; "
            "set device=cpu or device=auto"
        )
    if name == "cpu":
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory only guards against reading it uninitialised, and costs a few
        # percent.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if name == "cuda" and ranks.world() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    return torch.device(name)


def use_autocast(config: Config, device: torch.device) -> bool:
    """Whether `model.autocast` takes effect.

    It does on a GPU, and on a CPU that multiplies bfloat16 in hardware; other CPUs emulate it, for
    no gain.
    """
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        in_hardware = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return config.model.autocast and in_hardware
    return config.model.autocast


# --------------------------------------------------------------------------------------------------
# The model
def build_policy(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
    quantize: bool = False,
) -> "PreTrainedModel":
    """The policy before any training here: `model.path`, or a Qwen3 from scratch.

    The weights from scratch depend on `config.seed` alone. `quantize`: in nf4, which SystemExit
    refuses for one from scratch.
    """
    if config.model.path:
        return load_policy(pretrained(config), config, tokenizer, device, quantize)
    if quantize:
        raise SystemExit(
            "error: config key `model.quantize` is nf4, which is for a base that is saved "
            "somewhere; set model.path, or model.quantize=none"
        )
    if len(tokenizer) > config.model.vocab_size:
        raise SystemExit(
            f"error: the tokenizer has {len(tokenizer)} tokens, config key `model.vocab_size` "
            f"is {config.model.vocab_size}"
        )
    model = qwen3_from_scratch(config, tokenizer, device)
    return finish_policy(model, config, tokenizer, device)


def qwen3_from_scratch(
    config: Config, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> "PreTrainedModel":
    """A Qwen3 with the sizes of section `model` and random weights, on the CPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = config.model
    shape = Qwen3Config(
        # Not sizes.vocab_size: rows without a token would never be trained, yet could be sampled.
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.max_len,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=attention_name(config, device),
        dtype="float32",
    )
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(shape).to(getattr(torch, sizes.dtype))


def load_policy(
    path: str | Path,
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
    quantize: bool = False,
) -> "PreTrainedModel":
    """A policy from a folder or hub name, in `model.dtype`.

    `quantize`: its linear layers but the LM head in nf4. SystemExit says why it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    settings = {
        "dtype": getattr(torch, config.model.dtype),
        "attn_implementation": attention_name(config, device),
    }
    if quantize:
        settings |= nf4_settings(device)
    try:
        model_type = AutoConfig.from_pretrained(path).model_type
        sees = model_type == "qwen3_vl"
        auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = auto_class.from_pretrained(path, **settings)
    except BrokenPipeError:  # the loader's bar flushes what was printed: no fault of the model
        raise
    except (OSError, SafetensorError, ImportError) as e:
        raise SystemExit(
            f"error: cannot load a model from {path}: {' '.join(str(e).split())[:300]}"
        ) from e
    keep_nf4_layout(model)
    return finish_policy(model, config, tokenizer, device)


def finish_policy(
    model: "PreTrainedModel",
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
) -> "PreTrainedModel":
    """What every policy gets.

    The end of turn is its stop token, a vision tower is frozen, checkpointing is on if asked for,
    and the weights are on `device`.
    """
    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = stop
    if has_vision(model):
        model.base_model.visual.requires_grad_(False)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device)


def has_vision(model: "PreTrainedModel") -> bool:
    """Whether a model without adapter has a vision tower."""
    return hasattr(model.base_model, "visual")


def text_model(base: "PreTrainedModel") -> torch.nn.Module:
    """The module that turns tokens into hidden states.

    It is the backbone, and of a vision-language model its language part.
    """
    backbone = getattr(base, base.base_model_prefix)
    return getattr(backbone, "language_model", backbone)


# --------------------------------------------------------------------------------------------------
# LoRA
def add_lora(config: Config, model: "PreTrainedModel", norm: bool = False) -> torch.nn.Module:
    """The model under a LoRA adapter that starts at zero; the base is frozen.

    The adapter is on every linear layer but the LM head and a vision tower's, without dropout
    (ours: the paper names no adapter). `norm`: the final norm is trained as well. What is trained
    is float32, whatever the base is: a usual step is less than bfloat16 can add to a weight.
    """
    from peft import LoraConfig, get_peft_model

    # The adapter's start must not depend on what ran before in this process.
    torch.manual_seed(config.seed)
    prefix = next(name for name, module in model.named_modules() if module is text_model(model))
    settings = LoraConfig(
        r=config.model.lora_rank,
        lora_alpha=config.model.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        exclude_modules=r".*\bvisual\..*" if has_vision(model) else None,
        modules_to_save=[f"{prefix}.norm"] if norm else None,
    )
    policy = get_peft_model(model, settings)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            # PEFT leaves the norm's copy in the base's type.
            parameter.data = parameter.data.float()
    return policy


def merge_lora(model: torch.nn.Module, fresh: "PreTrainedModel | None" = None) -> torch.nn.Module:
    """The plain model with its adapter added to the weights, in fp32. `model` is used up.

    fresh: the base anew, in fp32, which takes the adapter of a quantized model: what 4 bits rounded
    off is not lost for good.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if fresh is not None:
        adapter = get_peft_model_state_dict(model)
        model = get_peft_model(fresh, model.peft_config["default"])
        set_peft_model_state_dict(model, adapter)
    return model.float().merge_and_unload()


def without_adapter(model: torch.nn.Module) -> "PreTrainedModel":
    """The transformers model inside a PEFT wrapper; an adapter's weights stand in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --------------------------------------------------------------------------------------------------
# Log-probabilities
def plain_logprobs(
    model: torch.nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    targets_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(a | o) of each next token: (B, T-1), fp32, and 0 where `targets_mask` is 0.

    For reading; `token_logprobs` gives the same numbers in less memory. input_ids, position_ids
    (B, T); targets_mask (B, T-1).
    """
    base = without_adapter(model)
    backbone = text_model(base)
    head = base.get_output_embeddings()
    read = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden = read.last_hidden_state  # (B, T, D)
    # Position t foretells token t + 1: the last position has nothing to foretell.
    hidden = hidden.to(head.weight.dtype)
    logits = head(hidden[:, :-1]).float() / temperature  # (B, T-1, V)
    logprobs = F.log_softmax(logits, dim=-1)
    targets = input_ids[:, 1:]
    chosen = logprobs.gather(-1, targets[..., None]).squeeze(-1)  # (B, T-1)
    return chosen * targets_mask


def token_logprobs(
    model: torch.nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    targets_mask: Tensor,
    temperature: float = 1.0,
    autocast: bool = False,
    entropy: bool = False,
    targets: Tensor | None = None,
    chunk: int = 0,
    pictures: list[tuple] | tuple = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """`plain_logprobs` in less memory: (B, T-1), fp32, and 0 where `targets_mask` is 0.

    The backbone runs once; the LM head runs at the masked positions only, in chunks that the
    backward pass computes again, because fp32 logits of a long batch are larger than the model.

    input_ids, position_ids (B, T). Rows are packed (positions restart with each example) or
    right-padded; there is no attention mask: padding comes after every target, so causal attention
    hides it. `autocast`: matrix products in bfloat16. `targets` (B, T-1) defaults to
    input_ids[:, 1:]. `chunk` is for tests. pictures: of a Qwen3-VL, (row, first token of the
    example, its pictures), as lib/vision.py takes them.

    With `entropy` returns (logprobs, entropies in nats), the latter without gradient. ValueError:
    a mask of another shape.
    """
    batch, length = input_ids.shape
    if targets_mask.shape != (batch, length - 1):
        raise ValueError(
            f"targets_mask must be (B, T-1) = {(batch, length - 1)}, one entry a next token "
            f"(loss_mask[:, 1:]), got {tuple(targets_mask.shape)}"
        )
    base = without_adapter(model)
    head = base.get_output_embeddings()
    chosen = targets_mask.bool().flatten().nonzero().flatten()  # (N,) of B * (T-1) places
    targets = input_ids[:, 1:] if targets is None else targets
    targets = targets.flatten()[chosen]  # (N,)

    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=autocast):
        hidden = hidden_states(base, input_ids, position_ids, pictures)  # (B, T, D)
        hidden = hidden[:, :-1].flatten(0, 1).index_select(0, chosen)  # (N, D)
        vocabulary = base.config.get_text_config().vocab_size
        chunk = chunk or max(LEAST_CHUNK, CHUNK_ELEMENTS // vocabulary)
        recompute = len(chosen) > chunk and torch.is_grad_enabled()
        parts = []
        for some_hidden, some_targets in zip(hidden.split(chunk), targets.split(chunk)):
            inputs = (head, some_hidden, some_targets, temperature, entropy)
            if recompute:
                part = checkpoint(
                    head_logprobs, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                part = head_logprobs(*inputs)
            parts.append(part)
    logprobs, entropies = (torch.cat(pieces) for pieces in zip(*parts))  # (N,) each
    logprobs = put_back(logprobs, chosen, targets_mask.shape)
    if not entropy:
        return logprobs
    return logprobs, put_back(entropies, chosen, targets_mask.shape)


def hidden_states(
    base: "PreTrainedModel", input_ids: Tensor, position_ids: Tensor, pictures: list[tuple] | tuple
) -> Tensor:
    """What the backbone makes of tokens, and of pictures among them: (B, T, D)."""
    if pictures:
        inputs = model_inputs(base, input_ids, position_ids, pictures)
    else:
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
    return text_model(base)(**inputs, use_cache=False).last_hidden_state


def head_logprobs(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n,) of `targets` (n,) after hidden states (n, D), and entropies (n,).

    Without `entropy` the second is no entropy but stands in for it.
    """
    # A norm that is trained in float32 gives float32 to a head that may be bfloat16.
    logits = head(hidden.to(head.weight.dtype)).float()  # (n, V)
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    if not entropy:
        return logprobs, logprobs.detach()
    with torch.no_grad():
        every_logprob = F.log_softmax(logits, -1)  # (n, V)
        return logprobs, -(every_logprob.exp() * every_logprob).sum(-1)


def put_back(values: Tensor, chosen: Tensor, shape: torch.Size) -> Tensor:
    """`values` (N,) at the places `chosen` (N,) of a tensor of zeros with `shape`."""
    zeros = torch.zeros(shape.numel(), dtype=torch.float32, device=values.device)
    return zeros.index_copy(0, chosen, values).view(shape)


# --------------------------------------------------------------------------------------------------
# Saving
def save_policy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> None:
    """Write a plain model in fp32 with its tokenizer, as transformers and vLLM load them.

    A Qwen3-VL's image processor goes with it. All ranks call it, rank 0 writes; the folder is there
    whole or not at all.
    """
    weights = None
    if fsdp.is_sharded(model):
        weights = fsdp.whole_weights(model)
    elif ranks.rank() == 0:
        model.float()
    if ranks.rank() == 0:
        draft = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft, state_dict=weights)
        tokenizer.save_pretrained(draft)
        if getattr(tokenizer, "vision", None):
            copy_image_processor(tokenizer.vision, draft)
        os.rename(draft, folder)
    ranks.barrier()


def copy_image_processor(source: str, folder: Path) -> None:
    """Copy the settings of a model's image processor, where it has them, into `folder`."""
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found:
            shutil.copy(found, folder / name)
