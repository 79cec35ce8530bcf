"""Packed weights: dense matrices against float64, what is refused, and the path without native kernels."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from aserve.errors import ConfigError
from aserve.ops import native, packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (16, 16), (17, 33), (5, 64), (40, 101), (130, 576), (35, 1537), (16, 3300)]
BATCHES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 33, 130]


@pytest.fixture(params=["reference", *native.LEVELS])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test without native kernels, and at each level of them."""
    if request.param == "reference":
        monkeypatch.setattr(native, "_library", None)
        return "reference"
    request.getfixturevalue("loaded")
    try:
        native.select(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Undone by the ``poison`` fixture."""
    torch.set_num_threads(2)
    yield


def near(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Off by the rounding of one float32 chain over the columns, and by the one to got's dtype."""
    want = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want = want + bias.double()
        terms = terms + bias.double().abs()
    assert got.shape == want.shape
    allowed = 2**-24 * (2 + weight.shape[1] ** 0.5) * terms
    if got.dtype != torch.float32:
        allowed = allowed + 0.51 * torch.finfo(got.dtype).eps * want.abs()
    error = (got.double() - want).abs()
    assert not got.isnan().any()
    assert (error <= allowed).all(), (error - allowed).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_linear(level: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(rows, columns).to(dtype), torch.randn(rows)
    for with_bias in (None, bias):
        matrix = packed.pack(weight, with_bias)
        assert (matrix.rows, matrix.columns, matrix.native) == (rows, columns, level != "reference")
        for batch in BATCHES:
            x = torch.randn(batch, columns)
            near(packed.linear(x, matrix), x, weight, with_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_activations_of_each_dtype(level: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(77, 530).to(dtype), torch.randn(77).to(x_dtype)
    matrix = packed.pack(weight, bias)
    for batch in (1, 7, 200):
        x = torch.randn(batch, 530).to(x_dtype)
        got = packed.linear(x, matrix)
        assert got.dtype == x_dtype
        near(got, x, weight, bias)
        exact = packed.linear_float(x, matrix)
        assert exact.dtype == torch.float32
        near(exact, x, weight, bias)
        assert torch.equal(exact.to(x_dtype), got)


def test_shapes_and_strides_of_x(level: str) -> None:
    weight = torch.randn(32, 48)
    matrix = packed.pack(weight)
    wide = torch.randn(6, 5, 96)
    for x in (wide[..., :48], wide[0, 0, 48:], wide[1:1, :, :48], wide[::2, :, 48:], wide[:, 3, :48]):
        got = packed.linear(x, matrix)
        assert got.shape == (*x.shape[:-1], 32)
        near(got.view(-1, 32), x.reshape(-1, 48), weight, None)


def test_a_column_of_padding_does_not_read_the_next_row(loaded: ModuleType) -> None:
    """An odd number of columns ends inside a line: what lies behind x must not come in as NaN * 0."""
    weight = torch.randn(8, 33).bfloat16()
    behind = torch.full((3, 40), torch.nan)
    behind[:, :33] = torch.randn(3, 33)
    near(packed.linear(behind[:, :33], packed.pack(weight)), behind[:, :33], weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(100, 576), (48, 3300), (33, 2048)])
def test_a_row_does_not_depend_on_its_batch(level: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    if level == "reference":
        pytest.skip("torch's own products do")
    matrix = packed.pack(torch.randn(rows, columns).to(dtype), torch.randn(rows))
    x = torch.randn(300, columns)
    alone = torch.cat([packed.linear(row.unsqueeze(0), matrix) for row in x])
    for batch in (2, 3, 4, 5, 7, 8, 11, 12, 13, 25, 130, 300):
        assert torch.equal(packed.linear(x[:batch], matrix), alone[:batch])
    assert torch.equal(packed.linear(x.flip(0), matrix), alone.flip(0))


@pytest.mark.parametrize("batch", [1, 9, 200])
def test_threads_change_no_bit(loaded: ModuleType, batch: int, two_threads: None) -> None:
    matrix = packed.pack(torch.randn(500, 700).bfloat16())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, 700).to(dtype)
        both = packed.linear(x, matrix)
        torch.set_num_threads(1)
        assert torch.equal(packed.linear(x, matrix), both)
        torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(level: str, dtype: torch.dtype) -> None:
    weight = torch.randn(50, 71).to(dtype)
    weight[3, 5] = torch.inf
    matrix = packed.pack(weight, torch.randn(50))
    ids = torch.tensor([49, 0, 3, 3, 16, 15])
    got = packed.rows(matrix, ids)
    assert got.dtype == torch.float32
    assert torch.equal(got, weight[ids].float())
    assert packed.rows(matrix, ids[:0]).shape == (0, 71)


@pytest.mark.parametrize("bad", [-1, 50])
def test_rows_outside_the_table_are_refused(level: str, bad: int) -> None:
    matrix = packed.pack(torch.randn(50, 16))
    with pytest.raises((RuntimeError, IndexError), match=r"outside the table|out of range"):
        packed.rows(matrix, torch.tensor([0, bad]))


def test_packed_memory_is_aligned_and_counted(loaded: ModuleType) -> None:
    matrices = [packed.pack(torch.randn(rows, 33).bfloat16()) for rows in (1, 16, 17)]
    assert [m.num_bytes for m in matrices] == [17 * 64, 17 * 64, 2 * 17 * 64]
    assert all(m.data.data_ptr() % 64 == 0 for m in matrices)
    assert len({m.data.data_ptr() for m in matrices}) == 3


def test_large_matrices_start_on_a_huge_page() -> None:
    size = 65 << 20  # more than the mappings that smaller ones share
    data = packed.allocate(size)
    assert data.shape == (size,)
    assert data.data_ptr() % (2 << 20) == 0
    assert not data[:: 1 << 16].any()


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """The bytes of a Q8_0 tensor whose values are those of ``weight`` rounded."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    return torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType.Q8_0)).view(-1)


def test_gguf_rows_come_in_the_order_asked_for(level: str) -> None:
    raw = q8_0(torch.randn(40, 64))
    plain = packed.rows(packed.pack_gguf(raw, 8, (40, 64)), torch.arange(40))
    order = torch.randperm(40)
    matrix = packed.pack_gguf(raw, 8, (40, 64), order, torch.arange(40.0))
    assert matrix.format == "q8_0"
    assert torch.equal(packed.rows(matrix, torch.arange(40)), plain[order])
    x = torch.randn(9, 64)
    got = packed.linear_float(x, matrix)
    want = x.double() @ plain[order].double().T + torch.arange(40.0).double()
    assert (got - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize(("ggml_type", "dtype"), [(0, np.float32), (1, np.float16), (30, np.uint16)])
def test_dense_gguf_tensors(level: str, ggml_type: int, dtype: type) -> None:
    weight = torch.randn(20, 33).bfloat16()
    stored = weight.view(torch.uint16).numpy() if ggml_type == 30 else weight.float().numpy().astype(dtype)
    raw = torch.from_numpy(stored.copy()).view(-1).view(torch.uint8)
    order = torch.arange(19, -1, -1)
    matrix = packed.pack_gguf(raw, ggml_type, (20, 33), order)
    want = weight.float() if ggml_type != 1 else weight.half().float()
    assert torch.equal(packed.rows(matrix, torch.arange(20)), want.flip(0))


def test_every_format_is_offered(level: str) -> None:
    assert packed.formats() == tuple(packed.FORMATS)
    assert packed.available() == (level != "reference")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), r"torch.float64 \[2, 3\] on cpu"),
        (torch.zeros(3), r"torch.float32 \[3\]"),
        (torch.zeros(3, 0), r"torch.float32 \[3, 0\]"),
        (torch.zeros(2, 3, device="meta"), "on meta"),
    ],
)
def test_weights_that_cannot_be_packed(level: str, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        packed.pack(weight)


def test_a_bias_of_another_size(level: str) -> None:
    with pytest.raises(ConfigError, match=r"must have shape \[4\], has \[3\]"):
        packed.pack(torch.zeros(4, 8), torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(68, dtype=torch.uint8), 8, (2, 33)), "2 by 33 does not divide into blocks of 32"),
        ((torch.zeros(67, dtype=torch.uint8), 8, (2, 32)), "takes 68 bytes, there are 67"),
        ((torch.zeros(68), 8, (2, 32)), r"not torch.float32 \[68\]"),
        ((torch.zeros(68, dtype=torch.uint8), 16, (2, 32)), "type 16 cannot be packed"),
        ((torch.zeros(68, dtype=torch.uint8), 8, (2, 32), torch.tensor([0])), r"must be int64 \[2\]"),
        ((torch.zeros(68, dtype=torch.uint8), 8, (2, 32), torch.tensor([0, 2])), "outside 0 to 1"),
        ((torch.zeros(68, dtype=torch.uint8), 8, (2, 32), torch.tensor([0, -1])), "outside 0 to 1"),
    ],
)
def test_gguf_tensors_that_cannot_be_packed(level: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        packed.pack_gguf(*arguments)


def calls() -> dict[str, tuple]:
    data = packed.allocate(2 * 16 * 64)
    x, out = torch.randn(3, 16), torch.empty(3, 20)
    good = (x, data, None, 0, 20, 16, out)
    ids, table = torch.tensor([1]), torch.empty(1, 16)
    raw = torch.zeros(2 * 34, dtype=torch.uint8)
    return {
        "x has 16": ("packed_linear", (x[:, :15].contiguous(), *good[1:]), "x must have size 16"),
        "x int": ("packed_linear", (x.int(), *good[1:]), "x must be float32, bfloat16 or float16"),
        "x scalar": ("packed_linear", (torch.tensor(1.0), *good[1:]), "x must have a dimension"),
        "x strided": ("packed_linear", (x.repeat(1, 2)[:, ::2], *good[1:]), "x must be dense"),
        "format": ("packed_linear", (x, data, None, 7, 20, 16, out), "unknown format 7"),
        "data short": ("packed_linear", (x, data[:-64], None, 0, 20, 16, out), "data must have size 2048"),
        "data shifted": (
            *("packed_linear", (x, packed.allocate(2112)[4:2052], None, 0, 20, 16, out)),
            "data must be 64-byte aligned",
        ),
        "data floats": ("packed_linear", (x, data.float(), None, 0, 20, 16, out), "data must be uint8"),
        "columns": ("packed_linear", (x, data, None, 8, 20, 16, out), "columns come in 32s, there are 16"),
        "bias short": ("packed_linear", (x, data, out[0, :5], 0, 20, 16, out), "bias must have size 20"),
        "bias half": ("packed_linear", (x, data, out[0].half(), 0, 20, 16, out), "bias must be float32"),
        "out rows": ("packed_linear", (*good[:-1], out[:2]), "out must have size 3"),
        "out strided": ("packed_linear", (*good[:-1], torch.empty(3, 40)[:, ::2]), "out must be dense"),
        "ids int32": ("packed_rows", (ids.int(), data, 0, 20, 16, table), "ids must be int64"),
        "rows out": ("packed_rows", (ids, data, 0, 20, 16, table.half()), "out must be float32"),
        "pack out": ("pack_dense", (x, data[:512]), "out must have size 1024"),
        "pack transposed": ("pack_dense", (x.t(), data), "weight must be dense"),
        "gguf dense": ("pack_gguf", (raw, 1, 2, 32, None, data), "format 1 is not quantised"),
        "gguf raw": ("pack_gguf", (raw[:60], 12, 2, 32, None, data[:576]), "raw must have size 68"),
        "gguf order": (
            "pack_gguf",
            (raw, 12, 2, 32, torch.tensor([0, 2]), data[:576]),
            "outside the matrix, 2",
        ),
    }


def test_operations_refuse_what_does_not_fit(loaded: ModuleType) -> None:
    library = native.library()
    for case, (name, arguments, message) in calls().items():
        with pytest.raises(RuntimeError, match=f"aserve::{name}: .*{message}"):
            getattr(library, name)(*arguments)
            pytest.fail(case)


def test_a_packed_weight_needs_its_kernels(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = packed.pack(torch.randn(4, 16))
    with monkeypatch.context() as without:
        without.setattr(native, "_library", None)
        with pytest.raises(ConfigError, match="not loaded now"):
            packed.linear(torch.randn(1, 16), matrix)
        with pytest.raises(ConfigError, match="not loaded now"):
            packed.rows(matrix, torch.tensor([0]))
