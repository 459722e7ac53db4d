"""Hundreds of thousands of strings as they lie in a GGUF file, made into Python strings only when somebody asks."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

_LENGTH = struct.Struct("<Q")
_HEAD_BYTES = _LENGTH.size
_WINDOW_BYTES = 1 << 18
_RUN = 1 << 14
_ERRORS = "replace"  # a vocabulary may hold pieces of characters


class StringArray(Sequence[str]):
    """The strings of an array, read-only.

    data:  |length of 0, 8 bytes|string 0|length of 1, 8 bytes|string 1| ...
    ends:                                ^                             ^
    """

    def __init__(self, data: memoryview, ends: npt.NDArray[np.int64]) -> None:
        """The data is copied, so that the file may be closed. `ends` counts from the start of `data`."""
        self._data = bytes(data)
        self._ends = ends.astype(np.int32) if len(self._data) < 1 << 31 else ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self)[index]
        index = range(len(self))[index]  # negative ones, and IndexError
        begin = int(self._ends[index - 1]) if index else 0
        return self._data[begin + _HEAD_BYTES : int(self._ends[index])].decode("utf-8", _ERRORS)

    def __iter__(self) -> Iterator[str]:
        """All of them, many decoded in one go, which is several times as fast as one by one."""
        for begin in range(0, len(self), _RUN):
            yield from self._run(begin, min(begin + _RUN, len(self)))

    def _run(self, begin: int, end: int) -> Iterator[str]:
        first = int(self._ends[begin - 1]) if begin else 0
        data = np.frombuffer(self._data, np.uint8)[first : self._ends[end - 1]].copy()
        heads = np.concatenate((np.zeros(1, self._ends.dtype), self._ends[begin : end - 1] - first))
        data[heads] = 0  # one byte of each head stays, as the separator
        stays = np.ones(len(data), np.bool_)
        for i in range(1, _HEAD_BYTES):
            stays[heads + i] = False
        strings = data[stays].tobytes().decode("utf-8", _ERRORS).split("\0")[1:]
        if len(strings) == end - begin:
            return iter(strings)
        return (self[i] for i in range(begin, end))  # some of them hold a NUL

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray | list | tuple):
            return len(self) == len(other) and list(self) == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        return repr(list(self))


def find_ends(view: memoryview, at: int, count: int) -> npt.NDArray[np.int64]:
    """Where each of `count` strings that start at `at` ends. Shorter than `count` if the data ends before they do.

    Nearly all lengths are below 256, so seven zero bytes mark a head. A window of such marks is taken at once as far as
    each string ends where the next head is; a window that does not fit is walked string by string.
    """
    ends = np.empty(count, np.int64)
    found = 0
    while found < count:
        window_end = min(at + _WINDOW_BYTES, len(view))
        chain = _chain(view[at:window_end])[: count - found]
        if len(chain):
            ends[found : found + len(chain)] = at + chain
            found, at = found + len(chain), at + int(chain[-1])
        if at > len(view):
            return ends[: found - 1]
        while found < count and at < window_end:
            if at + _HEAD_BYTES > len(view):
                return ends[:found]
            at += _HEAD_BYTES + _LENGTH.unpack_from(view, at)[0]
            if at > len(view):
                return ends[:found]
            ends[found] = at
            found += 1
        if at >= len(view) and found < count:
            return ends[:found]
    return ends


def _chain(window: memoryview) -> npt.NDArray[np.int64]:
    """The ends of the strings at the start of a window, as far as the marks of their heads agree."""
    data = np.frombuffer(window, np.uint8)
    if len(data) < _HEAD_BYTES:
        return np.empty(0, np.int64)
    zero = data == 0
    last = len(data) - _HEAD_BYTES + 1
    is_head = zero[1 : 1 + last].copy()
    for i in range(2, _HEAD_BYTES):
        is_head &= zero[i : i + last]
    heads = np.flatnonzero(is_head)
    if not len(heads) or heads[0] != 0:
        return np.empty(0, np.int64)
    ends = heads + _HEAD_BYTES + data[heads]
    agrees = ends[:-1] == heads[1:]
    return ends[: len(heads) if agrees.all() else int(agrees.argmin()) + 1]
