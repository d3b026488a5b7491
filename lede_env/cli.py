"""The command `lede`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.display.terminal import show_stream, summary
from lede_env.errors import LedeError
from lede_env.offline.commands import app as dataset_app

if TYPE_CHECKING:
    from lede_env.decoding.strategies import Strategy
    from lede_env.engine.layered_lm import LayeredLM

app = tyro.extras.SubcommandApp()
app.command(dataset_app, name="dataset", help="Offline datasets: list, info, make, verify, export.")
console = Console()


@app.command
def envs(*, json: bool = False) -> None:
    """List the registered environments, what each pins, and what is known to be within reach.

    Args:
        json: print every pinned value as JSON instead of a table.
    """
    from json import dumps

    from lede_env.display.environments import environment_row, environment_table
    from lede_env.registration import ENVIRONMENTS

    with progress_bar(Console(stderr=True)) as bar:
        rows = [environment_row(env_id) for env_id in bar.track(ENVIRONMENTS, description="optima by the traces")]
    if json:
        print(dumps(rows, indent=1))
    else:
        console.print(environment_table(rows))


@app.command
def generate(
    prompt: Positional[str],
    /,
    model: str = "tiny",
    strategy: str = "lede",
    policy: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    device: str = "auto",
    dtype: str | None = None,
    compare: bool = False,
    report: Path | None = None,
) -> None:
    """Continue a prompt, streaming the text coloured by how each token came about, then print the figures.

    Args:
        prompt: the text to continue.
        model: zoo name, hub id or local folder.
        strategy: one of those that --compare lists, its numbers after a colon, as in layerskip:4,5.
        policy: folder of the exit policy for lede; by default the one that ships with the model.
        max_new_tokens: most tokens to produce.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens; 0 is off.
        top_p: keep the smallest set of tokens with this probability; 1 is off.
        seed: of the draws.
        stop: strings that end the text.
        device: auto, cpu, cuda or cuda:N.
        dtype: float32, bfloat16, float16 or float64.
        compare: run every strategy on the prompt and print a table instead of the text.
        report: also write one self-contained HTML page that explains the text token by token.
    """
    from lede_env.decoding.generate import stream
    from lede_env.decoding.strategies import parse_strategy
    from lede_env.engine.round import Counts
    from lede_env.models.loading import load_model

    if compare and report is not None:
        raise LedeError("--compare prints a table and --report shows one strategy; ask for one of them")
    if report is not None:
        from lede_env.display.report import check_report_path, write_report

        check_report_path(report)
    chosen = parse_strategy(strategy, policy)
    lm = load_model(model, device=device, dtype=dtype)
    options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop)
    options["max_new_tokens"] = max_new_tokens
    if compare:
        compare_strategies(lm, prompt, chosen, options)
        return
    counts = Counts()
    seconds = show_stream(console, lm, stream(lm, prompt, strategy=chosen, **options), counts)
    line = summary(lm, chosen.name, counts, seconds)
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        write_report(report, lm, prompt, chosen, **options)
        console.print(f"wrote {report}", style="dim", markup=False, highlight=False, soft_wrap=True)


def compare_strategies(lm: LayeredLM, prompt: str, chosen: Strategy, options: dict[str, Any]) -> None:
    """`lede generate --compare`: race every strategy and print the table."""
    from lede_env.display.compare import REPEATS, comparison_table, contestants, race

    strategies, unable = contestants(lm, chosen)
    with progress_bar(console) as bar:
        task = bar.add_task("comparing", total=None)
        results = race(
            lm, prompt, strategies, options, lambda done, total: bar.update(task, completed=done, total=total)
        )
    greedy = options["temperature"] == 0
    console.print(comparison_table(results, strategies, greedy))
    notes = [f"{lm.name} ({lm.weights}), on {lm.device}: median of {REPEATS} interleaved runs after a warm-up"]
    if not greedy:
        notes.append("sampled texts are equal in distribution, not word for word")
    elif lm.dtype.itemsize < 4:
        notes.append(f"greedy texts are equal token for token in float32; {lm.dtype} rounds")
    notes += [f"{name} left out: {reason}" for name, reason in unable.items()]
    for line in notes:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


@app.command
def record(
    *,
    env: str,
    out: Path,
    policy: str | None = None,
    episodes: int | None = None,
    resume: bool = False,
    trace: bool = False,
    samples: int = 1,
    force: bool = False,
    seed: int = 0,
    num_envs: int = 16,
    task: str | None = None,
    prompts: Path | None = None,
    split: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    device: str | None = None,
) -> None:
    """Log trajectories of a policy to an HDF5 file, or record a trace, from which environments play without the model.

    Args:
        env: environment id; see `lede envs`.
        out: the HDF5 file.
        policy: random, static:LAYER, or the folder of a trained policy. Of trajectories, like the next two.
        episodes: episodes the file shall hold in the end; one that holds more is left as it is.
        resume: go on with a file that a killed or shorter run left.
        trace: record a trace instead, of every prompt. The next two are for it alone.
        samples: continuations a prompt, at a temperature above 0.
        force: replace a trace that exists.
        seed: of the run: prompts, draws and coins.
        num_envs: sequences decoded together; changes the file by float rounding at most.
        task: overrides the task the id pins; likewise max_new_tokens, temperature and device.
        prompts: a .jsonl file of prompts instead of a task.
        split: overrides the split the id pins; a trace has all splits by default.
        max_new_tokens: see task.
        temperature: see task.
        device: see task.
    """
    if prompts is not None and task is not None:
        raise LedeError(f"--prompts {prompts} and --task {task} both say what to continue; give one of them")
    task = task if prompts is None else str(prompts)
    given = dict(task=task, split=split, max_new_tokens=max_new_tokens, temperature=temperature, device=device)
    overrides = {name: value for name, value in given.items() if value is not None}
    if trace:
        if policy is not None or episodes is not None or resume:
            raise LedeError("--trace records all that a policy could do: leave out --policy, --episodes and --resume")
        record_one_trace(env, overrides, out, samples=samples, seed=seed, lanes=num_envs, force=force)
        return
    if policy is None or episodes is None:
        raise LedeError("lede record needs --policy and --episodes, or --trace")
    if force or samples != 1:
        raise LedeError("--force and --samples are for --trace; trajectories go on with a file by --resume")
    record_trajectories(env, overrides, out, policy, episodes, seed=seed, resume=resume, num_envs=num_envs)


def record_trajectories(
    env: str, overrides: dict[str, Any], out: Path, policy: str, episodes: int, **options: Any
) -> None:
    """`lede record`: log a policy's episodes."""
    from lede_env.models.zoo import MODELS
    from lede_env.policies import parse_policy
    from lede_env.recording import record as record_episodes
    from lede_env.registration import pinned

    config = pinned(env)
    actor = parse_policy(policy, MODELS[config.model].n_layers, config.candidate_layers)
    with progress_bar(console) as bar:
        task_id = bar.add_task(f"recording {policy} on {env}", total=episodes)
        held, rows = record_episodes(
            env,
            actor,
            episodes,
            out,
            policy_name=policy,
            progress=lambda done: bar.update(task_id, completed=done, total=max(done, episodes)),
            **options,
            **overrides,
        )
    console.print(f"{out}: {held} episodes, {rows} transitions", markup=False)


def record_one_trace(
    env: str, overrides: dict[str, Any], out: Path, *, samples: int, seed: int, lanes: int, force: bool
) -> None:
    """`lede record --trace`: record a trace."""
    from lede_env.registration import ids_of, pinned

    config = replace(pinned(env), **{"split": "all", **overrides})
    if config.weights == "twin":
        raise LedeError(f"a twin plays the embedded model's trace; record one with --env {ids_of('tiny', 'auto')[0]}")
    from lede_env.recording import check_output

    check_output(out)
    if out.exists() and not force:
        raise LedeError(f"{out} exists; pass --force to replace it")

    from lede_env.engine.acceptance import Sampling
    from lede_env.envs.source import load_weights
    from lede_env.outlooks import with_outlook
    from lede_env.tasks import load_prompts
    from lede_env.tracing import record_trace

    prompts = load_prompts(config.task, config.split)
    lm = load_weights(config)
    with progress_bar(console) as bar:
        task_id = bar.add_task(f"tracing {env}", total=len(prompts) * samples)
        trace = record_trace(
            lm,
            prompts,
            config.candidate_layers,
            config.max_new_tokens,
            Sampling(config.temperature, config.top_k, config.top_p),
            seed,
            samples=samples,
            lanes=lanes,
            command=shlex.join(["lede", *sys.argv[1:]]),
            progress=lambda done: bar.update(task_id, completed=done),
        )
        trace.save(out)
        head = lm.acceptance_head
        if head is not None and set(config.candidate_layers) <= set(head.candidate_layers):
            task_id = bar.add_task("asking the acceptance head", total=len(prompts) * samples)
            trace = with_outlook(trace, lm, prompts, lambda done: bar.update(task_id, completed=done))
            trace.save(out)
    if head is not None and trace.outlook is None:
        console.print(f"without risk, odds and ahead: the acceptance head knows layers {head.candidate_layers} alone")
    console.print(f"{out}: {len(prompts)} prompts x {samples}, {len(trace.targets)} positions", markup=False)


@app.command
def doctor() -> None:
    """Show what is installed and which devices and weights are at hand."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from lede_env.models.loading import EMBEDDED
    from lede_env.policies import SHIPPED

    table = Table("what", "state")
    for package in ("lede-env", "torch", "transformers", "gymnasium", "numpy", "h5py", "safetensors", "d3rlpy",
                    "stable-baselines3", "minari"):  # fmt: skip
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("CUDA devices", ", ".join(cuda) or "none: everything runs on the CPU")
    table.add_row("CPU threads", str(torch.get_num_threads()))
    table.add_row("embedded model", "present" if (EMBEDDED / "model.safetensors").is_file() else "missing: reinstall")
    table.add_row("embedded policy", "present" if SHIPPED["tiny"].is_dir() else "missing: reinstall")
    console.print(table)


def main() -> None:
    """Entry point."""
    with clear_errors():
        app.cli(
            prog="lede",
            description="Exit control in self-speculative decoding: environments, data, decoding.",
        )


if __name__ == "__main__":
    main()
