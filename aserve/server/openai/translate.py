"""What the APIs that are translated onto the chat path have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from aserve.errors import InvalidRequestError
from aserve.server.openai.protocol import ChatBody, describe

PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "priority", "timeout",
    "cache_salt", "chat_template_kwargs",
)  # fmt: skip
"""Fields of the chat API that the others take as well, under the same names."""

MAX_ITEMS = 4096


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about fields of the chat API name the field of this one that they came from."""
    try:
        yield
    except InvalidRequestError as error:
        theirs = error.param or ""
        if theirs not in names:
            raise
        own, message = names[theirs], error.message
        if message.startswith(theirs + " "):
            message = own + message.removeprefix(theirs)
        raise InvalidRequestError(message, param=own) from None


def chat_body(**values: Any) -> ChatBody:
    """The same request as a chat would make it; values that are None are left out."""
    try:
        return ChatBody.model_validate(values)
    except ValidationError as error:
        raise describe(error) from None


def joined_systems(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leading system messages as one, because many chat templates know no second."""
    leading = 0
    while leading < len(messages) and messages[leading]["role"] in ("system", "developer"):
        leading += 1
    if leading < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:leading])
    return [{"role": "system", "content": text}, *messages[leading:]]


def add_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Adds a tool call to the assistant's message at the end, or makes one for it."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def texts(parts: list[Any], place: str, kinds: tuple[str, ...], param: str) -> str:
    """The text of content parts, one below the other. Raises InvalidRequestError for one of another kind."""
    found = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind in kinds else None
        if not isinstance(text, str):
            raise InvalidRequestError(f"{place}.{index}: {not_text(kind)}", param=param)
        found.append(text)
    return "\n".join(found)


_MEDIA = {
    "image_url": "images", "input_image": "images", "image": "images", "input_audio": "audio",
    "video_url": "videos", "file": "files", "input_file": "files", "document": "files",
}  # fmt: skip


def not_text(kind: Any) -> str:
    """Why a content part of this type is refused."""
    media = _MEDIA.get(kind) if isinstance(kind, str) else None
    if media is None:
        return "only parts of text are supported"
    return f"{kind}: {media} are not supported, only parts of text are"


def text_of(value: Any, place: str, param: str) -> str:
    """``value`` if it is a string. Raises InvalidRequestError naming ``place`` if not."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{place} must be a string", param=param)
    return value
