"""R_result's checks (Sec. 4.3.2): how far what was handed over meets each constraint that the
request states.

Each reads the records of the artifacts and their lineage; what a family of requests wants besides,
lib/wishes.py checks. The paper names no grades or tolerances: those here are ours.
"""

import re
from collections.abc import Callable
from itertools import accumulate

from lib.experiment import RewardConfig
from lib.lineage import Media, heard, is_given, is_scrap, on_topic, own_words, prompt_of
from lib.spoiling import are_alike, parts_of, share, spoilt_share
from lib.words import (
    QUOTED,
    WORD,
    breaks_off,
    can_be_followed,
    content_words,
    in_order,
    is_gibberish,
    is_known,
    is_prose,
    name_subject,
    new_share,
    positive_words,
    says_only,
    shows,
)

# Seconds that a shot must stand to be seen. Ours.
SHOWN_S = 0.5


# ---------------------------------------------------------------------------- counts and shapes
def near(value: float, wanted: float, tolerance: float) -> float:
    """1 within the tolerance; outside it at most half, falling with the relative distance (ours).

    >>> near(8.0, 8, 0.1), near(6.0, 8, 0.1), near(16.0, 8, 0.1)
    (1.0, 0.375, 0.0)
    """
    off = abs(value - wanted)
    return 1.0 if off <= tolerance + 1e-9 else 0.5 * max(0.0, 1.0 - off / wanted)


# Words by which a request leaves a length open. Ours.
ABOUT = re.compile(
    r"\b(?:about|around|roughly|approximately|some|circa|or so)\b"
    r"|~|大约|大概|左右|差不多|约"
)


def says_about(request: str, seconds: float) -> bool:
    """Whether a request names a number of seconds only roughly: such a word within three words.

    >>> says_about("A film of about 15 seconds.", 15), says_about("15 seconds about a fox", 15)
    (True, False)
    """
    for found in re.finditer(rf"(?<!\d){seconds:g}(?!\d)", request):
        before = " ".join(request[: found.start()].split()[-2:])
        after = request[found.end() :]
        late = re.match(r"\s*(?:s|sec|seconds|秒|秒钟)?\s*(?:or so\b|左右)", after)
        if ABOUT.search(before.lower()) or late:
            return True
    return False


def count_score(found: int, wanted: int) -> float:
    """Share of a wanted number, too many costing like too few (ours).

    >>> count_score(4, 4), count_score(3, 4), count_score(5, 4)
    (1.0, 0.75, 0.8)
    """
    return min(found, wanted) / max(found, wanted) if found and wanted else 0.0


def own_footage(
    item: dict, asked: frozenset[str], media: Media, config: RewardConfig
) -> list[dict]:
    """A film's own clips: each look once, however often it is repeated, slowed down or cut.

    Clips whose prompts say none of the `asked` words are left out.
    """
    by_look = {}
    for i in media.footage[item["id"]]:
        if on_topic(i, media, asked):
            by_look[media.looks[i]] = media.by_id[i]
    return list(by_look.values())


def amount_check(
    items: list[dict], handed: list[dict], claimed: list[str], wanted: int, media: Media
) -> float:
    """Different pictures or films handed over, as a share of the wanted number.

    What looks like the user's own is none of them, nor what shows nothing that was asked for. Other
    media beside them count as too many, and so do ids in the answer (`claimed`) that are nothing
    that was made; a text or a page does not.
    """
    # A film of the user's that was cut or cropped still looks like theirs: lib/wishes.py asks more.
    different = {
        media.looks[item["id"]]
        for item in items
        if item["kind"] == "video" or not is_given(item["id"], media)
        if on_topic(item["id"], media, media.topic)
    }
    counted = {"image", "video", "audio", items[0]["kind"]}
    n_others = sum(a["kind"] not in counted for a in handed)
    return min(len(different), wanted) / max(len(set(claimed)) - n_others, wanted)


def has_aspect(artifact: dict, aspect_ratio: str, tolerance: float) -> bool:
    """Whether width to height is as asked, such as "16:9", within the relative tolerance."""
    w, h = map(int, aspect_ratio.split(":"))
    return abs(artifact["width"] * h / (artifact["height"] * w) - 1) <= tolerance


def aspect_check(item: dict, aspect_ratio: str, media: Media, config: RewardConfig) -> bool:
    """Whether a picture or film has the asked shape, and came by it honestly.

    Its footage has the shape too, or was cropped to it: not stretched, turned on its side or set
    between black bars.
    """
    tolerance = config.aspect_tolerance
    if not has_aspect(item, aspect_ratio, tolerance) or item.get("letterboxed"):
        return False
    footage = [media.by_id[i] for i in media.footage[item["id"]]]
    if all(has_aspect(clip, aspect_ratio, tolerance) for clip in footage):
        return True
    operations = set()
    for i in media.above[item["id"]]:
        operations |= {op["op"] for op in media.by_id[i]["arguments"].get("operations", ())}
    return "crop" in operations and not operations & {"resize", "rotate"}


def duration_check(film: dict, own: list[dict], wanted: float, tolerance: float) -> float:
    """How near a film's length (s) is to the wanted one; it has no more than its `own` footage."""
    seconds = min(film["duration_s"], sum(clip["duration_s"] for clip in own))
    return near(seconds, wanted, tolerance)


def shots_check(film: dict, own: list[dict], wanted: int, config: RewardConfig) -> float:
    """How near a film's number of shots is to the wanted one, the worse of two counts.

    All its shots; and those that stand long enough to be seen, at most the shots of its `own`
    footage.
    """
    seen = sum(n_frames >= SHOWN_S * film["fps"] for n_frames in film["shot_frames"])
    different = min(seen, sum(clip["shots"] for clip in own))
    return min(count_score(film["shots"], wanted), count_score(different, wanted))


def is_large(artifact: dict, resolution: str, config: RewardConfig) -> bool:
    """Whether the long side has 2048 pixels ("2K"), or the short side about 720 ("720p")."""
    sides = (artifact["width"], artifact["height"])
    if resolution == "2K":
        return max(sides) >= 2048
    return min(sides) >= (1 - config.size_tolerance) * int(resolution.rstrip("p"))


def resolution_check(item: dict, resolution: str, media: Media, config: RewardConfig) -> bool:
    """Whether an item is large enough, and so is all that it was made from: enlarging adds nothing.

    What the user attached is as it is.
    """
    sources = [media.by_id[i] for i in media.above[item["id"]]]
    made = [a for a in sources if a["kind"] == item["kind"] and a["tool"] != "user"]
    return all(is_large(a, resolution, config) for a in made)


def web_page_check(items: list[dict], handed: list[dict], subject: str, media: Media) -> float:
    """How far a page that was handed over shows all the items, the best page's (ours), see
    page_share."""
    ids = {item["id"] for item in items}
    pages = [a for a in handed if a["kind"] == "html" and ids <= {p["id"] for p in a["parents"]}]
    return max((page_share(page["arguments"], subject, media) for page in pages), default=0.0)


# A page shows each picture so often at most. Ours.
SHOWN_TWICE = 2


# A name of the agent's own for a tool or medium, and an address. Ours.
INTERNAL = re.compile(r"\btool_\w+|\b(?:in|img|vid|aud|txt|html|data)_\d+\b")
ADDRESS = re.compile(r"(?:\bhttps?://|\bwww\.)[\w./-]*\w")
# So many words of the request's in a row, the subject as one, are not written for a reader. Ours.
PARROTED = 20


def is_for_readers(text: str, subject: str, media: Media) -> bool:
    """Whether a text names no tool or id, no address that neither the request nor something read
    has, and does not say PARROTED words of the request again, quotes left out (ours)."""
    if INTERNAL.search(text):
        return False
    for address in ADDRESS.findall(text):
        sources = (str(a.get("text")) for a in media.by_id.values())
        if address not in media.request and not any(address in source for source in sources):
            return False
    words, asked = (
        WORD.findall(said.lower().replace(subject.lower(), " subject "))
        for said in (text, QUOTED.sub(" ", media.request))
    )
    if min(len(words), len(asked)) < PARROTED:
        return True
    runs = {tuple(asked[i : i + PARROTED]) for i in range(len(asked) - PARROTED + 1)}
    return all(tuple(words[i : i + PARROTED]) not in runs for i in range(len(words)))


def page_share(page: dict, subject: str, media: Media) -> float:
    """Of one page's sections the share that show something or name the subject, times that of its
    texts that can be read (`is_prose`) and are `is_for_readers`, squared; less where something is
    said, or shown, again and again. 0 unless the subject is named above the texts (title or
    headings), and in them.
    """
    wanted = content_words(subject)

    def names_it(*texts):
        said = positive_words(". ".join(texts), wanted)
        return shows(" ".join(said), subject)

    sections = page["sections"]
    headings = [str(section.get("heading") or "") for section in sections]
    texts = [str(section.get("text") or "") for section in sections]
    above = [text for text in (str(page["title"]), *headings) if text.strip()]
    below = [text for text in texts if text.strip()]
    # What stands at an address of the request's may be in any language; lib/wishes.py compares it.
    language = "" if "://" in media.request else media.language
    named = names_it(*above) or not media.language
    if not named or below and language and not names_it(*below):
        return 0.0
    least = LEAST_WORDS if len(below) == 1 else 1
    readable = [is_prose(text, media.language, media.topic) for text in above]
    readable += [is_prose(text, language, media.topic, least) for text in below]
    readable = [
        prose and is_for_readers(text, subject, media)
        for prose, text in zip(readable, above + below)
    ]
    fit = [
        bool(section.get("media_ids")) or names_it(heading, text)
        for section, heading, text in zip(sections, headings, texts)
    ]
    shown = [i for section in sections for i in section.get("media_ids") or ()]
    once = min(1.0, SHOWN_TWICE * len(set(shown)) / max(1, len(shown)))
    once *= min(new_share([text], subject) for text in above)
    return (share(fit) * share(readable) * once * new_share(texts, subject)) ** 2


# Of a film: how much of it music, effects, speech and captions fill where all is well; how loud
# (as a volume of 0 to 1) a sound is to count, and to count fully. All ours.
MUSIC_FILLS, SFX_FILL, SPEECH_FILLS, CAPTIONS_FILL = 0.9, 0.5, 0.5, 0.7
FAINT, LOUD = 0.1, 0.4
# A film of so many seconds is spoken over in both halves; a half needs a quarter of what the whole
# film needs. Ours.
HALVES_S, HALF_FILLS = 20.0, 4.0
# Different words that a narration or captions have for each second of film, and at most. Ours.
WORDS_A_SECOND, MOST_WORDS, LEAST_WORDS = 0.5, 30, 3
# A caption stands at least so long, counts at most so long, and has at most so many characters a
# second, as in the style guides of broadcasters; Chinese ones have fewer (ours, after them).
CUE_S, LONG_CUE_S, CUE_CHARS, CUE_CHARS_ZH = 0.8, 7.0, 20.0, 10.0


def loudness(volume: float) -> float:
    """How far a sound of this volume counts: 0 up to FAINT, 1 from LOUD on (ours)."""
    return min(1.0, max(0.0, (volume - FAINT) / (LOUD - FAINT)))


def filled_s(spans: list[list], weigh: Callable[[list], float]) -> float:
    """Seconds that spans [start, end, ...] fill, each counted by its weight; where they overlap,
    the first one's."""
    total = until = 0.0
    for span in sorted(spans):
        start = max(span[0], until)
        if span[1] > start:
            total += (span[1] - start) * weigh(span)
            until = span[1]
    return total


def faded_s(film: dict, media: Media) -> float:
    """Seconds by which fades shorten the sound under a film: half of each fade (ours)."""
    fades = [0.0]
    for i in media.above[film["id"]]:
        written = media.by_id[i]["arguments"]
        fades.append((written.get("fade_in", 0) + written.get("fade_out", 0)) / 2)
    return max(fades)


def sound_check(part: str, film: dict, media: Media) -> float:
    """How far a film has music or effects that are heard (ours): the share of its length that they
    fill, by their loudness and less their fades, over the share that one expects; squared, so that
    half of it is clearly less than half."""
    if is_scrap(film, media):
        return 0.0
    heard_s = filled_s(film.get(part) or [], lambda span: loudness(span[2]))
    expected = (MUSIC_FILLS if part == "music" else SFX_FILL) * film["duration_s"]
    return min(1.0, max(0.0, heard_s - faded_s(film, media)) / expected) ** 2


def several_facts(texts: list[str], film: dict, subject: str, media: Media) -> float:
    """How far spoken or written texts say enough for a film's length (ours): different words, over
    those that one expects, times the share of texts that do not break off in a word, and that of
    the ones that can be understood (`is_prose`), squared; less where they say the same again and
    again. 0 unless they name the subject, are of a language (`is_gibberish`) and `is_for_readers`;
    but where the request wants another language than its own, no rule knows the words."""
    subject_words = content_words(subject)
    language = media.language
    prose = [text for text in texts if is_prose(text, language, subject_words)]
    said = positive_words(". ".join(prose), subject_words)
    if language:
        if not name_subject(said, subject_words) or is_gibberish(said - subject_words):
            return 0.0
    if not prose or not is_for_readers(" ".join(prose), subject, media):
        return 0.0
    expected = max(LEAST_WORDS, min(MOST_WORDS, WORDS_A_SECOND * film["duration_s"]))
    whole = (len(prose) / len(texts)) ** 2
    if language == "en":
        whole *= sum(not breaks_off(text, subject_words) for text in prose) / len(prose)
    return whole * new_share(prose, subject) * min(1.0, len(said) / expected)


def reads_directions(text: str, film: dict, media: Media) -> bool:
    """Whether a spoken or written text is a piece of a prompt behind its film (ours): directions
    for the camera are none for the ear."""
    said = text.lower().strip(" .。")
    if len(said) < DIRECTION:
        return False
    return any(said in prompt_of(media.by_id[i]).lower() for i in media.above[film["id"]])


# A piece of a prompt of so many characters is no chance. Ours.
DIRECTION = 24


# Seconds that a caption may come after its words or go before them. Ours.
STEP_S = 1.0


def in_step(cues: list[list], film: dict, media: Media) -> float:
    """Of the captions that stand while someone speaks, the share whose words are spoken then,
    within STEP_S, in this order (ours); 1 where nobody speaks, or in another language. Some of what
    is spoken may be left out. A span's words are taken to be spoken evenly over it."""
    spoken = []
    for start, end, text, *_ in film.get("speech") or []:
        words = in_order(text)
        lasts = (end - start) / max(1, len(words))
        spoken += [(start + i * lasts, start + (i + 1) * lasts, w) for i, w in enumerate(words)]
    right = []
    for start, end, text in cues:
        if any(a < end and b > start for a, b, _ in spoken):
            heard_then = [w for a, b, w in spoken if a >= start - STEP_S and b <= end + STEP_S]
            right.append(says_only(in_order(text), heard_then))
    return share(right) if right and media.language else 1.0


def narration_check(film: dict, subject: str, media: Media) -> float:
    """How far a film is spoken over (ours): the share of its length with speech that is loud
    enough and slow enough to be followed, over SPEECH_FILLS, times what is said.

    A film of HALVES_S or more is spoken over in both of its halves: what is said counts by the half
    that hears less. A short film needs no more than the subject named: what cannot be said in its
    time is not expected. A text that is spoken again counts once. A prompt that is read out is
    none.
    """
    heard_spans = [
        span
        for span in film.get("speech") or []
        if can_be_followed(span) and not reads_directions(span[2], film, media)
    ]
    first = {}
    for span in heard_spans:
        first.setdefault(span[2], span)
    spans = list(first.values())
    texts = [span[2] for span in heard_spans if loudness(span[3]) > 0]
    expected = SPEECH_FILLS * min(film["duration_s"], max(2.0, film["duration_s"] - 2.0))
    spoken = filled_s(spans, lambda span: loudness(span[3])) / expected
    if film["duration_s"] >= HALVES_S:
        spoken = min(spoken, HALF_FILLS * worse_half_s(spans, film) / expected)
    return min(1.0, spoken) * several_facts(texts, film, subject, media)


def worse_half_s(spans: list[list], film: dict) -> float:
    """Seconds that loud speech fills in the half of a film that has less of it."""
    middle = film["duration_s"] / 2
    halves = []
    for start, end in ((0.0, middle), (middle, film["duration_s"])):
        inside = [[max(s[0], start), min(s[1], end), *s[2:]] for s in spans]
        halves.append(filled_s([s for s in inside if s[1] > s[0]], lambda s: loudness(s[3])))
    return min(halves)


def is_readable(cue: list) -> bool:
    """Whether a caption stands long enough for its text."""
    start, end, text = cue
    most = CUE_CHARS_ZH if re.search("[\u4e00-\u9fff]", text) else CUE_CHARS
    return end - start >= CUE_S and len(text) <= most * (end - start) and bool(content_words(text))


def subtitles_check(film: dict, subject: str, media: Media) -> float:
    """How far captions cover a film (ours): the share of its length with readable ones, each text
    once and for a few seconds, over CAPTIONS_FILL, times what they say, and how far they are in
    step with the speech."""
    cues = [
        cue
        for cue in film.get("cues") or []
        if is_readable(cue) and not reads_directions(cue[2], film, media)
    ]
    first = {text: [start, min(end, start + LONG_CUE_S)] for start, end, text in reversed(cues)}
    covered = filled_s(list(first.values()), lambda span: 1.0)
    covered /= CAPTIONS_FILL * film["duration_s"]
    facts = several_facts([cue[2] for cue in cues], film, subject, media)
    return min(1.0, covered) * facts * in_step(cues, film, media)


def audio_check(part: str, film: dict, media: Media, subject: str) -> float:
    """How far a film has music, narration, sfx or subtitles as a person expects them."""
    if part == "narration":
        return narration_check(film, subject, media)
    if part == "subtitles":
        return subtitles_check(film, subject, media)
    return sound_check(part, film, media)


def beats_known(media: Media) -> dict[str, tuple[int, list[float]]]:
    """{id of a music: (when its beats were found, as a place in the order of making; their times)}.

    Beats count that were found in music, Suno's or the user's."""
    found = {}
    for n, a in enumerate(media.by_id.values()):
        if a["tool"] != "tool_beat_detect":
            continue
        for parent in a["parents"]:
            tools = {media.by_id[i]["tool"] for i in media.above[parent["id"]]}
            if tools & {"tool_music_suno", "user"}:
                found.setdefault(parent["id"], (n, a.get("beat_times") or []))
    return found


def beat_times_of(film: dict, media: Media) -> list[float] | None:
    """The times (s) of the beats in a film, of a music that is heard in it and whose beats were
    found before it was laid under the clips; None where there is none.

    The music begins with the film that lays it under its clips. What is done to that film later
    moves the beats along: a trim cuts what lies before its start, a change of speed stretches.
    """
    order = {i: n for n, i in enumerate(media.by_id)}
    known = beats_known(media)
    audible = heard(film, media)
    steps, made = [], film
    while made:
        for parent in made["parents"]:
            if parent["id"] in known and parent["id"] in audible and made["id"] in audible:
                found_at, times = known[parent["id"]]
                if found_at < order[made["id"]]:
                    for source, after in reversed(steps):
                        times = moved_beats(times, source, after)
                    return times
        films = [p["id"] for p in made["parents"] if media.by_id[p["id"]]["kind"] == "video"]
        # Where several films are joined, their music lies apart.
        source = media.by_id[films[0]] if made["kind"] == "video" and len(films) == 1 else None
        if source:
            steps.append((source, made))
        made = source
    return None


def moved_beats(times: list[float], source: dict, made: dict) -> list[float]:
    """Where the beats of a film lie in what one more tool made of it."""
    if made["tool"] == "tool_video_trim_edit":
        start = made["arguments"].get("start", 0)
        return [t - start for t in times]
    if made["tool"] == "tool_video_speed_adjust":
        return [t * made["duration_s"] / source["duration_s"] for t in times]
    return times


def beat_check(film: dict, media: Media, config: RewardConfig) -> float:
    """Share of a film's cuts that fall on a beat of its music, within `beat_tolerance` (ours).

    The beats must have been found before the film was joined, see beat_times_of: what nobody knew
    was not cut to. A film without a cut is 1 where they were.
    """
    times = beat_times_of(film, media)
    if not times:
        return 0.0
    cuts = [n / film["fps"] for n in accumulate(film["shot_frames"][:-1])]
    on = [min(abs(t - cut) for t in times) <= config.beat_tolerance for cut in cuts]
    return sum(on) / len(on) if on else 1.0


def style_check(items: list[dict], style: str, media: Media) -> float:
    """How far each picture and clip is told to have the style (ours): the mean share of the
    style's words in their own prompts."""
    words = content_words(style)
    shares = [own_words(part["id"], media, words) for part in parts_of(items, media)]
    return share(shares) if shares else 1.0


def variety_check(items: list[dict], wanted: int, media: Media) -> float:
    """Of the wanted number, the share of pictures or films with a description of their own (ours):
    beside the topic, their prompts say different things, in words that are known."""
    different = []
    for item in items:
        said = frozenset().union(*(media.views[i] for i in media.footage[item["id"]]))
        view = frozenset(word for word in said if not word.isascii() or is_known(word))
        if not any(are_alike(view, other) for other in different):
            different.append(view)
    return min(1.0, len(different) / wanted)


def result_checks(
    items: list[dict],
    handed: list[dict],
    claimed: list[str],
    task: dict,
    media: Media,
    config: RewardConfig,
    calls: list[dict],
) -> dict[str, float]:
    """{name: score} of every constraint that the request states, and of no other.

    `items`: the pictures or films among what was handed over (`handed`); `claimed`: the answer's
    ids; `calls`: the episode's. Each check looks at the records and
    their lineage: copies count as one, a film's length and shots are at most those of its footage,
    and what is muted or stretched does not count.
    """
    c = task["constraints"]
    wanted = c["images"] or c["videos"]
    asked = media.topic
    own = {a["id"]: own_footage(a, asked, media, config) for a in items}

    checks = {"count": amount_check(items, handed, claimed, wanted, media)}
    if c["aspect_ratio"]:
        checks["aspect"] = share([aspect_check(a, c["aspect_ratio"], media, config) for a in items])
    if c["duration_s"] and items[0]["kind"] != "text":
        seconds = c["duration_s"]
        tolerance = config.duration_tolerance
        if says_about(task.get("request", ""), seconds):
            tolerance = config.about_tolerance * seconds
        checks["duration"] = share(
            [duration_check(a, own[a["id"]], seconds, tolerance) for a in items]
        )
    if c["shots"]:
        checks["shots"] = share([shots_check(a, own[a["id"]], c["shots"], config) for a in items])
    if c["resolution"]:
        size = c["resolution"]
        checks["resolution"] = share([resolution_check(a, size, media, config) for a in items])
    if c["transparent"]:
        backgrounds = [a["arguments"].get("background") for a in items]
        checks["transparent"] = share([b == "transparent" for b in backgrounds])
    if c["style"] and items[0]["kind"] in ("image", "video"):
        checks["style"] = style_check(items, c["style"], media)
    if spoilt := spoilt_share(items, c, media, calls):
        checks["unspoilt"] = 1.0 - spoilt
    if c["web_page"]:
        checks["web_page"] = web_page_check(items, handed, c["subject"], media)
    for part in c["audio"]:
        checks[part] = share([audio_check(part, a, media, c["subject"]) for a in items])
    if c["beat"]:
        checks["beat"] = share([beat_check(a, media, config) for a in items])
    if c["input"]:
        sources = [{media.by_id[i]["tool"] for i in media.above[a["id"]]} for a in items]
        checks["input"] = share(["user" in tools for tools in sources])
    if c.get("variety"):
        checks["variety"] = variety_check(items, wanted, media)
    return checks
