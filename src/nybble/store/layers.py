"""Files that a model is made of, taken over where they lie: linked or named, never copied."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

from nybble.core.errors import ConfigError, StoreError
from nybble.store.blobs import BlobFolder, locked, sync_folder, writing
from nybble.store.manifest import Layer

_ADAPTER_FILES = ("adapter_model.safetensors", "adapters.safetensors")
_MAX_HEADER_BYTES = 1 << 26  # of a safetensors file
# No hard links here: another disk, another owner, a file system without them, or too many.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS}


def weights_layer(blobs: BlobFolder, path: Path) -> Layer:
    """A GGUF file or a Hugging Face folder. Raises ConfigError if it is neither, StoreError if it cannot be read."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is a folder without config.json, so it is no model: name a folder that has one")
        return reference(path)
    kind = _first_bytes(path, 4)
    if kind != b"GGUF":
        raise ConfigError(f"{path} is not a GGUF file: it begins with {kind!r}, not with b'GGUF'")
    return linked(blobs, path)


def adapter_layer(blobs: BlobFolder, path: Path) -> Layer:
    """A LoRA: a GGUF or safetensors file, or a folder with one. Raises ConfigError if it is none of them.

    A safetensors file says nothing without the configuration beside it, so of a PEFT folder's it is the folder.
    """
    if path.name in _ADAPTER_FILES and (path.parent / "adapter_config.json").is_file():
        path = path.parent
    if path.is_dir():
        inside = next((path / name for name in _ADAPTER_FILES if (path / name).is_file()), None)
        if inside is None or not (path / "adapter_config.json").is_file():
            raise ConfigError(f"{path} is no adapter: it lacks adapter_config.json or {_ADAPTER_FILES[0]}")
        _check_lora_names(inside)
        return reference(path)
    if _first_bytes(path, 4) != b"GGUF":
        _check_lora_names(path)
    return linked(blobs, path)


def linked(blobs: BlobFolder, path: Path) -> Layer:
    """A file under a second name in the store, so that it stays when the first goes; or by its path, if need be.

    Nothing is read: the link is named after the file's inode, size and time, and `verify` notes the digest later.
    """
    with writing(blobs.root):
        if (digest := blobs.digest_of(path)) is not None and blobs.has(digest):
            status = path.lstat()
            tells = digest.startswith("inode:")
            return Layer(status.st_size, digest, mtime_ns=tells * status.st_mtime_ns, inode=tells * status.st_ino)
        layer = reference(path)
        text = f"{layer.inode} {layer.size} {layer.mtime_ns}"
        digest = f"inode:{hashlib.sha256(text.encode('ascii')).hexdigest()}"
        with locked(blobs.root):
            blobs.folder.mkdir(exist_ok=True)
            if not blobs.has(digest):
                try:
                    os.link(path.resolve(), blobs.path(digest), follow_symlinks=False)
                except OSError as error:
                    if error.errno in _CANNOT_LINK:
                        return layer
                    raise
                sync_folder(blobs.folder)
    return Layer(layer.size, digest, mtime_ns=layer.mtime_ns, inode=layer.inode)


def reference(path: Path) -> Layer:
    """A file or folder that stays where it is. Raises StoreError if it cannot be read."""
    try:
        path = path.resolve(strict=True)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return Layer(sum(file.stat().st_size for file in path.iterdir() if file.is_file()), path=str(path))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    return Layer(status.st_size, path=str(path), mtime_ns=status.st_mtime_ns, inode=status.st_ino)


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        # A pipe or a device would be waited for, or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is not a regular file")
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _check_lora_names(path: Path) -> None:
    """The tensors of a safetensors file must be pairs of a low-rank product."""
    size = int.from_bytes(_first_bytes(path, 8), "little")
    try:
        if not 2 <= size <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError("its header has no possible length")
        names = json.loads(_first_bytes(path, 8 + size)[8:])
        if not any(isinstance(name, str) and "lora_" in name.lower() for name in names):
            raise ValueError("no tensor of it is called lora_...")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no adapter, neither GGUF nor a LoRA in safetensors ({error})") from error
