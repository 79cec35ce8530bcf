"""The tool that measures how soon a request is gone: one round of one call in every state."""

from __future__ import annotations

import re

import pytest

from aserve.bench import aborts


@pytest.mark.slow
def test_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0 says that the ledger of blocks and the books of requests were exact as well."""
    assert aborts.main(["--only", "n=4", "--repeats", "10"]) == 0
    said = capsys.readouterr().out
    given_up = re.search(r"(\d+) requests given up: ", said)
    assert given_up is not None and int(given_up[1]) == 10
    assert [line.split()[0] for line in said.splitlines()[1:]] == list(aborts.STATES)


def test_a_call_in_a_state_is_what_it_has_to_be() -> None:
    for name in aborts.CALLS:
        plain = aborts.call(name, "decoding", 1, "m")
        assert aborts.call(name, "prompt", 1, "m") != plain, name
        assert aborts.call(name, "compiling", 1, "m") != aborts.call(name, "compiling", 2, "m"), name
        streamed = bool(aborts.CALLS[name][1].get("stream"))
        assert (aborts.call(name, "slow", 1, "m") == plain) == streamed, name
