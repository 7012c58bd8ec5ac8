"""Readers of Table 7's data sets: each on a small file in its own layout, with a broken record and
a copy in it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lib.experiment import Config, DataConfig  # noqa: E402
from lib.hub import hub_general  # noqa: E402

TOOL = {
    "name": "get_weather",
    "description": "the weather",
    "parameters": {
        "city": {"type": "str", "description": "a city"},
        "days": {"type": "int", "default": 1},
    },
}
CALL = '<functioncall> {"name": "get_weather", "arguments": {"city": "Bonn"}}'


def alpaca(i):
    return {"instruction": f"Name {i} rivers.", "input": "In Asia.", "output": f"Ob, Lena, {i}."}


# data set -> (form, the layout of record i, a broken record,
#              what the first user message and the last reply of record i are)
SETS = {
    "Chinese-DeepSeek-R1-Distill-data-110k-SFT": (
        "alpaca",
        lambda i: {
            "instruction": f"{i}+1等于几?",
            "input": "",
            "output": f"<think>想</think>\n{i + 1}",
            "repo_name": "x",
            "score": 10,
        },
        {"output": ""},
        lambda i: (f"{i}+1等于几?", f"<think>想</think>\n{i + 1}"),
    ),
    "LONGCOT-Refine-500K": (
        "alpaca",
        lambda i: {"prompt": f"Prove {i} = {i}.", "response": f"Let me think.\n\n{i} = {i}."},
        {"response": ""},
        lambda i: (f"Prove {i} = {i}.", f"Let me think.\n\n{i} = {i}."),
    ),
    "alpaca-gpt4": (
        "alpaca",
        lambda i: {**alpaca(i), "text": "Below is an instruction"},
        {"output": ""},
        lambda i: (f"Name {i} rivers.\nIn Asia.", f"Ob, Lena, {i}."),
    ),
    "M3IT": (
        "alpaca",
        lambda i: {
            "instruction": "Answer.",
            "inputs": f"What is on plate {i}?",
            "image_base64_str": ["aGk="],
            "outputs": f"Pea {i}.",
        },
        {"outputs": ""},
        lambda i: (f"Answer.\nWhat is on plate {i}?", f"Pea {i}."),
    ),
    "function-calling-chatml": (
        "sharegpt",
        lambda i: {
            "system_message": "Use functions.",
            "function_description": json.dumps(TOOL),
            "conversations": [
                {"from": "human", "value": f"Weather {i}?"},
                {"from": "function-call", "value": CALL},
                {"from": "function-response", "value": "sun"},
                {"from": "gpt", "value": f"Sunny {i}."},
            ],
        },
        {"conversations": [{"from": "martian", "value": "?"}]},
        lambda i: (f"Weather {i}?", f"Sunny {i}."),
    ),
    "xlam-function-calling-60k": (
        "xlam",
        lambda i: {
            "id": i,
            "query": f"Weather in {i}?",
            "answers": json.dumps([{"name": "get_weather", "arguments": {"city": str(i)}}]),
            "tools": json.dumps([TOOL]),
        },
        {"answers": "[{"},
        lambda i: (
            f"Weather in {i}?",
            f'<tool_call>{{"name": "get_weather", "arguments": {{"city": "{i}"}}}}</tool_call>',
        ),
    ),
    "ms_agent": (
        "sharegpt",
        lambda i: {
            "id": f"MS_{i}",
            "conversations": repr(
                [
                    {"from": "system", "value": "You call plugins."},
                    {"from": "user", "value": f"Draw {i}."},
                    {"from": "assistant", "value": f"<|startofthink|>draw({i})<|endofthink|>"},
                ]
            ),
        },
        {"conversations": "[{"},
        lambda i: (f"Draw {i}.", f"<|startofthink|>draw({i})<|endofthink|>"),
    ),
    "ToolACE": (
        "sharegpt",
        lambda i: {
            "system": "You are an expert in composing functions.",
            "conversations": [
                {"from": "user", "value": f"News {i}"},
                {"from": "assistant", "value": "[News(q)]"},
                {"from": "tool", "value": "[]"},
                {"from": "assistant", "value": f"None {i}."},
            ],
        },
        {"conversations": []},
        lambda i: (f"News {i}", f"None {i}."),
    ),
    "toolbench-v1": (
        "sharegpt",
        lambda i: {
            "id": str(i),
            "conversations": {
                "from": ["system", "user", "assistant", "function", "assistant"],
                "value": ["You are AutoGPT.", f"Find {i}.", "Thought:", "{}", f"Finish {i}"],
            },
        },
        {"conversations": {"from": ["user", "assistant"], "value": ["x"]}},
        lambda i: (f"Find {i}.", f"Finish {i}"),
    ),
    "AFM-CodeAgent-SFT-Dataset": (
        "alpaca",
        lambda i: {
            "instruction": "Solve.",
            "input": f"Sort {i}.",
            "output": f"<think>a</think><code>{i}</code>",
        },
        {"output": None},
        lambda i: (f"Solve.\nSort {i}.", f"<think>a</think><code>{i}</code>"),
    ),
}


@pytest.mark.parametrize("kind", ["json", "text", "parquet"])
@pytest.mark.parametrize("name", SETS)
def test_each_data_set_in_its_own_layout(tmp_path, monkeypatch, capsys, name, kind):
    form, layout, broken, right = SETS[name]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    records = [layout(i) for i in range(12)]
    records = [
        *records[:6],
        {**records[0], **broken},
        records[2],
        *records[6:],
    ]  # one broken, one copy
    path = tmp_path / f"train.{kind}"
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    if kind == "json":
        path.write_text("".join(lines), encoding="utf-8")
    elif kind == "text":
        path.write_text(
            "".join([*lines[:6], lines[6][:9] + "\n", *lines[7:]]), encoding="utf-8"
        )  # the broken record is a broken line
    else:
        from datasets import Dataset

        Dataset.from_list(records).to_parquet(path)
    source = {
        "load": {"path": kind, "data_files": str(path)},
        "form": form,
        "weight": 1,
        "kind": "function",
    }
    items = hub_general(Config(data=DataConfig(general=20, general_source="hub")), [source])
    assert (
        "1 unreadable records and 1 copies skipped; it ended 8 short of its share"
        in capsys.readouterr().out
    )
    got = {
        (
            next(m["content"] for m in item["messages"] if m["role"] == "user"),
            item["messages"][-1]["content"],
        )
        for item in items
    }
    assert len(items) == 12 and got == {right(i) for i in range(12)}
    for item in items:
        assert item["messages"][-1]["role"] == "assistant" and {
            m["role"] for m in item["messages"]
        } <= {"system", "user", "assistant", "tool"}
        assert (item["tools"] is not None) == (form == "xlam")
    if name == "function-calling-chatml":
        assert items[0]["messages"][0] == {
            "role": "system",
            "content": "Use functions.\n" + json.dumps(TOOL),
        }
        assert [m["role"] for m in items[0]["messages"]] == [
            "system",
            "user",
            "assistant",
            "tool",
            "assistant",
        ]


def test_dialogues_that_would_stop_training_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    records = [alpaca(i) for i in range(6)] + [
        {**alpaca(7), "output": "a<|im_end|>b"},
        {**alpaca(8), "instruction": "<|endoftext|>"},
        {**alpaca(9), "output": "def f():<|fim_prefix|>"},
        {**alpaca(10), "instruction": "<|vision_start|><|image_pad|>"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "b.jsonl").write_text(
        json.dumps(
            {
                "conversations": [
                    {"from": "gpt", "value": "Hello!"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "?"},
                ]
            }
        )
        + "\n"
    )
    sources = [
        {
            "load": {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl")},
            "form": form,
            "weight": 1,
            "kind": "instruction",
        }
        for name, form in (("a", "alpaca"), ("b", "sharegpt"))
    ]
    assert len(hub_general(Config(data=DataConfig(general=20)), sources)) == 6
    said = capsys.readouterr().out
    assert "4 unreadable" in said and "1 unreadable" in said


def test_shares_add_up(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    sources = []
    for n, weight in enumerate((110, 500, 100, 1592, 112, 60, 600, 11, 123, 76)):
        (tmp_path / f"{n}.jsonl").write_text(
            "".join(json.dumps(alpaca(1000 * n + i)) + "\n" for i in range(60))
        )
        sources.append(
            {
                "load": {"path": "json", "data_files": str(tmp_path / f"{n}.jsonl")},
                "form": "alpaca",
                "weight": weight,
                "kind": "instruction",
            }
        )
    for n in (20, 61, 97):
        assert len(hub_general(Config(data=DataConfig(general=n)), sources)) == n


def test_a_copy_in_another_data_set_is_a_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(alpaca(i)) + "\n" for i in range(10))
        )
    sources = [
        {
            "load": {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl")},
            "form": "alpaca",
            "weight": 1,
            "kind": "instruction",
        }
        for name in "ab"
    ]
    assert len(hub_general(Config(data=DataConfig(general=20)), sources)) == 10
    assert (
        "0 unreadable records and 10 copies skipped; it ended 10 short" in capsys.readouterr().out
    )
