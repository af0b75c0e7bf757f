"""examples/cpp: built as its README says, and what it computes of bundles and images is what Python computes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from mae_deploy.images.arrays import Array
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.runtime import Backbone, top_k
from mae_deploy.runtime.manifest import read_preprocess
from tests.runtime.tiny_bundle import CLASS_NAMES, MEAN, STD, H, W, write_bundle

SOURCES = Path(__file__).parents[2] / "examples" / "cpp"
HEADERS = Path(__file__).parent / "cpp"
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"), None)

pytestmark = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("g++"), reason="no cmake or g++: apt-get install cmake g++"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("build")
    quickly = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_UNITY_BUILD=ON"]  # no optimisation, each header read once
    options = [*quickly, "-DCMAKE_CXX_FLAGS=-Werror", f"-DONNXRUNTIME_LIBRARY={LIBRARY}"]
    made = subprocess.run(["cmake", "-S", SOURCES, "-B", build, *options], capture_output=True, text=True)
    if made.returncode != 0 and re.search("could not find", made.stderr, re.IGNORECASE):
        pytest.skip("no headers of libpng, libjpeg, zlib or nlohmann-json: see examples/cpp/README.md")
    assert made.returncode == 0, made.stderr
    if LIBRARY is None or "run_onnxruntime is left out" in made.stdout:
        pytest.skip("no headers of ONNX Runtime: see examples/cpp/README.md")
    made = subprocess.run(["cmake", "--build", build], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return build / "run_onnxruntime"


def run(program: Path, *arguments: Path) -> tuple[int, list[str], str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


def frame_of(spec: Preprocess) -> tuple[Array, Array]:
    frame = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    return frame, spec.normalise(spec.crop(frame)[None])[0]


def photo(path: Path, **options: Any) -> Path:
    pixels = np.random.default_rng(2).integers(0, 256, (9, 13, 3), np.uint8)
    Image.fromarray(pixels).resize((61, 43)).save(path, **options)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", "letterbox"])
def test_it_prepares_images_to_the_pixel(program: Path, tmp_path: Path, interpolation: str, crop_mode: str) -> None:
    values: dict[str, Any] = {"crop_pct": 0.875, "interpolation": interpolation, "crop_mode": crop_mode, "channels": 3}
    values |= {"image_size": [H, W], "mean": list(MEAN), "std": list(STD)}
    frame, expected = frame_of(read_preprocess(values))
    bundle = write_bundle(tmp_path / "bundle", preprocess=values, frame=frame)
    golden = dict(np.load(bundle / "golden.npz", allow_pickle=False))
    np.testing.assert_array_equal(golden["frame_image"], expected)
    assert run(program, bundle)[:2] == (0, ["golden samples: 5 within the tolerance; preprocessing: as at export"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "visible", "ragged"])
@pytest.mark.parametrize("kind", [{}, {"images": "uint8"}, {"batch": 3}, {"features": "float16", "precision": "fp16"}])
def test_it_computes_what_python_computes(program: Path, tmp_path: Path, mode: str, kind: dict[str, Any]) -> None:
    bundle = write_bundle(tmp_path / "bundle", token_mode=mode, **kind)
    exif = Image.Exif()
    for orientation in (1, 6) if kind else range(1, 9):
        exif[0x0112] = orientation
        image = photo(tmp_path / f"{orientation}.jpg", exif=exif, quality=95)
        code, lines, error = run(program, bundle, image)
        assert (code, error) == (0, "")
        with Backbone.load(bundle) as backbone:
            (wanted,) = top_k(backbone(backbone.read(image)).logits.astype(np.float32), CLASS_NAMES, 5)
        found = [line.rsplit(" ", 1) for line in lines[1:]]
        assert [name for name, _ in found] == [name for name, _ in wanted]
        # Six digits are printed; FP16 has three.
        shares = pytest.approx([share for _, share in wanted], rel=1e-2 if "features" in kind else 1e-4)
        assert [float(share) for _, share in found] == shares


@pytest.mark.slow
def test_it_says_what_is_wrong(program: Path, tmp_path: Path) -> None:
    flawed = write_bundle(tmp_path / "off", flaw="off_by_one"), write_bundle(tmp_path / "other", weights_seed=1)
    for bundle in flawed:
        code, lines, error = run(program, bundle)
        assert (code, lines) == (1, [])
        assert re.search(r"^error: logits: .* misses the tolerance$", error, re.MULTILINE)
    assert run(program, tmp_path)[2] == f"error: no bundle at {tmp_path}: there is no manifest.json\n"
    (tmp_path / "a.png").write_bytes(b"hello")
    code, _, error = run(program, write_bundle(tmp_path / "good"), tmp_path / "a.png")
    assert (code, error) == (1, f"error: {tmp_path / 'a.png'} is neither PNG nor JPEG\n")
    cut = photo(tmp_path / "b.png").read_bytes()[:300]
    (tmp_path / "c.png").write_bytes(cut)
    assert run(program, tmp_path / "good", tmp_path / "c.png")[0] == 1


@pytest.mark.parametrize("major", [8, 10])
def test_the_tensorrt_program_compiles(major: int) -> None:
    """Against declarations as NVIDIA's headers have them, which are not to be had without NVIDIA's registry."""
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}"]
    command += [f"-DTRT_MAJOR_ENTERPRISE={major}"]
    found = subprocess.run([*command, SOURCES / "src" / "tensorrt.cpp"], capture_output=True, text=True)
    assert found.returncode == 0 or "nlohmann/json.hpp: No such file" in found.stderr, found.stderr
