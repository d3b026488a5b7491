"""The leaderboard's figure: interquartile means with their intervals, and performance profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.figures import BLUE, GREY, INK
from benchmarks.rl_statistics import bootstrap, profile

PROFILED = 6  # agents whose profiles are drawn, the best; more cannot be told apart


def draw(rows: Sequence[Mapping[str, Any]], scores: Mapping[tuple[str, str], np.ndarray], path: Path) -> None:
    """One line of panels a set of features; rows: the leaderboard's, scores: (features, agent) -> (D, S)."""
    groups = list(dict.fromkeys(row["features"] for row in rows))
    tallest = max(sum(row["features"] == group for row in rows) for group in groups)
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(12, (1 + 0.24 * tallest) * len(groups)), constrained_layout=True, squeeze=False
    )
    for (left, right), group in zip(axes, groups, strict=True):
        own = [row for row in rows if row["features"] == group and np.isfinite(row["IQM"])]
        _intervals(left, own)
        _profiles(right, {row["agent"]: scores[group, row["agent"]] for row in own[:PROFILED]})
        left.set(title=f"{group} features: interquartile mean, 95 % interval", xlabel="normalised score")
        right.set(title=f"share of runs that score higher, the best {PROFILED}", xlabel="normalised score", ylim=(0, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _intervals(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        colour = BLUE if row["learns from"] == "data" else INK
        axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=5, alpha=0.35)
        axis.plot(row["IQM"], place, "o", color=colour, markersize=4)
    axis.set_yticks(range(len(rows)), [f"{row['agent']} [{row['learns from']}]" for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", color=GREY, linewidth=0.5)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _profiles(axis: Any, scores: Mapping[str, np.ndarray]) -> None:
    """The share of runs above each level, and its interval as a band."""
    runs = np.concatenate([each.ravel() for each in scores.values()])
    share = profile(levels := np.linspace(max(0.0, runs.min() - 1.0), runs.max() + 1.0, 120))
    for agent, own in scores.items():
        (line,) = axis.plot(levels, share(own), linewidth=1.5, label=agent)
        axis.fill_between(levels, *bootstrap(own, share), color=line.get_color(), alpha=0.12, linewidth=0)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
