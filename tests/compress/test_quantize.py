"""`quantize` and `to_gguf` on small models of every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models import FAMILIES, make_tiny
from models import to_gguf as write_gguf
from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.compress import methods, table
from nybble.compress.convert.run import convert as to_gguf
from nybble.compress.gguf.imatrix import ImportanceMatrix
from nybble.compress.methods import QuantizeReport, QuantizeRequest, Silent
from nybble.core.errors import CheckpointError, ConfigError, OutputError
from nybble.formats.gguf import GgufFile
from nybble.quant.formats import FORMATS
from nybble.tokenizer import load_tokenizer

assert table  # registers the types
TEXT = "the lower and on in there 123 \u00fc\n x"


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0
        self.total = 0

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, weights: int, what: str) -> None:
        self.done += weights

    def note(self, message: str) -> None:
        self.notes.append(message)


def run(
    source: Path, target: Path, to: str = "Q8_0", progress: Silent | None = None, **options: object
) -> QuantizeReport:
    method = methods.find(to)
    request = QuantizeRequest(source, target, method, threads=1, **options)  # type: ignore[arg-type]
    return method.run(request, progress or Silent())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, root / f"tiny-{i}") for i, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def llama_gguf(folders: dict[str, Path]) -> Path:
    path = folders["llama"] / "model.gguf"
    to_gguf(folders["llama"], path, Silent())
    return path


def values(checkpoint: Checkpoint, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """As in a folder: pairs of dimensions half a head apart."""
    tensor = checkpoint.tensors[name]
    found = tensor.to_float32()
    parts = name.split(".")
    if (parts[0] == "layers" and parts[-1] in ("q", "k")) or parts[-2:-1] in (["q"], ["k"]):
        layer = checkpoint.spec.layers[int(parts[1])]
        if layer.rope.interleaved:
            heads = layer.num_q_heads if "q" in parts else layer.num_kv_heads
            found = found.reshape(heads, -1, 2, *found.shape[1:]).swapaxes(1, 2).reshape(found.shape)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_a_gguf_file_with_the_same_values(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    to_gguf(folders[family], tmp_path / "m.gguf", Silent())
    before, after = open_checkpoint(folders[family]), open_checkpoint(tmp_path / "m.gguf")
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        np.testing.assert_array_equal(values(before, name), values(after, name), err_msg=name)
    for old, new in zip(before.spec.layers, after.spec.layers, strict=True):
        assert (old.num_q_heads, old.num_kv_heads, old.head_dim, old.ffn_size, old.window) == (
            new.num_q_heads, new.num_kv_heads, new.head_dim, new.ffn_size, new.window
        )  # fmt: skip
        assert new.sm_scale == pytest.approx(old.sm_scale)
        assert new.rope.base == pytest.approx(old.rope.base)
        assert (old.qkv_bias, old.qk_norm, old.post_norms) == (new.qkv_bias, new.qk_norm, new.post_norms)
    assert after.spec.norm_eps == pytest.approx(before.spec.norm_eps)
    assert after.spec.logit_softcap == before.spec.logit_softcap
    assert (after.eos_token_ids, after.bos_token_id) == (before.eos_token_ids, before.bos_token_id)
    assert after.chat_template == before.chat_template
    tokenizers = [load_tokenizer(checkpoint.tokenizer) for checkpoint in (before, after)]
    assert tokenizers[0].encode(TEXT, add_special=True) == tokenizers[1].encode(TEXT, add_special=True)


ROPES = {
    "llama3": ("llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "linear": ("llama", {"factor": 2.0}),
    "yarn": ("qwen2", {"factor": 4.0}),
    "longrope": ("phi3", {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_survives(kind: str, tmp_path: Path) -> None:
    from nybble.core.rope import inverse_frequencies

    family, parameters = ROPES[kind]
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **parameters}
    extra = {"original_max_position_embeddings": 64} if kind == "longrope" else {}
    folder = make_tiny(family, tmp_path / "folder", rope_parameters=rope, **extra)
    to_gguf(folder, tmp_path / "m.gguf", Silent())
    for context in (32, 512):
        old, new = (
            inverse_frequencies(open_checkpoint(path).spec.layers[0].rope, context)
            for path in (folder, tmp_path / "m.gguf")
        )
        np.testing.assert_allclose(new[0], old[0], rtol=1e-6)
        assert new[1] == pytest.approx(old[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
def test_quantising_a_folder_or_its_gguf_file_is_the_same(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    to_gguf(folders[family], tmp_path / "full.gguf", Silent())
    run(folders[family], tmp_path / "a.gguf", "Q4_0")
    run(tmp_path / "full.gguf", tmp_path / "b.gguf", "Q4_0")
    a, b = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert {name: bytes(a.data(t)) for name, t in a.tensors.items()} == {
        name: bytes(b.data(t)) for name, t in b.tensors.items()
    }
    assert set(a.metadata) == set(b.metadata)
    assert open_checkpoint(tmp_path / "a.gguf").tensors["layers.0.ffn.gate"].format.name == "Q4_0"


def test_every_type_can_be_written_and_opened(llama_gguf: Path, tmp_path: Path) -> None:
    for name in methods.names():
        if methods.find(name).container != "gguf":
            continue
        report = run(llama_gguf, tmp_path / f"{name}.gguf", name)
        assert (tmp_path / f"{name}.gguf").stat().st_size == report.target_bytes
        dry = run(llama_gguf, tmp_path / "none.gguf", name, dry_run=True)
        assert replace(dry, notes=dry.notes[:-1]) == report
        assert dry.notes[-1].startswith("it would take about ")
        checkpoint = open_checkpoint(tmp_path / f"{name}.gguf")
        assert checkpoint.tensors["final_norm"].format is FORMATS["F32"]
    assert not (tmp_path / "none.gguf").exists()


def test_keys_keep_their_types_and_values(llama_gguf: Path, tmp_path: Path) -> None:
    run(llama_gguf, tmp_path / "q.gguf", "Q4_K_M")
    before, after = GgufFile(llama_gguf), GgufFile(tmp_path / "q.gguf")
    assert after.metadata["general.file_type"] == 15
    assert after.metadata["general.quantization_version"] == 2
    for key in before.metadata:
        if key not in ("general.file_type", "general.quantization_version"):
            assert after.value_bytes(key) == before.value_bytes(key)


def test_another_alignment_is_not_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(folders["llama"], tmp_path / "m.gguf", alignment=256)
    run(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q4_0")
    assert "general.alignment" not in GgufFile(tmp_path / "q.gguf").metadata
    open_checkpoint(tmp_path / "q.gguf")


def test_falling_back_is_said(llama_gguf: Path, tmp_path: Path) -> None:
    progress = Notes()
    run(llama_gguf, tmp_path / "q.gguf", "Q4_K_M", progress)
    assert any("are Q5_0 instead of Q4_K, whose blocks do not divide it" in note for note in progress.notes)
    assert progress.done == progress.total > 0


def test_quantising_twice_is_said(llama_gguf: Path, tmp_path: Path) -> None:
    run(llama_gguf, tmp_path / "a.gguf", "Q8_0")
    progress = Notes()
    run(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0", progress)
    assert any("already quantised (Q8_0)" in note for note in progress.notes)


def importance_of(path: Path) -> ImportanceMatrix:
    matrix = ImportanceMatrix(datasets=("some text",), num_chunks=2)
    rng = np.random.default_rng(0)
    for tensor in GgufFile(path).tensors.values():
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            matrix.add(tensor.name, np.square(rng.standard_normal(tensor.shape[1]) ** 3), 4)
    return matrix


def test_an_importance_matrix_is_used_and_named(llama_gguf: Path, tmp_path: Path) -> None:
    matrix = importance_of(llama_gguf)
    matrix.write(tmp_path / "i.gguf")
    run(llama_gguf, tmp_path / "with.gguf", "Q4_1", imatrix=tmp_path / "i.gguf")
    run(llama_gguf, tmp_path / "without.gguf", "Q4_1")
    full, with_it, without = (GgufFile(p) for p in (llama_gguf, tmp_path / "with.gguf", tmp_path / "without.gguf"))
    assert with_it.metadata["quantize.imatrix.dataset"] == "some text"
    assert with_it.metadata["quantize.imatrix.entries_count"] == len(matrix.entries)
    name = "blk.1.ffn_up.weight"
    reference = np.frombuffer(full.data(full.tensors[name]), np.float32).reshape(full.tensors[name].shape)
    weights = matrix.weights(name, reference.shape[1])

    def error(file: GgufFile) -> float:
        from nybble.quant.reference import dequantize

        decoded = dequantize(FORMATS["Q4_1"], file.data(file.tensors[name])).reshape(reference.shape)
        return float(np.sum(weights * (decoded - reference) ** 2))

    assert error(with_it) < error(without)
    with pytest.raises(ConfigError, match="--imatrix does not go with --to F16"):
        run(llama_gguf, tmp_path / "f16.gguf", "F16", imatrix=tmp_path / "i.gguf")


def test_an_importance_matrix_of_another_model_is_refused(llama_gguf: Path, tmp_path: Path) -> None:
    ImportanceMatrix(importance_of(llama_gguf).entries | {}).write(tmp_path / "good.gguf")
    other = ImportanceMatrix()
    other.add("blk.0.nothing.weight", np.ones(4), 1)
    other.write(tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match="it is for another one"):
        run(llama_gguf, tmp_path / "q.gguf", "Q4_0", imatrix=tmp_path / "other.gguf")
    narrow = ImportanceMatrix()
    narrow.add("blk.0.attn_q.weight", np.ones(4), 1)
    narrow.write(tmp_path / "narrow.gguf")
    with pytest.raises(ConfigError, match="made for another model"):
        run(llama_gguf, tmp_path / "q.gguf", "Q4_0", imatrix=tmp_path / "narrow.gguf")
    assert not (tmp_path / "q.gguf").exists()


def test_overrides_choose_types(llama_gguf: Path, tmp_path: Path) -> None:
    run(llama_gguf, tmp_path / "q.gguf", "Q4_0", tensors=(("attn_v", "Q8_0"),))
    tensors = GgufFile(tmp_path / "q.gguf").tensors
    assert tensors["blk.0.attn_v.weight"].format.name == "Q8_0"
    assert tensors["blk.0.attn_k.weight"].format.name == "Q4_0"


def test_an_existing_target_stays(llama_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "q.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(llama_gguf, tmp_path / "q.gguf")
    run(llama_gguf, tmp_path / "q.gguf", force=True)
    with pytest.raises(ConfigError, match="is the model itself"):
        run(tmp_path / "q.gguf", tmp_path / "q.gguf", force=True)


def test_a_nan_is_named_and_nothing_is_left(folders: dict[str, Path], tmp_path: Path) -> None:
    to_gguf(folders["llama"], tmp_path / "m.gguf", Silent())
    tensor = GgufFile(tmp_path / "m.gguf").tensors["blk.1.ffn_up.weight"]
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.seek(tensor.begin + 4 * tensor.shape[1] * 3)
        file.write(np.array([np.nan], np.float32).tobytes())
    with pytest.raises(CheckpointError, match=r"row 3 of the tensor 'blk\.1\.ffn_up\.weight' has a NaN"):
        run(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_options_of_other_methods_are_refused(llama_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--group-size does not go with Q8_0"):
        run(llama_gguf, tmp_path / "q.gguf", options={"group_size": 64})


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--to Q9_Z is not a type nybble knows; it knows .*Q4_K_M"):
        methods.find("Q9_Z")
    assert methods.find("q4_k_m").name == "Q4_K_M"


def test_convert_reads_folders_and_writes_gguf(llama_gguf: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a GGUF file already"):
        to_gguf(llama_gguf, tmp_path / "x.gguf", Silent())
    with pytest.raises(ConfigError, match=r"does not end in \.gguf"):
        to_gguf(folders["llama"], tmp_path / "x.bin", Silent())
