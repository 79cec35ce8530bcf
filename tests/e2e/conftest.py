from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.process import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """SmolLM2 behind a real socket, shared by the tests that leave it as they found it.

    In float32, where its answers are those of transformers.
    """
    with Server("--dtype", "float32") as running:
        yield running
