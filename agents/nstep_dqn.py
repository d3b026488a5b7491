"""n-step DQN: the agent of the paper (sections 3.2 and 4.1). Its noisy network is in noisy_network.py.

1. Explore: 200 episodes by the untrained noisy network, logged to an HDF5 trajectory file.
2. Learn: replay that file, keep playing, one update every 4 agent steps on 32 replayed transitions.
   With `--offline FILE`, learn from a trajectory file alone instead; with `--finetune-episodes N` also, then play on.

Every token is a stopping problem of its own: an exit has `discount` 0, so targets never reach beyond it.

    python -m agents.nstep_dqn --env-id LEDE-Tiny-v0 --out runs/nstep_dqn
    python -m agents.nstep_dqn --offline runs/nstep_dqn/exploration.h5 --out runs/offline
    python -m agents.nstep_dqn --offline runs/nstep_dqn/exploration.h5 --finetune-episodes 100 --out runs/both
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agents.noisy_network import Adam, NoisyMLP, backward, forward
from agents.task import BATCH, Board, Task, record_history
from lede_env.arguments import clear_errors
from lede_env.data.trajectory_file import Episode, Trajectories, TrajectoryWriter, read_trajectories
from lede_env.engine.signals import select_features
from lede_env.errors import LedeError
from lede_env.policies import EXIT, MLPPolicy, made_for
from lede_env.recording import make_player_envs, play, run_attributes


@dataclass
class Args:
    """Train the paper's agent. (lost): our copy of the paper lost the value, the default is our choice."""

    env_id: str = "LEDE-Tiny-v0"  # environment to learn on
    # its keyword arguments, e.g. --env-kwargs backend trace task code
    env_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    num_envs: int = 8  # episodes played side by side, one model forward for all
    offline: Path | None = None  # learn from this trajectory file alone, without an environment
    out: Path = Path("runs/nstep_dqn")  # folder for exploration.h5, history.csv, policy/, TensorBoard's files
    overwrite: bool = False  # replace what an earlier run left in `out`
    seed: int = 1  # one seed reproduces a run bit for bit on the CPU
    features: Literal["paper", "extended"] = "extended"  # what the policy observes (in Python also a tuple of names)

    exploration_episodes: int = 200  # episodes before any learning (paper: 200)
    online_episodes: int = 200  # episodes played while learning
    offline_updates: int = 20_000  # updates with --offline
    finetune_episodes: int = 0  # with --offline: episodes of env_id played while learning on, after these updates

    # length of the n-step targets (lost). They are not corrected for the policy that collected the data, whose later
    # actions they value with n > 1. In the sweep's short trainings n = 2 is no worse, and steadier over seeds
    n_step: int = 1
    gamma: float = 0.99  # discount factor (lost)
    learning_rate: float = 1e-3  # of Adam (lost)
    sigma: float = 0.5  # initial scale of the parameter noise (lost; the NoisyNet paper's value)
    hidden: int = 64  # width of the two hidden layers (paper: "a small MLP")
    batch_size: int = 32  # transitions an update (paper: 32)
    update_every: int = 4  # agent steps, over all environments, to one update (paper: 4)
    target_every: int = 512  # updates to one copy into the target network (paper: 512 "steps", read as updates)
    buffer_size: int = 200_000  # transitions kept for replay, or as many as were logged where that is more

    def __post_init__(self) -> None:
        counts = ("num_envs", "exploration_episodes", "offline_updates", "n_step", "hidden", "batch_size")
        for name in (*counts, "update_every", "target_every", "buffer_size"):
            if getattr(self, name) < 1:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.finetune_episodes and not self.offline:
            raise LedeError("finetune_episodes follow a file; give one as offline, or set online_episodes")
        for name in ("seed", "online_episodes", "finetune_episodes", "sigma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 0")
        if not 0.0 <= self.gamma <= 1.0:
            raise LedeError(f"gamma={self.gamma}; expected a number in [0, 1]")
        if not 0.0 < self.learning_rate < math.inf:
            raise LedeError(f"learning_rate={self.learning_rate}; expected a positive number")


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


def transitions(
    data: Mapping[str, np.ndarray], observe: Callable[[np.ndarray], np.ndarray], before_last: int, n: int, gamma: float
) -> dict[str, np.ndarray]:
    """n-step transitions of whole episodes, arrays as in a trajectory file; observe: what the network sees of them.

    before_last: the last candidate layer but one, whose `continue` leads to where the exit is forced (0: nowhere).
    """
    observations = observe(data["observations"])  # (T, F)
    ends = np.zeros(len(observations), bool)
    ends[[*data["episode_starts"][1:].astype(np.int64) - 1, -1]] = True
    next_observations = np.roll(observations, -1, axis=0)
    next_observations[ends] = observe(data["final_observations"])
    discounts = np.where(data["terminals"], 0.0, data["discount"])
    returns, factor, last = n_step_targets(data["rewards"], discounts, ends, n, gamma)
    # At the last candidate either action exits: being there is worth Q(exit) (`next_forced`), and the sums above hold
    # that exit's reward whichever action was logged. The decoder also asks there whether to draft on; to it `continue`
    # declines, worth 0. So a row that chose `continue` there (forced) teaches that 0, one that chose exit its reward.
    returns[data["forced"]] = factor[data["forced"]] = 0
    return {
        "observations": observations,
        "actions": data["actions"].astype(np.int64),
        "returns": returns,
        "factor": factor,
        "next_observations": next_observations[last],
        # Told by the step that led there, a `continue` where factor > 0: an episode's final observation has no row.
        "next_forced": data["layer"][last] == before_last,
    }


class ReplayBuffer:
    """A ring of transitions, holding those of `batch` to begin with (at most `capacity`)."""

    def __init__(self, capacity: int, batch: Mapping[str, np.ndarray]) -> None:
        self.arrays = {name: np.zeros((capacity, *a.shape[1:]), a.dtype) for name, a in batch.items()}
        self.capacity, self.size, self.position = capacity, 0, 0
        self.add(batch)

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Append transitions, overwriting the oldest."""
        count = len(batch["actions"])
        slots = (self.position + np.arange(count)) % self.capacity
        for name, array in self.arrays.items():
            array[slots] = batch[name]
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows = rng.integers(self.size, size=count)
        return {name: array[rows] for name, array in self.arrays.items()}


def td_gradient(
    network: NoisyMLP, target: np.ndarray, batch: Mapping[str, np.ndarray], noise: np.ndarray, target_noise: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean squared n-step TD error (section 3.2), and its gradient (2, P) by the means and the sigmas.

    target: (2, P) the target network's parameters; it values the state reached: by the greedy action, or a forced exit.
    """
    next_q, _ = forward(network.layers(target[0] + target[1] * target_noise), batch["next_observations"])
    next_values = np.where(batch["next_forced"], next_q[:, EXIT], next_q.max(axis=1))  # (B,)
    goals = batch["returns"] + batch["factor"] * next_values
    layers = network.layers(network.parameters[0] + network.parameters[1] * noise)
    q, inputs = forward(layers, batch["observations"])
    taken = np.arange(len(q)), batch["actions"]
    errors = q[taken] - goals
    delta = np.zeros_like(q)
    delta[taken] = 2 / len(q) * errors
    gradient = np.empty_like(network.parameters)
    backward(layers, inputs, delta, network.layers(gradient[0]))
    np.multiply(gradient[0], noise, out=gradient[1])  # parameters = mean + sigma * noise
    return float(np.mean(errors**2)), gradient


class Learner:
    """Network, target network, optimiser and replay buffer: acts, and updates from replay.

    available: names of all features that observations come with; attributes: as in a trajectory file's header.
    """

    def __init__(self, args: Args, available: Sequence[str], attributes: Mapping[str, Any]) -> None:
        self.args, self.rng = args, np.random.default_rng(args.seed)
        self.features = select_features(args.features, attributes["mdp"])
        # See `transitions`. The draft MDP forces no exit.
        self.before_last = (0, *attributes["candidate_layers"])[-2] if attributes["mdp"] == "exit" else 0
        lacking = [name for name in self.features if name not in available]
        if lacking:
            raise LedeError(f"features={args.features!r} needs {lacking}, but the log has only {tuple(available)}; "
                            "record it again")  # fmt: skip
        self.columns = [available.index(name) for name in self.features]
        self.mean, self.std = np.zeros(len(self.columns), np.float32), np.ones(len(self.columns), np.float32)
        self.network = NoisyMLP(len(self.columns), args.hidden, args.sigma, self.rng)
        self.optimizer = Adam(self.network.parameters, args.learning_rate)
        self.buffer: ReplayBuffer | None = None  # none before `start`
        self.steps, self.updates = 0, 0  # since `start`
        self.losses: deque[float] = deque(maxlen=args.target_every)  # the newest

    def start(self, data: Trajectories) -> None:
        """From logged trajectories take the normaliser and the buffer's first content; make the target network."""
        logged = data["observations"][:, self.columns].astype(np.float64)
        std = logged.std(axis=0)
        self.mean, self.std = (a.astype(np.float32) for a in (logged.mean(axis=0), np.where(std > 1e-6, std, 1)))
        batch = transitions(data.arrays, self.observe, self.before_last, self.args.n_step, self.args.gamma)
        self.buffer = ReplayBuffer(max(self.args.buffer_size, len(logged)), batch)
        self.target = self.network.parameters.copy()

    def observe(self, observations: np.ndarray) -> np.ndarray:
        """(N, all features) -> (N, F) what the network sees: the selected ones, normalised."""
        return (observations[:, self.columns] - self.mean) / self.std

    def remember(self, episode: Episode) -> None:
        """Put a finished episode into the buffer."""
        tables = {"episode_starts": np.zeros(1, int), "final_observations": episode.final_observation[None]}
        data = vars(episode) | tables  # as a file of this episode alone
        self.buffer.add(transitions(data, self.observe, self.before_last, self.args.n_step, self.args.gamma))

    def act(self, observations: np.ndarray, numbers: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Greedy actions of one draw of the noisy network, as `lede_env.recording.play` asks for them.

        Their log-probability is known before `start` (see `NoisyMLP`). After it, the updates due come first.
        """
        logprob = math.log(0.5)
        if self.buffer is not None:
            logprob = math.nan
            self.steps += int((numbers >= 0).sum())  # environments with an episode to play
            self.update(self.steps // self.args.update_every - self.updates)
        mean, sigma = self.network.parameters
        layers = self.network.layers(mean + sigma * self.network.noise(self.rng))
        q, _ = forward(layers, self.observe(observations))
        return q.argmax(axis=1), np.full(len(q), logprob)

    def update(self, count: int) -> None:
        """`count` gradient steps on replayed transitions."""
        for _ in range(count):
            batch = self.buffer.sample(self.args.batch_size, self.rng)
            noise, target_noise = self.network.noise(self.rng), self.network.noise(self.rng)
            loss, gradient = td_gradient(self.network, self.target, batch, noise, target_noise)
            self.optimizer.step(gradient)
            self.losses.append(loss)
            self.updates += 1
            if self.updates % self.args.target_every == 0:
                self.target[:] = self.network.parameters


def episode_metrics(episode: Episode) -> dict[str, float]:
    """Undiscounted return, tokens, acceptance rate and mean exit layer of one prompt's continuation."""
    exits = episode.accepted >= 0  # at least one: a prompt ends with a token's exit
    return {
        "return": float(episode.rewards.sum()),
        "tokens": int(exits.sum()),
        "acceptance": float(episode.accepted[exits].mean()),
        "exit_layer": float(episode.layer[exits].mean()),
    }


COLUMNS = ("episode", "phase", "tokens", "return", "acceptance", "exit_layer", "loss", "updates")


@dataclass
class TrainResult:
    """What a run leaves: the policy (also in `out`/policy) and the history (also in `out`/history.csv).

    A row of history has COLUMNS. It is an episode, of phase "explore" or "online", the first without a loss; offline
    (phase "offline") it is a block of updates, with the loss alone.
    """

    policy: MLPPolicy
    history: list[dict[str, Any]]


def train(args: Args, progress: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Run the stages and save the policy; `progress` is called with every row of the history.

    Nothing is written, nor anything of an earlier run replaced, before environment and file are found to be good.
    """
    check_out(args)
    data, envs, history = None, None, []
    with ExitStack() as stack:
        if args.offline:
            data = read_log(args.offline)
            attributes, available = data.attributes, data.attributes["features"]
        if data is None or args.finetune_episodes:
            envs = stack.enter_context(closing(make_player_envs(args.env_id, args.num_envs, **args.env_kwargs)))
        if data is None:
            attributes = run_attributes(envs, env_id=args.env_id, seed=args.seed, policy="untrained noisy network")
            available = envs.unwrapped.features
        elif envs is not None:
            check_same_problem(args, data, envs)
        learner = Learner(args, available, attributes)
        board = stack.enter_context(closing(Board(args.out / "tensorboard")))
        log = stack.enter_context(record_history(args.out, COLUMNS, board, history, progress))
        if data is None:
            data = explore(learner, envs, attributes, log)
            learner.start(data)
        else:
            learner.start(data)
            learn_offline(learner, log)
        if envs is not None:
            learner.steps = learner.updates * args.update_every  # the schedule goes on from here
            episodes = args.finetune_episodes if args.offline else args.online_episodes
            play_and_learn(learner, envs, data.n_episodes + np.arange(episodes), log)
    policy = export_policy(learner, attributes)
    policy.save(args.out / "policy")
    return TrainResult(policy, history)


def check_out(args: Args) -> None:
    """Raise a LedeError if `out` holds an earlier run that is not to be replaced."""
    names = ("history.csv", "policy") if args.offline else ("history.csv", "policy", "exploration.h5")
    earlier = [name for name in names if (args.out / name).exists()]
    if earlier and not args.overwrite:
        raise LedeError(
            f"out={str(args.out)!r} holds {', '.join(earlier)} of an earlier run; choose another folder, or pass "
            "--overwrite to replace it"
        )


def read_log(path: Path) -> Trajectories:
    """A trajectory file to learn from; a LedeError if it holds nothing."""
    data = read_trajectories(path)
    if not data.n_episodes:
        raise LedeError(f"{path} holds no episodes; go on with its recording by --resume, or give another file")
    return data


def check_same_problem(args: Args, data: Trajectories, envs: Any) -> None:
    """Raise a LedeError unless the environment to play on in is the one that was logged."""
    here = {**envs.unwrapped.attributes, "features": list(envs.unwrapped.features)}
    for name in ("mdp", "model_fingerprint", "candidate_layers", "features"):
        if here[name] != data.attributes[name]:
            what = f"{name}={data.attributes[name]}, but {args.env_id} {here[name]}"
            raise LedeError(f"{args.offline} has {what}; give the env_id it was logged in")


def explore(learner: Learner, envs: Any, attributes: Mapping[str, Any], log: Callable[..., None]) -> Trajectories:
    """Play the untrained noisy network's episodes into `out`/exploration.h5, and read them back."""
    args, core, path = learner.args, envs.unwrapped, learner.args.out / "exploration.h5"
    path.unlink(missing_ok=True)  # an earlier run's, see `check_out`
    with TrajectoryWriter(path, attributes, core.prompt_ids, core.features) as writer:
        for _, episode in play(envs, learner.act, range(args.exploration_episodes), args.seed):
            writer.append(episode)
            log(phase="explore", **episode_metrics(episode), updates=0)
    return read_trajectories(path)


def learn_offline(learner: Learner, log: Callable[..., None]) -> None:
    """All updates from the file alone."""
    args = learner.args
    while learner.updates < args.offline_updates:
        learner.update(min(args.target_every, args.offline_updates - learner.updates))
        log(phase="offline", loss=float(np.mean(learner.losses)), updates=learner.updates)


def play_and_learn(learner: Learner, envs: Any, numbers: Sequence[int], log: Callable[..., None]) -> None:
    """Play the episodes of these numbers, updating on the way; what ends goes into the replay buffer."""
    for _, episode in play(envs, learner.act, numbers, learner.args.seed):
        learner.remember(episode)
        loss = float(np.mean(learner.losses or math.nan))
        log(phase="online", **episode_metrics(episode), loss=loss, updates=learner.updates)


class NStepDQN:
    """This agent on the leaderboard: from the file alone, for as many transitions as the other agents."""

    learns_from = "data"
    grid: tuple[dict[str, Any], ...] = (
        {"n_step": 1, "learning_rate": 1e-3, "sigma": 0.5},
        {"n_step": 1, "learning_rate": 3e-3, "sigma": 0.5},
    )

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def train(self, task: Task) -> MLPPolicy:
        args = Args(features=task.features, seed=task.seed, **self.settings)
        updates = task.updates * BATCH // args.batch_size
        learner = Learner(args, task.attributes["features"], task.attributes)
        learner.start(task.dataset)
        for part in range(1, 6):
            learner.update(updates * part // 5 - learner.updates)
            task.report(learner.updates, export_policy(learner, task.attributes), float(np.mean(learner.losses)))
        return export_policy(learner, task.attributes)


def export_policy(learner: Learner, attributes: Mapping[str, Any]) -> MLPPolicy:
    """The mean network as a policy; attributes: those of the trajectories it learned from."""
    layers = learner.network.layers(learner.network.parameters[0])
    settings = {
        name: value for name, value in asdict(learner.args).items() if name not in ("out", "overwrite", "offline")
    }
    return MLPPolicy(
        weights=tuple(layer[:-1].T.copy() for layer in layers),
        biases=tuple(layer[-1].copy() for layer in layers),
        mean=learner.mean,
        std=learner.std,
        features=learner.features,
        training={"agent": "nstep_dqn", "updates": learner.updates, "args": settings},
        **made_for(attributes),
    )


def main() -> None:
    """Train from the command line, with a progress bar."""
    import tyro
    from rich.console import Console

    from lede_env.display.progress import progress_bar

    args = tyro.cli(Args)
    episodes = args.exploration_episodes + args.online_episodes
    total = args.offline_updates if args.offline else episodes
    with progress_bar(Console()) as bar:
        task = bar.add_task("start", total=total)

        def show(row: dict[str, Any]) -> None:
            text = "  ".join(f"{key} {value:.2f}" for key, value in row.items() if isinstance(value, float))
            done = row["updates"] if args.offline else row["episode"] + 1
            bar.update(task, completed=done, description=f"{row['phase']}: {text}")

        train(args, show)
    print(f"policy: {args.out / 'policy'}, history: {args.out / 'history.csv'}")


if __name__ == "__main__":
    with clear_errors():
        main()
