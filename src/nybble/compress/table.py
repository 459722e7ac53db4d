"""Brings every pass into the registry of TYPEs: import this, then ask `nybble.compress.methods`."""

from __future__ import annotations

__all__: list[str] = []
