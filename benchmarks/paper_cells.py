"""The surviving cells of the paper's Tables 1 to 3, for printing beside ours. They are of other models and machines."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from lede_env.models.zoo import find_spec

TABLES = Path(__file__).parent / "paper" / "tables.csv"
FIGURES = ("E", "d", "acceptance", "speedup", "rouge_l")
ABLATION = "ablation"  # Table 3's task, of which the paper says no more
# Ours -> the paper's. Parsing is only the paper's on its own data, TOPv2: other utterances have no cells.
TASKS = {
    "code": "humaneval",
    "lm": "cnn_dm_lm",
    "summarization": "cnn_dm_summarization",
    "instruction": "alpaca",
    "topv2": "topv2",
    ABLATION: ABLATION,
}
METHODS = {
    "Autoregressive": "AR",
    "LayerSkip": "LayerSkip",
    "Lite": "LITE",
    "DraftVerify": "DraftVerify",
    "LEDE": "LEDE",
    "LEDE w/o dynamic exit": "LEDE w/o dynamic exit",
    "LEDE w/o adaptive drafting": "LEDE w/o adaptive drafting",
}


@cache
def cells() -> dict[tuple[str, str, str], dict[str, float]]:
    """(model, task, method) -> the figures that survived, by name; model and task as the paper calls them."""
    with TABLES.open(newline="") as file:
        return {
            (row["model"], row["task"], row["method"]): {name: float(row[name]) for name in FIGURES if row[name]}
            for row in csv.DictReader(file)
            if row["table"] != "abstract"  # its speedup is a range over all models
        }


def paper_model(model: str, task: str) -> str | None:
    """The paper's model to print beside `model` on a task: itself, else the smallest that has cells; None: none has."""
    models = list(dict.fromkeys(m for m, t, _ in cells() if t == TASKS.get(task)))
    spec = find_spec(model)
    same = [name for name in models if spec is not None and name.lower() == spec.name]
    return next(iter([*same, *models]), None)


def paper_cell(model: str, task: str, method: str) -> dict[str, str | float]:
    """Whose cell stands beside (model, task, method), under "paper", and its figures; {} where there is none."""
    whose = paper_model(model, task)
    found = cells().get((whose or "", TASKS.get(task, ""), METHODS.get(method, "")), {})
    if not found:
        return {}
    temperature = 0.6 if TASKS[task] == "cnn_dm_lm" else 0  # paper section 4.1
    return {"paper": f"the paper's {whose} on {TASKS[task]}, T = {temperature:g}", **found}
