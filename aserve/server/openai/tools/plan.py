"""What a request's tools come to with this server's model and settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aserve.errors import ConfigError, InvalidRequestError
from aserve.server.openai.tools import parsers
from aserve.server.openai.tools.conversation import for_template, takes_tools
from aserve.server.openai.tools.forced import ListReader, NamedReader
from aserve.server.openai.tools.reader import CallReader, Context
from aserve.server.openai.tools.request import ToolRequest
from aserve.tokenizer.chat import template_text

if TYPE_CHECKING:
    from aserve.messages.params import SamplingParams

logger = logging.getLogger(__name__)

OUR_OWN = "hermes"
"""The format that models are told whose chat template knows no tools."""

_NO_PARSER = (
    "this server cannot read the calls of tools that its model writes, because its chat template shows tools "
    "in none of the formats known here; start it with --tool-call-parser, or set tool_choice to "
    '"required", to a named function or to "none"'
)


@dataclass(frozen=True)
class ToolPlan:
    """The tools of one request, and how its output is guided and read.

    template: text of the chat template. parser: reads what the model writes of its own accord; None where
    guided decoding makes the calls.
    """

    request: ToolRequest
    template: str | None
    parser: type[CallReader] | None

    def reader(self, *, whole: bool) -> CallReader:
        """Tells the pieces of one choice apart; whole: its text comes at once."""
        names = {function.name for function in self.request.functions}
        new_id = parsers.id_maker(self.template)
        context = Context(names, new_id, parallel=self.request.parallel, whole=whole)
        if self.parser is not None:
            return self.parser(context)
        if self.request.mode == "named":
            return NamedReader(context, self.request.functions[0].name)
        return ListReader(context)

    def shown(
        self, messages: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools for the chat template."""
        return for_template(self.template, messages, self.request, self.reader(whole=True))

    def apply(self, params: SamplingParams, tokenizer: Any, backend: str | None) -> None:
        """Has the output guided, by ``backend`` or the engine's own, and marks of calls left in its text."""
        guided = self.request.guided(backend)
        if guided is not None:
            if params.guided is not None:
                raise InvalidRequestError(
                    f"{params.guided.param}: tool_choice guides the output already", param="tool_choice"
                )
            if params.use_beam_search:
                raise InvalidRequestError(
                    "tool_choice: an output that must be a call cannot be combined with beam search",
                    param="tool_choice",
                )
            params.guided = guided
        elif params.guided is not None:
            param = params.guided.param
            raise InvalidRequestError(
                f'{param}: an output that is guided cannot call tools; set tool_choice to "none"', param=param
            )
        if self.parser is not None and _hidden(self.parser, tokenizer):
            params.skip_special_tokens = False


def tool_plan(
    request: ToolRequest | None, tokenizer: Any, chat_template: str | None, parser: str | None
) -> ToolPlan | None:
    """Raises InvalidRequestError if nothing could read the model's calls.

    chat_template: the server's own, in place of the tokenizer's. parser: the one the server was told.
    """
    if request is None:
        return None
    template = template_text(tokenizer, chat_template, with_tools=True)
    if request.mode != "auto":
        return ToolPlan(request, template, None)
    name = parser or _format_of(template)
    if name is None:
        raise InvalidRequestError(f"tools: {_NO_PARSER}", param="tools")
    return ToolPlan(request, template, parsers.load(name))


def check_at_start(tokenizer: Any, chat_template: str | None, parser: str | None, *, needed: bool) -> None:
    """Says in the log how calls will be read. ConfigError: ``needed``, and there is no way."""
    name = parser or _format_of(template_text(tokenizer, chat_template, with_tools=True))
    if name is not None:
        logger.info("calls of tools are read with the parser %s", name)
    elif needed:
        raise ConfigError(
            "enable_auto_tool_choice: the model's chat template shows tools in no format that is known "
            "here; name one with --tool-call-parser",
            param="enable_auto_tool_choice",
        )


def _format_of(template: str | None) -> str | None:
    """How a model writes calls: as its template shows it, or as it is told to where the template knows no
    tools; None if the template shows tools in a way that is not known here."""
    return parsers.detect(template) or (None if takes_tools(template) else OUR_OWN)


def _hidden(parser: type[CallReader], tokenizer: Any) -> bool:
    """Whether the tokenizer would leave a marker out of the text."""
    return not set(parser.markers).isdisjoint(getattr(tokenizer, "all_special_tokens", ()))
