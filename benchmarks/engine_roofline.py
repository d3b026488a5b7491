"""How close the CUDA engine comes to the memory's speed, and where the rest goes.

A step at batch 1 reads every weight once, and the keys and values of the context. The floor of a step is those bytes
over the best read rate that any kernel of this run reached, warmed up, and no less than 4.2 TB/s on an H200.

    python -m benchmarks.engine_roofline --model llama2-7b
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import lede_env
from benchmarks.harness import machine, print_table, results_folder, write_results
from lede_env.arguments import clear_errors
from lede_env.engine.acceptance import Sampling
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.round import DRAFT_CAP
from lede_env.errors import LedeError
from lede_env.tasks import load_prompts

H200_RATE = 4.2e12  # bytes/s: a best rate below it means that the run was not warm
GREEDY = Sampling()
MEASURED_AT = 512  # positions behind the pieces
WIDTHS = (1, 2, 4, 8, DRAFT_CAP + 1)  # rows of a verification; one is a plain step


@dataclass
class Args:
    """Measure the floor of a decoding step on this GPU, and how far above it the engine is."""

    model: str = "llama2-7b"
    weights: Literal["auto", "twin"] = "twin"
    contexts: tuple[int, ...] = (512, 2048, 3968)
    steps: int = 64  # timed at each context
    out: Path | None = None  # folder of the results; by default benchmarks/results/DEVICE


def main(args: Args) -> None:
    console = Console()
    if not torch.cuda.is_available():
        raise LedeError("there is no CUDA device: the roofline is a GPU's")
    about: dict[str, Any] = {**machine("cuda"), **{name: str(value) for name, value in vars(args).items()}}
    lm = lede_env.load_model(args.model, weights=args.weights, device="cuda")
    rate, rows = bandwidths(lm)
    about["best read rate, TB/s"] = rate / 1e12
    rows += pieces(lm)
    device = {row["what"]: row["ms"] for row in rows if "ms" in row}
    on_device = lm.n_layers * device["one layer, 1 rows"] + device["head and verdict, 1 rows, T = 0"]
    for context in args.contexts:
        rows += steps(lm, context, args.steps, max(rate, H200_RATE))
        if context == MEASURED_AT:
            rows.append({"what": "of it neither layers nor head: host, launches", "ms": rows[-1]["ms"] - on_device})
    about["weights, GiB"] = sum(weight_bytes(lm).values()) / 2**30
    print_table(f"{lm.name}, {lm.dtype}, batch 1", rows, console)
    write_results(args.out or results_folder("cuda"), f"engine_roofline-{lm.name}", rows, about)


def median_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Of a call on the device, by events, after a warm-up."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for repeat in range(repeats + 5):
        begin.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 5:
            samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def weight_bytes(lm: LayeredLM) -> dict[str, int]:
    """Bytes of the matrices that a step reads: the layers' and the head's."""
    layers = sum(m.nbytes for layer in lm.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down))
    return {"layers": layers, "head": lm.head.nbytes}


def kv_bytes(lm: LayeredLM, positions: int) -> int:
    """Bytes of one sequence's keys and values."""
    g = lm.geometry
    return 2 * g.n_layers * g.kv_heads * g.head_dim * lm.dtype.itemsize * positions


def bandwidths(lm: LayeredLM) -> tuple[float, list[dict[str, Any]]]:
    """Best read rate of the run, bytes/s, and the rows that say how it was found."""
    big = torch.empty(2**31, dtype=torch.int8, device="cuda").random_(-9, 9)
    other = torch.empty_like(big)
    for _ in range(30):  # memory clocks rise under load
        other.copy_(big)
    copied = 2 * big.nbytes / median_seconds(partial(other.copy_, big))
    read = big.nbytes / median_seconds(big.view(torch.int64).amax)
    head = head_rate(lm)
    rates = {"copy, read and written": copied, "reduction, read": read, "the head's product, read": head}
    return max(rates.values()), [{"what": name, "TB/s": value / 1e12} for name, value in rates.items()]


def head_rate(lm: LayeredLM) -> float:
    """Bytes/s of the engine's widest product, one after another in a graph: what its kernels reach at best."""
    from lede_env.engine.cuda.linear import linear

    x = torch.randn(1, lm.geometry.hidden, device="cuda", dtype=lm.dtype)
    out = torch.zeros(1, lm.geometry.vocab, device="cuda")
    state = torch.zeros(8, dtype=torch.long, device="cuda")
    linear(x, lm.head, out, state, 1)  # compiled before it is captured
    graph, times = torch.cuda.CUDAGraph(), 20
    with torch.cuda.graph(graph):
        for _ in range(times):
            linear(x, lm.head, out, state, 1)
    return times * lm.head.nbytes / median_seconds(graph.replay)


def pieces(lm: LayeredLM) -> list[dict[str, Any]]:
    """Milliseconds of a layer, a head and a verdict by width, and of an exit check, at MEASURED_AT positions."""
    rows = []
    for width in WIDTHS:
        with torch.inference_mode(), lm.session(1, 1024, max(2, width)) as session:  # runs one row, or its width
            session.prefill(0, filler(lm, MEASURED_AT))
            session.fill(slot=0)
            whole = median_seconds(session.graph(*session._segment(0, lm.n_layers, width)).replay)
            rows.append({"what": f"one layer, {width} rows", "ms": whole / lm.n_layers * 1e3})
            for sampling in (GREEDY, Sampling(0.6)):
                key = ("verify", width, sampling, False)
                verdict = session.graph(key, partial(session._verify, width, sampling, False))
                what = f"head and verdict, {width} rows, T = {sampling.temperature:g}"
                rows.append({"what": what, "ms": median_seconds(verdict.replay) * 1e3})
            for sampling in (GREEDY, Sampling(0.6)) if width == WIDTHS[-1] else ():
                check = median_seconds(session.graph(("read", sampling), partial(session._read_out, sampling)).replay)
                rows.append({"what": f"exit check and draw, T = {sampling.temperature:g}", "ms": check * 1e3})
    return rows


def filler(lm: LayeredLM, length: int) -> list[int]:
    """A prompt of that length, from the texts at hand."""
    ids: list[int] = []
    for prompt in load_prompts("all", "all"):
        ids += lm.encode(prompt.text)
        if len(ids) >= length:
            break
    return ids[:length]


def steps(lm: LayeredLM, context: int, count: int, rate: float) -> list[dict[str, Any]]:
    """Plain decoding at a context: seconds a token, and the share of the floor."""
    prompt = filler(lm, context - count // 2)
    decode = lambda: lede_env.generate(lm, prompt, max_new_tokens=count).metrics  # noqa: E731
    decode()
    found = sorted(m.decode_seconds / m.tokens for m in (decode() for _ in range(5)))[2]
    floor = (sum(weight_bytes(lm).values()) + kv_bytes(lm, context)) / rate
    what = f"autoregressive step at {context} positions"
    return [{"what": what, "ms": found * 1e3, "tokens/s": 1 / found, "floor, ms": floor * 1e3,
             "share of the floor": floor / found}]  # fmt: skip


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
