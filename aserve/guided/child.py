"""The process that compiles guides: ``python -m aserve.guided.child``, spoken to over its standard streams.

A message is its length, 8 bytes big-endian, and that many bytes. The first is a pickled
:class:`~aserve.guided.base.Vocabulary`; each one after it is a JSON list: the fields of a GuideSpec, or, to
get ready for a backend, its name and its ``module:attribute``. An answer is one byte, ``+`` before what
``Backend.check`` returned or ``-`` before a sentence for the caller. Ends when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from typing import BinaryIO

from aserve import registry
from aserve.guided.base import Backend, GrammarError, GuideSpec, Vocabulary

MEMORY = 4 << 30
"""Bytes of address space; a guide that needs more ends this process and nothing else."""


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


def answer(backends: dict[str, Backend], vocabulary: Vocabulary, request: bytes) -> bytes:
    fields = json.loads(request)
    try:
        if len(fields) > 2:
            spec = GuideSpec(*fields)
            return b"+" + backends[spec.backend].check(spec)
        registry.guided_backends.register(*fields)
        backend: Backend = registry.guided_backends.load(fields[0])(vocabulary)
        backend.prepare()
        backends[fields[0]] = backend
        return b"+"
    except GrammarError as error:
        return b"-" + str(error).encode()
    except MemoryError:
        return b"-needs too much memory"
    except RecursionError:
        return b"-is nested too deep"
    # A panic of a native library is a BaseException; whatever it is, it is about this guide.
    except BaseException as error:
        return f"-cannot be used: {type(error).__name__}: {' '.join(str(error).split())[:300]}".encode()


def main() -> None:
    _restrain()
    # What a library prints must not get between the answers.
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    first = read_message(source)
    if first is None:
        return
    vocabulary: Vocabulary = pickle.loads(first)
    backends: dict[str, Backend] = {}
    while (request := read_message(source)) is not None:
        write_message(sink, answer(backends, vocabulary, request))


def _restrain() -> None:
    """Gives way to the engine, and bounds memory, where the system can."""
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        os.nice(5)
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    main()
