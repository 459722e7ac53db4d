"""What all tests share. Its presence puts this folder on the path, so that tests can import `fakes`."""

from __future__ import annotations

import os
import shutil

# Triton decides when it is imported whether its kernels are interpreted. Without a GPU there is no other way.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
