"""The site: every page is in its contents, every option on a page, and each page has its Markdown beside it.

`make docs` builds all of it; here a small one is built.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_ext")


def extension(name: str) -> Any:
    return importlib.import_module(name)


def test_the_index_lists_every_page_once() -> None:
    listed = extension("pages").ENTRY.findall((DOCS / "index.md").read_text(encoding="utf-8"))
    there = [path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")]
    built_there = ("reference/commands/", "reference/settings", "examples", "changelog", "contributing")
    there = [page for page in there if page != "index" and not page.startswith(built_there)]
    assert sorted(listed) == sorted(there)


def test_a_command_has_a_page_with_every_option() -> None:
    pages = dict(extension("generated").command_pages())
    options = json.loads((ROOT / "tests" / "command_options.json").read_text())
    assert sorted(pages) == sorted(options)
    for command, forms in options.items():
        names = {form.split("/")[0].replace("|", "\\|") for form in forms} - {"--help", "--help-all"}
        assert {name for name in names if f"| `{name}`" not in pages[command]} == set(), command


def test_options_are_shown_with_what_they_take_their_default_and_their_key() -> None:
    page = dict(extension("generated").command_pages())["pretrain"]
    assert "mae-deploy pretrain DATA --out PATH [OPTIONS]" in page
    assert "| `--mask-ratio` | `NUMBER` | `0.75` | Share of the patches that the encoder does not see. |" in page
    assert re.search(r"^\| `--blr` \| `NUMBER` \| `0\.00015` \| .*\(`optim\.blr`\) \|$", page, re.MULTILINE)
    assert "`mae-deploy[train]`" in page


def test_every_table_row_has_as_many_cells_as_its_heading() -> None:
    generated = extension("generated")
    for text in [*dict(generated.command_pages()).values(), generated.settings_page()]:
        for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_settings_are_there_with_bounds_and_choices() -> None:
    page = extension("generated").settings_page()
    assert re.search(r"^\| `drop_path` \| number \| .* at least 0, below 1 ", page, re.MULTILINE)
    assert "`optim` of " in page
    assert "``" not in page, "a value that is empty"


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        (
            "https://e.org/r",
            "see [the `x`](https://e.org/r/blob/main/pretrain/targets.py#L3) and [b](b.md#c), `[d](../e)`",
        ),
        ("", "see the `x` and [b](b.md#c), `[d](../e)`"),
    ],
    ids=["known", "unknown"],
)
def test_links_that_leave_the_folder_lead_to_the_repository(repository: str, expected: str) -> None:
    text = "see [the `x`](../../pretrain/targets.py#L3) and [b](b.md#c), `[d](../e)`"
    assert extension("pages").published(text, "guide/a", repository) == expected


def test_links_to_pages_that_were_moved_into_the_site_lead_there() -> None:
    text = "[examples](../../examples/README.md#here)"
    assert extension("pages").published(text, "guide/a", "https://e.org/r") == "[examples](../examples.md)"


def test_commands_in_the_table_lead_to_their_pages() -> None:
    row = "| `data pack SRC OUT` | as shards | base |"
    linked = "| [`data pack SRC OUT`](reference/commands/data-pack.md) | as shards | base |"
    assert extension("pages").published(row, "commands", "") == linked


def test_a_site_is_built_with_markdown_beside_each_page(tmp_path: Path) -> None:
    source, out = tmp_path / "docs", tmp_path / "html"
    source.mkdir()
    configuration = f'import sys\nsys.path.insert(0, {str(DOCS / "_ext")!r})\nextensions = ["myst_parser", "pages"]\n'
    (source / "conf.py").write_text(f'{configuration}html_baseurl = "https://e.org/"\nmyst_heading_anchors = 3\n')
    (source / "index.md").write_text("# Site\n\n> What it is.\n\n## Guide\n\n- [One](guide/one.md): the first\n")
    (source / "guide").mkdir()
    (source / "guide" / "one.md").write_text("# One\n\n## Here\n\nText, [here](#here), [code](../../x.py).\n")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", str(source), str(out)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert (out / "llms.txt").read_text().endswith("- [One](https://e.org/guide/one.md): the first\n")
    assert (out / "guide" / "one.md").read_text().endswith("Text, [here](#here), code.\n")
    page = (out / "guide" / "one.html").read_text()
    assert '<link rel="alternate" type="text/markdown" href="one.md">' in page
    assert 'href="#here"' in page
    assert 'href="guide/one.html"' in (out / "index.html").read_text()


def test_the_pictures_of_the_concepts_are_as_they_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = importlib.import_module("scripts.draw_concepts")
    monkeypatch.setattr(sys, "argv", ["draw_concepts", "--out", str(tmp_path)])
    drawing.main()
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "concepts").glob("*.svg")}


def test_the_overview_reads_what_the_benchmark_printed() -> None:
    page = (DOCS / "results" / "cpu.md").read_text(encoding="utf-8")
    found = importlib.import_module("scripts.draw_overview").latencies(page)
    assert list(found["fp32", "onnxruntime"]) == [196, 20, 49, 98, 147]
    assert {kind: sorted(points) for kind, points in found.items() if kind[0] == "int8"} == {
        ("int8", "onnxruntime"): [49, 196],
        ("int8", "openvino"): [49, 196],
    }


def test_the_plots_read_the_tables_of_their_pages() -> None:
    drawing = importlib.import_module("scripts.draw_results")
    arms = drawing.distilled((DOCS / "results" / "distillation.md").read_text(encoding="utf-8"))
    assert {
        "MAE, 10 epochs → fine-tuned": [56.56],
        "MAE, 5 epochs → fine-tuned": [53.89, 54.94, 55.60],
    }.items() <= arms.items()
    models = drawing.fewer_patches((DOCS / "results" / "gpu-h200.md").read_text(encoding="utf-8"))
    assert models["ViT-B"] == {1: 1.10, 8: 1.62, 32: 2.82, 128: 3.63}
    assert sorted(models) == ["ViT-B", "ViT-L", "ViT-S", "ViT-T"]


def test_pages_of_the_repository_itself_are_on_the_site(tmp_path: Path) -> None:
    extension("generated").write(tmp_path)
    page = (tmp_path / "contributing.md").read_text(encoding="utf-8")
    assert "](architecture.md)" in page
    assert "](../LICENSE)" in page
    assert "](https://keepachangelog.com" in (tmp_path / "changelog.md").read_text(encoding="utf-8")
    assert "](../examples/camera.py)" in (tmp_path / "examples.md").read_text(encoding="utf-8")
    assert (tmp_path / "reference" / "commands" / "data-pack.md").is_file()


def test_docstrings_are_plain_text_but_for_code() -> None:
    lines = ["a pattern such as 'x/*.png', `a | b` or a | b", "**options"]
    extension("pages").plain(None, "function", "f", None, None, lines)
    assert lines == ["a pattern such as 'x/\\*.png', `a | b` or a \\| b", "\\*\\*options"]
