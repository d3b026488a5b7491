"""How fast trajectory files are written and read: plain, compressed, and the same rows through Minari.

python -m benchmarks.dataset_io --rows 4000000
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks.harness import RESULTS, machine, print_table, write_results
from lede_env.arguments import clear_errors
from lede_env.data.dataset import Dataset, read_dataset
from lede_env.data.trajectory_file import Episode, TrajectoryWriter, rewrite
from lede_env.offline.loading import load_dataset


@dataclass
class Args:
    """Write and read real rows: a dataset's episodes, over and over."""

    dataset: str = "tiny/random-v0"  # whose rows
    rows: int = 4_000_000  # at least so many
    minari_rows: int = 200_000  # of the same, through Minari, which is slower
    chunk_rows: int = 65_536  # rows between commits, each with a flush to the disk
    repeats: int = 3  # the median counts
    folder: Path | None = None  # on the file system to measure; by default a temporary folder
    out: Path = RESULTS / "cpu"  # for dataset_io.csv, .md and .json


def median_seconds(action: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> float:
    seconds = []
    for _ in range(repeats):
        before()
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def write(path: Path, source: Dataset, episodes: list[Episode], chunk_rows: int) -> None:
    attributes = {name: value for name, value in source.attributes.items() if name not in ("format", "format_version")}
    with TrajectoryWriter(path, attributes, source.prompt_ids, source.features, chunk_rows=chunk_rows) as writer:
        for episode in episodes:
            writer.append(episode)


def repeated(source: Dataset, rows: int) -> list[Episode]:
    """Episodes of at least so many rows."""
    episodes = list(source.episodes())
    return episodes * -(-rows // source.n_rows)


def measure(args: Args, folder: Path) -> list[dict[str, Any]]:
    source = load_dataset(args.dataset, split="all")
    episodes, path = repeated(source, args.rows), folder / "rows.h5"
    n = sum(map(len, episodes))

    def row(form: str, written: float, read: float, size: int, count: int) -> dict[str, Any]:
        return {"form": form, "transitions": count, "write transitions/s": round(count / written),
                "read transitions/s": round(count / read), "bytes/transition": round(size / count, 1)}  # fmt: skip

    def fresh() -> None:
        path.unlink(missing_ok=True)

    written = median_seconds(lambda: write(path, source, episodes, args.chunk_rows), args.repeats, fresh)
    read = median_seconds(lambda: read_dataset(path), args.repeats)
    rows = [row("HDF5, uncompressed", written, read, path.stat().st_size, n)]
    packed = median_seconds(lambda: rewrite(path, {}, compressed=True), 1)
    read = median_seconds(lambda: read_dataset(path), args.repeats)
    rows.append(row("HDF5, compressed afterwards", written + packed, read, path.stat().st_size, n))
    rows.append(minari_row(source.take(np.arange(min(source.n_episodes, args.minari_rows))), args, folder, row))
    return rows


def minari_row(source: Dataset, args: Args, folder: Path, row: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The same rows as Minari keeps them."""
    import os

    import minari

    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    copies = [source] * max(1, args.minari_rows // source.n_rows)
    data = copies[0].concat(*copies[1:])
    written = median_seconds(lambda: data.to_minari("lede/io-v0"), 1)
    stored = minari.load_dataset("lede/io-v0")
    read = median_seconds(lambda: list(stored.iterate_episodes()), 1)
    size = sum(file.stat().st_size for file in (folder / "minari").rglob("*") if file.is_file())
    return row("Minari (HDF5)", written, read, size, data.n_rows)


def main(args: Args) -> None:
    console = Console()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rows = measure(args, folder)
    finally:
        shutil.rmtree(folder)
    print_table("Writing and reading transitions", rows, console)
    about = {"rows of": args.dataset, "chunk rows": args.chunk_rows, "median of": args.repeats, **machine(),
             "command": f"python -m benchmarks.dataset_io --rows {args.rows}"}  # fmt: skip
    write_results(args.out, "dataset_io", rows, about)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
