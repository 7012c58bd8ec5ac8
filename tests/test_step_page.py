"""bench.py step and bench.py try, on one tiny run whose rewards are made up, so that it learns."""

import copy
import doctest
import random
import re
import shutil
import sys
import uuid
from html import unescape
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from test_ends import TINY  # noqa: E402

import bench  # noqa: E402
import train_vrl  # noqa: E402
from lib import evaluation, step_page, try_it  # noqa: E402
from lib.experiment import Config, load_config  # noqa: E402
from lib.reading import read_request  # noqa: E402
from lib.runs import read_jsonl, write_jsonl  # noqa: E402
from lib.tasks import make_tasks  # noqa: E402
from lib.text import fill_template  # noqa: E402
from lib.tokens import load_tokenizer  # noqa: E402
from rewards import PARTS, ltr_rewards  # noqa: E402

CHROMIUM = shutil.which("chromium")
STEPS = 4
SMALL = (
    *TINY,
    f"vrl.steps={STEPS}",
    "vrl.tasks_per_step=3",
    "vrl.group_size=3",
    "vrl.save_every=3",
    "vrl.warmup=1",
    "vrl.lr=0.01",
)


def made_up_rewards(trajectories, config, pools, llm):
    """LtrReward with a total and parts that chance decides, from one seed."""
    rewards = ltr_rewards(trajectories, config, pools, llm)
    rng = random.Random(len(trajectories))
    return [{**reward, **dict.fromkeys(("total", *PARTS), rng.random())} for reward in rewards]


@pytest.fixture(scope="module")
def run():
    """The folder of a finished run of STEPS steps; the checkpoints 3 and 4 are kept."""
    name = f"test-step-{uuid.uuid4().hex[:8]}"
    folder = ROOT / "runs" / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "ltr_rewards", made_up_rewards)
        patch.setattr(
            sys, "argv", ["train_vrl.py", "--config", "configs/smoke.yaml", f"name={name}", *SMALL]
        )
        try:
            train_vrl.main()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def again(run):
    """(what train_vrl.replay gives of step 3, from the first step on; config; tokenizer).

    Its looks are copies of the policy, with the greedy episodes of two tasks.
    """
    config = load_config(run / "config.yaml")
    tokenizer = load_tokenizer(config, run)

    def look(sampler, rollouts, seed):
        tasks = [group[0].task for group in step_page.chosen(rollouts, 2)]
        played = step_page.sample_rollouts(sampler, tokenizer, tasks, config, 0.0, seed)
        evaluation.score_rollouts(played, config)
        return copy.deepcopy(sampler), played

    found = train_vrl.replay(config, run, 3, tokenizer, look)
    models, played = zip(*found["looks"])
    return {**found, "models": models, "looks": played}, config, tokenizer


@pytest.fixture(scope="module")
def content(run, again):
    """What the page of step 3 shows, with two tasks."""
    found, config, tokenizer = again
    return step_page.page_of(found, step_page.step_record(run, 3), config, tokenizer, 2)


def weights_of(model):
    return {name: p for name, p in model.named_parameters() if p.numel()}


def test_doctests():
    for module, least in ((step_page, 3), (try_it, 1)):
        result = doctest.testmod(module)
        assert result.attempted >= least and result.failed == 0


# ---------------------------------------------------------------------------- the replay
def test_three_updates_again_end_at_the_run_s_own_weights(run, again):
    found, _, _ = again
    kept = load_file(run / "vrl" / "step-3" / "model.safetensors")
    after = weights_of(found["models"][1])
    assert len(kept) > 5 and all(torch.equal(after[name], kept[name]) for name in kept)
    before = weights_of(found["models"][0])
    assert any(not torch.equal(before[name], kept[name]) for name in kept)
    record = step_page.step_record(run, 3)
    assert found["figures"]["grad_norm"] == record["grad_norm"] > 0
    assert found["figures"]["loss"] == record["loss"]


def test_a_checkpoint_below_the_step_is_where_the_replay_begins(run, again, monkeypatch):
    _, config, tokenizer = again
    updates, update = [], train_vrl.update
    monkeypatch.setattr(train_vrl, "update", lambda *given: updates.append(1) or update(*given))
    found = train_vrl.replay(config, run, 4, tokenizer, lambda sampler, *_: copy.deepcopy(sampler))
    kept = load_file(run / "vrl" / "step-4" / "model.safetensors")
    assert len(updates) == 1
    assert all(torch.equal(weights_of(found["looks"][1])[name], kept[name]) for name in kept)


def test_an_adapter_with_kl_and_minibatches_is_replayed_too(run, monkeypatch):
    name = f"{run.name}-lora"
    more = [f"pst.init_from=runs/{run.name}/pst/final", "vrl.tune=lora", "vrl.kl_coef=0.1"]
    more += ["vrl.minibatches=2", "vrl.steps=2", "vrl.norm_lr=0.01"]
    monkeypatch.setattr(evaluation, "ltr_rewards", made_up_rewards)
    words = ["train_vrl.py", "--config", "configs/smoke.yaml", f"name={name}", *SMALL, *more]
    monkeypatch.setattr(sys, "argv", words)
    folder = ROOT / "runs" / name
    try:
        train_vrl.main()
        config = load_config(folder / "config.yaml")
        tokenizer = load_tokenizer(config, folder)
        found = train_vrl.replay(config, folder, 2, tokenizer, lambda sampler, *_: sampler)
        record = step_page.step_record(folder, 2)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("loss", "grad_norm", "kl", "ratio"):
        assert found["figures"][name] == record[name] != 0
    assert record["kl"] > 0 and found["logprobs"][0] != found["logprobs"][1]


def test_rollouts_are_read_back_as_they_were_trained(run, again):
    found, config, tokenizer = again
    records = read_jsonl(train_vrl.rollout_file(run, 3))
    assert len(found["rollouts"]) == len(records) == 9
    for r, record in zip(found["rollouts"], records):
        assert r.advantage == record["advantage"] and r.reward == record["reward"]["total"]
        prompt = r.loss_mask.index(1)
        assert r.ids[:prompt] == step_page_prompt(record, tokenizer) and len(r.ids) == len(
            r.logprobs
        )
        assert all(p < 0 for p, m in zip(r.logprobs, r.loss_mask) if m)
    assert {r.group_id for r in found["rollouts"]} == {0, 1, 2}


def step_page_prompt(record, tokenizer):
    from lib.tokens import encode_prompt

    return encode_prompt(tokenizer, record["messages"][:2])


# ---------------------------------------------------------------------------- what the page says
def test_a_token_s_push_is_the_difference_of_two_log_probabilities(again, content):
    found, config, tokenizer = again
    group = content["groups"][0]
    card = group["cards"][-1]
    r = step_page.chosen(found["rollouts"], 2)[0][card["number"] - 1]
    by_hand = []
    with torch.no_grad():
        for model in found["models"]:
            logits = model(input_ids=torch.tensor([r.ids])).logits[0]  # (T, V)
            logprobs = logits.log_softmax(-1)[torch.arange(len(r.ids) - 1), r.ids[1:]]
            by_hand.append(logprobs[torch.tensor(r.loss_mask[1:], dtype=torch.bool)])
    expected = (by_hand[1] - by_hand[0]).tolist()
    pieces = [piece for turn in card["turns"] for piece in turn["pieces"]]
    assert sum(p["push"] for p in pieces) == pytest.approx(sum(expected), abs=1e-4)
    assert card["change"] == pytest.approx(sum(expected), abs=1e-4) and abs(card["change"]) > 1e-3
    assert card["tokens"] == len(expected) == sum(r.loss_mask)
    if len(pieces) == len(expected):
        assert [p["push"] for p in pieces] == pytest.approx(expected, abs=1e-5)
    said = tokenizer.decode([t for t, m in zip(r.ids, r.loss_mask) if m])
    assert "".join(p["text"] for p in pieces) == said


def test_the_numbers_are_those_of_the_rollouts_and_of_metrics(run, content):
    records = read_jsonl(train_vrl.rollout_file(run, 3))
    html = fill_template("templates/step.jinja", **content)
    text = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))).replace("−", "-")
    assert f"Mean of this step: {step_page.step_record(run, 3)['reward']:.3f}" in text
    groups = [records[at : at + 3] for at in (0, 3, 6)]
    for group in groups:
        assert group[0]["task"]["request"][:90] in text
        mean = sum(record["reward"]["total"] for record in group) / 3
        assert f"{mean:.3f}" in text
    for shown in content["groups"]:
        group = next(g for g in groups if g[0]["task"]["id"] == shown["task"]["id"])
        for number, record in enumerate(group, 1):
            at = text.index(
                f"rollout {number} ended by {record['ended']}", text.index("Task 1 mean")
            )
            assert at > 0
            total, a = record["reward"]["total"], record["advantage"]
            assert f"R_vrt {total:.3f} , A {a:+.3f}" in text
    spreads = [group["spread"] for group in content["groups"]]
    assert spreads == sorted(spreads, reverse=True) and len(spreads) == 2
    means = content["means"]
    assert means["above"]["rollouts"] + means["below"]["rollouts"] == 9
    # With so high a rate the step does what it is for.
    assert means["above"]["token"] > means["below"]["token"]
    assert [p["push"] for p in content["most"]["up"]] == sorted(
        [p["push"] for p in content["most"]["up"]], reverse=True
    )


def test_the_greedy_answers_are_compared(again, content):
    found, _, tokenizer = again
    for place, group in enumerate(content["groups"]):
        for side, looks in zip(("before", "after"), found["looks"]):
            r = looks[place]
            said = tokenizer.decode([t for t, m in zip(r.ids, r.loss_mask) if m])
            shown = group["greedy"][side]
            assert "".join(text for text, _ in shown["parts"]) == said
            assert shown["reward"] == r.reward and shown["logprob"] == sum(r.logprobs)
            assert any(differs for _, differs in shown["parts"]) <= (not group["greedy"]["same"])


def test_nothing_an_agent_wrote_becomes_markup(content):
    evil = "<script>window.hit=1</script>"
    poisoned = copy.deepcopy(content)
    group = poisoned["groups"][0]
    group["task"]["request"] = group["task"]["constraints"]["subject"] = evil
    card = group["cards"][0]
    card["ended"] = card["turns"][0]["pieces"][0]["text"] = evil
    card["turns"][0]["replies"] = [evil]
    group["greedy"] = {**group["greedy"], "same": False}
    group["greedy"]["before"] = {**group["greedy"]["before"], "parts": [(evil, True)]}
    poisoned["most"]["up"][0]["ahead"] = evil
    html = fill_template("templates/step.jinja", **poisoned)
    assert evil not in html and html.count("&lt;script&gt;") >= 6


def test_tokens_of_one_character_are_one_piece():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    ids = list("aé€".encode())
    pieces = step_page.pieces_of(Bytes(), ids, [1.0] * len(ids))
    assert pieces == [("a", 1.0), ("é", 2.0), ("€", 3.0)]
    assert step_page.pieces_of(Bytes(), ids[:-1], [1.0] * 5)[-1] == ("\ufffd", 2.0)


# ---------------------------------------------------------------------------- the command
def test_the_command_writes_a_page_that_fits_a_phone(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", str(run), "4", "--tasks", "1"])
    bench.main()
    page = run / "step-4.html"
    assert str(page) in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert (
        "Task 1" in html and "Task 2" not in html and "http" not in html.replace("http-equiv", "")
    )
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (390, 1280):
            shown = browser.new_page(viewport={"width": width, "height": 800})
            said = []
            shown.on("console", lambda m, said=said: said.append(m.text))
            shown.goto(page.as_uri())
            assert shown.evaluate("document.documentElement.scrollWidth") == width
            assert shown.locator(".card").count() == 3 and said == []
        browser.close()


def refused(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, words)])
    with pytest.raises(SystemExit) as e:
        bench.main()
    assert str(e.value).startswith("error: ")
    return str(e.value)


def test_what_cannot_be_shown_is_refused(run, monkeypatch, tmp_path):
    assert "it has steps 1 to 4" in refused(["step", run, 5], monkeypatch)
    assert "config.yaml is missing" in refused(["step", tmp_path, 1], monkeypatch)
    assert "at least 1" in refused(["step", run, 1, "--tasks", 0], monkeypatch)
    path = train_vrl.rollout_file(run, 2)
    records = read_jsonl(path)
    write_jsonl(path, [{k: v for k, v in r.items() if k != "ids"} for r in records])
    try:
        said = refused(["step", run, 3], monkeypatch)
    finally:
        write_jsonl(path, records)
    assert "step-2.jsonl" in said and "no tokens" in said


def test_another_gradient_than_the_run_s_is_warned_of(run, monkeypatch, capsys):
    path = run / "metrics.jsonl"
    kept = path.read_text()
    records = read_jsonl(path)
    for m in records:
        m["grad_norm"] = 2 * m.get("grad_norm", 1.0)
    write_jsonl(path, records)
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", str(run), "4"])
    try:
        bench.main()
    finally:
        path.write_text(kept)
    assert "warning: the gradient's norm" in capsys.readouterr().out


# ---------------------------------------------------------------------------- try
def tried(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "try", *map(str, words)])
    bench.main()
    return capsys.readouterr().out


def test_the_expert_plays_a_request_in_plain_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(try_it, "ROOT", tmp_path)
    said = tried([try_it.EXAMPLE, "--agent", "expert"], monkeypatch, capsys)
    assert "1 video, 3 shots, 15 s, music; subject: a copper teapot" in said
    for word in ("turn 1", "think ", "plan ", "call ", "reply ", "answer "):
        assert said.index(word) < said.index("R_vrt")
    assert float(re.search(r"R_vrt (\d\.\d+)", said)[1]) > 0.9
    html = (tmp_path / "runs" / "try.html").read_text(encoding="utf-8")
    assert "<video" in html and "a copper teapot" in html


@pytest.mark.parametrize("sampled", [(), ("--sampled",)])
def test_the_run_s_policy_plays(run, monkeypatch, capsys, sampled):
    words = ["A product image of a copper teapot, 4:3", "--run", run, *sampled]
    said = tried(words, monkeypatch, capsys)
    assert f"policy   runs/{run.name}/vrl/step-{STEPS}" in said
    # Turns of this run are at most 20 tokens long.
    assert "turn 1, cut off" in said and "R_vrt 0.000" in said
    assert (run / "try.html").is_file()


def test_without_a_run_the_newest_finished_one_plays(run, tmp_path, monkeypatch):
    assert (try_it.newest_run() / "vrl" / "after.json").is_file()
    monkeypatch.setattr(try_it, "ROOT", tmp_path)
    said = refused(["try", try_it.EXAMPLE], monkeypatch)
    assert "no finished run" in said and "--agent expert" in said
    assert "config.yaml is missing" in refused(
        ["try", try_it.EXAMPLE, "--run", tmp_path], monkeypatch
    )


@pytest.mark.parametrize(
    "request_, facts",
    [
        (
            "three photos of the old lighthouse in watercolor style",
            {"images": 3, "subject": "an old lighthouse", "style": "watercolor"},
        ),
        (
            "a short trailer for my space opera in 16:9 and with captions, 12 seconds",
            {"videos": 1, "aspect_ratio": "16:9", "duration_s": 12, "audio": ["subtitles"]},
        ),
        (
            "please give me a single logo featuring our owl on a transparent background",
            {"images": 1, "subject": "an owl", "transparent": True},
        ),
        (
            "Make a product image of a copper teapot in 4:3.",
            {"subject": "a copper teapot", "aspect_ratio": "4:3"},
        ),
        (
            "two logos for a bakery with music, 20 seconds",
            {"images": 2, "subject": "a bakery", "audio": [], "duration_s": None},
        ),
        ("2 videos of a cat 8 s", {"videos": 2, "subject": "a cat", "duration_s": 8}),
    ],
)
def test_plain_words_are_read(request_, facts):
    task = try_it.task_of(request_, 0)
    for name, value in facts.items():
        assert task["constraints"][name] == value, (name, task["request"])
    assert task["constraints"] == read_request(task["request"])


@pytest.mark.parametrize("split", ["visgen", "train", "heldout"])
def test_a_request_in_known_words_stays_as_it_is(split):
    for task in make_tasks(84, split, Config().data, 3):
        made = try_it.task_of(task["request"], 0)
        assert made["request"] == task["request"]
        assert made["scenario"] == task["scenario"]


@pytest.mark.parametrize("said", ["Make me happy", "an icon", "a fox", "", "画一只猫"])
def test_what_cannot_be_placed_is_told_what_would_be(said, monkeypatch):
    error = refused(["try", said, "--agent", "expert"], monkeypatch)
    assert try_it.EXAMPLE in error and ("marketing poster" in error or "海报" in error)
    assert "\n" not in error


def test_a_picture_that_a_request_needs_is_attached():
    request = next(
        t["request"] for t in make_tasks(84, "train", Config().data, 3) if t["constraints"]["input"]
    )
    assert [item["kind"] for item in try_it.task_of(request, 0)["inputs"]] == ["image"]


def test_what_a_run_has_not_practised_is_said():
    config = load_config(ROOT / "configs" / "quick.yaml")
    lines = try_it.foreign(try_it.task_of(try_it.EXAMPLE, 0), config)
    assert any("product marketing videos lie outside data.scenarios" in line for line in lines)
    assert any("3 shots are more" in line for line in lines)
    assert try_it.foreign(try_it.task_of("A logo for a bakery", 0), config) == []
