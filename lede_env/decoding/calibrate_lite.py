"""The thresholds of Lite: how confident each layer must be to agree with the full depth nine times in ten.

`python -m lede_env.decoding.calibrate_lite --model tiny` computes them on the validation prompts and prints them;
those of the embedded model it also writes beside its weights, from where Lite() takes them. A threshold of 0 says that
the layer agrees that often whatever its confidence: Lite then never goes past it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lede_env.arguments import clear_errors
from lede_env.decoding.generate import generate
from lede_env.decoding.strategies.lite import STORED
from lede_env.engine.layered_lm import LayeredLM
from lede_env.tasks import Prompt, fit_prompt, load_prompts

AGREEMENT = 0.9
BATCH = 16


def calibrate(
    lm: LayeredLM, prompts: Sequence[Prompt], max_new_tokens: int, agreement: float = AGREEMENT
) -> dict[int, float]:
    """The threshold of each candidate layer, from the greedy continuations of the prompts.

    A layer's is the smallest t with P(its best token is the full depth's | its probability > t) >= agreement.
    """
    room = lm.geometry.context - max_new_tokens
    ids = [fit_prompt(lm.encode(prompt.text), room, prompt.task)[0] for prompt in prompts]
    seen = []
    for begin in range(0, len(ids), BATCH):
        batch = ids[begin : begin + BATCH]
        outs: Any = generate(lm, batch, max_new_tokens=max_new_tokens)
        for prompt, out in zip(batch, outs, strict=True):
            seen.append(confidence_and_agreement(lm, prompt, out.token_ids))
    confidence, agrees = (np.concatenate(part, axis=1) for part in zip(*seen, strict=True))  # (C, tokens)
    columns = zip(confidence, agrees, strict=True)
    thresholds = [smallest_threshold(sure, right, agreement) for sure, right in columns]
    return dict(zip(lm.candidate_layers, thresholds, strict=True))


@torch.inference_mode()
def confidence_and_agreement(lm: LayeredLM, prompt: list[int], text: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(C, T) at each token of a text: the candidates' top-1 probability, and whether it is that of the full depth's."""
    fed = [prompt[-1], *text[:-1]]
    taps = (*lm.candidate_layers, lm.n_layers)
    with lm.session(1, len(prompt) + len(text), width=len(fed), taps=taps) as session:
        session.prefill(0, prompt[:-1])
        for token in fed:
            session.feed([0], [token])
        session.finish([0])
        best = [lm.logits(states).softmax(-1).max(-1) for states in session.tapped_states(0, len(fed))]
    confidence = torch.stack([values for values, _ in best[:-1]])
    tokens = torch.stack([indices for _, indices in best])  # (C + 1, T)
    return confidence.double().cpu().numpy(), (tokens[:-1] == tokens[-1]).cpu().numpy()


def smallest_threshold(confidence: np.ndarray, agrees: np.ndarray, agreement: float) -> float:
    """The smallest t for which at least a share `agreement` of the tokens with confidence > t agree; 1.0 if none.

    `confidence` and `agrees` are (N,).
    """
    order = confidence.argsort()
    confidence, agrees = confidence[order], agrees[order]
    share = agrees[::-1].cumsum()[::-1] / np.arange(len(agrees), 0, -1)  # of the i-th token and all after it
    first = np.unique(confidence, return_index=True)[1]  # equals stay together
    enough = first[share[first] >= agreement]
    if not len(enough):
        return 1.0
    return float(confidence[enough[0] - 1]) if enough[0] else 0.0


def main(model: str = "tiny", agreement: float = AGREEMENT, max_new_tokens: int = 96, device: str = "auto") -> None:
    """Calibrate Lite for a model on the validation prompts.

    Args:
        model: zoo name, hub id or local folder.
        agreement: share of the tokens that leave a layer which shall agree with the full depth.
        max_new_tokens: length of the greedy continuations.
        device: auto, cpu, cuda or cuda:N.
    """
    from lede_env.models.loading import load_model

    lm = load_model(model, device=device)
    prompts = load_prompts("all", "validation")
    print(
        f"greedy texts of {lm.name} on {len(prompts)} validation prompts, {max_new_tokens} tokens each ...", flush=True
    )
    thresholds = calibrate(lm, prompts, max_new_tokens, agreement)
    print(f"Lite({thresholds})")
    if lm.weights == "embedded":
        card = {
            "model_name": lm.name,
            "model_fingerprint": lm.fingerprint,
            "agreement": agreement,
            "prompts": len(prompts),
            "max_new_tokens": max_new_tokens,
            "thresholds": thresholds,
        }
        STORED.write_text(json.dumps(card, indent=2) + "\n")
        print(STORED)


if __name__ == "__main__":
    import tyro

    with clear_errors():
        tyro.cli(main)
