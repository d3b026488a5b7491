"""Geometry twins: they compute their donor's function in the target's shapes, in memory and as written folders."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lede_env
from lede_env.decoding.strategies.lite import stored_thresholds
from lede_env.engine.acceptance import Sampling
from lede_env.models import assembly, twin
from lede_env.models.loading import EMBEDDED, load_model
from lede_env.models.twin import residual_copies, twin_model, write_twin
from lede_env.models.zoo import MODELS, find_twin, twin_layer
from lede_env.tasks import load_prompts
from lede_env.tracing import record_trace
from tests.small_models import save_random_model

CPU = torch.device("cpu")
PAPER = [name for name, spec in MODELS.items() if spec.hub_id]
IDS = [1, 5, 9, 3, 60, 17, 5, 9, 44, 2, 8]


def reduced(name, donor_hidden=16):
    """A model of the zoo with all its layers and heads, as many times wider than a small donor as it is wider than the
    embedded model; with fewer neurons."""
    spec, tiny = MODELS[name], MODELS["tiny"]
    share = donor_hidden / tiny.hidden
    sizes = {size: round(getattr(spec, size) * share) for size in ("hidden", "head_dim", "vocab")}
    return replace(spec, **sizes, mlp=spec.mlp // 64, context=64)


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """The folder of a random model of the embedded one's proportions, in a sixteenth of its widths."""
    folder = tmp_path_factory.mktemp("donor") / "donor"
    sizes = dict(hidden_size=16, head_dim=4, intermediate_size=48, vocab_size=97, num_hidden_layers=16)
    save_random_model(folder, "llama", **sizes, tie_word_embeddings=True)
    return folder


@pytest.fixture
def small_zoo(monkeypatch):
    """Puts reduced rows of the zoo in place of the real ones: the embedded model fits into them, barely."""
    sizes = dict(hidden=320, heads=8, kv_heads=4, head_dim=64, mlp=800, vocab=4200)
    for name in PAPER:
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], **sizes))


def states(lm, ids, layers):
    """(layers, T, H) states leaving each of some layers."""
    with torch.inference_mode(), lm.session(1, len(ids), taps=layers) as session:
        x = lm.embed(torch.tensor(ids)).unsqueeze(0)
        return session._run_all(x, session.cache.span([0], [0], len(ids)))


def logits_at(lm, ids, layers):
    """(layers, T, V) logits at each of some layers."""
    return torch.stack([lm.logits(x) for x in states(lm, ids, layers)])


def ends(lm):
    """The twin's layers where its donor's layers end."""
    return tuple(twin_layer(layer, lm.donor_layers, lm.n_layers) for layer in range(1, lm.donor_layers + 1))


def assert_donors(logits, reference):
    """(layers, T, V) logits are the donor's, and its tokens are the only ones that ever come."""
    vocab = reference.shape[-1]
    torch.testing.assert_close(logits[..., :vocab], reference.to(logits.dtype), atol=1e-4, rtol=0)
    if logits.shape[-1] > vocab:
        assert (logits[..., vocab:].amax(-1) < logits[..., :vocab].amax(-1) - 40).all()


# --- the function


@pytest.mark.parametrize("name", PAPER)
def test_a_twin_computes_its_donors_function(name, donor):
    small, spec = load_model(donor, device="cpu", dtype="float64"), reduced(name)
    lm = twin_model(spec, donor, CPU, torch.float32)
    for size in ("n_layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab"):
        assert getattr(lm.geometry, size) == getattr(spec, size)
    assert (lm.name, lm.weights, lm.fingerprint) == (f"{name}-twin", "twin", small.fingerprint)
    assert_donors(logits_at(lm, IDS, ends(lm)), logits_at(small, IDS, range(1, 17)))
    assert {layer for layer in lm.candidate_layers} <= set(ends(lm))
    # Layers between pass the residual on, to the bit.
    between = [layer for layer in range(2, lm.n_layers) if layer not in ends(lm)]
    for layer in between[:3]:
        before, after = states(lm, IDS, (layer - 1, layer))
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", PAPER)
def test_scales_are_exact_in_every_dtype(name):
    spec = MODELS[name]
    copies = residual_copies(spec.hidden, MODELS["tiny"].hidden)
    assert math.log2(math.sqrt(spec.hidden / (copies * MODELS["tiny"].hidden))).is_integer()
    assert copies * MODELS["tiny"].hidden < spec.hidden


def test_a_twin_of_grouped_queries(tmp_path):
    """Of a donor whose heads share keys; its head is its own, and so is the twin's."""
    save_random_model(tmp_path, "llama-gqa", num_hidden_layers=4)
    small = load_model(tmp_path, device="cpu", dtype="float64")
    spec = replace(MODELS["codellama-34b"], n_layers=9, hidden=96, heads=12, kv_heads=3, head_dim=24, mlp=50, vocab=99,
                   candidate_layers=(3, 5, 7))  # fmt: skip
    lm = twin_model(spec, tmp_path, CPU, torch.float64)
    assert_donors(logits_at(lm, IDS, ends(lm)), logits_at(small, IDS, range(1, 5)))


@pytest.mark.parametrize(
    ("changes", "need"),
    [
        (dict(hidden=16), "hidden > 16"),
        (dict(kv_heads=2), "kv_heads >= 4"),
        (dict(head_dim=6), "head_dim a multiple of 4"),
        (dict(mlp=47), "mlp >= 48"),
        (dict(vocab=96), "vocab >= 97"),
        (dict(n_layers=15, candidate_layers=(3, 4)), "n_layers >= 16"),
        (dict(candidate_layers=(6, 7)), r"candidate_layers within \[2, 4, 6"),
    ],
)
def test_a_donor_that_does_not_fit(donor, changes, need):
    with pytest.raises(lede_env.LedeError, match=f"the twin of llama2-7b needs {need}.*its geometry is"):
        twin_model(replace(reduced("llama2-7b"), **changes), donor, CPU, torch.float32)


def test_a_tied_twin_needs_a_tied_donor(tmp_path):
    save_random_model(tmp_path, "llama", num_hidden_layers=16)
    with pytest.raises(lede_env.LedeError, match="needs an untied head, as the donor has"):
        twin_model(replace(reduced("llama3.2-1b", 32)), tmp_path, CPU, torch.float32)


# --- names


def test_a_twin_is_loaded_by_either_name(small_zoo, tiny):
    lm = load_model("llama2-7b", weights="twin", device="cpu")
    assert load_model("Llama2-7B-twin", device="cpu") is lm and repr(lm).startswith("LayeredLM('llama2-7b-twin', twin")
    assert load_model("facebook/layerskip-llama2-7B", weights="twin", device="cpu") is lm
    assert load_model("codellama-7b", weights="twin", device="cpu") is not lm
    assert lm.encode("def f():") == tiny.encode("def f():") and lm.eos_ids == tiny.eos_ids
    assert lm.geometry.context == 4096
    assert find_twin("tiny-twin") is None


@pytest.mark.parametrize("name", ["tiny", "mine/model", str(EMBEDDED)])
def test_only_the_papers_models_have_twins(name):
    with pytest.raises(lede_env.LedeError, match=r"needs one of the paper's models \(llama3\.2-1b, .*not '"):
        load_model(name, weights="twin", device="cpu")
    with pytest.raises(lede_env.LedeError, match="weights='random' is unknown; use 'auto' or 'twin'"):
        load_model(name, weights="random", device="cpu")


def test_too_little_memory_is_said_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(assembly, "_free_memory", lambda device: 20 * 10**9)
    with pytest.raises(lede_env.LedeError, match=r"llama2-7b-twin takes.*LEDE-Llama2-7B-Twin-v0 .* backend='trace'"):
        gym.make("LEDE-Llama2-7B-Twin-v0", device="cpu")
    with pytest.raises(lede_env.LedeError, match=r"llama2-7b-twin takes 27\.0 GB in float32, but cpu has 20\.0"):
        load_model("llama2-7b", weights="twin", device="cpu")


# --- what was made for the donor


@pytest.mark.parametrize("policy", ["tiny", "tiny-head"])
@pytest.mark.parametrize("name", ["llama2-7b", "llama2-13b"])
def test_the_shipped_policies_run_on_a_twin(small_zoo, tiny, name, policy):
    lm, strategy = load_model(name, weights="twin", device="cpu"), lede_env.Lede(lede_env.load_policy(policy))
    for prompt in ("def fib(n):", "Once upon a time"):
        mine = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=24)
        theirs = lede_env.generate(tiny, prompt, strategy=strategy, max_new_tokens=24)
        assert mine.text == theirs.text and mine.token_ids == theirs.token_ids
        exits = [[twin_layer(layer, 16, lm.n_layers) for layer in round_.exits] for round_ in theirs.rounds]
        if lm.n_layers % 16 == 0:  # else the feature `layer` is rounded, 0.2 for 3/16
            assert [list(round_.exits) for round_ in mine.rounds] == exits
        assert {layer for round_ in mine.rounds for layer in round_.exits} <= set(lm.candidate_layers)


def test_a_twin_says_what_its_donor_says(small_zoo, tiny):
    twin = load_model("llama2-7b", weights="twin", device="cpu", dtype="float32")
    assert twin.acceptance_head.candidate_layers == twin.candidate_layers
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(tiny.geometry.vocab, generator=generator)
    with torch.inference_mode(), tiny.session(1, 64) as mine, twin.session(1, 64) as theirs:
        for session, layer in ((mine, 3), (theirs, twin.candidate_layers[0])):
            session.prefill(0, [5, 6, 7])
            session.feed([0], [8])
            session.advance([0], [layer])
        said = [
            lm.acceptance_head.read(
                lm, session.newest([0]), logits[None], torch.tensor([17]), lm.candidate_layers[0], 0.6
            )
            for lm, session in ((tiny, mine), (twin, theirs))
        ]
    torch.testing.assert_close(*said, atol=1e-3, rtol=1e-3)


def test_other_policies_are_still_refused(small_zoo, tiny):
    policy, lm = lede_env.load_policy("tiny"), load_model("llama2-7b", weights="twin", device="cpu")
    with pytest.raises(lede_env.LedeError, match="trained for 'other'"):
        lede_env.generate(lm, "a", strategy=lede_env.Lede(replace(policy, model_fingerprint="0", model_name="other")))
    with pytest.raises(lede_env.LedeError, match="made for 40 layers, but llama2-7b-twin has 32"):
        lede_env.generate(lm, "a", strategy=lede_env.Lede(policy.relabelled(40)))
    with pytest.raises(lede_env.LedeError, match="made for 32 layers, but tiny has 16"):
        lede_env.generate(tiny, "a", strategy=lede_env.Lede(policy.relabelled(32)))


def test_the_stored_thresholds_follow_the_layers(small_zoo, tiny):
    lm = load_model("llama2-13b", weights="twin", device="cpu")
    assert stored_thresholds(lm) == dict(zip((8, 10, 15, 20), stored_thresholds(tiny).values(), strict=True))
    out = lede_env.generate(lm, "def fib(n):", strategy=lede_env.Lite(), max_new_tokens=16)
    assert out.text == lede_env.generate(tiny, "def fib(n):", max_new_tokens=16).text


@pytest.mark.parametrize("mdp", ["", "-Draft"])
def test_a_live_twin_plays_its_donors_trace(small_zoo, tiny, tmp_path, mdp):
    prompts = load_prompts("parse", "train")[:2]
    record_trace(tiny, prompts, (3, 4, 6, 8), 5, Sampling(), 0, lanes=1).save(tmp_path / "t.h5")
    env_id = f"LEDE-Llama2-7B-Twin{mdp}-v0"
    common = dict(task="parse", max_new_tokens=5, features="extended", device="cpu")
    live = gym.make(env_id, **common).unwrapped
    trace = gym.make(env_id, backend="trace", trace=str(tmp_path / "t.h5"), **common).unwrapped
    for name in ("model_name", "model_fingerprint", "n_layers", "candidate_layers"):
        assert live.attributes[name] == trace.attributes[name]
    assert live.attributes["model_name"] == "llama2-7b-twin"
    for prompt in prompts:
        rng = np.random.default_rng(0)
        one, other = (env.reset(seed=0, options={"prompt_id": prompt.id}) for env in (live, trace))
        over = False
        while not over:
            np.testing.assert_allclose(one[0], other[0], atol=1e-3)
            np.testing.assert_equal(one[1:], other[1:])
            action = int(rng.integers(2))
            one, other = live.step(action), trace.step(action)
            over = one[2] or one[3]
        assert other[2] or other[3]


# --- as a folder


@pytest.fixture(scope="module")
def written(donor, tmp_path_factory):
    """written(name) -> the folder of a reduced twin in float32, made once, in several shards."""
    made = {}

    def write(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("written") / "any name"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(twin, "SHARD", 2**22)
                write_twin(reduced(name), donor, made[name], CPU, torch.float32)
        return made[name]

    return write


@pytest.mark.parametrize("name", PAPER)
def test_a_written_twin_is_the_same_here_and_in_transformers(name, donor, written):
    folder, made = written(name), twin_model(reduced(name), donor, CPU, torch.float32)
    assert len(list(folder.glob("*.safetensors"))) > 1
    read = load_model(folder, device="cpu")
    for field in ("name", "weights", "fingerprint", "candidate_layers", "donor_layers", "eos_ids", "geometry"):
        assert getattr(read, field) == getattr(made, field)
    layers = ends(read)
    assert torch.equal(logits_at(read, IDS, layers), logits_at(made, IDS, layers))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = reference(torch.tensor([IDS]), output_hidden_states=True)
        early = [reference.lm_head(reference.model.norm(out.hidden_states[layer][0])) for layer in layers[:-1]]
    small = load_model(donor, device="cpu", dtype="float64")
    assert_donors(torch.stack([*early, out.logits[0]]), logits_at(small, IDS, range(1, 17)))


def test_a_written_twin_is_marked(written, tmp_path):
    """Nothing that a mark says, and nothing in the files that a fingerprint covers, can be changed unnoticed."""
    folder = written("llama2-7b")
    original = (folder / "config.json").read_text()
    config = json.loads(original)
    assert config["lede_twin"]["of"] == "llama2-7b"
    changes = [{"of": "llama2-13b"}, {"candidate_layers": [1]}, {"donor_fingerprint": "0"}, {"seal": "0"}]
    spoilt = [config | {"lede_twin": config["lede_twin"] | change} for change in changes]
    spoilt += [config | {"lede_twin": None}, config | {"rms_norm_eps": 1e-5}]
    for content in spoilt:
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(lede_env.LedeError, match=r"is marked as a geometry twin .* is not what was written; write"):
            load_model(folder, device="cpu")
    (folder / "config.json").write_text(original)
    assert load_model(folder, device="cpu").weights == "twin"
    unmarked = {name: value for name, value in config.items() if name != "lede_twin"}
    (folder / "config.json").write_text(json.dumps(unmarked))
    with pytest.raises(lede_env.LedeError, match="weights of a geometry twin of llama2-7b, but its config"):
        load_model(folder, device="cpu")
    (folder / "config.json").write_text(original)
    with pytest.raises(lede_env.LedeError, match="is not empty; name a new folder"):
        write_twin(reduced("llama2-7b"), folder, folder, CPU, torch.float32)


def test_the_program_writes_a_twin_of_the_embedded_model(small_zoo, tiny, tmp_path, capsys):
    twin.main("llama3.2-1b", tmp_path / "twin", dtype="bfloat16", device="cpu")
    assert "the twin of llama3.2-1b; lede_env.load_model(" in capsys.readouterr().out
    assert "A geometry twin, not llama3.2-1b:" in (tmp_path / "twin" / "README.md").read_text()
    with safe_open(tmp_path / "twin" / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
        assert "lm_head.weight" not in set(file.keys())
    lm = load_model(tmp_path / "twin", device="cpu")
    assert (lm.name, lm.fingerprint) == ("llama3.2-1b-twin", tiny.fingerprint)
    strategy = lede_env.Lede(exit_layer=3)
    assert lede_env.generate(lm, "def f(", strategy=strategy, max_new_tokens=8).token_ids
