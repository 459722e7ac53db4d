"""Files of the store: where each lies, and how it gets there whole or not at all.

    root/
      lock                    held while files appear under their names or go
      blobs/sha256-<hex>      a file whose content has this SHA-256
      blobs/inode-<hex>       a hard link to a user's file, which nobody has read yet; <hex> names inode, size and time
      manifests/<name>        one model each (see nybble.store.manifest)
      work/<random>/          half-written files of a process, which holds a lock on the folder while it lives

Everything is written under work/, synced, and renamed: a process that is killed leaves files there and nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nybble.core.errors import ConfigError, StoreError
from nybble.store.names import BLOB_DIGEST, parse_digest

CHUNK_BYTES = 1 << 22


class BlobFolder:
    """The files of a store. Nothing is created before something is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "blobs"
        self._work = root / "work"

    def path(self, digest: str) -> Path:
        """The one place where a digest becomes a path. Raises ConfigError if it is not a digest."""
        kind, _, hexadecimal = digest.partition(":")
        if kind == "inode" and BLOB_DIGEST.fullmatch(digest):
            return self.folder / f"inode-{hexadecimal}"
        return self.folder / f"sha256-{parse_digest(digest)}"

    def digest_of(self, path: Path) -> str | None:
        """The digest that a path inside the folder stands for."""
        digest = path.name.replace("-", ":", 1)
        return digest if path.parent == self.folder and BLOB_DIGEST.fullmatch(digest) else None

    def has(self, digest: str) -> bool:
        """Whether a regular file is there; a symbolic link is none."""
        try:
            return stat.S_ISREG(self.path(digest).lstat().st_mode)
        except OSError:
            return False

    def digests(self) -> list[str]:
        """All that is there, in order."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        digests = [name.replace("-", ":", 1) for name in names]
        return [digest for digest in digests if BLOB_DIGEST.fullmatch(digest)]

    def write(self, digest: str, chunks: Iterable[bytes]) -> None:
        """Store bytes that must have this digest.

        Raises:
            ConfigError: the digest is none, or the bytes have another one.
            StoreError: they cannot be written.
        """
        target = self.path(f"sha256:{parse_digest(digest)}")
        if self.has(digest):
            return
        with self.workspace() as work:
            found = write_synced(self.root, work / "blob", chunks)
            if found != parse_digest(digest):
                raise ConfigError(f"the bytes have the digest sha256:{found}, not {digest}: send them again")
            self.adopt(work / "blob", target)

    def delete(self, digest: str) -> None:
        """Remove a blob if it is there; call it under the lock. Raises StoreError if it cannot be removed."""
        with writing(self.root):
            remove_file(self.path(digest))
            remove_file(self._note(digest))

    def trouble(self, digest: str) -> str | None:
        """What is wrong with a blob, after reading all of it. A linked file is compared with what was read before."""
        path = self.path(digest)
        try:
            if path.is_symlink():
                return f"{path} is a symbolic link: remove it"
            found = file_digest(path)
            wanted = digest.partition(":")[2]
            if digest.startswith("inode:"):
                note = self._note(digest)
                if not note.exists():
                    with self.workspace() as work:
                        write_synced(self.root, work / "note", [found.encode("ascii")])
                        (work / "note").replace(note)
                wanted = note.read_text("ascii")
        except FileNotFoundError:
            return None  # removed meanwhile
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return None if found == wanted else f"{path} is damaged, its SHA-256 is {found}: make its models again"

    def _note(self, digest: str) -> Path:
        """Beside a linked file, what its SHA-256 was when it was first read."""
        path = self.path(digest)
        return path.with_name(f"{path.name}.sha256")

    def adopt(self, source: Path, target: Path) -> None:
        """Move a finished, synced file from a workspace to its place."""
        with writing(self.root):
            self.folder.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            sync_folder(self.folder)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder of one's own to write in, which is gone afterwards. Raises StoreError if there is no room."""
        with writing(self.root), locked(self.root):  # the sweeper comes under the same lock
            self._work.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._work))
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    def sweep(self) -> int:
        """Remove what killed processes left in work/; call it under the lock. Returns how many folders."""
        swept = 0
        for folder in list(self._work.iterdir()) if self._work.is_dir() else []:
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                swept += 1
            except BlockingIOError:
                pass  # its process lives
            finally:
                os.close(descriptor)
        return swept


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One process at a time writes manifests or removes files. Held for moments only; not to be nested."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_synced(root: Path, path: Path, chunks: Iterable[bytes]) -> str:
    """Write a new file so that it survives a power cut. Returns its SHA-256 in hexadecimal.

    Raises:
        StoreError: it cannot be written. What `chunks` raises passes through.
    """
    digest = hashlib.sha256()
    with writing(root):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            with writing(root):
                _write_all(descriptor, chunk)
        with writing(root):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _write_all(descriptor: int, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[os.write(descriptor, left) :]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turns what the system says into a StoreError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk of {root} is full: make room, or set NYBBLE_HOME to a folder on another disk"
        else:
            message = f"{error.filename or root} cannot be used ({error.strerror or error}): is NYBBLE_HOME right?"
        raise StoreError(message) from error


def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        path.unlink()
