"""An engine without a model: the engine API over a fixed text, with failures and delays on demand.

Token ids are the bytes of the text. Every sequence "generates" :data:`TEXT` from an offset of its own
index, one token per tick, through the real streams of ``aserve.engine.stream``.
"""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np

from aserve.engine.pooling import finish
from aserve.engine.stream import Mailbox, OutputStream
from aserve.errors import (
    AserveError,
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
)
from aserve.messages.inputs import OutputKind, PoolingParams, RequestOptions
from aserve.messages.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    TokenLogprobs,
)

TEXT = "the quick brown fox jumps over the lazy dog. "
VOCAB = 256


class FakeTokenizer:
    """One token per byte."""

    chat_template = "built in"
    eos_token, eos_token_id = "</s>", 0

    def __init__(self) -> None:
        self.variables: dict[str, Any] = {}
        """What the last template was given besides messages."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(token_id) for token_id in ids]

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> str:
        if any(message["role"] == "forbidden" for message in conversation):
            raise ValueError("this template knows no role forbidden")
        self.variables = {"documents": documents, **kwargs}
        if continue_final_message:
            self.variables["continue_final_message"] = True
        text = "".join(f"<{message['role']}>{message['content']}" for message in conversation)
        return text + ("<assistant>" if add_generation_prompt else "")


class FakeStats:
    def __init__(self) -> None:
        self.errors: list[int] = []

    def on_http_error(self, status: int) -> None:
        self.errors.append(status)

    def render(self) -> bytes:
        return b"# HELP fake one\n# TYPE fake gauge\nfake 1\n"


def generated(index: int, count: int) -> list[int]:
    """The ids sequence ``index`` generates."""
    return list(itertools.islice(itertools.cycle(TEXT.encode()), index, index + count))


def logprobs_of(token_id: int, place: int, top: int) -> TokenLogprobs:
    """The chosen token, then ``top`` others: the chosen one is second best at every third place."""
    chosen_rank = 2 if place % 3 == 2 else 1
    found = {token_id: Logprob(-0.1 * chosen_rank - 0.01 * place, chosen_rank, chr(token_id))}
    for rank in range(1, top + 1):
        if rank != chosen_rank:
            other = (token_id + rank) % VOCAB
            found[other] = Logprob(-0.1 * rank - 0.01 * place, rank, chr(other))
    return found


class FakeEngine:
    """Controls, all of which may be changed at any time:

    tick: seconds between tokens.
    gate: no request gets a token before it is set.
    fail_after: tokens after which every request fails with ``failure``.
    full: every new request is refused with it. cached: prompt tokens said to have been cached.
    loading: ``start`` waits for it. load_error: ``start`` raises it.
    """

    def __init__(self, *, max_model_len: int = 4096, max_num_seqs: int = 8) -> None:
        self.model_config = SimpleNamespace(
            model="fake",
            served_model_name=["fake", "alias"],
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            max_logprobs=5,
        )
        self.config = SimpleNamespace(
            model=self.model_config, scheduler=SimpleNamespace(max_num_seqs=max_num_seqs)
        )
        self.longest_text: int | None = 8 * max_model_len
        self.stats: FakeStats | None = FakeStats()
        self.tick = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.loading = asyncio.Event()
        self.loading.set()
        self.load_error: Exception | None = None
        self.fail_after: int | None = None
        self.finish_reason = "length"
        self.failure: AserveError = EngineBusyError("failed on demand")
        self.failed: EngineDeadError | None = None
        self.refusal: str | None = None
        self.stalled = 0.0
        self.on_dead: Any = None
        self.full: QueueFullError | None = None
        self.cached: int | None = None
        self.submitted: list[SimpleNamespace] = []
        self.aborted: list[str] = []
        self.causes: list[str] = []
        self.stopped = False
        self.tokenizer = FakeTokenizer()
        self._running: dict[str, tuple[asyncio.Task[None], Mailbox]] = {}

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        await self.loading.wait()
        if self.load_error is not None:
            raise self.load_error

    async def stop(self) -> None:
        self.stopped = True
        self.die("stopped")
        tasks = [task for task, _ in self._running.values()]
        if tasks:
            await asyncio.wait(tasks)

    def die(self, reason: str) -> None:
        self.failed = EngineDeadError(reason)
        self._fail_all(self.failed)

    def stalled_for(self) -> float:
        return self.stalled

    async def check_health(self) -> None:
        self.check()

    def check(self) -> None:
        if self.failed is not None:
            raise self.failed

    # ---------------------------------------------------------------- requests

    async def submit(
        self,
        inputs: Any,
        params: Any,
        *,
        request_id: str | None = None,
        kind: OutputKind = OutputKind.DELTA,
        options: RequestOptions | None = None,
    ) -> OutputStream:
        self._check_open()
        if request_id is None or request_id in self._running:
            raise KeyError(request_id)
        ids = inputs["prompt_token_ids"]
        if isinstance(params, PoolingParams):
            return self._embed(request_id, ids, params, kind, options)
        self.submitted.append(
            SimpleNamespace(
                id=request_id, ids=ids, text=inputs.get("prompt"), params=params, kind=kind, options=options
            )
        )
        mailbox = Mailbox(kind)
        task = asyncio.create_task(self._generate(request_id, ids, params, mailbox))
        self._running[request_id] = (task, mailbox)
        task.add_done_callback(lambda _: self._running.pop(request_id, None))
        return OutputStream(request_id, mailbox, self._abort)

    def _embed(
        self, request_id: str, ids: list[int], params: PoolingParams, kind: OutputKind, options: Any
    ) -> OutputStream:
        self.submitted.append(
            SimpleNamespace(id=request_id, ids=ids, params=params, kind=kind, options=options)
        )
        if params.dimensions is not None and params.dimensions > 4:
            raise InvalidRequestError("dimensions must be at most 4", param="dimensions")
        mailbox = Mailbox(kind)
        vector = finish(np.array([*ids[-4:], *[1] * 4], dtype=np.float32)[:4], params)
        mailbox.put(EmbeddingRequestOutput(request_id, EmbeddingOutput(vector.tolist()), ids))  # type: ignore[arg-type]
        return OutputStream(request_id, mailbox, self._abort)

    def unfinished(self) -> list[dict[str, Any]]:
        return [{"id": request_id} for request_id in self._running]

    def end_request(self, request_id: str, reason: str) -> bool:
        if request_id not in self._running:
            return False
        task, mailbox = self._running[request_id]
        mailbox.fail(RequestFailedError(reason))
        task.cancel()
        return True

    async def check_room(self) -> None:
        if self.full is not None:
            raise self.full

    def _check_open(self) -> None:
        if self.failed is not None:
            raise self.failed
        if self.refusal is not None:
            raise EngineBusyError(self.refusal)

    def _abort(self, request_id: str, cause: str = "caller") -> None:
        self.aborted.append(request_id)
        self.causes.append(cause)
        if request_id in self._running:
            self._running[request_id][0].cancel()

    async def _generate(self, request_id: str, ids: list[int], params: Any, mailbox: Mailbox) -> None:
        width, top = params.best_of, params.logprobs
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [
                None,
                *(logprobs_of(t, i, params.prompt_logprobs) for i, t in enumerate(ids[1:])),
            ]
        await self.gate.wait()
        whole: list[list[int]] = [[] for _ in range(width)]
        for place in range(params.max_tokens):
            await asyncio.sleep(self.tick)
            if self.fail_after is not None and place >= self.fail_after:
                mailbox.fail(self.failure)
                return
            outputs = []
            last = place == params.max_tokens - 1
            for index in range(width):
                token = generated(index, place + 1)[-1]
                whole[index].append(token)
                delta = [token] if mailbox.kind is OutputKind.DELTA else list(whole[index])
                first = place + 1 - len(delta)
                outputs.append(
                    CompletionOutput(
                        index=index,
                        text=bytes(delta).decode(),
                        token_ids=delta,
                        cumulative_logprob=-float(index),
                        logprobs=None
                        if top is None
                        else [logprobs_of(t, first + i, top) for i, t in enumerate(delta)],
                        finish_reason=self.finish_reason if last else None,
                    )
                )
            if mailbox.kind is OutputKind.FINAL_ONLY and not last:
                continue
            if last and width > params.n:
                # The winners are the last ones, so that their indices are not 0..n-1.
                outputs = outputs[width - params.n :]
            delta_kind = mailbox.kind is OutputKind.DELTA
            shown = prompt_logprobs if place == 0 or not delta_kind else None
            output = RequestOutput(request_id, None, ids, shown, outputs, last)
            output.num_cached_tokens = self.cached
            mailbox.put(output)

    # ---------------------------------------------------------------- draining

    @property
    def num_unfinished(self) -> int:
        return len(self._running)

    def refuse_new(self, reason: str) -> None:
        self.refusal = reason

    def abort_all(self, reason: str) -> None:
        self._fail_all(EngineBusyError(reason))

    def _fail_all(self, error: AserveError) -> None:
        for task, mailbox in list(self._running.values()):
            mailbox.fail(error)
            task.cancel()

    async def idle(self) -> None:
        while self._running:
            await asyncio.wait([task for task, _ in self._running.values()])

    # ---------------------------------------------------------------- text

    async def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self._check_open()
        return [1, *text.encode()] if add_special_tokens else list(text.encode())

    async def get_tokenizer(self) -> FakeTokenizer:
        return self.tokenizer
