"""A line chart as an SVG string: several runs over one field, for a page that needs no script and no network.

Drawn here and not by matplotlib, whose SVG has no titles: pointing at a line shows run, step and value, and text and
grid take the page's colours, light or dark.
"""

import itertools
import math
from html import escape
from typing import NamedTuple

# Okabe and Ito's palette, told apart by colour-blind readers, without its yellow and black: readable on light and dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 34
POINTS = 300  # drawn per line; more steps are averaged, else a week's log makes a page of many megabytes


class Line(NamedTuple):
    name: str
    colour: str
    steps: list[int]
    values: list[float]


def thin(steps: list[int], values: list[float], points: int = POINTS) -> tuple[list[int], list[float]]:
    """At most `points` of a series: the mean of the values and the last step of each of equally many neighbours."""
    if len(steps) <= points:
        return steps, values
    cuts = [round(i * len(steps) / points) for i in range(points + 1)]
    spans = list(itertools.pairwise(cuts))
    return [steps[b - 1] for _, b in spans], [math.fsum(values[a:b]) / (b - a) for a, b in spans]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten apart) from at most low to at least high."""
    if high <= low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """1500000 -> 1.5M, 0.00012 -> 1.2e-4."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def line_chart(lines: list[Line], label: str, *, from_zero: bool = False, percent: bool = False) -> str:
    """SVG of values over steps. label: what a screen reader says. from_zero: the axis begins there; percent: 0.5 is
    50 %."""
    lines = [line._replace(steps=s, values=v) for line in lines for s, v in [thin(line.steps, line.values)] if s]
    if not lines:
        raise ValueError(f"nothing to draw for {label}")
    values = [v for line in lines for v in line.values]
    ys = ticks(min([0.0, *values] if from_zero else values), max(values))
    xs = ticks(0, max(line.steps[-1] for line in lines), 6)
    if xs[-1] > 1.12 * max(line.steps[-1] for line in lines):
        xs = xs[:-1]  # the axis ends where the data does; a tick far beyond would only be empty space
    right = max(xs[-1], max(line.steps[-1] for line in lines))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / right

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ys[0]) / (ys[-1] - ys[0])

    def text(value: float) -> str:
        return f"{100 * value:.4g} %" if percent else short(value)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{text(tick)}</text>')
    for tick in xs:
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    for line in lines:
        points = [(x(s), y(v)) for s, v in zip(line.steps, line.values)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" stroke="{line.colour}"/>')
        visible = len(points) <= 40
        every = -(-len(points) // 75)
        for (a, b), step, value in list(zip(points, line.steps, line.values))[::every]:
            # Invisible ones are there to be pointed at: the browser shows their title.
            radius, fill = (3, line.colour) if visible else (6, "transparent")
            title = f"{escape(line.name)}, step {step}: {text(value)}"
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}" fill="{fill}"><title>{title}</title></circle>'
            )
    return "".join(parts) + "</svg>"
