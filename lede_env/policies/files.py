"""Reading the policy file, which `TrainedPolicy.save` writes: a folder with ``policy.json`` and ``policy.safetensors``.

The JSON says which kind of policy it is, what it observes and which model it was trained for. The tensors, float32 but
for a tree's structure:

| kind | class | tensors |
|---|---|---|
| ``mlp`` | `MLPPolicy` | ``layers.<i>.weight`` (out, in), ``layers.<i>.bias`` (out,) |
| ``masked_mlp`` | `MaskedMLPPolicy` | those, and ``imitator.<i>.weight``, ``imitator.<i>.bias`` |
| ``tree`` | `TreePolicy` | ``tree.feature``, ``.threshold``, ``.left``, ``.right``, ``.advantage``, (nodes,) each |
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lede_env.errors import LedeError
from lede_env.policies.networks import MaskedMLPPolicy, MLPPolicy
from lede_env.policies.trained import FORMAT_VERSION, TrainedPolicy
from lede_env.policies.tree import TreePolicy

TREE_ARRAYS = ("feature", "threshold", "left", "right", "advantage")
_TINY = Path(__file__).parents[1] / "models" / "tiny"
# The embedded model's, for its geometry twins too; "tiny-head" asks the acceptance head.
SHIPPED = {"tiny": _TINY / "policy", "tiny-head": _TINY / "policy_head"}
DEFAULT = "tiny-head"  # drives the decoder where no policy is named
# What this version can run; state_reset belongs to recurrent kinds.
_SUPPORTED: dict[str, list[Any]] = {
    "format_version": [FORMAT_VERSION],
    "kind": [MLPPolicy.kind, MaskedMLPPolicy.kind, TreePolicy.kind],
    "state_reset": ["none"],
}


def load_policy(path: str | Path) -> TrainedPolicy:
    """Load a policy: its folder, its ``.safetensors`` file, or the name of a shipped one (``"tiny"``).

    Raises `LedeError` if a file is missing or damaged, or if this version cannot run the policy.
    """
    if not isinstance(path, str | os.PathLike):
        raise LedeError(f"path={path!r} must be a policy's folder, its .safetensors file, or one of {sorted(SHIPPED)}")
    location = SHIPPED.get(str(path), Path(path))
    if location.suffix == ".safetensors":
        tensor_file, card_file = location, location.with_suffix(".json")
    else:
        tensor_file, card_file = location / "policy.safetensors", location / "policy.json"
    for file in (card_file, tensor_file):
        if not file.is_file():
            raise LedeError(
                f"no policy at {str(path)!r}: {file} is missing; give a folder with policy.json and "
                f"policy.safetensors, the .safetensors file, or one of {sorted(SHIPPED)}; "
                "on a command line also random or static:LAYER"
            )
    card = _read_card(card_file)
    try:
        layers = card["candidate_layers"]
        if not layers or any(type(layer) is not int for layer in layers) or layers != sorted(set(layers)):
            raise LedeError(
                f"{card_file} has candidate_layers={layers!r}; expected ascending numbers; export the policy again"
            )
        return _build(card, tensor_file)
    except LedeError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise LedeError(f"{card_file} is malformed ({error!r}); export the policy again") from error


def _build(card: Mapping[str, Any], tensor_file: Path) -> TrainedPolicy:
    """The policy of a checked policy.json."""
    shared: dict[str, Any] = dict(
        features=tuple(card["features"]),
        candidate_layers=tuple(card["candidate_layers"]),
        head=card.get("acceptance_head"),
        bonus_from=card.get("bonus_from", 0.0),
        **{name: card[name] for name in ("mdp", "n_layers", "model_fingerprint", "model_name", "training")},
    )
    if card["kind"] == TreePolicy.kind:
        shapes: dict[str, tuple[int, ...]] = {f"tree.{name}": (card["nodes"],) for name in TREE_ARRAYS}
        tensors = _read_tensors(tensor_file, shapes)
        shared |= {name: tensors[f"tree.{name}"] for name in TREE_ARRAYS}
        return TreePolicy(**shared)
    networks = {"layers": [len(card["features"]), *card["hidden_sizes"], 2]}
    if card["kind"] == MaskedMLPPolicy.kind:
        networks["imitator"] = [len(card["features"]), *card["imitator_hidden_sizes"], 2]
    shared |= {name: np.array(card["normaliser"][name], np.float32) for name in ("mean", "std")}
    arrays = _read_networks(tensor_file, networks)
    weights, biases = arrays["layers"]
    if "imitator" not in arrays:
        return MLPPolicy(weights=weights, biases=biases, **shared)
    its_weights, its_biases = arrays["imitator"]
    imitator = MLPPolicy(weights=its_weights, biases=its_biases, **shared)
    return MaskedMLPPolicy(weights=weights, biases=biases, **shared, imitator=imitator, flexibility=card["flexibility"])


def _read_card(file: Path) -> dict[str, Any]:
    """policy.json, checked for what this version can run."""
    try:
        card = json.loads(file.read_text())
    except ValueError as error:
        raise LedeError(f"{file} is not valid JSON ({error}); export the policy again") from error
    if not isinstance(card, dict):
        raise LedeError(f"{file} is not a JSON object; export the policy again")
    of_networks: dict[str, list[Any]] = {} if card.get("kind") == TreePolicy.kind else {"activation": ["relu"]}
    for key, supported in (_SUPPORTED | of_networks).items():
        if card.get(key) not in supported:
            raise LedeError(
                f"{file} has {key}={card.get(key)!r}; this version of lede_env runs {supported}, "
                "update lede_env or export the policy again"
            )
    return card


def _read_networks(file: Path, networks: Mapping[str, Sequence[int]]) -> dict[str, tuple[tuple[np.ndarray, ...], ...]]:
    """Weights and biases of networks with these names and layer sizes, as policy.json announces them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for network, sizes in networks.items():
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            shapes |= {f"{network}.{i}.weight": (outputs, inputs), f"{network}.{i}.bias": (outputs,)}
    tensors = _read_tensors(file, shapes)
    return {
        network: tuple(
            tuple(tensors[f"{network}.{i}.{part}"].astype(np.float32) for i in range(len(sizes) - 1))
            for part in ("weight", "bias")
        )
        for network, sizes in networks.items()
    }


def _read_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors of a file, which are to be these."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise LedeError(
            f"{file} is not a readable safetensors file ({error}), perhaps cut short; copy or export it again"
        ) from error
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        raise LedeError(
            f"{file} holds {found}, but its policy.json announces {shapes}; "
            "the two files belong to different policies, copy or export both again"
        )
    return tensors
