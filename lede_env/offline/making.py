"""Making a dataset by its recipe, and checking that a file is what its environment and its recipe give."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lede_env.data.registry import default_trace, load_trace
from lede_env.data.trajectory_file import PROVENANCE, checksum, read_trajectories, rewrite
from lede_env.data.trajectory_layout import locked, open_checked, temporary
from lede_env.errors import LedeError
from lede_env.offline.tiers import Recipe, recipe_of
from lede_env.oracles import Oracle
from lede_env.policies import check_compatible
from lede_env.recording import (
    Act,
    check_output,
    log_episodes,
    make_player_envs,
    policy_act,
    policy_digest,
    run_attributes,
)
from lede_env.validation import Validation, attribute, validate

LANES = 256  # episodes played together


def recipe_act(recipe: Recipe, envs: Any) -> Act:
    """What the behaviours of a recipe do, each in its own episodes."""
    core = envs.unwrapped
    if not recipe.behaviours:
        oracle = Oracle(core)
        return lambda observations, numbers, steps: (oracle.act(core._infos()), np.zeros(len(numbers)))
    acts = [policy_act(behaviour, core.features, recipe.seed) for behaviour in recipe.behaviours]

    def act(observations: np.ndarray, numbers: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        turn = numbers // recipe.block % len(acts)
        actions, logprobs = np.zeros(len(numbers), np.int64), np.zeros(len(numbers))
        for index, one in enumerate(acts):
            mine = turn == index
            if mine.any():
                actions[mine], logprobs[mine] = one(observations[mine], numbers[mine], steps[mine])
        return actions, logprobs

    return act


def make(
    recipe: Recipe,
    out: str | os.PathLike,
    episodes: int | None = None,
    *,
    first: int = 0,
    resume: bool = False,
    force: bool = False,
    compressed: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Play a recipe's episodes `first`, `first` + 1, ... into a trajectory file.

    Args:
        episodes: how many; by default what the recipe says.
        resume: go on with the file that a killed run left; one that is whole is left as it is.
        force: replace the trajectory file that is there, once the new one is whole.
        compressed: small; if not, a large file can be memory-mapped.
        progress: called with the episodes that are over, and how many there will be.

    Raises:
        LedeError: the file exists and `resume` and `force` are off, is of another recipe or, for `force`, no trajectory
            file or being written; or a bad argument.
        OSError: disk full or the like; what was committed is intact, and `resume` goes on. With `force`, the file is
            what it was.
    """
    out = Path(out)
    count = episode_count(recipe, episodes)
    if first < 0:
        raise LedeError(f"first={first} must not be negative")
    if resume and force:
        raise LedeError("resume goes on with a file and force replaces it; choose one of them")
    check_output(out)
    if force and out.exists():
        with _replacing(out.resolve()) as target:  # renaming onto a link would replace the link
            _play(recipe, target, count, first, False, compressed, progress)
    else:
        _play(recipe, out, count, first, resume, compressed, progress)
    return out


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Where to make the file that then takes the place of `out`, which is locked until then and kept on an error."""
    try:
        open_checked(out).close()
    except LedeError as error:
        raise LedeError(
            f"force replaces nothing but trajectory files: {error}. Choose another path, or remove the file yourself"
        ) from error
    target = temporary(out)
    with locked(out):
        with suppress(FileNotFoundError):  # what a killed run left
            target.unlink()
        try:
            yield target
            os.replace(target, out)
        except BaseException as error:
            with suppress(OSError):
                target.unlink()
            if not isinstance(error, OSError):
                raise
            code = error.errno or errno.EIO
            message = f"cannot write: {os.strerror(code)}. The file is what it was: free space or lift the limit, then"
            raise OSError(code, f"{message} try again", str(out)) from error


def _play(
    recipe: Recipe,
    out: Path,
    count: int,
    first: int,
    resume: bool,
    compressed: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """The whole of `make`, its arguments checked, into a path that no file has or that is to be resumed."""
    envs = make_player_envs(recipe.problem.env_id, LANES, **recipe.problem.env_kwargs)
    try:
        core: Any = envs.unwrapped
        known = core.attributes
        for policy in recipe.behaviours:
            check_compatible(policy, known["model_fingerprint"], known["candidate_layers"], core.features, known["mdp"])
        attributes = run_attributes(envs, **_attributes(recipe, first))
        if resume and is_whole(out):
            _check_whole(out, attributes, count)
            return
        log_episodes(
            envs, recipe_act(recipe, envs), range(first, first + count), out, attributes, resume=resume,
            progress=(lambda done: progress(done, count)) if progress else None,
        )  # fmt: skip
    finally:
        envs.close()
    rewrite(out, {"checksum": checksum(read_trajectories(out).arrays)}, compressed)


def is_whole(path: Path) -> bool:
    """Whether a file is there, and was made to its end."""
    return path.is_file() and "checksum" in read_trajectories(path, columns=()).attributes


def default_episodes(recipe: Recipe) -> int:
    """How many episodes the dataset of a name has."""
    return recipe.episodes or len(load_trace(recipe.problem.trace).prompt_ids)


def episode_count(recipe: Recipe, episodes: int | None) -> int:
    """How many episodes to play: those asked for, by default as many as the dataset has; a LedeError below 1."""
    count = default_episodes(recipe) if episodes is None else episodes
    if count < 1:
        own = default_episodes(recipe)
        raise LedeError(f"episodes={count} must be at least 1; leave it out for the {own} of {recipe.name}")
    return count


def _attributes(recipe: Recipe, first: int) -> dict[str, Any]:
    """What the file's header says beside the environment."""
    digests = [policy_digest(behaviour) for behaviour in recipe.behaviours] or ["oracle"]
    return {
        "dataset": recipe.name,
        "env_id": recipe.problem.env_id,
        "seed": recipe.seed,
        "policy": recipe.about,
        "behaviours": list(recipe.labels) or ["oracle"],
        "behaviour_digests": digests,
        "block": recipe.block,
        "first_episode": first,
        "trace_digest": load_trace(recipe.problem.trace).digest,
        "confounded": not recipe.behaviours,
    }


def _check_whole(out: Path, attributes: dict[str, Any], count: int) -> None:
    """Raise a LedeError unless the finished file is the one asked for."""
    content = read_trajectories(out, columns=())
    different = [name for name in ("dataset", "seed", "first_episode", "behaviour_digests", "trace_digest")
                 if content.attributes.get(name) != attributes[name]]  # fmt: skip
    if different or content.n_episodes != count:
        raise LedeError(
            f"{out} is whole, with {content.n_episodes} episodes, and not the {count} asked for"
            f"{' (' + ', '.join(different) + ' differ)' if different else ''}; choose another path, or remove it"
        )


def _recipe_that(path: str | os.PathLike, name: Any) -> Recipe:
    """The recipe that a file says it is made by."""
    try:
        return recipe_of(name)
    except LedeError as error:
        raise LedeError(f"{path} says that it is {name!r}: {error}") from error


@dataclass(frozen=True)
class Verification:
    """What was checked of a file. True if all of it holds."""

    replay: Validation  # every transition and reward, against the trace
    checksum: str  # of the arrays as they are
    recorded: str | None  # what the file says it is; None: a file that does not say
    rebuilt: str | None  # that of the file made again by its recipe; None: it has no name
    altered: tuple[str, ...] = ()  # attributes of its header that the recipe gives otherwise

    def __bool__(self) -> bool:
        sums_hold = all(other in (None, self.checksum) for other in (self.recorded, self.rebuilt))
        return bool(self.replay) and sums_hold and not self.altered

    def __str__(self) -> str:
        lines = [str(self.replay)]
        for what, other in (("the file's own checksum", self.recorded), ("made again by its recipe", self.rebuilt)):
            if other is not None:
                same = "equal" if other == self.checksum else f"{other[:16]}, but the arrays have {self.checksum[:16]}"
                lines.append(f"{what}: {same}")
        if self.altered:
            lines.append(f"the header, made again by its recipe: other {', '.join(self.altered)}")
        return "\n".join(lines)


def verify(path: str | os.PathLike) -> Verification:
    """Check a file: its structure, its checksum, by replay on the trace every transition and reward, and if it has a
    name, that its recipe gives the same arrays, log-probabilities too, and the same header.

    Raises:
        LedeError: not a trajectory file, of an unknown name, or its environment or its trace is not what it was.
    """
    content = read_trajectories(path)
    said = content.attributes
    trace = default_trace(attribute(path, content, "model_name", str), attribute(path, content, "temperature", float))
    if said.get("trace_digest", load_trace(trace).digest) != load_trace(trace).digest:
        raise LedeError(f"{path} was made from another recording of {trace}; make it again by `lede dataset make`")
    rebuilt, altered = None, []
    if "dataset" in said:
        with tempfile.TemporaryDirectory() as folder:
            again = make(_recipe_that(path, said["dataset"]), Path(folder) / "again.h5", content.n_episodes,
                         first=attribute(path, content, "first_episode", int), compressed=False)  # fmt: skip
            same = read_trajectories(again)
        rebuilt = checksum(_to_the_last_bit(same.arrays, content.arrays))
        altered = [name for name in sorted((said.keys() | same.attributes.keys()) - PROVENANCE - {"checksum"})
                   if said.get(name) != same.attributes.get(name)]  # fmt: skip
    replay = validate(path, trace)
    return Verification(replay, checksum(content.arrays), said.get("checksum"), rebuilt, tuple(altered))


def _to_the_last_bit(made: Mapping[str, np.ndarray], written: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays made again, with the features as they are in the file where these are as close as float32 allows.

    Some are sums of exponentials and logarithms, whose last bit is the processor's: numpy has several programs for it.
    """
    arrays = dict(made)
    for name in ("observations", "final_observations"):
        mine, other = made[name], written[name]
        if mine.shape == other.shape and np.allclose(mine, other, rtol=1e-5, atol=1e-6):
            arrays[name] = other
    return arrays
