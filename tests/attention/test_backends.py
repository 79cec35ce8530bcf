"""Who attends for prompts: what each backend gives, which is chosen, and why one is not."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as real_varlen

from aserve.attention import route
from aserve.attention.backends import BACKENDS, Layer
from aserve.attention.rows import Options, parts_of
from aserve.errors import ConfigError
from aserve.gpu_check.paging import Batch, Case, exact, make, narrowed
from aserve.ops import cuda, native
from tests.attention.libraries import Varlen, Xformers

CPU = torch.device("cpu")
MIXED = ((5, 5), (33, 140), (20, 20), (1, 30), (1, 1))
PLAIN = [
    Case(rows=((3, 3),), heads=2, kv_heads=2),
    *(Case(rows=MIXED, heads=heads, kv_heads=kv) for heads, kv in ((2, 2), (9, 3), (8, 1))),
    Case(rows=MIXED, head_size=80, block_size=8),
    *(Case(rows=MIXED, window=window, block_size=32) for window in (1, 16, 37)),
]
SPECIAL = [
    Case(rows=MIXED, softcap=5.0),
    Case(rows=MIXED, slopes=True, heads=6, softcap=20.0, window=50),
]
ATOL = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


@pytest.fixture(autouse=True)
def chosen_anew(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv(route.VARIABLE, raising=False)
    monkeypatch.delenv(cuda.VARIABLE, raising=False)
    caches = (route.choose, route._own, cuda.serves)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Xformers:
    return Xformers().install(monkeypatch)


@pytest.fixture
def without_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Varlen]:
    def install(fault: str = "", newest: bool = True) -> Varlen:
        made = Varlen(fault)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", made.module(newest))
        return made

    return install


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """aserve's kernels, those on the CPU standing for the GPU's; the operations asked for."""
    if native.library() is None:
        pytest.skip("the native kernels are not loaded")
    asked = []

    def serves(op: str, dtype: torch.dtype, cache_dtype: torch.dtype | None, device: int) -> bool:
        asked.append(op)
        return True

    monkeypatch.setattr(cuda, "serves", serves)
    return asked


def layer_of(batch: Batch) -> Layer:
    case = batch.case
    return Layer(
        batch.q.dtype,
        batch.cache[0].dtype,
        case.heads,
        case.kv_heads,
        case.head_size,
        case.block_size,
        case.window is not None,
        case.softcap is not None,
        case.slopes,
    )


def attend(name: str, batch: Batch, **scales: float) -> torch.Tensor:
    """All rows, those with one query too."""
    meta = dataclasses.replace(batch.meta, num_decode_rows=0)
    rows = parts_of(meta).prefill
    assert rows is not None
    assert BACKENDS[name].refusal(layer_of(batch), CPU) is None
    return BACKENDS[name].attend(batch.q, batch.cache, rows, Options(batch.scale, **batch.options, **scales))


def close(got: torch.Tensor, batch: Batch) -> None:
    assert got.dtype == batch.q.dtype
    torch.testing.assert_close(got.double(), exact(batch), atol=ATOL[got.dtype], rtol=0.02)


@pytest.mark.parametrize("dtype", list(ATOL), ids=str)
@pytest.mark.parametrize("case", PLAIN + SPECIAL, ids=str)
def test_sdpa(case: Case, dtype: torch.dtype) -> None:
    batch = make(case, dtype)
    close(attend("sdpa", batch), batch)


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_varlen(varlen: Callable[..., Varlen], case: Case, dtype: torch.dtype, newest: bool) -> None:
    library, batch = varlen(newest=newest), make(case, dtype)
    close(attend("varlen", batch), batch)
    assert library.calls == 1


@pytest.mark.parametrize("dtype", list(ATOL), ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_xformers(xformers: Xformers, case: Case, dtype: torch.dtype) -> None:
    batch = make(case, dtype)
    close(attend("xformers", batch), batch)
    assert xformers.calls == 1


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["sdpa", "varlen", "xformers"])
def test_8_bit_caches(
    xformers: Xformers, varlen: Callable[..., Varlen], name: str, cache_dtype: torch.dtype
) -> None:
    varlen()
    batch = narrowed(make(PLAIN[2], torch.bfloat16), cache_dtype, 0.05, 0.5)
    close(attend(name, batch, k_scale=0.05, v_scale=0.5), batch)


def test_the_stand_in_is_called_as_torch_is() -> None:
    real = inspect.signature(real_varlen.varlen_attn).parameters
    stand_in = inspect.signature(Varlen().module().varlen_attn).parameters
    assert [(each.name, each.kind) for each in real.values()] == [
        (each.name, each.kind) for each in stand_in.values()
    ]


def test_torch_itself_takes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch's own function but the kernel, which GPUs alone have."""
    seen = []

    def kernel(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, None, None]:
        seen.append(rest)
        return torch.zeros_like(query), None, None

    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", kernel)
    assert attend("varlen", make(PLAIN[2], torch.bfloat16)).shape == (60, 9, 64)
    attend("varlen", make(PLAIN[-1], torch.bfloat16))
    key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, scale, window = seen[0][:9]
    assert (key.shape, value.shape) == ((196, 3, 64), (196, 3, 64))
    assert (cu_seq_q.tolist(), cu_seq_k.tolist()) == ([0, 5, 38, 58, 59, 60], [0, 5, 145, 165, 195, 196])
    assert (max_q, max_k, causal, scale, window) == (33, 140, True, 0.125, [-1, 0])
    assert seen[1][8] == [36, 0]  # and not causal by the flag, but by the 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("varlen", {"dtype": torch.float32}, "bfloat16 and float16, not float32"),
    ("varlen", {"head_size": 20}, "multiples of 8 up to 256, not 20"),
    ("varlen", {"softcap": True}, "cannot cap scores"),
    ("varlen", {"alibi": True}, "no ALiBi"),
    ("xformers", {"softcap": True}, "cannot cap scores"),
    ("xformers", {"alibi": True}, "no ALiBi"),
    ("own", {"head_size": 20}, "multiples of 8 up to 256, not 20"),
    ("own", {"block_size": 12}, "powers of two, not 12"),
]
LAYER = Layer(torch.bfloat16, torch.bfloat16, 4, 2, 64, 16)


@pytest.mark.parametrize(("name", "change", "reason"), REFUSED)
def test_what_a_backend_cannot_do(
    xformers: Xformers, monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any], reason: str
) -> None:
    layer = dataclasses.replace(LAYER, **change)
    assert reason in str(BACKENDS[name].refusal(layer, CPU))
    monkeypatch.setenv(route.VARIABLE, name)
    with pytest.raises(ConfigError, match=rf"^ASERVE_ATTENTION_BACKEND={name} cannot serve .*{reason}"):
        route.choose(layer, CPU)


def test_a_torch_without_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Varlen().module()
    module.varlen_attn = lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    assert (
        BACKENDS["varlen"].refusal(LAYER, CPU) == "this torch's varlen_attn has no scale and no window_size"
    )
    del module.varlen_attn
    assert "this torch has no torch.nn.attention.varlen" in str(BACKENDS["varlen"].refusal(LAYER, CPU))


def test_the_first_that_passes_is_chosen(
    varlen: Callable[..., Varlen], monkeypatch: pytest.MonkeyPatch, without_xformers: None
) -> None:
    assert route.choose(LAYER, CPU).name == "sdpa", "nothing else is here"
    route.choose.cache_clear()
    Xformers().install(monkeypatch)
    assert route.choose(LAYER, CPU).name == "xformers"
    route.choose.cache_clear()
    varlen()
    assert route.choose(LAYER, CPU).name == "varlen"
    assert route.choose(dataclasses.replace(LAYER, dtype=torch.float32), CPU).name == "xformers"
    assert route.choose(dataclasses.replace(LAYER, softcap=True), CPU).name == "sdpa"


def test_own_is_first(own: list[str], varlen: Callable[..., Varlen]) -> None:
    varlen()
    assert route.choose(LAYER, CPU).name == "own"


VARIANTS = [
    {},
    {"window": True},
    {"num_kv_heads": 4},
    {"num_heads": 9, "num_kv_heads": 1, "head_size": 80, "block_size": 8},
    {"cache_dtype": torch.float8_e4m3fn},
    {"dtype": torch.float16, "cache_dtype": torch.float8_e5m2},
]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_right_backends_pass_the_self_test(
    xformers: Xformers, varlen: Callable[..., Varlen], change: dict[str, Any]
) -> None:
    varlen()
    layer = dataclasses.replace(LAYER, **({"cache_dtype": change["dtype"]} if "dtype" in change else {}))
    layer = dataclasses.replace(layer, **change)
    for name in ("varlen", "xformers"):
        assert route._failure(BACKENDS[name], layer, CPU) is None


@pytest.mark.parametrize("change", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("fault", "reason"), [("top left", "off by"), ("nan", "off by nan"), ("raises", "no kernel image")]
)
def test_a_faulty_backend_is_passed_over(
    varlen: Callable[..., Varlen],
    xformers: Xformers,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    reason: str,
    change: dict[str, Any],
) -> None:
    varlen(fault)
    layer = dataclasses.replace(LAYER, **change)
    assert route.choose(layer, CPU).name == "xformers"
    route.choose.cache_clear()
    monkeypatch.setenv(route.VARIABLE, "varlen")
    with pytest.raises(
        ConfigError, match=f"ASERVE_ATTENTION_BACKEND=varlen cannot .* self-test .*{reason}"
    ) as e:
        route.choose(layer, CPU)
    assert "\n" not in str(e.value)
    assert "Compile" not in str(e.value), "one sentence"


def test_forcing(
    monkeypatch: pytest.MonkeyPatch, varlen: Callable[..., Varlen], without_xformers: None
) -> None:
    varlen()
    monkeypatch.setenv(route.VARIABLE, "sdpa")
    assert route.choose(LAYER, CPU).name == "sdpa"
    monkeypatch.setenv(route.VARIABLE, "xformers")
    route.choose.cache_clear()
    with pytest.raises(ConfigError, match=r"xformers cannot be imported .*pip install 'aserve\[cuda\]'"):
        route.choose(LAYER, CPU)
    monkeypatch.setenv(route.VARIABLE, "own")
    with pytest.raises(ConfigError, match=r"not verified for bfloat16 .*ASERVE_CUDA_KERNELS=all"):
        route.choose(LAYER, CPU)
    monkeypatch.setenv(route.VARIABLE, "flash")
    with pytest.raises(ConfigError, match="must be one of own, varlen, xformers, sdpa, is 'flash'"):
        route.check(torch.device("cuda"))


def test_the_variable_has_no_say_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    route.check(CPU)
    for name in ("own", ""):
        monkeypatch.setenv(route.VARIABLE, name)
        route.check(CPU)
    monkeypatch.setenv(route.VARIABLE, "sdpa")
    route.check(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"on the CPU aserve's own kernels attend.*; unset it"):
        route.check(CPU)


def run(batch: Batch, **changes: Any) -> torch.Tensor:
    meta = dataclasses.replace(batch.meta, **changes)
    return route.attend(batch.q, batch.cache, meta, batch.scale, **batch.options)


STEPS = [
    Case(rows=MIXED, heads=9, kv_heads=3),
    Case(rows=((1, 30), (1, 1))),
    Case(rows=((7, 7), (3, 30))),
    Case(rows=((1, 9), (4, 4), (1, 30))),  # a prompt's last token is no decode row
    *SPECIAL,
]


@pytest.mark.parametrize("case", STEPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps(varlen: Callable[..., Varlen], without_xformers: None, case: Case, dtype: torch.dtype) -> None:
    library, batch = varlen(), make(case, dtype)
    close(run(batch), batch)
    layer = layer_of(batch)
    plain = dtype == torch.bfloat16 and not (layer.softcap or layer.alibi)
    assert (library.calls > 0) == (plain and any(count > 1 for count, _ in case.rows))


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_steps_on_own_kernels(own: list[str], case: Case) -> None:
    batch = make(case, torch.bfloat16)
    close(run(batch), batch)
    assert set(own) == {"paged_attention"}
    if batch.meta.num_decode_rows == len(case.rows):
        close(run(batch, query_start_host=[], seq_lens_host=[], graph=True), batch)


def test_a_captured_step_chooses_no_backend(
    varlen: Callable[..., Varlen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "choose", lambda *_: pytest.fail("chosen"))
    batch = make(Case(rows=((1, 30), (1, 1))), torch.bfloat16)
    meta = dataclasses.replace(batch.meta, query_start_host=[], seq_lens_host=[], graph=True)
    close(route.attend(batch.q, batch.cache, meta, batch.scale, **batch.options), batch)
    assert meta.parts is None, "nothing is kept from one pass to the next"


def test_what_a_step_needs_is_made_once_for_all_layers(
    varlen: Callable[..., Varlen], monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen()
    batch = make(STEPS[0], torch.bfloat16)
    first = route.attend(batch.q, batch.cache, batch.meta, batch.scale)
    monkeypatch.setattr(torch, "cumsum", lambda *_, **__: pytest.fail("made again"))
    assert torch.equal(route.attend(batch.q, batch.cache, batch.meta, batch.scale), first)
    fresh = dataclasses.replace(batch.meta)
    assert fresh.parts is None


@pytest.mark.parametrize("case", [STEPS[0], STEPS[2]], ids=str)
def test_a_step_reads_nothing_of_the_device(varlen: Callable[..., Varlen], case: Case) -> None:
    """Tensors without data: whatever reads one fails."""
    varlen()
    batch = make(case, torch.bfloat16)
    assert route.choose(layer_of(batch), CPU).name == "varlen"
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        meta = dataclasses.replace(batch.meta)
        for name in ("query_start", "seq_lens", "block_tables", "slot_mapping"):
            setattr(meta, name, mode.from_tensor(getattr(meta, name)))
        q, k, v = (mode.from_tensor(x) for x in (batch.q, *batch.cache))
        assert route.attend(q, (k, v), meta, batch.scale).shape == batch.q.shape
