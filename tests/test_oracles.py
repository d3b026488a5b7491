"""Exact values and optima on traces, against the environments themselves: every path, and episodes played."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from lede_env.errors import LedeError
from lede_env.oracles import tabulate
from lede_env.policies import MLPPolicy, Oracle, RandomPolicy, ThresholdPolicy
from tests.small_traces import small_traces

EXIT, DRAFT = "LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"
PROMPTS = [f"p{n}" for n in range(6)]
PAPER, THROUGHPUT = dict(reward="paper"), dict(reward="throughput", rho=1.3)
# Small enough for every path there is.
TINY = [
    (EXIT, dict(max_new_tokens=4)),
    (EXIT, dict(max_new_tokens=3, reward_kwargs={"reject": 0.5, "continue_": 0.2})),
    (DRAFT, PAPER | dict(max_new_tokens=5, cap=3)),
    (DRAFT, THROUGHPUT | dict(max_new_tokens=6, cap=2)),
    (DRAFT, THROUGHPUT | dict(max_new_tokens=4, cap=1)),
    (DRAFT, PAPER | dict(max_new_tokens=2)),
]


@pytest.fixture(scope="module")
def small(random_model, tmp_path_factory):
    return small_traces(random_model, tmp_path_factory.mktemp("traces"))


@pytest.fixture(params=["greedy", "sampled"])
def pinned(request, small):
    return getattr(small, request.param)


def make(env_id, *settings):
    return gym.make(env_id, **{key: value for each in settings for key, value in each.items()}).unwrapped


def seed_of(env, prompt_id, sample):
    """A seed that has the environment play this sample of the prompt."""
    for seed in range(1000):
        env.reset(seed=seed, options={"prompt_id": prompt_id})
        trace = env._table.trace
        if env._table.base[0] == trace.starts[trace.prompt_ids.index(prompt_id) * trace.header.samples + sample]:
            return seed
    raise AssertionError("no seed found")


def texts_of(env):
    """A seed and a prompt for each text the environment has, in the order of the tables."""
    return [(seed_of(env, name, s), name) for name in PROMPTS for s in range(env._table.trace.header.samples)]


def sums_of(infos):
    """What the tables sum, of the infos of one episode's steps."""
    if "rounds" in infos[-1]:
        verified = [info for info in infos if "rounds" in info]
        sums = {key: sum(info[key] for info in verified) for key in ("drafted", "accepted", "rounds", "emitted")}
        layers = sum(info["exit_layer"] * info["drafted"] for info in verified)
        return sums | {"exit_layers": layers, "cost": sum(info["cost"] for info in infos), "decisions": len(infos)}
    exits = [info for info in infos if "exit_layer" in info]
    right = sum(info["accepted"] for info in exits)
    return {"drafted": len(exits), "accepted": right, "exit_layers": sum(info["exit_layer"] for info in exits)}


def play(env, act, seed, prompt_id):
    """Totals of one episode; `act` takes an observation and an info."""
    observation, info = env.reset(seed=seed, options={"prompt_id": prompt_id})
    infos, total, over = [], 0.0, False
    while not over:
        observation, reward, terminated, truncated, info = env.step(act(observation, info))
        infos.append(info)
        total, over = total + reward, terminated or truncated
    return sums_of(infos) | {"returns": total}


def paths(env, seed, prompt_id, policy, prefix=()):
    """(return, probability under a policy) of every sequence of actions that begins with `prefix`."""
    observation, _ = env.reset(seed=seed, options={"prompt_id": prompt_id})
    total, chance, over, actions = 0.0, 1.0, False, list(prefix)
    columns = [env.features.index(name) for name in policy.features]
    step = 0
    while not over:
        exits = policy.exit_probability(observation[None, columns])[0]
        if step == len(actions):
            yield from paths(env, seed, prompt_id, policy, (*actions, 1))
            yield from paths(env, seed, prompt_id, policy, (*actions, 0))
            return
        chance *= exits if actions[step] else 1.0 - exits
        observation, reward, terminated, truncated, _ = env.step(actions[step])
        total, over, step = total + reward, terminated or truncated, step + 1
    yield total, chance


def recorded_coins(env):
    """The table, with the drafts' coins as they fell: what can be played is one outcome of the expectation."""
    table = tabulate(env)
    if hasattr(table, "chance"):
        table.chance = table.backend.trace.accepted[table.texts.rows].astype(float)
    return table


class Soft:
    """Exits with a probability that depends on what it sees."""

    features = ("top1", "layer")

    def exit_probability(self, observations):
        return 0.1 + 0.8 * np.exp(-observations.sum(1).astype(float))


# --- exhaustive search


@pytest.mark.parametrize(("env_id", "kwargs"), TINY)
def test_optimum_and_values_match_exhaustive_search(pinned, env_id, kwargs):
    env = make(env_id, pinned, kwargs)
    table, policy, samples = recorded_coins(env), Soft(), env._table.trace.header.samples
    found = [list(paths(env, seed, name, policy)) for seed, name in texts_of(env)]
    best = [max(total for total, _ in all_paths) for all_paths in found]
    expected = [sum(total * chance for total, chance in all_paths) for all_paths in found]
    assert all(sum(chance for _, chance in all_paths) == pytest.approx(1.0) for all_paths in found)
    assert sum(map(len, found)) > 2 * len(found)
    for values, totals in ((best, table.oracle()), (expected, table.play(table.decisions(policy)))):
        np.testing.assert_allclose(totals["returns"], np.reshape(values, (6, samples)).mean(1), rtol=1e-9)


@pytest.mark.parametrize(("env_id", "kwargs"), TINY)
def test_the_oracle_is_optimal_wherever_it_is_put(pinned, env_id, kwargs):
    env = make(env_id, pinned, kwargs)
    oracle, rng = Oracle(env), np.random.default_rng(0)
    for seed, name in texts_of(env)[:7]:
        for length in (0, 1, 2, 4):
            prefix, over, total = [], False, 0.0
            _, info = env.reset(seed=seed, options={"prompt_id": name})
            while not over:
                action = int(rng.random() < 0.6) if len(prefix) < length else oracle.act(info)
                prefix += [action] if len(prefix) < length else []
                _, reward, terminated, truncated, info = env.step(action)
                total, over = total + reward, terminated or truncated
            assert total == pytest.approx(max(value for value, _ in paths(env, seed, name, RandomPolicy(), prefix)))


# --- episodes


@pytest.mark.parametrize(("env_id", "kwargs"), [(EXIT, {}), (DRAFT, PAPER), (DRAFT, THROUGHPUT | dict(cap=5))])
def test_values_are_those_of_episodes(pinned, env_id, kwargs):
    """Deterministic policies, every total; budgets up to and below the recorded one."""
    for tokens in (24, 17):
        env = make(env_id, pinned, kwargs, dict(max_new_tokens=tokens))
        table = recorded_coins(env)
        policies = [MLPPolicy.random(env.features, seed=seed) for seed in range(6)]
        policies += [ThresholdPolicy({1: a, 2: b, 4: 0.1}, 6) for a, b in ((0.2, 0.15), (0.3, 1.0))]
        texts, samples = texts_of(env), env._table.trace.header.samples
        for policy in policies:
            totals = table.play(table.decisions(policy))
            columns = [env.features.index(name) for name in policy.features]
            act = lambda seen, _, p=policy, c=columns: int(p.exit_probability(seen[None, c])[0])  # noqa: E731
            played = [play(env, act, seed, name) for seed, name in texts]
            assert totals.keys() == played[0].keys()
            for key, values in totals.items():
                expected = np.reshape([each[key] for each in played], (6, samples)).mean(1)
                np.testing.assert_allclose(values, expected, rtol=1e-9, err_msg=key)


@pytest.mark.parametrize(("env_id", "kwargs"), [(EXIT, {}), (DRAFT, THROUGHPUT)])
def test_values_of_coins_are_means_of_episodes(small, env_id, kwargs):
    envs = gym.make_vec(env_id, num_envs=600, autoreset_mode="Disabled", **small.greedy, **kwargs)
    table, policy, rng = tabulate(envs), RandomPolicy(0.8), np.random.default_rng(0)
    envs.reset(seed=0, options={"prompt_ids": PROMPTS * 100})
    returns, over = np.zeros(600), np.zeros(600, bool)
    while not over.all():
        _, rewards, terminated, truncated, _ = envs.step((rng.random(600) < policy.p).astype(int))
        returns, over = returns + rewards, over | terminated | truncated
    returns = returns.reshape(100, 6)
    error = returns.std(0) / 10
    assert (error > 0).all()
    assert (np.abs(table.play(table.decisions(policy))["returns"] - returns.mean(0)) < 4 * error).all()


@pytest.mark.parametrize(("env_id", "kwargs"), [(EXIT, {}), (DRAFT, PAPER)])
def test_a_vector_environment_is_played_by_its_infos(pinned, env_id, kwargs):
    envs = gym.make_vec(env_id, num_envs=12, **pinned, **kwargs)
    oracle, table = Oracle(envs), recorded_coins(envs)
    table.texts = replace(table.texts, samples=1)  # of each text, not means
    best = table.play(table.optimum())["returns"]
    returns, ended = np.zeros(12), 0
    _, infos = envs.reset(seed=0)
    for _ in range(200):
        texts, _ = table.texts.place(envs._table.base, 0)
        _, rewards, terminated, truncated, infos = envs.step(oracle.act(infos))
        over, returns = terminated | truncated, returns + rewards
        np.testing.assert_allclose(returns[over], best[texts[over]])
        returns[over], ended = 0.0, ended + over.sum()
    assert ended > 12


# --- bounds


def test_coins_are_expected_over(small):
    """The exit MDP at a temperature: policies and the clairvoyant, against many uniforms shared by the layers."""
    table = tabulate(make(EXIT, small.sampled))
    assert ((table.chance > 0.0) & (table.chance < 1.0)).any()
    uniforms = (np.arange(2000) + 0.5) / 2000
    exits, best, mean = table.decisions(Soft()), 0.0, 0.0
    chance = table.chance
    for u in uniforms:
        table.chance = (u < chance).astype(float)
        mean = mean + table.play(exits)["returns"] / 2000
        value = np.where(u < chance, table.if_accepted, table.if_rejected).max(-1)
        best = best + table.texts.per_prompt((value * table.texts.there).sum(1)) / 2000
    table.chance = chance
    np.testing.assert_allclose(table.play(exits)["returns"], mean, atol=0.02)
    np.testing.assert_allclose(table.oracle()["returns"], best, atol=0.02)


@pytest.mark.parametrize(("env_id", "kwargs"), [(EXIT, {}), (DRAFT, PAPER), (DRAFT, THROUGHPUT)])
def test_nothing_beats_the_oracle(pinned, env_id, kwargs):
    """Random decisions, random policies, and the optimum with some decisions changed."""
    table, rng = tabulate(make(env_id, pinned, kwargs)), np.random.default_rng(0)
    oracle, optimum = table.oracle()["returns"], table.optimum()
    for _ in range(60):
        noise = rng.random(optimum.shape)
        tries = (noise < rng.random(), np.abs(optimum - (noise < 0.03)), noise)
        for exits in tries:
            assert (table.play(exits.astype(float))["returns"] <= oracle + 1e-9).all()
    for seed in range(10):
        policy = MLPPolicy.random(table.mdp.features, seed=seed)
        assert (table.play(table.decisions(policy))["returns"] <= oracle + 1e-9).all()


def test_the_text_is_the_same_whatever_is_decided(pinned):
    """So that every rho ranks policies alike, and the highest return is the highest speedup."""
    slow, fast = (tabulate(make(DRAFT, pinned, dict(reward="throughput", rho=rho))) for rho in (0.7, 3.0))
    tokens = slow.texts.per_prompt(slow.texts.there.sum(1).astype(float))
    for totals in (slow.oracle(), fast.oracle(), slow.fastest(), slow.play(slow.decisions(Soft()))):
        np.testing.assert_allclose(totals["emitted"], tokens)
    np.testing.assert_allclose(slow.oracle()["cost"], fast.oracle()["cost"])
    np.testing.assert_allclose(fast.oracle()["returns"], (fast.fastest()["emitted"] - 3.0 * fast.fastest()["cost"]))


def test_environments_without_a_trace_have_no_oracle(small):
    for env in (gym.make("CartPole-v1"), None):
        with pytest.raises(LedeError, match="no environment on a trace"):
            Oracle(env)
