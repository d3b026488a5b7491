"""Sampling, greedy matching, speculative sampling and the coupling of the exit MDP, against exact distributions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lede_env.engine.acceptance import (
    Draws,
    Sampling,
    coupled_drafts,
    derive_seed,
    draw,
    first_uniforms,
    greedy_match,
    speculative_matches,
)


def speculative_match(drafts, p, q, coins, after):
    """Of one row."""
    return speculative_matches([drafts], p, [q], [coins], [after])[0]


def chi_square_p(observed, expected):
    """p-value of the chi-square test; cells expected under 5 are pooled."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    assert (observed[expected == 0.0] == 0.0).all()
    small = expected < 5.0
    observed = np.append(observed[~small], observed[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0.0], expected[expected > 0.0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    half_freedom, half = torch.tensor((len(expected) - 1) / 2), torch.tensor(statistic / 2)
    return float(torch.special.gammaincc(half_freedom.double(), half))


def distribution(seed, *shape):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2.0 * logits).softmax(-1).float()


# --- sampling


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 60),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.05, 1.0),
)
def test_probabilities_are_those_of_transformers(seed, vocab, temperature, top_k, top_p):
    logits = 4.0 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_draw_has_the_right_frequencies_and_no_token_of_weight_zero():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 5.0, 0.0, 1e-9, 0.0])
    draws = Draws(4)
    counts = np.bincount([draw(weights, draws.next()) for _ in range(9000)], minlength=8)
    assert chi_square_p(counts, 1000 * weights.double().numpy()) > 1e-3
    edges = [0.0, 2.0**-60, 1 / 3, 1 / 3 + 2**-53, 4 / 9, np.nextafter(1.0, 0.0), 1.0]
    assert [draw(weights, u) for u in edges] == [1, 1, 3, 3, 4, 6, 6]


def test_draws_are_uniform_counted_and_pinned():
    draws = Draws(0)
    assert [draws.next() for _ in range(3)] == [0.8833108082136426, 0.43152799704850997, 0.026433771592597743]
    draws = Draws(12345)
    first = [draws.next() for _ in range(10_000)]
    assert min(first) >= 0.0 and max(first) < 1.0 and len(set(first)) == len(first)
    assert chi_square_p(np.histogram(first, 20, (0.0, 1.0))[0], np.full(20, 500.0)) > 1e-3
    pairs = Counter((int(a * 5), int(b * 5)) for a, b in pairwise(first))
    assert chi_square_p([pairs[cell] for cell in product(range(5), repeat=2)], np.full(25, 9999 / 25)) > 1e-3
    # Two streams do not disturb each other: what is drawn depends on the seed and the count alone.
    one, other = Draws(12345), Draws(-6)
    mixed = [(one.next(), other.next())[0] for _ in range(50)]
    assert mixed == first[:50]


def test_derived_seeds_are_distinct_and_pinned():
    assert derive_seed(99) == 99
    assert derive_seed(7, 0) == 9672475392221035855
    seeds = {derive_seed(seed, row) for seed in range(-3, 40) for row in range(40)}
    assert len(seeds) == 43 * 40
    assert derive_seed(7, 1, 2) == derive_seed(derive_seed(7, 1), 2) != derive_seed(7, 2, 1)


# --- greedy


@pytest.mark.parametrize(
    ("drafts", "targets", "expected"),
    [
        ([], [7], (0, 7)),
        ([3], [4, 9], (0, 4)),
        ([3], [3, 9], (1, 9)),
        ([3, 5, 6], [3, 5, 8, 6], (2, 8)),
        ([3, 5, 6], [3, 5, 6, 1], (3, 1)),
        ([3, 5, 6], [1, 5, 6, 2], (0, 1)),  # a later agreement does not count
    ],
)
def test_greedy_match(drafts, targets, expected):
    assert greedy_match(drafts, targets) == expected


# --- speculative sampling


def resample_from_p(drafts, p, q, coins, after):
    """The rule broken on purpose: a rejected draft is replaced by a draw from p instead of the residual."""
    for i, token in enumerate(drafts):
        if coins[i] * float(q[i][token]) >= float(p[i, token]):
            return i, draw(p[i], after)
    return len(drafts), draw(p[-1], after)


def emitted_counts(match, p, q, n):
    counts, draws = Counter(), Draws(17)
    for _ in range(n):
        drafts = [draw(row, draws.next()) for row in q]
        accepted, token = match(drafts, p, q, [draws.next() for _ in drafts], draws.next())
        counts[(*drafts[:accepted], token)] += 1
    return counts


def first_token_p(counts, p, n):
    first = np.zeros(p.shape[-1])
    for emitted, count in counts.items():
        first[emitted[0]] += count
    return chi_square_p(first, n * p[0].double().numpy())


def test_speculative_match_emits_exactly_the_target_distribution():
    n, p, q = 20_000, distribution(1, 3, 4), list(distribution(2, 2, 4))
    counts = emitted_counts(speculative_match, p, q, n)
    assert first_token_p(counts, p, n) > 1e-3
    # Every outcome: rejected at once, after one draft, or both accepted and the bonus.
    both = [torch.minimum(p[i], q[i]).double().numpy() for i in (0, 1)]
    rest = [(p[i] - q[i]).clamp_min(0.0).double().numpy() for i in (0, 1)]  # already times P(rejection)
    exact = {(t,): rest[0][t] for t in range(4)}
    exact |= {(x, t): both[0][x] * rest[1][t] for x, t in product(range(4), repeat=2)}
    exact |= {(x, y, t): both[0][x] * both[1][y] * float(p[2, t]) for x, y, t in product(range(4), repeat=3)}
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-6)
    assert chi_square_p([counts[key] for key in exact], [n * value for value in exact.values()]) > 1e-3


def test_the_chi_square_test_catches_a_broken_rule():
    n, p, q = 20_000, distribution(1, 3, 4), list(distribution(2, 2, 4))
    assert first_token_p(emitted_counts(resample_from_p, p, q, n), p, n) < 1e-6


def test_speculative_match_at_its_edges():
    sure, other = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    # Equal distributions: always accepted, and the bonus comes from the last row of p.
    assert speculative_match([1], torch.stack([sure, other]), [sure], [1.0 - 2.0**-53], 0.5) == (1, 2)
    # A draft of target probability zero: never accepted, the residual is p.
    for coin in (0.0, 2.0**-53, 0.5):
        assert speculative_match([1], torch.stack([other, sure]), [sure], [coin], 0.5) == (0, 2)
    assert speculative_match([], sure[None], [], [], 0.5) == (0, 1)


def test_a_draft_is_accepted_where_its_coin_is_below_the_ratio():
    p, q = torch.tensor([[0.3, 0.7], [1.0, 0.0]]), torch.tensor([0.6, 0.4])
    for coin in (0.0, 0.25, 0.499, 0.501, 0.999):
        assert speculative_match([0], p, [q], [coin], 0.5) == ((1, 0) if coin < 0.5 else (0, 1))


def test_first_uniforms_are_those_of_draws():
    seeds = np.array([0, 1, 7, 2**63, 2**64 - 1], np.uint64)
    assert first_uniforms(seeds).tolist() == [Draws(seed).next() for seed in seeds.tolist()]
    numbers, steps = np.arange(5, dtype=np.uint64), np.full(5, 3, np.uint64)
    derived = derive_seed(11, numbers, steps)
    assert derived.tolist() == [derive_seed(11, number, 3) for number in range(5)]


# --- the coupling


def test_coupled_drafts_have_their_own_distribution_and_agree_as_often_as_can_be():
    p, q = distribution(3, 4), distribution(4, 3, 4)
    q[2] = p  # a layer that knows: always accepted
    steps = 1000
    marginal, agree = np.zeros((3, 4)), np.zeros(3)
    for target in range(4):
        for step in range(steps):
            drafts, chance = coupled_drafts(p, q, target, (step + 0.5) / steps)
            torch.testing.assert_close(chance, (q[:, target] / p[target]).clamp_max(1.0))
            for layer, token in enumerate(drafts):
                marginal[layer, token] += float(p[target]) / steps
                agree[layer] += float(p[target]) / steps * (token == target)
    np.testing.assert_allclose(marginal, q.numpy(), atol=2e-3)
    np.testing.assert_allclose(agree, torch.minimum(p, q).sum(-1).numpy(), atol=2e-3)
    assert agree[2] == pytest.approx(1.0)
