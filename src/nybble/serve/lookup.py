"""Which models of the store can be asked for. What was found is kept, as long as nothing changes on the disk."""

from __future__ import annotations

import asyncio
import difflib
import os
import time
from pathlib import Path

from nybble.core.errors import ModelNotFoundError
from nybble.serve.errors import ApiError
from nybble.store import ModelName, StoredModel, catalog
from nybble.store.shelf import Shelf

_FRESH_SECONDS = 0.1  # a change this soon after another one may have the same time of change
_FOREIGN_SECONDS = 5.0  # what another program's names stand for is looked up again after this time

Signature = tuple[int, ...]


class Lookup:
    """Names of a store. Belongs to one event loop."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._found: dict[str, tuple[Signature, float, StoredModel]] = {}

    async def find(self, name: str) -> StoredModel:
        """The model of a name. Costs two looks at times of change if it was asked for before.

        Raises:
            ApiError: 404, there is none.
            StoreError: a file of it is damaged, gone, or was changed.
        """
        try:
            key = ModelName.parse(name).key
        except ModelNotFoundError as error:
            raise _unknown(str(error)) from None
        known = self._found.get(key)
        if known is not None:
            signature, until, stored = known
            if time.monotonic() < until and signature == self._signature(stored):
                return stored
            del self._found[key]
        try:
            stored = await asyncio.to_thread(self._shelf.get, name)
        except ModelNotFoundError:
            raise _unknown(await asyncio.to_thread(self._nothing_called, name)) from None
        signature = self._signature(stored)
        if time.time_ns() - signature[0] > _FRESH_SECONDS * 1e9:
            until = float("inf") if stored.origin == "nybble" else time.monotonic() + _FOREIGN_SECONDS
            self._found[key] = (signature, until, stored)
        return stored

    async def all(self) -> list[StoredModel]:
        """Every model, newest first."""
        return await asyncio.to_thread(self._shelf.list)

    def _signature(self, stored: StoredModel) -> Signature:
        """Changes when a manifest is written or removed, and when the model's file is."""
        return (*_status(self._shelf.root / "manifests"), *_status(stored.path))

    def _nothing_called(self, name: str) -> str:
        names = [str(model.name) for model in self._shelf.list()]
        if ModelName.parse(name).key in catalog():
            return f"the model {name!r} is not on this machine yet: fetch it with `nybble pull {name}`"
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        told = f"did you mean {' or '.join(close)}?" if close else "`nybble list` shows what there is"
        return f"the model {name!r:.200} does not exist here; {told}"


def _unknown(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")


def _status(path: Path) -> Signature:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)
