"""Validation: a recorded file is reproduced, and an altered value is found where it is."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest

from lede_env import validation
from lede_env.data.trajectory_file import COLUMNS, read_trajectories
from lede_env.errors import LedeError
from lede_env.policies import RandomPolicy
from lede_env.recording import record
from lede_env.validation import validate
from tests.small_traces import small_traces

IDS = {"exit": "LEDE-Tiny-v0", "draft": "LEDE-Tiny-Draft-v0"}
EPISODES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("validate")


@pytest.fixture(scope="module")
def traces(random_model, folder):
    return small_traces(random_model, folder)


@pytest.fixture(scope="module", params=list(IDS))
def recorded(request, traces, folder):
    """A file of each MDP, and its trace."""
    path = folder / f"{request.param}.h5"
    kwargs = {name: value for name, value in traces.sampled.items() if name != "features"}
    record(IDS[request.param], RandomPolicy(), EPISODES, path, seed=3, **kwargs)
    return path, kwargs["trace"]


def test_a_file_as_recorded(recorded, monkeypatch):
    path, trace = recorded
    data = read_trajectories(path)
    for lanes in (validation.LANES, 3):
        monkeypatch.setattr(validation, "LANES", lanes)
        found = validate(path, trace)
        assert found and (found.rows, found.episodes, found.difference) == (data.n_rows, EPISODES, None)
        assert f"{data.n_rows} rows of {EPISODES} episodes, all reproduced" in str(found)


@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "behaviour_logprob"])
def test_an_altered_value_is_found(recorded, tmp_path, column):
    path, trace = recorded
    data, altered = read_trajectories(path), tmp_path / "altered.h5"
    row = int(data["episode_starts"][4]) + 2  # after the first wave of lanes, too
    shutil.copy(path, altered)
    with h5py.File(altered, "r+") as file:
        old = file[column][row]
        file[column][row] = ~old if old.dtype == bool else old + np.ones_like(old)
    found = validate(altered, trace).difference
    if column == "actions" and found.column != "actions":  # another action is a legal one: what follows differs
        assert found.row >= row and found.episode == 4
        return
    assert (found.column, found.row, found.episode) == (column, row, 4)
    if column != "actions":
        assert found.replayed == old.tolist() and found.recorded != found.replayed
    assert f"{column} differs first at row {row}, in episode 4" in str(validate(altered, trace))


def test_the_first_of_several(recorded, tmp_path):
    path, trace = recorded
    altered = tmp_path / "altered.h5"
    shutil.copy(path, altered)
    with h5py.File(altered, "r+") as file:
        file["rewards"][9] += 1
        file["observations"][6, 0] += 1e-3
        file["observations"][5, 0] += 1e-5  # within the noise
        file["cost"][30] = np.nan
    found = validate(altered, trace).difference
    assert (found.column, found.row) == ("observations", 6)
    with h5py.File(altered, "r+") as file:
        file["observations"][6, 0] -= 1e-3
        file["rewards"][9] -= 1
    found = validate(altered, trace).difference
    assert (found.column, found.row) == ("cost", 30)


def test_ends_of_episodes(recorded, tmp_path):
    path, trace = recorded
    altered = tmp_path / "altered.h5"
    for name, change in (("final_observations", 1.0), ("episode_starts", 1)):
        shutil.copy(path, altered)
        with h5py.File(altered, "r+") as file:
            file[name][2] = file[name][2] + change
        assert validate(altered, trace).difference.episode in (1, 2)
    shutil.copy(path, altered)
    last = int(read_trajectories(path)["episode_starts"][1]) - 1
    with h5py.File(altered, "r+") as file:
        file["terminals"][last] = file["timeouts"][last] = False
    found = validate(altered, trace).difference
    assert found.row == last and found.column in ("terminals", "timeouts")


def test_live(tmp_path):
    path = tmp_path / "live.h5"
    record(IDS["exit"], RandomPolicy(), 2, path, task="parse", max_new_tokens=4, device="cpu", dtype="float32")
    assert validate(path)
    with h5py.File(path, "r+") as file:
        file["rewards"][1] = 9.0
    assert validate(path).difference.row == 1


def test_files_that_cannot_be_validated(recorded, traces, tmp_path):
    path, trace = recorded
    altered = tmp_path / "altered.h5"
    for name, value, message in (
        ("env_id", '"LEDE-Giant-v0"', "'LEDE-Giant-v0' is unknown"),
        ("env_id", None, "attribute 'env_id' is None"),
        ("seed", None, "attribute 'seed' is None"),
        ("seed", "-1", "attribute 'seed' is -1"),
        ("model_fingerprint", '"0123"', "model_fingerprint is '0123' in the file"),
        ("prompts_digest", '"0123"', "prompts_digest is '0123'"),
        ("temperature", "0.7", "temperature=0.7|temperature 0.7"),
    ):
        shutil.copy(path, altered)
        with h5py.File(altered, "r+") as file:
            del file.attrs[name]
            if value is not None:
                file.attrs[name] = value
        with pytest.raises(LedeError, match=message):
            validate(altered, trace)
    with pytest.raises(LedeError, match="no such file"):
        validate(tmp_path / "none.h5", trace)
    with pytest.raises(LedeError, match=r"Sampling|temperature"):
        validate(path, traces.greedy["trace"])
