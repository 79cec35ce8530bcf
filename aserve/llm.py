"""LLM: offline generation, a synchronous face of the asynchronous engine."""

from __future__ import annotations

import atexit
import itertools
import sys
import weakref
from concurrent.futures import Future
from typing import Any, cast

import anyio
from anyio.from_thread import start_blocking_portal
from tqdm import tqdm

from aserve.args import EngineArgs
from aserve.engine import pooling
from aserve.engine.async_engine import AsyncLLMEngine
from aserve.engine.llm_engine import LLMEngine
from aserve.engine.stream import OutputStream
from aserve.errors import InvalidRequestError
from aserve.messages.inputs import (
    LoRARequest,
    MultiModalData,
    OutputKind,
    PoolingParams,
    PromptInputs,
    UsageContext,
)
from aserve.messages.outputs import EmbeddingRequestOutput, RequestOutput
from aserve.messages.params import SamplingParams

Prompts = PromptInputs | list[str] | list[PromptInputs]
_Params = SamplingParams | PoolingParams
_Request = tuple[PromptInputs | None, list[int] | None, _Params]

_open: weakref.WeakSet[LLM] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Closes what is still open; later in the exit the loop's thread has stopped, and closing would hang."""
    for llm in list(_open):
        llm.close()


class LLM:
    """Generates text from prompts, or vectors of them, in this process, with the engine the server uses.

    The engine runs on an event loop in a thread of its own, so an ``LLM`` also works where a loop is
    already running (a notebook). Use it as a context manager, or call :meth:`close`, to free the model
    at a definite time.

    The arguments are those of :class:`aserve.EngineArgs`; further ones may be given by keyword. An
    unknown name is a TypeError, a value that cannot work a ConfigError (a ValueError).
    """

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        swap_space: int = 4,
        enforce_eager: bool = False,
        max_context_len_to_capture: int | None = None,
        max_seq_len_to_capture: int = 8192,
        disable_custom_all_reduce: bool = False,
        **kwargs: Any,
    ) -> None:
        self._portal_context = None
        kwargs.setdefault("disable_log_stats", True)
        kwargs.setdefault("enable_chunked_prefill", None)
        engine_args = EngineArgs(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            quantization=quantization,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            swap_space=swap_space,
            enforce_eager=enforce_eager,
            max_context_len_to_capture=max_context_len_to_capture,
            max_seq_len_to_capture=max_seq_len_to_capture,
            disable_custom_all_reduce=disable_custom_all_reduce,
            **kwargs,
        )
        config = engine_args.create_engine_config()
        self.request_counter = itertools.count()
        self._portal_context = start_blocking_portal(
            "asyncio", {"use_uvloop": sys.platform != "win32"}, name="aserve-loop"
        )
        self._portal = self._portal_context.__enter__()
        try:
            self._engine: AsyncLLMEngine = self._portal.call(_start, config, engine_args)
        except BaseException:
            self.close()
            raise
        _open.add(self)

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine inside. It is stepped by this object's loop; do not step it yourself."""
        engine = self._engine.engine
        if engine is None:
            raise RuntimeError("this LLM has been closed")
        return engine

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        prompt_token_ids: list[int] | list[list[int]] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        multi_modal_data: MultiModalData | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; the result has the order of the input.

        prompts: a string, a ``{"prompt": ...}`` or ``{"prompt_token_ids": ...}`` dict, or a list of them.
        sampling_params: one for all, or a list as long as the prompts; None means SamplingParams().
        prompt_token_ids: token ids instead of text, or beside it (the text is then only echoed).

        Raises InvalidRequestError (a ValueError) for bad input, in which case nothing is generated. A
        prompt longer than the model allows comes back with finish_reason "length" and empty text.
        Interrupting the call (Ctrl-C) aborts what it started.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        requests = self._pair(prompts, params, prompt_token_ids, "sampling_params")
        return self._complete(requests, use_tqdm, lora_request, multi_modal_data)

    def encode(
        self,
        prompts: Prompts | None = None,
        pooling_params: PoolingParams | list[PoolingParams] | None = None,
        prompt_token_ids: list[int] | list[list[int]] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        multi_modal_data: MultiModalData | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The vector of every prompt, in the order of the input: its last token's final hidden state.

        Prompts and ids are those of :meth:`generate`; pooling_params None means PoolingParams().
        Raises InvalidRequestError (a ValueError) for bad input, a prompt that is too long included.
        """
        params = PoolingParams() if pooling_params is None else pooling_params
        requests = self._pair(prompts, params, prompt_token_ids, "pooling_params")
        return [
            pooling.checked(output)
            for output in self._complete(requests, use_tqdm, lora_request, multi_modal_data)
        ]

    def _complete(
        self,
        requests: list[_Request],
        use_tqdm: bool,
        lora_request: LoRARequest | None,
        multi_modal_data: MultiModalData | None,
    ) -> list[Any]:
        if not requests:
            return []
        bar = tqdm(total=len(requests), desc="Processed prompts", dynamic_ncols=True, disable=not use_tqdm)
        future: Future[list[Any]] = self._portal.start_task_soon(
            self._run_all, requests, bar, lora_request, multi_modal_data
        )
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            bar.close()

    async def _run_all(
        self,
        requests: list[_Request],
        bar: Any,
        lora_request: LoRARequest | None,
        multi_modal_data: MultiModalData | None,
    ) -> list[Any]:
        streams: list[OutputStream] = []
        results: list[Any] = [None] * len(requests)
        generated = 0

        async def collect(index: int, stream: OutputStream) -> None:
            nonlocal generated
            results[index] = output = await stream.final()
            if isinstance(output, RequestOutput):
                generated += sum(len(each.token_ids) for each in output.outputs)
            elapsed = bar.format_dict["elapsed"] if not bar.disable else 0
            if elapsed and generated:
                bar.set_postfix_str(f"generation {generated / elapsed:.2f} toks/s", refresh=False)
            bar.update(1)

        try:
            for inputs, ids, params in requests:
                stream = await self._engine.submit(
                    inputs,
                    params,
                    request_id=str(next(self.request_counter)),
                    prompt_token_ids=ids,
                    lora_request=lora_request,
                    multi_modal_data=multi_modal_data,
                    kind=OutputKind.FINAL_ONLY,
                )
                streams.append(stream)
            try:
                async with anyio.create_task_group() as group:
                    for index, stream in enumerate(streams):
                        group.start_soon(collect, index, stream)
            except BaseExceptionGroup as errors:
                raise _first_error(errors) from errors
        finally:
            for stream in streams:
                stream.close()
        return results

    @staticmethod
    def _pair(
        prompts: Prompts | None,
        params: _Params | list[SamplingParams] | list[PoolingParams],
        token_ids: list[int] | list[list[int]] | None,
        name: str,
    ) -> list[_Request]:
        """One (inputs, token ids, params) per prompt; ``name`` is what the caller calls ``params``."""
        texts = cast("list[Any] | None", [prompts] if isinstance(prompts, str | dict) else prompts)
        ids: list[Any] | None = token_ids
        if ids and isinstance(ids[0], int):
            ids = [ids]
        if texts is None and ids is None:
            raise InvalidRequestError("either prompts or prompt_token_ids is required", param="prompts")
        if texts is not None and ids is not None and len(texts) != len(ids):
            raise InvalidRequestError(
                f"{len(texts)} prompts but {len(ids)} prompt_token_ids: the lengths must be the same",
                param="prompt_token_ids",
            )
        count = len(texts) if texts is not None else len(ids or [])
        each: list[Any] = list(params) if isinstance(params, list) else [params] * count
        if len(each) != count:
            raise InvalidRequestError(
                f"{count} prompts but {len(each)} {name}: the lengths must be the same", param=name
            )
        return [
            (texts[i] if texts is not None else None, ids[i] if ids is not None else None, each[i])
            for i in range(count)
        ]

    # ---------------------------------------------------------------- the rest

    def get_tokenizer(self) -> Any:
        return self.llm_engine.get_tokenizer()

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Replaces the tokenizer for the requests that follow."""
        self._portal.call(self.llm_engine.set_tokenizer, tokenizer)

    def close(self) -> None:
        """Stops the loop and frees the model. Idempotent; the object cannot be used afterwards."""
        context, self._portal_context = self._portal_context, None
        if context is None:
            return
        engine = getattr(self, "_engine", None)
        if engine is not None:
            self._portal.call(engine.stop)
            engine.engine = None
        context.__exit__(None, None, None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_portal_context", None) is not None:
            self.close()


async def _start(config: Any, engine_args: EngineArgs) -> AsyncLLMEngine:
    engine = AsyncLLMEngine.from_config(
        config,
        log_stats=not engine_args.disable_log_stats,
        log_requests=False,
        usage_context=UsageContext.LLM_CLASS,
    )
    await engine.start()
    return engine


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first
