"""What a delivered picture or film was made from, read off an episode's records.

The rewards ask it of every deliverable: which clips are in this film, whose sound is still heard in
it, which prompts stand behind it, and is it more than a copy of what was handed over already? The
records hold no pixels and no samples; where they leave a question open, the convention is ours.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from lib.toolbox import category, makes
from lib.words import (
    LONG_PROMPT,
    UNCHANGED,
    content_words,
    depicted,
    is_foreign,
    language_wanted,
    name_subject,
    positive_words,
    told,
    view_words,
)

# Ours: a sound below this volume (-20 dB) counts as muted.
QUIET = 0.1


# ---------------------------------------------------------------------------- where media come from
def deliverables(trajectory: dict) -> list[dict]:
    """Artifacts that the answer hands over, each once, in the answer's order.

    Only what was made in this episode counts: neither what the user attached nor what was found.
    """
    answer = trajectory["answer"] or {}
    handed = dict.fromkeys(answer.get("deliverables", []))
    made = {
        a["id"]: a
        for a in trajectory["artifacts"]
        if a["id"] in handed and a["tool"] != "user" and makes(a["tool"]) == a["kind"]
    }
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
    # What its prompt says of it beside the topic, see `view_words`.
    views: dict[str, frozenset] = field(default_factory=dict)
    # The words of the request's subject, and those of subject and style.
    subject: frozenset[str] = frozenset()
    topic: frozenset[str] = frozenset()
    # What the user wrote, and the language that is to be read and heard.
    request: str = ""
    language: str = "en"
    # What is handed over, in the answer's order; the ids of it and of all that it was made from.
    handed: list[dict] = field(default_factory=list)
    behind: set[str] = field(default_factory=set)
    # Ids of the agent's media that a look showed flawed; of what was made again after a look, see
    # `retaken`.
    shown: set[str] = field(default_factory=set)
    retaken: set[str] = field(default_factory=set)
    # What own_words found already: several checks ask it of the same clips.
    told: dict[tuple, float] = field(default_factory=dict)


def topic_words(c: dict) -> frozenset[str]:
    """The content words of a request's subject and style. `c`: its constraints."""
    return content_words(c["subject"]) | content_words(c["style"] or "")


def read_media(trajectory: dict) -> Media:
    """The artifacts of an episode, with what each was made from and what looks alike."""
    c = trajectory["task"]["constraints"]
    request = trajectory["task"].get("request", "")
    media = Media(
        subject=content_words(c["subject"]),
        topic=topic_words(c),
        request=request,
        language=language_wanted(request or c["subject"]),
    )
    edits_look_new = bool(c["consistency"])
    times = Counter()
    for artifact in trajectory["artifacts"]:
        own = artifact["id"]
        parents = [p["id"] for p in artifact["parents"] if p["id"] in media.above]
        media.by_id[own] = artifact
        media.above[own] = {own}.union(*(media.above[p] for p in parents))
        media.footage[own] = footage_of(artifact, parents, media)
        media.views[own] = view_words(prompt_of(artifact), media.topic)
        media.looks[own] = look_of(artifact, parents, media, edits_look_new, times)
    media.handed = deliverables(trajectory)
    media.behind = set().union(*(media.above[a["id"]] for a in media.handed))
    media.shown = shown_flawed(trajectory["calls"], media)
    media.retaken = retaken(media)
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


def prompt_of(artifact: dict) -> str:
    """What a generator was told to show; "" where it was told nothing."""
    arguments = artifact["arguments"]
    return str(arguments.get("prompt") or arguments.get("topic") or "")


def look_of(
    artifact: dict, parents: list[str], media: Media, edits_look_new: bool, times: Counter
) -> object:
    """A key that two artifacts share if they look alike (ours, since records hold no pixels).

    A film looks like its footage. A picture's edits look like it, unless the request asks for
    consistency: there, an edit of the reference is how another picture is made, if its prompt
    describes a view of its own (`view_words`); two edits of one picture to the same view look
    alike. The user's own picture, edited with words to change nothing, is still the user's. What
    one seed and prompt made looks alike, and so do clips of one picture that were told the same.
    Without a seed, every call gives something new. The n results of one call differ, unless they
    are views of a reference; `times` counts the results of each call so far.
    """
    written = artifact["arguments"]
    if same_kind(artifact, parents, "video", media):
        seen = {media.looks[clip] for clip in media.footage[artifact["id"]]}
        return seen.pop() if len(seen) == 1 else frozenset(seen)
    view = media.views[artifact["id"]]
    pictures = same_kind(artifact, parents, "image", media)
    # Neither the user's nor found by a search.
    own = [p for p in pictures if makes(media.by_id[p]["tool"]) == "image"]
    if pictures and not own and not view and UNCHANGED.search(prompt_of(artifact).lower()):
        return media.looks[pictures[0]]
    if pictures and not own and edits_look_new and "seed" not in written:
        return (media.looks[pictures[0]], view)
    if own and not edits_look_new:
        return media.looks[own[0]]
    if own and "seed" not in written:
        if not view or view == media.views[own[0]]:
            return media.looks[own[0]]
        return (media.looks[own[0]], view)
    if "seed" in written or category(artifact["tool"]) == "Image-to-Video":
        # Where no seed decides, clips of frames that look alike differ by what they are told.
        told_to = written.get("prompt") if "seed" in written else view
        shown = [(media.looks[p], media.views[p]) for p in parents]
        call = (artifact["tool"], told_to, written.get("seed"), *shown)
        number = times[call] % written.get("n", 1)
        times[call] += 1
        return (*call, number)
    return artifact["id"]


def is_given(item: str, media: Media) -> bool:
    """Whether it looks like something that the user attached."""
    return any(
        media.by_id[i]["tool"] == "user" and media.looks[i] == media.looks[item]
        for i in media.above[item]
    )


# ---------------------------------------------------------------------------- looks at media
# An analysis answers on so many media, see lib/behaviours.py.
LOOKS = 4


@lru_cache(maxsize=256)
def looks_into(tool: str) -> bool:
    """Whether a tool looks at media, or listens, and makes nothing."""
    return category(tool) == "Multimodal Understanding" and makes(tool) == "nothing"


def looked_at(call: dict) -> set[str]:
    """Ids of the media that a call looked at, as far as its answer goes."""
    if not looks_into(call["name"]):
        return set()
    media = (call["arguments"] or {}).get("media")
    return set(media[:LOOKS]) if isinstance(media, list) else set()


def shown_flawed(calls: list[dict], media: Media) -> set[str]:
    """Ids of the agent's own media with a flaw that a look showed."""
    flawed = {i for i, a in media.by_id.items() if a.get("flawed") and a["tool"] != "user"}
    if not flawed:
        return flawed
    return {i for call in calls if call["status"] == "ok" for i in looked_at(call) if i in flawed}


def retaken(media: Media) -> set[str]:
    """Ids of the agent's own media with a flaw that a look showed, and that are not handed over.

    A flaw goes on into what is made from a medium: where one was looked at, those before and after
    it with the flaw are among them.
    """
    if not media.shown:
        return set()
    flawed = {i for i, a in media.by_id.items() if a.get("flawed") and a["tool"] != "user"}
    return {
        i
        for i in flawed - media.behind
        if any(i in media.above[s] or s in media.above[i] for s in media.shown)
    }


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


# A sound that is a shorter piece, again and again, stutters. Ours.
SCRAP_S = 8.0


def is_scrap(item: dict, media: Media) -> bool:
    """Whether a sound, or one under a film, is a scrap in a loop."""
    for i in media.above[item["id"]]:
        cut = media.by_id[i]["arguments"]
        if "loop_to" in cut:
            lasts = min(media.by_id[p["id"]]["duration_s"] for p in media.by_id[i]["parents"])
            piece = min(cut.get("end") or lasts, lasts) - cut.get("start", 0)
            if piece < min(SCRAP_S, cut["loop_to"]):
                return True
    return False


def own_words(part: str, media: Media, wanted: frozenset[str]) -> float:
    """`words_told` of a picture or clip, read once an episode."""
    key = (part, wanted)
    if key not in media.told:
        media.told[key] = words_told(part, media, wanted)
    return media.told[key]


def words_told(part: str, media: Media, wanted: frozenset[str]) -> float:
    """Share of the wanted words in the prompt of a picture or clip itself (ours).

    0 where it does not say half of the subject's: a style alone shows nothing. A clip shows its
    first frame: where that was generated, its prompt counts as well, the worse of the two. What its
    negative prompt names is not there. Nor does a prompt count with a Chinese order for an English
    client; other languages' words are not the subject's.
    """
    made = media.by_id[part]
    if made["tool"] == "user" or makes(made["tool"]) not in ("image", "video"):
        return 0.0
    text = depicted(prompt_of(made), media.request)
    own = media.topic if wanted <= media.topic else wanted | media.topic
    if media.language == "en" and is_foreign(text, "en"):
        return 0.0
    forbidden = made["arguments"].get("negative_prompt")
    if forbidden and content_words(str(forbidden)) & wanted:
        return 0.0
    if not name_subject(positive_words(text, own), media.subject):
        return 0.0
    share = told(text, wanted, LONG_PROMPT, own)
    if made["kind"] == "video":
        for parent in made["parents"]:
            frame = media.by_id.get(parent["id"])
            if frame and frame["kind"] == "image" and frame["tool"] != "user":
                share = min(share, own_words(frame["id"], media, wanted))
    return share


def on_topic(item: str, media: Media, wanted: frozenset[str]) -> float:
    """Share of the wanted words in the prompt of a picture, or of a film's worst clip (ours).

    One prompt must not stand for all: each picture and clip says for itself what it shows. A film
    of the user's is about what the user says; so is what was made from a text or sound of theirs.
    """
    if media.by_id[item]["kind"] in ("text", "audio"):
        return written_topic(item, media, wanted)
    return min(
        1.0 if own_film(part, media) else own_words(part, media, wanted)
        for part in media.footage[item]
    )


def own_film(part: str, media: Media) -> bool:
    """Whether a film is the user's own."""
    return media.by_id[part]["tool"] == "user" and media.by_id[part]["kind"] == "video"


def written_topic(item: str, media: Media, wanted: frozenset[str]) -> float:
    """Share of the wanted words in what a text or sound was made from, in the best argument (ours);
    1 where that is a text or sound of the user's; 0 where one of them is Chinese for an English
    client."""
    sources = [media.by_id[i] for i in media.above[item]]
    written = [str(text) for a in sources for text in a["arguments"].values()]
    if media.language == "en" and any(is_foreign(text, "en") for text in written):
        return 0.0
    if any(a["tool"] == "user" and a["kind"] in ("text", "audio") for a in sources):
        return 1.0
    shares = [
        told(" ".join(str(a["arguments"].get(name, "")) for name in names), wanted, LONG_PROMPT)
        for a in sources
        for names in (("prompt", "style"), ("topic",), ("text",), ("script",), ("content",))
    ]
    return max(shares)
