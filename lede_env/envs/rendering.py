"""What an environment shows of itself: tokens by layers, how deep each one's draft went and how it fared.

The colours are those of the benchmarks' figures. What differs in meaning differs in shape too, for eyes and terminals
that tell no colours.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lede_env.errors import LedeError

RENDER_MODES = ["human", "ansi", "rgb_array"]
RENDER_FPS = 10
INK, BLUE, RED, GREY = "#222222", "#2f6db3", "#c8452c", "#d9d9d9"
PAPER, TRACK, PALE = "#fcfcfa", "#f2f2f2", "#b9cfe8"

WALKED, DRAFTED, ACCEPTED, REJECTED, TARGET = "walked", "drafted", "accepted", "rejected", "target"
MARKS = {WALKED: "▸", DRAFTED: "○", ACCEPTED: "●", REJECTED: "✕", TARGET: "◆"}
STYLES = {WALKED: "bold", DRAFTED: BLUE, ACCEPTED: BLUE, REJECTED: RED, TARGET: "dim"}
TOKENS_A_LINE = 64

HEIGHT, WIDTH, CELL = 384, 640, 12  # of a frame, and of a token in it, pixels; encoders of video like multiples of 16
LEFT, RIGHT, TOP, BOTTOM = 28, 12, 12, 24  # margins
TOKENS_A_FRAME = (WIDTH - LEFT - RIGHT) // CELL
# The digits 0 to 9: five rows of three bits each.
GLYPHS = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717"]


class Column(NamedTuple):
    """One token: how many layers its draft ran, and what became of it. A round may begin with it."""

    layer: int
    kind: str  # walked: the draft in view; drafted: not verified yet; accepted; rejected; target: no draft
    opens: bool = False


@dataclass(frozen=True)
class Scene:
    """What there is to see: a line that says it, and a column a token, those of the open round last."""

    n_layers: int
    candidate_layers: tuple[int, ...]
    status: str
    columns: Sequence[Column]


class Screen:
    """Shows scenes as a `render_mode` asks for."""

    def __init__(self, mode: str | None):
        if mode not in (None, *RENDER_MODES):
            raise LedeError(f"render_mode={mode!r} is unknown; use one of {', '.join(RENDER_MODES)}")
        self.mode = mode
        self._live: Live | None = None
        self._next = 0.0  # when the next frame is due, for people

    def show(self, scene: Scene) -> str | np.ndarray | None:
        """`ansi`: text with colours; `rgb_array`: (HEIGHT, WIDTH, 3) uint8; `human`: nothing, it is on the terminal."""
        if self.mode == "rgb_array":
            return draw_frame(scene)
        if self.mode == "ansi":
            return as_ansi(scene)
        if self.mode == "human":
            if self._live is None:
                self._live = Live(console=Console(), auto_refresh=False)
                self._live.start()
            time.sleep(max(0.0, self._next - time.monotonic()))
            self._next = time.monotonic() + 1 / RENDER_FPS
            self._live.update(as_text(scene), refresh=True)
        return None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has not shown anything: neither the terminal nor this machine's clock can go with it."""
        return {"mode": self.mode, "_live": None, "_next": 0.0}

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def as_ansi(scene: Scene) -> str:
    """The scene as text with escape codes."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=TOKENS_A_LINE + 16)
    console.print(as_text(scene), soft_wrap=True, end="")
    return console.file.getvalue()  # type: ignore[attr-defined]


def as_text(scene: Scene) -> Text:
    """The status, then a line a candidate layer, deepest first, under one for the full depth."""
    columns = scene.columns[-TOKENS_A_LINE:]
    text = Text(scene.status)
    for layer in (scene.n_layers, *reversed(scene.candidate_layers)):
        text.append(f"\n{layer:4d} ", "dim")
        for column in columns:
            if column.layer == layer:
                text.append(MARKS[column.kind], STYLES[column.kind])
            else:
                text.append("│" if column.layer > layer else "·" if column.opens else " ", "dim")
    legend = Text("\n     ")
    for kind, mark in MARKS.items():
        legend.append(mark, STYLES[kind]).append(f" {kind}  ", "dim")
    return text.append_text(legend)


def draw_frame(scene: Scene) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8. A bar a token, as high as its draft went: grey while it is walked, pale and hollow when
    drafted, blue when accepted, red and crossed out when rejected; no draft: hollow and grey, over all layers. Lines
    part rounds; candidate layers are marked at the left, every tenth token below."""
    frame = _background(scene.n_layers, scene.candidate_layers).copy()
    first = max(0, len(scene.columns) - TOKENS_A_FRAME)
    for place, column in enumerate(scene.columns[first:]):
        left = LEFT + place * CELL
        if column.opens:
            frame[TOP : HEIGHT - BOTTOM + 4, left - 1] = _rgb(INK)
        _draw_bar(frame, left + 1, _height(column.layer, scene.n_layers), column.kind)
        if (first + place) % 10 == 0:
            _write(frame, HEIGHT - BOTTOM + 7, left + 1, first + place)
    return frame


def _draw_bar(frame: np.ndarray, left: int, top: int, kind: str) -> None:
    bottom, right = HEIGHT - BOTTOM, left + CELL - 2
    inside = frame[top + 2 : bottom - 2, left + 2 : right - 2]
    if kind == TARGET:
        frame[top:bottom, left:right] = _rgb(GREY)
        inside[:] = _rgb(PAPER)
    elif kind == DRAFTED:
        frame[top:bottom, left:right] = _rgb(BLUE)
        inside[:] = _rgb(PALE)
    elif kind == WALKED:
        frame[top:bottom, left:right] = _rgb(GREY)
        frame[top : top + 4, left:right] = _rgb(INK)
    else:
        frame[top:bottom, left:right] = _rgb(BLUE if kind == ACCEPTED else RED)
    if kind == REJECTED:
        cross = np.arange(CELL - 4)
        for shift in (0, 1):
            frame[top + 2 + cross, left + 1 + np.maximum(cross - shift, 0)] = _rgb(PAPER)
            frame[top + 2 + cross, right - 2 - np.maximum(cross - shift, 0)] = _rgb(PAPER)


@lru_cache(maxsize=8)
def _background(n_layers: int, candidate_layers: tuple[int, ...]) -> np.ndarray:
    frame = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    frame[:] = _rgb(PAPER)
    for left in range(LEFT, LEFT + TOKENS_A_FRAME * CELL, CELL):
        frame[TOP : HEIGHT - BOTTOM, left + 1 : left + CELL - 1] = _rgb(TRACK)
    free = HEIGHT  # labels may not lie closer than their height
    for layer in candidate_layers:
        y = _height(layer, n_layers)
        frame[y, LEFT - 5 : WIDTH - RIGHT] = _rgb(GREY)
        if y <= free - 12:
            _write(frame, y - 5, 4, layer)
            free = y
    frame.setflags(write=False)
    return frame


def _height(layer: int, n_layers: int) -> int:
    """The y of the top of a bar of so many layers."""
    return HEIGHT - BOTTOM - round(layer * (HEIGHT - BOTTOM - TOP) / n_layers)


def _write(frame: np.ndarray, top: int, left: int, number: int) -> None:
    """A number in digits of 6 x 10 pixels."""
    for place, digit in enumerate(str(number)):
        bits = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in GLYPHS[int(digit)]], bool)
        bits = bits.repeat(2, 0).repeat(2, 1)  # (10, 6)
        frame[top : top + 10, left + 8 * place : left + 8 * place + 6][bits] = _rgb(INK)


@lru_cache
def _rgb(colour: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)
