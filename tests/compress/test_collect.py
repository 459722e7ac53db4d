"""Importance matrices collected by the torch decoder: the mean squares that transformers' own modules see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models import make_tiny
from nybble.checkpoint import open_checkpoint
from nybble.compress.gguf.collect import calibration_windows, collect
from nybble.compress.gguf.imatrix import read_imatrix
from nybble.compress.methods import Silent
from nybble.core.errors import ConfigError
from nybble.formats.gguf import GgufFile

TEXT = "the lower and on in there 123 another line of text\n" * 40
HF_OF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PHI_OF = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_the_mean_squares_that_transformers_sees(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    windows = calibration_windows(checkpoint, TEXT, ctx=32, chunks=5)
    matrix = collect(checkpoint, windows, Silent(), dataset="text")
    assert (matrix.num_chunks, matrix.chunk_size, matrix.datasets) == (5, 32, ("text",))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = PHI_OF if family == "phi3" else HF_OF
    expected: dict[str, torch.Tensor] = {}
    for gguf_name, hf_name in names.items():
        for i, layer in enumerate(model.model.layers):

            def hook(module: object, arguments: tuple[torch.Tensor], name: str = f"blk.{i}.{gguf_name}.weight") -> None:
                x = arguments[0].detach().double()
                expected[name] = x.reshape(-1, x.shape[-1]).square().mean(0)

            layer.get_submodule(hf_name).register_forward_pre_hook(hook)
    with torch.inference_mode():
        model(torch.tensor(windows))
    assert set(matrix.entries) == set(expected)
    for name, values in expected.items():
        found = matrix.weights(name, len(values))
        assert found is not None
        np.testing.assert_allclose(found, values.numpy(), rtol=1e-3, atol=1e-9, err_msg=name)


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny("llama", tmp_path / "m"))
    with pytest.raises(ConfigError, match="too few for 1 windows of 512"):
        calibration_windows(checkpoint, "short", ctx=512, chunks=None)
    with pytest.raises(ConfigError, match="too few for 900 windows of 32"):
        calibration_windows(checkpoint, TEXT, ctx=32, chunks=900)
    with pytest.raises(ConfigError, match="--ctx must be 8 to 512"):
        calibration_windows(checkpoint, TEXT, ctx=1024, chunks=None)


def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= 1e25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_(gate|down)\.weight"):
        collect(checkpoint, calibration_windows(checkpoint, TEXT, ctx=32, chunks=2), Silent())


def test_the_command_writes_what_quantize_reads(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "m")
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    run = [sys.executable, "-c", "from nybble.cli.app import main; main()"]
    arguments = [str(folder), "--text", str(tmp_path / "text.txt"), "-o", str(tmp_path / "i.gguf"), "--ctx", "64"]
    done = subprocess.run([*run, "imatrix", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_imatrix(tmp_path / "i.gguf").entries) == 14
    again = subprocess.run([*run, "imatrix", *arguments], capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    small = [str(folder), str(tmp_path / "q.gguf"), "--to", "Q4_0", "--imatrix", str(tmp_path / "i.gguf")]
    done = subprocess.run([*run, "quantize", *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert GgufFile(tmp_path / "q.gguf").metadata["quantize.imatrix.dataset"] == "text.txt"
