"""More training contexts: prompts made of the openings of texts, as many as there are texts.

    python -m lede_env.openings --code corpus/python.heldout.txt.xz --prose corpus/prose.heldout.txt.xz \\
        --count 2000 --out openings.jsonl
    lede record --env LEDE-Tiny-v0 --trace --prompts openings.jsonl --out openings.h5

`gym.make("LEDE-Tiny-v0", backend="trace", trace="openings.h5")` then plays them. Use texts that the model was not
trained on: the held-out files of `python -m lede_env.models.layerskip`'s corpus (its card says how to build it), or
your own sources. Which openings are taken, and how long each is, depends on the texts alone.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from lede_env.errors import LedeError
from lede_env.tasks import SPLITS, Prompt

SUFFIXES = {"code": (".py",), "lm": (".txt", ".md")}  # of the files of a folder
SHORTEST, LONGEST = 160, 640  # characters of an opening; a text has at least twice as many as its own


@dataclass
class Args:
    """Write a .jsonl file of prompts that are openings of texts, half of them code where both kinds are given."""

    out: Path
    count: int = 2000  # prompts
    # sources: a file of texts separated by NUL, plain or .xz, or a folder of .py files
    code: tuple[Path, ...] = ()
    prose: tuple[Path, ...] = ()  # likewise; of .txt and .md files
    split: str = "train"  # what the prompts are for


def openings(texts: Iterable[str], task: str, split: str) -> list[Prompt]:
    """The openings of distinct texts that are long enough, in an order that is random, but always the same.

    Code ends with a whole line, prose with a whole word.
    """
    found: dict[str, Prompt] = {}
    for text in texts:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        length = SHORTEST + int(digest, 16) % (LONGEST - SHORTEST)
        head = text[:length].rpartition("\n" if task == "code" else " ")[0].rstrip()
        if len(text) >= 2 * length and len(head) >= SHORTEST // 2:
            found[digest] = Prompt(f"opening/{task}/{digest}", task, head, "", split)
    return [found[digest] for digest in sorted(found)]


def read_texts(source: Path, task: str) -> Iterator[str]:
    """The texts of a file or folder.

    Raises:
        LedeError: nothing there, or no text in UTF-8.
    """
    if not source.exists():
        raise LedeError(f"{source}: no such file or folder; give one with texts to take openings of")
    inside = sorted(path for suffix in SUFFIXES[task] for path in source.rglob(f"*{suffix}"))
    for path in inside if source.is_dir() else [source]:
        try:
            content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
            yield from content.decode().split("\0")
        except (UnicodeDecodeError, lzma.LZMAError) as error:
            raise LedeError(f"{path}: not text in UTF-8 ({error}); give texts, plain or .xz") from error


def choose(args: Args) -> list[Prompt]:
    """The prompts asked for.

    Raises:
        LedeError: no sources, an unknown split, or fewer texts than prompts.
    """
    if args.split not in SPLITS or args.count < 1:
        raise LedeError(f"split={args.split!r} must be one of {', '.join(SPLITS)}, and count={args.count} at least 1")
    sources = {task: paths for task, paths in (("code", args.code), ("lm", args.prose)) if paths}
    if not sources:
        raise LedeError("no texts to take openings of: give --code, --prose or both")
    prompts: list[Prompt] = []
    for place, (task, paths) in enumerate(sources.items()):
        wanted = (args.count + place) // len(sources)
        own = openings((text for path in paths for text in read_texts(path, task)), task, args.split)
        if len(own) < wanted:
            raise LedeError(f"{wanted} openings of kind {task!r} were asked for, but there are {len(own)}; add texts")
        prompts += own[:wanted]
    return prompts


def main(args: Args) -> None:
    rows = [
        {"id": p.id, "task": p.task, "prompt": p.text, "reference": p.reference, "split": p.split} for p in choose(args)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} prompts")


if __name__ == "__main__":
    from lede_env.arguments import clear_errors

    with clear_errors():
        main(tyro.cli(Args))
