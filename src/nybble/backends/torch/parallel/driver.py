"""Rank 0's view of the other processes: it starts them, notices when one is gone, and takes them with it.

They are programs of their own, not forks: a script needs no `if __name__ == "__main__"`. What they are to do comes as
JSON on their standard input; when that closes, because this process ended in whatever way, they end as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nybble.backends.device import DeviceOptions
from nybble.backends.torch.parallel.ranks import Ints, Order, Ranks, listen, open_store
from nybble.core.errors import BackendError, CheckpointError, ConfigError, NybbleError

START_SECONDS = 600.0  # that a rank may take to read its weights
STEP_SECONDS = 120.0  # that it may take for its part of a step
_END_SECONDS = 5.0
_DEATH_SECONDS = 3.0  # until a process that failed is gone
_LAST_WORDS = 20  # lines of what a rank said on standard error
_WORKER = "nybble.backends.torch.parallel.worker"
_ERRORS = {"ConfigError": ConfigError, "CheckpointError": CheckpointError}


class _Worker:
    """One process, and the threads that listen to it."""

    def __init__(self, rank: int, settings: dict[str, object]) -> None:
        self.rank = rank
        self.ready = threading.Event()  # or ended
        self.reply: dict[str, str] = {}
        self.words: deque[str] = deque(maxlen=_LAST_WORDS)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdin is not None
        self._threads = [
            threading.Thread(target=target, name=f"nybble-rank-{rank}", daemon=True)
            for target in (self._read_reply, self._read_words)
        ]
        for thread in self._threads:
            thread.start()
        with suppress(OSError):  # it is gone already, which `ended` tells
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def ask_to_end(self) -> None:
        """Its standard input closes, and with that it ends."""
        assert self.process.stdin is not None
        # What was written last may not be delivered any more.
        with suppress(OSError):
            self.process.stdin.close()

    def end(self, deadline: float) -> None:
        """See to it that it ends."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join(1.0)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def epitaph(self) -> str:
        """Why it is gone, as far as that is known."""
        for thread in self._threads:  # until all that it said has been read
            thread.join(1.0)
        if "error" in self.reply:
            return self.reply["message"]
        code = self.process.poll()
        how = "it was killed" if code is not None and code < 0 else f"it left with the code {code}"
        last = next((line for line in reversed(self.words) if line.strip()), "")
        return (
            how + (f" by signal {-code}" if code is not None and code < 0 else "") + (f": {last:.200}" if last else "")
        )

    def _read_reply(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self.reply = json.loads(line)
            except ValueError:
                continue  # something that a library printed
            self.ready.set()
        self.process.wait()
        self.ready.set()

    def _read_words(self) -> None:
        assert self.process.stderr is not None
        self.words.extend(line.rstrip() for line in self.process.stderr)


class Team:
    """The ranks of a model as rank 0 has them. `start_team` makes it.

    Raises, from any method that waits for the others:
        BackendError: one of them is gone, or takes too long. The model cannot be used any more.
    """

    def __init__(self, workers: list[_Worker], group: Ranks) -> None:
        self.group = group
        self._workers = workers
        self._broken: str | None = None
        self.close = weakref.finalize(self, _end, workers)  # at the latest when the process ends

    def wait_until_ready(self) -> None:
        """Until all have read their weights.

        Raises:
            ConfigError, CheckpointError: one of them cannot run its part.
        """
        deadline = time.monotonic() + START_SECONDS
        for worker in self._workers:
            while not worker.ready.wait(0.05) and time.monotonic() < deadline:
                gone = next((other for other in self._workers if other.ended), None)
                if gone is not None:
                    gone.ready.wait(5.0)
                    raise _start_error(gone, len(self._workers) + 1)
            if worker.ended or not worker.ready.is_set() or "error" in worker.reply:
                raise _start_error(worker, len(self._workers) + 1)

    def tell(self, order: Order, arguments: tuple[int, ...] = (), payload: Ints | None = None) -> None:
        """Let the others do what this rank does next."""
        self._check()
        with self.watched():
            self.group.tell(order, arguments, payload)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What goes wrong inside leaves the ranks out of step, so that is the end; a rank that is gone is named."""
        try:
            yield
        except BackendError:
            raise
        except Exception as error:
            deadline = time.monotonic() + _DEATH_SECONDS
            while not any(worker.ended for worker in self._workers) and time.monotonic() < deadline:
                time.sleep(0.02)
            self._check()
            broken = self._break(f"the ranks of the model lost each other ({_first_line(error)})")
            if isinstance(error, NybbleError):
                raise
            raise broken from error

    def wait_for(self, device: torch.device) -> None:
        """Until the device has done what it was given, unless a rank is gone: its sums would never end."""
        if device.type != "cuda":
            return
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        deadline = time.monotonic() + STEP_SECONDS
        while not done.query():
            if any(worker.ended for worker in self._workers) or time.monotonic() > deadline:
                self.group.abort()
                self._check()
                raise self._break(f"a step took more than {STEP_SECONDS:.0f} seconds")
            time.sleep(20e-6)

    def _check(self) -> None:
        for worker in self._workers:
            if worker.ended and self._broken is None:
                raise self._break(f"rank {worker.rank} of the model is gone, {worker.epitaph()}")
        if self._broken is not None:
            raise BackendError(self._broken)

    def _break(self, why: str) -> BackendError:
        """From now on nothing works, and the reason is remembered."""
        self._broken = f"{why}; the model cannot go on with a part missing: load it again"
        _end(self._workers)
        return BackendError(self._broken)


def start_team(path: Path, options: DeviceOptions, device: torch.device, **settings: object) -> Team:
    """Start the other ranks, which begin to read their parts of the model at `path`.

    settings: context, kv_cache_type and threads, for `worker`.

    Raises:
        ConfigError: there are not enough GPUs.
        BackendError: the processes do not find each other.
    """
    size = options.tensor_parallel_size
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(
            f"tensor_parallel_size is {size} and this machine has {torch.cuda.device_count()} GPUs: set it to at most "
            "that, or quantise the model"
        )
    descriptor, port = listen()
    settings |= {
        "path": str(path.absolute()),
        "options": asdict(options),
        "device": device.type,
        "port": port,
        "step_seconds": STEP_SECONDS,
        "start_seconds": START_SECONDS,
    }
    workers: list[_Worker] = []
    try:
        for rank in range(1, size):
            workers.append(_Worker(rank, {**settings, "rank": rank}))
        store = open_store(port, descriptor=descriptor, seconds=START_SECONDS)
        _wait_for_arrivals(store, workers)
        return Team(workers, Ranks(store, 0, size, device, seconds=STEP_SECONDS))
    except BaseException:
        _end(workers)
        raise


def _first_line(error: Exception) -> str:
    """Without the place in torch's sources that its messages begin with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\.cc:\d+\] ", "", line)[:200]


def _wait_for_arrivals(store: Any, workers: list[_Worker]) -> None:
    """Until every rank has connected; a rank that ends before says why."""
    deadline = time.monotonic() + START_SECONDS
    for worker in workers:
        while not store.check([f"rank {worker.rank}"]):
            if worker.ended or time.monotonic() > deadline:
                worker.ready.wait(1.0)
                raise _start_error(worker, len(workers) + 1)
            time.sleep(0.02)


def _start_error(worker: _Worker, size: int) -> Exception:
    kind = _ERRORS.get(worker.reply.get("error", ""), BackendError)
    return kind(f"rank {worker.rank} of {size} did not start: {worker.epitaph()}")


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.ask_to_end()
    deadline = time.monotonic() + _END_SECONDS
    for worker in workers:
        worker.end(deadline)
