"""What an agent of the leaderboard is given, and what all agents log under the same names.

An agent is a class with one method, `train(task)`, which returns a policy: anything with `features` and
`exit_probability`. README.md beside this file shows a complete one.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agents.judge import judge, problem
from lede_env.data.dataset import Dataset
from lede_env.errors import LedeError
from lede_env.evaluation import Evaluation
from lede_env.oracles import DraftTable, ExitTable
from lede_env.policies import EXIT, ExitPolicy, MLPPolicy, made_for

BATCH = 256  # transitions an update, for all agents that do not say otherwise


class Agent(Protocol):
    """A way to learn a policy. `Agent(**settings)` makes one; the leaderboard tries each of `grid` on validation.

    It may also say that it is `deterministic` (all seeds are one), which features it `needs` to make any sense, and
    which `files` its result depends on beside the one it stands in: finished runs are kept until one of them changes.
    """

    learns_from: str  # "data": the task's dataset; "trace": what would have come of every decision; "play": itself
    grid: tuple[dict[str, Any], ...]  # settings to choose from; ({},) where there is nothing to choose

    def train(self, task: Task) -> ExitPolicy: ...


class Board:
    """TensorBoard's curves of a run, under the names that every agent shares; nothing where it is not installed.

    `loss` and what the newest policy does: `return` a prompt, `normalised_score`, `acceptance` and `exit_layer`.
    Those of an earlier run in the folder go: TensorBoard would draw both as one zigzag.
    """

    CURVES = ("loss", "return", "normalised_score", "acceptance", "exit_layer")

    def __init__(self, folder: Path | None):
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            for earlier in folder.glob("events.out.tfevents.*"):
                earlier.unlink()
            self._writer = SummaryWriter(folder)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Append to the curves that have a value; other values are left aside."""
        for name in self.CURVES:
            if self._writer is not None and name in values:
                self._writer.add_scalar(name, values[name], step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextmanager
def record_history(
    folder: Path,
    columns: Sequence[str],
    board: Board,
    history: list[dict[str, Any]],
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[Callable[..., None]]:
    """What puts a row into `history`, `folder`/history.csv and TensorBoard, and hands it to `progress`.

    columns: of the file, of which a row may lack some; the first counts the rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "history.csv").open("w", newline="", buffering=1) as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()

        def log(**row: Any) -> None:
            row = {columns[0]: len(history), **row}
            history.append(row)
            table.writerow(row)
            board.add(len(history) - 1, row)
            if progress:
                progress(row)

        yield log


@dataclass(frozen=True)
class Task:
    """Logged data to learn from, what the policy may observe, and how it is judged.

    dataset: `lede_env.load_dataset`'s: arrays by name, N rows, a decision each, and `attributes`.
    env_id, env_kwargs: the environment it was logged in, on a trace.
    features: what the policy may observe. The log has more of them, which an agent may learn from.
    """

    dataset: Dataset
    env_id: str
    env_kwargs: dict[str, Any]
    features: tuple[str, ...]
    seed: int
    updates: int  # gradient steps to spend, of BATCH transitions each
    board: Board = field(default_factory=lambda: Board(None))

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the environment: `mdp, candidate_layers, n_layers, model_fingerprint`, ..."""
        return self.dataset.attributes

    def select(self, observations: np.ndarray, available: Sequence[str] | None = None) -> np.ndarray:
        """(..., available features, by default the dataset's) -> (..., F) those that the policy may observe."""
        names = list(self.attributes["features"] if available is None else available)
        lacking = [name for name in self.features if name not in names]
        if lacking:
            raise LedeError(f"there are no features {lacking}, only {names}; record the data again, or choose others")
        return observations[..., [names.index(name) for name in self.features]]

    @cached_property
    def transitions(self) -> dict[str, np.ndarray]:
        """(N, F) `observations` and `next_observations`, (N,) `actions`, `rewards` and `terminals`.

        What ends a token (draft MDP: a round) is terminal: nothing carries over, so nothing is bootstrapped past it.
        """
        data = self.dataset
        return {
            "observations": self.select(data["observations"]),
            "actions": data["actions"].astype(np.int64),
            "rewards": data["rewards"],
            "next_observations": self.select(data.next_observations),
            "terminals": data["terminals"] | (data["discount"] == 0),
        }

    @cached_property
    def normaliser(self) -> tuple[np.ndarray, np.ndarray]:
        """(F,) mean and standard deviation of the logged observations; 1 where a feature is constant."""
        logged = self.select(self.dataset["observations"]).astype(np.float64)
        std = logged.std(axis=0)
        return logged.mean(axis=0).astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)

    def table(self, split: str = "train") -> ExitTable | DraftTable:
        """What would have come of every decision on the prompts of a split: for agents that learn from the trace."""
        return problem(self.env_id, split, self.env_kwargs).table

    def validate(self, policy: ExitPolicy) -> Evaluation:
        """What a policy does on the validation prompts."""
        return judge(policy, self.env_id, "validation", self.env_kwargs)

    def report(self, step: int, policy: ExitPolicy, loss: float) -> None:
        """Log the state of training: the loss, and what the policy does on the validation prompts."""
        self.board.add(step, {"loss": loss, **summary(self.validate(policy))})

    def mlp(self, weights: Any, biases: Any, training: Mapping[str, Any]) -> MLPPolicy:
        """A network on this task's normalised features as a policy, for its file and the decoder.

        weights: an (outputs, inputs) array a layer, biases: (outputs,); ReLU between them, 2 outputs, the values of
        continuing and exiting. training: how it was made, JSON values only.
        """
        return MLPPolicy(
            tuple(np.array(weight, np.float32) for weight in weights),
            tuple(np.array(bias, np.float32) for bias in biases),
            *self.normaliser,
            features=self.features,
            training={**training, "seed": self.seed},
            **made_for(self.attributes),
        )


def summary(evaluation: Evaluation) -> dict[str, float | None]:
    """An evaluation under the names of the curves."""
    return {
        "return": evaluation.J,
        "normalised_score": evaluation.normalised_score,
        "acceptance": evaluation.acceptance,
        "exit_layer": evaluation.E,
    }


def linear_layers(network: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and biases of the linear layers of a torch network, in order."""
    import torch

    layers = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    return [layer.weight.detach().numpy() for layer in layers], [layer.bias.detach().numpy() for layer in layers]


def advantage_layers(network: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`linear_layers` of a network whose one output is the advantage of exiting, as Q(exit) beside Q(continue) = 0."""
    layers = linear_layers(network)
    for arrays in layers:
        both = np.zeros((2, *arrays[-1].shape[1:]), np.float32)
        both[EXIT] = arrays[-1][0]
        arrays[-1] = both
    return layers
