"""Tokenizers by path, and the end-of-sequence ids that go with a model."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any

from aserve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MODES = ("auto", "slow")


def load_tokenizer(
    path: str,
    mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    *,
    download_dir: str | None = None,
) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder, a hub id, or a ``.gguf`` file (from its metadata).

    mode: "auto" takes the fast tokenizer where there is one; "slow" asks for the Python one. A warning
    says when what was found is not what was asked for. ConfigError: unknown mode, nothing to load, or code
    of the repository's own without ``trust_remote_code``.
    """
    mode = mode.lower()
    if mode not in MODES:
        raise ConfigError(f"tokenizer mode {mode!r} is not one of {', '.join(MODES)}", param="tokenizer_mode")
    if path.lower().endswith(".gguf"):
        from aserve.tokenizer.gguf import load_gguf_tokenizer

        tokenizer = load_gguf_tokenizer(path)
    else:
        tokenizer = _from_hugging_face(
            path,
            use_fast=mode != "slow",
            trust_remote_code=trust_remote_code,
            revision=revision,
            cache_dir=download_dir,
        )
    if mode == "slow" and tokenizer.is_fast:
        logger.warning("There is no slow (Python) tokenizer for %s; using the fast one.", path)
    elif mode == "auto" and not tokenizer.is_fast:
        logger.warning("The tokenizer of %s is a slow (Python) one; expect slower requests.", path)
    return tokenizer


def _from_hugging_face(path: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # repositories fail in many ways; all of them are a setting that cannot work
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the tokenizer of {path} needs code from its repository; "
                "start with --trust-remote-code to run it",
                param="trust_remote_code",
            ) from error
        raise ConfigError(f"no tokenizer could be loaded from {path}: {error}", param="tokenizer") from error
    return tokenizer


def load_generation_eos(
    path: str, revision: str | None = None, *, download_dir: str | None = None
) -> set[int]:
    """Every EOS id that the model's ``generation_config.json`` (or GGUF metadata) lists; may be empty.

    ConfigError: the file is there and is not JSON with an ``eos_token_id`` of ints.
    """
    if path.lower().endswith(".gguf"):
        from aserve.gguf.reader import open_gguf

        metadata = open_gguf(path).metadata
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        return {metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata}
    file = _generation_config_file(path, revision, download_dir)
    if file is None:
        return set()
    try:
        with open(file, encoding="utf-8") as source:
            listed = json.load(source).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is not a generation configuration: {error}") from error
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(token) is int for token in ids):
        raise ConfigError(f"{file}: eos_token_id must be an int or a list of ints, got {listed!r}")
    return set(ids)


def _generation_config_file(path: str, revision: str | None, download_dir: str | None) -> str | None:
    if os.path.isdir(path):
        file = os.path.join(path, "generation_config.json")
        return file if os.path.isfile(file) else None
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(
        path,
        "generation_config.json",
        revision=revision,
        cache_dir=download_dir,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found
