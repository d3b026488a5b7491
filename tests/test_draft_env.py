"""The draft environments, against the decoder itself, and the trace against the live model."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList

import lede_env
from lede_env.data.trace_file import load_trace, text_digest
from lede_env.engine.acceptance import Sampling
from lede_env.engine.acceptance_head import AcceptanceHead
from lede_env.engine.cost_model import load_cost_model
from lede_env.engine.signals import HEAD_FEATURES, KNOWN_FEATURES
from lede_env.envs import source, trace_backend
from lede_env.envs.texts import draw_key, draw_texts
from lede_env.errors import LedeError
from lede_env.outlooks import with_outlook
from lede_env.tasks import Prompt, load_prompts
from lede_env.tracing import record_trace
from tests.small_models import CoinPolicy

ROUND_KEYS = {"exit_layer", "drafted", "accepted", "emitted", "rounds"}
ACTION_KEYS = {"cost", "discount", "reward_terms", *ROUND_KEYS}
FEATURES = KNOWN_FEATURES["draft"]
TOKENS = 24
RHO = 1.3


def spec(**kwargs):
    return EnvSpec(
        id="Test-Draft-v0",
        entry_point="lede_env.envs.draft_env:SpeculativeDraftEnv",
        vector_entry_point="lede_env.envs.draft_vector_env:SpeculativeDraftVectorEnv",
        kwargs=dict(features=FEATURES, reward="throughput", rho=RHO, max_new_tokens=TOKENS, device="cpu") | kwargs,
        disable_env_checker=True,
        order_enforce=False,
    )


def make(**kwargs):
    return gym.make(spec(**kwargs)).unwrapped


def make_vec(num_envs, **kwargs):
    mode = kwargs.pop("autoreset_mode", None)
    more = {} if mode is None else {"autoreset_mode": mode}
    return gym.make_vec(spec(**kwargs), num_envs=num_envs, **more)


class Small:
    """A random model made to accept drafts, prompts of which four end by an EOS and two go on, and its environments."""

    def __init__(self, lm, folder):
        self.lm, self.folder = lm, folder
        ids = [5], [7, 11, 13, 17], [19, 3, 23, 29, 31], [50], [60, 61, 62], [70, 8]
        self.prompts = [Prompt(f"p{n}", "lm", each, "", "train") for n, each in enumerate(ids)]
        costs = asdict(load_cost_model("tiny-cpu")) | {"name": "small", "n_layers": lm.n_layers}
        (folder / "small.json").write_text(json.dumps(costs))
        self.costs = load_cost_model(str(folder / "small.json"))

    def kwargs(self, **kwargs):
        pinned = dict(model="small", candidate_layers=self.lm.candidate_layers, task="lm", dtype="float64")
        return pinned | dict(cost_model=str(self.folder / "small.json")) | kwargs

    def traced(self, **kwargs):
        """The same environment, from a greedy trace."""
        path = self.folder / "greedy.h5"
        if not path.exists():
            self.record(path, self.prompts, TOKENS, Sampling())
        return self.kwargs(backend="trace", trace=str(path), **kwargs)

    def record(self, path, prompts, max_new_tokens, sampling, **kwargs):
        """`record_trace` wants texts, and this model has no tokenizer: the text of a prompt is its ids, written out."""
        lm = replace(self.lm)
        object.__setattr__(lm, "encode", json.loads)
        written = [replace(prompt, text=str(prompt.text)) for prompt in prompts]
        trace = record_trace(lm, written, lm.candidate_layers, max_new_tokens, sampling, 0, **kwargs)
        with_outlook(trace, lm, written).save(path)


@pytest.fixture
def small(small_setup, monkeypatch):
    monkeypatch.setattr(source, "load_model", lambda *_, **__: small_setup.lm)
    monkeypatch.setattr(
        source,
        "load_prompts",
        lambda task, split: small_setup.prompts if task == "lm" else load_prompts(task, split),
    )
    for module in (source, trace_backend):
        monkeypatch.setattr(module, "text_digest", lambda ids: text_digest(str(ids)))
    return small_setup


@pytest.fixture(scope="module")
def small_setup(random_model, tmp_path_factory):
    lm, _ = random_model("llama-gqa", late_scale=0.12, early=1)
    # Nine ends of a text, so that some texts have one and some have not, in drafts and after them.
    lm = replace(lm, eos_ids=tuple(range(40, 49)), candidate_layers=(1, 2, 4))
    return Small(replace(lm, acceptance_head=AcceptanceHead.random(lm)), tmp_path_factory.mktemp("small"))


def walk(env, policy, **reset):
    """One episode: a namespace a step."""
    observation, info = env.reset(**reset)
    steps, over = [], False
    columns = [env.features.index(name) for name in policy.features]
    while not over:
        action = int(policy.exit_probability(observation[None, columns])[0])
        following, reward, terminated, truncated, next_info = env.step(action)
        values = dict(reward=reward, terminated=terminated, truncated=truncated, info=next_info)
        steps.append(SimpleNamespace(observation=observation, before=info, action=action, next=following, **values))
        observation, info, over = following, next_info, terminated or truncated
    return steps


def totals(steps):
    """Sums of the verified rounds over an episode."""
    rounds = [step.info for step in steps if "drafted" in step.info]
    sums = {key: sum(info[key] for info in rounds) for key in ("rounds", "drafted", "accepted", "emitted")}
    return sums | {"exit_layers": sum(info["exit_layer"] * info["drafted"] for info in rounds)}


class Watched:
    """A policy that notes what it sees."""

    features = FEATURES

    def __init__(self, seed, p):
        self.coin, self.seen = CoinPolicy(seed, p), []

    def exit_probability(self, observations):
        self.seen += list(observations)
        return self.coin.exit_probability(observations)


class Fixed:
    """Exits at layer e of L and drafts d tokens."""

    features = ("layer", "phase", "position")

    def __init__(self, e, d, n_layers, cap=12):
        self.e, self.d, self.n_layers, self.cap = e, d, n_layers, cap

    def exit_probability(self, observations):
        layer, phase, position = observations.T
        return np.where(phase == 1, layer * self.n_layers > self.e - 0.5, position * self.cap + 1.5 < self.d) * 1.0


# --- the decoder


@pytest.mark.parametrize(("temperature", "episodes"), [(0.0, 24), (0.8, 96)])
def test_the_decoder_plays_the_same_episode(small, temperature, episodes):
    """Every observation, every count, every cost, of live episodes with ends of all kinds."""
    env = make(**small.kwargs(temperature=temperature))
    ended, full = set(), 0
    for seed in range(episodes):
        name, p = f"p{seed % 6}", (0.4, 0.7, 0.95, 0.99)[seed % 4]
        here, there = Watched(seed, p), Watched(seed, p)
        steps = walk(env, here, seed=seed, options={"prompt_id": name})
        _, draw_seed = draw_texts(6, np.array([draw_key(np_random(seed)[0])]), np.zeros(1, np.uint64))
        prompt = small.prompts[seed % 6].text
        out = lede_env.generate(
            small.lm,
            prompt,
            strategy=lede_env.Lede(there),
            max_new_tokens=TOKENS,
            temperature=temperature,
            seed=int(draw_seed[0]),
        )
        # The acceptance head is asked by torch here, by numpy there: sums of float32 in another order.
        of_head = np.isin(Watched.features, HEAD_FEATURES)
        seen, expected = np.array(here.seen), np.array(there.seen)
        np.testing.assert_allclose(seen[:, of_head], expected[:, of_head], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen[:, ~of_head], expected[:, ~of_head], rtol=1e-5, atol=1e-6)
        assert totals(steps) == {key: getattr(out.counts, key) for key in totals(steps)}
        verified = [step for step in steps if "drafted" in step.info]
        rounds = list(out.rounds)
        for step in verified:
            info, round_ = step.info, rounds.pop(0)
            assert round_.exits == [info["exit_layer"]] * info["drafted"]
            cost, emitted = small.costs.of(round_), len(round_.emitted)
            if info["rounds"] == 2:
                plain = rounds.pop(0)
                assert not plain.drafts and step is steps[-1]
                cost, emitted = cost + small.costs.of(plain), emitted + 1
            assert (info["accepted"], info["emitted"]) == (round_.accepted, emitted)
            assert info["cost"] == pytest.approx(cost, rel=1e-12)
            assert step.reward == pytest.approx(emitted - RHO * cost) and info["discount"] == 0.0
            full += info["accepted"] == info["drafted"] > 1
        assert not rounds and out.counts.decisions == len(steps)
        assert (steps[-1].terminated, steps[-1].truncated) == (
            out.finish_reason == "eos",
            out.finish_reason == "length",
        )
        ended.add((out.finish_reason, steps[-1].info["rounds"]))
    assert {reason for reason, _ in ended} == {"eos", "length"} and {rounds for _, rounds in ended} == {1, 2}
    assert full  # rounds whose drafts were all accepted


def test_fixed_policies_reproduce_layerskip(small):
    envs = make(**small.kwargs()), make(**small.traced())
    for e in small.lm.candidate_layers:
        for d in (2, 3, 12):
            for prompt in small.prompts:
                out = lede_env.generate(small.lm, prompt.text, strategy=lede_env.LayerSkip(e, d), max_new_tokens=TOKENS)
                for env in envs:
                    sums = totals(walk(env, Fixed(e, d, small.lm.n_layers), options={"prompt_id": prompt.id}))
                    assert sums == {key: getattr(out.counts, key) for key in sums}, (env, e, d, prompt)


def test_the_embedded_model(tiny, tmp_path):
    """Decoder, live and trace on the model that ships, briefly."""
    layers, prompts = (3, 6), load_prompts("parse", "train")[:2]
    with_outlook(record_trace(tiny, prompts, layers, 16, Sampling(), 0, lanes=2), tiny, prompts).save(tmp_path / "t.h5")
    kwargs = dict(model="tiny", candidate_layers=layers, cost_model="tiny-cpu", task="parse", max_new_tokens=16)
    live, trace = make(**kwargs), make(backend="trace", trace=str(tmp_path / "t.h5"), **kwargs)
    for prompt in prompts:
        options = {"prompt_id": prompt.id}
        out = lede_env.generate(tiny, prompt.text, strategy=lede_env.LayerSkip(6, 4), max_new_tokens=16)
        for env in (live, trace):
            sums = totals(walk(env, Fixed(6, 4, 16), options=options))
            assert sums == {key: getattr(out.counts, key) for key in sums}
        for seed in range(3):
            pairs = zip(*(walk(env, CoinPolicy(seed, 0.7), options=options) for env in (live, trace)), strict=True)
            for mine, other in pairs:
                assert_same(mine, other)
    assert live.attributes["model_fingerprint"] == trace.attributes["model_fingerprint"]


# --- the trace


def assert_same(mine, other):
    np.testing.assert_allclose(mine.observation, other.observation, atol=1e-4)
    np.testing.assert_allclose(mine.next, other.next, atol=1e-4)
    assert (mine.reward, mine.terminated, mine.truncated) == (other.reward, other.terminated, other.truncated)
    assert mine.before == other.before and mine.info == other.info


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(reward="paper", features="paper", episode="round"),
        dict(cap=3, max_new_tokens=17),
        dict(cap=1, max_new_tokens=2),
    ],
)
def test_trace_equals_live(small, kwargs):
    live, trace = make(**small.kwargs(**kwargs)), make(**small.traced(**kwargs))
    assert live.attributes == trace.attributes
    for seed in range(40):
        reset = {} if "episode" in kwargs and seed % 8 else {"options": {"prompt_id": f"p{seed % 6}"}}
        live.reset(seed=seed), trace.reset(seed=seed)
        runs = [walk(env, CoinPolicy(seed, (0.3, 0.6, 0.9, 0.99)[seed % 4]), **reset) for env in (live, trace)]
        for mine, other in zip(*runs, strict=True):
            assert_same(mine, other)


def test_trace_agrees_with_live_in_distribution(small, tmp_path):
    """At a temperature: the mean tokens of a first round that drafts three, from each layer."""
    lanes, kwargs = 100, dict(temperature=0.8, max_new_tokens=5, episode="round")
    small.record(tmp_path / "t.h5", small.prompts[:1], 5, Sampling(0.8), samples=lanes, lanes=lanes)
    live = make_vec(lanes, autoreset_mode=AutoresetMode.DISABLED, **small.kwargs(**kwargs))
    more = dict(backend="trace", trace=str(tmp_path / "t.h5"))
    trace = make_vec(lanes, autoreset_mode=AutoresetMode.DISABLED, **small.kwargs(**kwargs, **more))
    trace._table.texts = lambda prompts, seeds: np.arange(lanes)  # every sample once
    for e in small.lm.candidate_layers:
        policy = Fixed(e, 3, small.lm.n_layers)
        (p, p_error), (q, q_error) = (first_round(envs, policy) for envs in (live, trace))
        assert abs(p - q) < 4 * (p_error**2 + q_error**2) ** 0.5 and 1 < p < 4


def first_round(envs, policy):
    """Mean and standard error of the tokens that the first round of prompt p0 emits."""
    columns = [envs.features.index(name) for name in policy.features]
    observations, _ = envs.reset(seed=0, options={"prompt_ids": ["p0"] * envs.num_envs})
    emitted = np.zeros(envs.num_envs, int)
    while not emitted.all():
        observations, *_, infos = envs.step(policy.exit_probability(observations[:, columns]).astype(int))
        emitted = np.where(infos["_emitted"], infos["emitted"], emitted)
    return emitted.mean(), emitted.std() / len(emitted) ** 0.5


# --- what a step returns


def test_rewards_and_infos_follow_the_documented_rules(small):
    env = make(**small.traced(reward="paper", reward_kwargs={"reject": -2.0}))
    layers, n_layers = small.lm.candidate_layers, small.lm.n_layers
    for seed in range(30):
        steps = walk(env, CoinPolicy(seed, 0.7), seed=seed)
        token, column, drafts, continues = 0, 0, 0, 0
        for step in steps:
            before = step.before
            assert (before["token_index"], before["layer"]) == (token, layers[column])
            assert (before["phase"], before["drafts"]) == (2 if drafts else 1, drafts)
            np.testing.assert_allclose(
                step.observation[[3, 8, 9]], [before["layer"] / n_layers, before["phase"], drafts / 12], rtol=1e-6
            )
            assert step.observation in env.observation_space and type(step.reward) is float
            continues += step.action == 0 and not drafts
            if "drafted" not in step.info:
                zeros = dict.fromkeys(("accepted", "rejected", "continue"), 0.0)
                assert not ROUND_KEYS & step.info.keys()  # nothing leaks before verification
                assert (step.reward, step.info["cost"], step.info["discount"]) == (0.0, 0.0, 1.0)
                assert step.info["reward_terms"] == zeros
                drafts += step.action
                column += not step.action
                continue
            info = step.info
            share = 2 - info["exit_layer"] / n_layers
            terms = [share * info["accepted"], -2.0 * (info["drafted"] - info["accepted"]), -0.05 * continues]
            assert list(info["reward_terms"].values()) == pytest.approx(terms)
            assert step.reward == pytest.approx(sum(terms)) and info["discount"] == 0.0
            token, column, drafts, continues = token + info["emitted"], 0, 0, 0
            assert (info["token_index"], info["phase"], info["drafts"]) == (token, 1, 0)
        assert steps[-1].truncated == (token == TOKENS and not steps[-1].terminated)
        if steps[-1].terminated:
            np.testing.assert_array_equal(steps[-1].next, env.observation_space.low)


def test_round_episodes_go_through_the_prompt(small):
    whole, part = (make(**small.traced(episode=episode)) for episode in ("prompt", "round"))
    ends = set()
    for seed in range(12):
        steps = walk(whole, CoinPolicy(seed), seed=seed)
        observation, info = part.reset(seed=seed)
        for step in steps:
            np.testing.assert_array_equal(observation, step.observation)
            assert info["token_index"] == step.before["token_index"]
            observation, reward, terminated, truncated, info = part.step(step.action)
            assert (reward, truncated, info) == (step.reward, step.truncated, step.info)
            assert terminated == ("drafted" in info and not truncated)
            np.testing.assert_array_equal(observation, step.next)
            if terminated and step is not steps[-1]:
                observation, info = part.reset()
        ends.add(step.terminated)
        assert part.reset()[1]["token_index"] == 0  # the prompt is over: a new one
    assert ends == {True, False}


@pytest.mark.parametrize("backend", ["live", "trace"])
def test_a_reset_in_a_round_begins_it_again(small, backend):
    kwargs = dict(episode="round")
    env = make(**(small.kwargs(**kwargs) if backend == "live" else small.traced(**kwargs)))
    env.reset(seed=0, options={"prompt_id": "p1"})
    env.step(0)
    env.step(0)
    env.step(0)  # phase 1 continues to the end: one draft
    first, info = env.reset()
    assert info["token_index"] > 0
    steps = walk(env, CoinPolicy(3, 0.8))
    env.reset(seed=0, options={"prompt_id": "p1"})
    for _ in range(3):
        env.step(0)
    env.reset()
    env.step(0)
    again, _ = env.reset()
    np.testing.assert_array_equal(first, again)
    for mine, other in zip(steps, walk(env, CoinPolicy(3, 0.8)), strict=True):
        assert_same(mine, other)


# --- Gymnasium


@pytest.mark.parametrize("backend", ["live", "trace"])
def test_check_env_passes_without_warnings(small, backend):
    for kwargs in (dict(features="paper"), dict(features="extended", episode="round", reward="paper")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(make(**(small.kwargs(**kwargs) if backend == "live" else small.traced(**kwargs))))


def infos_of(envs, infos):
    """A vector environment's info as one dict an environment, by Gymnasium's masks."""
    return DictInfoToList(envs)._convert_info_to_list(infos)


def assert_same_info(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if key == "final_obs":
            np.testing.assert_allclose(value, theirs[key], atol=1e-4)
        elif isinstance(value, dict):
            assert_same_info(value, theirs[key])
        elif isinstance(value, float | np.floating):
            assert value == pytest.approx(theirs[key], rel=1e-12), key
        else:
            assert value == theirs[key], key


def assert_same_step(envs, ours, singles, theirs):
    """Compare (observations, rewards, terminated, truncated, infos), Gymnasium's own vector environment second."""
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    for mine, other in zip(ours[1:-1], theirs[1:-1], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12)
        assert mine.dtype == other.dtype
    for mine, other in zip(infos_of(envs, ours[-1]), infos_of(singles, theirs[-1]), strict=True):
        action = {key: value for key, value in other.get("final_info", {}).items() if key in ACTION_KEYS}
        assert_same_info(mine, {**other, **action})  # the documented difference: action keys survive the reset


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    ("num_envs", "kwargs"),
    [
        (5, dict(backend="trace")),
        (3, dict(backend="live")),
        (2, dict(backend="live", episode="round", temperature=0.8)),
        (4, dict(backend="trace", episode="round", reward="paper")),
    ],
)
def test_vector_equals_singles(small, mode, num_envs, kwargs):
    more = {key: value for key, value in kwargs.items() if key != "backend"}
    pinned = small.kwargs(**more) if kwargs["backend"] == "live" else small.traced(**more)
    envs = make_vec(num_envs, autoreset_mode=mode, **pinned)
    singles = SyncVectorEnv([lambda: make(**pinned)] * num_envs, autoreset_mode=mode)
    assert_same_step(envs, envs.reset(seed=7), singles, singles.reset(seed=7))
    rng, ends = np.random.default_rng(3), np.zeros(2, int)
    for _ in range(100):
        actions = (rng.random(num_envs) < 0.7).astype(int)
        ours, theirs = envs.step(actions), singles.step(actions)
        assert_same_step(envs, ours, singles, theirs)
        over = ours[2] | ours[3]
        ends += ours[2].sum(), ours[3].sum()
        if mode is AutoresetMode.DISABLED and over.any():
            ours, theirs = (e.reset(options={"reset_mask": over.copy()}) for e in (envs, singles))
            np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
            masked = infos_of(singles, theirs[1])  # of those reset; ours has all
            for i in np.flatnonzero(over):
                assert_same_info(infos_of(envs, ours[1])[i], masked[i])
    assert ends.all()  # both ways of ending came up


def test_what_a_step_returned_stays_as_it_was(small):
    envs = make_vec(3, **small.traced(max_new_tokens=4))
    results = [envs.reset(seed=0)]
    kept = [copy.deepcopy(results[0])]
    for _ in range(12):
        results.append(envs.step(np.array([1, 0, 1])))
        kept.append(copy.deepcopy(results[-1]))
    for result, before in zip(results, kept, strict=True):
        np.testing.assert_equal(result, before)


def test_without_autoreset_an_ended_episode_sleeps(small):
    envs = make_vec(2, autoreset_mode=AutoresetMode.DISABLED, **small.traced(max_new_tokens=4))
    envs.reset(seed=0)
    over = np.zeros(2, bool)
    while not over[0]:
        ended, _, terminated, truncated, _ = envs.step(np.array([1, 0]))
        over |= terminated | truncated
    for action in (0, 1):
        observations, rewards, terminated, truncated, infos = envs.step(np.array([action, 1]))
        np.testing.assert_array_equal(observations[0], ended[0])
        assert rewards[0] == 0 and not terminated[0] and not truncated[0]
        assert not infos["_drafted"][0] and (infos["cost"][0], infos["discount"][0]) == (0.0, 1.0)


def test_rendering(small):
    env = make(**small.traced(), render_mode="ansi")
    env.reset(seed=0)
    assert env.render().splitlines()[0] == "token    0  layers [1] 2 4 of 6  draft 1"
    for _ in range(3):
        env.step(0)
    assert "last round: layer 4, " in env.render()


# --- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rhoo": 1.0}, "unknown argument 'rhoo'.*rho"),
        ({"backend": "tape"}, "backend='tape'.*'live' or 'trace'"),
        ({"trace": None}, "backend='trace' needs a trace"),
        ({"trace": ""}, "trace='' must be the name of a trace"),
        ({"trace": "nowhere.h5"}, "nowhere.h5: no such file"),
        ({"episode": "token"}, "episode='token'.*'prompt' or 'round'"),
        ({"task": "poetry"}, "poetry"),
        ({"split": "test"}, "test"),
        ({"features": "all"}, "features='all'"),
        ({"candidate_layers": (2, 4)}, r"the trace holds candidate layers \(1, 2, 4\)"),
        ({"max_new_tokens": 1}, "max_new_tokens=1 must be.*at least 2"),
        ({"max_new_tokens": 100}, "max_new_tokens=100"),
        ({"cap": 0}, "cap=0"),
        ({"cap": 13}, "cap=13"),
        ({"cap": 2.0}, "cap=2.0 must be a whole number"),
        ({"rho": "fast"}, "rho='fast' must be a number"),
        ({"temperature": 0.6}, "temperature=0.6"),
        ({"reward": "free"}, "reward='free'.*'paper', 'throughput'"),
        ({"rho": None}, "rho=None"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"rho": float("nan"), "reward": "paper"}, "rho=nan"),
        ({"reward_kwargs": {"accept": 1.0}}, "'accept'"),
        ({"reward": "paper", "reward_kwargs": {"bonus": 1.0}}, "'bonus'.*accept, depth"),
        ({"cost_model": "abacus"}, "abacus"),
        ({"cost_model": "tiny-cpu"}, "of 16 layers, but .* has 6"),
    ],
)
def test_bad_arguments(small, kwargs, message):
    pinned = small.traced() | kwargs
    with pytest.raises(LedeError, match=message):
        make(**pinned)
    with pytest.raises(LedeError, match=message):
        make_vec(2, **pinned)


def test_one_candidate_layer_is_refused(small):
    with pytest.raises(LedeError, match="at least two"):
        make(**small.kwargs(candidate_layers=(2,)))


def test_bad_use(small):
    env = make(**small.traced())
    with pytest.raises(LedeError, match="reset"):
        env.step(0)
    with pytest.raises(LedeError, match="'p9' is not among"):
        env.reset(options={"prompt_id": "p9"})
    with pytest.raises(LedeError, match="'prompt'; this environment takes prompt_id"):
        env.reset(options={"prompt": "p1"})
    env.reset(seed=0)
    for action in (2, -1, 0.5, None, np.array([1])):
        with pytest.raises(LedeError, match="action"):
            env.step(action)
    envs = make_vec(2, **small.traced())
    with pytest.raises(LedeError, match="reset"):
        envs.step(np.zeros(2, int))
    with pytest.raises(LedeError, match="reset_mask must be 2 booleans"):
        envs.reset(options={"reset_mask": np.array([True])})
    with pytest.raises(LedeError, match="3 seeds for 2"):
        envs.reset(seed=[1, 2, 3])
    envs.reset(seed=0)
    with pytest.raises(LedeError, match="actions must be 2 values"):
        envs.step(np.array([0, 2]))
    with pytest.raises(LedeError, match="num_envs=0"):
        make_vec(0, **small.traced())


def test_a_trace_file_is_checked(small, tmp_path):
    path = tmp_path / "broken.h5"
    content = Path(small.traced()["trace"]).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(LedeError, match=r"broken\.h5"):
        make(**small.traced() | {"trace": str(path)})
    assert load_trace(small.traced()["trace"]).header.candidate_layers == (1, 2, 4)
