"""The control benchmark: its replay plays LEDE's rounds, so that what lies between their times is control."""

from __future__ import annotations

import pytest

import lede_env
from benchmarks.engine_control import Recorded, Replayed, same_rounds
from lede_env.tasks import load_prompts


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_replay_plays_the_rounds_of_lede(tiny, temperature):
    given_up = 0
    for place, prompt in enumerate(load_prompts("all", "test")[::40]):
        options = dict(max_new_tokens=40, temperature=temperature, seed=place)
        record = lede_env.generate(tiny, prompt.text, strategy=Recorded(lede_env.Lede()), **options)
        assert record.token_ids == lede_env.generate(tiny, prompt.text, strategy=lede_env.Lede(), **options).token_ids
        replay = lede_env.generate(tiny, prompt.text, strategy=Replayed(record.control.plans), **options)
        assert same_rounds(record, replay)
        assert record.counts.decisions > 0 == replay.counts.decisions
        given_up += sum(not plan.bonus for plan in record.control.plans)
    assert given_up  # rounds without a bonus token are among them
