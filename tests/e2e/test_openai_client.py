"""The official client against a real server and a real model."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.e2e.process import Server, idle_afterwards

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with (
        idle_afterwards(server),
        OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as made,
    ):
        yield made


def test_models(client: OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.object == "model"


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_text(client: OpenAI) -> None:
    settings = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**settings)
    chunks = list(
        client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == whole.choices[0].finish_reason
    assert set(ends[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_completion(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert answer.object == "text_completion"
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


def test_a_streamed_completion_is_the_same_text(client: OpenAI) -> None:
    settings = {"model": MODEL, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text


def test_several_prompts_answer_in_order(client: OpenAI) -> None:
    prompts = ["The capital of France is", "Two plus two is"]
    together = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6)
    alone = [
        client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6)
        for prompt in prompts
    ]
    assert [choice.index for choice in together.choices] == [0, 1]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]


def test_n_gives_different_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=2, temperature=1.5, seed=5, max_tokens=24
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    first, second = (choice.message.content for choice in answer.choices)
    assert first != second


def test_n_streams_each_answer(client: OpenAI) -> None:
    texts = {0: "", 1: ""}
    ends: dict[int, str] = {}
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=2, temperature=1.0, seed=5, max_tokens=12, stream=True
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert all(texts.values())
    assert set(ends) == {0, 1}


def test_a_seed_repeats_and_another_does_not(client: OpenAI) -> None:
    def answer(seed: int) -> str | None:
        made = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=1.5, seed=seed, max_tokens=24
        )
        return made.choices[0].message.content

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)


def test_stop_ends_before_its_string(client: OpenAI) -> None:
    settings = {"model": MODEL, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 24}
    free = client.completions.create(**settings).choices[0].text
    stop = free[4:7]
    choice = client.completions.create(**settings, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == free[: free.index(stop)]


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes or []).decode(errors="replace") == entry.token


def test_completion_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None and logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) == 5


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nosuch"):
        client.chat.completions.create(model="nosuch", messages=QUESTION)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"max_tokens": 0}, {"top_p": 2}, {"max_tokens": "many"}, {"n": 0}]
)
def test_bad_values_are_bad_requests(client: OpenAI, wrong: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, **wrong)
    assert next(iter(wrong)) in caught.value.message


def test_a_prompt_that_cannot_fit_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 100_000, max_tokens=1)
    assert "100000" in caught.value.message or "100001" in caught.value.message
