"""The page that `moejax plan report` writes: one HTML file without any other, its colours and its drawings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from math import floor, log10

LEVELS = 7
PARTS = 6
STYLE = (
    """
:root{color-scheme:light;--page:#f7f8fa;--card:#fff;--ink:#16202b;--soft:#566373;--line:#d9dfe6;
--p0:#2f6f9f;--p1:#d98324;--p2:#4d8a5a;--p3:#8c96a3;--p4:#7d5ba6;--p5:#b5533c;--band:#2f6f9f33;
--s0:#dfeaf2;--s1:#cfe1ee;--s2:#a9cbe1;--s3:#7cafd1;--s4:#4f8fbc;--s5:#2f6f9f;--s6:#174a70;--bad:#c0392b;--good:#2e7d4f}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]){color-scheme:dark;--page:#11161c;--card:#1a212a;
--ink:#e6ebf0;--soft:#9aa7b5;--line:#303a45;--p0:#5aa2d6;--p1:#e5a04c;--p2:#76b584;--p3:#7f8b99;--p4:#a988cf;
--p5:#d97b63;--band:#5aa2d640;--s0:#2a3a4a;--s1:#23405a;--s2:#28567c;--s3:#2f6f9f;--s4:#4a90c4;--s5:#7db6de;
--s6:#b9d9ef;--bad:#ef6a5a;--good:#6fc08d}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}h1{font-size:24px;margin:0 0 2px}
h2{font-size:17px;margin:0 0 4px}p{margin:2px 0 10px;color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:16px 0;
overflow-x:auto}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.fact b{display:block;font-size:20px;white-space:nowrap}.fact span{color:var(--soft);font-size:13px}
code{font:13px ui-monospace,Menlo,Consolas,monospace;color:var(--ink);overflow-wrap:anywhere}
h3{font-size:14px;margin:18px 0 4px}svg+table{margin-top:14px}
table{border-collapse:collapse;font-size:13.5px}th,td{padding:3px 14px 3px 0;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
svg{display:block;max-width:100%;min-width:680px;height:auto}
svg text{fill:var(--ink);font-size:12px}svg .soft{fill:var(--soft)}
.axis{stroke:var(--line)}.edge{stroke:var(--card)}.bad{fill:var(--bad);color:var(--bad)}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--soft);font-size:12.5px;margin-top:8px}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
@media (max-width:520px){main{padding:18px 10px 40px}section{padding:12px}.fact b{font-size:17px}
svg.narrow{min-width:0}svg.narrow text{font-size:21px}td,th{padding-right:10px}}
"""
    + "".join(f".s{i}{{fill:var(--s{i})}}" for i in range(LEVELS))
    + "".join(f".p{i}{{fill:var(--p{i})}}" for i in range(PARTS))
)


def page(title: str, sections: Sequence[str]) -> str:
    """The HTML text of a page."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(sections)
    top = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>'
    return f"{top}\n<body><main>{body}</main></body></html>\n"


def section(title: str, text: str, *content: str) -> str:
    """A card with a heading, a sentence and its content."""
    return f"<section><h2>{escape(title)}</h2><p>{prose(text)}</p>{''.join(content)}</section>"


def prose(text: str) -> str:
    """A text for the page, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Figures side by side: (figure, its meaning)."""
    cells = "".join(f'<div class="fact"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in rows)
    return f'<div class="facts">{cells}</div>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    """A rectangle of a class, with a text that a pointer shows."""
    shape = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" class="{kind}" rx="1.5">'
    )
    return f"{shape}<title>{escape(title)}</title></rect>"


def label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def svg(width: float, height: float, parts: Sequence[str], name: str, *, narrow: bool = False) -> str:
    """A drawing, `name` for those who cannot see it. On phones a `narrow` one is as wide as the screen, with text as
    large as its room allows; others scroll."""
    kind = ' class="narrow"' if narrow else ""
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg {box}{kind} role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def level(value: float, low: float, high: float) -> int:
    """The shade of a value between the lowest and the highest one."""
    if high <= low:
        return 1
    return min(LEVELS - 1, max(0, int((value - low) / (high - low) * LEVELS)))


def scale(low: str, high: str, x: float, y: float) -> str:
    """The key of the shades: the text of the lowest and of the highest value."""
    cells = [rect(x + 18 * i, y, 17, 11, f"s{i}") for i in range(LEVELS)]
    return "".join(
        [
            label(x - 6, y + 10, low, anchor="end", kind="soft"),
            *cells,
            label(x + 18 * LEVELS + 6, y + 10, high, kind="soft"),
        ]
    )


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, float]]]], unit: str, limit: float = 0.0) -> str:
    """Horizontal bars of parts: (name, its parts as (name, begin, length)). A line marks the `limit`, if any."""
    most = max([limit, *(begin + size for _, parts in rows for _, begin, size in parts)], default=1.0) or 1.0
    names = list(dict.fromkeys(name for _, parts in rows for name, _, _ in parts))
    left, width, step = 205.0, 660.0, 30.0
    drawn, before = [], 0.0
    for at, (name, parts) in enumerate(rows):
        drawn.append(label(left - 8, at * step + 19, name, anchor="end"))
        for part, begin, size in parts:
            shown = rect(
                left + begin / most * width,
                at * step + 6,
                size / most * width,
                18,
                f"p{names.index(part) % PARTS}",
                f"{part}: {size:,.2f} {unit}",
            )
            drawn.append(shown)
        end = max((begin + size for _, begin, size in parts), default=0.0)
        whole = sum(size for _, _, size in parts)
        if at and abs(parts[0][1] - before) < 1e-9 and before:  # a bar that begins where the one before ends
            x = left + before / most * width
            drawn.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{at * step - 6:.0f}" y2="{at * step + 6:.0f}" class="axis"/>'
            )
        before = end
        drawn.append(label(left + end / most * width + 6, at * step + 19, f"{whole:,.1f} {unit}", kind="soft"))
    height = len(rows) * step + 8
    if limit:
        x = left + limit / most * width
        drawn.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height - 6:.0f}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
        )
    key = (
        f'<span><i style="background:var(--p{at % PARTS})"></i>{escape(name)}</span>' for at, name in enumerate(names)
    )
    return f'{svg(1000.0, height, drawn, "bars", narrow=True)}<div class="key">{"".join(key)}</div>'


def ticks(most: float) -> list[float]:
    """Round numbers from 0 up to `most`, four to nine of them."""
    power = 10 ** floor(log10(most))
    step = next(each for each in (power / 5, power / 2, power, 2 * power) if most / each < 8)
    return [step * i for i in range(int(most / step) + 1)]


def curve(
    points: Sequence[tuple[float, float]],
    low: Sequence[tuple[float, float]],
    high: Sequence[tuple[float, float]],
    x_name: str,
    y_name: str,
    mark: tuple[float, float] | None = None,
) -> str:
    """A line through points with the band between the lines `low` and `high`, and one point marked."""
    left, top, width, height = 70.0, 12.0, 780.0, 260.0
    xs = [x for x, _ in (*points, *low, *high)]
    ys = [y for _, y in (*points, *low, *high)]
    most_x, most_y = max(xs, default=1.0) * 1.05 or 1.0, max(ys, default=1.0) * 1.05 or 1.0

    def at(point: tuple[float, float]) -> str:
        return f"{left + point[0] / most_x * width:.1f},{top + height - point[1] / most_y * height:.1f}"

    area = " ".join(map(at, [*high, *reversed(low)]))
    drawn = [f'<polygon points="{area}" fill="var(--band)"/>']
    drawn.append(f'<polyline points="{" ".join(map(at, points))}" fill="none" stroke="var(--p0)" stroke-width="2"/>')
    for point in points:
        x, y = at(point).split(",")
        drawn.append(
            f'<circle cx="{x}" cy="{y}" r="3" class="p0"><title>{point[0]:,.1f}; {point[1]:,.1f}</title></circle>'
        )
    if mark is not None:
        x, y = at(mark).split(",")
        drawn.append(f'<circle cx="{x}" cy="{y}" r="6" fill="var(--p1)"><title>this plan</title></circle>')
    for value in ticks(most_y):
        y = top + height - value / most_y * height
        drawn.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" class="axis"/>')
        drawn.append(label(left - 6, y + 4, f"{value:,.0f}", anchor="end", kind="soft"))
    for value in ticks(most_x):
        drawn.append(
            label(left + value / most_x * width, top + height + 16, f"{value:,.0f}", anchor="middle", kind="soft")
        )
    drawn += [label(left, top + height + 42, x_name, kind="soft"), label(left + 6, top + 14, y_name, kind="soft")]
    return svg(left + width + 30, top + height + 50, drawn, f"{y_name} against {x_name}", narrow=True)
