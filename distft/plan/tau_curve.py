"""What `stm` would mask against its tau, as a picture for the page of tokens."""

from __future__ import annotations

import math
from html import escape

from distft.plan.show import percent
from distft.plan.tokens import TAUS, TokenPlan


def tau_curve(plan: TokenPlan, tau: float | None) -> str:
    """Shares of tokens and of cross-entropy as an SVG element; `tau` is the run's own, where it has one."""
    left, right, top, bottom, width, height = 40.0, 14.0, 12.0, 40.0, 440.0, 250.0
    low, high = math.log(1.05), math.log(3000)

    def x(value: float) -> float:
        return left + (math.log(value) - low) / (high - low) * (width - left - right)

    def y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid-line" x1="{left}" x2="{width - right}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    for value in TAUS:
        parts.append(f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y(0):.1f}" y2="{y(0) + 4:.1f}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{y(0) + 17:.1f}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    parts.append(
        f'<text x="{(left + width - right) / 2:.1f}" y="{height - 4:.1f}" text-anchor="middle">'
        "tau: the highest perplexity that is learned</text>"
    )
    if tau is not None and low <= math.log(tau) <= high:
        parts.append(f'<line class="at" x1="{x(tau):.1f}" x2="{x(tau):.1f}" y1="{y(1):.1f}" y2="{y(0):.1f}"/>')
        parts.append(f'<text class="at-name" x="{x(tau) + 5:.1f}" y="{y(0) - 6:.1f}">this run</text>')
    fine = plan.sweep([math.exp(low + (high - low) * n / 90) for n in range(91)])
    marked = plan.sweep(TAUS)
    for unit, name, near in (("ce", "cross-entropy masked", 25.0), ("tokens", "tokens masked", 10.0)):
        points = "L".join(f"{x(one['tau']):.1f} {y(one[unit]):.1f}" for one in fine)
        parts.append(f'<path class="line {unit}" d="M{points}"/>')
        parts += [f'<circle class="dot {unit}" cx="{x(one["tau"]):.1f}" cy="{y(one[unit]):.1f}" r="3"/>' for one in marked]
        at = plan.sweep([near])[0][unit]
        parts.append(f'<text class="name {unit}" x="{x(near) + 8:.1f}" y="{y(at) - 8:.1f}">{name}</text>')
    told = "; ".join(f"tau {one['tau']:g}: {percent(one['tokens'])} of tokens, {percent(one['ce'])} of CE" for one in marked)
    return f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>'
