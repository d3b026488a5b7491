"""Finding a dataset by its name, and reading it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lede_env.data.dataset import Dataset, read_dataset
from lede_env.data.registry import load_trace
from lede_env.digest import digest
from lede_env.errors import LedeError
from lede_env.offline.making import is_whole, make
from lede_env.offline.parts import read_parts
from lede_env.offline.tiers import NAMES, recipe_of
from lede_env.recording import policy_digest
from lede_env.tasks import SPLITS

CHECKOUT = Path(__file__).parent.parent.parent / "datasets"


def load_dataset(
    name_or_path: str | os.PathLike, split: str = "train", features: str | Sequence[str] = "extended"
) -> Dataset:
    """A dataset by its name (`lede dataset list`), or from a trajectory file or a folder of `lede dataset make`.

    A name is looked up in `$LEDE_DATA`, in the checkout's `datasets/` and in the cache; else it is made from the
    shipped trace, which is said. Arrays are in memory; those of an uncompressed file of a gigabyte or more are
    memory-mapped, which `split="all"` leaves so.

    Args:
        split: the part of "train" (not to learn from the prompts that scores are taken on), "validation" or "test"
            prompts, or "all" of them.
        features: which of the observations' columns: "extended" (all but an acceptance head's), "paper" or a tuple of
            names.

    Raises:
        LedeError: neither a name nor a file, no such part or feature, or a file that is damaged.
    """
    if split not in (*SPLITS, "all"):
        raise LedeError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}, all")
    path = find(name_or_path)
    dataset = read_parts(path) if path.is_dir() else read_dataset(path)
    if split != "all":
        parts = dataset.split()
        if split not in parts:
            raise LedeError(f"{dataset!r} has no episodes of split {split!r}, only of {', '.join(parts) or 'none'}")
        dataset = parts[split]
    return dataset.select(features)


def find(name_or_path: str | os.PathLike) -> Path:
    """The file of a name, made if there is none; or a path as it is.

    Raises:
        LedeError: neither a name nor an existing file.
    """
    name = os.fspath(name_or_path)
    if name not in NAMES or at_hand(name):
        return existing(name)
    path = cached(name)
    Console(stderr=True).print(f"{name} is not at hand; making it from the shipped trace: {path}", highlight=False)
    make(recipe_of(name), path, resume=True)
    return path


def existing(name_or_path: str | os.PathLike) -> Path:
    """The file of a name, or a path as it is; nothing is made.

    Raises:
        LedeError: neither a name nor an existing file, or a name of which there is no file.
    """
    name = os.fspath(name_or_path)
    path = at_hand(name) if name in NAMES else Path(name)
    if path is None:
        raise LedeError(f"{name} is not at hand: there is no file of it; make it by `lede dataset make {name}`")
    if not path.exists():
        raise LedeError(f"{name}: neither a file nor a dataset; the names are: {', '.join(NAMES)}")
    return path


def at_hand(name: str) -> Path | None:
    """The file of a name, where there is one."""
    places = [Path(folder) / f"{name}.h5" for folder in (os.environ.get("LEDE_DATA"), CHECKOUT) if folder]
    found = next((path for path in places if path.is_file()), None)
    return found or (cached(name) if is_whole(cached(name)) else None)


def cached(name: str) -> Path:
    """Where a dataset is made to if it is nowhere else. Another recipe or trace is another file."""
    recipe = recipe_of(name)
    version = digest([*map(policy_digest, recipe.behaviours), recipe.block, load_trace(recipe.problem.trace).digest])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lede_env" / "datasets" / f"{name}-{version[:8]}.h5"
