"""What a node needs: attention by packed rows, chat templates, quantized bases and 8-bit optimizers, Qwen3-VL with a user's pictures.

    python -m pytest tests/test_node.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_pst
import train_pst as P
from configs.checkpoints import read_checkpoint, restore, save_checkpoint
from configs.experiment import Config, DataConfig, ModelConfig, PstConfig, Stage
from test_pst import run  # noqa: F401

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = torch.nn.Module()       # what an attention function reads of its layer
LAYER.num_key_value_groups, LAYER.is_causal = 2, True


def small_config(**model):
    """Hidden 32, two blocks; keyword arguments go to section `model`."""
    shape = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16,
             "max_len": 1024, "autocast": False, "lora_rank": 4, "lora_alpha": 8}
    return Config(name="test", threads=1, device="cpu", pst=PstConfig(row_len=512, rows_per_step=2, micro_rows=1, save_every=3),
                  data=DataConfig(general=20), model=ModelConfig(**{**shape, **model}))


SYSTEM, USER = {"role": "system", "content": "You are an agent."}, {"role": "user", "content": "Make three images of a copper kettle."}
CALL = {"role": "assistant", "content": '<think>\nthree\n</think>\n\n<tool_call>\n{"name": "tool_text2image_gpt", "arguments": {"n": 3}}\n</tool_call>'}
TOOL = {"role": "tool", "content": '{"ids": ["img_1", "img_2"]}'}
DONE = {"role": "assistant", "content": '<think>done</think><answer>{"deliverables": ["img_1"]}</answer>'}
SCHEMA = [{"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object", "properties": {}}}}]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def save_tokenizer(folder, control=QWEN, tags=QWEN_TAGS, eos="<|im_end|>", pad="<|endoftext|>", bos=None):
    """A byte-level BPE of 500 tokens in `folder`: as Qwen3-VL's, or with other control tokens and tags."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([m["content"] for m in (SYSTEM, USER, CALL, TOOL, DONE)], trainers.BpeTrainer(
        vocab_size=500, special_tokens=control, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, bos_token=bos, clean_up_tokenization_spaces=False).save_pretrained(folder)


SMOLLM2 = {"control": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], "tags": [], "pad": "<|im_end|>", "bos": "<|im_start|>"}
# Qwen3 takes the thoughts out of turns before the last user message (its template, cut down to that).
STRIPPING = """{%- set last = namespace(user=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- set content = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' and loop.index0 < last.user else m.content %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["qwen-qwen3", "qwen-chatml", "smollm2-chatml", "smollm2-qwen3", "base-qwen3"])
def spoken(request, tmp_path):
    """(tokenizer, template) of every kind of model with either template; `base`: a pretrained model whose own end is not the turn's."""
    kind, template = request.param.split("-")
    save_tokenizer(tmp_path, **{"qwen": {}, "smollm2": SMOLLM2, "base": {"eos": "<|endoftext|>"}}[kind])
    return P.load_tokenizer(small_config(path=str(tmp_path), template=template), tmp_path), template


@pytest.mark.parametrize("messages, tools", [([SYSTEM, USER, CALL, TOOL, TOOL, DONE], None), ([SYSTEM, USER, CALL, TOOL, DONE, USER, DONE], SCHEMA),
                                             ([USER, CALL, USER, DONE], SCHEMA), ([USER, CALL, TOOL, DONE], None)])
def test_turn_by_turn_is_the_whole_dialogue(spoken, messages, tools):
    tokenizer, template = spoken
    ids, mask = P.encode_trajectory(tokenizer, messages, tools)
    text = P.render(tokenizer, messages, tools)
    assert tokenizer.decode(ids) + "\n" == text and ids == tokenizer.encode(text[:-1], add_special_tokens=False)
    trained = "".join(tokenizer.decode([i]) for i, m in zip(ids, mask) if m)
    assert trained == "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    for n in range(1, len(messages)):
        assert text.startswith(P.render(tokenizer, messages[:n], tools))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id is not None


def test_qwen3_reads_as_qwen_does(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = P.load_tokenizer(small_config(path=str(tmp_path), template="qwen3"), tmp_path)
    text = P.render(tokenizer, [SYSTEM, USER, CALL, TOOL], SCHEMA, generate=True)
    assert text.startswith("<|im_start|>system\nYou are an agent.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
                           'provided with function signatures within <tools></tools> XML tags:\n<tools>\n{"type": "function"')
    assert text.endswith(f"{CALL['content']}<|im_end|>\n<|im_start|>user\n<tool_response>\n{TOOL['content']}\n</tool_response><|im_end|>\n"
                         "<|im_start|>assistant\n")


@pytest.mark.parametrize("forged", ["<|im_end|>", "<|vision_start|>", "<|image_pad|>"])
def test_forged_control_tokens_are_refused_and_tags_are_not(tmp_path, forged):
    save_tokenizer(tmp_path)
    tokenizer = P.load_tokenizer(small_config(path=str(tmp_path), template="qwen3"), tmp_path)
    for i, m in enumerate([SYSTEM, USER, CALL, TOOL, DONE]):
        messages = [SYSTEM, USER, CALL, TOOL, DONE]
        messages[i] = dict(m, content=m["content"] + forged)
        with pytest.raises(ValueError, match="control tokens"):
            P.encode_trajectory(tokenizer, messages)
        messages[i] = dict(m, content=m["content"] + "".join(QWEN_TAGS))
        assert P.encode_trajectory(tokenizer, messages)[0]


def test_a_template_that_strips_thoughts_is_refused_with_the_fix(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = P.load_tokenizer(small_config(path=str(tmp_path), template="qwen3"), tmp_path)
    tokenizer.chat_template = STRIPPING
    with pytest.raises(SystemExit, match="rewrites history.*model.template=qwen3"):
        P.check_template(tokenizer)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.fixture
def flash(monkeypatch):
    """transformers' flash_attention_2 over a varlen function in plain torch, which notes its calls: no GPU, but the same way there."""
    import transformers.modeling_flash_attention_utils as T

    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        """q (N, heads, d), k and v (N, kv heads, d) of examples laid end to end, bounds (examples + 1,) int32 -> (N, heads, d)."""
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32 and q.dtype == torch.bfloat16
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        calls.append(cu_seqlens_q.tolist())
        out = []
        for a, b in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:]):
            one = [x[a:b].float().transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v)]
            scores = (one[0] @ one[1].transpose(1, 2) * softmax_scale).masked_fill(~torch.ones(b - a, b - a).tril().bool(), -torch.inf)
            out.append((scores.softmax(-1) @ one[2]).transpose(0, 1))
        return torch.cat(out).to(q.dtype)

    monkeypatch.setattr(T, "_lazy_imports", lambda *args, **kwargs: (None, varlen, None, None, None))
    monkeypatch.setattr(T, "_loaded_implementation", None)
    return calls


@pytest.mark.parametrize("lengths", [[[5, 9, 2], [16]], [[16], [16]], [[7, 9]]])
def test_flash_gets_the_bounds_of_packed_examples(flash, lengths):
    """Also of several packed rows, where transformers by itself would let the examples see each other, and of padded rows."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(len(lengths), heads, 16, 8, generator=generator) for heads in (4, 2, 2))
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    right, _ = P.packed_sdpa(LAYER, query, key, value, None, positions, scaling=0.4, is_causal=True)
    ours, _ = P.packed_flash(LAYER, *(x.bfloat16() for x in (query, key, value)), None, positions, scaling=0.4)
    ends = [0] + torch.tensor([n for row in lengths for n in row]).cumsum(0).tolist()
    assert flash == [ends]
    torch.testing.assert_close(ours.float(), right, atol=3e-2, rtol=0)


def test_flash_leaves_float32_and_masks_to_sdpa(flash):
    query, key, value = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))
    positions, mask = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.ones(6, 6).tril().bool()[None, None]
    arguments = [((query, key, value), None), (tuple(x.bfloat16() for x in (query, key, value)), mask)]
    for tensors, seen in arguments:
        ours, _ = P.packed_flash(LAYER, *tensors, seen, positions, scaling=0.4)
        torch.testing.assert_close(ours, P.packed_sdpa(LAYER, *tensors, seen, positions, scaling=0.4)[0])
    assert flash == []


def test_attention_follows_the_device_and_what_is_installed(monkeypatch, capsys):
    import transformers.utils

    P.warn_once.cache_clear()
    assert P.attention_name(small_config(), CPU) == "packed_sdpa" and capsys.readouterr().out == ""
    for _ in range(2):
        assert P.attention_name(small_config(), CUDA) == "packed_sdpa"
    assert capsys.readouterr().out.count("pip install flash-attn --no-build-isolation") == 1
    for device in (CPU, CUDA):
        with pytest.raises(SystemExit, match="pip install flash-attn --no-build-isolation"):
            P.attention_name(small_config(attn="flash_attention_2"), device)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert P.attention_name(small_config(), CUDA) == P.attention_name(small_config(attn="flash_attention_2"), CUDA) == "packed_flash"
    assert P.attention_name(small_config(attn="sdpa"), CUDA) == "sdpa"
    assert P.attention_name(small_config(), CPU) == "packed_sdpa"


# --- adapters, 4 bits, 8-bit moments ----------------------------------------------------------------------------------


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; requirements-gpu.txt has it")


@pytest.fixture
def base(run, tmp_path):  # noqa: F811
    """(config, folder): a policy in a folder, and the config of a LoRA run from it."""
    config = small_config()
    tokenizer = P.load_tokenizer(config, run)
    P.save_policy(P.build_policy(config, tokenizer, CPU), tokenizer, tmp_path / "base")
    return replace(config, model=replace(config.model, path=str(tmp_path / "base")), pst=replace(
        config.pst, tune="lora", stages=[Stage(0.5, 5, lr=0.01)])), tmp_path / "base"


def moved(policy, by=0.1):
    """The adapter away from zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in P.trained_parameters(policy).items():
            if "lora_B" in name:
                p.normal_(0, by, generator=generator)
    return policy


def score(model, tokenizer, messages=(SYSTEM, USER, CALL, TOOL, DONE)):
    """Log-probabilities of the agent's tokens."""
    ids, mask = P.encode_trajectory(tokenizer, list(messages))
    ids, mask = torch.tensor([ids]), torch.tensor([mask])
    with torch.no_grad():
        return P.token_logprobs(model, ids, torch.arange(ids.shape[1])[None], mask[:, 1:])[mask[:, 1:] == 1]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_resume_with_8_bit_moments_equals_a_straight_run(bnb, run, tmp_path, monkeypatch, tune):  # noqa: F811
    test_pst.test_resume_equals_a_straight_run(run, tmp_path, monkeypatch, tune, "adamw8bit")


def test_8_bit_moments_are_8_bits_and_come_back(bnb, base, tmp_path):
    config, folder = base
    config = replace(config, vrl=replace(config.vrl, optimizer="adamw8bit"), model=replace(config.model, lora_rank=128))
    import train_vrl

    tokenizer = P.load_tokenizer(config, tmp_path)
    made = []
    for _ in range(2):
        policy = P.add_lora(config, P.load_policy(folder, config, tokenizer, CPU))
        made.append((policy, train_vrl.make_optimizer(policy, config.vrl)))
    ids = torch.tensor([[3, 4, 5, 6]])

    def step(policy, optimizer):
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(*made[0])
    save_checkpoint(tmp_path / "step-1", made[0][0], [made[0][1]], {"config": P.config_digest(config)})
    restore(made[1][0], [made[1][1]], *read_checkpoint(config, tmp_path / "step-1"))
    for policy, optimizer in made:
        step(policy, optimizer)
        states = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]
        assert {s["state1"].dtype for s in states} == {torch.uint8, torch.float32} and {s["step"] for s in states} == {2}     # below 4,096 elements: fp32
    assert all(torch.equal(a, b) for a, b in zip(*(P.trained_parameters(p).values() for p, _ in made)))


def test_an_adapter_of_a_checkpoint_loads_in_transformers(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, folder = base
    tokenizer = P.load_tokenizer(config, tmp_path)
    policy = moved(P.add_lora(config, P.load_policy(folder, config, tokenizer, CPU)))
    save_checkpoint(tmp_path / "step-1", policy, [], {"config": ""})
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "step-1")
    torch.testing.assert_close(score(theirs, tokenizer), score(policy, tokenizer), atol=1e-5, rtol=0)
    assert (score(policy, tokenizer) - score(P.load_policy(folder, config, tokenizer, CPU), tokenizer)).abs().max() > 1e-3


def test_pst_in_4_bits_merges_into_the_base_itself(bnb, base, run, tmp_path, monkeypatch):  # noqa: F811
    from safetensors.torch import load_file

    config, folder = base
    config = replace(config, model=replace(config.model, quantize="nf4"))
    monkeypatch.setattr(P, "ensure_data", lambda config, run: None)
    work = test_pst.copy_run(run, tmp_path / "work", monkeypatch)
    final = load_file(P.train_pst(config, work) / "model.safetensors")
    begun, checkpoint = load_file(folder / "model.safetensors"), P.list_checkpoints(work / "pst")[-1]
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert final.keys() == begun.keys() and all(w.dtype == torch.float32 for w in final.values())
    changed = 0
    for name, w in final.items():
        factors = [adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight") for x in "BA"]
        delta = 0 if factors[0] is None else factors[0] @ factors[1] * config.model.lora_alpha / config.model.lora_rank
        changed += factors[0] is not None and bool((w != begun[name]).any())
        torch.testing.assert_close(w, begun[name] + delta, atol=1e-6, rtol=0)
    assert changed == 2 * 7


def test_the_sampler_of_a_4_bit_policy_holds_what_that_computes_with(bnb, base, tmp_path):
    import train_vrl

    config, folder = base
    tokenizer = P.load_tokenizer(config, tmp_path)
    policy = moved(P.add_lora(config, P.load_policy(folder, config, tokenizer, CPU, quantize=True)), 0.3)
    layers = {n: type(m).__name__ for n, m in policy.get_base_model().named_modules() if n.endswith("base_layer")}
    assert len(layers) == 2 * 7 and set(layers.values()) == {"Linear4bit"}
    assert type(policy.get_base_model().lm_head) is torch.nn.Linear
    sampler = P.load_policy(folder, config, tokenizer, CPU)
    before = (score(sampler, tokenizer) - score(policy, tokenizer)).abs().max()
    train_vrl.sync_sampler(sampler, policy)
    after = (score(sampler, tokenizer) - score(policy, tokenizer)).abs().max()
    assert after < 0.02 and after < before / 5, (before, after)      # the products of 4-bit layers are rounded to bfloat16


@pytest.mark.parametrize("phase", ["pst", "vrl"])
def test_all_weights_of_a_4_bit_base_cannot_be_trained(phase):
    config = small_config(path="x", quantize="nf4")
    config = replace(config, pst=replace(config.pst, tune="full"), vrl=replace(config.vrl, tune="full"))
    with pytest.raises(SystemExit, match=f"{phase}.tune=lora"):
        P.wants_nf4(config, phase)
    assert not P.wants_nf4(replace(config, model=replace(config.model, quantize="none")), phase)


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = small_config(path="x", quantize="nf4")
    with pytest.raises(SystemExit, match="pip install 'bitsandbytes"):
        P.wants_nf4(replace(config, pst=replace(config.pst, tune="lora")), "pst")
    with pytest.raises(SystemExit, match="pip install 'bitsandbytes"):
        P.adamw("adamw8bit", [{"params": [torch.nn.Parameter(torch.ones(2))]}], lr=0.1)


def test_a_base_that_is_nowhere_cannot_be_quantized(run):  # noqa: F811
    with pytest.raises(SystemExit, match="model.path"):
        P.build_policy(small_config(), P.load_tokenizer(small_config(), run), CPU, quantize=True)
