"""The funnel of Fig. 3: stages, resuming, broken lines, human review, formats; metacognition."""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import make_data  # noqa: E402
from env import VisGenEnv, parse_utpc  # noqa: E402
from lib.data_statistics import word_runs  # noqa: E402
from lib.experiment import load_config  # noqa: E402
from lib.expert import (  # noqa: E402
    MANY_WISHES,
    METACOGNITION,
    OVERLOOKED,
    jobs_at_once,
    make_plan,
    overlook,
    vision_agent,
)
from lib.families import asked_kind  # noqa: E402
from lib.reading import read_request  # noqa: E402
from lib.review import export_review, key_of  # noqa: E402
from lib.runs import each_line, read_jsonl, seeded_rng, write_jsonl  # noqa: E402
from lib.tasks import make_tasks  # noqa: E402
from lib.text import tag  # noqa: E402
from lib.toolbox import load_tools  # noqa: E402
from make_data import chat_record, make_trajectories, make_visgen, sift  # noqa: E402
from rewards import ltr_rewards  # noqa: E402


@pytest.fixture(scope="module")
def config():
    return load_config(
        ROOT / "configs" / "visgen.yaml",
        ["data.queries=210", "data.lapses=0", "data.languages=[en]"],
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A funnel run through once: its folder and counts. Nobody may write there."""
    folder = tmp_path_factory.mktemp("visgen")
    make_trajectories(config, folder)
    return folder, make_visgen(config, folder)


def copy_of(folder, to, names):
    for name in names:
        (to / name).write_bytes((folder / name).read_bytes())


def test_each_stage_counts_what_it_takes(whole):
    folder, counts = whole
    kept, removed = read_jsonl(folder / "visgen.jsonl"), read_jsonl(folder / "removed.jsonl")
    assert (
        counts["queries"] == 210 == len(kept) + len(removed)
        and counts["kept"] == len(kept) == counts["candidates"]
        and counts["reviewed"] == 0
    )
    assert {t["task"]["id"] for t in kept}.isdisjoint(r["id"] for r in removed)
    assert sum(counts["reasons"].values()) == len(removed) and all(
        r["reason"] and r["stage"] in ("trajectories", "filter") for r in removed
    )
    assert all(
        t["reward"]["total"] >= 0.9 and t["ended"] == "answer" and t["review"] == "unreviewed"
        for t in kept
    )


def test_the_filter_says_why(whole, config):
    made = read_jsonl(whole[0] / "trajectories.jsonl")[:8]
    made = [
        {
            **t,
            "task": {**made[0]["task"], "id": f"t{i}"},
            "plan": made[0]["plan"],
            "reward": {**t["reward"], "total": 1.0},
        }
        for i, t in enumerate(made)
    ]
    made[0] = {**made[0], "ended": "max_turns", "answer": None}
    made[1] = {**made[1], "reward": {**made[1]["reward"], "total": 0.5, "result": 0.1}}
    made[2] = {**made[2], "reward": {**made[2]["reward"], "total": float("nan")}}
    kept, removed = sift(made, config)
    assert list(kept) == ["t3", "t4", "t5", "t6", "t7"]
    assert [(r["id"], r["stage"]) for r in removed] == [
        ("t0", "trajectories"),
        ("t1", "filter"),
        ("t2", "filter"),
    ]
    assert removed[0]["reason"] == "no answer (max_turns)"
    assert removed[1]["reason"] == "LtrReward below 0.9, lowest in result"
    assert "judge gave no verdict" in removed[2]["reason"]


def test_a_flaw_that_is_handed_over_is_dropped_where_agents_look(whole, config):
    made = read_jsonl(whole[0] / "visgen.jsonl")[:20]
    assert config.data.thoughts == "full" and not sift(made, config)[1]
    blind = replace(config, data=replace(config.data, thoughts="short"))
    for t in made:
        for a in t["artifacts"]:
            a["flawed"] = a["id"] not in t["answer"]["deliverables"]
    assert not sift(made, config)[1]
    for a in made[3]["artifacts"]:
        a["flawed"] = True
    assert [r["id"] for r in sift(made, config)[1]] == [made[3]["task"]["id"]]
    assert not sift(made, blind)[1]


def test_what_lapses_spoil_is_dropped(config, tmp_path):
    """All of it, and what they did not spoil is kept, but for a call or two that failed."""
    lapsing = replace(config, data=replace(config.data, lapses=0.5))
    make_trajectories(lapsing, tmp_path)
    kept, removed = sift(each_line(tmp_path / "trajectories.jsonl"), lapsing)
    made = read_jsonl(tmp_path / "trajectories.jsonl")
    bad = {
        t["task"]["id"]
        for t in made
        if not t["answer"] or t["reward"]["result"] < 1 - 1e-9 or make_data.hands_over_flaw(t)
    }
    gone = {record["id"] for record in removed}
    assert bad <= gone and len(gone - bad) < 0.03 * len(made) < 0.3 * len(made) < len(bad)


def test_without_plan_check_one_of_many_wishes_is_overlooked(config):
    seen = Counter()
    for i, task in enumerate(make_tasks(300, "visgen", config.data, 8)):
        c = read_request(task["request"])
        less = overlook(c, seeded_rng("overlook", i))
        gone = [name for name in c if less[name] != c[name]]
        if sum(bool(c[name]) for name in OVERLOOKED) < MANY_WISHES:
            assert not gone
        assert len(gone) <= 1 or gone == ["audio", "beat"]
        assert all(not less[name] for name in gone)
        assert {step["tool"] for step in make_plan(less, ())} <= set(task["pool"])
        seen[" ".join(gone)] += 1
    assert all(seen[name] > 5 for name in ("style", "aspect_ratio", "resolution", "audio")), seen


@pytest.mark.parametrize("at", [0.001, 0.35, 0.999])
def test_a_stopped_run_goes_on_and_ends_the_same(whole, config, tmp_path, at):
    folder, _ = whole
    copy_of(folder, tmp_path, ["queries.jsonl", "trajectories.jsonl"])
    path = tmp_path / "trajectories.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * at)])  # in the middle of a line
    make_trajectories(config, tmp_path)
    assert path.read_bytes() == data
    make_visgen(config, tmp_path)
    assert (tmp_path / "visgen.jsonl").read_bytes() == (folder / "visgen.jsonl").read_bytes()


def test_what_had_no_verdict_is_judged_again(whole, config, tmp_path):
    folder, _ = whole
    copy_of(folder, tmp_path, ["queries.jsonl"])
    made = read_jsonl(folder / "trajectories.jsonl")
    write_jsonl(
        tmp_path / "trajectories.jsonl",
        [
            {**t, "reward": {**t["reward"], "total": float("nan")}} if i in (3, 5) else t
            for i, t in enumerate(made)
        ],
    )
    assert (
        "filter: the LLM judge gave no verdict; `trajectories` asks it again"
        in make_visgen(config, tmp_path)["reasons"]
    )
    make_trajectories(config, tmp_path)
    again = {t["task"]["id"]: t for t in read_jsonl(tmp_path / "trajectories.jsonl")}
    assert again == {t["task"]["id"]: t for t in made} and len(
        read_jsonl(tmp_path / "trajectories.jsonl")
    ) == len(made)


def test_other_requests_under_the_same_names_are_refused(whole, config, tmp_path, capsys):
    folder, _ = whole
    copy_of(folder, tmp_path, ["trajectories.jsonl"])
    tasks = read_jsonl(folder / "queries.jsonl")
    write_jsonl(tmp_path / "queries.jsonl", [{**tasks[0], "request": "Another."}, *tasks[1:]])
    with pytest.raises(SystemExit, match="another request for visgen-00000"):
        make_trajectories(config, tmp_path)
    write_jsonl(tmp_path / "queries.jsonl", [{"id": "x", "request": "y"}, [], *tasks[:2]])
    assert len(make_data.make_queries(config, tmp_path)) == 2
    said = capsys.readouterr().out
    assert (
        "line 1 is no task record: it lacks constraints, difficulty" in said
        and "line 2 is no task record: it lacks everything" in said
    )


def test_broken_lines_are_named_counted_and_skipped(whole, config, tmp_path, capsys):
    folder, _ = whole
    copy_of(folder, tmp_path, ["queries.jsonl"])
    lines = (tmp_path / "queries.jsonl").read_text().splitlines()[:8]
    lines[2], lines[5] = '{"id": "visgen-', "no json"
    (tmp_path / "queries.jsonl").write_text("\n".join(lines) + "\n\n")
    make_trajectories(config, tmp_path)
    said = capsys.readouterr().out
    assert (
        "line 3 is not JSON" in said
        and "line 6 is not JSON" in said
        and "2 broken lines skipped" in said
        and "line 9" not in said
    )
    assert len(read_jsonl(tmp_path / "trajectories.jsonl")) == 6


def test_human_review_there_and_back(whole, config, tmp_path, capsys):
    folder, counts = whole
    copy_of(folder, tmp_path, ["queries.jsonl", "trajectories.jsonl"])
    make_data.review(config, tmp_path, None)
    sheet = (tmp_path / "review.html").read_text()
    shown = dict(re.findall(r'<article id="([^"]+)" data-key="([^"]+)"', sheet))
    assert len(shown) == min(100, counts["candidates"]) and sheet.count(
        'value="keep"'
    ) == sheet.count('value="drop"') == len(shown)
    assert "data:image/jpeg;base64," in sheet and 'src="http' not in sheet
    (a, key_a), (b, key_b), (c, key_c), (d, _) = list(shown.items())[:4]
    verdicts = [
        {"id": a, "key": key_a, "verdict": "drop", "reason": "dull", "reviewer": "A"},
        {"id": b, "key": key_b, "verdict": "keep", "reviewer": "B"},
        {"id": c, "key": key_c, "verdict": "maybe"},
        {"id": "nobody-1", "verdict": "keep"},
        ["x"],
        {"id": ["x"], "verdict": "keep"},
        {"id": d, "key": key_c, "verdict": "keep"},
    ]
    file = tmp_path / "downloaded.jsonl"
    file.write_bytes(
        ("\n".join(map(json.dumps, verdicts)) + "\n{broken\n").encode() + b'{"id": "\xff"}\n'
    )
    make_data.review(config, tmp_path, str(file))
    said = capsys.readouterr().out
    for n, what in enumerate(
        (
            "has the verdict 'maybe'",
            "names 'nobody-1'",
            "is no object",
            "is no object",
            "judges another trajectory",
            "is not JSON",
            "is not JSON",
        ),
        3,
    ):
        assert f"line {n} {what}" in said
    assert "2 verdicts, 5 lines skipped" in said and "2 broken lines skipped" in said
    again = re.findall(r'<article id="([^"]+)"', (tmp_path / "review.html").read_text())
    assert not {a, b} & set(again)
    after = make_visgen(config, tmp_path)
    kept = {t["task"]["id"]: t["review"] for t in read_jsonl(tmp_path / "visgen.jsonl")}
    assert a not in kept and kept[b] == "kept by a human" and kept[c] == kept[d] == "unreviewed"
    assert (
        after["reviewed"] == 2
        and after["kept"] == counts["kept"] - 1
        and after["reasons"]["review: dropped by a human: dull"] == 1
    )
    assert [(r["key"], r["reviewer"]) for r in read_jsonl(tmp_path / "verdicts.jsonl")] == [
        (key_a, "A"),
        (key_b, "B"),
    ]


def test_verdicts_of_another_run_are_refused(whole, config, tmp_path, capsys):
    folder, _ = whole
    other = replace(config, seed=5, data=replace(config.data, queries=20))
    make_trajectories(other, tmp_path)
    rows = [
        {"id": i, "key": key, "verdict": "keep"}
        for i, key in sift(each_line(folder / "trajectories.jsonl"), config)[0].items()
    ]
    write_jsonl(tmp_path / "v.jsonl", rows[:20])
    make_data.review(other, tmp_path, str(tmp_path / "v.jsonl"))
    assert (
        make_visgen(other, tmp_path)["reviewed"] == 0
        and capsys.readouterr().out.count("judges another trajectory") >= 15
    )


def test_the_sheet_escapes_what_the_agent_wrote(whole, config, tmp_path):
    folder, _ = whole
    made = read_jsonl(folder / "trajectories.jsonl")[:1]
    evil = "<script>alert(1)</script>"
    made[0]["task"]["request"] = made[0]["answer"]["summary"] = made[0]["plan"][0]["goal"] = made[
        0
    ]["calls"][0]["arguments"]["prompt"] = evil
    write_jsonl(tmp_path / "trajectories.jsonl", made)
    export_review(config, tmp_path, [made[0]["task"]["id"]])
    sheet = (tmp_path / "review.html").read_text()
    assert evil not in sheet and "&lt;script&gt;alert(1)" in sheet


# --- formats


def rounded(values):
    """0.3 comes back from `datasets` as 0.30000000000000004."""
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 9))


def test_chat_records_load_with_datasets_and_lose_nothing(whole):
    from datasets import load_dataset

    folder, counts = whole
    made = read_jsonl(folder / "visgen.jsonl")
    loaded = load_dataset(
        "json",
        data_files=str(folder / "chat.jsonl"),
        split="train",
        cache_dir=str(folder / "cache"),
    )
    assert len(loaded) == counts["kept"]
    for t, row, line in zip(made, loaded, read_jsonl(folder / "chat.jsonl")):
        assert row["messages"] == line["messages"] and rounded(row["tools"]) == rounded(
            line["tools"]
        ) == rounded(t["tools"])


def test_chat_records_are_what_the_chat_apis_ask_for(whole):
    for t, row in ((t, chat_record(t)) for t in read_jsonl(whole[0] / "visgen.jsonl")):
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2) and all(
            set(m) == {"role", "content"} and m["content"] for m in row["messages"]
        )
        replies = re.findall(
            r"<tool_response>(.*?)</tool_response>",
            "\n".join(m["content"] for m in row["messages"][2:]),
            re.S,
        )
        assert replies == [m["content"] for m in t["messages"] if m["role"] == "tool"] and len(
            replies
        ) == len(t["calls"])
        for tool in row["tools"]:
            assert set(tool) == {"type", "function"} and set(tool["function"]) == {
                "name",
                "description",
                "parameters",
            }


# --- VisionAgent at the paper's scale


def test_long_requests_reach_the_paper_s_scale(whole, config):
    made = read_jsonl(whole[0] / "trajectories.jsonl")
    hard = [t for t in made if t["task"]["difficulty"] == "hard"]
    actions = [sum(len(turn["order"]) for turn in t["turns"]) for t in made]
    # Each picture has a call of its own, and what was made is looked at.
    assert 13 <= sum(actions) / len(actions) <= 32
    assert sum(n > 20 for n in actions) >= 0.6 * len(actions)
    assert sum(len(t["calls"]) >= 20 for t in hard) > len(hard) / 2


def test_the_expert_keeps_to_a_service_s_jobs_at_once(whole):
    assert jobs_at_once("tool_image2video_keling") == 5
    for t in read_jsonl(whole[0] / "trajectories.jsonl"):
        side_by_side = Counter((c["turn"], c["name"]) for c in t["calls"])
        assert all(
            n <= jobs_at_once(name) for (_, name), n in side_by_side.items() if name in load_tools()
        )
        assert not any(c["error"] and c["error"]["code"] == "concurrency_limit" for c in t["calls"])


def test_each_part_of_metacognition_is_worth_something(config):
    """Verification in flaws that nobody hands over, since a flaw breaks no wish; the others in
    success; all in the reward."""
    tasks, env, success = make_tasks(250, "visgen", config.data, 3), VisGenEnv(config.rollout), {}
    total, flawed = {}, {}
    for mind in (
        METACOGNITION,
        *(tuple(p for p in METACOGNITION if p != part) for part in METACOGNITION),
        (),
    ):
        made = [
            (vision_agent(task, env, seeded_rng("m", task["id"]).getrandbits(31), mind), env.pool)
            for task in tasks
        ]
        rewards = ltr_rewards([t for t, _ in made], config.reward, [pool for _, pool in made])
        success[mind] = sum(r["result"] > 1 - 1e-9 for r in rewards) / len(tasks)
        total[mind] = sum(r["total"] for r in rewards) / len(tasks)
        flawed[mind] = sum(make_data.hands_over_flaw(t) for t, _ in made) / len(tasks)
    full, thinking = success.pop(METACOGNITION), success.pop(())
    assert full > 0.97 and thinking < min(success.values()) + 0.02 and full - thinking > 0.2
    unseen = ("plan check", "recovery")
    assert all(part < full for mind, part in success.items() if mind != unseen)
    assert all(total[mind] < total[METACOGNITION] for mind in success), total
    for mind, share in flawed.items():
        assert share < 0.02 if "verification" in mind else share > 0.2, (mind, share)


def test_without_recovery_every_failed_call_is_repeated_once(config):
    hard = replace(config.rollout, failure_scale=6.0)
    seen = Counter()
    for task in make_tasks(120, "visgen", config.data, 4):
        env = VisGenEnv(hard)
        t = vision_agent(task, env, 1, ("plan check", "verification"))
        assert (
            sum(
                parse_utpc(m["content"])["plan"] is not None
                for m in t["messages"]
                if m["role"] == "assistant"
            )
            == 1
        )  # never revised
        for c, after in zip(t["calls"], t["calls"][1:]):
            seen["again" if c["error"] and after["name"] == c["name"] else ""] += 1
    assert seen["again"] > 5


def test_the_answer_says_where_not_all_is_as_asked(config):
    """A film of another length than asked for (no plan check), or fewer pictures, is not handed
    over as if it were right."""
    seen = Counter()
    for task in make_tasks(150, "visgen", config.data, 6):
        t = vision_agent(task, VisGenEnv(config.rollout), 1, ("recovery", "verification"))
        if not t["answer"]:
            continue
        c, handed = (
            task["constraints"],
            [a for a in t["artifacts"] if a["id"] in t["answer"]["deliverables"]],
        )
        wrong = (
            any(
                c["duration_s"]
                and a["kind"] == "video"
                and abs(a["duration_s"] - c["duration_s"]) > 0.1
                for a in handed
            )
            or sum(a["kind"] == asked_kind(c) for a in handed) < c["images"] + c["videos"]
        )
        honest = "you asked for" in t["answer"]["summary"].lower().replace(
            "what you asked", "you asked"
        )
        assert honest == wrong, (task["id"], t["answer"])
        seen[wrong] += 1
    assert seen[True] > 20 and seen[False] > 20


def test_runs_of_words():
    assert word_runs("One two, three four FIVE six") == {
        ("one", "two", "three", "four", "five"),
        ("two", "three", "four", "five", "six"),
    }
    assert tag("a", "b") == "<a>b</a>"


# --- the commands


def make_data_py(*arguments):
    done = subprocess.run(
        [sys.executable, "make_data.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr.strip().splitlines()[-1:]


@pytest.fixture
def run():
    """A run folder of the tests' own."""
    name = f"test-visgen-{uuid.uuid4().hex[:8]}"
    yield name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def test_each_stage_is_a_command(run):
    folder, more = ROOT / "runs" / run / "data", (f"name={run}", "data.queries=84")
    assert make_data_py("filter", *more)[2][0].startswith(
        f"error: {folder / 'trajectories.jsonl'} is missing"
    )
    code, out, _ = make_data_py("queries", *more)
    assert (
        code == 0
        and out.endswith("queries.jsonl: 84 queries\n")
        and len(read_jsonl(folder / "queries.jsonl")) == 84
    )
    code, out, _ = make_data_py("trajectories", *more)
    assert code == 0 and "84 ended with answer" in out
    code, out, _ = make_data_py("filter", *more)
    assert (
        code == 0
        and re.search(r"queries +84 +20k\n.*answer +84 +16k\n", out)
        and "are labelled unreviewed" in out
    )
    n = len(read_jsonl(folder / "visgen.jsonl"))
    code, out, _ = make_data_py("statistics", *more)
    assert (
        code == 0
        and f"{n} trajectories" in out
        and re.search(r"tool calls +\d+\.\d +15\n", out)
        and (folder / "statistics.png").read_bytes()[1:4] == b"PNG"
    )
    shown = (
        re.findall(r'<article id="([^"]+)"', (folder / "review.html").read_text())
        if (folder / "review.html").is_file()
        else []
    )
    assert not shown
    first = read_jsonl(folder / "visgen.jsonl")[0]
    write_jsonl(
        folder.parent / "v.jsonl",
        [{"id": first["task"]["id"], "key": key_of(first), "verdict": "drop", "reason": "test"}],
    )
    code, out, _ = make_data_py("review", *more, "--verdicts", str(folder.parent / "v.jsonl"))
    assert (
        code == 0
        and f"1 of {n} candidates were judged by a human" in out
        and len(read_jsonl(folder / "visgen.jsonl")) == n - 1
    )
    code, out, _ = make_data_py("card", *more)
    assert (
        code == 0
        and out.startswith("---\nlicense: apache-2.0")
        and "; 1 of these were judged by a human, 1 dropped. What nobody judged"
        in " ".join(out.split())
    )


def test_visgen_runs_all_stages_with_the_queries_of_the_command_line(run):
    code, out, _ = make_data_py("visgen", "--queries", "42", f"name={run}")
    assert (
        code == 0
        and "42 ended with answer" in out
        and "review.html" in out
        and re.search(r"queries +42 +20k", out)
        and "mean steps" in out
    )
    assert make_data_py("stats")[2][0].startswith(
        "error: no command 'stats'; the nearest is `statistics`; commands: queries"
    )
    assert make_data_py("filter", f"name={run}", "--verdicts", "x")[2] == [
        "error: --verdicts belongs to `python make_data.py review`"
    ]
    code, out, _ = make_data_py(f"name={run}", "data.queries=42", "statistics")
    assert code == 0 and "mean steps" in out
    code, _, error = make_data_py("visgen", "--queries", "many", f"name={run}")
    assert code != 0 and "data.queries" in error[0]


def test_metacognition_is_printed_beside_the_paper(run):
    code, out, _ = make_data_py("metacognition", f"name={run}", "data.max_shots=3")
    rows = json.loads((ROOT / "runs" / run / "metacognition.json").read_text())
    assert (
        code == 0
        and [r["n"] for r in rows] == [1000] * 5
        and rows[0]["success"] > rows[-1]["success"]
        and "72 %" in out
    )


def test_the_expert_writes_no_call_that_a_tool_does_not_know(config):
    """Also of the tools that it moves to when others fail, such as Qwen's edit, which has sizes."""
    hard = replace(config.rollout, failure_scale=4.0)
    refused = Counter()
    for task in make_tasks(400, "visgen", config.data, 12):
        t = vision_agent(task, VisGenEnv(hard), seeded_rng("h", task["id"]).getrandbits(31))
        refused.update(call["error"]["code"] for call in t["calls"] if call["error"])
    wrong = {"unknown_parameter", "missing_parameter", "invalid_parameter", "file_not_found"}
    assert refused.total() > 100 and not wrong & set(refused)


def test_a_blocked_prompt_is_said_in_other_words(config):
    """A film has one tool for its clips, so a false alarm of moderation must not end the work."""
    hard = replace(config.rollout, failure_scale=12.0)
    mended = 0
    for task in make_tasks(300, "visgen", config.data, 13):
        t = vision_agent(task, VisGenEnv(hard), seeded_rng("b", task["id"]).getrandbits(31))
        veo = [call for call in t["calls"] if call["name"] == "tool_text2video_veo"]
        blocked = {
            call["arguments"]["prompt"]
            for call in veo
            if call["error"] and call["error"]["code"] == "content_blocked"
        }
        assert len(blocked) == len([c for c in veo if c["arguments"]["prompt"] in blocked])
        mended += any(
            call["status"] == "ok" and call["arguments"]["prompt"].startswith(prompt + ", ")
            for call in veo
            for prompt in blocked
        )
    assert mended >= 3


def test_films_that_differ_are_all_handed_over(config):
    """Where several films are to be different, each is a step of its own."""
    bench = read_jsonl(ROOT / "data" / "visgenbench.jsonl")
    tasks = [t for t in bench if t["constraints"]["variety"] and t["constraints"]["videos"] > 1]
    assert len(tasks) > 20
    for task in tasks[:20]:
        still = replace(config.rollout, failure_scale=0.0)
        t = vision_agent(task, VisGenEnv(still), 1)
        assert len(t["answer"]["deliverables"]) == task["constraints"]["videos"]


def test_lapses_are_shares_of_trajectories():
    tasks = [{"id": f"visgen-{i:05d}"} for i in range(2000)]
    config = load_config(ROOT / "configs" / "visgen.yaml")
    minds = [make_data.mind_of(config, task) for task in tasks]
    for part in METACOGNITION:
        assert abs(sum(part not in mind for mind in minds) / 2000 - config.data.lapses) < 0.04
    never = replace(config, data=replace(config.data, lapses=0.0))
    assert all(make_data.mind_of(never, task) == METACOGNITION for task in tasks)
