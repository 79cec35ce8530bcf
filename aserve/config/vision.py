"""What images look like to a vision-language model."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aserve.config.model import ModelConfig
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from aserve.args import EngineArgs


@dataclass(frozen=True)
class VisionLanguageConfig:
    """Image inputs: their kind, the token id that stands for one, their largest shape, tokens per image."""

    class ImageInputType(enum.Enum):
        """What is passed for an image."""

        PIXEL_VALUES = "pixel_values"
        IMAGE_FEATURES = "image_features"

    image_input_type: ImageInputType
    image_token_id: int
    image_input_shape: tuple[int, ...]
    image_feature_size: int


IMAGE_INPUT_TYPES = tuple(kind.value for kind in VisionLanguageConfig.ImageInputType)

_NEEDED = ("image_token_id", "image_input_shape", "image_feature_size")


def resolve_vision_config(args: EngineArgs, model: ModelConfig) -> VisionLanguageConfig | None:
    """None unless an image input type is given."""
    if args.image_input_type is None:
        if getattr(model.hf_config, "vision_config", None) is not None:
            raise ConfigError(
                f"{model.architecture} takes images: give image_input_type, " + ", ".join(_NEEDED),
                param="image_input_type",
            )
        return None
    kind = args.image_input_type.lower()
    if kind not in IMAGE_INPUT_TYPES:
        raise ConfigError(
            f"image_input_type must be one of {', '.join(IMAGE_INPUT_TYPES)}, got {args.image_input_type!r}",
            param="image_input_type",
        )
    token_id, shape, size = args.image_token_id, args.image_input_shape, args.image_feature_size
    if not (token_id and shape and size):
        missing = [name for name in _NEEDED if not getattr(args, name)]
        raise ConfigError(f"image_input_type needs {' and '.join(missing)} as well", param=missing[0])
    return VisionLanguageConfig(VisionLanguageConfig.ImageInputType(kind), token_id, _shape(shape), size)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(
            f"image_input_shape must be sizes between commas such as 1,3,336,336, got {text!r}",
            param="image_input_shape",
        )
    return shape
