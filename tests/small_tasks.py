"""Logged data of the embedded model's trace, and tasks on it, for the tests of agents."""

from __future__ import annotations

from agents.task import Task
from lede_env.data.dataset import read_dataset
from lede_env.engine.signals import select_features
from lede_env.policies import RandomPolicy
from lede_env.recording import record

ENV_KWARGS = {"task": "parse", "max_new_tokens": 48}


def log_random(folder, episodes=40):
    """A file of random play on a few prompts."""
    path = folder / "random.h5"
    record("LEDE-Tiny-v0", RandomPolicy(), episodes, path, seed=1, backend="trace", **ENV_KWARGS)
    return path


def small_task(path, features="extended", seed=0, updates=30) -> Task:
    return Task(read_dataset(path), "LEDE-Tiny-v0", ENV_KWARGS, select_features(features, "exit"), seed, updates)
