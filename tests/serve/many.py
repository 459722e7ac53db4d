"""Models on demand without files: a library that lists names, and a loader that makes scripted engines."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served import MODEL, ScriptedModel, make_engine

from nybble.core.errors import CheckpointError, ModelNotFoundError
from nybble.engine.async_engine import AsyncEngine
from nybble.serve.models import Models
from nybble.serve.settings import ServeSettings
from nybble.store import ModelName, StoredModel


class NamesOnly:
    """What Models need of a library."""

    def __init__(self, root: Path, *names: str) -> None:
        self.root = root
        self.num_looks = 0
        self._stored: dict[ModelName, StoredModel] = {}
        for name in names:
            self.put(name)

    def put(self, name: str, version: str = "", **more: Any) -> None:
        """Make a model, or another one of the same name."""
        parsed = ModelName.parse(name)
        file = self.root / "files" / parsed.file_name
        for folder in (file.parent, self.root / "manifests"):
            folder.mkdir(parents=True, exist_ok=True)
        file.write_text(version)
        self.touch()
        self._stored[parsed] = StoredModel(parsed, file, f"sha256:{name}{version}", 4, time.time(), **more)

    def touch(self) -> None:
        """As if a manifest had been written."""
        (self.root / "manifests" / str(time.monotonic_ns())).touch()

    def get(self, name: str) -> StoredModel:
        self.num_looks += 1
        found = self._stored.get(ModelName.parse(name))
        if found is None:
            raise ModelNotFoundError("there is none")
        return found

    def list(self) -> list[StoredModel]:
        return list(self._stored.values())


@dataclass
class Scripted:
    """Loads in no time, unless `gate` is cleared. `bad` names fail."""

    sizes: dict[str, int] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    models: dict[str, ScriptedModel] = field(default_factory=dict)
    engines: list[AsyncEngine] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def size(self, stored: StoredModel) -> int:
        return self.sizes.get(stored.name.path, 10)

    def load(self, stored: StoredModel) -> AsyncEngine:
        self.loads.append(str(stored.name))
        self.gate.wait(20)
        if stored.name.path in self.bad:
            raise CheckpointError("the file is damaged")
        model = self.models[stored.name.path] = ScriptedModel(f"I am {stored.name.path}")
        engine = make_engine(model)
        self.engines.append(engine)
        return engine


def make_models(root: Path, *names: str, loader: Scripted | None = None, **options: Any) -> tuple[Models, Scripted]:
    """Models a, b, ... of 10 bytes each."""
    loader = loader or Scripted()
    settings = ServeSettings(MODEL, **options.pop("settings", {}))
    return Models(settings, library=NamesOnly(root, *names), loader=loader, **options), loader  # type: ignore[arg-type]
