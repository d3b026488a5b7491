"""Which text an environment plays next: a function of its key and of how many texts it has begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from lede_env.engine.acceptance import derive_seed, derive_seeds
from lede_env.errors import LedeError

CLOSED = "this environment is closed; make another by gym.make or gym.make_vec"


def draw_key(rng: np.random.Generator) -> np.uint64:
    """The key of `draw_texts`: all that an environment takes from its generator, once a seed."""
    return rng.integers(2**64, dtype=np.uint64)


def draw_texts(n_prompts: int, keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The next text of each environment: prompt index and seed of the draws, (N,) int64 both.

    A hash of the environment's key, (N,) uint64, and of how many texts it has begun since it got it, (N,) uint64:
    no generator an environment, so that thousands begin at once. The prompt comes from the hash's high half, and
    the seed's remainders, which choose among a few, from its low bits.
    """
    drawn = cast(np.ndarray, derive_seed(cast(Any, keys), cast(Any, counts)))  # its arithmetic is elementwise
    prompts = ((drawn >> 32) * n_prompts) >> 32
    return prompts.astype(np.int64), (drawn & (2**63 - 1)).astype(np.int64)


def draw_text_tensors(n_prompts: int, mixed: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_texts`, bit for bit, on the tensors' device, of each key's `mix_seeds`. All are (N,) int64."""
    drawn = derive_seeds(mixed, counts)
    return (((drawn >> 32) & (2**32 - 1)) * n_prompts) >> 32, drawn & (2**63 - 1)


def known_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> Mapping[str, Any]:
    """The options of a reset; a LedeError for any that the environment does not know."""
    unknown = [name for name in options or {} if name not in known]
    if unknown:
        raise LedeError(f"reset does not know the option {unknown[0]!r}; this environment takes {', '.join(known)}")
    return options or {}


def prompt_index(prompt_ids: Sequence[str], prompt_id: str) -> int:
    """Where a prompt is among an environment's."""
    if prompt_id not in prompt_ids:
        raise LedeError(
            f"prompt_id {prompt_id!r} is not among the {len(prompt_ids)} prompts of this environment "
            f"(the first is {prompt_ids[0]!r}); check task and split"
        )
    return prompt_ids.index(prompt_id)
