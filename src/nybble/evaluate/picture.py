"""Shapes as SVG, which needs nothing, and as PNG, which needs Pillow (the extra `plot`): one picture in both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from nybble.core.errors import ConfigError
from nybble.evaluate.pareto import FONT, HEIGHT, WIDTH, Dot, Line, Role, Shape, Text

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

_INK: dict[Role, str] = {
    "grid": "#e3e3e3", "axis": "#555555", "front": "#d2691e", "whisker": "#8aa4c4", "point": "#4a6d9c",
    "best": "#d2691e",
}  # fmt: skip
_TEXT = "#333333"
_WIDTHS: dict[Role, float] = {"grid": 1, "axis": 1, "front": 1.5, "whisker": 1.5, "point": 0, "best": 0}
_RADIUS = 4
_SCALE = 2  # pixels of the PNG per pixel of the picture
_SMOOTH = 2  # it is drawn so much larger and then made smaller, which smooths its edges


def to_svg(shapes: Sequence[Shape]) -> str:
    """An `<svg>` element that needs nothing from outside. Its colours are classes, so that a page can change them."""
    style = "".join(f".{role}{{stroke:{ink};fill:{ink};stroke-width:{_WIDTHS[role]:g}}}" for role, ink in _INK.items())
    parts = [_svg_shape(shape) for shape in shapes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="{FONT}"><style>{style}.label{{fill:{_TEXT}}}</style>\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _svg_shape(shape: Shape) -> str:
    if isinstance(shape, Line):
        ends = f'x1="{shape.x1:.1f}" y1="{shape.y1:.1f}" x2="{shape.x2:.1f}" y2="{shape.y2:.1f}"'
        return f'<line class="{shape.role}" {ends}/>'
    if isinstance(shape, Dot):
        title = f"<title>{escape(shape.title)}</title>"
        return f'<circle class="{shape.role}" cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{_RADIUS}">{title}</circle>'
    turn = f' transform="rotate(-90 {shape.x:.1f} {shape.y:.1f})"' if shape.upwards else ""
    place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}"'
    return f'<text class="label" {place}{turn}>{escape(shape.text)}</text>'


def check_pillow() -> None:
    """Raises ConfigError if there is no Pillow to draw a PNG with."""
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "a PNG needs Pillow: pip install 'nybble[plot]', or take --html, which needs nothing"
        ) from None


def to_png(shapes: Sequence[Shape]) -> bytes:
    """The picture as a PNG file. Raises ConfigError if there is no Pillow."""
    check_pillow()
    from PIL import Image, ImageDraw, ImageFont

    factor = _SCALE * _SMOOTH
    image = Image.new("RGB", (WIDTH * factor, HEIGHT * factor), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT * factor)
    for shape in shapes:
        if isinstance(shape, Line):
            ends = [value * factor for value in (shape.x1, shape.y1, shape.x2, shape.y2)]
            pen.line(ends, fill=_INK[shape.role], width=round(_WIDTHS[shape.role] * factor))
        elif isinstance(shape, Dot):
            corners = [
                value * factor for value in (shape.x - _RADIUS, shape.y - _RADIUS, shape.x + _RADIUS, shape.y + _RADIUS)
            ]
            pen.ellipse(corners, fill=_INK[shape.role])
        else:
            _write(image, pen, font, shape, factor)
    out = io.BytesIO()
    image.resize((WIDTH * _SCALE, HEIGHT * _SCALE), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    return out.getvalue()


def _write(
    image: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    shape: Text,
    factor: int,
) -> None:
    from PIL import Image, ImageDraw

    x, y, length = shape.x * factor, shape.y * factor, pen.textlength(shape.text, font=font)
    if not shape.upwards:
        left = x - {"start": 0.0, "middle": length / 2, "end": length}[shape.anchor]
        pen.text((left, y), shape.text, fill=_TEXT, font=font, anchor="ls")
        return
    line = Image.new("L", (round(length) + 1, 2 * FONT * factor), 0)
    base = round(1.5 * FONT * factor)
    ImageDraw.Draw(line).text((0, base), shape.text, fill=255, font=font, anchor="ls")
    turned = line.rotate(90, expand=True)
    corner = (round(x) - base, round(y - length / 2))
    image.paste(Image.new("RGB", turned.size, _TEXT), corner, turned)
