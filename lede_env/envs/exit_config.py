"""The arguments of the exit environments. Cheap to import: the table of ids is made of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from lede_env.arguments import number, whole_number
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
        """The configuration of an environment's keyword arguments; numbers and paths in their plain forms.

        Raises:
            LedeError: an unknown argument, or a value of the wrong type.
        """
        kinds = {argument.name: str(argument.type) for argument in fields(cls)}
        unknown = [name for name in kwargs if name not in kinds]
        if unknown:
            raise LedeError(f"unknown argument {unknown[0]!r}; this environment takes {', '.join(kinds)}")
        return cls(**{name: _plain(name, value, kinds[name]) for name, value in kwargs.items()})


# By annotation: the type a value must have, and what an error calls it. Others are checked where used.
_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "a string"),
    "str | Sequence[str]": (str | Sequence, "a string or a list of strings"),
    "Mapping[str, float]": (Mapping, "a dict of numbers"),
}


def _plain(name: str, value: Any, annotation: str) -> Any:
    if annotation in ("int", "float"):
        return whole_number(name, value) if annotation == "int" else number(name, value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    kind, meaning = _KINDS.get(annotation, (object, ""))
    if not isinstance(value, kind):
        raise LedeError(f"{name}={value!r} must be {meaning}")
    return dict(value) if isinstance(value, Mapping) else value
