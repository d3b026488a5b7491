"""The leaderboard: its statistics by hand, the simple bars, runs that resume, and a newcomer's agent by the README."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from agents.acceptance_stopping import AcceptanceStopping
from agents.bars import Fixed, Logistic, OracleCloning, Shipped, Thresholds
from agents.judge import judge
from agents.nstep_dqn import NStepDQN
from agents.task import Board
from benchmarks import offline_rl, offline_rl_runs, offline_rl_speed
from benchmarks.offline_rl_runs import Run, environment_of, execute_all, find_agent
from benchmarks.rl_statistics import bootstrap, iqm, profile
from lede_env import evaluate
from lede_env.errors import LedeError
from lede_env.policies import RandomPolicy, load_policy
from tests.small_tasks import ENV_KWARGS, log_random, small_task


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return log_random(tmp_path_factory.mktemp("log"))


@pytest.fixture
def task(log):
    return small_task(log)


# --- statistics


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm(np.array([[9.0, 1.0, 2.0, 3.0]])) == 2.5
    assert iqm(np.array([[1.0, 100.0], [2.0, 3.0], [-50.0, 4.0], [5.0, 6.0]])) == (2 + 3 + 4 + 5) / 4
    assert iqm(np.array([[1.0, 2.0, 9.0, 4.0, 5.0]])) == (2 + 4 + 5) / 3  # a quarter of five, rounded down, is cut
    np.testing.assert_array_equal(iqm(np.array([[[1.0, 1.0]], [[2.0, 4.0]]])), [1.0, 3.0])


def test_the_bootstrap_draws_seeds_within_their_dataset():
    apart = np.array([[0.0, 0.0, 0.0], [10.0, 10.0, 10.0]])  # datasets differ, seeds do not: nothing to resample
    assert bootstrap(apart) == (iqm(apart), iqm(apart))
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        low, high = bootstrap(rng.normal(size=(4, 10)) + np.arange(4)[:, None], seed=trial)
        covered += low <= 1.5 <= high
    assert 85 <= covered <= 100


def test_a_profile_counts_the_runs_above_each_level():
    scores = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(profile(np.array([0.0, 1.0, 2.5, 4.0]))(scores), [1.0, 0.75, 0.5, 0.0])


# --- agents


def test_the_judge_is_evaluate():
    for policy, env_id in ((RandomPolicy(0.3), "LEDE-Tiny-v0"), (load_policy("tiny"), "LEDE-Tiny-Draft-v0")):
        expected = evaluate(policy, env_id, "validation", **ENV_KWARGS)
        assert str(judge(policy, env_id, "validation", ENV_KWARGS)) == str(expected)
    with pytest.raises(LedeError, match="trained on the draft MDP, but this is the exit MDP"):
        judge(load_policy("tiny"), "LEDE-Tiny-v0", "validation", ENV_KWARGS)


@pytest.mark.parametrize("features", ["paper", "extended"])
def test_thresholds_as_a_network_are_the_rule(task, log, features):
    task = small_task(log, features)
    policy = Thresholds(quantiles=15).train(task)
    rule = policy.training
    seen = task.dataset["observations"]
    signal = seen[:, task.dataset.features.index(rule["signal"])]
    limits = np.array(rule["thresholds"])[np.searchsorted(task.attributes["candidate_layers"], task.dataset["layer"])]
    expected = signal > limits if rule["exits"] == "above" else signal < limits
    assert (policy.exit_probability(task.select(seen)) == expected).mean() > 0.999  # a row on the threshold may round
    assert 0 < expected.mean() < 1
    assert len(set(rule["thresholds"])) == 1 or features == "extended"


def test_tuned_thresholds_beat_all_fixed_layers_on_the_training_prompts(task):
    table = task.table()
    fixed, tuned = (table.play(table.decisions(a().train(task)))["returns"].mean() for a in (Fixed, Thresholds))
    assert tuned > fixed
    layers = np.eye(table.chance.shape[-1])
    best = max(table.play(np.broadcast_to(layer, table.chance.shape))["returns"].mean() for layer in layers)
    assert fixed == pytest.approx(best)


def test_logistic_regression_is_scikit_learns(task):
    linear_model = pytest.importorskip("sklearn.linear_model")
    policy = Logistic(odds=2.0).train(task)
    exits = task.dataset["accepted"] >= 0
    mean, std = task.normaliser
    x, right = (task.transitions["observations"][exits] - mean) / std, task.dataset["accepted"][exits] > 0
    theirs = linear_model.LogisticRegression(C=1e3, tol=1e-8, max_iter=500).fit(x, right)
    odds = np.exp(policy.q_values(task.transitions["observations"][exits]) @ [-1, 1]) * 2.0
    np.testing.assert_allclose(odds / (1 + odds), theirs.predict_proba(x)[:, 1], atol=2e-3)


@pytest.mark.parametrize("agent", [OracleCloning, AcceptanceStopping, NStepDQN])
def test_learned_agents_beat_random_play_and_reproduce(task, tmp_path, agent):
    task = replace(task, updates=150)
    policy = agent().train(task)
    assert task.validate(policy).normalised_score > 0
    np.testing.assert_array_equal(policy.weights[0], agent().train(task).weights[0])
    assert load_policy(policy.save(tmp_path)).training["agent"]


def test_features_that_the_log_lacks_are_named(task):
    with pytest.raises(LedeError, match=r"no features \['gaze'\]"):
        _ = replace(task, features=("gaze",)).transitions


def test_the_exported_policies_drive_the_decoder(task, tiny):
    from lede_env import Lede, generate

    plain = generate(tiny, "def fib(n):", max_new_tokens=12)
    for agent in (Thresholds(quantiles=9), Logistic(), Shipped()):
        out = generate(tiny, "def fib(n):", strategy=Lede(agent.train(task)), max_new_tokens=12)
        assert out.token_ids == plain.token_ids


def test_all_agents_log_the_same_curves(task, tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for agent in (Fixed(), Thresholds(quantiles=5), Logistic(), OracleCloning(), AcceptanceStopping(), NStepDQN()):
        folder = tmp_path / type(agent).__name__
        board = Board(folder)
        agent.train(replace(task, board=board, updates=10))
        board.close()
        events = event_file.EventAccumulator(str(folder))
        events.Reload()
        assert set(events.Tags()["scalars"]) == set(Board.CURVES)


def test_curves_of_an_earlier_run_are_replaced(tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (5, 3):  # the first, cut short, had come further
        board = Board(tmp_path)
        for step in range(steps):
            board.add(step, {"loss": float(steps)})
        board.close()
    events = event_file.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 3.0), (1, 3.0), (2, 3.0)]


# --- runs


def test_what_differs_from_the_id_is_told_by_the_dataset(task):
    env_id, kwargs = environment_of(task.attributes)
    assert env_id == "LEDE-Tiny-v0" and kwargs == ENV_KWARGS


@pytest.mark.parametrize(
    ("source", "message"),
    [("agents.nowhere:A", "No module"), ("agents.bars:Nobody", "Nobody"), ("agents.bars", "my_module:MyAgent"),
     ("agents.task:Board", "has no 'train'")],
)  # fmt: skip
def test_agents_that_are_none_are_named(source, message):
    with pytest.raises(LedeError, match=message):
        find_agent(source)


def test_finished_runs_are_kept_and_a_failure_names_its_run(log, tmp_path):
    run = Run("logistic", "agents.bars:Logistic", {"odds": 1.0}, str(log), "paper", 1, 10)
    done = []
    first = execute_all([run], tmp_path, 1, lambda: done.append(1))
    (file,) = tmp_path.glob("**/result.json")
    stamp = file.stat().st_mtime_ns
    assert execute_all([run], tmp_path, 1, lambda: done.append(1)) == first
    assert file.stat().st_mtime_ns == stamp and len(done) == 2
    assert 0 < first[0]["test"]["normalised_score"] < 100 and first[0]["modelled_speedup"] > 1
    assert load_policy(file.parent / "policy").features == ("confidence", "entropy", "trace")
    with pytest.raises(LedeError, match=r"seed=2.*failed.*hue.*finished runs are kept"):
        execute_all([replace(run, seed=2, settings={"hue": 1})], tmp_path, 1, lambda: None)


def test_an_edited_agent_and_other_data_are_trained_anew(log, tmp_path, monkeypatch):
    agent = "class A:\n    learns_from, grid = 'data', ({},)\n    def train(self, task): return Policy()\n"
    policy = (
        "class Policy:\n    features = ('top1',)\n    def exit_probability(self, x): return (x[:, 0] < LIMIT) * 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def play(limit: float, data: Path) -> dict:
        (tmp_path / "edited.py").write_text(f"LIMIT = {limit}\n{policy}{agent}")
        sys.modules.pop("edited", None)  # as in a new process
        importlib.invalidate_caches()
        offline_rl_runs.made_from.cache_clear()
        offline_rl_runs.load.cache_clear()
        return execute_all([Run("a", "edited:A", {}, str(data), "extended", 1, 10)], tmp_path, 1, lambda: None)[0]

    data = Path(shutil.copy(log, tmp_path / "data.h5"))
    first = play(0.25, data)
    assert play(0.25, data) == first
    assert play(0.125, data)["test"] != first["test"]
    again = play(0.25, data)
    shutil.copy(log_random(tmp_path, episodes=10), data)
    other = play(0.25, data)
    assert other["made_from"]["dataset"] != again["made_from"]["dataset"]
    assert other["made_from"]["agent"] == again["made_from"]["agent"] == first["made_from"]["agent"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("grid = ()", "expected a dict of settings for each trial"),
        ("grid = {'a': 1}", "expected a dict of settings for each trial"),
        ("grid = ({'a': {1}},)", "JSON cannot hold"),
        ("learns_from = 'osmosis'", "learns_from='osmosis'; expected one of data, trace, play"),
    ],
)
def test_what_an_agent_says_of_itself_is_checked(tmp_path, monkeypatch, body, message):
    text = f"class A:\n    learns_from, grid = 'data', ({{}},)\n    {body}\n    def train(self, task): ...\n"
    (tmp_path / "newcomer.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "newcomer", raising=False)
    with pytest.raises(LedeError, match=message):
        find_agent("newcomer:A")
    del sys.modules["newcomer"]


def test_settings_may_be_of_any_kind(log, tmp_path, monkeypatch):
    """And a run that fails says where: training that forgot its return, then one that raises."""
    text = (
        "class A:\n    learns_from = 'data'\n    grid = ({'kind': 'a'}, {'kind': 'b', 'sizes': [64, 64], 'x': None},)\n"
        "    def __init__(self, **settings): self.settings = settings\n"
        "    def train(self, task):\n        if self.settings['kind'] == 'b': raise RuntimeError('out of luck')\n"
    )
    (tmp_path / "kinds.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    runs = [Run("a", "kinds:A", settings, str(log), "paper", 1, 10) for settings in find_agent("kinds:A").grid]
    assert [run.folder(tmp_path).name for run in runs] == ["kinda-seed1", "kindb-sizes-64-64-xNone-seed1"]
    with pytest.raises(LedeError, match="train gave None; expected a policy"):
        execute_all(runs[:1], tmp_path, 1, lambda: None)
    with pytest.raises(LedeError, match=r"out of luck; \S+error\.txt says where"):
        execute_all(runs[1:], tmp_path, 1, lambda: None)
    assert 'kinds.py", line 6' in (runs[1].folder(tmp_path) / "error.txt").read_text()
    del sys.modules["kinds"]


def test_the_lead_over_the_bar_is_paired_over_prompts():
    bar = [{"prompts": [0.0, 50.0, 100.0]}]
    runs = [{"prompts": [1.0, 51.0, 101.0]}, {"prompts": [3.0, 53.0, 103.0]}]
    assert offline_rl.lead(runs, bar) == "+2.0 (+2.0 to +2.0)"  # on every prompt alike, however they differ
    assert offline_rl.lead([{"prompts": [1.0]}], bar) == offline_rl.lead([{}], bar) == ""


@pytest.fixture(scope="module")
def board(log, tmp_path_factory):
    """A small leaderboard with a newcomer's agent: the one of agents/README.md, written as it is there."""
    folder = tmp_path_factory.mktemp("newcomer")
    text = (Path(__file__).parents[1] / "agents" / "README.md").read_text()
    (folder / "my_module.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1))
    args = offline_rl.Args(
        datasets=(str(log),), features=("extended",), agents=("thresholds", "logistic regression"),
        agent=("my_module:MyAgent",), seeds=2, updates=20, workers=1, runs=folder / "runs", out=folder / "out",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "argv", ["offline_rl"])
        offline_rl.main(args)
        yield args
    sys.modules.pop("my_module", None)


def test_a_newcomers_agent_gets_its_row(board):
    rows = {row["agent"]: row for row in json.loads((board.out / "leaderboard.json").read_text())["rows"]}
    assert set(rows) == {"thresholds", "logistic regression", "my_module:MyAgent"}
    mine = rows["my_module:MyAgent"]
    assert mine["learns from"] == "data" and mine["low"] <= mine["IQM"] <= mine["high"] and mine["modelled speedup"] > 1
    ahead, low, high = map(float, re.findall(r"[+-][\d.]+", mine["over thresholds"]))
    assert low < ahead < high and rows["thresholds"]["over thresholds"] == ""
    assert ahead == pytest.approx(mine["IQM"] - rows["thresholds"]["IQM"], abs=0.06)  # two runs: their mean
    assert {path.name for path in board.out.iterdir()} == {
        "leaderboard.csv", "leaderboard.md", "leaderboard.json", "leaderboard.png", "runs.csv",
    }  # fmt: skip
    with (board.out / "runs.csv").open() as file:
        runs = [(row["agent"], row["seed"]) for row in csv.DictReader(file)]
    assert runs.count(("my_module:MyAgent", "2")) == 1 and ("thresholds", "2") not in runs  # it has no seeds


def test_the_check_passes_on_what_was_committed_and_fails_on_anything_else(board, log, monkeypatch):
    monkeypatch.setattr(offline_rl, "CHECKED", ("thresholds", "logistic regression"))
    monkeypatch.setattr(offline_rl, "CHECKED_DATASET", str(log))
    offline_rl.main(replace(board, check=True))
    text = (board.out / "runs.csv").read_text()
    score = next(csv.DictReader(text.splitlines()))["normalised_score"]
    (board.out / "runs.csv").write_text(text.replace(score, str(float(score) + 1.0)))
    with pytest.raises(LedeError, match="outside the committed interval"):
        offline_rl.main(replace(board, check=True))


def test_the_papers_agent_is_timed_even_where_it_is_not_among_the_fastest(tmp_path):
    speedups = {"fast": (2.0, 2.1, 2.9), "middling": (1.9, 1.9, 1.9), offline_rl_speed.PAPERS: (1.1, 1.0, 1.2)}
    runs = [
        {"modelled_speedup": speedup, **asdict(Run(agent, "m:A", {}, "d", "paper", seed, 1)), "settings": "{}"}
        for agent, own in speedups.items()
        for seed, speedup in enumerate(own)
    ]
    offline_rl.write_csv(tmp_path / "runs.csv", runs)
    for run in runs:
        (Run.of_row({**run, "settings": "{}"}).folder(tmp_path) / "policy").mkdir(parents=True)
    chosen = offline_rl_speed.fastest(offline_rl_speed.Args(results=tmp_path, runs=tmp_path, best=1))
    assert {name: speedup for name, (speedup, _) in chosen.items()} == {
        "fast, paper": 2.1, f"{offline_rl_speed.PAPERS}, paper": 1.1,
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"seeds": 0}, {"agents": ("nobody",)}])
def test_bad_arguments_are_named(change):
    with pytest.raises(LedeError, match=next(iter(change)).removesuffix("s")):
        offline_rl.Args(**change)
