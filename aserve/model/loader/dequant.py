"""GGML block formats to floating point, vectorised in torch.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; arithmetic in float32, equal to
``gguf.quants.dequantize``. Types without a function here go through that one, which is slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from aserve.errors import ConfigError

_CHUNK = 1 << 17  # values decoded at a time: the float32 intermediates stay in cache
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def plain_type(ggml_type: int) -> torch.dtype | None:
    """The floating-point type that ``ggml_type`` is, None for a block format."""
    return _PLAIN.get(GGMLQuantizationType(ggml_type).name)


def dequantize(raw: torch.Tensor, ggml_type: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Decodes the bytes ``raw`` (uint8, 1-D) of one tensor into ``dtype`` and ``shape`` (row-major).

    ConfigError: a type that neither this module nor the ``gguf`` package decodes.
    """
    kind = GGMLQuantizationType(ggml_type)
    plain = _PLAIN.get(kind.name)
    if plain is not None:
        return raw.view(plain).to(dtype, copy=True).view(shape)
    decode = _DECODERS.get(kind.name) or _by_package(kind)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.view(-1, block_bytes)
    out = torch.empty(math.prod(shape), dtype=dtype)
    rows = out.view(-1, per_block)
    step = max(1, _CHUNK // per_block)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        rows[start : start + step].copy_(decode(part).view(-1, per_block))
    return out.view(shape)


def _by_package(kind: GGMLQuantizationType) -> Callable[[torch.Tensor], torch.Tensor]:
    from gguf.quants import dequantize as slow

    def decode(blocks: torch.Tensor) -> torch.Tensor:
        try:
            return torch.from_numpy(slow(blocks.numpy(), kind))
        except NotImplementedError as error:
            raise ConfigError(f"GGUF tensors of type {kind.name} are not supported") from error

    return decode


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte ``start`` of each block, as float32 ``[n, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., w]`` to ``[..., 2, w]``: all low halves, then all high halves."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _bits(packed: torch.Tensor, shifts: list[int], mask: int) -> torch.Tensor:
    """uint8 ``[..., w]`` to ``[..., len(shifts), w]``: ``(packed >> shift) & mask``."""
    return torch.stack([(packed >> shift) & mask for shift in shifts], dim=-2)


def _fifth_bits(words: torch.Tensor) -> torch.Tensor:
    """Bit ``i`` of each 32-bit word (uint8 ``[n, 4]``, little-endian), times 16: uint8 ``[n, 2, 16]``."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((words.unsqueeze(-1) >> shifts) & 1) << 4).view(-1, 2, 16)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8).mul_(_half(blocks, 0).unsqueeze(-1))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 4:]).float()
    return values.mul_(_half(blocks, 0).unsqueeze(-1)).add_(_half(blocks, 2).unsqueeze(-1))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (values.float() - 16).mul_(_half(blocks, 0).unsqueeze(-1))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])).float()
    return values.mul_(_half(blocks, 0).unsqueeze(-1)).add_(_half(blocks, 2).unsqueeze(-1))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight 6-bit scales and eight 6-bit minima of uint8 ``[n, 12]``, each float32 ``[n, 8]``."""
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=-1)
    minima = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), dim=-1)
    return scales.float(), minima.float()


def _q4_k(blocks: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Also the tail of Q5_K, which brings its own ``values`` (uint8 ``[n, 8, 32]``)."""
    scales, minima = _k_scales(blocks[:, 4:16])
    scales = (scales * _half(blocks, 0)).unsqueeze(-1)
    minima = (minima * _half(blocks, 2)).unsqueeze(-1)
    if values is None:
        values = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return values.float().mul_(scales).sub_(minima)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    high = _bits(blocks[:, 16:48], list(range(8)), 1) << 4
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return _q4_k(blocks, low | high)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), [0, 2, 4, 6], 3) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    values = (low | high).float().sub_(32)
    return values.view(-1, 16, 16).mul_(scales.unsqueeze(-1))


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
