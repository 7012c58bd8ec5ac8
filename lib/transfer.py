"""`bench.py transfer`: what VRL in the simulator is worth with real tools (Sec. 4.3.3), measured.

The "real" tools are VisGenEnv with other dynamics (lib/dials.py). The policies of finished runs
play the same held-out tasks there and in the simulator, and each theorem's two sides are set beside
one another (lib/theorems.py has every symbol). A point is one policy in one environment; its
episodes are one line of runs/<name>/transfer/transfer.jsonl, so a study that was stopped goes on.
docs/transfer.md explains what is measured, and what such a study cannot show.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from env import VisGenEnv, call_of, read_cases, studio
from lib.ablate import copy_shared_parts, run_script
from lib.dials import PARTS
from lib.experiment import Config, RolloutConfig, load_config
from lib.lineage import deliverables, on_topic, read_media
from lib.runs import (
    MAY_DIFFER,
    ROOT,
    append_jsonl,
    cut_tail,
    digest,
    find_run,
    open_run,
    read_jsonl,
    write_atomic,
)
from lib.text import to_json
from lib.theorems import token_kl, total_variation
from lib.verdicts import RETURNS, Study, analyse, mean_of, plot_transfer, transfer_lines
from rewards import asked_for, consistency_reward, flawed_share

FIDELITIES = "1,0.95,0.9,0.8,0.65,0.5,0.25"
KL_COEFS = "0,0.01,0.04,0.2"
# The fidelity at which each dial is turned alone.
ALONE = 0.5
# Of the runs beside the study's own, the held-out tasks measured while they are trained.
SIDE_TASKS = 8
# Tasks that a policy plays at once.
CHUNK = 64


@dataclass(frozen=True)
class Real:
    """A "real" environment: its fidelity, and the one dial that is turned ("": all are mixed)."""

    fidelity: float
    part: str = ""

    @property
    def name(self) -> str:
        """Such as 0.8, or action 0.5."""
        return f"{self.part} {self.fidelity:g}".strip()

    def rollout(self, plain: RolloutConfig) -> RolloutConfig:
        """The simulator's settings with the dials turned; fidelity 1 is the simulator itself."""
        weights = {part: float(self.part in ("", part)) for part in PARTS}
        return replace(plain, fidelity=self.fidelity, deviations=weights)


VIRTUAL = Real(1.0)


@dataclass(frozen=True)
class Policy:
    """A policy of the study: its name there, and the run and stage that hold its weights."""

    name: str
    config: Config
    stage: str

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return ROOT / "runs" / self.config.name


# ------------------------------------------------------------------------------------------ C_tool
def outcome(base: VisGenEnv, case: dict, rollout: RolloutConfig, seed: str) -> str:
    """A digest of all that comes of one call of the audit's: reply, price and what it made.

    base: a studio, which stays as it is. Times are left out: they vary without end.
    """
    env = copy.copy(base)
    env.rollout, env.failure_scale, env.seed = rollout, case["failure_scale"], seed
    env.artifacts, env.calls = dict(base.artifacts), []
    env.counts, env.todo, env.used = {}, {}, {}
    reply = env.call(call_of(case))
    call = env.calls[-1]
    made = []
    for media_id in call["outputs"]:
        fields = {k: v for k, v in env.artifacts[media_id].items() if k not in ("made_s", "media")}
        made.append(fields)
    return digest(to_json([reply, call["status"], call["error"], call["price_usd"], made]))


def c_tool(real: Real, seeds: int, cases: list[dict] | None = None) -> float:
    """C_tool: 1 - the mean total variation of outcomes over the audit's calls (A.1), measured.

    Each call of data/fidelity.jsonl is made with `seeds` seeds of its own, in the simulator and in
    the real environment, from the same state. With the same seeds, what is random in both is no
    difference.
    """
    base = studio()
    distances = []
    for i, case in enumerate(cases or read_cases()):
        shares = []
        for where in (VIRTUAL, real):
            rollout = where.rollout(base.rollout)
            seen = Counter(outcome(base, case, rollout, f"{i} {s}") for s in range(seeds))
            shares.append({key: count / seeds for key, count in seen.items()})
        distances.append(total_variation(*shares))
    return 1 - statistics.mean(distances)


# ------------------------------------------------------------------------------------ the episodes
def vision_reward(trajectory: dict) -> float:
    """What stands in for the paper's R_vision, from records, in [0, 1] (ours).

    Of the pictures or films asked for, the mean share of the subject's and style's words in the
    prompt behind each, halved by a flaw all over it (what a service's drawing adds, which R_result
    cannot see), 0 for each that is missing; times the share made from one reference where
    consistency is asked for. Nothing here sees a pixel.
    """
    kind, n_asked = asked_for(trajectory["task"]["constraints"])
    media = read_media(trajectory)
    items = [a["id"] for a in deliverables(trajectory) if a["kind"] == kind]
    if not items:
        return 0.0
    seen = [on_topic(i, media, media.topic) * (1 - flawed_share(i, media) / 2) for i in items]
    together, _ = consistency_reward(trajectory, media)
    mean = sum(sorted(seen)[::-1][:n_asked]) / max(n_asked, len(items))
    return mean * (1.0 if together is None else together)


def episode_row(trajectory: dict) -> dict:
    """What the study keeps of a scored episode."""
    reward = trajectory["reward"]
    return {
        "task": trajectory["task"]["id"],
        "ltr": round(reward["total"], 6),
        "plan": round(reward["plan"], 6),
        "result": round(reward["result"], 6),
        "vision": round(vision_reward(trajectory), 6),
        "ended": trajectory["ended"],
    }


def play(model, tokenizer, tasks: list[dict], config: Config, rollouts: int, label: str) -> list:
    """Scored Rollouts of each task at temperature 1; the same seeds for whoever plays where."""
    from lib.evaluation import score_rollouts
    from lib.sampler import sample_rollouts

    played = []
    for at in range(0, len(tasks), CHUNK):
        some = sample_rollouts(
            model,
            tokenizer,
            tasks[at : at + CHUNK],
            config,
            temperature=1.0,
            seed=config.seed,
            group_size=rollouts,
            progress=label,
        )
        score_rollouts(some, config)
        played += some
    return played


def policy_kl(model, reference, rollouts: list) -> dict[str, float]:
    """KL(pi || pi_pst) in nats over the states that pi visited in its rollouts, exact at each.

    Returns {"episode": the mean over episodes of the sum over their tokens, "token": the mean over
    all tokens}. The former is the KL of the two distributions of episodes.
    """
    import torch

    total, n_tokens = 0.0, 0
    with torch.inference_mode():
        for r in rollouts:
            ours, theirs = (state_logprobs(m, r) for m in (model, reference))
            total += float(token_kl(ours, theirs).sum())
            n_tokens += len(ours)
    return {"episode": total / len(rollouts), "token": total / max(1, n_tokens)}


def state_logprobs(model, rollout):
    """A frozen model's log-probabilities (N, V) at the N states where the agent chose a token."""
    import torch

    from lib.policy import hidden_states

    ids = torch.tensor([rollout.ids], device=model.device)  # (1, T)
    places = torch.arange(ids.shape[1], device=model.device)[None]  # (1, T)
    pictures = [(0, 0, rollout.pictures)] if rollout.pictures else ()
    hidden = hidden_states(model, ids, places, pictures)[0, :-1]  # (T - 1, D)
    chosen = torch.tensor(rollout.loss_mask[1:], device=model.device).bool()  # (T - 1,)
    return model.get_output_embeddings()(hidden[chosen]).float().log_softmax(-1)


# -------------------------------------------------------------------------------------- the points
def key_of(record: dict) -> tuple:
    """What a point is of; a point that is there under the same key is not played again."""
    names = ("run", "policy", "from", "config", "fidelity", "part", "tasks", "rollouts")
    return tuple(record[name] for name in names)


def planned(policies: list[Policy], reals: list[Real]) -> list[tuple[Policy, Real]]:
    """The points of one run: PST and VRL everywhere, the other policies at every third fidelity."""
    mixed = [real for real in reals if not real.part]
    points = []
    for policy in policies:
        where = reals if policy.name in ("pst", "vrl") else mixed[::3]
        points += [(policy, real) for real in where]
    return points


def play_points(
    run: Path, policies: list[Policy], reals: list[Real], given: argparse.Namespace, load: Callable
) -> list[dict]:
    """The records of one run's points, in order; those that are missing are played and appended."""
    path = run / "transfer" / "transfer.jsonl"
    cut_tail(path)
    there = {key_of(r): r for r in read_jsonl(path)} if path.is_file() else {}
    wanted = []
    for policy, real in planned(policies, reals):
        head = {
            "run": run.name,
            "seed": policy.config.seed,
            "policy": policy.name,
            "from": weights_of(policy),
            "config": trained_as(policy.config),
            "real": real.name,
            "fidelity": real.fidelity,
            "part": real.part,
            "tasks": given.tasks,
            "rollouts": given.rollouts,
        }
        wanted.append((policy, real, head))
    left = [(policy, real, head) for policy, real, head in wanted if key_of(head) not in there]
    print(f"{run.name}: {len(wanted)} points, {len(left)} of them to play", flush=True)
    if left:
        for record in played_points(run, policies, left, load):
            append_jsonl(path, [record])
            there[key_of(record)] = record
    return [there[key_of(head)] for _, _, head in wanted]


def weights_of(policy: Policy) -> str:
    """Where a policy's weights stand, from the repository's root."""
    from lib.checkpoints import list_checkpoints

    folder = policy.run / "pst" / "final"
    if policy.stage == "vrl":
        folder = list_checkpoints(policy.run / "vrl")[-1]
    elif policy.config.pst.init_from:
        folder = ROOT / policy.config.pst.init_from
    return Path(os.path.relpath(folder, ROOT)).as_posix()


def trained_as(config: Config) -> str:
    """A digest of what decides a policy's numbers, so that one trained anew is another policy."""
    sections = asdict(config)
    return digest(to_json({k: v for k, v in sections.items() if k not in MAY_DIFFER}), size=4)


def played_points(
    run: Path, policies: list[Policy], left: list[tuple], load: Callable
) -> Iterable[dict]:
    """Play points, all of one policy in a row: yields their records."""
    from lib.policy import set_up
    from lib.tokens import load_tokenizer

    own = policies[0].config
    # Whoever judged in training: an LLM's verdicts would cost as many requests as episodes.
    own = replace(own, reward=replace(own.reward, judge="rules"))
    device, tokenizer = set_up(own), load_tokenizer(own, run)
    tasks = read_jsonl(run / "data" / "heldout.jsonl")
    reference = load(own, run, "pst", device, tokenizer)
    name, model = "pst", reference
    for number, (policy, real, head) in enumerate(left, 1):
        began = time.time()
        if policy.name != name:
            name = policy.name
            model = load(policy.config, policy.run, policy.stage, device, tokenizer)
        config = replace(own, rollout=real.rollout(own.rollout))
        label = f"{number} of {len(left)}: {name} at {real.name}"
        rollouts = play(model, tokenizer, tasks[: head["tasks"]], config, head["rollouts"], label)
        kl = None
        if real == VIRTUAL:
            kl = {"episode": 0.0, "token": 0.0}
            if name != "pst":
                kl = policy_kl(model, reference, rollouts)
        rows = [episode_row(r.trajectory) for r in rollouts]
        seconds = round(time.time() - began, 1)
        means = ", ".join(f"{k} {mean_of(rows, k):.3f}" for k in RETURNS)
        print(f"  {label}: {means}; {seconds} s", flush=True)
        yield {**head, "episodes": rows, "kl": kl, "seconds": seconds}


# ----------------------------------------------------------------------------- the runs beside it
def side_runs(config: Config, given: argparse.Namespace) -> dict[str, dict]:
    """{name: sections of its config} of the runs beside a study's own: one a kl_coef, and one
    trained with the dials turned (domain randomisation).

    What the run's own VRL is already is left out (`own_is_side`).
    """
    runs = {}
    for coef in given.kl:
        runs[f"kl-{coef:g}"] = {"vrl": {"kl_coef": coef}}
    if given.randomised < 1:
        runs[f"random-{given.randomised:g}"] = {
            "vrl": {"kl_coef": config.vrl.kl_coef},
            "rollout": {"fidelity": given.randomised},
        }
    if own_is_side(config, given):
        runs.pop(f"kl-{config.vrl.kl_coef:g}", None)
    return runs


def own_is_side(config: Config, given: argparse.Namespace) -> bool:
    """Whether the run's own VRL is what a run beside it would be, and so stands for it."""
    v = config.vrl
    as_long = v.steps == given.steps and (given.lr or v.lr) == v.lr
    return v.tune == "lora" and as_long and config.rollout.fidelity == 1


def side_config(
    run: Path, config: Config, name: str, sections: dict, given: argparse.Namespace
) -> Path:
    """Write runs/<run>/transfer/<name>.yaml, the config of a run beside it: from the same PST, with
    an adapter (the KL needs it), the fall of its rate as long in proportion."""
    cooldown = round(config.vrl.cooldown * given.steps / config.vrl.steps)
    vrl = {
        "tune": "lora",
        "steps": given.steps,
        "lr": given.lr or config.vrl.lr,
        "cooldown": cooldown,
        **sections["vrl"],
    }
    values = {
        "extends": "../config.yaml",
        "name": f"{run.name}-{name}",
        "pst": {"init_from": config.pst.init_from or f"runs/{run.name}/pst/final"},
        "vrl": vrl,
        "rollout": sections.get("rollout", {}),
        "bench": {"tasks": min(SIDE_TASKS, config.data.heldout_tasks), "sampled": False},
    }
    path = run / "transfer" / f"{name}.yaml"
    write_atomic(path, yaml.safe_dump(values, sort_keys=False))
    return path


def is_finished(config: Config) -> bool:
    """Whether a run's VRL has ended."""
    return (ROOT / "runs" / config.name / "vrl" / f"step-{config.vrl.steps}").is_dir()


def train_sides(missing: dict[str, Path], run: Path, jobs: int) -> None:
    """Train the runs beside `run` that are missing, `jobs` at a time, a process on one thread each.

    SystemExit with the last line of the first that fails; the others' steps are kept.
    """

    def train(name: str, path: Path) -> float:
        began = time.time()
        side = open_run(load_config(path))
        copy_shared_parts(run, side)
        run_script(f"{run.name}-{name}", path, "train_vrl.py")
        return time.time() - began

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, name, path): name for name, path in missing.items()}
        for future in as_completed(futures):
            print(f"  trained {run.name}-{futures[future]}: {future.result():.0f} s", flush=True)


def policies_of(config: Config, run: Path, given: argparse.Namespace) -> list[Policy]:
    """The run's PST and VRL, and the policies of the runs beside it, which are trained if missing.

    With --no-training the missing ones are left out, and the commands that make them are said.
    """
    policies = [Policy("pst", config, "pst"), Policy("vrl", config, "vrl")]
    missing, sides = {}, {}
    for name, sections in side_runs(config, given).items():
        path = side_config(run, config, name, sections, given)
        sides[name] = load_config(path)
        find_run(sides[name])
        if not is_finished(sides[name]):
            missing[name] = path
    if missing and given.training:
        print(f"{run.name}: {len(missing)} runs to train, {given.steps} steps of VRL each")
        train_sides(missing, run, given.jobs)
        missing = {}
    if missing:
        print("not trained here (--no-training); these commands make them:")
        for path in missing.values():
            print(f"  python train_vrl.py --config {path.relative_to(ROOT)}")
    return policies + [Policy(n, c, "vrl") for n, c in sides.items() if n not in missing]


# ----------------------------------------------------------------------------------- the command
def transfer(arguments: list[str], load: Callable) -> None:
    """Measure how VRL's gain transfers from VisGenEnv to "real" environments (Sec. 4.3.3).

    From a finished run, and with --runs from several seeds of it together. Trains the runs beside
    it (a VRL for each kl_coef, one under domain randomisation), plays every policy in every
    environment, and writes transfer.json, transfer.txt and transfer.png into runs/<name>/transfer/.
    Points that were played are not played again. `load`: bench.load_stage.
    """
    given = read_arguments(arguments)
    reals = [Real(f) for f in given.fidelities] + [Real(ALONE, part) for part in PARTS]
    began = time.time()
    c_tools = {real.name: round(c_tool(real, given.outcomes), 6) for real in reals}
    for name, measured in c_tools.items():
        print(f"C_tool of the environment {name}: {measured:.3f}", flush=True)
    records, trained = [], set()
    for config in given.configs:
        run = ROOT / "runs" / config.name
        policies = policies_of(config, run, given)
        trained |= {policy.name for policy in policies}
        records += play_points(run, policies, reals, given, load)
    coefs, twins = kinds_of(given.configs[0], given, trained)
    result = analyse(Study(records, c_tools), coefs, *twins)
    first = given.configs[0]
    result["settings"] = {
        "tasks": given.tasks,
        "rollouts": given.rollouts,
        "steps": given.steps,
        "seeds_of_c_tool": given.outcomes,
        "judge": "rules",
        "failure_scale": first.rollout.failure_scale,
    }
    folder = ROOT / "runs" / first.name / "transfer"
    write_atomic(folder / "transfer.json", json.dumps(result, indent=1))
    lines = transfer_lines(result)
    write_atomic(folder / "transfer.txt", "\n".join(lines) + "\n")
    plot_transfer(result, folder / "transfer.png")
    print("\n" + "\n".join(lines))
    print(f"\n{folder.relative_to(ROOT)}: transfer.json, .txt, .png; {time.time() - began:.0f} s")


def kinds_of(
    config: Config, given: argparse.Namespace, trained: set[str]
) -> tuple[dict[str, float], tuple[str, str]]:
    """({policy: its kl_coef}, (the policy of domain randomisation, its twin without)) by name."""
    coefs = {f"kl-{coef:g}": coef for coef in given.kl}
    twin = f"kl-{config.vrl.kl_coef:g}"
    if own_is_side(config, given):
        twin = "vrl"
        if coefs.pop(f"kl-{config.vrl.kl_coef:g}", None) is not None:
            coefs["vrl"] = config.vrl.kl_coef
    coefs = {name: coef for name, coef in coefs.items() if name in trained}
    return coefs, (f"random-{given.randomised:g}", twin)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked; `configs` are those of the runs, each as its folder has it.

    SystemExit for a value that cannot be, and for a run that is not finished.
    """
    parser = argparse.ArgumentParser(prog="bench.py transfer", description=transfer.__doc__)
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--runs", help="runs of several seeds, with commas between (default: name)")
    parser.add_argument("--tasks", type=int, default=64, help="held-out tasks (default 64)")
    parser.add_argument("--rollouts", type=int, default=2, help="episodes a task (default 2)")
    parser.add_argument(
        "--fidelities", default=FIDELITIES, help="of the real environments (default %(default)s)"
    )
    parser.add_argument(
        "--kl",
        default=KL_COEFS,
        help='kl_coef of the runs beside it (default %(default)s; "": none)',
    )
    parser.add_argument(
        "--randomised",
        type=float,
        default=0.7,
        help="fidelity in training of the run under domain randomisation (default 0.7; 1: none)",
    )
    parser.add_argument(
        "--steps", type=int, help="of VRL, of the runs beside it (default: vrl.steps)"
    )
    parser.add_argument("--lr", type=float, help="of theirs (default: vrl.lr)")
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at a time (default 1)")
    parser.add_argument(
        "--outcomes", type=int, default=20, help="seeds by which C_tool is measured (default 20)"
    )
    parser.add_argument(
        "--no-training", dest="training", action="store_false", help="train nothing; say how"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args(arguments)
    for name in ("tasks", "rollouts", "jobs", "outcomes", "steps"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise SystemExit(f"error: --{name} is {value}; it must be at least 1")
    fidelities = numbers_of("--fidelities", given.fidelities, 0, 1)
    given.fidelities = sorted({1.0, *fidelities}, reverse=True)
    given.kl = numbers_of("--kl", given.kl, 0, 100)
    if not 0 <= given.randomised <= 1:
        raise SystemExit(f"error: --randomised is {given.randomised}; it must be from 0 to 1")
    config = load_config(given.config, given.overrides)
    names = given.runs.split(",") if given.runs else [config.name]
    given.configs = [finished_run(name) for name in names]
    check_seeds(given.configs)
    given.steps = given.steps or given.configs[0].vrl.steps
    if given.kl or given.randomised < 1:
        # The twin of the run under domain randomisation is one of them.
        given.kl = sorted({*given.kl, given.configs[0].vrl.kl_coef})
    n_tasks = min(c.data.heldout_tasks for c in given.configs)
    if given.tasks > n_tasks:
        print(f"the runs have {n_tasks} held-out tasks, so --tasks is {n_tasks}")
        given.tasks = n_tasks
    return given


def check_seeds(configs: list[Config]) -> None:
    """SystemExit unless the runs differ in name and seed alone (and in what was measured)."""
    plain = [replace(c, name="", seed=0, bench=configs[0].bench) for c in configs]
    plain = [replace(c, pst=replace(c.pst, init_from="")) for c in plain]
    for config, one in zip(configs, plain):
        if one != plain[0]:
            raise SystemExit(
                f"error: runs/{config.name} and runs/{configs[0].name} differ in more than their "
                "seed; --runs takes seeds of one config"
            )


def numbers_of(option: str, text: str, least: float, most: float) -> list[float]:
    """Numbers with commas between. SystemExit for anything else."""
    numbers = []
    for word in filter(None, text.split(",")):
        try:
            number = float(word)
        except ValueError:
            number = float("nan")
        if not least <= number <= most:
            raise SystemExit(
                f"error: {option} has {word!r}; it takes numbers from {least} to {most}, with "
                "commas between"
            )
        numbers.append(number)
    return numbers


def finished_run(name: str) -> Config:
    """The config of runs/<name>, as its folder has it. SystemExit unless it has PST and VRL."""
    run = ROOT / "runs" / name
    if not (run / "config.yaml").is_file():
        raise SystemExit(
            f"error: runs/{name} is no run; `python train_vrl.py --config ... name={name}` makes it"
        )
    config = replace(load_config(run / "config.yaml"), name=name)
    if config.vrl.start != "pst" or config.rollout.engine == "vllm":
        raise SystemExit(
            f"error: runs/{name} has vrl.start={config.vrl.start} and rollout.engine="
            f"{config.rollout.engine}; the study takes a VRL from PST, played by our own sampler"
        )
    if not is_finished(config):
        raise SystemExit(
            f"error: runs/{name} has no vrl/step-{config.vrl.steps}; "
            f"`python train_vrl.py --config runs/{name}/config.yaml` ends it"
        )
    return config
