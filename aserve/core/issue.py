"""From the rows of a step to the plan that is sent out."""

from __future__ import annotations

from aserve.core.block_manager import BlockManager
from aserve.core.plan import PlanBuilder, describe_fork
from aserve.core.sequence import Sequence
from aserve.messages.step import Fork, StepPlan


class PlanIssuer:
    """Numbers plans and sequences, and remembers what the next plan must tell the worker besides rows.

    unsent: sequences the worker does not know yet, or has forgotten.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.unsent: list[Sequence] = []
        self._blocks = blocks
        self._swap_outs: dict[int, int] = {}
        self._next_seq_id = 0
        self.num_issued = 0

    def new_seq_id(self) -> int:
        self._next_seq_id += 1
        return self._next_seq_id

    def move_out(self, pairs: list[tuple[int, int]]) -> None:
        """Has the next plan copy ``(block, swap block)``; of two copies to one place, the later counts.

        There need be no plan at once: nothing can touch the blocks before the next one, whose copies come
        first. By then a swap block may have been given back and taken anew.
        """
        self._swap_outs.update((there, here) for here, there in pairs)

    def extend(self, step: PlanBuilder, max_steps: int, seconds: float) -> None:
        """Lets the rows of ``step``, all of one token, go on for up to ``max_steps`` if there is room for
        that, and nothing to be done between one and the next."""
        if self._blocks.lookahead:
            return
        for seq, start, _ in step.decodes:
            if not seq.group.repeats or seq.num_computed < seq.num_known:
                return
            max_steps = min(max_steps, seq.max_known - 1 - start)
        rows = [(seq, start + max_steps) for seq, start, _ in step.decodes]
        if max_steps < 2 or sum(self._blocks.missing(*row) for row in rows) > self._blocks.num_free:
            return
        for seq, end in rows:
            step.add_growth(seq, self._blocks.grow(seq, end))
            seq.num_computed = end
        step.max_steps, step.seconds = max_steps, seconds

    def issue(self, step: PlanBuilder, now: float) -> StepPlan:
        """The plan; its sequences count as having drawn the tokens it asks for."""
        forks: list[Fork] = []
        samples: list[tuple[int, Sequence]] = []
        for seq, _, _ in step.prefills:
            self._blocks.publish(seq)
        rows = step.prefills + step.decodes
        for row, (seq, _, _) in enumerate(rows):
            if seq.num_computed < len(seq.token_ids) + seq.in_flight:
                continue  # a chunk that leaves some of the prompt for later draws nothing
            seq.in_flight += step.max_steps
            samples.append((row, seq))
            if not seq.group.expanded:
                for child in self._expand(seq):
                    forks.append(describe_fork(child, seq))
                    samples.append((row, child))
        swap_outs = [(here, there) for there, here in self._swap_outs.items()]
        plan = step.build(self.num_issued, now, rows, samples, self.unsent, forks, swap_outs)
        self.unsent, self._swap_outs = [], {}
        self.num_issued += 1
        return plan

    def _expand(self, parent: Sequence) -> list[Sequence]:
        """Creates the other ``best_of`` sequences, when the prompt is computed for all of them."""
        group = parent.group
        group.expanded = True
        children = []
        for index in range(1, group.width):
            child = parent.fork(self.new_seq_id(), index)
            child.slot = group.reserved_slots.pop()
            self._blocks.share(child)
            children.append(child)
        group.seqs.extend(children)
        return children
