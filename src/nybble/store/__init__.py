"""Models on this machine: names, the files they stand for, and where they come from."""

from nybble.store.catalog import CatalogEntry, catalog
from nybble.store.library import Library
from nybble.store.manifest import StoredModel
from nybble.store.modelfile import ModelfileError
from nybble.store.names import ModelName
from nybble.store.pull import PullProgress
from nybble.store.resolve import resolve

__all__ = [
    "CatalogEntry",
    "Library",
    "ModelName",
    "ModelfileError",
    "PullProgress",
    "StoredModel",
    "catalog",
    "resolve",
]
