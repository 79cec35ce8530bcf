"""The arithmetic of the policies' bench."""

from __future__ import annotations

import pytest

from aserve.bench import policies


def test_gaps_are_those_that_overlap_the_time_asked_about() -> None:
    came = [[0.0, 1.0, 1.5, 9.0], [2.0, 2.2], [5.0, 20.0]]
    found = policies.gaps(came, 1.2, 3.0)
    # 1.0 to 1.5, 1.5 to 9.0 and 2.0 to 2.2
    assert (found["p50"], found["max"]) == (pytest.approx(500), pytest.approx(7500))


def test_prompts_with_one_seed_are_alike() -> None:
    assert policies.prompt(5, 1) == policies.prompt(5, 1) != policies.prompt(5, 2)


def test_an_unknown_measurement_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        policies.main(["speed"])
    assert "unknown measurement: speed" in capsys.readouterr().err
