"""The policies that log the datasets: the best static setting, an expert, a learner's checkpoints.

- static: of all fixed settings, the one of the highest return on the training prompts, at each temperature.
- expert: full information. On a trace what every decision leads to is known, so the advantage of exiting over
  continuing, under the policy as it stands, is exact; a network learns it from what a policy observes, and the
  advantages are computed anew (fitted policy iteration). The iteration that is best on the validation prompts stays.
- replay: a DQN that plays epsilon-greedily in blocks of episodes, its network fixed within a block, and learns after
  each from all of its episodes on training prompts. `medium` is the first network half-way between static and expert on
  the validation prompts; the blocks before it are the dataset `medium-replay`.

Expert and learner are trained on greedy texts, and log the variants at a temperature too.

    python -m agents.collectors    # writes lede_env/models/tiny/collectors, from which `lede dataset make` makes all
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from agents.advantages import draft_advantages, draft_questions
from agents.network import Network, normaliser
from lede_env.arguments import clear_errors
from lede_env.data.trajectory_file import Episode
from lede_env.display.progress import progress_bar
from lede_env.errors import LedeError
from lede_env.offline.scoring import Bench
from lede_env.offline.tiers import COLLECTORS, PROBLEMS, TIERS, Problem, static_policy
from lede_env.oracles import DraftTable, ExitTable, ask
from lede_env.policies import EpsilonGreedy, ExitPolicy, MLPPolicy, made_for
from lede_env.recording import make_player_envs, play, policy_act


@dataclass
class Args:
    """Make the collectors of both MDPs of the embedded model."""

    out: Path = COLLECTORS  # a folder an MDP, with a policy folder each and collectors.json
    seed: int = 0  # of the networks; one seed gives the same files on one CPU thread (OMP_NUM_THREADS=1)
    epsilon: float = 0.1  # share of coins that static, medium and expert toss
    hidden: tuple[int, ...] = (64, 64)  # sizes of the hidden layers

    iterations: int = 3  # of the expert
    updates: int = 1500  # of its network, an iteration
    batch_size: int = 2048
    learning_rate: float = 2e-3  # of Adam, falling to a twentieth
    off_path: float = 0.1  # weight of states that the expert as it stands does not visit

    block: int = 48  # episodes that the learner plays with one network
    blocks: int = 40  # after which it gives up
    anneal: int = 8  # blocks over which its epsilon falls from 1 to `epsilon`
    exit_updates: int = 20  # of the learner's network after a block, batches of 256: few, so that it passes half-way
    draft_updates: int = 200  # slowly; on the exit MDP that is soon
    replay_rate: float = 2e-4  # of its Adam
    target_every: int = 50  # updates to one copy into its target network


def score_of(bench: Bench, policy: ExitPolicy, args: Args) -> float:
    """Normalised, of what a policy does in a dataset: with `epsilon` coins."""
    return bench.score(bench.returns(EpsilonGreedy(policy, args.epsilon)))


# --- static


def best_static(bench: Bench) -> dict[str, int]:
    """The fixed setting of the highest return."""
    mdp = bench.table.mdp
    if isinstance(bench.table, ExitTable):
        settings = [{"layer": layer} for layer in mdp.candidate_layers]
    else:
        cap = bench.table.mdp.cap
        settings = [
            {"layer": layer, "speculation": drafts, "cap": cap}
            for layer in mdp.candidate_layers
            for drafts in range(2, cap + 1)
        ]
    return max(settings, key=lambda setting: bench.returns(static_policy(setting)).mean())


# --- expert


@dataclass(frozen=True)
class States:
    """Where a policy may be asked, (S,) each but the observations (S, F)."""

    observations: np.ndarray
    advantage: np.ndarray  # of exiting over continuing, both followed by the policy
    visited: np.ndarray  # whether the policy comes there from some start


def exit_states(table: ExitTable, exits: np.ndarray) -> States:
    """Under decisions (X, T, C) of the exit MDP."""
    value = table.chance * table.if_accepted + (1 - table.chance) * table.if_rejected  # (X, T, C) of leaving
    last, after = exits.shape[-1] - 1, value[..., -1]
    advantages = np.zeros(exits.shape)
    for candidate in reversed(range(last)):
        advantages[..., candidate] = value[..., candidate] - after
        after = np.where(exits[..., candidate] > 0.5, value[..., candidate], after)
    reached = np.cumprod(np.concatenate([np.ones_like(exits[..., :1]), 1 - exits[..., :-1]], -1), -1) > 0.5
    there = table.texts.there
    parts = [(table.observations(c, there), advantages[..., c][there], reached[..., c][there]) for c in range(last)]
    return States(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def draft_states(table: DraftTable, exits: np.ndarray, rate: float) -> States:
    """Under decisions (X, T, C, K) of the draft MDP whose policy earns `rate` a token.

    The text is given, so what a round is worth is its reward less `rate` for every token that it emits: the tokens
    left to later rounds are worth the rate each.
    """
    advantages, reached = draft_advantages(table, exits, table.reward - rate * table.emitted)
    parts = [
        (table.observations(k, asked), advantages[..., k - 1][asked], reached[..., k - 1][asked])
        for k, asked in draft_questions(table)
    ]
    return States(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def states_of(table: ExitTable | DraftTable, policy: ExitPolicy) -> States:
    """All states, under a policy that is asked in all of them (`table.decisions` asks where it comes to)."""
    features = table.backend.features
    if isinstance(table, ExitTable):
        exits = np.zeros(table.chance.shape)
        for candidate in range(exits.shape[-1]):
            seen = table.observations(candidate, table.texts.there)
            exits[table.texts.there, candidate] = ask(policy, features, seen)
        return exit_states(table, exits)
    exits = np.zeros(table.nodes.shape)
    for k, asked in draft_questions(table):
        exits[asked, k - 1] = ask(policy, features, table.observations(k, asked))
    totals = table.play(exits)
    return draft_states(table, exits, float(totals["returns"].sum() / totals["emitted"].sum()))


def train_expert(args: Args, train: Bench, validation: Bench, start: ExitPolicy) -> Iterator[tuple[float, MLPPolicy]]:
    """Fitted policy iteration from a policy; yields (validation score with `epsilon` coins, policy)."""
    policy: ExitPolicy = start
    for iteration in range(args.iterations):
        states = states_of(train.table, policy)
        network = Network(args.hidden, 1, *normaliser(states.observations), args.seed)
        weights = np.where(states.visited, 1.0, args.off_path)
        network.fit(states.observations, states.advantage, weights, args.updates, args.batch_size, args.learning_rate)
        about = {"agent": "collectors: expert", "iteration": iteration}
        policy = network.export(train.env.attributes, train.env.features, about)
        yield score_of(validation, policy, args), policy


# --- replay


class Learner:
    """A DQN on whole episodes: one-step targets, `discount` included, and a target network.

    A token emitted is paid for by what the newest block earned a token. On the exit MDP that changes nothing: every
    exit emits one. On the draft MDP it makes rounds of different lengths comparable, as in average-reward learning
    (Schwartz, 1993): the text is given, so a round is worth what it earns above the rate.
    """

    def __init__(self, args: Args, env: Any, first: list[Episode]):
        self.args, self.env = args, env
        self.episodes: list[Episode] = []
        seen = np.concatenate([episode.observations for episode in first])
        self.network = Network(args.hidden, 2, *normaliser(seen), args.seed)
        self.target = Network(args.hidden, 2, self.network.mean, self.network.std, args.seed)
        self.optimizer = torch.optim.Adam(self.network.layers.parameters(), args.replay_rate)

    def learn(self, block: list[Episode]) -> None:
        """The updates after a block, on all episodes so far."""
        self.episodes += block
        columns = {name: self._column(name) for name in ("observations", "actions", "rewards", "discount")}
        x, actions, rewards, discount = (torch.from_numpy(column) for column in columns.values())
        following = [np.vstack([e.observations[1:], e.final_observation[None]]) for e in self.episodes]
        x, after = self.network.inputs(x.numpy()), self.network.inputs(np.concatenate(following))
        actions, discount = actions.long(), discount * ~torch.from_numpy(self._column("terminals"))
        emitted = [tokens_emitted(episode, self.env.attributes["max_new_tokens"]) for episode in self.episodes]
        rate = sum(e.rewards.sum() for e in block) / sum(tokens.sum() for tokens in emitted[-len(block) :])
        rewards = rewards - float(rate) * torch.from_numpy(np.concatenate(emitted))
        drafting = self.env.attributes["mdp"] == "draft"
        for update in range(self.args.draft_updates if drafting else self.args.exit_updates):
            if update % self.args.target_every == 0:
                self.target.layers.load_state_dict(self.network.layers.state_dict())
            rows = torch.randint(len(actions), (256,))
            with torch.no_grad():
                goals = rewards[rows] + discount[rows] * self.target.layers(after[rows]).max(1).values
            q = self.network.layers(x[rows]).gather(1, actions[rows, None])[:, 0]
            loss = (q - goals).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(episode, name) for episode in self.episodes])

    def policy(self) -> MLPPolicy:
        about = {"agent": "collectors: replay", "episodes": len(self.episodes)}
        return self.network.export(self.env.attributes, self.env.features, about)


def tokens_emitted(episode: Episode, most: int) -> np.ndarray:
    """(T,) float32 tokens that each action of an episode emitted; after an EOS within a round, one too many."""
    last = int(episode.token_index[-1]) + max(int(episode.accepted[-1]), 0) + 1
    ends = np.append(episode.token_index[1:].astype(np.int64), most if episode.timeouts[-1] else last)
    return (ends - episode.token_index).astype(np.float32)


def train_replay(
    args: Args, problem: Problem, validation: Bench, half_way: float
) -> Iterator[tuple[float, float, MLPPolicy]]:
    """Yields a block's (epsilon, validation score with `epsilon` coins, policy); the last has come half-way.

    The episodes are those that `lede dataset make` plays of `medium-replay`.
    """
    envs: Any = make_player_envs(problem.env_id, args.block, **problem.env_kwargs)
    core, seed = envs.unwrapped, list(TIERS).index("medium-replay")
    training = set(core.attributes["prompt_splits"]["train"])
    learner: Learner | None = None
    policy = MLPPolicy.random(core.features, args.hidden, args.seed)  # its epsilon is 1: it is never asked
    policy = replace(policy, **made_for(core.attributes))
    try:
        for block in range(args.blocks):
            epsilon = round(max(args.epsilon, 1 - block * (1 - args.epsilon) / args.anneal), 6)
            score = score_of(validation, policy, args)
            yield epsilon, score, policy
            if score >= half_way and block:
                return
            act = policy_act(EpsilonGreedy(policy, epsilon), core.features, seed)
            numbers = range(block * args.block, (block + 1) * args.block)
            played = [e for _, e in play(envs, act, numbers, seed) if int(e.prompt_id[0]) in training]
            learner = learner or Learner(args, core, played)
            learner.learn(played)
            policy = learner.policy()
    finally:
        envs.close()
    raise LedeError(f"after {args.blocks} blocks the learner is not half-way ({half_way:.1f}); give it more updates")


def make_collectors(args: Args, problem: Problem, report: Callable[[str], None]) -> dict[str, Any]:
    """Write an MDP's policies and its collectors.json; returns what that says."""
    folder = args.out / problem.mdp
    train, validation = Bench.of(problem, "train"), Bench.of(problem, "validation")
    static = best_static(train)
    settings = {f"{problem.temperature:g}": static}
    for variant in PROBLEMS.values():
        if variant.mdp == problem.mdp and variant != problem:
            settings[f"{variant.temperature:g}"] = best_static(Bench.of(variant, "train"))
    scores = {"static": score_of(validation, static_policy(static), args)}
    report(f"static {settings}: {scores['static']:.1f}")
    best: tuple[float, MLPPolicy | None] = (-np.inf, None)
    for score, policy in train_expert(args, train, validation, static_policy(static)):
        report(f"expert: {score:.1f}")
        best = max(best, (score, policy), key=lambda pair: pair[0])
    scores["expert"], expert = best
    half_way = (scores["static"] + scores["expert"]) / 2
    checkpoints: list[tuple[float, float, MLPPolicy]] = []
    for checkpoint in train_replay(args, problem, validation, half_way):
        report(f"replay, block {len(checkpoints)}: {checkpoint[1]:.1f}, half-way is {half_way:.1f}")
        checkpoints.append(checkpoint)
    scores["medium"], medium = checkpoints.pop()[1:]
    shutil.rmtree(folder, ignore_errors=True)
    expert.save(folder / "expert")
    medium.save(folder / "medium")
    for number, (_, _, policy) in enumerate(checkpoints):
        policy.save(folder / f"replay-{number:02d}")
    values = {
        "epsilon": args.epsilon,
        "static": settings,
        "replay_epsilons": [epsilon for epsilon, _, _ in checkpoints],
        "block": args.block,
        "command": "python -m agents.collectors",
        "validation": {name: round(score, 3) for name, score in scores.items()},
    }
    (folder / "collectors.json").write_text(json.dumps(values, indent=1) + "\n")
    return values


def main(args: Args) -> None:
    console = Console()
    with progress_bar(console) as bar:
        for problem in (PROBLEMS["tiny"], PROBLEMS["tiny-draft"]):
            task = bar.add_task(problem.mdp, total=None)

            def report(line: str, task: Any = task, mdp: str = problem.mdp) -> None:
                bar.console.print(f"{mdp}: {line}", highlight=False)
                bar.advance(task)

            make_collectors(args, problem, report)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
