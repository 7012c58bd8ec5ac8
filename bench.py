"""Measure the policies of a run on held-out tasks (VisGenBench's protocol in full comes with its own issue), and turn the
simulator's records into files.

    python bench.py --config configs/tiny.yaml                          # untrained, PST, PST + VRL of runs/tiny
    python bench.py --table runs/tiny runs/tiny-1 runs/tiny-2           # mean and spread over runs that are measured
    python bench.py media                                               # draw the media database, data/media/
    python bench.py media FOLDER                                        # add your own pictures, clips and sounds to it

Every number is LtrReward on VisGenEnv's records under the rules judge, greedy and at temperature 1, or exact match on
held-out general items; n, decoder and seed stand in the table's head. Results go to runs/<name>/bench/results.json.
"""

import json
import statistics
import sys
from pathlib import Path

from configs.experiment import ROOT, command_line, open_run, read_jsonl, write_atomic
from data.media import media
from env import to_json
from rewards import PARTS

# ---------------------------------------------------------------------------- measuring policies


def measure(config, run):
    """Evaluate each policy that the run has; a policy measured before is not measured again. Returns {policy: figures}."""
    from train_pst import add_lora, base_policy, list_checkpoints, load_policy, load_tokenizer, read_checkpoint, restore, set_up
    from train_vrl import evaluate, sync_sampler

    path = run / "bench" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    device, tokenizer = set_up(config), load_tokenizer(config, run)
    tasks = read_jsonl(run / "data" / "heldout.jsonl")[: config.bench.tasks]
    final = ROOT / config.pst.init_from if config.pst.init_from else run / "pst" / "final"
    saved = list_checkpoints(run / "vrl")
    print(f"bench: {len(tasks)} held-out tasks, each policy about a minute")
    for name, there in (("untrained", True), ("pst", final.is_dir()), ("vrl", bool(saved))):
        origin = saved[-1].name if name == "vrl" and saved else name
        if name in results and (results[name]["n"], results[name]["from"]) == (len(tasks), origin) or not there:
            print(f"  {name}: {'measured before' if there else 'not trained in this run'}")
            continue
        started = name == "untrained" or (name == "vrl" and config.vrl.start == "base")
        model = (base_policy(config, run, tokenizer, device) if started else load_policy(final, config, tokenizer, device)).float()
        if name == "vrl":
            policy = add_lora(config, load_policy(final, config, tokenizer, device) if config.vrl.start == "pst" else
                              base_policy(config, run, tokenizer, device), norm=config.vrl.norm_lr > 0) if config.vrl.tune == "lora" else model
            restore(policy, [], *read_checkpoint(config, saved[-1]))
            if policy is not model:
                sync_sampler(model, policy)
        figures, _ = evaluate(model.eval().requires_grad_(False), tokenizer, tasks, config, run, name)
        results[name] = {**figures, "n": len(tasks), "seed": config.seed, "from": origin}
        write_atomic(path, to_json(results))
    return results


def rows_of(figures):
    """The table's rows of one policy: (label, value)."""
    for mode in ("greedy", "sampled"):
        if mode in figures:
            yield f"{mode}  R_vrt", figures[mode]["reward"]
            yield f"{mode}  R_vrt > 0.99", figures[mode]["strict"]
            for part in ("plan", "fine", *PARTS):
                yield f"{mode}  R_{part}", figures[mode][part]
    for kind, share in figures["general"].items():
        yield f"exact match  {kind}", share


def print_table(many):
    """Print mean and, over several runs, the spread (sample standard deviation). `many`: a results dict a run."""
    names = [n for n in ("untrained", "pst", "vrl") if all(n in r for r in many)]
    n = {r[name]["n"] for r in many for name in names}
    print(f"\n{len(many)} run(s), seeds {sorted({r[names[0]]['seed'] for r in many})}, n = {', '.join(map(str, sorted(n)))} held-out tasks; "
          "judge: rules; environment: VisGenEnv" + ("; mean +- standard deviation over runs" if len(many) > 1 else ""))
    print(f"{'':26}" + "".join(f"{name:>18}" for name in names))
    for i, (label, _) in enumerate(rows_of(many[0][names[0]])):
        cells = []
        for name in names:
            values = [v for r in many if (v := list(rows_of(r[name]))[i][1]) is not None]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        print(f"{label:26}" + "".join(f"{c:>18}" for c in cells))


def main():
    if sys.argv[1:2] == ["media"]:
        return media(sys.argv[2:], ROOT / "data" / "media")
    if len(sys.argv) > 2 and sys.argv[1] == "--table":
        paths = [Path(p) / "bench" / "results.json" for p in sys.argv[2:]]
        for path in paths:
            if not path.is_file():
                raise SystemExit(f"error: {path} is missing; `python bench.py --config ... name={path.parent.parent.name}` makes it")
        many = []
        for path in paths:
            try:
                many.append(json.loads(path.read_text(encoding="utf-8")))
            except json.JSONDecodeError as e:
                raise SystemExit(f"error: {path} is cut off ({e.msg}); remove it and measure again") from e
            if not many[-1]:
                raise SystemExit(f"error: {path} holds no policy; remove it and measure again")
        return print_table(many)
    config, _ = command_line(__doc__)
    run = open_run(config)
    if not (run / "data" / "done.json").is_file():
        raise SystemExit(f"error: {run.relative_to(ROOT)} has no data yet; `python train_vrl.py --config ...` makes the run")
    print_table([measure(config, run)])


if __name__ == "__main__":
    main()
