"""The chat page in a real browser, talking to a real model."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.browser import Browser, executable
from tests.e2e.process import Server, idle_afterwards

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium is installed")

ANSWER = "(document.querySelector('.turn.assistant:last-child .text')?.textContent ?? '')"
DONE = "document.querySelector('.turn.assistant:last-child')?.dataset.done === 'true'"
READY = "document.getElementById('model').dataset.ready === 'true'"


@pytest.fixture
def page(server: Server, tmp_path: Path) -> Iterator[Browser]:
    with idle_afterwards(server), Browser(tmp_path / "profile") as browser:
        browser.open(server.url + "/")
        browser.wait(READY)
        yield browser
        assert browser.failures == []


def set_field(page: Browser, name: str, value: str) -> None:
    page.evaluate(f"document.getElementById('{name}').value = {value!r}")


def test_a_message_gets_a_streamed_answer(page: Browser, tmp_path: Path) -> None:
    assert page.evaluate("document.getElementById('model').value") == "smollm2"
    set_field(page, "temperature", "0")
    set_field(page, "max_tokens", "48")
    # Every length the answer has had on the page, seen from inside it.
    page.evaluate(
        "window.lengths = []; new MutationObserver(() => { const n = "
        f"{ANSWER}.length; if (n && n !== window.lengths.at(-1)) window.lengths.push(n); }})"
        ".observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true})"
    )
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.type("What is the capital of France?")
    page.press("Enter")
    page.wait(DONE, 60)
    assert "Paris" in page.evaluate(ANSWER)
    lengths = page.evaluate("window.lengths")
    assert len(lengths) >= 3 and lengths == sorted(lengths)
    facts = page.evaluate("document.querySelector('.turn.assistant .facts').textContent")
    assert re.search(r"first token \d+\.\d\d s", facts)
    assert re.search(r"\d+\.\d tokens/s", facts)
    assert re.search(r"\d+ tokens", facts)
    assert page.evaluate("document.querySelectorAll('.turn.user .text')[0].textContent").startswith("What is")
    assert page.evaluate("document.querySelector('.error') === null")
    assert page.evaluate("document.activeElement.id") == "prompt"
    picture = page.screenshot(tmp_path / "page.png")
    assert distinct_bytes(picture) > 16


def distinct_bytes(png: bytes) -> int:
    """How many different byte values the pixels of a picture have; a blank one has very few."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    packed, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + length]
        at += 12 + length
    return len(set(zlib.decompress(packed)))


def test_the_conversation_is_remembered_until_it_is_cleared(page: Browser) -> None:
    set_field(page, "max_tokens", "6")
    page.evaluate(
        "window.sent = []; const plain = window.fetch; window.fetch = (url, options) => "
        "{ if (options?.body) window.sent.push(JSON.parse(options.body)); return plain(url, options); }; 0"
    )
    set_field(page, "system", "Be brief.")
    for question in ("One?", "Two?"):
        page.type(question)
        page.press("Enter")
        page.wait(f"{DONE} && document.querySelectorAll('.turn.user').length === window.sent.length", 60)
    roles = page.evaluate("window.sent[1].messages.map((message) => message.role)")
    assert roles == ["system", "user", "assistant", "user"]
    page.evaluate("document.getElementById('clear').click()")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    page.type("Three?")
    page.press("Enter")
    page.wait(DONE, 60)
    assert page.evaluate("window.sent[2].messages.map((message) => message.role)") == ["system", "user"]


def test_escape_stops_an_answer(page: Browser, server: Server) -> None:
    set_field(page, "max_tokens", "1500")
    page.type("Write a very long story about a dragon.")
    page.press("Enter")
    page.wait(f"{ANSWER}.length > 10", 60)
    assert page.evaluate("!document.getElementById('stop').hidden")
    page.press("Escape")
    page.wait(DONE)
    assert "stopped" in page.evaluate("document.querySelector('.turn.assistant .facts').textContent")
    assert page.evaluate("!document.getElementById('send').hidden")


def test_text_is_never_markup(page: Browser) -> None:
    hostile = '<img src=x onerror="window.hit=1"> `a<b` \n```html\n<script>window.hit=1</script>\n```\nend'
    page.evaluate(f"render(addTurn('assistant').text, {hostile!r})")
    assert page.evaluate("window.hit === undefined")
    assert page.evaluate("document.querySelectorAll('#log img, #log script').length") == 0
    assert page.evaluate("document.querySelector('.text pre code').textContent") == (
        "<script>window.hit=1</script>"
    )
    assert page.evaluate("document.querySelector('.text p code').textContent") == "a<b"


def test_an_error_is_shown_and_the_message_comes_back(page: Browser) -> None:
    set_field(page, "max_tokens", "99999999")
    set_field(page, "temperature", "-3")
    page.type("Hello")
    page.press("Enter")
    page.wait(DONE)
    assert page.evaluate("document.querySelector('.error').textContent").startswith("400: ")
    assert page.evaluate("document.getElementById('prompt').value") == "Hello"
    page.failures.clear()  # the browser itself reports the status 400


def test_every_control_has_a_name(page: Browser) -> None:
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter((node) => "
        "!node.textContent.trim() && !node.labels?.length && !node.ariaLabel).map((node) => node.id)"
    )
    assert unnamed == []


def test_a_key_can_be_entered_when_the_server_asks_for_one(tmp_path: Path) -> None:
    flags = ("--host", "127.0.0.1", "--port", "0", "--api-key", "open-sesame")
    command = [sys.executable, "-m", "tests.server.fake_server", "0.001", "loads", *flags]
    with Server(command=command) as server, Browser(tmp_path / "profile") as page:
        page.open(server.url + "/")
        page.wait("document.querySelector('.error') !== null")
        assert "API key" in page.evaluate("document.querySelector('.error').textContent")
        assert page.evaluate("!document.getElementById('settings').hidden")
        page.evaluate("document.getElementById('key').focus()")
        page.type("open-sesame")
        page.press("Enter")
        page.wait(READY)
        assert page.evaluate("document.querySelector('.error') === null")
        page.evaluate("document.getElementById('prompt').focus()")
        page.type("Hello")
        page.press("Enter")
        page.wait(DONE)
        assert len(page.evaluate(ANSWER)) > 10
