"""Exporters, row by row: past the first episode, an episode that ends, one that is cut, one of length one."""

from __future__ import annotations

import os
import resource
import signal
import warnings
from contextlib import contextmanager, suppress

import gymnasium as gym
import numpy as np
import pytest

import lede_env
from lede_env import cli
from lede_env.data.dataset import Dataset, read_dataset
from lede_env.data.trajectory_file import COLUMNS, checksum
from lede_env.data.trajectory_layout import TABLES, locked
from lede_env.engine.acceptance import Sampling
from lede_env.errors import LedeError
from lede_env.models.loading import load_model
from lede_env.policies import RandomPolicy
from lede_env.recording import record
from lede_env.tasks import load_prompts
from lede_env.tracing import record_trace

FEATURES = ["confidence", "entropy", "trace"]
# Observations are row numbers, final ones 100 + episode, rewards 1000 + row.
#                          e0: ends       e1: cut   e2: one row, cut   e3: one row, ends   e4: cut, across tokens
LENGTHS = np.array([3, 2, 1, 1, 4])
ENDS_BY_ITSELF = np.array([True, False, False, True, False])
DISCOUNT = np.array([1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1], np.float32)  # e1 and e2 are cut within a token
STARTS = np.cumsum(LENGTHS) - LENGTHS
LAST = STARTS + LENGTHS - 1


@pytest.fixture
def dataset():
    """Hand-made; the attributes are those of a real environment."""
    n, rows = LENGTHS.sum(), np.arange(LENGTHS.sum())
    arrays = {name: np.zeros(n, dtype) for name, dtype in COLUMNS.items()}
    arrays["observations"] = np.add.outer(rows, [0, 0.25, 0.5]).astype(np.float32)
    arrays["actions"] = (rows % 2).astype("u1")
    arrays["rewards"] = (1000 + rows).astype(np.float32)
    arrays["discount"] = DISCOUNT
    arrays["terminals"][LAST[ENDS_BY_ITSELF]] = True
    arrays["timeouts"][LAST[~ENDS_BY_ITSELF]] = True
    arrays["behaviour_logprob"] = np.log((rows + 1) / 100).astype(np.float32)
    arrays["layer"] = (3 + rows % 2).astype("u1")
    arrays["prompt_id"] = np.repeat([0, 1, 0, 1, 1], LENGTHS).astype("u4")
    arrays["episode_starts"] = STARTS.astype(TABLES["episode_starts"])
    arrays["final_observations"] = np.repeat(100.0 + np.arange(5)[:, None], 3, 1).astype(np.float32)
    attributes = {"env_id": "LEDE-Tiny-v0", "mdp": "exit", "features": FEATURES, "split": "train", "task": "all"}
    return Dataset(arrays, attributes, ["code/0001", "lm/0002"], int(n))


def expected(dataset, boundary):
    """(observation, action, reward, next observation, terminal) of every row, in order."""
    out = []
    for row in range(dataset.n_rows):
        episode = int(np.searchsorted(STARTS, row, "right")) - 1
        following = 100.0 + episode if row == LAST[episode] else row + 1
        ends = row in LAST[ENDS_BY_ITSELF] or (boundary == "token" and DISCOUNT[row] == 0)
        out.append((float(row), row % 2, 1000.0 + row, float(following), bool(ends)))
    return out


@pytest.mark.parametrize("boundary", ["token", "prompt"])
def test_d3rlpy(dataset, boundary):
    pytest.importorskip("d3rlpy")
    from d3rlpy.dataset import BasicTransitionPicker

    buffer, picker = dataset.to_d3rlpy(boundary), BasicTransitionPicker()
    found = []
    for episode in buffer.episodes:
        for index in range(episode.transition_count):
            step = picker(episode, index)
            following = float(step.next_observation[0])
            found.append((float(step.observation[0]), int(step.action[0]), float(step.reward[0]), following,
                          bool(step.terminal)))  # fmt: skip
    wanted = expected(dataset, boundary)
    # Of a terminal step d3rlpy keeps no next observation: it gives zeros.
    assert found == [(*row[:3], 0.0 if row[4] else row[3], row[4]) for row in wanted]
    assert buffer.dataset_info.action_size == 2


@pytest.mark.parametrize("boundary", ["token", "prompt"])
def test_sb3(dataset, boundary):
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    box = gym.spaces.Box(-1e3, 1e3, (3,), np.float32)
    buffer = buffers.ReplayBuffer(20, box, gym.spaces.Discrete(2), device="cpu", handle_timeout_termination=True)
    dataset.fill_sb3(buffer, boundary)
    n = dataset.n_rows
    columns = (buffer.observations, buffer.actions, buffer.rewards, buffer.next_observations)
    rows = zip(*(column[:n].reshape(n, -1)[:, 0].tolist() for column in columns), strict=True)
    bootstrapped = buffer.dones[:n, 0] * (1 - buffer.timeouts[:n, 0])
    assert [(*row, bool(end)) for row, end in zip(rows, bootstrapped, strict=True)] == expected(dataset, boundary)
    ends = (dataset["terminals"] | dataset["timeouts"]) | ((DISCOUNT == 0) & (boundary == "token"))
    np.testing.assert_array_equal(buffer.dones[:n, 0], ends)
    for size, envs in ((20, 2), (10, 1)):
        small = buffers.ReplayBuffer(size, box, gym.spaces.Discrete(2), device="cpu", n_envs=envs)
        with pytest.raises(LedeError, match="expected at least 11 of 1"):
            dataset.fill_sb3(small)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"handle_timeout_termination": False}, "handle_timeout_termination=False, .*; expected False and True"),
        ({"handle_timeout_termination": False, "optimize_memory_usage": True}, "optimize_memory_usage=True"),
        ({"observation_space": gym.spaces.Box(0, 9, (8,), np.float32)}, r"float32 \(8,\); expected float32 \(1,\)"),
        ({"observation_space": gym.spaces.Box(0, 255, (1,), np.uint8)}, r"uint8 \(1,\); expected float32 \(1,\)"),
        ({"action_space": gym.spaces.Box(-1, 1, (1,))}, r"expected Discrete\(2\)"),
    ],
)
def test_sb3_buffers_that_would_hold_other_rows_are_refused(dataset, changed, message):
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    one = dataset.select(("confidence",))
    plain = {"observation_space": gym.spaces.Box(0, 9, (1,), np.float32), "action_space": gym.spaces.Discrete(2)}
    buffer = buffers.ReplayBuffer(20, device="cpu", **{**plain, **changed})
    with pytest.raises(LedeError, match=message):
        one.fill_sb3(buffer)
    assert buffer.size() == 0


def test_a_full_sb3_buffer_is_not_overwritten(dataset):
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    buffer = buffers.ReplayBuffer(11, gym.spaces.Box(0, 9, (3,)), gym.spaces.Discrete(2), device="cpu")
    dataset.fill_sb3(buffer)
    assert buffer.full
    with pytest.raises(LedeError, match="room for 0 more transitions"):
        dataset.fill_sb3(buffer)


def test_rlds(dataset):
    episodes = list(dataset.to_rlds())
    assert [len(episode["steps"]["reward"]) for episode in episodes] == (LENGTHS + 1).tolist()
    for number, episode in enumerate(episodes):
        steps, begin, n = episode["steps"], STARTS[number], LENGTHS[number]
        assert steps["observation"][:, 0].tolist() == [*range(begin, begin + n), 100 + number]
        assert steps["reward"].tolist() == [*range(1000 + begin, 1000 + begin + n), 0]
        assert steps["is_first"].nonzero()[0].tolist() == [0] and steps["is_last"].nonzero()[0].tolist() == [n]
        assert steps["is_terminal"].tolist() == [False] * n + [bool(ENDS_BY_ITSELF[number])]
        assert steps["discount"][n - 1] == (0 if ENDS_BY_ITSELF[number] else DISCOUNT[begin + n - 1])
        assert episode["prompt_id"] == dataset.prompt_ids[[0, 1, 0, 1, 1][number]]


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


def test_minari_and_back(dataset, minari):
    dataset.to_minari("lede/by-hand-v0", description="made by hand")
    stored = minari.load_dataset("lede/by-hand-v0")
    assert stored.total_episodes == 5 and stored.total_steps == 11
    for number, episode in enumerate(stored.iterate_episodes()):
        begin, n = STARTS[number], LENGTHS[number]
        assert episode.observations[:, 0].tolist() == [*range(begin, begin + n), 100 + number]
        assert episode.rewards.tolist() == list(range(1000 + begin, 1000 + begin + n))
        assert episode.actions.tolist() == [row % 2 for row in range(begin, begin + n)]
        assert episode.terminations.tolist() == [False] * (n - 1) + [bool(ENDS_BY_ITSELF[number])]
        assert episode.truncations.tolist() == [False] * (n - 1) + [not ENDS_BY_ITSELF[number]]
    back = lede_env.from_minari("lede/by-hand-v0")
    assert checksum(back.arrays) == checksum(dataset.arrays)
    assert (back.attributes, back.prompt_ids) == (dataset.attributes, dataset.prompt_ids)
    env = stored.recover_environment()
    observation, _ = env.reset(seed=0)
    assert observation.shape == (3,) and env.observation_space == stored.observation_space
    with pytest.raises(LedeError, match=r"Minari does not take 'lede/by.hand'"):
        dataset.to_minari("lede/by.hand")
    with pytest.raises(LedeError, match="no dataset 'lede/other-v0' on this machine"):
        lede_env.from_minari("lede/other-v0")


def test_a_real_dataset_through_minari(minari):
    data = lede_env.load_dataset("tiny-draft/random-v0", split="validation", features="paper").take(range(5))
    back = (data.to_minari("lede/real-v0"), lede_env.from_minari("lede/real-v0"))[1]
    assert checksum(back.arrays) == checksum(data.arrays) and back.features == data.features


def assert_recovered(part, stored, split):
    env = stored.recover_environment().unwrapped
    assert env.prompt_ids == [part.prompt_ids[i] for i in part.attributes["prompt_splits"][split]]
    assert {part.prompt_ids[i] for i in part["prompt_id"]} <= set(env.prompt_ids)
    return env


def test_minari_recovers_the_environment_of_the_part(minari):
    whole = lede_env.load_dataset("tiny/random-v0", split="all")
    parts = whole.split()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without an environment to recover")
        for split, part in parts.items():
            assert_recovered(part, part.take(range(2)).to_minari(f"lede/{split}-v0"), split)
        both = parts["train"].take([0]).concat(parts["test"].take([0])).to_minari("lede/both-v0")
    assert both.recover_environment().unwrapped.prompt_ids == whole.prompt_ids
    assert lede_env.from_minari("lede/test-v0").attributes == parts["test"].attributes


def test_minari_recovers_live_what_no_trace_has(minari, tmp_path):
    record("LEDE-Tiny-v0", RandomPolicy(), 2, tmp_path / "live.h5", temperature=0.3, max_new_tokens=3, split="test")
    part = read_dataset(tmp_path / "live.h5")
    env = assert_recovered(part, part.to_minari("lede/live-v0"), "test")
    assert env.attributes["temperature"] == 0.3 and env.spec.kwargs["backend"] == "live"


def test_minari_warns_of_an_environment_that_cannot_be_recovered(minari, tmp_path):
    lm, trace = load_model("tiny"), tmp_path / "own.h5"
    record_trace(lm, load_prompts("code", "test")[:2], lm.candidate_layers, 4, Sampling(0.0), 0).save(trace)
    settings = dict(backend="trace", trace=trace, split="test", max_new_tokens=4)
    record("LEDE-Tiny-v0", RandomPolicy(), 2, tmp_path / "own-rows.h5", **settings)
    own = read_dataset(tmp_path / "own-rows.h5")
    with pytest.warns(UserWarning, match="without an environment to recover.*trace backend its prompts_digest differ"):
        stored = own.to_minari("lede/own-v0")
    with pytest.raises(ValueError, match="cannot be recovered"):
        stored.recover_environment()
    assert checksum(lede_env.from_minari("lede/own-v0").arrays) == checksum(own.arrays)


@contextmanager
def file_size_limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def exported(monkeypatch, to, out):
    command = ["lede", "dataset", "export", "tiny-draft/random-v0", "--to", to, "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, "--split", "validation", "--features", "paper"])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize("to", ["d3rlpy", "minari"])
@pytest.mark.parametrize("size", [1000, 300_000])
def test_exports_to_a_full_disk_leave_nothing_and_can_be_tried_again(tmp_path, monkeypatch, capfd, to, size):
    pytest.importorskip(to)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    out = "lede/full-v0" if to == "minari" else tmp_path / "full.h5"
    with file_size_limit(size):
        assert exported(monkeypatch, to, out) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert f"{tmp_path / out} cannot be written: File too large" in said and "free space" in said
    assert not list(tmp_path.rglob("*"))
    assert exported(monkeypatch, to, out) == 0


def test_a_minari_export_that_fails_half_way_is_removed_and_one_that_was_there_is_kept(dataset, minari):
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataset.to_minari("lede/half-v0", description=object())
    assert not minari.list_local_datasets()
    dataset.to_minari("lede/half-v0")
    with pytest.raises(LedeError, match=r"already exists, in .*remove it by `minari delete lede/half-v0`"):
        dataset.to_minari("lede/half-v0")
    assert minari.load_dataset("lede/half-v0").total_episodes == 5


def test_a_killed_minari_export_has_not_its_name_and_can_be_tried_again(dataset, minari, monkeypatch):
    storage = minari.dataset.minari_storage.MinariStorage
    update = storage.update_metadata

    def killed(self, metadata):
        update(self, metadata)
        if metadata.get("total_episodes"):  # Minari itself is done
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "update_metadata", killed)
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                dataset.to_minari("lede/killed-v0")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(LedeError, match="no dataset 'lede/killed-v0' on this machine"):
        lede_env.from_minari("lede/killed-v0")
    assert list(minari.list_local_datasets()) == ["lede/killed-unfinished-v0"]
    dataset.to_minari("lede/killed-v0")
    assert list(minari.list_local_datasets()) == ["lede/killed-v0"]
    assert checksum(lede_env.from_minari("lede/killed-v0").arrays) == checksum(dataset.arrays)
    assert not list(minari.storage.get_dataset_path().glob("*.lock"))


def test_two_minari_exports_of_one_name_do_not_meet(dataset, minari):
    name = minari.storage.get_dataset_path() / "lede-two-v0"
    with locked(name), pytest.raises(LedeError, match="being written by another process"):
        dataset.to_minari("lede/two-v0")


@pytest.mark.parametrize("dataset_id", ["", "two", "lede/two", "../two-v0", "/tmp/two-v0", "le.de/two-v0", "t w-v0"])
def test_ids_that_minari_does_not_take(dataset, minari, tmp_path, dataset_id):
    with pytest.raises(LedeError, match=f"Minari does not take '{dataset_id}': expected NAME-vN or"):
        dataset.to_minari(dataset_id)
    assert not list(tmp_path.rglob("*"))


def test_nothing_and_unknown_boundaries_are_refused(dataset):
    with pytest.raises(LedeError, match="boundary='round' is unknown; use one of token, prompt"):
        dataset.to_d3rlpy("round")
    with pytest.raises(LedeError, match="nothing to export"):
        dataset.take([]).to_d3rlpy()


def test_the_command_exports(tmp_path, monkeypatch, capfd):
    d3rlpy = pytest.importorskip("d3rlpy")
    path = tmp_path / "out.h5"
    assert exported(monkeypatch, "d3rlpy", path) == 0
    buffer = d3rlpy.dataset.ReplayBuffer.load(str(path), d3rlpy.dataset.InfiniteBuffer())
    part = lede_env.load_dataset("tiny-draft/random-v0", split="validation", features="paper")
    assert buffer.transition_count == part.n_rows
    np.testing.assert_array_equal(np.concatenate([episode.observations for episode in buffer.episodes]),
                                  part["observations"])  # fmt: skip
    before = path.read_bytes()
    assert exported(monkeypatch, "d3rlpy", path) == 2
    assert "exists; choose another path" in capfd.readouterr().err and path.read_bytes() == before
