"""Weights packed for the native kernels, and linear layers and embeddings over them.

A weight is packed once, in the layout of ``cuda_ext/cpu/linear.h``: dense matrices in their own type,
GGUF matrices in their own codes. Without native kernels, and for tensors packed while there were none,
the same functions keep a plain matrix (dequantised where it was quantised) and use torch in float32.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from aserve.errors import ConfigError
from aserve.ops import native
from aserve.ops.memory import huge_pages

FORMATS = {
    "f32": 0,
    "bf16": 1,
    "f16": 2,
    "q4_0": 8,
    "q4_1": 9,
    "q5_0": 10,
    "q5_1": 11,
    "q8_0": 12,
    "q4_k": 13,
    "q5_k": 14,
    "q6_k": 15,
}
_DENSE = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
DENSE_DTYPES = tuple(_DENSE)
"""What :func:`pack` takes."""
_DENSE_GGML = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_QUANTISED_GGML = {
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
}

_CHUNK = 64 << 20


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix ``[rows, columns]`` of a linear layer or an embedding.

    data: uint8 ``[bytes]``, packed and 64-byte aligned; without native kernels the plain matrix.
    bias: float32 ``[rows]``.
    """

    format: str
    rows: int
    columns: int
    data: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def native(self) -> bool:
        """Whether ``data`` is packed for the native kernels."""
        return self.data.dtype == torch.uint8

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def available() -> bool:
    """Whether native kernels are loaded, so that weights are packed for them."""
    return native.library() is not None


def formats() -> tuple[str, ...]:
    """The formats that :func:`pack` and :func:`pack_gguf` can make here."""
    library = native.library()
    if library is None:
        return tuple(FORMATS)
    return tuple(name for name, number in FORMATS.items() if library.packed_bytes(number, 1, 256) >= 0)


def can_pack_gguf(ggml_type: int) -> bool:
    """Whether :func:`pack_gguf` takes tensors of this ``GGMLQuantizationType`` number here."""
    return ggml_type in _DENSE_GGML or _QUANTISED_GGML.get(ggml_type) in formats()


def pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedWeight:
    """Packs a matrix ``[N, K]`` of float32, bfloat16 or float16 in its own type. bias: ``[N]``.

    ConfigError: another shape, dtype or device.
    """
    name = _DENSE.get(weight.dtype)
    if name is None or weight.dim() != 2 or weight.shape[1] < 1 or not weight.is_cpu:
        raise ConfigError(
            "only matrices of float32, bfloat16 or float16 on the CPU can be packed, "
            f"this is {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    bias = _checked_bias(bias, rows)
    library = native.library()
    if library is None:
        return PackedWeight(name, rows, columns, weight.clone(), bias)
    data = allocate(library.packed_bytes(FORMATS[name], rows, columns))
    library.pack_dense(weight, data)
    return PackedWeight(name, rows, columns, data, bias)


def pack_gguf(
    raw: torch.Tensor,
    ggml_type: int,
    shape: tuple[int, int],
    row_order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> PackedWeight:
    """Packs a GGUF tensor without decoding it.

    raw: uint8 ``[bytes]``, the tensor's bytes in the file; ggml_type: its ``GGMLQuantizationType`` number;
    shape: ``(N, K)``. row_order: int64 ``[N]``, row ``i`` of the result is row ``row_order[i]`` of the file.
    ConfigError: a type that cannot be packed, or sizes that do not fit each other.
    """
    rows, columns = shape
    if raw.dtype != torch.uint8 or raw.dim() != 1 or not raw.is_contiguous() or not raw.is_cpu:
        raise ConfigError(
            f"a GGUF tensor is packed from uint8 [bytes] on the CPU, not {raw.dtype} {list(raw.shape)}"
        )
    if ggml_type not in _DENSE_GGML and ggml_type not in _QUANTISED_GGML:
        raise ConfigError(f"GGUF tensors of type {ggml_type} cannot be packed")
    _check_raw_size(raw, ggml_type, rows, columns)
    if row_order is not None:
        _check_row_order(row_order, rows)
    if ggml_type in _DENSE_GGML:
        weight = raw.clone().view(_DENSE_GGML[ggml_type]).view(rows, columns)
        return pack(weight if row_order is None else weight[row_order], bias)
    name = _QUANTISED_GGML[ggml_type]
    bias = _checked_bias(bias, rows)
    library = native.library()
    if library is None:
        plain = _dequantised(raw, ggml_type, rows, columns)
        return PackedWeight(name, rows, columns, plain if row_order is None else plain[row_order], bias)
    num_bytes = library.packed_bytes(FORMATS[name], rows, columns)
    if num_bytes < 0:
        raise ConfigError(f"a matrix of {rows} by {columns} cannot be packed as {name}")
    data = allocate(num_bytes)
    library.pack_gguf(raw, FORMATS[name], rows, columns, row_order, data)
    return PackedWeight(name, rows, columns, data, bias)


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """``x @ weight.T + bias``: x ``[..., K]`` of float32, bfloat16 or float16; ``[..., N]`` of x's dtype.

    Computed in float32; the activations are rounded to int8 in blocks where the weight is quantised.
    """
    return _linear(x, weight, x.dtype)


def linear_float(x: torch.Tensor, weight: PackedWeight, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`linear` with its float32 result unrounded, written to ``out`` if that is given."""
    return _linear(x, weight, torch.float32, out)


def rows(weight: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the matrix, decoded: ids int64 ``[T]``, result float32 ``[T, K]``. The bias is not added."""
    library = _library(weight)
    if library is None:
        return F.embedding(ids, weight.data).float()
    out = torch.empty(ids.shape[0], weight.columns, dtype=torch.float32)
    library.packed_rows(ids, weight.data, FORMATS[weight.format], weight.rows, weight.columns, out)
    return out


def _linear(
    x: torch.Tensor, weight: PackedWeight, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    library = _library(weight)
    if library is None:
        product = F.linear(x.float(), weight.data.float(), weight.bias).to(dtype)
        return product if out is None else out.copy_(product)
    if out is None:
        out = torch.empty((*x.shape[:-1], weight.rows), dtype=dtype)
    library.packed_linear(
        x, weight.data, weight.bias, FORMATS[weight.format], weight.rows, weight.columns, out
    )
    return out


def _library(weight: PackedWeight) -> Any:
    """The kernels that read this weight, or None where it is a plain matrix."""
    if not weight.native:
        return None
    library = native.library()
    if library is None:
        raise ConfigError("this weight was packed for native kernels, which are not loaded now")
    return library


def _checked_bias(bias: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    if bias is None:
        return None
    if bias.shape != (rows,):
        raise ConfigError(f"the bias of {rows} rows must have shape [{rows}], has {list(bias.shape)}")
    return bias.detach().float().contiguous()


def _check_raw_size(raw: torch.Tensor, ggml_type: int, rows: int, columns: int) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    if rows < 0 or columns < 1 or columns % block != 0:
        raise ConfigError(f"a matrix of {rows} by {columns} does not divide into blocks of {block} columns")
    wanted = rows * columns // block * block_bytes
    if raw.shape[0] != wanted:
        raise ConfigError(f"a matrix of {rows} by {columns} takes {wanted} bytes, there are {raw.shape[0]}")


def _check_row_order(order: torch.Tensor, rows: int) -> None:
    if order.dtype != torch.int64 or order.shape != (rows,):
        raise ConfigError(f"row_order must be int64 [{rows}], is {order.dtype} {list(order.shape)}")
    if rows > 0 and not 0 <= int(order.min()) <= int(order.max()) < rows:
        raise ConfigError(f"row_order has entries outside 0 to {rows - 1}")


def _dequantised(raw: torch.Tensor, ggml_type: int, rows: int, columns: int) -> torch.Tensor:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = raw.numpy().reshape(rows, -1)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType(ggml_type))).view(rows, columns)


class _Arena:
    """Cuts buffers from large mappings, so that matrices too small for huge pages share them.

    A mapping lives as long as a buffer cut from it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A zeroed uint8 tensor, 64-byte aligned."""
        with self._lock:
            if self._used + num_bytes > self._chunk.shape[0]:
                if num_bytes >= _CHUNK // 4:
                    return huge_pages(num_bytes)[:num_bytes]
                self._chunk, self._used = huge_pages(_CHUNK), 0
            data = self._chunk[self._used : self._used + num_bytes]
            self._used += -(-num_bytes // 64) * 64
            return data


allocate = _Arena().allocate
