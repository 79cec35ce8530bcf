"""Which quantisation method reads a checkpoint, and what its GPU kernels can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aserve.config.device import DeviceConfig
from aserve.config.quantization import check_quantization, resolve_quantization
from aserve.errors import ConfigError, UnsupportedError
from tests.config.conftest import Resolve

CPU = DeviceConfig("cpu")
HOPPER = DeviceConfig("cuda", (9, 0))
TURING = DeviceConfig("cuda", (7, 5))

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
MARLIN = {**GPTQ, "is_marlin_format": True}
MARLIN_FORMAT = {**GPTQ, "checkpoint_format": "marlin"}
MARLIN_24 = {**GPTQ, "checkpoint_format": "marlin_24"}
AWQ = {"quant_method": "awq", "bits": 4}


@pytest.mark.parametrize(
    ("checkpoint", "none", "marlin", "gptq", "awq"),
    [
        (GPTQ, "gptq_marlin", "gptq_marlin", "gptq", None),
        (MARLIN, "marlin", "marlin", "marlin", None),
        (MARLIN_FORMAT, "marlin", "marlin", "marlin", None),
        (MARLIN_24, "gptq_marlin_24", None, "gptq_marlin_24", None),
        (AWQ, "awq", None, None, "awq"),
    ],
)
def test_method_of_a_checkpoint(
    checkpoint: dict[str, Any], none: str, marlin: str | None, gptq: str | None, awq: str | None
) -> None:
    """The columns are what the user asks for; None is an error."""
    for requested, expected in ((None, none), ("marlin", marlin), ("gptq", gptq), ("AWQ", awq)):
        if expected is None:
            with pytest.raises(ConfigError, match="leave quantization out"):
                resolve_quantization(requested, checkpoint, "/m", HOPPER)
        else:
            assert resolve_quantization(requested, checkpoint, "/m", HOPPER) == expected


@pytest.mark.parametrize("change", [{"bits": 3}, {"group_size": 100}, {"sym": False}, {"desc_act": ...}])
def test_gptq_that_marlin_cannot_read(change: dict[str, Any]) -> None:
    checkpoint = {key: value for key, value in {**GPTQ, **change}.items() if value is not ...}
    assert resolve_quantization(None, checkpoint, "/m", HOPPER) == "gptq"
    assert resolve_quantization(None, GPTQ, "/m", TURING) == "gptq"
    assert resolve_quantization(None, GPTQ, "/m", CPU) == "gptq"


def test_unknown_method_in_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match="quantised with 'bitsandbytes'; known:"):
        resolve_quantization(None, {"quant_method": "bitsandbytes"}, "/m", HOPPER)


def test_side_files(tmp_path: Path) -> None:
    assert resolve_quantization("fp8", None, str(tmp_path), HOPPER) == "fp8"
    with pytest.raises(
        ConfigError, match=r"expected one of quant_config\.json, quantize_config\.json .*none"
    ):
        resolve_quantization("awq", None, str(tmp_path), HOPPER)
    (tmp_path / "quant_config.json").write_text("{}")
    assert resolve_quantization("awq", None, str(tmp_path), HOPPER) == "awq"
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"found quant_config\.json, quantize_config\.json"):
        resolve_quantization("awq", None, str(tmp_path), HOPPER)
    assert resolve_quantization("gptq", None, str(tmp_path), HOPPER) == "gptq"


@pytest.mark.parametrize("section", ["quantization_config", "compression_config"])
def test_quantisation_section_is_found(section: str, resolve: Resolve) -> None:
    with pytest.raises(
        ConfigError, match="quantization is 'gptq' but the checkpoint is quantised with 'awq'"
    ):
        resolve(config={section: AWQ}, quantization="gptq")


def test_limits_of_gpu_kernels() -> None:
    for method in ("awq", "gptq", "squeezellm"):
        check_quantization(method, "float16", HOPPER)
        with pytest.raises(ConfigError, match="float16, not bfloat16; set dtype"):
            check_quantization(method, "bfloat16", HOPPER)
    check_quantization("gptq_marlin", "bfloat16", HOPPER)
    for method, capability in (("fp8", (8, 6)), ("gptq_marlin", (7, 5)), ("awq", (7, 0)), ("gptq", (5, 0))):
        with pytest.raises(UnsupportedError, match="compute capability"):
            check_quantization(method, "float16", DeviceConfig("cuda", capability))
    check_quantization("awq", "bfloat16", CPU)
    check_quantization(None, "float32", HOPPER)
