"""`bench.py ablate`: Table 4's rows (Sec. 5.4) trained and measured at a small scale.

A row is configs/ablations/<row>.yaml with data/ablate.yaml, the small scale, on top; seeds and rows
run side by side, each step a process of its own. The result is data/ablations.json, printed beside
the paper's claims on which row is better. Rows and comparisons of ours, of which the paper claims
nothing, stand in data/ablate.yaml and apart in the table.
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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import yaml

from lib.experiment import ModelConfig, load_config
from lib.runs import ROOT, open_run, write_atomic
from lib.tables import OBJECTIVE, interval, read_bench, read_paper
from lib.text import to_json

# A row's figures: `objective` is the mean of S-Rate and, where a task states them, Amount, Duration
# and Storyboard. It stands for the O-Score: of so few tasks one or none is in a column, so one task
# would make a tenth of that. R_cons is over the tasks that ask for consistency.
FIGURES = {
    "R_vrt": "R_vrt greedy",
    "R_vrt sampled": "R_vrt at temperature 1",
    "R_cons": "R_cons greedy",
    "s_rate": "S-Rate",
    "objective": "objective columns",
}
# The verdicts on a difference whose interval lies above 0, below 0, or holds it.
CLAIMED = ("confirmed", "refuted", "not decided")
ASKED = ("higher", "lower", "not decided")


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
    parser.add_argument("folder", nargs="?", help="of the rows' configs: v1.yaml ... kl.yaml")
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
    known = [*read_paper()["rows"], *read_ours()["rows"]]
    only = given.only.split(",") if given.only else known
    for row in only:
        if row not in known:
            raise SystemExit(f"error: --only names {row}; rows: {', '.join(known)}")
    if given.seeds < 1 or given.jobs < 1:
        raise SystemExit(
            f"error: --seeds is {given.seeds} and --jobs {given.jobs}; both must be at least 1"
        )
    return only


def read_ours() -> dict:
    """data/ablate.yaml: {tokens, config, rows, comparisons}. SystemExit for other keys."""
    ours = yaml.safe_load((ROOT / "data" / "ablate.yaml").read_text(encoding="utf-8"))
    if set(ours) != {"tokens", "config", "rows", "comparisons"}:
        raise SystemExit(
            f"error: data/ablate.yaml holds {', '.join(ours)}; it must hold `tokens`, `config`, "
            "`rows` and `comparisons`"
        )
    return ours


def read_scale() -> dict:
    """{"tokens": factor, "config": what each row's config changes} of data/ablate.yaml."""
    ours = read_ours()
    return {key: ours[key] for key in ("tokens", "config")}


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
    return ", ".join(f"{FIGURES[name]} {statistics.mean(v):.3f}" for name, v in values if v)


def run_row(row: str, seed: int, path: Path, home: Callable[[], Path] | None) -> dict:
    """Train and measure one row, each step a process on one thread, or read a done one.

    Returns {"values": {figure: values in the order of task ids}, "seconds"}. `home`: None, or a
    call that waits for the seed's v7 and returns its config file: data and a base that v7 trained
    are the same for all rows, and copied from there. `seconds` are of the call that finished the
    row, without the wait for v7, so of a row that was stopped and went on only the last part.
    SystemExit with the last line of the step that failed.
    """
    config = load_config(path)
    run = ROOT / "runs" / config.name
    kept = run / "bench" / "row.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    if home:
        first = load_config(home())
        if (first.data, without_adapter(first.model)) == (
            config.data,
            without_adapter(config.model),
        ):
            copy_shared_parts(ROOT / "runs" / first.name, run)
    began = time.time()
    # v1 to v7 are SFT alone, the paper's RL rows and all of ours go through VRL.
    script = "train_pst.py" if row.startswith("v") else "train_vrl.py"
    measure = ["--agent", "policy", "--subset", "heldout", "--no-files"]
    run_script(f"{row}-{seed}", path, script, "bench.tasks=8", "bench.sampled=false")
    run_script(f"{row}-{seed}", path, "bench.py", *measure)
    run_script(f"{row}-{seed}", path, "bench.py", *measure, "--sampled")
    values = row_values(run / "bench")
    result = {"values": values, "seconds": round(time.time() - began)}
    write_atomic(kept, to_json(result))
    return result


def without_adapter(model: ModelConfig) -> ModelConfig:
    """The model with the default adapter: neither data nor base depend on it."""
    plain = ModelConfig()
    return replace(model, lora_rank=plain.lora_rank, lora_alpha=plain.lora_alpha)


def copy_shared_parts(source: Path, run: Path) -> None:
    """Copy data and base from the run `source` into a run that lacks them; each whole or not.

    A run that starts from `model.path` has no base of its own, so there is none to copy.
    """
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

    R_vrt is plan x fine, whatever form the row was trained on. R_cons is of the tasks that ask for
    consistency, the same in all rows of a seed.
    """
    _, grades, greedy = read_bench(bench / "policy-heldout")
    _, _, sampled = read_bench(bench / "policy-heldout-sampled")
    values = {
        "R_vrt": {i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in greedy.items()},
        "R_vrt sampled": {i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in sampled.items()},
        "R_cons": {
            i: t["reward"]["cons"] for i, t in greedy.items() if t["reward"]["cons"] is not None
        },
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
    """Print the ablation's table, its orderings beside the paper's claims, and our comparisons.

    All go beside `path` as text, the table as a picture too, unless they stand there already.
    """
    paper, ours, rows = read_paper(), read_ours(), result["rows"]
    # {row: {figure: (mean, low, high) or None}}, in the paper's order, then ours.
    table = {}
    for row in [*paper["rows"], *ours["rows"]]:
        if row in rows:
            table[row] = {name: figure_of(rows[row], name) for name in FIGURES}
    lines = [
        *table_lines(table, rows, paper, ours),
        *ordering_lines(rows, paper),
        *comparison_lines(rows, ours),
    ]
    text, picture = path.with_suffix(".txt"), path.with_suffix(".png")
    print("\n" + "\n".join(lines))
    said = "\n".join(lines) + "\n"
    # Printing a result again writes nothing: it may lie where nobody may write.
    if not (text.is_file() and picture.is_file() and text.read_text(encoding="utf-8") == said):
        write_atomic(text, said)
        printed = {row: paper["table_4"][row][-1] for row in table if row in paper["table_4"]}
        plot_ablations(table, printed, picture)
    print(f"\ntext: {text}; picture: {picture}")


def values_of(seed: dict, figure: str) -> list[float]:
    """A figure's values in one seed of a row: none if no task has it."""
    return seed["values"].get(figure, [])


def figure_of(seeds: dict, figure: str) -> tuple[float, float, float] | None:
    """(mean, low, high) of a row's figure over the seeds that have it; None if none has."""
    by_seed = [values_of(seed, figure) for seed in seeds.values()]
    by_seed = [values for values in by_seed if values]
    return interval(by_seed) if by_seed else None


def table_lines(table: dict, rows: dict, paper: dict, ours: dict) -> list[str]:
    """The table's lines: the paper's rows with its O-Score, then ours, and what each row is."""
    titles = "".join(f"{title:>26}" for title in FIGURES.values())
    lines = [
        "Table 4's rows at the scale of data/ablate.yaml: environment VisGenEnv, nothing measured "
        f"on files, judge rules; n = {counts(rows, 'R_vrt')} held-out tasks a seed, "
        f"{counts(rows, 'R_cons')} of them with R_cons; means, 95 % intervals over seeds and "
        "tasks; decoder greedy but in the second column",
        f"{'':5}{'seeds':>6}{titles}{'paper O-Score':>15}{'seconds':>9}  what",
    ]
    for row in table:
        if row in paper["rows"]:
            printed = f"{paper['table_4'][row][-1]:.3f}"
            lines.append(row_line(row, table[row], rows[row], printed, paper["rows"][row]))
    lines.append("Ours, of which the paper claims nothing")
    if "v7" in table:
        lines.append(row_line("PST", table["v7"], rows["v7"], "", "v7, where the VRL rows begin"))
    for row in table:
        if row in ours["rows"]:
            lines.append(row_line(row, table[row], rows[row], "", ours["rows"][row]))
    return lines


def counts(rows: dict, figure: str) -> str:
    """How many tasks of a seed have a figure, in words: one number or the least and the most."""
    every = [len(values_of(s, figure)) for seeds in rows.values() for s in seeds.values()]
    return f"{min(every)}" if min(every) == max(every) else f"{min(every)} to {max(every)}"


def row_line(name: str, figures: dict, seeds: dict, printed: str, what: str) -> str:
    """One line of the table. `printed`: the paper's O-Score, or nothing."""
    cells = ""
    for figure in figures.values():
        said = "-"
        if figure:
            mean, low, high = figure
            said = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        cells += f"{said:>26}"
    seconds = max(s["seconds"] for s in seeds.values())
    return f"{name:5}{len(seeds):6}{cells}{printed:>15}{seconds:9}  {what}"


def ordering_lines(rows: dict, paper: dict) -> list[str]:
    """A line for each of the paper's claims that a row is better than others, and our verdicts."""
    lines = [
        "\nThe paper's orderings (Sec. 5.4, there by O-Score): the difference, its 95 % interval "
        "over the seeds and tasks that both rows have",
        f"{'':28}" + "".join(f"{title:46}" for title in FIGURES.values()),
    ]
    for claim in paper["orderings"]:
        note = f" ({claim['note']})" if "note" in claim else ""
        name = f"{claim['better']} > {' '.join(claim['worse'])}"
        cells = verdict_cells(rows, claim["better"], claim["worse"], CLAIMED)
        lines.append(f"{name:28}{cells}{claim['claim']}{note}")
    return lines


def comparison_lines(rows: dict, ours: dict) -> list[str]:
    """A line for each comparison of ours, of which the paper claims nothing."""
    lines = [
        "\nOur comparisons: the difference, its 95 % interval over the seeds and tasks that both "
        "rows have",
        f"{'':28}" + "".join(f"{title:46}" for title in FIGURES.values()),
    ]
    for asked in ours["comparisons"]:
        name = f"{asked['row']} - {asked['against']}"
        cells = verdict_cells(rows, asked["row"], [asked["against"]], ASKED)
        lines.append(f"{name:28}{cells}{asked['question']}")
    return lines


def verdict_cells(rows: dict, row: str, against: list[str], words: tuple[str, str, str]) -> str:
    """A cell for each figure: the verdict, the difference, its interval, the row set against."""
    cells = ""
    for figure in FIGURES:
        said, other, middle, low, high, n = verdict(rows, row, against, figure, words)
        if n:
            said = f"{said} {middle:+.3f} [{low:+.3f}, {high:+.3f}] {other}"
        cells += f"{said:46}"
    return cells


def verdict(
    rows: dict,
    row: str,
    against: list[str],
    figure: str,
    words: tuple[str, str, str] = CLAIMED,
) -> tuple[str, str, float, float, float, int]:
    """(verdict, the row set against, the difference, low, high, seeds) of one row against others.

    rows: {row: {seed: {"values": {figure: values}}}}. Paired by seed and task, over the seeds in
    which both rows have the figure; of several rows in `against` the best one that was run counts.
    `words`: for an interval above 0, below 0, and with 0 in it.
    """
    ours, others, missing = rows.get(row, {}), [], "not run"
    for name in against:
        theirs = rows.get(name, {})
        differences = []
        for seed in sorted(set(ours) & set(theirs)):
            pair = values_of(ours[seed], figure), values_of(theirs[seed], figure)
            missing = "not measured"
            if all(pair):
                differences.append([x - y for x, y in zip(*pair, strict=True)])
        if differences:
            others.append((*interval(differences), name, len(differences)))
    if not others:
        return missing, "", 0.0, 0.0, 0.0, 0
    middle, low, high, name, n = min(others)
    above, below, undecided = words
    said = undecided
    if low > 0:
        said = above
    elif high < 0:
        said = below
    return said, name, middle, low, high, n


def plot_ablations(table: dict, printed: dict[str, float], path: Path) -> None:
    """The table as a picture: each figure of each row with its interval, rows of ours last.

    `printed`: {row: the paper's O-Score}, grey, beside ours.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (3.7 * len(FIGURES), 0.35 * len(table) + 1.8)
    figure, axes = plt.subplots(1, len(FIGURES), figsize=size, sharey=True, constrained_layout=True)
    for ax, (name, title) in zip(axes, FIGURES.items()):
        for at, figures in enumerate(table.values()):
            if not figures[name]:
                continue
            middle, low, high = figures[name]
            ax.plot([low, high], [at, at], color="tab:blue")
            ax.plot(middle, at, "o", color="tab:blue")
        ax.set(title=title, yticks=range(len(table)), yticklabels=list(table), xlim=(-0.02, 1.02))
        ax.grid(axis="x", alpha=0.3)
        if len(printed) < len(table):
            ax.axhline(len(printed) - 0.5, color="grey", linewidth=0.8)
    label = "the paper's, another grader and tasks"
    axes[-1].plot(list(printed.values()), range(len(printed)), "x", color="grey", label=label)
    figure.legend(loc="outside lower right", fontsize=7)
    axes[0].invert_yaxis()
    title = (
        "Table 4's rows and, below the line, ours, at a small scale: means and 95 % intervals over "
        "seeds and held-out tasks"
    )
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
