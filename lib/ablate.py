"""lib.ablate."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import yaml

from lib.experiment import load_config
from lib.runs import ROOT, open_run, write_atomic
from lib.tables import OBJECTIVE, interval, read_bench, read_paper
from lib.text import to_json


def run_row(row, seed, path, home):
    """Train and measure one row, each step a process on one thread, or read a done one: {"values": {figure: values in the tasks' order}, "seconds"}.

    `home`: None, or a call that waits for the seed's v7 and returns its config file: data and base are the same for all rows, and copied from there.
    `seconds` are of the call that finished the row, so of a row that was stopped and went on only the last part.
    """
    config = load_config(path)
    run, log = ROOT / "runs" / config.name, path.with_suffix(".log")
    if (run / "bench" / "row.json").is_file():
        return json.loads((run / "bench" / "row.json").read_text(encoding="utf-8"))
    if home and ((first := load_config(home())).data, first.model) == (config.data, config.model):
        for part in (p for p in ("data", "base/final") if not (run / p).is_dir()):
            shutil.copytree(
                ROOT / "runs" / first.name / part, run / f"{part}.tmp", dirs_exist_ok=True
            )
            os.rename(run / f"{part}.tmp", run / part)
    began = time.time()  # without the wait for v7
    train = [
        "train_vrl.py" if row.startswith("RL") else "train_pst.py",
        "bench.tasks=8",
        "bench.sampled=false",
    ]
    measure = ["bench.py", "--agent", "policy", "--subset", "heldout", "--no-files"]
    for script, *more in (train, measure, [*measure, "--sampled"]):
        with open(log, "a", encoding="utf-8") as out:
            done = subprocess.run(
                [sys.executable, script, "--config", str(path), *more],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            last = (log.read_text(encoding="utf-8").splitlines() or ["it said nothing"])[-1]
            raise SystemExit(
                f"error: {row}-{seed}: {script} ended with {done.returncode}: {last} ({log})"
            )
    _, grades, greedy = read_bench(run / "bench" / "policy-heldout")
    sampled = read_bench(run / "bench" / "policy-heldout-sampled")[2]
    values = {
        "R_vrt": {
            i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in greedy.items()
        },  # whatever form the row was trained on
        "R_vrt sampled": {i: t["reward"]["plan"] * t["reward"]["fine"] for i, t in sampled.items()},
        "s_rate": {i: g["s_rate"] for i, g in grades.items()},
        # Not the O-Score: of these few tasks one or none is in a column, so one task would make a tenth of it.
        "objective": {
            i: statistics.mean(g[k] for k in ("s_rate", *OBJECTIVE) if g[k] is not None)
            for i, g in grades.items()
        },
    }
    result = {
        "values": {k: [round(x, 4) for _, x in sorted(v.items())] for k, v in values.items()},
        "seconds": round(time.time() - began),
    }
    write_atomic(run / "bench" / "row.json", to_json(result))
    return result


def ablate(args):
    """Train and measure Table 4's rows (Sec. 5.4) at a small scale, or print a result; done rows are not made again."""
    parser = argparse.ArgumentParser(prog="bench.py ablate", description=ablate.__doc__)
    parser.add_argument("folder", nargs="?", help="of the rows' configs: v1.yaml ... rl4.yaml")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to n - 1 (default 1)")
    parser.add_argument("--only", help="rows, with commas between (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="rows at a time, one thread each (default 1)"
    )
    parser.add_argument(
        "--out",
        help="the result, whose rows are not made again (default: runs/ablate/ablations.json; without a folder data/ablations.json)",
    )
    given = parser.parse_args(args)
    out = Path(given.out or (ROOT / ("runs/ablate" if given.folder else "data") / "ablations.json"))
    if not given.folder:
        if not out.is_file():
            raise SystemExit(
                f"error: {out} is missing; `python bench.py ablate configs/ablations/` makes it"
            )
        return print_ablations(json.loads(out.read_text(encoding="utf-8")), out)
    known, scale = (
        list(read_paper()["rows"]),
        yaml.safe_load((ROOT / "data" / "ablate.yaml").read_text(encoding="utf-8")),
    )
    only = given.only.split(",") if given.only else known
    if unknown := [row for row in only if row not in known]:
        raise SystemExit(f"error: --only names {unknown[0]}; rows: {', '.join(known)}")
    if given.seeds < 1 or given.jobs < 1:
        raise SystemExit(
            f"error: --seeds is {given.seeds} and --jobs {given.jobs}; both must be at least 1"
        )
    if set(scale) != {"tokens", "config"}:
        raise SystemExit(
            f"error: data/ablate.yaml holds {', '.join(scale)}; it must hold `tokens` and `config`"
        )
    before = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if before and before["scale"] != scale:
        raise SystemExit(
            f"error: {out} was made at another scale than data/ablate.yaml has now; give --out another file, or move that one away"
        )
    rows = before.get("rows", {})
    left = [(row, s) for s in range(given.seeds) for row in only if str(s) not in rows.get(row, {})]
    # v7 of a seed comes first: its data, base and PST are the others'.
    wanted = [("v7", s) for s in range(given.seeds) if any(seed == s for _, seed in left)] + [
        key for key in left if key[0] != "v7"
    ]
    made = {key: row_config(given.folder, *key, scale) for key in wanted}
    for path, _ in made.values():
        open_run(load_config(path))
    print(
        f"{len(wanted)} rows to make, each config changed by "
        + "; ".join(next(iter(made.values()), (None, ["nothing"]))[1])
        + f"; tokens of each stage x {scale['tokens']}"
    )
    failed, futures = [], {}
    with ThreadPoolExecutor(given.jobs) as pool:
        for row, seed in wanted:

            def home(seed=seed):
                futures["v7", seed].result()
                return made["v7", seed][0]

            futures[row, seed] = pool.submit(
                run_row, row, seed, made[row, seed][0], None if row == "v7" else home
            )
        names = {future: key for key, future in futures.items()}
        try:
            for i, future in enumerate(as_completed(names), 1):
                row, seed = names[future]
                if isinstance(future.exception(), SystemExit):
                    failed.append(f"{row}-{seed}")
                    print(f"{row}-{seed}, {i} of {len(wanted)}: {future.exception()}", flush=True)
                    continue
                rows.setdefault(row, {})[str(seed)] = result = future.result()
                means = ", ".join(
                    f"{FIGURES[k]} {statistics.mean(v):.3f}" for k, v in result["values"].items()
                )
                print(
                    f"{row}-{seed}, {i} of {len(wanted)}: {means}; {result['seconds']} s",
                    flush=True,
                )
                write_atomic(out, to_json({"scale": scale, "rows": rows}))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit("stopped: the same command goes on from there") from None
    if rows:
        print_ablations({"rows": rows}, out)
    if failed:
        raise SystemExit(
            f"error: {len(failed)} of {len(wanted)} rows failed: {', '.join(failed)}; the same command tries them again"
        )


# An ablation's row: `objective` is the mean of S-Rate and, where a task states them, Amount, Duration and Storyboard.
FIGURES = {
    "R_vrt": "R_vrt greedy",
    "R_vrt sampled": "R_vrt at temperature 1",
    "s_rate": "S-Rate",
    "objective": "objective columns",
}


def row_config(folder, row, seed, scale):
    """Write runs/ablate/<row>-<seed>.yaml: the row's config with data/ablate.yaml (`scale`) on top. Returns (path, [what it changes])."""
    source = Path(folder) / f"{row.lower()}.yaml"
    if not source.is_file():
        raise SystemExit(
            f"error: row {row} has no config: {source} is missing; write it (`extends: ../tiny.yaml` and what the row changes)"
        )
    plain, over = load_config(source), scale["config"]
    stages = [{**asdict(s), "tokens": round(s.tokens * scale["tokens"])} for s in plain.pst.stages]
    shared = {"init_from": f"runs/ablate-v7-{seed}/pst/final"} if plain.pst.init_from else {}
    values = {
        **over,
        "name": f"ablate-{row}-{seed}",
        "seed": seed,
        "pst": {**over.get("pst", {}), "stages": stages, **shared},
    }
    path = ROOT / "runs" / "ablate" / f"{row}-{seed}.yaml"
    write_atomic(
        path,
        yaml.safe_dump(
            {"extends": os.path.relpath(source.resolve(), path.parent), **values}, sort_keys=False
        ),
    )
    old, new = asdict(plain), asdict(load_config(path))
    keys = [
        (part, k)
        for part in over
        for k in new[part]
        if new[part][k] != old[part][k] and k not in ("stages", "init_from")
    ]
    return path, [f"{part}.{k} {old[part][k]} -> {new[part][k]}" for part, k in keys]


def verdict(rows, claim, figure):
    """(verdict, the row set against, B - A, low, high, seeds) of one claimed ordering; rows: {row: {seed: {"values": {figure: values}}}}.

    Paired by seed and task, over the seeds that both rows have; of several `worse` rows the best one that was run counts.
    """
    better, others = rows.get(claim["better"], {}), []
    for name in claim["worse"]:
        if seeds := sorted(set(better) & set(rows.get(name, {}))):
            pairs = [
                [
                    x - y
                    for x, y in zip(
                        better[s]["values"][figure], rows[name][s]["values"][figure], strict=True
                    )
                ]
                for s in seeds
            ]
            others.append((*interval(pairs), name, len(seeds)))
    if not others:
        return "not run", "", 0.0, 0.0, 0.0, 0
    middle, low, high, name, n = min(others)
    return (
        "holds" if low > 0 else "does not hold" if high < 0 else "within noise",
        name,
        middle,
        low,
        high,
        n,
    )


def print_ablations(result, path):
    """Print the ablation's table and its orderings beside the paper's claims; both go beside `path` as text, the table as a picture too."""
    paper, rows, lines = read_paper(), result["rows"], []
    say = lines.append
    table = {
        row: {k: interval([s["values"][k] for s in rows[row].values()]) for k in FIGURES}
        for row in paper["rows"]
        if row in rows
    }
    n = sorted({len(s["values"]["R_vrt"]) for r in rows.values() for s in r.values()})
    say(
        f"Table 4's rows at the scale of data/ablate.yaml: environment VisGenEnv, nothing measured on files, judge rules; n = "
        f"{', '.join(map(str, n))} held-out tasks a seed; means, 95 % intervals over seeds and tasks; decoder greedy but in the second column"
    )
    say(
        f"{'':5}{'seeds':>6}"
        + "".join(f"{title:>26}" for title in FIGURES.values())
        + f"{'paper O-Score':>15}{'seconds':>9}  what"
    )
    for row, cells in table.items():
        say(
            f"{row:5}{len(rows[row]):6}"
            + "".join(f"{'{:.3f} [{:.3f}, {:.3f}]'.format(*c):>26}" for c in cells.values())
            + f"{paper['table_4'][row][-1]:15.3f}{max(s['seconds'] for s in rows[row].values()):9}  {paper['rows'][row]}"
        )
    say(
        "\nThe paper's orderings (Sec. 5.4, there by O-Score): the difference, its 95 % interval over the seeds and tasks that both rows have"
    )
    say(f"{'':28}" + "".join(f"{title:46}" for title in FIGURES.values()))
    for claim in paper["orderings"]:
        cells = []
        for said, other, middle, low, high, n in (
            verdict(rows, claim, figure) for figure in FIGURES
        ):
            cells.append(f"{said} {middle:+.3f} [{low:+.3f}, {high:+.3f}] {other}" if n else said)
        note = f" ({claim['note']})" if "note" in claim else ""
        say(
            f"{claim['better'] + ' > ' + ' '.join(claim['worse']):28}"
            + "".join(f"{c:46}" for c in cells)
            + claim["claim"]
            + note
        )
    print("\n" + "\n".join(lines))
    write_atomic(path.with_suffix(".txt"), "\n".join(lines) + "\n")
    plot_ablations(
        table, {row: paper["table_4"][row][-1] for row in table}, path.with_suffix(".png")
    )
    print(f"\ntext: {path.with_suffix('.txt')}; picture: {path.with_suffix('.png')}")


def plot_ablations(table, printed, path):
    """The table as a picture: each figure of each row with its interval; `printed`: {row: the paper's O-Score}, grey, beside ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(FIGURES), figsize=(15, 0.35 * len(table) + 1.8), sharey=True, constrained_layout=True
    )
    for ax, (name, title) in zip(axes, FIGURES.items()):
        for at, cells in enumerate(table.values()):
            middle, low, high = cells[name]
            ax.plot([low, high], [at, at], color="tab:blue")
            ax.plot(middle, at, "o", color="tab:blue")
        ax.set(title=title, yticks=range(len(table)), yticklabels=list(table), xlim=(-0.02, 1.02))
        ax.grid(axis="x", alpha=0.3)
    axes[-1].plot(
        list(printed.values()),
        range(len(printed)),
        "x",
        color="grey",
        label="the paper's, another grader and tasks",
    )
    axes[-1].legend(fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle(
        "Table 4's rows at a small scale: means and 95 % intervals over seeds and held-out tasks",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
