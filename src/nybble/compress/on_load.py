"""Quantising a model while it is loaded: into a folder that is gone as soon as its weights are in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.checkpoint import open_checkpoint
from nybble.compress.api import Config, quantize
from nybble.compress.methods import find
from nybble.core import env
from nybble.core.errors import ConfigError, OutputError

# What other tools call the formats of folders that are quantised already.
_STORED = ("gptq", "awq", "bitsandbytes", "compressed-tensors", "gguf")


@contextmanager
def quantised(model: Path, quantization: Config | str | None, *, threads: int | None = None) -> Iterator[Path]:
    """Where to load the model from: what `quantization` makes of it, or itself where there is nothing to do.

    quantization: a type of `nybble quantize`, a config of `nybble.quantize`, or the name of the format that the model
    has already, which is then checked. The quantised files need space beside the models for as long as they are read.

    Raises:
        ConfigError: it cannot be used, or the model has another format.
        CheckpointError, TokenizerError, OutputError: as `nybble.quantize` does.
    """
    if quantization is None:
        yield model
        return
    if isinstance(quantization, str) and quantization in _STORED:
        _check_stored(model, quantization)
        yield model
        return
    name = quantization if isinstance(quantization, str) else quantization.asked().type
    home = env.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="quantised-", dir=home, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"{home} cannot hold the quantised weights: {error.strerror}; set NYBBLE_HOME") from None
    with folder as path:
        target = Path(path) / (f"{model.stem}.gguf" if _is_gguf(name) else model.stem)
        quantize(model, quantization, target, threads=threads)
        yield target


def _is_gguf(name: str) -> bool:
    return find(name).container == "gguf"


def _check_stored(model: Path, name: str) -> None:
    found = "gguf" if model.is_file() else _stored_method(model)
    if found != name:
        raise ConfigError(
            f"{model} is not quantised as {name} ({found or 'it is not quantised'}): leave quantization out, or name a "
            "type to quantise it to"
        )


def _stored_method(folder: Path) -> str | None:
    config = open_checkpoint(folder).metadata.get("quantization_config")
    if isinstance(config, dict):
        return str(config.get("quant_method"))
    return "gptq" if (folder / "quantize_config.json").is_file() else None
