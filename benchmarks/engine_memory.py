"""GPU memory of loading a model and decoding with LEDE, against its weights, the KV cache in use, and 1 GiB.

Each way of loading has a process of its own, whose every reservation counts: the twin made on the device, and the twin
read from a folder of shards as a download would be.

    python -m benchmarks.engine_memory --model llama2-7b
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

import lede_env
from benchmarks.engine_peers import load_twin, twin_folder
from benchmarks.engine_roofline import filler, kv_bytes
from benchmarks.harness import machine, print_table, results_folder, write_results
from lede_env.arguments import clear_errors
from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError
from lede_env.models.zoo import twin_name

GIB = 2**30
SPARE = GIB  # what all but weights and KV cache may take


@dataclass
class Args:
    """Measure what is reserved on the GPU while a geometry twin loads and decodes."""

    model: str = "llama2-7b"
    context: int = 2048  # positions, the new tokens among them
    max_new_tokens: int = 64
    folder: Path | None = None  # of the written twin, used again if it is there; by default a temporary folder
    out: Path | None = None  # folder of the results; by default benchmarks/results/DEVICE


def main(args: Args) -> None:
    console = Console()
    if not torch.cuda.is_available():
        raise LedeError("there is no CUDA device: reserved memory is a GPU's")
    folder = twin_folder(args.model, args.folder, "cuda", console.print)
    about = {**machine("cuda"), **{name: str(value) for name, value in vars(args).items() if name != "out"}}
    about["model"] = twin_name(args.model)
    rows: list[dict[str, Any]] = []
    for origin in (None, folder):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure, args, origin).result())
        write_results(args.out or results_folder("cuda"), f"engine_memory-{twin_name(args.model)}", rows, about)
    print_table(f"GPU memory of {twin_name(args.model)}, decoding to {args.context} positions", rows, console)


def measure(args: Args, folder: Path | None) -> dict[str, Any]:
    """The row of one way of loading, in a process that has done nothing else."""
    if folder is None:
        lm = lede_env.load_model(args.model, weights="twin", device="cuda")
    else:
        lm = load_twin(folder, "cuda")
    loading = torch.cuda.max_memory_reserved()
    prompt = filler(lm, args.context - args.max_new_tokens)
    for temperature in (0.0, 0.6):
        options = dict(max_new_tokens=args.max_new_tokens, temperature=temperature)
        lede_env.generate(lm, prompt, strategy=lede_env.Lede(), **options)
    reserved = torch.cuda.max_memory_reserved()
    weights, cache = tensor_bytes(lm), kv_bytes(lm, args.context)
    beyond = reserved - weights - cache - SPARE
    return {
        "loaded from": "a folder of shards" if folder else "the donor, made on the device",
        "weights, GiB": weights / GIB,
        "KV, GiB": cache / GIB,
        "reserved while loading, GiB": loading / GIB,
        "reserved in all, GiB": reserved / GIB,
        "limit, GiB": (weights + cache + SPARE) / GIB,
        "verdict": "within" if beyond <= 0 else f"beyond by {beyond / GIB:.2f} GiB",
    }


def tensor_bytes(lm: LayeredLM) -> int:
    """Bytes of all of a model's tensors; memory that two of them share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(lm)}.values())


def tensors(part: Any) -> Iterator[Tensor]:
    """The tensors among a model's fields, and among its layers'."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield value
        elif field.name == "layers":
            for layer in value:
                yield from tensors(layer)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
