"""A page of Markdown as one HTML file: nothing is loaded from elsewhere, and its pictures are in it."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2em; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #8886; text-align: left; white-space: nowrap; }
td:first-child { white-space: normal; }
pre { padding: 0.75rem; overflow-x: auto; background: #8882; }
img { max-width: 100%; background: white; }
figure { margin: 1.5em 0; }
figcaption { font-size: 0.9em; opacity: 0.75; }
"""

_PICTURE = re.compile(r'<p><img src="([^":]+)" alt="([^"]*)" /></p>')


def as_html(title: str, markdown: str, folder: Path) -> str:
    """The page, whose pictures are PNG files in the folder; HTML within it is shown as text, but for line breaks."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown).replace("&lt;br&gt;", "<br>")
    embedded = _PICTURE.sub(lambda found: _figure(_data(folder / found[1]), found[2]), body)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n{embedded}</html>\n"
    )


def _figure(source: str, caption: str) -> str:
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _data(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
