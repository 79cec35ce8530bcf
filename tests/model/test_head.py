"""The output head in half precision."""

from __future__ import annotations

import pytest
import torch

from aserve.model.layers import embedding
from aserve.model.layers.embedding import OutputHead, make_embedding
from aserve.model.layers.linear import Build


def make(tied: bool, packed: bool = False) -> tuple[OutputHead, torch.Tensor]:
    build = Build(torch.device("cpu"), torch.bfloat16, packed=packed)
    table = make_embedding(build, "embed", 40, 16, is_head=tied)
    head = OutputHead(build, "lm_head", table, tied)
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in build.table.shapes().items()}
    build.table.fill(weights.items(), lambda name: name)
    build.finish()
    return head, weights["embed.weight" if tied else "lm_head.weight"].bfloat16().double()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_not_rounded_to_the_weights_precision(tied: bool, packed: bool) -> None:
    head, weight = make(tied, packed)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = hidden.double() @ weight.T
    logits = head.logits(hidden)
    assert logits.dtype is torch.float32
    assert (logits.double() - exact).abs().max() < 1e-5
    assert (logits != logits.bfloat16().float()).any()


def test_a_head_too_large_for_a_copy_keeps_to_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_WIDE_BYTES", 0)
    head, _ = make(True)
    logits = head.logits(torch.ones(2, 16).bfloat16())
    assert torch.equal(logits, logits.bfloat16().float())
