"""The agent's arrays against the environment itself, and its advantages against playing on."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from agents.judge import problem
from agents.optimal_stopping import ENV_ID, START, Args, States, main, settings_of, train
from agents.task import Board
from lede_env.engine.acceptance import Sampling
from lede_env.engine.signals import DRAFT_FEATURES
from lede_env.envs.draft_env import SpeculativeDraftEnv
from lede_env.errors import LedeError
from lede_env.models.loading import load_model
from lede_env.outlooks import with_outlook
from lede_env.policies import MLPPolicy, StaticRounds, load_policy
from lede_env.policies.tree import LEAF
from lede_env.tasks import load_prompts
from lede_env.tracing import record_trace

LAYERS, TOKENS = (3, 4, 8), 24


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The embedded model on a few prompts, greedy and sampled."""
    folder, lm = tmp_path_factory.mktemp("traces"), load_model("tiny", device="cpu")
    prompts = [p for split in ("train", "validation") for p in load_prompts("parse", split)[:3]]
    files = []
    for temperature in (0.0, 0.6):
        files.append(folder / f"{temperature}.h5")
        trace = record_trace(lm, prompts, LAYERS, TOKENS, Sampling(temperature), 0)
        with_outlook(trace, lm, prompts).save(files[-1])
    return files


def play(trace_file, temperature, choose):
    """(tokens, cost) of all training prompts in the environment, acting by `choose(observation)`."""
    env = SpeculativeDraftEnv(
        model="tiny", backend="trace", trace=str(trace_file), task="parse", split="train", candidate_layers=LAYERS,
        temperature=temperature, max_new_tokens=TOKENS, features=DRAFT_FEATURES, reward="throughput", rho=1.5,
        cost_model=Args().cost_model,
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


def problem_of(trace_file):
    return problem(ENV_ID, "train", settings_of(str(trace_file), Args()))


@pytest.mark.parametrize("place", [0, 1], ids=["greedy", "sampled"])
def test_the_speedup_is_that_of_the_environment(traces, place):
    policy = MLPPolicy.random(DRAFT_FEATURES, seed=place)
    known = problem_of(traces[place]).env.attributes
    layers = {"mdp": "draft", "candidate_layers": LAYERS}
    policy = replace(policy, **layers, **{name: known[name] for name in ("n_layers", "model_fingerprint")})
    tokens, cost = play(traces[place], 0.6 * place, lambda o: int(policy.exit_probability(o[None])[0]))
    assert problem_of(traces[place]).judge(policy).modelled_speedup == pytest.approx(tokens / cost, rel=1e-6)


def round_from(table, exits, x, t):
    """(candidate, drafts) of the round that starts at a position, one decision after the other."""
    last, lengths = len(LAYERS) - 1, table.lengths[x, t]
    candidate = next((c for c in range(last) if exits[x, t, c, 0]), last)
    drafts = 1
    if exits[x, t, candidate, 0] and lengths[candidate] > 1:
        drafts = 2
        while drafts < lengths[candidate] and exits[x, t, candidate, drafts - 1]:
            drafts += 1
    return candidate, drafts


def test_advantages_are_what_changing_one_decision_brings(traces):
    """Force the other action in one state, play the rest of the round by the policy, and compare the worth."""
    states, rho, rng = States(problem_of(traces[0]).table), 1.7, np.random.default_rng(0)
    exits, table = np.zeros(states.asked.shape), states.table
    exits[states.asked] = rng.random(len(states.observations)) < 0.6

    class Recorded:
        features = table.backend.features

        def exit_probability(self, observations):
            return exits[states.asked]

    advantage, visited = states.advantages(Recorded(), rho)
    places = np.argwhere(states.asked)
    for place in rng.permutation(np.flatnonzero(visited))[:200]:
        x, t, c, k = places[place]
        worth = {}
        for action in (0.0, 1.0):
            forced = exits.copy()
            forced[x, t, c, k] = action
            end = (x, t, *np.add(round_from(table, forced, x, t), (0, -1)))
            plain = table.rounds[end] - 1  # not of the round
            worth[action] = table.emitted[end] - plain - rho * (table.cost[end] - plain * table.mdp.plain_cost)
        assert advantage[place] == pytest.approx(worth[1.0] - worth[0.0], abs=1e-9)
    assert visited.sum() > 200


def test_training_improves_and_reproduces(traces):
    args = Args(traces=tuple(map(str, traces)), iterations=3, leaves=16, leaf_rows=20)
    policy, history = train(args)
    again, repeated = train(args)
    ours, theirs = policy.tensors(), again.tensors()
    assert history == repeated and all((ours[name] == theirs[name]).all() for name in ours)
    assert policy.mdp == "draft" and policy.candidate_layers == LAYERS and policy.features == args.features
    assert (policy.feature == LEAF).sum() <= 16
    start = problem_of(traces[0]).judge(StaticRounds(LAYERS[0], START, 16, 12)).modelled_speedup
    assert max(row["train 0.0"] for row in history) > start


def test_a_policy_that_asks_a_head_says_which(traces, tmp_path):
    args = Args(traces=(str(traces[1]),), features=("phase", "risk", "ahead"), iterations=1, leaves=8, leaf_rows=20)
    policy, _ = train(args)
    assert policy.head == load_model("tiny", device="cpu").acceptance_head.digest
    assert load_policy(policy.save(tmp_path)).head == policy.head


def test_a_run_leaves_history_curves_and_the_policy(traces, tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main(Args(traces=(str(traces[0]),), iterations=2, leaves=4, leaf_rows=20, out=tmp_path))
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["0", "1"] and all(float(row["validation 0.0"]) > 0 for row in rows)
    assert (tmp_path / "policy" / "policy.json").is_file()
    events = event_file.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(Board.CURVES)


@pytest.mark.parametrize(("name", "value"), [("off_path", -1.0), ("off_path", 1.5), ("iterations", 0), ("leaves", 1)])
def test_arguments_out_of_range(name, value):
    with pytest.raises(LedeError, match=f"{name}={value}; expected"):
        Args(**{name: value})
