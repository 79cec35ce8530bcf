"""KV blocks: who is free, who is held how many times."""

from __future__ import annotations

from collections import deque


class BlockPool:
    """``num_blocks`` reference-counted blocks, named ``0 .. num_blocks - 1``.

    A freed block goes to the back of the free queue, so that the one reused next is the one freed
    longest ago.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._refs = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` blocks, each with one reference; the caller has checked ``num_free``."""
        if count > len(self._free):
            raise RuntimeError(f"asked for {count} KV blocks with {len(self._free)} free")
        free, refs = self._free, self._refs
        taken = [free.popleft() for _ in range(count)]
        for block in taken:
            refs[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """Adds one reference to each block."""
        for block in blocks:
            if self._refs[block] < 1:
                raise RuntimeError(f"KV block {block} is free and cannot be shared")
            self._refs[block] += 1

    def is_shared(self, block: int) -> bool:
        return self._refs[block] > 1

    def release(self, blocks: list[int]) -> None:
        """Drops one reference of each block; those without any become free."""
        for block in reversed(blocks):
            left = self._refs[block] - 1
            if left < 0:
                raise RuntimeError(f"KV block {block} was released twice")
            self._refs[block] = left
            if left == 0:
                self._free.append(block)

    def verify(self, holders: list[list[int]]) -> None:
        """Raises RuntimeError unless exactly the tables in ``holders`` account for every reference."""
        expected = [0] * self.num_blocks
        for table in holders:
            for block in table:
                expected[block] += 1
        if expected != self._refs:
            wrong = [i for i, (a, b) in enumerate(zip(expected, self._refs, strict=True)) if a != b]
            raise RuntimeError(f"reference counts of KV blocks {wrong[:8]} do not match their holders")
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a KV block is in the free queue twice")
        if free != {block for block, refs in enumerate(self._refs) if refs == 0}:
            raise RuntimeError("the free queue does not hold exactly the unreferenced KV blocks")
