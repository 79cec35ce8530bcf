"""One request's way back to whoever asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aserve.errors import AserveError, RequestFailedError
from aserve.messages.inputs import OutputKind
from aserve.messages.outputs import RequestOutput


class Mailbox:
    """The engine's end of a stream: one slot, not a queue.

    A consumer that falls behind finds what it missed merged into one output. Memory is bounded by
    the request's own length, and a slow reader costs fewer wake-ups rather than more memory.
    """

    __slots__ = ("_error", "_slot", "_waiter", "ended", "kind", "notify")

    def __init__(self, kind: OutputKind) -> None:
        self.kind = kind
        self.ended = False
        self.notify: Callable[[], None] | None = None
        """Called, instead of waking a task, whenever there is something new."""
        self._slot: RequestOutput | None = None
        self._error: AserveError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        if self.ended:
            return
        if self._slot is not None and self.kind is OutputKind.DELTA:
            output = merge_deltas(self._slot, output)
        self._slot = output
        self.ended = output.finished
        self._wake()

    def fail(self, error: AserveError) -> None:
        """Ends the stream; what is still in the slot is delivered before the error."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._wake()

    def end(self) -> None:
        """Ends the stream without a last output (the consumer has left)."""
        if not self.ended:
            self.ended = True
            self._slot = None
            self._wake()

    async def get(self) -> RequestOutput | None:
        """The next output, or None at the end; raises the error the request ended by."""
        while self._slot is None:
            if self._error is not None:
                raise self._error
            if self.ended:
                return None
            if self._waiter is not None:
                raise RuntimeError("a stream can be read by one task at a time")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()

    def take(self) -> RequestOutput | None:
        """The next output if there is one."""
        output, self._slot = self._slot, None
        return output

    @property
    def quiet(self) -> bool:
        """Whether ``get`` would wait."""
        return self._slot is None and not self.ended

    def _wake(self) -> None:
        if self.notify is not None:
            self.notify()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class OutputStream:
    """Async iterator over a request's outputs.

    Closing it, leaving it to the garbage collector or cancelling the task that reads it aborts the
    request if it is unfinished. Iteration raises RequestFailedError, EngineBusyError or
    EngineDeadError when the request ended by an error.
    """

    def __init__(self, request_id: str, mailbox: Mailbox, abort: Callable[[str, str], None]) -> None:
        self.request_id = request_id
        self._mailbox = mailbox
        self._abort = abort
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        try:
            output = await self._mailbox.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if output is None:
            raise StopAsyncIteration
        return output

    def listen(self, notify: Callable[[], None] | None) -> None:
        """Has ``notify`` called in the middle of every step that changes or ends the stream.

        For readers that fetch outputs with ``take``; it must return at once and not raise.
        """
        self._mailbox.notify = notify

    def take(self) -> RequestOutput | None:
        """The next output if it is there; does not wait and never raises."""
        return self._mailbox.take()

    @property
    def quiet(self) -> bool:
        """Whether the next iteration would wait."""
        return self._mailbox.quiet

    @property
    def ended(self) -> bool:
        """Whether nothing further will come after what is there now."""
        return self._mailbox.ended

    async def final(self) -> RequestOutput:
        """Reads to the end and returns the last output, whole."""
        last: RequestOutput | None = None
        async for output in self:
            merge = last is not None and self._mailbox.kind is OutputKind.DELTA
            last = merge_deltas(last, output) if merge and last is not None else output
        if last is None:
            raise RequestFailedError(f"request {self.request_id} was aborted before it had any output")
        return last

    def close(self, cause: str = "caller") -> None:
        """Aborts the request if it is unfinished. Never blocks; may be called again.

        cause: what the log and the metrics call it; one of a few fixed words.
        """
        if not self._mailbox.ended:
            self._mailbox.end()
            self._abort(self.request_id, cause)

    def __del__(self) -> None:
        # The collector may run in any thread, and after the loop has closed.
        if not self._mailbox.ended and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_close_late, self._mailbox, self._abort, self.request_id)


def _close_late(mailbox: Mailbox, abort: Callable[[str, str], None], request_id: str) -> None:
    if not mailbox.ended:
        mailbox.end()
        abort(request_id, "dropped")


def merge_deltas(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two consecutive delta outputs as one."""
    merged = {output.index: output for output in first.outputs}
    for new in second.outputs:
        old = merged.get(new.index)
        if old is not None:
            new.text = old.text + new.text
            new.token_ids = old.token_ids + new.token_ids
            if old.logprobs is not None:
                new.logprobs = old.logprobs + (new.logprobs or [])
        merged[new.index] = new
    second.outputs = list(merged.values())
    if second.prompt_logprobs is None:
        second.prompt_logprobs = first.prompt_logprobs
    return second
