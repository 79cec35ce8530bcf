"""Writes what transformers' beam search finds, in float32, with the packaged SmolLM2.

Run as ``python -m tests.parity.make_golden_beams``, or with the places of prompts to do anew. For every
prompt, width, set of ending tokens and mode: the hypotheses' tokens and scores, best first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.parity.make_golden import FOLDER, load_oracle
from tests.parity.prompts import NUM_TOKENS, PROMPTS

PATH = FOLDER / "golden_beams_smollm2.json"
PLACES = (1, 2, 5, 7, 15, 16, 20, 23)
"""Which of the prompts."""
WIDTHS = (4, 2)
ENDS = ("\n", ".", ",")
PLAIN: list[dict[str, Any]] = [{"early_stopping": False, "length_penalty": 1.0}]
ENDING: list[dict[str, Any]] = [
    {"early_stopping": True, "length_penalty": 1.0},
    {"early_stopping": False, "length_penalty": 1.0},
    {"early_stopping": False, "length_penalty": -0.5},
    {"early_stopping": False, "length_penalty": 2.0},
    {"early_stopping": "never", "length_penalty": 1.0},
    {"early_stopping": "never", "length_penalty": 0.0},
]
EDITED: list[dict[str, Any]] = [
    {"early_stopping": "never", "length_penalty": 0.5, "min_tokens": 12},
    {"early_stopping": False, "length_penalty": 1.0, "repetition_penalty": 1.3},
]
"""For the first prompt alone: other log-probabilities lead to other beams, and these take long."""

Found = list[tuple[list[int], float]]


class Remembered:
    """Answers of a model's forward pass by tokens: what beams are looked at depends little on the mode."""

    def __init__(self, model: Any, forward: Any) -> None:
        self._config = model.config
        self._forward = forward
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._caches: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        rows = [tuple(row) for row in input_ids.tolist()]
        missing = [row for row in dict.fromkeys(rows) if row not in self._known]
        if missing:
            self._compute(missing)
        return CausalLMOutputWithPast(logits=torch.stack([self._known[row] for row in rows]).unsqueeze(1))

    def _compute(self, rows: list[tuple[int, ...]]) -> None:
        cache = DynamicCache(config=self._config)
        known = [self._caches.get(row[:-1]) for row in rows]
        start = 0
        if all(known):
            start = len(rows[0]) - 1
            for layer, pairs in enumerate(zip(*known, strict=True)):
                cache.update(*(torch.cat(each) for each in zip(*pairs, strict=True)), layer)
        tokens = torch.tensor([row[start:] for row in rows])
        logits = self._forward(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if any(len(row) < len(rows[0]) - 1 for row in self._caches):
            self._caches = {row: kv for row, kv in self._caches.items() if len(row) == len(rows[0]) - 1}
        for at, row in enumerate(rows):
            self._known[row] = logits[at, -1]
            self._caches[row] = [
                (layer.keys[at : at + 1], layer.values[at : at + 1]) for layer in cache.layers
            ]


@torch.inference_mode()
def search(
    model: Any, ids: list[int], width: int, ends: list[int], mode: dict[str, Any], **options: Any
) -> Found:
    """Output tokens and score of ``width`` hypotheses, best first."""
    options.update(mode)
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=options.pop("min_tokens", None),
        eos_token_id=ends,
        # Not a token, so that what follows a hypothesis shorter than the longest is not taken for one.
        pad_token_id=-1,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    outputs = [row[len(ids) :] for row in found.sequences.tolist()]
    cut = [output[: output.index(-1)] if -1 in output else output for output in outputs]
    return list(zip(cut, found.sequences_scores.tolist(), strict=True))


def ending_ids(tokenizer: Any, texts: tuple[str, ...]) -> list[int]:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(len(each) == 1 for each in ids)
    return [each[0] for each in ids]


def cases(place: int) -> Iterator[tuple[int, tuple[str, ...], dict[str, Any]]]:
    """Width, texts whose tokens end an output besides the end-of-sequence token, and mode.

    Where nothing ends before the last token, the mode hardly matters.
    """
    for width in WIDTHS:
        for mode in PLAIN:
            yield width, (), mode
        for mode in ENDING + (EDITED if place == PLACES[0] else []):
            yield width, ENDS, mode


def main() -> None:
    model, tokenizer = load_oracle("smollm2")
    forward = model.forward
    stored = json.loads(PATH.read_text()) if PATH.exists() else []
    for place in map(int, sys.argv[1:] or PLACES):
        model.forward = Remembered(model, forward)
        ids = tokenizer.encode(PROMPTS[place])
        stored = [entry for entry in stored if entry["place"] != place]
        for width, texts, mode in cases(place):
            ends = ending_ids(tokenizer, texts)
            found = search(model, ids, width, [tokenizer.eos_token_id, *ends], mode, use_cache=False)
            rounded = [(tokens, round(score, 6)) for tokens, score in found]
            stored.append(
                {"place": place, "ids": ids, "width": width, "ends": ends, "mode": mode, "found": rounded}
            )
        stored.sort(key=lambda entry: PLACES.index(entry["place"]))
        PATH.write_text(json.dumps(stored, separators=(",", ":")) + "\n")
        print(PROMPTS[place][:40].encode(), flush=True)


if __name__ == "__main__":
    main()
