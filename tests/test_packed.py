"""Products on a CPU by a copy of the weights in another layout give what `@` gives."""

import copy
import pickle

import pytest
import torch

import lede_env
from lede_env.engine import layered_lm, packed
from tests.small_models import ARCHITECTURES, save_random_model


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_many_rows_get_what_each_gets(tmp_path, architecture):
    save_random_model(tmp_path, architecture)
    lm = lede_env.load_model(tmp_path, device="cpu", dtype="float32")
    assert lm.packed is not None
    rows, steps = packed.PACKED + 3, 5
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


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_few_rows_by_turned_matrices(tmp_path, monkeypatch, architecture, rows):
    """On whatever processor this is: the layout must be right everywhere, though it pays on AMD's alone."""
    save_random_model(tmp_path, architecture)
    lm = lede_env.load_model(tmp_path, device="cpu", dtype="float32")
    tokens = torch.randint(3, lm.geometry.vocab, (rows,), generator=torch.Generator().manual_seed(0))

    def verified(most: int) -> torch.Tensor:
        """(rows, V) logits of the tokens in one round, up to `most` rows at a time by turned matrices."""
        for module in (packed, layered_lm):
            monkeypatch.setattr(module, "TURNED", most)
        monkeypatch.setattr(layered_lm, "PACKED", 99)
        fresh = copy.copy(lm)
        with torch.inference_mode(), fresh.session(1, rows, width=rows) as session:
            for token in tokens.tolist():
                session.feed([0], [token])
            states = session.finish([0])[0]
            logits = fresh.logits(states)
            assert ("turned" in vars(fresh)) == (most > 0)  # made when first used
            return logits

    turned, plain = verified(4), verified(0)
    torch.testing.assert_close(turned, plain, atol=1e-4, rtol=1e-4)
    assert turned.is_contiguous()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_prompt_in_one_piece_is_what_its_tokens_are(tmp_path, architecture):
    save_random_model(tmp_path, architecture)
    lm = lede_env.load_model(tmp_path, device="cpu", dtype="float32")
    ids, found = [(7 * place) % 40 + 1 for place in range(packed.PACKED + 9)], []
    for step in (1, len(ids)):
        with torch.inference_mode(), lm.session(1, len(ids), width=len(ids)) as session:
            for begin in range(0, len(ids), step):
                for token in ids[begin : begin + step]:
                    session.feed([0], [token])
                states = session.finish([0])[0].clone()
                session.close_round(0, step)
            found.append(states[-1])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_only_small_float32_models_are_copied(tmp_path, monkeypatch):
    save_random_model(tmp_path)
    monkeypatch.setattr(packed, "TURNED", 4)
    small = lede_env.load_model(tmp_path, device="cpu", dtype="float32")
    assert small.packed is not None and small.turned is not None
    for dtype in ("float64", "bfloat16"):
        lm = lede_env.load_model(tmp_path, device="cpu", dtype=dtype)
        assert lm.packed is None and lm.turned is None
    monkeypatch.setattr(packed, "MOST", 1000)
    large = copy.copy(small)  # without its copies
    assert large.packed is None and large.turned is None


def test_a_model_that_was_packed_can_be_copied_and_pickled(tmp_path):
    save_random_model(tmp_path)
    lm = lede_env.load_model(tmp_path, device="cpu", dtype="float32")
    states = torch.randn(packed.PACKED, lm.geometry.hidden, generator=torch.Generator().manual_seed(0))
    logits = lm.logits(states)
    assert lm.packed is not None
    for other in (pickle.loads(pickle.dumps(lm)), copy.deepcopy(lm), copy.copy(lm)):
        assert torch.equal(other.logits(states), logits) and other.packed is not lm.packed


def test_gradients_of_many_rows_are_those_of_each(tmp_path):
    """As who trains a probe or a lens through the head needs them."""
    save_random_model(tmp_path)
    lm = lede_env.load_model(tmp_path, device="cpu", dtype="float32")
    states = torch.randn(packed.PACKED, lm.geometry.hidden, generator=torch.Generator().manual_seed(0))
    together, each = states.clone().requires_grad_(), states.clone().requires_grad_()
    lm.logits(together).logsumexp(-1).sum().backward()
    torch.cat([lm.logits(row) for row in each.split(1)]).logsumexp(-1).sum().backward()
    assert together.grad is not None
    torch.testing.assert_close(together.grad, each.grad, atol=1e-5, rtol=1e-4)
