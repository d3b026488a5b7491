"""Whether the arrays of a trace agree with each other and with its header."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lede_env.data.trace_layout import LOG_FLOOR, MAX_SLOPE, RAW, SAID, STRINGS, TOP
from lede_env.errors import LedeError

if TYPE_CHECKING:
    from lede_env.data.trace_file import Trace


def check_trace(trace: Trace, path: str | os.PathLike) -> None:
    """Raise a LedeError that names `path` unless all arrays agree with each other and with the header."""

    def demand(right: Any, what: str) -> None:
        if not np.all(right):
            raise LedeError(f"{path}: corrupted: {what}; record the trace again")

    header = trace.header
    layers = header.candidate_layers
    demand(
        len(layers) and list(layers) == sorted(set(layers)) and 1 <= layers[0] <= layers[-1] < header.n_layers,
        f"candidate_layers {layers} are not ascending within 1..{header.n_layers - 1}",
    )
    demand(
        min(header.samples, header.max_new_tokens, header.draft_cap, header.vocab) >= 1,
        "samples, max_new_tokens, draft_cap and vocab must be at least 1",
    )
    _check_shapes(trace, demand)
    for name in ("targets", "drafts", "branch_tokens"):
        tokens = getattr(trace, name)
        demand((tokens >= 0) & (tokens < header.vocab), f"{name} has ids outside 0..{header.vocab - 1}")
    for name in ("raw", "branch_raw"):
        raw = getattr(trace, name)
        low, high = ([LOG_FLOOR] * TOP + [0.0, LOG_FLOOR]), ([0.0] * TOP + [math.log(header.vocab), 0.0])
        demand((raw >= np.array(low)) & (raw <= np.array(high)), f"{name} is out of its bounds")
    for name in ("shortfall", "branch_shortfall"):
        short = getattr(trace, name)
        most = -LOG_FLOOR if header.temperature > 0 else 0.0
        demand((short >= 0) & (short <= most), f"{name} is not in [0, {most:g}]")
    for name in ("coin", "branch_coin"):
        coin = getattr(trace, name)
        demand((coin > 0) & (coin <= 1), f"{name} is not in (0, 1]")
        demand(header.temperature > 0 or (coin == 1).all(), f"{name} is not 1, though the texts are greedy")
    for name in ("match", "branch_match"):
        match = getattr(trace, name)
        demand((match >= 0) & (match <= 1), f"{name} is not in [0, 1]")
    for said in (trace.outlook, trace.branch_outlook):
        if said is None:
            continue
        demand(np.isfinite(said), "what the acceptance head says is not finite")
        demand((said[..., 1] >= 0) & (said[..., 1] <= MAX_SLOPE), f"its slope is not in [0, {MAX_SLOPE:g}]")
    demand((trace.neg_log_p_max >= 0) & (trace.neg_log_p_max <= -LOG_FLOOR), "neg_log_p_max is out of its bounds")
    chance = trace.accept_probability
    demand((chance >= 0) & (chance <= 1), "accept_probability is not in [0, 1]")
    if header.temperature == 0:
        demand(chance == trace.accepted, "accept_probability is not accepted, though the texts are greedy")
    demand(trace.accepted == (trace.drafts == trace.targets[:, None]), "accepted is not drafts == targets")
    _check_texts(trace, demand)
    _check_branches(trace, demand)


def _check_shapes(trace: Trace, demand: Callable[[Any, str], None]) -> None:
    prompts, rows, candidates = len(trace.prompt_ids), len(trace.targets), len(trace.header.candidate_layers)
    texts, branches, tokens = prompts * trace.header.samples, len(trace.branch_starts) - 1, len(trace.branch_tokens)
    shapes: dict[str, tuple[int, ...]] = {
        "text_seeds": (texts,),
        "starts": (texts + 1,),
        "targets": (rows,),
        "neg_log_p_max": (rows,),
        "raw": (rows, candidates, RAW),
        "match": (rows,),
        "branch_starts": (branches + 1,),
        "branch_tokens": (tokens,),
        "branch_shortfall": (tokens,),
        "branch_coin": (tokens,),
        "branch_raw": (tokens, RAW),
        "branch_match": (tokens,),
        "outlook": (rows, candidates, SAID),
        "branch_outlook": (tokens, SAID),
    }
    demand(branches >= 0, "branch_starts is empty")
    demand((trace.outlook is None) == (trace.branch_outlook is None), "of outlook and branch_outlook one is missing")
    for name in trace.types:
        shape, expected = getattr(trace, name).shape, shapes.get(name, (rows, candidates))
        demand(shape == expected, f"{name} is {shape}; expected {expected}")
    for name in STRINGS:
        demand(len(getattr(trace, name)) == prompts, f"{name} does not have one entry a prompt")
    demand(prompts >= 1 and len(set(trace.prompt_ids)) == prompts, "prompt_ids are none, or not distinct")


def _check_texts(trace: Trace, demand: Callable[[Any, str], None]) -> None:
    starts, lengths, most = trace.starts, np.diff(trace.starts), trace.header.max_new_tokens + 1
    demand(starts[0] == 0 and starts[-1] == len(trace.targets), "starts do not span the positions")
    demand((lengths >= 1) & (lengths <= most), f"texts do not have 1..{most} positions")
    ends = trace.ends[starts[1:] - 1]
    demand(ends | (lengths == most), "a text neither ends by an EOS nor has all its positions")
    demand(trace.ends.sum() == ends.sum(), "a text goes on after an EOS")


def _check_branches(trace: Trace, demand: Callable[[Any, str], None]) -> None:
    header, starts, lengths = trace.header, trace.branch_starts, np.diff(trace.branch_starts)
    row = np.arange(len(trace.targets)) - np.repeat(trace.starts[:-1], np.diff(trace.starts))  # within its text
    room = np.minimum(header.draft_cap - 1, header.max_new_tokens - row)[:, None]  # most tokens of a branch
    wanted = ~trace.accepted & ~np.isin(trace.drafts, header.eos_ids) & (room > 0)
    demand((trace.branch >= 0) == wanted, "branches are not where wrong drafts are")
    demand(np.array_equal(trace.branch[wanted], np.arange(len(lengths))), "branches are not in order")
    demand(starts[0] == 0 and starts[-1] == len(trace.branch_tokens), "branch_starts do not span the branch tokens")
    room = np.broadcast_to(room, wanted.shape)[wanted]  # (B,)
    demand((lengths >= 1) & (lengths <= room), "a branch is empty or too long")
    eos = np.isin(trace.branch_tokens, header.eos_ids)
    demand(eos[starts[1:] - 1] | (lengths == room), "a branch is too short")
    demand(eos.sum() == eos[starts[1:] - 1].sum(), "a branch goes on after an EOS")
