"""What a dataset is, from its own file: a summary, a card with a picture, and the catalogue of a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lede_env.data.dataset import Dataset, read_dataset
from lede_env.data.ngrams import repeated_ngrams
from lede_env.data.registry import load_trace
from lede_env.offline.scoring import Bench, steps_up
from lede_env.offline.tiers import PROBLEMS, TIERS, VERSION, Problem, Recipe, recipe_of
from lede_env.policies import EXIT

QUANTILES = (0, 25, 50, 75, 100)
LADDER = ("random", "static", "medium", "expert", "oracle")  # tiers whose scores should rise in this order


def summary(dataset: Dataset) -> dict[str, Any]:
    """What a dataset holds and where it comes from, JSON-able."""
    said = dataset.attributes
    named = ("dataset", "env_id", "model_name", "model_fingerprint", "trace_digest", "temperature", "policy",
             "behaviours", "reward", "reward_kwargs", "candidate_layers", "features", "seed", "checksum",
             "software")  # fmt: skip
    return {
        **{name: said[name] for name in named if name in said},
        "episodes": dataset.n_episodes,
        "transitions": dataset.n_rows,
        "splits": {name: split_summary(part) for name, part in dataset.split().items()},
        "exit_layers": exit_shares(dataset),
        "coverage": coverage(dataset),
    }


def split_summary(part: Dataset) -> dict[str, Any]:
    returns = part.returns
    return {
        "prompts": len(np.unique(part["prompt_id"])),
        "episodes": part.n_episodes,
        "transitions": part.n_rows,
        "mean_return": round(float(returns.mean()), 3),
        "return_quantiles": {f"{q} %": round(float(np.percentile(returns, q)), 2) for q in QUANTILES},
    }


def exit_shares(dataset: Dataset) -> dict[int, float]:
    """Share of the exits (draft MDP: of the verified rounds) at each candidate layer."""
    layers = dataset["layer"][dataset["accepted"] >= 0]
    return {layer: round(float((layers == layer).mean()), 4) for layer in dataset.attribute("candidate_layers")}


def coverage(dataset: Dataset) -> dict[str, float]:
    """Share of exits among the decisions of each phase and layer, and of decisions that made no difference."""
    shares = {"forced": float(dataset["forced"].mean())}
    for phase in np.unique(dataset["phase"]).tolist():
        for layer in dataset.attribute("candidate_layers"):
            here = (dataset["phase"] == phase) & (dataset["layer"] == layer)
            if here.any():
                shares[f"exit, phase {phase}, layer {layer}"] = float((dataset["actions"][here] == EXIT).mean())
    least = np.exp(dataset["behaviour_logprob"]).min() if dataset.n_rows else 1.0
    return {name: round(share, 4) for name, share in shares.items()} | {"least probable action": round(float(least), 4)}


@lru_cache
def test_bench(problem: Problem) -> Bench:
    return Bench.of(problem, "test")


def looping(problem: Problem) -> dict[str, float]:
    """Share of 8-grams that occurred before in the same text, by split of the prompts."""
    trace = load_trace(problem.trace)
    texts = np.split(trace.targets, trace.starts[1:-1])
    splits = np.repeat(trace.prompt_splits, trace.header.samples)
    return {
        split: repeated_ngrams([text.tolist() for text, own in zip(texts, splits, strict=True) if own == split], 8)
        for split in ("train", "validation", "test")
    }


def write_catalogue(folder: Path, names: Sequence[str], progress: Callable[[int, int], Any]) -> None:
    """A card and a picture beside each file of these names, and README.md over all of them."""
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(names):
        progress(done, len(names))
        recipe, path = recipe_of(name), folder / f"{name}.h5"
        dataset = read_dataset(path)
        facts, bench = summary(dataset), test_bench(recipe.problem)
        returns = bench.recipe_returns(recipe)
        low, high = bench.interval(returns)
        row = {
            "dataset": f"[{name}]({name}.md)",
            "logged by": recipe.about,
            "episodes": facts["episodes"],
            "transitions": facts["transitions"],
            "MB": f"{path.stat().st_size / 1e6:.1f}",
            "test return": f"{returns.mean():.2f}",
            "score": f"{bench.score(returns):.1f} ({low:.1f} to {high:.1f})",
            "checksum": f"`{facts['checksum'][:12]}`",
        }
        draw_layers(path.with_suffix(".png"), facts["exit_layers"], recipe.problem.mdp)
        path.with_suffix(".md").write_text(card(recipe, facts, row))
        rows.append(row)
    (folder / "README.md").write_text(catalogue(rows, sorted({name.split("/")[0] for name in names})))
    progress(len(names), len(names))


def card(recipe: Recipe, facts: dict[str, Any], row: dict[str, Any]) -> str:
    """The card of a dataset, in Markdown."""
    problem, mdp = recipe.problem, recipe.problem.mdp
    bench = test_bench(problem)
    counts = [
        {"part": name, **{key: value for key, value in part.items() if key != "return_quantiles"},
         **part["return_quantiles"]}
        for name, part in facts["splits"].items()
    ]  # fmt: skip
    lines = [
        f"# {recipe.name}",
        "",
        f"{facts['transitions']} decisions of {facts['episodes']} episodes of `{facts['env_id']}` ({mdp} MDP, "
        f"T = {facts['temperature']:g}), logged by: {recipe.about}.",
        *confounding(recipe),
        "",
        *markdown(counts),
        "",
        "Returns are undiscounted, of whole prompts; the columns in per cent are their quantiles.",
        "",
        f"![Exit layers]({recipe.name.split('/')[1]}.png)",
        "",
        *markdown([{"what": what, "value": value} for what, value in described(recipe, facts, row).items()]),
        "",
        "Share of exits among the decisions (action coverage):",
        "",
        *markdown([facts["coverage"]]),
        "",
        f"The policies' exact test score is {row['score']}: 0 is random play ({bench.random.mean():.2f}), 100 the "
        f"clairvoyant ({bench.oracle.mean():.2f}); in brackets the 95 % interval over {len(bench.random)} prompts.",
    ]
    return "\n".join(lines) + "\n"


def confounding(recipe: Recipe) -> list[str]:
    if recipe.behaviours:
        return []
    return ["", "**Confounded**: what was done depends on the future, which no observation tells. Not for learning a "
            "policy from, nor for off-policy estimates; it bounds what there is to gain."]  # fmt: skip


def described(recipe: Recipe, facts: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The rows of a card's table of facts."""
    loops = looping(recipe.problem)
    return {
        "model": f"`{facts['model_name']}`, fingerprint `{facts['model_fingerprint']}`",
        "trace": f"`{recipe.problem.trace}`, digest `{facts['trace_digest'][:12]}`",
        "candidate layers": ", ".join(map(str, facts["candidate_layers"])),
        "observations": ", ".join(facts["features"]),
        "reward": f"`{facts['reward']}` {facts['reward_kwargs'] or '(default constants)'}",
        "behaviour": ", ".join(
            f"{label}: {type(policy).__name__}"
            + (f", epsilon {policy.epsilon:g}" if hasattr(policy, "epsilon") else "")
            for label, policy in zip(recipe.labels, recipe.behaviours, strict=True)
        )
        or "the clairvoyant",
        "looping": ", ".join(f"{100 * share:.0f} % ({split})" for split, share in loops.items())
        + " of a text's 8-grams occurred in it before",
        "size": f"{row['MB']} MB",
        "checksum of the arrays": f"`{facts['checksum']}`",
        "made with": ", ".join(f"{name} {version}" for name, version in facts["software"].items()),
        "made by": f"`lede dataset make {recipe.name}`, its policies by `python -m agents.collectors`",
        "checked by": f"`lede dataset verify {recipe.name}`",
    }


def catalogue(rows: list[dict[str, Any]], prefixes: Sequence[str]) -> str:
    """The catalogue, in Markdown."""
    lines = [
        "# Offline datasets",
        "",
        "Written by `lede dataset make all` from the files' own metadata. Load one by "
        '`lede_env.load_dataset("tiny/random-v0")`, which gives the part of the training prompts. Scores are exact, of '
        "the logging policies on the test prompts: 0 is random play, 100 the clairvoyant; in brackets 95 % intervals "
        "over the prompts.",
        "",
        *markdown(rows),
    ]
    for prefix in prefixes:
        bench = test_bench(PROBLEMS[prefix])
        ladder = [(tier, bench.recipe_returns(recipe_of(f"{prefix}/{tier}-{VERSION}"))) for tier in LADDER]
        steps = [
            {"": f"{step['tier']} over {step['above']}", "points": f"{step['by']:.1f}",
             "95 % interval, paired": f"{step['low']:.1f} to {step['high']:.1f}"}
            for step in steps_up(bench, ladder)
        ]  # fmt: skip
        lines += ["", f"How far each tier of `{prefix}` is above the one before it:", "", *markdown(steps)]
    lines += ["", "Larger: `lede dataset make tiny/random-v0 --episodes 10000 --out FILE`. Not shipped, made when "
              "loaded: " + ", ".join(f"`{prefix}/...`" for prefix in PROBLEMS if prefix not in prefixes)
              + f", of the same tiers ({', '.join(TIERS)})."]  # fmt: skip
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of rows with the same keys."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]


def draw_layers(path: Path, shares: dict[int, float], mdp: str) -> None:
    """The exit layers as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 2.2), dpi=80, layout="constrained")
    axes.bar([str(layer) for layer in shares], [100 * share for share in shares.values()], color="#4477aa")
    axes.set(xlabel="exit layer", ylabel="% of exits" if mdp == "exit" else "% of rounds", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
