"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

from tests.small_models import save_random_model

torch.set_num_threads(1)  # small models: more threads only spin against whatever else runs


@pytest.fixture(scope="session")
def tiny():
    """The embedded model, float32 on the CPU."""
    from lede_env import load_model

    return load_model("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """random_model(architecture, **kwargs) -> (LayeredLM, transformers model), both float64, made once each."""
    from lede_env import load_model

    made = {}

    def make(architecture="llama", **kwargs):
        key = (architecture, str(sorted(kwargs.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            reference = save_random_model(folder, architecture, **kwargs)
            made[key] = (load_model(folder, device="cpu", dtype="float64"), reference)
        return made[key]

    return make
