"""From a checkpoint's description of its tokenizer to one that works."""

from __future__ import annotations

from nybble.core.tokenizer_source import TokenizerFile, TokenizerSource
from nybble.tokenizer import from_file, from_gguf
from nybble.tokenizer.tokenizer import Tokenizer


def load_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Raises TokenizerError if the tokenizer is missing, damaged or of a kind that is not supported."""
    if isinstance(source, TokenizerFile):
        return from_file.build(source.path, source.config)
    return from_gguf.build(source.metadata)
