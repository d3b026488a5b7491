"""What policies that were trained for a model have in common, whatever computes their answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from lede_env.arguments import number
from lede_env.errors import LedeError
from lede_env.models.zoo import twin_layer

if TYPE_CHECKING:
    from lede_env.engine.signals import Signals

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedPolicy:
    """An `ExitPolicy` that knows what it was trained on, and can be kept in a file.

    features, mdp ("exit" | "draft"), candidate_layers, n_layers, model_fingerprint, model_name: what it was
        trained on. training: anything worth keeping about how, JSON values only.
    """

    features: tuple[str, ...]
    mdp: str
    candidate_layers: tuple[int, ...]
    n_layers: int
    model_fingerprint: str
    model_name: str
    training: dict[str, Any] = field(default_factory=dict)
    # A round of two drafts or more that the policy ends is verified without running its last draft, which would give a
    # bonus token, where the acceptance head gives all its drafts together less than this probability. 0: never.
    bonus_from: float = 0.0
    head: str | None = None  # digest of the acceptance head whose answers it learned from, if it reads any
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if self.mdp not in ("exit", "draft"):
            raise LedeError(f"{type(self).__name__} mdp={self.mdp!r} is unknown; expected 'exit' or 'draft'")
        check_bonus(self.bonus_from, self.features)

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        """(N, F) -> (N,) probability of `EXIT`: 0 or 1."""
        raise NotImplementedError

    def exits(self, signals: Signals) -> bool:
        """One decision of the decoder's: as `exit_probability`, without arrays of one row."""
        raise NotImplementedError

    def tensors(self) -> dict[str, np.ndarray]:
        """What policy.safetensors holds."""
        raise NotImplementedError

    def relabelled(self, n_layers: int) -> Self:
        """This policy on a geometry twin of its model, `n_layers` deep: its candidates are where their layers lie."""
        layers = tuple(twin_layer(layer, self.n_layers, n_layers) for layer in self.candidate_layers)
        return replace(self, n_layers=n_layers, candidate_layers=layers)

    def save(self, folder: str | Path) -> Path:
        """Write policy.json and policy.safetensors into `folder`, made if missing; returns the folder."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors(), folder / "policy.safetensors")
        (folder / "policy.json").write_text(json.dumps(self.card(), indent=2) + "\n")
        return folder

    def card(self) -> dict[str, Any]:
        """What policy.json holds."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "mdp": self.mdp,
            "features": list(self.features),
            "state_reset": "none",
            "candidate_layers": list(self.candidate_layers),
            "n_layers": self.n_layers,
            "model_fingerprint": self.model_fingerprint,
            "model_name": self.model_name,
            "training": self.training,
            **({"acceptance_head": self.head} if self.head is not None else {}),
            **({"bonus_from": self.bonus_from} if self.bonus_from else {}),
        }


def check_bonus(bonus_from: Any, features: Sequence[str]) -> None:
    """Raise a LedeError unless a policy of these features can give up bonus tokens below this probability."""
    if not 0.0 <= number("bonus_from", bonus_from) <= 1.0:
        raise LedeError(f"bonus_from={bonus_from} is a probability; give a number from 0 to 1")
    if bonus_from and "risk" not in features:
        raise LedeError(
            f"bonus_from={bonus_from} compares with the feature 'risk', which features={tuple(features)} lack; add it, "
            "or leave bonus_from 0"
        )


def made_for(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a `TrainedPolicy` keeps of the environment it was trained in, by that environment's `attributes`."""
    names = ("mdp", "n_layers", "model_fingerprint", "model_name")
    return {name: attributes[name] for name in names} | {"candidate_layers": tuple(attributes["candidate_layers"])}
