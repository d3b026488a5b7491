"""The shipped prompts, JSONL files, hub datasets and the cutting of long prompts."""

import ast
import doctest
import inspect
import itertools
import json
import re
import sys
import types
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lede_env.arguments import check_text
from lede_env.errors import LedeError
from lede_env.tasks import CLOSING_TOKENS, HUB_TASKS, SPLITS, TASKS, fit_prompt, load_prompts

ALL = load_prompts("all", "all")
HEADER = re.compile(r"^(### Instruction:\n|### Utterance:\n|Article: )")
FORMS = {
    "code": re.compile(r".*\S", re.DOTALL),
    "lm": re.compile(r".*\S", re.DOTALL),
    "summarization": re.compile(r"Article: [^\n]+\nSummary:"),
    "instruction": re.compile(r"### Instruction:\n.+?\n\n(### Input:\n.+?\n\n)?### Response:\n", re.DOTALL),
    "parse": re.compile(r"### Utterance:\n[^\n]+\n\n### Parse:\n"),
}
INTENTS = {
    "ADDTOPLAYLIST",
    "BOOKRESTAURANT",
    "GETWEATHER",
    "PLAYMUSIC",
    "RATEBOOK",
    "SEARCHCREATIVEWORK",
    "SEARCHSCREENINGEVENT",
}


def of_task(task):
    return [prompt for prompt in ALL if prompt.task == task]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(number=1, **changes):
    return {"id": f"mine/{number}", "task": "lm", "prompt": "Once upon a time", "reference": ""} | changes


# The shipped prompts


def test_counts():
    counts = Counter(prompt.task for prompt in ALL)
    assert tuple(counts) == TASKS
    assert len(ALL) >= 320
    assert counts["code"] >= 110 and min(counts.values()) >= 40


@pytest.mark.parametrize("task", TASKS)
def test_split_sizes(task):
    sizes = [len(load_prompts(task, split)) / len(of_task(task)) for split in SPLITS]
    assert sizes == pytest.approx([0.5, 0.2, 0.3], abs=0.03)


def test_splits_are_disjoint_and_complete():
    by_split = [{prompt.id for prompt in load_prompts("all", split)} for split in SPLITS]
    assert sum(map(len, by_split)) == len(set.union(*by_split)) == len(ALL)


def test_no_two_prompts_are_alike():
    assert len({prompt.text for prompt in ALL}) == len(ALL)
    openings = Counter(HEADER.sub("", prompt.text)[:60] for prompt in ALL)
    assert [opening for opening, count in openings.items() if count > 1] == []


@pytest.mark.parametrize("task", TASKS)
def test_form(task):
    for prompt in of_task(task):
        assert FORMS[task].fullmatch(prompt.text), prompt.id
        assert re.fullmatch(rf"{task}/\d{{4}}", prompt.id)
        assert prompt.reference or task == "code", prompt.id


def test_lengths_in_words():
    assert all(40 <= len(prompt.text.split()) <= 110 for prompt in of_task("lm"))
    assert all(80 <= len(prompt.text.split()) <= 220 for prompt in of_task("summarization"))


def with_body(source):
    """Append `pass` where a prompt ends in a line that opens a block."""
    last = source.rstrip("\n").rpartition("\n")[2]
    if not last.endswith(":"):
        return source
    return source + "\n" + " " * (len(last) - len(last.lstrip()) + 4) + "pass\n"


def test_code_is_python():
    for prompt in of_task("code"):
        ast.parse(with_body(prompt.text), filename=prompt.id)


def test_code_references_pass_the_examples_of_their_docstrings():
    tried = 0
    for prompt in of_task("code"):
        if prompt.reference:
            namespace = {"__name__": "prompt"}
            exec(prompt.text + "\n" + prompt.reference, namespace)
            function = next(f for f in namespace.values() if inspect.isfunction(f) and f.__module__ == "prompt")
            test = doctest.DocTestParser().get_doctest(function.__doc__, namespace, prompt.id, None, 0)
            result = doctest.DocTestRunner(verbose=False).run(test)
            assert result.failed == 0, prompt.id
            tried += result.attempted
    assert tried > 80


def test_parse_references_hold_the_utterance():
    seen = set()
    for prompt in of_task("parse"):
        intent, inner = re.fullmatch(r"\[IN:([A-Z]+) (.+) \]", prompt.reference).groups()
        utterance = re.sub(r"\[SL:[A-Z_]+ (.+?) \]", r"\1", inner)
        assert prompt.text == f"### Utterance:\n{utterance}\n\n### Parse:\n"
        seen.add(intent)
    assert seen == INTENTS


# Choosing tasks


def test_order_is_fixed_and_follows_the_request():
    assert load_prompts("code") == load_prompts("code")
    assert load_prompts(("parse", "code")) == load_prompts("parse") + load_prompts("code")


@pytest.mark.parametrize(
    ("task", "split", "message"),
    [
        ("poetry", "train", "unknown task 'poetry'.*code, lm, summarization, instruction, parse, all"),
        ("code", "dev", "unknown split 'dev'.*train, validation, test, all"),
        ("nowhere/prompts.jsonl", "test", "nowhere/prompts.jsonl.*does not exist"),
        ("hub:squad", "test", "unknown hub task 'hub:squad'.*hub:alpaca"),
        (("code", "all"), "train", "two prompts have the id 'code/0001'"),
        ((), "train", "no prompts in split 'train'"),
    ],
)
def test_bad_requests(task, split, message):
    with pytest.raises(LedeError, match=message):
        load_prompts(task, split)


def test_hub_rows_must_be_positive():
    with pytest.raises(LedeError, match="hub_rows must be at least 1, got 0"):
        load_prompts("hub:alpaca", hub_rows=0)


# JSONL files


def test_jsonl_file_is_split_by_id(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", [row(i, prompt=f"Text {i}") for i in range(300)])
    everything = load_prompts(path, "all")
    assert [prompt.text for prompt in everything] == [f"Text {i}" for i in range(300)]
    parts = [load_prompts(str(path), split) for split in SPLITS]
    assert sorted(itertools.chain(*parts), key=lambda p: p.id) == sorted(everything, key=lambda p: p.id)
    assert [len(part) / 300 for part in parts] == pytest.approx([0.5, 0.2, 0.3], abs=0.08)
    write_jsonl(path, [row(i) for i in range(150, 301)])
    assert {p.id: p.split for p in everything}["mine/299"] == load_prompts(path, "all")[149].split


def test_jsonl_file_may_name_splits_and_hold_unicode_line_ends(tmp_path):
    path = tmp_path / "mine.jsonl"
    line = json.dumps(row(split="test", prompt="one\u2028two"), ensure_ascii=False)
    path.write_text("\n" + line + "\n\n", encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(path, "test")] == ["one\u2028two"]
    with pytest.raises(LedeError, match="no prompts in split 'train'"):
        load_prompts(path, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1, 2]", "line 2: expected a JSON object, got list"),
        ('{"id": "x", "task": "lm", "reference": ""}', "line 2: 'prompt' is missing"),
        (json.dumps(row(reference=None)), "line 2: 'reference' is not a string"),
        (json.dumps(row(task="poetry")), "line 2: unknown task 'poetry'"),
        (json.dumps(row(prompt=" \n")), "line 2: the prompt of 'mine/1' is empty"),
        (json.dumps(row(split="dev")), "line 2: unknown split 'dev'"),
        (json.dumps(row(0)), "two prompts have the id 'mine/0'"),
    ],
)
def test_malformed_line(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(LedeError, match=message):
        load_prompts(path, "all")


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\r\n\xff\xfe\x00\n")
    with pytest.raises(LedeError, match=r"mine.jsonl, line 2: not UTF-8 .*save the file as UTF-8"):
        load_prompts(path, "all")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", [row(), row(2, prompt="fine \U0001f98a"), row(3, prompt="half \ud83e")])
    with pytest.raises(LedeError, match=r"line 3: 'prompt' is not Unicode text: '\\ud83e' at character 5"):
        load_prompts(path, "all")
    check_text("é 🦊", "the prompt")


# The hub, without a network

HUB_ROW = {
    "article": "word " * 150,
    "highlights": "short",
    "instruction": "Add.",
    "input": "1, 2",
    "output": "3",
    "utterance": "wake me at six",
    "semantic_parse": "[IN:CREATE_ALARM wake me at six ]",
    "prompt": "def f():\n",
    "canonical_solution": "    pass\n",
}


@pytest.mark.parametrize("name", HUB_TASKS)
def test_hub_rows_become_prompts(name, monkeypatch):
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda path, config, split: [HUB_ROW] * 50
    monkeypatch.setitem(sys.modules, "datasets", hub)
    prompts = load_prompts(name, "all", hub_rows=20)
    assert len(prompts) == 20 and len(load_prompts(name, "all")) == 50
    assert prompts == load_prompts(name, "all", hub_rows=20) != load_prompts(name, "all", hub_rows=20, seed=1)
    assert FORMS[prompts[0].task].fullmatch(prompts[0].text)
    assert prompts[0].reference


def test_hub_lm_prompt_is_the_first_hundred_words():
    text, reference = HUB_TASKS["hub:cnn_dm_lm"].convert(HUB_ROW)
    assert len(text.split()) == 100 and len(reference.split()) == 50


@pytest.mark.parametrize("module", [None, types.ModuleType("datasets")], ids=["absent", "folder"])
def test_hub_without_the_library(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(LedeError, match=r"pip install 'lede-env\[hub\]', or give a \.jsonl file"):
        load_prompts("hub:alpaca")


def test_hub_out_of_reach(monkeypatch):
    def refuse(path, config, split):
        raise ConnectionError("no network")

    hub = types.ModuleType("datasets")
    hub.load_dataset = refuse
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(LedeError, match=r"cannot load openai/openai_humaneval.*no network.*jsonl"):
        load_prompts("hub:humaneval")


# Prompts that are too long


@given(n=st.integers(1, 200), room=st.integers(2, 200), task=st.sampled_from(TASKS))
def test_fit_prompt(n, room, task):
    ids = list(range(n))
    kept, n_cut = fit_prompt(ids, room, task)
    assert len(kept) == min(n, room) and len(kept) + n_cut == n
    assert kept == sorted(set(kept))  # order is kept, nothing is doubled
    assert kept[0] == ids[0] and kept[-1] == ids[-1]
    assert sum(b - a > 1 for a, b in itertools.pairwise(kept)) <= 1  # one gap at most


def test_fit_prompt_cuts_at_the_stated_place():
    ids = list(range(100))
    assert fit_prompt(ids, 40, "code") == ([0, *range(61, 100)], 60)
    assert fit_prompt(ids, 40, "summarization") == ([*range(40 - CLOSING_TOKENS), *range(84, 100)], 60)


@pytest.mark.parametrize(("room", "task", "message"), [(1, "lm", "but 2 are needed"), (9, "x", "unknown task 'x'")])
def test_fit_prompt_bad_input(room, task, message):
    with pytest.raises(LedeError, match=message):
        fit_prompt([1, 2, 3], room, task)
