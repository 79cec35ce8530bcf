"""Block tables of sequences: growing, sharing, splitting, finding, sliding, swapping, releasing."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

from aserve.core.block_pool import NULL_BLOCK, BlockPool
from aserve.core.sequence import Sequence, SequenceGroup, SequenceStatus

_KEY_BYTES = 16


@dataclass(slots=True)
class Growth:
    """What growing a table did.

    taken: blocks appended to the table.
    split: ``(index, source, copy)`` when the half-full last block was shared with a sibling and the
        sequence now has a copy of it at ``index``; the worker must copy ``source`` to ``copy`` first.
    """

    taken: list[int]
    split: tuple[int, int, int] | None = None


_NO_GROWTH = Growth([])


class BlockManager:
    """Keeps each sequence's table (``seq.blocks``) long enough for the tokens it is to compute.

    prefix_caching: full blocks can be found by their tokens and taken over by other sequences.
    window: every layer of the model sees only this many last tokens, the token itself included.
    num_swap_blocks: blocks of host memory that tables can be moved to.
    lookahead: slots kept free behind the token a sequence draws next.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = False,
        window: int | None = None,
        num_swap_blocks: int = 0,
        lookahead: int = 0,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if prefix_caching and window is not None:
            raise ValueError("prefix caching needs the blocks that a sliding window gives up")
        self.pool = BlockPool(num_blocks)
        self.swap_pool = BlockPool(num_swap_blocks)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.window = window
        self.lookahead = lookahead
        # Whether a token that goes to a block its sequence has, alone, changes nothing about blocks.
        self.simple = not lookahead and window is None
        # Keys are secret, so that nobody can make up tokens whose key is that of others' tokens.
        self._secret = os.urandom(32)

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---------------------------------------------------------------- growing

    def reach(self, seq: Sequence, end: int) -> int:
        """Tokens to have blocks for when ``seq`` computes up to ``end``."""
        if self.lookahead and end == seq.num_known:
            # The last token of a sequence at its limit is never computed.
            return max(end, min(end + self.lookahead, seq.max_known - 1))
        return end

    def _shared_tail(self, seq: Sequence) -> int | None:
        """Index of the partly filled block the next token goes to, if a sibling holds it too."""
        index, filled = divmod(seq.num_computed, self.block_size)
        if filled and self.pool.refs(seq.blocks[index]) > 1:
            return index
        return None

    def missing(self, seq: Sequence, end: int) -> int:
        """Blocks to take before tokens up to ``end`` can be computed."""
        missing = self.blocks_for(self.reach(seq, end)) - len(seq.blocks)
        return max(missing, 0) + (self._shared_tail(seq) is not None)

    def grow(self, seq: Sequence, end: int) -> Growth:
        """Makes room for tokens up to ``end``; the caller has checked ``missing``."""
        tail = self._shared_tail(seq)
        missing = self.blocks_for(self.reach(seq, end)) - len(seq.blocks)
        if tail is None and missing <= 0:
            return _NO_GROWTH
        split = None
        if tail is not None:
            source = seq.blocks[tail]
            (copy,) = self.pool.allocate(1)
            self.pool.release([source])
            seq.blocks[tail] = copy
            split = (tail, source, copy)
        taken: list[int] = []
        if missing > 0:
            taken = self.pool.allocate(missing)
            seq.blocks.extend(taken)
        return Growth(taken, split)

    def share(self, child: Sequence) -> None:
        """Makes a fork hold the blocks its parent has computed tokens in, and none beyond them."""
        held = self.blocks_for(child.num_computed)
        del child.blocks[held:]
        self.pool.share(child.blocks)
        del child.swapped_blocks[held:]
        self.swap_pool.share(child.swapped_blocks)

    def release(self, seq: Sequence) -> None:
        """Gives back whatever ``seq`` holds, here and in swap space.

        Its full blocks stay findable, unless its computation failed: they may be why.
        """
        if seq.blocks:
            if seq.status is SequenceStatus.FINISHED_FAILED:
                self.pool.forget(seq.blocks)
            else:
                self.publish(seq)
            self.pool.release(seq.blocks)
            seq.blocks = []
        if seq.swapped_blocks:
            self.swap_pool.release(seq.swapped_blocks)
            seq.swapped_blocks = []
        seq.num_published = seq.num_slid = 0

    # ---------------------------------------------------------------- finding what was computed before

    def match(self, seq: Sequence) -> list[int]:
        """Blocks that hold the first tokens of ``seq``, as many as are found.

        The last known token is never among them: computing it is what yields the next one. A request
        that still needs log-probabilities of its prompt finds nothing.
        """
        found: list[int] = []
        if not self.prefix_caching or seq.group.wants_prompt_logprobs:
            return found
        for index in range((len(seq.token_ids) - 1) // self.block_size):
            block = self.pool.find(*self._key(seq, index))
            if block is None:
                break
            found.append(block)
        return found

    def start_need(self, seqs: list[Sequence], found: list[list[int]]) -> tuple[int, int]:
        """Blocks that sequences take up which start with what was ``found`` for each: all, and free ones."""
        fresh = 0
        known: set[int] = set()
        for seq, blocks in zip(seqs, found, strict=True):
            fresh += self.blocks_for(self.reach(seq, seq.num_known)) - len(blocks)
            known.update(blocks)
        unheld = sum(1 for block in known if not self.pool.refs(block))
        return fresh + len(known), fresh + unheld

    def adopt(self, seq: Sequence, blocks: list[int]) -> None:
        """Starts a sequence that holds nothing with blocks just found."""
        self.pool.hold(blocks)
        seq.blocks = list(blocks)
        seq.num_published = len(blocks)
        seq.num_computed = len(blocks) * self.block_size

    def publish(self, seq: Sequence) -> None:
        """Makes the full blocks of ``seq`` findable.

        A block is published once its tokens are known here and the plan that computes the last of them
        has been issued, be it run or not. Whoever finds it is in a later plan, plans run in order, and so
        the block is read after it was filled. Nor does anything else get into it while it can be found:
        later tokens of its holders go to later blocks, and a step still in flight for a sequence that
        has ended or been preempted meanwhile either computes known tokens, which writes what their
        blocks are published to contain, or a token not known here yet, whose block is therefore not full
        of known tokens and not published.
        """
        if not self.prefix_caching or not seq.blocks:
            return
        full = min(seq.num_computed, len(seq.token_ids)) // self.block_size
        while seq.num_published < full:
            index = seq.num_published
            self.pool.publish(seq.blocks[index], *self._key(seq, index))
            seq.num_published = index + 1

    def _key(self, seq: Sequence, index: int) -> tuple[bytes, bytes]:
        """What block ``index`` of ``seq`` is published under, and its tokens, 4 bytes each.

        The key is a keyed BLAKE2b hash of the key before it and the tokens, so equal keys mean equal
        tokens from the first one on, the same adapter, image and salt.
        """
        keys = seq.block_keys
        for earlier in range(len(keys), index):
            self._add_key(seq, self._content(seq, earlier))
        content = self._content(seq, index)
        if len(keys) == index:
            self._add_key(seq, content)
        return keys[index], content

    def _content(self, seq: Sequence, index: int) -> bytes:
        size = self.block_size
        return array("I", seq.token_ids[index * size : (index + 1) * size]).tobytes()

    def _add_key(self, seq: Sequence, content: bytes) -> None:
        before = seq.block_keys[-1] if seq.block_keys else _root(seq.group)
        key = blake2b(before + content, key=self._secret, digest_size=_KEY_BYTES)
        seq.block_keys.append(key.digest())

    # ---------------------------------------------------------------- sliding windows

    def slide(self, seq: Sequence) -> None:
        """Frees blocks before the window of the next token to compute.

        Called before that token's row joins a plan: the plans that read those blocks were all issued
        before, and run before any plan whose rows may be given them.
        """
        if self.window is None:
            return
        first = (seq.num_computed - self.window + 1) // self.block_size
        if first > seq.num_slid:
            self.pool.release(seq.blocks[seq.num_slid : first])
            seq.blocks[seq.num_slid : first] = [NULL_BLOCK] * (first - seq.num_slid)
            seq.num_slid = first

    # ---------------------------------------------------------------- swapping

    def swap_out(self, seqs: list[Sequence]) -> list[tuple[int, int]] | None:
        """Moves tables to swap space: ``(block, swap block)`` to copy; None if they do not fit.

        Blocks that several of the sequences hold are moved once and stay shared.
        """
        places: dict[int, int] = {}
        for seq in seqs:
            for block in seq.blocks[: self.blocks_for(seq.num_computed)]:
                if block != NULL_BLOCK:
                    places[block] = NULL_BLOCK
        if not places or len(places) > self.swap_pool.num_free:
            return None
        places = dict(zip(places, self.swap_pool.allocate(len(places)), strict=True))
        for seq in seqs:
            held = seq.blocks[: self.blocks_for(seq.num_computed)]
            slid = seq.num_slid
            self.release(seq)
            seq.num_slid = slid
            seq.swapped_blocks = [places.get(block, NULL_BLOCK) for block in held]
            self.swap_pool.share(seq.swapped_blocks)
        self.swap_pool.release(list(places.values()))
        return list(places.items())

    def swap_need(self, seqs: list[Sequence]) -> int:
        """Free blocks needed to bring tables back and compute all that is known."""
        needed = len({block for seq in seqs for block in seq.swapped_blocks} - {NULL_BLOCK})
        tails: Counter[int] = Counter()
        for seq in seqs:
            missing = self.blocks_for(self.reach(seq, seq.num_known)) - len(seq.swapped_blocks)
            needed += max(missing, 0)
            if seq.num_computed % self.block_size:
                tails[seq.swapped_blocks[-1]] += 1
        # All holders of a half-full block but the last need a copy of it.
        return needed + sum(count - 1 for count in tails.values())

    def swap_in(self, seqs: list[Sequence]) -> list[tuple[int, int]]:
        """Moves tables back: ``(swap block, block)`` to copy; the caller has checked ``swap_need``."""
        swapped = list(dict.fromkeys(block for seq in seqs for block in seq.swapped_blocks))
        swapped = [block for block in swapped if block != NULL_BLOCK]
        places = dict(zip(swapped, self.pool.allocate(len(swapped)), strict=True))
        for seq in seqs:
            seq.blocks = [places.get(block, NULL_BLOCK) for block in seq.swapped_blocks]
            self.pool.share(seq.blocks)
            self.swap_pool.release(seq.swapped_blocks)
            seq.swapped_blocks = []
        self.pool.release(list(places.values()))
        return list(places.items())

    # ---------------------------------------------------------------- checks

    def verify(self, live: list[Sequence]) -> None:
        """Raises RuntimeError unless the tables of ``live`` account for every block."""
        self.pool.verify([seq.blocks for seq in live])
        self.swap_pool.verify([seq.swapped_blocks for seq in live])
        for seq in live:
            if seq.blocks and seq.swapped_blocks:
                raise RuntimeError(f"sequence {seq.seq_id} is swapped out and in at once")
            if seq.swapped_blocks and len(seq.swapped_blocks) != self.blocks_for(seq.num_computed):
                raise RuntimeError(f"sequence {seq.seq_id} lost a part of its swapped blocks")
            table = seq.blocks or seq.swapped_blocks
            if any((block == NULL_BLOCK) != (index < seq.num_slid) for index, block in enumerate(table)):
                raise RuntimeError(f"the window of sequence {seq.seq_id} does not match its table")


def _root(group: SequenceGroup) -> bytes:
    """What the keys of a request begin with besides its tokens; every part's length is told."""
    adapter = 0 if group.lora_request is None else group.lora_request.lora_int_id
    image = group.image_hash or b""
    salt = b"" if group.cache_salt is None else b"salt" + group.cache_salt.encode()
    return b"%d,%d,%d;" % (adapter, len(image), len(salt)) + image + salt
