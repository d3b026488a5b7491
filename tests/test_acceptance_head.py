"""The acceptance head: its file, what it says on donors and twins, in traces, and the program that trains it."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import lede_env
from agents.acceptance_head import Args, main, sure_answer
from lede_env.data.registry import load_trace
from lede_env.engine.acceptance_head import SURE, TENSORS, AcceptanceHead, load_head
from lede_env.engine.logit_signals import LogitSignals
from lede_env.engine.signals import HEAD_FEATURES, draft_odds, draft_risk, feature_bounds
from lede_env.models.loading import HEAD, load_model
from lede_env.outlooks import Reader, with_outlook
from lede_env.tasks import load_prompts
from tests.small_models import save_random_model


class Cautious:
    """Verifies once the drafts are more likely than not to have failed."""

    features = ("phase", "risk")

    def exit_probability(self, observations):
        phase, risk = observations.T
        return ((phase == 1.0) | (risk < 0.7)).astype(float)


def folder_with_head(folder, **changes):
    """A small checkpoint with an acceptance head beside it."""
    save_random_model(folder, "llama")
    lm = load_model(folder, device="cpu", dtype="float32")
    head = replace(AcceptanceHead.random(lm), **changes)
    head.save(folder / HEAD)
    return head


def test_a_checkpoint_brings_its_head(tmp_path):
    written = folder_with_head(tmp_path)
    lm = load_model(tmp_path, device="cpu", dtype="float32")
    assert lm.acceptance_head is not None and lm.acceptance_head.candidate_layers == lm.candidate_layers
    for name in TENSORS:
        assert torch.equal(getattr(lm.acceptance_head, name), getattr(written, name).half().float())
    out = lede_env.generate(lm, [5, 9, 2], strategy=lede_env.Lede(Cautious()), max_new_tokens=24)
    assert out.token_ids == lede_env.generate(lm, [5, 9, 2], max_new_tokens=24).token_ids


def test_a_damaged_head_is_refused(tmp_path):
    folder_with_head(tmp_path)
    (tmp_path / HEAD / "head.safetensors").write_bytes(b"short")
    with pytest.raises(
        lede_env.LedeError, match=r"no acceptance head that this version reads .*agents.acceptance_head"
    ):
        load_model(tmp_path, device="cpu", dtype="float32")
    (tmp_path / HEAD / "head.safetensors").unlink()
    with pytest.raises(lede_env.LedeError, match="no acceptance head that this version reads"):
        load_head(tmp_path / HEAD)


def test_a_head_of_other_shapes_or_another_model_is_refused(tmp_path):
    head = folder_with_head(tmp_path, middle=torch.zeros(8, 7))
    with pytest.raises(lede_env.LedeError, match=r"shapes .*\(8, 7\)"):
        load_model(tmp_path, device="cpu", dtype="float32")
    replace(head, middle=torch.zeros(8, 8), fingerprint="another").save(tmp_path / HEAD)
    with pytest.raises(lede_env.LedeError, match="trained for a model with fingerprint another"):
        load_model(tmp_path, device="cpu", dtype="float32")


def test_who_reads_it_needs_one(random_model, tiny):
    lm, _ = random_model("llama")
    with pytest.raises(lede_env.LedeError, match="has none; train one"):
        lede_env.generate(lm, [1, 2], strategy=lede_env.Lede(Cautious()))
    with pytest.raises(lede_env.LedeError, match=r"trained at layers .* not at 5"):
        tiny.acceptance_head.candidate(5)
    with pytest.raises(lede_env.LedeError, match=r"'llama.*' has no acceptance head"):
        with_outlook(load_trace("tiny-greedy-v0"), lm, [])


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("width", [1, 40])
def test_one_row_is_told_what_many_are(random_model, temperature, width):
    """`ask`, by numpy, against `read`, by torch; of a donor's channels and tokens, which are the first of a twin's."""
    lm, _ = random_model("llama")
    head, layer = AcceptanceHead.random(lm), lm.candidate_layers[-1]
    head = replace(head, state=head.state[:-3].contiguous(), token=head.token[:20].contiguous())
    generator = torch.Generator().manual_seed(width)
    states = torch.randn(40, lm.geometry.hidden, generator=generator)
    logits = torch.randn(40, width, generator=generator).mul_(torch.logspace(-1, 2, 40)[:, None])
    tokens = torch.randint(width, (40,), generator=generator)
    tokens[::2] = logits.argmax(-1)[::2]
    logits[0], tokens[0] = -1.0, 0
    logits[0, :2] = torch.tensor([4.0, 1e-8])[:width]  # 4 nats in float32, less in float64
    many = head.read(lm, states, logits, tokens, layer, temperature)
    for state, own, token, said in zip(lm.normed(states), logits, tokens.tolist(), many, strict=True):
        signals = LogitSignals(layer, lm.n_layers, 1, 12, temperature=temperature, token=token, logits=own)
        torch.testing.assert_close(torch.tensor(head.ask(state[None], signals)), said, rtol=1e-4, atol=1e-4)
    sure = (many[:, 0] == head.sure[0]).sum()
    assert sure == 40 if width == 1 else 3 < sure < 20  # a vocabulary of one has no second token


def test_nothing_is_said_before_the_draw(tiny):
    signals = LogitSignals(3, tiny.n_layers, 1, 12, logits=torch.zeros(tiny.geometry.vocab))
    with pytest.raises(lede_env.LedeError, match="no token is drawn yet"):
        tiny.acceptance_head.ask(torch.zeros(1, tiny.geometry.hidden), signals)


def test_what_is_said_of_sure_drafts():
    """Three positions of a text, one candidate: two are sure; one of these is accepted when drawn, greedily both."""
    flat = torch.zeros(3, 1, 3)
    data = {
        "margin": torch.tensor([[SURE], [SURE - 1], [SURE + 1]]),
        "shortfall": flat,
        "target_shortfall": torch.tensor([[0.0], [0.0], [2.0]]),
        "chance": torch.tensor([[[1.0, 0.25, 0.0]], [[0.0, 0.0, 0.0]], [[1.0, 0.75, 0.0]]]),
        "expected": torch.tensor([[[0.0, 0.0, 0.0]], [[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0]]]),
        "last": torch.tensor([False, False, True]),
    }
    odds, log_slope, ahead = sure_answer(data).exp().tolist()
    assert odds == pytest.approx((1 + 3.0) / (1 + 1.0))  # one of each kind more than was seen
    assert ahead == pytest.approx((1 + 1.5) / (1 + 0.5)) and log_slope < 0.01
    nothing = {name: values[:0] for name, values in data.items()}
    assert sure_answer(nothing)[[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("coin", [1.0, 0.5, 1e-300, 0.0])
def test_odds_and_risk_are_within_their_bounds(coin):
    low, high = feature_bounds(HEAD_FEATURES, 97)
    for odds in (-1e3, 0.0, 1e3):
        for slope in (0.0, 1.0, 148.0):
            own = draft_odds(odds, slope, coin)
            assert low[1] <= own <= high[1] and low[0] <= draft_risk(own) <= high[0]
    assert draft_odds(0.3, 2.0, 1.0) == 0.3  # greedy decoding has no coin
    assert draft_risk(0.0) == pytest.approx(np.log(2.0))


def test_what_the_shipped_head_says_comes_true(tiny):
    """Its odds are calibrated, and tell more of acceptance than the drafts' margins do."""
    for name in ("tiny-greedy-v0", "tiny-t0.6-v0"):
        trace = load_trace(name)
        test = np.isin(trace.prompt_ids, trace.prompts_of("all", "test"))
        rows = np.repeat(np.repeat(test, trace.header.samples), np.diff(trace.starts))
        said, accepted = trace.outlook[rows, 0].astype(np.float64), trace.accepted[rows, 0]
        odds = said[:, 0] - said[:, 1] * np.log(trace.coin[rows, 0])
        chance = 1.0 / (1.0 + np.exp(-odds))
        assert abs(chance.mean() - accepted.mean()) < 0.03
        entropy = -np.log(np.where(accepted, chance, 1.0 - chance)).mean()
        base = accepted.mean()
        assert entropy < 0.75 * -(base * np.log(base) + (1.0 - base) * np.log(1.0 - base))


def test_the_shipped_traces_hold_what_the_shipped_head_says(tiny):
    trace, prompts = load_trace("tiny-t0.6-v0"), {prompt.id: prompt for prompt in load_prompts("all", "all")}
    reader = Reader(trace, tiny)
    for place in range(0, len(trace.prompt_ids), 40):
        reader.read(place, tiny.encode(prompts[trace.prompt_ids[place]].text))
        rows = slice(trace.starts[place], trace.starts[place + 1])
        # At the border of what is sure another processor may say the other thing.
        clear = np.abs(trace.raw[rows, :, 0] - trace.raw[rows, :, 1] - SURE) > 1e-2
        np.testing.assert_allclose(reader.outlook[rows][clear], trace.outlook[rows][clear], atol=2e-3)
        branches = trace.branch[rows][trace.branch[rows] >= 0]
        tokens = slice(trace.branch_starts[branches[0]], trace.branch_starts[branches[-1] + 1])
        clear = np.abs(trace.branch_raw[tokens, 0] - trace.branch_raw[tokens, 1] - SURE) > 1e-2
        said = reader.branch_outlook[tokens][clear]
        np.testing.assert_allclose(said, trace.branch_outlook[tokens][clear], atol=2e-3)


def test_the_program_trains_one(tmp_path):
    """A short run on few texts learns something, and its file is one that the model takes."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [dict(id=f"x/{n}", task="lm", prompt=f"The number {n} is", reference="", split="train") for n in range(20)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Args(openings=(str(prompts),), temperatures=(0.6,), repeats=1, max_new_tokens=12, batch=128, device="cpu",
                out=tmp_path / "head", hidden=16, epochs=6.0, rows=256)  # fmt: skip
    main(args)
    head = load_head(tmp_path / "head")
    assert head.candidate_layers == (3, 4, 6, 8)
    train, validation = head.training["cross_entropy"]
    assert train["positions"] > validation["positions"] > 100
    assert validation["T=0.6"] < 0.45 and validation["greedy"] < 0.5  # a coin's is 0.69


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"epochs": 0.0}, "epochs=0.0"),
        ({"temperatures": (-1.0,)}, "temperatures"),
        ({"dropout": 1.5}, "dropout=1.5"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(lede_env.LedeError, match=message):
        Args(**changes)


def test_answers_of_another_head_are_noticed(tiny, tmp_path):
    other = replace(tiny.acceptance_head, out_bias=tiny.acceptance_head.out_bias + 1.0)
    lm = replace(tiny, acceptance_head=other)
    with pytest.raises(lede_env.LedeError, match="another acceptance head"):
        lede_env.generate(lm, "a", strategy=lede_env.Lede(lede_env.load_policy("tiny-head")), max_new_tokens=4)
    trace = load_trace("tiny-greedy-v0")
    assert trace.head == tiny.acceptance_head.digest
    changed = replace(trace, outlook=trace.outlook + 1.0)
    changed.save(tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5", "a") as file:
        file.attrs["outlook_digest"] = json.dumps(trace.outlook_digest)
    with pytest.raises(lede_env.LedeError, match="what the acceptance head says is not what was written"):
        load_trace(tmp_path / "t.h5")


def test_layers_that_the_head_does_not_know(tiny):
    policy = lede_env.load_policy("tiny-head")
    with pytest.raises(lede_env.LedeError, match="not at 5"):
        lede_env.generate(tiny, "a", strategy=lede_env.Lede(policy, exit_layer=5), max_new_tokens=1)
    out = lede_env.generate(tiny, "a", strategy=lede_env.Lede(policy, exit_layer=5, speculation=3), max_new_tokens=8)
    assert out.token_ids == lede_env.generate(tiny, "a", max_new_tokens=8).token_ids  # nothing is asked
    with pytest.raises(lede_env.LedeError, match="not at 5"):
        gym.make("LEDE-Tiny-Draft-v0", candidate_layers=(5, 7), features=("risk", "margin"), device="cpu")
