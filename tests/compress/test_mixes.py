"""Types per tensor. The expected ones were read from files of llama.cpp's llama-quantize, build 11434."""

from __future__ import annotations

from collections import Counter

import pytest

from nybble.compress.gguf.mixes import MIXES, Facts, assign, in_file_order, is_quantised, parse_overrides
from nybble.core.errors import ConfigError
from nybble.formats.gguf_writer import TensorInfo
from nybble.quant.formats import FORMATS

F16 = FORMATS["F16"]


def tensors(layers: int, hidden: int = 1536, ffn: int = 8960, *, tied: bool = True) -> list[TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (1000, hidden)
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{i}.{name}.weight"] = (64, hidden)
        shapes[f"blk.{i}.ffn_down.weight"] = (hidden, ffn)
        shapes[f"blk.{i}.attn_norm.weight"] = (hidden,)
        shapes[f"blk.{i}.attn_q.bias"] = (64,)
    return in_file_order(TensorInfo(name, shape, F16) for name, shape in shapes.items())


def types(mix: str, infos: list[TensorInfo], facts: Facts, *, has_imatrix: bool = False) -> dict[str, str]:
    found = assign(MIXES[mix], facts, infos, has_imatrix=has_imatrix)
    return {a.info.name: a.format.name for a in found}


QWEN = Facts("qwen2", 28, 12, 2)
# mix -> (attn_v, attn_output, ffn_down, attn_q, embedding) as counts over 28 layers
EXPECTED = {
    "Q4_K_M": ({"Q4_K": 14, "Q6_K": 14}, {"Q4_K": 28}, {"Q4_K": 14, "Q6_K": 14}, "Q4_K", "Q6_K"),
    "Q5_K_M": ({"Q5_K": 14, "Q6_K": 14}, {"Q5_K": 28}, {"Q5_K": 14, "Q6_K": 14}, "Q5_K", "Q6_K"),
    "Q4_K_S": ({"Q5_K": 4, "Q4_K": 24}, {"Q4_K": 28}, {"Q5_K": 3, "Q4_K": 25}, "Q4_K", "Q6_K"),
    "Q5_K_S": ({"Q5_K": 28}, {"Q5_K": 28}, {"Q5_K": 28}, "Q5_K", "Q6_K"),
    "Q3_K_M": ({"Q5_K": 2, "Q4_K": 26}, {"Q4_K": 28}, {"Q5_K": 1, "Q4_K": 27}, "Q3_K", "Q6_K"),
    "Q3_K_L": ({"Q5_K": 28}, {"Q5_K": 28}, {"Q5_K": 28}, "Q3_K", "Q6_K"),
    "Q3_K_S": ({"Q3_K": 28}, {"Q3_K": 28}, {"Q3_K": 28}, "Q3_K", "Q6_K"),
    "Q2_K": ({"Q4_K": 28}, {"Q3_K": 28}, {"Q3_K": 28}, "Q2_K", "Q6_K"),
    "Q6_K": ({"Q6_K": 28}, {"Q6_K": 28}, {"Q6_K": 28}, "Q6_K", "Q6_K"),
    "Q8_0": ({"Q8_0": 28}, {"Q8_0": 28}, {"Q8_0": 28}, "Q8_0", "Q8_0"),
    "Q4_0": ({"Q4_0": 28}, {"Q4_0": 28}, {"Q4_0": 28}, "Q4_0", "Q6_K"),
    "IQ4_XS": ({"Q5_K": 28}, {"IQ4_XS": 28}, {"Q5_K": 3, "IQ4_XS": 25}, "IQ4_XS", "Q6_K"),
    "MXFP4": ({"MXFP4": 28}, {"MXFP4": 28}, {"MXFP4": 28}, "MXFP4", "Q8_0"),
    "F16": ({"F16": 28}, {"F16": 28}, {"F16": 28}, "F16", "F16"),
}


@pytest.mark.parametrize("mix", EXPECTED)
def test_the_types_of_a_model_whose_widths_are_multiples_of_256(mix: str) -> None:
    found = types(mix, tensors(28), QWEN)
    for part, expected in zip(("attn_v", "attn_output", "ffn_down"), EXPECTED[mix][:3], strict=True):
        assert Counter(kind for name, kind in found.items() if f"{part}.weight" in name) == expected
    assert found["blk.5.attn_q.weight"] == EXPECTED[mix][3]
    assert found["token_embd.weight"] == EXPECTED[mix][4]


def test_more_bits_go_to_the_first_the_last_and_every_third_layer_between() -> None:
    found = types("Q4_K_M", tensors(28), QWEN)
    raised = [i for i in range(28) if found[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert raised == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]


def test_an_importance_matrix_changes_some_mixes() -> None:
    found = types("Q4_0", tensors(28), QWEN, has_imatrix=True)
    assert [i for i in range(28) if found[f"blk.{i}.ffn_down.weight"] == "Q4_1"] == [0, 1, 2]
    assert types("IQ4_NL", tensors(28), QWEN, has_imatrix=True)["blk.0.ffn_down.weight"] == "IQ4_NL"


def test_without_shared_value_heads_q2_k_gives_them_less() -> None:
    assert types("Q2_K", tensors(4), Facts("llama", 4, 8, 8))["blk.0.attn_v.weight"] == "Q3_K"
    assert types("IQ4_NL", tensors(4), Facts("llama", 4, 8, 8))["blk.0.attn_v.weight"] == "IQ4_NL"


def test_eighty_layers_raise_the_values() -> None:
    assert types("Q3_K_S", tensors(80), Facts("llama", 80, 64, 8))["blk.40.attn_v.weight"] == "Q5_K"
    assert types("Q3_K_S", tensors(80), Facts("llama", 80, 64, 64))["blk.40.attn_v.weight"] == "Q3_K"


def test_the_embedding_of_a_model_with_a_head_of_its_own_is_ordinary() -> None:
    found = types("Q4_K_M", tensors(4, tied=False), QWEN)
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q4_K", "Q6_K")


@pytest.mark.parametrize(
    ("mix", "expected", "head"),
    [("Q2_K", "Q4_0", "Q8_0"), ("Q3_K_S", "Q4_0", "Q8_0"), ("Q4_K_S", "Q5_0", "Q8_0"), ("Q5_K_S", "Q5_1", "Q8_0"),
     ("Q6_K", "Q8_0", "Q8_0"), ("IQ4_XS", "IQ4_NL", "Q8_0"), ("Q4_0", "Q4_0", "Q8_0")],
)  # fmt: skip
def test_a_width_that_256_does_not_divide_falls_back(mix: str, expected: str, head: str) -> None:
    found = assign(MIXES[mix], Facts("llama", 12, 9, 3), tensors(12, hidden=576))
    query = next(a for a in found if a.info.name == "blk.9.attn_q.weight")
    assert query.format.name == expected
    assert query.wanted == (MIXES[mix].default if expected != MIXES[mix].default else None)
    assert next(a for a in found if a.info.name == "token_embd.weight").format.name == head


def test_a_width_that_32_does_not_divide_becomes_f16() -> None:
    found = assign(MIXES["Q4_K_M"], Facts("llama", 1, 4, 4), tensors(1, hidden=72))
    query = next(a for a in found if a.info.name == "blk.0.attn_q.weight")
    assert (query.format.name, query.wanted) == ("F16", "Q4_K")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (4, 32), True),
        ("blk.0.ffn_down_exps.weight", (8, 4, 32), True),
        ("blk.0.attn_norm.weight", (32,), False),
        ("blk.0.attn_q.bias", (32,), False),
        ("blk.0.ffn_gate_inp.weight", (8, 32), False),
        ("blk.0.one_row.weight", (1, 32), False),
        ("blk.0.ssm_conv1d.weight", (8, 32), False),
    ],
)
def test_what_is_quantised_at_all(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_quantised(TensorInfo(name, shape, F16)) is expected


def test_layers_are_counted_in_the_order_of_their_numbers() -> None:
    names = [info.name for info in in_file_order(reversed(tensors(12)))]
    assert names[:2] == ["output_norm.weight", "token_embd.weight"]
    assert names.index("blk.2.attn_q.weight") < names.index("blk.10.attn_q.weight")


def test_the_first_override_that_fits_wins() -> None:
    overrides = parse_overrides([(r"blk\.0\.", "q8_0"), ("ffn_down", "Q6_K")])
    found = {a.info.name: a.format.name for a in assign(MIXES["Q4_0"], QWEN, tensors(2), overrides=overrides)}
    assert found["blk.0.ffn_down.weight"] == "Q8_0"
    assert found["blk.1.ffn_down.weight"] == "Q6_K"
    assert found["blk.1.attn_q.weight"] == "Q4_0"


@pytest.mark.parametrize(
    ("override", "message"),
    [(("(", "Q8_0"), "not a regular expression"), (("a", "Q4_K_M"), "not the type of a tensor")],
)
def test_bad_overrides_are_refused(override: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides([override])


def test_overrides_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="fits the name of no matrix"):
        assign(MIXES["Q4_0"], QWEN, tensors(1), overrides=parse_overrides([("nothing", "Q8_0")]))
    with pytest.raises(ConfigError, match="does not go with --to F16"):
        assign(MIXES["F16"], QWEN, tensors(1), overrides=parse_overrides([("attn", "Q8_0")]))
