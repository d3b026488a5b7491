"""The offline datasets that have names: which environment, which policies, which seed.

`<model>/<tier>-v0` is of the exit MDP, `<model>-draft/<tier>-v0` of the draft MDP; `-t0.6` after either is the variant
at temperature 0.6. All are played on the shipped traces, by policies that ship as small folders beside them
(`models/tiny/collectors/`, made by `agents/collectors.py`), so every file can be made again, array for array.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lede_env.data.registry import default_trace
from lede_env.errors import LedeError
from lede_env.models.zoo import MODELS
from lede_env.policies import EpsilonGreedy, ExitPolicy, RandomPolicy, StaticPolicy, StaticRounds, load_policy
from lede_env.registration import ENVIRONMENTS, mdp_of

COLLECTORS = Path(__file__).parent.parent / "models" / "tiny" / "collectors"
VERSION = "v0"

TIERS = {
    "random": "a fair coin at every decision",
    "static": "the best fixed setting on the training prompts",
    "medium": "the learner's first checkpoint half-way between static and expert on the (greedy) validation prompts",
    "medium-replay": "the buffer of the epsilon-greedy learner on its way to that checkpoint",
    "expert": "the best policy that decides by what it observes, learned from full information",
    "mixed": "random, static, medium and expert in turn, episode by episode",
    "oracle": "the clairvoyant optimum, which knows the future: confounded (it exits only when right)",
}


@dataclass(frozen=True)
class Problem:
    """A decision problem that has datasets."""

    env_id: str
    temperature: float = 0.0

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Everything that overrides what the id pins: the whole trace, all splits."""
        return {"backend": "trace", "split": "all", "temperature": self.temperature}

    @property
    def mdp(self) -> str:
        return mdp_of(ENVIRONMENTS[self.env_id])

    @property
    def trace(self) -> str:
        return default_trace(ENVIRONMENTS[self.env_id].model, self.temperature)


PROBLEMS = {
    "tiny": Problem("LEDE-Tiny-v0"),
    "tiny-draft": Problem("LEDE-Tiny-Draft-v0"),
    "tiny-t0.6": Problem("LEDE-Tiny-v0", 0.6),
    "tiny-draft-t0.6": Problem("LEDE-Tiny-Draft-v0", 0.6),
}
NAMES = [f"{problem}/{tier}-{VERSION}" for problem in PROBLEMS for tier in TIERS]
SHIPPED = [name for name in NAMES if not PROBLEMS[name.split("/")[0]].temperature]


@dataclass(frozen=True)
class Recipe:
    """How the episodes of a dataset are played: all but how many.

    Episode n is played by `behaviours[n // block % len(behaviours)]`, on a prompt and with coins that depend on
    (`seed`, n) alone. No behaviours: the clairvoyant.
    """

    name: str
    problem: Problem
    behaviours: tuple[ExitPolicy, ...]
    seed: int
    about: str
    block: int = 1
    episodes: int | None = None  # by default; None: as many as there are prompts
    labels: tuple[str, ...] = field(default=())  # of the behaviours


def recipe_of(name: str) -> Recipe:
    """The recipe of a dataset's name.

    Raises:
        LedeError: no such name; the message lists those there are.
    """
    if name not in NAMES:
        raise LedeError(f"dataset {name!r} is unknown; there are: {', '.join(NAMES)}")
    prefix, _, rest = name.partition("/")
    problem, tier = PROBLEMS[prefix], rest.removesuffix(f"-{VERSION}")
    collectors = Collectors.of(problem.mdp)
    behaviours = collectors.behaviours(tier, problem.temperature)
    return Recipe(
        name=name,
        problem=problem,
        behaviours=tuple(behaviours.values()),
        labels=tuple(behaviours),
        seed=list(TIERS).index(tier),
        about=TIERS[tier],
        block=collectors.block if tier == "medium-replay" else 1,
        episodes=collectors.block * len(behaviours) if tier == "medium-replay" else None,
    )


@dataclass(frozen=True)
class Collectors:
    """The policies that log an MDP's tiers, as `collectors.json` beside them says."""

    folder: Path
    epsilon: float  # of static, medium and expert
    static: dict[str, dict[str, int]]  # by temperature: layer; draft MDP: speculation and cap too
    replay_epsilons: tuple[float, ...]  # of the learner's checkpoints, in order
    block: int  # episodes it played with each
    command: str
    validation: dict[str, float]  # normalised scores there

    @classmethod
    @lru_cache
    def of(cls, mdp: str) -> Collectors:
        """Those that ship for an MDP of the embedded model."""
        return cls.read(COLLECTORS / mdp)

    @classmethod
    def read(cls, folder: Path) -> Collectors:
        file = folder / "collectors.json"
        if not file.is_file():
            raise LedeError(f"{file} is missing; reinstall the package, or make it by `python -m agents.collectors`")
        values = json.loads(file.read_text())
        values["replay_epsilons"] = tuple(values["replay_epsilons"])
        return cls(folder=folder, **values)

    def behaviours(self, tier: str, temperature: float) -> dict[str, ExitPolicy]:
        """The policies of a tier by name, in the order in which they take turns."""
        if tier == "random":
            return {"random": RandomPolicy()}
        if tier == "static":
            return {"static": EpsilonGreedy(static_policy(self.static[f"{temperature:g}"]), self.epsilon)}
        if tier in ("medium", "expert"):
            return {tier: EpsilonGreedy(load_policy(self.folder / tier), self.epsilon)}
        if tier == "medium-replay":
            names = [f"replay-{number:02d}" for number in range(len(self.replay_epsilons))]
            return {
                name: EpsilonGreedy(load_policy(self.folder / name), epsilon)
                for name, epsilon in zip(names, self.replay_epsilons, strict=True)
            }
        if tier == "mixed":
            parts = ("random", "static", "medium", "expert")
            return {name: self.behaviours(name, temperature)[name] for name in parts}
        return {}


def static_policy(setting: dict[str, int]) -> ExitPolicy:
    """A fixed layer, or a layer and a draft length, of the embedded model."""
    n_layers = MODELS["tiny"].n_layers
    kind = StaticRounds if "speculation" in setting else StaticPolicy
    return kind(n_layers=n_layers, **setting)
