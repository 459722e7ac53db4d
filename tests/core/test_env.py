"""Environment variables are checked where they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.core import env
from nybble.core.errors import ConfigError

pytestmark = pytest.mark.unit


def test_defaults(monkeypatch):
    for name in ("NYBBLE_ISA", "NYBBLE_ACT", "NYBBLE_TORCH_OPS", "NYBBLE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert env.isa() is None
    assert env.activation_type() == "int8"
    assert env.torch_ops() == "auto"
    assert env.home() == Path.home() / ".cache" / "nybble"


def test_values(monkeypatch):
    monkeypatch.setenv("NYBBLE_ISA", "avx2")
    monkeypatch.setenv("NYBBLE_ACT", "f32")
    monkeypatch.setenv("NYBBLE_HOME", "~/models")
    assert (env.isa(), env.activation_type(), env.home()) == ("avx2", "f32", Path.home() / "models")


@pytest.mark.parametrize(
    ("name", "read"),
    [("NYBBLE_ISA", env.isa), ("NYBBLE_ACT", env.activation_type), ("NYBBLE_TORCH_OPS", env.torch_ops)],
)
def test_refuses_what_it_does_not_know(monkeypatch, name, read):
    monkeypatch.setenv(name, "AVX2 ")
    with pytest.raises(ConfigError, match=f"{name} must be one of .*, not 'AVX2 '"):
        read()
