"""Self-contained HTML pages with embedded pictures and charts."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from openpae.runtime.escape import chart
from openpae.runtime.extras import needs
from openpae.storage.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --line: #e3e5e8; --paper: #ffffff; --tint: #f6f7f9;
  --mark: #3b6fd4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #a0a4ab; --line: #33363b; --paper: #16181b; --tint: #1f2226;
    --mark: #7ea6f4; }
  svg { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 24px 80px; background: var(--paper);
  color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 8px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 52px 0 12px; padding-top: 18px;
  border-top: 1px solid var(--line); }
p { max-width: 74ch; margin: 8px 0 14px; }
.lead { color: var(--soft); font-size: 17px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0; }
.card { flex: 1 1 140px; background: var(--tint); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 25px; font-weight: 650; letter-spacing: -0.02em; }
.card span { color: var(--soft); font-size: 13px; }
figure { margin: 18px 0 26px; }
figure img { max-width: 100%; height: auto; border-radius: 8px; display: block; }
figcaption { color: var(--soft); font-size: 14px; margin-top: 8px; max-width: 80ch; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 18px; }
.charts svg { width: 100%; max-width: 560px; height: auto; }
table { border-collapse: collapse; font-size: 14.5px; margin: 12px 0 22px; min-width: 50%; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 550; }
td { font-variant-numeric: tabular-nums; }
pre { background: var(--tint); padding: 14px 16px; border-radius: 8px; overflow-x: auto; font-size: 13px; }
.rows { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 14px;
  align-items: center; }
.rows span { color: var(--soft); font-size: 13.5px; text-align: right; max-width: 15ch;
  overflow-wrap: break-word; }
.rows img { width: 100%; border-radius: 4px; }
.radar { max-width: 560px; } .radar svg { width: 100%; height: auto; }
.rows img, figure > img { image-rendering: pixelated; cursor: zoom-in; }
figure img.large { position: fixed; inset: 0; z-index: 1; width: 100vw; height: 100vh; max-width: none;
  object-fit: contain; background: var(--paper); border-radius: 0; cursor: zoom-out; }
@media (max-width: 560px) {
  body { padding: 20px 14px 60px; }
  .rows { grid-template-columns: minmax(0, 1fr); }
  .rows span { text-align: left; max-width: none; margin-top: 6px; }
  thead { display: none; }
  tbody, tr, td { display: block; }
  tr { border-bottom: 1px solid var(--line); padding: 8px 0; }
  td { border: 0; padding: 1px 0; overflow-wrap: anywhere; }
  td:empty { display: none; }
  td::before { content: attr(data-name) " "; color: var(--soft); font-size: 13px; }
  .charts { grid-template-columns: minmax(0, 1fr); }
}
details { margin: 10px 0; } summary { cursor: pointer; color: var(--mark); }
"""

_SCRIPT = """
document.addEventListener("click", event => {
  const image = event.target.closest("figure img");
  if (image) image.classList.toggle("large");
});
document.addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  document.querySelectorAll("img.large").forEach(image => image.classList.remove("large"));
});
"""
"""A click enlarges a picture to the window; another click or Escape restores it."""


class Page:
    """A page; each method appends an element.

    Args:
        title: heading and window title.
        lead: one or two sentences below the heading.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']

    def heading(self, text: str) -> None:
        """Add the heading of a section."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def cards(self, values: Mapping[str, str]) -> None:
        """Add large numbers side by side: label -> number."""
        cards = (
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
            for name, value in values.items()
        )
        self.parts.append(f'<div class="cards">{"".join(cards)}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table of text. On a narrow screen each row becomes a block of lines."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(map(_cell, header, row))}</tr>" for row in rows)
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, image: Image.Image, caption: str, scale: int = 1) -> None:
        """Add a picture with a caption, enlarged by `scale`."""
        alt = html.escape(caption, quote=True)
        self.parts.append(
            f'<figure><img src="{_data_url(image)}" width="{image.width * scale}" alt="{alt}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def rows(self, pictures: Mapping[str, Image.Image], caption: str) -> None:
        """Add pictures of one width below each other: name -> picture."""
        cells = "".join(
            f"<span>{html.escape(name)}</span>"
            f'<img src="{_data_url(image)}" alt="{html.escape(name, quote=True)}">'
            for name, image in pictures.items()
        )
        self.parts.append(
            f'<figure><div class="rows">{cells}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
        )

    def charts(
        self,
        charts: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
        x_label: str,
        *,
        log: bool = False,
        dots: bool = False,
    ) -> None:
        """Add charts side by side: title -> name of a line -> points (x, y).

        `log` makes the y axis logarithmic. `dots` draws points without lines.
        """
        drawn = (_line_chart(title, lines, x_label, log, dots) for title, lines in charts.items() if lines)
        self.parts.append(f'<div class="charts">{"".join(drawn)}</div>')

    def radar(self, axes: Sequence[str], scores: Mapping[str, Sequence[float | None]], caption: str) -> None:
        """Add a radar plot: name of a shape -> its score on each axis, in [0, 1] or None."""
        self.parts.append(
            f'<figure class="radar">{_radar_chart(axes, scores)}'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def fold(self, summary: str, text: str) -> None:
        """Add preformatted text that a click opens."""
        self.parts.append(
            f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
        )

    def write(self, path: Path) -> None:
        """Write the page atomically."""
        page = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self.parts)
            + f"\n<script>{_SCRIPT}</script></body></html>\n"
        )
        with atomic_file(path) as partial:
            partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def _cell(name: str, text: str) -> str:
    return f'<td data-name="{html.escape(name, quote=True)}">{html.escape(text)}</td>'


def _data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def png_bytes(image: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


PALETTE = ("#3b6fd4", "#d9822b", "#2f9e6e", "#b5458f", "#7a5cc9", "#c0392b", "#16869c", "#8a6d1f")
"""Colours of lines and shapes in order, repeated after the last."""


def _line_chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    log: bool = False,
    dots: bool = False,
) -> str:
    with needs("report", "a chart"):
        from matplotlib.figure import Figure  # not pyplot, which has global state
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), colour in zip(lines.items(), itertools.cycle(PALETTE), strict=False):
        style = {"linestyle": "", "marker": "o", "markersize": 4} if dots else {"linewidth": 1.6}
        axes.plot(*zip(*points, strict=True), label=chart(name), color=colour, **style)
    axes.set_title(chart(title), fontsize=10, loc="left")
    axes.set_xlabel(chart(x_label), fontsize=8)
    if log:
        axes.set_yscale("log")
    axes.tick_params(labelsize=8)
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _radar_chart(names: Sequence[str], scores: Mapping[str, Sequence[float | None]]) -> str:
    with needs("report", "a chart"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    for (name, values), colour in zip(scores.items(), itertools.cycle(PALETTE), strict=False):
        heights = [math.nan if value is None else value for value in values]
        closed = ([*angles, angles[0]], [*heights, heights[0]])
        axes.plot(
            *closed, color=colour, linewidth=1.8, marker="o", markersize=4, label=chart(name), clip_on=False
        )
        if None not in values:
            axes.fill(*closed, color=colour, alpha=0.1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    axes.set_xticks(angles, labels=list(map(chart, names)), fontsize=9)
    axes.tick_params(axis="x", pad=9)
    axes.grid(color="#cdd1d6", linewidth=0.7)
    axes.spines["polar"].set_color("#cdd1d6")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # Without metadata, which names other servers.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
