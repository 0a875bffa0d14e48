"""Charts: the numbers in the drawing are those of the data."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from mllm4d_jax.report.charts import bars, histogram, lines, number_text, series_look, ticks
from mllm4d_jax.report.maps import MapPath, MapPoint, top_map
from tests.report.reading import assert_nothing_external, read

AXES = {"x_label": "right, m", "y_label": "forward, m"}


def vertices(element) -> list[list[tuple[float, float]]]:
    """The strokes of a path, each a list of points."""
    strokes = []
    for command, x, y in re.findall(r"([ML])(-?[\d.]+) (-?[\d.]+)", element.attributes["d"]):
        if command == "M":
            strokes.append([])
        strokes[-1].append((float(x), float(y)))
    return strokes


def test_bar_widths_are_proportional_and_named():
    values = {"wanted": [10.0, 20.0, 40.0], "got": [5.0, 0.0, math.nan]}
    root = read(bars(["a", "b", "<c>"], values, title="t & u", unit="%"))
    drawn = root.all("rect", "bar")
    widths = [r.number("width") for r in drawn]  # a wanted, a got, b wanted, ...
    expected = np.array([10, 5, 20, 0, 40, 0]) * widths[4] / 40
    np.testing.assert_allclose(widths, expected, atol=0.01)
    assert widths[4] > 100
    titles = [r.all("title")[0].text for r in drawn]
    assert titles[0] == "a, wanted: 10%" and titles[5] == "<c>, got: –"
    assert [li.text for li in root.all("li")] == ["wanted", "got"]
    assert root.all("figcaption")[0].text == root.all("svg")[0].all("title")[0].text == "t & u"


def test_the_reference_line_stands_at_its_value():
    root = read(bars(["a"], {"s": [50.0]}, title="t", reference=25.0))
    bar, mark = root.all("rect", "bar")[0], root.all("line", "reference")[0]
    assert mark.number("x1") - bar.number("x") == pytest.approx(bar.number("width") / 2, abs=0.01)


@pytest.mark.parametrize("values", [[-1.0], [math.inf], [1.0, 2.0]])
def test_bars_refuse_what_they_cannot_draw(values):
    with pytest.raises(ValueError, match="'t'.*'s'"):
        bars(["a"], {"s": values}, title="t")


def test_histogram_heights_are_the_counts():
    values = np.random.default_rng(1).normal(size=500)
    drawn = read(histogram(values, title="t", x_label="metres")).all("rect", "bar")
    counts, _ = np.histogram(values, 24)
    heights = np.array([r.number("height") for r in drawn])
    np.testing.assert_allclose(heights / heights.max(), counts / counts.max(), atol=1e-3)
    assert [int(r.all("title")[0].text.rpartition(" ")[2]) for r in drawn] == counts.tolist()
    lefts = np.array([r.number("x") for r in drawn])
    np.testing.assert_allclose(np.diff(lefts), np.diff(lefts)[0], atol=0.02)


def test_histogram_of_multiples_gives_each_bar_the_same_number_of_them():
    values = [n / 10 for n in range(5, 56) for _ in range(3)]  # 0.5, 0.6 ... 5.5: 51 values, three of a kind
    drawn = read(histogram(values, title="t", x_label="m", step=0.1)).all("rect", "bar")
    counts = [int(r.all("title")[0].text.rpartition(" ")[2]) for r in drawn]
    assert counts == [9] * 17
    whole = read(histogram([1, 1, 2, 4], title="t", x_label="n", step=1)).all("rect", "bar")
    assert [r.all("title")[0].text for r in whole] == ["1: 2", "2: 1", "3: 0", "4: 1"]


def test_histogram_says_what_it_leaves_out():
    root = read(histogram([1.0, 2.0, 3.0, 99.0, math.nan], title="t", x_label="m", upper=10.0))
    assert root.all("p", "note")[0].text == "n = 5; 1 above 10 are not drawn; 1 have no value"
    drawn = root.all("rect", "bar")
    assert sum(int(r.all("title")[0].text.rpartition(" ")[2]) for r in drawn) == 3
    assert "no values" in read(histogram([], title="t", x_label="m")).text
    assert len(read(histogram([7.0], title="t", x_label="m")).all("rect", "bar")) == 24


def test_curves_run_through_their_points_and_break_at_gaps():
    x, y = np.arange(6.0), np.array([1.0, 3.0, math.nan, 2.0, 5.0, 4.0])
    root = read(lines({"loss": (x, y), "kl": (x, y + 1)}, title="t", x_label="step", y_label="loss"))
    first, second = root.all("svg")[0].all("path", "line")
    strokes = vertices(first)
    assert [len(s) for s in strokes] == [2, 3]
    known = np.isfinite(y)
    points = np.concatenate(strokes)
    for data, drawn, sign in ((x[known], points[:, 0], 1), (y[known], points[:, 1], -1)):
        slope, offset = np.polyfit(data, drawn, 1)
        np.testing.assert_allclose(slope * data + offset, drawn, atol=0.02)
        assert slope * sign > 0
    assert np.concatenate(vertices(second))[0, 1] < points[0, 1]
    assert [li.text for li in root.all("li")] == ["loss", "kl"]
    assert first.all("title")[0].text == "loss: last 4"


def test_a_logarithmic_axis_takes_equal_steps_for_equal_factors():
    root = read(lines({"s": ([0, 1, 2, 3], [1, 10, 100, 0])}, title="t", x_label="x", y_label="y", log_y=True))
    ((a, b, c),) = vertices(root.all("path", "line")[0])
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.02) and a[1] > b[1]
    labels = [t.text for t in root.all("text")]
    assert "10" in labels and "100" in labels


def test_a_long_curve_is_thinned_but_keeps_its_spike():
    y = np.zeros(50_000)
    y[31_234] = 9.0
    root = read(lines({"s": (np.arange(50_000), y)}, title="t", x_label="x", y_label="y"))
    (stroke,) = vertices(root.all("path", "line")[0])
    assert len(stroke) <= 900
    heights = np.array(stroke)[:, 1]
    assert (heights < heights.max() - 100).sum() == 1
    # Both ends are kept, so the axis covers all steps.
    assert "0" in [t.text for t in root.all("text", "")] and stroke[-1][0] - stroke[0][0] > 300


def test_a_curve_of_one_point_shows_it():
    root = read(lines({"s": ([7], [3.0])}, title="t", x_label="x", y_label="y"))
    (dot,) = root.all("circle", "dot")
    assert 46 < dot.number("cx") < 348 and "last 3" in dot.text


def test_values_that_cannot_be_added_are_drawn_at_the_edge():
    for axis in (False, True):
        drawn = lines({"a": ([1, 2, 3], [1.7e308, -1.7e308, 1.0])}, title="t", x_label="x", y_label="y", log_y=axis)
        assert "nan" not in drawn and "inf" not in drawn
    assert "nan" not in bars(["a"], {"s": [1.7e308]}, title="t")
    assert "nan" not in histogram([1.7e308, -1.7e308, 0.0], title="t", x_label="x")


def test_ticks_are_round_and_within():
    rng = np.random.default_rng(2)
    for _ in range(300):
        low = rng.normal() * 10 ** rng.uniform(-3, 3)
        high = low + 10 ** rng.uniform(-3, 4)
        marks, step = ticks(low, high)
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
        assert 2 <= len(marks) <= 6
        assert all(low - 1e-6 * step <= m <= high + 1e-6 * step for m in marks)
        np.testing.assert_allclose(np.array(marks) / step, np.round(np.array(marks) / step), atol=1e-6)
    with pytest.raises(ValueError, match="smaller to a larger"):
        ticks(1.0, 1.0)


def test_numbers_are_short():
    assert [number_text(v) for v in (0.12345, 12, 1234.5, math.nan)] == ["0.123", "12", "1,234", "–"]
    assert [number_text(v, 0.5) for v in (0.5, -0.0, 1)] == ["0.5", "0.0", "1.0"]
    assert number_text(20000, 5000) == "20,000"


def test_colours_come_round_with_another_dash():
    (colour, dash), (other_colour, other_dash) = series_look(1), series_look(9)
    assert colour == other_colour and dash != other_dash


def square_map(**changes):
    """A camera along (0,0) -> (3,0) -> (3,4) looking up, an object with a gap and a lone point."""
    gap = [math.nan, math.nan]
    camera = MapPath("camera", np.array([[0, 0], [3, 0], [3, 4.0]]), np.array([[0, 1.0]] * 3), camera=True)
    ball = MapPath("<ball>", np.array([[1, 1], [1, 2], gap, [2, 3], gap, [2, 2.0]]))
    points = [MapPoint(3, 4, "12", "camera at 12"), MapPoint(1, 2, "", "ball", 1)]
    return top_map(**({"paths": [camera, ball], "points": points, "title": "map", **AXES} | changes))


def test_the_map_has_one_scale_and_up_is_up():
    root = read(square_map())
    camera, ball = (p for p in root.all("svg")[0].all("path", "line") if p.all("title")[0].text in ("camera", "<ball>"))
    (a, b, c) = np.array(vertices(camera)[0])
    assert np.hypot(*(b - a)) / 3 == pytest.approx(np.hypot(*(c - b)) / 4, rel=1e-3)
    assert a[1] == b[1] and b[0] == c[0] and c[1] < b[1] and b[0] > a[0]
    assert [len(s) for s in vertices(ball)] == [2, 1, 1] and ball.attributes["d"].count("h0") == 2
    labels = [t.text for t in root.all("text")]
    assert "right, m" in labels and "forward, m" in labels and "12" in labels
    assert [li.text for li in root.all("li")] == ["camera", "<ball>"]
    assert_nothing_external(square_map())


def test_headings_starts_and_ends_stand_where_they_belong():
    root = read(square_map())
    camera = next(p for p in root.all("path", "line") if p.all("title") and p.all("title")[0].text == "camera")
    places = vertices(camera)[0]
    strokes = [e for e in root.all("svg")[0].all("line", "ink")]
    assert [(e.number("x1"), e.number("y1")) for e in strokes] == places
    assert all(e.number("y2") < e.number("y1") and e.number("x2") == e.number("x1") for e in strokes)
    ends = {c.all("title")[0].text: (c.number("cx"), c.number("cy")) for c in root.all("circle")}
    assert ends["camera: start"] == places[0] and ends["camera: end"] == ends["camera at 12"] == places[-1]


def test_labels_do_not_cover_each_other():
    corners = np.array([[-1.0, -1.0], [1.0, 1.0]])
    points = [MapPoint(0.06 * (n % 5), 0.06 * (n // 5), str(100 + n)) for n in range(25)]  # crowded
    root = read(top_map([MapPath("c", corners, camera=True)], points, title="t", **AXES))
    labels = root.all("text", "halo")
    assert len(labels) >= 10
    boxes = [(t.number("x"), t.number("y"), 5.5 * len(t.text)) for t in labels]
    for n, (x, y, width) in enumerate(boxes):
        for other_x, other_y, other_width in boxes[:n]:
            assert abs(x - other_x) >= (width + other_width) / 2 or abs(y - other_y) >= 11
    still = [MapPoint(0, 0, str(n)) for n in range(9)]
    root = read(top_map([MapPath("c", np.zeros((9, 2)), camera=True)], still, title="t", **AXES))
    assert [t.text for t in root.all("text", "halo")] == ["0 … 8"]


def test_maps_of_nothing_and_of_nonsense():
    unseen = MapPath("a", np.full((3, 2), np.nan))
    assert "nothing was seen" in read(square_map(paths=[unseen], points=[])).text
    with pytest.raises(ValueError, match="'a' must have points"):
        square_map(paths=[MapPath("a", np.zeros((3, 3)))], points=[])
    with pytest.raises(ValueError, match="headings"):
        square_map(paths=[MapPath("a", np.zeros((3, 2)), np.zeros((2, 2)))], points=[])
    with pytest.raises(ValueError, match="number of one of the paths"):
        square_map(points=[MapPoint(0, 0, path=2)])
