"""What every benchmark shares: methods timed in turn, the machine they ran on, and results written twice."""

from __future__ import annotations

import csv
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lede_env.data.ngrams import repeated_ngrams
from lede_env.decoding.generate import Generation, generate
from lede_env.decoding.strategies import Strategy
from lede_env.display.progress import progress_bar
from lede_env.engine.acceptance import Sampling, derive_seed
from lede_env.engine.cost_model import CostModel
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.processor import processor_name
from lede_env.engine.round import Counts
from lede_env.envs.backends import LiveBackend
from lede_env.models.zoo import twin_layer
from lede_env.tasks import Prompt

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and commit: what a figure came from. A copy of a checkout says its commit by LEDE_COMMIT."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{processor_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "commit": os.environ.get("LEDE_COMMIT") or commit.stdout.strip() or "no git checkout",
        "date": time.strftime("%Y-%m-%d"),
    }


def results_folder(device: str) -> Path:
    """Where results of this machine go by default: results/cpu, results/h200 and the like."""
    if device != "cuda":
        return RESULTS / "cpu"
    return RESULTS / torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")


class Timing:
    """One method's runs: seconds per prompt and repeat, the tokens, and the counts of its rounds."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.counts = Counts()

    def add(self, prompt: int, seconds: float, tokens: list[int], counts: Counts | None) -> None:
        first = prompt not in self.seconds
        self.seconds.setdefault(prompt, []).append(seconds)
        self.tokens[prompt] = tokens
        if counts is not None and first:
            self.counts.merge(counts)

    @property
    def total_seconds(self) -> float:
        """Sum over prompts of the median over repeats."""
        return sum(statistics.median(samples) for samples in self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens.values())) / self.total_seconds

    @property
    def repeated(self) -> float:
        """Share of 8-grams that occurred before in the same text: looping text flatters every method."""
        return repeated_ngrams(list(self.tokens.values()), 8)


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
    """ROUGE-L (F1, no stemming) of each text by rouge-score; None where there is no reference, or no rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return [None] * len(texts)
    scorer = RougeScorer(["rougeL"])
    return [
        scorer.score(reference, text)["rougeL"].fmeasure if reference.strip() else None
        for text, reference in zip(texts, references, strict=True)
    ]


def speedup_interval(
    baseline: Timing, method: Timing, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of tokens/s with a 95 % paired bootstrap interval over prompts."""
    prompts = sorted(baseline.seconds)
    a = np.array([[statistics.median(t.seconds[p]), len(t.tokens[p])] for t in (baseline,) for p in prompts])
    b = np.array([[statistics.median(t.seconds[p]), len(t.tokens[p])] for t in (method,) for p in prompts])
    return ratio_interval(a, b, samples, seed)


def ratio_interval(a: np.ndarray, b: np.ndarray, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """How many times faster b is than a, from their (N, 2) time and tokens a prompt; 95 % paired bootstrap interval."""
    pick = np.random.default_rng(seed).integers(len(a), size=(samples, len(a)))

    def ratio(index: np.ndarray) -> np.ndarray:
        rate_a = a[index, 1].sum(-1) / a[index, 0].sum(-1)
        rate_b = b[index, 1].sum(-1) / b[index, 0].sum(-1)
        return rate_b / rate_a

    low, high = np.quantile(ratio(pick), [0.025, 0.975])
    return float(ratio(np.arange(len(a)))), float(low), float(high)


# A method decodes one prompt (its token ids, or whatever else it takes for a prompt): returns new tokens, and its
# counts if it has rounds.
Method = Callable[[Any], tuple[list[int], Counts | None]]


class Player:
    """A strategy as a method to time, on (index, token ids) in the order of the indices.

    What the strategy learned on one prompt goes on to the next. Every prompt draws from its own seed, so that a
    repeat gives the same text. `outs` holds the newest generation of each prompt.
    """

    def __init__(self, lm: LayeredLM, strategy: Strategy, max_new_tokens: int, temperature: float, seed: int):
        self.lm, self.strategy, self.seed = lm, strategy, seed
        self.options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, temperature=temperature)
        self.outs: dict[int, Generation] = {}

    def __call__(self, prompt: tuple[int, list[int]]) -> tuple[list[int], Counts]:
        out = self.play(prompt)
        self.outs = dict(sorted({**self.outs, prompt[0]: out}.items()))  # a warm-up takes them out of order
        return out.token_ids, out.counts

    def play(self, prompt: tuple[int, list[int]], profile: bool = False, **options: Any) -> Generation:
        index, ids = prompt
        return generate(
            self.lm,
            ids,
            strategy=self.strategy,
            seed=derive_seed(self.seed, index),
            carry_over=self.outs.get(index - 1),
            profile=profile,
            **{**self.options, **options},
        )

    def cost(self, index: int, costs: CostModel) -> float:
        """Modelled cost of a prompt's newest generation, in autoregressive steps; prefill is not in it.

        Costs of a deeper model are those of a geometry twin, at whose layers the same rounds are played.
        """
        depth, donor = costs.n_layers, self.lm.n_layers
        return sum(
            costs.of(replace(round_, exits=[twin_layer(layer, donor, depth) for layer in round_.exits]))
            for round_ in self.outs[index].rounds
        )


def timed(method: Method, prompt: Any, synchronise: bool) -> tuple[float, list[int], Counts | None]:
    """Seconds that a method takes for a prompt, its tokens and counts. synchronise: it runs on CUDA."""
    if synchronise:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    tokens, counts = method(prompt)
    if synchronise:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, tokens, counts


def freeze_objects() -> None:
    """Keep the garbage collector from what is loaded by now: it takes 0.2 s, which would fall on some timed run."""
    gc.collect()
    gc.freeze()


def time_methods(
    methods: dict[str, Method], prompts: Sequence[Any], repeats: int, console: Console, synchronise: bool = False
) -> dict[str, Timing]:
    """Every method on every prompt, in turn prompt by prompt so that drift hits all alike, after a warm-up."""
    timings = {name: Timing() for name in methods}
    with progress_bar(console) as bar:
        task = bar.add_task("timing", total=repeats * len(prompts) * len(methods))
        warm_up = [prompts[0]]
        if synchronise:  # on CUDA the longest makes room and graphs for all
            warm_up.append(max(prompts, key=lambda prompt: len(prompt[1])))
        for method in methods.values():
            for prompt in warm_up:
                method(prompt)
            if synchronise and isinstance(method, Player):
                for prompt in prompts:  # all, whole: a graph of each length and exit, or it is captured while timed
                    method(prompt)
        freeze_objects()
        for repeat in range(repeats):
            for index, prompt in enumerate(prompts):
                order = list(methods)
                shift = (index + repeat) % len(order)
                for name in order[shift:] + order[:shift]:
                    timings[name].add(index, *timed(methods[name], prompt, synchronise))
                    bar.advance(task)
    return timings


def acceptance_table(
    lm: LayeredLM,
    prompts: list[Prompt],
    max_new_tokens: int,
    layers: Sequence[int],
    console: Console,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[int, list[np.ndarray]]:
    """Texts of the prompts, and at each layer which of their tokens a draft there would have got right.

    At a temperature above 0 a draft is right where speculative sampling would have accepted it (the coupling).
    """
    lanes = min(16, len(prompts))
    accepted: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    backend = LiveBackend(lm, prompts, lanes, max_new_tokens, Sampling(temperature), tuple(layers), ("entropy",))
    with progress_bar(console) as bar:
        for begin in bar.track(range(0, len(prompts), lanes), description="acceptance on validation prompts"):
            batch = range(begin, min(begin + lanes, len(prompts)))
            for lane, prompt in enumerate(batch):
                backend.start(lane, prompt, derive_seed(seed, prompt))
            for lane, _ in enumerate(batch):
                rows = _rows(backend, lane, max_new_tokens)
                for column, layer in enumerate(layers):
                    accepted[layer].append(backend.accepted[rows, column].copy())
    return accepted


def _rows(backend: LiveBackend, lane: int, max_new_tokens: int) -> slice:
    """The table rows of a lane's whole continuation: up to EOS or the budget."""
    begin = int(backend.base[lane])
    for position in range(max_new_tokens):
        backend.ensure(lane, position)
        if backend.ends[begin + position]:
            return slice(begin, begin + position + 1)
    return slice(begin, begin + max_new_tokens)


def write_results(folder: Path, name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """NAME.csv for programs, NAME.md for people, NAME.json with both the rows and what they came from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", rows)
    (folder / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    facts = [f"- {key}: {value}" for key, value in about.items()]
    (folder / f"{name}.md").write_text("\n".join([*markdown_table(rows), "", *facts]) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    columns = columns_of(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(shown(row.get(column, "")) for column in columns) + " |" for row in rows]


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Every key of any row, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def print_table(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Columns that find no room beside each other come in further tables, each with the names in front."""
    widths = {column: width_of(column, rows) for column in columns_of(rows)}
    for number, (names, figures) in enumerate(side_by_side(rows, widths, console.width)):
        table = Table(title=None if number else title)
        for column in names:
            table.add_column(column, overflow="fold", max_width=console.width // 3)
        for column in figures:
            text = isinstance(rows[0].get(column), str)
            table.add_column(column, justify="left" if text else "right", overflow="fold", width=widths[column])
        for row in rows:
            table.add_row(*(shown(row.get(column, "")) for column in (*names, *figures)))
        console.print(table)


def side_by_side(rows: list[dict[str, Any]], widths: dict[str, int], room: int) -> list[tuple[list[str], list[str]]]:
    """(columns that name a row, other columns) of each table that a console of that width has room for."""
    border = 3  # beside each column
    columns = list(widths)
    texts = next((i for i, column in enumerate(columns) if not isinstance(rows[0].get(column), str)), len(columns))
    names = columns[: max(1, texts)]
    while len(names) > 1 and sum(widths[name] + border for name in names) > room // 2:
        names.pop()
    room -= 1 + sum(min(widths[name], room // 3) + border for name in names)
    parts: list[list[str]] = [[]]
    for column in columns[len(names) :]:
        if parts[-1] and sum(widths[other] + border for other in (*parts[-1], column)) > room:
            parts.append([])
        parts[-1].append(column)
    return [(names, part) for part in parts]


def width_of(column: str, rows: list[dict[str, Any]]) -> int:
    """Of its longest cell: headings break between words, and what is longer than 32 folds."""
    return max(*map(len, column.split()), *(min(len(shown(row.get(column, ""))), 32) for row in rows))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
