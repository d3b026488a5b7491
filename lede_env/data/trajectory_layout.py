"""The bytes of a trajectory file: its datasets, how a whole file is built, checked and locked.

`trajectory_file` is the interface, and says why this is safe. A file is only ever *built* (under a temporary
name, then renamed: `build`) or has rows *written* into room reserved for them (`RowFile`).
"""

import errno
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lede_env.errors import LedeError

FORMAT = "lede-trajectories"
FORMAT_VERSION = 1

# Row columns. F features; little-endian on disk whatever the host.
COLUMNS: dict[str, np.dtype] = {
    "observations": np.dtype("<f4"),  # (N, F), the extended features; an acceptance head's where it was read
    "actions": np.dtype("u1"),  # (N,) 0 continue, 1 exit
    "rewards": np.dtype("<f4"),
    "terminals": np.dtype("bool"),
    "timeouts": np.dtype("bool"),
    "discount": np.dtype("<f4"),  # 0 at a token's exit (draft MDP: at a verification), else 1
    "layer": np.dtype("u1"),  # layers run when the decision was made
    "phase": np.dtype("u1"),
    "token_index": np.dtype("<u4"),
    "prompt_id": np.dtype("<u4"),  # index into prompt_ids
    "accepted": np.dtype("i1"),  # 1 or 0 at an exit (draft MDP: accepted drafts, at a verification), -1 elsewhere
    "forced": np.dtype("bool"),  # the action had no effect (last candidate)
    "behaviour_logprob": np.dtype("<f4"),  # log-probability of the action under the policy that acted, nats
    "cost": np.dtype("<f4"),  # in autoregressive steps
}
# Episode tables.
TABLES: dict[str, np.dtype] = {
    "episode_starts": np.dtype("<u8"),  # (E,) first row of each
    "final_observations": np.dtype("<f4"),  # (E, F)
}
COMMITTED = "committed"  # (2,) uint64: rows, episodes. Beside them, prompt_ids: (P,) strings
ALIGNMENT = 64  # bytes; `committed` lies inside one page, and columns can be memory-mapped
COMPRESSED_ROWS = 16_384  # rows a compressed chunk
COPY_ROWS = 64 * COMPRESSED_ROWS  # a multiple: every copy covers whole chunks


def shape_of(name: str, n: int, n_features: int) -> tuple[int, ...]:
    return (n, n_features) if name in ("observations", "final_observations") else (n,)


def committed(file: h5py.File) -> tuple[int, int]:
    """Rows and episodes that count."""
    rows, episodes = file[COMMITTED][:]
    return int(rows), int(episodes)


def encode_attributes(attributes: Mapping[str, Any], features: Sequence[str]) -> dict[str, str]:
    """Every attribute as JSON, keys sorted, so that equal values are equal strings."""
    own = {"format": FORMAT, "format_version": FORMAT_VERSION, "features": list(features)}
    header = {}
    for name, value in {**attributes, **own}.items():
        try:
            header[name] = json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise LedeError(f"attribute {name!r} is {value!r}; expected what JSON can hold ({error})") from None
    for name in own.keys() & attributes.keys():
        if json.dumps(attributes[name]) != header[name]:
            raise LedeError(
                f"attribute {name!r} is {attributes[name]!r}; the file's own is {header[name]}: leave it out"
            )
    return header


def checked_prompt_ids(prompt_ids: Sequence[str]) -> list[str]:
    for prompt_id in prompt_ids:
        if not isinstance(prompt_id, str) or "\0" in prompt_id:
            raise LedeError(f"prompt id {prompt_id!r}: expected a string without NUL characters")
    return list(prompt_ids)


def decode_attributes(file: h5py.File) -> dict[str, Any]:
    return {name: json.loads(file.attrs[name]) for name in file.attrs}


def read_prompt_ids(file: h5py.File) -> list[str]:
    return file["prompt_ids"].asstr()[:].tolist()


class RowFile:
    """Writes rows straight to where the columns of an existing file lie. Holds no HDF5 file open."""

    def __init__(self, path: Path):
        with h5py.File(path, "r", locking=False) as file:
            names = (*COLUMNS, *TABLES, COMMITTED)
            self._offsets = {name: file[name].id.get_offset() for name in names}
            contiguous = None not in self._offsets.values()  # None: compressed, or empty
            self.room = (len(file["actions"]), len(file["episode_starts"])) if contiguous else committed(file)
        self._fd = os.open(path, os.O_WRONLY)

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Puts values at rows first, first + 1, ... of a column or table, within its room."""
        dtype = COLUMNS.get(name) or TABLES.get(name) or np.dtype("<u8")
        values = np.ascontiguousarray(values, dtype)
        offset = self._offsets[name] + first * dtype.itemsize * int(np.prod(values.shape[1:]))
        data = values.reshape(-1).view(np.uint8).data
        while len(data):
            n = os.pwrite(self._fd, data, offset)
            data, offset = data[n:], offset + n

    def flush(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def build(
    path: Path,
    header: Mapping[str, str],
    prompt_ids: Sequence[str],
    n_features: int,
    room: tuple[int, int],
    source: h5py.File | None = None,
    compressed: bool = False,
) -> None:
    """Makes a file with room for (rows, episodes) and what source has committed, and renames it to path."""
    target = temporary(path)
    try:
        with open(target, "wb+", buffering=0) as raw:
            sink = _Sink(raw)
            options: dict[str, Any] = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT}
            with h5py.File(sink, "w", **options) as file:
                file.attrs.update(header)
                counts = committed(source) if source is not None else (0, 0)
                file.create_dataset(COMMITTED, data=np.array(counts, "<u8"), track_times=False)
                ids = np.array(list(prompt_ids), dtype=object)
                file.create_dataset("prompt_ids", data=ids, dtype=h5py.string_dtype(), track_times=False)
                _create_columns(file, n_features, room, compressed)
                if source is not None and compressed:
                    _copy(source, lambda name, first, rows: sink.put(file[name], first, rows))
            sink.check()
            if source is not None and not compressed:
                rows_of_target = RowFile(target)
                try:
                    _copy(source, rows_of_target.write)
                finally:
                    rows_of_target.close()
            os.fsync(raw.fileno())
        os.replace(target, path)
    except BaseException:
        with suppress(OSError):
            target.unlink()
        raise


class _Sink:
    """A file for HDF5 to write that keeps its first OSError to itself until `check`.

    HDF5 cannot close a file that it fails to write: it leaks it, and the process crashes at exit.
    """

    def __init__(self, raw: io.FileIO):
        self._raw = raw
        self._error: OSError | None = None
        self.seek, self.tell, self.flush = raw.seek, raw.tell, raw.flush
        self.read, self.readinto = raw.read, raw.readinto

    def write(self, data: memoryview) -> int:
        left = memoryview(data)
        while len(left) and self._error is None:
            try:
                left = left[self._raw.write(left) :]
            except OSError as error:
                self._error = error
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            self._raw.truncate(size)
        except OSError as error:
            self._error = self._error or error
        return size

    def put(self, dataset: h5py.Dataset, first: int, rows: np.ndarray) -> None:
        dataset[first : first + len(rows)] = rows
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _create_columns(file: h5py.File, n_features: int, room: tuple[int, int], compressed: bool) -> None:
    for columns, n in zip((COLUMNS, TABLES), room, strict=True):
        for name, dtype in columns.items():
            shape = shape_of(name, n, n_features)
            if compressed and n:
                chunks = (min(n, COMPRESSED_ROWS), *shape[1:])
                kwargs: dict[str, Any] = {"chunks": chunks, "compression": "gzip", "shuffle": True}
            else:  # contiguous, its place fixed now, no fill written: a hole in a sparse file
                layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                kwargs = {"dcpl": layout}
            file.create_dataset(name, shape, dtype, track_times=False, **kwargs)


def _copy(source: h5py.File, write: Callable[[str, int, np.ndarray], None]) -> None:
    for columns, n in zip((COLUMNS, TABLES), committed(source), strict=True):
        for name in columns:
            for first in range(0, n, COPY_ROWS):
                with read_errors(source.filename):
                    rows = source[name][first : min(first + COPY_ROWS, n)]
                write(name, first, rows)


def open_checked(path: Path) -> h5py.File:
    """Opens a file for reading, also beside its writer, if its structure is what it should be.

    Raises:
        LedeError: no such file, not a trajectory file, other format version, truncated or corrupted, or with
            links, virtual or external storage, which could pull in other files of this machine.
    """
    if not path.is_file():
        raise LedeError(f"{path}: no such file")
    with read_errors(path):
        file = h5py.File(path, "r", driver="sec2", locking=False)  # a driver with a file descriptor, to map
    try:
        with read_errors(path):
            _check_attributes(path, file)
            _check_format(path, file)
            _check_storage(path, file)
            _check_columns(path, file)
    except BaseException:
        file.close()
        raise
    return file


def _check_attributes(path: Path, file: h5py.File) -> None:
    """Before any is read: HDF5 crashes where a damaged one's type makes it read others' bytes as addresses."""
    for name in file.attrs:
        kind = file.attrs.get_id(name).get_type() if isinstance(name, str) else None  # bytes: not UTF-8
        if not (isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()):
            raise LedeError(f"{path}: corrupted: attribute {name!r} is not text; copy or make it again")


def _check_format(path: Path, file: h5py.File) -> None:
    if file.attrs.get("format") != json.dumps(FORMAT):
        raise LedeError(f"{path}: an HDF5 file, but not a trajectory file (attribute 'format' is not {FORMAT!r})")
    version = json.loads(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        raise LedeError(f"{path}: format version {version}; this release reads {FORMAT_VERSION}; make the file again")


def _check_storage(path: Path, file: h5py.File) -> None:
    for name in file:
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise LedeError(f"{path}: {name!r} is a link ({type(link).__name__}); refused, it may lead anywhere")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise LedeError(f"{path}: {name!r} is not a dataset; a trajectory file holds nothing else")
        if dataset.is_virtual or dataset.external:
            raise LedeError(f"{path}: {name!r} keeps its data in other files; refused, they may be anything")


def _check_columns(path: Path, file: h5py.File) -> None:
    rows, episodes = committed(file)
    if (rows == 0) != (episodes == 0) or episodes > rows:
        raise LedeError(f"{path}: corrupted: {episodes} committed episodes in {rows} committed rows")
    n_features = len(json.loads(file.attrs["features"]))
    for columns, n in zip((COLUMNS, TABLES), (rows, episodes), strict=True):
        for name, dtype in columns.items():
            dataset = file[name]
            expected = shape_of(name, n, n_features)
            if dataset.dtype != dtype or dataset.shape[1:] != expected[1:] or len(dataset) < n:
                raise LedeError(
                    f"{path}: corrupted: {name} is {dataset.dtype} {dataset.shape}; "
                    f"expected {dtype} {expected} or longer"
                )
            if n and not dataset.id.get_storage_size():
                raise LedeError(f"{path}: corrupted: {name} has {n} committed rows and no data")


@contextmanager
def read_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except LedeError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise LedeError(
            f"{path}: not an HDF5 file, or truncated or corrupted ({error}); copy or make it again"
        ) from error


@contextmanager
def disk_errors(path: Path, episodes: int) -> Iterator[None]:
    """Has the OSError of a failed write name the path, what is safe and what to do."""
    try:
        yield
    except OSError as error:
        message = (
            f"cannot write: {error.strerror or error}. What was committed ({episodes} episodes) is intact: "
            "free space or lift the limit, then go on with --resume"
        )
        raise OSError(error.errno or errno.EIO, message, str(path)) from error


def temporary(path: Path) -> Path:
    """Where a file is built: beside path, so that renaming is atomic. One name is enough, as writers lock."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the writer's lock; see `lock`."""
    fd = lock(path)
    try:
        yield
    finally:
        unlock(path, fd)


def lock(path: Path) -> int:
    """Takes the writer's lock on FILE.lock (FILE itself is replaced now and then) and returns its descriptor.

    Raises:
        LedeError: another writer holds it; names the process.
    """
    name = _lock_path(path)
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(name)):
                break
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise LedeError(f"{path} is being written by another process (pid {pid}); wait, or end it") from None
        except FileNotFoundError:
            pass
        os.close(fd)  # its holder let go and removed it between our two calls: try the new one
    with suppress(OSError):  # for the message above only
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def unlock(path: Path, fd: int) -> None:
    with suppress(OSError):
        _lock_path(path).unlink()  # while held, so that nobody's lock but ours is removed
    os.close(fd)


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")
