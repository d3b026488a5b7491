"""Datasets in the form of other libraries: d3rlpy, Minari (and back), Stable-Baselines3, RLDS.

`boundary` says where an episode ends for the library that learns. "token" (draft MDP: a round): wherever `discount`
is 0, as a terminal state, so that nothing is bootstrapped across stopping problems that do not touch each other.
"prompt": where the text ends, `discount` being ignored; returns are then those of whole prompts.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stderr, suppress
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from lede_env.data.dataset import PROBLEM, Dataset
from lede_env.data.trajectory_layout import COLUMNS, TABLES, locked, temporary
from lede_env.errors import LedeError

if TYPE_CHECKING:
    from d3rlpy.dataset import ReplayBuffer as D3rlpyBuffer
    from minari import MinariDataset
    from stable_baselines3.common.buffers import ReplayBuffer as SB3Buffer

BOUNDARIES = ("token", "prompt")
# Columns that a Minari episode has in its own way; the others are its infos.
_MINARI = ("observations", "actions", "rewards", "terminals", "timeouts")
_MINARI_OVERHEAD = 50_000  # bytes an episode, at most
_PROBED = 1 << 20
_ATTRIBUTES = "lede_attributes"  # of a Minari dataset: ours, as JSON


def ends_of(dataset: Dataset, boundary: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) booleans: where an episode ends by itself, and where it is cut. What is cut may be bootstrapped from.

    Raises:
        LedeError: an unknown boundary, or a dataset without episodes.
    """
    if boundary not in BOUNDARIES:
        raise LedeError(f"boundary={boundary!r} is unknown; use one of {', '.join(BOUNDARIES)}")
    if not dataset.n_episodes:
        raise LedeError(f"{dataset!r} has nothing to export")
    terminals, timeouts = dataset["terminals"], dataset["timeouts"]
    if boundary == "token":
        terminals = terminals | (dataset["discount"] == 0)
        timeouts = timeouts & ~terminals
    return terminals, timeouts


def to_d3rlpy(dataset: Dataset, boundary: str = "token") -> D3rlpyBuffer:
    """As d3rlpy's `MDPDataset`. d3rlpy knows no next observation of an episode's last step, and drops that step where
    the episode is cut: so a cut one gets one more step, the observation it ended on (action 0, reward 0). Algorithms
    that learn from transitions (CQL, IQL...) only ever bootstrap from it. Those that learn from trajectories (decision
    transformers) see it as a step like others, with an action that nobody took: let them learn from episodes that end
    by themselves, `dataset.filter(lambda episode: episode.terminals[-1])`.

    Raises:
        LedeError: an unknown boundary, no episodes, or d3rlpy is not installed.
    """
    terminals, timeouts = ends_of(dataset, boundary)
    with redirect_stderr(StringIO()):  # it imports the old gym, which complains
        try:
            from d3rlpy.constants import ActionSpace
            from d3rlpy.dataset import MDPDataset
        except ImportError as error:
            raise LedeError(f"to_d3rlpy needs an extra: pip install 'lede-env[d3rlpy]' ({error})") from error
    cut = np.flatnonzero(timeouts)
    finals = dataset["final_observations"][np.searchsorted(dataset.bounds, cut, "right") - 1]  # (cut, F)
    return MDPDataset(
        observations=np.insert(dataset["observations"], cut + 1, finals, axis=0),
        actions=np.insert(dataset["actions"].astype(np.int64), cut + 1, 0)[:, None],
        rewards=np.insert(dataset["rewards"], cut + 1, 0.0)[:, None],
        terminals=np.insert(terminals, cut + 1, False).astype(np.float32),
        timeouts=np.insert(np.zeros(dataset.n_rows, np.float32), cut + 1, 1.0),
        action_space=ActionSpace.DISCRETE,
        action_size=2,
    )


def fill_sb3(dataset: Dataset, buffer: SB3Buffer, boundary: str = "token") -> None:
    """Add every row to a replay buffer of Stable-Baselines3, made for one environment.

    Raises:
        LedeError: an unknown boundary, no episodes, or a buffer that cannot hold the rows as they are: for several
            environments, too small or filled, of other observations or actions, or without room for timeouts.
    """
    terminals, timeouts = ends_of(dataset, boundary)
    _check_sb3(dataset, buffer)
    rows = zip(
        dataset["observations"], dataset.next_observations, dataset["actions"], dataset["rewards"],
        terminals | timeouts, timeouts, strict=True,
    )  # fmt: skip
    for observation, following, action, reward, done, cut in rows:
        infos = [{"TimeLimit.truncated": bool(cut)}]
        buffer.add(observation[None], following[None], np.array([action]), np.array([reward]), np.array([done]), infos)


def _check_sb3(dataset: Dataset, buffer: SB3Buffer) -> None:
    """Stable-Baselines3 itself broadcasts, truncates and overwrites in silence."""
    room = 0 if buffer.full else buffer.buffer_size - buffer.pos
    if buffer.n_envs != 1 or room < dataset.n_rows:
        raise LedeError(
            f"the buffer has room for {room} more transitions of {buffer.n_envs} environments; expected at least "
            f"{dataset.n_rows} of 1: make a new one, ReplayBuffer({dataset.n_rows}, ..., n_envs=1)"
        )
    shape, dtype = dataset["observations"].shape[1:], buffer.observations.dtype
    if buffer.obs_shape != shape or not np.can_cast(np.float32, dtype):
        raise LedeError(
            f"the buffer's observations are {dtype} {buffer.obs_shape}; expected float32 {shape}, the dataset's "
            f"features {dataset.features}: make the buffer for them, or load the dataset with features=..."
        )
    if buffer.action_space != gym.spaces.Discrete(2):
        raise LedeError(f"the buffer's actions are {buffer.action_space}; expected Discrete(2): make the buffer for it")
    if buffer.optimize_memory_usage or not buffer.handle_timeout_termination:
        raise LedeError(
            f"the buffer has optimize_memory_usage={buffer.optimize_memory_usage} and handle_timeout_termination="
            f"{buffer.handle_timeout_termination}, so cut episodes would count as terminal; expected False and True: "
            "make the buffer with these"
        )


def to_rlds(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Episodes as RLDS has them (Ramos et al., 2021): `{"steps": {...}, "prompt_id": ...}`.

    steps are arrays (T + 1,): the last one is the observation that the episode ended on, its action, reward and
    discount being 0. `discount` is ours times 1 - terminal, `is_terminal` is true on that last step of an episode that
    ended by itself.
    """
    for episode in dataset.episodes():
        n = len(episode)
        steps = {
            "observation": np.concatenate([episode.observations, episode.final_observation[None]]),
            "action": np.append(episode.actions, np.uint8(0)),
            "reward": np.append(episode.rewards, np.float32(0)),
            "discount": np.append(episode.discount * ~episode.terminals, np.float32(0)),
            "is_first": np.arange(n + 1) == 0,
            "is_last": np.arange(n + 1) == n,
            "is_terminal": np.append(np.zeros(n, bool), episode.terminals[-1]),
        }
        yield {"steps": steps, "prompt_id": dataset.prompt_ids[episode.prompt_id[0]]}


def write_d3rlpy(dataset: Dataset, path: str | os.PathLike, boundary: str = "token") -> None:
    """`to_d3rlpy` into an .h5 file, whole or not at all; `ReplayBuffer.load` of d3rlpy reads it.

    Raises:
        LedeError: as `to_d3rlpy`; the file exists, or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise LedeError(f"{path} exists; choose another path, or remove it")
    content = BytesIO()  # HDF5 leaks a file that it fails to write
    to_d3rlpy(dataset, boundary).dump(content)
    target = temporary(path)
    try:
        target.write_bytes(content.getbuffer())
        target.replace(path)
    except BaseException as error:
        with suppress(OSError):
            target.unlink()
        if isinstance(error, OSError):
            raise _unwritten(path, error) from error
        raise


def _unwritten(path: Path, error: Exception) -> LedeError:
    code = getattr(error, "errno", None)
    reason = os.strerror(code) if code else error  # HDF5's own message is a paragraph
    return LedeError(
        f"{path} cannot be written: {reason}. Nothing is left of it: free space or lift the limit, then try again"
    )


def to_minari(dataset: Dataset, dataset_id: str, **about: Any) -> MinariDataset:
    """Into Minari's local storage, as whole prompts; `minari.load_dataset(dataset_id)` gives it again, in any process,
    and `recover_environment()` makes its environment, of a part the part's; where that cannot be made here, a warning
    says why, and the export has none.

    Args:
        dataset_id: as Minari wants it, such as "lede/tiny-random-v0".
        about: `author`, `description` and so on, of `minari.create_dataset_from_buffers`.

    Raises:
        LedeError: no episodes, Minari is not installed or refuses the id, has such a dataset or is getting one from
            another process, or its storage has no room. Nothing is left then; after a kill, neither: the dataset gets
            its name once it is whole.
    """
    minari = _import_minari()
    buffers = [_minari_buffer(minari, number, episode) for number, episode in enumerate(dataset.episodes())]
    if not buffers:
        raise LedeError(f"{dataset!r} has nothing to export")
    about = {"algorithm_name": str(dataset.attributes.get("policy", "unknown")), **about}
    extra = {**dataset.attributes, "prompt_ids": dataset.prompt_ids}
    env = _environment(dataset)
    with closing(env) if env else nullcontext(), _minari_writing(minari, dataset_id) as unfinished:
        _check_room(minari.storage.get_dataset_path(), buffers)
        try:
            made = minari.create_dataset_from_buffers(unfinished, buffers, env=env, **about, **_spaces(dataset, env))
        except ValueError as error:
            raise LedeError(f"Minari does not take {dataset_id!r}: {error}") from error
        metadata = made.storage.data_path / "metadata.json"  # Minari itself does not change an id
        said = json.loads(metadata.read_text()) | {"dataset_id": dataset_id, _ATTRIBUTES: json.dumps(extra)}
        metadata.write_text(json.dumps(said))
    return minari.load_dataset(dataset_id)


@contextmanager
def _minari_writing(minari: Any, dataset_id: str) -> Iterator[str]:
    """The id to write a dataset under, whose folder is then renamed to that of `dataset_id`, or removed on an error."""
    from minari.dataset.minari_dataset import gen_dataset_id, parse_dataset_id

    try:
        namespace, name, version = parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:  # TypeError: without a version
        raise LedeError(
            f"Minari does not take {dataset_id!r}: expected NAME-vN or NAMESPACE/NAME-vN, of letters, "
            "digits, - and _ (a namespace of at least two), such as lede/tiny-random-v0"
        ) from error
    unfinished = gen_dataset_id(namespace, f"{name}-unfinished", version)
    path, target = map(minari.storage.get_dataset_path, (dataset_id, unfinished))
    try:
        with locked(minari.storage.get_dataset_path() / dataset_id.replace("/", "-")):
            if path.exists():
                raise LedeError(
                    f"Minari's dataset {dataset_id!r} already exists, in {path}; choose another id, or remove it by "
                    f"`minari delete {dataset_id}`"
                )
            shutil.rmtree(target, ignore_errors=True)  # what a killed export left
            try:
                yield unfinished
                target.rename(path)
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
    except (OSError, RuntimeError) as error:  # h5py has either where it cannot write
        raise _unwritten(path, error) from error


def from_minari(dataset_id: str) -> Dataset:
    """A dataset that `to_minari` made, as it was.

    Raises:
        LedeError: Minari is not installed or has no such dataset, or it was not made by `to_minari`.
    """
    minari = _import_minari()
    try:
        stored = minari.load_dataset(dataset_id)
    except (FileNotFoundError, ValueError) as error:
        raise LedeError(f"Minari has no dataset {dataset_id!r} on this machine: {error}") from error
    if _ATTRIBUTES not in stored.storage.metadata:
        raise LedeError(f"Minari's dataset {dataset_id!r} was not exported by lede_env; give one that was")
    attributes = json.loads(stored.storage.metadata[_ATTRIBUTES])
    episodes = list(stored.iterate_episodes())
    lengths = np.array([len(episode.actions) for episode in episodes])
    of_episode = [
        {
            "observations": episode.observations[:-1],
            "actions": episode.actions,
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            "timeouts": episode.truncations,
            **{name: episode.infos[name][1:] for name in COLUMNS if name not in _MINARI},
        }
        for episode in episodes
    ]
    arrays = {name: np.concatenate([one[name] for one in of_episode]).astype(COLUMNS[name]) for name in COLUMNS}
    arrays["episode_starts"] = (np.cumsum(lengths) - lengths).astype(TABLES["episode_starts"])
    arrays["final_observations"] = np.stack([episode.observations[-1] for episode in episodes])
    return Dataset(arrays, attributes, attributes.pop("prompt_ids"), int(lengths.sum()))


def _import_minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise LedeError(f"Minari's format needs an extra: pip install 'lede-env[minari]' ({error})") from error
    return minari


def _minari_buffer(minari: Any, number: int, episode: Any) -> Any:
    """T + 1 observations, T of all else; infos have one entry more, which is of the reset and means nothing."""
    infos = {name: getattr(episode, name) for name in COLUMNS if name not in _MINARI}
    return minari.data_collector.EpisodeBuffer(
        id=number,
        observations=np.concatenate([episode.observations, episode.final_observation[None]]),
        actions=episode.actions.astype(np.int64),
        rewards=episode.rewards.astype(np.float64),
        terminations=episode.terminals,
        truncations=episode.timeouts,
        infos={name: np.concatenate([np.zeros_like(values[:1]), values]) for name, values in infos.items()},
    )


def _check_room(folder: Path, buffers: Sequence[Any]) -> None:
    """Raise an OSError unless what Minari writes fits: HDF5 ends the process by a crash where it cannot write.

    What it takes beyond the arrays was measured (Minari 0.5.4): 37 to 48 KB an episode.
    """
    arrays = [
        array
        for one in buffers
        for array in (
            one.observations,
            one.actions,
            one.rewards,
            one.terminations,
            one.truncations,
            *one.infos.values(),
        )
    ]
    n = sum(array.nbytes for array in arrays) + _MINARI_OVERHEAD * len(buffers)
    with TemporaryFile(dir=folder) as probe:
        for begin in range(0, n, _PROBED):
            probe.write(bytes(min(_PROBED, n - begin)))
        probe.flush()


def _spaces(dataset: Dataset, env: gym.Env | None) -> dict[str, gym.Space]:
    """Those of the environment; without one, of numbers whose bounds are not known."""
    if env is None:
        observations = gym.spaces.Box(-np.inf, np.inf, (len(dataset.features),), np.float32)
        return {"observation_space": observations, "action_space": gym.spaces.Discrete(2)}
    return {"observation_space": env.observation_space, "action_space": env.action_space}


def _environment(dataset: Dataset) -> gym.Env | None:
    """The dataset's environment, of its part: on the shipped trace, else live; None, with a warning, if neither can be
    made or is of the same problem and prompts."""
    reasons = []
    for backend in ("trace", "live"):
        try:
            env = _make(dataset, backend)
            different = _different(dataset, env)
            part = dataset.attributes.get("part")
            if not (different or part):
                return env
            env.close()
            if not different:
                return _make(dataset, backend, split=part)
            reasons.append(f"on the {backend} backend its {', '.join(different)} differ")
        except (LedeError, gym.error.Error) as error:
            reasons.append(f"on the {backend} backend: {error}")
    warnings.warn(
        f"{dataset!r} is exported without an environment to recover, as it cannot be made here from what the dataset "
        f"says of itself: {'; '.join(reasons)}",
        stacklevel=4,
    )
    return None


def _make(dataset: Dataset, backend: str, **changes: Any) -> gym.Env:
    """The environment that the attributes describe; joined recordings of several splits are of all of them."""
    env_id = dataset.attribute("env_id")
    pinned = gym.spec(env_id).kwargs
    said = {"split": "all", **dataset.attributes, **changes}
    known = {name: value for name, value in said.items() if name in pinned}
    changed = {name: value for name, value in known.items() if _plain(value) != _plain(pinned[name])}
    return gym.make(f"lede_env:{env_id}", **{**changed, "features": tuple(dataset.features), "backend": backend})


def _different(dataset: Dataset, env: gym.Env) -> list[str]:
    """What defines the problem and its prompts and is not what the dataset says."""
    found, said = env.unwrapped.attributes, dataset.attributes  # type: ignore[attr-defined]
    names = [name for name in (*PROBLEM, "prompts_digest") if name in found and name in said]
    return [name for name in names if _plain(found[name]) != _plain(said[name])]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
