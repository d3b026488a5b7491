"""The simple rules that an RL agent has to beat: tuned thresholds, logistic regression, and cloning of the oracle.

These three end as small networks in the one policy file, so that they drive the decoder as any agent does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agents.task import BATCH, Task, linear_layers
from lede_env.errors import LedeError
from lede_env.oracles import ExitTable
from lede_env.policies import EXIT, SHIPPED, MLPPolicy, StaticPolicy, TrainedPolicy, load_policy


class Fixed:
    """The same layer for every token: that of the highest return on the training prompts."""

    learns_from = "trace"
    grid = ({},)
    deterministic = True
    needs = ("layer",)

    def train(self, task: Task) -> StaticPolicy:
        table = _exit_table(task)
        worth = _worth(table).mean(axis=0)  # (C,) of a token
        policy = StaticPolicy(task.attributes["candidate_layers"][worth.argmax()], task.attributes["n_layers"])
        task.report(0, policy, -worth.max())
        return policy


class Shipped:
    """The policy that ships with the embedded model: `agents.optimal_stopping`, trained on the draft MDP's traces.

    It learns nothing here, and has no score on the exit MDP: no curves.
    """

    learns_from = "trace"
    grid = ({},)
    deterministic = True
    needs = ("layer",)
    files = tuple(SHIPPED["tiny"] / f"policy.{end}" for end in ("json", "safetensors"))

    def train(self, task: Task) -> TrainedPolicy:
        return load_policy("tiny")


class Thresholds:
    """Exit where one signal passes a threshold: one for each candidate layer, or one for all if the layer is hidden.

    Tuned for the highest return on the training prompts, of which the trace knows what any threshold would bring: the
    signal (any of the features), its direction, and then each layer's threshold in turn until none changes.
    """

    learns_from = "trace"
    grid = ({},)
    deterministic = True

    def __init__(self, quantiles: int = 63):
        self.quantiles = quantiles  # thresholds tried: so many values of the signal, evenly spread over its rows

    def train(self, task: Task) -> MLPPolicy:
        table = _exit_table(task)
        seen = table.backend.observations[table.texts.rows[table.texts.there]]  # (n, C, all features)
        worth, paid = _worth(table), table.mdp.reward  # (n, C)
        drafting = worth[:, -1] - (len(paid.accepted) - 1) * paid.continue_  # on at the last candidate
        trials = []
        for signal in task.features:
            for sign in (1.0, -1.0):
                values = sign * seen[..., table.backend.features.index(signal)]
                thresholds, value = self._tune(values, worth, drafting, "layer" in task.features)
                trials.append((value, signal, sign, thresholds))
        value, signal, sign, thresholds = max(trials, key=lambda trial: trial[0])
        about = {"agent": "thresholds", "signal": signal, "exits": "above" if sign > 0 else "below"}
        about["thresholds"] = (sign * thresholds).tolist()
        policy = _threshold_network(task, signal, sign, thresholds, about)
        task.report(0, policy, -value)
        return policy

    def _tune(
        self, values: np.ndarray, worth: np.ndarray, drafting: np.ndarray, by_layer: bool
    ) -> tuple[np.ndarray, float]:
        """(n, C) signal, (n, C) worth of leaving there -> (C,) thresholds above which to exit, and a token's return.

        At the last candidate the environment asks nothing; the decoder does, whether to draft on, worth `drafting`.
        """
        tokens, candidates = np.arange(len(values)), values.shape[1]
        tried = np.quantile(values, np.linspace(0.0, 1.0, self.quantiles), axis=0 if by_layer else None)
        tried = np.broadcast_to(tried.reshape(self.quantiles, -1), (self.quantiles, candidates))
        thresholds, best = tried[self.quantiles // 2].copy(), -np.inf
        if by_layer:
            thresholds[-1] = max(tried[:, -1], key=lambda threshold: drafting @ (values[:, -1] > threshold))
        while True:
            before = best
            for group in range(candidates - 1) if by_layer else [slice(None)]:
                for threshold in tried[:, group].reshape(self.quantiles, -1)[:, 0]:
                    trial = thresholds.copy()
                    trial[group] = threshold
                    exits = values > trial
                    exits[:, -1] = True
                    value = float(worth[tokens, exits.argmax(axis=1)].mean())
                    if value > best:
                        best, thresholds = value, trial
            if best <= before:
                return thresholds, best


def _threshold_network(
    task: Task, signal: str, sign: float, thresholds: np.ndarray, about: dict[str, Any]
) -> MLPPolicy:
    """sign * signal - threshold(layer) as a ReLU network, the thresholds interpolated linearly between the layers.

    Units: +signal, -signal (their difference is the signal, whatever its sign), and one hinge a candidate.
    """
    mean, std = task.normaliser
    column = task.features.index(signal)
    hinges = thresholds[:0]
    first = np.zeros((2, len(task.features)))
    first[0, column], first[1, column] = std[column], -std[column]
    bias = np.array([mean[column], -mean[column]], np.float64)
    last = [sign, -sign]
    if "layer" in task.features:
        layers = np.array(task.attributes["candidate_layers"]) / task.attributes["n_layers"]
        slopes = np.diff(thresholds) / np.diff(layers)
        hinges = np.diff(slopes, prepend=0.0)  # change of slope at each candidate but the last
        place = task.features.index("layer")
        rows = np.zeros((len(hinges), len(task.features)))
        rows[:, place] = std[place]
        first, bias = np.concatenate([first, rows]), np.concatenate([bias, mean[place] - layers[:-1]])
        last = [*last, *-hinges]
    outputs = np.zeros((2, len(last)))
    outputs[EXIT] = last
    return task.mlp([first, outputs], [bias, np.array([0.0, -thresholds[0]])], about)


class Logistic:
    """Logistic regression of acceptance on the features, from the logged exits; exits where the odds are good enough.

    How good is a setting, chosen on the validation prompts.
    """

    learns_from = "data"
    grid = tuple({"odds": odds} for odds in (1.0, 2.0, 4.0, 8.0))
    deterministic = True

    def __init__(self, odds: float = 1.0, iterations: int = 20):
        self.odds, self.iterations = odds, iterations

    def train(self, task: Task) -> MLPPolicy:
        exits = task.dataset["accepted"] >= 0
        mean, std = task.normaliser
        x = (task.select(task.dataset["observations"][exits]).astype(np.float64) - mean) / std
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)  # (n, F + 1)
        right = task.dataset["accepted"][exits] > 0
        weights = np.zeros(x.shape[1])
        for _ in range(self.iterations):  # Newton's method, with a little ridge
            chance = 1.0 / (1.0 + np.exp(-x @ weights))
            gradient = x.T @ (chance - right) + 1e-3 * weights
            curvature = (x * (chance * (1.0 - chance))[:, None]).T @ x + 1e-3 * np.eye(len(weights))
            weights -= np.linalg.solve(curvature, gradient)
        loss = float(np.mean(np.logaddexp(0.0, np.where(right, -1.0, 1.0) * (x @ weights))))
        outputs = np.zeros((2, len(weights) - 1))
        outputs[EXIT] = weights[:-1]
        policy = task.mlp(
            [outputs], [np.array([0.0, weights[-1] - np.log(self.odds)])], {"agent": "logistic", "odds": self.odds}
        )
        task.report(0, policy, loss)
        return policy


class OracleCloning:
    """Behaviour cloning of the clairvoyant: a network learns, by cross-entropy, what the oracle does at each decision.

    The oracle knows which drafts are right and the observations do not, so the clone averages over what it cannot see,
    by how often each action is best and not by how much.
    """

    learns_from = "trace"
    grid = ({},)

    def __init__(self, hidden: int = 64, learning_rate: float = 1e-3):
        self.hidden, self.learning_rate = hidden, learning_rate

    def train(self, task: Task) -> MLPPolicy:
        table = _exit_table(task)
        there, right = table.texts.there, table.backend.trace.accepted[table.texts.rows]
        best = table.optimum()
        best[..., -1] = right[..., -1]  # the environment asks nothing there; the decoder, whether to draft on
        observations = task.select(table.backend.observations[table.texts.rows][there], table.backend.features)
        mean, std = task.normaliser
        x = torch.from_numpy(((observations - mean) / std).reshape(-1, len(mean)))  # (n C, F)
        actions = torch.from_numpy(best[there].reshape(-1).astype(np.int64))
        torch.manual_seed(task.seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], self.hidden), torch.nn.ReLU(),
            torch.nn.Linear(self.hidden, self.hidden), torch.nn.ReLU(), torch.nn.Linear(self.hidden, 2),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), self.learning_rate)
        loss = torch.zeros(())
        for _ in range(task.updates):
            rows = torch.randint(len(x), (BATCH,))
            loss = torch.nn.functional.cross_entropy(network(x[rows]), actions[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        policy = task.mlp(*linear_layers(network), {"agent": "oracle_cloning", "updates": task.updates})
        task.report(task.updates, policy, loss.item())
        return policy


def _exit_table(task: Task) -> ExitTable:
    table = task.table()
    if not isinstance(table, ExitTable):
        raise LedeError(f"this rule is for the exit MDP, but {task.env_id} is the draft MDP; choose another dataset")
    return table


def _worth(table: ExitTable) -> np.ndarray:
    """(n, C) expected return of each token if it leaves at each candidate, of all tokens there are."""
    chance = table.chance[table.texts.there]
    return chance * table.if_accepted + (1.0 - chance) * table.if_rejected
