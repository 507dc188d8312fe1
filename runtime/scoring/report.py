"""A page that shows what was scored: a histogram, the best and the worst, and what is broken."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.errors import Owl2Error
from owl2.runtime.harmless import harmless
from owl2.runtime.preprocess import read_image
from owl2.runtime.scoring.summary import Summary, TaskSummary

BINS = 40
SIDE = 220
"""Longer side of a thumbnail, pixels."""
STYLE = """
:root { --back: #fbfaf8; --panel: #f1efeb; --text: #1d1c1a; --soft: #65615a; --accent: #7a3e9d;
  font: 16px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --back: #17171a; --panel: #202024; --text: #ececee; --soft: #a5a5ad; --accent: #c79be3; } }
body { background: var(--back); color: var(--text); max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.soft, figcaption { color: var(--soft); font-size: .85rem; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: .6rem; padding: .5rem; }
figure img { width: 100%; height: 9rem; object-fit: contain; display: block; }
figcaption { overflow-wrap: anywhere; } figcaption b { color: var(--text); font-size: 1rem; display: block; }
svg { width: 100%; height: auto; } rect { fill: var(--accent); } text { fill: var(--soft); font-size: 12px; }
table { border-collapse: collapse; width: 100%; } td { padding: .3rem; vertical-align: top; overflow-wrap: anywhere; }
"""


def report_page(title: str, summary: Summary) -> bytes:
    """The page, without any address outside itself; images that have gone meanwhile are named."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><h1>{_text(title)}</h1>",
    ]
    for task, found in summary.tasks.items():
        parts.append(_task(task, found))
    if summary.broken:
        parts.append(_errors(summary))
    return "".join([*parts, "</body></html>\n"]).encode()


def _task(task: str, found: TaskSummary) -> str:
    numbers = np.frombuffer(found.values)
    figures = (
        f"{len(numbers):,} images; mean {numbers.mean():.3f}, median {np.median(numbers):.3f}, "
        f"from {numbers.min():.3f} to {numbers.max():.3f}"
    )
    best = found.best[::-1]
    worst = found.worst[: len(numbers) - len(best)]
    blocks = [f'<h2>{_text(task)}</h2><p class="soft">{figures}</p>', _histogram(numbers)]
    for name, group in (("The best", best), ("The worst", worst)):
        if group:
            shown = "".join(_figure(value, image) for value, image in group)
            blocks.append(f'<h3>{name}</h3><div class="images">{shown}</div>')
    return "".join(blocks)


def _histogram(numbers: NDArray[np.float64]) -> str:
    low, high = float(numbers.min()), float(numbers.max())
    width = (high - low) / BINS if high - low > 1e-6 else 1.0  # numbers have an end, and so have bins
    counts = np.histogram(numbers, BINS, (low, low + BINS * width))[0].tolist()
    most = max(counts)
    bars = "".join(
        f'<rect x="{index * 20}" y="{160 - 150 * count / most:.1f}" width="18" height="{150 * count / most:.1f}">'
        f"<title>{low + index * width:.3f} to {low + (index + 1) * width:.3f}: {count}</title></rect>"
        for index, count in enumerate(counts)
    )
    ends = (
        f'<text x="0" y="178">{low:.3f}</text><text x="{BINS * 20}" y="178" text-anchor="end">{high:.3f}</text>'
        f'<text x="{BINS * 10}" y="178" text-anchor="middle">the highest bar: {most:,} images</text>'
    )
    return f'<svg viewBox="0 0 {BINS * 20} 184" role="img" aria-label="Histogram of the scores">{bars}{ends}</svg>'


def _figure(value: float, image: str) -> str:
    return f"<figure>{_thumbnail(image)}<figcaption><b>{value:.3f}</b>{_text(image)}</figcaption></figure>"


def _thumbnail(image: str) -> str:
    try:
        shown = read_image(Path(image)).image
    except Owl2Error:
        return "<p>no preview</p>"
    shown.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'


def _errors(summary: Summary) -> str:
    rows = "".join(f"<tr><td>{_text(image)}</td><td>{_text(error)}</td></tr>" for image, error in summary.errors)
    left = summary.broken - len(summary.errors)
    more = f"<p>and {left:,} more</p>" if left else ""
    return f"<h2>Not scored: {summary.broken:,}</h2><table>{rows}</table>{more}"


def _text(text: str) -> str:
    return html.escape(harmless(text))
