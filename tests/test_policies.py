"""lede_env.policies: the simple rules, the policy file, and every refusal."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lede_env.engine.logit_signals import LogitSignals
from lede_env.errors import LedeError
from lede_env.policies import (
    MaskedMLPPolicy,
    MLPPolicy,
    RandomPolicy,
    StaticPolicy,
    ThresholdPolicy,
    TreePolicy,
    check_compatible,
    load_policy,
    parse_policy,
)

FEATURES = ("confidence", "entropy", "trace")
HERE = {"fingerprint": "f00", "candidate_layers": (2, 4), "features": (*FEATURES, "layer"), "mdp": "exit"}


@pytest.fixture
def policy() -> MLPPolicy:
    random = MLPPolicy.random(FEATURES, hidden=(8, 5), seed=3)
    return replace(
        random,
        mean=np.array([1.0, 2.0, 0.3], np.float32),
        std=np.array([0.7, 1.1, 0.1], np.float32),
        candidate_layers=(2, 4),
        n_layers=8,
        model_fingerprint="f00",
        model_name="toy",
        training={"agent": "by hand"},
    )


def layer_column(*layers: int, n_layers: int = 8) -> np.ndarray:
    return np.array(layers, np.float32)[:, None] / n_layers


# --- rules


def test_random_is_its_probability():
    assert RandomPolicy(0.3).exit_probability(np.zeros((4, 0), np.float32)).tolist() == [0.3] * 4
    with pytest.raises(LedeError, match=r"1\.5"):
        RandomPolicy(1.5)


def test_static_exits_at_its_layer_and_above():
    for n_layers in (7, 16, 32, 48):  # e / L does not survive float32 exactly
        for layer in range(1, n_layers):
            x = layer_column(*range(1, n_layers), n_layers=n_layers)
            expected = np.arange(1, n_layers) >= layer
            np.testing.assert_array_equal(StaticPolicy(layer, n_layers).exit_probability(x), expected)
    for layer in (0, 8):
        with pytest.raises(LedeError, match=f"layer={layer}.*1 to 7"):
            StaticPolicy(layer, 8)


def test_threshold_compares_the_top_probability_with_the_layers_own():
    policy = ThresholdPolicy({2: 0.9, 4: 0.5}, n_layers=8)
    x = np.concatenate([layer_column(2, 2, 4, 4), -np.log([[0.8], [0.95], [0.4], [0.6]])], axis=1)
    np.testing.assert_array_equal(policy.exit_probability(x.astype(np.float32)), [0, 1, 0, 1])
    with pytest.raises(LedeError, match=r"layers \[6\].*\[2, 4\]"):
        policy.exit_probability(np.array([[6 / 8, 0.1]], np.float32))
    with pytest.raises(LedeError, match=r"threshold 2\.0 at layer 3"):
        ThresholdPolicy({3: 2.0}, n_layers=8)


def test_mlp_is_greedy_on_the_normalised_network(policy):
    x = np.random.default_rng(0).normal(1, 1, size=(50, 3)).astype(np.float32)
    h = (x.astype(np.float64) - policy.mean) / policy.std
    for weight, bias in zip(policy.weights[:2], policy.biases[:2], strict=True):
        h = np.maximum(0, h @ weight.T + bias)
    q = h @ policy.weights[2].T + policy.biases[2]
    np.testing.assert_allclose(policy.q_values(x), q, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(policy.exit_probability(x), q[:, 1] > q[:, 0])


def test_mlp_that_makes_no_sense_is_refused(policy):
    with pytest.raises(LedeError, match=r"expected \[\(8, 3\)"):
        replace(policy, weights=policy.weights[:1] + policy.weights[:1] + policy.weights[2:])
    with pytest.raises(LedeError, match="positive std"):
        replace(policy, std=np.zeros(3, np.float32))
    with pytest.raises(LedeError, match="not finite"):
        replace(policy, mean=np.array([np.nan, 0, 0], np.float32))
    with pytest.raises(LedeError, match="'chat'"):
        replace(policy, mdp="chat")


def masked(policy: MLPPolicy, flexibility: float) -> MaskedMLPPolicy:
    """Of `policy`, with an imitator of another shape and other weights."""
    imitator = MLPPolicy.random(FEATURES, hidden=(6,), seed=5)
    known = {field.name: getattr(policy, field.name) for field in fields(policy)}
    imitator = replace(policy, weights=imitator.weights, biases=imitator.biases)
    return MaskedMLPPolicy(**known, imitator=imitator, flexibility=flexibility)


@pytest.mark.parametrize("flexibility", [0.3, 0.9])
def test_masked_mlp_takes_the_better_of_the_likely_actions(policy, flexibility):
    x = np.random.default_rng(0).normal(1, 2, size=(200, 3)).astype(np.float32)
    batch_constrained = masked(policy, flexibility)
    logits = batch_constrained.imitator.q_values(x)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    allowed = chances > flexibility * chances.max(1, keepdims=True)
    expected = np.where(allowed, policy.q_values(x), -np.inf).argmax(1)
    np.testing.assert_array_equal(batch_constrained.exit_probability(x), expected)
    assert 0 < (expected != policy.exit_probability(x)).mean() < 1  # the mask matters, and not everywhere


@pytest.mark.parametrize("flexibility", [1e-9, 0.9])
def test_the_decoders_short_way_decides_alike(policy, flexibility):
    """One observation at a time; also for a network without hidden layers."""
    linear = replace(policy, weights=(np.float32([[1, -1, 2], [0.5, 1, -1]]),), biases=policy.biases[2:])
    x = np.random.default_rng(0).normal(1, 2, size=(100, 3)).astype(np.float32)
    for each in (policy, linear, masked(policy, flexibility)):
        exits = each.exit_probability(x)
        np.testing.assert_array_equal(exits, [each.advantage(row) > 0 for row in x])
        assert 0 < exits.mean() < 1


@pytest.fixture
def tree(policy) -> TreePolicy:
    """Exits where the margin is above 1, or the echo is at most 0.5."""
    return TreePolicy(
        feature=np.int32([1, 0, -1, -1, -1]), threshold=np.array([1.0, 0.5, 0, 0, 0]),
        left=np.int32([1, 3, -1, -1, -1]), right=np.int32([2, 4, -1, -1, -1]),
        advantage=np.float32([0, 0, 0.25, 1.5, -0.5]), features=("echo", "margin"),
        **{name: getattr(policy, name) for name in ("mdp", "candidate_layers", "n_layers", "model_fingerprint",
                                                    "model_name", "training")},
    )  # fmt: skip


def test_a_tree_decides_by_its_leaves(tree):
    x = np.float32([[0.2, 0.4], [0.5, 1.0], [0.6, 1.0], [0.6, 1.1], [30, 2]])  # echo, margin
    assert tree.exit_probability(x).tolist() == [1, 1, 0, 1, 1]
    assert tree.exit_probability(x[:0]).tolist() == []
    assert tree.q_values(x).tolist() == [[0, 1.5], [0, 1.5], [0, -0.5], [0, 0.25], [0, 0.25]]


def test_a_tree_computes_only_what_it_looks_at(tree):
    """And decides as on arrays. Beyond a margin of 1 no guess is looked at, so there need be none."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(60):
        logits = torch.randn(9, generator=generator).mul(2)
        signals = LogitSignals(2, 8, position=0, cap=12, guess=(3, 0.5), logits=logits)
        seen.append(tree.exits(signals))
        assert seen[-1] == bool(tree.exit_probability(signals.features(tree.features)[None])[0])
        if signals.margin > 1:
            assert tree.exits(LogitSignals(2, 8, position=0, cap=12, guess=(99, 0.5), logits=logits))
    assert 0 < np.mean(seen) < 1


def test_a_question_that_changes_nothing_is_not_asked(tree):
    alike = replace(tree, advantage=np.float32([0, 0, 0.25, 1.5, 0.5]))
    assert alike._root is True and tree._root == ("margin", 1.0, ("echo", 0.5, True, False), True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feature": np.int32([2, 0, -1, -1, -1])}, "asks about no feature"),
        ({"left": np.int32([0, 3, -1, -1, -1])}, "no later node"),
        ({"right": np.int32([2, 9, -1, -1, -1])}, "no later node"),
        ({"threshold": np.array([np.nan, 0.5, 0, 0, 0])}, "not finite"),
        ({"advantage": np.float32([0, 0, np.inf, 1.5, -0.5])}, "not finite"),
        ({"left": np.int32([1, 3])}, r"expected \(N,\) each"),
        ({"mdp": "chat"}, "TreePolicy mdp='chat'"),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(tree, change, message):
    with pytest.raises(LedeError, match=message):
        replace(tree, **change)


def test_a_saved_tree_comes_back_exactly(tree, tmp_path):
    loaded = load_policy(tree.save(tmp_path))
    assert isinstance(loaded, TreePolicy) and loaded.card() == tree.card() and loaded._root == tree._root
    assert loaded.relabelled(16).candidate_layers == (4, 8)
    card = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(card | {"nodes": 9}))
    with pytest.raises(LedeError, match=r"announces .*\(9,\)"):
        load_policy(tmp_path)


def test_a_mask_that_makes_no_sense_is_refused(policy):
    with pytest.raises(LedeError, match=r"flexibility=1\.5"):
        masked(policy, 1.5)
    with pytest.raises(LedeError, match="its imitator"):
        replace(masked(policy, 0.3), imitator=MLPPolicy.random(("layer",)))


# --- files


def test_a_saved_policy_comes_back_exactly(policy, tmp_path):
    folder = policy.save(tmp_path / "a" / "policy")
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for path in (folder, str(folder), folder / "policy.safetensors"):
        loaded = load_policy(path)
        np.testing.assert_array_equal(loaded.q_values(x), policy.q_values(x))
        for name in ("features", "mdp", "candidate_layers", "n_layers", "model_fingerprint", "model_name", "training"):
            assert getattr(loaded, name) == getattr(policy, name)


def test_a_saved_masked_policy_comes_back_exactly(policy, tmp_path):
    saved = masked(policy, 0.3)
    loaded = load_policy(saved.save(tmp_path))
    x = np.random.default_rng(0).normal(1, 2, size=(100, 3)).astype(np.float32)
    np.testing.assert_array_equal(loaded.exit_probability(x), saved.exit_probability(x))
    assert isinstance(loaded, MaskedMLPPolicy) and loaded.card() == saved.card()


def test_missing_files_are_named(policy, tmp_path):
    with pytest.raises(LedeError, match=r"no policy at .*nowhere.*policy\.json is missing"):
        load_policy(tmp_path / "nowhere")
    folder = policy.save(tmp_path)
    (folder / "policy.safetensors").unlink()
    with pytest.raises(LedeError, match=r"policy\.safetensors is missing"):
        load_policy(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weights_file_is_refused(policy, tmp_path, keep):
    file = policy.save(tmp_path) / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(LedeError, match=r"policy\.safetensors is not a readable safetensors file"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "gru"}, r"kind='gru'.*\['mlp', 'masked_mlp', 'tree'\]"),
        ({"format_version": 99}, r"format_version=99.*\[1\]"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"state_reset": "token"}, "state_reset='token'"),
        ({"hidden_sizes": [8, 6]}, r"holds .*announces .*\(6, 8\)"),
        ({"features": ["confidence"]}, r"announces .*\(8, 1\)"),
        ({"mdp": "chat"}, "mdp='chat'"),
        ({"normaliser": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "positive std"),
        ({"normaliser": {}}, "malformed.*mean"),
        ({"n_layers": None, "features": 3}, "malformed"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(policy, tmp_path, change, message):
    file = policy.save(tmp_path) / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(LedeError, match=message):
        load_policy(tmp_path)


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "None")])
def test_a_card_that_is_no_card_is_refused(policy, tmp_path, text, message):
    (policy.save(tmp_path) / "policy.json").write_text(text)
    with pytest.raises(LedeError, match=message):
        load_policy(tmp_path)


def test_a_card_without_a_key_is_refused(policy, tmp_path):
    file = policy.save(tmp_path) / "policy.json"
    card = json.loads(file.read_text())
    del card["candidate_layers"]
    file.write_text(json.dumps(card))
    with pytest.raises(LedeError, match=r"malformed.*candidate_layers"):
        load_policy(tmp_path)


def test_weights_that_are_not_finite_are_refused(policy, tmp_path):
    file = policy.save(tmp_path) / "policy.safetensors"
    tensors = load_file(file)
    tensors["layers.1.bias"][2] = np.inf
    save_file(tensors, file)
    with pytest.raises(LedeError, match="not finite"):
        load_policy(tmp_path)


# --- where a policy may run


def test_compatible_policies_pass(policy):
    check_compatible(policy, **HERE)
    check_compatible(policy, **HERE | {"mdp": "draft", "candidate_layers": [2, 4]})  # deployed as in section 3.3
    check_compatible(RandomPolicy(), **HERE)
    check_compatible(StaticPolicy(4, 8), **HERE)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fingerprint": "bad"}, "'toy'.*f00.*bad"),
        ({"candidate_layers": (2, 6)}, r"\(2, 4\).*\(2, 6\)"),
        ({"features": ("confidence", "layer")}, r"'entropy', 'trace'.*missing"),
    ],
)
def test_what_does_not_fit_names_both_sides(policy, change, message):
    with pytest.raises(LedeError, match=message):
        check_compatible(policy, **HERE | change)


def test_rules_are_checked_too(policy):
    with pytest.raises(LedeError, match="'top1'"):
        check_compatible(ThresholdPolicy({2: 0.5}, 8), **HERE)
    with pytest.raises(LedeError, match=r"layer 3.*\(2, 4\)"):
        check_compatible(StaticPolicy(3, 8), **HERE)
    with pytest.raises(LedeError, match=r"draft MDP.*exit MDP"):
        check_compatible(replace(policy, mdp="draft"), **HERE)


def test_parse_policy(policy, tmp_path):
    policy.save(tmp_path)
    assert parse_policy("random", 8, (2, 4)) == RandomPolicy(0.5)
    assert parse_policy("static:4", 8, (2, 4)) == StaticPolicy(4, 8)
    assert parse_policy(str(tmp_path), 8, (2, 4)).model_name == "toy"
    for text in ("static:3", "static:four", "static:"):
        with pytest.raises(LedeError, match=rf"{text}.*\(2, 4\)"):
            parse_policy(text, 8, (2, 4))
    with pytest.raises(LedeError, match=r"'randon'.*static:LAYER"):
        parse_policy("randon", 8, (2, 4))


def test_import_is_cheap():
    code = "import sys, lede_env.policies; print({'torch', 'safetensors', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
