"""The transfer study (Sec. 4.3.3): each symbol against a case of two states worked out by hand, the
dials and what they leave alone, the verdicts, and that a study goes on where it stopped."""

import copy
import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from env import call_of, read_cases, studio  # noqa: E402
from lib import dials, theorems, transfer, verdicts  # noqa: E402
from lib.dials import PARTS, settings  # noqa: E402
from lib.experiment import Config, RolloutConfig, load_config  # noqa: E402
from lib.runs import read_jsonl  # noqa: E402
from lib.theorems import (  # noqa: E402
    anchoring,
    bound,
    fit_constants,
    improvement_bound,
    plan_sufficiency,
    terms,
    token_kl,
    total_variation,
    with_interval,
)
from lib.transfer import VIRTUAL, Real, c_tool, play_points, vision_reward  # noqa: E402
from lib.verdicts import (  # noqa: E402
    Study,
    analyse,
    corollary_43,
    make_points,
    theorem_41,
    theorem_42,
    transfer_lines,
)
from rewards import example  # noqa: E402

# A call may end in two states, made and failed. The simulator always makes; the real service fails
# a quarter of the calls. A policy that calls once is worth the share that is made.
SIMULATOR = {"made": 1.0}
SERVICE = {"made": 0.75, "failed": 0.25}


def test_doctests():
    import doctest

    for module in (theorems, dials):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


# ------------------------------------------------------------------------- two states, by hand
def test_c_tool_of_two_states():
    assert total_variation(SIMULATOR, SERVICE) == 0.25
    # A.1's L1 norm is twice that: |1 - .75| + |0 - .25|.
    assert sum(abs(SIMULATOR.get(s, 0) - SERVICE.get(s, 0)) for s in SERVICE) == 0.5
    assert total_variation(SERVICE, SERVICE) == 0
    assert total_variation({"a": 1.0}, {"b": 1.0}) == 1


def test_kl_of_two_states():
    ours = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    reference = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    by_hand = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert token_kl(ours, reference).tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)
    # The other way round it is another number.
    other = 0.5 * math.log(5 / 9) + 0.5 * math.log(5)
    assert token_kl(reference, ours).tolist() == pytest.approx([other, 0.0], abs=1e-6)


def test_kl_of_episodes_is_the_sum_over_their_states(monkeypatch):
    """Two episodes: one passes through both states, one through the first alone."""
    tables = {
        "pi": torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log(),
        "pst": torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(),
    }
    monkeypatch.setattr(transfer, "state_logprobs", lambda model, states: tables[model][states])
    first = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    second = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    found = transfer.policy_kl("pi", "pst", [[0, 1], [0]])
    assert found["episode"] == pytest.approx((first + second + first) / 2, abs=1e-6)
    assert found["token"] == pytest.approx((first + second + first) / 3, abs=1e-6)
    same = transfer.policy_kl("pi", "pi", [[0, 1]])
    assert same == {"episode": 0.0, "token": 0.0}


def test_states_are_those_before_the_agents_tokens():
    """Against plain logits of a small model: the prompt's and the replies' tokens are no states."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).eval()
    rollout = SimpleNamespace(
        ids=[3, 7, 1, 9, 4, 2], loss_mask=[0, 0, 1, 1, 0, 1], pictures=[], trajectory={}
    )
    with torch.no_grad():
        plain = model(torch.tensor([rollout.ids])).logits[0].log_softmax(-1)
        found = transfer.state_logprobs(model, rollout)
    assert torch.allclose(found, plain[[1, 2, 4]], atol=1e-5)


def test_plan_sufficiency_of_two_states():
    # Right plans make good media in 2 of 2 episodes, wrong ones in 1 of 2: r = 1 / sqrt(3).
    assert plan_sufficiency([1, 1, 0, 0], [1, 1, 1, 0]) == pytest.approx(3**-0.5, abs=1e-6)
    assert plan_sufficiency([1, 1, 0, 0], [0, 0, 1, 1]) == 0  # an inverse link is none
    assert plan_sufficiency([0.5, 0.5], [0, 1]) == plan_sufficiency([1], [1]) == 0


def test_kappa():
    assert anchoring(0) == 1 and anchoring(math.log(2)) == pytest.approx(0.5)


def test_the_three_terms_and_both_bounds_by_hand():
    """The policy calls once: J_vrt = 1 and J_real = .75, so the gap is .25 = 1 - C_tool."""
    c = 1 - total_variation(SIMULATOR, SERVICE)
    found = terms(c, kl=0.5, phi=0.8, result=0.75)
    assert found == pytest.approx((0.25, 0.5, 0.4))
    assert bound((1.0, 0.2, 0.5), found) == pytest.approx(0.25 + 0.1 + 0.2)
    # Gamma = .75 x .8 x .5 = .3; .3 x .6 - .05
    assert improvement_bound(c, 0.8, 0.5, 0.6, 0.05) == pytest.approx(0.13)


def test_constants_of_a_gap_that_is_the_dynamics_alone():
    """Gaps of 1 - C_tool, whatever the KL: delta is 1 and the rest 0."""
    points = [terms(c, kl, 1.0, 1.0) for c in (1.0, 0.75, 0.5) for kl in (0.0, 0.3)]
    gaps = [1 - c for c in (1.0, 0.75, 0.5) for _ in range(2)]
    assert fit_constants(points, gaps) == pytest.approx((1.0, 0.0, 0.0), abs=1e-9)
    # Gaps of KL / 2 besides: alpha is .5.
    gaps = [gap + p[1] / 2 for gap, p in zip(gaps, points)]
    assert fit_constants(points, gaps) == pytest.approx((1.0, 0.5, 0.0), abs=1e-9)


def test_constants_that_do_not_exist():
    """In the simulator itself, unmoved and with every goal met, the theorem allows no gap."""
    assert fit_constants([(0.0, 0.0, 0.0), (0.5, 0.1, 0.2)], [0.1, 0.2]) is None
    assert fit_constants([(0.0, 0.0, 0.0)], [0.0]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_constants_are_the_least_that_hold(seed):
    """Against a search by halving: no smaller mean bound holds on all points."""
    rng = np.random.default_rng(seed)
    points, gaps = rng.random((9, 3)), rng.random(9)
    points[0] = points[1]
    found = np.array(fit_constants(points, gaps))
    assert (points @ found >= gaps - 1e-8).all() and (found >= 0).all()
    least = found @ points.mean(axis=0)
    for _ in range(4000):
        other = found * rng.random(3) * 2 + rng.random(3) * rng.choice([0, 0.5], 3)
        if (points @ other >= gaps).all():
            assert other @ points.mean(axis=0) >= least - 1e-8


# ---------------------------------------------------------------------------------- the dials
CALL = {
    "name": "tool_text2image_gpt",
    "arguments": {"prompt": "a fox", "size": "1024x1024", "n": 2},
    "error": None,
}


def played(part, fidelity=0.0, call=CALL, seed=1):
    """(reply, the call's record, the artifacts it made) with one dial turned."""
    env = studio(fidelity=fidelity, deviations={part: 1.0})
    env.seed = seed
    reply = env.call(copy.deepcopy(call))
    made = [env.artifacts[i] for i in env.calls[-1]["outputs"]]
    return reply, env.calls[-1], made


FAITHFUL = played("observation", 1.0)


def test_observation_changes_the_reply_alone():
    reply, call, made = played("observation")
    assert (call, made) == FAITHFUL[1:]
    assert reply == {"status": "succeeded", "media": ["img_1", "img_2"]} != FAITHFUL[0]
    bad = {**CALL, "arguments": {"prompt": "a fox", "n": 99}}
    reply, call, _ = played("observation", call=bad)
    assert call == played("observation", 1.0, bad)[1] and "99" in call["error"]["message"]
    assert reply["error"]["code"] == "request_failed" and "99" not in json.dumps(reply)


def test_action_refuses_the_same_settings_again_and_may_take_others():
    reply, call, made = played("action")
    assert call["status"] == "error" and not made
    assert call["error"]["code"] == "not_available" and call["error"]["param"] == "size"
    env = studio(fidelity=0.5, deviations={"action": 1.0})
    told = {}
    for quality in ("low", "medium", "high", "auto"):
        for _ in range(3):
            arguments = {"prompt": "a fox", "quality": quality}
            env.used.clear()
            env.errors = 0
            reply = env.call({**CALL, "arguments": arguments})
            told.setdefault(quality, set()).add("error" in reply)
    assert all(len(answers) == 1 for answers in told.values())
    assert set.union(*told.values()) == {True, False}
    # Words are no settings: another prompt is refused with them.
    assert settings(CALL) == {"size": "1024x1024", "n": 2}


def test_transition_changes_what_is_made_and_no_price_or_form():
    seen = set()
    for seed in range(20):
        reply, call, made = played("transition", seed=seed)
        if "error" in reply:
            assert call["error"]["code"] == "service_error" and not made
            seen.add("failed")
            continue
        assert set(reply) == set(FAITHFUL[0]) and len(made) == 1  # one item less
        seen.add("less")
    assert seen == {"failed", "less"}


def test_reward_changes_price_and_limits_alone():
    reply, call, made = played("reward")
    assert (reply, made) == (FAITHFUL[0], FAITHFUL[2])
    plain = FAITHFUL[1]["price_usd"]
    assert call == {**FAITHFUL[1], "price_usd": round(3 * plain, 6)} and plain > 0
    # A refusal is billed, and no time or reply is another for it.
    bad = {**CALL, "arguments": {"prompt": "a fox", "n": 99}}
    reply, call, _ = played("reward", call=bad)
    faithful = played("reward", 1.0, bad)
    assert reply == faithful[0] and call == {**faithful[1], "price_usd": dials.FEE_USD}


def test_reward_counts_each_call_twice_against_a_limit():
    """As many calls in a row as the service takes: half as many with the dial turned."""

    def taken(fidelity):
        env = studio(fidelity=fidelity, deviations={"reward": 1.0})
        call = {"name": "tool_music_suno", "arguments": {"prompt": "a waltz"}, "error": None}
        there = dict(env.artifacts)
        env.turn_began = 0.0
        replies = [env.call(copy.deepcopy(call), there) for _ in range(25)]
        return sum("error" not in reply for reply in replies)

    assert taken(1.0) > 1 and taken(0.0) == math.ceil(taken(1.0) / 2)


def test_at_fidelity_1_no_weight_changes_anything():
    def of_case(case, **more):
        env = studio(failure_scale=case["failure_scale"], **more)
        reply = env.call(call_of(case))
        return reply, env.calls, env.artifacts, env.used, env.virtual_s, env.price_usd

    for case in read_cases()[::3]:
        for part in PARTS:
            assert of_case(case, deviations={part: 1.0}) == of_case(case)


def test_a_deviating_call_is_the_same_again():
    for part in PARTS:
        assert played(part, 0.5, seed=4) == played(part, 0.5, seed=4)


def test_the_config_refuses_dials_that_are_all_off():
    with pytest.raises(ValueError, match="all 0"):
        RolloutConfig(deviations=dict.fromkeys(PARTS, 0))
    turned = load_config(ROOT / "configs/tiny.yaml", ["rollout.deviations.action=0"])
    assert turned.rollout.deviations == {**dict.fromkeys(PARTS, 1), "action": 0}


def test_the_expert_meets_every_dial_without_a_fault_of_ours():
    from env import VisGenEnv
    from lib.expert import vision_agent
    from lib.tasks import make_tasks

    config = load_config(ROOT / "configs/tiny.yaml", ["data.families=0.5"])
    for task in make_tasks(12, "heldout", config.data, 5):
        for part in PARTS:
            env = VisGenEnv(Real(0.5, part).rollout(config.rollout))
            assert vision_agent(task, env, task["id"], thoughts="full")["ended"]


# ------------------------------------------------------------------------------- C_tool, R_vision
def test_c_tool_is_measured():
    cases = read_cases()[::9]
    assert c_tool(VIRTUAL, 3, cases) == 1
    assert c_tool(Real(0.0), 3, cases) == 0
    for part in PARTS:
        assert c_tool(Real(0.0, part), 2, cases) == 0
        assert abs(c_tool(Real(0.7, part), 20, cases) - 0.7) < 0.05


def test_vision_reward_of_records():
    t = example()
    whole = vision_reward(t)
    assert whole == 1
    flawed = copy.deepcopy(t)
    film = flawed["answer"]["deliverables"][0]
    clips = transfer.read_media(t).footage[film]
    for artifact in flawed["artifacts"]:
        artifact["flawed"] = artifact["id"] in clips[:1]
    assert vision_reward(flawed) == pytest.approx(1 - 1 / (2 * len(clips)))
    assert vision_reward({**t, "answer": None}) == 0


# ------------------------------------------------------------------------------------ verdicts
N_TASKS = 24
FIDELITIES = (1.0, 0.9, 0.75, 0.6, 0.4, 0.2)


def record(run, policy, fidelity, ltr, vision, plan=1.0, part="", kl=0.0):
    """A point's record. ltr, vision: its values; every second task has .1 more, every other .1
    less."""
    rows = []
    for i in range(N_TASKS):
        off = 0.1 if i % 2 else -0.1
        rows.append(
            {
                "task": f"t{i}",
                "ltr": ltr + off,
                "vision": vision + off,
                "plan": plan + off,
                "result": 0.75,
                "ended": "answer",
            }
        )
    return {
        "run": run,
        "policy": policy,
        "real": Real(fidelity, part).name,
        "fidelity": fidelity,
        "part": part,
        "episodes": rows,
        "kl": {"episode": 10 * kl, "token": kl} if fidelity == 1 and not part else None,
    }


def study_of(gain, runs=("a", "b"), j_vrt=0.8, loss=lambda c: 0.5 * (1 - c)):
    """PST at .4 and VRL at j_vrt in the simulator; in the real ones PST less `loss`, VRL `gain` of
    fidelity better."""
    records = []
    for run in runs:
        for f in FIDELITIES:
            pst = 0.4 - loss(f)
            records.append(record(run, "pst", f, pst, pst))
            records.append(record(run, "vrl", f, pst + gain(f), pst + gain(f), kl=0.1))
    return Study(records, {f"{f:g}": f for f in FIDELITIES})


def test_gap_and_terms_of_a_point_by_hand():
    study = study_of(lambda f: 0.4)
    point = next(
        p for p in make_points(study) if (p["policy"], p["real"], p["run"]) == ("vrl", "0.6", "b")
    )
    # J_vrt is .8, J_real .4 - .5 x .4 + .4 = .6. Plans are .1 off their mean, in step with the
    # media, which are .1 off theirs and .2 apart between the policies: r = .01 / (.1 sqrt .05).
    assert point["j_vrt"] == pytest.approx(0.8)
    assert point["phi"] == pytest.approx(5**-0.5, abs=1e-6)
    assert point["ltr"]["j_real"] == pytest.approx(0.6) == point["vision"]["j_real"]
    assert point["ltr"]["gap"] == pytest.approx(0.2) == point["ltr"]["gap_low"]
    assert point["terms"] == pytest.approx((0.4, 1.0, 1 - point["phi"] * 0.75))


def test_theorem_41_holds_where_the_gap_is_the_dynamics():
    found = theorem_41(make_points(study_of(lambda f: 0.4)), "ltr")
    for constants in found["constants"]:
        assert constants == pytest.approx((0.5, 0.0, 0.0), abs=1e-6)
    h = found["mixed"]
    assert h["n"] == 2 * 2 * len(FIDELITIES) and h["holds"] == (1.0, 1.0, 1.0)
    assert h["slack"][0] == pytest.approx(0, abs=1e-6) and h["flat_slack"][0] > 0.1
    # No point is tested by constants that were fitted on it.
    assert len({(t["run"], t["policy"], t["real"]) for t in found["tested"]}) == h["n"]


def test_theorem_41_breaks_where_the_gap_is_none_of_the_terms():
    """A fault at one fidelity alone: constants that were fitted without it do not cover it."""
    study = study_of(lambda f: 0.4, runs=("a",), loss=lambda f: 0.5 if f == 0.75 else 0.0)
    found = theorem_41(make_points(study), "ltr")
    h = found["mixed"]
    broken = {t["real"] for t in found["tested"] if not t["holds"]}
    assert broken == {"0.75"} and h["holds"][0] == pytest.approx(10 / 12)
    # The gap of .5 stands above a bound of 0; every task has it, so it is no noise.
    assert h["within_noise"] == h["holds"] and h["worst"] == pytest.approx(0.5, abs=0.06)


def test_theorem_42_by_hand():
    study = study_of(lambda f: 0.4, j_vrt=0.8)
    points = make_points(study)
    found = theorem_42(study, points, "ltr")
    assert [row["c_tool"] for row in found["rows"]] == sorted(FIDELITIES)
    last = found["rows"][-1]
    kappa, phi = math.exp(-0.1), points[0]["phi"]
    assert last["gain"] == pytest.approx([0.4, 0.4, 0.4])
    assert last["right"] == pytest.approx(phi * kappa * 0.4)
    # At fidelity .2 the error is .4: the right side is negative.
    assert found["rows"][0]["right"] == pytest.approx(0.2 * phi * kappa * 0.4 - 0.4)
    assert found["holds"] == found["points"] == 12
    assert 0 < found["positive"] == found["positive_and_gain"] < 12


def test_theorem_42_counts_a_gain_that_is_missing():
    """VRL gains in the simulator alone: where the right side is positive there is none."""
    study = study_of(lambda f: 0.4 if f == 1 else -0.01, loss=lambda c: 0.0)
    found = theorem_42(study, make_points(study), "ltr")
    assert found["points"] - found["holds"] == 0 and found["positive"] == 2
    study = study_of(lambda f: -0.4, loss=lambda c: 0.0)
    assert theorem_42(study, make_points(study), "ltr")["positive"] == 0


def test_corollary_43_agrees_is_refuted_or_open():
    grows = corollary_43(study_of(lambda f: 0.4 * f), "ltr")
    assert grows["said"].startswith("agrees") and grows["slope"][0] == pytest.approx(0.4)
    assert not grows["near_optimal"] and grows["virtual_reward"] == pytest.approx(0.8)
    falls = corollary_43(study_of(lambda f: 0.4 - 0.3 * f), "ltr")
    assert falls["said"].startswith("refuted") and falls["slope"][2] < 0
    level = corollary_43(study_of(lambda f: 0.4), "ltr")
    assert level["said"].startswith("not decided")
    # One fall in the middle refutes it too, though the slope is above 0.
    dip = corollary_43(study_of(lambda f: 0.4 * f - (0.3 if f == 0.75 else 0)), "ltr")
    assert dip["slope"][1] > 0 and dip["said"].startswith("refuted")


def test_an_interval_is_of_tasks_and_seeds():
    rng = np.random.default_rng(0)
    noise = [rng.normal(0.1 * s, 0.3, (1, 50)) for s in range(3)]
    middle, low, high = with_interval(noise, lambda means: means[0])
    assert middle == pytest.approx(np.mean([n.mean() for n in noise]))
    assert low < middle < high
    alone = with_interval(noise[:1], lambda means: means[0])
    by_hand = 1.96 * noise[0].std() / 50**0.5
    assert (alone[2] - alone[1]) / 2 == pytest.approx(by_hand, rel=0.15)


def test_kappa_and_randomisation_by_hand():
    """kl_coef .2 loses .1 of its gain in the real ones, 0 loses .3; randomisation gains .05."""
    study = study_of(lambda f: 0.4, loss=lambda c: 0.0)
    records = list(study.at.values())
    for run in ("a", "b"):
        for f in FIDELITIES[::3]:
            for policy, lost, kl in (("kl-0", 0.3, 0.5), ("kl-0.2", 0.1, 0.01)):
                value = 0.8 - (lost if f < 1 else 0)
                records.append(record(run, policy, f, value, value, kl=kl))
            records.append(record(run, "random-0.7", f, 0.85, 0.85))
    study = Study(records, study.c_tools)
    coefs = {"kl-0": 0.0, "kl-0.2": 0.2}
    result = analyse(study, coefs, "random-0.7", "vrl")
    kappa = result["ltr"]["kappa"]
    assert kappa["reals"] == [f"{f:g}" for f in FIDELITIES[::3] if f < 1]
    assert [row["loss"][0] for row in kappa["rows"]] == pytest.approx([0.3, 0.1])
    assert kappa["rows"][0]["kappa"] == pytest.approx(math.exp(-0.5))
    assert kappa["difference"] == pytest.approx((-0.2, -0.2, -0.2))
    gained = result["ltr"]["randomised"]
    assert [row["difference"][0] for row in gained] == pytest.approx([0.05] * 2)
    assert all("random" not in p["policy"] for p in result["points"])
    result["settings"] = {"tasks": N_TASKS, "rollouts": 1, "judge": "rules"}
    text = "\n".join(transfer_lines(result))
    assert "anchoring helps transfer" in text and "Corollary 4.3: " in text
    assert "too short" not in text


def test_the_picture_is_drawn(tmp_path):
    result = analyse(study_of(lambda f: 0.4 * f), {}, "random-0.7", "vrl")
    verdicts.plot_transfer(result, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    json.dumps(result, allow_nan=False)


# ------------------------------------------------------------------------------------ resumption
class Broken(Exception):
    """A break in the middle of a study."""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A run whose policies play by a stub: (function that plays its points, list of what was
    played)."""
    run = tmp_path / "a"
    (run / "data").mkdir(parents=True)
    tasks = [{"id": f"t{i}"} for i in range(3)]
    (run / "data" / "heldout.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    asked, limit = [], [10**6]

    def play(model, tokenizer, tasks, config, rollouts, label):
        if len(asked) >= limit[0]:
            raise Broken
        asked.append((model, config.rollout.fidelity))
        value = config.rollout.fidelity / 2
        reward = {"total": value, "plan": 1.0, "result": 1.0}
        played = {"reward": reward, "ended": "answer"}
        return [SimpleNamespace(trajectory={**played, "task": t}) for t in tasks]

    monkeypatch.setattr(transfer, "play", play)
    monkeypatch.setattr(transfer, "vision_reward", lambda trajectory: 0.5)
    monkeypatch.setattr(transfer, "weights_of", lambda policy: f"{policy.name}/final")
    monkeypatch.setattr(transfer, "policy_kl", lambda *models: {"episode": 1.0, "token": 0.1})
    monkeypatch.setattr("lib.policy.set_up", lambda config: "cpu")
    monkeypatch.setattr("lib.tokens.load_tokenizer", lambda config, run: None)
    config = replace(Config(), name="a")
    policies = [transfer.Policy("pst", config, "pst"), transfer.Policy("vrl", config, "vrl")]
    reals = [Real(1.0), Real(0.5), Real(0.5, "action")]
    given = Namespace(tasks=2, rollouts=1)

    def go(most=10**6):
        limit[0] = len(asked) + most
        load = lambda config, run, stage, device, tokenizer: stage  # noqa: E731
        return play_points(run, policies, reals, given, load)

    return run, go, asked, given, policies


def test_a_study_goes_on_where_it_stopped(stage):
    run, go, asked, given, policies = stage
    with pytest.raises(Broken):
        go(most=4)
    path = run / "transfer" / "transfer.jsonl"
    assert len(read_jsonl(path)) == 4
    # The last record is torn: it is played again, and nothing else.
    text = path.read_bytes()
    path.write_bytes(text[:-40])
    records = go()
    assert len(asked) == 4 + 3 and len(read_jsonl(path)) == 6 == len(records)
    assert path.read_bytes().startswith(text[:-200])
    assert [(r["policy"], r["real"]) for r in records] == [
        (policy, real) for policy in ("pst", "vrl") for real in ("1", "0.5", "action 0.5")
    ]
    assert records == go() and len(asked) == 7
    assert [bool(r["kl"]) for r in records] == [True, False, False] * 2
    assert records[0]["kl"]["episode"] == 0 and records[3]["kl"]["episode"] == 1
    # Other tasks are other points.
    given.tasks = 3
    assert all(len(r["episodes"]) == 3 for r in go()) and len(asked) == 13
    # And so is a policy that was trained otherwise.
    policies[1] = replace(policies[1], config=replace(Config(), name="a", seed=1))
    assert go()[3]["seed"] == 1 and len(asked) == 16


def test_the_numbers_of_a_stopped_study_are_those_of_a_whole_one(stage):
    run, go, *_ = stage
    with pytest.raises(Broken):
        go(most=2)
    in_parts = go()
    (run / "transfer" / "transfer.jsonl").unlink()
    for a, b in zip(in_parts, go()):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


# ---------------------------------------------------------------------------------- the command
def test_runs_beside_it_and_what_stands_for_one():
    anchored = ["name=tiny", "vrl.tune=lora", "vrl.kl_coef=0.04", "vrl.steps=60"]
    config = load_config(ROOT / "configs/tiny.yaml", anchored)
    given = Namespace(kl=[0.0, 0.01, 0.04, 0.2], randomised=0.7, steps=60, lr=None)
    assert set(transfer.side_runs(config, given)) == {"kl-0", "kl-0.01", "kl-0.2", "random-0.7"}
    trained = {"kl-0", "kl-0.2", "random-0.7"}
    coefs, twins = transfer.kinds_of(config, given, trained | {"vrl"})
    assert coefs == {"kl-0": 0.0, "kl-0.2": 0.2, "vrl": 0.04} and twins == ("random-0.7", "vrl")
    given.lr = 1e-3
    assert not transfer.own_is_side(config, given)
    given.steps, given.lr = 20, None
    assert len(transfer.side_runs(config, given)) == 5
    assert transfer.kinds_of(config, given, {"kl-0.04"})[1] == ("random-0.7", "kl-0.04")


def test_the_config_of_a_run_beside_it(tmp_path):
    config = load_config(
        ROOT / "configs/tiny.yaml", ["name=x", "vrl.tune=full", "vrl.kl_coef=0", "vrl.norm_lr=0"]
    )
    run = tmp_path / "x"
    run.mkdir()
    from dataclasses import asdict

    import yaml

    (run / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    sections = {"vrl": {"kl_coef": 0.2}, "rollout": {"fidelity": 0.7}}
    given = Namespace(steps=30, lr=None)
    side = load_config(transfer.side_config(run, config, "kl-0.2", sections, given))
    assert side.name == "x-kl-0.2" and side.pst.init_from == "runs/x/pst/final"
    assert (side.vrl.steps, side.vrl.cooldown, side.vrl.lr) == (30, 10, config.vrl.lr)
    # The KL takes an adapter, whatever the run itself trains.
    assert (side.vrl.tune, side.vrl.kl_coef, side.rollout.fidelity) == ("lora", 0.2, 0.7)
    assert (side.data, side.model, side.seed) == (config.data, config.model, config.seed)


def test_several_runs_are_seeds_of_one_config():
    one = replace(load_config(ROOT / "configs/tiny.yaml"), name="tiny")
    transfer.check_seeds([one, replace(one, name="tiny-1", seed=1)])
    other = replace(one, name="tiny-2", seed=2, vrl=replace(one.vrl, lr=1e-3))
    with pytest.raises(SystemExit, match="runs/tiny-2 and runs/tiny differ"):
        transfer.check_seeds([one, other])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks", "0"], "--tasks is 0"),
        (["--fidelities", "1,2"], "--fidelities has '2'"),
        (["--kl", "x"], "--kl has 'x'"),
        (["--randomised", "-1"], "--randomised is -1"),
        (["name=nobody"], "runs/nobody is no run"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(SystemExit, match=said):
        transfer.read_arguments(arguments)
