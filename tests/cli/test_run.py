"""`nybble run` and the chat, over a model that is small enough to predict."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import FakeModel, FakeTokenizer, continuation
from nybble.cli import answer, app, options, prompt, run
from nybble.engine.core import EngineCore
from nybble.engine.generate import Generator
from nybble.tokenizer.named_tokens import NamedTokens

TEMPLATE = "a chat template"


class CharTokenizer(FakeTokenizer):
    """Text to token ids and back, one for each character."""

    bos_token = eos_token = None
    names = NamedTokens({}, {})

    def encode(
        self, text: str, *, add_special: bool, parse_special: bool = False, literal: Sequence[int] = ()
    ) -> list[int]:
        return [ord(character) % 97 for character in text]

    def flush(self) -> str:
        return ""


class PlainTemplate:
    """Renders role and content, so that each turn's text begins with the turns before it."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        assert source == TEMPLATE

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


class Loaded:
    """Stands in for LoadedModel."""

    def __init__(self, context: int, template: str | None = TEMPLATE) -> None:
        self.device = "cpu"
        self.context = context
        self.model = FakeModel()
        self.tokenizer = CharTokenizer()
        self.checkpoint = SimpleNamespace(chat_template=template, add_bos=False, bos_token_id=None)

    def generator(self, *, num_blocks: int | None = None, speculate: str = "off", kept_in: None = None) -> Generator:
        blocks = num_blocks or -(-self.context // 16)
        return Generator(
            EngineCore(self.model, self.tokenizer, context=self.context, vocab_size=10**6, num_blocks=blocks)
        )

    @property
    def step_sizes(self) -> list[int]:
        return [len(step.token_ids) for step in self.model.steps]


Command = Callable[..., int]


@pytest.fixture
def loaded() -> Loaded:
    return Loaded(400)


@pytest.fixture
def command(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs `nybble run MODEL ...` in this process and returns its exit code."""
    model = tmp_path / "model.gguf"
    model.touch()
    monkeypatch.setattr(run, "load_model", lambda path, **kwargs: loaded)
    monkeypatch.setattr(prompt, "ChatTemplate", PlainTemplate)
    monkeypatch.setattr(answer, "measure_roofline", lambda threads: SimpleNamespace(read_gb_s=30.0, int8_gops=900.0))
    monkeypatch.setattr(answer, "model_cost", lambda checkpoint: None)
    monkeypatch.setattr(answer, "decode_fraction", lambda *args, **kwargs: 0.5)

    def call(*arguments: str, stdin: str | None = None, lines: list[str | BaseException] | None = None) -> int:
        stream = io.StringIO(stdin or "")
        monkeypatch.setattr(stream, "isatty", lambda: stdin is None, raising=False)
        monkeypatch.setattr("sys.stdin", stream)
        monkeypatch.setattr("sys.argv", ["nybble", "run", str(model), *arguments])
        pending = iter(lines or [])
        monkeypatch.setattr("builtins.input", lambda shown: _next_line(pending))
        with pytest.raises(SystemExit) as left:
            app.main()
        return int(left.value.code or 0)

    return call


def _next_line(pending: Iterator[str | BaseException]) -> str:
    item = next(pending, EOFError())
    if isinstance(item, BaseException):
        raise item
    return item


def text_after(prompt_text: str, count: int) -> str:
    ids = CharTokenizer().encode(prompt_text, add_special=False)
    return "".join(chr(0x100 + token_id) for token_id in continuation(ids, count))


def test_one_answer_through_the_template(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("hello", "--max-tokens", "5", "--system", "be brief") == 0
    out, err = capsys.readouterr()
    assert out == text_after("<system>be brief<user>hello<assistant>", 5) + "\n"
    assert err == "[cut off after 5 tokens; --max-tokens allows more]\n"


def test_a_raw_prompt_stays_as_it_is(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("hello", "--raw", "--max-tokens", "5") == 0
    assert capsys.readouterr().out == text_after("hello", 5) + "\n"


def test_a_piped_prompt(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--raw", "--max-tokens", "3", stdin="from a pipe") == 0
    assert capsys.readouterr().out == text_after("from a pipe", 3) + "\n"


@pytest.mark.parametrize(
    ("piped", "message"), [("", "standard input is empty"), (" \n", "standard input is empty"), ("\udcff", "not UTF-8")]
)
def test_a_pipe_without_a_prompt(
    command: Command, capsys: pytest.CaptureFixture[str], piped: str, message: str
) -> None:
    assert command(stdin=piped) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_text_is_utf8_whatever_the_locale_says(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    mangled = "Größe".encode().decode("ascii", "surrogateescape")
    assert command(mangled, "--raw", "--max-tokens", "3") == 0
    assert capsys.readouterr().out == text_after("Größe", 3) + "\n"


def test_figures_when_asked_for(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("hello", "--max-tokens", "5", "--verbose") == 0
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("prompt 22 tokens, ", "generated 5 tokens, ", " MB at most", "50% of the roofline (30.0 GB/s read)"):
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x" * 401, "--raw"], "the prompt has 401 tokens and the context holds 400"),
        (["", "--raw"], "the prompt is empty"),
        ([""], "the prompt is empty"),
        (["\udcff"], "the prompt is not UTF-8 text"),
        (["hi", "--system", "\udcff"], "the prompt is not UTF-8 text"),
        (["hi", "--temperature", "-1"], "temperature must be"),
        (["hi", "--top-p", "2"], "top_p must be"),
        (["hi", "--max-tokens", "0"], "max_tokens must be"),
        (["hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["--raw"], "give a prompt with --raw"),
    ],
)
def test_one_sentence_and_exit_code_2(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["hi"], []])
def test_a_model_without_a_template_names_raw(
    command: Command, loaded: Loaded, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    loaded.checkpoint.chat_template = None
    assert command(*arguments) == 2
    assert "--raw" in capsys.readouterr().err


def test_a_later_turn_reads_only_what_is_new(
    command: Command, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Text and token ids must be the same thing here, as they are for a real tokenizer.
    monkeypatch.setattr(CharTokenizer, "encode", _exact_encode)
    assert command("--max-tokens", "6", lines=["first", "", "second"]) == 0
    turn_1 = "<user>first<assistant>"
    answer_1 = _answer(turn_1, 6)
    turn_2 = f"{turn_1}{answer_1}<user>second<assistant>"
    assert capsys.readouterr().out == f"{answer_1}\n{_answer(turn_2, 6)}\n\n"
    # Whole blocks of the first turn are found again.
    assert loaded.step_sizes == [len(turn_1), *[1] * 5, len(turn_2) - (len(turn_1) + 5) // 16 * 16, *[1] * 5]


def _exact_encode(self: CharTokenizer, text: str, **kwargs: Any) -> list[int]:
    return [ord(character) - 0x100 if ord(character) >= 0x100 else ord(character) % 97 for character in text]


def _answer(text: str, count: int) -> str:
    ids = _exact_encode(CharTokenizer(), text)
    return "".join(chr(0x100 + token_id) for token_id in continuation(ids, count))


def test_a_conversation_that_outgrows_the_context_says_so_and_goes_on(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--max-tokens", "3", lines=["x" * 500, "short", "/new", "again"]) == 0
    out, err = capsys.readouterr()
    assert "holds 400: your last message was not sent" in err
    assert "new conversation" in err
    assert out == f"{text_after('<user>short<assistant>', 3)}\n{text_after('<user>again<assistant>', 3)}\n\n"


def test_an_answer_that_fills_the_context_says_so(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("x" * 370) == 0
    assert "the context of 400 tokens is full" in capsys.readouterr().err


def test_ctrl_c_stops_only_the_answer(
    command: Command, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = loaded.model.execute

    def interrupted(step: Any) -> Any:
        if len(loaded.model.steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return execute(step)

    monkeypatch.setattr(loaded.model, "execute", interrupted)
    assert command("--max-tokens", "20", lines=["first", "/new", "second"]) == 0
    out, err = capsys.readouterr()
    assert "[stopped]" in err
    lines = out.splitlines()
    assert len(lines[0]) == 4
    assert lines[1] == text_after("<user>second<assistant>", 20)


def test_ctrl_c_at_the_prompt_drops_the_line(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--max-tokens", "3", lines=[KeyboardInterrupt(), "hello"]) == 0
    assert capsys.readouterr().out == "\n" + text_after("<user>hello<assistant>", 3) + "\n\n"


def test_ctrl_c_of_a_single_answer_leaves_with_130(
    command: Command, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(step: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loaded.model, "execute", interrupted)
    assert command("hello") == 130


def test_an_answer_that_was_interrupted_ends_its_line(
    command: Command, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = loaded.model.execute

    def interrupted(step: Any) -> Any:
        if len(loaded.model.steps) == 3:
            raise KeyboardInterrupt
        return execute(step)

    monkeypatch.setattr(loaded.model, "execute", interrupted)
    assert command("hello", "--raw") == 130
    assert capsys.readouterr().out == text_after("hello", 3) + "\n"


def test_control_tokens_that_are_typed_in_a_chat_are_text(
    command: Command, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[int]]] = []

    def encode(self: CharTokenizer, text: str, *, literal: Sequence[int] = (), **kwargs: Any) -> list[int]:
        seen.append((text, list(literal)))
        return [1]

    monkeypatch.setattr(CharTokenizer, "names", NamedTokens({}, {"<end>": 0}))
    monkeypatch.setattr(CharTokenizer, "encode", encode)
    assert command("say <end> now", "--max-tokens", "1") == 0
    assert seen == [("<user>say <end> now<assistant>", [len("<user>say ")])]


def test_a_catalog_name_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def resolve(name: str, *, announce: Callable[[str], None]) -> Path:
        announce(f"downloading {name}")
        return Path("here.gguf")

    monkeypatch.setattr(options, "resolve", resolve)
    assert options.local_path("name") == Path("here.gguf")
    assert capsys.readouterr() == ("", "downloading name\n")
