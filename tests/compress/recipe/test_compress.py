"""Recipes run from end to end on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.checkpoint import open_checkpoint
from nybble.compress.methods import Silent
from nybble.compress.recipe.curve import draw_curve, read_curve
from nybble.compress.recipe.plan import Recipe, load_recipe
from nybble.compress.recipe.run import compress
from nybble.core.errors import ConfigError, OutputError


class Notes(Silent):
    """Keeps what is said. interrupt_at: as if somebody pressed Ctrl-C when it is."""

    def __init__(self, interrupt_at: str | None = None) -> None:
        self.notes: list[str] = []
        self._interrupt_at = interrupt_at

    def note(self, message: str) -> None:
        self.notes.append(message)
        if self._interrupt_at is not None and self._interrupt_at in message:
            raise KeyboardInterrupt


def recipe(tmp_path: Path, text: Path, stages: str, *, speed: bool = False) -> Recipe:
    path = tmp_path / "recipe.yaml"
    report = f"report: {{text: {text}, ctx: 64, tokens: 256, speed: {str(speed).lower()}}}\n"
    path.write_text(f"stages:\n{stages}{report}", "utf-8")
    return load_recipe(path)


def prune_and_quantise(text: Path) -> str:
    few = f"calibrate: {text}, calibration_samples: 8, calibration_tokens: 32"
    return f"- prune: {{drop_layers: 0.25, {few}}}\n- quantise: {{type: Q8_0}}\n"


@pytest.mark.unit
def test_stages_run_in_order_and_one_report_says_what_each_cost(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = compress(llama, out, recipe(tmp_path, text, prune_and_quantise(text), speed=True), progress=Silent())
    assert len(open_checkpoint(out).spec.layers) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.report", "recipe.yaml"]
    found = json.loads((done.report_folder / "report.json").read_text())
    assert [model["name"] for model in found["models"]] == ["llama (before)", "after 1. prune", "after 2. quantise"]
    whole, pruned, quantised = found["models"]
    assert whole["parameters"] > pruned["parameters"] == quantised["parameters"]
    assert whole["bytes"] > pruned["bytes"] > quantised["bytes"]
    assert all(model["decode_tok_s"]["median"] > 0 for model in found["models"])
    quality = found["quality"]["models"]
    assert quality[0]["loss"]["mean_kl"]["low"] <= quality[0]["loss"]["mean_kl"]["value"]
    assert found["stages"][0]["figures"]["layers"] == 3 and found["stages"][1]["options"] == {"type": "Q8_0"}
    page = (done.report_folder / "report.html").read_text()
    assert "after 2. quantise" in page and "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    names, rows = done.report.table()
    assert all(len(row) == len(names) for row in rows)


@pytest.mark.unit
def test_finished_stages_are_not_done_again(llama: Path, text: Path, tmp_path: Path) -> None:
    plan, out = recipe(tmp_path, text, prune_and_quantise(text)), tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        compress(llama, out, plan, progress=Notes("stage 2 of 2"))
    kept = tmp_path / "out.gguf.partial" / "1-prune" / "model.safetensors"
    assert kept.exists() and not out.exists()
    with pytest.raises(OutputError, match=r"1 stages done.*--resume, or start again with --force"):
        compress(llama, out, plan, progress=Silent())
    notes = Notes()
    compress(llama, out, plan, progress=notes, resume=True)
    assert "stage 1 of 2: prune is finished already" in notes.notes
    assert out.exists() and not kept.exists()


@pytest.mark.unit
def test_the_model_that_the_recipe_began_with_writes_the_text(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def write(model: Path, num_tokens: int, seed: int, progress: object) -> list[list[int]]:
        asked.append((model, num_tokens, seed))
        return [list(range(32, 96)) for _ in range(16)]

    monkeypatch.setattr("nybble.compress.calibration.own_text.write_own_text", write)
    few = "calibrate: self, calibration_samples: 8, calibration_tokens: 32"
    stages = f"- prune: {{drop_layers: 0.25, {few}}}\n- quantise: {{type: gptq-4bit, group_size: 32, {few}}}\n"
    plan, notes = recipe(tmp_path, text, stages), Notes("stage 2 of 2")
    with pytest.raises(KeyboardInterrupt):
        compress(llama, tmp_path / "out", plan, progress=notes)
    notes = Notes()
    compress(llama, tmp_path / "out", plan, progress=notes, resume=True)
    assert asked == [(llama, 8 * 32 * 9 // 8, 0)] * 2
    assert "stage 1 of 2: prune is finished already" in notes.notes


@pytest.mark.unit
@pytest.mark.parametrize(
    "stage", ["prune: {method: wanda, amount: 0.5, calibrate: 5}", "quantise: {type: int4, calibrate: 5}"]
)
def test_a_text_that_is_none_is_refused(text: Path, tmp_path: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match="calibrate is 5, but must be a text"):
        recipe(tmp_path, text, f"- {stage}\n")


@pytest.mark.unit
def test_a_stage_with_other_options_is_done_again(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        compress(llama, out, recipe(tmp_path, text, prune_and_quantise(text)), progress=Notes("stage 2 of 2"))
    notes = Notes()
    other = prune_and_quantise(text).replace("0.25", "0.5")
    compress(llama, out, recipe(tmp_path, text, other), progress=notes, resume=True)
    assert "stage 1 of 2: prune" in notes.notes
    assert len(open_checkpoint(out).spec.layers) == 2


@pytest.mark.unit
def test_a_student_learns_from_what_the_recipe_began_with(llama: Path, text: Path, tmp_path: Path) -> None:
    few = f"calibrate: {text}, calibration_samples: 8, calibration_tokens: 32"
    training = f"steps: 3, batch: 1, seq_len: 32, data: {text}, bf16: false"
    stages = f"- prune: {{ffn_width: 0.5, {few}}}\n- distil: {{{training}}}\n"
    done = compress(llama, tmp_path / "out", recipe(tmp_path, text, stages), progress=Silent())
    assert open_checkpoint(tmp_path / "out").spec.layers[0].ffn_size == 64
    log = done.report_folder / "2-distil.jsonl"
    assert len(read_curve(log)) == 3
    assert len(draw_curve(read_curve(log))) > 5
    assert "2. distil" in (done.report_folder / "report.html").read_text()


@pytest.mark.unit
def test_bad_input_is_one_sentence_and_leaves_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    plan = recipe(tmp_path, text, prune_and_quantise(text))
    (tmp_path / "there.gguf").write_bytes(b"x")
    with pytest.raises(OutputError, match="exists already"):
        compress(llama, tmp_path / "there.gguf", plan, progress=Silent())
    with pytest.raises(OutputError, match="does not exist"):
        compress(llama, tmp_path / "no" / "out.gguf", plan, progress=Silent())
    with pytest.raises(ConfigError, match=r"must end in \.gguf"):
        compress(llama, tmp_path / "out", plan, progress=Silent())
    wrong = recipe(tmp_path, text, prune_and_quantise(text).replace("0.25", "9"))
    with pytest.raises(ConfigError, match=r"stage 1 .prune.: drop_layers is 9, but the model has 4 layers"):
        compress(llama, tmp_path / "out.gguf", wrong, progress=Silent())
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.unit
def test_a_log_cut_off_by_a_kill_still_gives_its_curve(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": i, "loss": 3 - i / 1000}) for i in range(1000)]
    log.write_text("\n".join([*lines, '{"step": 1000, "lo']), "utf-8")
    points = read_curve(log)
    assert 300 <= len(points) <= 400 and points[-1][0] == 999
    assert read_curve(tmp_path / "missing") == []
