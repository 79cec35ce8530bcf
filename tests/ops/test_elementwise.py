"""Every operation but attention, against float64."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from aserve.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 8, 15, 16, 17, 576, 2050]


def near(got: torch.Tensor, want: torch.Tensor, implementation: ModuleType, atol: float = 1e-6) -> None:
    """Native results are off by their rounding alone; the references round in between as well."""
    eps = torch.finfo(got.dtype).eps
    if got.dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=2e-6)
    elif implementation.__name__.endswith("native"):
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=0.51 * eps)
    else:
        torch.testing.assert_close(got.double(), want, atol=max(atol, 2 * eps), rtol=4 * eps)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(implementation: ModuleType, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, size).to(dtype)
    for weight in (torch.randn(size).to(dtype), torch.randn(size)):
        near(implementation.rms_norm(x, weight, 1e-5), exact_norm(x, weight, 1e-5), implementation)


def test_rms_norm_of_heads_in_a_merged_projection(implementation: ModuleType) -> None:
    merged = torch.randn(6, 9, 40)
    weight = torch.randn(40)
    for x in (merged[:, 2:7], merged[0], merged[3:4, 1:2], merged[:0], merged[:, 0]):
        got = implementation.rms_norm(x, weight, 1e-6)
        assert got.shape == x.shape
        near(got, exact_norm(x, weight, 1e-6), implementation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_fused_add_rms_norm(implementation: ModuleType, size: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(3, 2 * size).to(dtype)[:, :size], torch.randn(3, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    normed, total = implementation.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    near(normed, exact_norm(total, weight, 1e-5), implementation)


def exact_rotation(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    half = cos_sin.shape[1] // 2
    out = x.double().clone()
    for token, position in enumerate(positions.tolist()):
        for i in range(half):
            c, s = (float(cos_sin[position, at]) for at in (i, half + i))
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
            a, b = x[token, :, first].double(), x[token, :, second].double()
            out[token, :, first], out[token, :, second] = a * c - b * s, b * c + a * s
    return out


ROTARY = [(64, 64), (64, 32), (80, 80), (20, 20), (96, 24), (16, 2)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "rotary"), ROTARY)
def test_rotary_embedding(
    implementation: ModuleType, head_size: int, rotary: int, dtype: torch.dtype, interleaved: bool
) -> None:
    merged = torch.randn(4, 8, head_size).to(dtype)
    q, k = merged[:, :4], merged[:, 4:6]
    cos_sin = torch.randn(50, rotary)
    positions = torch.tensor([0, 49, 7, 7])
    q_out, k_out = implementation.rotary_embedding(q, k, positions, cos_sin, interleaved)
    near(q_out, exact_rotation(q, positions, cos_sin, interleaved), implementation)
    near(k_out, exact_rotation(k, positions, cos_sin, interleaved), implementation)


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_store_and_rope_and_store(
    implementation: ModuleType, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """Both leave every other slot alone, and the fused one equals the two apart."""
    merged = torch.randn(5, 8, 24).to(dtype)
    q, k, v = merged[:, :4], merged[:, 4:6], merged[:, 6:]
    cos_sin, positions = torch.randn(50, 24), torch.tensor([3, 0, 49, 1, 2])
    slots = torch.tensor([3 * block_size, 0, 7, 4 * block_size - 1, block_size + 1])
    shape = (4, 2, block_size, 24)

    cache = torch.full(shape, 9.0, dtype=cache_dtype), torch.full(shape, 9.0, dtype=cache_dtype)
    turned_q, turned_k = implementation.rotary_embedding(q, k, positions, cos_sin)
    implementation.store_kv(turned_k, v, cache, slots)
    for side, written in zip(cache, (turned_k, v), strict=True):
        want = torch.full(shape, 9.0, dtype=cache_dtype)
        for token, slot in enumerate(slots.tolist()):
            want[slot // block_size, :, slot % block_size] = written[token].to(cache_dtype)
        assert torch.equal(side, want)

    fused = torch.full(shape, 9.0, dtype=cache_dtype), torch.full(shape, 9.0, dtype=cache_dtype)
    got = implementation.rope_and_store(q, k, v, positions, cos_sin, fused, slots)
    assert torch.equal(got, turned_q)
    assert torch.equal(fused[0], cache[0])
    assert torch.equal(fused[1], cache[1])


def test_slots_and_positions_outside_are_refused(loaded: ModuleType) -> None:
    k = torch.randn(2, 2, 16)
    cache = torch.zeros(3, 2, 8, 16), torch.zeros(3, 2, 8, 16)
    cos_sin = torch.randn(10, 16)
    for slot in (-1, 24):
        slots = torch.tensor([0, slot])
        with pytest.raises(RuntimeError, match="slot is outside"):
            loaded.store_kv(k, k, cache, slots)
        with pytest.raises(RuntimeError, match="slot is outside"):
            loaded.rope_and_store(k, k, k, torch.tensor([0, 1]), cos_sin, cache, slots)
    for position in (-1, 10):
        with pytest.raises(RuntimeError, match="position is outside"):
            loaded.rotary_embedding(k, k, torch.tensor([0, position]), cos_sin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gated_activations(implementation: ModuleType, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2 * size) * 4).to(dtype)
    x[0, 0], x[1, 0], x[2, 0] = -200.0, 200.0, 0.0
    gate, up = x.double().chunk(2, -1)
    near(implementation.silu_and_mul(x), torch.nn.functional.silu(gate) * up, implementation)
    for form in ("tanh", "none"):
        want = torch.nn.functional.gelu(gate, approximate=form) * up
        # 1 + erf and 1 + tanh of a negative gate lose digits
        near(implementation.gelu_and_mul(x, form), want, implementation, atol=1e-5)


def test_gated_activations_pass_nan_on(implementation: ModuleType) -> None:
    x = torch.ones(1, 64)
    x[0, 3] = math.nan
    for got in (implementation.silu_and_mul(x), implementation.gelu_and_mul(x)):
        assert got[0, 3].isnan()
        assert got.isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_blocks(implementation: ModuleType, dtype: torch.dtype) -> None:
    caches = [(torch.randn(6, 2, 8, 16).to(dtype), torch.randn(6, 2, 8, 16).to(dtype)) for _ in range(2)]
    before = [[side.clone() for side in cache] for cache in caches]
    # 4 goes to 0 after 0 went to 5, and 1 receives the new 5.
    implementation.copy_blocks(caches, [(0, 5), (4, 0), (5, 1), (2, 2)])
    for cache, old in zip(caches, before, strict=True):
        for side, was in zip(cache, old, strict=True):
            for block, source in enumerate((4, 0, 2, 3, 4, 0)):
                assert torch.equal(side[block], was[source]), block
    implementation.copy_blocks(caches, [])
    implementation.copy_blocks([], [(0, 1)])


def test_copy_blocks_outside_the_cache(loaded: ModuleType) -> None:
    cache = torch.zeros(3, 2, 8, 16), torch.zeros(3, 2, 8, 16)
    for pair in ((0, 3), (-1, 0)):
        with pytest.raises(RuntimeError, match="block id"):
            loaded.copy_blocks([cache], [pair])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swap_blocks(implementation: ModuleType, dtype: torch.dtype) -> None:
    """From one cache to another with fewer blocks, and back."""
    inside = [(torch.randn(6, 2, 8, 16).to(dtype), torch.randn(6, 2, 8, 16).to(dtype)) for _ in range(2)]
    outside = [(torch.randn(3, 2, 8, 16).to(dtype), torch.randn(3, 2, 8, 16).to(dtype)) for _ in range(2)]
    before = [[side.clone() for side in cache] for cache in inside]
    kept = [[side.clone() for side in cache] for cache in outside]
    implementation.swap_blocks(inside, outside, [(5, 0), (1, 2)])
    implementation.swap_blocks(outside, inside, [(0, 3)])
    implementation.swap_blocks(outside, inside, [])
    for layer in range(2):
        for side in range(2):
            was, out = before[layer][side], outside[layer][side]
            assert torch.equal(out, torch.stack([was[5], kept[layer][side][1], was[1]]))
            assert torch.equal(inside[layer][side], was[torch.tensor([0, 1, 2, 5, 4, 5])])


def test_swap_blocks_refuses_other_blocks(loaded: ModuleType) -> None:
    cache, small = (torch.zeros(3, 2, 8, 16),) * 2, (torch.zeros(2, 2, 8, 16),) * 2
    for pair in ((0, 2), (3, 0), (-1, 0)):
        with pytest.raises(RuntimeError, match="block id"):
            loaded.swap_blocks([cache], [small], [pair])
    with pytest.raises(RuntimeError, match="must have size 8 in dimension 2"):
        loaded.swap_blocks([cache], [(torch.zeros(2, 2, 4, 16),) * 2], [(0, 0)])
    with pytest.raises(RuntimeError, match="one dtype"):
        loaded.swap_blocks([cache], [(small[0].bfloat16(),) * 2], [(0, 0)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 16, 31, 49152 + 3])
def test_greedy_logprob(implementation: ModuleType, size: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 2 * size) * 3).to(dtype)[:, :size]
    logits[1] = 2.0
    logits[2, : size // 2] = -math.inf
    token, logprob = implementation.greedy_logprob(logits)
    wide = logits.double()
    top = wide.amax(-1, keepdim=True)
    want = [row.index(True) for row in (wide == top).tolist()]
    assert token.tolist() == want
    assert token.dtype == torch.int64
    # torch adds a float32 row up in longer chains than the kernel does.
    tolerance = 2e-5 if implementation is reference else 2e-6
    exact = wide.log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), exact, atol=tolerance, rtol=tolerance)


def test_greedy_logprob_shows_nan(implementation: ModuleType) -> None:
    logits = torch.zeros(1, 40)
    logits[0, 20] = math.nan
    assert implementation.greedy_logprob(logits)[1].isnan().all()


@pytest.mark.parametrize("size", [1, 5, 16, 31, 33, 515, 49152 + 3])
def test_greedy_allowed(implementation: ModuleType, size: int) -> None:
    logits = (torch.randn(5, 2 * size) * 3)[:, :size]
    logits[1] = 2.0
    counts = torch.rand(5, size) < torch.tensor([[0.5], [0.1], [0.01], [1.0], [0.0]])
    counts[:4, size // 2] = True
    logits[3, : size // 2] = -math.inf
    logits[0, ~counts[0]] = math.nan  # not looked at
    words = torch.zeros(5, -(-size // 32) * 32, dtype=torch.int64)
    words[:, :size] = counts
    words = (words.view(5, -1, 32) << torch.arange(32)).sum(-1).to(torch.int32)
    token, logprob = implementation.greedy_allowed(logits, words)
    wide = logits.double().masked_fill(~counts, -math.inf)
    top = wide.amax(-1, keepdim=True)
    want = [row.index(True) for row in (wide == top).tolist()]
    assert token.dtype == torch.int64 and token[:4].tolist() == want[:4]
    tolerance = 2e-5 if implementation is reference else 2e-6
    exact = wide.log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob[:4].double(), exact[:4], atol=tolerance, rtol=tolerance)
    assert not logprob[4].isfinite()
    for row in range(5):
        alone = implementation.greedy_allowed(logits[row : row + 1], words[row : row + 1])
        assert alone[0][0] == token[row] and (alone[1][0] == logprob[row] or row == 4)


def test_greedy_allowed_shows_nan(implementation: ModuleType) -> None:
    logits, words = torch.zeros(1, 40), torch.tensor([[1 << 20, 1]], dtype=torch.int32)
    assert implementation.greedy_allowed(logits, words)[1].isfinite().all()
    logits[0, 20] = math.nan
    assert implementation.greedy_allowed(logits, words)[1].isnan().all()


def test_rows_do_not_depend_on_their_batch(loaded: ModuleType) -> None:
    torch.manual_seed(1)
    x, residual, weight = torch.randn(300, 576), torch.randn(300, 576), torch.randn(576)
    torch.set_num_threads(3)
    together = loaded.fused_add_rms_norm(x, residual, weight, 1e-5)[0], loaded.silu_and_mul(x)
    for row in (0, 123, 299):
        one = slice(row, row + 1)
        assert torch.equal(
            loaded.fused_add_rms_norm(x[one], residual[one], weight, 1e-5)[0], together[0][one]
        )
        assert torch.equal(loaded.silu_and_mul(x[one]), together[1][one])


def test_other_dtypes_go_to_the_reference(loaded: ModuleType) -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert loaded.rms_norm(x, weight, 1e-6).dtype == torch.float64
    assert loaded.silu_and_mul(x).dtype == torch.float64


def test_wrong_shapes_are_refused(loaded: ModuleType) -> None:
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match="weight must have size 16 in dimension 0, has 8"):
        loaded.rms_norm(x, torch.ones(8), 1e-6)
    with pytest.raises(RuntimeError, match="residual must have size 3 in dimension 0"):
        loaded.fused_add_rms_norm(x, x[:2], torch.ones(16), 1e-6)
    with pytest.raises(RuntimeError, match="must have one dtype"):
        loaded.fused_add_rms_norm(x, x.bfloat16(), torch.ones(16), 1e-6)
    with pytest.raises(RuntimeError, match="dense"):
        loaded.rms_norm(torch.randn(16, 3).T, torch.ones(16), 1e-6)
    with pytest.raises(RuntimeError, match="even"):
        loaded.silu_and_mul(torch.randn(2, 5))


def test_8_bit_blocks_are_copied_as_they_are(implementation: ModuleType) -> None:
    """Bytes, of which some are NaN."""
    random = torch.randint(0, 256, (4, 2, 8, 16), dtype=torch.uint8)
    caches = [(random.clone().view(torch.float8_e4m3fn), random.clone().view(torch.float8_e5m2))]
    implementation.copy_blocks(caches, [(0, 3)])
    implementation.swap_blocks(caches, [tuple(side[:2].clone() for side in caches[0])], [(3, 1)])
    for side in caches[0]:
        assert torch.equal(side.view(torch.uint8), random[[0, 1, 2, 0]])


def rows_of_penalties() -> list[torch.Tensor]:
    starts = torch.tensor([0, 400, 400, 403])
    ids = torch.cat([torch.randperm(500)[:400], torch.tensor([4, 0, 499])])
    counts = torch.randint(0, 4, (403,), dtype=torch.int32)
    rates = torch.tensor([[1.3, 2.0, 0.8], [0.5, 0.1, -0.2], [0.25, 0.3, 1.5]])
    return [starts, ids, counts, *rates]


def test_penalties_of_every_implementation_are_one(implementation: ModuleType) -> None:
    """A token drawn must not depend on who computes this."""
    logits, columns = torch.randn(3, 500) * 3, rows_of_penalties()
    want = logits.clone()
    reference.penalties(want, *columns)
    got = torch.zeros(3, 600)[:, :500].copy_(logits)
    implementation.penalties(got, *columns)
    assert torch.equal(got, want)


def test_penalties_refuse_what_does_not_fit(loaded: ModuleType) -> None:
    logits, columns = torch.randn(3, 400), rows_of_penalties()
    before = logits.clone()
    with pytest.raises(RuntimeError, match="an id is outside the table"):
        loaded.penalties(logits, *columns)
    with pytest.raises(RuntimeError, match="starts must run from 0"):
        loaded.penalties(logits, columns[0] - 1, *columns[1:])
    with pytest.raises(RuntimeError, match="starts falls at row 1"):
        loaded.penalties(logits, torch.tensor([0, 400, 399, 403]), *columns[1:])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_follow_the_distribution(implementation: ModuleType, dtype: torch.dtype) -> None:
    """Chi-squared over 3000 draws, whose seeds count up and then whose positions do."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -math.inf], dtype=dtype)
    expected = (logits.double() / 0.8).softmax(-1) * 3000
    rows, heat = logits.expand(3000, 8).contiguous(), torch.full((3000,), 0.8)
    up, same = torch.arange(3000), torch.full((3000,), 7)
    for seeds, positions in ((up, same), (same, up)):
        token, logprob = implementation.sample(rows, heat, seeds, positions)
        counts = torch.bincount(token, minlength=8).double()
        assert counts[7] == 0
        chi = float(((counts - expected)[:7].pow(2) / expected[:7]).sum())
        assert chi < 22.5, chi  # the 0.1 % point at 6 degrees of freedom
        exact = (logits.double() / 0.8).log_softmax(-1)[token]
        torch.testing.assert_close(logprob.double(), exact, atol=2e-6, rtol=2e-6)


def test_a_draw_is_its_rows_alone(implementation: ModuleType) -> None:
    logits, heat = torch.randn(5, 3000), torch.tensor([0.5, 0.0, 1.0, 3.0, 1e30])
    seeds, positions = torch.tensor([1, 2, -3, 1 << 62, 5]), torch.tensor([0, 9, 70000, 2, 1])
    together = implementation.sample(logits, heat, seeds, positions)
    assert torch.equal(together[0], reference.sample(logits, heat, seeds, positions)[0])
    assert together[0][1] == logits[1].argmax()
    for row in range(5):
        one = slice(row, row + 1)
        alone = implementation.sample(logits[one], heat[one], seeds[one], positions[one])
        assert torch.equal(alone[0], together[0][one])
        assert torch.equal(alone[1], together[1][one])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_draw_shows_that_there_is_none(implementation: ModuleType, bad: float) -> None:
    logits = torch.zeros(3, 40)
    logits[0, 20] = bad
    logits[1] = -math.inf
    column = torch.arange(3)
    logprob = implementation.sample(logits, torch.tensor([1.0, 1.0, 1.0]), column, column)[1]
    assert logprob.isfinite().tolist() == [False, False, True]
