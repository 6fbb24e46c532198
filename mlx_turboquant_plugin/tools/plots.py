"""Small charts as SVG text, coloured by the page's style sheet.

Series i is drawn in the class ``s{i}``. Every mark carries its numbers as a tooltip.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 46


@dataclass(frozen=True)
class Axis:
    """One axis: from ``low`` to ``high``, linear or logarithmic.

    Attributes:
        ticks: places and their labels.
    """

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Where ``value`` lies, 0 to 1; what is outside is moved to the nearer end."""
        low, high, value = (
            (math.log(max(x, 1e-300)) if self.log else x) for x in (self.low, self.high, value)
        )
        return min(1.0, max(0.0, (value - low) / (high - low)))


def decades(title: str, low: float, high: float) -> Axis:
    """A logarithmic axis over whole powers of ten around ``low`` and ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    ticks = [(10.0**power, _power(power)) for power in range(first, last + 1)]
    return Axis(title, 10.0**first, 10.0**last, ticks, log=True)


def doublings(title: str, values: Sequence[int]) -> Axis:
    """A logarithmic axis from the least of ``values`` to the greatest, which are labelled."""
    low, high = (values[0], values[-1]) if len(values) > 1 else (values[0] / 2, values[0] * 2)
    return Axis(title, low, high, [(v, count(v)) for v in values], log=True)


def linear(title: str, low: float, high: float) -> Axis:
    """A linear axis with about five round ticks."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return Axis(title, low, high, [(i * step, _round(i * step)) for i in places])


def count(number: int) -> str:
    """A number of tokens: 2048 is 2k."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


@dataclass(frozen=True)
class Line:
    """A curve; ``series`` chooses the colour.

    Attributes:
        rises: the ends of a vertical bar through each point, if there are any.
        dashes: lengths of strokes and gaps; "" is a whole line.
    """

    name: str
    series: int
    points: Sequence[tuple[float, float]]
    rises: Sequence[tuple[float, float]] = ()
    dashes: str = ""


@dataclass(frozen=True)
class Point:
    """A labelled dot; ``span`` is a horizontal bar through it, ``rise`` a vertical one."""

    name: str
    series: int
    x: float
    y: float
    span: tuple[float, float] | None = None
    rise: tuple[float, float] | None = None


def dashes(line: Line) -> str:
    """The attribute that draws the curve dashed."""
    return f' stroke-dasharray="{line.dashes}"' if line.dashes else ""


def line_chart(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """Curves through dots."""
    marks = []
    for line in lines:
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in line.points)
        marks.append(
            f'<g class="s{line.series}"><polyline points="{path}"{dashes(line)}>'
            f"<title>{escape(line.name)}</title></polyline>"
            + "".join(
                f'<circle cx="{_x(x, a):.1f}" cy="{_y(y, b):.1f}" r="2.5">'
                f"<title>{escape(line.name)}: {b:.3g} at {a:g}</title></circle>"
                for a, b in line.points
            )
            + "".join(_rise(_x(x, a), y, ends) for (a, _), ends in zip(line.points, line.rises))
            + "</g>"
        )
    return _chart(title, x, y, marks)


def scatter(title: str, x: Axis, y: Axis, points: Sequence[Point]) -> str:
    """Dots with their names beside them, and bars through those that have a span."""
    marks = []
    places = [(_x(x, point.x), _y(y, point.y)) for point in points]
    for point, (px, py) in zip(points, places):
        bar = ""
        if point.span:
            low, high = (_x(x, end) for end in point.span)
            bar = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{py:.1f}" y2="{py:.1f}"/>'
        if point.rise:
            bar += _rise(px, y, point.rise)
        right = px > WIDTH * 0.75
        in_the_way = any(0 < a - px < 80 and -25 < b - py < 5 for a, b in places)
        above = py > TOP + 20 and not in_the_way
        marks.append(
            f'<g class="s{point.series}">{bar}<circle cx="{px:.1f}" cy="{py:.1f}" r="5">'
            f"<title>{escape(point.name)}: {point.x:.3g}, {point.y:.3g}</title></circle></g>"
            f'<text class="name" x="{px + (-10 if right else 10):.1f}" '
            f'y="{py + (-7 if above else 17):.1f}" '
            f'text-anchor="{"end" if right else "start"}">{escape(point.name)}</text>'
        )
    return _chart(title, x, y, marks)


def bar_chart(title: str, x_title: str, y: Axis, values: Sequence[float], series: int) -> str:
    """One bar for each of ``values``, numbered from 0."""
    x = Axis(x_title, -0.5, len(values) - 0.5, [(i, str(i)) for i in _thinned(len(values))])
    width = 0.7 * (WIDTH - LEFT - RIGHT) / len(values)
    bars = [
        f'<rect x="{_x(x, i) - width / 2:.1f}" y="{_y(y, value):.1f}" width="{width:.1f}" '
        f'height="{HEIGHT - BOTTOM - _y(y, value):.1f}"><title>{i}: {value:.3g}</title></rect>'
        for i, value in enumerate(values)
    ]
    return _chart(title, x, y, [f'<g class="s{series}">', *bars, "</g>"])


def _rise(x: float, axis: Axis, ends: tuple[float, float]) -> str:
    """A vertical bar at the place ``x``."""
    low, high = (_y(axis, end) for end in ends)
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _thinned(number: int) -> range:
    return range(0, number, max(1, number // 16))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _round(value: float) -> str:
    """A round number, without the digits that binary fractions add."""
    value = float(f"{value:.6g}")
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def _power(power: int) -> str:
    return f"1e{power}" if not -3 < power < 4 else f"{10.0**power:g}"


def _chart(title: str, x: Axis, y: Axis, marks: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)}">',
            *_grid(x, y),
            *marks,
            "</svg>",
        ]
    )


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines: list[str] = []
    for value, label in y.ticks:
        at = _y(y, value)
        lines.append(f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        yield f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>'
    for value, label in x.ticks:
        at = _x(x, value)
        lines.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        yield f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(label)}</text>'
    yield f'<g class="grid">{"".join(lines)}</g>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.title)}</text>'
    middle = (TOP + bottom) / 2
    yield (
        f'<text x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(y.title)}</text>'
    )
