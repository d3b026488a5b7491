"""The engine on a GPU: run with `pytest -m gpu` where there is one."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import lede_env
from lede_env.decoding.strategies import Control, Strategy
from lede_env.engine.acceptance import Draws, Sampling, draw_rows, greedy_match, speculative_matches
from lede_env.engine.acceptance_head import INPUTS, OUTLOOK, AcceptanceHead
from lede_env.engine.layered_lm import rms_norm
from lede_env.engine.read_signals import AHEAD, ENTROPY, LOG_SUM, ODDS, SIZE, TOKEN, TOKEN_LOGIT
from lede_env.engine.session import Session
from lede_env.engine.signals import warmth
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
    monkeypatch.setattr("lede_env.engine.layered_lm.kernels_fit", lambda lm: False)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ON_EMBEDDED)
def test_graphs_play_the_rounds_of_the_eager_engine(monkeypatch, name, temperature):
    lm = lede_env.load_model("tiny", device="cuda", dtype="float32")
    prompts = [prompt.text for prompt in load_prompts("all", "test")[::20]]
    options = dict(max_new_tokens=64, temperature=temperature, top_p=0.9, seed=3)

    def play() -> list:
        """Rounds of every strategy and prompt; policies with coins of their own begin anew."""
        strategies = ON_EMBEDDED[name](lm)
        return [lede_env.generate(lm, prompt, strategy=s, **options).rounds for s in strategies for prompt in prompts]

    ours = play()
    eager(monkeypatch)
    same = [a == b for a, b in zip(ours, play(), strict=True)]
    assert sum(same) >= len(same) - 1, same  # rounding may part one near-tie


@pytest.mark.parametrize("name", ["autoregressive", "layerskip", "lite", "lede"])
def test_batches_play_the_rounds_of_the_eager_engine(monkeypatch, name):
    lm = lede_env.load_model("tiny", device="cuda", dtype="float32")
    prompts = [prompt.text for prompt in load_prompts("all", "test")[::15]]

    def play() -> list:
        batches = [lede_env.generate(lm, prompts, strategy=s, max_new_tokens=48) for s in ON_EMBEDDED[name](lm)]
        return [out.rounds for outs in batches for out in outs]

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


@pytest.mark.parametrize("temperature", [0.05, 0.6, 1.5])
@pytest.mark.parametrize("vocab", [97, 8192, 32016])
def test_the_read_out_draws_the_tokens_of_the_inverse_transform(vocab, temperature):
    from lede_env.engine.cuda.readout import ReadOut

    read, slots = ReadOut(vocab, torch.device("cuda")), 3
    logits = torch.randn(slots, vocab, generator=torch.Generator().manual_seed(vocab)).mul(3)
    logits[1, vocab // 2 :] -= 200  # half of the blocks weigh nothing
    logits[2, : vocab // 2] = -torch.inf  # nor are these numbers
    q, where = Sampling(temperature).probabilities(logits), logits.cuda()
    total = q.double().cumsum(-1) / q.double().sum(-1, keepdim=True)
    out, tokens = torch.zeros(SIZE, device="cuda"), torch.zeros(slots + 1, dtype=torch.long, device="cuda")
    draws = Draws(vocab)
    uniforms = [0.0, 1.0 - 2.0**-53, *(draws.next() for _ in range(200))]
    for slot in range(slots):
        state = torch.tensor([0, slot, -1, -1, 0], device="cuda")
        for u, expected in zip(uniforms, draw_rows(q[[slot]].expand(len(uniforms), -1), uniforms), strict=True):
            read(where, out, tokens, state, torch.tensor([u], dtype=torch.float64, device="cuda"), temperature)
            token = int(tokens[slot + 1])
            assert out[TOKEN] == token and out[TOKEN_LOGIT] == where[slot, token] and q[slot, token] > 0
            # Another token only where u lies within rounding of the border between the two.
            assert token == expected or abs(float(total[slot, min(token, expected)]) - u) < 1e-5
        read(where, out, tokens, state, torch.zeros(1, dtype=torch.float64, device="cuda"), 0.0)
        assert int(tokens[slot + 1]) == int(logits[slot].argmax()) == out[TOKEN]
        wide = logits[slot].double()
        log_p = wide.log_softmax(-1)
        assert float(out[LOG_SUM]) == pytest.approx(float(wide.logsumexp(-1)), abs=1e-4)
        assert float(out[ENTROPY]) == pytest.approx(float(-(log_p.exp() * log_p).nansum()), abs=1e-3)


def random_head(d: int, units: int, tokens: int, generator: torch.Generator) -> AcceptanceHead:
    """Its slopes reach their bounds now and then."""
    shapes = [(d, units), (tokens, units), (INPUTS, units), (3, units), (units, units), (units,), (units, OUTLOOK)]
    scales = [d**-0.5, 1, 0.3, 1, (2 / units) ** 0.5, 0.3, 4 * units**-0.5]
    made = [torch.randn(*shape, generator=generator) * by for shape, by in zip(shapes, scales, strict=True)]
    return AcceptanceHead("", (2, 4, 5), *made, torch.tensor([0.5, 1.0, -0.5]), torch.tensor([7.0, -5.0, 3.0])).to(
        torch.device("cuda")
    )


# Of the model's own size; of a twin, whose donor's channels are the first; not of whole blocks.
@pytest.mark.parametrize(
    ("hidden", "d", "units"), [(64, 64, 32), (256, 256, 256), (4096, 256, 256), (8192, 192, 272), (650, 333, 50)]
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_outlook_is_what_the_acceptance_head_says(hidden, d, units, temperature):
    from lede_env.engine.cuda.outlook import Outlook
    from lede_env.engine.cuda.readout import ReadOut

    vocab, slots, device = 1200, 4, torch.device("cuda")
    generator, draws = torch.Generator().manual_seed(hidden + units), Draws(units)
    head = random_head(d, units, vocab - 100, generator)
    norm, eps = torch.rand(hidden, generator=generator).add(0.5).to(device), torch.tensor(1e-5, device=device)
    lm, outlook = SimpleNamespace(normed=lambda x: rms_norm(x, norm, eps)), Outlook(head, norm, eps)
    states = torch.randn(slots, hidden, generator=generator).mul(torch.tensor([[0.02], [1], [3], [40]])).to(device)
    logits = torch.randn(slots, vocab, generator=generator).mul(torch.tensor([[0.5], [3], [60], [3]])).to(device)
    logits[2, 7] = logits[2].max() + 5.0  # a sure draft
    logits[3, vocab - 1] = logits[3].max() + 2.0  # a token that the donor does not have, and none that is sure
    read, out = ReadOut(vocab, device), torch.zeros(SIZE, device=device)
    tokens = torch.zeros(slots + 1, dtype=torch.long, device=device)
    for slot in range(slots):
        for candidate, layer in enumerate(head.candidate_layers):
            state = torch.tensor([0, slot, -1, -1, 0], device=device)
            uniform = torch.tensor([draws.next()], dtype=torch.float64, device=device)
            read(logits, out, tokens, state, uniform, temperature)
            before = out.clone()
            outlook(states, out, state, candidate, warmth(temperature))
            place, drawn = slice(slot, slot + 1), tokens[slot + 1 : slot + 2]
            expected = head.read(lm, states[place], logits[place], drawn, layer, temperature)[0]
            torch.testing.assert_close(out[ODDS : AHEAD + 1], expected, rtol=2e-4, atol=2e-4)
            before[ODDS : AHEAD + 1] = out[ODDS : AHEAD + 1]
            assert torch.equal(before, out)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.8), Sampling(0.8, top_p=0.9)])
def test_a_read_with_the_outlook_is_one_without_and_what_the_head_says(sampling):
    lm = lede_env.load_model("tiny", device="cuda", dtype="float32")
    head, uniform = lm.acceptance_head, None if sampling.greedy else 0.4
    with torch.inference_mode(), lm.session(1, 100) as session:
        session.prefill(0, [7, 90, 33])
        session.open(12, head.candidate_layers[0])
        for layer in head.candidate_layers:
            session.advance([0], [layer])
            found = []
            for asked in (0, layer, layer):  # captured, then replayed
                session.read(-1, uniform, sampling, asked)
                found.append(session.drawn())
            plain, first, again = found
            assert first == again and plain[:ODDS] == first[:ODDS]
            drawn = torch.tensor([int(first[TOKEN])], device="cuda")
            at = (session.hidden[0, :1], session._draft_logits[:1], drawn, layer, sampling.temperature)
            expected = head.read(lm, *at)
            torch.testing.assert_close(torch.tensor(first[ODDS : AHEAD + 1]), expected[0].cpu(), rtol=1e-3, atol=1e-3)
        with pytest.raises(lede_env.LedeError, match="acceptance head was trained at"):
            session.read(-1, uniform, sampling, lm.n_layers)
        session.read(-1, uniform, sampling)
        assert session.drawn()[:ODDS] == plain[:ODDS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_in_one_piece_leaves_the_keys_and_values_of_the_eager_engine(tmp_path, architecture):
    sizes = dict(hidden_size=64, head_dim=16) if architecture != "qwen2" else dict(hidden_size=64)
    save_random_model(tmp_path, architecture, max_position_embeddings=1024, **sizes)
    lm = lede_env.load_model(tmp_path, device="cuda", dtype="float32")
    ids = [(7 * place) % 40 + 1 for place in range(1000)]
    with torch.inference_mode(), lm.session(1, 1000) as session:
        for count in (1, 31, 130, 512, 513, 1000):
            found = []
            for prefill in (session.prefill, partial(Session.prefill, session)):
                prefill(0, ids[:count])
                found.append([t[:, :, :count].clone() for t in (*session.cache.keys, *session.cache.values)])
            assert session.lengths == [count]
            apart = [float((ours - its).norm() / its.norm()) for ours, its in zip(*found, strict=True)]
            assert max(apart) < 1e-5


@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_padding_that_overflowed_changes_no_row_before_it(dtype, garbage):
    from lede_env.engine.cuda.attention import Attention

    rows, heads, kv_heads, dim, length = 5, 4, 2, 16, 70
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, kv_heads, 100, dim, generator=generator).to("cuda", dtype)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=generator).to("cuda", dtype)
    angles = torch.rand(100, dim // 2, generator=generator)
    rope = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).cuda()
    attend, outs = Attention(rows, heads, kv_heads, dim, torch.device("cuda")), []
    for _ in range(2):
        out = torch.zeros(rows, heads * dim, dtype=dtype, device="cuda")
        attend(qkv, keys, values, rope, out, torch.tensor([length, 0, -1, -1, 0], device="cuda"))
        outs.append(out[:3])
        qkv[3:] = garbage
    assert outs[0].isfinite().all() and torch.equal(*outs)


class Swaying(Control):
    """Opens rounds at layers 3, 2, 1, 2, 3, ...: what was launched ahead of a verdict is too deep or too shallow."""

    rounds = 0

    def path(self, round_):
        return ((3, 2, 1, 2)[self.rounds % 4],)

    def keep_drafting(self, signals, round_):
        return len(round_.drafts) < 3

    def learn(self, round_):
        self.rounds += 1


class Sways(Strategy):
    name = "sways"

    def start(self, lm, seed):
        return Swaying()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rounds_that_open_otherwise_than_was_guessed(monkeypatch, temperature):
    lm = lede_env.load_model("tiny", device="cuda", dtype="float32")
    prompts = [prompt.text for prompt in load_prompts("all", "test")[::12]]

    def play() -> list:
        options = dict(strategy=Sways(), max_new_tokens=64, temperature=temperature, seed=4)
        return [lede_env.generate(lm, prompt, **options).rounds for prompt in prompts]

    ours = play()
    eager(monkeypatch)
    same = [a == b for a, b in zip(ours, play(), strict=True)]
    assert sum(same) >= len(same) - 1, same  # rounding may part one near-tie


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocab", [97, 8192, 32016])
def test_the_verdict_is_the_one_of_the_eager_engine(vocab, temperature):
    from lede_env.engine.cuda.verdict import Verdict

    rows, draws = 13, Draws(vocab)
    generator, judge = torch.Generator().manual_seed(vocab), Verdict(rows, vocab, torch.device("cuda"))
    sampling, apart = Sampling(temperature), 0
    for trial in range(60):
        logits = torch.randn(rows, vocab, generator=generator).mul(3)
        drafts = logits + torch.randn(rows, vocab, generator=generator).mul(trial % 3)  # at 0 the residual is empty
        made = trial % rows
        coins, after = [draws.next() for _ in range(made)], draws.next()
        if sampling.greedy:
            tokens = drafts[:made].argmax(-1).tolist()
            expected = greedy_match(tokens, logits[: made + 1].argmax(-1).tolist())
        else:
            p, q = sampling.probabilities(logits[: made + 1]), sampling.probabilities(drafts[:made])
            tokens = draw_rows(q, [draws.next() for _ in range(made)]) if made else []
            (expected,) = speculative_matches([tokens], p, [list(q)], [coins], [after])
        state = torch.tensor([trial, 0, -1, -1, made], device="cuda")
        slots = torch.tensor([0, *tokens, *[5] * (rows - made)], device="cuda")
        uniforms = torch.tensor([*coins, after, *[0.5] * (rows - made)], dtype=torch.float64, device="cuda")
        verdict = torch.zeros(2 + rows, dtype=torch.float64, device="cuda")
        follows = torch.zeros(1, dtype=torch.long, device="cuda")
        judge(logits.cuda(), drafts.cuda(), slots, uniforms, verdict, state, follows, temperature, True)
        assert int(follows) == int(state[0]) + int(verdict[0]) + 1
        apart += (int(verdict[0]), int(verdict[1])) != expected or int(slots[0]) != int(verdict[1])
        doubts = logits.double().logsumexp(-1) - logits.double().amax(-1)
        torch.testing.assert_close(verdict[2:].cpu(), doubts, atol=1e-5, rtol=1e-5)
    assert apart <= 1  # rounding may part a coin, or a number near the border of two tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("vocab", [97, 8192])
def test_logits_that_are_no_numbers_still_give_tokens(vocab, temperature):
    """As in float16 models that overflow: what is written next is arbitrary, but its embedding can be looked up."""
    from lede_env.engine.cuda.readout import ReadOut
    from lede_env.engine.cuda.verdict import Verdict

    device, rows = torch.device("cuda"), 5
    logits, state = torch.full((rows, vocab), torch.nan, device=device), torch.tensor([0, 0, -1, -1, 2], device=device)
    slots = torch.arange(rows + 1, device=device)
    uniforms = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
    out, verdict = torch.zeros(SIZE, device=device), torch.zeros(2 + rows, dtype=torch.float64, device=device)
    follows = torch.zeros(1, dtype=torch.long, device=device)
    ReadOut(vocab, device)(logits, out, slots, state, uniforms, temperature)
    assert 0 <= int(slots[1]) < vocab
    Verdict(rows, vocab, device)(logits, logits, slots, uniforms, verdict, state, follows, temperature, True)
    assert 0 <= int(slots[0]) < vocab and int(verdict[1]) == int(slots[0])


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_graphs_sample_as_the_eager_engine_without_top_p(monkeypatch, temperature):
    lm = lede_env.load_model("tiny", device="cuda", dtype="float32")
    prompts = [prompt.text for prompt in load_prompts("all", "test")[::12]]
    options = dict(strategy=lede_env.Lede(), max_new_tokens=64, temperature=temperature, seed=5)
    ours = [lede_env.generate(lm, prompt, **options).rounds for prompt in prompts]
    eager(monkeypatch)
    same = [a == lede_env.generate(lm, prompt, **options).rounds for a, prompt in zip(ours, prompts, strict=True)]
    assert sum(same) >= len(same) - 1, same  # rounding may part one


def test_a_session_serves_the_next_prompt_and_refuses_a_second_user():
    lm = lede_env.load_model("tiny", device="cuda")
    with lm.session(1, 100) as first:
        with pytest.raises(lede_env.LedeError, match="in use"), first:
            pass
        assert lm.session(1, 100) is not first
    assert lm.session(1, 200) is first


def test_a_session_that_is_too_small_makes_way():
    lm = lede_env.load_model("tiny", device="cuda")
    lm.idle.clear()
    for capacity in (100, 1500, 900):
        with lm.session(1, capacity):
            pass
    assert [session.capacity for session in lm.idle] == [2048]
