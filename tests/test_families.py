"""Families of requests (data/families.yaml): every wording can be read back, the expert carries
each out, what leaves its wish out loses, and all 36 tools are needed by somebody."""

import copy
import re
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from env import VisGenEnv  # noqa: E402
from lib import expert  # noqa: E402
from lib.behaviours import new_artifact  # noqa: E402
from lib.experiment import DataConfig, RewardConfig, RolloutConfig, load_config  # noqa: E402
from lib.expert import WISHES, vision_agent  # noqa: E402
from lib.families import (  # noqa: E402
    ATTACH,
    DELIVERABLES,
    asked_kind,
    draw_wish,
    family_patterns,
    load_families,
    wish_sentence,
)
from lib.lineage import read_media  # noqa: E402
from lib.reading import NO_CONSTRAINTS, clause_patterns, facts_of, read_request  # noqa: E402
from lib.runs import read_jsonl, seeded_rng  # noqa: E402
from lib.tasks import BENCH, combination_split, make_tasks  # noqa: E402
from lib.toolbox import brings, load_tools, makes  # noqa: E402
from lib.wishes import CHECKS, wish_checks, wish_words  # noqa: E402
from lib.words import content_words  # noqa: E402
from lib.workflows import expand_workflow, fitting_workflows, load_workflows  # noqa: E402
from rewards import explain, ltr_reward, result_reward  # noqa: E402

FAMILIES = load_families()
ALL = DataConfig(families=1, languages=["en", "zh"])
SPLITS = ("visgen", "train", "heldout")


def play(task, scale=0.0, seed=5):
    env = VisGenEnv(RolloutConfig(failure_scale=scale, tool_pool="all"))
    trajectory = vision_agent(task, env, seed)
    return trajectory, ltr_reward(trajectory, RewardConfig(), env.pool)


@lru_cache
def tasks_of(split, n=460):
    return make_tasks(n, split, ALL, 3)


@pytest.fixture(scope="module")
def one_each():
    """{family: [an English task and a Chinese one]}."""
    found = defaultdict(list)
    for task in tasks_of("train"):
        mine = found[task["constraints"]["family"]]
        if task["language"] not in [other["language"] for other in mine]:
            mine.append(task)
    assert set(found) == set(FAMILIES) and {len(mine) for mine in found.values()} == {2}
    return found


# --- the entries


def test_an_entry_names_what_is_there():
    """A slip in the YAML fails here, by name."""
    for name, family in FAMILIES.items():
        assert family["modality"] in ("image", "video"), name
        assert set(family["attach"]) <= set(ATTACH) and set(family["checks"]) <= set(CHECKS), name
        assert family["checks"] and family["rubric"], name
        assert (
            set(family["draws"]) < set(NO_CONSTRAINTS) and family["deliver"] in DELIVERABLES
            if ("deliver" in family)
            else True
        ), name
        assert len(family["practice"].split()) >= 15
        words = {k: len(v) for k, v in family["words"].items()}
        assert set(words) == {"en", "zh", "bench"} and (words["en"], words["zh"]) == (8, 6)
        assert words["bench"] >= 4
        keys = [s["key"] for s in family["steps"]]
        assert len(set(keys)) == len(keys)
        for step in family["steps"]:
            assert set(step["tool"]) <= set(load_tools()) and set(step["after"]) <= set(keys)
        for text in sum(family["words"].values(), []):
            assert set(re.findall(r"{(\w+)}", text)) == set(family["wish"]), text
            assert re.search(r"[.?!。？！]$", text), text
    used = {check for family in FAMILIES.values() for check in family["checks"]}
    assert used == set(CHECKS) == set(wish_words())
    ours = {s["key"] for family in FAMILIES.values() for s in family["steps"]}
    assert set(WISHES) <= ours


def test_old_tasks_read_as_before():
    """The new constraints are neutral, and a record without them is still judged."""
    assert [NO_CONSTRAINTS[k] for k in ("family", "deliver", "wish")] == [None, None, {}]
    old = read_jsonl(ROOT / "data" / "example.jsonl")[0]
    for key in ("family", "deliver", "wish"):
        old["task"]["constraints"].pop(key, None)
    assert ltr_reward(old, RewardConfig())["result"] == 1
    assert make_tasks(84, "visgen", load_config(ROOT / "configs" / "tiny.yaml").data, 1)
    for task in make_tasks(84, "visgen", load_config(ROOT / "configs" / "smoke.yaml").data, 1):
        assert task["constraints"]["family"] is None


def test_every_family_has_tasks_of_training_and_held_out_ones():
    """Its combinations of constraints fall on both sides, or a split would wait for ever."""
    rng = seeded_rng("sides")
    for name in FAMILIES:
        for language in ("en", "zh"):
            sides = {
                combination_split({**NO_CONSTRAINTS, **draw_wish(rng, name, language)})
                for _ in range(400)
            }
            assert sides == {"train", "heldout"}, name


# --- the words


def test_a_sentence_says_its_own_family_alone():
    clauses = {language: clause_patterns(language) for language in ("en", "zh")}
    rng = seeded_rng("sentences")
    for name, family in FAMILIES.items():
        for which, texts in family["words"].items():
            language = "zh" if which == "zh" else "en"
            for text in texts:
                c = {**copy.deepcopy(NO_CONSTRAINTS), **draw_wish(rng, name, language)}
                said = wish_sentence(rng.choice, c, [text])
                heard = {
                    kind
                    for kind, several in [
                        *family_patterns(language).items(),
                        *clauses[language].items(),
                    ]
                    if any(piece in said and re.search(p, said) for piece, p in several)
                }
                assert heard == {name}, said
                read = read_request(said)
                assert (read["family"], read["wish"]) == (name, c["wish"]), said


@pytest.mark.parametrize("split", SPLITS)
def test_every_request_is_read_wholly_right(split):
    for task in tasks_of(split):
        read, meant = read_request(task["request"]), task["constraints"]
        assert read == meant, task["request"]
        assert set(meant) == set(NO_CONSTRAINTS) and task["request"].isprintable()
        facts = facts_of(read)
        assert meant["family"].replace("_", " ") in facts or task["language"] == "zh"
        assert all(str(value) in facts for value in meant["wish"].values())


def test_what_is_attached_is_what_the_family_needs_and_its_flaws_are_hidden():
    for task in tasks_of("train"):
        family = FAMILIES[task["constraints"]["family"]]
        assert bool(task["inputs"]) == bool(family["attach"])
        env = VisGenEnv(RolloutConfig())
        messages, _ = env.reset(task, 1)
        shown = messages[-1]["content"].split("\n", 1)
        assert "flaw" not in "".join(shown[1:])
        if flaws := [i["flawed"] for i in task["inputs"] if "flawed" in i]:
            assert flaws.count(False) == 1 < len(flaws)


def test_no_sentence_of_the_bench_shares_five_words_with_training():
    def runs(text):
        words = re.findall(r"[\w'-]+", re.sub(r"{\w+}", " ", text).lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    training = set().union(*(runs(t) for f in FAMILIES.values() for t in f["words"]["en"]))
    bench = [t for f in FAMILIES.values() for t in f["words"]["bench"]]
    assert [t for t in bench if runs(t) & training] == []
    assert [r for r, n in Counter(r for t in bench for r in runs(t)).items() if n > 1] == []


# --- the expert


def test_the_expert_carries_every_family_out(one_each):
    for tasks in one_each.values():
        for task in tasks:
            trajectory, reward = play(task)
            assert reward["total"] > 0.97 and reward["result"] == 1, (
                task["request"],
                reward["total"],
                reward["checks"],
                reward["facets"],
            )


def test_the_expert_s_mean_with_usual_failures():
    totals = defaultdict(list)
    for seed, task in enumerate(tasks_of("visgen")):  # a seed decides on its flaws
        totals[task["constraints"]["family"]].append(play(task, 1.0, seed)[1]["total"])
    assert sum(sum(t) for t in totals.values()) / sum(map(len, totals.values())) > 0.97
    assert min(sum(t) / len(t) for t in totals.values()) > 0.9, {
        name: sum(t) / len(t) for name, t in totals.items()
    }


def test_all_36_tools_are_needed_by_a_family_or_a_workflow():
    needed = {s["tool"][0] for flow in load_workflows().values() for s in flow["steps"]}
    # Two steps of the 15 workflows name these as the alternative alone.
    assert set(load_tools()) - needed == set()


def test_experts_use_all_36_tools():
    used = Counter()
    config = DataConfig()
    assert config.families > 0
    for task in make_tasks(1500, "visgen", config, 8):
        used.update(call["name"] for call in play(task, scale=1.0)[0]["calls"])
        if len(used) == 36:
            break
    assert set(used) == set(load_tools())


def test_the_docs_table_is_what_the_workflows_say():
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?ms)^\* `(tool_\w+)`: (.+?)(?=^\* |^$)", text))
    assert set(rows) == set(load_tools())
    for tool, text in rows.items():
        first = {
            name
            for name, flow in load_workflows().items()
            if any(s["tool"][0] == tool for s in flow["steps"])
        }
        assert set(re.findall(r"`(\w+)`", text.split(";")[0])) == first, tool


# --- what leaves the wish out


def without_the_sentence(task):
    """The task as it is heard by somebody who misses the family's sentence."""
    c = task["constraints"]
    for _, pattern in family_patterns(task["language"])[c["family"]]:
        if found := re.search(pattern, task["request"]):
            return {**task, "request": task["request"].replace(found[0], "")}
    raise AssertionError(task["request"])


@pytest.mark.parametrize("name", FAMILIES)
def test_who_does_not_hear_the_wish_loses_a_fifth(name, one_each):
    for task in one_each[name]:
        deaf = without_the_sentence(task)
        assert read_request(deaf["request"])["family"] is None
        trajectory, _ = play(deaf)
        trajectory["task"] = task
        reward = ltr_reward(trajectory, RewardConfig())
        assert reward["total"] <= play(task)[1]["total"] - 0.2, (reward, task["request"])


def less(*names):
    """The arguments without some."""
    return lambda a: {k: v for k, v in a.items() if k not in names}


def only(*names, **more):
    """Some of the arguments, and others."""
    return lambda a: {k: v for k, v in a.items() if k in names} | more


# family: (the step's key, a tool that does not give it or None, the arguments then): near misses.
NEAR_MISSES = {
    "refined_prompt": ("refine", "tool_content_summary", only(content="a prompt for it")),
    "exact_picture": ("exact", "tool_text2image_gemini", only("prompt")),
    "marked_picture": ("marked", None, lambda a: {**a, "logo_add": False}),
    "masked_edit": ("masked", None, less("mask")),
    "many_references": ("combine", None, lambda a: {**a, "images": a["images"][:4]}),
    "sized_edit": ("sized", "tool_image_edit_gemini", only("images", "prompt")),
    "found_manner": ("manner", "tool_text2image_gemini", only("prompt", "n", "aspect_ratio")),
    "sourced_page": (
        "page",
        None,
        lambda a: {**a, "sections": [less("text")(section) for section in a["sections"]]},
    ),
    "best_picture": ("pick", None, "flawed"),
    "best_film": ("shorten", None, "flawed"),
    "best_recording": ("clean", None, "flawed"),
    "written_script": ("script", None, lambda a: {**a, "duration": a["duration"] + 9}),
    "revised_board": (
        "polish",
        "tool_video_shot_gen",
        lambda a: {"script": a["instructions"], "n_shots": 4},
    ),
    "narrated_board": ("merge", "tool_storyboard_polish", less("script")),
    "animated_picture": ("animate", None, lambda a: {**a, "generate_audio": False}),
    "voice_file": ("speak", None, less("voice")),
    "film_crop": ("crop", None, lambda a: {**a, "operations": [{"op": "denoise"}]}),
    "film_watermark": ("watermark", None, lambda a: {**a, "operations": [{"op": "denoise"}]}),
    "film_loop": ("loop", None, lambda a: {**a, "operations": [{"op": "reverse"}]}),
    "film_pace": (
        "pace",
        "tool_video_trim_edit",
        lambda a: {"video": "in_1", "start": 0, "end": min(a["target_duration"], 6)},
    ),
    "timed_music": ("cut_music", None, less("fade_out")),
    "summed_captions": (
        "sum_caption",
        None,
        lambda a: {**a, "subtitles": [{**cue, "text": "Hello"} for cue in a["subtitles"]]},
    ),
}


def and_also(**operation):
    """The operations, and one more that nobody asked for."""
    return lambda a: {**a, "operations": [*a["operations"], operation]}


# What a red team that had not read the checks got the whole reward with: (family, key, arguments).
FOUND = [
    ("film_loop", "loop", and_also(op="resize", width=16, height=16)),
    ("film_watermark", "watermark", and_also(op="crop", width=64, height=36, x=0, y=0)),
    ("film_watermark", "watermark", and_also(op="watermark", value="made by a rival")),
    (
        "film_watermark",
        "watermark",
        lambda a: {**a, "operations": [{**a["operations"][0], "value": "this is no X lol"}]},
    ),
    ("film_crop", "crop", and_also(op="rotate", angle=180)),
    (
        "film_crop",
        "crop",
        lambda a: {
            **a,
            "operations": [
                {
                    **a["operations"][0],
                    "width": a["operations"][0]["width"] // 10 * 2,
                    "height": a["operations"][0]["height"] // 10 * 2,
                }
            ],
        },
    ),
    ("written_script", "script", lambda a: {**a, "language": "zh"}),
    ("refined_prompt", "refine", lambda a: {**a, "language": "zh"}),
    (
        "revised_board",
        "polish",
        lambda a: {**a, "instructions": a["instructions"].replace(": ", ": never ")},
    ),
    ("timed_music", "cut_music", lambda a: {**a, "fade_out": 0.1}),
    ("timed_music", "cut_music", lambda a: {**a, "volume": 0.11}),
    ("timed_music", "cut_music", lambda a: {**less("end")(a), "end": 1, "loop_to": a["end"]}),
]


@pytest.mark.parametrize("name, key, arguments_of", FOUND)
def test_what_a_red_team_found_loses_a_fifth(name, key, arguments_of, one_each, monkeypatch):
    english = [task for task in one_each[name] if task["language"] == "en"]
    assert english
    loses_a_fifth(english, key, None, arguments_of, monkeypatch)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_or_a_wrong_tool_loses_a_fifth(name, one_each, monkeypatch):
    key, tool, arguments_of = NEAR_MISSES[name]
    loses_a_fifth(one_each[name], key, tool, arguments_of, monkeypatch)


def loses_a_fifth(tasks, key, tool, arguments_of, monkeypatch):
    """The expert with another tool or other arguments in the step `key` gets at least 0.2 less."""
    plan_of, real = expert.make_plan, expert.call_arguments

    def planned(*given, **more):
        steps = plan_of(*given, **more)
        for step in steps:
            if tool and step["key"] == key:
                step["tool"], step["tools"] = tool, [tool]
        return steps

    def called(step, job):
        arguments, attached = real(step, job), job.attached
        if step["key"] != key:
            return arguments
        if arguments_of != "flawed":
            return arguments_of(arguments)
        other = next(i for i in attached if i not in str(arguments))
        return {
            k: [other] if isinstance(v, list) else other if str(v).startswith("in_") else v
            for k, v in arguments.items()
        }

    for task in tasks:
        best = play(task)[1]["total"]
        with monkeypatch.context() as patched:
            patched.setattr(expert, "make_plan", planned)
            patched.setattr(expert, "call_arguments", called)
            trajectory, reward = play(task)
        assert trajectory["ended"] == "answer"
        assert trajectory["calls"][-1]["status"] == "ok", trajectory["calls"][-1]["error"]
        assert reward["total"] <= best - 0.2, (reward["total"], reward["checks"])


def test_an_alternative_is_accepted(one_each, monkeypatch):
    """Where two services give what is asked for, the result of either is whole."""
    for name, tool in (
        ("exact_picture", "tool_text2image_seed"),
        ("found_manner", "tool_text2image_seed"),
        ("best_picture", "tool_image_edit_qwen"),
    ):
        for task in tasks_of("train"):
            c = task["constraints"]
            if c["family"] != name or "928" in str(c["wish"]):
                continue
            flow = {"steps": copy.deepcopy(FAMILIES[name]["steps"])}
            real = expert.expand_workflow

            def expand(workflow, c, tool=tool, real=real):
                return [
                    {**s, "tool": tool if tool in s["tools"] else s["tool"]}
                    for s in real(workflow, c)
                ]

            with monkeypatch.context() as patched:
                patched.setattr(expert, "expand_workflow", expand)
                trajectory, reward = play(task)
            assert tool in {call["name"] for call in trajectory["calls"]}
            assert reward["result"] == 1 and reward["plan"] > 0.99, (reward, flow)
            break


# --- checks, one by one


def test_flaws_that_an_analysis_shows_decide():
    """Without looking, an agent that takes the first take is wrong as often as chance has it."""
    tasks = [t for t in tasks_of("heldout") if t["constraints"]["family"].startswith("best_")]
    firsts = [t["inputs"][0]["flawed"] for t in tasks]
    assert 0.4 < sum(firsts) / len(firsts) < 0.85


def test_the_to_do_list_has_to_be_written_first_and_ticked_off(one_each):
    task = one_each["long_job"][0]
    trajectory, reward = play(task)
    assert reward["checks"]["list_kept"] == 1 and len(trajectory["plan"]) > 20
    for drop in ("create", "update"):
        cut = copy.deepcopy(trajectory)
        cut["calls"] = [c for c in cut["calls"] if c["arguments"].get("action") != drop]
        assert result_reward(cut, RewardConfig())[0] < 0.5
    late = copy.deepcopy(trajectory)
    late["calls"].sort(key=lambda call: call["name"] == "tool_task_manager")
    assert wish_checks_of(late)["list_kept"] == 0


def wish_checks_of(trajectory):
    media = read_media(trajectory)
    last = trajectory["answer"]["deliverables"]
    return wish_checks([media.by_id[i] for i in last], trajectory, media)


def test_the_reward_of_a_family_is_explained_in_words(one_each):
    for tasks in one_each.values():
        trajectory, reward = play(tasks[0])
        rows = explain(trajectory, reward, RewardConfig())
        named = {row[0].strip(): row[3] for row in rows}
        for check in FAMILIES[tasks[0]["constraints"]["family"]]["checks"]:
            assert named[check] not in ("", "-"), check


def test_kinds_and_words():
    assert {asked_kind({"deliver": d}) for d in DELIVERABLES} == {"text", "audio"}
    assert brings("tool_search_inspire") == "image" and makes("tool_search_inspire") == "text"
    assert content_words("a night") == {"night"} and new_artifact("text")["kind"] == "text"


# --- VisGenBench


def test_visgenbench_has_every_family_and_the_expert_meets_it():
    bench = read_jsonl(BENCH)
    of_family = [t for t in bench if t["constraints"]["family"]]
    assert {t["constraints"]["family"] for t in of_family} == set(FAMILIES)
    assert {t["dimension"] for t in of_family} == {"match", "amount", "duration"}
    for task in of_family[::3]:
        assert play(task)[1]["result"] == 1, task["request"]
    workflows = {fitting_workflows(t["constraints"])[0] for t in bench}
    tools = {
        s["tool"]
        for t in bench
        for s in expand_workflow(fitting_workflows(t["constraints"])[0], t["constraints"])
    }
    assert tools == set(load_tools()) and set(FAMILIES) <= workflows
