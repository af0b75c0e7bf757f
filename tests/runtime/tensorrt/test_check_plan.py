"""The proof of an engine finds what is wrong at one size only, or in CUDA graphs only; ONNX Runtime stands in
TensorRT's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mae_deploy.errors import MissingDependency
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.parity.checks import Check
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt.check_plan import check_plan, expected_outputs, inputs_at, parity_record, repeated
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine
from tests.runtime.tiny_bundle import OUTPUTS, K, N, write_bundle

PROFILES: list[Profile] = [{"B": (1, 1, 1), "K": (K, K, K)}, {"B": (2, 3, 7), "K": (2, 5, N)}]


class Planned(OnnxRuntimeEngine):
    """An engine with or without CUDA graphs, which may be wrong for one size, or in its graphs."""

    def __init__(
        self,
        bundle: Bundle,
        profiles: Sequence[Profile] = PROFILES,
        *,
        use_graphs: bool = False,
        wrong_sizes: tuple[int, ...] | None = None,
        wrong_graphs: bool = False,
        precision: str | None = None,
    ) -> None:
        super().__init__(bundle.graph(), EngineOptions(), precision=precision or bundle.precision, profiles=profiles)
        self.name = "tensorrt"
        self.use_graphs = use_graphs
        self.met: set[tuple[int, ...]] = set()
        self.wrong_sizes, self.wrong_graphs = wrong_sizes, wrong_graphs

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        found = super()._run(inputs, outputs)
        sizes = inputs["ids_keep"].shape if "ids_keep" in inputs else inputs["images"].shape[:1]
        replayed = self.use_graphs and sizes in self.met
        self.met |= {sizes} if self.use_graphs else set()
        if sizes == self.wrong_sizes or (self.wrong_graphs and replayed):
            found["cls"] = found["cls"] * np.float32(1.01)
        return found


def checked(bundle: Bundle, profiles: Sequence[Profile] = PROFILES, **flaws: Any) -> list[Check]:
    """Without CUDA graphs, then with them."""
    expected = expected_outputs(bundle, profiles)
    checks: list[Check] = []
    for use_graphs in (False, True):
        with Planned(bundle, profiles, use_graphs=use_graphs, **flaws) as engine:
            checks += check_plan(bundle, cast(TensorRtEngine, engine), profiles, expected)
    return checks


def failed(checks: Sequence[Check]) -> set[tuple[str, str]]:
    return {(check.name, check.comparison.name) for check in checks if check.failures}


def test_a_right_engine_passes_at_every_size(visible_bundle: Path) -> None:
    checks = checked(Bundle.load(visible_bundle))
    assert not failed(checks)
    names = [
        "profile 0 min, B=1, K=4",
        "profile 1 min, B=2, K=2",
        "profile 1 opt, B=3, K=5",
        f"profile 1 max, B=7, K={N}",
    ]
    both = [*names, *(f"{name}, CUDA graph" for name in names)]
    assert list(dict.fromkeys(check.name for check in checks if check.name.startswith("profile"))) == both
    golden = [check.comparison.name for check in checks if check.name == "golden"]
    assert golden == list(OUTPUTS)
    assert {"permuted ids_keep, CUDA graph", "sample alone", "golden, CUDA graph", "run again"} <= {
        check.name for check in checks
    }


def test_an_engine_that_is_wrong_at_one_size(visible_bundle: Path) -> None:
    checks = checked(Bundle.load(visible_bundle), wrong_sizes=(7, N))
    assert failed(checks) == {(f"profile 1 max, B=7, K={N}", "cls"), (f"profile 1 max, B=7, K={N}, CUDA graph", "cls")}


def test_an_engine_that_is_wrong_in_cuda_graphs(visible_bundle: Path) -> None:
    found = failed(checked(Bundle.load(visible_bundle), wrong_graphs=True))
    assert len({name for name, _ in found if name.startswith("profile")}) == 4
    assert found == {(name, "cls") for name, _ in found}
    assert all(name.endswith(", CUDA graph") for name, _ in found)


@pytest.mark.parametrize(
    "settings", [{"token_mode": "full"}, {"token_mode": "ragged"}, {"batch": 2}, {"keep": 4}, {"images": "uint8"}]
)
def test_every_kind_of_graph(tmp_path: Path, settings: dict[str, Any]) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "b", **settings))
    sizes = bundle.manifest["profile"]
    few = {"B": sizes["B"] if bundle.fixed_batch else [2, 3, 7], "K": sizes.get("K", [])}
    profile: Profile = {name: (few[name][0], few[name][1], few[name][2]) for name in sizes}
    checks = checked(bundle, [profile])
    assert not failed(checks)
    assert any(check.name.startswith("profile 0") for check in checks)


def test_the_tolerance_is_that_of_the_engine_s_precision(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "b", bits=14))  # too coarse for FP32, fine for FP16
    golden = [check for check in checked(bundle, PROFILES[:1], precision="fp16") if check.name.startswith("golden")]
    assert len(golden) == 2 * len(OUTPUTS)
    assert not failed(golden)
    assert any(check.name == "golden" for check in checked(bundle, PROFILES[:1]) if check.failures)


def test_without_a_reference_the_golden_outputs_judge_every_batch(tmp_path: Path) -> None:
    bundle = Bundle.load(
        write_bundle(tmp_path / "b", precision="bf16", change=lambda manifest: manifest.update(typing="strong"))
    )
    names = {check.name for check in checked(bundle) if check.name.startswith("profile")}
    assert names == {
        "profile 0 min, B=1, K=4",
        "profile 0 min, B=1, K=4, CUDA graph",
    }, "PyTorch's outputs are there for K = 4 alone"


def test_without_onnxruntime_no_other_number_of_patches_can_be_checked(
    visible_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_deploy.runtime.tensorrt.check_plan.util.find_spec", lambda _: None)
    bundle = Bundle.load(visible_bundle)
    checks = checked(bundle, [{"B": (1, 2, 3), "K": (K, K, K)}])
    assert failed(checks) == set()
    assert {check.name.partition(",")[0] for check in checks} >= {"profile 0 min", "profile 0 opt", "profile 0 max"}
    with pytest.raises(MissingDependency, match=f"at the golden samples' {K} patches alone, not at 1$"):
        checked(bundle, [{"B": (1, 2, 3), "K": (1, K, K)}])


def test_samples_of_any_size(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "b", token_mode="ragged"))
    golden = bundle.golden()
    same = inputs_at(bundle, golden, golden["ids_keep"].shape[1])
    assert set(same) == {"images", "ids_keep", "num_keep"}
    np.testing.assert_array_equal(same["num_keep"], golden["num_keep"])
    other = inputs_at(bundle, golden, 11)
    assert other["ids_keep"].shape == (5, 11)
    assert all(len(set(row)) == 11 for row in other["ids_keep"].tolist())
    assert (other["num_keep"].min(), other["num_keep"].max()) == (1, 11)
    more = repeated(other, 7)
    np.testing.assert_array_equal(more["ids_keep"][5:], other["ids_keep"][:2])
    assert repeated(other, 3)["images"].shape[0] == 3


def test_the_record_for_the_manifest(visible_bundle: Path) -> None:
    record = parity_record(checked(Bundle.load(visible_bundle), wrong_sizes=(7, N)))
    assert (record["passed"], len(record["golden"]), len(record["sizes"])) == (False, len(OUTPUTS), 8)
    assert record["worst"]["cls"]["sqnr_db"] == pytest.approx(40, abs=0.1), "one percent"
    assert record["worst"]["tokens"]["sqnr_db"] is None or record["worst"]["tokens"]["sqnr_db"] > 100
    assert parity_record(checked(Bundle.load(visible_bundle)))["passed"] is True
