"""The model: where it is, what it is, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from aserve import packaged
from aserve.config.device import DeviceConfig
from aserve.config.dtype import dtype_name, resolve_dtype
from aserve.config.hf import (
    is_gguf,
    quantization_dict,
    read_hf_config,
    resolve_architecture,
    sliding_window,
    text_config,
    uniform_window,
)
from aserve.config.lengths import apply_rope_scaling, resolve_max_model_len
from aserve.config.quantization import check_quantization, resolve_quantization
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from aserve.args import EngineArgs

TOKENIZER_MODES = ("auto", "slow")


@dataclass(frozen=True)
class ModelConfig:
    """The model.

    ``model`` and ``tokenizer`` are a local path or a hub id, never a packaged name. ``dtype`` is
    "float32", "bfloat16" or "float16". ``max_model_len`` is in tokens, prompt and output together.
    ``rope_scaling`` is what the user put in place of the model's own; ``hf_config`` has it applied.
    """

    model: str
    served_model_name: list[str]
    tokenizer: str
    tokenizer_mode: str
    skip_tokenizer_init: bool
    trust_remote_code: bool
    revision: str | None
    code_revision: str | None
    tokenizer_revision: str | None
    dtype: str
    seed: int
    max_model_len: int
    quantization: str | None
    rope_scaling: dict[str, Any] | None
    hf_config: PretrainedConfig
    max_logprobs: int
    enforce_eager: bool
    max_seq_len_to_capture: int

    @property
    def text_config(self) -> Any:
        """The part of ``hf_config`` that describes the language model."""
        return text_config(self.hf_config)

    @property
    def architecture(self) -> str:
        """A name in ``registry.models``."""
        return resolve_architecture(self.hf_config)

    @property
    def num_layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        return int(self.text_config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.text_config, "num_key_value_heads", None) or self.num_attention_heads)

    @property
    def head_size(self) -> int:
        own = getattr(self.text_config, "head_dim", None)
        return int(own or self.hidden_size // self.num_attention_heads)

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

    @property
    def output_size(self) -> int:
        """Width of the final hidden states."""
        return int(getattr(self.text_config, "word_embed_proj_dim", None) or self.hidden_size)

    @cached_property
    def vocab_size(self) -> int:
        return int(self.text_config.vocab_size)

    @property
    def sliding_window(self) -> int | None:
        """Window in tokens of the layers that have one, None when none has."""
        return sliding_window(self.text_config)

    @property
    def uniform_window(self) -> int | None:
        """The same if all layers have it: what is outside of it then needs no KV cache."""
        return uniform_window(self.text_config)


def resolve_model_path(model: str) -> str:
    """``model``, or the file that it stands for if it is the name of a packaged model."""
    return packaged.resolve(model) or model


def resolve_model_config(args: EngineArgs, model_path: str, device: DeviceConfig) -> ModelConfig:
    """Reads and checks the model's config. ``model_path`` comes from :func:`resolve_model_path`."""
    _check_plain_arguments(args)
    hf_config = read_hf_config(
        model_path,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
        code_revision=args.code_revision,
        download_dir=args.download_dir,
    )
    resolve_architecture(hf_config)
    text = text_config(hf_config)
    if args.rope_scaling is not None:
        apply_rope_scaling(text, args.rope_scaling)
    max_model_len = resolve_max_model_len(args.max_model_len, text)
    stored = dtype_name(getattr(hf_config, "dtype", None) or getattr(text, "dtype", None))
    dtype = resolve_dtype(args.dtype, stored, device)
    quantization = _resolve_quantization(args, model_path, hf_config, device)
    check_quantization(quantization, dtype, device)
    return ModelConfig(
        model=model_path,
        served_model_name=_served_names(args),
        tokenizer=resolve_model_path(args.tokenizer or args.model),
        tokenizer_mode=args.tokenizer_mode.lower(),
        skip_tokenizer_init=args.skip_tokenizer_init,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
        code_revision=args.code_revision,
        tokenizer_revision=args.tokenizer_revision or args.revision,
        dtype=dtype,
        seed=args.seed,
        max_model_len=max_model_len,
        quantization=quantization,
        rope_scaling=args.rope_scaling,
        hf_config=hf_config,
        max_logprobs=args.max_logprobs,
        enforce_eager=args.enforce_eager,
        max_seq_len_to_capture=min(args.max_seq_len_to_capture, max_model_len),
    )


def _check_plain_arguments(args: EngineArgs) -> None:
    if not args.model:
        raise ConfigError("model must not be empty", param="model")
    if args.tokenizer_mode.lower() not in TOKENIZER_MODES:
        raise ConfigError(
            f"tokenizer_mode must be one of {', '.join(TOKENIZER_MODES)}, got {args.tokenizer_mode!r}",
            param="tokenizer_mode",
        )
    if not 0 <= args.seed < 1 << 63:
        raise ConfigError(f"seed must be in 0..2^63-1, got {args.seed}", param="seed")
    if args.max_logprobs < 0:
        raise ConfigError(f"max_logprobs must be 0 or more, got {args.max_logprobs}", param="max_logprobs")
    if args.max_context_len_to_capture is not None:
        raise ConfigError(
            "max_context_len_to_capture has been removed; use max_seq_len_to_capture",
            param="max_context_len_to_capture",
        )
    if args.max_seq_len_to_capture < 1:
        raise ConfigError(
            f"max_seq_len_to_capture must be at least 1, got {args.max_seq_len_to_capture}",
            param="max_seq_len_to_capture",
        )


def _served_names(args: EngineArgs) -> list[str]:
    names = args.served_model_name
    if isinstance(names, str):
        names = [names]
    names = list(names or [args.model])
    if not all(names):
        raise ConfigError("served_model_name must not be empty text", param="served_model_name")
    return names


def _resolve_quantization(
    args: EngineArgs, model_path: str, hf_config: PretrainedConfig, device: DeviceConfig
) -> str | None:
    if is_gguf(model_path):
        if args.quantization not in (None, "gguf"):
            raise ConfigError(
                f"quantization {args.quantization!r} does not go with a .gguf file, which says "
                "itself how it is quantised; leave quantization out",
                param="quantization",
            )
        # An explicit float32 asks for exact results: the weights are then decoded.
        exact = args.quantization is None and args.dtype.lower() in ("float", "float32")
        return None if exact else "gguf"
    if args.quantization == "gguf":
        raise ConfigError(
            f"quantization 'gguf' needs the path of a .gguf file as model, got {model_path}",
            param="quantization",
        )
    return resolve_quantization(args.quantization, quantization_dict(hf_config), model_path, device)
