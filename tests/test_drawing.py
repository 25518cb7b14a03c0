"""Plots: well-formed, escaped, complete, and every point where it belongs."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from mscompile.pages.drawing import HEIGHT, WIDTH, Series, bars, lines, scatter

SVG = "{http://www.w3.org/2000/svg}"
TEXT = {"title": "Risk", "description": "Predicted against measured.", "x": "predicted", "y": "measured"}
HOSTILE = '</svg><script>alert("1")</script>&\'\x22'


def read(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314  # our own text


def discs(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_in_proportion(log: bool) -> None:
    values = [1.0, 10.0, 100.0] if log else [1.0, 2.0, 3.0]
    points = discs(read(scatter([Series("a", values, values)], **TEXT, log_x=log, log_y=log)))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert 0 < x0 < x2 < WIDTH
    assert 0 < y2 < y0 < HEIGHT


def test_the_identity_joins_equal_values() -> None:
    root = read(scatter([Series("a", [1.0, 4.0], [1.0, 4.0]), Series("b", [2.0], [9.0])], **TEXT, identity=True))
    diagonal = next(
        n.attrib for n in root.iter(f"{SVG}line") if n.attrib["x1"] != n.attrib["x2"] and n.attrib["y1"] != n.attrib["y2"]
    )
    x1, y1, x2, y2 = (float(diagonal[k]) for k in ("x1", "y1", "x2", "y2"))
    for x, y in discs(root)[1:]:  # the first is in the legend
        assert (y - y1) / (y2 - y1) == pytest.approx((x - x1) / (x2 - x1), abs=0.002)


def test_lines_follow_x_and_have_bands() -> None:
    series = Series("a", [3.0, 1.0, 2.0], [0.3, 0.1, 0.2], low=[0.2, 0.0, 0.1], high=[0.4, 0.2, 0.3])
    root = read(lines([series], **TEXT, rules=[0.95]))
    path = next(root.iter(f"{SVG}polyline")).attrib["points"].split()
    assert [float(p.split(",")[0]) for p in path] == sorted(float(p.split(",")[0]) for p in path)
    assert len(next(root.iter(f"{SVG}polygon")).attrib["points"].split()) == 6
    assert all(float(y) > 0 for p in path for y in p.split(","))


def test_bars_are_in_proportion() -> None:
    root = read(bars(["a", "b"], [10, 5], full=[20, 20], title="t", description="d", texts=["10 of 20", "5 of 20"]))
    widths = [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect")]
    assert widths[1] / widths[0] == pytest.approx(0.5, abs=0.01)
    assert widths[3] / widths[2] == pytest.approx(0.25, abs=0.01)
    assert "5 of 20" in [t.text for t in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("draw", [scatter, lines])
def test_what_cannot_be_drawn_is_counted(draw: Any) -> None:
    series = Series("a", [1.0, math.nan, 2.0, -1.0], [1.0, 1.0, math.inf, 2.0])
    root = read(draw([series], **TEXT, log_x=True))
    assert len(discs(root)) == 1
    assert "3 points are not drawn" in str(root.find(f"{SVG}desc").text)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "svg",
    [
        scatter(
            [Series(HOSTILE, [1.0], [2.0], labels=[HOSTILE]), Series(HOSTILE, [2.0], [2.0])],
            title=HOSTILE,
            description=HOSTILE,
            x=HOSTILE,
            y=HOSTILE,
        ),
        lines([], **TEXT, log_y=True),
        lines([Series("flat", [1.0, 2.0], [0.0, 0.0])], **TEXT),
        scatter([Series("wide", [1e-9, 1e9], [1e-30, 1e30])], **TEXT, log_x=True, log_y=True),
        bars([HOSTILE, "x" * 500, "ü"], [0.0, math.nan, 1e12], title=HOSTILE, description=HOSTILE),
        bars([], [], title="t", description="d"),
    ],
)
def test_any_input_gives_a_safe_picture(svg: str) -> None:
    root = read(svg)
    assert not list(root.iter(f"{SVG}script"))
    assert "style" not in svg  # content policies forbid inline styles
    labelled = root.attrib["aria-labelledby"].split()
    assert [root.find(f"{SVG}{tag}").attrib["id"] for tag in ("title", "desc")] == labelled  # type: ignore[union-attr]


def test_ticks_are_round_and_few() -> None:
    for high in (1e-4, 0.3, 7, 95, 1234, 3e7):
        root = read(scatter([Series("a", [0.0, high], [0.0, high])], **TEXT))
        shown = [t.text or "" for t in root.iter(f"{SVG}text")]
        numbers = [t for t in shown if t[:1].isdigit()]
        assert 4 <= len(numbers) <= 16
        assert all(len(t) <= 9 for t in numbers), numbers


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(1.0, 16.0, ["1", "2", "5", "10"]), (0.4, 0.95, ["0.4", "0.6", "0.8", "1"])],
)
def test_a_logarithmic_axis_has_more_than_two_ticks(low: float, high: float, shown: list[str]) -> None:
    root = read(lines([Series("a", [low, high], [0.0, 0.0])], **TEXT, log_x=True))
    assert [
        t.text for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "middle" and (t.text or "")[0].isdigit()
    ] == shown


def test_counts_are_marked_by_whole_numbers() -> None:
    root = read(lines([Series("a", [1, 2], [0.1, 0.2])], **TEXT))
    assert [t.text for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "middle"] == [
        "1",
        "2",
        "predicted",
        "measured",
    ]


def test_bars_of_one_group_are_joined_by_lines_that_do_not_meet():
    drawn = bars(
        ["a", "b", "c", "d"], [1, 2, 3, 4], groups=[0, 1, 0, 1], title="Sites", description="Two pairs that overlap."
    )
    lines_of = [line for line in read(drawn).iter() if line.tag.endswith("line")]
    upright = [line for line in lines_of if line.get("x1") == line.get("x2")]
    assert len(upright) == 2
    assert len({line.get("x1") for line in upright}) == 2
    assert len(lines_of) == 2 + 4
