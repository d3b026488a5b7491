"""Prompts and their splits.

`load_prompts` reads them from three kinds of source, told apart by name:

- a task, or "all": the prompts written for this project, in `lede_env/prompts/<task>.jsonl`;
- a path that ends in `.jsonl`: one JSON object a line with the keys `id, task, prompt, reference`, and
  optionally `split`;
- `hub:<name>`: one of the paper's five datasets (section 4), from the Hugging Face hub.

Rows that name no split get one from a hash of their id: 50 % train, 20 % validation, 30 % test. It depends on
nothing but the id, so a row stays in its split when rows are added or others are drawn.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lede_env.arguments import check_text
from lede_env.errors import LedeError

TASKS = ("code", "lm", "summarization", "instruction", "parse")
SPLITS = ("train", "validation", "test")
PROMPTS_DIR = Path(__file__).parent / "prompts"
KEYS = ("id", "task", "prompt", "reference")
CLOSING_TOKENS = 16  # enough for "\nSummary:" or "\n\n### Response:\n" in any tokenizer
LM_WORDS = 100  # the paper's language modelling task continues the first 100 words of an article


@dataclass(frozen=True)
class Prompt:
    """One prompt. `text` is what the model continues; `reference` is one good continuation, or ""."""

    id: str
    task: str
    text: str
    reference: str
    split: str


@dataclass(frozen=True)
class HubTask:
    """Where a dataset lives on the hub, and how a row of it becomes (text, reference)."""

    task: str
    dataset: str
    config: str | None
    rows_from: str  # the hub's own name of the split that rows are drawn from
    convert: Callable[[dict[str, Any]], tuple[str, str]]


def load_prompts(
    task: str | Path | Sequence[str | Path] = "all",
    split: str = "train",
    *,
    hub_rows: int = 200,
    seed: int = 0,
) -> list[Prompt]:
    """Load the prompts of a task in a fixed order.

    Args:
        task: "all", one of `TASKS`, a path to a `.jsonl` file, one of `HUB_TASKS`, or a sequence of these,
            which are loaded one after the other.
        split: one of `SPLITS`, or "all".
        hub_rows: how many rows to draw from a hub dataset, before they are divided into splits.
        seed: of the draw from a hub dataset.

    Raises:
        LedeError: an unknown task or split, a missing or malformed file, an id that occurs twice, a split
            without prompts, or a hub dataset that cannot be reached.
    """
    if split not in (*SPLITS, "all"):
        raise LedeError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}, all")
    if hub_rows < 1:
        raise LedeError(f"hub_rows must be at least 1, got {hub_rows}")
    prompts: list[Prompt] = []
    for source in [task] if isinstance(task, str | Path) else task:
        prompts += _load_source(source, hub_rows, seed)
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise LedeError(f"two prompts have the id {prompt.id!r} in task {task!r}; ids must be unique")
        seen.add(prompt.id)
    found = [prompt for prompt in prompts if split in (prompt.split, "all")]
    if not found:
        others = ", ".join(f"{count} in {name}" for name, count in Counter(p.split for p in prompts).items()) or "none"
        raise LedeError(
            f"task {str(task)!r} has no prompts in split {split!r} (it has {others}); split='all' takes all; rows of a "
            "file that name no split fall into one by their id"
        )
    return found


def fit_prompt(ids: list[int], room: int, task: str) -> tuple[list[int], int]:
    """Cut a tokenised prompt to at most `room` tokens. Returns the kept tokens and how many were cut.

    The first token (BOS, where the tokenizer has one) and the end of the prompt are kept: the cut is made
    right after the first token, because what stands next to the continuation matters most. A summary or an
    instruction has its request at the start and its marker ("Summary:", "### Response:") at the very end,
    so there the start and the last `CLOSING_TOKENS` tokens are kept: the cut is made just before the latter.
    """
    if task not in TASKS:
        raise LedeError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if room < 2:
        raise LedeError(f"room for {room} prompt tokens, but 2 are needed; generate fewer new tokens")
    if len(ids) <= room:
        return list(ids), 0
    n_end = room - 1
    if task in ("summarization", "instruction"):
        n_end = min(CLOSING_TOKENS, n_end)
    return ids[: room - n_end] + ids[-n_end:], len(ids) - room


def _load_source(source: str | Path, hub_rows: int, seed: int) -> list[Prompt]:
    if source == "all":
        return [prompt for name in TASKS for prompt in _read_jsonl(PROMPTS_DIR / f"{name}.jsonl")]
    if source in TASKS:
        return _read_jsonl(PROMPTS_DIR / f"{source}.jsonl")
    if str(source).endswith(".jsonl"):
        return _read_jsonl(Path(source))
    if str(source).startswith("hub:"):
        return _read_hub(str(source), hub_rows, seed)
    raise LedeError(
        f"unknown task {str(source)!r}; choose one of {', '.join(TASKS)}, all, a path to a .jsonl file, "
        f"or {', '.join(HUB_TASKS)}"
    )


def _hash_split(prompt_id: str) -> str:
    tenth = int.from_bytes(hashlib.sha256(prompt_id.encode("utf-8")).digest()[:8], "big") % 10
    return "train" if tenth < 5 else "validation" if tenth < 7 else "test"


def _read_jsonl(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise LedeError(f"prompt file {str(path)!r} does not exist")
    prompts = []
    with path.open("rb") as file:  # bytes: a line is decoded by itself, so that an error can name it
        for number, line in enumerate(file, start=1):
            if line.strip():
                prompts.append(_parse_line(line, f"{path}, line {number}"))
    return prompts


def _parse_line(line: bytes, where: str) -> Prompt:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LedeError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise LedeError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise LedeError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key in KEYS:
        if not isinstance(row.get(key), str):
            problem = "is not a string" if key in row else "is missing"
            raise LedeError(f'{where}: {key!r} {problem}; needed are {", ".join(KEYS)} (reference may be "")')
        check_text(row[key], f"{where}: {key!r}")
    if row["task"] not in TASKS:
        raise LedeError(f"{where}: unknown task {row['task']!r}; choose one of {', '.join(TASKS)}")
    if not row["prompt"].strip():
        raise LedeError(f"{where}: the prompt of {row['id']!r} is empty")
    split = row.get("split", _hash_split(row["id"]))
    if split not in SPLITS:
        raise LedeError(f"{where}: unknown split {split!r}; choose one of {', '.join(SPLITS)} or none")
    return Prompt(row["id"], row["task"], _opening(row["task"], row["prompt"]), row["reference"], split)


def _opening(task: str, text: str) -> str:
    """Code without its last line breaks: tokenizers join a break with the indentation that follows it, so a bare one
    mostly stands before the end of a file, and the model would end there."""
    return text.rstrip("\n") if task == "code" else text


def _read_hub(name: str, n_rows: int, seed: int) -> list[Prompt]:
    if name not in HUB_TASKS:
        raise LedeError(f"unknown hub task {name!r}; choose one of {', '.join(HUB_TASKS)}")
    hub = HUB_TASKS[name]
    otherwise = "or give a .jsonl file with the keys " + ", ".join(KEYS)
    try:
        from datasets import load_dataset
    except ImportError as error:  # also raised where only a folder named datasets/ is found
        raise LedeError(f"{name} needs an extra: pip install 'lede-env[hub]', {otherwise}") from error
    try:
        table = load_dataset(hub.dataset, hub.config, split=hub.rows_from)
    except Exception as error:  # the hub client has many error types: no network, no access, no such dataset
        problem = f"{name}: cannot load {hub.dataset} ({error})"
        raise LedeError(f"{problem}; check the network, {otherwise}") from error
    prompts = []
    for index in sorted(random.Random(seed).sample(range(len(table)), min(n_rows, len(table)))):
        text, reference = hub.convert(table[index])
        prompt_id = f"{name}/{index}"
        prompts.append(Prompt(prompt_id, hub.task, _opening(hub.task, text), reference, _hash_split(prompt_id)))
    return prompts


def _cnn_dm_summarization(row: dict[str, Any]) -> tuple[str, str]:
    return f"Article: {row['article'].strip()}\nSummary:", row["highlights"]


def _cnn_dm_lm(row: dict[str, Any]) -> tuple[str, str]:
    words = row["article"].split()
    return " ".join(words[:LM_WORDS]), " ".join(words[LM_WORDS:])


def _alpaca(row: dict[str, Any]) -> tuple[str, str]:
    context = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n", row["output"]


def _topv2(row: dict[str, Any]) -> tuple[str, str]:
    return f"### Utterance:\n{row['utterance']}\n\n### Parse:\n", row["semantic_parse"]


def _humaneval(row: dict[str, Any]) -> tuple[str, str]:
    return row["prompt"], row["canonical_solution"]


HUB_TASKS = {
    "hub:cnn_dm_summarization": HubTask(
        "summarization", "abisee/cnn_dailymail", "3.0.0", "test", _cnn_dm_summarization
    ),
    "hub:cnn_dm_lm": HubTask("lm", "abisee/cnn_dailymail", "3.0.0", "test", _cnn_dm_lm),
    "hub:alpaca": HubTask("instruction", "tatsu-lab/alpaca", None, "train", _alpaca),
    "hub:topv2": HubTask("parse", "WillHeld/top_v2", None, "test", _topv2),
    "hub:humaneval": HubTask("code", "openai/openai_humaneval", None, "test", _humaneval),
}
