"""What an environment shows of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lede_env.envs.exit_mdp import ExitMDP


def render_token(mdp: ExitMDP, token: int, candidate: int, exited: tuple[int, bool] | None) -> str:
    """One line: the walk over the candidate layers, and how the last exit went."""
    walk = " ".join(
        f"[{layer}]" if index == candidate else str(layer) for index, layer in enumerate(mdp.candidate_layers)
    )
    last = "" if exited is None else f"  last exit: layer {exited[0]}, {'accepted' if exited[1] else 'rejected'}"
    return f"token {token:4d}  layers {walk} of {mdp.n_layers}{last}"
