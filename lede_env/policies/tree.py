"""A policy that is one decision tree: a decision looks at the few features on its way, and computes no others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lede_env.errors import LedeError
from lede_env.policies.rules import EXIT
from lede_env.policies.trained import TrainedPolicy

if TYPE_CHECKING:
    from lede_env.engine.signals import Signals

LEAF = -1
Branch = tuple[str, float, Any, Any]  # feature, threshold, and what follows at most there and beyond it


@dataclass(frozen=True, eq=False)
class TreePolicy(TrainedPolicy):
    """Exits where the leaf that an observation falls into gives exiting an advantage.

    feature: (N,) int, which of `features` node n asks about, -1 at a leaf; node 0 is the root.
    threshold: (N,) float64; at most so much leads to node `left`, more to node `right`, (N,) int both, which come
        after their parent.
    advantage: (N,) float32 of exiting over continuing, at the leaves.
    """

    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    advantage: np.ndarray
    kind: ClassVar[str] = "tree"

    def __post_init__(self) -> None:
        super().__post_init__()
        nodes = len(self.feature)
        arrays = (self.feature, self.threshold, self.left, self.right, self.advantage)
        if nodes == 0 or any(array.shape != (nodes,) for array in arrays):
            raise LedeError(f"TreePolicy arrays are {[array.shape for array in arrays]}; expected (N,) each, N >= 1")
        inner = self.feature != LEAF
        known = (self.feature >= LEAF) & (self.feature < len(self.features))
        here = np.arange(nodes)
        ahead = (self.left > here) & (self.right > here) & (self.left < nodes) & (self.right < nodes)
        if not (known.all() and ahead[inner].all()):
            raise LedeError("TreePolicy has a node that asks about no feature of its own, or leads to no later node")
        if not (np.isfinite(self.threshold[inner]).all() and np.isfinite(self.advantage[~inner]).all()):
            raise LedeError("TreePolicy has a threshold or an advantage that is not finite")

    def q_values(self, observations: np.ndarray) -> np.ndarray:
        """(N, F) -> (N, 2) values of `CONTINUE`, which is 0, and `EXIT`, the advantage of the leaf."""
        node, rows = np.zeros(len(observations), np.int64), np.arange(len(observations))
        while len(rows):
            asked = self.feature[node[rows]]
            rows, asked = rows[asked != LEAF], asked[asked != LEAF]
            here = node[rows]
            low = observations[rows, asked] <= self.threshold[here]
            node[rows] = np.where(low, self.left[here], self.right[here])
        return np.stack([np.zeros_like(self.advantage[node]), self.advantage[node]], axis=1)

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        return (self.q_values(observations)[:, EXIT] > 0).astype(np.float64)

    @cached_property
    def _root(self) -> Branch | bool:
        """The tree as nested tuples, without the questions whose answer changes nothing."""
        built: dict[int, Branch | bool] = {}
        for node in reversed(range(len(self.feature))):
            if self.feature[node] == LEAF:
                built[node] = bool(self.advantage[node] > 0)
                continue
            low, high = built[int(self.left[node])], built[int(self.right[node])]
            alike = isinstance(low, bool) and low is high
            name = self.features[int(self.feature[node])]
            built[node] = low if alike else (name, float(self.threshold[node]), low, high)
        return built[0]

    def exits(self, signals: Signals) -> bool:
        node, known = self._root, {}
        while isinstance(node, tuple):
            name, threshold, low, high = node
            if name not in known:
                known[name] = signals.feature(name)
            node = low if known[name] <= threshold else high
        return node

    def tensors(self) -> dict[str, np.ndarray]:
        """`tree.<array>`, as the class names them."""
        types = {"feature": np.int32, "threshold": np.float64, "left": np.int32, "right": np.int32}
        arrays = {name: np.asarray(getattr(self, name), dtype) for name, dtype in types.items()}
        return {f"tree.{name}": array for name, array in (arrays | {"advantage": self.advantage}).items()}

    def card(self) -> dict[str, Any]:
        """What policy.json holds."""
        return super().card() | {"nodes": len(self.feature)}
