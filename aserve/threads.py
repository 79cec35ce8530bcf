"""How the threads of the libraries beneath behave."""

from __future__ import annotations

import os


def calm_threads() -> None:
    """Makes OpenMP's threads sleep while they wait for work, unless the environment says otherwise.

    They would spin for milliseconds after each of torch's parallel operations, on the cores that the threads
    of a step need; and a thread that spins for a sibling without a core burns the time that sibling needs.
    Takes effect if torch is not imported yet.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
