"""Several engine requests that belong to one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aserve.messages.inputs import OutputKind, PoolingParams, RequestOptions
from aserve.messages.outputs import RequestOutput
from aserve.messages.params import SamplingParams
from aserve.server.openai.prompts import Prompt

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine
    from aserve.engine.stream import OutputStream


class Streams:
    """The output streams of one call, one per prompt.

    As an async iterator it yields ``(prompt index, output)`` as outputs come. ``close`` aborts what is
    unfinished; it never blocks and may be called again.
    """

    def __init__(self, streams: Sequence[OutputStream]) -> None:
        self._streams = list(streams)
        self._pulls: dict[int, asyncio.Task[RequestOutput]] = {}
        self._pulled: asyncio.Queue[tuple[int, asyncio.Task[RequestOutput]]] | None = None

    @property
    def only(self) -> OutputStream | None:
        """The one stream of a call with one prompt."""
        return self._streams[0] if len(self._streams) == 1 else None

    def __aiter__(self) -> Streams:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if len(self._streams) == 1:  # no task needed
            return 0, await anext(self._streams[0])
        if self._pulled is None:
            self._pulled = asyncio.Queue()
            for index in range(len(self._streams)):
                self._pull(index)
        while self._pulls:
            index, task = await self._pulled.get()
            del self._pulls[index]
            try:
                output = task.result()
            except StopAsyncIteration:
                continue
            if not output.finished:
                self._pull(index)
            return index, output
        raise StopAsyncIteration

    def _pull(self, index: int) -> None:
        task = asyncio.ensure_future(self._streams[index].__anext__())
        self._pulls[index] = task
        task.add_done_callback(lambda done: self._on_pulled(index, done))

    def _on_pulled(self, index: int, task: asyncio.Task[RequestOutput]) -> None:
        if not task.cancelled():
            task.exception()  # looked at here, or asyncio would report it if nobody asks any more
        if self._pulled is not None:
            self._pulled.put_nowait((index, task))

    async def finals(self) -> list[RequestOutput]:
        """The last output of every stream, in prompt order."""
        return [await stream.final() for stream in self._streams]

    def close(self, cause: str = "disconnect") -> None:
        """Aborts what is unfinished, for a ``cause`` as ``OutputStream.close`` takes it."""
        for task in self._pulls.values():
            task.cancel()
        for stream in self._streams:
            stream.close(cause)


async def submit(
    engine: AsyncLLMEngine,
    request_id: str,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams | PoolingParams],
    kind: OutputKind,
    options: RequestOptions,
) -> Streams:
    """Submits every prompt, or, if one is refused, none."""
    admitted: list[OutputStream] = []
    try:
        for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
            own = f"{request_id}-{index}"
            admitted.append(
                await engine.submit(prompt.inputs(), chosen, request_id=own, kind=kind, options=options)
            )
    except BaseException:
        Streams(admitted).close("sibling_refused")
        raise
    return Streams(admitted)


@dataclass
class Usage:
    """Token counts of one call. ``cached``: by prompt, those of its tokens the prefix cache had."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def see(self, prompt_index: int, result: RequestOutput) -> None:
        """Takes note of what an output says about its prompt."""
        if result.num_cached_tokens is not None:
            self.cached[prompt_index] = result.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
        }
        if self.cached:
            counts["prompt_tokens_details"] = {"cached_tokens": sum(self.cached.values())}
        return counts


@dataclass
class Envelope:
    """What every response and chunk of one call has in common."""

    id: str
    kind: str
    model: str
    created: int

    @classmethod
    def new(cls, request_id: str, kind: str, model: str) -> Envelope:
        return cls(request_id, kind, model, int(time.time()))

    def wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
