"""The policies behind the datasets: exact advantages, and a learner whose blocks are the dataset medium-replay."""

from __future__ import annotations

import numpy as np
import pytest

from agents.advantages import draft_questions
from agents.collectors import (
    Args,
    best_static,
    make_collectors,
    states_of,
    tokens_emitted,
    train_replay,
)
from lede_env.data.dataset import read_dataset
from lede_env.offline import tiers
from lede_env.offline.making import make
from lede_env.offline.scoring import Bench
from lede_env.offline.tiers import PROBLEMS, Collectors, recipe_of, static_policy
from lede_env.oracles import ExitTable
from lede_env.policies import MLPPolicy, RandomPolicy
from lede_env.recording import make_player_envs, play, policy_act


@pytest.fixture(scope="module", params=["tiny", "tiny-draft"])
def problem(request):
    return PROBLEMS[request.param]


@pytest.fixture(scope="module")
def bench(problem):
    return Bench.of(problem, "validation")


def test_the_best_static_setting_is_the_best(bench):
    best = bench.returns(static_policy(best_static(bench))).mean()
    draft = bench.env.attributes["mdp"] == "draft"
    others = [{"layer": layer, **({"speculation": 5, "cap": 12} if draft else {})} for layer in (3, 4, 6, 8)]
    assert all(bench.returns(static_policy(setting)).mean() <= best for setting in others)


def test_exiting_where_it_has_an_advantage_earns_more(bench):
    """One step of policy iteration with the advantages themselves, which know what no policy observes."""
    table, policy = bench.table, static_policy(best_static(bench))
    states = states_of(table, policy)
    assert len(states.observations) == len(states.advantage) == len(states.visited)
    if isinstance(table, ExitTable):
        places = [(np.s_[..., c], table.texts.there) for c in range(table.chance.shape[-1] - 1)]
        exits = np.zeros(table.chance.shape)
    else:
        places = [(np.s_[..., k - 1], asked) for k, asked in draft_questions(table)]
        exits = np.zeros(table.nodes.shape)
    begin = 0
    for place, asked in places:
        exits[place][asked] = states.advantage[begin : begin + asked.sum()] > 0
        begin += asked.sum()
    assert begin == len(states.advantage)
    known = bench.score(table.play(exits)["returns"])
    assert bench.score(bench.returns(policy)) + 10 < known <= 100


def test_advantages_are_what_a_decision_is_worth():
    """On the exit MDP, token by token: those at the first candidate add up to the difference that it makes."""
    bench = Bench.of(PROBLEMS["tiny"], "validation")
    states = states_of(bench.table, static_policy({"layer": 6}))
    exits = np.zeros(bench.table.chance.shape)
    exits[..., 2:] = 1.0
    leaving, going = exits.copy(), exits.copy()
    leaving[..., 0] = 1.0
    difference = sum(bench.table.play(leaving)["returns"] - bench.table.play(going)["returns"])
    assert states.advantage[: bench.table.texts.there.sum()].sum() == pytest.approx(difference)


def test_tokens_emitted_add_up_to_the_text(problem):
    envs = make_player_envs(problem.env_id, 16, **problem.env_kwargs)
    act = policy_act(RandomPolicy(), envs.unwrapped.features, 0)
    most = envs.unwrapped.attributes["max_new_tokens"]
    for _, episode in play(envs, act, range(16), 0):
        total = tokens_emitted(episode, most).sum()
        if episode.timeouts[-1]:
            assert total == most
        else:
            assert 0 < total <= most + 1


def test_the_learners_episodes_are_the_dataset(tmp_path, problem, monkeypatch):
    """Few and small networks: what is made from them is what they were trained on, and no other prompt was."""
    args = Args(out=tmp_path, iterations=1, updates=30, hidden=(8,), block=6, blocks=3, exit_updates=5, draft_updates=5)
    scores = iter([0, 0, 1])  # of the blocks
    monkeypatch.setattr("agents.collectors.score_of", lambda *_: next(scores))
    checkpoints = list(train_replay(args, problem, Bench.of(problem, "validation"), 0.5))
    assert [round(epsilon, 4) for epsilon, _, _ in checkpoints] == [1.0, 0.8875, 0.775]
    assert all(isinstance(policy, MLPPolicy) for _, _, policy in checkpoints)
    assert not np.array_equal(checkpoints[1][2].weights[0], checkpoints[2][2].weights[0])

    scores = iter([0, 2, 0, 0, 1])  # of static, expert, blocks
    some = {"layer": 4} if problem.mdp == "exit" else {"layer": 4, "speculation": 5, "cap": 12}
    monkeypatch.setattr("agents.collectors.best_static", lambda bench: some)  # tested above
    values = make_collectors(args, problem, lambda line: None)
    assert values["block"] == 6 and len(values["replay_epsilons"]) == 2
    monkeypatch.setattr(tiers, "COLLECTORS", tmp_path)
    Collectors.of.cache_clear()
    try:
        recipe = recipe_of(f"{next(name for name in PROBLEMS if PROBLEMS[name] is problem)}/medium-replay-v0")
        dataset = read_dataset(make(recipe, tmp_path / "replay.h5"))
    finally:
        Collectors.of.cache_clear()
    assert dataset.n_episodes == 12
    mean = dataset.take(range(6)).split()["train"]["observations"].mean(0, dtype=np.float64)
    np.testing.assert_allclose(recipe.behaviours[1].policy.mean, mean, rtol=1e-5)  # the learner's normaliser
