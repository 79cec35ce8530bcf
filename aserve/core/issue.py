"""From the rows of a step to the plan that is sent out."""

from __future__ import annotations

from aserve.core.block_manager import BlockManager
from aserve.core.plan import PlanBuilder, describe_fork
from aserve.core.sequence import Sequence
from aserve.messages.step import Fork, StepPlan


class PlanIssuer:
    """Numbers plans and sequences, and remembers what the next plan must tell the worker besides rows.

    unsent: sequences the worker does not know yet, or has forgotten.
    branches: beams that begin as copies of others, ``(child, parent)``.
    chosen: beams whose last token the worker does not know yet.
    beams_in_flight: rows of beams in plans whose results are not here yet.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.unsent: list[Sequence] = []
        self.branches: list[tuple[Sequence, Sequence]] = []
        self.chosen: list[Sequence] = []
        self.beams_in_flight = 0
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
        # Beams whose results are on the way could go on as soon as these are here, and would have to wait.
        if self._blocks.lookahead or self.beams_in_flight:
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
        forks, chosen = self._branches() if self.chosen else ([], [])
        samples: list[tuple[int, Sequence]] = []
        beams: list[tuple[int, Sequence]] = []
        for seq, _, _ in step.prefills:
            self._blocks.publish(seq)
        rows = step.prefills + step.decodes
        for row, (seq, _, _) in enumerate(rows):
            if seq.num_computed < len(seq.token_ids) + seq.in_flight:
                continue  # a chunk that leaves some of the prompt for later draws nothing
            seq.in_flight += step.max_steps
            samples.append((row, seq))
            if not seq.group.expanded:
                if seq.group.beam is not None:
                    # Nobody knows which token it gets before the result is here: none is in flight.
                    seq.in_flight = 0
                    seq.group.beam.in_flight += 1
                    beams.append(samples.pop())
                    continue
                for child in self._expand(seq):
                    forks.append(describe_fork(child, seq))
                    samples.append((row, child))
        swap_outs = [(here, there) for there, here in self._swap_outs.items()]
        self.beams_in_flight += len(beams)
        plan = step.build(self.num_issued, now, rows, samples, beams, self.unsent, forks, chosen, swap_outs)
        self.unsent, self._swap_outs = [], {}
        self.num_issued += 1
        return plan

    def _branches(self) -> tuple[list[Fork], list[tuple[int, int, int]]]:
        """What to tell of the last step of beams. Those that ended or lost their slot since are left out, and
        those that were preempted and have come back are told whole."""
        whole = set(self.unsent)
        forks = [
            describe_fork(child, parent)
            for child, parent in self.branches
            if child.slot >= 0 and child not in whole
        ]
        chosen = [
            (seq.slot, len(seq.token_ids) - 1, seq.token_ids[-1])
            for seq in self.chosen
            if seq.slot >= 0 and seq not in whole
        ]
        self.branches, self.chosen = [], []
        return forks, chosen

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
