"""A small ReLU network that is fitted to values, and then is a policy file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from agents.task import advantage_layers, linear_layers
from lede_env.policies import MLPPolicy, made_for


class Network:
    """From normalised observations to as many outputs as asked for: the values of both actions, or the advantage."""

    def __init__(self, hidden: tuple[int, ...], outputs: int, mean: np.ndarray, std: np.ndarray, seed: int):
        torch.manual_seed(seed)
        self.mean, self.std = mean, std
        sizes = (len(mean), *hidden)
        inner = [part for pair in pairwise(sizes) for part in (torch.nn.Linear(*pair), torch.nn.ReLU())]
        self.layers = torch.nn.Sequential(*inner, torch.nn.Linear(sizes[-1], outputs))

    def inputs(self, observations: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((observations - self.mean) / self.std).astype(np.float32))

    def fit(
        self,
        observations: np.ndarray,
        goals: np.ndarray,
        weights: np.ndarray,
        updates: int,
        batch_size: int,
        learning_rate: float,
    ) -> float:
        """Weighted least squares of the one output on (N, F), (N,), (N,), by Adam; returns the last batch's loss.

        learning_rate: falls linearly to a twentieth.
        """
        x = self.inputs(observations)
        y, w = torch.from_numpy(goals.astype(np.float32)), torch.from_numpy(weights.astype(np.float32))
        optimizer = torch.optim.Adam(self.layers.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
        loss = torch.zeros(())
        for _ in range(updates):
            rows = torch.randint(len(y), (batch_size,))
            loss = (w[rows] * (self.layers(x[rows])[:, 0] - y[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    def export(self, known: Mapping[str, Any], features: Sequence[str], training: Mapping[str, Any]) -> MLPPolicy:
        """As a policy. One output is the advantage of exiting: Q(exit), beside Q(continue) = 0.

        known: the attributes of the environment; features: what the network observes; training: how it was made.
        """
        layers = advantage_layers(self.layers) if self.layers[-1].out_features == 1 else linear_layers(self.layers)
        weights, biases = (tuple(array.copy() for array in arrays) for arrays in layers)  # training goes on
        return MLPPolicy(
            weights, biases, self.mean, self.std, features=tuple(features), training=dict(training), **made_for(known)
        )


def normaliser(observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, F) -> mean and standard deviation (F,), 1 where nothing varies."""
    std = observations.std(0, dtype=np.float64)
    return observations.mean(0, dtype=np.float64).astype(np.float32), np.where(std > 1e-6, std, 1).astype(np.float32)
