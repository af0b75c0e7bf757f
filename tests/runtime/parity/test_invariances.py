"""Other forms of the golden samples, number by number: what is rearranged, and what the outputs must then be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_deploy.images.read import Array
from mae_deploy.runtime.parity.invariances import (
    Variation,
    even_rows,
    joined,
    other_lengths,
    samples_alone,
    variations,
)

S, K, N, LARGEST = 3, 5, 11, np.iinfo(np.int64).max
IDS = np.random.default_rng(0).permuted(np.tile(np.arange(N), (S, 1)), axis=1)[:, :K]
PIXELS = np.arange(S * 2.0).reshape(S, 2)
LENGTHS = np.array([5, 2, 3])


def bundle(*, batch: int | None = None, keep: int | None = None, most: int = N, largest: int = S) -> Any:
    return SimpleNamespace(
        fixed_batch=batch, fixed_keep=keep, keep_range=(1, most), num_patches=N, largest_batch=batch or largest
    )


def forms(inputs: dict[str, Array], **given: Any) -> dict[str, Variation]:
    return {variation.name: variation for variation in variations(bundle(**given), inputs)}


def visible() -> dict[str, Array]:
    return {"images": PIXELS, "ids_keep": IDS}


def ragged() -> dict[str, Array]:
    ids = np.where(np.arange(K) < LENGTHS[:, None], IDS, -1)
    return {**visible(), "ids_keep": ids, "num_keep": LENGTHS}


def test_which_forms_there_are() -> None:
    assert list(forms({"images": PIXELS})) == ["sample alone", "other batches"]
    assert list(forms({"images": PIXELS}, largest=4)) == ["sample alone", "other batches", "largest batch"]
    assert list(forms({"images": PIXELS[:2]}, largest=2)) == ["sample alone"]
    assert list(forms({"images": PIXELS[:1]})) == []
    assert list(forms({"images": PIXELS}, batch=1)) == []
    assert list(forms({"images": PIXELS}, batch=2)) == ["other neighbours"]
    orders, batches = ["permuted ids_keep", "sorted ids_keep"], ["sample alone", "other batches"]
    assert list(forms(visible())) == [*orders, *batches]
    assert list(forms({**visible(), "ids_keep": np.sort(IDS, axis=1)})) == ["permuted ids_keep", *batches]
    assert list(forms({**visible(), "ids_keep": IDS[:, :1]})) == batches
    padded = [*orders, "other padding", "longer padding", *batches]
    assert list(forms(ragged())) == padded
    assert list(forms(ragged(), keep=K)) == [name for name in padded if name != "longer padding"]
    assert list(forms(ragged(), most=K)) == [name for name in padded if name != "longer padding"]
    assert list(forms({**ragged(), "num_keep": np.full(S, K)})) == [name for name in padded if name != "other padding"]


def test_permuted_patches_take_their_tokens_along() -> None:
    permuted = forms(visible())["permuted ids_keep"]
    (part,), tokens = permuted.parts, permuted.tokens
    assert tokens is not None
    for before, after, order in zip(IDS, part["ids_keep"], tokens, strict=True):
        assert sorted(order) == list(range(K))
        assert list(order) != list(range(K))
        assert after.tolist() == before[order].tolist()
    assert part["images"] is PIXELS
    outputs = {"tokens": np.random.default_rng(1).random((S, K, 2)), "cls": PIXELS}
    arranged = permuted.arranged(outputs)
    np.testing.assert_array_equal(arranged["tokens"][1, 0], outputs["tokens"][1, tokens[1, 0]])
    assert arranged["cls"] is PIXELS


def test_sorted_patches_take_their_tokens_along() -> None:
    found = forms(ragged())["sorted ids_keep"]
    (part,), tokens = found.parts, found.tokens
    assert tokens is not None
    for row, ids, length in zip(part["ids_keep"], IDS, LENGTHS, strict=True):
        assert row[:length].tolist() == sorted(ids[:length])
        assert set(row[length:].tolist()) <= {-1}
    np.testing.assert_array_equal(np.take_along_axis(ragged()["ids_keep"], tokens, axis=1), part["ids_keep"])


def test_other_batches() -> None:
    many = {"images": np.arange(8.0)[:, None]}
    parts = forms(many, largest=8)["other batches"].parts
    assert [part["images"].ravel().tolist() for part in parts] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    found = forms(many, largest=99)["largest batch"]
    assert len(found.parts[0]["images"]) == 32
    np.testing.assert_array_equal(found.arranged({"cls": many["images"]})["cls"], found.parts[0]["images"])


def test_padding_stays_where_it_is_and_holds_what_no_caller_should_leave() -> None:
    inputs, found = ragged(), forms(ragged())
    tokens = found["permuted ids_keep"].tokens
    assert tokens is not None
    assert [row[length:].tolist() for row, length in zip(tokens, LENGTHS, strict=True)] == [[], [2, 3, 4], [3, 4]]
    (other,), (longer,) = found["other padding"].parts, found["longer padding"].parts
    for part, width in ((other, K), (longer, K + 3)):
        real = np.arange(width) < LENGTHS[:, None]
        assert part["ids_keep"].shape == (S, width)
        assert part["num_keep"] is LENGTHS
        np.testing.assert_array_equal(part["ids_keep"][:, :K][real[:, :K]], IDS[real[:, :K]])
        garbage = part["ids_keep"][~real]
        assert garbage[:6].tolist() == [-1, LARGEST, -LARGEST - 1, 1 << 31, -(1 << 31) - 1, 10**6][: garbage.size]
    np.testing.assert_array_equal(inputs["ids_keep"], ragged()["ids_keep"])  # a copy was changed
    (most,) = forms(ragged(), most=K + 1)["longer padding"].parts
    assert most["ids_keep"].shape == (S, K + 1)


def test_one_sample_at_a_time() -> None:
    alone = samples_alone(bundle(), ragged())
    assert [part["ids_keep"].tolist() for part in alone] == [
        [IDS[index, :length].tolist()] for index, length in enumerate(LENGTHS)
    ]
    assert [part["images"].tolist() for part in alone] == [[row] for row in PIXELS.tolist()]
    assert [part["num_keep"].tolist() for part in alone] == [[5], [2], [3]]
    assert all(part["ids_keep"].flags.c_contiguous for part in alone)
    assert [part["ids_keep"].shape for part in samples_alone(bundle(keep=K), ragged())] == [(1, K)] * S
    assert forms(visible())["sample alone"].samples is None


def test_other_neighbours() -> None:
    found = forms(visible(), batch=2)["other neighbours"]
    assert found.samples is not None
    assert found.samples.tolist() == [1, 2, 0]
    np.testing.assert_array_equal(found.parts[0]["ids_keep"], IDS[[1, 2, 0]])
    np.testing.assert_array_equal(found.arranged({"cls": PIXELS})["cls"], PIXELS[[1, 2, 0]])


def test_other_lengths_go_from_the_least_to_the_most() -> None:
    found = other_lengths(bundle(most=9), ragged())
    assert found["num_keep"].tolist() == [1, 5, 9]
    assert found["num_keep"].dtype == found["ids_keep"].dtype == np.int64
    assert found["ids_keep"].shape == (S, 9)
    for row, length in zip(found["ids_keep"], found["num_keep"], strict=True):
        assert len(set(row[:length].tolist()) & set(range(N))) == length
    assert found["ids_keep"][0, 1:3].tolist() == [-1, LARGEST]
    assert found["images"] is PIXELS


UPDATE_SIZES = np.array([[2, 3]] * S)


def test_a_streams_last_update_in_another_order_and_once_more() -> None:
    patches = np.random.default_rng(2).random((S, K, 4))
    inputs = {"patches": patches, "ids_keep": IDS, "updates": UPDATE_SIZES}
    found = forms(inputs)
    assert list(found) == ["permuted ids_keep", "sorted ids_keep", "repeated update", "sample alone", "other batches"]
    assert all((np.diff(row[2:]) > 0).all() for row in found["sorted ids_keep"].parts[0]["ids_keep"])
    (part,), tokens = found["permuted ids_keep"].parts, found["permuted ids_keep"].tokens
    assert tokens is not None
    assert tokens.shape == (S, 3)
    for sample in range(S):
        assert sorted(tokens[sample]) == [0, 1, 2]
        assert list(tokens[sample]) != [0, 1, 2]
        order = [0, 1, *(2 + tokens[sample])]
        np.testing.assert_array_equal(part["ids_keep"][sample], IDS[sample, order])
        np.testing.assert_array_equal(part["patches"][sample], patches[sample, order])
    assert part["updates"] is UPDATE_SIZES
    (again,) = found["repeated update"].parts
    assert again["updates"].tolist() == [[2, 3, 3]] * S
    np.testing.assert_array_equal(again["ids_keep"], IDS[:, [0, 1, 2, 3, 4, 2, 3, 4]])
    np.testing.assert_array_equal(again["patches"], patches[:, [0, 1, 2, 3, 4, 2, 3, 4]])
    single = {**inputs, "updates": np.array([[4, 1]] * S)}
    assert list(forms(single, largest=9)) == ["repeated update", "sample alone", "other batches"]


@pytest.mark.parametrize("name", ["tokens", "block_3"])
def test_runs_are_joined_with_rows_of_one_length(name: str) -> None:
    short, long = (
        {name: np.full((number, length, 2), 7.0), "cls": np.full((number, 2), float(number))}
        for number, length in ((1, 2), (2, 4))
    )
    even = even_rows([short, long])
    assert [run[name].shape for run in even] == [(1, 4, 2), (2, 4, 2)]
    assert even[0][name][0, :, 0].tolist() == [7, 7, 0, 0]
    found = joined([short, long])
    assert found[name].shape == (3, 4, 2)
    assert found["cls"].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert even_rows([{"cls": PIXELS}])[0]["cls"] is PIXELS
