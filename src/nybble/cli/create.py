"""`nybble create`: a model from a Modelfile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.progress import Bar
from nybble.compress import table
from nybble.compress.methods import QuantizeRequest, find
from nybble.core.errors import ConfigError
from nybble.store import Library, ModelfileError
from nybble.store.create import Quantize

assert table  # imported for what it registers


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the new model.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="It; - for standard input.")] = Path("Modelfile"),
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", "-q", metavar="TYPE", help="Write the weights in this GGUF type."),
    ] = None,
) -> None:
    """Make a model from a Modelfile. A model file on this machine is linked, not copied."""
    text, folder, where = _read(file)
    writes = None if quantize is None else quantizer(quantize)
    try:
        Library().create(
            name,
            text,
            base_folder=folder,
            progress=lambda message: print(message, file=sys.stderr, flush=True),
            quantize=writes,
        )
    except ModelfileError as error:
        raise error.named(where) from error


def _read(file: Path) -> tuple[str, Path, str]:
    """The text, the folder that its paths begin in, and how to call it."""
    if str(file) == "-":
        content, folder, where = sys.stdin.buffer.read(), Path.cwd(), "standard input"
    else:
        try:
            content, folder, where = file.read_bytes(), file.resolve().parent, str(file)
        except OSError as error:
            raise ConfigError(f"the Modelfile {file} cannot be read: {error.strerror}") from error
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8")):
        if content.startswith(mark):
            try:
                return content.decode(encoding), folder, where
            except UnicodeDecodeError as error:
                raise ConfigError(f"{where} is not text in {encoding} ({error.reason})") from error
    raise AssertionError


def quantizer(to: str) -> Quantize:
    """What writes weights in a GGUF type. Raises ConfigError if there is no such type."""
    method = find(to, Path("model.gguf"))
    if method.container != "gguf":
        raise ConfigError(f"-q takes a GGUF type, which {method.name} is not: `nybble quantize --to` writes it")

    def quantize(source: Path, target: Path) -> None:
        with Bar() as progress:
            method.run(QuantizeRequest(source=source, target=target, method=method), progress)

    return quantize
