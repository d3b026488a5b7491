"""Agents on d3rlpy: the batches against its own, every export against its own decisions, FQE against the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("d3rlpy")

from agents import d3rlpy_offline, nstep_dqn
from agents.bars import Thresholds
from agents.d3rlpy_offline import GAMMA, batch, import_d3rlpy
from agents.decision_transformer import DecisionTransformer, token_walks
from agents.fqe import exact_value, first_rows, fitted_value, token_values
from agents.judge import judge
from agents.noisy_network import forward
from agents.nstep_dqn import Args, Learner, NStepDQN
from agents.task import Task, linear_layers
from benchmarks.rl_statistics import bootstrap
from lede_env.data.dataset import Dataset
from lede_env.policies import MaskedMLPPolicy, RandomPolicy, load_policy
from tests.small_tasks import log_random, small_task

ALGORITHMS = [name for name in vars(d3rlpy_offline) if hasattr(getattr(d3rlpy_offline, name), "config")]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return log_random(tmp_path_factory.mktemp("log"))


@pytest.fixture
def task(log) -> Task:
    return small_task(log)


def test_batches_are_d3rlpys_own(task):
    dataset = import_d3rlpy().dataset
    buffer = task.dataset.select(task.features).to_d3rlpy(boundary="token")
    theirs = [buffer.transition_picker(e, i) for e in buffer.episodes for i in range(e.transition_count)]
    assert len(theirs) == len(task.dataset)
    rows = np.random.default_rng(0).integers(len(theirs), size=500)
    ours, expected = batch(task, rows), dataset.TransitionMiniBatch.from_transitions([theirs[i] for i in rows])
    for name in ("observations", "actions", "rewards", "terminals", "intervals"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)
    goes_on = ours.terminals[:, 0] == 0
    np.testing.assert_array_equal(ours.next_observations[goes_on], expected.next_observations[goes_on])
    assert 0 < goes_on.sum() < len(rows)


def test_walks_are_d3rlpys_own(task):
    dataset = import_d3rlpy().dataset
    buffer, walks = task.dataset.select(task.features).to_d3rlpy(boundary="token"), token_walks(task)
    size = walks["masks"].shape[1]
    some = np.arange(0, len(buffer.episodes), 7)
    pieces = [buffer.trajectory_slicer(buffer.episodes[i], buffer.episodes[i].size() - 1, size) for i in some]
    expected = dataset.TrajectoryMiniBatch.from_partial_trajectories(pieces)
    for name, column in walks.items():
        np.testing.assert_allclose(column[some], getattr(expected, name), rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ALGORITHMS[1:])
def test_the_exported_policy_decides_as_the_algorithm(task, tmp_path, name):
    agent = getattr(d3rlpy_offline, name)(**getattr(d3rlpy_offline, name).grid[0])
    policy = load_policy(agent.train(task).save(tmp_path))
    x = task.transitions["observations"]
    theirs = agent.algorithm.predict(x)
    assert (policy.exit_probability(x) == theirs).mean() > 0.999  # ties within rounding
    assert isinstance(policy, MaskedMLPPolicy) == (name == "BCQ")


def test_one_seed_is_one_policy(task):
    weights = [d3rlpy_offline.DQN().train(replace(task, seed=seed)).weights[0] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_the_decision_transformer_plays_the_whole_table(task):
    policy = DecisionTransformer().train(task)
    table = task.table("validation")
    exits = policy.decisions(table)
    assert exits.shape == table.chance.shape and set(np.unique(exits)) <= {0.0, 1.0}
    played = judge(policy, task.env_id, "validation", task.env_kwargs)
    np.testing.assert_allclose(played.returns, table.play(exits)["returns"])


def test_exact_values_are_those_of_played_tokens(task):
    """At gamma = 1 a text's token values add up to its return; at 0 only an exit at the first candidate pays."""
    table = task.table()
    for policy in (RandomPolicy(0.3), Thresholds(quantiles=9).train(task)):
        exits = table.decisions(policy)
        total = np.where(table.texts.there, token_values(table, exits, 1.0), 0.0).sum(1)
        np.testing.assert_allclose(total, table.play(exits)["returns"])
    now = token_values(table, np.ones(table.chance.shape), 0.0)
    right = table.chance[..., 0]
    np.testing.assert_allclose(now, right * table.if_accepted[0] + (1 - right) * table.if_rejected[0])


def test_fqe_comes_near_the_truth(task):
    agent = d3rlpy_offline.BC()
    policy = agent.train(replace(task, updates=100))
    error = fitted_value(agent, task, updates=600) - exact_value(policy, task)
    rewards = task.transitions["rewards"]
    assert abs(error) < 0.2 * rewards.std()
    assert len(first_rows(task)) == (task.dataset["discount"] == 0).sum()


def same_steps(task: Task, updates: int) -> tuple[np.ndarray, np.ndarray]:
    """Q-values (N, 2) of the hand-written DQN and of d3rlpy's after updates on the same batches, from the same weights.

    Without noise, and without what is ours alone: the two rules for the last candidate.
    """
    every, rate = 4, 1e-3
    scaled = {
        "rewards": task.dataset["rewards"] * np.float32(d3rlpy_offline.REWARD_SCALE),  # its loss is quadratic up to 1
        "forced": np.zeros(len(task.dataset), bool),
    }
    data = Dataset(task.dataset.arrays | scaled, task.attributes, task.dataset.prompt_ids, len(task.dataset))
    task = replace(task, dataset=data)

    d3rlpy = import_d3rlpy()
    d3rlpy.seed(0)
    settings = {name: value for name, value in d3rlpy_offline.scalers(task).items() if name == "observation_scaler"}
    encoder = d3rlpy.models.encoders.VectorEncoderFactory(hidden_units=d3rlpy_offline.HIDDEN)
    theirs = d3rlpy.algos.DQNConfig(
        learning_rate=rate, gamma=GAMMA, target_update_interval=every, encoder_factory=encoder, **settings
    ).create()
    theirs.create_impl((len(task.features),), 2)

    args = Args(features=task.features, sigma=0.0, n_step=1, gamma=GAMMA, learning_rate=rate, target_every=every)
    learner = Learner(args, task.attributes["features"], task.attributes)
    learner.before_last = 0
    means = learner.network.layers(learner.network.parameters[0])
    for layer, weight, bias in zip(means, *linear_layers(theirs.impl.modules.q_funcs[0]), strict=True):
        layer[:-1], layer[-1] = weight.T, bias
    learner.start(task.dataset)
    learner.network.noise = lambda rng: np.zeros_like(learner.network.parameters[0])
    learner.updates = every - 1  # d3rlpy copies into its target after the first update, then after every 4th
    rng, buffer = np.random.default_rng(0), learner.buffer
    for _ in range(updates):
        rows = rng.integers(len(data), size=64)
        buffer.sample = lambda count, rng, rows=rows: {name: array[rows] for name, array in buffer.arrays.items()}
        learner.update(1)
        theirs.update(batch(task, rows))
    x = task.transitions["observations"]
    q = [theirs.predict_value(x, np.full(len(x), action)) for action in (0, 1)]
    ours, _ = forward(means, learner.observe(data["observations"]))
    return ours, np.stack(q, axis=1)


def test_the_hand_written_dqn_takes_d3rlpys_steps(task, monkeypatch):
    """Targets, loss, gradient, Adam and target copies in one. (Rounding grows: after 100 updates it is a tenth.)"""
    ours, theirs = same_steps(task, 12)
    np.testing.assert_allclose(ours, theirs, atol=0.01 * theirs.std())
    targets = nstep_dqn.n_step_targets
    for discount in (0.0, 1.0):  # never bootstrapping, or beyond the token, is found out
        monkeypatch.setattr(
            nstep_dqn, "n_step_targets", lambda r, d, *rest, to=discount: targets(r, np.full_like(d, to), *rest)
        )
        wrong, _ = same_steps(task, 12)
        assert np.abs(wrong - theirs).max() > 0.2 * theirs.std()


def test_the_hand_written_dqn_agrees_with_d3rlpys(log):
    """Same data, seeds and number of transitions learned from, n = 1: the intervals of their scores overlap."""
    intervals = {}
    for name, agent in (("ours", NStepDQN(n_step=1, gamma=GAMMA)), ("theirs", d3rlpy_offline.DQN(1e-3))):
        scores = []
        for seed in (1, 2, 3):
            task = small_task(log, seed=seed, updates=400)
            scores.append(judge(agent.train(task), task.env_id, "validation", task.env_kwargs).normalised_score)
        intervals[name] = bootstrap(np.array([scores]))
    (low, high), (other_low, other_high) = intervals.values()
    assert low <= other_high and other_low <= high, intervals
