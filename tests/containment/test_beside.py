"""Streams beside hostile input say what they say alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aserve.bench import hostile
from tests import tiny_checkpoint
from tests.containment.test_faults import idle, serving
from tests.server.conftest import until


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"), weights=True)


async def test_streams_beside_hostile_input_say_what_they_say_alone(checkpoint: Path) -> None:
    """Each input is answered, never with 5xx, by an engine that lives on; the texts stay the same."""
    async with serving(checkpoint) as (engine, client):
        port = client.base_url.port
        assert port is not None
        victims = [hostile.Victim(port, "tiny", number) for number in range(hostile.STREAMS)]
        await asyncio.gather(*(victim.once() for victim in victims))
        alone = [set(victim.texts) for victim in victims]
        assert all(len(texts) == 1 and texts != {""} for texts in alone)
        found: dict[str, int] = {}

        async def attack() -> None:
            for each in hostile.INPUTS:
                found[each.name] = await hostile.send(port, each.make("tiny"))

        await hostile.beside(victims, attack)
        assert [name for name in found if not next(e for e in hostile.INPUTS if e.name == name).passes(
            found[name])] == []  # fmt: skip
        assert len(found) == len(hostile.INPUTS) > 40
        assert [victim.texts for victim in victims] == alone
        assert all(len(victim.spans) > hostile.TOKENS for victim in victims)
        await until(lambda: idle(engine), 30)
        assert engine.engine is not None and not engine.errored
        engine.engine.core.verify()
        engine.engine.core.ledger.verify(live=0)
