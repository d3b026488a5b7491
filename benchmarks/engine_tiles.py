"""Block sizes of the CUDA engine's products: every candidate timed on the shapes of a model, the best printed.

`lede_env.engine.cuda.linear.tiling` holds what this found on an H200. Candidates are compiled by all cores first, then
timed one after another, each over several copies of the matrix, so that none is read from the cache.

    python -m benchmarks.engine_tiles --models llama2-7b
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.harness import RESULTS, machine, print_table, write_results
from lede_env.cli import clear_errors, progress_bar
from lede_env.errors import LedeError
from lede_env.models.zoo import MODELS, ModelSpec

SHARED_BYTES = 220_000  # shared memory of a Hopper multiprocessor that a program may take
COPIES_BYTES = 400_000_000  # of a matrix, together: many times the cache


@dataclass
class Args:
    """Time every block size of the engine's matrix products on this GPU."""

    models: tuple[str, ...] = ("llama2-7b",)
    rows: tuple[int, ...] = (1, 13)
    workers: int = max(1, (os.cpu_count() or 2) - 2)  # processes that compile
    out: Path = RESULTS / "h200"

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise LedeError(f"model {unknown[0]!r} is unknown; known: {', '.join(MODELS)}")


@dataclass(frozen=True)
class Product:
    """One matrix product of a model."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False
    norm: bool = False


def products(spec: ModelSpec) -> list[Product]:
    fused = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return [
        Product("qkv", fused, spec.hidden, norm=True),
        Product("out", spec.hidden, spec.heads * spec.head_dim),
        Product("gate_up", spec.mlp, spec.hidden, gated=True, norm=True),
        Product("down", spec.hidden, spec.mlp),
        Product("head", spec.vocab, spec.hidden, norm=True),
    ]


def candidates(rows: int, product: Product) -> Iterator[dict[str, int]]:
    matrices = 2 if product.gated else 1
    if rows == 1:
        for n, k, warps in itertools.product((2, 4, 8, 16), (256, 512, 1024, 2048), (2, 4, 8)):
            if 16 <= n * k * matrices // (32 * warps) <= 64:
                yield {"BN": n, "BK": k, "num_warps": warps, "num_stages": 1}
        return
    for n, k, warps, stages in itertools.product((16, 32, 64), (64, 128, 256, 512), (4, 8), (2, 3, 4, 5)):
        shared = stages * k * 2 * (n * matrices + 16)
        if 40_000 <= shared <= SHARED_BYTES:
            yield {"BN": n, "BK": k, "num_warps": warps, "num_stages": stages}


def run(product: Product, rows: int, tiles: dict[str, int], weights: list, buffers: dict[str, Any]) -> None:
    from lede_env.engine.cuda.linear import linear

    for weight in weights:
        linear(
            buffers["x"], weight, buffers["out"], buffers["state"], rows, tiles=tiles, gated=product.gated,
            norm=buffers["gain"] if product.norm else None, eps=buffers["eps"], residual=not product.norm,
        )  # fmt: skip


def tensors(product: Product, copies_bytes: int) -> tuple[list, dict[str, Any]]:
    """Copies of the matrix, and what else a product takes."""
    outputs = product.outputs * (2 if product.gated else 1)
    copies = max(1, copies_bytes // (2 * outputs * product.inputs))
    kind = torch.bfloat16
    options: dict[str, Any] = {"device": "cuda", "dtype": kind}
    weights = [torch.randn(outputs, product.inputs, **options).t() for _ in range(copies)]
    out_kind = torch.float32 if product.name == "head" else kind
    return weights, {
        "x": torch.randn(32, product.inputs, **options),
        "out": torch.zeros(32, product.outputs, device="cuda", dtype=out_kind),
        "gain": torch.ones(product.inputs, **options),
        "eps": torch.tensor(1e-5, device="cuda"),
        "state": torch.zeros(8, dtype=torch.long, device="cuda"),
    }


def compile_some(tasks: list[tuple[Product, int, dict[str, int]]]) -> None:
    """Fill the compiler's cache on disk."""
    made: dict[Product, tuple] = {}
    for product, rows, tiles in tasks:
        if product not in made:
            made[product] = tensors(product, 1)
        try:
            run(product, rows, tiles, *made[product])
        except Exception:  # too much shared memory or registers: the timing says so again
            continue


def timed(product: Product, rows: int, tiles: dict[str, int], weights: list, buffers: dict[str, Any]) -> float:
    """Median microseconds of one product, replayed as a graph over the copies."""
    run(product, rows, tiles, weights, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(product, rows, tiles, weights, buffers)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(7):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(weights))
    return sorted(samples[2:])[2]


def main(args: Args) -> None:
    console = Console()
    if not torch.cuda.is_available():
        raise LedeError("there is no CUDA device: block sizes are timed on the GPU they are for")
    wanted = [
        (product, rows, tiles)
        for name in args.models
        for product in products(MODELS[name])
        for rows in args.rows
        for tiles in candidates(rows, product)
    ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_some, [wanted[i :: args.workers] for i in range(args.workers)]))
    rows_out: list[dict[str, Any]] = []
    with progress_bar(console) as bar:
        made: dict[Product, tuple] = {}
        for product, rows, tiles in bar.track(wanted, description="timing"):
            if product not in made:
                made = {product: tensors(product, COPIES_BYTES)}
            weights, buffers = made[product]
            try:
                micros = timed(product, rows, tiles, weights, buffers)
            except Exception as error:  # does not fit this GPU
                console.print(f"{product.name} {rows} {tiles}: {type(error).__name__}", markup=False)
                continue
            rate = weights[0].numel() * 2 / micros * 1e-6
            shape = {"product": product.name, "outputs": product.outputs, "inputs": product.inputs, "rows": rows}
            rows_out.append({**shape, **tiles, "us": micros, "TB/s": rate})
    rows_out.sort(key=lambda row: (row["product"], row["inputs"], row["outputs"], row["rows"], row["us"]))
    keys = list(dict.fromkeys((r["product"], r["inputs"], r["outputs"], r["rows"]) for r in rows_out))
    best = [
        r
        for key in keys
        for r in [r for r in rows_out if (r["product"], r["inputs"], r["outputs"], r["rows"]) == key][:3]
    ]
    print_table("the three fastest of each product", best, console)
    write_results(args.out, "engine_tiles", best, machine("cuda"))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
