"""The engine beside transformers, greedy at batch 1, on one folder: a geometry twin in Hugging Face form, sharded.

transformers generates eagerly, with `assistant_early_exit`, and, last, compiled over a static cache. Each method is
warmed up on the longest prompt, then timed on all; the results are written after each. A method that fails or takes
too long leaves its error in its row.

    python -m benchmarks.engine_peers --model llama2-7b
"""

from __future__ import annotations

import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

import lede_env
from benchmarks.harness import (
    Method,
    Player,
    Timing,
    machine,
    print_table,
    results_folder,
    speedup_interval,
    timed,
    write_results,
)
from lede_env.arguments import clear_errors
from lede_env.decoding.strategies import parse_strategy
from lede_env.engine.acceptance import derive_seed
from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError
from lede_env.models.loading import EMBEDDED, resolve_device, resolve_dtype
from lede_env.models.twin import write_twin
from lede_env.models.zoo import twin_name, twin_spec
from lede_env.tasks import TASKS, load_prompts

EAGER = "transformers, eager"
EARLY_EXITS = ((6, 5, 0.0), (6, 10, 0.4), (8, 8, 0.4), (12, 5, 0.4))  # layer of 32, tokens, threshold


@dataclass
class Args:
    """Time this engine and transformers on the same geometry twin and prompts."""

    model: str = "llama2-7b"
    policy: str | None = None  # of LEDE: a folder, or a shipped one; by default the model's
    strategies: tuple[str, ...] = ("autoregressive", "layerskip:6,4", "layerskip:6,8", "lede")  # of ours
    prompts: int = 1  # test prompts of each task
    max_new_tokens: int = 128
    repeats: int = 3  # of ours
    peer_repeats: int = 1  # of transformers', which are slow
    limit: float = 240.0  # seconds that a method may take, compilation included
    folder: Path | None = None  # of the twin, used again if it is there; by default in the system's temporary folder
    device: str = "auto"
    out: Path | None = None  # folder of the results; by default benchmarks/results/DEVICE

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens", "repeats", "peer_repeats", "limit"):
            if getattr(self, name) < 1:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 1")


def main(args: Args) -> list[dict[str, Any]]:
    """Write the twin, load it on both sides, time method by method. Returns the rows."""
    console, begin = Console(), time.perf_counter()

    def say(what: str) -> None:
        console.print(f"{time.perf_counter() - begin:6.1f} s  {what}", highlight=False)

    folder = twin_folder(args.model, args.folder, args.device, say)
    lm = load_twin(folder, args.device)
    say("loaded")
    found = [prompt for task in TASKS for prompt in load_prompts(task, "test")[: args.prompts]]
    # The longest first: on CUDA graphs its session has room for all.
    prompts = list(enumerate(sorted((lm.encode(prompt.text) for prompt in found), key=len, reverse=True)))
    about = {**machine(lm.device.type), **{name: str(value) for name, value in vars(args).items() if name != "out"}}
    about["model"] = lm.name
    unlike: dict[str, float] = {}
    timings: dict[str, Timing] = {}
    errors: dict[str, str] = {}
    rows: list[dict[str, Any]] = []

    def measure(name: str, method: Method, warm_up: list, repeats: int) -> None:
        try:
            with time_limit(args.limit):
                timings[name] = time_alone(method, prompts, warm_up, repeats, lm.device.type == "cuda")
            say(f"{timings[name].tokens_per_second:6.1f} tokens/s: {name}")
        except (Exception, OutOfTime) as error:  # whatever a library raises
            errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            say(f"no figure: {name}: {errors[name]}")
        rows[:] = table(timings, errors, unlike)
        write_results(args.out or results_folder(lm.device.type), f"engine_peers-{lm.name}", rows, about)

    for name in args.strategies:
        strategy = parse_strategy(name, args.policy if name.startswith("lede") else None)
        # A first pass over all of them, for the graphs of their exits.
        measure(f"ours, {name}", Player(lm, strategy, args.max_new_tokens, 0.0, 0), prompts, args.repeats)
    model = load_peer(folder, lm)
    say("loaded by transformers")
    unlike |= {name: differing(model, prompts, timing.tokens) for name, timing in timings.items()}
    for name, method in peers(model, args.max_new_tokens).items():
        measure(name, method, prompts[:1], args.peer_repeats)
    print_table(f"{lm.name} beside transformers, greedy, {lm.dtype}, batch 1", rows, console)
    return rows


def twin_folder(model: str, folder: Path | None, device: str, say: Callable[[str], None]) -> Path:
    """The folder of a model's twin, written unless it is there. It has its name only once it is whole."""
    spec, where = twin_spec(model), resolve_device(device)
    dtype = resolve_dtype(None, where)
    name = f"{twin_name(spec.name)}-{str(dtype).removeprefix('torch.')}"
    folder = folder or Path(tempfile.gettempdir()) / name
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        say(f"writing {folder}")
        write_twin(spec, EMBEDDED, part, where, dtype)
        part.rename(folder)
    say(f"the twin is in {folder}")
    return folder


def load_twin(folder: Path, device: str) -> LayeredLM:
    """The twin of a folder, as if it had been downloaded.

    Raises:
        LedeError: it is no twin, or that of an earlier embedded model.
    """
    lm = lede_env.load_model(folder, device=device)
    if lm.weights != "twin" or lm.fingerprint != lede_env.load_model("tiny", device="cpu").fingerprint:
        raise LedeError(f"{folder} holds no twin of the embedded model as it is; remove it, or name another --folder")
    return lm


def load_peer(folder: Path, lm: LayeredLM) -> Any:
    """transformers' model of the folder; on the device by way of the host, for the straight way takes accelerate."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=lm.dtype).to(lm.device).eval()


def peers(model: Any, max_new_tokens: int) -> dict[str, Method]:
    """transformers' generate: eager, with assistant_early_exit at scaled layers, and compiled with a static cache."""
    depth = model.config.num_hidden_layers
    early = {}
    for layer, tokens, threshold in EARLY_EXITS:
        exit_layer = round(layer * depth / 32)
        name = f"transformers, assistant_early_exit={exit_layer}, {tokens} tokens, threshold {threshold}"
        early[name] = transformers_method(model, max_new_tokens, (exit_layer, tokens, threshold))
    return {
        EAGER: transformers_method(model, max_new_tokens),
        **early,
        "transformers, static cache, compiled": transformers_method(
            model, max_new_tokens, cache_implementation="static"
        ),
    }


def transformers_method(
    model: Any,
    max_new_tokens: int,
    early_exit: tuple[int, int, float] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Method:
    """transformers' own generate on (index, token ids); early_exit: (exit layer, draft tokens, threshold)."""
    depth = model.config.num_hidden_layers
    options |= {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    if early_exit is not None:
        options["assistant_early_exit"] = early_exit[0]

    def decode(prompt: tuple[int, list[int]]):
        index, tokens = prompt
        torch.manual_seed(derive_seed(seed, index))
        model.config.num_hidden_layers = depth  # an early exit that was interrupted leaves its own
        if early_exit is not None:  # passed to generate() these two are ignored; on the generation config they count
            model.generation_config.num_assistant_tokens = early_exit[1]
            model.generation_config.assistant_confidence_threshold = early_exit[2]
        ids = torch.tensor([tokens], device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
        return out[0, len(tokens) :].tolist(), None

    return decode


class OutOfTime(BaseException):
    """No Exception: compilers take those for a candidate that failed, and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, by raising OutOfTime in it. Only in the main thread."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def time_alone(method: Method, prompts: list, warm_up: list, repeats: int, synchronise: bool) -> Timing:
    """One method on every prompt, after a warm-up."""
    for prompt in warm_up:
        method(prompt)
    timing = Timing()
    for _ in range(repeats):
        for prompt in prompts:
            timing.add(prompt[0], *timed(method, prompt, synchronise))
    return timing


@torch.inference_mode()
def differing(model: Any, prompts: list[tuple[int, list[int]]], texts: dict[int, list[int]]) -> float:
    """Share of the tokens of greedy texts that are not transformers' choice after the tokens before them."""
    unlike = 0
    for index, prompt in prompts:
        text = torch.tensor(texts[index], device=model.device)
        ids = torch.tensor([prompt + texts[index]], device=model.device)
        best = model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)  # (tokens,)
        unlike += int((best != text).sum())
    return unlike / sum(map(len, texts.values()))


def table(timings: dict[str, Timing], errors: dict[str, str], unlike: dict[str, float]) -> list[dict[str, Any]]:
    """A row a method, with what can be said by now: over the best early exit, the share of its text that is
    transformers' eager text, up to the first other token, and that of tokens that are not transformers' choice."""
    early = [name for name in timings if "early_exit" in name]
    best = max(early, key=lambda name: timings[name].tokens_per_second, default=None)
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {"method": name, "tokens/s": timing.tokens_per_second}
        if best is not None:
            row["over the best early exit"], low, high = speedup_interval(timings[best], timing)
            row["95 %"] = f"{low:.2f} to {high:.2f}"
        if EAGER in timings:
            theirs = timings[EAGER].tokens
            shares = [agreement(timing.tokens[index], theirs[index]) for index in theirs]
            row["as the eager text"] = statistics.mean(shares)
        if name in unlike:
            row["tokens unlike transformers'"] = unlike[name]
        rows.append(row)
    return rows + [{"method": name, "error": error} for name, error in errors.items()]


def agreement(ours: list[int], theirs: list[int]) -> float:
    """Share of a text up to its first token unlike the other's: bfloat16 rounds, and texts part for good."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return same / max(1, len(theirs))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
