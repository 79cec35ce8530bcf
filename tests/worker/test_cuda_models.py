"""Every family of models on a fake GPU: nothing they do under capture needs the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aserve import LLM, SamplingParams
from aserve.ops import cuda, native
from tests.model import tiny
from tests.parity.make_golden import golden_path
from tests.worker import fake_cuda

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the fake stands in for a GPU that is not there"),
]

QUICK = ("gemma3", "opt-350m", "qwen3")


def answers(model: str, device: str, **options: Any) -> list[Any]:
    prompts = [tiny.tokens(length) for length in (3, 17, 30)]
    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, logprobs=1)
    with LLM(
        model,
        dtype="float32",
        device=device,
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_model_len=48,
        **options,
    ) as llm:
        return llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)


def check(model: str, **options: Any) -> None:
    expected = answers(model, "cpu")
    machine = fake_cuda.Machine(1 << 30)
    with fake_cuda.installed(machine):
        found = answers(model, "cuda", **options)
        assert machine.captures == 3 and machine.replays >= 13
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.outputs[0].cumulative_logprob == pytest.approx(
            theirs.outputs[0].cumulative_logprob, abs=1e-3
        )


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny.FAMILIES],
)
def test_a_family(family: str, tmp_path: Path) -> None:
    check(str(tiny.save(tiny.model(family), tmp_path)))


@pytest.mark.skipif(native.level() == "reference", reason="it is about the native kernels")
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_with_kernels_in_place_of_torch(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route that verified kernels take; those for the CPU have the same names and arguments."""
    monkeypatch.setattr(cuda, "serves", lambda *combination: True)
    check(str(tiny.save(tiny.model(family), tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, True])
def test_smollm2_answers_as_transformers_does(eager: bool) -> None:
    import json

    entries = json.loads(golden_path("smollm2").read_text())[:12]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    machine = fake_cuda.Machine(8 << 30)
    with (
        fake_cuda.installed(machine),
        LLM(
            "smollm2",
            dtype="float32",
            device="cuda",
            enforce_eager=eager,
            max_model_len=256,
            max_num_seqs=8,
            max_num_batched_tokens=128,
            num_gpu_blocks_override=40,
        ) as llm,
    ):
        outputs = llm.generate(
            prompt_token_ids=[entry["ids"] for entry in entries], sampling_params=params, use_tqdm=False
        )
    for output, entry in zip(outputs, entries, strict=True):
        assert output.outputs[0].token_ids == entry["tokens"][:32]
    assert (machine.replays > 20) == (not eager)
