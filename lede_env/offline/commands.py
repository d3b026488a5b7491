"""`lede dataset`: list, info, make, verify, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from lede_env.display.progress import progress_bar
from lede_env.errors import LedeError

app = SubcommandApp()
console = Console()


@app.command(name="list")
def list_() -> None:
    """List the datasets that have names, and where each is."""
    from lede_env.data.trajectory_file import read_trajectories
    from lede_env.offline.loading import at_hand
    from lede_env.offline.tiers import NAMES, recipe_of

    table = Table("dataset", "episodes", "transitions", "MB", "where")
    for name in NAMES:
        path = at_hand(name)
        if path is None:
            table.add_row(name, "", "", "", "made when loaded")
        else:
            content = read_trajectories(path, columns=())
            size = f"{path.stat().st_size / 1e6:.1f}"
            table.add_row(name, str(content.n_episodes), str(content.n_rows), size, str(path))
    console.print(table)
    for tier, about in {name.split("/")[1]: recipe_of(name).about for name in NAMES}.items():
        console.print(f"{tier}: {about}", highlight=False, markup=False)


@app.command
def info(name: Positional[str], /, *, json: bool = False) -> None:
    """Show what a dataset holds and where it comes from.

    Args:
        name: of a dataset, or the path of a trajectory file.
        json: print it as JSON instead of a table.
    """
    from json import dumps

    from lede_env.offline.cards import summary
    from lede_env.offline.loading import find, load_dataset

    path = find(name)
    facts = {"file": str(path), **summary(load_dataset(path, split="all"))}
    if json:
        print(dumps(facts, indent=1))
        return
    table = Table("what", "value")
    for what, value in facts.items():
        table.add_row(what, str(value))
    console.print(table)


@app.command
def make(
    name: Positional[str],
    /,
    *,
    out: Path | None = None,
    episodes: int | None = None,
    resume: bool = False,
    force: bool = False,
    uncompressed: bool = False,
    workers: int = 0,
    gpus_per_worker: float = 0.0,
) -> None:
    """Make a dataset by its recipe, array for array what it was; or a larger one.

    Args:
        name: of a dataset; "all" makes those that ship, with their cards and the catalogue, into the folder --out.
        out: the file; by default where load_dataset looks. With workers, a folder.
        episodes: how many; more than the default plays the prompts again with other coins.
        resume: go on with what a killed run left.
        force: replace the trajectory file that is there, once the new one is whole.
        uncompressed: larger on disk, but it can be memory-mapped.
        workers: Ray workers that share the episodes; 0 is this process alone.
        gpus_per_worker: see workers.
    """
    from lede_env.offline.loading import cached
    from lede_env.offline.making import make as make_file
    from lede_env.offline.parts import collect
    from lede_env.offline.tiers import recipe_of

    if name == "all":
        if episodes is not None or resume or uncompressed or workers or gpus_per_worker:
            raise LedeError("`lede dataset make all` takes no arguments but --out and --force")
        make_all(out or Path("datasets"), force)
        return
    recipe = recipe_of(name)
    if workers:
        _check_of_workers(resume=resume, force=force, uncompressed=uncompressed)
        folder = out or cached(name).with_suffix("")
        with episode_bar(f"collecting {name}, parts") as progress:
            collect(recipe, folder, episodes, workers, gpus_per_worker=gpus_per_worker, progress=progress)
        console.print(f"{folder}: load it by lede_env.load_dataset({str(folder)!r})", highlight=False, markup=False)
        return
    if gpus_per_worker:
        raise LedeError(f"--gpus-per-worker {gpus_per_worker:g} is of workers; give --workers N too, or leave it out")
    path = out or cached(name)
    with episode_bar(f"making {name}") as progress:
        make_file(
            recipe, path, episodes, resume=resume, force=force, compressed=not uncompressed, progress=progress
        )  # fmt: skip
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", highlight=False, markup=False)


def _check_of_workers(**chosen: bool) -> None:
    """Raise a LedeError that names what was chosen and workers do not take."""
    given = ", ".join(f"--{name}" for name, value in chosen.items() if value)
    if given:
        raise LedeError(
            f"--workers does not take {given}: parts are always uncompressed, and always go on with what their folder "
            "holds; leave it out, and to begin anew choose another folder by --out"
        )


def make_all(folder: Path, force: bool) -> None:
    """The datasets that ship, their cards and the catalogue."""
    from lede_env.offline.cards import write_catalogue
    from lede_env.offline.tiers import SHIPPED

    there = [name for name in SHIPPED if (folder / f"{name}.h5").exists()]
    if there and not force:
        raise LedeError(f"{folder} has {', '.join(there)}; replace them by --force, or choose another folder by --out")
    for name in SHIPPED:
        make(name, out=folder / f"{name}.h5", force=force)
    with episode_bar("cards") as progress:
        write_catalogue(folder, SHIPPED, progress)
    console.print(f"{folder / 'README.md'}: the catalogue", highlight=False, markup=False)


@app.command
def verify(names: Positional[tuple[str, ...]], /) -> None:
    """Check files: structure, checksum, every transition and reward by replay; and named ones by making them again.

    Args:
        names: of datasets, or paths of trajectory files or of folders that `make --workers` filled; "all": all
            named ones that are at hand.
    """
    from lede_env.offline.loading import at_hand, existing
    from lede_env.offline.making import verify as verify_file
    from lede_env.offline.parts import part_files
    from lede_env.offline.tiers import NAMES

    if names == ("all",):
        names = tuple(name for name in NAMES if at_hand(name))
    if not names:
        raise LedeError("nothing to verify; give names of datasets, paths, or `all` where datasets are at hand")
    files: list[Path] = []
    for place in map(existing, names):
        files += part_files(place) if place.is_dir() else [place]
    wrong = []
    for path in files:
        found = verify_file(path)
        console.print(f"{path}: {'good' if found else 'WRONG'}\n{found}", highlight=False, markup=False, soft_wrap=True)
        wrong += [] if found else [str(path)]
    if wrong:
        raise LedeError(f"not what they should be: {', '.join(wrong)}; make them again by `lede dataset make`")


@app.command
def export(
    name: Positional[str],
    /,
    *,
    to: Literal["minari", "d3rlpy"],
    out: str,
    split: str = "train",
    features: str = "extended",
) -> None:
    """Write a dataset in another library's format.

    Args:
        name: of a dataset, or the path of a trajectory file.
        to: the library.
        out: of Minari, an id such as lede/tiny-random-v0, for its local storage; of d3rlpy, an .h5 file.
        split: train, validation, test or all.
        features: extended or paper.
    """
    from lede_env.data.exporters import write_d3rlpy
    from lede_env.offline.loading import load_dataset
    from lede_env.recording import check_output

    if to == "d3rlpy":
        check_output(Path(out))
    dataset = load_dataset(name, split, features)
    if to == "minari":
        dataset.to_minari(out)
        console.print(f"minari.load_dataset({out!r})", highlight=False, markup=False)
        return
    write_d3rlpy(dataset, out)
    console.print(f"d3rlpy.dataset.ReplayBuffer.load({out!r}, d3rlpy.dataset.InfiniteBuffer())", highlight=False,
                  markup=False)  # fmt: skip


@contextmanager
def episode_bar(what: str) -> Iterator[Callable[[int, int], Any]]:
    """A progress bar, as a function to call with how much is done, and of how much."""
    with progress_bar(console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
