"""What long work shows on standard error: a bar with the time left on a terminal, plain sentences elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Bar:
    """A `nybble.compress.methods.Progress`. Use it in a `with` block, which ends the bar's line."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._notes: set[str] = set()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int) -> None:
        """The bar appears, in place of the one before; without a terminal there is none."""
        if not self._console.is_terminal:
            return
        if self._bar is not None:
            self._bar.stop()
        columns = (TaskProgressColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("", total=max(total, 1))
        self._bar.start()

    def advance(self, weights: int, what: str) -> None:
        """So many weights more are done, the last ones of `what`."""
        if self._bar is not None:
            self._bar.update(self._task, advance=weights, description=escape(what))

    def note(self, message: str) -> None:
        """A sentence that stays, once."""
        if message not in self._notes:
            self._notes.add(message)
            self._console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
