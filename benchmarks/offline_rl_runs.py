"""The runs of the leaderboard: one agent, one dataset, one seed each; in processes of their own, and resumable."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.judge import judge
from agents.task import Agent, Board, Task, summary
from lede_env.data.dataset import Dataset
from lede_env.data.registry import default_trace, load_trace
from lede_env.data.trajectory_file import checksum
from lede_env.digest import digest
from lede_env.engine.signals import select_features
from lede_env.errors import LedeError
from lede_env.evaluation import Evaluation
from lede_env.offline.loading import load_dataset
from lede_env.policies import TrainedPolicy
from lede_env.registration import ENVIRONMENTS

LEARNS_FROM = ("data", "trace", "play")


@dataclass(frozen=True)
class Run:
    """One training, and what defines its result."""

    agent: str  # its row
    source: str  # module:Class
    settings: dict[str, Any]
    dataset: str
    features: str  # paper or extended
    seed: int
    updates: int

    @classmethod
    def of_row(cls, row: Mapping[str, str]) -> Run:
        """From a row of the leaderboard's runs.csv."""
        names = {name: row[name] for name in ("agent", "source", "dataset", "features")}
        return cls(**names, settings=json.loads(row["settings"]), seed=int(row["seed"]), updates=int(row["updates"]))

    def folder(self, out: Path) -> Path:
        """Where its result goes: a level each for the agent, what it learns from, and the rest."""
        settings = "-".join(f"{name}{setting_text(value)}" for name, value in self.settings.items()) or "default"
        parts = self.agent, f"{self.dataset}-{self.features}", f"{settings}-seed{self.seed}"
        return out.joinpath(*(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts))


def setting_text(value: Any) -> str:
    """A setting in short: numbers to six digits."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def find_agent(source: str) -> type[Agent]:
    """The class that `module:Class` names.

    Raises:
        LedeError: no such module or class, or one that lacks what an agent needs.
    """
    module, _, name = source.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise LedeError(f"agent {source!r} is not to be had ({error}); write it as my_module:MyAgent") from error
    for needed in ("train", "grid", "learns_from"):
        if not hasattr(found, needed):
            raise LedeError(f"agent {source!r} has no {needed!r}; agents/README.md says what an agent needs")
    if found.learns_from not in LEARNS_FROM:
        raise LedeError(
            f"agent {source!r} has learns_from={found.learns_from!r}; expected one of {', '.join(LEARNS_FROM)}"
        )
    _check_grid(source, found.grid)
    return found


def _check_grid(source: str, grid: Any) -> None:
    example = 'grid = ({"learning_rate": 1e-3},), or ({},) where there is nothing to choose'
    if not isinstance(grid, Sequence) or not grid or not all(isinstance(settings, dict) for settings in grid):
        raise LedeError(f"agent {source!r} has grid={grid!r}; expected a dict of settings for each trial: {example}")
    try:
        json.dumps(grid)
    except TypeError as error:
        raise LedeError(f"agent {source!r} has grid={grid!r}, which JSON cannot hold ({error}): {example}") from error


@lru_cache
def made_from(source: str, dataset: str) -> dict[str, str]:
    """Digests of what a run's result depends on beside its settings. Where one differs, the run is made anew.

    Of the code only the agent's own file counts, and the `files` that its class may name.
    """
    found, logged = find_agent(source), load(dataset)
    files = [Path(str(sys.modules[found.__module__].__file__)), *getattr(found, "files", ())]
    trace = default_trace(logged.attributes["model_name"], logged.attributes["temperature"])
    return {
        "agent": digest([file.read_bytes().hex() for file in files]),
        "dataset": checksum(logged.arrays),
        "trace": load_trace(trace).digest,
    }


def execute(run: Run, out: Path) -> dict[str, Any]:
    """Train, score on validation and test prompts, and write result.json, the policy and TensorBoard's files."""
    torch.set_num_threads(1)  # one seed is one result
    folder = run.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = load(run.dataset)
    env_id, env_kwargs = environment_of(dataset.attributes)
    features = select_features(run.features, dataset.attributes["mdp"])
    board = Board(folder / "tensorboard")
    task = Task(dataset, env_id, env_kwargs, features, run.seed, run.updates, board)
    begin = time.perf_counter()
    policy = find_agent(run.source)(**run.settings).train(task)
    seconds = time.perf_counter() - begin
    board.close()
    if not hasattr(policy, "decisions") and not (hasattr(policy, "features") and hasattr(policy, "exit_probability")):
        raise LedeError(f"train gave {policy!r}; expected a policy, with `features` and `exit_probability`")
    result: dict[str, Any] = {"run": asdict(run), "made_from": made_from(run.source, run.dataset), "seconds": seconds}
    # An agent of the draft MDP has no score on the exit MDP.
    if getattr(policy, "mdp", "exit") == dataset.attributes["mdp"] or not isinstance(policy, TrainedPolicy):
        for split in ("validation", "test"):
            played = judge(policy, env_id, split, env_kwargs)
            result[split] = summary(played)
        result["prompts"] = normalised(played.returns, played).tolist()
    if not hasattr(policy, "decisions"):
        result["modelled_speedup"] = judge(policy, *draft_problem(env_id, env_kwargs)).modelled_speedup
    if isinstance(policy, TrainedPolicy):
        policy.save(folder / "policy")
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(folder / "result.json")
    return result


def normalised(returns: np.ndarray, scale: Evaluation) -> np.ndarray:
    """(P,) returns as scores, whose mean is the normalised score."""
    return 100.0 * (returns - scale.J_random) / (scale.J_oracle - scale.J_random)


@lru_cache(maxsize=2)
def load(dataset: str) -> Dataset:
    """The training part of a dataset."""
    return load_dataset(dataset)


def environment_of(attributes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The id that a dataset was logged in, and what of its attributes is not as the id pins it."""
    env_id = attributes["env_id"]
    known = asdict(ENVIRONMENTS[env_id])
    aside = {"features", "split", "model", "weights", "backend", "trace", "device", "dtype", "episode"}
    differ = {
        name: attributes[name]
        for name in known.keys() - aside
        if name in attributes and json.dumps(attributes[name]) != json.dumps(known[name])
    }
    return env_id, differ


def draft_problem(env_id: str, env_kwargs: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """The draft MDP that matches an environment, on its test prompts: there a policy has a speedup."""
    if "-Draft-" not in env_id:
        env_id = env_id.replace("-v0", "-Draft-v0")
    return env_id, "test", {name: value for name, value in env_kwargs.items() if name != "reward_kwargs"}


def execute_all(runs: Iterable[Run], out: Path, workers: int, done: Callable[[], None]) -> list[dict[str, Any]]:
    """The results of runs, in order; what an earlier call has finished, from the same agent's file, dataset and trace,
    is read, the others are made in processes.

    Raises:
        LedeError: a run failed; the message names it, and finished runs are kept.
    """
    runs = list(runs)
    results: dict[int, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        finished = run.folder(out) / "result.json"
        if finished.is_file():
            stored = json.loads(finished.read_text())
            same_run = stored["run"] == json.loads(json.dumps(asdict(run)))
            if same_run and stored.get("made_from") == made_from(run.source, run.dataset):
                results[index] = stored
                done()
    missing = [(index, run, out) for index, run in enumerate(runs) if index not in results]
    for index, result in _execute_missing(missing, workers):
        if "error" in result:
            raise LedeError(f"{runs[index]} failed: {result['error']}; finished runs are kept, try again")
        results[index] = result
        done()
    return [results[index] for index in range(len(runs))]


def _execute_missing(jobs: list[tuple[int, Run, Path]], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if workers == 1 or len(jobs) < 2:
        yield from map(_execute, jobs)
        return
    with pool(workers) as processes:
        yield from processes.imap_unordered(_execute, jobs)


def _execute(job: tuple[int, Run, Path]) -> tuple[int, dict[str, Any]]:
    index, run, out = job
    try:
        return index, execute(run, out)
    except Exception as error:  # whatever a stranger's agent raises: it must reach the user with the run's name
        file = run.folder(out) / "error.txt"
        file.write_text(traceback.format_exc())
        return index, {"error": f"{type(error).__name__}: {error}; {file} says where"}


def pool(workers: int) -> Any:
    """Processes of one thread each; those of a Ray cluster where RAY_ADDRESS names one, by the same interface."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they import torch
    if "RAY_ADDRESS" in os.environ:
        from ray.util.multiprocessing import Pool

        return Pool()
    return multiprocessing.get_context("spawn").Pool(workers)
