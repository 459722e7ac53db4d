"""pull, list, show, create, cp, rm and store, as a user types them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.cli import app
from nybble.core.errors import ConfigError
from nybble.store import Library, PullProgress
from nybble.store.library import Library as LibraryClass

pytestmark = pytest.mark.unit

Nybble = Callable[..., int]


@pytest.fixture
def nybble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nybble:
    """Runs a command in this process, in a folder with a model file; returns the exit code."""
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF weights")

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["nybble", *arguments])
        with pytest.raises(SystemExit) as left:
            app.main()
        return int(left.value.code or 0)

    return run


def test_the_life_of_a_model(nybble: Nybble, capsys: pytest.CaptureFixture[str]) -> None:
    Path("Modelfile").write_text('FROM model.gguf\nSYSTEM be brief\nPARAMETER stop "a b"\nLICENSE MIT\n')
    assert nybble("create", "mine") == 0
    assert nybble("cp", "mine", "me/other:v1") == 0
    capsys.readouterr()
    assert nybble("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert re.fullmatch(r"me/other:v1  [0-9a-f]{12}  0\.0 MB  now", lines[1])
    assert nybble("show", "mine", "--modelfile") == 0
    text = capsys.readouterr().out
    Path("again").write_text(text)
    assert nybble("create", "again", "-f", "again") == 0
    library = Library()
    assert library.get("again").digest == library.get("mine").digest
    for flag, expected in (("--system", "be brief"), ("--parameters", f"{'stop':<24} a b"), ("--license", "MIT")):
        capsys.readouterr()
        assert nybble("show", "mine", flag) == 0
        assert capsys.readouterr().out == expected + "\n"
    assert nybble("rm", "mine", "me/other:v1", "again") == 0
    assert nybble("store", "gc") == 0
    assert nybble("store", "verify") == 0
    assert capsys.readouterr().out.endswith("all files are what they should be\n")
    assert library.list() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "x", "-f", "absent"], "the Modelfile absent cannot be read: No such file"),
        (["create", "x", "-f", "wrong"], "wrong, line 2, column 1: 'FORM' is no instruction; expected one of FROM"),
        (["create", "x", "-f", "binary"], "binary is not text in utf-8"),
        (["create", "../x", "-f", "good"], "'../x' is neither a file nor a name that a model can have"),
        (["create", "x", "-f", "good", "-q", "Q9"], "Q9 is not a type"),
        (["create", "x", "-f", "good", "-q", "gptq-4bit"], "is not"),
        (["rm", "absent"], "no model of that name"),
        (["cp", "absent", "x"], "no model of that name"),
        (["cp", "/etc/passwd", "x"], "neither a file nor a name"),
        (["pull", "absent"], "no model of that name"),
        (["pull", "hf.co/x"], "hf.co/ORGANISATION/REPOSITORY"),
        (["run", "..", "hi"], "folder without config.json|no file or folder|config.json"),
        (["show", "model.gguf", "--system", "--license"], "give one"),
        (["store", "burn"], "burn"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    nybble: Nybble, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("wrong").write_text("FROM model.gguf\nFORM x\n")
    Path("binary").write_bytes(b"\xff\x00\xfe")
    Path("good").write_text("FROM model.gguf\n")
    assert nybble(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err)
    assert "Traceback" not in err


def test_a_modelfile_in_utf_16_from_standard_input(nybble: Nybble, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "FROM model.gguf\nSYSTEM größer\n".encode("utf-16")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert nybble("create", "x", "-f", "-") == 0
    assert Library().get("x").system == "größer"


def test_verify_leaves_with_an_error_and_a_list(nybble: Nybble, capsys: pytest.CaptureFixture[str]) -> None:
    Path("Modelfile").write_text("FROM model.gguf")
    assert nybble("create", "mine") == 0
    Path("model.gguf").write_bytes(b"GGUF changed")
    capsys.readouterr()
    assert nybble("store", "verify") == 2
    out, err = capsys.readouterr()
    assert "was changed since" in out
    assert "1 thing to mend" in err


def test_two_adapters_are_refused_by_run(nybble: Nybble, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lora.gguf").write_bytes(b"GGUF lora")
    Path("other.gguf").write_bytes(b"GGUF other")
    Path("Modelfile").write_text("FROM model.gguf\nADAPTER lora.gguf\nADAPTER other.gguf")
    assert nybble("create", "tuned") == 0
    capsys.readouterr()
    assert nybble("run", "tuned", "hi") == 2
    assert "has 2 adapters, and one can be applied at a time" in capsys.readouterr().err


def test_a_pull_says_what_it_does(
    nybble: Nybble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pull(self: LibraryClass, name: str, progress: Callable[[PullProgress], None]) -> object:
        for done in (0, 50, 100):
            progress(PullProgress("pulling x", "sha256:0", 100_000_000, done * 1_000_000))
        progress(PullProgress("verifying x"))
        progress(PullProgress("success"))
        return self.get("mine")

    Path("Modelfile").write_text("FROM model.gguf")
    assert nybble("create", "mine") == 0
    monkeypatch.setattr(LibraryClass, "pull", pull)
    capsys.readouterr()
    assert nybble("pull", "mine") == 0
    assert capsys.readouterr() == ("mine:latest is here, 0.0 MB\n", "pulling x (100 MB)\nverifying x\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert nybble("pull", "mine") == 0
    assert "100.0/100.0 MB" in capsys.readouterr().err


def test_errors_of_a_modelfile_can_be_named() -> None:
    assert issubclass(__import__("nybble.store", fromlist=["x"]).ModelfileError, ConfigError)
