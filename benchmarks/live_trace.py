"""Live equals trace: episodes under random actions, played by the language model and by its shipped recording.

Observations agree to 1e-4, and every reward, flag and info field exactly, step by step; in float32, on each MDP, one
environment at a time and as vectors. Greedily an episode is counted apart where somewhere in its text, or in what a
layer would have drafted off it, two tokens are as good as tied: rounding alone may choose another there. At a
temperature the live environment draws with the seeds that the recording was drawn with; the draft MDP, where a live
draft is drawn before its target, has no such rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rich.console import Console

import lede_env
from benchmarks.harness import RESULTS, machine, print_table, write_results
from lede_env.arguments import clear_errors
from lede_env.data.registry import default_trace
from lede_env.data.trace_file import Trace
from lede_env.display.progress import progress_bar
from lede_env.engine.kv_cache import KVCache
from lede_env.engine.layered_lm import LayeredLM
from lede_env.tasks import load_prompts

IDS = {"exit": "LEDE-Tiny-v0", "draft": "LEDE-Tiny-Draft-v0"}
CHECKS = (("exit", 0.0), ("draft", 0.0), ("exit", 0.6))  # MDP and temperature
TOLERANCE = 1e-4  # of observations
TIE = 1e-4  # between the logits of the two best tokens
MOST_TIES = 0.02  # share of the episodes


@dataclass
class Args:
    """Play the same episodes on both backends and compare every step."""

    episodes: int = 200  # of each check, by each form
    lanes: int = 25  # of the vector form
    max_new_tokens: int = 128
    mdps: tuple[str, ...] = ("exit", "draft")
    seed: int = 0
    out: Path | None = RESULTS / "cpu"  # folder for live_trace.csv, .md and .json; None: print only


def make(form: str, lanes: int, env_id: str, **kwargs: Any) -> Any:
    """`lanes` environments: our vector form, or Gymnasium's around single ones."""
    if form == "vector":
        return gym.make_vec(env_id, num_envs=lanes, autoreset_mode=AutoresetMode.DISABLED, **kwargs).unwrapped
    singles = [partial(gym.make, env_id, disable_env_checker=True, **kwargs)] * lanes
    return SyncVectorEnv(singles, autoreset_mode=AutoresetMode.DISABLED)


def backends_of(envs: Any) -> list[Any]:
    return [env.unwrapped._table for env in envs.envs] if isinstance(envs, SyncVectorEnv) else [envs._table]


def draw_as_recorded(live: Any, replayed: Any) -> None:
    """Has the live environments decode with the seeds of the texts that the trace would choose."""

    def start(table: Any, trace_table: Any, begin: Any, lane: int, prompt: int, seed: int) -> None:
        place = trace_table.prompt_ids.index(table.prompt_ids[prompt])  # the two list them in orders of their own
        text = trace_table.texts(np.array([place]), np.array([seed]))[0]
        begin(lane, prompt, int(trace_table.trace.text_seeds[text]))

    for table, trace_table in zip(backends_of(live), backends_of(replayed), strict=True):
        table.start = partial(start, table, trace_table, table.start)


@dataclass
class Wave:
    """Episodes played on both backends, an entry each."""

    steps: np.ndarray  # (N,) compared
    distance: np.ndarray  # (N,) largest, of observations
    found: list[str]  # the first thing that differs, "" if nothing does


def compare(live: Any, replayed: Any, prompt_ids: list[str], seed: int) -> Wave:
    """One episode a lane under the same random actions, each to its end or to its first difference."""
    n, rng = len(prompt_ids), np.random.default_rng(seed)
    wave, playing, over = Wave(np.zeros(n, int), np.zeros(n), [""] * n), np.ones(n, bool), np.zeros(n, bool)
    single = isinstance(live, SyncVectorEnv)
    options = {"prompt_id": prompt_ids[0]} if single else {"prompt_ids": prompt_ids}
    mine, other = (envs.reset(seed=seed, options=options) for envs in (live, replayed))
    while True:
        wave.distance[playing] = np.maximum(wave.distance, np.abs(mine[0] - other[0]).max(1))[playing]
        for name, differs in differences(mine, other):
            for lane in np.flatnonzero(differs & playing):
                wave.found[lane], playing[lane] = f"{name} after {wave.steps[lane]} steps", False
        playing &= ~over
        if not playing.any():
            return wave
        actions = rng.integers(2, size=n)
        mine, other = live.step(actions), replayed.step(actions)
        wave.steps += playing
        over = mine[2] | mine[3]


def differences(mine: tuple, other: tuple) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (N,) where the two differ) of everything that a step or a reset returns."""
    yield "observation", np.abs(mine[0] - other[0]).max(1) > TOLERANCE
    for name, one, two in zip(("reward", "terminated", "truncated"), mine[1:-1], other[1:-1], strict=False):
        yield name, one != two
    yield from info_differences(mine[-1], other[-1])


def info_differences(mine: dict[str, Any], other: dict[str, Any], within: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if mine.keys() != other.keys():
        raise lede_env.LedeError(f"infos have different keys: {sorted(mine.keys() ^ other.keys())}")
    for key, value in mine.items():
        if isinstance(value, dict):
            yield from info_differences(value, other[key], f"{within}{key}.")
        else:
            yield within + key, np.asarray(value != other[key], bool)


@torch.inference_mode()
def near_ties(lm: LayeredLM, trace: Trace, among: set[str], branches: bool) -> set[str]:
    """Those prompts somewhere in whose text the two best tokens' logits lie within TIE, at a candidate layer or at full
    depth; `branches`: or in what a layer would have drafted off it. Texts are computed again, in one forward each."""
    ties, layers, geometry = set(), (0, *trace.header.candidate_layers, lm.n_layers), lm.geometry
    prompts = {prompt.id: prompt.text for prompt in load_prompts("all", "all")}
    branch_gap = trace.branch_raw[:, 0] - trace.branch_raw[:, 1]  # (M,)
    for text, prompt_id in enumerate(trace.prompt_ids):
        if prompt_id not in among:
            continue
        rows = slice(*trace.starts[text : text + 2])
        ids = lm.encode(prompts[prompt_id])
        ids, first = ids + trace.targets[rows].tolist()[:-1], len(ids) - 1
        cache = KVCache(lm.n_layers, 1, geometry.kv_heads, len(ids), geometry.head_dim, lm.dtype, lm.device)
        span, x, gap = cache.span([0], [0], len(ids)), lm.embed(torch.tensor(ids)).unsqueeze(0), float("inf")
        for start, stop in pairwise(layers):
            x = lm.run(x, cache, span, start, stop)
            best = lm.logits(x[0, first:]).topk(2).values  # (T, 2)
            gap = min(gap, float((best[:, 0] - best[:, 1]).min()))
        own = trace.branch[rows]
        own = own[own >= 0]
        if branches and len(own):
            gap = min(gap, float(branch_gap[trace.branch_starts[own[0]] : trace.branch_starts[own[-1] + 1]].min()))
        if gap < TIE:
            ties.add(prompt_id)
    return ties


def choose(trace: Trace, args: Args) -> list[str]:
    """Prompts of the episodes: different ones, as far as there are."""
    return np.resize(np.random.default_rng(args.seed).permutation(list(trace.prompt_ids)), args.episodes).tolist()


def check(mdp: str, temperature: float, form: str, args: Args, ties: set[str], tick: Any) -> dict[str, Any]:
    """One row: `args.episodes` episodes."""
    lanes = args.lanes if form == "vector" else 1
    options = dict(features="extended", split="all", temperature=temperature, max_new_tokens=args.max_new_tokens)
    live = make(form, lanes, IDS[mdp], device="cpu", **options)
    replayed = make(form, lanes, IDS[mdp], backend="trace", **options)
    if temperature:
        draw_as_recorded(live, replayed)
    chosen = choose(lede_env.load_trace(default_trace("tiny", temperature)), args)
    waves: list[Wave] = []
    for begin in range(0, args.episodes, lanes):
        wave = (chosen[begin:] + chosen)[:lanes]  # the last one filled up
        waves.append(compare(live, replayed, wave, args.seed + begin))
        tick(len(chosen[begin : begin + lanes]))
    found = [name for wave in waves for name in wave.found][: args.episodes]
    distance = np.concatenate([wave.distance for wave in waves])[: args.episodes]
    tied = np.array([prompt_id in ties for prompt_id in chosen])
    differing = [place for place, name in enumerate(found) if name and not tied[place]]
    return {
        "MDP": mdp,
        "temperature": temperature,
        "form": "single" if lanes == 1 else f"vector of {lanes}",
        "episodes": args.episodes,
        "steps": int(np.concatenate([wave.steps for wave in waves])[: args.episodes].sum()),
        "with near ties": int(tied.sum()),
        "of them different": sum(bool(found[place]) for place in np.flatnonzero(tied)),
        "others different": len(differing),
        "largest distance": f"{distance[~tied].max(initial=0.0):.1e}",
        "first difference": f"{chosen[differing[0]]}: {found[differing[0]]}" if differing else "",
    }


def main(args: Args) -> int:
    console = Console()
    lm = lede_env.load_model("tiny", device="cpu")
    greedy = lede_env.load_trace(default_trace("tiny", 0.0))
    checks = [(*kind, form) for kind in CHECKS if kind[0] in args.mdps for form in ("vector", "single")]
    rows = []
    with progress_bar(console) as bar:
        task = bar.add_task("comparing", total=args.episodes * len(checks))
        ties = {mdp: near_ties(lm, greedy, set(choose(greedy, args)), mdp == "draft") for mdp in args.mdps}
        for mdp, temperature, form in checks:
            tied = ties[mdp] if temperature == 0.0 else set()
            rows.append(check(mdp, temperature, form, args, tied, lambda n: bar.advance(task, n)))
    print_table("live against trace", rows, console)
    about = machine() | {
        "command": " ".join(["python -m benchmarks.live_trace", *sys.argv[1:]]),
        "model": "embedded, float32",
        "compared": f"observation to {TOLERANCE:g}; reward, flags, every info field exactly",
        "max_new_tokens": args.max_new_tokens,
    }
    if args.out is not None:
        write_results(args.out, "live_trace", rows, about)
    good = all(row["others different"] == 0 and row["with near ties"] <= MOST_TIES * row["episodes"] for row in rows)
    console.print("live equals trace" if good else "live and trace differ, or too many near ties")
    return int(not good)


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main(tyro.cli(Args)))
