"""`bench.py ablate`: Table 4's rows (Sec. 5.4) trained and measured at a small scale.

A row is configs/ablations/<row>.yaml with data/ablate.yaml, the small scale, on top; seeds and rows
run side by side, each step a process of its own. The result is data/ablations.json, printed beside
the paper's claims on which row is better.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml

from lib.experiment import load_config
from lib.runs import ROOT, open_run, write_atomic
from lib.tables import OBJECTIVE, interval, read_bench, read_paper
from lib.text import to_json

# A row's figures: `objective` is the mean of S-Rate and, where a task states them, Amount, Duration
# and Storyboard. It stands for the O-Score: of so few tasks one or none is in a column, so one task
# would make a tenth of that.
FIGURES = {
    "R_vrt": "R_vrt greedy",
    "R_vrt sampled": "R_vrt at temperature 1",
    "s_rate": "S-Rate",
    "objective": "objective columns",
}


# ---------------------------------------------------------------------------- the command
def ablate(args: list[str]) -> None:
    """Train and measure Table 4's rows (Sec. 5.4) at a small scale, or print a result.

    Done rows are not made again. SystemExit for wrong arguments, or with the rows that failed.
    """
    given = read_arguments(args)
    out = Path(given.out)
    if not given.folder:
        if not out.is_file():
            raise SystemExit(
                f"error: {out} is missing; `python bench.py ablate configs/ablations/` makes it"
            )
        return print_ablations(json.loads(out.read_text(encoding="utf-8")), out)
    only = rows_asked_for(given)
    scale = read_scale()
    rows = rows_before(out, scale)
    wanted = missing_rows(rows, only, given.seeds)
    made = {(row, seed): row_config(given.folder, row, seed, scale) for row, seed in wanted}
    paths = {key: path for key, (path, _) in made.items()}
    for path in paths.values():
        # SystemExit for a finished run of another config.
        open_run(load_config(path))
    changes = next(iter(made.values()))[1] if made else ["nothing"]
    print(
        f"{len(wanted)} rows to make, each config changed by {'; '.join(changes)}; "
        f"tokens of each stage x {scale['tokens']}"
    )
    failed = make_rows(paths, given.jobs, rows, scale, out)
    if rows:
        print_ablations({"rows": rows}, out)
    if failed:
        raise SystemExit(
            f"error: {len(failed)} of {len(wanted)} rows failed: {', '.join(failed)}; the same "
            "command tries them again"
        )


def read_arguments(args: list[str]) -> argparse.Namespace:
    """The command line; `out` has its default filled in."""
    parser = argparse.ArgumentParser(
        prog="bench.py ablate",
        description="Train and measure Table 4's rows (Sec. 5.4) at a small scale, or print a "
        "result; done rows are not made again.",
    )
    parser.add_argument("folder", nargs="?", help="of the rows' configs: v1.yaml ... rl4.yaml")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to n - 1 (default 1)")
    parser.add_argument("--only", help="rows, with commas between (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="rows at a time, one thread each (default 1)"
    )
    parser.add_argument(
        "--out",
        help="the result, whose rows are not made again (default: runs/ablate/ablations.json; "
        "without a folder data/ablations.json)",
    )
    given = parser.parse_args(args)
    if not given.out:
        given.out = ROOT / ("runs/ablate" if given.folder else "data") / "ablations.json"
    return given


def rows_asked_for(given: argparse.Namespace) -> list[str]:
    """The names of the rows to make. SystemExit for an unknown one or a number below 1."""
    known = list(read_paper()["rows"])
    only = given.only.split(",") if given.only else known
    for row in only:
        if row not in known:
            raise SystemExit(f"error: --only names {row}; rows: {', '.join(known)}")
    if given.seeds < 1 or given.jobs < 1:
        raise SystemExit(
            f"error: --seeds is {given.seeds} and --jobs {given.jobs}; both must be at least 1"
        )
    return only


def read_scale() -> dict:
    """data/ablate.yaml: {"tokens": factor, "config": what each row's config changes}."""
    scale = yaml.safe_load((ROOT / "data" / "ablate.yaml").read_text(encoding="utf-8"))
    if set(scale) != {"tokens", "config"}:
        raise SystemExit(
            f"error: data/ablate.yaml holds {', '.join(scale)}; it must hold `tokens` and `config`"
        )
    return scale


def rows_before(out: Path, scale: dict) -> dict:
    """{row: {seed: run_row's}} of a result that is there. SystemExit if its scale is another."""
    if not out.is_file():
        return {}
    before = json.loads(out.read_text(encoding="utf-8"))
    if before and before["scale"] != scale:
        raise SystemExit(
            f"error: {out} was made at another scale than data/ablate.yaml has now; give --out "
            "another file, or move that one away"
        )
    return before.get("rows", {})


def missing_rows(rows: dict, only: list[str], seeds: int) -> list[tuple[str, int]]:
    """[(row, seed)] to make. v7 of each seed comes first: its data, base and PST are the others'.

    It is made even if it is in the result, since its run may lie on another machine.
    """
    left = [(row, s) for s in range(seeds) for row in only if str(s) not in rows.get(row, {})]
    first = [("v7", s) for s in range(seeds) if any(seed == s for _, seed in left)]
    return first + [(row, seed) for row, seed in left if row != "v7"]


def row_config(folder: str | Path, row: str, seed: int, scale: dict) -> tuple[Path, list[str]]:
    """Write runs/ablate/<row>-<seed>.yaml: the row's config with data/ablate.yaml on top.

    Returns (path, [what it changes]). A row that starts from another run's PST starts from v7's.
    """
    source = Path(folder) / f"{row.lower()}.yaml"
    if not source.is_file():
        raise SystemExit(
            f"error: row {row} has no config: {source} is missing; write it "
            "(`extends: ../tiny.yaml` and what the row changes)"
        )
    plain, over = load_config(source), scale["config"]
    stages = [{**asdict(s), "tokens": round(s.tokens * scale["tokens"])} for s in plain.pst.stages]
    pst = {**over.get("pst", {}), "stages": stages}
    if plain.pst.init_from:
        pst["init_from"] = f"runs/ablate-v7-{seed}/pst/final"
    path = ROOT / "runs" / "ablate" / f"{row}-{seed}.yaml"
    values = {
        "extends": os.path.relpath(source.resolve(), path.parent),
        **over,
        "name": f"ablate-{row}-{seed}",
        "seed": seed,
        "pst": pst,
    }
    write_atomic(path, yaml.safe_dump(values, sort_keys=False))
    old, new = asdict(plain), asdict(load_config(path))
    changes = []
    for section in over:
        for key, value in new[section].items():
            if value != old[section][key] and key not in ("stages", "init_from"):
                changes.append(f"{section}.{key} {old[section][key]} -> {value}")
    return path, changes


# ---------------------------------------------------------------------------- making rows
def make_rows(
    paths: dict[tuple[str, int], Path], jobs: int, rows: dict, scale: dict, out: Path
) -> list[str]:
    """Make rows, `jobs` at a time, into `rows` and, as they come, `out`. Returns the failed ones.

    `paths`: {(row, seed): its config}, v7 of a seed before its other rows.
    """
    failed, futures = [], {}
    with ThreadPoolExecutor(jobs) as pool:
        for (row, seed), path in paths.items():
            home = None
            if row != "v7":
                home = partial(wait_for, futures["v7", seed], paths["v7", seed])
            futures[row, seed] = pool.submit(run_row, row, seed, path, home)
        keys = {future: key for key, future in futures.items()}
        try:
            for i, future in enumerate(as_completed(keys), 1):
                row, seed = keys[future]
                said = f"{row}-{seed}, {i} of {len(paths)}:"
                if isinstance(future.exception(), SystemExit):
                    failed.append(f"{row}-{seed}")
                    print(f"{said} {future.exception()}", flush=True)
                    continue
                result = future.result()
                rows.setdefault(row, {})[str(seed)] = result
                print(f"{said} {means_of(result)}; {result['seconds']} s", flush=True)
                write_atomic(out, to_json({"scale": scale, "rows": rows}))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit("stopped: the same command goes on from there") from None
    return failed


def wait_for(future: Future, path: Path) -> Path:
    """The path once the future is done; what it raised."""
    future.result()
    return path


def means_of(result: dict) -> str:
    """The means of a row's figures, in words."""
    values = result["values"].items()
    return ", ".join(f"{FIGURES[name]} {statistics.mean(v):.3f}" for name, v in values)


def run_row(row: str, seed: int, path: Path, home: Callable[[], Path] | None) -> dict:
    """Train and measure one row, each step a process on one thread, or read a done one.

    Returns {"values": {figure: values in the order of task ids}, "seconds"}. `home`: None, or a
    call that waits for the seed's v7 and returns its config file: data and base are the same for
    all rows, and copied from there. `seconds` are of the call that finished the row, without the
    wait for v7, so of a row that was stopped and went on only the last part. SystemExit with the
    last line of the step that failed.
    """
    config = load_config(path)
    run = ROOT / "runs" / config.name
    kept = run / "bench" / "row.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    if home:
        first = load_config(home())
        if (first.data, first.model) == (config.data, config.model):
            copy_shared_parts(ROOT / "runs" / first.name, run)
    began = time.time()
    script = "train_vrl.py" if row.startswith("RL") else "train_pst.py"
    measure = ["--agent", "policy", "--subset", "heldout", "--no-files"]
    run_script(f"{row}-{seed}", path, script, "bench.tasks=8", "bench.sampled=false")
    run_script(f"{row}-{seed}", path, "bench.py", *measure)
    run_script(f"{row}-{seed}", path, "bench.py", *measure, "--sampled")
    values = row_values(run / "bench")
    result = {"values": values, "seconds": round(time.time() - began)}
    write_atomic(kept, to_json(result))
    return result


def copy_shared_parts(source: Path, run: Path) -> None:
    """Copy data and base, if it has one, from the run `source` into a run that lacks them; whole
    or not at all."""
    for part in ("data", "base/final"):
        if (source / part).is_dir() and not (run / part).is_dir():
            draft = run / f"{part}.tmp"
            shutil.copytree(source / part, draft, dirs_exist_ok=True)
            os.rename(draft, run / part)


def run_script(name: str, config: Path, script: str, *arguments: str) -> None:
    """Run one of our scripts on one thread, its output into a log beside the config.

    SystemExit with its last line if it fails.
    """
    log = config.with_suffix(".log")
    with open(log, "a", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, script, "--config", str(config), *arguments],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()
        last = lines[-1] if lines else "it said nothing"
        raise SystemExit(f"error: {name}: {script} ended with {done.returncode}: {last} ({log})")


def row_values(bench: Path) -> dict[str, list[float]]:
    """{figure: values in the order of task ids} of a run's bench folder.

    R_vrt is plan x fine, whatever form the row was trained on.
    """
    _, grades, greedy = read_bench(bench / "policy-heldout")
    _, _, sampled = read_bench(bench / "policy-heldout-sampled")
    values = {
        "R_vrt": {i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in greedy.items()},
        "R_vrt sampled": {i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in sampled.items()},
        "s_rate": {i: g["s_rate"] for i, g in grades.items()},
        "objective": {
            i: statistics.mean(g[k] for k in ("s_rate", *OBJECTIVE) if g[k] is not None)
            for i, g in grades.items()
        },
    }
    return {
        name: [round(value, 4) for _, value in sorted(by_task.items())]
        for name, by_task in values.items()
    }


# ---------------------------------------------------------------------------- the result
def print_ablations(result: dict, path: Path) -> None:
    """Print the ablation's table, and its orderings beside the paper's claims.

    Both go beside `path` as text, the table as a picture too, unless they stand there already.
    """
    paper, rows = read_paper(), result["rows"]
    # {row: {figure: (mean, low, high)}}, in the paper's order.
    table = {}
    for row in paper["rows"]:
        if row in rows:
            seeds = rows[row].values()
            table[row] = {name: interval([s["values"][name] for s in seeds]) for name in FIGURES}
    lines = [*table_lines(table, rows, paper), *ordering_lines(rows, paper)]
    text, picture = path.with_suffix(".txt"), path.with_suffix(".png")
    print("\n" + "\n".join(lines))
    said = "\n".join(lines) + "\n"
    # Printing a result again writes nothing: it may lie where nobody may write.
    if not (text.is_file() and picture.is_file() and text.read_text(encoding="utf-8") == said):
        write_atomic(text, said)
        plot_ablations(table, {row: paper["table_4"][row][-1] for row in table}, picture)
    print(f"\ntext: {text}; picture: {picture}")


def table_lines(table: dict, rows: dict, paper: dict) -> list[str]:
    """The table's lines: a row each, with the paper's O-Score and what the row is beside it."""
    n = sorted({len(s["values"]["R_vrt"]) for seeds in rows.values() for s in seeds.values()})
    titles = "".join(f"{title:>26}" for title in FIGURES.values())
    lines = [
        "Table 4's rows at the scale of data/ablate.yaml: environment VisGenEnv, nothing measured "
        f"on files, judge rules; n = {', '.join(map(str, n))} held-out tasks a seed; means, 95 % "
        "intervals over seeds and tasks; decoder greedy but in the second column",
        f"{'':5}{'seeds':>6}{titles}{'paper O-Score':>15}{'seconds':>9}  what",
    ]
    for row, figures in table.items():
        cells = ""
        for mean, low, high in figures.values():
            cells += f"{f'{mean:.3f} [{low:.3f}, {high:.3f}]':>26}"
        seconds = max(s["seconds"] for s in rows[row].values())
        lines.append(
            f"{row:5}{len(rows[row]):6}{cells}{paper['table_4'][row][-1]:15.3f}{seconds:9}"
            f"  {paper['rows'][row]}"
        )
    return lines


def ordering_lines(rows: dict, paper: dict) -> list[str]:
    """A line for each of the paper's claims that a row is better than others, and our verdicts."""
    lines = [
        "\nThe paper's orderings (Sec. 5.4, there by O-Score): the difference, its 95 % interval "
        "over the seeds and tasks that both rows have",
        f"{'':28}" + "".join(f"{title:46}" for title in FIGURES.values()),
    ]
    for claim in paper["orderings"]:
        cells = ""
        for figure in FIGURES:
            said, other, middle, low, high, n = verdict(rows, claim, figure)
            if n:
                said = f"{said} {middle:+.3f} [{low:+.3f}, {high:+.3f}] {other}"
            cells += f"{said:46}"
        note = f" ({claim['note']})" if "note" in claim else ""
        name = f"{claim['better']} > {' '.join(claim['worse'])}"
        lines.append(f"{name:28}{cells}{claim['claim']}{note}")
    return lines


def verdict(rows: dict, claim: dict, figure: str) -> tuple[str, str, float, float, float, int]:
    """(verdict, the row set against, B - A, low, high, seeds) of one claimed ordering.

    rows: {row: {seed: {"values": {figure: values}}}}. Paired by seed and task, over the seeds that
    both rows have; of several `worse` rows the best one that was run counts.
    """
    better, others = rows.get(claim["better"], {}), []
    for name in claim["worse"]:
        worse = rows.get(name, {})
        seeds = sorted(set(better) & set(worse))
        if not seeds:
            continue
        differences = []
        for seed in seeds:
            ours = better[seed]["values"][figure]
            theirs = worse[seed]["values"][figure]
            differences.append([x - y for x, y in zip(ours, theirs, strict=True)])
        others.append((*interval(differences), name, len(seeds)))
    if not others:
        return "not run", "", 0.0, 0.0, 0.0, 0
    middle, low, high, name, n = min(others)
    said = "within noise"
    if low > 0:
        said = "holds"
    elif high < 0:
        said = "does not hold"
    return said, name, middle, low, high, n


def plot_ablations(table: dict, printed: dict[str, float], path: Path) -> None:
    """The table as a picture: each figure of each row with its interval.

    `printed`: {row: the paper's O-Score}, grey, beside ours.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (15, 0.35 * len(table) + 1.8)
    figure, axes = plt.subplots(1, len(FIGURES), figsize=size, sharey=True, constrained_layout=True)
    for ax, (name, title) in zip(axes, FIGURES.items()):
        for at, figures in enumerate(table.values()):
            middle, low, high = figures[name]
            ax.plot([low, high], [at, at], color="tab:blue")
            ax.plot(middle, at, "o", color="tab:blue")
        ax.set(title=title, yticks=range(len(table)), yticklabels=list(table), xlim=(-0.02, 1.02))
        ax.grid(axis="x", alpha=0.3)
    label = "the paper's, another grader and tasks"
    axes[-1].plot(list(printed.values()), range(len(printed)), "x", color="grey", label=label)
    axes[-1].legend(fontsize=7)
    axes[0].invert_yaxis()
    title = (
        "Table 4's rows at a small scale: means and 95 % intervals over seeds and held-out tasks"
    )
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
