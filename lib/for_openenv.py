"""VisGenEnv as an OpenEnv server (OpenEnv 0.10), for trainers that speak that protocol:

    pip install "openenv>=0.10,<0.11"
    python -m lib.for_openenv --port 8000 --tasks runs/tiny/data/train.jsonl

    from openenv.core import GenericEnvClient
    with GenericEnvClient(base_url="http://127.0.0.1:8000").sync() as env:
        result = env.reset(seed=0, index=3)      # or task={...}, a Task record
        result = env.step({"text": "<think>...</think><plan>...</plan><tool_call>..."})

An action is one turn of UTPC text, an observation the messages that came: the opening ones, then
the tools' replies. The reward comes with `done`: LtrReward's total. One session is one episode.
`uvicorn lib.for_openenv:app` serves the tasks of $VISGEN_TASKS, or 256 that are worded here.
"""

import argparse
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field

from env import VisGenEnv
from lib.experiment import DataConfig, RewardConfig, RolloutConfig
from lib.runs import read_jsonl, run_command
from lib.tasks import make_tasks
from rewards import ltr_reward

try:
    from openenv.core.env_server.http_server import create_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, EnvironmentMetadata, Observation, State
except ImportError as e:
    raise SystemExit(f'error: {e}; `pip install "openenv>=0.10,<0.11"`') from e

# Sessions at once: an episode takes less than a megabyte (ours).
SESSIONS = 256


class VisGenAction(Action):
    """One turn of the agent."""

    text: str = Field(description="UTPC: <think>, <plan>, <tool_call>s or <answer>")


class VisGenObservation(Observation):
    """What the agent reads next."""

    messages: list[dict] = Field(description="new messages, as chat templates take them")
    tools: list[dict] | None = Field(None, description="with reset: their JSON Schemas, or null")
    ended: str | None = Field(None, description="answer, malformed or max_turns, at the end")
    parts: dict = Field({}, description="the reward's parts, at the end")


class VisGenState(State):
    """Where an episode stands."""

    task_id: str | None = None
    request: str | None = None
    ended: str | None = "not started"
    calls: int = 0
    virtual_s: float = 0.0
    price_usd: float = 0.0


@lru_cache(maxsize=1)
def served_tasks() -> list[dict]:
    """The tasks of the file $VISGEN_TASKS, or 256 of this repository."""
    file = os.environ.get("VISGEN_TASKS")
    return read_jsonl(Path(file)) if file else make_tasks(256, "train", DataConfig(), 0)


class VisGenServed(Environment):
    """One session: episodes of VisGenEnv, one after the other."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, rollout: RolloutConfig | None = None, reward: RewardConfig | None = None):
        super().__init__()
        self.env = VisGenEnv(rollout)
        self.reward_config = reward or RewardConfig()
        self.episode_id = None

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        task: dict | None = None,
        index: int | None = None,
        **more: Any,
    ) -> VisGenObservation:
        """Begin an episode of `task`, a Task record, or of the served task number `index`
        (default: the seed). Rollouts of one group share task and seed."""
        seed = seed or 0
        if task is None:
            tasks = served_tasks()
            task = tasks[(seed if index is None else index) % len(tasks)]
        messages, info = self.env.reset(task, seed)
        self.episode_id = episode_id
        return VisGenObservation(messages=messages, tools=info["tools"])

    def step(
        self, action: VisGenAction, timeout_s: float | None = None, **more: Any
    ) -> VisGenObservation:
        """One turn. RuntimeError after the episode's end."""
        replies, _, terminated, truncated, info = self.env.step(action.text)
        seen = VisGenObservation(messages=replies, ended=info["ended"], metadata=info)
        if terminated or truncated:
            found = ltr_reward(self.env.trajectory(), self.reward_config, self.env.pool)
            seen.reward, seen.done, seen.parts = found["total"], True, found
        return seen

    @property
    def state(self) -> VisGenState:
        """Where the episode stands."""
        env = self.env
        if env.ended == "not started":
            return VisGenState()
        return VisGenState(
            episode_id=self.episode_id,
            step_count=len(env.turns),
            task_id=env.task["id"],
            request=env.task["request"],
            ended=env.ended,
            calls=len(env.calls),
            virtual_s=env.virtual_s,
            price_usd=env.price_usd,
        )

    def get_metadata(self) -> EnvironmentMetadata:
        """What the server says of itself."""
        return EnvironmentMetadata(
            name="visgenenv",
            description="36 simulated tools of visual creation, under LtrReward",
            version="0.1.0",
        )


app = create_app(
    VisGenServed,
    VisGenAction,
    VisGenObservation,
    env_name="visgenenv",
    max_concurrent_envs=SESSIONS,
    state_cls=VisGenState,
)


def main() -> None:
    """Serve VisGenEnv, on this machine alone unless --host says otherwise."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m lib.for_openenv")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tasks", help="JSONL of tasks, such as runs/NAME/data/train.jsonl")
    given = parser.parse_args()
    if given.tasks:
        os.environ["VISGEN_TASKS"] = given.tasks
    served_tasks()  # a file that is missing or broken is said here, not in a session
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    run_command(main)
