"""What spoils a picture or film though no wish speaks of it, read from the records.

Part of R_result (Sec. 4.3.2): the check `unspoilt` of lib/result_checks.py. All of it is ours.
"""

import re
from collections.abc import Callable

from lib.families import load_families
from lib.lineage import Media, is_scrap
from lib.toolbox import makes
from lib.words import content_words, view_words


def parts_of(items: list[dict], media: Media) -> list[dict]:
    """The pictures handed over and the clips of the films, what the user attached left out."""
    parts = {i: media.by_id[i] for item in items for i in media.footage[item["id"]]}
    return [part for part in parts.values() if part["tool"] != "user"]


# What no medium is made with where all is well (ours): parameters that spoil it.
SPOILING: dict[str, Callable[[object], bool]] = {
    "quality": lambda value: value == "low",
    "moderation": lambda value: value == "low",
    "output_compression": lambda value: value < 60,
    "cfg_scale": lambda value: not 0.2 <= value <= 0.9,
    "format": lambda value: value == "pcm",  # bare samples, which no player opens
}
# A fade of so many seconds, and a speed so near to 1, change nothing of what a film shows. Ours.
SHORT_FADE_S, SAME_SPEED = 1.0, 0.1


def is_asked(op: dict, c: dict) -> bool:
    """Whether a wish accounts for an operation on a film that the agent made (ours)."""
    if op["op"] == "crop":
        return bool(c["aspect_ratio"])
    if op["op"] == "resize":
        return bool(c["aspect_ratio"] or c["resolution"])
    if op["op"] == "color":
        return bool(content_words(op.get("value", "")) & content_words(c["style"] or ""))
    return op["op"].startswith("fade") and op.get("seconds", 0) <= SHORT_FADE_S


def is_shrunk(made: dict, media: Media) -> bool:
    """Whether a film is far smaller than those that it was made from (ours): its long side is
    shorter than the short side of each. No crop to a shape does that."""
    films = [media.by_id[p["id"]] for p in made["parents"]]
    sides = [min(film["width"], film["height"]) for film in films]
    return max(made["width"], made["height"]) < min(sides)


def is_turned(item: dict, c: dict, media: Media) -> bool:
    """Whether something was done to a film, or to a clip of it, that no wish asks for: turned
    round, played backwards, sped up, marked, shrunk. What is the user's own, lib/wishes.py looks
    at."""
    for i in media.above[item["id"]]:
        made = media.by_id[i]
        operations = made["arguments"].get("operations", ())
        retimed = made["tool"] == "tool_video_speed_adjust"
        if not operations and not retimed:
            continue
        if all(media.by_id[clip]["tool"] == "user" for clip in media.footage[i]):
            continue
        if is_shrunk(made, media) or not all(is_asked(op, c) for op in operations):
            return True
        if retimed:
            source = media.by_id[made["parents"][0]["id"]]
            off = abs(made["duration_s"] / source["duration_s"] - 1)
            if off > SAME_SPEED or not c["duration_s"]:
                return True
    return False


# Caption size (of 36 by default) that covers the picture; the least one, as a share of the shorter
# side; a volume that clips. Ours.
LARGEST_FONT, SMALLEST_FONT, LOUDEST = 72, 0.025, 1.0
# Of a shot, the share that each transition may take. Ours.
FADED_SHOT = 0.25
# Words of a song that nobody wants to be without, and of a request that wants it sung. Ours.
NO_MUSIC = frozenset(
    "music melody rhythm instruments instrument harmony sound song 音 乐 旋 律".split()
)
SUNG = re.compile(r"\b(?:s[iau]ng|singing|singer|vocals?|lyrics?|choir)\b|唱|歌词|人声")


def long_fades(made: dict, media: Media) -> bool:
    """Whether a join's transitions take more than a second, or so much of a shot that it goes."""
    written = made["arguments"]
    if written.get("transition", "none") in ("none", "cut"):
        return False
    lasts = written.get("transition_duration", 0.5)
    sources = [media.by_id[p["id"]] for p in made["parents"]]
    shortest = min(a["duration_s"] for a in sources if a["kind"] == "video")
    return lasts > min(SHORT_FADE_S, FADED_SHOT * shortest)


def ill_set(made: dict, media: Media) -> bool:
    """Whether captions stand in the middle of the picture, fill it, or are too small to be read."""
    written = made["arguments"]
    least = SMALLEST_FONT * min(made["width"], made["height"])
    fits = least <= written.get("font_size", least) <= LARGEST_FONT
    return not fits or written.get("position") == "center"


def no_song(made: dict, media: Media) -> bool:
    """Whether music was told to be sung, or to have no music in it, though nobody asked."""
    written = made["arguments"]
    if written.get("instrumental") is False and not SUNG.search(media.request.lower()):
        return True
    forbidden = written.get("negative_tags")
    return bool(forbidden) and bool(content_words(str(forbidden)) & NO_MUSIC)


def no_effect(made: dict, media: Media) -> bool:
    """Whether an effect was told to follow its prompt by chance alone."""
    return made["arguments"].get("prompt_influence", 1) < LEAST_INFLUENCE


LEAST_INFLUENCE = 0.05


def stands_still(made: dict, media: Media) -> bool:
    """Whether a clip was told to end in the frame that it begins with, though no loop is asked."""
    written = made["arguments"]
    again = written.get("image_tail", "") == written.get("image")
    return again and not LOOP.search(media.request.lower())


LOOP = re.compile(r"\bloop|循环")

# What spoils a film or sound by the tool that did it, and nobody asks for. Ours.
SPOILERS: dict[str, Callable[[dict, Media], bool]] = {
    "tool_video_composite": long_fades,
    "tool_subtitle_add_text": ill_set,
    "tool_music_suno": no_song,
    "tool_sound_fx_gen": no_effect,
    "tool_image2video_keling": stands_still,
}


def is_drowned(item: dict, media: Media) -> bool:
    """Whether a film or sound has a step behind it that spoils it (`SPOILERS`), or a volume that
    clips; or is a sound that lies in its fades for more than half, or is a scrap in a loop."""
    fades = 0.0
    for i in media.above[item["id"]]:
        made = media.by_id[i]
        written = made["arguments"]
        spoils = SPOILERS.get(made["tool"])
        if spoils and spoils(made, media):
            return True
        if max(written.get("volume", 0), written.get("audio_volume", 0)) > LOUDEST:
            return True
        fades += written.get("fade_in", 0) + written.get("fade_out", 0)
    return item["kind"] == "audio" and (2 * fades > item["duration_s"] or is_scrap(item, media))


def shows_unasked(item: dict, c: dict, media: Media) -> bool:
    """Whether it shows what no wish asks for: a visible mark, a transparent ground, black bars,
    pictures of strangers that a search found, the user's picture in another shape, a strip."""
    behind = [media.by_id[i] for i in media.above[item["id"]]]
    if any(a.get("letterboxed") for a in behind) or is_reshaped(item, c, behind):
        return True
    if is_strip(item, c, behind):
        return True
    if item.get("has_alpha") and not c["transparent"]:
        return True
    checks = load_families()[c["family"]]["checks"] if c.get("family") else ()
    if "found" not in checks and any(a["tool"] == "tool_search_inspire" for a in behind):
        return True
    wanted = "marked" in checks or "watermarked" in checks
    return bool(item.get("watermark") or item.get("logo")) and not wanted


def is_reshaped(item: dict, c: dict, behind: list[dict]) -> bool:
    """Whether a picture was told another shape than that of the user's picture that it was made
    from, though the request names none. `behind`: it and all that it was made from."""
    if item["kind"] != "image" or c["aspect_ratio"] or "exact_size" in (c.get("wish") or {}):
        return False
    told = [a for a in behind if {"aspect_ratio", "size"} & a["arguments"].keys()]
    given = [a for a in behind if a["tool"] == "user" and a["kind"] == "image"]
    shape = item["width"] / item["height"]
    return bool(told and given) and all(
        abs(shape * a["height"] / a["width"] - 1) > SAME_SHAPE for a in given
    )


def is_strip(item: dict, c: dict, behind: list[dict]) -> bool:
    """Whether a picture or film is more than STRIP times as long as wide, or the other way round,
    though the request names no shape and nothing of the user's is behind it."""
    if item["kind"] not in ("image", "video") or any(a["tool"] == "user" for a in behind):
        return False
    asked = c["aspect_ratio"] or "exact_size" in (c.get("wish") or {})
    sides = (item["width"], item["height"])
    return not asked and max(sides) > STRIP * min(sides)


# A shape beyond 1:3 or 3:1 is one that nobody wants unasked. Ours.
STRIP = 3
# A shape so near to another one is the same. Ours.
SAME_SHAPE = 0.1


def is_mixed_up(parts: list[dict], calls: list[dict], media: Media) -> bool:
    """Whether a film's shots are joined against the order that they were ordered in, in more than
    half of all pairs; or a clip shows another shot's frame (ours)."""
    if len(parts) < 2:
        return False
    return is_reversed(parts, calls, media) or has_swapped_frames(parts, media)


def is_reversed(parts: list[dict], calls: list[dict], media: Media) -> bool:
    """The first of the two, which pictures have too. A clip has its first frame's place, where it
    has one, and a take that was made again that of the first of its kind: beside what all of them
    say, it says the same, or the same and more."""
    shots = [first_frame(part, media) or part for part in parts]
    order = [int(shot["id"].rpartition("_")[2]) for shot in shots]
    pairs = len(order) * (len(order) - 1) / 2
    if inversions(order) <= pairs / 2:
        return False
    views = [media.views[shot["id"]] for shot in shots]
    common = frozenset.intersection(*views)
    asked = [
        view_words(str((call["arguments"] or {}).get("prompt", "")), media.topic) - common
        for call in calls
        if makes(call["name"]) == shots[0]["kind"]
    ]
    first = []
    for view in views:
        own = view - common
        same = (n for n, o in enumerate(asked) if are_alike(own, o) or (o and o <= own))
        first.append(next(same, 0))
    return inversions(first) > pairs / 2


def first_frame(part: dict, media: Media) -> dict | None:
    """The picture that a clip was animated from."""
    if part["kind"] != "video":
        return None
    frames = [media.by_id[p["id"]] for p in part["parents"]]
    return next((frame for frame in frames if frame["kind"] == "image"), None)


def inversions(order: list[int]) -> int:
    """Pairs that stand in the wrong order."""
    return sum(b < a for n, a in enumerate(order) for b in order[n + 1 :])


def has_swapped_frames(parts: list[dict], media: Media) -> bool:
    """The second: of the words by which frames differ, another shot's frame shares far more with
    what a clip is told than its own one."""
    frames = []
    for part in parts:
        own = first_frame(part, media)
        frames.append(media.views[own["id"]] if own else frozenset())
    alike = frozenset.intersection(*frames)
    frames = [frame - alike for frame in frames]
    for n, part in enumerate(parts):
        view = media.views[part["id"]]
        if not frames[n] or not view:
            continue
        shared = len(view & frames[n])
        others = max(len(view & frame) for m, frame in enumerate(frames) if m != n)
        if others >= 2 * shared + 2:
            return True
    return False


# Pictures that are looked at one after the other. Ours.
STORY = re.compile(r"storyboard|\b(?:book|story|comic) (?:page|panel|frame)|分镜|绘本")


def is_odd_set(items: list[dict], c: dict, calls: list[dict], media: Media) -> bool:
    """Whether of pictures that are to be consistent one has another shape than the rest; or those
    of a story are handed over backwards (ours)."""
    if len(items) < 2 or items[0]["kind"] != "image":
        return False
    shapes = [item["width"] / item["height"] for item in items]
    if c["consistency"] and max(shapes) > 1.1 * min(shapes):
        return True
    return bool(STORY.search(media.request.lower())) and is_reversed(items, calls, media)


def names_strangers(call: dict, media: Media) -> bool:
    """Whether a storyboard was told of characters that the request does not name."""
    characters = (call["arguments"] or {}).get("characters")
    if call["name"] != "tool_video_shot_gen" or not characters:
        return False
    named = content_words(" ".join(map(str, characters)))
    return 2 * len(named & (content_words(media.request) | media.topic)) < len(named)


def is_odd_board(call: dict, c: dict, media: Media) -> bool:
    """Whether a call wrote a storyboard of strangers, or in another shape than the request's."""
    if call["name"] != "tool_video_shot_gen" or call["status"] != "ok":
        return False
    shape = call["arguments"].get("aspect_ratio")
    return names_strangers(call, media) or bool(shape and c["aspect_ratio"] not in (None, shape))


def spoilt_share(items: list[dict], c: dict, media: Media, calls: list[dict] = ()) -> float:
    """Share of what was handed over that is spoilt though nothing asked for it (ours).

    A picture or film that `shows_unasked` is, and a film that was turned (`is_turned`), or half so
    where it speaks or bears captions that nobody wants, where it `is_drowned`, or its shots are
    mixed up (`is_mixed_up`); of the pictures, clips and sounds, those made with parameters that
    spoil them. A set with an odd picture, in the wrong order, or by an odd board, is so by half.
    """
    boards = any(is_odd_board(call, c, media) for call in calls)
    odd = 0.5 * (boards or is_odd_set(items, c, calls, media))
    spoilt = []
    for item in items:
        parts = parts_of([item], media)
        bad = [
            any(
                name in a["arguments"] and test(a["arguments"][name])
                for name, test in SPOILING.items()
            )
            for a in parts
        ]
        spoilt_now = share(bad) if bad else 0.0
        talks = item.get("speech") and "narration" not in c["audio"]
        writes = item.get("cues") and "subtitles" not in c["audio"]
        if item["kind"] == "video" and parts and (talks or writes):
            spoilt_now = max(spoilt_now, 0.5)
        if item["kind"] in ("video", "audio") and spoilt_now < 0.5:
            if is_drowned(item, media) or is_mixed_up(parts, calls, media):
                spoilt_now = 0.5
        if shows_unasked(item, c, media) or is_turned(item, c, media):
            spoilt_now = 1.0
        spoilt.append(spoilt_now)
    return max(odd, share(spoilt))


# Two descriptions that share so much of their words are one. Ours.
ALIKE = 0.75


def are_alike(view: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two descriptions share ALIKE of the longer one's words, or have none."""
    return len(view & other) >= ALIKE * max(len(view), len(other))


def share(values: list) -> float:
    """Mean over the items handed over, of scores or of truths."""
    return sum(values) / len(values)
