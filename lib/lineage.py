"""lib.lineage."""

import re
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

from lib.toolbox import category, makes

# Ours: a sound below this volume (-20 dB) counts as muted. No config key: nothing is learnt from it.
QUIET = 0.1
# Ours: a prompt of more words than this names everything and shows nothing. It only stops a cheat.
LONG_PROMPT = 200


@lru_cache(maxsize=4096)
def content_words(text):
    """Content words of a phrase, lower case, articles left out; each Chinese character counts as a word.

    >>> content_words("The Café, 一只狐狸") == {"café", *"一只狐狸"}
    True
    """
    return frozenset(re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text.lower())) - {
        "a",
        "an",
        "the",
    }


def shows(text, subject):
    """Whether a text names the subject: at least half of its words (ours)."""
    return 2 * len(content_words(text) & content_words(subject)) >= len(content_words(subject))


# ---------------------------------------------------------------------------------------------------------------------
# Lineage: what a delivered artifact really consists of
def deliverables(trajectory):
    """Artifacts that the answer hands over: made in this episode (not attached, not found), each once, in the answer's order."""
    answer = trajectory["answer"] or {}
    by_id = {
        a["id"]: a
        for a in trajectory["artifacts"]
        if a["tool"] != "user" and makes(a["tool"]) == a["kind"]
    }
    return [by_id[i] for i in dict.fromkeys(answer.get("deliverables", [])) if i in by_id]


def read_media(trajectory):
    """An episode's artifacts in the order of their making: `by_id`; `above`, {id: ids of it and of all that it was made from};
    `footage`, {id: ids of the films that it consists of, which were made of no other film; a picture's is itself}; and `looks`.

    looks, {id: key}: the same key for what looks alike (a convention of ours, since records hold no pixels): what one seed and prompt
    made, clips of one picture told the same, and, where no consistency is asked, a picture and its edits. Without a seed every call
    gives something new, and the n of one call differ. A film looks like its footage.
    """
    by_id, above, footage, looks, calls = {}, {}, {}, {}, Counter()
    for a in trajectory["artifacts"]:
        i, written, parents = (
            a["id"],
            a["arguments"],
            [p["id"] for p in a["parents"] if p["id"] in above],
        )
        by_id[i], above[i] = a, {i}.union(*(above[p] for p in parents))
        films = [p for p in parents if by_id[p]["kind"] == a["kind"] == "video"]
        footage[i] = list(dict.fromkeys(f for p in films for f in footage[p])) or [i]
        pictures = [
            p
            for p in parents
            if by_id[p]["kind"] == a["kind"] == "image" and by_id[p]["tool"] != "user"
        ]
        if films:
            seen = {looks[f] for f in footage[i]}
            looks[i] = seen.pop() if len(seen) == 1 else tuple(sorted(map(str, seen)))
        elif pictures and not trajectory["task"]["constraints"]["consistency"]:
            looks[i] = looks[pictures[0]]
        elif "seed" in written or category(a["tool"]) == "Image-to-Video":
            call = (a["tool"], written.get("prompt"), written.get("seed"), *parents)
            looks[i] = (*call, calls[call] % written.get("n", 1))
            calls[call] += 1
        else:
            looks[i] = i
    return SimpleNamespace(by_id=by_id, above=above, footage=footage, looks=looks)


def heard(film, media, config):
    """{id: seconds} of the films and sounds that can still be heard in a film; what is muted or replaced on the way is not."""
    found, todo = {}, [(film, film["duration_s"])]
    while todo:
        a, seconds = todo.pop()
        if a["id"] in found or a["kind"] == "video" and not a["has_audio"]:
            continue
        found[a["id"]], written = seconds, a["arguments"]
        for p in (media.by_id[p["id"]] for p in a["parents"]):
            laid = p["id"] == written.get("audio")
            volume = written.get("volume", 1) * (
                written.get("audio_volume", 1) if laid else written.get("original_volume", 1)
            )
            dropped = written.get("keep_original_audio") is False or (
                written.get("audio") and not laid and written.get("audio_mode") == "replace"
            )
            if volume >= QUIET and not dropped and p["kind"] in ("video", "audio"):
                todo.append((p, seconds if a["kind"] == "audio" else min(seconds, p["duration_s"])))
    return found


@lru_cache(maxsize=4096)
def told(text, wanted, long):
    """Share of the wanted words in one prompt; 0 for one of more than `long` words, or that says most of its words again and again (ours).

    >>> told("a red fox at dusk", words("a red fox"), 200), told("a wall, " + "red fox, " * 9, words("a red fox"), 200)
    (1.0, 0.0)
    """
    said = content_words(text)
    return (
        len(wanted & said) / len(wanted)
        if wanted and len(text.split()) <= min(long, 2 * len(said) + 4)
        else 0.0
    )


def on_topic(item, media, wanted, config):
    """Share of the wanted words in the best prompt behind a picture; in a film, of its worst clip, since one prompt must not stand for all."""
    return min(
        max(
            (
                told(str(media.by_id[i]["arguments"].get(name, "")), wanted, LONG_PROMPT)
                for i in media.above[part]
                for name in ("prompt", "topic")
                if makes(media.by_id[i]["tool"]) in ("image", "video")
            ),
            default=0.0,
        )
        for part in media.footage[item]
    )
