"""Measured memory of one PST step or VRL update of a config, beside what `--plan` says of it: prints JSON. tests/test_plan.py runs it on the CPU.

    python tests/measure_step.py pst configs/smollm2-135m.yaml                # minutes: SmolLM2's shape with random weights, no download
    python tests/measure_step.py vrl configs/qwen3vl-8b.yaml 8 h200           # on a GPU: one of 8 ranks' share of the step
"bytes": on a GPU torch.cuda.max_memory_allocated; on a CPU resident memory above the process's own. "planned": the same parts of the plan.
"seconds": the second of two steps. The language part alone; no rank waits for another.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.plan import assumed_batch, machines, model_shapes, plan

import train_pst
import train_vrl
from lib import attention, policy, sampler  # noqa: E402
from lib.experiment import load_config

PARTS = {
    "weights",
    "adapter",
    "gradients",
    "moments",
    "activations",
    "logits",
    "unpacked",
    "optimizer work",
}  # of the plan, that are measured here


def resident(name):
    """VmRSS (now) or VmHWM (the highest since it was reset) of this process, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def quantize(model):
    """Linear layers but the LM head in nf4, in place, as train_pst.load_policy has them loaded."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                new.weight = bnb.nn.Params4bit(
                    layer.weight.data,
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=True,
                    module=new,
                )
                setattr(module, name, new.to(layer.weight.device))
    model.is_loaded_in_4bit = True
    return model


def build(config, phase, device):
    from transformers import AutoModelForCausalLM

    name = attention.attention_name(config, device)
    with device:
        model = AutoModelForCausalLM.from_config(
            model_shapes(config)[0],
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=name,
        )
    if config.model.quantize == "nf4" and getattr(config, phase).tune == "lora":
        model = quantize(model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if getattr(config, phase).tune == "lora":
        model = policy.add_lora(config, model, norm=phase == "vrl" and config.vrl.norm_lr > 0)
    return model.to(device).train()


def step(config, phase, model, optimizers, rows, length, examples, batches, share, device):
    """One optimizer step by the training scripts' own functions, on made-up tokens."""
    draw = random.Random(0)
    made = [
        (
            [draw.randrange(100) for _ in range(size)],
            [int(draw.random() < share) for _ in range(size)],
        )
        for _ in range(rows * batches * examples)
        for size in [length // examples]
    ]
    if phase == "pst":
        train_pst.backward_step(
            config,
            model,
            [list(range(i, i + examples)) for i in range(0, len(made), examples)],
            made,
            0,
            device,
        )
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    else:
        rollouts = [
            rollout.Rollout(
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


def main():
    phase, path, *rest = sys.argv[1:]
    keys, options = [x for x in rest if "=" in x], [x for x in rest if "=" not in x]
    ranks, hardware = int(options[0]) if options else 1, options[1] if options[1:] else ""
    gpu = torch.cuda.is_available()
    config = load_config(path, keys if gpu else ["model.autocast=false", *keys])
    device = policy.set_up(config)

    def optimizers(model):
        return (
            train_pst.make_optimizers(config, model, config.pst.stages[0])
            if phase == "pst"
            else [train_vrl.make_optimizer(model, config.vrl)]
        )

    small = load_config(Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml")
    model = build(small, phase, device)
    step(
        small, phase, model, optimizers(model), 1, 64, 1, 2, 0.5, device
    )  # libraries load what they need at first use
    del model
    before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
    if not gpu:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    model = build(config, phase, device)
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # a base that is quantized here was whole once
    made = optimizers(model)
    batch = assumed_batch(config, phase, ranks)
    for _ in range(2):  # the second step has moments
        began = time.perf_counter()
        step(config, phase, model, made, *batch, machines()["agent_share"], device)
    seconds = time.perf_counter() - began
    used = (torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")) - before
    p = plan(config, ranks, hardware)
    names = ("PST stage", "PST optimizer") if phase == "pst" else ("VRL update", "VRL optimizer")
    planned = max(sum(x for part, x in p["phases"][n].items() if part in PARTS) for n in names)
    print(
        json.dumps(
            {
                "phase": phase,
                "config": config.name,
                "keys": keys,
                "ranks": ranks,
                "hardware": p["hardware"],
                "bytes": used,
                "planned": planned,
                "off": round(planned / used - 1, 3),
                "gib": round(used / 2**30, 2),
                "process": before,
                "seconds": round(seconds, 2),
                "planned_seconds": round(
                    p["seconds"]["PST step" if phase == "pst" else "VRL update"], 2
                ),
                "batch": batch,
            }
        )
    )


if __name__ == "__main__":
    main()
