"""Requests as Quart has them, without what every one would pay for and few need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from quart import Request
from quart.wrappers.request import Body
from werkzeug.datastructures import Headers

from aserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from aserve.server.survey import Survey


class RequestHeaders(Headers):
    """A request's headers: looking for one that is not there raises nothing on the way."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self._list = list(pairs)

    def get(  # type: ignore[override]
        self, key: str, default: Any = None, type: Callable[[str], Any] | None = None
    ) -> Any:
        size, wanted = len(key), key.lower()
        for name, value in self._list:
            if len(name) == size and name.lower() == wanted:
                if type is None:
                    return value
                try:
                    return type(value)
                except ValueError:
                    return default
        return default


class ReceivedBody(Body):
    """A request's body that can be had at once when all of it is there, and be refused before it is."""

    _survey: Survey | None = None

    def watch(self, survey: Survey) -> None:
        """Shows ``survey`` all of the body, now and as it comes; what it refuses is not kept any longer."""
        self._survey = survey
        if self._must_raise is None:
            self._look(survey, bytes(self._data))

    def append(self, data: bytes) -> None:
        super().append(data)
        if self._survey is not None and self._must_raise is None:
            self._look(self._survey, data)

    def _look(self, survey: Survey, data: bytes) -> None:
        try:
            survey.feed(data)
        except InvalidRequestError as error:
            self._must_raise = error
            self._data.clear()
            self.set_complete()

    def whole(self) -> bytes | None:
        """The body; None while there is more to come, or if it is refused."""
        if self._must_raise is not None or not self._complete.is_set():
            return None
        return bytes(self._data)


class ServerRequest(Request):
    """A request whose body is waited for only if it is not there yet."""

    body_class = ReceivedBody
    body: ReceivedBody
    _blueprints: list[str] | None = None

    @property
    def blueprints(self) -> list[str]:
        """As Quart has them, which works them out each of the three times it asks."""
        if self._blueprints is None or self.url_rule is None:
            self._blueprints = super().blueprints
        return self._blueprints

    async def get_data(self, cache: bool = True, as_text: bool = False, parse_form_data: bool = False) -> Any:
        if cache and not as_text and not parse_form_data:
            data = self.body.whole()
            if data is not None:
                return data
        return await super().get_data(cache, as_text, parse_form_data)


def is_coroutine_function(function: Any) -> bool:
    """Whether calling ``function`` makes a coroutine; False also where that takes a closer look."""
    code = getattr(function, "__code__", None)
    return code is not None and bool(code.co_flags & inspect.CO_COROUTINE)
