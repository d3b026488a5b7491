"""The flat trajectory file: HDF5, one array a column, crash-safe while it is written.

How rows align, for two episodes of 3 and 1 decisions (N = 4 rows, E = 2 episodes):

    row i                0        1        2     |  3
    observations[i]      o0       o1       o2    |  o3       what the agent saw
    actions[i]           a0       a1       a2    |  a3       what it did there
    rewards[i]           r0       r1       r2    |  r3       what that paid
    next observation     o1       o2       f0    |  f1       observations[i + 1] inside an episode, else
    final_observations                     f0    |  f1       final_observations[e], seen after its last row
    terminals[i]         0        0        1     |  0        the episode ended by itself
    timeouts[i]          0        0        0     |  1        it was cut; exactly one of them ends each
    discount[i]          1        0        0     |  1        0 where a token exits (draft MDP: at each
                                                             verification): no bootstrap past it
    episode_starts       0 (episode 0)           |  3 (episode 1)

Why a kill at any moment loses nothing. HDF5 rewrites the index of a growing chunked dataset in place, by
several writes; a kill between them, when the index splits (every 64th chunk), loses *committed* rows.
Random kills rarely hit that; replaying every prefix of the writes does. So here a file that exists is given
raw data and nothing else:

- Columns are contiguous, with room reserved for more rows than there are (a sparse file: `ls` shows the
  room, `du` what is used). Blocks of whole episodes go behind the committed rows by `pwrite`; then a flush;
  then the 16 bytes of `committed` = [rows, episodes], in one write inside one page. No committed row and no
  metadata is ever overwritten. Whatever lies behind the count is invisible, and the next writer overwrites
  it.
- All else (creation, more room, cutting spare room on close, compression) builds a whole file beside the
  old one and renames it into place: a reader finds the old file or the new one. To resume a closed or
  compressed file is just to need more room. Room doubles, so a row is copied two or three times in all.

So a writer holds no HDF5 file open: a full disk is a plain OSError, and anyone may read beside it. Writers
exclude each other by a lock on `FILE.lock`, which the system drops when a process dies.
"""

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lede_env.data.trajectory_layout import (
    COLUMNS,
    COMMITTED,
    TABLES,
    RowFile,
    build,
    checked_prompt_ids,
    committed,
    decode_attributes,
    disk_errors,
    encode_attributes,
    lock,
    locked,
    open_checked,
    read_errors,
    read_prompt_ids,
    shape_of,
    temporary,
    unlock,
)
from lede_env.errors import LedeError

MIN_CHUNKS = 64  # the least room made, in blocks of chunk_rows
PROVENANCE = {"software"}  # attributes that may differ from sitting to sitting; the first one's stay


@dataclass(frozen=True)
class Episode:
    """One episode of T >= 1 rows: columns (T,), observations (T, F), with the dtypes of COLUMNS."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray
    discount: np.ndarray
    layer: np.ndarray
    phase: np.ndarray
    token_index: np.ndarray
    prompt_id: np.ndarray
    accepted: np.ndarray
    forced: np.ndarray
    behaviour_logprob: np.ndarray
    cost: np.ndarray
    final_observation: np.ndarray  # (F,) what the agent would have seen next

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class Trajectories:
    """The committed rows of a file: `trajectories["rewards"]` and so on."""

    arrays: dict[str, np.ndarray]  # the columns asked for, and both episode tables
    attributes: dict[str, Any]
    prompt_ids: list[str]
    n_rows: int

    @property
    def n_episodes(self) -> int:
        return len(self.arrays["episode_starts"])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise LedeError(f"column {name!r} is not loaded; these are: {', '.join(self.arrays)}")
        return self.arrays[name]


class TrajectoryWriter:
    """Appends whole episodes to a trajectory file. One writer a file; a context manager.

    Args:
        path: the file; missing folders are made.
        attributes: what identifies the run (environment spec and hash, model fingerprint, seed...), JSON-able.
            Resuming demands that all are equal but `software`, the versions at hand: an upgrade between two
            sittings is no other run, and the file keeps the versions that began it. Leave out what else may
            change (dates, targets).
        prompt_ids: the strings that the column `prompt_id` indexes.
        features: names of the observation's columns, in order.
        resume: go on with an existing file (or start one). `episodes` says where: the next episode's number.
        chunk_rows: rows gathered in memory between commits; what a kill can cost.

    Raises:
        LedeError: the file exists and resume is off; it belongs to another run; another process writes it.
        OSError: disk full, quota or file size limit; names the path. Committed episodes are intact.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        attributes: Mapping[str, Any],
        prompt_ids: Sequence[str],
        features: Sequence[str],
        resume: bool = False,
        chunk_rows: int = 4096,
    ):
        self.path = Path(path).resolve()  # renaming onto a link would replace the link
        self._header = encode_attributes(attributes, features)
        self._prompt_ids = checked_prompt_ids(prompt_ids)
        self._n_features = len(features)
        if not features:
            raise LedeError("features is empty; expected the names of the observation's columns")
        if chunk_rows < 1:
            raise LedeError(f"chunk_rows is {chunk_rows}; expected at least 1")
        self._chunk_rows = chunk_rows
        self._committed = (0, 0)  # rows, episodes
        self._rows: RowFile | None = None
        self._reserve_buffer(chunk_rows)
        # (end row in the buffer, final observation) of each buffered episode. One append makes an episode
        # count, so Ctrl-C leaves all of it or nothing.
        self._pending: list[tuple[int, np.ndarray]] = []
        with disk_errors(self.path, 0):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = lock(self.path)
        try:
            self._start(resume)
        except BaseException:
            self._release()
            raise

    def _start(self, resume: bool) -> None:
        if not self.path.exists():
            room = MIN_CHUNKS * self._chunk_rows
            with disk_errors(self.path, 0):
                build(self.path, self._header, self._prompt_ids, self._n_features, (room, room))
            return
        if not resume:
            raise LedeError(f"{self.path} exists; go on with it by --resume, or choose another path")
        with suppress(FileNotFoundError):  # what a killed writer was building
            temporary(self.path).unlink()
        with open_checked(self.path) as file:
            stored = {name: str(value) for name, value in file.attrs.items()}
            _check_same_run(self.path, stored, self._header, read_prompt_ids(file), self._prompt_ids)
            self._header |= {name: stored[name] for name in PROVENANCE & stored.keys()}
            self._committed = committed(file)

    @property
    def committed_episodes(self) -> int:
        """Episodes that a reader sees and a kill cannot take."""
        return self._committed[1]

    @property
    def episodes(self) -> int:
        """Episodes appended in all: the number of the next one."""
        return self._committed[1] + len(self._pending)

    def append(self, episode: Episode) -> None:
        """Adds one episode (copied), committing the buffered ones first when it does not fit beside them."""
        if self._lock is None:
            raise LedeError(f"{self.path}: this writer is closed; open a new one with resume=True")
        _check_episode(episode, self._n_features, len(self._prompt_ids))
        n = len(episode)
        if self._buffered_rows + n > len(self._buffer["actions"]):
            self.commit()
            if n > len(self._buffer["actions"]):
                self._reserve_buffer(n)
        begin = self._buffered_rows
        for name, column in self._buffer.items():
            column[begin : begin + n] = getattr(episode, name)
        self._pending.append((begin + n, episode.final_observation.copy()))

    def commit(self) -> None:
        """Writes the buffered episodes, then the count that shows them. After an OSError, call it again."""
        if not self._pending:
            return
        n, (first_row, first_episode) = self._buffered_rows, self._committed
        ends = np.array([end for end, _ in self._pending], np.uint64)  # (episodes,) within the buffer
        counts = (first_row + n, first_episode + len(ends))
        with disk_errors(self.path, first_episode):
            file = self._with_room(counts)
            for name, column in self._buffer.items():
                file.write(name, first_row, column[:n])
            starts = first_row + np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
            file.write("episode_starts", first_episode, starts)
            file.write("final_observations", first_episode, np.stack([final for _, final in self._pending]))
            file.flush()  # the rows reach the disk before the count that shows them
            file.write(COMMITTED, 0, np.array(counts))
        self._committed, self._pending = counts, []

    def close(self) -> None:
        """Commits, cuts the spare room off, and lets go of the file."""
        if self._lock is None:
            return
        try:
            self.commit()
            with disk_errors(self.path, self.committed_episodes):
                if self._opened().room != self._committed:
                    self._rebuild(self._committed)
        finally:
            self._release()

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):  # the error under way says more
                self.close()

    @property
    def _buffered_rows(self) -> int:
        return self._pending[-1][0] if self._pending else 0

    def _reserve_buffer(self, rows: int) -> None:
        self._buffer = {
            name: np.empty(shape_of(name, rows, self._n_features), dtype) for name, dtype in COLUMNS.items()
        }

    def _opened(self) -> RowFile:
        if self._rows is None:
            self._rows = RowFile(self.path)
        return self._rows

    def _with_room(self, needed: tuple[int, int]) -> RowFile:
        room = self._opened().room
        if needed[0] > room[0] or needed[1] > room[1]:
            rows = max(*needed, 2 * room[0], MIN_CHUNKS * self._chunk_rows)
            self._rebuild((rows, rows))  # an episode has at least one row: room for both
        return self._opened()

    def _let_go(self) -> None:
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()

    def _rebuild(self, room: tuple[int, int]) -> None:
        self._let_go()  # first: after the rename its descriptor would belong to the file that was
        with open_checked(self.path) as source:
            build(self.path, self._header, self._prompt_ids, self._n_features, room, source)

    def _release(self) -> None:
        self._let_go()
        if self._lock is not None:
            unlock(self.path, self._lock)
            self._lock = None


def read_trajectories(
    path: str | os.PathLike, columns: Sequence[str] | None = None, mapped: bool = False
) -> Trajectories:
    """Reads the committed rows of a file, also of one that is being written.

    Args:
        columns: which of COLUMNS to load; all by default. Both episode tables always come along.
        mapped: leave columns on the disk until they are used, where the file is uncompressed. They stay what they
            are, whatever becomes of the file's name.

    Raises:
        LedeError: an unknown column, or a file that `open_checked` refuses.
    """
    path = Path(path)
    names = list(COLUMNS) if columns is None else list(columns)
    for name in names:
        if name not in COLUMNS:
            raise LedeError(f"unknown column {name!r}; a trajectory file has {', '.join(COLUMNS)}")
    with open_checked(path) as file, read_errors(path):
        rows, episodes = committed(file)
        arrays: dict[str, np.ndarray] = {}
        for name in names:
            offset = file[name].id.get_offset() if mapped else None  # None: compressed, or empty
            if offset is None or not rows:
                arrays[name] = file[name][:rows]
            else:
                shape = (rows, *file[name].shape[1:])
                arrays[name] = np.ndarray(shape, COLUMNS[name], _map(file), offset)
        arrays |= {name: file[name][:episodes] for name in TABLES}
        _check_starts(path, arrays["episode_starts"], rows)
        return Trajectories(arrays, decode_attributes(file), read_prompt_ids(file), rows)


def _map(file: h5py.File) -> mmap.mmap:
    """The bytes of an open file, read-only. By its descriptor: a writer may have renamed another file to its name."""
    return mmap.mmap(file.id.get_vfd_handle(), 0, access=mmap.ACCESS_READ)


def rewrite(path: str | os.PathLike, attributes: Mapping[str, Any], compressed: bool) -> None:
    """Makes a closed file anew, with attributes added or replaced, and renames it into place.

    compressed: by gzip and byte shuffling, in aligned chunks: small, but it cannot be memory-mapped.
    """
    path = Path(path).resolve()
    open_checked(path).close()  # say what is wrong with the file before making a lock beside it
    with locked(path), open_checked(path) as source:
        counts, features = committed(source), decode_attributes(source)["features"]
        header = {name: str(value) for name, value in source.attrs.items()} | encode_attributes(attributes, features)
        with disk_errors(path, counts[1]):
            build(path, header, read_prompt_ids(source), len(features), counts, source, compressed)


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) of data, not files: names in order, with their dtypes, shapes and little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise LedeError(f"array {name!r} holds Python objects ({array.dtype}); expected numbers or booleans")
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{name}\0{array.dtype.str}\0{np.shape(arrays[name])}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_same_run(
    path: Path, stored: Mapping[str, str], header: Mapping[str, str], old_ids: list[str], prompt_ids: list[str]
) -> None:
    differences = [
        f"{name} is {stored.get(name, 'absent'):.200} in the file and {header.get(name, 'absent'):.200} now"
        for name in sorted((stored.keys() | header.keys()) - PROVENANCE)
        if stored.get(name) != header.get(name)
    ]
    if differences:
        raise LedeError(
            f"cannot resume {path}: {'; '.join(differences)}. Use the same settings and inputs, or another path"
        )
    if old_ids != prompt_ids:
        what = prompt_difference(old_ids, prompt_ids)
        raise LedeError(f"cannot resume {path}: prompt_ids differ, {what}; use the same prompts, or another path")


def prompt_difference(old_ids: Sequence[str], prompt_ids: Sequence[str]) -> str:
    """Where the prompt ids of a file and those at hand, which differ, do so first."""
    n = next((i for i, (a, b) in enumerate(zip(old_ids, prompt_ids, strict=False)) if a != b), None)
    if n is None:
        return f"{len(old_ids)} in the file and {len(prompt_ids)} now"
    return f"{old_ids[n]!r} in the file and {prompt_ids[n]!r} now at {n}"


def _check_episode(episode: Episode, n_features: int, n_prompts: int) -> None:
    n = len(episode)
    if n == 0:
        raise LedeError("an episode without rows; expected at least one decision")
    for name, dtype in COLUMNS.items():
        _check_array(name, getattr(episode, name), (n, n_features) if name == "observations" else (n,), dtype)
    _check_array("final_observation", episode.final_observation, (n_features,), COLUMNS["observations"])
    first_end = (episode.terminals | episode.timeouts).argmax()
    if first_end != n - 1 or episode.terminals[-1] == episode.timeouts[-1]:
        raise LedeError("an episode ends with its last row and not before, by exactly one of terminals and timeouts")
    if episode.prompt_id.max() >= n_prompts:
        raise LedeError(f"prompt_id is {episode.prompt_id.max()}; expected an index into the {n_prompts} prompt_ids")


def _check_array(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise LedeError(f"{name} is {found}; expected a numpy array of {dtype} {shape}")


def _check_starts(path: Path, starts: np.ndarray, rows: int) -> None:
    bounds = np.append(starts.astype(np.int64), rows)  # (E + 1,)
    if bounds[0] != 0 or (np.diff(bounds) <= 0).any():
        raise LedeError(f"{path}: corrupted: episode_starts do not rise from 0 to below {rows}; make the file again")
