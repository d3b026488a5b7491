"""What a model's acceptance head says of every draft in a trace: one pass over each text, and one over its branches.

A trace needs no head to be recorded or played. With what one says of it (`Trace.outlook`), it also gives the features
`risk`, `odds` and `ahead` of the draft MDP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lede_env.data.trace_file import Trace, quantize_outlook, text_digest
from lede_env.engine.kv_cache import KVCache, Span
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.signals import OUTLOOK
from lede_env.envs.trace_backend import check_model
from lede_env.errors import LedeError
from lede_env.tasks import Prompt, fit_prompt

TOGETHER = 1024  # logits' rows at once


@torch.inference_mode()
def with_outlook(
    trace: Trace, lm: LayeredLM, prompts: Sequence[Prompt], progress: Callable[[int], None] | None = None
) -> Trace:
    """The trace with what the model's acceptance head says of its drafts. `prompts`: those it was recorded from.

    Raises:
        LedeError: the model has no head, or is not the trace's; a prompt is missing or has changed.
    """
    if lm.acceptance_head is None:
        raise LedeError(f"{lm.name!r} has no acceptance head; train one: python -m agents.acceptance_head")
    check_model(trace, lm.name, lm.fingerprint)
    known = {prompt.id: prompt for prompt in prompts}
    reader = Reader(trace, lm)
    for text in range(len(trace.starts) - 1):
        place = text // trace.header.samples
        prompt = known.get(trace.prompt_ids[place])
        if prompt is None or text_digest(prompt.text) != trace.prompt_digests[place]:
            raise LedeError(f"prompt {trace.prompt_ids[place]!r} of the trace is not among those given, or has changed")
        room = lm.geometry.context - trace.header.max_new_tokens - 1
        reader.read(text, fit_prompt(lm.encode(prompt.text), room, prompt.task)[0])
        if progress:
            progress(text + 1)
    said, of_branches = quantize_outlook(reader.outlook), quantize_outlook(reader.branch_outlook)
    return replace(trace, outlook=said, branch_outlook=of_branches, head=lm.acceptance_head.digest)


class Reader:
    """One row of cache, as deep as the deepest candidate: a text, then the branches of one candidate behind it."""

    def __init__(self, trace: Trace, lm: LayeredLM):
        self.trace, self.lm, self.layers = trace, lm, trace.header.candidate_layers
        self.outlook = np.zeros((*trace.accepted.shape, OUTLOOK), np.float32)
        self.branch_outlook = np.zeros((len(trace.branch_tokens), OUTLOOK), np.float32)
        geometry = lm.geometry
        longest = geometry.context + (trace.header.max_new_tokens + 1) * trace.header.draft_cap
        self.cache = KVCache(self.layers[-1], 1, geometry.kv_heads, longest, geometry.head_dim, lm.dtype, lm.device)

    def read(self, text: int, prompt: list[int]) -> None:
        """Read one text and its branches."""
        trace = self.trace
        rows = np.arange(trace.starts[text], trace.starts[text + 1])
        tokens = [*prompt, *trace.targets[rows[:-1]].tolist()]
        span = self.cache.span([0], [0], len(tokens))
        x, below, first = self.lm.embed(self._put(tokens)).unsqueeze(0), 0, len(prompt) - 1
        for candidate, layer in enumerate(self.layers):
            x, below = self.lm.run(x, self.cache, span, below, layer), layer
            self.outlook[rows, candidate] = self._say(x[0, first:], trace.drafts[rows, candidate], layer)
        for candidate in range(len(self.layers)):
            self._read_branches(rows, candidate, first, len(tokens))

    def _read_branches(self, rows: np.ndarray, candidate: int, first: int, prefix: int) -> None:
        """Those of one candidate: queries that see the text before the wrong draft, it, and the branch before them."""
        trace, layer = self.trace, self.layers[candidate]
        branches = trace.branch[rows, candidate]
        at = np.flatnonzero(branches >= 0)  # position in the text of each wrong draft
        if not len(at):
            return
        begins, ends = trace.branch_starts[branches[at]], trace.branch_starts[branches[at] + 1]
        inputs: list[int] = []
        slots: list[int] = []
        own: list[int] = []
        for number, (place, begin, end) in enumerate(zip(at.tolist(), begins.tolist(), ends.tolist(), strict=True)):
            inputs += [int(trace.drafts[rows[place], candidate]), *trace.branch_tokens[begin : end - 1].tolist()]
            slots += range(first + 1 + place, first + 1 + place + end - begin)
            own += [number] * (end - begin)
        branch, position, root = self._put(own), self._put(slots), self._put((first + 1 + at).tolist())
        text = self.cache.slots[:prefix] < root[branch].unsqueeze(1)  # (Q, prefix)
        earlier = (branch == branch.unsqueeze(1)) & (position <= position.unsqueeze(1))  # (Q, Q)
        mask = torch.cat([text, earlier], 1)
        span = Span(slice(None), position.unsqueeze(0), prefix, prefix + len(inputs), True, mask)
        states = self.lm.run(self.lm.embed(self._put(inputs)).unsqueeze(0), self.cache, span, 0, layer)[0]
        where = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
        self.branch_outlook[where] = self._say(states, trace.branch_tokens[where], layer)

    def _say(self, states: Tensor, drafts: np.ndarray, layer: int) -> np.ndarray:
        """(n, H) states at a layer and (n,) drafts -> (n, OUTLOOK)."""
        head, lm = self.lm.acceptance_head, self.lm
        assert head is not None
        said = []
        for part, own in zip(states.split(TOGETHER), self._put(drafts.tolist()).split(TOGETHER), strict=True):
            said.append(head.read(lm, part, lm.logits(part), own, layer, self.trace.header.temperature))
        return torch.cat(said).cpu().numpy()

    def _put(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.lm.device)
