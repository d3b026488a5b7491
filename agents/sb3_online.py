"""DQN, PPO and QR-DQN of Stable-Baselines3 (Raffin et al., 2021), playing the vector environment on a trace.

An episode is a token (draft MDP: a round), so that nothing is bootstrapped past it.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from agents.task import Task, linear_layers
from lede_env.errors import LedeError
from lede_env.policies import MLPPolicy

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise LedeError("Stable-Baselines3 is not installed; pip install -c constraints.txt -e '.[sb3]'") from error

NUM_ENVS = 64
STEPS = 80  # decisions played for each gradient step of a task's budget
REPORTS = 5  # times a run says what it has learned


class SB3VecEnv(VecEnv):
    """A Gymnasium vector environment under `SAME_STEP` as Stable-Baselines3's VecEnv, which refuses Gymnasium's.

    mean, std: (F,) of the observations, which come out normalised.
    """

    def __init__(self, envs: VectorEnv, mean: np.ndarray, std: np.ndarray):
        self.envs, self.mean, self.std = envs, mean, std
        self.render_mode = None
        space: Any = envs.single_observation_space
        bounds = self._normal(space.low), self._normal(space.high)
        super().__init__(envs.num_envs, gym.spaces.Box(*bounds, dtype=np.float32), envs.single_action_space)

    def _normal(self, observations: np.ndarray) -> np.ndarray:
        return ((observations - self.mean) / self.std).astype(np.float32)

    def reset(self) -> np.ndarray:
        observations, _ = self.envs.reset(seed=self._seeds[0])
        self._reset_seeds()
        return self._normal(observations)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        observations, rewards, terminated, truncated, info = self.envs.step(self._actions)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for lane in np.flatnonzero(done):
            # The last token of a truncated text ends as any other: nothing follows (`discount` is 0).
            infos[lane] = {"terminal_observation": self._normal(info["final_obs"][lane]), "TimeLimit.truncated": False}
        return self._normal(observations), rewards.astype(np.float32), done, infos

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("one object plays all lanes")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("one object plays all lanes")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class Online:
    """An algorithm that plays. A subclass says which, and where its decisions are."""

    learns_from = "play"
    grid: tuple[dict[str, Any], ...] = ({"learning_rate": 3e-4}, {"learning_rate": 1e-3})

    def __init__(self, learning_rate: float = 1e-3):
        self.learning_rate = learning_rate

    def algorithm(self, envs: SB3VecEnv, shared: dict[str, Any]) -> Any:
        """The algorithm. `shared`: arguments that all have."""
        raise NotImplementedError

    def decides(self, policy: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Weights and biases of the network whose larger output is the action."""
        raise NotImplementedError

    def train(self, task: Task) -> MLPPolicy:
        part = "token" if task.attributes["mdp"] == "exit" else "round"
        kwargs = {"backend": "trace", **task.env_kwargs, "features": task.features, "episode": part}
        envs = SB3VecEnv(gym.make_vec(task.env_id, num_envs=NUM_ENVS, **kwargs), *task.normaliser)
        layers = {"net_arch": [64, 64], "activation_fn": torch.nn.ReLU}
        shared = {"learning_rate": self.learning_rate, "policy_kwargs": layers, "seed": task.seed, "device": "cpu"}
        algorithm = self.algorithm(envs, shared)
        steps = STEPS * task.updates

        def export() -> MLPPolicy:
            about = {"agent": f"sb3 {type(self).__name__}", "learning_rate": self.learning_rate, "steps": steps}
            return task.mlp(*self.decides(algorithm.policy), about)

        algorithm.learn(steps, callback=_Reports(task, steps // REPORTS, export))
        envs.close()
        return export()


class _Reports(BaseCallback):
    """Reports to the task every so many steps."""

    def __init__(self, task: Task, every: int, export: Any):
        super().__init__()
        self.task, self.every, self.export, self.next = task, every, export, every

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next:
            self.next += self.every
            loss = self.logger.name_to_value.get("train/loss", float("nan"))
            self.task.report(self.num_timesteps, self.export(), loss)
        return True


class DQN(Online):
    """Deep Q-network (Mnih et al., 2015)."""

    def algorithm(self, envs, shared):
        from stable_baselines3 import DQN as Algorithm

        return Algorithm("MlpPolicy", envs, **shared, **self.replay())

    def replay(self) -> dict[str, Any]:
        """A batch of 256 every 10 steps of all environments."""
        steps = {"learning_starts": 50 * NUM_ENVS, "train_freq": 2, "gradient_steps": 3, "target_update_interval": 512}
        return {"batch_size": 256, "buffer_size": 100_000, "exploration_fraction": 0.3, "gamma": 0.99, **steps}

    def decides(self, policy):
        return linear_layers(policy.q_net.q_net)


class QRDQN(DQN):
    """DQN with quantile regression (Dabney et al., 2018). The mean over quantiles is linear: it is exported exactly."""

    def algorithm(self, envs, shared):
        from sb3_contrib import QRDQN as Algorithm

        shared["policy_kwargs"]["n_quantiles"] = 32
        return Algorithm("MlpPolicy", envs, **shared, **self.replay())

    def decides(self, policy):
        weights, biases = linear_layers(policy.quantile_net.quantile_net)
        weights[-1] = weights[-1].reshape(-1, 2, weights[-1].shape[1]).mean(axis=0)
        biases[-1] = biases[-1].reshape(-1, 2).mean(axis=0)
        return weights, biases


class PPO(Online):
    """Proximal policy optimisation (Schulman et al., 2017); the likelier action is taken."""

    def algorithm(self, envs, shared):
        from stable_baselines3 import PPO as Algorithm

        return Algorithm("MlpPolicy", envs, **shared, n_steps=64, batch_size=512, n_epochs=5, gamma=0.99)

    def decides(self, policy):
        hidden, last = linear_layers(policy.mlp_extractor.policy_net), linear_layers(policy.action_net)
        return hidden[0] + last[0], hidden[1] + last[1]
