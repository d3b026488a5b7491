"""Tensors in and out: the same steps as with arrays, and none of them by way of the host."""

from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch._subclasses.fake_tensor import FakeTensorMode

import lede_env
from lede_env.data.trace_file import load_trace
from lede_env.engine.acceptance import derive_seed, derive_seeds, mix_seeds
from lede_env.envs.texts import draw_text_tensors, draw_texts
from lede_env.errors import LedeError
from tests.small_traces import small_traces

IDS = EXIT_ID, DRAFT_ID = "LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"
LANES = 24
TINY = dict(backend="trace", task="parse", max_new_tokens=6)
FINAL = ("final_obs", "final_info")
THROUGHPUT = dict(reward="throughput", rho=1.5)

CASES = {
    "exit": (EXIT_ID, {}),
    "exit, extended, token": (EXIT_ID, dict(features="extended", episode="token")),
    "exit, tuple, constants": (EXIT_ID, dict(features=("echo", "layer"), reward_kwargs=dict(accept=0.3, reject=-0.7))),
    "draft": (DRAFT_ID, dict(features="paper")),
    "draft, extended, round": (DRAFT_ID, dict(features="extended", episode="round", cap=4)),
    "draft, tuple, throughput": (DRAFT_ID, dict(features=("peril", "entropy", "drawn"), **THROUGHPUT)),
    "draft, throughput, round": (
        DRAFT_ID,
        dict(features=("position", "doubt"), episode="round", **THROUGHPUT),
    ),
}
on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def small(random_model, tmp_path_factory):
    """Traces in which texts end by an EOS too, of three samples a prompt where they are sampled."""
    return small_traces(random_model, tmp_path_factory.mktemp("small"))


def both(env_id, device="cpu", num_envs=LANES, **made):
    """The same environments with tensors and with arrays, of the same keys until they are seeded."""
    arrays, inner = (gym.make_vec(env_id, num_envs=num_envs, **made) for _ in range(2))
    inner._keys[:] = arrays._keys
    return lede_env.TensorVectorEnv(inner, device), arrays


def assert_same_array(tensor, array, device):
    assert tensor.device.type == device
    found = tensor.cpu().numpy()
    assert found.dtype == array.dtype and found.shape == array.shape
    np.testing.assert_array_equal(found, array)
    assert found.tobytes() == array.tobytes()  # zeros of the same sign, too


def assert_same_info(tensors, arrays, envs, ended):
    """Every field. `ended`: where an episode did, (N,); of the others `final_` rows do not count."""
    names = {"prompt_id": "prompt", "_prompt_id": "_prompt"}
    final = {*FINAL, *(f"_{key}" for key in FINAL)}
    assert tensors.keys() - final == {names.get(key, key) for key in arrays.keys() - final}
    for key, value in arrays.items():
        own = tensors[names.get(key, key)]
        if isinstance(value, dict):
            assert_same_info(own, value, envs, ended)
        elif key == "prompt_id":
            assert [envs.prompt_ids[index] for index in own.tolist()] == value.tolist()
        elif key == "final_obs":
            assert_same_array(own[ended], value[ended.cpu().numpy()], envs.device.type)
        else:
            assert_same_array(own, value, envs.device.type)


def assert_same_step(tensors, arrays, envs):
    observations, rewards, terminated, truncated, info = tensors
    ended = terminated | truncated
    for own, array in zip((observations, terminated, truncated), (arrays[0], *arrays[2:4]), strict=True):
        assert_same_array(own, array, envs.device.type)
    assert_same_array(rewards, arrays[1].astype(np.float32), envs.device.type)
    assert_same_info(info, arrays[4], envs, ended)
    if envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP:
        assert (info["_final_obs"] == ended).all() and (info["_final_info"] == ended).all()
    return ended


def assert_same_reset(tensors, arrays, envs):
    assert_same_array(tensors[0], arrays[0], envs.device.type)
    assert_same_info(tensors[1], arrays[1], envs, None)


def play(tensors, arrays, steps, seed=0, exits=0.5):
    """Random actions on both: how many episodes ended, and how many by an EOS or as a part."""
    rng, over, terminated = np.random.default_rng(seed), 0, 0
    for _ in range(steps):
        actions = (rng.random(arrays.num_envs) < exits).astype(np.int64)
        step = tensors.step(torch.tensor(actions, device=tensors.device))
        over += int(assert_same_step(step, arrays.step(actions), tensors).sum())
        terminated += int(step[2].sum())
    return over, terminated


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("recorded", ["greedy", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_arrays(small, case, recorded, device):
    env_id, kwargs = CASES[case]
    tensors, arrays = both(env_id, device, **(getattr(small, recorded) | kwargs))
    assert_same_reset(tensors.reset(seed=3), arrays.reset(seed=3), tensors)
    over, terminated = play(tensors, arrays, 150, exits=0.6)
    assert over > 2 * LANES and terminated > LANES / 2


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("env_id", IDS)
def test_steps_on_the_traces_that_ship(env_id, temperature, device):
    tensors, arrays = both(env_id, device, temperature=temperature, features="extended", **TINY)
    assert_same_reset(tensors.reset(seed=0), arrays.reset(seed=0), tensors)
    over, _ = play(tensors, arrays, 60)
    assert over > 2 * LANES


def test_plain_steps_that_emit_an_eos(small):
    """Where the last token of a budget is an EOS, and left alone."""
    trace = load_trace(small.sampled["trace"])
    lengths = np.diff(trace.starts)
    (tokens, *_) = sorted(lengths[trace.ends[trace.starts[1:] - 1] & (lengths > 2)].tolist())
    tensors, arrays = both(DRAFT_ID, **(small.sampled | dict(max_new_tokens=tokens)))
    tensors.reset(seed=0), arrays.reset(seed=0)
    rng, found = np.random.default_rng(1), 0
    for _ in range(150):
        actions = rng.integers(2, size=LANES)
        own, step = tensors.step(torch.tensor(actions)), arrays.step(actions)
        assert_same_step(own, step, tensors)
        found += int((step[2] & (step[4]["rounds"] == 2)).sum())
    assert found


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
@pytest.mark.parametrize("case", ["exit", "exit, extended, token", "draft", "draft, extended, round"])
def test_other_modes_of_autoreset(small, case, mode):
    env_id, kwargs = CASES[case]
    tensors, arrays = both(env_id, autoreset_mode=AutoresetMode(mode), **(small.sampled | kwargs))
    assert_same_reset(tensors.reset(seed=1), arrays.reset(seed=1), tensors)
    over, _ = play(tensors, arrays, 100, exits=0.7)
    assert over


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("case", ["exit, extended, token", "draft, extended, round"])
def test_resets_of_some_with_prompts_and_seeds(small, case, mode):
    env_id, kwargs = CASES[case]
    tensors, arrays = both(env_id, autoreset_mode=AutoresetMode(mode), **(small.sampled | kwargs))
    rng = np.random.default_rng(5)
    for turn in range(6):  # the first leaves some that were never reset
        mask = rng.random(LANES) < 0.5
        seeds = [int(rng.integers(100)) if rng.random() < 0.4 else None for _ in range(LANES)]
        names = [rng.choice(["p0", "p3", "p5"]) if rng.random() < 0.3 else None for _ in range(LANES)]
        options = {"reset_mask": mask, "prompt_ids": names}
        same = arrays.reset(seed=seeds, options=options)
        own = tensors.reset(seed=seeds, options=options | {"reset_mask": torch.tensor(mask)})
        assert_same_info(own[1], same[1], tensors, None)
        assert_same_array(own[0], same[0], "cpu")
        play(tensors, arrays, 15, seed=turn)


@pytest.mark.parametrize("env_id", IDS)
def test_unseeded_resets_go_on_with_the_key(env_id):
    tensors, arrays = both(env_id, **TINY)
    for seed in (4, None, None):
        assert_same_reset(tensors.reset(seed=seed), arrays.reset(seed=seed), tensors)
        play(tensors, arrays, 8)


def test_the_hash_is_that_of_the_arrays():
    rng = np.random.default_rng(0)
    extremes = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    keys = np.concatenate([extremes, rng.integers(2**64, size=2000, dtype=np.uint64)])
    counts = np.concatenate([extremes[::-1], rng.integers(2**20, size=2000, dtype=np.uint64)])
    signed = mix_seeds(torch.tensor(keys.view(np.int64))), torch.tensor(counts.view(np.int64))
    np.testing.assert_array_equal(derive_seeds(*signed).numpy().view(np.uint64), derive_seed(keys, counts))
    assert int(derive_seeds(*signed)[7]) % 2**64 == derive_seed(int(keys[7]), int(counts[7]))
    for n in (1, 7, 3000):
        for own, array in zip(draw_text_tensors(n, *signed), draw_texts(n, keys, counts), strict=True):
            np.testing.assert_array_equal(own.numpy(), array)


@pytest.mark.parametrize("recorded", ["greedy", "sampled"])
def test_samples_are_chosen_as_by_the_trace(small, recorded):
    tensors, arrays = both(EXIT_ID, **getattr(small, recorded))
    table, rng = arrays._table, np.random.default_rng(0)
    prompts = rng.integers(len(arrays.prompt_ids), size=300)
    seeds = rng.integers(2**63, size=300)
    own = table.trace.text_seeds.reshape(-1, table.trace.header.samples)[prompts]
    seeds[:150] = own[:150, -1]  # those that one was recorded with
    texts = tensors._texts._texts(torch.tensor(prompts), torch.tensor(seeds)).numpy()
    np.testing.assert_array_equal(texts, table.texts(prompts, seeds))


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_looks_at_a_value(small, case, mode):
    """Fake tensors have shapes and no values: whoever asks for one, and be it for a shape, raises."""
    env_id, kwargs = CASES[case]
    made = small.sampled | kwargs | dict(autoreset_mode=AutoresetMode(mode))
    with FakeTensorMode():
        envs, _ = both(env_id, **made)
        envs.reset(seed=0)
        actions = torch.zeros(LANES, dtype=torch.int64)
        for _ in range(3):
            observations, rewards, terminated, _, infos = envs.step(actions)
        assert observations.shape == envs.observation_space.shape and rewards.shape == terminated.shape == (LANES,)
        with pytest.raises(RuntimeError):
            infos["prompt"].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_gpu(small, case, mode):
    env_id, kwargs = CASES[case]
    envs, _ = both(env_id, "cuda", **(small.sampled | kwargs | dict(autoreset_mode=AutoresetMode(mode))))
    envs.reset(seed=0)
    actions = torch.ones(LANES, dtype=torch.int64, device=envs.device)
    envs.step(actions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            envs.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_was_returned_is_not_written_again():
    envs, _ = both(DRAFT_ID, **TINY)
    kept = [*envs.reset(seed=0)]
    copies = kept[0].clone(), {key: value.clone() for key, value in kept[1].items() if isinstance(value, torch.Tensor)}
    for _ in range(20):
        envs.step(torch.ones(LANES, dtype=torch.int64))
    assert (kept[0] == copies[0]).all() and all((kept[1][key] == value).all() for key, value in copies[1].items())


def test_booleans_are_actions_and_other_numbers_continue():
    first, second = (both(EXIT_ID, num_envs=4, **TINY)[0] for _ in range(2))
    for envs in (first, second):
        envs.reset(seed=0)
    for _ in range(10):
        one = first.step(torch.tensor([True, False, False, True]))
        other = second.step(torch.tensor([1, 0, 7, 1], dtype=torch.uint8))
        assert (one[0] == other[0]).all() and (one[1] == other[1]).all()


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.zeros(4, np.int64), ("actions must be a tensor on cpu", "torch.tensor")),
        (torch.zeros(4), ("torch.float32", "whole type", "(4,)")),
        (torch.zeros(4, 1, dtype=torch.int64), ("got (4, 1)", "shape (4,)", "one action an environment")),
        (torch.zeros(4, dtype=torch.int64, device="meta"), ("on meta", "on cpu", ".to('cpu')")),
    ],
)
def test_actions_of_another_form_are_refused(actions, words):
    envs, _ = both(EXIT_ID, num_envs=4, **TINY)
    envs.reset(seed=0)
    with pytest.raises(LedeError) as raised:
        envs.step(actions)
    assert all(word in str(raised.value) for word in words)


def test_steps_out_of_turn_are_refused():
    envs, _ = both(EXIT_ID, num_envs=4, **TINY)
    actions = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(LedeError, match=re.escape("step() before reset(); call reset() first")):
        envs.step(actions)
    unknown = "does not know the option"
    for wrong, word in (
        (dict(seed=[1, 2]), "seed lists 2"),
        (dict(options={"prompt": 1}), unknown),
        (dict(options=["prompt"]), unknown),
    ):
        with pytest.raises(LedeError, match=word):
            envs.reset(**wrong)
    envs.reset(seed=0)
    envs.close()
    for call in (lambda: envs.step(actions), envs.reset):
        with pytest.raises(LedeError, match="this environment is closed"):
            call()


def test_what_plays_no_trace_is_refused():
    inner = gym.make_vec(EXIT_ID, num_envs=2, **TINY)
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(inner)
    for envs in (gym.make_vec("CartPole-v1", num_envs=2), gym.make_vec(EXIT_ID, num_envs=2, device="cpu"), wrapped):
        with pytest.raises(LedeError, match="plays recorded traces on the device") as raised:
            lede_env.TensorVectorEnv(envs, "cpu")
        assert 'backend="trace"' in str(raised.value) and "torch.as_tensor" in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_refused():
    with pytest.raises(LedeError, match="device='cuda' was asked for"):
        lede_env.TensorVectorEnv(gym.make_vec("LEDE-Tiny-v0", num_envs=2, backend="trace"), "cuda")
