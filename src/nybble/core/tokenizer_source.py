"""Where a model's tokenizer comes from: plain data that a checkpoint hands to `nybble.tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A `tokenizer.json`, and the contents of the `tokenizer_config.json` beside it (empty if there is none)."""

    path: Path
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The `tokenizer.*` keys of a GGUF file."""

    metadata: Mapping[str, object]


TokenizerSource = TokenizerFile | GgufTokenizer
