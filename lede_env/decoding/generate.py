"""Generation: prefill, then rounds of drafting and verification until every row is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lede_env.arguments import whole_number
from lede_env.decoding import rounds
from lede_env.decoding.rounds import Row
from lede_env.decoding.stopwatch import Stopwatch
from lede_env.decoding.strategies import Autoregressive, Control, Strategy
from lede_env.decoding.text import TextStream
from lede_env.engine.acceptance import Draws, Sampling, derive_seed
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.lookup import Lookup
from lede_env.engine.round import Counts, Round
from lede_env.engine.session import Session
from lede_env.engine.signals import HEAD_FEATURES, LOOKUP_FEATURES, TraceWindow, asks_head
from lede_env.errors import LedeError


@dataclass(frozen=True)
class Metrics:
    """Figures of one generation; names as in design section 3, times in seconds of wall-clock."""

    E: float
    d: float
    acceptance: float
    tokens_per_round: float
    rounds: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float  # of the whole batch, for a row of one

    @property
    def tokens_per_second(self) -> float:
        """End to end: prefill included."""
        return self.tokens / (self.prefill_seconds + self.decode_seconds)


@dataclass(frozen=True)
class Generation:
    """What `generate` returns for one prompt."""

    text: str  # without the prompt, and without the stop string
    token_ids: list[int]  # new tokens, EOS included
    finish_reason: str  # "eos", "stop", "length" or "context"
    metrics: Metrics
    counts: Counts
    rounds: list[Round]
    prompt_ids: list[int]
    seed: int  # of this row: alone with this seed, the prompt gives the same text
    model: str
    strategy: str
    control: Control  # what the strategy learned on the way, for `carry_over`
    profile: dict[str, float] | None  # seconds of the whole batch by part, with profile=True


@dataclass(frozen=True)
class Piece:
    """What `stream` yields after a round: text that is final, and the round that made it."""

    text: str
    round: Round | None  # None for the last piece, which only flushes held-back text


def generate(
    lm: LayeredLM,
    prompt: str | Sequence[Any],
    *,
    strategy: Strategy | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    carry_over: Generation | None = None,
    profile: bool = False,
) -> Generation | list[Generation]:
    """Continue one prompt, or a batch of them, losslessly: the strategy changes the speed, never the distribution.

    Args:
        prompt: a text, chat messages, or a list of token ids; or a list of these (a batch, decoded together).
        strategy: Autoregressive() by default.
        max_new_tokens: never exceeded.
        temperature, top_k, top_p: 0 is greedy; top_k 0 and top_p 1 are off.
        seed: row b of a batch draws from `derive_seed(seed, b)`, row 0 from `seed` itself.
        stop: strings that end the text where they begin.
        carry_over: an earlier generation of the same strategy, whose learned state this one goes on with (Draft &
            Verify's threshold). One prompt only: the rows of a batch never influence each other.
        profile: also split the wall-clock by part: `Generation.profile`. Heads are the LM head's and drawing drafts;
            what Del learns from verified states is part of verification.

    Returns:
        A Generation, or a list of them for a batch.
    """
    prompts, single = _as_batch(prompt)
    strategy = Autoregressive() if strategy is None else strategy
    sampling = Sampling(temperature, top_k, top_p)
    rows = _make_rows(lm, prompts, strategy, max_new_tokens, seed, stop)
    if carry_over is not None:
        _carry(carry_over, rows, strategy)
    stopwatch = Stopwatch(lm, profile)
    for _ in _rounds(lm, rows, sampling, stopwatch):
        pass
    results = [_result(lm, row, strategy, stopwatch) for row in rows]
    return results[0] if single else results


def stream(
    lm: LayeredLM,
    prompt: str | Sequence[Any],
    *,
    strategy: Strategy | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> Iterator[Piece]:
    """As `generate`, for one prompt, yielding a Piece a round. The pieces' texts join to `generate`'s text."""
    prompts, single = _as_batch(prompt)
    if not single:
        raise LedeError(f"stream takes one prompt, got a batch of {len(prompts)}; use generate for a batch")
    sampling = Sampling(temperature, top_k, top_p)
    strategy = Autoregressive() if strategy is None else strategy
    rows = _make_rows(lm, prompts, strategy, max_new_tokens, seed, stop, streaming=True)
    return _pieces(lm, rows, sampling)


def _pieces(lm: LayeredLM, rows: list[Row], sampling: Sampling) -> Iterator[Piece]:
    row = rows[0]
    for _ in _rounds(lm, rows, sampling, Stopwatch(lm)):
        yield Piece(row.text.take() if row.text else "", row.round)
    yield Piece(row.text.take(last=True) if row.text else "", None)


def _carry(earlier: Generation, rows: list[Row], strategy: Strategy) -> None:
    """Hand the learned state of an earlier generation on to the one row there is."""
    if len(rows) != 1:
        raise LedeError(f"carry_over takes one prompt, got a batch of {len(rows)}; decode them one after another")
    if type(earlier.control) is not type(rows[0].control):
        raise LedeError(
            f"carry_over comes from strategy {earlier.strategy!r}, not from {strategy.name!r}; give one of its own"
        )
    rows[0].control.carry(earlier.control)


def _rounds(lm: LayeredLM, rows: list[Row], sampling: Sampling, stopwatch: Stopwatch) -> Iterator[None]:
    """Prefill, then play rounds, yielding after each, until all rows are done."""
    capacity = max(len(row.prompt_ids) + row.budget for row in rows)
    width = max(row.control.cap for row in rows) + 1
    with lm.session(len(rows), capacity, width, rows[0].control.taps) as session:
        stopwatch.start()
        _prefill(session, rows)
        stopwatch.prefilled()
        active, play_round = rows, player(session)
        while active:
            play_round(session, active, sampling, stopwatch.lap)
            for row in active:
                _collect(lm, row)
            active = [row for row in active if not row.finish_reason]
            stopwatch.played()
            yield


def player(session: Session) -> Callable[..., None]:
    """What plays the rounds of a session."""
    if type(session) is Session:
        return rounds.play_round
    from lede_env.decoding import pipelined

    return pipelined.play_round


# Inference mode is entered call by call: around a `yield` it would leak into the code that consumes the stream.
@torch.inference_mode()
def _prefill(session: Session, rows: list[Row]) -> None:
    for row in rows:
        states = session.prefill(row.index, row.prompt_ids[:-1])
        if row.control.taps:
            row.control.study(states, session.lm)


def _collect(lm: LayeredLM, row: Row) -> None:
    """Move the settled round's tokens to the text, apply stop strings and the budget, let the strategy learn."""
    round_ = row.round
    if row.text is not None:
        kept = row.text.push(round_.emitted)
        if row.text.stopped:
            round_.cut(kept)
            row.finish_reason = "stop"
    row.tokens += round_.emitted
    row.rounds.append(round_)
    row.counts.add(round_, lm.n_layers)
    row.pending = row.tokens[-1]
    if not row.finish_reason and len(row.tokens) >= row.budget:
        row.finish_reason = row.out_of
    if not round_.limited:
        row.control.learn(round_)


def _make_rows(
    lm: LayeredLM,
    prompts: list[Any],
    strategy: Strategy,
    max_new_tokens: int,
    seed: int,
    stop: str | Sequence[str],
    streaming: bool = False,
) -> list[Row]:
    """A row for each prompt, its arguments checked."""
    if not isinstance(lm, LayeredLM):
        raise LedeError(
            f"lm={lm!r:.80} is not a model; give what lede_env.load_model returns, as load_model('tiny') does"
        )
    if not isinstance(strategy, Strategy):
        raise LedeError(
            f"strategy={strategy!r} is not a strategy; give an instance, such as lede_env.LayerSkip(4, 5), or "
            "parse_strategy('layerskip:4,5') of lede_env.decoding.strategies"
        )
    max_new_tokens, seed = whole_number("max_new_tokens", max_new_tokens), whole_number("seed", seed)
    if max_new_tokens < 1:
        raise LedeError(f"max_new_tokens={max_new_tokens} must be at least 1")
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(each, str) for each in stops):
        raise LedeError(f"stop={stop!r} must be a string or a list of strings")
    if "" in stops:
        raise LedeError("stop='' would end every text at once; give a string of at least one character, or stop=()")
    if stops and lm.tokenizer is None:
        raise LedeError(f"stop={tuple(stops)!r} needs a tokenizer, and model {lm.name!r} has none; leave it out")
    rows = []
    for index, prompt in enumerate(prompts):
        ids = lm.encode(prompt)
        room = lm.geometry.context - len(ids)
        if room < 1:
            raise LedeError(
                f"the prompt has {len(ids)} tokens and {lm.name}'s context is {lm.geometry.context}; "
                f"shorten it to at most {lm.geometry.context - 1}"
            )
        row_seed = derive_seed(seed, index) if index else seed
        rows.append(
            Row(
                index=index,
                prompt_ids=ids,
                control=strategy.start(lm, row_seed),
                draws=Draws(row_seed),
                seed=row_seed,
                budget=min(max_new_tokens, room),
                pending=ids[-1],
                out_of="length" if max_new_tokens <= room else "context",
                trace=TraceWindow() if "trace" in strategy.reads else None,
                lookup=Lookup(ids) if LOOKUP_FEATURES.intersection(strategy.reads) else None,
                doubts=bool({"doubt", "peril"}.intersection(strategy.reads)),
                outlook=asks_head(strategy.reads),
                text=TextStream(lm, tuple(stops)) if stops or (streaming and lm.tokenizer is not None) else None,
            )
        )
    _check_head(lm, strategy)
    return rows


def _check_head(lm: LayeredLM, strategy: Strategy) -> None:
    if asks_head(strategy.reads) and lm.acceptance_head is None:
        raise LedeError(
            f"strategy {strategy.name!r} reads {HEAD_FEATURES}, what an acceptance head says, and model {lm.name!r} "
            "has none; train one (python -m agents.acceptance_head), or a policy on other features"
        )


def _result(lm: LayeredLM, row: Row, strategy: Strategy, stopwatch: Stopwatch) -> Generation:
    counts, stream_ = row.counts, row.text
    if stream_ is None and lm.tokenizer is not None:
        stream_ = TextStream(lm, ())
        stream_.push(row.tokens)
    if stream_ is not None:
        stream_.take(last=True)
    text = stream_.text if stream_ is not None else ""
    metrics = Metrics(
        E=counts.E,
        d=counts.d,
        acceptance=counts.acceptance,
        tokens_per_round=counts.tokens_per_round,
        rounds=counts.rounds,
        tokens=len(row.tokens),
        prefill_seconds=stopwatch.prefill,
        decode_seconds=stopwatch.decode,
    )
    return Generation(
        text,
        row.tokens,
        row.finish_reason,
        metrics,
        counts,
        row.rounds,
        row.prompt_ids,
        row.seed,
        lm.name,
        strategy.name,
        row.control,
        stopwatch.profile,
    )


def _as_batch(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts of an argument, and whether it was one prompt."""
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Iterable):
        raise LedeError(f"prompt={prompt!r:.80} is neither a text, a list of chat messages nor a list of token ids")
    items = list(prompt)
    if not items:
        raise LedeError("the prompt is empty; give at least one character or one token id")
    if isinstance(items[0], dict) or not isinstance(items[0], str | list | tuple):
        return [items], True
    return items, False
