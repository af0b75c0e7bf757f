"""`mae-deploy search`: the neighbours of an image, and what to clean a collection of."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_deploy.commands.search.config import SearchConfig
from mae_deploy.embedding.cleaning import duplicates, outliers
from mae_deploy.embedding.job import bundle_hash
from mae_deploy.embedding.neighbours import Approximate, Exact, Neighbours, recall
from mae_deploy.embedding.pictures import Cell, Pictures, placed, write_grid
from mae_deploy.embedding.vectors import Vectors
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import atomic_path, refuse_to_overwrite, write_text
from mae_deploy.images.read import UnreadableImage
from mae_deploy.progress import notice, progress
from mae_deploy.reporting.html import as_html
from mae_deploy.reporting.tables import Column, Table, stacked
from mae_deploy.results import Result
from mae_deploy.runtime.backbone import Backbone

_EXACT_UP_TO = 100_000
"""Images of which all products are computed: minutes on two cores."""

_SAMPLED = 200
"""Images by which the recall of an index is measured."""

_SHOWN = 20
"""Rows of a table on the terminal."""

_ROWS, _ACROSS = 12, 8
"""Of a picture."""


def run_search(config: SearchConfig) -> Result:
    """Search for what was asked for.

    Raises:
        CheckFailed: the bundle is not the one that computed the features, or the image cannot be read.
        ConfigError: no features, no such output, or `out` is there.
        MissingDependency: pyarrow or usearch is absent.
    """
    if config.out is not None:
        refuse_to_overwrite(config.out)
    found = Vectors.read(config.features, config.output)
    notice("features:", f"'{found.output}' of {len(found.ids)} images in {config.features}")
    near, data = _neighbours(config, found)
    pictures = _pictures(config, found)
    searches = [
        search(config, found, near, pictures)
        for wanted, search in (
            (config.image is not None, _neighbours_of),
            (config.duplicates, _duplicates),
            (config.outliers, _outliers),
        )
        if wanted
    ]
    if config.out is not None:
        with atomic_path(config.out) as aside:
            aside.mkdir()
            for name, rows, table, grid in searches:
                _write(aside, name, found, rows, table, grid)
    out = None if config.out is None else str(config.out)
    return Result(
        {**data, **{name: rows for name, rows, *_ in searches}, "out": out},
        stacked([table for _, _, table, _ in searches]),
    )


Grid = Sequence[Sequence[Cell]]

Found = tuple[str, list[dict[str, Any]], Table, Grid]
"""Name of a search, its rows, those that are shown, and the picture."""


def _neighbours(config: SearchConfig, found: Vectors) -> tuple[Neighbours, dict[str, Any]]:
    count = len(found.ids)
    exact = config.method == "exact" or (config.method == "auto" and count <= _EXACT_UP_TO)
    data = {"images": count, "output": found.output, "method": "exact" if exact else "approximate", "recall": None}
    if exact:
        return Exact(found.rows), data
    with progress("index", count) as bar:
        near = Approximate(found.rows, config.features, found.output, bar.advance)
    share = recall(near, config.k, queries=_SAMPLED, seed=config.seed)
    notice(
        "recall:", f"{share:.3f} of the {config.k} nearest of {min(_SAMPLED, count)} images; --method exact finds all"
    )
    return near, {**data, "recall": share}


def _pictures(config: SearchConfig, found: Vectors) -> Pictures | None:
    if config.out is None:
        return None
    try:
        return Pictures(found.about, config.data)
    except ConfigError as error:
        notice("no pictures:", f"{error}" + (f" ({error.hint})" if error.hint else ""))
        return None


# --- searches --------------------------------------------------------------------------------------------------------


def _neighbours_of(config: SearchConfig, found: Vectors, near: Neighbours, pictures: Pictures | None) -> Found:
    assert config.image is not None
    job = found.about["job"]
    path = config.bundle or Path(found.about["bundle"]["path"])
    engine = job["engine"] if config.engine == "auto" else config.engine
    with Backbone.load(path, engine, device=config.device, threads=config.threads) as backbone:
        if (own := bundle_hash(backbone.bundle)) != job["bundle"]:
            hashes = f"its hash is {own[:12]}…, not {job['bundle'][:12]}…"
            raise CheckFailed(
                f"{path} is not the bundle that computed the features: {hashes}",
                hint="say with --bundle where that is, or embed again",
            )
        try:
            image = backbone.read(config.image)
        except UnreadableImage as error:
            raise CheckFailed(str(error)) from error
        query = backbone([image], outputs=[found.output])[found.output]
    (places,), (cosines,) = near.nearest(found.whitened(query), config.k)
    rows = [
        {"rank": rank, **_image(found, int(place)), "cosine": float(cosine)}
        for rank, (place, cosine) in enumerate(zip(places, cosines, strict=True), start=1)
    ]
    columns = (Column("rank", "rank"), Column("cosine", "cosine", "{:.3f}"), Column("image", "key"))
    table = Table(f"neighbours of {config.image}", columns, rows)
    cells = []
    if pictures is not None:
        cells = [Cell(pictures.cropped(image), ("the image", config.image.name), marked=True)]
        cells += [Cell(pictures(row["id"]), (f"{row['rank']}: {row['cosine']:.3f}", row["key"])) for row in rows]
    return "neighbours", rows, table, _wrapped(cells)


def _duplicates(config: SearchConfig, found: Vectors, near: Neighbours, pictures: Pictures | None) -> Found:
    with progress("duplicates", len(found.ids)) as bar:
        repeated = duplicates(near, config.threshold, bar.advance)
    rows = [
        {
            **_image(found, place),
            "cosine": cosine,
            **{f"like_{name}": value for name, value in _image(found, like).items()},
        }
        for place, like, cosine in sorted(repeated, key=lambda one: -one.cosine)
    ]
    columns = (Column("cosine", "cosine", "{:.4f}"), Column("image", "key"), Column("is like", "like_key"))
    of = f"{len(rows)} of {len(found.ids)} images are like an earlier one, from a cosine of {config.threshold:g} on"
    table = Table("duplicates", columns, rows[:_SHOWN], _notes(of, rows, config))
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["like_id"], []).append(row)
    grid: list[Sequence[Cell]] = []
    if pictures is not None:
        for like, group in sorted(groups.items(), key=lambda one: -len(one[1]))[:_ROWS]:
            first = Cell(pictures(like), ("stays", group[0]["like_key"]), marked=True)
            shown = [Cell(pictures(row["id"]), (f"{row['cosine']:.4f}", row["key"])) for row in group[: _ACROSS - 1]]
            grid.append([first, *shown])
    return "duplicates", rows, table, grid


def _outliers(config: SearchConfig, found: Vectors, near: Neighbours, pictures: Pictures | None) -> Found:
    with progress("outliers", len(found.ids)) as bar:
        far = outliers(near, config.k, config.count, bar.advance)
    rows = [{**_image(found, place), "distance": distance} for place, distance in far]
    columns = (Column("distance", "distance", "{:.3f}"), Column("image", "key"))
    of = f"distance: 1 minus the mean cosine to the {config.k} nearest others"
    table = Table("outliers", columns, rows[:_SHOWN], _notes(of, rows, config))
    cells = []
    if pictures is not None:
        shown = rows[: _ROWS * _ACROSS]
        cells = [Cell(pictures(row["id"]), (f"{row['distance']:.3f}", row["key"])) for row in shown]
    return "outliers", rows, table, _wrapped(cells)


# --- what is written -------------------------------------------------------------------------------------------------


def _image(found: Vectors, place: int) -> dict[str, Any]:
    return {"id": int(found.ids[place]), "key": found.keys[place]}


def _notes(text: str, rows: Sequence[Any], config: SearchConfig) -> list[str]:
    rest = len(rows) - _SHOWN
    more = f"{rest} more in {config.out}" if config.out is not None else f"{rest} more: --out FOLDER writes all"
    return [text, *([more] if rest > 0 else [])]


def _wrapped(cells: Sequence[Cell]) -> list[Sequence[Cell]]:
    return [cells[first : first + _ACROSS] for first in range(0, len(cells), _ACROSS)]


def _write(out: Path, name: str, found: Vectors, rows: list[dict[str, Any]], table: Table, grid: Grid) -> None:
    """Table, picture and page."""
    folder = found.about["folder"]
    named = [{k: placed(v, folder) if k.endswith("key") else v for k, v in row.items()} for row in rows]
    with (out / f"{name}.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["id", "key"])
        writer.writeheader()
        writer.writerows(named)
    picture = []
    if grid:
        write_grid(out / f"{name}.png", grid)
        picture = [f"![{name}]({name}.png)"]
    page = "\n\n".join([f"# {table.title}", *picture, table.to_markdown()])
    write_text(out / f"{name}.html", as_html(table.title, page, out))
