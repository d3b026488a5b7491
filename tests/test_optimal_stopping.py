"""The agent's arrays against the environment itself, and its advantages against playing on."""

from __future__ import annotations

import numpy as np
import pytest

from agents.optimal_stopping import Args, Rounds, train
from lede_env.data.trace_file import load_trace
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import load_cost_model
from lede_env.engine.round import DRAFT_CAP
from lede_env.engine.signals import DRAFT_FEATURES
from lede_env.envs.draft_env import SpeculativeDraftEnv
from lede_env.models.loading import load_model
from lede_env.policies import EXIT
from lede_env.tasks import load_prompts
from lede_env.tracing import record_trace

LAYERS, TOKENS = (3, 4, 8), 24
COSTS = load_cost_model("tiny-cpu")


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The embedded model on a few prompts, greedy and sampled."""
    folder, lm = tmp_path_factory.mktemp("traces"), load_model("tiny", device="cpu")
    prompts = [p for split in ("train", "validation") for p in load_prompts("parse", split)[:3]]
    files = []
    for temperature in (0.0, 0.6):
        files.append(folder / f"{temperature}.h5")
        record_trace(lm, prompts, LAYERS, TOKENS, Sampling(temperature), 0).save(files[-1])
    return files


def play(trace_file, temperature, choose):
    """(tokens, cost) of all training prompts in the environment, acting by `choose(observation)`."""
    env = SpeculativeDraftEnv(
        model="tiny", backend="trace", trace=str(trace_file), task="parse", split="train", candidate_layers=LAYERS,
        temperature=temperature, max_new_tokens=TOKENS, features=DRAFT_FEATURES, reward="throughput", rho=1.5,
        cost_model="tiny-cpu",
    )  # fmt: skip
    tokens = cost = 0.0
    for name in env.unwrapped.prompt_ids:
        observation, info = env.reset(seed=0, options={"prompt_id": name})
        over = False
        while not over:
            observation, _, terminated, truncated, info = env.step(choose(observation))
            over = terminated or truncated
            if "emitted" in info:
                tokens, cost = tokens + info["emitted"], cost + info["cost"]
    return tokens, cost


@pytest.mark.parametrize("place", [0, 1], ids=["greedy", "sampled"])
def test_the_rate_is_that_of_the_environment(traces, place):
    trace = load_trace(traces[place])
    rounds = Rounds(trace, "train", DRAFT_FEATURES, COSTS)
    weights = np.random.default_rng(place).normal(size=len(DRAFT_FEATURES))

    def advantage(observations):
        return observations @ weights - 1.0

    tokens, cost = play(traces[place], trace.header.temperature, lambda o: int(advantage(o) > 0))
    assert rounds.rate(advantage(rounds.observations)) == pytest.approx(tokens / cost, rel=1e-6)


def test_advantages_are_what_changing_one_decision_brings(traces):
    """Force the other action in one state, play the rest of the round by the policy, and compare the worth."""
    rounds = Rounds(load_trace(traces[0]), "train", DRAFT_FEATURES, COSTS)
    rng, rho = np.random.default_rng(0), 1.7
    policy = rng.normal(size=rounds.observations.shape[:3])
    advantage, asked = rounds.advantages(policy, rho)
    visited = rounds.visited(policy) & asked
    checked = 0
    for n, c, k in rng.permutation(np.argwhere(visited))[:200]:
        worth = {}
        for action in (-1.0, 1.0):
            forced = policy.copy()
            forced[n, c, k] = action
            candidate, drafts, decisions = (array[n] for array in rounds.choose(forced))
            spent = rounds.cost[candidate, drafts] + decisions * rounds.decision
            worth[action] = rounds.emitted[n, candidate, drafts] - rho * spent
        assert advantage[n, c, k] == pytest.approx(worth[1.0] - worth[-1.0], abs=1e-9)
        checked += 1
    assert checked == 200


def test_training_improves_and_reproduces(traces):
    args = Args(traces=tuple(map(str, traces)), iterations=3, updates=60, batch_size=256, hidden=(16,))
    policy, history = train(args)
    again, repeated = train(args)
    assert history == repeated and all((a == b).all() for a, b in zip(policy.weights, again.weights, strict=True))
    assert policy.mdp == "draft" and policy.candidate_layers == LAYERS
    assert EXIT == 1 and not policy.weights[-1][0].any()  # Q(continue) is 0 by definition
    rounds = Rounds(load_trace(traces[0]), "train", args.features, COSTS)
    never = rounds.rate(np.full((*rounds.most.shape, DRAFT_CAP), -1.0))
    assert max(row["train 0.0"] for row in history) > never
