"""Adapters on disk: what fits is matched to the model, everything else is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from loras import PREFIX, factors_of, make_lora, to_gguf_lora
from models import make_tiny
from nybble.adapter import open_adapter
from nybble.checkpoint import open_checkpoint
from nybble.core.errors import CheckpointError, ModelNotFoundError, NybbleError
from nybble.core.spec import ModelSpec

pytestmark = pytest.mark.unit
Q_A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def spec(base: Path) -> ModelSpec:
    return open_checkpoint(base).spec


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return make_lora(base, tmp_path / "lora")


def change_config(lora: Path, **changes: Any) -> None:
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(lora: Path, changes: dict[str, Any]) -> None:
    """None takes a tensor away."""
    path = lora / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_factors_are_found_by_layer(lora: Path, spec: ModelSpec) -> None:
    adapter = open_adapter(lora, spec)
    layers = dict(adapter.layers())
    assert list(layers) == [0, 1]
    assert adapter.rank == 4
    names = {"attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"}
    assert all({one.name for one in factors} == names for factors in layers.values())
    a, b, scale = factors_of(lora)["model.layers.1.mlp.down_proj"]
    down = next(one for one in layers[1] if one.name == "ffn.down")
    assert scale == down.scale == 2.0
    assert np.array_equal(down.a, a)
    assert np.array_equal(down.b, b)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model.model.language_model."])
def test_prefixes_of_names(prefix: str, lora: Path, spec: ModelSpec) -> None:
    path = lora / "adapter_model.safetensors"
    names = {
        name: name.replace(f"{PREFIX}model.", prefix if prefix.endswith("language_model.") else f"{prefix}model.")
        for name in load_file(path)
    }
    save_file(
        {names[name].replace(".weight", ".default.weight"): value for name, value in load_file(path).items()}, path
    )
    assert open_adapter(lora, spec).rank == 4


def test_the_digest_is_of_the_content(base: Path, lora: Path, spec: ModelSpec, tmp_path: Path) -> None:
    first = open_adapter(lora, spec).digest
    shutil.copytree(lora, tmp_path / "copy")
    assert open_adapter(tmp_path / "copy" / "adapter_model.safetensors", spec).digest == first
    change_config(tmp_path / "copy", lora_alpha=3)
    assert open_adapter(tmp_path / "copy", spec).digest != first
    assert open_adapter(make_lora(base, tmp_path / "other", seed=1), spec).digest != first


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_encodings(dtype: str, lora: Path, spec: ModelSpec) -> None:
    path = lora / "adapter_model.safetensors"
    if dtype == "bfloat16":
        import torch
        from safetensors.torch import save_file as save_torch

        save_torch({name: torch.from_numpy(value).bfloat16() for name, value in load_file(path).items()}, path)
    else:
        save_file({name: value.astype(dtype) for name, value in load_file(path).items()}, path)
    want, found = make_values(lora.parent / "again", spec, lora), dict(open_adapter(lora, spec).layers())
    for layer, factors in found.items():
        for one, other in zip(factors, want[layer], strict=True):
            np.testing.assert_allclose(one.a, other.a, rtol=2**-8, atol=1e-6)


def make_values(folder: Path, spec: ModelSpec, lora: Path) -> dict[int, list[Any]]:
    base = folder.parent / "base-again"
    make_tiny("llama", base)
    return dict(open_adapter(make_lora(base, folder), spec).layers())


def test_quantised_factors_of_gguf(base: Path, spec: ModelSpec, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "lora", rank=32)
    path = to_gguf_lora(base, lora, tmp_path / "lora.gguf", quant="Q8_0")
    down = next(one for one in dict(open_adapter(path, spec).layers())[0] if one.name == "ffn.down")
    a, _, scale = factors_of(lora)["model.layers.0.mlp.down_proj"]
    assert down.scale == pytest.approx(scale)
    np.testing.assert_allclose(down.a, a, atol=np.abs(a).max() / 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "adapters of the type 'ADALORA' are not supported"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"use_dora": True}, r"DoRA \(use_dora\) is not supported"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside the factors"),
        ({"fan_in_fan_out": True}, "transposed weights"),
        ({"lora_bias": True}, "biases of the factors"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"trainable_token_indices": [1]}, "trained embeddings"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"something_new": 3}, r"this setting \(something_new\) is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model too"),
        ({"r": 5}, "have the rank 4, and .* says 5"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"lora_alpha": 1e99}, "lora_alpha is"),
        ({"rank_pattern": {"q_proj": 8}}, "have the rank 4, and .* says 8"),
        ({"rank_pattern": [4]}, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+": 1}}, "is a regular expression"),
        ({"alpha_pattern": {"q_proj": "1"}}, "not a number"),
    ],
)
def test_what_a_config_may_not_say(changes: dict[str, Any], message: str, lora: Path, spec: ModelSpec) -> None:
    change_config(lora, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(lora, spec)


def test_harmless_settings_pass(lora: Path, spec: ModelSpec) -> None:
    change_config(
        lora, init_lora_weights="gaussian", rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj$": 4},
        peft_version="1", revision="main", layers_to_transform=[0], modules_to_save=[], loftq_config={},
        exclude_modules="x",
    )  # fmt: skip
    assert open_adapter(lora, spec).rank == 4


ONES = np.ones((4, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": ONES}, "a LoRA of the embedding"),
        ({f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector": ONES}, "of DoRA"),
        ({f"{PREFIX}lm_head.weight": ONES}, "a whole weight"),
        ({f"{PREFIX}lm_head.lora_A.weight": ONES, f"{PREFIX}lm_head.lora_B.weight": ONES.T.copy()}, "lm_head"),
        ({Q_A: None}, "only one of its two factors"),
        ({Q_A: np.ones((3, 64), np.float32)}, "do not meet"),
        ({Q_A: np.ones((4, 63), np.float32)}, r"for a matrix of \[64, 63\], the model's is \[64, 64\]"),
        ({Q_A: np.ones(4, np.float32)}, r"is F32 of shape \[4\], not a matrix"),
        ({Q_A: np.ones((4, 64), np.int32)}, "is I32 of shape"),
        ({Q_A.replace("base_model.model.", ""): ONES}, "has two factors A"),
        ({Q_A.replace("layers.0", "layers.7"): ONES,
          Q_A.replace("layers.0", "layers.7").replace("_A", "_B"): np.ones((64, 4), np.float32)}, "changes layer 7"),
        ({f"{PREFIX}vision.layers.0.fc1.lora_A.weight": ONES,
          f"{PREFIX}vision.layers.0.fc1.lora_B.weight": np.ones((64, 4), np.float32)}, "only the linear layers"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(changes: dict[str, Any], message: str, lora: Path, spec: ModelSpec) -> None:
    change_tensors(lora, changes)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(lora, spec)


def test_values_must_be_finite(lora: Path, spec: ModelSpec) -> None:
    change_tensors(lora, {Q_A: np.full((4, 64), np.nan, np.float32)})
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        list(open_adapter(lora, spec).layers())


def test_files_that_are_no_adapters(lora: Path, spec: ModelSpec, tmp_path: Path, base: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_adapter(tmp_path / "nowhere", spec)
    with pytest.raises(CheckpointError, match="it is not a PEFT adapter"):
        open_adapter(base, spec)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x02")
    for path in (pickled, pickled / "adapter_model.bin"):
        with pytest.raises(CheckpointError, match="is a pickle, which can run anything"):
            open_adapter(path, spec)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(lora / "adapter_model.safetensors", alone)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json beside it"):
        open_adapter(alone, spec)
    (lora / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_adapter(lora, spec)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "model"}, "is a 'model', not an adapter"),
        ({"adapter_type": "control_vector"}, "adapters of the type 'control_vector'"),
        ({"arch": "qwen2"}, "a model of the family 'qwen2', not 'llama'"),
    ],
)
def test_gguf_files_that_do_not_fit(
    metadata: dict[str, str], message: str, base: Path, lora: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    path = to_gguf_lora(base, lora, tmp_path / "x.gguf", **metadata)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(path, spec)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_do_worse_than_an_error(
    data: st.DataObject, base: Path, spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        make_lora(base, folder, only=["q_proj", "down_proj"])
        to_gguf_lora(base, folder, folder / "lora.gguf")
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "lora.gguf", "adapter_config.json"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    changed = folder.parent / "changed"
    shutil.copytree(folder, changed, dirs_exist_ok=True)
    (changed / name).write_bytes(content)
    try:
        for _, factors in open_adapter(changed / name if name.endswith("gguf") else changed, spec).layers():
            assert factors
    except NybbleError:
        pass
