"""Names of the traces that ship with the package, and where they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lede_env.data import trace_file
from lede_env.data.trace_file import Trace
from lede_env.errors import LedeError

TRACES_DIR = Path(__file__).parent.parent / "models" / "tiny" / "traces"
KEPT = 4  # traces held in memory, parsed


@dataclass(frozen=True)
class ShippedTrace:
    """A trace of the package's prompts, by greedy decoding or at a temperature (no top-k, no top-p)."""

    name: str
    model: str  # zoo name
    temperature: float

    @property
    def path(self) -> Path:
        return TRACES_DIR / f"{self.name}.h5"


TRACES: dict[str, ShippedTrace] = {
    trace.name: trace
    for trace in (
        ShippedTrace("tiny-greedy-v0", "tiny", 0.0),
        ShippedTrace("tiny-t0.6-v0", "tiny", 0.6),
    )
}


def traces_of(model: str) -> list[ShippedTrace]:
    """The shipped traces of a model of the zoo."""
    return [trace for trace in TRACES.values() if trace.model == model]


def default_trace(model: str, temperature: float) -> str:
    """Name of the shipped trace of a model at a temperature.

    Raises:
        LedeError: there is none; the message lists those there are.
    """
    for trace in traces_of(model):
        if trace.temperature == temperature:
            return trace.name
    listing = ", ".join(f"{trace.name} ({trace.model}, temperature {trace.temperature:g})" for trace in TRACES.values())
    raise LedeError(
        f"backend='trace' needs a trace of {model!r} at temperature {temperature:g}, and none ships; there are: "
        f"{listing}. Pass trace=NAME or trace=FILE, recorded by `lede record --env ID --trace --out FILE`"
    )


def load_trace(name: str | os.PathLike) -> Trace:
    """A trace that ships, by name, or one from a file's path. What was read is kept while the file stays as it is.

    Raises:
        LedeError: neither a name nor a file, or what `lede_env.data.trace_file.load_trace` refuses.
    """
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise LedeError(f"trace={name!r} must be the name of a trace or the path of a file")
    known = TRACES.get(os.fspath(name))
    path = known.path if known else Path(name)
    if not path.is_file():
        fix = "reinstall the package" if known else "record one with `lede record --trace`"
        raise LedeError(f"{path}: no such file; {fix}, or name one that ships: {', '.join(TRACES)}")
    state = path.stat()
    return _read(path.resolve(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=KEPT)
def _read(path: Path, mtime_ns: int, size: int) -> Trace:
    """One entry a state of a file: a changed file is read again."""
    return trace_file.load_trace(path)
