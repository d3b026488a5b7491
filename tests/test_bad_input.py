"""Bad input: a LedeError that names the value and the fix; on the command line one line and exit status 2."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lede_env
from lede_env import cli
from lede_env.decoding.strategies import (
    Autoregressive,
    DraftVerify,
    FiniteStateMachine,
    LayerSkip,
    Lede,
    Lite,
    parse_strategy,
)
from lede_env.display.report import check_report_path
from lede_env.errors import LedeError
from lede_env.models.loading import EMBEDDED, load_model
from lede_env.policies import RandomPolicy, StaticPolicy, ThresholdPolicy, load_policy
from tests.small_models import save_random_model, untrained_policy

ROOT = Path(__file__).parents[1]


def refuses(*parts):
    """A LedeError in whose message every part occurs, in this order."""
    return pytest.raises(LedeError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_model(folder, "llama-gqa")
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint of one's own to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "spoilt")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- models


def test_a_sound_folder_loads(copy):
    assert load_model(copy, device="cpu").name == "spoilt"
    assert load_model(copy, device="cpu") is load_model(str(copy), device="cpu")
    assert load_model(copy, device="cpu", dtype="float64").dtype == torch.float64
    # The embedded model by its path is a checkpoint like any other, whatever was loaded first.
    assert load_model(EMBEDDED, device="cpu").weights == "checkpoint"
    assert load_model("tiny", device="cpu").weights == "embedded"


def test_unknown_model(tmp_path):
    with refuses("model 'no-such-model' is unknown", "tiny", "llama2-7b", "existing folder", "hub id"):
        load_model("no-such-model")
    with refuses("is unknown", "existing folder with config.json"):
        load_model(tmp_path / "absent" / "folder")
    with refuses("model '' is unknown", "existing folder"):
        load_model("")
    with refuses("has no config.json", "Hugging Face form"):
        load_model(tmp_path)


def test_hub_id_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses("no folder 'nobody/nothing' exists here", "could not get nobody/nothing", "HF_HUB_OFFLINE is set"):
        load_model("nobody/nothing")
    with refuses("could not get nobody/nothing", "https://huggingface.co/nobody/nothing", "hf auth login", "folder"):
        load_model("nobody/nothing")
    with refuses("could not get facebook/layerskip-llama2-7B", "FAIR Noncommercial Research License"):
        load_model("llama2-7b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_where_there_is_none(device):
    with refuses(f"device={device!r}", "sees 0 CUDA devices", "device='cpu'"):
        load_model("tiny", device=device)


@pytest.mark.parametrize("device", ["tpu", "gpu", "mps", "", None])
def test_unknown_device(device):
    with refuses(f"device={device!r} is unknown", "'auto', 'cpu', 'cuda' or 'cuda:N'"):
        load_model("tiny", device=device)


@pytest.mark.parametrize("dtype", ["float8", "fp32", torch.int8, ["float32"]])
def test_unknown_dtype(dtype):
    with refuses(f"dtype={dtype!r} is unknown", "float32, bfloat16, float16, float64"):
        load_model("tiny", dtype=dtype)


CONFIGS = {
    "unsupported architecture": (dict(model_type="gpt2"), ("model_type='gpt2'", "llama, mistral, qwen2")),
    "no architecture": (dict(model_type=None), ("model_type=None", "llama, mistral, qwen2")),
    "sliding window, Mistral": (
        dict(model_type="mistral", sliding_window=64),
        ("sliding_window=64", "not supported", "full attention"),
    ),
    "sliding window, Qwen2": (
        dict(model_type="qwen2", use_sliding_window=True, sliding_window=64),
        ("use_sliding_window=true", "not supported"),
    ),
    "dynamic RoPE": (
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        ("rope_type='dynamic'", "not supported", "default, linear, llama3, yarn"),
    ),
    "longrope": (
        dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)),
        ("rope_type='longrope'", "not supported"),
    ),
    "unknown RoPE": (
        dict(rope_parameters=dict(rope_type="spiral", rope_theta=1e4)),
        ("rope_type='spiral'", "not supported", "default, linear, llama3, yarn", "use another checkpoint"),
    ),
    "unknown RoPE, in the older form": (
        dict(rope_parameters=None, rope_scaling=dict(type="spiral", factor=2.0)),
        ("rope_type='spiral'", "not supported", "default, linear, llama3, yarn", "use another checkpoint"),
    ),
    "RoPE without its factor": (
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4)),
        ("transformers refuses", "factor", "correct it"),
    ),
    "RoPE over a part of the head": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
        ("partial_rotary_factor=0.5", "not supported"),
    ),
    "RoPE's theta": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=0)),
        ("rope_theta=0", "expected a positive number", "correct it"),
    ),
    "RoPE's theta, a text": (
        dict(rope_parameters=dict(rope_type="default", rope_theta="x")),
        ("rope_theta='x'", "expected a number", "correct it"),
    ),
    "RoPE's factor": (
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor="x")),
        ("factor='x'", "expected a number", "correct it"),
    ),
    "one layer": (dict(num_hidden_layers=1), ("num_hidden_layers=1", "expected at least 2", "correct it")),
    "key heads": (
        dict(num_key_value_heads=3),
        ("num_key_value_heads=3", "expected a divisor of 4 heads", "correct it"),
    ),
    "context": (dict(max_position_embeddings=0), ("max_position_embeddings=0", "expected at least 2", "correct it")),
    "eps": (dict(rms_norm_eps=-1.0), ("rms_norm_eps=-1.0", "expected a small positive number", "correct it")),
    "activation": (dict(hidden_act="gelu"), ("hidden_act='gelu'", "SiLU")),
    "biases": (dict(attention_bias=True), ("attention_bias=true", "not supported")),
    "quantised": (dict(quantization_config=dict(quant_method="fp8")), ("quantization_config", "unquantised weights")),
    "nonsense": (dict(hidden_size="many"), ("transformers refuses", "hidden_size", "correct it")),
    "another shape": (
        dict(intermediate_size=64),
        ("gate_proj.weight has shape (48, 32)", "config.json says (64, 32)", "do not match"),
    ),
    "more layers": (dict(num_hidden_layers=7), ("no tensor 'model.layers.6.", "do not match its config.json")),
}


@pytest.mark.parametrize(("changes", "says"), CONFIGS.values(), ids=CONFIGS)
def test_config_of_another_model(copy, changes, says):
    edit_config(copy, **changes)
    with refuses(*says):
        load_model(copy, device="cpu")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b'{"model_type": ', b"[1, 2]", b"\xff\xfe\x00"])
def test_json_files_that_are_not(copy, file, content):
    (copy / file).write_bytes(content)
    with refuses(file, "JSON", "download the model again"):
        load_model(copy, device="cpu")


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
def test_truncated_weights(copy, keep):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with refuses("model.safetensors", "damaged or truncated", "download it again"):
        load_model(copy, device="cpu")


def test_missing_files(copy):
    tensors = load_file(copy / "model.safetensors")
    shards = {name: f"model-0000{1 + (name < 'model.layers.3')}-of-00002.safetensors" for name in tensors}
    (copy / "model.safetensors").unlink()
    for shard in set(shards.values()):
        save_file({name: tensor for name, tensor in tensors.items() if shards[name] == shard}, copy / shard)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert load_model(copy, device="cpu").n_layers == 6
    (copy / "model-00002-of-00002.safetensors").unlink()
    with refuses("lacks model-00002-of-00002.safetensors", "index names", "download"):
        load_model(copy, device="cpu", dtype="float64")


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"a": 3}},
     {"weight_map": {"a": "../other/model.safetensors"}}, {"weight_map": {"a": "model.bin"}}],
    ids=str,
)  # fmt: skip
def test_an_index_of_shards_that_names_none(copy, index):
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with refuses("model.safetensors.index.json", "'weight_map'", "*.safetensors files beside it", "download it again"):
        load_model(copy, device="cpu")


def test_pickled_weights_are_never_loaded(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with refuses("no *.safetensors", ".bin files are pickles", "convert"):
        load_model(copy, device="cpu")
    (copy / "pytorch_model.bin").unlink()
    with refuses("no *.safetensors", "download"):
        load_model(copy, device="cpu")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.k_proj.weight", (16, 31)),
        ("model.layers.1.self_attn.q_proj.weight", (40, 32)),
        ("model.layers.0.input_layernorm.weight", (31,)),
        ("model.embed_tokens.weight", (96, 32)),
        ("lm_head.weight", (97, 33)),
    ],
)
def test_tensors_of_another_shape(copy, name, shape):
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with refuses(name, f"has shape {shape}", "config.json says", "do not match"):
        load_model(copy, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors(copy, dtype):
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with refuses(
        name, f"is stored as {str(dtype).removeprefix('torch.')}", "quantised", "bfloat16, float16 or float32"
    ):
        load_model(copy, device="cpu")


def test_a_tensor_that_is_a_single_number(copy):
    """As the scales that quantised checkpoints keep."""
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.1.self_attn.k_scale": torch.tensor(0.5)}))
    assert load_model(copy, device="cpu").n_layers == 6
    edit_tensors(copy, lambda tensors: tensors.update({"model.norm.weight": torch.tensor(1.0)}))
    with refuses("model.norm.weight has shape ()", "config.json says", "do not match"):
        load_model(copy, device="cpu", dtype="float64")


def test_an_untied_head_must_be_there(copy):
    edit_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with refuses("no tensor 'lm_head.weight'", "do not match"):
        load_model(copy, device="cpu")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_tokenizer(copy, file, keep):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, copy)
    assert load_model(copy, device="cpu", dtype="float64").encode("hi")
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with refuses(f"tokenizer files of {copy} cannot be read", "download them again"):
        load_model(copy, device="cpu")


def test_a_damaged_sentencepiece_tokenizer(copy):
    (copy / "tokenizer.model").write_bytes(b"\n\x0e\n\x05")
    with refuses("tokenizer files", "cannot be read", "tokenizer.json, or `pip install sentencepiece`"):
        load_model(copy, device="cpu")


@pytest.mark.parametrize("eos", ["</s>", 1.5, True, [2, "</s>"], [[2]]], ids=repr)
def test_eos_ids_that_are_none(copy, eos):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with refuses("generation_config.json", f"eos_token_id={eos!r}", "a token id or a list", "correct it"):
        load_model(copy, device="cpu")


def test_a_generation_config_that_asks_for_more_warns(copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "repetition_penalty": 1.2}))
    with pytest.warns(UserWarning, match="repetition_penalty, which this decoder does not apply"):
        assert load_model(copy, device="cpu").eos_ids == (2, 3)


# --- prompts and arguments of generate


ARGUMENTS = {
    "max_new_tokens": (dict(max_new_tokens=0), ("max_new_tokens=0", "at least 1")),
    "temperature": (dict(temperature=-1.0), ("temperature=-1.0", "0 (greedy) or a positive number")),
    "temperature, nan": (dict(temperature=float("nan")), ("temperature=nan", "positive number")),
    "temperature, inf": (dict(temperature=float("inf")), ("temperature=inf", "positive number")),
    "top_k": (dict(top_k=-1), ("top_k=-1", "0 (off)")),
    "top_p": (dict(top_p=0.0), ("top_p=0.0", "(0, 1]")),
    "top_p above 1": (dict(top_p=1.5), ("top_p=1.5", "(0, 1]")),
    "stop": (dict(stop=""), ("stop=''", "at least one character")),
    "one of several stops": (dict(stop=["x", ""]), ("stop=''", "at least one character")),
    "max_new_tokens, a text": (dict(max_new_tokens="5"), ("max_new_tokens='5'", "a whole number")),
    "max_new_tokens, a fraction": (dict(max_new_tokens=5.0), ("max_new_tokens=5.0", "a whole number")),
    "max_new_tokens, nothing": (dict(max_new_tokens=None), ("max_new_tokens=None", "a whole number")),
    "max_new_tokens, a truth": (dict(max_new_tokens=True), ("max_new_tokens=True", "a whole number")),
    "temperature, a text": (dict(temperature="hot"), ("temperature='hot'", "a number")),
    "temperature, nothing": (dict(temperature=None), ("temperature=None", "a number")),
    "top_p, a text": (dict(top_p="a"), ("top_p='a'", "a number")),
    "top_k, a fraction": (dict(top_k=1.5), ("top_k=1.5", "a whole number")),
    "seed, a fraction": (dict(seed=1.5), ("seed=1.5", "a whole number")),
    "seed, a text": (dict(seed="a"), ("seed='a'", "a whole number")),
    "seed, nothing": (dict(seed=None), ("seed=None", "a whole number")),
    "stop, a number": (dict(stop=5), ("stop=5", "a string or a list of strings")),
    "stop, nothing": (dict(stop=None), ("stop=None", "a string or a list of strings")),
    "stop, bytes": (dict(stop=b"x"), ("stop=b'x'", "a string or a list of strings")),
    "a number among stops": (dict(stop=["a", 5]), ("stop=['a', 5]", "a string or a list of strings")),
    "strategy, empty": (dict(strategy=""), ("strategy=''", "give an instance")),
    "strategy, zero": (dict(strategy=0), ("strategy=0", "give an instance")),
    "exit layer 0": (dict(strategy=LayerSkip(0, 4)), ("exit layer 0 is out of range", "16 layers", "1..15")),
    "exit layer L": (dict(strategy=LayerSkip(16, 4)), ("exit layer 16 is out of range", "1..15")),
}


@pytest.mark.parametrize("call", [lede_env.generate, lede_env.stream], ids=["generate", "stream"])
@pytest.mark.parametrize(("arguments", "says"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(tiny, call, arguments, says):
    with refuses(*says):
        call(tiny, "x", **arguments)


def test_a_name_is_no_model(tiny):
    for call in (lede_env.generate, lede_env.stream):
        with refuses("lm='tiny' is not a model", "load_model"):
            call("tiny", "a")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LayerSkip("3", 4), "exit_layer='3'"),
        (lambda: LayerSkip(2.5, 4), "exit_layer=2.5"),
        (lambda: LayerSkip(3, 2.5), "speculation=2.5"),
        (lambda: FiniteStateMachine(None), "exit_layer=None"),
        (lambda: DraftVerify(True), "exit_layer=True"),
        (lambda: DraftVerify(3, "0.5"), "threshold='0.5'"),
        (lambda: Lite({"3": 0.5}), "exit_layer='3'"),
        (lambda: Lite({3: None}), "thresholds[3]=None"),
        (lambda: Lite(0.5), "thresholds=0.5 of Lite"),
        (lambda: Lede(exit_layer="3"), "exit_layer='3'"),
        (lambda: Lede(speculation=1.5), "speculation=1.5"),
    ],
)
def test_strategies_of_the_wrong_types(make, says):
    with refuses(says, "must be a"):
        make()


def test_numbers_of_numpy_are_numbers(tiny):
    ours = dict(max_new_tokens=4, temperature=0.6, top_k=9, top_p=0.5, seed=3)
    theirs = dict(max_new_tokens=np.int64(4), temperature=np.float64(0.6), top_k=np.int32(9), top_p=np.float64(0.5))
    out = lede_env.generate(tiny, "def", strategy=LayerSkip(np.int64(4), np.int64(2)), seed=np.int64(3), **theirs)
    again = lede_env.generate(tiny, "def", strategy=LayerSkip(4, 2), **ours)
    assert out.token_ids == again.token_ids and type(out.seed) is int


@pytest.mark.parametrize("speculation", [0, 13])
def test_speculation(speculation):
    with refuses(f"speculation={speculation} is out of range", "1 to 12"):
        LayerSkip(4, speculation)


@pytest.mark.parametrize("prompt", ["", [], [[]], ["fine", ""], np.zeros(0, int)], ids=repr)
def test_empty_prompts(tiny, prompt):
    with refuses("the prompt is empty", "at least one character or one token id"):
        lede_env.generate(tiny, prompt)


@pytest.mark.parametrize("length", [2048, 2049, 5000])
def test_prompts_longer_than_the_context(tiny, length):
    with refuses(f"{length} tokens", "context is 2048", "at most 2047"):
        lede_env.generate(tiny, [5] * length)


@pytest.mark.parametrize("token", [-1, 4096, 10**12])
def test_token_ids_outside_the_vocabulary(tiny, token):
    with refuses(f"token id {token} is outside", "0 to 4095", "tokenizer"):
        lede_env.generate(tiny, [5, token])


@pytest.mark.parametrize("prompt", [[1.5, 2], [None], [5, "x"], 5, None, b"x", ["a", 5], ["a", None]], ids=repr)
def test_prompts_that_are_none(tiny, prompt):
    with refuses("prompt", "neither a text,", "chat messages nor", "token ids"):
        lede_env.generate(tiny, prompt)


def test_chat_messages_that_the_template_cannot_use(tiny):
    with refuses("chat template", "'role' and 'content'"):
        lede_env.generate(tiny, [{"text": "hello"}])
    plain = replace(tiny, tokenizer=type("Plain", (), {"chat_template": None})())
    with refuses("has no chat template", "pass a text or token ids"):
        lede_env.generate(plain, [{"role": "user", "content": "hello"}])


def test_models_without_a_tokenizer(checkpoint):
    lm = load_model(checkpoint, device="cpu")
    assert lede_env.generate(lm, [1, 2, 3], max_new_tokens=2).text == ""
    with refuses("has no tokenizer files", "token ids instead"):
        lede_env.generate(lm, "hello")
    with refuses("stop=('x',) needs a tokenizer"):
        lede_env.generate(lm, [1, 2, 3], stop="x")


def test_stream_takes_one_prompt(tiny):
    with refuses("one prompt", "a batch of 2", "use generate"):
        lede_env.stream(tiny, ["a", "b"])


def test_sessions(tiny):
    with refuses("at least one row", "batch=0"):
        tiny.session(0, 10)
    with refuses("capacity 2049", "context is 2048"):
        tiny.session(1, 2049)
    with refuses("11 prompt tokens do not fit", "10 positions"):
        tiny.session(1, 10).prefill(0, [5] * 11)


# --- strategies and policies


def test_policies_made_for_something_else(tiny):
    candidates = str(tiny.candidate_layers)
    cases = [
        (untrained_policy(tiny, model_fingerprint="0123", model_name="other"), ("'other'", "0123", tiny.fingerprint)),
        (untrained_policy(tiny, candidate_layers=(4, 17)), ("exit layer 17 is out of range", "1..15")),
        (untrained_policy(tiny, features=("confidence", *"abcdefghijklm")), ("'a'", "missing", "train")),
        (StaticPolicy(5, 16), ("exits at layer 5", candidates, "choose")),
        (ThresholdPolicy({12: 0.9}, 16), ("no threshold for layers", "only for [12]", "every candidate layer")),
    ]
    for policy, says in cases:
        with refuses(*says):
            lede_env.generate(tiny, [5, 9, 11], strategy=Lede(policy), max_new_tokens=40)


def test_no_policy_ships_with_other_models(checkpoint):
    with refuses("no policy ships with", "Lede(load_policy(PATH))"):
        lede_env.generate(load_model(checkpoint, device="cpu"), [1, 2], strategy=Lede())


def test_absent_policy(tmp_path):
    with refuses("path=5", "a policy's folder", "tiny"):
        load_policy(5)
    with refuses("no policy at", "policy.json", "missing", "policy.safetensors"):
        parse_strategy("lede", policy=str(tmp_path))


@pytest.mark.parametrize("text", ["foo", "LayerSkip:4,5", "", ":4"])
def test_unknown_strategy(text):
    with refuses(
        f"strategy {text!r} is unknown",
        "autoregressive, layerskip, fsm, draft_verify, lite, del, lede",
        "layerskip:4,5",
    ):
        parse_strategy(text)


@pytest.mark.parametrize("text", ["layerskip", "layerskip:4", "layerskip:4,x", "layerskip:4,5,6", "layerskip:-4,5"])
def test_strategy_with_the_wrong_numbers(text):
    with refuses(f"strategy {text!r}", "write it as 'layerskip:EXIT_LAYER,SPECULATION'"):
        parse_strategy(text)


def test_strategies_from_a_command_line():
    assert parse_strategy("layerskip:4,5") == LayerSkip(4, 5)
    assert parse_strategy("autoregressive") == Autoregressive()
    assert parse_strategy("lede").policy is None
    assert parse_strategy("lede:exit_layer=4").exit_layer == 4
    assert parse_strategy("fsm:4").speculation == 4
    with refuses("strategy 'autoregressive:3'", "write it as 'autoregressive'"):
        parse_strategy("autoregressive:3")
    with refuses("a policy, got 'tiny'", "load_policy(PATH)"):
        Lede("tiny")
    with refuses("--policy belongs to the strategy 'lede'", "'layerskip'"):
        parse_strategy("layerskip:4,5", policy="somewhere")
    assert RandomPolicy().features == ()


# --- the command line


COMMANDS = {
    "empty prompt": (["generate", "", "--strategy", "autoregressive"], "the prompt is empty"),
    "strategy": (["generate", "x", "--strategy", "foo"], "strategy 'foo' is unknown"),
    "exit layer": (["generate", "x", "--strategy", "layerskip:16,5"], "exit layer 16 is out of range"),
    "model": (["generate", "x", "--model", "nope", "--strategy", "autoregressive"], "model 'nope' is unknown"),
    "device": (["generate", "x", "--strategy", "autoregressive", "--device", "tpu"], "device='tpu' is unknown"),
    "dtype": (["generate", "x", "--strategy", "autoregressive", "--dtype", "int4"], "dtype='int4' is unknown"),
    "temperature": (["generate", "x", "--strategy", "autoregressive", "--temperature", "-1"], "temperature=-1.0"),
    "top_p": (["generate", "x", "--strategy", "autoregressive", "--top-p", "0"], "must lie in (0, 1]"),
    "policy": (["generate", "x", "--policy", "no[/such]policy"], "no policy at 'no[/such]policy'"),
    "environment": (
        ["record", "--env", "Nope", "--policy", "random", "--episodes", "1", "--out", "x.h5"],
        "environment 'Nope' is unknown; known ids: LEDE-Tiny-v0",
    ),
    "static policy": (
        ["record", "--env", "LEDE-Tiny-v0", "--policy", "static:5", "--episodes", "1", "--out", "x.h5"],
        "policy 'static:5': '5' is not one of the candidate layers",
    ),
    "a folder as the file": (
        ["record", "--env", "LEDE-Tiny-v0", "--policy", "random", "--episodes", "1", "--out", "."],
        ". is a folder; name a file in it",
    ),
    "a file as the folder": (
        ["record", "--env", "LEDE-Tiny-v0", "--policy", "random", "--episodes", "1", "--out", "/dev/null/x.h5"],
        "/dev/null/x.h5 cannot be written",
    ),
    "a trace in a file": (
        ["record", "--env", "LEDE-Tiny-v0", "--trace", "--out", "/dev/null/x.h5"],
        "/dev/null/x.h5 cannot be written",
    ),
    "episodes": (
        ["record", "--env", "LEDE-Tiny-v0", "--policy", "random", "--episodes", "0", "--out", "x.h5"],
        "episodes=0",
    ),
}


@pytest.mark.parametrize(("command", "says"), COMMANDS.values(), ids=COMMANDS)
def test_commands(monkeypatch, capfd, tmp_path, command, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lede", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and says in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_report_replaces_nothing_but_a_report(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>mine</title>")
    with refuses("page.html' exists and is no earlier report", "name another file"):
        check_report_path(page)
    template = files("lede_env.display") / "page" / "page.html"
    page.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    check_report_path(page)


PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("agents", "benchmarks", "lede_env")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path.name != "cli.py"
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_ends_bad_input_with_a_clear_error(program):
    main = (ROOT / program).read_text().split('__name__ == "__main__":')[1]
    assert "    with clear_errors():\n" in main
