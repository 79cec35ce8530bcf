"""The decoder's layers against float64, and the independence of a row's result of everything beside it."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from aserve.errors import ConfigError
from aserve.ops import native, packed
from aserve.ops.decoder import DecoderStack
from tests.ops.layers import QUANTISED, Rows, Shape, Step, exact, layers, step

LLAMA = Shape()
GEMMA = Shape(
    formats=("bf16",) * 7,
    hidden=72,
    mlp=104,
    heads=2,
    kv_heads=1,
    head_size=256,
    rotary=256,
    layers=4,
    head_norms=True,
    sandwich=True,
    windows=(7, 7, None, 20),
    activation="gelu_tanh",
    cache=torch.bfloat16,
)
SHAPES = {
    "llama": LLAMA,
    "llama-bf16": replace(LLAMA, formats=("bf16",) * 7, cache=torch.bfloat16),
    "llama-f16": replace(LLAMA, formats=("f16",) * 7, cache=torch.float16, interleaved=True, layers=3),
    "qwen2": replace(LLAMA, formats=("bf16",) * 7, bias=True, heads=7, kv_heads=1, head_size=16, rotary=16),
    "qwen3": replace(LLAMA, head_norms=True, head_size=48, rotary=48, activation="gelu"),
    "gemma": GEMMA,
    "capped": replace(LLAMA, softcap=3.0, rotary=24, windows=(None, 33), hidden=50, mlp=37),
    "q4_1": replace(LLAMA, formats=("q4_1",) * 7, cache=torch.bfloat16, bias=True),
    "q8_0": replace(LLAMA, formats=("q8_0",) * 7, sandwich=True),
    "mixed": replace(LLAMA, formats=("q4_0", "f32", "q8_0", "bf16", "q4_1", "f16", "q4_1"), bias=True),
    "mixed-k": replace(
        LLAMA,
        formats=("q4_k", "q6_k", "q4_k", "q6_k", "f32", "q4_k", "q6_k"),
        hidden=256,
        mlp=256,
        heads=4,
        head_size=64,
        rotary=64,
    ),
}
BATCHES: dict[str, Rows] = {
    "decode": ((1, 40),),
    "decode-2": ((1, 5), (1, 300)),
    "short": ((3, 3),),
    "decode-9": tuple((1, 3 + 11 * i) for i in range(9)),
    "prefill": ((70, 70), (33, 33)),
    "all-kinds": ((21, 60), (17, 17), (1, 90), (2, 300), (1, 1), (1, 33)),
    "long": ((300, 300), (1, 70)),
}


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest, loaded: ModuleType) -> str:
    name: str = request.param
    try:
        loaded.select(name)
    except ConfigError as error:
        pytest.skip(str(error))
    return name


def made(shape: Shape) -> DecoderStack:
    needed = set(shape.formats) - set(packed.formats())
    if needed:
        pytest.skip(f"no native kernels for {sorted(needed)}")
    specs, norm = layers(shape)
    return DecoderStack(specs, norm, 1e-6)


def run(stack: DecoderStack, given: Step) -> torch.Tensor:
    return stack.forward(given.hidden, given.positions, given.caches, given.meta)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b), f"largest difference {(a - b).abs().max()}"


def same_caches(a: Step, b: Step) -> None:
    for one, other in zip(a.caches, b.caches, strict=True):
        for side, also in zip(one, other, strict=True):
            torch.testing.assert_close(side, also, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(level: str, name: str, batch: str) -> None:
    shape = SHAPES[name]
    stack = made(shape)
    given = step(shape, BATCHES[batch])
    wanted_step = given.fresh()
    specs, norm = layers(shape)
    wanted = exact(specs, norm, wanted_step)
    out = run(stack, given)
    # Keys, values or activations that fall to the other side when rounded move a row.
    rounds = shape.cache != torch.float32 or any(f in QUANTISED for f in shape.formats)
    error = (out.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert error.max() < (3e-2 if rounds else 3e-6)
    assert error.mean() < 4e-3
    for sides, also in zip(given.caches, wanted_step.caches, strict=True):
        for side, exactly in zip(sides, also, strict=True):
            assert torch.equal(side.isnan(), exactly.isnan())
            distance = (side.double() - exactly.double()).nan_to_num().norm()
            assert distance < (8e-3 if rounds else 3e-6) * exactly.double().nan_to_num().norm()


INDEPENDENT = ("llama", "qwen2", "gemma", "capped", "q4_1", "mixed", "mixed-k")


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_row_alone(level: str, name: str) -> None:
    shape = SHAPES[name]
    stack = made(shape)
    given = step(shape, BATCHES["all-kinds"])
    alone = given.fresh()
    out = run(stack, given)
    for row, (tokens, _) in enumerate(given.rows):
        start = given.meta.query_start_host[row]
        same(run(stack, alone.part(row, 0, tokens)), out[start : start + tokens])
    same_caches(given, alone)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_token_by_token(level: str, name: str) -> None:
    """A prefill, the same in chunks, and the same decoded."""
    shape = SHAPES[name]
    stack = made(shape)
    given = step(shape, ((40, 50),))
    chunked, decoded = given.fresh(), given.fresh()
    out = run(stack, given)
    same(torch.cat([run(stack, chunked.part(0, i, i + 8)) for i in range(0, 40, 8)]), out)
    same(torch.cat([run(stack, decoded.part(0, i, i + 1)) for i in range(40)]), out)
    same_caches(given, chunked)
    same_caches(given, decoded)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["llama", "gemma", "mixed"])
def test_thread_counts(level: str, name: str, batch: str) -> None:
    shape = SHAPES[name]
    stack = made(shape)
    first = step(shape, BATCHES[batch])
    out = run(stack, first)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(3):
            given = step(shape, BATCHES[batch])
            same(run(stack, given), out)
            same_caches(given, first)


def test_no_tokens(loaded: ModuleType) -> None:
    given = step(LLAMA, ((1, 5),))
    empty = given.part(0, 0, 0)
    assert run(made(LLAMA), replace(empty, rows=())).shape == (0, LLAMA.hidden)


def test_caches_may_change(loaded: ModuleType) -> None:
    stack = made(LLAMA)
    given = step(LLAMA, ((4, 9), (1, 30)))
    other = given.fresh()
    out = run(stack, given)
    same(run(stack, other), out)
    same_caches(given, other)
    same(run(stack, given), out)


BAD = {
    "block id": ("block_tables", 0, 10**6),
    "slot": ("slot_mapping", 2, 10**9),
    "slot_before": ("slot_mapping", 1, -1),
    "query_start": ("query_start", 1, 3),
    "more tokens": ("seq_lens", 0, 2),
    "block table": ("seq_lens", 0, 10**6),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_metadata(loaded: ModuleType, what: str) -> None:
    field, index, value = BAD[what]
    given = step(LLAMA, ((4, 9),))
    getattr(given.meta, field).view(-1)[index] = value
    with pytest.raises(RuntimeError, match=f"aserve::decoder_forward: .*{what.split('_before')[0]}"):
        run(made(LLAMA), given)


@pytest.mark.parametrize("position", [-1, 600])
def test_bad_position(loaded: ModuleType, position: int) -> None:
    given = step(LLAMA, ((4, 9),))
    given.positions[3] = position
    with pytest.raises(RuntimeError, match="aserve::decoder_forward: a position is outside cos_sin"):
        run(made(LLAMA), given)


def test_bad_tensors(loaded: ModuleType) -> None:
    stack = made(LLAMA)
    given = step(LLAMA, ((4, 9),))
    for wrong in (
        replace(given, hidden=given.hidden.double()),
        replace(given, hidden=given.hidden[:, :64].contiguous()),
        replace(given, positions=given.positions.int()),
        replace(
            given, caches=[given.caches[0], (given.caches[1][0].bfloat16(), given.caches[1][1].bfloat16())]
        ),
        replace(given, caches=[given.caches[0], (given.caches[1][0][1:], given.caches[1][1][1:])]),
    ):
        with pytest.raises(RuntimeError, match="aserve::decoder_"):
            run(stack, wrong)
    with pytest.raises(ConfigError, match="2 layers need as many caches, there are 1"):
        run(stack, replace(given, caches=given.caches[:1]))
    run(stack, given)


def test_refusals(loaded: ModuleType) -> None:
    specs, norm = layers(LLAMA)
    assert DecoderStack.refusal(specs) is None
    first = specs[0]
    for wrong, reason in (
        ([], "there are none"),
        ([replace(first, head_size=24)], "head size is 24"),
        ([replace(first, num_heads=5)], "5 query heads do not divide among 2 KV heads"),
        ([replace(first, num_heads=4)], "q is 192 by 96, not 128 by 96"),
        ([first, replace(first, num_heads=4)], "layer 1 has other heads"),
        ([replace(first, activation="relu")], "activation 'relu' is unknown"),
        ([replace(first, down=first.up)], "down is 160 by 96, not 96 by 160"),
        ([replace(first, q_norm=norm)], "q_norm is not float32"),
        ([replace(first, input_norm=norm.double())], "input_norm is not float32"),
        ([replace(first, cos_sin=first.cos_sin[:, :9])], "cos_sin is not float32"),
        ([replace(first, window=i + 1) for i in range(9)], "more than 8 different windows"),
    ):
        found = DecoderStack.refusal(wrong)
        assert found is not None
        assert reason in found
        with pytest.raises(ConfigError, match="the native decoder cannot run these layers"):
            DecoderStack(wrong, norm, 1e-6)


def test_refused_without_kernels(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, _ = layers(LLAMA)
    monkeypatch.setattr(native, "_library", None)
    assert DecoderStack.refusal(specs) == "the native kernels are not loaded"
    plain, _ = layers(LLAMA)
    monkeypatch.undo()
    loaded.load()
    assert DecoderStack.refusal(plain) == "layer 0: q is not packed for the native kernels"


def test_an_undescribed_layer(loaded: ModuleType) -> None:
    """The operation itself refuses what the class would never hand it."""
    library = native.library()
    given = step(LLAMA, ((1, 5),))
    description = torch.zeros(library.functions.aserve_decoder_bytes(2), dtype=torch.uint8)
    meta = given.meta
    rows = (meta.query_start, meta.seq_lens, meta.block_tables, meta.slot_mapping)
    rest = (given.hidden, given.positions, *rows, torch.empty_like(given.hidden))
    with pytest.raises(RuntimeError, match="this is no description of layers"):
        library.decoder_forward(description, *rest)
    library.decoder_stack(description, 2, 6, 2, 32, torch.ones(96), 1e-6)
    with pytest.raises(RuntimeError, match="layer 0 is not described whole"):
        library.decoder_forward(description, *rest)
    with pytest.raises(RuntimeError, match="there is no layer 2"):
        library.decoder_cache(description, 2, *given.caches[0])
