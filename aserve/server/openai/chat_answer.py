"""The response or the events of a chat."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aserve.messages.outputs import CompletionOutput, RequestOutput
from aserve.server import sse
from aserve.server.openai.generation import Envelope, Usage
from aserve.server.openai.logprobs import chat_logprobs
from aserve.server.openai.protocol import ChatBody
from aserve.server.openai.tools.answer import Deltas, message_of

if TYPE_CHECKING:
    from aserve.server.openai.tools.plan import ToolPlan
    from aserve.server.openai.tools.reader import CallReader


class Answer:
    """Turns the outputs of one call into its response or its events.

    echoed: text of the conversation that the answer begins with.
    """

    nothing: str | None = ""
    """The content in a stream's first chunks."""

    def __init__(
        self, body: ChatBody, *, request_id: str, model: str, prompt_tokens: int, role: str, echoed: str
    ) -> None:
        self._body = body
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._envelope = Envelope.new(request_id, kind, model)
        self._usage = Usage(prompt_tokens)
        self._role = role
        self._echoed = echoed
        self._opened = False
        self._finished: set[int] = set()
        self._plain = not body.logprobs and not body.continuous_usage
        self._templates: dict[int, sse.Template] = {}

    def response(self, result: RequestOutput) -> dict[str, Any]:
        choices = []
        self._usage.see(0, result)
        for index, output in enumerate(result.outputs):
            self._usage.completion_tokens += len(output.token_ids)
            message, reason = self.message(output)
            choices.append(
                {
                    "index": index,
                    "message": {"role": self._role, **message},
                    "logprobs": self._logprobs(output),
                    "finish_reason": reason,
                    "stop_reason": output.stop_reason,
                }
            )
        return {**self._envelope.wrap(choices), "usage": self._usage.as_dict()}

    def message(self, output: CompletionOutput) -> tuple[dict[str, Any], str | None]:
        """What the message of a whole choice says, and why it ended."""
        return {"content": self._echoed + output.text}, output.finish_reason

    def events_of(self, prompt_index: int, result: RequestOutput) -> bytes:
        found = []
        self._usage.see(prompt_index, result)
        if not self._opened:
            # Not before the first output: an early failure must come first, and clients take the time
            # of the first chunk as the time to the first token.
            self._opened = True
            found += self._opening()
        for position, output in enumerate(result.outputs):
            # With best_of > n, output.index skips; then all outputs come at once.
            index = position if self._body.best_of not in (None, self._body.n) else output.index
            ended = output.finish_reason is not None
            if index in self._finished or not (output.token_ids or output.text or ended):
                continue
            if ended:
                self._finished.add(index)
            self._usage.completion_tokens += len(output.token_ids)
            if self._plain and not ended:
                found.append(self._template(index).fill(output.text))
            else:
                found += self.chunks(index, output)
        return found[0] if len(found) == 1 else b"".join(found)

    def chunks(self, index: int, output: CompletionOutput) -> list[bytes]:
        """The events of one choice's output."""
        return [sse.event(self.chunk(index, {"content": output.text}, output, output.finish_reason))]

    def ending(self) -> bytes:
        if not self._body.include_usage:
            return b""
        return sse.event({**self._envelope.wrap([]), "usage": self._usage.as_dict()})

    def _opening(self) -> list[bytes]:
        """Role chunks, then what is echoed, for every choice."""
        choices = range(self._body.n)
        deltas: list[dict[str, Any]] = [{"role": self._role, "content": self.nothing}]
        if self._echoed:
            deltas.append({"content": self._echoed})
        return [sse.event(self.chunk(index, delta)) for delta in deltas for index in choices]

    def _template(self, index: int) -> sse.Template:
        """Chunks of a choice that hold content and nothing else."""
        template = self._templates.get(index)
        if template is None:
            template = sse.Template(lambda text: self.chunk(index, {"content": text}))
            self._templates[index] = template
        return template

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        output: CompletionOutput | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(output) if output is not None else None,
            "finish_reason": finish_reason,
        }
        if output is not None and finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        chunk = self._envelope.wrap([choice])
        if self._body.include_usage:
            chunk["usage"] = self._usage.as_dict() if self._body.continuous_usage else None
        return chunk

    def _logprobs(self, output: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs or output.logprobs is None:
            return None
        return chat_logprobs(output.token_ids, output.logprobs, self._body.top_logprobs or 0)


class ToolAnswer(Answer):
    """The same where the model may call tools, or must."""

    nothing = None

    def __init__(self, body: ChatBody, plan: ToolPlan, *, whole: bool, **values: Any) -> None:
        super().__init__(body, **values)
        self._plan = plan
        self._whole = whole
        self._plain = False
        self._readers: dict[int, tuple[CallReader, Deltas]] = {}
        self._silent: dict[int, list[CompletionOutput]] = {}

    def message(self, output: CompletionOutput) -> tuple[dict[str, Any], str | None]:
        reader = self._plan.reader(whole=True)
        message = message_of(reader.feed(output.text, True))
        if self._echoed:
            message["content"] = self._echoed + (message["content"] or "")
        return message, reader.finish_reason(output.finish_reason)

    def chunks(self, index: int, output: CompletionOutput) -> list[bytes]:
        if index not in self._readers:
            self._readers[index] = self._plan.reader(whole=self._whole), Deltas()
        reader, deltas = self._readers[index]
        ended = output.finish_reason is not None
        found = [deltas.of(piece) for piece in reader.feed(output.text, ended)]
        if ended:
            found.append({})
        if not found:
            self._hold(index, output)
            return []
        output = self._with_held(index, output)
        reason = reader.finish_reason(output.finish_reason)
        last = len(found) - 1
        # Log-probabilities go with the last of the chunks that an output makes.
        return [
            sse.event(self.chunk(index, delta, output, reason) if place == last else self.chunk(index, delta))
            for place, delta in enumerate(found)
        ]

    def _hold(self, index: int, output: CompletionOutput) -> None:
        """Keeps the log-probabilities of what has not been told yet."""
        if output.logprobs is not None:
            self._silent.setdefault(index, []).append(output)

    def _with_held(self, index: int, output: CompletionOutput) -> CompletionOutput:
        held = self._silent.pop(index, None)
        if not held:
            return output
        outputs = [*held, output]
        return replace(
            output,
            token_ids=[token_id for each in outputs for token_id in each.token_ids],
            logprobs=[entry for each in outputs for entry in each.logprobs or ()],
        )
