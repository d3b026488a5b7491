"""A decision tree that is fitted to the advantage of exiting, and then is a policy file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lede_env.errors import LedeError
from lede_env.policies import TreePolicy, made_for
from lede_env.policies.tree import LEAF


class Tree:
    """Weighted least squares by one regression tree (scikit-learn's CART).

    leaves: the most there are; leaf_rows: the fewest observations in one.
    """

    def __init__(self, leaves: int, leaf_rows: int, seed: int):
        try:
            from sklearn.tree import DecisionTreeRegressor
        except ImportError as error:
            raise LedeError("a tree is fitted by scikit-learn, which is not there; pip install scikit-learn") from error
        self.tree = DecisionTreeRegressor(max_leaf_nodes=leaves, min_samples_leaf=leaf_rows, random_state=seed)

    def fit(self, observations: np.ndarray, goals: np.ndarray, weights: np.ndarray) -> float:
        """To (N, F), (N,), (N,); returns the weighted mean square of what is left."""
        self.tree.fit(observations, goals, sample_weight=weights)
        return float(np.average((self.tree.predict(observations) - goals) ** 2, weights=weights))

    def export(self, known: Mapping[str, Any], features: Sequence[str], training: Mapping[str, Any]) -> TreePolicy:
        """As a policy.

        known: the attributes of the environment; features: what the tree observes; training: how it was made.
        """
        grown = self.tree.tree_
        return TreePolicy(
            feature=np.where(grown.children_left < 0, LEAF, grown.feature).astype(np.int32),
            threshold=grown.threshold.copy(),
            left=grown.children_left.astype(np.int32),
            right=grown.children_right.astype(np.int32),
            advantage=grown.value[:, 0, 0].astype(np.float32),
            features=tuple(features),
            training=dict(training),
            **made_for(known),
        )
