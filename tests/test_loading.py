"""Loading: one name a device, what a fingerprint covers, memory, and the table of models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lede_env
from lede_env.engine.cuda import kernels_fit
from lede_env.models.loading import load_model, resolve_device
from lede_env.models.zoo import MODELS, find_spec
from lede_env.policies import load_policy
from tests.small_models import LLAMA3_ROPE, save_random_model

# --- devices


@pytest.mark.parametrize("current", [0, 2])
def test_a_gpu_has_one_name(monkeypatch, current):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.current_device", lambda: current)
    here = torch.device("cuda", current)
    assert [str(resolve_device(name)) for name in ("auto", "cuda", str(here))] == [str(here)] * 3
    assert str(resolve_device("cuda:1")) == "cuda:1"


def test_the_cpu_has_one_name():
    assert resolve_device("cpu:0") == resolve_device("cpu") == torch.device("cpu")
    assert load_model("tiny", device="cpu:0") is load_model("tiny", device="cpu")


# --- fingerprints


def fingerprint(folder, **changes):
    """Of a folder whose config.json is changed; `generation` changes generation_config.json."""
    generation = changes.pop("generation", None)
    copy = shutil.copytree(folder, folder.parent / f"changed{sum(1 for _ in folder.parent.iterdir())}")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    return load_model(copy, device="cpu").fingerprint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fingerprints") / "checkpoint"
    save_random_model(folder, "llama-gqa")
    return folder


def test_a_fingerprint_covers_what_defines_the_function(checkpoint):
    linear = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
    changes = {
        "nothing": {},
        "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
        "scaling": dict(rope_parameters=linear),
        "factor": dict(rope_parameters={**linear, "factor": 4.0}),
        "llama3": dict(rope_parameters=LLAMA3_ROPE),
        "low_freq_factor": dict(rope_parameters={**LLAMA3_ROPE, "low_freq_factor": 2.0}),
        "eps": dict(rms_norm_eps=1e-5),
        "tied": dict(tie_word_embeddings=True),
        "context": dict(max_position_embeddings=128),
        "architecture": dict(model_type="mistral", sliding_window=None),
        "eos": dict(generation={"eos_token_id": 3}),
        "more eos": dict(generation={"eos_token_id": [2, 3]}),
    }
    seen = {name: fingerprint(checkpoint, **change) for name, change in changes.items()}
    assert len(set(seen.values())) == len(seen), seen
    # Heads that share the projections differently: the tensors are the same.
    wide = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    assert fingerprint(checkpoint, **wide) not in seen.values()


def test_a_config_of_fewer_layers_than_the_weights_is_refused(checkpoint):
    with pytest.raises(lede_env.LedeError, match=r"has tensors of layer 6, but config\.json says 5 layers"):
        fingerprint(checkpoint, num_hidden_layers=5)


def test_a_fingerprint_covers_nothing_else(checkpoint, tmp_path):
    same = load_model(checkpoint, device="cpu").fingerprint
    assert load_model(checkpoint, device="cpu", dtype="bfloat16").fingerprint == same
    older = dict(rope_parameters=None, rope_theta=10000, eos_token_id=[2], use_cache=False, initializer_range=1.0)
    assert fingerprint(checkpoint, **older, generation={"eos_token_id": [2, 2], "temperature": 0.7}) == same
    for name in ("config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    shard(load_file(checkpoint / "model.safetensors"), tmp_path)
    assert load_model(tmp_path, device="cpu").fingerprint == same


def test_the_shipped_policy_is_for_the_shipped_model(tiny):
    from lede_env.models.loading import EMBEDDED

    assert load_policy(EMBEDDED / "policy").model_fingerprint == tiny.fingerprint


# --- shards and memory


def shard(tensors, folder, count=3):
    """Write tensors to `folder` as `count` shards and their index."""
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    weight_map = {name: files[at % count] for at, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load_as_one_file(checkpoint, tmp_path):
    whole = load_model(checkpoint, device="cpu")
    shutil.copy(checkpoint / "config.json", tmp_path)
    shard(load_file(checkpoint / "model.safetensors"), tmp_path)
    parts = load_model(tmp_path, device="cpu")
    assert torch.equal(parts.embedding, whole.embedding) and torch.equal(parts.head, whole.head)
    for one, other in zip(parts.layers, whole.layers, strict=True):
        assert torch.equal(one.qkv, other.qkv) and torch.equal(one.gate_up, other.gate_up)


def private_bytes():
    """This process's memory that no file backs; mapped pages of a checkpoint are the system's to drop."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def test_one_file_is_the_model_whatever_lies_beside_it(checkpoint, tmp_path):
    """As in transformers: other files hold adapters, or the model in another form."""
    folder = shutil.copytree(checkpoint, tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "other.safetensors")
    one, both = load_model(checkpoint, device="cpu"), load_model(folder, device="cpu")
    assert both.fingerprint == one.fingerprint and torch.equal(both.embedding, one.embedding)


def test_kernels_run_on_gpus_they_are_for_and_on_the_current_one(monkeypatch, tiny):
    monkeypatch.setattr("lede_env.engine.cuda._has_triton", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("lede_env.engine.cuda._capability", lambda device: (7, 5) if device.index == 2 else (9, 0))
    models = [replace(tiny, device=torch.device("cuda", index), idle=[]) for index in range(3)]
    assert kernels_fit(models[0])
    with pytest.warns(
        UserWarning, match=r"runs eagerly on CUDA.* on cuda:1, which is not the current .*set_device\(1\) first"
    ):
        assert not kernels_fit(models[1])
    with pytest.warns(UserWarning, match=r"runs eagerly on CUDA.*compute capability 7\.5, .* need 8\.0"):
        assert not kernels_fit(models[2])
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert kernels_fit(models[1])


@pytest.mark.gpu
def test_the_host_keeps_no_copy_of_weights_on_a_gpu(tmp_path, monkeypatch):
    from lede_env.models.checkpoint import FolderTensors

    big = dict(vocab_size=8192, hidden_size=2048, intermediate_size=8192, num_attention_heads=16)
    save_random_model(tmp_path / "whole", "llama", num_hidden_layers=3, num_key_value_heads=16, **big)
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    (tmp_path / "shards").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "shards")
    shard(tensors, tmp_path / "shards")
    largest = max(tensor.nbytes for tensor in tensors.values())
    del tensors
    load_model("tiny", device="cuda")  # the context and the libraries
    before, seen = private_bytes(), []
    get = FolderTensors.get

    def watched(self, name):
        tensor = get(self, name)
        seen.append(private_bytes() - before)
        return tensor

    monkeypatch.setattr(FolderTensors, "get", watched)
    load_model(tmp_path / "shards", device="cuda")
    assert max(seen) <= largest + 2**23 < total / 4, (max(seen), largest, total)


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [False, True])
def test_loading_holds_one_tensor_beside_the_model(tmp_path, tied):
    big = dict(vocab_size=8192, hidden_size=2048, intermediate_size=8192, num_attention_heads=16)
    more = dict(num_hidden_layers=3, num_key_value_heads=16, tie_word_embeddings=tied)
    save_random_model(tmp_path, "llama", **big, **more)
    load_model("tiny", device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    load_model(tmp_path, device="cuda")  # float64 to bfloat16
    tensors = load_file(tmp_path / "model.safetensors").values()
    weights, largest = 2 * sum(tensor.numel() for tensor in tensors), 2 * max(tensor.numel() for tensor in tensors)
    held = torch.cuda.max_memory_reserved() - before
    assert held <= weights + largest + 2**26, (held, weights, largest)


# --- the table of models


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_candidate_layers_lie_where_the_embedded_models_do(spec):
    depth = MODELS["tiny"].n_layers
    assert spec.candidate_layers == tuple(-(-c * spec.n_layers // depth) for c in MODELS["tiny"].candidate_layers)
    assert all(0 < layer < spec.n_layers for layer in spec.candidate_layers)
    assert spec.hidden == spec.heads * spec.head_dim and spec.heads % spec.kv_heads == 0
    assert spec.licence_page.startswith("https://")


def test_the_table_has_the_papers_models():
    for name in ("llama3.2-1B", "llama2-7B", "llama2-13B", "codellama-7B", "codellama-34B"):
        spec = find_spec(f"facebook/layerskip-{name}")
        assert spec is find_spec(name) and spec.licence_page == f"https://huggingface.co/{spec.hub_id}"
        # The size in a name is the parameter count, rounded, in billions.
        attention = spec.hidden * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
        embeddings = spec.vocab * spec.hidden * (1 if spec.tied else 2)
        billions = (spec.n_layers * (attention + 3 * spec.hidden * spec.mlp) + embeddings) / 1e9
        assert billions == pytest.approx(int(name.rpartition("-")[2][:-1]), rel=0.25)


def test_the_table_describes_the_embedded_model(tiny):
    spec, geometry = MODELS["tiny"], tiny.geometry
    for name in ("n_layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab", "context"):
        assert getattr(spec, name) == getattr(geometry, name)
    assert tiny.candidate_layers == spec.candidate_layers
