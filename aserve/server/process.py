"""Settings of a process that is a server and nothing else; a program that embeds aserve makes its own."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading

from aserve.errors import ConfigError

logger = logging.getLogger(__name__)

NICE_VARIABLE = "ASERVE_LOOP_NICE"

COLLECT_AFTER = (20_000, 20, 20)
"""Allocations, and younger collections, between two collections of each generation."""


def settle() -> None:
    """Spares the garbage collector what the start has left: modules, and the model's Python objects.

    They are hundreds of thousands of objects that live as long as the process, and every full collection
    would walk them all. Call once the model is loaded.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def loop_nice() -> int:
    """The niceness asked for in the environment, 0 to 19; 0 if none is. Raises ConfigError for others."""
    given = os.environ.get(NICE_VARIABLE, "").strip() or "0"
    if not given.isdigit() or int(given) > 19:
        raise ConfigError(f"{NICE_VARIABLE} must be a number from 0 to 19, got {given!r}")
    return int(given)


def yield_to_compute(nice: int) -> None:
    """Lowers the priority of the calling thread, which is to be the event loop's; 0 leaves it alone.

    On Linux niceness belongs to a thread. A loop that takes a core from one thread of a step holds up
    all of them; a nicer one takes what they leave. Threads started later from this one inherit it.
    """
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        logger.info("the event loop's thread runs at niceness %d", nice)
