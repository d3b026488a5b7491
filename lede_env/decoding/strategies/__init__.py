"""Every decoding strategy, by the name it has on the command line."""

from lede_env.decoding.strategies.autoregressive import Autoregressive
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.decoding.strategies.layerskip import LayerSkip
from lede_env.decoding.strategies.lede import Lede

STRATEGIES: dict[str, type[Strategy]] = {
    "autoregressive": Autoregressive,
    "layerskip": LayerSkip,
    "lede": Lede,
}

__all__ = ["STRATEGIES", "Autoregressive", "Control", "LayerSkip", "Lede", "Strategy"]
