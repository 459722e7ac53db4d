"""GGUF and safetensors files written byte by byte, so that tests can write wrong ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

Value = tuple[int, object]  # a type id and what it holds; an array holds (element type, list)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def payload(kind: int, value: object) -> bytes:
    if kind == STRING:
        assert isinstance(value, str | bytes)
        return string(value)
    if kind == ARRAY:
        assert isinstance(value, tuple)
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(payload(inner, item) for item in items)
    return struct.pack("<" + _PACK[kind], value)


def key(name: str, kind: int, value: object) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload(kind, value)


def tensor_info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """dims: fastest first, as the file has them."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(
    keys: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_keys = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
