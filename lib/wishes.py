"""What a family of requests (data/families.yaml) wants of the result, as checks of records.

A family names its checks; each takes a handed-over artifact and the episode, and returns a score in
[0, 1] or a truth. They look at what came out, and at how it was made only where the records show
nothing else. All of it is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lib.families import load_families
from lib.lineage import Media, is_scrap, looked_at, prompt_of
from lib.toolbox import category
from lib.words import (
    can_be_followed,
    content_words,
    depicted,
    in_order,
    is_prose,
    name_subject,
    new_share,
    positive_words,
    says_only,
    shows,
)

# Ours: what is quieter does not count as music, and a shorter fade is a cut.
LOUD = 0.4
FADE_S = 0.5
# Ours: seconds, least and most, of a script's scene.
SCENE_S = (3, 30)
# Ours: a speech has so many different words beside its subject.
SPOKEN_WORDS = 2


@dataclass
class Episode:
    """What the checks look at: the constraints, the calls and the artifacts of a trajectory."""

    c: dict
    language: str
    calls: list[dict]
    media: Media
    request: str = ""

    @property
    def wish(self) -> dict:
        """What the family's sentence says, by slot."""
        return self.c["wish"]

    def sources(self, item: dict) -> list[dict]:
        """The artifact and all that it was made from, in the order of making."""
        above = self.media.above[item["id"]]
        return [a for i, a in self.media.by_id.items() if i in above]

    def given(self) -> list[dict]:
        """What the user attached."""
        return [a for a in self.media.by_id.values() if a["tool"] == "user"]


def operations(item: dict, episode: Episode) -> list[dict]:
    """The operations of tool_video_postprocess behind a film, in order."""
    return [op for a in episode.sources(item) for op in a["arguments"].get("operations", ())]


def only_operation(item: dict, episode: Episode, name: str) -> dict | None:
    """The operation of that name on the user's film, if it is all that was done to it: whoever has
    his film cropped wants it neither shrunk, darkened nor turned round. None otherwise."""
    done = operations(item, episode)
    tools = {a["tool"] for a in episode.sources(item)}
    alone = len(done) == 1 and tools == {"user", "tool_video_postprocess"}
    return done[0] if alone and done[0]["op"] == name else None


def only_cut(item: dict, episode: Episode) -> bool:
    """Nothing was done to the user's film but a cut: it is neither turned nor faded nor sped up."""
    retimed = any(a["tool"] == "tool_video_speed_adjust" for a in episode.sources(item))
    return not retimed and not operations(item, episode)


# ---------------------------------------------------------------------------- what it was made from
def from_all(item: dict, episode: Episode) -> bool:
    """One call took all that the user attached."""
    given = {a["id"] for a in episode.given()}
    return any(given <= {p["id"] for p in a["parents"]} for a in episode.sources(item))


def from_user(item: dict, episode: Episode) -> bool:
    """It was made from one of the user's media of its kind."""
    return any(a["tool"] == "user" and a["kind"] == item["kind"] for a in episode.sources(item))


def flawless(item: dict, episode: Episode) -> bool:
    """Nothing of the user's that it was made from has a flaw, and that was seen before: by a look
    at it, or at all the others."""
    taken = {a["id"]: a for a in episode.sources(item) if a["tool"] == "user"}
    made_by = next((c for c in episode.calls if item["id"] in c["outputs"]), None)
    seen = set()
    for call in episode.calls:
        if made_by and call["status"] == "ok" and call["turn"] < made_by["turn"]:
            seen |= looked_at(call)
    others = {a["id"] for a in episode.given()} - taken.keys()
    known = taken.keys() <= seen or others <= seen
    return known and not any(a["flawed"] for a in taken.values())


def found(item: dict, episode: Episode) -> bool:
    """References that a search for the subject found stand behind it."""
    subject = episode.media.subject
    queries = [
        positive_words(str(a["arguments"]["query"]), subject)
        for a in episode.sources(item)
        if a["tool"] == "tool_search_inspire"
    ]
    return any(2 * len(words & subject) >= len(subject) for words in queries)


def masked(item: dict, episode: Episode) -> bool:
    """Only the masked part of the user's picture was drawn anew."""
    roles = {p["role"]: p["id"] for p in item["parents"]}
    return item["masked"] and roles == {"reference": "in_1", "mask": "in_2"}


def few_calls(item: dict, episode: Episode) -> float:
    """The calls that worked are no more than allowed; otherwise the allowed share of them."""
    return min(1.0, episode.wish["max_calls"] / sum(c["status"] == "ok" for c in episode.calls))


# ---------------------------------------------------------------------------- pictures and films
def sized(item: dict, episode: Episode) -> bool:
    """It has exactly so many pixels."""
    return f"{item['width']}x{item['height']}" == episode.wish["exact_size"]


def marked(item: dict, episode: Episode) -> bool:
    """It bears a service's visible mark."""
    return item["logo"] or item["watermark"]


def own_sound(item: dict, episode: Episode) -> bool:
    """Its clips came with their sound, which can still be heard."""
    clips = [episode.media.by_id[i] for i in episode.media.footage[item["id"]]]
    return item["has_audio"] and all(clip["has_audio"] for clip in clips)


def cropped(item: dict, episode: Episode) -> bool:
    """Its frame was cropped, no smaller than the shape asks for, and nothing else was done."""
    film = episode.given()[0]
    left = max(item["width"] / film["width"], item["height"] / film["height"])
    return bool(only_operation(item, episode, "crop")) and left >= 0.95


def watermarked(item: dict, episode: Episode) -> bool:
    """It bears the watermark with the words asked for, those alone, and nothing else was done."""
    done = only_operation(item, episode, "watermark") or {}
    return item["watermark"] and done.get("value", "").strip() == episode.wish["mark"]


def looped(item: dict, episode: Episode) -> bool:
    """The user's film runs so many times in a row, and nothing else was done to it."""
    film = episode.given()[0]
    times = episode.wish["times"]
    whole = item["n_frames"] == film["n_frames"] * times and item["shots"] == film["shots"] * times
    return whole and bool(only_operation(item, episode, "loop"))


def retimed(item: dict, episode: Episode) -> bool:
    """All of the user's film, faster or slower: every shot, and nothing cut away."""
    tools = {a["tool"] for a in episode.sources(item)}
    whole = item["shots"] == episode.given()[0]["shots"]
    lasts = abs(item["duration_s"] - episode.wish["seconds"]) <= 0.1
    spoilt = tools & {"tool_video_trim_edit", "tool_video_postprocess"}
    return whole and lasts and not spoilt and "tool_video_speed_adjust" in tools


def summed_up(item: dict, episode: Episode) -> bool:
    """The captions say what a summary of the attached text says, in its words and order, in eight
    words or more."""
    shown = in_order(" ".join(text for _, _, text in item["cues"]))
    summaries = [
        in_order(a["text"])
        for a in episode.media.by_id.values()
        if a["tool"] == "tool_content_summary" and {p["id"] for p in a["parents"]} == {"in_1"}
    ]
    return len(set(shown)) >= 8 and any(says_only(shown, words) for words in summaries)


def turned(item: dict, episode: Episode) -> float:
    """From half way on its shots show the change, from their frames on, and before it none does:
    the worse of both."""
    media = episode.media
    clips = media.footage[item["id"]]
    change = content_words(episode.wish["change"])
    n = len(clips)
    before, after = [], []
    for i, clip in enumerate(clips):
        frames = [p["id"] for p in media.by_id[clip]["parents"]]
        said = [depicted(prompt_of(media.by_id[k]), episode.request) for k in (clip, *frames)]
        shown = [change <= positive_words(text, change) for text in said]
        if 2 * i >= n:
            after.append(all(shown[1:]) if frames else shown[0])
        elif 2 * i + 1 < n:  # the shot in the middle may be either
            before.append(not any(shown))
    return min(sum(half) / max(1, len(half)) for half in (before, after))


# ---------------------------------------------------------------------------- texts, pages, sounds
def makes_sense(text: str, episode: Episode) -> bool:
    """Whether a text can be understood by the client."""
    return is_prose(text, episode.media.language, episode.media.topic)


def refined(item: dict, episode: Episode) -> bool:
    """A refined prompt for a picture that says the subject, no longer than allowed, not cut off by
    the limit that its call was told, and makes sense."""
    return (
        item["tool"] == "tool_prompt_refine"
        and item["arguments"].get("target", "image") == "image"
        and item["arguments"].get("language", "en") == episode.language
        and item["n_chars"] <= episode.wish["max_chars"]
        and item["n_chars"] < item["arguments"].get("max_chars", item["n_chars"] + 1)
        and shows(item["text"], episode.c["subject"])
        and makes_sense(item["text"], episode)
    )


def scripted(item: dict, episode: Episode) -> bool:
    """A script of the asked length about the subject that makes sense, in scenes that are neither
    over at once nor without end."""
    n_scenes = item.get("n_scenes") or 0
    return (
        item["tool"] == "tool_video_script_gen"
        and item["arguments"].get("language", "en") == episode.language
        and item["lasts_s"] == episode.c["duration_s"]
        and (not n_scenes or SCENE_S[0] <= item["lasts_s"] / n_scenes <= SCENE_S[1])
        and shows(item["text"], episode.c["subject"])
        and makes_sense(item["text"], episode)
    )


def given_board(episode: Episode) -> list[dict]:
    """The shots of the board that the user attached."""
    return next(a["shot_list"] for a in episode.given() if "shot_list" in a)


def same_shots(item: dict, episode: Episode) -> bool:
    """A board with shots as long as those of the user's."""
    shots = item.get("shot_list", [])
    return [s["duration"] for s in shots] == [s["duration"] for s in given_board(episode)]


def in_mood(item: dict, episode: Episode) -> bool:
    """The instructions for the board named the mood, not to avoid it, and make sense."""
    told = str(item["arguments"].get("instructions", ""))
    mood = content_words(episode.wish["mood"])
    named = episode.wish["mood"] in told and mood <= positive_words(told, mood)
    return named and makes_sense(told, episode)


def narrated(item: dict, episode: Episode) -> bool:
    """Each shot of the board has its part of the user's script."""
    script = next(a["text"] for a in episode.given() if "shot_list" not in a)
    parts = [content_words(shot.get("narration", "")) for shot in item.get("shot_list", [])]
    return bool(parts) and all(part and part <= content_words(script) for part in parts)


def sourced(item: dict, episode: Episode) -> float:
    """A page that was made says what stands at the address, and beside it nothing but the request's
    words: the share of its words that are from there, cubed."""
    read = [
        content_words(a["text"])
        for a in episode.media.by_id.values()
        if episode.wish["url"] in a["arguments"].get("urls", ())
    ]
    asked = content_words(episode.request) | episode.media.topic
    best = 0.0
    for page in episode.media.by_id.values():
        if page["kind"] != "html":
            continue
        texts = [page["arguments"]["title"]]
        for section in page["arguments"]["sections"]:
            texts += [section.get("heading", ""), section.get("text", "")]
        words = content_words(". ".join(texts))
        for source in read:
            if source <= words:
                best = max(best, len(words & (source | asked)) / len(words))
    return best**3


def spoken(item: dict, episode: Episode) -> bool:
    """Speech about the subject, a sentence or more that can be understood and followed, in the
    asked voice."""
    subject = episode.media.subject
    text = ". ".join(span[2] for span in item["speech"] if can_be_followed(span))
    said = positive_words(text, subject)
    voices = {a["arguments"].get("voice") for a in episode.sources(item)} - {None}
    names_it = 2 * len(said & subject) >= len(subject)
    enough = len(said - subject) >= SPOKEN_WORDS and new_share([text], episode.c["subject"]) == 1
    sense = makes_sense(text, episode) and names_it and enough
    return sense and voices == {episode.wish["voice"]}


def composed(item: dict, episode: Episode) -> bool:
    """It is music that was composed for the request, loud enough, and no scrap of it in a loop."""
    loud = all(volume >= LOUD for _, _, volume in item["music"])
    scrap = is_scrap(item, episode.media)
    return bool(item["music"]) and loud and not scrap and not from_user(item, episode)


def audible(item: dict, episode: Episode) -> bool:
    """It is loud enough, and at most half of it lies in fades."""
    volume, fades = 1.0, 0.0
    for source in episode.sources(item):
        written = source["arguments"]
        volume *= written.get("volume", 1)
        fades += written.get("fade_in", 0) + written.get("fade_out", 0)
    return volume >= LOUD and fades <= item["duration_s"] / 2


def to_the_second(item: dict, episode: Episode) -> bool:
    """It lasts as long as asked, within a tenth of a second."""
    return abs(item["duration_s"] - episode.c["duration_s"]) <= 0.1


def faded(item: dict, episode: Episode) -> bool:
    """Its last cut ends in a fade that can be heard."""
    return item["arguments"].get("fade_out", 0) >= FADE_S


# ---------------------------------------------------------------------------- how it was worked
def list_kept(item: dict, episode: Episode) -> float:
    """The share of a to-do list's items that were ticked off, over the pictures and clips that it
    took where the list has fewer different titles; 0 for a list of fewer than three, or one that
    was written when all was done, or as though it were. An item that becomes another one is gone.
    """
    listed, titles = {}, {}
    first_made = next((n for n, c in enumerate(episode.calls) if c["outputs"]), 0)
    for n, call in enumerate(episode.calls):
        if call["name"] != "tool_task_manager" or call["status"] != "ok":
            continue
        action, tasks = call["arguments"]["action"], call["arguments"].get("tasks", ())
        if action == "clear":
            listed = {}
        elif action == "create" and n <= first_made:
            # Nothing is done before it is begun.
            tasks = [task for task in tasks if task.get("status") != "done"]
            listed |= {task["id"]: "todo" for task in tasks}
            titles |= {task["id"]: task.get("title", "").strip().lower() for task in tasks}
        elif action == "update":
            listed |= {t["id"]: t["status"] for t in tasks if t["id"] in listed and "status" in t}
            for task in tasks:
                title = content_words(titles.get(task["id"], ""))
                if not name_subject(content_words(task.get("title", "")) or title, title):
                    listed.pop(task["id"], None)
    done = sum(status == "done" for status in listed.values())
    took = sum("-to-" in category(a["tool"]) for a in episode.sources(item))
    different = len({titles[i] for i in listed if content_words(titles[i])})
    enough = min(1.0, different / max(1, took))
    return enough * done / len(listed) if len(listed) >= 3 else 0.0


CHECKS: dict[str, Callable[[dict, Episode], float]] = {
    check.__name__: check
    for check in (
        from_all,
        from_user,
        flawless,
        only_cut,
        found,
        masked,
        few_calls,
        sized,
        marked,
        own_sound,
        cropped,
        watermarked,
        looped,
        retimed,
        summed_up,
        turned,
        refined,
        scripted,
        same_shots,
        in_mood,
        narrated,
        sourced,
        spoken,
        composed,
        audible,
        to_the_second,
        faded,
        list_kept,
    )
}


def wish_checks(items: list[dict], trajectory: dict, media: Media) -> dict[str, float]:
    """{name: mean score over the items} of the checks of a request's family; {} without one."""
    c = trajectory["task"]["constraints"]
    if not c.get("family"):
        return {}
    task = trajectory["task"]
    episode = Episode(c, task["language"], trajectory["calls"], media, task.get("request", ""))
    names = load_families()[c["family"]]["checks"]
    return {
        name: sum(float(CHECKS[name](item, episode)) for item in items) / len(items)
        for name in names
    }


def wish_words() -> dict[str, str]:
    """{name of a check: what it looks for, in words}."""
    return {name: " ".join(check.__doc__.split()) for name, check in CHECKS.items()}
