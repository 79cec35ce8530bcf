"""What every decoder model offers the worker."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.model.layers.embedding import Embedding, OutputHead
from aserve.model.layers.linear import Build
from aserve.model.layers.norm import RMSNorm
from aserve.model.weights import Value
from aserve.ops import packed
from aserve.ops.decoder import DecoderStack, LayerSpec

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig

logger = logging.getLogger(__name__)


class Model(ABC):
    """A decoder: token ids in, hidden states and logits out, keys and values in a paged cache.

    Weights are plain tensors without gradients. Subclasses create their layers with ``self.build`` and
    set ``self.embedding``, ``self.head``, ``self.tied`` and ``self.kv_shapes``.
    """

    embedding: Embedding
    embedding_factor: float = 1.0
    """What rows of the embedding are multiplied by where hidden states are float32."""
    head: OutputHead
    tied: bool
    """Whether the head reads the embedding's weights; a checkpoint's copy of them is then not used."""
    kv_shapes: list[tuple[int, int]]
    """(KV heads, head size) of each layer."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.build = Build(
            device,
            dtype,
            packed=device.type == "cpu" and packed.available(),
            quantized=config.quantization == "gguf",
        )
        self._stack: DecoderStack | None = None

    @property
    def num_layers(self) -> int:
        return len(self.kv_shapes)

    @abstractmethod
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[KVCache],
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions: int64 ``[T]``. Returns the final normed hidden states ``[T, H]``."""

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[N, H]`` to float32 ``[N, vocabulary]``.

        out: memory of that shape and type which native kernels on a CPU write to instead of fresh memory.
        """
        return self.head.logits(hidden, out)

    def rename(self, name: str) -> str | None:
        """The name this model knows for a checkpoint's ``name``; None for a tensor it does not use."""
        unused = name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight")
        return None if unused else name

    def load_weights(self, weights: Iterable[tuple[str, Value]]) -> None:
        """Fills every weight; names are those transformers saves.

        ConfigError: a name is missing or unexpected, or a shape differs.
        """
        self.build.table.fill(weights, self.rename)
        self.build.finish()
        self._stack = self._make_stack() if self.build.packed else None

    def native_layers(self) -> tuple[Sequence[LayerSpec], RMSNorm] | None:
        """The layers and the norm after them, for the native decoder; None where it does not know them."""
        return None

    def _make_stack(self) -> DecoderStack | None:
        native = self.native_layers()
        if native is None:
            return None
        layers, norm = native
        reason = DecoderStack.refusal(layers)
        if reason is not None:
            logger.info("the layers run one operation at a time: %s", reason)
            return None
        stack = DecoderStack(layers, norm.weight.float(), norm.eps)
        embedding, head = self.embedding.packed, self.head.packed
        if embedding is not None and head is not None:
            stack.set_ends(embedding, self.embedding_factor, head)
        return stack

    @property
    def greedy_stack(self) -> DecoderStack | None:
        """The native decoder where it can do a whole greedy step."""
        stack = self._stack
        return stack if stack is not None and stack.steps_greedily else None


def layer_window(hf_config: Any, layer: int) -> int | None:
    """Sliding window of a layer in tokens (the query's own included), None for full attention."""
    window = getattr(hf_config, "sliding_window", None)
    if window is None:
        return None
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types:
        return int(window) if layer_types[layer] == "sliding_attention" else None
    if not getattr(hf_config, "use_sliding_window", True):
        return None
    return int(window) if layer >= getattr(hf_config, "max_window_layers", 0) else None
