"""Sampled text fits the enumerated distribution, for every strategy; three wrong rules do not.

The short form of `python -m benchmarks.sampling_check`: fewer and shorter texts, one setting.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from benchmarks.sampling_check import (
    BROKEN,
    CHECKED,
    PROMPT,
    SIGNIFICANT,
    VOCAB,
    exact_joint,
    instances,
    p_values,
    sample,
    small_model,
)
from lede_env.decoding.strategies import STRATEGIES
from lede_env.engine.acceptance import Sampling

SAMPLING = Sampling(temperature=1.0, top_p=0.9)


@pytest.fixture(scope="module")
def model():
    """(LayeredLM, transformers model, the joint distribution of six tokens)."""
    lm, reference = small_model()
    return lm, reference, exact_joint(reference, SAMPLING)


@pytest.mark.parametrize("name", STRATEGIES)
def test_samples_fit_the_enumerated_distribution(model, name):
    lm, _, joint = model
    for strategy in instances(name):
        texts, counts = sample(lm, strategy, SAMPLING, sequences=2000, seed=1, new_tokens=8)
        assert min(p_values(texts, joint)) > SIGNIFICANT
        assert name == "autoregressive" or 0.3 < counts.acceptance < 0.97  # both outcomes were exercised


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_rules_do_not_fit(model, name):
    lm, _, joint = model
    with BROKEN[name](SAMPLING) as strategy:
        texts, _ = sample(lm, strategy, SAMPLING, sequences=1000, seed=1, new_tokens=8)
    assert p_values(texts, joint)[0] < SIGNIFICANT


def test_exact_joint_multiplies_next_token_probabilities(model):
    _, reference, joint = model
    assert joint.shape == (VOCAB,) * CHECKED
    assert joint.sum() == pytest.approx(1.0)
    for text in list(product(range(VOCAB), repeat=CHECKED))[:: 6**CHECKED // 9]:
        expected = 1.0
        for t, token in enumerate(text):
            with torch.inference_mode():
                logits = reference(torch.tensor([[*PROMPT, *text[:t]]])).logits[:, -1]
            expected *= float(SAMPLING.probabilities(logits)[0, token])
        assert joint[text] == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_p_values_see_each_half_of_the_text():
    rng = np.random.default_rng(0)
    joint = np.full((VOCAB,) * CHECKED, VOCAB**-CHECKED)
    even = rng.integers(VOCAB, size=(4000, CHECKED))
    first, second = even.copy(), even.copy()
    first[:, 0], second[:, 5] = np.minimum(first[:, 0], 4), second[:, 4]
    assert min(p_values(even, joint)) > SIGNIFICANT
    assert p_values(first, joint)[0] < SIGNIFICANT < p_values(first, joint)[1]
    assert p_values(second, joint)[1] < SIGNIFICANT < p_values(second, joint)[0]
