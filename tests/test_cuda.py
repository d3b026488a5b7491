"""The engine on a GPU: run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

import lede_env
from tests.small_models import ARCHITECTURES, save_random_model

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
