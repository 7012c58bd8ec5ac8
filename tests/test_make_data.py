"""Tasks, VisionAgent, the general mix, the tokenizer and the config."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from env import VisGenEnv  # noqa: E402
from lib.experiment import (  # noqa: E402
    Config,
    DataConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    Stage,
    build,
    load_config,
    print_keys,
)
from lib.expert import load_voice, vision_agent  # noqa: E402
from lib.families import load_families  # noqa: E402
from lib.general import make_general  # noqa: E402
from lib.hub import hub_general, to_messages  # noqa: E402
from lib.reading import (  # noqa: E402
    NO_CONSTRAINTS,
    find_noun,
    read_request,
    task_agent,
    wording_patterns,
)
from lib.runs import open_run, read_jsonl, seeded_rng, write_jsonl  # noqa: E402
from lib.scenarios import load_scenarios, material, split_list  # noqa: E402
from lib.tasks import (  # noqa: E402
    choose_subject,
    combination,
    fitting_styles,
    make_task,
    make_tasks,
)
from lib.tokenizer import TAG_TOKENS, pieces, train_tokenizer  # noqa: E402
from lib.toolbox import ToolError, load_tools  # noqa: E402
from lib.workflows import (  # noqa: E402
    expand_workflow,
    fitting_workflows,
    load_workflows,
    step_price,
)
from make_data import ensure_data, make_trajectories, make_visgen  # noqa: E402
from rewards import (  # noqa: E402
    atomicity_facet,
    ltr_reward,
    requirement_facet,
    stated_count,
    units_of_step,
)

SPLITS = ("train", "heldout")
# Constraints that these requests do not have: tests/test_families.py, and VisGenBench's variety.
ELSEWHERE = {"family", "deliver", "wish", "variety"}


TABLE_8 = """
Product marketing videos; Public service advertisements; Corporate promotion videos; Brand story
videos; Event promotion videos; Instructional videos; Popular science documentaries; Music videos
(MV); Concert recordings; Variety shows; Story videos; Video podcasts; Picture books; Dynamic
comics; Animated short films; Animated movies; Game adaptation films; Game videos; Movies; Short
dramas; Story explanations; Product images; Detail pages; Key Visual (KV); Landing pages / H5
graphics; Complete brand visual identity; Banner graphics; Official account cover images;
Xiaohongshu covers; Marketing posters; Avatar design; Static emoji generation; ICON design; LOGO
design; Mini-game UI design; Character design; Character action design; Scene design; Storyboards;
Picture Book; Stylization; Realistic Photography
"""


def squeeze(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def tasks():
    """630 tasks a split: 15 of each task type, none of a family (tests/test_families.py)."""
    return {split: make_tasks(630, split, DataConfig(families=0), seed=7) for split in SPLITS}


def run_agent(task, scale=0.0, seed=5, thoughts="full"):
    env = VisGenEnv(RolloutConfig(failure_scale=scale))
    trajectory = vision_agent(task, env, seed, thoughts=thoughts)
    return trajectory, ltr_reward(trajectory, RewardConfig(), env.pool)


# --- tasks


def test_the_42_task_types_of_table_8():
    kinds = load_scenarios("en")["scenarios"].values()
    assert [s["title"] for s in kinds] == squeeze(TABLE_8).split("; ")
    assert [s["modality"] for s in kinds] == ["video"] * 21 + ["image"] * 21


@pytest.mark.parametrize("split", SPLITS)
def test_every_task_type_gives_tasks(tasks, split):
    assert Counter(t["scenario"] for t in tasks[split]) == dict.fromkeys(
        load_scenarios("en")["scenarios"], 15
    )
    assert len({t["request"] for t in tasks[split]}) == len({t["id"] for t in tasks[split]}) == 630
    for t in tasks[split]:
        assert (
            t["split"] == split
            and t["modality"] == load_scenarios("en")["scenarios"][t["scenario"]]["modality"]
        )
        assert (
            (t["constraints"]["images"] > 0)
            == (t["modality"] == "image")
            != (t["constraints"]["videos"] > 0)
        )
        assert (
            set(t["constraints"]) == set(NO_CONSTRAINTS)
            and set(t["pool"]) <= set(load_tools())
            and t["workflow"] in load_workflows()
        )
        assert {
            "id",
            "split",
            "modality",
            "scenario",
            "dimension",
            "request",
            "language",
            "inputs",
            "constraints",
            "difficulty",
            "workflow",
        } <= set(t)
        assert t["request"].isprintable() and "{" not in t["request"] and t["language"] == "en"


def test_tiny_limits_hold_in_both_splits():
    data = load_config(ROOT / "configs" / "tiny.yaml").data
    for split in SPLITS:
        made = make_tasks(84, split, data, seed=1)
        assert {t["scenario"] for t in made} == set(data.scenarios)
        assert {sound for t in made for sound in t["constraints"]["audio"]} == set(data.sounds)
        for t in made:
            assert (t["constraints"]["shots"] or 0) <= data.max_shots and t["constraints"][
                "images"
            ] <= data.max_images
            assert len(expand_workflow(t["workflow"], t["constraints"])) <= data.max_steps


def test_at_least_300_subjects(tasks):
    subjects = [x for group in load_scenarios("en")["subjects"].values() for x in group]
    assert len(subjects) == len(set(subjects)) >= 300
    assert len({t["constraints"]["subject"] for t in tasks["train"]}) >= 200


def test_splits_share_no_subject_style_or_combination(tasks):
    for what in (lambda c: c["subject"], lambda c: c["style"], combination):
        train, heldout = (
            {what(t["constraints"]) for t in tasks[split]} - {None} for split in SPLITS
        )
        assert train and heldout and not train & heldout


def frames_of(request, scenario):
    """The written wordings that a request may come from, found in its text alone."""
    book = load_scenarios("en")
    nouns = "|".join(map(re.escape, book["scenarios"][scenario]["noun"]))
    slots = {
        "{what}": rf"\w+ (?:{nouns})",
        "{subject}": "an? .+?",
        "{style}": "(?: in .+? style)?",
        "{extras}": ".*?",
    }
    found = []
    for wording in book["scenarios"][scenario]["wordings"] + book["frames"]:
        if not all(
            piece in request for piece in re.split(r" ?\{\w+\}", wording)
        ):  # a pattern for it is dear
            continue
        pattern = "".join(
            slots.get(x) or re.escape(x) for x in re.split(r"(\{\w+\})", wording)
        ).replace(r"\ .*?", "(?: .*?)?")
        if re.fullmatch(pattern, request):
            found.append(wording)
    return found


def test_splits_share_no_wording_of_the_request(tasks):
    used = {}
    for split in SPLITS:
        frames = [(t["scenario"], frames_of(t["request"], t["scenario"])) for t in tasks[split]]
        assert all(f for _, f in frames), "the test does not read some request"
        used[split] = {(s, f[0]) for s, f in frames if len(f) == 1}
        assert len({s for s, _ in used[split]}) == 42
    assert not used["train"] & used["heldout"]
    assert min(Counter(s for s, _ in used["train"]).values()) >= 4  # several wordings a task type


def test_splits_share_no_clause_sentence(tasks):
    clauses = [c for group in load_scenarios("en")["clauses"].values() for c in group]
    assert len(clauses) == len(set(clauses))
    slots = {
        "d": r"\d+",
        "k": r"\w+",
        "a": r"\d+:\d+",
        "r": r"\d+p",
        "id": r"in_\d",
        "thing": r"\w+",
    }
    patterns = {
        c: re.compile(
            r"(?:^|(?<=[\s.!?]))"
            + re.sub(r"\\\{(\w+)\\\}", lambda m: slots[m[1]], re.escape(c))
            + r"(?=\s|$)"
        )
        for c in clauses
    }
    longest = {
        c: max(re.split(r"\{\w+\}", c), key=len) for c in clauses
    }  # a request without it needs no pattern
    used = {
        split: {
            c
            for c, p in patterns.items()
            if any(longest[c] in t["request"] and p.search(t["request"]) for t in tasks[split])
        }
        for split in SPLITS
    }
    assert len(used["train"]) >= 60 and len(used["heldout"]) >= 20
    assert not used["train"] & used["heldout"]


def test_expert_trajectories_vrl_and_held_out_tasks_share_no_wording():
    items = list(range(34))
    visgen, train, heldout = (
        split_list(items, 2, split) for split in ("visgen", "train", "heldout")
    )
    assert (visgen, train, heldout) == (items[:24], items[24:32], items[32:])
    book = load_scenarios("en")
    shown = {
        c
        for group in book["clauses"].values()
        for c in split_list(group, 2, "visgen")
        if "{" not in c
    }
    kept = {c for group in book["clauses"].values() for c in group[:-2] if "{" not in c} - shown
    text = {
        split: "\n".join(
            t["request"] for t in make_tasks(840, split, DataConfig(families=0), seed=3)
        )
        for split in ("visgen", "train")
    }
    assert len([c for c in kept if c in text["train"]]) > 15 and not [
        c for c in kept if c in text["visgen"]
    ]


def test_there_are_many_wordings_of_each_constraint():
    kinds = load_scenarios("en")["clauses"]
    assert all(
        len(kinds[k]) >= 180
        for k in ("music", "narration", "sfx", "subtitles", "object", "scene", "style", "beat")
    )
    assert all(len(texts) >= 80 for texts in kinds.values())
    for (
        kind,
        texts,
    ) in (
        kinds.items()
    ):  # the reader finds wordings by their letters: none may stand inside one of another kind
        others = "\n".join(t for k, more in kinds.items() if k != kind for t in more)
        assert not [t for t in texts if t in others]


def test_training_subjects_are_put_together_where_the_config_says_so():
    group = load_scenarios("en")["subjects"]["product"]
    held = set(group[-(len(group) // 5) :])
    drawn = [choose_subject(seeded_rng("s", i), group, "train", True) for i in range(600)]
    assert (
        len(set(drawn)) > 300
        and not set(drawn) & held
        and 100 < len([x for x in drawn if x in group]) < 300
    )
    assert all(
        re.fullmatch(r"an? [A-Za-z' -]+", x)
        and (x[:3] == "an ") == (x.split()[1][0].lower() in "aeiou")
        for x in drawn
        if x not in group
    )
    written = split_list(group, len(held), "train")
    drawn = {choose_subject(seeded_rng("t", i), group, "train", False) for i in range(600)}
    assert drawn == set(written)
    drawn = {choose_subject(seeded_rng("h", i), group, "heldout", False) for i in range(600)}
    assert drawn == held


def test_made_up_words_are_the_tiny_policys_alone():
    """Whoever extends tiny.yaml with a pretrained model says so."""
    for path in (ROOT / "configs").rglob("*.yaml"):
        if path.name == "fsdp.yaml":  # accelerate's
            continue
        config = load_config(path)
        pretrained = config.model.path not in ("", "data/base")
        if pretrained or path.name == "visgen.yaml":
            assert not config.data.invented, path
        else:
            assert config.data.invented, path
    book = load_scenarios("en")
    written = {subject for group in book["subjects"].values() for subject in group}
    styles = {style for group in book["styles"].values() for style in group} | {None}
    slots = [re.escape(text).replace(r"\{word\}", r"\S+") for text in book["asides"] if "{" in text]
    for split in ("visgen", "train", "heldout", "reading"):
        for invented in (False, True) if split in ("visgen", "reading") else (False,):
            data = DataConfig(families=0, invented=invented)
            drawn = make_tasks(210, split, data, seed=2)
            odd = [t for t in drawn if t["constraints"]["subject"] not in written]
            odd_styles = [t for t in drawn if t["constraints"]["style"] not in styles]
            filled = [t for t in drawn if any(re.search(text, t["request"]) for text in slots)]
            for found in (odd, odd_styles, filled):
                assert bool(found) == invented, (split, found[:1])


def test_written_material_is_split_without_overlap():
    book = load_scenarios("en")
    for s in book["scenarios"].values():
        assert len(s["wordings"]) == len(set(s["wordings"])) >= 7
        for w in s["wordings"]:
            assert sorted(re.findall(r"\{(\w+)\}", w)) == ["extras", "style", "subject", "what"], w
    nouns = [n for s in book["scenarios"].values() for n in s["noun"]]
    assert len(nouns) == len(set(nouns)) == 84


@pytest.mark.parametrize("split", SPLITS)
def test_read_request_recovers_the_constraints_from_the_text(tasks, split):
    for t in tasks[split]:
        said, meant = read_request(t["request"]), copy.deepcopy(t["constraints"])
        assert set(said.pop("audio")) == set(meant.pop("audio")), t["request"]
        assert said == meant, t["request"]


def test_every_constraint_is_said_and_every_kind_occurs(tasks):
    for key in NO_CONSTRAINTS:
        if key not in {"subject", *ELSEWHERE}:
            assert len({json.dumps(t["constraints"][key]) for t in tasks["train"]}) > 1, key
    for t in tasks["train"]:
        c = t["constraints"]
        for value in (
            c["subject"],
            c["style"],
            c["aspect_ratio"],
            c["resolution"],
            c["duration_s"] and str(c["duration_s"]),
        ):
            assert not value or value in t["request"]
        assert (t["inputs"] != []) == c["input"]
    assert {t["dimension"] for t in tasks["train"]} == {"amount", "duration", "storyboard"}
    assert {t["difficulty"] for t in tasks["train"]} == {"easy", "medium", "hard"}


def test_a_combination_that_no_draw_gives_ends(monkeypatch):
    monkeypatch.setattr("lib.tasks.combination_split", lambda c: "train")
    with pytest.raises(RuntimeError, match="1000 draws"):
        make_task(
            seeded_rng(0),
            "heldout",
            DataConfig(),
            "logo_design" if "logo_design" in load_scenarios("en")["scenarios"] else None,
        )


# --- Chinese requests


@pytest.fixture(scope="module")
def chinese():
    """500 Chinese tasks a split, of the 27 task types in turn."""
    return {
        split: make_tasks(500, split, DataConfig(languages=["zh"], families=0), seed=7)
        for split in ("visgen", "train", "heldout")
    }


def test_chinese_scenarios_are_the_english_ones_in_other_words():
    zh, en = load_scenarios("zh"), load_scenarios("en")
    assert (
        set(zh) == set(en)
        and set(zh["clauses"]) == set(en["clauses"])
        and len(zh["scenarios"]) >= 24
    )
    for name, s in zh["scenarios"].items():
        assert {
            k: v for k, v in s.items() if k not in ("noun", "consistency_word", "wordings")
        } == {
            k: v
            for k, v in en["scenarios"][name].items()
            if k not in ("noun", "consistency_word", "wordings")
        }
        assert len(set(s["wordings"])) == len(s["wordings"]) >= 12 and set(s["subjects"]) <= set(
            zh["subjects"]
        )
        for w in s["wordings"]:
            assert sorted(re.findall(r"\{(\w+)\}", w)) == ["extras", "style", "subject", "what"], w
    assert all(len(texts) >= 24 for texts in zh["clauses"].values())
    for kind, texts in zh["clauses"].items():
        others = "\n".join(t for k, more in zh["clauses"].items() if k != kind for t in more)
        assert not [t for t in texts if t in others]
    nouns = [n for s in zh["scenarios"].values() for n in s["noun"]]
    assert len(set(nouns)) == len(nouns)


def test_every_chinese_subject_reads_back_in_every_wording_and_so_does_every_style():
    book, patterns = load_scenarios("zh"), wording_patterns("zh")
    for name, scenario in book["scenarios"].items():
        things = [thing for group in scenario["subjects"] for thing in book["subjects"][group]]
        styles = [None, *(style for group in book["styles"].values() for style in group)]
        for i, wording in enumerate(scenario["wordings"]):
            # The subjects and the styles in turn, of which there are less than 150.
            for j in range(max(len(things), len(styles))):
                what = "三" + scenario["noun"][j % 2]
                thing, style = things[j % len(things)], styles[(i + j) % len(styles)]
                said = f"，{style}风格" if style else ""
                slots = {"what": what, "subject": thing, "style": said}
                request = wording.format(**slots, extras="时长8秒。")
                noun, found = find_noun(request, "zh")
                assert (found, noun[0]) == (name, what), request
                rest = request.replace(what, "\0")
                match = next(m for p in patterns[name] if (m := p.search(rest)))
                assert (match["subject"], match["style"]) == (thing, style), request
    for frame in book["frames"]:
        for thing in [thing for group in book["subjects"].values() for thing in group]:
            slots = {"what": "两个头像", "subject": thing, "style": "，水彩风格"}
            request = frame.format(**slots, extras="")
            read = read_request(request)
            assert (read["subject"], read["style"], read["images"]) == (thing, "水彩", 2), request


def test_chinese_material_is_there_once_and_fits():
    book = load_scenarios("zh")
    things = [thing for group in book["subjects"].values() for thing in group]
    styles = [style for group in book["styles"].values() for style in group]
    assert len(things) == len(set(things)) >= 600 and len(styles) == len(set(styles)) >= 100
    assert all(re.fullmatch("一[\u4e00-\u9fff]+的[\u4e00-\u9fff]+", thing) for thing in things)
    assert all(thing.count("的") == 1 for thing in things)  # a description and a thing
    for group in book["subjects"].values():
        for held in group[len(group) - len(group) // 5 :]:
            for part in held[2:].split("的"):
                others = [thing for thing in things if thing != held and part in thing]
                assert len(part) == 1 or not others, (held, others)
    for split in ("visgen", "train", "heldout"):
        words = material(split, "zh")
        for scenario in book["scenarios"].values():
            groups = [book["subjects"][group] for group in scenario["subjects"]]
            for thing in (thing for group in groups for thing in group):
                fitting = fitting_styles(words, scenario, thing)
                assert fitting, thing
                if "红" in thing:
                    assert not [style for style in fitting if "黑白" in style]
                if scenario["title"] == "Product images":
                    assert "航拍" not in fitting


@pytest.mark.parametrize("split", ("visgen", "train", "heldout"))
def test_chinese_requests_read_back_right(chinese, split):
    for t in chinese[split]:
        said, meant = read_request(t["request"]), copy.deepcopy(t["constraints"])
        assert set(said.pop("audio")) == set(meant.pop("audio")), t["request"]
        assert (
            said == meant
            and t["language"] == "zh"
            and " " not in t["request"]
            and "{" not in t["request"]
        ), t["request"]
    assert {t["scenario"] for t in chinese[split]} == set(load_scenarios("zh")["scenarios"])
    for key in set(NO_CONSTRAINTS) - ELSEWHERE:
        assert len({json.dumps(t["constraints"][key]) for t in chinese[split]}) > 1, key


def test_chinese_splits_share_no_words(chinese):
    book, splits = load_scenarios("zh"), list(chinese)
    used = {split: "\n".join(t["request"] for t in chinese[split]) for split in splits}
    for split in splits:
        for other in set(splits) - {split}:
            clauses = [
                c
                for texts in book["clauses"].values()
                for c in split_list(texts, 2, split)
                if "{" not in c
            ]
            assert len([c for c in clauses if c in used[split]]) > 15 and not [
                c for c in clauses if c in used[other]
            ]
            both = [
                {t["constraints"][k] for t in chinese[s]} - {None}
                for k in ("subject", "style")
                for s in (split, other)
            ]
            if "heldout" in (split, other):
                assert not both[0] & both[1] and not both[2] & both[3]
    held = [w for s in book["scenarios"].values() for w in s["wordings"][-3:]]
    pieces = {max(re.split(r"\{\w+\}", w), key=len) for w in held}
    pieces = {p for p in pieces if len(p) > 4}
    assert len(pieces) > 30 and len([p for p in pieces if p in used["heldout"]]) > 30
    assert not [p for p in pieces if p in used["train"] or p in used["visgen"]]
    parts = {
        x
        for group in book["subjects"].values()
        for s in group[-(len(group) // 5) :]
        for x in s[2:].split("的")
    }
    assert not [
        x
        for x in parts
        if len(x) > 1
        and any(x in t["constraints"]["subject"] for t in chinese["train"] + chinese["visgen"])
    ]


def test_agent_solves_each_chinese_scenario(chinese):
    for task in [*chinese["train"][:15], *chinese["heldout"][:60]]:
        trajectory, reward = run_agent(task)
        assert reward["total"] > 0.9 and trajectory["ended"] == "answer", (task["request"], reward)
        prompts = [str(c["arguments"]) for c in trajectory["calls"]]
        assert any(task["constraints"]["subject"] in p for p in prompts)


def test_the_reward_reads_chinese_subjects(chinese):
    for task in chinese["heldout"][:15]:
        trajectory, reward = run_agent(task)
        other = {
            **trajectory,
            "task": {**task, "constraints": {**task["constraints"], "subject": "龘靐齉"}},
        }
        assert (
            reward["checks"]["on_topic"] > ltr_reward(other, RewardConfig())["checks"]["on_topic"]
        )


def test_chinese_goals_are_worth_what_the_english_ones_are():
    """Count by count and step by step: a plan is judged alike in both languages."""
    flows = load_workflows().values()
    for step in (step for flow in flows for step in flow["steps"]):
        slots = [sorted(re.findall(r"{\w+}", step[goal])) for goal in ("goal", "goal_zh")]
        assert slots[0] == slots[1] and not re.search("[a-z]", re.sub("{.*?}", "", step["goal_zh"]))
    tasks = make_tasks(200, "train", DataConfig(languages=["zh"], families=0.5), seed=5)
    for variety in (False, True):
        for task in tasks:
            c = {**task["constraints"], "variety": variety}
            zh, en = ({**c, "subject": subject} for subject in (c["subject"], "a red fox"))
            for name in fitting_workflows(c):
                plans = expand_workflow(name, zh), expand_workflow(name, en)
                for ours, theirs in zip(*plans, strict=True):
                    units = [units_of_step(step["tool"], step["goal"]) for step in (ours, theirs)]
                    assert units[0] == units[1], ours
                    for kind in ("image", "video", "text", "audio"):
                        counts = [stated_count(s["goal"], kind) for s in (ours, theirs)]
                        assert counts[0] == counts[1], (ours, theirs)
                    assert not re.search("[a-z]{3}|{", ours["goal"].replace("in_1", "")), ours
                    assert (c["subject"] in ours["goal"]) == ("a red fox" in theirs["goal"]), ours
                    prices = step_price(ours, zh), step_price(theirs, en)
                    assert prices[0] == prices[1], ours
                grades = [
                    (requirement_facet(plan, which), atomicity_facet(plan))
                    for plan, which in zip(plans, (zh, en))
                ]
                assert grades[0] == grades[1] and grades[0][1] == 1, plans[0]


def test_languages_mix_by_the_config():
    mixed = make_tasks(114, "train", DataConfig(languages=["en", "zh"]), seed=1)
    assert Counter(t["language"] for t in mixed) == {"en": 84, "zh": 30}
    assert all(
        bool(re.search("[\u4e00-\u9fff]", t["request"])) == (t["language"] == "zh") for t in mixed
    )
    assert build(Config(), {"data": {"languages": ["zh"]}}).data.languages == ["zh"]
    assert "'fr'" in error_of(make_tasks, 1, "train", DataConfig(languages=["fr"]), 0)


# --- workflows


def c_of(**more):
    return {**NO_CONSTRAINTS, "subject": "a fox", **more}


def steps_of(name, **more):
    return [
        (s["tool"].removeprefix("tool_"), s["after"]) for s in expand_workflow(name, c_of(**more))
    ]


def test_the_15_workflows(tasks):
    flows = {name: flow for name, flow in load_workflows().items() if name not in load_families()}
    assert len(flows) == 15
    assert {t["workflow"] for t in tasks["train"]} == set(flows)
    for flow in flows.values():
        keys = [s["key"] for s in flow["steps"]]
        assert len(keys) == len(set(keys)) and len(flow["practice"].split()) >= 15
        for s in flow["steps"]:
            assert set(s["tool"]) <= set(load_tools()) and s.get("repeat") in (
                None,
                "shots",
                "rest",
            )


def test_expand_single_image_and_sets():
    assert steps_of("single_image", images=1) == [("text2image_gemini", [])]
    assert expand_workflow("image_set", c_of(images=4)) == [
        {
            "id": 1,
            "tool": "tool_text2image_gemini",
            "goal": "4 images of a fox",
            "after": [],
            "key": "image",
            "index": 0,
            "tools": ["tool_text2image_gemini", "tool_text2image_seed"],
        }
    ]
    assert [
        s["goal"]
        for s in expand_workflow("consistent_images", c_of(images=5, consistency=["object"]))
    ] == ["1 image of a fox", *(f"image {i} from the reference" for i in (2, 3, 4, 5))]
    varied = [s["goal"] for s in expand_workflow("image_set", c_of(images=2, variety=True))]
    assert varied == ["image 1 of a fox", "image 2"]
    assert steps_of("consistent_web_page", images=3, web_page=True, consistency=["style"])[-1] == (
        "html_builder",
        [1, 2, 3],
    )
    assert steps_of("storyboard_frames", images=3, storyboard=True, consistency=["style"]) == [
        ("video_shot_gen", []),
        ("text2image_gemini", [1]),
        ("image_edit_gemini", [2]),
        ("image_edit_gemini", [2]),
    ]


def test_expand_trims_what_is_too_long_and_cuts_each_clip_where_that_would_empty_the_last():
    veo, join = "text2video_veo", "video_composite"
    assert steps_of("single_clip", videos=1, duration_s=8) == [(veo, [])]
    assert steps_of("single_clip", videos=1, duration_s=7) == [(veo, []), ("video_trim_edit", [1])]
    # 8 + 6 + 6 = 20 needs no trim; 6 + 6 + 4 = 16 -> 15 does
    assert steps_of("montage", videos=1, shots=3, duration_s=20)[3:] == [(join, [1, 2, 3])]
    assert steps_of("montage", videos=1, shots=3, duration_s=15)[3:] == [
        (join, [1, 2, 3]),
        ("video_trim_edit", [4]),
    ]
    # 3 x 4 = 12 -> 7: a trim of the film would lose the last clip whole
    assert steps_of("montage", videos=1, shots=3, duration_s=7)[3:] == [
        ("video_trim_edit", [1]),
        ("video_trim_edit", [2]),
        ("video_trim_edit", [3]),
        (join, [4, 5, 6]),
    ]
    assert len(steps_of("montage", videos=1, shots=3, duration_s=8)) == 7
    assert len(steps_of("montage", videos=1, shots=3, duration_s=9)) == 5  # 12 - 9 leaves 1 s
    assert steps_of("montage", videos=1, shots=2, duration_s=12) == [(veo, [])] * 2 + [
        (join, [1, 2])
    ]
    assert len(steps_of("montage", videos=1, duration_s=16)) == 3  # shots not said: 2 x 8 s
    goals = [s["goal"] for s in expand_workflow("single_clip", c_of(videos=2))]
    assert goals == ["2 clips of a fox"]


def test_expand_pairs_frames_and_clips_and_names_the_subject_once():
    steps = expand_workflow("consistent_film", c_of(videos=1, shots=3, consistency=["object"]))
    assert [(s["goal"], s["after"]) for s in steps] == [
        ("reference image of a fox", []),
        ("frame 1 from the reference", [1]),
        ("frame 2 from the reference", [1]),
        ("frame 3 from the reference", [1]),
        ("clip 1 from its frame", [2]),
        ("clip 2 from its frame", [3]),
        ("clip 3 from its frame", [4]),
        ("join all clips", [5, 6, 7]),
    ]
    square = expand_workflow("square_clip", c_of(videos=1, shots=2, aspect_ratio="1:1"))
    assert [(s["goal"], s["after"]) for s in square] == [
        ("frame 1 of a fox", []),
        ("frame 2", []),
        ("clip 1 from its frame", [1]),
        ("clip 2 from its frame", [2]),
        ("join all clips", [3, 4]),
    ]
    assert [
        s["goal"] for s in expand_workflow("square_clip", c_of(videos=1, aspect_ratio="1:1"))
    ] == ["frame of a fox", "clip from its frame"]


def test_a_missing_step_hands_on_what_it_follows():
    film = steps_of(
        "music_video",
        videos=1,
        shots=2,
        duration_s=15,
        audio=["music", "narration", "subtitles"],
        beat=True,
    )
    assert film == [
        ("music_suno", []),
        ("beat_detect", [1]),
        ("text2video_veo", []),
        ("text2video_veo", []),
        ("video_trim_edit", [2, 3]),
        ("video_trim_edit", [2, 4]),
        ("video_composite", [1, 5, 6]),
        ("tts_composite", [7]),
        ("subtitle_add_text", [8]),
    ]
    assert steps_of("music_video", videos=1, shots=2, audio=["music", "subtitles"]) == [
        ("music_suno", []),
        ("text2video_veo", []),
        ("text2video_veo", []),
        ("video_composite", [1, 2, 3]),
        ("subtitle_add_text", [4]),
    ]
    assert steps_of("single_clip", videos=1, audio=["subtitles"]) == [
        ("text2video_veo", []),
        ("subtitle_add_text", [1]),
    ]


def test_routing_serves_what_is_asked_and_presupposes_nothing():
    for name, more in {
        "single_image": {"images": 1},
        "image_set": {"images": 3},
        "print_images": {"images": 2, "resolution": "2K"},
        "transparent_assets": {"images": 1, "transparent": True},
        "consistent_images": {"images": 2, "consistency": ["scene"]},
        "restyle_input": {"images": 1, "input": True},
        "web_page": {"images": 2, "web_page": True},
        "single_clip": {"videos": 1, "audio": ["narration"]},
        "montage": {"videos": 1, "shots": 2},
        "music_video": {"videos": 1, "audio": ["music"]},
        "sound_design": {"videos": 1, "audio": ["sfx"]},
        "square_clip": {"videos": 1, "aspect_ratio": "1:1"},
        "consistent_film": {"videos": 1, "shots": 2, "consistency": ["style"]},
    }.items():
        assert fitting_workflows(c_of(**more))[0] == name


def test_pool_holds_the_workflow_s_tools_and_six_others():
    looks = {"tool_image_analysis", "tool_video_analysis"}
    for text in ("Make a logo of a fox.", "Make a music video about a fox. Use 2 shots."):
        workflow, pool = task_agent(text)
        own = {t for s in load_workflows()[workflow]["steps"] for t in s["tool"]}
        assert (
            own < set(pool)
            and looks & set(pool)
            and len(pool) - 6 - len(own) in (0, 1, 2)
            and len(set(pool) - own - looks) in (4, 5, 6)
            and pool == [t for t in load_tools() if t in pool]
        )


# --- VisionAgent


def test_agent_never_reads_the_hidden_constraints(tasks):
    class Closed(dict):
        """A task that refuses to show its constraints."""

        def __getitem__(self, k):
            assert k != "constraints"
            return super().__getitem__(k)

        def get(self, k, default=None):
            assert k != "constraints"
            return super().get(k, default)

    for task in tasks["train"][:84] + tasks["heldout"][:84]:
        seen, _ = run_agent(task, scale=1.0)
        for blind in (
            Closed(task),
            {**task, "constraints": {"images": "garbage"}},
            {
                **task,
                "scenario": "",
                "workflow": "",
                "modality": "",
                "dimension": "",
                "difficulty": "",
            },
        ):
            env = VisGenEnv(RolloutConfig(failure_scale=1.0))
            assert vision_agent(blind, env, 5)["messages"] == seen["messages"]


@pytest.mark.parametrize("split", SPLITS)
def test_agent_solves_every_task_type_without_failures(tasks, split):
    for task in tasks[split][:420]:
        trajectory, reward = run_agent(task)
        assert reward["total"] == 1, (task["request"], reward)
        assert trajectory["ended"] == "answer" and all(
            turn["faults"] == [] for turn in trajectory["turns"]
        )
        assert all(c["status"] == "ok" for c in trajectory["calls"])


@pytest.mark.parametrize("split", SPLITS)
def test_agent_solves_most_tasks_with_usual_failures(tasks, split):
    totals = [run_agent(task, scale=1.0)[1]["total"] for task in tasks[split][:420]]
    assert sum(totals) / len(totals) > 0.97


@pytest.mark.parametrize("split", SPLITS)
def test_agent_solves_every_type_at_every_difficulty_with_usual_failures(tasks, split):
    unsolved = {(task["scenario"], task["difficulty"]) for task in tasks[split]}
    assert len(unsolved) > 84
    for task in tasks[split]:
        for seed in (5, 6, 7) if (task["scenario"], task["difficulty"]) in unsolved else ():
            trajectory, reward = run_agent(task, scale=1.0, seed=seed)
            if trajectory["ended"] == "answer" and reward["result"] == 1 and reward["total"] > 0.9:
                unsolved.discard((task["scenario"], task["difficulty"]))
    assert not unsolved


def test_agent_recovers_from_many_failures(tasks):
    codes, repeated, mended = Counter(), 0, 0
    for task in tasks["train"][:210]:
        trajectory, reward = run_agent(task, scale=10.0, thoughts="short")
        assert trajectory["ended"] == "answer" and 0 <= reward["total"] <= 1
        calls = trajectory["calls"]
        codes.update(c["error"]["code"] for c in calls if c["status"] == "error")
        for i, c in enumerate(calls):
            if c["status"] == "error" and c["error"]["retryable"]:
                later = [
                    d
                    for d in calls[i + 1 :]
                    if (d["name"], d["arguments"]) == (c["name"], c["arguments"])
                ]
                repeated += bool(later)
                mended += any(d["status"] == "ok" for d in later)
    assert sum(codes.values()) > 40 and {"timeout", "service_error"} <= set(codes)
    assert repeated > 20 and mended > 20


def test_agent_moves_a_blocked_step_to_another_tool_and_says_so_in_the_plan(tasks, monkeypatch):
    task = next(t for t in tasks["train"] if t["workflow"] == "image_set")

    def refuse_gemini(self, tool, outcome):
        if tool["name"] == "tool_text2image_gemini":
            raise ToolError("content_blocked", "prompt", "blocked", False)

    monkeypatch.setattr(VisGenEnv, "fail_by_accident", refuse_gemini)
    # Failures are on, but none of the usual ones comes.
    trajectory, reward = run_agent(task, scale=1e-9, thoughts="short")
    assert [c["name"] for c in trajectory["calls"]] == [
        "tool_text2image_gemini",
        "tool_text2image_seed",
    ]
    assert (
        len(trajectory["plans"]) == 2
        and trajectory["plans"][1]["plan"][0]["tool"] == "tool_text2image_seed"
    )
    assert (
        reward["result"] == reward["plan"] == 1
        # The other tool repaired it; the failure was the service's and counts a quarter.
        and reward["tool"] == pytest.approx(0.8 / 1.25)
        and reward["traj"] == pytest.approx(1 / 1.25**2)
    )


def test_agent_gives_up_after_three_failures_of_a_step(tasks, monkeypatch):
    def down(self, tool, outcome):
        raise ToolError("timeout", None, "no answer", True)

    monkeypatch.setattr(VisGenEnv, "fail_by_accident", down)
    for task in tasks["train"][:42]:
        trajectory, reward = run_agent(task, scale=1e-9, thoughts="short")
        assert (
            trajectory["ended"] in ("answer", "malformed")
            and reward["result"] == reward["tool"] == 0
            and reward["total"] < 0.3
        )
        assert (
            max(
                Counter(
                    (c["name"], json.dumps(c["arguments"])) for c in trajectory["calls"]
                ).values()
            )
            >= 3
        )


def test_visgen_keeps_what_the_reward_passes(tasks, tmp_path):
    data = DataConfig(min_reward=0.97, thoughts="short")
    config = Config(data=data, rollout=RolloutConfig(failure_scale=10.0))
    write_jsonl(tmp_path / "queries.jsonl", tasks["train"][:126])
    make_trajectories(config, tmp_path)
    counts, kept = make_visgen(config, tmp_path), read_jsonl(tmp_path / "visgen.jsonl")
    assert counts["queries"] == 126 and counts["kept"] == len(kept) < counts["answered"] <= 126
    assert min(r["reward"]["total"] for r in kept) >= 0.97 and all(
        r["ended"] == "answer" for r in kept
    )
    assert {
        "task",
        "messages",
        "calls",
        "artifacts",
        "plan",
        "answer",
        "ended",
        "reward",
        "review",
    } <= set(kept[0])


# --- the general mix


@pytest.fixture(scope="module")
def general():
    config = Config(
        data=DataConfig(general_kinds={"arithmetic": 1, "copy": 1, "instruction": 2, "function": 2})
    )
    return {
        "train": make_general(config, 3000, "train"),
        "heldout": make_general(config, 192, "heldout"),
    }


def test_general_kinds_in_the_config_s_ratio(general):
    assert Counter(i["kind"] for i in general["train"]) == {
        "arithmetic": 500,
        "copy": 500,
        "instruction": 1000,
        "function": 1000,
    }
    assert Counter(i["kind"] for i in general["heldout"]) == {
        "arithmetic": 48,
        "copy": 48,
        "instruction": 48,
        "function": 48,
    }


def test_general_held_out_questions_never_occur_in_training(general):
    train, heldout = ([i["messages"][0]["content"] for i in general[s]] for s in SPLITS)
    assert not set(train) & set(heldout) and len(heldout) == len(set(heldout))
    # nor in another seed's training part
    assert not set(make_questions(seed=3)) & set(heldout)


def make_questions(seed):
    return [i["messages"][0]["content"] for i in make_general(Config(seed=seed), 1000, "train")]


def answer_of(item):
    """The right answer of an arithmetic or instruction item, worked out anew."""
    ask = item["messages"][0]["content"]
    if m := re.fullmatch(r"What is (\d+) ([+x-]) (\d+)\?", ask):
        a, b = int(m[1]), int(m[3])
        return f"{a} {m[2]} {b} = { {'+': a + b, '-': a - b, 'x': a * b}[m[2]] }"
    if m := re.fullmatch(r"How many parts of (\d+) make (\d+)\?", ask):
        assert int(m[2]) % int(m[1]) == 0
        return f"{int(m[2]) // int(m[1])} x {m[1]} = {m[2]}, so {int(m[2]) // int(m[1])}"
    if m := re.fullmatch(r"(.*)\. Which (\w+)\?", ask):
        return ": " + dict(pair.split(" is ") for pair in m[1].split("; "))[m[2]]
    if m := re.fullmatch(r"Please write (.+) for (\w+), as JSON\.", ask):
        return json.dumps({m[2]: m[1]})
    if m := re.fullmatch(r"What comes after (\S+)\? (.+)", ask):
        return ": " + m[2].split()[m[2].split().index(m[1]) + 1]
    if m := re.fullmatch(r"Repeat: ([^.:]+)(\. Leave out: [^.:]*)?", ask):
        return f": {m[1]}"
    task, text = re.fullmatch(r"(.+?[:?]) (.+)", ask).groups()
    some = text.split()
    return (
        ": "
        + {
            "Repeat twice:": f"{text}, {text}",
            "Write these words backwards:": " ".join(some[::-1]),
            "What is the last word?": some[-1],
            "What is the first word?": some[0],
            "How many words?": str(len(some)),
        }[task]
    )


@pytest.mark.parametrize("split", SPLITS)
def test_general_answers_are_right(general, split):
    for item in general[split]:
        ask, reply = (m["content"] for m in item["messages"])
        assert [m["role"] for m in item["messages"]] == ["user", "assistant"]
        if item["kind"] != "function":
            assert reply == answer_of(item) and item["tools"] is None, ask
            continue
        call = json.loads(re.fullmatch(r"<tool_call>(.*)</tool_call>", reply)[1])
        schema = next(
            t["function"] for t in item["tools"] if t["function"]["name"] == call["name"]
        )["parameters"]
        assert set(schema["required"]) == set(schema["properties"]) == set(call["arguments"])
        assert re.search(rf"\b{call['name']}\b", ask)
        for name, value in call["arguments"].items():
            assert (
                type(value) is {"integer": int, "string": str}[schema["properties"][name]["type"]]
            )
            assert re.search(rf"\b{name} {re.escape(str(value))}(?= and |[ .,]|$)", ask), (
                ask,
                name,
                value,
            )


def test_general_functions_are_none_of_the_36_tools(general):
    names = {t["function"]["name"] for s in SPLITS for i in general[s] for t in i["tools"] or []}
    assert len(names) > 1000 and not names & set(load_tools())


def test_general_unknown_kind_is_named():
    with pytest.raises(SystemExit, match="general_kinds.poetry.*nearest"):
        build(DataConfig(), {"general_kinds": {"poetry": 1}})


# --- determinism


DIGEST = """
import hashlib, json, pathlib, sys, tempfile
sys.path.insert(0, ".")
from lib.experiment import Config, DataConfig
from lib.general import make_general
from lib.tasks import make_tasks
from make_data import make_trajectories, make_visgen
c = Config(seed=int(sys.argv[1]), data=DataConfig(queries=84))
parts = [make_tasks(84, "train", c.data, 3 + c.seed), make_tasks(42, "heldout", c.data, c.seed)]
parts.append(make_general(c, 60, "train"))
with tempfile.TemporaryDirectory() as folder:
    make_trajectories(c, pathlib.Path(folder))
    make_visgen(c, pathlib.Path(folder))
    parts.append((pathlib.Path(folder) / "visgen.jsonl").read_text())
print(*[hashlib.sha256(json.dumps(p, sort_keys=False).encode()).hexdigest() for p in parts])
"""


def digests(seed, hash_seed):
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_same_seed_same_data_in_every_process():
    first, second, other = digests(0, 1), digests(0, 2), digests(1, 1)
    assert first == second and len(first) == 4
    assert all(a != b for a, b in zip(first, other))


# --- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tasks, general, tmp_path_factory):
    from transformers import AutoTokenizer

    visgen = [run_agent(t, scale=1.0)[0] for t in tasks["train"][:300]]
    texts = [f"{m['role']}\n{m['content']}" for r in visgen for m in r["messages"]]
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 75, 1536, path)
    return AutoTokenizer.from_pretrained(path), visgen


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_tokenizer_round_trip_is_exact(tokenizer, general):
    tok, visgen = tokenizer
    odd = [
        "",
        " ",
        "  two  spaces ",
        "\n\n\t x \r\n",
        "naïve café",
        "北京的猫",
        "emoji 🦊👩\u200d👩\u200d👧",
        "e\u0301 \u00e9",
        "\u0000\u0007\u200b\u2028\ufeff",
        "a\u00a0b\u3000c",
        "٣ ½ ² Ⅳ",
        "ﬁ ligature",
        "\U0010ffff",
        '{"a": [1, 2.5e-3], "b": null}',
        "tool_x tool_text2image_gpt",
        "<think><thinks></ think>",
        "don't , stop . ! ?",
        "_ __ a_b",
        "'s 'll",
    ]
    texts = (
        [m["content"] for r in visgen for m in r["messages"]]
        + [m["content"] for i in general["train"][:200] for m in i["messages"]]
        + odd
    )
    for text in texts:
        assert (
            tok.decode(
                encode(tok, text), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            == text
        )
        assert tok.decode(encode(tok, text)) == text
    assert len(tok) <= 1536


def test_tokenizer_control_tokens_and_tags_are_single_ids(tokenizer):
    tok, _ = tokenizer
    ids = [encode(tok, t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", *TAG_TOKENS)]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(ids) == 3 + 12
    assert (
        tok.eos_token == "<|im_end|>"
        and tok.pad_token == "<|endoftext|>"
        and tok.eos_token_id != tok.pad_token_id
    )
    assert (
        tok.decode(encode(tok, "<think>a</think>"), skip_special_tokens=True) == "<think>a</think>"
    )  # tags are no special tokens


def test_a_word_is_the_same_token_in_request_and_prompt(tokenizer, tasks):
    tok, _ = tokenizer
    words = {w for t in tasks["train"] for w in t["constraints"]["subject"].split()[1:]}
    assert len(words) > 200
    for word in words:
        here = encode(tok, f" {word}")
        for text in (
            f"Make 2 logos of a {word}, please.",
            '<tool_call>{"name": "tool_x", "arguments": '
            f'{{"prompt": "a {word}, pastel"}}}}</tool_call>',
        ):
            ids = encode(tok, text)
            assert any(ids[i : i + len(here)] == here for i in range(len(ids))), (word, text)


def test_json_keys_are_whole_with_their_punctuation(tokenizer):
    tok, _ = tokenizer
    text = (
        '<plan>[{"id": 1, "tool": "llm", "goal": "a fox", "after": [1]}, '
        '{"id": 2, "tool": "llm", "goal": "b", "after": []}]</plan>'
    )
    split = re.findall(pieces(), text[6:-7])
    assert (
        split[:4] == ['[{"id": ', "1", ', "tool": "', "llm"]
        and split[7:11] == ['", "after": [', "1", ']}, {"id": ', "2"]
        and "".join(split) == text[6:-7]
    )
    assert re.findall(pieces(), '{"name": "tool_x", "arguments": {"prompt": "a", "plum": 3}}') == [
        '{"name": "',
        "tool_x",
        '", "arguments": {',
        '"prompt": "',
        "a",
        '", "',
        "plum",
        '":',
        " 3",
        "}}",
    ]
    assert all(
        len(encode(tok, x)) == 1
        for x in (', "tool": "', '", "goal": "', '", "after": [', '{"name": "', '", "arguments": {')
    )


def test_digits_are_single_and_frequent_tool_names_whole(tokenizer):
    tok, visgen = tokenizer
    assert [tok.decode(i).strip() for i in encode(tok, "1024")] == list("1024")
    used = Counter(c["name"] for r in visgen for c in r["calls"])
    assert all(len(encode(tok, name)) == 1 for name, _ in used.most_common(4))


# --- general data from the hub


CALLS = [
    {"name": "live_giveaways_by_type", "arguments": {"type": "beta"}},
    {"name": "live_giveaways_by_type", "arguments": {"type": "game"}},
]
XLAM = {
    "id": 0,
    "query": "Where can I find live giveaways for beta access and games?",
    "answers": json.dumps(CALLS),
    "tools": json.dumps(
        [
            {
                "name": "live_giveaways_by_type",
                "description": "Retrieve live giveaways",
                "parameters": {
                    "type": {
                        "description": "The type of giveaways",
                        "type": "str",
                        "default": "game",
                    }
                },
            }
        ]
    ),
}
ALPACA = {
    "instruction": "Give three tips.",
    "input": "",
    "output": "1. Eat. 2. Sleep. 3. Move.",
    "text": "Below is an instruction",
}
SHAREGPT = {
    "system": "You are an expert in composing functions.",
    "conversations": [
        {"from": "user", "value": "Weather?"},
        {"from": "assistant", "value": "[get_weather(city='Rome')]"},
        {"from": "tool", "value": '{"t": 20}'},
        {"from": "assistant", "value": "20 degrees."},
    ],
}


def test_xlam_tools_are_json_schema():
    schema = to_messages(XLAM, "xlam")[1][0]["function"]["parameters"]
    assert schema["type"] == "object" and "type" in schema["properties"]


def test_alpaca_records():
    assert to_messages(ALPACA, "alpaca") == (
        [
            {"role": "user", "content": "Give three tips."},
            {"role": "assistant", "content": ALPACA["output"]},
        ],
        None,
    )
    asked = to_messages({**ALPACA, "input": "For cats."}, "alpaca")[0][0]["content"]
    assert asked == "Give three tips.\nFor cats."
    assert to_messages({"prompt": "2 + 2?", "response": "4"}, "alpaca")[0] == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]


def test_m3it_records_keep_their_question():
    """M3IT's fields, by its card: instruction, inputs, image_base64_str, outputs. The question
    stands in `inputs`."""
    record = {
        "instruction": "Answer the question about the image.",
        "inputs": "Who drives?",
        "image_base64_str": ["iVBO"],
        "outputs": "A farmer.",
    }
    (ask, reply), _ = to_messages(record, "alpaca")
    assert "Who drives?" in ask["content"] and reply["content"] == "A farmer."


def test_sharegpt_records():
    messages, tools = to_messages(SHAREGPT, "sharegpt")
    assert [m["role"] for m in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ] and tools is None
    assert messages[0]["content"] == SHAREGPT["system"] and messages[3]["content"] == '{"t": 20}'
    old = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert [m["role"] for m in to_messages(old, "sharegpt")[0]] == ["user", "assistant"]
    new = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    }
    assert to_messages(new, "sharegpt")[0] == new["messages"]


def test_xlam_records():
    messages, tools = to_messages(XLAM, "xlam")
    calls = re.findall(r"<tool_call>(.*?)</tool_call>", messages[1]["content"])
    assert [json.loads(c) for c in calls] == CALLS and messages[0] == {
        "role": "user",
        "content": XLAM["query"],
    }
    assert [(t["type"], t["function"]["name"]) for t in tools] == [
        ("function", "live_giveaways_by_type")
    ]


BAD = [
    ("alpaca", {}),
    ("alpaca", {"instruction": "Hi"}),
    ("alpaca", {"instruction": "Hi", "output": ""}),
    ("alpaca", {"output": "Hi"}),
    ("alpaca", {"instruction": "Hi", "output": 3}),
    ("sharegpt", {}),
    ("sharegpt", {"conversations": []}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}]}),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}),
    (
        "sharegpt",
        {"conversations": [{"from": "martian", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]},
    ),
    ("sharegpt", {"conversations": ["Hi", "Hello"]}),
    ("xlam", {}),
    ("xlam", {**XLAM, "answers": "not JSON"}),
    ("xlam", {**XLAM, "answers": "[]"}),
    ("xlam", {**XLAM, "answers": None}),
    ("xlam", {k: v for k, v in XLAM.items() if k != "query"}),
]


@pytest.mark.parametrize("form, record", BAD)
def test_bad_records_raise_value_error(form, record):
    with pytest.raises(ValueError):
        to_messages(record, form)


def test_hub_data_by_the_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    sources = []
    for form, record, weight, kind in (
        ("alpaca", ALPACA, 3, "instruction"),
        ("sharegpt", SHAREGPT, 1, "function"),
        ("xlam", XLAM, 2, "function"),
    ):
        field_of = {"alpaca": "instruction", "sharegpt": "system", "xlam": "query"}[form]
        good = [{**record, field_of: f"{form} {i}"} for i in range(40)]
        bad = [
            {
                **record,
                {"alpaca": "output", "sharegpt": "conversations", "xlam": "answers"}[form]: {
                    "alpaca": "",
                    "sharegpt": [],
                    "xlam": "no",
                }[form],
            }
        ]
        (tmp_path / f"{form}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in good[:20] + bad + good[20:])
        )
        sources.append(
            {
                "load": {"path": "json", "data_files": str(tmp_path / f"{form}.jsonl")},
                "form": form,
                "weight": weight,
                "kind": kind,
            }
        )
    config = Config(data=DataConfig(general=60, general_source="hub"))
    items = hub_general(config, sources)
    first = Counter(i["messages"][0]["content"].split()[0] for i in items)
    assert first == {"alpaca": 30, "sharegpt": 10, "xlam": 20}
    assert Counter(i["kind"] for i in items) == {"instruction": 30, "function": 30}
    assert len({json.dumps(i) for i in items}) == 60 and all(
        set(i) == {"messages", "tools", "kind"} for i in items
    )
    assert hub_general(config, sources) == items  # the same seed, the same mix
    assert hub_general(replace(config, seed=1), sources) != items
    (tmp_path / "bad.jsonl").write_text(
        "".join(json.dumps({"question_text": str(i)}) + "\n" for i in range(400))
    )
    with pytest.raises(SystemExit, match="does not read as `alpaca`"):
        hub_general(
            config,
            [
                {
                    "load": {"path": "json", "data_files": str(tmp_path / "bad.jsonl")},
                    "form": "alpaca",
                    "weight": 1,
                    "kind": "function",
                }
            ],
        )


def test_table_7_is_whole():
    import yaml

    sources = yaml.safe_load((ROOT / "data" / "general_datasets.yaml").read_text())["datasets"]
    assert sorted(s["weight"] for s in sources) == sorted(
        [110, 500, 100, 1592, 112, 60, 600, 11, 123, 76]
    )
    assert all(
        s["form"] in ("alpaca", "sharegpt", "xlam") and s["kind"] in ("instruction", "function")
        for s in sources
    )


# --- the config


def error_of(function, *args):
    """The one line with which a function ends the program."""
    with pytest.raises(SystemExit) as e:
        function(*args)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"vrl": {"stpes": 3}}, ["`vrl.stpes`", "`vrl.steps`"]),
        ({"modle": {}}, ["`modle`", "`model`"]),
        (
            {"pst": {"stages": [{"generl": 1.0}]}},
            ["`pst.stages[0].generl`", "`pst.stages[0].general`"],
        ),
        ({3: 4}, ["`3`"]),
        ({"vrl": {"steps": "many"}}, ["`vrl.steps`", "int", "'many'"]),
        ({"vrl": {"steps": 1.5}}, ["`vrl.steps`", "1.5"]),
        ({"vrl": {"steps": True}}, ["`vrl.steps`", "True"]),
        ({"vrl": {"lr": True}}, ["`vrl.lr`", "True"]),
        ({"bench": {"sampled": 1}}, ["`bench.sampled`", "bool", "1"]),
        ({"vrl": 3}, ["`vrl`", "section", "3"]),
        ({"pst": {"stages": {}}}, ["`pst.stages`", "list"]),
        ({"pst": {"stages": [3]}}, ["`pst.stages[0]`", "3"]),
        ({"reward": {"weights": [1]}}, ["`reward.weights`", "dict"]),
        ({"seed": None}, ["`seed`", "None"]),
        ({"name": 3}, ["`name`", "str", "3"]),
    ],
)
def test_config_faults_name_key_and_value(values, parts):
    line = error_of(build, Config(), values)
    assert all(p in line for p in parts), line


def test_config_takes_an_int_for_a_float_and_keeps_the_rest():
    config = build(Config(), {"vrl": {"lr": 1}, "pst": {"stages": [{"lr": 1}]}})
    assert (
        config.vrl.lr == 1.0
        and type(config.vrl.lr) is float
        and config.vrl.steps == Config().vrl.steps
    )
    assert (
        config.pst.stages[0].lr == 1.0
        and config.pst.stages[0].repeat == 3
        and len(config.pst.stages) == 1
    )


def test_config_files_that_are_missing_or_broken(tmp_path):
    line = error_of(load_config, tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in line and "configs/tiny.yaml" in line
    for text, part in (
        ("vrl: {steps: 3", "not valid YAML"),
        ("- 1\n- 2\n", "list"),
        ("extends: nowhere.yaml\n", "nowhere.yaml"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        assert part in error_of(load_config, tmp_path / "bad.yaml")


def test_config_extends_a_chain_and_overrides_win(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text(
        "seed: 1\nvrl: {steps: 10, group_size: 2}\npst: {stages: [{repeat: 1}, {repeat: 2}]}\n"
    )
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nvrl: {steps: 20}\n")
    (tmp_path / "sub" / "c.yaml").write_text(
        "extends: ../b.yaml\nseed: 3\npst: {stages: [{repeat: 5}]}\n"
    )
    c = load_config(
        tmp_path / "sub" / "c.yaml",
        ["vrl.group_size=7", "name=mine", "reward.form=result+format", "model.autocast=false"],
    )
    assert (c.seed, c.vrl.steps, c.vrl.group_size, c.name, c.reward.form, c.model.autocast) == (
        3,
        20,
        7,
        "mine",
        "result+format",
        False,
    )
    assert [s.repeat for s in c.pst.stages] == [5]
    assert load_config(tmp_path / "b.yaml").name == "b"
    assert "'vrl.steps'" in error_of(load_config, tmp_path / "b.yaml", ["vrl.steps"])
    assert "`vrl.nope`" in error_of(load_config, tmp_path / "b.yaml", ["vrl.nope=1"])
    assert "`vrl`" in error_of(load_config, tmp_path / "b.yaml", ["vrl=1"])


def test_a_learning_rate_may_be_written_as_1e_3(tmp_path):
    """YAML 1.1 reads 1e-3, without a point, as text."""
    (tmp_path / "a.yaml").write_text("vrl: {lr: 2e-4}\n")
    assert load_config(tmp_path / "a.yaml").vrl.lr == 2e-4
    assert load_config(tmp_path / "a.yaml", ["vrl.lr=1e-3"]).vrl.lr == 1e-3


@pytest.mark.parametrize(
    "override", ["rollout.tools=scheme", "rollout.fidelity=2", "name=[", "name=../elsewhere"]
)
def test_values_that_cannot_be_end_in_one_line(tmp_path, monkeypatch, override):
    monkeypatch.setattr("lib.runs.ROOT", tmp_path)
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    line = error_of(lambda: open_run(load_config(tmp_path / "a.yaml", [override])))
    assert override.split("=")[0] in line


def test_one_weight_of_the_reward_may_be_overridden(tmp_path, tasks):
    """The other parts keep their weights, or the line says which is missing; never a KeyError in
    the middle of a run."""
    (tmp_path / "a.yaml").write_text("reward: {weights: {result: 2}}\n")
    config = load_config(tmp_path / "a.yaml")
    trajectory, _ = run_agent(tasks["train"][0])
    assert ltr_reward(trajectory, config.reward)["total"] == 1


def test_configs_here_load():
    for path in sorted(
        set((ROOT / "configs").rglob("*.yaml")) - {ROOT / "configs" / "fsdp.yaml"}
    ):  # that one is accelerate's
        config = load_config(path)
        assert config.name == path.stem
        assert path.stem[1:].isdecimal() or [(s.general, s.repeat) for s in config.pst.stages] == [
            (0.5, 3),
            (0.2, 3),
        ]  # v1 to v7: test_pst.py
    assert (Config().vrl.tasks_per_step, Config().vrl.group_size) == (24, 4)


def test_build_replaces_lists_and_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}}
    assert build(base, over) == {"a": {"b": 1, "c": [2]}, "d": 2}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 2} and over == {"a": {"c": [2]}}
    config = Config()
    assert (
        build(config, {"pst": {"stages": [{"repeat": 5}]}}).pst.stages
        == [replace(config.pst.stages[0], repeat=5)]
        and config == Config()
    )


def test_each_default_has_the_type_of_its_key():
    """build() takes a key's type from its default."""

    def walk(cls):
        for f in fields(cls):
            default = getattr(cls(), f.name)
            assert f.type in (type(default), list[Stage]), f.name
            if is_dataclass(default):
                walk(type(default))

    walk(Config)


@pytest.mark.parametrize(
    "text, part",
    [
        ("vrl: {steps: 3}\nvrl: {steps: 4}\n", "duplicate key"),
        ("name: ${nowhere}\n", "nowhere"),
        ("name: ${\n", "${"),
    ],
)
def test_config_files_that_omegaconf_refuses(tmp_path, text, part):
    (tmp_path / "bad.yaml").write_text(text)
    assert part in error_of(load_config, tmp_path / "bad.yaml")


def test_values_inside_a_dictionary_have_their_default_s_type():
    assert "`reward.weights.result`" in error_of(
        build, Config(), {"reward": {"weights": {"result": "two"}}}
    )
    assert "`reward.weights.resul`" in error_of(
        build, Config(), {"reward": {"weights": {"resul": 2}}}
    )


def test_open_run_refuses_another_config(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.runs.ROOT", tmp_path)
    config = Config(name="x")
    run = open_run(config)
    assert run == tmp_path / "runs" / "x" and (run / "config.yaml").is_file()
    assert open_run(config) == run
    assert (
        open_run(replace(config, bench=replace(config.bench, tasks=3))) == run
    )  # what is measured may change
    line = error_of(open_run, replace(config, vrl=replace(config.vrl, steps=7, lr=0.5)))
    assert "`vrl.steps` is 60 there and 7 now" in line and "runs/x" in line and "name=" in line
    assert "`seed` is 0 there and 1 now" in error_of(open_run, replace(config, seed=1))
    (tmp_path / "runs" / "y").mkdir()
    (tmp_path / "runs" / "y" / "notes.txt").write_text("mine")
    assert "runs/y is not empty" in error_of(open_run, Config(name="y"))


def test_open_run_of_an_older_config_with_a_key_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.runs.ROOT", tmp_path)
    path = open_run(Config(name="x")) / "config.yaml"
    path.write_text(path.read_text().replace("  steps: 60\n", "  steps: 60\n  old_key: 1\n"))
    assert "old_key" in error_of(open_run, Config(name="x"))


def test_print_keys_shows_every_key(capsys):
    print_keys(Config)
    lines = capsys.readouterr().out.splitlines()

    def names(cls, where=""):
        for f in fields(cls):
            value = getattr(cls(), f.name)
            yield from (
                names(type(value), f"{where}{f.name}.")
                if is_dataclass(value)
                else [(f"{where}{f.name}", f.metadata["doc"])]
            )

    every = list(names(Config))
    assert len(every) > 70
    for name, doc in every:
        assert any(line.startswith(f"{name} = ") and line.endswith(f"# {doc}") for line in lines), (
            name
        )


# --- files


def test_jsonl_round_trip_and_faults(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    records = [{"a": "line\nbreak 🦊", "b": [1, None]}, {"c": 2.5}]
    write_jsonl(path, records)
    assert read_jsonl(path) == records and not list(path.parent.glob("*.tmp"))
    path.write_text('{"a": 1}\n{"a": \n', encoding="utf-8")
    line = error_of(read_jsonl, path)
    assert str(path) in line and "line 2" in line
    assert str(tmp_path / "none") in error_of(read_jsonl, tmp_path / "none")


def test_jsonl_lines_may_hold_any_character(tmp_path):
    records = [{"a": "x\u2028y\u0085z"}]
    write_jsonl(tmp_path / "x.jsonl", records)
    assert read_jsonl(tmp_path / "x.jsonl") == records


def test_ensure_data_makes_all_files_once(tmp_path, monkeypatch, capsys):
    load_voice()  # read once, before the root is another
    for module in ("lib.runs", "make_data"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    config = Config(
        name="x",
        data=DataConfig(
            queries=42, general=60, general_heldout=12, train_tasks=42, heldout_tasks=42
        ),
        model=ModelConfig(base_examples=50),
    )
    run = open_run(config)
    ensure_data(config, run)
    files = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (run / "data").iterdir()
        if p.is_file()
    }
    assert set(files) == {
        "heldout.jsonl",
        "train.jsonl",
        "queries.jsonl",
        "trajectories.jsonl",
        "visgen.jsonl",
        "chat.jsonl",
        "removed.jsonl",
        "funnel.json",
        "general.jsonl",
        "base.jsonl",
        "general_heldout.jsonl",
        "done.json",
    }
    assert [
        len(read_jsonl(run / "data" / f"{n}.jsonl"))
        for n in ("heldout", "train", "general", "general_heldout")
    ] == [42, 42, 60, 12]
    assert (run / "data" / "tokenizer" / "tokenizer.json").is_file()
    assert "funnel: 42 queries" in capsys.readouterr().out
    train = {r["task"]["request"] for r in read_jsonl(run / "data" / "visgen.jsonl")} | {
        t["request"] for t in read_jsonl(run / "data" / "train.jsonl")
    }
    assert not train & {t["request"] for t in read_jsonl(run / "data" / "heldout.jsonl")}
    shown = "\n".join(
        (run / "data" / name).read_text()
        for name in ("base.jsonl", "general.jsonl", "visgen.jsonl", "train.jsonl")
    )
    subjects = {t["constraints"]["subject"] for t in read_jsonl(run / "data" / "heldout.jsonl")}
    assert len(subjects) > 20 and not [s for s in subjects if s.split(" ", 1)[1] in shown]
    ensure_data(config, run)
    assert capsys.readouterr().out == ""
    (run / "data" / "done.json").unlink()  # cut off before the end: made again, the same
    ensure_data(config, run)
    again = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (run / "data").iterdir()
        if p.is_file()
    }
    assert {k: v for k, v in again.items() if k != "done.json"} == {
        k: v for k, v in files.items() if k != "done.json"
    }
