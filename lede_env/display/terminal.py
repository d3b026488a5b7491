"""A generation in the terminal: streamed, each token coloured by how it came about."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from lede_env.display.origins import Origin, StreamOrigins

if TYPE_CHECKING:
    from lede_env.decoding.generate import Piece
    from lede_env.engine.layered_lm import LayeredLM
    from lede_env.engine.round import Counts

# From the first candidate layer to the last; light enough for a dark terminal, dark enough for a white one.
LAYER_COLOURS = ((23, 160, 134), (52, 138, 222), (148, 102, 235))
# Beside the colour an attribute, for eyes and terminals that have none.
TARGET_STYLES = {
    "corrected": Style(color="#d9622b", underline=True),
    "bonus": Style(color="#b38600", bold=True),
    "plain": Style(dim=True),
}


def layer_style(layer: int, candidates: Sequence[int]) -> Style:
    """The colour of an exit layer: its place among the candidates, on the scale LAYER_COLOURS."""
    place = bisect_right(candidates, layer) - 1
    share = min(max(place, 0) / max(len(candidates) - 1, 1), 1.0) * (len(LAYER_COLOURS) - 1)
    low = min(int(share), len(LAYER_COLOURS) - 2)
    mixed = [round(a + (b - a) * (share - low)) for a, b in zip(*LAYER_COLOURS[low : low + 2], strict=True)]
    return Style(color="#{:02x}{:02x}{:02x}".format(*mixed))


def style_of(origin: Origin, candidates: Sequence[int]) -> Style:
    if origin.layer is not None:
        return layer_style(origin.layer, candidates)
    return TARGET_STYLES[origin.kind]


def legend(candidates: Sequence[int]) -> Text:
    """One line that says what the styles mean."""
    line = Text("drafted at layer")
    for layer in candidates:
        line.append(" ").append(str(layer), layer_style(layer, candidates))
    line.append(" and accepted")
    for kind, style in TARGET_STYLES.items():
        line.append(" · ").append("plain step" if kind == "plain" else kind, style)
    return line


def printable(text: str) -> str:
    """Model output for a terminal: control codes other than line breaks and tabs are dropped."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() or c == " "))


def show_stream(console: Console, lm: LayeredLM, pieces: Iterable[Piece], counts: Counts) -> float:
    """Print a stream as it comes, adding its rounds to `counts`. Returns the seconds that decoding took.

    The legend comes first, in a terminal; elsewhere nothing is coloured and the text is all there is.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        console.print(legend(lm.candidate_layers))
    origins, seconds, begin = StreamOrigins(lm), 0.0, time.perf_counter()
    for piece in pieces:
        seconds += time.perf_counter() - begin
        if piece.round is not None:
            counts.add(piece.round, lm.n_layers)
        runs = [
            Segment(printable(text), style_of(origin, lm.candidate_layers)) for text, origin in origins.split(piece)
        ]
        console.print(Segments(runs), end="", soft_wrap=True)  # segments: no markup, no wrapping, tabs kept
        begin = time.perf_counter()
    console.print()
    return seconds


def summary(lm: LayeredLM, strategy: str, counts: Counts, seconds: float) -> str:
    """One line of figures; those that do not exist without drafts are left out."""
    speed = f"{counts.emitted} tokens in {seconds:.2f} s ({counts.emitted / seconds:.1f} tokens/s)"
    drafting = f", E {counts.E:.2f}, d {counts.d:.2f}, acceptance {counts.acceptance:.3f}" if counts.drafted else ""
    return f"{lm.name} ({lm.weights}), {strategy}: {speed}{drafting}, {counts.tokens_per_round:.2f} tokens a round"
