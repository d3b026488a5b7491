"""The strategies' own rules: thresholds, lengths and layers against sequences worked out by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lede_env
from lede_env.decoding.calibrate_lite import confidence_and_agreement, smallest_threshold
from lede_env.decoding.strategies import Del, DraftVerify, FiniteStateMachine, Lite, parse_strategy
from lede_env.decoding.strategies.del_ import Tally, best_layer
from lede_env.decoding.strategies.lite import STORED
from lede_env.engine.logit_signals import LogitSignals
from lede_env.engine.round import Round
from lede_env.errors import LedeError
from tests.small_models import scripted_model

GUIDE = Path(__file__).parents[1] / "docs" / "exit_rules.md"


def signals(*probabilities, layer=2):
    logits = torch.tensor(probabilities, dtype=torch.float64).log() + 3.0  # unnormalised
    return LogitSignals(layer, n_layers=4, position=0, cap=12, logits=logits)


def played(drafted, accepted):
    return Round(drafts=[0] * drafted, exits=[1] * drafted, accepted=accepted)


@pytest.fixture
def script(tiny):
    """script(wrong) -> a 4-layer model that writes tokens 100, 101, ..., and its prompt; layers 1 and 2 miss `wrong`.

    Layers 1 and 2 give right drafts a probability of about 0.41, and the wrong ones more than 0.99; layer 3 gives 0.06.
    """
    ids = list(range(100, 160))
    return lambda wrong=(): (scripted_model(tiny, ids, wrong), ids[:1], ids[1:])


# --- FiniteStateMachine


def test_fsm_goes_up_after_full_acceptance_and_down_otherwise(tiny):
    control = FiniteStateMachine(3).start(tiny, 0)
    lengths = [control.speculation]
    for drafted, accepted in [(4, 4), (5, 5), (6, 5), (5, 0), (4, 4)]:
        control.learn(played(drafted, accepted))
        lengths.append(control.speculation)
    assert lengths == [4, 5, 6, 5, 4, 5]
    for _ in range(9):
        control.learn(played(5, 5))
    assert control.speculation == 12
    for _ in range(13):
        control.learn(played(5, 4))
    assert control.speculation == 1


def test_fsm_drafts_that_many(script):
    lm, prompt, text = script(wrong=(5, 6))
    out = lede_env.generate(lm, prompt, strategy=FiniteStateMachine(1, 2), max_new_tokens=32)
    assert out.token_ids == text[:32]
    # Tokens 1, 2 right, 3 the bonus; 4 right, 5 wrong; 6 wrong at once; from then on all are right.
    assert [(len(r.drafts), r.accepted) for r in out.rounds[:7]] == [
        (2, 2), (3, 1), (2, 0), (1, 1), (2, 2), (3, 3), (4, 4)
    ]  # fmt: skip


# --- DraftVerify


def test_draft_verify_judges_the_drawn_token(tiny):
    control = DraftVerify(2, threshold=0.4).start(tiny, 0)
    round_ = Round(drafts=[3, 0], exits=[2, 2])
    likely, unlikely = signals(0.41, 0.39, 0.1, 0.1), signals(0.39, 0.41, 0.1, 0.1)
    likely.token = unlikely.token = 0  # of the second it is not the best: sampled
    assert control.keep_drafting(likely, round_) and not control.keep_drafting(unlikely, round_)
    assert round_.decisions == 2


def test_draft_verifys_threshold(tiny):
    control = DraftVerify(2).start(tiny, 0)
    # drafted, accepted -> threshold. The acceptance rate runs .5, .75, .875, .9375, .96875, .734.
    table = [
        (4, 4, 0.601),
        (12, 12, 0.602),
        (3, 3, 0.603),
        (3, 3, 0.602),  # over .9: down
        (12, 12, 0.602),  # but not at the cap
        (2, 1, 0.603),
    ]
    for drafted, accepted, threshold in table:
        control.learn(played(drafted, accepted))
        assert control.threshold == pytest.approx(threshold, abs=1e-12)
    assert control.acceptance == pytest.approx((0.5 + 0.96875) / 2)


def test_draft_verify_hands_its_threshold_on(random_model):
    lm, _ = random_model("llama-gqa", late_scale=0.05)
    strategy = DraftVerify(3, threshold=0.3)
    first = lede_env.generate(lm, [1, 9, 9], strategy=strategy, max_new_tokens=24)
    reached = first.control.threshold
    assert reached != 0.3
    second = lede_env.generate(lm, [1, 17, 40], strategy=strategy, max_new_tokens=24, carry_over=first)
    expected = DraftVerify(3, threshold=reached).start(lm, 0)
    for round_ in second.rounds:
        if not round_.limited:
            expected.learn(round_)
    assert second.control.threshold == expected.threshold
    assert (first.control.threshold, strategy.threshold) == (reached, 0.3)
    assert second.counts.decisions > 0 and second.counts.checks == 0


def test_draft_verify_drafts_up_to_the_improbable_token(script):
    lm, prompt, text = script(wrong=(3,))
    out = lede_env.generate(lm, prompt, strategy=DraftVerify(1, threshold=0.5), max_new_tokens=16)
    assert out.token_ids == text[:16]
    # Right drafts are improbable here, so each is the last of its round; the wrong one, at 3, is not, but the next is.
    assert [len(round_.drafts) for round_ in out.rounds[:4]] == [1, 2, 1, 1]
    out = lede_env.generate(lm, prompt, strategy=DraftVerify(1, threshold=0.3), max_new_tokens=40)
    assert [len(round_.drafts) for round_ in out.rounds[:2]] == [4, 12]  # the draft after a wrong one is improbable


# --- Lite


def test_lite_leaves_where_confidence_exceeds_the_layers_threshold(tiny):
    seen = signals(0.6, 0.4)
    control = Lite({2: 0.5, 3: seen.top1}).start(tiny, 0)
    round_ = Round()
    assert control.path(round_) == (2, 3)
    assert control.leave(seen, round_)
    assert not control.leave(signals(0.49, 0.26, 0.25), round_)
    assert not control.leave(signals(0.6, 0.4, layer=3), round_)  # equal is not more
    assert round_.decisions == 3


def test_lite_drafts_each_token_at_its_own_layer(script):
    lm, prompt, text = script(wrong=(3, 4))
    out = lede_env.generate(lm, prompt, strategy=Lite({1: 0.5, 3: 0.0}), max_new_tokens=40)
    assert out.token_ids == text[:40]
    first, second = out.rounds[:2]
    # Layer 1 is sure of the wrong tokens alone. The fourth draft goes deeper than the third and takes it along.
    assert first.exits[:4] == [3, 3, 1, 3] and first.accepted == 2
    assert (len(first.exits), first.decisions) == (12, 12)
    assert first.checks == first.exits.count(3)
    assert second.exits[:2] == [1, 3] and second.accepted == 0
    assert len(out.rounds[2].drafts) == 12


def test_lite_takes_the_thresholds_stored_with_the_model(tiny, script):
    thresholds = Lite().start(tiny, 0).thresholds
    assert tuple(thresholds) == tiny.candidate_layers
    assert json.loads(STORED.read_text())["model_fingerprint"] == tiny.fingerprint
    for other in (script()[0], replace(tiny, fingerprint="0")):
        with pytest.raises(LedeError, match=f"calibrate_lite --model {other.name}"):
            Lite().start(other, 0)


@pytest.mark.parametrize(
    ("confidence", "agrees", "threshold"),
    [
        ([0.9, 0.2, 0.5, 0.7], [1, 1, 1, 1], 0.0),
        ([0.9, 0.2, 0.5, 0.7], [1, 0, 1, 1], 0.2),
        ([0.9, 0.2, 0.5, 0.7], [1, 1, 0, 1], 0.5),
        ([0.9, 0.2, 0.5, 0.7], [0, 1, 1, 1], 1.0),
        ([0.5, 0.5, 0.5, 0.7], [1, 1, 0, 1], 0.5),  # equals go together
        (np.arange(10) / 10, [1] * 5 + [0] + [1] * 4, 0.0),  # 9 of 10
        (np.arange(10) / 10, [0] * 2 + [1] * 3 + [0] + [1] * 4, 0.5),
    ],
)
def test_the_smallest_threshold_with_enough_agreement(confidence, agrees, threshold):
    assert smallest_threshold(np.array(confidence), np.array(agrees, bool), 0.9) == threshold


def test_calibration_sees_every_token_of_a_text(script):
    lm, prompt, text = script(wrong=(3,))
    confidence, agrees = confidence_and_agreement(lm, prompt, text[:5])
    assert agrees.tolist() == [[True, True, False, True, True]] * 2 + [[True] * 5]
    right, wrong = pytest.approx(0.41, abs=0.01), pytest.approx(1.0, abs=0.01)
    assert confidence[:2].tolist() == [[right, right, wrong, right, right]] * 2
    first = lm.logits(lm.embed(torch.tensor(prompt)))[0].softmax(-1).max()  # layers 1 and 2 pass the embedding on
    assert confidence[0, 0] == confidence[1, 0] == pytest.approx(float(first))


# --- Del


@pytest.mark.parametrize(
    ("rates", "layer"),
    [
        ((0.0, 0.0, 0.0), 1),
        ((1.0, 1.0, 1.0), 1),  # 18 / (4 + 17)
        ((0.0, 1.0, 1.0), 2),  # 1 / 5 against 18 / (4 + 17 * 2)
        ((0.5, 0.7, 0.0), 1),  # 1.5 / 5 = .3 at g = 1; 1.7 / 6 = .283
        ((0.5, 0.8, 0.0), 2),  # 2.44 / 8 = .305 at g = 2
        ((0.2, 0.6, 1.0), 3),  # 1.2 / 5 = .24; 1.6 / 6 = .267; 18 / 55 = .327
        ((0.6, 0.0, 1.0), 3),  # 1.96 / 6 = .32667 at g = 2; 18 / 55 = .32727 at g = 17, .3269 at g = 16
        ((0.602, 0.0, 1.0), 1),  # 1.9644 / 6 = .32740 at g = 2; 18 / 55, and it would be 19 / 58 = .3276 at g = 18
    ],
)
def test_dels_layer_gives_most_tokens_a_layer(rates, layer):
    assert best_layer(np.array(rates)) == layer
    worth = {
        (sum(rate**i for i in range(g + 1)) / (4 + g * at), -at)
        for at, rate in enumerate(rates, 1)
        for g in range(1, 18)
    }
    assert -max(worth)[1] == layer


def test_dels_means_decay():
    tally = Tally(2)
    tally.add(np.array([[True, False], [True, True]]), np.array([[0.8, 0.2], [0.6, 0.4]]))
    assert tally.match_rates().tolist() == [0.5, 1.0]
    assert tally.midpoint(1) == pytest.approx(0.5)  # of .8 and .2
    assert math.isnan(tally.midpoint(2))
    tally.add(np.array([[True], [False]]), np.array([[0.4], [0.3]]))
    assert tally.match_rates() == pytest.approx([1.95 / 2.9, 1.9 / 2.9])
    assert tally.midpoint(1) == pytest.approx(((0.95 * 0.8 + 0.4) / 1.95 + 0.2) / 2)
    assert tally.midpoint(2) == pytest.approx((0.5 + 0.3) / 2)


def test_del_stops_below_the_midpoint(tiny):
    control = Del().start(tiny, 0)
    round_ = Round(drafts=[0], exits=[1])
    assert control.path(round_) == (1,) and control.cap == 18 and control.taps == tuple(range(1, 17))
    assert not control.keep_drafting(signals(0.9, 0.1), round_)  # round 1 drafts one token, whatever it is
    assert round_.decisions == 0
    matched = np.ones((15, 1), bool)
    control.studied = matched, np.full((15, 1), 0.9)
    control.learn(round_)
    assert control.path(round_) == (1,)
    assert control.keep_drafting(signals(0.1, *[0.09] * 10), round_)  # no miss known: nothing stops it
    matched[0] = False
    control.studied = matched, np.full((15, 1), 0.3)
    control.learn(round_)
    # Layer 1 matched .95 of 1.95, layer 2 all: (1 + .487 + .487^2) / (16 + 2) < 18 / (16 + 17 * 2).
    assert control.path(round_) == (2,)
    control.layer = 1
    assert control.keep_drafting(signals(0.61, 0.39), round_)  # the midpoint of .9 and .3 is .6
    assert not control.keep_drafting(signals(0.59, 0.41), round_)
    assert round_.decisions == 3


def test_del_learns_from_every_verified_position(script):
    lm, prompt, text = script(wrong=(5,))
    out = lede_env.generate(lm, prompt, strategy=Del(), max_new_tokens=40)
    assert out.token_ids == text[:40]
    first, second, third = out.rounds[:3]
    assert (first.exits, first.accepted, first.studied) == ([1], 1, 4 * 2)
    # No miss so far, so nothing stops the draft of tokens 3, 4 and the wrong 5 before the cap.
    assert (second.exits, second.accepted, second.studied) == ([1] * 18, 2, 4 * 3)
    # Layer 1 matched 3.9 of 4.9 positions. It missed while sure, so a right draft, which is less so, ends the round.
    assert (third.exits, third.accepted, third.studied) == ([1], 1, 4 * 2)
    missed, matched = np.array([0.0, 0, 0]), np.array([0.0, 0, 0])
    for round_ in out.rounds:
        if not round_.limited:
            misses = np.array([1, 1, 0]) * (round_ is second)
            missed, matched = 0.95 * missed + misses, 0.95 * matched + round_.accepted + 1 - misses
    np.testing.assert_allclose(out.control.tally.counts, [missed, matched])


def test_del_is_warmed_by_the_prompt(script):
    lm, _, text = script(wrong=(38,))
    prompt = [100, *text[:39]]  # its last token is the pending one: 39 positions, of which the last 32 are seen
    out = lede_env.generate(lm, prompt, strategy=Del(), max_new_tokens=1)
    assert out.rounds[0].limited  # teaches nothing
    assert out.control.tally.counts.tolist() == [[1, 1, 0], [31, 31, 32]]
    assert out.control.tally.midpoint(1) == pytest.approx((0.42 + 1.0) / 2, abs=0.02)


# --- all of them

STRATEGIES = [
    FiniteStateMachine(3, 2),
    DraftVerify(3, 0.1),
    Lite({2: 0.3, 3: 0.2, 5: 0.0}),
    Del(),
]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_rounds_do_not_depend_on_the_batch(random_model, strategy, temperature):
    lm, _ = random_model("llama-gqa", late_scale=0.05)
    prompts = [[1, 17, 40, 5, 23], [1], [1, *range(4, 44)], [1, 9]]
    options = dict(strategy=strategy, max_new_tokens=32, temperature=temperature)
    batch = lede_env.generate(lm, prompts, seed=3, **options)
    for prompt, out in zip(prompts, batch, strict=True):
        alone = lede_env.generate(lm, prompt, seed=out.seed, **options)
        assert (alone.token_ids, alone.rounds) == (out.token_ids, out.rounds)
    assert len({str(out.rounds) for out in batch}) == len(prompts)
    counts = batch[0].counts
    assert 0 < counts.accepted <= counts.drafted and counts.emitted == len(batch[0].token_ids)
    assert (counts.decisions > 0) == (not isinstance(strategy, FiniteStateMachine))
    assert (counts.checks > 0) == isinstance(strategy, Lite)
    assert (sum(round_.studied for round_ in batch[0].rounds) > 0) == isinstance(strategy, Del)


@pytest.mark.parametrize("strategy", [FiniteStateMachine(4), DraftVerify(3), Lite(), Del()], ids=repr)
def test_texts_do_not_depend_on_the_batch_in_float32(tiny, strategy):
    prompts = [tiny.encode(prompt.text) for prompt in lede_env.load_prompts("all", "test")[:30:10]]
    batch = lede_env.generate(tiny, prompts, strategy=strategy, max_new_tokens=24)
    for prompt, out in zip(prompts, batch, strict=True):
        assert lede_env.generate(tiny, prompt, strategy=strategy, max_new_tokens=24).token_ids == out.token_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteStateMachine(3, 0), "speculation=0"),
        (lambda: FiniteStateMachine(3, 13), "speculation=13"),
        (lambda: DraftVerify(3, 1.5), r"threshold=1.5 .* \[0, 1\]"),
        (lambda: Lite({}), "empty"),
        (lambda: Lite({3: -0.1}), "-0.1 at layer 3"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(LedeError, match=message):
        make()


@pytest.mark.parametrize("strategy", [FiniteStateMachine(16), DraftVerify(16), Lite({3: 0.5, 16: 0.5})], ids=repr)
def test_layers_the_model_has_not_are_refused(tiny, strategy):
    with pytest.raises(LedeError, match="exit layer 16 is out of range"):
        strategy.start(tiny, 0)


def test_strategies_on_the_command_line():
    assert parse_strategy("fsm:4") == FiniteStateMachine(4)
    assert parse_strategy("fsm:4,6") == FiniteStateMachine(4, 6)
    assert parse_strategy("draft_verify:3") == DraftVerify(3)
    assert parse_strategy("lite") == Lite()
    assert parse_strategy("del") == Del()
    with pytest.raises(LedeError, match=r"lacks exit_layer; write it as 'fsm:EXIT_LAYER,\[speculation=N\]'"):
        parse_strategy("fsm")


def test_the_guides_example_works(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) < 40
    exec(compile(code, str(GUIDE), "exec"), {"__name__": "guide"})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["lede", "patient"]
