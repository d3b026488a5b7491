"""What LEDE's control costs: its wall-clock beyond a LayerSkip that replays the same exits and draft lengths.

The replay drafts, round by round, at the layer that LEDE left at and as many tokens as LEDE did. It asks no policy,
checks no layer that a draft does not leave at, and keeps neither trace nor lookup; what it reads off the logits is what
any LayerSkip does here (on CUDA graphs that is LEDE's read-out as well, drawn token and signals in one). Its rounds are
LEDE's token by token, greedy and sampled, for every uniform number is keyed by its count. That is checked: prompts
whose texts bfloat16 rounding parts are counted as `apart` and left out. Seconds are of decoding, without prefill.

    python -m benchmarks.engine_control --model llama2-7b --weights twin
    python -m benchmarks.engine_control --model tiny --device cpu
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import lede_env
from benchmarks.harness import Timing, machine, print_table, results_folder, speedup_interval, write_results
from lede_env.arguments import clear_errors
from lede_env.decoding.generate import Generation
from lede_env.decoding.strategies import Control, Lede, Strategy
from lede_env.display.progress import progress_bar
from lede_env.engine.acceptance import derive_seed
from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError
from lede_env.tasks import TASKS, fit_prompt, load_prompts

MOST_APART = 0.1  # share of the texts that rounding may part: other segments on CUDA add squares in another order


@dataclass
class Args:
    """Time LEDE and the replay of its rounds in turn, prompt by prompt."""

    model: str = "llama2-7b"
    weights: Literal["auto", "twin"] = "auto"
    policy: str | None = None  # of LEDE: a folder, or a shipped one; by default the model's
    tasks: tuple[str, ...] = TASKS
    prompts: int = 4  # test prompts of each task
    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.6)
    repeats: int = 3
    device: str = "auto"
    threads: int = 2  # of torch, on the CPU
    seed: int = 0  # of sampling
    out: Path | None = None  # folder of the results; by default benchmarks/results/DEVICE

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Plan:
    """A round as LEDE played it."""

    exit_layer: int
    drafts: int
    bonus: bool = True  # whether its last draft ran through the layers


class Replay(Control):
    """Plays the rounds of a record."""

    def __init__(self, plans: list[Plan]):
        self.plans, self.rounds = plans, 0

    @property
    def plan(self) -> Plan:
        # A text that rounding parted from LEDE's may outlast the record: `same_rounds` finds it afterwards.
        return self.plans[min(self.rounds, len(self.plans)) - 1]

    def path(self, round_):
        self.rounds += not round_.exits
        return (self.plan.exit_layer,)

    def keep_drafting(self, signals, round_):
        return len(round_.drafts) < self.plan.drafts

    def wants_bonus(self, signals, round_):
        return self.plan.bonus


@dataclass(frozen=True)
class Replayed(Strategy):
    """LayerSkip at the exits and lengths of a record."""

    plans: list[Plan]
    name = "replay"

    def start(self, lm, seed) -> Control:
        return Replay(self.plans)


class Recorder(Control):
    """Another control, whose rounds it writes down as they are drafted: an EOS cuts them short later."""

    def __init__(self, control: Control):
        self.control, self.plans = control, []
        self.cap, self.leave, self.keep_drafting = control.cap, control.leave, control.keep_drafting

    def path(self, round_):
        return self.control.path(round_)

    def drew(self, signals, round_):
        first = len(round_.drafts) == 1
        self.plans[len(self.plans) - (not first) :] = [Plan(round_.exits[0], len(round_.drafts))]
        self.control.drew(signals, round_)

    def wants_bonus(self, signals, round_):
        bonus = self.control.wants_bonus(signals, round_)
        self.plans[-1] = replace(self.plans[-1], bonus=bonus)
        return bonus


class Recorded(Strategy):
    """A strategy whose rounds are written down."""

    def __init__(self, strategy: Strategy):
        self.strategy, self.name, self.reads = strategy, strategy.name, strategy.reads

    def start(self, lm, seed) -> Control:
        return Recorder(self.strategy.start(lm, seed))


def main(args: Args) -> list[dict[str, Any]]:
    """Time, print and write. Returns the rows."""
    console = Console()
    torch.set_num_threads(args.threads)
    lm = lede_env.load_model(args.model, weights=args.weights, device=args.device)
    lede = Lede(lede_env.load_policy(args.policy) if args.policy else None)
    room = lm.geometry.context - args.max_new_tokens
    prompts = [prompt for task in args.tasks for prompt in load_prompts(task, "test")[: args.prompts]]
    encoded = [fit_prompt(lm.encode(prompt.text), room, prompt.task)[0] for prompt in prompts]
    sets: dict[str, list[int]] = {}  # prompt set -> places of its prompts
    for place, prompt in enumerate(prompts):
        sets.setdefault(prompt.task, []).append(place)
    rows: list[dict[str, Any]] = []
    about = {**machine(lm.device.type), **{name: str(value) for name, value in vars(args).items() if name != "out"}}
    folder = args.out or results_folder(lm.device.type)
    for temperature in args.temperatures:
        timings, apart = compare(args, lm, lede, encoded, temperature, console)
        places = {**sets, "all": list(range(len(prompts)))}
        rows += [row(temperature, name, timings, members, apart) for name, members in places.items()]
        write_results(folder, f"engine_control-{lm.name}", rows, about)
    print_table(f"control of LEDE: {lm.name}, {lm.dtype}, batch 1", rows, console)
    console.print(f"written to {folder}: engine_control-{lm.name}.json, .csv and .md")
    return rows


def compare(
    args: Args, lm: LayeredLM, lede: Lede, prompts: list[list[int]], temperature: float, console: Console
) -> tuple[dict[str, Timing], set[int]]:
    """Seconds of decoding, prefill not among them, of "LEDE" and "replay" by prompt, and the prompts that parted."""

    def decode(place: int, strategy: Strategy) -> Generation:
        options = dict(max_new_tokens=args.max_new_tokens, temperature=temperature)
        return lede_env.generate(lm, prompts[place], strategy=strategy, seed=derive_seed(args.seed, place), **options)

    replays: dict[int, Strategy] = {}
    apart: set[int] = set()
    # Warm-up and check in one, the longest first: on CUDA its session has room, and then graphs, for all.
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place])):
        record = decode(place, Recorded(lede))
        replays[place] = Replayed(record.control.plans)  # type: ignore[attr-defined]
        if not same_rounds(record, decode(place, replays[place])):
            apart.add(place)
    check_apart(apart, len(prompts), lm, temperature)
    timings = {"LEDE": Timing(), "replay": Timing()}
    with progress_bar(console) as bar:
        for repeat in bar.track(range(args.repeats), description=f"T = {temperature:g}, in turn"):
            for place in (place for place in range(len(prompts)) if place not in apart):
                turns = [("LEDE", lede), ("replay", replays[place])]
                for name, strategy in turns if (place + repeat) % 2 else turns[::-1]:
                    out = decode(place, strategy)
                    timings[name].add(place, out.metrics.decode_seconds, out.token_ids, out.counts)
    return timings, apart


def same_rounds(one: Generation, other: Generation) -> bool:
    """Whether two generations drafted at the same layers and emitted the same tokens, round by round."""
    first, second = ([(r.exits, r.drafts, r.emitted) for r in out.rounds] for out in (one, other))
    return first == second


def check_apart(apart: set[int], prompts: int, lm: LayeredLM, temperature: float) -> None:
    """Raise a LedeError where more texts parted than rounding can explain; in float32 on a CPU none may."""
    most = 0 if lm.device.type == "cpu" else MOST_APART * prompts
    if len(apart) > most:
        raise LedeError(
            f"at T = {temperature:g} the replay parted from LEDE on {len(apart)} of {prompts} prompts, of which "
            f"rounding may part {most:g}: it does not replay what LEDE did"
        )


def row(
    temperature: float, name: str, timings: dict[str, Timing], members: Sequence[int], apart: set[int]
) -> dict[str, Any]:
    """One prompt set: seconds, and the share that control takes of LEDE's, paired by prompt."""
    chosen = {method: part(timing, members) for method, timing in timings.items()}
    lede, replay = chosen["LEDE"], chosen["replay"]
    facts = {"T": temperature, "prompt set": name, "prompts": len(lede.seconds)}
    facts["apart"] = len(apart.intersection(members))  # left out
    if not lede.seconds:
        return facts
    ratio, low, high = speedup_interval(lede, replay)  # LEDE's time over the replay's, tokens being equal
    return facts | {
        "tokens": sum(map(len, lede.tokens.values())),
        "LEDE, s": lede.total_seconds,
        "replay, s": replay.total_seconds,
        "control share": 1 - 1 / ratio,
        "95 %": f"{1 - 1 / low:.3f} to {1 - 1 / high:.3f}",
    }


def part(timing: Timing, members: Sequence[int]) -> Timing:
    """A method's runs on some of the prompts."""
    some = Timing()
    some.seconds = {place: timing.seconds[place] for place in members if place in timing.seconds}
    some.tokens = {place: timing.tokens[place] for place in some.seconds}
    return some


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
