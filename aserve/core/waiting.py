"""Requests that do not run, in the order they will; and when they are given up."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from aserve.core.sequence import SequenceGroup
from aserve.errors import QueueFullError

Order = tuple[int, float, int]


def order(group: SequenceGroup) -> Order:
    """Place among all requests: by priority, then arrival, then the order they were queued in."""
    return group.priority, group.arrival_time, group.number


class WaitingQueue:
    """A priority queue whose members can leave from anywhere.

    Preempted requests wait here too: having arrived earlier, they come before those that never ran.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Order, SequenceGroup]] = []
        self._members: dict[str, SequenceGroup] = {}
        self.num_prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[SequenceGroup]:
        """In no particular order."""
        return iter(self._members.values())

    def __contains__(self, group: SequenceGroup) -> bool:
        return self._members.get(group.request_id) is group

    def push(self, group: SequenceGroup) -> None:
        self._members[group.request_id] = group
        self.num_prompt_tokens += group.num_prompt_tokens
        heappush(self._heap, (order(group), group))

    @property
    def head(self) -> SequenceGroup | None:
        """The one to run next; None if nobody waits."""
        heap = self._heap
        while heap and heap[0][1] not in self:
            heappop(heap)
        return heap[0][1] if heap else None

    def remove(self, group: SequenceGroup) -> None:
        """Takes out a member. One that left by another way than as the head must not come back."""
        del self._members[group.request_id]
        self.num_prompt_tokens -= group.num_prompt_tokens
        heap = self._heap
        if heap[0][1] is group:
            heappop(heap)
        elif len(heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in heap if entry[1] in self]
            heapify(self._heap)

    def check_room(self, max_requests: int | None, max_tokens: int | None, coming: int, tokens: int) -> None:
        """Raises QueueFullError if one more request of ``tokens`` prompt tokens is too many.

        coming: requests that were let in and are not here yet. An empty queue takes any length.
        """
        requests, waiting = len(self) + coming, self.num_prompt_tokens
        if max_requests is not None and requests >= max_requests:
            reason = f"{requests} requests are waiting, and no more than {max_requests} may"
        elif max_tokens is not None and len(self) and waiting + max(tokens, 1) > max_tokens:
            reason = f"{waiting} prompt tokens are waiting, and no more than {max_tokens} may"
        else:
            return
        raise QueueFullError(f"the server is overloaded: {reason}; try again later")


class Deadlines:
    """Requests by the time they are given up at."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, SequenceGroup]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, group: SequenceGroup) -> None:
        if group.deadline is None:
            return
        heappush(self._heap, (group.deadline, group.number, group))
        if len(self._heap) & (len(self._heap) - 1) == 0:
            # At every power of two, so that ended requests with late deadlines do not pile up.
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapify(self._heap)

    def due(self, now: float) -> list[SequenceGroup]:
        """Unfinished requests whose time has come; they are watched no longer."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            group = heappop(self._heap)[2]
            if not group.finished:
                found.append(group)
        return found
