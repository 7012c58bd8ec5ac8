"""The scripted expert's work: prompts, thoughts in the request's language, looks and repairs, the
shape of films, what is said in them, and the five examples."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import make_data  # noqa: E402
from env import VisGenEnv, parse_utpc  # noqa: E402
from lib.direction import direct, load_direction, script_of  # noqa: E402
from lib.experiment import RolloutConfig, load_config  # noqa: E402
from lib.expert import make_plan, said_and_shown, spoken_seconds, vision_agent  # noqa: E402
from lib.reading import NO_CONSTRAINTS, read_request  # noqa: E402
from lib.runs import read_jsonl, seeded_rng  # noqa: E402
from lib.scenarios import HAN, load_scenarios, read_yaml  # noqa: E402
from lib.tasks import BENCH, make_tasks  # noqa: E402
from lib.toolbox import load_defaults, refuse  # noqa: E402
from lib.words import content_words, positive_words  # noqa: E402
from rewards import ltr_rewards  # noqa: E402

SHARP = "|".join(  # words of a retake's prompt
    words for language in ("en", "zh") for words in load_direction()[language]["prompt"]["again"]
)
PAPER = load_config(ROOT / "configs" / "visgen.yaml", ["data.languages=[en, zh]"])


def play(tasks, config=PAPER, thoughts="full"):
    env = VisGenEnv(config.rollout)
    return [
        vision_agent(t, env, seeded_rng("e", t["id"]).getrandbits(31), thoughts=thoughts)
        for t in tasks
    ]


@pytest.fixture(scope="module")
def made():
    """1,000 trajectories at the paper's scale, in both languages."""
    return play(make_tasks(1000, "visgen", PAPER.data, 21))


def thoughts_of(trajectory):
    written = [m["content"] for m in trajectory["messages"] if m["role"] == "assistant"]
    return [thought for text in written for thought in parse_utpc(text)["think"]]


def sentences_of(text):
    """Sentences, with ids and numbers as they stand."""
    parts = re.split(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])", text)
    return {part.strip() for part in parts if part.strip()}


def flawed_seen(trajectory):
    """Ids of the agent's own media in which an analysis showed a flaw."""
    own = {a["id"] for a in trajectory["artifacts"] if a["tool"] != "user" and a["flawed"]}
    seen = set()
    for call in trajectory["calls"]:
        if call["status"] == "ok" and call["name"].endswith("_analysis"):
            seen.update(call["arguments"]["media"])
    return own & seen


def behind(trajectory):
    """Ids of what is handed over and of all that it was made from."""
    by_id = {a["id"]: a for a in trajectory["artifacts"]}
    found, left = set(), list(trajectory["answer"]["deliverables"])
    while left:
        item = left.pop()
        if item not in found:
            found.add(item)
            left += [parent["id"] for parent in by_id[item]["parents"]]
    return found


# --- what is thought


def test_few_sentences_are_said_again_and_again(made):
    """Of 1,000 trajectories' thoughts at most 2 % of the sentences stand in more than 50."""
    count = Counter()
    for t in made:
        count.update(set().union(*map(sentences_of, thoughts_of(t))))
    often = [text for text, n in count.items() if n > 50]
    assert len(count) > 10_000
    assert len(often) <= 0.02 * len(count), (len(often), len(count), often[:20])


def test_thoughts_are_in_the_request_s_language(made):
    chinese = [t for t in made if t["task"]["language"] == "zh"]
    assert len(chinese) > 200
    for t in made:
        zh = t["task"]["language"] == "zh"
        texts = [*thoughts_of(t), t["answer"]["summary"]]
        assert all(bool(HAN.search(text)) == zh for text in texts), texts
        for call in t["calls"]:
            prompt = call["arguments"].get("prompt")
            assert not prompt or bool(HAN.search(prompt)) == zh, prompt


def test_the_first_thought_has_numbers_of_the_tools_and_the_last_what_was_checked(made):
    for t in made:
        c, (first, *_, last) = t["task"]["constraints"], thoughts_of(t)
        assert "$" in first or "costs nothing" in first or "不花钱" in first, first
        assert str(len(t["calls"])) in last
        if c["duration_s"] and not c["deliver"]:
            assert str(c["duration_s"]) in last
        if c["shots"] and any("2video" in call["name"] for call in t["calls"]):
            assert re.search(rf"\b{c['shots']}\b|镜头{c['shots']}/{c['shots']}", last)


def test_a_failure_is_named_with_its_class_and_the_move(made):
    seen = Counter()
    for t in made:
        thoughts = thoughts_of(t)
        # Where it gives up, the last thought says what is not there.
        going_on = range(len(thoughts) - 1)
        for turn in {call["turn"] for call in t["calls"] if call["error"]}.intersection(going_on):
            names = {c["name"] for c in t["calls"] if c["error"] and c["turn"] == turn}
            assert any(name.removeprefix("tool_") in thoughts[turn] for name in names)
            seen.update(names)
    assert seen.total() > 200


# --- prompts


def test_each_picture_and_clip_is_told_subject_and_something_of_its_own(made):
    shared = Counter()
    for t in made:
        c = t["task"]["constraints"]
        if c["family"]:
            continue
        topic = content_words(c["subject"]) | content_words(c["style"] or "")
        prompts = Counter()
        for call in t["calls"]:
            if call["status"] != "ok" or not re.search("2image|image_edit|2video", call["name"]):
                continue
            prompt = call["arguments"]["prompt"]
            assert topic <= positive_words(prompt, topic), prompt
            prompts[call["name"], prompt] += 1
        shared[max(prompts.values(), default=1) > 1] += 1
    assert shared[True] < 0.02 * shared.total()


def test_no_fragment_negates_or_is_blocked():
    # People may be shown unless a call says that they may not.
    blocked = {k: v for k, v in load_defaults()["blocked_words"].items() if k != "person"}

    def texts(value):
        if isinstance(value, str):
            yield value
        for item in value.values() if isinstance(value, dict) else value:
            if item is not value and not isinstance(value, str):
                yield from texts(item)

    n = 0
    for language in ("en", "zh"):
        book = {k: v for k, v in load_direction()[language].items() if k not in ("lines",)}
        for text in texts(book):
            plain = re.sub(r"[{}]", "", text)
            assert positive_words(plain) == content_words(plain), text
            assert not any(pattern.search(plain) for pattern in blocked.values()), text
            n += 1
    assert n > 800


def test_every_task_type_has_its_voice_or_kind_of_picture():
    book = load_direction()
    for name, scenario in load_scenarios("en")["scenarios"].items():
        assert name in book["voices" if scenario["modality"] == "video" else "pictures"]
    for language in ("en", "zh"):
        assert set(book["voices"].values()) == set(book[language]["lines"])
        assert set(book["pictures"].values()) == set(book[language]["pictures"])
        for lines in book[language]["lines"].values():
            every = [*lines["open"], *lines["more"], *lines["close"]]
            assert len(lines["more"]) >= 20 and len(set(every)) == len(every)


# --- what is said in a film


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_sentence_twice_in_a_film_and_both_halves_are_spoken_over(language):
    words = {"en": ("Make a product video about a lamp.", "a lamp"), "zh": ("", "一盏台灯")}
    request, subject = words[language]
    c = {**NO_CONSTRAINTS, "videos": 1, "subject": subject, "wish": {}}
    for seed in range(20):
        for seconds in (4, 6, 8, 12, 15, 20, 32, 48, 64, 96):
            d = direct(request or subject, c, seed)
            segments, cues = said_and_shown(d, seconds, True)
            spoken = [text for _, said in script_of(d, seconds, len_in(language)) for text in said]
            assert len(set(spoken)) == len(spoken)
            texts = [cue["text"] for cue in cues]
            assert len(set(texts)) == len(texts) and texts[0].lower().find(subject) >= 0
            ends = [s["start"] + spoken_seconds(s["text"], language == "zh") for s in segments]
            assert all(end <= s["start"] for end, s in zip(ends, segments[1:]))
            assert ends[-1] <= seconds or len(segments) == 1
            covered = sum(cue["end"] - cue["start"] for cue in cues)
            assert covered >= 0.6 * seconds, (seconds, covered)


def len_in(language):
    return lambda text: spoken_seconds(text, language == "zh")


def test_captions_say_what_is_spoken(made):
    n = 0
    for t in made:
        audio = t["task"]["constraints"]["audio"]
        if {"narration", "subtitles"} <= set(audio):
            done = {c["name"]: c["arguments"] for c in t["calls"] if c["status"] == "ok"}
            said = " ".join(s["text"] for s in done["tool_tts_composite"]["segments"])
            for cue in done["tool_subtitle_add_text"]["subtitles"]:
                assert cue["text"] in said
            n += 1
    assert n > 10


# --- looks and repairs


def test_one_trajectory_in_five_has_a_repair(made):
    repaired = [t for t in made if flawed_seen(t) - behind(t)]
    assert len(repaired) >= 0.2 * len(made)
    for t in repaired[:50]:
        assert any(re.search(SHARP, str(c["arguments"])) for c in t["calls"])
    left = sum(bool(flawed_seen(t) & behind(t)) for t in made)
    assert left < 0.03 * len(made)


def test_a_look_takes_four_media_at_most_and_is_planned(made):
    for t in made[:300]:
        planned = {step["tool"] for step in t["plan"]}
        for call in t["calls"]:
            if call["name"] in ("tool_image_analysis", "tool_video_analysis"):
                assert len(call["arguments"]["media"]) <= 4 and call["name"] in planned


def test_without_verification_or_with_short_thoughts_nobody_looks():
    tasks = make_tasks(60, "visgen", replace(PAPER.data, families=0.0), 22)
    env = VisGenEnv(PAPER.rollout)
    for task in tasks:
        for t in (
            vision_agent(task, env, 1, ("plan check", "recovery")),
            vision_agent(task, env, 1, thoughts="short"),
        ):
            assert not any(call["name"].endswith("_analysis") for call in t["calls"])


def test_a_retake_that_fails_leaves_what_there_is(monkeypatch):
    """Where nothing can be made again, the flawed picture is handed over, and nothing hangs."""
    task = make_tasks(40, "visgen", replace(PAPER.data, families=0.0), 23)
    task = next(t for t in task if t["workflow"] == "consistent_images")

    def fail(self, tool, outcome):
        """The retakes fail, and nothing else does."""
        if re.search(SHARP, str(outcome["arguments"])):
            refuse(None, "no answer", "timeout", True)

    monkeypatch.setattr(VisGenEnv, "fail_by_accident", fail)
    flawed = 0
    for seed in range(30):
        t = vision_agent(task, VisGenEnv(PAPER.rollout), seed)
        if t["ended"] == "answer":
            flawed += bool(flawed_seen(t) & behind(t))
            assert len(t["answer"]["deliverables"]) == task["constraints"]["images"]
    assert flawed > 3


# --- the shape and length of films


def test_films_are_16_9_unless_something_says_otherwise(made):
    shapes = Counter()
    for t in made:
        c = t["task"]["constraints"]
        if not c["videos"] or c["deliver"] or c["aspect_ratio"] or t["task"]["inputs"]:
            continue
        for i in t["answer"]["deliverables"]:
            film = next(a for a in t["artifacts"] if a["id"] == i)
            wide = film["width"] > film["height"]
            phone = t["task"]["scenario"] == "short_dramas" or "phone" in t["task"]["request"]
            assert wide or phone, t["task"]["request"]
            assert not film["letterboxed"] if "letterboxed" in film else True
            shapes[wide] += 1
    assert shapes[True] > 100


@pytest.mark.parametrize("thoughts", ["full", "short"])
def test_a_frame_by_the_other_tool_keeps_the_shape_of_its_film(monkeypatch, thoughts):
    """Where moderation blocks one frame, Qwen's edit draws it in the size of the others."""

    def planned(*args, **more):
        steps = make_plan(*args, **more)
        frames = [s for s in steps if "tool_image_edit_qwen" in s["tools"] and s["key"] == "frame"]
        for step in frames[1:2]:
            step["tool"] = "tool_image_edit_qwen"
        return steps

    monkeypatch.setattr("lib.expert.make_plan", planned)
    tasks = [t for t in read_jsonl(BENCH) if t["constraints"]["videos"] == 1]
    tasks = [t for t in tasks if t["constraints"]["consistency"] and t["constraints"]["shots"]]
    wide = [t for t in tasks if t["constraints"]["aspect_ratio"] == "16:9"][:12]
    env = VisGenEnv(RolloutConfig(failure_scale=0.0, tool_pool="all"))
    n_other = 0
    for task in wide:
        t = vision_agent(task, env, 1, thoughts=thoughts)
        n_other += any(call["name"] == "tool_image_edit_qwen" for call in t["calls"])
        assert not any(a.get("letterboxed") for a in t["artifacts"])
        assert ltr_rewards([t], PAPER.reward)[0]["checks"]["aspect"] == 1
    assert n_other == len(wide) == 12


def test_a_film_is_never_sped_up_unless_that_is_asked(made):
    for t in made:
        if t["task"]["constraints"]["family"] != "film_pace":
            assert not any(call["name"] == "tool_video_speed_adjust" for call in t["calls"])


def test_experts_stay_at_the_top(made):
    rewards = ltr_rewards(made[:300], PAPER.reward, [t["task"]["pool"] for t in made[:300]])
    assert sum(r["total"] for r in rewards) / 300 >= 0.97


def test_the_paper_s_length(made):
    actions = [sum(len(turn["order"]) for turn in t["turns"]) for t in made]
    english = [n for n, t in zip(actions, made) if t["task"]["language"] == "en"]
    assert sum(english) / len(english) >= 15
    assert sum(n > 20 for n in english) >= 0.6 * len(english)


# --- short thoughts


def test_short_thoughts_fit_a_tiny_policy():
    tiny = load_config(ROOT / "configs" / "tiny.yaml")
    assert tiny.data.thoughts == "short"
    for t in play(make_tasks(200, "visgen", tiny.data, 3), tiny, "short"):
        for text in thoughts_of(t):
            assert len(text) < 260, text


# --- examples


def test_the_five_examples_are_what_the_command_writes():
    written = read_jsonl(ROOT / "data" / "example.jsonl")
    config = load_config(ROOT / "configs" / "visgen.yaml")
    assert json.loads(json.dumps(make_data.make_examples(config))) == written
    assert [t["task"]["id"] for t in written] == [e["id"] for e in read_yaml("examples.yaml")]
    by_id = {t["task"]["id"].removeprefix("example-"): t for t in written}
    assert list(by_id) == ["film", "posters", "book-zh", "blocked", "repair"]
    assert all(t["reward"]["total"] > 0.9 and t["lesson"] for t in written)
    for t in written:
        assert t["task"]["constraints"] == read_request(t["task"]["request"])
    codes = [c["error"]["code"] for c in by_id["blocked"]["calls"] if c["error"]]
    assert codes == ["content_blocked"] and len(by_id["blocked"]["plans"]) == 2
    assert flawed_seen(by_id["repair"]) - behind(by_id["repair"])
    assert by_id["book-zh"]["task"]["language"] == "zh"
    assert "music" in by_id["film"]["task"]["constraints"]["audio"]
    assert len(by_id["posters"]["answer"]["deliverables"]) == 4
