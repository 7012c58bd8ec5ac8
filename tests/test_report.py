"""bench.py's pages: what a report and a demo say, that nothing an agent wrote becomes markup.

Also how they behave in a browser.
"""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from markupsafe import escape
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench  # noqa: E402
from env import VisGenEnv  # noqa: E402
from lib import experiment, pages, tables  # noqa: E402
from lib.experiment import load_config  # noqa: E402
from lib.human import export_sheet  # noqa: E402
from lib.lineage import deliverables  # noqa: E402
from lib.review import export_review  # noqa: E402
from lib.runs import ROOT, read_jsonl, write_jsonl  # noqa: E402
from rewards import PARTS, explain  # noqa: E402

CHROMIUM = shutil.which("chromium")
EVIL = (
    """"><script>window.hit=1</script></details></article><img src=x onerror=window.hit=1>"""
    + """' onmouseover='window.hit=1' javascript:window.hit=1 {{ 7*7 }}"""
)


def bench_folder(root, trajectories, grades, **more):
    """A bench folder as run_bench leaves it, of given trajectories and grades (from records)."""
    config, folder = load_config(ROOT / "configs" / "tiny.yaml"), root / "bench" / "expert-14"
    folder.mkdir(parents=True)
    (root / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    write_jsonl(folder / "trajectories.jsonl", trajectories)
    write_jsonl(
        folder / ("grades.jsonl" if more.get("files") else "grades-from-records.jsonl"), grades
    )
    found = {
        "agent": "expert",
        "who": "scripted",
        "grading": "",
        "decoder": "scripted",
        "subset": "14",
        "tasks": len(trajectories),
        "played": len(trajectories),
        "seed": 0,
        "files": False,
        "grader": "structural",
        "columns": tables.columns_of(grades),
        "faults": [],
        **more,
    }
    (folder / "columns.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """(trajectories, grades) of 14 tasks of VisGenBench, played by the scripted expert.

    At least one is long, and one hands over nothing.
    """
    folder, config = (
        tmp_path_factory.mktemp("act"),
        load_config(ROOT / "configs" / "tiny.yaml", ["rollout.failure_scale=1"]),
    )
    trajectories = bench.act("expert", bench.bench_tasks("14", folder), config, folder, folder)
    assert len(trajectories) == 14 and max(len(t["calls"]) for t in trajectories) >= 15
    pictures = [t for t in trajectories[1:] if t["task"]["modality"] == "image"]
    pictures[-1]["answer"] = {"deliverables": [], "summary": "Nothing was made."}
    return trajectories, bench.grade_all(trajectories, config, folder, with_files=False)


@pytest.fixture(scope="module")
def site(played, tmp_path_factory):
    """A bench folder with report.html and demo.html (the longest film). Nobody may write there."""
    folder = bench_folder(tmp_path_factory.mktemp("run"), *played)
    pages.report_command([str(folder)])
    longest = max(
        (t for t in played[0] if t["task"]["modality"] == "video"), key=lambda t: len(t["calls"])
    )
    pages.demo_command([str(folder / "trajectories.jsonl"), longest["task"]["id"]])
    return folder


@pytest.fixture(scope="module")
def poisoned(played, tmp_path_factory):
    """A report and a demo of trajectories whose every written field tries to become markup."""
    trajectories, grades = json.loads(json.dumps(played))
    for t, g in zip(trajectories[:2], grades):
        t["task"]["request"] = t["task"]["scenario"] = g["scenario"] = t["task"]["constraints"][
            "subject"
        ] = EVIL
        t["ended"] = t["answer"]["summary"] = EVIL
        t["plan"] = [{**step, "goal": EVIL, "tool": EVIL} for step in t["plan"]]
        t["calls"] = [
            {
                **c,
                "name": EVIL,
                "arguments": {EVIL: EVIL},
                "status": "error",
                "error": {"code": EVIL, "param": None, "message": EVIL, "retryable": False},
            }
            for c in t["calls"]
        ]
        turn = f"<think>{EVIL}</think>\n<plan>{json.dumps(t['plan'])}</plan>\n{EVIL}"
        t["messages"] = [
            {**m, "content": turn if m["role"] == "assistant" else EVIL} for m in t["messages"]
        ]
        t["reward"]["reasons"] = {"traj": EVIL, "requirement": EVIL}
    folder = bench_folder(tmp_path_factory.mktemp("poisoned"), trajectories, grades)
    pages.report_command([str(folder)])
    pages.demo_command([str(folder / "trajectories.jsonl")])
    return folder


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file at a width.

    Afterwards no page may have raised, complained, or asked for anything but itself.
    """
    seen, pages = [], []

    def open_page(path, width=1200):
        p = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(p)
        p.on("pageerror", lambda e: seen.append(f"error: {e}"))
        p.on(
            "console",
            lambda m: (
                seen.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None
            ),
        )
        p.on(
            "request",
            lambda r: (
                seen.append(f"request: {r.url:.80}")
                if not r.url.startswith(("data:", path.as_uri()))
                else None
            ),
        )
        p.goto(path.as_uri())
        return p

    yield open_page
    for p in pages:
        p.close()
    assert seen == []


def plain(html):
    """The words of a page without data URIs, markup and entities."""
    return re.sub(
        r"\s+",
        " ",
        re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.S)),
    )


def test_doctests():
    for module, least in ((bench, 2), (pages, 2)):
        result = doctest.testmod(module)
        assert result.attempted >= least and result.failed == 0


def test_head_columns_and_scenarios(site, played):
    html = (site / "report.html").read_text()
    text = plain(html)
    for said in (
        "agent: expert",
        "n = 14",
        "seed 0",
        "VisGenEnv",
        "grader: structural",
        "decoder: scripted",
        "records read, no file measured",
    ):
        assert said in text
    for column, c in json.loads((site / "columns.json").read_text())["columns"].items():
        name = {"s_rate": "S-Rate", "o_score": "O-Score"}.get(column, column.title())
        shown = (
            f"{c['mean']:.3f} {c['low']:.3f}–{c['high']:.3f}"
            if c
            else "– no task that the structural grader has graded"
        )
        assert f"{name} {shown}" in text
    beside = text[text.index("Beside the paper") : text.index("Scenarios")]
    columns = tables.read_paper()["columns"]
    for name, values in tables.read_paper()["table_2"].items():
        counted = [v for c, v in zip(columns, values) if c in (*tables.OBJECTIVE, "s_rate")]
        assert f"{name} " + " ".join(f"{v:.3f}" for v in counted) in beside
    # What the structural grader counts is not what the paper's VLM saw.
    titles = beside[beside.rindex("compare`") :]
    assert not any(word in titles for word in ("Match", "Creative", "Variety", "O-Score"))
    assert "expert, from records" in beside
    assert "Our rows cannot be set against the paper's" in text.replace("&#39;", "'")
    table = html[html.index("Scenarios") : html.index("Reward, failures")]
    rows = re.findall(
        r"<tr><td>([a-z ]+)</td><td class=\"n\">(\d+)</td>"
        r"<td[^>]*>(.*?)</td><td[^>]*>(.*?)</td></tr>",
        table,
    )
    assert len(rows) == 42 and sum(int(n) for _, n, _, _ in rows) == 14
    counts = Counter(t["task"]["scenario"].replace("_", " ") for t in played[0])
    assert {name: int(n) for name, n, _, _ in rows if n != "0"} == counts
    g = next(
        g
        for g in played[1]
        if g["dimension"] == "variety" and counts[g["scenario"].replace("_", " ")] == 1
    )
    assert (
        g["scenario"].replace("_", " "),
        "1",
        f"{g['structural']['variety']:.3f}",
        f"{g['s_rate']:.3f}",
    ) in rows


def test_reward_failures_and_cost(site, played):
    text, trajectories = plain((site / "report.html").read_text()), played[0]
    for part, label in (("total", "R_vrt"), ("tool", "R_tool"), ("cons", "R_cons")):
        values = [v for t in trajectories if (v := t["reward"][part]) is not None]
        assert f"{label} {sum(values) / len(values):.3f} {len(values)}" in text
    assert (
        f"of {sum(len(t['calls']) for t in trajectories)}" in text and "answer 14 100.0 %" in text
    )
    failed = Counter(c["error"]["code"] for t in trajectories for c in t["calls"] if c["error"])
    assert failed, "this seed is to have failed calls"
    for code, n in failed.items():
        assert f"{code} {n} {n} 0" in text  # the expert repairs
    low = [v for t in trajectories if (v := t["reward"]["checks"]["worked"]) < 1]
    assert (
        f"worked {len(low)} 14 " in text
        and " planned first " not in text[text.index("checks below 1") : text.index("Trajectories")]
    )
    spent = [t["price_usd"] for t in trajectories]
    assert f"price ${sum(spent) / 14:.2f} ${max(spent):.2f} ${sum(spent):.2f}" in text


def test_failures_tell_repaired_from_not():
    call = {"turn": 1, "name": "a", "status": "ok", "error": None}
    bad = {**call, "status": "error", "error": {"code": "timeout"}}
    checks = {"count": 1.0, "worked": 0.5, "beat": None}
    found = pages.failures_of(
        [
            {"ended": "answer", "calls": [bad, call], "reward": {"checks": checks}},
            {
                "ended": "max_turns",
                "calls": [call, bad],
                "reward": {"checks": {**checks, "beat": float("nan")}},
            },
        ]
    )
    assert found == {
        "ended": {"answer": 1, "max_turns": 1},
        "codes": {"timeout": [2, 1]},
        "checks": {"count": [0, 2, 1.0], "worked": [2, 2, 0.5]},
    }


def test_a_card_shows_the_whole_trajectory(site, played):
    html = (site / "demo.html").read_text()
    t = max(
        (t for t in played[0] if t["task"]["modality"] == "video"), key=lambda t: len(t["calls"])
    )
    for text in (
        t["task"]["request"],
        t["answer"]["summary"],
        *(c["name"] for c in t["calls"]),
        *(step["goal"] for step in t["plan"]),
        *(m["content"][:80] for m in t["messages"] if m["role"] == "tool"),
        *(row[3] for row in explain(t, t["reward"], experiment.Config().reward)),
    ):
        assert str(escape(text)) in html
    films = [a for a in deliverables(t) if a["kind"] == "video"]
    assert html.count('<img src="data:image/jpeg;base64,') == sum(
        a["shots"] for a in films
    ) > 2 and html.count("<video") == len(films)
    assert html.count('<rect class="step') == len(t["plan"]) and html.count('class="turn"') == len(
        t["turns"]
    )


@pytest.mark.parametrize("name", ["report.html", "demo.html"])
def test_pages_stand_alone_and_stay_small(site, name):
    html = (site / name).read_text()
    assert {
        uri[:5] for uri in re.findall(r"<[^>]*\b(?:src|href|action|poster)=[\"']?([^\"'>]*)", html)
    } == {"data:"}
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(html) < 25e6 and html.startswith("<!DOCTYPE html>")
    assert html.count("<video") <= pages.CLIPS


def test_only_so_many_films_play(played, monkeypatch):
    monkeypatch.setattr(pages, "small_clip", lambda film: "data:video/mp4;base64,AAAA")
    films = [t for t in played[0] if t["task"]["modality"] == "video"]
    made = pages.cards_of(films * 5, load_config(ROOT / "configs" / "tiny.yaml"))
    clips = ["clip" in a for card in made for a in card["shown"]]
    assert len(clips) > pages.CLIPS and clips == [True] * pages.CLIPS + [False] * (
        len(clips) - pages.CLIPS
    )


def test_the_lowest_are_always_shown_and_others_drawn_by_seed(played, tmp_path):
    trajectories, grades = json.loads(json.dumps(played))
    for g in grades:
        g["dimension"], g["amount"] = "amount", 1.0
    for t, g, own in zip(trajectories, grades, [1.0] * 3 + [0.1 * i for i in range(9)]):
        t["reward"]["total"], g["amount"] = 1.0, own
    trajectories[13]["reward"]["total"] = 0.5  # the tenth: own column 1, R_vrt low
    trajectories[12]["reward"]["total"] = float("nan")
    folder = bench_folder(tmp_path / "run", trajectories, grades)
    for t in trajectories:
        t["answer"]["deliverables"] = []
    write_jsonl(folder / "trajectories.jsonl", trajectories)
    ids = []
    for most in ("11", "11", "12", "60"):
        pages.report_command([str(folder), "--most", most])
        html = (folder / "report.html").read_text()
        ids.append(re.findall(r"<b>(vgb2-\d+)</b>", html))
        assert "nothing was handed over" in html
    names = [t["task"]["id"] for t in trajectories]
    assert all(shown[:10] == names[3:12] + [names[13]] for shown in ids)
    assert [len(shown) for shown in ids] == [11, 11, 12, 14] and ids[0] == ids[1]


def test_measured_files_are_said(played, tmp_path):
    folder = bench_folder(
        tmp_path / "run", played[0][:1], played[1][:1], files=True, faults=["one"], tasks=3
    )
    pages.report_command([str(folder)])
    text = plain((folder / "report.html").read_text())
    assert (
        "files measured" in text
        and "1 disagreements between files and records" in text
        and "n = 1 of 3 tasks" in text
    )


def test_a_vlm_s_columns_stand_beside_the_paper_s(played, tmp_path):
    graded = [{**g, "vlm": {"match": 0.5}} for g in played[1][:2]]
    folder = bench_folder(tmp_path / "run", played[0][:2], graded, grader="vlm")
    pages.report_command([str(folder)])
    text = plain((folder / "report.html").read_text())
    for name, values in tables.read_paper()["table_2"].items():
        assert f"{name} " + " ".join(f"{v:.3f}" for v in values) in text


def test_a_vlm_s_scores_of_stand_ins_stand_beside_no_figure_of_the_paper(played, tmp_path):
    graded = [{**g, "vlm": {"match": 0.5}, "media": 2, "real": 2} for g in played[1][:2]]
    graded[1]["real"] = 1
    folder = bench_folder(tmp_path / "run", played[0][:2], graded, grader="vlm")
    pages.report_command([str(folder)])
    text = plain((folder / "report.html").read_text())
    assert "scores of stand-ins: no figure of the paper may stand beside them" in text
    columns = tables.read_paper()["columns"]
    for name, values in tables.read_paper()["table_2"].items():
        counted = [v for c, v in zip(columns, values) if c in (*tables.OBJECTIVE, "s_rate")]
        row = f"{name} " + " ".join(f"{v:.3f}" for v in counted)
        assert row in text and f"{name} " + " ".join(f"{v:.3f}" for v in values) not in text


def test_bad_arguments_are_one_line(site, tmp_path, capsys):
    report, demo = pages.report_command, pages.demo_command
    for command, arguments, said in (
        (report, [str(tmp_path)], "columns.json"),
        (report, [str(site), "--most", "3"], "--most is 3; at least 10"),
        (demo, [str(site / "trajectories.jsonl"), "nobody"], "no trajectory 'nobody'"),
        (demo, [str(ROOT / "data" / "visgenbench.jsonl")], "a task is none yet"),
        (demo, [str(tmp_path / "none.jsonl")], "is missing"),
    ):
        with pytest.raises(SystemExit, match=re.escape(said)) as stop:
            command(arguments)
        assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)


def test_a_trajectory_without_reward_or_plan_is_shown(tmp_path):
    t = read_jsonl(ROOT / "data" / "example.jsonl")[0]
    write_jsonl(
        tmp_path / "one.jsonl",
        [{**t, "reward": {}, "plan": None, "plans": [], "answer": None, "ended": "malformed"}],
    )
    pages.demo_command([str(tmp_path / "one.jsonl")])
    html = (tmp_path / "demo.html").read_text()
    assert (
        "no readable plan" in html and "nothing was handed over" in html and "R_vrt 0.000" in html
    )


def test_faulty_turns_are_shown_as_written(played, tmp_path):
    env = VisGenEnv()
    env.reset(played[0][0]["task"], 1)
    env.step(
        '<think>a</think><tool_call>{"name": 3}</tool_call>'
        '<tool_call>{"name": "tool_fly", "arguments": {"to": [1]}}</tool_call>'
    )
    env.step("so <b>bold</b>")
    write_jsonl(tmp_path / "one.jsonl", [env.trajectory()])
    pages.demo_command([str(tmp_path / "one.jsonl")])
    text = plain((tmp_path / "demo.html").read_text())
    for said in (
        "bad_call",
        "no readable call",
        "tool_fly unknown_tool not repaired",
        "to [1]",
        "ended by malformed",
        "so &lt;b&gt;bold&lt;/b&gt;",
        "wrong_order: a turn begins with &lt;think&gt;",
    ):
        assert said in text


def test_plan_graph_survives_any_plan():
    def step(i, *after):
        return {"id": i, "tool": "llm", "goal": "", "after": list(after)}

    g = pages.plan_graph(
        [step(1, 1, 2), step(1), step(2, 1, 1), step(3, 2, 99)]
    )  # on itself, on a later one, an id twice, an unknown one
    assert [(s["column"], s["row"]) for s in g["steps"]] == [(0, 0), (0, 1), (1, 0), (2, 0)] and g[
        "arrows"
    ] == [(1, 2), (2, 3)]
    assert pages.plan_graph([]) == {"steps": [], "arrows": [], "columns": 0, "rows": 0}


def test_what_was_written_stays_text(poisoned):
    for name in ("report.html", "demo.html"):
        html = (poisoned / name).read_text()
        assert (
            html.count("<script") == (name == "report.html")
            and "<img src=x" not in html
            and "onmouseover='" not in html
        )
        assert (
            "&lt;script&gt;window.hit=1" in html
            and "{{ 7*7 }}" in html
            and not re.search(r"(src|href)=.?javascript:", html)
        )
        assert (
            html.count("</details>")
            == html.count("<details>")
            == (15 if name == "report.html" else 0)
        )


# ---------------------------------------------------------------------------- the run's index
@pytest.fixture(scope="module")
def run(played, tmp_path_factory):
    """A finished run with a bench folder, whose report was written last."""
    run = tmp_path_factory.mktemp("index") / "tiny"
    folder = bench_folder(run, *played)
    (run / "vrl").mkdir()
    Image.new("RGB", (90, 38), "white").save(run / "curve.png")
    for name, reward in (("before", 0.25), ("after", 0.5)):
        record = {"greedy": dict.fromkeys(("reward", "strict", "plan", "fine", *PARTS), reward)}
        # The tasks gain 0.2 and 0.3.
        record["tasks"] = [
            {"id": i, "reward": reward * (0.8, 1.2)[i], "strict": 0.0, "cons": None} for i in (0, 1)
        ]
        chosen = dict(zip(("best of 14", "median of 14", "worst of 14"), played[0]))
        text = json.dumps({**record, "examples": chosen if name == "after" else {}})
        (run / "vrl" / f"{name}.json").write_text(text)
    for step in (2, 10):
        (run / f"step-{step}.html").write_text("<!DOCTYPE html>")
    (run / "trajectory.txt").write_text("task")
    pages.demo_command([str(folder / "trajectories.jsonl")])
    pages.report_command([str(folder)])
    return run


def test_the_index_links_every_page_of_the_run(run):
    html = (run / "index.html").read_text()
    links = re.findall('href="([^"]+)"', html)
    assert links == [
        "curve.png",
        "episodes.html",
        "step-2.html",
        "step-10.html",
        "bench/expert-14/demo.html",
        "bench/expert-14/report.html",
        "trajectory.txt",
    ]
    assert all((run / link).is_file() for link in links)
    assert "data:image/png;base64," in html and "step-2.html</a>: one step of VRL" in html


def test_the_index_has_the_run_s_tables(run, played):
    text = plain((run / "index.html").read_text())
    assert "R_vrt 0.250 0.500 +0.200 to +0.300" in text and "R_cons 0.250 0.500 " in text
    head = json.loads((run / "bench" / "expert-14" / "columns.json").read_text())
    means = [f"{head['columns'][name]['mean']:.3f}" for name in ("o_score", "s_rate")]
    assert f"expert-14 14 of 14 {' '.join(means)} structural" in text
    episodes = plain((run / "episodes.html").read_text())
    for t, label in zip(played[0], ("best", "median", "worst")):
        assert f"{label} of 14 held-out episodes" in episodes
        assert str(escape(t["task"]["request"][:60])) in episodes


def test_the_index_is_kept_up(run):
    """By each command that writes a page into the run; outside a run there is none."""
    index = run / "index.html"
    was = index.read_text()
    later = run / "step-11.html"
    later.write_text("<!DOCTYPE html>")
    pages.demo_command([str(run / "bench" / "expert-14" / "trajectories.jsonl")])
    assert "step-11.html" in index.read_text()
    later.unlink()
    pages.report_command([str(run / "bench" / "expert-14")])
    assert index.read_text() == was
    episodes = run / "episodes.html"
    episodes.write_text("newer than the run's figures")
    pages.write_index(run)
    assert episodes.read_text() == "newer than the run's figures"
    os.utime(episodes, (0, 0))
    pages.write_index(run)
    assert "held-out episodes" in episodes.read_text()


def test_an_index_of_a_run_that_has_nothing_yet(tmp_path):
    assert pages.run_of(tmp_path / "demo.html") is None
    text = plain(pages.write_index(tmp_path).read_text())
    assert "Held-out" not in text and "VisGenBench" not in text and "Pages" in text


# ---------------------------------------------------------------------------- in a browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_index_in_a_browser(run, visit, width):
    page = visit(run / "index.html", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(BROKEN_WORDS) == []
    assert page.evaluate("document.querySelector('img').naturalWidth") == 90


def test_nothing_written_runs(poisoned, visit):
    for name in ("report.html", "demo.html"):
        page = visit(poisoned / name)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.wait_for_timeout(300)
        assert page.evaluate("window.hit === undefined")
        assert (
            page.evaluate(
                "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes])"
                ".filter(a => a.name.startsWith('on')).length"
            )
            == 0
        )
    assert visit(poisoned / "report.html").locator("article").count() == 14


def test_the_filter(site, visit, played):
    page = visit(site / "report.html")

    def visible():
        return page.locator("article:visible").count()

    assert visible() == 14
    for key in ("modality", "dimension", "scenario"):
        value = played[0][0]["task"][key]
        page.select_option(f"select[name={key}]", value)
        assert (
            visible()
            == sum(t["task"][key] == value for t in played[0])
            == int(page.inner_text("#count"))
            < 14
        )
        page.select_option(f"select[name={key}]", "")
    own = [tables.own_score(g, "structural") for g in played[1]]
    page.locator("input[name=most]").fill("0.6")
    assert visible() == sum(v is not None and v <= 0.6 for v in own) > 0
    page.select_option("select[name=which]", "total")
    assert visible() == sum(t["reward"]["total"] <= 0.6 for t in played[0])
    page.locator("input[name=most]").fill("1")
    assert visible() == 14


@pytest.mark.parametrize("name", ["report.html", "demo.html"])
def test_a_film_plays(site, visit, name):
    page = visit(site / name)
    page.evaluate(
        "document.querySelectorAll('details')"
        ".forEach(d => d.open = d.contains(document.querySelector('video')))"
    )
    film = page.evaluate("""async () => {
        const v = document.querySelector('video'); v.muted = true; await v.play();
        await new Promise(done => setTimeout(done, 1500));
        return {at: v.currentTime, seconds: v.duration, sides: [v.videoWidth, v.videoHeight],
                error: v.error && v.error.message};
    }""")
    assert film["error"] is None and film["at"] > 0.2 and film["seconds"] >= 2
    assert max(film["sides"]) <= pages.CLIP_PX and all(side % 2 == 0 for side in film["sides"])


@pytest.fixture(scope="module")
def other_pages(played, poisoned, site, tmp_path_factory):
    """The pages of the review, of the rewards and of the scoring sheet, plain and poisoned."""
    found = []
    for source in (site, poisoned):
        folder = tmp_path_factory.mktemp("others")
        shutil.copy(source / "trajectories.jsonl", folder)
        trajectories = read_jsonl(folder / "trajectories.jsonl")
        export_review(load_config(ROOT / "configs" / "tiny.yaml"), folder, ids_of(trajectories))
        done = subprocess.run(
            [sys.executable, "rewards.py", str(folder / "trajectories.jsonl"), "--html"],
            cwd=ROOT,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        found += [folder / "review.html", folder / "trajectories.jsonl.html"]
    sheet = bench_folder(tmp_path_factory.mktemp("sheet"), *played)
    export_sheet([sheet], load_config(ROOT / "configs" / "tiny.yaml"), 5)
    return [*found, sheet / "sheet.html"]


def ids_of(trajectories):
    return [t["task"]["id"] for t in trajectories]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways(other_pages, visit, width):
    for path in other_pages:
        page = visit(path, width=width)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.evaluate("document.querySelector('meta[name=viewport]') !== null"), path


# The words of a page that stand on more than one line; what has other signs in it may be broken.
BROKEN_WORDS = """() => {
    const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const part = document.createRange();
    while (texts.nextNode()) {
        const node = texts.currentNode;
        if (!node.parentElement.checkVisibility() || node.parentElement.closest('script, svg'))
            continue;
        for (const word of node.data.matchAll(/(?<!\\S)\\w{2,30}(?!\\S)/g)) {
            part.setStart(node, word.index);
            part.setEnd(node, word.index + word[0].length);
            if (new Set([...part.getClientRects()].map(r => r.top)).size > 1) found.push(word[0]);
        }
    }
    return found;
}"""


@pytest.mark.parametrize("width", [390, 1280])
def test_no_word_is_broken(other_pages, site, visit, width):
    """Not in a page of what was played and not poisoned; nor in a page that has such a word."""
    names = ("review.html", "trajectories.jsonl.html", "sheet.html", "report.html", "demo.html")
    plain_pages = [*other_pages[:2], other_pages[-1], site / "report.html", site / "demo.html"]
    assert [path.name for path in plain_pages] == list(names)
    for path in plain_pages:
        page = visit(path, width=width)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate(BROKEN_WORDS) == [], path
    narrow = '<p style="width: 3em; overflow-wrap: anywhere">tool_image_edit</p>'
    page.evaluate("html => { document.body.innerHTML = html; }", narrow)
    assert page.evaluate(BROKEN_WORDS) == ["tool_image_edit"]


def test_the_review_shows_whole_tables_on_a_phone(other_pages, visit):
    """No table is to be moved sideways to read what a plan or a call says."""
    page = visit(other_pages[0], width=390)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    hidden = page.evaluate(
        "[...document.querySelectorAll('.box')].map(b => b.scrollWidth - b.clientWidth)"
    )
    assert len(hidden) == 28 and set(hidden) == {0}


@pytest.mark.parametrize("width", [380, 390, 1280])
@pytest.mark.parametrize("name", ["report.html", "demo.html"])
def test_no_sideways_scrolling_on_a_phone(site, poisoned, visit, name, width):
    for folder in (site, poisoned):
        page = visit(folder / name, width=width)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
