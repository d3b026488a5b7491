"""The command `lede`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from tyro.conf import Positional

from lede_env.display.terminal import show_stream, summary
from lede_env.errors import LedeError
from lede_env.tasks import check_text

if TYPE_CHECKING:
    from lede_env.decoding.strategies import Strategy
    from lede_env.engine.layered_lm import LayeredLM

app = tyro.extras.SubcommandApp()
console = Console()


def progress_bar(console: Console = console) -> Progress:
    """The progress bar of every command."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@app.command
def envs() -> None:
    """List the registered environments and what each pins."""
    from lede_env.registration import ENVIRONMENTS

    table = Table("id", "model", "candidate layers", "task", "T", "max new tokens", "features", "reward")
    for env_id, pinned in ENVIRONMENTS.items():
        table.add_row(
            env_id,
            pinned["model"],
            " ".join(map(str, pinned["candidate_layers"])),
            f"{pinned['task']} / {pinned['split']}",
            f"{pinned['temperature']:g}",
            str(pinned["max_new_tokens"]),
            str(pinned["features"]),
            pinned["reward"],
        )
    console.print(table)


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
    with progress_bar() as bar:
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
    policy: str,
    episodes: int,
    out: Path,
    seed: int = 0,
    resume: bool = False,
    num_envs: int = 16,
    task: str | None = None,
    split: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    device: str | None = None,
) -> None:
    """Log trajectories of a policy to an HDF5 file.

    Args:
        env: environment id; see `lede envs`.
        policy: random, static:LAYER, or the folder of a trained policy.
        episodes: episodes the file shall hold in the end; one that holds more is left as it is.
        out: the HDF5 file.
        seed: of the run: prompts, draws and coins.
        resume: go on with a file that a killed or shorter run left.
        num_envs: sequences decoded together; changes the file by float rounding at most.
        task: overrides the task the id pins; likewise split, max_new_tokens, temperature and device.
        split: see task.
        max_new_tokens: see task.
        temperature: see task.
        device: see task.
    """
    from lede_env.policies import parse_policy
    from lede_env.recording import record as record_episodes
    from lede_env.registration import pinned

    spec = pinned(env)
    given = dict(task=task, split=split, max_new_tokens=max_new_tokens, temperature=temperature, device=device)
    overrides = {name: value for name, value in given.items() if value is not None}
    layers = spec["candidate_layers"]
    from lede_env.models.loading import load_model

    lm = load_model(spec["model"], device=device or "auto")
    actor = parse_policy(policy, lm.n_layers, layers)
    with progress_bar() as bar:
        task_id = bar.add_task(f"recording {policy} on {env}", total=episodes)
        held, rows = record_episodes(
            env,
            actor,
            episodes,
            out,
            seed=seed,
            resume=resume,
            num_envs=num_envs,
            policy_name=policy,
            progress=lambda done: bar.update(task_id, completed=done, total=max(done, episodes)),
            **overrides,
        )
    console.print(f"{out}: {held} episodes, {rows} transitions", markup=False)


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
    """Entry point: bad input ends with one clear line and exit status 2."""
    try:
        for argument in sys.argv[1:]:
            check_text(argument, f"the argument {argument!r}")
        app.cli(
            prog="lede",
            description="Exit control in self-speculative decoding: environments, data, decoding.",
        )
    except LedeError as error:
        message = escape(" ".join(str(error).split()))  # one line, and no part of it taken for markup
        Console(stderr=True).print(f"[bold red]error:[/bold red] {message}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that is not there: the message names the path
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
