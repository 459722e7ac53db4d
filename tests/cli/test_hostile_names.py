"""Names that mean no good, for every command that takes one: one sentence, exit code 2, nothing touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nybble.cli import app

pytestmark = pytest.mark.unit

NAMES = st.text(max_size=30) | st.text("./:-_aA\\%~\x00\n", max_size=10)


def commands(name: str) -> list[list[str]]:
    return [
        ["pull", "--", name],
        ["show", "--", name],
        ["rm", "--", name],
        ["cp", "--", name, "copied"],
        ["cp", "--", "mine", name],
        ["create", "-f", "Modelfile", "--", name],
        ["run", "--", name, "hi"],
        ["stop", "--host", "127.0.0.1:1", "--", name],
    ]


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=NAMES)
@example(name="../../x")
@example(name="/etc/passwd")
@example(name="x" * 5000)
@example(name="\ud800")
@example(name="a" * 255 + ":b")
def test_no_name_makes_a_command_fail(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("NYBBLE_HOME", "OLLAMA_MODELS", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "here"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    Path("Modelfile").write_text("FROM ./absent.gguf\n")
    for arguments in commands(name):
        monkeypatch.setattr(sys, "argv", ["nybble", *arguments])
        with pytest.raises(SystemExit) as left:
            app.main()
        _, err = capsys.readouterr()
        assert left.value.code == 2, (arguments, err)
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1 or err.startswith("Usage:"), err
    assert [path.name for path in folder.iterdir()] == ["Modelfile"]
    assert not list((tmp_path / "home").glob("manifests/*"))
