"""The program of ranks 1 and above: `python -m nybble.backends.torch.parallel.worker`, started by `driver`.

It reads its settings as a line of JSON from standard input, answers with one when its part is loaded (or cannot be),
and then does what rank 0 tells it to. It ends when standard input closes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nybble.backends.device import DeviceOptions
from nybble.backends.torch.parallel.ranks import Order, Ranks, open_store
from nybble.backends.torch.serve.inputs import from_flat
from nybble.backends.torch.serve.memory import blocks_that_fit
from nybble.backends.torch.serve.rank import Rank
from nybble.backends.torch.serve.setup import load_rank
from nybble.checkpoint import open_checkpoint
from nybble.core.errors import NybbleError


def main() -> int:
    """0: rank 0 said that it is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends us when it wants to
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        group, rank = _load(settings)
    except (NybbleError, torch.OutOfMemoryError) as error:
        _answer({"error": type(error).__name__, "message": str(error)})
        return 2
    _answer({"ready": "yes"})
    work(rank, group, DeviceOptions(**settings["options"]))
    return 0


def work(rank: Rank, group: Ranks, options: DeviceOptions) -> None:
    """Follow orders until the last one. RuntimeError if another rank is gone."""
    while True:
        order, arguments, payload = group.hear()
        if order == Order.STEP:
            sizes: Any = arguments[:5]
            rank.run(from_flat(sizes, payload))
        elif order == Order.NEW_CACHE:
            rank.new_cache(arguments[0])
        elif order == Order.COPY_BLOCKS:
            rank.needed_cache().copy(payload.reshape(-1, 2))
        elif order == Order.FIT_BLOCKS:
            group.smallest(blocks_that_fit(rank, arguments[0], arguments[1], options))
        elif order == Order.LOGITS:
            rank.logits(torch.from_numpy(payload.view(np.float32).reshape(arguments[0], -1)))
        else:
            return


def _load(settings: dict[str, Any]) -> tuple[Ranks, Rank]:
    number, options = settings["rank"], DeviceOptions(**settings["options"])
    device = torch.device("cuda", number) if settings["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(settings["threads"] // options.tensor_parallel_size, 1))
    store = open_store(settings["port"], descriptor=None, seconds=settings["start_seconds"])
    store.set(f"rank {number}", "here")
    group = Ranks(store, number, options.tensor_parallel_size, device, seconds=settings["step_seconds"])
    checkpoint = open_checkpoint(Path(settings["path"]))
    rank, _ = load_rank(
        checkpoint, options, device, context=settings["context"], kv_cache_type=settings["kv_cache_type"], group=group
    )
    return group, rank


def _answer(reply: dict[str, str]) -> None:
    print(json.dumps(reply), flush=True)


def _end_with_driver() -> None:
    """Standard input closes when the driver ends, however it does."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
