"""The CUDA kernels run on the CPU: their library, their arguments, and memory that shows a bad access."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

F32, BF16, F16, E4M3, E5M2 = range(5)
CODES = {
    torch.float32: F32,
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
}
FORWARD, REVERSE, RANDOM = range(3)


def _struct(name: str, text: str) -> type[ctypes.Structure]:
    """A structure of fields given as in the header: "ptr a, b; int c; float d; code e; rows f"."""
    types: dict[str, Any] = {
        "ptr": c_void_p,
        "int": c_int64,
        "float": c_float,
        "code": c_int32,
        "rows": Rows if name != "Rows" else None,
    }
    fields = []
    for part in text.split(";"):
        kind, names = part.split(maxsplit=1)
        fields += [(field.strip(), types[kind]) for field in names.split(",")]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class Rows(ctypes.Structure):
    _fields_ = [("count", c_int64), ("inner", c_int64), ("inner_stride", c_int64), ("outer_stride", c_int64)]


NormArgs = _struct(
    "NormArgs",
    "ptr x, residual, weight, out, total; rows x_rows, residual_rows; int size; float eps, out_scale;"
    "code dtype, weight_dtype, out_dtype",
)
GatedArgs = _struct("GatedArgs", "ptr x, out; rows x_rows; int size; code activation, gated, dtype")
RotaryArgs = _struct(
    "RotaryArgs",
    "ptr q, k, v, positions, cos_sin, q_out, k_out, k_cache, v_cache, slots;"
    "int tokens, q_heads, kv_heads, head_size, rotary_size, q_stride, k_stride, v_stride,"
    "cache_block, cache_head, cache_slot, block_size; float k_scale, v_scale;"
    "code interleaved, dtype, cache_dtype",
)
AttentionArgs = _struct(
    "AttentionArgs",
    "ptr q, out, k_cache, v_cache, query_start, seq_lens, block_tables, alibi_slopes, partial;"
    "int tokens, rows, q_heads, kv_heads, head_size, q_token, q_head, cache_block, cache_head, cache_slot,"
    "block_size, table_stride, max_query_len, splits, window; float scale, softcap, k_scale, v_scale;"
    "code dtype, cache_dtype",
)
CopyArgs = _struct(
    "CopyArgs", "ptr sources, targets, pairs; int sides, count, source_stride, target_stride, block_bytes"
)
PenaltyArgs = _struct(
    "PenaltyArgs",
    "ptr logits, starts, ids, counts, repetition, frequency, presence; int rows, size, stride; code dtype",
)
SampleArgs = _struct(
    "SampleArgs",
    "ptr logits, temperature, seeds, positions, token, logprob, partial; int rows, size, stride, parts;"
    "code dtype",
)


class Emulator:
    """The library, and buffers of its memory as tensors."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.simt_error.restype = ctypes.c_char_p
        self.lib.simt_alloc.restype = c_void_p
        self.lib.simt_alloc.argtypes = [ctypes.c_size_t]
        self.lib.simt_free.argtypes = [c_void_p]
        self.lib.simt_conflicts.restype = c_int64
        self.lib.simt_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._held: list[int] = []

    def order(self, order: int, seed: int = 1) -> None:
        self.lib.simt_order(order, seed)

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of bytes 0xff, which is NaN in every float type and -1 in every integer one."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        address = self.lib.simt_alloc(max(size, 1))
        assert address, "no memory"
        self._held.append(address)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        buffer = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy with no byte to spare behind it, contiguous."""
        held = self.empty(tensor.shape, tensor.dtype)
        held.copy_(tensor)
        return held

    def call(self, name: str, args: ctypes.Structure) -> None:
        status = getattr(self.lib, f"aserve_cuda_{name}")(ctypes.byref(args), None)
        assert status != -1, f"{name}: unsupported"
        assert status == 0, self.error()

    def refuses(self, name: str, args: ctypes.Structure) -> bool:
        status: int = getattr(self.lib, f"aserve_cuda_{name}")(ctypes.byref(args), None)
        return status == -1

    def error(self) -> str:
        message: bytes = self.lib.simt_error()
        return message.decode()

    def conflicts(self) -> int:
        count: int = self.lib.simt_conflicts()
        return count

    def release(self) -> int:
        """Gives the buffers back; the number of those with something written around them."""
        touched = sum(self.lib.simt_free(address) for address in self._held)
        self._held.clear()
        return touched


def ptr(tensor: torch.Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def rows_of(x: torch.Tensor) -> Rows:
    """The rows of a tensor of two or three dimensions; the last is dense."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    if x.dim() == 2:
        return Rows(x.shape[0], 1, 0, x.stride(0))
    return Rows(x.shape[0] * x.shape[1], x.shape[1], x.stride(1), x.stride(0))


def orders() -> Iterator[tuple[int, int]]:
    yield FORWARD, 1
    yield REVERSE, 1
    yield RANDOM, 12345
