"""Prose of a MediaWiki dump as two text files with different articles: for calibration and for measuring.

Every second article goes to the measured text. Only paragraphs are kept, without tables, lists, headings, references
and talk pages. Needs ``pip install wikitextparser``.
"""

from __future__ import annotations

import argparse
import bz2
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 200
"""Of a paragraph."""


def articles(dump: Path) -> Iterator[str]:
    """The wiki text of each article, without redirects."""
    with bz2.open(dump) as stream:
        for _, page in ET.iterparse(stream):
            if page.tag.endswith("}page"):
                source = page.findtext(".//{*}revision/{*}text") or ""
                if page.findtext("{*}ns", "0") == "0" and not source.lower().startswith("#redirect"):
                    yield source
                page.clear()


def paragraphs(source: str) -> list[str]:
    """Paragraphs of one article."""
    from wikitextparser import parse, remove_markup

    page = parse(source)
    for part in (*page.get_tags("ref"), *page.tables, *page.templates):
        if part.span is not None and part.string:
            part.string = ""
    lines = [line.strip() for line in remove_markup(page.string).splitlines()]
    return [line for line in lines if len(line) >= MIN_CHARACTERS and line[0].isalpha() and line[-1] in '.?!"']


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="pages-articles as .xml.bz2")
    parser.add_argument("calibration", type=Path, help="text file to write")
    parser.add_argument("measured", type=Path, help="text file to write")
    options = parser.parse_args()
    texts = ["\n\n".join(found) for source in articles(options.dump) if (found := paragraphs(source))]
    for path, chosen in ((options.calibration, texts[0::2]), (options.measured, texts[1::2])):
        path.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
        print(f"{path}: {len(chosen)} articles, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
