"""The paper's Figure 2: reward, acceptance and exit layer over the training episodes of `agents.nstep_dqn`.

Draws the history of a run. Where there is none yet, trains first, by the paper's schedule.

    python -m benchmarks.learning_dynamics --run runs/nstep_dqn
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from agents.nstep_dqn import Args as AgentArgs
from agents.nstep_dqn import train
from benchmarks.figures import learning_curves
from benchmarks.harness import RESULTS, machine, print_table, write_results
from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.errors import LedeError

CURVES = ("return", "acceptance", "exit_layer")
LAST = 100  # online episodes that stand for where learning ended


@dataclass
class Args:
    """Draw Figure 2 of the paper from a run of agents.nstep_dqn."""

    run: Path = Path("runs/nstep_dqn")  # folder of the run; trained here if it holds no history.csv
    env_id: str = "LEDE-Tiny-v0"  # environment to train on, if that has to be done
    out: Path = RESULTS / "learning_dynamics"  # folder of the figure and its table


def main(args: Args) -> None:
    console = Console()
    history_file = args.run / "history.csv"
    if not history_file.is_file():
        console.print(f"no {history_file}: training on {args.env_id}")
        train_agent(args, console)
    history = read_history(history_file)
    rows = phases(history)
    args.out.mkdir(parents=True, exist_ok=True)
    learning_curves(history, args.out / "learning_dynamics.png")
    write_results(args.out, "learning_dynamics", rows, {"run": args.run.name, **machine()})
    print_table("Figure 2: means over episodes", rows, console)
    console.print(f"written to {args.out}: learning_dynamics.png, .csv, .md and .json")


def train_agent(args: Args, console: Console) -> None:
    """A run with the agent's defaults."""
    agent_args = AgentArgs(env_id=args.env_id, out=args.run)
    with progress_bar(console) as bar:
        task = bar.add_task("exploring", total=agent_args.exploration_episodes + agent_args.online_episodes)

        def show(row: dict[str, Any]) -> None:
            bar.update(task, completed=row["episode"] + 1, description=f"{row['phase']}: return {row['return']:6.1f}")

        train(agent_args, show)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a history.csv that are episodes, numbers as numbers.

    Raises:
        LedeError: there are none, as in a run from a file alone.
    """
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = [{key: value if key == "phase" else float(value) for key, value in row.items() if value} for row in table]
    episodes = [row for row in rows if "return" in row]
    if not episodes:
        raise LedeError(f"{path} holds no episodes (an offline run?); give the folder of a run that played")
    return episodes


def phases(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the exploration, and over the first and the last online episodes."""
    explored = [row for row in history if row["phase"] == "explore"]
    online = [row for row in history if row["phase"] == "online"]
    parts = {"exploration": explored, f"first {LAST} online": online[:LAST], f"last {LAST} online": online[-LAST:]}
    return [
        {"episodes": name, "number": len(rows), **{key: float(np.mean([row[key] for row in rows])) for key in CURVES}}
        for name, rows in parts.items()
        if rows
    ]


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
