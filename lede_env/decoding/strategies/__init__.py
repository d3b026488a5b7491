"""Every decoding strategy, by the name it has on the command line."""

import dataclasses
from dataclasses import MISSING
from typing import Any

from lede_env.decoding.strategies.autoregressive import Autoregressive
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.decoding.strategies.del_ import Del
from lede_env.decoding.strategies.draft_verify import DraftVerify
from lede_env.decoding.strategies.fsm import FiniteStateMachine
from lede_env.decoding.strategies.layerskip import LayerSkip
from lede_env.decoding.strategies.lede import Lede
from lede_env.decoding.strategies.lite import Lite
from lede_env.errors import LedeError
from lede_env.policies import load_policy

STRATEGIES: dict[str, type[Strategy]] = {
    "autoregressive": Autoregressive,
    "layerskip": LayerSkip,
    "fsm": FiniteStateMachine,
    "draft_verify": DraftVerify,
    "lite": Lite,
    "del": Del,
    "lede": Lede,
}


def parse_strategy(text: str, policy: str | None = None) -> Strategy:
    """A strategy from a command line: its name, and after a colon its numbers in order or by name.

    As in `layerskip:4,5` and `lede:exit_layer=4`. `policy` is the folder of the exit policy of `lede`.
    """
    name, _, rest = text.partition(":")
    if name not in STRATEGIES:
        raise LedeError(f"strategy {text!r} is unknown; known: {', '.join(STRATEGIES)}, as in 'layerskip:4,5'")
    if policy is not None and name != "lede":
        raise LedeError(f"--policy belongs to the strategy 'lede', not to {name!r}")
    fields = dataclasses.fields(STRATEGIES[name])  # type: ignore[arg-type]  # every strategy is a dataclass
    takes = [field for field in fields if field.type in ("int", "int | None")]
    numbers: dict[str, int] = {}
    for place, part in enumerate(rest.split(",") if rest else []):
        key, equals, value = part.partition("=") if "=" in part else ("", "", part)
        key = key.strip() if equals else takes[place].name if place < len(takes) else ""
        if key not in [field.name for field in takes] or key in numbers or not value.strip().isdecimal():
            raise LedeError(f"strategy {text!r}: {part!r} cannot be read; write it as {_form(name, takes)!r}")
        numbers[key] = int(value)
    missing = [field.name for field in takes if field.default is MISSING and field.name not in numbers]
    if missing:
        raise LedeError(f"strategy {text!r} lacks {missing[0]}; write it as {_form(name, takes)!r}")
    options: dict[str, Any] = {"policy": load_policy(policy)} if policy is not None else {}
    return STRATEGIES[name](**options, **numbers)


def _form(name: str, takes: list[dataclasses.Field]) -> str:
    parts = [field.name.upper() if field.default is MISSING else f"[{field.name}=N]" for field in takes]
    return f"{name}:{','.join(parts)}" if parts else name


__all__ = [
    "STRATEGIES",
    "Autoregressive",
    "Control",
    "Del",
    "DraftVerify",
    "FiniteStateMachine",
    "LayerSkip",
    "Lede",
    "Lite",
    "Strategy",
    "parse_strategy",
]
