"""Every family, from a folder and from GGUF, gives the logits that transformers gives.

The model runs through the plain numpy decoder, so this checks the spec, the names and the rope, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import reference_decoder
from models import FAMILIES, make_tiny, to_gguf
from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.core.rope import inverse_frequencies

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

TOKENS = np.random.default_rng(0).integers(0, 256, 40).tolist()
SHORT = [1.0 + 0.1 * i for i in range(8)]
LONG = [1.0 + 0.5 * i for i in range(8)]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def longrope(original: int) -> dict[str, Any]:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG}
    rope["original_max_position_embeddings"] = original
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


# What GGUF can say as well.
BOTH: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("qwen2", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"attention_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 4}),
    ("gemma2", {"sliding_window": 5}),
    ("phi3", {"sliding_window": 16}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    ("phi3", longrope(256)),
    ("phi3", longrope(32)),
]
FOLDER_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True}),
    ("gemma3", {"query_pre_attn_scalar": 48}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
]


def theirs(folder: Path) -> npt.NDArray[np.float32]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def ours(checkpoint: Checkpoint) -> npt.NDArray[np.float64]:
    ropes = [inverse_frequencies(layer.rope, len(TOKENS)) for layer in checkpoint.spec.layers]
    weights = {name: tensor.to_float32() for name, tensor in checkpoint.tensors.items()}
    return reference_decoder.logits(checkpoint.spec, weights, ropes, TOKENS)


def case_id(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("family", "overrides"), BOTH, ids=case_id)
def test_folder_and_gguf(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = make_tiny(family, tmp_path / "model", **overrides)
    expected = theirs(folder)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours(open_checkpoint(folder)), expected, atol=2e-5)
    from_gguf = open_checkpoint(to_gguf(folder, tmp_path / "m.gguf"))
    np.testing.assert_allclose(ours(from_gguf), expected, atol=2e-5)


@pytest.mark.parametrize(("family", "overrides"), FOLDER_ONLY, ids=case_id)
def test_folder(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = make_tiny(family, tmp_path / "model", **overrides)
    np.testing.assert_allclose(ours(open_checkpoint(folder)), theirs(folder), atol=2e-5)


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR], ids=case_id)
def test_the_older_way_to_write_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    """`rope_theta` beside `rope_scaling`, whose type is `rope_type` or, older still, `type`."""
    import json

    folder = make_tiny("llama", tmp_path / "model", rope_parameters={**rope, "rope_theta": 50000.0})
    spec = open_checkpoint(folder).spec
    config = json.loads((folder / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    for key in ("rope_type", "type"):
        scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "rope_type")}
        scaling[key] = parameters["rope_type"]
        old = config | {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}
        (folder / "config.json").write_text(json.dumps(old))
        assert open_checkpoint(folder).spec == spec


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_open(tmp_path: Path, quant: str) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    exact = open_checkpoint(to_gguf(folder, tmp_path / "exact.gguf"))
    file = open_checkpoint(to_gguf(folder, tmp_path / "m.gguf", quant, alignment=64))
    assert file.spec == exact.spec
    for name, tensor in file.tensors.items():
        assert tensor.format.name == (quant if len(tensor.shape) == 2 else "F32")
        values = exact.tensors[name].to_float32()
        assert np.abs(tensor.to_float32() - values).max() <= 0.15 * np.abs(values).max()
