"""How many environment steps a second: on a trace, on the language model itself, and Gymnasium's CartPole beside them.

Every step counts as its user gets it: observation, reward, flags and the whole `info`, episodes reset as they end.
Actions are random and drawn beforehand. Environments are timed in turn, repeat by repeat, so that drift hits all
alike; a figure is the median over repeats. `processes` > 1 times as many copies of each vector environment at once,
a process each; its figure is their sum.

On a GPU a trace is played as tensors (`TensorVectorEnv`): actions lie there, and a repeat ends when the GPU has taken
its last step.

On a CPU a language model's live environments keep the prompts that they have prefilled, together. As in a training of
many episodes each has been played once before the timing begins; the share of resets that found theirs is printed.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console

from benchmarks.harness import RESULTS, freeze_objects, machine, print_table, write_results
from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.envs.prompt_memory import memory_of
from lede_env.envs.tensor_env import TensorVectorEnv
from lede_env.models.loading import load_model

IDS = {"exit": "LEDE-Tiny-v0", "draft": "LEDE-Tiny-Draft-v0"}


@dataclass
class Args:
    """Measure environment steps a second."""

    device: str = "cpu"  # of the live environments; cuda measures these, and tensors on a trace
    lanes: int = 32  # of the live vector environments
    trace_lanes: int = 4096  # of the vector environments that play a trace
    trace: str | None = None  # the trace; by default the one that ships
    split: str = "train"  # prompts played
    steps: int = 500  # a repeat, of each vector environment on a trace
    live_steps: int = 150  # a repeat, of each live vector environment; of a single one twice as many
    repeats: int = 7
    processes: int = 2  # at once, in a measurement of their own; 1: none
    out: Path | None = None  # folder for env_throughput.csv, .md and .json


@dataclass(frozen=True)
class Contender:
    """An environment to time. Spelled out, so that another process can make it."""

    name: str
    features: str
    env_id: str
    lanes: int  # 0: the single form
    steps: int  # a repeat
    kwargs: tuple[tuple[str, Any], ...] = ()
    tensors: str = ""  # the device that a vector environment on a trace plays on as tensors

    @property
    def copies(self) -> int:
        return max(self.lanes, 1)

    def player(self) -> Callable[[], None]:
        """Plays the steps of one repeat, going on where the last left off."""
        kwargs = dict(self.kwargs) | ({"features": self.features} if self.features else {})
        actions = np.random.default_rng(0).integers(2, size=(self.steps, self.copies))
        if self.tensors:
            return tensor_player(gym.make_vec(self.env_id, num_envs=self.lanes, **kwargs), actions, self.tensors)
        if self.lanes:
            return vector_player(gym.make_vec(self.env_id, num_envs=self.lanes, **kwargs), actions)
        return single_player(gym.make(self.env_id, disable_env_checker=True, **kwargs), actions[:, 0])


def vector_player(envs: Any, actions: Any) -> Callable[[], None]:
    envs.reset(seed=0)

    def play() -> None:
        for row in actions:
            envs.step(row)

    return play


def tensor_player(envs: Any, actions: np.ndarray, device: str) -> Callable[[], None]:
    tensors = TensorVectorEnv(envs, device)
    play_rows = vector_player(tensors, torch.tensor(actions, device=tensors.device))

    def play() -> None:
        play_rows()
        if tensors.device.type == "cuda":
            torch.cuda.synchronize(tensors.device)

    return play


def single_player(env: Any, actions: np.ndarray) -> Callable[[], None]:
    env.reset(seed=0)

    def play() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return play


def contenders(args: Args) -> list[Contender]:
    """On the CPU all of them; elsewhere those that a device changes: live ones, and tensors on a trace."""
    found = []
    trace = (("backend", "trace"), ("trace", args.trace), ("split", args.split))
    if args.device == "cpu":
        for mdp, env_id in IDS.items():
            for features in ("paper", "extended"):
                found.append(Contender(f"{mdp} MDP, trace", features, env_id, args.trace_lanes, args.steps, trace))
        found.append(Contender("CartPole", "", "CartPole-v1", args.trace_lanes, args.steps))
        for mdp, env_id in IDS.items():
            found.append(Contender(f"{mdp} MDP, trace", "paper", env_id, 0, 20 * args.steps, trace))
        found.append(Contender("CartPole", "", "CartPole-v1", 0, 20 * args.steps))
    else:
        for mdp, env_id in IDS.items():
            for features in ("paper", "extended"):
                shape = args.trace_lanes, args.steps, trace
                found.append(Contender(f"{mdp} MDP, trace, tensors", features, env_id, *shape, args.device))
    for mdp, env_id in IDS.items():
        for lanes, steps in ((args.lanes, args.live_steps), (0, 2 * args.live_steps)):
            live = (("device", args.device),)
            found.append(Contender(f"{mdp} MDP, live", "paper", env_id, lanes, steps, live))
    return found


def play_prompts() -> None:
    """Begin a text of every prompt that the live environments play."""
    env = gym.make(IDS["exit"], disable_env_checker=True, device="cpu")
    for prompt_id in env.unwrapped.prompt_ids:
        env.reset(options={"prompt_id": prompt_id})


def time_in_turn(found: list[Contender], repeats: int, console: Console) -> list[list[float]]:
    """Steps a second of each, a figure a repeat, after one to warm up."""
    rates: list[list[float]] = [[] for _ in found]
    with progress_bar(console) as bar:
        task = bar.add_task("timing", total=(repeats + 1) * len(found))
        players = [contender.player() for contender in found]
        for repeat in range(repeats + 1):
            freeze_objects()
            for contender, player, own in zip(found, players, rates, strict=True):
                begin = time.perf_counter()
                player()
                if repeat:
                    own.append(contender.steps * contender.copies / (time.perf_counter() - begin))
                bar.advance(task)
    return rates


def time_at_once(contender: Contender, repeats: int, processes: int) -> list[float]:
    """Steps a second of several copies of an environment together, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_work, args=(contender, repeats, barrier, times)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    spans = np.array([times.get(timeout=600) for _ in workers])  # (processes, repeats, 2)
    for worker in workers:
        worker.join()
    seconds = spans[..., 1].max(0) - spans[..., 0].min(0)
    return (processes * contender.steps * contender.copies / seconds).tolist()


def _work(contender: Contender, repeats: int, barrier: Any, times: Any) -> None:
    torch.set_num_threads(1)
    player, spans = contender.player(), []
    player()
    for _ in range(repeats):
        barrier.wait(timeout=600)
        begin = time.perf_counter()  # one clock for all processes of a machine
        player()
        spans.append((begin, time.perf_counter()))
    times.put(spans)


def row_of(contender: Contender, rates: list[float], processes: int = 1) -> dict[str, Any]:
    median = statistics.median(rates)
    return {
        "environment": contender.name,
        "features": contender.features,
        "form": f"vector of {contender.lanes}" if contender.lanes else "single",
        "processes": processes,
        "steps/s": round(median),
        "slowest repeat": round(min(rates)),
        "fastest repeat": round(max(rates)),
        "us a step": 1e6 / median,  # of one environment
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Steps/s of one environment over another's, where both were taken: of one process, the paper's features."""
    own = [row for row in rows if row["processes"] == 1 and row["features"] != "extended"]
    rate = {(row["environment"], row["form"].split()[0]): row["steps/s"] for row in own}
    found = {}
    for mdp in IDS:
        for kind, form, beside in (("live", "vector", (f"{mdp} MDP, live", "single")),
                                   ("trace", "vector", ("CartPole", "vector")),
                                   ("trace", "single", ("CartPole", "single"))):  # fmt: skip
            this = (f"{mdp} MDP, {kind}", form)
            if this in rate and beside in rate:
                found[f"{', '.join(this)} over {', '.join(beside)}"] = round(rate[this] / rate[beside], 2)
    return found


def main(args: Args) -> None:
    console = Console()
    found = contenders(args)
    memory = memory_of(load_model("tiny", device=args.device))
    if args.device == "cpu":  # on a GPU none are kept
        play_prompts()
    memory.hits = memory.misses = 0
    rates = time_in_turn(found, args.repeats, console)
    rows = [row_of(contender, own) for contender, own in zip(found, rates, strict=True)]
    if args.processes > 1 and args.device == "cpu":
        for contender in found:
            if contender.lanes == args.trace_lanes:
                rows.append(row_of(contender, time_at_once(contender, args.repeats, args.processes), args.processes))
    print_table("environment steps a second", rows, console)
    compared = ratios(rows)
    print_table(
        "steps a second over another's", [{"this over that": k, "times": v} for k, v in compared.items()], console
    )
    about = machine(args.device) | {
        "model": "tiny, embedded",
        "measured": f"random actions, info included; median of {args.repeats} repeats, environments in turn",
        "prompts kept": f"{memory.hits} of {memory.hits + memory.misses} live resets",
        "trace": Path(args.trace).name if args.trace else "the one that ships",
        "command": " ".join(["python -m benchmarks.env_throughput", *sys.argv[1:]]),
        **compared,
    }
    write_results(args.out or RESULTS / args.device, "env_throughput", rows, about)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
