"""The table of models that have a name. It knows where they come from, not how they are fetched."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model with a name."""

    name: str  # family:size
    description: str
    packages: tuple[str, ...]  # pinned requirements, in the order in which their files are joined
    sha256: str  # of the (joined) file
    num_bytes: int  # of the (joined) file
    repository: str = ""  # of the Hugging Face hub, where there are no packages
    file: str = ""  # in the repository

    @property
    def file_name(self) -> str:
        """The name of the model's file in the local store; a colon is not allowed in file names everywhere."""
        return self.name.replace(":", "-") + ".gguf"


@cache
def catalog() -> dict[str, CatalogEntry]:
    """All models that have a name, by name."""
    table = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text("utf-8"))
    return {
        name: CatalogEntry(
            name=name,
            description=row["description"],
            packages=tuple(row.get("packages", ())),
            sha256=row["sha256"],
            num_bytes=row["bytes"],
            repository=row.get("repository", ""),
            file=row.get("file", ""),
        )
        for name, row in table.items()
    }
