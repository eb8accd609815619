"""The report as one self-contained HTML file: no script, no font, no address outside itself."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from mim_ray.pipeline.report.neighbors import NeighborFigure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#202124;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:.2rem} h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-bottom:1px solid #dadce0}
p.note{color:#5f6368;margin:.2rem 0 .8rem} table{border-collapse:collapse;margin:.6rem 0}
th,td{padding:.25rem .8rem;border-bottom:1px solid #eceff1;text-align:right;white-space:nowrap} th{color:#5f6368;font-weight:600}
th:first-child,td:first-child{text-align:left} .cards{display:flex;gap:1rem;flex-wrap:wrap;margin:1rem 0}
.card{border:1px solid #dadce0;border-radius:10px;padding:.7rem 1.1rem;min-width:9rem}
.card b{display:block;font-size:1.5rem} .card span{color:#5f6368;font-size:.85rem}
.strip{display:flex;gap:.5rem;align-items:flex-start;margin:.3rem 0}
figure{margin:0;width:76px;text-align:center} figcaption{font-size:.65rem;color:#5f6368;line-height:1.15;overflow-wrap:anywhere}
figure.query{padding-right:.7rem;border-right:2px solid #1a73e8} img{width:72px;height:72px;object-fit:contain;border-radius:6px}
svg{max-width:100%;height:auto}
"""


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="note">{html.escape(subtitle)}</p>{"".join(sections)}</body></html>'
    )


def section(title: str, note: str, *parts: str) -> str:
    """A heading, one sentence on how to read what follows, and the parts (HTML)."""
    return f'<section><h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>{"".join(parts)}</section>'


def cards(figures: Sequence[tuple[str, str]]) -> str:
    """The few numbers that matter most: (value, what it is)."""
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in figures)
        + "</div>"
    )


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def neighbor_strips(figure: NeighborFigure) -> str:
    """One strip of pictures per item and stage: the item, then its nearest neighbors."""
    parts = []
    for stage in figure.stages:
        agreement = "" if stage.style_agreement is None else f", style agreement {stage.style_agreement:.2f}"
        parts.append(f"<h3>{html.escape(stage.title + agreement)}</h3>")
        for row in stage.rows:
            pictures = [_picture(figure, int(index), query=position == 0) for position, index in enumerate(row)]
            parts.append(f'<div class="strip">{"".join(pictures)}</div>')
    return "".join(parts)


def _picture(figure: NeighborFigure, index: int, query: bool) -> str:
    title = html.escape(figure.titles[index][:48])
    kind = ' class="query"' if query else ""
    return f'<figure{kind}><img src="{figure.pictures[index]}" alt="{title}"><figcaption>{title}</figcaption></figure>'
