"""The emulated kernels, built once for these tests and those of tests/cuda."""

from tests.cuda.conftest import bound, library

__all__ = ["bound", "library"]
