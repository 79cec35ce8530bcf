"""Clients that vanish: everything they held comes back, and the rest go on."""

from __future__ import annotations

import json
import socket
import struct

import httpx
import pytest

from tests.e2e.process import Server, wait_until

CLIENTS = 100


def hang_on(server: Server, *, stream: bool) -> socket.socket:
    """A connection on which a long answer has been asked for."""
    body = json.dumps(
        {"model": "smollm2", "prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": stream}
    ).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return sock


def hang_up(sock: socket.socket, *, reset: bool) -> None:
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def aborted(server: Server) -> float:
    return server.metrics().get("aserve:requests_aborted_total", 0.0)


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_a_hundred_clients_killed_in_the_middle_leave_nothing(server: Server, reset: bool) -> None:
    before = aborted(server)
    sockets = [hang_on(server, stream=index % 2 == 0) for index in range(CLIENTS)]
    try:
        wait_until(lambda: sum(server.load()[:2]) == CLIENTS, 60)
        for sock in sockets[::2]:
            assert sock.recv(64).startswith(b"HTTP/1.1 200"), "a stream that has not begun"
    finally:
        for sock in sockets:
            hang_up(sock, reset=reset)
    seconds = wait_until(lambda: server.load() == (0.0, 0.0, 0.0), 30)
    print(f"everything was back {seconds:.2f} s after the last client left")
    assert aborted(server) == before + CLIENTS
    answer = httpx.post(
        server.url + "/v1/completions",
        json={"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0},
        timeout=60,
    )
    assert "Paris" in answer.json()["choices"][0]["text"]


def test_a_client_that_leaves_does_not_change_its_neighbour(server: Server) -> None:
    body = {"model": "smollm2", "prompt": "1, 2, 3,", "max_tokens": 40, "temperature": 0}
    alone = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    leaver = hang_on(server, stream=True)
    wait_until(lambda: server.load()[0] == 1)
    pieces = []
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=body | {"stream": True}, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                if len(pieces) == 5:
                    hang_up(leaver, reset=True)
                pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    assert "".join(pieces) == alone
    wait_until(lambda: server.load() == (0.0, 0.0, 0.0))
