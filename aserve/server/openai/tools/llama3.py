"""Calls as Llama 3.1 and later write them: the answer is ``{"name": ..., "parameters": {...}}``.

Several are separated by semicolons. ``<|python_tag|>`` may stand before them; without it an object at the
beginning of the answer is a call only if it names a tool that there is. Format: the chat templates of
meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-3B-Instruct.
"""

from __future__ import annotations

from aserve.server.openai.tools.reader import CallReader
from aserve.server.openai.tools.source import CutError, Reading

TAG = "<|python_tag|>"


class Llama3Reader(CallReader):
    markers = (TAG,)
    how = (
        "To call a function, answer with its name and its parameters as JSON and with nothing else:\n"
        '{"name": "<name>", "parameters": {<parameters>}}'
    )

    def read(self) -> Reading[None]:
        certain = yield from self.opening(TAG)
        while True:
            if certain is not None:
                yield from self._calls_in_a_row(certain)
            if (yield from self.text_until(TAG)) is None:
                return
            self.source.keep(TAG)
            certain = True

    def _calls_in_a_row(self, certain: bool) -> Reading[None]:
        source = self.source
        while (yield from self.attempt(self.call_object(certain=certain))):
            source.keep()
            try:
                while (yield from source.after_space()) in ";,":
                    source.at += 1
            except CutError:
                source.forget()
                return
            if source.text[source.at] != "{":
                self.say(source.forget())
                return
