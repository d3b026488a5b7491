"""Sampled text has exactly the model's distribution, whatever the strategy: chi-square tests on enumerated texts.

On a model of six tokens all 6^6 texts of six tokens have known probabilities: a product of the model's own, from
transformers in float64, after temperature and top-p. Every registered strategy samples many longer texts in batches;
the joint frequencies of tokens 1 to 3 and of tokens 4 to 6 must fit. Four rules that are wrong on purpose must not.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import lede_env
from benchmarks.harness import RESULTS, machine, print_table, write_results
from lede_env.arguments import clear_errors
from lede_env.decoding import generate as decoder
from lede_env.decoding import rounds
from lede_env.decoding.strategies import STRATEGIES, Control, LayerSkip, Strategy
from lede_env.display.progress import progress_bar
from lede_env.engine import acceptance
from lede_env.engine.acceptance import Draws, Sampling, derive_seed, draw, speculative_matches
from lede_env.engine.acceptance_head import AcceptanceHead
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.round import Counts
from lede_env.engine.signals import Signals
from lede_env.policies import RandomPolicy, ThresholdPolicy

VOCAB = 6
CHECKED = 6  # tokens whose joint distribution is enumerated
PROMPT = [0]
LAYERS = 4
SIGNIFICANT = 1e-3  # p-values below this are failures
GRID = tuple(Sampling(temperature, top_p=top_p) for temperature in (0.6, 1.0) for top_p in (1.0, 0.9))


class WaryPolicy:
    """Stops drafting where the coins of the drafts drawn bode ill: what a policy may do, at its most extreme."""

    features = ("phase", "margin", "peril")

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        phase, margin, peril = observations.T
        return np.where(phase == 1.0, margin > 0.5, peril < -0.5).astype(np.float64)


class HeadPolicy:
    """Stops drafting, and gives up the bonus token, by what an acceptance head says of the drafts and coins drawn: one
    of random weights here."""

    features = ("phase", "margin", "risk", "ahead")
    bonus_from = 0.5

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        phase, margin, risk, ahead = observations.T
        return np.where(phase == 1.0, margin > 0.5, risk < 1.0 + ahead).astype(np.float64)


# What is tested of each strategy, on a model of LAYERS layers. A new strategy needs a row.
INSTANCES: dict[str, Callable[..., list[Strategy]]] = {
    "autoregressive": lambda strategy: [strategy()],
    "layerskip": lambda strategy: [strategy(2, 3)],
    "fsm": lambda strategy: [strategy(2)],
    "draft_verify": lambda strategy: [strategy(2)],
    "lite": lambda strategy: [strategy({1: 0.5, 2: 0.5})],
    "del": lambda strategy: [strategy()],
    "lede": lambda strategy: [
        strategy(ThresholdPolicy({1: 0.5, 2: 0.3}, LAYERS)),
        strategy(RandomPolicy(0.6)),
        strategy(WaryPolicy()),
        strategy(HeadPolicy()),
    ],
}


def instances(name: str) -> list[Strategy]:
    if name not in INSTANCES:
        raise lede_env.LedeError(f"strategy {name!r} is registered but not tested: add it to INSTANCES in {__file__}")
    return INSTANCES[name](STRATEGIES[name])


def small_model(seed: int = 0) -> tuple[LayeredLM, LlamaForCausalLM]:
    """A random Llama without an EOS whose early layers draft well, but not perfectly: ours, and transformers'."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
        model.lm_head.weight *= 0.5
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        lm = lede_env.load_model(folder, device="cpu", dtype="float64")
    return replace(lm, acceptance_head=AcceptanceHead.random(lm, seed)), model


@torch.inference_mode()
def exact_joint(model: LlamaForCausalLM, sampling: Sampling) -> np.ndarray:
    """(VOCAB,) * CHECKED: the probability of every beginning of a text after PROMPT."""
    shape = (VOCAB,) * (CHECKED - 1)
    texts = torch.tensor([[*PROMPT, *text] for text in product(range(VOCAB), repeat=CHECKED - 1)])
    logits = model(texts).logits[:, len(PROMPT) - 1 :]  # (VOCAB^5, CHECKED, VOCAB)
    next_token = sampling.probabilities(logits.flatten(0, 1)).double().numpy().reshape(*shape, CHECKED, VOCAB)
    joint = np.ones(())
    for t in range(CHECKED):
        # Given tokens 1..t; those after them do not matter: take the first.
        joint = joint[..., None] * next_token[(slice(None),) * t + (0,) * (CHECKED - 1 - t) + (t,)]
    return joint / joint.sum()  # the probabilities are float32


def sample(
    lm: LayeredLM,
    strategy: Strategy,
    sampling: Sampling,
    sequences: int,
    seed: int,
    new_tokens: int = 16,
    batch: int = 1024,
) -> tuple[np.ndarray, Counts]:
    """(sequences, CHECKED) first tokens of texts of `new_tokens`, decoded in batches, and the counts of all rounds."""
    texts, counts = [], Counts()
    for begin in range(0, sequences, batch):
        outs = lede_env.generate(
            lm,
            [PROMPT] * min(batch, sequences - begin),
            strategy=strategy,
            max_new_tokens=new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=derive_seed(seed, begin),
        )
        for out in outs:
            texts.append(out.token_ids[:CHECKED])
            counts.merge(out.counts)
    return np.array(texts), counts


def p_values(texts: np.ndarray, joint: np.ndarray) -> tuple[float, float]:
    """Chi-square p-values of tokens 1 to 3 and of tokens 4 to 6."""
    counts = np.zeros(joint.shape)
    np.add.at(counts, tuple(texts.T), 1)
    first, second = (0, 1, 2), (3, 4, 5)
    return tuple(chi_square_p(counts.sum(rest), len(texts) * joint.sum(rest)) for rest in (second, first))


def chi_square_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """p-value of the chi-square test of counts; cells expected under 5 are pooled."""
    if observed[expected == 0.0].any():
        return 0.0
    small = expected < 5.0
    observed = np.append(observed[~small], observed[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0.0], expected[expected > 0.0]
    if len(expected) < 2:
        return 1.0  # the text is certain
    statistic = ((observed - expected) ** 2 / expected).sum()
    half_freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2)))


# --- wrong rules: each is patched into the decoder while its context is open, which gives the strategy to run


@contextmanager
def resample_from_p(sampling: Sampling) -> Iterator[Strategy]:
    """A rejected draft is replaced by a draw from p instead of the residual."""
    with patch.object(acceptance, "residual", lambda p, q: p):
        yield LayerSkip(1, 3)


@contextmanager
def drop_low_confidence(sampling: Sampling) -> Iterator[Strategy]:
    """A round's last draft is thrown away, unverified, if its probability is low."""

    def match(drafts, p, q, coins, after, bonus):
        outcomes = []
        parts = p.split([len(row) + 1 for row in drafts])
        for row, own_p, own_q, own, last in zip(drafts, parts, q, coins, after, strict=True):
            kept = len(row) - (len(row) > 0 and float(own_q[-1][row[-1]]) < 0.3)
            outcomes += speculative_matches([row[:kept]], own_p[: kept + 1], [own_q[:kept]], [own[:kept]], [last])
        return outcomes

    with patch.object(rounds, "speculative_matches", match):
        yield LayerSkip(1, 1)


@contextmanager
def deeper_after_seeing(sampling: Sampling) -> Iterator[Strategy]:
    """A draft of low probability is drawn once more, one layer deeper."""

    def leave(signals, draws):
        probabilities = sampling.probabilities(signals.logits[None])[0]
        low = float(probabilities[draw(probabilities, draws.next())]) < 0.3
        draws.count -= not low  # the decoder draws the same token again
        return not low

    with leaving_by_draws(leave) as strategy:
        yield strategy


@contextmanager
def deeper_by_own_coin(sampling: Sampling) -> Iterator[Strategy]:
    """A draft is made one layer deeper if the coin that will decide its acceptance is high."""

    def leave(signals, draws):
        draws.next()  # its token's
        low = draws.next() < 0.35
        draws.count -= 2
        return low

    with leaving_by_draws(leave) as strategy:
        yield strategy


@contextmanager
def leaving_by_draws(leave: Callable[[Signals, Draws], bool]) -> Iterator[Strategy]:
    """A strategy that knows what no strategy may: the row's uniform numbers, when it decides where a draft leaves."""
    streams: dict[int, Draws] = {}  # by the row's seed

    class Shared(Draws):
        def __init__(self, seed: int):
            super().__init__(seed)
            streams[seed] = self

    class Knowing(Control):
        def __init__(self, seed: int):
            self.seed = seed

        def path(self, round_):
            return 1, 2

        def leave(self, signals, round_):
            return leave(signals, streams[self.seed])

        def keep_drafting(self, signals, round_):
            return len(round_.drafts) < 3

    class KnowingStrategy(Strategy):
        name = "knowing"

        def start(self, lm, seed):
            return Knowing(seed)

    with patch.object(decoder, "Draws", Shared):
        yield KnowingStrategy()


BROKEN: dict[str, Callable[[Sampling], AbstractContextManager[Strategy]]] = {
    "wrong: drop a low-confidence draft": drop_low_confidence,
    "wrong: go deeper after seeing the token": deeper_after_seeing,
    "wrong: go deeper by the token's own coin": deeper_by_own_coin,
    "wrong: resample from p": resample_from_p,
}


@dataclass(frozen=True)
class Args:
    """Check the distribution of sampled text, for every strategy at every setting of the grid."""

    sequences: int = 50_000  # texts of each strategy at each setting; a fifth for the wrong rules
    new_tokens: int = 16  # of each text
    batch: int = 1024
    processes: int = 1  # checks run side by side; the verdicts do not depend on it
    seed: int = 0
    out: Path = RESULTS / "cpu"  # folder for sampling_check.csv, .md and .json


def main(args: Args) -> int:
    console = Console()
    rules = [
        *((name, place) for name in STRATEGIES for place in range(len(instances(name)))),
        *((r, 0) for r in BROKEN),
    ]
    checks = [(args, number, setting, *rule) for number, (setting, rule) in enumerate(product(range(len(GRID)), rules))]
    with progress_bar(console) as bar, ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        rows = list(bar.track(pool.map(check, *zip(*checks, strict=True)), len(checks), description="sampling"))
    print_table("sampled texts against the enumerated distribution", rows, console)
    surprises = sum(row["verdict"] != row["expected"] for row in rows)
    about = {"command": " ".join(["python -m benchmarks.sampling_check", *sys.argv[1:]]), **machine()}
    write_results(args.out, "sampling_check", rows, {**about, "seed": args.seed, "unexpected verdicts": surprises})
    console.print(f"{surprises} of {len(rows)} verdicts are not as expected; written to {args.out}")
    return int(surprises > 0)


@cache
def _known(setting: int) -> tuple[LayeredLM, np.ndarray]:
    """The model, and the exact joint distribution at a setting of the grid; once a process."""
    torch.set_num_threads(1)  # a small model: more threads only spin
    lm, model = small_model()
    return lm, exact_joint(model, GRID[setting])


def check(args: Args, number: int, setting: int, name: str, place: int) -> dict[str, Any]:
    """One row: the place-th instance of a registered strategy, or a wrong rule, at one setting."""
    (lm, joint), sampling, wrong = _known(setting), GRID[setting], name in BROKEN
    sequences = args.sequences // 5 if wrong else args.sequences
    seed = derive_seed(args.seed, number)
    with BROKEN[name](sampling) if wrong else nullcontext(instances(name)[place]) as strategy:
        texts, counts = sample(lm, strategy, sampling, sequences, seed, args.new_tokens, args.batch)
    shown = name if wrong else shown_strategy(strategy)
    return _row(shown, sampling, p_values(texts, joint), counts, sequences, wrong)


def _row(
    name: str, sampling: Sampling, p: tuple[float, float], counts: Counts, sequences: int, wrong: bool
) -> dict[str, Any]:
    return {
        "strategy": name,
        "temperature": sampling.temperature,
        "top-p": sampling.top_p,
        "texts": sequences,
        "E": counts.E,
        "d": counts.d,
        "acceptance": counts.acceptance,
        "p of tokens 1-3": p[0],
        "p of tokens 4-6": p[1],
        "verdict": "differs" if min(p) < SIGNIFICANT else "fits",
        "expected": "differs" if wrong else "fits",
    }


def shown_strategy(strategy: Strategy) -> str:
    options = [value for value in vars(strategy).values() if value is not None]
    return " ".join([strategy.name, *(type(v).__name__ if hasattr(v, "features") else str(v) for v in options)])


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main(tyro.cli(Args)))
