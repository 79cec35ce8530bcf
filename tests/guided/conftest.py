from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aserve import LLM, registry
from aserve.guided.base import Vocabulary
from aserve.guided.vocabulary import read_vocabulary
from aserve.tokenizer.loader import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Any:
    return load_tokenizer(str(smollm2_path), mode="auto", trust_remote_code=False, revision=None)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Any) -> Vocabulary:
    return read_vocabulary(tokenizer, len(tokenizer))


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", max_model_len=512, max_num_seqs=16, guided_compile_timeout=60) as built:
        yield built


@pytest.fixture
def backend_of_tests() -> Iterator[str]:
    """A backend registered under this name whose ``check`` does what the text of a regex says."""
    registry.guided_backends.register("of-tests", "tests.guided.fakes:Backend")
    yield "of-tests"
    del registry.guided_backends._table["of-tests"]
