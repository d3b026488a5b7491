"""generate and stream: where text ends, what is counted, what a stream shows, what the seed fixes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lede_env
from lede_env.decoding.strategies import Autoregressive, LayerSkip, Lede
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.decoding.text import TextStream
from lede_env.errors import LedeError
from tests.small_models import CoinPolicy, scripted_model

# No token of these comes twice, as a script needs (tests/small_models.py).
TEXT = "def area(width, height): return 7\nEND of the story; nobody knows why"
UNICODE = "so🦊 and漢é"
FIXED = [Autoregressive(), LayerSkip(1, 4), LayerSkip(2, 12), LayerSkip(3, 1)]


def tokens_of(lm, text):
    return lm.tokenizer.encode(text, add_special_tokens=False)


def script(lm, text, wrong=()):
    """A model that writes `text` after its prompt [id], and the ids it writes."""
    ids = tokens_of(lm, text)
    first = next(token for token in range(100, 200) if token not in ids)
    return scripted_model(lm, [first, *ids], wrong), [first], ids


@pytest.fixture(scope="module")
def written(tiny):
    """TEXT's model, whose layers 1 and 2 draft tokens 4, 9 and 10 wrongly; the prompt; the ids of TEXT."""
    return script(tiny, TEXT, wrong=(4, 9, 10))


# --- where text ends


@pytest.mark.parametrize("strategy", FIXED, ids=repr)
@pytest.mark.parametrize("several", [False, True])
def test_eos_ends_the_text_wherever_it_falls(written, strategy, several):
    lm, prompt, ids = written
    for at, eos in enumerate(ids):
        ending = replace(lm, eos_ids=(5, eos) if several else (eos,))
        out = lede_env.generate(ending, prompt, strategy=strategy, max_new_tokens=60)
        assert (out.token_ids, out.finish_reason) == (ids[: at + 1], "eos")
        assert out.counts.emitted == out.metrics.tokens == at + 1
        assert sum(len(round_.emitted) for round_ in out.rounds) == at + 1
        assert all(eos not in round_.drafts[:-1] for round_ in out.rounds)  # nothing is drafted after an EOS


def test_rounds_of_a_script_are_as_laid_out(written):
    lm, prompt, ids = written
    out = lede_env.generate(lm, prompt, strategy=LayerSkip(2, 5), max_new_tokens=16)
    # Drafts 4, 9 and 10 are wrong: 1-3 accepted, 4 corrected; 5-8, 9; none, 10; then all 5 and a bonus.
    assert [round_.accepted for round_ in out.rounds] == [3, 4, 0, 5]
    assert [len(round_.drafts) for round_ in out.rounds] == [5, 5, 5, 5]
    assert [round_.emitted for round_ in out.rounds] == [ids[:4], ids[4:9], ids[9:10], ids[10:16]]
    assert [round_.layer_calls(4) for round_ in out.rounds] == [14] * 4
    metrics = out.metrics
    assert (metrics.E, metrics.d, metrics.acceptance, metrics.tokens_per_round) == (2.0, 5.0, 12 / 20, 4.0)
    deep = lede_env.generate(lm, prompt, strategy=LayerSkip(3, 5), max_new_tokens=16)
    assert [round_.accepted for round_ in deep.rounds] == [5, 5, 3]


def test_a_drafted_eos_ends_drafting_and_if_wrong_not_the_text(written):
    lm, prompt, ids = written
    plain = lede_env.generate(lm, prompt, strategy=LayerSkip(2, 5), max_new_tokens=16)
    wrong = plain.rounds[0].drafts[3]
    ending = replace(lm, eos_ids=(wrong,))
    out = lede_env.generate(ending, prompt, strategy=LayerSkip(2, 5), max_new_tokens=16)
    assert (out.token_ids, out.finish_reason) == (ids[:16], "length")
    assert out.rounds[0].drafts == [*ids[:3], wrong]
    assert (out.rounds[0].accepted, out.rounds[0].emitted) == (3, ids[:4])


class DictatedPolicy:
    """Takes its decisions from a list and keeps what it saw."""

    features = ("layer", "phase", "position")

    def __init__(self, decisions):
        self.decisions, self.seen = iter(decisions), []

    def exit_probability(self, observations):
        self.seen.append(tuple(observations[0].tolist()))
        return np.array([next(self.decisions)], float)


def test_ledes_dual_control_follows_the_table(tiny):
    """Phase 1 walks candidates 1, 2, 3 until it exits; phase 2 drafts on until it continues (paper section 3.3)."""
    lm, prompt, ids = script(tiny, TEXT)
    policy = DictatedPolicy([0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1])
    out = lede_env.generate(lm, prompt, strategy=Lede(policy), max_new_tokens=4 + 2 + 3 + 5)
    assert out.token_ids == ids[:14]
    # Exit at 2, two more drafts; no exit, so one draft at 3; exit at the last candidate, one more; the budget's 4.
    assert [round_.exits for round_ in out.rounds] == [[2, 2, 2], [3], [3, 3], [1, 1, 1, 1]]
    assert [round_.checks for round_ in out.rounds] == [1, 2, 2, 0]
    assert [round_.decisions for round_ in out.rounds] == [4, 3, 4, 3]
    assert [round_.limited for round_ in out.rounds] == [False, False, False, True]
    expected = [(1, 1, 0), (2, 1, 0), (2, 2, 1), (2, 2, 2)]
    expected += [(1, 1, 0), (2, 1, 0), (3, 1, 0)]
    expected += [(1, 1, 0), (2, 1, 0), (3, 1, 0), (3, 2, 1)]
    expected += [(1, 1, 0), (1, 2, 1), (1, 2, 2)]  # at the limit nothing is asked
    seen = [(layer * 4, phase, round(position * 12)) for layer, phase, position in policy.seen]
    assert seen == expected


@pytest.mark.parametrize("strategy", FIXED, ids=repr)
def test_stop_strings_end_the_text_where_they_begin(written, strategy):
    lm, prompt, ids = written
    for begin in range(0, len(TEXT) - 8, 3):
        for length in (1, 2, 7):
            stop = TEXT[begin : begin + length]
            out = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=len(ids), stop=stop)
            assert (out.text, out.finish_reason) == (TEXT[: TEXT.find(stop)], "stop")
            # The tokens are those up to the one that completes the stop string.
            kept = next(n for n in range(len(ids) + 1) if stop in lm.decode(ids[:n]))
            assert out.token_ids == ids[:kept]
            assert out.counts.emitted == out.metrics.tokens == kept
            last = out.rounds[-1]
            assert len(last.drafts) <= len(last.emitted) >= last.accepted


def test_the_first_of_several_stop_strings_wins(written):
    lm, prompt, ids = written
    stops = ["of the story", "height", "END of", "never"]
    out = lede_env.generate(lm, prompt, strategy=LayerSkip(2, 12), max_new_tokens=len(ids), stop=stops)
    assert (out.text, out.finish_reason) == (TEXT[: TEXT.find("height")], "stop")
    out = lede_env.generate(lm, prompt, strategy=LayerSkip(2, 12), max_new_tokens=len(ids), stop=["never"])
    assert (out.text, out.finish_reason) == (TEXT, "length")


def test_an_eos_after_a_stop_string_does_not_count(written):
    lm, prompt, ids = written
    ending = replace(lm, eos_ids=(ids[-1],))
    out = lede_env.generate(ending, prompt, strategy=LayerSkip(3, 12), max_new_tokens=60, stop="nobody")
    assert (out.text, out.finish_reason) == (TEXT[: TEXT.find("nobody")], "stop")


@pytest.mark.parametrize("strategy", FIXED, ids=repr)
@pytest.mark.parametrize("budget", [1, 2, 3, 13])
def test_max_new_tokens_is_met_and_never_exceeded(written, strategy, budget):
    lm, prompt, ids = written
    out = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=budget)
    assert (out.token_ids, out.finish_reason) == (ids[:budget], "length")


@pytest.mark.parametrize("strategy", FIXED, ids=repr)
@pytest.mark.parametrize("context", [2, 3, 9, 14])
def test_a_text_that_fills_the_context_says_so(written, strategy, context):
    lm, prompt, ids = written
    short = replace(lm, geometry=replace(lm.geometry, context=context))
    out = lede_env.generate(short, prompt, strategy=strategy, max_new_tokens=60)
    assert (out.token_ids, out.finish_reason) == (ids[: context - 1], "context")


class _Wants(Control):
    """Drafts `wanted` tokens at layer 2, under its own cap."""

    def __init__(self, wanted, cap):
        self.wanted, self.cap, self.learned = wanted, cap, []

    def path(self, round_):
        return (2,)

    def keep_drafting(self, signals, round_):
        assert signals.position == len(round_.drafts) - 1
        return len(round_.drafts) < self.wanted

    def learn(self, round_):
        self.learned.append(round_)


class Wants(Strategy):
    name = "wants"

    def __init__(self, wanted, cap):
        self.control = _Wants(wanted, cap)

    def start(self, lm, seed):
        return self.control


@pytest.mark.parametrize("wanted", [1, 4, 18])
@pytest.mark.parametrize("cap", [1, 3, 12, 18])
@pytest.mark.parametrize("budget", [1, 2, 7, 20])
def test_drafts_are_the_least_of_what_is_wanted_the_cap_and_tokens_left_less_one(written, wanted, cap, budget):
    lm, prompt, ids = written
    strategy = Wants(wanted, cap)
    out = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=budget)
    assert out.token_ids == ids[:budget]
    left = budget
    for round_ in out.rounds:
        assert len(round_.drafts) == min(wanted, cap, left - 1)
        left -= len(round_.emitted)
    # A round that the budget cut short teaches the strategy nothing.
    assert strategy.control.learned == [round_ for round_ in out.rounds if not round_.limited]
    assert all(len(round_.drafts) == min(wanted, cap) for round_ in strategy.control.learned)


# --- what a stream shows


@pytest.mark.parametrize("strategy", [*FIXED, Lede(CoinPolicy(3))], ids=repr)
@pytest.mark.parametrize("stop", [(), "nobody knows", ("7\nEND", "zzz"), "why not"])
def test_stream_pieces_join_to_the_text_of_generate(written, strategy, stop):
    lm, prompt, ids = written
    whole = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=len(ids), stop=stop)
    pieces = list(lede_env.stream(lm, prompt, strategy=strategy, max_new_tokens=len(ids), stop=stop))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].round is None
    assert [token for piece in pieces[:-1] for token in piece.round.emitted] == whole.token_ids


def test_stream_holds_back_what_may_become_a_stop_string(written):
    lm, prompt, ids = written
    shown = ""
    for piece in lede_env.stream(lm, prompt, max_new_tokens=len(ids), stop="return 8"):
        shown += piece.text
        assert not any(shown.endswith("return 8"[:length]) for length in range(1, 8)) or piece.round is None
    assert shown == TEXT


def test_stream_shows_no_partial_characters(tiny):
    lm, prompt, ids = script(tiny, UNICODE)
    assert len(ids) > len(UNICODE) - 3  # some characters take several tokens
    pieces = [piece.text for piece in lede_env.stream(lm, prompt, max_new_tokens=len(ids))]
    assert "".join(pieces) == UNICODE
    assert "" in pieces[:-1] and not any("\ufffd" in piece for piece in pieces)
    # Cut inside a character, a text ends in the replacement character, as decoding all of it at once gives.
    cut = next(n for n in range(len(ids)) if lm.decode(ids[:n]).endswith("\ufffd"))
    whole = lede_env.generate(lm, prompt, max_new_tokens=cut)
    pieces = [piece.text for piece in lede_env.stream(lm, prompt, max_new_tokens=cut)]
    assert "".join(pieces) == whole.text == lm.decode(ids[:cut])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    text=st.text(alphabet=st.sampled_from("aé漢🦊👩\u200d\ufffd \n"), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 4), max_size=30),
    data=st.data(),
)
def test_text_stream_finds_every_stop_string(tiny, text, cuts, data):
    ids = tokens_of(tiny, text)
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.sampled_from([(), (text[begin : begin + 3],), ("🦊🦊", "é ", "zz")]))
    assume("\ufffd" not in "".join(stop))  # what stands for broken bytes is no stop string
    stream, shown, place = TextStream(tiny, stop), "", 0
    for length in [*cuts, *[1] * len(ids)]:
        stream.push(ids[place : place + length])
        place += length
        if stream.stopped:
            break
        shown += stream.take()
    shown += stream.take(last=True)
    ends = [at for string in stop if (at := text.find(string)) >= 0]
    assert shown == stream.text == text[: min(ends, default=None)]
    assert stream.stopped == bool(ends)


def test_streams_may_interleave_and_leave_no_trace_in_the_callers_thread(written):
    lm, prompt, ids = written
    one, other = (lede_env.stream(lm, prompt, strategy=LayerSkip(2, 3), max_new_tokens=12) for _ in range(2))
    shown = next(one).text
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad
    first = next(other).text
    shown += "".join(piece.text for piece in one)
    assert first + "".join(piece.text for piece in other) == shown == lm.decode(ids[:12])
    unfinished = lede_env.stream(lm, prompt, max_new_tokens=12)
    next(unfinished)
    unfinished.close()
    assert not torch.is_inference_mode_enabled()


# --- prompts


def test_chat_messages_go_through_the_models_template(tiny):
    messages = [{"role": "user", "content": "Sort a list."}]
    out = lede_env.generate(tiny, messages, strategy=LayerSkip(4, 3), max_new_tokens=4)
    text = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("### Response:\n") and "Sort a list." in text
    assert out.prompt_ids == tokens_of(tiny, text)


def test_a_text_its_ids_and_a_batch_of_both_agree(tiny):
    text = "def mean(values):"
    messages = [{"role": "user", "content": "Say hello."}]
    strategy = LayerSkip(4, 4)
    alone = [lede_env.generate(tiny, prompt, strategy=strategy, max_new_tokens=10) for prompt in (text, messages)]
    batch = lede_env.generate(tiny, [text, tiny.encode(text), messages], strategy=strategy, max_new_tokens=10)
    assert [out.token_ids for out in batch] == [alone[index].token_ids for index in (0, 0, 1)]
    assert [out.prompt_ids for out in batch] == [alone[index].prompt_ids for index in (0, 0, 1)]
    assert batch[0].text == tiny.decode(batch[0].token_ids)
    assert isinstance(lede_env.generate(tiny, [text], max_new_tokens=1), list)
    assert lede_env.generate(tiny, torch.tensor(tiny.encode(text)), max_new_tokens=1).prompt_ids == tiny.encode(text)


# --- seeds


@pytest.mark.parametrize("strategy", [Autoregressive(), LayerSkip(2, 4), LayerSkip(5, 2)], ids=repr)
@pytest.mark.parametrize("options", [{}, dict(top_k=9, top_p=0.9)], ids=str)
def test_sampling_is_fixed_by_the_seed_and_not_by_the_batch(random_model, strategy, options):
    lm, _ = random_model("llama-gqa", late_scale=0.05)
    prompts = [[1, 17, 40, 5, 23], [1, 9], [1, 4, 4, 4, 30, 31, 32]]
    settings = dict(strategy=strategy, max_new_tokens=24, temperature=0.6, **options)
    batch = lede_env.generate(lm, prompts, seed=11, **settings)
    again = lede_env.generate(lm, prompts, seed=11, **settings)
    assert [out.token_ids for out in batch] == [out.token_ids for out in again]
    assert batch[0].seed == 11 and len({out.seed for out in batch}) == 3
    for prompt, out in zip(prompts, batch, strict=True):
        alone = lede_env.generate(lm, prompt, seed=out.seed, **settings)
        assert (alone.token_ids, alone.rounds) == (out.token_ids, out.rounds)
    texts = {tuple(lede_env.generate(lm, prompts[0], seed=seed, **settings).token_ids) for seed in range(8)}
    assert len(texts) > 4


def test_rows_of_the_same_prompt_draw_differently(random_model):
    lm, _ = random_model("llama-gqa", late_scale=0.05)
    batch = lede_env.generate(lm, [[1, 9, 9]] * 6, temperature=1.0, max_new_tokens=16)
    assert len({tuple(out.token_ids) for out in batch}) == 6


def test_rows_that_end_early_leave_the_others_alone(random_model):
    lm, _ = random_model("llama-gqa", late_scale=0.05)
    lm = replace(lm, eos_ids=tuple(range(2, 97, 12)))
    prompts = [[1, token, token + 2] for token in range(10, 22)]
    batch = lede_env.generate(lm, prompts, strategy=LayerSkip(2, 4), max_new_tokens=24, temperature=0.8)
    assert len({len(out.token_ids) for out in batch}) > 4
    assert {out.finish_reason for out in batch} == {"eos", "length"}
    for prompt, out in zip(prompts, batch, strict=True):
        alone = lede_env.generate(
            lm, prompt, strategy=LayerSkip(2, 4), max_new_tokens=24, temperature=0.8, seed=out.seed
        )
        assert (alone.token_ids, alone.rounds) == (out.token_ids, out.rounds)


# --- sessions


def test_a_session_in_use_refuses_a_second_user(written):
    lm, _, _ = written
    session = lm.session(1, 8)
    with session:
        with pytest.raises(LedeError, match="in use; open another"):
            session.__enter__()
        session.prefill(0, [5])
    with session:
        pass  # free again


def last_logits(session, ids):
    """(V,) full-depth logits after `ids`, by way of an exit at layer 2."""
    with torch.inference_mode():
        session.prefill(0, ids[:-1])
        session.feed([0], ids[-1:])
        session.advance([0], [2])
        (states,) = session.finish([0])
        session.close_round(0, 1)
        return session.lm.logits(states)[0]


def test_an_interrupted_session_is_usable_again(random_model):
    lm, _ = random_model("llama-gqa")
    ids = [1, 17, 40, 5, 23]
    expected = last_logits(lm.session(1, 32), ids)
    session = lm.session(1, 32)
    with pytest.raises(KeyboardInterrupt), session, torch.inference_mode():
        session.prefill(0, [7, 8, 9, 10, 11, 12, 13])
        session.feed([0], [3])
        session.advance([0], [4])
        session.feed([0], [60])
        raise KeyboardInterrupt
    with session:
        torch.testing.assert_close(last_logits(session, ids), expected, rtol=0, atol=0)


class _Interrupts(_Wants):
    def keep_drafting(self, signals, round_):
        raise KeyboardInterrupt


def test_an_interrupted_generation_leaves_the_model_usable(written):
    lm, prompt, ids = written
    strategy = Wants(3, 12)
    strategy.control = _Interrupts(3, 12)
    with pytest.raises(KeyboardInterrupt):
        lede_env.generate(lm, prompt, strategy=strategy)
    assert not torch.is_inference_mode_enabled()
    assert lede_env.generate(lm, prompt, max_new_tokens=9).token_ids == ids[:9]


def test_rows_wait_at_their_layers_and_ride_along(random_model):
    """Tokens of one round that exit at different layers: the deeper walk takes the waiting rows with it."""
    lm, _ = random_model("llama-gqa")
    tokens, exits = [5, 23, 40, 8, 61], [3, 1, 1, 4, 2]
    with torch.inference_mode(), lm.session(2, 32) as session:
        for row in (0, 1):
            session.prefill(row, [1, 17, row + 2])
        plain = lm.session(1, 32)
        for row in (0, 1):
            for token, layer in zip(tokens, exits, strict=True):
                session.feed([row], [token])
                session.advance([row], [layer])
            depths = session.depth[row]
            assert depths == sorted(depths, reverse=True) and depths[-1] == exits[-1]
        together = session.finish([0, 1])
        for row in (0, 1):
            plain.prefill(0, [1, 17, row + 2])
            for slot, token in enumerate(tokens):
                plain.feed([0], [token])
                (state,) = plain.finish([0])
                torch.testing.assert_close(together[row][slot], state[0])
                plain.close_round(0, 1)


@pytest.mark.parametrize("by_query", [True, False])  # as on a CPU; as on a GPU
def test_rows_of_different_lengths_run_as_each_alone(random_model, by_query):
    lm, _ = random_model("llama-gqa")
    prompts, drafts = ([1, 17, 40, 5, 23], [1, 9], [1, 3, 8, 77]), ([5, 23, 40], [8], [61, 2])
    with torch.inference_mode(), lm.session(4, 32) as session:
        session.cache.by_query = by_query
        for row, ids in enumerate(prompts):
            session.prefill(row, ids)
        for slot in range(3):
            rows = [row for row in range(3) if slot < len(drafts[row])]
            session.feed(rows, [drafts[row][slot] for row in rows])
            session.advance(rows, [2 + (slot == 0 and row) for row in rows])
        together = session.finish([0, 1, 2])
        for row, (ids, own) in enumerate(zip(prompts, drafts, strict=True)):
            alone = lm.session(1, 32)
            alone.prefill(0, ids)
            for token in own:
                alone.feed([0], [token])
            torch.testing.assert_close(together[row], alone.finish([0])[0])
