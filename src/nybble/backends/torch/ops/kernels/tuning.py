"""Which tile a product uses: tried once for each encoding, shape and device, then remembered in a file.

The file is tiles/<device>.json in NYBBLE_HOME. A damaged one is ignored and written again; it holds nothing that
cannot be measured again. While a CUDA graph is recorded nothing can be timed, so an unknown shape gets the first guess,
and so does every shape in the interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import torch
import triton

from nybble.backends.torch.flash.numbers import interpreted
from nybble.backends.torch.ops.kernels.paged import multiprocessors
from nybble.backends.torch.ops.kernels.tiles import Tile, bucket, candidates
from nybble.core import env
from nybble.core.errors import ConfigError

_LOG = logging.getLogger(__name__)
_VERSION = f"1, triton {triton.__version__}"
_ROUNDS = 7
_LIMITS = ((16, 256), (16, 256), (1, 64), (1, 16), (1, 8))  # of the numbers of a Tile


class TileFile:
    """Tiles by what they are for, in memory and in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tiles = _read(path)

    def add(self, key: str, tile: Tile) -> None:
        """Remember it. What another process wrote is kept; a disk that refuses costs only the memory of it."""
        self.tiles = _read(self.path) | self.tiles | {key: tile}
        content = {"version": _VERSION, "tiles": {name: astuple(one) for name, one in sorted(self.tiles.items())}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(self.path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            _LOG.warning("the tiles of this GPU cannot be kept in %s: %s", self.path, error)


def choose_tile(key: str, x: torch.Tensor, n: int, run: Callable[[Tile], object]) -> Tile:
    """The fastest tile for y [m, n] from x [m, k]; key: all else that it depends on. run: the product with a tile."""
    m, k = x.shape
    tried = candidates(m, n, k, multiprocessors(x.device))
    if interpreted():
        return Tile(16, 32, min(tried[0].splits, 2), 4, 1)  # small, so that small tests have several
    if x.device.type != "cuda":
        return tried[0]
    file = tile_file(x.device)
    name = f"{key}, {bucket(m)} x {n} x {k}"
    known = file.tiles.get(name)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return tried[0]
    best = _fastest(tried, run)
    file.add(name, best)
    return best


@functools.cache
def tile_file(device: torch.device) -> TileFile:
    """Of the GPU's model."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-")
    return TileFile(env.home() / "tiles" / f"{name}.json")


def _fastest(tiles: list[Tile], run: Callable[[Tile], object]) -> Tile:
    times: dict[Tile, float] = {}
    for tile in tiles:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):  # not on this GPU
            times[tile] = _seconds(functools.partial(run, tile))
    if not times:
        raise ConfigError(
            f"no tile of a product fits the shared memory of this GPU (tried {tiles}): set NYBBLE_TORCH_OPS=torch to "
            "run without kernels"
        )
    return min(times, key=lambda tile: times[tile])


def _seconds(work: Callable[[], object]) -> float:
    """Median of several runs, each on a clean second-level cache, as it is between the products of a model."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    work()
    taken = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return float(statistics.median(taken)) / 1e3


def _read(path: Path) -> dict[str, Tile]:
    """Nothing, if the file is not there, damaged, or of another version."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["version"] != _VERSION:
            return {}
        return {str(name): _tile(numbers) for name, numbers in content["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _tile(numbers: list[int]) -> Tile:
    """Raises ValueError for what no tile can be."""
    for number, (least, most) in zip(numbers, _LIMITS, strict=True):
        if type(number) is not int or not least <= number <= most:
            raise ValueError(f"{numbers} is no tile")
    if any(number & (number - 1) for number in numbers[:4]):
        raise ValueError(f"{numbers} are not powers of two")
    return Tile(*numbers)


def _write_whole(path: Path, text: str) -> None:
    """Under its name only when it is complete."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise
