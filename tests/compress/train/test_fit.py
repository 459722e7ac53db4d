"""Layers fitted to the teacher's by least squares, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_helpers import Interrupt, Notes, distil, losses

from models import make_tiny
from nybble.checkpoint import open_checkpoint
from nybble.core.errors import ConfigError

torch = pytest.importorskip("torch")

from nybble.backends.torch.trainable import TrainableDecoder  # noqa: E402
from nybble.compress.distil.fit import _RIDGE, counterparts, fit_layers  # noqa: E402
from nybble.compress.methods import Silent  # noqa: E402
from nybble.compress.prune.options import PruneOptions  # noqa: E402
from nybble.compress.prune.run import run_prune  # noqa: E402
from nybble.compress.train.model import TrainModel  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


def decoder(path: Path) -> TrainableDecoder:
    checkpoint = open_checkpoint(path)
    return TrainableDecoder(checkpoint.spec, TrainModel(checkpoint, None).weights())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, each with norms of its own as trained models have them."""
    import transformers

    folder = make_tiny("llama", tmp_path_factory.mktemp("models") / "teacher", num_hidden_layers=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(1, 0.1)
            elif "down_proj" in name or "o_proj" in name:
                weight *= 0.3  # a layer adds a part to what comes in
    model.save_pretrained(folder)
    return folder


def pruned(teacher: Path, target: Path, text: Path, **options: Any) -> Path:
    run_prune(teacher, target, PruneOptions(calibrate=str(text), **options), progress=Silent(), resume=False)
    return target


def tokens(rows: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, 64)))


def test_layers_are_found_by_their_norms(teacher: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    known = open_checkpoint(teacher)
    shallow = pruned(teacher, tmp_path / "shallow", text, drop_layers=2)
    kept = [
        next(i for i in range(5) if np.array_equal(norm, known.tensors[f"layers.{i}.attn_norm"].to_float32()))
        for norm in (open_checkpoint(shallow).tensors[f"layers.{i}.attn_norm"].to_float32() for i in range(3))
    ]
    assert counterparts(open_checkpoint(shallow), known) == (kept[1] - 1, kept[2] - 1, 4)
    narrow = pruned(teacher, tmp_path / "narrow", text, ffn_width=0.5, round_to=16)
    assert counterparts(open_checkpoint(narrow), known) == (0, 1, 2, 3, 4)
    assert counterparts(open_checkpoint(llama), known) is None
    distil(shallow, tmp_path / "trained", teacher, text, fit=0)
    assert counterparts(open_checkpoint(tmp_path / "trained"), known) is None


def inputs_of(student: TrainableDecoder, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the first layer: the residual stream after attention, and what `attn.o` and `ffn.down` read."""
    layer = student.blocks()[0].layer(student.rope(student.spec.layers[0].rope, token_ids.shape[1], token_ids.device))
    x = student.embed(token_ids)
    attended = layer.attention_mix(layer.attention_input(x))
    x = layer.add_attention(x, attended)
    return x, attended, layer.ffn_mix(layer.ffn_input(x))


def least_squares(
    read: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, old: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """The weight by a solver that knows nothing of normal equations, and the mean error with the old and with it."""
    a, h = (read * scale).flatten(0, 1).double(), (wanted * scale).flatten(0, 1).double()
    old = old.double()
    ridge = (_RIDGE * a.square().sum(0).mean()).sqrt()
    rows = torch.cat([a, ridge * torch.eye(a.shape[1])]), torch.cat([h, ridge * old.T])
    best = torch.linalg.lstsq(*rows).solution.T
    before, after = (float((h - a @ weight.T).square().mean()) for weight in (old, best))
    return best, before, after


@torch.no_grad()
def test_the_fit_is_the_least_square(teacher: Path, text: Path, tmp_path: Path) -> None:
    """Of the only layer that is left of five, where another `attn.o` makes it worse and is not kept."""
    student = decoder(pruned(teacher, tmp_path / "student", text, drop_layers=4))
    wanted, token_ids = decoder(teacher), tokens()
    weights = student.blocks()[0].effective()
    out = weights["attn.o"].clone()
    x, _, mixed = inputs_of(student, token_ids)
    target: torch.Tensor = wanted(token_ids, lambda x, weight, kept: kept[0], (4,))
    scale = target.square().mean(-1, keepdim=True).rsqrt()
    best, before, after = least_squares(mixed, target - x, scale, weights["ffn.down"])
    found = fit_layers(student, wanted, (4,), token_ids)
    torch.testing.assert_close(weights["ffn.down"].double(), best, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights["attn.o"], out, rtol=0, atol=0)
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(after, rel=1e-3)
    assert after < before


@torch.no_grad()
def test_attention_is_fitted_where_that_helps(teacher: Path, text: Path, tmp_path: Path) -> None:
    """Exactly, where the network behind it says nothing."""
    student = decoder(pruned(teacher, tmp_path / "student", text, drop_layers=4))
    wanted, token_ids = decoder(teacher), tokens()
    weights = student.blocks()[0].effective()
    weights["ffn.down"].zero_()
    _, attended, _ = inputs_of(student, token_ids)
    target: torch.Tensor = wanted(token_ids, lambda x, weight, kept: kept[0], (4,))
    scale = target.square().mean(-1, keepdim=True).rsqrt()
    best, before, between = least_squares(attended, target - student.embed(token_ids), scale, weights["attn.o"])
    found = fit_layers(student, wanted, (4,), token_ids)
    torch.testing.assert_close(weights["attn.o"].double(), best, rtol=1e-3, atol=1e-4)
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after < between < before


@pytest.mark.parametrize("options", [{"drop_layers": 2}, {"ffn_width": 0.5, "round_to": 16}])
def test_training_begins_lower(teacher: Path, text: Path, tmp_path: Path, options: dict[str, object]) -> None:
    student = pruned(teacher, tmp_path / "student", text, **options)
    notes = Notes()
    plain = distil(student, tmp_path / "plain", teacher, text, fit=0)
    fitted = distil(student, tmp_path / "fitted", teacher, text, progress=notes)
    assert losses(fitted.log)[0] < 0.9 * losses(plain.log)[0]
    assert any("layers fitted to the teacher's on" in note for note in notes.notes)
    narrow = distil(student, tmp_path / "narrow", teacher, text, bf16=True)
    assert losses(narrow.log)[0] == pytest.approx(losses(fitted.log)[0], rel=0.05)
    kept = distil(student, tmp_path / "kept", teacher, text, top_k=4096)  # the teacher's words are on the disk
    assert losses(kept.log)[0] == pytest.approx(losses(fitted.log)[0], rel=1e-3)


def test_a_resumed_run_is_not_fitted_again(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = pruned(teacher, tmp_path / "student", text, drop_layers=2)
    unbroken = distil(student, tmp_path / "a", teacher, text)
    with monkeypatch.context() as patch:
        Interrupt(patch, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            distil(student, tmp_path / "b", teacher, text)
    notes = Notes()
    resumed = distil(student, tmp_path / "b", teacher, text, resume=True, progress=notes)
    assert losses(resumed.log) == losses(unbroken.log)
    assert not any("fitted" in note for note in notes.notes)


def test_what_cannot_be_fitted(teacher: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fit needs a student that is the teacher with layers"):
        distil(make_tiny("llama", tmp_path / "other", seed=4), tmp_path / "out", teacher, text, fit=1000)
    gemma = make_tiny("gemma3", tmp_path / "gemma")
    with pytest.raises(ConfigError, match="fit has no closed form for gemma3"):
        distil(gemma, tmp_path / "out", gemma, text, fit=1000)
    unasked = Notes()
    shallow = pruned(teacher, tmp_path / "shallow", text, drop_layers=2)
    distil(shallow, tmp_path / "labels", teacher, text, alpha=0.0, progress=unasked)  # the teacher has no say there
    assert not any("fitted" in note for note in unasked.notes)
    with pytest.raises(ConfigError, match="fit must be 0 to"):
        distil(llama, tmp_path / "out", llama, text, fit=-1)
    notes = Notes()
    distil(make_tiny("llama", tmp_path / "third", seed=5), tmp_path / "out", teacher, text, progress=notes)
    assert not any("fitted" in note for note in notes.notes)
