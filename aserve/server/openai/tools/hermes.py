"""Calls as Hermes and Qwen models write them: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

Format: the chat templates of NousResearch/Hermes-2-Pro and Qwen/Qwen2.5-Instruct.
"""

from __future__ import annotations

from aserve.server.openai.tools.reader import CallReader
from aserve.server.openai.tools.source import Reading

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesReader(CallReader):
    markers = (OPEN, CLOSE)
    how = (
        "To call a function, write its name and its arguments as JSON between tags, once for each call:\n"
        f'{OPEN}{{"name": "<name>", "arguments": {{<arguments>}}}}{CLOSE}'
    )

    @staticmethod
    def write(calls: list[str]) -> str:
        return "\n".join(f"{OPEN}{call}{CLOSE}" for call in calls)

    def read(self) -> Reading[None]:
        close_due = False
        while (marker := (yield from self.text_until(OPEN, CLOSE))) is not None:
            if marker == OPEN:
                self.source.keep(OPEN)
                close_due = yield from self.attempt(self.call_object(certain=True))
            elif close_due:
                close_due = False
            else:
                self.say(CLOSE)
