"""The format that a chat template shows."""

from __future__ import annotations

from typing import Any

import pytest

from aserve import registry
from aserve.errors import ConfigError
from aserve.server.openai.tools import parsers
from aserve.tokenizer.chat import template_text

TEMPLATES: list[tuple[str, str | None]] = [
    ("", None),
    ("{{ messages }}{{ tools }}", None),
    ("{% if tools %}\\n<tool_call>\\n{\"name\": <function-name>}\\n</tool_call>{% endif %}", "hermes"),
    ("<tool_call>\\n<function=name>\\n<parameter=x>", None),  # Qwen3-Coder
    ("<tool_call>{function-name}\\n<arg_key>x</arg_key>", None),  # GLM-4.5
    ("{{- '[TOOL_CALLS] [' }}", "mistral"),
    (
        "<|start_header_id|>system<|end_header_id|>\n"
        """'Respond in the format {"name": function name, "parameters": dictionary of argument name'""",
        "llama3-json",
    ),
    ("MUST put it in the format of [func_name1(params_name1=params_value1), func_name2(params)]", "pythonic"),
    ("<|tool_call_start|>[{{ calls }}]<|tool_call_end|>", "pythonic"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "name"), TEMPLATES)
def test_detection(template: str, name: str | None) -> None:
    assert parsers.detect(template) == name


def test_no_template_no_parser() -> None:
    assert parsers.detect(None) is None


def test_every_name_loads_and_marks_can_be_told_apart() -> None:
    for name in registry.tool_parsers:
        kind = parsers.load(name)
        assert kind.how
        for marker in kind.markers:
            assert marker[0] not in marker[1:]
    with pytest.raises(ConfigError, match="unknown tool call parser"):
        parsers.load("xml")


def test_the_template_in_use() -> None:
    class Tokenizer:
        chat_template: Any = "own"

    tokenizer = Tokenizer()
    assert template_text(tokenizer) == "own"
    assert template_text(tokenizer, "given") == "given"
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    assert template_text(tokenizer) == "plain"
    assert template_text(tokenizer, with_tools=True) == "tools"
    assert template_text(tokenizer, "tool_use") == "tools"
    assert template_text(tokenizer, "given", with_tools=True) == "given"
    tokenizer.chat_template = None
    assert template_text(tokenizer) is None
    assert template_text(None) is None
