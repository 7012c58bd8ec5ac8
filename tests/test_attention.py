"""Attention on every shipped config's heads, with what a GPU's kernels do differently."""

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib import attention as A  # noqa: E402
from lib.attention import attention_name  # noqa: E402
from lib.experiment import Config, load_config  # noqa: E402
from lib.sampler import SlotCache, read_tokens  # noqa: E402

LAYER = SimpleNamespace(is_causal=True, training=False)
# Query heads, key heads and the size of one, by `model.path`: docs/node.md's table.
PRETRAINED = {
    "data/base": (4, 2, 32),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (9, 3, 64),
    "Qwen/Qwen3-0.6B": (16, 8, 128),
    "Qwen/Qwen3-VL-8B-Thinking": (32, 8, 128),
    "Qwen/Qwen3-VL-32B-Thinking": (64, 8, 128),
}
CONFIGS = sorted(
    path.name for path in (ROOT / "configs").glob("*.yaml") if path.stem not in ("fsdp", "visgen")
)


def heads_of(name):
    """(query heads, key heads, size) of a config's policy."""
    model = load_config(ROOT / "configs" / name).model
    return PRETRAINED[model.path] if model.path else (model.heads, model.kv_heads, model.head_dim)


def test_every_config_with_a_policy_is_looked_at():
    assert {"tiny.yaml", "smoke.yaml", "smollm2-135m.yaml", "qwen3vl-8b.yaml"} <= set(CONFIGS)
    assert any(heads_of(name)[0] > heads_of(name)[1] > 1 for name in CONFIGS)


def tensors(heads, kv_heads, width, batch=2, length=12, keys=None):
    """Random query, key and value in the layers' layout: (B, heads, T, d) over (B, T, heads, d)."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, n, count, width, generator=generator).transpose(1, 2)
        for n, count in ((length, heads), (keys or length, kv_heads), (keys or length, kv_heads))
    ]


def plain(query, key, value, visible, scale):
    """softmax(q k^T) v, (B, T, heads, d); visible (B, 1, T, S)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def transposed(monkeypatch):
    """sdpa gives its result as CUDA's kernels do: (B, T, heads, d) in memory, seen transposed."""
    calls = []
    sdpa = F.scaled_dot_product_attention

    def as_on_cuda(*arguments, **settings):
        calls.append(settings)
        return sdpa(*arguments, **settings).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_cuda)
    return calls


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_reads_a_cache_on_a_gpus_layout(transposed, name):
    query, key, value = tensors(*heads_of(name), length=1, keys=7)
    visible = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    visible[1, ..., 5:] = False
    ours, _ = A.packed_sdpa(LAYER, query, key, value, visible, scaling=0.2)
    torch.testing.assert_close(ours, plain(query, key, value, visible, 0.2))
    assert len(transposed) == 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grouped", [True, False])
def test_packed_rows_on_a_gpus_layout(transposed, monkeypatch, name, grouped):
    """With a kernel that reads grouped heads, and with copies of the key heads."""
    monkeypatch.setattr(A, "reads_grouped_heads", lambda *tensors: grouped)
    query, key, value = tensors(*heads_of(name))
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    example = torch.tensor([[0] * 5 + [1] * 7, [2] * 12])
    visible = (example[:, None, :] == example[:, :, None]) & torch.ones(12, 12).tril().bool()
    ours, _ = A.packed_sdpa(LAYER, query, key, value, None, positions, scaling=0.2)
    torch.testing.assert_close(ours, plain(query, key, value, visible[:, None], 0.2))
    several = query.shape[1] > key.shape[1]
    assert [call["enable_gqa"] for call in transposed] == [grouped and several] * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_samplers_step_on_a_gpus_layout(transposed, name):
    """A prompt, then a token at a time through SlotCache: what one pass over all of it gives."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads, kv_heads, width = heads_of(name)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width,
            attn_implementation=attention_name(Config(), torch.device("cpu")),
        )
    ).eval()
    ids = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]
    cache = SlotCache(model, 2)
    with torch.inference_mode():
        read_tokens(model, cache, None, [x[:-2] for x in ids], [0, 0])
        for back in (2, 1):
            starts = [len(x) - back for x in ids]
            new = [[x[start]] for x, start in zip(ids, starts)]
            logits = read_tokens(model, cache, None, new, starts)
        for lane, x in enumerate(ids):
            whole = model(input_ids=torch.tensor([x])).logits[0, -1]
            torch.testing.assert_close(logits[lane], whole, atol=1e-4, rtol=1e-4)


def test_gradients_of_grouped_heads_are_those_of_copies(monkeypatch):
    """Values bit for bit; a key head's gradient is a sum, taken in another order."""
    found = []
    for grouped in (True, False):
        monkeypatch.setattr(A, "reads_grouped_heads", lambda *_, way=grouped: way)
        leaves = [x.requires_grad_() for x in tensors(9, 3, 64)]
        positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
        out, _ = A.packed_sdpa(LAYER, *leaves, None, positions, scaling=0.2)
        (out * torch.arange(64)).sum().backward()
        found.append((out, *(x.grad for x in leaves)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-5)


def test_a_cpu_reads_grouped_heads():
    assert A.reads_grouped_heads(*tensors(4, 2, 8))


# --- torch's varlen kernel, which runs on a GPU alone ---------------------------------------------


@pytest.fixture
def varlen(monkeypatch):
    """A stand-in for torch.nn.attention.varlen.varlen_attn in plain torch, by its signature."""
    import torch.nn.attention.varlen as V

    calls = []
    signature = inspect.signature(V.varlen_attn)

    def attend(*arguments, **settings):
        given = signature.bind(*arguments, **settings).arguments
        q, k, v, bounds = (given[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert bounds.dtype == torch.int32 and torch.equal(bounds, given["cu_seq_k"])
        assert given["max_q"] == given["max_k"] == int(bounds.diff().max())
        assert given["window_size"] == (-1, 0)  # causal
        assert given["enable_gqa"] == (q.shape[1] > k.shape[1])
        calls.append(bounds.tolist())
        out = []
        for start, end in zip(bounds.tolist(), bounds.tolist()[1:]):
            one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            visible = torch.ones(end - start, end - start).tril().bool()
            out.append(plain(*one, visible, given["scale"])[0])
        return torch.cat(out)

    monkeypatch.setattr(V, "varlen_attn", attend)
    return calls


@pytest.mark.parametrize("name", CONFIGS)
def test_short_examples_in_one_varlen_call(varlen, monkeypatch, name):
    query, key, value = tensors(*heads_of(name))
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    right, _ = A.packed_sdpa(LAYER, query, key, value, None, positions, scaling=0.2)
    assert varlen == []
    monkeypatch.setattr(A, "varlen_is_faster", lambda query, examples: True)
    ours, _ = A.packed_sdpa(LAYER, query, key, value, None, positions, scaling=0.2)
    assert varlen == [[0, 5, 12, 24]]
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize(
    "device, dtype, capability, length, examples, wanted",
    [
        ("cuda", torch.bfloat16, (9, 0), 16384, 16, True),  # SmolLM2's shape of docs/gpu.md
        ("cuda", torch.bfloat16, (9, 0), 32768, 8, False),  # Qwen3-8B's
        ("cuda", torch.bfloat16, (9, 0), 1024, 1, False),  # nothing is packed
        ("cuda", torch.float32, (9, 0), 16384, 16, False),
        ("cuda", torch.bfloat16, (7, 5), 16384, 16, False),
        ("cpu", torch.bfloat16, (9, 0), 16384, 16, False),
    ],
)
def test_when_varlen_is_taken(monkeypatch, device, dtype, capability, length, examples, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 9, length, 64))
    assert A.varlen_is_faster(query, examples) == wanted


def test_the_pinned_torch_has_the_varlen_kernel():
    assert A.has_varlen()


# --- the key model.attn ---------------------------------------------------------------------------


def test_auto_is_torchs_own_and_tells_nobody_to_build_a_package(monkeypatch, capsys):
    import transformers.utils

    config = Config()
    for there in (False, True):
        monkeypatch.setattr(
            transformers.utils, "is_flash_attn_2_available", lambda there=there: there
        )
        for device in ("cpu", "cuda"):
            assert attention_name(config, torch.device(device)) == "packed_sdpa"
    assert capsys.readouterr().out == ""
    chosen = replace(config, model=replace(config.model, attn="flash_attention_2"))
    assert attention_name(chosen, torch.device("cuda")) == "packed_varlen"
    with pytest.raises(SystemExit, match="set model.attn=auto"):
        attention_name(chosen, torch.device("cpu"))
