"""Tools and calls in a conversation, for chat templates that know them and for those that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from aserve.server.openai.tools.mistral import short_id, wants_short_ids
from aserve.server.openai.tools.reader import CallReader
from aserve.server.openai.tools.request import ToolRequest


def takes_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model."""
    return "tools" in (template or "")


def takes_calls(template: str | None) -> bool:
    """Whether a chat template shows the model the calls that it made."""
    return "tool_calls" in (template or "")


def for_template(
    template: str | None,
    messages: list[dict[str, Any]],
    tools: ToolRequest | None = None,
    reader: CallReader | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as ``template`` takes them.

    Where it knows no tools, the system message, which is made if there is none, ends with a list of
    them and how to call one for ``reader`` to read. Where it knows no calls, an assistant's calls are part
    of its text, written in that way too. Ids of another kind than a template insists on are replaced, the
    same by the same.
    """
    if not takes_calls(template):
        write = CallReader.write if reader is None else reader.write
        messages = [
            _calls_as_text(message, write) if "tool_calls" in message else message for message in messages
        ]
    elif wants_short_ids(template):
        messages = [_with_short_ids(message) for message in messages]
    if tools is None or reader is None:
        return messages, None
    shown = [function.shown() for function in tools.functions]
    if takes_tools(template):
        return messages, shown
    return _with_system(messages, _list_of(shown, reader.how)), None


def _calls_as_text(message: dict[str, Any], write: Callable[[list[str]], str]) -> dict[str, Any]:
    calls = write([orjson.dumps(call["function"]).decode() for call in message["tool_calls"]])
    text = message["content"]
    return {"role": message["role"], "content": f"{text}\n{calls}" if text else calls}


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_call_id" in message:
        return {**message, "tool_call_id": short_id(message["tool_call_id"])}
    if "tool_calls" not in message:
        return message
    calls = [{**call, "id": short_id(call.get("id", ""))} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _list_of(tools: Sequence[dict[str, Any]], how: str) -> str:
    lines = [orjson.dumps(tool["function"]).decode() for tool in tools]
    return "\n".join(["These functions can be called:", *lines, how])


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    first = messages[0]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
