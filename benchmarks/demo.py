"""`make demo`: collect experience, train the paper's agent, decode, compare. A few minutes on two CPU cores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

import lede_env
from agents.nstep_dqn import Args as AgentArgs
from agents.nstep_dqn import train
from benchmarks.figures import exit_heat_map, learning_curves
from benchmarks.harness import (
    Method,
    acceptance_table,
    machine,
    print_table,
    speedup_interval,
    time_methods,
    write_results,
)
from lede_env.arguments import clear_errors
from lede_env.cost_measurement import measure
from lede_env.decoding.generate import Generation
from lede_env.decoding.strategies import Strategy
from lede_env.display.progress import progress_bar
from lede_env.evaluation import best_static
from lede_env.tasks import load_prompts


@dataclass
class Args:
    """Train the paper's agent on LEDE-Tiny-v0 and compare it with plain and static decoding."""

    out: Path = Path("runs/demo")  # folder for the table, the pictures, the policy and the logged trajectories
    exploration_episodes: int = 200  # episodes logged before learning begins (paper section 4.1)
    online_episodes: int = 160  # episodes played while learning
    max_new_tokens: int = 96  # tokens a prompt
    prompts: int = 24  # test prompts decoded
    seed: int = 1


def main(args: Args) -> None:
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    lm = lede_env.load_model("tiny", device="cpu")

    console.rule("1. experience and learning")
    agent = train_agent(args, console)
    console.rule("2. the best static setting, on validation prompts")
    costs = measure("tiny", device="cpu", repeats=20)
    validation = load_prompts("all", "validation")[::3]
    accepted = acceptance_table(lm, validation, args.max_new_tokens, lm.candidate_layers, console)
    static, _ = best_static(accepted, costs)
    console.print(f"best static: exit layer {static.exit_layer}, {static.speculation} drafts a round "
                  f"(modelled {static.speedup:.2f}x)")  # fmt: skip
    console.rule("3. decoding test prompts")
    strategies = {
        "Autoregressive": lede_env.Autoregressive(),
        f"LayerSkip e={static.exit_layer} d={static.speculation}": lede_env.LayerSkip(
            static.exit_layer, static.speculation
        ),
        "LEDE": lede_env.Lede(agent),
    }
    rows = compare(args, lm, strategies, console)
    print_table("LEDE-Tiny-v0, greedy, embedded model, float32, batch 1", rows, console)
    write_results(args.out, "table", rows, {"command": "make demo", **machine(), **vars(args), "out": str(args.out)})
    prompt = load_prompts("lm", "test")[0]
    shown: Generation = lede_env.generate(lm, prompt.text, strategy=strategies["LEDE"], max_new_tokens=64)
    exit_heat_map(shown, lm.n_layers, [lm.decode([token]) for token in shown.token_ids], args.out / "heat_map.png")
    console.print(
        f"left in {args.out}: table.csv, table.md, figure2.png, heat_map.png, agent/ (policy, exploration.h5)"
    )
    console.print(f"done in {time.perf_counter() - begin:.0f} s")


def train_agent(args: Args, console: Console) -> lede_env.policies.MLPPolicy:
    """Two hundred exploration episodes into an HDF5 file, then learning by the paper's schedule."""
    agent_args = AgentArgs(
        env_id="LEDE-Tiny-v0",
        env_kwargs={"max_new_tokens": args.max_new_tokens, "device": "cpu"},
        num_envs=16,
        out=args.out / "agent",
        overwrite=True,
        exploration_episodes=args.exploration_episodes,
        online_episodes=args.online_episodes,
        seed=args.seed,
    )
    with progress_bar(console) as bar:
        task = bar.add_task("exploring", total=args.exploration_episodes + args.online_episodes)

        def show(row: dict) -> None:
            verb = {"explore": "exploring", "online": "learning"}[row["phase"]]
            bar.update(task, completed=row["episode"] + 1, description=f"{verb}: return {row['return']:6.1f}")

        result = train(agent_args, show)
    learning_curves(result.history, args.out / "figure2.png")
    return result.policy


def compare(args: Args, lm: lede_env.LayeredLM, strategies: dict[str, Strategy], console: Console) -> list[dict]:
    """Time the strategies on test prompts of every task; the baseline is the first."""
    test = load_prompts("all", "test")
    chosen = test[:: max(1, len(test) // args.prompts)][: args.prompts]
    prompts = [lm.encode(prompt.text) for prompt in chosen]
    methods: dict[str, Method] = {
        name: decoder(lm, strategy, args.max_new_tokens) for name, strategy in strategies.items()
    }
    timings = time_methods(methods, prompts, repeats=2, console=console)
    baseline = next(iter(timings.values()))
    different = sum(t.tokens[i] != baseline.tokens[i] for t in timings.values() for i in t.tokens)
    console.print(
        f"{len(prompts)} prompts x {args.max_new_tokens} tokens; texts that differ from Autoregressive's: {different}"
    )
    rows = []
    for name, timing in timings.items():
        ratio, low, high = speedup_interval(baseline, timing)
        counts, drafts = timing.counts, timing.counts.drafted > 0
        rows.append(
            {
                "method": name,
                "E": counts.E if drafts else float("nan"),
                "d": counts.d if drafts else float("nan"),
                "acceptance": counts.acceptance if drafts else float("nan"),
                "tokens a round": counts.tokens_per_round,
                "tokens/s": timing.tokens_per_second,
                "speedup": ratio,
                "95 % interval": f"{low:.2f} to {high:.2f}",
                "repeated 8-grams": timing.repeated,
            }
        )
    return rows


def decoder(lm: lede_env.LayeredLM, strategy: Strategy, max_new_tokens: int) -> Method:
    """The strategy as a method to time: greedy, from token ids."""

    def decode(prompt: list[int]):
        out = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=max_new_tokens)
        return out.token_ids, out.counts

    return decode


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
