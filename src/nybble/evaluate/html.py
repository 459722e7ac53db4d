"""A report as one HTML page that needs nothing from anywhere: table, picture, and what the figures mean."""

from __future__ import annotations

from html import escape

from nybble import __version__
from nybble.evaluate.pareto import draw
from nybble.evaluate.picture import to_svg
from nybble.evaluate.report import Report
from nybble.evaluate.table import Cell, cells, columns

STYLE = """
:root{color-scheme:light dark;--line:#ddd;--soft:#666}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
small{display:block;color:var(--soft);font-size:.78em}
svg{width:100%;height:auto;background:#fff;border-radius:6px;margin:1rem 0}
p,dl{max-width:50rem}dt{font-weight:600}dd{margin:0 0 .5rem 0}
@media(prefers-color-scheme:dark){:root{--line:#444;--soft:#aaa}}
"""

MEANINGS = (
    ("bits", "Bits per weight over all tensors, and over the matrices of the layers alone; scales included."),
    ("perplexity", "exp of the mean negative log-likelihood of the scored tokens."),
    ("KL", "KL(reference || model) per scored token in nats, from whole rows of logits in 64-bit arithmetic."),
    ("same top", "Share of scored tokens where model and reference find the same token likeliest."),
    (
        "flips",
        "Share of scored tokens where exactly one of the two finds the token that follows likeliest. Lost: reference "
        "right and model wrong. Won: the other way round.",
    ),
)


def to_html(report: Report) -> str:
    """The page."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns(report))
    body = "\n".join(f"<tr>{''.join(map(cell_html, row))}</tr>" for row in cells(report))
    picture = to_svg(draw(report)) if len(report.models) > 1 else ""
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in MEANINGS)
    caption = "" if not picture else (
        "<p>Lines up and down are confidence intervals; the orange ones are the Pareto front: no model is both smaller "
        "and better. Point at a dot for its name.</p>"
    )  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>nybble eval: {escape(report.conditions.text)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>What it cost</h1>
<p>{escape(report.conditions.sentence())}</p>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{picture}
{caption}
<h2>What the figures mean</h2>
<dl>{meanings}</dl>
<p>nybble {escape(__version__)}. The text's SHA-256 is {report.conditions.text_sha256}.</p>
</body>
</html>
"""


def cell_html(cell: Cell) -> str:
    """One cell of a table's body."""
    below = f"<small>{escape(cell.interval)}</small>" if cell.interval else ""
    return f"<td>{escape(cell.value)}{below}</td>"
