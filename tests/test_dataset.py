"""Datasets: the arrays and their parts, finding them by name, the shipped ones, and checks that can fail."""

from __future__ import annotations

import json
import mmap
import re
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

import lede_env
from lede_env import cli
from lede_env.data import dataset as dataset_module
from lede_env.data.dataset import Dataset, read_dataset
from lede_env.data.trajectory_file import COLUMNS, checksum, read_trajectories, rewrite
from lede_env.errors import LedeError
from lede_env.offline import loading
from lede_env.offline.making import make, verify
from lede_env.offline.parts import Part, part_files, write_index
from lede_env.offline.scoring import Bench
from lede_env.offline.tiers import NAMES, PROBLEMS, SHIPPED, TIERS, recipe_of
from lede_env.tasks import SPLITS

FEW = 9  # episodes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small file of any name."""
    folder, files = tmp_path_factory.mktemp("made"), {}

    def get(name):
        if name not in files:
            files[name] = make(recipe_of(name), folder / f"{name}.h5", FEW)
        return files[name]

    return get


def run(monkeypatch, *command):
    monkeypatch.setattr("sys.argv", ["lede", "dataset", *map(str, command)])
    cli.main()


# --- the arrays


def test_rows_align_as_the_docstring_says(made):
    dataset = read_dataset(made("tiny-draft/random-v0"))
    following = dataset.next_observations
    episodes = list(dataset.episodes())
    assert dataset.n_episodes == len(episodes) == FEW and len(dataset) == sum(map(len, episodes))
    for number, episode in enumerate(episodes):
        begin, end = dataset.bounds[number : number + 2]
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(episode, name), dataset[name][begin:end])
        np.testing.assert_array_equal(following[begin : end - 1], episode.observations[1:])
        np.testing.assert_array_equal(following[end - 1], episode.final_observation)
        assert dataset.returns[number] == pytest.approx(episode.rewards.sum(dtype=float))
        assert (episode.terminals | episode.timeouts).nonzero()[0].tolist() == [len(episode) - 1]


def test_parts_are_disjoint_and_make_up_the_whole(made):
    whole = read_dataset(made("tiny/random-v0"))
    parts = whole.split()
    splits = {name: set(members) for name, members in whole.attributes["prompt_splits"].items()}
    assert set(parts) <= set(SPLITS) and len(parts) > 1
    assert sum(part.n_rows for part in parts.values()) == whole.n_rows
    for name, part in parts.items():
        assert set(part["prompt_id"].tolist()) <= splits[name]
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["validation"]
    first, *others = parts.values()
    joined = first.concat(*others)
    assert joined.n_episodes == FEW and sorted(joined.returns) == sorted(whole.returns)
    again = joined.split()
    for name, part in parts.items():
        assert checksum(again[name].arrays) == checksum(part.arrays)


def test_take_filter_select_concat(made):
    dataset = read_dataset(made("tiny/random-v0"))
    taken = dataset.take([5, 0])
    np.testing.assert_array_equal(taken["rewards"], np.concatenate(
        [dataset["rewards"][dataset.bounds[i] : dataset.bounds[i + 1]] for i in (5, 0)]))  # fmt: skip
    np.testing.assert_array_equal(taken["final_observations"], dataset["final_observations"][[5, 0]])
    long = dataset.filter(lambda episode: len(episode) > np.median(dataset.lengths))
    assert 0 < long.n_episodes < FEW and long.lengths.min() > np.median(dataset.lengths)
    none = dataset.filter(lambda episode: False)
    assert (none.n_episodes, none.n_rows, none.returns.size, none.split()) == (0, 0, 0, {})
    paper = dataset.select("paper")
    assert paper.features == ("confidence", "entropy", "trace")
    column = dataset.features.index("entropy")
    np.testing.assert_array_equal(paper["observations"][:, 1], dataset["observations"][:, column])
    assert paper["final_observations"].shape == (FEW, 3)
    other = read_dataset(made("tiny-t0.6/random-v0"))
    with pytest.raises(LedeError, match=r"temperature is \[0.0, 0.6\]"):
        dataset.concat(other)
    with pytest.raises(LedeError, match="needs \\['margin'\\]"):
        paper.select(("margin",))


def test_prompts_keep_their_names_when_datasets_are_joined(made):
    one = read_dataset(made("tiny/random-v0"))
    order = np.random.default_rng(0).permutation(len(one.prompt_ids))
    shuffled = Dataset(
        one.arrays | {"prompt_id": np.argsort(order).astype("u4")[one["prompt_id"]]},
        {**one.attributes, "prompt_splits": {
            name: np.argsort(order)[members].tolist() for name, members in one.attributes["prompt_splits"].items()}},
        [one.prompt_ids[i] for i in order],
        one.n_rows,
    )  # fmt: skip
    joined = one.concat(shuffled)
    named = np.array(joined.prompt_ids)[joined["prompt_id"]]
    np.testing.assert_array_equal(named[: one.n_rows], named[one.n_rows :])
    assert joined.attributes["prompt_splits"] == one.attributes["prompt_splits"]


def test_large_files_are_mapped(made, tmp_path, monkeypatch):
    plain, packed = tmp_path / "plain.h5", made("tiny/random-v0")
    shutil.copy(packed, plain)
    rewrite(plain, {}, compressed=False)
    monkeypatch.setattr(dataset_module, "MAPPED_BYTES", 1)
    for path, is_mapped in ((plain, True), (packed, False)):
        dataset = read_dataset(path)
        assert isinstance(dataset["observations"].base, mmap.mmap) is is_mapped
        assert checksum(dataset.arrays) == dataset.attributes["checksum"]


# --- names


def test_names_and_where_they_are_found(made, tmp_path, monkeypatch):
    name, folder = "tiny-t0.6/static-v0", tmp_path / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LEDE_DATA", str(folder))
    assert loading.at_hand(name) is None
    (folder / name).parent.mkdir(parents=True)
    shutil.copy(made(name), folder / f"{name}.h5")
    assert loading.find(name) == folder / f"{name}.h5"
    dataset = lede_env.load_dataset(name, features="paper")
    assert dataset.attributes["dataset"] == name and dataset.features == ("confidence", "entropy", "trace")
    assert set(dataset["prompt_id"].tolist()) <= set(dataset.attributes["prompt_splits"]["train"])
    assert lede_env.load_dataset(folder / f"{name}.h5", split="all").n_episodes == FEW


def test_a_name_that_is_nowhere_is_made_and_said(made, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loading, "CHECKOUT", tmp_path / "none")
    monkeypatch.setattr("lede_env.offline.making.default_episodes", lambda recipe: FEW)
    dataset = lede_env.load_dataset("tiny/random-v0", split="all")
    said = " ".join(capfd.readouterr().err.split())
    assert "making it from the shipped trace" in said
    assert checksum(dataset.arrays) == read_dataset(made("tiny/random-v0")).attributes["checksum"]
    lede_env.load_dataset("tiny/random-v0")
    assert not capfd.readouterr().err  # kept


def test_bad_names_and_parts(made, tmp_path):
    with pytest.raises(LedeError, match="neither a file nor a dataset; the names are: tiny/random-v0"):
        lede_env.load_dataset("tiny/rnd-v0")
    with pytest.raises(LedeError, match="split='training' is unknown"):
        lede_env.load_dataset("tiny/random-v0", split="training")
    only = tmp_path / "test.h5"
    shutil.copy(made("tiny/random-v0"), only)
    with h5py.File(only, "r+") as file:
        file.attrs["prompt_splits"] = json.dumps({"train": [], "validation": [], "test": list(range(331))})
    with pytest.raises(LedeError, match="no episodes of split 'train', only of test"):
        lede_env.load_dataset(only)


# --- making


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_what_it_says(made, name):
    content = read_dataset(made(name))
    prefix, tier = name.split("/")
    problem = PROBLEMS[prefix]
    assert content.attributes["env_id"] == problem.env_id and content.attributes["temperature"] == problem.temperature
    chances = np.exp(content["behaviour_logprob"])
    deterministic = tier == "oracle-v0"
    assert content.attributes["confounded"] is deterministic
    assert np.all(chances == 1) if deterministic else 0.04 < chances.min() <= 0.5
    assert len(content.attributes["behaviours"]) == len(content.attributes["behaviour_digests"])


def test_log_probabilities_are_those_of_the_policy_that_acted(made):
    name = "tiny/mixed-v0"
    recipe, dataset = recipe_of(name), read_dataset(made(name))
    assert len(recipe.behaviours) == 4
    for number, episode in enumerate(dataset.episodes()):
        policy = recipe.behaviours[number % 4]
        columns = [dataset.features.index(feature) for feature in policy.features]
        exits = policy.exit_probability(episode.observations[:, columns])
        expected = np.log(np.where(episode.actions == 1, exits, 1 - exits))
        np.testing.assert_allclose(episode.behaviour_logprob, expected, atol=1e-6)


def test_parts_of_the_numbers_are_the_whole(made, tmp_path):
    recipe, whole = recipe_of("tiny-draft/mixed-v0"), read_dataset(made("tiny-draft/mixed-v0"))
    parts = [read_dataset(make(recipe, tmp_path / f"{first}.h5", n, first=first)) for first, n in ((0, 4), (4, 5))]
    joined = parts[0].concat(parts[1])
    assert checksum(joined.arrays) == checksum(whole.arrays)
    found = verify(tmp_path / "4.h5")
    assert found and found.rebuilt == found.checksum


def test_making_is_refused_or_goes_on(made, tmp_path):
    recipe, path = recipe_of("tiny/random-v0"), tmp_path / "a.h5"
    make(recipe, path, 4)
    assert make(recipe, path, 4, resume=True) == path  # whole
    with pytest.raises(LedeError, match="with 4 episodes, and not the 5"):
        make(recipe, path, 5, resume=True)
    with pytest.raises(LedeError, match=r"\(dataset, seed, behaviour_digests differ\)"):
        make(recipe_of("tiny/static-v0"), path, 4, resume=True)
    with pytest.raises(LedeError, match="exists"):
        make(recipe, path, 4)


# --- checking


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_what_their_recipes_give(name):
    path = loading.CHECKOUT / f"{name}.h5"
    found = verify(path)
    assert found, str(found)
    assert found.rebuilt == found.recorded == found.checksum
    card = path.with_suffix(".md").read_text()
    assert found.checksum in card and f"lede dataset make {name}" in card
    assert found.checksum[:12] in (loading.CHECKOUT / "README.md").read_text()
    assert path.stat().st_size < 5e6


@pytest.mark.parametrize("damage", ["rewards", "behaviour_logprob", "actions"])
def test_altered_files_are_found_out(made, tmp_path, monkeypatch, capfd, damage):
    path = tmp_path / "altered.h5"
    shutil.copy(made("tiny/random-v0"), path)
    with h5py.File(path, "r+") as file:
        values = file[damage][:]
        values[7] = 1 - values[7] if damage == "actions" else values[7] + 0.5
        file[damage][:] = values
    if damage != "actions":  # a liar who knows his trade
        rewrite(path, {"checksum": checksum(read_trajectories(path).arrays)}, compressed=True)
    found = verify(path)
    assert not found and found.rebuilt != found.checksum
    assert bool(found.replay) is (damage == "behaviour_logprob")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "verify", path)
    assert ended.value.code == 2 and "WRONG" in capfd.readouterr().out


def swap_prompt_ids(file):
    ids = file["prompt_ids"][:]
    file["prompt_ids"][:2] = ids[1::-1]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda file: file.attrs.__setitem__("dataset", '"tiny/rendom-v0"'),
            "copy.h5 says .* 'tiny/rendom-v0' is unkn",
        ),
        (swap_prompt_ids, "prompt_ids differ, .* now at 0"),
        (lambda file: file.attrs.pop("model_name"), "attribute 'model_name' is None"),
        (lambda file: file.attrs.pop("first_episode"), "attribute 'first_episode' is None"),
        (lambda file: file.attrs.__setitem__("first_episode", '"two"'), "attribute 'first_episode' is 'two'"),
    ],
)
def test_files_that_cannot_be_verified(made, tmp_path, alter, message, named):
    path = copy_of(made("tiny/random-v0"), tmp_path, named)
    with h5py.File(path, "r+") as file:
        alter(file)
    if not named and message == "attribute 'first_episode' is None":  # as `lede record` writes them
        assert verify(path)
        return
    with pytest.raises(LedeError, match=message):
        verify(path)


def set_splits(file):
    splits = json.loads(file.attrs["prompt_splits"])
    file.attrs["prompt_splits"] = json.dumps({**splits, "test": [999]})


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (set_splits, "is damaged, its prompts or their splits .index 999 is out of bounds"),
        (lambda file: file.attrs.pop("candidate_layers"), "does not say its candidate_layers"),
        (lambda file: file.attrs.pop("mdp"), "does not say its mdp"),
        (lambda file: file.attrs.__setitem__("seed", 7), "corrupted: attribute 'seed' is not text"),
        (lambda file: file.attrs.__setitem__(b"s\xe3d", "7"), r"attribute b's\\xe3d' is not text"),
    ],
)
def test_damaged_headers_end_in_one_line(made, tmp_path, monkeypatch, capfd, alter, message):
    path = copy_of(made("tiny/random-v0"), tmp_path, named=True)
    with h5py.File(path, "r+") as file:
        alter(file)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "info", path)
    said = capfd.readouterr().err
    assert ended.value.code == 2 and re.search(message, said) and said.count("\n") == 1


@pytest.mark.parametrize("value", [np.nan, -np.inf, 3.0])
def test_log_probabilities_that_no_policy_has_are_found_out(made, tmp_path, value):
    path = copy_of(made("tiny/random-v0"), tmp_path, named=False)
    assert verify(path)
    with h5py.File(path, "r+") as file:
        file["behaviour_logprob"][50] = value
    found = verify(path)
    assert not found and (found.replay.difference.column, found.replay.difference.row) == ("behaviour_logprob", 50)


@pytest.mark.parametrize("name", ["behaviour_digests", "block"])
def test_altered_headers_of_named_files_are_found_out(made, tmp_path, name):
    path = copy_of(made("tiny/random-v0"), tmp_path, named=True)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = json.dumps(["nonsense"])
    found = verify(path)
    assert not found and found.altered == (name,) and f"other {name}" in str(found)


def copy_of(path, folder, named):
    copy = shutil.copy(path, folder / "copy.h5")
    if not named:
        with h5py.File(copy, "r+") as file:
            del file.attrs["dataset"], file.attrs["checksum"]
    return copy


def test_parts_and_their_index(tmp_path, monkeypatch, capfd):
    name, parts = "tiny/random-v0", []
    for first, episodes in ((0, 3), (3, 2)):
        path = make(recipe_of(name), tmp_path / f"part-{first}.h5", episodes, first=first)
        content = read_trajectories(path, columns=())
        parts.append(Part(path.name, first, episodes, content.n_rows, content.attributes["checksum"]))
    write_index(tmp_path, name, parts[::-1])
    assert lede_env.load_dataset(tmp_path, split="all").n_episodes == 5
    run(monkeypatch, "verify", tmp_path)
    assert capfd.readouterr().out.count(": good") == 2
    for bad, message in (
        ([parts[0], replace(parts[1], rows=1)], "holds .* and .* says"),
        ([parts[0], replace(parts[1], file=parts[0].file)], "holds .* and .* says"),
        (parts[1:], "lacks parts"),
        ([], "lacks parts"),
    ):
        write_index(tmp_path, name, bad)
        with pytest.raises(LedeError, match=message):
            part_files(tmp_path)
    for text in ("{", "[]", "{}", '{"parts": [{}]}', '{"parts": 3}', '{"parts": []}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(LedeError, match="is not an index of parts"):
            lede_env.load_dataset(tmp_path)


def test_nothing_to_verify_is_an_error_and_nothing_is_made(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loading, "CHECKOUT", tmp_path / "none")
    for names, message in (
        ((), "nothing to verify"),
        (("all",), "nothing to verify"),
        (("tiny/random-v0",), "is not at hand"),
        (("none.h5",), "neither a file nor a dataset"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, "verify", *names)
        assert ended.value.code == 2 and message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_recording_of_the_trace_is_named(made, tmp_path):
    path = tmp_path / "old.h5"
    shutil.copy(made("tiny/random-v0"), path)
    rewrite(path, {"trace_digest": "0123"}, compressed=True)
    with pytest.raises(LedeError, match="another recording of tiny-greedy-v0; make it again"):
        verify(path)


@pytest.mark.parametrize("prefix", ["tiny", "tiny-draft"])
def test_scores_rise_from_tier_to_tier(prefix):
    bench = Bench.of(PROBLEMS[prefix], "test")
    ladder = ("random", "static", "medium", "expert", "oracle")
    scores = [bench.score(bench.recipe_returns(recipe_of(f"{prefix}/{tier}-v0"))) for tier in ladder]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)
    assert (scores[0], scores[-1]) == (pytest.approx(0), pytest.approx(100))


# --- the command line


def test_the_commands(made, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    run(monkeypatch, "list")
    listed = capfd.readouterr().out
    assert all(tier in listed for tier in TIERS) and "tiny-draft/mixed-v0" in listed
    path = tmp_path / "a.h5"
    run(monkeypatch, "make", "tiny/static-v0", "--episodes", 5, "--out", path, "--uncompressed")
    assert read_dataset(path).n_episodes == 5
    run(monkeypatch, "verify", path)
    assert "good" in capfd.readouterr().out
    run(monkeypatch, "info", path, "--json")
    facts = json.loads(capfd.readouterr().out)
    assert facts["episodes"] == 5 and facts["dataset"] == "tiny/static-v0"
    assert sum(facts["exit_layers"].values()) == pytest.approx(1, abs=1e-3)
    run(monkeypatch, "info", path)
    assert "fingerprint" in capfd.readouterr().out
