"""The acceptance head: what an early layer's state tells of whether the draft made there will be accepted.

A small network beside the LM head, trained on the model's own texts (`agents/acceptance_head.py`), after the acceptance
prediction head of SpecDec++ (Huang et al., 2024). It reads the normed state that the LM head reads, the draft x, and
two numbers of its distribution that cost no softmax, and says three numbers:

- odds a and slope k > 0: a draft whose coin is u is accepted with log-odds a - k log u. Speculative sampling accepts
  where u < p(x) / q(x); greedy decoding has no coin, which is u = 1.
- ahead: the log-odds that the draft after it is accepted, should this one be.

All of it is known once x is drawn, so whether another draft is made may depend on it (design section 4).

Of a draft that is the most probable token by far the network is not asked: it is accepted 199 times in 200, and the
same is said of all such drafts. They are a third of all, and policies do as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from lede_env.engine.signals import OUTLOOK, margins, shortfalls, warmth
from lede_env.errors import LedeError

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM
    from lede_env.engine.signals import Signals

INPUTS = 3  # besides state and draft
STEEPEST = 5.0  # bound of |log slope|
SURE = 4.0  # nats that the best token is above the second: then a draft of it is sure
TENSORS = ("state", "token", "signals", "bias", "middle", "middle_bias", "out", "out_bias", "sure")


def inputs_of(margin: Tensor, shortfall: Tensor, warm: Tensor) -> Tensor:
    """(N,) margins and shortfalls of x, nats, and T / (1 + T) -> (N, INPUTS), of about unit size."""
    return torch.stack([margin / 4, shortfall / 4, warm * 2], -1)


@dataclass(frozen=True, eq=False, repr=False)
class AcceptanceHead:
    """U hidden units, twice, over a state of d channels; of a twin, its donor's, which are the first d. float32.

    state (d, U); token (V, U), a row for each token of the donor; signals (INPUTS, U); bias (C, U), one of each
    candidate layer; middle (U, U), middle_bias (U,); out (U, 3), out_bias (3,).
    """

    fingerprint: str  # of the model it was trained for
    candidate_layers: tuple[int, ...]
    state: Tensor
    token: Tensor
    signals: Tensor
    bias: Tensor
    middle: Tensor
    middle_bias: Tensor
    out: Tensor
    out_bias: Tensor
    sure: Tensor
    training: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """To copy and to pickle: without the copies for the host."""
        return {name: value for name, value in vars(self).items() if name != "_numpy"}

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    @cached_property
    def digest(self) -> str:
        """Of its weights: what traces and policies name it by."""
        parts = [getattr(self, name).cpu().numpy().tobytes() for name in TENSORS]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def candidate(self, layer: int) -> int:
        """Place of a layer among the candidates."""
        if layer not in self.candidate_layers:
            raise LedeError(
                f"the acceptance head was trained at layers {self.candidate_layers}, not at {layer}; draft at one of "
                "these, or with a policy that does not ask it (--policy tiny, load_policy('tiny')), or train another: "
                "python -m agents.acceptance_head"
            )
        return self.candidate_layers.index(layer)

    def ask(self, normed: Tensor, signals: Signals) -> tuple[float, float, float]:
        """Odds, slope and ahead of the draft that was drawn from these signals' (1, H) normed state: `read` of one row.

        The largest product by torch, whose code the layers have just run, the rest by numpy, whose calls are shorter:
        between two drafts caches hold neither this code nor its weights.
        """
        signals.need_token()
        candidate, own = self.candidate(signals.layer), self._numpy
        margin, shortfall = signals.margin, signals.shortfall
        if np.float32(margin) >= SURE and shortfall == 0.0:  # rounded as in `read`
            return self._sure
        x = torch.mm(normed[:, : len(self.state)].float(), self.state).cpu().numpy()[0]
        x += own["token"][min(signals.token, len(own["token"]) - 1)]
        x += own["bias"][candidate]
        x += np.array((margin / 4, shortfall / 4, warmth(signals.temperature) * 2), np.float32) @ own["signals"]
        x = np.maximum(x, 0.0, out=x) @ own["middle"]
        x += own["middle_bias"]
        return _with_slope(np.maximum(x, 0.0, out=x) @ own["out"] + own["out_bias"])

    @cached_property
    def _sure(self) -> tuple[float, float, float]:
        """What is said of every draft that is sure."""
        return _with_slope(self._numpy["sure"])

    @cached_property
    def _numpy(self) -> dict[str, np.ndarray]:
        """Its weights on the host."""
        return {name: getattr(self, name).cpu().numpy() for name in TENSORS}

    def read(
        self, lm: LayeredLM, states: Tensor, logits: Tensor, tokens: Tensor, layer: int, temperature: float
    ) -> Tensor:
        """(N, H) un-normed states at a layer, their (N, V) logits, (N,) drafts -> (N, 3) odds, slope and ahead."""
        normed = lm.normed(states)[:, : len(self.state)].float()
        warm = torch.full_like(logits[:, 0], warmth(temperature))
        inputs = inputs_of(margins(logits), shortfalls(logits, tokens), warm)
        return self.outlook(normed, tokens, inputs.float(), self.candidate(layer))

    def outlook(self, normed: Tensor, tokens: Tensor, inputs: Tensor, candidate: int) -> Tensor:
        """(N, d) normed states, (N,) drafts, (N, INPUTS) `inputs_of`, place of the layer -> (N, 3)."""
        hidden = torch.addmm(self.bias[candidate], normed, self.state).addmm_(inputs, self.signals)
        # A twin's tokens beyond its donor's are never drafted, but for chance: they share the last row.
        hidden = torch.relu_(hidden.add_(self.token[tokens.clamp_max(len(self.token) - 1)]))
        answer = torch.addmm(self.out_bias, torch.relu_(torch.addmm(self.middle_bias, hidden, self.middle)), self.out)
        sure = (inputs[:, :1] >= SURE / 4) & (inputs[:, 1:2] == 0.0)
        answer = torch.where(sure, self.sure, answer)
        answer[:, 1].clamp_(-STEEPEST, STEEPEST).exp_()
        return answer

    @classmethod
    def random(cls, lm: LayeredLM, seed: int = 0, units: int = 8) -> AcceptanceHead:
        """Of random weights: to test what asks it."""
        generator, sizes = torch.Generator().manual_seed(seed), lm.geometry
        shapes = _shapes(sizes.hidden, sizes.vocab, len(lm.candidate_layers), units)
        tensors: list[Any] = [torch.randn(shape, generator=generator).to(lm.device) for shape in shapes]
        return cls(lm.fingerprint, lm.candidate_layers, **dict(zip(TENSORS, tensors, strict=True)))

    def save(self, folder: str | Path) -> Path:
        """Write head.safetensors (float16) and head.json into a folder, made if missing; returns it."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name).half() for name in TENSORS}, folder / "head.safetensors")
        about = {
            "model_fingerprint": self.fingerprint,
            "candidate_layers": list(self.candidate_layers),
            "training": self.training,
        }
        (folder / "head.json").write_text(json.dumps(about, indent=2) + "\n")
        return folder


def _shapes(d: int, tokens: int, candidates: int, units: int) -> list[tuple[int, ...]]:
    """Of `TENSORS`."""
    return [(d, units), (tokens, units), (INPUTS, units), (candidates, units),
            (units, units), (units,), (units, OUTLOOK), (OUTLOOK,), (OUTLOOK,)]  # fmt: skip


def _with_slope(answer: np.ndarray) -> tuple[float, float, float]:
    """(3,) odds, log slope and ahead -> the slope in place of its log."""
    odds, log_slope, ahead = answer.tolist()
    return odds, math.exp(min(max(log_slope, -STEEPEST), STEEPEST)), ahead


def load_head(folder: str | Path) -> AcceptanceHead:
    """Read what `AcceptanceHead.save` wrote.

    Raises:
        LedeError: a file is missing or damaged, or the two do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        about = json.loads((folder / "head.json").read_text())
        tensors = {name: tensor.float() for name, tensor in load_file(folder / "head.safetensors").items()}
        head = AcceptanceHead(
            about["model_fingerprint"], tuple(about["candidate_layers"]), training=about["training"], **tensors
        )
        layers = head.candidate_layers
        if not all(type(layer) is int for layer in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"candidate_layers {layers}; expected ascending numbers")
        found = [tuple(getattr(head, name).shape) for name in TENSORS]
        if found != (expected := _shapes(len(head.state), len(head.token), len(layers), head.state.shape[1])):
            raise ValueError(f"shapes {found}; expected {expected}")
        if not all(getattr(head, name).isfinite().all() for name in TENSORS):
            raise ValueError("a weight that is not finite")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise LedeError(
            f"{folder} holds no acceptance head that this version reads ({error!r}); copy head.json and "
            "head.safetensors again, or train one: python -m agents.acceptance_head"
        ) from error
    return head
