"""Host memory for what is read or written from end to end."""

from __future__ import annotations

import mmap

import torch

_HUGE_PAGE = 2 << 20


def huge_pages(num_bytes: int) -> torch.Tensor:
    """A fresh, zeroed uint8 mapping of at least so many bytes, on huge pages where the system grants them.

    Memory is taken page by page, when first written to: the first touch of a small page costs
    microseconds, in a virtual machine several.
    """
    size = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    # Private: shared memory gets no huge pages on most systems.
    mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE, start, size)
    return memory[start : start + size]
