"""Lines in an SVG, without a library: cost upwards from 0, what grows from left to right, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 492, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 28, 40, 40
_COLOURS = ("#2f6fde", "#d9652b", "#3a9a5b")  # to be told apart on white and on black
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.t{font-size:14px}.g{stroke:#8884}.m{text-anchor:middle}.e{text-anchor:end}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)


def chart(title: str, unit: str, along: str, lines: Mapping[str, Points]) -> str:
    """unit: of what is measured; along: what grows; lines: name -> (x, y), x above 0."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    step, top = _scale(max(y for points in lines.values() for _, y in points))
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    span = math.log(xs[-1] / xs[0]) or 1.0

    def x_of(x: float) -> float:
        return _LEFT + wide * math.log(x / xs[0]) / span

    def y_of(y: float) -> float:
        return _TOP + high * (1 - y / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">',
        f"<style>{_STYLE}</style>",
        f'<text class="t" x="{_LEFT}" y="18">{escape(title)}, {escape(unit)}</text>',
        f'<text class="m" x="{_LEFT + wide / 2}" y="{_HEIGHT - 6}">{escape(along)}</text>',
    ]
    for number in range(round(top / step) + 1):
        y = y_of(number * step)
        parts.append(f'<path class="g" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="e" x="{_LEFT - 6}" y="{y + 4:.1f}">{number * step:g}</text>')
    parts += [f'<text class="m" x="{x_of(x):.1f}" y="{_HEIGHT - 24}">{x:,g}</text>' for x in xs]
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        way = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        place = f'x="{_LEFT + 90 * number}" y="33"'
        parts.append(f'<text {place} style="fill:{colour}">● {escape(name)}</text>' if len(lines) > 1 else "")
    return "\n".join([*filter(None, parts), "</svg>\n"])


def _scale(highest: float) -> tuple[float, float]:
    """(step, top) with 1, 2 or 5 at the front of the step and at most six steps."""
    size = 10 ** math.floor(math.log10(highest / 5)) if highest > 0 else 1.0
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * 6 >= highest)
    return step, step * max(1, math.ceil(highest / step - 1e-9))
