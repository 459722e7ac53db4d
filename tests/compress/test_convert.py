"""`nybble convert` between GGUF files and plain folders: transformers loads what comes out, and nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import CHAT_TEMPLATE, FAMILIES, make_tiny
from models import to_gguf as write_gguf
from nybble.checkpoint import open_checkpoint
from nybble.compress.convert import write_folder
from nybble.compress.convert.outcome import Outcome
from nybble.compress.convert.run import convert
from nybble.compress.methods import Silent
from nybble.core.errors import CheckpointError, ConfigError, ModelNotFoundError, OutputError
from nybble.formats.safetensors import read_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = np.random.default_rng(0).integers(0, 256, (1, 40))


class Counting(Silent):
    def __init__(self) -> None:
        self.total = 0
        self.done = 0

    def start(self, total: int) -> None:
        self.total += total

    def advance(self, weights: int, what: str) -> None:
        self.done += weights


def run(source: Path, target: Path, **options: Any) -> Outcome:
    return convert(source, target, Silent(), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, root / f"tiny-{i}") for i, family in enumerate(FAMILIES)}


def logits(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits[0]


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors, _ = read_folder(folder)
    return {n: (t.format.name, t.shape, bytes(t.file.view[t.begin : t.end])) for n, t in tensors.items()}


def in_16_bits(folder: Path, target: Path, dtype: str) -> Path:
    run(folder, target, to="hf", dtype=dtype)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_byte_is_the_same(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for name, source in (("f32", folders[family]), ("bf16", in_16_bits(folders[family], tmp_path / "bf16", "bf16"))):
        there = run(source, tmp_path / f"{name}.gguf")
        back = run(tmp_path / f"{name}.gguf", tmp_path / f"{name}-back", to="hf")
        for outcome in (there, back):
            assert outcome.proof is not None
            assert outcome.proof.sentence().startswith("lossless: ")
        before, after = tensor_bytes(source), tensor_bytes(tmp_path / f"{name}-back")
        assert set(before) == set(after)
        if name == "bf16" or not family.startswith("gemma"):  # float32 norms less one round, what they do does not
            assert before == after


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_logits(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(folders[family], tmp_path / "m.gguf")  # by the package gguf, not by us
    run(tmp_path / "m.gguf", tmp_path / "hf", to="hf")
    torch.testing.assert_close(logits(tmp_path / "hf"), logits(folders[family]), atol=2e-5, rtol=0)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "hf", folders[family]))
    text = "the lower and 123 \u00fc<|eos|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_template == CHAT_TEMPLATE
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ours.eos_token_id


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 16}),
    ("phi3", {"sliding_window": 16}),
    ("llama", {"attention_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }
        },
    ),
    (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
            }
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "overrides"), WINDOWS)
def test_what_a_config_says_survives(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / "model", **overrides)
    run(folder, tmp_path / "m.gguf")
    run(tmp_path / "m.gguf", tmp_path / "hf", to="hf")
    torch.testing.assert_close(logits(tmp_path / "hf"), logits(folder), atol=2e-5, rtol=0)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q5_1"])
def test_quantised_files_become_float32_and_lose_nothing(quant: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(folders["llama"], tmp_path / "m.gguf", quant)
    outcome = run(tmp_path / "m.gguf", tmp_path / "hf", to="hf")
    assert outcome.proof is not None
    assert outcome.proof.lossless
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert {dtype for dtype, _, _ in tensor_bytes(tmp_path / "hf").values()} == {"F32"}
    rounded = run(tmp_path / "m.gguf", tmp_path / "bf16", to="hf", dtype="bf16")
    assert rounded.proof is not None
    assert not rounded.proof.lossless
    assert "not lossless" in rounded.proof.sentence()
    assert 0 < max(change.share for change in rounded.proof.changes) < 2**-8
    assert {dtype for dtype, _, _ in tensor_bytes(tmp_path / "bf16").values()} == {"BF16"}


def test_large_models_get_several_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_folder, "SHARD_BYTES", 1 << 16)
    run(folders["llama"], tmp_path / "m.gguf")
    progress = Counting()
    convert(tmp_path / "m.gguf", tmp_path / "hf", progress, to="hf")
    assert progress.done == progress.total > 0
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert tensor_bytes(tmp_path / "hf") == tensor_bytes(folders["llama"])


def test_a_dry_run_knows_the_size_and_writes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    run(folders["qwen2"], tmp_path / "m.gguf")
    for source, target, to in ((tmp_path / "m.gguf", "hf", "hf"), (folders["qwen2"], "n.gguf", None)):
        dry = run(source, tmp_path / target, to=to, dry_run=True)
        assert dry.proof is None
        assert not (tmp_path / target).exists()
        assert dry.report == run(source, tmp_path / target, to=to).report


def test_a_change_that_nobody_asked_for_is_not_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.compress.convert import to_float

    run(folders["llama"], tmp_path / "m.gguf")
    monkeypatch.setattr(to_float, "_lies_so", lambda *_: False)
    monkeypatch.setattr(to_float, "floats_as", lambda values, dtype: _spoilt(values, dtype))
    with pytest.raises(CheckpointError, match="is not written, because its values would not be those of the source"):
        run(tmp_path / "m.gguf", tmp_path / "hf", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def _spoilt(values: Any, dtype: str) -> Any:
    from nybble.formats.stored import floats_as

    values = values.copy()
    values.reshape(-1)[-1] += 1e-3
    return floats_as(values, dtype)


def test_values_too_large_for_float16_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    tensor = read_folder(folder)[0]["model.layers.1.mlp.up_proj.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.begin)
        file.write(np.array([1e6], np.float32).tobytes())
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has values too large for float16"):
        run(folder, tmp_path / "hf", to="hf", dtype="f16")
    assert not (tmp_path / "hf").exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    source, file = folders["llama"], tmp_path / "m.gguf"
    run(source, file)
    cases: list[tuple[Path, str, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "none", "x.gguf", {}, ModelNotFoundError, "does not exist"),
        (source, "x", {}, ConfigError, r"does not end in \.gguf: say what it will be with --to hf"),
        (source, "x", {"to": "exl3"}, ConfigError, "--to exl3 is nothing that convert writes"),
        (source, "x", {"to": "gguf"}, ConfigError, r"does not end in \.gguf"),
        (source, "x.gguf", {"to": "hf"}, ConfigError, "choose another name"),
        (source, "x.gguf", {"dtype": "bf16"}, ConfigError, "--dtype goes with --to hf only"),
        (source, "x", {"to": "hf", "dtype": "int8"}, ConfigError, "--dtype int8 is no type of float"),
        (source, "x", {"to": "hf"}, ConfigError, "is a plain folder already"),
        (source, "x", {"to": "awq"}, ConfigError, "is not quantised"),
        (file, "x", {"to": "gptq"}, ConfigError, "is not a folder"),
        (file, "x.gguf", {}, ConfigError, "is a GGUF file already"),
        (source, "m.gguf", {}, OutputError, "exists already"),
        (tmp_path, "x", {"to": "hf"}, CheckpointError, r"config\.json is missing"),
    ]
    for given, target, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(given, tmp_path / target, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    run(source, file, force=True)
    run(file, tmp_path / "hf", to="hf")
    with pytest.raises(OutputError, match="exists already"):
        run(file, tmp_path / "hf", to="hf")
    run(file, tmp_path / "hf", to="hf", force=True)
    assert open_checkpoint(tmp_path / "hf").spec.family == "llama"
    with pytest.raises(ConfigError, match="is the source"):
        run(tmp_path / "hf", tmp_path / "hf", to="hf", dtype="bf16", force=True)
