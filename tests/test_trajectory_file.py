"""The trajectory file: what goes in comes out, whatever happens in between."""

import contextlib
import errno
import functools
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lede_env.data import trajectory_file, trajectory_layout
from lede_env.data.trajectory_file import (
    COLUMNS,
    Episode,
    TrajectoryWriter,
    checksum,
    read_trajectories,
    rewrite,
)
from lede_env.errors import LedeError

FEATURES = ("confidence", "entropy", "trace", "layer", "margin", "top1")
ATTRIBUTES = {
    "environment_hash": "ab12",
    "seed": 7,
    "candidate_layers": [2, 4],
    "reward": {"continue": -0.05},
}
PROMPTS = ["code-1", "prose-é", "parse-3"]


@functools.cache
def make_episode(index: int, length: int | None = None) -> Episode:
    """Every value depends on the index alone, as with a recorder that seeds each episode."""
    rng = np.random.default_rng(index)
    n = length or int(rng.integers(1, 20))
    values = {}
    for name, dtype in COLUMNS.items():
        shape = (n, len(FEATURES)) if name == "observations" else (n,)
        if dtype.kind == "f":
            values[name] = rng.standard_normal(shape, np.float32)
        elif dtype.kind == "b":
            values[name] = np.zeros(shape, bool)
        else:
            values[name] = rng.integers(0, len(PROMPTS), shape).astype(dtype)
    values["terminals" if index % 2 else "timeouts"][-1] = True
    return Episode(**values, final_observation=rng.standard_normal(len(FEATURES), np.float32))


def writer_of(path, **kwargs) -> TrajectoryWriter:
    return TrajectoryWriter(path, ATTRIBUTES, PROMPTS, FEATURES, **kwargs)


def record(path, episodes: int, **kwargs) -> None:
    """What a recorder does: go on with the next episode until there are enough."""
    with writer_of(path, resume=True, **kwargs) as writer:
        while writer.episodes < episodes:
            writer.append(make_episode(writer.episodes))


def compress(path) -> None:
    rewrite(path, {}, compressed=True)


def expected_arrays(episodes: list[Episode]) -> dict[str, np.ndarray]:
    arrays = {name: np.concatenate([getattr(e, name) for e in episodes]) for name in COLUMNS}
    lengths = np.array([len(e) for e in episodes], np.uint64)
    arrays["episode_starts"] = np.cumsum(lengths) - lengths
    arrays["final_observations"] = np.stack([e.final_observation for e in episodes])
    return arrays


def assert_holds(path, episodes: list[Episode]) -> None:
    arrays, expected = read_trajectories(path).arrays, expected_arrays(episodes)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert checksum(arrays) == checksum(expected)


def assert_first_episodes(path) -> int:
    """Whole episodes, a prefix of the sequence; returns how many."""
    n = read_trajectories(path).n_episodes
    if n:
        assert_holds(path, [make_episode(i) for i in range(n)])
    return n


# --- round trips


@pytest.mark.parametrize("compressed", [False, True])
def test_round_trip_with_short_long_and_straddling_episodes(tmp_path, compressed):
    path = tmp_path / "new" / "a.h5"
    episodes = [make_episode(i, n) for i, n in enumerate([1, 1, 7, 9, 16, 1, 40, 3])]
    with writer_of(path, chunk_rows=8) as writer:
        for i, episode in enumerate(episodes):
            assert writer.episodes == i
            writer.append(episode)
        assert writer.committed_episodes < writer.episodes == 8
    if compressed:
        compress(path)
        with h5py.File(path) as file:
            assert file["rewards"].compression == "gzip" and file["rewards"].shuffle
    assert_holds(path, episodes)
    trajectories = read_trajectories(path, columns=["rewards"])
    assert list(trajectories.arrays) == ["rewards", "episode_starts", "final_observations"]
    assert trajectories.prompt_ids == PROMPTS and trajectories.n_rows == 78 and trajectories.n_episodes == 8
    assert ATTRIBUTES.items() <= trajectories.attributes.items()
    assert trajectories.attributes["features"] == list(FEATURES)
    assert sorted(os.listdir(path.parent)) == ["a.h5"]  # neither lock nor temporary file
    with h5py.File(path) as file:  # a plain HDF5 file of exactly the rows
        assert file["observations"].shape == (78, 6) and file["episode_starts"].shape == (8,)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=30),
    chunk_rows=st.integers(1, 50),
    stops=st.sets(st.integers(0, 30), max_size=3),
    compressed=st.booleans(),
)
def test_any_lengths_chunks_and_resumes(lengths, chunk_rows, stops, compressed):
    episodes = [make_episode(i, n) for i, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        for stop in [*sorted(stops), len(episodes)]:
            with writer_of(path, resume=True, chunk_rows=chunk_rows) as writer:
                while writer.episodes < min(stop, len(episodes)):
                    writer.append(episodes[writer.episodes])
            if compressed:
                compress(path)
        if episodes:
            assert_holds(path, episodes)
        else:
            assert read_trajectories(path)["observations"].shape == (0, 6)


def test_the_file_grows_past_its_first_room_many_times(tmp_path):
    record(tmp_path / "a.h5", 300, chunk_rows=2)  # 64 x 2 rows at first, about 3000 in the end
    assert_holds(tmp_path / "a.h5", [make_episode(i) for i in range(300)])


def test_appended_arrays_may_be_reused(tmp_path):
    kept = make_episode(3)
    episode = replace(kept, rewards=kept.rewards.copy(), final_observation=kept.final_observation.copy())
    with writer_of(tmp_path / "a.h5") as writer:
        writer.append(episode)
        episode.rewards[:] = 99
        episode.final_observation[:] = 99
    assert_holds(tmp_path / "a.h5", [kept])


def test_checksum_is_of_data_and_not_of_order_or_layout():
    a, b = np.arange(6, dtype="<f4").reshape(2, 3), np.zeros(0, bool)
    assert checksum({"a": a, "b": b}) == checksum({"b": b, "a": np.asfortranarray(a).astype(">f4")})
    variants = [{"a": a}, {"a": a.reshape(3, 2)}, {"a": a.astype("<f8")}, {"c": a}, {"a": a + 1}]
    assert len({checksum(v) for v in variants}) == len(variants)
    with pytest.raises(LedeError, match="'x' holds Python objects"):
        checksum({"x": np.array([None])})


# --- crashes


class Killed(BaseException):
    pass


class Mortal:
    """Stands in for `os` functions that change files; the process dies before call number `calls_left`."""

    def __init__(self, patch: pytest.MonkeyPatch, calls_left: int):
        self.calls_left = calls_left
        for name in ("pwrite", "fsync", "replace"):
            patch.setattr(os, name, functools.partial(self.call, getattr(os, name)))
        patch.setattr(os, "unlink", functools.partial(self.unlink, os.unlink))

    def call(self, function, *args):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise Killed
        return function(*args)

    def unlink(self, function, *args, **kwargs):
        if self.calls_left >= 0:  # the dead tidy nothing up
            function(*args, **kwargs)


def test_death_before_any_system_call_leaves_a_prefix(tmp_path, monkeypatch):
    """Dies before the k-th call that changes a file, all through a run that grows twice and closes."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # for speed
    episodes, reference = 20, tmp_path / "reference.h5"
    record(reference, episodes, chunk_rows=1)
    deaths, dead = 0, True
    calls_left = 0
    while dead:
        path = tmp_path / f"{calls_left}.h5"
        writer = None
        with monkeypatch.context() as patch:
            Mortal(patch, calls_left)
            try:
                writer = writer_of(path, resume=True, chunk_rows=1)
                while writer.episodes < episodes:
                    writer.append(make_episode(writer.episodes))
                writer.close()
                dead = False
            except Killed:
                deaths += 1
        if writer is not None:
            writer._release()  # as the system does for a dead process
        if path.exists():
            assert_first_episodes(path)
        record(path, episodes, chunk_rows=1)
        assert path.read_bytes() == reference.read_bytes()
        calls_left += 1 if calls_left < 8 else 11  # a commit is 18 calls: in time, before every one of them
    assert deaths > 30


CHILD = """
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
"""


def spawn(body: str, *args) -> subprocess.Popen:
    code = textwrap.dedent(CHILD) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code, __file__, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_kill_nine_twenty_times_then_resume(tmp_path):
    body = """
        path = sys.argv[2]
        episodes = [helpers.make_episode(i) for i in range(1200)]
        assert "torch" not in sys.modules
        while True:  # one run a line: a waiting process is forked for each kill, to import only once
            print("ready", flush=True)
            if not sys.stdin.readline(): break
            if os.fork() == 0:
                print(os.getpid(), flush=True)
                with helpers.writer_of(path, resume=True, chunk_rows=32) as writer:
                    while writer.episodes < len(episodes):
                        writer.append(episodes[writer.episodes])
                print("done", flush=True)
                os._exit(0)
            os.wait()
    """
    path, clean = tmp_path / "a.h5", tmp_path / "clean.h5"
    parent = spawn("import os\n" + textwrap.dedent(body), path)
    rng = random.Random(0)
    kills, counts = 0, []
    assert parent.stdout.readline() == "ready\n", parent.stderr.read()
    while kills < 20:
        parent.stdin.write("go\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        time.sleep(rng.uniform(0, 0.05 * 2 ** (kills % 4)))  # on a busy machine too some come in the middle
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        line = parent.stdout.readline()
        if line == "done\n":  # finished first: start over, with what is left of the twenty
            assert_first_episodes(path)
            path.unlink()
            assert parent.stdout.readline() == "ready\n"
            continue
        assert line == "ready\n"
        kills += 1
        counts.append(assert_first_episodes(path) if path.exists() else 0)
    parent.stdin.close()
    assert parent.wait(10) == 0
    record(path, 1200, chunk_rows=32)
    record(clean, 1200)
    assert checksum(read_trajectories(path).arrays) == checksum(read_trajectories(clean).arrays)
    assert max(counts) > 0  # some kills came in the middle of the data


def test_nothing_but_raw_rows_is_written_to_an_existing_file(tmp_path):
    """HDF5's own bytes stay those of creation; the count lies inside one page."""
    path = tmp_path / "a.h5"
    with writer_of(path, chunk_rows=64) as writer:
        with h5py.File(path, "r", locking=False) as file:
            places = [(d.id.get_offset(), d.id.get_storage_size()) for d in file.values() if d.name != "/prompt_ids"]
            assert file["committed"].id.get_offset() % 64 == 0
        before = np.fromfile(path, np.uint8)
        for i in range(200):
            writer.append(make_episode(i))
        writer.commit()
        after = np.fromfile(path, np.uint8)
    assert before.size == after.size
    for offset, size in places:
        before[offset : offset + size] = after[offset : offset + size] = 0
    np.testing.assert_array_equal(before, after)


# --- full disks


def test_file_size_limit_keeps_what_was_committed(tmp_path):
    body = """
        import resource
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
        path = Path(sys.argv[2])
        try:
            helpers.record(path, 3000, chunk_rows=256)
        except OSError as error:
            print(error.errno, error)
    """
    path = tmp_path / "a.h5"
    child = spawn(body, path, 2_000_000)
    out, err = child.communicate(timeout=30)
    assert not err and out.startswith(str(errno.EFBIG))
    assert str(path) in out and "--resume" in out and "File too large" in out
    assert os.listdir(tmp_path) == ["a.h5"]
    assert 0 < assert_first_episodes(path) < 3000
    record(path, 3000, chunk_rows=256)
    assert_holds(path, [make_episode(i) for i in range(3000)])
    compression = body.replace("helpers.record(path, 3000, chunk_rows=256)", "helpers.compress(path)")
    child = spawn(compression, path, 500_000)
    out, err = child.communicate(timeout=30)
    assert not err and child.returncode == 0 and out.startswith(str(errno.EFBIG))
    assert os.listdir(tmp_path) == ["a.h5"] and assert_first_episodes(path) == 3000
    out, err = spawn(body, tmp_path / "c.h5", 1000).communicate(timeout=30)  # not even room to create it
    assert not err and out.startswith(str(errno.EFBIG)) and not (tmp_path / "c.h5").exists()


def test_full_disk_then_commit_again(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    pwrite = os.pwrite
    with writer_of(path) as writer:
        for i in range(5):
            writer.append(make_episode(i))
        writer.commit()
        writer.append(make_episode(5))

        def full(fd, data, offset):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"5 episodes\) is intact.*free space.*a\.h5") as caught:
            writer.commit()
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
        assert assert_first_episodes(path) == 5
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:100], offset))  # short writes
        writer.commit()
    assert assert_first_episodes(path) == 6


# --- two processes


def test_second_writer_is_refused_and_readers_are_not(tmp_path):
    path = tmp_path / "a.h5"
    with writer_of(path, chunk_rows=16) as writer:
        seen = 0
        for i in range(60):
            writer.append(make_episode(i))
            committed = assert_first_episodes(path) if i % 6 == 0 else seen
            assert seen <= committed <= writer.episodes
            seen = committed
        assert seen > 0
        with h5py.File(path) as file:  # any reader, with HDF5's own locking
            assert file["committed"][1] == writer.committed_episodes
        with pytest.raises(LedeError, match=rf"{path} is being written .*pid {os.getpid()}"):
            writer_of(path, resume=True)
        out, _ = spawn(
            "from lede_env.errors import LedeError\ntry: helpers.record(sys.argv[2], 99)\n"
            "except LedeError as error: print(error)",
            path,
        ).communicate(timeout=30)
        assert f"pid {os.getpid()}" in out and str(path) in out
        with pytest.raises(LedeError, match="is being written"):
            compress(path)
    record(path, 61)
    assert assert_first_episodes(path) == 61


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_renamed_into_place_while_the_old_one_is_read(tmp_path, monkeypatch, mapped):
    path, episodes = tmp_path / "a.h5", [make_episode(i) for i in range(40)]
    record(path, 40)

    def committed_then_replaced(file):
        writer_of(tmp_path / "other.h5").close()
        os.replace(tmp_path / "other.h5", path)
        return trajectory_layout.committed(file)

    monkeypatch.setattr(trajectory_file, "committed", committed_then_replaced)
    found = read_trajectories(path, mapped=mapped)
    for name, values in expected_arrays(episodes).items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": {**ATTRIBUTES, "seed": 8}}, "seed is 7 in the file and 8 now"),
        ({"attributes": {**ATTRIBUTES, "environment_hash": "x"}}, 'environment_hash is "ab12" .* "x" now'),
        ({"attributes": {**ATTRIBUTES, "model_fingerprint": "m"}}, 'model_fingerprint is absent .* "m" now'),
        ({"features": FEATURES[:3]}, "features is .* in the file and .* now"),
        ({"prompt_ids": ["code-1", "other", "parse-3"]}, "'prose-é' in the file and 'other' now at 1"),
        ({"prompt_ids": PROMPTS[:2]}, "3 in the file and 2 now"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, change, message):
    path = tmp_path / "a.h5"
    record(path, 3)
    settings_now = {"attributes": ATTRIBUTES, "prompt_ids": PROMPTS, "features": FEATURES, **change}
    with pytest.raises(LedeError, match=rf"cannot resume {path}.*{message}"):
        TrajectoryWriter(path, **settings_now, resume=True)
    record(path, 4)  # and the refusal did no harm
    assert assert_first_episodes(path) == 4


def test_a_refusal_names_every_difference_but_the_software(tmp_path):
    path, versions = tmp_path / "a.h5", {"software": {"torch": "1"}}
    TrajectoryWriter(path, {**ATTRIBUTES, **versions}, PROMPTS, FEATURES).close()
    later = {**ATTRIBUTES, "software": {"torch": "2"}}
    with TrajectoryWriter(path, later, PROMPTS, FEATURES, resume=True) as writer:
        writer.append(make_episode(0))
    assert read_trajectories(path).attributes["software"] == {"torch": "1"}
    changed = {**later, "seed": 8, "environment_hash": "x"}
    with pytest.raises(LedeError, match=r"environment_hash is .*; seed is 7 in the file and 8 now") as refusal:
        TrajectoryWriter(path, changed, PROMPTS, FEATURES, resume=True)
    assert "torch" not in str(refusal.value)


def test_existing_file_closed_writer_and_bad_arguments(tmp_path):
    path = tmp_path / "a.h5"
    record(path, 2)
    with pytest.raises(LedeError, match=rf"{path} exists.*--resume"):
        writer_of(path)
    writer = writer_of(path, resume=True)
    writer.close()
    writer.close()
    with pytest.raises(LedeError, match="closed"):
        writer.append(make_episode(2))
    with pytest.raises(LedeError, match="chunk_rows is 0"):
        writer_of(tmp_path / "b.h5", chunk_rows=0)
    with pytest.raises(LedeError, match="features is empty"):
        TrajectoryWriter(tmp_path / "b.h5", {}, PROMPTS, ())
    with pytest.raises(LedeError, match=r"'policy' is .*JSON"):
        TrajectoryWriter(tmp_path / "b.h5", {"policy": object()}, PROMPTS, FEATURES)
    with pytest.raises(LedeError, match="'features' is"):
        TrajectoryWriter(tmp_path / "b.h5", {"features": ["x"]}, PROMPTS, FEATURES)
    with pytest.raises(LedeError, match="prompt id 3"):
        TrajectoryWriter(tmp_path / "b.h5", {}, [3], FEATURES)
    with pytest.raises(LedeError, match="unknown column 'reward'"):
        read_trajectories(path, ["reward"])
    with pytest.raises(LedeError, match="'actions' is not loaded"):
        read_trajectories(path, ["rewards"])["actions"]
    assert os.listdir(tmp_path) == ["a.h5"]


def test_bad_episodes_are_refused_and_leave_no_trace(tmp_path):
    good = make_episode(0, 5)
    none, both = np.zeros(5, bool), np.array([0, 0, 0, 0, 1], bool)
    bad = [
        (
            replace(good, rewards=good.rewards.astype(np.float64)),
            r"rewards is float64 \(5,\); expected .*float32",
        ),
        (replace(good, layer=good.layer[:3]), r"layer is uint8 \(3,\); expected .*\(5,\)"),
        (replace(good, observations=good.observations[:, :3]), r"observations is .*\(5, 3\)"),
        (replace(good, cost=[1.0] * 5), "cost is list"),
        (replace(good, final_observation=good.observations), "final_observation is"),
        (replace(good, terminals=none, timeouts=none), "exactly one"),
        (replace(good, terminals=both, timeouts=both), "exactly one"),
        (replace(good, terminals=~none, timeouts=none), "not before"),
        (replace(good, prompt_id=np.full(5, 3, np.uint32)), "prompt_id is 3; .*the 3 prompt_ids"),
        (replace(good, **{name: getattr(good, name)[:0] for name in COLUMNS}), "without rows"),
    ]
    with writer_of(tmp_path / "a.h5") as writer:
        for episode, message in bad:
            with pytest.raises(LedeError, match=message):
                writer.append(episode)
        writer.append(good)
    assert_holds(tmp_path / "a.h5", [good])


def test_broken_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    record(path, 50)
    whole = path.read_bytes()
    with pytest.raises(LedeError, match="no such file"):
        read_trajectories(tmp_path / "none.h5")
    for content in (b"", b"not HDF5 at all", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        for use in (read_trajectories, compress, lambda p: record(p, 60)):
            with pytest.raises(LedeError, match=r"a\.h5: .*truncated or corrupted"):
                use(path)
    path.write_bytes(whole)
    compress(path)
    with h5py.File(path, "r") as file:
        offset = file["rewards"].id.get_chunk_info(0).byte_offset
    packed = bytearray(path.read_bytes())
    packed[offset : offset + 40] = bytes(40)
    path.write_bytes(packed)
    with pytest.raises(LedeError, match="corrupted"):
        read_trajectories(path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["observations"] = np.zeros(3)
    with pytest.raises(LedeError, match="not a trajectory file"):
        read_trajectories(tmp_path / "b.h5")


def external_link(file, other):
    del file["rewards"]
    file["rewards"] = h5py.ExternalLink(other, "secret")


def soft_link(file, other):
    del file["rewards"]
    file["rewards"] = h5py.SoftLink("/cost")


def virtual_dataset(file, other):
    layout = h5py.VirtualLayout((len(file["rewards"]),), "<f4")
    layout[:] = h5py.VirtualSource(other, "secret", (len(file["rewards"]),))
    del file["rewards"]
    file.create_virtual_dataset("rewards", layout)


def external_storage(file, other):
    n = len(file["rewards"])
    del file["rewards"]
    file.create_dataset("rewards", (n,), "<f4", external=[(other, 0, 4 * n)])


def group(file, other):
    file.create_group("more")


def wrong_dtype(file, other):
    n = len(file["rewards"])
    del file["rewards"]
    file["rewards"] = np.zeros(n)


def missing(file, other):
    del file["rewards"]


def count_too_large(file, other):
    file["committed"][0] += 1


def starts_in_disorder(file, other):
    file["episode_starts"][2] = 0


def newer_version(file, other):
    file.attrs["format_version"] = "2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (external_link, r"'rewards' is a link \(ExternalLink\)"),
        (soft_link, r"'rewards' is a link \(SoftLink\)"),
        (virtual_dataset, "'rewards' keeps its data in other files"),
        (external_storage, "'rewards' keeps its data in other files"),
        (group, "'more' is not a dataset"),
        (wrong_dtype, "rewards is float64"),
        (missing, "corrupted .*rewards"),
        (count_too_large, "corrupted: observations"),
        (starts_in_disorder, "episode_starts do not rise"),
        (newer_version, "format version 2; this release reads 1"),
    ],
)
def test_tampered_files_are_refused(tmp_path, damage, message):
    path, other = tmp_path / "a.h5", tmp_path / "other.h5"
    record(path, 5)
    with h5py.File(other, "w") as file:
        file["secret"] = np.zeros(1000, "<f4")
    with h5py.File(path, "r+") as file:
        damage(file, str(other))
    with pytest.raises(LedeError, match=message):
        read_trajectories(path)


def test_format_is_pinned():
    """A change to the columns is a new format version."""
    layout = {name: dtype.str for name, dtype in (COLUMNS | trajectory_layout.TABLES).items()}
    assert trajectory_layout.FORMAT_VERSION == 1
    assert " ".join(f"{name}:{dtype}" for name, dtype in layout.items()) == (
        "observations:<f4 actions:|u1 rewards:<f4 terminals:|b1 timeouts:|b1 discount:<f4 layer:|u1 "
        "phase:|u1 token_index:<u4 prompt_id:<u4 accepted:|i1 forced:|b1 behaviour_logprob:<f4 cost:<f4 "
        "episode_starts:<u8 final_observations:<f4"
    )
