"""Text as it streams: whatever the tokens' borders, it is what decoding all the tokens at once gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lede_env.decoding.text import TextStream

OPEN = "\ufffd"
SETTINGS = dict(deadline=None, derandomize=True, database=None)


def oracle(lm, ids, stop):
    """(text, tokens kept, stopped), from decoding every prefix whole; what may yet become a character is no text."""
    for kept in range(1, len(ids) + 1):
        text = lm.decode(ids[:kept]).rstrip(OPEN)
        ends = [at for string in stop if (at := text.find(string)) >= 0]
        if ends:
            return text[: min(ends)], kept, True
    return lm.decode(ids), len(ids), False


def play(lm, ids, stop, cuts):
    """Push `ids` in rounds of `cuts` lengths, then one by one; check each piece. Returns (text, kept, stopped)."""
    stream, kept, place, shown = TextStream(lm, stop), 0, 0, ""
    for length in [*cuts, *[1] * len(ids)]:
        if place >= len(ids) or stream.stopped:
            break
        kept += stream.push(ids[place : place + length])
        place += length
        if not stream.stopped:
            shown += stream.take()
            settled = lm.decode(ids[:place]).rstrip(OPEN)
            assert settled.startswith(shown)
            assert len(settled) - len(shown) < max(map(len, stop), default=1)  # no more is held back than need be
    shown += stream.take(last=True)
    assert shown == stream.text
    return shown, kept, stream.stopped


def stops_in(data, text):
    """Stop strings cut from a text, and others."""
    found = []
    for _ in range(data.draw(st.integers(0, 2))):
        begin = data.draw(st.integers(0, max(0, len(text) - 1)))
        found.append(text[begin : begin + data.draw(st.integers(1, 4))])
    return tuple(s for s in [*found, *data.draw(st.sampled_from([(), ("🦊🦊", "zz"), ("é",)]))] if s)


ALPHABET = st.one_of(
    st.sampled_from("ab \n.x('éß漢字かな한🦊👩🚀👍🏽\u200d\ufe0fe\u0301\u0308n\u0303आ\ufffd"),
    st.characters(codec="utf-8"),
)
CUTS = st.lists(st.integers(1, 7), max_size=12)


@settings(max_examples=150, **SETTINGS)
@given(text=st.text(ALPHABET, min_size=1, max_size=16), cuts=CUTS, data=st.data())
def test_any_text_any_stop_any_rounds(tiny, text, cuts, data):
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    stop = stops_in(data, text)
    assert play(tiny, ids, stop, cuts) == oracle(tiny, ids, stop)


@settings(max_examples=150, **SETTINGS)
@given(data=st.data(), cuts=CUTS)
def test_any_tokens_invalid_bytes_too(tiny, partial_tokens, data, cuts):
    """Broken characters, characters cut by a special token, tokens that end one character and begin another."""
    token = st.one_of(st.sampled_from(partial_tokens), st.integers(0, 4095), st.sampled_from([0, 72, 73]))
    ids = data.draw(st.lists(token, min_size=1, max_size=14))
    stop = stops_in(data, tiny.decode(ids))
    assert play(tiny, ids, stop, cuts) == oracle(tiny, ids, stop)


@pytest.fixture(scope="session")
def partial_tokens(tiny):
    """Tokens of the embedded model that are no whole characters."""
    return [token for token in range(tiny.geometry.vocab) if OPEN in tiny.decode([token])]


def test_a_stop_string_in_a_token_that_begins_a_character(tiny, partial_tokens):
    """The bytes after the stop string are the beginning of a character, which may end as a character or never."""
    shared = [token for token in partial_tokens if tiny.decode([token]) == " " + OPEN]
    assert shared, "a space and the first bytes of an emoji"
    hello = tiny.tokenizer.encode("hello", add_special_tokens=False)
    rest = tiny.tokenizer.encode("漢字", add_special_tokens=False)
    for ids in ([*hello, shared[0]], [*hello, shared[0], *rest], [*hello, shared[0], shared[0], 72]):
        for cuts in ([], [len(ids)]):
            assert play(tiny, ids, ("o ",), cuts) == ("hell", len(hello) + 1, True)


def test_a_broken_end_is_as_the_tokenizer_decodes_it(tiny):
    ids = tiny.tokenizer.encode("a 🦊", add_special_tokens=False)
    for cut in range(1, len(ids) + 1):
        assert play(tiny, ids[:cut], (), [])[0] == tiny.decode(ids[:cut])
        assert play(tiny, ids[:cut], ("b",), [cut])[0] == tiny.decode(ids[:cut])


# --- Llama 2's way: characters outside the vocabulary are byte tokens, a leading space is dropped


@pytest.fixture(scope="session")
def byte_fallback(tiny):
    """The embedded model with a tokenizer of a few words and 256 byte tokens, decoded as Llama 2's is."""
    words = ["<s>", "▁hello", "▁world", "▁", "a", "b", "x"]
    vocabulary = {word: index for index, word in enumerate([*words, *[f"<0x{byte:02X}>" for byte in range(256)]])}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return replace(tiny, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"))


def fallback_ids(pieces):
    """Token ids of words of the vocabulary, and of anything else by its bytes."""
    words = {"<s>": 0, " hello": 1, " world": 2, " ": 3, "a": 4, "b": 5, "x": 6}
    return [
        token for piece in pieces for token in ([words[piece]] if piece in words else [7 + b for b in piece.encode()])
    ]


@settings(max_examples=150, **SETTINGS)
@given(
    pieces=st.lists(
        st.sampled_from([" hello", " world", " ", "a", "<s>", "漢", "字", "🦊", "é"]), min_size=1, max_size=10
    ),
    cuts=CUTS,
    data=st.data(),
)
def test_byte_tokens(byte_fallback, pieces, cuts, data):
    """While a run of byte tokens is open its decoding gives up complete characters too; the stream does not."""
    lm, ids, text = byte_fallback, fallback_ids(pieces), "".join(p for p in pieces if p != "<s>")
    stop = stops_in(data, text)
    text, expected = text.removeprefix(" "), oracle(lm, ids, stop)
    stream, kept, place = TextStream(lm, stop), 0, 0
    for length in [*cuts, *[1] * len(ids)]:
        if place < len(ids) and not stream.stopped:
            kept += stream.push(ids[place : place + length])
            place += length
            assert text.startswith(stream.text)
    stream.take(last=True)
    assert (stream.text, kept, stream.stopped) == expected


def test_a_broken_run_of_bytes_does_not_spoil_what_was_shown(byte_fallback):
    ids = fallback_ids(["a", "漢", "字"])[:-1]
    assert byte_fallback.decode(ids) == "a" + OPEN * 5  # the tokenizer takes the first character back
    stream = TextStream(byte_fallback, ())
    stream.push(ids)
    assert (stream.take(), stream.take(last=True)) == ("a漢", OPEN * 2)
    stream = TextStream(byte_fallback, ())
    stream.push([*ids, 4])
    assert stream.take() == "a漢" + OPEN * 2 + "a"
