from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import orjson
import pytest

from aserve.messages.inputs import OutputKind
from aserve.server.openai import prompts
from tests.server.conftest import make_app, running
from tests.server.fake_engine import FakeEngine

URL = "/v1/embeddings"


def unit(*values: int) -> list[float]:
    vector = np.array(values, dtype=np.float32)
    return list(vector / np.linalg.norm(vector))


async def ask(client: Any, **values: Any) -> dict[str, Any]:
    answer = await client.post(URL, json={"model": "alias", **values})
    data = await answer.get_data()
    assert answer.status_code == 200, data
    return orjson.loads(data)


async def test_a_whole_answer(client: Any, engine: FakeEngine) -> None:
    answer = await ask(client, input="abcde")
    assert re.fullmatch(r"embd-[0-9a-f]{32}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    (entry,) = answer.pop("data")
    assert entry.pop("embedding") == pytest.approx(unit(*b"bcde"))
    assert entry == {"object": "embedding", "index": 0}
    usage = {"prompt_tokens": 6, "total_tokens": 6, "completion_tokens": 0}
    assert answer == {"object": "list", "model": "fake", "usage": usage}
    assert engine.submitted[0].kind is OutputKind.FINAL_ONLY


@pytest.mark.parametrize(
    ("value", "wanted", "count"),
    [
        (["ab", "cde"], [[1, *b"ab", 1], [1, *b"cde"]], 7),
        ([5, 6, 7], [[5, 6, 7, 1]], 3),
        ([[5, 6], [7]], [[5, 6, 1, 1], [7, 1, 1, 1]], 3),
    ],
)
async def test_forms_of_input(client: Any, value: Any, wanted: list[list[int]], count: int) -> None:
    answer = await ask(client, input=value)
    assert [entry["index"] for entry in answer["data"]] == list(range(len(wanted)))
    for entry, ids in zip(answer["data"], wanted, strict=True):
        assert entry["embedding"] == pytest.approx(unit(*ids))
    assert answer["usage"]["total_tokens"] == count


async def test_base64_is_the_same_vector(client: Any) -> None:
    (number,) = (await ask(client, input="abcde"))["data"]
    (coded,) = (await ask(client, input="abcde", encoding_format="base64"))["data"]
    vector = np.frombuffer(base64.b64decode(coded["embedding"]), dtype="<f4")
    assert vector.tolist() == np.array(number["embedding"], dtype=np.float32).tolist()


async def test_options(client: Any, engine: FakeEngine) -> None:
    answer = await ask(
        client,
        input="abcde",
        dimensions=2,
        truncate_prompt_tokens=3,
        add_special_tokens=False,
        priority=3,
        timeout=9,
        cache_salt="s",
    )
    assert answer["data"][0]["embedding"] == pytest.approx(unit(*b"cd"))
    (request,) = engine.submitted
    assert (request.ids, request.params.dimensions) == ([*b"cde"], 2)
    assert (request.options.priority, request.options.timeout, request.options.cache_salt) == (3, 9, "s")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [256]}, "input"),
    ({"input": [True]}, "input"),
    ({"input": {"a": 1}}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": "x" * 5000}, "input"),
    ({"input": "x", "encoding_format": "binary"}, "encoding_format"),
    ({"input": "x", "dimensions": 0}, "dimensions"),
    ({"input": "x", "dimensions": "2"}, "dimensions"),
    ({"input": "x", "dimensions": 5}, "dimensions"),
    ({"input": "x", "timeout": -1}, "timeout"),
]


@pytest.mark.parametrize(("values", "param"), REFUSED, ids=lambda value: str(value)[:32])
async def test_refusals(client: Any, values: dict[str, Any], param: str) -> None:
    answer = await client.post(URL, json={"model": "fake", **values})
    assert answer.status_code == 400, await answer.get_data()
    assert (await answer.get_json())["error"]["param"] == param


async def test_unknown_model(client: Any) -> None:
    assert (await client.post(URL, json={"model": "nope", "input": "x"})).status_code == 404


async def test_others_run_while_many_texts_are_tokenised(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_CHARS_IN_A_ROW", 10)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count())
    options = {"add_special_tokens": True, "truncate": None, "want_text": False}
    found = await prompts.tokenise_all(engine, ["abcd"] * 30, **options)  # type: ignore[arg-type]
    other.cancel()
    assert len(found) == 30 and turns >= 10


@pytest.fixture
async def api(engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running(make_app(engine)) as port,
        openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1/", max_retries=0) as client,
    ):
        yield client


async def test_the_official_client(api: openai.AsyncOpenAI) -> None:
    # It asks for base64 by itself and decodes what it gets.
    answer = await api.embeddings.create(model="fake", input=["abcde", "x"])
    assert answer.data[0].embedding == pytest.approx(unit(*b"bcde"))
    assert answer.usage.total_tokens == 8
    answer = await api.embeddings.create(model="fake", input=[1, 2, 3], encoding_format="float", dimensions=3)
    assert answer.data[0].embedding == pytest.approx(unit(1, 2, 3))
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        await api.embeddings.create(model="fake", input="x", dimensions=9)
