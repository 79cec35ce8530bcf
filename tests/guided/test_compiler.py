"""Compiling guides: in a process that may be killed, once each, and no more of them kept than allowed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aserve.config.decoding import DecodingConfig
from aserve.errors import InvalidRequestError, QueueFullError
from aserve.guided import compiler as compiler_module
from aserve.guided.base import Vocabulary
from aserve.guided.compiler import GrammarCompiler
from aserve.messages.params import GuidedParams

Make = Callable[..., GrammarCompiler]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[GrammarCompiler] = []

    def build(**options: Any) -> GrammarCompiler:
        small = Vocabulary([b"", *(bytes([each]) for each in range(256))], 0)
        made.append(GrammarCompiler(DecodingConfig(**options), lambda: small))
        return made[-1]

    yield build
    for each in made:
        each.close()


def order(text: str) -> GuidedParams:
    return GuidedParams(regex=text, backend="of-tests")


def refusal(compiler: GrammarCompiler, guided: GuidedParams) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        compiler.check(guided)
        compiler.compile(guided)
    return caught.value


def test_equal_guides_share_a_grammar(make: Make) -> None:
    compiler = make()
    first = compiler.compile(GuidedParams(choice=["a", "b"]))
    assert compiler.compile(GuidedParams(choice=["a", "b"])) is first
    assert compiler.compile(GuidedParams(choice=["b", "a"])) is not first
    assert compiler.compile(GuidedParams(choice=["a", "b"], backend="lm-format-enforcer")) is not first


def test_warm_before_the_first_guide(make: Make, backend_of_tests: str) -> None:
    compiler = make(guided_decoding_backend=backend_of_tests)
    compiler.warm()
    ready = threading.Event()
    compiler._submit(ready.set)
    assert ready.wait(60)
    process = compiler._process
    assert process is not None and process.pid is not None
    warm = process.pid
    assert compiler.compile(order("x")).pid == warm


def test_without_a_tokenizer_nothing_is_warmed() -> None:
    def vocabulary() -> Vocabulary:
        raise InvalidRequestError("guided decoding needs a tokenizer")

    compiler = GrammarCompiler(DecodingConfig(), vocabulary)
    compiler.warm()
    compiler.close()
    assert compiler._process is None


def test_closed_while_it_warms(make: Make) -> None:
    compiler = make()
    compiler.warm()
    compiler.close()
    compiler.warm()
    assert compiler._process is None or compiler._process.pid is None


def test_one_compilation_for_all_that_wait_for_it(make: Make, backend_of_tests: str) -> None:
    compiler = make()
    futures = [compiler.start(order("sleep 0.2")) for _ in range(5)]
    assert len({id(each) for each in futures}) == 1
    assert futures[0].result(60) is compiler.compile(order("sleep 0.2"))


def test_what_takes_too_long_is_refused_and_costs_only_itself(make: Make, backend_of_tests: str) -> None:
    compiler = make(compile_timeout=0.5)
    before = compiler.compile(order("x")).pid
    error = refusal(compiler, order("sleep 600"))
    assert error.param == "guided_regex" and "0.5 seconds" in error.message
    after = compiler.compile(order("y")).pid
    assert after != before  # the process was killed, and another one started
    assert not os.path.exists(f"/proc/{before}")


@pytest.mark.parametrize("end", ["die", "exhaust"])
def test_the_end_of_the_process_costs_only_its_guide(make: Make, backend_of_tests: str, end: str) -> None:
    compiler = make()
    assert refusal(compiler, order(end)).param == "guided_regex"
    assert compiler.compile(order("x")).pid > 0


def test_a_killed_process_is_started_again(make: Make, backend_of_tests: str) -> None:
    compiler = make()
    pid = compiler.compile(order("x")).pid
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)  # either it has ended by now, or it ends while it is spoken to
    with contextlib.suppress(InvalidRequestError):
        compiler.compile(order("z"))
    assert compiler.compile(order("y")).pid != pid


def test_killed_while_it_compiles(make: Make, backend_of_tests: str) -> None:
    compiler = make()
    pid = compiler.compile(order("x")).pid
    waiting = compiler.start(order("sleep 600"))
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(Exception, match="ended the process"):
        waiting.result(60)
    assert compiler.compile(order("y")).pid != pid


def test_what_a_backend_prints_or_raises_does_not_end_it(make: Make, backend_of_tests: str) -> None:
    compiler = make()
    pid = compiler.compile(order("print")).pid
    assert "RuntimeError: secret" in refusal(compiler, order("raise secret")).message
    assert compiler.compile(order("x")).pid == pid


def test_the_cache_is_bounded_and_drops_what_was_used_longest_ago(make: Make, backend_of_tests: str) -> None:
    compiler = make(cache_bytes=4 << 20)
    first = compiler.compile(order("first"))
    for index in range(20):
        compiler.compile(order(f"number {index}"))
        assert compiler.cached_bytes <= 4 << 20
        assert compiler.compile(order("first")) is first
    assert 1 < len(compiler) <= 4
    assert compiler.start(order("number 19")).done()
    assert not compiler.start(order("number 0")).done()


def test_refusals_are_remembered_within_the_same_bound(make: Make) -> None:
    compiler = make(cache_bytes=64 << 10)
    for index in range(100):
        refusal(compiler, GuidedParams(regex=f"(unclosed {index}"))
    assert 0 < compiler.cached_bytes <= 64 << 10
    assert compiler.start(GuidedParams(regex="(unclosed 99")).done()


def test_too_many_at_once(make: Make, backend_of_tests: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_WAITING", 3)
    compiler = make()
    for index in range(3):
        compiler.start(order(f"sleep 0.{index}"))
    with pytest.raises(QueueFullError):
        compiler.start(order("one more"))


def test_closing_ends_what_waits(make: Make, backend_of_tests: str) -> None:
    compiler = make()
    pid = compiler.compile(order("x")).pid
    waiting = [compiler.start(order(f"sleep {600 + index}")) for index in range(3)]
    compiler.close()
    for each in waiting:
        assert each.exception(60) is not None
    assert not os.path.exists(f"/proc/{pid}")
    assert refusal(compiler, order("y")).param == "guided_regex"


PATHOLOGICAL = {
    "nested groups": GuidedParams(regex="(" * 5000 + "a" + ")" * 5000),
    "nested schema": GuidedParams(json='{"items":' * 50_000 + "{}" + "}" * 50_000),
    "nested brackets": GuidedParams(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "large schema": GuidedParams(json={"enum": ["x" * 1000] * 10_000}),
    "long regex": GuidedParams(regex="a|" * 100_000),
    "many choices": GuidedParams(choice=[f"c{i}" for i in range(100_000)]),
    "explosive repeats": GuidedParams(regex="((((a{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "explosive union": GuidedParams(regex="(.*a.{200}|.*b.{200})*c", backend="lm-format-enforcer"),
    "explosive index": GuidedParams(regex="(.*a.{200}|.*b.{200})*c", backend="outlines"),
    "cyclic references": GuidedParams(json={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "nested unions": GuidedParams(
        json='{"oneOf":[{"type":"object","properties":{"a":' * 20 + "{}" + '}},{"type":"array"}]}' * 20
    ),
    "left recursion": GuidedParams(grammar='start: a\na: a a | b | ""\nb: a b | ""'),
}


@pytest.fixture(scope="module")
def quick(vocabulary: Vocabulary) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(DecodingConfig(compile_timeout=2.0), lambda: vocabulary)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_hostile_guides_end_in_time(quick: GrammarCompiler, name: str) -> None:
    """Compiled or refused; the compiler works afterwards."""
    guided = PATHOLOGICAL[name]
    try:
        quick.check(guided)
        quick.start(guided).result(90)
    except InvalidRequestError as error:
        assert error.param == guided.param
        assert len(error.message) < 600
    except Exception as error:
        told = quick.error(guided, error)
        assert told.param == guided.param and len(told.message) < 600
    assert quick.compile(GuidedParams(choice=["still", "there"])) is not None
