"""A session of one sequence on CUDA: every segment of the model a captured graph over static buffers.

Kernels read the position, the open slot, the lookup's guess and the uniform numbers of draws from a small `state` on
the device, which each graph fetches first (`lede_env.engine.cuda.mailbox`), so a graph serves every round. Nothing here
waits for the device but `drawn` and `verified`; the decoder launches the next draft's layers before it asks
(`lede_env.decoding.pipelined`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lede_env.engine.acceptance import Sampling, residual
from lede_env.engine.cuda import layers
from lede_env.engine.cuda.attention import Attention
from lede_env.engine.cuda.linear import Gained, gain, linear
from lede_env.engine.cuda.mailbox import Mailbox
from lede_env.engine.cuda.outlook import Outlook
from lede_env.engine.cuda.readout import ReadOut
from lede_env.engine.cuda.verdict import Verdict
from lede_env.engine.read_signals import SIZE, TOKEN, TOKEN_LOGIT
from lede_env.engine.round import DRAFT_CAP
from lede_env.engine.session import Session
from lede_env.engine.signals import warmth

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM

# Whole numbers of `state`: length, or -1 for what the last verdict leaves; slot; guess or -1; token or -1; drafts.
INTS = 5
GRAPHS = 256  # captured at a time; the least used goes first
POSITIONS = 1024  # capacities are rounded up to a multiple, so that a session serves the next prompt too
IDLE = 3  # sessions of a model kept for later
CAPTURED = 512  # positions up to which a prompt runs as a graph
LONGEST = 4096  # positions up to which a prompt runs in one piece, for the memory it takes


def borrow(lm: LayeredLM, capacity: int, width: int, taps: Sequence[int]) -> GraphSession:
    """An idle session with that much room, or a new one, for which those of the kind that are too small make way.

    Plain steps run one row whatever the width, so what never drafts shares the session of what does. A session returns
    when its `with` block ends.
    """
    width = DRAFT_CAP + 1 if width == 1 else width
    kind = (width, tuple(taps))
    fitting = next((s for s in lm.idle if s.capacity >= capacity and (s.width, s.taps) == kind), None)
    if fitting is not None:
        lm.idle.remove(fitting)
        return fitting
    lm.idle[:] = [session for session in lm.idle if (session.width, session.taps) != kind]
    room = min(-(-capacity // POSITIONS) * POSITIONS, lm.geometry.context)
    return GraphSession(lm, max(room, capacity), width, taps)


class GraphSession(Session):
    """As `Session` with one row, its layers, heads and draws on captured graphs.

    `hidden[0]` are the open slots. Segments run one row, or `width` of them from the open slot on: padding costs
    nothing where reading the weights does.
    """

    SLACK = 2

    def __init__(self, lm: LayeredLM, capacity: int, width: int, taps: Sequence[int]):
        super().__init__(lm, 1, capacity, width, taps)
        g, device = lm.geometry, lm.device
        self.taps = tuple(taps)
        rows = (g.heads + 2 * g.kv_heads) * g.head_dim
        self._qkv = torch.zeros(width, rows, dtype=lm.dtype, device=device)
        self._mixed = torch.zeros(width, g.heads * g.head_dim, dtype=lm.dtype, device=device)
        self._inner = torch.zeros(width, g.mlp, dtype=lm.dtype, device=device)
        self._gained = {n: Gained.empty(n, g.hidden, lm.dtype, device) for n in (1, width)}
        self._attend = {n: Attention(n, g.heads, g.kv_heads, g.head_dim, device) for n in (1, width)}
        self._read, self._judge = ReadOut(g.vocab, device), Verdict(width, g.vocab, device)
        self._draft_logits = torch.zeros(width, g.vocab, device=device)  # row i is what draft i was drawn from
        self._logits = torch.zeros(width, g.vocab, device=device)  # of the last verification
        self._tokens = torch.zeros(width + 1, dtype=torch.long, device=device)  # of the open slots
        self._prompt = torch.zeros(CAPTURED, dtype=torch.long, device=device)  # what a graph prefills
        self._rope = torch.view_as_real(lm.rope)
        self._offsets = torch.arange(width, device=device)
        self._mail = Mailbox(INTS, width + 1, device)
        self._state, self._uniforms = self._mail.state, self._mail.floats
        self._out = torch.zeros(SIZE, device=device)
        self._outs, self._ready = self._mail.answers(SIZE, torch.float32), torch.cuda.Event()
        # accepted drafts and the token after them; -log p_max of each open slot
        self._verdict = torch.zeros(2 + width, dtype=torch.float64, device=device)
        self._verdicts = self._mail.answers(2 + width, torch.float64)
        self._settled = deque((0, torch.cuda.Event()) for _ in range(2))  # rows of the last two; events
        self._row = 0  # of the last read-out
        self._ahead = 0  # layers that `open_ahead` ran
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()

    @torch.inference_mode()  # as everything that writes into its tensors
    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._ahead = 0
        self._mail.rewind()
        self.lm.idle.insert(0, self)
        del self.lm.idle[IDLE:]

    @torch.inference_mode()
    def prefill(self, row: int, ids: list[int]) -> Tensor:
        """As in `Session`; without taps, and but for very long prompts, in one piece.

        Short ones run as graphs, padded at the end to one of a few lengths: no position sees a later one, and what
        padding leaves in the cache is overwritten.
        """
        count = len(ids)
        if self.tapped or not 0 < count <= LONGEST:
            return super().prefill(row, ids)
        self._forget(row, count)
        if count <= CAPTURED:
            size = min(padded(count), self.capacity)
            prompt = self._prompt[:size]
            prompt[:count] = torch.tensor(ids)
            self._replay(("prefill", size), lambda: layers.prefill(self.lm, self.cache, prompt), slot=0)
        else:
            layers.prefill(self.lm, self.cache, torch.tensor(ids, device=self.lm.device))
        self.lengths[row] = count
        return self.hidden.new_zeros(0, 0, self.hidden.shape[-1])

    def _forget(self, row: int, length: int) -> None:
        super()._forget(row, length)
        self._ahead = 0

    # What the decoder asks for, in this order: `open`, then `extend`, `read` and `drawn` for each draft, `verify`.

    def open(self, token: int, goal: int) -> None:
        """Begin a round: slot 0 holds the pending token; run it through layers 1..goal."""
        ahead, self._ahead = self._ahead, 0
        if 0 < ahead <= goal:
            self.depth[0].append(ahead)
            self.advance([0], [goal])
        else:
            self._enter(goal, token)

    def open_ahead(self, goal: int) -> None:
        """After `verify`, before anybody knows its verdict: the next round's slot 0 through layers 1..goal."""
        self._replay(("enter", goal), lambda: self._embed_and_run(goal), length=-1, slot=0)
        self._ahead = goal

    def step(self, token: int, uniforms: Sequence[float], sampling: Sampling, doubts: bool) -> None:
        """A plain round as a whole, of the pending token or, -1, of the last step's, still on the device."""

        def body() -> None:
            self._embed_and_run(self.lm.n_layers)
            self._verify(1, sampling, doubts)

        self._ahead = 0
        self._settle(self._replay(("step", sampling, doubts), body, slot=0, token=token, uniforms=uniforms))

    def extend(self, goal: int) -> None:
        """Open the next slot with the token just drawn, still on the device, and run it through layers 1..goal."""
        self._enter(goal, -1)

    def withdraw(self) -> None:
        """Close the slot opened last, as if it had never been."""
        self.depth[0].pop()

    def _enter(self, goal: int, token: int) -> None:
        depth = self.depth[0]
        first = min([goal, *depth[-1:]])  # where waiting slots, if there are, begin to ride along
        depth.append(first)
        self._replay(("enter", first), lambda: self._embed_and_run(first), slot=len(depth) - 1, token=token)
        self.advance([0], [goal])

    def read(self, guess: int, uniform: float | None, sampling: Sampling, outlook_layer: int = 0) -> None:
        """Read the newest slot's distribution where it stands, and draw the draft that leaves there.

        A later `read` of the slot, at a deeper layer, draws anew.
        outlook_layer: where it stands, if the acceptance head is to say what it thinks of the draft.
        """
        if outlook_layer:
            self._outlook.head.candidate(outlook_layer)  # an error leaves nothing half launched
        uniforms = () if uniform is None else (uniform,)
        slot = len(self.depth[0]) - 1
        key, body = ("read", sampling, outlook_layer), lambda: self._read_out(sampling, outlook_layer)
        self._row = self._replay(key, body, slot=slot, guess=guess, uniforms=uniforms)
        self._ready.record()

    def drawn(self) -> list[float]:
        """Wait for the last `read`: its read-out, see `lede_env.engine.read_signals`."""
        self._ready.synchronize()
        return self._outs[self._row].tolist()

    def verify(self, uniforms: Sequence[float], sampling: Sampling, doubts: bool) -> None:
        """Run every open slot to full depth and settle the drafts, with the coin of each and the number that draws what
        follows.

        doubts: whether `verified` is to tell -log p_max.
        """
        self.advance([0], [self.lm.n_layers])
        drafts = len(self.depth[0]) - 1
        rows = self.width if drafts else 1
        key, body = ("verify", rows, sampling, doubts), lambda: self._verify(rows, sampling, doubts)
        self._settle(self._replay(key, body, slot=0, drafts=drafts, uniforms=uniforms))

    def _settle(self, row: int) -> None:
        """Remember where the verdict will be, and the one before: the host may not have read it yet."""
        _, ready = self._settled.popleft()
        ready.record()
        self._settled.append((row, ready))

    def verified(self, earlier: int = 0) -> tuple[int, int, list[float]]:
        """Wait for `verify` or `step`, the last one or the one before: drafts accepted, the token after them, and
        -log p_max of each slot."""
        row, ready = self._settled[-1 - earlier]
        ready.synchronize()
        accepted, token, *doubts = self._verdicts[row].tolist()
        return int(accepted), int(token), doubts

    # Moving slots: what `Session.advance` calls.

    def advance(self, rows: list[int], targets: list[int]) -> None:
        """As in `Session`, but tapped layers are no stops: a segment copies their states as it passes."""
        depth, goal = self.depth[0], targets[0]
        while depth[-1] < goal:
            first, tail = depth[-1], depth.index(depth[-1])
            last = min([goal, *(d for d in depth if first < d)])
            count = len(depth) - tail
            self._replay(*self._segment(first, last, 1 if count == 1 else self.width), slot=tail)
            depth[tail:] = [last] * count

    def _segment(self, first: int, last: int, rows: int) -> tuple[tuple, Callable[[], None]]:
        return ("run", first, last, rows), lambda: self._run(first, last, rows)

    # Bodies of graphs: nothing in them may depend on the round.

    def _embed_and_run(self, last: int) -> None:
        self._run(0, last, 1, embed=(self.lm.embedding, self._tokens))

    def _run(self, first: int, last: int, rows: int, embed: tuple[Tensor, Tensor] | None = None) -> None:
        """Layers first+1..last over `rows` rows from the open slot on, in place."""
        lm, x, state, gained = self.lm, self.hidden[0], self._state, self._gained[rows]
        moved = state[1] + self._offsets[:rows]
        gain(x, lm.layers[first].attention_norm, gained, state, embed)
        for index in range(first, last):
            layer = lm.layers[index]
            following = lm.layers[index + 1].attention_norm if index + 1 < lm.n_layers else lm.final_norm
            linear(gained, layer.qkv, self._qkv, state, rows, eps=lm.norm_eps, bias=layer.qkv_bias)
            keys, values = self.cache.keys[index], self.cache.values[index]
            self._attend[rows](self._qkv, keys, values, self._rope, self._mixed, state)
            linear(self._mixed, layer.out, x, state, rows, residual=(layer.mlp_norm, gained))
            linear(gained, layer.gate_up, self._inner, state, rows, eps=lm.norm_eps, gated=True)
            linear(self._inner, layer.down, x, state, rows, residual=(following, gained))
            if index + 1 in self.tapped:
                self.tapped[index + 1][0].index_copy_(0, moved, x.index_select(0, moved))

    def _head(self, logits: Tensor, rows: int) -> None:
        """Logits of `rows` rows from the open slot on, into the same rows of `logits`."""
        lm, gained = self.lm, self._gained[rows]
        gain(self.hidden[0], lm.final_norm, gained, self._state)
        linear(gained, lm.head, logits, self._state, rows, eps=lm.norm_eps, out_at_slot=True)

    def _read_out(self, sampling: Sampling, outlook_layer: int = 0) -> None:
        self._head(self._draft_logits, 1)
        temperature = None if sampling.filters else sampling.temperature
        self._read(self._draft_logits, self._out, self._tokens, self._state, self._uniforms, temperature)
        if sampling.filters:
            self._draw(sampling)
        if outlook_layer:
            candidate = self._outlook.head.candidate(outlook_layer)
            self._outlook(self.hidden[0], self._out, self._state, candidate, warmth(sampling.temperature))
        self._mail.answer(self._out, self._outs)

    @cached_property
    def _outlook(self) -> Outlook:
        assert self.lm.acceptance_head is not None  # whoever reads it has one
        return Outlook(self.lm.acceptance_head, self.lm.final_norm, self.lm.norm_eps)

    def _draw(self, sampling: Sampling) -> None:
        slot = self._state[1:2]
        logits = self._draft_logits.index_select(0, slot)
        token = draw(sampling.probabilities(logits), self._uniforms[:1])
        self._tokens.index_copy_(0, slot + 1, token)
        self._out[TOKEN : TOKEN + 1] = token
        self._out[TOKEN_LOGIT : TOKEN_LOGIT + 1] = logits[0].gather(0, token)

    def _verify(self, rows: int, sampling: Sampling, doubts: bool) -> None:
        """As `greedy_match` and `speculative_matches` settle a round, without asking the host."""
        self._head(self._logits, rows)
        logits, drafts, state = self._logits[:rows], self._draft_logits, self._state
        if sampling.filters:
            accepted, following = self._speculate(logits, sampling)
            self._tokens[:1] = following  # the next round's pending token
            self._verdict[:1], self._verdict[1:2] = accepted, following
            self._mail.follows[:1] = state[:1] + accepted + 1
            if doubts:
                self._verdict[2 : 2 + rows] = logits.logsumexp(-1) - logits.amax(-1)
        else:
            its = (self._tokens, self._uniforms, self._verdict, state, self._mail.follows)
            self._judge(logits, drafts, *its, sampling.temperature, doubts)
        self._mail.answer(self._verdict, self._verdicts)

    def _speculate(self, logits: Tensor, sampling: Sampling) -> tuple[Tensor | int, Tensor]:
        """Drafts that speculative sampling accepts, and the token after them, (1,)."""
        p, rows, drafts = sampling.probabilities(logits), len(logits), self._state[4]
        if rows == 1:
            return 0, draw(p, self._uniforms[:1])
        q, tokens = sampling.probabilities(self._draft_logits[:rows]), self._tokens[1 : rows + 1, None]
        p_x, q_x = p.gather(1, tokens)[:, 0].double(), q.gather(1, tokens)[:, 0].double()
        made = self._offsets[:rows] < drafts
        accepted = ((self._uniforms[:rows] * q_x < p_x) & made).long().cumprod(0).sum()
        drawn_from = torch.where(accepted < drafts, q.index_select(0, accepted[None]), 0.0)
        weights = residual(p.index_select(0, accepted[None]), drawn_from)
        return accepted, draw(weights, self._uniforms.index_select(0, drafts[None]))

    def _replay(self, key: tuple, body: Callable[[], None], uniforms: Sequence[float] = (), **state: int) -> int:
        """Tell the device where the graph stands, and launch it; returns the row of its answer, if it gives one."""
        row = self._mail.post(self._place(**state), uniforms)
        self.graph(key, body).replay()
        return row

    def _place(
        self, *, slot: int, guess: int = -1, token: int = -1, drafts: int = 0, length: int | None = None
    ) -> tuple[int, ...]:
        return self.lengths[0] if length is None else length, slot, guess, token, drafts

    def fill(self, slot: int) -> None:
        """Have every graph from now on stand there: to time one, replayed over and over."""
        self._mail.post_everywhere(self._place(slot=slot), ())

    def graph(self, key: tuple, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph that fetches its state and runs a body, captured at its first use."""
        if key not in self._graphs:
            self._graphs[key] = self._capture(body)
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        def whole() -> None:
            self._mail.fetch()
            body()

        kept = [(tensor, tensor.clone()) for tensor in (self.hidden, self._tokens, self._mail.turn)]
        whole()  # compiles the kernels; what else it writes, the graph writes again
        for tensor, before in kept:
            tensor.copy_(before)
        torch.cuda.synchronize(self.lm.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            whole()
        return graph


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """A token, (1,), from (1, V) non-negative weights and a (1,) uniform number on the device: as `draw_rows`."""
    total = weights.double().cumsum(-1)
    return torch.searchsorted(total, total[:, -1:] * uniform, right=True)[0]


def padded(length: int) -> int:
    """The length a short prompt is padded to."""
    step = 32 if length <= 128 else 64
    return -(-length // step) * step
