"""Stand-in pictures as storyboard cards: no picture is made, so a card shows what was asked for.

It has the prompt's words, the shot's number and, small, the reference that it was made from.
Colours and figure are those of its origin: what goes back to one picture looks alike, and what was
made from words alone looks like nothing else, so a subject that does not stay the same is seen. All
of it is ours.
"""

import colorsys
import re
from functools import lru_cache
from itertools import accumulate
from random import Random

from lib.lineage import prompt_of

NOTE = "stand-in, no picture was made"
# Below so many pixels letters cannot be read.
SMALLEST = 6
LINE = 1.25  # from line to line, in heights of a letter
HAN = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]+")
# Files of fonts with Chinese letters, as Debian, Windows and macOS name them.
HAN_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.ttf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "STHeiti Light.ttc",
)


# ---------------------------------------------------------------------------- what a card shows
def with_cards(artifact: dict, trajectory: dict) -> dict:
    """The artifact with `cards`: of each of its shots the line of `origin` in the trajectory. A
    record alone does not say what the media were that its own were made from."""
    by_id = {a["id"]: a for a in trajectory["artifacts"]}
    return {**artifact, "cards": [origin(clip, by_id) for clip in clips_of_shots(artifact, by_id)]}


def origin(artifact: dict, by_id: dict[str, dict]) -> list[dict]:
    """The artifact, the picture or film that it was made from, what that one was made from, and so
    on, to the first of them; of several references the first."""
    line = [artifact]
    while True:
        sources = [by_id[p["id"]] for p in line[-1].get("parents", ()) if p["id"] in by_id]
        seen = [source for source in sources if source["kind"] in ("image", "video")]
        if not seen:
            return line
        line.append(seen[0])


def clips_of_shots(artifact: dict, by_id: dict[str, dict]) -> list[dict]:
    """What each shot of a film was generated as, in order; of a picture, itself.

    Where an edit left or repeated some shots: those from where it begins, round and round.
    """
    n_shots, written = artifact.get("shots") or 1, artifact["arguments"]
    names = written.get("videos") or [written.get("video")]
    films = [by_id[name] for name in names if name in by_id]
    if artifact["kind"] != "video" or not films or prompt_of(artifact):
        return [artifact] * n_shots
    clips, lengths = [], []
    for film in films:
        clips += clips_of_shots(film, by_id)
        lengths += film["shot_frames"]
    start = written.get("start") or 0
    skipped = sum(end <= start * films[0]["fps"] for end in accumulate(lengths))
    return [clips[(skipped + i) % len(clips)] for i in range(n_shots)]


def words_of(line: list[dict]) -> str:
    """What a card says of its picture: the prompt, or who made it and the prompt before it."""
    prompts = [prompt_of(made) for made in line]
    if prompts[0]:
        return prompts[0]
    if line[0].get("tool") == "user":
        return "attached by the user"
    maker = str(line[0].get("tool", "")).removeprefix("tool_").replace("_", " ")
    return f"{maker}: {next(filter(None, prompts), '')}".strip(": ")


def made_from(line: list[dict]) -> str:
    """Where a card's picture came from, in words."""
    names = [str(made["id"]) for made in line]
    if len(names) > 3:
        names[1:-1] = ["…"]
    if names[1:] or not prompt_of(line[0]):
        return " from ".join(names)
    return f"{names[0]} from words alone"


@lru_cache(maxsize=1024)
def palette(key: str) -> dict:
    """The look of an origin: colours of a dark and of a light ground and of the figure, and the
    figure's corners and turn in degrees."""
    rng = Random(key)
    hue = rng.random()
    other = hue + rng.choice((0.25, 0.4, 0.5, 0.6, 0.75))

    def colour(hue, lightness, saturation):
        return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue % 1, lightness, saturation))

    return {
        "dark": colour(hue, 0.2, 0.5),
        "light": colour(hue, 0.84, 0.6),
        "figure": colour(other, 0.52, 0.65),
        "sides": rng.choice((3, 4, 5, 6, 60)),
        "turn": rng.randrange(90),
    }


def palette_of(line: list[dict]) -> dict:
    """The palette of the first in a line: by its prompt and, as a service does, by its seed;
    without one every picture has its own."""
    first = line[-1]
    seed = first["arguments"].get("seed", first["id"])
    return palette(f"{prompt_of(first)} {seed}")


# ---------------------------------------------------------------------------- drawing it
def card(artifact: dict, shot: int, of: int):
    """The card of one shot of `of` as a Pillow picture of the artifact's size.

    Shots are light and dark in turn, so that every cut shows whatever the colours are. A small one
    has fewer words on it, or none. Chinese is written in what font the machine has; all else is the
    same everywhere.
    """
    from PIL import Image, ImageDraw

    width, height = artifact["width"], artifact["height"]
    line = artifact["cards"][shot] if "cards" in artifact else [artifact]
    colours, ink = palette_of(line), "white" if shot % 2 else "black"
    picture = Image.new("RGB", (width, height), colours["dark" if shot % 2 else "light"])
    draw = ImageDraw.Draw(picture)
    wide = width > height
    margin, letter = min(width, height) // 24, min(height // 16, width // (26 if wide else 20))
    # What is drawn stands right of the words, or below them: its box, and the words'.
    if wide:
        box = (width * 2 // 3, margin, width - margin, height - margin - 2 * letter)
        text_box = (margin, margin, box[0] - margin, height - margin)
    else:
        box = (margin, height * 2 // 3, width - margin, height - margin - 2 * letter)
        text_box = (margin, margin, width - margin, box[1] - margin)
    draw_figure(draw, box, colours, halved=len(line) > 1)
    if len(line) > 1:
        paste_reference(picture, box, line[-1])
    heads = [made_from(line)]
    if artifact["kind"] == "video":
        heads.insert(0, f"{artifact['id']}, shot {shot + 1} of {of}")
    if letter < SMALLEST:
        label = min(height // 6, width // 8)
        if label >= SMALLEST:
            draw.text((margin, margin), str(artifact["id"]), fill=ink, font=font_of(label))
        return picture
    top = margin
    for head in heads:
        draw.text((margin, top), head, fill=ink, font=font_of(letter))
        top += LINE * letter
    # A bar runs along the lower edge of a film.
    foot = height - margin - 2 * letter
    draw.text((margin, foot), NOTE, fill=ink, font=font_of(letter))
    top += LINE * letter
    room = text_box[2] - text_box[0], min(text_box[3], foot) - top
    draw_words(draw, words_of(line), (margin, top), room, letter, ink)
    return picture


def draw_figure(draw, box: tuple, colours: dict, halved: bool) -> None:
    """The figure in the middle of a box (left, top, right, bottom), or of its first half."""
    left, top, right, bottom = box
    if halved and right - left > bottom - top:
        right = (left + right) / 2
    elif halved:
        bottom = (top + bottom) / 2
    radius = 0.45 * min(right - left, bottom - top)
    if radius >= 1:
        circle = ((left + right) / 2, (top + bottom) / 2, radius)
        corners, turn = colours["sides"], colours["turn"]
        draw.regular_polygon(circle, corners, rotation=turn, fill=colours["figure"])


def paste_reference(picture, box: tuple, reference: dict) -> None:
    """The reference's own card, framed, in the second half of a box."""
    from PIL import ImageOps

    left, top, right, bottom = box
    if right - left > bottom - top:
        left = (left + right) // 2
    else:
        top = (top + bottom) // 2
    scale = min((right - left) / reference["width"], (bottom - top) / reference["height"])
    width, height = int(reference["width"] * scale) - 2, int(reference["height"] * scale) - 2
    if width < 4 or height < 4:
        return
    small = card({**reference, "width": width, "height": height}, 0, reference.get("shots") or 1)
    at = (right - width - 2, bottom - height - 2)
    picture.paste(ImageOps.expand(small, 1, fill="gray"), at)


def draw_words(draw, text: str, at: tuple, room: tuple, smallest: int, ink: str) -> None:
    """A text, wrapped, in letters as large as the room (width, height) takes, twice `smallest` at
    most: what is too long for `smallest` ends in an ellipsis."""
    if not has_han_font():
        text = HAN.sub(lambda found: f"[{len(found[0])} Chinese letters; no font here]", text)
    han = bool(HAN.search(text))
    # A letter is about half as wide as high, a Chinese one as wide as high.
    area = len(text) * LINE * (1 if han else 0.5)
    size = int((0.8 * room[0] * room[1] / max(1, area)) ** 0.5)
    size = max(smallest, min(size, 2 * smallest))
    font = font_of(size, han)
    lines = wrapped(text, font, room[0])
    most = max(1, int(room[1] / (LINE * size)))
    if len(lines) > most:
        lines = lines[:most]
        lines[-1] = lines[-1][:-1].rstrip() + "…"
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + LINE * size * i), line, fill=ink, font=font)


def wrapped(text: str, font, width: float) -> list[str]:
    """A text in lines at most `width` pixels wide; breaks between words and Chinese letters, and
    inside a word that is wider than a line."""
    lines = [""]
    for word in re.findall(rf"{HAN.pattern[:-1]}|[^\s\u2e80-\u9fff\uf900-\uffef]+\s?|\s", text):
        while font.getlength(lines[-1] + word.rstrip()) > width and (lines[-1] or len(word) > 1):
            if not lines[-1]:
                fits = max(1, int(len(word) * width / font.getlength(word)))
                lines[-1], word = word[:fits], word[fits:]
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


@lru_cache(maxsize=64)
def font_of(size: int, han: bool = False):
    """A font of so many pixels: Pillow's own, or one with Chinese letters."""
    from PIL import ImageFont

    if han:
        for name in HAN_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


@lru_cache(maxsize=1)
def has_han_font() -> bool:
    """Whether this machine has one of HAN_FONTS."""
    return font_of(20, han=True).getname() != font_of(20).getname()
