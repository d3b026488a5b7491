"""Agents on Stable-Baselines3: the adapter against the environment, every export against its algorithm's decisions."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("sb3_contrib")

from agents import sb3_online
from agents.sb3_online import SB3VecEnv
from lede_env.policies import load_policy
from tests.small_tasks import ENV_KWARGS, log_random, small_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return small_task(log_random(tmp_path_factory.mktemp("log")), updates=200)


def test_the_adapter_shows_the_environment_normalised(task):
    kwargs = dict(num_envs=4, backend="trace", features=task.features, episode="token", **ENV_KWARGS)
    mean, std = task.normaliser
    envs, adapted = gym.make_vec("LEDE-Tiny-v0", **kwargs), SB3VecEnv(gym.make_vec("LEDE-Tiny-v0", **kwargs), mean, std)
    adapted.seed(7)
    observations, _ = envs.reset(seed=7)
    np.testing.assert_allclose(adapted.reset(), (observations - mean) / std, rtol=1e-5, atol=1e-5)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(60):
        actions = rng.integers(2, size=4)
        observations, rewards, terminated, truncated, info = envs.step(actions)
        seen, paid, done, infos = adapted.step(actions)
        np.testing.assert_allclose(seen, (observations - mean) / std, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(paid, rewards, rtol=1e-6)
        np.testing.assert_array_equal(done, terminated | truncated)
        for lane in np.flatnonzero(done):
            final = (info["final_obs"][lane] - mean) / std
            np.testing.assert_allclose(infos[lane]["terminal_observation"], final, rtol=1e-5, atol=1e-5)
            assert not infos[lane]["TimeLimit.truncated"]
        ended += done.sum()
    assert ended > 60


@pytest.mark.parametrize("name", ["DQN", "QRDQN", "PPO"])
def test_the_exported_policy_decides_as_the_algorithm(task, tmp_path, monkeypatch, name):
    kind, made = getattr(sb3_online, name), []
    original = kind.algorithm
    monkeypatch.setattr(kind, "algorithm", lambda self, *args: made.append(original(self, *args)) or made[-1])
    policy = load_policy(kind().train(task).save(tmp_path))
    x, (mean, std) = task.transitions["observations"], task.normaliser
    theirs, _ = made[0].predict((x - mean) / std, deterministic=True)
    assert (policy.exit_probability(x) == theirs).mean() > 0.999  # ties within rounding
    assert made[0].num_timesteps >= sb3_online.STEPS * task.updates
