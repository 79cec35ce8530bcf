"""Drives a model through a paged cache the way the worker does: block tables, slots, metadata."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch

from aserve.attention.base import AttentionMetadata, KVCache
from aserve.config.load import LoadConfig
from aserve.config.model import ModelConfig
from aserve.model.base import Model
from aserve.model.loader import load_model


def load(path: str | Path, hf_config: Any, max_model_len: int, **settings: Any) -> Model:
    """Loads ``path`` on the CPU. Settings: load_format, extra_config, dtype (float32), quantization,
    rope_scaling."""
    model_config = ModelConfig(
        model=str(path),
        served_model_name=["tiny"],
        tokenizer=str(path),
        tokenizer_mode="auto",
        skip_tokenizer_init=True,
        trust_remote_code=False,
        revision=None,
        code_revision=None,
        tokenizer_revision=None,
        dtype=settings.pop("dtype", "float32"),
        seed=0,
        max_model_len=max_model_len,
        quantization=settings.pop("quantization", None),
        rope_scaling=settings.pop("rope_scaling", None),
        hf_config=hf_config,
        max_logprobs=5,
        enforce_eager=True,
        max_seq_len_to_capture=max_model_len,
    )
    load_config = LoadConfig(
        load_format=settings.pop("load_format", "auto"),
        download_dir=None,
        extra_config=settings.pop("extra_config", {}),
    )
    if settings:
        raise TypeError(f"unknown settings {sorted(settings)}")
    return load_model(model_config, load_config, torch.device("cpu"))


class PagedRunner:
    """Sequences of one model over a shared pool whose blocks are handed out in a shuffled order."""

    def __init__(self, model: Model, block_size: int, num_blocks: int = 64) -> None:
        self.model = model
        self.block_size = block_size
        self.caches: list[KVCache] = [
            (
                torch.full((num_blocks, heads, block_size, size), 7.0),
                torch.full((num_blocks, heads, block_size, size), 7.0),
            )
            for heads, size in model.kv_shapes
        ]
        self._free = list(range(num_blocks))
        random.Random(0).shuffle(self._free)
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def step(self, rows: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Feeds each row's new tokens; returns each row's logits ``[tokens, vocabulary]``.

        Rows of one token must come last, as the scheduler orders them.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for sequence, tokens in rows:
            table = self._tables.setdefault(sequence, [])
            done = self._lengths.get(sequence, 0)
            for position, token in enumerate(tokens, start=done):
                if position // self.block_size == len(table):
                    table.append(self._free.pop())
                token_ids.append(token)
                positions.append(position)
                block, offset = divmod(position, self.block_size)
                slots.append(table[block] * self.block_size + offset)
            self._lengths[sequence] = done + len(tokens)
            starts.append(len(token_ids))
        hidden = self._forward(token_ids, positions, slots, starts, [sequence for sequence, _ in rows])
        logits = self.model.compute_logits(hidden)
        return [logits[start:end] for start, end in itertools.pairwise(starts)]

    def _forward(
        self,
        token_ids: list[int],
        positions: list[int],
        slots: list[int],
        starts: list[int],
        sequences: list[int],
    ) -> torch.Tensor:
        lengths = [self._lengths[sequence] for sequence in sequences]
        tables = [self._tables[sequence] for sequence in sequences]
        width = max(map(len, tables))
        counts = [end - start for start, end in itertools.pairwise(starts)]
        num_decode = next((i for i, count in enumerate(reversed(counts)) if count > 1), len(counts))
        meta = AttentionMetadata(
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.tensor(
                [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            num_decode_rows=num_decode,
            query_start_host=starts,
            seq_lens_host=lengths,
        )
        with torch.inference_mode():
            return self.model.forward(torch.tensor(token_ids), torch.tensor(positions), self.caches, meta)


def whole_logits(model: Model, tokens: list[int], block_size: int = 16) -> torch.Tensor:
    """Logits of every position, all tokens in one step."""
    return PagedRunner(model, block_size).step([(0, tokens)])[0]


def stepwise_logits(
    model: Model, tokens: list[int], prompt: int, block_size: int, chunk: int | None = None
) -> torch.Tensor:
    """The same with ``prompt`` tokens first (in chunks of ``chunk``), then one token a step."""
    runner = PagedRunner(model, block_size)
    chunk = chunk or prompt
    pieces = [tokens[start : min(start + chunk, prompt)] for start in range(0, prompt, chunk)]
    pieces += [[token] for token in tokens[prompt:]]
    return torch.cat([runner.step([(0, piece)])[0] for piece in pieces])
