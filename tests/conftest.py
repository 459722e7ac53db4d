"""What all tests share. Its presence puts this folder on the path, so that tests can import `fakes`."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from nybble.backends import device as devices

# Triton decides when it is imported whether its kernels are interpreted. Without a GPU there is no other way.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Started in the background, as by `nohup`, the suite would pass on to its programs that they ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU `device="auto"` would take it: only tests that are for a GPU see one."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(devices, "_driver_is_there", lambda: False)
