"""Modelled time: what a round costs on a named device, from a JSON of measured kernels.

`python -m lede_env.engine.cost_model --model tiny` measures the pieces on this machine and writes the JSON. A shipped
one never changes: rewards and scores of released ids depend on it.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from lede_env.errors import LedeError

SHIPPED = Path(__file__).parent / "cost_models"


@dataclass(frozen=True)
class CostModel:
    """Seconds of each piece of a round. Widths are rows: index w is a pass over w tokens (index 0 is unused)."""

    name: str
    model: str
    device: str
    dtype: str
    n_layers: int
    layer: tuple[float, ...]  # one layer
    head: tuple[float, ...]  # final norm, LM head and signals
    policy: float  # one decision
    context: int  # positions in the cache while measuring
    software: str

    @property
    def step(self) -> float:
        """Seconds of one autoregressive step: the unit of every cost."""
        return self.n_layers * self.layer[1] + self.head[1]

    def walk(self, layers: int, heads: int, decisions: int) -> float:
        """Cost, in autoregressive steps, of running one token through `layers` with `heads` exit checks."""
        return (layers * self.layer[1] + heads * self.head[1] + decisions * self.policy) / self.step

    def round(self, exit_layer: int, drafts: int, checks: int, decisions: int) -> float:
        """Cost, in autoregressive steps, of a round that drafts at one layer (design section 3).

        (d + 1) e t_layer + (L - e) t_layer(d + 1) + (d + checks) t_head + t_head(d + 1) + decisions t_policy.
        """
        width = min(drafts + 1, len(self.layer) - 1)
        seconds = (
            (drafts + 1) * exit_layer * self.layer[1]
            + (self.n_layers - exit_layer) * self.layer[width]
            + (drafts + checks) * self.head[1]
            + self.head[width]
            + decisions * self.policy
        )
        return seconds / self.step


@cache
def load_cost_model(name: str) -> CostModel:
    """A shipped cost model by name, or one from a JSON file's path."""
    path = SHIPPED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise LedeError(f"cost model {name!r} is unknown; shipped: {shipped}; or give the path of a JSON file")
    try:
        values = json.loads(path.read_text())
        return CostModel(**{**values, "layer": tuple(values["layer"]), "head": tuple(values["head"])})
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise LedeError(
            f"{path} is not a cost model ({error}); write one with python -m lede_env.engine.cost_model"
        ) from error


def measure(
    model: str = "tiny", device: str = "auto", widths: int = 13, context: int = 256, repeats: int = 30
) -> CostModel:
    """Time a layer, a head with signals, and a policy decision on this machine: medians, warmed, synchronised."""
    import platform

    import numpy as np
    import torch

    from lede_env.engine.signals import EXIT_FEATURES, Signals, raw_signals
    from lede_env.models.loading import load_model
    from lede_env.policies import MLPPolicy

    lm = load_model(model, device=device)
    on_gpu = lm.device.type == "cuda"

    def median_seconds(call) -> float:
        samples = []
        for index in range(repeats + 5):
            begin = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize(lm.device)
            if index >= 5:
                samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    layers, heads = [0.0], [0.0]
    with torch.inference_mode(), lm.session(1, context + widths, widths) as session:
        session.prefill(0, [token % lm.geometry.vocab for token in range(context)])
        for width in range(1, widths + 1):
            x = torch.randn(1, width, lm.geometry.hidden, device=lm.device, dtype=lm.dtype)
            span = session.cache.span([0], [context], width)
            layers.append(median_seconds(lambda x=x, s=span: lm.run(x, session.cache, s, 0, lm.n_layers)) / lm.n_layers)
            heads.append(median_seconds(lambda x=x: raw_signals(lm.logits(x[0])).cpu()))
        policy = MLPPolicy.random(EXIT_FEATURES, hidden=(64, 64), seed=0)
        signals = Signals(lm.logits(x[0, :1])[0], 4, lm.n_layers, 1, 0, 12, 0.0)
        signals.raw  # noqa: B018 - computed before timing: it is part of the head
        decision = median_seconds(lambda: policy.exit_probability(np.asarray(signals.features(EXIT_FEATURES))[None]))
    hardware = (
        torch.cuda.get_device_name(lm.device) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    name = f"{lm.name}-{'cuda' if on_gpu else 'cpu'}"
    return CostModel(
        name, lm.name, hardware, str(lm.dtype).removeprefix("torch."), lm.n_layers, tuple(layers), tuple(heads),
        decision, context, f"torch {torch.__version__}",
    )  # fmt: skip


def main(model: str = "tiny", device: str = "auto", out: Path | None = None) -> None:
    """Measure a cost model on this machine and write it as JSON.

    Args:
        model: name, hub id or folder of the model.
        device: "auto", "cpu" or "cuda".
        out: file to write; by default NAME.json in the current folder.
    """
    found = measure(model, device)
    path = out or Path(f"{found.name}.json")
    path.write_text(json.dumps(asdict(found), indent=1) + "\n")
    print(f"{path}: layer {found.layer[1] * 1e3:.3f} ms, head {found.head[1] * 1e3:.3f} ms, "
          f"policy {found.policy * 1e3:.3f} ms, step {found.step * 1e3:.2f} ms on {found.device}")  # fmt: skip


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
