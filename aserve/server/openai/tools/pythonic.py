"""Calls as Llama 4, ToolACE and LFM2 models write them: ``[name(key="value", ...), ...]``.

The values are Python's literals and become JSON as they come. The list may stand between
``<|python_start|>`` and ``<|python_end|>``, or between ``<|tool_call_start|>`` and ``<|tool_call_end|>``;
without them a list at the beginning of the answer holds calls only if it names tools that there are.
Between them calls may be JSON objects instead, which LFM2 writes if it is asked to.
"""

from __future__ import annotations

import re

from aserve.server.openai.tools.literals import read_literal
from aserve.server.openai.tools.reader import CallReader
from aserve.server.openai.tools.source import CutError, MalformedError, Reading

STARTS = ("<|python_start|>", "<|tool_call_start|>")
ENDS = ("<|python_end|>", "<|tool_call_end|>")

_FUNCTION = re.compile(r"[\w.-]+")
_KEY = re.compile(r"\w+")


class PythonicReader(CallReader):
    markers = (*STARTS, *ENDS)
    how = (
        "To call functions, answer with a list of calls and with nothing else:\n"
        "[<name>(<argument>=<value>, ...), ...]"
    )

    def read(self) -> Reading[None]:
        certain = yield from self.opening(*STARTS)
        found = False
        while True:
            if certain is not None:
                found = yield from self._list(certain)
            marker = yield from self.text_until(*STARTS, *ENDS)
            if marker is None:
                return
            certain = True if marker in STARTS else None
            if certain:
                self.source.keep(marker)
            elif found:
                found = False
            else:
                self.say(marker)

    def _list(self, certain: bool) -> Reading[bool]:
        """Takes calls; whether there were any."""
        source = self.source
        if not source.keeping:
            source.keep()
        in_list = yield from self.begins("[")
        if in_list:
            source.at += 1
        elif not certain:
            self.say(source.forget())
            return False
        found = False
        while (yield from self.attempt(self._call(certain))):
            found = True
            if not in_list:
                break
            source.keep()
            try:
                character = yield from source.after_space()
            except CutError:
                source.forget()
                break
            if character not in ",]":
                self.say(source.forget())
                break
            source.at += 1
            if character == "]":
                source.forget()
                break
        return found

    def _call(self, certain: bool) -> Reading[None]:
        """Takes ``name(key=value, ...)``, which is told of once the first key is there."""
        source = self.source
        if (yield from source.after_space()) == "{" and certain:
            yield from self.call_object(certain=True)
            return
        name = yield from source.run(_FUNCTION, 256)
        if not certain and name not in self.context.names:
            raise MalformedError
        yield from source.after_space()
        yield from source.expect("(")
        lead = "{"
        while (yield from source.after_space()) != ")":
            key = yield from source.run(_KEY, 256)
            if not key or (yield from source.after_space()) != "=":
                raise MalformedError
            source.at += 1
            if lead == "{":
                self.start(name)
            self.arguments(f'{lead}"{key}":')
            yield from read_literal(source, self.arguments)
            lead = ","
            character = yield from source.after_space()
            if character == ",":
                source.at += 1
            elif character != ")":
                raise MalformedError
        source.at += 1
        if lead == "{":
            self.start(name)
            self.arguments("{")
        self.arguments("}")
        self.end()
