"""The rules of one round, against examples worked out by hand."""

from __future__ import annotations

import math

import pytest

from lede_env.engine.round import DRAFT_CAP, Counts, Round, draft_limit

EOS = (90, 91)


@pytest.mark.parametrize(
    ("cap", "left", "limit"),
    [(12, 100, 12), (12, 13, 12), (12, 12, 11), (12, 2, 1), (12, 1, 0), (12, 0, 0), (5, 4, 3), (1, 9, 1), (0, 9, 0)],
)
def test_draft_limit(cap, left, limit):
    assert draft_limit(cap, left) == limit


def test_the_papers_cap():
    assert DRAFT_CAP == 12


# drafts, accepted, next token -> emitted, drafts counted, accepted counted, ended
SETTLED = {
    "nothing drafted": ([], 0, 7, [7], [], 0, False),
    "all rejected": ([1, 2, 3], 0, 7, [7], [1, 2, 3], 0, False),
    "some accepted": ([1, 2, 3], 2, 7, [1, 2, 7], [1, 2, 3], 2, False),
    "all accepted": ([1, 2, 3], 3, 7, [1, 2, 3, 7], [1, 2, 3], 3, False),
    "EOS drafted and accepted": ([1, 2, 90], 3, 7, [1, 2, 90], [1, 2, 90], 3, True),
    "EOS drafted and rejected": ([1, 2, 90], 2, 7, [1, 2, 7], [1, 2, 90], 2, False),
    "EOS as the corrected token": ([1, 2, 3], 1, 91, [1, 91], [1, 2], 1, True),
    "EOS as the bonus": ([1, 2], 2, 90, [1, 2, 90], [1, 2], 2, True),
    "EOS alone": ([], 0, 91, [91], [], 0, True),
    "tokens after an accepted EOS": ([1, 90, 3], 3, 7, [1, 90], [1, 90], 2, True),
    "the first of two": ([90, 91], 2, 90, [90], [90], 1, True),
}


@pytest.mark.parametrize("case", SETTLED.values(), ids=SETTLED)
def test_settle(case):
    drafts, accepted, token, emitted, counted, kept, ended = case
    round_ = Round(drafts=list(drafts), exits=[4] * len(drafts))
    assert round_.settle(accepted, token, EOS) is ended
    assert (round_.emitted, round_.drafts, round_.accepted) == (emitted, counted, kept)
    assert len(round_.exits) == len(counted)


@pytest.mark.parametrize(
    ("place", "drafts", "accepted"), [(1, [1], 1), (2, [1, 2], 2), (3, [1, 2, 3], 2), (4, [1, 2, 3], 2)]
)
def test_cut_at_a_stop_string(place, drafts, accepted):
    round_ = Round(drafts=[1, 2, 3], exits=[2, 4, 4])
    round_.settle(2, 7, EOS)
    round_.cut(place)
    assert round_.emitted == [1, 2, 7][:place]
    assert (round_.drafts, round_.accepted, len(round_.exits)) == (drafts, accepted, len(drafts))


def test_counts_and_metrics():
    counts = Counts()
    first = Round(drafts=[1, 2, 3], exits=[2, 2, 4], checks=5, decisions=6)
    first.settle(1, 9, EOS)
    second = Round()
    second.settle(0, 8, EOS)
    third = Round(drafts=[5], exits=[8], checks=1, decisions=2)
    third.settle(1, 90, EOS)
    for round_ in (first, second, third):
        counts.add(round_, n_layers=16)
    assert first.layer_calls(16) == 24
    expected = dict(rounds=3, drafted=4, accepted=2, emitted=5, exit_layers=16, checks=6, decisions=8)
    assert vars(counts) == expected | {"layer_calls": 24 + 16 + 24}
    assert (counts.E, counts.d, counts.acceptance, counts.tokens_per_round) == (4.0, 4 / 3, 0.5, 5 / 3)
    counts.merge(counts)
    assert (counts.rounds, counts.layer_calls, counts.E) == (6, 128, 4.0)


def test_metrics_of_nothing_are_nan():
    counts = Counts()
    assert all(math.isnan(value) for value in (counts.E, counts.d, counts.acceptance, counts.tokens_per_round))
    counts.add(Round(emitted=[3]), n_layers=16)  # plain steps draft nothing
    assert math.isnan(counts.E) and math.isnan(counts.acceptance)
    assert (counts.d, counts.tokens_per_round, counts.layer_calls) == (0.0, 1.0, 16)
