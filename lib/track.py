"""Metrics in a tracker as well (config key `track`): TensorBoard, Weights & Biases or Trackio.

`lib.runs.append_metrics` hands on every record that it writes. Names are those of metrics.jsonl
after the phase and a slash, what is nested joined by dots: `vrl/reward`, `vrl/groups.flat`,
`eval/greedy.reward`, and `pst-1/loss` of PST's first stage. Only what is asked for is imported.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

PROJECT = "visioncreator"
# What tells the tracks of one phase apart, in this order.
WHOSE = ("phase", "stage", "after")

# What a tracker takes: the track's name, {name in metrics.jsonl: number}, the step.
Send = Callable[[str, dict[str, float], int], None]

OPEN: dict[Path, list[Send]] = {}  # the trackers of this process's runs


def check_trackers(names: list[str]) -> None:
    """SystemExit if the package of a tracker cannot be imported. The packages have their names."""
    for name in names:
        try:
            import_module(name)
        except ImportError as e:
            raise SystemExit(
                f"error: config key `track` names {name}, which cannot be imported ({e}): "
                f"pip install {name}, or leave it out of `track`"
            ) from e


def open_trackers(config, run: Path) -> None:
    """Send what is appended to the run's metrics from now on; a run that was tracked before goes on
    in its track. For the process that writes metrics.jsonl, once the run's folder is there."""
    opened = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio}
    OPEN[run] = [opened[name](config, run) for name in config.track]


def track(run: Path, record: dict) -> None:
    """Send a record of metrics.jsonl to the run's trackers; what has no step is at step 0."""
    whose = "-".join(str(record[key]) for key in WHOSE if key in record)
    for send in OPEN.get(run, []):
        send(whose, dict(numbers(record)), record.get("step", 0))


def numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of a record at any depth, but for its step and stage.

    >>> dict(numbers({"phase": "vrl", "step": 3, "reward": 0.5, "kl": None, "groups": {"flat": 2}}))
    {'reward': 0.5, 'groups.flat': 2}
    """
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and name not in ("step", "stage"):
            yield prefix + name, value


def track_id(config, run: Path) -> str:
    """A name for the run's track: the same whenever it goes on, another for a run made anew.

    config.yaml is written once, when the run is made.
    """
    return f"{config.name}-{int((run / 'config.yaml').stat().st_mtime)}"


def open_tensorboard(config, run: Path) -> Send:
    """Event files in runs/<name>/tensorboard; `tensorboard --logdir runs` shows all runs."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard")

    def send(whose: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{whose}/{name}", value, step)
        writer.flush()

    return send


def open_wandb(config, run: Path) -> Send:
    """A run in the account of WANDB_API_KEY; WANDB_MODE=offline keeps it in runs/<name>/wandb."""
    import wandb

    settings = {"project": PROJECT, "name": config.name, "config": asdict(config), "dir": run}
    try:
        there = wandb.init(**settings, id=track_id(config, run), resume="allow")
    except wandb.Error as e:
        raise SystemExit(
            f"error: config key `track` names wandb, which does not start: {e} WANDB_MODE=offline "
            "keeps the run here"
        ) from e

    def send(whose: str, values: dict[str, float], step: int) -> None:
        # W&B's own count of steps only rises, and each phase has its steps.
        there.define_metric(f"{whose}/*", step_metric=f"{whose}/step")
        named = {f"{whose}/{name}": value for name, value in values.items()}
        there.log({**named, f"{whose}/step": step})

    return send


def open_trackio(config, run: Path) -> Send:
    """A run on this machine; `trackio show` shows it."""
    import trackio

    name = track_id(config, run)
    there = trackio.init(project=PROJECT, name=name, config=asdict(config), resume="allow")

    def send(whose: str, values: dict[str, float], step: int) -> None:
        there.log({f"{whose}/{name}": value for name, value in values.items()}, step=step)

    return send
