"""Reading exercises: what they show and never show, and how reading is measured."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import print_table  # noqa: E402
from lib import reading_exercises as R  # noqa: E402
from lib import tokens  # noqa: E402
from lib.experiment import Config, DataConfig, load_config  # noqa: E402
from lib.families import load_families  # noqa: E402
from lib.figures import print_before_after  # noqa: E402
from lib.general import make_general  # noqa: E402
from lib.reading import NO_CONSTRAINTS, facts_of, named_facts, read_request  # noqa: E402
from lib.runs import seeded_rng  # noqa: E402
from lib.scenarios import load_scenarios, material, split_list  # noqa: E402
from lib.tasks import combination_split, make_task, make_tasks, task_types  # noqa: E402

TINY = ROOT / "configs" / "base.yaml"  # tiny.yaml with the whole world
DATA = load_config(TINY).data


@pytest.fixture(scope="module")
def tasks():
    """Tasks as the exercises ask about them."""
    rng = seeded_rng("tests", "reading")
    return [make_task(rng, "reading", DATA, *rng.choice(task_types(DATA))) for _ in range(3000)]


@pytest.fixture(scope="module")
def exercises():
    rng = seeded_rng("tests", "exercises")
    return [R.reading_exercise(rng, DATA) for _ in range(500)]


# --- what the exercises show


def test_combinations_are_those_of_training(tasks):
    assert {combination_split(task["constraints"]) for task in tasks} == {"train"}
    # The held-out side is not empty, so the line above can fail.
    heldout = make_tasks(42, "heldout", DATA, 0)
    assert {combination_split(task["constraints"]) for task in heldout} == {"heldout"}


def test_no_held_out_subject_or_style(tasks):
    book = load_scenarios("en")
    written = [subject for group in book["subjects"].values() for subject in group]
    of_training = {
        subject
        for group in book["subjects"].values()
        for subject in split_list(group, len(group) // 5, "reading")
    }
    heldout = {subject for subject in written if subject not in of_training}
    styles = {style for group in material("heldout", "en")["styles"].values() for style in group}
    shown = {task["constraints"]["subject"] for task in tasks}
    assert len(heldout) > 50 and not shown & heldout
    assert len(shown & of_training) > 100  # of expert trajectories and of VRL's tasks
    assert styles and not {task["constraints"]["style"] for task in tasks} & styles


@pytest.mark.parametrize("split", ["visgen", "train", "heldout"])
def test_wordings_and_clauses_of_every_split(tasks, split):
    requests = [task["request"] for task in tasks]
    own = material(split, "en")
    clauses = {
        re.split(r"{\w+}", text)[0] for texts in own["clauses"].values() for text in texts if text
    }
    clauses = {clause for clause in clauses if len(clause) > 20}
    assert sum(any(clause in request for request in requests) for clause in clauses) > 5
    openings = {
        wording.split("{")[0]
        for scenario in own["scenarios"].values()
        for wording in scenario["wordings"]
    }
    openings = {opening for opening in openings if len(opening) > 12}
    found = sum(any(request.startswith(o) for request in requests) for o in openings)
    assert found > 0.5 * len(openings) > 5


def test_no_wording_of_the_bench_alone(tasks):
    own = {
        wording.split("{")[0]
        for name, scenario in material("bench", "en")["scenarios"].items()
        for wording in scenario["wordings"]
        if wording not in load_scenarios("en")["scenarios"][name]["wordings"]
    }
    own = {opening for opening in own if len(opening) > 12}
    assert len(own) > 20
    assert not [t for t in tasks if any(t["request"].startswith(opening) for opening in own)]


def test_answers_are_what_the_requests_say(exercises):
    """Sounds in the order of the request: the order in which they were chosen cannot be read."""
    assert sum("music, subtitles" in answer for _, answer in exercises) > 0
    assert sum("subtitles, music" in answer for _, answer in exercises) > 0
    for question, answer in exercises:
        request = question.removeprefix("Read: ")
        assert request != question
        c = read_request(request)
        assert answer == f": {facts_of(c)}. Subject: {c['subject']}"


def test_chinese_requests_are_answered_in_chinese():
    data = DataConfig(languages=["zh"], families=0.5, max_steps=99)
    own = r"in_\d|AI|https://\S+|\d+x\d+|\d+[Kp]"
    rng = seeded_rng("tests", "Chinese exercises")
    seen = {}
    for _ in range(400):
        question, answer = R.reading_exercise(rng, data)
        c = read_request(question.removeprefix("Read: "))
        facts, subject = answer.removeprefix(": ").split("。主题：")
        assert subject == c["subject"] and facts == facts_of(c)
        assert all(right for what, right in R.mark(c, answer) if what != "extra")
        assert not dict(R.mark(c, answer))["extra"]
        # What the user wrote in Latin letters stands as it is.
        given = [str(v) for v in c["wish"].values()]
        bare = re.sub("|".join([own, *map(re.escape, given)]), "", facts)
        assert not re.search("[A-Za-z{]", bare), facts
        # Other wishes, other words.
        wishes = {k: v for k, v in c.items() if k not in ("subject", "storyboard", "deliver")}
        assert seen.setdefault(facts, wishes) == wishes
        english = named_facts({**c, "subject": "a cat"})
        assert [kind for kind, _ in named_facts(c)] == [kind for kind, _ in english]
        assert len({fact for _, fact in named_facts(c)}) == len(english)
    assert len(seen) > 300
    c = {**NO_CONSTRAINTS, "videos": 1, "duration_s": 12, "consistency": ["style"]}
    assert facts_of({**c, "subject": "a cat", "style": "pixel art"}) == (
        "1 video, pixel art, 12 s, same style"
    )
    chinese = facts_of({**c, "subject": "一只猫", "style": "像素"})
    assert chinese == "1条视频，像素风格，12秒，画风一致"


def test_every_family_and_slot_has_chinese_words():
    words = load_scenarios("zh")["facts"]
    families = load_families()
    assert set(families) <= set(words)
    assert {slot for family in families.values() for slot in family["wish"]} <= set(words)
    assert set(load_scenarios("en")["facts"]) <= set(words)


def test_never_a_plan_or_a_call(exercises):
    for question, answer in exercises:
        assert not re.search(r"<|tool_|\"|img_|vid_|\d x \d", answer), answer
        assert "tool_" not in question and "<" not in question


def test_exercises_stay_in_a_smaller_world():
    data = replace(DATA, scenarios=["logo_design"], max_images=2)
    rng = seeded_rng("tests", "small")
    for _ in range(100):
        question, answer = R.reading_exercise(rng, data)
        assert re.match(r": [12] images?\b", answer), answer
    assert {task["scenario"] for task in make_tasks(20, "visgen", data, 0)} == {"logo_design"}


def test_a_task_type_that_is_none():
    with pytest.raises(SystemExit, match="error: config key `data.scenarios` holds 'logo'; allow"):
        make_tasks(1, "train", replace(DATA, scenarios=["logo"]), 0)
    with pytest.raises(ValueError, match="scenarios is empty"):
        replace(DATA, scenarios=[])


def test_reading_in_the_general_mix():
    kinds = {"arithmetic": 1, "copy": 0, "instruction": 0, "function": 0, "reading": 3}
    config = Config(data=replace(DATA, general_kinds=kinds))
    train, heldout = make_general(config, 400, "train"), make_general(config, 40, "heldout")
    assert sum(item["kind"] == "reading" for item in train) == 300
    # A kind of weight 0 is in neither part.
    assert {item["kind"] for item in heldout} == {"arithmetic", "reading"}
    asked = {item["messages"][0]["content"] for item in train}
    assert not asked & {item["messages"][0]["content"] for item in heldout}
    assert "reading" not in {item["kind"] for item in make_general(Config(), 200, "train")}


# --- the metric


class Tokenizer:
    """Text as its characters' numbers, so that a stub policy answers in words."""

    def apply_chat_template(self, messages, tools=None, tokenize=False, add_generation_prompt=True):
        return "".join(f"{message['content']}\n" for message in messages)

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def accuracy_of(tasks, say, monkeypatch):
    """reading_accuracy of a stub policy that answers a task with `say(its constraints)`."""
    monkeypatch.setattr(
        tokens, "encode_prompt", lambda tokenizer, messages: list(map(ord, messages[-1]["content"]))
    )
    by_question = {R.question_about(task): task for task in tasks}

    def answers(prompts):
        found = [by_question["".join(map(chr, prompt))] for prompt in prompts]
        return [list(map(ord, say(task["constraints"]))) for task in found]

    return R.reading_accuracy(answers, Tokenizer(), tasks)


def test_a_policy_that_reads_right(monkeypatch):
    tasks = R.reading_tasks(Config(data=DATA))
    found = accuracy_of(tasks, R.answer_about, monkeypatch)
    assert set(found) == {"visgen", "train", "heldout", "bench"}
    for shares in found.values():
        assert shares["facts"] == shares["subject"] == 1 and shares["extra"] == 0
        assert set(shares["kinds"].values()) == {1.0}
    kinds = {kind for shares in found.values() for kind in shares["kinds"]}
    assert {"amount", "duration", "shots", "aspect", "consistency", "music"} <= kinds


def test_a_policy_that_is_blind_to_one_wish(monkeypatch):
    tasks = R.reading_tasks(Config(data=DATA))
    found = accuracy_of(tasks, lambda c: R.answer_about({**c, "consistency": []}), monkeypatch)
    for split, shares in found.items():
        of_split = [task["constraints"] for task in tasks if task["split"] == split]
        asked = sum(bool(c["consistency"]) for c in of_split)
        assert asked and shares["kinds"]["consistency"] == 0
        assert shares["kinds"]["amount"] == shares["subject"] == 1
        assert shares["facts"] == pytest.approx(1 - asked / len(of_split))
        assert shares["extra"] == 0


def test_a_wish_that_nobody_had(monkeypatch):
    tasks = [t for t in R.reading_tasks(Config(data=DATA)) if not t["constraints"]["web_page"]]
    found = accuracy_of(tasks, lambda c: R.answer_about({**c, "web_page": True}), monkeypatch)
    for shares in found.values():
        assert shares["facts"] == 0 and shares["extra"] == 1
        assert set(shares["kinds"].values()) == {1.0}  # what was asked for is all there


@pytest.mark.parametrize("said", ["", ":", "nonsense", "<plan>[]</plan>", ". Subject: ", ": , ,"])
def test_an_answer_of_another_form_is_wrong(said):
    c = {**NO_CONSTRAINTS, "images": 2, "subject": "a cat"}
    marks = dict(R.mark(c, said))
    assert not marks["facts"] and not marks["subject"] and not marks["amount"]


def test_tables_show_it(capsys):
    shares = {"facts": 0.25, "subject": 0.5, "extra": 0.0, "kinds": {"music": 0.75}}
    figures = {"general": {"general": 1.0}, "reading": {"visgen": shares, "heldout": shares}}
    better = {**shares, "facts": 0.625}
    print_before_after(figures, {**figures, "reading": {"visgen": better, "heldout": better}})
    after_vrl = capsys.readouterr().out
    assert re.search(r"reads facts, heldout +0.250 +0.625\n  subject +0.500 +0.500", after_vrl)
    assert re.search(r"  music +0.750 +0.750", after_vrl)

    measured = {**figures, "n": 2, "seed": 0, "from": "pst"}
    print_table([{"pst": measured}])
    assert re.search(r"reads facts, visgen +0.250", capsys.readouterr().out)
    # Beside a run whose policy was never shown reading, the rows of both remain.
    without = {name: value for name, value in measured.items() if name != "reading"}
    print_table([{"pst": measured}, {"pst": without}])
    both = capsys.readouterr().out
    assert "reads facts" not in both and "exact match  general" in both


def test_measured_where_it_is_shown():
    assert not R.shows_reading(Config())
    assert R.shows_reading(load_config(TINY, ["data.general_kinds.reading=1"]))


def test_measured_requests_are_fresh():
    """Of the splits' own subjects and combinations, and not VRL's or the held-out tasks."""
    config = Config(data=DATA)
    tasks = R.reading_tasks(config)
    assert [task["split"] for task in tasks] == [s for s in R.MEASURED for _ in range(R.REQUESTS)]
    for split in ("train", "heldout"):
        seed = seeded_rng(config.seed, split).getrandbits(31)
        own = {task["request"] for task in make_tasks(128, split, config.data, seed)}
        assert not own & {task["request"] for task in tasks}
