"""From a body of the Messages API to the chat it stands for."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import Field

from aserve.errors import InvalidRequestError
from aserve.server.openai.protocol import MAX_STOP, Body, Bool, ChatBody, PositiveInt, StopString
from aserve.server.openai.translate import MAX_ITEMS, add_call, chat_body, joined_systems, text_of, texts

MAX_TOOLS = 512

PASSED_ON = ("temperature", "top_k", "top_p", "priority", "timeout", "cache_salt")
"""Fields that are the chat API's own, under the same names."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

Blocks = Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)]


class Turn(Body):
    role: str
    content: str | Blocks


class Thinking(Body):
    type: str
    budget_tokens: Any = None
    display: Any = None


class OutputConfig(Body):
    effort: str | None = None
    format: dict[str, Any] | None = None
    task_budget: Any = None


class CountBody(Body):
    """What the length of a prompt depends on."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_ITEMS)]
    system: str | Blocks | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    # The server would have to run something.
    container: Any = None
    mcp_servers: Any = None
    # Without effect.
    cache_control: Any = None
    context_management: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    def functions(self) -> list[dict[str, Any]]:
        """The tools that the client runs. Those without a schema would be run by the server."""
        found = []
        for index, tool in enumerate(self.tools or ()):
            schema = tool.get("input_schema")
            if schema is None:
                continue
            function = {"name": text_of(tool.get("name"), f"tools.{index}.name", "tools")}
            if tool.get("description") is not None:
                function["description"] = tool["description"]
            found.append({"type": "function", "function": {**function, "parameters": schema}})
        return found

    def choice(self) -> Any:
        """``tool_choice`` as a chat has it."""
        if self.tool_choice is None:
            return None
        kind = self.tool_choice.get("type")
        if kind == "tool":
            name = text_of(self.tool_choice.get("name"), "tool_choice.name", "tool_choice")
            return {"type": "function", "function": {"name": name}}
        if not isinstance(kind, str) or kind not in _CHOICES:
            raise InvalidRequestError("tool_choice.type must be auto, any, tool or none", param="tool_choice")
        return _CHOICES[kind]

    def response_format(self) -> dict[str, Any] | None:
        given = self.output_format
        if self.output_config is not None and self.output_config.format is not None:
            given = self.output_config.format
        if given is None:
            return None
        if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
            raise InvalidRequestError(
                "output_config.format must be json_schema with a schema", param="output_config"
            )
        return {"type": "json_schema", "json_schema": {"name": "output", "schema": given["schema"]}}

    def chat_messages(self) -> list[dict[str, Any]]:
        """The conversation, system first."""
        found: list[dict[str, Any]] = []
        if self.system is not None:
            system = self.system
            text = system if isinstance(system, str) else texts(system, "system", ("text",), "system")
            if text:
                found.append({"role": "system", "content": text})
        for index, turn in enumerate(self.messages):
            if turn.role not in ("user", "assistant", "system"):
                raise InvalidRequestError(
                    f"messages.{index}.role must be user or assistant", param="messages"
                )
            if isinstance(turn.content, str):
                found.append({"role": turn.role, "content": turn.content})
            else:
                _add_blocks(found, turn.role, turn.content, f"messages.{index}.content")
        return joined_systems(found)

    def chat(self, **values: Any) -> ChatBody:
        """The chat; raises InvalidRequestError for what cannot be part of one."""
        for name in ("container", "mcp_servers"):
            if getattr(self, name):
                raise InvalidRequestError(f"{name} is not supported: this server runs no tools", param=name)
        single = (self.tool_choice or {}).get("disable_parallel_tool_use")
        if not isinstance(single, (bool, type(None))):
            raise InvalidRequestError(
                "tool_choice.disable_parallel_tool_use must be true or false", param="tool_choice"
            )
        messages = self.chat_messages()
        last = messages[-1] if messages else {}
        # An answer that the client has begun is gone on with.
        begun = last.get("role") == "assistant" and bool(last["content"]) and "tool_calls" not in last
        variables = None
        if self.thinking is not None:
            variables = {"enable_thinking": self.thinking.type != "disabled"}
        return chat_body(
            model=self.model,
            messages=messages,
            continue_final_message=begun,
            tools=self.functions() or None,
            tool_choice=self.choice(),
            parallel_tool_calls=not single,
            response_format=self.response_format(),
            reasoning_effort=self.output_config.effort if self.output_config is not None else None,
            chat_template_kwargs=variables,
            **values,
        )


class MessagesBody(CountBody):
    max_tokens: PositiveInt
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOP)] | None = None
    stream: Bool = False
    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    priority: Any = None
    timeout: Any = None
    cache_salt: Any = None
    # Without effect.
    diagnostics: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None

    def whole_chat(self) -> ChatBody:
        return self.chat(
            max_completion_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            **{name: getattr(self, name) for name in PASSED_ON},
        )


def _add_blocks(messages: list[dict[str, Any]], role: str, blocks: list[dict[str, Any]], place: str) -> None:
    """Adds the messages that the blocks of one turn become, in their order."""
    pending: list[str] = []

    def flush() -> None:
        if pending:
            messages.append({"role": role, "content": "\n".join(pending)})
            pending.clear()

    for index, block in enumerate(blocks):
        kind, here = block.get("type"), f"{place}.{index}"
        if kind == "text":
            pending.append(text_of(block.get("text"), f"{here}.text", "messages"))
        elif kind == "tool_use":
            flush()
            call_id = text_of(block.get("id"), f"{here}.id", "messages")
            name = text_of(block.get("name"), f"{here}.name", "messages")
            given = block.get("input")
            if not isinstance(given, (dict, type(None))):
                raise InvalidRequestError(f"{here}.input must be an object", param="messages")
            add_call(messages, call_id, name, orjson.dumps(given or {}).decode())
        elif kind == "tool_result":
            flush()
            call_id = text_of(block.get("tool_use_id"), f"{here}.tool_use_id", "messages")
            content = _result(block.get("content"), f"{here}.content")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        elif kind not in ("thinking", "redacted_thinking"):  # earlier thoughts are left out, as in a chat
            raise InvalidRequestError(
                f"{here}: blocks of this type are not supported; text, tool_use and tool_result are",
                param="messages",
            )
    flush()


def _result(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        return texts(content, place, ("text",), "messages")
    return text_of(content, place, "messages")
