"""Whole evaluations of small models: the windows, the reference's logits, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fakes import VOCAB, FakeModel, continuation
from models import make_tiny, to_gguf
from nybble import RoundToNearestConfig, quantize
from nybble.core.errors import ConfigError, ModelNotFoundError
from nybble.engine.load import load_model
from nybble.engine.scheduler import blocks_for
from nybble.evaluate import evaluate
from nybble.evaluate import spool as spool_module
from nybble.evaluate.compare import score
from nybble.evaluate.divergence import divergence
from nybble.evaluate.perplexity import perplexity
from nybble.evaluate.spool import LogitsSpool
from nybble.evaluate.windows import split_windows, window_logits

pytestmark = pytest.mark.e2e
CTX = 48
WORDS = "the lower and the other one then an end in the low land, on and on. " * 40


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    make_tiny("llama", folder / "tiny")
    for quant in ("Q8_0", "Q4_0"):
        to_gguf(folder / "tiny", folder / f"{quant}.gguf", quant)
    make_tiny("llama", folder / "wider", vocab_size=300)
    (folder / "text.txt").write_text(WORDS, "utf-8")
    return folder


class Counter:
    def __init__(self) -> None:
        self.total, self.done, self.what = 0, 0, [""]

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, windows: int, what: str) -> None:
        self.done += windows
        if what != self.what[-1]:
            self.what.append(what)


def test_against_the_two_models_side_by_side(here: Path) -> None:
    """The same figures as from both models' logits in memory, and from `perplexity`."""
    progress = Counter()
    paths = [here / "Q8_0.gguf", here / "Q4_0.gguf"]
    report = evaluate(
        paths, here / "text.txt", reference=here / "tiny", ctx=CTX, tokens=4 * CTX + 5, threads=1, progress=progress
    )
    assert (progress.total, progress.done) == (12, 12)
    assert progress.what == ["", "tiny", "Q8_0.gguf", "Q4_0.gguf"]
    conditions = report.conditions
    assert (conditions.windows, conditions.score_from, conditions.scored_tokens) == (4, 25, 4 * 23)
    reference = load_model(here / "tiny", threads=1, context=CTX)
    windows = split_windows(reference.tokenizer.encode(WORDS, add_special=True), CTX, count=4)
    rows = {}
    for path in (here / "tiny", *paths):
        model = load_model(path, threads=1, context=CTX).model
        model.new_cache(blocks_for(CTX))
        pieces = [logits for w in windows for _, logits in window_logits(model, w[:-1], first_row=CTX // 2)]
        rows[path] = np.concatenate(pieces)
        found = next(one for one in report.rows if one.name == path.name)
        alone = perplexity(model, [token for window in windows for token in window], ctx=CTX)
        assert found.quality.perplexity.value == pytest.approx(alone.perplexity, rel=1e-9)
    for result, path in zip(report.models, paths, strict=True):
        expected = divergence(rows[here / "tiny"], rows[path])
        assert result.loss is not None
        assert result.loss.mean_kl.value == pytest.approx(expected.mean_kl, rel=1e-9)
        assert result.loss.p99_kl.value == pytest.approx(expected.p99_kl, rel=1e-9)
        assert result.loss.top1_agreement.value == expected.top1_agreement
        assert result.bytes == path.stat().st_size
    q8, q4 = report.models
    assert q8.loss is not None and q4.loss is not None
    assert q8.loss.mean_kl.value < q4.loss.mean_kl.value
    assert (q8.linear_bpw, q4.linear_bpw) == (8.5, 4.5)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["models"][0]["name"] == "Q8_0.gguf"


def test_a_model_against_itself_loses_nothing(here: Path) -> None:
    report = evaluate([here / "Q4_0.gguf"], here / "text.txt", reference=here / "Q4_0.gguf", ctx=CTX, tokens=300)
    found = report.models[0].loss
    assert found is not None
    assert abs(found.p99_kl.value) < 1e-12 and abs(found.mean_kl.value) < 1e-12
    assert (found.top1_agreement.value, found.flips.value, found.perplexity_ratio.value) == (1.0, 0.0, 1.0)


def test_without_a_reference_there_is_only_perplexity(here: Path) -> None:
    report = evaluate([str(here / "Q4_0.gguf")], str(here / "text.txt"), ctx=CTX, tokens=CTX)
    assert report.reference is None
    assert report.models[0].loss is None
    document = report.to_json()
    assert document["models"][0]["quality"]["perplexity"]["value"] > 1


def test_the_bits_of_a_quantised_folder_count_its_scales(here: Path, tmp_path: Path) -> None:
    quantize(here / "tiny", RoundToNearestConfig("int4", group_size=32), tmp_path / "int4")
    found = evaluate([tmp_path / "int4"], here / "text.txt", ctx=CTX, tokens=CTX).models[0]
    assert 4.5 < found.linear_bpw < 4.6  # a float16 per 32 codes, and the shape of each matrix
    assert found.linear_bpw < found.bpw < 16


def test_one_name_in_two_folders_is_told_apart(here: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(here / "Q4_0.gguf", tmp_path / folder / "m.gguf")
    report = evaluate([tmp_path / "a/m.gguf", tmp_path / "b/m.gguf"], here / "text.txt", ctx=CTX, tokens=CTX)
    assert [model.name for model in report.models] == ["a/m.gguf", "b/m.gguf"]


def test_the_second_half_of_each_window_is_scored_in_place() -> None:
    """The fake model predicts from the whole window before a token: a wrong offset would lose every hit."""
    windows = [[first, *continuation([first], 39)] for first in (3, 8)]
    windows[1][30] = (windows[1][30] + 1) % VOCAB  # a miss, and so is all that follows it
    scores = score(FakeModel(), windows)
    assert scores.right.tolist() == [True] * 19 + [position < 30 for position in range(21, 40)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx": 4096}, "tiny reads 512 tokens at most"),
        ({"ctx": 3}, "at least 4 tokens"),
        ({"ctx": CTX, "tokens": 10}, "less than one window"),
        ({"ctx": CTX, "tokens": 10**6}, "the text is too short"),
    ],
)
def test_windows_that_cannot_be_are_refused(here: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate([here / "tiny"], here / "text.txt", **options)


def test_other_refusals(here: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff" * 1000)
    text = here / "text.txt"
    with pytest.raises(ConfigError, match="vocabularies of 272 and 300"):
        evaluate([here / "wider"], text, reference=here / "tiny", ctx=CTX)
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read"):
        evaluate([here / "tiny"], tmp_path / "none.txt", ctx=CTX)
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 3\)"):
        evaluate([here / "tiny"], tmp_path / "bytes.txt", ctx=CTX)
    with pytest.raises(ConfigError, match="name at least one"):
        evaluate([], text)
    with pytest.raises(ModelNotFoundError):
        evaluate([tmp_path / "none.gguf"], text, ctx=CTX)


def test_other_tokens_for_the_same_text_are_refused(here: Path, tmp_path: Path) -> None:
    other = shutil.copytree(here / "tiny", tmp_path / "other")
    described = json.loads((other / "tokenizer.json").read_text("utf-8"))
    described["model"]["merges"] = described["model"]["merges"][:3]
    (other / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    with pytest.raises(ConfigError, match="tiny and other cut the text into different tokens"):
        evaluate([other], here / "text.txt", reference=here / "tiny", ctx=CTX)


def test_weights_that_are_not_numbers_are_one_sentence(here: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    broken = shutil.copytree(here / "tiny", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(ConfigError, match="broken cannot be scored, a logit is not finite"):
        evaluate([broken], here / "text.txt", ctx=CTX, tokens=CTX)


def test_the_spool_gives_back_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module.tempfile, "tempdir", str(tmp_path))
    rows = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    with LogitsSpool(10, 6) as spool:
        spool.write(rows[:3])
        spool.write(rows[3:])
        for _ in range(2):
            spool.rewind()
            assert (np.concatenate([spool.read(4), spool.read(6)]) == rows).all()
        assert list(tmp_path.iterdir()) == []  # it has no name that could be left behind
    with pytest.raises(ConfigError, match="score fewer tokens with --tokens"):
        LogitsSpool(10**12, 10**5)
    gc.collect()
