"""Plots as inline SVG text: no script, no style sheet, no dependency.

They are drawn for a phone: 440 units wide with type of 13, so that they stay readable at 360 pixels. Text and axes take the
page's own colour (``currentColor``), series take colours that stand out on light and on dark, and differ in shape, too.
Everything that comes from outside is escaped. Points that cannot be drawn are left out and counted in the description.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 48
"""Margins around the area of the axes."""
LEGEND = 20
"""Height of a line of the legend."""
TYPE = 13
TRACK = 9
"""Width of a line that joins bars of a group."""
GLYPH = 7.2
"""Mean width of a character, of type 13; names are cut to what fits."""
COLOURS = ("#2f7fc1", "#d1701f", "#1f9a74", "#b3589c", "#8a7d1c", "#7a6fd0")
DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 4", "12 4")


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes
    ----------
    name
        For the legend, which is drawn where there are several.
    x, y
        Coordinates.
    low, high
        Ends of a band around `y`, or None.
    labels
        Per point, shown where the pointer rests; or empty.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    labels: Sequence[str] = field(default=())


@dataclass(frozen=True)
class _Axis:
    """One axis: values between `low` and `high` lie between the pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self) -> list[float]:
        return _decades(self.low, self.high) if self.log else _steps(self.low, self.high)


def scatter(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    identity: bool = False,
) -> str:
    """Points; with `identity`, both axes span the same values and the line y = x is drawn."""
    return _plot(series, title, description, (x, y), (log_x, log_y), identity, _points)


def lines(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    rules: Sequence[float] = (),
) -> str:
    """Points joined in order of x, with the band of each series that has one; `rules` are levels of y, drawn across."""
    return _plot(series, title, description, (x, y), (log_x, log_y), False, _joined, rules)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    description: str,
    full: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
) -> str:
    """Horizontal bars from 0, one line each, with the value as text; `full` draws what each could be at most behind it.

    Bars of one group are joined by a line on the left.
    """
    whole = list(full) if full is not None else []
    most = max((v for v in (*values, *whole) if math.isfinite(v)), default=0.0) or 1.0
    texts = texts if texts is not None else [_number(value) for value in values]
    row, tracks = 40, _tracks(groups or ())
    left = 6 + TRACK * len(tracks)
    room = WIDTH - 6 - left
    parts = []
    for number, members in ((n, m) for n, track in enumerate(tracks) for m in track):
        x, ys = 6 + TRACK * (len(tracks) - 1 - number), [i * row + 25.5 for i in members]
        parts.append(_line(x, ys[0], x, ys[-1], 'stroke-width="1.5"'))
        parts += [_line(x, y, left, y, 'stroke-width="1.5"') for y in ys]
    for i, (name, value, text) in enumerate(zip(names, values, texts, strict=True)):
        at = i * row
        label = _cut(name, room - len(text) * GLYPH - 12)
        parts.append(f'<text x="{left}" y="{at + 15}">{label}<title>{escape(name)}</title></text>')
        parts.append(f'<text x="{WIDTH - 6}" y="{at + 15}" text-anchor="end">{escape(text)}</text>')
        back = whole[i] if whole else most
        lengths = ((back, "currentColor", 0.15), (value, COLOURS[0], 1))
        for length, colour, opacity in lengths:
            if math.isfinite(length) and length > 0:
                size = f'x="{left}" y="{at + 21}" width="{room * length / most:.1f}" height="9"'
                parts.append(f'<rect {size} rx="2" fill="{colour}" fill-opacity="{opacity}"/>')
    return _document(parts, title, description, row * max(len(names), 1) + 4)


def _tracks(groups: Sequence[int]) -> list[list[list[int]]]:
    """Groups of several bars, side by side: those of one track do not overlap, so that their lines do not meet."""
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    tracks: list[list[list[int]]] = []
    for found in sorted((m for m in members.values() if len(m) > 1), key=lambda m: m[-1] - m[0]):
        free = next((t for t in tracks if all(found[-1] < m[0] or m[-1] < found[0] for m in t)), None)
        if free is None:
            tracks.append([found])
        else:
            free.append(found)
    return tracks


# --- axes -------------------------------------------------------------------------------------------------------------

_Mark = Callable[[Series, int, _Axis, _Axis], Iterator[str]]


def _plot(
    series: Sequence[Series],
    title: str,
    description: str,
    names: tuple[str, str],
    log: tuple[bool, bool],
    identity: bool,
    mark: _Mark,
    rules: Sequence[float] = (),
) -> str:
    legend = LEGEND * len(series) if len(series) > 1 else 0
    top, floor = TOP + legend, HEIGHT + legend - BOTTOM
    spans = [_span([v for s in series for v in s.x], log[0]), _span([*_heights(series), *rules], log[1])]
    if identity:
        spans = [(min(low for low, _ in spans), max(high for _, high in spans))] * 2
    across, up = _Axis(*spans[0], LEFT, WIDTH - RIGHT, log[0]), _Axis(*spans[1], floor, top, log[1])
    whole = all(v == round(v) for s in series for v in s.x if math.isfinite(v))  # counts are not marked in between
    parts = [*_legend(series), *_grid(across, up, names, whole=whole)]
    if identity:
        low, high = spans[0]
        parts.append(_line(across(low), up(low), across(high), up(high), 'stroke-dasharray="4 4" stroke-opacity="0.6"'))
    parts += [_line(LEFT, up(r), WIDTH - RIGHT, up(r), 'stroke-dasharray="4 4" stroke-opacity="0.7"') for r in rules]
    for number, entry in enumerate(series):
        parts += mark(entry, number, across, up)
    missing = sum(not (across.shows(a) and up.shows(b)) for s in series for a, b in zip(s.x, s.y, strict=True))
    note = f" {missing} points are not drawn: they are not finite, or not positive on a logarithmic axis." if missing else ""
    return _document(parts, title, description + note, HEIGHT + legend)


def _heights(series: Sequence[Series]) -> Iterator[float]:
    for entry in series:
        yield from entry.y
        yield from () if entry.low is None else entry.low
        yield from () if entry.high is None else entry.high


def _span(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Ends of an axis, a little beyond the values."""
    seen = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not seen:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(seen), max(seen)
    if log:
        margin = max((high / low) ** 0.06, 1.1)
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _steps(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 · 10ᵏ, at most seven."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, thinned to at most seven; multiples of them, or even steps, where those are less than three."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 7))
    for factors in ((1,), (1, 2, 5)):
        ticks = [m * 10.0**k for k in range(first, last + 1, stride) for m in factors]
        shown = [t for t in ticks if low <= t <= high]
        if len(shown) > 2:
            return shown
    return _steps(low, high)


def _grid(across: _Axis, up: _Axis, names: tuple[str, str], *, whole: bool) -> Iterator[str]:
    for value in up.ticks():
        yield _line(LEFT, up(value), WIDTH - RIGHT, up(value), 'stroke-opacity="0.15"')
        yield f'<text x="{LEFT - 7}" y="{up(value) + 4:.1f}" text-anchor="end">{_number(value)}</text>'
    shown = [t for t in across.ticks() if not whole or t == round(t)]
    while len(shown) > 1 and sum(len(_number(v)) + 2 for v in shown) * GLYPH > WIDTH - LEFT:
        shown = shown[::2]
    for value in shown:
        yield _line(across(value), up.start, across(value), up.start + 5, "")
        yield f'<text x="{across(value):.1f}" y="{up.start + 19}" text-anchor="middle">{_number(value)}</text>'
    yield _line(LEFT, up.start, WIDTH - RIGHT, up.start, 'stroke-opacity="0.6"')
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle}" y="{up.start + 40}" text-anchor="middle">{_cut(names[0], WIDTH - LEFT)}</text>'
    half = (up.start + up.end) / 2
    turned = f'transform="rotate(-90 13 {half})" text-anchor="middle"'
    yield f'<text x="13" y="{half}" {turned}>{_cut(names[1], up.start - up.end)}</text>'


def _legend(series: Sequence[Series]) -> Iterator[str]:
    if len(series) < 2:
        return
    for number, entry in enumerate(series):
        at = 12 + LEGEND * number
        yield _marker(LEFT + 8, at - 4, number)
        yield f'<text x="{LEFT + 22}" y="{at}">{_cut(entry.name, WIDTH - LEFT - 30)}</text>'


# --- marks ------------------------------------------------------------------------------------------------------------


def _points(series: Series, number: int, across: _Axis, up: _Axis) -> Iterator[str]:
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if across.shows(x) and up.shows(y):
            yield _marker(across(x), up(y), number, series.labels[i] if len(series.labels) else "")


def _joined(series: Series, number: int, across: _Axis, up: _Axis) -> Iterator[str]:
    colour = COLOURS[number % len(COLOURS)]
    order = sorted((i for i, x in enumerate(series.x) if across.shows(x)), key=lambda i: series.x[i])
    if series.low is not None and series.high is not None:
        low, high = series.low, series.high
        inside = [i for i in order if up.shows(low[i]) and up.shows(high[i])]
        edge = [(series.x[i], high[i]) for i in inside] + [(series.x[i], low[i]) for i in reversed(inside)]
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in edge)
        yield f'<polygon points="{path}" fill="{colour}" fill-opacity="0.18"/>'
    path = " ".join(f"{across(series.x[i]):.1f},{up(series.y[i]):.1f}" for i in order if up.shows(series.y[i]))
    dash = DASHES[number % len(DASHES)]
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash or "none"}"/>'
    yield from _points(series, number, across, up)


def _marker(x: float, y: float, number: int, label: str = "") -> str:
    """A disc, square, diamond or triangle, by series."""
    fill = f'fill="{COLOURS[number % len(COLOURS)]}" fill-opacity="0.85"'
    inside = f"<title>{escape(label)}</title>" if label else ""
    shape = number % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" {fill}>{inside}</circle>'
    offsets = (
        ((-3.3, -3.3), (3.3, -3.3), (3.3, 3.3), (-3.3, 3.3)),
        ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
        ((0, -4.4), (4.2, 3.4), (-4.2, 3.4)),
    )[shape - 1]
    path = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in offsets)
    return f'<polygon points="{path}" {fill}>{inside}</polygon>'


def _line(x1: float, y1: float, x2: float, y2: float, more: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" {more}/>'


# --- text -------------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """A number of at most three digits, without the noise of binary fractions."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if 1e-3 <= size < 1e5:
        return f"{round(value):,}" if size >= 1000 else f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _cut(text: str, width: float) -> str:
    """Text that fits `width`, escaped; its middle left out where it is too long."""
    most = max(int(width / GLYPH), 3)
    if len(text) > most:
        half = (most - 1) // 2
        text = f"{text[: most - 1 - half]}…{text[len(text) - half :]}"
    return escape(text)


def _document(parts: Sequence[str], title: str, description: str, height: float) -> str:
    body = "\n".join(parts)
    name = "plot-" + hashlib.sha256(f"{title}{description}{body}".encode("utf-8", "replace")).hexdigest()[:12]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{name}-t {name}-d" '
        f'viewBox="0 0 {WIDTH} {height:g}" width="100%" font-family="system-ui, sans-serif" font-size="{TYPE}" '
        f'fill="currentColor">\n<title id="{name}-t">{escape(title)}</title>\n'
        f'<desc id="{name}-d">{escape(description)}</desc>\n{body}\n</svg>\n'
    )
