"""What a run was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from aserve.gpu_check.results import Row


@dataclass(frozen=True)
class Options:
    """ops: only these; empty means all. ceilings: measured rates by name, once their phase has run."""

    dry: bool
    seed: int
    ops: tuple[str, ...] = ()
    ceilings: dict[str, float] = field(default_factory=dict)
    logs: str = ""

    def wants(self, op: str) -> bool:
        return not self.ops or op in self.ops


def about(kind: str, **more: object) -> Row:
    return {"kind": kind, **more}
