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
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from rich.console import Console

from benchmarks.harness import RESULTS, machine, print_table, write_results
from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.errors import LedeError
from lede_env.models.zoo import MODELS, ModelSpec

if TYPE_CHECKING:
    from lede_env.engine.cuda.linear import Tiles

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


def candidates(rows: int, product: Product) -> Iterator[Tiles]:
    from lede_env.engine.cuda.linear import Tiles

    matrices = 2 if product.gated else 1
    if rows == 1:
        for n, k, warps, stages in itertools.product((4, 8, 16), (256, 512, 1024, 2048), (2, 4, 8), (1, 3, 4)):
            if 16 <= n * k * matrices // (32 * warps) <= 64 and stages * n * k * matrices * 2 <= SHARED_BYTES:
                yield Tiles(n, k, warps, stages, dot=False)
    for n, k, warps, stages in itertools.product((16, 32, 64), (64, 128, 256, 512), (4, 8), (3, 4, 5)):
        if 40_000 <= stages * k * 2 * (n * matrices + 16) <= SHARED_BYTES:
            yield Tiles(n, k, warps, stages, dot=True)


def run(product: Product, rows: int, tiles: Tiles, weights: list, buffers: dict[str, Any]) -> None:
    """The product with each copy of its matrix, as the engine asks for it."""
    from lede_env.engine.cuda.linear import linear

    gained, gain = buffers["gained"][rows], buffers["gain"]
    for weight in weights:
        linear(
            gained if product.norm else buffers["x"], weight, buffers["out"], buffers["state"], rows, tiles=tiles,
            gated=product.gated, eps=buffers["eps"], residual=None if product.norm else (gain, gained),
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
        "out": torch.zeros(64, product.outputs, device="cuda", dtype=out_kind),
        "gain": torch.ones(product.outputs, **options),
        "gained": {rows: gained(rows, product) for rows in range(1, 20)},
        "eps": torch.tensor(1e-5, device="cuda"),
        "state": torch.zeros(8, dtype=torch.long, device="cuda"),
    }


def gained(rows: int, product: Product) -> Any:
    """Random states as the first half of a norm."""
    from lede_env.engine.cuda.linear import Gained

    wide = max(product.inputs, product.outputs)
    made = Gained.empty(rows, product.inputs if product.norm else wide, torch.bfloat16, torch.device("cuda"))
    made.x.normal_()
    made.parts = 256
    return made


def compile_some(tasks: list[tuple[Product, int, Tiles]]) -> None:
    """Fill the compiler's cache on disk."""
    made: dict[Product, tuple] = {}
    for product, rows, tiles in tasks:
        if product not in made:
            made[product] = tensors(product, 1)
        try:
            run(product, rows, tiles, *made[product])
        except Exception:  # too much shared memory or registers: the timing says so again
            continue


def timed(product: Product, rows: int, tiles: Tiles, weights: list, buffers: dict[str, Any]) -> float:
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


def fastest(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first few of each product and number of rows."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["us"]):
        kinds.setdefault((row["product"], row["inputs"], row["outputs"], row["rows"]), []).append(row)
    return [row for kind in sorted(kinds) for row in kinds[kind][:count]]


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
            rows_out.append({**shape, **asdict(tiles), "us": micros, "TB/s": rate})
    best = fastest(rows_out, 3)
    print_table("the three fastest of each product", best, console)
    write_results(args.out, "engine_tiles", best, machine("cuda"))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
