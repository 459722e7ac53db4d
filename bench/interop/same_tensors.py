#!/usr/bin/env python3
"""Whether two folders hold the same tensors: names, types and bytes.

python bench/interop/same_tensors.py FOLDER OTHER_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from nybble.formats.safetensors import read_folder


def tensors(folder: str) -> dict[str, tuple[str, bytes]]:
    found, _ = read_folder(Path(folder))
    return {name: (t.format.name, bytes(t.file.view[t.begin : t.end])) for name, t in found.items()}


def main() -> None:
    one, other = (tensors(folder) for folder in sys.argv[1:3])
    different = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    print(f"{len(different)} of {len(one.keys() | other.keys())} tensors differ {different[:4]}")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
