"""--plan: bytes against measured ones, parameters against real models, what does not fit."""

import json
import os
import subprocess
import sys

import pytest
import torch

import train_pst
from configs.experiment import ROOT, load_config
from configs.plan import GIB, NF4_BYTES, assumed_batch, extrapolate, machines, model_shapes, plan, trace_step

# glibc keeps freed pieces of its heap otherwise (a VRL update of tiny.yaml: 1.24 GB instead of 0.65); the plan counts what is alive.
ENVIRONMENT = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def config_of(name, *overrides):
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


@pytest.mark.parametrize(("phase", "overrides"), [
    ("pst", []), ("vrl", ["vrl.tasks_per_step=3"]), ("vrl", ["vrl.tasks_per_step=1", "vrl.tune=full", "vrl.kl_coef=0", "vrl.norm_lr=0",
                                                             "vrl.micro_tokens=4608", "model.gradient_checkpointing=true"])])
def test_the_planned_bytes_of_a_step_are_within_a_fifth_of_the_measured_ones(phase, overrides):
    run = subprocess.run([sys.executable, "tests/measure_step.py", phase, "configs/tiny.yaml", *overrides], cwd=ROOT, env=ENVIRONMENT,
                         capture_output=True, text=True, check=True)
    measured, planned = (json.loads(run.stdout.splitlines()[-1])[k] for k in ("bytes", "planned"))
    assert planned == pytest.approx(measured, rel=0.2), f"planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"


def test_saved_activations_are_those_that_autograd_keeps():
    """The ledger's activations at their peak, without a loss to speak of, against what saved_tensors_hooks sees on real tensors."""
    config = config_of("smoke", "model.autocast=false", "vrl.kl_coef=0", "vrl.tune=full", "vrl.norm_lr=0")
    shape = model_shapes(config)[0]
    from transformers import AutoModelForCausalLM
    name = train_pst.attention_name(config, torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation=name).train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    ids, mask = torch.zeros(2, 512, dtype=torch.long), torch.zeros(2, 511, dtype=torch.bool)
    mask[:, :4] = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        train_pst.token_logprobs(model, ids, torch.arange(512).expand(2, -1), mask)
    saved = sum(size for size, _ in kept.values())
    traced = trace_step(config, shape, "vrl", 2, 512, 8 / 1022)["backward"]["activations"]
    assert saved <= traced <= 1.25 * saved          # above them stand the tensors in work, the largest first


def test_layers_beyond_three_are_extrapolated_exactly():
    config = config_of("smollm2-135m", "model.autocast=false")
    shape = model_shapes(config)[0]
    shape.num_hidden_layers = 7
    for phase in ("pst", "vrl"):
        rows, length, examples, batches = assumed_batch(config, phase, 1)
        whole = trace_step(config, shape, phase, rows, length, 0.4, examples, batches)
        quick = extrapolate(config, shape, phase, rows, length, 0.4, examples, batches)
        for part in ("backward", "optimizer"):
            assert sum(quick[part].values()) == pytest.approx(sum(whole[part].values()), rel=0.01)
        assert (quick["total"], quick["trained"]) == (whole["total"], whole["trained"])
        assert quick["flops"] == pytest.approx(whole["flops"])


def test_parameters_are_those_of_the_real_models():
    assert plan(config_of("qwen3vl-8b"), 8)["parameters"] == {"total": 8_767_123_696, "language": 8_190_735_360, "vision": 576_388_336,
                                                              "PST": 87_293_952, "VRL": 87_293_952}
    config = config_of("smoke")
    model = torch.nn.Module()
    from transformers import AutoModelForCausalLM
    model = train_pst.add_lora(config, AutoModelForCausalLM.from_config(model_shapes(config)[0]), norm=config.vrl.norm_lr > 0)
    assert plan(config)["parameters"]["VRL"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_local_folder_is_read_instead_of_the_table(tmp_path):
    from transformers import LlamaConfig
    LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                tie_word_embeddings=True).save_pretrained(tmp_path)
    shape, vision = model_shapes(config_of("smollm2-135m", f"model.path={tmp_path}"))
    assert (shape.vocab_size, shape.hidden_size, vision) == (96, 32, 0)
    with pytest.raises(SystemExit, match="does not know the shapes of model.path nobody/nothing"):
        model_shapes(config_of("smollm2-135m", "model.path=nobody/nothing"))


def test_what_does_not_fit_is_said_with_the_keys_that_mend_it():
    assert not [w for w in plan(config_of("qwen3vl-8b"), 8)["warnings"] if "does not fit" in w]
    full = "\n".join(plan(config_of("qwen3vl-8b", "pst.tune=full", "model.gradient_checkpointing=false"), 8)["warnings"])
    assert "PST stage does not fit" in full
    assert all(k in full for k in ("model.gradient_checkpointing=true", "pst.tune=lora", "FSDP"))
    greedy = plan(config_of("qwen3vl-8b", "rollout.gpu_memory=0.95"), 8)["warnings"]
    assert any("VRL sampling does not fit" in w and "lower rollout.gpu_memory" in w for w in greedy)
    starved = plan(config_of("qwen3vl-8b", "rollout.gpu_memory=0.2"), 8)["warnings"]
    assert any("no room for a KV cache" in w and "raise rollout.gpu_memory" in w for w in starved)


def test_nf4_packs_the_language_models_linear_layers_alone():
    parts = [plan(config_of("qwen3vl-8b", f"model.quantize={q}"), 8)["phases"]["VRL update"] for q in ("none", "nf4")]
    linear = 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288)
    assert parts[0]["weights"] - parts[1]["weights"] == pytest.approx(linear * (2 - NF4_BYTES), rel=1e-6)
    assert parts[1]["unpacked"] == 4096 * 12288 * 2


def test_the_command_prints_a_plan_and_makes_nothing():
    for script in ("train_pst.py", "train_vrl.py"):
        run = subprocess.run([sys.executable, script, "--config", "configs/smoke.yaml", "--plan", "name=never-made"], cwd=ROOT, env=ENVIRONMENT,
                             capture_output=True, text=True, check=True)
        assert all(word in run.stdout for word in ("memory of one rank", "peak", "tokens a step", "seconds a step", "it fits"))
        assert not (ROOT / "runs" / "never-made").exists()
        run = subprocess.run([sys.executable, script, "--config", "configs/smoke.yaml", "--ranks", "8", "name=never-made"], cwd=ROOT, env=ENVIRONMENT,
                             capture_output=True, text=True)
        assert run.returncode == 1 and "--ranks is an option of --plan" in run.stderr
    with pytest.raises(SystemExit, match="knows h100"):
        plan(config_of("smoke"), hardware="abacus")
    assert machines()["machines"]["cpu"]["gib"] * GIB > GIB
