"""Scores of policies: against episodes and static settings, their scale, and the observation-limited reference."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest

from lede_env.data.trace_file import load_trace
from lede_env.engine.cost_model import load_cost_model
from lede_env.engine.signals import KNOWN_FEATURES
from lede_env.errors import LedeError
from lede_env.evaluation import (
    evaluate,
    evaluate_oracle,
    normalized_score,
    paired_bootstrap,
    static_result,
)
from lede_env.oracles import tabulate
from lede_env.policies import SHIPPED, MLPPolicy, RandomPolicy, StaticPolicy, ThresholdPolicy, load_policy
from lede_env.registration import ENVIRONMENTS
from tests.small_models import untrained_policy
from tests.small_traces import small_traces

EXIT, DRAFT = "LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"
THROUGHPUT = dict(reward="throughput", rho=1.3)
MDPS = [(EXIT, {}), (DRAFT, dict(reward="paper")), (DRAFT, THROUGHPUT)]


@pytest.fixture(scope="module")
def small(random_model, tmp_path_factory):
    return small_traces(random_model, tmp_path_factory.mktemp("traces"))


class Fixed:
    """Exits at layer e of L and drafts d tokens."""

    features = ("layer", "phase", "position")

    def __init__(self, e, d, n_layers, cap=12):
        self.e, self.d, self.n_layers, self.cap = e, d, n_layers, cap

    def exit_probability(self, observations):
        layer, phase, position = observations.T
        return np.where(phase == 1, layer * self.n_layers > self.e - 0.5, position * self.cap + 1.5 < self.d) * 1.0


@pytest.mark.parametrize(("env_id", "kwargs"), MDPS)
def test_an_evaluation_is_what_episodes_give(small, env_id, kwargs):
    env, policy = gym.make(env_id, **small.greedy, **kwargs).unwrapped, ThresholdPolicy({1: 0.2, 2: 0.2, 4: 0.15}, 6)
    score = evaluate(policy, env_id, **small.greedy, **kwargs)
    assert score.prompt_ids == tuple(f"p{n}" for n in range(6)) == tuple(env.prompt_ids)
    columns, infos = [env.features.index(name) for name in policy.features], []
    for index, name in enumerate(score.prompt_ids):
        observation, _ = env.reset(options={"prompt_id": name})
        total, over = 0.0, False
        while not over:
            action = int(policy.exit_probability(observation[None, columns])[0])
            observation, reward, terminated, truncated, info = env.step(action)
            infos.append(info)
            total, over = total + reward, terminated or truncated
        assert score.returns[index] == pytest.approx(total)
    ends = [info for info in infos if "exit_layer" in info]
    drafted = sum(info.get("drafted", 1) for info in ends)
    layers = sum(info["exit_layer"] * info.get("drafted", 1) for info in ends)
    values = score.J, score.E
    assert values == pytest.approx((score.returns.mean(), layers / drafted))
    assert len({info["exit_layer"] for info in ends}) == 3
    assert score.acceptance == pytest.approx(sum(info["accepted"] for info in ends) / drafted)
    if env_id == EXIT:
        assert score.d is score.tokens_per_round is score.modelled_speedup is None
        return
    emitted, rounds, cost = (sum(info[key] for info in ends) for key in ("emitted", "rounds", "cost"))
    ratios = score.d, score.tokens_per_round, score.modelled_speedup
    assert ratios == pytest.approx((drafted / rounds, emitted / rounds, emitted / cost))
    assert f"J {score.J:.3f}, normalised_score {score.normalised_score:.3f}" in str(score)


def test_fixed_settings_are_those_of_static_results(small):
    """Texts without an end of their own. (Drafts, a static result counts after a drafted end too.)"""
    trace, costs = load_trace(small.greedy["trace"]), load_cost_model(small.greedy["cost_model"])
    whole = [n for n in range(6) if not trace.ends[trace.starts[n + 1] - 1]]
    assert whole
    for candidate, e in enumerate((1, 2, 4)):
        texts = [trace.accepted[trace.starts[n] : trace.starts[n + 1] - 1, candidate] for n in whole]
        for d in (2, 5, 12):
            static = static_result(texts, e, d, costs)
            sums = evaluate(Fixed(e, d, 6), DRAFT, **small.greedy, **THROUGHPUT).per_prompt
            for mine, name in (("accepted", "accepted"), ("emitted", "tokens"), ("rounds", "rounds")):
                assert sums[mine][whole].sum() == pytest.approx(getattr(static, name))


@pytest.mark.parametrize("trace", ["greedy", "sampled"])
@pytest.mark.parametrize(("env_id", "kwargs"), MDPS)
def test_the_scale_of_scores(small, trace, env_id, kwargs):
    kwargs = getattr(small, trace) | kwargs
    random, static = (evaluate(policy, env_id, **kwargs) for policy in (RandomPolicy(), StaticPolicy(2, 6)))
    oracle = evaluate_oracle(env_id, **kwargs)
    assert random.normalised_score == pytest.approx(0.0) and oracle.normalised_score == pytest.approx(100.0)
    assert (static.J_random, static.J_oracle) == (random.J, oracle.J) and oracle.J > static.J
    assert normalized_score(env_id, static.J, **kwargs) == pytest.approx(static.normalised_score)
    scores = normalized_score(env_id, static.returns, **kwargs)
    assert scores.shape == (6,) and scores.mean() == pytest.approx(static.normalised_score)
    if env_id == DRAFT:
        assert evaluate(untrained_policy(small.lm), env_id, **kwargs).normalised_score < 100.0
        fastest = evaluate_oracle(env_id, goal="speedup", **kwargs)
        assert fastest.modelled_speedup >= max(each.modelled_speedup for each in (oracle, random, static)) - 1e-12


def test_a_reward_that_tells_nothing_has_no_score(small):
    nothing = dict.fromkeys(("accept", "depth", "reject", "continue_"), 0.0)
    assert math.isnan(evaluate(RandomPolicy(), EXIT, reward_kwargs=nothing, **small.greedy).normalised_score)


def test_prompts_are_those_of_task_and_split(small):
    with pytest.raises(LedeError, match="split 'train'"):
        evaluate(RandomPolicy(), EXIT, **small.greedy | dict(split="train"))


@pytest.mark.parametrize("env_id", [EXIT, DRAFT])
def test_the_reference_learns_what_can_be_seen(small, env_id):
    pytest.importorskip("sklearn", reason="the reference needs scikit-learn")
    from agents.reference_trees import fit_reference

    kwargs = small.sampled | ({} if env_id == EXIT else THROUGHPUT)
    score = evaluate(fit_reference(env_id, **kwargs), env_id, **kwargs)
    simple = [StaticPolicy(e, 6) if env_id == EXIT else Fixed(e, d, 6) for e in (1, 2, 4) for d in (2, 4)]
    scores = [evaluate(policy, env_id, **kwargs).normalised_score for policy in (*simple, RandomPolicy())]
    assert max(scores) < score.normalised_score < 100.0


SAMPLED = dict(temperature=0.6)


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [(EXIT, {}), (EXIT, SAMPLED), (DRAFT, {}), (DRAFT, dict(reward="throughput")), (DRAFT, SAMPLED)],
)
def test_nothing_beats_the_oracle_on_the_shipped_traces(env_id, kwargs):
    """Prompt by prompt: policies, the shipped agent, random decisions, and the optimum with some decisions changed."""
    features = KNOWN_FEATURES["draft" if env_id == DRAFT else "exit"]
    table = tabulate(gym.make(env_id, backend="trace", split="test", features=features, **kwargs))
    oracle, optimum, rng = table.oracle()["returns"], table.optimum(), np.random.default_rng(0)
    policies = [RandomPolicy(), StaticPolicy(4, 16)]
    policies += [ThresholdPolicy({3: p, 4: p, 6: p, 8: p}, 16) for p in (0.3, 0.9)]
    policies += [MLPPolicy.random(features, seed=seed) for seed in range(2)]
    policies += [load_policy(name) for name in SHIPPED] if env_id == DRAFT else []
    tries = [table.decisions(policy) for policy in policies]
    noise = rng.random(optimum.shape)
    tries += [noise, (noise < 0.5).astype(float), np.abs(optimum - (noise < 0.02))]
    for exits in tries:
        assert (table.play(exits)["returns"] <= oracle + 1e-9).all()
        assert (table.play(exits)["returns"] < oracle - 0.1).any()


@pytest.mark.parametrize("env_id", [EXIT, DRAFT])
def test_policies_of_other_models_are_refused(env_id):
    features = gym.make(env_id, backend="trace", features="extended").unwrapped.features
    with pytest.raises(LedeError, match="fingerprint"):
        evaluate(MLPPolicy.random(features), env_id)


@pytest.mark.parametrize(
    ("env_id", "one", "other"),
    [
        (EXIT, dict(task="code"), dict(task="lm")),
        (EXIT, dict(temperature=0.0), SAMPLED),
        (DRAFT, dict(task="code"), dict(task="lm")),
        (DRAFT, dict(cost_model="tiny-cpu"), dict(cost_model="tiny-h200")),
    ],
)
def test_splits_that_shift(env_id, one, other):
    """A policy of one environment can be judged in the other, and fares otherwise there."""
    more = dict(reward="throughput") if env_id == DRAFT else {}
    envs = [gym.make(env_id, backend="trace", **each, **more).unwrapped for each in (one, other)]
    assert envs[0].observation_space == envs[1].observation_space and envs[0].attributes != envs[1].attributes
    policy = ThresholdPolicy({3: 0.8, 4: 0.6, 6: 0.4, 8: 0.2}, 16)
    scores = [evaluate(policy, env_id, **each, **more) for each in (one, other)]
    assert abs(scores[0].J - scores[1].J) > 0.5


# What a policy must reach on the test prompts: above every static setting, below the clairvoyant.
@pytest.mark.parametrize("env_id", [name for name in ENVIRONMENTS if gym.spec(name).reward_threshold is not None])
def test_reward_thresholds_are_within_reach(env_id):
    threshold, config = gym.spec(env_id).reward_threshold, ENVIRONMENTS[env_id]
    table = tabulate(gym.make(env_id, backend="trace", split="test", features="extended"))
    depth = table.mdp.n_layers
    statics = [StaticPolicy(e, depth) for e in config.candidate_layers]
    if "Draft" in env_id:
        statics = [Fixed(e, d, depth) for e in config.candidate_layers[:2] for d in (4, 8, 12)]
    best = max(table.play(table.decisions(policy))["returns"].mean() for policy in statics)
    assert best < threshold < table.oracle()["returns"].mean()


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [name for name in ENVIRONMENTS if gym.spec(name).reward_threshold is not None])
def test_reward_thresholds_are_the_reference(env_id):
    from agents.reference_trees import fit_reference

    score = evaluate(fit_reference(env_id), env_id)
    assert gym.spec(env_id).reward_threshold == pytest.approx(score.J, rel=0.01)


# --- bootstrap


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    prompts = rng.normal(0.0, 50.0, 400)  # prompts differ far more than policies do
    a, b = prompts + 1.0 + rng.normal(0.0, 2.0, 400), prompts
    found = paired_bootstrap(a, b, resamples=2000)
    assert found.mean == pytest.approx((a - b).mean())
    error = (a - b).std() / 20  # of the mean of 400
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.mean < found.high and found.low > 0.0
    assert found == paired_bootstrap(a, b, resamples=2000)
    narrow = paired_bootstrap(a, b, resamples=2000, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high
    same = paired_bootstrap(a, a + 2.0, resamples=10)
    assert (same.mean, same.low, same.high) == pytest.approx((-2.0, -2.0, -2.0))


@pytest.mark.parametrize("values", [([1.0, 2.0], [1.0]), ([], []), ([[1.0]], [[1.0]])])
def test_pairs_are_pairs(values):
    with pytest.raises(LedeError, match="paired values have shapes"):
        paired_bootstrap(*map(np.array, values))
    with pytest.raises(LedeError, match="must lie in"):
        paired_bootstrap(np.ones(3), np.ones(3), confidence=1.5)


# --- bad input


class Wild(RandomPolicy):
    def exit_probability(self, observations):
        return np.full(len(observations), np.nan)


def test_bad_input(small):
    for env_id, change, message in (
        ("LEDE-Nowhere-v0", {}, "LEDE-Nowhere-v0"),
        (EXIT, {"capp": 3}, "unknown argument 'capp'"),
        (EXIT, {"trace": "nowhere.h5"}, r"nowhere\.h5: no such file"),
    ):
        for call in (lambda *a, **k: evaluate(RandomPolicy(), *a, **k), evaluate_oracle):
            with pytest.raises(LedeError, match=message):
                call(env_id, **small.greedy | change)
        with pytest.raises(LedeError, match=message):
            normalized_score(env_id, 0.0, **small.greedy | change)
    for env_id in (EXIT, DRAFT):
        for policy, message in (
            (Wild(), "Wild.exit_probability gave"),
            (StaticPolicy(3, 6), "exits at layer 3"),
            (MLPPolicy.random(("top1", "layer")), "fingerprint"),
            (untrained_policy(small.lm, candidate_layers=(1, 4)), r"candidate layers \(1, 4\)|on the draft MDP"),
        ):
            with pytest.raises(LedeError, match=message):
                evaluate(policy, env_id, **small.greedy)
    with pytest.raises(LedeError, match="trained on the draft MDP, but this is the exit MDP"):
        evaluate(untrained_policy(small.lm), EXIT, **small.greedy)
    with pytest.raises(LedeError, match="phase"):
        evaluate(Fixed(1, 2, 6), EXIT, **small.greedy)
    for env_id, goal in ((EXIT, "speedup"), (DRAFT, "fame")):
        with pytest.raises(LedeError, match=f"goal='{goal}'"):
            evaluate_oracle(env_id, goal=goal, **small.greedy)
