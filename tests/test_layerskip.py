"""The training recipe on the CPU, small: exact resume, the objective, the export, the corpus filters."""

from __future__ import annotations

import json
import random
import shutil
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lede_env.errors import LedeError
from lede_env.models import corpus, evaluation
from lede_env.models.layerskip import run_training
from lede_env.models.layerskip_model import (
    Shape,
    dropout_rates,
    exit_layers,
    exit_loss,
    layer_states,
    logits,
)
from lede_env.models.layerskip_trainer import Train, Trainer, learning_rate, read_checkpoint, sample_windows

SHAPE = Shape(vocab=300, hidden=32, layers=2, heads=2, mlp=48, context=96)
SOURCE = "def add_{0}(first, second):\n    '''Add {0} numbers.'''\n    return first + second * {0}\n" * 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for domain, text in (("python", SOURCE), ("prose", "Once upon a time, {0} men went to sea.\n" * 12)):
        for part, count in (("train", 40), ("heldout", 6)):
            documents = [text.format(i) for i in range(count)]
            corpus.write_documents(folder / f"{domain}.{part}.txt.xz", documents)
    corpus.train_tokenizer(folder, SHAPE.vocab)
    corpus.tokenise(folder)
    return folder


@pytest.fixture
def args(data: Path, tmp_path: Path) -> Train:
    return Train(data=data, out=tmp_path / "run", steps=10, batch=3, warmup=4, shape=SHAPE)


def steps(trainer: Trainer, streams: dict[str, np.ndarray], count: int) -> None:
    for _ in range(count):
        _, losses, accuracy = trainer.train_step(streams)
        assert losses.isfinite().all() and 0 <= accuracy <= 1


def test_resume_is_exact(args: Train, tmp_path: Path) -> None:
    streams = corpus.load_tokens(args.data)
    whole, first, second = (Trainer(args, 0, 1, torch.device("cpu")) for _ in range(3))
    before = whole.weights["model.norm.weight"].clone()
    steps(whole, streams, 10)
    steps(first, streams, 5)
    first.save(tmp_path / "checkpoint.safetensors")
    second.load(tmp_path / "checkpoint.safetensors")
    steps(second, streams, 5)
    assert second.step == whole.step == 10
    assert not torch.equal(before, whole.weights["model.norm.weight"])
    for name, weight in whole.weights.items():
        assert torch.equal(weight, second.weights[name]), name


def test_run_and_export(args: Train) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_training(args)
    results = json.loads((args.out / "evaluation.json").read_text())
    assert set(results) == {"python", "prose"}
    for measures in results.values():
        assert len(measures["own_text_greedy"]) == SHAPE.layers and measures["heldout"]["agreement"][-1] == 1
    curve = json.loads((args.out / "curves.jsonl").read_text().splitlines()[-1])
    assert curve["step"] == curve["total"] == 10 and np.isfinite(curve["loss"])

    model = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    weights = {n: w.bfloat16().float() for n, w in read_checkpoint(args.out / "checkpoint.safetensors")[1].items()}
    tokens = torch.randint(0, SHAPE.vocab, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = layer_states(weights, tokens, SHAPE, torch.ones(SHAPE.layers, 2, 1, 1))
        exits = list(evaluation.exit_logits(model, tokens))
        torch.testing.assert_close(logits(weights, states[-1]), model(tokens).logits)
        torch.testing.assert_close(logits(weights, states[-1]), exits[0])
        torch.testing.assert_close(logits(weights, states[0]), exits[1])

    tokenizer = AutoTokenizer.from_pretrained(args.out / "model")
    text = "def f(x):\n    return 1203  # naïve\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 0 == tokenizer.eos_token_id == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert [tokenizer.decode([i]) for i in tokenizer("1203")["input_ids"][1:]] == ["1", "2", "0", "3"]
    chat = [{"role": "user", "content": "Count."}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|endoftext|>### Instruction:\nCount.\n\n### Response:\n"
    assert prompt.removesuffix("### Response:\n") == tokenizer.apply_chat_template(chat, tokenize=False)


def test_run_resumes_after_a_session(args: Train) -> None:
    run_training(replace(args, steps=20, session_minutes=1e-9, evaluate=False))
    assert read_checkpoint(args.out / "checkpoint.safetensors")[0]["step"] == 10
    assert not (args.out / "model").exists()
    run_training(replace(args, steps=20, resume=True, evaluate=False))
    assert read_checkpoint(args.out / "checkpoint.safetensors")[0]["step"] == 20
    assert (args.out / "model" / "model.safetensors").exists()


def test_windows_depend_on_seed_step_and_rank(args: Train) -> None:
    streams = corpus.load_tokens(args.data)
    windows = sample_windows(streams, args, step=3, rank=1)
    assert windows.shape == (3, SHAPE.context + 1)
    assert torch.equal(windows, sample_windows(streams, args, step=3, rank=1))
    for other in ((args, 4, 1), (args, 3, 0), (replace(args, seed=1), 3, 1)):
        assert not torch.equal(windows, sample_windows(streams, *other))


def test_layer_dropout_grows_exponentially_with_depth() -> None:
    rates = dropout_rates(5, 0.1)
    torch.testing.assert_close(rates, 0.1 * torch.tensor([0.0, 0.189207, 0.414214, 0.681793, 1.0]))


def test_exits_rotate_over_all_layers() -> None:
    assert [exit_layers(6, step) for step in range(4)] == [[4, 6], [1, 5, 6], [2, 6], [3, 6]]


@pytest.mark.parametrize("distill", [True, False])
def test_exit_loss(distill: bool) -> None:
    torch.manual_seed(0)
    states, targets = torch.randn(3, 7, 8, requires_grad=True), torch.randint(0, 11, (7,))
    norm, head, scale = torch.rand(8), torch.randn(11, 8), torch.tensor([0.2, 0.3, 0.5])
    total, sums, correct = exit_loss(states, targets, norm, head, scale, distill, torch.float32)
    exits = logits({"model.norm.weight": norm, "model.embed_tokens.weight": head}, states)
    last = torch.nn.functional.cross_entropy(exits[2], targets, reduction="sum")
    if distill:
        p = exits[2].softmax(-1)
        first = (p * (p.log() - exits[0].log_softmax(-1))).sum()
    else:
        first = torch.nn.functional.cross_entropy(exits[0], targets, reduction="sum")
    torch.testing.assert_close(sums[[0, 2]], torch.stack([first, last]).detach())
    torch.testing.assert_close(total, (sums * scale).sum())
    assert correct == (exits[2].argmax(-1) == targets).sum()


def test_learning_rate(args: Train) -> None:
    args = replace(args, warmup=10, lr=1.0)
    rates = [learning_rate(step, 100, args) for step in (0, 9, 30, 65, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.51, 0.02])
    assert learning_rate(50, None, args) == 1.0


def test_bad_input(args: Train, tmp_path: Path) -> None:
    with pytest.raises(LedeError, match="minutes or --steps"):
        run_training(replace(args, minutes=1.0))
    with pytest.raises(LedeError, match="corpus command"):
        run_training(replace(args, data=tmp_path))
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(LedeError, match="not a readable training checkpoint"):
        read_checkpoint(tmp_path / "broken.safetensors")
    (tmp_path / "broken.txt.xz").write_bytes(b"no xz")
    with pytest.raises(LedeError, match="separated by NUL"):
        corpus.read_documents(tmp_path / "broken.txt.xz")
    with pytest.raises(LedeError, match=r"config\.json"):
        evaluation.evaluate(tmp_path, args.data, "cpu")


@pytest.mark.parametrize(
    ("path", "content", "kept"),
    [
        ("package/module.py", SOURCE, True),
        ("package/tests/module.py", SOURCE, False),
        ("package/test_module.py", SOURCE, False),
        ("package/_vendor/module.py", SOURCE, False),
        ("package/third_party/module.py", SOURCE, False),
        ("package/module_pb2.py", SOURCE, False),
        ("package/module.py", "# Auto-generated, do not edit\n" + SOURCE, False),
        ("package/module.py", SOURCE + "x = '" + "a" * 400 + "'\n", False),
        ("package/module.py", SOURCE + "table = [123456, 123456]\n" * 40, False),
        ("package/module.py", "x = 1\n", False),
        ("package/module.py", SOURCE * 1000, False),
    ],
)
def test_python_document(path: str, content: str, kept: bool) -> None:
    assert (corpus.python_document(path, content.encode()) is not None) == kept


def test_licence_header_is_stripped() -> None:
    header = "#!/usr/bin/env python\n# Copyright somebody\n# Licensed under something\n"
    assert corpus.python_document("m.py", (header + "\n" + SOURCE).encode()) == SOURCE
    comment = "# What this module does\n"
    assert corpus.python_document("m.py", (comment + SOURCE).encode()) == comment + SOURCE
    assert corpus.python_document("m.py", b"\xff\xfe" + SOURCE.encode()) is None


@pytest.mark.parametrize(
    ("lines", "permissive"),
    [
        (["License-Expression: MIT"], True),
        (["License-Expression: Apache-2.0 OR GPL-2.0-only"], False),
        (["Classifier: License :: OSI Approved :: BSD License", "License: anything"], True),
        (["Classifier: License :: OSI Approved :: GNU General Public License (GPL)"], False),
        (["License: MPL-2.0"], False),
        (["License: Apache 2.0"], True),
        ([], False),
    ],
)
def test_read_wheel_wants_a_permissive_licence(tmp_path: Path, lines: list[str], permissive: bool) -> None:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/module.py", SOURCE)
        archive.writestr("thing/tests/test_module.py", SOURCE)
        archive.writestr("thing-1.0.dist-info/METADATA", "\n".join(["Name: thing", "Version: 1.0", *lines]))
    if permissive:
        package = corpus.read_wheel(wheel)
        assert (package.name, package.version, package.documents) == ("thing", "1.0", [SOURCE])
    else:
        with pytest.raises(LedeError, match="no permissive licence"):
            corpus.read_wheel(wheel)


def test_deduplicate_and_cap() -> None:
    first = corpus.Package("first", "1", "MIT", ["a" * 50, "b" * 50, "b" * 50])
    second = corpus.Package("second", "1", "MIT", ["a" * 50, "c" * 50, "d" * 50])
    kept = corpus.deduplicate([first, second], package_bytes=60)
    assert [len(p.documents) for p in kept] == [1, 1]
    everything = corpus.deduplicate([first, second])
    assert sorted(t[0] for p in everything for t in p.documents) == ["a", "b", "c", "d"]


def test_split_depends_on_the_document_alone(tmp_path: Path) -> None:
    texts = [f"document {i}\n" for i in range(600)]
    corpus.write_split(tmp_path, "prose", texts)
    held = corpus.read_documents(tmp_path / "prose.heldout.txt.xz")
    corpus.write_split(tmp_path, "prose", texts[:300])
    assert 1 <= len(held) <= 20
    assert set(corpus.read_documents(tmp_path / "prose.heldout.txt.xz")) == set(held) & set(texts[:300])
    assert corpus.read_documents(tmp_path / "prose.train.txt.xz") != sorted(texts[:300])  # shuffled


def test_evaluation_reads_the_models_tokenizer_and_the_domains_there_are(args: Train, tmp_path: Path) -> None:
    run_training(replace(args, steps=2))
    both = json.loads((args.out / "evaluation.json").read_text())
    python_alone = tmp_path / "rebuilt"
    python_alone.mkdir()
    shutil.copy(args.data / "python.heldout.txt.xz", python_alone)
    assert evaluation.evaluate(args.out / "model", python_alone, "cpu") == {"python": both["python"]}
    with pytest.raises(LedeError, match="no held-out text"):
        evaluation.evaluate(args.out / "model", tmp_path, "cpu")


def test_corpus_is_the_same_whatever_the_threads_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"package{i}" for i in range(12)]
    (tmp_path / "wheels.txt").write_text("# a comment\n" + "".join(f"{n}==1  # MIT\n" for n in names))
    rng = random.Random()

    def download(requirement: str) -> corpus.Package:
        time.sleep(rng.random() / 50)
        name, _, version = requirement.partition("==")
        shared, own = "shared\n", [f"{name} document {i}\n" for i in range(40)]
        return corpus.Package(name, version, "MIT", [shared, *own])

    monkeypatch.setattr(corpus, "WHEEL_LIST", tmp_path / "wheels.txt")
    monkeypatch.setattr(corpus, "download", download)
    corpus.write_documents(tmp_path / "prose.txt.xz", [f"Tale {i}." for i in range(300)])
    alone = corpus.build_corpus(tmp_path / "a")
    again = corpus.build_corpus(tmp_path / "b")
    with_prose = corpus.build_corpus(tmp_path / "c", tmp_path / "prose.txt.xz")
    assert alone == again == json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert alone["packages"] == with_prose["packages"]
    assert [p["files"] for p in alone["packages"]] == [41] + [40] * 11
    assert set(alone["files"]) == {"python.train.txt.xz", "python.heldout.txt.xz"}
    assert set(with_prose["files"]) == {f"{d}.{p}.txt.xz" for d in corpus.DOMAINS for p in ("train", "heldout")}
    assert alone["files"].items() <= with_prose["files"].items()
