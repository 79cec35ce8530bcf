"""Memory of the machine and of control groups, read from made-up trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from aserve.config.memory import available_memory_bytes, total_memory_bytes

GIB = 1 << 30


class Machine:
    def __init__(self, root: Path, cgroup: str) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        self.write(self.proc / "self" / "cgroup", cgroup)
        self.write(self.proc / "meminfo", f"MemTotal: 64 kB\nMemAvailable: {8 * GIB // 1024} kB\n")

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group(self, path: str, names: tuple[str, str, str], limit: str, used: int, droppable: int) -> None:
        self.write(self.cgroups / path.strip("/") / names[0], limit + "\n")
        self.write(self.cgroups / path.strip("/") / names[1], f"{used}\n")
        self.write(self.cgroups / path.strip("/") / "memory.stat", f"anon 1\n{names[2]} {droppable}\n")

    @property
    def available(self) -> int:
        return available_memory_bytes(self.proc, self.cgroups)

    @property
    def total(self) -> int:
        return total_memory_bytes(self.proc, self.cgroups)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def test_without_control_groups_the_kernel_is_asked(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n")
    assert machine.available == 8 * GIB
    assert machine.total == total_memory_bytes(tmp_path / "none", tmp_path / "none")


def test_without_anything_half_of_the_memory_is_assumed(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) == total_memory_bytes(tmp_path, tmp_path) // 2


@pytest.mark.parametrize(("line", "folder", "names"), [("0::", "", V2), ("4:cpu,memory:", "memory", V1)])
def test_the_tightest_of_the_groups_decides(tmp_path: Path, line: str, folder: str, names) -> None:
    machine = Machine(tmp_path, f"7:pids:/x\n{line}/outer/inner\n")
    machine.group(f"{folder}/outer", names, str(GIB), GIB // 2, GIB // 4)
    machine.group(f"{folder}/outer/inner", names, str(2 * GIB), GIB, 0)
    assert machine.total == GIB
    assert machine.available == GIB - GIB // 4  # what files the kernel can drop take is not in use
    machine.group(f"{folder}/outer", names, str(GIB), 2 * GIB, 0)
    assert machine.available == 0


@pytest.mark.parametrize("limit", ["max", str((1 << 63) - 4096)])
def test_a_group_without_a_limit_does_not_count(tmp_path: Path, limit: str) -> None:
    machine = Machine(tmp_path, "0::/\n")
    machine.group("", V2, limit, GIB, 0)
    assert machine.available == 8 * GIB


def test_a_path_from_outside_the_container_leads_to_its_root(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/kubepods/pod1/container2\n")
    machine.group("", V2, str(3 * GIB), GIB, 0)
    assert (machine.total, machine.available) == (3 * GIB, 2 * GIB)
