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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lede_env.data.trajectory_file import checksum
from lede_env.data.trajectory_layout import read_errors, temporary
from lede_env.errors import LedeError

FORMAT = "lede-trace"
FORMAT_VERSION = 3
TOP, RAW = 10, 12  # as in engine.signals, which imports torch
LOG_FLOOR = -30.0
QUANTUM = 2.0**-15  # raw signals, and what a head says, are multiples: they compress, and are at most 1.5e-5 off
CHUNK_BYTES = 1 << 20

STRINGS = ("prompt_ids", "prompt_tasks", "prompt_splits", "prompt_digests")  # (P,) each
# Dataset -> type on disk; the shapes are those of `Trace`.
ARRAYS: dict[str, np.dtype] = {
    "text_seeds": np.dtype("<i8"),
    "starts": np.dtype("<i8"),
    "targets": np.dtype("<i4"),
    "neg_log_p_max": np.dtype("<f4"),
    "raw": np.dtype("<f4"),
    "match": np.dtype("<f4"),
    "drafts": np.dtype("<i4"),
    "shortfall": np.dtype("<f4"),
    "accept_probability": np.dtype("<f4"),
    "coin": np.dtype("<f4"),
    "accepted": np.dtype("bool"),
    "branch": np.dtype("<i4"),
    "branch_starts": np.dtype("<i8"),
    "branch_tokens": np.dtype("<i4"),
    "branch_shortfall": np.dtype("<f4"),
    "branch_coin": np.dtype("<f4"),
    "branch_raw": np.dtype("<f4"),
    "branch_match": np.dtype("<f4"),
}
# What an acceptance head says of the drafts, in traces that hold it. Not part of the digest, which is of the texts.
OUTLOOKS = ("outlook", "branch_outlook")
SAID, MAX_SLOPE = 3, 150.0  # numbers a draft; the most a slope can be


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
        said = [name for name in OUTLOOKS if getattr(self, name) is not None]
        return ARRAYS | dict.fromkeys(said, np.dtype("<f4"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the arrays and the prompt table, whatever file they are in."""
        strings = {name: np.frombuffer("\0".join(getattr(self, name)).encode(), np.uint8) for name in STRINGS}
        return checksum({name: getattr(self, name) for name in ARRAYS} | strings)

    @cached_property
    def outlook_digest(self) -> str:
        """SHA-256 (hex) of what the acceptance head says."""
        return checksum({name: getattr(self, name) for name in self.types.keys() - ARRAYS.keys()})

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
    names, types = {*STRINGS, *ARRAYS}, ARRAYS | dict.fromkeys(OUTLOOKS, np.dtype("<f4"))
    if set(OUTLOOKS) <= set(file):
        names |= set(OUTLOOKS)
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


def check_trace(trace: Trace, path: str | os.PathLike) -> None:
    """Raise a LedeError that names `path` unless all arrays agree with each other and with the header."""

    def demand(right: Any, what: str) -> None:
        if not np.all(right):
            raise LedeError(f"{path}: corrupted: {what}; record the trace again")

    header = trace.header
    layers = header.candidate_layers
    demand(
        len(layers) and list(layers) == sorted(set(layers)) and 1 <= layers[0] <= layers[-1] < header.n_layers,
        f"candidate_layers {layers} are not ascending within 1..{header.n_layers - 1}",
    )
    demand(
        min(header.samples, header.max_new_tokens, header.draft_cap, header.vocab) >= 1,
        "samples, max_new_tokens, draft_cap and vocab must be at least 1",
    )
    _check_shapes(trace, demand)
    for name in ("targets", "drafts", "branch_tokens"):
        tokens = getattr(trace, name)
        demand((tokens >= 0) & (tokens < header.vocab), f"{name} has ids outside 0..{header.vocab - 1}")
    for name in ("raw", "branch_raw"):
        raw = getattr(trace, name)
        low, high = ([LOG_FLOOR] * TOP + [0.0, LOG_FLOOR]), ([0.0] * TOP + [math.log(header.vocab), 0.0])
        demand((raw >= np.array(low)) & (raw <= np.array(high)), f"{name} is out of its bounds")
    for name in ("shortfall", "branch_shortfall"):
        short = getattr(trace, name)
        most = -LOG_FLOOR if header.temperature > 0 else 0.0
        demand((short >= 0) & (short <= most), f"{name} is not in [0, {most:g}]")
    for name in ("coin", "branch_coin"):
        coin = getattr(trace, name)
        demand((coin > 0) & (coin <= 1), f"{name} is not in (0, 1]")
        demand(header.temperature > 0 or (coin == 1).all(), f"{name} is not 1, though the texts are greedy")
    for name in ("match", "branch_match"):
        match = getattr(trace, name)
        demand((match >= 0) & (match <= 1), f"{name} is not in [0, 1]")
    for said in (trace.outlook, trace.branch_outlook):
        if said is None:
            continue
        demand(np.isfinite(said), "what the acceptance head says is not finite")
        demand((said[..., 1] >= 0) & (said[..., 1] <= MAX_SLOPE), f"its slope is not in [0, {MAX_SLOPE:g}]")
    demand((trace.neg_log_p_max >= 0) & (trace.neg_log_p_max <= -LOG_FLOOR), "neg_log_p_max is out of its bounds")
    chance = trace.accept_probability
    demand((chance >= 0) & (chance <= 1), "accept_probability is not in [0, 1]")
    if header.temperature == 0:
        demand(chance == trace.accepted, "accept_probability is not accepted, though the texts are greedy")
    demand(trace.accepted == (trace.drafts == trace.targets[:, None]), "accepted is not drafts == targets")
    _check_texts(trace, demand)
    _check_branches(trace, demand)


def _check_shapes(trace: Trace, demand: Callable[[Any, str], None]) -> None:
    prompts, rows, candidates = len(trace.prompt_ids), len(trace.targets), len(trace.header.candidate_layers)
    texts, branches, tokens = prompts * trace.header.samples, len(trace.branch_starts) - 1, len(trace.branch_tokens)
    shapes: dict[str, tuple[int, ...]] = {
        "text_seeds": (texts,),
        "starts": (texts + 1,),
        "targets": (rows,),
        "neg_log_p_max": (rows,),
        "raw": (rows, candidates, RAW),
        "match": (rows,),
        "branch_starts": (branches + 1,),
        "branch_tokens": (tokens,),
        "branch_shortfall": (tokens,),
        "branch_coin": (tokens,),
        "branch_raw": (tokens, RAW),
        "branch_match": (tokens,),
        "outlook": (rows, candidates, SAID),
        "branch_outlook": (tokens, SAID),
    }
    demand(branches >= 0, "branch_starts is empty")
    demand((trace.outlook is None) == (trace.branch_outlook is None), "of outlook and branch_outlook one is missing")
    for name in trace.types:
        shape, expected = getattr(trace, name).shape, shapes.get(name, (rows, candidates))
        demand(shape == expected, f"{name} is {shape}; expected {expected}")
    for name in STRINGS:
        demand(len(getattr(trace, name)) == prompts, f"{name} does not have one entry a prompt")
    demand(prompts >= 1 and len(set(trace.prompt_ids)) == prompts, "prompt_ids are none, or not distinct")


def _check_texts(trace: Trace, demand: Callable[[Any, str], None]) -> None:
    starts, lengths, most = trace.starts, np.diff(trace.starts), trace.header.max_new_tokens + 1
    demand(starts[0] == 0 and starts[-1] == len(trace.targets), "starts do not span the positions")
    demand((lengths >= 1) & (lengths <= most), f"texts do not have 1..{most} positions")
    ends = trace.ends[starts[1:] - 1]
    demand(ends | (lengths == most), "a text neither ends by an EOS nor has all its positions")
    demand(trace.ends.sum() == ends.sum(), "a text goes on after an EOS")


def _check_branches(trace: Trace, demand: Callable[[Any, str], None]) -> None:
    header, starts, lengths = trace.header, trace.branch_starts, np.diff(trace.branch_starts)
    row = np.arange(len(trace.targets)) - np.repeat(trace.starts[:-1], np.diff(trace.starts))  # within its text
    room = np.minimum(header.draft_cap - 1, header.max_new_tokens - row)[:, None]  # most tokens of a branch
    wanted = ~trace.accepted & ~np.isin(trace.drafts, header.eos_ids) & (room > 0)
    demand((trace.branch >= 0) == wanted, "branches are not where wrong drafts are")
    demand(np.array_equal(trace.branch[wanted], np.arange(len(lengths))), "branches are not in order")
    demand(starts[0] == 0 and starts[-1] == len(trace.branch_tokens), "branch_starts do not span the branch tokens")
    room = np.broadcast_to(room, wanted.shape)[wanted]  # (B,)
    demand((lengths >= 1) & (lengths <= room), "a branch is empty or too long")
    eos = np.isin(trace.branch_tokens, header.eos_ids)
    demand(eos[starts[1:] - 1] | (lengths == room), "a branch is too short")
    demand(eos.sum() == eos[starts[1:] - 1].sum(), "a branch goes on after an EOS")
