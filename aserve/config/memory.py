"""How much memory this process may use: the machine's, or what its control groups leave of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""Version 1 of control groups says "no limit" by a number near the largest."""


def total_memory_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Size of this machine's memory, or the lowest limit of the control groups this process is in."""
    limits = [limit for limit, _ in _groups(proc, cgroups)]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def available_memory_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Memory that can be taken now without swapping or going over a control group's limit.

    Caches of files that the kernel can drop count as available.
    """
    free = [max(0, limit - used) for limit, used in _groups(proc, cgroups)]
    for line in (_read(proc / "meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free.append(int(value.split()[0]) * 1024)
    return min(free) if free else total_memory_bytes(proc, cgroups) // 2


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every limited control group this process is in, in bytes."""
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container its own group is usually mounted at the root, and the path leads nowhere.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            group = root.joinpath(*parts[:depth])
            limit, used = _number(group / names[0]), _number(group / names[1])
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit, max(0, used - _statistic(group / "memory.stat", names[2]))


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    for line in (_read(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
