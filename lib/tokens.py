"""Tokens: the policy's tokenizer and chat template, and dialogues as token ids with a loss mask.

Ids and loss mask come from the same call, and only new text is ever encoded: what the agent sampled
is never decoded and encoded again (token in, token out).
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lib.experiment import Config
from lib.runs import ROOT
from lib.vision import spell_pictures

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"


# --------------------------------------------------------------------------------------------------
# The tokenizer
def load_tokenizer(config: Config, run: Path) -> "PreTrainedTokenizerBase":
    """The policy's tokenizer with our chat template (`model.template`).

    Its `vision` names the model if that is a Qwen3-VL, whose image processor reads the user's
    pictures. SystemExit if the tokenizer is missing or cannot serve multi-turn training.
    """
    from transformers import AutoTokenizer

    source = tokenizer_source(config, run)
    tokenizer = AutoTokenizer.from_pretrained(source)
    template = ROOT / "data" / "templates" / f"{config.model.template}.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    if END_OF_TURN in tokenizer.get_vocab():
        # A base model's may be another token, and the sampler ends a turn at it.
        tokenizer.eos_token = END_OF_TURN
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or END_OF_TURN
    check_template(tokenizer)
    if config.model.path or config.pst.init_from:
        tokenizer.vision = vision_source(source)
    return tokenizer


def tokenizer_source(config: Config, run: Path) -> str:
    """Folder or hub name of the tokenizer. SystemExit if it is a folder that is missing."""
    if config.pst.init_from:
        # The ids mean what they meant when that policy was trained.
        return str(finished_policy(config.pst.init_from))
    if config.model.path:
        return pretrained(config)
    source = run / "data" / "tokenizer"
    if not source.is_dir():
        raise SystemExit(f"error: {source} is missing; `python make_data.py --config ...` makes it")
    return str(source)


def pretrained(config: Config) -> str:
    """`model.path`: a folder, which may be named from the repository's root, or a hub name."""
    folder = ROOT / config.model.path
    return str(folder) if folder.is_dir() else config.model.path


def finished_policy(folder: str) -> Path:
    """The path of `pst.init_from`, from the repository's root.

    SystemExit if no finished policy is there.
    """
    path = ROOT / folder
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise SystemExit(
                f"error: config key `pst.init_from` is {folder}, which is no finished policy: "
                f"{path / name} is missing; give the folder pst/final of a run"
            )
    return path


def vision_source(source: str) -> str | None:
    """`source`, the model's folder or hub name, if the model is a Qwen3-VL; None for others."""
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(source).model_type
    return source if model_type == "qwen3_vl" else None


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict],
    tools: list[dict] | None = None,
    generate: bool = False,
) -> str:
    """Messages as ChatML text; `generate` opens the agent's next turn."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=generate
    )


# --------------------------------------------------------------------------------------------------
# Dialogues as ids
def encode_trajectory(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict], tools: list[dict] | None = None
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a dialogue up to its last agent turn (nothing after it is trained).

    The mask of L_SFT (Sec. 4.2) is 1 exactly on the agent's tokens, its end of turn included:
        <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n hello <|im_end|>
        0            0    0  0  0          0  0            0         0  1     1
    ValueError: no agent turn, nothing before it, or a message that forges a control token.
    """
    roles = [message["role"] for message in messages]
    agent_turns = [i for i, role in enumerate(roles) if role == "assistant"]
    if not agent_turns or agent_turns[0] == 0:
        raise ValueError(
            f"a trajectory needs messages before its first agent turn and an agent turn, "
            f"got roles {roles}"
        )
    ids, mask = [], []
    start = 0
    for i in agent_turns:
        between = messages[start:i]
        if start == 0:
            told = encode_prompt(tokenizer, between, tools)
        else:
            told = encode_tool_messages(tokenizer, between)
        said = encode_agent(tokenizer, messages[i]["content"])
        ids += told + said
        mask += [0] * len(told) + [1] * len(said)
        start = i + 1
    return ids, mask


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict], tools: list[dict] | None = None
) -> list[int]:
    """Ids of the opening messages and of the agent's opening `<|im_start|>assistant\\n`.

    ValueError: a message forges a control token.
    """
    # The template writes tools into the system message, and makes one where there is none.
    added = bool(tools) and messages[0]["role"] != "system"
    turns = len(messages) + added
    messages, picture_tokens = spell_pictures(messages)
    text = render(tokenizer, messages, tools, generate=True)
    return encode_text(tokenizer, text, 2 * turns + 1 + picture_tokens, "the prompt")


def encode_tool_messages(tokenizer: "PreTrainedTokenizerBase", messages: list[dict]) -> list[int]:
    """Ids between the agent's end of turn and its next turn.

    They are a newline, the tool (or user) turns, and the agent's opening. ValueError: a message
    forges a control token.
    """
    opening = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    old = len(render(tokenizer, opening).rstrip("\n"))
    text = render(tokenizer, opening + messages, generate=True)[old:]
    return encode_text(tokenizer, text, 2 * len(messages) + 1, "a tool message")


def encode_agent(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of what the agent writes in one turn, with its end of turn.

    ValueError: the text holds a control token.
    """
    return encode_text(tokenizer, text + END_OF_TURN, 1, "the agent's turn")


def encode_text(
    tokenizer: "PreTrainedTokenizerBase", text: str, expected: int, what: str
) -> list[int]:
    """Ids of text that holds `expected` control tokens.

    ValueError if there are more: some content forges a turn. `what` names the text there.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not hasattr(tokenizer, "control_ids"):
        # Kept, because reading added_tokens_decoder takes milliseconds.
        tokenizer.control_ids = frozenset(control_ids(tokenizer))
    found = sum(map(tokenizer.control_ids.__contains__, ids))
    if found != expected:
        raise ValueError(
            f"{what} holds {found} control tokens where the chat template puts {expected}: "
            f"a message's content contains one, such as <|im_end|>; write `< |` for `<|` in it. "
            f"Content begins: {text[:200]!r}"
        )
    return ids


def control_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids that structure a dialogue: <|...|>, end of text, padding.

    The tags of UTPC are not among them: agents write them.
    """
    added = tokenizer.added_tokens_decoder.items()
    found = {i for i, token in added if re.fullmatch(r"<\|.*\|>", token.content)}
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    return found | {i for i in special if i is not None}


# --------------------------------------------------------------------------------------------------
# The template check
def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that rendering n messages is a prefix of rendering n + 1, token by token.

    Three dialogues are rendered. SystemExit says what is wrong with the tokenizer or the template.
    """
    check_control_tokens(tokenizer)
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "A logo"}
    call = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    agent = {"role": "assistant", "content": f"<think>first</think>{call}"}
    tool = {"role": "tool", "content": '{"ids": ["img_1"]}'}
    last = {"role": "assistant", "content": "<think>second</think><answer>{}</answer>"}
    function = {"name": "a", "description": "b", "parameters": {"type": "object"}}
    schema = [{"type": "function", "function": function}]
    for messages, tools in (
        ([system, user, agent, tool, tool, last], None),
        ([user, agent, user, last], None),
        ([system, user, agent, tool, agent, tool, user, last], schema),
    ):
        text = check_history(tokenizer, messages, tools)
        check_turn_by_turn(tokenizer, messages, tools, text)


def check_control_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """SystemExit if a control token of ChatML is not one token."""
    for control in (START_OF_TURN, END_OF_TURN):
        if len(tokenizer.encode(control, add_special_tokens=False)) != 1:
            raise SystemExit(
                f"error: the tokenizer splits {control}, the chat template needs it as one token; "
                f"add it as a special token, or choose a model that speaks ChatML (`model.path`)"
            )


def check_history(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict], tools: list[dict] | None
) -> str:
    """The dialogue as text. SystemExit if a later message changes how earlier ones are rendered."""
    before = ""
    for n in range(1, len(messages) + 1):
        text = render(tokenizer, messages[:n], tools)
        if not text.startswith(before):
            raise SystemExit(
                f"error: the chat template rewrites history: the rendering of {n - 1} messages is "
                f"not a prefix of the rendering of {n} (it may strip <think> from earlier turns, "
                f"as Qwen3's does), so tokens that were sampled would change; use one of ours: "
                f"model.template=qwen3 for Qwen's models, else chatml"
            )
        before = text
    return before


def check_turn_by_turn(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict],
    tools: list[dict] | None,
    text: str,
) -> None:
    """SystemExit if the dialogue's turns have other ids one by one than as one `text`."""
    ids, _ = encode_trajectory(tokenizer, messages, tools)
    end = text.rindex(END_OF_TURN) + len(END_OF_TURN)
    whole = tokenizer.encode(text[:end], add_special_tokens=False)
    if ids == whole:
        return
    differ = (i for i, (one, other) in enumerate(zip(ids, whole)) if one != other)
    at = next(differ, min(len(ids), len(whole)))
    raise SystemExit(
        f"error: encoding turn by turn differs from encoding the whole dialogue at token {at}; "
        f"the tokenizer merges text over a turn's border: make {START_OF_TURN} and {END_OF_TURN} "
        f"special tokens"
    )
