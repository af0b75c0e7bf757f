"""No file of a bundle is used unless it is listed, inside the folder and the one that was exported."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import sha256
from mae_deploy.runtime import Backbone, Bundle, bundle
from mae_deploy.runtime.bundle import are_updates, external_data, int8_arithmetic
from mae_deploy.runtime.manifest import file_entry
from mae_deploy.runtime.tolerance import Tolerance
from mae_deploy.runtime.verify import verify_bundle
from tests.runtime.tiny_bundle import (
    BLOCK_TENSORS,
    CLASS_NAMES,
    DEPTH,
    SAMPLES,
    D,
    K,
    N,
    golden_inputs,
    reference,
    reference_blocks,
    rehash,
    write_bundle,
)


def test_properties(tmp_path: Path) -> None:
    loaded = Bundle.load(write_bundle(tmp_path / "b", batch=2, keep=K))
    assert (loaded.token_mode, loaded.fixed_batch, loaded.fixed_keep, loaded.num_patches) == ("visible", 2, K, N)
    assert loaded.input_names == ("images", "ids_keep")
    assert loaded.output_names == ("cls", "tokens", "pooled", "logits")
    assert loaded.class_names == CLASS_NAMES
    assert loaded.licence == "Apache-2.0"
    assert loaded.tolerance == Tolerance(cosine=0.99999, max_abs=1e-4, max_relative=1e-5)
    assert (loaded.precision, loaded.image_dtype, loaded.keep_range, loaded.blocks) == (
        "fp32",
        "float32",
        (K, K),
        tuple(BLOCK_TENSORS),
    )
    assert loaded.model["image_size"] == [6, 14]
    assert loaded.preprocess.image_size == (6, 14)


def test_dynamic_sizes_are_none(full_bundle: Path) -> None:
    loaded = Bundle.load(str(full_bundle))
    assert (loaded.token_mode, loaded.fixed_batch, loaded.fixed_keep, loaded.keep_range) == ("full", None, None, (N, N))


@pytest.mark.parametrize(
    ("token_mode", "keep", "expected"),
    [("visible", None, (2, 9)), ("ragged", None, (2, 9)), ("visible", 5, (5, 5)), ("ragged", 5, (1, 5))],
)
def test_the_numbers_of_patches_that_an_image_may_have(
    tmp_path: Path, token_mode: str, keep: int | None, expected: tuple[int, int]
) -> None:
    loaded = Bundle.load(write_bundle(tmp_path / "b", token_mode=token_mode, keep=keep, profile_keep=(2, 4, 9)))
    assert loaded.keep_range == expected


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_bundle_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no bundle at .*manifest\.json") as caught:
        Bundle.load(tmp_path / name)
    assert "mae-deploy export" in (caught.value.hint or "")


def test_a_sound_file_is_hashed_once(visible_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def sha256(path: Path) -> str:
        calls.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(bundle, "sha256", sha256)
    loaded = Bundle.load(visible_bundle)
    assert [loaded.file("encoder.onnx") for _ in range(3)] == [visible_bundle / "encoder.onnx"] * 3
    assert calls == [visible_bundle / "encoder.onnx"]


def test_a_changed_file_is_refused_with_both_hashes(visible_bundle: Path) -> None:
    path = visible_bundle / "encoder.onnx"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckFailed, match=rf"encoder\.onnx .*{expected}.*{found}"):
        Bundle.load(visible_bundle).file("encoder.onnx")


def test_a_failed_check_is_not_remembered_as_passed(visible_bundle: Path) -> None:
    (visible_bundle / "encoder.onnx").write_bytes(b"")
    loaded = Bundle.load(visible_bundle)
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"encoder\.onnx is an empty file"):
            loaded.file("encoder.onnx")


def test_a_changed_graph_is_refused_before_the_engine_sees_it(visible_bundle: Path) -> None:
    (visible_bundle / "encoder.onnx").write_bytes(b"not a graph at all")
    with pytest.raises(CheckFailed, match="not the file that was exported"):
        Backbone.load(visible_bundle)


def test_a_changed_golden_file_is_refused(visible_bundle: Path) -> None:
    with (visible_bundle / "golden.npz").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckFailed, match=r"golden\.npz is not the file"):
        Bundle.load(visible_bundle).golden()


def test_a_file_that_is_not_listed(visible_bundle: Path) -> None:
    (visible_bundle / "extra.bin").write_bytes(b"x")
    with pytest.raises(CheckFailed, match=r"'extra\.bin' is not among the files"):
        Bundle.load(visible_bundle).file("extra.bin")


def test_a_missing_file(visible_bundle: Path) -> None:
    (visible_bundle / "golden.npz").unlink()
    with pytest.raises(CheckFailed, match=r"golden\.npz is missing"):
        Bundle.load(visible_bundle).check_files()


@pytest.mark.parametrize(
    "form",
    [
        "../secret.bin",
        "sub/../../secret.bin",
        "{absolute}",
        "nul\0l",
        "..\\secret.bin",
        "C:\\secret.bin",
        "../visible/inside.bin",
    ],
)
def test_paths_out_of_the_folder_are_refused_although_their_hash_is_right(tmp_path: Path, form: str) -> None:
    secret = tmp_path / "outside" / "secret.bin"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    shutil.copy(secret, tmp_path / "secret.bin")
    name = form.format(absolute=secret)
    path = write_bundle(
        tmp_path / "visible", change=lambda manifest: manifest["files"].update({name: file_entry(secret)})
    )
    (path / "sub").mkdir()
    (path / "inside.bin").write_bytes(b"secret")
    with pytest.raises(CheckFailed, match="is outside of the bundle"):
        Bundle.load(path).file(name)


def test_a_link_inside_of_the_folder_is_followed(tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "b", change=lambda manifest: manifest["files"].update(alias=manifest["files"]["golden.npz"])
    )
    (path / "alias").symlink_to("golden.npz")
    assert Bundle.load(path).file("alias") == path / "alias"


def stored(bundle: Path, store: Path) -> Path:
    """The bundle as the Hugging Face cache has it: each file a link to one that is called after its hash."""
    store.mkdir()
    for file in [path for path in bundle.iterdir() if path.is_file()]:
        blob = store / sha256(file)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, bundle))
    return bundle


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("external", [None, "encoder.onnx.data"])
def test_files_may_be_links_into_a_store(tmp_path: Path, engine: str, external: str | None) -> None:
    pytest.importorskip(engine)
    path = stored(write_bundle(tmp_path / "snapshots" / "main", external=external), tmp_path / "blobs")
    bundle = Bundle.load(path)
    bundle.check_files()
    assert verify_bundle(bundle, engine).passed
    images = golden_inputs(visible=True)
    with Backbone.load(path, engine) as backbone:
        found = backbone(images["images"], images["ids_keep"])
    np.testing.assert_allclose(found.cls, reference(**images)["cls"], atol=1e-5)  # sums in another order


def test_what_stands_in_for_links_goes_with_the_bundle(tmp_path: Path) -> None:
    """Hard links to what the manifest lists, in folders as there; a second graph replaces none of them."""
    path = stored(write_bundle(tmp_path / "b", external="encoder.onnx.data"), tmp_path / "blobs")
    (path / "deep" / "er").mkdir(parents=True)
    for name in ("encoder.onnx", "encoder.onnx.data"):
        (path / "deep" / "er" / name).symlink_to((path / name).resolve())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] |= {f"deep/er/{name}": manifest["files"][name] for name in ("encoder.onnx", "encoder.onnx.data")}
    loaded = Bundle(path, manifest)
    graph, deep = loaded.graph(), loaded.graph("deep/er/encoder.onnx")
    folder = graph.parent
    assert folder.name.startswith("mae-deploy-")
    assert (graph, deep) == (folder / "encoder.onnx", folder / "deep" / "er" / "encoder.onnx")
    assert loaded.graph() == graph
    for made in (graph, deep):
        for name in ("encoder.onnx", "encoder.onnx.data"):
            assert not made.with_name(name).is_symlink()
            assert made.with_name(name).samefile(path / name)
    del loaded
    gc.collect()
    assert not folder.exists()


def test_a_link_to_another_file_than_the_exported_is_refused(tmp_path: Path) -> None:
    path = stored(write_bundle(tmp_path / "b"), tmp_path / "blobs")
    other = tmp_path / "other"
    other.write_bytes(b"secret")
    (path / "golden.npz").unlink()
    (path / "golden.npz").symlink_to(other)
    with pytest.raises(CheckFailed, match=r"golden\.npz is not the file that was exported"):
        Bundle.load(path).file("golden.npz")
    other.unlink()
    with pytest.raises(CheckFailed, match=r"golden\.npz is a link to .*other, which is not there") as caught:
        Bundle.load(path).file("golden.npz")
    assert caught.value.hint == "fetch it: git annex get, dvc pull, hf download"


def test_links_in_a_circle(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b")
    (path / "golden.npz").unlink()
    (path / "golden.npz").symlink_to("golden.npz")
    with pytest.raises(CheckFailed, match="which is not there"):
        Bundle.load(path).file("golden.npz")


def test_a_bundle_behind_a_link_is_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(write_bundle(tmp_path / "b"))
    Bundle.load(tmp_path / "link").check_files()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "b", change=lambda manifest: manifest["files"].update({".": manifest["files"]["golden.npz"]})
    )
    with pytest.raises(CheckFailed, match="is missing"):
        Bundle.load(path).file(".")


def read_all(path: Path) -> None:
    loaded = Bundle.load(path)
    loaded.graph()
    loaded.golden()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 343279349\n"


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx", "golden.npz"])
def test_a_pointer_in_the_place_of_a_file_is_said(tmp_path: Path, name: str) -> None:
    path = write_bundle(tmp_path / "b")
    (path / name).write_bytes(POINTER)
    with pytest.raises((CheckFailed, ConfigError), match=rf"{re.escape(name)}.* is a Git LFS pointer") as caught:
        read_all(path)
    assert caught.value.hint == "git lfs pull fetches it"


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"encoder\.onnx is a Git LFS pointer.*, not the folder of a bundle"):
        Bundle.load(tmp_path / "encoder.onnx")


# --- external data ---------------------------------------------------------------------------------------------------


def test_external_data_is_checked_with_the_graph(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", external="encoder.onnx.data")
    loaded = Bundle.load(path)
    assert loaded.graph() == path / "encoder.onnx"
    content = bytearray((path / "encoder.onnx.data").read_bytes())
    content[0] ^= 1
    (path / "encoder.onnx.data").write_bytes(content)
    with pytest.raises(CheckFailed, match=r"encoder\.onnx\.data is not the file that was exported"):
        Backbone.load(path)
    with pytest.raises(CheckFailed, match=r"encoder\.onnx\.data is not the file that was exported"):
        verify_bundle(Bundle.load(path))


def test_external_data_that_the_manifest_does_not_list(tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "b", external="encoder.onnx.data", change=lambda manifest: manifest["files"].pop("encoder.onnx.data")
    )
    with pytest.raises(CheckFailed, match=r"'encoder\.onnx\.data' is not among the files"):
        Backbone.load(path)


def test_external_data_with_a_name_longer_than_one_varint_byte(tmp_path: Path) -> None:
    name = "w" * 131
    path = write_bundle(tmp_path / "b", external=name)
    Bundle.load(path).graph()
    (path / name).unlink()
    with pytest.raises(CheckFailed, match=rf"{name} is missing"):
        Bundle.load(path).graph()


def test_external_data_outside_of_the_bundle(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", external="near-by.data")
    graph = path / "encoder.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"near-by.data", b"../near.data"))
    shutil.move(path / "near-by.data", tmp_path / "near.data")
    (path / "near-by.data").write_bytes(b"")
    rehash(path)
    with pytest.raises(CheckFailed, match=r"'\.\./near\.data' is not among the files"):
        Backbone.load(path)


def test_names_of_external_data_are_found_once_each_and_may_be_no_utf8(tmp_path: Path) -> None:
    graph = tmp_path / "graph.onnx"
    entry = b"\n\x08location\x12"
    graph.write_bytes(entry + b"\x01a" + entry + b"\x02\xffb" + b"between" + entry + b"\x01a")
    assert external_data(graph) == ["a", "\ufffdb"]
    graph.write_bytes(b"")
    assert external_data(graph) == []


# --- what it computes in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "arithmetic"),
    [
        ({}, "int8"),
        ({"weight_bits": 8, "rest": "fp32"}, "int8"),
        ({"weight_bits": 7}, "int8-w7"),
        ({"rest": "bf16"}, "int8-bf16"),
        ({"weight_bits": 7, "rest": "bf16"}, "int8-w7-bf16"),
    ],
)
def test_what_int8_computes_in(record: dict[str, Any], arithmetic: str) -> None:
    assert int8_arithmetic(record) == arithmetic


@pytest.mark.parametrize(
    ("precision", "typing", "engine", "arithmetic"),
    [
        ("fp32", "weak", "openvino", "fp32"),
        ("fp16", "weak", "onnxruntime", "fp16"),
        ("bf16", "weak", "openvino", "bf16"),
        ("bf16", "strong", "openvino", "fp32"),
        ("bf16", "weak", "onnxruntime", "fp32"),
        ("int8", "weak", "openvino", "int8-w7"),
    ],
)
def test_bf16_in_place_of_fp32_only_where_it_was_checked(
    tmp_path: Path, precision: str, typing: str, engine: str, arithmetic: str
) -> None:
    manifest: Any = {"precision": precision, "typing": typing, "engine": engine, "quantization": {"weight_bits": 7}}
    assert Bundle(tmp_path, manifest).arithmetic == arithmetic
    for quantization, baseline in (({"baseline": "fp16.onnx"}, "fp16.onnx"), (None, None)):
        manifest["quantization"] = quantization
        assert Bundle(tmp_path, manifest).baseline == baseline


# --- golden samples --------------------------------------------------------------------------------------------------


def test_golden_samples(visible_bundle: Path) -> None:
    golden = Bundle.load(visible_bundle).golden()
    inputs = golden_inputs(visible=True)
    expected = {
        **inputs,
        **reference(**inputs),
        "blocks": reference_blocks(**{name: array[:2] for name, array in inputs.items()}),
    }
    assert set(golden) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(golden[name], array, strict=True)


def write_golden(path: Path, **changes: Any) -> Bundle:
    """Replace arrays of the golden file (None leaves one out) and make the hash right again."""
    with np.load(path / "golden.npz") as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    arrays = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    np.savez(path / "golden.npz", **arrays)
    rehash(path)
    return Bundle.load(path)


@pytest.mark.parametrize("name", ["images", "ids_keep", "tokens"])
def test_a_golden_array_is_missing(visible_bundle: Path, name: str) -> None:
    with pytest.raises(CheckFailed, match=f"'{name}' is missing"):
        write_golden(visible_bundle, **{name: None}).golden()


def test_a_golden_array_of_another_length(visible_bundle: Path) -> None:
    with pytest.raises(CheckFailed, match=rf"'cls' has the shape \(2, 3\).*{SAMPLES} samples"):
        write_golden(visible_bundle, cls=np.zeros((2, 3), np.float32)).golden()


def test_a_golden_input_of_another_type(visible_bundle: Path) -> None:
    with pytest.raises(CheckFailed, match="'ids_keep' is int32, not int64"):
        write_golden(visible_bundle, ids_keep=golden_inputs(visible=True)["ids_keep"].astype(np.int32)).golden()


@pytest.mark.parametrize(
    "shape", [None, (2, DEPTH + 1, 3, D), (2, DEPTH, 3, D + 1), (SAMPLES + 1, DEPTH, 3, D), (2, DEPTH, D)]
)
def test_golden_block_outputs_that_are_not_those_of_the_manifest(
    visible_bundle: Path, shape: tuple[int, ...] | None
) -> None:
    with pytest.raises(CheckFailed, match=r"'blocks' (is missing|has the shape).*promises 2 blocks"):
        write_golden(visible_bundle, blocks=None if shape is None else np.zeros(shape, np.float32)).golden()


def test_a_bundle_may_have_no_block_outputs(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", change=lambda manifest: manifest["graph"].update(blocks=[]))
    assert write_golden(path, blocks=None).blocks == ()
    Bundle.load(path).golden()


def without(name: str, path: Path) -> None:
    arrays = dict(np.load(path / "golden.npz"))
    del arrays[name]
    np.savez(path / "golden.npz", **arrays)
    rehash(path)


def other_type(path: Path) -> None:
    arrays = dict(np.load(path / "golden.npz"))
    np.savez(path / "golden.npz", **{**arrays, "images": arrays["images"].astype(np.float64)})
    rehash(path)


def no_archive(path: Path) -> None:
    (path / "golden.npz").write_bytes(b"no archive")
    rehash(path)


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda path: (path / "golden.npz").unlink(), "copy the whole bundle folder, or export it again"),
        (lambda path: (path / "golden.npz").write_bytes(b"x"), "copy the bundle again, or export it again"),
        (no_archive, "export the bundle again"),
        (partial(without, "cls"), "export the bundle again"),
        (partial(without, "blocks"), "export the bundle again"),
        (other_type, "export the bundle again"),
    ],
)
def test_what_to_do_about_it_is_said(visible_bundle: Path, damage: Callable[[Path], object], hint: str) -> None:
    damage(visible_bundle)
    with pytest.raises(CheckFailed) as caught:
        Bundle.load(visible_bundle).golden()
    assert caught.value.hint == hint


def test_what_to_do_where_there_is_no_bundle(visible_bundle: Path, tmp_path: Path) -> None:
    for place, hint in (
        (visible_bundle / "encoder.onnx", "'mae-deploy export' makes a bundle of weights"),
        (tmp_path / "nothing", "a bundle is the folder that 'mae-deploy export' writes"),
    ):
        with pytest.raises(ConfigError) as caught:
            Bundle.load(place)
        assert caught.value.hint == hint
    manifest = json.loads((visible_bundle / "manifest.json").read_text())
    manifest["files"]["../x"] = manifest["files"]["golden.npz"]
    with pytest.raises(CheckFailed, match=r"'\.\./x' is outside of the bundle") as refused:
        Bundle(visible_bundle, manifest).file("../x")
    assert refused.value.hint == "its files are inside its folder"


def test_golden_samples_are_read_once_and_read_only(visible_bundle: Path) -> None:
    loaded = Bundle.load(visible_bundle)
    golden = loaded.golden()
    assert golden is not loaded.golden()
    for name, array in golden.items():
        assert array is loaded.golden()[name]
        assert not array.flags.writeable


@pytest.mark.parametrize(
    ("updates", "dtype", "said"),
    [
        ([[3, 1]] * 2, np.int64, None),
        ([[3, 1]] * 2, np.int32, "'updates' is int32, not int64"),
        ([[3, 2]] * 2, np.int64, r"'updates' \[\[3, 2\]\] does not divide the 4 patches of each sample"),
    ],
)
def test_golden_samples_of_a_stream(tmp_path: Path, updates: Any, dtype: Any, said: str | None) -> None:
    arrays: dict[str, Any] = {"patches": np.zeros((2, 4, 12), np.float32), "ids_keep": np.zeros((2, 4), np.int64)}
    np.savez(tmp_path / "golden.npz", **arrays, updates=np.array(updates, dtype))
    inputs = [{"name": "patches", "dtype": "float32"}, {"name": "ids_keep", "dtype": "int64"}]
    manifest: Any = {
        "token_mode": "cached",
        "num_patches": 4,
        "golden": {"file": "golden.npz", "num_samples": 2},
        "files": {"golden.npz": file_entry(tmp_path / "golden.npz")},
        "graph": {"inputs": inputs, "outputs": [], "blocks": []},
    }
    if said is None:
        assert Bundle(tmp_path, manifest).golden()["updates"].tolist() == updates
        return
    with pytest.raises(CheckFailed, match=said) as caught:
        Bundle(tmp_path, manifest).golden()
    assert caught.value.hint == "export the bundle again"


@pytest.mark.parametrize(
    ("updates", "right"),
    [
        ([[3, 1], [3, 1]], True),
        ([[4], [4]], True),
        ([[3, 1], [1, 3]], False),
        ([[4, 0], [4, 0]], False),
        ([[5, -1], [5, -1]], False),
        ([[3, 2], [3, 2]], False),
        ([[2, 1], [2, 1]], False),
        ([4, 4], False),
    ],
)
def test_updates_take_all_patches_of_every_sample_alike(updates: Any, right: bool) -> None:
    assert are_updates(np.array(updates), np.zeros((2, 4), np.int64)) is right
    assert not are_updates(np.array(updates), np.zeros((2, 4, 1), np.int64))


def test_golden_pickles_are_refused(visible_bundle: Path) -> None:
    with pytest.raises(CheckFailed, match="holds no arrays"):
        write_golden(visible_bundle, cls=np.array([{}] * SAMPLES, dtype=object)).golden()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_a_golden_file_that_is_no_archive(visible_bundle: Path, content: bytes) -> None:
    (visible_bundle / "golden.npz").write_bytes(content)
    rehash(visible_bundle)
    with pytest.raises(CheckFailed, match="holds no arrays"):
        Bundle.load(visible_bundle).golden()


def test_a_golden_file_that_is_one_bare_array(visible_bundle: Path) -> None:
    with (visible_bundle / "golden.npz").open("wb") as file:
        np.save(file, np.zeros(SAMPLES))
    rehash(visible_bundle)
    with pytest.raises(CheckFailed, match="holds no arrays"):
        Bundle.load(visible_bundle).golden()
