"""What a prompt or a spoken text says, read from its words: what it shows, and what it denies.

The rewards ask it of every prompt. Rules know words and little of what they do; docs/reward.md says
what only a judge can see. All of it is ours.
"""

import re
from functools import lru_cache
from itertools import filterfalse
from operator import eq

from lib.scenarios import HAN, known_words

# Ours: a prompt of more words than this names everything and shows nothing. It only stops a cheat.
LONG_PROMPT = 200
ARTICLES = {"a", "an", "the"}

# Where a clause ends; before "but" as well. What is negated in one clause says nothing about the
# next. A colon ends none: "remove the following: a fox".
CLAUSE_END = re.compile(r"[,.;!?()\n，。；！？、]+")
# A part of a clause that is negated for itself.
RELATIVE = re.compile(r"(?=\b(?:that|which|who|whose|where|while|and|then)\b)")
# After these, to the end of the clause, nothing is said to be there.
FROM_HERE = re.compile(
    r"\b(?:no|without|sans|minus|neither|nor|none of|zero"
    r"|(?:free|clear|void|devoid|empty|bare) (?:of|from)"
    r"|lack(?:s|ing)?|nothing to do with|instead of|in (?:place|lieu) of|rather than|other than"
    r"|(?:the )?opposite of|unlike|except(?:ing)?(?: for)?|anything but"
    r"|remov(?:e|es|ed|ing)|eras(?:e|es|ed|ing)|delet(?:e|es|ed|ing)|omit(?:s|ted|ting)?"
    r"|exclud(?:e|es|ed|ing)|avoid(?:s|ed|ing)?|get(?:s|ting)? rid of|tak(?:e|es|ing) away"
    r"|(?:cut|crop|leav|paint|wip|blur)(?:e|es|ing|ping|ting)? (?:out|over|away|off)"
    r"|replac(?:e|es|ed|ing)"
    r"|ignor(?:e|es|ed|ing)|forbid(?:s|den|ding)?|refus(?:e|es|ed|ing)|negative_prompt)\b"
    r"|(?=[\u4e00-\u9fff])(?:"  # English is not compared with each of these
    r"没有|不要|不含|不带|不包[括含]|不存在|缺[少乏失]|少了"
    r"|免去|省[略去]|排除|忽略|禁止|拒绝|避免|而不是|而非|除了"
    r"|替换|代替|取代"
    r"|无(?![人机线花果尽限缝敌边名]))"
)
# A replaced thing is gone, what takes its place is there.
REPLACED_BY = re.compile(r"\b(?:with|by|to)\b|成|为")
# With these in it, nothing of a part of a clause is there, wherever they stand.
NOWHERE = re.compile(
    r"\b(?:not|never|cannot|nowhere|absent|missing|gone|invisible|unseen|hardly|barely"
    r"|vanish(?:es|ed|ing)?|disappear(?:s|ed|ing)?|(?:is|are|was|were|been|being|gets?) "
    r"(?:removed|erased|deleted|omitted|excluded|hidden|replaced|left out|cut out)"
    r"|out of (?:frame|sight|shot))\b|n't\b|n’t\b|\w+-(?:free|less)\b"
    r"|(?=[\u4e00-\u9fff])(?:"
    r"去掉|去除|删除|删掉|擦除|擦掉|移除|移走|拿走|抹[去掉除]|消失|失踪"
    r"|缺席|隐[形去没身]|藏起|[不没未]见(?!过)|不可见"
    r"|[不没未]有?出现|没看[到见]"
    r"|[看见找寻瞧望]不[到见着]|没找|难以?[看找寻]|踪[影迹]|影踪|不知去向"
    r"|[盖遮挡蒙掩罩]住|遮[挡盖掩蔽]|掩[盖埋]"
    r"|被[^覆]{0,4}(?:遮|盖|挡|掩|换掉)(?!着)"
    r"|不在(?:画|镜|这|那|场|其|里|此)|(?:画面?|镜头|画框|视野)[之以]?外"
    r"|从未(?!见过)|从来不|并非)"
)
# These take back the clause before them as well ("a fox that is not there").
NOT_THERE = re.compile(
    r"(?:\bnot|n't|n’t|\bnever|\bnowhere) (?:be |to be )?"
    r"(?:there|here|visible|shown|seen|present|included|in (?:it|the|this)|appear)"
)
# A prompt with these shows an empty frame, whatever else it says.
BLANK = re.compile(
    r"\b(?:cut|fade)s? to (?:black|white)\b"
    r"|\b(?:black|blank|white|empty) (?:screen|frame|image|picture)"
    r"|\bblank (?:\w+ )?(?:card|canvas|page|paper|poster)"
    r"|\b(?:outside|beyond) (?:of )?the (?:frame|picture|shot)|\boff[- ]?screen|\blens cap"
    r"|[黑白]屏|空白(?:的)?(?:画[面布框]|卡片|页面|海报|纸)|空画面|全黑"
    r"|[切淡][到至入]黑|切黑|镜头盖"
)

# Words that say nothing of how a picture differs from the one that it is made from. Ours.
SAYS_NOTHING_NEW = frozenset(
    """same as is it its this that these those one ones be was are keep kept keeping return returned
    returning preserve preserved exact exactly identical unchanged unaltered untouched still again
    before copy copied duplicate version variant variation another new other image images picture
    pictures photo photos original reference subject main object character scene style styled in of
    with and to from on at by for like look looks make made please do just simply without any change
    changes changed changing nothing no not very first second third fourth fifth two three four five
    six seven eight nine ten
    同 一 样 相 原 不 变 保 持 返 回 图 片 像 照 张 和 与 的 了
    在 是 它 这 那 主 体 再 次 请""".split()
)
# Words by which an edit is told to change nothing. Ours.
UNCHANGED = re.compile(
    r"\bun(?:changed|altered|touched|edited|modified)\b|\bas (?:it|they) (?:is|are|was|were)\b"
    r"|\bas is\b|\bidentical\b|\bno (?:change|edit)s?\b|\bnothing (?:changed|new|else)\b"
    r"|\bexactly the same\b|\b(?:return|hand|give|send)\b.*\b(?:it|back|picture|image|input)\b"
    r"|\bcopy\b|\bduplicate\b|原样|不变|不做(?:任何)?改动|原封不动"
)


# ---------------------------------------------------------------------------- words of a text
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


@lru_cache(maxsize=16384)
def content_words(text: str) -> frozenset[str]:
    """Content words of a phrase, lower case, articles left out; each Chinese character is a word.

    >>> content_words("The Café, 一只狐狸") == {"café", *"一只狐狸"}
    True
    """
    return frozenset(WORD.findall(text.lower())) - ARTICLES


def name_subject(words: frozenset[str], subject: frozenset[str]) -> bool:
    """Whether words name the subject: at least half of its content words (ours)."""
    return 2 * len(words & subject) >= len(subject)


def shows(text: str, subject: str) -> bool:
    """Whether a text names the subject, see name_subject."""
    return name_subject(content_words(text), content_words(subject))


def cut_at(pattern: re.Pattern, text: str, wanted: frozenset[str]) -> str:
    """The text up to the pattern's first match; a match of wanted words alone does not count."""
    for match in pattern.finditer(text):
        if not content_words(match[0]) <= wanted:
            rest = text[match.end() :]
            came = (
                REPLACED_BY.search(rest)
                if match[0].startswith(("replac", "替换", "代替", "取代"))
                else None
            )
            return text[: match.start()] + (rest[came.end() :] if came else "")
    return text


@lru_cache(maxsize=8192)
def is_plain(clause: str) -> bool:
    """Whether nothing in a clause can negate anything, as in most: it needs no closer reading. All
    patterns that positive_words reads by stand here.

    >>> is_plain("a red fox"), is_plain("a wall with no fox")
    (True, False)
    """
    return not any(p.search(clause) for p in (BLANK, NOT_THERE, FROM_HERE, NOWHERE))


@lru_cache(maxsize=8192)
def positive_words(text: str, wanted: frozenset[str] = frozenset()) -> frozenset[str]:
    """The content words of a text that it says are there, read by its structure (ours).

    What stands in a negated clause does not count. Words of `wanted`, such as a subject's own
    "hidden" or "no", negate nothing. These are rules, not understanding: docs/reward.md says what
    they cannot see.

    >>> sorted(positive_words("a gray wall with no red fox, pastel"))
    ['gray', 'pastel', 'wall', 'with']
    >>> sorted(positive_words("a fox that does not blink; erase the hat"))
    ['fox']
    """
    lowered = text.lower()
    if "but" in lowered:
        lowered = re.sub(r"\bnothing but\b", "only", lowered)
        lowered = re.sub(r"\b(?:anything|everything|all) but\b", "without", lowered)
        lowered = re.sub(r"\bbut\b", ", but", lowered)
    kept = []
    clauses = CLAUSE_END.split(lowered)
    if all(map(is_plain, clauses)):
        return frozenset().union(*map(content_words, clauses))
    for clause in clauses:
        if is_plain(clause):
            kept.append(clause)
            continue
        if any(not content_words(match[0]) <= wanted for match in BLANK.finditer(clause)):
            return frozenset()
        if NOT_THERE.search(clause):
            continue
        clause = cut_at(FROM_HERE, clause, wanted)
        for part in RELATIVE.split(clause):
            if all(content_words(match[0]) <= wanted for match in NOWHERE.finditer(part)):
                kept.append(part)
    return frozenset().union(*map(content_words, kept))


@lru_cache(maxsize=8192)
def told(text: str, wanted: frozenset[str], long: int, own: frozenset[str] = frozenset()) -> float:
    """Share of the wanted words that one prompt says are there (ours). `own`: these and others that
    negate nothing, such as a subject's "invisible" where the style is wanted.

    0 for a prompt of more than `long` words, or one that says most of its words again and again.

    >>> fox = content_words("a red fox")
    >>> told("a red fox at dusk", fox, 200), told("a wall, " + "red fox, " * 9, fox, 200)
    (1.0, 0.0)
    >>> told("a gray wall, no red fox", fox, 200)
    0.0
    """
    said = positive_words(text, own or wanted)
    n_words = len(text.split())
    if not wanted or n_words > long:
        return 0.0
    # What is said is among the words: most texts are short enough by it alone.
    if n_words > 2 * len(said) + 4 and n_words > 2 * len(content_words(text)) + 4:
        return 0.0
    return len(wanted & said) / len(wanted)


@lru_cache(maxsize=8192)
def view_words(text: str, topic: frozenset[str]) -> frozenset[str]:
    """What a prompt says of its picture beside the topic: the view, the place, the light (ours).

    Words that say nothing new, such as "the same subject, unchanged", and numbers are left out.

    >>> fox = content_words("a red fox")
    >>> view_words("the same red fox, version 2", fox), view_words("a red fox from behind", fox)
    (frozenset(), frozenset({'behind'}))
    """
    said = positive_words(text, topic) - topic - SAYS_NOTHING_NEW
    return frozenset(filterfalse(str.isdigit, said))


# What bears writing or a picture of its own, and what is written on it, or shown there. Ours.
QUOTED = re.compile(r'"[^"]*"|“[^”]*”|「[^」]*」|《[^》]*》')
CARRIER = (
    "word|letter|lettering|text|inscription|writing|sign|signpost|poster|label|card|postcard|banner"
    "|billboard|screen|sticker|note|photograph|logo|caption|headline|newspaper|painting"
)
BEARS = re.compile(
    rf"\b(?P<carrier>{CARRIER})s?\b(?: (?:that|which))?"
    r" ?(?:of|for|about|(?:say|read|spell|bear|show|depict|mention)(?:s|ing)?|with|:"
    r"|(?:\w+ ){1,4}(?:say|spell|depict)(?:s|ing)?)"
    rf"|\bon (?:an?|the) (?:\w+ )?(?P<behind>{CARRIER})s?\b"
    r"|\b(?:written|spelled|spelt|printed|engraved|handwritten)(?: \w+)?"
    r" (?P<words>word|letter|text)s?\b:?"
)


@lru_cache(maxsize=8192)
def depicted(text: str, request: str) -> str:
    """A prompt without what it has only written or drawn on something (ours): what stands in
    quotes, and what a sign, a screen, a poster bears, up to the end of the clause. Where the
    request asks for writing of that kind, it counts.

    >>> depicted("a blank wall, a card with the written words: red fox, at dusk", "a red fox")
    'a blank wall, a , at dusk'
    """
    if not QUOTED.search(text) and not BEARS.search(text.lower()):
        return text
    asked = content_words(request)
    if not asked & {"quote", "quotes", "text", "words", "lettering", "字"}:
        text = QUOTED.sub(" ", text)
    kept = []
    clauses = re.split(r"([,.;!?\n，。；！？])", text)
    for clause in clauses:
        for match in BEARS.finditer(clause.lower()):
            carrier = match["carrier"] or match["behind"] or match["words"] or "words"
            if not asked & {carrier, carrier + "s"}:
                clause = clause[: match.start()]
                break
        kept.append(clause)
    return "".join(kept)


# ---------------------------------------------------------------------------- languages
# A language that a request wants by name, beside what is read or heard in it. Ours.
NAMED = (
    "english|chinese|mandarin|french|german|spanish|italian|portuguese|russian|japanese|korean"
    "|arabic|hindi|turkish|dutch|polish|swedish|finnish|latin"
)
READ_OR_HEARD = (
    r"subtitles?|subs|captions?|narrat\w+|voice\w*|speakers?|speech|commentary|text|words|copy"
)
NAMED_ZH = "英文|英语|中文|汉语|普通话|法语|法文|德语|日语|日文|韩语|俄语"
LANGUAGE_WANTED = re.compile(
    rf"\b(?P<of>{NAMED}) (?:{READ_OR_HEARD})\b"
    rf"|\b(?:in|into) (?:(?:plain|simple|good) )?(?P<in>{NAMED})\b(?! \w)"
    rf"|(?P<zh_of>{NAMED_ZH})(?:字幕|旁白|配音|解说|朗读|文案)"
    rf"|(?<![别不])用(?P<zh_in>{NAMED_ZH})"
)
CODES = {"english": "en", "英文": "en", "英语": "en"} | dict.fromkeys(
    ("chinese", "mandarin", "中文", "汉语", "普通话"), "zh"
)
# A letter that is neither Latin nor Chinese; so many letters of another script may be a name. Ours.
OTHER_LETTER = re.compile(r"[^\W\d_a-zA-Z\u00aa-\u024f\u1e00-\u1eff\u3400-\u9fff]")
A_NAME = 3


@lru_cache(maxsize=8192)
def language_of(text: str) -> str:
    """The language of a text: "zh" where it has a Chinese character, "en" otherwise."""
    return "zh" if HAN.search(text) else "en"


@lru_cache(maxsize=8192)
def language_wanted(request: str) -> str:
    """The language that is to be read and heard: "en" or "zh", the request's own; "" where it wants
    another by name, or is itself in one: no rule here knows its words.

    >>> language_wanted("A film with Chinese subtitles."), language_wanted("A French braid.")
    ('', 'en')
    """
    own = language_of(request)
    for named in LANGUAGE_WANTED.finditer(request.lower()):
        if CODES.get(named[named.lastgroup]) != own:
            return ""
    return own if len(OTHER_LETTER.findall(request)) <= A_NAME else ""


@lru_cache(maxsize=8192)
def is_foreign(text: str, language: str) -> bool:
    """Whether a text is in another language than "en" or "zh" (ours): it has more letters of
    another script than a name has; a Chinese one has more other words than characters.

    >>> is_foreign("a sign that reads 茶", "en"), is_foreign("a cup. 全部换成茶", "en")
    (False, True)
    """
    chinese, others = len(HAN.findall(text)), len(OTHER_LETTER.findall(text))
    if language == "zh":
        return others > A_NAME or sum(map(str.isalpha, WORD.findall(text))) > 2 * chinese
    return language == "en" and chinese + others > A_NAME


SENTENCE_END = re.compile(r"[.!?\n]+")
# Of a sentence, the share of rare words that a good writer has at most. Ours.
RARE_WORDS = 0.75
# Marks of a template or of HTML, emoji and other signs (but notes), and marks in a row, which no
# reader wants to see. Ours.
MARKUP = re.compile(
    "[{}]|</?[a-zA-Z]|[\u2190-\u2668\u266c-\u2bff\U0001f000-\U0001faff]|[^\\w\\s]{5,}"
)


@lru_cache(maxsize=8192)
def is_prose(text: str, language: str, topic: frozenset[str], least: int = 1) -> bool:
    """Whether a person can make something of a text that is read or heard (ours): it is in the
    language, has no marks of a template and no emoji, says not each word twice, and has `least`
    different words that are known, or of the topic, and neither it nor a sentence of it is
    gibberish.

    >>> is_prose("xxx", "en", frozenset()), is_prose("A red fox", "en", frozenset())
    (False, True)
    """
    if is_foreign(text, language) or MARKUP.search(text) or stutters(text):
        return False
    words = content_words(text)
    if language != "en":
        return len(words) >= least
    known = [w for w in words if w in topic or w.isdigit() or len(w) > 1 and is_known(w)]
    if len(known) < least or is_gibberish(words - topic):
        return False
    return not has_gibberish(text, topic)


@lru_cache(maxsize=8192)
def has_gibberish(text: str, topic: frozenset[str]) -> bool:
    """Whether a sentence of a text is gibberish (`is_gibberish`); `topic`: words that are known."""
    sentences = [content_words(sentence) - topic for sentence in SENTENCE_END.split(text)]
    return any(is_gibberish(sentence, RARE_WORDS) for sentence in sentences)


def stutters(text: str) -> bool:
    """Whether a text says most of its words twice in a row (ours); "very, very" is no stutter.

    >>> stutters("a a red red fox fox"), stutters("a red fox")
    (True, False)
    """
    words = WORD.findall(text.lower())
    again = sum(map(eq, words, words[1:]))
    return again > 2 and again > 0.4 * len(words)


# Of the runs of so many words of a text, a share that may come again. Ours.
RUN, REFRAIN = 4, 0.25


def new_share(texts: list[str], subject: str) -> float:
    """How far texts do not say the same again and again (ours): the share of their runs of words,
    the subject as one word, that are different; 1 where no more than REFRAIN come again.

    >>> new_share(["They sell bread and cake here. "] * 12, "a baker") < 0.2
    True
    >>> new_share(["a baker " * 9], "a baker") < 0.3
    True
    """
    runs = []
    for text in texts:
        words = WORD.findall(text.lower().replace(subject.lower(), " subject "))
        runs += [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)] or [tuple(words)]
    return min(1.0, len(set(runs)) / len(runs) / (1 - REFRAIN)) if runs else 1.0


def in_order(text: str) -> list[str]:
    """The content words of a text one behind the other."""
    return [word for word in WORD.findall(text.lower()) if word not in ARTICLES]


def says_only(words: list[str], source: list[str]) -> bool:
    """Whether all words stand in a source, in its order; it may have others between them.

    >>> says_only(["red", "fox"], ["red", "old", "fox"]), says_only(["fox", "red"], ["red", "fox"])
    (True, False)
    """
    rest = iter(source)
    return all(word in rest for word in words)


# ---------------------------------------------------------------------------- what is spoken
# Characters a second, least and most, of speech that can be followed; Chinese has fewer. A short
# text may be slower, by its pauses. All ours.
SPEECH_RATE, SPEECH_RATE_ZH, SHORT_TEXT = (7.0, 17.5), (2.0, 6.0), 20


def can_be_followed(span: list) -> bool:
    """Whether a span of speech [start, end, text, ...] is neither too fast nor too slow."""
    start, end, text = span[:3]
    chinese = bool(re.search("[\u4e00-\u9fff]", text))
    least, most = SPEECH_RATE_ZH if chinese else SPEECH_RATE
    rate = len(text) / max(0.1, end - start)
    return rate <= most and (rate >= least or len(text) < SHORT_TEXT / (4 if chinese else 1))


def is_gibberish(said: frozenset[str], most: float = 0.5) -> bool:
    """Whether more than the share `most` of these words are none that is known (ours): of three
    letters or more, in letters of English; too few words are never gibberish."""
    words = [w for w in said if len(w) > 2 and w.isascii() and w.isalpha()]
    unknown = sum(not is_known(word) for word in words)
    return len(words) > 5 and unknown > most * len(words)


@lru_cache(maxsize=65536)
def is_known(word: str) -> bool:
    """Whether a word, or what is left without an English ending, is known."""
    if word in known_words():
        return True
    stems = {word, *(word.removesuffix(end) for end in ("s", "es", "d", "ed", "ing", "ly", "er"))}
    doubled = {stem[:-1] for stem in stems if len(stem) > 3 and stem[-1] == stem[-2]}
    mute = {stem + "e" for stem in (stems | doubled) - {word}}
    return bool((stems | doubled | mute) & known_words())


def breaks_off(text: str, subject: frozenset[str]) -> bool:
    """Whether a text ends in a piece of a word (ours): in one that is none that is known, with no
    mark behind it. `subject`: words that are known as well.

    >>> breaks_off("Scientists argued o", frozenset()), breaks_off("They argued", frozenset())
    (True, False)
    """
    last = LAST_WORD.search(text.lower())
    if not last or last[0] in subject:
        return False
    return not is_known(last[0]) if len(last[0]) > 1 else last[0] not in "ai"


LAST_WORD = re.compile(r"(?<![^\W_])[a-z]+$")
