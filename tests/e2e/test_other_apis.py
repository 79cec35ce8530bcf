"""Embeddings, the Responses and the Messages API by their official clients, on a real model."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx
import numpy as np
import pytest
from openai import OpenAI

from tests.e2e.process import Server, idle_afterwards

MODEL = "smollm2"
QUESTION = "What is the capital of France?"


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with (
        idle_afterwards(server),
        OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as made,
    ):
        yield made


def test_embeddings_tell_texts_apart(client: OpenAI) -> None:
    texts = [QUESTION, "Which city is France's capital?", "def add(a, b): return a + b"]
    answer = client.embeddings.create(model=MODEL, input=texts)
    vectors = np.array([entry.embedding for entry in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > likeness[0, 2]
    # Alone it is what it is among others, as numbers what it is as base64.
    alone = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float")
    np.testing.assert_allclose(alone.data[0].embedding, vectors[0], atol=1e-5)
    short = client.embeddings.create(model=MODEL, input=texts[0], dimensions=64)
    wanted = vectors[0, :64] / np.linalg.norm(vectors[0, :64])
    np.testing.assert_allclose(short.data[0].embedding, wanted, atol=1e-5)


def test_three_apis_give_one_answer(server: Server, client: OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=16)
    text = chat.choices[0].message.content
    assert text is not None and "Paris" in text

    options = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 16}
    response = client.responses.create(**options)
    assert response.output_text == text
    assert chat.usage is not None and response.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    with client.responses.stream(**options) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == text
        assert stream.get_final_response().output_text == text

    with anthropic.Anthropic(api_key="none", base_url=server.url, max_retries=0, timeout=60) as other:
        options = {"model": MODEL, "messages": messages, "max_tokens": 16, "extra_body": {"temperature": 0}}
        message = other.messages.create(**options)
        assert [block.text for block in message.content] == [text]
        with other.messages.stream(**options) as stream:
            assert "".join(stream.text_stream) == text
        count = other.messages.count_tokens(model=MODEL, messages=messages)
        assert count.input_tokens == chat.usage.prompt_tokens


def test_the_tokenizer_from_afar(server: Server, client: OpenAI) -> None:
    """What lm-eval's remote tokenizer asks for."""
    info = httpx.get(server.url + "/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"]
    body = {"model": MODEL, "prompt": "hello world", "add_special_tokens": False}
    tokens = httpx.post(server.url + "/tokenize", json=body).json()["tokens"]
    text = httpx.post(server.url + "/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"]
    assert text == "hello world"
    answer = client.completions.create(model=MODEL, prompt=tokens, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(tokens)
