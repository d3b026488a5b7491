"""The texts under the lanes of `TensorVectorEnv`, on its device: as the trace backend and `draw_texts` choose them."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from lede_env.engine.acceptance import mix_seeds
from lede_env.envs.texts import draw_text_tensors
from lede_env.envs.trace_backend import TraceBackend


class TensorTexts:
    """Tensors are replaced, never written: infos hold them.

    Attributes:
        prompt: (N,) index of the prompt that each lane plays.
        base: (N,) row of the trace at which its text begins.
    """

    def __init__(self, table: TraceBackend, keys: np.ndarray, device: torch.device):
        put, samples = partial(torch.tensor, device=device), table.trace.header.samples
        self._n_prompts = len(table.prompt_ids)
        self._first_text, self._starts = put(table.first_text), put(table.trace.starts)
        self._samples = torch.arange(samples, device=device)
        self._recorded = put(table.trace.text_seeds)
        self._keys = mix_seeds(put(keys.view(np.int64)))
        self._begun = torch.zeros_like(self._keys)  # texts, since the key was drawn
        self.prompt = self.base = self._begun

    def seed(self, lanes: Tensor, keys: Tensor) -> None:
        """Give new keys to the lanes of a mask."""
        self._keys = torch.where(lanes, mix_seeds(keys), self._keys)
        self._begun = self._begun * ~lanes

    def begin(self, lanes: Tensor, chosen: Tensor | None = None) -> None:
        """The next text for the lanes of a mask: of the prompt chosen, or where that is -1 of one drawn."""
        prompts, seeds = draw_text_tensors(self._n_prompts, self._keys, self._begun)
        if chosen is not None:
            prompts = torch.where(chosen < 0, prompts, chosen)
        self.prompt = torch.where(lanes, prompts, self.prompt)
        self.base = torch.where(lanes, self._starts[self._texts(prompts, seeds)], self.base)
        self._begun = self._begun + lanes

    def _texts(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        """`TraceBackend.texts`."""
        first, samples = self._first_text[prompts], len(self._samples)
        if samples == 1:
            return first
        same = self._recorded[first[:, None] + self._samples] == seeds[:, None]  # (N, S)
        return first + torch.where(same.any(1), same.byte().argmax(1), seeds % samples)
