"""Live equals trace: episodes under random actions, played by the language model and by its shipped recording.

Observations agree to 1e-4, and every reward, flag and info field exactly, step by step; in float32, on each MDP, one
environment at a time and as vectors. Greedily an episode is counted apart where somewhere in its text, or in what a
layer would have drafted off it, two tokens are as good as tied: rounding alone may choose another there. At a
temperature the live environment draws with the seeds that the recording was drawn with; the draft MDP, where a live
draft is drawn before its target, has no such rows.

At a temperature rounding chooses another token where a uniform number lies at the border between two: a border draw.
An episode is counted apart where it differs in the very step that shows a border draw, and nowhere else; in the table
such draws are near ties too. About a quarter of the episodes meet one, for a vocabulary of 4096 has borders everywhere;
they are compared like all others. Rounding turns few of the draws, in about 1 % of the episodes.
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
from lede_env.engine.acceptance import Draws, Sampling, coupled_drafts, draw
from lede_env.engine.kv_cache import KVCache
from lede_env.engine.layered_lm import LayeredLM
from lede_env.tasks import load_prompts

IDS = {"exit": "LEDE-Tiny-v0", "draft": "LEDE-Tiny-Draft-v0"}
CHECKS = (("exit", 0.0), ("draft", 0.0), ("exit", 0.6))  # MDP and temperature
FORMS = ("vector", "single")
TOLERANCE = 1e-4  # of observations
TIE = 1e-4  # between the logits of the two best tokens
MOST_TIES = 0.02  # share of the episodes that may be counted apart
# Of a uniform number from where another token is drawn. The cumulative probabilities of a text computed one token at a
# time, as vectors, and in one forward differ by up to 2.4e-5, 99.9 % of them by less than 1e-5; acceptance chances, by
# up to 5e-5, 99 % by less than 1e-5. Of simulated draws that rounding turned over 99 % lay within 1e-5.
BORDER = 1e-5

Place = tuple[str, int, int]  # prompt id, token, layer


@dataclass
class Args:
    """Play the same episodes on both backends and compare every step."""

    episodes: int = 200  # of each check, by each form
    lanes: int = 25  # of the vector form
    max_new_tokens: int = 128
    mdps: tuple[str, ...] = ("exit", "draft")
    temperatures: tuple[float, ...] = (0.0, 0.6)
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
    borders: np.ndarray  # (N,) whether a step compared showed a border draw
    at_border: np.ndarray  # (N,) whether the step that differs did


def compare(live: Any, replayed: Any, prompt_ids: list[str], seed: int, borders: set[Place]) -> Wave:
    """One episode a lane under the same random actions, each to its end or to its first difference."""
    n, rng = len(prompt_ids), np.random.default_rng(seed)
    playing, over = np.ones(n, bool), np.zeros(n, bool)
    wave = Wave(np.zeros(n, int), np.zeros(n), [""] * n, np.zeros(n, bool), np.zeros(n, bool))
    single = isinstance(live, SyncVectorEnv)
    options = {"prompt_id": prompt_ids[0]} if single else {"prompt_ids": prompt_ids}
    mine, other = (envs.reset(seed=seed, options=options) for envs in (live, replayed))
    while True:
        wave.distance[playing] = np.maximum(wave.distance, np.abs(mine[0] - other[0]).max(1))[playing]
        border = shows_border(other[-1], borders) & playing
        wave.borders |= border
        for name, differs in differences(mine, other):
            for lane in np.flatnonzero(differs & playing):
                wave.found[lane], playing[lane] = f"{name} after {wave.steps[lane]} steps", False
                wave.at_border[lane] = border[lane]
        playing &= ~over
        if not playing.any():
            return wave
        actions = rng.integers(2, size=n)
        mine, other = live.step(actions), replayed.step(actions)
        wave.steps += playing
        over = mine[2] | mine[3]


def shows_border(info: dict[str, Any], borders: set[Place]) -> np.ndarray:
    """(N,) whether the step that ended with this info was an exit at one of the places."""
    layers = info.get("exit_layer", np.full(len(info["prompt_id"]), -1))  # a continue has none, or -1
    places = zip(info["prompt_id"], info["token_index"] - 1, layers, strict=True)
    return np.array([place in borders for place in places])


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
def computed_again(lm: LayeredLM, trace: Trace, among: set[str]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(prompt id, text, (C + 1, T, V) logits at the candidates and at full depth) of those prompts, by one forward
    each."""
    layers, geometry = (0, *trace.header.candidate_layers, lm.n_layers), lm.geometry
    prompts = {prompt.id: prompt.text for prompt in load_prompts("all", "all")}
    for text, prompt_id in enumerate(trace.prompt_ids):
        if prompt_id not in among:
            continue
        ids = lm.encode(prompts[prompt_id])
        ids, first = ids + trace.targets[slice(*trace.starts[text : text + 2])].tolist()[:-1], len(ids) - 1
        cache = KVCache(lm.n_layers, 1, geometry.kv_heads, len(ids), geometry.head_dim, lm.dtype, lm.device)
        span, x, logits = cache.span([0], [0], len(ids)), lm.embed(torch.tensor(ids)).unsqueeze(0), []
        for start, stop in pairwise(layers):
            x = lm.run(x, cache, span, start, stop)
            logits.append(lm.logits(x[0, first:]))
        yield prompt_id, text, torch.stack(logits)


def near_ties(lm: LayeredLM, trace: Trace, among: set[str], branches: bool) -> set[str]:
    """Those prompts somewhere in whose text the two best tokens' logits lie within TIE, at a candidate layer or at full
    depth; `branches`: or in what a layer would have drafted off it."""
    ties = set()
    branch_gap = trace.branch_raw[:, 0] - trace.branch_raw[:, 1]  # (M,)
    for prompt_id, text, logits in computed_again(lm, trace, among):
        best = logits.topk(2).values  # (C + 1, T, 2)
        gap = float((best[..., 0] - best[..., 1]).min())
        own = trace.branch[slice(*trace.starts[text : text + 2])]
        own = own[own >= 0]
        if branches and len(own):
            gap = min(gap, float(branch_gap[trace.branch_starts[own[0]] : trace.branch_starts[own[-1] + 1]].min()))
        if gap < TIE:
            ties.add(prompt_id)
    return ties


def border_draws(lm: LayeredLM, trace: Trace, among: set[str]) -> set[Place]:
    """Where in the texts of those prompts the target, or the draft at the layer, is drawn at a border."""
    header, places = trace.header, set()
    sampling = Sampling(header.temperature, header.top_k, header.top_p)
    for prompt_id, text, logits in computed_again(lm, trace, among):
        targets, draws = trace.targets[trace.starts[text] :].tolist(), Draws(int(trace.text_seeds[text]))
        for token, own in enumerate(logits.unbind(1)):  # (C + 1, V)
            near = drawn_at_border(sampling.probabilities(own), targets[token], draws.next(), draws.next())
            places |= {(prompt_id, token, header.candidate_layers[i]) for i in np.flatnonzero(near)}
    return places


def drawn_at_border(probabilities: torch.Tensor, target: int, u: float, coupling: float) -> np.ndarray:
    """(C,) whether a number less or more by up to BORDER draws another target, or another draft at the layer.

    As the live environment draws them: from (C + 1, V), the target by `u` and the drafts by `coupling`.
    """
    p, q = probabilities[-1], probabilities[:-1]
    low, high = around(u)
    if draw(p, low) != draw(p, high):
        return np.ones(len(q), bool)
    below, above = (coupled_drafts(p, q, target, each)[0] for each in around(coupling))
    return np.array(below) != np.array(above)


def around(u: float) -> tuple[float, float]:
    """BORDER less and BORDER more, within [0, 1)."""
    return max(u - BORDER, 0.0), min(u + BORDER, float(np.nextafter(1.0, 0.0)))


def choose(trace: Trace, args: Args) -> list[str]:
    """Prompts of the episodes: different ones, as far as there are."""
    return np.resize(np.random.default_rng(args.seed).permutation(list(trace.prompt_ids)), args.episodes).tolist()


def check(
    mdp: str, temperature: float, form: str, args: Args, ties: set[str], borders: set[Place], tick: Any
) -> dict[str, Any]:
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
        waves.append(compare(live, replayed, wave, args.seed + begin, borders))
        tick(len(chosen[begin : begin + lanes]))
    return {"MDP": mdp, "temperature": temperature, "form": "single" if lanes == 1 else f"vector of {lanes}"} | summary(
        waves, chosen, ties
    )


def summary(waves: list[Wave], chosen: list[str], ties: set[str]) -> dict[str, Any]:
    """What a row says of the episodes of the chosen prompts; the last wave may have more."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(wave, name) for wave in waves])[: len(chosen)]

    found, tied = joined("found"), np.array([prompt_id in ties for prompt_id in chosen])
    differs, apart = found != "", tied | joined("at_border")
    others = np.flatnonzero(differs & ~apart)
    return {
        "episodes": len(chosen),
        "steps": int(joined("steps").sum()),
        "with near ties": int((tied | joined("borders")).sum()),
        "counted apart": int(apart.sum()),
        "of them different": int((differs & apart).sum()),
        "others different": len(others),
        "largest distance": f"{joined('distance')[~apart].max(initial=0.0):.1e}",
        "first difference": f"{chosen[others[0]]}: {found[others[0]]}" if len(others) else "",
    }


def main(args: Args) -> int:
    console = Console()
    lm = lede_env.load_model("tiny", device="cpu")
    kinds = [kind for kind in CHECKS if kind[0] in args.mdps and kind[1] in args.temperatures]
    rows = []
    with progress_bar(console) as bar:
        task = bar.add_task("comparing", total=args.episodes * len(kinds) * len(FORMS))
        for mdp, temperature in kinds:
            trace = lede_env.load_trace(default_trace("tiny", temperature))
            among = set(choose(trace, args))
            ties = set() if temperature else near_ties(lm, trace, among, mdp == "draft")
            borders = border_draws(lm, trace, among) if temperature else set()
            for form in FORMS:
                rows.append(check(mdp, temperature, form, args, ties, borders, lambda n: bar.advance(task, n)))
    print_table("live against trace", rows, console)
    about = machine() | {
        "command": " ".join(["python -m benchmarks.live_trace", *sys.argv[1:]]),
        "model": "embedded, float32",
        "compared": f"observation to {TOLERANCE:g}; reward, flags, every info field exactly",
        "max_new_tokens": args.max_new_tokens,
    }
    if args.out is not None:
        write_results(args.out, "live_trace", rows, about)
    differ = any(row["others different"] for row in rows)
    many = any(row["counted apart"] > MOST_TIES * row["episodes"] for row in rows)
    console.print("live and trace differ" if differ else "but for near ties, live equals trace")
    if many:
        console.print(f"more than {MOST_TIES:.0%} of the episodes of a row are counted apart")
    return int(differ or many)


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main(tyro.cli(Args)))
