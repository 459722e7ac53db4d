"""Models on this machine: names from the catalog, files fetched once and checked."""

from nybble.store.catalog import CatalogEntry, catalog
from nybble.store.resolve import resolve

__all__ = ["CatalogEntry", "catalog", "resolve"]
