"""Geometry twins: every matrix of a target's shape, computing a small donor's function (design section 7).

A twin costs what the real model costs, kernel by kernel, and accepts drafts as a trained model does: its donor, the
embedded model. `load_model("llama2-7b", weights="twin")` makes one on the device, tensor by tensor;
`python -m lede_env.models.twin --model llama2-7b --out DIR` writes one as a Hugging Face folder.

How the donor, of hidden size d, lies in the target, of hidden size H:

- Residual: channels 0..d-1; then copies of them that only the norms' mean square sees, so many that H / (copies d) is
  a power of 4; the last channel is a constant; the others stay 0.
- RMSNorm: gains times sqrt(copies d / H), a power of two and so exact in any dtype; 0 at the copies and the constant;
  eps to match.
- Heads: the donor's KV head i is slot i, its queries come first in that slot's group; whatever else the heads hold
  meets zeros in o_proj.
- Head size: rotary pair i is pair i D / D_donor, which has its frequency; queries are times sqrt(D / D_donor).
- MLP: neurons 0..m-1; the others meet zeros in down_proj.
- Depth: donor layer i is layer `twin_layer(i)`; the layers between have zeros in o_proj and down_proj, so they pass the
  residual on.
- Vocabulary: tokens 0..v-1; the head puts the others far below, by the constant channel.

Whatever cannot reach the result is small random values, for zeros change a GPU's power draw.

In float32 the logits at the donor's layers are the donor's to 1e-4. In bfloat16 a twin is as far from the float32 donor
as the bfloat16 donor is: on 668 positions of test prompts (twins of 1024 and 1280 channels, with heads of 64 and 128,
products accumulated in float32 on a CPU) its most probable token at full depth was the float32 donor's at 98.4 to
99.1 % of them, the bfloat16 donor's at 98.8 %; with the bfloat16 donor it agreed at 98.5 to 99.3 %. Moving the queries'
sqrt(2), the one scale that is not exact, into the rotation made no difference beyond chance.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lede_env.arguments import clear_errors
from lede_env.digest import digest
from lede_env.engine.layered_lm import Geometry, LayeredLM
from lede_env.errors import LedeError
from lede_env.models.assembly import Tensors, assemble, random_values
from lede_env.models.checkpoint import FolderTensors, read_tokenizer
from lede_env.models.config import geometry_of, read_config, read_eos_ids, settings_of, spec_config
from lede_env.models.zoo import ModelSpec, twin_layer, twin_name, twin_spec

HEAD = "acceptance_head"  # folder, in a model's, of its acceptance head
CONTEXT = 4096  # for timing: beyond the donor's training length
MARK = "lede_twin"  # what a written twin's config.json says of it, and, of what model, each of its files
SHARD = 2**31  # most bytes a written file, and of host memory while writing
FILLER = 0.02  # standard deviation of what cannot reach the result
CARD = """# {name}

A geometry twin, not {of}: its matrices have that model's shapes, but compute the function of LEDE's embedded model.
Speeds measured with it are those of the shapes; texts, and how many drafts are accepted, are the embedded model's.
"""
# The last channel. It adds CONSTANT^2 GAIN to every logit of a tied head, and takes CONSTANT GAIN FAR, over the root
# mean square of the state, from those of tokens that the donor does not have.
CONSTANT, GAIN, FAR = 2.0**-14, 2.0**12, 2.0**15


def twin_model(spec: ModelSpec, donor: Path, device: torch.device, dtype: torch.dtype) -> LayeredLM:
    """The twin of a row of the zoo, made on the device: `weights` is "twin", the name ends in "-twin".

    Its fingerprint is the donor's, whose function it computes. In float32 its logits at the donor's layers are the
    donor's to rounding.

    Raises:
        LedeError: the donor does not fit into the geometry; too little memory.
    """
    tensors = TwinTensors(spec, donor, device, dtype)
    eos_ids = read_eos_ids(donor, tensors.donor.config)
    return assemble(tensors, eos_ids=eos_ids, tokenizer=read_tokenizer(donor), **tensors.identity(eos_ids))


class TwinTensors(Tensors):
    """The tensors of a twin, each made from the donor's and filler when it is asked for."""

    def __init__(self, spec: ModelSpec, donor: Path, device: torch.device, dtype: torch.dtype):
        config = read_config(donor)
        super().__init__(_twin_config(spec, config), device, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.spec, self.donor = spec, FolderTensors(donor, config, torch.device("cpu"), wide)
        mine, small = self.geometry, self.donor.geometry
        self.copies = residual_copies(mine.hidden, small.hidden)
        numbers = range(1, small.n_layers + 1)
        self.layers = {twin_layer(number, small.n_layers, mine.n_layers): number for number in numbers}
        group, small_group = mine.heads // mine.kv_heads, small.heads // small.kv_heads
        self.query_slots = [head // small_group * group + head % small_group for head in range(small.heads)]
        queries, keys = (_channels(slots, mine, small) for slots in (self.query_slots, list(range(small.kv_heads))))
        neurons = torch.arange(small.mlp)
        # Where the donor's outputs lie among each matrix's; of the two that write to the residual, its inputs.
        self.places = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries,
                       "gate_proj": neurons, "up_proj": neurons, "down_proj": neurons}  # fmt: skip

    def identity(self, eos_ids: tuple[int, ...]) -> dict[str, Any]:
        """The fields of `LayeredLM` that say what this model is."""
        settings = settings_of(self.donor.config, self.donor.geometry, eos_ids)
        return {
            "name": twin_name(self.spec.name),
            "weights": "twin",
            "fingerprint": self.donor.fingerprint(settings),
            "candidate_layers": self.spec.candidate_layers,
            "donor_layers": self.donor.geometry.n_layers,
        }

    def get(self, name: str) -> Tensor:
        *_, module, _ = name.split(".")
        if module in ("embed_tokens", "lm_head"):
            return self._vocabulary(name)
        donor = self._donor(name)
        if module.endswith("norm"):
            return self._norm(module, donor)
        if module in ("o_proj", "down_proj"):
            return self._writing(name, self.places[module], donor)
        weights = random_values(name, self.shapes[name], FILLER, self.device, self.dtype)
        if donor is None:
            return weights
        if module == "q_proj":  # the keys' spare dimensions are filler, so the queries' must be 0
            donor = donor * math.sqrt(self.geometry.head_dim / self.donor.geometry.head_dim)
            weights.unflatten(0, (self.geometry.heads, -1))[self.query_slots] = 0
        weights[self.places[module].to(self.device), : donor.shape[1]] = self._here(donor)
        return weights

    def _donor(self, name: str) -> Tensor | None:
        """The donor's tensor that lies in this one; None in the layers between."""
        if not name.startswith("model.layers."):
            return self.donor.get(name)
        _, _, number, rest = name.split(".", 3)
        layer = self.layers.get(int(number) + 1)
        return None if layer is None else self.donor.get(f"model.layers.{layer - 1}.{rest}")

    def _here(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def _norm(self, module: str, donor: Tensor | None) -> Tensor:
        gains = torch.ones(self.geometry.hidden, device=self.device, dtype=self.dtype)
        if donor is not None:
            live = self.copies * len(donor)
            gains[:live] = 0
            gains[: len(donor)] = self._here(donor * math.sqrt(live / len(gains)))
            gains[-1] = GAIN if module == "norm" else 0  # the final norm
        return gains

    def _writing(self, name: str, inputs: Tensor, donor: Tensor | None) -> Tensor:
        """A matrix that writes to the residual: the same to every copy, nothing to the other channels."""
        weights = torch.zeros(self.shapes[name], device=self.device, dtype=self.dtype)
        if donor is not None:
            weights[: self.copies * len(donor), inputs.to(self.device)] = self._here(donor).repeat(self.copies, 1)
        return weights

    def _vocabulary(self, name: str) -> Tensor:
        """The embedding or the head: the donor's rows, and those of tokens that never come."""
        donor = self.donor.get(name if name in self.donor.shapes else "model.embed_tokens.weight")
        table = random_values(name, self.shapes[name], FILLER, self.device, self.dtype)
        tokens, hidden = donor.shape
        table[tokens:, -1] = -FAR  # an embedding is a tied head's as well
        if name == "lm_head.weight":
            table[:tokens, :hidden], table[:tokens, -1] = self._here(donor), 0
        else:
            table[:tokens] = 0
            table[:tokens, : self.copies * hidden] = self._here(donor).repeat(1, self.copies)
            table[:tokens, -1] = CONSTANT
        return table


def residual_copies(hidden: int, donor: int) -> int:
    """Into how many copies the donor's channels go, so that hidden / (copies donor) is a power of 4; 1 if none will do.

    The norms' gains are then scaled by a power of two. One channel at least stays free, for the constant.
    """
    fitting = range(1, (hidden - 1) // donor + 1)
    return next((n for n in fitting if math.frexp(math.sqrt(hidden / (n * donor)))[0] == 0.5), 1)


def _channels(slots: list[int], geometry: Geometry, donor: Geometry) -> Tensor:
    """Channels of a twin's heads that hold the donor's heads, head by head in the donor's order.

    Checkpoints pair channel i with i + D / 2 for the rotation, which turns pair i by theta^(-2 i / D).
    """
    firsts = torch.arange(donor.head_dim // 2) * (geometry.head_dim // donor.head_dim)
    within = torch.cat([firsts, firsts + geometry.head_dim // 2])
    return (torch.tensor(slots).unsqueeze(1) * geometry.head_dim + within).flatten()


def _twin_config(spec: ModelSpec, donor: Any) -> Any:
    """The config of a twin: the target's shape, the donor's RoPE, tokens and (to scale) eps."""
    small = geometry_of(donor)
    _check_fit(spec, donor, small)
    live = residual_copies(spec.hidden, small.hidden) * small.hidden
    return spec_config(
        spec,
        CONTEXT,
        # The twin's mean square is the donor's times live / hidden, and the constant's.
        rms_norm_eps=(donor.rms_norm_eps * live - CONSTANT**2) / spec.hidden,
        rope_parameters=dict(donor.rope_parameters),
        **{token: getattr(donor, token) for token in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def _check_fit(spec: ModelSpec, config: Any, donor: Geometry) -> None:
    """Raise a LedeError unless this donor's function can be had in the geometry of `spec`."""
    group, ratio = donor.heads // donor.kv_heads, spec.head_dim / donor.head_dim
    ends = {twin_layer(layer, donor.n_layers, spec.n_layers) for layer in range(1, donor.n_layers)}
    needs = {
        f"hidden > {donor.hidden}": spec.hidden > donor.hidden,
        f"kv_heads >= {donor.kv_heads}": spec.kv_heads >= donor.kv_heads,
        f"heads / kv_heads >= {group}": spec.heads // spec.kv_heads >= group,
        f"head_dim a multiple of {donor.head_dim}": ratio.is_integer(),
        f"mlp >= {donor.mlp}": spec.mlp >= donor.mlp,
        f"vocab >= {donor.vocab}": spec.vocab >= donor.vocab,
        f"n_layers >= {donor.n_layers}": spec.n_layers >= donor.n_layers,
        f"candidate_layers within {sorted(ends)}, where the donor's layers end": ends.issuperset(spec.candidate_layers),
        "an untied head, as the donor has": config.tie_word_embeddings or not spec.tied,
        "the donor's head_dim, for its RoPE": ratio == 1 or config.rope_parameters["rope_type"] == "default",
        "a Llama as its donor": config.model_type == "llama",
    }
    for need, met in needs.items():
        if not met:
            raise LedeError(f"the twin of {spec.name} needs {need}; its geometry is {spec}")


def write_twin(spec: ModelSpec, donor: Path, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Write a twin as a Hugging Face folder: sharded safetensors, index, tokenizer, card, and last of all config.json.

    One shard at a time is in host memory. `load_model(folder)` knows it for a twin by the mark in config.json.

    Raises:
        LedeError: the donor does not fit into the geometry; the folder holds files already.
    """
    from rich.progress import track
    from safetensors.torch import save_file

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LedeError(f"{folder} is not empty; name a new folder, or remove it")
    tensors = TwinTensors(spec, donor, device, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(tensors))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(track(files, f"writing {folder}"), shards, strict=True):
        metadata = {"format": "pt", MARK: spec.name}
        save_file({name: tensors.get(name).cpu() for name in names}, folder / file, metadata=metadata)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    total = sum(map(math.prod, tensors.shapes.values())) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (donor / name).is_file():
            shutil.copy(donor / name, folder)
    if (donor / HEAD).is_dir():
        shutil.copytree(donor / HEAD, folder / HEAD, dirs_exist_ok=True)
    (folder / "README.md").write_text(CARD.format(name=twin_name(spec.name), of=spec.name))
    _write_config(tensors, donor, folder)


def _shards(tensors: Tensors) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order, together at most SHARD bytes."""
    shard: list[str] = []
    size = 0
    for name, shape in tensors.shapes.items():
        bytes_ = math.prod(shape) * tensors.dtype.itemsize
        if shard and size + bytes_ > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += bytes_
    yield shard


def _write_config(tensors: TwinTensors, donor: Path, folder: Path) -> None:
    """config.json, with the mark: what the twin is, sealed with the fingerprint of the files."""
    config = tensors.config
    config.dtype = str(tensors.dtype).removeprefix("torch.")
    identity = tensors.identity(read_eos_ids(donor, tensors.donor.config))
    mark = {
        "of": tensors.spec.name,
        "donor_fingerprint": identity["fingerprint"],
        "donor_layers": identity["donor_layers"],
        "candidate_layers": list(identity["candidate_layers"]),
    }
    eos_ids = read_eos_ids(folder, config)
    written = FolderTensors(folder, config, torch.device("cpu"), torch.float32)
    fingerprint = written.fingerprint(settings_of(config, written.geometry, eos_ids))
    setattr(config, MARK, {**mark, "seal": digest([mark, fingerprint])})
    config.save_pretrained(folder)


def read_mark(folder: Path, config: Any, fingerprint: str) -> dict[str, Any]:
    """What a twin read from a folder is, as `TwinTensors.identity` says it; `fingerprint` is that of its files.

    Raises:
        LedeError: the mark or the files are not what was written.
    """
    mark = getattr(config, MARK)
    facts = {name: value for name, value in mark.items() if name != "seal"} if isinstance(mark, dict) else {}
    if not facts or mark.get("seal") != digest([facts, fingerprint]):
        raise LedeError(
            f"{folder} is marked as a geometry twin ({MARK} in config.json), but is not what was written; write it "
            "again with `python -m lede_env.models.twin`"
        )
    return {
        "name": twin_name(mark["of"]),
        "weights": "twin",
        "fingerprint": mark["donor_fingerprint"],
        "candidate_layers": tuple(mark["candidate_layers"]),
        "donor_layers": mark["donor_layers"],
    }


def main(model: str, out: Path, dtype: str = "bfloat16", device: str = "auto") -> None:
    """Write the geometry twin of a model as a Hugging Face folder.

    Args:
        model: llama3.2-1b, llama2-7b, llama2-13b, codellama-7b or codellama-34b.
        out: the folder, made if missing.
        dtype: bfloat16, float16 or float32.
        device: where the tensors are made: auto, cpu, cuda or cuda:N.
    """
    from lede_env.models.loading import EMBEDDED, resolve_device, resolve_dtype

    spec, where = twin_spec(model), resolve_device(device)
    write_twin(spec, EMBEDDED, out, where, resolve_dtype(dtype, where))
    print(f"{out}: the twin of {spec.name}; lede_env.load_model({str(out)!r}) loads it")


if __name__ == "__main__":
    import tyro

    with clear_errors():
        tyro.cli(main)
