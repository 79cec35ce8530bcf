"""An engine that answers with given texts, a few characters at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from aserve.engine.stream import Mailbox
from aserve.messages.inputs import OutputKind
from aserve.messages.outputs import CompletionOutput, RequestOutput
from tests.server.fake_engine import FakeEngine, FakeTokenizer, logprobs_of

HERMES = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{{ messages | tojson }} tool_calls"


class TemplateTokenizer(FakeTokenizer):
    """Renders what it is given as JSON, tools included if the template speaks of them."""

    all_special_tokens: tuple[str, ...] = ()

    def apply_chat_template(self, conversation: Any, tools: Any = None, **kwargs: Any) -> str:
        self.conversation, self.tools = conversation, tools
        return super().apply_chat_template(conversation, tools, **kwargs)


class TellingEngine(FakeEngine):
    """Choice i answers ``texts[i]``, ``step`` characters a token, and stops; or is cut by max_tokens."""

    def __init__(self, *texts: str, template: str = HERMES, step: int = 1) -> None:
        super().__init__(max_model_len=100_000)
        self.texts, self.step = texts, step
        self.tokenizer: TemplateTokenizer = TemplateTokenizer()
        self.tokenizer.chat_template = template

    async def _generate(self, request_id: str, ids: list[int], params: Any, mailbox: Mailbox) -> None:
        delta = mailbox.kind is OutputKind.DELTA
        pieces = [[text[at : at + self.step] for at in range(0, len(text), self.step)] for text in self.texts]
        shown = [""] * params.n
        tokens: list[list[int]] = [[] for _ in range(params.n)]
        ended: dict[int, CompletionOutput] = {}
        for place in range(params.max_tokens):
            await asyncio.sleep(0)
            outputs = []
            for index in sorted(set(range(params.n)) - ended.keys()):
                own = pieces[index % len(pieces)]
                text = own[place] if place < len(own) else ""
                token = ord(text[0]) % 256 if text else 0
                shown[index] += text
                tokens[index].append(token)
                reason = "stop" if place >= len(own) else "length" if place + 1 == params.max_tokens else None
                told = [token] if delta else tokens[index]
                output = CompletionOutput(
                    index,
                    text if delta else shown[index],
                    told,
                    0.0,
                    None if params.logprobs is None else [logprobs_of(each, 0, 0) for each in told],
                    reason,
                )
                outputs.append(output)
                if reason:
                    ended[index] = output
            last = len(ended) == params.n
            if delta or last:
                told_now = outputs if delta else [ended[index] for index in range(params.n)]
                mailbox.put(RequestOutput(request_id, None, ids, None, told_now, last))
            if last:
                return
