"""train_pst.py, lib/tokens.py, lib/policy.py, lib/checkpoints.py: tokens and loss masks,
log-probabilities, packing, mixtures, checkpoints, LoRA.

python -m pytest tests/test_pst.py
python tests/test_pst.py       # writes tests/golden/loss_mask.json again, after a meant change
"""

import copy
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_pst as P  # noqa: E402
from lib import checkpoints, evaluation, reading_exercises  # noqa: E402
from lib.experiment import (  # noqa: E402
    Config,
    DataConfig,
    ModelConfig,
    PstConfig,
    Stage,
    load_config,
)
from lib.policy import (  # noqa: E402
    add_lora,
    build_policy,
    merge_lora,
    plain_logprobs,
    set_up,
    token_logprobs,
)
from lib.runs import append_metrics, read_jsonl, seeded_rng, write_jsonl  # noqa: E402
from lib.tokens import (  # noqa: E402
    check_template,
    encode_prompt,
    encode_trajectory,
    load_tokenizer,
    render,
)

GOLDEN = Path(__file__).parent / "golden" / "loss_mask.json"
TEXTS = [
    "Make three images of a copper kettle.",
    '{"name": "tool_text2image_gpt", "arguments": {"prompt": "a copper kettle", "n": 3}}',
    "You are an agent. Write <think>, <plan>, <tool_call> and <answer>.",
    '{"ids": ["img_1", "img_2", "img_3"], "size": "1024x1024"}',
    '{"deliverables": ["img_1", "img_2", "img_3"], "summary": "three images of a copper kettle"}',
    "What is 12 + 30? 42",
]
SYSTEM = {"role": "system", "content": "You are an agent."}
USER = {"role": "user", "content": "Make three images of a copper kettle."}
CALL = {
    "role": "assistant",
    "content": "<think>three</think>"
    '<tool_call>{"name": "tool_text2image_gpt", "arguments": {"n": 3}}</tool_call>',
}
TOOL = {"role": "tool", "content": '{"ids": ["img_1", "img_2"]}'}
DONE = {
    "role": "assistant",
    "content": '<think>done</think><answer>{"deliverables": ["img_1"]}</answer>',
}
TRAJECTORY = [SYSTEM, USER, CALL, TOOL, TOOL, DONE]
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


def make_tokenizer(folder, eos_is_pad=False):
    """A byte-level BPE of 400 tokens in a folder, with control tokens and UTPC's tags."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.add_tokens(
        [
            AddedToken(f"<{slash}{name}>", special=False, normalized=False)
            for name in ("think", "plan", "tool_call", "answer", "tool_response")
            for slash in ("", "/")
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        pad_token="<|im_end|>" if eos_is_pad else "<|endoftext|>",
    ).save_pretrained(folder)


def tiny_config(**pst):
    """Hidden 32, two blocks, one thread; keyword arguments go to section `pst`."""
    pst = {"row_len": 256, "rows_per_step": 2, "micro_rows": 1, "save_every": 3, **pst}
    return Config(
        name="test",
        threads=1,
        device="cpu",
        pst=PstConfig(**pst),
        data=DataConfig(general=20),
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=16,
            max_len=512,
            autocast=False,
            lora_rank=4,
            lora_alpha=8,
        ),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with data and a tokenizer, made once."""
    run = tmp_path_factory.mktemp("run")
    general = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?" + " please" * (i % 5)},
                {"role": "assistant", "content": str(2 * i)},
            ],
            "tools": None,
            "kind": "arithmetic",
        }
        for i in range(20)
    ]
    trajectory = {"messages": TRAJECTORY, "tools": None}
    (run / "data").mkdir()
    write_jsonl(run / "data" / "general.jsonl", general)
    write_jsonl(run / "data" / "base.jsonl", general)
    write_jsonl(
        run / "data" / "visgen.jsonl",
        [trajectory, {"messages": [SYSTEM, USER, DONE], "tools": None}] * 2,
    )
    write_jsonl(run / "data" / "general_heldout.jsonl", general[:3])
    make_tokenizer(run / "data" / "tokenizer")
    return run


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_tokenizer(tiny_config(), run)


@pytest.fixture(scope="module")
def examples(run, tokenizer):
    """Encoded (general, visgen)."""
    return P.encode_data(tiny_config(), run, tokenizer)


@pytest.fixture
def policy(tokenizer):
    device = set_up(tiny_config())
    return build_policy(tiny_config(), tokenizer, device)


def gradients(model):
    """All gradients, flat, and cleared."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def batch(examples, rows, tokenizer, pad=None):
    return P.make_batch(
        rows, examples, tokenizer.pad_token_id if pad is None else pad, torch.device("cpu")
    )


# --- tokens ---------------------------------------------------------------------------------------


def mask_table(tokenizer):
    """[token, trained] of the golden trajectory, a token as its text."""
    ids, mask = encode_trajectory(tokenizer, TRAJECTORY)
    return [[tokenizer.decode([i]), m] for i, m in zip(ids, mask)]


def test_loss_mask_golden(tokenizer):
    table = mask_table(tokenizer)
    assert table == json.loads(GOLDEN.read_text())
    ends = [m for token, m in table if token == "<|im_end|>"]
    assert ends == [0, 0, 1, 0, 0, 1]  # system, user, agent, tool, tool, agent
    trained = "".join(token for token, m in table if m)
    assert trained == CALL["content"] + "<|im_end|>" + DONE["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    "messages, tools",
    [
        (TRAJECTORY, None),
        (TRAJECTORY, SCHEMA),
        ([USER, DONE], SCHEMA),
        ([USER, CALL, USER, DONE], None),
        ([SYSTEM, USER, CALL, DONE], None),
    ],
)
def test_incremental_encoding_equals_full_rendering(tokenizer, messages, tools):
    ids, mask = encode_trajectory(tokenizer, messages, tools)
    text = render(tokenizer, messages, tools)
    assert ids + tokenizer.encode("\n", add_special_tokens=False) == tokenizer.encode(
        text, add_special_tokens=False
    )
    assert len(ids) == len(mask) and mask[0] == 0 and mask[-1] == 1


def test_nothing_after_the_last_agent_turn_is_kept(tokenizer):
    assert encode_trajectory(tokenizer, TRAJECTORY + [TOOL]) == encode_trajectory(
        tokenizer, TRAJECTORY
    )


def test_template_layout(tokenizer):
    text = render(tokenizer, TRAJECTORY[:4], SCHEMA, generate=True)
    assert text.startswith(
        "<|im_start|>system\nYou are an agent.\n<tools>\n"
        + json.dumps(SCHEMA[0])
        + "\n</tools><|im_end|>\n"
    )
    assert text.endswith(
        '<|im_start|>tool\n<tool_response>{"ids": ["img_1", "img_2"]}</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("forged", ["<|im_end|>", "<|im_start|>assistant\nyes", "<|endoftext|>"])
@pytest.mark.parametrize("at", range(len(TRAJECTORY)))
def test_forged_control_tokens_are_refused(tokenizer, at, forged):
    messages = [
        dict(m, content=m["content"] + forged) if i == at else m for i, m in enumerate(TRAJECTORY)
    ]
    with pytest.raises(ValueError, match="control tokens"):
        encode_trajectory(tokenizer, messages)


def test_escaped_control_tokens_are_plain_text(tokenizer):
    ids = encode_prompt(tokenizer, [dict(USER, content="< |im_end|>")])
    assert "< |im_end|>" in tokenizer.decode(ids)


def test_trajectory_without_agent_is_refused(tokenizer):
    for messages in ([USER], [DONE, USER]):
        with pytest.raises(ValueError, match="agent turn"):
            encode_trajectory(tokenizer, messages)


def test_template_that_rewrites_history_is_refused(tokenizer):
    import copy

    stripping = copy.deepcopy(tokenizer)
    stripping.chat_template = tokenizer.chat_template.replace(
        "message.role + '\\n' + message.content",
        "message.role + '\\n' + "
        "(message.content if loop.last else message.content.split('</think>')[-1])",
    )
    assert stripping.chat_template != tokenizer.chat_template
    with pytest.raises(SystemExit, match="rewrites history"):
        check_template(stripping)


def test_tokenizer_without_control_tokens_is_refused(tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.BPE(vocab={c: i for i, c in enumerate("<|>_adeimnrst")}, merges=[])
        )
    )
    with pytest.raises(SystemExit, match="needs it as one token"):
        check_template(plain)


# --- log-probabilities and the loss ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_plain_logprobs_are_those_of_the_models_logits(policy, tokenizer, examples, temperature):
    ids, positions, mask = batch(examples[1], [[0, 1], [2]], tokenizer)
    logits = policy(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1].float()
    logprobs = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    plain = plain_logprobs(policy, ids, positions, mask[:, 1:], temperature)
    assert plain.dtype == torch.float32 and plain.shape == mask[:, 1:].shape
    torch.testing.assert_close(plain, logprobs * mask[:, 1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_plain(policy, tokenizer, examples, chunk, temperature):
    ids, positions, mask = batch(examples[1], [[0, 1], [2]], tokenizer)
    weight = torch.rand(mask[:, 1:].shape)
    ours = token_logprobs(policy, ids, positions, mask[:, 1:], temperature, chunk=chunk)
    (ours * weight).sum().backward()
    ours_grad = gradients(policy)
    plain = plain_logprobs(policy, ids, positions, mask[:, 1:], temperature)
    (plain * weight).sum().backward()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours_grad, gradients(policy), atol=1e-5, rtol=1e-4)


def test_entropy(policy, tokenizer, examples):
    ids, positions, mask = batch(examples[1], [[0]], tokenizer)
    logps, entropy = token_logprobs(policy, ids, positions, mask[:, 1:], entropy=True, chunk=5)
    p = policy(input_ids=ids, position_ids=positions).logits[:, :-1].softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1) * mask[:, 1:], atol=1e-5, rtol=0)
    assert logps.requires_grad and not entropy.requires_grad


def test_mask_of_the_wrong_shape_is_refused(policy, tokenizer, examples):
    ids, positions, mask = batch(examples[1], [[0]], tokenizer)
    with pytest.raises(ValueError, match=r"\(B, T-1\)"):
        token_logprobs(policy, ids, positions, mask)


def test_targets_at_masked_places_do_not_matter(policy, tokenizer, examples):
    ids, positions, mask = batch(examples[1], [[0], [1]], tokenizer)
    found = []
    for noise in (0, 3):
        targets = torch.where(mask[:, 1:] == 1, ids[:, 1:], (ids[:, 1:] + noise) % len(tokenizer))
        token_logprobs(policy, ids, positions, mask[:, 1:], targets=targets).sum().backward()
        found.append(gradients(policy))
    assert torch.equal(*found)
    changed = torch.where(mask[:, 1:] == 1, (ids[:, 1:] + 3) % len(tokenizer), ids[:, 1:])
    token_logprobs(policy, ids, positions, mask[:, 1:], targets=changed).sum().backward()
    assert not torch.equal(found[0], gradients(policy))


def with_attention(name, tokenizer):
    config = tiny_config()
    return build_policy(
        replace(config, model=replace(config.model, attn=name)), tokenizer, torch.device("cpu")
    )


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_equal_separate_rows(tokenizer, examples, attention, checkpointing):
    model = with_attention(attention, tokenizer)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    pool = [*examples[1], *examples[0]]
    rows = [[0, 4, 1], [5, 6, 2]]
    ids, positions, mask = batch(pool, rows, tokenizer)
    packed = token_logprobs(model, ids, positions, mask[:, 1:])
    packed.sum().backward()
    packed_grad = gradients(model)
    alone = []
    for row in rows:
        for i in row:
            one = batch(pool, [[i]], tokenizer)
            logps = token_logprobs(model, one[0], one[1], one[2][:, 1:])
            logps.sum().backward()
            alone.append(logps[one[2][:, 1:] == 1])
    torch.testing.assert_close(packed[mask[:, 1:] == 1], torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_grad, gradients(model), atol=1e-4, rtol=1e-4)


def test_generation_reads_a_cache_like_a_fresh_pass(policy, tokenizer, examples):
    """packed_sdpa serves generation too: left padding, a cache, several new tokens at once."""
    ids = torch.tensor([examples[1][0][0][:40]])
    full = policy(input_ids=ids).logits
    start = policy(input_ids=ids[:, :25], use_cache=True)
    rest = policy(
        input_ids=ids[:, 25:], past_key_values=start.past_key_values, use_cache=True
    ).logits
    torch.testing.assert_close(rest, full[:, 25:], atol=1e-5, rtol=0)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    seen = (torch.arange(46) >= 6).long()[None]
    left = policy(input_ids=padded, attention_mask=seen).logits
    torch.testing.assert_close(left[:, 6:], full, atol=1e-5, rtol=0)
    # One new token: grouped query heads share their key head.
    assert policy.config.num_attention_heads > policy.config.num_key_value_heads
    start = policy(input_ids=padded[:, :-1], attention_mask=seen[:, :-1], use_cache=True)
    last = policy(
        input_ids=padded[:, -1:],
        attention_mask=seen,
        past_key_values=start.past_key_values,
        use_cache=True,
    ).logits
    torch.testing.assert_close(last, full[:, -1:], atol=1e-5, rtol=0)


def test_split_into_micro_batches_does_not_matter(policy, tokenizer, examples):
    pool = [*examples[1], *examples[0]]
    rows, found = [[0], [1, 4], [2], [3, 5, 6], [7], [8, 9], [10], [11]], []
    for micro in (1, 8, 3):
        loss, tokens, loss_tokens = P.backward_step(
            tiny_config(micro_rows=micro), policy, rows, pool, 0, torch.device("cpu")
        )
        found.append((loss, tokens, loss_tokens, gradients(policy)))
    for loss, tokens, loss_tokens, gradient in found[1:]:
        assert (tokens, loss_tokens) == found[0][1:3]
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        torch.testing.assert_close(gradient, found[0][3], atol=1e-6, rtol=1e-4)


def test_padding_that_is_the_end_of_turn_does_not_matter(policy, tokenizer, examples):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = []
    for pad in (tokenizer.pad_token_id, end):
        ids, positions, mask = batch(examples[1], [[0], [1]], tokenizer, pad)
        assert int(mask.sum()) == sum(sum(examples[1][i][1]) for i in (0, 1))
        token_logprobs(policy, ids, positions, mask[:, 1:]).sum().backward()
        found.append(gradients(policy))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    assert (
        mask[0][ids[0] == end].tolist().count(1) == 2
    )  # both agent turns end with a trained end of turn


# --- packing and mixtures -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_pack(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 200, (300,), generator=generator).tolist()
    rows = P.pack(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 256
    assert sum(lengths) / (256 * len(rows)) > 0.95
    assert rows == P.pack(lengths, 256)


def test_pack_names_an_example_that_is_too_long():
    with pytest.raises(ValueError, match="example 1 has 300 tokens"):
        P.pack([10, 300], 256)


def test_make_row():
    ids, positions, mask = P.make_row([([5, 6, 7], [1, 0, 1]), ([8, 9], [0, 1])], 8, 0)
    assert ids.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert mask.tolist() == [0, 0, 1, 0, 1, 0, 0, 0]


def test_stage_mixture_counts():
    config = tiny_config(stages=[Stage(0.5, 3), Stage(0.2, 3)])
    general, visgen = [([0], [1])] * 1000, [([0], [1])] * 40
    first, second = (P.stage_examples(config, s, visgen, general) for s in (0, 1))
    for order, count in ((first, 500), (second, 200)):
        assert sum(i < 1000 for i in order) == count
        assert all(order.count(1000 + i) == 3 for i in range(40))
    assert not {i for i in first if i < 1000} & {i for i in second if i < 1000}
    assert first == P.stage_examples(config, 0, visgen, general)
    again = P.stage_examples(config, 0, visgen, general, epoch=1)
    assert again != first and sorted(again) == sorted(first)
    assert P.stage_examples(replace(config, seed=1), 0, visgen, general) != first


def test_table_4_s_mixtures_are_exact():
    """v1 to v7: (share of the general mix, lambda) of each stage, shares of one uncut pass."""
    paper = {
        "v1": [(0, 3)],
        "v2": [(1, 3)],
        "v3": [(1, 20)],
        "v4": [(0.5, 3), (0.01, 3)],
        "v5": [(0.5, 3), (0.05, 3)],
        "v6": [(0.5, 3), (0.1, 3)],
        "v7": [(0.5, 3), (0.2, 3)],
    }
    general, visgen = [([0], [1])] * 1000, [([0], [1])] * 40
    tiny = load_config(Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml")
    for name, stages in paper.items():
        config = load_config(
            Path(__file__).resolve().parents[1] / "configs" / "ablations" / f"{name}.yaml"
        )
        orders = [
            P.stage_examples(config, s, visgen, general) for s in range(len(config.pst.stages))
        ]
        assert [sum(i < 1000 for i in order) for order in orders] == [
            round(1000 * share) for share, _ in stages
        ], name
        assert [len(order) - sum(i < 1000 for i in order) for order in orders] == [
            40 * repeat for _, repeat in stages
        ], name
        assert sum(s.tokens for s in config.pst.stages) == sum(
            s.tokens for s in tiny.pst.stages
        )  # as long as tiny's PST
        assert replace(config, name="", pst=tiny.pst) == replace(
            tiny, name=""
        )  # nothing else differs
    assert config.pst == tiny.pst


def test_a_share_of_tokens_is_exact_but_for_the_last_example():
    lengths = [seeded_rng("lengths", i).randint(5, 90) for i in range(400)]
    general, visgen = [([0] * n, [1] * n) for n in lengths], [([0] * 50, [1] * 50)] * 10
    config = tiny_config(
        stages=[Stage(0.5, 3, unit="tokens"), Stage(0.2, 2, unit="tokens"), Stage(0.0, 1)]
    )
    parts = [P.general_part(config, s, lengths) for s in (0, 1, 2)]
    for part, share in zip(parts, (0.5, 0.2)):
        got = sum(lengths[i] for i in part)
        assert (
            share * sum(lengths) <= got + 0.5
            and got - lengths[part[-1]] < share * sum(lengths)
            and len(set(part)) == len(part)
        )
    assert parts[2] == [] and not set(parts[0]) & set(parts[1])
    assert sorted(P.stage_examples(config, 2, visgen, general)) == [400 + i for i in range(10)]
    said = P.mix_of(config, 1, P.stage_steps(config, 1, visgen, general), visgen, general)
    assert (
        f"{len(parts[1])} general examples" in said
        and "0.2 of the tokens of 400" in said
        and "20 of VisGenData (1,000 tokens; 10 x 2): 100% of one pass" in said
    )


@pytest.mark.parametrize("tokens", [2000, 40000])
def test_stage_tokens_cut_or_cycle_the_mix(examples, tokens):
    general, visgen = examples
    pool = [*general, *visgen]
    steps = P.stage_steps(tiny_config(stages=[Stage(0.5, 3, tokens=tokens)]), 0, visgen, general)
    got = sum(len(pool[i][0]) for step in steps for row in step for i in row)
    assert tokens <= got < tokens + max(len(ids) for ids, _ in pool)


def test_every_example_of_a_stage_is_trained_once_a_repetition(examples):
    general, visgen = examples
    steps = P.stage_steps(tiny_config(stages=[Stage(1.0, 2)]), 0, visgen, general)
    seen = sorted(i for step in steps for row in step for i in row)
    assert seen == sorted([*range(20), *[20, 21, 22, 23] * 2])


def test_record_longer_than_a_row_is_named(tokenizer):
    with pytest.raises(SystemExit, match=r"visgen.jsonl, record 1 has \d+ tokens, a row holds 40"):
        P.encode_records(
            tokenizer,
            [
                {"messages": [USER, {"role": "assistant", "content": "ok"}]},
                {"messages": TRAJECTORY},
            ],
            40,
            "visgen.jsonl",
        )


def test_strangers_records_that_cannot_be_trained_on_are_skipped_and_counted(tokenizer, capsys):
    """A control token and a long record of the general part end no run; our own data do."""
    answer = {"role": "assistant", "content": "ok"}
    records = [
        {"messages": [USER, answer]},
        {"messages": [USER, {**answer, "content": "a<|im_end|>b"}]},
        {"messages": [USER, {**answer, "content": "word " * 200}]},
        {"messages": [USER]},
    ]
    kept = P.encode_records(tokenizer, records, 60, "general.jsonl", skips=True)
    assert kept == P.encode_records(tokenizer, records[:1], 60, "general.jsonl")
    said = capsys.readouterr().out
    assert "3 of 4 records skipped (2 cannot be encoded, 1 longer than a row)" in said
    assert "general.jsonl, record 1: the agent's turn holds 2 control tokens" in said
    for bad in records[1:]:
        with pytest.raises(SystemExit, match="visgen.jsonl, record 0"):
            P.encode_records(tokenizer, [bad], 60, "visgen.jsonl")
        with pytest.raises(SystemExit, match="no record of general.jsonl can be trained on"):
            P.encode_records(tokenizer, [bad], 60, "general.jsonl", skips=True)


def test_a_run_goes_on_without_a_bad_general_record(run, tmp_path, monkeypatch, capsys):
    there = copy_run(run, tmp_path / "run", monkeypatch)
    path = there / "data" / "general.jsonl"
    bad = {"messages": [USER, {"role": "assistant", "content": "<|im_start|>"}], "tools": None}
    with open(path, "a") as file:
        file.write(json.dumps(bad) + "\n")
    P.train_pst(tiny_config(stages=[Stage(0.2, 1)]), there)
    assert "general.jsonl: 1 of 21 records skipped" in capsys.readouterr().out


# --- training, checkpoints ------------------------------------------------------------------------


def copy_run(run, folder, monkeypatch):
    """A fresh run folder with the same data; data are not made anew."""
    import shutil

    shutil.copytree(run / "data", folder / "data")
    monkeypatch.setattr(P, "ensure_data", lambda config, run: None)
    return folder


def metrics(run):
    """Lines of metrics.jsonl without the speed."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "tok_s"} for x in lines]


def by_step(run):
    """{(stage, step): its line} of metrics.jsonl."""
    return {(line["stage"], line["step"]): line for line in metrics(run)}


@pytest.mark.parametrize(
    "tune, optimizer", [("full", "adamw"), ("full", "muon"), ("lora", "adamw")]
)
def test_resume_equals_a_straight_run(run, tmp_path, monkeypatch, tune, optimizer):
    from safetensors.torch import load_file

    config = tiny_config(tune=tune, optimizer=optimizer, stages=[Stage(0.5, 5), Stage(0.2, 5)])
    monkeypatch.setattr(P, "LOG_EVERY", 2)
    straight = copy_run(run, tmp_path / "straight", monkeypatch)
    final = P.train_pst(config, straight)
    assert (
        len(checkpoints.list_checkpoints(straight / "pst")) == 2
        and P.train_pst(config, straight) == final
    )

    broken = copy_run(run, tmp_path / "broken", monkeypatch)
    steps, train_stage = [], P.train_stage
    for stage, stop in (
        (1, 1),
        (1, 3),
        (2, 2),
    ):  # killed inside stage 1, at its checkpoint, inside stage 2
        monkeypatch.setattr(
            P,
            "train_stage",
            lambda c, r, s, *a, start=None, stage=stage, stop=stop: train_stage(
                c, r, s, *a, start=start, stop_at=stop if s == stage else None
            ),
        )
        with pytest.raises(SystemExit) as stopped:
            P.train_pst(config, broken)
        assert stopped.value.code == 130
        steps.append(checkpoints.list_checkpoints(broken / "pst")[-1].name)
        # As if it had been killed a step after the checkpoint: that step is done again.
        append_metrics(broken, {"phase": "pst", "stage": stage, "step": stop + 1, "loss": 9.0})
    assert steps == ["stage-1-step-1", "stage-1-step-3", "stage-2-step-2"]
    monkeypatch.setattr(P, "train_stage", train_stage)
    other = P.train_pst(config, broken)
    one, two = (load_file(f / "model.safetensors") for f in (final, other))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert metrics(straight) == metrics(broken)
    assert not [p for p in broken.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth", ".tmp")]


def test_base_is_made_once_and_goes_on_where_it_stopped(run, tokenizer, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    config, device, train_stage = tiny_config(optimizer="muon"), torch.device("cpu"), P.train_stage
    config = replace(config, model=replace(config.model, base_examples=20))
    straight, broken = (
        copy_run(run, tmp_path / name, monkeypatch) for name in ("straight", "broken")
    )
    P.base_policy(config, straight, tokenizer, device)
    monkeypatch.setattr(
        P, "train_stage", lambda *a, start=None: train_stage(*a, start=start, stop_at=1)
    )
    with pytest.raises(SystemExit):
        P.base_policy(config, broken, tokenizer, device)
    assert [p.name for p in checkpoints.list_checkpoints(broken / "base")] == ["stage-0-step-1"]
    monkeypatch.setattr(P, "train_stage", train_stage)
    P.base_policy(config, broken, tokenizer, device)
    one, two = (load_file(f / "base/final/model.safetensors") for f in (straight, broken))
    assert all(torch.equal(one[k], two[k]) for k in one)
    start = build_policy(config, tokenizer, device).state_dict()
    monkeypatch.setattr(P, "train_stage", lambda *a, **k: pytest.fail("trained again"))
    again = P.base_policy(config, straight, tokenizer, device).state_dict()
    assert all(torch.equal(again[k], one[k]) for k in one) and not all(
        torch.equal(start[k], one[k]) for k in one
    )


def test_reading_is_measured_after_the_base(run, tokenizer, tmp_path, monkeypatch, capsys):
    config = tiny_config()
    kinds = {"copy": 1, "reading": 1}
    config = replace(
        config,
        model=replace(config.model, base_general=20),
        data=replace(config.data, general_kinds=kinds),
    )
    there = copy_run(run, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(reading_exercises, "REQUESTS", 2)
    P.base_policy(config, there, tokenizer, torch.device("cpu"))  # without one to copy
    logged = [m for m in read_jsonl(there / "metrics.jsonl") if m["phase"] == "reading"]
    assert [m["after"] for m in logged] == ["base"]
    assert set(logged[0]["reading"]) == {"visgen", "train", "heldout", "bench"}
    assert logged[0]["reading"]["heldout"]["facts"] == 0  # it has seen no request
    assert "reading after base" in capsys.readouterr().out


def test_ctrl_c_saves_the_step(run, tmp_path, monkeypatch, capsys):
    import os
    import signal

    there = copy_run(run, tmp_path / "run", monkeypatch)
    backward, calls = P.backward_step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the first is the pass that measures speed
            os.kill(os.getpid(), signal.SIGINT)
        return backward(*arguments)

    monkeypatch.setattr(P, "backward_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        P.train_pst(tiny_config(save_every=100), there)
    assert stopped.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in checkpoints.list_checkpoints(there / "pst")] == ["stage-1-step-2"]
    assert "saved at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_cut_off_checkpoint_is_named(tmp_path, policy, name, harm):
    config = tiny_config()
    optimizer = P.make_optimizers(config, policy, Stage())
    folder = tmp_path / "stage-1-step-5"
    checkpoints.save_checkpoint(
        folder,
        policy,
        optimizer,
        {"stage": 0, "step": 5, "window": {}, "config": checkpoints.config_digest(config)},
    )
    checkpoints.read_checkpoint(config, folder)
    path = folder / name
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(
            path.read_bytes()[:-1] if path.suffix == ".json" else path.read_bytes()[:5]
        )
    with pytest.raises(SystemExit) as error:
        checkpoints.read_checkpoint(config, folder)
    assert str(path) in str(error.value) and "delete the folder" in str(error.value)


def test_checkpoint_of_another_config_is_refused(tmp_path, policy):
    config = tiny_config()
    checkpoints.save_checkpoint(
        tmp_path / "stage-1-step-5",
        policy,
        P.make_optimizers(config, policy, Stage()),
        {"stage": 0, "step": 5, "window": {}, "config": checkpoints.config_digest(config)},
    )
    with pytest.raises(SystemExit, match="another config"):
        checkpoints.read_checkpoint(replace(config, seed=1), tmp_path / "stage-1-step-5")


def test_init_from(run, tmp_path, monkeypatch):
    there = copy_run(run, tmp_path / "run", monkeypatch)
    final = P.train_pst(tiny_config(stages=[Stage(0.2, 1)]), there)
    assert P.train_pst(tiny_config(init_from=str(final)), tmp_path / "other") == final
    with pytest.raises(SystemExit, match="init_from"):
        P.train_pst(tiny_config(init_from=str(tmp_path / "nowhere")), tmp_path / "other")


def test_learning_rate():
    config = tiny_config(warmup=0.1, cooldown=0.3)
    rates = [P.lr_share(config, s, 100) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:70] == [1.0] * 61 and rates[70] < 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.05)
    assert P.lr_share(config, 0, 1) == pytest.approx(0.05)


def test_no_cooldown_is_no_fall():
    config = tiny_config(warmup=0.0, cooldown=0.0)
    assert [P.lr_share(config, s, 10) for s in range(10)] == [1.0] * 10


def test_one_curve_goes_over_all_stages(run, tmp_path, monkeypatch):
    """One rise, one fall; a stage's lr is its peak on it."""
    stages = [Stage(0.5, 5, lr=0.01), Stage(0.2, 5, lr=0.002), Stage(0.2, 5, lr=0.002)]
    config = tiny_config(stages=stages, warmup=0.2, cooldown=0.4)
    monkeypatch.setattr(P, "LOG_EVERY", 1)
    there = copy_run(run, tmp_path / "run", monkeypatch)
    P.train_pst(config, there)
    lines = by_step(there)
    shares = [line["lr"] / stages[stage - 1].lr for (stage, _), line in sorted(lines.items())]
    n = len(shares)
    assert n > 8 and len({stage for stage, _ in lines}) == 3
    assert shares == pytest.approx([P.lr_share(config, step, n) for step in range(n)])
    top = [i for i, share in enumerate(shares) if share == pytest.approx(1.0)]
    assert top == list(range(top[0], top[-1] + 1)) and 0 < top[0] and top[-1] < n - 1
    # Stages may be cut anywhere: a step's share depends on the steps of all stages and its place.
    assert P.lr_shares(config, [3, 5, 2], 1) == [P.lr_share(config, s, 10) for s in range(3, 8)]
    assert P.lr_shares(config, [10], 0) == [P.lr_share(config, s, 10) for s in range(10)]


def test_the_moments_go_on_from_stage_to_stage(run, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    config = tiny_config(stages=[Stage(0.5, 5), Stage(0.2, 5)], optimizer="muon")
    there = copy_run(run, tmp_path / "run", monkeypatch)
    P.train_pst(config, there)
    last = checkpoints.list_checkpoints(there / "pst")[-1]
    moments = load_file(last / "optimizer.safetensors")
    counted = {int(value) for name, value in moments.items() if name.endswith(".step")}
    assert counted == {sum(max(s for g, s in by_step(there) if g == stage) for stage in (1, 2))}


def test_lines_of_lost_work_are_taken_back(run, tmp_path, monkeypatch):
    """A run killed after a line was written, before its step was saved, and inside a line."""
    config = tiny_config(stages=[Stage(0.5, 5), Stage(0.2, 5)])
    monkeypatch.setattr(P, "LOG_EVERY", 1)
    straight = copy_run(run, tmp_path / "straight", monkeypatch)
    P.train_pst(config, straight)
    there = copy_run(run, tmp_path / "run", monkeypatch)
    backward, calls = P.backward_step, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 6:  # the first is the pass that measures speed: four steps, saved at 3
            raise KeyboardInterrupt
        return backward(*arguments)

    monkeypatch.setattr(P, "backward_step", killed)
    with pytest.raises(KeyboardInterrupt):
        P.train_pst(config, there)
    path = there / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 4
    with open(path, "a") as file:
        file.write('{"phase": "eval", "step": 0}\n{"phase": "pst", "sta')
    P.train_pst(config, there)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines.pop(3) == {"phase": "eval", "step": 0}
    whole = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    for line in lines + whole:
        del line["tok_s"]
    assert lines == whole


def test_an_adapters_layers_are_written_in_one_order(tmp_path, policy):
    """PEFT holds them in a set, whose order is another one in each process."""
    config = tiny_config(tune="lora")
    adapted = add_lora(config, policy)
    folder = tmp_path / "stage-1-step-5"
    state = {"stage": 1, "step": 5, "window": {}, "config": checkpoints.config_digest(config)}
    checkpoints.save_checkpoint(folder, adapted, [], state)
    layers = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(layers) > 8 and layers == sorted(layers)


def test_a_break_while_a_checkpoint_is_replaced_leaves_the_old_one(tmp_path, policy, monkeypatch):
    """Under its own name a folder is never half there."""
    import shutil

    folder = tmp_path / "stage-1-step-5"
    state = {
        "stage": 1,
        "step": 5,
        "window": {},
        "config": checkpoints.config_digest(tiny_config()),
    }
    optimizers = P.make_optimizers(tiny_config(), policy, Stage())
    checkpoints.save_checkpoint(folder, policy, optimizers, state)
    remove = shutil.rmtree

    def broken_off(path, **settings):
        assert path != folder
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", broken_off)
    checkpoints.save_checkpoint(folder, policy, optimizers, {**state, "step": 6})
    assert checkpoints.read_checkpoint(tiny_config(), folder)[2]["step"] == 6
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_muon_takes_the_matrices_of_the_blocks(policy):
    adamw, muon = P.make_optimizers(
        tiny_config(optimizer="muon"), policy, Stage(lr=0.01, matrix_lr=0.02)
    )
    names = [n for o in (adamw, muon) for g in o.param_groups for n in g["names"]]
    assert sorted(names) == sorted(checkpoints.trained_parameters(policy)) and isinstance(
        muon, torch.optim.Muon
    )
    assert all(".layers." in n and "norm" not in n for g in muon.param_groups for n in g["names"])
    (alone,) = P.make_optimizers(
        tiny_config(optimizer="muon"),
        add_lora(tiny_config(), copy.deepcopy(policy)),
        Stage(lr=0.01, matrix_lr=0.02),
    )
    assert isinstance(alone, torch.optim.Muon) and all(
        "lora_" in n for g in alone.param_groups for n in g["names"]
    )  # an adapter has nothing for AdamW
    assert {g["peak"] for g in adamw.param_groups} == {0.01} and {
        g["peak"] for g in muon.param_groups
    } == {0.02}


# --- LoRA, answers --------------------------------------------------------------------------------


def test_what_is_trained_beside_a_bfloat16_base_is_float32(tokenizer, examples):
    """Small steps move the adapter and the final norm; bfloat16 would round them off."""
    config = tiny_config()
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    policy = add_lora(config, build_policy(config, tokenizer, torch.device("cpu")), norm=True)
    trained = checkpoints.trained_parameters(policy)
    norm = [p for name, p in trained.items() if "modules_to_save" in name]
    assert len(norm) == 1 and {p.dtype for p in trained.values()} == {torch.float32}
    before = norm[0].detach().clone()
    ids, positions, mask = batch(examples[1], [[0, 1]], tokenizer)
    optimizer = torch.optim.AdamW(norm, lr=1e-4, weight_decay=0.0)
    for _ in range(3):
        logprobs = token_logprobs(policy, ids, positions, mask[:, 1:])
        (-logprobs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (norm[0] - before).abs().max() > 1e-4
    plain = plain_logprobs(policy, ids, positions, mask[:, 1:])
    assert plain.dtype == torch.float32 and torch.isfinite(plain).all()
    with policy.disable_adapter():  # pi_pst, all in bfloat16
        assert torch.isfinite(token_logprobs(policy, ids, positions, mask[:, 1:])).all()


def test_lora_merge_equals_the_adapter(policy, tokenizer, examples):
    ids, positions, mask = batch(examples[1], [[0, 1]], tokenizer)
    before = token_logprobs(policy, ids, positions, mask[:, 1:]).detach()
    adapted = add_lora(tiny_config(), policy)
    names = checkpoints.trained_parameters(adapted)
    assert (
        names
        and all("lora_" in n for n in names)
        and not any("lm_head" in n or "embed" in n for n in names)
    )
    assert torch.equal(
        before, token_logprobs(adapted, ids, positions, mask[:, 1:]).detach()
    )  # starts as the base
    torch.manual_seed(0)
    with torch.no_grad():
        for p in names.values():
            p.normal_(0, 0.1)
    with_adapter = token_logprobs(adapted, ids, positions, mask[:, 1:]).detach()
    assert (with_adapter - before).abs().max() > 0.01
    merged = merge_lora(adapted)
    assert type(merged).__name__ == "Qwen3ForCausalLM" and not any(
        "lora" in n for n, _ in merged.named_parameters()
    )
    torch.testing.assert_close(
        token_logprobs(merged, ids, positions, mask[:, 1:]).detach(),
        with_adapter,
        atol=1e-5,
        rtol=0,
    )


def test_policy_from_scratch_depends_on_the_seed_alone(tokenizer):
    config, device = tiny_config(), torch.device("cpu")
    one, two, three = (
        build_policy(c, tokenizer, device).state_dict()
        for c in (config, config, replace(config, seed=1))
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], three[k]) for k in one)
    assert one["model.embed_tokens.weight"].shape[0] == len(tokenizer)


def test_general_exact_match(policy, tokenizer):
    """A policy that learnt three items by heart answers them, in batches of different lengths."""
    items = [
        {
            "messages": [
                {"role": "user", "content": "What is 12 + 30?"},
                {"role": "assistant", "content": "42"},
            ],
            "kind": "arithmetic",
        },
        {
            "messages": [
                {"role": "user", "content": "three images"},
                {"role": "assistant", "content": "kettle"},
            ],
            "kind": "instruction",
        },
        {
            "messages": [
                {"role": "user", "content": "add"},
                {
                    "role": "assistant",
                    "content": '<tool_call>{"name": "add", "arguments": {"n": 3}}</tool_call>',
                },
            ],
            "tools": SCHEMA,
            "kind": "function",
        },
    ]
    pool = P.encode_records(tokenizer, items, 256, "items")
    before = evaluation.general_exact_match(
        partial(
            evaluation.greedy_answers,
            policy,
            tokenizer,
            device=torch.device("cpu"),
            max_new_tokens=8,
        ),
        tokenizer,
        items,
    )
    assert before == {"arithmetic": 0, "instruction": 0, "function": 0, "general": 0}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(60):
        P.backward_step(tiny_config(), policy, [[0, 1, 2]], pool, 0, torch.device("cpu"))
        optimizer.step()
        optimizer.zero_grad()
    assert (
        evaluation.general_exact_match(
            partial(evaluation.greedy_answers, policy, tokenizer, device=torch.device("cpu")),
            tokenizer,
            items,
        )["general"]
        == 1
    )


@pytest.mark.parametrize(
    "said, same",
    [
        ('<tool_call>{"arguments": {"b": 2, "a": 1},  "name": "add"}</tool_call>', True),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', False),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}</tool_call>', False),
        ("3", False),
    ],
)
def test_function_calls_are_compared_as_json(said, same):
    assert (
        evaluation.same_answer(
            said,
            '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>',
            "function",
        )
        is same
    )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder) / "data" / "tokenizer")
        rows = mask_table(load_tokenizer(tiny_config(), Path(folder)))
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} tokens -> {GOLDEN}")
