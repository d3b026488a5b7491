"""From a name to weights on a device: the embedded model, a local folder, or a Hugging Face hub id."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lede_env.engine.layered_lm import Geometry, Layer, LayeredLM
from lede_env.errors import LedeError
from lede_env.models.config import geometry_of, read_config, read_eos_ids, read_json, settings_of
from lede_env.models.zoo import MODELS, ModelSpec, default_candidates, find_spec

ROPE_MARGIN = 64
EMBEDDED = Path(__file__).parent / "tiny"
_loaded: dict[tuple, LayeredLM] = {}


def load_model(name: str | os.PathLike, *, device: str = "auto", dtype: str | torch.dtype | None = None) -> LayeredLM:
    """Load a model once a process: later calls with the same arguments return the same weights.

    Args:
        name: "tiny" (the embedded model), another name of the zoo, a Hugging Face hub id, or a folder that holds
            config.json and safetensors files in Hugging Face form.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16" or "float64"; by default float32 on the CPU, bfloat16 on CUDA.

    Raises:
        LedeError: unknown name, absent or gated weights, an unsupported architecture, a damaged file, no such device.
    """
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    folder, weights = resolve_folder(name)
    files = sorted(path for pattern in ("*.json", "*.safetensors") for path in folder.glob(pattern))
    state = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    key = (str(folder.resolve()), state, weights, str(where), kind)
    if key not in _loaded:
        _loaded[key] = _load_folder(str(name), folder, weights, where, kind)
    return _loaded[key]


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
    if dtype not in names:
        raise LedeError(f"dtype={dtype!r} is unknown; use one of {', '.join(names)}")
    return names[dtype]  # type: ignore[index]


def resolve_folder(name: str | os.PathLike) -> tuple[Path, str]:
    """The local folder of a model and what its weights are: "embedded" or "checkpoint"."""
    text = str(name)
    spec = find_spec(text)
    if spec is not None and spec.hub_id is None:
        return EMBEDDED, "embedded"
    if Path(text).is_dir():
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

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # gated, absent, offline: the hub library raises a dozen types
        raise LedeError(
            f"could not get {hub_id} from the Hugging Face hub ({type(error).__name__}). Accept its licence "
            f"{f'({spec.licence}) ' if spec else ''}at https://huggingface.co/{hub_id}, sign in with `hf auth login`, "
            "and try again; or give load_model a local folder with config.json and *.safetensors"
        ) from error


def _load_folder(name: str, folder: Path, weights: str, device: torch.device, dtype: torch.dtype) -> LayeredLM:
    config = read_config(folder)
    geometry = geometry_of(config)
    source = _Tensors(folder, device, dtype)
    beyond = f"model.layers.{geometry.n_layers}."
    if any(tensor.startswith(beyond) for tensor in source.files):
        raise LedeError(
            f"{folder} has tensors of layer {geometry.n_layers + 1}, but config.json says {geometry.n_layers} layers; "
            "its weights do not match its config.json"
        )
    layers = tuple(_layer(source, index, geometry, config.model_type == "qwen2") for index in range(geometry.n_layers))
    embedding = source.get("model.embed_tokens.weight", geometry.vocab, geometry.hidden)
    tied = bool(config.tie_word_embeddings)
    head_source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    # A tied head shares the embedding's memory, except on the CPU, where the layouts differ.
    shared = tied and device.type != "cpu"
    head = embedding.t() if shared else source.matrix({head_source: geometry.vocab}, geometry.hidden)
    spec = find_spec(name)
    eos_ids = read_eos_ids(folder, config)
    return LayeredLM(
        name=spec.name if spec else Path(name).resolve().name if Path(name).is_dir() else name,
        weights=weights,
        fingerprint=source.fingerprint(settings_of(config, geometry, eos_ids)),
        geometry=geometry,
        candidate_layers=spec.candidate_layers if spec else default_candidates(geometry.n_layers),
        eos_ids=eos_ids,
        tokenizer=_tokenizer(folder),
        device=device,
        dtype=dtype,
        embedding=embedding,
        layers=layers,
        final_norm=source.get("model.norm.weight", geometry.hidden),
        head=head,
        norm_eps=torch.tensor(
            config.rms_norm_eps, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        ),
        rope=rope_table(config, geometry, device, dtype),
    )


def _layer(source: _Tensors, index: int, geometry: Geometry, has_bias: bool) -> Layer:
    prefix, hidden, mlp = f"model.layers.{index}", geometry.hidden, geometry.mlp
    queries, keys = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    outputs = dict(zip([f"{prefix}.self_attn.{part}_proj" for part in "qkv"], (queries, keys, keys), strict=True))
    pairs = rotary_order(geometry)
    bias = source.fused({f"{part}.bias": rows for part, rows in outputs.items()}) if has_bias else None
    return Layer(
        attention_norm=source.get(f"{prefix}.input_layernorm.weight", hidden),
        qkv=source.matrix({f"{part}.weight": rows for part, rows in outputs.items()}, hidden, pairs),
        qkv_bias=None if bias is None else bias[pairs.to(bias.device)],
        out=source.matrix({f"{prefix}.self_attn.o_proj.weight": hidden}, queries),
        mlp_norm=source.get(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=source.matrix({f"{prefix}.mlp.{part}_proj.weight": mlp for part in ("gate", "up")}, hidden),
        down=source.matrix({f"{prefix}.mlp.down_proj.weight": hidden}, mlp),
    )


def rotary_order(geometry: Geometry) -> Tensor:
    """Order of the fused projection's rows that puts rotary pairs i and i + D / 2 of queries and keys side by side."""
    dim = geometry.head_dim
    pairs = torch.arange(dim).view(2, dim // 2).t().reshape(-1)  # 0, D/2, 1, D/2 + 1, ...
    rotated = geometry.heads + geometry.kv_heads
    heads = (torch.arange(rotated) * dim).unsqueeze(1) + pairs  # (heads + kv_heads, D)
    values = torch.arange(rotated * dim, (rotated + geometry.kv_heads) * dim)
    return torch.cat([heads.flatten(), values])


class _Tensors:
    """The tensors of a folder's safetensors files, read one at a time straight to the device."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.folder, self.device, self.dtype = folder, device, dtype
        self.files = self._index()

    def _index(self) -> dict[str, Any]:
        paths = sorted(self.folder.glob("*.safetensors"))
        listing = self.folder / "model.safetensors.index.json"
        if listing.is_file():
            shards = _shard_names(listing)
            missing = sorted(shard for shard in shards if not (self.folder / shard).is_file())
            if missing:
                raise LedeError(f"{self.folder} lacks {', '.join(missing)}, which its index names; download them again")
            paths = [self.folder / shard for shard in sorted(shards)]
        if not paths:
            pickled = any(self.folder.glob("*.bin"))
            hint = "its .bin files are pickles, which are never loaded: convert them" if pickled else "download them"
            raise LedeError(f"{self.folder} holds no *.safetensors; {hint}")
        tensors: dict[str, Any] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt", device=str(self.device))
            except (SafetensorError, OSError) as error:
                raise LedeError(f"{path} is damaged or truncated ({error}); download it again") from error
            tensors.update(dict.fromkeys(handle.keys(), handle))
        return tensors

    def get(self, name: str, *shape: int) -> Tensor:
        """One tensor, copied from the mapped file to the device: the host keeps no copy of it."""
        if name not in self.files:
            raise LedeError(f"{self.folder} has no tensor {name!r}; its weights do not match its config.json")
        tensor = self.files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise LedeError(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}; "
                "its weights do not match its config.json"
            )
        return tensor.to(self.dtype)

    def fused(self, outputs: dict[str, int], *inputs: int) -> Tensor:
        """Tensors joined along their first dimension, whose size `outputs` gives by name."""
        parts = [self.get(name, rows, *inputs) for name, rows in outputs.items()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def matrix(self, outputs: dict[str, int], inputs: int, order: Tensor | None = None) -> Tensor:
        """(outputs, inputs) weights joined, in an order of outputs, as one (inputs, outputs) matrix.

        On the CPU it is also laid out that way: a few rows times such a matrix is 10 to 20 % faster there.
        """
        tensor = self.fused(outputs, inputs)
        tensor = (tensor if order is None else tensor[order.to(self.device)]).t()
        return tensor.contiguous() if self.device.type == "cpu" else tensor

    def fingerprint(self, settings: dict[str, Any]) -> str:
        """Sixteen hex digits of a hash over the settings and every tensor's name, shape and first values.

        The dtype and the device that the model is loaded in do not matter.
        """
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name in sorted(self.files):
            part = self.files[name].get_slice(name)
            first = part[:1].flatten()[:64].float().cpu()
            digest.update(f"{name}{part.get_shape()}".encode())
            digest.update(first.numpy().tobytes())
        return digest.hexdigest()[:16]


def _shard_names(listing: Path) -> set[str]:
    """The files that an index of shards names, all in its own folder."""
    weight_map = read_json(listing).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise LedeError(
            f"{listing} has no 'weight_map' from tensor names to *.safetensors files beside it; download it again"
        )
    return names


def rope_table(config: Any, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(context + margin, D / 2) complex rotations, from angles in float32 as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, dim = config.rope_parameters, geometry.head_dim
    scale = 1.0
    if rope["rope_type"] == "default":
        inverse = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    # A padded batch writes a few positions past the context; nothing reads them.
    angles = torch.arange(geometry.context + ROPE_MARGIN, dtype=torch.float).unsqueeze(1) * inverse.float()
    table = torch.complex(angles.cos() * scale, angles.sin() * scale)
    return table.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)


def _tokenizer(folder: Path) -> Any:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception, sentencepiece its own
        reason = " ".join(str(error).split())
        # Without tokenizer.json, transformers converts tokenizer.model by a package that need not be there.
        fix = "" if (folder / "tokenizer.json").is_file() else " with tokenizer.json, or `pip install sentencepiece`"
        raise LedeError(
            f"the tokenizer files of {folder} cannot be read ({reason}); download them again{fix}"
        ) from error
