"""The programs behind the paper's tables and Figure 2: what their rows promise, on a run of seconds."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks import learning_dynamics, paper_tables
from benchmarks.harness import Player, rouge_l, time_methods
from benchmarks.paper_cells import cells, paper_cell
from benchmarks.paper_report import UNLIKE, pool, speed_of
from benchmarks.paper_results import Results
from benchmarks.paper_tables import Args, task_name, task_sources
from benchmarks.tuning import GRIDS, MACHINE, Bench, Trial, score, score_static, search
from lede_env import Autoregressive, DraftVerify, LayerSkip, LedeError, generate, load_policy, load_prompts
from lede_env.decoding.strategies import STRATEGIES
from lede_env.engine.cost_model import load_cost_model

METHODS = ("autoregressive", "layerskip", "draft_verify", "lede")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A run of two tasks, one of them a file that names no splits."""
    folder = tmp_path_factory.mktemp("paper_tables")
    snips = folder / "snips_parse.jsonl"
    rows = [
        {
            "id": f"snips/{i}",
            "task": "parse",
            "prompt": f"### Utterance:\nplay song {i}\n\n### Parse:\n",
            "reference": "x",
        }
        for i in range(20)
    ]
    snips.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Args(
        tasks=("lm", str(snips)),
        methods=METHODS,
        ablation=True,
        max_new_tokens=8,
        prompts=2,
        validation_prompts=1,
        repeats=1,
        finalists=1,
        machine_costs="tiny-cpu",
        cost_models=("tiny-cpu",),
        device="cpu",
        threads=1,
        out=folder / "results",
    )


@pytest.fixture(scope="module")
def rows(arguments):
    return paper_tables.main(arguments)


@pytest.fixture
def bench(tiny):
    def make(temperature=0.0):
        costs = {MACHINE: load_cost_model("tiny-cpu")}
        return Bench(tiny, load_policy("tiny"), 8, temperature, 0, costs, Console(quiet=True))

    return make


def stored(arguments):
    return json.loads((arguments.out / "paper_tables-tiny-ablation.json").read_text())


def test_a_row_for_every_method_task_and_cost_model(rows):
    found = [(row["task"], row["tuned for"], row["method"]) for row in rows]
    names = [
        "Autoregressive",
        "LayerSkip",
        "DraftVerify",
        "LEDE",
        "LEDE w/o dynamic exit",
        "LEDE w/o adaptive drafting",
    ]
    tasks = ("lm", "SNIPS", "all tasks")
    assert found == [(task, costs, name) for task in tasks for costs in (MACHINE, "tiny-cpu") for name in names]


def test_lossless_and_relative_to_the_baselines(rows, tiny):
    for row in rows:
        assert row.get(UNLIKE, 0) == 0
        ones = {"Autoregressive": "speedup", "LayerSkip": "over static", "LEDE": "LEDE over it"}
        if row["method"] in ones:
            assert row[ones[row["method"]]] == pytest.approx(1)
        if row["method"] == "Autoregressive":
            assert row["modelled"] == pytest.approx(1)
        else:
            assert min(tiny.candidate_layers) <= row["E"] <= max(tiny.candidate_layers)


def test_test_prompts_are_not_tuned_on(rows, arguments):
    for record in stored(arguments)["tasks"].values():
        assert len(record["test_ids"]) == 2 and len(record["validation_ids"]) == 1
        assert not set(record["test_ids"]) & set(record["validation_ids"])


def test_static_settings_cover_every_candidate_and_length(rows, arguments, tiny):
    for record in stored(arguments)["tasks"].values():
        tried = {trial["setting"] for trial in record["tried"] if trial["method"] == "layerskip"}
        assert tried == {f"e={e} d={d}" for e in tiny.candidate_layers for d in range(1, 13)}


def test_snips_is_called_snips_and_has_no_cells_of_the_paper(rows, arguments):
    for row in rows:
        assert ("paper" in row) <= (row["task"] != "SNIPS")
    for suffix in ("csv", "md"):
        text = (arguments.out / f"paper_tables-tiny-ablation.{suffix}").read_text()
        assert "SNIPS" in text and "topv2" not in text.lower()


def test_cells_say_whose_they_are(rows):
    lede = next(row for row in rows if (row["task"], row["method"]) == ("lm", "LEDE"))
    assert lede["paper"] == "the paper's Llama3.2-1B on cnn_dm_lm, T = 0.6" and lede["paper: E"] == 4.62
    ablated = next(row for row in rows if (row["task"], row["method"]) == ("all tasks", "LEDE w/o dynamic exit"))
    assert ablated["paper: speedup"] == 1.99


def test_finished_tasks_are_not_run_again(rows, arguments, monkeypatch):
    def never(*_):
        raise AssertionError("a finished task ran again")

    monkeypatch.setattr(paper_tables, "run_task", never)
    assert str(paper_tables.main(arguments)) == str(rows)  # as text: NaN is not itself


def test_other_settings_do_not_mix(rows, arguments):
    with pytest.raises(LedeError, match=r"prompts=2, now 3; give another --out"):
        paper_tables.main(paper_tables.replace(arguments, prompts=3))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {"seed'], ids=repr)
def test_a_damaged_file_is_told(tmp_path, content):
    (tmp_path / "tables.json").write_text(content)
    with pytest.raises(LedeError, match=r"tables\.json is damaged .*; give another --out, or delete it"):
        Results(tmp_path / "tables.json", "tiny", {"seed": 0})


def test_acceptance_scores_a_static_setting_as_decoding_it_does(bench):
    bench, prompts = bench(), load_prompts("code", "validation")[:2]
    tables, decoded = ([Trial(LayerSkip(3, d)) for d in (2, 12)] for _ in range(2))
    score_static(bench, tables, prompts)
    score(bench, decoded, prompts)
    for one, other in zip(tables, decoded, strict=True):
        assert one.modelled[MACHINE] == pytest.approx(other.modelled[MACHINE])


def test_the_best_few_settings_are_timed_when_sampling_too(bench):
    prompts = load_prompts("lm", "validation")[:1]
    trials = search(bench(0.6), ["autoregressive", "layerskip"], prompts, finalists=2, repeats=1)
    assert sum(trial.tokens_per_second is not None for trial in trials["layerskip"]) == 2
    assert all(trial.modelled[MACHINE] > 0 for trial in trials["layerskip"])


def test_what_a_method_learns_goes_on_in_prompt_order(bench):
    bench = bench()
    prompts, _ = bench.tokens(load_prompts("lm", "validation")[:2])
    player = bench.player(DraftVerify(3))
    texts = [[player(prompt)[0] for prompt in prompts] for _ in range(2)]
    assert texts[0] == texts[1]
    first = generate(bench.lm, prompts[0][1], strategy=DraftVerify(3), max_new_tokens=8)
    second = generate(bench.lm, prompts[1][1], strategy=DraftVerify(3), max_new_tokens=8, carry_over=first)
    assert second.control.threshold == player.outs[1].control.threshold != first.control.threshold


def test_on_a_gpu_every_text_is_decoded_before_it_is_timed(bench, monkeypatch):
    """Its exits need graphs, whose capture would else fall on the timed run."""
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    bench, played = bench(), []
    player = bench.player(LayerSkip(4, 3))
    plain = player.play
    player.play = lambda prompt: played.append((prompt[0], plain(prompt))) or played[-1][1]
    prompts = bench.tokens(load_prompts("parse", "validation")[:3])[0]
    timings = time_methods({"mine": player}, prompts, 1, bench.console, synchronise=True)
    warm_up, timed = played[:-3], played[-3:]
    assert [index for index, _ in timed] == [0, 1, 2] == sorted({index for index, _ in warm_up})
    assert [out.token_ids for _, out in warm_up[-3:]] == [out.token_ids for _, out in timed]
    assert timings["mine"].tokens == {index: out.token_ids for index, out in timed}


def test_every_strategy_has_settings_to_try():
    assert set(GRIDS) == set(STRATEGIES) - {"oracle"}


def test_prompts_that_do_not_fit_are_cut_and_counted(bench):
    bench, (prompt,) = bench(), load_prompts("lm", "validation")[:1]
    long = paper_tables.replace(prompt, text=prompt.text * 200)
    encoded, cut = bench.tokens([prompt, long])
    assert cut == 1 and len(encoded[1][1]) + 8 < bench.lm.geometry.context


def test_a_twins_prompts_fit_its_donor(bench, tiny):
    """Its own context is longer, but its donor plays the trials, and was not trained that far."""
    bench, (prompt,) = bench(), load_prompts("summarization", "validation")[:1]
    bench.lm, bench.donor = replace(tiny, geometry=replace(tiny.geometry, context=4096), idle=[]), tiny
    long = replace(prompt, text=prompt.text * 12)
    assert 2048 < len(tiny.encode(long.text)) < 4096
    (encoded,), cut = bench.tokens([long])
    assert cut == 1 and len(encoded[1]) + 8 < 2048
    assert bench.trial_player(LayerSkip(4, 3))(encoded)[0]


@pytest.mark.parametrize(
    "model, task, method, expected",
    [
        ("llama2-7b", "lm", "LEDE", ("Llama2-7B", 7.05)),
        ("facebook/layerskip-llama2-13B", "instruction", "Lite", ("Llama2-13B", 25.0)),
        ("tiny", "code", "DraftVerify", ("CodeLlama-7B", 8.0)),
        ("tiny", "topv2", "LEDE", ("Llama3.2-1B", 6.88)),
    ],
)
def test_cells_match_model_task_and_method(model, task, method, expected):
    cell = paper_cell(model, task, method)
    assert expected[0] in cell["paper"] and cell["E"] == expected[1]


@pytest.mark.parametrize("task, method", [("SNIPS", "LEDE"), ("parse", "LEDE"), ("lm", "FiniteStateMachine")])
def test_no_cell_where_the_paper_has_none(task, method):
    assert paper_cell("tiny", task, method) == {}


def test_cells_the_paper_garbled_are_missing():
    assert cells()["Llama2-7B", "topv2", "LITE"] == {"E": 18.0, "rouge_l": 0.094}


def test_several_texts_of_a_prompt(arguments, tmp_path):
    """Every text has a seed of its own; an interval is over prompts, each with all its texts."""
    args = replace(arguments, temperature=0.6, samples=3, methods=(), ablation=False, cost_models=(), out=tmp_path)
    rows = paper_tables.main(args)
    tasks = json.loads((tmp_path / "paper_tables-tiny-T0.6.json").read_text())["tasks"]
    for record in tasks.values():
        assert (record["prompts"], record["prompt_of"]) == (2, [0, 1, 0, 1, 0, 1])
        assert all(len(result["tokens"]) == 6 for result in record["results"][MACHINE].values())
    one = tasks["lm"]["results"][MACHINE]["LayerSkip"]
    assert len({tuple(values) for values in zip(one["tokens"], one["cost"], strict=True)}) > 2
    apart, together = (speed_of(one, prompt_of) for prompt_of in (None, tasks["lm"]["prompt_of"]))
    assert apart.shape == (6, 2) and together == pytest.approx(apart.reshape(3, 2, 2).sum(0))
    pooled = pool(list(tasks.values()))
    assert speed_of(pooled["results"][MACHINE]["LayerSkip"], pooled["prompt_of"])[:2] == pytest.approx(together)
    assert len(rows) == 6 and "6 texts of 2 test prompts" in (tmp_path / "paper_tables-tiny-T0.6.md").read_text()


def test_task_names():
    assert [task_name(source) for source in ("code", "a/snips_parse.jsonl", "a/humaneval.jsonl", "hub:topv2")] == [
        "code", "SNIPS", "humaneval", "topv2",
    ]  # fmt: skip
    assert list(task_sources(("all",))) == ["code", "lm", "summarization", "instruction", "parse"]
    with pytest.raises(LedeError, match="both called 'lm'"):
        task_sources(("lm,elsewhere/lm.jsonl",))


def test_unusable_arguments_are_refused():
    with pytest.raises(LedeError, match="repeats=0"):
        Args(repeats=0)
    with pytest.raises(LedeError, match="samples=2: greedy decoding has one text"):
        Args(samples=2)
    with pytest.raises(LedeError, match="'medusa' is unknown"):
        Args(methods=("medusa",))
    with pytest.raises(LedeError, match="add lede"):
        Args(methods=("fsm",), ablation=True)
    with pytest.raises(LedeError, match="threads=0"):
        Args(threads=0)
    with pytest.raises(LedeError, match="name one at least"):
        Args(tasks=())
    for temperature in (-1.0, float("nan")):
        with pytest.raises(LedeError, match=f"temperature={temperature} must be"):
            Args(temperature=temperature)


def test_tasks_of_other_settings_are_not_put_in_one_table(tmp_path):
    settings = dict(seed=0, samples=3, bonus_from=0.3)
    Results(tmp_path / "tables.json", "tiny", settings).save()
    assert Results(tmp_path / "tables.json", "tiny", settings).tasks == {}
    for other in (settings | dict(samples=1), dict(seed=0, samples=3), settings | dict(context=2048)):
        with pytest.raises(LedeError, match="was made with other settings"):
            Results(tmp_path / "tables.json", "tiny", other)
    with pytest.raises(LedeError, match=r"no results can be written to .*give another --out"):
        Results(tmp_path / "tables.json" / "tables.json", "tiny", settings)


def test_rouge_l():
    pytest.importorskip("rouge_score")
    scores = rouge_l(["the cat sat", "a dog", "x"], ["the cat sat", "the cat", ""])
    assert scores == [1.0, 0.0, None]


def history(path, phase):
    columns = ("episode", "phase", "tokens", "return", "acceptance", "exit_layer", "loss", "updates")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for i in range(30):
            row = {"episode": i, "phase": "explore" if i < 20 else "online", "updates": i}
            curves = {"tokens": 8, "return": float(i), "acceptance": 0.5, "exit_layer": 4.0}
            writer.writerow({**row, **curves} if phase is None else {**row, "phase": phase, "loss": 0.1})


def test_figure_2_from_a_run(tmp_path):
    history(tmp_path / "history.csv", None)
    learning_dynamics.main(learning_dynamics.Args(run=tmp_path, out=tmp_path / "figure"))
    assert (tmp_path / "figure" / "learning_dynamics.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "figure" / "learning_dynamics.json").read_text())["rows"]
    assert [row["return"] for row in rows] == [9.5, 24.5, 24.5]


def test_figure_2_needs_episodes(tmp_path):
    history(tmp_path / "history.csv", "offline")
    with pytest.raises(LedeError, match="holds no episodes"):
        learning_dynamics.main(learning_dynamics.Args(run=tmp_path, out=tmp_path))


def test_generations_are_kept_in_the_order_of_their_prompts(tiny):
    player = Player(tiny, Autoregressive(), max_new_tokens=2, temperature=0.0, seed=0)
    for index in (0, 2, 1):  # a warm-up takes the longest early
        player((index, [5, 6 + index]))
    assert [out.prompt_ids[1] for out in player.outs.values()] == [6, 7, 8]
