"""Virtual Reinforcement Learning: the GRPO loss, advantages, the sampler, adapter sync, resuming.

The policy is random (2 layers, 32 wide), with weights large enough that every token's
log-probability depends on its history, and a head that favours the end of turn. ChattyEnv takes any
text as a turn, so that such a policy plays several.
"""

import copy
import doctest
import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import measure_speed  # noqa: E402

import train_vrl  # noqa: E402
from env import VisGenEnv  # noqa: E402
from lib import checkpoints, engine_check, evaluation, rollout, sampler  # noqa: E402
from lib import figures as figures_of_runs  # noqa: E402
from lib.checkpoints import trained_parameters  # noqa: E402
from lib.engine_check import sync_sampler  # noqa: E402
from lib.evaluation import part_variances, score_rollouts  # noqa: E402
from lib.experiment import Config, build  # noqa: E402
from lib.expert import vision_agent  # noqa: E402
from lib.figures import (  # noqa: E402
    MOVING,
    mean_of_last,
    plot_curve,
    plot_held_out,
    plot_rewards,
    print_intervals,
    print_own_tasks,
    vrl_metrics,
    write_trajectories,
)
from lib.policy import add_lora, build_policy, token_logprobs  # noqa: E402
from lib.reading import kinds_of_wish  # noqa: E402
from lib.rollout import Rollout  # noqa: E402
from lib.runs import read_jsonl, seeded_rng, write_jsonl  # noqa: E402
from lib.sampler import sample_rollouts  # noqa: E402
from lib.tasks import make_tasks  # noqa: E402
from lib.text import tag  # noqa: E402
from lib.tokenizer import train_tokenizer  # noqa: E402
from lib.tokens import (  # noqa: E402
    encode_agent,
    encode_prompt,
    encode_tool_messages,
    encode_trajectory,
    load_tokenizer,
)
from lib.vllm_engine import VllmEngine, engine_dtype  # noqa: E402
from rewards import PARTS  # noqa: E402
from train_vrl import (  # noqa: E402
    collate,
    group_advantages,
    grpo_loss,
    micro_batches,
    set_advantages,
    step_tasks,
    update,
)

SMALL = {
    "name": "t",
    "device": "cpu",
    "model": {
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "max_len": 1024,
        "autocast": False,
        "lora_rank": 4,
        "lora_alpha": 8,
    },
    "vrl": {
        "tasks_per_step": 2,
        "group_size": 2,
        "steps": 4,
        "save_every": 2,
        "max_grad_norm": 1e9,
        "lr": 1e-2,
    },
    "rollout": {"max_turn_tokens": 24, "failure_scale": 0.0},
}


def test_doctests():
    for module, least in ((train_vrl, 3), (figures_of_runs, 1)):
        result = doctest.testmod(module)
        assert result.attempted >= least and result.failed == 0


def settings(**sections):
    """The small config with some keys of its sections changed: settings(vrl={"kl_coef": 0.1})."""
    return build(build(Config(), SMALL), sections)


class ChattyEnv(VisGenEnv):
    """VisGenEnv that takes any text as a turn and ends after 2 to 4 turns (by task).

    It answers with one or two tool messages.
    """

    def step(self, text):
        self.messages.append({"role": "assistant", "content": text})
        self.turns.append({"faults": [], "order": ["think"]})
        if len(self.turns) >= 2 + int(self.task["id"][-2:]) % 3:
            self.ended = "answer"
            return [], 0.0, True, False, {}
        replies = [
            {
                "role": "tool",
                "content": json.dumps({"ids": [f"img_{i}"], "size": self.seed % 1000 + len(text)}),
            }
            for i in range(1 + len(text) % 2)
        ]
        self.messages += replies
        return replies, 0.0, False, False, {}


@pytest.fixture(scope="module")
def tasks():
    return make_tasks(12, "train", Config().data, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, tasks):
    """A byte-level BPE trained on the scripted VisionAgent's words."""
    run, env = tmp_path_factory.mktemp("run"), VisGenEnv(settings().rollout)
    texts = [m["content"] for task in tasks for m in vision_agent(task, env, 0)["messages"]]
    train_tokenizer(texts, 3, 640, run / "data" / "tokenizer")
    return load_tokenizer(settings(), run)


@pytest.fixture(scope="module")
def model(tokenizer):
    """The policy; tests that change weights take a copy."""
    model = build_policy(settings(), tokenizer, torch.device("cpu")).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(0, 0.4, generator=generator)
    head = torch.nn.Linear(32, len(tokenizer)).requires_grad_(False)
    head.weight.normal_(0, 0.4, generator=generator)
    head.bias.zero_()[tokenizer.eos_token_id] = 8.0
    model.lm_head, model.config.tie_word_embeddings = head, False
    return model


@pytest.fixture
def chatty(monkeypatch):
    """Every rollout in ChattyEnv, and prompts read three at a time: several readings a batch."""
    monkeypatch.setattr(rollout, "VisGenEnv", ChattyEnv)
    monkeypatch.setattr(sampler, "READ_LANES", 3)


def with_adapter(model, moved=0.0):
    """A LoRA policy on a copy of the model; `moved` takes the adapter away from zero."""
    torch.manual_seed(0)
    policy = add_lora(settings(), copy.deepcopy(model))
    move(policy, moved)
    return policy


def move(policy, by, seed=0):
    """Give the adapter's second factor random values of that size; 0 is where an adapter starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in trained_parameters(policy).items():
            if "lora_B" in name:
                p.normal_(0, by, generator=generator)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def made_rollouts(policy, n=8, seed=0, vocabulary=200):
    """Rollouts of different lengths and several turns, advantages of both signs.

    Their log-probabilities are the policy's with a small disagreement.
    """
    rng, out = random.Random(seed), []
    for i in range(n):
        r = Rollout(
            {"id": f"t{i}"},
            i // 4,
            0,
            trajectory={"ended": "answer"},
            advantage=rng.choice([-1, 1]) * rng.uniform(0.3, 1.5),
        )
        rollout.extend(
            r, [rng.randrange(vocabulary) for _ in range(rng.randint(3, 9))], trained=False
        )
        for _ in range(rng.randint(1, 3)):
            said = rng.randint(1, 7)
            rollout.extend(
                r,
                [rng.randrange(vocabulary) for _ in range(said)],
                trained=True,
                logprobs=[0.0] * said,
            )
            rollout.extend(
                r, [rng.randrange(vocabulary) for _ in range(rng.randint(1, 5))], trained=False
            )
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([r.ids])).logits[0].log_softmax(-1)
        r.logprobs = [
            float(logits[t - 1, r.ids[t]]) + rng.uniform(-0.01, 0.01) if r.loss_mask[t] else 0.0
            for t in range(len(r.ids))
        ]
        out.append(r)
    return out


class Recorder(torch.optim.SGD):
    """SGD that keeps the gradient of every step."""

    def __init__(self, policy, lr=1e-2):
        super().__init__(trained_parameters(policy).values(), lr=lr)
        self.seen = []

    def step(self):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
        super().step()


# --------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize(
    "advantage, ratio, loss, gradient",
    [
        (+1, 2.00, -1.30, 0.0),
        (+1, 1.25, -1.25, -1.25),
        (+1, 0.90, -0.90, -0.90),
        (+1, 0.50, -0.50, -0.50),
        (-1, 2.00, +2.00, +2.00),
        (-1, 1.25, +1.25, +1.25),
        (-1, 0.90, +0.90, +0.90),
        (-1, 0.75, +0.80, 0.0),
        (-1, 0.50, +0.80, 0.0),
    ],
)
def test_clip_in_all_four_quadrants(advantage, ratio, loss, gradient):
    new = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    value, sums = grpo_loss(
        new,
        torch.tensor([[-1.0]], dtype=torch.float64),
        torch.tensor([float(advantage)]),
        torch.tensor([[True]]),
        settings(vrl={"clip_low": 0.2, "clip_high": 0.3}).vrl,
        1,
    )
    value.backward()
    assert value.item() == pytest.approx(loss) and new.grad.item() == pytest.approx(gradient)
    assert float(sums["clipped"]) == (ratio > 1.3 or ratio < 0.8) and float(
        sums["ratio"]
    ) == pytest.approx(ratio)


def slow_loss(new, old, advantages, mask, v, normalizer, ref, sampler, start, k2=False):
    """grpo_loss written as loops over tokens.

    GSPO's ratio of a token is that of its sequence at `start`, moved by this token alone. The KL's
    value is k3; `k2`: what its gradient is of.
    """
    total = 0.0
    for b, row in enumerate(mask):
        own = [t for t, m in enumerate(row) if m]
        for t in own:
            log_r = new[b][t] - old[b][t]
            if v.ratio == "sequence":
                log_r = (
                    sum(start[b][s] - old[b][s] for s in own) / len(own) + new[b][t] - start[b][t]
                )
            r = math.exp(log_r)
            clip = (
                1 - v.clip_low
                if r < 1 - v.clip_low
                else 1 + v.clip_high
                if r > 1 + v.clip_high
                else r
            )
            gain = min(r * advantages[b], clip * advantages[b])
            if v.tis_cap:
                gain *= min(math.exp(old[b][t] - sampler[b][t]), v.tis_cap)
            gap = ref[b][t] - new[b][t] if ref else 0.0
            kl = gap**2 / 2 if k2 else math.exp(gap) - gap - 1
            weight = 1 / len(own) if v.loss_mean == "sequence" else 1
            total += weight * (v.kl_coef * kl / (normalizer + 2) - gain / normalizer)
    return total


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("tis_cap", [0.0, 1.2])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_loss_equals_a_slow_reference(loss_mean, ratio, tis_cap, kl_coef):
    v = settings(
        vrl={
            "loss_mean": loss_mean,
            "ratio": ratio,
            "tis_cap": tis_cap,
            "kl_coef": kl_coef,
            "clip_high": 0.3,
        }
    ).vrl
    rng = torch.Generator().manual_seed(3)
    mask = [[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    old = -3 * torch.rand(4, 6, generator=rng, dtype=torch.float64)
    shift = torch.tensor(
        [[0.4], [-0.5], [0.0], [0.0]], dtype=torch.float64
    )  # clipped above, below, and not
    new = (
        old + 0.25 * torch.randn(4, 6, generator=rng, dtype=torch.float64) + shift
    ).requires_grad_()
    ref, sampler = (
        old + 0.3 * torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    advantages = [1.0, -0.7, 0.4, -1.2]
    for x, junk in (
        (old, -7.0),
        (new, -900.0),
        (ref, 900.0),
        (sampler, -900.0),
    ):  # what stands at other tokens must not matter
        x.data[~torch.tensor(mask, dtype=torch.bool)] = junk
    loss, sums = grpo_loss(
        new,
        old,
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(mask, dtype=torch.bool),
        v,
        5,
        ref if kl_coef else None,
        sampler,
        kl_normalizer=7,
    )
    loss.backward()
    rest = (
        old.tolist(),
        advantages,
        mask,
        v,
        5,
        ref.tolist() if kl_coef else None,
        sampler.tolist(),
        new.tolist(),
    )
    assert loss.item() == pytest.approx(slow_loss(new.tolist(), *rest), rel=1e-9)
    assert sums["tokens"] == sum(map(sum, mask)) and 0 < float(sums["clipped"]) < float(
        sums["tokens"]
    )
    for b in range(4):
        for t in range(6):
            near = [new.tolist(), new.tolist()]
            near[0][b][t] += 1e-5
            near[1][b][t] -= 1e-5
            slope = (slow_loss(near[0], *rest, k2=True) - slow_loss(near[1], *rest, k2=True)) / 2e-5
            assert new.grad[b, t].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_kl_is_counted_over_the_agents_tokens():
    ref, new = torch.tensor([[-1.0, -9.0, -2.0]]), torch.tensor([[-1.5, -1.0, -2.0]])
    _, sums = grpo_loss(
        new,
        new,
        torch.tensor([1.0]),
        torch.tensor([[1, 0, 1]]),
        settings(vrl={"kl_coef": 1.0}).vrl,
        1,
        ref,
    )
    assert float(sums["kl"]) == pytest.approx(math.exp(0.5) - 1.5)


def test_the_kls_gradient_is_that_of_kl_to_the_reference():
    """The mean over the policy's own tokens against the exact gradient of KL(pi || ref).

    And not against that of KL(ref || pi), which k3 has.
    """
    generator = torch.Generator().manual_seed(0)
    weights, ref = 1.5 * torch.randn(2, 5, generator=generator, dtype=torch.float64)
    weights.requires_grad_()
    ref = ref.log_softmax(-1)
    v = settings(vrl={"kl_coef": 1.0}).vrl
    value, gradient = 0.0, torch.zeros(5, dtype=torch.float64)
    for token in range(5):
        logprobs = weights.log_softmax(-1)
        new = logprobs[token].view(1, 1)
        loss, _ = grpo_loss(
            new,
            new.detach(),
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([[True]]),
            v,
            1,
            ref[token].view(1, 1),
        )
        p = float(logprobs[token].detach().exp())
        value += p * float(loss.detach())
        gradient += p * torch.autograd.grad(loss, weights)[0]
    now = weights.log_softmax(-1)
    exact = (now.exp() * (now - ref)).sum()
    other = (ref.exp() * (ref - now)).sum()
    wanted, wrong = (
        torch.autograd.grad(kl, weights, retain_graph=True)[0] for kl in (exact, other)
    )
    assert value == pytest.approx(float(exact.detach()))
    assert torch.allclose(gradient, wanted, atol=1e-9)
    assert not torch.allclose(wrong, wanted, atol=0.05)


# --------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_group_id_whatever_the_order():
    rewards, groups = [0.0, 0.3, 1.0, 0.9, 0.5, 0.6], ["a", "b", "a", "b", "a", "b"]
    mean, counts = group_advantages(rewards, groups, "mean")
    assert (
        mean == pytest.approx([-0.5, -0.3, 0.5, 0.3, 0.0, 0.0])
        and counts["groups"] == 2
        and counts["flat"] == 0
    )
    scaled, _ = group_advantages(rewards, groups, "mean_std")  # sample std: 0.5 and 0.3
    assert scaled == pytest.approx([-1, -1, 1, 1, 0, 0])
    order = [3, 5, 0, 4, 2, 1]
    shuffled, _ = group_advantages(
        [rewards[i] for i in order], [groups[i] for i in order], "mean_std"
    )
    assert shuffled == pytest.approx([scaled[i] for i in order])


def test_advantages_of_uneven_flat_and_single_groups():
    rewards, groups = [1.0, 1.0, 1.0, 0.2, 0.4, 0.9, 0.1, 0.1 + 1e-9], [5, 5, 5, 7, 7, 9, 2, 2]
    for how, step in (("mean", 0.1), ("mean_std", 0.5**0.5)):
        advantages, counts = group_advantages(rewards, groups, how)
        assert advantages == pytest.approx([0, 0, 0, -step, step, 0, 0, 0])
        assert (counts["groups"], counts["flat"], counts["flat_good"], counts["unscored"]) == (
            4,
            3,
            1,
            0,
        )


def test_a_failed_judge_has_no_advantage_and_no_say():
    nan = math.nan
    advantages, counts = group_advantages(
        [0.0, nan, 1.0, nan, nan, 0.7, nan], [1, 1, 1, 2, 2, 3, 3], "mean_std"
    )
    assert advantages == pytest.approx([-(0.5**0.5), 0, 0.5**0.5, 0, 0, 0, 0])
    assert counts["unscored"] == 4 and counts["groups"] == 3 and counts["flat"] == 1
    assert group_advantages([0.0, nan, 1.0], [1, 1, 1], "mean")[0] == pytest.approx([-0.5, 0, 0.5])


def test_score_of_a_failed_judge_leads_to_no_training(monkeypatch, model):
    policy = with_adapter(model, 0.1)
    rollouts = made_rollouts(policy, 4)
    given = dict(zip(("t0", "t1", "t2", "t3"), (0.2, math.nan, 0.8, 0.5)))
    for r in rollouts:
        r.trajectory.update(pool=[], task=r.task)
    monkeypatch.setattr(
        evaluation,
        "ltr_rewards",
        lambda ts, config, pools, llm: [{"total": given[t["task"]["id"]]} for t in ts],
    )
    score_rollouts(rollouts, settings())
    counts = set_advantages(rollouts, "mean")
    assert counts["unscored"] == 1
    assert [r.advantage for r in rollouts] == pytest.approx([-0.3, 0.0, 0.3, 0.0])
    assert [r.signal for r in rollouts] == [True, False, True, True]
    figures = update(policy, Recorder(policy), rollouts, settings())
    assert (
        figures["trained"] == 3 and math.isfinite(figures["grad_norm"]) and figures["grad_norm"] > 0
    )


@pytest.mark.parametrize("how", ["mean", "mean_std"])
def test_rounding_does_not_decide_who_is_trained(model, how):
    """Rewards whose mean is one of them, exactly or but for rounding: the whole group is trained.

    Over as many tokens, whatever the last bit of an advantage.
    """
    policy = with_adapter(model, 0.1)
    trained, tokens = set(), set()
    for rewards in ([0.5, 0.6, 0.7, 0.6], [0.254, 0.292, 0.33, 0.292], [0.0, 0.5, 1.0, 0.5]):
        rollouts = made_rollouts(policy, 8)
        for r, reward in zip(rollouts, [*rewards, 0.3, 0.3, 0.3 + 1e-9, math.nan]):
            r.reward = reward
        counts = set_advantages(rollouts, how)
        assert (counts["groups"], counts["flat"], counts["unscored"]) == (2, 1, 1)
        assert [r.signal for r in rollouts] == [True] * 4 + [False] * 4
        assert any(abs(r.advantage) < 1e-9 for r in rollouts[:4])
        figures = update(policy, Recorder(policy, lr=0.0), rollouts, settings())
        trained.add(figures["trained"])
        tokens.add(figures["loss_tokens"])
    assert trained == {4} and tokens == {sum(sum(r.loss_mask) for r in rollouts[:4])}


# --------------------------------------------------------------------------------------------------
# Batches


def test_micro_batches_lose_nothing_and_stay_bounded():
    rng = random.Random(0)
    for bound in (1, 10, 64, 500):
        rollouts = [
            Rollout({}, 0, i, ids=[0] * rng.randint(1, 60)) for i in range(rng.randint(1, 40))
        ]
        batches = micro_batches(rollouts, bound)
        assert sorted(r.seed for rows in batches for r in rows) == list(range(len(rollouts)))
        assert all(
            len(rows) == 1 or len(rows) * max(len(r.ids) for r in rows) <= bound for rows in batches
        )
    assert len(micro_batches(rollouts, 10**6)) == 1 and micro_batches([], 10) == []


def test_collate_masks_by_length_not_by_id(tokenizer):
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    rows = [
        Rollout(
            {},
            0,
            0,
            ids=[5, pad, 0, pad, eos],
            loss_mask=[0, 1, 1, 1, 1],
            logprobs=[0, -1.0, -2.0, -3.0, -4.0],
            advantage=0.5,
        ),
        Rollout({}, 0, 0, ids=[7, eos], loss_mask=[0, 1], logprobs=[0, -5.0], advantage=-1.0),
    ]
    batch = collate(rows, "cpu")
    assert batch["input_ids"].tolist()[0] == [5, pad, 0, pad, eos] and batch["input_ids"][
        1, :2
    ].tolist() == [7, eos]
    assert batch["loss_mask"].tolist() == [
        [False, True, True, True, True],
        [False, True, False, False, False],
    ]
    assert batch["sampler_logprobs"].tolist() == [[-1, -2, -3, -4], [-5, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2 and batch[
        "advantages"
    ].tolist() == [0.5, -1.0]


# --------------------------------------------------------------------------------------------------
# The update


def run_update(model, vrl, moved=0.1, rollouts=None, lr=1e-2):
    policy = with_adapter(model, moved)
    optimizer = Recorder(policy, lr)
    if rollouts is None:
        rollouts = made_rollouts(policy)
    figures = update(policy, optimizer, rollouts, settings(vrl=vrl))
    return figures, optimizer.seen, policy


@pytest.mark.parametrize(
    "vrl",
    [
        {"loss_mean": mean, "ratio": ratio, "minibatches": n, "tis_cap": cap, "kl_coef": 0.2}
        for mean in ("token", "sequence")
        for ratio in ("token", "sequence")
        for n, cap in ((1, 0.0), (2, 1.001))
    ],
    ids=str,
)
def test_one_batch_of_eight_equals_eight_of_one(model, vrl):
    """Loss, gradient of every optimizer step, and every metric but `read_tokens`: with padding.

    Three of the rollouts carry no signal, and only the KL is taken of them.
    """
    rollouts = made_rollouts(with_adapter(model, 0.1))
    for i in (1, 4, 6):
        rollouts[i].signal = False
    one, gradients, _ = run_update(
        model, {**vrl, "micro_tokens": 10**6}, rollouts=copy.deepcopy(rollouts), lr=0.3
    )
    assert (one["trained"], one["anchored"]) == (5, 3)
    assert one["kl"] > 1e-3 and one["grad_norm"] > 1e-3 and len(gradients) == vrl["minibatches"]
    assert (
        vrl["minibatches"] == 1 or abs(one["ratio"] - 1) > 1e-4
    )  # the second minibatch is off-policy
    for micro_tokens in (1, 60):
        other, same, _ = run_update(
            model,
            {**vrl, "micro_tokens": micro_tokens},
            rollouts=copy.deepcopy(rollouts),
            lr=0.3,
        )
        for name in one.keys() - {"read_tokens"}:
            assert other[name] == pytest.approx(one[name], rel=2e-4, abs=2e-6), name
        for a, b in zip(gradients, same):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))


def test_the_gradient_is_the_policy_gradient_though_the_ratio_is_one(model):
    """One update on fresh rollouts: -mean over the agent's tokens of w A log pi, from full logits.

    w is the importance weight of our own sampler's log-probabilities, a little off here.
    """
    figures, (gradient,), _ = run_update(model, {})
    policy = with_adapter(model, 0.1)
    rollouts = made_rollouts(policy)
    loss = 0.0
    for r in rollouts:
        logprobs = policy(input_ids=torch.tensor([r.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(r.ids)):
            if r.loss_mask[t]:
                logprob = logprobs[t - 1, r.ids[t]]
                weight = math.exp(float(logprob.detach()) - r.logprobs[t])
                loss = loss - weight * r.advantage * logprob
    (loss / sum(sum(r.loss_mask) for r in rollouts)).backward()
    wanted = torch.cat([p.grad.flatten() for p in trained_parameters(policy).values()])
    assert figures["grad_norm"] == pytest.approx(float(wanted.norm()), rel=1e-4)
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert figures["loss_tokens"] == sum(sum(r.loss_mask) for r in rollouts)


def test_ratio_is_one_and_kl_zero_at_step_zero(model, monkeypatch):
    figures, gradients, _ = run_update(model, {"kl_coef": 0.5, "micro_tokens": 1}, moved=0.0)
    assert (
        figures["ratio"] == 1.0
        and figures["kl"] == 0.0
        and figures["clipped"] == 0.0
        and figures["grad_norm"] > 0
    )
    first = []
    real = train_vrl.grpo_loss
    monkeypatch.setattr(
        train_vrl, "grpo_loss", lambda *a, **k: (out := real(*a, **k), first.append(out[1]))[0]
    )
    run_update(model, {"kl_coef": 0.5, "micro_tokens": 1, "minibatches": 2}, moved=0.0, lr=1.0)
    ratios, kls = ([float(s[k] / s["tokens"]) for s in first] for k in ("ratio", "kl"))
    assert len(first) == 8 and ratios[:4] == [1.0] * 4 and kls[:4] == [0.0] * 4
    assert all(r != 1.0 for r in ratios[4:]) and all(
        k > 0 for k in kls[4:]
    )  # pi_old is the policy before the first minibatch


@pytest.mark.parametrize("vrl", [{"kl_coef": 0.5}, {"kl_coef": 0.5, "minibatches": 2}], ids=str)
def test_the_update_scores_at_the_samplers_temperature(model, tokenizer, tasks, chatty, vrl):
    config, policy = settings(rollout={"temperature": 0.7}, vrl=vrl), with_adapter(model)
    rollouts = sample_rollouts(
        model, tokenizer, tasks[:2], config, config.rollout.temperature, seed=0, group_size=2
    )
    for i, r in enumerate(rollouts):
        r.advantage = 1.0 - 2 * (i % 2)
    seen = update(policy, Recorder(policy, lr=0.0), rollouts, config)
    assert (
        seen["gap_max"] < 1e-4
        and seen["ratio"] == pytest.approx(1, abs=1e-5)
        and seen["kl"] == pytest.approx(0, abs=1e-6)
    )


def test_groups_without_spread_are_not_trained(model):
    policy = with_adapter(model, 0.1)
    rollouts = made_rollouts(policy)
    for r in rollouts[:4]:
        r.signal = False
    for mean in ("token", "sequence"):
        with_flat = run_update(model, {"loss_mean": mean}, rollouts=rollouts)
        without = run_update(model, {"loss_mean": mean}, rollouts=rollouts[4:])
        assert (
            with_flat[0] == without[0]
            and with_flat[0]["trained"] == 4
            and torch.equal(with_flat[1][0], without[1][0])
        )


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_the_kl_is_of_all_rollouts_and_rescales_nothing(model, mean):
    """With a KL the gradient is that without one, plus coef x the mean KL's over every rollout."""
    rollouts = made_rollouts(with_adapter(model, 0.1))
    for r in rollouts[:5]:
        r.signal, r.advantage = False, 0.0
    vrl = {"loss_mean": mean}
    plain, (pull,), _ = run_update(model, vrl, rollouts=rollouts)
    both, (total,), _ = run_update(model, {**vrl, "kl_coef": 0.5}, rollouts=rollouts)
    policy = with_adapter(model, 0.1)
    anchor, value = 0.0, 0.0
    for r in rollouts:
        now = policy(input_ids=torch.tensor([r.ids])).logits[0].log_softmax(-1)
        with torch.no_grad(), policy.disable_adapter():
            ref = policy(input_ids=torch.tensor([r.ids])).logits[0].log_softmax(-1)
        own = [t for t in range(1, len(r.ids)) if r.loss_mask[t]]
        gaps = torch.stack([ref[t - 1, r.ids[t]] - now[t - 1, r.ids[t]] for t in own])
        anchor = anchor + (gaps**2 / 2).sum() / (len(own) if mean == "sequence" else 1)
        value += float((gaps.exp() - gaps - 1).sum())
    tokens = sum(sum(r.loss_mask) for r in rollouts)
    (0.5 * anchor / (len(rollouts) if mean == "sequence" else tokens)).backward()
    wanted = torch.cat([p.grad.flatten() for p in trained_parameters(policy).values()])
    scale = float(wanted.abs().max())
    assert scale > 1e-3 and torch.allclose(total - pull, wanted, rtol=1e-3, atol=1e-4 * scale)
    assert both["kl"] == pytest.approx(value / tokens, rel=1e-4)
    assert (both["trained"], both["anchored"]) == (3, 5) and plain["anchored"] == 0
    assert both["loss_tokens"] == plain["loss_tokens"]
    for name in ("ratio", "clipped", "entropy"):
        assert both[name] == pytest.approx(plain[name], abs=1e-6)


def test_a_step_without_signal_has_its_anchor(model):
    rollouts = made_rollouts(with_adapter(model, 0.1))
    for r in rollouts:
        r.signal, r.advantage = False, 0.0
    first, gradients, policy = run_update(model, {"kl_coef": 1.0}, rollouts=rollouts, lr=0.05)
    assert first["trained"] == 0 and first["anchored"] == 8 and len(gradients) == 1
    config = settings(vrl={"kl_coef": 1.0})
    second = update(policy, Recorder(policy, lr=0.0), rollouts, config)
    assert 0 < second["kl"] < first["kl"] and first["grad_norm"] > 0


def test_the_kl_does_not_change_the_minibatches_of_the_policy_gradient(model):
    rollouts = made_rollouts(with_adapter(model, 0.1))
    config = settings(vrl={"minibatches": 2})
    trained, anchored = rollouts[:5], rollouts[5:]
    with_kl = train_vrl.split_minibatches(trained, anchored, config)
    without = train_vrl.split_minibatches(trained, [], config)
    assert [part for part, _ in with_kl] == [part for part, _ in without]
    assert sum(len(rest) for _, rest in with_kl) == 3 and len(with_kl) == 2


def test_our_own_samplers_weights_are_corrected_too(model):
    """The importance weight takes effect with engine: transformers; tis_cap 0 switches it off."""
    rollouts = made_rollouts(with_adapter(model, 0.1))
    for r in rollouts:
        r.logprobs = [x - 0.5 * m for x, m in zip(r.logprobs, r.loss_mask)]
    gradients = {
        cap: run_update(model, {"tis_cap": cap}, rollouts=rollouts)[1][0] for cap in (0.0, 1.25)
    }
    assert torch.allclose(gradients[1.25], 1.25 * gradients[0.0], rtol=1e-3, atol=1e-6)


def test_truncated_rollouts_can_be_left_out(model):
    rollouts = made_rollouts(with_adapter(model, 0.1))
    rollouts[0].trajectory["ended"], rollouts[1].trajectory["ended"] = "max_tokens", "max_turns"
    assert (
        run_update(model, {"mask_truncated": True}, rollouts=rollouts)[0]
        == run_update(model, {}, rollouts=rollouts[2:])[0]
    )
    assert run_update(model, {}, rollouts=rollouts)[0]["trained"] == 8


@pytest.mark.parametrize("vrl", [{}, {"minibatches": 2, "tis_cap": 2.0}], ids=str)
def test_no_signal_moves_nothing(model, vrl):
    rollouts = made_rollouts(with_adapter(model, 0.1))
    for r in rollouts:
        r.signal = False
    before = weights(with_adapter(model, 0.1))
    figures, gradients, policy = run_update(model, {**vrl, "weight_decay": 0.5}, rollouts=rollouts)
    assert not gradients and all(
        torch.equal(p, before[name]) for name, p in policy.named_parameters()
    )
    assert figures["trained"] == 0 and all(
        math.isfinite(x) for x in figures.values() if x is not None
    )


# --------------------------------------------------------------------------------------------------
# The sampler


def trainer_logprobs(model, r, temperature=1.0):
    batch = collate([r], "cpu")
    with torch.no_grad():
        return token_logprobs(
            model,
            batch["input_ids"],
            batch["position_ids"],
            batch["loss_mask"][:, 1:],
            temperature=temperature,
        )[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(model, tokenizer, tasks, chatty, temperature):
    rollouts = sample_rollouts(
        model, tokenizer, tasks[:5], settings(), temperature, seed=3, group_size=3
    )
    assert len(rollouts) == 15 and [r.group_id for r in rollouts] == [
        g for g in range(5) for _ in range(3)
    ]
    turns = [len(r.trajectory["turns"]) for r in rollouts]
    assert sum(n >= 3 for n in turns) >= 3 and len(set(turns)) >= 3, "too few turns to tell"
    for r in rollouts:
        assert len(r.ids) == len(r.loss_mask) == len(r.logprobs)
        sampled = torch.tensor(r.logprobs[1:]) * torch.tensor(r.loss_mask[1:])
        assert (trainer_logprobs(model, r, temperature) - sampled).abs().max() < 1e-4
        assert all((x < 0) if m else (x == 0) for x, m in zip(r.logprobs, r.loss_mask))


def test_scoring_given_tokens_is_what_sampling_them_was(model, tokenizer, tasks, chatty):
    """score_rollout: the log-probabilities that the sampler had, over turns and replies."""
    rollouts = sample_rollouts(model, tokenizer, tasks[:6], settings(), 1.0, seed=3)
    assert max(len(r.trajectory["turns"]) for r in rollouts) >= 3
    for r in rollouts:
        sampled = torch.tensor(r.logprobs)[torch.tensor(r.loss_mask, dtype=torch.bool)]
        assert (sampler.score_rollout(model, r) - sampled).abs().max() < 1e-4


def test_sampling_follows_the_softmax(model, tokenizer, tasks, chatty):
    """First tokens of many rollouts of one prompt come in the shares of the full softmax.

    No top-k, no top-p; here at temperature 2.
    """
    rollouts = sample_rollouts(
        model,
        tokenizer,
        tasks[:1],
        settings(rollout={"max_turn_tokens": 1}),
        2.0,
        seed=0,
        group_size=1500,
    )
    prompt = rollouts[0].ids[: rollouts[0].loss_mask.index(1)]
    p = model(input_ids=torch.tensor([prompt])).logits[0, -1].div(2.0).softmax(-1)
    counts = torch.bincount(
        torch.tensor([r.ids[len(prompt)] for r in rollouts]), minlength=len(p)
    ) / len(rollouts)
    assert (counts - p).abs().max() < 0.05 and abs(
        float(counts[p < 0.01].sum() - p[p < 0.01].sum())
    ) < 0.06
    assert 0.1 < p[p < 0.01].sum() < 0.9, "the tail is too thin to tell"


def test_greedy_equals_transformers_generate(model, tokenizer, tasks, chatty, monkeypatch):
    monkeypatch.setattr(measure_speed, "VisGenEnv", ChattyEnv)
    ours = sample_rollouts(model, tokenizer, tasks, settings(), 0.0, seed=0)
    theirs, sampled = measure_speed.generate_rollouts(model, tokenizer, tasks, settings())
    assert [r.ids for r in ours] == theirs and sum(sum(r.loss_mask) for r in ours) == sampled
    assert sum(len(r.trajectory["turns"]) >= 2 for r in ours) >= 3, "too few turns to tell"


def test_token_in_token_out(model, tokenizer, tasks, chatty):
    """The agent reads the environment's messages encoded once, and is trained on what it sampled.

    The end of turn is among the sampled tokens.
    """
    for r in sample_rollouts(model, tokenizer, tasks[:6], settings(), 1.0, seed=1, group_size=2):
        cuts = (
            [0]
            + [i for i in range(1, len(r.ids)) if r.loss_mask[i] != r.loss_mask[i - 1]]
            + [len(r.ids)]
        )
        parts = [r.ids[a:b] for a, b in zip(cuts, cuts[1:])]
        messages = r.trajectory["messages"]
        assert r.loss_mask[0] == 0 and parts[0] == encode_prompt(tokenizer, messages[:2])
        at, turns = 2, 0
        for i, part in enumerate(parts[1:], 1):
            if i % 2:
                finished = part[-1] == tokenizer.eos_token_id
                assert tokenizer.eos_token_id not in part[:-1]
                assert finished or (r.trajectory["ended"] == "max_tokens" and i == len(parts) - 1)
                if finished:
                    assert messages[at] == {
                        "role": "assistant",
                        "content": tokenizer.decode(part[:-1]),
                    }
                    at, turns = at + 1, turns + 1
            else:
                replies = []
                while at < len(messages) and messages[at]["role"] == "tool":
                    replies.append(messages[at])
                    at += 1
                assert part == encode_tool_messages(tokenizer, replies)
        assert at == len(messages) and turns == len(r.trajectory["turns"])


def test_a_group_shares_its_seed_and_the_same_seed_gives_the_same_rollouts(
    model, tokenizer, tasks, chatty
):
    once, again, other = (
        sample_rollouts(model, tokenizer, tasks[:3], settings(), 1.0, seed=s, group_size=3)
        for s in (5, 5, 6)
    )
    assert [(r.ids, r.loss_mask, r.logprobs) for r in once] == [
        (r.ids, r.loss_mask, r.logprobs) for r in again
    ]
    assert [r.ids for r in once] != [r.ids for r in other]
    for g in range(3):
        group = once[3 * g : 3 * g + 3]
        assert (
            len({r.seed for r in group}) == len({r.trajectory["seed"] for r in group}) == 1
            and len({tuple(r.ids) for r in group}) > 1
        )
    assert len({r.seed for r in once}) == 3 and {r.seed for r in once}.isdisjoint(
        r.seed for r in other
    )


def test_rows_that_end_early_change_nothing_for_the_others(
    model, tokenizer, tasks, chatty, monkeypatch
):
    kept, real = [], sampler.SlotCache.keep
    monkeypatch.setattr(
        sampler.SlotCache, "keep", lambda self, rows: (kept.append(len(rows)), real(self, rows))
    )
    together = sample_rollouts(model, tokenizer, tasks, settings(), 0.0, seed=2)
    assert len(kept) >= 1 and len({len(r.ids) for r in together}) > 6, "nothing was compacted"
    for task, r in zip(tasks, together):
        alone = sample_rollouts(model, tokenizer, [task], settings(), 0.0, seed=2)[0]
        assert (r.task, r.ids, r.loss_mask) == (task, alone.ids, alone.loss_mask)
        assert torch.tensor(r.logprobs).sub(torch.tensor(alone.logprobs)).abs().max() < 1e-4
        assert r.trajectory["messages"] == alone.trajectory["messages"]


# --------------------------------------------------------------------------------------------------
# How episodes end


def force(monkeypatch, tokens):
    """Let the sampler of a single rollout produce these tokens, one a reading."""
    script = iter(tokens)

    def read(model, cache, rows, chunks, starts, pictures=()):
        logits = torch.zeros(1, model.config.vocab_size)
        logits[0, next(script)] = 99.0
        return logits

    monkeypatch.setattr(sampler, "read_tokens", read)


def play(model, tokenizer, task, config, seed=0):
    return sample_rollouts(model, tokenizer, [task], config, 0.0, seed=seed)[0]


@pytest.mark.parametrize("tools", ["names", "schema"])
def test_an_experts_turns_give_the_experts_trajectory(model, tokenizer, tasks, monkeypatch, tools):
    """VisionAgent's own tokens through the sampler and the real environment.

    They give the ids and mask that SFT trains on, and the same record.
    """
    config = settings(
        rollout={"max_turn_tokens": 10**6, "tools": tools}, model={"max_len": 3 * 10**4}
    )
    for task in tasks[:3]:
        env = VisGenEnv(config.rollout)
        expert = vision_agent(task, env, seeded_rng(0, "env", task["id"]).getrandbits(31))
        turns = [
            encode_agent(tokenizer, m["content"])
            for m in expert["messages"]
            if m["role"] == "assistant"
        ]
        force(monkeypatch, [i for turn in turns for i in turn])
        r = play(model, tokenizer, task, config)
        assert (r.ids, r.loss_mask) == encode_trajectory(
            tokenizer, expert["messages"], env.info["tools"]
        ) and len(turns) > 1
        pool = r.trajectory.pop("pool")
        assert r.trajectory == expert and r.trajectory["ended"] == "answer" and pool == task["pool"]


CALL = tag("think", "now") + tag(
    "tool_call", {"name": "tool_search_content", "arguments": {"query": "x"}}
)


@pytest.mark.parametrize(
    "turns, ended",
    [
        (
            [CALL, tag("think", "a") + tag("answer", {"deliverables": [], "summary": "none"})],
            "answer",
        ),
        ([CALL, "no tags"], "malformed"),
        ([CALL] * 3, "max_turns"),
    ],
)
def test_the_environment_says_how_an_episode_ended(
    model, tokenizer, tasks, monkeypatch, turns, ended
):
    config = settings(rollout={"max_turn_tokens": 10**6, "max_turns": 3})
    force(monkeypatch, [i for text in turns for i in encode_agent(tokenizer, text)])
    r = play(model, tokenizer, tasks[0], config)
    assert r.trajectory["ended"] == ended and len(r.trajectory["turns"]) == len(turns)
    assert r.ids[-1] == tokenizer.eos_token_id and r.loss_mask[-1] == 1


def test_a_turn_that_does_not_end_is_max_tokens(model, tokenizer, tasks, monkeypatch):
    word = tokenizer.encode("x", add_special_tokens=False)[0]
    force(monkeypatch, encode_agent(tokenizer, CALL) + [word] * 60)
    r = play(model, tokenizer, tasks[0], settings(rollout={"max_turn_tokens": 50}))
    assert (
        r.trajectory["ended"] == "max_tokens"
        and r.ids[-50:] == [word] * 50
        and r.loss_mask[-51:] == [0] + [1] * 50
    )
    assert (
        len(r.trajectory["turns"]) == 1 and r.trajectory["messages"][-1]["role"] == "tool"
    )  # not the unfinished turn
    prompt = r.loss_mask.index(1)
    force(monkeypatch, [word] * 2000)
    r = play(
        model,
        tokenizer,
        tasks[0],
        settings(rollout={"max_turn_tokens": 10**6}, model={"max_len": 2 * prompt + 2}),
    )
    assert r.trajectory["ended"] == "max_tokens" and len(r.ids) == 2 * prompt + 2
    # A turn that ends within the limit, whose reply does not fit.
    reach = 2 * prompt + 2 - prompt - 1
    force(
        monkeypatch,
        [word] * (reach - len(encode_agent(tokenizer, CALL))) + encode_agent(tokenizer, CALL),
    )
    r = play(
        model,
        tokenizer,
        tasks[0],
        settings(rollout={"max_turn_tokens": 10**6}, model={"max_len": 2 * prompt + 2}),
    )
    assert r.trajectory["ended"] == "max_tokens" and len(r.trajectory["turns"]) == 1


def test_a_reply_that_does_not_fit_is_cut_off(model, tokenizer, tasks, monkeypatch):
    """max_len is a bound: what comes after the agent's last token is not kept."""

    class LongReplyEnv(ChattyEnv):
        def step(self, text):
            messages, *rest = super().step(text)
            return [{**m, "content": m["content"] + " word" * 600} for m in messages], *rest

    monkeypatch.setattr(rollout, "VisGenEnv", LongReplyEnv)
    config = settings()
    rollouts = sample_rollouts(model, tokenizer, tasks, config, 1.0, seed=0, group_size=2)
    assert [r.trajectory["ended"] for r in rollouts].count("max_tokens") > len(rollouts) / 2
    for r in rollouts:
        assert len(r.ids) == len(r.loss_mask) == len(r.logprobs) <= config.model.max_len
        assert r.loss_mask[-1] == 1
    cut = [r for r in rollouts if r.trajectory["messages"][-1]["role"] == "tool"]
    assert cut and all(r.ids[-1] == tokenizer.eos_token_id for r in cut)
    for batch in micro_batches(rollouts, config.model.max_len):
        assert len(batch) * max(len(r.ids) for r in batch) <= config.model.max_len


def test_a_token_outside_the_tokenizer_is_malformed(model, tokenizer, tasks, monkeypatch):
    padded = copy.deepcopy(model)
    padded.config.vocab_size = len(tokenizer) + 8
    force(monkeypatch, [5, len(tokenizer)])
    r = play(padded, tokenizer, tasks[0], settings())
    assert (
        r.trajectory["ended"] == "malformed"
        and r.ids[-1] == len(tokenizer)
        and r.trajectory["turns"] == []
    )


def test_a_prompt_that_leaves_no_room_is_refused(model, tokenizer, tasks):
    with pytest.raises(SystemExit, match="model.max_len"):
        play(model, tokenizer, tasks[0], settings(model={"max_len": 100}))


# --------------------------------------------------------------------------------------------------
# Sync, checks


def test_sync_gives_the_sampler_the_policys_weights(model, tokenizer, tasks, chatty):
    sampler, policy, config = copy.deepcopy(model), with_adapter(model), settings()
    fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, tasks[0], config)
    seen = engine_check.check_engine(sampler, policy, fixed, config)
    assert seen["sync_gap_max"] < 1e-4 and seen["adapter_effect"] == 0
    assert seen["adapter_share"] is None
    engine_check.check_reference(policy, fixed, config)
    move(policy, 0.1)
    with pytest.raises(SystemExit, match=r"by \d\.\d+e[+-]\d+ nats in the mean, and 0% of that"):
        engine_check.check_engine(sampler, policy, fixed, config)
    sync_sampler(sampler, policy)
    seen = engine_check.check_engine(sampler, policy, fixed, config)
    assert seen["sync_gap_max"] < 1e-4 and seen["adapter_effect"] > 0.01
    assert seen["adapter_share"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(SystemExit, match="KL to the PST policy"):
        engine_check.check_reference(policy, fixed, config)
    merged = weights(sampler)
    base = {n: p for n, p in weights(policy).items() if "lora_" not in n}
    assert not torch.equal(
        merged["model.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight
    )
    for by in (0.3, 0.05):
        move(policy, by, seed=9)
        sync_sampler(sampler, policy)
    move(policy, 0.1)
    sync_sampler(
        sampler, policy
    )  # never undone in place: the same adapter gives the same bits after any others
    assert all(torch.equal(p, merged[n]) for n, p in sampler.named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in policy.named_parameters() if n in base)


def in_bfloat16(model):
    """A policy whose weights, but for the adapter, are in bfloat16, and a float32 sampler."""
    policy = with_adapter(copy.deepcopy(model).to(torch.bfloat16))
    sampler = copy.deepcopy(model).to(torch.bfloat16).float()
    return policy, sampler


def test_bfloat16_hides_no_missing_adapter(model, tokenizer, tasks, chatty):
    """T7: a gap that rounding could make is let pass; an adapter that is not there is not."""
    (policy, sampler), config = in_bfloat16(model), settings(model={"dtype": "bfloat16"})
    fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, tasks[0], config)
    start = engine_check.check_engine(sampler, policy, fixed, config)
    assert 1e-4 < start["sync_gap_p99"] < 0.5 and start["adapter_share"] is None
    move(policy, 0.02)
    with pytest.raises(SystemExit, match="0% of that is found in the sampler's") as stop:
        engine_check.check_engine(sampler, policy, fixed, config)
    gaps = [float(x) for x in re.findall(r"p99 (\S+),", str(stop.value))]
    assert len(gaps) == 2 and gaps[0] < 0.5, "the gap alone would have told"
    sync_sampler(sampler, policy)
    seen = engine_check.check_engine(sampler, policy, fixed, config)
    assert 0.8 < seen["adapter_share"] < 1.2


def test_an_adapter_at_another_scale_is_found(model, tokenizer, tasks, chatty):
    (policy, sampler), config = in_bfloat16(model), settings(model={"dtype": "bfloat16"})
    fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, tasks[0], config)
    move(policy, 0.02)
    twice = copy.deepcopy(policy)
    move(twice, 0.04)
    sync_sampler(sampler, twice)
    with pytest.raises(SystemExit, match="at another scale"):
        engine_check.check_engine(sampler, policy, fixed, config)


def test_the_check_is_in_the_arithmetic_that_trains(model, tokenizer, tasks, chatty, monkeypatch):
    """T3: with autocast the trainer's numbers are those of training, held to bfloat16's limit."""
    monkeypatch.setattr(engine_check, "use_autocast", lambda config, device: True)
    policy, sampler, config = with_adapter(model), copy.deepcopy(model), settings()
    fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, tasks[0], config)
    seen = engine_check.check_engine(sampler, policy, fixed, config)
    assert 1e-3 < seen["sync_gap_mean"] <= seen["sync_gap_p99"] <= seen["sync_gap_max"]
    batch = collate([fixed.rollout], "cpu")
    with torch.no_grad():
        trained = token_logprobs(
            policy,
            batch["input_ids"],
            batch["position_ids"],
            batch["loss_mask"][:, 1:],
            autocast=True,
        )
    wanted = trained[batch["loss_mask"][:, 1:]]
    assert torch.equal(engine_check.trainer_logprobs(policy, fixed.rollout, config), wanted)


def test_a_sampler_with_another_base_is_not_blamed_on_the_sync(model, tokenizer, tasks, chatty):
    policy, sampler, config = with_adapter(model, 0.1), copy.deepcopy(model), settings()
    with torch.no_grad():
        sampler.model.norm.weight.mul_(1.01)
    fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, tasks[0], config)
    with pytest.raises(SystemExit, match="without the adapter, so they compute differently"):
        engine_check.check_engine(sampler, policy, fixed, config)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # a figure that is NaN is a disagreement as well
        patch.setattr(engine_check, "sampler_logprobs", lambda *a, **k: fixed.samplers * math.nan)
        with pytest.raises(SystemExit, match="disagree"):
            engine_check.check_engine(sampler, policy, fixed, config)


def test_the_limit_is_of_the_device(model, tokenizer, tasks, chatty, monkeypatch):
    """T8: 1.11e-4 in float32 is a healthy GPU, and no healthy CPU; 5e-3 is neither."""
    policy, sampler, config = with_adapter(model), copy.deepcopy(model), settings()
    fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, tasks[0], config)
    cpu, cuda = (engine_check.ALLOWED[(name, "float32")] for name in ("cpu", "cuda"))
    for limit, gap, healthy in (
        (cpu, 1.11e-4, False),
        (cuda, 1.11e-4, True),
        (cuda, 5e-3, False),
    ):
        shifted = fixed.samplers.clone()
        shifted[0] += gap
        off = replace(fixed, samplers=shifted)
        with monkeypatch.context() as patch:
            patch.setattr(engine_check, "ALLOWED", {("cpu", "float32"): limit})
            patch.setattr(engine_check, "sampler_logprobs", lambda *a, seen=shifted, **k: seen)
            if healthy:
                engine_check.check_engine(sampler, policy, off, config)
            else:
                with pytest.raises(SystemExit, match=f"allowed is max {limit[1]:.0e}"):
                    engine_check.check_engine(sampler, policy, off, config)


def test_the_fixed_sequence_has_the_first_tokens_of_the_first_turns():
    r = Rollout({}, 0, 0)
    for length in (100, 30, 40):
        rollout.extend(r, [1] * 10, trained=False)
        rollout.extend(r, [2] * length, trained=True, logprobs=[-1.0] * length)
    part = engine_check.scored_part(r, 10**6)
    n = engine_check.TURN_TOKENS
    assert n <= 30 and engine_check.TURNS == 2
    assert [sum(part.loss_mask[:110]), sum(part.loss_mask)] == [n, 2 * n]
    # 10 + 100 tokens of the first turn, 10 before the second, and what is scored of it.
    assert len(part.ids) == len(part.loss_mask) == len(part.logprobs) == 120 + n
    assert part.loss_mask[10 : 10 + n] == [1] * n and len(r.ids) == 200
    short = engine_check.scored_part(r, 20)
    assert sum(short.loss_mask) == min(n, 10) and len(short.ids) == 20


def test_vllm_in_float32_on_a_gpu_is_refused(monkeypatch):
    """T14, before vLLM is imported: its kernels for an adapter would assert."""
    config = settings(rollout={"engine": "vllm"})
    for make in (
        lambda: VllmEngine("nowhere", config, torch.device("cuda"), bf16=False),
        lambda: engine_dtype(config, torch.device("cuda"), False),
    ):
        with pytest.raises(SystemExit, match="model.autocast=true.*model.dtype=bfloat16") as stop:
            make()
        assert "\n" not in str(stop.value)
    assert engine_dtype(config, torch.device("cuda"), True) == "bfloat16"
    assert engine_dtype(config, torch.device("cpu"), False) == "float32"
    half = settings(rollout={"engine": "vllm"}, model={"dtype": "bfloat16"})
    assert engine_dtype(half, torch.device("cuda"), False) == "bfloat16"


def test_sync_of_a_policy_without_an_adapter(model):
    sampler, policy = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.25)
    sync_sampler(sampler, policy)
    assert all(torch.equal(a, b) for a, b in zip(sampler.parameters(), policy.parameters()))


# --------------------------------------------------------------------------------------------------
# The loop


def test_step_tasks_covers_all_tasks_once_a_pass():
    config, all_tasks = settings(vrl={"tasks_per_step": 3}), [{"id": i} for i in range(7)]
    steps = [[t["id"] for t in step_tasks(all_tasks, config, s)] for s in range(14)]
    assert all(len(s) == 3 for s in steps) and steps == [
        [t["id"] for t in step_tasks(all_tasks, config, s)] for s in range(14)
    ]
    stream = [i for s in steps for i in s]
    passes = [stream[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(p) == list(range(7)) for p in passes) and len(set(map(tuple, passes))) == 6
    assert [
        t["id"] for t in step_tasks(all_tasks, settings(seed=1, vrl={"tasks_per_step": 3}), 0)
    ] != steps[0]
    assert sorted(
        t["id"] for t in step_tasks(all_tasks, settings(vrl={"tasks_per_step": 14}), 0)
    ) == sorted([*range(7)] * 2)


def test_part_spread_is_the_mean_variance_inside_groups():
    def rollout(group, plan, tool, cons):
        parts = {
            **dict.fromkeys(PARTS, 1.0),
            "total": plan,
            "tool": tool,
            "cons": cons,
            "plan": plan,
        }
        return Rollout({}, group, 0, trajectory={"reward": parts})

    rows = [
        rollout(1, 0.0, 0.2, None),
        rollout(2, 0.5, 0.0, 0.4),
        rollout(1, 1.0, 0.2, None),
        rollout(2, 0.5, math.nan, 0.8),
    ]
    spread = part_variances(rows)
    assert set(spread) == {f"var_{p}" for p in ("total", "plan", *PARTS)}
    assert spread["var_plan"] == spread["var_total"] == pytest.approx(0.125)
    assert spread["var_tool"] == pytest.approx(0.0) and spread["var_cons"] == pytest.approx(0.04)
    assert all(spread[f"var_{p}"] == 0 for p in PARTS if p not in ("tool", "cons"))
    assert part_variances(rows[:1] + rows[2:3])["var_cons"] is None


def reward_by_text(trajectory, config, pool):
    """A deterministic reward with spread: of the letters that the agent wrote."""
    text = "".join(m["content"] for m in trajectory["messages"] if m["role"] == "assistant")
    total = sum(map(ord, text)) % 97 / 96
    return {"total": total, "plan": total, "fine": 1.0, **dict.fromkeys(PARTS, total)}


def each(reward):
    """A stand-in for ltr_rewards made of one for ltr_reward."""
    return lambda trajectories, config, pools, llm: [
        reward(t, config, pool) for t, pool in zip(trajectories, pools)
    ]


@pytest.fixture
def loop(model, tokenizer, tasks, chatty, monkeypatch, tmp_path):
    """train() in a folder under tmp_path, with the reward above.

    Policies are made afresh, as a new process would.
    """
    monkeypatch.setattr(evaluation, "ltr_rewards", each(reward_by_text))

    def run(name, stop=None, **sections):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(
            len(list(folder.iterdir()))
        )  # a second process starts from another adapter: the checkpoint's must win
        policy, sampler = (
            add_lora(settings(), copy.deepcopy(model), norm=True),
            copy.deepcopy(model),
        )
        config = settings(**{**sections, "vrl": {"norm_lr": 0.02, **sections.get("vrl", {})}})
        fixed = engine_check.fixed_sequence(sampler, policy, tokenizer, tasks[5], config)
        train_vrl.train(config, folder, policy, sampler, tokenizer, tasks[:5], fixed, stop)
        return folder, policy, sampler

    return run


def lines(folder):
    """The lines of metrics.jsonl, without times."""
    return [
        {k: v for k, v in m.items() if not k.endswith("_s")}
        for m in read_jsonl(folder / "metrics.jsonl")
    ]


def figures(folder):
    """metrics.jsonl by step, without times."""
    return {m["step"]: m for m in lines(folder)}


def test_stopped_and_resumed_equals_never_stopped(loop, monkeypatch):
    straight, policy, merged = loop("straight")
    real, done = evaluation.sample_rollouts, []

    def interrupted(*args, **kwargs):
        done.append(1)
        if len(done) == 4:  # step 3 was finished but not saved: it is done again
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluation, "sample_rollouts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop("stopped")
    monkeypatch.setattr(evaluation, "sample_rollouts", real)
    assert [p.name for p in checkpoints.list_checkpoints(straight.parent / "stopped" / "vrl")] == [
        "step-2"
    ]
    stopped, resumed, second = loop("stopped")
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), resumed.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), second.parameters()))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (straight / "vrl" / "step-4" / file).read_bytes() == (
            stopped / "vrl" / "step-4" / file
        ).read_bytes()
    assert lines(straight) == lines(stopped) and [m["step"] for m in lines(straight)] == [
        1,
        2,
        3,
        4,
    ]
    for m in lines(straight):
        assert m["sync_gap_max"] < 1e-4 and m["adapter_share"] == pytest.approx(1, abs=0.01)
    assert len({m["grad_norm"] for m in figures(straight).values()}) == 4 and all(
        m["trained"] for m in figures(straight).values()
    )
    for step in range(1, 5):
        name = f"vrl/rollouts/step-{step}.jsonl"
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()
    assert len(read_jsonl(straight / "vrl/rollouts/step-1.jsonl")) == 4


def test_the_sampler_follows_the_policy_through_the_loop(loop, model, tokenizer, tasks):
    _, policy, sampler = loop("sync", vrl={"steps": 2, "lr": 0.1})
    moved, at_first = sampler.model.norm.weight, model.model.norm.weight
    assert (
        float((moved - at_first).abs().max()) > 1e-3
    )  # the norm is trained beside the adapter, and pi_pst keeps its own
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad(), policy.disable_adapter():
        assert torch.equal(policy(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (
        max(
            float(p.detach().abs().max())
            for n, p in trained_parameters(policy).items()
            if "lora_B" in n
        )
        > 1e-3
    )
    config = settings()
    fixed = engine_check.fixed_sequence(model, policy, tokenizer, tasks[0], config)
    assert engine_check.check_engine(sampler, policy, fixed, config)["sync_gap_max"] < 1e-4


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_cut_off_checkpoint_is_one_clear_line(loop, file):
    folder, *_ = loop("cut", vrl={"steps": 1})
    path = folder / "vrl" / "step-1" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SystemExit) as stop:
        loop("cut")
    assert (
        str(stop.value).startswith("error: ")
        and str(path) in str(stop.value)
        and "\n" not in str(stop.value)
    )
    path.unlink()
    with pytest.raises(SystemExit, match="is missing"):
        loop("cut")


def test_steps_without_any_signal_can_be_resumed(loop, monkeypatch):
    monkeypatch.setattr(
        evaluation,
        "ltr_rewards",
        each(lambda *a: {"total": 1.0, "plan": 1.0, "fine": 1.0, **dict.fromkeys(PARTS, 1.0)}),
    )
    folder, *_ = loop("flat", vrl={"steps": 2})
    assert figures(folder)[2]["trained"] == 0 and figures(folder)[2]["groups"]["flat"] == 2
    loop("flat", vrl={"steps": 3})
    assert list(figures(folder)) == [1, 2, 3]


def test_steps_with_an_anchor_alone_can_be_resumed(loop, monkeypatch):
    """Flat groups and a KL: the first step's gradient is 0 but for rounding, and nothing stops."""
    monkeypatch.setattr(
        evaluation,
        "ltr_rewards",
        each(lambda *a: {"total": 1.0, "plan": 1.0, "fine": 1.0, **dict.fromkeys(PARTS, 1.0)}),
    )
    folder, *_ = loop("anchor", vrl={"steps": 2, "kl_coef": 0.1})
    assert [(m["trained"], m["anchored"]) for m in lines(folder)] == [(0, 4), (0, 4)]
    assert all(m["kl"] < 1e-9 for m in lines(folder))


def test_a_step_that_no_judge_scored_goes_on(loop, monkeypatch):
    """All NaN within llm.max_failures: the line says so, and the run goes on."""
    monkeypatch.setattr(
        evaluation,
        "ltr_rewards",
        each(
            lambda *a: {
                **dict.fromkeys(("total", "plan", "fine"), math.nan),
                **dict.fromkeys(PARTS, math.nan),
            }
        ),
    )
    folder, *_ = loop("unscored", vrl={"steps": 2}, llm={"max_failures": 1.0})
    assert [(m["reward"], m["trained"]) for m in lines(folder)] == [(None, 0)] * 2
    groups = {"groups": 2, "unscored": 4}
    record = {"reward": None, "plan": None, "fine": 0.5, "groups": groups, "sample_tok_s": 7}
    assert train_vrl.step_line(record, [None]) == (
        "R_vrt of 1 steps -, of this -, plan -, fine 0.500, flat 0/2, 7 tok/s"
    )


def test_a_torn_line_and_lines_after_the_checkpoint_are_made_again(loop, monkeypatch, tmp_path):
    """T13: main() cuts a line that a break left; train() drops those of steps it does again."""
    straight, *_ = loop("whole")
    folder, *_ = loop("torn", vrl={"steps": 2})
    path = folder / "metrics.jsonl"
    begun = path.read_text()
    extra = {**read_jsonl(path)[1], "step": 3, "reward": 9.0}
    later = {"phase": "pst", "stage": 1, "step": 9, "loss": 1.0}
    path.write_text(f"{begun}{json.dumps(extra)}\n{json.dumps(later)}\n" + '{"phase": "vrl", "st')

    def broken_off(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_vrl, "check_training", lambda config, phases: None)
    monkeypatch.setattr(train_vrl, "open_run", lambda config: folder)
    monkeypatch.setattr(train_vrl, "set_up", broken_off)
    monkeypatch.setattr(sys, "argv", ["train_vrl.py", "--config", str(ROOT / "configs/smoke.yaml")])
    with pytest.raises(KeyboardInterrupt):
        train_vrl.main()
    assert read_jsonl(path)[-1] == later
    loop("torn")
    resumed = lines(folder)
    assert resumed.pop(2) == later and resumed == lines(straight)


def test_lines_of_metrics_can_be_dropped(tmp_path):
    from lib.runs import append_jsonl, drop_metrics

    drop_metrics(tmp_path, lambda m: True)
    assert not (tmp_path / "metrics.jsonl").exists()
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": n} for n in range(4)])
    drop_metrics(tmp_path, lambda m: m["step"] > 1)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]


# --------------------------------------------------------------------------------------------------
# Before and after


def test_an_evaluation_of_something_else_is_made_anew(tmp_path):
    """T15: before.json of three tasks must not stand beside after.json of twelve."""
    path, made = tmp_path / "vrl" / "before.json", []
    all_tasks = [{"id": f"t{i}"} for i in range(12)]

    def get(policy="pst", n=3, **sections):
        measured = evaluation.what_is_measured(settings(**sections), policy, all_tasks[:n])
        found = evaluation.cached_evaluation(
            path, measured, lambda: made.append(1) or {"greedy": {"reward": n / 100}}
        )
        assert found["measured"] == measured and found["greedy"] == {"reward": n / 100}
        return len(made)

    assert (get(), get()) == (1, 1)
    assert (get(n=12), get(n=12)) == (2, 2)
    assert get(n=12, bench={"sampled": False}) == 3
    assert get(n=12, reward={"form": "result+format"}) == 4
    assert get(n=12) == 5 and get(policy="vrl/step-60", n=12) == 6 and get("vrl/step-60", 12) == 6
    judged = {"reward": {"judge": "openai"}}
    assert get(**judged) == 7 and get(**judged, llm={"model": "another"}) == 8
    assert get(**judged, llm={"model": "another", "timeout_s": 9.0}) == 8
    path.write_text('{"greedy": {"reward": 0.5}}')  # of a version that did not say
    assert get() == 9
    old = json.loads(path.read_text())
    del old["measured"]["record"]  # of a version that kept no record of each task
    path.write_text(json.dumps(old))
    assert get() == 10


def test_the_best_the_median_and_the_worst_episode_are_shown(tmp_path):
    """U8: each says which it is of how many; one without a score is none of them."""

    def played(reward):
        scores = dict.fromkeys(("total", "plan", "fine", *PARTS), reward)
        task = {"id": f"t{reward}", "scenario": "poster", "difficulty": "easy"}
        trajectory = {
            "task": task,
            "reward": scores,
            "calls": [],
            "ended": "answer",
            "messages": [{"role": "user", "content": f"request {reward}"}],
        }
        return Rollout(task, 0, 0, trajectory=trajectory, reward=reward)

    rewards = [0.4, math.nan, 0.9, 0.0, 0.3, 0.2]
    examples = evaluation.examples_to_read([played(x) for x in rewards])
    assert {label: t["task"]["id"] for label, t in examples.items()} == {
        "best of 5": "t0.9",
        "median of 5": "t0.3",
        "worst of 5": "t0.0",
    }
    write_trajectories(examples, tmp_path / "trajectory.txt")
    heads = [x for x in (tmp_path / "trajectory.txt").read_text().split("\n") if x[:5] == "task "]
    assert [head.split(": ")[1] for head in heads] == [
        f"{which} of 5 held-out episodes, greedy; ended" for which in ("best", "median", "worst")
    ]
    for n, labels in ((1, ["best"]), (2, ["best", "median"]), (3, ["best", "median", "worst"])):
        few = evaluation.examples_to_read([played(x) for x in (0.1, 0.2, 0.3)[:n]])
        assert list(few) == [f"{label} of {n}" for label in labels]
    assert list(evaluation.examples_to_read([played(math.nan)])) == ["first of 1, none scored"]


def test_of_each_held_out_task_a_record_is_kept(tasks):
    """What the table by difficulty and wish needs, and JSON takes; NaN is nothing."""
    cons = (None, math.nan, 0.5)
    rewards = (0.995, math.nan, 0.0)
    rollouts = [
        Rollout(task, 0, 0, trajectory={"reward": {"cons": c}}, reward=reward)
        for task, c, reward in zip(tasks, cons, rewards)
    ]
    records = evaluation.task_records(rollouts)
    assert [r["id"] for r in records] == [task["id"] for task in tasks[:3]]
    assert [r["wishes"] for r in records] == [kinds_of_wish(t["constraints"]) for t in tasks[:3]]
    assert [(r["reward"], r["strict"], r["cons"]) for r in records] == [
        (0.995, 1.0, None),
        (None, None, None),
        (0.0, 0.0, 0.5),
    ]
    assert all(tuple(r) == evaluation.RECORD for r in json.loads(json.dumps(records)))


def made_records(rewards, wishes=("music",)):
    """A held-out task's record for each reward; every second one is hard, the others are easy."""
    return [
        {
            "id": f"t{i}",
            "difficulty": ("easy", "hard")[i % 2],
            "wishes": list(wishes) if i < 5 else [],
            "reward": reward,
            "strict": None if reward is None else float(reward > 0.99),
            "cons": reward if i < 4 else None,
        }
        for i, reward in enumerate(rewards)
    ]


def test_the_table_has_intervals_by_difficulty_and_by_wish(capsys):
    before = made_records([0.1] * 11 + [None], ["music", "consistency: style"])
    after = made_records([0.3] * 6 + [1.0] * 6, ["music", "consistency: style"])
    after.reverse()  # tasks are found by their ids
    print_intervals(before, after)
    said = capsys.readouterr().out
    assert all(len(line) <= 100 for line in said.splitlines())
    rows = {line[:30].strip(): line[30:].split() for line in said.splitlines()}
    gain = (6 * 0.2 + 5 * 0.9) / 11
    assert rows["R_vrt"][:4] == ["11", "0.100", f"{0.1 + gain:.3f}", f"{gain:+.3f}"]
    low, high = (float(x.strip("[,]")) for x in rows["R_vrt"][4:])
    assert 0.2 < low < gain < high < 0.9 and low == pytest.approx(gain - 0.2, abs=0.05)
    assert rows["R_vrt > 0.99"][:4] == ["11", "0.000", "0.455", "+0.455"]
    assert [rows[f"R_vrt, {kind}"][0] for kind in ("easy", "hard", "music")] == ["6", "5", "5"]
    same = ["5", "0.100", "0.300", "+0.200", "[+0.200,", "+0.200]"]
    assert rows["R_vrt, consistency: style"] == same
    assert "fewer than 5 tasks: R_cons (4), medium (0)." in " ".join(said.split())
    print_intervals(before, list(reversed(after)))
    assert capsys.readouterr().out == said  # the draws are of one seed
    print_intervals(made_records([None] * 9), made_records([0.5] * 9))  # a judge that failed
    nothing = capsys.readouterr().out
    assert "Left out" in nothing and "R_vrt (0)" in nothing and "chance" not in nothing


def write_steps(run, rewards, held_out=None):
    """metrics.jsonl of VRL's steps with these rewards, and before.json."""
    parts = dict.fromkeys(("plan", *PARTS), 0.5)
    write_jsonl(
        run / "metrics.jsonl",
        [
            {"phase": "vrl", "step": step, "reward": reward, **parts, "cons": None}
            for step, reward in enumerate(rewards, 1)
        ],
    )
    if held_out:
        measured = {"step": 0, "tasks": made_records(held_out)}
        (run / "vrl").mkdir()
        (run / "vrl" / "before.json").write_text(json.dumps(measured))


def test_the_last_steps_are_compared_with_the_first(tmp_path, capsys):
    write_steps(tmp_path, [0.1, 0.3] * 5 + [9.0] * 7 + [0.7, None, 0.9] * 5)
    print_own_tasks(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "first 10 steps 0.200, last 10 0.800, difference +0.600" in said
    low, high = map(float, re.search(r"\[(\S+), (\S+)\]", said).groups())
    assert 0.45 < low < 0.56 and 0.64 < high < 0.75
    write_steps(tmp_path, [0.1] * 6 + [0.2] * 6)
    print_own_tasks(tmp_path)
    assert "first 6 steps 0.100, last 6 0.200" in capsys.readouterr().out
    write_steps(tmp_path, [0.1] * 9)
    print_own_tasks(tmp_path)
    assert "9 steps are too few" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The curve


def test_the_curve_is_drawn_as_it_runs(loop, monkeypatch):
    """Every fifth step, not more often than every 20 s, and once more where it is stopped."""
    drawn = []
    monkeypatch.setattr(train_vrl, "plot_curve", lambda run: drawn.append(len(vrl_metrics(run))))
    loop("fast", vrl={"steps": 11})
    assert drawn == [5]
    drawn.clear()
    monkeypatch.setattr(train_vrl, "DRAW_S", 0.0)
    loop("slow", vrl={"steps": 11})
    assert drawn == [5, 10]
    drawn.clear()
    stop = train_vrl.StopSwitch()
    stop.on = True
    with pytest.raises(SystemExit, match="130"):
        loop("stopped", stop, vrl={"steps": 11})
    assert drawn == [1]


def test_the_bar_says_the_mean_of_the_last_steps(loop, monkeypatch):
    """After a break too."""
    said = []
    line = train_vrl.step_line
    monkeypatch.setattr(train_vrl, "step_line", lambda *given: said.append(line(*given)) or "")
    loop("bar", vrl={"steps": 6})
    folder, *_ = loop("bar", vrl={"steps": 13})
    rewards = [m["reward"] for m in lines(folder)]
    assert len(said) == 13 and len(set(rewards)) > 5
    for n, text in enumerate(said, 1):
        last = rewards[max(0, n - 10) : n]
        mean = sum(last) / len(last)
        assert text.startswith(f"R_vrt of {len(last)} steps {mean:.3f}, of this {last[-1]:.3f}, ")


def test_what_the_curve_shows(tmp_path):
    """Each step faint, the moving mean strong, parts thin; held-out points with intervals."""
    from matplotlib.figure import Figure

    rewards = [0.2, None, *(0.1 * (n % 7) for n in range(20))]
    held_out = [0.2, 0.4, 0.6, 0.9, None]
    write_steps(tmp_path, rewards, held_out)
    axis = Figure().subplots()
    plot_rewards(axis, vrl_metrics(tmp_path))
    drawn = {line.get_label(): line for line in axis.lines}
    each_step, moving = drawn["R_vrt of a step"], drawn["mean of 10 steps"]
    steps = [1, *range(3, 23)]
    assert list(each_step.get_xdata()) == steps
    assert list(each_step.get_ydata()) == [rewards[step - 1] for step in steps]
    means = [mean_of_last(rewards[:n]) for n in range(1, 23)]
    assert list(moving.get_ydata()) == means and means[1] == 0.2
    assert means[-1] == pytest.approx(sum(rewards[-MOVING:]) / MOVING)
    assert each_step.get_alpha() < 0.5 and moving.get_linewidth() > each_step.get_linewidth()
    assert set(drawn) == {
        each_step.get_label(),
        moving.get_label(),
        "R_plan",
        *map("R_{}".format, PARTS),
    }
    assert all(drawn[f"R_{part}"].get_linewidth() < 1 for part in ("plan", *PARTS))

    plot_held_out(axis, tmp_path)
    point, _, (bar,) = axis.containers[0]
    assert point.get_xydata().tolist() == [[0.0, pytest.approx(0.525)]]
    ((_, low), (_, high)) = bar.get_segments()[0]
    assert 0.2 < low < 0.4 and 0.6 < high < 0.9
    plot_curve(tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.backends.backend_agg"])
def test_a_missing_matplotlib_is_said_before_the_run(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "matplotlib":
        monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(sys, "argv", ["train_vrl.py", "--config", str(ROOT / "configs/smoke.yaml")])
    monkeypatch.setattr(train_vrl, "open_run", lambda config: pytest.fail("the run began"))
    with pytest.raises(SystemExit, match="error: .*curve.png.*matplotlib.*pip install"):
        train_vrl.main()


def test_the_kl_is_refused_without_the_adapter(monkeypatch):
    words = [str(ROOT / "configs/smoke.yaml"), "vrl.tune=full", "vrl.kl_coef=0.1"]
    monkeypatch.setattr(sys, "argv", ["train_vrl.py", "--config", *words])
    monkeypatch.setattr(train_vrl, "open_run", lambda config: pytest.fail("the run began"))
    with pytest.raises(SystemExit, match="error: vrl.kl_coef"):
        train_vrl.main()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_final_norm_has_its_own_rate(tokenizer, tune):
    config = settings(vrl={"tune": tune, "lr": 0.001, "norm_lr": 0.02})
    policy = build_policy(config, tokenizer, torch.device("cpu"))
    if tune == "lora":
        policy = add_lora(config, policy, norm=True)
    rest, norm = train_vrl.make_optimizer(policy, config.vrl).param_groups
    assert (rest["peak"], norm["peak"]) == (0.001, 0.02)
    assert len(norm["names"]) == 1 and "layers" not in norm["names"][0]
    plain = replace(config.vrl, norm_lr=0.0)
    assert [g["peak"] for g in train_vrl.make_optimizer(policy, plain).param_groups] == [0.001]


def test_a_judge_that_fails_often_stops_the_run(loop, monkeypatch):
    def failing(trajectory, config, pool):
        return {
            **reward_by_text(trajectory, config, pool),
            **({"total": math.nan} if trajectory["task"]["id"].endswith("1") else {}),
        }

    monkeypatch.setattr(evaluation, "ltr_rewards", each(failing))
    with pytest.raises(SystemExit, match="the judge failed on"):
        loop("judge", vrl={"tasks_per_step": 5})
