"""One report about a recipe: a page that needs nothing from anywhere, the same as JSON, and the logs of training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from nybble import __version__
from nybble.compress.recipe.curve import draw_curve, read_curve
from nybble.compress.recipe.measure import Measured
from nybble.compress.stage import StageResult
from nybble.evaluate.html import MEANINGS, STYLE, cell_html
from nybble.evaluate.pareto import draw
from nybble.evaluate.picture import to_svg
from nybble.evaluate.speed import DECODE_PROMPT_TOKENS, Spread
from nybble.evaluate.table import Cell, cells, columns
from nybble.formats.output import OutputFile
from nybble.formats.safetensors_writer import write_json


@dataclass(frozen=True, slots=True)
class StageEntry:
    """A stage that has run. options: those that were given."""

    kind: str
    options: Mapping[str, object]
    result: StageResult
    seconds: float


@dataclass(frozen=True, slots=True)
class CompressReport:
    """recipe, source, target: their names. measured: the source, then what each stage wrote."""

    recipe: str
    source: str
    target: str
    stages: tuple[StageEntry, ...]
    measured: Measured

    def names(self) -> list[str]:
        """Of the models, for people."""
        return [f"{self.source} (before)", *(f"after {i}. {one.kind}" for i, one in enumerate(self.stages, 1))]

    def to_json(self) -> dict[str, Any]:
        """Data for `json.dumps`."""
        measured = self.measured
        models = []
        for index, name in enumerate(self.names()):
            row: dict[str, Any] = {
                "name": name,
                "parameters": measured.parameters[index],
                "zeros": measured.zeros[index],
                "bytes": measured.quality.rows[index].bytes,
            }
            if measured.speeds:
                speed = measured.speeds[index]
                row |= {"prompt_tok_s": asdict(speed.prompt), "decode_tok_s": asdict(speed.decode)}
            models.append(row)
        stages = [
            {
                "stage": one.kind,
                "options": dict(one.options),
                "seconds": one.seconds,
                "figures": dict(one.result.figures),
                "notes": list(one.result.notes),
                "log": None if one.result.log is None else _log_name(index, one),
            }
            for index, one in enumerate(self.stages, 1)
        ]
        found = {
            "recipe": self.recipe,
            "source": self.source,
            "target": self.target,
            "models": models,
            "stages": stages,
            "quality": measured.quality.to_json(),
            "threads": measured.threads,
            "version": __version__,
        }
        return dict(_plain(found))

    def table(self) -> tuple[list[str], list[list[Cell]]]:
        """Names of columns, and a row for each model."""
        measured, quality = self.measured, self.measured.quality
        head = ["model", "M parameters", "zeros", *columns(quality)[1:]]
        rows = []
        for index, (name, row) in enumerate(zip(self.names(), cells(quality), strict=True)):
            zeros = measured.zeros[index]
            count = Cell(f"{measured.parameters[index] / 1e6:.1f}")
            rows.append([Cell(name), count, Cell(f"{zeros:.0%}" if zeros >= 0.005 else ""), *row[1:]])
        if measured.speeds:
            head += ["prompt tok/s", "decode tok/s"]
            for row, speed in zip(rows, measured.speeds, strict=True):
                row += [_speed(speed.prompt), _speed(speed.decode)]
        return head, rows


def _speed(spread: Spread) -> Cell:
    return Cell(f"{spread.median:.1f}", f"{spread.min:.1f} to {spread.max:.1f}")


def _log_name(number: int, entry: StageEntry) -> str:
    return f"{number}-{entry.kind}.jsonl"


def write_report(report: CompressReport, folder: Path) -> Path:
    """report.html, report.json and the logs, in a folder that is made anew. Raises OutputError."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for number, entry in enumerate(report.stages, 1):
        if entry.result.log is not None and entry.result.log.is_file():
            shutil.copyfile(entry.result.log, folder / _log_name(number, entry))
    write_json(folder / "report.json", report.to_json())
    with OutputFile(folder / "report.html", force=True) as file:
        file.write(to_html(report).encode())
    return folder


def to_html(report: CompressReport) -> str:
    """The page."""
    names, rows = report.table()
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join(f"<tr>{''.join(map(cell_html, row))}</tr>" for row in rows)
    quality = report.measured.quality
    picture = to_svg(draw(quality)) if len(quality.models) > 1 else ""
    caption = "<p>Size against loss. Lines up and down are confidence intervals.</p>" if picture else ""
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in MEANINGS)
    stages = "\n".join(_stage(number, entry) for number, entry in enumerate(report.stages, 1))
    speed = ""
    if report.measured.speeds:
        speed = (
            f"Tokens per second on this machine with {report.measured.threads} threads, one stream, decoding after "
            f"{DECODE_PROMPT_TOKENS} tokens: medians, with the slowest and the fastest run."
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>nybble compress: {escape(report.target)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(report.target)}, made of {escape(report.source)} by {escape(report.recipe)}</h1>
<p>{escape(quality.conditions.sentence())} {escape(speed)}</p>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{picture}
{caption}
<h2>Stages</h2>
{stages}
<h2>What the figures mean</h2>
<dl>{meanings}<dt>zeros</dt><dd>Share of the weights of the layers' matrices that are zero.</dd></dl>
<p>nybble {escape(__version__)}. The text's SHA-256 is {quality.conditions.text_sha256}.</p>
</body>
</html>
"""


def _stage(number: int, entry: StageEntry) -> str:
    options = ", ".join(f"{name} {value}" for name, value in entry.options.items()) or "as by default"
    figures = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd>"
        for name, value in entry.result.figures.items()
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in entry.result.notes)
    curve = ""
    if entry.result.log is not None:
        points = read_curve(entry.result.log)
        curve = to_svg(draw_curve(points)) if len(points) > 1 else ""
    return (
        f"<h3>{number}. {escape(entry.kind)}</h3><p>{escape(options)}; {entry.seconds:.0f} s</p>{notes}"
        f"<dl>{figures}</dl>{curve}"
    )


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """What JSON has: no infinities, no paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str) or value is None else str(value)
