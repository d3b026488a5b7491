"""Every registered strategy on one prompt, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lede_env.decoding.generate import Generation, generate
from lede_env.decoding.strategies import STRATEGIES, Autoregressive, Strategy
from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError

REPEATS = 3
WARM_UP_TOKENS = 16


def contestants(lm: LayeredLM, chosen: Strategy) -> tuple[dict[str, Strategy], dict[str, str]]:
    """Every registered strategy by name, `chosen` in the place of its own kind, and why others cannot run.

    What a strategy must be told and was not: the middle candidate layer as `exit_layer`, 4 as `speculation`.
    """
    told = {"exit_layer": lm.candidate_layers[(len(lm.candidate_layers) - 1) // 2], "speculation": 4}
    able: dict[str, Strategy] = {}
    unable: dict[str, str] = {}
    for name, kind in STRATEGIES.items():
        required = [field.name for field in dataclasses.fields(kind) if _required(field)]  # type: ignore[arg-type]
        try:
            if type(chosen) is kind:
                strategy = chosen
            elif unknown := [field for field in required if field not in told]:
                raise LedeError(f"it needs {', '.join(unknown)}: give it as --strategy")
            else:
                strategy = kind(**{field: told[field] for field in required})
            strategy.start(lm, 0)
            able[name] = strategy
        except LedeError as error:
            unable[name] = str(error)
    return able, unable


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def race(
    lm: LayeredLM,
    prompt: str,
    strategies: dict[str, Strategy],
    options: dict[str, Any],
    progress: Callable[[int, int], None],
) -> dict[str, Generation]:
    """Each strategy's generation of median speed out of REPEATS, interleaved, after a warm-up of each.

    `options` are those of `generate`; `progress` is told how many runs of how many are done.
    """
    warm_up = {**options, "max_new_tokens": min(options["max_new_tokens"], WARM_UP_TOKENS)}
    runs: dict[str, list[Generation]] = {name: [] for name in strategies}
    for repeat in range(-1, REPEATS):
        for place, (name, strategy) in enumerate(strategies.items()):
            out = generate(lm, prompt, strategy=strategy, **(options if repeat >= 0 else warm_up))
            assert isinstance(out, Generation)
            if repeat >= 0:
                runs[name].append(out)
            progress((repeat + 1) * len(strategies) + place + 1, (REPEATS + 1) * len(strategies))
    return {
        name: sorted(outs, key=lambda out: out.metrics.tokens_per_second)[REPEATS // 2] for name, outs in runs.items()
    }


def comparison_table(results: dict[str, Generation], strategies: dict[str, Strategy], greedy: bool) -> Table:
    """One row a strategy, whole in 80 columns. Sampled texts are not compared: each is a draw of its own."""
    baseline = next(results[name] for name, strategy in strategies.items() if isinstance(strategy, Autoregressive))
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("strategy", overflow="fold")
    table.add_column("text", no_wrap=True)
    for heading in ("tokens", "E", "d", "acceptance", "tokens a round", "tokens/s", "speedup"):
        longest = max(map(len, heading.split()))  # headings break between words, numbers nowhere
        table.add_column(heading, justify="right", overflow="fold", min_width=longest, max_width=max(longest, 7))
    for name, out in results.items():
        metrics = out.metrics
        same = "same" if out.token_ids == baseline.token_ids else "differs"
        drafting = [f"{metrics.E:.2f}", f"{metrics.d:.2f}", f"{metrics.acceptance:.3f}"]
        table.add_row(
            describe(strategies[name]),
            same if greedy else "sampled",
            str(metrics.tokens),
            *(drafting if out.counts.drafted else ["-"] * 3),
            f"{metrics.tokens_per_round:.2f}",
            f"{metrics.tokens_per_second:.1f}",
            f"{metrics.tokens_per_second / baseline.metrics.tokens_per_second:.2f}",
        )
    return table


def describe(strategy: Strategy) -> str:
    """The strategy as a command line has it, in numbers: `layerskip:4,5`, `lede:speculation=4`."""
    given = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}  # type: ignore[arg-type]
    numbers = {name: f"{value:g}" for name, value in given.items() if isinstance(value, int | float)}
    written = numbers.values() if len(numbers) == len(given) else [f"{name}={value}" for name, value in numbers.items()]
    return f"{strategy.name}:{','.join(written)}" if numbers else strategy.name
