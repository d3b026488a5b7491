"""Every strategy's greedy text equals transformers' greedy text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lede_env
from tests.small_models import ARCHITECTURES


def reference_ids(model, prompt, new_tokens):
    """transformers' greedy continuation: new tokens only."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("late_scale", [1.0, 0.05])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers(random_model, architecture, late_scale):
    lm, reference = random_model(architecture, late_scale=late_scale)
    prompt = [1, 17, 40, 5, 23]
    expected = reference_ids(reference, prompt, 40)
    for strategy in (lede_env.Autoregressive(), lede_env.LayerSkip(2, 3), lede_env.LayerSkip(5, 12)):
        out = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=40)
        assert out.token_ids == expected, strategy
