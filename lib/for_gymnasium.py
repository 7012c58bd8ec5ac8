"""VisGenEnv as a Gymnasium environment (`pip install "gymnasium>=1.0"`):

    import gymnasium
    env = gymnasium.make("lib.for_gymnasium:VisGenEnv-v0", tasks=tasks)
    observation, info = env.reset(seed=0)

An action is one turn of UTPC text; an observation is the text that the agent reads next: the system
message and the request, then the replies of the tools. The reward is LtrReward's total with the
last turn, 0.0 before it; `info` has the messages as a chat template takes them and, at the end, the
trajectory and all parts of the reward.
"""

import copy
import string
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from env import VisGenEnv
from lib.experiment import DataConfig, RewardConfig, RolloutConfig
from lib.tasks import make_tasks
from lib.text import tag
from rewards import ltr_reward

# Of a turn, and of what is read: the longest text of the spaces (ours).
MAX_LENGTH = 1_000_000


class AnyText(Text):
    """Texts up to a length in any alphabet; samples are printable ASCII."""

    def __init__(self, max_length: int):
        super().__init__(max_length, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A short text: one of the longest would take seconds to draw."""
        return super().sample(mask or (int(self.np_random.integers(1, 200)), None), probability)


class VisGenGymnasium(gymnasium.Env):
    """Episodes of VisGenEnv over a list of tasks, by default 256 that this repository words.

    reset(seed, options): `options={"task": task}` plays that task, else the seed chooses one.
    """

    metadata = {"render_modes": ["ansi"]}

    def __init__(
        self,
        tasks: list[dict] | None = None,
        rollout: RolloutConfig | None = None,
        reward: RewardConfig | None = None,
        render_mode: str | None = None,
    ):
        self.tasks = tasks or make_tasks(256, "train", DataConfig(), 0)
        self.rollout = rollout or RolloutConfig()
        self.reward_config = reward or RewardConfig()
        self.render_mode = render_mode
        self.action_space = AnyText(MAX_LENGTH)
        self.observation_space = AnyText(MAX_LENGTH)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode: (what the agent reads, {messages, pool, tools, task})."""
        super().reset(seed=seed)
        chosen = int(self.np_random.integers(len(self.tasks)))
        env_seed = int(self.np_random.integers(2**31))
        task = (options or {}).get("task") or self.tasks[chosen]
        self.episode = VisGenEnv(self.rollout)
        messages, info = self.episode.reset(task, env_seed)
        text = "\n\n".join(message["content"] for message in messages)
        # Copies: a user may keep what came back, and change it.
        return text[:MAX_LENGTH], copy.deepcopy({**info, "messages": messages, "task": task})

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One turn of UTPC text. RuntimeError after the episode's end."""
        replies, reward, terminated, truncated, info = self.episode.step(action)
        info = {**info, "messages": replies}
        if terminated or truncated:
            info["trajectory"] = self.episode.trajectory()
            found = ltr_reward(info["trajectory"], self.reward_config, self.episode.pool)
            reward, info["reward"] = float(found["total"]), found
        text = "\n".join(tag("tool_response", reply["content"]) for reply in replies)
        return text[:MAX_LENGTH], reward, terminated, truncated, copy.deepcopy(info)

    def render(self) -> str | None:
        """The episode so far as text."""
        if self.render_mode != "ansi":
            return None
        said = [f"[{message['role']}]\n{message['content']}" for message in self.episode.messages]
        return "\n".join(said)


gymnasium.register(id="VisGenEnv-v0", entry_point=VisGenGymnasium)
