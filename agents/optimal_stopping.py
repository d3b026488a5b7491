"""Optimal stopping with full information: our own agent for the draft MDP, trained on traces alone.

A trace knows what would have come of every decision, so no exploration and no bootstrapping are needed. At every state
a round can be in, and for the policy as it stands, the *advantage* of exiting over continuing is known exactly, its
later decisions included. A small network learns that advantage from what can be observed, the policy becomes greedy
on the network, and the advantages are computed anew (Longstaff and Schwartz, 2001; fitted policy iteration).

What a round is worth is the reward `throughput`: tokens emitted - rho * its modelled cost, every decision paid for;
rho is the policy's own rate, renewed with it (Dinkelbach), so that the fixed point maximises tokens per second.

    python -m agents.optimal_stopping --traces tiny-greedy-v0 tiny-t0.6-v0 --out runs/optimal_stopping
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from lede_env.arguments import clear_errors
from lede_env.data.registry import load_trace
from lede_env.data.trace_file import Trace
from lede_env.display.progress import progress_bar
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import CostModel, load_cost_model
from lede_env.engine.round import DRAFT_CAP
from lede_env.engine.signals import select_features
from lede_env.envs.draft_trace import DraftTraceBackend
from lede_env.errors import LedeError
from lede_env.policies import CONTINUE, EXIT, MLPPolicy


@dataclass
class Args:
    """Train on traces; the policy of the iteration that is fastest on their validation prompts is kept."""

    traces: tuple[str, ...] = ("tiny-greedy-v0", "tiny-t0.6-v0")  # names or files; all count alike
    cost_model: str = "tiny-cpu"  # what time costs
    features: tuple[str, ...] = (  # what the policy observes
        "margin", "layer", "match", "echo", "phase", "position", "doubt", "temperature",
    )  # fmt: skip
    out: Path = Path("runs/optimal_stopping")  # folder for history.csv and policy/
    seed: int = 1  # one seed reproduces a run bit for bit on one CPU thread (OMP_NUM_THREADS=1)

    iterations: int = 8  # of: advantages, fit, new policy
    updates: int = 1500  # of the network in each
    batch_size: int = 4096
    hidden: tuple[int, ...] = (64,)  # sizes of the hidden layers
    learning_rate: float = 2e-3  # of Adam, falling linearly to a twentieth
    off_path: float = 0.1  # weight of states that the policy as it stands does not visit

    def __post_init__(self) -> None:
        for name in ("iterations", "updates", "batch_size"):
            if getattr(self, name) < 1:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 1")


class Rounds:
    """Every round that could be played on some texts of a trace, as arrays.

    N rows (a round may start at each), C candidates, K = cap drafts. State (n, c, k): the round began at row n, and the
    draft in view is its k + 1-st, at candidate c.
    """

    def __init__(self, trace: Trace, split: str, features: tuple[str, ...], costs: CostModel):
        header, prompts = trace.header, trace.prompts_of("all", split)
        layers, tokens = header.candidate_layers, header.max_new_tokens
        sampling = Sampling(header.temperature, header.top_k, header.top_p)
        backend = DraftTraceBackend(trace, prompts, 1, tokens, sampling, layers, features, DRAFT_CAP)
        rows, self.starts = _rows(trace, prompts)  # of the trace; where each text begins among them, and the end
        begin = np.repeat(self.starts[:-1], np.diff(self.starts))
        left = tokens - (np.arange(len(rows)) - begin)  # (N,) tokens the budget still allows
        self.limit = np.clip(left - 1, 0, DRAFT_CAP)  # (N,) most drafts
        cells = rows[:, None] * len(layers) + np.arange(len(layers))  # (N, C) nodes of the backend's graph
        node = np.full((*cells.shape, DRAFT_CAP), -1)  # (N, C, K); -1: no such draft
        node[:, :, 0] = cells
        for k in range(1, DRAFT_CAP):
            node[:, :, k] = np.where(node[:, :, k - 1] >= 0, backend.after[node[:, :, k - 1]], -1)
        draft = np.broadcast_to(np.arange(1, DRAFT_CAP + 1), node.shape)
        cell = np.broadcast_to(cells[:, :, None], node.shape)
        self.observations = backend.observe(np.maximum(node, 0), cell, draft)  # (N, C, K, F)
        self.most = np.minimum((node >= 0).sum(-1), self.limit[:, None])  # (N, C) drafts until verification is forced
        drafts = np.arange(DRAFT_CAP + 1)
        accepted = np.minimum(backend.run[cells][:, :, None], drafts)
        self.emitted = np.minimum(accepted + 1, backend.left[cells][:, :, None])  # (N, C, K + 1), cut after an EOS
        # (C, K + 1) cost of a round with so many drafts, its checks at the candidates before included
        self.cost = np.array([[costs.round(e, d, checks=c, decisions=0) for d in drafts] for c, e in enumerate(layers)])
        self.decision = costs.walk(0, 0, 1)

    def choose(self, advantage: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N, C, K) advantages of exiting -> (N,) candidate, drafts and decisions of the round from each row."""
        rows = np.arange(len(self.limit))
        exits = advantage[:, :, 0] > 0
        exits[:, -1] = True
        candidate = exits.argmax(1)
        by_choice = advantage[rows, candidate, 0] > 0
        most, drafts = self.most[rows, candidate], np.minimum(self.limit, 1)
        silent = (candidate == advantage.shape[1] - 1) & (most == 1)  # at the last candidate, nothing to choose
        decisions = candidate + 1 - silent
        drafting = by_choice & (most > 1)
        for k in range(1, DRAFT_CAP):
            drafts = drafts + drafting
            asked = drafting & (most > k + 1)
            decisions = decisions + asked
            drafting = asked & (advantage[rows, candidate, k] > 0)
        return candidate, drafts, np.where(self.limit, decisions, 0)

    def rate(self, advantage: np.ndarray) -> float:
        """Tokens per autoregressive step's worth of time: the modelled speedup of the policy."""
        candidate, drafts, decisions = self.choose(advantage)
        emitted = self.emitted[np.arange(len(drafts)), candidate, drafts]
        cost = np.where(self.limit, self.cost[candidate, drafts] + decisions * self.decision, 1.0)
        tokens = spent = 0.0
        for begin, end in pairwise(self.starts.tolist()):
            row = begin
            while row < end:
                tokens, spent, row = tokens + emitted[row], spent + cost[row], row + emitted[row]
        return tokens / spent

    def advantages(self, policy: np.ndarray, rho: float) -> tuple[np.ndarray, np.ndarray]:
        """(N, C, K) exact advantage of exiting under a policy given by its own advantages, and where it is asked."""
        stop = self.emitted - rho * self.cost  # (N, C, K + 1) worth of verifying after so many drafts
        forced = np.take_along_axis(stop, self.most[:, :, None], 2)[:, :, 0]
        fee = rho * self.decision
        advantage, asked = np.zeros(policy.shape), np.zeros(policy.shape, bool)
        onward = forced  # (N, C) worth of making draft k + 1
        for k in range(DRAFT_CAP - 1, 0, -1):
            asked[:, :, k] = self.most > k + 1
            verify = stop[:, :, k + 1]
            advantage[:, :, k] = onward - verify
            decided = np.where(policy[:, :, k] > 0, onward, verify) - fee
            onward = np.where(asked[:, :, k], decided, forced)
        asked[:, :, 0] = self.limit[:, None] > 0
        asked[:, -1, 0] &= self.most[:, -1] > 1
        exit_here = np.where(self.most > 1, onward, stop[:, :, 1])
        beyond = stop[:, -1, 1]  # at the last candidate: keep the draft and verify
        for c in range(policy.shape[1] - 1, -1, -1):
            advantage[:, c, 0] = exit_here[:, c] - beyond
            beyond = np.where(policy[:, c, 0] > 0, exit_here[:, c], beyond) - fee * asked[:, c, 0]
        return advantage, asked

    def visited(self, policy: np.ndarray) -> np.ndarray:
        """(N, C, K) states in which the policy is asked, in the round that starts at the row."""
        candidate, drafts, _ = self.choose(policy)
        c, k = np.arange(policy.shape[1])[:, None], np.arange(DRAFT_CAP)
        walked = (k == 0) & (c <= candidate[:, None, None])
        drafted = (k > 0) & (c == candidate[:, None, None]) & (k < drafts[:, None, None])
        return walked | drafted


def _rows(trace: Trace, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) rows of the trace that hold the tokens of these prompts, and (texts + 1,) where each text begins."""
    place = {prompt: index for index, prompt in enumerate(trace.prompt_ids)}
    samples, longest = trace.header.samples, trace.header.max_new_tokens
    texts = np.array([place[prompt] * samples + sample for prompt in prompts for sample in range(samples)])
    lengths = np.minimum(np.diff(trace.starts)[texts], longest)
    rows = [
        np.arange(trace.starts[text], trace.starts[text] + length) for text, length in zip(texts, lengths, strict=True)
    ]
    return np.concatenate(rows), np.cumsum([0, *lengths])


class Network:
    """A ReLU network from observations to the advantage of exiting."""

    def __init__(self, args: Args, mean: np.ndarray, std: np.ndarray):
        torch.manual_seed(args.seed)
        self.args, self.mean, self.std = args, mean, std
        sizes = (len(mean), *args.hidden)
        hidden = [part for pair in pairwise(sizes) for part in (torch.nn.Linear(*pair), torch.nn.ReLU())]
        self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(sizes[-1], 1))

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """(..., F) -> (...,) advantages."""
        flat = torch.from_numpy(((observations - self.mean) / self.std).reshape(-1, len(self.mean)))
        with torch.inference_mode():
            out = torch.cat([self.layers(part)[:, 0] for part in flat.split(1 << 18)])
        return out.numpy().reshape(observations.shape[:-1])

    def fit(self, observations: np.ndarray, goals: np.ndarray, weights: np.ndarray) -> float:
        """Weighted least squares on (B, F), (B,), (B,); returns the last loss."""
        args = self.args
        x = torch.from_numpy((observations - self.mean) / self.std)
        y, w = torch.from_numpy(goals.astype(np.float32)), torch.from_numpy(weights.astype(np.float32))
        optimizer = torch.optim.Adam(self.layers.parameters(), args.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.updates)
        loss = torch.zeros(())
        for _ in range(args.updates):
            rows = torch.randint(len(y), (args.batch_size,))
            loss = (w[rows] * (self.layers(x[rows])[:, 0] - y[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    def export(self, trace: Trace, training: dict) -> MLPPolicy:
        """As a policy whose Q(exit) is the advantage and whose Q(continue) is 0."""
        linear = [layer for layer in self.layers if isinstance(layer, torch.nn.Linear)]
        weights = [layer.weight.detach().numpy().copy() for layer in linear]
        biases = [layer.bias.detach().numpy().copy() for layer in linear]
        for arrays in (weights, biases):
            both = np.zeros((2, *arrays[-1].shape[1:]), np.float32)
            both[EXIT], both[CONTINUE] = arrays[-1][0], 0.0
            arrays[-1] = both
        header = trace.header
        return MLPPolicy(
            tuple(weights), tuple(biases), self.mean, self.std, tuple(self.args.features), "draft",
            header.candidate_layers, header.n_layers, header.model_fingerprint, header.model_name, training,
        )  # fmt: skip


def train(args: Args, report: Callable[[dict], None] = lambda row: None) -> tuple[MLPPolicy, list[dict]]:
    """Fitted policy iteration; returns the best policy on the validation prompts, and a row an iteration."""
    features = select_features(args.features, "draft")
    costs = load_cost_model(args.cost_model)
    traces = [load_trace(path) for path in args.traces]
    if len({(t.header.model_fingerprint, t.header.candidate_layers) for t in traces}) != 1:
        raise LedeError(f"traces {args.traces} are of different models or candidate layers; give traces of one model")
    training = [Rounds(trace, "train", features, costs) for trace in traces]
    validation = [Rounds(trace, "validation", features, costs) for trace in traces]
    seen = np.concatenate([rounds.observations[rounds.most > 0].reshape(-1, len(features)) for rounds in training])
    network = Network(args, seen.mean(0), np.maximum(seen.std(0), 1e-3))
    policies = [
        np.broadcast_to(np.where(np.arange(DRAFT_CAP) < 4, 1.0, -1.0), (*r.most.shape, DRAFT_CAP)) for r in training
    ]
    history: list[dict] = []
    best: tuple[float, MLPPolicy | None] = (0.0, None)
    for iteration in range(args.iterations):
        rates = [rounds.rate(policy) for rounds, policy in zip(training, policies, strict=True)]
        parts = []
        for rounds, policy, rho in zip(training, policies, rates, strict=True):
            advantage, asked = rounds.advantages(policy, rho)
            weight = np.where(rounds.visited(policy), 1.0, args.off_path)
            parts.append((rounds.observations[asked], advantage[asked], weight[asked]))
        loss = network.fit(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        policies = [network(rounds.observations) for rounds in training]
        row = {"iteration": iteration, "loss": loss}
        for split, sets in (("train", training), ("validation", validation)):
            for name, rounds in zip(args.traces, sets, strict=True):
                row[f"{split} {Path(name).name.removesuffix('.h5')}"] = rounds.rate(network(rounds.observations))
        history.append(row)
        report(row)
        score = float(np.mean([rate for name, rate in row.items() if name.startswith("validation")]))
        if score > best[0]:
            about = {"agent": "optimal_stopping", "args": {**asdict(args), "out": str(args.out)}, **row}
            best = score, network.export(traces[0], json.loads(json.dumps(about)))
    assert best[1] is not None
    return best[1], history


def main(args: Args) -> None:
    console = Console()
    with progress_bar(console) as bar:
        task = bar.add_task("reading the traces", total=args.iterations)

        def show(row: dict) -> None:
            rates = ", ".join(f"{value:.3f}" for name, value in row.items() if name.startswith("validation"))
            bar.update(task, completed=row["iteration"] + 1, description=f"modelled speedup on validation: {rates}")

        policy, history = train(args, show)
    folder = policy.save(args.out / "policy")
    with (args.out / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    console.print(f"{folder}: fastest on validation of {args.iterations} iterations; {args.out / 'history.csv'}")


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
