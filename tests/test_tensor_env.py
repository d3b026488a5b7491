"""Tensors in and out: the same steps as with arrays."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import lede_env
from lede_env.errors import LedeError


def assert_same(tensors, arrays):
    if isinstance(arrays, dict):
        assert tensors.keys() == arrays.keys()
        for key, value in arrays.items():
            assert_same(tensors[key], value)
    elif arrays.dtype == object:
        assert (tensors == arrays).all()
    else:
        assert tensors.device.type == "cpu"
        np.testing.assert_allclose(tensors.numpy(), arrays, rtol=1e-6)


@pytest.mark.parametrize("env_id", ["LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"])
def test_tensors_hold_what_arrays_hold(env_id):
    made = dict(num_envs=16, backend="trace", task="parse", max_new_tokens=6)
    arrays, tensors = gym.make_vec(env_id, **made), lede_env.TensorVectorEnv(gym.make_vec(env_id, **made), "cpu")
    for one, other in zip(tensors.reset(seed=0), arrays.reset(seed=0), strict=True):
        assert_same(one, other)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(40):
        actions = rng.integers(2, size=16)
        mine, others = tensors.step(torch.tensor(actions)), arrays.step(actions)
        for one, other in zip(mine, others, strict=True):
            assert_same(one, other)
        assert mine[0].dtype == mine[1].dtype == torch.float32 and mine[2].dtype == torch.bool
        ends += int(mine[3].sum())
    assert ends


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_refused():
    with pytest.raises(LedeError, match="device='cuda' was asked for"):
        lede_env.TensorVectorEnv(gym.make_vec("LEDE-Tiny-v0", num_envs=2, backend="trace"), "cuda")
