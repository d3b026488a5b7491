"""A vector environment for agents that live on a GPU: torch tensors in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper
from torch import Tensor

from lede_env.models.loading import resolve_device


class TensorVectorEnv(VectorWrapper):
    """A vector environment whose observations, rewards, flags and infos are tensors on a device, and that takes
    actions from there: `TensorVectorEnv(gym.make_vec("LEDE-Tiny-v0", num_envs=4096, backend="trace"))`.

    The arrays are made on the host and cross to the device once a step; at 4,096 environments that is a few hundred
    kilobytes. Infos keep their keys; `prompt_id`, which is text, stays an array. Rewards are float32, as agents want
    them. (Gymnasium's own `NumpyToTorch` takes no text.)
    """

    def __init__(self, envs: VectorEnv, device: str = "auto"):
        super().__init__(envs)
        self.device = resolve_device(device)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:  # type: ignore[override]
        observations, infos = self.env.reset(seed=seed, options=options)
        return self._put(observations), self._put(infos)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:  # type: ignore[override]
        observations, rewards, terminated, truncated, infos = self.env.step(actions.cpu().numpy())
        flags = self._put(terminated), self._put(truncated)
        return self._put(observations), self._put(rewards.astype(np.float32)), *flags, self._put(infos)

    def _put(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._put(each) for key, each in value.items()}
        if value.dtype == object:
            return value
        return torch.tensor(value, device=self.device)
