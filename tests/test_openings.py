"""Prompts that are openings of texts: which, how long, and that they play."""

from __future__ import annotations

import lzma
import sys
from dataclasses import replace

import gymnasium as gym
import pytest

import lede_env
from lede_env.cli import main as lede
from lede_env.errors import LedeError
from lede_env.openings import LONGEST, SHORTEST, Args, choose, main, openings
from lede_env.tasks import load_prompts

PROSE = [f"Story {n}. " + "It was a dark and stormy night, and rain fell. " * 30 for n in range(12)]
CODE = [f"def f{n}(x):\n" + f'    """Add {n}."""\n    return x + {n}\n' * 60 for n in range(12)]


@pytest.fixture
def args(tmp_path):
    (tmp_path / "prose.txt.xz").write_bytes(lzma.compress("\0".join(PROSE).encode()))
    (tmp_path / "src").mkdir()
    for number, text in enumerate(CODE):
        (tmp_path / "src" / f"{number}.py").write_text(text)
    (tmp_path / "src" / "notes.txt").write_text(PROSE[0])
    return Args(tmp_path / "o.jsonl", 20, code=(tmp_path / "src",), prose=(tmp_path / "prose.txt.xz",))


def test_openings_are_whole_lines_and_words_of_distinct_texts():
    prose, code = openings([*PROSE, PROSE[0], "too short"], "lm", "train"), openings(CODE, "code", "test")
    assert len(prose) == len(code) == 12 and len({prompt.id for prompt in prose + code}) == 24
    for prompt in prose:
        assert any(text.startswith(prompt.text + " ") for text in PROSE) and len(prompt.text) >= SHORTEST // 2
    for prompt in code:
        assert any(text.startswith(prompt.text + "\n") for text in CODE) and prompt.split == "test"
    assert len({len(prompt.text) for prompt in prose}) > 6 and max(len(p.text) for p in prose + code) < LONGEST
    assert openings(list(reversed(PROSE)), "lm", "train") == prose


def test_a_file_of_openings_is_recorded_and_played(args, monkeypatch, tmp_path):
    main(replace(args, count=3))
    prompts = load_prompts(args.out)
    assert [prompt.task for prompt in prompts] == ["code", "lm", "lm"]
    trace = tmp_path / "o.h5"
    command = f"lede record --env LEDE-Tiny-v0 --trace --prompts {args.out} --out {trace} --max-new-tokens 4"
    monkeypatch.setattr(sys, "argv", command.split())
    lede()
    assert lede_env.load_trace(trace).prompt_ids == tuple(prompt.id for prompt in prompts)
    env = gym.make("LEDE-Tiny-v0", backend="trace", trace=str(trace), max_new_tokens=4).unwrapped
    assert env.prompt_ids == [prompt.id for prompt in prompts]


def test_kinds_are_balanced(args):
    tasks = [prompt.task for prompt in choose(args)]
    assert (tasks.count("code"), tasks.count("lm")) == (10, 10)
    assert {prompt.task for prompt in choose(replace(args, prose=(), count=7))} == {"code"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(code=(), prose=()), "give --code, --prose or both"),
        (dict(count=25), "13 openings of kind 'lm' were asked for, but there are 12"),
        (dict(count=0), "count=0 at least 1"),
        (dict(split="dev"), "split='dev' must be one of train"),
    ],
)
def test_bad_arguments(args, change, message):
    with pytest.raises(LedeError, match=message):
        choose(replace(args, **change))


def test_bad_files(args, tmp_path):
    (tmp_path / "bad.xz").write_bytes(b"not xz")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    for name, message in (("bad.xz", "bad.xz: not text"), ("latin.txt", "latin.txt: not text"), ("no", "no: no such")):
        with pytest.raises(LedeError, match=message):
            choose(replace(args, code=(), prose=(tmp_path / name,)))
