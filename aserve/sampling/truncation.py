"""Top-k, top-p and min-p."""

from __future__ import annotations

import numpy as np
import torch

_CANDIDATES = 1024
"""Likeliest tokens looked at first; rows they do not settle are sorted whole."""

_NONE = float("-inf")


def truncate(scores: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray) -> None:
    """Sets the scores of dropped tokens to -inf, in place.

    scores: float32 ``[R, V]``, already divided by temperature. top_k: int64 ``[R]``, V for all;
    top_p, min_p: float64 ``[R]``. In this order: keep the k highest scores and their ties; of those the
    fewest likeliest whose mass reaches p (Holtzman et al. 2020), at least one; of those the ones at
    least ``min_p`` times as likely as the likeliest.
    """
    vocab = scores.shape[1]
    sorting = np.flatnonzero((top_k < vocab) | (top_p < 1.0))
    if sorting.size:
        asked = int(np.where(top_k < vocab, top_k, 0)[sorting].max())
        width = min(vocab, max(_CANDIDATES, 2 * asked))
        left = _keep_likeliest(scores, sorting, top_k, top_p, width)
        if left.size:
            _keep_likeliest(scores, left, top_k, top_p, vocab)
    if (min_p > 0.0).any():
        with np.errstate(divide="ignore"):
            ratio = torch.from_numpy(np.log(min_p)).to(scores)
        floor = scores.amax(-1) + ratio
        scores.masked_fill_(scores < floor.unsqueeze(1), _NONE)


def _keep_likeliest(
    scores: torch.Tensor, rows: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, width: int
) -> np.ndarray:
    """Top-k and top-p for ``rows``, looking at ``width`` tokens; returns the rows that need more."""
    vocab = scores.shape[1]
    index = torch.from_numpy(rows).to(scores.device)
    picked = scores[index]
    values, tokens = picked.topk(width, dim=-1)
    k = torch.from_numpy(np.minimum(top_k[rows], width)).to(scores.device)
    p = torch.from_numpy(top_p[rows]).to(scores.device)
    limited = torch.from_numpy(top_k[rows] < vocab).to(scores.device)
    lowest = values.gather(1, (k - 1).unsqueeze(1))
    lowest = torch.where(limited.unsqueeze(1), lowest, torch.full_like(lowest, _NONE))
    kept = values >= lowest
    inside = values.double().masked_fill(~kept, _NONE)
    everything = torch.where(limited, inside.logsumexp(-1), picked.double().logsumexp(-1))
    mass = (inside - everything.unsqueeze(1)).exp()
    total = mass.cumsum(-1)
    kept &= (total - mass) < p.unsqueeze(1)
    kept[:, 0] = True
    if width < vocab:
        # Unsettled: a tie with the k-th score may lie beyond the candidates, or their mass is below p.
        tied = limited & (lowest[:, 0] <= values[:, -1])
        settled = ~tied & ((p >= 1.0) | (total[:, -1] >= p)) & (limited | (p < 1.0))
    else:
        settled = torch.ones_like(limited)
    result = torch.full_like(picked, _NONE).scatter_(1, tokens, values.masked_fill(~kept, _NONE))
    scores[index[settled]] = result[settled]
    return rows[~settled.cpu().numpy()]
