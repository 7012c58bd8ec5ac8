"""VisGenEnv as a SkyRL environment (skyrl-gym 0.4), for training on several nodes: docs/scale.md.

    pip install skyrl-gym                       # the environment alone
    python -m lib.for_skyrl data.train_data="['rows.jsonl']" ...     # wants SkyRL itself: GPUs

Its rows are those of lib.for_trl.rows, with env_class (`write_rows`).
"""

import json
import sys
from pathlib import Path
from typing import Any

from env import VisGenEnv
from lib.experiment import RewardConfig, RolloutConfig
from lib.for_trl import rows
from lib.runs import read_jsonl, run_command, write_jsonl
from rewards import ltr_reward

try:
    from skyrl_gym.envs.base_text_env import BaseTextEnv
except ImportError as e:
    raise SystemExit(f"error: {e}; `pip install skyrl-gym`") from e

# SkyRL's chat template gets no schemas: the system message lists the tools.
ROLLOUT = RolloutConfig(tools="signature", tool_pool="task")


class VisGenSkyRL(BaseTextEnv):
    """One episode; `extras` has the row's task and seed, and SkyRL's max_turns."""

    def __init__(self, env_config: Any = None, extras: dict | None = None):
        super().__init__()
        self.row = extras
        self.env = VisGenEnv(ROLLOUT)
        self.found = {}

    def init(self, prompt: list[dict]) -> tuple[list[dict], dict]:
        """The opening messages: those that the row's prompt has."""
        return self.env.reset(json.loads(self.row["task"]), self.row["seed"])

    def step(self, action: str) -> dict:
        """One turn of the policy, with or without its end-of-turn token."""
        replies, _, terminated, truncated, info = self.env.step(action.removesuffix("<|im_end|>"))
        done = terminated or truncated
        if done:
            self.found = ltr_reward(self.env.trajectory(), RewardConfig(), self.env.pool)
        return {
            "observations": replies,
            "reward": self.found["total"] if done else 0.0,
            "done": done,
            "metadata": info,
        }

    def get_metrics(self) -> dict[str, float]:
        """What SkyRL logs of an episode: R_plan, R_fine, calls."""
        parts = {name: self.found[name] for name in ("plan", "fine") if self.found}
        return {**parts, "calls": len(self.env.calls)}


def write_rows(tasks: str, out: str, seed: int = 0) -> None:
    """A JSONL of tasks as a JSONL of SkyRL's rows."""
    made = rows(read_jsonl(Path(tasks)), ROLLOUT, seed)
    write_jsonl(Path(out), ({**row, "env_class": "visgen"} for row in made))


def register() -> None:
    """Tell skyrl-gym of VisGenEnv, as `visgen`."""
    from skyrl_gym.envs import register as add

    add(id="visgen", entry_point="lib.for_skyrl:VisGenSkyRL")


def train(config: Any) -> None:
    """SkyRL's training, in the process that Ray chose for it."""
    from skyrl.train.entrypoints.main_base import BasePPOExp

    register()
    BasePPOExp(config).run()


def main() -> None:
    """SkyRL's entry point with VisGenEnv: all arguments are SkyRL's."""
    try:
        import ray
        from skyrl.train.config import SkyRLTrainConfig
        from skyrl.train.utils import initialize_ray, validate_cfg
    except ImportError as e:
        raise SystemExit(f"error: {e}; install SkyRL as docs/scale.md says") from e
    config = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(config)
    initialize_ray(config)
    ray.get(ray.remote(num_cpus=1)(train).remote(config))


if __name__ == "__main__":
    run_command(main)
