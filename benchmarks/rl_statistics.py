"""Few runs, honestly summarised: interquartile means, stratified bootstrap intervals, performance profiles.

The method is that of "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (Agarwal et al., 2021) and
its library rliable. Scores are (D, S): a row a dataset, a column a seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


def iqm(scores: np.ndarray) -> np.ndarray:
    """(..., D, S) -> (...,) mean of the middle half of all runs."""
    runs = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = runs.shape[-1] // 4
    return runs[..., cut : runs.shape[-1] - cut].mean(axis=-1)


def bootstrap(
    scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] = iqm, confidence: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of a statistic in so many of 100 resamples: seeds anew, within each dataset."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(scores.shape[1], size=(RESAMPLES, *scores.shape))
    values = statistic(scores[np.arange(len(scores))[:, None], picks])
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0)
    return low, high


def profile(levels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """(..., D, S) -> (..., L) share of runs that score higher than each of (L,) levels, as a statistic."""

    def share(scores: np.ndarray) -> np.ndarray:
        return (scores[..., None] > levels).mean(axis=(-3, -2))

    return share
