"""What makes a site of pages that are written for GitHub: contents, links to the sources, and Markdown beside HTML.

`index.md` has the form of llms.txt (https://llmstxt.org): headings with lists of links. The contents in the sidebar are
read from it, and it is published under that name too, so that there is one list of pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from generated import BELOW, COMMANDS, ROOT_PAGES
from sphinx.application import Sphinx
from sphinx.writers.text import TextTranslator

CODE = r"(?P<code>^```.*?^```|`[^`\n]*`)"
LINK = re.compile(
    CODE + r"|(?P<image>!?)\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>(?!\w+:|#)[^)\s]+)\)", re.M | re.S
)
MOVED = {f"../{source}": f"{name}.md" for name, source in ROOT_PAGES.items()}
HEADING = re.compile(r"^## (.+)$", re.M)
ENTRY = re.compile(r"^- \[[^\]]+\]\(([^)#]+)\.md\)", re.M)
ROW = re.compile(r"^\| `((?:data )?[\w-]+)([^`]*)` \|", re.M)


def setup(app: Sphinx) -> dict[str, Any]:
    """Hook the steps in."""
    app.add_config_value("repository", "", "env", str)
    app.connect("source-read", read)
    app.connect("html-page-context", head)
    app.connect("build-finished", publish)
    if "sphinx.ext.autodoc" in app.extensions:
        app.connect("autodoc-process-docstring", plain, priority=100)  # before Args and Returns become markup
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """A page as Sphinx reads it."""
    text = published(source[0], docname, app.config.repository)
    if docname == "index":
        text += contents(source[0])
    if below := BELOW.get(docname):
        text += toctree("", below)
    source[0] = text


def published(text: str, docname: str, repository: str) -> str:
    """A page's Markdown as the site has it: links that leave the folder lead to the repository, where one is known; in
    the table of commands, each leads to its page.
    """

    def link(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        path, _, fragment = match["target"].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(docname), path))
        if not target.startswith("../"):
            return match[0]
        if target in MOVED:
            return f"[{match['text']}]({posixpath.relpath(MOVED[target], posixpath.dirname(docname))})"
        if not repository:
            return match["text"]
        return f"[{match['text']}]({repository}/blob/main/{target[3:]}{'#' + fragment if fragment else ''})"

    if docname == "commands":
        text = ROW.sub(lambda row: f"| [`{row[1]}{row[2]}`]({COMMANDS}/{row[1].replace(' ', '-')}.md) |", text)
    return LINK.sub(link, text)


def contents(index: str) -> str:
    """The sidebar's contents: a hidden toctree for every heading of the index that has a list of pages."""
    _, *parts = HEADING.split(index)
    pairs = zip(parts[::2], map(ENTRY.findall, parts[1::2]), strict=True)
    return "".join(toctree(heading, pages) for heading, pages in pairs if pages)


def toctree(caption: str, pages: list[str]) -> str:
    """A hidden toctree, absolute, in MyST's Markdown."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n\n```{toctree}\n" + "\n".join([*options, "", *(f"/{page}" for page in pages)]) + "\n```\n"


def head(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Each page names its Markdown twin."""
    if doctree is not None:
        name = posixpath.basename(pagename)
        context["metatags"] += f'<link rel="alternate" type="text/markdown" href="{name}.md">'


def plain(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text but for code in backticks: what reStructuredText takes for markup stands for itself."""
    lines[:] = [
        "`".join(
            re.sub(r"[*|]", r"\\\g<0>", part) if number % 2 == 0 else part
            for number, part in enumerate(line.split("`"))
        )
        for line in lines
    ]


def publish(app: Sphinx, error: Exception | None) -> None:
    """Beside each page its Markdown, and the index as llms.txt."""
    if error is not None or app.builder.format != "html":
        return
    for docname in sorted(app.env.found_docs):
        text = Path(app.env.doc2path(docname)).read_text(encoding="utf-8")
        text = published(text, docname, app.config.repository)
        if "```{eval-rst}" in text:  # docstrings, which only Sphinx has read
            resolved = app.env.get_and_resolve_doctree(docname, app.builder)
            visitor = TextTranslator(resolved, app.builder)  # type: ignore[arg-type]
            resolved.walkabout(visitor)
            text = visitor.body
        twin = Path(app.outdir) / f"{docname}.md"
        twin.parent.mkdir(parents=True, exist_ok=True)
        twin.write_text(text, encoding="utf-8")
        if docname == "index":
            text = re.sub(r"^!\[.*\n\n", "", text, flags=re.M)
            listed = re.sub(r"\]\(((?!\w+:)[^)]+)\)", rf"]({app.config.html_baseurl}\1)", text)
            (Path(app.outdir) / "llms.txt").write_text(listed, encoding="utf-8")
