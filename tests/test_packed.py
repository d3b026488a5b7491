"""Products of many rows on a CPU: oneDNN's, on a packed copy of the weights, give what `@` gives."""

import pytest
import torch

import lede_env
from lede_env.engine import packed
from tests.small_models import ARCHITECTURES, save_random_model


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_many_rows_get_what_each_gets(tmp_path, architecture):
    save_random_model(tmp_path, architecture)
    lm = lede_env.load_model(tmp_path, device="cpu", dtype="float32")
    assert lm.packed is not None
    rows, steps = packed.ROWS + 3, 5
    tokens = torch.randint(3, lm.geometry.vocab, (steps, rows), generator=torch.Generator().manual_seed(0))

    def decode(lanes: list[int]) -> torch.Tensor:
        """(steps, lanes, V) logits of the lanes' tokens, decoded together."""
        found = []
        with torch.inference_mode(), lm.session(len(lanes), steps, width=1) as session:
            everyone = list(range(len(lanes)))
            for step in tokens[:, lanes].tolist():
                session.feed(everyone, step)
                session.advance(everyone, [lm.n_layers] * len(lanes))
                found.append(lm.logits(session.newest(everyone)))
                for lane in everyone:
                    session.close_round(lane, 1)
        return torch.stack(found)

    together = decode(list(range(rows)))
    each = torch.cat([decode([lane]) for lane in range(rows)], dim=1)
    torch.testing.assert_close(together, each, atol=1e-4, rtol=1e-4)
    assert not torch.equal(together, each)  # by other kernels, or the copy was not used


def test_only_small_float32_models_are_copied(tmp_path, monkeypatch):
    save_random_model(tmp_path)
    for dtype in ("float64", "bfloat16"):
        assert lede_env.load_model(tmp_path, device="cpu", dtype=dtype).packed is None
    monkeypatch.setattr(packed, "MOST", 1000)
    assert lede_env.load_model(tmp_path, device="cpu", dtype="float32").packed is None
