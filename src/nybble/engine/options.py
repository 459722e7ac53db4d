"""How an engine is set up, and how much memory its cache may take."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nybble.backends.device import DeviceOptions, resolve_device
from nybble.cache.block_pool import BLOCK_SIZE
from nybble.core.errors import ConfigError
from nybble.engine.scheduler import blocks_for
from nybble.engine.speculation.mode import parse_mode

logger = logging.getLogger(__name__)

KvCacheType = Literal["f16", "int8", "fp8"]  # fp8: of the torch backend
_SHARE_OF_FREE_MEMORY = 0.5
_CPU_STEP_TOKENS = 512
_GPU_STEP_TOKENS = 4096
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Sizes of an engine.

    Raises:
        ConfigError: a value is out of range.
    """

    max_model_len: int | None = None  # longest sequence, in tokens; None: the model's, at most 8192
    max_num_seqs: int = 64  # that run at once
    max_num_batched_tokens: int | None = None  # of one step; None: 512 on the CPU, 4096 on a GPU
    kv_cache_memory: int | str | None = None  # bytes, or "4GiB"; None: from free memory
    kv_cache_type: KvCacheType = "f16"  # of keys and values; int8 and fp8 hold twice as many tokens in the same memory
    enable_prefix_caching: bool = True
    threads: int | None = None
    speculate: str = "auto"  # whether guessed tokens are computed along: see nybble.engine.speculation.mode
    draft: Path | None = None  # the weights of the draft model that `speculate` names
    seed: int | None = None  # of requests that have none; None: a fresh one for each
    prefix_cache_file: bool | str | Path = False  # keeps the prefix cache for the next start; True: beside the model
    prefix_cache_size: int | str = "1GiB"  # that file never grows beyond
    adapters: tuple[str | Path, ...] = ()  # LoRAs to load at the start
    max_lora_rank: int | None = None  # of any adapter; None: no limit but the format's
    # Where it computes; see nybble.backends.device.DeviceOptions.
    device: str = "auto"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None  # None: 0.9
    enforce_eager: bool = False
    device_map: str | None = None

    def __post_init__(self) -> None:
        if parse_mode(self.speculate).needs_draft != (self.draft is not None):
            raise ConfigError(f"speculate is {self.speculate!r} and draft is {self.draft}: give both, or neither")
        parse_kv_type(self.kv_cache_type)
        parse_bytes(self.prefix_cache_size)
        if self.prefix_cache_file and not self.enable_prefix_caching:
            raise ConfigError("prefix_cache_file keeps what prefix caching knows: leave enable_prefix_caching on")
        if self.max_lora_rank is not None and self.max_lora_rank < 1:
            raise ConfigError(f"max_lora_rank must be at least 1, not {self.max_lora_rank}")
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, not {self.max_num_seqs}")
        self.placement()
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must not be below max_num_seqs "
                f"({self.max_num_seqs}): each running sequence needs one token of a step"
            )
        if self.tensor_parallel_size > 1 and (self.prefix_cache_file or self.adapters):
            raise ConfigError("prefix_cache_file and adapters need tensor_parallel_size 1: leave them out")

    def placement(self) -> DeviceOptions:
        """Where the model computes. Raises ConfigError if a value makes no sense."""
        return DeviceOptions(
            device=self.device,
            dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enforce_eager=self.enforce_eager,
            device_map=self.device_map,
        )

    def resolved_device(self) -> str:
        """cpu, torch-cpu, cuda or cuda:N. Raises ConfigError if what was asked for cannot be had on this machine."""
        return resolve_device(self.placement())

    def token_budget(self, *, on_gpu: bool) -> int:
        """Tokens of one step."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(_GPU_STEP_TOKENS if on_gpu else _CPU_STEP_TOKENS, self.max_num_seqs)


def parse_kv_type(text: str) -> KvCacheType:
    """Raises ConfigError if keys and values cannot be kept so."""
    for known in get_args(KvCacheType):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"kv_cache_type must be f16, int8 or fp8, not {text!r}")


def parse_prefix_cache_file(text: str) -> bool | Path:
    """What the command line says of the prefix cache's file: on, off, or where it is. ConfigError if it is empty."""
    if not text:
        raise ConfigError("the prefix cache file must be on, off or a path, not an empty text")
    return text == "on" if text in ("on", "off") else Path(text)


def parse_bytes(text: int | str) -> int:
    """A number of bytes from `4GiB`, `500MB` or `1073741824`.

    Raises:
        ConfigError: it is not such a number, or not positive.
    """
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
        if match is None:
            raise ConfigError(f"{text!r} is not an amount of memory: write it like 4GiB or 500MB")
        text = int(float(match[1]) * _UNITS[match[2] or ""])
    if text <= 0:
        raise ConfigError(f"an amount of memory must be positive, not {text}")
    return text


def cache_blocks(
    options: EngineOptions, *, context: int, bytes_per_block: int, gpu_bytes: Callable[[], int | None] = lambda: None
) -> int:
    """How many blocks the cache gets: what was asked for, or what fits in half of the free memory and can be used.

    gpu_bytes: what a GPU has left for the cache, found out only if nobody said how large it is; None: it is not there.

    Raises:
        ConfigError: it does not hold a single sequence of `context` tokens.
    """
    usable = options.max_num_seqs * blocks_for(context)
    if options.kv_cache_memory is not None:
        memory = parse_bytes(options.kv_cache_memory)
        origin = "kv_cache_memory"
        more = "give kv_cache_memory more"
    elif (left := gpu_bytes()) is not None:
        memory, origin, more = left, "what the GPU has left", "raise gpu_memory_utilization"
    else:
        memory = int(free_memory() * _SHARE_OF_FREE_MEMORY)
        origin, more = "half of the free memory", "give kv_cache_memory more"
    blocks = min(memory // bytes_per_block, usable)
    if blocks < blocks_for(context):
        needed = blocks_for(context) * bytes_per_block
        raise ConfigError(
            f"a sequence of {context} tokens needs {needed / 1e6:.0f} MB of cache and {origin} is "
            f"{memory / 1e6:.0f} MB: lower max_model_len (--ctx), or {more}"
        )
    logger.info(
        "the cache holds %d tokens in %.2f GB (%s)", blocks * BLOCK_SIZE, blocks * bytes_per_block / 1e9, origin
    )
    return blocks


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its control group if that allows less."""
    limits = [_available_memory()]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        allowed, taken = _number_in(limit), _number_in(used)
        if allowed is not None and taken is not None:
            limits.append(max(allowed - taken, 0))
    return min(limits)


def _available_memory(read: Callable[[], str] = lambda: Path("/proc/meminfo").read_text()) -> int:
    try:
        return next(int(line.split()[1]) * 1024 for line in read().splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**31  # unknown here: a cautious guess


def _number_in(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
