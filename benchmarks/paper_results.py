"""The file that `benchmarks.paper_tables` leaves, and goes on from: finished tasks, and the tables made of them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import write_csv
from benchmarks.paper_report import Record, markdown, report_rows
from lede_env.engine.cost_model import CostModel
from lede_env.errors import LedeError


class Results:
    """Records of tasks that ran with the same settings, by name, and the cost models of the run.

    Raises:
        LedeError: the file at `path` was made with other settings, or is damaged, or its folder cannot be made.
    """

    def __init__(self, path: Path, model: str, settings: dict[str, Any]):
        self.path, self.model = path, model
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.tasks: dict[str, Record] = {}
        self.costs: dict[str, CostModel] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedeError(f"no results can be written to {path.parent} ({error}); give another --out") from error
        if path.is_file():
            try:
                self._read(json.loads(path.read_text()))
            except LedeError:
                raise
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise LedeError(f"{path} is damaged ({error!r}); give another --out, or delete it") from error

    def _read(self, stored: dict[str, Any]) -> None:
        before, now = {"samples": 1, **stored["settings"]}, self.settings  # files of before had one of each prompt
        unlike = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if unlike:
            changes = ", ".join(f"{name}={before.get(name)!r}, now {now.get(name)!r}" for name in unlike)
            raise LedeError(f"{self.path} was made with other settings: {changes}; give another --out, or delete it")
        self.tasks = stored["tasks"]
        self.costs = {
            name: CostModel(**{**costs, "layer": tuple(costs["layer"]), "head": tuple(costs["head"])})
            for name, costs in stored["costs"].items()
        }

    def save(self) -> list[dict[str, Any]]:
        """Write the JSON, whole or not at all, and the CSV and Markdown made of it. Returns the rows."""
        costs = {name: asdict(costs) for name, costs in self.costs.items()}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, "costs": costs, "tasks": self.tasks}) + "\n")
        os.replace(part, self.path)
        rows = report_rows(list(self.tasks.values()), self.model)
        write_csv(self.path.with_suffix(".csv"), rows)
        text = markdown(rows, list(self.tasks.values()), {"command": command(), **self.settings})
        self.path.with_suffix(".md").write_text(text)
        return rows


def command() -> str:
    """The command line, prompt files by their names alone."""
    words = [Path(word).name if word.endswith(".jsonl") else word for word in sys.argv[1:]]
    return " ".join(["python -m benchmarks.paper_tables", *words])
