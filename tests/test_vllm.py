"""vLLM as the sampler, with the real engine (its CPU build): rollouts equal to ours, the adapter's
way over, mismatch, a whole run.

Needs vllm, which has an environment of its own in `.ci/run`; without it everything here is skipped.
One engine serves the file.
"""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vllm is not installed; `.ci/run` makes an environment with its CPU build"
)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import test_node  # noqa: E402
import test_vrl  # noqa: E402
from test_node import given  # noqa: E402
from test_vrl import move, settings, trainer_logprobs, with_adapter  # noqa: E402

from lib import engine_check, vllm_engine  # noqa: E402
from lib.engine_check import check_engine, fixed_sequence, sync_sampler  # noqa: E402
from lib.policy import build_policy, save_policy  # noqa: E402
from lib.rollout import open_rollouts  # noqa: E402
from lib.sampler import sample_rollouts  # noqa: E402
from lib.vllm_engine import VllmEngine  # noqa: E402

CPU = torch.device("cpu")

# Fixtures that other files define.
chatty = test_vrl.chatty
tasks = test_vrl.tasks
tokenizer = test_vrl.tokenizer
vl = test_node.vl


@pytest.fixture(scope="module")
def model(tokenizer):
    """A random policy whose turns end now and then: that token has a longer row in the head."""
    model = (
        build_policy(settings(model={"head_dim": 32}), tokenizer, CPU).eval().requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(0, 0.4, generator=generator)
    head = torch.nn.Linear(32, len(tokenizer), bias=False).requires_grad_(False)
    head.weight.normal_(0, 0.4, generator=generator)
    head.weight[tokenizer.eos_token_id] *= 4.0
    model.lm_head, model.config.tie_word_embeddings = head, False
    return model


@pytest.fixture(scope="module")
def config():
    return settings(
        rollout={"engine": "vllm"}, model={"head_dim": 32}
    )  # its attention on a CPU has no smaller head


@pytest.fixture(scope="module")
def loaded(model, tokenizer, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "final"
    save_policy(copy.deepcopy(model), tokenizer, folder)
    return VllmEngine(folder, config, CPU, bf16=False)


@pytest.fixture
def engine(loaded):
    """The engine as a new run finds it: without an adapter."""
    if loaded.adapter:
        loaded.engine.remove_lora(loaded.adapter.lora_int_id)
    loaded.llm.reset_prefix_cache()
    loaded.adapter = loaded.weights = None
    return loaded


def test_greedy_rollouts_equal_our_samplers(engine, model, tokenizer, tasks, chatty, config):
    ours, theirs = (
        sample_rollouts(x, tokenizer, tasks, config, 0.0, seed=0) for x in (model, engine)
    )
    assert [r.ids for r in ours] == [r.ids for r in theirs] and [r.loss_mask for r in ours] == [
        r.loss_mask for r in theirs
    ]
    assert [r.trajectory for r in ours] == [r.trajectory for r in theirs]
    assert sum(len(r.trajectory["turns"]) >= 2 for r in ours) >= 3, "too few turns to tell"
    assert (
        max(abs(a - b) for r, s in zip(ours, theirs) for a, b in zip(r.logprobs, s.logprobs)) < 1e-4
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_logprobs_are_the_trainers(
    engine, model, tokenizer, tasks, chatty, config, temperature
):
    rollouts = sample_rollouts(
        engine, tokenizer, tasks[:5], config, temperature, seed=3, group_size=3
    )
    assert len({tuple(r.ids) for r in rollouts}) > 7, "a group samples the same"
    for r in rollouts:
        sampled = torch.tensor(r.logprobs[1:]) * torch.tensor(r.loss_mask[1:])
        assert (trainer_logprobs(model, r, temperature) - sampled).abs().max() < 1e-4
        assert all((x < 0) if m else (x == 0) for x, m in zip(r.logprobs, r.loss_mask))


def test_a_rollout_does_not_depend_on_the_others(engine, tokenizer, tasks, chatty, config):
    together = sample_rollouts(engine, tokenizer, tasks[:6], config, 1.0, seed=5, group_size=2)
    alone = sample_rollouts(engine, tokenizer, tasks[3:4], config, 1.0, seed=5, group_size=2)
    assert [r.ids for r in together[6:8]] == [r.ids for r in alone]
    again = sample_rollouts(engine, tokenizer, tasks[:6], config, 1.0, seed=5, group_size=2)
    other = sample_rollouts(engine, tokenizer, tasks[:6], config, 1.0, seed=6, group_size=2)
    assert [r.ids for r in together] == [r.ids for r in again] != [r.ids for r in other]


def test_turns_are_queued_as_they_end(engine, tokenizer, tasks, chatty, config, monkeypatch):
    """No lockstep: some rollout's later turn is queued before another's first has ended."""
    log, submit, go_on = [], VllmEngine.submit, vllm_engine.go_on
    monkeypatch.setattr(
        VllmEngine,
        "submit",
        lambda self, name, *a: (log.append(("queued", name)), submit(self, name, *a))[1],
    )
    monkeypatch.setattr(
        vllm_engine,
        "go_on",
        lambda out, *a: (log.append(("ended", out.task["id"])), go_on(out, *a))[1],
    )
    sample_rollouts(engine, tokenizer, tasks, config, 1.0, seed=1)
    ended, early = set(), 0
    for what, name in log:
        ended |= {name} if what == "ended" else set()
        early += what == "queued" and not name.endswith("-0") and len(ended) < len(tasks)
    assert early >= 2


def test_groups_and_turns_share_what_was_read(engine, tokenizer, tasks, config):
    """Long prompts (all tools' schemas): a group's is read once, a later turn reads what is new."""
    long = replace(
        config,
        rollout=replace(config.rollout, tools="schema", tool_pool="all", max_turn_tokens=4),
        model=replace(config.model, max_len=10**6),
    )
    engine.cached_share()
    rollouts = open_rollouts(tokenizer, tasks[:1], long, 0, 1)[0]
    prompt = rollouts[0].ids[:900]
    for _ in range(2):
        engine.answers(tokenizer, [prompt], max_new_tokens=2)
    assert (
        0.4 < engine.cached_share() < 0.6
    )  # nothing of the first reading, all but the last block of the second


def test_more_prompts_than_one_pass_reads(engine, tokenizer, config):
    """With a seed each. The CPU build breaks where a prompt with a seed is read in two parts."""
    for i in range(12):
        engine.submit(
            f"{i}-0", [7 + (i * k) % 90 for k in range(900)], 4, 1.0, i, tokenizer.eos_token_id
        )
    said = {}
    while engine.busy():
        said.update((name, ids) for name, ids, _ in engine.step())
    assert len(said) == 12 and all(1 <= len(ids) <= 4 for ids in said.values())


def test_each_version_of_the_adapter_goes_over_and_the_old_one_leaves(
    engine, model, tokenizer, tasks, chatty, config
):
    policy, names = with_adapter(model), []
    fixed = fixed_sequence(engine, policy, tokenizer, tasks[0], config)
    for version, by in ((1, 0.0), (2, 0.3), (3, 0.6)):
        move(policy, by, seed=version)
        sync_sampler(engine, policy)
        assert engine.engine.list_loras() == {version} and engine.adapter.lora_int_id == version
        names.append(engine.adapter.lora_name)
        seen = check_engine(engine, policy, fixed, config)
        assert seen["sync_gap_max"] < 1e-4
        if version > 1:
            assert seen["adapter_share"] == pytest.approx(1, abs=1e-3)
        rollout = sample_rollouts(engine, tokenizer, tasks[:1], config, 1.0, seed=0)[0]
        stale = trainer_logprobs(model, rollout, 1.0) - torch.tensor(
            rollout.logprobs[1:]
        ) * torch.tensor(rollout.loss_mask[1:])
        assert (stale.abs().max() > 0.05) == (version > 1), "the adapter makes no difference"
    assert len(set(names)) == 3


def test_a_sync_that_changes_nothing_is_an_error(engine, model):
    policy = with_adapter(model, 0.3)
    sync_sampler(engine, policy)
    with pytest.raises(SystemExit, match="sync without a change"):
        sync_sampler(engine, policy)
    held = engine.adapter
    sync_sampler(engine, policy, changed=False)  # after a step that trained nothing
    assert engine.adapter is held


def test_a_sampler_left_behind_stops_the_run(engine, model, tokenizer, tasks, chatty, config):
    policy = with_adapter(model, 0.3)
    fixed = fixed_sequence(engine, policy, tokenizer, tasks[0], config)
    with pytest.raises(SystemExit, match="0% of that is found.*does not hold the policy's weights"):
        check_engine(engine, policy, fixed, config)
    sync_sampler(engine, policy)
    move(policy, 0.6, seed=4)
    with pytest.raises(SystemExit, match="does not hold the policy's weights"):
        check_engine(engine, policy, fixed, config)


def test_its_scores_are_what_it_sampled(engine, model, tokenizer, tasks, chatty, config):
    """A rollout read as a prompt, with the adapter: the log-probabilities it was sampled with."""
    policy = with_adapter(model, 0.3)
    sync_sampler(engine, policy)
    for r in sample_rollouts(engine, tokenizer, tasks[:4], config, 1.0, seed=2):
        sampled = torch.tensor(r.logprobs)[torch.tensor(r.loss_mask, dtype=torch.bool)]
        assert (engine.score(r) - sampled).abs().max() < 1e-4
        assert (engine.score(r, adapter=False) - sampled).abs().max() > 0.05


def test_the_adapter_loads_in_transformers_as_it_is(
    engine, model, tokenizer, tasks, chatty, config
):
    from peft import PeftModel

    sync_sampler(engine, with_adapter(model, 0.3))
    again = PeftModel.from_pretrained(copy.deepcopy(model), engine.adapter.lora_path)
    fixed = fixed_sequence(engine, again, tokenizer, tasks[0], config)
    assert check_engine(engine, again, fixed, config)["sync_gap_max"] < 1e-4


def test_greedy_answers_equal_generates(engine, model, tokenizer):
    from lib.evaluation import greedy_answers

    prompts = [tokenizer.encode(text) for text in ("a logo", "three films of a fox", "x")]
    assert engine.answers(tokenizer, prompts, max_new_tokens=12) == greedy_answers(
        model, tokenizer, prompts, CPU, max_new_tokens=12
    )


def test_a_qwen3_vl_with_its_adapter(vl, chatty, tmp_path):
    """Its language part, the tower left out: greedy rollouts and log-probabilities are ours.

    Before and after a sync; a picture is refused. vLLM's Qwen3-VL needs torchvision, whose build
    for the CPU is not on PyPI; `.ci/run` makes its CUDA build load without its own operators.
    """
    pytest.importorskip(
        "torchvision",
        reason="torchvision is not installed; `.ci/run` says how it loads beside a CPU's torch",
    )
    from lib.policy import load_policy
    from lib.tokens import load_tokenizer

    folder = shutil.copytree(vl[1], tmp_path / "vl")
    config = replace(
        vl[0],
        rollout=replace(vl[0].rollout, engine="vllm"),
        model=replace(vl[0].model, path=str(folder)),
    )
    tokenizer = load_tokenizer(config, tmp_path)
    plain = load_policy(folder, config, tokenizer, CPU).eval().requires_grad_(False)
    plain.lm_head.weight[tokenizer.eos_token_id] *= 8.0  # so that turns end
    plain.lm_head.weight[len(tokenizer) :] = 0.0  # rows of the head that are no token
    plain.save_pretrained(folder)
    policy = with_adapter(load_policy(folder, config, tokenizer, CPU), 0.3)
    some = [{**given(), "id": f"t-0{i}"} for i in range(8)]
    engine = VllmEngine(folder, config, CPU, bf16=False)
    ours, theirs = (
        sample_rollouts(x, tokenizer, some, config, 0.0, seed=0) for x in (plain, engine)
    )
    assert [r.ids for r in ours] == [r.ids for r in theirs]
    rollouts = sample_rollouts(engine, tokenizer, some, config, 1.0, seed=0)
    assert max(len(r.trajectory["turns"]) for r in rollouts) >= 2
    for r in rollouts:
        sampled = torch.tensor(r.logprobs[1:]) * torch.tensor(r.loss_mask[1:])
        assert (trainer_logprobs(plain, r, 1.0) - sampled).abs().max() < 1e-4
    fixed = fixed_sequence(engine, policy, tokenizer, some[0], config)
    sync_sampler(engine, policy)
    assert check_engine(engine, policy, fixed, config)["sync_gap_max"] < 1e-4
    with pytest.raises(SystemExit, match="t-09 has a picture.*rollout.engine=transformers"):
        sample_rollouts(engine, tokenizer, [{**given(vl[2][0]), "id": "t-09"}], config, 0.0, seed=0)


def test_a_4_bit_policy_has_its_base_in_8_bits_here(
    tokenizer, tasks, chatty, tmp_path, monkeypatch
):
    """vLLM reads no nf4: its fp8 and the trainer's nf4 differ by rounding.

    More than float32 does, and less than another adapter, whose effect is missed all the same.
    """
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed; requirements-gpu.txt has it"
    )
    from lib.policy import load_policy

    config = settings(
        rollout={"engine": "vllm"},
        model={"head_dim": 32, "quantize": "nf4", "hidden_size": 64, "intermediate_size": 64},
    )
    save_policy(
        build_policy(replace(config, model=replace(config.model, quantize="none")), tokenizer, CPU),
        tokenizer,
        tmp_path / "final",
    )
    policy = with_adapter(
        load_policy(tmp_path / "final", config, tokenizer, CPU, quantize=True), 0.3
    )
    engine = VllmEngine(tmp_path / "final", config, CPU, bf16=False)
    fixed = fixed_sequence(engine, policy, tokenizer, tasks[0], config)
    sync_sampler(engine, policy)
    rounding = check_engine(engine, policy, fixed, config)["sync_gap_p99"]
    move(policy, 0.6, seed=4)
    monkeypatch.setattr(engine_check, "ALLOWED", {("cpu", "4 bits"): ("p99", 100.0)})
    monkeypatch.setattr(engine_check, "SHARE", (-100.0, 100.0))
    stale = check_engine(engine, policy, fixed, config)["sync_gap_p99"]
    assert 1e-4 < rounding < stale / 3 and not engine.exact


def test_a_whole_run():
    """smoke.yaml from data to table with rollouts by vLLM; metrics.jsonl tells the mismatch."""
    done = subprocess.run(
        [
            sys.executable,
            "train_vrl.py",
            "--config",
            "configs/smoke.yaml",
            "name=test-vllm",
            "rollout.engine=vllm",
            "vrl.tune=lora",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [
        m
        for m in map(
            json.loads, open(ROOT / "runs" / "test-vllm" / "metrics.jsonl", encoding="utf-8")
        )
        if m["phase"] == "vrl"
    ]
    assert len(steps) == 3 and "greedy R_vrt" in done.stdout
    for m in steps:
        assert m["sync_gap_max"] < 1e-4 and 0 <= m["prompt_cached"] <= 1
        if m["trained"]:
            assert 0 <= m["gap_mean"] <= m["gap_p99"] <= m["gap_max"] < 1e-3


def test_two_ranks_each_with_an_engine():
    """Both play their share, all train on all of it, and they leave without a word."""
    run = ROOT / "runs" / "test-vllm-2"
    shutil.rmtree(run, ignore_errors=True)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("torchrun"),
            "--nproc_per_node",
            "2",
            "train_vrl.py",
            "--config",
            "configs/smoke.yaml",
            "device=cpu",
            "name=test-vllm-2",
            "rollout.engine=vllm",
            "vrl.tune=lora",
            "vrl.steps=1",
            "vrl.tasks_per_step=2",
            "model.base_examples=40",
            "data.queries=42",
            "data.general=60",
            "data.general_heldout=8",
            "data.train_tasks=42",
            "data.heldout_tasks=2",
            "pst.stages=[{general: 0.5, repeat: 1}, {general: 0.2, repeat: 1}]",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    step = next(
        m
        for m in map(json.loads, open(run / "metrics.jsonl", encoding="utf-8"))
        if m["phase"] == "vrl"
    )
    rollouts = [
        json.loads(line)
        for line in open(run / "vrl" / "rollouts" / "step-1.jsonl", encoding="utf-8")
    ]
    assert sum(step["ended"].values()) == len(rollouts) == 8 and step["sync_gap_max"] < 1e-4
    shutil.rmtree(run)
