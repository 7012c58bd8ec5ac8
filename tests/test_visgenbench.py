"""VisGenBench: its words are its own and can be read back; its tasks have Table 1's composition and
share nothing with training."""

import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.data_statistics import word_runs  # noqa: E402
from lib.experiment import DataConfig, load_config  # noqa: E402
from lib.families import load_families  # noqa: E402
from lib.reading import NO_CONSTRAINTS, clause_patterns, read_request  # noqa: E402
from lib.runs import ROOT, read_jsonl, seeded_rng, write_jsonl  # noqa: E402
from lib.scenarios import bench_book, load_scenarios, read_yaml  # noqa: E402
from lib.tasks import (  # noqa: E402
    BENCH,
    combination,
    count_phrase,
    fitting_styles,
    make_bench,
    make_tasks,
)
from lib.workflows import expand_workflow, fitting_workflows  # noqa: E402

OLD = load_scenarios("en")
NEW = yaml.safe_load((ROOT / "data" / "visgenbench.yaml").read_text(encoding="utf-8"))
WORDINGS = [(name, text) for name, texts in NEW["wordings"].items() for text in texts]
CLAUSES = [(kind, text) for kind, texts in NEW["clauses"].items() for text in texts]
SUBJECTS = [subject for group in NEW["subjects"].values() for subject in group]
STYLES = [style for group in NEW["styles"].values() for style in group]
FREE = NEW["creative"] + NEW["variety"]  # sentences that set no constraint
OLD_WORDINGS = sum((s["wordings"] for s in OLD["scenarios"].values()), OLD["frames"])
FILL = {"d": "7", "k": "three", "a": "4:3", "r": "1080p", "id": "in_1", "thing": "hero"}


def slots(text):
    return re.findall(r"{(\w+)}", text)


def kind_of(name):
    """The kind of constraint that a list of clauses states: durations are said in three ways."""
    return "duration" if name.startswith("duration") else name


def filled(clause):
    return re.sub(r"{(\w+)}", lambda m: FILL[m[1]], clause)


def sentences(request):
    """The sentences of a request, English or Chinese."""
    return [text for text in re.split(r"(?<=[.?!]) |(?<=[。？！])", request) if text]


def runs(text):
    """All runs of five consecutive words of a text, its slots left out."""
    words = re.findall(r"[\w'-]+", re.sub(r"{\w+}", " ", text).lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def reader_of(language):
    """Reads which kinds of clause a text states, as TaskAgent does."""
    patterns = clause_patterns(language)
    return lambda text: {
        kind
        for kind, several in patterns.items()
        if any(piece in text and re.search(p, text) for piece, p in several)
    }


@pytest.fixture(scope="module")
def reader():
    return reader_of("en")


def test_everything_is_there_once():
    assert set(NEW["subjects"]) == set(OLD["subjects"]) and len(SUBJECTS) >= 250
    assert set(NEW["styles"]) == set(OLD["styles"]) and len(STYLES) >= 50
    assert {k: len(v) for k, v in NEW["wordings"].items()} == dict.fromkeys(OLD["scenarios"], 4)
    assert set(NEW["clauses"]) == {*OLD["clauses"], "duration_each", "duration_sound"}
    assert min(map(len, NEW["clauses"].values())) >= 5
    assert [len(NEW[k]) for k in ("details", "creative", "variety")] == [60, 12, 12]
    for texts in (
        STYLES,
        SUBJECTS,
        NEW["details"],
        [t for _, t in WORDINGS],
        [t for _, t in CLAUSES] + FREE,
    ):
        assert [t for t, n in Counter(texts).items() if n > 1] == []


def test_phrases_are_readable_and_not_those_of_training():
    assert [
        s
        for s in STYLES
        if re.search(r"[.?!]|style", s)
        or " in " in f" {s} "
        or any(s in group for group in OLD["styles"].values())
    ] == []
    assert [
        s
        for s in SUBJECTS
        if not re.fullmatch(r"an? [^.?!:]+", s) or re.search(r"\b(in|with|and)\b", s)
    ] == []
    assert [
        d
        for d in NEW["details"]
        if not re.fullmatch(r"an? [^.?!:]+", d) or re.search(r"\b(in|with|and)\b", d)
    ] == []
    both, old, odd = (
        SUBJECTS + NEW["details"],
        sum(OLD["subjects"].values(), []),
        ("a one-eyed gondolier", "an hourglass"),
    )
    assert [
        p for p in both if p.startswith("an ") != (p.split()[1][0] in "aeiou") and p not in odd
    ] == []
    assert [pair for p in both for pair in [(p, o) for o in old if p in o or o in p]] == []
    assert [pair for pair in itertools.permutations(both, 2) if pair[0] in pair[1]] == []


def test_wordings_and_clauses_have_their_slots():
    for _, text in WORDINGS:
        assert sorted(slots(text)) == [
            "extras",
            "style",
            "subject",
            "what",
        ] and "style" not in text.replace("{style}", ""), text
        assert not re.search(r"\s{style}", text) and re.search(
            r"(^|[.?!] ){extras}($| (?=[A-Z{]))", text
        ), text
    for kind, text in CLAUSES:
        kind = kind_of(kind)
        assert slots(text) == slots(OLD["clauses"][kind][0]) and re.search(r"[.?!]$", text), text
    assert [t for t in FREE if slots(t) or not re.search(r"[.?!]$", t)] == []


def test_no_five_words_in_a_row_are_shared():
    old = set().union(
        *map(runs, [*OLD_WORDINGS, *OLD["asides"], *sum(OLD["clauses"].values(), [])])
    )
    mine = [t for _, t in WORDINGS + CLAUSES] + FREE
    assert len(old) > 10000 and not {t.lower() for t in mine} & {
        t.lower() for t in [*OLD_WORDINGS, *sum(OLD["clauses"].values(), [])]
    }
    assert [(t, " ".join(r)) for t in mine for r in runs(t) & old] == []
    assert [r for r, n in Counter(r for t in mine for r in runs(t)).items() if n > 1] == []


def test_a_clause_says_its_own_kind_alone(reader):
    assert [
        (kind, text, reader(filled(text)))
        for kind, text in CLAUSES
        if reader(filled(text)) != {kind_of(kind)}
    ] == []
    assert [(text, reader(text)) for text in FREE + [t for _, t in WORDINGS] if reader(text)] == []


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("styled", (True, False))
def test_every_wording_gives_back_subject_style_and_number(reader, n, styled):
    for i, (name, text) in enumerate(WORDINGS):
        rng, s = seeded_rng("bench words", n, styled, text), OLD["scenarios"][name]
        thing, details = SUBJECTS[i % len(SUBJECTS)], NEW["details"]
        subject = f"{thing} with {details[i % 60]} and {details[(i + 7) % 60]}"
        style = STYLES[i % len(STYLES)] if styled else None
        said = rng.sample(CLAUSES, 3) if i % 3 else []
        extras = " ".join(
            rng.sample([filled(t) for _, t in said] + rng.sample(FREE, 2), len(said) + 2)
        )
        phrase = count_phrase(rng, n, s["noun"], "en")
        request = " ".join(
            text.format(
                what=phrase,
                subject=subject,
                style=f" in {style} style" if styled else "",
                extras=extras,
            ).split()
        )
        c = read_request(request)
        assert (c["subject"], c["style"], c["images"] or c["videos"]) == (subject, style, n), (
            request
        )
        assert bool(c["images"]) == (s["modality"] == "image") and reader(request) == {
            kind_of(kind) for kind, _ in said
        }, request


# --- the Chinese words
ZH_OLD, ZH = load_scenarios("zh"), read_yaml("visgenbench_zh.yaml")
ZH_WORDINGS = [(name, text) for name, texts in ZH["wordings"].items() for text in texts]
ZH_CLAUSES = [(kind, text) for kind, texts in ZH["clauses"].items() for text in texts]
ZH_SUBJECTS = [subject for group in ZH["subjects"].values() for subject in group]
ZH_STYLES = [style for group in ZH["styles"].values() for style in group]
ZH_FREE = ZH["creative"] + ZH["variety"]
ZH_FILL = {"d": "7", "k": "三", "a": "4:3", "r": "1080p", "id": "in_1", "thing": "角色"}


def filled_zh(clause):
    return re.sub(r"{(\w+)}", lambda m: ZH_FILL[m[1]], clause)


def characters(text):
    """All runs of seven consecutive characters of a Chinese text, its slots left out."""
    pieces = re.split(r"{\w+}", text)
    return {piece[i : i + 7] for piece in pieces for i in range(len(piece) - 6)}


@pytest.fixture(scope="module")
def reader_zh():
    return reader_of("zh")


def test_the_chinese_words_are_there_once_and_their_own():
    assert len(ZH["wordings"]) >= 12 and set(ZH["wordings"]) <= set(ZH_OLD["scenarios"])
    assert min(map(len, ZH["wordings"].values())) >= 4
    assert set(ZH["clauses"]) == set(ZH_OLD["clauses"]) | {"duration_each"}
    used = {g for name in ZH["wordings"] for g in ZH_OLD["scenarios"][name]["subjects"]}
    assert used <= set(ZH["subjects"]) and set(ZH["styles"]) == set(ZH_OLD["styles"])
    texts = [t for _, t in ZH_WORDINGS + ZH_CLAUSES] + ZH_FREE
    for several in (texts, ZH_SUBJECTS, ZH_STYLES, ZH["details"]):
        assert len(set(several)) == len(several)
    for phrase in ZH_SUBJECTS + ZH["details"]:
        assert re.fullmatch("一[\u4e00-\u9fff]+", phrase), phrase
    of_training = sum(ZH_OLD["subjects"].values(), [])
    for one, other in itertools.product(ZH_SUBJECTS + ZH["details"], of_training):
        assert one not in other and other not in one, (one, other)
    assert not set(ZH_STYLES) & set(sum(ZH_OLD["styles"].values(), []))
    wordings = sum((s["wordings"] for s in ZH_OLD["scenarios"].values()), ZH_OLD["frames"])
    old = [*wordings, *ZH_OLD["asides"], *sum(ZH_OLD["clauses"].values(), [])]
    shown = set().union(*map(characters, old))
    assert [(text, run) for text in texts for run in characters(text) & shown] == []


def test_a_chinese_clause_says_its_own_kind_alone(reader_zh):
    for kind, text in ZH_CLAUSES:
        assert slots(text) == slots(ZH_OLD["clauses"][kind_of(kind)][0]), text
        assert reader_zh(filled_zh(text)) == {kind_of(kind)}, text
    assert [text for text in ZH_FREE + [t for _, t in ZH_WORDINGS] if reader_zh(text)] == []


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("styled", (True, False))
def test_every_chinese_wording_gives_back_subject_style_and_number(reader_zh, n, styled):
    for i, (name, text) in enumerate(ZH_WORDINGS):
        scenario, rng = ZH_OLD["scenarios"][name], seeded_rng("bench words zh", n, styled, text)
        thing = ZH["subjects"][scenario["subjects"][i % len(scenario["subjects"])]][i % 6]
        subject = ZH["detailed"].format(thing, *rng.sample(ZH["details"], 2)) if i % 2 else thing
        style = ZH_STYLES[i % len(ZH_STYLES)] if styled else None
        said = rng.sample(ZH_CLAUSES, 3)
        request = text.format(
            what=count_phrase(rng, n, scenario["noun"], "zh"),
            subject=subject,
            style=f"，{style}风格" if style else "",
            extras="".join([filled_zh(t) for _, t in said] + rng.sample(ZH_FREE, 2)),
        )
        c = read_request(request)
        assert (c["subject"], c["style"], c["images"] or c["videos"]) == (subject, style, n)
        assert reader_zh(request) == {kind_of(kind) for kind, _ in said}, request


def test_rubrics_ask_five_things_of_each_dimension():
    for modality in ("image", "video"):
        assert set(NEW["rubrics"][modality]) == {
            "creative",
            "match",
            "object",
            "scene",
            "style",
            "variety",
        }
        for dimension, items in NEW["rubrics"][modality].items():
            assert len(set(items)) == 5 and all(
                re.fullmatch(r"[A-Z][^?]*\?", item) for item in items
            )
            names = Counter(sum(map(slots, items), []))
            assert set(names) <= {"subject"} | (
                {"detail_1", "detail_2"} if dimension == "match" else set()
            )
            assert dimension != "match" or (names["detail_1"], names["detail_2"]) == (1, 1)
    assert set(NEW["rubrics"]) == {"image", "video"}


# --- the tasks


@pytest.fixture(scope="module")
def bench():
    return read_jsonl(BENCH)


@pytest.fixture(scope="module")
def training():
    """Requests of expert trajectories and of VRL, of the default size and at the paper's scale, in
    both languages."""
    configs = [
        DataConfig(),
        load_config(ROOT / "configs" / "visgen.yaml").data,
        DataConfig(languages=["zh"]),
    ]
    return [
        t
        for config in configs
        for split in ("visgen", "train")
        for t in make_tasks(1500, split, config, 5)
    ]


def test_the_file_is_what_the_command_writes(tmp_path):
    write_jsonl(tmp_path / "again.jsonl", make_bench())
    assert (
        (tmp_path / "again.jsonl").read_bytes() == BENCH.read_bytes()
    )  # else: python make_data.py bench, and a new version in the ids


def test_table_1_s_composition(bench):
    paper = {
        "image": dict(zip(NEW["rubrics"]["image"], [50] * 6)) | {"amount": 100},
        "video": dict(zip(NEW["rubrics"]["video"], [50] * 6))
        | {"amount": 100, "duration": 200, "storyboard": 200},
    }
    assert Counter((t["modality"], t["dimension"]) for t in bench) == {
        (m, d): n for m, row in paper.items() for d, n in row.items()
    }
    assert (
        len(bench) == 1200 == len({t["id"] for t in bench}) == len({t["request"] for t in bench})
        and len({t["scenario"] for t in bench}) >= 35
    )
    small = Counter((t["modality"], t["dimension"]) for t in bench if t["in_104"])
    assert sum(small.values()) == 104 and all(
        abs(small[m, d] - 104 * n / 1200) < 1 for m, row in paper.items() for d, n in row.items()
    )
    assert len({t["scenario"] for t in bench if t["in_104"]}) >= 35


def test_inputs_and_long_tasks(bench):
    """Pictures, clips and recordings of the user's; the steps are those of the expert's plan."""
    kinds = Counter(kind for t in bench for kind in {item["kind"] for item in t["inputs"]})
    assert kinds["image"] >= 120 and kinds["video"] >= 40 and kinds["audio"] >= 40
    assert kinds["text"]
    assert all(
        bool(t["inputs"]) == t["constraints"]["input"]
        for t in bench
        if not t["constraints"]["family"]
    )
    steps = [
        len(expand_workflow(fitting_workflows(t["constraints"])[0], t["constraints"]))
        for t in bench
    ]
    assert sum(n >= 20 for n in steps) >= 200


def test_a_sixth_of_the_tasks_is_chinese_in_every_stratum(bench):
    chinese = [t for t in bench if t["language"] == "zh"]
    assert len(chinese) == 200 and sum(t["in_104"] for t in chinese) >= 10
    assert len({t["scenario"] for t in chinese}) >= 12
    strata = Counter((t["modality"], t["dimension"]) for t in bench)
    for stratum, n in Counter((t["modality"], t["dimension"]) for t in chinese).items():
        assert abs(n - strata[stratum] / 6) < 1, stratum
    assert len({(t["modality"], t["dimension"]) for t in chinese}) == len(strata)
    for t in bench:
        assert bool(re.search("[\u4e00-\u9fff]", t["request"])) == (t["language"] == "zh"), t["id"]


def test_no_sentence_is_used_more_than_20_times(bench):
    """Wordings, clauses, and the sentences of families, creative and variety (D8)."""
    families = [text for f in load_families().values() for text in f["words"]["bench"]]
    most = 0
    for language in ("en", "zh"):
        book = bench_book(language)
        texts = sum((s["wordings"] for s in book["scenarios"].values()), families)
        texts += sum(book["clauses"].values(), []) + book["creative"] + book["variety"]
        requests = [t["request"] for t in bench if t["language"] == language]
        for text in texts:
            # A slot is whatever; two in a row, or one at an end, are left out with their spaces.
            pieces = [re.escape(p.strip()) for p in re.split(r"{\w+}", text) if p.strip(" .。")]
            pattern = re.compile(".*?".join(pieces))
            most = max(most, sum(bool(pattern.search(request)) for request in requests))
    assert 5 < most <= 20


def test_no_request_contradicts_itself(bench):
    """D7. Photographs stay photographs, and colours are not asked of what has none."""
    colour = r"\b(red|yellow|green|blue|purple|orange|pink|turquoise|golden)\b"
    monochrome = {"daguerreotype", "cyanotype", "collodion plate", "infrared film", "scratchboard"}
    for t in bench:
        book, c = bench_book(t["language"]), t["constraints"]
        scenario = book["scenarios"][t["scenario"]]
        if c["style"]:
            assert c["style"] in fitting_styles(book, scenario, c["subject"]), t["request"]
            assert not (c["style"] in monochrome and re.search(colour, c["subject"])), t["request"]
        if t["scenario"] == "realistic_photography" and c["style"]:
            assert c["style"] in book["styles"]["photo"] + book["styles"]["film"]
        if "music" in c["audio"]:
            assert not re.search(r"track (is )?(finished|done)|No music", t["request"])
        if c["videos"] > 1 and c["duration_s"]:
            said = book["clauses"]["duration_each"]
            assert any(s.format(d=c["duration_s"]) in t["request"] for s in said), t["request"]


def test_each_request_states_all_that_it_is_judged_by(bench):
    for t in bench:
        read, c = read_request(t["request"]), t["constraints"]
        assert {**read, "audio": sorted(read["audio"])} == {
            **c,
            "audio": sorted(c["audio"]),
        } and set(c) == set(NO_CONSTRAINTS), t["request"]
        asks = {
            "object": "object" in c["consistency"],
            "scene": "scene" in c["consistency"],
            "style": "style" in c["consistency"],
            "variety": c["images"] + c["videos"] > 1,
            "duration": c["duration_s"],
            "storyboard": c["shots"],
            "amount": c["images"] + c["videos"],
        }
        assert asks.get(t["dimension"], True), t["id"]
        if t["dimension"] in ("creative", "variety"):
            sentences = bench_book(t["language"])[t["dimension"]]
            assert any(sentence in t["request"] for sentence in sentences), t["id"]


def test_rubrics_belong_to_the_dimension_and_are_filled_in(bench):
    for t in bench:
        subjective = t["dimension"] in NEW["rubrics"]["image"]
        family = t["constraints"]["family"]
        of_family = load_families()[family]["rubric"] if family else []
        assert len(t["rubric"]) == (5 if subjective else 0) + len(of_family) and not any(
            re.search(r"[{}]", item) for item in t["rubric"]
        )
        if t["dimension"] == "match":
            form = {"en": r"with (an? .+?) and (an? .+)$", "zh": "、(一.+?)和(一.+)$"}
            details = re.findall(form[t["language"]], t["constraints"]["subject"])[0]
            assert all(any(d in item for item in t["rubric"]) for d in details)


def test_training_never_shows_its_words_subjects_or_combinations(bench, training):
    shown = "\n".join(t["request"] for t in training)
    bare = {re.split(r" with an? |、", t["constraints"]["subject"])[0] for t in bench}
    assert not [s for s in bare if s in shown] and not {
        t["constraints"]["style"] for t in bench
    } - {None} & {t["constraints"]["style"] for t in training}
    assert not {combination(t["constraints"]) for t in bench} & {
        combination(t["constraints"]) for t in training
    }
    said, shown = (
        {text for t in ts for text in sentences(t["request"])} for ts in (bench, training)
    )
    assert not said & shown


def test_n_gram_overlap_with_training_is_below_the_bound(bench, training):
    """Runs of five words: at most 2 % of the bench's occur in training; most name the thing ("one
    game adaptation film in")."""
    runs = set().union(*(word_runs(t["request"]) for t in training))
    of_bench = [word_runs(t["request"]) for t in bench]
    assert sum(len(r & runs) for r in of_bench) / sum(map(len, of_bench)) < 0.02


def test_held_out_and_bench_share_no_wording(bench):
    held = make_tasks(700, "heldout", DataConfig(languages=["en", "zh"]), 3)
    said, shown = ({text for t in ts for text in sentences(t["request"])} for ts in (bench, held))
    assert not said & shown
