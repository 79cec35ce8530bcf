"""KV blocks: who is free, who is held how many times, and what the full ones contain."""

from __future__ import annotations

from collections import OrderedDict

NULL_BLOCK = -1
"""Stands in a table for a block that nothing reads any more; never counted, never released."""


class BlockPool:
    """``num_blocks`` reference-counted blocks, named ``0 .. num_blocks - 1``.

    A block can be published under a key that stands for its tokens and everything before them. It can
    then be found and held again, also after its last reference is gone, until it is needed for something
    else. Free blocks without a key are taken first, the one freed last before the others, so that no more
    memory is touched than was ever in use at once; then published ones, least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be 0 or more, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # OrderedDict, not dict: taking the first key of a dict that shrinks from its front is linear.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._published: dict[int, tuple[bytes, bytes]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1; blocks kept only to be found again are not in use."""
        return 1.0 - self.num_free / self.num_blocks if self.num_blocks else 0.0

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` blocks, each with one reference; the caller has checked ``num_free``."""
        free, refs = self._free, self._refs
        if count > len(free):
            self._evict(count - len(free))
        taken = [free.pop() for _ in range(count)]
        for block in taken:
            refs[block] = 1
        return taken

    def _evict(self, count: int) -> None:
        if count > len(self._kept):
            raise RuntimeError(f"{count} more KV blocks were asked for than are free")
        for _ in range(count):
            block, _ = self._kept.popitem(last=False)
            del self._by_key[self._published.pop(block)[0]]
            self._free.append(block)

    def share(self, blocks: list[int]) -> None:
        """Adds one reference to each block; all are held by somebody already."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self._refs[block] < 1:
                raise RuntimeError(f"KV block {block} is free and cannot be shared")
            self._refs[block] += 1

    def refs(self, block: int) -> int:
        """How many tables hold a block."""
        return self._refs[block]

    def release(self, blocks: list[int]) -> None:
        """Drops one reference of each block; those without any become free, the last of them first."""
        refs, published = self._refs, self._published
        for block in reversed(blocks):
            if block == NULL_BLOCK:
                continue
            left = refs[block] - 1
            if left < 0:
                raise RuntimeError(f"KV block {block} was released twice")
            refs[block] = left
            if left == 0:
                if block in published:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    # ---------------------------------------------------------------- blocks found by content

    def publish(self, block: int, key: bytes, content: bytes) -> None:
        """Makes a held block findable. Of two blocks with one content, the first keeps the key."""
        if key not in self._by_key and block not in self._published:
            self._by_key[key] = block
            self._published[block] = (key, content)

    def find(self, key: bytes, content: bytes) -> int | None:
        """The block published under ``key``; None if there is none or its content is another."""
        block = self._by_key.get(key)
        if block is None or self._published[block][1] != content:
            return None
        return block

    def hold(self, blocks: list[int]) -> None:
        """Adds one reference to each block just found; blocks that were free are so no longer."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._kept[block]
            self._refs[block] += 1

    def forget(self, blocks: list[int]) -> None:
        """Takes held blocks' contents out of the index."""
        for block in blocks:
            entry = self._published.pop(block, None)
            if entry is not None:
                del self._by_key[entry[0]]

    def verify(self, holders: list[list[int]]) -> None:
        """Raises RuntimeError unless exactly the tables in ``holders`` account for every reference."""
        expected = [0] * self.num_blocks
        for table in holders:
            for block in table:
                if block != NULL_BLOCK:
                    expected[block] += 1
        if expected != self._refs:
            wrong = [i for i, (a, b) in enumerate(zip(expected, self._refs, strict=True)) if a != b]
            raise RuntimeError(f"reference counts of KV blocks {wrong[:8]} do not match their holders")
        free = [*self._free, *self._kept]
        if len(set(free)) != len(free):
            raise RuntimeError("a KV block is in the free queue twice")
        if set(free) != {block for block, refs in enumerate(self._refs) if refs == 0}:
            raise RuntimeError("the free queue does not hold exactly the unreferenced KV blocks")
        if self._by_key != {key: block for block, (key, _) in self._published.items()}:
            raise RuntimeError("the index of KV blocks does not match what was published")
        if any(block not in self._published for block in self._kept) or any(
            block in self._published for block in self._free
        ):
            raise RuntimeError("a free KV block is kept although nothing can find it, or the reverse")
