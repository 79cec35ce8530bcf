"""Norms, gated activations and the likeliest token: operations on rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from aserve.gpu_check.problems.base import (
    Buffers,
    Check,
    Cost,
    Operation,
    Peer,
    Problem,
    Want,
    dtype_of,
    poisoned,
    random_in,
    rounded,
)

EPS = 1e-5
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")


@dataclass(frozen=True)
class Rows:
    """rows of ``heads`` times ``size``. apart: with other features between; wide: with weights in float32."""

    rows: int
    size: int
    heads: int = 1
    apart: bool = False
    wide: bool = False
    activation: str | None = None

    def __str__(self) -> str:
        extras = [name for name in ("apart", "wide") if getattr(self, name)] + [self.activation or ""]
        heads = f"x{self.heads}" if self.heads > 1 else ""
        return " ".join([f"{self.rows}{heads}x{self.size}", *(each for each in extras if each)])


def _view(shape: Rows, width: int, x: torch.Tensor) -> torch.Tensor:
    """The rows of a buffer ``[rows, heads + 2, width + 8]`` or ``[rows, heads, width]``."""
    taken = x[:, 1 : 1 + shape.heads, :width] if shape.apart else x
    return taken.squeeze(1) if shape.heads == 1 else taken


def _make_rows(shape: Rows, width: int, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    # Rows apart stay aligned to 16 bytes, as those of a merged projection are.
    each = (shape.heads + 2, width + 8) if shape.apart else (shape.heads, width)
    return random_in((shape.rows, *each), dtype, random)


def _out_shape(shape: Rows) -> tuple[int, ...]:
    return (shape.rows, shape.size) if shape.heads == 1 else (shape.rows, shape.heads, shape.size)


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def make_norm(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape, dtype = check.shape, dtype_of(check.dtype)
    random = torch.Generator(device).manual_seed(seed)
    buffers = {
        "x": _make_rows(shape, shape.size, dtype, random),
        "weight": random_in((shape.size,), torch.float32 if shape.wide else dtype, random),
        "out": poisoned(_out_shape(shape), dtype, device),
    }

    def library(b: Buffers) -> Peer:
        x, weight = _view(shape, shape.size, b["x"]), b["weight"].to(dtype)
        return lambda: F.rms_norm(x, (shape.size,), weight, EPS)

    return Problem(
        buffers,
        ("out",),
        lambda b: (_view(shape, shape.size, b["x"]), b["weight"], EPS, b["out"]),
        lambda: {"out": rounded(_normed(_view(shape, shape.size, buffers["x"]), buffers["weight"]), dtype)},
        {"torch rms_norm": library},
    )


def make_add_norm(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape, dtype = check.shape, dtype_of(check.dtype)
    random = torch.Generator(device).manual_seed(seed)
    buffers = {
        "x": _make_rows(shape, shape.size, dtype, random),
        "residual": random_in(_out_shape(shape), dtype, random),
        "weight": random_in((shape.size,), dtype, random),
        "out": poisoned(_out_shape(shape), dtype, device),
        "total": poisoned(_out_shape(shape), dtype, device),
    }

    def expected() -> dict[str, Want]:
        total = _view(shape, shape.size, buffers["x"]) + buffers["residual"]
        return {"total": Want(total), "out": rounded(_normed(total, buffers["weight"]), dtype)}

    def library(b: Buffers) -> Peer:
        x = _view(shape, shape.size, b["x"])
        return lambda: F.rms_norm(x + b["residual"], (shape.size,), b["weight"], EPS)

    return Problem(
        buffers,
        ("out", "total"),
        lambda b: (
            *(_view(shape, shape.size, b["x"]), b["residual"], b["weight"], EPS),
            *(b["out"], b["total"]),
        ),
        expected,
        {"torch add, rms_norm": library},
    )


def make_gated(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape, dtype = check.shape, dtype_of(check.dtype)
    random = torch.Generator(device).manual_seed(seed)
    x = _make_rows(shape, 2 * shape.size, dtype, random)
    x *= 4
    x[0, 0, 0], x[-1, -1, 0] = -200.0, 200.0
    buffers = {"x": x, "out": poisoned(_out_shape(shape), dtype, device)}
    form = "none" if shape.activation == "gelu_erf" else "tanh"

    def activate(gate: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) if shape.activation == "silu" else F.gelu(gate, approximate=form)

    def expected() -> dict[str, Want]:
        gate, up = _view(shape, 2 * shape.size, buffers["x"]).double().chunk(2, -1)
        # 1 + erf and 1 + tanh of a negative gate lose digits: what is left is off by rounding of the 1.
        lost = 0.0 if shape.activation == "silu" else 2.5e-7
        return {"out": rounded(activate(gate) * up, dtype, 1e-6 + lost * (gate * up).abs())}

    def library(b: Buffers) -> Peer:
        gate, up = _view(shape, 2 * shape.size, b["x"]).chunk(2, -1)
        return lambda: activate(gate) * up

    return Problem(
        buffers,
        ("out",),
        lambda b: (
            _view(shape, 2 * shape.size, b["x"]),
            ACTIVATIONS.index(shape.activation or ""),
            b["out"],
        ),
        expected,
        {"torch": library},
    )


def make_greedy(check: Check, seed: int, device: str, changed: bool) -> Problem:
    shape, dtype = check.shape, dtype_of(check.dtype)
    random = torch.Generator(device).manual_seed(seed)
    logits = _make_rows(shape, shape.size, dtype, random)
    logits *= 3
    if shape.rows > 2:
        logits[1] = 2.0  # all alike: the first one counts
        logits[2, ..., : shape.size // 2] = -math.inf
    buffers = {
        "logits": logits,
        "token": poisoned((shape.rows,), torch.int64, device),
        "logprob": poisoned((shape.rows,), torch.float32, device),
    }

    def expected() -> dict[str, Want]:
        wide = _view(shape, shape.size, buffers["logits"]).double()
        # argmax may give any of equal ones.
        token = (wide == wide.amax(-1, keepdim=True)).int().argmax(-1)
        logprob = wide.log_softmax(-1).gather(1, token[:, None])[:, 0]
        return {"token": Want(token), "logprob": Want(logprob, 5e-6, 5e-6)}

    def library(b: Buffers) -> Peer:
        logits = _view(shape, shape.size, b["logits"])
        return lambda: logits.float().log_softmax(-1).max(-1)

    return Problem(
        buffers,
        ("token", "logprob"),
        lambda b: (_view(shape, shape.size, b["logits"]), b["token"], b["logprob"]),
        expected,
        {"torch log_softmax, max": library},
    )


def _bytes(check: Check, per_row: int) -> Cost:
    shape = check.shape
    return Cost(shape.rows * shape.heads * shape.size * per_row * dtype_of(check.dtype).itemsize)


RMS_NORM = Operation(make_norm, lambda check: _bytes(check, 2))
FUSED_ADD_RMS_NORM = Operation(make_add_norm, lambda check: _bytes(check, 4))
GATED = Operation(make_gated, lambda check: _bytes(check, 3))
GREEDY_LOGPROB = Operation(make_greedy, lambda check: _bytes(check, 1))
