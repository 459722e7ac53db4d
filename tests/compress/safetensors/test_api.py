"""`nybble.quantize` and its configs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from folder_helpers import Notes, quantisation

import nybble
from nybble.checkpoint import open_checkpoint
from nybble.compress.calibration.text import default_texts, read_texts
from nybble.core.errors import ConfigError, ModelNotFoundError
from nybble.formats.gguf import GgufFile

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


def test_every_config_quantises(llama: Path, text: Path, tmp_path: Path) -> None:
    short = {"dataset": str(text), "num_samples": 8, "sample_tokens": 32}
    progress = Notes()
    nybble.quantize(
        llama, nybble.GPTQConfig(bits=4, group_size=64, sym=False, **short), tmp_path / "a", progress=progress
    )
    assert (quantisation(tmp_path / "a")["group_size"], quantisation(tmp_path / "a")["sym"]) == (64, False)
    assert any("8 x 32 tokens of text.txt" in note for note in progress.notes)
    nybble.quantize(llama, nybble.GPTQConfig(bits=8, **short), tmp_path / "rows")
    assert quantisation(tmp_path / "rows")["group_size"] == -1
    nybble.quantize(llama, nybble.AWQConfig(**short), str(tmp_path / "b"))
    assert quantisation(tmp_path / "b")["version"] == "gemm"
    config = nybble.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head", "k_proj"],
    )  # fmt: skip
    nybble.quantize(str(llama), config, tmp_path / "c")
    found = quantisation(tmp_path / "c")
    assert (found["bnb_4bit_compute_dtype"], found["bnb_4bit_use_double_quant"]) == ("bfloat16", True)
    assert "model.layers.1.self_attn.k_proj" in found["llm_int8_skip_modules"]
    nybble.quantize(llama, nybble.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0), tmp_path / "d")
    assert quantisation(tmp_path / "d")["llm_int8_threshold"] == 4.0
    nybble.quantize(llama, nybble.RoundToNearestConfig("int3", symmetric=False), tmp_path / "e", threads=1)
    assert quantisation(tmp_path / "e")["config_groups"]["group_0"]["weights"]["num_bits"] == 3
    nybble.quantize(llama, nybble.GGUFConfig("Q8_0"), tmp_path / "f.gguf")
    assert GgufFile(tmp_path / "f.gguf").tensors["blk.0.attn_q.weight"].format.name == "Q8_0"
    nybble.quantize(llama, "fp8", tmp_path / "g")
    nybble.quantize(llama, "bf16", tmp_path / "h")
    nybble.quantize(llama, "bf16", tmp_path / "i.gguf")
    assert open_checkpoint(tmp_path / "i.gguf").container == "gguf"


def test_texts_of_a_program_calibrate(llama: Path, tmp_path: Path) -> None:
    texts = [f"a text about {i} and the lower {i * i}. " * 5 for i in range(40)]
    nybble.quantize(llama, nybble.GPTQConfig(dataset=texts, num_samples=4, sample_tokens=16), tmp_path / "out")


def test_too_few_tokens_for_the_widest_linear_are_named(llama: Path, text: Path, tmp_path: Path) -> None:
    for samples, told in ((8, True), (16, False)):
        progress = Notes()
        config = nybble.GPTQConfig(dataset=str(text), num_samples=samples, sample_tokens=32)
        nybble.quantize(llama, config, tmp_path / str(samples), progress=progress)
        assert any("256 tokens are few for linears of 256 inputs" in note for note in progress.notes) == told


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (nybble.GPTQConfig(bits=5), "bits must be 2, 3, 4 or 8"),
        (nybble.AWQConfig(bits=3), "4 bits only"),
        (nybble.BitsAndBytesConfig(), "needs one of"),
        (nybble.BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True), "needs one of"),
        (nybble.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf5"), "must be nf4 or fp4"),
        (nybble.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="int8"), "must be one of float32"),
        (nybble.GPTQConfig(dataset=[]), "at least one"),
        ("int5", "is not a type"),
    ],
)
def test_configs_that_cannot_be(llama: Path, tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nybble.quantize(llama, config, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        nybble.GPTQConfig(model_seqlen=1)  # type: ignore[call-arg]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        nybble.quantize(tmp_path / "nothing", "int4", tmp_path / "out")


def test_the_default_text_is_long_and_always_the_same() -> None:
    texts = default_texts()
    assert sum(map(len, texts)) > 1_000_000
    assert texts == default_texts()
    assert any("def " in text for text in texts)


def test_data_sets_are_read_by_their_first_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, object]]:
            if name == "broken":
                raise RuntimeError("offline")
            return [{"id": i, "text" if name == "plain" else "story": f"text {i}"} for i in range(1000)]

    monkeypatch.setitem(sys.modules, "datasets", Fake)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Fake)
    assert read_texts("plain", 50)[0][:2] == ["text 0", "text 1"]
    assert len(read_texts("other", 50)[0]) == 9
    with pytest.raises(ConfigError, match="cannot be loaded: offline"):
        read_texts("broken", 50)


@pytest.mark.parametrize("data", [b"\xff\xfe\xfa", b"abc \x80"])
def test_text_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(ConfigError, match="not a text in UTF-8"):
        read_texts(str(tmp_path / "x.txt"), 50)
