"""Every type gives a folder that opens, and every way in which a folder can go wrong is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folder_helpers import TOKENS, Notes, calibrated, errors_of, logits, quantisation, run
from safetensors.torch import load_file, save_file

from models import FAMILIES, make_tiny, to_gguf
from nybble.checkpoint import open_checkpoint
from nybble.compress.safetensors import run as walk
from nybble.core.errors import CheckpointError, ConfigError, OutputError
from nybble.tokenizer import load_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

# Type -> how far logits of a random model may be from the original's, as a share of their spread.
TYPES = {
    "fp16": 0.01, "bf16": 0.05, "fp8": 0.4, "int8": 0.1, "int4": 0.7, "int3": 1.2, "int2": 1.6, "llm-int8": 0.1,
    "nf4": 0.7, "fp4": 0.8, "gptq-4bit": 0.7, "gptq-8bit": 0.1, "awq-4bit": 0.7,
}  # fmt: skip


@pytest.mark.parametrize("to", TYPES)
def test_every_type_computes_nearly_the_same(llama: Path, text: Path, tmp_path: Path, to: str) -> None:
    options = calibrated(text) if to.startswith(("gptq", "awq")) else {}
    progress = Notes()
    report = run(llama, tmp_path / "out", to, progress, **options)
    assert progress.done == progress.total > 0
    expected, found = logits(llama), logits(tmp_path / "out")
    assert (found - expected).square().mean().sqrt() < TYPES[to] * expected.std()
    file = tmp_path / "out" / "model.safetensors"
    assert report.target_bytes == file.stat().st_size
    assert sum(size for _, size in report.by_type.values()) <= report.target_bytes
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    tokenizer = load_tokenizer(open_checkpoint(tmp_path / "out").tokenizer)
    assert tokenizer.decode(tokenizer.encode("the lower", add_special=False)) == "the lower"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", ["nf4", "gptq-4bit", "awq-4bit"])
def test_every_family(tmp_path: Path, text: Path, family: str, to: str) -> None:
    source = make_tiny(family, tmp_path / "model")
    options = calibrated(text) if to in ("gptq-4bit", "awq-4bit") else {}
    run(source, tmp_path / "out", to, **options)
    expected, found = logits(source), logits(tmp_path / "out")
    assert (found - expected).square().mean().sqrt() < 0.9 * expected.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_becomes_the_folder_that_it_came_from(tmp_path: Path, family: str) -> None:
    pytest.importorskip("gguf")
    folder = make_tiny(family, tmp_path / "model")
    file = to_gguf(folder, tmp_path / "m.gguf")
    for source, target in ((folder, "a"), (file, "b")):
        run(source, tmp_path / target, "fp16")
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        # A Gemma norm is kept less one, which may round to the next number of 16 bits.
        far = 5e-4 if family.startswith("gemma") and "norm" in name else 1e-7
        np.testing.assert_allclose(b.tensors[name].to_float32(), tensor.to_float32(), rtol=0, atol=far, err_msg=name)
    np.testing.assert_allclose(logits(tmp_path / "b"), logits(tmp_path / "a"), atol=2e-3)
    probe = "the lower and <|eos|> \u00fc 12\n x"
    tokens = [load_tokenizer(c.tokenizer).encode(probe, add_special=True, parse_special=True) for c in (a, b)]
    assert tokens[0] == tokens[1]
    assert a.eos_token_ids == b.eos_token_ids
    assert a.chat_template == b.chat_template


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "linear", "factor": 4.0},
    ],
)  # fmt: skip
def test_rope_scaling_comes_back_from_gguf(tmp_path: Path, rope: dict[str, Any]) -> None:
    pytest.importorskip("gguf")
    folder = make_tiny("llama", tmp_path / "model", rope_parameters={**rope, "rope_theta": 10000.0})
    run(to_gguf(folder, tmp_path / "m.gguf"), tmp_path / "out", "fp16")
    run(folder, tmp_path / "same", "fp16")
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(tmp_path / "same"), atol=1e-4)


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    file = to_gguf(make_tiny("gemma3", tmp_path / "model"), tmp_path / "m.gguf")
    run(file, tmp_path / "out", "bf16")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-4


@pytest.mark.parametrize("to", TYPES)
def test_a_dry_run_says_what_would_be(llama: Path, text: Path, tmp_path: Path, to: str) -> None:
    """The size to the byte, headers too; linears that are left out are counted as what they stay."""
    options = calibrated(text) if to.startswith(("gptq", "awq")) else {}
    left_out = {"tensors": (("v_proj", "fp16"),)} if to not in ("fp16", "bf16") else {}
    dry = run(llama, tmp_path / "out", to, dry_run=True, **options, **left_out)
    assert not list(tmp_path.iterdir())
    assert dry.peak_bytes > 0
    assert dry.notes[-1].startswith("it would take about ")
    done = run(llama, tmp_path / "out", to, **options, **left_out)
    assert dry.by_type == done.by_type
    assert dry.target_bytes == done.target_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_dry_run_counts_the_model_that_writes(text: Path, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", vocab_size=1024, num_hidden_layers=8)
    few = {"calibration_samples": 4, "calibration_tokens": 8}
    read = run(model, tmp_path / "out", "gptq-4bit", dry_run=True, calibrate=str(text), **few)
    written = run(model, tmp_path / "out", "gptq-4bit", dry_run=True, calibrate="self", **few)
    weights = sum(np.prod(tensor.shape) for tensor in open_checkpoint(model).tensors.values())
    assert written.peak_bytes > max(read.peak_bytes, weights)


@pytest.mark.parametrize("to", ["gptq-4bit", "awq-4bit", "int4"])
def test_it_goes_on_where_it_was_interrupted(
    llama: Path, text: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**calibrated(text), "report": True}
    whole, target = tmp_path / "whole", tmp_path / "out"
    run(llama, whole, to, **options)
    write, written = walk.write_safetensors, []

    def interrupted(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "layer-0001.safetensors":
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(walk, "write_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(llama, target, to, **options)
    assert written == ["layer-0000.safetensors"]
    assert not target.exists()
    progress = Notes()
    run(llama, target, to, progress, **options)
    assert "1 of 2 layers are finished already, from an earlier run" in progress.notes
    assert progress.done == progress.total
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert errors_of(target) == errors_of(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_other_options_start_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(walk, "_join", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", "int4")
    progress = Notes()
    run(llama, tmp_path / "out", "int4", progress, group_size=32)
    assert not [note for note in progress.notes if "earlier run" in note]
    assert quantisation(tmp_path / "out")["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_existing_outputs_stay(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(llama, target, "int8")
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="replace it with --force"):
        run(llama, target, "int4")
    assert (target / "model.safetensors").read_bytes() == before
    run(llama, target, "int4", force=True)
    assert (target / "model.safetensors").read_bytes() != before
    other = tmp_path / "other"
    other.mkdir()
    (other / "letters.txt").write_text("mine")
    with pytest.raises(OutputError, match="without a model"):
        run(llama, other, "int4", force=True)
    with pytest.raises(ConfigError, match="source itself"):
        run(target, target, "int8", force=True)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("int4", {"double_quant": True}, "--double-quant does not go with --to int4"),
        ("nf4", {"group_size": 64}, "--group-size does not go with --to nf4"),
        ("fp8", {"calibrate": "x"}, "--calibrate does not go with --to fp8"),
        ("int4", {"group_size": 48}, "must be -1"),
        ("gptq-4bit", {"calibrate": "nowhere.txt"}, "is not a file"),
        ("gptq-4bit", {"calibration_tokens": 1000}, "more than the model's context of 512"),
        ("awq-4bit", {"calibrate": ["too short"]}, "too short"),
        ("nf4", {"tensors": (("q_proj", "int4"),)}, "the type can be fp16, bf16"),
        ("int4", {"tensors": (("nothing", "int8"),)}, "fits the name of no linear layer"),
        ("int4", {"tensors": (("(", "int8"),)}, "not a regular expression"),
        ("nf4", {"imatrix": Path("x.gguf")}, "--imatrix does not go with --to nf4"),
    ],
)
def test_bad_options(llama: Path, tmp_path: Path, to: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(llama, tmp_path / "out", to, **options)
    assert not list(tmp_path.iterdir())


def test_a_damaged_weight_is_named(tmp_path: Path, text: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for to, options in (("int4", {}), ("nf4", {}), ("gptq-4bit", calibrated(text))):
        with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.up"):
            run(folder, tmp_path / "out", to, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_activations_that_overflow_are_named(tmp_path: Path, text: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.post_attention_layernorm.weight"] *= 1e25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for to in ("gptq-4bit", "awq-4bit", "int4"):
        with pytest.raises(CheckpointError, match=r"layers\.0\.(ffn\.gate|mlp\.gate_proj) reads"):
            run(folder, tmp_path / "out", to, **calibrated(text))


def test_linears_that_stay_in_16_bits(llama: Path, text: Path, tmp_path: Path) -> None:
    for i, to in enumerate(("int4", "nf4", "llm-int8", "gptq-4bit", "awq-4bit")):
        options = calibrated(text) if to in ("gptq-4bit", "awq-4bit") else {}
        target = tmp_path / str(i)
        report = run(llama, target, to, tensors=(("v_proj", "fp16"),), **options)
        checkpoint = open_checkpoint(target)
        packed = {name for name, tensor in checkpoint.tensors.items() if tensor.packed is not None}
        assert len(packed) == 12
        assert not [name for name in packed if name.endswith("attn.v")]
        assert report.by_type[to][0] == 12
        assert (logits(target) - logits(llama)).square().mean().sqrt() < 0.8 * logits(llama).std()


def test_a_quantised_source_is_decoded(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "nf4", "nf4")
    progress = Notes()
    run(tmp_path / "nf4", tmp_path / "plain", "fp16", progress)
    assert any("already quantised" in note for note in progress.notes)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    a, b = open_checkpoint(tmp_path / "nf4"), open_checkpoint(tmp_path / "plain")
    for name, tensor in a.tensors.items():
        np.testing.assert_array_equal(b.tensors[name].to_float32(), tensor.to_float32().astype(np.float16))
