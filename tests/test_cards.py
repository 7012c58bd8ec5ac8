"""Stand-ins as storyboard cards: what is written on them, and who looks like whom."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import cards, pages  # noqa: E402
from lib.cards import NOTE, card, clips_of_shots, font_of, with_cards, wrapped  # noqa: E402
from lib.experiment import Config  # noqa: E402
from lib.runs import ROOT, read_jsonl  # noqa: E402


@pytest.fixture(scope="module")
def film():
    """A trajectory whose film of three shots goes back to one reference."""
    return read_jsonl(ROOT / "data" / "example.jsonl")[0]


@pytest.fixture
def written(monkeypatch):
    """Every text that is drawn."""
    found, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, at, said, *args, **more):
        found.append(said)
        return draw_text(self, at, said, *args, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


def by_id(trajectory):
    return {a["id"]: a for a in trajectory["artifacts"]}


def picture(**more):
    """The record of a picture without an episode."""
    record = {"id": "img_1", "kind": "image", "width": 640, "height": 360, "shots": None}
    return {**record, "arguments": {"prompt": "a fox"}, "parents": [], **more}


def test_a_film_shows_the_card_of_each_shot(film, written):
    """Its number, the prompt of its clip, what it goes back to, and that no picture was made."""
    made = by_id(film)
    for shot in range(3):
        written.clear()
        card(with_cards(made["vid_4"], film), shot, 3)
        said = " ".join(written)
        assert f"vid_4, shot {shot + 1} of 3" in written and NOTE in written
        assert f"vid_{shot + 1} from img_{shot + 2} from img_1" in written
        assert made[f"vid_{shot + 1}"]["arguments"]["prompt"] in said
        # The reference's own card, small.
        assert made["img_1"]["arguments"]["prompt"] in said and "img_1 from words alone" in written


def test_an_edited_film_keeps_its_clips(film):
    made = by_id(film)

    def shots(arguments, n):
        edited = {**made["vid_4"], "id": "vid_5", "arguments": arguments, "shots": n}
        return [clip["id"] for clip in clips_of_shots(edited, made)]

    assert shots({"video": "vid_4", "start": 5.0, "end": 15}, 2) == ["vid_2", "vid_3"]
    assert shots({"video": "vid_4", "start": 4.9, "end": 9}, 2) == ["vid_1", "vid_2"]
    loop = [{"op": "loop", "count": 2}]
    assert shots({"video": "vid_4", "operations": loop}, 6) == ["vid_1", "vid_2", "vid_3"] * 2
    assert shots({"videos": ["vid_3", "vid_1", "vid_3"]}, 3) == ["vid_3", "vid_1", "vid_3"]
    # What has a prompt was generated.
    assert shots({"video": "vid_4", "prompt": "a fox"}, 1) == ["vid_5"]


def test_one_reference_one_palette(film):
    """Ground and figure are the reference's; made from words alone, a picture has its own."""
    lost = copy.deepcopy(film)
    by_id(lost)["img_3"]["parents"] = []

    def grounds(trajectory):
        made = by_id(trajectory)
        names = ("img_1", "img_2", "img_3", "vid_2")
        return [card(with_cards(made[i], trajectory), 0, 1).getpixel((2, 2)) for i in names]

    assert len(set(grounds(film))) == 1
    first, kept, *other = grounds(lost)
    assert first == kept and other[0] == other[1] != first


def test_a_seed_shows_the_same_again_and_nothing_else_does():
    def ground(**more):
        return card(picture(**more), 0, 1).getpixel((2, 2))

    seeded = {"arguments": {"prompt": "a fox", "seed": 3}}
    assert ground(**seeded) == ground(**seeded, id="img_2")
    assert len({ground(id=f"img_{i}") for i in range(8)}) == 8
    assert ground() != ground(arguments={"prompt": "an owl"})


def test_what_stands_for_no_prompt(written):
    card(picture(arguments={}, tool="user"), 0, 1)
    assert "attached by the user" in " ".join(written) and "img_1" in written
    source, made = picture(), picture(id="img_2", arguments={}, tool="tool_image_super_resolution")
    made["parents"] = [{"id": "img_1", "role": "source"}]
    written.clear()
    card(with_cards(made, {"artifacts": [source, made]}), 0, 1)
    assert "image super resolution: a fox" in " ".join(written) and "img_2 from img_1" in written


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (3, 3), (64, 36), (90, 160), (1921, 1079)])
def test_every_size_and_length(size, written):
    long = "a fox in a raincoat, " * 400
    record = picture(id="img_2", width=size[0], height=size[1], arguments={"prompt": long})
    record["parents"] = [{"id": "img_1", "role": "reference"}]
    made = card(with_cards(record, {"artifacts": [picture(), record]}), 0, 1)
    assert made.size == size
    if min(size) > 150:
        assert any(line.endswith("…") for line in written) and NOTE in written


def test_lines_fit_and_no_word_is_lost():
    """Chinese breaks between letters, a word that is wider than a line inside."""
    font = font_of(20)
    for text in (
        "Wide establishing shot: a copper teapot, its colour deepening as clouds move on.",
        "x" * 200,
        "a " + "y" * 90 + " b",
        "从街对面望去,水彩风格的一只狐狸 in watercolor 摆在集市摊位上",
        "",
    ):
        lines = wrapped(text, font, 150)
        assert max(font.getlength(line) for line in lines) <= 150
        assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert wrapped("one two", font, 60) == ["one", "two"]


def test_chinese_without_a_font_is_said(written, monkeypatch):
    record = picture(arguments={"prompt": "一只狐狸 in a raincoat"})
    monkeypatch.setattr(cards, "has_han_font", lambda: False)
    card(record, 0, 1)
    said = " ".join(written)
    assert "[4 Chinese letters; no font here] in a raincoat" in said and "狐" not in said
    written.clear()
    monkeypatch.setattr(cards, "has_han_font", lambda: True)
    card(record, 0, 1)
    assert "一只狐狸 in a raincoat" in "".join(written)


def test_pages_show_lineage_and_the_grader_is_told(film):
    (shown,) = pages.cards_of([film], Config())[0]["shown"]
    assert [[made["id"] for made in line] for line in shown["cards"]] == [
        [f"vid_{i}", f"img_{i + 1}", "img_1"] for i in (1, 2, 3)
    ]
    grader = (ROOT / "data" / "prompts" / "vlm_grader.jinja").read_text(encoding="utf-8")
    assert json.dumps(NOTE) in grader
