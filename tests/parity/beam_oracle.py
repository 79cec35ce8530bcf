"""Beam search as transformers does it, on the packaged models."""

from __future__ import annotations

from typing import Any

import torch

Result = list[tuple[list[int], float]]


@torch.inference_mode()
def search(model: Any, ids: list[int], *, width: int, max_tokens: int, ends: list[int], **options: Any) -> Result:
    """Output tokens and score of ``width`` hypotheses, best first; options as ``generate`` takes them."""
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=max_tokens,
        eos_token_id=ends,
        # Not a token: what follows a hypothesis that is shorter than the longest must be told from it.
        pad_token_id=-1,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    results = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        output = row[len(ids) :]
        results.append((output[: output.index(-1)] if -1 in output else output, score))
    return results
