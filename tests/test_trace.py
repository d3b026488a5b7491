"""Traces: every recorded value against a plain recomputation, the file, and the environments that run on one."""

from __future__ import annotations

import os
from dataclasses import replace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

from lede_env.data import trace_file
from lede_env.data.trace_file import Trace, load_trace, relabel
from lede_env.data.trace_layout import ARRAYS, QUANTUM
from lede_env.engine.acceptance import Draws, Sampling, coupled_drafts, derive_seed, draw
from lede_env.engine.lookup import Lookup
from lede_env.engine.signals import EXIT_FEATURES, compute_features, raw_signals, trace_feature
from lede_env.envs.backends import LiveBackend
from lede_env.envs.trace_backend import TraceBackend, check_model, check_prompts
from lede_env.errors import LedeError
from lede_env.tasks import Prompt, load_prompts
from lede_env.tracing import record_trace, text_seed

LAYERS, TOKENS, SEED = (1, 2, 4), 16, 5
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(1.0), "filtered": Sampling(0.8, top_k=20, top_p=0.9)}


class Numbers:
    """A tokenizer for models that have none: prompts are written as token ids."""

    def encode(self, text):
        return [int(word) for word in text.split()]


def prompt(number, text, task="lm", split="train"):
    return Prompt(f"{task}/{number}", task, text, "", split)


PROMPTS = [
    prompt(0, "1 5 9 33"),
    prompt(1, "7", split="test"),
    prompt(2, " ".join(str(3 + i % 90) for i in range(20)), task="code"),
    prompt(3, "11 12 13 14 15 16 17", split="validation"),
    prompt(4, "50 60 70", task="parse"),
]


@pytest.fixture(scope="module")
def lm(random_model):
    """A model whose early drafts are often right, and wrong often enough; two tokens in three texts end it."""
    model, _ = random_model("llama-gqa", late_scale=0.3)
    return replace(model, tokenizer=Numbers(), eos_ids=(2, 40, 81))


@pytest.fixture(scope="module")
def traces(lm):
    """name of the sampling -> trace. Fewer lanes than texts, so that lanes are used again."""
    return {
        name: record_trace(
            lm, PROMPTS, LAYERS, TOKENS, sampling, SEED, samples=1 if sampling.greedy else 3, lanes=2, command="test"
        )
        for name, sampling in SAMPLINGS.items()
    }


@pytest.fixture(params=list(SAMPLINGS))
def trace(request, traces):
    return traces[request.param]


def sampling_of(trace):
    return Sampling(trace.header.temperature, trace.header.top_k, trace.header.top_p)


# --- the recorder


@torch.inference_mode()
def logits_after(lm, session, token, layers):
    """(len(layers), V) next-token logits at some layers after one more token: the slow and plain way."""
    session.feed([0], [token])
    rows = []
    for layer in layers:
        session.advance([0], [layer])
        rows.append(lm.logits(session.newest([0]).clone()))
    session.close_round(0, 1)
    return torch.cat(rows)


def branch_by_drafting(lm, ids, layer, sampling, seed, room):
    """What a branch holds of up to `room` drafts after `ids`, made as a decoder makes them, at one layer."""
    tokens, raw, matches, short, coins, draws = [], [], [], [], [], Draws(seed)
    with torch.inference_mode():
        session = lm.session(1, len(ids) + room)
        session.prefill(0, ids[:-1])
        pending = ids[-1]
        while len(tokens) < room:
            session.feed([0], [pending])
            session.advance([0], [layer])
            logits = lm.logits(session.newest([0]))
            guess, match = Lookup([*ids, *tokens]).guess()
            raw.append(raw_signals(logits, torch.tensor([guess]))[0].numpy())
            matches.append(match)
            pending = int(logits.argmax()) if sampling.greedy else draw(sampling.probabilities(logits)[0], draws.next())
            tokens.append(pending)
            short.append(float(logits.max() - logits[0, pending]))
            coins.append(1.0 if sampling.greedy else draws.next())
            if pending in lm.eos_ids:
                break
    return tokens, np.array(raw), matches, short, coins


def test_every_recorded_value_is_what_a_plain_recomputation_gives(lm, trace):
    sampling, samples = sampling_of(trace), trace.header.samples
    eos = branches = 0
    for text, (begin, end) in enumerate(zip(trace.starts[:-1], trace.starts[1:], strict=True)):
        ids, seed = lm.encode(PROMPTS[text // samples].text), text_seed(SEED, trace.prompt_ids[text // samples], 0)
        if text % samples == 0:
            assert trace.text_seeds[text] == seed
        draws, session = Draws(int(trace.text_seeds[text])), lm.session(1, len(ids) + TOKENS + 1)
        with torch.inference_mode():
            session.prefill(0, ids[:-1])
        for row in range(begin, end):
            logits = logits_after(lm, session, ids[-1], (*LAYERS, lm.n_layers))
            if sampling.greedy:
                *drafts, target = logits.argmax(-1).tolist()
                chance = keep = np.array(drafts) == target
            else:
                p = sampling.probabilities(logits)
                target = draw(p[-1], draws.next())
                drafts, chance = coupled_drafts(p[-1], p[:-1], target, draws.next())
                keep = np.array([min(1.0, float(p[-1, x] / own[x])) for x, own in zip(drafts, p[:-1], strict=True)])
            # A coin decides as speculative sampling would.
            right, coin = trace.accepted[row], trace.coin[row]
            assert (coin == 1).all() if sampling.greedy else (np.where(right, coin - keep, keep - coin) < 1e-4).all()
            assert trace.targets[row] == target and trace.drafts[row].tolist() == drafts
            assert trace.accepted[row].tolist() == [draft == target for draft in drafts]
            np.testing.assert_allclose(trace.accept_probability[row], chance, atol=1e-6)
            guess, match = Lookup(ids).guess()
            raw = raw_signals(logits, torch.full((len(logits),), guess)).numpy()
            assert trace.match[row] == match
            np.testing.assert_allclose(trace.raw[row], raw[:-1], atol=QUANTUM)
            np.testing.assert_allclose(trace.neg_log_p_max[row], -raw[-1, 0], atol=1e-6)
            short = logits[:-1].amax(-1) - logits[range(len(LAYERS)), drafts]
            np.testing.assert_allclose(trace.shortfall[row], short, atol=QUANTUM)
            assert not (trace.raw[row] / QUANTUM % 1).any()
            branches += check_branches(lm, trace, text, row, ids)
            ids = [*ids, target]
        eos += target in lm.eos_ids
        assert end - begin == TOKENS + 1 or target in lm.eos_ids
    assert 0 < eos < len(trace.text_seeds) and branches == len(trace.branch_starts) - 1 > 20


def check_branches(lm, trace, text, row, ids):
    """Compare the branches at a row with real drafting; returns how many there are."""
    position, found = int(row - trace.starts[text]), 0
    for candidate, layer in enumerate(LAYERS):
        draft, branch = int(trace.drafts[row, candidate]), trace.branch[row, candidate]
        room = min(11, TOKENS - position)
        if trace.accepted[row, candidate] or draft in lm.eos_ids or room == 0:
            assert branch == -1
            continue
        seed = derive_seed(int(trace.text_seeds[text]), position, layer)
        tokens, raw, matches, short, coins = branch_by_drafting(
            lm, [*ids, draft], layer, sampling_of(trace), seed, room
        )
        rows = slice(trace.branch_starts[branch], trace.branch_starts[branch + 1])
        assert trace.branch_tokens[rows].tolist() == tokens
        np.testing.assert_allclose(trace.branch_raw[rows], raw, atol=QUANTUM)
        assert trace.branch_match[rows].tolist() == matches
        np.testing.assert_allclose(trace.branch_shortfall[rows], short, atol=QUANTUM)
        np.testing.assert_allclose(trace.branch_coin[rows], coins, atol=QUANTUM)
        found += 1
    return found


def test_texts_depend_on_neither_the_other_prompts_nor_the_lanes(lm, trace):
    again = record_trace(
        lm, PROMPTS[2:4], LAYERS, TOKENS, sampling_of(trace), SEED, samples=trace.header.samples, lanes=7
    )
    samples = trace.header.samples
    rows = slice(trace.starts[2 * samples], trace.starts[4 * samples])
    np.testing.assert_array_equal(again.text_seeds, trace.text_seeds[2 * samples : 4 * samples])
    for name in ("targets", "drafts", "accepted"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name)[rows])
    np.testing.assert_allclose(again.raw, trace.raw[rows], atol=QUANTUM)
    wanted = trace.branch[rows].ravel()
    first = wanted[wanted >= 0][0]
    begin = trace.branch_starts[first]
    np.testing.assert_array_equal(again.branch_tokens, trace.branch_tokens[begin : begin + len(again.branch_tokens)])


def test_chunks_of_branches_change_nothing(lm, traces, monkeypatch):
    monkeypatch.setattr("lede_env.tracing.TOGETHER", 7)
    again = record_trace(lm, PROMPTS, LAYERS, TOKENS, SAMPLINGS["sampled"], SEED, samples=3)
    assert len(again.branch_starts) > 8
    np.testing.assert_array_equal(again.branch_tokens, traces["sampled"].branch_tokens)


def test_header_says_what_was_recorded(lm, traces):
    header = traces["filtered"].header
    assert (header.temperature, header.top_k, header.top_p, header.samples, header.seed) == (0.8, 20, 0.9, 3, SEED)
    assert (header.model_fingerprint, header.n_layers, header.vocab) == (lm.fingerprint, lm.n_layers, 97)
    assert header.eos_ids == lm.eos_ids and header.candidate_layers == LAYERS and header.max_new_tokens == TOKENS
    assert header.draft_cap == 12 and header.dtype == "float64" and header.command == "test"
    assert set(header.software) == {"python", "lede-env", "torch", "transformers", "numpy", "h5py"}


def test_recording_costs_few_forwards(tiny):
    trace = record_trace(tiny, load_prompts("parse", "test")[:2], (3, 4, 6, 8), 24, Sampling(), 0, lanes=2)
    prompts = sum(len(tiny.encode(prompt.text)) - 1 for prompt in load_prompts("parse", "test")[:2])
    forwards = trace.header.layer_calls / tiny.n_layers - prompts
    assert 1 <= forwards / len(trace.targets) <= 5


def test_progress_counts_texts(lm):
    counts = []
    record_trace(lm, PROMPTS[:3], LAYERS, 2, Sampling(), 0, lanes=2, progress=counts.append)
    assert counts == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_layers": (2, 6)}, "exit layer 6 is out of range"),
        ({"candidate_layers": (4, 2)}, r"candidate_layers=\(4, 2\) must be ascending"),
        ({"candidate_layers": ()}, "at least one"),
        ({"prompts": []}, "0 prompts"),
        ({"samples": 0}, "samples=0"),
        ({"lanes": 0}, "lanes=0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 300}, "leaves no room"),
        ({"samples": 2}, "samples=2 at temperature 0"),
    ],
)
def test_bad_arguments_of_the_recorder(lm, change, message):
    options = dict(prompts=PROMPTS[:1], candidate_layers=LAYERS, max_new_tokens=4, sampling=Sampling(), seed=0)
    with pytest.raises(LedeError, match=message):
        record_trace(lm, **{**options, **change})


# --- the file


def test_round_trip(tmp_path, trace):
    path = tmp_path / "deep" / "trace.h5"
    trace.save(path)
    again = load_trace(path)
    assert again.header == trace.header and again.digest == trace.digest
    assert (again.prompt_ids, again.prompt_digests) == (trace.prompt_ids, trace.prompt_digests)
    for name, dtype in ARRAYS.items():
        array = getattr(again, name)
        np.testing.assert_array_equal(array, getattr(trace, name))
        assert array.dtype == dtype and not array.flags.writeable
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first and os.listdir(path.parent) == ["trace.h5"]


def test_a_trace_without_branches_is_a_trace(tmp_path, lm):
    short = record_trace(lm, PROMPTS[:1], (5,), 1, Sampling(), 0)
    empty = replace(
        short, drafts=short.targets[:, None], accepted=np.ones_like(short.accepted), branch=np.full((2, 1), -1),
        accept_probability=np.ones((2, 1)), branch_starts=[0], branch_tokens=[], branch_raw=np.zeros((0, 12)),
        branch_match=[], branch_shortfall=[], branch_coin=[],
    )  # fmt: skip
    empty.save(tmp_path / "a.h5")
    assert load_trace(tmp_path / "a.h5").digest == empty.digest


def test_digest_is_of_the_arrays(traces):
    trace = traces["greedy"]
    assert replace(trace, header=replace(trace.header, command="another")).digest == trace.digest
    assert replace(trace, raw=trace.raw - 2 * QUANTUM).digest != trace.digest
    assert replace(trace, prompt_ids=("other", *trace.prompt_ids[1:])).digest != trace.digest


def test_broken_and_foreign_files_are_refused(tmp_path, traces):
    path = tmp_path / "a.h5"
    traces["greedy"].save(path)
    whole = path.read_bytes()
    with pytest.raises(LedeError, match="no such file"):
        load_trace(tmp_path / "none.h5")
    for content in (b"", b"not HDF5 at all", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(LedeError, match=r"a\.h5: .*truncated or corrupted"):
            load_trace(path)
    path.write_bytes(whole)
    with h5py.File(path, "r") as file:
        offset = file["raw"].id.get_chunk_info(0).byte_offset
    path.write_bytes(whole[:offset] + bytes(40) + whole[offset + 40 :])
    with pytest.raises(LedeError, match="corrupted"):
        load_trace(path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["raw"] = np.zeros(3)
    with pytest.raises(LedeError, match="not a trace"):
        load_trace(tmp_path / "b.h5")


def external_link(file, other):
    del file["raw"]
    file["raw"] = h5py.ExternalLink(other, "secret")


def virtual_dataset(file, other):
    layout = h5py.VirtualLayout(file["targets"].shape, "<i4")
    layout[:] = h5py.VirtualSource(other, "secret", file["targets"].shape)
    del file["targets"]
    file.create_virtual_dataset("targets", layout)


def wrong_dtype(file, other):
    values = file["raw"][:]
    del file["raw"]
    file["raw"] = values.astype(np.float64)


def numbers_for_strings(file, other):
    del file["prompt_ids"]
    file["prompt_ids"] = np.zeros(len(PROMPTS))


def group(file, other):
    del file["starts"]
    file.create_group("starts")


def missing(file, other):
    del file["branch"]


def surplus(file, other):
    file["more"] = np.zeros(3)


def newer_version(file, other):
    file.attrs["format_version"] = "4"


def attribute_missing(file, other):
    del file.attrs["vocab"]


def attribute_of_another_type(file, other):
    file.attrs["eos_ids"] = '["two"]'


def no_digest(file, other):
    del file.attrs["digest"]


def one_value(name, place, value):
    def damage(file, other):
        file[name][place] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (external_link, r"'raw' is a link \(ExternalLink\)"),
        (virtual_dataset, "'targets' keeps its data in other files"),
        (wrong_dtype, "raw is float64"),
        (numbers_for_strings, "prompt_ids is float64; expected strings"),
        (group, "'starts' is not a dataset"),
        (missing, r"\['branch'\] too many or too few"),
        (surplus, r"\['more'\] too many or too few"),
        (newer_version, "format version 4; this release reads 3"),
        (attribute_missing, "'vocab' is None; expected int"),
        (attribute_of_another_type, "'eos_ids' is"),
        (no_digest, "digest"),
        (one_value("starts", -1, 3), "starts do not span"),
        (one_value("starts", 1, 99), "texts do not have 1..17 positions"),
        (one_value("targets", 0, 97), r"targets has ids outside 0..96"),
        (one_value("targets", 0, 2), "accepted is not|goes on after an EOS"),
        (one_value("raw", (0, 0, 0), np.nan), "raw is out of its bounds"),
        (one_value("raw", (0, 0, 9), -3.0 - QUANTUM), "digest"),
        (one_value("branch_starts", 1, 0), "a branch is empty"),
        (one_value("neg_log_p_max", 0, 31.0), "neg_log_p_max is out"),
        (one_value("text_seeds", 0, 1), "digest"),
    ],
)
def test_tampered_files_are_refused(tmp_path, traces, damage, message):
    path, other = tmp_path / "a.h5", tmp_path / "other.h5"
    traces["sampled"].save(path)
    with h5py.File(other, "w") as file:
        file["secret"] = np.zeros(10_000, "<i4")
    with h5py.File(path, "r+") as file:
        damage(file, str(other))
    with pytest.raises(LedeError, match=message):
        load_trace(path)


def changed(trace, name, place, value):
    array = getattr(trace, name).copy()
    array[place] = value
    return replace(trace, **{name: array})


def test_traces_that_contradict_themselves_are_not_saved(tmp_path, traces):
    trace = traces["greedy"]
    right, wrong = np.argwhere(trace.accepted)[0], np.argwhere(trace.branch >= 0)[0]
    bad = [
        (changed(trace, "accept_probability", tuple(right), 0.5), "accept_probability is not accepted"),
        (changed(trace, "accepted", tuple(right), False), "accepted is not drafts == targets|accept_probability"),
        (changed(trace, "branch", tuple(wrong), -1), "branches are not where wrong drafts are"),
        (changed(trace, "branch", tuple(wrong), 1), "branches are not in order"),
        (replace(trace, branch_starts=trace.branch_starts[:-1]), "branches are not in order|do not span"),
        (replace(trace, branch_starts=[]), "branch_starts is empty"),
        (replace(trace, drafts=trace.drafts[:, :2]), r"drafts is \(\d+, 2\); expected"),
        (replace(trace, prompt_ids=("same",) * 5), "not distinct"),
        (replace(trace, header=replace(trace.header, candidate_layers=(1, 2, 6))), "not ascending within 1..5"),
        (replace(trace, header=replace(trace.header, samples=2)), r"text_seeds is \(5,\); expected \(10,\)"),
        (replace(trace, header=replace(trace.header, draft_cap=13)), "branch is too short"),
        (replace(trace, header=replace(trace.header, draft_cap=11)), "too long"),
        (replace(trace, header=replace(trace.header, max_new_tokens=TOKENS + 1)), "neither ends by an EOS nor"),
    ]
    for one, message in bad:
        with pytest.raises(LedeError, match=rf"a\.h5: corrupted: .*({message})"):
            one.save(tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, traces, monkeypatch):
    path = tmp_path / "a.h5"
    traces["greedy"].save(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        traces["sampled"].save(path)
    assert os.listdir(tmp_path) == ["a.h5"] and load_trace(path).digest == traces["greedy"].digest


def test_relabelled_for_a_twin(tmp_path, traces):
    trace = traces["greedy"]
    twin = relabel(trace, 32, (6, 11, 22), "llama2-7b")
    assert (twin.header.n_layers, twin.header.candidate_layers, twin.header.model_name) == (
        32,
        (6, 11, 22),
        "llama2-7b",
    )
    assert twin.header.model_fingerprint == trace.header.model_fingerprint and twin.digest == trace.digest
    twin.save(tmp_path / "a.h5")
    assert load_trace(tmp_path / "a.h5").header == twin.header
    for layers, message in (((6, 11), "cannot name"), ((6, 11, 32), r"within 1..31"), ((11, 6, 22), "ascending")):
        with pytest.raises(LedeError, match=message):
            relabel(trace, 32, layers, "llama2-7b")


def test_format_is_pinned():
    """A change to the arrays is a new format version."""
    assert trace_file.FORMAT_VERSION == 3 and trace_file.QUANTUM == 2**-15
    assert " ".join(f"{name}:{dtype.str}" for name, dtype in ARRAYS.items()) == (
        "text_seeds:<i8 starts:<i8 targets:<i4 neg_log_p_max:<f4 raw:<f4 match:<f4 drafts:<i4 shortfall:<f4 "
        "accept_probability:<f4 coin:<f4 accepted:|b1 branch:<i4 branch_starts:<i8 branch_tokens:<i4 "
        "branch_shortfall:<f4 branch_coin:<f4 branch_raw:<f4 branch_match:<f4"
    )


# --- the backend


def backend_of(trace: Trace, **change) -> TraceBackend:
    options = dict(
        prompt_ids=list(trace.prompt_ids), lanes=4, max_new_tokens=TOKENS, sampling=sampling_of(trace),
        candidate_layers=LAYERS, features=EXIT_FEATURES,
    )  # fmt: skip
    return TraceBackend(trace, **{**options, **change})


def test_tables_are_those_of_the_live_backend(lm, trace):
    """Both backends, asked for the same texts in another order of prompts and for fewer tokens."""
    order = [3, 0, 2]
    tokens = TOKENS - 3
    prompts = [PROMPTS[index] for index in order]
    common = dict(lanes=3, max_new_tokens=tokens, sampling=sampling_of(trace), candidate_layers=LAYERS)
    live = LiveBackend(lm, prompts, features=EXIT_FEATURES, **common)
    replayed = TraceBackend(trace, [prompt.id for prompt in prompts], features=EXIT_FEATURES, **common)
    assert replayed.prompt_ids == live.prompt_ids
    last = trace.header.samples - 1
    seeds = np.array([text_seed(SEED, prompt.id, last) for prompt in prompts])
    for table in (live, replayed):
        table.start_many(np.arange(3), np.arange(3), seeds)
    for lane in range(3):
        position, over = 0, False
        while not over:
            for table in (live, replayed):
                table.ensure(lane, position)
            one, other = live.base[lane] + position, replayed.base[lane] + position
            for name in ("accepted", "drafts", "targets", "ends"):
                assert np.array_equal(getattr(live, name)[one], getattr(replayed, name)[other]), name
            np.testing.assert_allclose(live.observations[one], replayed.observations[other], atol=1e-4)
            assert replayed.known[lane] > position
            position, over = position + 1, live.ends[one] or position == tokens


def test_observations_of_every_position_at_once(trace):
    backend = backend_of(trace, features=EXIT_FEATURES)
    for begin, end in zip(trace.starts[:-1], trace.starts[1:], strict=True):
        expected = compute_features(
            EXIT_FEATURES,
            trace.raw[begin:end],
            layer=np.array(LAYERS) / 6,
            trace=trace_feature(trace.neg_log_p_max[begin:end])[:, None],
            match=trace.match[begin:end, None],
        )
        np.testing.assert_array_equal(backend.observations[begin:end], expected)
    assert backend.accepted is trace.accepted and backend.targets is trace.targets


def test_seeds_choose_samples(traces):
    trace = traces["sampled"]
    backend = backend_of(trace)
    for index in range(len(PROMPTS)):
        for sample in range(3):
            text = index * 3 + sample
            backend.start(1, index, int(trace.text_seeds[text]))
            assert backend.base[1] == trace.starts[text]
            backend.start(2, index, 3 * 2**60 + sample)
            assert backend.base[2] == trace.starts[text]


def test_prompts_by_task_and_split(traces):
    trace = traces["greedy"]
    assert trace.prompts_of() == ["lm/0", "code/2", "parse/4"]
    assert trace.prompts_of("lm", "all") == ["lm/0", "lm/1", "lm/3"]
    assert trace.prompts_of(["code", "lm"], "train") == ["lm/0", "code/2"]
    with pytest.raises(LedeError, match="no prompts of task 'code' in split 'test'; it has: code train, lm test"):
        trace.prompts_of("code", "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ["lm/0", "lm/9"]}, r"lacks 1 of the 2 prompts asked for \(lm/9\)"),
        ({"prompt_ids": []}, "lacks 0 of the 0"),
        ({"max_new_tokens": TOKENS + 1}, f"max_new_tokens={TOKENS + 1}, but .* {TOKENS} tokens at most"),
        ({"sampling": Sampling(0.7)}, r"recorded with Sampling\(temperature=0.0.*not Sampling\(temperature=0.7"),
        ({"candidate_layers": (1, 2)}, r"candidate layers \(1, 2, 4\), not \(1, 2\)"),
    ],
)
def test_traces_recorded_otherwise_are_refused(traces, change, message):
    with pytest.raises(LedeError, match=message):
        backend_of(traces["greedy"], **change)


def test_traces_of_other_models_and_prompts_are_refused(lm, traces):
    trace = traces["greedy"]
    check_model(trace, lm.name, lm.fingerprint)
    with pytest.raises(LedeError, match=rf"fingerprint {lm.fingerprint}\), but 'tiny' has fingerprint 0123"):
        check_model(trace, "tiny", "0123")
    check_prompts(trace, [*PROMPTS, prompt(9, "1")])
    with pytest.raises(LedeError, match="'lm/0' has changed"):
        check_prompts(trace, [prompt(0, "1 5 9 34")])


# --- live equals trace, in the environments


def near_ties(lm, trace, prompts):
    """Texts (booleans) somewhere in which two tokens' logits lie within 1e-4: rounding alone may choose another."""
    ties = []
    for text, (begin, end) in enumerate(zip(trace.starts[:-1], trace.starts[1:], strict=True)):
        ids = lm.encode(prompts[text // trace.header.samples].text)
        session = lm.session(1, len(ids) + int(end - begin))
        gaps = []
        with torch.inference_mode():
            session.prefill(0, ids[:-1])
            for token in [ids[-1], *trace.targets[begin : end - 1].tolist()]:
                top = logits_after(lm, session, token, (*trace.header.candidate_layers, lm.n_layers)).topk(2).values
                gaps.append(float((top[:, 0] - top[:, 1]).min()))
        ties.append(min(gaps) < 1e-4)
    return np.array(ties)


@pytest.fixture(scope="module", params=[0.0, 0.6])
def recorded(request, tiny):
    """A trace of the embedded model, and the prompts of it that have no near tie."""
    prompts = load_prompts("parse", "test")[:4]
    samples = 1 if request.param == 0.0 else 2
    layers = gym.spec("LEDE-Tiny-v0").kwargs["candidate_layers"]
    trace = record_trace(tiny, prompts, layers, 10, Sampling(request.param), SEED, samples=samples, lanes=4)
    clear = ~near_ties(tiny, trace, prompts).reshape(-1, samples).any(1)
    assert clear.sum() >= 2  # of 4; the share over many episodes is near 1
    return trace, [prompt.id for prompt, good in zip(prompts, clear, strict=True) if good]


def environments(trace, make, lanes, **kwargs):
    """The live environment, and the same one on the trace."""
    header = trace.header
    options = dict(task="parse", split="test", max_new_tokens=header.max_new_tokens, temperature=header.temperature,
                   features="extended", device="cpu")  # fmt: skip
    live, replayed = (make("LEDE-Tiny-v0", **options, **kwargs).unwrapped for _ in range(2))
    names = list(trace.prompt_ids)
    table = TraceBackend(
        trace, names, lanes, header.max_new_tokens, sampling_of(trace), header.candidate_layers, EXIT_FEATURES
    )
    replayed._mdp = replace(replayed._mdp, backend=table)
    replayed._table = table
    replay_of(live, table)
    return live, replayed


def test_vector_environments_agree_step_by_step(recorded):
    """Random actions, float32: observation, reward, flags and every info field."""
    trace, names = recorded
    live, replayed = environments(trace, gym.make_vec, 3, num_envs=3, autoreset_mode="Disabled")
    replayed._names = np.array(trace.prompt_ids, dtype=object)
    rng = np.random.default_rng(0)
    for begin in range(len(names)):
        chosen = [names[(begin + lane) % len(names)] for lane in range(3)]
        assert_same(*(envs.reset(seed=begin, options={"prompt_ids": chosen}) for envs in (live, replayed)))
        over = np.zeros(3, bool)
        while not over.all():
            actions = rng.integers(2, size=3)
            one, other = live.step(actions), replayed.step(actions)
            assert_same(one, other)
            over |= one[2] | one[3]


def test_single_environments_agree_step_by_step(recorded):
    trace, names = recorded
    live, replayed = environments(trace, gym.make, 1)
    replayed.prompt_ids = list(trace.prompt_ids)
    rng = np.random.default_rng(0)
    for seed, name in enumerate(names):
        assert_same(*(env.reset(seed=seed, options={"prompt_id": name}) for env in (live, replayed)))
        over = False
        while not over:
            action = rng.integers(2)
            one, other = live.step(action), replayed.step(action)
            assert_same(one, other)
            over = one[2] or one[3]


def replay_of(live, table):
    """Has the live environment decode with the seeds of the texts that the trace would choose."""
    start, known = live._table.start, live._table.prompt_ids

    def start_recorded(lane, prompt, seed):
        place = table.prompt_ids.index(known[prompt])
        text = table.texts(np.array([place]), np.array([seed]))[0]
        start(lane, prompt, int(table.trace.text_seeds[text]))

    live._table.start = start_recorded


def assert_same(one, other):
    """Equal steps or resets; observations to 1e-4."""
    np.testing.assert_allclose(one[0], other[0], atol=1e-4)
    for left, right in zip(one[1:-1], other[1:-1], strict=True):
        np.testing.assert_array_equal(left, right)

    def compare(left, right):
        assert left.keys() == right.keys()
        for key in left:
            if isinstance(left[key], dict):
                compare(left[key], right[key])
            else:
                np.testing.assert_array_equal(left[key], right[key], err_msg=key)

    compare(one[-1], other[-1])
