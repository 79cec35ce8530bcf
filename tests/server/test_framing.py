"""Heads of answers are those that h11 makes, whoever asks and whatever the application says."""

from __future__ import annotations

from typing import Any

import h11
import pytest
from hypercorn.protocol.events import Response

from aserve.server.framing import FramingConnection

BODY = "Content-Length: 2\r\n\r\nhi"
REQUESTS = {
    "get": "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "post": f"POST / HTTP/1.1\r\nHost: a\r\n{BODY}",
    "head": "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
    "to be closed": f"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{BODY}",
    "unread": "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n",
    "1.0": f"POST / HTTP/1.0\r\n{BODY}",
    "1.0 to be kept": f"POST / HTTP/1.0\r\nConnection: keep-alive\r\n{BODY}",
    "upgrade": "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    "connect": "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "pipelined": f"POST / HTTP/1.1\r\nHost: a\r\n{BODY}GET / HTTP/1.1\r\nHost: a\r\n\r\n",
}
LENGTH, CHUNKED = (b"content-length", b"5"), (b"transfer-encoding", b"chunked")
HEADERS: dict[str, list[tuple[bytes, bytes]]] = {
    "plain": [],
    "length": [LENGTH],
    "chunked": [CHUNKED],
    "both": [LENGTH, CHUNKED],
    "close": [(b"connection", b"close")],
    "length and close": [LENGTH, (b"connection", b"close")],
    "chunked and close": [(b"Connection", b"close"), CHUNKED],
}


def answer(connection: h11.Connection, request: str, headers: list[Any], status: int) -> list[Any]:
    """The lines of the head, in any order and case, what follows it, and the states in the end."""
    connection.receive_data(request.encode())
    while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
        pass
    response = Response(1, [(b"content-type", b"text/plain"), *headers], status)
    if isinstance(connection, FramingConnection):
        response = connection.framed(response)
    sent: list[Any] = []
    events = (
        h11.Response(headers=response.headers, status_code=status),
        h11.Data(b"hello"),
        h11.EndOfMessage(),
    )
    for event in events:
        try:
            sent.append(connection.send(event))
        except h11.LocalProtocolError as error:
            sent.append(str(error))
    if isinstance(sent[0], bytes):
        sent[0] = sorted(sent[0].lower().split(b"\r\n"))
    return [*sent, connection.states]


@pytest.mark.parametrize("status", [200, 201, 204, 304, 404])
@pytest.mark.parametrize("headers", HEADERS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_the_same_head(request_: str, headers: str, status: int) -> None:
    asked = REQUESTS[request_], HEADERS[headers], status
    assert answer(FramingConnection(h11.SERVER), *asked) == answer(h11.Connection(h11.SERVER), *asked)


def test_the_usual_head_is_left_alone() -> None:
    connection = FramingConnection(h11.SERVER)
    connection.receive_data(REQUESTS["post"].encode())
    while connection.next_event() is not h11.NEED_DATA:
        pass
    framed = connection.framed(Response(1, [(b"a", b"b")], 200))
    response = h11.Response(headers=framed.headers, status_code=200)
    assert connection._clean_up_response_headers_for_sending(response) is response


def test_a_header_that_would_split_the_head_is_refused() -> None:
    connection = FramingConnection(h11.SERVER)
    for value in (b"a\r\nb: c", b"a\nb", b"\0"):
        framed = connection.framed(Response(1, [(b"x-request-id", value)], 200))
        with pytest.raises(h11.LocalProtocolError):
            h11.Response(headers=framed.headers, status_code=200)
