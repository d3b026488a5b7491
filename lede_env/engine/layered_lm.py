"""A decoder-only transformer that runs in layer segments. The weights; sessions hold everything that changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lede_env.arguments import check_text, whole_number
from lede_env.engine.cuda import kernels_fit
from lede_env.engine.packed import PACKED, TURNED, Copy, packed_copy, turned_copy
from lede_env.engine.round import DRAFT_CAP
from lede_env.errors import LedeError

if TYPE_CHECKING:
    from lede_env.engine.acceptance_head import AcceptanceHead
    from lede_env.engine.kv_cache import KVCache, Span
    from lede_env.engine.session import Session


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. Matrices are (inputs, outputs), and those that read the same input are fused."""

    attention_norm: Tensor  # (H,)
    qkv: Tensor  # (H, (heads + 2 kv_heads) D); rotary pairs of queries and keys lie side by side, see `rotate`
    qkv_bias: Tensor | None
    out: Tensor  # (heads D, H)
    mlp_norm: Tensor  # (H,)
    gate_up: Tensor  # (H, 2 M)
    down: Tensor  # (M, H)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model, with the names of design section 3."""

    n_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int  # most positions the model was trained for


@dataclass(frozen=True, eq=False, repr=False)
class LayeredLM:
    """Immutable weights of a Llama, Mistral or Qwen2 model, on one device.

    A layer number `e` counts layers that have been run, so `run(x, ..., 0, e)` leaves layer e.
    Hidden states are un-normed; `logits` applies the final norm and the LM head.
    """

    name: str  # as asked for: zoo name, hub id or folder name
    weights: str  # "embedded", "checkpoint" or "twin": what the tensors are
    fingerprint: str
    geometry: Geometry
    candidate_layers: tuple[int, ...]
    eos_ids: tuple[int, ...]
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    embedding: Tensor  # (V, H)
    layers: tuple[Layer, ...]
    final_norm: Tensor  # (H,)
    head: Tensor  # (H, V)
    norm_eps: Tensor  # (), float32 at least
    rope: Tensor  # (context + margin, D / 2) complex: the rotation of each pair at each position
    donor_layers: int | None = None  # of a twin: the depth of the model whose function it computes
    acceptance_head: AcceptanceHead | None = None  # of a model that comes with one
    idle: list = field(default_factory=list)  # sessions on CUDA between two uses, for their graphs

    def __repr__(self) -> str:
        return f"LayeredLM({self.name!r}, {self.weights}, {self.n_layers} layers, {self.dtype}, {self.device})"

    @property
    def n_layers(self) -> int:
        return self.geometry.n_layers

    @property
    def has_kernels(self) -> bool:
        """Whether it runs on CUDA with Triton kernels; warns, once, where it is on CUDA and cannot."""
        return self.device.type == "cuda" and kernels_fit(self)

    @cached_property
    def turned(self) -> Copy | None:
        """The matrices laid out for a few rows on a CPU, where that pays."""
        return turned_copy(self)

    @cached_property
    def packed(self) -> Copy | None:
        """The matrices laid out for many rows on a CPU, where that pays."""
        return packed_copy(self)

    def _copy_for(self, x: Tensor) -> Copy | None:
        """The copy that serves so many rows best, if any; none for gradients, which oneDNN's operators lose."""
        if x.requires_grad and torch.is_grad_enabled():
            return None
        return self.turned if len(x) <= TURNED else self.packed if len(x) >= PACKED else None

    def __getstate__(self) -> dict[str, Any]:
        """To copy and to pickle: oneDNN's layouts can do neither, and the copy makes its own."""
        return {name: value for name, value in vars(self).items() if name not in ("turned", "packed")}

    def session(self, batch: int, capacity: int, width: int = DRAFT_CAP + 1, taps: Sequence[int] = ()) -> Session:
        """A fresh KV cache for `batch` rows of up to `capacity` positions; at most `width` open slots a round.

        `taps`: layers whose outgoing states the session keeps, for strategies that learn from them.
        """
        from lede_env.engine.session import Session

        if batch == 1 and self.has_kernels:
            from lede_env.engine.cuda.session import borrow

            return borrow(self, capacity, width, taps)
        return Session(self, batch, capacity, width, taps)

    def embed(self, tokens: Tensor) -> Tensor:
        """(N,) token ids -> (N, H) states at layer 0."""
        return F.embedding(tokens, self.embedding)

    def run(self, x: Tensor, cache: KVCache, span: Span, first: int, last: int) -> Tensor:
        """Layers first+1..last over (R, Q, H) un-normed states; writes their keys and values. Returns (R, Q, H)."""
        if self.has_kernels:
            from lede_env.engine.cuda import layers

            return layers.run(self, x, cache, span, first, last)
        shape, eps, mlp = x.shape, self.norm_eps, self.geometry.mlp
        x = x.reshape(-1, shape[-1])  # (N, H), N = R Q
        turn = self.rope[span.positions].unsqueeze(2)  # (R or 1, Q, 1, D / 2)
        copy = self._copy_for(x)
        mm: Callable[..., Tensor] = copy.times if copy else torch.mm
        addmm: Callable[..., Tensor] = copy.plus_times if copy else torch.addmm
        for index in range(first, last):
            layer = (copy or self).layers[index]
            h = rms_norm(x, layer.attention_norm, eps)
            qkv = mm(h, layer.qkv) if layer.qkv_bias is None else addmm(layer.qkv_bias, h, layer.qkv)
            x = addmm(x, self._attend(qkv.contiguous(), shape, turn, cache, span, index), layer.out)
            gate_up = mm(rms_norm(x, layer.mlp_norm, eps), layer.gate_up)
            # Slices, here and below: `chunk` and `split` cost several times as much.
            x = addmm(x, F.silu(gate_up[:, :mlp]).mul_(gate_up[:, mlp:]), layer.down)
        return x.view(shape)

    def _attend(self, qkv: Tensor, shape: torch.Size, turn: Tensor, cache: KVCache, span: Span, index: int) -> Tensor:
        """Rotary attention of one layer over the fused projection. Returns (N, heads D)."""
        heads, kv_heads, dim = self.geometry.heads, self.geometry.kv_heads, self.geometry.head_dim
        qkv = qkv.view(shape[0], shape[1], heads + 2 * kv_heads, dim)  # (R, Q, heads, D)
        turned = rotate(qkv[:, :, : heads + kv_heads], turn)
        return cache.attend(index, span, turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, heads + kv_heads :])

    def normed(self, x: Tensor) -> Tensor:
        """(N, H) un-normed states -> (N, H) what the LM head reads."""
        return rms_norm(x, self.final_norm, self.norm_eps)

    def logits(self, x: Tensor) -> Tensor:
        """(N, H) un-normed states -> (N, V) float32 (float64 for a float64 model) logits."""
        return self.unembed(self.normed(x))

    def unembed(self, normed: Tensor) -> Tensor:
        """(N, H) normed states -> (N, V) logits, as `logits`."""
        copy = self._copy_for(normed)
        logits = copy.times(normed, copy.head).contiguous() if copy else normed @ self.head
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

    def encode(self, prompt: str | list[dict[str, str]] | list[int]) -> list[int]:
        """Token ids of a text, of chat messages (the model's chat template), or of ids as they are."""
        if isinstance(prompt, str):
            check_text(prompt, "the prompt")
            ids = self._tokenizer().encode(prompt) if prompt else []
        elif isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            if not getattr(self._tokenizer(), "chat_template", None):
                raise LedeError(f"model {self.name!r} has no chat template; pass a text or token ids")
            try:
                ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            except Exception as error:  # a template is a program: it raises what it likes
                raise LedeError(
                    f"the chat template of {self.name!r} refuses these messages ({error}); each is a dict with "
                    "'role' and 'content', in an order the model was trained on"
                ) from error
        else:
            try:
                ids = [operator.index(token) for token in prompt]  # type: ignore[arg-type]
            except TypeError as error:
                raise LedeError(f"prompt {prompt!r:.80} is neither a text, chat messages nor token ids") from error
        if not ids:
            raise LedeError("the prompt is empty; give at least one character or one token id")
        outside = [token for token in ids if not 0 <= token < self.geometry.vocab]
        if outside:
            raise LedeError(
                f"token id {outside[0]} is outside the vocabulary of {self.name!r}: ids go from 0 to "
                f"{self.geometry.vocab - 1}; encode the prompt with this model's tokenizer"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise LedeError(f"model {self.name!r} has no tokenizer files; pass token ids instead of text")
        return self.tokenizer

    def check_exit_layer(self, layer: int) -> None:
        """Raise a LedeError unless `layer` can be an exit: 1..n_layers - 1."""
        if not 1 <= whole_number("exit_layer", layer) < self.n_layers:
            raise LedeError(
                f"exit layer {layer} is out of range: {self.name} has {self.n_layers} layers, "
                f"so an exit layer lies in 1..{self.n_layers - 1}"
            )


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 at least, as Llama computes it. `eps` is 0-d."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # A tensor eps and an alpha: Python numbers would each cost a conversion, as much as the arithmetic.
    scale = torch.add(eps, (wide * wide).sum(-1, keepdim=True), alpha=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of (..., D): neighbouring channels are the real and imaginary part of one complex number.

    Checkpoints pair channel i with i + D / 2; loading puts them side by side, in queries and keys alike, which no dot
    product notices, and one complex product replaces five operations.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
