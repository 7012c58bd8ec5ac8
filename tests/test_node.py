"""What a node needs: attention by packed rows, chat templates, quantized bases, 8-bit optimizers,
Qwen3-VL with a user's pictures.

python -m pytest tests/test_node.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_pst  # noqa: E402

import train_pst as P  # noqa: E402
from lib import attention as A  # noqa: E402
from lib import checkpoints, engine_check, evaluation, quantize, rollout  # noqa: E402
from lib.attention import attention_name  # noqa: E402
from lib.checkpoints import read_checkpoint, restore, save_checkpoint  # noqa: E402
from lib.experiment import Config, DataConfig, ModelConfig, PstConfig, Stage  # noqa: E402
from lib.policy import (  # noqa: E402
    add_lora,
    build_policy,
    load_policy,
    save_policy,
    set_up,
    token_logprobs,
)
from lib.sampler import sample_rollouts  # noqa: E402
from lib.tokens import (  # noqa: E402
    check_template,
    encode_prompt,
    encode_trajectory,
    load_tokenizer,
    render,
)

run = test_pst.run  # its fixture: a run folder with data

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = torch.nn.Module()  # what an attention function reads of its layer
LAYER.num_key_value_groups, LAYER.is_causal = 2, True


def small_config(**model):
    """Hidden 32, two blocks; keyword arguments go to section `model`."""
    shape = {
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "max_len": 1024,
        "autocast": False,
        "lora_rank": 4,
        "lora_alpha": 8,
    }
    return Config(
        name="test",
        threads=1,
        device="cpu",
        pst=PstConfig(row_len=512, rows_per_step=2, micro_rows=1, save_every=3),
        data=DataConfig(general=20),
        model=ModelConfig(**{**shape, **model}),
    )


SYSTEM, USER = (
    {"role": "system", "content": "You are an agent."},
    {"role": "user", "content": "Make three images of a copper kettle."},
)
CALL = {
    "role": "assistant",
    "content": "<think>\nthree\n</think>\n\n<tool_call>\n"
    '{"name": "tool_text2image_gpt", "arguments": {"n": 3}}\n</tool_call>',
}
TOOL = {"role": "tool", "content": '{"ids": ["img_1", "img_2"]}'}
DONE = {
    "role": "assistant",
    "content": '<think>done</think><answer>{"deliverables": ["img_1"]}</answer>',
}
SCHEMA = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "a + b",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_TAGS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]


def save_tokenizer(
    folder, control=QWEN, tags=QWEN_TAGS, eos="<|im_end|>", pad="<|endoftext|>", bos=None
):
    """A byte-level BPE of 500 tokens in `folder`: as Qwen3-VL's, or with other added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        [m["content"] for m in (SYSTEM, USER, CALL, TOOL, DONE)],
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=control,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    (Path(folder) / "config.json").write_text('{"model_type": "qwen3"}')


SMOLLM2 = {
    "control": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
    "tags": [],
    "pad": "<|im_end|>",
    "bos": "<|im_start|>",
}
# Qwen3 takes the thoughts out of turns before the last user message (its template, cut down to
# that).
STRIPPING = """{%- set last = namespace(user=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- set old = m.role == 'assistant' and loop.index0 < last.user %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') if old else m.content %}
{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# --- chat templates -------------------------------------------------------------------------------


@pytest.fixture(
    params=["qwen-qwen3", "qwen-chatml", "smollm2-chatml", "smollm2-qwen3", "base-qwen3"]
)
def spoken(request, tmp_path):
    """(tokenizer, template) of every kind of model with either template.

    `base`: a pretrained model whose own end is not the turn's.
    """
    kind, template = request.param.split("-")
    save_tokenizer(
        tmp_path, **{"qwen": {}, "smollm2": SMOLLM2, "base": {"eos": "<|endoftext|>"}}[kind]
    )
    return load_tokenizer(small_config(path=str(tmp_path), template=template), tmp_path), template


@pytest.mark.parametrize(
    "messages, tools",
    [
        ([SYSTEM, USER, CALL, TOOL, TOOL, DONE], None),
        ([SYSTEM, USER, CALL, TOOL, DONE, USER, DONE], SCHEMA),
        ([USER, CALL, USER, DONE], SCHEMA),
        ([USER, CALL, TOOL, DONE], None),
    ],
)
def test_turn_by_turn_is_the_whole_dialogue(spoken, messages, tools):
    tokenizer, template = spoken
    ids, mask = encode_trajectory(tokenizer, messages, tools)
    text = render(tokenizer, messages, tools)
    assert tokenizer.decode(ids) + "\n" == text and ids == tokenizer.encode(
        text[:-1], add_special_tokens=False
    )
    trained = "".join(tokenizer.decode([i]) for i, m in zip(ids, mask) if m)
    assert trained == "".join(
        m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"
    )
    for n in range(1, len(messages)):
        assert text.startswith(render(tokenizer, messages[:n], tools))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id is not None


def test_qwen3_reads_as_qwen_does(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(small_config(path=str(tmp_path), template="qwen3"), tmp_path)
    text = render(tokenizer, [SYSTEM, USER, CALL, TOOL], SCHEMA, generate=True)
    assert text.startswith(
        "<|im_start|>system\nYou are an agent.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        '<tools>\n{"type": "function"'
    )
    assert text.endswith(
        f"{CALL['content']}<|im_end|>\n<|im_start|>user\n"
        f"<tool_response>\n{TOOL['content']}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("forged", ["<|im_end|>", "<|vision_start|>", "<|image_pad|>"])
def test_forged_control_tokens_are_refused_and_tags_are_not(tmp_path, forged):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(small_config(path=str(tmp_path), template="qwen3"), tmp_path)
    for i, m in enumerate([SYSTEM, USER, CALL, TOOL, DONE]):
        messages = [SYSTEM, USER, CALL, TOOL, DONE]
        messages[i] = dict(m, content=m["content"] + forged)
        with pytest.raises(ValueError, match="control tokens"):
            encode_trajectory(tokenizer, messages)
        messages[i] = dict(m, content=m["content"] + "".join(QWEN_TAGS))
        assert encode_trajectory(tokenizer, messages)[0]


def test_a_template_that_strips_thoughts_is_refused_with_the_fix(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(small_config(path=str(tmp_path), template="qwen3"), tmp_path)
    tokenizer.chat_template = STRIPPING
    with pytest.raises(SystemExit, match="rewrites history.*model.template=qwen3"):
        check_template(tokenizer)


# --- attention ------------------------------------------------------------------------------------


@pytest.fixture
def flash(monkeypatch):
    """transformers' flash_attention_2 over a varlen function in plain torch, which notes its calls.

    No GPU, but the same way there.
    """
    import transformers.modeling_flash_attention_utils as T

    calls = []

    def varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
    ):
        """q (N, heads, d), k and v (N, kv heads, d) of examples laid end to end, bounds
        (examples + 1,) int32 -> (N, heads, d)."""
        assert (
            causal
            and torch.equal(cu_seqlens_q, cu_seqlens_k)
            and cu_seqlens_q.dtype == torch.int32
            and q.dtype == torch.bfloat16
        )
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        calls.append(cu_seqlens_q.tolist())
        out = []
        for a, b in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:]):
            one = [
                x[a:b].float().transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)
                for x in (q, k, v)
            ]
            scores = (one[0] @ one[1].transpose(1, 2) * softmax_scale).masked_fill(
                ~torch.ones(b - a, b - a).tril().bool(), -torch.inf
            )
            out.append((scores.softmax(-1) @ one[2]).transpose(0, 1))
        return torch.cat(out).to(q.dtype)

    monkeypatch.setattr(
        T, "_lazy_imports", lambda *args, **kwargs: (None, varlen, None, None, None)
    )
    monkeypatch.setattr(T, "_loaded_implementation", None)
    return calls


@pytest.mark.parametrize("lengths", [[[5, 9, 2], [16]], [[16], [16]], [[7, 9]]])
def test_flash_gets_the_bounds_of_packed_examples(flash, lengths):
    """Also of several packed rows, where transformers by itself would let the examples see each
    other, and of padded rows."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(len(lengths), heads, 16, 8, generator=generator) for heads in (4, 2, 2)
    )
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    right, _ = A.packed_sdpa(LAYER, query, key, value, None, positions, scaling=0.4, is_causal=True)
    ours, _ = A.packed_flash(
        LAYER, *(x.bfloat16() for x in (query, key, value)), None, positions, scaling=0.4
    )
    ends = [0] + torch.tensor([n for row in lengths for n in row]).cumsum(0).tolist()
    assert flash == [ends]
    torch.testing.assert_close(ours.float(), right, atol=3e-2, rtol=0)


def flash_model(monkeypatch):
    """A random Qwen3 in 16 bits with the attention that a GPU with flash-attn gets."""
    import transformers.utils
    from transformers import Qwen3Config, Qwen3ForCausalLM

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            attn_implementation=attention_name(small_config(attn="flash_attention_2"), CUDA),
        )
    ).bfloat16()


def test_transformers_makes_a_model_with_it(monkeypatch):
    """It is asked for no package that this name would stand for."""
    assert flash_model(monkeypatch).config._attn_implementation == "packed_varlen"


def test_its_layers_read_packed_rows_by_it(flash, monkeypatch):
    """Two packed rows are what each example is alone."""
    model, ids, positions = (
        flash_model(monkeypatch),
        torch.randint(50, (2, 16)),
        torch.tensor([[*range(9), *range(7)], [*range(16)]]),
    )
    packed = token_logprobs(model, ids, positions, torch.ones(2, 15))
    assert flash == [[0, 9, 16, 32]] * 2
    model.set_attn_implementation("packed_sdpa")
    alone = [
        token_logprobs(model, x, torch.arange(x.shape[1])[None], torch.ones(1, x.shape[1] - 1))
        for x in (ids[:1, :9], ids[:1, 9:], ids[1:])
    ]
    for ours, right in zip((packed[0, :8], packed[0, 9:], packed[1]), alone):
        torch.testing.assert_close(ours, right[0], atol=5e-2, rtol=0)


def test_flash_leaves_float32_and_masks_to_sdpa(flash):
    query, key, value = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))
    positions, mask = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.ones(6, 6).tril().bool()[None, None]
    arguments = [
        ((query, key, value), None),
        (tuple(x.bfloat16() for x in (query, key, value)), mask),
    ]
    for tensors, seen in arguments:
        ours, _ = A.packed_flash(LAYER, *tensors, seen, positions, scaling=0.4)
        torch.testing.assert_close(
            ours, A.packed_sdpa(LAYER, *tensors, seen, positions, scaling=0.4)[0]
        )
    assert flash == []


def test_flash_attn_is_a_choice_for_those_who_have_it(monkeypatch, capsys):
    """tests/test_attention.py has the choice `auto`."""
    import transformers.utils

    for device in (CPU, CUDA):
        with pytest.raises(SystemExit, match="the package flash-attn; set model.attn=auto"):
            attention_name(small_config(attn="flash_attention_2"), device)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert attention_name(small_config(attn="flash_attention_2"), CUDA) == "packed_varlen"
    assert attention_name(small_config(attn="sdpa"), CUDA) == "sdpa"
    assert capsys.readouterr().out == ""


# --- adapters, 4 bits, 8-bit moments --------------------------------------------------------------


@pytest.fixture
def bnb():
    return pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed; requirements-gpu.txt has it"
    )


@pytest.fixture
def base(run, tmp_path):
    """(config, folder): a policy in a folder, and the config of a LoRA run from it."""
    config = small_config()
    tokenizer = load_tokenizer(config, run)
    save_policy(build_policy(config, tokenizer, CPU), tokenizer, tmp_path / "base")
    return replace(
        config,
        model=replace(config.model, path=str(tmp_path / "base")),
        pst=replace(config.pst, tune="lora", stages=[Stage(0.5, 5, lr=0.01)]),
    ), tmp_path / "base"


def moved(policy, by=0.1):
    """The adapter away from zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in checkpoints.trained_parameters(policy).items():
            if "lora_B" in name:
                p.normal_(0, by, generator=generator)
    return policy


def score(model, tokenizer, messages=(SYSTEM, USER, CALL, TOOL, DONE)):
    """Log-probabilities of the agent's tokens."""
    ids, mask = encode_trajectory(tokenizer, list(messages))
    ids, mask = torch.tensor([ids]), torch.tensor([mask])
    with torch.no_grad():
        return token_logprobs(model, ids, torch.arange(ids.shape[1])[None], mask[:, 1:])[
            mask[:, 1:] == 1
        ]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_resume_with_8_bit_moments_equals_a_straight_run(bnb, run, tmp_path, monkeypatch, tune):
    test_pst.test_resume_equals_a_straight_run(run, tmp_path, monkeypatch, tune, "adamw8bit")


def test_8_bit_moments_are_8_bits_and_come_back(bnb, base, tmp_path):
    config, folder = base
    config = replace(
        config,
        vrl=replace(config.vrl, optimizer="adamw8bit"),
        model=replace(config.model, lora_rank=128),
    )
    import train_vrl

    tokenizer = load_tokenizer(config, tmp_path)
    made = []
    for _ in range(2):
        policy = add_lora(config, load_policy(folder, config, tokenizer, CPU))
        made.append((policy, train_vrl.make_optimizer(policy, config.vrl)))
    ids = torch.tensor([[3, 4, 5, 6]])

    def step(policy, optimizer):
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(*made[0])
    save_checkpoint(
        tmp_path / "step-1", made[0][0], [made[0][1]], {"config": checkpoints.config_digest(config)}
    )
    restore(made[1][0], [made[1][1]], *read_checkpoint(config, tmp_path / "step-1"))
    for policy, optimizer in made:
        step(policy, optimizer)
        states = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]
        assert {s["state1"].dtype for s in states} == {
            torch.uint8,
            torch.float32,
        }  # fp32 below 4,096 elements
        assert {s["step"] for s in states} == {2}
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(checkpoints.trained_parameters(p).values() for p, _ in made))
    )


def test_an_adapter_of_a_checkpoint_loads_in_transformers(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, folder = base
    tokenizer = load_tokenizer(config, tmp_path)
    policy = moved(add_lora(config, load_policy(folder, config, tokenizer, CPU)))
    save_checkpoint(tmp_path / "step-1", policy, [], {"config": ""})
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "step-1"
    )
    torch.testing.assert_close(
        score(theirs, tokenizer), score(policy, tokenizer), atol=1e-5, rtol=0
    )
    assert (
        score(policy, tokenizer) - score(load_policy(folder, config, tokenizer, CPU), tokenizer)
    ).abs().max() > 1e-3


def test_pst_in_4_bits_merges_into_the_base_itself(bnb, base, run, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    config, folder = base
    config = replace(config, model=replace(config.model, quantize="nf4"))
    monkeypatch.setattr(P, "ensure_data", lambda config, run: None)
    work = test_pst.copy_run(run, tmp_path / "work", monkeypatch)
    final = load_file(P.train_pst(config, work) / "model.safetensors")
    begun, checkpoint = (
        load_file(folder / "model.safetensors"),
        checkpoints.list_checkpoints(work / "pst")[-1],
    )
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert final.keys() == begun.keys() and all(w.dtype == torch.float32 for w in final.values())
    changed = 0
    for name, w in final.items():
        factors = [
            adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight")
            for x in "BA"
        ]
        delta = (
            0
            if factors[0] is None
            else factors[0] @ factors[1] * config.model.lora_alpha / config.model.lora_rank
        )
        changed += factors[0] is not None and bool((w != begun[name]).any())
        torch.testing.assert_close(w, begun[name] + delta, atol=1e-6, rtol=0)
    assert changed == 2 * 7


def test_the_sampler_of_a_4_bit_policy_holds_what_that_computes_with(bnb, base, tmp_path):
    config, folder = base
    tokenizer = load_tokenizer(config, tmp_path)
    policy = moved(
        add_lora(config, load_policy(folder, config, tokenizer, CPU, quantize=True)),
        0.3,
    )
    layers = {
        n: type(m).__name__
        for n, m in policy.get_base_model().named_modules()
        if n.endswith("base_layer")
    }
    assert len(layers) == 2 * 7 and set(layers.values()) == {"Linear4bit"}
    assert type(policy.get_base_model().lm_head) is torch.nn.Linear
    sampler = load_policy(folder, config, tokenizer, CPU)
    before = (score(sampler, tokenizer) - score(policy, tokenizer)).abs().max()
    engine_check.sync_sampler(sampler, policy)
    after = (score(sampler, tokenizer) - score(policy, tokenizer)).abs().max()
    assert after < 0.02 and after < before / 5, (
        before,
        after,
    )  # the products of 4-bit layers are rounded to bfloat16


@pytest.mark.parametrize("phase", ["pst", "vrl"])
def test_all_weights_of_a_4_bit_base_cannot_be_trained(phase):
    config = small_config(path="x", quantize="nf4")
    config = replace(
        config, pst=replace(config.pst, tune="full"), vrl=replace(config.vrl, tune="full")
    )
    with pytest.raises(SystemExit, match=f"{phase}.tune=lora"):
        quantize.wants_nf4(config, phase)
    assert not quantize.wants_nf4(
        replace(config, model=replace(config.model, quantize="none")), phase
    )


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = small_config(path="x", quantize="nf4")
    with pytest.raises(SystemExit, match="pip install 'bitsandbytes"):
        quantize.wants_nf4(replace(config, pst=replace(config.pst, tune="lora")), "pst")
    with pytest.raises(SystemExit, match="pip install 'bitsandbytes"):
        quantize.adamw("adamw8bit", [{"params": [torch.nn.Parameter(torch.ones(2))]}], lr=0.1)


def test_a_base_that_is_nowhere_cannot_be_quantized(run):
    with pytest.raises(SystemExit, match="model.path"):
        build_policy(small_config(), load_tokenizer(small_config(), run), CPU, quantize=True)


# --- Qwen3-VL -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    """(config, folder, pictures): a random Qwen3-VL of two text layers and two vision blocks with
    tokenizer and image processor; three pictures."""
    from PIL import Image
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = tmp_path_factory.mktemp("vl")
    save_tokenizer(folder)
    ids = {t: AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(t) for t in QWEN}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "max_position_embeddings": 2048,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [8, 4, 4],
                    "mrope_interleaved": True,
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=8,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 256, "longest_edge": 4096},
    ).save_pretrained(folder)
    pictures = []
    for i, (shape, colour) in enumerate(
        [((48, 32), (200, 30, 30)), ((48, 32), (20, 30, 220)), ((64, 64), (90, 200, 60))]
    ):
        picture = Image.new("RGB", shape, colour)
        picture.paste((255, 255, 255), (4 + 8 * i, 4, 20 + 8 * i, 20))
        picture.save(folder / f"picture-{i}.png")
        pictures.append(str(folder / f"picture-{i}.png"))
    config = small_config(path=str(folder), template="qwen3", max_len=2048)
    return (
        replace(
            config,
            rollout=replace(config.rollout, max_turn_tokens=24, failure_scale=0.0, tools="names"),
        ),
        folder,
        pictures,
    )


def speaker(vl, tmp_path):
    """(config, tokenizer, model) of the tiny Qwen3-VL."""
    config = vl[0]
    set_up(config)
    tokenizer = load_tokenizer(config, tmp_path)
    return config, tokenizer, load_policy(config.model.path, config, tokenizer, CPU)


def given(*files):
    """A task whose inputs name these files."""
    from lib.tasks import make_tasks

    task = make_tasks(1, "train", DataConfig(), seed=0)[0]
    inputs = [
        {
            "id": f"in_{i + 1}",
            "kind": "image",
            "width": 48,
            "height": 32,
            "duration_s": None,
            **({"media": f} if f else {}),
        }
        for i, f in enumerate(files)
    ]
    return {**task, "inputs": inputs}


def seen(model, tokenizer, files, messages=(SYSTEM, USER, CALL, TOOL, DONE)):
    """Log-probabilities of the agent's tokens after a user turn with these pictures."""
    from lib.vision import pictures_of, show_pictures

    messages = show_pictures(tokenizer, given(*files), list(messages))
    ids, mask = encode_trajectory(tokenizer, messages)
    ids, mask, shown = (
        torch.tensor([ids]),
        torch.tensor([mask]),
        [(0, 0, pictures_of(messages))] if files else (),
    )
    with torch.no_grad():
        return token_logprobs(
            model, ids, torch.arange(ids.shape[1])[None], mask[:, 1:], pictures=shown
        )[mask[:, 1:] == 1]


def test_a_users_picture_is_put_before_the_request(vl, tmp_path):
    from lib.vision import show_pictures

    _, tokenizer, _ = speaker(vl, tmp_path)
    task = given(vl[2][0], None, vl[2][2], "/nowhere/else.png", "picture-0.png")
    messages = show_pictures(tokenizer, task, [SYSTEM, USER])
    assert (
        messages[1]["pictures"] == [(str(vl[1]), vl[2][0]), (str(vl[1]), vl[2][2])]
        and messages[1]["content"] == USER["content"]
    )
    text = tokenizer.decode(encode_prompt(tokenizer, messages))
    marks = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (3 * 2, 4 * 4))
    assert f"<|im_start|>user\n{marks}{USER['content']}<|im_end|>" in text
    for forged in (
        dict(USER, content="<|image_pad|>"),
        dict(messages[1], content="<|vision_end|>"),
    ):
        with pytest.raises(ValueError, match="control tokens"):
            encode_prompt(tokenizer, [SYSTEM, forged])
    tokenizer.vision = None
    assert show_pictures(tokenizer, task, [SYSTEM, USER]) == [SYSTEM, USER]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tokenizer.vision = str(vl[1])
    with pytest.raises(SystemExit, match="broken.png cannot be read"):
        encode_prompt(
            tokenizer, show_pictures(tokenizer, given(str(tmp_path / "broken.png")), [SYSTEM, USER])
        )


@pytest.mark.parametrize("files", [(), (0,), (2, 0)])
def test_the_policy_reads_pictures_as_transformers_does(vl, tmp_path, files):
    """Against the whole model's own forward pass, which finds features, deepstack and rotary
    positions by itself."""
    from lib.vision import pictures_of, read_picture, show_pictures

    _, tokenizer, model = speaker(vl, tmp_path)
    messages = show_pictures(
        tokenizer, given(*[vl[2][i] for i in files]), [SYSTEM, USER, CALL, TOOL, DONE]
    )
    ids, mask = (torch.tensor([x]) for x in encode_trajectory(tokenizer, messages))
    more = {}
    if files:
        pixels, grids, _ = zip(*(read_picture(*p) for p in pictures_of(messages)))
        more = {
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.cat(grids),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **more).logits[:, :-1].log_softmax(-1)
    right = logits.gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:] == 1]
    torch.testing.assert_close(
        seen(model, tokenizer, [vl[2][i] for i in files]), right, atol=1e-5, rtol=0
    )


def test_the_picture_matters(vl, tmp_path):
    _, tokenizer, model = speaker(vl, tmp_path)
    one, other = (seen(model, tokenizer, [f]) for f in vl[2][:2])
    assert (one - other).abs().max() > 1e-2 and (
        one - seen(model, tokenizer, [])
    ).abs().max() > 1e-2


def packed(vl, tokenizer):
    """Examples with and without pictures, one of which the agent spells, and rows of indices."""
    from lib.vision import pictures_of, show_pictures

    examples = []
    for files in ((0,), (), (1, 2), ()):
        messages = show_pictures(
            tokenizer, given(*[vl[2][i] for i in files]), [SYSTEM, USER, CALL, TOOL, DONE]
        )
        ids, mask = encode_trajectory(tokenizer, messages)
        spelt = [tokenizer.convert_tokens_to_ids("<|image_pad|>")] * 2
        ids, mask = ids[:-1] + spelt + ids[-1:], mask + [1, 1]
        examples.append((ids, mask, pictures_of(messages)) if files else (ids, mask))
    return examples, [[1, 0, 2], [3, 0]]


def test_packed_rows_with_pictures_equal_separate_rows(vl, tmp_path):
    _, tokenizer, model = speaker(vl, tmp_path)
    examples, rows = packed(vl, tokenizer)

    def read(rows):
        ids, positions, mask = P.make_batch(rows, examples, tokenizer.pad_token_id, CPU)
        with torch.no_grad():
            logps = token_logprobs(
                model, ids, positions, mask[:, 1:], pictures=P.row_pictures(rows, examples)
            )
        return logps[mask[:, 1:] == 1]

    torch.testing.assert_close(
        read(rows), torch.cat([read([[i]]) for row in rows for i in row]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("files", [[], [0], [2, 1]])
def test_sampler_and_trainer_agree_on_pictures(vl, tmp_path, files):
    """Groups, several turns, rows with and without pictures side by side; the agent writes any
    token, <|image_pad|> among them."""
    from test_vrl import ChattyEnv

    import train_vrl

    config, tokenizer, model = speaker(vl, tmp_path)
    model.lm_head.bias = torch.nn.Parameter(
        torch.zeros(512)
    )  # so that it ends its turns, and writes <|image_pad|>
    model.lm_head.bias.data[[tokenizer.eos_token_id, model.config.image_token_id]] = 6.0
    model.lm_head.bias.data[len(tokenizer) :] = -50.0  # rows of the head that are no token
    tasks = [given(*[vl[2][i] for i in files]), given(), given(vl[2][0])]
    tasks = [{**t, "id": f"t-{i:02d}"} for i, t in enumerate(tasks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "VisGenEnv", ChattyEnv)
        rollouts = sample_rollouts(model, tokenizer, tasks, config, 1.0, seed=3, group_size=4)
    assert [len(r.pictures) for r in rollouts] == [len(files)] * 4 + [0] * 4 + [1] * 4
    batch = train_vrl.collate(rollouts, CPU)
    with torch.no_grad():
        logps, _ = train_vrl.batch_logprobs(model, batch, config)
    gap = ((logps - batch["sampler_logprobs"]) * batch["loss_mask"][:, 1:]).abs().max()
    said = [[i for i, m in zip(r.ids, r.loss_mask) if m] for r in rollouts]
    assert any(model.config.image_token_id in tokens for tokens in said) and "answer" in {
        r.trajectory["ended"] for r in rollouts
    }
    assert gap < 1e-4 and sum(len(r.trajectory["turns"]) for r in rollouts) > len(rollouts)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_pst_and_vrl_of_a_qwen3_vl_leave_the_vision_tower_alone(vl, tmp_path, monkeypatch, tune):
    """Data with and without pictures through PST, its policy read again, two GRPO steps: what is
    trained is the language part."""
    from safetensors.torch import load_file

    import train_vrl
    from lib.runs import write_jsonl

    config = vl[0]
    config = replace(
        config,
        model=replace(config.model, gradient_checkpointing=tune == "lora"),
        bench=replace(config.bench, tasks=1),
        pst=replace(config.pst, tune=tune, stages=[Stage(0.5, 2, lr=1e-3)]),
        vrl=replace(
            config.vrl,
            tune=tune,
            tasks_per_step=2,
            group_size=2,
            steps=1,
            kl_coef=0.1 if tune == "lora" else 0.0,
        ),
    )
    general = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": str(2 * i)},
            ],
            "tools": None,
            "kind": "arithmetic",
        }
        for i in range(4)
    ]
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "general.jsonl", general)
    write_jsonl(
        tmp_path / "data" / "visgen.jsonl",
        [
            {"task": given(*files), "messages": [SYSTEM, USER, CALL, TOOL, DONE], "tools": None}
            for files in ((vl[2][0],), (), (vl[2][2], vl[2][1]))
        ],
    )
    monkeypatch.setattr(P, "ensure_data", lambda *_: None)
    final = P.train_pst(config, tmp_path)
    begun, ended = load_file(vl[1] / "model.safetensors"), load_file(final / "model.safetensors")
    assert begun.keys() == ended.keys()
    vision = {n for n in begun if ".visual." in n}
    assert vision and all(torch.equal(begun[n], ended[n]) for n in vision)
    assert not torch.equal(
        *(w["model.language_model.layers.1.mlp.up_proj.weight"] for w in (begun, ended))
    )

    tokenizer = load_tokenizer(
        replace(
            config,
            model=replace(config.model, path=""),
            pst=replace(config.pst, init_from=str(final)),
        ),
        tmp_path,
    )
    assert tokenizer.vision == str(final)
    sampler = load_policy(final, config, tokenizer, CPU).eval()
    policy = load_policy(final, config, tokenizer, CPU)
    policy = add_lora(config, policy, norm=True) if tune == "lora" else policy
    names = list(checkpoints.trained_parameters(policy))
    assert (
        names
        and not any("visual" in n for n in names)
        and (tune == "full" or not any("lm_head" in n for n in names))
    )
    task = {**given(vl[2][0]), "id": "t-00"}
    fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, task, config)
    assert engine_check.check_engine(sampler, policy, fixed, config)["sync_gap_max"] < 1e-4
    shares = evaluation.general_exact_match(
        lambda prompts: evaluation.greedy_answers(
            sampler, tokenizer, prompts, CPU, max_new_tokens=3
        ),
        tokenizer,
        general,
    )
    assert shares["general"] == 0

    rollouts = sample_rollouts(
        sampler, tokenizer, [task, {**given(), "id": "t-01"}], config, 1.0, seed=0, group_size=2
    )
    for r, a in zip(rollouts, (1.0, -1.0, 0.5, -0.5)):
        r.advantage = a
    optimizer = train_vrl.make_optimizer(policy, config.vrl)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    figures = train_vrl.update(policy, optimizer, rollouts, config)
    assert figures["trained"] == 4 and figures["gap_max"] < 1e-4 and figures["grad_norm"] > 0
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= set(names)
    engine_check.sync_sampler(sampler, policy)
    assert engine_check.check_engine(sampler, policy, fixed, config)["sync_gap_max"] < 1e-4


def test_a_vision_model_without_an_image_processor_is_named(tmp_path):
    from lib.vision import image_processor

    with pytest.raises(SystemExit, match="preprocessor_config.json"):
        image_processor(str(tmp_path))


def test_a_qwen3_vl_in_4_bits_keeps_its_tower_and_its_adapter_loads(bnb, vl, tmp_path):
    from peft import PeftModel

    config, tokenizer, plain = speaker(vl, tmp_path)
    policy = moved(
        add_lora(config, load_policy(config.model.path, config, tokenizer, CPU, quantize=True)),
        0.3,
    )
    small = {n for n, m in policy.get_base_model().named_modules() if type(m) is bnb.nn.Linear4bit}
    assert len(small) == 2 * 7 and all(
        n.startswith("model.language_model.layers.") and n.endswith(".base_layer") for n in small
    )
    save_checkpoint(tmp_path / "step-1", policy, [], {"config": ""})
    fresh = add_lora(config, plain)
    fresh.load_state_dict(checkpoints.trained_parameters(policy), strict=False)
    theirs = PeftModel.from_pretrained(
        load_policy(config.model.path, config, tokenizer, CPU), tmp_path / "step-1"
    )
    torch.testing.assert_close(
        seen(theirs, tokenizer, vl[2][:1]), seen(fresh, tokenizer, vl[2][:1]), atol=1e-5, rtol=0
    )
    sampler = load_policy(config.model.path, config, tokenizer, CPU)
    engine_check.sync_sampler(sampler, policy)
    gap = (seen(policy, tokenizer, vl[2][:1]) - seen(sampler, tokenizer, vl[2][:1])).abs().max()
    assert (
        gap
        < (seen(policy, tokenizer, vl[2][:1]) - seen(fresh, tokenizer, vl[2][:1])).abs().max() / 3
    ), gap


def test_a_users_file_is_the_artifacts_file(vl):
    from env import VisGenEnv

    env = VisGenEnv(vl[0].rollout)
    env.reset(given(vl[2][0], None), 0)
    assert env.artifacts["in_1"]["media"] == vl[2][0] and env.artifacts["in_2"]["media"] != vl[2][0]
