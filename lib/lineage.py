"""What a delivered picture or film was made from, read off an episode's records.

The rewards ask it of every deliverable: which clips are in this film, whose sound is still heard in
it, which prompts stand behind it, and is it more than a copy of what was handed over already? The
records hold no pixels and no samples; where they leave a question open, the convention is ours.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from lib.toolbox import category, makes

# Ours: a sound below this volume (-20 dB) counts as muted.
QUIET = 0.1
# Ours: a prompt of more words than this names everything and shows nothing. It only stops a cheat.
LONG_PROMPT = 200
ARTICLES = {"a", "an", "the"}


# ---------------------------------------------------------------------------- words of a text
@lru_cache(maxsize=4096)
def content_words(text: str) -> frozenset[str]:
    """Content words of a phrase, lower case, articles left out; each Chinese character is a word.

    >>> content_words("The Café, 一只狐狸") == {"café", *"一只狐狸"}
    True
    """
    return frozenset(re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text.lower())) - ARTICLES


def shows(text: str, subject: str) -> bool:
    """Whether a text names the subject: at least half of its content words (ours)."""
    wanted = content_words(subject)
    return 2 * len(content_words(text) & wanted) >= len(wanted)


@lru_cache(maxsize=4096)
def told(text: str, wanted: frozenset[str], long: int) -> float:
    """Share of the wanted words in one prompt (ours).

    0 for a prompt of more than `long` words, or one that says most of its words again and again.

    >>> fox = content_words("a red fox")
    >>> told("a red fox at dusk", fox, 200), told("a wall, " + "red fox, " * 9, fox, 200)
    (1.0, 0.0)
    """
    said = content_words(text)
    most = min(long, 2 * len(said) + 4)
    if not wanted or len(text.split()) > most:
        return 0.0
    return len(wanted & said) / len(wanted)


# ---------------------------------------------------------------------------- where media come from
def deliverables(trajectory: dict) -> list[dict]:
    """Artifacts that the answer hands over, each once, in the answer's order.

    Only what was made in this episode counts: neither what the user attached nor what was found.
    """
    answer = trajectory["answer"] or {}
    made = {
        a["id"]: a
        for a in trajectory["artifacts"]
        if a["tool"] != "user" and makes(a["tool"]) == a["kind"]
    }
    handed = dict.fromkeys(answer.get("deliverables", []))
    return [made[i] for i in handed if i in made]


@dataclass
class Media:
    """An episode's artifacts and their lineage; every dict goes by id, in the order of making.

    `looks` gives what looks alike the same key (ours), see `look_of`.
    """

    by_id: dict[str, dict] = field(default_factory=dict)
    # Ids of it and of all that it was made from.
    above: dict[str, set] = field(default_factory=dict)
    # Ids of the films it consists of, themselves made of no other film; a picture's is its own.
    footage: dict[str, list] = field(default_factory=dict)
    looks: dict = field(default_factory=dict)


def read_media(trajectory: dict) -> Media:
    """The artifacts of an episode, with what each was made from and what looks alike."""
    media = Media()
    edits_look_new = bool(trajectory["task"]["constraints"]["consistency"])
    times = Counter()
    for artifact in trajectory["artifacts"]:
        own = artifact["id"]
        parents = [p["id"] for p in artifact["parents"] if p["id"] in media.above]
        media.by_id[own] = artifact
        media.above[own] = {own}.union(*(media.above[p] for p in parents))
        media.footage[own] = footage_of(artifact, parents, media)
        media.looks[own] = look_of(artifact, parents, media, edits_look_new, times)
    return media


def same_kind(artifact: dict, parents: list[str], kind: str, media: Media) -> list[str]:
    """Ids of the parents that are of `kind`, if the artifact is too; none if it is not."""
    if artifact["kind"] != kind:
        return []
    return [p for p in parents if media.by_id[p]["kind"] == kind]


def footage_of(artifact: dict, parents: list[str], media: Media) -> list[str]:
    """Ids of the films that an artifact consists of, each once; its own where it is of no other."""
    films = same_kind(artifact, parents, "video", media)
    clips = dict.fromkeys(clip for film in films for clip in media.footage[film])
    return list(clips) or [artifact["id"]]


def look_of(
    artifact: dict, parents: list[str], media: Media, edits_look_new: bool, times: Counter
) -> object:
    """A key that two artifacts share if they look alike (ours, since records hold no pixels).

    A film looks like its footage. A picture's edits look like it, unless the request asks for
    consistency: there, an edit of the reference is how another picture is made. What one seed and
    prompt made looks alike, and so do clips of one picture that were told the same. Without a seed,
    every call gives something new. The n results of one call differ; `times` counts the results of
    each call so far.
    """
    written = artifact["arguments"]
    if same_kind(artifact, parents, "video", media):
        seen = {media.looks[clip] for clip in media.footage[artifact["id"]]}
        return seen.pop() if len(seen) == 1 else tuple(sorted(map(str, seen)))
    pictures = [
        p
        for p in same_kind(artifact, parents, "image", media)
        if makes(media.by_id[p]["tool"]) == "image"  # neither the user's nor found by a search
    ]
    if pictures and not edits_look_new:
        return media.looks[pictures[0]]
    if "seed" in written or category(artifact["tool"]) == "Image-to-Video":
        call = (artifact["tool"], written.get("prompt"), written.get("seed"), *parents)
        number = times[call] % written.get("n", 1)
        times[call] += 1
        return (*call, number)
    return artifact["id"]


# ---------------------------------------------------------------------------- what is left of them
def carries_sound(source: dict, made: dict, quiet: float) -> bool:
    """Whether the sound of `source` goes on in what was made from it.

    It does not where it was turned below the volume `quiet`, switched off, or replaced by another.
    """
    if source["kind"] not in ("video", "audio"):
        return False
    written = made["arguments"]
    laid_under = source["id"] == written.get("audio")
    if written.get("keep_original_audio") is False:
        return False
    if written.get("audio") and written.get("audio_mode") == "replace" and not laid_under:
        return False
    own_volume = "audio_volume" if laid_under else "original_volume"
    return written.get("volume", 1) * written.get(own_volume, 1) >= quiet


def heard(film: dict, media: Media) -> dict[str, float]:
    """{id: seconds} of the films and sounds that can be heard in a film, itself included.

    What was muted or replaced on the way is not in it, nor what lies behind a film without sound.
    """
    found = {}
    todo = [(film, film["duration_s"])]
    while todo:
        made, seconds = todo.pop()
        silent = made["kind"] == "video" and not made["has_audio"]
        if made["id"] in found or silent:
            continue
        found[made["id"]] = seconds
        for parent in made["parents"]:
            source = media.by_id[parent["id"]]
            if not carries_sound(source, made, QUIET):
                continue
            # A film plays no more of a source than there is of it.
            lasts = seconds if made["kind"] == "audio" else min(seconds, source["duration_s"])
            todo.append((source, lasts))
    return found


def best_prompt(part: str, media: Media, wanted: frozenset[str]) -> float:
    """Share of the wanted words in the best one prompt behind a picture or clip; 0 without any."""
    shares = [
        told(str(media.by_id[i]["arguments"].get(name, "")), wanted, LONG_PROMPT)
        for i in media.above[part]
        if makes(media.by_id[i]["tool"]) in ("image", "video")
        for name in ("prompt", "topic")
    ]
    return max(shares, default=0.0)


def on_topic(item: str, media: Media, wanted: frozenset[str]) -> float:
    """Share of the wanted words in the best prompt behind a picture (ours).

    In a film, that of its worst clip, since one prompt must not stand for all. A film of the
    user's is about what the user says; so is what was made from a text or sound of the user's.
    """
    if media.by_id[item]["kind"] in ("text", "audio"):
        return written_topic(item, media, wanted)
    return min(
        1.0 if own_film(part, media) else best_prompt(part, media, wanted)
        for part in media.footage[item]
    )


def own_film(part: str, media: Media) -> bool:
    """Whether a film is the user's own."""
    return media.by_id[part]["tool"] == "user" and media.by_id[part]["kind"] == "video"


def written_topic(item: str, media: Media, wanted: frozenset[str]) -> float:
    """Share of the wanted words in what a text or sound was made from, in the best argument (ours);
    1 where that is a text or sound of the user's."""
    sources = [media.by_id[i] for i in media.above[item]]
    if any(a["tool"] == "user" and a["kind"] in ("text", "audio") for a in sources):
        return 1.0
    shares = [
        told(" ".join(str(a["arguments"].get(name, "")) for name in names), wanted, LONG_PROMPT)
        for a in sources
        for names in (("prompt", "style"), ("topic",), ("text",), ("script",), ("content",))
    ]
    return max(shares)
