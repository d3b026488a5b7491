"""Every id: what it pins, that it can be made wherever its data is, and what it says where it cannot."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import shutil
import warnings
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode

import lede_env
from lede_env import cli, tracing
from lede_env.data import registry
from lede_env.data.registry import TRACES, load_trace
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import load_cost_model
from lede_env.envs.texts import draw_key, draw_texts
from lede_env.envs.trace_backend import check_prompts
from lede_env.errors import LedeError
from lede_env.evaluation import best_static
from lede_env.models.zoo import MODELS
from lede_env.registration import ENVIRONMENTS, mdp_of, pinned
from lede_env.tasks import load_prompts
from lede_env.tracing import record_trace

TOKENS = 6
PAPER = ("Llama3.2-1B", "Llama2-7B", "Llama2-13B", "CodeLlama-7B", "CodeLlama-34B")
TINY = ["LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"]
REAL = [f"LEDE-{model}{mdp}-v0" for model in PAPER for mdp in ("", "-Draft")]
TWINS = [f"LEDE-{model}-Twin{mdp}-v0" for model in PAPER for mdp in ("", "-Draft")]
MADE_HERE = [(env_id, "live") for env_id in TINY] + [(env_id, "trace") for env_id in (*TINY, *TWINS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A greedy trace of a few prompts of the embedded model, and a cost model for every depth."""
    folder = tmp_path_factory.mktemp("registration")
    prompts = load_prompts("parse", "train")[:3]
    record_trace(tiny, prompts, (3, 4, 6, 8), TOKENS, Sampling(), 0, lanes=1).save(folder / "greedy.h5")
    costs = asdict(load_cost_model("tiny-cpu"))
    for depth in {spec.n_layers for spec in MODELS.values()}:
        (folder / f"{depth}.json").write_text(json.dumps(costs | {"name": "made up", "n_layers": depth}))
    return folder


@pytest.fixture
def arguments(folder):
    """arguments(id, backend) -> what makes a small one here."""

    def make(env_id, backend):
        kwargs = dict(task="parse", max_new_tokens=TOKENS, features="extended", device="cpu")
        if backend == "trace":
            kwargs |= dict(backend="trace", trace=str(folder / "greedy.h5"))
        if env_id in TWINS:  # until their own ship
            kwargs["cost_model"] = str(folder / f"{MODELS[pinned(env_id).model].n_layers}.json")
        return kwargs

    return make


def episode(env, seed, **reset):
    """Everything that an episode under random actions returns."""
    rng, seen, over = np.random.default_rng(seed), [env.reset(seed=seed, **reset)], False
    while not over:
        seen.append(env.step(rng.integers(2)))
        over = seen[-1][2] or seen[-1][3]
    return seen


# --- the table


def test_the_ids_are_those_of_the_design():
    assert set(ENVIRONMENTS) == {*TINY, *REAL, *TWINS} <= gym.registry.keys()
    for env_id, config in ENVIRONMENTS.items():
        spec = gym.spec(env_id)
        assert spec.kwargs == asdict(config) and spec.max_episode_steps is None
        assert tuple(config.candidate_layers) == MODELS[config.model].candidate_layers
        assert (mdp_of(config) == "draft") == ("-Draft" in env_id) == ("rho" in spec.kwargs)
        assert (config.weights == "twin") == ("-Twin" in env_id)
        assert pickle.loads(pickle.dumps(spec)) == spec
        assert EnvSpec.from_json(spec.to_json()).kwargs.keys() == spec.kwargs.keys()
    with pytest.raises(LedeError, match="'LEDE-Giant-v0' is unknown; known ids: LEDE-Tiny-v0"):
        pinned("LEDE-Giant-v0")


def test_the_pinned_fingerprint_is_that_of_the_weights(tiny):
    assert MODELS["tiny"].fingerprint == tiny.fingerprint


# --- every id that can be made here


@pytest.mark.parametrize("checker", ["gymnasium.utils.env_checker", "stable_baselines3.common.env_checker"])
@pytest.mark.parametrize(("env_id", "backend"), MADE_HERE)
def test_check_env_passes_without_warnings(arguments, env_id, backend, checker):
    check_env = importlib.import_module(checker).check_env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, **arguments(env_id, backend)).unwrapped)


@pytest.mark.parametrize(("env_id", "backend"), MADE_HERE)
def test_same_seed_same_play_and_pickling(arguments, env_id, backend):
    env, other = (gym.make(env_id, **arguments(env_id, backend)).unwrapped for _ in range(2))
    first = episode(env, 3)
    np.testing.assert_equal(episode(other, 3), first)
    assert env.attributes["model_name"] == pinned(env_id).model + ("-twin" if env_id in TWINS else "")
    envs = gym.make_vec(env_id, num_envs=2, **arguments(env_id, backend))
    if backend == "live":
        for each in (env, envs.unwrapped):
            with pytest.raises(LedeError, match=r"cannot be pickled.*pickle env.spec and make it again"):
                pickle.dumps(each)
        again = pickle.loads(pickle.dumps(env.spec)).make().unwrapped
        np.testing.assert_equal(episode(again, 3), first)
        return
    again = pickle.loads(pickle.dumps(env))
    rng = np.random.default_rng(0)
    for action in rng.integers(2, size=10):  # goes on where the other stands
        if env._running:
            np.testing.assert_equal(again.step(action), env.step(action))
    np.testing.assert_equal(episode(again, 4), episode(env, 4))
    envs.reset(seed=1)
    copy = pickle.loads(pickle.dumps(envs.unwrapped))
    for _ in range(20):
        actions = rng.integers(2, size=2)
        np.testing.assert_equal(copy.step(actions), envs.step(actions))


@pytest.mark.parametrize(("env_id", "backend"), MADE_HERE)
def test_a_closed_environment_says_so(arguments, env_id, backend):
    env = gym.make(env_id, **arguments(env_id, backend))
    envs = gym.make_vec(env_id, num_envs=2, **arguments(env_id, backend))
    for each, action in ((env, 0), (envs, np.zeros(2, int))):
        each.reset(seed=0)
        each.close()
        each.close()
        for use in (lambda env=each: env.reset(), lambda env=each, action=action: env.step(action)):
            with pytest.raises(LedeError, match=r"this environment is closed; make another by gym\.make"):
                use()


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(("env_id", "backend"), MADE_HERE)
def test_make_vec_in_every_autoreset_mode(arguments, env_id, backend, mode):
    envs = gym.make_vec(env_id, num_envs=3, autoreset_mode=mode, **arguments(env_id, backend))
    assert envs.metadata["autoreset_mode"] is mode
    rng, ends = np.random.default_rng(0), 0
    envs.reset(seed=0)
    for _ in range(40):
        observations, rewards, terminated, truncated, _ = envs.step(rng.integers(2, size=3))
        assert envs.observation_space.contains(observations) and np.isfinite(rewards).all()
        over = terminated | truncated
        ends += over.sum()
        if mode is AutoresetMode.DISABLED and over.any():
            envs.reset(options={"reset_mask": over})
    assert ends


# --- live equals trace


def assert_same_episode(live, trace, seed, prompt_id):
    """Observations to 1e-4, all else exactly. Returns the live one."""
    one, other = (episode(env, seed, options={"prompt_id": prompt_id}) for env in (live, trace))
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine[0], theirs[0], atol=1e-4)
        np.testing.assert_equal(mine[1:], theirs[1:])
    return one


@pytest.mark.parametrize("env_id", TINY)
def test_live_equals_trace(arguments, env_id):
    live, trace = (gym.make(env_id, **arguments(env_id, backend)).unwrapped for backend in ("live", "trace"))
    one, other = dict(live.attributes), dict(trace.attributes)
    for name in ("prompts_digest", "prompt_splits"):
        assert one.pop(name) != other.pop(name)  # the trace has three of them
    assert one == other
    for seed in range(6):
        assert_same_episode(live, trace, seed, trace.prompt_ids[seed % 3])


@pytest.mark.parametrize("env_id", TINY)
def test_live_equals_trace_as_vectors(arguments, env_id):
    live, trace = (
        gym.make_vec(env_id, num_envs=6, autoreset_mode=AutoresetMode.DISABLED, **arguments(env_id, backend))
        for backend in ("live", "trace")
    )
    reset = dict(seed=0, options={"prompt_ids": trace.unwrapped.prompt_ids * 2})
    rng, over = np.random.default_rng(0), np.zeros(6, bool)
    one, other = live.reset(**reset), trace.reset(**reset)
    while not over.all():
        np.testing.assert_allclose(one[0], other[0], atol=1e-4)
        np.testing.assert_equal(one[1:], other[1:])
        actions = rng.integers(2, size=6)
        one, other = live.step(actions), trace.step(actions)
        over |= one[2] | one[3]


def test_live_equals_trace_at_a_temperature(arguments, tiny, tmp_path, monkeypatch):
    """The trace holds the texts of the environment's own seeds, so its draws are those of the live one."""
    keys = np.array([draw_key(np_random(seed)[0]) for seed in range(3)])
    seeds = draw_texts(1, keys, np.zeros(3, np.uint64))[1].tolist()
    monkeypatch.setattr(tracing, "text_seed", lambda seed, prompt_id, sample: seeds[sample])
    prompts = load_prompts("lm", "train")[:2]
    record_trace(tiny, prompts, (3, 4, 6, 8), TOKENS, Sampling(0.6), 0, samples=3, lanes=1).save(tmp_path / "t.h5")
    more = dict(task="lm", temperature=0.6)
    live = gym.make(TINY[0], **arguments(TINY[0], "live") | more).unwrapped
    trace = gym.make(TINY[0], **arguments(TINY[0], "trace") | more | dict(trace=str(tmp_path / "t.h5"))).unwrapped
    texts = set()
    for seed in range(3):
        for prompt in prompts:
            steps = assert_same_episode(live, trace, seed, prompt.id)[1:]
            texts.add((prompt.id, *(step[-1]["target_token"] for step in steps if "target_token" in step[-1])))
    assert len(texts) > 3


# --- traces


@pytest.mark.parametrize("shipped", TRACES.values(), ids=list(TRACES))
def test_shipped_traces(shipped):
    trace, config = lede_env.load_trace(shipped.name), pinned(TINY[0])
    header = trace.header
    assert (header.model_name, header.model_fingerprint) == (shipped.model, MODELS[shipped.model].fingerprint)
    assert (header.temperature, header.top_k, header.top_p) == (shipped.temperature, 0, 1.0)
    assert header.candidate_layers == tuple(config.candidate_layers)
    assert header.max_new_tokens == config.max_new_tokens and header.dtype == "float32"
    prompts = load_prompts("all", "all")
    assert {prompt.id for prompt in prompts} <= set(trace.prompt_ids)
    check_prompts(trace, prompts)
    for env_id in TINY:
        env = gym.make(env_id, backend="trace", temperature=shipped.temperature).unwrapped
        assert env.prompt_ids == [prompt.id for prompt in prompts if prompt.split == "train"]
        env.reset(seed=0)


def test_a_file_is_read_once_and_again_when_it_changes(folder, tmp_path):
    path = tmp_path / "t.h5"
    shutil.copy(folder / "greedy.h5", path)
    first = lede_env.load_trace(path)
    assert lede_env.load_trace(str(path)) is first
    replace(first, header=replace(first.header, command="again, and longer")).save(path)
    second = lede_env.load_trace(path)
    assert second is not first and second.header.command == "again, and longer"
    path.unlink()
    with pytest.raises(LedeError, match=r"t\.h5: no such file; record one .*tiny-greedy-v0"):
        lede_env.load_trace(path)


def test_a_prompt_file_plays_its_prompts_from_a_trace(arguments, tiny, tmp_path):
    row = dict(task="lm", reference="", split="train")
    texts = {"mine/1": "Once upon a time", "mine/0": "The weather"}

    def write(texts):
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps({"id": i, "prompt": text, **row}) + "\n" for i, text in texts.items()))
        return str(path)

    path = write(texts)
    record_trace(tiny, load_prompts(path), (3, 4, 6, 8), TOKENS, Sampling(), 0).save(tmp_path / "t.h5")
    kwargs = arguments(TINY[0], "trace") | dict(trace=str(tmp_path / "t.h5"))
    live = gym.make(TINY[0], **arguments(TINY[0], "live") | dict(task=path)).unwrapped
    env = gym.make(TINY[0], **kwargs | dict(task=path)).unwrapped
    assert env.prompt_ids == list(texts) and env.attributes == live.attributes
    assert gym.make(TINY[0], **kwargs | dict(task="lm")).unwrapped.prompt_ids == list(texts)
    write(texts | {"mine/0": "The climate"})
    with pytest.raises(LedeError, match="'mine/0' has changed since the trace was recorded"):
        gym.make(TINY[0], **kwargs | dict(task=path))
    write(texts | {"mine/2": "More"})
    with pytest.raises(LedeError, match=r"the trace lacks 1 of the 3 prompts asked for \(mine/2\)"):
        gym.make(TINY[0], **kwargs | dict(task=path))


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        (TINY[0], dict(trace="nowhere"), "nowhere: no such file.*tiny-greedy-v0, tiny-t0.6-v0"),
        (TINY[0], dict(trace=3), "trace=3 must be the name of a trace or the path of a file"),
        (TINY[0], dict(trace=None, temperature=0.3), r"at temperature 0.3, and none ships; there are: tiny-greedy-v0"),
        (TINY[0], dict(temperature=0.6), r"recorded with Sampling\(temperature=0.0.*not Sampling\(temperature=0.6"),
        (TINY[1], dict(max_new_tokens=7), "max_new_tokens=7, but the trace's texts have 6"),
        (TINY[0], dict(candidate_layers=(4, 8)), r"the trace holds candidate layers \(3, 4, 6, 8\), not \(4, 8\)"),
        (TINY[0], dict(candidate_layers=4), "candidate_layers=4 must list whole numbers"),
        (TINY[1], dict(dtype="bfloat16"), "dtype='bfloat16', but the trace was recorded in float32"),
        (TINY[0], dict(task="poetry"), "unknown task 'poetry'"),
        (TINY[0], dict(device="tpu"), "device='tpu' is unknown"),
        (TINY[0], dict(split="test"), "no prompts of task 'parse' in split 'test'; it has: parse train"),
        (TINY[0], dict(weights="twin"), "weights='twin' needs one of the paper's models.*not 'tiny'"),
        (TINY[0], dict(weights="/models"), "weights='/models' is unknown.*model=FOLDER"),
        (REAL[2], dict(), "recorded from 'tiny', of 16 layers and 4096 tokens, but llama2-7b has 32 and 32000"),
        (REAL[2], dict(trace=None), "needs a trace of 'llama2-7b' at temperature 0, and none ships"),
        # Not even four others in order: their signals would be those of (6, 8, 12, 16), which live ones are not.
        *(
            (TWINS[2], dict(candidate_layers=layers), r"the layers \(3, 4, 6, 8\) of the trace sit at \(6, 8, 12, 16\)")
            for layers in ((6, 8), (6, 8, 12, 32), (1, 2, 3, 4))
        ),
    ],
)
def test_bad_arguments_of_a_trace(arguments, env_id, kwargs, message):
    for make in (gym.make, gym.make_vec):
        with pytest.raises(LedeError, match=message):
            make(env_id, **arguments(env_id, "trace") | kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("env_id", [*TINY, TWINS[0]])
def test_an_absent_gpu_is_refused_on_a_trace_too(arguments, env_id):
    for make in (gym.make, gym.make_vec):
        with pytest.raises(LedeError, match=r"device='cuda' was asked for, but torch .* sees 0 CUDA devices"):
            make(env_id, **arguments(env_id, "trace") | dict(device="cuda"))


def test_a_trace_of_other_weights_is_refused(arguments, folder, tmp_path):
    trace = lede_env.load_trace(folder / "greedy.h5")
    path = tmp_path / "t.h5"
    replace(trace, header=replace(trace.header, model_fingerprint="0" * 16, model_name="other")).save(path)
    for env_id in (TINY[0], TWINS[0]):
        with pytest.raises(LedeError, match=r"recorded from 'other'.*but 'tiny' has fingerprint"):
            gym.make(env_id, **arguments(env_id, "trace") | dict(trace=str(path)))


# --- what cannot be made here


@pytest.mark.parametrize("env_id", REAL)
def test_without_weights_one_message_says_what_to_do(monkeypatch, env_id):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = MODELS[pinned(env_id).model]
    for make in (gym.make, gym.make_vec):
        with pytest.raises(LedeError) as raised:
            make(env_id)
        twin = f"{env_id.removesuffix('-v0').removesuffix('-Draft')}-Twin"
        for part in (spec.hub_id, spec.licence, spec.licence_page, "load_model(FOLDER)", "model=FOLDER", f"{twin}-v0",
                     f"{twin}-Draft-v0", "backend='trace'", "trace=NAME"):  # fmt: skip
            assert part in str(raised.value)
    with pytest.raises(LedeError, match="device='tpu'"):
        gym.make(env_id, device="tpu")


# --- the command line


def lede(monkeypatch, capfd, command):
    """Output of a command that works, or the error of one that does not."""
    monkeypatch.setattr("sys.argv", ["lede", *command.split()])
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            return capfd.readouterr().err
    return capfd.readouterr().out


def test_lede_envs(monkeypatch, capfd):
    rows = json.loads(lede(monkeypatch, capfd, "envs --json"))
    assert [row["id"] for row in rows] == list(ENVIRONMENTS)
    for row in rows:
        found = {"id", "mdp", "weights_from", "traces", "J_random", "J_oracle", "reward_threshold"}
        assert asdict(pinned(row["id"])).keys() | found == row.keys()
        expected = {"wheel"} if row["id"] in TINY else {"twin"} if row["id"] in TWINS else {"hub", "cache"}
        assert row["weights_from"] in expected
        assert row["traces"] == ([] if row["id"] in REAL else [n for n, t in TRACES.items() if t.path.is_file()])
        returns = [row[name] for name in ("J_random", "reward_threshold", "J_oracle") if row[name] is not None]
        assert len(returns) == (0 if row["id"] in REAL else 3)
        assert returns == sorted(set(returns))
    table = lede(monkeypatch, capfd, "envs")
    assert all(env_id in table for env_id in ENVIRONMENTS) and "all / train" in table
    for shown in (r"LEDE-Tiny-Draft-v0 .* 117 150 172 ", r"LEDE-Llama2-7B-v0 .* - +- +- "):
        assert re.search(shown, table)
    assert max(map(len, table.splitlines())) <= 80


def test_lede_record_trace(monkeypatch, capfd, tmp_path):
    path = tmp_path / "new" / "t.h5"
    command = f"record --env {TINY[1]} --trace --out {path} --task parse --split test --max-new-tokens 4 --device cpu"
    sampled = f"{command} --temperature 0.6 --samples 2 --seed 3"
    said = " ".join(lede(monkeypatch, capfd, sampled).split())
    trace, prompts = lede_env.load_trace(path), load_prompts("parse", "test")
    assert f"{len(prompts)} prompts x 2, {len(trace.targets)} positions" in said
    assert trace.prompt_ids == tuple(prompt.id for prompt in prompts)
    assert (trace.header.samples, trace.header.seed, trace.header.temperature) == (2, 3, 0.6)
    assert trace.header.max_new_tokens == 4 and trace.header.command == f"lede {sampled}"
    assert "exists; pass --force to replace it" in lede(monkeypatch, capfd, command)
    assert lede_env.load_trace(path) is trace
    row = dict(id="p/0", task="lm", prompt="Once upon", reference="", split="test")
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    command = f"record --env {TINY[0]} --trace --out {path} --max-new-tokens 4"
    lede(monkeypatch, capfd, f"{command} --prompts {tmp_path / 'p.jsonl'} --force")
    assert lede_env.load_trace(path).prompt_ids == ("p/0",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (f"--env {TINY[0]}", "needs --policy and --episodes, or --trace"),
        (f"--env {TINY[0]} --trace --policy random", "leave out --policy"),
        (f"--env {TINY[0]} --policy random --episodes 1 --force", "--force and --samples are for --trace"),
        (f"--env {TINY[0]} --trace --task lm --prompts p.jsonl", "give one of them"),
        (f"--env {TINY[0]} --trace --samples 2 --task parse", "samples=2 at temperature 0"),
        (f"--env {TWINS[0]} --trace", "a twin plays the embedded model's trace"),
        ("--env LEDE-Giant-v0 --trace", "'LEDE-Giant-v0' is unknown"),
    ],
)
def test_bad_commands(monkeypatch, capfd, tmp_path, options, says):
    assert says in lede(monkeypatch, capfd, f"record {options} --out {tmp_path / 'x.h5'}")
    assert not (tmp_path / "x.h5").exists()


def test_default_traces_are_listed():
    assert [registry.default_trace("tiny", t) for t in (0, 0.0, 0.6)] == [*["tiny-greedy-v0"] * 2, "tiny-t0.6-v0"]
    for name in TRACES:
        assert TRACES[name].path.name == f"{name}.h5"


@pytest.mark.parametrize("env_id", [name for name in ENVIRONMENTS if "Draft" in name and "Twin" not in name])
def test_rho_is_the_best_static_rate_on_the_training_prompts(env_id):
    config, trace = ENVIRONMENTS[env_id], load_trace("tiny-greedy-v0")
    place = {prompt: index for index, prompt in enumerate(trace.prompt_ids)}
    texts = [place[prompt] for prompt in trace.prompts_of("all", "train")]
    rows = [slice(trace.starts[t], min(trace.starts[t + 1], trace.starts[t] + config.max_new_tokens)) for t in texts]
    accepted = {
        layer: [trace.accepted[part, column] for part in rows] for column, layer in enumerate(config.candidate_layers)
    }
    best, _ = best_static(accepted, load_cost_model(config.cost_model))
    assert config.rho == pytest.approx(best.speedup, abs=1e-3)
