"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import orjson
from quart import Blueprint, Response

from aserve.messages.outputs import CompletionOutput, RequestOutput
from aserve.server.anthropic import errors
from aserve.server.anthropic.body import CountBody, MessagesBody
from aserve.server.connection import EventStream
from aserve.server.direct import LiveEvents
from aserve.server.openai import chat
from aserve.server.openai.chat import Begun
from aserve.server.openai.generation import Usage
from aserve.server.openai.pieces import CallArguments, CallStart, Text
from aserve.server.openai.protocol import read
from aserve.server.service import new_id, service
from aserve.server.sse import Template, named_event

blueprint = Blueprint("messages", __name__)
errors.register(blueprint)


@blueprint.post("/v1/messages")
async def create_message() -> Response:
    body = await read(MessagesBody)
    begun = await chat.begin(body.whole_chat(), new_id("msg").replace("-", "_"), clamp=True)
    answer = _Answer(begun)
    streams = begun.streams
    if not body.stream:
        with closing(streams):
            (result,) = await streams.finals()
        return Response(orjson.dumps(answer.whole(result)), content_type="application/json")
    events = LiveEvents(streams, answer, service().courier, failure=errors.event_of, done=b"")
    return EventStream(events, on_close=streams.close)


@blueprint.post("/v1/messages/count_tokens")
async def count_tokens() -> Response:
    """The length of the prompt that the same message would have."""
    body = await read(CountBody)
    count = await chat.count_prompt(body.chat())
    return Response(orjson.dumps({"input_tokens": count}), content_type="application/json")


class _Answer:
    """Turns the outputs of one message into its object or its events.

    The events: the message starts; every content block starts, has deltas and stops before the next one
    starts; the message's delta, which tells why it ended; the message stops.
    """

    def __init__(self, begun: Begun) -> None:
        self._begun = begun
        self._reader = begun.reader()
        self._usage = Usage(len(begun.prompt.ids))
        self._blocks: list[dict[str, Any]] = []
        self._arguments = ""
        self._open = False
        self._started = False
        self._reason: str | None = None
        self._sequence: str | None = None
        self._template: Template | None = None

    # ---------------------------------------------------------------- the object

    def whole(self, result: RequestOutput) -> dict[str, Any]:
        self.events_of(0, result)
        return self._message(self._blocks, self._reason, self._sequence, self._counts())

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, sequence: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._begun.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._begun.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }

    def _counts(self) -> dict[str, Any]:
        """Here the input tokens are those that were not found in the prefix cache."""
        cached = sum(self._usage.cached.values())
        return {
            "input_tokens": self._usage.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._usage.completion_tokens,
        }

    # ---------------------------------------------------------------- the events

    def events_of(self, prompt_index: int, result: RequestOutput) -> bytes:
        self._usage.see(prompt_index, result)
        found: list[bytes] = []
        if not self._started:
            self._started = True
            message = self._message([], None, None, self._counts())
            found.append(named_event("message_start", {"type": "message_start", "message": message}))
        for output in result.outputs:
            self._usage.completion_tokens += len(output.token_ids)
            ended = output.finish_reason is not None
            for piece in self._reader.feed(output.text, ended):
                if isinstance(piece, Text):
                    found += self._add_text(piece.text)
                elif isinstance(piece, CallStart):
                    block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
                    found += self._begin(block)
                elif isinstance(piece, CallArguments):
                    self._arguments += piece.text
                    found.append(self._delta({"type": "input_json_delta", "partial_json": piece.text}))
            if ended:
                found += self._stop()
                self._note_end(output)
        return b"".join(found)

    def ending(self) -> bytes:
        delta = {"stop_reason": self._reason, "stop_sequence": self._sequence}
        payload = {"type": "message_delta", "delta": delta, "usage": self._counts()}
        return named_event("message_delta", payload) + named_event("message_stop", {"type": "message_stop"})

    def _note_end(self, output: CompletionOutput) -> None:
        if output.finish_reason == "length":
            self._reason = "max_tokens"
        elif isinstance(output.stop_reason, str):
            self._reason, self._sequence = "stop_sequence", output.stop_reason
        elif any(block["type"] == "tool_use" for block in self._blocks):
            self._reason = "tool_use"
        else:
            self._reason = "end_turn"

    def _add_text(self, text: str) -> list[bytes]:
        found = []
        if not self._open or self._blocks[-1]["type"] != "text":
            found += self._begin({"type": "text", "text": ""})
        self._blocks[-1]["text"] += text
        if self._template is None:
            self._template = Template(
                lambda text: self._payload({"type": "text_delta", "text": text}), "content_block_delta"
            )
        found.append(self._template.fill(text))
        return found

    def _begin(self, block: dict[str, Any]) -> list[bytes]:
        found = self._stop()
        self._blocks.append(block)
        self._open, self._template = True, None
        payload = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}
        found.append(named_event("content_block_start", payload))
        return found

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named_event("content_block_delta", self._payload(delta))

    def _payload(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _stop(self) -> list[bytes]:
        """The event that ends the open block, if there is one."""
        if not self._open:
            return []
        self._open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"], self._arguments = arguments_of(self._arguments), ""
        payload = {"type": "content_block_stop", "index": len(self._blocks) - 1}
        return [named_event("content_block_stop", payload)]


def arguments_of(text: str) -> Any:
    """The object that a call's arguments are; {} for a call that was cut off before they were one."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
