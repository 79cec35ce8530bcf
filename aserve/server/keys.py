"""The API keys a server accepts, from its arguments and from a file that may change while it runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from aserve.errors import ConfigError

logger = logging.getLogger(__name__)

ADMIN = "admin"


@dataclass(frozen=True)
class Key:
    """A key as it is kept: never in clear. ``name`` is what logs call it."""

    name: str
    digest: bytes
    admin: bool = False


def key_of(name: str, secret: str, *, admin: bool = False) -> Key:
    return Key(name, _digest(secret.encode()), admin)


def read_keys(path: str) -> list[Key]:
    """The keys of a file: one a line, ``KEY``, ``NAME KEY`` or ``NAME KEY admin``; ``#`` begins a comment.

    Raises ConfigError naming the line, and nothing of what it holds, or if there is no key at all.
    """
    try:
        with open(path, encoding="utf-8") as source:
            lines = source.read().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"api_key_file: cannot read {path}: {reason}", param="api_key_file") from None
    found = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 3 or (len(words) == 3 and words[2] != ADMIN):
            raise ConfigError(
                f"api_key_file: line {number} must be KEY, NAME KEY or NAME KEY {ADMIN}", param="api_key_file"
            )
        name, secret = (f"line-{number}", words[0]) if len(words) == 1 else words[:2]
        found.append(key_of(name, secret, admin=len(words) == 3))
    if not found:
        raise ConfigError(f"api_key_file: there is no key in {path}", param="api_key_file")
    return found


class KeyRing:
    """The keys accepted now. Those given as arguments stay; those of ``path`` are read anew by ``reload``."""

    def __init__(self, secrets: Sequence[str], path: str | None = None) -> None:
        self._path = path
        self._fixed = [key_of(f"key-{number}", secret) for number, secret in enumerate(secrets, 1)]
        self._keys = [*self._fixed, *(read_keys(path) if path is not None else ())]

    def __bool__(self) -> bool:
        """Whether requests need a key."""
        return bool(self._keys)

    def reload(self) -> None:
        """Takes the file as it is now; if it is unusable the keys stay as they are, and the log says so."""
        if self._path is None:
            return
        try:
            self._keys = [*self._fixed, *read_keys(self._path)]
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("%d API keys are accepted from now on", len(self._keys))

    def find(self, authorization: Sequence[str], x_api_key: Sequence[str] = ()) -> Key | None:
        """The key that a request shows, if it is one of ours.

        The values of its ``Authorization`` headers (``Bearer KEY``) or, without any, of its ``X-Api-Key``
        headers; more than one of either is refused.
        """
        if authorization:
            scheme, _, secret = authorization[0].partition(" ")
            if len(authorization) != 1 or scheme.lower() != "bearer":
                return None
        elif len(x_api_key) == 1:
            secret = x_api_key[0]
        else:
            return None
        # The server decodes headers as latin-1, so this gives back the bytes that were sent.
        given = _digest(secret.strip().encode("latin-1", "replace"))
        # Every key is compared, in constant time over hashes: the time taken says nothing.
        matches = [key for key in self._keys if hmac.compare_digest(given, key.digest)]
        return matches[0] if matches else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
