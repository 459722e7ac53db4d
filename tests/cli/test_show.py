"""`nybble show` and `nybble doctor`: what they print."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nybble.cli import doctor, show
from nybble.core.spec import LayerSpec, ModelSpec, RopeSpec
from nybble.engine.roofline import Roofline

pytestmark = pytest.mark.unit


def layer(window: int | None) -> LayerSpec:
    return LayerSpec(
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        ffn_size=1024,
        rope=RopeSpec(base=10_000.0, rotary_dim=64),
        sm_scale=0.125,
        window=window,
        qk_norm=True,
    )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    def tensor(*shape: int, name: str, num_bytes: int) -> Any:
        return SimpleNamespace(shape=shape, format=SimpleNamespace(name=name), data=memoryview(bytes(num_bytes)))

    spec = ModelSpec(
        family="gemma3",
        vocab_size=100,
        hidden_size=512,
        context_length=4096,
        norm_eps=1e-6,
        layers=(layer(512), layer(512), layer(None), layer(512)),
        tied_head=True,
    )
    checkpoint = SimpleNamespace(
        path="dir/[m].gguf",
        container="gguf",
        file_bytes=10_000_000,
        spec=spec,
        tensors={
            "embed": tensor(64, 32, name="Q4_0", num_bytes=64 * 32 * 18 // 32),
            "final_norm": tensor(32, name="F32", num_bytes=128),
        },
        tokenizer=SimpleNamespace(metadata={"tokenizer.ggml.model": "gpt2"}),
        chat_template=None,
        eos_token_ids=(7,),
        bos_token_id=1,
        add_bos=True,
    )
    tokenizer = SimpleNamespace(vocab_size=100, eos_token_ids=(7, 9), token_bytes=lambda token_id: b"<%d>" % token_id)
    monkeypatch.setattr(show, "open_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr(show, "local_path", lambda name: name)
    monkeypatch.setattr(show, "load_tokenizer", lambda source: tokenizer)
    monkeypatch.setenv("COLUMNS", "160")
    return checkpoint


def words(text: str) -> str:
    return " ".join(text.split())


def test_show_names_what_a_user_asks(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    show.show("any")
    text = words(capsys.readouterr().out)
    for expected in (
        "dir/[m].gguf (gguf, 10.0 MB)",
        "gemma3, 4 layers, hidden size 512",
        "layers 0-1, 3 8 query and 2 kv heads of 64",
        "window 512",
        "4096 tokens",
        "gpt2, 100 tokens, from GGUF metadata",
        "7 b'<7>', 9 b'<9>'",
        "token 1",
        "none: use `nybble run --raw`",
        "Q4_0 │ 1 │ 2,048 │ 0.0 │ 4.50",
        "all │ 2 │ 2,080 │",
    ):
        assert expected in text


def test_ranges() -> None:
    assert show._ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_doctor_measures_and_concludes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "measure_roofline", lambda threads: Roofline(read_gb_s=30.0, int8_gops=900.0))
    monkeypatch.setattr(doctor, "best_isa", lambda: "avx2")
    monkeypatch.setattr(doctor, "default_threads", lambda: 2)
    monkeypatch.setenv("NYBBLE_ISA", "generic")
    monkeypatch.setenv("COLUMNS", "160")
    doctor.doctor()
    text = words(capsys.readouterr().out)
    for expected in (
        "generic (NYBBLE_ISA; the best here is avx2)",
        "30.0 GB/s",
        "900 Gop/s",
        "1.5 B │ 0.91 GB │ 300 │ 33",
    ):
        assert expected in text
