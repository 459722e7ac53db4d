"""Models with weights set to zero, from path to path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from prune_helpers import CALIBRATED, Notes, prune, values
from transformers import AutoModelForCausalLM

from models import make_tiny, to_gguf
from nybble.checkpoint import open_checkpoint
from nybble.compress.prune.masks import magnitude_mask, num_pruned
from nybble.core.errors import CheckpointError, ConfigError, OutputError

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")


@pytest.mark.unit
def test_magnitude_prunes_each_linear_as_torch_does_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    result = prune(llama, tmp_path / "out", method="magnitude", amount=0.5)
    before, after = values(llama), values(tmp_path / "out")
    for name, weight in before.items():
        if name.startswith("layers.") and weight.ndim == 2:
            expected = weight * magnitude_mask(torch.from_numpy(weight), 0.5).numpy()
            np.testing.assert_array_equal(after[name], expected)
        else:
            np.testing.assert_array_equal(after[name], weight)
    assert result.figures["sparsity"] == 0.5
    assert result.figures["bytes_after"] == sum(
        t.data.nbytes for t in open_checkpoint(tmp_path / "out").tensors.values()
    )


@pytest.mark.unit
def test_the_global_scope_takes_the_smallest_of_all_linears(llama: Path, tmp_path: Path) -> None:
    prune(llama, tmp_path / "out", method="magnitude", amount=0.3, scope="global")
    names = [name for name, weight in values(llama).items() if name.startswith("layers.") and weight.ndim == 2]
    before = np.concatenate([np.abs(values(llama)[name]).ravel() for name in names])
    after = np.concatenate([values(tmp_path / "out")[name].ravel() for name in names])
    gone = after == 0
    assert int(gone.sum()) == num_pruned(0.3, before.size)
    assert before[gone].max() <= before[~gone].min()


@pytest.mark.unit
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [{"amount": 0.5}, {"nm": "2:4"}])
def test_every_method_leaves_the_share_that_was_asked_for(
    llama: Path, text: Path, tmp_path: Path, method: str, pattern: dict[str, object]
) -> None:
    more = {} if method == "magnitude" else {**CALIBRATED, "calibrate": str(text)}
    notes = Notes()
    prune(llama, tmp_path / "out", notes, method=method, **pattern, **more)
    for name, weight in values(tmp_path / "out").items():
        if name.startswith("layers.") and name.endswith(LINEARS):
            assert (weight == 0).mean() == 0.5, name
            if "nm" in pattern:
                assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert notes.done == notes.total
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # others can read it
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5


@pytest.mark.unit
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_other_families_keep_their_names_and_rows(family: str, text: Path, tmp_path: Path) -> None:
    source = make_tiny(family, tmp_path / "model")
    prune(source, tmp_path / "out", method="sparsegpt", amount=0.25, calibrate=str(text), **CALIBRATED)
    before, after = values(source), values(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if weight.ndim == 1 or not name.startswith("layers."):
            np.testing.assert_allclose(after[name], weight, rtol=1e-3, atol=1e-3)
    assert 0.2 < (after["layers.0.ffn.gate"] == 0).mean() < 0.3
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.unit
def test_a_gguf_file_becomes_a_gguf_file_with_all_its_keys(llama: Path, tmp_path: Path) -> None:
    source = to_gguf(llama, tmp_path / "model.gguf", "F32")
    prune(source, tmp_path / "out.gguf", method="magnitude", nm="2:4")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out.gguf")
    differing = {key for key in before.metadata if str(before.metadata[key]) != str(after.metadata.get(key))}
    assert differing <= {"general.file_type", "general.quantization_version", "general.alignment"}
    assert after.spec == before.spec
    for name, tensor in after.tensors.items():
        if name.endswith("ffn.up"):
            kept = tensor.to_float32()
            was = before.tensors[name].to_float32()
            np.testing.assert_allclose(kept[kept != 0], was[kept != 0], rtol=1e-3)


@pytest.mark.unit
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "sparsegpt", "amount": 0.5, "calibrate": str(text), **CALIBRATED}
    prune(llama, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out", Notes(interrupt_at="layers.2"), **options)
    assert (tmp_path / "out.partial" / "layer-0001.safetensors").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="go on with --resume, or start again with --force"):
        prune(llama, tmp_path / "out", **options)
    notes = Notes()
    prune(llama, tmp_path / "out", notes, resume=True, **options)
    assert "2 layers are finished already, from an earlier run" in notes.notes
    assert not (tmp_path / "out.partial").exists()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.unit
def test_unfinished_work_for_other_options_is_not_used(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out", Notes(interrupt_at="layers.2"), method="magnitude", amount=0.9)
    prune(llama, tmp_path / "out", resume=True, method="magnitude", amount=0.25)
    assert all(
        (weight == 0).mean() == 0.25 for name, weight in values(tmp_path / "out").items() if name.endswith("ffn.up")
    )


@pytest.mark.unit
def test_a_float32_folder_stays_float32(llama: Path, tmp_path: Path) -> None:
    prune(llama, tmp_path / "out", method="magnitude", amount=0.1)
    formats = {tensor.format.name for tensor in open_checkpoint(tmp_path / "out").tensors.values()}
    assert formats == {tensor.format.name for tensor in open_checkpoint(llama).tensors.values()} == {"F32"}


@pytest.mark.unit
def test_bad_input_is_refused_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        prune(llama, tmp_path / "there", method="magnitude", amount=0.5)
    with pytest.raises(ConfigError, match="is the source"):
        prune(llama, llama, method="magnitude", amount=0.5, force=True)
    with pytest.raises(ConfigError, match="groups of 24 inputs do not fill the 64 inputs"):
        prune(llama, tmp_path / "out", method="magnitude", nm="12:24")
    with pytest.raises(ConfigError, match="too short"):
        (tmp_path / "short.txt").write_text("too short")
        prune(llama, tmp_path / "out", method="wanda", amount=0.5, calibrate=str(tmp_path / "short.txt"))
    damaged = make_tiny("llama", tmp_path / "damaged")
    _put_nan(damaged)
    with pytest.raises(CheckpointError, match="NaN"):
        prune(damaged, tmp_path / "out", method="magnitude", amount=0.5)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def _put_nan(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
