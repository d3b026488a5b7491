"""The paper's Tables 1 to 3 for a model at hand.

For each task: every method is tuned on validation prompts, all on the same ones (static LayerSkip over every candidate
layer and 1 to 12 drafts); then all decode the same test prompts in turn, after a warm-up. Beside each row stands the
paper's cell, of its model on its machine. A task that is finished is not run again.

Tasks are the project's own prompts (code, lm, summarization, instruction, parse; "all" for these five), JSONL files,
and the paper's datasets on the Hugging Face hub ("hub" for all five, or as in hub:alpaca). Rows that name no split
fall into one by a hash of their id (`lede_env.tasks`), so validation and test prompts never overlap.

    python -m benchmarks.paper_tables --model tiny --tasks all --ablation
    python -m benchmarks.paper_tables --model tiny --tasks lm --temperature 0.6
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import lede_env
from benchmarks.harness import (
    Player,
    Timing,
    machine,
    print_table,
    repeated_ngrams,
    results_folder,
    rouge_l,
    time_methods,
)
from benchmarks.paper_report import BASELINE, LEDE, STATIC, UNLIKE, compact, groups, title
from benchmarks.paper_results import Results
from benchmarks.tuning import GRIDS, MACHINE, Bench, best, search, setting
from lede_env.arguments import clear_errors
from lede_env.cost_measurement import measure
from lede_env.decoding.strategies import STRATEGIES, LayerSkip, Lede, Strategy
from lede_env.digest import digest
from lede_env.display.progress import progress_bar
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import CostModel, load_cost_model
from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError
from lede_env.policies import DEFAULT, TrainedPolicy, load_policy
from lede_env.tasks import HUB_TASKS, TASKS, Prompt, load_prompts

NAMES = {"lede": LEDE}  # registered name -> name in the tables, where it is not the class's


@dataclass
class Args:
    """Print the paper's Tables 1 to 3 for a model: every decoding method, tuned, on every task."""

    model: str = "tiny"  # zoo name, hub id or local folder
    weights: Literal["auto", "twin"] = "auto"  # the model's own, or those of its geometry twin
    policy: str | None = None  # of LEDE, one for all tasks: a folder, or a shipped one; by default the model's
    tasks: tuple[str, ...] = ("all",)  # all, task names, paths of JSONL files, hub, hub:NAME
    methods: tuple[str, ...] = tuple(GRIDS)  # registered names; autoregressive and layerskip always run
    ablation: bool = False  # also LEDE without dynamic exit and without adaptive drafting (Table 3)
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int = 128  # the paper: 512
    prompts: int = 24  # test prompts a task, or as many as there are
    validation_prompts: int = 16  # prompts a task to tune on; few flatter LEDE, which is not tuned here
    samples: int = 1  # texts of each test prompt, every one from a seed of its own; more than 1 at a temperature only
    repeats: int = 3  # timings of each test prompt, and of the finalists on each validation prompt
    finalists: int = 3  # settings of a method that are timed, the best by modelled cost
    machine_costs: str = "measured"  # cost model of this machine: measured at the start, or a name or path
    cost_models: tuple[str, ...] = ()  # others by name or path, for tables of modelled speed tuned for them
    device: str = "auto"
    threads: int = 2  # of torch, on the CPU
    seed: int = 0  # of the prompts drawn, and of sampling
    out: Path | None = None  # folder of the results; by default benchmarks/results/DEVICE

    def __post_init__(self) -> None:
        counts = ("prompts", "validation_prompts", "samples", "repeats", "finalists", "max_new_tokens", "threads")
        for name in counts:
            if getattr(self, name) < 1:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 1")
        if not self.tasks:
            raise LedeError(f"tasks={self.tasks!r}: name one at least, or all, which is what is run without --tasks")
        Sampling(self.temperature)  # raises where it is none
        if self.samples > 1 and self.temperature == 0:
            raise LedeError(
                f"samples={self.samples}: greedy decoding has one text of a prompt; add --temperature, or for more "
                "timings of that text --repeats"
            )
        for name in self.methods:
            if name not in GRIDS:
                raise LedeError(f"method {name!r} is unknown; known: {', '.join(GRIDS)}")
        if self.ablation and "lede" not in self.methods:
            raise LedeError("--ablation takes LEDE apart; add lede to --methods")


def main(args: Args) -> list[dict[str, Any]]:
    """Run what is not on file yet, write and print the tables. Returns their rows."""
    console = Console()
    torch.set_num_threads(args.threads)
    chosen = {name: choose_prompts(args, source) for name, source in task_sources(args.tasks).items()}
    lm = lede_env.load_model(args.model, weights=args.weights, device=args.device)
    policy = lede_policy(args, lm)
    donor = lede_env.load_model("tiny", device=args.device) if lm.weights == "twin" else None
    results = Results(results_path(args, lm), lm.name, settings_of(args, lm, policy, donor))
    costs = results.costs = cost_models(args, lm, results.costs)
    bench = Bench(lm, policy, args.max_new_tokens, args.temperature, args.seed, costs, console, donor)
    if importlib.util.find_spec("rouge_score") is None:
        console.print("no ROUGE-L: pip install rouge-score")
    for name, (validation, test) in chosen.items():
        console.rule(name)
        key = digest([vars(prompt) for prompt in (*validation, *test)])
        if results.tasks.get(name, {}).get("key") == key:
            console.print(f"{name} is in {results.path}: not run again")
            continue
        results.tasks[name] = {"task": name, "key": key, **run_task(args, bench, name, validation, test)}
        results.save()
    rows = results.save()
    for group in groups(rows):
        print_table(title(group), compact(group), console)
    if args.temperature == 0:
        unlike = sum(row.get(UNLIKE, 0) for row in rows if row["task"] in results.tasks)
        console.print(f"texts unlike Autoregressive's: {unlike}")
    console.print(f"written to {results.path.parent}: {results.path.stem}.json, .csv and .md")
    return rows


def task_sources(tasks: tuple[str, ...]) -> dict[str, str]:
    """Name in the tables -> what `load_prompts` takes."""
    listed = [part for task in tasks for part in task.split(",")]
    groups = {"all": list(TASKS), "hub": list(HUB_TASKS)}
    sources: dict[str, str] = {}
    for source in (single for part in listed for single in groups.get(part, [part])):
        name = task_name(source)
        if name in sources:
            raise LedeError(f"tasks {sources[name]!r} and {source!r} are both called {name!r}; rename one of the files")
        sources[name] = source
    return sources


def task_name(source: str) -> str:
    """SNIPS for its parses, which stand in for TOPv2 but are not it; else the file's or dataset's own name."""
    name = Path(source).stem if source.endswith(".jsonl") else source.removeprefix("hub:")
    return "SNIPS" if name.lower().startswith("snips") else name


def choose_prompts(args: Args, source: str) -> tuple[list[Prompt], list[Prompt]]:
    """Validation and test prompts, drawn from their splits by the seed; in the order of the source."""
    chosen = []
    for split, count in (("validation", args.validation_prompts), ("test", args.prompts)):
        found = load_prompts(source, split)
        picked = random.Random(args.seed).sample(range(len(found)), min(count, len(found)))
        chosen.append([found[index] for index in sorted(picked)])
    return chosen[0], chosen[1]


def lede_policy(args: Args, lm: LayeredLM) -> TrainedPolicy | None:
    """LEDE's policy, checked against the model now rather than after hours; None where LEDE is not asked for."""
    if "lede" not in args.methods:
        return None
    path = args.policy or (DEFAULT if lm.weights in ("embedded", "twin") else None)
    policy = load_policy(path) if path else None
    Lede(policy).start(lm, 0)
    return policy


def cost_models(args: Args, lm: LayeredLM, known: dict[str, CostModel]) -> dict[str, CostModel]:
    """This machine's costs and the named ones, by name; another model's layers and heads at this one's depth."""
    named = {name: replace(load_cost_model(name), n_layers=lm.n_layers) for name in args.cost_models}
    if args.machine_costs != "measured":
        return {MACHINE: replace(load_cost_model(args.machine_costs), n_layers=lm.n_layers), **named}
    measured = known.get(MACHINE) or measure(args.model, args.device, weights=args.weights)
    return {MACHINE: measured, **named}


def settings_of(args: Args, lm: LayeredLM, policy: TrainedPolicy | None, donor: LayeredLM | None) -> dict[str, Any]:
    """All that the figures depend on, the tasks apart."""
    settings = {name: value for name, value in vars(args).items() if name not in ("tasks", "out")}
    gives_up = {"bonus_from": policy.bonus_from} if policy and policy.bonus_from else {}
    return {
        **settings,
        "hardware": machine(lm.device.type)["hardware"],
        "model_fingerprint": lm.fingerprint,
        "policy_digest": digest(policy.tensors()) if policy else None,
        **gives_up,
        **({"context": donor.geometry.context} if donor else {}),  # to which prompts are cut
    }


def results_path(args: Args, lm: LayeredLM) -> Path:
    """benchmarks/results/DEVICE/paper_tables-MODEL[-T0.6][-ablation].json, or the like in another folder."""
    parts = ["paper_tables", lm.name]
    parts += [f"T{args.temperature:g}"] * (args.temperature > 0) + ["ablation"] * args.ablation
    return (args.out or results_folder(lm.device.type)) / f"{'-'.join(parts)}.json"


def run_task(args: Args, bench: Bench, name: str, validation: list[Prompt], test: list[Prompt]) -> dict[str, Any]:
    """Tune on the validation prompts, decode the test prompts: the record of a task, as it is stored."""
    distinct, test = len(test), test * args.samples  # every text draws from a seed of its own
    names = list(dict.fromkeys(["autoregressive", "layerskip", *args.methods]))
    trials = search(bench, names, validation, args.finalists, args.repeats)
    encoded, cut = bench.tokens(test)
    timed = {method_name(n): bench.player(best(trials[n], MACHINE)) for n in names}
    if args.ablation:
        timed |= {label: bench.player(strategy) for label, strategy in ablations(bench, timed[STATIC].strategy).items()}
    timings = time_methods(timed, encoded, args.repeats, bench.console, bench.lm.device.type == "cuda")
    results = {MACHINE: {n: measured(bench, timed, timings, n, test) for n in timed}}
    for label, player in timed.items():
        if label.startswith(LEDE):
            results[MACHINE][label]["profile"] = profile(bench, player, encoded)
    for costs in args.cost_models:
        players = {method_name(n): player_for(bench, best(trials[n], costs), timed) for n in names}
        if args.ablation:
            variants = ablations(bench, players[STATIC].strategy)
            players |= {label: player_for(bench, strategy, timed) for label, strategy in variants.items()}
        decode_all(bench, list(players.values()), encoded)
        results[costs] = {label: counted(bench, player, costs) for label, player in players.items()}
    here = machine(bench.lm.device.type)
    return {
        "paper_task": name if test[0].task == "parse" else test[0].task,  # of parses, the paper has TOPv2 alone
        "prompts": distinct,
        "prompt_of": [index % distinct for index in range(len(test))],  # each text
        "cut": cut // args.samples,
        "validation_prompts": len(validation),
        "test_ids": [prompt.id for prompt in test[:distinct]],
        "validation_ids": [prompt.id for prompt in validation],
        "commit": here["commit"],
        "date": here["date"],
        "tried": [
            {"method": n, "setting": setting(t.strategy), "modelled": t.modelled, "tokens/s": t.tokens_per_second}
            for n, tried in trials.items()
            for t in tried
        ],
        "results": results,
    }


def method_name(name: str) -> str:
    return NAMES.get(name, STRATEGIES[name].__name__)


def ablations(bench: Bench, static: LayerSkip) -> dict[str, Strategy]:
    """The paper's Table 3: one of LEDE's two controls fixed, at the best static setting's value."""
    return {
        "LEDE w/o dynamic exit": Lede(bench.policy, exit_layer=static.exit_layer),
        "LEDE w/o adaptive drafting": Lede(bench.policy, speculation=static.speculation),
    }


def player_for(bench: Bench, strategy: Strategy, known: dict[str, Player]) -> Player:
    """The player of a strategy that has decoded the test prompts already, or a new one."""
    same = [p for p in known.values() if (p.strategy.name, setting(p.strategy)) == (strategy.name, setting(strategy))]
    return same[0] if same else bench.player(strategy)


def decode_all(bench: Bench, players: list[Player], prompts: list[tuple[int, list[int]]]) -> None:
    """Have every player decode the prompts, those that did so before excepted."""
    new = [player for player in players if not player.outs]
    if not new:
        return
    with progress_bar(bench.console) as bar:
        for player in bar.track(new, description="settings for another cost model"):
            for prompt in prompts:
                player(prompt)


def counted(bench: Bench, player: Player, costs: str) -> dict[str, Any]:
    """What a player decoded, and its modelled cost, prompt by prompt."""
    timing = Timing()
    for index, out in player.outs.items():
        timing.add(index, 0.0, out.token_ids, out.counts)
    return {
        "setting": setting(player.strategy),
        "counts": vars(timing.counts),
        "tokens": [len(out.token_ids) for out in player.outs.values()],
        "cost": [player.cost(index, bench.costs[costs]) for index in player.outs],
    }


def measured(
    bench: Bench, players: dict[str, Player], timings: dict[str, Timing], name: str, test: list[Prompt]
) -> dict[str, Any]:
    """As `counted`, with the seconds of every repeat and what is told from the texts."""
    outs, baseline = players[name].outs, timings[BASELINE].tokens
    texts = [out.token_ids for out in outs.values()]
    unlike = sum(tokens != baseline[index] for index, tokens in enumerate(texts))
    return {
        **counted(bench, players[name], MACHINE),
        "seconds": [timings[name].seconds[index] for index in outs],
        "rouge_l": rouge_l([out.text for out in outs.values()], [prompt.reference for prompt in test]),
        "repeated": repeated_ngrams(texts, 8),
        "different": unlike if bench.temperature == 0 else None,
    }


def profile(bench: Bench, player: Player, prompts: list[tuple[int, list[int]]]) -> dict[str, float]:
    """Seconds of each part of decoding, over all prompts, in a run of its own: looking costs time."""
    parts: dict[str, float] = {}
    for prompt in prompts:
        for part, seconds in (player.play(prompt, profile=True).profile or {}).items():
            parts[part] = parts.get(part, 0.0) + seconds
    return parts


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
