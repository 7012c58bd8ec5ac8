"""The written English subjects and styles: form, splits, and what may stand together (D1, D7)."""

import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.experiment import DataConfig  # noqa: E402
from lib.reading import read_request  # noqa: E402
from lib.runs import seeded_rng  # noqa: E402
from lib.scenarios import bench_book, load_scenarios, split_list  # noqa: E402
from lib.tasks import count_phrase, fitting_styles, make_tasks  # noqa: E402

BOOK = load_scenarios("en")
SUBJECTS = [subject for group in BOOK["subjects"].values() for subject in group]
STYLES = [style for group in BOOK["styles"].values() for style in group]


def reachable(scenario, kind):
    """All subjects or styles of a task type's groups."""
    return [item for group in scenario[kind] for item in BOOK[kind][group]]


def test_there_is_enough_of_everything():
    assert len(SUBJECTS) >= 1000 and len(STYLES) >= 130
    for name, scenario in BOOK["scenarios"].items():
        assert min(len(BOOK["subjects"][group]) for group in scenario["subjects"]) >= 30, name
        assert len(reachable(scenario, "subjects")) >= 60, name
        assert len(reachable(scenario, "styles")) >= 20, name
    used = {group for s in BOOK["scenarios"].values() for group in s["subjects"]}
    assert used == set(BOOK["subjects"])
    assert {g for s in BOOK["scenarios"].values() for g in s["styles"]} == set(BOOK["styles"])


def test_subjects_are_readable_phrases():
    vowel = re.compile("[aeiou]", re.I)
    nouns = [noun for s in BOOK["scenarios"].values() for noun in s["noun"]]
    for subject in SUBJECTS:
        article, first, *_ = words = subject.split()
        assert re.fullmatch(r"an? [\w' -]+", subject) and 2 <= len(words) <= 7, subject
        assert (article == "an") == bool(vowel.match(first)), subject
        assert not re.search(r"\b(in|and|with)\b", subject), subject
        assert not [n for n in nouns if re.search(rf"\b{re.escape(n)}\b", subject, re.I)], subject
    for style in STYLES:
        assert re.fullmatch(r"[\w -]+", style) and "style" not in style, style
        assert not re.search(r"\b(in|with)\b", style), style


def test_nothing_stands_there_twice():
    bench = bench_book()
    assert not [x for x, n in Counter(SUBJECTS + STYLES).items() if n > 1]
    for one, other in itertools.permutations(SUBJECTS, 2):
        assert one not in other, (one, other)
    last_words = Counter(subject.split()[-1].lower() for subject in SUBJECTS)
    assert not [word for word, n in last_words.items() if n > 2]
    for subject in itertools.chain(*bench["subjects"].values()):
        assert not [s for s in SUBJECTS if s in subject or subject in s], subject
    for style in itertools.chain(*bench["styles"].values()):
        assert style not in STYLES, style


def test_splits_share_nothing():
    for kind, share in (("subjects", 5), ("styles", 6)):
        for name, group in BOOK[kind].items():
            parts = [split_list(group, len(group) // share, s) for s in ("visgen", "train")]
            parts.append(split_list(group, len(group) // share, "heldout"))
            assert all(parts), name
            assert len({item for part in parts for item in part}) == sum(map(len, parts)), name
            assert sum(map(len, parts)) == len(group), name


# ---------------------------------------------------------------------------- what goes together
# Written for this test, and not the patterns of the data.
COLOURS = "red orange yellow green blue purple pink turquoise golden colour".split()
COLOURLESS = [
    "film noir",
    "newsreel",
    "black and white photography",
    "silver gelatin print",
    "tintype",
    "charcoal sketch",
    "graphite pencil",
    "line art",
    "chalkboard",
    "single line",
]


def test_no_pair_of_a_task_type_contradicts_itself():
    """Every subject with every style that its task type gives it: 600,000 pairs."""
    pairs = 0
    barred = set()
    for scenario in BOOK["scenarios"].values():
        every = reachable(scenario, "styles")
        for subject in reachable(scenario, "subjects"):
            styles = fitting_styles(BOOK, scenario, subject)
            pairs += len(styles)
            assert len(styles) >= 10, (subject, styles)
            barred |= {(subject, style) for style in set(every) - set(styles)}
            if any(colour in subject.split() for colour in COLOURS):
                assert not set(styles) & set(COLOURLESS), subject
    assert pairs > 300_000
    assert ("a red panda asleep", "charcoal sketch") in barred
    assert ("a copper teapot", "film noir") not in barred


def test_photographs_are_of_what_there_is_and_marks_are_drawn():
    scenarios = BOOK["scenarios"]
    imagined = {"figure", "hero", "world"}
    for name in ("realistic_photography", "movies", "short_dramas", "concert_recordings"):
        assert not imagined & set(scenarios[name]["subjects"]), name
        assert set(scenarios[name]["styles"]) <= {"photo", "film"}, name
    assert scenarios["product_images"]["styles"] == ["photo"]
    for name in ("logo_design", "icon_design", "static_emoji", "dynamic_comics", "picture_book"):
        assert not {"photo", "film"} & set(scenarios[name]["styles"]), name


def test_no_music_video_says_that_its_music_is_there():
    """Beside such a sentence, a wish for music is a contradiction."""
    there = re.compile(
        r"\b(song|track|tune|ballad|single|album)\b[^.]*"
        r"\b(done|finished|ready|recorded|mixed|out)\b"
    )
    assert there.search("The new song is done, the clip isn't.")
    for name, scenario in BOOK["scenarios"].items():
        if "music" in scenario["audio"]:
            assert not [w for w in scenario["wordings"] if there.search(w)], name
    assert not [text for text in BOOK["frames"] + BOOK["asides"] if there.search(text)]


def test_a_wording_names_no_screen_of_another_shape():
    """Nor the face of a singer whom another sentence wants to stay the same."""
    upright, lying = {"9:16", "3:4", "2:3"}, {"16:9", "21:9", "4:3", "3:2"}
    named = {"for phones|mobile": lying, "billboard|cinema|big screen": upright}
    for name, scenario in BOOK["scenarios"].items():
        for wording in scenario["wordings"]:
            for words, other in named.items():
                clash = re.search(words, wording, re.I) and other & set(scenario["aspects"])
                assert not clash, (name, wording)
            assert f"{scenario['consistency_word']} never appears" not in wording, wording


@pytest.mark.parametrize("split", ["visgen", "train", "heldout"])
def test_drawn_tasks_keep_to_their_groups(split):
    for task in make_tasks(420, split, DataConfig(), seed=11):
        scenario, c = BOOK["scenarios"][task["scenario"]], task["constraints"]
        assert c["subject"] in reachable(scenario, "subjects"), task["request"]
        assert c["style"] is None or c["style"] in fitting_styles(BOOK, scenario, c["subject"])


# ---------------------------------------------------------------------------- reading it back
def test_every_subject_and_style_reads_back_in_every_task_type():
    for name, scenario in BOOK["scenarios"].items():
        subjects = reachable(scenario, "subjects")
        styles = reachable(scenario, "styles")
        rng = seeded_rng("read back", name)
        for i in range(max(len(subjects), len(styles))):
            subject, style = subjects[i % len(subjects)], styles[i % len(styles)]
            request = scenario["wordings"][i % len(scenario["wordings"])].format(
                what=count_phrase(rng, 1, scenario["noun"], "en"),
                subject=subject,
                style=BOOK["grammar"]["style"].format(style),
                extras="Be bold." if i % 2 else "",
            )
            c = read_request(" ".join(request.split()))
            assert (c["subject"], c["style"]) == (subject, style), request


def test_no_tool_blocks_a_subject_or_a_style():
    words = blocked_words()
    assert "toddler" in words and len(words) > 10
    for text in SUBJECTS + STYLES:
        assert not [w for w in words if re.search(rf"\b{re.escape(w)}", text, re.I)], text


def blocked_words():
    """All words that some tool's moderation blocks unless told otherwise (tools.yaml)."""
    import yaml

    text = (Path(__file__).resolve().parents[1] / "tools.yaml").read_text(encoding="utf-8")
    lists = find_key(yaml.safe_load(text), "blocked_words")
    return [word for topic, words in lists.items() if topic != "person" for word in words]


def find_key(tree, key):
    """What stands under the first `key` of a tree of dicts."""
    if not isinstance(tree, dict):
        return None
    if key in tree:
        return tree[key]
    return next((found for value in tree.values() if (found := find_key(value, key))), None)
