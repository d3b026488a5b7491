"""Settings search: what each method of the paper's tables may try, scored and timed on validation prompts.

Every setting decodes the same prompts. Its speed is first modelled, which settings share no noise in; the best few
of each method are then timed in turn, and the fastest is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from benchmarks.harness import Player, acceptance_table, time_methods
from lede_env.decoding.calibrate_lite import calibrate
from lede_env.decoding.strategies import (
    Autoregressive,
    Del,
    DraftVerify,
    FiniteStateMachine,
    LayerSkip,
    Lede,
    Lite,
    Strategy,
)
from lede_env.display.progress import progress_bar
from lede_env.engine.cost_model import CostModel
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.round import DRAFT_CAP
from lede_env.errors import LedeError
from lede_env.evaluation import static_result
from lede_env.models.zoo import twin_layer
from lede_env.policies import TrainedPolicy
from lede_env.tasks import Prompt, fit_prompt

THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of Draft & Verify
MACHINE = "this machine"  # the cost model measured here, and the wall-clock


@dataclass
class Bench:
    """What every method of a run decodes with, and the costs it is judged by."""

    lm: LayeredLM
    policy: TrainedPolicy | None  # of LEDE; None: none ships with the model
    max_new_tokens: int
    temperature: float
    seed: int
    costs: dict[str, CostModel]  # by name; MACHINE is one
    console: Console
    donor: LayeredLM | None = None  # of a twin, which plays its rounds: settings are tried on it, at the twin's costs

    @property
    def layers(self) -> tuple[int, ...]:
        """LEDE's candidates: every method that exits early chooses among the same layers."""
        of_policy = self.policy is not None and self.policy.n_layers == self.lm.n_layers
        return self.policy.candidate_layers if of_policy else self.lm.candidate_layers  # type: ignore[union-attr]

    @property
    def context(self) -> int:
        """Positions of a prompt and its text. A twin has more than its donor was trained on, and acceptance there says
        nothing."""
        return min(model.geometry.context for model in (self.lm, self.donor) if model is not None)

    def player(self, strategy: Strategy) -> Player:
        return Player(self.lm, strategy, self.max_new_tokens, self.temperature, self.seed)

    def trial_player(self, strategy: Strategy) -> Player:
        """What plays a setting while settings are tried."""
        if self.donor is None:
            return self.player(strategy)
        return Player(self.donor, self.on_donor(strategy), self.max_new_tokens, self.temperature, self.seed)

    def on_donor(self, strategy: Strategy) -> Strategy:
        """A twin's strategy on its donor: the same layers by their numbers there; policies relabel themselves."""
        assert self.donor is not None
        depth = self.donor.n_layers
        at = {twin_layer(layer, depth, self.lm.n_layers): layer for layer in range(1, depth + 1)}
        if isinstance(strategy, Lite):
            return Lite({at[e]: t for e, t in strategy.thresholds.items()}) if strategy.thresholds else Lite()
        if isinstance(getattr(strategy, "exit_layer", None), int):
            return dataclasses.replace(strategy, exit_layer=at[strategy.exit_layer])  # type: ignore[type-var, attr-defined]
        return strategy

    def tokens(self, prompts: Sequence[Prompt]) -> tuple[list[tuple[int, list[int]]], int]:
        """(index, token ids) of each prompt, cut where it does not fit, and how many were cut."""
        room = self.context - self.max_new_tokens - 1
        fitted = [fit_prompt(self.lm.encode(prompt.text), room, prompt.task) for prompt in prompts]
        return list(enumerate(ids for ids, _ in fitted)), sum(cut > 0 for _, cut in fitted)


@dataclass
class Trial:
    """One setting of a method on the validation prompts."""

    strategy: Strategy
    modelled: dict[str, float] = field(default_factory=dict)  # cost model -> tokens an autoregressive step's time
    tokens_per_second: float | None = None  # of those that were timed


# Registered name -> the settings to try, given the validation prompts. What tunes itself, or is fixed for all tasks,
# has one.
GRIDS: dict[str, Callable[[Bench, list[Prompt]], list[Strategy]]] = {
    "autoregressive": lambda bench, _: [Autoregressive()],
    "layerskip": lambda bench, _: [LayerSkip(e, d) for e in bench.layers for d in range(1, DRAFT_CAP + 1)],
    "fsm": lambda bench, _: [FiniteStateMachine(e, d) for e in bench.layers for d in (2, 4, 8)],
    "draft_verify": lambda bench, _: [DraftVerify(e, t) for e in bench.layers for t in THRESHOLDS],
    "lite": lambda bench, prompts: lite_settings(bench, prompts),
    "del": lambda bench, _: [Del()],
    "lede": lambda bench, _: [Lede(bench.policy)],
}


def lite_settings(bench: Bench, prompts: list[Prompt]) -> list[Strategy]:
    """LITE's thresholds calibrated on these prompts, and those stored with the embedded model."""
    if bench.donor is not None:  # whose thresholds are the twin's
        return [Lite()]
    calibrated = Lite(calibrate(bench.lm, prompts, bench.max_new_tokens))
    return [calibrated, Lite()] if bench.lm.weights == "embedded" else [calibrated]


def setting(strategy: Strategy) -> str:
    """What a strategy was given, as in "e=4 d=5"."""
    values = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)}  # type: ignore[arg-type]
    if isinstance(strategy, Lite):
        return " ".join(f"{e}>{t:.2f}" for e, t in strategy.thresholds.items()) if strategy.thresholds else "stored"
    short = {"exit_layer": "e", "speculation": "d"}
    return " ".join(f"{short.get(k, k)}={v:g}" for k, v in values.items() if k != "policy" and v is not None)


def search(
    bench: Bench, names: Sequence[str], prompts: list[Prompt], finalists: int, repeats: int
) -> dict[str, list[Trial]]:
    """Every setting of every method on the validation prompts, the best few by modelled cost timed too."""
    trials = {name: [Trial(strategy) for strategy in grid(bench, name, prompts)] for name in names}
    score_static(bench, trials.get("layerskip", []), prompts)
    score(
        bench, [t for name, tried in trials.items() if name != "layerskip" and len(tried) > 1 for t in tried], prompts
    )
    timed = [trial for tried in trials.values() if len(tried) > 1 for trial in ranked(tried, MACHINE)[:finalists]]
    if timed:
        methods = {f"{trial.strategy.name}: {setting(trial.strategy)}": trial for trial in timed}
        players = {label: bench.player(trial.strategy) for label, trial in methods.items()}
        on_gpu = bench.lm.device.type == "cuda"
        timings = time_methods(players, bench.tokens(prompts)[0], repeats, bench.console, on_gpu)
        for label, timing in timings.items():
            methods[label].tokens_per_second = timing.tokens_per_second
    return trials


def grid(bench: Bench, name: str, prompts: list[Prompt]) -> list[Strategy]:
    """The settings of a method, each fit for the model.

    Raises:
        LedeError: the method has no entry in GRIDS, or a setting does not fit.
    """
    if name not in GRIDS:
        raise LedeError(f"strategy {name!r} has no settings to try; add a line for it to GRIDS in {__name__}")
    strategies = GRIDS[name](bench, prompts)
    for strategy in strategies:
        strategy.start(bench.lm, 0)
    return strategies


def score_static(bench: Bench, trials: list[Trial], prompts: list[Prompt]) -> None:
    """All settings of LayerSkip from one decoding of the prompts: their acceptance decides every round."""
    if not trials:
        return
    lm = bench.donor or bench.lm
    playing = [trial.strategy if lm is bench.lm else bench.on_donor(trial.strategy) for trial in trials]
    layers = sorted({strategy.exit_layer for strategy in playing})  # type: ignore[attr-defined]
    options = bench.max_new_tokens, layers, bench.console, bench.temperature, bench.seed
    accepted = acceptance_table(lm, prompts, *options)
    for trial, played in zip(trials, playing, strict=True):
        e, d = trial.strategy.exit_layer, trial.strategy.speculation  # type: ignore[attr-defined]
        for name, costs in bench.costs.items():
            trial.modelled[name] = static_result(accepted[played.exit_layer], e, d, costs).speedup  # type: ignore[attr-defined]


def score(bench: Bench, trials: list[Trial], prompts: list[Prompt]) -> None:
    """Settings of any method, by decoding the prompts with each and adding up the cost of the rounds played."""
    if not trials:
        return
    encoded, _ = bench.tokens(prompts)
    with progress_bar(bench.console) as bar:
        for trial in bar.track(trials, description="settings on validation prompts"):
            player = bench.trial_player(trial.strategy)
            tokens = sum(len(player(prompt)[0]) for prompt in encoded)
            for name, costs in bench.costs.items():
                trial.modelled[name] = tokens / sum(player.cost(index, costs) for index, _ in encoded)


def ranked(trials: Sequence[Trial], costs: str) -> list[Trial]:
    """Fastest by a cost model first; one trial needs no score."""
    return sorted(trials, key=lambda trial: -trial.modelled.get(costs, 0.0))


def best(trials: Sequence[Trial], costs: str) -> Strategy:
    """The setting to take: the fastest on this machine's clock, or by another machine's cost model."""
    if costs == MACHINE:
        return max(trials, key=lambda trial: trial.tokens_per_second or 0.0).strategy
    return ranked(trials, costs)[0].strategy
