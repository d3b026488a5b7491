"""The engine on a GPU: run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

import lede_env
from lede_env.tasks import load_prompts
from tests.small_models import ARCHITECTURES, save_random_model
from tests.test_losslessness import ON_EMBEDDED

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_on_cuda(tmp_path, architecture):
    reference = save_random_model(tmp_path, architecture, late_scale=0.05).to("cuda")
    lm = lede_env.load_model(tmp_path, device="cuda", dtype="float64")
    prompts = [[1, 17, 40, 5, 23], [1, 8, 9], [1, 4, 4, 4, 30, 31, 32, 33, 34]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    for strategy in (lede_env.Autoregressive(), lede_env.LayerSkip(2, 4)):
        batch = lede_env.generate(lm, prompts, strategy=strategy, max_new_tokens=40)
        assert [out.token_ids for out in batch] == expected
        assert [lede_env.generate(lm, p, strategy=strategy, max_new_tokens=40).token_ids for p in prompts] == expected


def eager(monkeypatch) -> None:
    """From here on sessions of one row run eagerly, as those of batches do."""
    monkeypatch.setattr("lede_env.engine.layered_lm.has_graphs", lambda lm: False)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ON_EMBEDDED)
def test_graphs_play_the_rounds_of_the_eager_engine(monkeypatch, name, temperature):
    lm = lede_env.load_model("tiny", device="cuda", dtype="float32")
    prompts = [prompt.text for prompt in load_prompts("all", "test")[::20]]
    options = dict(max_new_tokens=64, temperature=temperature, top_p=0.9, seed=3)

    def play() -> list:
        """Rounds of every strategy and prompt; policies with coins of their own begin anew."""
        strategies = [*ON_EMBEDDED[name](lm), *([lede_env.Lede()] if name == "lede" else [])]
        return [lede_env.generate(lm, prompt, strategy=s, **options).rounds for s in strategies for prompt in prompts]

    ours = play()
    eager(monkeypatch)
    same = [a == b for a, b in zip(ours, play(), strict=True)]
    assert sum(same) >= len(same) - 1, same  # rounding may part one near-tie


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graphs_on_every_architecture(tmp_path, monkeypatch, architecture):
    sizes = dict(hidden_size=64, head_dim=16) if architecture != "qwen2" else dict(hidden_size=64)
    save_random_model(tmp_path, architecture, late_scale=0.05, **sizes)
    lm = lede_env.load_model(tmp_path, device="cuda", dtype="float32")
    for strategy in (lede_env.Autoregressive(), lede_env.LayerSkip(2, 4), lede_env.Lite({1: 0.4, 3: 0.3, 4: 0.0})):
        options = dict(strategy=strategy, max_new_tokens=60)
        ours = lede_env.generate(lm, [1, 17, 40, 5, 23], **options)
        with monkeypatch.context() as patch:
            eager(patch)
            assert ours.rounds == lede_env.generate(lm, [1, 17, 40, 5, 23], **options).rounds


def test_a_session_serves_the_next_prompt_and_refuses_a_second_user():
    lm = lede_env.load_model("tiny", device="cuda")
    with lm.session(1, 100) as first:
        with pytest.raises(lede_env.LedeError, match="in use"), first:
            pass
        assert lm.session(1, 100) is not first
    assert lm.session(1, 200) is first
