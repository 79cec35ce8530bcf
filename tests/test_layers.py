"""Which room may import which: read from the source, so that a wrong import fails with its line.

A room is a module or package directly inside ``aserve``. Imports that only serve type checking obey the
same table. Rooms are listed from the bottom up.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "aserve"

BASE = {"errors", "registry", "log", "messages", "packaged"}
SETTINGS = BASE | {"config", "args"}
COMPUTE = {"ops", "attention", "quantization", "lora", "sampling", "distributed"}

ALLOWED: dict[str, set[str]] = {
    # 0: data and names
    "errors": set(),
    "registry": {"errors"},
    "log": {"errors"},
    "messages": {"errors"},
    "packaged": {"errors"},
    "metrics": {"errors"},
    "faults": set(),
    "threads": set(),
    "pipes": set(),
    # 1: settings
    "gguf": BASE,
    "config": SETTINGS | {"gguf"},
    "args": SETTINGS,
    # 2: the decision, and text
    "core": SETTINGS,
    "tokenizer": SETTINGS | {"gguf"},
    "guided": SETTINGS | {"pipes"},
    "multimodal": SETTINGS,
    # 3: computing
    **{room: SETTINGS | COMPUTE for room in COMPUTE},
    # 4: models
    "model": SETTINGS | COMPUTE | {"gguf"},
    "speculative": SETTINGS | COMPUTE,
    # 5 and 6: one process' device, and the way to it
    "worker": SETTINGS | COMPUTE | {"model", "speculative", "guided"},
    "executor": SETTINGS,
    # 7: the running engine
    "engine": SETTINGS | {"core", "tokenizer", "guided", "multimodal", "executor", "metrics"},
    # 8: what people call
    "llm": SETTINGS | {"engine", "metrics"},
    "server": SETTINGS | {"engine", "metrics", "pipes", "threads"},
    # measuring and planning, each a command of its own
    "bench": SETTINGS
    | {
        "gguf",
        "tokenizer",
        "ops",
        "model",
        "worker",
        "executor",
        "engine",
        "llm",
        "metrics",
        "server",
        "threads",
    },
    "simulate": SETTINGS | {"core", "bench"},
    # proving and timing the kernels and the engine on a GPU
    "gpu_check": SETTINGS | COMPUTE | {"model", "bench", "engine", "llm"},
    # serving a file
    "batch": SETTINGS | {"engine", "server"},
    # 9: entry points
    "app": SETTINGS | {"server", "threads"},
    "__main__": {"server"},
    "__init__": {"threads"},
}

ALLOWED_MODULES = {"server": {"aserve.tokenizer.chat", "aserve.__version__"}}
"""Single modules of a room that is otherwise closed."""

ALLOWED_INSIDE_FUNCTIONS = {
    "executor": {"worker"},
    "server": {"bench", "simulate", "batch", "gpu_check"},
    "simulate": {"engine"},
}
"""The thread or process that runs a worker is the one that imports it; a command is imported when called."""

PURE = {"torch", "transformers", "asyncio", "threading"}
DEVICE = {"torch", "transformers"}
WEB = {"quart", "hypercorn", "sse_starlette", "asyncio", "anyio"}

FORBIDDEN: dict[str, set[str]] = {
    **dict.fromkeys(("errors", "registry", "log", "messages", "packaged", "metrics", "core"), PURE | WEB),
    "tokenizer": {"torch"} | WEB,
    **dict.fromkeys(("model", "worker", *COMPUTE), WEB),
    "engine": DEVICE | {"quart", "hypercorn", "sse_starlette"},
    "server": DEVICE,
    "simulate": DEVICE,
}
"""Packages a room may not import anywhere, not even inside a function."""

LAZY: dict[str, set[str]] = {room: DEVICE for room in ("args", "config", "gguf", "llm", "app", "tokenizer")}
"""Packages a room may import inside functions only (or for types), so that importing it stays quick."""


@dataclass(frozen=True)
class Imported:
    name: str
    where: str
    room: str
    deferred: bool
    typing_only: bool


def imports_of(path: Path) -> Iterator[Imported]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))

    def visit(node: ast.AST, deferred: bool, typing_only: bool) -> Iterator[Imported]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            for name in names:
                where = f"{path.relative_to(PACKAGE.parent)}:{child.lineno}"
                yield Imported(name, where, parts[0], deferred, typing_only)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, deferred or function, typing_only or guarded)

    yield from visit(tree, False, False)


SOURCES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def borders_crossed(found: Imported) -> str | None:
    """What is wrong with an import, or None."""
    package, _, rest = found.name.partition(".")
    if package != "aserve":
        if package in FORBIDDEN.get(found.room, ()) and not found.typing_only:
            return f"{found.where}: {found.room} must not import {package}"
        if package in LAZY.get(found.room, ()) and not (found.deferred or found.typing_only):
            return f"{found.where}: {found.room} may import {package} only inside functions"
        return None
    room = rest.split(".")[0]
    if not room or room == found.room or room == "__version__":
        return None
    if not (PACKAGE / room).is_dir() and not (PACKAGE / f"{room}.py").is_file():
        return None  # a public name, resolved lazily
    if room in ALLOWED[found.room]:
        return None
    if room in ALLOWED_INSIDE_FUNCTIONS.get(found.room, ()) and (found.deferred or found.typing_only):
        return None
    modules = ALLOWED_MODULES.get(found.room, set())
    if any(found.name == module or found.name.startswith(module + ".") for module in modules):
        return None
    return f"{found.where}: {found.room} must not import {found.name}"


def test_every_room_is_listed() -> None:
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in SOURCES}
    assert rooms <= ALLOWED.keys(), f"say what these may import: {sorted(rooms - ALLOWED.keys())}"


def test_the_reader_finds_imports() -> None:
    assert len(IMPORTS) > 100
    assert any(found.room == "core" and found.name.startswith("aserve.messages.") for found in IMPORTS)


def test_imports_stay_inside_their_borders() -> None:
    wrong = [message for found in IMPORTS if (message := borders_crossed(found))]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "name", "deferred", "typing_only"),
    [
        ("core", "torch.nn", True, False),
        ("core", "aserve.engine.loop", False, True),
        ("messages", "aserve.config.model", False, False),
        ("config", "transformers.AutoConfig", False, False),
        ("executor", "aserve.worker.worker.Worker", False, False),
        ("server", "aserve.core.scheduler", False, False),
        ("server", "aserve.tokenizer.loader", False, False),
        ("worker", "quart.Quart", True, False),
        ("engine", "aserve.model.llama", True, False),
    ],
)
def test_a_crossing_is_seen(room: str, name: str, deferred: bool, typing_only: bool) -> None:
    message = borders_crossed(Imported(name, "aserve/x.py:7", room, deferred, typing_only))
    assert message is not None and message.startswith("aserve/x.py:7: ")


def test_only_ops_reaches_the_extension() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: torch.ops"
        for path in SOURCES
        if not path.is_relative_to(PACKAGE / "ops")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops"
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def loaded_after(statement: str) -> set[str]:
    """Top-level names of the modules loaded once ``statement`` has run in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=PACKAGE.parent,
    )
    return set(done.stdout.split())


def every_module_of(room: str) -> str:
    paths = [path for path in SOURCES if path.is_relative_to(PACKAGE / room)]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    return "\n".join(f"import {name.removesuffix('.__init__')}" for name in names)


def test_core_loads_neither_torch_nor_asyncio() -> None:
    loaded = loaded_after(every_module_of("core"))
    assert "aserve" in loaded
    assert not loaded & {"torch", "transformers", "asyncio", "numpy", "quart"}


def test_the_command_line_loads_no_torch() -> None:
    loaded = loaded_after("import aserve.args, aserve.server.cli")
    assert not loaded & {"torch", "transformers", "quart"}


def test_a_worker_loads_no_web_server() -> None:
    assert not loaded_after("import aserve.worker.worker") & {"quart", "hypercorn", "sse_starlette"}


def test_the_top_level_holds_nothing_else() -> None:
    packages = {"aserve", "cuda_ext", "tests", "load_tests", "examples"}
    files = {"pyproject.toml", "setup_ext.py", "README.md", "Makefile", "LICENSE"}
    made = {"build", "dist", "aserve.egg-info", "__pycache__"}
    found = {path.name for path in PACKAGE.parent.iterdir() if not path.name.startswith(".")}
    assert packages | files <= found
    assert found <= packages | files | made
