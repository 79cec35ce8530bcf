"""The process that compiles guides: ``python -m aserve.guided.child``, spoken to over its standard streams.

The first message is a pickled
:class:`~aserve.guided.base.Vocabulary`; each one after it is a JSON list: the fields of a GuideSpec, or, to
get ready for a backend, its name and its ``module:attribute``. An answer is one byte, ``+`` before what
``Backend.check`` returned or ``-`` before a sentence for the caller. Ends when its input ends.
"""

from __future__ import annotations

import json
import os
import pickle
import sys

from aserve import registry
from aserve.guided.base import Backend, GrammarError, GuideSpec, Vocabulary
from aserve.pipes import read_message, restrain, write_message


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
    restrain()
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


if __name__ == "__main__":
    main()
