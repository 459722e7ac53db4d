"""The torch decoder gives the logits that transformers gives, for every family, and lets gradients through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import FAMILIES, make_tiny, to_gguf
from nybble.checkpoint import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from nybble.backends.torch import TorchDecoder  # noqa: E402  # needs torch

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40)))
ROPES = [
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
]  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)], "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *(("llama", {"rope_parameters": rope}) for rope in ROPES),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("llama", {"attention_bias": True}),
    ("mistral", {"sliding_window": 16}),
    ("gemma2", {"sliding_window": 5}),
]


def case_id(value: object) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("family", "overrides"), CASES, ids=case_id)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = make_tiny(family, tmp_path / "model", **overrides)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(TOKENS).logits
        found = TorchDecoder(open_checkpoint(folder)).logits(TOKENS)
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-4


def test_a_gguf_file_with_interleaved_rope(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    pytest.importorskip("gguf")
    file = to_gguf(folder, tmp_path / "m.gguf")
    with torch.no_grad():
        a, b = (TorchDecoder(open_checkpoint(path)).logits(TOKENS) for path in (folder, file))
    assert (a - b).abs().max() < 1e-4


def test_every_linear_is_observed_with_what_it_reads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny("gemma3", tmp_path / "model"))
    seen: dict[str, tuple[int, ...]] = {}

    def observe(layer: int, names: tuple[str, ...], x: torch.Tensor) -> None:
        for name in names:
            seen[f"layers.{layer}.{name}"] = tuple(x.shape)

    with torch.no_grad():
        TorchDecoder(checkpoint).logits(TOKENS, observe)
    linears = {n: t for n, t in checkpoint.tensors.items() if len(t.shape) == 2 and n.startswith("layers.")}
    assert seen == {name: (*TOKENS.shape, tensor.shape[1]) for name, tensor in linears.items()}


def test_gradients_reach_a_weight(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny("qwen3", tmp_path / "model"))
    name = "layers.0.attn.q"
    weight = torch.from_numpy(checkpoint.tensors[name].to_float32().copy()).requires_grad_()
    decoder = TorchDecoder(checkpoint, weights={name: weight})
    loss = decoder.logits(TOKENS).square().mean()
    loss.backward()
    gradient = weight.grad
    assert gradient is not None
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        ahead = TorchDecoder(checkpoint, weights={name: weight + step}).logits(TOKENS).square().mean()
        behind = TorchDecoder(checkpoint, weights={name: weight - step}).logits(TOKENS).square().mean()
    slope = float(ahead - behind) / 2e-2
    assert slope == pytest.approx(float(gradient.norm()), rel=0.02)


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    from nybble.core.errors import CheckpointError

    folder = make_tiny("llama", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.up"):
        TorchDecoder(open_checkpoint(folder)).logits(TOKENS)
