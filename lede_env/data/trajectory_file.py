"""The flat trajectory file: HDF5, one array a column, crash-safe while it is written.

How rows align, for two episodes of 3 and 1 decisions (N = 4 rows, E = 2 episodes):

    row i                0        1        2     |  3
    observations[i]      o0       o1       o2    |  o3         what the agent saw
    actions[i]           a0       a1       a2    |  a3         what it did there
    rewards[i]           r0       r1       r2    |  r3         what that paid
    next observation     o1       o2       f0    |  f1         observations[i + 1] inside an episode, else
    final_observations                     f0    |  f1         final_observations[e], seen after the last row
    terminals[i]         0        0        1     |  0          the episode ended by itself
    timeouts[i]          0        0        0     |  1          it was cut; of the two, exactly one ends each
    discount[i]          1        0        1 / 0 |  1 / 0      0 where a token exits: no bootstrap across tokens
    episode_starts       0 (episode 0)           |  3 (episode 1)

Why a kill at any moment loses nothing. HDF5 rewrites a chunked dataset's index in place as the dataset grows,
in several writes: a kill between them, at a split of the index (every 64th chunk), loses *committed* rows.
(Replaying every prefix of the writes of such a file shows it; random kills rarely hit it.) So here nothing but
raw data is written to a file that exists:

- The columns are contiguous datasets with room reserved for more rows than there are (a sparse file: `ls` shows
  the room, `du` what is used). Rows go beyond the committed ones by plain `pwrite`, in blocks of whole episodes;
  then a flush; then the 16 bytes of `committed` = [rows, episodes], in one write inside one page. No committed
  byte and no metadata is ever overwritten. What lies behind the count is invisible, and is overwritten on resume.
- Everything else (creation, more room, cutting spare room on close, compression) builds a whole new file beside
  the old one and renames it into place: readers find the old file or the new one. Resuming a closed or compressed
  file is "more room". Room doubles, so a row is copied once or twice in all.

A writer therefore holds no open HDF5 file: a full disk is a plain OSError, and any reader may open the file
beside it. Writers exclude each other by a lock on `FILE.lock`, which the system drops when a process dies.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lede_env.errors import LedeError

FORMAT = "lede-trajectories"
FORMAT_VERSION = 1

# Row columns. F features; little-endian on disk whatever the host.
COLUMNS: dict[str, np.dtype] = {
    "observations": np.dtype("<f4"),  # (N, F), all features of the MDP
    "actions": np.dtype("u1"),  # (N,) 0 continue, 1 exit
    "rewards": np.dtype("<f4"),
    "terminals": np.dtype("bool"),
    "timeouts": np.dtype("bool"),
    "discount": np.dtype("<f4"),  # 0 at a token's exit (draft MDP: at a verification), else 1
    "layer": np.dtype("u1"),  # layers run when the decision was made
    "phase": np.dtype("u1"),
    "token_index": np.dtype("<u4"),
    "prompt_id": np.dtype("<u4"),  # index into prompt_ids
    "accepted": np.dtype("i1"),  # 1 or 0 at an exit, -1 elsewhere
    "forced": np.dtype("bool"),  # the action had no effect (last candidate)
    "behaviour_logprob": np.dtype("<f4"),  # log-probability of the action under the policy that acted, nats
    "cost": np.dtype("<f4"),  # in autoregressive steps
}
# Episode tables.
TABLES: dict[str, np.dtype] = {
    "episode_starts": np.dtype("<u8"),  # (E,) first row of each
    "final_observations": np.dtype("<f4"),  # (E, F)
}
_FEATURE_WIDE = ("observations", "final_observations")
_MIN_CHUNKS = 64  # the least room made, in blocks of chunk_rows
_COMPRESSED_ROWS = 16_384  # rows a compressed chunk; a divisor of _COPY_ROWS keeps copies aligned to chunks
_COPY_ROWS = 1 << 20


@dataclass(frozen=True)
class Episode:
    """One episode of T >= 1 rows; every field but the last is (T,), observations (T, F). Dtypes as COLUMNS."""

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
        attributes: what identifies the run (environment spec and its hash, model fingerprint, seed, versions...),
            JSON-able. Resuming demands equality in every one, so leave out what may change (dates, targets).
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
        self.path = Path(path)
        self._header = _encode_attributes(attributes, features)
        self._prompt_ids = _checked_prompt_ids(prompt_ids)
        self._n_features = len(features)
        if chunk_rows < 1:
            raise LedeError(f"chunk_rows is {chunk_rows}; expected at least 1")
        self._chunk_rows = chunk_rows
        self._committed = (0, 0)  # rows, episodes
        self._rows: _RowFile | None = None
        self._reserve_buffer(chunk_rows)
        # One (end row in the buffer, final observation) a buffered episode: a single append makes it count, so an
        # interrupt leaves a whole episode or none.
        self._pending: list[tuple[int, np.ndarray]] = []
        with _disk_errors(self.path, 0):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = _lock(self.path)
        try:
            self._start(resume)
        except BaseException:
            self._release()
            raise

    def _start(self, resume: bool) -> None:
        if not self.path.exists():
            room = _MIN_CHUNKS * self._chunk_rows
            with _disk_errors(self.path, 0):
                _build(self.path, self._header, self._prompt_ids, self._n_features, (room, room))
            return
        if not resume:
            raise LedeError(f"{self.path} exists; go on with it by --resume, or choose another path")
        with suppress(FileNotFoundError):  # what a killed writer was building
            _temporary(self.path).unlink()
        with _open(self.path) as file:
            _check_same_run(self.path, file, self._header, self._prompt_ids)
            self._committed = _committed(file)

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
        """Writes the buffered episodes, then the count that makes them visible. After an OSError, call again."""
        if not self._pending:
            return
        n, (first_row, first_episode) = self._buffered_rows, self._committed
        ends = np.array([end for end, _ in self._pending], np.uint64)  # (episodes,) within the buffer
        committed = (first_row + n, first_episode + len(ends))
        with _disk_errors(self.path, first_episode):
            file = self._with_room(committed)
            for name, column in self._buffer.items():
                file.write(name, first_row, column[:n])
            starts = first_row + np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
            file.write("episode_starts", first_episode, starts)
            file.write("final_observations", first_episode, np.stack([final for _, final in self._pending]))
            file.flush()  # the rows reach the disk before the count that shows them
            file.write("committed", 0, np.array(committed))
        self._committed, self._pending = committed, []

    def close(self) -> None:
        """Commits, cuts the spare room off, and lets go of the file."""
        if self._lock is None:
            return
        try:
            self.commit()
            with _disk_errors(self.path, self.committed_episodes):
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
            name: np.empty(_shape(name, rows, self._n_features), dtype) for name, dtype in COLUMNS.items()
        }

    def _opened(self) -> "_RowFile":
        if self._rows is None:
            self._rows = _RowFile(self.path)
        return self._rows

    def _with_room(self, needed: tuple[int, int]) -> "_RowFile":
        room = self._opened().room
        if needed[0] > room[0] or needed[1] > room[1]:
            rows = max(*needed, 2 * room[0], _MIN_CHUNKS * self._chunk_rows)
            self._rebuild((rows, rows))  # an episode has at least one row: room for both
        return self._opened()

    def _rebuild(self, room: tuple[int, int]) -> None:
        if self._rows is not None:  # let go first: after the rename it would be another file
            self._rows.close()
            self._rows = None
        with _open(self.path) as source:
            _build(self.path, self._header, self._prompt_ids, self._n_features, room, source)

    def _release(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        if self._lock is not None:
            with suppress(OSError):
                _lock_path(self.path).unlink()  # while still held: see _lock
            os.close(self._lock)
            self._lock = None


def read_trajectories(path: str | os.PathLike, columns: Sequence[str] | None = None) -> Trajectories:
    """Reads the committed rows of a file, also of one that is being written.

    Args:
        columns: which of COLUMNS to load; all by default. Both episode tables always come along.

    Raises:
        LedeError: no such file, not a trajectory file, another format version, truncated or corrupted, or with
            links, virtual or external storage (which could pull in other files of this machine).
    """
    path = Path(path)
    names = list(COLUMNS) if columns is None else list(columns)
    for name in names:
        if name not in COLUMNS:
            raise LedeError(f"unknown column {name!r}; a trajectory file has {', '.join(COLUMNS)}")
    with _open(path) as file, _read_errors(path):
        rows, episodes = _committed(file)
        arrays = {name: file[name][:rows] for name in names}
        arrays |= {name: file[name][:episodes] for name in TABLES}
        _check_starts(path, arrays["episode_starts"], rows)
        return Trajectories(arrays, _decode_attributes(file), _read_prompt_ids(file), rows)


def compress(path: str | os.PathLike) -> None:
    """Rewrites a closed file with gzip and byte shuffling, chunk by aligned chunk, and renames it into place."""
    path = Path(path)
    with _open(path):  # say what is wrong with the file before making a lock beside it
        pass
    lock = _lock(path)
    try:
        with _open(path) as source, _disk_errors(path, _committed(source)[1]):
            header = {name: str(value) for name, value in source.attrs.items()}
            n_features = source["observations"].shape[1]
            _build(path, header, _read_prompt_ids(source), n_features, _committed(source), source, True)
    finally:
        with suppress(OSError):
            _lock_path(path).unlink()
        os.close(lock)


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and little-endian bytes, in the order of names: of data, not files."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise LedeError(f"array {name!r} holds Python objects ({array.dtype}); expected numbers or booleans")
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{name}\0{array.dtype.str}\0{np.shape(arrays[name])}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
