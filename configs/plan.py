"""`--plan`: what a config takes, before any data, weights or GPU: parameters, bytes by part and phase, tokens and seconds a step.

Nothing is typed in that the code can tell. The model is built from its shapes out of fake tensors (sizes without numbers), and the very functions
that train it run on them: `token_logprobs`, the backward pass, the optimizer. A ledger beneath them counts the bytes of every tensor that is alive,
which is what torch.cuda.max_memory_allocated would read but for the kernels' own workspaces and the allocator's rounding. Formulas remain for what
fake tensors cannot run: bitsandbytes, vLLM, the sampler's cache. Assumptions stand in data/hardware.yaml, shapes of known models in data/models.yaml.

    from configs.plan import plan
    plan(load_config("configs/qwen3vl-8b.yaml"), ranks=8, hardware="h100")["phases"]["VRL update"]   # bytes of one rank, by part
"""

import itertools
import math
import os
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from configs.checkpoints import trained_parameters
from configs.experiment import ROOT

GIB = 2**30
# Bytes of a weight in nf4: 4 bits, an 8-bit scale for each 64, an fp32 scale for each 256 of these (double quantization, as train_pst loads it).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAM8_BYTES = 2 * (1 + 4 / 256)  # of a weight: two moments of 8 bits, with an fp32 scale for each block of 256
ADAM8_LEAST = 4096              # smaller tensors keep moments in fp32 (bitsandbytes' min_8bit_size)
SWITCH = ("--plan", "say what this config takes (memory, seconds), and exit; nothing is loaded or fetched")
OPTIONS = [("--ranks", None, "--plan: processes, one card each (default: 1)"),
           ("--hardware", None, "--plan: h100, h200, 24gb or cpu (default: cpu for our own sampler, h100 for vLLM); see data/hardware.yaml")]


def machines():
    """data/hardware.yaml; cpu's memory filled in."""
    known = yaml.safe_load((ROOT / "data" / "hardware.yaml").read_text(encoding="utf-8"))
    cpu = known["machines"]["cpu"]
    cpu["gib"] = cpu["gib"] or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return known


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def model_shapes(config):
    """(transformers' config of the language model, parameters of a vision tower beside it) of `model`, without weights. SystemExit: unknown model."""
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3Config

    m = config.model
    if not m.path:
        tokenizer = ROOT / "runs" / config.name / "data" / "tokenizer"
        vocabulary = m.vocab_size
        if tokenizer.is_dir():
            from transformers import AutoTokenizer
            vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
        return Qwen3Config(vocab_size=vocabulary, hidden_size=m.hidden_size, intermediate_size=m.intermediate_size, num_hidden_layers=m.layers,
                           num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim, tie_word_embeddings=True), 0
    known = yaml.safe_load((ROOT / "data" / "models.yaml").read_text(encoding="utf-8"))
    if (Path(m.path) / "config.json").is_file():
        shape = AutoConfig.from_pretrained(m.path)
    elif m.path in known:
        shape = AutoConfig.for_model(**known[m.path])
    else:
        raise SystemExit(f"error: --plan does not know the shapes of model.path {m.path}: no folder with a config.json, nor one of data/models.yaml "
                         f"({', '.join(known)}); give a folder, or add its config there")
    if not hasattr(shape, "vision_config"):
        return shape, 0
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(shape)
    vision = sum(p.numel() for n, p in whole.named_parameters() if "visual" in n)
    text = shape.text_config        # its layers are Qwen3's, with other angles in the rotary embedding: as a plain Qwen3 it has the same sizes
    sizes = {k: getattr(text, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                           "num_key_value_heads", "head_dim")}
    return Qwen3Config(**sizes, tie_word_embeddings=shape.tie_word_embeddings), vision


# ---------------------------------------------------------------------------------------------------------------------
# A training step on fake tensors


class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors by label, their peak, and the FLOPs of matrix products.

    `label` is what new tensors count as; tensors as wide as the vocabulary count as logits. Two operations depend on numbers, which fake tensors
    do not have: nonzero has as many results as `counts` says for its input's size, and an element read by Python comes from `numbers`.
    """

    def __init__(self, vocabulary):
        super().__init__()
        self.label, self.vocabulary, self.counts, self.numbers = "weights", vocabulary, {}, itertools.repeat(1.0)
        self.live, self.known, self.flops = Counter(), {}, 0
        self.reset()

    def reset(self):
        self.peak, self.peak_bytes = dict(self.live), sum(self.live.values())

    def drop(self, key):
        size, label = self.known.pop(key)
        self.live[label] -= size

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        wide = self.label == "activations" and tensor.dim() and tensor.shape[-1] == self.vocabulary
        self.known[storage._cdata] = size, label = storage.nbytes(), "logits" if wide else self.label
        weakref.finalize(storage, self.drop, storage._cdata)
        self.live[label] += size
        if (total := sum(self.live.values())) > self.peak_bytes:
            self.peak, self.peak_bytes = dict(self.live), total

    def relabel(self, tensor, label):
        key = tensor.untyped_storage()._cdata
        size, old = self.known[key]
        self.known[key] = size, label
        self.live[old] -= size
        self.live[label] += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return next(self.numbers)
        if func is torch.ops.aten.nonzero.default:
            return torch.empty((self.counts[args[0].numel()], 1), dtype=torch.long)
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.count(t)
        return out


def make_fake(model, ledger):
    """Put fake tensors in place of a meta model's parameters and buffers, tied ones once. (PEFT cannot add its adapter to fake ones.)"""
    made = {}
    for name, module in model.named_modules():
        ledger.label = "adapter" if "lora_" in name or "modules_to_save" in name else "weights"
        for kept in (module._parameters, module._buffers):
            for key, tensor in kept.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake
                kept[key] = None if tensor is None else made[id(tensor)]


def trace_step(config, shape, phase, rows, length, scored, examples=1, batches=1, autocast=False, layers=None):
    """One optimizer step of `phase` ("pst" or "vrl") on fake tensors: {"backward", "optimizer": {part: bytes at its peak}, "flops", "trained", ...}.

    A batch is `rows` x `length` tokens, each row packed from `examples`; `scored` is the share that the loss reads. With several `batches` a step
    the last one is traced, above the gradients of those before. Moments are there, as from the second step on. `layers`: instead of all.
    """
    from transformers import AutoModelForCausalLM

    import train_pst
    import train_vrl

    part, tokens = getattr(config, phase), rows * length
    eight = part.optimizer == "adamw8bit"
    if eight:                       # its kernels run on real tensors only: moments by formula, no other memory
        config = replace(config, **{phase: replace(part, optimizer="adamw")})
    shape = type(shape)(**{**shape.to_dict(), "num_hidden_layers": layers or shape.num_hidden_layers, "layer_types": None})
    shape.use_cache = False
    name = train_pst.attention_name(config, torch.device("cpu"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.model.dtype), attn_implementation=name)
        total = sum(p.numel() for p in model.parameters())
        linear = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if part.tune == "lora":
            model = train_pst.add_lora(config, model, norm=phase == "vrl" and config.vrl.norm_lr > 0)
    with FakeTensorMode(), Ledger(shape.vocab_size) as ledger:
        make_fake(model, ledger)
        model.train()
        trained = list(trained_parameters(model).values())
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: ledger.relabel(p.grad, "gradients"))

        def fill():
            ledger.label = "gradients"
            for p in trained:
                p.grad = torch.empty_like(p)

        fill()
        result = {}
        if not eight:
            optimizers = [train_vrl.make_optimizer(model, config.vrl)]
            if phase == "pst":
                optimizers = train_pst.make_optimizers(config, model, config.pst.stages[0])
            ledger.label = "moments"
            for o in optimizers:
                o.step()
            ledger.label = "optimizer work"
            ledger.reset()
            for o in optimizers:
                o.step()
            result["optimizer"] = ledger.peak
        for p in trained:
            p.grad = None
        if batches > 1:
            fill()
        ledger.label = "activations"
        ledger.reset()
        before = ledger.flops
        ledger.counts = {tokens: rows * examples, rows * (length - 1): max(1, round(scored * rows * (length - 1)))}
        ledger.numbers = itertools.cycle([i * length // examples + row * length for row in range(rows) for i in range(examples)])
        ids, positions = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
        mask = torch.zeros(rows, length - 1, dtype=torch.bool)
        vrl = {"temperature": config.rollout.temperature, "entropy": True} if phase == "vrl" else {}
        logprobs = train_pst.token_logprobs(model, ids, positions, mask, autocast=autocast, **vrl)
        (logprobs[0] if vrl else logprobs).sum().backward()
        result |= {"backward": ledger.peak, "flops": ledger.flops - before, "total": total, "linear": sum(linear), "largest": max(linear),
                   "trained": sum(p.numel() for p in trained)}
        if eight:
            moments = sum(p.numel() * (ADAM8_BYTES if p.numel() >= ADAM8_LEAST else 8) for p in trained)
            result["backward"]["moments"] = moments
            result["optimizer"] = {k: v for k, v in result["backward"].items() if k in ("weights", "adapter", "moments")}
            result["optimizer"]["gradients"] = sum(p.numel() * p.element_size() for p in trained)
    return result


def extrapolate(config, shape, phase, *args, **kwargs):
    """`trace_step` of all layers from those of two and three, for speed: what each layer adds is the same, so every figure grows linearly.

    (Where no gradients lie there before, the peak may move from the backward pass's start to its end; the latter is the optimizer's.)
    """
    n = shape.num_hidden_layers
    if n <= 4:
        return trace_step(config, shape, phase, *args, **kwargs)
    two, three = (trace_step(config, shape, phase, *args, **kwargs, layers=k) for k in (2, 3))

    def line(a, b):
        return a + (n - 2) * (b - a)

    result = {k: line(two[k], three[k]) for k in ("flops", "total", "linear", "trained")}
    result |= {k: {part: line(two[k].get(part, 0), three[k].get(part, 0)) for part in two[k]} for k in ("backward", "optimizer")}
    return {**result, "largest": three["largest"]}


def assumed_batch(config, phase, ranks):
    """(rows, tokens of a row, examples packed in a row, batches of a step) of one rank: full rows, as the largest batch has."""
    known = machines()
    if phase == "pst":
        share = math.ceil(config.pst.rows_per_step / ranks)
        return min(share, config.pst.micro_rows), config.pst.row_len, round(1 / known["mean_length"]), math.ceil(share / config.pst.micro_rows)
    length, v = config.model.max_len, config.vrl
    rows = max(1, v.micro_tokens // length)
    tokens = known["update_share"] * known["mean_length"] * length * v.tasks_per_step * v.group_size / ranks / v.minibatches
    return rows, length, 1, max(1, math.ceil(tokens / (rows * length)))


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def quantized(traced):
    """Bytes of the language model's linear layers in nf4, and of the one that is unpacked for use."""
    return traced["linear"] * NF4_BYTES, 2 * traced["largest"]


def sampler_parts(config, machine, traced, vision, shape, rows, length, known):
    """Bytes of what samples: ({part: bytes while sampling}, {part: bytes while updating}, tokens of KV cache that fit)."""
    m, gpu = config.model, machine is not known["machines"]["cpu"]
    kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * getattr(shape, "head_dim", shape.hidden_size // shape.num_attention_heads)
    if config.rollout.engine == "transformers":
        rows = max(rows, config.bench.tasks)        # evaluation plays its tasks at once
        slots = 256 * math.ceil((length + 1) / 256)
        # Scores are there in fp32, once more in fp64 with their running sum; the cache is there twice while it grows.
        work = {"KV cache": 2 * rows * slots * kv * 4, "logits": rows * shape.vocab_size * (4 + 4 + 8 + 8)}
        copy = {"sampler": (traced["total"] + vision) * 4}
        return {**copy, **work}, copy, rows * slots
    width = 2 if gpu or m.dtype == "bfloat16" else 4
    weights = traced["total"] * width      # without a vision tower
    if m.quantize == "nf4":
        weights += traced["linear"] * (1 - width)      # vLLM's fp8
    cache = config.rollout.gpu_memory * machine["gib"] * GIB - weights - known["vllm_gib"] * GIB if gpu else config.rollout.kv_gib * GIB
    awake = {"vLLM weights": weights, "KV cache": max(0, cache), **({"vLLM work": known["vllm_gib"] * GIB} if gpu else {})}
    asleep = {"vLLM asleep": known["asleep_gib"] * GIB} if gpu and config.rollout.sleep else awake
    return awake, asleep, int(max(0, cache) // (kv * width))


def plan(config, ranks=1, hardware=""):
    """What one rank of `ranks` takes on a machine of data/hardware.yaml: a dict with

    "parameters" {total, language, vision, trained in each phase}, "phases" {phase: {part: bytes}}, "peak" (phase, bytes), "memory" (bytes there are),
    "tokens" and "seconds" of a step, "kv_tokens", "warnings" [lines] and the assumed rollouts. "process" is a part of each phase.
    """
    from train_pst import use_autocast

    known = machines()
    hardware = hardware or ("cpu" if config.rollout.engine == "transformers" else "h100")
    if hardware not in known["machines"]:
        raise SystemExit(f"error: --hardware is {hardware!r}; data/hardware.yaml knows {', '.join(known['machines'])}")
    machine, kind, m, v = known["machines"][hardware], "cpu" if hardware == "cpu" else "gpu", config.model, config.vrl
    shape, vision = model_shapes(config)
    autocast = m.autocast if kind == "gpu" else use_autocast(config, torch.device("cpu"))
    batches = {phase: assumed_batch(config, phase, ranks) for phase in ("pst", "vrl")}
    traced = {phase: extrapolate(config, shape, phase, rows, length, known["agent_share"], examples, n, autocast)
              for phase, (rows, length, examples, n) in batches.items()}
    pst, vrl = traced["pst"], traced["vrl"]
    frozen, unpacked = {"process": known["process_gib"][kind] * GIB, "vision tower": vision * getattr(torch, m.dtype).itemsize}, {}
    for phase, t in traced.items():
        if m.quantize == "nf4" and getattr(config, phase).tune == "lora":
            packed, unpacked = quantized(t)[0] - t["linear"] * getattr(torch, m.dtype).itemsize, {"unpacked": quantized(t)[1]}
            for part in (t["backward"], t["optimizer"]):
                part["weights"] += packed
    length = round(known["mean_length"] * m.max_len)
    sequences = math.ceil(v.tasks_per_step * v.group_size / ranks)
    awake, asleep, kv_tokens = sampler_parts(config, machine, vrl, vision, shape, sequences, length, known)
    idle = {k: x for k, x in vrl["backward"].items() if k in ("weights", "adapter", "moments")}
    phases = {"PST stage": {**frozen, **unpacked, **pst["backward"]}, "PST optimizer": {**frozen, **pst["optimizer"]},
              "VRL sampling": {**frozen, **idle, **awake}, "VRL update": {**frozen, **asleep, **unpacked, **vrl["backward"]},
              "VRL optimizer": {**frozen, **asleep, **vrl["optimizer"]}}
    phases = {name: {k: round(x) for k, x in parts.items() if x} for name, parts in phases.items()}
    peak = max(phases, key=lambda name: sum(phases[name].values()))

    # Seconds.
    bf16 = autocast or m.dtype == "bfloat16"
    rate = machine["bf16_tflops" if bf16 else "fp32_tflops"] * 1e12
    heads = shape.num_hidden_layers * shape.num_attention_heads * getattr(shape, "head_dim", shape.hidden_size // shape.num_attention_heads)
    passes = 4.5 if m.gradient_checkpointing else 3.5        # attention's forward pass counts 1, its backward pass 2.5
    rows, row_len, examples, n = batches["pst"]
    pst_flops = n * (pst["flops"] + passes * 2 * heads * rows * row_len**2 / examples)
    rollouts = known["update_share"] * sequences
    vrl_flops = rollouts * (vrl["flops"] * length / (batches["vrl"][0] * batches["vrl"][1]) + passes * 2 * heads * length**2)
    vrl_flops *= 1 + ((v.kl_coef > 0) + (v.minibatches > 1)) / 3       # passes without gradient
    weights = awake.get("vLLM weights") or awake["sampler"]
    sample_rate = machine["bf16_tflops" if config.rollout.engine == "vllm" and bf16 else "fp32_tflops"] * 1e12
    together = min(sequences, max(1, kv_tokens // length), config.rollout.max_rows) if config.rollout.engine == "vllm" else sequences
    kv_bytes = 2 * heads // shape.num_attention_heads * shape.num_key_value_heads * (2 if config.rollout.engine == "vllm" and bf16 else 4)
    a_step = max((weights + together * length / 2 * kv_bytes) / (machine["gb_s"] * 1e9), 2 * vrl["total"] * together / sample_rate)
    decode = sequences / together * known["agent_share"] * length * a_step / known["decode_use"][kind]
    read = 2 * vrl["total"] * (1 - known["agent_share"]) * length * sequences / sample_rate / known["train_use"][kind]
    seconds = {"PST step": pst_flops / rate / known["train_use"][kind], "VRL sampling": decode + read,
               "VRL update": vrl_flops / rate / known["train_use"][kind]}
    result = {"hardware": hardware, "ranks": ranks, "memory": machine["gib"] * GIB, "phases": phases, "peak": (peak, sum(phases[peak].values())),
              "parameters": {"total": pst["total"] + vision, "language": pst["total"], "vision": vision,
                             "PST": pst["trained"], "VRL": vrl["trained"]},
              "tokens": {"PST step": config.pst.rows_per_step * row_len, "VRL step": v.tasks_per_step * v.group_size * length},
              "seconds": seconds, "kv_tokens": kv_tokens, "sequences": sequences, "length": length, "together": together,
              "batches": batches, "autocast": autocast, "layers": shape.num_hidden_layers}
    return {**result, "warnings": plan_warnings(config, result)}


def plan_warnings(config, result):
    """What does not fit, one line each, with the keys that mend it."""
    lines, m, r = [], config.model, config.rollout
    gpu = result["hardware"] != "cpu"
    for name, parts in result["phases"].items():
        need = sum(parts.values())
        if need <= result["memory"]:
            continue
        phase = "pst" if name.startswith("PST") else "vrl"
        part = getattr(config, phase)
        keys = []
        if name in ("PST stage", "VRL update"):
            keys += [] if m.gradient_checkpointing else ["model.gradient_checkpointing=true"]
            rows, length = result["batches"][phase][:2]
            smaller = f"pst.micro_rows={rows // 2}" if phase == "pst" else f"vrl.micro_tokens={rows // 2 * length}"
            keys.append(smaller if rows > 1 else f"a lower {'pst.row_len' if phase == 'pst' else 'model.max_len'} than {length}")
        if part.tune == "full":
            keys += [f"{phase}.tune=lora", "FSDP (configs/fsdp.yaml) over more ranks"]
        elif m.quantize == "none" and gpu:
            keys += ["model.quantize=nf4"]
        if part.optimizer == "adamw" and part.tune == "full":
            keys += [f"{phase}.optimizer=adamw8bit"]
        if m.dtype == "float32":
            keys += ["model.dtype=bfloat16"]
        if name == "VRL sampling" and r.engine == "vllm" and gpu:
            keys = ["a lower rollout.gpu_memory", *keys]
        if name == "VRL update" and r.engine == "vllm" and gpu and not r.sleep:
            keys = ["rollout.sleep=true", *keys]
        lines.append(f"warning: {name} does not fit: {need / GIB:.1f} GiB a rank, {result['memory'] / GIB:.1f} are there; "
                     f"mend it by {', or '.join(keys)}")
    if r.engine == "vllm" and not result["kv_tokens"]:
        lines.append("warning: vLLM does not fit: its weights leave no room for a KV cache in its share; "
                     + ("raise rollout.gpu_memory" + ("" if m.quantize == "nf4" else ", or model.quantize=nf4") if gpu else "raise rollout.kv_gib"))
    elif r.engine == "vllm" and result["together"] < result["sequences"]:
        lines.append(f"warning: of {result['sequences']} rollouts a rank, {result['together']} run at once, the others wait for room: "
                     "raise rollout.gpu_memory, rollout.max_rows or the number of ranks")
    return lines


def asked_for_plan(config, given):
    """Whether `--plan` was given; prints the plan then, for the options --ranks and --hardware. SystemExit: these without it."""
    alone = sorted(given.keys() & {name for name, *_ in OPTIONS})
    if "--plan" in given:
        print_plan(config, given)
    elif alone:
        raise SystemExit(f"error: {alone[0]} is an option of --plan; give --plan too, or leave it out: a launcher says how many ranks there are "
                         "(accelerate launch --num_processes 8 ...)")
    return "--plan" in given


def print_plan(config, given):
    """Print the plan of `config` for the options --ranks and --hardware."""
    ranks = given.get("--ranks", "1")
    if not ranks.isdigit() or int(ranks) < 1:
        raise SystemExit(f"error: --ranks is {ranks!r}; it must be a whole number of at least 1")
    p, known = plan(config, int(ranks), given.get("--hardware", "")), machines()
    n = p["parameters"]
    print(f"{config.name}: {ranks} x {p['hardware']}, {p['memory'] / GIB:.1f} GiB each. Nothing is loaded or fetched for this.")
    print(f"parameters   {n['total']:,}" + (f" ({n['vision']:,} of the vision tower, frozen)" if n["vision"] else "")
          + f"; trained in PST {n['PST']:,} ({config.pst.tune}), in VRL {n['VRL']:,} ({config.vrl.tune})")
    print("\nmemory of one rank, GiB")
    for name, parts in p["phases"].items():
        total = sum(parts.values())
        print(f"  {name:14} {total / GIB:7.2f} = " + " + ".join(f"{k} {x / GIB:.2f}" for k, x in parts.items() if x >= 0.005 * GIB))
    print(f"  peak           {p['peak'][1] / GIB:7.2f}   {p['peak'][0]}; {p['memory'] / GIB:.1f} are there")
    for phase in ("pst", "vrl"):
        rows, length, examples, batches = p["batches"][phase]
        packed = f", {examples} examples a row" if examples > 1 else ""
        print(f"  {phase.upper()}: {batches} forward passes a step of {rows} x {length:,} tokens{packed}")
    need = p["sequences"] * p["length"]
    if config.rollout.engine == "vllm":
        print(f"  KV cache: {p['kv_tokens']:,} tokens fit; {p['sequences']} rollouts of {p['length']:,} are {need:,}: "
              + ("all run at once" if p["together"] == p["sequences"] else f"{p['together']} run at once"))
    print(f"\ntokens a step    PST {p['tokens']['PST step']:,}; VRL {p['tokens']['VRL step']:,} "
          f"({config.vrl.tasks_per_step} x {config.vrl.group_size} rollouts of {p['length']:,}), all ranks together")
    s = p["seconds"]
    print(f"seconds a step   PST {s['PST step']:.1f}; VRL {s['VRL sampling'] + s['VRL update']:.1f} (sampling {s['VRL sampling']:.1f}, "
          f"update {s['VRL update']:.1f}); estimates, the environment and judge not counted")
    kind = "cpu" if p["hardware"] == "cpu" else "gpu"
    machine = known["machines"][p["hardware"]]
    print(f"assumed (data/hardware.yaml): {machine['bf16_tflops']} TFLOP/s in bf16, {machine['fp32_tflops']} in fp32, {machine['gb_s']} GB/s, "
          f"training at {known['train_use'][kind]:.0%} and decoding at {known['decode_use'][kind]:.0%} of these; "
          f"rollouts of {known['mean_length']:.0%} of model.max_len, {known['agent_share']:.0%} the agent's, "
          f"{known['update_share']:.0%} of them in groups with a spread")
    if kind == "cpu":
        print("On a CPU glibc's malloc keeps what was freed in pieces and may take twice as much; "
              "with MALLOC_MMAP_THRESHOLD_=65536 in the environment it gives all back at once: the figures hold, and steps are slower.")
    for line in p["warnings"] or ["it fits"]:
        print(line)
