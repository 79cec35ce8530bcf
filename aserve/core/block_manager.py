"""Block tables of sequences: growing, sharing, splitting and releasing them."""

from __future__ import annotations

from dataclasses import dataclass

from aserve.core.block_pool import BlockPool
from aserve.core.sequence import Sequence


@dataclass(slots=True)
class Growth:
    """What growing a table did.

    taken: blocks appended to the table.
    split: ``(index, source, copy)`` when the half-full last block was shared with a sibling and the
        sequence now has a copy of it at ``index``; the worker must copy ``source`` to ``copy`` first.
    """

    taken: list[int]
    split: tuple[int, int, int] | None = None


class BlockManager:
    """Keeps each sequence's table (``seq.blocks``) long enough for the tokens it is to compute."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _shared_tail(self, seq: Sequence) -> int | None:
        """Index of the partly filled block the next token goes to, if a sibling holds it too."""
        index, filled = divmod(seq.num_computed, self.block_size)
        if filled and self.pool.is_shared(seq.blocks[index]):
            return index
        return None

    def missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks to take before tokens up to ``num_tokens`` can be written."""
        missing = self.blocks_for(num_tokens) - len(seq.blocks)
        return missing + (self._shared_tail(seq) is not None)

    def grow(self, seq: Sequence, num_tokens: int) -> Growth:
        """Makes room for tokens up to ``num_tokens``; the caller has checked ``missing``."""
        split = None
        tail = self._shared_tail(seq)
        if tail is not None:
            source = seq.blocks[tail]
            (copy,) = self.pool.allocate(1)
            self.pool.release([source])
            seq.blocks[tail] = copy
            split = (tail, source, copy)
        taken: list[int] = []
        missing = self.blocks_for(num_tokens) - len(seq.blocks)
        if missing > 0:
            taken = self.pool.allocate(missing)
            seq.blocks.extend(taken)
        return Growth(taken, split)

    def share(self, child: Sequence) -> None:
        """Counts a fork's references to the blocks it took over from its parent."""
        self.pool.share(child.blocks)

    def release(self, seq: Sequence) -> None:
        if seq.blocks:
            self.pool.release(seq.blocks)
            seq.blocks = []
