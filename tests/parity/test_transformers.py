"""Small random models of every family: the native executor against transformers, on the same dequantised weights.

The head is scaled so that predictions have some shape: with the flat ones of random weights no divergence would ever be
large. A wrong detail of the model is checked to be seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare import native_logits, transformers_logits

from models import FAMILIES, gguf_name, make_tiny, to_gguf
from nybble.evaluate.divergence import divergence, kl_rows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

WINDOWS = np.random.default_rng(0).integers(0, 256, (8, 64)).astype(np.int32)
ENCODINGS = ["Q8_0", "Q5_1", "Q4_0"]


def sharp_model(family: str, folder: Path):
    """A tiny model whose predictions have 3.5 to 4.5 of the 5.5 nats that its vocabulary allows."""
    make_tiny(family, folder, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scale = 1.0
    head = model.lm_head.weight.detach().clone()
    for _ in range(40):  # soft-caps bend the scale, so it is searched for
        with torch.no_grad():
            model.lm_head.weight.copy_(head * scale)
        logits = transformers_logits(model, WINDOWS[:1]).astype(np.float64)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1).mean()
        if 3.5 <= entropy <= 4.5:
            break
        scale *= 1.3 if entropy > 4.5 else 0.8
    model.save_pretrained(folder)
    return model


def take_weights_of(model, file: Path, folder: Path) -> None:
    """Give a model exactly the values that a GGUF file decodes to."""
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    config = model.config
    arch = config.model_type.removesuffix("_text")
    arch = "llama" if arch == "mistral" else arch
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = read[gguf_name(name, arch)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(parameter.shape)
            if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
            if arch.startswith("gemma") and values.ndim == 1:
                values = values - 1
            parameter.copy_(torch.from_numpy(np.array(values, np.float32)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    model = sharp_model(family, folder)
    encoding = ENCODINGS[FAMILIES.index(family) % len(ENCODINGS)]
    file = to_gguf(folder, tmp_path / "model.gguf", encoding)
    take_weights_of(model, file, folder)
    expected = transformers_logits(model, WINDOWS)
    in_floats = divergence(expected, native_logits(file, WINDOWS, "f32", monkeypatch))
    assert in_floats.mean_kl < 1e-6
    assert in_floats.top1_agreement > 0.99
    # Agreement of the likeliest token is a matter of real models: here the first two are often a hair apart.
    assert divergence(expected, native_logits(file, WINDOWS, "int8", monkeypatch)).mean_kl < 1e-3


def test_a_wrong_detail_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    model = sharp_model("llama", folder)
    file = to_gguf(folder, tmp_path / "model.gguf", "Q8_0")
    take_weights_of(model, file, folder)
    ours = native_logits(file, WINDOWS, "f32", monkeypatch)
    with torch.no_grad():  # one norm weight of one layer, by a tenth
        model.model.layers[0].input_layernorm.weight[0] *= 1.1
    assert kl_rows(transformers_logits(model, WINDOWS), ours).mean() > 1e-6
