"""Charts as inline SVG: bars, histograms and curves. `maps.py` has the top-down map.

Every chart is drawn 360 units wide, the width of a phone, so that its text stays readable there; a page lays several
side by side where there is room. Colours are the classes `s0` to `s7` and `ink` of the page's style, in both themes.
Legends are HTML under the drawing, so that long names wrap. Each mark has a <title> with its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mllm4d_jax.report.page import Markup, tag

WIDTH = 360.0
MOST = 1e300  # nothing that is drawn is larger: sums and differences stay finite
COLOURS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 22.0, 36.0
_HEIGHT = 220.0
_MAX_LINE_POINTS = 800
_BINS = 24  # of a histogram
_DASHES = (None, "6 3", "2 3")

Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def drawable(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return values f64[N] that can be added and scaled: finite ones beyond `MOST` become it."""
    given = np.asarray(values, np.float64)
    return np.where(np.isfinite(given), np.clip(given, -MOST, MOST), given)


def series_look(index: int) -> tuple[str, str | None]:
    """Class and dash pattern of the n-th series: each time the colours come round, the dashes are others."""
    return f"s{index % COLOURS}", _DASHES[index // COLOURS % len(_DASHES)]


def number_text(value: float, step: float = 0.0) -> str:
    """A number as short as the step between its neighbours allows (0: three significant digits)."""
    if not math.isfinite(value):
        return "–"
    if step <= 0:
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"
    if step < 1e-4 or step >= 1e5:
        return _scientific(value, step) if abs(value) > step / 2 else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:,.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def _scientific(value: float, step: float) -> str:
    """As `1.05e-6`, with the digits that tell it from its neighbours and no zeros at the end."""
    digits = math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9)
    mantissa, _, power = f"{value:.{min(max(digits, 0), 6)}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"


def ticks(low: float, high: float, count: int = 5) -> tuple[list[float], float]:
    """Round values within [low, high], about `count` of them, and the step between them (1, 2 or 5 times 10^k)."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"an axis must run from a smaller to a larger number, not from {low} to {high}")
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)], step


def figure(
    title: str, drawing: Sequence[object], height: float, *, legend: Markup | None = None, note: str = ""
) -> Markup:
    """A framed chart; `drawing` are SVG elements in a box of `WIDTH` x `height`."""
    picture = tag("svg", tag("title", title), *drawing, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img")
    small = tag("p", note, class_="note") if note else None
    return tag("figure", tag("figcaption", title), picture, legend, small, class_="chart")


def legend(entries: Iterable[tuple[str, str, str | None]]) -> Markup:
    """A list of (class, name, dash pattern) with a stroke of that look beside each name."""
    found = []
    for look, name, pattern in entries:
        stroke = tag("line", x1=1, y1=5, x2=23, y2=5, class_="line thick", stroke_dasharray=pattern)
        sample = tag("svg", stroke, viewBox="0 0 24 10", aria_hidden="true")
        found.append(tag("li", sample, tag("span", name), class_=look))
    return tag("ul", *found, class_="legend")


def text(x: float, y: float, what: str, *, anchor: str = "start", look: str | None = None) -> Markup:
    """Text whose baseline starts (or ends, or is centred: `anchor` "end", "middle") at x, y."""
    where = None if anchor == "start" else anchor
    return tag("text", what, x=_n(x), y=_n(y), text_anchor=where, class_=look)


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> Markup:
    """A straight line of class `look`."""
    return tag("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=look)


def polyline(points: np.ndarray, look: str, *, title: str = "", pattern: str | None = None) -> Markup:
    """A path through f64[N, 2] in drawing units; a row with NaN is a gap, a point between two gaps a dot."""
    known, steps, pen_down = np.isfinite(points).all(1), [], False
    for n, (x, y) in enumerate(points.tolist()):
        if not known[n]:
            pen_down = False
            continue
        steps.append(f"{'L' if pen_down else 'M'}{_n(x)} {_n(y)}")
        if not pen_down and (n + 1 == len(points) or not known[n + 1]):
            steps.append("h0")  # with round caps a stroke of no length shows as a dot
        pen_down = True
    inner = tag("title", title) if title else None
    return tag("path", inner, d="".join(steps), class_=f"line {look}", stroke_dasharray=pattern)


def empty(title: str, note: str = "no values") -> Markup:
    """What stands in place of a chart that has nothing to draw."""
    return figure(title, [text(WIDTH / 2, 30, note, anchor="middle")], 50)


def bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    unit: str = "",
    reference: float | None = None,
    note: str = "",
) -> Markup:
    """Horizontal bars from 0, one per label and series, each label above its bars so that it may be long.

    Args:
      labels: the groups.
      series: name -> a value >= 0 per label; NaN = none.
      unit: follows each number, e.g. " %".
      reference: a value marked by a dashed line.

    Raises:
      ValueError: a series of another length, or a negative value.
    """
    for name, values in series.items():
        if len(values) != len(labels) or any(v < 0 or math.isinf(v) for v in values):
            raise ValueError(f"bars {title!r}: series {name!r} needs a finite value >= 0 for all {len(labels)} labels")
    series = {name: drawable(values).tolist() for name, values in series.items()}
    known = [v for values in series.values() for v in values if not math.isnan(v)]
    if not known:
        return empty(title)
    top = max([*known, reference or 0.0]) or 1.0
    marks, step = ticks(0.0, top, 4)
    left, y, scale, shapes, words = 2.0, 4.0, (WIDTH - 66.0) / top, [], []
    for n, label in enumerate(labels):
        words.append(text(left, y + 12, label, look="name"))
        y += 16
        for s, (name, values) in enumerate(series.items()):
            missing = math.isnan(values[n])
            shown, width = ("–", 0.0) if missing else (f"{number_text(values[n])}{unit}", values[n] * scale)
            shapes.append(_rect(f"{label}, {name}: {shown}", left, y, width, 10, series_look(s)[0]))
            words.append(text(left + width + 4, y + 9, shown, look="value"))
            y += 12
        y += 5
    grid = []
    for mark in marks:
        x = left + mark * scale
        grid.append(line(x, 2, x, y, "grid" if mark else "axis"))
        words.append(text(x, y + 12, number_text(mark, step) + unit, anchor="middle" if mark else "start"))
    if reference is not None:
        shapes.append(line(left + reference * scale, 2, left + reference * scale, y, "reference"))
    names = legend((series_look(s)[0], name, None) for s, name in enumerate(series)) if len(series) > 1 else None
    return figure(title, [*grid, *shapes, *words], y + 18, legend=names, note=note)


def histogram(
    values: Sequence[float] | np.ndarray, *, title: str, x_label: str, step: float = 0.0, upper: float | None = None
) -> Markup:
    """Vertical bars: how many values fall into each of about `_BINS` equal ranges.

    Args:
      values: [N]; what is not finite is left out and counted in the note.
      step: the values are multiples of this (1: whole numbers), so every bar takes the same number of them; 0: any.
      upper: values above are not drawn but counted in the note.
    """
    given = drawable(values).reshape(-1)
    finite = given[np.isfinite(given)]
    drawn = finite if upper is None else finite[finite <= upper]
    if not drawn.size:
        return empty(title)
    edges = _edges(drawn, step)
    counts, _ = np.histogram(drawn, edges)
    _, y_step = ticks(0.0, float(counts.max()), 4)
    box = _Box(edges[0], edges[-1], 0.0, y_step * math.ceil(counts.max() / y_step))
    body = box.axes(x_label, "count", whole_x=step == 1, whole_y=True)
    for count, start, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        x, x_end, y = box.x(start), box.x(end), box.y(count)
        range_text = f"{start + step / 2:.6g}" + (f" to {end - step / 2:.6g}" if end - start > 1.5 * step else "")
        body.append(_rect(f"{range_text}: {count}", x + 0.5, y, max(0.5, x_end - x - 1), box.y(0) - y, "s0"))
    notes = [f"n = {given.size:,}"]
    if drawn.size < finite.size:
        notes.append(f"{finite.size - drawn.size:,} above {number_text(upper)} are not drawn")
    if finite.size < given.size:
        notes.append(f"{given.size - finite.size:,} have no value")
    return figure(title, body, _HEIGHT, note="; ".join(notes))


def _rect(title: str, x: float, y: float, width: float, height: float, look: str) -> Markup:
    """A bar with its numbers."""
    size = {"width": _n(width), "height": _n(height)}
    return tag("rect", tag("title", title), x=_n(x), y=_n(y), **size, class_=f"bar {look}")


def _edges(values: np.ndarray, step: float) -> np.ndarray:
    """Borders of the ranges, f64[<= _BINS + 2]; between the multiples of `step` if it is not 0."""
    low, high = float(values.min()), float(values.max())
    if not step:
        return np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    first, count = round(low / step), round((high - low) / step) + 1
    each = math.ceil(count / _BINS)  # multiples in a bar
    return step * (first - 0.5 + each * np.arange(math.ceil(count / each) + 1))


def lines(
    series: Mapping[str, Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    faint: Mapping[str, Curve] = MappingProxyType({}),
    bands: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = MappingProxyType({}),
    like: Mapping[str, str] = MappingProxyType({}),
    note: str = "",
) -> Markup:
    """Curves with one pair of axes.

    Args:
      series: name -> (x, y), equally long, x ascending; y that is not finite (or, with `log_y`, not above 0) is a gap.
        A long curve is thinned to the least and greatest y of each stretch, so that no spike is lost.
      faint: name of a series -> (x, y) drawn thinly behind it in its colour, e.g. what it is the mean of.
      bands: name of a series -> (x, low, high), an area behind it in its colour.
      like: name of a series -> another one, whose colour it takes; it is dashed then.

    Raises:
      ValueError: x and y differ in length, or a name in `faint`, `bands` or `like` is no series.
    """
    unknown = [name for name in (*faint, *bands, *like, *like.values()) if name not in series]
    if unknown:
        raise ValueError(f"chart {title!r}: {unknown[0]!r} is none of its series {list(series)}")
    curves = {name: _curve(x, y, log_y) for name, (x, y) in series.items()}
    behind = {name: _curve(x, y, log_y) for name, (x, y) in faint.items()}
    areas = {name: _area(x, low, high, log_y) for name, (x, low, high) in bands.items()}
    drawn = (*curves.values(), *behind.values(), *(edge for area in areas.values() for edge in area))
    known = np.concatenate([np.zeros((0, 2)), *(c[np.isfinite(c).all(1)] for c in drawn)])
    if not len(known):
        return empty(title)
    (x0, y0), (x1, y1) = known.min(0).tolist(), known.max(0).tolist()
    level = (y1 - y0) <= 1e-9 * max(abs(y0), abs(y1))  # but for rounding errors
    room = (0.05 * abs(y1) or 0.05) if level else 0.05 * (y1 - y0)
    aside = 0.0 if x1 > x0 else 0.5
    box = _Box(x0 - aside, x1 + aside, y0 - room, y1 + room)
    body = box.axes(x_label, y_label, log_y=log_y)
    looks = _looks(list(curves), like)
    for name, (look, _) in looks.items():
        if name in areas:
            body += _filled(*(box.place(edge) for edge in areas[name]), look)
        if name in behind:
            body.append(polyline(box.place(behind[name]), f"{look} faint"))
    for name, points in curves.items():
        body += _drawn(name, points, box, *looks[name], log_y)
    names = legend((look, name, pattern) for name, (look, pattern) in looks.items()) if len(curves) > 1 else None
    return figure(title, body, _HEIGHT, legend=names, note=note)


def _looks(names: Sequence[str], like: Mapping[str, str]) -> dict[str, tuple[str, str | None]]:
    """Series -> (class, dash pattern)."""
    own = {name: series_look(n) for n, name in enumerate(name for name in names if name not in like)}
    return {name: own[name] if name in own else (own[like[name]][0], _DASHES[1]) for name in names}


def _drawn(name: str, points: np.ndarray, box: _Box, look: str, pattern: str | None, log_y: bool) -> list[Markup]:
    """One curve f64[N, 2] of data; a single point as a dot."""
    place = box.place(points)
    finite = points[np.isfinite(points[:, 0]), 1]
    last = f"{name}: last {number_text(10 ** finite[-1] if log_y else finite[-1])}" if len(finite) else name
    shapes = [polyline(place, look, title=last, pattern=pattern)]
    if len(finite) == 1:
        x, y = place[np.isfinite(place[:, 0])][0].tolist()
        shapes.append(tag("circle", tag("title", last), cx=_n(x), cy=_n(y), r=3, class_=f"dot {look}"))
    return shapes


def _curve(x: Sequence[float], y: Sequence[float], log_y: bool) -> np.ndarray:
    """f64[N, 2], thinned, y as exponents of ten with `log_y`; rows of NaN are gaps."""
    points = np.array([drawable(x), drawable(y)]).T
    if log_y:
        with np.errstate(divide="ignore", invalid="ignore"):
            points[:, 1] = np.where(points[:, 1] > 0, np.log10(points[:, 1]), np.nan)
    return _thinned(np.where(np.isfinite(points).all(1)[:, None], points, np.nan))


def _area(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], log_y: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge f64[N, 2] of an area, at the same places, at most `_MAX_LINE_POINTS` of them."""
    picked = np.unique(np.linspace(0, max(len(x) - 1, 0), min(len(x), _MAX_LINE_POINTS)).round().astype(int))
    return tuple(_curve(*(np.asarray(v, np.float64)[picked] for v in (x, edge)), log_y) for edge in (low, high))


def _filled(low: np.ndarray, high: np.ndarray, look: str) -> list[Markup]:
    """The area between two edges f64[N, 2] in drawing units, one piece between two gaps."""
    known = np.isfinite(low).all(1) & np.isfinite(high).all(1)
    drawn = []
    for piece in np.split(np.arange(len(known)), np.flatnonzero(np.diff(known)) + 1):
        if len(piece) > 1 and known[piece[0]]:
            ring = np.concatenate([low[piece], high[piece][::-1]]).tolist()
            d = "M" + "L".join(f"{_n(a)} {_n(b)}" for a, b in ring) + "Z"
            drawn.append(tag("path", d=d, class_=f"band {look}"))
    return drawn


def _thinned(points: np.ndarray) -> np.ndarray:
    """About `_MAX_LINE_POINTS` of f64[N, 2]: both ends, and of each stretch its lowest and highest point, in order."""
    if len(points) <= _MAX_LINE_POINTS:
        return points
    kept = [0]
    for stretch in np.array_split(np.arange(len(points)), _MAX_LINE_POINTS // 2):
        y = points[stretch, 1]
        if np.isnan(y).all():
            kept.append(stretch[0])
        else:
            kept += sorted({stretch[np.nanargmin(y)], stretch[np.nanargmax(y)]})
    return points[np.unique([*kept, len(points) - 1])]


class _Box(NamedTuple):
    """The frame of a chart with two axes: data to drawing units."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value):
        return _LEFT + (value - self.x0) * ((WIDTH - _LEFT - _RIGHT) / (self.x1 - self.x0))

    def y(self, value):
        return _HEIGHT - _BOTTOM - (value - self.y0) * ((_HEIGHT - _TOP - _BOTTOM) / (self.y1 - self.y0))

    def place(self, points: np.ndarray) -> np.ndarray:
        """f64[N, 2] of data -> f64[N, 2] in drawing units."""
        return np.column_stack([self.x(points[:, 0]), self.y(points[:, 1])])

    def axes(
        self, x_label: str, y_label: str, *, whole_x: bool = False, whole_y: bool = False, log_y: bool = False
    ) -> list[Markup]:
        """Grid, tick labels and both axis names. `whole_*`: ticks at whole numbers only; `log_y`: y are exponents."""
        bottom, right, body = _HEIGHT - _BOTTOM, WIDTH - _RIGHT, []
        marks, step = ticks(self.y0, self.y1, 4)
        for mark in marks:
            if not whole_y or mark == round(mark):
                y, shown = self.y(mark), number_text(10**mark) if log_y else number_text(mark, step)
                body += [line(_LEFT, y, right, y, "grid"), text(_LEFT - 5, y + 4, shown, anchor="end")]
        marks, step = ticks(self.x0, self.x1, 5)
        for mark in marks:
            if not whole_x or mark == round(mark):
                x, shown = self.x(mark), number_text(mark, step)
                body += [line(x, bottom, x, bottom + 4, "axis"), text(x, bottom + 15, shown, anchor="middle")]
        body += [line(_LEFT, bottom, right, bottom, "axis"), line(_LEFT, _TOP, _LEFT, bottom, "axis")]
        return [*body, text(2, 12, y_label), text(right, _HEIGHT - 4, x_label, anchor="end")]


def _n(value: float) -> str:
    """A coordinate: two decimals are finer than a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
