"""The policy, and Progressive Specialization Training (Sec. 4.2): supervised fine-tuning in two stages.

Stage s trains on D_s = D_gen(share_s) + lambda x D_vis (500K, then 200K of the general mix, whose sets Table 7 lists; Table 4: lambda = 3),
every agent token with the same weight. What the policy is (model, tokenizer, chat template, LoRA, log-probabilities)
stands here as well; train_vrl.py and bench.py import it.

    python train_pst.py --config configs/tiny.yaml                    # goes on where an earlier run stopped
    python train_pst.py --config configs/tiny.yaml --show-batch       # one packed row, trained tokens in green
    python train_pst.py --config configs/tiny.yaml pst.tune=lora name=tiny-lora
    accelerate launch --config_file configs/fsdp.yaml train_pst.py --config ...       # several ranks, weights spread over them (configs/ranks.py)

A policy from scratch first gets a base, which can copy (`base_policy`); the paper starts from a pretrained model.
Writes runs/<name>/base/final and pst/final (the policy, fp32 safetensors, tokenizer beside it), pst/stage-I-step-N and metrics.jsonl.
"""

import bisect
import math
import os
import random
import re
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from configs import ranks
from configs.attention import attention_name
from configs.checkpoints import config_digest, list_checkpoints, read_checkpoint, restore, save_checkpoint, trained_parameters
from configs.experiment import ROOT, Stage, StopSwitch, append_metrics, command_line, draw, open_run, read_jsonl
from env import parse_utpc
from data.general import mix_of, stage_order
from data.vision import pictures_of, place, show_pictures, spell_pictures
from make_data import ensure_data

END_OF_TURN = "<|im_end|>"
LOG_EVERY = 20  # optimizer steps between two lines of metrics.jsonl
CHUNK_ELEMENTS = 2**26  # logits that exist at once, 256 MB in fp32; 2**26 / vocabulary positions go through the LM head together

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
        raise SystemExit("error: config key `device` is cuda, and torch sees no GPU; set device=cpu or device=auto")
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
        return config.model.autocast and any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16"))
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
    tokenizer.chat_template = (ROOT / "data" / "templates" / f"{config.model.template}.jinja").read_text(encoding="utf-8")
    if END_OF_TURN in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TURN  # a base model's may be another: the sampler ends a turn at it
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or END_OF_TURN
    check_template(tokenizer)
    if config.model.path or config.pst.init_from:
        tokenizer.vision = source if AutoConfig.from_pretrained(source).model_type == "qwen3_vl" else None
    return tokenizer


def finished_policy(folder):
    """The path of `pst.init_from`, from the repository's root; SystemExit if no finished policy is there."""
    path = ROOT / folder
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise SystemExit(f"error: config key `pst.init_from` is {folder}, which is no finished policy: {path / name} is missing; "
                             f"give the folder pst/final of a run")
    return path


def check_template(tokenizer):
    """Check on three dialogues that rendering n messages is a prefix of rendering n + 1, token by token (SystemExit)."""
    for control in ("<|im_start|>", END_OF_TURN):
        if len(tokenizer.encode(control, add_special_tokens=False)) != 1:
            raise SystemExit(f"error: the tokenizer splits {control}, the chat template needs it as one token; add it as a "
                             f"special token, or choose a model that speaks ChatML (`model.path`)")
    agent = {"role": "assistant", "content": '<think>first</think><tool_call>{"name": "a", "arguments": {}}</tool_call>'}
    tool = {"role": "tool", "content": '{"ids": ["img_1"]}'}
    schema = [{"type": "function", "function": {"name": "a", "description": "b", "parameters": {"type": "object"}}}]
    last = {"role": "assistant", "content": "<think>second</think><answer>{}</answer>"}
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "A logo"}
    for messages, tools in (([system, user, agent, tool, tool, last], None),
                            ([user, agent, user, last], None),
                            ([system, user, agent, tool, agent, tool, user, last], schema)):
        before = ""
        for n in range(1, len(messages) + 1):
            text = render(tokenizer, messages[:n], tools)
            if not text.startswith(before):
                raise SystemExit(f"error: the chat template rewrites history: the rendering of {n - 1} messages is not a prefix "
                                 f"of the rendering of {n} (it may strip <think> from earlier turns, as Qwen3's does), so tokens "
                                 f"that were sampled would change; use one of ours: model.template=qwen3 for Qwen's models, else chatml")
            before = text
        ids, _ = encode_trajectory(tokenizer, messages, tools)
        full = tokenizer.encode(before[:before.rindex(END_OF_TURN) + len(END_OF_TURN)], add_special_tokens=False)
        if ids != full:
            at = next((i for i, (a, b) in enumerate(zip(ids, full)) if a != b), min(len(ids), len(full)))
            raise SystemExit(f"error: encoding turn by turn differs from encoding the whole dialogue at token {at}; the tokenizer "
                             f"merges text over a turn's border: make <|im_start|> and {END_OF_TURN} special tokens")


def render(tokenizer, messages, tools=None, generate=False):
    """Messages as ChatML text; `generate` opens the agent's next turn."""
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)


def control_ids(tokenizer):
    """Ids that structure a dialogue: <|...|>, end of text, padding. The tags of UTPC are not among them: agents write them."""
    found = {i for i, t in tokenizer.added_tokens_decoder.items() if re.fullmatch(r"<\|.*\|>", t.content)}
    return found | {i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) if i is not None}


def encode_text(tokenizer, text, expected, what):
    """Encode text that holds `expected` control tokens; ValueError if there are more: some content forges a turn."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not hasattr(tokenizer, "control_ids"):
        tokenizer.control_ids = frozenset(control_ids(tokenizer))  # kept: reading added_tokens_decoder takes milliseconds
    found = sum(map(tokenizer.control_ids.__contains__, ids))
    if found != expected:
        raise ValueError(f"{what} holds {found} control tokens where the chat template puts {expected}: a message's content "
                         f"contains one, such as <|im_end|>; write `< |` for `<|` in it. Content begins: {text[:200]!r}")
    return ids


def encode_prompt(tokenizer, messages, tools=None):
    """Ids of the opening messages and of the agent's opening `<|im_start|>assistant\\n`. ValueError: forged control tokens."""
    turns = len(messages) + (bool(tools) and messages[0]["role"] != "system")
    messages, pads = spell_pictures(messages)
    return encode_text(tokenizer, render(tokenizer, messages, tools, generate=True), 2 * turns + 1 + pads, "the prompt")


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
        raise ValueError(f"a trajectory needs messages before its first agent turn and an agent turn, got roles "
                         f"{[m['role'] for m in messages]}")
    ids, mask, start = [], [], 0
    for i in agent:
        between = messages[start:i]
        new = encode_tool_messages(tokenizer, between) if start else encode_prompt(tokenizer, between, tools)
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
        raise SystemExit("error: config key `model.quantize` is nf4, which is for a base that is saved somewhere; set model.path, or model.quantize=none")
    if len(tokenizer) > m.vocab_size:
        raise SystemExit(f"error: the tokenizer has {len(tokenizer)} tokens, config key `model.vocab_size` is {m.vocab_size}")
    # len(tokenizer), not vocab_size: rows without a token would never be trained, yet could be sampled.
    shape = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=m.hidden_size, intermediate_size=m.intermediate_size, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim, max_position_embeddings=m.max_len,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN), pad_token_id=tokenizer.pad_token_id,
        attn_implementation=attention_name(config, device), dtype="float32")
    torch.manual_seed(config.seed)
    return finish_policy(Qwen3ForCausalLM(shape).to(getattr(torch, m.dtype)), config, tokenizer, device)


def need_bitsandbytes(key):
    """The module bitsandbytes; SystemExit with its install line where it is missing. `key`: what asks for it."""
    try:
        import bitsandbytes
    except ImportError as e:
        raise SystemExit(f"error: {key} needs bitsandbytes ({e}); install it by: pip install 'bitsandbytes>=0.50,<0.51'") from e
    return bitsandbytes


def wants_nf4(config, phase):
    """Whether phase `pst` or `vrl` loads its policy in 4 bits; SystemExit if it trains all weights: a quantized base is frozen."""
    if config.model.quantize == "none":
        return False
    if getattr(config, phase).tune == "full":
        raise SystemExit(f"error: config key `model.quantize` is nf4, a base that stays frozen, and {phase}.tune=full trains it; "
                         f"set {phase}.tune=lora, or model.quantize=none")
    return bool(need_bitsandbytes("config key `model.quantize`: nf4"))


def load_policy(path, config, tokenizer, device, quantize=False):
    """A policy from a folder or hub name, in `model.dtype`; `quantize`: its linear layers but the LM head in nf4. SystemExit says why it cannot be loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    more = {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.visual"])} if quantize else {}
    try:
        kind = AutoModelForImageTextToText if AutoConfig.from_pretrained(path).model_type == "qwen3_vl" else AutoModelForCausalLM
        model = kind.from_pretrained(path, dtype=getattr(torch, config.model.dtype), attn_implementation=attention_name(config, device), **more)
    except (OSError, SafetensorError, ImportError) as e:
        raise SystemExit(f"error: cannot load a model from {path}: {' '.join(str(e).split())[:300]}") from e
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # without gradients it would repack its weight in place, in a layout that base_weight cannot read
            module.support_avx512bf16_for_cpu = False
    return finish_policy(model, config, tokenizer, device)


def finish_policy(model, config, tokenizer, device):
    """What every policy gets: the end of turn as its stop token, a frozen vision tower, checkpointing if asked for, its device."""
    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = stop, tokenizer.pad_token_id
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

    torch.manual_seed(config.seed)  # the adapter's start must not depend on what ran before in this process
    where = next(n for n, m in model.named_modules() if m is text_model(model))
    return get_peft_model(model, LoraConfig(
        r=config.model.lora_rank, lora_alpha=config.model.lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM",
        exclude_modules=r".*\bvisual\..*" if hasattr(model.base_model, "visual") else None, modules_to_save=[f"{where}.norm"] if norm else None))


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


def base_weight(layer):
    """The weight that a linear layer computes with, (out, in): 4 bits as the numbers they stand for."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.weight if state is None else need_bitsandbytes("a 4-bit base").functional.dequantize_4bit(layer.weight.data, state)


def token_logprobs(model, input_ids, position_ids, targets_mask, temperature=1.0, autocast=False, entropy=False,
                   targets=None, chunk=0, pictures=()):
    """Log-probabilities (B, T-1), fp32, of each next token where `targets_mask` (B, T-1) is 1, else 0.

    input_ids, position_ids (B, T). Rows are packed (positions restart with each example) or right-padded; there is no
    attention mask: padding comes after what is scored, so causal attention hides it. With `entropy` returns
    (logprobs, entropy), the latter without gradient. `targets` (B, T-1) defaults to input_ids[:, 1:]; `chunk` is for tests.
    pictures: of a Qwen3-VL, (row, first token of the example, its pictures), as data/vision.py takes them.

    The backbone runs once; the LM head runs at the masked positions only, in chunks that the backward pass computes
    again, because fp32 logits of a long batch are larger than the model.
    """
    if targets_mask.shape != (input_ids.shape[0], input_ids.shape[1] - 1):
        raise ValueError(f"targets_mask must be (B, T-1) = {(input_ids.shape[0], input_ids.shape[1] - 1)}, one entry a next "
                         f"token (loss_mask[:, 1:]), got {tuple(targets_mask.shape)}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters stand inside its layers
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
        read = place(base, input_ids, position_ids, pictures) if pictures else {"input_ids": input_ids, "position_ids": position_ids}
        hidden = text_model(base)(**read, use_cache=False).last_hidden_state  # (B, T, D)
        hidden = hidden[:, :-1].flatten(0, 1).index_select(0, where)  # (N, D)
        chunk = chunk or max(64, CHUNK_ELEMENTS // base.config.get_text_config().vocab_size)
        if len(where) <= chunk or not torch.is_grad_enabled():
            parts = [score(*x) for x in zip(hidden.split(chunk), wanted.split(chunk))]
        else:
            parts = [checkpoint(score, *x, use_reentrant=False, preserve_rng_state=False)
                     for x in zip(hidden.split(chunk), wanted.split(chunk))]
    logps, entropies = (torch.cat(x) for x in zip(*parts))

    def spread(x):  # (N,) -> (B, T-1)
        out = torch.zeros(targets_mask.numel(), dtype=torch.float32, device=device)
        return out.index_copy(0, where, x).view(targets_mask.shape)

    return (spread(logps), spread(entropies)) if entropy else spread(logps)


# ---------------------------------------------------------------------------------------------------------------------
# Rows, mixtures, steps


def pack(lengths, row_len):
    """Examples to rows of at most `row_len` tokens, best fit decreasing; returns lists of example indices.

    >>> pack([5, 3, 4, 2], 7)
    [[0, 3], [2, 1]]
    """
    rows, free = [], []  # free: sorted (tokens left, row)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_len:
            raise ValueError(f"example {i} has {lengths[i]} tokens, a row holds {row_len}: raise `pst.row_len`")
        at = bisect.bisect_left(free, (lengths[i], -1))
        left, row = free.pop(at) if at < len(free) else (row_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def make_row(examples, row_len, pad_id):
    """One packed row: input_ids, position_ids, loss_mask, each int64 (row_len,).

    Positions restart with every example, which is how attention knows them apart; the padding at the end is an example of
    its own with mask 0, whatever its id. The first token of an example is never trained: what comes before is not its own.
    """
    ids, positions, mask = [], [], []
    for tokens, trained, *_ in examples:
        ids += tokens
        positions += range(len(tokens))
        mask += [0, *trained[1:]]
    pad = row_len - len(ids)
    if pad < 0:
        raise ValueError(f"examples of {len(ids)} tokens do not fit a row of {row_len}")
    return (torch.tensor(ids + [pad_id] * pad), torch.tensor(positions + list(range(pad))), torch.tensor(mask + [0] * pad))


def pack_steps(config, examples, order, rng):
    """A stream of example indices as optimizer steps: lists of rows, a row is a list of indices.

    Packing sorts by length, so it sees a window of the stream at a time, and its rows are shuffled again.
    """
    window, rows = 64 * config.pst.rows_per_step, []
    for at in range(0, len(order), window):
        part = order[at:at + window]
        new = [[part[i] for i in row] for row in pack([len(examples[i][0]) for i in part], config.pst.row_len)]
        rng.shuffle(new)
        rows += new
    return [rows[i:i + config.pst.rows_per_step] for i in range(0, len(rows), config.pst.rows_per_step)]


def stage_steps(config, stage, visgen, general):
    """All optimizer steps of a stage, its mixture in rows."""
    return pack_steps(config, [*general, *visgen], stage_order(config, stage, visgen, general), draw("pst rows", config.seed, stage))


def encode_records(tokenizer, records, row_len, what):
    """Records with `messages` and `tools` as (ids, loss_mask), or (ids, loss_mask, pictures) where the user's are there and the model is a Qwen3-VL.

    SystemExit names a record that cannot be trained on.
    """
    examples = []
    for i, record in enumerate(tqdm(records, desc=f"encode {what}", leave=False, disable=len(records) < 1000 or ranks.rank() > 0)):
        try:
            messages = show_pictures(tokenizer, record.get("task") or {}, record["messages"])
            shown = pictures_of(messages)
            examples.append((*encode_trajectory(tokenizer, messages, record.get("tools")), *([shown] if shown else [])))
        except (ValueError, KeyError) as e:
            raise SystemExit(f"error: {what}, record {i}: {e}") from e
        if len(examples[-1][0]) > row_len:
            raise SystemExit(f"error: {what}, record {i} has {len(examples[-1][0])} tokens, a row holds {row_len}; "
                             f"raise `pst.row_len`, or make the data shorter")
    return examples


def encode_data(config, run, tokenizer):
    """The general mix and D_vis of a run, encoded."""
    return [encode_records(tokenizer, read_jsonl(run / "data" / name), config.pst.row_len, name)
            for name in ("general.jsonl", "visgen.jsonl")]


def adamw(kind, groups, **settings):
    """AdamW over parameter groups: torch's, or (`adamw8bit`) bitsandbytes' with its moments in 8 bits."""
    if kind == "adamw8bit":
        settings.pop("foreach", None)
        return need_bitsandbytes("optimizer adamw8bit").optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


def make_optimizers(config, model, stage):
    """The optimizers of one stage, as a list: AdamW alone, or (`pst.optimizer: muon`) Muon beside it for the blocks' matrices.

    Every group keeps its peak learning rate as `peak`; embeddings and matrices decay, vectors do not.
    """
    trained, p = trained_parameters(model), config.pst
    matrices = [n for n, w in trained.items() if p.optimizer == "muon" and w.dim() == 2 and "embed" not in n and "lm_head" not in n]
    rest = [n for n in trained if n not in matrices]
    groups = [{"names": names, "params": [trained[n] for n in names], "weight_decay": decay, "peak": stage.lr}
              for names, decay in (([n for n in rest if trained[n].dim() > 1], p.weight_decay), ([n for n in rest if trained[n].dim() < 2], 0.0)) if names]
    optimizers = [adamw(p.optimizer, groups, lr=stage.lr, betas=(0.9, p.beta2), foreach=True)] if groups else []      # an adapter is matrices alone
    if matrices:
        group = {"names": matrices, "params": [trained[n] for n in matrices], "peak": stage.matrix_lr}
        optimizers.append(torch.optim.Muon([group], lr=stage.matrix_lr, weight_decay=p.weight_decay))
    return optimizers


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(config, step, steps):
    """Share of the peak learning rate at step `step` (from 0) of `steps`: a linear rise, the peak, a linear fall to min_lr."""
    rise, fall = (max(1, round(share * steps)) for share in (config.pst.warmup, config.pst.cooldown))
    low = config.pst.min_lr
    return min(1.0, (step + 1) / rise, low + (1 - low) * (steps - 1 - step) / fall)


def make_batch(rows, examples, pad_id, device):
    """Rows of example indices as input_ids, position_ids, loss_mask (B, T); T is the longest row, not `row_len`."""
    length = max(sum(len(examples[i][0]) for i in row) for row in rows)
    made = [make_row([examples[i] for i in row], length, pad_id) for row in rows]
    return [torch.stack(x).to(device) for x in zip(*made)]


def row_pictures(rows, examples):
    """(row, first token, pictures) of each example with pictures, of rows of example indices."""
    starts = [[sum(len(examples[i][0]) for i in row[:k]) for k in range(len(row))] for row in rows]
    return [(r, start, examples[i][2]) for r, row in enumerate(rows) for i, start in zip(row, starts[r]) if len(examples[i]) > 2]


def backward_step(config, model, rows, examples, pad_id, device):
    """Gradient of one optimizer step in micro-batches; returns (loss, tokens, loss tokens), loss in nats a loss token.

    The divisor is the count of loss tokens of the whole step, so any split into micro-batches and over ranks gives the same gradient.
    """
    mine = ranks.share(rows)
    parts = [mine[i:i + config.pst.micro_rows] for i in range(0, len(mine), config.pst.micro_rows)]
    batches = [(*make_batch(part, examples, pad_id, device), row_pictures(part, examples)) for part in parts]
    loss_tokens = int(ranks.total(sum(int(mask[:, 1:].sum()) for _, _, mask, _ in batches)))
    # FSDP's passes are collective: a rank with fewer rows reads one more without a loss.
    for _ in range(math.ceil(math.ceil(len(rows) / ranks.world()) / config.pst.micro_rows) - len(batches)):
        ids, positions, mask = make_batch(rows[:1], examples, pad_id, device)
        batches.append((ids, positions, 0 * mask, row_pictures(rows[:1], examples)))
    sharded = getattr(model, "sharded_logprobs", None)
    total = 0.0
    for ids, positions, mask, pictures in batches:
        logps = (sharded or partial(token_logprobs, model))(ids, positions, mask[:, 1:], autocast=use_autocast(config, device),
                                                                 pictures=pictures)  # (B, T-1)
        loss = -logps.sum() / loss_tokens
        (loss * ranks.world() if sharded else loss).backward()  # FSDP takes the mean over ranks, not the sum
        total += loss.item()
    ranks.sum_gradients(trained_parameters(model).values())
    return ranks.total(total), sum(len(examples[i][0]) for row in rows for i in row), loss_tokens


def train_stage(config, run, number, part, model, examples, steps, pad_id, device, start=None, stop_at=None):
    """One stage of PST (or the base, number 0): `steps` over encoded `examples`, learning rates of `part`. `start`: its read checkpoint.

    Saves every `save_every` steps and at the end. On Ctrl-C (or before step `stop_at`, for tests) saves and exits with 130.
    """
    if ranks.fsdp():
        if (config.pst.tune, config.pst.optimizer) != ("full", "adamw"):
            raise SystemExit(f"error: FSDP spreads all weights and AdamW's moments, got pst.tune={config.pst.tune} "
                             f"pst.optimizer={config.pst.optimizer}; set pst.tune=full pst.optimizer=adamw, or launch without configs/fsdp.yaml")
        ranks.shard(model, "sharded_logprobs", token_logprobs)
    optimizers, name = make_optimizers(config, model, part), f"stage {number}" if number else "base"
    first, window = 0, {"loss": 0.0, "tokens": 0, "loss_tokens": 0}
    if start:
        restore(model, optimizers, *start)
        first, window = start[2]["step"], start[2]["window"]
    model.train()
    tokens = [sum(len(examples[i][0]) for row in step for i in row) for step in steps]
    began = time.perf_counter()
    if first < len(steps):  # a pass whose gradient is thrown away tells how long the stage will take
        backward_step(config, model, steps[first], examples, pad_id, device)
        model.zero_grad()
    seconds = (time.perf_counter() - began) * sum(tokens[first:]) / max(1, tokens[first] if first < len(steps) else 1)
    fill = sum(tokens) / (sum(map(len, steps)) * config.pst.row_len)
    print(f"{name}: {sum(tokens):,} tokens in {len(steps):,} steps of {config.pst.rows_per_step} rows, {fill:.0%} full, "
          f"lr {part.lr:g}; from step {first}, about {seconds / 60:.1f} min", flush=True)

    def save(step):
        state = {"stage": number, "step": step, "window": window, "config": config_digest(config)}
        save_checkpoint(run / ("pst" if number else "base") / f"stage-{number}-step-{step}", model, optimizers, state)

    bar = tqdm(total=sum(tokens), initial=sum(tokens[:first]), unit="tok", unit_scale=True, desc=name, mininterval=2, disable=ranks.rank() > 0)
    logged_at, logged_tokens = time.perf_counter(), 0
    with StopSwitch() as stop, bar:
        for step in range(first, len(steps)):
            if ranks.total(stop.on or step == stop_at):
                save(step)
                bar.close()
                print(f"stopped: {name} is saved at step {step} of {len(steps)}; the same command goes on from there")
                raise SystemExit(130)
            share = learning_rate(config, step, len(steps))
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = share * group["peak"]
            loss, n, loss_tokens = backward_step(config, model, steps[step], examples, pad_id, device)
            norm = ranks.whole(torch.nn.utils.clip_grad_norm_(trained_parameters(model).values(), config.pst.max_grad_norm)).item()
            if not math.isfinite(norm):
                raise SystemExit(f"error: the gradient of {name}, step {step} is {norm} (loss {loss}); lower its `lr`, or set model.autocast=false")
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            window["loss"] += loss * loss_tokens
            window["tokens"] += n
            window["loss_tokens"] += loss_tokens
            logged_tokens += n
            bar.update(n)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == len(steps):
                mean = window["loss"] / window["loss_tokens"]
                speed = logged_tokens / (time.perf_counter() - logged_at)
                record = {"phase": "pst", "stage": number, "step": step + 1, "loss": mean, "tokens": window["tokens"],
                          "loss_tokens": window["loss_tokens"], "tok_s": round(speed, 1), "lr": share * part.lr, "grad_norm": norm}
                if ranks.rank() == 0:
                    append_metrics(run, record)
                bar.set_postfix(loss=f"{mean:.4f}", step=f"{step + 1}/{len(steps)}", refresh=False)
                window = {"loss": 0.0, "tokens": 0, "loss_tokens": 0}
                logged_at, logged_tokens = time.perf_counter(), 0
            if (step + 1) % config.pst.save_every == 0 or step + 1 == len(steps):
                save(step + 1)


def save_policy(model, tokenizer, folder):
    """Write a plain model in fp32 with its tokenizer (and image processor) as a folder that transformers and vLLM load. All ranks call it, rank 0 writes."""
    from transformers.utils import cached_file

    draft, state = folder.with_name(folder.name + ".tmp"), None
    if hasattr(model, "sharded_logprobs"):
        state = {n: ranks.collected(p.detach()) for n, p in model.named_parameters()}
        state = {n: p if p is None else p.float() for n, p in state.items()}
    elif ranks.rank() == 0:
        model.float()
    if ranks.rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft, state_dict=state)
        tokenizer.save_pretrained(draft)
        for name in ("preprocessor_config.json", "video_preprocessor_config.json") if getattr(tokenizer, "vision", None) else ():
            if found := cached_file(tokenizer.vision, name, _raise_exceptions_for_missing_entries=False):
                shutil.copy(found, draft / name)
        os.rename(draft, folder)
    ranks.barrier()


def base_policy(config, run, tokenizer, device, quantize=False):
    """The policy before PST: `model.path`, or a Qwen3 from scratch after `model.base_examples` copying exercises. `quantize`: in nf4.

    The paper starts from a pretrained model, which can read and copy; random weights cannot, and D_vis alone does not teach it
    (configs/tiny.yaml has the figures). The result is kept in runs/<name>/base/final.
    """
    # An ablation that takes another run's PST takes its base as well.
    homes = [run] + ([finished_policy(config.pst.init_from).parents[1]] if config.pst.init_from else [])
    final, policy = next((h / "base" / "final" for h in homes if (h / "base" / "final").is_dir()), run / "base" / "final"), config.model
    if policy.path or not policy.base_examples:
        return build_policy(config, tokenizer, device, quantize)
    if ranks.agreed(final.is_dir()):
        return load_policy(final, config, tokenizer, device, quantize)
    model = build_policy(config, tokenizer, device)
    examples = encode_records(tokenizer, read_jsonl(run / "data" / "base.jsonl"), config.pst.row_len, "base.jsonl")
    steps = pack_steps(config, examples, list(range(len(examples))), draw("base rows", config.seed))
    saved = list_checkpoints(run / "base")
    start = read_checkpoint(config, saved[-1]) if saved else None
    train_stage(config, run, 0, Stage(lr=policy.base_lr), model, examples, steps, tokenizer.pad_token_id, device, start=start)
    save_policy(model, tokenizer, final)
    return load_policy(final, config, tokenizer, device, quantize) if quantize else model


def base_folder(config, run, tokenizer, device):
    """The folder of the policy before PST, made if it is not there, for an engine that loads by itself."""
    base_policy(config, run, tokenizer, device)
    folder = run / "base" / "final"
    if not folder.is_dir():
        raise SystemExit("error: vLLM loads the policy from a folder, and random weights have none; set model.base_examples or model.path")
    return folder


def train_pst(config, run):
    """Run the stages of PST that are not done yet; returns the folder of the finished policy."""
    final = run / "pst" / "final"
    if config.pst.init_from:
        return finished_policy(config.pst.init_from)
    if ranks.agreed(final.is_dir()):  # it was renamed into place, so it is whole
        return final
    device, quantize = set_up(config), wants_nf4(config, "pst")
    ranks.first(lambda: ensure_data(config, run))
    tokenizer = load_tokenizer(config, run)
    general, visgen = encode_data(config, run, tokenizer)
    model = base_policy(config, run, tokenizer, device, quantize)
    if config.pst.tune == "lora":
        model = add_lora(config, model)
    every, trained = [sum(p.numel() for p in x) for x in (model.parameters(), trained_parameters(model).values())]
    marked = sum(sum(x[1]) for x in general + visgen) / sum(len(x[1]) for x in general + visgen)
    bf16 = "bfloat16" if use_autocast(config, device) else config.model.dtype
    print(f"PST: {every:,} parameters, {trained:,} trained, {bf16} on {device} ({torch.get_num_threads()} threads); "
          f"{len(visgen):,} trajectories, {len(general):,} general examples, {marked:.0%} of tokens trained", flush=True)
    saved = list_checkpoints(run / "pst")
    start = read_checkpoint(config, saved[-1]) if saved else None
    if start:
        print(f"continuing from {saved[-1]}")
    for stage, part in enumerate(config.pst.stages):
        if start and start[2]["stage"] > stage + 1:
            continue
        steps = stage_steps(config, stage, visgen, general)
        print(mix_of(config, stage, steps, visgen, general))
        train_stage(config, run, stage + 1, part, model, [*general, *visgen], steps, tokenizer.pad_token_id, device, start=start)
        start = None
    if config.pst.tune == "lora" and (ranks.rank() == 0 or not quantize):      # the whole base in fp32 has room once in a node's memory
        plain = replace(config, model=replace(config.model, dtype="float32"))
        fresh = load_policy(config.model.path or run / "base" / "final", plain, tokenizer, torch.device("cpu")) if quantize else None
        model = merge_lora(model, fresh)
    save_policy(model, tokenizer, final)
    return final


def greedy_answers(model, tokenizer, prompts, device, batch=64, max_new_tokens=96):
    """Greedy answers to prompts (lists of ids), as lists of ids without the end of turn."""
    from transformers import GenerationConfig

    stop, pad = tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.pad_token_id
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=pad)
    answers = {}
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        part = order[at:at + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in part], device=device)  # (b, width)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=device)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        answers.update({i: new[:new.index(stop)] if stop in new else new for i, new in zip(part, out)})
    return [answers[i] for i in range(len(prompts))]


def general_exact_match(answers, tokenizer, items):
    """Share of held-out general items answered exactly, by kind; "general" is the mean of the kinds. answers: a function of prompts, greedy_answers' kind.

    The last message of an item is the expected answer. Text is compared after strip; a function call by name and arguments.
    """
    mine = ranks.share(items)
    said = answers([encode_prompt(tokenizer, x["messages"][:-1], x.get("tools")) for x in mine])
    hits = ranks.gather([(x["kind"], same_answer(tokenizer.decode(new).strip(), x["messages"][-1]["content"], x["kind"])) for x, new in zip(mine, said)])
    shares = {kind: sum(hit for k, hit in hits if k == kind) / sum(k == kind for k, _ in hits) for kind in sorted({k for k, _ in hits})}
    return dict(shares, general=sum(shares.values()) / len(shares)) if shares else {"general": math.nan}


def same_answer(said, expected, kind):
    """Whether an answer is the expected one: the same calls for kind "function", else the same text."""
    if kind == "function":
        calls = [parse_utpc(text)["calls"] for text in (said, expected)]
        if calls[1]:
            ours, theirs = ([(c["name"], c["arguments"]) for c in x] for x in calls)
            return ours == theirs and not any(c["error"] for c in calls[0])
    return said.strip() == expected.strip()


def show_batch(config, run):
    """Print the first packed row of stage 1, trained tokens in green."""
    ensure_data(config, run)
    tokenizer = load_tokenizer(config, run)
    general, visgen = encode_data(config, run, tokenizer)
    row = stage_steps(config, 0, visgen, general)[0][0]
    for i in row:
        ids, mask = [*general, *visgen][i][:2]
        cut = [0] + [k for k in range(1, len(ids)) if mask[k] != mask[k - 1]] + [len(ids)]
        print("".join(f"\033[32m{tokenizer.decode(ids[a:b])}\033[0m" if mask[a] else tokenizer.decode(ids[a:b])
                      for a, b in zip(cut, cut[1:])) + f"\n--- {len(ids)} tokens, {sum(mask)} trained")


def main():
    from configs.plan import OPTIONS, SWITCH, asked_for_plan

    config, given = command_line(__doc__, [("--show-batch", "print one packed row with the trained tokens marked, and exit"), SWITCH], OPTIONS)
    if asked_for_plan(config, given):
        return
    run = ranks.first(lambda: open_run(config))
    if "--show-batch" in given:
        return show_batch(config, run)
    began = time.perf_counter()
    final = train_pst(config, run)
    device = set_up(config)
    ranks.first(lambda: ensure_data(config, run))
    tokenizer = load_tokenizer(config, run)
    model = load_policy(final, config, tokenizer, device)
    shares = general_exact_match(partial(greedy_answers, model, tokenizer, device=device), tokenizer, read_jsonl(run / "data" / "general_heldout.jsonl"))
    if ranks.rank():
        return
    append_metrics(run, {"phase": "pst", "general_exact_match": shares, "seconds": round(time.perf_counter() - began, 1)})
    print("general exact match, greedy: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    print(f"finished policy: {final}")


if __name__ == "__main__":
    ranks.run(main)
