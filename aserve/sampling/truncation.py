"""Top-k, top-p and min-p."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_CANDIDATES = 1024
"""Likeliest tokens looked at first; rows they do not settle are sorted whole."""

_ROUNDING = 1e-5
"""Bound of the relative error of a float32 softmax over a vocabulary."""

_NONE = float("-inf")

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def truncate(scores: torch.Tensor, top_k: Ints, top_p: Floats, min_p: Floats) -> None:
    """Sets the scores of dropped tokens to -inf, in place.

    scores: float32 ``[R, V]``, already divided by temperature, without NaN or +inf. top_k: ``[R]``, V
    for all; top_p, min_p: ``[R]``. In this order: keep the k highest scores and their ties; of those the
    fewest likeliest whose mass reaches p (Holtzman et al. 2020), at least one, lower ids first among
    equals; of those the ones at least ``min_p`` times as likely as the likeliest.
    """
    vocab = scores.shape[1]
    lowest = torch.full_like(scores[:, 0], _NONE)
    spare: list[tuple[int, float, int]] = []
    rows = np.flatnonzero((top_k < vocab) | (top_p < 1.0))
    if rows.size:
        asked = int(np.where(top_k < vocab, top_k, 0)[rows].max())
        for width in (min(vocab, max(_CANDIDATES, 2 * asked)), vocab):
            rows = _find_lowest(scores, rows, top_k, top_p, width, lowest, spare)
            if not rows.size:
                break
    if (min_p > 0.0).any():
        with np.errstate(divide="ignore"):
            ratio = torch.from_numpy(np.log(min_p)).to(scores)
        lowest = torch.maximum(lowest, scores.amax(-1) + ratio)
    for row, value, kept in spare:
        scores[row, torch.nonzero(scores[row] == value).flatten()[kept:]] = _NONE
    scores.masked_fill_(scores < lowest.unsqueeze(1), _NONE)


def _find_lowest(
    scores: torch.Tensor,
    rows: Ints,
    top_k: Ints,
    top_p: Floats,
    width: int,
    lowest: torch.Tensor,
    spare: list[tuple[int, float, int]],
) -> Ints:
    """Writes the lowest score that top-k and top-p keep into ``lowest[rows]``.

    Looks at the ``width`` highest scores; returns the rows that need more. ``spare`` gets (row, score,
    how many to keep) where not all tokens with the lowest score are kept.
    """
    vocab = scores.shape[1]
    index = torch.from_numpy(rows).to(scores.device)
    part = scores if len(rows) == scores.shape[0] else scores[index]
    values = _highest(part, width)
    k = torch.from_numpy(np.minimum(top_k[rows], width)).to(scores.device).unsqueeze(1)
    p = torch.from_numpy(top_p[rows]).to(scores.device).unsqueeze(1)
    limited = torch.from_numpy(top_k[rows] < vocab).to(scores.device).unsqueeze(1)
    least = torch.where(limited, values.gather(1, k - 1), _NONE)
    cut = p < 1.0
    settled = ~cut | (width == vocab)
    if bool(cut.any()):
        # Masses relative to the likeliest token's, added up in float64.
        mass = (values.double() - values[:, :1]).masked_fill_(values < least, _NONE).exp_()
        total = mass.cumsum(-1)
        everything = total[:, -1:]
        if width < vocab:
            whole = 1.0 / part.softmax(-1).amax(-1, keepdim=True).double()
            everything = torch.where(limited, everything, whole)
        before = total - mass
        count = (before < p * everything).sum(-1, keepdim=True).clamp_(min=1)
        last = values.gather(1, count - 1)
        # Unsettled: the cut may lie beyond the candidates, or tokens tied with the k-th may.
        settled |= (last > values[:, -1:]) & (~limited | (least > values[:, -1:]))
        if width < vocab:
            # ... or so close to a token's edge that the rounding of `whole` decides.
            fewest = (before < p * everything * (1 - _ROUNDING)).sum(-1, keepdim=True)
            most = (before < p * everything * (1 + _ROUNDING)).sum(-1, keepdim=True)
            settled &= ~cut | limited | (fewest == most)
        equal = (values == last).sum(-1, keepdim=True)
        kept = count - (values > last).sum(-1, keepdim=True)
        shared = torch.nonzero((cut & settled & (equal > kept))[:, 0]).flatten().tolist()
        spare.extend((int(rows[at]), float(last[at]), int(kept[at])) for at in shared)
        least = torch.where(cut, last, least)
    done = settled[:, 0]
    lowest[index[done]] = least[done, 0]
    left: Ints = rows[~done.cpu().numpy()]
    return left


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` highest of each row, descending."""
    if scores.device.type != "cpu":
        return scores.topk(count, dim=-1).values
    # NumPy selects and sorts floats with vector instructions, many times faster than torch does.
    found = scores.numpy()
    if count < found.shape[1]:
        found = np.partition(found, found.shape[1] - count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(found, axis=-1)[:, ::-1].copy())
