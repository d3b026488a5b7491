"""The CUDA session's interface on the eager engine, for tests of what plays on it where there is no GPU."""

from __future__ import annotations

import torch

from lede_env.engine.acceptance import draw_rows, greedy_match, speculative_matches
from lede_env.engine.read_signals import AHEAD, ENTROPY, GUESS, LOG_SUM, ODDS, SIZE, TOKEN, TOKEN_LOGIT, TOP
from lede_env.engine.session import Session


class Stepwise(Session):
    """As `lede_env.engine.cuda.session.GraphSession`, each launch a call; what the device would know is kept here."""

    def __init__(self, lm, batch, capacity, width, taps=()):
        super().__init__(lm, batch, capacity, width, taps)
        self.opened_ahead, self.withdrawn = 0, 0  # times
        self._ahead, self._logits, self._tokens, self._verdicts = 0, [], [], []

    def open(self, token, goal):
        assert not self.depth[0]
        self._logits, self._tokens, self._ahead = [], [], 0
        self._open(token, goal)

    def open_ahead(self, goal):
        assert self._verdicts and not self._ahead
        self._ahead = goal
        self.opened_ahead += 1

    def extend(self, goal):
        self._open(self._tokens[len(self.depth[0]) - 1], goal)

    def withdraw(self):
        self.depth[0].pop()
        self.withdrawn += 1

    def _open(self, token, goal):
        self.feed([0], [token])
        self.advance([0], [goal])

    def read(self, guess, uniform, sampling, outlook_layer=0):
        slot = len(self.depth[0]) - 1
        logits = self.lm.logits(self.newest([0]))  # (1, V)
        token = int(logits.argmax()) if uniform is None else draw_rows(sampling.probabilities(logits), [uniform])[0]
        self._logits[slot:], self._tokens[slot:] = [logits[0]], [token]
        log_p, top = logits[0].log_softmax(-1), logits[0].topk(min(TOP, logits.shape[1]))
        self._out = torch.full((SIZE,), float("-inf"))
        self._out[: len(top.values)] = top.values
        self._out[LOG_SUM], self._out[ENTROPY] = logits[0].logsumexp(-1), -(log_p.exp() * log_p).nansum()
        self._out[GUESS], self._out[TOKEN], self._out[TOKEN_LOGIT] = logits[0, max(guess, 0)], token, logits[0, token]
        if outlook_layer:
            at = (self.newest([0]), logits, torch.tensor([token]), outlook_layer, sampling.temperature)
            own = self.lm.acceptance_head.read(self.lm, *at)
            self._out[ODDS : AHEAD + 1] = own[0]

    def drawn(self):
        return self._out.tolist()

    def step(self, token, uniforms, sampling, doubts):
        self._logits, self._tokens, self._ahead = [], [], 0
        self.feed([0], [token if token >= 0 else self._verdicts[-1][1]])
        self.verify(uniforms, sampling, doubts)

    def verify(self, uniforms, sampling, doubts):
        (states,) = self.finish([0])
        logits, drafts = self.lm.logits(states), self._tokens[: len(states) - 1]
        if sampling.greedy:
            accepted, token = greedy_match(drafts, logits.argmax(-1).tolist())
        else:
            q = [sampling.probabilities(own[None])[0] for own in self._logits[: len(drafts)]]
            *coins, after = uniforms
            p = sampling.probabilities(logits)
            ((accepted, token),) = speculative_matches([drafts], p, [q], [coins], [after])
        beliefs = (logits.logsumexp(-1) - logits.amax(-1)).tolist() if doubts else []
        self._verdicts = [*self._verdicts[-1:], (accepted, token, beliefs)]

    def verified(self, earlier=0):
        return self._verdicts[-1 - earlier]
