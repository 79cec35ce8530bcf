"""Every listed place is made to fail while 32 requests run: one of them ends with an error, 31 as ever.

R4 (one request's failure), R19 (logits that are no numbers), S10, S12 (nothing of the error gets out).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from aserve import faults
from aserve.args import AsyncEngineArgs
from aserve.engine.async_engine import AsyncLLMEngine
from tests import tiny_checkpoint
from tests.server.conftest import events, make_app, running, until

COUNT = 32
LEAKS = re.compile(r"0x[0-9a-f]{6,}|/usr/|\.py\b|Traceback|InjectedFault\(|secret")
VICTIM = 7777
"""The seed by which a test tells a request that is to fail at whatever place."""


def calls() -> list[tuple[str, dict[str, Any]]]:
    """Requests of every kind, each with a seed of its own."""
    made: list[tuple[str, dict[str, Any]]] = []
    for i in range(COUNT):
        body: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "ignore_eos": True, "seed": 100 + i}
        kind = i % 8
        body["stream"] = i % 2 == 0 or kind == 7
        if kind in (0, 1):
            body |= {"prompt": f"number {i}", "temperature": 0}
        elif kind == 2:
            body |= {"messages": [{"role": "user", "content": f"say {i}"}], "temperature": 0.9}
        elif kind == 3:
            body |= {"messages": [{"role": "user", "content": f"tell {i}"}], "repetition_penalty": 1.2}
        elif kind == 4:
            body |= {"prompt": f"list {i}", "logprobs": 3, "stop": ["\x00never\x00"]}
        elif kind == 5:
            body |= {"prompt": f"echo {i}", "logprobs": 2, "echo": True}
        elif kind == 6:
            body |= {"prompt": f"two {i}", "n": 2, "temperature": 1.1, "logit_bias": {"5": 3.0}}
        else:
            body |= {"messages": [{"role": "user", "content": f"third {i}"}], "temperature": 0}
            body["stream_options"] = {"include_usage": True}
        made.append(("/v1/chat/completions" if "messages" in body else "/v1/completions", body))
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)


@asynccontextmanager
async def serving(checkpoint: Path, **values: Any) -> AsyncIterator[tuple[AsyncLLMEngine, httpx.AsyncClient]]:
    args = AsyncEngineArgs(
        model=str(checkpoint), served_model_name=["tiny"], dtype="float32", max_num_seqs=64, device="cpu",
        num_gpu_blocks_override=512, swap_space=0, disable_log_requests=True,
    )  # fmt: skip
    engine = AsyncLLMEngine.from_engine_args(args)
    async with running(make_app(engine, **values)) as port:  # type: ignore[arg-type]
        limits = httpx.Limits(max_connections=2 * COUNT)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60
        ) as client:
            await until(lambda: engine.is_running, 60)
            yield engine, client


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[int, list[Any]]:
    """Status, and the payloads of the answer without what changes from one to the next."""
    answer = await client.post(path, json=body)
    if answer.headers["content-type"].startswith("text/event-stream"):
        found = events(answer.content)
        assert found[-1] == "[DONE]"
    else:
        found = [orjson.loads(answer.content)]
    assert not LEAKS.search(answer.text), answer.text
    return answer.status_code, [tidy(each) for each in found]


def tidy(payload: Any) -> Any:
    if isinstance(payload, dict):
        return {key: value for key, value in payload.items() if key not in ("id", "created")}
    return payload


def error_of(result: tuple[int, list[Any]]) -> dict[str, Any] | None:
    """The error a request ended by: a status and a body, or the last event but one."""
    status, found = result
    last = found[-2] if found[-1] == "[DONE]" else found[0]
    if status != 200:
        assert last["object"] == "error" and last["code"] == status
        return dict(last["error"])
    if found[-1] == "[DONE]" and len(found) > 1 and "error" in found[-2]:
        return dict(found[-2]["error"])
    return None


def joined(result: tuple[int, list[Any]]) -> Any:
    """What a request was answered, however its stream was cut into events."""
    _, found = result
    if found[-1] != "[DONE]":
        return found
    texts: dict[int, str] = {}
    rest: dict[int, list[Any]] = {}
    for each in found[:-1]:
        for choice in each.get("choices", ()):
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[index] = texts.get(index, "") + text
            logprobs = choice.get("logprobs") or {}
            rest.setdefault(index, []).extend(logprobs.get("token_logprobs") or ())
            if choice["finish_reason"]:
                rest[index].append(choice["finish_reason"])
    return texts, rest


async def ask_all(client: httpx.AsyncClient) -> list[tuple[int, list[Any]]]:
    return list(await asyncio.gather(*(ask(client, path, body) for path, body in calls())))


def idle(engine: AsyncLLMEngine) -> bool:
    assert engine.engine is not None
    return engine.num_unfinished == 0 and not engine.engine.output.states


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Any]:
    async def run() -> list[Any]:
        async with serving(checkpoint) as (_, client):
            results = await ask_all(client)
            assert [error_of(each) for each in results] == [None] * COUNT
            return [joined(each) for each in results]

    return asyncio.run(run())


AT = {
    "sampler_fork": 2, "logits_processor": 9, "history": 8, "prompt_logprobs": 2, "detokenise": 70,
    "stop_strings": 12, "logprobs": 15, "output_delta": 25, "bridge": 30, "bridge_deliver": 12,
    "events_chat": 9, "events_completions": 9, "detokenise_end": 3, "text_begins": 6,
}  # fmt: skip
"""The call that fails, where it is not the first."""

REQUEST_SITES = [name for name, site in faults.SITES.items() if not site.fatal]
PLACED = ("sampler_row", "grammar_mask", "grammar_advance", "grammar_compile", "vector")
"""Sites with tests of their own: one request alone comes by, or many rows at once."""
FATAL_SITES = [name for name, site in faults.SITES.items() if site.fatal]


def check_one_victim(results: list[tuple[int, list[Any]]], expected: list[Any]) -> dict[str, Any]:
    errors = [error_of(each) for each in results]
    victims = [i for i, error in enumerate(errors) if error is not None]
    assert len(victims) == 1, errors
    for i, result in enumerate(results):
        if i not in victims:
            assert joined(result) == expected[i], i
    error = errors[victims[0]]
    assert error is not None
    assert set(error) >= {"message", "type", "param", "code"} and 400 <= error["code"] <= 599
    return error


@pytest.mark.parametrize("name", [name for name in REQUEST_SITES if name not in PLACED])
async def test_one_request_fails_alone(checkpoint: Path, expected: list[Any], name: str) -> None:
    async with serving(checkpoint) as (engine, client):
        with faults.armed(name, at=AT.get(name, 1)) as site:
            results = await ask_all(client)
        assert site.hits == 1
        check_one_victim(results, expected)
        await until(lambda: idle(engine))
        assert engine.engine is not None
        engine.engine.core.verify()
        engine.engine.core.ledger.verify(live=0)
        # The engine is none the worse for it.
        path, body = calls()[0]
        assert joined(await ask(client, path, body)) == expected[0]


def holds_victim(state: Any, slots: list[int]) -> bool:
    return any(slot in state._rows and state._rows[slot].params.seed == VICTIM for slot in slots)


async def one_more(client: httpx.AsyncClient, **values: Any) -> tuple[list[Any], tuple[int, list[Any]]]:
    body = {"model": "tiny", "prompt": "victim", "max_tokens": 10, "ignore_eos": True, "seed": VICTIM}
    body |= values
    *others, own = await asyncio.gather(
        *(ask(client, path, body) for path, body in calls()), ask(client, "/v1/completions", body)
    )
    return others, own


def poison_rows(state: Any, logits: Any, rows: list[int], slots: list[int]) -> None:
    for row, slot in zip(rows, slots, strict=True):
        if holds_victim(state, [slot]):
            logits[row, 3] = float("nan")


Poison = tuple[str, Callable[..., bool], Callable[..., None], dict[str, Any]]
ROWS: list[Poison] = [
    (
        "aserve.sampling.sampler:SamplerState._sample",
        lambda state, logits, needs, slots, index: holds_victim(state, slots),
        faults.strike,
        {"temperature": 0.8},
    ),
    (
        "aserve.sampling.sampler:SamplerState.sample",
        lambda state, logits, rows, slots: holds_victim(state, slots),
        poison_rows,
        {"temperature": 0.8},
    ),
    (
        "aserve.sampling.sampler:SamplerState.sample",
        lambda state, logits, rows, slots: holds_victim(state, slots),
        poison_rows,
        {"temperature": 0, "stream": True},
    ),
    # Nobody else is guided.
    (faults.SITES["grammar_mask"].path, lambda *_: True, faults.strike, {"guided_regex": "[a-z]{40}"}),
    (
        faults.SITES["grammar_advance"].path,
        lambda *_: True,
        faults.strike,
        {"guided_regex": "[a-z]{40}", "temperature": 0, "stream": True},
    ),
]
ROW_NAMES = ["raises", "nan", "nan-greedy", "mask", "advance"]


@pytest.mark.parametrize(("path", "when", "act", "values"), ROWS, ids=ROW_NAMES)
async def test_one_row_fails_alone(
    checkpoint: Path, expected: list[Any], path: str, when: Any, act: Any, values: dict[str, Any]
) -> None:
    async with serving(checkpoint) as (engine, client):
        with faults.armed("", path=path, when=when, act=act) as site:
            others, own = await one_more(client, **values)
        assert site.hits
        error = error_of(own)
        assert error is not None and error["code"] == 500
        for i, result in enumerate(others):
            assert joined(result) == expected[i], i
        await until(lambda: idle(engine))


async def test_a_vector_fails_alone(checkpoint: Path, expected: list[Any]) -> None:
    body = {"model": "tiny", "input": "a text"}
    async with serving(checkpoint) as (engine, client):
        assert (await client.post("/v1/embeddings", json=body)).status_code == 200
        with faults.armed("vector") as site:
            *others, own = await asyncio.gather(
                *(ask(client, path, each) for path, each in calls()), ask(client, "/v1/embeddings", body)
            )
        assert site.hits == 1
        error = error_of(own)
        assert error is not None and error["code"] == 500
        assert [joined(result) for result in others] == expected
        await until(lambda: idle(engine))


async def test_a_grammar_fails_alone_and_is_asked_for_again(checkpoint: Path, expected: list[Any]) -> None:
    async with serving(checkpoint) as (engine, client):
        with faults.armed("grammar_compile") as site:
            others, own = await one_more(client, guided_regex="[a-z]{40}")
        assert site.hits == 1
        error = error_of(own)
        assert error is not None and error["code"] == 400 and error["param"] == "guided_regex"
        assert [joined(result) for result in others] == expected
        others, own = await one_more(client, guided_regex="[a-z]{40}")
        assert error_of(own) is None and own[1][0]["choices"][0]["text"].isalpha()
        assert [joined(result) for result in others] == expected
        await until(lambda: idle(engine))


@pytest.mark.parametrize("name", FATAL_SITES)
async def test_a_dead_engine_ends_everything_at_once(checkpoint: Path, name: str) -> None:
    ended: list[float] = []
    loop = asyncio.get_running_loop()
    async with serving(checkpoint, on_fatal=lambda: ended.append(loop.time())) as (engine, client):
        with faults.armed(name, at=6) as site:
            started = loop.time()
            results = await asyncio.wait_for(ask_all(client), 20)
        assert site.hits == 1 and engine.errored
        failed = [error for error in map(error_of, results) if error is not None]
        assert failed and all(error["code"] == 500 for error in failed)
        found = [
            (await client.get(path)).status_code for path in ("/health", "/health/ready", "/health/live")
        ]
        assert found == [500, 503, 503]
        path, body = calls()[1]
        assert (await client.post(path, json=body)).status_code == 500
        await until(lambda: bool(ended))
        assert ended[0] > started


def test_every_site_exists() -> None:
    for site in faults.SITES.values():
        site.find()
    with pytest.raises(AttributeError):
        faults.Site("aserve.engine.input:InputProcessor.renamed").find()


def test_nothing_imports_the_faults() -> None:
    root = Path(faults.__file__).parent
    users = [path for path in root.rglob("*.py") if "aserve.faults" in path.read_text()]
    assert users == []


def test_a_site_is_put_back() -> None:
    from aserve.tokenizer.stop import StopChecker

    before = StopChecker.__dict__["feed"]
    with faults.armed("stop_strings"):
        assert StopChecker.__dict__["feed"] is not before
        with pytest.raises(faults.InjectedFault):
            StopChecker(["x"], False).feed("y", searching=True)
    assert StopChecker.__dict__["feed"] is before
