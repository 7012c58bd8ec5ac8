"""lib.tokenizer."""

import re
from collections import Counter
from functools import lru_cache
from math import isqrt

from lib.tasks import english_words
from lib.text import to_json
from lib.toolbox import load_tools

# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer of a policy from scratch
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
def pieces():
    """The pattern that splits text before BPE, which merges only inside a piece (shared/facts: what decides learning).

    A word keeps the space before it, so that " copper" in a request is the same token as in a prompt; tool names are whole; digits
    are single; UTPC's and the tools' JSON keys stand with their punctuation (`", "goal": "`); other runs of punctuation stay whole.
    """
    named = re.findall(
        r'"([a-z_]+)": \{"(?:type|enum)"',
        to_json([tool["parameters"] for tool in load_tools().values()]),
    )
    keys = "|".join(sorted({*named, *UTPC_KEYS}, key=lambda k: (-len(k), k)))
    return (
        rf'(?:[\]}}"]+, |, )?[\[{{]*"(?:{keys})": [\[{{]*(?:"(?!(?:{keys})"))?'
        r"| ?tool_[a-z0-9_]+| ?[A-Za-z_]+| ?[0-9]|[^\sA-Za-z0-9_]+(?: [^\sA-Za-z0-9_]+)*|\s+"
    )


def train_tokenizer(texts, often, vocab_size, path):
    """Train a byte-level BPE and save it as a Hugging Face tokenizer folder.

    Its corpus is data/words.txt and what `texts` holds at least `often` times (tags, JSON, tool names). Rarer words, the subjects
    of training among them, are cut into pieces as a held-out word is: a policy that had them whole never learnt to copy pieces.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces()), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAG_TOKENS),
        special_tokens=control,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tags = re.compile("|".join(TAG_TOKENS))  # the tokenizer takes them out before it splits a text
    counts = Counter(
        piece for text in texts for part in tags.split(text) for piece in re.findall(pieces(), part)
    )
    # The root of a count, so that boilerplate does not take all merges; an English word is worth as much as a hundred uses.
    counts = Counter({piece: n for piece, n in counts.items() if n >= often}) + Counter(
        {f" {word}": 100 for word in english_words()}
    )
    tokenizer.train_from_iterator(
        (piece for piece, n in counts.items() for _ in range(isqrt(n))), trainer
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAG_TOKENS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(path)
