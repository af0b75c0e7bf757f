"""`verify --certificate`: what is measured with and without FP32 at hand, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.commands import certify as certify_module
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from mae_deploy.files import remove
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.parity.certificate import Speed
from mae_deploy.runtime.timing import Timing
from tests.export.tiny_exports import CLASS_NAMES


@pytest.fixture(scope="module")
def made(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier in FP32 and FP16, and labelled photos."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(exported / "checkpoints" / "classifier", root / "checkpoint")
    for number, path in enumerate(sorted((exported / "photos").iterdir())):
        folder = root / "photos" / CLASS_NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(folder / f"{number}.png")
    for precision in ("fp32", "fp16"):
        run_export(
            ExportConfig(
                checkpoint=root / "checkpoint",
                out=root / precision,
                precision=precision,
                samples=root / "photos",
                threads=1,
            )
        )
    return root


@pytest.fixture
def certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The exit code, the record and what was said of `verify --certificate`."""

    def run(bundle: Path, *arguments: object) -> tuple[int, dict[str, Any] | None, str]:
        file = tmp_path / "certificate.json"
        remove(file)
        code = main(["verify", str(bundle), "--certificate", str(file), "--threads", "1", *map(str, arguments)])
        return code, json.loads(file.read_text()) if file.is_file() else None, capsys.readouterr().err

    return run


def test_against_fp32_on_labelled_images(made: Path, certified: Any) -> None:
    code, record, said = certified(made / "fp16", "--against", made / "fp32")
    assert (code, record["passed"], record["images"]) == (0, True, f"11 images of {made / 'photos'}")
    assert record["speed"]["ratio_interval"][0] <= record["speed"]["ratio"] <= record["speed"]["ratio_interval"][1]
    classes = record["classes"]
    assert (classes["images"], classes["labelled"], classes["agreement"]) == (11, True, 1)
    assert classes["drop_interval"] == pytest.approx([-36.0, 36.0], abs=0.1)  # 1 - 0.0075 ** (1 / 11)
    assert {output["name"] for output in record["outputs"]} == {"logits", "pooled"}
    assert all(rule["passed"] for rule in record["rules"])
    assert "is exported to compare with" not in said


def test_the_recorded_checkpoint_is_fp32_where_it_is_still_there(made: Path, certified: Any) -> None:
    code, record, said = certified(made / "fp16")
    assert (code, record["classes"]["images"]) == (0, 11)
    assert record["speed"] is not None
    assert f"FP32: {made / 'checkpoint'} is exported to compare with" in said


def test_without_fp32_the_golden_samples_alone_are_compared(made: Path, tmp_path: Path, certified: Any) -> None:
    bundle = shutil.copytree(made / "fp16", tmp_path / "b")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["provenance"]["checkpoint"]["path"] = "gone"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, record, said = certified(bundle)
    assert (code, record["speed"], record["images"]) == (0, None, "8 golden samples of the export")
    assert (record["classes"]["images"], record["classes"]["labelled"]) == (8, False)
    assert "golden samples only: there is no FP32 to compare with" in said


def test_a_budget_that_is_not_met_here_is_written_and_refused(
    made: Path, tmp_path: Path, certified: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faster where it was exported, slower here; and 11 images cannot show what 1,000 may have shown."""
    bundle = shutil.copytree(made / "fp16", tmp_path / "b")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["provenance"]["export"]["int8"].update(max_drop=1.0, max_latency=1.0)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(certify_module, "QUANTIZED", ("fp16",))
    slower = Speed(timing=Timing((2e-3, 2e-3)), baseline=Timing((1e-3, 1e-3)))
    monkeypatch.setattr(certify_module, "time_both", lambda *_: slower)
    code, record, said = certified(bundle, "--against", made / "fp32")
    assert (code, record["passed"]) == (1, False)
    assert [rule["rule"] for rule in record["rules"] if not rule["passed"]] == [
        "points of top-1 lost, upper end",
        "share of FP32's latency, upper end",
    ]
    assert "misses its budget: top-1 is" in said
    assert "11 images are too few to show it: about 704 would do" in said
    assert "it takes 2.00 of FP32's latency" in said


def test_export_writes_the_same_record(made: Path) -> None:
    record = Bundle.load(made / "fp16").manifest.get("certificate")
    assert record is not None
    assert (record["passed"], record["classes"]["images"], record["speed"]) == (True, 11, None)
    assert record["rules"][0].keys() == {"rule", "at_least", "value", "passed"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--against", "fp16"), "is in fp16"),
        (("--graph", "x.onnx"), "--certificate needs a bundle"),
    ],
)
def test_what_is_refused(made: Path, certified: Any, arguments: tuple[str, str], said: str) -> None:
    flag, name = arguments
    code, record, message = certified(made / "fp16", flag, made / name)
    assert (code, record) == (2, None)
    assert said in message


def test_options_that_need_a_certificate(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--against", "--samples"):
        assert main(["verify", str(made / "fp16"), option, str(made)]) == 2
        assert f"{option} is about " in capsys.readouterr().err
    existing = made / "checkpoint" / "metadata.json"
    assert main(["verify", str(made / "fp16"), "--certificate", str(existing)]) == 2
    assert f"--certificate {existing} already exists" in capsys.readouterr().err
