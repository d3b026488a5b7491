"""One round of one sequence on CUDA graphs, the host always a draft ahead of the decisions.

A drawn token is always verified, so it must pass the early layers whatever the strategy says next. They are launched
before the host waits for the token: while they run it reads the signals, asks the strategy and looks up the text, and
the device never stands idle for it. Likewise with the next round, whose token and place the verdict leaves on the
device: its first layers are launched before the verdict is read, as deep as this round began. Where a walk from layer
to layer decides, what is launched is a guess, that the draft leaves where the last one did: if it walks on, the slot
opened for the next token is withdrawn.
The rounds are those of `lede_env.decoding.rounds.play_round`, which plays them everywhere else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lede_env.decoding.rounds import Row, goes_on, settle
from lede_env.decoding.stopwatch import Lap
from lede_env.engine.acceptance import Sampling
from lede_env.engine.read_signals import TOKEN, ReadSignals
from lede_env.engine.signals import no_lap

if TYPE_CHECKING:
    from lede_env.engine.cuda.session import GraphSession


@torch.inference_mode()
def play_round(session: GraphSession, rows: list[Row], sampling: Sampling, lap: Lap = no_lap) -> None:
    """One round of the one row there is, by the round protocol of design section 4."""
    (row,) = rows
    row.open_round()
    if row.limit == 0:
        _step(session, row, sampling)
        lap("verification")
        return
    path = row.control.path(row.round)
    opened = path[0]
    session.open(row.pending, opened)
    lap("drafting layers")
    more = True
    while more:
        path, more = _draft(session, row, path, sampling, lap)
    uniforms = () if sampling.greedy else (*row.coins, row.draws.next())
    session.verify(uniforms, sampling, doubts=row.trace is not None)
    lap("verification")
    if not row.control.taps and len(row.tokens) + len(row.round.drafts) + 1 < row.budget:
        session.open_ahead(opened)
        lap("drafting layers")
    accepted, token, doubts = session.verified()
    settle(session.lm, row, (accepted, token), doubts)
    if row.control.taps:
        row.round.studied = row.control.study(session.tapped_states(0, accepted + 1), session.lm)
    session.close_round(0, accepted + 1)
    lap("verification")


def _step(session: GraphSession, row: Row, sampling: Sampling) -> None:
    """A round without drafts. Where all rounds are, the next one is launched before this one's token is known."""
    plain, doubts = row.control.cap == 0, row.trace is not None
    if not (plain and row.tokens):  # else the round before launched it
        session.step(row.pending, () if sampling.greedy else (row.draws.next(),), sampling, doubts)
        session.close_round(0, 1)
    ahead = plain and len(row.tokens) + 1 < row.budget
    if ahead:
        session.step(-1, () if sampling.greedy else (row.draws.next(),), sampling, doubts)
        session.close_round(0, 1)
    _, token, beliefs = session.verified(earlier=int(ahead))
    settle(session.lm, row, (0, token), beliefs)
    if row.control.taps:
        row.round.studied = row.control.study(session.tapped_states(0, 1), session.lm)


def _draft(
    session: GraphSession, row: Row, path: tuple[int, ...], sampling: Sampling, lap: Lap
) -> tuple[tuple[int, ...], bool]:
    """Make the next draft; its slot stands at the path's first layer. Returns the path of the draft after it, at whose
    first layer the next slot then stands, and whether to make that draft."""
    context = row.context()
    guess, _ = context[1]
    uniform = None if sampling.greedy else row.draws.next()  # of the layer it leaves at, whichever that is
    expected = _expected(row)
    for step, layer in enumerate(path):
        last = step + 1 == len(path)
        session.read(guess, uniform, sampling, layer if row.outlook else 0)
        lap("heads")
        ahead = row.control.path(replace(row.round, exits=[*row.round.exits, layer]))  # if the draft leaves here
        # A next draft that begins deeper would move this one's slot along: not on a guess.
        launched = last or (layer == expected and ahead[0] <= layer)
        if launched:
            session.extend(ahead[0])
            lap("drafting layers")
        values = session.drawn()
        seen = (layer, session.lm.n_layers, len(row.round.drafts), row.control.cap, *context, sampling.temperature)
        signals = ReadSignals(*seen, values=values)
        lap("signals")
        leaves = last or row.control.leave(signals, row.round)
        lap("policy")
        if leaves:
            if not launched:
                session.extend(ahead[0])
                lap("drafting layers")
            break
        if launched:
            session.withdraw()
        row.round.checks += 1
        session.advance([0], [path[step + 1]])
        lap("drafting layers")
    row.round.exits.append(layer)
    row.round.drafts.append(int(values[TOKEN]))
    if not sampling.greedy:
        row.coins.append(row.draws.next())
    row.drew(signals)
    more = goes_on(session.lm, row, signals)
    lap("policy")
    return ahead, more


def _expected(row: Row) -> int:
    """The layer that the last draft left at, 0 before there is any: where the next one may well leave too."""
    earlier = row.round.exits or (row.rounds[-1].exits if row.rounds else [])
    return earlier[-1] if earlier else 0
