"""Vectors of prompts: equal to transformers' final hidden states, whatever runs beside them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aserve import LLM, EmbeddingRequestOutput, PoolingParams, SamplingParams
from aserve.engine.pooling import finish
from aserve.errors import InvalidRequestError, RequestFailedError
from aserve.messages.outputs import RequestOutput
from aserve.ops import native
from tests.model import tiny

FAMILIES = ["llama", "qwen3", "gemma3", "opt", "opt-350m"]


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, tiny.VOCABULARY) for _ in range(count)] for count in (1, 2, 17, 33, 8, 40)]


def wanted(family: str, ids: list[int]) -> np.ndarray:
    """The last token's final hidden state by transformers in float32, scaled to length 1."""
    model = tiny.model(family)
    seen: list[torch.Tensor] = []
    # What the head reads: `hidden_states` stops short of OPT's projection behind the layers.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode(), hook:
        model(torch.tensor([ids]))
    vector = seen[0][0, -1]
    return (vector / vector.norm()).numpy()


def make(path: Path, **options: Any) -> LLM:
    defaults = {"max_num_seqs": 4, "block_size": 16, "max_model_len": 64, "dtype": "float32"}
    return LLM(str(path), skip_tokenizer_init=True, **{**defaults, **options})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle(family: str, tmp_path: Path) -> None:
    path = tiny.save(tiny.model(family), tmp_path)
    with make(path) as llm:
        outputs = llm.encode(prompt_token_ids=prompts(), use_tqdm=False)
    for ids, output in zip(prompts(), outputs, strict=True):
        assert isinstance(output, EmbeddingRequestOutput)
        assert output.finished and output.prompt_token_ids == ids
        found = np.array(output.outputs.embedding)
        assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(found, wanted(family, ids), atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 16},
        {"enable_prefix_caching": True},
        {"num_gpu_blocks_override": 5, "enable_chunked_prefill": True, "max_num_batched_tokens": 16},
        {"dtype": "bfloat16"},
    ],
)
def test_beside_generation(llama: Path, options: dict[str, Any]) -> None:
    """Both kinds in one engine: the tokens are those of an engine without vectors, the vectors close to
    those of an engine of their own."""
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    asked = prompts()[:4]
    dtype = {"dtype": options.pop("dtype", "float32")}
    with make(llama, **dtype, **options) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate(None, sampling, asked, False)]
        vectors = [output.outputs.embedding for output in llm.encode(prompt_token_ids=asked, use_tqdm=False)]
        mixed = [(None, ids, params) for ids in asked for params in (sampling, PoolingParams(), sampling)]
        outputs = llm._complete(mixed, False, None, None)
        again = llm.encode(prompt_token_ids=asked, use_tqdm=False)
        engine = llm.llm_engine
        engine.core.verify()
        assert engine.core.blocks.num_free == engine.core.blocks.num_blocks
    texts = [output.outputs[0].token_ids for output in outputs if isinstance(output, RequestOutput)]
    assert len(texts) == 8
    if dtype["dtype"] == "float32":  # a reduced type's ties fall as the batch does
        assert texts == [tokens for tokens in alone for _ in range(2)]
    found = [output.outputs.embedding for output in outputs if isinstance(output, EmbeddingRequestOutput)]
    tolerance = 2e-5 if dtype["dtype"] == "float32" else 0.05
    np.testing.assert_allclose(found, vectors, atol=tolerance)
    np.testing.assert_allclose([output.outputs.embedding for output in again], vectors, atol=tolerance)
    if dtype["dtype"] == "float32":
        np.testing.assert_allclose(vectors, [wanted("llama", ids) for ids in asked], atol=2e-5)


def test_a_one_token_prompt_is_never_a_greedy_step(llama: Path) -> None:
    if native.level() == "reference":
        pytest.skip("there is no native greedy step")
    with make(llama) as llm:
        (one,) = llm.encode(prompt_token_ids=[7], use_tqdm=False)
        (generated,) = llm.generate(None, SamplingParams(temperature=0, max_tokens=3), [[7]], False)
        (two,) = llm.encode(prompt_token_ids=[7], use_tqdm=False)
    assert one.outputs.embedding == two.outputs.embedding
    assert len(generated.outputs[0].token_ids) == 3


def test_cut_and_scale(llama: Path) -> None:
    asked = [[5, 6, 7]] * 3
    params = [PoolingParams(), PoolingParams(dimensions=8), PoolingParams(dimensions=8, normalize=False)]
    with make(llama) as llm:
        whole, cut, raw = (
            np.array(output.outputs.embedding)
            for output in llm.encode(prompt_token_ids=asked, pooling_params=params, use_tqdm=False)
        )
    assert len(whole) == 48
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    np.testing.assert_allclose(cut, raw / np.linalg.norm(raw), atol=1e-6)
    assert np.linalg.norm(raw) != pytest.approx(1.0, abs=1e-3)


def test_a_vector_of_zeros_stays() -> None:
    assert finish(np.zeros(3, np.float32), PoolingParams()).tolist() == [0.0, 0.0, 0.0]


def test_refusals(llama: Path) -> None:
    with make(llama) as llm:
        for params, ids, param in [
            (PoolingParams(dimensions=49), [5], "dimensions"),
            (PoolingParams(), [5] * 65, "prompt"),
            (PoolingParams(), [], "prompt"),
            (PoolingParams(), [tiny.VOCABULARY], "prompt_token_ids"),
        ]:
            with pytest.raises(InvalidRequestError) as caught:
                llm.encode(prompt_token_ids=[ids], pooling_params=params, use_tqdm=False)
            assert caught.value.param == param
        (longest,) = llm.encode(prompt_token_ids=[[5] * 64], use_tqdm=False)
        assert len(longest.outputs.embedding) == 48
        with pytest.raises(InvalidRequestError, match="2 prompts but 1 pooling_params"):
            llm.encode(prompt_token_ids=[[5], [6]], pooling_params=[PoolingParams()])
    for values in ({"dimensions": 0}, {"dimensions": True}, {"normalize": 1}):
        with pytest.raises(InvalidRequestError):
            PoolingParams(**values)


def test_a_prompt_the_cache_can_never_hold(llama: Path) -> None:
    with make(llama, num_gpu_blocks_override=4, max_model_len=64) as llm:
        core = llm.llm_engine.core
        core.limits = replace(core.limits, num_blocks=2)  # it holds less than one longest prompt
        with pytest.raises(InvalidRequestError, match="too long for this engine"):
            llm.encode(prompt_token_ids=[[5] * 60], use_tqdm=False)


def test_a_hidden_state_that_is_not_finite_fails_alone(llama: Path) -> None:
    with make(llama) as llm:
        model = llm.llm_engine.executor._worker.model
        forward = model.forward

        def poisoned(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            hidden = forward(token_ids, *rest)
            hidden[token_ids == 9] = float("nan")
            return hidden

        model.forward = poisoned
        with pytest.raises(RequestFailedError, match="hidden state is not finite"):
            llm.encode(prompt_token_ids=[[5, 9]], use_tqdm=False)
        (other,) = llm.encode(prompt_token_ids=[[5, 8]], use_tqdm=False)
        assert np.isfinite(other.outputs.embedding).all()


async def test_the_asynchronous_engine(make_async: Any) -> None:
    engine = await make_async()
    found = [output async for output in engine.encode("hello", PoolingParams(), "a")]
    assert len(found) == 1 and found[0].finished and len(found[0].outputs.embedding) == 4
    with pytest.raises(ValueError, match="FINAL_ONLY"):
        await engine.submit("hello", PoolingParams())
    leaving = engine.encode("hello", PoolingParams(), "b")
    async for _ in leaving:
        break
    await leaving.aclose()
    assert engine.num_unfinished == 0
    (line,) = [line for line in engine.stats.render().splitlines() if b'reason="stop"' in line]
    assert line.endswith(b" 2.0")


def test_stepping_by_hand(make_engine: Any) -> None:
    engine = make_engine()
    engine.add_request("a", "hello", PoolingParams())
    engine.add_request("b", "hello", SamplingParams(max_tokens=2, ignore_eos=True))
    found = []
    while engine.has_unfinished_requests():
        found += engine.step()
    assert [type(output).__name__ for output in found if output.request_id == "a"] == [
        "EmbeddingRequestOutput"
    ]
    assert found[-1].request_id == "b" and len(found[-1].outputs[0].token_ids) == 2
