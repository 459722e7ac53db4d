"""Quantising a model while it is loaded: into a folder that is gone as soon as its weights are in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.checkpoint import open_checkpoint
from nybble.compress.api import Config, quantize
from nybble.compress.methods import find
from nybble.compress.scratch import scratch_folder
from nybble.core.errors import ConfigError

logger = logging.getLogger(__name__)

_EVERY = 5.0  # seconds between two lines of the log
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
    with scratch_folder() as folder:
        target = folder / (f"{model.stem}.gguf" if _is_gguf(name) else model.stem)
        quantize(model, quantization, target, threads=threads, progress=LoggedProgress(name))
        yield target


class LoggedProgress:
    """A Progress that tells the log what share is done, and about how long the rest takes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._total = self._done = 0
        self._began = self._told = time.monotonic()

    def start(self, total: int) -> None:
        """The work begins."""
        self._total = max(total, 1)
        self._began = self._told = time.monotonic()

    def advance(self, weights: int, what: str) -> None:
        """A line every few seconds."""
        self._done += weights
        now = time.monotonic()
        if self._done and now - self._told >= _EVERY:
            self._told = now
            left = (now - self._began) * max(0, self._total - self._done) / self._done
            logger.info("quantising to %s: %.0f %%, about %.0f s left", self._name, self.percent, left)

    @property
    def percent(self) -> float:
        return 100 * self._done / self._total

    def note(self, message: str) -> None:
        """Sentences on what was decided."""
        logger.info("%s", message)


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
