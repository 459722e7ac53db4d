"""The commands of a chat, which begin with a slash."""

from __future__ import annotations

from collections.abc import Callable

from nybble.cli.answer import note
from nybble.cli.named import parameter_lines, stored_model
from nybble.cli.reader import Reader
from nybble.cli.session import Session
from nybble.core.errors import ConfigError, NybbleError
from nybble.store.modelfile import PARAMETERS, parameter_value

HELP = """\
/set parameter NAME VALUE    how answers are drawn: temperature, top_p, stop, ...
/set system TEXT             the system message
/set verbose | quiet         figures after each answer, or none
/set markdown | plain        Markdown rendered, or as it comes
/set history | nohistory     remember what you write for later chats, or not
/show info | modelfile | parameters | system | template | license
/load NAME                   another model
/save NAME                   keep this model with its settings and this conversation
/clear                       start a new conversation
/help, /bye
\"\"\"                          begins a message of several lines, and ends it
Ctrl-C stops an answer, Ctrl-D leaves."""
WORDS = [
    "/set parameter", "/set system", "/set verbose", "/set quiet", "/set markdown", "/set plain", "/set history",
    "/set nohistory", "/show info", "/show modelfile", "/show parameters", "/show system", "/show template",
    "/show license", "/load", "/save", "/clear", "/help", "/bye",
]  # fmt: skip


class Leave(Exception):
    """The user wants to go."""


def is_command(text: str) -> bool:
    """Whether a message is meant for nybble. A path is not: /etc/hosts may be asked about."""
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    return text.startswith("/") and "/" not in word[1:] and "\n" not in word


def obey(text: str, session: Session, reader: Reader) -> None:
    """Do what a command says; what cannot be done is said and changes nothing. Raises Leave."""
    word, _, rest = text.strip().partition(" ")
    commands: dict[str, Callable[[str], None]] = {
        "/set": lambda rest: _set(rest, session, reader),
        "/show": lambda rest: _show(rest, session),
        "/load": lambda rest: _load(rest, session),
        "/save": lambda rest: _save(rest, session),
        "/clear": lambda rest: _clear(session),
        "/new": lambda rest: _clear(session),
        "/help": lambda rest: print(HELP),
        "/?": lambda rest: print(HELP),
        "/bye": _leave,
        "/exit": _leave,
    }
    command = commands.get(word)
    if command is None:
        note(f"there is no command {word}; /help lists them")
        return
    try:
        command(rest.strip())
    except NybbleError as error:
        note(str(error))


def _leave(rest: str) -> None:
    raise Leave


def _clear(session: Session) -> None:
    session.clear()
    note("new conversation")


def _set(rest: str, session: Session, reader: Reader) -> None:
    word, _, value = rest.partition(" ")
    value = value.strip()
    if word == "parameter":
        name, _, text = value.partition(" ")
        _set_parameter(name, text.strip(), session)
    elif word == "system":
        session.set_system(value.strip('"').strip())
        note("set the system message" if session.system else "there is no system message now")
    elif word in ("verbose", "quiet"):
        session.verbose = word == "verbose"
    elif word in ("markdown", "plain"):
        session.markdown = word == "markdown"
    elif word in ("history", "nohistory"):
        reader.keeps_history = word == "history"
    else:
        raise ConfigError("/set takes parameter, system, verbose, quiet, markdown, plain, history or nohistory")


def _set_parameter(name: str, text: str, session: Session) -> None:
    if name not in PARAMETERS:
        raise ConfigError(f"{name or 'the parameter'!r} is none of {', '.join(PARAMETERS)}")
    value = text.split() if name == "stop" else parameter_value(name, text)
    if not value and value != 0:
        raise ConfigError(f"{text!r} is not a value for {name}")
    session.set_parameter(name, value)
    note(f"{name} is {text} now")


def _show(rest: str, session: Session) -> None:
    stored = stored_model(session.named.name)
    if rest == "info":
        spec = session.loaded.checkpoint.spec
        print(f"{session.named.name}: {session.named.path}")
        print(f"{spec.family}, {len(spec.layers)} layers, context {session.loaded.context} tokens")
    elif rest == "modelfile":
        print(stored.modelfile() if stored is not None else f"FROM {session.named.path}")
    elif rest == "parameters":
        print(parameter_lines(session.parameters) or "none are set")
    elif rest == "system":
        print(session.system or "there is none")
    elif rest == "template":
        print(session.template or session.loaded.checkpoint.chat_template)
    elif rest == "license":
        print("\n\n".join(stored.license) if stored is not None and stored.license else "none is stored")
    else:
        raise ConfigError("/show takes info, modelfile, parameters, system, template or license")


def _load(rest: str, session: Session) -> None:
    if not rest:
        raise ConfigError("/load takes the name of a model")
    session.use(rest)
    note(f"this is {rest}")


def _save(rest: str, session: Session) -> None:
    if not rest:
        raise ConfigError("/save takes a name")
    session.save(rest)
    note(f"saved as {rest}")
