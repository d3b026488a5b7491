"""A checkpoint folder in Hugging Face form: its safetensors files, one or many, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lede_env.errors import LedeError
from lede_env.models.assembly import Tensors
from lede_env.models.config import read_json

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what weights may be stored as


class FolderTensors(Tensors):
    """The tensors of a folder's safetensors files, read one at a time straight to the device."""

    def __init__(self, folder: Path, config: Any, device: torch.device, dtype: torch.dtype):
        super().__init__(config, device, dtype)
        self.folder = folder
        self.metadata: dict[str, str] = {}  # of all files
        self.files = self._index()

    def _index(self) -> dict[str, Any]:
        single, listing = (self.folder / name for name in ("model.safetensors", "model.safetensors.index.json"))
        # As transformers does: beside the one file there may be others, of adapters or in another form.
        paths = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
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
                handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise LedeError(f"{path} is damaged or truncated ({error}); download it again") from error
            tensors.update(dict.fromkeys(handle.keys(), handle))
            self.metadata |= handle.metadata() or {}
        beyond = self.geometry.n_layers
        if any(name.startswith(f"model.layers.{beyond}.") for name in tensors):
            raise LedeError(
                f"{self.folder} has tensors of layer {beyond + 1}, but config.json says {beyond} layers; "
                "its weights do not match its config.json"
            )
        return tensors

    def get(self, name: str) -> Tensor:
        """One tensor, copied from the mapped file to the device: the host keeps no copy of it.

        Another dtype is converted to on the host, so that the device never holds the tensor twice.
        """
        if name not in self.files:
            raise LedeError(f"{self.folder} has no tensor {name!r}; its weights do not match its config.json")
        tensor = self.files[name].get_tensor(name)
        if tuple(tensor.shape) != self.shapes[name]:
            raise LedeError(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}, config.json says {self.shapes[name]}; "
                "its weights do not match its config.json"
            )
        if tensor.dtype not in DTYPES:
            raise LedeError(
                f"{self.folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, as quantised weights "
                "are, which are not supported; use a checkpoint in bfloat16, float16 or float32"
            )
        return tensor.to(self.dtype).to(self.device)

    def fingerprint(self, settings: dict[str, Any]) -> str:
        """Sixteen hex digits of a hash over the settings and every tensor's name, shape and first values.

        The dtype and the device that the model is loaded in do not matter.
        """
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name in sorted(self.files):
            part = self.files[name].get_slice(name)
            values = part[:1] if part.get_shape() else self.files[name].get_tensor(name)  # single numbers cannot be cut
            first = values.flatten()[:64].float().cpu()
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


def read_tokenizer(folder: Path) -> Any:
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
