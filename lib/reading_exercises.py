"""Reading: what does this request ask for? Exercises, and how well a policy does them (ours).

The exercises stand for what a pretrained model knows before it sees a trajectory: the language of
requests. They show the wordings of all splits, with subjects, styles and combinations of
constraints of training alone, and never a plan, a call or an answer to the user. What a policy
cannot read, it cannot plan for, and VRL does not teach it; so its reading is measured beside R_vrt,
on requests with held-out subjects and combinations too, and in VisGenBench's wordings, which no
exercise shows.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lib.experiment import Config, DataConfig
from lib.reading import fact_words, facts_of, named_facts, read_request
from lib.runs import seeded_rng
from lib.tasks import make_task, make_tasks, task_types

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

MEASURED = ("visgen", "train", "heldout", "bench")  # the splits whose wordings are read
REQUESTS = 64  # that are read of each split


# --------------------------------------------------------------------------------------------------
# Exercises
def reading_exercise(rng, data: DataConfig) -> tuple[str, str]:
    """(question, answer): a request of a random task type of the config, and what it asks for."""
    name, language = rng.choice(task_types(data))
    task = make_task(rng, "reading", data, name, language)
    # As read, and not as chosen: facts of one kind in the order of the request, as in the expert's
    # thoughts.
    return question_about(task), answer_about(read_request(task["request"]))


def question_about(task: dict) -> str:
    """The question that a reading exercise asks."""
    return f"Read: {task['request']}"


def answer_about(c: dict) -> str:
    """Its right answer: the facts, as the expert's thoughts state them, and the subject; in the
    language of the request."""
    return f": {facts_of(c)}{fact_words(c)['subject']}{c['subject']}"


# --------------------------------------------------------------------------------------------------
# Measuring
def shows_reading(config: Config) -> bool:
    """Whether the policy is shown reading exercises, so that it knows what is asked of it."""
    return bool(config.data.general_kinds["reading"])


def reading_tasks(config: Config) -> list[dict]:
    """The requests on which reading is measured: REQUESTS of each split of MEASURED.

    They are no run's own tasks, but have their splits' subjects, combinations and wordings; the
    bench's are as short as the run's.
    """
    tasks = []
    for split in MEASURED:
        seed = seeded_rng(config.seed, "reading", split).getrandbits(31)
        tasks += make_tasks(REQUESTS, split, config.data, seed)
    return tasks


def reading_accuracy(
    answers: Callable[[list[list[int]]], list[list[int]]],
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[dict],
) -> dict:
    """How well requests are read: {split: {"facts", "subject", "extra", "kinds": {kind: share}}}.

    answers: what answers a list of prompts, such as greedy_answers with its model and tokenizer.
    `facts`: the share of requests of which all facts are right and no other is stated; `subject`:
    of which the subject is; `extra`: in which a fact is stated that was not asked for; `kinds`: of
    those that state this kind of wish, the share in which it is right. All ranks call it.
    """
    from lib import ranks  # torch, which those that make data do without
    from lib.tokens import encode_prompt

    mine = ranks.share(tasks)
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": question_about(task)}])
        for task in mine
    ]
    said = [tokenizer.decode(new) for new in answers(prompts)]
    marks = defaultdict(lambda: defaultdict(list))  # split -> what -> whether it is right
    for task, text in ranks.gather(list(zip(mine, said))):
        for what, right in mark(task["constraints"], text):
            marks[task["split"]][what].append(right)
    found = {}
    for split, whats in marks.items():
        shares = {what: sum(rights) / len(rights) for what, rights in sorted(whats.items())}
        whole = {what: shares.pop(what) for what in ("facts", "subject", "extra")}
        found[split] = {**whole, "kinds": shares}
    return found


def mark(c: dict, said: str) -> list[tuple[str, bool]]:
    """(what, whether it is right) of an answer about a request with constraints `c`."""
    facts, _, subject = said.strip().removeprefix(":").partition(fact_words(c)["subject"])
    stated = pieces(facts)
    asked = named_facts(c)
    wanted = [piece for _, fact in asked for piece in pieces(fact)]
    by_kind = defaultdict(list)
    for kind, fact in asked:
        by_kind[kind].append(all(piece in stated for piece in pieces(fact)))
    return [
        ("facts", sorted(stated) == sorted(wanted)),
        ("subject", subject.strip() == c["subject"]),
        ("extra", any(fact not in wanted for fact in stated)),
        *((kind, all(rights)) for kind, rights in by_kind.items()),
    ]


def pieces(facts: str) -> list[str]:
    """What stands between the commas of facts, some of which hold commas themselves."""
    return [piece.strip() for piece in re.split("[,，]", facts)]


def reading_rows(figures: dict) -> Iterator[tuple[str, float]]:
    """(label, share) of an evaluation's `reading`, if it has one, as rows of a table.

    Facts of each split; of the held-out one the subject and each kind of wish as well.
    """
    for split, shares in figures.get("reading", {}).items():
        yield f"reads facts, {split}", shares["facts"]
        if split == "heldout":
            yield "  subject", shares["subject"]
            for kind, share in shares["kinds"].items():
                yield f"  {kind}", share


def reading_line(reading: dict) -> str:
    """The share of facts read wholly right, by split, in a line."""
    return ", ".join(f"{split} {shares['facts']:.1%}" for split, shares in reading.items())
