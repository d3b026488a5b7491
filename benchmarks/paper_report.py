"""The paper's tables as rows, from what `benchmarks.paper_tables` recorded of each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import markdown_table, ratio_interval
from benchmarks.paper_cells import ABLATION, FIGURES, paper_cell
from benchmarks.tuning import MACHINE
from lede_env.engine.round import Counts

BASELINE, STATIC, LEDE = "Autoregressive", "LayerSkip", "LEDE"
POOLED = "all tasks"
UNLIKE = "texts unlike Autoregressive's"
Record = dict[str, Any]
# Columns that people are shown, where they say something; programs get them all, in the CSV.
SHOWN = ("method", "setting", "E", "d", "acceptance", "tokens a round", "tokens/s", "speedup", "over static",
         "LEDE over it", "modelled", "ROUGE-L", "repeated 8-grams", "signals and policy")  # fmt: skip


def report_rows(records: Sequence[Record], model: str) -> list[dict[str, Any]]:
    """One row for each task, cost model and method, and where there are several tasks, for all of them together."""
    several = [*records, pool(records)] if len(records) > 1 else records
    return [row for record in several for costs in record["results"] for row in task_rows(record, costs, model)]


def task_rows(record: Record, costs: str, model: str) -> list[dict[str, Any]]:
    """The methods on one task, their settings tuned for this machine's clock or for a cost model.

    Speed is by the clock for the former and modelled for the latter, which leaves prefill out.
    """
    results = record["results"][costs]
    speeds = {name: speed_of(result, record.get("prompt_of")) for name, result in results.items()}
    rows = []
    for name, result in results.items():
        counts = Counts(**result["counts"])
        row: dict[str, Any] = {"task": record["task"], "tuned for": costs, "method": name, "setting": result["setting"]}
        row |= {"E": counts.E, "d": counts.d if counts.drafted else float("nan"), "acceptance": counts.acceptance}
        row |= {"tokens a round": counts.tokens_per_round, "tokens/s": float("nan")}
        if "seconds" in result:
            row["tokens/s"] = sum(result["tokens"]) / sum(np.median(s) for s in result["seconds"])
        row |= versus("speedup", speeds[BASELINE], speeds[name])
        row |= versus("over static", speeds[STATIC], speeds[name])
        if LEDE in speeds:
            row |= versus("LEDE over it", speeds[name], speeds[LEDE])
        row["modelled"] = sum(result["tokens"]) / sum(result["cost"])
        if "seconds" in result:
            row["ROUGE-L"] = mean_known(result["rouge_l"])
            row["repeated 8-grams"] = result["repeated"]
            row["signals and policy"] = share_of_deciding(result.get("profile"))
            row[UNLIKE] = result["different"] or 0
        rows.append(row | paper_columns(model, record, name))
    return rows


def speed_of(result: dict[str, Any], prompt_of: Sequence[int] | None) -> np.ndarray:
    """(N, 2): time of each prompt, all its texts together, by the clock where there is one, else modelled; and tokens.

    prompt_of: the number of each text's prompt; None where every prompt has one text, in records of before.
    """
    times = [np.median(s) for s in result["seconds"]] if "seconds" in result else result["cost"]
    prompts = np.arange(len(times)) if prompt_of is None else np.array(prompt_of)
    return np.column_stack([np.bincount(prompts, weights) for weights in (times, result["tokens"])])


def versus(name: str, base: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    ratio, low, high = ratio_interval(base, other)
    return {name: ratio, f"{name} 95 %": f"{low:.2f} to {high:.2f}"}


def mean_known(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def share_of_deciding(profile: dict[str, float] | None) -> float:
    """Share of a profiled method's wall-clock that its signals and its policy took."""
    return (profile["signals"] + profile["policy"]) / sum(profile.values()) if profile else float("nan")


def paper_columns(model: str, record: Record, method: str) -> dict[str, Any]:
    """The paper's cell as columns of its own, each named as the paper's."""
    cell = paper_cell(model, record["paper_task"], method)
    return {key if key == "paper" else f"paper: {key}": value for key, value in cell.items()}


def pool(records: Sequence[Record]) -> Record:
    """All tasks as one: the prompts of each after those of the others, every task at its own settings."""
    ablated = all("LEDE w/o dynamic exit" in record["results"][MACHINE] for record in records)
    known = [record.get("prompt_of", range(record["prompts"])) for record in records]
    before = np.cumsum([0, *(record["prompts"] for record in records)])
    prompt_of = [int(first + prompt) for first, own in zip(before, known, strict=False) for prompt in own]
    pooled: Record = {"task": POOLED, "paper_task": ABLATION if ablated else POOLED, "prompt_of": prompt_of}
    pooled["results"] = {}
    for costs, results in records[0]["results"].items():
        pooled["results"][costs] = {
            name: _join([record["results"][costs][name] for record in records]) for name in results
        }
    return pooled


def _join(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = Counts()
    for result in results:
        counts.merge(Counts(**result["counts"]))
    whole: dict[str, Any] = {"setting": "", "counts": vars(counts)}
    settings = {result["setting"] for result in results}
    whole["setting"] = settings.pop() if len(settings) == 1 else "as tuned for each task"
    for key in ("tokens", "cost", "seconds", "rouge_l"):
        if key in results[0]:
            whole[key] = [value for result in results for value in result[key]]
    if "seconds" in results[0]:
        weights = [max(1, sum(result["tokens"])) for result in results]
        whole["repeated"] = float(np.average([result["repeated"] for result in results], weights=weights))
        whole["different"] = sum(result["different"] or 0 for result in results)
    if "profile" in results[0]:
        whole["profile"] = {part: sum(r["profile"][part] for r in results) for part in results[0]["profile"]}
    return whole


def compact(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns for people: intervals beside their figures, the paper's cell in one, empty columns left out."""
    kept = []
    for row in rows:
        line = {key: row[key] for key in SHOWN if key in row}
        line |= {key: f"{row[key]:.2f} ({row[f'{key} 95 %']})" for key in line if f"{key} 95 %" in row}
        if row["tuned for"] != MACHINE:
            del line["modelled"]  # the speedup is modelled already
        figures = [row.get(f"paper: {name}") for name in FIGURES]
        line["paper"] = " / ".join("-" if f is None else f"{f:g}" for f in figures) if "paper" in row else ""
        kept.append(line)
    empty = {key for key in kept[0] if all(line[key] == "" or line[key] != line[key] for line in kept)}
    return [{key: value for key, value in line.items() if key not in empty} for line in kept]


def title(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    how = (
        "tuned and timed here" if first["tuned for"] == MACHINE else f"modelled with the costs of {first['tuned for']}"
    )
    whose = next((row["paper"] for row in rows if "paper" in row), None)
    return f"{first['task']}, {how}" + (f"; paper: E / d / acceptance / speedup / ROUGE-L of {whose}" if whose else "")


def groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one task and one tuning together."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["tuned for"]), []).append(row)
    return list(found.values())


def markdown(rows: Sequence[dict[str, Any]], records: Sequence[Record], about: dict[str, Any]) -> str:
    """The report for people: a table a group, where LEDE's time goes, and what it all came from."""
    lines = ["# The paper's tables on this machine", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    for group in groups(rows):
        lines += ["", f"## {title(group)}", "", *markdown_table(compact(group))]
    lines += ["", "## Each task", ""]
    for record in records:
        lines.append(
            f"- {record['task']}: {len(record.get('prompt_of', range(record['prompts'])))} texts of "
            f"{record['prompts']} test prompts, {record['cut']} of them cut to fit; "
            f"{record['validation_prompts']} validation prompts, none of them a test prompt; "
            f"run at {record['commit']} on {record['date']}"
        )
    lines += ["", "## Where LEDE's wall-clock goes", ""]
    for record in records:
        profile = record["results"][MACHINE].get(LEDE, {}).get("profile")
        if profile:
            parts = ", ".join(f"{part} {seconds / sum(profile.values()):.1%}" for part, seconds in profile.items())
            lines.append(f"- {record['task']}: {parts}")
    return "\n".join(lines) + "\n"
