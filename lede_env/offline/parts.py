"""Large datasets: many workers, a file each, and one index. Workers are Ray's, on this machine or on a cluster.

What an episode is depends on its number alone, so the parts of a dataset are ranges of numbers, and together they hold
what one process would have written. A worker that dies is replaced: the next one goes on with its part's file, behind
the last committed episode. `load_dataset(folder)` reads the parts as one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from lede_env.data.dataset import Dataset, read_dataset
from lede_env.data.trajectory_file import read_trajectories
from lede_env.errors import LedeError
from lede_env.offline.making import episode_count, make
from lede_env.offline.tiers import Recipe

INDEX = "index.json"
RETRIES = 8  # workers that may die over one part


@dataclass(frozen=True)
class Part:
    """One worker's file, as the index lists it."""

    file: str
    first_episode: int
    episodes: int
    rows: int
    checksum: str


def collect(
    recipe: Recipe,
    folder: str | os.PathLike,
    episodes: int | None = None,
    workers: int = 4,
    *,
    gpus_per_worker: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Play a recipe's episodes by `workers` Ray workers into `folder`, which all of them must see; returns the folder.

    Uses the Ray cluster at hand (`ray.init(address=...)` or RAY_ADDRESS), else starts one on this machine. Called
    again on the same folder, it goes on with what is there.

    Args:
        progress: called with how many parts are whole, and how many there are.

    Raises:
        LedeError: Ray is not installed, no episodes or fewer than workers, more GPUs than there are, or the folder
            cannot be made or holds another dataset.
    """
    count = episode_count(recipe, episodes)
    try:
        import ray
    except ImportError as error:
        raise LedeError(f"collecting with workers needs an extra: pip install 'lede-env[ray]' ({error})") from error
    folder = Path(folder).resolve()
    if not 1 <= workers <= count:
        raise LedeError(f"workers={workers} for {count} episodes; give between 1 and as many workers as episodes")
    if gpus_per_worker < 0 or (gpus_per_worker > 1 and gpus_per_worker % 1):
        raise LedeError(f"gpus_per_worker={gpus_per_worker:g} must be a fraction below 1 or a whole number")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedeError(f"{folder} cannot be made a folder ({error}); choose another path") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
        found = ray.cluster_resources().get("GPU", 0)
        if found < gpus_per_worker and "RAY_ADDRESS" not in os.environ:  # Ray waits for more; only clusters may grow
            raise LedeError(f"gpus_per_worker={gpus_per_worker:g}, but Ray sees {found:g} GPUs here; ask for no more")
    play_part = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_retries=RETRIES)(_make_part)
    bounds = [count * n // workers for n in range(workers + 1)]
    tasks = [play_part.remote(recipe, folder, n, bounds[n], bounds[n + 1] - bounds[n]) for n in range(workers)]
    left = tasks
    while left:
        _, left = ray.wait(left)
        if progress:
            progress(workers - len(left), workers)
    try:
        parts = ray.get(tasks)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    write_index(folder, recipe.name, parts)
    return folder


def _make_part(recipe: Recipe, folder: Path, number: int, first: int, episodes: int) -> Part:
    """A worker's whole work."""
    path = folder / f"part-{number:04d}.h5"
    make(recipe, path, episodes, first=first, resume=True, compressed=False)
    content = read_trajectories(path, columns=())
    return Part(path.name, first, episodes, content.n_rows, content.attributes["checksum"])


def write_index(folder: Path, name: str, parts: list[Part]) -> None:
    values = {"dataset": name, "parts": [asdict(part) for part in parts]}
    target = folder / f"{INDEX}.tmp"
    target.write_text(json.dumps(values, indent=1) + "\n")
    target.replace(folder / INDEX)


def part_files(folder: Path) -> list[Path]:
    """The files of a folder's parts, in the order of their episodes.

    Raises:
        LedeError: no index or a bad one, or a part that is missing or not what the index says.
    """
    index = folder / INDEX
    if not index.is_file():
        raise LedeError(f"{folder} has no {INDEX}; collect into it to the end, or name one of its files")
    try:
        values = json.loads(index.read_text())
        parts = sorted((Part(**part) for part in values["parts"]), key=lambda part: part.first_episode)
        name, files = values["dataset"], [folder / part.file for part in parts]
        firsts = [0, *accumulate(part.episodes for part in parts)][:-1]
    except (ValueError, KeyError, TypeError) as error:
        raise LedeError(f"{index} is not an index of parts ({error!r}); collect into {folder} again") from error
    if not parts or [part.first_episode for part in parts] != firsts:
        raise LedeError(f"{index} lacks parts: those it has do not follow each other; collect into {folder} again")
    for part, file in zip(parts, files, strict=True):
        content = read_trajectories(file, columns=())
        said = [content.attributes.get(what) for what in ("dataset", "first_episode", "checksum")]
        found = (*said, content.n_episodes, content.n_rows)
        expected = (name, part.first_episode, part.checksum, part.episodes, part.rows)
        if found != expected:
            raise LedeError(f"{file} holds {found}, and {index} says {expected}; collect it again")
    return files


def read_parts(folder: Path) -> Dataset:
    """The parts of a folder, in the order of their episodes, as one dataset.

    Raises:
        LedeError: what `part_files` and `read_dataset` refuse.
    """
    first, *others = map(read_dataset, part_files(folder))
    return first.concat(*others)
