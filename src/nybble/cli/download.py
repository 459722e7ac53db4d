"""What a download shows on standard error: a bar with rate and time left on a terminal, plain sentences elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from nybble.store import PullProgress

if TYPE_CHECKING:
    from rich.progress import Progress

_QUIET = ("writing manifest", "success")


class DownloadBar:
    """Use it in a `with` block, which ends the bar's line."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._said = ""

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def tell(self, progress: PullProgress) -> None:
        """Show how far it is."""
        if progress.total is not None and sys.stderr.isatty():
            self._advance(progress)
            return
        self._stop()
        if progress.status != self._said and progress.status not in _QUIET:
            self._said = progress.status
            size = "" if progress.total is None else f" ({progress.total / 1e6:.0f} MB)"
            print(progress.status + size, file=sys.stderr, flush=True)

    def _advance(self, progress: PullProgress) -> None:
        if self._bar is None:
            self._bar = _bar()
            self._bar.add_task("", total=progress.total, completed=progress.completed or 0)
            self._bar.start()
        (task,) = self._bar.task_ids
        self._bar.update(task, description=progress.status, total=progress.total, completed=progress.completed)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True))
