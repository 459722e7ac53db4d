"""What a pass has found is what `nybble.checkpoint` reads back, value by value, for every dialect and option."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from folder_helpers import Notes, calibrated, errors_of, logits, quantisation, run

from models import make_tiny
from nybble.checkpoint import open_checkpoint
from nybble.compress.awq import walk as awq_walk
from nybble.compress.awq.walk import fold
from nybble.compress.bnb import walk as bnb_walk
from nybble.compress.gguf.imatrix import ImportanceMatrix
from nybble.compress.gptq import walk as gptq_walk
from nybble.compress.grids import Grid, round_to_nearest
from nybble.compress.rtn import walk as rtn_walk
from nybble.compress.safetensors.model import open_folder_model
from nybble.compress.safetensors.options import fitting_group
from nybble.formats.dialects.gptq import write_gptq
from nybble.quant.weights import GroupedInt
from nybble.tokenizer import load_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

WRITERS = {
    "rtn": (rtn_walk, ("write_packed", "write_float8")),
    "bnb": (bnb_walk, ("write_codebook4", "write_row_int8")),
    "gptq": (gptq_walk, ("write_gptq",)),
    "awq": (awq_walk, ("write_awq",)),
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("rtn", to, {}) for to in ("int8", "int4", "int3", "int2", "fp8")),
    *(("rtn", to, {"symmetric": False}) for to in ("int8", "int4", "int3", "int2")),
    ("rtn", "int4", {"group_size": -1, "clip_search": False}),
    ("rtn", "int8", {"group_size": 32}),
    ("rtn", "int4", {"tensors": (("down", "int8"), ("q_proj", "fp8"), ("o_proj", "bf16"))}),
    *(("bnb", to, {}) for to in ("nf4", "fp4", "llm-int8")),
    ("bnb", "nf4", {"double_quant": True}),
    *(("gptq", f"gptq-{bits}bit", {"symmetric": symmetric}) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    ("gptq", "gptq-8bit", {"group_size": 32}),
    ("gptq", "gptq-4bit", {"group_size": -1}),
    ("gptq", "gptq-4bit", {"desc_act": True}),
    ("gptq", "gptq-4bit", {"desc_act": True, "static_groups": True, "group_size": 32, "damp_percent": 0.2}),
    ("awq", "awq-4bit", {}),
    ("awq", "awq-4bit", {"symmetric": True, "clip_search": False, "group_size": 32}),
]


def case_id(value: object) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("family", "to", "options"), CASES, ids=case_id)
def test_values_survive_the_file(
    llama: Path, text: Path, tmp_path: Path, family: str, to: str, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    walk, writers = WRITERS[family]
    packed: dict[str, npt.NDArray[np.float32]] = {}

    def recorded(write: Any) -> Any:
        def record(stem: str, weight: Any, **kwargs: Any) -> Any:
            nested = kwargs.get("nested")
            if nested is not None:
                weight = type(weight)(weight.table, weight.codes, nested.decode(), weight.block)
                packed[stem] = weight.decode()
                return write(stem, weight, **kwargs)
            packed[stem] = weight.decode()
            return write(stem, weight, **kwargs)

        return record

    for name in writers:
        monkeypatch.setattr(walk, name, recorded(getattr(walk, name)))
    run(llama, tmp_path / "out", to, **options, **(calibrated(text) if family in ("gptq", "awq") else {}))
    checkpoint = open_checkpoint(tmp_path / "out")
    read = {
        checkpoint.sources[name].name.removesuffix(".weight"): tensor.to_float32()
        for name, tensor in checkpoint.tensors.items()
        if tensor.packed is not None
    }
    assert read.keys() == packed.keys() & read.keys()
    assert len(read) == (12 if "tensors" in options else 14)
    for stem, values in read.items():
        np.testing.assert_array_equal(values, packed[stem], err_msg=stem)


def test_rounding_is_what_it_says(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", "int4", clip_search=False)
    before, after = open_checkpoint(llama), open_checkpoint(tmp_path / "out")
    for name, tensor in after.tensors.items():
        if tensor.packed is not None:
            codes, params = round_to_nearest(torch.from_numpy(before.tensors[name].to_float32()), Grid(4, 128))
            weight = tensor.packed()
            assert isinstance(weight, GroupedInt)
            np.testing.assert_array_equal(weight.codes, codes.numpy())
            np.testing.assert_array_equal(weight.scales.astype(np.float32), params.scale.numpy())


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_computes_better_than_rounding(llama: Path, text: Path, tmp_path: Path, bits: int) -> None:
    options = {**calibrated(text), "report": True}
    run(llama, tmp_path / "gptq", f"gptq-{bits}bit", **options)
    run(llama, tmp_path / "rtn", f"int{bits}", tensors=())
    for stem, entry in errors_of(tmp_path / "gptq").items():
        assert entry["error"] <= entry["rtn_error"], stem
    assert on_text(tmp_path / "gptq", llama, text) < 0.6 * on_text(tmp_path / "rtn", llama, text)


def test_awq_computes_better_than_rounding(llama: Path, text: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "awq", "awq-4bit", report=True, **calibrated(text))
    run(llama, tmp_path / "rtn", "int4", symmetric=False, clip_search=False)
    for stem, entry in errors_of(tmp_path / "awq").items():
        assert entry["error"] <= 1.05 * entry["rtn_error"], stem  # one scale serves several linears
    assert on_text(tmp_path / "awq", llama, text) < on_text(tmp_path / "rtn", llama, text)


def test_ranges_are_clipped_where_it_is_known_which_inputs_matter(llama: Path, text: Path, tmp_path: Path) -> None:
    def written(name: str, progress: Notes | None = None, **options: Any) -> bytes:
        run(llama, tmp_path / name, "int3", progress, **options)
        return (tmp_path / name / "model.safetensors").read_bytes()

    progress = Notes()
    plain, blind = written("a"), written("b", progress, clip_search=True)
    assert plain == written("c", clip_search=False)
    assert plain != blind
    assert any("knows nothing of the inputs" in note for note in progress.notes)
    weighted, unsearched = written("d", **calibrated(text)), written("e", clip_search=False, **calibrated(text))
    assert weighted != unsearched
    assert weighted != blind


def test_importance_of_inputs_helps(llama: Path, text: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "plain", "int2")
    run(llama, tmp_path / "weighted", "int2", report=True, **calibrated(text))
    weighted = sum(entry["weighted_relative_error"] for entry in errors_of(tmp_path / "weighted").values())
    assert weighted > 0
    assert on_text(tmp_path / "weighted", llama, text) < on_text(tmp_path / "plain", llama, text)


def test_an_importance_matrix_weighs_like_the_text(llama: Path, tmp_path: Path) -> None:
    matrix = ImportanceMatrix()
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for layer in range(2):
        for name in names:
            columns = 256 if name == "ffn_down" else 128
            matrix.add(f"blk.{layer}.{name}.weight", np.linspace(0.01, 100.0, columns) ** 2, 10)
    matrix.write(tmp_path / "m.gguf")
    run(llama, tmp_path / "weighted", "int3", imatrix=tmp_path / "m.gguf")
    run(llama, tmp_path / "plain", "int3")
    source = open_checkpoint(llama).tensors["layers.0.attn.q"].to_float32()
    errors = []
    for name in ("weighted", "plain"):
        found = open_checkpoint(tmp_path / name).tensors["layers.0.attn.q"].to_float32()
        errors.append(float((np.square(found - source) * np.linspace(0.01, 100.0, 128) ** 2).sum()))
    assert errors[0] < errors[1]


def on_text(path: Path, reference: Path, text: Path) -> float:
    """The mean square of what the logits are off by, on the last part of the text."""
    from nybble.backends.torch import TorchDecoder

    tokenizer = load_tokenizer(open_checkpoint(reference).tokenizer)
    token_ids = tokenizer.encode(text.read_text()[-2000:], add_special=False)[-400:]
    tokens = torch.tensor(token_ids).reshape(4, 100)
    with torch.no_grad():
        a, b = (TorchDecoder(open_checkpoint(one)).logits(tokens) for one in (path, reference))
    return float((a - b).square().mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_folding_leaves_the_function_alone(tmp_path: Path, family: str) -> None:
    from nybble.backends.torch import TorchDecoder

    model = open_folder_model(make_tiny(family, tmp_path / "model"))
    decoder = TorchDecoder(model.checkpoint)
    spec = model.spec.layers[0]
    generator = torch.Generator().manual_seed(0)
    scales = [torch.rand(width, generator=generator) + 0.5 for width in (64, 0, 64, spec.ffn_size)]
    shared = torch.rand(spec.num_kv_heads, 1, spec.head_dim, generator=generator) + 0.5
    scales[1] = shared.expand(-1, spec.num_q_heads // spec.num_kv_heads, -1).reshape(-1)
    x = torch.randn(2, 9, 64, generator=generator)
    with torch.no_grad():
        layer = decoder.layer(0, 9)
        expected = layer.forward(x)
        changed = fold(layer, scales)
        torch.testing.assert_close(layer.forward(x), expected, atol=1e-4, rtol=1e-4)
    assert set(changed) >= {"attn_norm", "ffn_norm"}


def test_files_of_gptq_say_what_they_are(llama: Path, text: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "a", "gptq-4bit", desc_act=True, tensors=(("v_proj", "fp16"),), **calibrated(text))
    config = quantisation(tmp_path / "a")
    assert (config["bits"], config["group_size"], config["desc_act"], config["sym"]) == (4, 128, True, True)
    assert config["checkpoint_format"] == "gptq"
    left_out = [pattern.removeprefix("-:") for pattern in config["dynamic"]]
    assert [bool(re.match(p, "model.layers.0.self_attn.v_proj")) for p in left_out].count(True) == 1
    weight = open_checkpoint(tmp_path / "a").tensors["layers.1.ffn.down"].packed
    assert weight is not None
    grouped = weight()
    assert isinstance(grouped, GroupedInt)
    assert grouped.g_idx is not None
    assert np.bincount(grouped.g_idx).tolist() == [128, 128]
    assert np.isfinite(logits(tmp_path / "a").numpy()).all()


def test_version_1_of_gptq_has_no_zero_point_of_0() -> None:
    codes, scales = np.zeros((32, 32), np.uint8), np.ones((32, 1), np.float32)
    for version, zero, good in ((1, 0, False), (1, 1, True), (2, 0, True), (2, 16, False)):
        weight = GroupedInt(4, 32, codes, scales, np.full((32, 1), zero, np.int16))
        if good:
            assert write_gptq("x", weight, version=version)
        else:
            with pytest.raises(ValueError, match="zero points from"):
                write_gptq("x", weight, version=version)


@pytest.mark.parametrize(
    ("wanted", "widths", "size"),
    [
        (128, [256, 128], 128),
        (128, [576, 1536], 64),
        (128, [64, 96], 32),
        (64, [40], -1),
        (16, [48], 16),
        (-1, [7], -1),
    ],
)
def test_groups_that_do_not_fit_become_smaller(wanted: int, widths: list[int], size: int) -> None:
    found, note = fitting_group(wanted, widths)
    assert found == size
    assert (note is None) == (found == wanted)


def test_sizes(tmp_path: Path) -> None:
    """Shares of the bytes that linears have in 16 bits, scales included."""
    folder = make_tiny("llama", tmp_path / "model", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    for to, most in (("int8", 0.51), ("int4", 0.28), ("int2", 0.16), ("gptq-4bit", 0.28), ("awq-4bit", 0.28)):
        by_type = run(folder, tmp_path / to, to, dry_run=True).by_type
        wide = run(folder, tmp_path / to, "fp16", dry_run=True).by_type["F16"][1] - by_type["F16"][1]
        assert by_type[to][1] < most * wide
