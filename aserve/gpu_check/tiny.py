"""One small shape of every operation, for tools that watch it.

``python -m aserve.gpu_check.tiny [--dry] [OP ...]``. Exit status 1: a result is wrong.
"""

from __future__ import annotations

import sys

from aserve.gpu_check import cases
from aserve.gpu_check.machine import open_machine
from aserve.gpu_check.phases.correctness import finding


def main(arguments: list[str]) -> int:
    dry = "--dry" in arguments
    wanted = [each for each in arguments if each != "--dry"]
    machine = open_machine(dry)
    failed = 0
    for check in cases.tiny():
        if not wanted or check.op in wanted:
            found = finding(machine, check, 1)
            print(f"{check}: {'passed' if found['passed'] else 'FAILED'}")
            failed += not found["passed"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
