"""agents.nstep_dqn: targets by hand, the noisy layer, and learning on a toy whose optimum is known."""

import csv
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from agents import nstep_dqn
from agents.nstep_dqn import (
    Adam,
    Args,
    NoisyMLP,
    ReplayBuffer,
    forward,
    n_step_targets,
    td_gradient,
    train,
    transitions,
)
from agents.task import Board
from lede_env.data.trajectory_file import TrajectoryWriter, read_trajectories
from lede_env.errors import LedeError
from lede_env.policies import load_policy

LAYERS, N_LAYERS = (2, 4, 6), 8
FEATURES = ("confidence", "entropy", "trace", "layer", "margin", "top1", "match", "echo")
NEVER = 8  # a token on which every candidate layer is wrong


class ToyExit(VectorEnv):
    """Each token is right from some layer on, and `confidence` tells (below 0.5: right). The rest is noise."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012
    features, prompt_ids = FEATURES, ["toy-0", "toy-1", "toy-2"]
    attributes = {  # noqa: RUF012
        "mdp": "exit",
        "model_name": "toy",
        "model_fingerprint": "toy0",
        "n_layers": N_LAYERS,
        "candidate_layers": list(LAYERS),
    }

    def __init__(self, num_envs: int, tokens: int = 8, **_) -> None:
        self.num_envs, self.tokens = num_envs, tokens
        self.single_observation_space = gym.spaces.Box(-9, 9, (len(FEATURES),), np.float32)
        self.single_action_space = gym.spaces.Discrete(2)
        self.rngs = [np.random.default_rng(0)] * num_envs
        self.prompts = np.full(num_envs, "", dtype=object)
        self.token, self.candidate, self.right_from = (np.zeros(num_envs, int) for _ in range(3))

    def reset(self, *, seed, options):
        for i in np.flatnonzero(options["reset_mask"]):
            self.rngs[i], self.prompts[i] = np.random.default_rng(seed[i]), options["prompt_ids"][i]
            self.token[i] = 0
            self._next_token(i)
        return self._observe(), self._infos()

    def _next_token(self, i):
        self.candidate[i], self.right_from[i] = 0, self.rngs[i].choice((*LAYERS, NEVER))

    def _observe(self):
        draws = [(rng.normal(size=len(FEATURES)), rng.uniform(0, 0.4)) for rng in self.rngs]
        x = np.array([noise for noise, _ in draws], np.float32).clip(-9, 9)
        layer = np.array(LAYERS)[self.candidate]
        x[:, 0] = np.array([u for _, u in draws]) + 0.6 * (layer < self.right_from)
        x[:, 3] = layer / N_LAYERS
        return x

    def _infos(self):
        return {
            "prompt_id": self.prompts.copy(),
            "token_index": self.token.copy(),
            "layer": np.array(LAYERS)[self.candidate],
        }

    def step(self, actions):
        last, layer = self.candidate == len(LAYERS) - 1, np.array(LAYERS)[self.candidate]
        exits = (actions == 1) | last
        accepted = exits & (layer >= self.right_from)
        rewards = np.where(accepted, 2 - layer / N_LAYERS, np.where(exits, -1.0, -0.05))
        outcome = {
            "discount": 1.0 - exits,
            "cost": np.full(self.num_envs, 0.1),
            "forced": last & (actions == 0),
            "accepted": accepted,
            "_accepted": exits,
        }
        self.token += exits
        self.candidate += ~exits
        for i in np.flatnonzero(exits):
            self._next_token(i)
        over = self.token == self.tokens
        return self._observe(), rewards, np.zeros(self.num_envs, bool), over, self._infos() | outcome


@pytest.fixture(scope="module", autouse=True)
def toy_id():
    gym.register("LedeToy-v0", vector_entry_point=ToyExit)
    yield "LedeToy-v0"
    del gym.registry["LedeToy-v0"]


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    monkeypatch.setattr(nstep_dqn, "Board", lambda folder: Board(None))


def toy_args(folder, **changes) -> Args:
    args = Args(env_id="LedeToy-v0", out=folder, exploration_episodes=60, online_episodes=150, n_step=1)
    return replace(args, **changes)


# --- targets


def test_n_step_sums_stop_at_a_token_exit():
    rewards = np.array([-0.05, -0.05, 1.5, -0.05, -1.0])
    discounts = np.array([1.0, 1.0, 0.0, 1.0, 0.0])  # two tokens: rows 0-2 and 3-4
    ends = np.array([False, False, False, False, True])
    returns, factor, last = n_step_targets(rewards, discounts, ends, n=2, gamma=0.9)
    np.testing.assert_allclose(returns, [-0.05 - 0.045, -0.05 + 1.35, 1.5, -0.05 - 0.9, -1.0], rtol=1e-6)
    np.testing.assert_allclose(factor, [0.81, 0.0, 0.0, 0.0, 0.0], rtol=1e-6)
    assert last[0] == 1  # bootstraps from the state after row 1


def test_n_longer_than_a_token_never_reaches_the_next():
    returns, factor, _ = n_step_targets(
        np.array([-0.05, 1.5, 100.0]),
        np.array([1.0, 0.0, 0.0]),
        np.array([False, False, True]),
        n=50,
        gamma=1.0,
    )
    np.testing.assert_allclose(returns, [1.45, 1.5, 100.0], rtol=1e-6)
    assert (factor == 0).all()


BEFORE_LAST = LAYERS[-2]  # a `continue` there leads to the last candidate


def episode_arrays(terminal: bool = False) -> dict:
    """Two episodes, cut inside a token: a token left at the last candidate by force and one on its way; one step."""
    return {
        "observations": np.array([[i, 9.0] for i in range(6)], np.float32),
        "final_observations": np.array([[10.0, 9.0], [20.0, 9.0]], np.float32),
        "episode_starts": np.array([0, 5], np.uint64),
        "layer": np.array([2, 4, 6, 2, 4, 2], np.uint8),
        "actions": np.zeros(6, np.uint8),
        "rewards": np.array([1.0, 2.0, 8.0, 1.0, 4.0, 16.0], np.float32),
        "discount": np.array([1, 1, 0, 1, 1, 1], np.float32),
        "forced": np.array([False, False, True, False, False, False]),
        "terminals": np.array([False, False, False, False, terminal, False]),
        "timeouts": np.array([False, False, False, False, not terminal, True]),
    }


def first_column(observations: np.ndarray) -> np.ndarray:
    return observations[:, :1]


def test_one_step_bootstraps_from_the_next_row():
    batch = transitions(episode_arrays(), first_column, BEFORE_LAST, n=1, gamma=0.5)
    np.testing.assert_allclose(batch["returns"], [1, 2, 0, 1, 4, 16])
    np.testing.assert_allclose(batch["factor"], [0.5, 0.5, 0, 0.5, 0.5, 0.5])
    reached = batch["factor"] > 0
    np.testing.assert_allclose(batch["next_observations"][reached, 0], [1, 2, 4, 10, 20])
    assert batch["next_forced"][reached].tolist() == [False, True, False, True, False]


def test_two_steps_reach_the_last_candidate():
    batch = transitions(episode_arrays(), first_column, BEFORE_LAST, n=2, gamma=0.5)
    assert (batch["returns"][0], batch["factor"][0]) == (1 + 0.5 * 2, 0.25)
    assert batch["next_observations"][0, 0] == 2 and batch["next_forced"][0]


def test_truncation_bootstraps_from_the_final_observation():
    batch = transitions(episode_arrays(), first_column, BEFORE_LAST, n=3, gamma=0.5)
    np.testing.assert_allclose(batch["returns"][3:], [1 + 0.5 * 4, 4, 16])
    np.testing.assert_allclose(batch["factor"][3:], [0.25, 0.5, 0.5])  # gamma to the number of steps really taken
    np.testing.assert_allclose(batch["next_observations"][3:, 0], [10, 10, 20])
    assert batch["next_forced"][3:].tolist() == [True, True, False]  # final observations at layers 6, 6 and 4


def test_termination_never_bootstraps():
    batch = transitions(episode_arrays(terminal=True), first_column, BEFORE_LAST, n=3, gamma=0.5)
    np.testing.assert_allclose(batch["returns"][3:], [3, 4, 16])
    np.testing.assert_allclose(batch["factor"][3:], [0, 0, 0.5])


def test_continue_at_the_last_candidate_teaches_0_and_the_rows_before_the_exit_it_forced():
    data = episode_arrays()
    batch = transitions(data, first_column, BEFORE_LAST, n=3, gamma=0.5)
    np.testing.assert_allclose(batch["returns"][:3], [1 + 0.5 * 2 + 0.25 * 8, 2 + 0.5 * 8, 0])
    np.testing.assert_allclose(batch["factor"][:3], 0)
    assert batch["actions"][2] == 0
    data["actions"][2], data["forced"][2] = 1, False  # the same exit by choice
    chosen = transitions(data, first_column, BEFORE_LAST, n=3, gamma=0.5)
    np.testing.assert_allclose(chosen["returns"][:3], [4, 6, 8])
    np.testing.assert_allclose(chosen["factor"][:3], 0)
    assert chosen["actions"][2] == 1


def test_being_at_the_last_candidate_is_worth_the_exit():
    network = NoisyMLP(1, 4, 0.5, np.random.default_rng(0))
    network.parameters[:] = 0
    target = network.parameters.copy()
    network.layers(target[0])[-1][-1] = 5, 2  # Q(continue), Q(exit) everywhere
    batch = {
        "observations": np.zeros((2, 1), np.float32),
        "actions": np.array([0, 0]),
        "returns": np.array([1, 1], np.float32),
        "factor": np.array([0.5, 0.5], np.float32),
        "next_observations": np.zeros((2, 1), np.float32),
        "next_forced": np.array([False, True]),
    }
    loss, gradient = td_gradient(network, target, batch, *np.zeros_like(target))
    goals = 1 + 0.5 * 5, 1 + 0.5 * 2
    assert loss == pytest.approx((goals[0] ** 2 + goals[1] ** 2) / 2)
    np.testing.assert_allclose(network.layers(gradient[0])[-1][-1], [-sum(goals), 0])


@pytest.mark.parametrize(
    ("mdp", "candidates", "before_last"), [("exit", [2, 4, 6], 4), ("exit", [4], 0), ("draft", [2, 4, 6], 0)]
)
def test_only_the_exit_mdp_forces_and_only_after_a_continue(tmp_path, mdp, candidates, before_last):
    attributes = {**ToyExit.attributes, "mdp": mdp, "candidate_layers": candidates}
    learner = nstep_dqn.Learner(toy_args(tmp_path, features="paper"), FEATURES, attributes)
    assert learner.before_last == before_last


def test_replay_ring_overwrites_the_oldest():
    batch = {"actions": np.arange(3), "returns": np.arange(3.0)}
    buffer = ReplayBuffer(5, batch)
    buffer.add({"actions": np.arange(3, 7), "returns": np.arange(3.0, 7.0)})
    assert sorted(buffer.arrays["actions"]) == [2, 3, 4, 5, 6]
    sample = buffer.sample(64, np.random.default_rng(0))
    assert set(sample["actions"].tolist()) == {2, 3, 4, 5, 6}
    np.testing.assert_array_equal(sample["actions"], sample["returns"])


# --- the noisy network and its gradient


def torch_q(vectors: torch.Tensor, f_noise: list[torch.Tensor], shapes, x: torch.Tensor) -> torch.Tensor:
    """The definition of Fortunato et al. (2018), layer by layer: vectors (2, P), f_noise f(e_in), f(e_out) a layer."""
    start = 0
    for i, (rows, outputs) in enumerate(shapes):
        mean, sigma = (v[start : start + rows * outputs].view(rows, outputs) for v in vectors)
        e_in, e_out = f_noise[i]
        weight = mean[:-1] + sigma[:-1] * torch.outer(e_in, e_out)
        x = (torch.relu(x) if i else x) @ weight + mean[-1] + sigma[-1] * e_out
        start += rows * outputs
    return x


def f_noise_of(draw: np.ndarray, shapes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same Gaussian draw as `NoisyMLP.noise`, split and passed through f(e) = sign(e) sqrt(|e|)."""
    f = torch.from_numpy(np.sign(draw) * np.sqrt(np.abs(draw)))
    pairs = []
    for rows, outputs in shapes:
        pairs.append((f[: rows - 1], f[rows : rows + outputs]))
        f = f[rows + outputs :]
    return pairs


def random_network() -> NoisyMLP:
    network = NoisyMLP(3, 8, 0.5, np.random.default_rng(0))
    network.parameters += np.random.default_rng(1).normal(0, 0.1, network.parameters.shape)
    return network


def test_initial_parameters():
    network = NoisyMLP(4, 16, 0.5, np.random.default_rng(0))
    means, sigmas = (network.layers(vector) for vector in network.parameters)
    assert [mean.shape for mean in means] == [(5, 16), (17, 16), (17, 2)]
    for inputs, mean, sigma in zip((4, 16, 16), means, sigmas, strict=True):
        assert np.abs(mean).max() <= inputs**-0.5
        np.testing.assert_allclose(sigma, 0.5 * inputs**-0.5, rtol=1e-6)
    assert np.abs(means[0]).max() > 0.4 and (means[2] == 0).all()


def test_loss_and_gradient_are_those_of_torch():
    network, target = random_network(), random_network().parameters * np.float32(0.7)
    rng, n = np.random.default_rng(2), sum(map(sum, network.shapes))
    draws = [np.random.default_rng(seed).standard_normal(n, np.float32) for seed in (5, 6)]
    noise, target_noise = (network.noise(np.random.default_rng(seed)) for seed in (5, 6))
    batch = {
        "observations": rng.normal(size=(32, 3)).astype(np.float32),
        "actions": rng.integers(2, size=32),
        "returns": rng.normal(size=32).astype(np.float32),
        "factor": rng.choice(np.array([0.0, 0.9], np.float32), 32),
        "next_observations": rng.normal(size=(32, 3)).astype(np.float32),
        "next_forced": rng.random(32) < 0.5,
    }
    loss, gradient = td_gradient(network, target, batch, noise, target_noise)

    t = {name: torch.from_numpy(array) for name, array in batch.items()}
    vectors = torch.from_numpy(network.parameters.copy()).requires_grad_()
    f_noise, f_target = (f_noise_of(draw, network.shapes) for draw in draws)
    next_q = torch_q(torch.from_numpy(target), f_target, network.shapes, t["next_observations"])
    q = torch_q(vectors, f_noise, network.shapes, t["observations"])
    next_values = torch.where(t["next_forced"], next_q[:, 1], next_q.max(dim=1).values)
    goals = t["returns"] + t["factor"] * next_values
    expected = torch.nn.functional.mse_loss(q.gather(1, t["actions"][:, None])[:, 0], goals)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, vectors.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_adam_is_torchs():
    rng = np.random.default_rng(0)
    parameters, gradients = rng.normal(size=(2, 7)), rng.normal(size=(20, 2, 7))
    reference = torch.from_numpy(parameters.copy()).requires_grad_()
    ours, theirs = Adam(parameters, 1e-2), torch.optim.Adam([reference], lr=1e-2)
    for gradient in gradients:
        ours.step(gradient)
        reference.grad = torch.from_numpy(gradient)
        theirs.step()
    np.testing.assert_allclose(parameters, reference.detach().numpy(), rtol=1e-9)


def test_noise_is_factorised_with_the_moments_of_f():
    """f(e) = sign(e) sqrt(|e|) has mean 0 and variance E|e| = sqrt(2 / pi); a weight's noise is a product of two."""
    network, rng = NoisyMLP(3, 4, 0.5, np.random.default_rng(0)), np.random.default_rng(1)
    samples = np.stack([network.layers(network.noise(rng))[1] for _ in range(4000)])  # (S, 5, 4)
    weights, biases = samples[:, :-1], samples[:, -1]
    assert abs(samples.mean(axis=0)).max() < 0.06
    np.testing.assert_allclose(weights.var(axis=0), 2 / math.pi, atol=0.08)
    np.testing.assert_allclose(biases.var(axis=0), math.sqrt(2 / math.pi), atol=0.06)
    assert np.linalg.matrix_rank(weights[0]) == 1


def test_without_noise_it_is_the_mean_network():
    network, x = random_network(), np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32)
    mean = network.layers(network.parameters[0])
    h = np.maximum(x @ mean[0][:-1] + mean[0][-1], 0)
    h = np.maximum(h @ mean[1][:-1] + mean[1][-1], 0)
    np.testing.assert_allclose(forward(mean, x)[0], h @ mean[2][:-1] + mean[2][-1], rtol=1e-5)


# --- the whole run


def toy_return(policy) -> float:
    """Exact mean reward a token: over the hidden layer, and over the noise by sampling."""
    rng, total, samples = np.random.default_rng(0), 0.0, 200
    for right_from in (*LAYERS, NEVER):
        walking = np.ones(samples, bool)
        for layer in LAYERS:
            x = rng.normal(size=(samples, len(FEATURES))).astype(np.float32)
            x[:, 0] = rng.uniform(0, 0.4, samples) + 0.6 * (layer < right_from)
            x[:, 3] = layer / N_LAYERS
            columns = [FEATURES.index(name) for name in policy.features]
            leave = walking & ((policy.exit_probability(x[:, columns]) > 0.5) | (layer == LAYERS[-1]))
            total += np.sum(leave) * (2 - layer / N_LAYERS if layer >= right_from else -1.0)
            walking &= ~leave
            total -= 0.05 * walking.sum()
    return total / samples / 4


OPTIMUM = (1.75 + 1.45 + 1.15 - 1.1) / 4  # exit as soon as `confidence` says right


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_id):
    folder, rows = tmp_path_factory.mktemp("dqn"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nstep_dqn, "Board", lambda folder: Board(None))
        result = train(toy_args(folder), progress=rows.append)
    return folder, result, rows


def test_learns_the_toy_online(finished):
    _, result, _ = finished
    assert toy_return(result.policy) > OPTIMUM - 0.05
    returns = {phase: [r["return"] for r in result.history if r["phase"] == phase] for phase in ("explore", "online")}
    assert np.mean(returns["online"][-30:]) > np.mean(returns["explore"]) + 0.25 * 8  # 8 tokens an episode


def test_history_reaches_the_callback_and_the_csv(finished):
    folder, result, rows = finished
    assert rows == result.history and len(rows) == 210
    with (folder / "history.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["phase"] for row in table] == ["explore"] * 60 + ["online"] * 150
    assert [float(row["return"]) for row in table] == [row["return"] for row in rows]
    last = rows[-1]
    assert 0 <= last["acceptance"] <= 1 and 2 <= last["exit_layer"] <= 6 and last["loss"] > 0


def test_exploration_log_is_a_trajectory_file(finished):
    data = read_trajectories(finished[0] / "exploration.h5")
    assert data.n_episodes == 60 and data.attributes["model_fingerprint"] == "toy0"
    exits = data["discount"] == 0
    assert exits.sum() == 60 * 8
    assert ((data["accepted"] >= 0) == exits).all()
    assert (data["layer"] / N_LAYERS == data["observations"][:, 3]).all()  # decisions, not where they lead
    np.testing.assert_array_equal(data["forced"], (data["layer"] == 6) & (data["actions"] == 0))
    expected = np.where(data["accepted"] == 1, 2 - data["layer"] / N_LAYERS, -1.0)
    np.testing.assert_allclose(data["rewards"][exits], expected[exits], rtol=1e-6)
    np.testing.assert_allclose(data["behaviour_logprob"], math.log(0.5), rtol=1e-6)
    for layer in LAYERS:  # the untrained noisy network is a fair coin, whatever is observed
        for certain in (True, False):
            rows = (data["layer"] == layer) & ((data["observations"][:, 0] < 0.5) == certain)
            assert abs(data["actions"][rows].mean() - 0.5) < 4 * 0.5 / math.sqrt(rows.sum())


def test_learns_the_toy_offline(finished, tmp_path):
    result = train(Args(offline=finished[0] / "exploration.h5", out=tmp_path, offline_updates=2500, n_step=1))
    assert toy_return(result.policy) > OPTIMUM - 0.1
    assert [row["updates"] for row in result.history] == [512, 1024, 1536, 2048, 2500]
    assert result.policy.model_fingerprint == "toy0" and result.policy.candidate_layers == LAYERS


def test_goes_on_by_playing_after_the_file(finished, tmp_path):
    args = Args(offline=finished[0] / "exploration.h5", out=tmp_path, offline_updates=600, n_step=1)
    tuned = replace(args, env_id="LedeToy-v0", finetune_episodes=30)
    result = train(tuned)
    assert [row["phase"] for row in result.history] == ["offline"] * 2 + ["online"] * 30
    offline, online = result.history[1]["updates"], [row["updates"] for row in result.history[2:]]
    steps = 30 * 8 * 1.5  # of 30 episodes of 8 tokens, a walk being 1 to 3 decisions
    assert offline == 600 and online == sorted(online)
    assert 600 + 0.5 * steps / 4 < online[-1] < 600 + 2 * steps / 4  # one update every 4 steps from there on
    assert toy_return(result.policy) > toy_return(train(replace(args, offline_updates=1, overwrite=True)).policy)


def test_playing_on_elsewhere_than_logged_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ToyExit, "attributes", {**ToyExit.attributes, "candidate_layers": [2, 4]})
    args = Args(offline=finished[0] / "exploration.h5", out=tmp_path, env_id="LedeToy-v0", offline_updates=1)
    with pytest.raises(LedeError, match=r"candidate_layers=\[2, 4, 6\], but LedeToy-v0 \[2, 4\]"):
        train(replace(args, finetune_episodes=1))
    with pytest.raises(LedeError, match="finetune_episodes follow a file"):
        Args(finetune_episodes=1)


def test_declines_at_the_last_candidate_what_is_likely_wrong(finished):
    """What the decoder asks there; in the environment either answer exits."""
    x = np.random.default_rng(0).normal(size=(400, len(FEATURES))).astype(np.float32)
    x[:, 3] = LAYERS[-1] / N_LAYERS
    for wrong in (False, True):
        x[:, 0] = np.linspace(0, 0.4, 400) + 0.6 * wrong
        assert (finished[1].policy.exit_probability(x) == (not wrong)).mean() > 0.95


def test_next_forced_agrees_with_the_layers_of_the_log(finished):
    data = read_trajectories(finished[0] / "exploration.h5")
    batch = transitions(data.arrays, first_column, BEFORE_LAST, n=1, gamma=1.0)
    inside = np.flatnonzero(batch["factor"] > 0)  # the row behind is the next decision on the same token
    np.testing.assert_array_equal(batch["next_forced"][inside], data["layer"][inside + 1] == LAYERS[-1])
    assert batch["next_forced"][inside].any() and not batch["next_forced"][inside].all()


def test_a_file_of_one_episode_is_enough(tmp_path):
    train(toy_args(tmp_path / "a", exploration_episodes=1, online_episodes=0))
    result = train(Args(offline=tmp_path / "a" / "exploration.h5", out=tmp_path / "b", offline_updates=5))
    assert result.history[-1]["updates"] == 5 and np.isfinite(result.history[-1]["loss"])


def test_a_file_without_episodes_is_named(tmp_path):
    TrajectoryWriter(tmp_path / "empty.h5", ToyExit.attributes, ["toy-0"], FEATURES).close()
    with pytest.raises(LedeError, match=r"empty\.h5 holds no episodes.*--resume"):
        train(Args(offline=tmp_path / "empty.h5", out=tmp_path))


def test_one_seed_is_one_run(tmp_path):
    short = toy_args(tmp_path, exploration_episodes=10, online_episodes=10)
    runs = [train(replace(short, out=tmp_path / str(i), seed=seed)) for i, seed in enumerate((3, 3, 4))]
    files = [(tmp_path / str(i) / "policy" / "policy.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] and files[0] != files[2]
    assert runs[0].history == runs[1].history
    logs = [read_trajectories(tmp_path / str(i) / "exploration.h5")["observations"] for i in range(2)]
    np.testing.assert_array_equal(*logs)


def test_exported_policy_acts_as_the_mean_network(tmp_path):
    learner = nstep_dqn.Learner(toy_args(tmp_path, features="paper"), FEATURES, ToyExit.attributes)
    learner.network.parameters += np.random.default_rng(0).normal(0, 0.3, learner.network.parameters.shape)
    learner.mean, learner.std = np.array([2, 1, 0.5], np.float32), np.array([3, 0.1, 1], np.float32)
    nstep_dqn.export_policy(learner, ToyExit.attributes).save(tmp_path)
    policy = load_policy(tmp_path)
    assert policy.features == ("confidence", "entropy", "trace")
    x = np.random.default_rng(0).normal(2, 3, size=(2000, 6)).astype(np.float32)
    mean = learner.network.layers(learner.network.parameters[0])
    q, _ = forward(mean, learner.observe(x))
    np.testing.assert_allclose(policy.q_values(x[:, :3]), q, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(policy.exit_probability(x[:, :3]), q.argmax(axis=1))


def test_an_earlier_run_is_kept_until_its_end_is_asked_for(tmp_path):
    short = toy_args(tmp_path, exploration_episodes=2, online_episodes=1)
    train(short)
    before = (tmp_path / "history.csv").read_text()
    with pytest.raises(LedeError, match=r"holds history\.csv, policy, exploration\.h5 of an earlier run.*--overwrite"):
        train(short)
    again = replace(short, overwrite=True)
    for bad in (dict(env_id="LedeNone-v0"), dict(offline=tmp_path / "absent.h5"), dict(features=("nothing",))):
        with pytest.raises(LedeError):
            train(replace(again, **bad))
        assert (tmp_path / "history.csv").read_text() == before and (tmp_path / "exploration.h5").is_file()
    train(replace(again, seed=2))
    assert (tmp_path / "history.csv").read_text() != before


@pytest.mark.parametrize(
    "change",
    [
        {"n_step": 0},
        {"gamma": 1.5},
        {"num_envs": 0},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"sigma": -0.1},
        {"sigma": math.nan},
        {"online_episodes": -1},
    ],
    ids=str,
)
def test_bad_arguments_are_named(change):
    with pytest.raises(LedeError, match=next(iter(change))):
        Args(**change)


def test_a_log_without_the_features_is_refused(tmp_path):
    with pytest.raises(LedeError, match=r"needs \['match', 'echo'\]"):
        nstep_dqn.Learner(toy_args(tmp_path, features="extended"), FEATURES[:6], ToyExit.attributes)
