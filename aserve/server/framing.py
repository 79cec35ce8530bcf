"""How the body of an answer is framed: as h11 does it, without most of what that costs.

For a body of unknown length h11 takes every framing header out of the answer's head and puts its own in, and
checks all headers anew for each. Here the usual answer has the right one from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable

import h11
from hypercorn.protocol.events import Response

_CHUNKED = (b"transfer-encoding", b"chunked")
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class FramingConnection(h11.Connection):
    """h11's connection, which leaves a head alone that is as h11 would make it."""

    def framed(self, response: Response) -> Response:
        """``response`` with the header that says "in chunks", if its body is certain to be sent that way."""
        if self._usual(response.status_code) and not _framing(response.headers):
            return Response(response.stream_id, [*response.headers, _CHUNKED], response.status_code)
        return response

    def _usual(self, status: int) -> bool:
        """Whether an answer has a body, its client knows chunks, and the connection stays open behind it."""
        # A client that wants it closed, or to speak something else, is in another state.
        return status == 200 and self.their_state is h11.DONE and self.their_http_version == b"1.1"

    def _clean_up_response_headers_for_sending(self, response: h11.Response) -> h11.Response:
        if self._usual(response.status_code) and _framing(response.headers) == {_CHUNKED[0]}:
            return response
        return super()._clean_up_response_headers_for_sending(response)


def _framing(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    return _FRAMING.intersection([name for name, _ in headers])
