"""The chat's commands, with the small predictable model of test_run, and a real terminal around it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from test_run import Loaded

from nybble.cli import reader as reading
from nybble.cli.named import Named, not_followed, sampling
from nybble.cli.session import Session
from nybble.cli.slash import Leave, is_command, obey
from nybble.core.errors import ConfigError, TokenizerError
from nybble.store import Library

pytestmark = pytest.mark.unit

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


class Typed:
    """A Reader of given lines."""

    keeps_history = True

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def line(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("nybble.cli.session.open_checkpoint", lambda path: None)
    monkeypatch.setattr("nybble.cli.session.Figures", lambda loaded, threads: None)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF weights")
    return Session(
        Named(str(path), path),
        Loaded(400, CHAT),  # type: ignore[arg-type]
        load=lambda named: Loaded(400, CHAT),  # type: ignore[arg-type, return-value]
        given={"max_tokens": 4},
        threads=None,
        speculate="off",
    )


def say(session: Session, capsys: pytest.CaptureFixture[str], *commands: str) -> str:
    """What commands print, both streams."""
    for command in commands:
        obey(command, session, Typed())
    return "".join(capsys.readouterr())


def test_parameters_are_set_and_shown(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none are set" in say(session, capsys, "/show parameters")
    text = say(
        session, capsys, "/set parameter temperature 0", "/set parameter stop a b", "/set parameter num_predict 7"
    )
    assert "temperature is 0 now" in text
    assert (session.params.temperature, session.params.stop, session.params.max_tokens) == (0, ("a", "b"), 7)
    assert "temperature" in say(session, capsys, "/show parameters")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/set parameter heat 1", "'heat' is none of"),
        ("/set parameter top_k much", "'much' is not a value for top_k"),
        ("/set parameter top_p 7", "top_p must be"),
        ("/set parameter num_ctx 100", "/save the model and /load it again"),
        ("/set", "/set takes parameter"),
        ("/set colour blue", "/set takes parameter"),
        ("/show", "/show takes info"),
        ("/load", "/load takes"),
        ("/load nothing-here", "no model of that name"),
        ("/save", "/save takes a name"),
        ("/save ../x", "neither a file nor a name"),
        ("/wat", "there is no command /wat"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    session: Session, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    before = (session.params, session.system, session.named)
    assert message in say(session, capsys, command)
    assert (session.params, session.system, session.named) == before


def test_a_conversation_is_saved_and_loaded(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    say(session, capsys, "/set system be brief", "/set parameter top_k 5")
    session.ask("hello")
    answer = session.messages[-1]["content"]
    assert "saved as talk" in say(session, capsys, "/save talk")
    stored = Library().get("talk")
    assert (stored.system, stored.parameters) == ("be brief", {"top_k": 5})
    assert stored.messages == (("user", "hello"), ("assistant", answer))
    session.clear()
    assert "this is talk" in say(session, capsys, "/load talk")
    assert session.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    assert (session.system, session.params.top_k) == ("be brief", 5)
    assert "FROM" in say(session, capsys, "/show modelfile")
    assert "be brief" in say(session, capsys, "/show system")
    assert "none is stored" in say(session, capsys, "/show license")
    assert CHAT in say(session, capsys, "/show template")


def test_small_commands(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    reader = Typed()
    for command in ("/set verbose", "/set plain", "/set nohistory"):
        obey(command, session, reader)
    assert (session.verbose, session.markdown, reader.keeps_history) == (True, False, False)
    assert "/set parameter" in say(session, capsys, "/help")
    with pytest.raises(Leave):
        obey("/bye", session, reader)


def test_a_go_template_writes_the_prompt(tmp_path: Path, session: Session) -> None:
    named = Named("x", session.named.path, template="<{{ .System }}|{{ .Prompt }}>{{ .Response }}", system="s")
    other = Session(named, Loaded(400, None), load=lambda named: None, given={}, threads=None, speculate="off")  # type: ignore[arg-type, return-value]
    other.ask("hi")
    assert other.loaded.step_sizes[0] == len("<s|hi>")  # type: ignore[attr-defined]


def test_a_model_that_cannot_chat_says_so_at_once(session: Session) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        Session(session.named, Loaded(400, None), load=lambda named: None, given={}, threads=None, speculate="off")  # type: ignore[arg-type, return-value]


def test_what_is_a_command() -> None:
    assert all(map(is_command, ("/help", "/set x y", "/?")))
    assert not any(map(is_command, ("/etc/passwd is what?", "help", " /help", "")))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["hello"], "hello"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""', "one", "", '"""'], "one\n"),
        (['"""in one"""'], '"""in one"""'),
        (['/set system """a', 'b"""'], "/set system a\nb"),
        (['he said """'], 'he said """'),
        ([], None),
        (['"""never closed'], None),
    ],
)
def test_messages_of_several_lines(lines: list[str], expected: str | None) -> None:
    assert reading.read_message(Typed(*lines)) == expected


def test_the_command_line_wins_over_the_modelfile() -> None:
    stored = {"temperature": 0.1, "seed": -1, "num_predict": -1, "stop": ["x"], "repeat_penalty": 1.2, "num_gpu": 3}
    params = sampling(stored, {"temperature": 0.9})
    assert (params.temperature, params.seed, params.max_tokens) == (0.9, None, None)
    assert (params.stop, params.repetition_penalty, params.top_p) == (("x",), 1.2, 0.95)
    with pytest.raises(ConfigError, match="top_p must be"):
        sampling({"top_p": 3.0}, {})


def test_what_is_not_followed_is_said() -> None:
    assert len(not_followed({"typical_p": 0.5, "repeat_last_n": 10})) == 2
    assert not_followed({"typical_p": 1.0, "repeat_last_n": 64, "top_k": 1}) == []


# --- a terminal

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from types import SimpleNamespace
import test_run
from nybble.cli import app, run, session
run.load_model = lambda path, **kwargs: test_run.Loaded(400, {template!r})
session.Figures = lambda loaded, threads: SimpleNamespace(line=lambda answer: "figures")
sys.argv = ["nybble", "run", {model!r}, "--max-tokens", "5", "--temperature", "0"]
app.main()
"""


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, code: str) -> None:
        self._here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=there,
            stdout=there,
            stderr=there,
            env=environment,
            start_new_session=True,
        )
        os.close(there)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._here, text.encode())

    def wait_for(self, wanted: str) -> None:
        """Until it is shown after what was waited for before."""
        deadline = time.monotonic() + 15
        while wanted not in self.text:
            ready, _, _ = select.select([self._here], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.text
            try:
                self.text += os.read(self._here, 65536).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                assert wanted in self.text, self.text
            if "\x1b[6n" in self.text:  # it asks where the cursor is
                self.text = self.text.replace("\x1b[6n", "")
                self.type("\x1b[1;1R")
        self.text = self.text.split(wanted, 1)[1]

    def close(self) -> int:
        code = self.process.wait(30)
        os.close(self._here)
        return code


def test_a_session_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path / "home"))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF weights")
    tests = Path(__file__).resolve().parents[1]
    paths = [str(tests), str(tests / "cli")]
    terminal = Terminal(SCRIPT.format(paths=paths, template=CHAT, model=str(model)))
    terminal.wait_for("/help lists the commands")
    terminal.wait_for(">>>")
    terminal.type("hello\r")
    terminal.wait_for("cut off after 5 tokens")
    terminal.wait_for(">>>")
    terminal.type('"""two\r')
    terminal.wait_for("...")
    terminal.type('lines"""\r')
    terminal.wait_for("cut off after 5 tokens")
    terminal.wait_for(">>>")
    terminal.type("\x1b[A\x1b[A\x1b[A\r")  # up, to the first message
    terminal.wait_for("hello")
    terminal.wait_for("cut off after 5 tokens")
    terminal.wait_for(">>>")
    terminal.type("dropped\x03")
    terminal.wait_for(">>>")
    terminal.type("/set verb\x05ose\r")
    terminal.wait_for(">>>")
    terminal.type("x\r")
    terminal.wait_for("[figures]")
    terminal.wait_for(">>>")
    terminal.type("\x04")
    assert terminal.close() == 0
    history = (tmp_path / "home" / "history").read_text()
    assert "+hello" in history
    assert (tmp_path / "home" / "history").stat().st_mode & 0o077 == 0
