"""Measured memory and seconds of one PST step or VRL update of a config: prints JSON. Not a test.

    python tests/measure_step.py pst configs/tiny.yaml
    python tests/measure_step.py vrl configs/qwen3vl-8b.yaml ranks=8     # on a GPU, 1/8 of the step
    python tests/measure_step.py pst configs/qwen3vl-8b.yaml model.path=FOLDER     # its config.json
The weights are random, of the language part alone; of `model.path` only the shape is read. The step
is as large as the largest batch, of made-up tokens, and of one rank: no rank waits for another.
"gib": on a GPU torch's peak; on a CPU resident memory above what the process had before.
"seconds": the second of two steps.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_pst  # noqa: E402
import train_vrl  # noqa: E402
from lib.attention import attention_name  # noqa: E402
from lib.experiment import load_config  # noqa: E402
from lib.policy import add_lora, set_up  # noqa: E402
from lib.rollout import Rollout  # noqa: E402

# What a batch is assumed to hold, as seen with configs/tiny.yaml.
MEAN_LENGTH = 0.35  # of a trajectory, as a share of the longest
AGENT_SHARE = 0.4  # of a trajectory's tokens, written by the agent
UPDATE_SHARE = 0.65  # of the rollouts, in groups whose rewards differ


def shape_of(config):
    """transformers' config of the language model that section `model` names."""
    from transformers import AutoConfig, Qwen3Config

    m = config.model
    if not m.path:
        return Qwen3Config(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden_size,
            intermediate_size=m.intermediate_size,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.kv_heads,
            head_dim=m.head_dim,
            tie_word_embeddings=True,
        )
    shape = AutoConfig.from_pretrained(m.path)
    if shape.model_type != "qwen3_vl":
        return shape
    # The language part's layers are Qwen3's, with other angles in the rotary embedding.
    text = shape.text_config
    return Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        tie_word_embeddings=shape.tie_word_embeddings,
    )


def nf4(model):
    """Linear layers but the LM head in nf4, in place, as lib.policy.load_policy loads them."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
                continue
            small = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            small.weight = bnb.nn.Params4bit(
                layer.weight.data,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
                module=small,
            )
            setattr(module, name, small.to(layer.weight.device))
    model.is_loaded_in_4bit = True
    return model


def build(config, phase, device):
    """The policy that a phase trains, with random weights."""
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(
            shape_of(config),
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=attention_name(config, device),
        )
    lora = getattr(config, phase).tune == "lora"
    if lora and config.model.quantize == "nf4":
        model = nf4(model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = add_lora(config, model, norm=phase == "vrl" and config.vrl.norm_lr > 0)
    return model.to(device).train()


def make_optimizers(config, phase, model):
    if phase == "pst":
        return train_pst.make_optimizers(config, model, config.pst.stages[0])
    return [train_vrl.make_optimizer(model, config.vrl)]


def largest_batch(config, phase, ranks):
    """(rows, tokens of a row, examples in a row, batches of a step) of one rank: full rows."""
    if phase == "pst":
        rows = math.ceil(config.pst.rows_per_step / ranks)
        micro_rows = min(rows, config.pst.micro_rows)
        batches = math.ceil(rows / config.pst.micro_rows)
        return micro_rows, config.pst.row_len, round(1 / MEAN_LENGTH), batches
    v, length = config.vrl, config.model.max_len
    rows = max(1, v.micro_tokens // length)
    rollouts = UPDATE_SHARE * v.tasks_per_step * v.group_size / ranks / v.minibatches
    batches = max(1, math.ceil(rollouts * MEAN_LENGTH * length / (rows * length)))
    return rows, length, 1, batches


def made_up(rows, length, examples, batches):
    """Examples (ids, loss mask) that fill all rows of a step."""
    rng = random.Random(0)
    size = length // examples
    made = []
    for _ in range(rows * batches * examples):
        ids = [rng.randrange(100) for _ in range(size)]
        mask = [int(rng.random() < AGENT_SHARE) for _ in range(size)]
        made.append((ids, mask))
    return made


def take_step(config, phase, model, optimizers, batch, device):
    """One optimizer step by the training scripts' own functions; returns its seconds."""
    made = made_up(*batch)
    began = time.perf_counter()
    if phase == "pst":
        examples = batch[2]
        rows = [list(range(i, i + examples)) for i in range(0, len(made), examples)]
        train_pst.backward_step(config, model, rows, made, 0, device)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    else:
        rollouts = [
            Rollout(
                {},
                0,
                0,
                ids,
                mask,
                [-1.0] * len(ids),
                trajectory={"ended": "answer"},
                advantage=1.0,
            )
            for ids, mask in made
        ]
        train_vrl.update(model, optimizers[0], rollouts, config)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def resident(name):
    """VmRSS (now) or VmHWM (the highest since it was reset) of this process, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def main():
    phase, path, *rest = sys.argv[1:]
    ranks = next((int(x.partition("=")[2]) for x in rest if x.startswith("ranks=")), 1)
    keys = [x for x in rest if not x.startswith("ranks=")]
    gpu = torch.cuda.is_available()
    config = load_config(path, keys if gpu else ["model.autocast=false", *keys])
    device = set_up(config)

    # Libraries load what they need at first use.
    small = load_config(ROOT / "configs" / "smoke.yaml")
    model = build(small, phase, device)
    optimizers = make_optimizers(small, phase, model)
    take_step(small, phase, model, optimizers, (1, 64, 1, 2), device)
    del model, optimizers

    before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
    if not gpu:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    model = build(config, phase, device)
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # a base that is quantized here was whole once
    optimizers = make_optimizers(config, phase, model)
    batch = largest_batch(config, phase, ranks)
    take_step(config, phase, model, optimizers, batch, device)
    seconds = take_step(config, phase, model, optimizers, batch, device)  # there are moments now
    used = (torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")) - before
    figures = {
        "phase": phase,
        "config": config.name,
        "keys": keys,
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "batch": batch,
        "gib": round(used / 2**30, 2),
        "seconds": round(seconds, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
