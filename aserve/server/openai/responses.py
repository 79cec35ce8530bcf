"""``POST /v1/responses``: the stateless part of the Responses API, over the chat path."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import orjson
from quart import Blueprint, Response

from aserve.errors import AserveError
from aserve.messages.outputs import CompletionOutput, RequestOutput
from aserve.server.connection import EventStream
from aserve.server.direct import LiveEvents
from aserve.server.errors import failure_of
from aserve.server.openai import chat
from aserve.server.openai.chat import Begun
from aserve.server.openai.generation import Usage
from aserve.server.openai.logprobs import chat_logprobs
from aserve.server.openai.pieces import CallArguments, CallStart, Text
from aserve.server.openai.protocol import read
from aserve.server.openai.response_input import RENAMED, ResponseBody
from aserve.server.openai.translate import renamed
from aserve.server.service import new_id, service
from aserve.server.sse import named_event

blueprint = Blueprint("responses", __name__)


@blueprint.post("/v1/responses")
async def create_response() -> Response:
    body = await read(ResponseBody)
    body.check()
    with renamed(RENAMED):
        begun = await chat.begin(body.chat(), _id("resp"), clamp=True)
    answer = _Answer(body, begun)
    streams = begun.streams
    if not body.stream:
        with closing(streams):
            (result,) = await streams.finals()
        return Response(orjson.dumps(answer.whole(result)), content_type="application/json")
    events = LiveEvents(streams, answer, service().courier, failure=answer.failure, done=b"")
    return EventStream(events, on_close=streams.close)


@blueprint.post("/v1/responses/input_tokens")
async def count_input_tokens() -> Response:
    """The length of the prompt that the same response would have."""
    body = await read(ResponseBody)
    body.check()
    with renamed(RENAMED):
        count = await chat.count_prompt(body.chat())
    answer = {"object": "response.input_tokens", "input_tokens": count}
    return Response(orjson.dumps(answer), content_type="application/json")


def _id(prefix: str) -> str:
    return new_id(prefix).replace("-", "_", 1)


class _Item:
    """One item of the output while it grows: a message, or a call of a function."""

    def __init__(self, index: int, call: CallStart | None) -> None:
        self.index = index
        self.call = call
        self.id = _id("msg" if call is None else "fc")
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "annotations": [], "logprobs": self.logprobs, "text": self.text}

    def shown(self, status: str) -> dict[str, Any]:
        if self.call is not None:
            return {
                "id": self.id,
                "type": "function_call",
                "status": status,
                "arguments": self.text,
                "call_id": self.call.id,
                "name": self.call.name,
            }
        content = [] if status == "in_progress" else [self.part()]
        return {
            "id": self.id,
            "type": "message",
            "status": status,
            "content": content,
            "role": "assistant",
        }


class _Answer:
    """Turns the outputs of one response into its object or its events.

    The events of every item come in this order: the item is added, its content part is added, deltas, the
    text or the arguments are done, the part is done, the item is done. The next item begins after that.
    """

    def __init__(self, body: ResponseBody, begun: Begun) -> None:
        self._body = body
        self._begun = begun
        self._created = int(time.time())
        self._reader = begun.reader()
        self._usage = Usage(len(begun.prompt.ids))
        self._items: list[_Item] = []
        self._done: list[dict[str, Any]] = []
        self._number = 0
        self._end: str | None = None

    # ---------------------------------------------------------------- the object

    def whole(self, result: RequestOutput) -> dict[str, Any]:
        self.events_of(0, result)
        return self._response(self._status())

    def _status(self) -> str:
        return "incomplete" if self._end == "length" else "completed"

    def _response(self, status: str, error: AserveError | None = None) -> dict[str, Any]:
        body, params = self._body, self._begun.params
        ended = status in ("completed", "incomplete")
        code = None if error is None else ("rate_limit_exceeded" if error.status == 429 else "server_error")
        return {
            "id": self._begun.request_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None if error is None else {"code": code, "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": self._begun.model,
            "output": list(self._done),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._counts() if ended else None,
            "user": None,
            "metadata": body.metadata or {},
        }

    def _counts(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": sum(usage.cached.values())},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    # ---------------------------------------------------------------- the events

    def events_of(self, prompt_index: int, result: RequestOutput) -> bytes:
        self._usage.see(prompt_index, result)
        found: list[bytes] = []
        if not self._number:
            found.append(self._event("response.created", response=self._response("in_progress")))
            found.append(self._event("response.in_progress", response=self._response("in_progress")))
        for output in result.outputs:
            self._usage.completion_tokens += len(output.token_ids)
            ended = output.finish_reason is not None
            logprobs = self._logprobs(output)
            for piece in self._reader.feed(output.text, ended):
                if isinstance(piece, Text):
                    found += self._add_text(piece.text, logprobs)
                    logprobs = []
                elif isinstance(piece, CallStart):
                    found += self._begin(piece)
                elif isinstance(piece, CallArguments):
                    found.append(self._delta(piece.text))
            if ended and self._end is None:
                self._end = output.finish_reason
                if not self._items:
                    found += self._begin(None)  # an empty answer is a message, too
                found += self._finish_item()
        return b"".join(found)

    def ending(self) -> bytes:
        status = self._status()
        return self._event(f"response.{status}", response=self._response(status))

    def failure(self, error: BaseException) -> bytes:
        """``response.failed``, which ends the stream in place of ``response.completed``."""
        known = failure_of(error)
        return self._event("response.failed", response=self._response("failed", known))

    def _add_text(self, text: str, logprobs: list[dict[str, Any]]) -> list[bytes]:
        found = []
        if not self._items or self._items[-1].call is not None:
            found += self._begin(None)
        item = self._items[-1]
        item.text += text
        item.logprobs += logprobs
        found.append(
            self._event(
                "response.output_text.delta",
                item_id=item.id,
                output_index=item.index,
                content_index=0,
                delta=text,
                logprobs=logprobs,
            )
        )
        return found

    def _begin(self, call: CallStart | None) -> list[bytes]:
        found = self._finish_item() if self._items else []
        item = _Item(len(self._items), call)
        self._items.append(item)
        shown = item.shown("in_progress")
        found.append(self._event("response.output_item.added", output_index=item.index, item=shown))
        if call is None:
            found.append(self._part("response.content_part.added", item))
        return found

    def _delta(self, arguments: str) -> bytes:
        item = self._items[-1]
        item.text += arguments
        kind = "response.function_call_arguments.delta"
        return self._event(kind, item_id=item.id, output_index=item.index, delta=arguments)

    def _finish_item(self) -> list[bytes]:
        """The events that end the item at the end, unless it has ended."""
        item = self._items[-1]
        if len(self._done) > item.index:
            return []
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.call is not None:
            kind = "response.function_call_arguments.done"
            found = [self._event(kind, **place, name=item.call.name, arguments=item.text)]
        else:
            done = {"content_index": 0, "text": item.text, "logprobs": item.logprobs}
            found = [self._event("response.output_text.done", **place, **done)]
            found.append(self._part("response.content_part.done", item))
        shown = item.shown(self._status())
        self._done.append(shown)
        found.append(self._event("response.output_item.done", output_index=item.index, item=shown))
        return found

    def _part(self, kind: str, item: _Item) -> bytes:
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
        return self._event(kind, **place, part=item.part())

    def _logprobs(self, output: CompletionOutput) -> list[dict[str, Any]]:
        if not self._body.logprobs or output.logprobs is None:
            return []
        found: list[dict[str, Any]] = chat_logprobs(
            output.token_ids, output.logprobs, self._body.top_logprobs or 0
        )["content"]
        return found

    def _event(self, kind: str, **fields: Any) -> bytes:
        payload = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return named_event(kind, payload)
