"""What a request says about tools, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from aserve.errors import InvalidRequestError
from aserve.messages.params import GuidedParams
from aserve.server.openai.tools.schema import (
    MAX_SCHEMA_DEPTH,
    arguments_schema,
    calls_schema,
    checked_parameters,
    depth_beyond,
)

MAX_TOOLS = 512
MAX_DESCRIPTION = 64 * 1024

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_FORM = '{"type": "function", "function": {"name": "..."}}'

Mode = Literal["auto", "required", "named"]


@dataclass(frozen=True)
class Function:
    """One tool. ``parameters``: JSON schema of its arguments; None if it takes none."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None

    def shown(self) -> dict[str, Any]:
        """What chat templates get. Many read the parameters without asking whether there are any."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolRequest:
    """The tools that a model may call, of which it sees every one, and whether it must.

    mode: ``auto`` leaves it to the model, ``required`` wants at least one call, ``named`` one of the only
    function there is. parallel: whether there may be several calls.
    """

    functions: tuple[Function, ...]
    mode: Mode
    parallel: bool

    def guided(self, backend: str | None = None) -> GuidedParams | None:
        """What must guide the output, by ``backend`` or the engine's own; None if nothing has to."""
        if self.mode == "auto":
            return None
        if self.mode == "named":
            schema = arguments_schema(self.functions[0].parameters)
        else:
            parameters = {function.name: function.parameters for function in self.functions}
            schema = calls_schema(parameters, parallel=self.parallel)
        return GuidedParams(json=schema, backend=backend, source="tools")


def tool_request(tools: list[Any] | None, choice: Any, parallel: bool | None) -> ToolRequest | None:
    """What the three fields ask for; None if the model is to know of no tools.

    So it is with ``tool_choice`` "none": tools that must not be called are not shown either. Raises
    InvalidRequestError naming the field.
    """
    functions = {function.name: function for function in checked_tools(tools)}
    mode, names = _choice(choice)
    if mode is None or (not functions and mode == "auto" and names is None):
        return None
    if not functions:
        raise InvalidRequestError("tool_choice needs tools to choose from", param="tool_choice")
    for name in names or ():
        if name not in functions:
            raise InvalidRequestError(
                f"tool_choice names {name[:128]!r}, which is not in tools", param="tool_choice"
            )
    chosen = tuple(functions[name] for name in (functions if names is None else dict.fromkeys(names)))
    return ToolRequest(chosen, mode, parallel is not False)


def checked_tools(tools: list[Any] | None) -> list[Function]:
    """The functions in ``tools``. Raises InvalidRequestError."""
    if len(tools or ()) > MAX_TOOLS:
        raise InvalidRequestError(f"tools may hold at most {MAX_TOOLS}", param="tools")
    found: dict[str, Function] = {}
    for index, tool in enumerate(tools or ()):
        function = _function(tool, f"tools.{index}")
        if function.name in found:
            raise InvalidRequestError(f"tools hold {function.name!r} twice", param="tools")
        found[function.name] = function
    return list(found.values())


def _function(tool: Any, place: str) -> Function:
    if not isinstance(tool, dict):
        raise InvalidRequestError(f"{place} must be an object", param="tools")
    if tool.get("type") != "function":
        raise InvalidRequestError(f'{place}.type must be "function": there are no others here', param="tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequestError(f"{place}.function must be an object", param="tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{place}.function.name must be 1 to 128 letters, digits or any of _ - . : /", param="tools"
        )
    description = function.get("description")
    if description is not None and not (isinstance(description, str) and len(description) <= MAX_DESCRIPTION):
        raise InvalidRequestError(
            f"{place}.function.description must be a string of at most {MAX_DESCRIPTION} characters",
            param="tools",
        )
    if not isinstance(function.get("strict"), (bool, type(None))):
        raise InvalidRequestError(f"{place}.function.strict must be true or false", param="tools")
    parameters = checked_parameters(function.get("parameters"), f"{place}.function.parameters")
    return Function(name, description, parameters)


def _choice(choice: Any) -> tuple[Mode | None, list[str] | None]:
    """How ``tool_choice`` has the model call tools, and the names of those it allows; None for all."""
    if choice is None or choice == "auto":
        return "auto", None
    if choice == "none":
        return None, None
    if choice == "required":
        return "required", None
    if isinstance(choice, dict) and choice.get("type") == "function":
        return "named", [_name_in(choice)]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        if isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
            tools = allowed.get("tools")
            if isinstance(tools, list) and 0 < len(tools) <= MAX_TOOLS:
                return allowed["mode"], [_name_in(tool) for tool in tools]
        raise InvalidRequestError(
            'tool_choice.allowed_tools must be {"mode": "auto" or "required", "tools": [...]}',
            param="tool_choice",
        )
    raise InvalidRequestError(
        f'tool_choice must be "none", "auto", "required" or {_FORM}', param="tool_choice"
    )


def _name_in(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequestError(f"tool_choice must name functions as {_FORM}", param="tool_choice")
    return name


def checked_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """The ``tool_calls`` of an assistant's message, as chat templates take them.

    Arguments are objects there; text that holds none stays text. Raises InvalidRequestError.
    """
    if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
        raise InvalidRequestError(f"{place} must be a list of at most {MAX_TOOLS}", param="messages")
    found = []
    for index, call in enumerate(calls):
        here = f"{place}.{index}"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise InvalidRequestError(f"{here} must be a call of a function", param="messages")
        name, arguments, call_id = function.get("name"), function.get("arguments"), call.get("id")
        if not isinstance(name, str) or not name:
            raise InvalidRequestError(f"{here}.function.name must be a string", param="messages")
        if not isinstance(arguments, (str, dict, type(None))):
            raise InvalidRequestError(f"{here}.function.arguments must be a string", param="messages")
        if not isinstance(call_id, (str, type(None))):
            raise InvalidRequestError(f"{here}.id must be a string", param="messages")
        if depth_beyond(arguments, MAX_SCHEMA_DEPTH):
            raise InvalidRequestError(
                f"{here}.function.arguments are nested deeper than {MAX_SCHEMA_DEPTH} levels",
                param="messages",
            )
        function = {"name": name, "arguments": _arguments(arguments)}
        own_id = {} if call_id is None else {"id": call_id}
        found.append({**own_id, "type": "function", "function": function})
    return found


def _arguments(given: str | dict[str, Any] | None) -> Any:
    if not isinstance(given, str):
        return given or {}
    if not given.strip():
        return {}
    try:
        read = orjson.loads(given)
    except orjson.JSONDecodeError:
        return given
    return read if isinstance(read, dict) and not depth_beyond(read, MAX_SCHEMA_DEPTH) else given
