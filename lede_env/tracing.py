"""Recording a trace: the texts, and at every position what each candidate layer would have drafted, and then.

Texts come from the live backend itself, so a text is the one that the environment plays with the same seed. Branches
(what a layer goes on to draft after a wrong draft) share the text as their prefix, so all branches of a text are run
together, as extra queries of one row that see the prefix up to their own root, and their own tokens.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lede_env.data.trace_file import Trace, TraceHeader, quantize, text_digest
from lede_env.data.trace_layout import QUANTUM
from lede_env.digest import digest
from lede_env.engine.acceptance import Draws, Sampling, coupled_drafts, derive_seed, draw, draw_rows, first_uniforms
from lede_env.engine.kv_cache import KVCache, Span
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.lookup import Lookup
from lede_env.engine.round import DRAFT_CAP
from lede_env.engine.signals import RAW, raw_signals, shortfalls
from lede_env.envs.backends import LiveBackend, Signals
from lede_env.errors import LedeError
from lede_env.tasks import Prompt

TOGETHER = 256  # branches run at once: bounds the slots they take


def record_trace(
    lm: LayeredLM,
    prompts: Sequence[Prompt],
    candidate_layers: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    *,
    samples: int = 1,
    lanes: int = 32,
    command: str = "",
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Continue every prompt `samples` times and record the trace; `.save(path)` writes it.

    A text depends on (seed, prompt id, sample) alone. A prompt too long for the context is cut as the live environment
    cuts it, for `max_new_tokens`.

    Args:
        candidate_layers: ascending, within 1..L-1.
        lanes: texts decoded together.
        command: what the file says it was made by.
        progress: called with the number of texts finished, as it grows.

    Raises:
        LedeError: an argument out of range.
    """
    layers = tuple(int(layer) for layer in candidate_layers)
    for layer in layers:
        lm.check_exit_layer(layer)
    if not layers or list(layers) != sorted(set(layers)):
        raise LedeError(f"candidate_layers={layers} must be ascending and distinct, at least one")
    if not prompts or min(max_new_tokens, samples, lanes) < 1 or seed < 0:
        raise LedeError(
            f"{len(prompts)} prompts, max_new_tokens={max_new_tokens}, samples={samples} and lanes={lanes} must be at "
            f"least 1 each, and seed={seed} must not be negative"
        )
    if sampling.greedy and samples > 1:
        raise LedeError(f"samples={samples} at temperature 0 would all be the same text; use 1, or a temperature")
    seeds = np.array([text_seed(seed, prompt.id, sample) for prompt in prompts for sample in range(samples)])
    recorder = _Recorder(lm, list(prompts), min(lanes, len(seeds)), max_new_tokens, sampling, layers)
    texts: dict[int, dict[str, np.ndarray]] = {}
    for text, arrays in recorder.texts(seeds.tolist(), samples):
        texts[text] = arrays
        if progress:
            progress(len(texts))
    header = _header(lm, prompts, layers, max_new_tokens, sampling, samples, seed, recorder.layer_calls, command)
    return _assemble(header, prompts, seeds, [texts[text] for text in range(len(seeds))])


def text_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The key of a text's draws: what `LiveBackend.start` takes. 63 bits, as the environments draw it."""
    prompt = int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big")
    return derive_seed(seed, prompt, sample) >> 1


class _Recorder(LiveBackend):
    """A live backend that also keeps what only a trace needs, and hands over a text as soon as it is complete."""

    def __init__(
        self,
        lm: LayeredLM,
        prompts: list[Prompt],
        lanes: int,
        max_new_tokens: int,
        sampling: Sampling,
        candidate_layers: tuple[int, ...],
    ):
        super().__init__(lm, prompts, lanes, max_new_tokens, sampling, candidate_layers, features=())
        self.looks_up = True
        size, n = self.accepted.shape
        self.raw = np.zeros((size, n, RAW), np.float32)
        self.match = np.zeros(size, np.float32)
        self.neg_log_p_max = np.zeros(size, np.float32)
        self.shortfall = np.zeros((size, n), np.float32)
        self.accept_probability = np.zeros((size, n), np.float32)
        self.keep_probability = np.ones((size, n), np.float32)  # min(1, p(x) / q(x)), of the draft x
        self.layer_calls = 0  # layers times tokens
        self._chances = np.zeros((2, lanes, n), np.float32)  # accept and keep probabilities of each lane's latest draw
        self._drafter = _BranchDrafter(lm, candidate_layers, sampling, self.session.capacity)

    def texts(self, seeds: list[int], samples: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(number, arrays) of every text, in the order they finish; text t is a sample of prompt t // samples."""
        waiting = iter(range(len(seeds)))
        playing: dict[int, int] = {}  # lane -> text
        free = list(range(self.session.batch))
        while True:
            for lane in free:
                text = next(waiting, None)
                if text is not None:
                    playing[lane] = text
                    self.start(lane, text // samples, seeds[text])
                    self.layer_calls += self.session.lengths[lane] * self.lm.n_layers
            if not playing:
                break
            self.layer_calls += len(playing) * self.lm.n_layers
            self._forward()
            free = [lane for lane in playing if self._done[lane]]
            for lane in free:
                text = playing.pop(lane)
                yield text, self._finished(lane, seeds[text])
        self.layer_calls += self._drafter.layer_calls

    def _store(self, lanes: np.ndarray, logits: Tensor) -> Signals:
        rows = self.base[lanes] + self.known[lanes]
        signals = super()._store(lanes, logits)
        self.raw[rows], self.match[rows], self.neg_log_p_max[rows] = signals
        drafts = torch.as_tensor(self.drafts[rows].T.astype(np.int64), device=logits.device)  # (C, n)
        self.shortfall[rows] = shortfalls(logits[:-1], drafts).T.cpu().numpy()
        if self.sampling.greedy:
            self.accept_probability[rows] = self.accepted[rows]
        else:
            self.accept_probability[rows], self.keep_probability[rows] = self._chances[:, lanes]
        return signals

    def _sample(self, lane: int, logits: Tensor) -> tuple[int, list[int]]:
        """As the live backend's, draw for draw, but keeps the acceptance probabilities."""
        probabilities = self.sampling.probabilities(logits)
        draws = self._draws[lane]
        target = draw(probabilities[-1], draws.next())
        p, q = probabilities[-1], probabilities[:-1]
        drafts, chance = coupled_drafts(p, q, target, draws.next())
        drawn = torch.tensor(drafts, device=p.device)
        keep = p[drawn] / q.gather(1, drawn.unsqueeze(1)).squeeze(1)
        self._chances[:, lane] = torch.stack([chance, keep.clamp_max(1.0)]).cpu()
        return target, drafts

    def _finished(self, lane: int, seed: int) -> dict[str, np.ndarray]:
        """The arrays of a lane's text, and the branches from its wrong drafts, before the lane is used again."""
        rows = slice(self.base[lane], self.base[lane] + self.known[lane])
        names = ("targets", "neg_log_p_max", "raw", "match", "drafts", "shortfall", "accept_probability", "accepted")
        text = {name: getattr(self, name)[rows].copy() for name in names}
        text["coin"] = self._coins(seed, self.keep_probability[rows], text["accepted"])
        room = np.minimum(DRAFT_CAP - 1, self.positions - 1 - np.arange(self.known[lane]))  # tokens a branch may have
        wrong = ~text["accepted"] & ~np.isin(text["drafts"], self.lm.eos_ids) & (room > 0)[:, None]
        position, candidate = np.nonzero(wrong)  # in the order of (position, candidate)
        prefix = self.session.lengths[lane]  # slots with keys and values: the prompt, and all targets but the last
        roots = _Roots(
            slot=prefix - int(self.known[lane]) + 1 + position,
            candidate=candidate,
            token=text["drafts"][position, candidate],
            room=room[position],
            seed=[
                derive_seed(seed, at, self.candidate_layers[c])
                for at, c in zip(position.tolist(), candidate.tolist(), strict=True)
            ],
        )
        self._drafter.load(self.session.cache, lane, prefix)
        lookup = self._lookup[lane]
        assert lookup is not None  # `looks_up`
        return text | {"wrong": wrong} | self._drafter.draft(roots, prefix, lookup)

    def _coins(self, seed: int, keep: np.ndarray, accepted: np.ndarray) -> np.ndarray:
        """(n, C) the coins of drafts, from the chance of each to be kept, and whether it was.

        The coupling drew target and draft first. Given both, the number that speculative sampling would have decided by
        is uniform below that chance where the draft was accepted, and above it where it was not.
        """
        if self.sampling.greedy:
            return np.ones(keep.shape)
        path: Any = [np.arange(len(keep), dtype=np.uint64)[:, None], np.array(self.candidate_layers, np.uint64)]
        uniform = first_uniforms(cast(Any, derive_seed(seed, *path, 0)))  # elementwise; branches draw by (n, c)
        return np.where(accepted, keep * uniform, keep + (1.0 - keep) * uniform)


@dataclass(frozen=True)
class _Roots:
    """B wrong drafts of a text, from each of which drafting goes on."""

    slot: np.ndarray  # (B,) position of the wrong draft in the whole sequence, prompt included
    candidate: np.ndarray  # (B,) index of the layer that drafts
    token: np.ndarray  # (B,) the wrong draft
    room: np.ndarray  # (B,) most drafts that may follow
    seed: list[int]  # (B,) keys of their draws

    def __len__(self) -> int:
        return len(self.slot)

    def take(self, index: np.ndarray) -> _Roots:
        seed = [self.seed[i] for i in index.tolist()]
        return _Roots(self.slot[index], self.candidate[index], self.token[index], self.room[index], seed)


class _BranchDrafter:
    """Drafts on from the wrong drafts of one text, all at once: no copy of the keys and values for each.

    One row of cache, as deep as the deepest candidate. Its first slots are the text; every step appends a slot for
    each branch that goes on. A branch's query takes its rotary position from where it stands in the sequence, and its
    mask lets it see the text before its root, and its own slots.
    """

    def __init__(self, lm: LayeredLM, candidate_layers: tuple[int, ...], sampling: Sampling, longest: int):
        self.lm, self.candidate_layers, self.sampling = lm, candidate_layers, sampling
        self.layer_calls = 0
        geometry = lm.geometry
        self.cache = KVCache(
            candidate_layers[-1],
            1,
            geometry.kv_heads,
            longest + TOGETHER * (DRAFT_CAP - 1),
            geometry.head_dim,
            lm.dtype,
            lm.device,
        )

    def load(self, source: KVCache, row: int, prefix: int) -> None:
        """Copy a text's keys and values: the first `prefix` slots of a row."""
        for layer in range(self.candidate_layers[-1]):
            self.cache.keys[layer][0, :, :prefix] = source.keys[layer][row, :, :prefix]
            self.cache.values[layer][0, :, :prefix] = source.values[layer][row, :, :prefix]

    def draft(self, roots: _Roots, prefix: int, lookup: Lookup) -> dict[str, np.ndarray]:
        """Branches of all roots: `branch_lengths` (B,); `branch_tokens`, `branch_match`, `branch_shortfall`,
        `branch_coin` (M,) and `branch_raw` (M, RAW).

        `lookup` holds the whole sequence, prompt and text.
        """
        tables = _tables(len(roots))
        for begin in range(0, len(roots), TOGETHER):
            part = np.arange(begin, min(begin + TOGETHER, len(roots)))
            part = part[np.argsort(roots.candidate[part], kind="stable")]  # those that go deeper come later
            for name, values in self._run(roots.take(part), prefix, lookup).items():
                tables[name][part] = values
        made = tables["branch_tokens"] >= 0
        return {"branch_lengths": made.sum(1)} | {name: table[made] for name, table in tables.items()}

    @torch.inference_mode()
    def _run(self, roots: _Roots, prefix: int, lookup: Lookup) -> dict[str, np.ndarray]:
        """The `_tables` of branches in ascending order of their layers."""
        device, n = self.lm.device, len(roots)
        tables = _tables(n)
        tokens, raw, match, shortfall, coin = tables.values()
        drafted = [[token] for token in roots.token.tolist()]  # of each branch, the wrong draft included
        draws = [Draws(seed) for seed in roots.seed]
        slot = torch.as_tensor(roots.slot, device=device)  # (B,)
        mask = torch.zeros(n, prefix + int(roots.room.sum()), dtype=torch.bool, device=device)  # (B, slots)
        mask[:, :prefix] = self.cache.slots[:prefix] < slot.unsqueeze(1)
        pending, active, stop = roots.token.copy(), np.arange(n), prefix
        for step in range(DRAFT_CAP - 1):
            active = active[(roots.room[active] > step) & ~np.isin(pending[active], self.lm.eos_ids)]
            if not len(active):
                break
            start, stop = stop, stop + len(active)
            index = torch.as_tensor(active, device=device)
            mask[index, self.cache.slots[start:stop]] = True
            x = self.lm.embed(torch.as_tensor(pending[active], device=device))
            states = self._exits(x, slot[index] + step, roots.candidate[active], mask[index, :stop], start)
            logits = self.lm.logits(states)  # (Q, V)
            found = [lookup.guess(drafted[i], start=int(roots.slot[i])) for i in active.tolist()]
            guesses = torch.tensor([token for token, _ in found], device=device)
            raw[active, step] = raw_signals(logits, guesses).float().cpu().numpy()
            match[active, step] = [share for _, share in found]
            chosen, coin[active, step] = self._choose(logits, [draws[i] for i in active.tolist()])
            tokens[active, step] = pending[active] = chosen
            shortfall[active, step] = shortfalls(logits, torch.as_tensor(chosen, device=device)).cpu().numpy()
            for i in active.tolist():
                drafted[i].append(int(pending[i]))
        return tables

    def _exits(self, x: Tensor, positions: Tensor, candidate: np.ndarray, mask: Tensor, start: int) -> Tensor:
        """(Q, H) states at layer 0 -> (Q, H) states at each query's own layer; queries in ascending order of it."""
        stop, first, below = start + len(x), 0, 0  # `first`: the first query that has not left yet
        left = []
        for last, layer in zip(np.searchsorted(candidate, range(len(self.candidate_layers)), "right").tolist(),
                               self.candidate_layers, strict=True):  # fmt: skip
            if start + first == stop:
                break
            span = Span(slice(None), positions[first:].unsqueeze(0), start + first, stop, True, mask[first:])
            x = self.lm.run(x.unsqueeze(0), self.cache, span, below, layer)[0]
            self.layer_calls += len(x) * (layer - below)
            left.append(x[: last - first])
            x, first, below = x[last - first :], last, layer
        return torch.cat(left)

    def _choose(self, logits: Tensor, draws: list[Draws]) -> tuple[np.ndarray, np.ndarray]:
        """(Q, V) logits -> (Q,) drafts and (Q,) their coins, each by its own draws."""
        if self.sampling.greedy:
            return logits.argmax(-1).cpu().numpy(), np.ones(len(logits))
        drafts = draw_rows(self.sampling.probabilities(logits), [own.next() for own in draws])
        return np.array(drafts), np.array([own.next() for own in draws])


def _tables(branches: int) -> dict[str, np.ndarray]:
    """Places for the drafts of B branches: (B, cap - 1) each, the raw signals (B, cap - 1, RAW); tokens that a branch
    does not come to are -1."""
    shape = (branches, DRAFT_CAP - 1)
    return {
        "branch_tokens": np.full(shape, -1, np.int32),
        "branch_raw": np.zeros((*shape, RAW), np.float32),
        "branch_match": np.zeros(shape, np.float32),
        "branch_shortfall": np.zeros(shape, np.float32),
        "branch_coin": np.ones(shape, np.float32),
    }


def _header(
    lm: LayeredLM,
    prompts: Sequence[Prompt],
    candidate_layers: tuple[int, ...],
    max_new_tokens: int,
    sampling: Sampling,
    samples: int,
    seed: int,
    layer_calls: int,
    command: str,
) -> TraceHeader:
    packages = ("lede-env", "torch", "transformers", "numpy", "h5py")
    return TraceHeader(
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
        dtype=str(lm.dtype).removeprefix("torch."),
        n_layers=lm.n_layers,
        vocab=lm.geometry.vocab,
        eos_ids=tuple(lm.eos_ids),
        candidate_layers=candidate_layers,
        draft_cap=DRAFT_CAP,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=max_new_tokens,
        samples=samples,
        seed=seed,
        prompts_digest=digest([(prompt.id, prompt.task, text_digest(prompt.text)) for prompt in prompts]),
        layer_calls=layer_calls,
        software={"python": platform.python_version(), **{name: version(name) for name in packages}},
        command=command,
    )


def _assemble(
    header: TraceHeader, prompts: Sequence[Prompt], seeds: np.ndarray, texts: list[dict[str, np.ndarray]]
) -> Trace:
    """Join the texts' arrays; number their branches."""
    joined = {name: np.concatenate([text[name] for text in texts]) for name in texts[0]}
    wrong, lengths = joined.pop("wrong"), joined.pop("branch_lengths")
    branch = np.full(wrong.shape, -1)
    branch[wrong] = np.arange(len(lengths))
    joined |= {name: quantize(joined[name], header.vocab) for name in ("raw", "branch_raw")}
    joined |= {name: np.rint(joined[name] / QUANTUM) * QUANTUM for name in ("shortfall", "branch_shortfall")}
    joined |= {name: np.maximum(np.rint(joined[name] / QUANTUM), 1) * QUANTUM for name in ("coin", "branch_coin")}
    return Trace(
        header,
        prompt_ids=tuple(prompt.id for prompt in prompts),
        prompt_tasks=tuple(prompt.task for prompt in prompts),
        prompt_splits=tuple(prompt.split for prompt in prompts),
        prompt_digests=tuple(text_digest(prompt.text) for prompt in prompts),
        text_seeds=seeds,
        starts=np.cumsum([0, *(len(text["targets"]) for text in texts)]),
        branch=branch,
        branch_starts=np.cumsum([0, *lengths]),
        **cast(dict[str, Any], joined),
    )
