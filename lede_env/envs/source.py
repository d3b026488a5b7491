"""Where an environment's tokens come from, resolved and checked: the language model itself, or a trace of it.

Also what both MDPs make of it alike: the cost model, and the attributes that identify an environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from lede_env.data.registry import default_trace, load_trace
from lede_env.data.trace_file import Trace, relabel, text_digest
from lede_env.digest import digest
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import CostModel, load_cost_model
from lede_env.engine.layered_lm import LayeredLM
from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.trace_backend import check_model, check_prompts
from lede_env.errors import LedeError
from lede_env.models.loading import load_model, resolve_device, resolve_dtype
from lede_env.models.zoo import MODELS, ModelSpec, find_spec, twin_layer, twin_name, twin_spec
from lede_env.registration import ids_of
from lede_env.tasks import SPLITS, TASKS, load_prompts

# They say where data comes from, not what it is; or digests and fingerprints say it better.
_ASIDE = ("model", "weights", "backend", "trace", "device")


@dataclass(frozen=True)
class Source:
    """What an environment needs to know of the model and the prompts. `origin` and `prompts` are what the backend of
    its kind takes."""

    origin: LayeredLM | Trace
    prompts: list[Any]  # of a language model: the prompts; of a trace: their ids
    model: dict[str, Any]  # as the attributes name it
    vocab: int
    layers: tuple[int, ...]  # candidates
    sampling: Sampling
    table: list[tuple[str, str, str]]  # id, task and digest of the text of every prompt
    splits: list[str]  # of every prompt

    @property
    def n_layers(self) -> int:
        return self.model["n_layers"]

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self.origin, LayeredLM):
            raise LedeError(
                "a live environment cannot be pickled or deep-copied: it holds a language model and its caches; pickle "
                "env.spec and make it again by gym.make(spec), or use backend='trace'"
            )
        return self.__dict__


def find_source(config: ExitConfig) -> Source:
    """The source of the configured backend.

    Raises:
        LedeError: an unknown backend, model, trace or prompt, a trace of another model or of texts that have changed.
    """
    kinds = {"live": _live, "trace": _trace}
    if config.backend not in kinds:
        raise LedeError(f"backend={config.backend!r} is unknown; use 'live' or 'trace'")
    if config.weights not in ("auto", "twin"):
        raise LedeError(f"weights={config.weights!r} is unknown; use 'auto' or 'twin', and model=FOLDER for your own")
    return kinds[config.backend](config)


def _live(config: ExitConfig) -> Source:
    lm = load_weights(config)
    layers = checked_layers(config.candidate_layers)
    for layer in layers:
        lm.check_exit_layer(layer)
    prompts = load_prompts(config.task, config.split)
    model = {
        "model_name": lm.name,
        "model_fingerprint": lm.fingerprint,
        "n_layers": lm.n_layers,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }
    table = [(prompt.id, prompt.task, text_digest(prompt.text)) for prompt in prompts]
    splits = [prompt.split for prompt in prompts]
    return Source(lm, prompts, model, lm.geometry.vocab, layers, _sampling(config), table, splits)


def load_weights(config: ExitConfig) -> LayeredLM:
    """The configured language model.

    Raises:
        LedeError: it is not to be had; the message says what can be done about it.
    """
    spec = find_spec(str(config.model))
    if spec is None or spec.hub_id is None:
        return load_model(config.model, weights=config.weights, device=config.device, dtype=config.dtype)
    resolve_dtype(config.dtype, resolve_device(config.device))  # so that what follows is about the weights
    try:
        return load_model(config.model, weights=config.weights, device=config.device, dtype=config.dtype)
    except LedeError as error:
        twins = " or ".join(ids_of(spec.name, "twin"))
        raise LedeError(
            f"{error}. Here: model=FOLDER, which lede_env.load_model(FOLDER) reads; without weights: {twins} with "
            "backend='trace', or backend='trace' with trace=NAME or trace=FILE"
        ) from error


def _trace(config: ExitConfig) -> Source:
    resolve_device(config.device)  # nothing runs there, but a GPU that is asked for and absent is an error everywhere
    layers, sampling = checked_layers(config.candidate_layers), _sampling(config)
    spec = find_spec(str(config.model))
    if config.weights == "twin":
        trace, vocab = _twin_trace(config, layers)
    else:
        name = spec.name if spec else str(config.model)
        trace = load_trace(default_trace(name, config.temperature) if config.trace is None else config.trace)
        vocab = trace.header.vocab
        if spec is not None:
            _check_origin(trace, spec)
    header = trace.header
    if config.dtype not in (None, header.dtype):
        raise LedeError(
            f"dtype={config.dtype!r}, but the trace was recorded in {header.dtype}; leave dtype out, or record another"
        )
    check_prompts(trace, load_prompts(config.task, "all"))
    prompt_ids = _prompt_ids(trace, config)
    model = {name: getattr(header, name) for name in ("model_name", "model_fingerprint", "n_layers", "dtype")}
    rows = {row[0]: row for row in zip(trace.prompt_ids, trace.prompt_tasks, trace.prompt_digests, strict=True)}
    table = [rows[prompt_id] for prompt_id in prompt_ids if prompt_id in rows]  # the backend refuses others
    split_of = dict(zip(trace.prompt_ids, trace.prompt_splits, strict=True))
    splits = [split_of[row[0]] for row in table]
    return Source(trace, prompt_ids, model, vocab, layers, sampling, table, splits)


def _twin_trace(config: ExitConfig, layers: tuple[int, ...]) -> tuple[Trace, int]:
    """The embedded model's trace under the names of its twin's layers, and the twin's vocabulary."""
    donor, spec = MODELS["tiny"], twin_spec(str(config.model))
    trace = load_trace(default_trace(donor.name, config.temperature) if config.trace is None else config.trace)
    _check_origin(trace, donor)
    recorded = trace.header.candidate_layers
    sits = tuple(twin_layer(layer, donor.n_layers, spec.n_layers) for layer in recorded)
    if layers != sits:
        raise LedeError(
            f"candidate_layers={layers}, but the layers {recorded} of the trace sit at {sits} in "
            f"{twin_name(spec.name)}; pass those, or a trace of other layers"
        )
    return relabel(trace, spec.n_layers, layers, twin_name(spec.name)), spec.vocab


def _check_origin(trace: Trace, spec: ModelSpec) -> None:
    """Raise a LedeError unless the trace is of this model: of its weights where they are known, else of its shape."""
    if spec.fingerprint is not None:
        check_model(trace, spec.name, spec.fingerprint)
    header = trace.header
    if (header.n_layers, header.vocab) != (spec.n_layers, spec.vocab):
        raise LedeError(
            f"the trace was recorded from {header.model_name!r}, of {header.n_layers} layers and {header.vocab} "
            f"tokens, but {spec.name} has {spec.n_layers} and {spec.vocab}; use a trace of that model"
        )


def _prompt_ids(trace: Trace, config: ExitConfig) -> list[str]:
    """What of the trace is played. A task means all of the trace's prompts of it; a file, the prompts it lists."""
    sources = [config.task] if isinstance(config.task, str | Path) else config.task
    ids: list[str] = []
    for source in sources:
        if source in (*TASKS, "all"):
            ids += trace.prompts_of(source, config.split)
        else:
            ids += [prompt.id for prompt in load_prompts(source, config.split)]
    return ids


def _sampling(config: ExitConfig) -> Sampling:
    return Sampling(config.temperature, config.top_k, config.top_p)


def checked_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """Candidate layers as a tuple of ints.

    Raises:
        LedeError: not whole numbers, none, or not ascending. How deep the model is, the caller checks.
    """
    if not isinstance(layers, Sequence | np.ndarray) or not all(
        isinstance(layer, Integral) and not isinstance(layer, bool) for layer in layers
    ):
        raise LedeError(f"candidate_layers={layers!r} must list whole numbers; write it as (4, 8)")
    checked = tuple(int(layer) for layer in layers)
    if not checked or list(checked) != sorted(set(checked)):
        raise LedeError(f"candidate_layers={checked} must be ascending and distinct, at least one")
    return checked


def find_costs(config: ExitConfig, source: Source) -> CostModel:
    """The configured cost model; a LedeError if it was measured on another depth."""
    costs = load_cost_model(config.cost_model)
    if costs.n_layers != source.n_layers:
        name = source.model["model_name"]
        raise LedeError(
            f"cost_model={config.cost_model!r} was measured on {costs.model}, of {costs.n_layers} layers, but "
            f"{name} has {source.n_layers}; measure one with python -m lede_env.cost_measurement --model {name}"
        )
    return costs


def attributes_of(
    mdp: str, config: ExitConfig, source: Source, features: tuple[str, ...], costs: CostModel
) -> dict[str, Any]:
    """What defines the MDP, JSON-able; the backend and the device leave no trace in its data.

    Names of files and of cost models say nothing of their content: digests do.
    """
    resolved = {
        "mdp": mdp,
        **source.model,
        "candidate_layers": list(source.layers),
        "features": list(features),
        "reward_kwargs": dict(config.reward_kwargs),
        "prompts_digest": digest(source.table),
        "prompt_splits": {name: [i for i, split in enumerate(source.splits) if split == name] for name in SPLITS},
        "cost_model_digest": digest(asdict(costs)),
    }
    return {name: value for name, value in asdict(config).items() if name not in _ASIDE} | resolved
