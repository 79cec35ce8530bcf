"""GGUF weights kept packed: rows against the gguf package, products against float64, bits against bits."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch

from aserve.errors import ConfigError
from aserve.ops import native, packed

# Block columns, block bytes, and where the block's fp16 scales are.
TYPES = {
    "Q4_0": (32, 18, (0,)),
    "Q4_1": (32, 20, (0, 2)),
    "Q5_0": (32, 22, (0,)),
    "Q5_1": (32, 24, (0, 2)),
    "Q8_0": (32, 34, (0,)),
    "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)),
    "Q6_K": (256, 210, (208,)),
}
SHAPES = [(1, 256), (16, 512), (33, 768), (49, 1024), (80, 1536)]
NARROW = [(5, 32), (40, 96), (33, 544)]  # not for the K formats
CASES = [(name, *shape) for name in TYPES for shape in SHAPES + ([] if name.endswith("K") else NARROW)]
BATCHES = [1, 2, 3, 7, 8, 9, 17, 48, 65, 130]
LEVELS = [*native.LEVELS, "avx512vnni"]


def choose(level: str) -> None:
    """A level; "avx512" is without the VNNI instructions here."""
    library = native.library()
    assert library is not None
    vnni = library.functions.aserve_cpu_vnni(int(level == "avx512vnni"))
    try:
        native.select(level.removesuffix("vnni"))
    except ConfigError as error:
        pytest.skip(str(error))
    if level == "avx512vnni" and not vnni:
        pytest.skip("this CPU has no AVX512_VNNI")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, loaded: object) -> Iterator[str]:
    choose(request.param)
    yield request.param
    native.library().functions.aserve_cpu_vnni(1)


def random_blocks(name: str, rows: int, columns: int, scales: np.ndarray | None = None) -> np.ndarray:
    """Rows of random bytes with fp16 scales of about 0.01, or drawn from `scales`: ``[rows, bytes]``."""
    block, size, places = TYPES[name]
    rng = np.random.default_rng(rows * 10007 + columns)
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place in places:
        shape = (rows, columns // block, 1)
        drawn = rng.normal(0, 0.01, shape) if scales is None else rng.choice(scales, shape)
        raw[..., place : place + 2] = drawn.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def decoded(name: str, raw: np.ndarray) -> torch.Tensor:
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values.astype(np.float32))


def pack(
    name: str,
    raw: np.ndarray,
    columns: int,
    order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> packed.PackedWeight:
    number = int(gguf.GGMLQuantizationType[name])
    shape = (raw.shape[0], columns)
    return packed.pack_gguf(torch.from_numpy(raw).flatten(), number, shape, row_order=order, bias=bias)


def activations(rows: int, columns: int) -> torch.Tensor:
    """Of uneven size, as those of a model."""
    made = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=made)
    return x * torch.randn(rows, columns, generator=made).exp()


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What the kernels make of activations: int8 codes times a scale for each 32, in float64."""
    blocks = x.reshape(x.shape[0], -1, 32)
    scale = blocks.abs().amax(2, keepdim=True) / 127
    scale = ((scale.view(torch.int32) + 3) & ~3).view(torch.float32)
    codes = torch.round(blocks * torch.where(scale > 0, 1 / scale, 0))
    assert codes.abs().max() <= 127
    return (codes.double() * scale.double()).reshape(x.shape)


@pytest.mark.parametrize(("name", "rows", "columns"), CASES)
def test_rows_are_those_of_the_file(loaded: object, name: str, rows: int, columns: int) -> None:
    raw = random_blocks(name, rows, columns)
    order = torch.randperm(rows)
    want = decoded(name, raw)
    everything = torch.arange(rows)
    assert torch.equal(packed.rows(pack(name, raw, columns), everything), want)
    assert torch.equal(packed.rows(pack(name, raw, columns, order), everything), want[order])


@pytest.mark.parametrize("name", TYPES)
def test_rows_with_extreme_scales(loaded: object, name: str) -> None:
    scales = np.array([0.0, -0.0, 2.0**-24, -(2.0**-20), 2.0**-14, 65504.0, -65504.0, 1.0])
    raw = random_blocks(name, 21, 512, scales)
    weight = pack(name, raw, 512)
    assert torch.equal(packed.rows(weight, torch.arange(21)), decoded(name, raw))


@pytest.mark.parametrize(("name", "rows", "columns"), CASES)
def test_products(level: str, name: str, rows: int, columns: int) -> None:
    raw = random_blocks(name, rows, columns)
    bias = torch.randn(rows)
    weight, plain = pack(name, raw, columns, bias=bias), decoded(name, raw).double()
    x = activations(max(BATCHES), columns)
    exact = rounded(x)
    want = exact @ plain.T + bias.double()
    # A block's part is made of d * codes and the minimum, each at most about twice its largest weight.
    largest = plain.abs().reshape(rows, -1, 32).amax(2).repeat_interleave(32, 1)
    allowed = 2**-22 * (exact.abs() @ largest.T * 4 + bias.abs().double())
    whole = packed.linear_float(x, weight)
    assert ((whole.double() - want).abs() <= allowed).all()
    for batch in BATCHES:
        assert torch.equal(packed.linear_float(x[-batch:], weight), whole[-batch:]), batch
    # The rounding to int8 by itself: about 0.01 of the result.
    without = whole.double() - bias.double()
    ideal = x.double() @ plain.T
    assert (without - ideal).norm() <= 0.02 * ideal.norm()


@pytest.mark.parametrize("name", TYPES)
def test_a_result_depends_on_its_two_rows_alone(level: str, name: str) -> None:
    raw = random_blocks(name, 144, 768)
    x = activations(130, 768)
    whole = packed.linear_float(x, pack(name, raw, 768))
    for first, last in [(0, 16), (16, 48), (0, 100), (48, 144), (7, 8)]:
        part = packed.linear_float(x[20:90], pack(name, raw[first:last], 768))
        assert torch.equal(part, whole[20:90, first:last]), (first, last)
    order = torch.randperm(144)
    assert torch.equal(packed.linear_float(x, pack(name, raw, 768, order)), whole[:, order])


@pytest.mark.parametrize("name", TYPES)
def test_every_level_gives_the_same_bits(loaded: object, name: str) -> None:
    weight = pack(name, random_blocks(name, 50, 768), 768)
    x = activations(70, 768)
    native.library().functions.aserve_cpu_vnni(1)
    best = packed.linear_float(x, weight)
    for other in LEVELS[:2]:
        try:
            native.select(other)
        except ConfigError:
            continue
        native.library().functions.aserve_cpu_vnni(0)
        assert torch.equal(packed.linear_float(x, weight), best), other
    native.library().functions.aserve_cpu_vnni(1)


@pytest.mark.parametrize("codes", [(-128, -128), (127, 127), (-128, 127), (-127, -1)])
def test_the_largest_codes_do_not_saturate(level: str, codes: tuple[int, int]) -> None:
    raw = np.zeros((20, 2, 34), np.uint8)
    raw[..., :2] = np.full((20, 2, 1), 1.0, np.float16).view(np.uint8)
    raw[..., 2:] = np.tile(np.array(codes, np.int8), 16).view(np.uint8)
    weight = pack("Q8_0", raw.reshape(20, -1), 64)
    plain = decoded("Q8_0", raw.reshape(20, -1)).double()
    x = torch.stack([torch.full((64,), 127.0), torch.full((64,), -127.0), torch.tensor([127.0, -127.0] * 32)])
    assert torch.equal(packed.linear_float(x, weight).double(), x.double() @ plain.T)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q6_K"])
def test_full_codes_do_not_saturate(level: str, name: str) -> None:
    """All bits set: the greatest code in every place, which is where 16-bit sums are largest."""
    block, size, places = TYPES[name]
    raw = np.full((20, 1, size), 0xFF, np.uint8)
    for place in places:
        raw[..., place : place + 2] = np.full((20, 1, 1), 1.0, np.float16).view(np.uint8)
    rows = raw.reshape(20, -1)
    plain = decoded(name, rows).double()
    x = torch.stack([torch.full((block,), 127.0), torch.full((block,), -127.0)])
    assert torch.equal(packed.linear_float(x, pack(name, rows, block)).double(), x.double() @ plain.T)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_a_value_out_of_range_shows_in_its_row_alone(level: str, name: str, bad: float) -> None:
    weight = pack(name, random_blocks(name, 33, 512), 512)
    x = activations(9, 512)
    want = packed.linear_float(x, weight)
    broken = x.clone()
    broken[4, 300] = bad
    got = packed.linear_float(broken, weight)
    assert got[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("name", TYPES)
def test_small_large_and_zero_activations(level: str, name: str) -> None:
    weight = pack(name, random_blocks(name, 33, 512), 512)
    x = activations(4, 512)
    base = packed.linear_float(x, weight)
    assert torch.equal(packed.linear_float(torch.zeros(3, 512), weight), torch.zeros(3, 33))
    assert torch.equal(packed.linear_float(x * 1e-35, weight), torch.zeros(4, 33))
    for factor in (2.0**-60, 2.0**80):  # powers of two change nothing but the exponent
        assert torch.equal(packed.linear_float(x * factor, weight), base * factor)


@pytest.mark.parametrize("name", TYPES)
def test_zero_blocks(level: str, name: str) -> None:
    raw = np.zeros((18, 512 // TYPES[name][0] * TYPES[name][1]), np.uint8)
    bias = torch.randn(18)
    weight = pack(name, raw, 512, bias=bias)
    assert torch.equal(packed.linear_float(activations(8, 512), weight), bias.expand(8, 18))
