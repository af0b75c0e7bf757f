"""What the server answers, as its OpenAPI description has it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from mae_deploy.commands.serve.compute import Computed
from mae_deploy.commands.serve.uploads import Refused


class Model(BaseModel):
    """A bundle that serves."""

    name: str
    revision: str = Field(description="the beginning of its manifest's SHA-256")
    since: str = Field(description="when it was verified here: ISO 8601, UTC")
    refused: str | None = Field(description="why the bundle that lies in its folder now does not serve")
    model: str
    kind: str
    tokens: str
    precision: str
    engine: str
    device: str
    licence: str
    image_size: tuple[int, int]
    grid: tuple[int, int] = Field(description="rows and columns of patches")
    num_patches: int
    keep_range: tuple[int, int] = Field(description="the least and the most patches of an image that it takes")
    outputs: list[str]
    classes: list[str] | None
    preprocess: dict[str, Any]
    max_batch: int


class Class(BaseModel):
    """A class and its probability."""

    name: str
    probability: float


class Row(BaseModel):
    """An image of the request."""

    name: str = Field(description="its file's name, or place in the list")
    keep: list[int] | None = Field(default=None, description="the patches that were seen, where not all were")
    error: str | None = Field(default=None, description="why there is nothing of this image; null: there is")


class Prediction(Row):
    """Its classes, the most likely first."""

    classes: list[Class] = []


class Predictions(BaseModel):
    """Of each image, in the order of the request."""

    model: str
    revision: str
    results: list[Prediction]


class Embedding(Row):
    """Its outputs, as nested lists."""

    outputs: dict[str, Any] = {}


class Embeddings(BaseModel):
    """Of each image, in the order of the request."""

    model: str
    revision: str
    results: list[Embedding]


class Picture(BaseModel):
    """A reconstruction."""

    model: str
    revision: str
    keep: list[int]
    picture: str = Field(description="a PNG, as a data URL")


class Problem(BaseModel):
    """Why there is no result."""

    error: str


def timing(found: Sequence[Computed | Refused]) -> str:
    """How long the stages took, as `Server-Timing` says it, in milliseconds: of several images the longest."""
    computed = [one for one in found if isinstance(one, Computed)]
    if not computed:
        return ""
    stages = {
        "decode": max(one.decoded for one in computed),
        "queue": max(one.answer.queued for one in computed),
        "engine": max(one.answer.computed for one in computed),
    }
    batch = max(one.answer.batch for one in computed)
    return ", ".join([*(f"{name};dur={1000 * seconds:.2f}" for name, seconds in stages.items()), f"batch;dur={batch}"])


def npz(names: Sequence[str], found: Sequence[Computed | Refused]) -> bytes:
    """A NumPy archive: the outputs of the B images of which there are some, each `(B, ...)`, their `name (B,)` and
    `keep (B, K)`; and `left_out (n, 2)`, names and reasons of the others.
    """
    rows = [one for one in found if isinstance(one, Computed)]
    arrays: dict[str, Any] = {
        name: np.stack([one.answer.features[name] for one in rows]) for name in rows[0].answer.features
    }
    arrays["name"] = np.array([name for name, one in zip(names, found, strict=True) if isinstance(one, Computed)])
    keep = [one.keep for one in rows if one.keep is not None]
    if keep:
        arrays["keep"] = np.stack(keep)
    left_out = [(name, str(one)) for name, one in zip(names, found, strict=True) if isinstance(one, Refused)]
    arrays["left_out"] = np.array(left_out, dtype=str).reshape(-1, 2)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
