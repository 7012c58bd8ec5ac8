"""lib.policy."""

import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

from lib import fsdp, ranks
from lib.attention import attention_name
from lib.runs import ROOT
from lib.vision import model_inputs, spell_pictures

END_OF_TURN = "<|im_end|>"
CHUNK_ELEMENTS = (
    2**26
)  # logits that exist at once, 256 MB in fp32; 2**26 / vocabulary positions go through the LM head together


# ---------------------------------------------------------------------------------------------------------------------
# Set-up
def set_up(config):
    """Set threads, seeds and determinism; returns the torch.device of `config.device`.

    On a CPU the same seed and thread count give the same bits; another thread count sums in another order.
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
            "error: config key `device` is cuda, and torch sees no GPU; set device=cpu or device=auto"
        )
    if name == "cpu":
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory only guards against reading it uninitialised, and costs a few percent.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if name == "cuda" and ranks.world() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    return torch.device(name)


def use_autocast(config, device):
    """Whether `model.autocast` takes effect: on a GPU, or on a CPU that multiplies bfloat16 in hardware; others emulate it, for no gain."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return config.model.autocast and any(
            able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")
        )
    return config.model.autocast


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: ids and loss mask come from the same call; only new text is ever encoded
def load_tokenizer(config, run):
    """The policy's tokenizer with our chat template (`model.template`); SystemExit if it cannot serve multi-turn training.

    Its `vision` names the model if that is a Qwen3-VL, whose image processor reads the user's pictures.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = config.model.path or str(run / "data" / "tokenizer")
    if config.pst.init_from:  # the ids mean what they meant when that policy was trained
        source = str(finished_policy(config.pst.init_from))
    elif not config.model.path and not Path(source).is_dir():
        raise SystemExit(f"error: {source} is missing; `python make_data.py --config ...` makes it")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = (
        ROOT / "data" / "templates" / f"{config.model.template}.jinja"
    ).read_text(encoding="utf-8")
    if END_OF_TURN in tokenizer.get_vocab():
        tokenizer.eos_token = (
            END_OF_TURN  # a base model's may be another: the sampler ends a turn at it
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or END_OF_TURN
    check_template(tokenizer)
    if config.model.path or config.pst.init_from:
        tokenizer.vision = (
            source if AutoConfig.from_pretrained(source).model_type == "qwen3_vl" else None
        )
    return tokenizer


def finished_policy(folder):
    """The path of `pst.init_from`, from the repository's root; SystemExit if no finished policy is there."""
    path = ROOT / folder
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise SystemExit(
                f"error: config key `pst.init_from` is {folder}, which is no finished policy: {path / name} is missing; "
                f"give the folder pst/final of a run"
            )
    return path


def check_template(tokenizer):
    """Check on three dialogues that rendering n messages is a prefix of rendering n + 1, token by token (SystemExit)."""
    for control in ("<|im_start|>", END_OF_TURN):
        if len(tokenizer.encode(control, add_special_tokens=False)) != 1:
            raise SystemExit(
                f"error: the tokenizer splits {control}, the chat template needs it as one token; add it as a "
                f"special token, or choose a model that speaks ChatML (`model.path`)"
            )
    agent = {
        "role": "assistant",
        "content": '<think>first</think><tool_call>{"name": "a", "arguments": {}}</tool_call>',
    }
    tool = {"role": "tool", "content": '{"ids": ["img_1"]}'}
    schema = [
        {
            "type": "function",
            "function": {"name": "a", "description": "b", "parameters": {"type": "object"}},
        }
    ]
    last = {"role": "assistant", "content": "<think>second</think><answer>{}</answer>"}
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "A logo"}
    for messages, tools in (
        ([system, user, agent, tool, tool, last], None),
        ([user, agent, user, last], None),
        ([system, user, agent, tool, agent, tool, user, last], schema),
    ):
        before = ""
        for n in range(1, len(messages) + 1):
            text = render(tokenizer, messages[:n], tools)
            if not text.startswith(before):
                raise SystemExit(
                    f"error: the chat template rewrites history: the rendering of {n - 1} messages is not a prefix "
                    f"of the rendering of {n} (it may strip <think> from earlier turns, as Qwen3's does), so tokens "
                    f"that were sampled would change; use one of ours: model.template=qwen3 for Qwen's models, else chatml"
                )
            before = text
        ids, _ = encode_trajectory(tokenizer, messages, tools)
        full = tokenizer.encode(
            before[: before.rindex(END_OF_TURN) + len(END_OF_TURN)], add_special_tokens=False
        )
        if ids != full:
            at = next(
                (i for i, (a, b) in enumerate(zip(ids, full)) if a != b), min(len(ids), len(full))
            )
            raise SystemExit(
                f"error: encoding turn by turn differs from encoding the whole dialogue at token {at}; the tokenizer "
                f"merges text over a turn's border: make <|im_start|> and {END_OF_TURN} special tokens"
            )


def render(tokenizer, messages, tools=None, generate=False):
    """Messages as ChatML text; `generate` opens the agent's next turn."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=generate
    )


def control_ids(tokenizer):
    """Ids that structure a dialogue: <|...|>, end of text, padding. The tags of UTPC are not among them: agents write them."""
    found = {
        i for i, t in tokenizer.added_tokens_decoder.items() if re.fullmatch(r"<\|.*\|>", t.content)
    }
    return found | {
        i
        for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
        if i is not None
    }


def encode_text(tokenizer, text, expected, what):
    """Encode text that holds `expected` control tokens; ValueError if there are more: some content forges a turn."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not hasattr(tokenizer, "control_ids"):
        tokenizer.control_ids = frozenset(
            control_ids(tokenizer)
        )  # kept: reading added_tokens_decoder takes milliseconds
    found = sum(map(tokenizer.control_ids.__contains__, ids))
    if found != expected:
        raise ValueError(
            f"{what} holds {found} control tokens where the chat template puts {expected}: a message's content "
            f"contains one, such as <|im_end|>; write `< |` for `<|` in it. Content begins: {text[:200]!r}"
        )
    return ids


def encode_prompt(tokenizer, messages, tools=None):
    """Ids of the opening messages and of the agent's opening `<|im_start|>assistant\\n`. ValueError: forged control tokens."""
    turns = len(messages) + (bool(tools) and messages[0]["role"] != "system")
    messages, pads = spell_pictures(messages)
    return encode_text(
        tokenizer,
        render(tokenizer, messages, tools, generate=True),
        2 * turns + 1 + pads,
        "the prompt",
    )


def encode_tool_messages(tokenizer, messages):
    """Ids between the agent's end of turn and its next turn: newline, tool (or user) turns, the agent's opening.

    Only this text is new, so that sampled ids are never decoded and encoded again (token in, token out).
    """
    opening = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    old = len(render(tokenizer, opening).rstrip("\n"))
    text = render(tokenizer, opening + messages, generate=True)[old:]
    return encode_text(tokenizer, text, 2 * len(messages) + 1, "a tool message")


def encode_agent(tokenizer, text):
    """Ids of what the agent writes in one turn, with its end of turn. ValueError: the text holds a control token."""
    return encode_text(tokenizer, text + END_OF_TURN, 1, "the agent's turn")


def encode_trajectory(tokenizer, messages, tools=None):
    """Ids and loss mask of a dialogue up to its last agent turn (nothing after it is trained).

    The mask is 1 exactly on the agent's tokens, its end of turn included:
        <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n hello <|im_end|>
        0            0    0  0  0          0  0            0         0  1     1
    """
    agent = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not agent or agent[0] == 0:
        raise ValueError(
            f"a trajectory needs messages before its first agent turn and an agent turn, got roles "
            f"{[m['role'] for m in messages]}"
        )
    ids, mask, start = [], [], 0
    for i in agent:
        between = messages[start:i]
        new = (
            encode_tool_messages(tokenizer, between)
            if start
            else encode_prompt(tokenizer, between, tools)
        )
        said = encode_agent(tokenizer, messages[i]["content"])
        ids += new + said
        mask += [0] * len(new) + [1] * len(said)
        start = i + 1
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------------
# The model
def build_policy(config, tokenizer, device, quantize=False):
    """The policy before any training here: a Qwen3 from scratch, initialised from `config.seed`, or `model.path`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    m = config.model
    if m.path:
        return load_policy(m.path, config, tokenizer, device, quantize)
    if quantize:
        raise SystemExit(
            "error: config key `model.quantize` is nf4, which is for a base that is saved somewhere; set model.path, or model.quantize=none"
        )
    if len(tokenizer) > m.vocab_size:
        raise SystemExit(
            f"error: the tokenizer has {len(tokenizer)} tokens, config key `model.vocab_size` is {m.vocab_size}"
        )
    # len(tokenizer), not vocab_size: rows without a token would never be trained, yet could be sampled.
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        head_dim=m.head_dim,
        max_position_embeddings=m.max_len,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=attention_name(config, device),
        dtype="float32",
    )
    torch.manual_seed(config.seed)
    return finish_policy(
        Qwen3ForCausalLM(shape).to(getattr(torch, m.dtype)), config, tokenizer, device
    )


def load_policy(path, config, tokenizer, device, quantize=False):
    """A policy from a folder or hub name, in `model.dtype`; `quantize`: its linear layers but the LM head in nf4. SystemExit says why it cannot be loaded."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        BitsAndBytesConfig,
    )

    more = (
        {
            "device_map": {"": device},
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=["lm_head", "model.visual"],
            ),
        }
        if quantize
        else {}
    )
    try:
        kind = (
            AutoModelForImageTextToText
            if AutoConfig.from_pretrained(path).model_type == "qwen3_vl"
            else AutoModelForCausalLM
        )
        model = kind.from_pretrained(
            path,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=attention_name(config, device),
            **more,
        )
    except (OSError, SafetensorError, ImportError) as e:
        raise SystemExit(
            f"error: cannot load a model from {path}: {' '.join(str(e).split())[:300]}"
        ) from e
    for module in model.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # without gradients it would repack its weight in place, in a layout that base_weight cannot read
            module.support_avx512bf16_for_cpu = False
    return finish_policy(model, config, tokenizer, device)


def finish_policy(model, config, tokenizer, device):
    """What every policy gets: the end of turn as its stop token, a frozen vision tower, checkpointing if asked for, its device."""
    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        stop,
        tokenizer.pad_token_id,
    )
    model.config.eos_token_id = stop
    if hasattr(model.base_model, "visual"):
        model.base_model.visual.requires_grad_(False)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device)


def text_model(base):
    """The module that turns tokens into hidden states: the backbone; of a vision-language model its language part."""
    backbone = getattr(base, base.base_model_prefix)
    return getattr(backbone, "language_model", backbone)


def add_lora(config, model, norm=False):
    """A LoRA adapter on every linear layer but the LM head and a vision tower's, without dropout; the base is frozen, `norm`: but for its final norm."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(
        config.seed
    )  # the adapter's start must not depend on what ran before in this process
    where = next(n for n, m in model.named_modules() if m is text_model(model))
    return get_peft_model(
        model,
        LoraConfig(
            r=config.model.lora_rank,
            lora_alpha=config.model.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            exclude_modules=r".*\bvisual\..*" if hasattr(model.base_model, "visual") else None,
            modules_to_save=[f"{where}.norm"] if norm else None,
        ),
    )


def merge_lora(model, fresh=None):
    """The plain model with its adapter added to the weights, in fp32. The adapter model is used up.

    fresh: the base anew, in fp32, which takes the adapter of a quantized model: what 4 bits rounded off is not lost for good.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if fresh is not None:
        adapter = get_peft_model_state_dict(model)
        model = get_peft_model(fresh, model.peft_config["default"])
        set_peft_model_state_dict(model, adapter)
    return model.float().merge_and_unload()


def token_logprobs(
    model,
    input_ids,
    position_ids,
    targets_mask,
    temperature=1.0,
    autocast=False,
    entropy=False,
    targets=None,
    chunk=0,
    pictures=(),
):
    """Log-probabilities (B, T-1), fp32, of each next token where `targets_mask` (B, T-1) is 1, else 0.

    input_ids, position_ids (B, T). Rows are packed (positions restart with each example) or right-padded; there is no
    attention mask: padding comes after what is scored, so causal attention hides it. With `entropy` returns
    (logprobs, entropy), the latter without gradient. `targets` (B, T-1) defaults to input_ids[:, 1:]; `chunk` is for tests.
    pictures: of a Qwen3-VL, (row, first token of the example, its pictures), as lib/vision.py takes them.

    The backbone runs once; the LM head runs at the masked positions only, in chunks that the backward pass computes
    again, because fp32 logits of a long batch are larger than the model.
    """
    if targets_mask.shape != (input_ids.shape[0], input_ids.shape[1] - 1):
        raise ValueError(
            f"targets_mask must be (B, T-1) = {(input_ids.shape[0], input_ids.shape[1] - 1)}, one entry a next "
            f"token (loss_mask[:, 1:]), got {tuple(targets_mask.shape)}"
        )
    base = (
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )  # adapters stand inside its layers
    head = base.get_output_embeddings()
    device = input_ids.device
    where = targets_mask.bool().flatten().nonzero().flatten()  # (N,) of B * (T-1)
    wanted = (input_ids[:, 1:] if targets is None else targets).flatten()[where]  # (N,)

    def score(hidden, target):
        logits = head(hidden).float()  # (n, V)
        logits = logits / temperature if temperature != 1.0 else logits
        logps = -F.cross_entropy(logits, target, reduction="none")  # (n,)
        if not entropy:
            return logps, logps.detach()
        with torch.no_grad():
            log_p = F.log_softmax(logits, -1)
            return logps, -(log_p.exp() * log_p).sum(-1)

    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        read = (
            model_inputs(base, input_ids, position_ids, pictures)
            if pictures
            else {"input_ids": input_ids, "position_ids": position_ids}
        )
        hidden = text_model(base)(**read, use_cache=False).last_hidden_state  # (B, T, D)
        hidden = hidden[:, :-1].flatten(0, 1).index_select(0, where)  # (N, D)
        chunk = chunk or max(64, CHUNK_ELEMENTS // base.config.get_text_config().vocab_size)
        if len(where) <= chunk or not torch.is_grad_enabled():
            parts = [score(*x) for x in zip(hidden.split(chunk), wanted.split(chunk))]
        else:
            parts = [
                checkpoint(score, *x, use_reentrant=False, preserve_rng_state=False)
                for x in zip(hidden.split(chunk), wanted.split(chunk))
            ]
    logps, entropies = (torch.cat(x) for x in zip(*parts))

    def spread(x):  # (N,) -> (B, T-1)
        out = torch.zeros(targets_mask.numel(), dtype=torch.float32, device=device)
        return out.index_copy(0, where, x).view(targets_mask.shape)

    return (spread(logps), spread(entropies)) if entropy else spread(logps)


def save_policy(model, tokenizer, folder):
    """Write a plain model in fp32 with its tokenizer (and image processor) as a folder that transformers and vLLM load. All ranks call it, rank 0 writes."""
    from transformers.utils import cached_file

    draft, state = folder.with_name(folder.name + ".tmp"), None
    if hasattr(model, "sharded_logprobs"):
        state = {n: fsdp.to_rank_0(p.detach()) for n, p in model.named_parameters()}
        state = {n: p if p is None else p.float() for n, p in state.items()}
    elif ranks.rank() == 0:
        model.float()
    if ranks.rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft, state_dict=state)
        tokenizer.save_pretrained(draft)
        for name in (
            ("preprocessor_config.json", "video_preprocessor_config.json")
            if getattr(tokenizer, "vision", None)
            else ()
        ):
            if found := cached_file(
                tokenizer.vision, name, _raise_exceptions_for_missing_entries=False
            ):
                shutil.copy(found, draft / name)
        os.rename(draft, folder)
    ranks.barrier()
