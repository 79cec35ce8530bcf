"""The header of a GGUF file, read quickly.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
The ``gguf`` package's own reader makes an object per element of every array, which takes seconds for a
vocabulary; here arrays stay where they are until asked for. Its tables of tensor types are used.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from aserve.errors import ConfigError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file: its shape in row-major order, its ``GGMLQuantizationType`` number, its bytes."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    num_bytes: int


class StringArray:
    """An array of strings left in the file; ``len()`` is free, ``to_list()`` decodes."""

    def __init__(self, buffer: mmap.mmap, start: int, count: int) -> None:
        self._buffer, self._start, self._count = buffer, start, count

    def __len__(self) -> int:
        return self._count

    def to_list(self) -> list[str]:
        buffer, position, unpack = self._buffer, self._start, struct.Struct("<Q").unpack_from
        result = []
        for _ in range(self._count):
            end = position + 8 + unpack(buffer, position)[0]
            result.append(buffer[position + 8 : end].decode("utf-8", errors="replace"))
            position = end
        return result


class GGUFFile:
    """An open GGUF file: ``metadata`` by key, ``tensors`` by name.

    Metadata values are ``int``, ``float``, ``bool``, ``str``, a numpy array, or :class:`StringArray`.
    ConfigError: not a GGUF file, cut short, or of a version or byte order that is not read here.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                # ACCESS_COPY: pages are shared until written, and numpy sees a writable buffer, without
                # which torch.from_numpy warns.
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read GGUF file {path}: {error}") from error
        self._position = 0
        try:
            self._read_header()
        except (struct.error, IndexError, KeyError, ValueError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a whole GGUF file: {error}") from error

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata of ``key``, read as ``<architecture>.<key>``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def tensor_bytes(self, info: TensorInfo) -> np.ndarray:
        """The tensor's bytes, uint8 ``[num_bytes]``, mapped from the file."""
        return np.frombuffer(self._buffer, np.uint8, count=info.num_bytes, offset=info.offset)

    def _read_header(self) -> None:
        if self._buffer[:4] != b"GGUF":
            raise ConfigError(f"{self.path} is not a GGUF file")
        self._position = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ConfigError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
        num_tensors, num_keys = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        if self.metadata.get("split.count", 1) > 1:
            raise ConfigError(
                f"{self.path} is one part of a split GGUF; join the parts with llama-gguf-split --merge"
            )
        self.tensors = self._tensor_table(num_tensors)

    def _tensor_table(self, count: int) -> dict[str, TensorInfo]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        rows = []
        for _ in range(count):
            name = self._string()
            dims = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
            rows.append((name, tuple(reversed(dims)), self._scalar("<I"), self._scalar("<Q")))
        alignment = int(self.metadata.get("general.alignment", 32))
        base = -(-self._position // alignment) * alignment
        tensors = {}
        for name, shape, ggml_type, offset in rows:
            per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
            num_bytes = math.prod(shape) // per_block * block_bytes
            if base + offset + num_bytes > len(self._buffer):
                raise ValueError(f"tensor {name} ends after the end of the file")
            tensors[name] = TensorInfo(name, shape, ggml_type, base + offset, num_bytes)
        return tensors

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from(code, self._buffer, self._position)[0]
        self._position += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        end = self._position + length
        if end > len(self._buffer):
            raise ValueError("a string ends after the end of the file")
        text = self._buffer[self._position : end].decode("utf-8", errors="replace")
        self._position = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _BOOL:
            return bool(self._scalar("<B"))
        if kind == _ARRAY:
            return self._array(self._scalar("<I"), self._scalar("<Q"))
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            start, position, unpack = self._position, self._position, struct.Struct("<Q").unpack_from
            for _ in range(count):
                position += 8 + unpack(self._buffer, position)[0]
            if position > len(self._buffer):
                raise ValueError("an array of strings ends after the end of the file")
            self._position = position
            return StringArray(self._buffer, start, count)
        if kind == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        dtype = np.dtype("?" if kind == _BOOL else _SCALARS[kind])
        values = np.frombuffer(self._buffer, dtype, count=count, offset=self._position)
        self._position += count * dtype.itemsize
        return values


def open_gguf(path: str) -> GGUFFile:
    """The file's header; read again only when the file has changed."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError as error:
        raise ConfigError(f"cannot read GGUF file {path}: {error}") from error
    return _open(real, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2)
def _open(path: str, mtime_ns: int, size: int) -> GGUFFile:
    return GGUFFile(path)
