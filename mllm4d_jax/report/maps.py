"""A map as inline SVG, from above or from the side: paths and points in metres, equally scaled on both axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm4d_jax.report.charts import WIDTH, empty, figure, legend, line, number_text, polyline, series_look, text, ticks
from mllm4d_jax.report.page import Markup, tag

_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 12.0, 22.0, 36.0
_LEAST, _MOST = 150.0, 330.0  # height of the map itself
_LEAST_SPAN = 0.2  # of the map's unit: a still camera's rounding errors are not blown up to a path
_APART = 12.0  # drawing units between two headings of a path
_SAME = 5.0  # labelled points closer than this share a label
_GUESS = "3 4"  # dash pattern


@dataclass(frozen=True)
class MapPath:
    """Something that moved.

    Attributes:
      name: for the legend.
      points: f64[N, 2] (right, up on the page) in the map's unit; a row with NaN is a gap.
      headings: f64[N, 2] where it looks at each point (any length), drawn as short strokes; None for none.
      camera: drawn in the text's colour and thicker.
      guess: dashed, in the look of the path before it: what somebody thought that one to be.
    """

    name: str
    points: np.ndarray
    headings: np.ndarray | None = None
    camera: bool = False
    guess: bool = False


@dataclass(frozen=True)
class MapPoint:
    """A single place.

    Attributes:
      x, y: as `MapPath.points`.
      label: written beside it where there is room; '' for none.
      title: what a reader sees when pointing at it.
      path: number of the path whose colour it takes.
    """

    x: float
    y: float
    label: str = ""
    title: str = ""
    path: int = 0


class _Frame:
    """Map to drawing units, one scale for both axes, wide enough for every known point."""

    def __init__(self, known: np.ndarray, scale: float | None = None) -> None:
        """`scale`: drawing units of one unit of the map; None for the largest with which all fits."""
        low, high = known.min(0), known.max(0)
        middle, span = (low + high) / 2, np.maximum((high - low) * 1.16, 1e-9)
        inner = WIDTH - _LEFT - _RIGHT
        # The width is always used; the height as far as the data ask for it.
        fitting = min(inner / max(span[0], _LEAST_SPAN), _MOST / max(span[1], _LEAST_SPAN))
        self.scale = float(fitting if scale is None else scale)
        self.height = float(np.clip(span[1] * self.scale, _LEAST, _MOST))
        half = np.array([inner, self.height]) / (2 * self.scale)
        (self.x0, self.y0), (self.x1, self.y1) = (middle - half).tolist(), (middle + half).tolist()

    def place(self, points: np.ndarray) -> np.ndarray:
        """f64[..., 2] -> f64[..., 2]; up on the map is up on the page."""
        x = _LEFT + (points[..., 0] - self.x0) * self.scale
        y = _TOP + (self.y1 - points[..., 1]) * self.scale
        return np.stack([x, y], -1)

    def axes(self, x_label: str, y_label: str) -> list[Markup]:
        bottom, right = _TOP + self.height, WIDTH - _RIGHT
        # One step for both axes: the grid's cells are squares.
        _, step = ticks(self.x0, self.x1, 5)
        body = [tag("rect", x=_LEFT, y=_TOP, width=right - _LEFT, height=f"{self.height:.2f}", class_="axis")]
        for mark in _multiples(self.x0, self.x1, step):
            x = float(self.place(np.array([mark, self.y0]))[0])
            body += [line(x, _TOP, x, bottom, "grid"), text(x, bottom + 14, number_text(mark, step), anchor="middle")]
        for mark in _multiples(self.y0, self.y1, step):
            y = float(self.place(np.array([self.x0, mark]))[1])
            body += [line(_LEFT, y, right, y, "grid"), text(_LEFT - 5, y + 4, number_text(mark, step), anchor="end")]
        return [*body, text(2, 12, y_label), text(right, bottom + 31, x_label, anchor="end")]


def common_scale(*views: Sequence[MapPath]) -> float | None:
    """Return the largest scale with which each of several maps holds its paths; None where no point is known."""
    scales = [_Frame(known).scale for view in views if len(known := _known(view))]
    return min(scales, default=None)


def _known(paths: Sequence[MapPath], points: Sequence[MapPoint] = ()) -> np.ndarray:
    """f64[N, 2], the places that are known."""
    places = [np.asarray(path.points, np.float64) for path in paths]
    places.append(np.array([(p.x, p.y) for p in points], np.float64).reshape(-1, 2))
    known = np.concatenate(places)
    return known[np.isfinite(known).all(1)]


def top_map(
    paths: Sequence[MapPath],
    points: Sequence[MapPoint] = (),
    *,
    title: str,
    x_label: str,
    y_label: str,
    note: str = "",
    scale: float | None = None,
) -> Markup:
    """Paths with their starts (open) and ends (filled), and points with labels that keep out of each other's way.

    Args:
      scale: for maps that are to have the same one (`common_scale`); None for the largest that this one can have.

    Raises:
      ValueError: points not [N, 2], headings of another shape, an unknown path number of a point, a guess that comes
        first.
    """
    if paths and paths[0].guess:
        raise ValueError(f"map {title!r}: path {paths[0].name!r} is a guess, but no path comes before it")
    for path in paths:
        shapes = [path.points.shape] + ([] if path.headings is None else [path.headings.shape])
        if any(len(s) != 2 or s[1] != 2 or s[0] != len(path.points) for s in shapes):
            raise ValueError(f"map {title!r}: path {path.name!r} must have points and headings [N, 2], not {shapes}")
    for point in points:
        if not 0 <= point.path < len(paths):
            raise ValueError(f"map {title!r}: {point} needs the number of one of the paths")
    known = _known(paths, points)
    if not len(known):
        return empty(title, "nothing was seen")
    frame, looks = _Frame(known, scale), _looks(paths)
    body = frame.axes(x_label, y_label)
    for path, (look, _, pattern) in zip(paths, looks, strict=True):
        body += _path(path, frame, look, pattern)
    obstacles = np.concatenate([_dense(frame.place(np.asarray(path.points, np.float64))) for path in paths])
    body += _points(points, frame, [look for look, _, _ in looks], obstacles[np.isfinite(obstacles).all(1)])
    height = _TOP + frame.height + _BOTTOM
    return figure(title, body, round(height, 2), legend=legend(looks), note=note)


def _looks(paths: Sequence[MapPath]) -> list[tuple[str, str, str | None]]:
    """(class, name, dash pattern) of each path; cameras take none of the colours."""
    found, used = [], 0
    for path in paths:
        if path.guess:
            look, pattern = found[-1][0], _GUESS
        elif path.camera:
            look, pattern = "ink", None
        else:
            look, pattern = series_look(used)
            used += 1
        found.append((look, path.name, pattern))
    return found


def _path(path: MapPath, frame: _Frame, look: str, pattern: str | None) -> list[Markup]:
    place = frame.place(np.asarray(path.points, np.float64))
    thick = " thick" if path.camera else ""
    body = [polyline(place, look + thick, title=path.name, pattern=pattern)]
    seen = np.flatnonzero(np.isfinite(place).all(1))
    for n in [] if path.headings is None else _spread(place, seen):
        turn = path.headings[n] * (1.0, -1.0)  # the page's y runs down
        size = float(np.hypot(*turn))
        if size > 1e-9:
            x, y = place[n].tolist()
            dx, dy = (turn * (9.0 / size)).tolist()
            body.append(line(x, y, x + dx, y + dy, f"line {look}"))
    for n, kind, what in ((seen[:1], "open", "start"), (seen[-1:], "dot", "end")):
        for x, y in place[n].tolist():
            inner = tag("title", f"{path.name}: {what}")
            body.append(tag("circle", inner, cx=f"{x:.2f}", cy=f"{y:.2f}", r=4, class_=f"{kind} {look}"))
    return body


def _dense(place: np.ndarray) -> np.ndarray:
    """The places of a path f64[N, 2] and points between them, so that a long stroke counts as covered."""
    share = np.linspace(0.0, 1.0, 6)[:-1, None, None]
    return np.concatenate([(place[:-1] * (1 - share) + place[1:] * share).reshape(-1, 2), place])


def _spread(place: np.ndarray, seen: np.ndarray) -> list[int]:
    """Those of the places f64[N, 2] numbered `seen` that keep `_APART` from the one before; the first is always in."""
    kept: list[int] = []
    for n in seen.tolist():
        if not kept or np.hypot(*(place[n] - place[kept[-1]])) >= _APART:
            kept.append(n)
    return kept


def _points(points: Sequence[MapPoint], frame: _Frame, looks: Sequence[str], obstacles: np.ndarray) -> list[Markup]:
    """Marks and labels; labels avoid the `obstacles` f64[N, 2] (drawing units) and each other."""
    marks, labelled = [], []
    for point in points:
        x, y = frame.place(np.array([point.x, point.y], np.float64)).tolist()
        if not np.isfinite([x, y]).all():
            continue
        inner = tag("title", point.title or point.label)
        marks.append(tag("circle", inner, cx=f"{x:.2f}", cy=f"{y:.2f}", r=2.6, class_=f"dot {looks[point.path]}"))
        if point.label:
            labelled.append((x, y, point.label))
    taken, labels = [], []
    for x, y, label in _grouped(labelled):
        box = _free_spot(x, y, label, obstacles, taken, frame)
        if box is not None:
            taken.append(box)
            near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            if np.hypot(near_x - x, near_y - y) > 8:
                labels.append(line(x, y, near_x, near_y, "axis"))
            labels.append(text((box[0] + box[2]) / 2, box[3] - 2.5, label, anchor="middle", look="halo"))
    return [*marks, *labels]


def _grouped(labelled: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Labels of points that lie on top of each other, made one: up to three by name, more as first to last."""
    groups: list[tuple[float, float, list[str]]] = []
    for x, y, label in labelled:
        near = next((g for g in groups if np.hypot(g[0] - x, g[1] - y) < _SAME), None)
        if near:
            near[2].append(label)
        else:
            groups.append((x, y, [label]))
    return [(x, y, ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}") for x, y, names in groups]


def _free_spot(
    x: float, y: float, label: str, known: np.ndarray, taken: Sequence[tuple[float, ...]], frame: _Frame
) -> tuple[float, float, float, float] | None:
    """The box (left, top, right, bottom) of a label near its point that covers no other label and the fewest of the
    places `known`; None if every box covers a label or leaves the map."""
    width, height = 6.3 * len(label) + 2, 12.0
    best, least = None, np.inf
    for away in (4.0, 14.0, 26.0):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            middle_x, middle_y = x + dx * (width / 2 + away), y + dy * (height / 2 + away)
            box = (middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
            inside = box[0] >= _LEFT and box[2] <= WIDTH - _RIGHT and box[1] >= _TOP and box[3] <= _TOP + frame.height
            if not inside or any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                continue
            covered = ((known > (box[0] - 2, box[1] - 2)) & (known < (box[2] + 2, box[3] + 2))).all(1).sum()
            if covered < least:
                best, least = box, covered
    return best


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [n * step for n in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]
