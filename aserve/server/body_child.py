"""The process that reads large bodies: ``python -m aserve.server.body_child``, spoken to over its streams.

A request is two messages: the limits as JSON, and the body. The answer is one: ``+`` and the pickled values,
or ``-`` and the JSON of an error's message and parameter. What comes back is cheap to take over: no field is
longer than its limit, all of them together have a bounded number of values, and token ids are packed. Ends
when its input ends.
"""

from __future__ import annotations

import gc
import pickle
import sys
from array import array
from typing import Any

import orjson

from aserve.errors import InvalidRequestError
from aserve.pipes import read_message, restrain, write_message

MAX_VALUES = 1 << 16
"""Most JSON values of a body besides token ids; a chat of as many messages as may be has half as many."""


def parse(data: bytes) -> dict[str, Any]:
    """The fields of a body. Raises InvalidRequestError for what is no JSON object."""
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return values


def limited(data: bytes, most: dict[str, int], ids: str | None) -> dict[str, Any]:
    """:func:`parse` of what keeps to its limits, with the token ids in it packed.

    most: items that a field may hold, if it is an array or an object. ids: the field that may be token ids,
    or a list of lists of them; they become arrays of 64-bit integers.

    Raises InvalidRequestError naming the field that is too long.
    """
    values = parse(data)
    if ids is not None and isinstance(values.get(ids), list):
        values[ids] = _packed(values[ids], most[ids], ids)
    for name, limit in most.items():
        value = values.get(name)
        if isinstance(value, (list, dict)) and len(value) > limit:
            kind = "List" if isinstance(value, list) else "Dictionary"
            raise InvalidRequestError(
                f"{name}: {kind} should have at most {limit} items, not {len(value)} [too_long]", param=name
            )
    sizes = {
        name: count(value)
        for name, value in values.items()
        if not (most.get(name, 0) > MAX_VALUES and isinstance(value, list) and _all_ints(value))
    }
    if len(values) + sum(sizes.values()) > MAX_VALUES:
        raise too_many_values(max(sizes, key=lambda name: sizes[name])[:64])
    return values


def too_many_values(field: str | None) -> InvalidRequestError:
    """The error for a body of which ``field``, if it is known, holds too much."""
    place = "body" if field is None else field
    return InvalidRequestError(
        f"{place}: a request may hold at most {MAX_VALUES} values besides token ids [too_long]", param=field
    )


def count(value: Any) -> int:
    """JSON values in ``value``, itself included."""
    total = 1
    stack = [value] if isinstance(value, (list, dict)) else []
    while stack:
        each = stack.pop()
        total += len(each)
        inner = each.values() if isinstance(each, dict) else each
        stack.extend(item for item in inner if isinstance(item, (list, dict)))
    return total


def _packed(items: list[Any], most: int, field: str) -> Any:
    """Token ids as an array, or lists of token ids as arrays; anything else as it is."""
    if items and _all_ints(items):
        return _array(items, field)
    if len(items) > most:  # refused in a moment
        return items
    return [
        _array(item, field) if isinstance(item, list) and item and _all_ints(item) else item for item in items
    ]


def _array(items: list[int], field: str) -> array[int]:
    try:
        return array("q", items)
    except OverflowError:
        raise InvalidRequestError(f"{field}: an integer beyond 64 bits is no token id", param=field) from None


def _all_ints(items: list[Any]) -> bool:
    return set(map(type, items)) <= {int}  # exactly int: True is no token id


def answer(limits: bytes, data: bytes) -> bytes:
    try:
        values = limited(data, **orjson.loads(limits))
        return b"+" + pickle.dumps(values, pickle.HIGHEST_PROTOCOL)
    except InvalidRequestError as error:
        return b"-" + orjson.dumps([error.message, error.param])
    except MemoryError:
        return b"-" + orjson.dumps(["the body needs too much memory to be read", None])
    except RecursionError:
        return b"-" + orjson.dumps(["the body is nested too deep", None])


def main() -> None:
    restrain()
    # There are no cycles in JSON, and looking for them in a million values takes longer than reading them.
    gc.disable()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (limits := read_message(source)) is not None and (data := read_message(source)) is not None:
        write_message(sink, answer(limits, data))


if __name__ == "__main__":
    main()
