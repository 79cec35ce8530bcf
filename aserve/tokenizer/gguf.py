"""The tokenizer a GGUF file describes, as a Hugging Face tokenizer.

Converting a large vocabulary takes seconds (the merges of SentencePiece vocabularies are not in the file
and are derived), so the converted ``tokenizer.json`` is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aserve.errors import ConfigError
from aserve.gguf.reader import GGUFFile, open_gguf
from aserve.packaged import cache_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONVERTER_VERSION = 1  # part of the cache key: raise it when the conversion changes
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"  # how SentencePiece vocabularies spell a space

# Regular expressions that cut text before byte-level merges, by the family they were trained with. GPT-2's
# own is built into the ByteLevel pre-tokenizer.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = "gpt2", "digits"  # _DIGITS: every digit alone, then GPT-2's rule
_SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "command-r": _DIGITS,
    "refact": _DIGITS,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "falcon3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "deepseek-r1-qwen": _QWEN2,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "tekken": _TEKKEN,
}


def load_gguf_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Tokenizer with the file's special tokens, BOS/EOS rule and chat template.

    ConfigError: the file has no tokenizer, or one of a kind that is not supported.
    """
    from transformers import PreTrainedTokenizerFast

    file = open_gguf(path)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ConfigError(f"{path} holds no tokenizer; name one with --tokenizer")
    options: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "chat_template": file.metadata.get("tokenizer.chat_template"),
        "model_max_length": int(file.get("context_length", 10**30)),
        "padding_side": "left",
    }
    spelled: list[str] | None = None
    for option, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            spelled = spelled or tokens.to_list()
            options[f"{option}_token"] = spelled[index]
    # bos_token and eos_token have defaults in transformers, which would be added to the vocabulary.
    options.setdefault("bos_token", None)
    options.setdefault("eos_token", None)
    wrap: Callable[..., PreTrainedTokenizerBase] = PreTrainedTokenizerFast
    cached = _cache_file(file)
    if not cached.is_file():
        converted = convert(file)
        if not _store(converted, cached):
            return wrap(tokenizer_object=converted, **options)
    return wrap(tokenizer_file=str(cached), **options)


def _cache_file(file: GGUFFile) -> Path:
    status = os.stat(file.path)
    identity = f"{_CONVERTER_VERSION} {file.path} {status.st_size} {status.st_mtime_ns}"
    return cache_dir() / "tokenizers" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def _store(tokenizer: Tokenizer, target: Path) -> bool:
    """Writes aside and renames; False when the cache folder cannot be written, which costs only time."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(suffix=".json", dir=target.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(tokenizer.to_str())
        os.replace(aside, target)
    except OSError as error:
        logger.warning("The converted tokenizer cannot be kept in %s: %s", target.parent, error)
        return False
    return True


def convert(file: GGUFFile) -> Tokenizer:
    """The file's vocabulary, merges and rules as a ``tokenizers.Tokenizer``."""
    from tokenizers import AddedToken

    kind = file.metadata.get("tokenizer.ggml.model")
    tokens = file.metadata["tokenizer.ggml.tokens"].to_list()
    types = file.metadata.get("tokenizer.ggml.token_type")
    types = [] if types is None else types.tolist()
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, tokens)
    else:
        raise ConfigError(
            f"{file.path}: tokenizers of type {kind!r} are not supported in GGUF files (gpt2, llama are); "
            "name a Hugging Face one with --tokenizer"
        )
    known = tokenizer.get_vocab(with_added_tokens=False)
    added = [
        AddedToken(token, normalized=False, special=token_type == _CONTROL)
        for token, token_type in zip(tokens, types, strict=False)
        if token_type in (_CONTROL, _USER_DEFINED) and token in known
    ]
    tokenizer.add_tokens(added)
    _add_post_processor(file, tokenizer, tokens, default_bos=kind == "llama")
    return tokenizer


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.metadata.get("tokenizer.ggml.pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        raise ConfigError(
            f"{file.path}: byte-level tokenizers with pre-tokenizer {name!r} are not supported "
            f"(known: {', '.join(sorted(_SPLITS))}); name a Hugging Face one with --tokenizer"
        )
    merges = file.metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ConfigError(f"{file.path}: tokenizer.ggml.merges is missing")
    pairs = []
    for merge in merges.to_list():
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split is _LLAMA3))
    prefix_space = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", False))
    if split == _GPT2:
        cut: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)]
    elif split == _DIGITS:
        cut = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space),
        ]
    else:
        cut = [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    is_gemma = file.architecture.startswith("gemma")
    if is_gemma:  # runs of spaces are spelled as such in these files
        tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        order: list[float] = [float(-index) for index in range(len(tokens))]
    else:
        scores = file.metadata.get("tokenizer.ggml.scores")
        if scores is None:
            raise ConfigError(f"{file.path}: tokenizer.ggml.scores is missing")
        order = scores.tolist()
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            derive_merges(tokens, order),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", _SPACE)
    if file.metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    if is_gemma:  # no token of these vocabularies crosses a space after a letter: shorter pieces, same ids
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def derive_merges(tokens: list[str], order: list[float]) -> list[tuple[str, str]]:
    """Merges that make byte-pair encoding act as SentencePiece does with this vocabulary.

    SentencePiece joins the neighbours whose union has the highest ``order``; so every way to cut a token
    in two known ones becomes a merge of its rank.
    """
    known = set(tokens)
    found = []
    for token, rank in zip(tokens, order, strict=True):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                found.append((-rank, -cut, cut - len(token), left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def _add_post_processor(file: GGUFFile, tokenizer: Tokenizer, tokens: list[str], default_bos: bool) -> None:
    from tokenizers import processors

    template, special = ["$A"], []
    for flag, key, default, at in (
        ("add_bos_token", "bos_token_id", default_bos, 0),
        ("add_eos_token", "eos_token_id", False, 2),
    ):
        index = file.metadata.get(f"tokenizer.ggml.{key}")
        if file.metadata.get(f"tokenizer.ggml.{flag}", default) and index is not None:
            template.insert(at, tokens[index])
            special.append((tokens[index], index))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=special
        )
