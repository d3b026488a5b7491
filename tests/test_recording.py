"""Recording: files hold what the environments did, whatever the number of environments, stops and kills."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import gymnasium as gym
import numpy as np
import pytest

from lede_env import cli
from lede_env.data.trajectory_file import COLUMNS, read_trajectories
from lede_env.engine import cost_model
from lede_env.engine.signals import DRAFT_FEATURES
from lede_env.errors import LedeError
from lede_env.policies import MLPPolicy, RandomPolicy, StaticPolicy, ThresholdPolicy
from lede_env.recording import episode_seed, make_player_envs, policy_digest, prompt_of, record
from tests.kills import kill_again_and_again
from tests.small_models import untrained_policy

ID, DRAFT_ID = "LEDE-Tiny-v0", "LEDE-Tiny-Draft-v0"
LAYERS = gym.spec(ID).kwargs["candidate_layers"]
EPISODES, SEED = 6, 3
OPTIONS = dict(task="parse", max_new_tokens=5, device="cpu")


def record_to(path, policy=None, episodes=EPISODES, **kwargs):
    """The file's content after recording, and what `record` returned."""
    options = {**OPTIONS, "num_envs": 4, "seed": SEED, **kwargs}
    held = record(ID, policy or RandomPolicy(), episodes, path, **options)
    data = read_trajectories(path)
    assert held == (data.n_episodes, data.n_rows) and data.n_episodes == episodes
    return data


def assert_same_data(one, other):
    """Equal but for float noise: the company that a sequence is computed in changes the last digits."""
    assert one.arrays.keys() == other.arrays.keys()
    for name, values in one.arrays.items():
        noisy = name in ("observations", "final_observations")
        np.testing.assert_allclose(values, other[name], atol=1e-4 if noisy else 0, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_to(tmp_path_factory.mktemp("recorded") / "random.h5", seed=SEED)


def test_a_file_replays_step_by_step(recorded):
    env = gym.make(ID, features="extended", **OPTIONS).unwrapped
    starts = [*recorded["episode_starts"].tolist(), recorded.n_rows]
    for number in range(recorded.n_episodes):
        prompt = prompt_of(SEED, number, len(env.prompt_ids))
        reset = dict(seed=episode_seed(SEED, number), options={"prompt_id": env.prompt_ids[prompt]})
        observation, info = env.reset(**reset)
        for row in range(starts[number], starts[number + 1]):
            action = recorded["actions"][row]
            following, reward, terminated, truncated, outcome = env.step(action)
            expected = {
                "actions": action, "rewards": reward, "terminals": terminated, "timeouts": truncated,
                "discount": outcome["discount"], "layer": info["layer"], "phase": 1,
                "token_index": info["token_index"], "prompt_id": prompt, "accepted": outcome.get("accepted", -1),
                "forced": outcome["forced"], "behaviour_logprob": np.log(0.5), "cost": outcome["cost"],
            }  # fmt: skip
            assert {"observations", *expected} == COLUMNS.keys()
            np.testing.assert_allclose(recorded["observations"][row], observation, atol=1e-4)
            for name, value in expected.items():
                assert recorded[name][row] == COLUMNS[name].type(value), (name, row)
            observation, info = following, outcome
        assert terminated or truncated
        np.testing.assert_allclose(recorded["final_observations"][number], observation, atol=1e-4)
    assert {0, 1} == set(recorded["actions"].tolist()) and recorded["forced"].any()


def test_a_draft_file_replays_step_by_step(tmp_path, tiny):
    policy = untrained_policy(tiny, mdp="draft")
    options = {**OPTIONS, "max_new_tokens": 8, "reward": "throughput"}
    record(DRAFT_ID, RandomPolicy(0.7), 4, tmp_path / "a.h5", seed=SEED, num_envs=3, **options)
    recorded = read_trajectories(tmp_path / "a.h5")
    assert recorded.attributes["mdp"] == "draft" and recorded.attributes["features"] == list(DRAFT_FEATURES)
    env = gym.make(DRAFT_ID, features="extended", **options).unwrapped
    starts = [*recorded["episode_starts"].tolist(), recorded.n_rows]
    for number in range(recorded.n_episodes):
        prompt = prompt_of(SEED, number, len(env.prompt_ids))
        reset = dict(seed=episode_seed(SEED, number), options={"prompt_id": env.prompt_ids[prompt]})
        observation, info = env.reset(**reset)
        for row in range(starts[number], starts[number + 1]):
            action = recorded["actions"][row]
            following, reward, terminated, truncated, outcome = env.step(action)
            np.testing.assert_allclose(recorded["observations"][row], observation, atol=1e-4)
            expected = {
                "rewards": reward, "terminals": terminated, "timeouts": truncated, "discount": outcome["discount"],
                "layer": info["layer"], "phase": info["phase"], "token_index": info["token_index"],
                "prompt_id": prompt, "accepted": outcome.get("accepted", -1), "forced": False,
                "behaviour_logprob": np.log(0.7 if action else 0.3), "cost": outcome["cost"],
            }  # fmt: skip
            assert {"observations", "actions", *expected} == COLUMNS.keys()
            for name, value in expected.items():
                assert recorded[name][row] == pytest.approx(COLUMNS[name].type(value), rel=1e-6), (name, row)
            observation, info = following, outcome
        assert terminated or truncated
    assert {1, 2} == set(recorded["phase"].tolist()) and recorded["accepted"].max() > 1
    held = record(DRAFT_ID, policy, 1, tmp_path / "b.h5", **options)  # one trained on the draft MDP fits
    assert held[0] == 1
    with pytest.raises(LedeError, match="trained on the draft MDP, but this is the exit MDP"):
        record(ID, policy, 1, tmp_path / "c.h5", **OPTIONS)


def test_the_header_says_what_was_recorded(recorded):
    said = recorded.attributes
    assert (said["env_id"], said["seed"], said["mdp"]) == (ID, SEED, "exit")
    assert said["policy"] == "RandomPolicy(p=0.5, features=())"
    assert said["candidate_layers"] == list(LAYERS) and said["task"] == "parse" and said["max_new_tokens"] == 5
    assert said["features"] == ["confidence", "entropy", "trace", "layer", "margin", "top1", "match", "echo"]
    assert {"model_fingerprint", "environment_hash", "software", "temperature", "reward_kwargs"} <= said.keys()
    assert not {"device", "backend"} & said.keys()


def test_the_file_does_not_depend_on_the_number_of_environments(recorded, tmp_path):
    for num_envs in (1, 50):
        assert_same_data(record_to(tmp_path / f"{num_envs}.h5", num_envs=num_envs), recorded)
    sampled = [record_to(tmp_path / f"sampled {n}.h5", num_envs=n, temperature=0.8, episodes=4) for n in (1, 3)]
    assert_same_data(*sampled)


def test_a_resumed_file_equals_one_run(recorded, tmp_path):
    path = tmp_path / "resumed.h5"
    record_to(path, episodes=3, num_envs=2)
    with pytest.raises(LedeError, match=r"exists.*--resume"):
        record_to(path)
    assert_same_data(record_to(path, resume=True), recorded)
    assert_same_data(record_to(path, resume=True), recorded)  # nothing left to do
    for other in (dict(seed=9), dict(max_new_tokens=4), dict(policy=RandomPolicy(0.4)), dict(temperature=0.5)):
        with pytest.raises(LedeError, match="cannot resume"):
            record_to(path, resume=True, **other)
    assert_same_data(read_trajectories(path), recorded)


def test_an_interrupted_run_keeps_what_it_finished(recorded, tmp_path):
    path = tmp_path / "interrupted.h5"
    seen = []

    def interrupt(done):
        seen.append(done)
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_to(path, progress=interrupt)
    assert read_trajectories(path).n_episodes == 4  # the waves that were whole
    assert_same_data(record_to(path, resume=True), recorded)


def test_progress_moves_as_episodes_end(tmp_path):
    seen = []
    data = record_to(tmp_path / "a.h5", progress=seen.append)
    ends = np.append(data["episode_starts"][1:], data.n_rows).astype(int)
    lengths = np.diff(ends, prepend=0)
    assert seen == sorted(seen) and (seen[0], seen[-1]) == (0, EPISODES)
    # A wave's episodes begin together: those of one length end together, the others one after the other.
    waves = (lengths[:4], lengths[4:])
    expected = [0, *(n + sum(wave <= t) for n, wave in zip((0, 4), waves, strict=True) for t in np.unique(wave))]
    assert seen == expected and len(seen) > 3
    seen.clear()
    record_to(tmp_path / "a.h5", resume=True, episodes=7, progress=seen.append)
    assert seen == [6, 7]


def write_prompts(path, *texts):
    row = {"task": "lm", "reference": "", "split": "train"}
    path.write_text("".join(json.dumps({"id": f"p/{i}", "prompt": t, **row}) + "\n" for i, t in enumerate(texts)))
    return str(path)


def test_resuming_with_edited_inputs_is_refused(tmp_path, tiny):
    path, prompts, costs = tmp_path / "a.h5", tmp_path / "prompts.jsonl", tmp_path / "costs.json"
    shipped = json.loads((cost_model.SHIPPED / "tiny-cpu.json").read_text())
    costs.write_text(json.dumps(shipped))
    card = dict(candidate_layers=LAYERS, n_layers=16, model_fingerprint=tiny.fingerprint, model_name="tiny")
    policies = [replace(MLPPolicy.random(("layer", "top1"), hidden=(8,), seed=seed), **card) for seed in (0, 1)]

    def sitting(policy=policies[0], episodes=2):
        return record_to(path, policy, episodes, resume=True, num_envs=2, max_new_tokens=2, policy_name="runs/policy",
                         task=write_prompts(prompts, *texts), cost_model=str(costs))  # fmt: skip

    texts = ["Once upon a time", "The weather"]
    before = sitting()
    assert_same_data(sitting(), before)
    texts[1] += " is fine"
    with pytest.raises(LedeError, match=r"cannot resume.*prompts_digest is"):
        sitting()
    texts[1] = "The weather"
    costs.write_text(json.dumps({**shipped, "context": 7}))
    with pytest.raises(LedeError, match=r"cannot resume.*cost_model_digest is"):
        sitting()
    costs.write_text(json.dumps(shipped))
    with pytest.raises(LedeError, match=r"cannot resume \S+: policy_digest is [^;]+$"):
        sitting(policies[1])
    sitting(episodes=3)


def test_policy_digests(tiny):
    policy = untrained_policy(tiny)
    tensors = [replace(policy, mean=policy.mean + 1), replace(policy, biases=tuple(b + 1 for b in policy.biases))]
    card = [replace(policy, model_name="other"), replace(policy, training={"steps": 1})]
    others = [RandomPolicy(), RandomPolicy(0.4), StaticPolicy(4, 16), ThresholdPolicy({4: 0.5}, 16), Broken(1)]
    digests = [policy_digest(each) for each in (policy, *tensors, *card, *others)]
    assert len(set(digests)) == len(digests)
    assert digests[0] == policy_digest(untrained_policy(tiny)) and policy_digest(RandomPolicy()) == digests[5]


def test_an_upgrade_of_the_software_does_not_matter(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    first = record_to(path, episodes=2).attributes["software"]
    monkeypatch.setattr("lede_env.recording.version", lambda name: "99.0")
    assert record_to(path, episodes=3, resume=True).attributes["software"] == first != {}


def test_log_probabilities_are_those_of_the_policy(recorded, tmp_path):
    assert np.all(recorded["behaviour_logprob"] == np.float32(np.log(0.5)))
    rare = record_to(tmp_path / "rare.h5", RandomPolicy(0.2))
    expected = np.where(rare["actions"] == 1, np.log(0.2), np.log(0.8)).astype(np.float32)
    np.testing.assert_array_equal(rare["behaviour_logprob"], expected)
    assert abs(rare["actions"].mean() - 0.2) < 4 * np.sqrt(0.16 / rare.n_rows)

    layer = LAYERS[1]
    static = record_to(tmp_path / "static.h5", StaticPolicy(layer, 16), episodes=3)
    np.testing.assert_array_equal(static["behaviour_logprob"], 0.0)
    np.testing.assert_array_equal(static["actions"], static["layer"] == layer)
    np.testing.assert_array_equal(static["discount"], static["layer"] != layer)
    assert static["layer"].max() == layer and not static["forced"].any()

    never = record_to(tmp_path / "never.h5", ThresholdPolicy(dict.fromkeys(LAYERS, 1.0), 16), episodes=3)
    assert not never["actions"].any()
    np.testing.assert_array_equal(never["forced"], never["layer"] == LAYERS[-1])


def test_every_prompt_comes_once_a_cycle():
    orders = [[prompt_of(7, cycle * 10 + place, 10) for place in range(10)] for cycle in range(2)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 2 and orders[0] != orders[1]
    assert len({episode_seed(7, number) for number in range(1000)}) == 1000


@dataclass(frozen=True)
class Broken:
    """A policy that answers nonsense."""

    answer: object
    features: tuple[str, ...] = ()

    def exit_probability(self, observations):
        return self.answer


@pytest.mark.parametrize(
    ("policy", "kwargs", "message"),
    [
        (None, dict(episodes=0), "episodes=0"),
        (None, dict(num_envs=0), "num_envs=0"),
        (None, dict(seed=-1), "seed=-1"),
        (None, dict(features="paper"), "features='paper' cannot be chosen"),
        (None, dict(episode="token"), "episode='token' cannot be chosen"),
        (None, dict(colour="red"), "unknown argument 'colour'"),
        (StaticPolicy(15, 16), {}, "exits at layer 15.*candidate layers"),
        (Broken(None, ("phase",)), {}, "'phase'.*missing"),
        (Broken([2.0] * 4), {}, r"Broken.exit_probability must return 4 numbers in \[0, 1\]"),
        (Broken([float("nan")] * 4), {}, "must return 4 numbers"),
        (Broken(0.5), {}, "must return 4 numbers"),
    ],
)
def test_bad_arguments(tmp_path, policy, kwargs, message):
    with pytest.raises(LedeError, match=message):
        record_to(tmp_path / "bad.h5", policy, **kwargs)


def test_unknown_environment():
    with pytest.raises(LedeError, match="'LEDE-Giant-v0' is unknown; known ids: LEDE-Tiny-v0"):
        make_player_envs("LEDE-Giant-v0", 2)


# --- the command line, and kills


def test_the_command_says_what_the_file_holds(tmp_path, monkeypatch, capfd):
    path = tmp_path / "a.h5"
    rows = record_to(path, episodes=3, policy_name="random").n_rows
    options = "--policy random --task parse --max-new-tokens 5 --episodes 2 --num-envs 4 --device cpu --resume"
    command = f"record --env {ID} {options} --seed {SEED} --out {path}"
    monkeypatch.setattr("sys.argv", ["lede", *command.split()])
    cli.main()
    assert f": 3 episodes, {rows} transitions" in " ".join(capfd.readouterr().out.split())


def test_arguments_and_prompt_files_that_are_not_text(tmp_path, monkeypatch, capfd):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b'\n{"id": "caf\xe9"}\n')
    record = ["record", "--env", ID, "--policy", "random", "--episodes", "1", "--out", str(tmp_path / "a.h5")]
    for command, says in [
        (["generate", "caf\udce9"], r"the argument 'caf\udce9' is not Unicode text"),
        ([*record, "--task", "caf\udce9"], r"the argument 'caf\udce9' is not Unicode text"),
        ([*record, "--task", str(prompts)], "prompts.jsonl, line 2: not UTF-8"),
    ]:
        monkeypatch.setattr("sys.argv", ["lede", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        error = capfd.readouterr().err
        assert ended.value.code == 2 and says in error and "Traceback" not in error


SETUP = """
    from functools import partial
    import lede_env, lede_env.cli, lede_env.recording as recording
    lede_env.load_model("tiny", device="cpu")
    recording.TrajectoryWriter = partial(recording.TrajectoryWriter, chunk_rows=32)
    def lede(command):
        sys.argv = ["lede", *command.split()]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        lede_env.cli.main()
"""


def command(path, episodes):
    layer = LAYERS[1]
    return (
        f"record --env {ID} --policy static:{layer} --task parse --max-new-tokens 6 --episodes {episodes} "
        f"--num-envs 4 --seed {SEED} --device cpu --resume --out {path}"
    )


def assert_prefix(path, whole):
    """Every committed row is the one of the uninterrupted file."""
    data = read_trajectories(path)
    begun = data.n_rows
    for name, values in data.arrays.items():
        if name in COLUMNS:
            np.testing.assert_allclose(values, whole[name][:begun], atol=1e-4, rtol=0, err_msg=name)
    np.testing.assert_array_equal(data["episode_starts"], whole["episode_starts"][: data.n_episodes])
    ends = [*whole["episode_starts"], whole.n_rows]
    assert ends[data.n_episodes] == begun  # whole episodes
    return data.n_episodes


@pytest.mark.parametrize(("kills", "episodes"), [(2, 24), pytest.param(20, 240, marks=pytest.mark.slow)])
def test_kills_lose_nothing(tmp_path, kills, episodes):
    whole = record_to(
        tmp_path / "whole.h5", StaticPolicy(LAYERS[1], 16), episodes, num_envs=8, max_new_tokens=6,
        policy_name=f"static:{LAYERS[1]}",
    )  # fmt: skip
    path = tmp_path / "killed.h5"
    write = f"lede({command(path, episodes)!r})"
    counts = kill_again_and_again(path, SETUP, write, kills, lambda path: assert_prefix(path, whole))
    assert 0 < counts[-1] < episodes
    assert_same_data(read_trajectories(path), whole)
    assert read_trajectories(path).attributes == whole.attributes
