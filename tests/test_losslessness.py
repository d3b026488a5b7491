"""Every strategy's greedy text equals transformers' greedy text, token for token.

A difference counts only where the reference's two largest logits are further apart than `TIE`: below that, the order
of floating-point additions decides. Such ties end the comparison of their text; they are counted and printed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lede_env
from lede_env.decoding.strategies import (
    STRATEGIES,
    Autoregressive,
    Del,
    DraftVerify,
    FiniteStateMachine,
    LayerSkip,
    Lede,
    Lite,
    Strategy,
)
from lede_env.engine.signals import DRAFT_FEATURES
from lede_env.models.loading import EMBEDDED
from lede_env.tasks import TASKS
from tests.small_models import ARCHITECTURES, CoinPolicy, untrained_policy

TIE = 1e-4
# What is tested of each strategy: instances on the embedded model; on random models an instance that a random.Random
# draws. A new strategy needs a row in both.
ON_EMBEDDED = {
    "autoregressive": lambda lm: [Autoregressive()],
    "layerskip": lambda lm: [LayerSkip(4, 5)],
    "fsm": lambda lm: [FiniteStateMachine(4)],
    "draft_verify": lambda lm: [DraftVerify(3)],
    "lite": lambda lm: [Lite({3: 0.8, 4: 0.7, 6: 0.6, 8: 0.0})],
    "del": lambda lm: [Del()],
    "lede": lambda lm: [Lede(), Lede(CoinPolicy(0, p=0.7)), Lede(untrained_policy(lm))],
}
ON_RANDOM = {
    "autoregressive": lambda lm, rng: Autoregressive(),
    "layerskip": lambda lm, rng: LayerSkip(rng.randrange(1, lm.n_layers), rng.randint(1, 12)),
    "fsm": lambda lm, rng: FiniteStateMachine(rng.randrange(1, lm.n_layers), rng.randint(1, 12)),
    "draft_verify": lambda lm, rng: DraftVerify(rng.randrange(1, lm.n_layers), rng.random()),
    "lite": lambda lm, rng: Lite({layer: rng.random() for layer in rng.sample(range(1, lm.n_layers), 3)}),
    "del": lambda lm, rng: Del(),
    "lede": lambda lm, rng: Lede(
        rng.choice([CoinPolicy(rng.randrange(99), rng.random()), untrained_policy(lm, rng.randrange(99))])
    ),
}
RANDOM_PROMPTS = [[1, 17, 40, 5, 23], [1], [1, 4, 4, 4, 30, 31, 32, 33, 34, 90, 60, 12]]
RANDOM_TOKENS = 40


@dataclass(frozen=True)
class Reference:
    """transformers' greedy continuation of one prompt: new tokens, and the top-two margin of the logits at each."""

    ids: list[int]
    margins: list[float]


def greedy_references(model, prompts, new_tokens):
    """One `generate` call for all prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    top = torch.stack(out.logits, dim=1).topk(2, dim=-1).values  # (prompts, T, 2)
    eos = model.generation_config.eos_token_id
    references = []
    for row, margins in zip(out.sequences[:, width:].tolist(), (top[..., 0] - top[..., 1]).tolist(), strict=True):
        length = row.index(eos) + 1 if eos in row else len(row)
        references.append(Reference(row[:length], margins[:length]))
    return references


def is_tie(ids, reference):
    """False when the tokens equal the reference's, True when they part at a tie; anything else fails."""
    for at, expected in enumerate(reference.ids):
        if at >= len(ids) or ids[at] != expected:
            assert reference.margins[at] <= TIE, f"token {at}: {ids[at : at + 3]} for {expected}, no tie"
            return True
    assert len(ids) == len(reference.ids)
    return False


def row_of(table, name):
    if name not in table:
        pytest.fail(f"strategy {name!r} is registered but not tested: add it to the two tables of {__file__}")
    return table[name]


@pytest.fixture(scope="module")
def embedded_model():
    """The embedded model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def embedded_references(tiny, embedded_model):
    """24 test prompts, the tasks in turn, as token ids; and their continuations by 96 tokens."""
    tasks = [lede_env.load_prompts(task, "test") for task in TASKS]
    ids = [tiny.encode(prompt.text) for prompts in zip(*tasks, strict=False) for prompt in prompts][:24]
    return ids, greedy_references(embedded_model, ids, 96)


@pytest.mark.parametrize("name", STRATEGIES)
def test_embedded_model_equals_transformers(tiny, embedded_references, name):
    prompts, references = embedded_references
    ties = 0
    for strategy in row_of(ON_EMBEDDED, name)(tiny):
        alone = lede_env.generate(tiny, prompts[0], strategy=strategy, max_new_tokens=96)
        outs = [alone, *lede_env.generate(tiny, prompts[1:], strategy=strategy, max_new_tokens=96)]
        ties += sum(is_tie(out.token_ids, reference) for out, reference in zip(outs, references, strict=True))
        if isinstance(strategy, Lite) or (isinstance(strategy, Lede) and isinstance(strategy.policy, CoinPolicy)):
            exits = {layer for out in outs for round_ in out.rounds for layer in round_.exits}
            assert exits == set(tiny.candidate_layers)  # the comparison saw every exit
    print(f"{name}: {ties} texts parted from transformers' at a near-tie")


def cut_reference(reference, length):
    return Reference(reference.ids[:length], reference.margins[:length])


@pytest.mark.parametrize("name", STRATEGIES)
def test_texts_end_at_an_eos_and_at_stop_strings(tiny, embedded_references, name):
    """In a batch whose rows end at different places, within a draft or at its end."""
    prompts, references = (part[:3] for part in embedded_references)
    expected = [cut_reference(reference, 40) for reference in references]
    strategy = row_of(ON_EMBEDDED, name)(tiny)[-1]
    options = dict(strategy=strategy, max_new_tokens=40)

    eos = expected[0].ids[25]  # a drafted token of the first text; the others may hold it too
    outs = lede_env.generate(replace(tiny, eos_ids=(*tiny.eos_ids, eos)), prompts, **options)
    for out, reference in zip(outs, expected, strict=True):
        ends = reference.ids.index(eos) + 1 if eos in reference.ids else 40
        if not is_tie(out.token_ids, cut_reference(reference, ends)):
            assert out.finish_reason == ("eos" if eos in reference.ids else "length")

    for out_of in (0, 1):
        text = tiny.decode(expected[out_of].ids)
        stop = text[len(text) // 2 :][:9]  # spans tokens
        outs = lede_env.generate(tiny, prompts, stop=stop, **options)
        for out, reference in zip(outs, expected, strict=True):
            ends = next((n for n in range(41) if stop in tiny.decode(reference.ids[:n])), 40)
            if not is_tie(out.token_ids, cut_reference(reference, ends)):
                assert out.text == tiny.decode(reference.ids).split(stop)[0]
                assert out.finish_reason == ("stop" if stop in tiny.decode(reference.ids) else "length")


def test_a_prompt_of_several_prefill_chunks(tiny, embedded_model):
    prompt = tiny.encode("\n\n".join(prompt.text for prompt in lede_env.load_prompts("all", "validation")))[:1100]
    (reference,) = greedy_references(embedded_model, [prompt], 12)
    batch = lede_env.generate(tiny, [prompt, prompt[:7]], strategy=LayerSkip(4, 5), max_new_tokens=12)
    alone = lede_env.generate(tiny, prompt, strategy=LayerSkip(4, 5), max_new_tokens=12)
    ties = is_tie(alone.token_ids, reference), is_tie(batch[0].token_ids, reference)
    print(f"long prompt: {sum(ties)} texts parted at a near-tie")


@pytest.fixture(scope="module")
def random_references(random_model):
    """(architecture, late_scale) -> the model and the continuations of RANDOM_PROMPTS, computed when asked for."""

    @cache
    def make(architecture, late_scale):
        lm, model = random_model(architecture, late_scale=late_scale)
        return lm, greedy_references(model, RANDOM_PROMPTS, RANDOM_TOKENS)

    return make


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("late_scale", [1.0, 0.05])  # 0.05: most drafts are right, so whole rounds get accepted
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_models_equal_transformers(random_references, architecture, late_scale, name):
    lm, references = random_references(architecture, late_scale)
    draw, ties = row_of(ON_RANDOM, name), []

    @settings(max_examples=2 if name == "autoregressive" else 4, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32), st.integers(0, len(RANDOM_PROMPTS) - 1), st.integers(1, RANDOM_TOKENS))
    def equals(seed, at, new_tokens):
        out = lede_env.generate(
            lm, RANDOM_PROMPTS[at], strategy=draw(lm, random.Random(seed)), max_new_tokens=new_tokens
        )
        expected = references[at]
        ties.append(is_tie(out.token_ids, cut_reference(expected, new_tokens)))

    equals()
    print(f"{architecture}, {late_scale}, {name}: {sum(ties)} of {len(ties)} texts parted at a near-tie")


@pytest.mark.parametrize("exit_layer", range(1, 6))
def test_every_exit_layer_and_every_outcome_of_a_round(random_references, exit_layer):
    lm, references = random_references("llama-gqa", 0.05)
    outcomes: Counter[str] = Counter()
    for speculation in (1, 2, 5, 12):
        for prompt, reference in zip(RANDOM_PROMPTS, references, strict=True):
            strategy = LayerSkip(exit_layer, speculation)
            out = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=RANDOM_TOKENS)
            assert not is_tie(out.token_ids, reference)
            for round_ in out.rounds:
                whole, drafted = round_.accepted == len(round_.drafts), len(round_.drafts)
                outcomes["plain" if not drafted else "all" if whole else "some" if round_.accepted else "none"] += 1
                assert round_.exits == [exit_layer] * drafted
    print(f"exit layer {exit_layer}: {dict(outcomes)}")
    expected = {"none"} if exit_layer == 1 else {"all", "some"}
    assert expected <= set(outcomes)


def test_outcomes_of_lede_cover_every_path(random_references):
    lm, references = random_references("llama", 0.05)
    outcomes = set()
    for seed in range(6):
        for prompt, reference in zip(RANDOM_PROMPTS, references, strict=True):
            out = lede_env.generate(lm, prompt, strategy=Lede(CoinPolicy(seed, 0.7)), max_new_tokens=RANDOM_TOKENS)
            assert not is_tie(out.token_ids, reference)
            for round_ in out.rounds:
                rejected = len(round_.drafts) - round_.accepted
                outcomes.add((bool(round_.accepted), bool(rejected)))
    assert outcomes >= {(True, False), (True, True), (False, True)}


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", rope_theta=1e4, factor=2.0),
        dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64),
    ],
    ids=["linear", "yarn"],
)
def test_other_rotary_embeddings(random_model, rope):
    lm, model = random_model("llama-gqa", rope_parameters=rope)
    for prompt, reference in zip(RANDOM_PROMPTS, greedy_references(model, RANDOM_PROMPTS, 24), strict=True):
        out = lede_env.generate(lm, prompt, strategy=LayerSkip(3, 4), max_new_tokens=24)
        assert not is_tie(out.token_ids, reference)


class OneEach(Strategy):
    """Row b of a batch runs the b-th of these strategies."""

    name = "one-each"
    reads = DRAFT_FEATURES

    def __init__(self, *strategies):
        self.waiting = list(strategies)

    def start(self, lm, seed):
        return self.waiting.pop(0).start(lm, seed)


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen2"])
@pytest.mark.parametrize("late_scale", [1.0, 0.05])
def test_a_batch_of_strategies_equals_each_alone(random_references, architecture, late_scale):
    lm, references = random_references(architecture, late_scale)
    prompts, expected = RANDOM_PROMPTS * 3, references * 3
    strategies = [
        Del(),  # first: the session keeps the states that its first row asks for
        Lede(CoinPolicy(1)),
        Autoregressive(),
        LayerSkip(5, 12),
        Lede(untrained_policy(lm)),
        Lite({2: 0.4, 3: 0.3, 5: 0.0}),
        LayerSkip(2, 5),
        FiniteStateMachine(2),
        DraftVerify(3, 0.2),
    ]
    batch = lede_env.generate(lm, prompts, strategy=OneEach(*strategies), max_new_tokens=RANDOM_TOKENS)
    assert not any(is_tie(out.token_ids, reference) for out, reference in zip(batch, expected, strict=True))
    strategies[1] = Lede(CoinPolicy(1))  # a fresh coin
    for prompt, strategy, out in zip(prompts, strategies, batch, strict=True):
        alone = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=RANDOM_TOKENS)
        assert (alone.token_ids, alone.rounds) == (out.token_ids, out.rounds)
