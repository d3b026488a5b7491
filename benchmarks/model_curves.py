"""The learning curves of the embedded model, as its model card shows them: python -m benchmarks.model_curves"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmarks.figures import GREY, INK
from lede_env.arguments import clear_errors
from lede_env.models.loading import EMBEDDED

CONTEXT = 2048
SEQUENCES = {"trial": 48, "stage1": 64, "stage2": 64, "stage3": 48}  # a step, all GPUs together
EXITS = (1, 2, 4, 8, 12)


@dataclass
class Args:
    """Draw training loss, accuracy and the exits' divergence over the tokens seen; under layer dropout, as trained."""

    training: Path = EMBEDDED / "training"  # folder of the recorded curves
    out: Path = EMBEDDED / "curves.png"


def read_curves(folder: Path, stage: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Billions of tokens this stage had seen at each of its rows, and the rows."""
    rows = [json.loads(line) for line in (folder / f"{stage}.curves.jsonl").read_text().splitlines()]
    return np.array([row["step"] for row in rows]) * SEQUENCES[stage] * CONTEXT / 1e9, rows


def main(args: Args) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(EXITS)))
    tokens, rows = read_curves(args.training, "trial")
    for axis, key in zip(axes, ("loss", "accuracy"), strict=False):
        axis.plot(tokens, [row[key] for row in rows], color=INK, linewidth=1, linestyle=":", label="trial")
    begin = 0.0
    for stage in ("stage1", "stage2", "stage3"):
        tokens, rows = read_curves(args.training, stage)
        for axis, key in zip(axes, ("loss", "accuracy"), strict=False):
            axis.plot(begin + tokens, [row[key] for row in rows], color=INK, linewidth=1.4)
        for exit_layer, colour in zip(EXITS, shades, strict=True):
            divergence = [row["exit_loss"][str(exit_layer)] for row in rows]
            label = f"layer {exit_layer}" if begin == 0 else None
            axes[2].plot(begin + tokens, divergence, color=colour, linewidth=1.4, label=label)
        begin += tokens[-1]
        for axis in axes if stage != "stage3" else ():
            axis.axvline(begin, color=GREY, linewidth=1, zorder=0)
    axes[0].set(title="(a) next-token loss, last layer", ylim=(1.4, 7))
    axes[1].set(title="(b) next-token accuracy, last layer", ylim=(0, 0.7))
    axes[2].set(title="(c) KL of the exits from the last layer, nats", yscale="log", ylim=(0.005, 12))
    for axis in axes:
        axis.set_xlabel("billions of training tokens; lines part the stages")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    axes[2].legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    figure.savefig(args.out, dpi=100)
    plt.close(figure)
    print(args.out)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
