"""The arguments of the exit environments. Cheap to import: the table of ids is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from lede_env.errors import LedeError


@dataclass(frozen=True, kw_only=True)
class ExitConfig:
    """What defines an exit MDP, whatever the number of environments. Ids pin all of it; `gym.make` overrides any."""

    model: str  # zoo name, hub id or local folder
    candidate_layers: Sequence[int]  # where the agent may exit, ascending, within 1..L-1
    cost_model: str  # name of a shipped one, or a JSON file; for info["cost"]
    weights: str = "auto"  # the model's own; "twin": those of its geometry twin
    backend: str = "live"  # where tokens come from: the language model itself, or a "trace"
    trace: str | None = None  # name of a shipped one, or a file; None: the shipped one of this model and temperature
    task: str | Sequence[str] = "all"  # prompts: code, lm, summarization, instruction, parse, all, or a .jsonl file
    split: str = "train"  # train, validation, test or all
    features: str | Sequence[str] = "paper"  # what the agent observes: paper, extended, or a tuple of names
    reward: str = "paper"
    reward_kwargs: Mapping[str, float] = field(default_factory=dict)  # accept, depth, reject, continue_
    temperature: float = 0.0  # of the tokens' draws: temperature, then top-k, then top-p; 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128  # tokens until truncation
    episode: str = "prompt"  # an episode is a prompt's continuation, or one "token" of it
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: str | None = None  # None: float32 on the CPU, bfloat16 on CUDA

    @classmethod
    def parse(cls, kwargs: Mapping[str, Any]) -> Self:
        """The configuration of an environment's keyword arguments."""
        known = [argument.name for argument in fields(cls)]
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise LedeError(f"unknown argument {unknown[0]!r}; this environment takes {', '.join(known)}")
        return cls(**kwargs)
