"""The Pareto picture, the page and the table, from made-up reports."""

from __future__ import annotations

import html.parser
import io
import math
import re
import struct
import xml.etree.ElementTree as ET

import pytest

from nybble.evaluate.bootstrap import Estimate
from nybble.evaluate.html import to_html
from nybble.evaluate.pareto import HEIGHT, WIDTH, Dot, Line, Point, Text, draw, front
from nybble.evaluate.picture import to_png, to_svg
from nybble.evaluate.report import Conditions, Report, Result
from nybble.evaluate.scores import Loss, Quality
from nybble.evaluate.table import cells, columns, significant

pytestmark = pytest.mark.unit


def estimate(value: float, spread: float = 0.1) -> Estimate:
    return Estimate(value, value * (1 - spread), value * (1 + spread))


def result(name: str, megabytes: float, kl: float | None) -> Result:
    share = estimate(0.05)
    loss = None
    if kl is not None:
        loss = Loss(estimate(kl), estimate(kl / 2), estimate(kl * 9), estimate(0.9), share, share, share, estimate(1.1))
    return Result(name, int(megabytes * 1e6), 4.5, 4.25, Quality(estimate(14.65), share), loss, (), ())


def report(*models: Result, reference: bool = True) -> Report:
    conditions = Conditions("a <b>.txt", "0" * 64, 512, 257, 16, 4080, True, 32, "int8")
    return Report(conditions, result("ref & co", 270, None) if reference else None, models)


SIX = tuple(result(f"m{i}<{i}>", size, kl) for i, (size, kl) in enumerate(
    [(80, 0.9), (90, 0.3), (91, 0.31), (100, 0.05), (140, 0.001), (140.2, 0.002)]
))  # fmt: skip


def test_the_front_has_what_nothing_beats() -> None:
    found = [
        Point(str(i), size, value, 0, 0) for i, (size, value) in enumerate([(3, 1), (1, 5), (2, 6), (2, 4), (3, 2)])
    ]
    assert [point.name for point in front(found)] == ["1", "3", "0"]


def test_everything_is_inside_the_picture() -> None:
    shapes = draw(report(*SIX))
    dots = [shape for shape in shapes if isinstance(shape, Dot)]
    assert [dot.role for dot in dots] == ["best", "best", "point", "best", "best", "point"]
    assert dots[3].x < dots[4].x and dots[3].y < dots[4].y  # bigger is right, worse is up
    for shape in shapes:
        places = [(shape.x1, shape.y1), (shape.x2, shape.y2)] if isinstance(shape, Line) else [(shape.x, shape.y)]
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    named = {shape.text for shape in shapes if isinstance(shape, Text)}
    assert {model.name for model in SIX} <= named


def test_names_do_not_hide_each_other() -> None:
    crowd = report(*(result(f"a long name, number {i}", 100 + i / 100, 0.1 + i / 1000) for i in range(40)))
    texts = [shape for shape in draw(crowd) if isinstance(shape, Text) and shape.text.startswith("a long")]
    assert 4 <= len(texts) < 40
    assert len({(text.x, text.y) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    "models",
    [
        (result("one", 5, 0.0), result("other", 5, 0.0)),  # nothing lost, one size
        (result("one", 5, 0.0), result("other", 7, 0.3)),
        (result("tiny", 1e-3, 1e-9), result("huge", 1e6, 30.0)),
    ],
)
def test_odd_values_can_be_drawn(models: tuple[Result, ...]) -> None:
    for shape in draw(report(*models)):
        places = (shape.x1, shape.y1, shape.x2, shape.y2) if isinstance(shape, Line) else (shape.x, shape.y)
        assert all(map(math.isfinite, places))


def test_svg_is_well_formed_and_escaped() -> None:
    root = ET.fromstring(to_svg(draw(report(*SIX))))
    assert root.tag.endswith("svg")
    titles = [one.text for one in root.iter() if one.tag.endswith("title")]
    assert titles[0] == "m0<0>: 80.0 MB, 0.9"


def test_the_page_needs_nothing_and_hides_nothing() -> None:
    page = to_html(report(*SIX))
    html.parser.HTMLParser().feed(page)
    assert "<script" not in page
    assert "@import" not in page and "url(" not in page
    assert set(re.findall(r'(?:href|src|xmlns)="([^"]*)"', page)) == {"http://www.w3.org/2000/svg"}
    for wanted in ("ref &amp; co (reference)", "m0&lt;0&gt;", "0.900", "0.810 to 0.990", "a &lt;b&gt;.txt", "<svg"):
        assert wanted in page
    assert "<svg" not in to_html(report(SIX[0]))  # one model has nothing to stand beside


def test_the_png_has_the_size_of_the_picture_twice() -> None:
    data = to_png(draw(report(*SIX)))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (2 * WIDTH, 2 * HEIGHT)
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(data))
    assert len(image.getcolors(1 << 24)) > 50  # smoothed text and lines


def test_the_table_without_a_reference_has_no_empty_columns() -> None:
    alone = report(result("one", 5, None), reference=False)
    assert len(columns(alone)) == len(cells(alone)[0]) == 5
    full = report(*SIX)
    assert {len(row) for row in cells(full)} == {len(columns(full))}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (14.6543, "14.65"),
        (0.00123456, "0.001235"),
        (1.5e-7, "1.5e-07"),
        (123456.7, "123457"),
        (0.5, "0.5000"),
    ],
)
def test_figures_can_be_compared_at_a_glance(value: float, text: str) -> None:
    assert significant(value) == text
