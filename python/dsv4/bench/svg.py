"""Plots as SVG text: axes with round numbers, lines, bands and a legend. No scripts, no fonts, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 44
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c", "#0891b2", "#be185d", "#4d7c0f")
TICKS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) in order; those that are None are left out."""

    name: str
    points: Sequence[tuple[float | None, float | None]]
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high)."""
    dots: bool = False
    """Only the points themselves are drawn."""

    @property
    def whole(self) -> list[tuple[float, float]]:
        """Points that have both."""
        return [(x, y) for x, y in self.points if x is not None and y is not None]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot with one pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    marks: Sequence[tuple[float, str]] = field(default=())
    """Values of x at which a dashed line stands, and what it means."""

    def svg(self) -> str:
        """An element; a sentence where there is nothing to draw."""
        drawn = [line for line in self.lines if line.whole]
        if not drawn:
            return f"<p>{escape(self.title)}: nothing to draw.</p>"
        xs = [x for line in drawn for x, _ in line.whole] + [x for x, _ in self.marks]
        ys = [y for line in drawn for _, y in line.whole] + [h for line in drawn for _, _, h in line.band]
        across = _Axis.over(xs, LEFT, WIDTH - RIGHT, log=self.log_x)
        up = _Axis.over([0.0, *ys], HEIGHT - BOTTOM, TOP)
        parts = [*self._frame(across, up)]
        for i, line in enumerate(drawn):
            parts += _drawn(line, COLOURS[i % len(COLOURS)], across, up)
        parts += self._legend(drawn)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">'
            + "".join(parts)
            + "</svg>"
        )

    def _frame(self, across: _Axis, up: _Axis) -> list[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = [f'<text x="{LEFT}" y="18" class="title">{escape(self.title)}</text>']
        for value in up.ticks:
            y = up.at(value)
            parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in across.ticks:
            x = across.at(value)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" class="axis"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{number(value)}</text>')
        for value, name in self.marks:
            x = across.at(value)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="mark"/>')
            parts.append(f'<text x="{x + 4:.1f}" y="{TOP + 10}">{escape(name)}</text>')
        parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" class="axis" fill="none"/>')
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x)}</text>'
        )
        turned = f'transform="rotate(-90 14 {middle})"'
        parts.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{escape(self.y)}</text>')
        return parts

    @staticmethod
    def _legend(lines: Sequence[Line]) -> list[str]:
        if len(lines) < 2:
            return []
        parts = []
        for i, line in enumerate(lines):
            y, colour = HEIGHT - BOTTOM - 10 - 14 * (len(lines) - 1 - i), COLOURS[i % len(COLOURS)]
            parts.append(
                f'<rect x="{WIDTH - RIGHT - 150}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
            )
            parts.append(f'<text x="{WIDTH - RIGHT - 136}" y="{y + 1}">{escape(line.name)}</text>')
        return parts


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, *, log: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if log:
            low = max(low, high / 1e6, 1e-6)
        if high <= low:
            high = low * 1.1 if low > 0 else low + 1
        return cls(low, high, begin, end, log)

    def at(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    @property
    def ticks(self) -> list[float]:
        """Round numbers within."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first < 4 else (1,)
            every = [m * 10.0**p for p in range(first, last + 1) for m in steps]
            return [v for v in every if self.low <= v <= self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / TICKS))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= TICKS)
        first = math.ceil(self.low / step)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _drawn(line: Line, colour: str, across: _Axis, up: _Axis) -> list[str]:
    parts, points = [], [(across.at(x), up.at(y)) for x, y in line.whole]
    if line.band:
        edge = [(across.at(x), up.at(high)) for x, _, high in line.band]
        edge += [(across.at(x), up.at(low)) for x, low, _ in reversed(line.band)]
        parts.append(f'<polygon points="{_list(edge)}" fill="{colour}" opacity="0.15"/>')
    if line.dots:
        return parts + [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="{colour}" opacity="0.6"/>' for x, y in points
        ]
    parts.append(f'<polyline points="{_list(points)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    if len(points) < 30:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
    return parts


def _list(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def number(value: float) -> str:
    """`1.5k`, `20`, `0.05`."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
