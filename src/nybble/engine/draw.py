"""Drawing the tokens of a step, so that a row from which nothing can be drawn fails its own request only."""

from __future__ import annotations

from collections.abc import Callable

from nybble.backends.cpu import BadLogitsError, Sampled, SampleRow
from nybble.engine.model import EngineModel, Logits
from nybble.engine.request import Request, Sequence

Fail = Callable[[Request, Exception], None]
Row = tuple[int, Sequence, SampleRow]  # the first is its row of logits


class Drawer:
    """Draws, and reports what fails."""

    def __init__(self, model: EngineModel, fail: Fail) -> None:
        self._model = model
        self._fail = fail

    def draw(self, logits: Logits, places: list[tuple[int, Sequence]]) -> list[tuple[int, Sequence, Sampled]]:
        """One token for each sequence that has not ended, from its row of logits."""
        rows: list[Row] = []
        for index, sequence in places:
            if sequence.finish_reason is not None:
                continue
            try:
                rows.append((index, sequence, sequence.request.rules.row(sequence)))
            except Exception as error:  # its grammar, for example
                self._fail(sequence.request, error)
        return self._sample(logits, rows)

    def _sample(self, logits: Logits, rows: list[Row]) -> list[tuple[int, Sequence, Sampled]]:
        rows = [row for row in rows if row[1].finish_reason is None]  # another sample of a request may have failed
        while rows:
            chosen = logits if len(rows) == len(logits) else logits[[index for index, _, _ in rows]]
            try:
                drawn = self._model.sample(chosen, [row for _, _, row in rows])
                return [(index, sequence, one) for (index, sequence, _), one in zip(rows, drawn, strict=True)]
            except Exception as error:
                bad = set(error.rows) if isinstance(error, BadLogitsError) else set()
                if not bad and len(rows) > 1:  # it does not say which: each row shows whether it is the one
                    return [drawn_one for row in rows for drawn_one in self._sample(logits, [row])]
                for at in bad or {0}:
                    self._fail(rows[at][1].request, error)
                rows = [row for row in rows if row[1].finish_reason is None]
        return []
