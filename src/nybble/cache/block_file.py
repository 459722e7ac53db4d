"""Blocks of a KV cache in a file, by what they hold, so that a prefix survives the process that computed it.

The file: a header, a table with one record for each slot, then the slots, all of the same size. A record is the hash of
a block's tokens (nybble.cache.block_pool), a digest of the slot's bytes, and when the block was last of use. The digest
is BLAKE2b, keyed with what the file belongs to and salted with the hash: a slot that was damaged, half written,
swapped, or written for another model does not have it. So nothing has to be written in any order, or flushed.

Slots are read with pread into memory of our own and checked there. A mapping would be as fast, but it ends the process
when the file is cut or the disk fails, and what another process writes could change between the check and the use.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.core.errors import ConfigError, NybbleError

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

SUFFIX = ".prefix-cache"  # a file with this name is ours, whatever a damaged one holds

_MAGIC = b"nybblKV1"  # the digit is the version of the layout, and of block_hash
_HEADER = struct.Struct("<8s32sQQ16s")  # magic, identity, bytes of a block, slots, checksum of what comes before
_RECORD = struct.Struct("<16s16sQ")  # hash of the tokens, digest of the slot, when it was last of use
_PAGE = 4096
_EMPTY = bytes(16)
_MODE = 0o600  # keys and values tell a lot about the text that they were computed from


class BlockFileError(NybbleError):
    """A file for the prefix cache cannot be used; everything works without it."""


class BlockFile:
    """An open file of blocks. One process writes it; others that open it meanwhile read what it holds.

    One thread may read while another one writes.
    """

    def __init__(self, descriptor: int, path: Path, identity: bytes, block_bytes: int, slots: int, writable: bool):
        self.path = path
        self.writable = writable
        self.block_bytes = block_bytes
        self.num_damaged = 0  # blocks that were dropped because they are not what was written
        self._fd = descriptor
        self._identity = identity
        self._data = _table_end(slots)
        self._guard = threading.Lock()  # of the index, never held while the disk is waited for
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # what has been of no use for longest comes first
        self._moved: set[bytes] = set()  # whose place in that order is not in the file yet
        self._clock = self._read_table(slots)
        used = set(self._slot_of.values())
        self._free = [slot for slot in range(slots - 1, -1, -1) if slot not in used]

    @classmethod
    def open(cls, path: Path, *, identity: bytes, block_bytes: int, max_bytes: int) -> BlockFile:
        """Open a file, or begin it anew if it is damaged or belongs to another model, setting or size.

        identity: 32 bytes that stand for all that the content of a block depends on besides its tokens. block_bytes:
        of one block. max_bytes: the file never grows beyond.

        Raises:
            ConfigError: max_bytes does not hold a block.
            BlockFileError: the file cannot be made or read, or is in use for another model, setting or size.
        """
        slots = (max_bytes - _PAGE) // (block_bytes + _RECORD.size)
        while slots > 0 and _table_end(slots) + slots * block_bytes > max_bytes:
            slots -= 1
        if slots < 1:
            raise ConfigError(
                f"prefix_cache_size ({max_bytes / 1e6:.1f} MB) does not hold one block of {block_bytes / 1e6:.1f} MB: "
                "raise it"
            )
        header = _header(identity, block_bytes, slots)
        try:
            descriptor, writable = _open_and_lock(path)
            try:
                if os.pread(descriptor, len(header), 0) != header:
                    _begin(descriptor, path, header, slots, writable)
                return cls(descriptor, path, identity, block_bytes, slots, writable)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise BlockFileError(f"{path} cannot keep the prefix cache: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, content: bytes) -> bool:
        return content in self._slot_of

    @property
    def num_slots(self) -> int:
        """How many blocks fit."""
        return len(self._slot_of) + len(self._free)

    def read(self, contents: Sequence[bytes]) -> Bytes:
        """The bytes of blocks, [blocks, block_bytes], up to the first one that is not here or not whole."""
        out = np.empty((len(contents), self.block_bytes), np.uint8)
        for row, content in enumerate(contents):
            slot = self._slot_of.get(content)
            if slot is None or not self._read_slot(slot, content, out[row]):
                return out[:row]
        return out

    def write(self, content: bytes, data: Bytes) -> None:
        """Keep a block, in place of the one that has been of no use for longest if the file is full.

        Raises:
            OSError: it was not written; the disk is full, for example.
        """
        with self._guard:
            if self._free:
                slot = self._free.pop()
            else:
                oldest, slot = self._slot_of.popitem(last=False)
                self._moved.discard(oldest)
        try:
            self._write_record(slot, _EMPTY, _EMPTY, 0)
            _write_all(self._fd, data.data.cast("B"), self._data + slot * self.block_bytes)
            self._clock += 1
            self._write_record(slot, content, self._digest(content, data), self._clock)
        except OSError:
            with self._guard:
                self._free.append(slot)
            raise
        with self._guard:
            self._slot_of[content] = slot

    def touch(self, content: bytes) -> bool:
        """Say that a block was of use; False if it is not here."""
        with self._guard:
            if content not in self._slot_of:
                return False
            self._slot_of.move_to_end(content)
            self._moved.add(content)
            return True

    def keep_order(self) -> None:
        """Write down which blocks were touched. The order is a hint: if it is lost, other blocks are replaced first.

        Raises:
            OSError: it was not written.
        """
        with self._guard:
            moved = [(slot, content) for content, slot in self._slot_of.items() if content in self._moved]
            self._moved.clear()
        for slot, content in moved:
            self._clock += 1
            if os.pread(self._fd, 16, _record_at(slot)) == content:
                _write_all(self._fd, struct.pack("<Q", self._clock), _record_at(slot) + 32)

    def close(self) -> None:
        """Let go of the file; another process may write it then."""
        with self._guard:
            self._slot_of.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- inside ----

    def _read_table(self, slots: int) -> int:
        """Fill the index; the time of the last use of all."""
        table = os.pread(self._fd, slots * _RECORD.size, _PAGE)
        whole = len(table) // _RECORD.size * _RECORD.size
        records = [
            (used, slot, content)
            for slot, (content, _, used) in enumerate(_RECORD.iter_unpack(table[:whole]))
            if content != _EMPTY
        ]
        for _, slot, content in sorted(records):
            self._slot_of[content] = slot
        return min(max(records, default=(0, 0, b""))[0], 2**63)  # a damaged one may be anything

    def _read_slot(self, slot: int, content: bytes, out: Bytes) -> bool:
        try:
            record = os.pread(self._fd, _RECORD.size, _record_at(slot))
            size = os.preadv(self._fd, [out.data], self._data + slot * self.block_bytes)
        except OSError as error:
            logger.warning("%s cannot be read, what it holds is computed again: %s", self.path, error)
            record, size = b"", 0
        if len(record) == _RECORD.size and size == self.block_bytes:
            stored, digest, _ = _RECORD.unpack(record)
            if stored == content and digest == self._digest(content, out):
                return True
        with self._guard:
            if self._slot_of.get(content) != slot:  # it was replaced while it was read
                return False
            del self._slot_of[content]
            self._moved.discard(content)
        if self.writable:
            self._drop(slot)
        return False

    def _drop(self, slot: int) -> None:
        self.num_damaged += 1
        if self.num_damaged == 1:
            logger.warning("%s: a damaged block was dropped, it is computed again", self.path)
        try:
            self._write_record(slot, _EMPTY, _EMPTY, 0)
        except OSError as error:
            logger.debug("%s: %s", self.path, error)  # it will be found damaged again
        with self._guard:
            self._free.append(slot)

    def _write_record(self, slot: int, content: bytes, digest: bytes, used: int) -> None:
        _write_all(self._fd, _RECORD.pack(content, digest, used), _record_at(slot))

    def _digest(self, content: bytes, data: Bytes) -> bytes:
        return hashlib.blake2b(data.data, digest_size=16, key=self._identity, salt=content).digest()


def _header(identity: bytes, block_bytes: int, slots: int) -> bytes:
    packed = _HEADER.pack(_MAGIC, identity, block_bytes, slots, _EMPTY)[:-16]
    return packed + hashlib.blake2b(packed, digest_size=16).digest()


def _record_at(slot: int) -> int:
    return _PAGE + slot * _RECORD.size


def _table_end(slots: int) -> int:
    return -(-_record_at(slots) // _PAGE) * _PAGE


def _open_and_lock(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether this process is the one that writes."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    except OSError as error:
        if not path.is_file():
            raise
        logger.warning("%s is only read: %s", path, error.strerror)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("%s is written by another process: this one uses what it holds, and adds nothing", path)
        return descriptor, False
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, True


def _begin(descriptor: int, path: Path, header: bytes, slots: int, writable: bool) -> None:
    """Empty the file and write header and table. A path that was mistyped must not cost the user another file."""
    size, magic = os.fstat(descriptor).st_size, os.pread(descriptor, len(_MAGIC), 0)
    if not writable:
        raise BlockFileError(
            f"{path} holds prefixes of another model, setting or size, and it cannot be replaced now: another process "
            "uses it, or it is read-only"
        )
    if size and magic != _MAGIC and path.suffix != SUFFIX:
        raise BlockFileError(f"{path} is no file of the prefix cache and is left alone: give another path")
    if size:
        logger.info("%s is damaged or was made for another model, setting or size: it begins anew", path)
    os.ftruncate(descriptor, 0)
    _write_all(descriptor, bytes(_table_end(slots)), 0)
    _write_all(descriptor, header, 0)


def _write_all(descriptor: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
