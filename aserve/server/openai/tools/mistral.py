"""Calls as Mistral models write them: ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``.

Newer ones write ``[TOOL_CALLS]name{...}`` for each call, with ``[CALL_ID]id`` and ``[ARGS]`` behind the
name or without. Formats: versions 3, 11 and 13 of the instruct tokenizers of mistral-common.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string

from aserve.server.openai.tools.json_text import read_value
from aserve.server.openai.tools.reader import CallReader
from aserve.server.openai.tools.source import MalformedError, Reading

MARKER = "[TOOL_CALLS]"

_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
_SHORT = re.compile(r"[A-Za-z0-9]{9}")
_ALPHABET = string.ascii_letters + string.digits


def new_id() -> str:
    """Nine letters and digits: what Mistral's chat templates insist on when the call comes back."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


def wants_short_ids(template: str | None) -> bool:
    """Whether a chat template refuses conversations with ids of another kind."""
    return "alphanumeric strings with length" in (template or "")


def short_id(call_id: str) -> str:
    """``call_id`` if it is nine letters and digits, else such an id that is made of it."""
    if _SHORT.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


class MistralReader(CallReader):
    markers = (MARKER, "[ARGS]", "[CALL_ID]")
    how = (
        "To call functions, answer with a list of their names and arguments as JSON:\n"
        f'{MARKER} [{{"name": "<name>", "arguments": {{<arguments>}}}}]'
    )

    def read(self) -> Reading[None]:
        while (yield from self.text_until(MARKER)) is not None:
            self.source.keep(MARKER)
            if not (yield from self.begins("[{")):
                yield from self.attempt(self._named())
            elif self.source.text[self.source.at] == "[":
                yield from self.call_list(certain=True)
            else:
                yield from self.attempt(self.call_object(certain=True))

    def _named(self) -> Reading[None]:
        source = self.source
        yield from source.after_space()
        name = yield from source.run(_NAME, 256)
        if (yield from source.after_space()) == "[":
            source.at += 1
            if (yield from source.peek()) == "C":
                yield from source.expect("CALL_ID]")
                yield from source.run(_NAME, 256)
                yield from source.expect("[")
            yield from source.expect("ARGS]")
        if (yield from source.after_space()) != "{":
            raise MalformedError
        self.start(name)
        yield from read_value(source, self.arguments)
        self.end()
