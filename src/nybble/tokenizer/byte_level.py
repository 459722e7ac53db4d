"""The byte alphabet of GPT-2's byte-level BPE: every byte is written as one printable character."""

from __future__ import annotations

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]
BYTE_OF_CHAR: dict[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(_OTHERS)
}


def to_bytes(piece: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary. A character outside the alphabet stands for itself."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in piece])
    except KeyError:
        return piece.encode("utf-8", "replace")
