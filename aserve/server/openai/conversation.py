"""From messages to the prompt that the chat template makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aserve.errors import InvalidRequestError
from aserve.server.openai import prompts
from aserve.server.openai.prompts import Prompt
from aserve.server.openai.protocol import ChatBody, Message
from aserve.server.openai.tools.conversation import for_template
from aserve.server.openai.tools.plan import ToolPlan, tool_plan
from aserve.server.openai.tools.request import checked_calls, tool_request
from aserve.server.openai.translate import not_text
from aserve.server.service import service
from aserve.tokenizer.chat import render_chat, template_text

if TYPE_CHECKING:
    from aserve.engine.async_engine import AsyncLLMEngine

LONG_CONVERSATION = 32_000
"""Characters from which a conversation is rendered in a thread."""

MANY_MESSAGES = 256
"""Messages, likewise."""


async def plan_tools(engine: AsyncLLMEngine, body: ChatBody) -> ToolPlan | None:
    """How the tools of a request are shown to the model and its calls are read; None without tools.

    Raises InvalidRequestError for tools that make no sense, and if nothing could read the model's calls.
    """
    if not body.tools and body.tool_choice is None:
        return None
    request = tool_request(body.tools, body.tool_choice, body.parallel_tool_calls)
    if request is None:
        return None
    tokenizer = await prompts.tokenizer_of(engine)
    return tool_plan(request, tokenizer, service().chat_template, service().args.tool_call_parser)


async def make_prompt(
    engine: AsyncLLMEngine, body: ChatBody, messages: list[dict[str, Any]], tools: ToolPlan | None = None
) -> Prompt:
    """The prompt that the chat template makes of ``messages`` and ``tools``, tokenised."""
    text = await render(
        engine,
        messages,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        documents=body.documents,
        template_kwargs=body.template_variables(),
    )
    return await prompts.tokenise(
        engine,
        text,
        add_special_tokens=body.add_special_tokens,
        truncate=body.truncate_prompt_tokens,
        want_text=False,
    )


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """What chat templates look at: roles, texts, an assistant's calls of tools, and whose result a tool's is.

    Messages with neither content nor calls are dropped; ``developer`` is what newer clients call
    ``system``. Raises InvalidRequestError for content that is not text and for calls that are none.
    """
    found = []
    for index, message in enumerate(messages):
        calls = None
        if message.tool_calls is not None:  # whoever's: what is no call is refused, not overlooked
            calls = checked_calls(message.tool_calls, f"messages.{index}.tool_calls")
        calling = bool(calls) and message.role == "assistant"
        if message.content is None and not calling:
            continue
        role = "system" if message.role == "developer" else message.role
        content = "" if message.content is None else _text(message.content, f"messages.{index}.content")
        entry: dict[str, Any] = {"role": role, "content": content}
        if calling:
            entry["tool_calls"] = calls
        if role == "tool":
            own = {"tool_call_id": message.tool_call_id, "name": message.name}
            entry |= {key: value for key, value in own.items() if value is not None}
        found.append(entry)
    if not found:
        raise InvalidRequestError("messages hold no content", param="messages")
    return found


def _text(content: str | list[dict[str, Any]], place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type")
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise InvalidRequestError(f"{place}.{index}: {not_text(kind)}", param="messages")
        texts.append(text)
    return "\n".join(texts)


async def render(
    engine: AsyncLLMEngine,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    tools: ToolPlan | None = None,
    documents: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The prompt the chat template makes of ``messages``; its errors are the request's (400)."""
    tokenizer = await prompts.tokenizer_of(engine)
    template = service().chat_template
    shown: list[dict[str, Any]] | None = None
    if tools is not None:
        messages, shown = tools.shown(messages)
    elif any("tool_calls" in message for message in messages):
        messages, _ = for_template(template_text(tokenizer, template), messages)

    def work() -> str:
        return render_chat(
            tokenizer,
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=shown,
            documents=documents,
            template_kwargs=template_kwargs,
        )

    size = sum(len(message["content"]) for message in messages)
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    if shown or calls:
        size += len(orjson.dumps([shown, calls]))
    simple = not documents and not template_kwargs and len(messages) < MANY_MESSAGES
    return await service().render(work, quick=simple and size < LONG_CONVERSATION)
