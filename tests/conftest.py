"""What every test shares: no network, few threads, and where the packaged models are."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in ("ASERVE_ARGS", "ASERVE_LOGGING_LEVEL", "ASERVE_API_KEY", "VLLM_API_KEY"):
    os.environ.pop(_name, None)

# A busy machine draws slowly, which is no fault of a test.
hypothesis.settings.register_profile(
    "aserve", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("aserve")


@pytest.fixture(autouse=True)
def _unchanged_logger() -> Iterator[None]:
    """Whatever a test does to aserve's logger ends with it."""
    logger = logging.getLogger("aserve")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def packaged(name: str) -> Path:
    from aserve.packaged import resolve

    path = resolve(name)
    assert path is not None, f"{name} is not a packaged model"
    return Path(path)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of the packaged SmolLM2."""
    return packaged("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """The GGUF file of the packaged Gemma 3 270M."""
    return packaged("gemma3-270m")
