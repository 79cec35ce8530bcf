"""The fake engine behind a real server, as the server's own tests have it."""

from __future__ import annotations

from tests.server.conftest import engine, port, serving

__all__ = ["engine", "port", "serving"]
