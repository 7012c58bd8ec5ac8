"""The tokenizer of a policy from scratch: a byte-level BPE that keeps UTPC's pieces whole."""

import re
from collections import Counter
from functools import lru_cache
from math import isqrt
from pathlib import Path

from lib.scenarios import english_words
from lib.text import to_json
from lib.toolbox import load_tools

UTPC_KEYS = (
    "id",
    "tool",
    "goal",
    "after",
    "name",
    "arguments",
    "deliverables",
    "summary",
    "ids",
    "size",
    "duration_s",
    "sound",
    "error",
    "code",
    "param",
    "message",
    "retryable",
)
TAG_TOKENS = [
    f"<{slash}{name}>"
    for name in ("think", "plan", "tool_call", "answer", "tool_response", "tools")
    for slash in ("", "/")
]


@lru_cache(maxsize=1)
def pieces() -> str:
    """The pattern that splits text before BPE, which merges only inside a piece.

    A word keeps the space before it, so that " copper" in a request is the same token as in a
    prompt; tool names are whole; digits are single; UTPC's and the tools' JSON keys stand with
    their punctuation (`", "goal": "`); other runs of punctuation stay whole.
    """
    parameters = to_json([tool["parameters"] for tool in load_tools().values()])
    names = re.findall(r'"([a-z_]+)": \{"(?:type|enum)"', parameters)
    keys = "|".join(sorted({*names, *UTPC_KEYS}, key=lambda key: (-len(key), key)))
    return (
        rf'(?:[\]}}"]+, |, )?[\[{{]*"(?:{keys})": [\[{{]*(?:"(?!(?:{keys})"))?'
        r"| ?tool_[a-z0-9_]+| ?[A-Za-z_]+| ?[0-9]|[^\sA-Za-z0-9_]+(?: [^\sA-Za-z0-9_]+)*|\s+"
    )


def train_tokenizer(texts: list[str], often: int, vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer folder.

    Its corpus is data/words.txt and what `texts` holds at least `often` times (tags, JSON, tool
    names). Rarer words, the subjects of training among them, are cut into pieces as a held-out word
    is: a policy that had them whole never learnt to copy pieces.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pieces()), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAG_TOKENS),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    counts = count_pieces(texts)
    counts = Counter({piece: n for piece, n in counts.items() if n >= often})
    # An English word is worth as much as a hundred uses.
    counts += Counter({f" {word}": 100 for word in english_words()})
    # The root of a count, so that boilerplate does not take all merges.
    corpus = (piece for piece, n in counts.items() for _ in range(isqrt(n)))
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAG_TOKENS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(path)


def count_pieces(texts):
    """{piece: how often it stands in the texts}."""
    # The tokenizer takes tags out before it splits a text.
    tags = re.compile("|".join(TAG_TOKENS))
    counts = Counter()
    for text in texts:
        for part in tags.split(text):
            counts.update(re.findall(pieces(), part))
    return counts
