"""From a body of the Responses API to the chat it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from aserve.errors import InvalidRequestError
from aserve.server.openai.protocol import Body, Bool, ChatBody, Int
from aserve.server.openai.translate import (
    MAX_ITEMS,
    PASSED_ON,
    add_call,
    chat_body,
    joined_systems,
    text_of,
    texts,
)

MAX_METADATA = 16
MAX_TOOLS = 512

_TEXT_KINDS = ("input_text", "output_text", "text", "refusal")
_LOGPROBS = "message.output_text.logprobs"

RENAMED = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
"""Fields of the chat API, and those here that become them."""


class Reasoning(Body):
    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None


class TextOptions(Body):
    format: dict[str, Any] | None = None
    verbosity: Any = None


class ResponseBody(Body):
    model: str
    input: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: Int | None = None
    stream: Bool = False
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Bool = True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    top_logprobs: Int | None = None
    truncation: Literal["disabled"] = "disabled"
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    # Checked as fields of the chat.
    temperature: Any = 1.0
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    priority: Any = None
    timeout: Any = None
    cache_salt: Any = None
    chat_template_kwargs: Any = None
    # Need a memory, or a task that outlives the exchange, or more than this server has.
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    moderation: Any = None
    # Without effect.
    access_programs: Any = None
    background_options: Any = None
    context_management: Any = None
    image: Any = None
    max_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    stream_options: Any = None
    user: Any = None

    @property
    def logprobs(self) -> bool:
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Raises InvalidRequestError for what this server does not have."""
        for name, why in _REFUSED.items():
            if getattr(self, name):
                raise InvalidRequestError(f"{name}: {why}", param=name)

    def functions(self) -> list[dict[str, Any]]:
        """The tools that are functions. Others would be run by the server, which runs none."""
        found = []
        for index, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                continue
            place = f"tools.{index}"
            function = {"name": text_of(tool.get("name"), f"{place}.name", "tools")}
            for key in ("description", "parameters", "strict"):
                if tool.get(key) is not None:
                    function[key] = tool[key]
            found.append({"type": "function", "function": function})
        return found

    def choice(self) -> Any:
        """``tool_choice`` as a chat has it."""
        choice = self.tool_choice
        if choice is None or isinstance(choice, str):
            return choice
        if choice.get("type") == "function":
            name = text_of(choice.get("name"), "tool_choice.name", "tool_choice")
            return {"type": "function", "function": {"name": name}}
        if choice.get("type") == "allowed_tools":
            tools = choice.get("tools")
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise InvalidRequestError("tool_choice.tools must be a list of tools", param="tool_choice")
            allowed = [{"type": "function", "function": {"name": tool.get("name")}} for tool in tools]
            return {
                "type": "allowed_tools",
                "allowed_tools": {"mode": choice.get("mode"), "tools": allowed},
            }
        raise InvalidRequestError(
            'tool_choice must be "none", "auto", "required", allowed_tools or a function', param="tool_choice"
        )

    def response_format(self) -> dict[str, Any] | None:
        given = self.text.format if self.text is not None else None
        if given is None or given.get("type") != "json_schema":
            return given
        schema = {key: given[key] for key in ("name", "description", "schema", "strict") if key in given}
        return {"type": "json_schema", "json_schema": schema}

    def messages(self) -> list[dict[str, Any]]:
        """The conversation, instructions first."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            found.append({"role": "user", "content": self.input})
        else:
            for index, item in enumerate(self.input):
                _add_item(found, item, f"input.{index}")
        return joined_systems(found)

    def chat(self) -> ChatBody:
        """The chat; raises InvalidRequestError for what cannot be part of one."""
        return chat_body(
            model=self.model,
            messages=self.messages(),
            max_completion_tokens=self.max_output_tokens,
            stream=self.stream,
            tools=self.functions() or None,
            tool_choice=self.choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.response_format(),
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            **{name: getattr(self, name) for name in PASSED_ON},
        )


_REFUSED = {
    "previous_response_id": "this server keeps no responses; send the whole conversation as input",
    "conversation": "this server keeps no conversations; send the whole conversation as input",
    "background": "this server answers while the client waits, or streams",
    "prompt": "this server keeps no prompts; send instructions and input",
    "moderation": "this server moderates nothing",
}


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], place: str) -> None:
    kind = "message" if item.get("type") is None else item["type"]
    if kind == "message":
        role = text_of(item.get("role"), f"{place}.role", "input")
        messages.append({"role": role, "content": _content(item.get("content"), f"{place}.content")})
    elif kind == "function_call":
        call = [text_of(item.get(key), f"{place}.{key}", "input") for key in ("call_id", "name", "arguments")]
        add_call(messages, *call)
    elif kind == "function_call_output":
        call_id = text_of(item.get("call_id"), f"{place}.call_id", "input")
        content = _content(item.get("output"), f"{place}.output")
        messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    elif kind == "item_reference":
        raise InvalidRequestError(f"{place}: this server keeps no items; send the item itself", param="input")
    elif kind != "reasoning":  # a model's earlier thoughts are left out, as they are in a chat
        raise InvalidRequestError(
            f"{place}: items of this type are not supported; message, function_call, function_call_output "
            "and reasoning are",
            param="input",
        )


def _content(content: Any, place: str) -> str:
    if isinstance(content, list):
        if len(content) > MAX_ITEMS:
            raise InvalidRequestError(f"{place} may hold at most {MAX_ITEMS} parts", param="input")
        return texts(content, place, _TEXT_KINDS, "input")
    return text_of(content, place, "input")
