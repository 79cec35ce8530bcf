"""Beam search through the OpenAI endpoints, from a model with weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aserve.args import AsyncEngineArgs
from aserve.engine.async_engine import AsyncLLMEngine
from tests import tiny_checkpoint
from tests.server.conftest import events, make_app, running, until

BEAM = {"model": "tiny", "use_beam_search": True, "best_of": 4, "n": 2, "temperature": 0, "max_tokens": 12}
PROMPT = "the same again"
STOPS = list(range(60, 100))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)


@pytest.fixture
async def engine(checkpoint: Path) -> AsyncIterator[AsyncLLMEngine]:
    args = AsyncEngineArgs(
        model=str(checkpoint), served_model_name=["tiny"], dtype="float32", max_num_seqs=8, device="cpu",
        num_gpu_blocks_override=64, swap_space=0, disable_log_requests=True,
    )  # fmt: skip
    return AsyncLLMEngine.from_engine_args(args)


@pytest.fixture
async def client(engine: AsyncLLMEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running(make_app(engine)) as port,  # type: ignore[arg-type]
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        await until(lambda: engine.is_running, 60)
        yield client


async def ask(client: httpx.AsyncClient, path: str = "/v1/completions", **fields: Any) -> Any:
    body = {**BEAM, "prompt": PROMPT, **fields}
    if path != "/v1/completions":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()
    *chunks, done = events(answer.content)
    assert done == "[DONE]"
    return chunks


@torch.inference_mode()
def expected(checkpoint: Path, ids: list[int]) -> tuple[list[str], int]:
    """Texts of transformers' two best, and how many tokens they have."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=12,
        eos_token_id=[2, *STOPS],
        pad_token_id=0,
        length_penalty=0.5,
        early_stopping=True,
    )
    outputs = [row[len(ids) :] for row in found.tolist()]
    lengths = [next((at for at, token in enumerate(row) if token in STOPS), 12) for row in outputs]
    assert min(lengths) < 12
    # The token that ends an output is one of it, and no part of its text.
    texts = [tokenizer.decode(row[:length]) for row, length in zip(outputs, lengths, strict=True)]
    return texts, sum(min(length + 1, 12) for length in lengths)


async def test_completions_are_those_of_transformers(
    client: httpx.AsyncClient, engine: AsyncLLMEngine, checkpoint: Path
) -> None:
    ids = AutoTokenizer.from_pretrained(checkpoint).encode(PROMPT)
    texts, count = expected(checkpoint, ids)
    fields = {"length_penalty": 0.5, "early_stopping": True, "stop_token_ids": STOPS}
    answer = await ask(client, **fields)
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == count
    (event,) = await ask(client, stream=True, **fields)
    assert event["choices"] == answer["choices"]
    core = engine.engine.core
    assert core.blocks.num_free == core.blocks.num_blocks
    assert core.ledger.received == core.ledger.finished == 2


async def test_chats(client: httpx.AsyncClient) -> None:
    path = "/v1/chat/completions"
    answer = await ask(client, path)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(texts) == 2 and texts[0] != texts[1]
    chunks = await ask(client, path, stream=True)
    streamed = ["", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


async def test_logprobs(client: httpx.AsyncClient) -> None:
    answer = await ask(client, logprobs=3)
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"]]
    assert sums == sorted(sums, reverse=True)
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["tokens"]) == 12
        # Tokens that are parts of characters look alike.
        assert all(1 <= len(top) <= 4 for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 1}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"min_p": 0.1}, "min_p"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"stop_token_ids": list(range(256))}, "stop_token_ids"),
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, engine: AsyncLLMEngine, fields: dict[str, Any], param: str
) -> None:
    answer = await client.post("/v1/completions", json={**BEAM, "prompt": PROMPT, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert engine.engine.core.ledger.received == 0
