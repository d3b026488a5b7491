"""Making datasets when things go wrong: kills, full disks, other writers, lost workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import lede_env
from lede_env import cli
from lede_env.data.trajectory_file import checksum, read_trajectories
from lede_env.data.trajectory_layout import locked, temporary
from lede_env.errors import LedeError
from lede_env.offline import making
from lede_env.offline.making import is_whole, make, verify
from lede_env.offline.tiers import recipe_of
from tests.kills import episodes_in, kill_again_and_again

NAME = "tiny/mixed-v0"
EPISODES = 400
PART = 300  # episodes a worker

SETUP = f"""
    from functools import partial
    import lede_env.recording as recording
    from lede_env.offline import making
    from lede_env.offline.tiers import recipe_of
    recipe = recipe_of({NAME!r})
    envs = recording.make_player_envs(recipe.problem.env_id, 16, **recipe.problem.env_kwargs)
    making.make_player_envs = lambda *args, **kwargs: envs
    recording.TrajectoryWriter = partial(recording.TrajectoryWriter, chunk_rows=256)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return read_trajectories(make(recipe_of(NAME), tmp_path_factory.mktemp("whole") / "whole.h5", EPISODES))


def assert_prefix(path, whole):
    """Every committed episode is the one of the uninterrupted file; returns how many there are."""
    data = read_trajectories(path)
    for name, values in data.arrays.items():
        np.testing.assert_array_equal(values, whole[name][: len(values)], err_msg=name)
    return data.n_episodes


@pytest.mark.parametrize(("kills", "episodes"), [(8, 240), pytest.param(50, 1500, marks=pytest.mark.slow)])
def test_kills_lose_nothing(tmp_path, kills, episodes):
    whole = read_trajectories(make(recipe_of(NAME), tmp_path / "whole.h5", episodes))
    path = tmp_path / "killed.h5"
    write = f"making.make(recipe, {str(path)!r}, {episodes}, resume=True)"
    counts = kill_again_and_again(path, SETUP, write, kills, lambda path: assert_prefix(path, whole))
    assert 0 < counts[-1] < episodes and len(set(counts)) > kills // 4, counts
    data = read_trajectories(path)
    assert checksum(data.arrays) == data.attributes["checksum"] == whole.attributes["checksum"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["killed.h5", "whole.h5"]


def test_a_file_size_limit_and_resume(tmp_path, whole):
    path = tmp_path / "full.h5"
    arguments = ["dataset", "make", NAME, "--episodes", str(EPISODES), "--out", str(path), "--resume"]
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, -1)); "
    command = [sys.executable, "-c", limited + "from lede_env.cli import main; main()", *arguments]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    said = " ".join(failed.stderr.split())
    assert str(path) in said and "intact" in said and "--resume" in said
    assert not path.exists() or assert_prefix(path, whole) < EPISODES
    make(recipe_of(NAME), path, EPISODES, resume=True)
    assert read_trajectories(path).attributes["checksum"] == whole.attributes["checksum"]


def test_a_second_writer_is_refused_and_the_number_of_environments_leaves_no_trace(tmp_path, whole, monkeypatch):
    path = tmp_path / "a.h5"
    with locked(path), pytest.raises(LedeError, match=f"being written by another process .pid {os.getpid()}"):
        make(recipe_of(NAME), path, 3)
    monkeypatch.setattr(making, "LANES", 7)
    make(recipe_of(NAME), path, 25)
    assert assert_prefix(path, whole) == 25


def test_readers_beside_the_writer_see_committed_episodes(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(making, "LANES", 16)
    monkeypatch.setattr("lede_env.recording.TrajectoryWriter", _often)
    path, counts = tmp_path / "read.h5", []
    thread = threading.Thread(target=make, args=(recipe_of(NAME), path, 60))
    thread.start()
    while thread.is_alive():
        if path.exists():
            counts.append(assert_prefix(path, whole))
        time.sleep(0.01)
    thread.join()
    assert counts == sorted(counts) and len(set(counts)) > 3 and is_whole(path)


def _often(*args, **kwargs):
    from lede_env.data.trajectory_file import TrajectoryWriter

    return TrajectoryWriter(*args, **kwargs, chunk_rows=256)


# --- --force


def tool(monkeypatch, *command):
    """`lede dataset ...`; returns its exit status."""
    monkeypatch.setattr("sys.argv", ["lede", "dataset", *map(str, command)])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture
def old(tmp_path):
    """A dataset of four episodes that somebody wants to replace."""
    return make(recipe_of("tiny/random-v0"), tmp_path / "old.h5", 4)


def test_force_replaces_a_dataset_and_through_a_link_what_it_names(old, monkeypatch):
    link = old.with_name("link.h5")
    link.symlink_to(old)
    temporary(old).write_text("what a killed run left")
    assert tool(monkeypatch, "make", NAME, "--episodes", 5, "--out", link, "--force") == 0
    content = read_trajectories(old)
    assert content.n_episodes == 5 and content.attributes["dataset"] == NAME and link.is_symlink() and is_whole(link)
    assert sorted(file.name for file in old.parent.iterdir()) == ["link.h5", "old.h5"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--episodes", "-1"), "episodes=-1 must be at least 1"),
        (("--episodes", "0"), "episodes=0 must be at least 1; leave it out for the 331 of tiny/mixed-v0"),
        (("--resume",), "choose one of them"),
        (("--workers", "2"), "--workers does not take --force"),
        (("--workers", "2", "--uncompressed", "--resume"), "--workers does not take --resume, --force, --uncompressed"),
        (("--gpus-per-worker", "1"), "--gpus-per-worker 1 is of workers"),
    ],
)
def test_force_with_bad_arguments_touches_nothing(old, monkeypatch, capfd, arguments, said):
    before = old.read_bytes()
    assert tool(monkeypatch, "make", NAME, "--out", old, "--force", *arguments) == 2
    assert said in capfd.readouterr().err and old.read_bytes() == before
    assert [file.name for file in old.parent.iterdir()] == ["old.h5"]


def test_force_replaces_nothing_but_datasets(tmp_path, monkeypatch, capfd):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("Chapter 1")
    assert tool(monkeypatch, "make", NAME, "--out", thesis, "--force") == 2
    assert "force replaces nothing but trajectory files" in capfd.readouterr().err and thesis.read_text() == "Chapter 1"
    for more in ((), ("--force",)):
        assert tool(monkeypatch, "make", NAME, "--out", tmp_path, *more) == 2
        assert f"{tmp_path} is a folder; name a file in it" in capfd.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_make_all_replaces_by_force_alone(tmp_path, old, monkeypatch, capfd):
    (tmp_path / "tiny").mkdir()
    other = tmp_path / "tiny" / "static-v0.h5"
    other.write_bytes(old.read_bytes())
    assert tool(monkeypatch, "make", "all", "--out", tmp_path) == 2
    assert "has tiny/static-v0; replace them by --force" in capfd.readouterr().err
    assert [file.name for file in other.parent.iterdir()] == ["static-v0.h5"]
    assert tool(monkeypatch, "make", "all", "--out", tmp_path, "--episodes", 0) == 2


def test_force_waits_for_no_other_writer_and_harms_none(old, monkeypatch, capfd):
    before = old.read_bytes()
    with locked(old):
        assert tool(monkeypatch, "make", NAME, "--episodes", 5, "--out", old, "--force") == 2
        assert "being written by another process" in capfd.readouterr().err and old.read_bytes() == before
    during = []

    def second(done, count):  # another process that forces too, while the first one is at work
        if not during:
            during.append(old.read_bytes())
            with pytest.raises(LedeError, match="being written by another process"):
                make(recipe_of("tiny/static-v0"), old, 3, force=True)

    make(recipe_of(NAME), old, 5, force=True, progress=second)
    assert during == [before] and read_trajectories(old).attributes["dataset"] == NAME and verify(old)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise OSError(errno.ENOSPC, 'full')"])
def test_a_force_that_does_not_end_leaves_the_old_file(old, end):
    before = old.read_bytes()
    program = f"""
import errno, os, signal
from lede_env.offline.making import make
from lede_env.offline.tiers import recipe_of
def progress(done, count):
    if done:
        {end}
make(recipe_of({NAME!r}), {str(old)!r}, 5, force=True, progress=progress)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert old.read_bytes() == before
    if ended.returncode != -signal.SIGKILL:
        assert "The file is what it was: free space" in ended.stderr and str(old) in ended.stderr
        assert [file.name for file in old.parent.iterdir()] == ["old.h5"]
    make(recipe_of(NAME), old, 5, force=True)
    assert read_trajectories(old).n_episodes == 5 and not temporary(old).exists()


# --- several workers


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def cluster(request):
    """A local one that runs so many of the workers at a time."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=request.param, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_four_workers_one_of_them_killed_give_what_one_process_gives(cluster, tmp_path):
    from lede_env.offline.parts import collect

    recipe, episodes, folder = recipe_of(NAME), 4 * PART, tmp_path / "parts"
    victim, lock = folder / "part-0002.h5", folder / "part-0002.h5.lock"
    killed = []

    def kill():
        while not killed:
            if victim.exists() and lock.exists() and 0 < episodes_in(victim) < PART:
                killed.append(int(lock.read_text()))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()
    collect(recipe, folder, episodes, workers=4)
    assert killed and sorted(file.name for file in folder.iterdir()) == [
        "index.json", "part-0000.h5", "part-0001.h5", "part-0002.h5", "part-0003.h5",
    ]  # fmt: skip
    joined = lede_env.load_dataset(folder, split="all")
    single = read_trajectories(make(recipe, tmp_path / "single.h5", episodes, compressed=False))
    assert joined.n_episodes == episodes and checksum(joined.arrays) == single.attributes["checksum"]
    assert verify(victim)
    collect(recipe, folder, episodes, workers=4)  # all there: nothing to do
    victim.unlink()
    with pytest.raises(LedeError, match=r"part-0002.h5: no such file"):
        lede_env.load_dataset(folder)
    collect(recipe, folder, episodes, workers=4)
    assert checksum(lede_env.load_dataset(folder, split="all").arrays) == single.attributes["checksum"]


def test_workers_that_cannot_start_say_why(cluster, tmp_path, monkeypatch):
    import ray

    from lede_env.offline.parts import collect

    recipe = recipe_of("tiny/random-v0")
    with pytest.raises(LedeError, match="workers=5 for 4 episodes"):
        collect(recipe, tmp_path, 4, workers=5)
    for gpus in (-1, 1.5):
        with pytest.raises(LedeError, match=f"gpus_per_worker={gpus} must be"):
            collect(recipe, tmp_path, 4, workers=2, gpus_per_worker=gpus)
    with monkeypatch.context() as patched:  # as if `collect` had started the cluster
        patched.setattr(ray, "is_initialized", lambda: False)
        patched.setattr(ray, "init", lambda **_: None)
        with pytest.raises(LedeError, match=r"gpus_per_worker=1000, but Ray sees .* GPUs here"):
            collect(recipe, tmp_path, 4, workers=2, gpus_per_worker=1000)
    (tmp_path / "file").touch()
    with pytest.raises(LedeError, match="file cannot be made a folder"):
        collect(recipe, tmp_path / "file", 4, workers=2)
    make(recipe, tmp_path / "part-0000.h5", 3)
    with pytest.raises(LedeError, match="with 3 episodes, and not the 2"):
        collect(recipe, tmp_path, 4, workers=2)
    with pytest.raises(LedeError, match=r"has no index\.json"):
        lede_env.load_dataset(tmp_path)
