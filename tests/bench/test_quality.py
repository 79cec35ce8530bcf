"""The reduced quality gate: packed weights against float32 on real text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aserve import packaged
from aserve.bench import quality
from aserve.tokenizer.loader import load_tokenizer

POSITIONS = 300


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def file() -> str:
    return str(packaged.resolve("smollm2"))


@pytest.fixture(scope="module")
def ids(file: str) -> list[list[int]]:
    return quality.documents(load_tokenizer(file), POSITIONS)


@pytest.fixture(scope="module")
def reference(file: str, ids: list[list[int]]) -> list[torch.Tensor]:
    """aserve's own float32, which the parity tests and the slow one below hold to transformers."""
    own = quality.Logits(file, dtype="float32")
    return [own.of(each) for each in ids]


def test_the_texts_are_long_enough_for_the_gate(file: str) -> None:
    assert sum(map(len, quality.documents(load_tokenizer(file)))) >= 1000


@pytest.mark.timeout(300)
def test_as_packed_by_default(file: str, ids: list[list[int]], reference: list[torch.Tensor]) -> None:
    """The bounds are about twice what int8 activations cost here; one position has half of the greatest."""
    own = quality.Logits(file)
    found = quality.divergence(reference, [own.of(each) for each in ids])
    assert found.positions == POSITIONS
    assert found.mean < 1.2e-2 and found.max < 0.8 and found.top1 > 0.9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_float32_is_exact(file: str, ids: list[list[int]], reference: list[torch.Tensor]) -> None:
    transformers = quality.reference_logits(file, ids)
    found = quality.divergence(transformers, reference)
    assert found.max < 1e-6 and found.top1 == 1.0
    own = quality.Logits(file, dtype="float32")
    assert quality.divergence(transformers, [own.of(each, 40) for each in ids]).max < 1e-6


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    found = quality.divergence([p.log()], [q.log() + 3.0])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert found.mean == pytest.approx(float(expected) / 2)
    assert found.max == pytest.approx(float(expected))
    assert (found.positions, found.top1) == (2, 0.5)
    with pytest.raises(ValueError, match="shapes"):
        quality.divergence([p], [q[:1]])
