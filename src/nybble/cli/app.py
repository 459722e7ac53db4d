"""The entry point: which command, and how errors become one line and an exit code.

Only the module of the command that was asked for is imported, because a user waits for every import before the first
token. A name that is not a command, or `--help`, imports them all.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Annotated

import typer

from nybble import __version__
from nybble.core.errors import NybbleError

COMMANDS = (
    "run", "serve", "ps", "stop", "pull", "list", "show", "create", "cp", "rm", "store", "doctor", "bench",
    "quantize", "imatrix", "convert", "eval", "prune", "distil", "qat", "compress",
)  # fmt: skip


def main() -> None:
    """Run the command line and leave the process."""
    _prepare_output()
    try:
        _application(sys.argv[1:])()
    except NybbleError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("there is not enough memory for this; try a smaller model, --ctx or batch", 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _fail_on_system_error(error)
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            _fail_on_system_error(error)


def _application(arguments: list[str]) -> typer.Typer:
    # Rich's markup would cost its import before every error message and help text.
    application = typer.Typer(
        name="nybble",
        help="Run language models on this machine.",
        invoke_without_command=True,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback()(_root)
    if arguments[:1] == ["--version"]:
        return application
    for name in [name for name in COMMANDS if arguments[:1] == [name]] or COMMANDS:
        module = importlib.import_module(f"nybble.cli.{name}")
        application.command(name)(getattr(module, name))
    return application


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _fail(message: str, exit_code: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(exit_code)


def _prepare_output() -> None:
    if sys.stdout is None:  # closed before we came, by `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character still gets the others


def _fail_on_system_error(error: OSError) -> None:
    # Without this the interpreter would try, and complain, once more while it shuts down.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        sys.exit(1)  # whoever read our output has left, which needs no words
    what = "the output cannot be written" if error.filename is None else f"{error.filename} cannot be used"
    _fail(f"{what}: {error.strerror or error}", 1)
