"""The site: `make docs` builds it into build/docs/html, without a network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from mae_deploy import __version__

project = "mae-deploy"
author = "The mae-deploy authors"
copyright = "The mae-deploy authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated", "pages"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext", "_static"]

# Where the sources can be looked at, for links that leave docs/; a workflow on GitHub knows.
repository = (
    "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}".format_map(os.environ) if "GITHUB_REPOSITORY" in os.environ else ""
)

nitpicky = True
# Without a network nothing outside is known; of what is ours, what a program does not name need not be on the page.
INNER = r"mae_deploy\.(images\.geometry|runtime\.(engines|manifest|tolerance|cache\.CacheShape|streams\.model))"
nitpick_ignore_regex = [("py:.*", r"(?!mae_deploy).*"), ("py:.*", rf"{INNER}\b.*")]
smartquotes = False  # they make one dash of the two before an option
default_role = "literal"  # docstrings are Markdown as far as that goes

myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"mae-deploy {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_baseurl = os.environ.get("SITE_URL", "")
html_copy_source = html_show_sourcelink = False  # each page has a Markdown twin instead
html_theme_options = {"sidebar_hide_name": False}
