"""Every failure aserve reports, in one tree.

::

    AserveError
      ClientError                 the request is at fault: HTTP 4xx
        + InvalidRequestError     400; also a ValueError, so library callers can catch it as one
        + AuthenticationError     401
        + ForbiddenError          403; a key without the scope that is needed
        + NotFoundError           404
        + RequestTimeoutError     408; not completed within the time its caller gave it
        + QueueFullError          429; carries retry_after seconds
      ServerError                 aserve is at fault: HTTP 5xx
        + EngineBusyError         503; draining or still starting
        + RequestFailedError      500; this request alone failed, the engine goes on
        + EngineDeadError         500; the engine loop has ended for good
          (AsyncEngineDeadError is its older name)
      ConfigError                 a setting cannot work; raised before weights are read (a ValueError)
        + UnsupportedError        a known setting whose feature this build or device does not have
"""

from __future__ import annotations

import re

_PRIVATE = re.compile(r"0x[0-9a-fA-F]{4,}|(?:/[\w.+-]+){2,}")


def without_private(text: str) -> str:
    """``text`` without memory addresses and paths: somebody else's exception, fit to be told to a client."""
    return _PRIVATE.sub("…", text)


class AserveError(Exception):
    """Base of every error aserve raises on purpose.

    ``status`` is the HTTP status the server answers with, ``type`` the ``error.type`` string of the
    OpenAI error body, ``param`` the name of the offending field when one is known.
    """

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ClientError(AserveError):
    status = 400
    type = "BadRequestError"


class InvalidRequestError(ClientError, ValueError):
    """A field of the request is malformed or out of range."""


class AuthenticationError(ClientError):
    status = 401
    type = "AuthenticationError"


class ForbiddenError(ClientError):
    """The key is valid and not enough."""

    status = 403
    type = "PermissionDeniedError"


class NotFoundError(ClientError):
    status = 404
    type = "NotFoundError"


class RequestTimeoutError(ClientError):
    """The request was not completed within its ``timeout``."""

    status = 408
    type = "RequestTimeoutError"


class QueueFullError(ClientError):
    status = 429
    type = "RateLimitError"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerError(AserveError):
    pass


class EngineBusyError(ServerError):
    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailedError(ServerError):
    """One request could not be completed; its neighbours are untouched."""


class EngineDeadError(ServerError):
    """The engine loop has ended; no request can be served any more."""


AsyncEngineDeadError = EngineDeadError


class ConfigError(AserveError, ValueError):
    """A combination of settings that cannot work."""


class UnsupportedError(ConfigError):
    """A known setting that this build or device cannot honour."""
