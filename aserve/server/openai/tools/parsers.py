"""Which format a model writes its calls in, told from its chat template."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from aserve import registry
from aserve.server.openai.tools import mistral
from aserve.server.openai.tools.reader import CallReader

_TELLTALES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("mistral", re.compile(r"\[TOOL_CALLS\]")),
    # Llama 3's templates write neither tag nor end of a tool call, but always ask for "parameters".
    ("llama3-json", re.compile(r"<\|start_header_id\|>.*\{\"name\": function name, \"parameters\":", re.S)),
    ("pythonic", re.compile(r"func_name1\(params_name1=|<\|python_start\|>|<\|tool_call_start\|>")),
    # Others put something else than JSON between the same tags: Qwen3-Coder, GLM-4.5.
    ("hermes", re.compile(r"^(?!.*(?:<function=|<arg_key>)).*<tool_call>", re.S)),
)


def detect(template: str | None) -> str | None:
    """Name of the format that a chat template shows models to write calls in, if it is one we read."""
    for name, telltale in _TELLTALES:
        if template and telltale.search(template):
            return name
    return None


def load(name: str) -> type[CallReader]:
    """The reader of a format. Raises ConfigError for a name that is not known."""
    found: type[CallReader] = registry.tool_parsers.load(name)
    return found


def new_id() -> str:
    """The id of a call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def id_maker(template: str | None) -> Callable[[], str]:
    """Makes ids that ``template`` takes when they come back."""
    return mistral.new_id if mistral.wants_short_ids(template) else new_id
