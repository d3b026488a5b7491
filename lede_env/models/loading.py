"""From a name to weights on a device: the embedded model, a local folder, or a Hugging Face hub id."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from lede_env.engine.acceptance_head import load_head
from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError
from lede_env.models.assembly import assemble
from lede_env.models.checkpoint import FolderTensors, read_tokenizer
from lede_env.models.config import read_config, read_eos_ids, settings_of
from lede_env.models.twin import HEAD, MARK, read_mark, twin_model
from lede_env.models.zoo import MODELS, ModelSpec, default_candidates, find_spec, find_twin, twin_layer, twin_spec

EMBEDDED = Path(__file__).parent / "tiny"
_loaded: dict[tuple, LayeredLM] = {}


def load_model(
    name: str | os.PathLike,
    *,
    weights: str = "auto",
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
) -> LayeredLM:
    """Load a model once a process: later calls with the same arguments return the same weights.

    Args:
        name: "tiny" (the embedded model), another name of the zoo, a Hugging Face hub id, a folder that holds
            config.json and safetensors files in Hugging Face form, or a twin by its own name ("llama2-7b-twin").
        weights: "auto", the model's own, or "twin": those of its geometry twin, whose every matrix has the model's
            shape and which computes the embedded model's function (`lede_env.models.twin`; nothing is downloaded).
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16" or "float64"; by default float32 on the CPU, bfloat16 on CUDA.

    Raises:
        LedeError: unknown name, absent or gated weights, an unsupported architecture, a damaged file, no such device,
            too little memory.
    """
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    if weights not in ("auto", "twin"):
        raise LedeError(f"weights={weights!r} is unknown; use 'auto' or 'twin'")
    twin = twin_spec(str(name)) if weights == "twin" else find_twin(str(name))
    folder, origin = (EMBEDDED, "twin") if twin else resolve_folder(name)
    patterns = ("*.json", "*.safetensors", f"{HEAD}/head.*")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    state = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    key = (str(folder.resolve()), state, origin, twin, str(where), kind)
    if key not in _loaded:
        lm = twin_model(twin, folder, where, kind) if twin else _load_folder(str(name), folder, origin, where, kind)
        _loaded[key] = _with_head(lm, folder / HEAD)
    return _loaded[key]


def _with_head(lm: LayeredLM, folder: Path) -> LayeredLM:
    """The model with the acceptance head in a folder, where there is one. A twin takes its donor's."""
    if not folder.is_dir():
        return lm
    head = load_head(folder)
    if head.fingerprint != lm.fingerprint:
        raise LedeError(
            f"the acceptance head in {folder} was trained for a model with fingerprint {head.fingerprint}, but "
            f"{lm.name!r} has {lm.fingerprint}; remove it, or train one: python -m agents.acceptance_head"
        )
    if len(head.state) > lm.geometry.hidden or len(head.token) > lm.geometry.vocab:
        raise LedeError(
            f"the acceptance head in {folder} reads {len(head.state)} channels and {len(head.token)} tokens, but "
            f"{lm.name!r} has {lm.geometry.hidden} and {lm.geometry.vocab}; train one: python -m agents.acceptance_head"
        )
    if lm.donor_layers is not None:
        layers = tuple(twin_layer(layer, lm.donor_layers, lm.n_layers) for layer in head.candidate_layers)
        head = replace(head, candidate_layers=layers)
    return replace(lm, acceptance_head=head.to(lm.device))


def resolve_device(device: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N"; a missing GPU is an error, never a silent CPU.

    One device has one spelling: "cuda" becomes the current GPU's "cuda:N", "cpu:0" becomes "cpu".
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise LedeError(f"device={device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise LedeError(
            f"device={device!r} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} "
            "CUDA devices; use device='cpu' or 'auto', or install a CUDA build of torch"
        )
    if where.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A torch dtype from its name; by default float32 on the CPU and bfloat16 on CUDA."""
    names = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in names.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in names:
        raise LedeError(f"dtype={dtype!r} is unknown; use one of {', '.join(names)}")
    return names[dtype]


def resolve_folder(name: str | os.PathLike) -> tuple[Path, str]:
    """The local folder of a model and what its weights are: "embedded" or "checkpoint"."""
    text = str(name)
    spec = find_spec(text)
    if spec is not None and spec.hub_id is None:
        return EMBEDDED, "embedded"
    if text and Path(text).is_dir():
        return Path(text), "checkpoint"
    hub_id = spec.hub_id if spec is not None else text
    if hub_id is None or hub_id.count("/") != 1 or hub_id.startswith((".", "/")):
        raise LedeError(
            f"model {text!r} is unknown: expected one of {', '.join(MODELS)}, an existing folder with config.json "
            "and *.safetensors, or a Hugging Face hub id such as 'facebook/layerskip-llama2-7B'"
        )
    return _download(hub_id, spec), "checkpoint"


def _download(hub_id: str, spec: ModelSpec | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # gated, absent, offline: the hub library raises a dozen types
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "it cannot be reached: no network, or HF_HUB_OFFLINE is set" if offline else type(error).__name__
        raise LedeError(
            f"{'' if spec else f'no folder {hub_id!r} exists here, and '}could not get {hub_id} from the Hugging Face "
            f"hub ({reason}). Accept its licence {f'({spec.licence}) ' if spec else ''}at "
            f"https://huggingface.co/{hub_id}, sign in with `hf auth login`, and try again; or give load_model a local "
            "folder with config.json and *.safetensors"
        ) from error


def _load_folder(name: str, folder: Path, weights: str, device: torch.device, dtype: torch.dtype) -> LayeredLM:
    config = read_config(folder)
    tensors = FolderTensors(folder, config, device, dtype)
    eos_ids, tokenizer = read_eos_ids(folder, config), read_tokenizer(folder)
    fingerprint = tensors.fingerprint(settings_of(config, tensors.geometry, eos_ids))
    if hasattr(config, MARK):
        return assemble(tensors, eos_ids=eos_ids, tokenizer=tokenizer, **read_mark(folder, config, fingerprint))
    if MARK in tensors.metadata:
        raise LedeError(
            f"{folder} holds weights of a geometry twin of {tensors.metadata[MARK]}, but its config.json is not the "
            "twin's; write it again with `python -m lede_env.models.twin`"
        )
    spec = find_spec(name)
    return assemble(
        tensors,
        name=spec.name if spec else Path(name).resolve().name if Path(name).is_dir() else name,
        weights=weights,
        fingerprint=fingerprint,
        candidate_layers=spec.candidate_layers if spec else default_candidates(tensors.geometry.n_layers),
        eos_ids=eos_ids,
        tokenizer=tokenizer,
    )
