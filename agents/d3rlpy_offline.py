"""Every discrete algorithm of d3rlpy (Seno and Imai, 2022) that applies, on the same logged data with one budget.

d3rlpy's own `fit` draws transitions one at a time in Python, which takes several times as long as learning from them.
So batches are made here, from arrays, and handed to its `update`; a test holds them against d3rlpy's own.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from agents.task import BATCH, Task, linear_layers
from lede_env.errors import LedeError
from lede_env.policies import MaskedMLPPolicy, MLPPolicy

HIDDEN = [64, 64]
GAMMA = 0.99
TARGET_EVERY = 100  # updates to one copy into the target network; d3rlpy's 8000 would never copy in a short run
# d3rlpy's Huber loss is quadratic for errors up to 1. Beyond, it would learn medians, and most drafts being accepted,
# rate every exit too high: so rewards are scaled until errors are smaller.
REWARD_SCALE = 0.25
FLEXIBILITY = 0.3  # of BCQ: d3rlpy's own
REPORTS = 5  # times a run says what it has learned


def import_d3rlpy() -> Any:
    """d3rlpy, imported when it is needed: that takes seconds, and prints warnings about the old Gym.

    Raises:
        LedeError: it is not installed.
    """
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import d3rlpy
        except ImportError as error:
            raise LedeError("d3rlpy is not installed; pip install -c constraints.txt -e '.[d3rlpy]'") from error
    return d3rlpy


class Offline:
    """An algorithm that learns from transitions. A subclass says which, and where its decisions are."""

    learns_from = "data"
    grid: tuple[dict[str, Any], ...] = ({"learning_rate": 3e-4}, {"learning_rate": 1e-3})
    q_function = "MeanQFunctionFactory"

    def __init__(self, learning_rate: float = 1e-3, **settings: Any):
        self.learning_rate, self.settings = learning_rate, settings
        self.algorithm: Any = None  # d3rlpy's, once trained

    def config(self, algos: Any, shared: dict[str, Any]) -> Any:
        """The algorithm's configuration. `shared`: what all have."""
        raise NotImplementedError

    def train(self, task: Task) -> MLPPolicy:
        d3rlpy = import_d3rlpy()
        d3rlpy.seed(task.seed)
        self.q_func_factory = getattr(d3rlpy.models.q_functions, self.q_function)()
        shared = {
            "batch_size": BATCH,
            "gamma": GAMMA,
            **scalers(task),
            "encoder_factory": d3rlpy.models.encoders.VectorEncoderFactory(hidden_units=HIDDEN),
        }
        self.algorithm = self.config(d3rlpy.algos, shared | self.settings).create()
        self.algorithm.create_impl((len(task.features),), 2)
        learn(self.algorithm, task, lambda step, loss: task.report(step, self.export(task), loss))
        return self.export(task)

    def export(self, task: Task) -> MLPPolicy:
        """The network that decides, as a policy."""
        return task.mlp(*self.decides(self.algorithm.impl.modules), self.about(task))

    def decides(self, modules: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Weights and biases of the network whose larger output is the action."""
        return linear_layers(modules.q_funcs[0])

    def about(self, task: Task) -> dict[str, Any]:
        settings = {"learning_rate": self.learning_rate, **self.settings, "updates": task.updates, "batch_size": BATCH}
        return {"agent": f"d3rlpy {type(self).__name__}", **settings}


def scalers(task: Task) -> dict[str, Any]:
    """The task's normaliser as d3rlpy's, which by default adds something to every deviation; and that of rewards."""
    preprocessing, (mean, std) = import_d3rlpy().preprocessing, task.normaliser
    observations = preprocessing.StandardObservationScaler(mean=mean, std=std, eps=0.0)
    return {"observation_scaler": observations, "reward_scaler": preprocessing.MultiplyRewardScaler(REWARD_SCALE)}


def learn(algorithm: Any, task: Task, report: Callable[[int, float], None], updates: int | None = None) -> None:
    """Update an algorithm, or an evaluation, on random batches of the task's transitions."""
    rng, updates = np.random.default_rng(task.seed), updates or task.updates
    every, losses = max(1, updates // REPORTS), []
    for step in range(1, updates + 1):
        losses.append(algorithm.update(batch(task, rng.integers(len(task.transitions["actions"]), size=BATCH))))
        if step % every == 0 or step == updates:
            report(step, float(np.mean([values.get("loss", values.get("critic_loss")) for values in losses])))
            losses.clear()


def batch(task: Task, rows: np.ndarray) -> Any:
    """Transitions as d3rlpy takes them: float32, all (B, 1) but the observations (B, F)."""
    from d3rlpy.dataset import TransitionMiniBatch

    data = {name: column[rows].astype(np.float32).reshape(len(rows), -1) for name, column in task.transitions.items()}
    # What is done next matters to algorithms for continuous actions alone.
    more = {"next_actions": np.zeros_like(data["actions"]), "intervals": np.ones_like(data["actions"])}
    return TransitionMiniBatch(**data, **more, transitions=[])


class DQN(Offline):
    """Deep Q-network (Mnih et al., 2015)."""

    def config(self, algos, shared):
        return algos.DQNConfig(**self.q_learning(shared))

    def q_learning(self, shared: dict[str, Any]) -> dict[str, Any]:
        own = {"q_func_factory": self.q_func_factory, "target_update_interval": TARGET_EVERY}
        return {"learning_rate": self.learning_rate, **own, **shared}


class DoubleDQN(DQN):
    """DQN whose next action is the online network's (van Hasselt et al., 2016)."""

    def config(self, algos, shared):
        return algos.DoubleDQNConfig(**self.q_learning(shared))


class QuantileDQN(DQN):
    """DQN with quantile regression (Dabney et al., 2018). The mean over quantiles is linear: it is exported exactly."""

    q_function = "QRQFunctionFactory"

    def decides(self, modules):
        weights, biases = super().decides(modules)
        weights[-1] = weights[-1].reshape(2, -1, weights[-1].shape[1]).mean(axis=1)
        biases[-1] = biases[-1].reshape(2, -1).mean(axis=1)
        return weights, biases


class NFQ(DQN):
    """Neural fitted Q iteration (Riedmiller, 2005): no target network."""

    def config(self, algos, shared):
        settings = self.q_learning(shared)
        del settings["target_update_interval"]
        return algos.NFQConfig(**settings)


class CQL(DQN):
    """Conservative Q-learning (Kumar et al., 2020)."""

    grid = ({"alpha": 0.1}, {"alpha": 1.0})

    def config(self, algos, shared):
        return algos.DiscreteCQLConfig(**self.q_learning(shared))


class BCQ(DQN):
    """Batch-constrained Q-learning (Fujimoto et al., 2019): a `masked_mlp` in the policy file."""

    def config(self, algos, shared):
        return algos.DiscreteBCQConfig(**self.q_learning(shared), action_flexibility=FLEXIBILITY)

    def export(self, task):
        imitator = task.mlp(*linear_layers(self.algorithm.impl.modules.imitator), {})
        values = super().export(task)
        known = {field.name: getattr(values, field.name) for field in fields(values)}
        return MaskedMLPPolicy(**known, imitator=imitator, flexibility=FLEXIBILITY)


class SAC(Offline):
    """Soft actor-critic for discrete actions (Christodoulou, 2019).

    At a fixed temperature: d3rlpy would raise it until the policy is nearly a coin, which makes long walks worth more
    than the reward does.
    """

    grid = ({"initial_temperature": 0.02}, {"initial_temperature": 0.2})

    def config(self, algos, shared):
        own = {f"{part}_learning_rate": self.learning_rate for part in ("actor", "critic")}
        encoder = shared.pop("encoder_factory")
        own |= {"actor_encoder_factory": encoder, "critic_encoder_factory": encoder, "temp_learning_rate": 0.0}
        return algos.DiscreteSACConfig(**own, **shared, target_update_interval=TARGET_EVERY)

    def decides(self, modules):
        return linear_layers(modules.policy)


class BC(Offline):
    """Behaviour cloning: what those who logged the data most often did."""

    def config(self, algos, shared):
        del shared["gamma"], shared["reward_scaler"]
        return algos.DiscreteBCConfig(learning_rate=self.learning_rate, **shared)

    def decides(self, modules):
        return linear_layers(modules.imitator)
