"""The comparison of live and trace: what it counts apart as rounding's, and what it reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import lede_env
from benchmarks import live_trace
from benchmarks.live_trace import BORDER, Wave, border_draws, compare, drawn_at_border, make, summary
from lede_env.data.registry import default_trace
from lede_env.engine.acceptance import Sampling, first_uniforms

PROMPTS, LAYERS = ["code/0001", "lm/0006"], (3, 4, 6, 8)
TOKEN = 5  # where the two backends differ


@pytest.fixture(scope="module")
def trace():
    return lede_env.load_trace(default_trace("tiny", 0.6))


@pytest.mark.parametrize(
    ("u", "coupling", "near"),
    [
        (0.5, 0.7, [False, False]),
        (0.25 + 0.5 * BORDER, 0.7, [True, True]),  # of two targets
        (0.25 + 2.0 * BORDER, 0.7, [False, False]),
        (0.5, 0.6 - 0.5 * BORDER, [True, False]),  # the coin of the first layer's draft: q / p is .3 / .5
        (0.5, 0.6 + 2.0 * BORDER, [False, False]),
        (0.5, 0.8 - 0.5 * BORDER, [True, False]),  # halfway above it: of two tokens that replace the target
        (0.5, 0.8 - 2.0 * BORDER, [False, False]),
        (0.0, 1.0, [False, False]),  # the ends are no borders
    ],
)
def test_a_border_draw_is_one_that_a_slightly_other_number_draws_otherwise(u, coupling, near):
    probabilities = torch.tensor([[0.35, 0.3, 0.35], [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]])  # the last: full depth
    np.testing.assert_array_equal(drawn_at_border(probabilities, 1, u, coupling), near)


def test_border_draws_are_found_in_a_text_by_its_own_numbers(tiny, trace):
    """Seeds whose first number, the first target's, lies at a border of the model's, or far from all."""
    text = trace.prompt_ids.index(PROMPTS[0])
    (_, _, logits), *_ = live_trace.computed_again(tiny, trace, {PROMPTS[0]})
    shares = Sampling(0.6).probabilities(logits[-1, :1])[0].double().cumsum(0).numpy()
    seeds = np.arange(100_000, dtype=np.uint64)
    distance = np.abs(first_uniforms(seeds)[:, None] - shares[shares > 0.01][None, :8]).min(1)
    far = np.abs(first_uniforms(seeds[:500])[:, None] - shares).min(1).argmax()
    assert distance.min() < BORDER / 2
    for seed, near in ((distance.argmin(), True), (far, False)):
        text_seeds = trace.text_seeds.copy()
        text_seeds[text] = seed
        found = border_draws(tiny, replace(trace, text_seeds=text_seeds), {PROMPTS[0]})
        assert ({(PROMPTS[0], 0, layer) for layer in LAYERS} <= found) == near


@pytest.mark.parametrize("form", ["vector", "single"])
@pytest.mark.parametrize(
    ("borders", "apart"),
    [
        ({(PROMPTS[0], TOKEN, layer) for layer in LAYERS}, True),
        ({(PROMPTS[0], token, layer) for token in range(100) if token != TOKEN for layer in LAYERS}, False),
        ({(PROMPTS[1], TOKEN, layer) for layer in LAYERS}, False),
        (set(), False),
    ],
)
def test_only_a_difference_at_a_border_draw_is_counted_apart(form, borders, apart):
    """Another draft at one token of the first prompt, on a trace in place of the model."""
    lanes = 2 if form == "vector" else 1
    mine, other = (make(form, lanes, "LEDE-Tiny-v0", backend="trace", split="all", temperature=0.6) for _ in range(2))
    table, prompts = live_trace.backends_of(mine)[0], PROMPTS[:lanes]
    row = table.trace.starts[table.trace.prompt_ids.index(PROMPTS[0])] + TOKEN
    table.drafts = table.drafts.copy()
    table.drafts[row] += 1
    wave = compare(mine, other, prompts, 0, borders)
    assert wave.found[0].startswith("draft_token after ") and not any(wave.found[1:])
    row = summary([wave], prompts, set())
    assert row["of them different"] == apart and row["others different"] == (not apart)
    assert row["with near ties"] == len({place[0] for place in borders if place[0] in prompts})
    assert row["first difference"] == ("" if apart else f"{PROMPTS[0]}: {wave.found[0]}")


def test_an_episode_with_a_greedy_near_tie_is_counted_apart_wherever_it_differs():
    nowhere = np.zeros(2, bool)
    wave = Wave(np.array([7, 9]), np.array([0.5, 1e-6]), ["reward after 7 steps", ""], nowhere, nowhere)
    row = summary([wave], PROMPTS, {PROMPTS[0]})
    assert (row["with near ties"], row["of them different"], row["others different"]) == (1, 1, 0)
    assert row["largest distance"] == "1.0e-06" and row["steps"] == 16
    assert summary([wave], PROMPTS, set())["others different"] == 1
