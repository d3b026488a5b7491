"""The pictures: the paper's Figure 2, and one generation as a heat map of tokens by layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lede_env.decoding.generate import Generation

INK, BLUE, RED, GREY = "#222222", "#2f6db3", "#c8452c", "#d9d9d9"


def learning_curves(history: Sequence[dict[str, Any]], path: Path, window: int = 20) -> None:
    """Reward, acceptance and exit layer over training episodes: one dot an episode, and the running mean."""
    rows = [row for row in history if "return" in row]
    panels = [
        ("return", "(a) reward a prompt"),
        ("acceptance", "(b) acceptance"),
        ("exit_layer", "(c) mean exit layer"),
    ]
    explored = sum(row["phase"] == "explore" for row in rows)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels, strict=True):
        values = np.array([row[key] for row in rows], float)
        mean = [np.nanmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
        axis.plot(values, ".", color=BLUE, alpha=0.25, markersize=4, markeredgewidth=0)
        axis.plot(mean, color=INK, linewidth=1.6, label=f"mean of the last {window}")
        if explored:
            axis.axvline(explored, color=RED, linestyle="--", linewidth=1, label="learning begins")
        axis.set(title=title, xlabel="episode")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, framealpha=1, edgecolor="none")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def exit_heat_map(out: Generation, n_layers: int, pieces: Sequence[str], path: Path, most: int = 64) -> None:
    """Tokens by layers: how deep each token's draft went, accepted or not, and what verification added.

    Args:
        pieces: the text of each token of `out`.
        most: tokens shown, from the beginning.
    """
    columns = []  # (layers drafted, kind)
    for round_ in out.rounds:
        for index in range(len(round_.emitted)):
            if index < round_.accepted:
                columns.append((round_.exits[index], "accepted"))
            elif index < len(round_.exits):
                columns.append((round_.exits[index], "rejected"))
            else:
                columns.append((0, "plain"))
    columns = columns[:most]
    colours = {"accepted": BLUE, "rejected": RED, "plain": GREY}
    figure, axis = plt.subplots(figsize=(max(6, 0.21 * len(columns)), 4.2), constrained_layout=True)
    axis.bar(range(len(columns)), n_layers, color="#f2f2f2", width=0.9)
    for kind, colour in colours.items():
        at = [index for index, column in enumerate(columns) if column[1] == kind]
        height = [n_layers if kind == "plain" else columns[index][0] for index in at]
        label = {"accepted": "drafted, accepted", "rejected": "drafted, rejected", "plain": "bonus: no draft"}[kind]
        axis.bar(at, height, color=colour, width=0.9, label=label)
    start = 0
    for round_ in out.rounds:
        if 0 < start < len(columns):
            axis.axvline(start - 0.5, color=INK, linewidth=0.6)
        start += len(round_.emitted)
    axis.set_xticks(
        range(len(columns)), [piece_label(piece) for piece in pieces[: len(columns)]], rotation=90, fontsize=7
    )
    axis.set(ylabel="layers run while drafting", ylim=(0, n_layers), xlim=(-0.6, len(columns) - 0.4))
    played = f"E {out.metrics.E:.2f}, d {out.metrics.d:.2f}, acceptance {out.metrics.acceptance:.2f}"
    axis.set_title(f"{out.strategy} on {out.model}: {played}; lines part the rounds", fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def piece_label(piece: str) -> str:
    """A token as an axis label: visible, short, and not read as mathematics."""
    text = piece.replace("\n", "⏎").replace("\t", "→").replace("$", r"\$")
    return text if text.strip() else "␣" * min(len(text), 4)
