"""Models with fewer layers, neurons and heads: what they compute, and who can read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune_helpers import CALIBRATED, TOKENS, Notes, logits, prune, values
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from models import make_tiny, to_gguf
from nybble.backends.cpu import CpuModel
from nybble.checkpoint import open_checkpoint
from nybble.compress.methods import Silent
from nybble.compress.prune.run import check_sayable
from nybble.compress.safetensors.model import open_folder_model
from nybble.core.errors import CheckpointError, ConfigError
from nybble.evaluate.windows import window_logits


def native_logits(path: Path) -> torch.Tensor:
    """Of the engine's own kernels, for the same tokens."""
    checkpoint = open_checkpoint(path)
    model = CpuModel.load(checkpoint, context=64, threads=1)
    model.new_cache(8)
    rows = [np.concatenate([part for _, part in window_logits(model, one, first_row=0)]) for one in TOKENS.tolist()]
    return torch.from_numpy(np.stack(rows))


def lopsided(folder: Path) -> Path:
    """The same model, but most neurons of its second layer say hardly anything."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][24:] *= 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same but for activations in 8 bits."""
    return float((a - b).norm() / b.norm()) < 0.03


@pytest.mark.unit
def test_the_layers_that_stay_are_the_ones_that_were(llama: Path, text: Path, tmp_path: Path) -> None:
    result = prune(llama, tmp_path / "out", drop_layers=2, calibrate=str(text), **CALIBRATED)
    gone = result.figures["removed_layers"]
    scores = result.figures["influence_of_each_layer"]
    assert isinstance(gone, list) and isinstance(scores, list)
    assert gone == sorted(sorted(range(4), key=lambda i: scores[i])[:2])
    before, after = values(llama), values(tmp_path / "out")
    kept = [i for i in range(4) if i not in gone]
    for new, old in enumerate(kept):
        for name in ("attn.q", "ffn.down", "attn_norm"):
            np.testing.assert_array_equal(after[f"layers.{new}.{name}"], before[f"layers.{old}.{name}"])
    assert "layers.2.attn.q" not in after
    assert result.figures["parameters_after"] == sum(weight.size for weight in after.values())
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits,
        logits(tmp_path / "out"),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.unit
def test_by_loss_takes_the_layers_whose_absence_costs_least(llama: Path, text: Path, tmp_path: Path) -> None:
    notes = Notes()
    sizes = {"calibration_samples": 4, "calibration_tokens": 32}
    result = prune(llama, tmp_path / "one", notes, drop_layers=1, by="loss", calibrate=str(text), **sizes)
    losses = []
    for index in range(4):  # each layer taken out by hand
        losses.append(_loss_without(llama, {index}, text, sizes))
    assert result.figures["removed_layers"] == [int(np.argmin(losses))]
    np.testing.assert_allclose(result.figures["loss_after_each_removal"], [min(losses)], rtol=1e-5)
    assert notes.done <= notes.total * 1.3
    two = prune(llama, tmp_path / "two", drop_layers=2, by="loss", calibrate=str(text), **sizes)
    first = int(np.argmin(losses))
    pairs = {index: _loss_without(llama, {first, index}, text, sizes) for index in range(4) if index != first}
    assert two.figures["removed_layers"] == sorted([first, min(pairs, key=lambda i: pairs[i])])


def _loss_without(path: Path, gone: set[int], text: Path, sizes: dict[str, int]) -> float:
    from nybble.backends.torch import TorchDecoder
    from nybble.compress.calibration.samples import load_calibration
    from nybble.compress.safetensors.options import Options

    checkpoint = open_checkpoint(path)
    ids = torch.from_numpy(
        load_calibration(checkpoint, Options("test", {"calibrate": str(text), **sizes}), Silent()).token_ids
    )
    decoder = TorchDecoder(checkpoint)
    with torch.no_grad():
        x = decoder.embed(ids)
        for index in range(4):
            if index not in gone:
                x = decoder.layer(index, ids.shape[1]).forward(x)
        found = decoder.final(x)
    return float(torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


SHAPES: list[dict[str, Any]] = [
    {"ffn_width": 0.5},
    {"heads": 0.5},
    {"kv_groups": 0.5},
    {"ffn_width": 0.75, "heads": 0.5, "kv_groups": 0.5},
]


@pytest.mark.unit
@pytest.mark.parametrize("shares", SHAPES, ids=str)
@pytest.mark.parametrize("compensate", ["refit", "none"])
def test_narrow_models_are_folders_that_everybody_computes_alike(
    llama: Path, text: Path, tmp_path: Path, shares: dict[str, Any], compensate: str
) -> None:
    notes = Notes()
    prune(llama, tmp_path / "out", notes, **shares, compensate=compensate, calibrate=str(text), **CALIBRATED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups, per_group = round(4 * shares.get("kv_groups", 1)), round(2 * shares.get("heads", 1))
    assert (config["num_key_value_heads"], config["num_attention_heads"]) == (groups, groups * per_group)
    assert config["intermediate_size"] == 128 * shares.get("ffn_width", 1)
    assert notes.done == notes.total
    ours = logits(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert close(native_logits(tmp_path / "out"), ours)


@pytest.mark.unit
def test_refitting_brings_the_outputs_nearer_to_the_old_ones(llama: Path, text: Path, tmp_path: Path) -> None:
    errors = {}
    for how in ("refit", "none"):
        result = prune(
            llama, tmp_path / how, ffn_width=0.5, heads=0.5, compensate=how, calibrate=str(text), **CALIBRATED
        )
        errors[how] = [float(str(result.figures[f"mean_{part}_output_error"])) for part in ("attention", "ffn")]
    assert all(ours < 0.8 * theirs for ours, theirs in zip(errors["refit"], errors["none"], strict=True))


@pytest.mark.unit
def test_all_units_kept_in_their_old_order_change_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    prune(llama, tmp_path / "out", ffn_width=0.5, kv_groups=1.0, compensate="none", calibrate=str(text), **CALIBRATED)
    before, after = values(llama), values(tmp_path / "out")
    rows = [np.flatnonzero((before["layers.0.ffn.up"] == row).all(1))[0] for row in after["layers.0.ffn.up"]]
    assert rows == sorted(rows)
    np.testing.assert_array_equal(after["layers.0.ffn.gate"], before["layers.0.ffn.gate"][rows])
    np.testing.assert_array_equal(after["layers.0.ffn.down"], before["layers.0.ffn.down"][:, rows])
    np.testing.assert_array_equal(after["layers.0.attn.q"], before["layers.0.attn.q"])


@pytest.mark.unit
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_that_differ_are_a_gguf_file_with_arrays_that_we_serve(family: str, text: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    source = lopsided(make_tiny(family, tmp_path / "model", intermediate_size=128, **sizes))
    options = {"ffn_width": 0.5, "kv_groups": 0.5, "scope": "global", "round_to": 8, "calibrate": str(text)}
    prune(source, tmp_path / "out.gguf", **options, **CALIBRATED)
    checkpoint = open_checkpoint(tmp_path / "out.gguf")
    widths = [layer.ffn_size for layer in checkpoint.spec.layers]
    groups = [layer.num_kv_heads for layer in checkpoint.spec.layers]
    assert len(set(widths)) > 1 and sum(widths) == 4 * 64 and sum(groups) == 8
    assert checkpoint.metadata["general.architecture"] == "deci"
    assert list(checkpoint.metadata["deci.feed_forward_length"]) == widths  # type: ignore[call-overload]
    assert close(native_logits(tmp_path / "out.gguf"), logits(tmp_path / "out.gguf"))
    # The same from a GGUF file, which keeps its own keys and interleaves rows where it has to.
    again = to_gguf(source, tmp_path / "model.gguf", "F32")
    prune(again, tmp_path / "again.gguf", **options, **CALIBRATED)
    torch.testing.assert_close(logits(tmp_path / "again.gguf"), logits(tmp_path / "out.gguf"), rtol=2e-2, atol=2e-2)


@pytest.mark.unit
def test_layers_that_differ_are_refused_where_the_format_cannot_say_it(text: Path, tmp_path: Path) -> None:
    options = {"ffn_width": 0.5, "scope": "global", "round_to": 8, "calibrate": str(text), **CALIBRATED}
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    llama = lopsided(make_tiny("llama", tmp_path / "llama", **sizes))
    with pytest.raises(ConfigError, match=r"differ in feed-forward neurons.*write a GGUF file"):
        prune(llama, tmp_path / "out", **options)
    gemma = make_tiny("gemma3", tmp_path / "gemma")
    with pytest.raises(CheckpointError, match="gemma3 whose layers differ in width"):
        prune(gemma, tmp_path / "out.gguf", **options)
    model = open_folder_model(gemma)
    shorter = replace(model.spec, layers=model.spec.layers[1:])
    with pytest.raises(CheckpointError, match="sliding layers are not the usual ones"):
        check_sayable(model, shorter, list(range(1, 7)), is_file=True)
    check_sayable(model, shorter, list(range(1, 7)), is_file=False)
    with pytest.raises(ConfigError, match="3 heads do not divide the 64 of hidden_size, which transformers"):
        prune(llama, tmp_path / "out", heads=0.5, kv_groups=0.75, calibrate=str(text), **CALIBRATED)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.unit
def test_gemma_keeps_the_kinds_of_its_layers_in_a_folder(text: Path, tmp_path: Path) -> None:
    gemma = make_tiny("gemma3", tmp_path / "gemma")
    result = prune(gemma, tmp_path / "out", drop_layers=2, calibrate=str(text), **CALIBRATED)
    kinds = json.loads((gemma / "config.json").read_text())["layer_types"]
    gone = result.figures["removed_layers"]
    assert isinstance(gone, list)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == [
        kind for i, kind in enumerate(kinds) if i not in gone
    ]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()(TOKENS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_bias_behind_attention_holds_the_mean_of_heads_that_went(
    llama: Path, text: Path, tmp_path: Path, name: str
) -> None:
    prune(llama, tmp_path / name, kv_groups=0.5, compensate="bias", calibrate=str(text), **CALIBRATED)
    found = values(tmp_path / name)
    assert np.abs(found["layers.1.attn.o.bias"]).max() > 0 and not found["layers.1.attn.q.bias"].any()
    assert close(native_logits(tmp_path / name), logits(tmp_path / name))
    if name == "out":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)(TOKENS).logits
        torch.testing.assert_close(logits(tmp_path / name), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.unit
def test_an_interrupted_narrowing_goes_on(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"ffn_width": 0.5, "scope": "global", "round_to": 8, "calibrate": str(text), **CALIBRATED}
    prune(llama, tmp_path / "whole.gguf", **options)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out.gguf", Notes(interrupt_at="layer 2"), **options)
    assert not (tmp_path / "out.gguf").exists()
    prune(llama, tmp_path / "out.gguf", resume=True, **options)
    torch.testing.assert_close(logits(tmp_path / "out.gguf"), logits(tmp_path / "whole.gguf"), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


@pytest.mark.unit
def test_shapes_that_cannot_be_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 4 layers, of which at least one must stay"):
        prune(llama, tmp_path / "out", drop_layers=4)
    with pytest.raises(ConfigError, match="ask for smaller shares"):
        prune(llama, tmp_path / "out", heads=1.0)
    qwen = make_tiny("qwen2", tmp_path / "qwen")
    with pytest.raises(ConfigError, match="family qwen2 has no room for"):
        prune(qwen, tmp_path / "out", heads=0.5, compensate="bias")
