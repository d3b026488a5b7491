"""The trace backend: an environment's tokens from a recorded trace, no language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lede_env.data.trace_file import Trace, text_digest
from lede_env.engine.acceptance import Sampling
from lede_env.engine.signals import compute_features, trace_feature
from lede_env.envs.exit_outcomes import number_cells
from lede_env.errors import LedeError
from lede_env.tasks import Prompt


class TraceBackend:
    """`LiveBackend`'s interface over the arrays of a trace, which all lanes share: starting a text moves a pointer.

    Position t of a lane is row `base[lane] + t` of every table. All rows are known.
    """

    def __init__(
        self,
        trace: Trace,
        prompt_ids: Sequence[str],
        lanes: int,
        max_new_tokens: int,
        sampling: Sampling,
        candidate_layers: Sequence[int],
        features: tuple[str, ...],
    ):
        check_settings(trace, max_new_tokens, sampling, candidate_layers)
        index_of = {prompt_id: index for index, prompt_id in enumerate(trace.prompt_ids)}
        absent = [prompt_id for prompt_id in prompt_ids if prompt_id not in index_of]
        if absent or not prompt_ids:
            raise LedeError(
                f"the trace lacks {len(absent)} of the {len(prompt_ids)} prompts asked for "
                f"({', '.join(absent[:3])}); record one of these prompts, or choose among its own (trace.prompts_of)"
            )
        header = trace.header
        self.trace, self.candidate_layers, self.features = trace, header.candidate_layers, features
        self.prompt_ids = list(prompt_ids)
        self.base = np.zeros(lanes, np.int64)
        self.known = np.full(lanes, max_new_tokens + 1)
        self.observations = compute_features(  # (N, C, F)
            features,
            trace.raw,
            layer=np.array(header.candidate_layers) / header.n_layers,
            trace=trace_means(trace)[:, None],
            match=trace.match[:, None],
            temperature=header.temperature,
        )
        self.accepted, self.drafts, self.targets, self.ends = trace.accepted, trace.drafts, trace.targets, trace.ends
        place = np.arange(len(trace.targets)) - np.repeat(trace.starts[:-1], np.diff(trace.starts))  # (N,) in the text
        self.numbers = number_cells(trace.accepted, trace.ends, place == max_new_tokens - 1)  # (N, C)
        self.first_text = np.array([index_of[prompt_id] * header.samples for prompt_id in prompt_ids])

    def start(self, lane: int, prompt: int, seed: int) -> None:
        """Begin a prompt's continuation on a lane: the sample that `seed` chooses."""
        self.start_many(np.array([lane]), np.array([prompt]), np.array([seed]))

    def start_many(self, lanes: np.ndarray, prompts: np.ndarray, seeds: np.ndarray) -> None:
        """`start` for each of (N,) lanes."""
        self.base[lanes] = self.trace.starts[self.texts(prompts, seeds)]

    def texts(self, prompts: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """(N,) prompts and seeds -> (N,) texts of the trace: those recorded with the seeds, else samples seed % S."""
        samples = self.trace.header.samples
        first = self.first_text[prompts]
        if samples == 1:
            return first
        recorded = self.trace.text_seeds[first[:, None] + np.arange(samples)]  # (N, S)
        same = recorded == seeds[:, None]
        return first + np.where(same.any(1), same.argmax(1), seeds % samples)

    def ensure(self, lane: int, position: int) -> None:
        """Have the tables hold this position of this lane: they always do."""


def trace_means(trace: Trace) -> np.ndarray:
    """(N,) the `trace` feature at every position: before it, at most 8 values of -log p_max of the same text."""
    return np.concatenate([trace_feature(text) for text in np.split(trace.neg_log_p_max, trace.starts[1:-1])])


def check_settings(
    trace: Trace, max_new_tokens: int, sampling: Sampling, candidate_layers: Sequence[int] | None = None
) -> None:
    """Raise a LedeError unless the trace was recorded with these settings (and at least as many tokens)."""
    header = trace.header
    recorded = Sampling(header.temperature, header.top_k, header.top_p)
    if sampling != recorded:
        raise LedeError(f"the trace was recorded with {recorded}, not {sampling}; use its settings, or record another")
    if candidate_layers is not None and tuple(candidate_layers) != header.candidate_layers:
        raise LedeError(
            f"the trace holds candidate layers {header.candidate_layers}, not {tuple(candidate_layers)}; "
            f"pass candidate_layers={header.candidate_layers}, or record another"
        )
    if max_new_tokens > header.max_new_tokens:
        raise LedeError(
            f"max_new_tokens={max_new_tokens}, but the trace's texts have {header.max_new_tokens} tokens at most; "
            f"ask for that many, or record another"
        )


def check_model(trace: Trace, name: str, fingerprint: str) -> None:
    """Raise a LedeError unless the trace is of this model."""
    header = trace.header
    if header.model_fingerprint != fingerprint:
        raise LedeError(
            f"the trace was recorded from {header.model_name!r} (fingerprint {header.model_fingerprint}), but "
            f"{name!r} has fingerprint {fingerprint}; use that model, or record a trace of this one"
        )


def check_prompts(trace: Trace, prompts: Iterable[Prompt]) -> None:
    """Raise a LedeError if a prompt's text is not what it was when the trace was recorded."""
    digests = dict(zip(trace.prompt_ids, trace.prompt_digests, strict=True))
    for prompt in prompts:
        if digests.get(prompt.id, "") not in ("", text_digest(prompt.text)):
            raise LedeError(f"prompt {prompt.id!r} has changed since the trace was recorded; record it again")
