"""n-step DQN with noisy layers: the agent of the paper (sections 3.2 and 4.1), in one file.

1. Explore: 200 episodes by the freshly initialised noisy network, logged to an HDF5 trajectory file.
2. Learn: replay that file, keep playing, one update every 4 agent steps on 32 replayed transitions.
   With `--offline FILE`, learn from a trajectory file alone instead.

Every token is a stopping problem of its own: an exit carries `discount` 0, so n-step sums and bootstraps end there.

    python -m agents.nstep_dqn --env-id LEDE-Tiny-v0 --out runs/nstep_dqn
    python -m agents.nstep_dqn --offline runs/nstep_dqn/exploration.h5 --out runs/offline
"""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn

import lede_env  # noqa: F401  (registers the environments)
from lede_env.data.trajectory_file import Episode, TrajectoryWriter, read_trajectories
from lede_env.engine.signals import select_features
from lede_env.errors import LedeError
from lede_env.policies import EXIT, MLPPolicy


@dataclass
class Args:
    """Train the paper's agent. Values that our copy of the paper lost are marked (lost): choose your own."""

    env_id: str = "LEDE-Tiny-v0"
    """environment to learn on"""
    env_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    """keyword arguments of the environment, e.g. --env-kwargs backend trace task code"""
    num_envs: int = 8
    """episodes played side by side, one model forward for all of them"""
    offline: Path | None = None
    """learn from this trajectory file alone, without an environment"""
    out: Path = Path("runs/nstep_dqn")
    """folder for exploration.h5, history.csv, policy/ and TensorBoard's files"""
    seed: int = 1
    """one seed reproduces a run bit for bit on the CPU"""
    features: Literal["paper", "extended"] = "extended"
    """what the policy observes; the file logs every feature whatever is chosen here"""

    exploration_episodes: int = 200
    """episodes before any learning (paper: 200)"""
    explore: Literal["noisy", "coin"] = "noisy"
    """noisy: the initial noisy network acts (the paper), so the logged behaviour_logprob is unknown (NaN);
    coin: a fair coin decides, so it is known"""
    online_episodes: int = 200
    """episodes played while learning"""
    offline_updates: int = 20_000
    """updates with --offline"""

    n_step: int = 3
    """length of the n-step targets (lost). The sum is not corrected for the policy that collected the data: on
    random data a large n evaluates random play, 1 is unbiased. No token has more steps than candidate layers"""
    gamma: float = 0.99
    """discount factor (lost)"""
    learning_rate: float = 1e-3
    """of Adam (lost)"""
    sigma: float = 0.5
    """initial scale of the parameter noise (lost; the NoisyNet paper's value)"""
    hidden: int = 64
    """width of the two hidden layers ("a small MLP")"""
    batch_size: int = 32
    """transitions an update (paper: 32)"""
    update_every: int = 4
    """agent steps, over all environments, to one update (paper: 4)"""
    target_every: int = 512
    """updates to one copy of the network into the target network (paper: 512 "steps", read as updates)"""
    buffer_size: int = 200_000
    """transitions kept for replay; never less than what exploration logged"""


# ---------------------------------------------------------------- network


class NoisyLinear(nn.Module):
    """Linear layer with learned, factorised Gaussian noise on its parameters (Fortunato et al., 2018).

    ``y = (W + W_sigma * f(e_out) f(e_in)^T) x + b + b_sigma * f(e_out)`` with ``f(e) = sign(e) sqrt(|e|)``.
    The caller draws f(e), so that one call draws it for all layers; without it the layer is ``W x + b``.
    """

    def __init__(self, inputs: int, outputs: int, sigma: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma * bound))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma * bound))

    def forward(self, x: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: (B, inputs), noise: f(e_in) (inputs,) and f(e_out) (outputs,) -> (B, outputs)."""
        if noise is None:
            return F.linear(x, self.weight, self.bias)
        noise_in, noise_out = noise
        weight = torch.addcmul(self.weight, self.weight_sigma, noise_out[:, None] * noise_in)
        return F.linear(x, weight, torch.addcmul(self.bias, self.bias_sigma, noise_out))


class QNetwork(nn.Module):
    """Normalised observations -> Q(continue), Q(exit): two hidden layers, every layer noisy."""

    def __init__(self, n_features: int, hidden: int, sigma: float) -> None:
        super().__init__()
        sizes = list(pairwise((n_features, hidden, hidden, 2)))
        self.layers = nn.ModuleList(NoisyLinear(inputs, outputs, sigma) for inputs, outputs in sizes)
        self.noise_sizes = [size for pair in sizes for size in pair]  # in, out, in, out, ...
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))

    def sample_noise(self) -> tuple[Tensor, ...]:
        """f(e) for the inputs and outputs of every layer, from one draw."""
        noise = torch.randn(sum(self.noise_sizes))
        return (noise.sign() * noise.abs().sqrt()).split(self.noise_sizes)

    def forward(self, observations: Tensor, noise: tuple[Tensor, ...] | None = None) -> Tensor:
        """(B, n_features) -> (B, 2). Without noise: the mean network, which is what a policy keeps."""
        x = (observations - self.mean) / self.std
        for i, layer in enumerate(self.layers):
            x = F.relu(x) if i else x
            x = layer(x, None if noise is None else (noise[2 * i], noise[2 * i + 1]))
        return x

    def set_normaliser(self, observations: np.ndarray) -> None:
        """Normalise by the mean and deviation of these observations (N, n_features); constant ones are kept."""
        std = observations.std(axis=0, dtype=np.float64)
        self.mean.copy_(torch.from_numpy(observations.mean(axis=0, dtype=np.float64)))
        self.std.copy_(torch.from_numpy(np.where(std > 1e-6, std, 1.0)))


# ---------------------------------------------------------------- targets and replay


def n_step_targets(
    rewards: np.ndarray, discounts: np.ndarray, ends: np.ndarray, n: int, gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fold each step's next n rewards, never beyond the end of its token or episode.

    rewards, discounts, ends: (T,) steps of whole episodes one after another; discounts is 0 where nothing may
    follow (a token's exit, a terminal state), `ends` marks the last step of each episode.
    Returns (T,) arrays: the discounted reward sums, the factor on the value of the state reached (0: none),
    and the index of the last step taken; the state reached is that step's next observation.
    """
    first = np.arange(len(rewards))
    returns, factor, last = np.zeros(len(rewards)), np.ones(len(rewards)), first.copy()
    open_ = np.ones(len(rewards), bool)  # the window has not met the end of its episode
    for k in range(n):
        last[open_] = first[open_] + k
        step = last[open_]
        returns[open_] += factor[open_] * rewards[step]
        factor[open_] *= gamma * discounts[step]
        open_[open_] = ~ends[step]
    return returns.astype(np.float32), factor.astype(np.float32), last


def transitions(data: Mapping[str, np.ndarray], columns: list[int], n: int, gamma: float) -> dict[str, np.ndarray]:
    """n-step transitions of whole episodes, from the arrays of a trajectory file; columns: features observed."""
    observations = data["observations"][:, columns]  # (T, F)
    ends = np.zeros(len(observations), bool)
    ends[[*data["episode_starts"][1:].astype(np.int64) - 1, -1]] = True
    next_observations = np.roll(observations, -1, axis=0)
    next_observations[ends] = data["final_observations"][:, columns]
    discounts = np.where(data["terminals"], 0.0, data["discount"])
    returns, factor, last = n_step_targets(data["rewards"], discounts, ends, n, gamma)
    return {
        "observations": observations,
        "actions": data["actions"].astype(np.int64),
        "returns": returns,
        "factor": factor,
        "next_observations": next_observations[last],
    }


class ReplayBuffer:
    """A ring of n-step transitions."""

    def __init__(self, capacity: int, n_features: int) -> None:
        self.arrays = {
            "observations": np.zeros((capacity, n_features), np.float32),
            "actions": np.zeros(capacity, np.int64),
            "returns": np.zeros(capacity, np.float32),
            "factor": np.zeros(capacity, np.float32),
            "next_observations": np.zeros((capacity, n_features), np.float32),
        }
        self.capacity, self.size, self.position = capacity, 0, 0

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Append transitions (at most `capacity` at once), overwriting the oldest."""
        count = len(batch["actions"])
        slots = (self.position + np.arange(count)) % self.capacity
        for name, array in self.arrays.items():
            array[slots] = batch[name]
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, count: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = rng.integers(self.size, size=count)
        return {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}


# ---------------------------------------------------------------- learning


def td_loss(network: QNetwork, target: QNetwork, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared n-step TD error; the target network picks and values the greedy action (section 3.2)."""
    with torch.no_grad():
        next_values = target(batch["next_observations"], target.sample_noise()).amax(dim=1)  # (B,)
        goals = batch["returns"] + batch["factor"] * next_values
    values = network(batch["observations"], network.sample_noise())  # (B, 2)
    return F.mse_loss(values.gather(1, batch["actions"][:, None])[:, 0], goals)


class Learner:
    """Network, target network, optimiser and replay buffer: acts, and updates from replay."""

    def __init__(self, args: Args, n_features: int) -> None:
        torch.manual_seed(args.seed)
        self.args, self.rng, self.updates = args, np.random.default_rng(args.seed), 0
        self.network = QNetwork(n_features, args.hidden, args.sigma)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=args.learning_rate, fused=True)

    def learn_from(self, batch: Mapping[str, np.ndarray]) -> None:
        """Start learning: the normaliser, the buffer and the target network from the first transitions."""
        observations = batch["observations"]
        self.network.set_normaliser(observations)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.buffer = ReplayBuffer(max(self.args.buffer_size, len(observations)), observations.shape[1])
        self.buffer.add(batch)

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """Greedy actions (N,) of one draw of the noisy network."""
        with one_thread():
            values = self.network(torch.from_numpy(observations), self.network.sample_noise())
            return values.argmax(dim=1).numpy()

    def update(self, count: int) -> list[float]:
        """`count` gradient steps; returns their losses."""
        losses = []
        with one_thread():
            for _ in range(count):
                loss = td_loss(self.network, self.target, self.buffer.sample(self.args.batch_size, self.rng))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.updates += 1
                if self.updates % self.args.target_every == 0:
                    self.target.load_state_dict(self.network.state_dict())
                losses.append(loss.item())
        return losses


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors of 64 numbers gain nothing from threads, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- playing


def play(
    envs: VectorEnv, act: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int, logprob: float = math.nan
) -> Iterator[list[Episode]]:
    """Play, yielding after every step of all environments the episodes that it finished.

    The first `episodes` to *start* are the ones reported, so that short ones are not favoured. `act` maps all
    features (N, F) to actions (N,); logprob: what to log as the log-probability of every action.
    """
    observations, infos = envs.reset(seed=seed)
    started = envs.num_envs
    number = np.arange(started)  # of the episode that each environment plays
    rows: list[list[dict[str, Any]]] = [[] for _ in number]
    remaining = episodes
    while remaining:
        actions = act(observations)
        next_observations, rewards, terminals, timeouts, next_infos = envs.step(actions)
        done = terminals | timeouts
        finished = []
        for i in np.flatnonzero(number < episodes):
            outcome = next_infos["final_info"] if done[i] else next_infos
            exited = "_accepted" in outcome and bool(outcome["_accepted"][i])
            rows[i].append(
                {
                    "observations": observations[i],
                    "actions": actions[i],
                    "rewards": rewards[i],
                    "terminals": terminals[i],
                    "timeouts": timeouts[i] and not terminals[i],
                    "discount": outcome["discount"][i],
                    "layer": infos["layer"][i],
                    "phase": 1,
                    "token_index": infos["token_index"][i],
                    "prompt_id": infos["prompt_id"][i],
                    "accepted": int(outcome["accepted"][i]) if exited else -1,
                    "forced": outcome["forced"][i],
                    "behaviour_logprob": logprob,
                    "cost": outcome["cost"][i],
                }
            )
            if done[i]:
                columns = {name: np.array([row[name] for row in rows[i]]) for name in rows[i][0]}
                finished.append(Episode(**columns, final_observation=next_infos["final_obs"][i]))
        for i in np.flatnonzero(done):
            rows[i], number[i] = [], started
            started += 1
        remaining -= len(finished)
        observations, infos = next_observations, next_infos
        yield finished


def episode_metrics(episode: Episode) -> dict[str, float]:
    """Undiscounted return, tokens, acceptance rate and mean exit layer of one prompt's continuation."""
    exits = episode.accepted >= 0
    return {
        "return": float(episode.rewards.sum()),
        "tokens": int(exits.sum()),
        "acceptance": float(episode.accepted[exits].mean()) if exits.any() else math.nan,
        "exit_layer": float(episode.layer[exits].mean()) if exits.any() else math.nan,
    }


# ---------------------------------------------------------------- training


@dataclass
class TrainResult:
    """What a run leaves: the policy (also in `out`/policy) and one row of numbers an episode (history.csv)."""

    policy: MLPPolicy
    history: list[dict[str, Any]]


def describe(envs: VectorEnv) -> dict[str, Any]:
    """What a policy must know of the model and the MDP it was trained on."""
    if envs.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise LedeError(
            f"{envs} has autoreset mode {envs.metadata.get('autoreset_mode')}; learning needs SAME_STEP"
        )
    env = envs.unwrapped
    names = ("mdp", "candidate_layers", "n_layers", "model_fingerprint", "model_name")
    return {name: getattr(env, name) for name in names}


class Run:
    """The stages of one run, which share a learner, a history and an output folder."""

    def __init__(self, args: Args, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.args, self.progress = args, progress
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        args.out.mkdir(parents=True, exist_ok=True)
        self.scalars = summary_writer(args.out / "tensorboard")

    def log(self, phase: str, metrics: Mapping[str, float], losses: list[float]) -> None:
        """One row of history: an episode, or a block of offline updates."""
        row = {"episode": len(self.history), "phase": phase, "steps": self.steps, "updates": self.learner.updates}
        row |= metrics | {"loss": float(np.mean(losses)) if losses else math.nan}
        self.history.append(row)
        if self.scalars:
            for name in ("return", "acceptance", "exit_layer", "loss"):
                if not math.isnan(row[name]):
                    self.scalars.add_scalar(f"{phase}/{name}", row[name], row["episode"])
        if self.progress:
            self.progress(row)

    def explore(self, envs: VectorEnv, description: Mapping[str, Any]) -> Path:
        """Log `exploration_episodes` to exploration.h5."""
        args, rng = self.args, np.random.default_rng(self.args.seed)
        path = args.out / "exploration.h5"
        path.unlink(missing_ok=True)
