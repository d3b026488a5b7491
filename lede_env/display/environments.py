"""`lede envs`: the registered environments, what each pins, what is within reach and what is on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gymnasium as gym
from rich import box
from rich.table import Table

from lede_env.data.registry import TRACES, traces_of
from lede_env.envs.exit_config import ExitConfig
from lede_env.evaluation import evaluate_oracle
from lede_env.models.zoo import MODELS
from lede_env.registration import ENVIRONMENTS, mdp_of


def environment_row(env_id: str) -> dict[str, Any]:
    """Of one id: `id`, `mdp`, every pinned value, `weights_from` ("wheel", "cache" of the hub, "hub", or "twin",
    which has none yet) and `traces`, the names of the shipped ones that it plays; mean returns over the test prompts,
    None where no trace tells: `J_random` of a fair coin, `J_oracle` of the clairvoyant optimum, and `reward_threshold`,
    which a policy that only observes reaches. JSON-able."""
    config = ENVIRONMENTS[env_id]
    traces = [trace for trace in traces_of(_played(config)) if trace.path.is_file()]
    played = any(trace.temperature == config.temperature for trace in traces)
    best = evaluate_oracle(env_id, split="test") if played else None
    return {
        "id": env_id,
        "mdp": mdp_of(config),
        **asdict(config),
        "weights_from": _weights_from(config),
        "traces": [trace.name for trace in traces],
        "J_random": best and best.J_random,
        "J_oracle": best and best.J_oracle,
        "reward_threshold": gym.spec(env_id).reward_threshold,
    }


def _played(config: ExitConfig) -> str:
    """The model whose traces an environment plays: a twin's is the embedded one."""
    return "tiny" if config.weights == "twin" else config.model


def _weights_from(config: ExitConfig) -> str:
    hub_id = MODELS[config.model].hub_id
    if config.weights == "twin":
        return "twin"
    if hub_id is None:
        return "wheel"
    from huggingface_hub import try_to_load_from_cache

    return "cache" if isinstance(try_to_load_from_cache(hub_id, "config.json"), str) else "hub"


def environment_table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table. What is the same in all of them is said once, below."""
    cells = [_cells(row) for row in rows]
    same = {name for name in cells[0] if len({row[name] for row in cells}) == 1}
    common = ", ".join(f"{name} {cells[0][name]}" for name in cells[0] if name in same)
    caption = (
        f"All: {common}. Every value is an argument of gym.make. Returns on the test prompts: of a fair coin, of a "
        "policy that only observes (reward_threshold), of the clairvoyant optimum. Traces that ship: by temperature."
    )
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE, show_edge=False, padding=0)
    for name in cells[0]:
        if name not in same:
            table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*(value for name, value in row.items() if name not in same))
    return table


def _cells(row: dict[str, Any]) -> dict[str, str]:
    rho = row.get("rho")
    returns = [row["J_random"], row["reward_threshold"], row["J_oracle"]]
    return {
        "id": row["id"],
        "MDP": row["mdp"],
        "layers": " ".join(map(str, row["candidate_layers"])),
        "task": f"{row['task']} / {row['split']}",
        "T": f"{row['temperature']:g}",
        "max new tokens": str(row["max_new_tokens"]),
        "features": str(row["features"]),
        "reward": row["reward"],
        "rho": "" if rho is None else f"{rho:.2f}",
        "returns": " ".join("  -" if value is None else f"{value:3.0f}" for value in returns),
        "from": row["weights_from"],
        "traces": ", ".join(f"{TRACES[name].temperature:g}" for name in row["traces"]) or "none",
    }
