"""The exit environments: every value they return, against independent computations and Gymnasium's own semantics."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList

import lede_env
from lede_env import cost_measurement
from lede_env.engine.acceptance import Sampling, derive_seed
from lede_env.engine.cost_model import SHIPPED, load_cost_model
from lede_env.envs import source
from lede_env.envs.backends import LiveBackend
from lede_env.envs.texts import draw_texts
from lede_env.errors import LedeError
from lede_env.models.loading import EMBEDDED
from lede_env.tasks import Prompt, load_prompts

ID = "LEDE-Tiny-v0"
TOKENS = 6
OPTIONS = dict(task="parse", max_new_tokens=TOKENS, features="extended", device="cpu")
LAYERS = gym.spec(ID).kwargs["candidate_layers"]  # of 16
FEATURES = ("confidence", "entropy", "trace", "layer", "margin", "top1", "match", "echo")
EXIT_KEYS = {"exit_layer", "draft_token", "target_token", "accepted"}
ACTION_KEYS = {"cost", "discount", "forced", "reward_terms", *EXIT_KEYS}


def make(**kwargs):
    return gym.make(ID, **{**OPTIONS, **kwargs}).unwrapped


def make_vec(num_envs, **kwargs):
    return gym.make_vec(ID, num_envs=num_envs, **{**OPTIONS, **kwargs})


def walk(env, rng, **reset):
    """One episode under random actions: the reset's (observation, info), and a namespace a step."""
    observation, info = begin = env.reset(**reset)
    steps, over = [], False
    while not over:
        action = int(rng.integers(2))
        following, reward, terminated, truncated, next_info = env.step(action)
        values = dict(reward=reward, terminated=terminated, truncated=truncated, info=next_info)
        steps.append(SimpleNamespace(observation=observation, before=info, action=action, next=following, **values))
        observation, info, over = following, next_info, terminated or truncated
    return begin, steps


@pytest.fixture(scope="module")
def walks():
    """prompt id -> an episode of random actions."""
    env, rng = make(), np.random.default_rng(0)
    return {name: walk(env, rng, options={"prompt_id": name})[1] for name in env.prompt_ids[:8]}


@pytest.fixture
def early_eos(monkeypatch, walks):
    """Turns a token that some texts soon have, and some have not, into the end-of-sequence token."""
    texts = [[step.info["target_token"] for step in steps if "accepted" in step.info] for steps in walks.values()]
    seen = {token: sum(token in text for text in texts) for text in texts for token in text[1:-1]}
    eos = min(seen, key=lambda token: (abs(seen[token] - len(texts) / 2), token))
    lm = lede_env.load_model("tiny", device="cpu")
    monkeypatch.setattr(source, "load_model", lambda *_, **__: replace(lm, eos_ids=(eos,)))
    return eos


# --- Gymnasium's own checks


@pytest.mark.parametrize("features", ["paper", "extended"])
@pytest.mark.parametrize("episode", ["prompt", "token"])
def test_check_env_passes_without_warnings(features, episode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(features=features, episode=episode))


def test_make_imports_the_package_by_itself():
    code = f"""if True:
        import gymnasium as gym
        import warnings
        from gymnasium.utils.env_checker import check_env
        env = gym.make("lede_env:{ID}", max_new_tokens=2, task="parse", device="cpu")
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        assert gym.make_vec("lede_env:{ID}", num_envs=2, task="parse", device="cpu").num_envs == 2
        """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_import_costs_little():
    code = """if True:
        import sys, time, gymnasium
        begin = time.process_time()
        import lede_env
        print(time.process_time() - begin)
        assert not {"torch", "transformers", "h5py"} & sys.modules.keys()
        """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.1  # seconds, beyond Gymnasium's own; 0.01 on an idle machine


def test_specs_pickle_and_make_the_same_environment():
    env = make(temperature=0.6)
    again = pickle.loads(pickle.dumps(env.spec)).make().unwrapped
    assert again.spec.kwargs == env.spec.kwargs and again.attributes == env.attributes
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).make().unwrapped.attributes == env.attributes
    envs = make_vec(2, autoreset_mode=AutoresetMode.DISABLED)
    spec = pickle.loads(pickle.dumps(envs.spec))
    assert gym.make_vec(spec).unwrapped.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert make_vec(2).metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


# --- what a step returns


@pytest.fixture(scope="module")
def reference():
    """reference(ids) -> (17, N, V) log-probabilities of the next token after each layer, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()

    @torch.inference_mode()
    def log_probabilities(ids):
        states = list(model(torch.tensor([ids]), output_hidden_states=True).hidden_states)
        states = [model.model.norm(state) for state in states[:-1]] + states[-1:]  # the last is normed already
        return model.lm_head(torch.cat(states)).log_softmax(-1)

    return log_probabilities


def what_followed(ids):
    """(token, share): what followed the last n tokens where they last stood, at least 12 tokens back; n of 8, 4, 2."""
    for n in (8, 4, 2):
        for place in range(len(ids) - 12, n - 1, -1):
            if ids[place - n : place] == ids[-n:]:
                return ids[place], n / 8
    return None, 0.0


def test_observations_and_tokens_equal_transformers(walks, reference):
    lm = lede_env.load_model("tiny", device="cpu")
    prompts = {prompt.id: prompt.text for prompt in load_prompts("parse", "train")}
    guessed = 0
    for name, steps in walks.items():
        ids = lm.encode(prompts[name])
        text = [step.info["target_token"] for step in steps if "target_token" in step.info]
        log_p = reference(ids + text)[:, len(ids) - 1 :]  # (17, T + 1, V), of new token t
        for step in steps:
            at, layer = step.before["token_index"], step.before["layer"]
            p, full = log_p[layer, at], log_p[16, : at + 1]
            best = p.topk(5).values
            window = -full[max(at - 8, 0) : at].max(-1).values
            guess, match = what_followed(ids + text[:at])
            guessed += guess is not None
            expected = [
                -best.mean(),
                -(p.exp() * p).sum(),
                window.mean() if at else 0.0,
                layer / 16,
                best[0] - best[1],
                -best[0],
                match,
                30.0 if guess is None else min(best[0] - p[guess], 30.0),
            ]
            np.testing.assert_allclose(step.observation, np.array(expected, np.float32), atol=1e-4)
            if step.info["discount"] == 0:
                assert step.info["draft_token"] == p.argmax() and step.info["target_token"] == full[-1].argmax()
                assert step.info["accepted"] == (p.argmax() == full[-1].argmax())
    assert guessed


def test_rewards_and_infos_follow_the_documented_rules(walks):
    costs = load_cost_model("tiny-cpu")
    for name, steps in walks.items():
        token, column = 0, 0
        for step in steps:
            layer, last = LAYERS[column], column == len(LAYERS) - 1
            assert (step.before["token_index"], step.before["layer"]) == (token, layer)
            assert type(step.info["forced"]) is bool and type(step.reward) is float
            gap = layer - (LAYERS[column - 1] if column else 0)
            assert step.info["cost"] == pytest.approx(costs.walk(gap, 1, 1))
            terms = dict.fromkeys(("accepted", "rejected", "continue"), 0.0)
            if step.action == 1 or last:
                assert step.info["discount"] == 0.0 and step.info["forced"] == (step.action == 0)
                assert step.info["exit_layer"] == layer
                assert step.info["accepted"] == (step.info["draft_token"] == step.info["target_token"])
                terms |= {"accepted": 2 - layer / 16} if step.info["accepted"] else {"rejected": -1.0}
                token, column = token + 1, 0
            else:
                assert step.info["discount"] == 1.0 and step.info["forced"] is False
                assert not EXIT_KEYS & step.info.keys()  # nothing leaks before an exit
                terms["continue"] = -0.05
                column += 1
            assert step.info["reward_terms"] == terms and step.reward == sum(terms.values())
            assert (step.info["token_index"], step.info["layer"]) == (token, LAYERS[column])
            assert step.info["prompt_id"] == name and not step.terminated
            assert step.truncated == (token == TOKENS)
        assert token == TOKENS
    infos = [step.info for steps in walks.values() for step in steps]
    assert any(info["forced"] for info in infos)
    assert {info.get("accepted") for info in infos} == {True, False, None}


def test_reward_constants_are_arguments():
    env = make(reward_kwargs={"accept": 5, "depth": 4, "reject": -7, "continue_": 0})
    _, steps = walk(env, np.random.default_rng(0), seed=0)
    for step in steps:
        at_exit = {True: 5 + 4 * (1 - step.before["layer"] / 16), False: -7.0}
        assert step.reward == at_exit.get(step.info.get("accepted"), 0.0)


def test_reset_info_and_rendering():
    env = make(render_mode="ansi")
    observation, info = env.reset(options={"prompt_id": "parse/0003"})
    assert observation in env.observation_space
    zeros = {"accepted": 0.0, "rejected": 0.0, "continue": 0.0}
    expected = dict(token_index=0, layer=LAYERS[0], cost=0.0, discount=1.0, forced=False, reward_terms=zeros)
    assert info == {"prompt_id": "parse/0003", **expected}
    first, second, *more = LAYERS
    assert env.render().splitlines()[0] == f"token    0  layers [{first}] {second} {' '.join(map(str, more))} of 16"
    env.step(0)
    assert f"{first} [{second}] " in env.render()
    env.step(1)
    last = rf"token    1  layers \[{first}\] .*last exit: layer {second}, (accepted|rejected)"
    assert re.fullmatch(last, env.render().splitlines()[0])
    assert make().render() is None


def test_features_select_columns(walks):
    name, steps = next(iter(walks.items()))
    for features in ("paper", ("top1", "layer")):
        env = make(features=features)
        columns = [FEATURES.index(f) for f in env.features]
        observation, _ = env.reset(options={"prompt_id": name})
        for step in steps[:3]:
            np.testing.assert_array_equal(observation, step.observation[columns])
            observation = env.step(step.action)[0]
    assert make(features="paper").features == FEATURES[:3]


# --- how episodes end


def test_eos_terminates(early_eos):
    env, ends = make(), set()
    for name in env.prompt_ids[:8]:
        _, steps = walk(env, np.random.default_rng(1), options={"prompt_id": name})
        targets = [step.info["target_token"] for step in steps if "accepted" in step.info]
        assert early_eos not in targets[:-1]
        assert steps[-1].terminated == (targets[-1] == early_eos) and steps[-1].truncated != steps[-1].terminated
        assert not any(step.terminated or step.truncated for step in steps[:-1])
        assert steps[-1].next.any() != steps[-1].terminated  # zeros after the end, the next token's features otherwise
        ends.add(steps[-1].terminated)
        with pytest.raises(LedeError, match="reset"):
            env.step(0)
    assert ends == {True, False}


def test_eos_as_the_last_token_terminates(early_eos):
    env, steps, names = make(), [], iter(make().prompt_ids)
    while not (steps and steps[-1].terminated):
        reset = dict(options={"prompt_id": next(names)})
        _, steps = walk(env, np.random.default_rng(1), **reset)
    _, same = walk(make(max_new_tokens=steps[-1].info["token_index"]), np.random.default_rng(1), **reset)
    assert same[-1].terminated and not same[-1].truncated


def test_token_episodes_go_through_the_prompt(early_eos):
    whole, token = make(), make(episode="token")
    ended = set()
    for seed in range(12):
        _, steps = walk(whole, np.random.default_rng(seed), seed=seed)
        observation, info = token.reset(seed=seed)
        for step in steps:
            np.testing.assert_array_equal(observation, step.observation)
            assert (info["prompt_id"], info["token_index"]) == (step.before["prompt_id"], step.before["token_index"])
            observation, reward, terminated, truncated, info = token.step(step.action)
            assert (reward, truncated, info) == (step.reward, step.truncated, step.info)
            assert terminated == ("accepted" in info and not truncated)
            np.testing.assert_array_equal(observation, step.next)
            if step is not steps[-1] and terminated:
                observation, info = token.reset()
        ended |= {"terminated"} if step.terminated else {"truncated"}
        infos = [token.reset()[1] for _ in range(2)]  # the prompt is over: a new one, and its token 0 again
        assert infos[0] == infos[1] and infos[0]["token_index"] == 0
    assert ended == {"terminated", "truncated"}


def test_token_episodes_restart_on_request():
    env = make(episode="token")
    name = env.reset(seed=0)[1]["prompt_id"]
    env.step(1)
    assert env.reset()[1]["token_index"] == 1
    env.step(0)
    info = env.reset()[1]  # the token again, from its first candidate
    assert (info["prompt_id"], info["token_index"], info["layer"]) == (name, 1, LAYERS[0])
    env.step(1)
    assert env.reset(options={"prompt_id": name})[1]["token_index"] == 0
    env.step(1)
    assert env.reset(seed=0)[1]["token_index"] == 0


# --- seeds and sampling


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_same_seed_same_trajectory(temperature):
    def trajectory(env, seed):
        (observation, info), steps = walk(env, np.random.default_rng(5), seed=seed)
        return [observation.tolist(), info, [(s.next.tolist(), s.reward, s.info) for s in steps]]

    env = make(temperature=temperature)
    first = trajectory(env, 11)
    assert trajectory(env, 12) != first
    assert trajectory(env, 11) == first == trajectory(make(temperature=temperature), 11)


def test_texts_are_a_hash_of_key_and_count():
    env = make()
    keys, counts = np.random.default_rng(0).integers(2**64, size=20_000, dtype=np.uint64), np.arange(20_000) % 7
    prompts, seeds = draw_texts(len(env.prompt_ids), keys, counts.astype(np.uint64))
    for i in range(10):
        drawn = derive_seed(int(keys[i]), int(counts[i]))
        assert (prompts[i], seeds[i]) == ((drawn >> 32) * len(env.prompt_ids) >> 32, drawn & (2**63 - 1))
    expected = len(prompts) / len(env.prompt_ids)
    assert np.abs(np.bincount(prompts, minlength=len(env.prompt_ids)) - expected).max() < 5 * math.sqrt(expected)
    assert len(np.unique(seeds)) == len(seeds) and seeds.min() >= 0
    # Where the n-th text of a seed begins is the same, whatever became of those before it.
    names = [[env.reset(seed=3 if n == 0 else None)[1]["prompt_id"] for n in range(4)] for _ in range(2)]
    env.reset(seed=3, options={"prompt_id": env.prompt_ids[0]})
    env.step(1)
    assert names[0] == names[1] and names[0][1:] == [env.reset()[1]["prompt_id"] for _ in range(3)]
    assert len(set(names[0])) > 1


def test_draws_differ_from_seed_to_seed():
    env = make(task="lm", temperature=1.0)
    texts = set()
    for seed in range(3):
        _, steps = walk(env, np.random.default_rng(0), seed=seed, options={"prompt_id": env.prompt_ids[0]})
        texts.add(tuple(step.info["target_token"] for step in steps if "accepted" in step.info))
    assert len(texts) > 1


def test_coupling_at_a_temperature(random_model):
    """Targets follow p, drafts follow q, and they are equal as often as speculative sampling accepts: sum min(p, q)."""
    lm, model = random_model("llama", late_scale=0.3)
    layers, lanes, rounds, temperature = (1, 3), 64, 25, 0.6
    ids = [5]
    backend = LiveBackend(
        lm, [Prompt("p", "lm", ids, "", "train")], lanes, 1, Sampling(temperature), layers, ("entropy",)
    )
    counts = np.zeros((3, 97))  # drafts at layer 1, at layer 3, targets
    accepted = np.zeros(2)
    for number in range(rounds):
        for lane in range(lanes):
            backend.start(lane, 0, seed=number * lanes + lane)
        backend.ensure(0, 0)
        for column in range(2):
            counts[column] += np.bincount(backend.drafts[backend.base, column], minlength=97)
        counts[2] += np.bincount(backend.targets[backend.base], minlength=97)
        accepted += backend.accepted[backend.base].sum(0)
        assert (backend.accepted == (backend.drafts == backend.targets[:, None]))[backend.base].all()
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        q = [(model.lm_head(model.model.norm(states[e][0, -1])) / temperature).softmax(-1).numpy() for e in layers]
        p = (model.lm_head(states[-1][0, -1]) / temperature).softmax(-1).numpy()
    n = lanes * rounds
    for frequency, expected in zip(accepted / n, (np.minimum(p, each).sum() for each in q), strict=True):
        assert abs(frequency - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
        assert 0.05 < expected < 0.95
    for seen, expected in zip(counts / n, (*q, p), strict=True):
        assert (np.abs(seen - expected) < 5 * np.sqrt(expected / n) + 2 / n).all()


# --- the vector form


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
        else:
            assert value == theirs[key], key


def assert_same_step(envs, ours, singles, theirs):
    """Compare (observations, rewards, terminated, truncated, infos), Gymnasium's own vector environment second."""
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    for mine, other in zip(ours[1:-1], theirs[1:-1], strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype
    for mine, other in zip(infos_of(envs, ours[-1]), infos_of(singles, theirs[-1]), strict=True):
        action = {key: value for key, value in other.get("final_info", {}).items() if key in ACTION_KEYS}
        assert_same_info(mine, {**other, **action})  # the documented difference: action keys survive the reset


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(("num_envs", "episode", "temperature"), [(3, "prompt", 0.0), (1, "token", 0.6)])
def test_vector_equals_singles(early_eos, mode, num_envs, episode, temperature):
    kwargs = dict(episode=episode, temperature=temperature)
    envs = make_vec(num_envs, autoreset_mode=mode, **kwargs)
    singles = SyncVectorEnv([lambda: make(**kwargs)] * num_envs, autoreset_mode=mode)
    assert_same_step(envs, envs.reset(seed=7), singles, singles.reset(seed=7))
    rng, ends = np.random.default_rng(3), np.zeros(2, int)
    for _ in range(30):
        actions = rng.integers(2, size=num_envs)
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
    assert ends.all() or num_envs == 1  # both ways of ending came up


def test_action_keys_survive_the_reset_of_the_same_step():
    envs = make_vec(2, max_new_tokens=1)
    envs.reset(seed=0)
    _, rewards, _, truncated, infos = envs.step(np.array([1, 0]))
    assert truncated.tolist() == [True, False]
    assert infos["token_index"].tolist() == [0, 0] and infos["_accepted"].tolist() == [True, False]
    assert infos["discount"].tolist() == [0.0, 1.0] and infos["exit_layer"].tolist() == [LAYERS[0], -1]
    assert infos["final_info"]["token_index"][0] == 1 and infos["_final_info"].tolist() == [True, False]
    assert infos["reward_terms"]["continue"].tolist() == [0.0, -0.05] and rewards[1] == -0.05


def test_what_a_step_returned_stays_as_it_was():
    envs = make_vec(2, max_new_tokens=2)
    results = [envs.reset(seed=0)]
    kept = [copy.deepcopy(results[0])]
    for _ in range(6):
        results.append(envs.step(np.array([1, 1])))
        kept.append(copy.deepcopy(results[-1]))
    for result, before in zip(results, kept, strict=True):
        np.testing.assert_equal(result, before)


def test_reset_mask_and_prompt_ids():
    envs = make_vec(3, autoreset_mode=AutoresetMode.DISABLED)
    names = ["parse/0005", None, "parse/0003"]
    _, infos = envs.reset(seed=[4, 5, 6], options={"prompt_ids": names})
    drawn = make().reset(seed=5)[1]["prompt_id"]
    assert infos["prompt_id"].tolist() == ["parse/0005", drawn, "parse/0003"]
    before, *_ = envs.step(np.array([0, 1, 0]))
    after, infos = envs.reset(options={"reset_mask": np.array([True, False, False]), "prompt_ids": names})
    np.testing.assert_array_equal(after[1:], before[1:])
    layers = [LAYERS[0], LAYERS[0], LAYERS[1]]
    assert (infos["token_index"].tolist(), infos["layer"].tolist()) == ([0, 1, 0], layers)
    assert envs.step(np.array([1, 1, 1]))[4]["exit_layer"].tolist() == layers


def test_without_autoreset_an_ended_episode_sleeps():
    envs = make_vec(2, max_new_tokens=2, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    envs.step(np.array([1, 0]))
    ended, _, _, truncated, _ = envs.step(np.array([1, 0]))
    assert truncated.tolist() == [True, False]
    for action in (0, 1):
        observations, rewards, terminated, truncated, infos = envs.step(np.array([action, 1]))
        np.testing.assert_array_equal(observations[0], ended[0])
        assert rewards[0] == 0 and not terminated.any() and not truncated[0] and infos["token_index"][0] == 2
        assert not infos["_accepted"][0] and (infos["cost"][0], infos["discount"][0]) == (0.0, 1.0)
    assert truncated[1]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_first_reset_may_leave_some_out(mode):
    envs = make_vec(2, autoreset_mode=mode)
    observations, _ = envs.reset(seed=0, options={"reset_mask": np.array([True, False])})
    assert observations[0].any() and not observations[1].any()
    observations, rewards, *_ = envs.step(np.array([0, 1]))
    assert observations[1].any() == (mode is not AutoresetMode.DISABLED) and rewards.tolist() == [-0.05, 0.0]
    if mode is AutoresetMode.DISABLED:
        envs.reset(options={"reset_mask": np.array([False, True])})
    assert envs.step(np.array([1, 1]))[4]["exit_layer"].tolist() == [LAYERS[1], LAYERS[0]]


# --- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tempreature": 0.6}, "unknown argument 'tempreature'.*temperature"),
        ({"model": "huge"}, "model 'huge' is unknown"),
        ({"backend": "tape"}, "backend='tape'"),
        ({"episode": "word"}, "episode='word'.*'prompt' or 'token'"),
        ({"task": "poetry"}, "poetry"),
        ({"split": "dev"}, "dev"),
        ({"features": "all"}, "features='all'"),
        ({"features": ("layer", "phase")}, "phase"),
        ({"candidate_layers": (2, 16)}, "exit layer 16 is out of range.*1..15"),
        ({"candidate_layers": (4, 2)}, "ascending"),
        ({"candidate_layers": ()}, "at least one"),
        ({"candidate_layers": (3.0, 4.0)}, r"candidate_layers=\(3.0, 4.0\) must list whole numbers; write it as"),
        ({"candidate_layers": ("3", "4")}, r"candidate_layers=\('3', '4'\) must list whole numbers"),
        ({"candidate_layers": "34"}, "candidate_layers='34' must list whole numbers"),
        ({"candidate_layers": (True, 4)}, r"candidate_layers=\(True, 4\) must list whole numbers"),
        ({"candidate_layers": np.array([3.0])}, "must list whole numbers"),
        ({"candidate_layers": 4}, "candidate_layers=4 must list whole numbers"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"max_new_tokens": "64"}, "max_new_tokens='64' must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"top_p": "all"}, "top_p='all' must be a number"),
        ({"model": 3}, "model=3 must be a string"),
        ({"task": 3}, "task=3 must be a string or a list of strings"),
        ({"split": None}, "split=None must be a string"),
        ({"features": 3}, "features=3 must be a string or a list of strings"),
        ({"episode": True}, "episode=True must be a string"),
        ({"reward_kwargs": 3}, "reward_kwargs=3 must be a dict of numbers"),
        ({"cost_model": None}, "cost_model=None must be a string"),
        ({"max_new_tokens": 10**6}, "max_new_tokens=1000000 leaves no room"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"reward": "free"}, "reward='free'"),
        ({"reward_kwargs": {"bonus": 1.0}}, "'bonus'.*accept, depth"),
        ({"reward_kwargs": {"reject": "no"}}, "reject='no'"),
        ({"cost_model": "abacus"}, "abacus"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(LedeError, match=message):
        make(**kwargs)
    with pytest.raises(LedeError, match=message):
        make_vec(2, **kwargs)


def test_numpy_numbers_and_paths_are_taken(tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text((SHIPPED / "tiny-cpu.json").read_text())
    env = make(max_new_tokens=np.int64(6), temperature=np.float32(0.5), cost_model=costs)
    same = make(max_new_tokens=6, temperature=0.5, cost_model=str(costs))
    assert json.dumps(env.attributes) == json.dumps(same.attributes)


def test_candidate_layers_may_be_numpy_integers():
    for layers in (np.array([4, 8]), (np.int32(4), np.int64(8)), [4, 8]):
        assert make(candidate_layers=layers).attributes == make(candidate_layers=(4, 8)).attributes


def test_a_backend_has_no_position_past_the_end(early_eos):
    lm = source.load_model("tiny")
    prompts = load_prompts("parse", "train")[:8]
    backend = LiveBackend(lm, prompts, 9, TOKENS, Sampling(), LAYERS, ("entropy",))
    backend.start_many(np.arange(8), np.arange(8), np.zeros(8, np.int64))
    lengths = set()
    for lane in range(8):
        position = 0
        while not backend.ends[backend.base[lane] + position] and position < TOKENS:
            position += 1
            backend.ensure(lane, position)
        lengths.add(position + 1)
        with pytest.raises(LedeError, match=f"lane {lane} has no position {position + 1}.*ends after {position + 1} "):
            backend.ensure(lane, position + 1)
    assert TOKENS + 1 in lengths and len(lengths) > 1
    with pytest.raises(LedeError, match="lane 8 has no position 0"):
        backend.ensure(8, 0)


def test_attributes_tell_prompts_and_cost_models_apart(tmp_path):
    before = make().attributes
    assert make(split="test").attributes["prompts_digest"] != before["prompts_digest"]
    costs = json.loads((SHIPPED / "tiny-cpu.json").read_text())
    (tmp_path / "same.json").write_text(json.dumps(costs, indent=4))
    (tmp_path / "other.json").write_text(json.dumps({**costs, "context": 7}))
    digests = [make(cost_model=str(tmp_path / f"{n}.json")).attributes["cost_model_digest"] for n in ("same", "other")]
    assert digests[0] == before["cost_model_digest"] != digests[1]


def test_a_cost_model_that_was_measured_again_is_read_again(tmp_path):
    costs, path = json.loads((SHIPPED / "tiny-cpu.json").read_text()), tmp_path / "costs.json"
    digests = set()
    for context in (7, 8):
        path.write_text(json.dumps({**costs, "context": context}))
        digests.add(make(cost_model=str(path)).attributes["cost_model_digest"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    "changes",
    [dict(layer=[]), dict(layer="slow"), dict(layer=[0.0, 0.0]), dict(head=[0.0]), dict(head=[0.0, None]),
     dict(decision=math.nan), dict(decision=-1.0), dict(decision="0"), dict(seconds=1.0)],
)  # fmt: skip
def test_a_damaged_cost_model_is_refused(tmp_path, changes):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(json.loads((SHIPPED / "tiny-cpu.json").read_text()) | changes))
    with pytest.raises(LedeError, match=r"costs.json is not a cost model.*write one with python -m"):
        make(cost_model=str(path))


def test_measuring_a_cost_model_needs_a_repeat_and_a_folder(tmp_path):
    with pytest.raises(LedeError, match="--repeats 0 must be at least 1"):
        cost_measurement.main(repeats=0)
    with pytest.raises(LedeError, match=r"there is no folder .*nowhere"):  # before measuring, which takes a while
        cost_measurement.main(out=tmp_path / "nowhere" / "costs.json")
    with pytest.raises(LedeError, match="is a folder; name the file in it"):
        cost_measurement.main(out=tmp_path)


def test_bad_use_of_the_single_environment():
    with pytest.warns(UserWarning, match="rgb"), pytest.raises(LedeError, match=r"render_mode='rgb'.*ansi"):
        make(render_mode="rgb")
    env = make()
    with pytest.raises(LedeError, match="reset"):
        env.step(0)
    with pytest.raises(LedeError, match="'parse/9999' is not among"):
        env.reset(options={"prompt_id": "parse/9999"})
    with pytest.raises(LedeError, match="'prompt_ids'; this environment takes prompt_id"):
        env.reset(options={"prompt_ids": ["parse/0001"]})
    env.reset(seed=0)
    for action in (2, -1, 0.5, "exit", None, np.array([1]), np.array([0, 1])):
        with pytest.raises(LedeError, match="action"):
            env.step(action)
    for action in (1, np.int64(1), np.uint8(1), np.array(1)):
        assert env.step(action)[4]["discount"] == 0.0


def test_bad_use_of_the_vector_environment():
    for number in (0, 2.5, "2", True):
        with pytest.raises(LedeError, match=f"num_envs={number!r} must be a whole number, at least 1"):
            make_vec(number)
    with pytest.raises(ValueError, match="Sometimes"):
        make_vec(2, autoreset_mode="Sometimes")
    envs = make_vec(2)
    with pytest.raises(LedeError, match="reset"):
        envs.step(np.zeros(2, int))
    for options, message in [
        ({"reset_mask": np.array([True])}, "reset_mask must be 2 booleans"),
        ({"reset_mask": np.array([1, 0])}, "reset_mask must be 2 booleans"),
        ({"reset_mask": np.array([False, False])}, "at least one true"),
        ({"prompt_ids": ["parse/0001"]}, "prompt_ids must be a list of 2"),
        ({"prompt_ids": "ab"}, "prompt_ids must be a list of 2"),
        ({"prompt_ids": ["parse/0001", "parse/9999"]}, "'parse/9999' is not among"),
        ({"prompt_id": "parse/0001"}, "'prompt_id'; this environment takes reset_mask, prompt_ids"),
    ]:
        with pytest.raises(LedeError, match=message):
            envs.reset(options=options)
    with pytest.raises(LedeError, match="3 seeds for 2"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(LedeError, match=r"seed=1\.5 must be a whole number, or a list of 2"):
        envs.reset(seed=1.5)
    with pytest.raises(LedeError, match=r"seed=1\.5 must be a whole number"):
        envs.reset(seed=[1, 1.5])
    with pytest.raises(LedeError, match="prompt_ids must be a list of 2"):
        envs.reset(options={"prompt_ids": 3})
    observations, _ = envs.reset(seed=np.array([1, 2]))
    np.testing.assert_array_equal(observations, envs.reset(seed=1)[0])
    for actions in (np.array([0, 2]), np.array([0]), [0, 1, 1], np.array([[0, 1]]), np.array([0.5, 1]), [0.0, 1.0], 1):
        with pytest.raises(LedeError, match="actions must be 2 values"):
            envs.step(actions)
