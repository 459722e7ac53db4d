"""How much memory a model will take, told from its files before it is loaded."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nybble.cache.block_pool import BLOCK_SIZE
from nybble.checkpoint import open_checkpoint
from nybble.engine.load import choose_context
from nybble.engine.options import KvCacheType
from nybble.engine.scheduler import blocks_for

_WEIGHTS_FACTOR = 1.1  # packed weights, and what goes with them, beside the file
_ELEMENT_BYTES = {"f16": 2.0, "int8": 1.05, "fp8": 1.05}  # with a scale for each head and token


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes. cache: of the keys and values of one sequence as long as the context."""

    weights: int
    cache: int


def memory_needs(path: Path, *, context: int | None, kv_cache_type: KvCacheType) -> MemoryNeeds:
    """An estimate from the head of the file, or of the files of a folder. context: as in EngineOptions.

    Raises:
        CheckpointError: there is no model, or it is damaged or not supported.
        ConfigError: the model cannot have this context.
    """
    with closing(open_checkpoint(path)) as checkpoint:
        spec = checkpoint.spec
        tokens = blocks_for(choose_context(context, spec.context_length)) * BLOCK_SIZE
        elements = sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers)
    files = [path] if path.is_file() else [file for file in path.glob("*.safetensors") if file.is_file()]
    return MemoryNeeds(
        weights=int(sum(file.stat().st_size for file in files) * _WEIGHTS_FACTOR),
        cache=int(tokens * elements * _ELEMENT_BYTES[kv_cache_type]),
    )
