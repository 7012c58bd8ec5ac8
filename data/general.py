"""What the data are made from: the written scenarios, words, the general mix of PST (Table 7) and the tokenizer of a policy from scratch.

The general mix is generated here (`make_general`), or read from the hub by name (`hub_general`, data.general_source: hub).
"""

import ast
import hashlib
import json
import re
from collections import Counter
from functools import lru_cache
from itertools import accumulate
from math import isqrt

import yaml

from configs.experiment import ROOT, draw
from env import load_tools, to_json


@lru_cache
def load_scenarios(language):
    """data/scenarios.yaml: the 42 task types of Table 8, their wordings, and the subjects, styles and clauses that fill them; zh: scenarios_zh.yaml."""
    if language not in ("en", "zh"):
        raise SystemExit(f"error: config key `data.languages` holds {language!r}; allowed: en, zh")
    text = (ROOT / "data" / ("scenarios.yaml" if language == "en" else "scenarios_zh.yaml")).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@lru_cache(maxsize=1)
def english_words():
    """The words of data/words.txt, in order."""
    lines = (ROOT / "data" / "words.txt").read_text(encoding="utf-8").splitlines()
    return sorted({word for line in lines if not line.startswith("#") for word in line.split()})


@lru_cache(maxsize=1)
def common_words():
    """Words of three letters or more, in order: of data/words.txt and of the training subjects and styles."""
    book = load_scenarios("en")
    shown = [g[:len(g) - len(g) // 5] for g in book["subjects"].values()] + [book["styles"][:len(book["styles"]) - len(book["styles"]) // 6]]
    return sorted(w for w in {*english_words(), *(w for phrase in sum(shown, []) for w in phrase.split())} if len(w) > 2 and w.isalpha())


def odd_words(rng, n):
    """n words: common ones and, four in ten, made-up ones, which begin like one and end like another, so that no one knows them by heart.

    One time in three nearly all are made up, and of four words' parts: pieces come again, and a copy must know more than the last one. Shares ours.
    """
    few = rng.random() < 0.33
    of, words = rng.sample(common_words(), 4) if few else common_words(), []
    for _ in range(n):
        a, b = rng.choice(of), rng.choice(of)
        plain = rng.random() < (0.1 if few else 0.6)
        words.append(a if plain else a[:rng.randint(2, max(2, len(a) - 2))] + b[-rng.randint(2, max(2, len(b) - 2)):])
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The general part of PST (Table 7): generated here, or read from the hub


def tag(name, body):
    """One UTPC block."""
    return f"<{name}>{body if isinstance(body, str) else to_json(body)}</{name}>"


def general_item(rng, kind):
    """One general example: {"messages", "tools", "kind"}; the last message is the one right answer.

    arithmetic: sums, differences, products and the number of equal parts that reach a total; copy: words, said again;
    instruction: doubling, reversing, picking and looking up words; function: a call by a random JSON Schema (never one of the 36 tools).
    """
    tools = None
    if kind == "arithmetic":
        a, b = rng.randint(1, 40), rng.randint(1, 40)
        m, n = rng.randint(2, 9), rng.randint(2, 9)
        ask, reply = rng.choice([(f"What is {a} + {b}?", f"{a} + {b} = {a + b}"), (f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}"),
                                 (f"What is {m} x {n}?", f"{m} x {n} = {m * n}"),
                                 (f"How many parts of {m} make {m * n}?", f"{n} x {m} = {m * n}, so {n}")])
    elif kind == "copy":
        some, other = (" ".join(odd_words(rng, rng.randint(low, 14))) for low in (3, 0))
        ask, reply = f"Repeat: {some}" + (f". Leave out: {other}" if rng.random() < 0.4 else ""), f": {some}"
    elif kind == "instruction":
        some = odd_words(rng, rng.randint(3, 16))
        text, names = " ".join(some), ["color", "city", "pet", "day", "song", "tool"]
        pairs = dict(zip(rng.sample(names, 3), some))
        looked = rng.choice(list(pairs))
        ask, reply = rng.choice([(f"Repeat twice: {text}", f": {text}, {text}"), (f"Write these words backwards: {text}", f": {' '.join(reversed(some))}"),
                                 (f"What is the last word? {text}", f": {some[-1]}"), (f"What is the first word? {text}", f": {some[0]}"),
                                 (f"How many words? {text}", f": {len(some)}"), (f"What comes after {some[0]}? {text}", f": {some[1]}"),
                                 (f"Please write the {text} for {names[0]}, as JSON.", to_json({names[0]: f"the {text}"})),
                                 ("; ".join(f"{k} is {v}" for k, v in pairs.items()) + f". Which {looked}?", f": {pairs[looked]}")])
    else:
        tools = []
        for _ in range(rng.randint(1, 2)):
            params = {odd_words(rng, 1)[0]: rng.choice(["string", "integer", "words"]) for _ in range(rng.randint(1, 3))}
            tools.append((odd_words(rng, 1)[0] + "_" + odd_words(rng, 1)[0], params))
        name, params = rng.choice(tools)
        values = {p: rng.randint(0, 60) if t == "integer" else " ".join(["a", *odd_words(rng, 1 if t == "string" else 3)])
                  for p, t in params.items()}
        ask = rng.choice(["Call {f} with {v}.", "Please use {f}: {v}.", "{v} for {f}, please."]).format(
            f=name, v=" and ".join(f"{p} {v}" for p, v in rng.sample(list(values.items()), len(values))))
        tools = [{"type": "function", "function": {"name": f, "parameters": {"type": "object", "required": list(ps), "properties": {
            p: {"type": "integer" if t == "integer" else "string"} for p, t in ps.items()}}}} for f, ps in tools]
        reply = tag("tool_call", {"name": name, "arguments": values})
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}], "tools": tools, "kind": kind}


def make_general(config, n, split):
    """n offline general examples, kinds in the config's ratio; held-out questions never occur in training.

    A question belongs to one split by the digest of its text: every tenth is held out.
    """
    kinds = [k for k, w in config.data.general_kinds.items() for _ in range(w if split == "train" else 1)]
    rng, items, seen = draw(config.seed, "general", split), [], set()
    for _ in range(200 * n + 1000):
        if len(items) == n:
            return items
        item = general_item(rng, kinds[len(items) % len(kinds)])
        text = item["messages"][0]["content"]
        held = int(hashlib.blake2b(text.encode(), digest_size=4).hexdigest(), 16) % 10 == 0
        if held == (split == "heldout") and (split == "train" or text not in seen):
            seen.add(text)
            items.append(item)
    raise SystemExit(f"error: config key `data.general_heldout`: no more than {len(items)} distinct held-out questions exist; lower it")


CONTROL = re.compile(r"<\|(?:endoftext|im_start|im_end)\|>")


def to_messages(record, form):
    """A hub record as (messages, tools). Forms: alpaca, sharegpt, xlam. ValueError: the record is not of that form.

    M3IT's pictures are left out: the policies here read text."""
    try:
        if form == "alpaca":
            ask = "\n".join(str(record[k]) for k in ("instruction", "input", "inputs", "prompt", "question") if record.get(k))
            reply = next((record[k] for k in ("output", "response", "answer", "outputs") if record.get(k)), None)
            messages, tools = [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}], None
        elif form == "sharegpt":
            roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "function-call": "assistant",
                     "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool", "function-response": "tool",
                     "function_response": "tool"}
            turns = record.get("conversations") or record.get("messages") or []
            turns = ast.literal_eval(turns) if isinstance(turns, str) else turns      # ms_agent's card reads its column so; JSON strings of turns pass too
            if isinstance(turns, dict):      # columns of turns, as `datasets` once stored lists of records
                turns = [{"from": role, "value": text} for role, text in zip(turns["from"], turns["value"], strict=True)]
            opening = "\n".join(record[k] for k in ("system", "system_message", "function_description") if record.get(k))
            turns = ([{"role": "system", "content": opening}] if opening and turns[0].get("from", turns[0].get("role")) != "system" else []) + list(turns)
            messages, tools = [{"role": roles[t.get("from", t.get("role"))], "content": t.get("value", t.get("content"))} for t in turns], None
        else:
            calls = json.loads(record["answers"])
            # xlam lists parameters flat; an argument without a default is required.
            tools = [{"type": "function", "function": {"name": t["name"], "description": t.get("description", ""), "parameters": {
                "type": "object", "properties": t["parameters"], "required": [p for p, d in t["parameters"].items() if "default" not in d]}}}
                for t in json.loads(record["tools"])]
            messages = [{"role": "user", "content": record["query"]}, {"role": "assistant", "content": "\n".join(tag("tool_call", c) for c in calls)}]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, SyntaxError) as e:
        raise ValueError(f"not a {form} record: {e!r}") from e
    if not messages or not all(isinstance(m["content"], str) and m["content"] for m in messages) or messages[-1]["role"] != "assistant":
        raise ValueError(f"not a {form} record: keys {sorted(record)}")
    if next(m["role"] for m in messages if m["role"] != "system") != "user" or any(CONTROL.search(m["content"]) for m in messages):
        raise ValueError("a dialogue that the user does not open, or with a control token in it")
    return messages, tools


def hub_general(config, sources=None):
    """data.general examples from Table 7's data sets, streamed with `datasets`, shares by the paper's quantities, no conversation twice.

    `sources` (tests): [{load: {...arguments of load_dataset}, form, weight, kind}]; default data/general_datasets.yaml. Records that cannot be read
    and copies are skipped and counted, and a set that ends short of its share is said. SystemExit if a set does not read as its form.
    """
    from datasets import load_dataset

    sources = sources or yaml.safe_load((ROOT / "data" / "general_datasets.yaml").read_text(encoding="utf-8"))["datasets"]
    items, seen, ends = [], set(), [config.data.general * w / sum(s["weight"] for s in sources) for w in accumulate(s["weight"] for s in sources)]
    for s, begin, end in zip(sources, [0, *ends], ends):
        name, share, bad, copies = s.get("hub") or s["load"], round(end) - round(begin), 0, 0      # the rounded shares add up
        try:
            stream = load_dataset(**(s.get("load") or {"path": s["hub"]}), split="train", streaming=True)
        except Exception as e:      # offline, a wrong name, a gated set, a loading script: `datasets` has an exception for each
            raise SystemExit(f"error: {name} cannot be loaded ({type(e).__name__}: {' '.join(str(e).split()):.200}); give it a `load:` of its own in "
                             "data/general_datasets.yaml, such as {path: text, data_files: FILES}, or take it out there") from e
        for record in stream.shuffle(seed=config.seed, buffer_size=2000):
            if share <= 0:
                break
            try:
                # A JSONL set read as lines (`load: {path: text, ...}`) loses a broken line; read as JSON it would lose all that follows.
                record = json.loads(record["text"]) if set(record) == {"text"} else record
                messages, tools = to_messages(record, s["form"])
            except ValueError as e:
                bad += 1
                if bad > 100 + share:
                    raise SystemExit(f"error: {name} does not read as `{s['form']}`: {e}") from e
                continue
            said = " ".join(" ".join(m["content"] for m in messages).lower().split())
            if said in seen:
                copies += 1
                continue
            seen.add(said)
            items.append({"messages": messages, "tools": tools, "kind": s["kind"]})
            share -= 1
        print(f"  {name}: {bad} unreadable records and {copies} copies skipped" + (f"; it ended {share} short of its share" if share > 0 else ""))
    draw(config.seed, "hub").shuffle(items)
    return items


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer of a policy from scratch


UTPC_KEYS = ("id", "tool", "goal", "after", "name", "arguments", "deliverables", "summary", "ids", "size", "duration_s", "sound", "error",
             "code", "param", "message", "retryable")
TAGS = [f"<{slash}{name}>" for name in ("think", "plan", "tool_call", "answer", "tool_response", "tools") for slash in ("", "/")]
@lru_cache(maxsize=1)
def pieces():
    """The pattern that splits text before BPE, which merges only inside a piece (shared/facts: what decides learning).

    A word keeps the space before it, so that " copper" in a request is the same token as in a prompt; tool names are whole; digits
    are single; UTPC's and the tools' JSON keys stand with their punctuation (`", "goal": "`); other runs of punctuation stay whole.
    """
    named = re.findall(r'"([a-z_]+)": \{"(?:type|enum)"', to_json([tool["parameters"] for tool in load_tools().values()]))
    keys = "|".join(sorted({*named, *UTPC_KEYS}, key=lambda k: (-len(k), k)))
    return (rf'(?:[\]}}"]+, |, )?[\[{{]*"(?:{keys})": [\[{{]*(?:"(?!(?:{keys})"))?'
            r"| ?tool_[a-z0-9_]+| ?[A-Za-z_]+| ?[0-9]|[^\sA-Za-z0-9_]+(?: [^\sA-Za-z0-9_]+)*|\s+")


def train_tokenizer(texts, often, vocab_size, path):
    """Train a byte-level BPE and save it as a Hugging Face tokenizer folder.

    Its corpus is data/words.txt and what `texts` holds at least `often` times (tags, JSON, tool names). Rarer words, the subjects
    of training among them, are cut into pieces as a held-out word is: a policy that had them whole never learnt to copy pieces.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pieces()), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(TAGS), special_tokens=control, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tags = re.compile("|".join(TAGS))      # the tokenizer takes them out before it splits a text
    counts = Counter(piece for text in texts for part in tags.split(text) for piece in re.findall(pieces(), part))
    # The root of a count, so that boilerplate does not take all merges; an English word is worth as much as a hundred uses.
    counts = Counter({piece: n for piece, n in counts.items() if n >= often}) + Counter({f" {word}": 100 for word in english_words()})
    tokenizer.train_from_iterator((piece for piece, n in counts.items() for _ in range(isqrt(n))), trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                            clean_up_tokenization_spaces=False).save_pretrained(path)


def chat_record(t):
    """{"messages", "tools"} as `datasets`, TRL's SFTTrainer and the OpenAI API take it. They want tool replies to answer calls of their own
    format, and UTPC's calls are text, so a reply goes back as the user's text, in the tags that Qwen's template gives it."""
    messages = []
    for m in t["messages"]:
        if m["role"] != "tool":
            messages.append({"role": m["role"], "content": m["content"]})
        elif messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + tag("tool_response", m["content"])
        else:
            messages.append({"role": "user", "content": tag("tool_response", m["content"])})
    return {"messages": messages, **({"tools": t["tools"]} if t["tools"] else {})}


# ---------------------------------------------------------------------------------------------------------------------
# The mixture of a PST stage (Sec. 4.2, Table 4): D = a share of D_gen U repeat x D_vis


def general_part(config, stage, lengths):
    """Indices of the general examples of stage `stage` (from 0), after those of the stages before (around the end, if they run out).

    The share is of their number, or of their tokens (`unit: tokens`; `lengths`: of each example), exact but for the last example.
    """
    at = 0
    for s in config.pst.stages[:stage + 1]:
        sizes = lengths if s.unit == "tokens" else [1] * len(lengths)
        part, wanted = [], round(s.general * sum(sizes))
        while wanted > 0:
            part.append(at % len(lengths))
            wanted -= sizes[at % len(lengths)]
            at += 1
    return part


def stage_examples(config, stage, visgen, general, epoch=0):
    """The mixture of stage `stage` (from 0) in seeded order: indices into [*general, *visgen], which are encoded examples (ids, mask).

    `general` share of the general examples, and each of D_vis `repeat` times.
    """
    order = general_part(config, stage, [len(ids) for ids, _ in general])
    order += [len(general) + i for i in range(len(visgen))] * config.pst.stages[stage].repeat
    draw("pst order", config.seed, stage, epoch).shuffle(order)
    return order


def stage_order(config, stage, visgen, general):
    """Stage `stage` (from 0) as one stream of indices into [*general, *visgen] (encoded examples), of `tokens` tokens if that is set."""
    lengths, wanted = [len(x[0]) for x in [*general, *visgen]], config.pst.stages[stage].tokens
    order, epoch, total = [], 0, 0
    while True:
        fresh = stage_examples(config, stage, visgen, general, epoch)
        if not fresh:
            raise SystemExit(f"error: stage {stage + 1} has no examples; raise `pst.stages[{stage}].general` or `.repeat`")
        for i in fresh:
            if wanted and total >= wanted:
                break
            order.append(i)
            total += lengths[i]
        epoch += 1
        if total >= wanted:
            return order


def mix_of(config, stage, steps, visgen, general):
    """What a stage trains on, in words: examples and tokens of either kind in its steps, and how much of one pass over its mixture that is."""
    pool, used = [*general, *visgen], [i for step in steps for row in step for i in row]
    tokens = lambda some: sum(len(pool[i][0]) for i in some)      # noqa: E731
    parts = [[i for i in used if i < len(general)], [i for i in used if i >= len(general)]]
    whole, s = tokens(stage_examples(config, stage, visgen, general)), config.pst.stages[stage]
    return (f"stage {stage + 1} mixes {len(parts[0]):,} general examples ({tokens(parts[0]):,} tokens; {s.general:g} of the {s.unit} of {len(general):,}) with "
            f"{len(parts[1]):,} of VisGenData ({tokens(parts[1]):,} tokens; {len(visgen):,} x {s.repeat}): {tokens(used) / whole:.0%} of one pass")
