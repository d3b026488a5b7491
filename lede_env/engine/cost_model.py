"""Modelled time: what a round costs on a named device, from a JSON of measured kernels.

`python -m lede_env.engine.cost_model --model tiny` measures the pieces on this machine and writes the JSON. A shipped
one never changes: rewards and scores of released ids depend on it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from lede_env.arguments import clear_errors
from lede_env.engine.lookup import NO_GUESS
from lede_env.engine.processor import processor_name
from lede_env.engine.round import DRAFT_CAP, Round
from lede_env.errors import LedeError

SHIPPED = Path(__file__).parent / "cost_models"


@dataclass(frozen=True)
class CostModel:
    """Seconds of each piece of a round. Widths are rows: index w is a pass over w tokens (index 0 is unused)."""

    name: str
    model: str
    weights: str  # "embedded", "checkpoint", "twin" or "random": what was run
    device: str
    dtype: str
    n_layers: int
    layer: tuple[float, ...]  # one layer
    head: tuple[float, ...]  # final norm, LM head and the most probable token
    decision: float  # what it adds to a draft: signals, features and the policy's answer
    context: int  # positions in the cache while measuring
    software: str

    @property
    def step(self) -> float:
        """Seconds of one autoregressive step: the unit of every cost."""
        return self.n_layers * self.layer[1] + self.head[1]

    def walk(self, layers: int, heads: int, decisions: int) -> float:
        """Cost, in autoregressive steps, of running one token through `layers` with `heads` exit checks."""
        return (layers * self.layer[1] + heads * self.head[1] + decisions * self.decision) / self.step

    def round(self, exit_layer: int, drafts: int, checks: int, decisions: int, bonus: bool = True) -> float:
        """Cost, in autoregressive steps, of a round that drafts at one layer (design section 3).

        (d + 1) e t_layer + (L - e) t_layer(d + 1) + (d + checks) t_head + t_head(d + 1) + decisions t_decision; d for
        d + 1 without the slot for the bonus token.
        """
        slots = drafts + bonus
        seconds = (
            slots * exit_layer * self.layer[1]
            + (self.n_layers - exit_layer) * _at(self.layer, slots)
            + (drafts + checks) * self.head[1]
            + _at(self.head, slots)
            + decisions * self.decision
        )
        return seconds / self.step

    def of(self, round_: Round) -> float:
        """Cost, in autoregressive steps, of a round as it was played, its drafts from whatever layers.

        The slots of the round go through the layers as a session moves them: one that waits below rides along. Equals
        `round` where all drafts left one layer, and the round was not cut by the end of the text.
        """
        seconds, depths = 0.0, [0]
        goals = (*round_.exits, self.n_layers)
        for number, goal in enumerate(goals, 1):
            if number == len(goals) and not round_.bonus:
                depths.pop()  # the last draft runs through no layer
            while depths[-1] < goal:
                here = depths[-1]
                there = min(goal, min((depth for depth in depths if depth > here), default=goal))
                seconds += (there - here) * _at(self.layer, depths.count(here))
                depths = [there if depth == here else depth for depth in depths]
            depths.append(0)
        heads = len(round_.exits) + round_.checks
        seconds += (
            heads * self.head[1] + _at(self.head, len(round_.exits) + round_.bonus) + round_.decisions * self.decision
        )
        if round_.studied:
            seconds += _at(self.head, round_.studied)
        return seconds / self.step


def _at(seconds: Sequence[float], width: int) -> float:
    """Entry of a width; wider passes than were measured cost in proportion."""
    widest = len(seconds) - 1
    return seconds[width] if width <= widest else seconds[widest] * width / widest


def load_cost_model(name: str) -> CostModel:
    """A shipped cost model by name, or one from a JSON file's path."""
    path = SHIPPED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise LedeError(f"cost model {name!r} is unknown; shipped: {shipped}; or give the path of a JSON file")
    try:
        values = json.loads(path.read_text())
        costs = CostModel(**{**values, "layer": tuple(values["layer"]), "head": tuple(values["head"])})
        if len(costs.layer) < 2 or len(costs.head) < 2:
            raise ValueError("layer and head need an entry of one row")
        if not all(0 <= seconds < math.inf for seconds in (*costs.layer, *costs.head, costs.decision)):
            raise ValueError("seconds must be numbers, at least 0")
        if not costs.layer[1]:
            raise ValueError("a layer takes no time")
        return costs
    except (ValueError, TypeError, KeyError) as error:
        raise LedeError(
            f"{path} is not a cost model ({error}); write one with python -m lede_env.engine.cost_model"
        ) from error


def measure(
    model: str = "tiny",
    device: str = "auto",
    *,
    weights: Literal["auto", "twin", "random"] = "auto",
    context: int = 256,
    repeats: int = 100,
) -> CostModel:
    """Time a layer, a head and a decision on this machine: medians, warmed, synchronised.

    The pieces take turns, repeat by repeat, so that a busy moment hits all alike. On CUDA they are the engine's own
    graphs, by the device's clock.
    """
    import torch

    from lede_env.models.loading import load_model
    from lede_env.models.random_weights import random_model

    if weights == "random":
        lm = random_model(model, device=device)
    else:
        lm = load_model(model, weights=weights, device=device)
    on_gpu = lm.device.type == "cuda"
    widths = range(1, DRAFT_CAP + 2)
    with torch.inference_mode(), lm.session(1, context + len(widths), len(widths)) as session:
        session.prefill(0, [token % lm.geometry.vocab for token in range(context)])
        pieces = _graph_pieces(session) if on_gpu else _pieces(lm, session, context)
        seconds = _medians(pieces, repeats, _on_device if on_gpu else _on_host)
    if on_gpu:  # segments of several rows are padded to the widest; the read-out takes the place of the argmax
        seconds |= {f"{what} {w}": seconds[f"{what} {widths[-1]}"] for w in widths[1:-1] for what in ("layer", "head")}
        seconds["draft"] = seconds["head 1"]
    return CostModel(
        name=f"{lm.name}-{lm.device.type}",
        model=lm.name,
        weights=lm.weights,
        device=torch.cuda.get_device_name(lm.device)
        if on_gpu
        else f"{processor_name()}, {torch.get_num_threads()} threads",
        dtype=str(lm.dtype).removeprefix("torch."),
        n_layers=lm.n_layers,
        layer=(0.0, *(seconds[f"layer {width}"] / lm.n_layers for width in widths)),
        head=(0.0, *(seconds[f"head {width}"] for width in widths)),
        decision=max(0.0, seconds["draft and decision"] - seconds["draft"]),
        context=context,
        software=f"torch {torch.__version__}",
    )


def _best(lm, x) -> object:
    """The most probable token of each of (N, H) states."""
    return lm.logits(x).argmax(-1)


def _drafting(lm) -> tuple[Callable[[], object], Callable[[], object]]:
    """Drawing a draft from a row of logits as the decoder does; and that with the policy's answer about it.

    The policy is `tiny`, which ships with the model, else a network of two layers of 64 on the extended features.
    """
    import torch

    from lede_env.engine.logit_signals import LogitSignals
    from lede_env.engine.lookup import Lookup
    from lede_env.engine.signals import EXIT_FEATURES
    from lede_env.policies import MLPPolicy, load_policy

    policy = load_policy("tiny") if lm.weights == "embedded" else MLPPolicy.random(EXIT_FEATURES, seed=0)
    logits = torch.randn(lm.geometry.vocab, device=lm.device)
    lookup = Lookup([token % 50 for token in range(256)])

    def draft(guess: tuple[int, float] = NO_GUESS) -> LogitSignals:
        signals = LogitSignals(1, lm.n_layers, 3, DRAFT_CAP, 0.0, guess, logits=logits)
        signals.token = signals.best
        return signals

    return draft, lambda: policy.exits(draft(lookup.guess()))


def _pieces(lm, session, context: int) -> dict[str, Callable[[], object]]:
    """All layers and the head by width, and a draft with and without a decision."""
    import torch

    pieces: dict[str, Callable[[], object]] = {}
    draft, draft_and_decision = _drafting(lm)
    for width in range(1, DRAFT_CAP + 2):
        # Far apart, with all weights read in between: a decoder finds its caches cold too.
        if width == 2:
            pieces["draft"] = draft
        elif width == DRAFT_CAP:
            pieces["draft and decision"] = draft_and_decision
        x = torch.randn(1, width, lm.geometry.hidden, device=lm.device, dtype=lm.dtype)
        span = session.cache.span([0], [context], width)
        pieces[f"layer {width}"] = partial(lm.run, x, session.cache, span, 0, lm.n_layers)
        pieces[f"head {width}"] = partial(_best, lm, x[0])
    return pieces


def _graph_pieces(session) -> dict[str, Callable[[], object]]:
    """The same from the engine's graphs, one row and the widest.

    The "draft and decision" is a whole exit check: head, signals and draw. The policy decides on the host while the
    next draft's layers run (`lede_env.decoding.pipelined`), so its time is not the round's.
    """
    from lede_env.engine.acceptance import Sampling

    greedy = Sampling()
    session.fill(slot=0)
    pieces: dict[str, Callable[[], object]] = {
        "draft and decision": session.graph(("read", greedy, 0), partial(session._read_out, greedy)).replay
    }
    for width in (1, session.width):
        layers = session.graph(*session._segment(0, session.lm.n_layers, width))
        verdict = session.graph(("verify", width, greedy, False), partial(session._verify, width, greedy, False))
        pieces |= {f"layer {width}": layers.replay, f"head {width}": verdict.replay}
    return pieces


def _medians(
    pieces: dict[str, Callable[[], object]], repeats: int, timed: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """Median seconds of each piece, after five rounds of warming up."""
    samples: dict[str, list[float]] = {name: [] for name in pieces}
    for repeat in range(repeats + 5):
        for name, call in pieces.items():
            seconds = timed(call)
            if repeat >= 5:
                samples[name].append(seconds)
    return {name: statistics.median(times) for name, times in samples.items()}


def _on_host(call: Callable[[], object]) -> float:
    """Seconds of a call by the clock."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _on_device(call: Callable[[], object]) -> float:
    """Seconds of a call's work by the device's own clock: decoding waits for no launch, it launches ahead."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def main(
    model: str = "tiny",
    device: str = "auto",
    weights: Literal["auto", "twin", "random"] = "auto",
    name: str | None = None,
    repeats: int = 100,
    out: Path | None = None,
) -> None:
    """Measure a cost model on this machine and write it as JSON.

    Args:
        model: name, hub id or folder of the model.
        device: "auto", "cpu" or "cuda".
        weights: "twin" for the model's geometry twin, "random" for weights of its shape that say nothing: times need
            no more.
        name: what the cost model is called; by default MODEL-DEVICE.
        repeats: timings of each piece; the median counts.
        out: file to write; by default NAME.json in the current folder.
    """
    if repeats < 1:
        raise LedeError(f"--repeats {repeats} must be at least 1")
    if out is not None and not out.parent.is_dir():
        raise LedeError(f"--out {out}: there is no folder {out.parent}; make it, or name another")
    if out is not None and out.is_dir():
        raise LedeError(f"--out {out} is a folder; name the file in it")
    found = measure(model, device, weights=weights, repeats=repeats)
    found = replace(found, name=name or found.name)
    path = out or Path(f"{found.name}.json")
    path.write_text(json.dumps(asdict(found), indent=1) + "\n")
    print(f"{path}: layer {found.layer[1] * 1e3:.3f} ms, head {found.head[1] * 1e3:.3f} ms, "
          f"decision {found.decision * 1e3:.3f} ms, step {found.step * 1e3:.2f} ms on {found.device}")  # fmt: skip


if __name__ == "__main__":
    import tyro

    with clear_errors():
        tyro.cli(main)
