"""Line charts as SVG text, written by hand so that no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, told apart by people with colour vision deficiencies too."""

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 62, 50
_LETTER = 6.6
"""Rough width of a letter, to set the names of lines apart."""

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str, x_label: str, y_label: str, series: Mapping[str, Points], *, log_y: bool = False
) -> str:
    """A chart with one line per entry of ``series``; its name stands above.

    ValueError: no point at all, or one that is not finite, or not above 0 on a logarithmic axis.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("there is nothing to draw")
    if not all(math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y) for x, y in points):
        raise ValueError("a point cannot be drawn")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    if log_y:
        y_ticks = log_ticks(y_low, y_high)
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
        at_y = _scale(math.log(y_low), math.log(y_high), _HEIGHT - _BOTTOM, _TOP, math.log)
    else:
        y_ticks = ticks(min(0.0, y_low), y_high)
        at_y = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    x_ticks = [tick for tick in ticks(x_low, x_high) if x_low <= tick <= x_high]
    at_x = _scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(_LEFT, 24, title, "start", "font-size:15px;font-weight:bold"),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_label, "middle"),
        f'<g transform="translate(16 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)">'
        f"{_text(0, 0, y_label, 'middle')}</g>",
    ]
    for tick in y_ticks:
        height = at_y(tick)
        parts.append(f'<path d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, height + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        parts.append(f'<path d="M{at_x(tick):.1f} {_HEIGHT - _BOTTOM}v5" stroke="#333"/>')
        parts.append(_text(at_x(tick), _HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle"))
    parts.append(
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#333"/>'
    )
    legend = float(_LEFT)
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(line) <= 30:
            parts += [
                f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{colour}"/>' for x, y in line
            ]
        parts.append(f'<path d="M{legend:.1f} 42h20" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(legend + 26, 46, name, "start"))
        legend += 46 + _LETTER * len(name)
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers, evenly spaced, the first at or below ``low`` and the last at or above ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from at or below ``low`` to at or above ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    below = [tick for tick in found if tick <= low]
    above = [tick for tick in found if tick >= high]
    return [tick for tick in found if below[-1] <= tick <= above[0]]


def _scale(
    low: float, high: float, start: float, end: float, shape: Callable[[float], float] = float
) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (shape(value) - low) / span * (end - start)


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    styled = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222"{styled}>{escape(text)}</text>'
