"""The trace file: everything the environments need of a model's continuations, so that they run without the model.

A trace is written once, under a temporary name, and renamed: readers find a whole file or none. It is HDF5 with one
dataset an array, compressed; what the arrays mean is in `Trace`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lede_env.data.trace_checks import check_trace
from lede_env.data.trace_layout import ARRAYS, CHUNK_BYTES, FORMAT, FORMAT_VERSION, OUTLOOKS, QUANTUM, STRINGS, TOP
from lede_env.data.trajectory_file import checksum
from lede_env.data.trajectory_layout import read_errors, temporary
from lede_env.errors import LedeError


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What a trace was recorded from, and how. The root attributes of the file, as JSON each."""

    model_name: str
    model_fingerprint: str
    dtype: str  # the model's while recording
    n_layers: int
    vocab: int
    eos_ids: tuple[int, ...]
    candidate_layers: tuple[int, ...]
    draft_cap: int  # most drafts a round that the branches allow for
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    samples: int  # texts a prompt
    seed: int
    prompts_digest: str  # of every prompt's id, task and text
    layer_calls: int  # layers times tokens run while recording; over n_layers and positions: full forwards a token
    software: dict[str, str]
    command: str


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Recorded continuations of P prompts, S samples each, at C candidate layers. Arrays are read-only.

    How they align. Text t is sample t % S of prompt t // S; `starts` (P S + 1,) says where its positions lie:

        prompt_ids  (P,)        |      code/0001         |  ...
        text_seeds  (P S,)      |  seed 0  |  seed 1     |  ...     the keys of each text's draws
        starts                  0          5             12 ...  N

        row n of text 0         0    1    2    3    4    |          T + 1 rows a text (T = max_new_tokens), so that a
        targets       (N,)      y0   y1   y2   y3   y4   |          truncated episode has a next observation; fewer
        neg_log_p_max (N,)      at full depth, nats      |          where the last target is an EOS
        raw      (N, C, 12)     10 log-probabilities and the entropy of each candidate's next-token distribution (T=1),
                                and how far the lookup's guess is below its best token
        match         (N,)      how long a match that guess comes from, 0 to 1 (engine/lookup.py)
        drafts        (N, C)    x at each candidate      |          all in the context prompt + y0 .. y(n-1)
        shortfall     (N, C)    how far log p(x) is below its best token's, nats, T = 1; greedy: 0
        accept_probability      min(1, q(y) / p(y))      |          (N, C); greedy: 1 or 0
        accepted      (N, C)    x == y                   |
        coin          (N, C)    the uniform number that speculative sampling accepts x by, in (0, 1]; greedy: 1
        branch        (N, C)    -1   0   -1   1   2      |          (one candidate shown) index of a branch, or -1

    Where a draft x at row n is wrong, drafting goes on from it: branch b holds the drafts at the same layer for the
    positions n + 1, n + 2, ... of the text, in the context prompt + y0 .. y(n-1) + x + the branch's drafts before:

        branch_starts (B + 1,)      0        3    ...        b ascends with (row, candidate)
        branch_tokens (M,)          z1 z2 z3 |               at most cap - 1, up to a drafted EOS (the last one then)
        branch_raw    (M, 12)       the distributions that gave them; branch_match, _shortfall, _coin (M,) likewise

    A wrong draft has no branch (-1) if it is an EOS, or stands at row T of its text: no branch goes beyond that row.

    A trace may also hold what the model's acceptance head says of each draft (engine/acceptance_head.py), else None:

        outlook (N, C, 3), branch_outlook (M, 3)     odds and slope of its acceptance, and odds of the next one's
    """

    header: TraceHeader
    prompt_ids: tuple[str, ...]
    prompt_tasks: tuple[str, ...]
    prompt_splits: tuple[str, ...]
    prompt_digests: tuple[str, ...]  # of each prompt's text
    text_seeds: np.ndarray
    starts: np.ndarray
    targets: np.ndarray
    neg_log_p_max: np.ndarray
    raw: np.ndarray
    match: np.ndarray
    drafts: np.ndarray
    shortfall: np.ndarray
    accept_probability: np.ndarray
    accepted: np.ndarray
    coin: np.ndarray
    branch: np.ndarray
    branch_starts: np.ndarray
    branch_tokens: np.ndarray
    branch_shortfall: np.ndarray
    branch_coin: np.ndarray
    branch_raw: np.ndarray
    branch_match: np.ndarray
    outlook: np.ndarray | None = None
    branch_outlook: np.ndarray | None = None
    head: str = ""  # the digest of that head

    def __post_init__(self) -> None:
        for name, dtype in self.types.items():
            array = np.ascontiguousarray(getattr(self, name), dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __repr__(self) -> str:
        header = self.header
        return (
            f"Trace({header.model_name!r}, layers {header.candidate_layers}, T={header.temperature}, "
            f"{len(self.prompt_ids)} prompts x {header.samples}, {len(self.targets)} positions)"
        )

    @property
    def types(self) -> dict[str, np.dtype]:
        """Dataset -> type on disk."""
        return ARRAYS | {name: kind for name, kind in OUTLOOKS.items() if getattr(self, name) is not None}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the arrays and the prompt table, whatever file they are in."""
        strings = {name: np.frombuffer("\0".join(getattr(self, name)).encode(), np.uint8) for name in STRINGS}
        return checksum({name: getattr(self, name) for name in ARRAYS} | strings)

    @cached_property
    def outlook_digest(self) -> str:
        """SHA-256 (hex) of what the acceptance head says."""
        return checksum({name: getattr(self, name) for name in OUTLOOKS})

    @cached_property
    def ends(self) -> np.ndarray:
        """(N,) whether the target is an EOS: the text's last."""
        return np.isin(self.targets, self.header.eos_ids)

    def prompts_of(self, task: str | Sequence[str] = "all", split: str = "train") -> list[str]:
        """Ids of the trace's prompts of some tasks and a split ("all": any), in their order.

        Raises:
            LedeError: there are none.
        """
        wanted = [task] if isinstance(task, str) else list(task)
        table = zip(self.prompt_ids, self.prompt_tasks, self.prompt_splits, strict=True)
        ids = [i for i, t, s in table if (t in wanted or "all" in wanted) and split in (s, "all")]
        if not ids:
            has = ", ".join(sorted({f"{t} {s}" for t, s in zip(self.prompt_tasks, self.prompt_splits, strict=True)}))
            raise LedeError(f"the trace has no prompts of task {task!r} in split {split!r}; it has: {has}")
        return ids

    def save(self, path: str | os.PathLike) -> None:
        """Write the trace to a file, replacing it as a whole.

        Raises:
            LedeError: the trace contradicts itself.
            OSError: the disk is full or the folder cannot be written; what was there is intact.
        """
        path = Path(path)
        check_trace(self, path)
        content = _encode(self)
        path.parent.mkdir(parents=True, exist_ok=True)
        target = temporary(path)
        try:
            with open(target, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(target, path)
        except BaseException:
            with suppress(OSError):
                target.unlink()
            raise


def load_trace(path: str | os.PathLike) -> Trace:
    """Read a trace file, checking everything in it.

    Raises:
        LedeError: no such file, not a trace, another format version, truncated or corrupted, arrays that contradict
            each other, or links and external storage, which could pull in other files of this machine.
    """
    path = Path(path)
    if not path.is_file():
        raise LedeError(f"{path}: no such file; record one with `lede record --trace`")
    with read_errors(path), h5py.File(path, "r", locking=False) as file:
        _check_format(path, file)
        _check_storage(path, file)
        header = _read_header(path, file)
        arrays: dict[str, Any] = {name: tuple(file[name].asstr()[:].tolist()) for name in STRINGS}
        arrays |= {name: file[name][:] for name in (*ARRAYS, *OUTLOOKS) if name in file}
        recorded = json.loads(file.attrs["digest"])
        said = json.loads(file.attrs.get("outlook_digest", '""'))
        arrays["head"] = json.loads(file.attrs.get("acceptance_head", '""'))
    trace = Trace(header, **arrays)
    check_trace(trace, path)
    if trace.outlook is not None and trace.outlook_digest != said:
        raise LedeError(f"{path}: corrupted: what the acceptance head says is not what was written; record it again")
    if trace.digest != recorded:
        raise LedeError(f"{path}: corrupted: the arrays' digest is {trace.digest}, not {recorded}; record it again")
    return trace


def relabel(trace: Trace, n_layers: int, candidate_layers: Sequence[int], model: str) -> Trace:
    """The trace of a geometry twin: the donor's arrays, with its layers renamed (design section 7).

    The fingerprint stays the donor's: its weights made the signals.

    Raises:
        LedeError: not as many layers as the trace has candidates, or not ascending within 1..n_layers - 1.
    """
    layers = tuple(int(layer) for layer in candidate_layers)
    if len(layers) != len(trace.header.candidate_layers):
        raise LedeError(
            f"candidate_layers={layers} cannot name the trace's {len(trace.header.candidate_layers)} layers "
            f"{trace.header.candidate_layers}; give one for each"
        )
    if list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] < n_layers:
        raise LedeError(f"candidate_layers={layers} must be ascending within 1..{n_layers - 1}")
    return replace(trace, header=replace(trace.header, n_layers=n_layers, candidate_layers=layers, model_name=model))


def text_digest(text: str) -> str:
    """Sixteen hex digits that identify a prompt's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def quantize(raw: np.ndarray, vocab: int) -> np.ndarray:
    """(..., 12) raw signals, rounded to multiples of QUANTUM, within their bounds still. float32."""
    raw = np.rint(raw / QUANTUM)
    raw[..., TOP] = np.minimum(raw[..., TOP], math.floor(math.log(vocab) / QUANTUM))
    return (raw * QUANTUM).astype(np.float32)


def quantize_outlook(said: np.ndarray) -> np.ndarray:
    """What an acceptance head says, rounded to multiples of QUANTUM. float32."""
    return (np.rint(said / QUANTUM) * QUANTUM).astype(np.float32)


def _encode(trace: Trace) -> bytes:
    """The bytes of the file, made in memory: HDF5 cannot close a file that a full disk keeps it from writing."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(trace.header)}
        said = {"digest": trace.digest}
        if trace.outlook is not None:
            said |= {"acceptance_head": trace.head, "outlook_digest": trace.outlook_digest}
        for name, value in {**attributes, **said}.items():
            file.attrs[name] = json.dumps(value, sort_keys=True, allow_nan=False)
        for name in STRINGS:
            strings = np.array(getattr(trace, name), dtype=object)
            file.create_dataset(name, data=strings, dtype=h5py.string_dtype(), track_times=False)
        for name in trace.types:
            array = getattr(trace, name)
            kwargs: dict[str, Any] = {}
            if array.size:
                row = array.itemsize * int(np.prod(array.shape[1:]))
                chunk = min(len(array), max(1, CHUNK_BYTES // row))
                kwargs = {"chunks": (chunk, *array.shape[1:]), "compression": "gzip", "shuffle": True}
            file.create_dataset(name, data=array, track_times=False, **kwargs)
    return buffer.getvalue()


def _check_format(path: Path, file: h5py.File) -> None:
    if file.attrs.get("format") != json.dumps(FORMAT):
        raise LedeError(f"{path}: an HDF5 file, but not a trace (attribute 'format' is not {FORMAT!r})")
    version = json.loads(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        raise LedeError(
            f"{path}: format version {version}; this release reads {FORMAT_VERSION}; record the trace again"
        )


def _check_storage(path: Path, file: h5py.File) -> None:
    """The datasets of a trace and no others, of the right types, with their data inside the file."""
    names, types = {*STRINGS, *ARRAYS}, ARRAYS | OUTLOOKS
    if OUTLOOKS.keys() <= set(file):
        names |= OUTLOOKS.keys()
    if set(file) != names:
        raise LedeError(f"{path}: corrupted: has {sorted(set(file) ^ names)} too many or too few; record it again")
    for name in names:
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise LedeError(f"{path}: {name!r} is a link ({type(link).__name__}); refused, it may lead anywhere")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise LedeError(f"{path}: {name!r} is not a dataset; a trace holds nothing else")
        if dataset.is_virtual or dataset.external:
            raise LedeError(f"{path}: {name!r} keeps its data in other files; refused, they may be anything")
        right = h5py.check_string_dtype(dataset.dtype) if name in STRINGS else dataset.dtype == types[name]
        if not right:
            raise LedeError(f"{path}: corrupted: {name} is {dataset.dtype}; expected {types.get(name, 'strings')}")


def _read_header(path: Path, file: h5py.File) -> TraceHeader:
    values: dict[str, Any] = {}
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "tuple[int, ...]": list}
    for field in fields(TraceHeader):
        value = json.loads(file.attrs[field.name]) if field.name in file.attrs else None
        kind = kinds.get(str(field.type), dict)
        if not isinstance(value, kind) or (kind is list and not all(type(item) is int for item in value)):
            raise LedeError(f"{path}: corrupted: attribute {field.name!r} is {value!r}; expected {field.type}")
        values[field.name] = tuple(value) if kind is list else value
    return TraceHeader(**values)
