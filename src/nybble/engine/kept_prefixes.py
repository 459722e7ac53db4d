"""What the prefix cache knew before the process ended: blocks that go to a file when the engine rests, and come back.

The engine only notes which sequences ended. A thread of its own waits until no step has run for a moment, copies one
block out of the cache at a time, and writes it; when a request comes, it stops behind that block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from nybble.cache.block_file import BlockFile
from nybble.cache.block_pool import BlockPool
from nybble.engine.model import CacheBlocks

logger = logging.getLogger(__name__)

_REST_SECONDS = 0.3  # without a step, until the engine counts as resting
_MAX_NOTES = 1024
_SECONDS_AT_END = 10.0  # that closing may take


class KeptPrefixes:
    """The file behind the prefix cache of one engine. `turn` is held during a step, and while a block is copied out."""

    def __init__(self, file: BlockFile, blocks: CacheBlocks, pool: BlockPool) -> None:
        self.turn = threading.Lock()
        self._file = file
        self._blocks = blocks
        self._pool = pool
        self._notes: deque[list[bytes]] = deque(maxlen=_MAX_NOTES)  # the oldest go when too many come
        self._last_step = time.monotonic()
        self._noted = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if file.writable:
            self._thread = threading.Thread(target=self._run, name="nybble-prefix-cache", daemon=True)
            self._thread.start()

    # ---- for the engine's thread ----

    def __contains__(self, content: bytes) -> bool:
        return content in self._file

    def load(self, contents: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Fill blocks of the cache with what the file has of these contents; how many of them, from the first on."""
        data = self._file.read(contents)
        if len(data):
            self._blocks.write(blocks[: len(data)], data)
        return len(data)

    def note(self, hashes: list[bytes]) -> None:
        """A sequence ended whose full blocks have these hashes, from its first on."""
        if self._thread is not None and hashes:
            self._notes.append(hashes)
            self._noted.set()

    def rest(self) -> None:
        """A step has ended."""
        self._last_step = time.monotonic()

    # ---- for any thread ----

    def close(self) -> None:
        """Write what was not written yet, within ten seconds, and let go of the file."""
        self._ending.set()
        self._noted.set()
        thread = self._thread
        if thread is not None:
            thread.join()
        self._file.close()

    # ---- the thread ----

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                self._noted.wait()
                self._noted.clear()
                while self._notes and self._wait_for_rest():
                    self._keep(self._notes.popleft(), None)
                if not self._notes:
                    self._file.keep_order()
            deadline = time.monotonic() + _SECONDS_AT_END
            while self._notes and time.monotonic() < deadline:
                self._keep(self._notes.popleft(), deadline)
            self._file.keep_order()
        except OSError as error:
            logger.warning("%s is written no more, what it holds is still used: %s", self._file.path, error)
            self._thread = None
            self._notes.clear()

    def _wait_for_rest(self) -> bool:
        """False when it is time to end instead."""
        while not self._ending.is_set():
            left = self._last_step + _REST_SECONDS - time.monotonic()
            if left <= 0:
                return True
            self._ending.wait(left)
        return False

    def _keep(self, hashes: list[bytes], deadline: float | None) -> None:
        """Write the blocks of a sequence that are not in the file yet.

        The last block goes first: a block is of no use without those before it, so these are to count as used later.
        """
        for content in reversed(hashes[: self._file.num_slots]):
            if self._file.touch(content):
                continue
            if deadline is None and not self._wait_for_rest():
                self._notes.appendleft(hashes)  # the rest of it is written at the end
                return
            if deadline is not None and time.monotonic() > deadline:
                return
            with self.turn:
                block = self._pool.lookup(content)
                data = None if block is None else self._blocks.read([block])
            if data is not None:
                self._file.write(content, data[0])
