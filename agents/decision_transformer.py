"""The decision transformer (Chen et al., 2021) by d3rlpy: what was done where the rest of the token paid so much?

It sees all that the token's walk has shown so far, so it fits no kind of the policy file: it is scored on the trace
alone, and does not drive the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.d3rlpy_offline import HIDDEN, import_d3rlpy, scalers
from agents.task import Task
from lede_env.errors import LedeError
from lede_env.oracles import DraftTable, ExitTable
from lede_env.policies import EXIT

PART = 512  # walks decided together
TARGETS = (0.5, 1.0, 1.5, 2.0)  # returns of a token to ask for; the best on the validation prompts is kept


@dataclass(frozen=True)
class WalkPolicy:
    """Decides from the whole walk of a token. `decisions` is what the leaderboard plays."""

    algorithm: Any
    task: Task
    target: float

    def decisions(self, table: ExitTable | DraftTable) -> np.ndarray:
        """(X, T, C) what it does at every candidate, having continued at those before."""
        import torch

        if not isinstance(table, ExitTable):
            raise LedeError("the decision transformer walks the exit MDP's tokens; choose a dataset of that MDP")
        there, candidates = table.texts.there, table.chance.shape[-1]
        seen = table.backend.observations[table.texts.rows[there]]  # (n, C, all features)
        mean, std = self.task.normaliser
        x = torch.from_numpy((self.task.select(seen, table.backend.features) - mean) / std)
        left = torch.from_numpy(self.target - table.mdp.reward.continue_ * np.arange(candidates, dtype=np.float32))
        model = self.algorithm.impl.modules.transformer.eval()
        exits = np.ones((len(x), candidates))  # once it has left, whatever
        walking = torch.arange(len(x))
        for candidate in range(candidates):
            leaves = []
            for rows in walking.split(PART):
                shape = (len(rows), candidate + 1)
                returns = left[: candidate + 1].expand(shape)[..., None]
                steps = torch.arange(1, candidate + 2).expand(shape)
                walk = x[rows, : candidate + 1]
                with torch.inference_mode():
                    _, logits = model(walk, torch.zeros(*shape, 1), returns, steps, torch.zeros(shape))
                leaves.append(logits[:, -1].argmax(-1) == EXIT)
            left_here = torch.cat(leaves) if leaves else torch.zeros(0, dtype=torch.bool)
            exits[walking, candidate] = left_here.numpy()
            walking = walking[~left_here]
        decisions = np.zeros(table.chance.shape)
        decisions[there] = exits
        return decisions


class DecisionTransformer:
    """One block, as wide as the other agents' networks. An update sees fewer walks than others see transitions: BATCH
    of them would take ten times as long as all else."""

    learns_from = "data"
    grid = ({},)

    def __init__(self, learning_rate: float = 1e-3, batch_size: int = 64):
        self.learning_rate, self.batch_size = learning_rate, batch_size

    def train(self, task: Task) -> WalkPolicy:
        d3rlpy = import_d3rlpy()
        d3rlpy.seed(task.seed)
        walks = token_walks(task)
        longest = walks["masks"].shape[1]
        algorithm = d3rlpy.algos.DiscreteDecisionTransformerConfig(
            batch_size=self.batch_size, learning_rate=self.learning_rate, context_size=longest, max_timestep=longest,
            num_heads=1, num_layers=1, warmup_tokens=10 * self.batch_size * longest,
            final_tokens=task.updates * self.batch_size * longest,
            observation_scaler=scalers(task)["observation_scaler"],
            encoder_factory=d3rlpy.models.encoders.VectorEncoderFactory(hidden_units=HIDDEN),
        ).create()  # fmt: skip
        algorithm.create_impl((len(task.features),), 2)
        rng, losses = np.random.default_rng(task.seed), []
        for _ in range(task.updates):
            rows = rng.integers(len(walks["masks"]), size=self.batch_size)
            batch = d3rlpy.dataset.TrajectoryMiniBatch(**{k: v[rows] for k, v in walks.items()}, length=longest)
            losses.append(algorithm.update(batch)["loss"])
        policies = [WalkPolicy(algorithm, task, target) for target in TARGETS]
        policy = max(policies, key=lambda policy: task.validate(policy).J)
        task.report(task.updates, policy, float(np.mean(losses[-100:])))
        return policy


def token_walks(task: Task) -> dict[str, np.ndarray]:
    """Every logged token's walk, E of at most K steps, later steps last and zeros before, as d3rlpy pads them.

    observations (E, K, F), actions, rewards, returns_to_go, terminals (E, K, 1), timesteps, masks (E, K); float32.
    """
    data = task.transitions
    ends = np.flatnonzero(data["terminals"])
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    longest = int(lengths.max())
    back = np.arange(longest)[::-1]  # steps before the last
    rows, real = ends[:, None] - back, back < lengths[:, None]  # (E, K)
    rewards = np.where(real, data["rewards"][rows], 0.0)
    columns = {
        "observations": np.where(real[..., None], data["observations"][rows], 0.0),
        "actions": np.where(real, data["actions"][rows], 0)[..., None],
        "rewards": rewards[..., None],
        "returns_to_go": np.where(real, rewards[:, ::-1].cumsum(1)[:, ::-1], 0.0)[..., None],
        "terminals": (real & data["terminals"][rows])[..., None],
        "timesteps": np.where(real, lengths[:, None] - back, 0),
        "masks": real,
    }
    return {name: column.astype(np.float32) for name, column in columns.items()}
