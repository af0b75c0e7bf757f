"""Patches of every wrong kind are refused in a line through every door; of every right kind they are the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_deploy.cli import main
from mae_deploy.commands.serve.compute import chosen_patches
from mae_deploy.errors import ConfigError
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.inputs import token_batch

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v1"

N, LEAST = 10, 8
"""Of both bundles."""

_outside = st.one_of(st.integers(-(10**30), -1), st.integers(N, 10**30))
_others = st.one_of(st.floats(), st.text(max_size=3), st.none(), st.binary(max_size=3), st.complex_numbers())
_rows = st.permutations(range(N)).map(lambda row: list(row[:LEAST]))


@st.composite
def wrong(draw: st.DrawFn) -> Any:
    """Patches of which one, or the form of all, is wrong."""
    row: list[Any] = draw(_rows)
    kind = draw(st.sampled_from(["outside", "twice", "other", "dtype", "shape", "length", "masked", "alone"]))
    place = draw(st.integers(0, LEAST - 1))
    if kind == "outside":
        row[place] = draw(_outside)
        return np.array(row, np.uint64) if 0 < row[place] < 2**64 and draw(st.booleans()) else row
    if kind == "twice":
        row[place] = row[place - 1]
        return np.array(row, draw(st.sampled_from([np.int8, np.uint16, np.int64])))
    if kind == "other":
        row[place] = draw(_others)
        return row
    if kind == "dtype":
        return np.array(row).astype(
            draw(st.sampled_from(["f2", "f4", "f8", "c8", "O", "U", "S", "M8[s]", "m8[s]", "V4"]))
        )
    if kind == "shape":
        rows = draw(st.integers(0, 4).filter(lambda count: count != 2))
        return draw(st.sampled_from([[row] * rows if rows else [], [[row], [row]], [[[row]]], np.zeros((2, 0), int)]))
    if kind == "length":
        return draw(st.sampled_from([row[:3], [row, row[:3]], list(range(N + 1)), np.arange(10**4), range(2, 2)]))
    if kind == "masked":
        return np.ma.masked_array(row, mask=[index == place for index in range(LEAST)])
    return draw(st.one_of(st.integers(), st.floats(), st.sampled_from([np.int64(3), np.array(3), {1: 2}, {3}, len])))


@pytest.fixture(scope="module", params=["visible", "ragged"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    folder = tmp_path_factory.mktemp("bundles") / request.param
    shutil.copytree(FIXTURES / "bundles" / request.param, folder)
    with Backbone.load(folder, "onnxruntime", threads=1) as loaded:
        assert (loaded.num_patches, loaded.bundle.keep_range) == (N, (LEAST, N))
        yield loaded


def check_line(error: ConfigError) -> None:
    assert len(str(error)) < 300
    assert "\n" not in str(error)
    assert "keep" in str(error) or "mask" in str(error)


@settings(max_examples=60)
@given(keep=wrong())
def test_wrong_patches_are_refused(backbone: Backbone, keep: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        backbone(np.zeros((2, 25, 10, 3), np.uint8), keep)
    check_line(refused.value)


@settings(max_examples=30)
@given(row=_rows, form=st.integers(0, 9))
def test_forms_of_the_same_patches(backbone: Backbone, row: list[int], form: int) -> None:
    plain = np.array(row, np.int64)
    fixed = plain.copy()
    fixed.flags.writeable = False
    wide = np.zeros(2 * LEAST, np.int64)
    wide[::2] = plain
    forms: list[Any] = [
        row,
        tuple(row),
        wide[::2],
        plain[::-1][::-1],
        fixed,
        plain.astype(">i8"),
        plain.astype(np.uint64),
    ]
    forms += [plain.astype(np.int8), np.asfortranarray(np.stack([plain, plain])), ",".join(map(str, row))]
    expected = token_batch(backbone.bundle, plain, None, 2)
    text = forms[form]
    found = token_batch(backbone.bundle, text, None, 2)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
        assert np.array_equal(array, expected[name])


_numbers = st.one_of(st.integers(-(10**30), 10**30), st.floats(), st.text("0-9,²٣x", max_size=4), st.integers(0, N - 1))


@settings(max_examples=30)
@given(parts=st.lists(_numbers.map(str), max_size=LEAST - 1))
def test_text_that_keeps_too_little_or_else_is_refused_by_the_server(backbone: Backbone, parts: list[str]) -> None:
    serving: Any = SimpleNamespace(backbone=backbone)
    with pytest.raises(ConfigError) as refused:
        chosen_patches(serving, ",".join(part for part in parts if "-" not in part[1:]), None, 0, 2)
    check_line(refused.value)


@pytest.mark.parametrize("keep", ["0,1,2,3,4,5,6,99", "0,0,1,2,3,4,5,6", "0-7,x", "9" * 5000, "-1", "0-99999999999"])
def test_the_command_line(keep: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, images = FIXTURES / "bundles/visible", FIXTURES / "images"
    assert main(["predict", str(bundle), str(images), f"--keep={keep}", "--threads", "1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "keep" in line
    assert len(line) < 1000
