"""Our agent for logged data of the exit MDP: learn what is unknown, and compute the rest.

Of the reward only one thing is unknown, whether a draft is accepted; the log tells it of every exit. So a network
learns the acceptance by cross-entropy (every exit teaches it, whoever exited). What exiting is worth follows exactly,
and what continuing is worth by regression from the last candidate back to the first, on the rows that continued: a
walk has few steps, so each is solved once and nothing is bootstrapped from a moving target. At last a network that
sees only what the policy may observe learns the advantage of exiting; the critics see all features of the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from agents.task import BATCH, Task, advantage_layers
from lede_env.envs.rewards import make_exit_reward
from lede_env.errors import LedeError
from lede_env.policies import MLPPolicy

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class AcceptanceStopping:
    """Acceptance by cross-entropy, stopping by backward induction."""

    learns_from = "data"
    grid: tuple[dict[str, Any], ...] = ({"learning_rate": 2e-3}, {"learning_rate": 6e-3})

    def __init__(self, hidden: int = 64, learning_rate: float = 6e-3):
        self.hidden, self.learning_rate = hidden, learning_rate

    def train(self, task: Task) -> MLPPolicy:
        data, known = task.dataset, task.attributes
        if known["mdp"] != "exit":
            raise LedeError(
                f"this agent is for the exit MDP, but {task.env_id} is the draft MDP; choose another dataset"
            )
        torch.manual_seed(task.seed)
        layers = tuple(known["candidate_layers"])
        paid = make_exit_reward(known["reward"], known["reward_kwargs"], layers, known["n_layers"])
        candidate = np.searchsorted(layers, data["layer"])  # (N,)
        logged = data["observations"].astype(np.float64)
        x = torch.from_numpy(((logged - logged.mean(0)) / np.maximum(logged.std(0), 1e-6)).astype(np.float32))

        exited = np.flatnonzero(data["accepted"] >= 0)
        right = torch.from_numpy((data["accepted"][exited] > 0).astype(np.float32))
        acceptance, loss = self._fit(
            x[exited], right, task.updates, torch.nn.functional.binary_cross_entropy_with_logits
        )
        chance = _predict(torch.nn.Sequential(acceptance, torch.nn.Sigmoid()), x)
        exiting = chance * paid.accepted[candidate] + (1.0 - chance) * paid.rejected  # (N,) worth of it

        # At the last candidate the decoder alone asks, whether to draft on: to decline is worth 0.
        continuing, value = np.zeros(len(x)), exiting.copy()
        for place in reversed(range(len(layers) - 1)):
            here = np.flatnonzero(candidate == place)
            went = here[data["discount"][here] > 0]  # the row behind is the next decision on the same token
            goals = torch.from_numpy((paid.continue_ + value[went + 1]).astype(np.float32))
            critic, _ = self._fit(x[went], goals, task.updates // 4, torch.nn.functional.mse_loss)
            continuing[here] = _predict(critic, x[here])
            value[here] = np.maximum(exiting[here], continuing[here])

        mean, std = task.normaliser
        seen = torch.from_numpy((task.select(data["observations"]) - mean) / std)
        goals = torch.from_numpy((exiting - continuing).astype(np.float32))
        advantage, _ = self._fit(seen, goals, task.updates, torch.nn.functional.mse_loss)
        about = {"agent": "acceptance_stopping", "learning_rate": self.learning_rate, "updates": task.updates}
        policy = task.mlp(*advantage_layers(advantage), about)
        task.report(task.updates, policy, loss)
        return policy

    def _fit(self, x: torch.Tensor, y: torch.Tensor, updates: int, loss_of: Loss) -> tuple[torch.nn.Sequential, float]:
        """(n, F) -> (n,) by a network of two hidden layers; and the loss at the end."""
        width = self.hidden
        network = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], width), torch.nn.ReLU(),
            torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 1),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
        loss = torch.zeros(())
        for _ in range(updates):
            rows = torch.randint(len(y), (BATCH,))
            loss = loss_of(network(x[rows])[:, 0], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return network, loss.item()


def _predict(network: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return network(x)[:, 0].numpy().astype(np.float64)
