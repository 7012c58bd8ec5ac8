"""LtrReward: each part on records made by hand, the four forms, the order of good and bad ones."""

import copy
import doctest
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from env import VisGenEnv  # noqa: E402
from lib import result_checks, toolbox, words, workflows  # noqa: E402
from lib.experiment import (  # noqa: E402
    FORMS,
    Config,
    DataConfig,
    RewardConfig,
    RolloutConfig,
    build,
    load_config,
)
from lib.expert import vision_agent  # noqa: E402
from lib.judge import FACETS  # noqa: E402
from lib.lineage import Media, deliverables  # noqa: E402
from lib.reading import NO_CONSTRAINTS, read_request  # noqa: E402
from lib.result_checks import narration_check  # noqa: E402
from lib.tasks import make_tasks  # noqa: E402
from lib.text import to_json  # noqa: E402
from lib.toolbox import load_tools  # noqa: E402
from lib.workflows import (  # noqa: E402
    clip_seconds,
    expand_workflow,
    fitting_workflows,
    n_shots,
    needs,
)
from rewards import (  # noqa: E402
    PARTS,
    atomicity_facet,
    coherence_facet,
    combine,
    consistency_reward,
    example,
    executability_facet,
    f1,
    format_reward,
    is_needless,
    ltr_reward,
    optimality_facet,
    plan_reward,
    requirement_facet,
    result_reward,
    stated_count,
    tool_reward,
    traj_reward,
)

CONFIG, POOL = RewardConfig(), set(load_tools())
IMAGE, EDIT, CLIP, I2V = (
    "tool_text2image_gemini",
    "tool_image_edit_gemini",
    "tool_text2video_veo",
    "tool_image2video_keling",
)
JOIN, MUSIC = "tool_video_composite", "tool_music_suno"


def c_of(**more):
    """Constraints of a request about a fox."""
    return {**copy.deepcopy(NO_CONSTRAINTS), "subject": "a red fox", **more}


def step(i, tool, goal="1 image of a red fox", after=()):
    return {"id": i, "tool": tool, "goal": goal, "after": list(after)}


def media(i, tool, parents=(), **more):
    """One artifact record; its kind follows from its id."""
    kind = {
        "img": "image",
        "vid": "video",
        "aud": "audio",
        "htm": "html",
        "txt": "text",
        "in_": "image",
    }[i[:3]]
    size = (
        {"width": 1024, "height": 1024}
        if kind == "image"
        else {"width": 1280, "height": 720}
        if kind == "video"
        else {"width": None, "height": None}
    )
    film = (
        {
            "duration_s": 8.0,
            "has_audio": True,
            "shots": more.get("shots", 1),
            "fps": 24,
            "shot_frames": [96] * more.get("shots", 1),
        }
        if (kind == "video")
        else {
            "duration_s": 60.0 if kind == "audio" else None,
            "shots": None,
            "has_audio": kind == "audio",
        }
    )
    return {
        "id": i,
        "kind": kind,
        **size,
        **film,
        "tool": tool,
        "arguments": {"prompt": "a red fox", "of": list(parents)},
        "parents": [{"id": p, "role": "source"} for p in parents],
        **dict.fromkeys(("cues", "speech", "music", "sfx"), []),
        **more,
    }


def episode(c, artifacts, hand, calls=(), plan=(), ended="answer", turns=None, inputs=()):
    """A trajectory record by hand."""
    return {
        "task": {"id": "t", "constraints": c, "inputs": list(inputs)},
        "artifacts": list(artifacts),
        "calls": list(calls),
        "plan": list(plan),
        "plans": [{"turn": 1, "plan": list(plan)}] if plan else [],
        "answer": {"deliverables": list(hand), "summary": "All of it is done."},
        "ended": ended,
        "turns": turns
        if turns is not None
        else [
            {"faults": [], "order": ["think", "plan", "tool_call"]},
            {"faults": [], "order": ["think", "answer"]},
        ],
    }


def called(*names):
    """Call records of one turn: a name with a ! failed."""
    return [
        {
            "turn": 1,
            "name": n.strip("!"),
            "arguments": {},
            "outputs": ["img_1"],
            "status": "error" if n.endswith("!") else "ok",
        }
        for n in names
    ]


@pytest.fixture(scope="module")
def expert():
    """VisionAgent's trajectories on 210 training and 210 held-out tasks, without failures."""
    made = []
    for split in ("train", "heldout"):
        for task in make_tasks(210, split, DataConfig(families=0), seed=11):
            env = VisGenEnv(RolloutConfig(failure_scale=0.0, tool_pool="all"))
            made.append(vision_agent(task, env, 3))
    return made


def test_doctests():
    for module, least in ((rewards, 3), (result_checks, 3), (words, 3), (workflows, 1)):
        result = doctest.testmod(module)
        assert result.attempted >= least and result.failed == 0


# --- R_plan


def test_expert_plan_scores_one_in_each_facet(expert):
    for t in expert:
        score, facets = plan_reward(t["plan"], t["task"], CONFIG, t["task"]["pool"])
        assert facets == dict.fromkeys(FACETS, 1.0) and score == 1.0, t["task"]["request"]


@pytest.mark.parametrize("plan", [None, []])
def test_no_plan_scores_zero(plan):
    assert plan_reward(plan, {"constraints": c_of(images=1), "inputs": []}, CONFIG, POOL) == (
        0.0,
        dict.fromkeys(FACETS, 0.0),
    )


FILM = c_of(videos=1, shots=2, duration_s=13, audio=["music"], consistency=["object"])


EXPERT = expand_workflow(fitting_workflows(FILM)[0], FILM)


def film_plan():
    return [{k: s[k] for k in ("id", "tool", "goal")} | {"after": list(s["after"])} for s in EXPERT]


def facets_of(plan, c=FILM, pool=POOL, inputs=()):
    return plan_reward(plan, {"constraints": c, "inputs": list(inputs)}, CONFIG, pool)[1]


def test_the_film_s_plan_is_as_expected():
    assert [s["tool"] for s in film_plan()] == [
        MUSIC,
        IMAGE,
        EDIT,
        EDIT,
        I2V,
        I2V,
        JOIN,
        "tool_video_trim_edit",
    ]
    assert facets_of(film_plan()) == dict.fromkeys(FACETS, 1.0)


def worse(plan, *facets, **more):
    """These facets are below 1, all others are 1."""
    found = facets_of(plan, **more)
    assert {f for f in FACETS if found[f] < 1} == set(facets), found
    return found


def test_slip_wrong_tool():
    plan = film_plan()
    plan[6]["tool"] = "tool_video_postprocess"
    assert "optimality" in {f for f, v in facets_of(plan).items() if v < 1}
    plan = film_plan()
    plan[0]["tool"] = "tool_sound_fx_gen"  # effects in place of the music
    assert worse(plan, "optimality")["optimality"] < 0.95
    plan = film_plan()
    plan[0]["tool"] = "tool_music_sumo"  # no such tool
    worse(plan, "executability", "optimality")


def test_an_allowed_alternative_is_no_slip():
    plan = film_plan()
    plan[1]["tool"], plan[2]["tool"] = "tool_text2image_seed", "tool_image_edit_qwen"
    worse(plan)


def test_slip_tool_outside_the_pool():
    found = worse(film_plan(), "executability", pool=POOL - {MUSIC})
    assert found["executability"] == pytest.approx(7 / 8)


def test_slip_missing_step():
    without_music = [s for s in film_plan() if s["tool"] != MUSIC]
    for s in without_music:
        s["after"] = [a for a in s["after"] if a != 1]
    worse(without_music, "optimality")
    without_clip = [s for s in film_plan() if s["id"] != 6]
    without_clip[-2]["after"] = [a for a in without_clip[-2]["after"] if a != 6]
    worse(without_clip, "requirement", "optimality")
    without_reference = [s for s in film_plan() if s["id"] != 2]
    for s in without_reference:
        s["after"] = [a for a in s["after"] if a != 2]
    worse(
        without_reference, "requirement", "coherence", "optimality"
    )  # the frames are edits of nothing, and nobody says of what


def test_slip_needless_step():
    plan = film_plan() + [step(9, "tool_search_inspire", "look around a bit")]
    worse(plan, "optimality")


def test_looking_at_the_film_at_the_end_does_not_unmake_it():
    look = step(9, "tool_video_analysis", "look at the film", [8])
    worse(film_plan() + [look])
    many = [step(i, "tool_video_analysis", f"look number {i}", [8]) for i in range(9, 19)]
    worse(film_plan() + many, "optimality")


def test_slip_wrong_count():
    c = c_of(images=4)
    assert facets_of([step(1, IMAGE, "4 images of a red fox")], c) == dict.fromkeys(FACETS, 1.0)
    for goal in ("3 images of a red fox", "5 images of a red fox", "images of a red fox"):
        found = worse([step(1, IMAGE, goal)], "requirement", "optimality", c=c)
        assert found["requirement"] == 0
    two = c_of(videos=2)
    one = [step(1, CLIP, "clip of a red fox")]
    assert worse(one, "requirement", "optimality", c=two)["requirement"] == 0
    assert worse([step(1, CLIP, "2 clips of a red fox")], c=two)


def test_slip_wrong_modality():
    assert facets_of([step(1, IMAGE)], c_of(videos=1))["requirement"] == 0
    assert facets_of([step(1, CLIP, "clip of a red fox")], c_of(images=1))["requirement"] == 0
    assert facets_of([step(1, "llm", "1 image of a red fox")], c_of(images=1))["requirement"] == 0


def test_two_films_where_one_is_asked():
    plan = film_plan()
    plan[6]["after"] = [5, 1]  # the second clip is left over
    assert facets_of(plan)["requirement"] == 0


@pytest.mark.parametrize("after", [[8], [7], [99], [0]])
def test_slip_cyclic_forward_or_unknown_after(after):
    plan = film_plan()
    plan[6]["after"] = plan[6]["after"] + after  # step 7: itself, a later one, none
    found = facets_of(plan)
    circular = after in ([8], [7])
    assert found["coherence"] == pytest.approx(0 if circular else 7 / 8)
    assert found["requirement"] == (not circular) and found["optimality"] < 1


def test_slip_two_steps_in_a_ring():
    ring = [step(1, IMAGE, "1 image of a red fox", [2]), step(2, EDIT, "1 image from it", [1])]
    assert coherence_facet(ring, []) == 0
    assert requirement_facet(ring, c_of(images=2)) == 0
    # An id twice, of which the second comes after itself.
    assert coherence_facet([step(1, IMAGE), step(1, EDIT, "2 images", [1])], []) == 0


def test_coherence_counts_what_the_user_attached():
    plan = [step(1, EDIT, "1 image of a red fox")]
    assert coherence_facet(plan, []) == 0 and coherence_facet(plan, [{"kind": "image"}]) == 1
    assert coherence_facet(plan, [{"kind": "audio"}]) == 0


def test_slip_two_goals_in_one_step():
    for goal in ("frame 1; frame 2 of a red fox", "draw a frame then make a clip"):
        plan = film_plan()
        plan[7]["goal"] = goal
        assert worse(plan, "atomicity")["atomicity"] == pytest.approx(7 / 8)
    assert (
        atomicity_facet([step(1, IMAGE, "image")]) == 0
        and atomicity_facet([step(1, IMAGE, "one two " * 9)]) == 0
    )
    assert atomicity_facet([step(1, IMAGE), step(2, IMAGE)]) == 0  # the same step said twice
    assert atomicity_facet([step(1, IMAGE, "frame 1"), step(2, IMAGE, "frame 2")]) == 1


def test_a_subject_s_own_words_are_no_second_goal():
    """A one-step plan names a long subject in full."""
    subject = "a ship in a bottle; then the hand that " + "slowly, carefully " * 6 + "sets it down"
    plan = [step(1, IMAGE, f"1 image of {subject}")]
    assert atomicity_facet(plan, subject) == 1 and atomicity_facet(plan, "a ship") == 0
    task = {"constraints": c_of(images=1, subject=subject), "inputs": []}
    assert plan_reward(plan, task, CONFIG, POOL)[0] == 1
    twice = [step(1, IMAGE, f"1 image of {subject}, {subject}")]
    assert atomicity_facet(twice, subject) == 0


def test_executability_takes_llm_steps():
    plan = [step(1, "llm", "write the script"), step(2, CLIP), step(3, "tool_none")]
    assert executability_facet(plan, {CLIP}) == pytest.approx(2 / 3)


def test_requirement_leaves_reference_pictures_out():
    c = c_of(images=2)
    plan = [
        step(1, IMAGE, "reference image of a red fox"),
        step(2, EDIT, "2 images from the reference", [1]),
    ]
    assert (
        requirement_facet(plan, c) == 1
        and requirement_facet([{**plan[0], "goal": "1 image"}, plan[1]], c) == 0
    )


def test_optimality_is_the_better_of_steps_and_edges():
    plan = film_plan()
    assert optimality_facet(plan, FILM) == 1
    for s in plan:
        s["after"] = []
    assert optimality_facet(plan, FILM) == 0.5  # the right steps, nothing feeds anything
    assert optimality_facet([step(1, "tool_search_content", "look around")], FILM) == 0


def test_f1_and_stated_count():
    assert (
        f1(Counter("aab"), Counter("ab")) == pytest.approx(0.8)
        and f1(Counter(), Counter()) == 1
        and f1(Counter("a"), Counter()) == 0
    )
    assert [
        stated_count(g, "image")
        for g in ("12 images", "an image", "3 pictures of 4 images", "4 clips", "2 images2")
    ] == [12, 1, 3, 1, 1]


def test_facet_weights():
    plan = [step(1, IMAGE, "3 images of a red fox")]
    task = {"constraints": c_of(images=4), "inputs": []}
    nearness = 2 * 3 / (3 + 4)  # three pictures where the expert has four
    assert plan_reward(plan, task, CONFIG, POOL)[0] == pytest.approx(
        (3 + (nearness + 1) / 2) / 6
    )  # the binary facet counts double
    weights = dict.fromkeys(FACETS, 0.0) | {"requirement": 1.0, "atomicity": 3.0}
    assert plan_reward(plan, task, RewardConfig(facet_weights=weights), POOL)[0] == pytest.approx(
        0.75
    )


def test_needs_and_clip_lengths():
    assert needs(FILM) == {"shots", "consistent", "music"}
    assert (
        needs(c_of(images=3, resolution="2K")) == {"many", "large"}
        and needs(c_of(images=1, consistency=["style"])) == set()
    )
    assert (
        n_shots(c_of(videos=1, duration_s=17)) == 3
        and n_shots(c_of(videos=1)) == 1
        and n_shots(FILM) == 2
    )
    assert [
        clip_seconds(c_of(videos=1, duration_s=d), (4, 6, 8)) for d in (3, 4, 5, 7, 8, None)
    ] == [[4], [4], [6], [8], [8], [4]]
    assert clip_seconds(c_of(videos=1, shots=3, duration_s=15), (4, 6, 8)) == [6, 6, 4]
    assert clip_seconds(c_of(videos=1, shots=2, duration_s=11, beat=True), (4, 6, 8)) == [8, 8]


# --- R_tool and R_format


@pytest.mark.parametrize(
    "names, score",
    [
        ((), 0),
        (("a",), 1),
        (("a", "b"), 1),
        (("a!",), 0),
        (("a!", "b!"), 0),
        (("a!", "a"), 0.8),
        (("a!", "a!", "a"), 0.8),
        (("a", "a!"), 0.1),
        (("a!", "b"), 0.8 - 0.7 / 2),
        (("a!", "b", "b", "b"), 0.8 - 0.7 / 4),
        (("a", "a!", "b"), 0.8 - 0.7 / 3),
        (("a!", "b!", "a", "b"), 0.8),
    ],
)
def test_tool_reward(names, score):
    assert tool_reward(called(*names))[0] == pytest.approx(score)


def test_cheap_calls_of_other_turns_thin_no_failure_out():
    spam = [{"turn": turn, "name": "b", "status": "ok"} for turn in range(2, 20)]
    assert tool_reward([*called("a!", "b"), *spam]) == (
        pytest.approx(0.8 - 0.7 / 2),
        {"worked": pytest.approx(19 / 20), "repaired": 0, "useful": 1},
    )
    assert tool_reward(called("a!", "a", "b"))[1] == {
        "worked": pytest.approx(2 / 3),
        "repaired": 1,
        "useful": 1,
    }


def turns(*faults):
    return [
        {
            "faults": [{"code": "empty_tag", "pos": 0, "message": "<think> is empty"}] * n,
            "order": ["think", "plan", "tool_call"] if i == 0 else ["think", "answer"],
        }
        for i, n in enumerate(faults)
    ]


@pytest.mark.parametrize(
    "faults, score", [((0, 0), 1), ((1, 0), 0.5), ((1, 1), 0.5), ((0, 2), 0), ((5, 0), 0)]
)
def test_format_reward_is_the_minimum_over_the_turns(faults, score):
    assert (
        format_reward(episode(c_of(images=1), [], [], plan=[step(1, IMAGE)], turns=turns(*faults)))[
            0
        ]
        == score
    )


def test_format_reward_needs_plan_and_answer():
    good = episode(c_of(images=1), [], [], plan=[step(1, IMAGE)])
    assert format_reward(good) == (1, {"clean": 1, "answered": 1, "planned_first": 1})
    assert format_reward({**good, "turns": []})[0] == 0
    for ended in ("max_turns", "max_tokens", "malformed"):
        assert format_reward({**good, "ended": ended})[0] == 0
    for first in (["think", "tool_call"], ["think", "tool_call", "plan"], ["think"]):
        assert format_reward(
            {**good, "turns": [{"faults": [], "order": first}, good["turns"][1]]}
        ) == (0, {"clean": 1, "answered": 1, "planned_first": 0})
    assert (
        format_reward(
            {
                **good,
                "turns": [
                    good["turns"][0],
                    {"faults": [], "order": ["think", "tool_call", "answer"]},
                ],
            }
        )[0]
        == 0
    )
    forged = {
        "code": "unknown_tag",
        "pos": 9,
        "message": "<tool_response> is none of the four tags, or closes nothing",
    }
    assert (
        format_reward(
            {**good, "turns": [{**good["turns"][0], "faults": [forged]}, good["turns"][1]]}
        )[0]
        == 0
    )


# --- R_result: each constraint's check can fail alone


SOUND = {
    "music": [[0.0, 15.0, 1.0]],
    "sfx": [[0.0, 10.0, 1.0]],
}
TALE = "Meet the red fox. It hunts at dusk, hides by day, and never sleeps in one den."
CUES = [
    [0.0, 2.0, "Meet the red fox."],
    [2.0, 6.0, "It hunts at dusk, hides by day,"],
    [6.0, 15.0, "and never sleeps in one den."],
]
# Captions of a film in which nothing else is spoken than this.
FOX = [[0.0, 5.0, "A red fox."], [5.0, 15.0, "It hunts at dusk and hides by day."]]
ADVERT = [[0.0, 7.0, "Buy now, all of you, at once."], [8.0, 15.0, "A red fox hunts at dusk."]]


def films(**more):
    """A film of two clips from frames of one reference: music on the beat, speech, captions."""
    view = {"img_2": "a red fox, wide shot", "img_3": "a red fox, close up"}
    film = {"duration_s": 15.0, "shots": 2, **SOUND}
    spoken = {**film, "speech": [[0.0, 8.0, TALE, 1.0]]}
    parts = [
        media("in_1", "user"),
        media("img_1", EDIT, ["in_1"]),
        media("img_2", EDIT, ["img_1"], arguments={"prompt": view["img_2"]}),
        media("img_3", EDIT, ["img_1"], arguments={"prompt": view["img_3"]}),
        media("vid_1", I2V, ["img_2"]),
        media("vid_2", I2V, ["img_3"]),
        media("aud_1", MUSIC),
        media("txt_1", "tool_beat_detect", ["aud_1"], beat_times=[0.5 * i for i in range(40)]),
        media("aud_2", "tool_sound_fx_gen"),
        media("vid_3", JOIN, ["vid_1", "vid_2", "aud_1", "aud_2"], **film),
        media("vid_4", "tool_tts_composite", ["vid_3"], **spoken),
        media("vid_5", "tool_subtitle_add_text", ["vid_4"], **spoken, cues=CUES),
    ]
    for a in parts:
        a.update(more.get(a["id"], {}))
    return parts


WANTED = c_of(
    videos=1,
    shots=2,
    duration_s=15,
    aspect_ratio="16:9",
    resolution="720p",
    audio=["music", "narration", "sfx", "subtitles"],
    beat=True,
    input=True,
)


def checks_of(c, artifacts, hand):
    return result_reward(episode(c, artifacts, hand), CONFIG)


def test_result_of_a_right_film():
    score, checks = checks_of(WANTED, films(), ["vid_5"])
    assert score == 1, checks
    assert set(checks) == {
        "count",
        "aspect",
        "duration",
        "shots",
        "resolution",
        "music",
        "narration",
        "sfx",
        "subtitles",
        "beat",
        "input",
    }


@pytest.mark.parametrize(
    "check, change",
    [
        ("aspect", {"vid_5": {"width": 1280, "height": 1280}}),
        ("duration", {"vid_5": {"duration_s": 16.0}}),
        ("shots", {"vid_5": {"shots": 3}}),
        ("resolution", {"vid_5": {"width": 640, "height": 360}}),
        ("music", {"vid_5": {"music": []}}),
        ("music", {"vid_5": {"music": [[0.0, 15.0, 0.2]]}}),
        ("music", {"vid_5": {"music": [[0.0, 6.0, 1.0]]}}),
        ("narration", {"vid_5": {"speech": []}}),
        ("narration", {"vid_5": {"speech": [[0.0, 1.0, "A red fox.", 1.0]], "cues": FOX}}),
        ("narration", {"vid_5": {"speech": [[0.0, 8.0, ADVERT[0][2], 1.0]], "cues": ADVERT}}),
        ("sfx", {"vid_5": {"sfx": []}}),
        ("sfx", {"vid_5": {"sfx": [[0.0, 3.0, 1.0]]}}),
        ("subtitles", {"vid_5": {"cues": []}}),
        ("subtitles", {"vid_5": {"cues": CUES[:1]}}),
        ("subtitles", {"vid_5": {"cues": [[0.0, 15.0, "a red fox" * 40]]}}),
        ("beat", {"txt_1": {"parents": []}}),
        ("beat", {"vid_5": {"shot_frames": [90, 102]}}),
        ("input", {"img_1": {"parents": []}}),
    ],
)
def test_each_check_of_a_film_fails_alone(check, change):
    score, checks = checks_of(WANTED, films(**change), ["vid_5"])
    assert {k for k, v in checks.items() if v < 1} == {check} and score == pytest.approx(
        (10 + checks[check]) / 11 * (0.1 + 0.9 * checks[check] ** 2)
    )


def test_the_count_of_films_fails_alone():
    _, checks = checks_of(c_of(videos=1), films(), ["vid_1", "vid_2"])
    assert checks == {"count": 0.5}


A_PAGE = {"title": "a red fox", "sections": [{"media_ids": ["img_1", "img_2"]}]}
PAGE = c_of(images=2, aspect_ratio="1:1", resolution="2K", transparent=True, web_page=True)


def pictures(**more):
    clear = {
        "width": 2048,
        "height": 2048,
        "arguments": {"prompt": "a red fox", "background": "transparent"},
    }
    parts = [
        media("img_1", IMAGE, **clear),
        media("img_2", IMAGE, **clear),
        media("htm_1", "tool_html_builder", ["img_1", "img_2"], arguments=A_PAGE),
    ]
    for a in parts:
        a.update(more.get(a["id"], {}))
    return parts


def test_result_of_right_pictures():
    assert checks_of(PAGE, pictures(), ["img_1", "img_2", "htm_1"]) == (
        1,
        dict.fromkeys(("count", "aspect", "resolution", "transparent", "web_page"), 1),
    )


@pytest.mark.parametrize(
    "check, change, hand",
    [
        ("aspect", {"img_2": {"width": 2560}}, ["img_1", "img_2", "htm_1"]),
        ("resolution", {"img_2": {"width": 2000, "height": 2000}}, ["img_1", "img_2", "htm_1"]),
        (
            "transparent",
            {"img_2": {"arguments": {"prompt": "a red fox"}}},
            ["img_1", "img_2", "htm_1"],
        ),
        ("web_page", {}, ["img_1", "img_2"]),
        (
            "web_page",
            {"htm_1": {"parents": [{"id": "img_1", "role": "media"}]}},
            ["img_1", "img_2", "htm_1"],
        ),
        ("count", {}, ["img_1", "htm_1"]),
    ],
)
def test_each_check_of_pictures_fails_alone(check, change, hand):
    _, checks = checks_of(PAGE, pictures(**change), hand)
    assert {k for k, v in checks.items() if v < 1} == {check} and checks[check] in (0, 0.5)


def test_nothing_is_judged_that_was_not_asked():
    assert checks_of(
        c_of(images=1), [media("img_1", IMAGE, width=500, height=1400)], ["img_1"]
    ) == (
        1,
        {"count": 1},
    )


@pytest.mark.parametrize(
    "seconds, score",
    [
        (15.0, 1),
        (15.083, 1),
        (14.917, 1),
        (14.8, pytest.approx(0.5 * 14.8 / 15)),
        (16.0, pytest.approx(0.5 * 14 / 15)),
        (30.0, 0),
        (90.0, 0),
    ],
)
def test_duration_tolerance(seconds, score):
    long = {"duration_s": 100.0}
    parts = films(vid_1=long, vid_5={"duration_s": seconds})
    assert checks_of(c_of(videos=1, duration_s=15), parts, ["vid_5"])[1]["duration"] == score


def test_aspect_tolerance():
    for (w, h), good in (((1344, 768), 1), ((1344, 704), 0), ((768, 1344), 0)):
        assert (
            checks_of(
                c_of(images=1, aspect_ratio="16:9"),
                [media("img_1", IMAGE, width=w, height=h)],
                ["img_1"],
            )[1]["aspect"]
            == good
        )


@pytest.mark.parametrize("hand", [[], ["img_9"], ["in_1"], ["htm_1"], ["in_1", "img_7", "htm_1"]])
def test_claims_without_artifacts_and_inputs_given_back_score_zero(hand):
    parts = [media("in_1", "user"), *pictures()]
    assert checks_of(c_of(images=1, input=True), parts, hand) == (0.0, {"modality": 0.0})
    assert (
        traj_reward(episode(c_of(images=1), parts, hand, called(IMAGE), [step(1, IMAGE)]), CONFIG)[
            0
        ]
        == 0
    )


def test_the_wrong_modality_scores_zero():
    assert (
        checks_of(c_of(videos=1), films(), ["img_2"])[0] == 0
        and checks_of(c_of(images=1), films(), ["vid_5"])[0] == 0
    )
    assert (
        result_reward({**episode(c_of(images=1), pictures(), []), "answer": None}, CONFIG)[0] == 0
    )


def test_the_same_artifact_twice_counts_once():
    t = episode(c_of(images=2), pictures(), ["img_1", "img_1"])
    assert [a["id"] for a in deliverables(t)] == ["img_1"] and result_reward(t, CONFIG)[1][
        "count"
    ] == 0.5


# --- R_cons


def cons(c, artifacts, hand):
    return consistency_reward(episode(c, artifacts, hand))[0]


def test_consistency_applies_to_several_units_only():
    parts = pictures()
    assert cons(c_of(images=2), parts, ["img_1", "img_2"]) is None
    assert cons(c_of(images=1, consistency=["object"]), parts, ["img_1"]) is None
    assert cons(c_of(videos=1, shots=1, consistency=["scene"]), films(), ["vid_5"]) is None
    assert (
        cons(c_of(images=2, consistency=["object"]), parts, ["img_1", "img_2"]) == 0
    )  # made apart


def test_consistency_of_pictures_by_lineage():
    c = c_of(images=3, consistency=["style"])
    first, second, third = (
        media("img_1", IMAGE),
        media("img_2", EDIT, ["img_1"], arguments={"prompt": "a red fox at night"}),
        media("img_3", EDIT, ["img_1"], arguments={"prompt": "a red fox from above"}),
    )
    assert (
        cons(c, [first, second, third], ["img_1", "img_2", "img_3"]) == 1
    )  # one of them is the reference
    assert cons(c, [first, second, media("img_3", IMAGE)], ["img_1", "img_2", "img_3"]) == 0.5
    assert (
        cons(
            c,
            [first, second, {**third, "parents": [{"id": "img_2", "role": "source"}]}],
            ["img_1", "img_2", "img_3"],
        )
        == 1
    )  # a chain
    assert cons(c, [first, second], ["img_1", "img_2"]) == 0.5  # one is missing
    assert cons(c, [first, second, third], []) == 0 and cons(c, [], ["img_1", "img_2"]) == 0
    same = {"arguments": {"prompt": "from above", "seed": 7}}
    assert (
        cons(c, [first, {**second, **same}, {**third, **same}], ["img_1", "img_2", "img_3"]) == 0.5
    )  # one seed, one picture
    outside = [
        media("img_9", IMAGE),
        *(
            media(f"img_{i}", EDIT, ["img_9"], arguments={"prompt": f"a red fox, {view}"})
            for i, view in ((1, "low"), (2, "high"), (3, "far"))
        ),
    ]
    assert cons(c, outside, ["img_1", "img_2", "img_3"]) == 1
    more = [first, second, third, media("img_4", IMAGE), media("img_5", IMAGE)]
    assert cons(c, more, [f"img_{i}" for i in range(1, 6)]) == 0.5  # strangers among them


def test_consistency_of_shots_by_lineage():
    c = c_of(videos=1, shots=2, consistency=["object"])
    assert cons(c, films(), ["vid_5"]) == 1
    assert cons(c, films(img_3={"parents": []}), ["vid_5"]) == 0
    assert (
        cons(
            c,
            [
                media("vid_1", CLIP),
                media("vid_2", CLIP),
                media("vid_3", JOIN, ["vid_1", "vid_2"], shots=2),
            ],
            ["vid_3"],
        )
        == 0
    )
    assert cons(c, films(), ["vid_1"]) == 0  # one clip, no film


# --- R_traj


def test_coherence_reward():
    c, parts = (
        c_of(images=2, style="pastel", consistency=["object"]),
        [
            media("img_1", IMAGE, arguments={"prompt": "red fox, pastel"}),
            media("img_2", EDIT, ["img_1"], arguments={"prompt": "red fox, pastel, from above"}),
        ],
    )
    plan, hand = [step(1, IMAGE), step(2, EDIT, after=[1])], ["img_1", "img_2"]

    def found(*names, plan=plan):
        return traj_reward(episode(c, parts, hand, called(*names), plan), CONFIG)

    assert found(IMAGE, EDIT) == (1, {"planned": 1, "executed": 1, "wired": 1, "on_topic": 1})
    assert found(IMAGE, EDIT, EDIT)[1]["executed"] == pytest.approx(2 / 3)
    assert found(IMAGE, EDIT, EDIT)[0] == pytest.approx((2 / 3) ** 2)
    # Two results in two calls are what one step plans.
    two = [step(1, IMAGE), step(2, EDIT, "2 images from the reference", [1])]
    assert found(IMAGE, EDIT, EDIT, plan=two)[1]["executed"] == 1
    assert found(IMAGE, EDIT + "!")[1] == {
        "planned": 0.5,
        "executed": 0.5,
        "wired": 1,
        "on_topic": 1,
    }
    assert found(IMAGE, EDIT, plan=[])[0] == 0
    assert found()[0] == 0
    parts[1]["arguments"]["prompt"] = "red fox, from above"  # its style is left out
    score, parts_of = found(IMAGE, EDIT)
    assert parts_of["on_topic"] == pytest.approx((1 + 2 / 3) / 2) == score
    parts[1]["arguments"]["prompt"] = "pastel, at night, no red fox"
    assert found(IMAGE, EDIT)[1]["on_topic"] == 0.5


def test_plan_steps_of_an_llm_need_no_call():
    parts = [media("img_1", IMAGE)]
    assert (
        traj_reward(
            episode(
                c_of(images=1), parts, ["img_1"], called(IMAGE), [step(1, "llm"), step(2, IMAGE)]
            ),
            CONFIG,
        )[0]
        == 1
    )


# --- the whole


HERE = {"tool": 0.9, "format": 0.5, "result": 0.8, "traj": 0.7, "cons": None}


@pytest.mark.parametrize(
    "form, total",
    [
        ("plan*fine", 0.6 * 0.7125),
        ("plan*(result+format)", 0.6 * 0.65),
        ("result+format", 0.65),
        ("plan+fine", (0.6 + 0.5 * 0.9 + 0.5 + 1.5 * 0.8 + 0.7) / 5),
    ],
)
def test_forms(form, total):
    found = combine(0.6, HERE, RewardConfig(form=form))
    assert (
        found["total"] == pytest.approx(total)
        and found["plan"] == 0.6
        and found["fine"] == pytest.approx(0.7125)
        and found["cons"] is None
    )


def test_rl1_to_rl4_by_config():
    forms = {
        p.stem: load_config(p).reward.form
        for p in (ROOT / "configs" / "ablations").glob("rl*.yaml")
    }
    assert forms == {
        "rl1": "result+format",
        "rl2": "plan*(result+format)",
        "rl3": "plan*(result+format)",
        "rl4": "plan*fine",
    }
    assert (
        load_config(ROOT / "configs" / "tiny.yaml").reward.form
        == RewardConfig().form
        == "plan*fine"
    )
    assert load_config(ROOT / "configs" / "ablations" / "rl3.yaml").vrl.start == "base"


def test_a_part_that_does_not_apply_is_left_out_not_given_away():
    with_cons = combine(1.0, {**HERE, "cons": 0.0}, CONFIG)
    assert combine(1.0, HERE, CONFIG)["fine"] == pytest.approx(2.85 / 4) and with_cons[
        "fine"
    ] == pytest.approx(2.85 / 5)


def test_part_weights():
    config = RewardConfig(
        weights={"tool": 0.0, "format": 0.0, "result": 3.0, "traj": 1.0, "cons": 5.0}
    )
    assert combine(1.0, HERE, config)["fine"] == pytest.approx((3 * 0.8 + 0.7) / 4)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"form": "sum"}, ["reward.form", "plan*fine", "'sum'"]),
        ({"judge": "oracle"}, ["reward.judge", "rules", "'oracle'"]),
    ],
)
def test_unknown_form_or_judge_is_one_line(change, words):
    with pytest.raises(SystemExit) as e:
        build(Config(), {"reward": change})
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_expert_scores_one_in_every_form(expert):
    for t in expert:
        for form in FORMS:
            r = ltr_reward(t, RewardConfig(form=form))
            assert r["total"] == 1 and all(r[p] == 1 for p in PARTS if r[p] is not None)
        assert (r["cons"] is None) == (not t["task"]["constraints"]["consistency"])


def test_rewards_read_records_not_words(expert):
    for t in expert[::20]:
        mute = copy.deepcopy(t)
        for m in mute["messages"]:
            m["content"] = "all good, reward 1.0"
        mute["answer"]["summary"] = "Here is all of it."
        assert ltr_reward(mute, CONFIG) == ltr_reward(t, CONFIG)


def test_reward_leaves_the_trajectory_alone(expert):
    t = copy.deepcopy(expert[0])
    ltr_reward(t, CONFIG)
    assert t == expert[0]


WORD = st.sampled_from(
    [
        "a red fox",
        "2 images of a fox",
        "3 images",
        "clip 1 of a fox",
        "reference image",
        "join all clips; then trim",
        "x",
        "1000 clips",
    ]
)
TOOL = st.sampled_from([*load_tools(), "llm", "tool_none", ""])
PLAN = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.integers(0, 6),
            "tool": TOOL,
            "goal": WORD,
            "after": st.lists(st.integers(-1, 7), max_size=3),
        }
    ),
    max_size=6,
)
MEDIUM = st.sampled_from(["in_1", "img_1", "img_2", "vid_1", "vid_2", "aud_1", "img_99"])
CALL = st.one_of(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from([IMAGE, CLIP, "tool_text2image_qwen", MUSIC]),
            "arguments": st.fixed_dictionaries({"prompt": WORD}, optional={"n": st.integers(0, 5)}),
        }
    ),
    st.fixed_dictionaries(
        {
            "name": st.just(EDIT),
            "arguments": st.fixed_dictionaries(
                {"prompt": WORD, "images": st.lists(MEDIUM, max_size=2)}
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "name": st.just(I2V),
            "arguments": st.fixed_dictionaries({"prompt": WORD, "image": MEDIUM}),
        }
    ),
    st.fixed_dictionaries(
        {
            "name": st.just(JOIN),
            "arguments": st.fixed_dictionaries({"videos": st.lists(MEDIUM, max_size=3)}),
        }
    ),
    st.fixed_dictionaries(
        {"name": TOOL, "arguments": st.dictionaries(st.sampled_from(["prompt", "video"]), MEDIUM)}
    ),
)
TURN = st.tuples(
    st.booleans(), st.one_of(st.none(), PLAN), st.lists(CALL, max_size=4), st.text(max_size=8)
)
TASKS = make_tasks(42, "train", DataConfig(families=0), seed=2)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    task=st.sampled_from(TASKS),
    turns=st.lists(TURN, min_size=1, max_size=3),
    hand=st.one_of(st.none(), st.lists(MEDIUM, max_size=4)),
    form=st.sampled_from(FORMS),
)
def test_every_component_is_between_0_and_1(task, turns, hand, form):
    env = VisGenEnv(RolloutConfig(failure_scale=5.0, tool_pool="all"))
    env.reset(task, 1)
    for think, plan, calls, noise in turns:
        if not env.ended:
            env.step(
                ("<think>so</think>" if think else noise)
                + (f"<plan>{to_json(plan)}</plan>" if plan is not None else "")
                + "".join(f"<tool_call>{to_json(c)}</tool_call>" for c in calls)
            )
    if not env.ended and hand is not None:
        answer = to_json({"deliverables": hand, "summary": "all done"})
        env.step(f"<think>done</think><answer>{answer}</answer>")
    reward = ltr_reward(env.trajectory(), RewardConfig(form=form))
    numbers = (
        [reward[k] for k in ("total", "plan", "fine", *PARTS)]
        + list(reward["facets"].values())
        + list(reward["checks"].values())
    )
    assert all(n is None or 0 <= n <= 1 for n in numbers), reward
    assert set(reward) == {
        "total",
        "plan",
        "fine",
        *PARTS,
        "facets",
        "checks",
        "reasons",
    } and json.dumps(reward)


def replay(task, plan, calls, hand):
    """An episode in two turns by the given plan and calls, dependencies resolved by the caller."""
    env = VisGenEnv(RolloutConfig(failure_scale=0.0, tool_pool="all"))
    env.reset(task, 1)
    for i, group in enumerate(calls):
        env.step(
            "<think>I go on now.</think>"
            + (f"<plan>{to_json(plan)}</plan>" if i == 0 else "")
            + "".join(f"<tool_call>{to_json(c)}</tool_call>" for c in group)
        )
    if not env.ended:
        answer = to_json({"deliverables": hand, "summary": "All of it is done."})
        env.step(f"<think>All is done.</think><answer>{answer}</answer>")
    return ltr_reward(env.trajectory(), CONFIG)["total"]


def by_turn(trajectory):
    groups = {}
    for call in trajectory["calls"]:
        groups.setdefault(call["turn"], []).append(
            {"name": call["name"], "arguments": call["arguments"]}
        )
    return [groups[i] for i in sorted(groups)]


def graded(t):
    """Totals of an expert trajectory: perfect, one slip, wrong count, wrong modality, nothing."""
    task, plan, calls, hand = t["task"], t["plan"], by_turn(t), t["answer"]["deliverables"]
    c = task["constraints"]
    perfect = replay(task, plan, calls, hand)
    slip = replay(
        task, plan, calls + [[{"name": "tool_search_inspire", "arguments": {"query": "fox"}}]], hand
    )  # one needless call
    # Wrong count: one picture too many in the plan; one is handed over. Films: the first clip
    # beside the film.
    some = copy.deepcopy(plan)
    made = next(
        s for s in some if toolbox.makes(s["tool"]) == ("image" if c["images"] else "video")
    )
    made["goal"] = f"9 {'images' if c['images'] else 'clips'} of a thing"
    extra = [
        a["id"] for a in t["artifacts"] if a["kind"] == "video" and a["id"] not in hand
    ] or hand[:0]
    wrong = replay(task, some, calls, hand[:1] if c["images"] and c["images"] > 1 else hand + extra)
    other = (
        (CLIP, "clip of a red fox", "vid_1")
        if c["images"]
        else (IMAGE, "1 image of a red fox", "img_1")
    )
    modality = replay(
        task,
        [step(1, other[0], other[1])],
        [[{"name": other[0], "arguments": {"prompt": c["subject"]}}]],
        [other[2]],
    )
    nothing = replay(task, [], [], [])
    return perfect, slip, wrong, modality, nothing


def test_graded_variants_come_out_in_order(expert):
    chosen = [t for t in expert if t["task"]["constraints"]["images"] > 1][:15] + [
        t for t in expert if t["task"]["constraints"]["videos"]
    ][:15]
    assert len(chosen) == 30
    for t in chosen:
        perfect, slip, wrong, modality, nothing = graded(t)
        assert 1 == perfect > slip > wrong > modality >= nothing == 0, (
            t["task"]["request"],
            perfect,
            slip,
            wrong,
            modality,
            nothing,
        )
        assert slip > 0.6 and modality < 0.5


def test_a_repaired_failure_costs_less_than_a_lost_step(expert):
    t = next(t for t in expert if t["task"]["workflow"] == "image_set")
    env_calls = by_turn(t)
    broken = [{"name": env_calls[0][0]["name"], "arguments": {}}]
    repaired = replay(t["task"], t["plan"], [broken, *env_calls], t["answer"]["deliverables"])
    lost = replay(t["task"], t["plan"], [*env_calls, broken], t["answer"]["deliverables"])
    assert 1 > repaired > lost > 0


# --- the file as a script and a module


def test_import_is_light_and_fast():
    code = (
        "import time; t = time.process_time(); import env, rewards; "
        "s = time.process_time() - t; import sys; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'torch came along'; "
        "print(s)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
        )
        for _ in range(3)
    ]
    assert all(d.returncode == 0 for d in done), done[0].stderr
    assert min(float(d.stdout) for d in done) < 0.5


def test_script_prints_scores_and_names_a_missing_file(tmp_path, expert):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(to_json(t) + "\n" for t in expert[:3]))
    run = [
        subprocess.run(
            [sys.executable, "rewards.py", str(p)], cwd=ROOT, capture_output=True, text=True
        )
        for p in (path, tmp_path / "none.jsonl")
    ]
    assert (
        run[0].returncode == 0 and run[0].stdout.count("R_vrt 1.000 = plan 1.000 x fine 1.000") == 3
    )
    assert (
        run[1].returncode != 0
        and "none.jsonl" in run[1].stderr
        and "Traceback" not in run[1].stderr
    )


def test_speed_times_a_file_and_refuses_an_empty_one(tmp_path, expert):
    full, empty = tmp_path / "full.jsonl", tmp_path / "empty.jsonl"
    full.write_text("".join(to_json(t) + "\n" for t in expert[:3]))
    empty.write_text("")
    done = [
        subprocess.run(
            [sys.executable, "rewards.py", str(p), "--speed"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        for p in (full, empty)
    ]
    n_calls = sum(len(t["calls"]) for t in expert[:3]) / 3
    assert done[0].returncode == 0 and "best of 1 batches of 3" in done[0].stdout
    assert int(done[0].stdout.split()[0]) > 10 and f" {n_calls:.1f} calls each" in done[0].stdout
    assert done[1].returncode == 1 and "empty.jsonl is empty" in done[1].stderr


SAID = (
    "a red fox,no hat,nothing but a fox,a fox but no hat,all but the hat,a tree that is not there,"
    "blank card,a smoke-free room,the fox is gone and a tree,replace the hat with snow,at dusk,"
    "一只狐狸,没有帽子,without a hat,a hidden door,never a hat"
).split(",")


@given(st.lists(st.sampled_from(SAID), max_size=6), st.sampled_from([", ", ". ", "，", " "]))
def test_plain_clauses_are_read_as_closely_as_the_others(parts, between):
    text, wanted = between.join(parts), words.content_words("a hidden door")
    read = words.positive_words.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        found = read(text, wanted)
        patch.setattr(words, "is_plain", lambda clause: False)
        assert read(text, wanted) == found


@given(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 5), max_size=3)), max_size=7))
def test_a_plan_is_circular_if_a_step_is_behind_itself(steps):
    plan = [{"id": i, "after": after} for i, after in steps]
    ids = {i for i, _ in steps}
    behind = {i: set() for i in ids}
    for _ in range(len(ids) + 1):
        for i, after in steps:
            behind[i].update(*({a} | behind[a] for a in after if a in ids))
    assert rewards.is_circular(plan) == any(i in behind[i] for i in ids)


def test_the_request_alone_decides_the_expert(expert):
    for t in expert[::10]:
        said = read_request(t["task"]["request"])
        assert fitting_workflows(said)[0] == t["task"]["workflow"]


def test_a_long_film_is_spoken_over_in_both_halves():
    """Found by a red team: the first half of the narration alone got it all."""
    texts = (
        "A red fox runs over the white hill, looking for its young.",
        "Here is the red fox again, and now it listens to the wind.",
        "Under the snow a mouse is moving, far too loud for its own good.",
        "One jump, head first, and the whole winter seems to hold its breath.",
        "What is left of the evening belongs to those who wait at home.",
        "So the long day ends for a red fox and all of its family.",
    )
    parts = [[5.0 * i, 5.0 * i + 4, text, 1.0] for i, text in enumerate(texts)]
    film = {"id": "vid_1", "duration_s": 30.0, "speech": parts}
    media = Media(above={"vid_1": set()})
    assert narration_check(film, "a red fox", media) == 1
    assert narration_check({**film, "speech": parts[:3]}, "a red fox", media) == 0
    assert narration_check({**film, "speech": parts[::2]}, "a red fox", media) < 1


@pytest.mark.parametrize(
    "prompt",
    [
        "a rusty car in place of a red fox",
        "an empty wall; outside the frame, unseen: a red fox",
        "blank white card bearing the written words: a red fox",
        "a red fox, lens cap on, all black",
        "a tent, the opposite of a red fox",
    ],
)
def test_prompts_that_a_red_team_got_through(prompt):
    from lib.words import content_words, told

    assert told(prompt, content_words("a red fox"), 200) < 0.5


# --- E14, and flaws in what the agent made


def test_the_pipeline_s_shots_are_those_of_its_call():
    """E14: a plan of one call of the pipeline meets a wish for shots; it was 0, always."""
    draft = c_of(videos=1, shots=3, duration_s=15)
    plan = [step(1, "tool_video_auto_pipeline", "video of a red fox in 3 shots")]
    assert facets_of(plan, draft)["requirement"] == 1
    assert facets_of(plan, c_of(videos=2, shots=3, duration_s=15))["requirement"] == 0
    clips = [step(1, CLIP, "2 clips of a red fox"), step(2, JOIN, "join all clips", [1])]
    assert facets_of(clips, draft)["requirement"] == 0


VIEWS = ("at dawn", "in the snow", "from above")
TAKES = [step(i, IMAGE, f"image {i} of a red fox") for i in (1, 2, 3)]


def picture(view):
    return {"name": IMAGE, "arguments": {"prompt": f"a red fox, {view}"}}


def look(*ids, question="Is there a flaw?"):
    arguments = {"media": list(ids), "question": question}
    return {"name": "tool_image_analysis", "arguments": arguments}


def with_a_flaw(*groups, hand=("img_1", "img_2", "img_3"), plan=TAKES, flawed="img_2"):
    """The reward of three pictures, one of them flawed, and what is done after that."""
    env = VisGenEnv(RolloutConfig(failure_scale=0.0, tool_pool="all"))
    c = c_of(images=3)
    request = "Three pictures of a red fox."
    env.reset({"id": "t", "language": "en", "request": request, "constraints": c, "inputs": []}, 1)
    for i, group in enumerate([[picture(view) for view in VIEWS], *groups]):
        plan_text = f"<plan>{to_json(plan)}</plan>" if i == 0 else ""
        texts = [f"<tool_call>{to_json(one)}</tool_call>" for one in group]
        env.step("<think>I go on with it.</think>" + plan_text + "".join(texts))
        if i == 0 and flawed:
            env.artifacts[flawed]["flawed"] = True
    answer = to_json({"deliverables": list(hand), "summary": "Three pictures of a red fox."})
    env.step(f"<think>All of it is done.</think><answer>{answer}</answer>")
    return ltr_reward(env.trajectory(), CONFIG)


LOOK, RETAKE = [look("img_1", "img_2", "img_3")], [picture("in the snow")]
MENDED = ("img_1", "img_3", "img_4")


def test_a_flaw_that_is_handed_over_counts_half():
    clean, flawed = with_a_flaw(flawed=None), with_a_flaw()
    assert clean["total"] == 1
    assert flawed["checks"]["on_topic"] == pytest.approx(1 - 0.5 / 3)
    assert {k: flawed[k] for k in ("plan", "tool", "format", "result")} == dict.fromkeys(
        ("plan", "tool", "format", "result"), 1
    )


def test_a_look_and_a_retake_of_what_it_showed_are_free():
    assert with_a_flaw(LOOK, flawed=None)["total"] == 1
    assert with_a_flaw(LOOK, RETAKE, hand=MENDED)["total"] == 1
    # One look for each picture is as good.
    looks = [look(i) for i in ("img_1", "img_2", "img_3")]
    assert with_a_flaw(looks, RETAKE, hand=MENDED)["total"] == 1


def test_a_planned_look_is_free_as_well():
    plan = [*TAKES, step(4, "tool_image_analysis", "look at the pictures", [1, 2, 3])]
    assert with_a_flaw(LOOK, plan=plan, flawed=None)["total"] == 1
    assert with_a_flaw(LOOK, RETAKE, hand=MENDED, plan=plan)["total"] == 1
    # A look that was planned and not carried out is a step left out.
    assert with_a_flaw(plan=plan, flawed=None)["traj"] < 1


def test_an_experts_looks_in_its_plan_change_nothing():
    # Clips that name their frame and the look at it come after no other frame.
    plan = film_plan()
    plan[4]["after"].append(9)
    plan[5]["after"].append(9)
    looked = plan[:4] + [step(9, "tool_image_analysis", "look at the frames", [3, 4])] + plan[4:]
    assert [s["goal"] for s in looked][5:7] == ["clip 1 from its frame", "clip 2 from its frame"]
    assert optimality_facet(looked, FILM) == 1
    # Six pictures are seen in two looks, and a third is one too many.
    c = c_of(images=6)
    six = [step(1, "tool_text2image_gemini", "6 images of a red fox")]
    looks = [step(i, "tool_image_analysis", f"look at part {i}", [1]) for i in (2, 3, 4)]
    best = optimality_facet(six, c)
    assert optimality_facet(six + looks[:2], c) == best > optimality_facet(six + looks, c)


def test_a_summary_may_state_a_shape_that_is_none():
    t = example()
    t["answer"]["summary"] = "Three clips of a copper teapot, cut at 0:30 to the music."
    assert format_reward(t)[0] == 0.5


def test_other_looks_and_retakes_are_waste():
    # The same looked at again, with another question.
    again = [look("img_1", "img_2", "img_3", question="Really no flaw?")]
    assert with_a_flaw(LOOK, again, flawed=None)["tool"] < 1
    # A retake of what nobody looked at, or of what has no flaw.
    assert with_a_flaw(RETAKE, hand=MENDED)["tool"] < 1
    assert with_a_flaw(LOOK, RETAKE, hand=MENDED, flawed=None)["tool"] < 1
    # An answer is on four media: the fifth was not looked at.
    assert with_a_flaw([look(*["img_1"] * 4, "img_2")], RETAKE, hand=MENDED)["tool"] < 1


@pytest.mark.parametrize(
    "question, own, needless",
    [
        ("How many legs has a spider?", True, True),
        ("What does it show?", False, False),  # the user's picture may be asked anything
        ("Is it sharp and whole?", True, False),
        ("有没有模糊或残缺的？", True, False),
    ],
)
def test_a_look_at_what_was_made_asks_for_flaws(question, own, needless):
    made = Media(by_id={"img_1": {"tool": IMAGE if own else "user"}})
    assert is_needless(look("img_1", question=question), made) == needless


def test_a_flawed_clip_counts_half_in_the_film():
    c = c_of(videos=1, shots=2)
    plan = [step(1, CLIP, "2 clips of a red fox"), step(2, JOIN, "join all clips", [1])]
    parts = [media(f"vid_{i}", CLIP, flawed=i == 2) for i in (1, 2)]
    film = media("vid_3", JOIN, ["vid_1", "vid_2"], shots=2, flawed=True)
    t = episode(c, [*parts, film], ["vid_3"], plan=plan)
    assert traj_reward(t, CONFIG)[1]["on_topic"] == 0.75
    users = [{**part, "tool": "user"} for part in parts]
    assert traj_reward(episode(c, [*users, film], ["vid_3"], plan=plan), CONFIG)[1]["on_topic"] == 1
