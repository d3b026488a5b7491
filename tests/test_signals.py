"""Exit signals against a direct computation in numpy, and the bounds that environments announce."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lede_env.engine.logit_signals import LogitSignals
from lede_env.engine.read_signals import SIZE, TOKEN_LOGIT, TOP, ReadSignals
from lede_env.engine.signals import (
    DRAFT_FEATURES,
    EXIT_FEATURES,
    LOG_FLOOR,
    PAPER_FEATURES,
    RAW,
    TRACE_WINDOW,
    TraceWindow,
    compute_features,
    draft_doubt,
    draft_peril,
    feature_bounds,
    raw_signals,
    select_features,
    shortfalls,
    trace_feature,
)
from lede_env.errors import LedeError


def random_logits(n, vocab, scale=3.0, dtype=torch.float32):
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("vocab", [2, 3, 9, 10, 11, 500])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_raw_signals(vocab, scale):
    logits = random_logits(20, vocab, scale)
    wide = logits.double().numpy()
    wide -= wide.max(-1, keepdims=True)
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    top = np.full((20, 10), LOG_FLOOR)  # a vocabulary of fewer than ten leaves the rest at the floor
    top[:, : min(vocab, 10)] = -np.sort(-log_p)[:, :10]
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    guesses = torch.arange(20) % (vocab + 1) - 1  # some are none
    found = raw_signals(logits, guesses).numpy()
    assert found.shape == (20, RAW)
    np.testing.assert_allclose(found[:, :10], np.maximum(top, LOG_FLOOR), atol=1e-5)
    np.testing.assert_allclose(found[:, 10], entropy, atol=1e-5)
    below = log_p[np.arange(20), guesses.numpy()] - log_p.max(-1)
    np.testing.assert_allclose(found[:, 11], np.where(guesses < 0, LOG_FLOOR, np.maximum(below, LOG_FLOOR)), atol=1e-5)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(1, 4096),  # uniform: the entropy is ln V, not a rounding error more
        torch.zeros(1, 97),
        torch.eye(1, 50) * 1e4,  # certain: every other log-probability is below the floor
        torch.full((1, 50), -torch.inf).index_fill(1, torch.tensor([3]), 0.0),
        torch.zeros(1, 2),
        random_logits(50, 4096, 8.0),
    ],
    ids=["uniform", "uniform-97", "certain", "impossible", "two", "random"],
)
def test_features_lie_within_their_bounds(logits):
    raw = raw_signals(logits).numpy()
    assert np.isfinite(raw).all()
    low, high = feature_bounds(DRAFT_FEATURES, logits.shape[-1])
    for share in (0.0, 1.0):
        context = dict(layer=share, trace=30.0 * share, phase=1.0 + share, position=share)
        context |= dict(doubt=30.0 * share, temperature=1e6 * share, drawn=30.0 * share, peril=60.0 * share - 30.0)
        features = compute_features(DRAFT_FEATURES, raw, **context)
        assert features.dtype == np.float32 == low.dtype == high.dtype
        assert (features >= low).all() and (features <= high).all()


def test_features_by_hand():
    raw = np.array([-0.25, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, -30.0, 1.5, -2.5], np.float32)
    context = dict(layer=0.5, trace=0.75, match=0.5, phase=2.0, position=0.25, doubt=1.25, temperature=0.6)
    context |= dict(drawn=0.125, peril=-0.75)
    features = compute_features(DRAFT_FEATURES, raw, **context)
    expected = dict(confidence=14.25 / 5, entropy=1.5, trace=0.75, layer=0.5, margin=1.75, top1=0.25)
    expected |= dict(
        phase=2.0, position=0.25, match=0.5, echo=2.5, doubt=1.25, temperature=0.375, drawn=0.125, peril=-0.75
    )
    np.testing.assert_allclose(features, [expected[name] for name in DRAFT_FEATURES], rtol=1e-6)
    chosen = compute_features(("margin", "trace"), raw, layer=0.5, trace=0.75)
    np.testing.assert_allclose(chosen, [1.75, 0.75])
    # Any number of leading axes, with context that broadcasts.
    many = compute_features(EXIT_FEATURES, np.tile(raw, (3, 4, 1)), layer=np.arange(4) / 16, trace=np.zeros((3, 1)))
    assert many.shape == (3, 4, 8)
    np.testing.assert_allclose(many[1, :, 3], np.arange(4) / 16)


def test_signals_of_the_decoder():
    logits = random_logits(1, 40)[0]
    known = dict(trace=0.5, guess=(7, 0.25), token=11, coin=0.5)
    signals = LogitSignals(4, 16, position=3, cap=12, logits=logits, **known)
    raw = raw_signals(logits[None], torch.tensor([7]))[0].numpy()
    drawn = float(logits.max() - logits[11])
    assert signals.best == int(logits.argmax())
    assert signals.top1 == pytest.approx(float(logits.softmax(-1).max()))
    assert signals.probability == pytest.approx(float(logits.softmax(-1)[11]))
    context = dict(layer=0.25, trace=0.5, match=0.25, phase=2.0, position=0.25, drawn=drawn)
    context |= dict(peril=draft_peril(draft_doubt(float(raw[0] - raw[1]), drawn), 0.5))
    expected = compute_features(DRAFT_FEATURES, raw, **context)
    np.testing.assert_allclose(signals.features(DRAFT_FEATURES), expected, rtol=1e-5)
    # What differences of logits give is computed without the softmax, and is the same.
    cheap = ("margin", "echo", "match", "layer")
    lazy = LogitSignals(layer=4, n_layers=16, position=3, cap=12, trace=0.5, guess=(7, 0.25), logits=logits)
    np.testing.assert_allclose(lazy.features(cheap), [expected[DRAFT_FEATURES.index(n)] for n in cheap], rtol=1e-5)
    assert lazy._log_p is None


def test_doubt_and_temperature():
    two = torch.tensor([1.0, 2.5])  # of two tokens, the doubt is -log p of the best
    assert draft_doubt(1.5, 0.0) == pytest.approx(-float(two.log_softmax(-1)[1]))
    assert draft_doubt(1.5, 1.5) == pytest.approx(-float(two.log_softmax(-1)[0]))  # the other one was drawn
    signals = LogitSignals(4, 16, position=3, cap=12, doubt=29.5, temperature=1.0, logits=two)
    np.testing.assert_allclose(signals.features(("doubt", "temperature")), [29.5, 0.5])
    signals.doubt += 1.0
    assert signals.features(("doubt",)) == [30.0]


def test_peril_is_of_the_worst_draft_of_the_round():
    assert draft_peril(0.5, 1.0) == 0.5  # greedy: the doubt itself
    assert draft_peril(0.5, 0.25) == pytest.approx(0.5 + np.log(0.25))
    assert draft_peril(0.0, 0.0) == -30.0 and draft_peril(31.0, 1.0) == 30.0
    logits = torch.tensor([1.0, 3.5, 3.0])
    own = np.log1p(np.exp(-0.5)) + 0.5 + np.log(0.25)  # of token 2
    for position, before, seen in ((0, -30.0, -30.0), (2, -30.0, own), (2, own - 1.0, own), (2, own + 1.0, own + 1.0)):
        signals = LogitSignals(4, 16, position=position, cap=12, peril=before, token=2, coin=0.25, logits=logits)
        assert signals.features(("peril",)) == pytest.approx([seen])
    walking = LogitSignals(4, 16, position=2, cap=12, peril=-4.0, logits=logits)  # nothing is drawn yet
    assert walking.features(("peril", "drawn")).tolist() == [-4.0, 0.0]


def test_what_was_drawn_shows_after_the_draw():
    logits = torch.tensor([[1.0, 3.5, 3.0], [-torch.inf, 0.0, 50.0]])
    assert shortfalls(logits, torch.tensor([0, 0])).tolist() == [2.5, 30.0]
    for position, seen in ((0, 0.0), (1, 2.5)):  # phase 1 decides before it draws
        signals = LogitSignals(4, 16, position=position, cap=12, token=0, logits=logits[0])
        assert signals.shortfall == 2.5 and signals.features(("drawn",)) == [seen]
    assert LogitSignals(4, 16, position=1, cap=12, token=0, logits=logits[1]).features(("drawn",)) == [30.0]


def test_trace_window_and_trace_feature_agree():
    values = np.abs(random_logits(1, 40, 9.0)[0].numpy())
    values[7] = 80.0  # floored at 30
    window = TraceWindow()
    assert window.mean() == 0.0
    seen = []
    for value in values.tolist():
        seen.append(window.mean())
        window.push(value)
    np.testing.assert_allclose(trace_feature(values), seen, rtol=1e-5)
    at = 20
    np.testing.assert_allclose(seen[at], np.minimum(values, 30.0)[at - TRACE_WINDOW : at].mean(), rtol=1e-5)
    np.testing.assert_allclose(seen[3], values[:3].mean(), rtol=1e-6)
    assert len(trace_feature(np.zeros(0))) == 0


def test_trace_of_drafts_not_yet_verified():
    window = TraceWindow()
    assert window.mean([2.0, 4.0]) == 3.0
    for value in range(8):
        window.push(float(value))
    assert window.mean() == 3.5
    assert window.mean([10.0]) == (1 + 2 + 3 + 4 + 5 + 6 + 7 + 10) / 8
    assert window.mean([1.0] * 12) == 1.0
    assert window.mean() == 3.5  # asking changes nothing


def test_feature_sets():
    assert select_features("paper", "exit") == PAPER_FEATURES == ("confidence", "entropy", "trace")
    assert select_features("extended", "exit") == EXIT_FEATURES
    assert select_features("extended", "draft") == (
        *EXIT_FEATURES,
        "phase",
        "position",
        "doubt",
        "temperature",
        "drawn",
        "peril",
    )
    assert select_features(["top1", "layer"], "exit") == ("top1", "layer")
    low, high = feature_bounds(DRAFT_FEATURES, 97)
    np.testing.assert_allclose(low, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, -30])
    np.testing.assert_allclose(high, [30, math.log(97), 30, 1, 30, 30, 1, 30, 2, 1, 30, 1, 30, 30], rtol=1e-6)


@pytest.mark.parametrize(
    ("features", "mdp", "says"),
    [
        ("all", "exit", "features='all' is unknown"),
        (("entropy", "phase"), "exit", "phase"),
        (("entropy", "entropy"), "exit", "distinct"),
        ((), "draft", "distinct names out of"),
    ],
)
def test_feature_sets_that_do_not_exist(features, mdp, says):
    with pytest.raises(LedeError, match=says):
        select_features(features, mdp)


def test_a_token_that_is_not_drawn_has_nothing_to_say():
    """`leave` is asked before the draw; on CUDA the token is there by then, and to decide by it not lossless."""
    context = dict(layer=1, n_layers=4, position=1, cap=12)
    values = [0.0] * SIZE
    values[:2], values[TOP : TOP + 2], values[TOKEN_LOGIT] = (2.0, 1.0), (7.0, 3.0), 1.0
    for signals in (
        LogitSignals(**context, logits=torch.tensor([0.0, 1.0, 2.0]), head=lambda own: (0.0, 0.0, own.shortfall)),
        ReadSignals(**context, values=values),
    ):
        for name in ("token_logit", "shortfall", "probability", "own_doubt", "own_peril", "own_odds", "outlook"):
            with pytest.raises(LedeError, match="no token is drawn yet"):
                getattr(signals, name)
        assert [signals.feature(name) for name in ("drawn", "risk", "odds", "ahead")] == [0.0] * 4
        signals.token = 1
        assert signals.shortfall == 1.0 and signals.outlook
    assert signals.best == 7
