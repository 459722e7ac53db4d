"""Codes in words of 32 bits, as the safetensors dialects pack them: a stream of bits along one axis, lowest bit first.

A code of 3 bits may lie across two words; 32 of them fill three words exactly.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble k of a word holds output 8 j + AWQ_ORDER[k]
_AWQ_BACK = tuple(AWQ_ORDER.index(k) for k in range(8))


def pack_words(codes: Codes, bits: int) -> Words:
    """[n, k] codes -> [n, ceil(k * bits / 32)] words; bits that are left over are zero."""
    n, count = codes.shape
    width = -(-count * bits // 32)
    if bits == 8:
        stream = codes
    elif bits == 4:
        even = codes if count % 2 == 0 else np.pad(codes, ((0, 0), (0, 1)))
        stream = even[:, 0::2] | (even[:, 1::2] << np.uint8(4))
    else:
        each = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
        stream = np.packbits(each.reshape(n, -1), axis=1, bitorder="little")
    out = np.zeros((n, width * 4), np.uint8)
    out[:, : stream.shape[1]] = stream
    return out.view("<i4")


def unpack_words(words: Words, bits: int, count: int) -> Codes:
    """[n, words] -> [n, count] codes. Raises ValueError if there are too few words."""
    n, width = words.shape
    if count * bits > width * 32:
        raise ValueError(f"{width} words do not hold {count} codes of {bits} bits")
    stream = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        codes = stream
    elif bits == 4:
        codes = np.stack([stream & np.uint8(15), stream >> np.uint8(4)], axis=2).reshape(n, -1)
    else:
        each = np.unpackbits(stream, axis=1, count=count * bits, bitorder="little").reshape(n, count, bits)
        codes = np.packbits(each, axis=2, bitorder="little")[:, :, 0]
    return np.ascontiguousarray(codes[:, :count])


def unpack_padded(words: Words, bits: int, count: int) -> Codes:
    """As `unpack_words`, for files whose words hold 32 // bits codes each and never a part of one."""
    per_word = 32 // bits
    if count > words.shape[1] * per_word:
        raise ValueError(f"{words.shape[1]} words do not hold {count} codes, {per_word} in each")
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    wide = np.ascontiguousarray(words, "<i4").view("<u4")[:, :, None] >> shifts
    codes = (wide & np.uint32((1 << bits) - 1)).astype(np.uint8)
    return np.ascontiguousarray(codes.reshape(len(words), -1)[:, :count])


def pack_awq(codes: Codes) -> Words:
    """[n, k] codes of 4 bits -> [n, k / 8] words in AWQ's order."""
    n, count = codes.shape
    ordered = codes.reshape(n, count // 8, 8)[:, :, list(AWQ_ORDER)]
    return pack_words(np.ascontiguousarray(ordered).reshape(n, count), 4)


def unpack_awq(words: Words) -> Codes:
    """[n, words] -> [n, 8 * words] codes of 4 bits."""
    n, width = words.shape
    codes = unpack_words(words, 4, width * 8).reshape(n, width, 8)[:, :, list(_AWQ_BACK)]
    return np.ascontiguousarray(codes).reshape(n, -1)
