"""All decoder layers of a step as one native operation.

The residual stream and all activations are float32, weights are packed matrices of any format (also mixed
within a layer), the KV cache has its own dtype. Two orders of norms are known: Llama's, before attention
and before the MLP; and Gemma 3's, which also norms what each adds to the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.errors import ConfigError
from aserve.ops import native
from aserve.ops.packed import FORMATS, PackedWeight

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
MAX_WINDOWS = 8
MAX_STEPS = 16
"""Most steps of one greedy run."""

_WEIGHTS = ("q", "k", "v", "out", "gate", "up", "down")
_NORMS = ("input_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "q_norm", "k_norm")


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSpec:
    """A decoder layer with rotary attention and a gated MLP.

    Norms are RMS norms, float32: ``[H]``, those of heads (before the rotary embedding) ``[D]``. A
    Gemma-style ``1 + w`` is folded into them by the caller. ``post_attention_norm`` and ``post_mlp_norm``
    apply to what attention and MLP add to the residual stream.
    cos_sin: float32 ``[max_position, rotary_size]``, as :func:`aserve.ops.rotary_embedding` takes it;
    interleaved likewise. scale, window, softcap: as :func:`aserve.ops.paged_attention` takes them.
    activation: of the gate, "silu", "gelu_tanh" or "gelu".
    """

    input_norm: torch.Tensor
    q: PackedWeight
    k: PackedWeight
    v: PackedWeight
    out: PackedWeight
    pre_mlp_norm: torch.Tensor
    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    cos_sin: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    eps: float
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    post_attention_norm: torch.Tensor | None = None
    post_mlp_norm: torch.Tensor | None = None
    interleaved: bool = False
    window: int | None = None
    softcap: float | None = None
    activation: str = "silu"


class GreedyRun:
    """What greedy steps of ``count`` rows read and write, up to MAX_STEPS; used again by the next such run.

    rows, positions: int64 ``[count]``. ends: int64 ``[count]``, the token that ends a row, -1 for none.
    token_ids: int64 ``[MAX_STEPS, count]``. logprobs: float32 ``[MAX_STEPS, count]``, of the drawn tokens;
    not finite where the logits are not. logits: float32 ``[count, V]``, of the last step. made: int64
    ``[1]``, how many steps were made.
    """

    def __init__(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        count = len(logits)
        indices = torch.empty(3, count, dtype=torch.int64)
        self._drawn = torch.empty(MAX_STEPS, count, dtype=torch.int64), torch.empty(MAX_STEPS, count)
        self.logits = logits
        # A torch call on a few numbers costs several times one of numpy.
        self.rows, self.positions, self.ends = (each.numpy() for each in indices)
        self.token_ids, self.logprobs = (each.numpy() for each in self._drawn)
        self.inputs = tuple(indices)
        self._made = torch.zeros(1, dtype=torch.int64)
        self.made = self._made.numpy()
        self._work = (*hidden, logits)

    def outputs(self, steps: int) -> tuple[torch.Tensor, ...]:
        """What so many steps write."""
        token_ids, logprobs = self._drawn
        return (*self._work, token_ids[:steps], logprobs[:steps], self._made)


class DecoderStack:
    """Layers ready to run: :meth:`forward`, by one thread at a time.

    ConfigError: layers that :meth:`refusal` names a reason against.
    """

    def __init__(self, layers: Sequence[LayerSpec], final_norm: torch.Tensor, final_eps: float) -> None:
        reason = self.refusal(layers)
        if reason is not None:
            raise ConfigError(f"the native decoder cannot run these layers: {reason}")
        self._kernels: Any = native.library()
        # The description points into these.
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._caches: list[KVCache] = []
        self._ends: tuple[PackedWeight, PackedWeight] | None = None
        self._runs: dict[int, GreedyRun] = {}
        self._halt = torch.full((1,), -1, dtype=torch.int64)
        self._halt_host = self._halt.numpy()
        self._logits = self._hidden = torch.empty(0)
        self._description = torch.zeros(
            self._kernels.functions.aserve_decoder_bytes(len(layers)), dtype=torch.uint8
        )
        first = layers[0]
        self._kernels.decoder_stack(
            self._description,
            len(layers),
            first.num_heads,
            first.num_kv_heads,
            first.head_size,
            final_norm,
            final_eps,
        )
        for index, layer in enumerate(layers):
            self._describe(index, layer)

    @staticmethod
    def refusal(layers: Sequence[LayerSpec]) -> str | None:
        """Why these layers cannot run natively, or None where they can."""
        if native.library() is None:
            return "the native kernels are not loaded"
        if not layers:
            return "there are none"
        first = layers[0]
        if first.head_size % 16 != 0 or not 16 <= first.head_size <= 256:
            return f"the head size is {first.head_size}, not a multiple of 16 up to 256"
        common = (first.num_heads, first.num_kv_heads, first.head_size, first.q.columns)
        if len({layer.window or 0 for layer in layers}) > MAX_WINDOWS:
            return f"they have more than {MAX_WINDOWS} different windows"
        for index, layer in enumerate(layers):
            heads = (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.q.columns)
            if heads != common:
                return f"layer {index} has other heads or another width than layer 0"
            reason = _layer_refusal(layer)
            if reason is not None:
                return f"layer {index}: {reason}"
        return None

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        caches: list[KVCache],
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """The step's tokens through all layers and the final norm, their keys and values into the caches.

        hidden: float32 ``[T, H]``; positions: int64 ``[T]``; caches: of each layer, all of one layout.
        Returns float32 ``[T, H]``. RuntimeError: a block, slot or position outside its table, or tensors
        that do not fit each other.
        """
        if not _same_tensors(caches, self._caches):
            self._describe_caches(caches)
        out = torch.empty_like(hidden)
        self._kernels.decoder_forward(
            self._description,
            hidden,
            positions,
            meta.query_start,
            meta.seq_lens,
            meta.block_tables,
            meta.slot_mapping,
            out,
        )
        return out

    def set_ends(self, embedding: PackedWeight, factor: float, head: PackedWeight) -> None:
        """Gives what :meth:`greedy` needs besides the layers.

        embedding, head: ``[V, H]``; factor: rows of the embedding are multiplied by it.
        """
        self._ends = (embedding, head)
        self._kernels.decoder_ends(
            self._description,
            embedding.data,
            FORMATS[embedding.format],
            factor,
            head.data,
            FORMATS[head.format],
            head.rows,
        )

    @property
    def steps_greedily(self) -> bool:
        """Whether :meth:`greedy` can be used."""
        return self._ends is not None

    def greedy(
        self,
        tokens: torch.Tensor,
        block_tables: torch.Tensor,
        rows: list[int],
        positions: list[int],
        caches: list[KVCache],
        *,
        ends: np.ndarray | None = None,
        steps: int = 1,
        seconds: float = math.inf,
        number: int = 0,
    ) -> tuple[GreedyRun, int]:
        """Whole steps of one token a row: computes the token at ``positions[i]`` of row ``rows[i]`` and
        writes the likeliest next one behind it, then goes on with that. What as many steps of several
        operations give, bit for bit.

        tokens: int32 ``[S, W]``; block_tables: int32 ``[S, max_blocks]``. ends: as in :class:`GreedyRun`.
        Returns the run and how many steps were made: at least one, no more than ``steps`` or MAX_STEPS. None
        is begun after one in which a row ended or has no likeliest token, nor when it could not be done
        within ``seconds`` of the beginning, nor once :meth:`halt` was told ``number`` or more.
        RuntimeError: as :meth:`forward`.
        """
        if self._ends is None:
            raise ConfigError("embedding and head have not been given")
        if not _same_tensors(caches, self._caches):
            self._describe_caches(caches)
        run = self._runs.get(len(rows)) or self._make_run(len(rows), self._ends[1])
        run.rows[:] = rows
        run.positions[:] = positions
        run.ends[:] = -1 if ends is None else ends
        self._kernels.decoder_greedy(
            self._description,
            tokens,
            block_tables,
            *run.inputs,
            self._halt,
            number,
            seconds,
            *run.outputs(steps),
        )
        return run, int(run.made[0])

    def halt(self, number: int) -> None:
        """Ends runs up to ``number`` after the step they are at. May be called by any thread."""
        self._halt_host[0] = number

    def _make_run(self, count: int, head: PackedWeight) -> GreedyRun:
        """Runs of all sizes share the memory of the largest."""
        if count > len(self._logits):
            self._runs.clear()
            self._logits = torch.empty(count, head.rows)
            self._hidden = torch.empty(2 * count, head.columns)
        hidden = self._hidden[: 2 * count].view(2, count, head.columns)
        run = self._runs[count] = GreedyRun(hidden, self._logits[:count])
        return run

    def _describe(self, index: int, layer: LayerSpec) -> None:
        for which, name in enumerate(_WEIGHTS):
            weight: PackedWeight = getattr(layer, name)
            self._kernels.decoder_weight(
                self._description,
                index,
                which,
                weight.data,
                weight.bias,
                FORMATS[weight.format],
                weight.rows,
                weight.columns,
            )
        self._kernels.decoder_layer(
            self._description,
            index,
            layer.input_norm,
            layer.q_norm,
            layer.k_norm,
            layer.post_attention_norm,
            layer.pre_mlp_norm,
            layer.post_mlp_norm,
            layer.cos_sin,
            layer.interleaved,
            layer.scale,
            layer.window or 0,
            layer.softcap or 0.0,
            ACTIVATIONS[layer.activation],
            layer.eps,
        )

    def _describe_caches(self, caches: list[KVCache]) -> None:
        if len(caches) != len(self._layers):
            raise ConfigError(f"{len(self._layers)} layers need as many caches, there are {len(caches)}")
        self._caches = []
        for index, (keys, values) in enumerate(caches):
            self._kernels.decoder_cache(self._description, index, keys, values)
        self._caches = list(caches)


def _layer_refusal(layer: LayerSpec) -> str | None:
    if layer.activation not in ACTIVATIONS:
        return f"the activation {layer.activation!r} is unknown"
    if layer.num_kv_heads < 1 or layer.num_heads % layer.num_kv_heads != 0:
        return f"{layer.num_heads} query heads do not divide among {layer.num_kv_heads} KV heads"
    wide, narrow = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
    hidden, mlp = layer.q.columns, layer.gate.rows
    attention = ((wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide))
    shapes = (*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp))
    for name, shape in zip(_WEIGHTS, shapes, strict=True):
        weight: PackedWeight = getattr(layer, name)
        if not weight.native:
            return f"{name} is not packed for the native kernels"
        if (weight.rows, weight.columns) != shape:
            return f"{name} is {weight.rows} by {weight.columns}, not {shape[0]} by {shape[1]}"
    for name in _NORMS:
        norm: torch.Tensor | None = getattr(layer, name)
        size = layer.head_size if name in ("q_norm", "k_norm") else hidden
        if norm is not None and (norm.shape != (size,) or not _is_plain(norm)):
            return f"{name} is not float32 [{size}] on the CPU"
    table = layer.cos_sin
    if table.dim() != 2 or not _is_plain(table) or table.shape[1] % 2 or table.shape[1] > layer.head_size:
        return f"cos_sin is not float32 [max_position, rotary_size] with an even size up to {layer.head_size}"
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _same_tensors(caches: list[KVCache], known: list[KVCache]) -> bool:
    return len(caches) == len(known) and all(
        a[0] is b[0] and a[1] is b[1] for a, b in zip(caches, known, strict=True)
    )
