"""Load formats: what is read, what is passed over, and what is said when there is nothing to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aserve import registry
from aserve.errors import ConfigError
from aserve.model.base import Model
from tests.model import tiny
from tests.model.paged import load, whole_logits


def check(folder: Path, reference: Any, **settings: Any) -> Model:
    """Loads ``folder`` and compares its logits with the model that was saved."""
    model = load(folder, reference.config, 50, **settings)
    tokens = tiny.tokens()
    expected = tiny.reference_logits(reference, tokens)
    torch.testing.assert_close(whole_logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
    return model


def save_bin(reference: Any, folder: Path, name: str = "pytorch_model.bin") -> Path:
    reference.config.save_pretrained(folder)
    torch.save(reference.state_dict(), folder / name)
    return folder


def test_sharded_safetensors_reads_only_what_the_index_lists(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save_file({"tok_embeddings.weight": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    check(tmp_path, reference)
    check(tmp_path, reference, load_format="safetensors")


def test_index_that_lists_an_absent_file(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=f"lists files that are not there: {gone.name}"):
        load(tmp_path, reference.config, 50)


def test_index_that_is_no_index(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": 1}')
    with pytest.raises(ConfigError, match="is not a safetensors index"):
        load(tmp_path, reference.config, 50)


def test_truncated_safetensors(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load(tmp_path, reference.config, 50)


@pytest.mark.parametrize(("load_format", "name"), [("auto", "pytorch_model.bin"), ("pt", "model.pt")])
def test_torch_checkpoints(load_format: str, name: str, tmp_path: Path) -> None:
    reference = tiny.model("qwen2")
    save_bin(reference, tmp_path, name)
    torch.save({"lr": torch.zeros(1)}, tmp_path / "training_args.bin")
    torch.save({"state": torch.zeros(1)}, tmp_path / "optimizer.pt")
    check(tmp_path, reference, load_format=load_format)


def test_pt_format_reads_bin_where_there_is_no_pt(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    save_bin(reference, tmp_path)
    torch.save({"state": torch.zeros(1)}, tmp_path / "optimizer.pt")
    check(tmp_path, reference, load_format="pt")


def test_old_style_torch_file_and_nested_state(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    reference.config.save_pretrained(tmp_path)
    torch.save(
        {"state_dict": reference.state_dict(), "step": 3},
        tmp_path / "model.pt",
        _use_new_zipfile_serialization=False,
    )
    check(tmp_path, reference)


def test_auto_prefers_safetensors(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    check(tmp_path, reference)


class Shell:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    reference = tiny.model("llama")
    reference.config.save_pretrained(tmp_path)
    marker = tmp_path / "ran"
    torch.save({"x": Shell(marker)}, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match="not a checkpoint of plain tensors"):
        load(tmp_path, reference.config, 50)
    assert not marker.exists()


def test_torch_file_without_tensors_by_name(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="holds a list, not tensors by name"):
        load(tmp_path, tiny.model("llama").config, 50)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 not a zip", bytes(64), b"\x80\x02("])
def test_garbage_torch_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="not a checkpoint of plain tensors"):
        load(tmp_path, tiny.model("llama").config, 50)


@pytest.mark.parametrize(
    ("load_format", "patterns"),
    [
        ("auto", r"\*.safetensors, \*.bin, \*.pt"),
        ("safetensors", r"\*.safetensors"),
        ("pt", r"\*.pt, \*.bin"),
    ],
)
def test_no_files_names_the_folder_and_the_format(load_format: str, patterns: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"'{load_format}' \({patterns}\) in {tmp_path}"):
        load(tmp_path, tiny.model("llama").config, 50, load_format=load_format)


def test_model_that_is_neither_local_nor_on_the_hub() -> None:
    with pytest.raises(ConfigError, match="'nobody/nothing' is neither a local path nor"):
        load("nobody/nothing", tiny.model("llama").config, 50)


def test_gguf_format_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs the path of a .gguf file"):
        load(tmp_path, tiny.model("llama").config, 50, load_format="gguf")


def test_extra_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no model_loader_extra_config"):
        load(tmp_path, tiny.model("llama").config, 50, extra_config={"pattern": "x"})


def test_missing_and_unexpected_names_are_listed(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.layers.9.extra"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, reference.config, 50)
    assert "missing: model.layers.1.mlp.down_proj.weight;" in str(caught.value)
    assert "unexpected: model.layers.9.extra" in str(caught.value)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path)
    config = tiny.make("llama", intermediate_size=96).config
    with pytest.raises(ConfigError, match=r"down_proj.weight has shape \[48, 80\].*needs \[48, 96\]"):
        load(tmp_path, config, 50)


def test_untied_head_must_be_in_the_checkpoint(tmp_path: Path) -> None:
    tied = tiny.make("llama", tie_word_embeddings=True)
    tiny.save(tied, tmp_path)
    tied.config.tie_word_embeddings = False
    with pytest.raises(ConfigError, match=r"missing: lm_head.weight$"):
        load(tmp_path, tied.config, 50)


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    """OPT saved without its head's prefix; Llama with its rotary frequencies; a tied head saved twice."""
    reference = tiny.make("opt")
    state = {name.removeprefix("model."): tensor for name, tensor in reference.state_dict().items()}
    reference.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert "decoder.embed_tokens.weight" in state and "lm_head.weight" in state
    check(tmp_path, reference)

    reference = tiny.make("llama")
    folder = tmp_path / "llama"
    folder.mkdir()
    state = reference.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    torch.save(state, folder / "pytorch_model.bin")
    check(folder, reference)


def test_dummy_weights_are_small_and_the_same_every_time(tmp_path: Path) -> None:
    config = tiny.model("qwen3").config
    first = load(tmp_path, config, 50, load_format="dummy")
    second = load(tmp_path, config, 50, load_format="dummy")
    names = first.build.table.shapes()
    assert "model.layers.2.self_attn.k_norm.weight" in names
    ids = torch.arange(tiny.VOCABULARY)
    rows = first.embedding.lookup_float(ids)  # type: ignore[attr-defined]
    assert torch.equal(rows, second.embedding.lookup_float(ids))  # type: ignore[attr-defined]
    assert 9e-4 < rows.abs().max() <= 1e-3
    norms = [layer.k_norm.weight for layer in first.layers]  # type: ignore[attr-defined]
    assert torch.equal(norms[0], second.layers[0].k_norm.weight)  # type: ignore[attr-defined]
    assert not torch.equal(norms[0], norms[1])
    assert whole_logits(first, tiny.tokens(5)).isfinite().all()


def test_weights_can_be_loaded_again_in_place(tmp_path: Path) -> None:
    reference, other = tiny.make("gemma3"), tiny.make("gemma3-untied")
    tiny.save(reference, tmp_path)
    with torch.inference_mode():
        model = load(tmp_path, reference.config, 50)
    before = whole_logits(model, tiny.tokens())
    model.load_weights(iter(reference.state_dict().items()))
    torch.testing.assert_close(whole_logits(model, tiny.tokens()), before)
    with pytest.raises(ConfigError, match="unexpected"):
        model.load_weights(iter(other.state_dict().items()))


def test_config_in_the_style_of_transformers_4(tmp_path: Path) -> None:
    reference = tiny.make("rope-linear")
    tiny.save(reference, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    raw["torch_dtype"] = raw.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    from transformers import AutoConfig

    model = load(tmp_path, AutoConfig.from_pretrained(tmp_path), 50)
    tokens = tiny.tokens()
    torch.testing.assert_close(
        whole_logits(model, tokens), tiny.reference_logits(reference, tokens), atol=1e-4, rtol=1e-4
    )


def test_every_built_load_format_is_a_loader() -> None:
    from aserve.model.loader.base import Loader

    for name in ("auto", "dummy", "gguf", "pt", "safetensors"):
        loader = registry.loaders.load(name)
        assert issubclass(loader, Loader) and loader.format == name


def test_loading_leaves_the_thread_count_alone(tmp_path: Path) -> None:
    reference = tiny.model("llama")
    tiny.save(reference, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load(tmp_path, reference.config, 50)
        assert torch.get_num_threads() == 2
        with pytest.raises(ConfigError):
            load(tmp_path, reference.config, 50, load_format="pt")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
