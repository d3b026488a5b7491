"""What-if search: a forked environment goes its own way, and the same way when it does the same."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from lede_env.errors import LedeError
from tests.small_traces import small_traces

IDS = ["LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"]


@pytest.fixture(scope="module")
def traces(random_model, tmp_path_factory):
    return small_traces(random_model, tmp_path_factory.mktemp("traces"))


def play(env, actions):
    """Everything that some steps return, as text; an episode that ends is followed by the next."""
    seen = []
    for action in actions:
        outcome = env.step(action)
        seen.append([np.asarray(outcome[0]).tolist(), *outcome[1:]])
        if outcome[2] or outcome[3]:
            observation, info = env.reset()
            seen.append([observation.tolist(), info])
    return repr(seen)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("episode", ["prompt", "part"])
@pytest.mark.parametrize("start", [0, 3, 40])
def test_a_fork_diverges_alone_and_agrees_on_the_same_actions(traces, env_id, episode, start):
    part = "round" if "Draft" in env_id else "token"
    env = gym.make(env_id, **traces.sampled, episode=part if episode == "part" else "prompt").unwrapped
    env.reset(seed=1)
    rng = np.random.default_rng(0)
    play(env, rng.integers(2, size=start))
    path, other = rng.integers(2, size=200), rng.integers(2, size=200)
    first, second, third = env.fork(), env.fork(), env.fork()
    strayed = play(first, other)
    expected = play(env, path)
    assert play(second, path) == expected != strayed
    assert play(third.fork(), path) == expected
    assert play(third, other) == strayed


@pytest.mark.parametrize("env_id", IDS)
def test_a_fork_has_its_own_generators(traces, env_id):
    env = gym.make(env_id, **traces.greedy).unwrapped
    env.reset(seed=1)
    env.action_space.seed(0)
    twin = env.fork()
    drawn = twin.np_random.random(), [int(twin.action_space.sample()) for _ in range(20)]
    assert drawn == (env.np_random.random(), [int(env.action_space.sample()) for _ in range(20)])
    twin.reset(seed=2)
    assert env.np_random_seed == 1


@pytest.mark.parametrize("env_id", IDS)
def test_vector_environments_fork_too(traces, env_id):
    envs = gym.make_vec(env_id, num_envs=5, **traces.sampled).unwrapped
    envs.reset(seed=3)
    actions = np.random.default_rng(0).integers(2, size=(60, 5))
    twin, stray = envs.fork(), envs.fork()
    for row in 1 - actions:
        stray.step(row)
    for row in actions:
        one, other = envs.step(row), twin.step(row)
        for left, right in zip(one[:4], other[:4], strict=True):
            np.testing.assert_array_equal(left, right)
        assert one[4]["prompt_id"].tolist() == other[4]["prompt_id"].tolist()


@pytest.mark.parametrize("env_id", IDS)
def test_a_fork_before_the_first_reset(traces, env_id):
    twin = gym.make(env_id, **traces.greedy).unwrapped.fork()
    with pytest.raises(LedeError, match="reset"):
        twin.step(0)


@pytest.mark.parametrize("env_id", IDS)
def test_live_environments_refuse(env_id):
    env = gym.make(env_id, task="parse", max_new_tokens=4, device="cpu").unwrapped
    with pytest.raises(LedeError, match=r"cannot be forked.*backend='trace'"):
        env.fork()
