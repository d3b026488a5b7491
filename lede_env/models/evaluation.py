"""How well early layers speak for the last one: agreement by layer, on held-out and on its own text.

Works on exported folders: Llama weights and a tokenizer whose id 0 begins and ends a document. Nothing here
knows how the model was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import get_console
from rich.console import Console
from rich.progress import Progress, TaskID, track
from rich.table import Table
from torch import Tensor

from lede_env.errors import LedeError
from lede_env.models.corpus import heldout_tokens

TEMPERATURE = 0.6
OPENING, CONTINUATION = 64, 128  # tokens


def exit_logits(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Logits (B, T, V) of the last layer, then of layers 1..L-1, each through the final norm and head."""
    output = model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    yield model.lm_head(output.last_hidden_state)
    for state in output.hidden_states[1:-1]:
        yield model.lm_head(model.model.norm(state))


@torch.inference_mode()
def teacher_forced(model: Any, stream: np.ndarray, windows: int, context: int) -> dict[str, Any]:
    """Next-token loss and accuracy of the last layer, and agreement (L,) with it, on evenly spaced windows.

    stream: (N,) token ids. Raises LedeError when it is shorter than one window.
    """
    count = min(windows, (len(stream) - 1) // context)
    if count < 1:
        raise LedeError(f"held-out text has {len(stream)} tokens: expected more than the context of {context}")
    starts = np.linspace(0, len(stream) - context - 1, count).astype(int)
    agreement = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    loss = correct = 0.0
    for start in track(starts, "held-out windows"):
        ids = torch.from_numpy(stream[start : start + context + 1].astype(np.int64)).to(model.device)
        exits = exit_logits(model, ids[None, :-1])
        last = next(exits)[0]  # (T, V)
        choice = last.argmax(-1)
        loss += torch.nn.functional.cross_entropy(last.float(), ids[1:]).item()
        correct += (choice == ids[1:]).double().mean().item()
        early = [(e[0].argmax(-1) == choice).double().mean().item() for e in exits]
        agreement += torch.tensor([*early, 1.0], dtype=torch.float64)
    return {
        "windows": count,
        "loss": loss / count,
        "accuracy": correct / count,
        "agreement": (agreement / count).tolist(),
    }


def openings(stream: np.ndarray, count: int) -> Tensor:
    """(n, 1 + OPENING) first tokens of up to `count` evenly spaced documents, the leading 0 included."""
    begins = np.flatnonzero(stream == 0)
    lengths = np.diff(np.append(begins, len(stream)))
    begins = begins[lengths > OPENING]
    if not len(begins):
        raise LedeError(f"no held-out document has {OPENING} tokens to open a continuation with")
    chosen = begins[np.linspace(0, len(begins) - 1, min(count, len(begins))).astype(int)]
    return torch.from_numpy(np.stack([stream[b : b + 1 + OPENING] for b in chosen]).astype(np.int64))


class TokenTicks:
    """The streamer that `generate` hands the prompts and each step's tokens to: it only moves the progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def put(self, value: Tensor) -> None:
        self.progress.advance(self.task)

    def end(self) -> None:
        pass


def continue_texts(model: Any, prompts: Tensor, temperature: float) -> Tensor:
    """Prompts (B, T) with the model's own continuations, (B, T + new); greedy at temperature 0, else from seed 0."""
    new = min(CONTINUATION, model.config.max_position_embeddings - prompts.shape[1])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    torch.manual_seed(0)
    with Progress() as progress:
        return model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            streamer=TokenTicks(progress, progress.add_task(f"own text at T = {temperature}", total=1 + new)),
            **(sampling or {"do_sample": False}),
        )


@torch.inference_mode()
def own_text(model: Any, prompts: Tensor, temperature: float) -> list[float]:
    """Per layer (L,), on the model's own continuations of prompts (B, T).

    temperature 0: share of positions with the last layer's argmax. Otherwise: the expected acceptance
    sum_x min(p, q) of a draft from that layer, both at `temperature`. Text after end of text is not counted.
    """
    ids = continue_texts(model, prompts.to(model.device), temperature)
    ended = (ids[:, prompts.shape[1] :] == 0).int()
    counted = ended.cumsum(1) - ended == 0  # (B, new): up to and with the first end of text
    rows = slice(prompts.shape[1] - 1, ids.shape[1] - 1)
    exits = exit_logits(model, ids)
    last = next(exits)[:, rows].float()
    p = (last / temperature).softmax(-1) if temperature else None
    result = []
    for early in track(exits, "its exits", total=model.config.num_hidden_layers - 1):
        early = early[:, rows].float()
        if p is None:
            score = (early.argmax(-1) == last.argmax(-1)).float()
        else:
            score = torch.minimum(p, (early / temperature).softmax(-1)).sum(-1)
        result.append(score[counted].mean().item())
    return [*result, 1.0]


def evaluate(model_folder: Path, data: Path, device: str, windows: int = 64, texts: int = 64) -> dict[str, Any]:
    """All measures of an exported model on the held-out text of `data`, by domain. Computed in float32.

    Deterministic: evenly spaced windows and documents, one seed. A GPU's samples are not those of a CPU.
    Raises LedeError when the model, the held-out text or the device is missing.
    """
    from transformers import AutoModelForCausalLM

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise LedeError(f"device {device!r}: no CUDA device here; use cpu")
    for name in ("config.json", "tokenizer.json"):
        if not (model_folder / name).exists():
            raise LedeError(f"{model_folder}: no {name}; expected an exported model folder")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = model.to(device).eval()
    results = {}
    for domain, stream in heldout_tokens(data, model_folder / "tokenizer.json").items():
        get_console().print(f"{domain}: {len(stream):,} held-out tokens", highlight=False)
        prompts = openings(stream, texts)
        results[domain] = {
            "heldout": teacher_forced(model, stream, windows, model.config.max_position_embeddings),
            "own_text_greedy": own_text(model, prompts, 0.0),
            f"own_text_T{TEMPERATURE}": own_text(model, prompts, TEMPERATURE),
        }
    return results


def report(results: dict[str, Any], path: Path, console: Console) -> None:
    """Print the results as a table and write them to `path` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("layer", title="agreement with the last layer (T: expected acceptance)")
    columns: list[list[float]] = []
    for domain, measures in results.items():
        heldout = measures["heldout"]
        console.print(f"{domain}, held out: loss {heldout['loss']:.3f}, next-token accuracy {heldout['accuracy']:.3f}")
        for name in ("held-out", "own greedy", f"own T={TEMPERATURE}"):
            table.add_column(f"{domain} {name}", justify="right")
        columns += [heldout["agreement"], measures["own_text_greedy"], measures[f"own_text_T{TEMPERATURE}"]]
    for layer, values in enumerate(zip(*columns, strict=True), start=1):
        table.add_row(str(layer), *(f"{v:.3f}" for v in values))
    console.print(table)
