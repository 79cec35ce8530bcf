"""Calls that guided decoding makes: a list of calls (``required``), or one call's arguments (named)."""

from __future__ import annotations

from aserve.server.openai.tools.json_text import read_value
from aserve.server.openai.tools.reader import CallReader, Context
from aserve.server.openai.tools.source import MalformedError, Reading


class ListReader(CallReader):
    """``[{"name": ..., "arguments": {...}}, ...]``, and text if it is not."""

    how = (
        "Answer with a list of function calls as JSON and with nothing else:\n"
        '[{"name": "<name>", "arguments": {<arguments>}}]'
    )

    def read(self) -> Reading[None]:
        self.source.keep()
        if (yield from self.begins("[")):
            yield from self.call_list(certain=True)
        else:
            self.say(self.source.forget())
        yield from self.text_until()


class NamedReader(CallReader):
    """An object: the arguments of ``name``. Text if it is not."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__(context)
        self._name = name
        self.how = f"Answer with the arguments for a call of {name} as a JSON object and with nothing else."

    def read(self) -> Reading[None]:
        yield from self.attempt(self._call())
        yield from self.text_until()

    def _call(self) -> Reading[None]:
        if (yield from self.source.after_space()) != "{":
            raise MalformedError
        self.start(self._name)
        yield from read_value(self.source, self.arguments)
        self.end()
