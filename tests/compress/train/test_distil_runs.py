"""Distillation from end to end on small models, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from train_helpers import distil, losses, qat

from models import make_tiny, to_gguf
from nybble.checkpoint import open_checkpoint
from nybble.core.errors import ConfigError, ModelNotFoundError, OutputError

torch = pytest.importorskip("torch")

from nybble.backends.torch import TorchDecoder  # noqa: E402  # needs torch
from nybble.backends.torch.trainable import TrainableDecoder  # noqa: E402
from nybble.compress.distil.loss import distillation_loss  # noqa: E402
from nybble.compress.distil.task import pairs  # noqa: E402
from nybble.compress.train.model import TrainModel  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40)))


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return TorchDecoder(open_checkpoint(path)).logits(TOKENS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_the_trainable_decoder_is_the_decoder(tmp_path: Path, family: str) -> None:
    folder = make_tiny(family, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    model = TrainableDecoder(checkpoint.spec, TrainModel(checkpoint, None).weights())
    with torch.no_grad():
        assert torch.equal(model.logits(TOKENS), logits(folder))
    assert {name for name, _ in model.named_weights()} == set(checkpoint.tensors)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_every_family_learns(tmp_path: Path, text: Path, family: str) -> None:
    teacher = make_tiny(family, tmp_path / "teacher")
    student = make_tiny(family, tmp_path / "student", seed=1)
    distil(student, tmp_path / "out", teacher, text, steps=30, learning_rate=3e-3)
    distil(student, tmp_path / "out.gguf", teacher, text, steps=30, learning_rate=3e-3)
    wanted = logits(teacher)
    before, after, file = (
        float(distillation_loss(logits(path), wanted, 1.0))
        for path in (student, tmp_path / "out", tmp_path / "out.gguf")
    )
    assert after < 0.9 * before
    assert file == pytest.approx(after, rel=0.05)  # in 16 bits, where the folder has 32


def test_the_folder_is_like_the_students(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    distil(student, tmp_path / "out", llama, text)
    before, after = (json.loads((path / "config.json").read_text()) for path in (student, tmp_path / "out"))
    assert before["num_hidden_layers"] == after["num_hidden_layers"] == 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (student / "tokenizer.json").read_text()


def test_a_gguf_student_stays_in_its_order_of_rows(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = to_gguf(student, tmp_path / "student.gguf")
    from_file = distil(file, tmp_path / "a.gguf", llama, text, steps=12, learning_rate=1e-3)
    from_folder = distil(student, tmp_path / "b", llama, text, steps=12, learning_rate=1e-3)
    assert losses(from_file.log) == pytest.approx(losses(from_folder.log), rel=1e-3)
    assert torch.allclose(logits(tmp_path / "a.gguf"), logits(tmp_path / "b"), atol=0.05)


def test_kept_words_teach_like_a_teacher_that_runs_along(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = distil(student, tmp_path / "a", llama, text)
    vocab = open_checkpoint(llama).spec.vocab_size
    fields = {"top_k": vocab, "cache": tmp_path / "cache"}
    kept = distil(student, tmp_path / "b", llama, text, **fields)
    assert losses(kept.log) == pytest.approx(losses(live.log), rel=1e-4)

    def made_again(*arguments: object) -> None:
        raise AssertionError("the teacher ran again")

    with monkeypatch.context() as patch:
        patch.setattr("nybble.compress.distil.teacher._make", made_again)
        assert losses(distil(student, tmp_path / "c", llama, text, **fields).log) == losses(kept.log)
        qat(llama, tmp_path / "d", "int4", text, **fields)
        with pytest.raises(AssertionError, match="ran again"):
            distil(student, tmp_path / "e", llama, text, **fields, temperature=2.0)


def test_labels_alone_need_no_teacher_to_run(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.compress.distil.run._decoder", None)
    distil(student, tmp_path / "out", llama, text, alpha=0.0)


def test_hidden_states_are_pulled_together(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    result = distil(student, tmp_path / "out", llama, text, steps=30, hidden=1.0, learning_rate=1e-3)
    lines = [json.loads(line) for line in result.log.read_text().splitlines()]  # type: ignore[union-attr]
    assert lines[-1]["hidden"] < lines[0]["hidden"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["kl"] + lines[0]["hidden"], rel=1e-4)
    assert pairs(2, 4) == ((0, 1), (1, 3)) and pairs(3, 3) == ((0, 1, 2), (0, 1, 2))


def test_other_tokenizers_are_refused(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(student, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"different tokenizers, which mean b'[ab]' and b'[ab]' by token \d+"):
        distil(other, tmp_path / "out", llama, text)


def test_other_widths_have_no_hidden_states_in_common(llama: Path, text: Path, tmp_path: Path) -> None:
    narrow = make_tiny("llama", tmp_path / "narrow")
    with pytest.raises(ConfigError, match="states of 64 and 128 numbers"):
        distil(narrow, tmp_path / "out", llama, text, hidden=1.0)
    distil(narrow, tmp_path / "out", llama, text)  # what they say can be compared all the same


def test_paths_that_cannot_be(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        distil(tmp_path / "nothing", tmp_path / "out", llama, text)
    with pytest.raises(ModelNotFoundError):
        distil(student, tmp_path / "out", tmp_path / "nothing", text)
    with pytest.raises(OutputError, match="does not exist"):
        distil(student, tmp_path / "no" / "folder", llama, text)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        distil(student, tmp_path / "there", llama, text)
    with pytest.raises(ConfigError, match="is the model itself"):
        distil(student, student, llama, text, force=True)
