"""Draft models of real files: the same text, and a clear sentence where a draft cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from models import make_tiny
from nybble import LLM, SamplingParams
from nybble.cli.named import speculation
from nybble.core.errors import ConfigError, ModelNotFoundError
from nybble.store.create import Recipe
from nybble.store.manifest import Manifest
from nybble.store.modelfile import parse_modelfile

pytestmark = pytest.mark.e2e

SIZES = {"max_model_len": 128, "kv_cache_memory": "8MiB", "max_num_seqs": 4, "threads": 1}
PROMPTS = [list(range(1, 40)), [7, 8, 9], [250] * 17]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    base = tmp_path_factory.mktemp("pair")
    return (
        make_tiny("llama", base / "target", num_hidden_layers=3),
        make_tiny("qwen2", base / "draft", seed=1),
        other_tokenizer(make_tiny("llama", base / "other")),
    )


def other_tokenizer(folder: Path) -> Path:
    """Two letters change their places in the vocabulary."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    ids = content["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    path.write_text(json.dumps(content), "utf-8")
    return folder


def answers(llm: LLM) -> list[list[int]]:
    params = [
        SamplingParams(temperature=0.0 if i == 1 else 0.9, top_p=0.95, seed=i, max_tokens=40, ignore_eos=True)
        for i in range(3)
    ]
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def plain(folders: tuple[Path, Path, Path]) -> list[list[int]]:
    return answers(LLM(folders[0], speculate="off", **SIZES))


def test_the_text_is_the_same_with_another_model(folders, plain) -> None:
    llm = LLM(folders[0], speculate=f"draft={folders[1]},k=3,always", **SIZES)
    assert answers(llm) == plain
    assert llm.engine_stats().speculation.drafted > 50


def test_the_text_is_the_same_with_itself_at_fewer_bits(folders, plain, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path))
    for mode, is_always_right in ((f"draft={folders[0]},always", True), ("draft=self:q8_0,always", False)):
        llm = LLM(folders[0], speculate=mode, **SIZES)
        assert answers(llm) == plain
        stats = llm.engine_stats().speculation
        assert 0 < stats.accepted <= stats.drafted
        assert (stats.accepted == stats.drafted) == is_always_right  # the same model draws with the same numbers
    assert not list(tmp_path.glob("quantised-*"))


def test_what_cannot_draft_is_refused_at_start(folders) -> None:
    with pytest.raises(ConfigError, match=r"has another tokenizer than .*token \d+ is '[AB]' and not '[AB]'"):
        LLM(folders[0], speculate=f"draft={folders[2]}", **SIZES)
    with pytest.raises(ModelNotFoundError):
        LLM(folders[0], speculate="draft=./nothing.gguf", **SIZES)
    with pytest.raises(ConfigError, match="q7_9"):
        LLM(folders[0], speculate="draft=self:q7_9", **SIZES)


def test_a_draft_that_is_larger_is_said(folders, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        LLM(folders[1], speculate=f"draft={folders[0]}", **SIZES)
    assert any("a draft should be several times smaller" in record.getMessage() for record in caplog.records)


# ---- Modelfiles ----


def test_a_modelfile_names_its_draft(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"x")
    recipe = Recipe(None, lambda name: (name, Manifest(None)), tmp_path, None, lambda text: None)  # type: ignore[arg-type]
    for text, expected in (
        ("DRAFT small.gguf", f"draft={tmp_path / 'small.gguf'}"),
        ("draft smollm2:135m", "draft=smollm2:135m"),
        ("PARAMETER speculate off", "off"),
        ("DRAFT self:q2_k\nPARAMETER draft_num_predict 4", "draft=self:q2_k,k=4"),
        ("PARAMETER draft_num_predict 4", "auto"),
    ):
        parameters = recipe.build(parse_modelfile("FROM x\n" + text)).parameters
        assert speculation(parameters, None) == expected
        assert speculation(parameters, "ngram") == "ngram"
    with pytest.raises(ConfigError, match="line 2, column 7: there is no file"):
        recipe.build(parse_modelfile("FROM x\nDRAFT ./none.gguf"))
