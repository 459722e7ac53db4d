"""How much of a GPU's memory the cache may take: what a step of the largest size leaves, found out by running one."""

from __future__ import annotations

import logging
import os

import numpy as np
import torch

from nybble.backends.device import DEFAULT_UTILISATION, DeviceOptions
from nybble.backends.torch.serve.inputs import BLOCK_SIZE, SKIP, HostInputs
from nybble.backends.torch.serve.rank import Rank
from nybble.core.errors import ConfigError

logger = logging.getLogger(__name__)


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU; None for the CPU, whose memory is counted elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free


def free_host_bytes() -> int:
    """Of the machine's memory, what nothing uses at all."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def blocks_that_fit(rank: Rank, num_tokens: int, num_sequences: int, options: DeviceOptions) -> int:
    """Run the largest step and see what it leaves of the share of the GPU's memory that may be used.

    Raises:
        ConfigError: there is no room for that step, or none beside it.
    """
    device = rank.decoder.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        rank.new_cache(1)
        rank.run(largest_step(num_tokens, num_sequences, rank.context), eager=True)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {num_tokens} tokens does not fit on {device} beside the weights: lower "
            "max_num_batched_tokens, or quantise the model"
        ) from error
    rank.drop_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)  # of other programs, and of the driver
    left = cache_bytes(
        total=total,
        share=options.gpu_memory_utilization or DEFAULT_UTILISATION,
        others=others,
        peak=torch.cuda.max_memory_allocated(device),
        device=str(device),
    )
    torch.cuda.empty_cache()
    logger.info("%.2f GB of %s are left for the cache", left / 1e9, device)
    blocks = left // rank.bytes_per_block_on("cuda")
    beside = rank.bytes_per_block_on("cpu")
    if beside:  # layers that did not fit have theirs in the machine's memory
        blocks = min(blocks, free_host_bytes() // 2 // beside)
    return blocks


def cache_bytes(*, total: int, share: float, others: int, peak: int, device: str) -> int:
    """What is left of `share` of `total` bytes after other programs' and the largest step's.

    Raises:
        ConfigError: nothing is.
    """
    left = int(total * share) - others - peak
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_utilization {share} allows {total * share / 1e9:.2f} GB of {device}; the weights and the "
            f"largest step take {peak / 1e9:.2f} GB and other programs {others / 1e9:.2f} GB: raise it, lower "
            "max_num_batched_tokens, or quantise the model"
        )
    return left


def largest_step(num_tokens: int, num_sequences: int, context: int) -> HostInputs:
    """A step with all tokens that one may have, in as few sequences as the context allows, and all rows of logits.

    It writes nothing: its slots are skipped, and block 0 stands for every block.
    """
    counts = np.full(-(-num_tokens // context), context, np.int32)
    counts[-1] = num_tokens - context * (len(counts) - 1)
    width = -(-context // BLOCK_SIZE)
    return HostInputs(
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        slots=np.full(num_tokens, SKIP, np.int32),
        cu_seqlens_q=np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)]),
        kv_lens=counts,
        block_tables=np.zeros((len(counts), width), np.int32),
        logit_rows=np.arange(min(num_sequences, num_tokens), dtype=np.int32),
        hidden_rows=np.zeros(0, np.int32),
    )
