"""Quantisation in the loop from end to end: what is trained is what the file holds, and it is better than rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_helpers import Notes, losses, qat

from nybble.adapter import open_adapter
from nybble.checkpoint import open_checkpoint
from nybble.core.errors import ConfigError
from nybble.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")

from nybble.backends.torch import TorchDecoder  # noqa: E402  # needs torch
from nybble.backends.torch.trainable import TrainableDecoder  # noqa: E402
from nybble.compress import methods, table  # noqa: E402
from nybble.compress.bnb.algorithm import quantize_4bit  # noqa: E402
from nybble.compress.distil.loss import distillation_loss  # noqa: E402
from nybble.compress.qat import plan  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
assert table  # registers the types


@pytest.fixture(scope="module")
def unseen(llama: Path, text: Path) -> torch.Tensor:
    """The end of the text, which the runs here do not read."""
    token_ids = load_tokenizer(open_checkpoint(llama).tokenizer).encode(text.read_text(), add_special=False)
    return torch.tensor(token_ids[-256:]).reshape(4, 64)


def logits(path: Path, token_ids: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return TorchDecoder(open_checkpoint(path), weights=weights).logits(token_ids)


class Used:
    """Keeps the weights that the forward pass used when the file was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        for kind in (plan.IntegerPlan, plan.BlockPlan):
            self._watch(monkeypatch, kind)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
        original = kind.write

        def write(this: Any, model: TrainableDecoder, *arguments: Any, **fields: Any) -> int:
            with torch.no_grad():
                self.weights = {name: weight.clone() for name, weight in model.effective()}
            size: int = original(this, model, *arguments, **fields)
            return size

        monkeypatch.setattr(kind, "write", write)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 64, "symmetric": False}),
    ("int2", {"group_size": 32}),
    ("Q4_K", {}),
    ("Q2_K", {}),
    ("Q2_K", {"tensor": ("ffn_down=Q2_K", "attn_v=Q8_0")}),
    ("Q6_K", {}),
    ("Q4_0", {}),
]


@pytest.mark.parametrize(("to", "fields"), CASES, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_the_file_decodes_to_what_was_trained(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, fields: dict[str, Any]
) -> None:
    used = Used(monkeypatch)
    target = tmp_path / ("out" if to.startswith("int") else "out.gguf")
    qat(llama, target, to, text, learning_rate=1e-3, **fields)
    checkpoint = open_checkpoint(target)
    assert set(checkpoint.tensors) == set(used.weights)
    for name, tensor in checkpoint.tensors.items():
        found, expected = tensor.to_float32(), used.weights[name].numpy()
        if target.suffix and name.endswith((".attn.q", ".attn.k")):  # llama files turn neighbours
            heads = (
                checkpoint.spec.layers[0].num_q_heads if name.endswith("q") else checkpoint.spec.layers[0].num_kv_heads
            )
            expected = expected.reshape(heads, 2, -1, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
        assert (found == expected).all(), name


def rounded(source: Path, target: Path, to: str, **options: object) -> Path:
    method = methods.find(to, target)
    method.run(methods.QuantizeRequest(source, target, method, options=options), methods.Silent())
    return target


@pytest.mark.parametrize(("to", "share"), [("int4", 0.8), ("int2", 0.8), ("Q2_K", 0.8)])
def test_training_beats_rounding(
    llama: Path, text: Path, unseen: torch.Tensor, tmp_path: Path, to: str, share: float
) -> None:
    suffix, fields = ("", {"group_size": 32}) if to.startswith("int") else (".gguf", {})
    plain = rounded(llama, tmp_path / f"plain{suffix}", to, **fields)
    qat(llama, tmp_path / f"out{suffix}", to, text, steps=60, learning_rate=1e-3, tokens=8000, **fields)
    wanted = logits(llama, unseen)
    before, after = (
        float(distillation_loss(logits(path, unseen), wanted, 1.0)) for path in (plain, tmp_path / f"out{suffix}")
    )
    assert after < share * before


def test_types_that_a_width_does_not_allow_are_named(llama: Path, text: Path, tmp_path: Path) -> None:
    progress = Notes()
    qat(llama, tmp_path / "out.gguf", "Q2_K", text, progress=progress)
    assert "matrices of width 128 are trained as Q4_0 instead of Q2_K, whose blocks do not divide it" in progress.notes
    tensors = open_checkpoint(tmp_path / "out.gguf").tensors
    assert tensors["layers.0.ffn.down"].format.name == "Q3_K" and tensors["layers.0.attn.q"].format.name == "Q4_0"


def test_embeddings_and_head_are_not_trained(llama: Path, text: Path, tmp_path: Path) -> None:
    qat(llama, tmp_path / "out", "int4", text, learning_rate=1e-2)
    before, after = (open_checkpoint(path).tensors["embed"].to_float32() for path in (llama, tmp_path / "out"))
    assert (before.astype(np.float16) == after).all()


def test_low_rank_factors_learn_beside_an_nf4_base(
    llama: Path, text: Path, unseen: torch.Tensor, tmp_path: Path
) -> None:
    fields = {"steps": 60, "learning_rate": 5e-3, "tokens": 8000, "rank": 4}
    result = qat(llama, tmp_path / "adapter", "nf4", text, lora="adapter", **fields)
    assert losses(result.log)[-1] < 0.8 * losses(result.log)[0]
    checkpoint = open_checkpoint(llama)
    adapter = open_adapter(tmp_path / "adapter", checkpoint.spec)
    assert adapter.rank == 4
    base = rounded(llama, tmp_path / "base", "nf4")
    weights = {}
    for layer, factors in adapter.layers():
        for one in factors:
            name = f"layers.{layer}.{one.name}"
            start = open_checkpoint(base).tensors[name].to_float32()
            weights[name] = torch.from_numpy(start + one.scale * (one.b @ one.a))
    wanted = logits(llama, unseen)
    before = float(distillation_loss(logits(base, unseen), wanted, 1.0))
    assert float(distillation_loss(logits(base, unseen, weights), wanted, 1.0)) < 0.8 * before


def test_merged_factors_round_only_what_they_touch(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.compress.qat import lora

    original = lora._Lora._factors

    def only_one(this: Any, model: TrainableDecoder) -> dict[str, Any]:
        found = original(this, model)
        return {name: value if name.startswith("layers.1.ffn.up") else value * 0 for name, value in found.items()}

    monkeypatch.setattr(lora._Lora, "_factors", only_one)
    base = rounded(llama, tmp_path / "base", "nf4")
    qat(base, tmp_path / "out", "nf4", text, lora="merge", alpha=0.0, learning_rate=1e-2)
    before, after = (open_checkpoint(path).tensors for path in (base, tmp_path / "out"))
    changed = [name for name in before if (before[name].to_float32() != after[name].to_float32()).any()]
    assert changed == ["layers.1.ffn.up"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    again = quantize_4bit(torch.from_numpy(after["layers.1.ffn.up"].to_float32()), "nf4", 64)
    assert (again.decode() == after["layers.1.ffn.up"].to_float32()).all()


@pytest.mark.parametrize(
    ("to", "target", "fields", "message"),
    [
        ("int5", "out", {}, r"to is 'int5', which cannot be trained: did you mean 'int"),
        ("IQ4_XS", "out.gguf", {}, "cannot be trained"),
        ("int4", "out.gguf", {}, "writes a folder"),
        ("Q4_K", "out", {}, r"let the name of .*out end in \.gguf"),
        ("int4", "out", {"group_size": 48}, "power of two"),
        ("Q4_K", "out.gguf", {"group_size": 32}, "has its own groups"),
        ("int4", "out", {"tensor": ("x=Q8_0",)}, "writes a folder"),
        ("Q4_K", "out.gguf", {"tensor": ("x",)}, "REGEX=TYPE"),
        ("int4", "out", {"lora": "merge"}, "nf4 and lora go together"),
        ("nf4", "out", {}, "nf4 and lora go together"),
        ("nf4", "out", {"lora": "merge", "rank": 0}, "rank must be 1"),
        ("int4", "out", {"scale_rate": -1.0}, "scale_rate must be from 0"),
    ],
)
def test_options_that_cannot_be(
    llama: Path, text: Path, tmp_path: Path, to: str, target: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        qat(llama, tmp_path / target, to, text, **fields)
    assert list(tmp_path.iterdir()) == []
