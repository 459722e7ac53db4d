"""Models on this machine: names, the files they stand for, and where they come from."""

from nybble.store.catalog import CatalogEntry, catalog
from nybble.store.go_template import GoTemplate
from nybble.store.library import Library
from nybble.store.manifest import StoredModel
from nybble.store.modelfile import ModelfileError
from nybble.store.names import ModelName
from nybble.store.progress import PullProgress
from nybble.store.resolve import resolve
from nybble.store.template import is_go_template

__all__ = [
    "CatalogEntry",
    "GoTemplate",
    "Library",
    "ModelName",
    "ModelfileError",
    "PullProgress",
    "StoredModel",
    "catalog",
    "is_go_template",
    "resolve",
]
