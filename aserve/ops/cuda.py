"""The CUDA library: loading it, and the choice between its kernels and torch.

``ASERVE_CUDA_KERNELS`` says which kernels may be used: ``verified`` (default), those proved on this
architecture by committed results (see :mod:`aserve.ops.hardware`); ``all``, also the unverified ones, for
checking and timing them; ``off``. Whatever is not used runs in torch.
"""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aserve.errors import ConfigError
from aserve.ops import hardware

LIBRARY = Path(__file__).resolve().parent.parent / "_lib" / "libaserve_cuda.so"
VARIABLE = "ASERVE_CUDA_KERNELS"
CHOICES = ("verified", "all", "off")

logger = logging.getLogger(__name__)


def choice() -> str:
    """The variable's value. ConfigError: none of the three."""
    wanted = os.environ.get(VARIABLE, "verified")
    if wanted not in CHOICES:
        raise ConfigError(f"{VARIABLE} must be verified, all or off, is {wanted!r}")
    return wanted


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("80", "90a") runs on such a device: the same major version, and a
    minor one no newer; the code of an "a" architecture on its own version only."""
    major, minor = capability
    for name in architectures:
        number = int(name.rstrip("af"))
        exact = name != str(number)
        if number == 10 * major + minor or (not exact and number // 10 == major and number % 10 < minor):
            return True
    return False


@cache
def _loaded() -> dict[str, Any] | None:
    """The library's entry of build.json once it is loaded, or None where there is none to load."""
    record = LIBRARY.with_name("build.json")
    if not LIBRARY.exists() or not record.exists():
        return None
    entry = json.loads(record.read_text()).get("cuda")
    if entry is None:
        return None
    ops: Any = torch.ops
    try:
        ops.load_library(str(LIBRARY))
    except OSError as error:
        logger.warning("the CUDA kernels are off, torch serves instead: %s", error.__cause__ or error)
        return None
    return dict(entry)


@cache
def serves(op: str, dtype: torch.dtype, cache_dtype: torch.dtype | None, device: int) -> bool:
    """Whether the CUDA library runs this operation on that device. Decided once per combination."""
    wanted = choice()
    if wanted == "off":
        return False
    names = [None if each is None else str(each).removeprefix("torch.") for each in (dtype, cache_dtype)]
    what = hardware.Combination(op, str(names[0]), names[1])
    if what not in set(hardware.combinations()):
        return False
    # Nothing is loaded for kernels that may not be used.
    if wanted == "verified" and not any(result.what == what for result in hardware.committed()):
        return False
    entry = _loaded()
    capability = torch.cuda.get_device_capability(device)
    if entry is None or not covers(entry["architectures"], capability):
        return False
    if wanted == "all":
        return True
    return hardware.verified(what, capability[0], entry["sources"], hardware.committed())
