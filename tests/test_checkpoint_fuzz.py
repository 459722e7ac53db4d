"""Mutated model files by the thousand: each opens or is refused, and none asks for much memory."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats import raw
from nybble.checkpoint import open_checkpoint
from nybble.core.errors import CheckpointError
from nybble.core.rope import inverse_frequencies
from tiny_files import FUSED, HEAD_DIM, HF_CONFIG, SHAPES, gguf_model, hf_folder

pytestmark = pytest.mark.unit

EDGES = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutate(data: bytes, rng: random.Random, header: int) -> bytes:
    """Between one and three changes: a byte, an edge value in place of a number, a cut, a copy, a removal."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(header, max(1, len(changed))))
        way = rng.randrange(6)
        if way == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif way == 1 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            width = rng.choice((4, 8))
            edge = rng.choice(EDGES) & ((1 << 8 * width) - 1)
            changed[at : at + width] = struct.pack("<I" if width == 4 else "<Q", edge)
        elif way == 3:
            del changed[rng.randrange(len(changed) + 1) :]
        elif way == 4:
            del changed[at : at + rng.randint(1, 16)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
    return bytes(changed)


def run_fuzz(save: Callable[[bytes], Path], data: bytes, header: int, cases: int, seed: int) -> int:
    """How many of the cases opened. Fails on anything but success or a CheckpointError, and on large allocations."""
    rng = random.Random(seed)
    opened, begin = 0, time.monotonic()
    tracemalloc.start()
    try:
        for case in range(cases):
            path = save(mutate(data, rng, header))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                checkpoint = open_checkpoint(path)
            except CheckpointError as error:
                assert len(str(error)) < 3000, (case, str(error)[:300])
            else:
                opened += 1
                for layer in checkpoint.spec.layers:
                    inverse_frequencies(layer.rope, 32)
                for tensor in checkpoint.tensors.values():
                    assert tensor.to_float32().shape == tensor.shape, case
                checkpoint.close()
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 4 << 20, (case, peak)
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < 60
    return opened


def fuzz_gguf() -> bytes:
    extra = {
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.list": [1, 2, 3], "general.alignment": 32,
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "split.count": 1,
    }  # fmt: skip
    return gguf_model(extra=extra, shapes={**SHAPES, "rope_freqs.weight": (HEAD_DIM // 2,)})


@pytest.mark.parametrize("seed", range(3))
def test_mutated_gguf_files(tmp_path: Path, seed: int) -> None:
    data = fuzz_gguf().replace(struct.pack("<2f", 11, 11), struct.pack("<2f", 1, 2))  # rope_freqs
    header = data.index(b"rope_freqs.weight") + 60
    opened = run_fuzz(lambda d: raw.save(tmp_path / "m.gguf", d), data, header, 1500, seed)
    assert opened > 0  # the mutations are not all fatal, so what follows the header is reached


def test_mutated_phi_files(tmp_path: Path) -> None:
    shapes = {n: s for n, s in SHAPES.items() if "attn_q" not in n and "attn_k" not in n and "attn_v" not in n} | FUSED
    del shapes["blk.0.ffn_gate.weight"]
    shapes |= {"rope_factors_long.weight": (HEAD_DIM // 2,), "rope_factors_short.weight": (HEAD_DIM // 2,)}
    data = gguf_model({"rope.scaling.original_context_length": 32}, shapes, arch="phi3")
    assert run_fuzz(lambda d: raw.save(tmp_path / "m.gguf", d), data, len(data) // 3, 1000, 9) > 0


def test_mutated_safetensors(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")

    def save(changed: bytes) -> Path:
        raw.save(folder / "model.safetensors", changed)
        return folder

    assert run_fuzz(save, data, header, 1500, 5) > 0


ODD = (None, 0, -1, 1, 2, 3, 2**31, 2**63, 10**400, 0.5, 1e300, float("nan"), float("inf"), "", "x", [], [1], {}, True)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1, "high_freq_factor": 4}},
    ],
    ids=["yarn", "longrope", "llama3"],
)
@pytest.mark.parametrize("family", ["Qwen2", "Gemma3", "Phi3"])
def test_odd_values_in_every_field(tmp_path: Path, family: str, rope: dict[str, dict[str, Any]]) -> None:
    """Each field of a config in turn, with each odd value: never anything but success or a CheckpointError."""
    architecture = {"architectures": [f"{family}ForCausalLM"]}
    act = {"hidden_act": "gelu_pytorch_tanh" if family.startswith("Gemma") else "silu"}
    base = HF_CONFIG | architecture | act | rope
    folder = hf_folder(tmp_path / "model", base)
    outer, inner = [*base, "sliding_window", "layer_types", "query_pre_attn_scalar"], next(iter(rope))
    variants = [base | {field: odd} for field in outer for odd in ODD]
    fields = [*rope[inner], "rope_theta", "attention_factor", "partial_rotary_factor", "beta_fast", "type"]
    variants += [base | {inner: rope[inner] | {field: odd}} for field in fields for odd in ODD]
    for config in variants:
        (folder / "config.json").write_text(json.dumps(config))
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError:
            continue
        for layer in checkpoint.spec.layers:
            inverse_frequencies(layer.rope, 32)
