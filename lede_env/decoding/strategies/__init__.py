"""Every decoding strategy, by the name it has on the command line."""

import dataclasses

from lede_env.decoding.strategies.autoregressive import Autoregressive
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.decoding.strategies.layerskip import LayerSkip
from lede_env.decoding.strategies.lede import Lede
from lede_env.errors import LedeError
from lede_env.policies import load_policy

STRATEGIES: dict[str, type[Strategy]] = {
    "autoregressive": Autoregressive,
    "layerskip": LayerSkip,
    "lede": Lede,
}


def parse_strategy(text: str, policy: str | None = None) -> Strategy:
    """A strategy from a command line: its name, and after a colon its numbers in order, as in `layerskip:4,5`."""
    name, _, rest = text.partition(":")
    if name not in STRATEGIES:
        raise LedeError(f"strategy {text!r} is unknown; known: {', '.join(STRATEGIES)}, as in 'layerskip:4,5'")
    if policy is not None:
        if name != "lede":
            raise LedeError(f"--policy belongs to the strategy 'lede', not to {name!r}")
        return Lede(load_policy(policy))
    fields = dataclasses.fields(STRATEGIES[name])  # type: ignore[arg-type]  # every strategy is a dataclass
    takes = [field.name for field in fields if field.type == "int"]
    numbers = rest.split(",") if rest else []
    if len(numbers) != len(takes) or not all(number.strip().isdecimal() for number in numbers):
        form = f"{name}:{','.join(takes).upper()}" if takes else name
        raise LedeError(f"strategy {text!r} cannot be read; write it as {form!r}")
    return STRATEGIES[name](*map(int, numbers))


__all__ = ["STRATEGIES", "Autoregressive", "Control", "LayerSkip", "Lede", "Strategy", "parse_strategy"]
