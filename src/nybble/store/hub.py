"""Downloads from the Hugging Face hub (or what HF_ENDPOINT names), by way of huggingface_hub.

A GGUF file goes into the store. It is put together under partial/, where the next attempt finds what came before a
lost connection or a killed process, and becomes a blob when its SHA-256 is the one that the hub tells. A repository of
safetensors is left to the hub's own cache, which other programs share, and is read there.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nybble.core.env import hub_cache
from nybble.core.errors import ModelNotFoundError, NybbleError, StoreError
from nybble.store.blobs import BlobFolder, file_digest, writing
from nybble.store.hub_files import FOLDER_PATTERNS, choose_file, find_cached
from nybble.store.layers import linked, reference
from nybble.store.manifest import Layer
from nybble.store.names import ModelName
from nybble.store.progress import PullProgress, Tell

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TELL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 18  # what a lost connection loses at most; the hub's own 10 MB would be much on a slow line


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at one commit. sha256: what the hub says, None where it does not."""

    repository: str
    commit: str
    path: str
    url: str
    num_bytes: int
    sha256: str | None


def pull_from_hub(blobs: BlobFolder, name: ModelName, tell: Tell) -> Layer:
    """The file or folder that a name means.

    Raises:
        ModelNotFoundError: there is no such repository or file.
        StoreError: it cannot be fetched, arrived damaged, or cannot be stored.
    """
    tell(PullProgress(f"looking up {name.repository}"))
    with _one_sentence(name):
        commit, files = _list_files(name.repository)
        chosen = choose_file(name, files)
        if chosen is None:
            return _pull_folder(name, tell)
        file = _describe(name.repository, commit, chosen)
    return pull_file(blobs, name, file, tell)


def pull_known_file(blobs: BlobFolder, name: ModelName, repository: str, path: str, sha256: str, tell: Tell) -> Layer:
    """A file whose SHA-256 the catalog knows, whatever the hub says of it. Raises as `pull_from_hub`."""
    if blobs.has(f"sha256:{sha256}"):
        return Layer(blobs.path(f"sha256:{sha256}").stat().st_size, f"sha256:{sha256}")
    with _one_sentence(name):
        file = _describe(repository, "main", path)
    if file.sha256 not in (None, sha256):
        raise StoreError(
            f"{path} of {repository} has SHA-256 {file.sha256}, not the catalog's {sha256}: it was replaced"
        )
    return pull_file(blobs, name, HubFile(repository, "main", path, file.url, file.num_bytes, sha256), tell)


def pull_file(blobs: BlobFolder, name: ModelName, file: HubFile, tell: Tell) -> Layer:
    """A file as a blob; only what is missing is downloaded."""
    if file.sha256 is not None and blobs.has(f"sha256:{file.sha256}"):
        layer = Layer(blobs.path(f"sha256:{file.sha256}").stat().st_size, f"sha256:{file.sha256}")
        if layer.size == file.num_bytes:
            tell(PullProgress(f"pulling {file.path}", layer.digest, file.num_bytes, file.num_bytes))
            return layer
    if (shared := _in_hub_cache(name, file)) is not None:
        tell(PullProgress(f"using {shared}"))
        return linked(blobs, shared)
    label = file.sha256 or re.sub(r"[^A-Za-z0-9]", "-", f"{file.repository}-{file.commit}-{file.path}")[-200:]
    with writing(blobs.root), _turn(blobs.root / "partial", label, tell) as partial:
        _require_room(blobs.root, file.num_bytes - partial.stat().st_size)
        with _one_sentence(name):
            _download(file, partial, tell)
        tell(PullProgress(f"verifying {file.path}"))
        found = file_digest(partial)
        if file.sha256 not in (None, found):
            partial.unlink()
            raise StoreError(
                f"{file.path} of {file.repository} arrived with SHA-256 {found}, the hub says {file.sha256}; "
                "it was deleted: pull it again"
            )
        blobs.adopt(partial, blobs.path(f"sha256:{found}"))
    return Layer(file.num_bytes, f"sha256:{found}")


def sweep_partial(root: Path) -> int:
    """Delete downloads that nobody goes on with at the moment. Returns their bytes."""
    freed = 0
    folder = root / "partial"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            freed += os.fstat(descriptor).st_size
            path.unlink()
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    return freed


def _list_files(repository: str) -> tuple[str, list[str]]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision="main")
    return info.sha or "main", [file.rfilename for file in info.siblings or ()]


def _describe(repository: str, commit: str, path: str) -> HubFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, path, revision=commit)
    metadata = get_hf_file_metadata(url)
    if metadata.size is None:
        raise StoreError(f"the hub does not say how long {path} of {repository} is: pull it again later")
    sha256 = metadata.etag if metadata.etag is not None and _SHA256.fullmatch(metadata.etag) else None
    return HubFile(repository, commit, path, url, metadata.size, sha256)


def _download(file: HubFile, partial: Path, tell: Tell) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars("huggingface_hub.http_get")
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    begin = partial.stat().st_size
    if begin > file.num_bytes:
        begin = 0
    with partial.open("r+b") as raw:
        raw.truncate(begin)
        raw.seek(begin)
        counted = cast(BinaryIO, _Counted(raw, file, tell))
        http_get(file.url, counted, resume_size=begin, headers=build_hf_headers(), expected_size=file.num_bytes)
        raw.flush()
        os.fsync(raw.fileno())
    tell(PullProgress(f"pulling {file.path}", _digest(file), file.num_bytes, file.num_bytes))


class _Counted(io.BufferedIOBase):
    """A file that tells how far it has been written."""

    def __init__(self, raw: Any, file: HubFile, tell: Tell) -> None:
        self._raw = raw
        self._file = file
        self._tell = tell
        self._told = 0.0

    def write(self, data: Any) -> int:
        count: int = self._raw.write(data)
        now = time.monotonic()
        if now - self._told > _TELL_SECONDS:
            self._told = now
            file = self._file
            self._tell(PullProgress(f"pulling {file.path}", _digest(file), file.num_bytes, self._raw.tell()))
        return count

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def truncate(self, size: int | None = None, /) -> int:
        return int(self._raw.truncate(size))


def _digest(file: HubFile) -> str | None:
    return None if file.sha256 is None else f"sha256:{file.sha256}"


def _in_hub_cache(name: ModelName, file: HubFile) -> Path | None:
    """The same file where another program has downloaded it, if it is whole."""
    cached = find_cached(ModelName(f"hf.co/{file.repository}", file.path))
    if cached is None or not cached.path.is_file() or cached.path.stat().st_size != file.num_bytes:
        return None
    path = cached.path.resolve()
    return path if file.sha256 is not None and file_digest(path) == file.sha256 else None


def _pull_folder(name: ModelName, tell: Tell) -> Layer:
    """A repository of safetensors, in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    tell(PullProgress(f"pulling {name.repository} to {hub_cache()}"))
    folder = Path(
        snapshot_download(name.repository, revision="main", allow_patterns=list(FOLDER_PATTERNS), cache_dir=hub_cache())
    )
    for path in sorted(folder.glob("*.safetensors")):
        blob = path.resolve()
        tell(PullProgress(f"verifying {path.name}"))
        if _SHA256.fullmatch(blob.name) and file_digest(blob) != blob.name:
            raise StoreError(f"{blob} is damaged, its SHA-256 is not its name: delete it and pull {name} again")
    return reference(folder)


@contextmanager
def _turn(folder: Path, label: str, tell: Tell) -> Iterator[Path]:
    """A partial file that no other process writes to meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / label
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(PullProgress("waiting for another process that is pulling the same file"))
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.lstat()):
                yield path
                return
        finally:
            os.close(descriptor)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{needed / 1e6:.0f} MB are still to come and only {free / 1e6:.0f} MB are free in {folder}: make room, or "
            "set NYBBLE_HOME to a folder on another disk"
        )


@contextmanager
def _one_sentence(name: ModelName) -> Iterator[None]:
    """What huggingface_hub and the HTTP client below it raise, said for a user."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except NybbleError:
        raise
    except GatedRepoError as error:
        raise StoreError(
            f"{name.repository} is gated: accept its terms on its page and set HF_TOKEN to a token of yours"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"the hub has no {name.repository}, or does not show it: check the name, and HF_TOKEN if it is private"
        ) from error
    except Exception as error:  # of whichever HTTP client this version of huggingface_hub uses
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise StoreError(
            f"{name} could not be fetched from the hub ({lines[0]:.200}): run the command again, it goes on from here"
        ) from error
