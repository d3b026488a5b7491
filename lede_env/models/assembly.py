"""From named tensors to a `LayeredLM`: fused projections, memory layouts, rotations, whatever made the tensors."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lede_env.engine.layered_lm import Geometry, Layer, LayeredLM
from lede_env.errors import LedeError
from lede_env.models.config import geometry_of, tensor_shapes

ROPE_MARGIN = 64


class Tensors(ABC):
    """A checkpoint's tensors, by the names and in the layouts of Hugging Face, made one at a time on the device.

    `shapes` names them all, in the order of the layers.
    """

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.geometry, self.shapes = geometry_of(config), tensor_shapes(config)

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One tensor, of `shapes[name]`, on the device and in the dtype."""

    def matrix(self, parts: Mapping[str, int]) -> Tensor:
        """(outputs, inputs) weights joined along the outputs as one (inputs, outputs) matrix. `parts` as for `joined`.

        On the CPU it is also laid out that way: a few rows times such a matrix is 10 to 20 % faster there.
        """
        if len(parts) == 1 and self.device.type != "cpu":
            return self.get(next(iter(parts))).t()
        return self.joined(parts).t()

    def joined(self, parts: Mapping[str, int]) -> Tensor:
        """Tensors joined along their first dimension; beside the result only one part is in memory at a time.

        `parts` gives, by name, the heads whose rotary pairs i and i + D / 2 come to lie side by side (see `rotate`);
        0 leaves the order as it is.
        """
        rows = [self.shapes[name][0] for name in parts]
        inputs = self.shapes[next(iter(parts))][1:]
        if inputs and self.device.type == "cpu":
            whole = torch.empty(*inputs, sum(rows), device=self.device, dtype=self.dtype).t()
        else:
            whole = torch.empty(sum(rows), *inputs, device=self.device, dtype=self.dtype)
        for (name, heads), target in zip(parts.items(), whole.split(rows), strict=True):
            part = self.get(name)
            if heads:
                target, part = target.unflatten(0, (heads, -1, 2)), part.unflatten(0, (heads, 2, -1)).transpose(1, 2)
            target.copy_(part)
        return whole


def assemble(tensors: Tensors, **known: Any) -> LayeredLM:
    """The model of these tensors. `known`: the fields of `LayeredLM` that say what it is, tokenizer and EOS included.

    At most one tensor's worth of memory is held beside the model while it is made.

    Raises:
        LedeError: the device has not enough free memory.
    """
    config, geometry, device, dtype = tensors.config, tensors.geometry, tensors.device, tensors.dtype
    _check_memory(tensors, known["name"])
    embedding = tensors.get("model.embed_tokens.weight")
    layers = tuple(_layer(tensors, index) for index in range(geometry.n_layers))
    if "lm_head.weight" in tensors.shapes:
        head = tensors.matrix({"lm_head.weight": 0})
    else:  # tied: it shares the embedding's memory, except on the CPU, where the layouts differ
        head = embedding.t().contiguous() if device.type == "cpu" else embedding.t()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return LayeredLM(
        geometry=geometry,
        device=device,
        dtype=dtype,
        embedding=embedding,
        layers=layers,
        final_norm=tensors.get("model.norm.weight"),
        head=head,
        norm_eps=torch.tensor(config.rms_norm_eps, device=device, dtype=wide),
        rope=rope_table(config, geometry, device, dtype),
        **known,
    )


def _layer(tensors: Tensors, index: int) -> Layer:
    layer, geometry = f"model.layers.{index}", tensors.geometry
    heads = {"q": geometry.heads, "k": geometry.kv_heads, "v": 0}
    qkv = {f"{layer}.self_attn.{part}_proj": rotated for part, rotated in heads.items()}
    biases = {f"{name}.bias": rotated for name, rotated in qkv.items()}
    return Layer(
        attention_norm=tensors.get(f"{layer}.input_layernorm.weight"),
        qkv=tensors.matrix({f"{name}.weight": rotated for name, rotated in qkv.items()}),
        qkv_bias=tensors.joined(biases) if biases.keys() <= tensors.shapes.keys() else None,
        out=tensors.matrix({f"{layer}.self_attn.o_proj.weight": 0}),
        mlp_norm=tensors.get(f"{layer}.post_attention_layernorm.weight"),
        gate_up=tensors.matrix({f"{layer}.mlp.gate_proj.weight": 0, f"{layer}.mlp.up_proj.weight": 0}),
        down=tensors.matrix({f"{layer}.mlp.down_proj.weight": 0}),
    )


def _check_memory(tensors: Tensors, name: str) -> None:
    needed = sum(map(math.prod, tensors.shapes.values())) * tensors.dtype.itemsize
    free = _free_memory(tensors.device)
    if free is not None and needed > free:
        raise LedeError(
            f"{name} takes {needed / 1e9:.1f} GB in {str(tensors.dtype).removeprefix('torch.')}, but {tensors.device} "
            f"has {free / 1e9:.1f} GB free; use a smaller dtype, a larger device or a smaller model"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had, those that torch holds unused among them; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    listing = Path("/proc/meminfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


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


def random_values(name: str, shape: tuple[int, ...], std: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal draws that the tensor's name seeds, so that no order of making tensors matters."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, std, generator=generator)
