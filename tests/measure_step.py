"""Measured memory of one PST step or VRL update of a config, for tests/test_plan.py: prints JSON, bytes of resident memory above the process's own.

    python tests/measure_step.py pst configs/smollm2-135m.yaml      # minutes: SmolLM2's shape with random weights, no download
"""

import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_pst
import train_vrl
from configs.experiment import load_config
from configs.plan import assumed_batch, machines, model_shapes


def resident(name):
    """VmRSS (now) or VmHWM (the highest since it was reset) of this process, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def build(config, phase):
    from transformers import AutoModelForCausalLM

    name = train_pst.attention_name(config, torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(model_shapes(config)[0], dtype=getattr(torch, config.model.dtype), attn_implementation=name)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if getattr(config, phase).tune == "lora":
        model = train_pst.add_lora(config, model, norm=phase == "vrl" and config.vrl.norm_lr > 0)
    return model.train()


def step(config, phase, model, optimizers, rows, length, examples, batches, share):
    """One optimizer step by the training scripts' own functions, on made-up tokens."""
    draw = random.Random(0)
    made = [([draw.randrange(100) for _ in range(size)], [int(draw.random() < share) for _ in range(size)])
            for _ in range(rows * batches * examples) for size in [length // examples]]
    if phase == "pst":
        train_pst.backward_step(config, model, [list(range(i, i + examples)) for i in range(0, len(made), examples)], made, 0, torch.device("cpu"))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    else:
        rollouts = [train_vrl.Rollout({}, 0, 0, ids, mask, [-1.0] * len(ids), trajectory={"ended": "answer"}, advantage=1.0) for ids, mask in made]
        train_vrl.update(model, optimizers[0], rollouts, config)


def main():
    phase, path, *overrides = sys.argv[1:]
    config = load_config(path, ["model.autocast=false", *overrides])
    train_pst.set_up(config)

    def optimizers(model):
        return train_pst.make_optimizers(config, model, config.pst.stages[0]) if phase == "pst" else [train_vrl.make_optimizer(model, config.vrl)]

    small = load_config(Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml")
    model = build(small, phase)
    step(small, phase, model, optimizers(model), 1, 64, 1, 2, 0.5)      # libraries load what they need at first use
    del model
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")                         # the high-water mark starts here
    began = time.perf_counter()
    model = build(config, phase)
    made = optimizers(model)
    batch = assumed_batch(config, phase, 1)
    for _ in range(2):                                                    # the second step has moments
        began = time.perf_counter()
        step(config, phase, model, made, *batch, machines()["agent_share"])
    print(json.dumps({"bytes": resident("VmHWM") - before, "process": before, "seconds": time.perf_counter() - began, "batch": batch}))


if __name__ == "__main__":
    main()
