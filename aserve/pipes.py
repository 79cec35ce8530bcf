"""Processes of our own, spoken to over their standard streams.

A message is its length, 8 bytes big-endian, and that many bytes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

MEMORY = 4 << 30
"""Bytes of address space such a process has; what needs more ends it and nothing else."""


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream, also in the middle of a message."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "big")
    body = stream.read(size)
    return body if len(body) == size else None


def write_message(stream: BinaryIO, body: bytes) -> None:
    stream.write(len(body).to_bytes(8, "big"))
    stream.write(body)
    stream.flush()


def restrain() -> None:
    """Has the calling process give way to the engine and bounds its memory, where the system can."""
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        os.nice(5)
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def start(module: str, **environment: str) -> subprocess.Popen[bytes]:
    """Runs ``python -m module``. Raises OSError if that cannot be done.

    What its libraries print may quote what they were given, so it goes nowhere.
    """
    source = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    # A session of its own: an interrupt typed at the terminal is for the server alone.
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, **environment},
        start_new_session=True,
    )


def streams(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    """What a started process says, and what it is told."""
    if process.stdout is None or process.stdin is None:
        raise ValueError("the process was started without pipes")
    return cast("BinaryIO", process.stdout), cast("BinaryIO", process.stdin)


def ask(
    process: subprocess.Popen[bytes],
    messages: Sequence[bytes],
    seconds: float,
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[bytes | None, bool]:
    """Its answer to the messages, None if it ended; and whether it was killed for taking longer.

    meanwhile: called once the messages are sent.
    """
    late = threading.Event()

    def overdue() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, overdue)
    timer.start()
    reply = None
    try:
        # Its end shows as a broken pipe or as the end of its output.
        with contextlib.suppress(OSError, ValueError):
            source, sink = streams(process)
            for message in messages:
                write_message(sink, message)
            meanwhile()
            reply = read_message(source)
    finally:
        timer.cancel()
    return reply, late.is_set()


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and gives back what it held."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
