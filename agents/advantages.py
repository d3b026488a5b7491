"""What a trace tells of the draft MDP's decisions: how much better exiting is than continuing, the policy as it stands
being followed from there on. Exact; nothing is played.

Shapes as in lede_env/oracles.py: X texts, T positions, C candidates, K drafts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lede_env.oracles import DraftTable


def draft_questions(table: DraftTable) -> Iterator[tuple[int, np.ndarray]]:
    """Each draft number, and where (X, T, C) a decision is asked and matters with that draft in view."""
    for k in range(1, table.mdp.cap):
        asked = table.asked(k)
        if k == 1:
            asked[..., -1] &= table.lengths[..., -1] > 1  # at the last candidate: draft 2 or verify
        yield k, asked


def draft_advantages(table: DraftTable, exits: np.ndarray, worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(X, T, C, K) advantage of exiting, and whether the policy comes there from some start; where decisions are asked.

    exits: (X, T, C, K) the policy's decisions, zeros and ones. worth: (X, T, C, K) of the round that ends so.
    """
    chosen, last, cap = exits > 0.5, exits.shape[2] - 1, exits.shape[3]
    advantages, reached = np.zeros(exits.shape), np.zeros(exits.shape, bool)
    onward = np.zeros(exits.shape[:3])  # of making draft k + 1
    for k in range(cap, 1, -1):
        verify = worth[..., k - 1]
        advantages[..., k - 1] = onward - verify
        onward = np.where((table.lengths > k) & chosen[..., k - 1], onward, verify)
    leave = np.where(table.lengths > 1, onward, worth[..., 0])
    beyond = worth[..., last, 0]
    for candidate in reversed(range(last + 1)):
        advantages[..., candidate, 0] = leave[..., candidate] - beyond
        beyond = np.where(chosen[..., candidate, 0], leave[..., candidate], beyond)
    walking = table.starts
    for candidate in range(last + 1):
        reached[..., candidate, 0] = walking
        drafting = walking & chosen[..., candidate, 0]
        for k in range(2, cap + 1):
            reached[..., candidate, k - 1] = drafting
            drafting = drafting & chosen[..., candidate, k - 1]
        walking = walking & ~chosen[..., candidate, 0]
    return advantages, reached
