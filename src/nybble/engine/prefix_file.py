"""Where the prefix cache of a model is kept between two runs."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from nybble.cache.block_file import SUFFIX, BlockFile, BlockFileError
from nybble.core import env
from nybble.engine.load import LoadedModel
from nybble.engine.options import parse_bytes

logger = logging.getLogger(__name__)


def default_place(model: Path) -> Path:
    """Beside the model, or in nybble's own folder if that is read-only or belongs to a program that manages it."""
    model = model.absolute()
    managed = [env.home(), env.hub_cache(), *env.ollama_models()]
    if not any(model.is_relative_to(folder.absolute()) for folder in managed) and os.access(model.parent, os.W_OK):
        return model.with_name(model.name + SUFFIX)
    key = hashlib.blake2b(str(model).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return _own_folder() / f"{model.stem[:60]}-{key}{SUFFIX}"


def open_prefix_cache(loaded: LoadedModel, file: bool | str | Path, size: int | str) -> BlockFile | None:
    """The file that an engine over this model keeps its prefix cache in. If it cannot be used, a warning says why.

    file: a path, True for the default place, False for none. size: that it never grows beyond, in bytes or like "1GiB".

    Raises:
        ConfigError: the size makes no sense, or does not hold a single block.
    """
    if file is False:
        return None
    limit = parse_bytes(size)
    path = default_place(loaded.checkpoint.path) if file is True else Path(file).expanduser()
    try:
        if path.parent == _own_folder():
            _make_folder(path.parent)
        kept = BlockFile.open(
            path,
            identity=loaded.model.identity(),
            block_bytes=loaded.model.cache_bytes_per_block,
            max_bytes=limit,
        )
    except BlockFileError as error:
        logger.warning("%s; the prefix cache will not survive this process", error)
        return None
    logger.info("%s holds %d of at most %d blocks of the prefix cache", path, len(kept), kept.num_slots)
    return kept


def _own_folder() -> Path:
    return env.home() / "prefix-cache"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BlockFileError(f"{folder} cannot be made: {error.strerror or error}") from error
