"""Rounds that give up their bonus token: the last draft is verified without running through the layers itself."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from benchmarks.sampling_check import PROMPT, HeadPolicy, small_model
from lede_env import Autoregressive, Lede, LedeError, generate, load_policy, load_prompts
from lede_env.engine.acceptance import greedy_match, speculative_matches
from lede_env.engine.cost_model import load_cost_model
from lede_env.engine.round import Round
from lede_env.oracles import tabulate
from lede_env.policies import EpsilonGreedy
from lede_env.registration import extended_for, pinned

ENV_ID = "LEDE-Tiny-Draft-v0"


def strategy(bonus_from: float) -> Lede:
    return Lede(replace(load_policy("tiny-head"), bonus_from=bonus_from))


@pytest.fixture(scope="module")
def prompts():
    return [prompt.text for prompt in load_prompts("all", "validation")[::12]]


@pytest.mark.parametrize("bonus_from", [0.3, 1.0])
def test_greedy_text_is_the_models(tiny, prompts, bonus_from):
    whole = []
    for prompt in prompts:
        mine = generate(tiny, prompt, strategy=strategy(bonus_from), max_new_tokens=40)
        assert mine.token_ids == generate(tiny, prompt, strategy=Autoregressive(), max_new_tokens=40).token_ids
        assert sum(len(round_.emitted) for round_ in mine.rounds) == len(mine.token_ids) <= 40
        whole += [round_.accepted == len(round_.drafts) for round_ in mine.rounds if not round_.bonus]
    assert any(whole) and not all(whole)  # both ways to end such a round were played


def test_without_one_accepted_drafts_are_all_there_is(tiny, prompts):
    for prompt in prompts:
        for round_ in generate(tiny, prompt, strategy=strategy(1.0), max_new_tokens=40, temperature=0.6).rounds:
            if round_.emitted[-1] not in tiny.eos_ids:
                whole = round_.accepted == len(round_.drafts)
                assert len(round_.emitted) == round_.accepted + (round_.bonus or not whole)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_batch_changes_nothing(tiny, prompts, temperature):
    """Rows that give it up beside rows that do not: their slots differ in number."""
    options = dict(strategy=strategy(0.4), max_new_tokens=30, temperature=temperature)
    together = generate(tiny, prompts, **options)
    for prompt, row in zip(prompts, together, strict=True):
        alone = generate(tiny, prompt, seed=row.seed, **options)
        assert alone.token_ids == row.token_ids
        assert [round_.bonus for round_ in alone.rounds] == [round_.bonus for round_ in row.rounds]
    assert {round_.bonus for row in together for round_ in row.rounds} == {True, False}


def test_the_check_of_sampled_distributions_has_such_rounds():
    lm, _ = small_model()
    found = generate(lm, [list(PROMPT)] * 8, strategy=Lede(HeadPolicy()), max_new_tokens=16, temperature=0.6)
    rounds = [round_ for out in found for round_ in out.rounds if not round_.bonus]
    assert {round_.accepted == len(round_.drafts) for round_ in rounds} == {True, False}


def test_verdicts_by_hand():
    assert greedy_match([5, 7], [5, 7]) == (2, None)
    assert greedy_match([5, 7], [5, 8]) == (1, 8)
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.0, 1.0]])
    q = [[torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]]
    drafts, bonus = [[0], [0, 1]], [False, False]
    # Row 0: 0.4 * 1 < 0.5. Row 1: 0.1 * 1 < 0.25, then 0.9 * 1 >= 0, and max(p - q, 0) is token 0 alone.
    found = speculative_matches(drafts, p[:3], q, [[0.4], [0.1, 0.9]], [0.5, 0.5], bonus)
    assert found == [(1, None), (1, 0)]
    assert speculative_matches(drafts, p, q, [[0.4], [0.1, 0.9]], [0.9, 0.5], [True, False]) == [(1, 1), (2, None)]


def test_what_it_costs():
    costs = load_cost_model("tiny-at-7b-h200")
    for layer, drafts in ((3, 1), (4, 5)):
        round_ = Round(drafts=[1] * drafts, exits=[layer] * drafts, bonus=False)
        assert costs.of(round_) == pytest.approx(costs.round(layer, drafts, 0, 0, bonus=False))
        assert (
            costs.of(round_) < costs.of(replace(round_, bonus=True)) == pytest.approx(costs.round(layer, drafts, 0, 0))
        )
        assert round_.layer_calls(16) == 16 + layer * (drafts - 1)


@pytest.mark.parametrize("bonus_from", [0.3, 0.6])
def test_the_table_plays_what_the_decoder_does(tiny, bonus_from):
    """Greedily the trace replays the decoder exactly: round for round, and what all of them cost."""
    policy = replace(load_policy("tiny-head"), bonus_from=bonus_from)
    features = extended_for(ENV_ID, policy.features)
    env = gym.make(ENV_ID, split="validation", backend="trace", features=features, reward="throughput").unwrapped
    costs = load_cost_model(pinned(ENV_ID).cost_model)
    table = tabulate(env).without_bonus(bonus_from, costs)
    totals = table.play(table.decisions(policy))
    texts = {prompt.id: prompt.text for prompt in load_prompts("all", "validation")}
    for index in range(0, len(env.prompt_ids), 17):
        out = generate(
            tiny, texts[env.prompt_ids[index]], strategy=Lede(policy), max_new_tokens=pinned(ENV_ID).max_new_tokens
        )
        played = {name: round(float(totals[name][index])) for name in ("rounds", "drafted", "accepted", "emitted")}
        assert played == {name: getattr(out.counts, name) for name in played}
        assert totals["cost"][index] == pytest.approx(sum(costs.of(round_) for round_ in out.rounds))
        assert not all(round_.bonus for round_ in out.rounds)


def test_a_text_that_ends_within_a_round():
    """What a cut leaves went through the layers; a round that an EOS ends as the corrected token of its last draft did
    not."""
    cut = Round(drafts=[4, 5, 6], exits=[3, 3, 3], bonus=False)
    assert cut.settle(1, 2, eos_ids=(2,)) and (cut.emitted, cut.drafts, cut.bonus) == ([4, 2], [4, 5], True)
    last = Round(drafts=[4, 5], exits=[3, 3], bonus=False)
    assert last.settle(1, 2, eos_ids=(2,)) and (last.drafts, last.bonus) == ([4, 5], False)
    assert last.layer_calls(16) == 16 + 3


class Sure:
    """A user's own policy."""

    features = ("phase",)
    bonus_from: object = 0.3

    def exit_probability(self, observations):
        return np.zeros(len(observations))


def test_a_policy_that_cannot_tell_is_refused(tiny):
    with pytest.raises(LedeError, match=r"feature 'risk', which features=\('phase',\) lack"):
        generate(tiny, "a", strategy=Lede(Sure()), max_new_tokens=4)
    for wrong in ("0.3", None, 2.0):
        policy = Sure()
        policy.bonus_from = wrong
        with pytest.raises(LedeError, match="bonus_from"):
            generate(tiny, "a", strategy=Lede(policy), max_new_tokens=4)
    assert EpsilonGreedy(load_policy("tiny-head"), 0.1).bonus_from == 0.3


def test_policy_files_keep_it(tmp_path):
    policy = replace(load_policy("tiny"), features=("risk", *load_policy("tiny").features[1:]), bonus_from=0.25)
    assert load_policy(policy.save(tmp_path)).bonus_from == 0.25
    card = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps({**card, "bonus_from": 1.5}))
    with pytest.raises(LedeError, match=r"bonus_from=1\.5 is a probability"):
        load_policy(tmp_path)
    with pytest.raises(LedeError, match="the feature 'risk'"):
        replace(load_policy("tiny"), bonus_from=0.25)
    assert "bonus_from" not in load_policy("tiny").card() and load_policy("tiny-head").bonus_from == 0.3
