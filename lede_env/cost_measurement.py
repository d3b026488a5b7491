"""Measuring a cost model: what a layer, a head and a decision take on this machine.

    python -m lede_env.cost_measurement --model tiny

times the pieces and writes the JSON that `lede_env.engine.cost_model` reads.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from lede_env.arguments import clear_errors
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import CostModel
from lede_env.engine.logit_signals import LogitSignals
from lede_env.engine.lookup import NO_GUESS, Lookup
from lede_env.engine.processor import processor_name
from lede_env.engine.round import DRAFT_CAP
from lede_env.engine.signals import EXIT_FEATURES
from lede_env.errors import LedeError
from lede_env.models.loading import load_model
from lede_env.models.random_weights import random_model
from lede_env.policies import MLPPolicy, load_policy


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
    with clear_errors():
        tyro.cli(main)
