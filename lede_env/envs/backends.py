"""Where an environment's tokens come from. A backend fills a table of positions; environments look steps up in it.

The next token never depends on what the agent does on the exit MDP, so one full-depth forward a token gives every
candidate layer's signals at once, with one pass of the LM head over all of them: cheaper than walking, and exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lede_env.engine.acceptance import Draws, Sampling, best_tokens, coupled_drafts, draw
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.lookup import NO_GUESS, Lookup
from lede_env.engine.signals import LOOKUP_FEATURES, RAW, TraceWindow, compute_features, raw_signals
from lede_env.envs.exit_outcomes import number_cells
from lede_env.envs.prompt_memory import memory_of
from lede_env.errors import LedeError
from lede_env.tasks import Prompt, fit_prompt


class Signals(NamedTuple):
    """What is seen at a position of n lanes."""

    raw: np.ndarray  # (n, C, RAW) float32
    match: np.ndarray  # (n,)
    neg_log_p_max: np.ndarray  # (n,) at full depth


class LiveBackend:
    """The language model itself, decoding `lanes` continuations together.

    Position t of a lane is row `base[lane] + t` of the tables, computed when first needed, for all lanes at once:
    a lane that is behind finds its next tokens ready. T + 1 positions a lane, so that a truncated episode has a
    next observation.
    """

    def __init__(
        self,
        lm: LayeredLM,
        prompts: list[Prompt],
        lanes: int,
        max_new_tokens: int,
        sampling: Sampling,
        candidate_layers: tuple[int, ...],
        features: tuple[str, ...],
    ):
        room = lm.geometry.context - max_new_tokens - 1
        if room < 2:
            raise LedeError(
                f"max_new_tokens={max_new_tokens} leaves no room in {lm.name}'s context of {lm.geometry.context}"
            )
        self.lm, self.sampling = lm, sampling
        self.candidate_layers, self.features = candidate_layers, features
        self.prompt_ids = [prompt.id for prompt in prompts]
        self.tokens = [fit_prompt(lm.encode(prompt.text), room, prompt.task)[0] for prompt in prompts]
        self.positions = max_new_tokens + 1
        longest = max(map(len, self.tokens))
        self.session = lm.session(lanes, longest + self.positions, width=1)
        self._memory = memory_of(lm)
        self.base = np.arange(lanes) * self.positions
        size, n = lanes * self.positions, len(candidate_layers)
        self.observations = np.zeros((size, n, len(features)), np.float32)
        self.accepted = np.zeros((size, n), bool)
        self.drafts = np.zeros((size, n), np.int64)
        self.targets = np.zeros(size, np.int64)
        self.ends = np.zeros(size, bool)  # the target is an EOS
        self.numbers = np.zeros((size, n), np.int16)  # see `number_cells`
        self.known = np.zeros(lanes, np.int64)  # positions computed so far, a lane
        self._pending = [0] * lanes
        self._done = [True] * lanes
        self._draws = [Draws(0)] * lanes
        self._trace = [TraceWindow() for _ in range(lanes)]
        self._lookup: list[Lookup | None] = [None] * lanes  # where the features read it
        self.looks_up = bool(LOOKUP_FEATURES.intersection(features))

    def start(self, lane: int, prompt: int, seed: int) -> None:
        """Begin the continuation of a prompt on a lane; `seed` keys its draws."""
        ids = self.tokens[prompt]
        with torch.inference_mode():
            self._memory.prefill(self.session, lane, ids[:-1])
        self._pending[lane], self._done[lane], self.known[lane] = ids[-1], False, 0
        self._draws[lane], self._trace[lane] = Draws(seed), TraceWindow()
        self._lookup[lane] = Lookup(ids) if self.looks_up else None

    def start_many(self, lanes: np.ndarray, prompts: np.ndarray, seeds: np.ndarray) -> None:
        """`start` for each of (N,) lanes."""
        for lane, prompt, seed in zip(lanes.tolist(), prompts.tolist(), seeds.tolist(), strict=True):
            self.start(lane, prompt, seed)

    def ensure(self, lane: int, position: int) -> None:
        """Have the table hold this position of this lane.

        Raises:
            LedeError: the lane was never started, or its text ends before this position.
        """
        while self.known[lane] <= position:
            if self._done[lane]:
                raise LedeError(
                    f"lane {lane} has no position {position}: its text ends after {self.known[lane]} positions "
                    "(at an EOS, or at max_new_tokens + 1; none before start()); read no further, or start it again"
                )
            self._forward()

    @torch.inference_mode()
    def _forward(self) -> None:
        """The next position of every lane that has one: one forward for all, and one pass of the head."""
        session, states = self.session, []
        lanes = [lane for lane, done in enumerate(self._done) if not done]
        session.feed(lanes, [self._pending[lane] for lane in lanes])
        for layer in (*self.candidate_layers, self.lm.n_layers):
            session.advance(lanes, [layer] * len(lanes))
            states.append(session.newest(lanes).clone())
        for lane in lanes:
            session.close_round(lane, 1)
        logits = self.lm.logits(torch.cat(states))
        self._store(np.array(lanes), logits.unflatten(0, (len(states), len(lanes))))  # (C + 1, n, V)

    def _store(self, lanes: np.ndarray, logits: torch.Tensor) -> Signals:
        """Write the next position of (n,) lanes, given the (C + 1, n, V) logits of the candidates and full depth."""
        rows, signals = self.base[lanes] + self.known[lanes], self._signals(lanes.tolist(), logits)
        self.observations[rows] = compute_features(
            self.features,
            signals.raw,
            layer=np.array(self.candidate_layers) / self.lm.n_layers,
            trace=np.array([[self._trace[lane].mean()] for lane in lanes.tolist()]),
            match=signals.match[:, None],
        )
        self.drafts[rows], self.targets[rows] = self._tokens(lanes.tolist(), logits)
        accepted = self.drafts[rows] == self.targets[rows, None]  # (n, C)
        ends = np.isin(self.targets[rows], self.lm.eos_ids)
        self.accepted[rows], self.ends[rows] = accepted, ends
        self.numbers[rows] = number_cells(accepted, ends, self.known[lanes] == self.positions - 2)
        self.known[lanes] += 1
        for lane, target, surprise, end in zip(
            lanes.tolist(), self.targets[rows].tolist(), signals.neg_log_p_max.tolist(), ends.tolist(), strict=True
        ):
            self._trace[lane].push(surprise)
            if (lookup := self._lookup[lane]) is not None:
                lookup.extend([target])
            self._pending[lane], self._done[lane] = target, end or bool(self.known[lane] == self.positions)
        return signals

    def _signals(self, lanes: list[int], logits: torch.Tensor) -> Signals:
        found = [NO_GUESS if (lookup := self._lookup[lane]) is None else lookup.guess() for lane in lanes]
        guesses = torch.tensor([token for token, _ in found], device=logits.device).repeat(len(logits))
        raw = raw_signals(logits.flatten(0, 1), guesses).view(*logits.shape[:2], RAW).float().cpu().numpy()
        return Signals(raw[:-1].swapaxes(0, 1), np.array([match for _, match in found]), -raw[-1, :, 0])

    def _tokens(self, lanes: list[int], logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(n, C) drafts and (n,) targets from (C + 1, n, V) logits."""
        if self.sampling.greedy:
            best = best_tokens(logits)
            return best[:-1].T, best[-1]
        drawn = [self._sample(lane, logits[:, place]) for place, lane in enumerate(lanes)]
        return np.array([drafts for _, drafts in drawn]), np.array([target for target, _ in drawn])

    def _sample(self, lane: int, logits: torch.Tensor) -> tuple[int, list[int]]:
        """A target drawn at full depth and the drafts coupled to it, from (C + 1, V) logits."""
        probabilities = self.sampling.probabilities(logits)
        draws = self._draws[lane]
        target = draw(probabilities[-1], draws.next())
        drafts, _ = coupled_drafts(probabilities[-1], probabilities[:-1], target, draws.next())
        return target, drafts
