"""Models made on the spot: shapes with random weights, and a small one for transformers to agree with."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aserve.bench.checkpoints import LLAMA_1B
from aserve.model.loader.base import Loader, Weights

if TYPE_CHECKING:
    from aserve.config.model import ModelConfig

ON_DEVICE = "random-on-device"
"""Load format of weights that are drawn where the model runs; see :func:`register`."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {**LLAMA_1B, "vocab_size": 128256, "max_position_embeddings": 16384},
    "llama-8b": {
        **LLAMA_1B,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
    },
    "dry": {
        **LLAMA_1B,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 40000,  # the token ids of the fixed work end here
        "max_position_embeddings": 512,
    },
}


class RandomOnDevice(Loader):
    """Normal numbers of the usual spread, drawn on the GPU if there is one: billions take a second there."""

    format = ON_DEVICE

    def weights(self, model_config: ModelConfig, expected: Mapping[str, torch.Size]) -> Weights:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, model_config.dtype)
        random = torch.Generator(device).manual_seed(0)
        for name, shape in expected.items():
            made = torch.empty(shape, dtype=dtype, device=device)
            if name.endswith("norm.weight"):
                yield name, made.fill_(1.0)
            else:
                yield name, made.normal_(0.0, 0.02, generator=random)


def register() -> None:
    from aserve import registry

    registry.loaders.register(ON_DEVICE, f"{__name__}:{RandomOnDevice.__name__}")


def write_shape(folder: Path, name: str) -> Path:
    """A configuration without weights, and a tokenizer with a word for every token id."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    write_tokenizer(folder, shape["vocab_size"])
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *string.ascii_lowercase]
    vocab = {word: at for at, word in enumerate([*words, *(f"w{at}" for at in range(len(words), size))])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def parameters(shape: Mapping[str, Any]) -> tuple[int, int]:
    """Weights that a token's step reads, and of these those in matrices; both without the input embedding."""
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    q, kv = shape["num_attention_heads"] * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * middle
    matrices = shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"]
    norms = (2 * shape["num_hidden_layers"] + 1) * hidden
    return matrices + norms, matrices


def kv_bytes(shape: Mapping[str, Any]) -> int:
    """Of one token's keys and values in 16 bits."""
    return int(4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"])


def write_small(folder: Path, dtype: str, seed: int) -> Path:
    """A small checkpoint whose likeliest tokens are likeliest by far, and hang on every earlier token.

    Wide weights in the layers would turn the rounding of 16-bit types into other tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
