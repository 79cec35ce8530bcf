"""Engines over a fake executor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aserve.args import AsyncEngineArgs
from aserve.engine.async_engine import AsyncLLMEngine
from aserve.engine.llm_engine import LLMEngine
from tests import tiny_checkpoint
from tests.engine.fake_executor import FakeExecutor

EngineFactory = Callable[..., Any]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"))


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("num_blocks", "num_swap_blocks", "max_steps", "step_time", "before_step")
    fake = {name: options.pop(name) for name in names if name in options}
    return options, fake


def build(checkpoint: Path, **options: Any) -> LLMEngine:
    """A loaded LLMEngine; options are engine arguments or FakeExecutor's."""
    arguments, fake = split(options)
    arguments = {"load_format": "dummy", "max_num_seqs": 8, "block_size": 8, **arguments}
    config = AsyncEngineArgs(model=str(checkpoint), **arguments).create_engine_config()
    executor: Any = partial(FakeExecutor, **fake)
    return LLMEngine.from_config(config, log_stats=True, executor_class=executor)


@pytest.fixture
def make_engine(checkpoint: Path) -> Any:
    built: list[LLMEngine] = []

    def make(**options: Any) -> LLMEngine:
        engine = build(checkpoint, **options)
        built.append(engine)
        return engine

    yield make
    for engine in built:
        engine.close()


@pytest.fixture
async def make_async(checkpoint: Path) -> AsyncIterator[EngineFactory]:
    built: list[AsyncLLMEngine] = []

    async def make(**options: Any) -> AsyncLLMEngine:
        engine = AsyncLLMEngine(False, False)
        engine.engine = build(checkpoint, **options)
        await engine.start()
        built.append(engine)
        return engine

    yield make
    for engine in built:
        await engine.stop()
