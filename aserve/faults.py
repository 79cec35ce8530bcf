"""Places where a request, or the whole engine, can fail: for tests that make them fail one by one.

Nothing in the product imports this module, and the places themselves hold no code for it: a site is armed
by replacing the function it names, and disarmed by putting the function back. A site whose function has
been renamed cannot be armed, so the list cannot fall behind the code unnoticed.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


class InjectedFault(Exception):
    """What an armed site raises. Its text is what no client may ever see."""

    def __init__(self) -> None:
        super().__init__("injected at 0x7f0000c0ffee in /usr/lib/secret.py")


@dataclass(frozen=True)
class Site:
    """A function by its import path, ``module:Class.method`` or ``module:function``.

    fatal: its failure cannot be laid at one request's door and ends the engine.
    """

    path: str
    fatal: bool = False

    def find(self) -> tuple[Any, str]:
        """The object that holds the function, and the function's name there. AttributeError: it is gone."""
        module, _, dotted = self.path.partition(":")
        *holders, name = dotted.split(".")
        owner: Any = importlib.import_module(module)
        for holder in holders:
            owner = getattr(owner, holder)
        getattr(owner, name)
        return owner, name


SITES: dict[str, Site] = {
    # one request, on its way in
    "parameters": Site("aserve.engine.input:InputProcessor.check_params"),
    "template": Site("aserve.server.openai.conversation:render_chat"),
    "tokenise": Site("aserve.engine.input:InputProcessor.encode"),
    "grammar_compile": Site("aserve.guided.compiler:GrammarCompiler._compile"),
    "admit": Site("aserve.engine.input:InputProcessor.make_group"),
    "register": Site("aserve.engine.output:OutputProcessor.add"),
    # one row of a step
    "sampler_add": Site("aserve.sampling.sampler:SamplerState.add"),
    "sampler_fork": Site("aserve.sampling.sampler:SamplerState.fork"),
    "sampler_row": Site("aserve.sampling.sampler:SamplerState._sample"),
    "logits_processor": Site("aserve.sampling.sampler:SamplerState._process"),
    "history": Site("aserve.sampling.penalties:PenaltyRows.count"),
    "grammar_mask": Site("aserve.sampling.guided:GuidedRows.apply"),
    "grammar_advance": Site("aserve.sampling.guided:GuidedRows.advance"),
    "prompt_logprobs": Site("aserve.sampling.sampler:SamplerState.prompt_logprobs"),
    # one request, on its way out
    "text_begins": Site("aserve.engine.output:OutputProcessor._text_of"),
    "detokenise": Site("aserve.tokenizer.detokenizer:Detokenizer.push"),
    "detokenise_end": Site("aserve.tokenizer.detokenizer:Detokenizer.flush"),
    "stop_strings": Site("aserve.tokenizer.stop:StopChecker.feed"),
    "logprobs": Site("aserve.engine.output:OutputProcessor._logprobs"),
    "output_delta": Site("aserve.engine.output:OutputProcessor._delta"),
    "output_whole": Site("aserve.engine.output:OutputProcessor._whole"),
    "vector": Site("aserve.engine.output:embedding_of"),
    "bridge": Site("aserve.engine.stream:Mailbox.put"),
    "bridge_deliver": Site("aserve.server.direct:LiveEvents._hand_over"),
    "events_chat": Site("aserve.server.openai.chat_answer:Answer.events_of"),
    "events_completions": Site("aserve.server.openai.completions:_Call.events_of"),
    "stream_ending": Site("aserve.server.openai.completions:_Call.ending"),
    "response_chat": Site("aserve.server.openai.chat_answer:Answer.response"),
    "response_completions": Site("aserve.server.openai.completions:_Call.response"),
    # the engine as a whole
    "schedule": Site("aserve.core.scheduler:Scheduler.schedule", fatal=True),
    "commit": Site("aserve.core.scheduler:Scheduler.commit", fatal=True),
    "batch": Site("aserve.worker.batch_state:BatchState.apply", fatal=True),
    "executor": Site("aserve.executor.uni:UniExecutor.submit", fatal=True),
}


@dataclass
class Armed:
    """What has happened at an armed site: how often it was called, and how often it failed."""

    calls: int = 0
    hits: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def strike(*args: Any, **kwargs: Any) -> None:
    raise InjectedFault


@contextmanager
def armed(
    name: str,
    *,
    at: int = 1,
    when: Callable[..., bool] | None = None,
    act: Callable[..., None] = strike,
    path: str | None = None,
) -> Iterator[Armed]:
    """Makes a site fail: at its ``at``-th call, or at every call for whose arguments ``when`` is true.

    act: called with the arguments, before the real function; raises unless told otherwise.
    path: arms this function instead of a listed site.
    """
    owner, attribute = (Site(path) if path is not None else SITES[name]).find()
    real = owner.__dict__[attribute]
    state = Armed()

    @functools.wraps(real)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with state.lock:
            state.calls += 1
            due = state.calls == at if when is None else when(*args, **kwargs)
            state.hits += due
        if due:
            act(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, attribute, wrapper)
    try:
        yield state
    finally:
        setattr(owner, attribute, real)
