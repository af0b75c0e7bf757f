"""One student of a report: its FP32 and INT8 bundles and what they get right, each kept as soon as it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy import __version__
from mae_deploy.checkpoint import Checkpoint, open_checkpoint
from mae_deploy.commands.report.config import ReportConfig
from mae_deploy.config import fixed_settings
from mae_deploy.data.class_order import check_order
from mae_deploy.data.sources.files import ImageList
from mae_deploy.data.sources.open import labelled_val
from mae_deploy.data.sources.splits import announce
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.evaluation import evaluate
from mae_deploy.evaluation.config import EvalConfig
from mae_deploy.export import run as export
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.int8_config import Int8Config
from mae_deploy.files import read_json, remove, sha256, write_json
from mae_deploy.images.find import find_images
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.manifest import MANIFEST_FILE
from mae_deploy.runtime.parity.bounds import difference_interval
from mae_deploy.runtime.parity.certificate import Classes

FP32, INT8, MIX = "fp32", "int8", "int8-mix"
"""Folders of bundles: in FP32, everything in INT8, the mix that loses less."""

RESULT = "result.json"

SHARES = (1.0, 0.75, 0.5, 0.25, 0.15)
"""Of the patches, where a student was trained on a range of them and none are asked for; its own least and largest
share beside them."""

CALIBRATION_IMAGES = 128
"""The least that calibration takes."""

_LOOSE_SQNR, _LOOSE_COSINE = 10.0, 0.9
"""What INT8 must keep of the FP32 outputs. Its worth is measured by top-1: a student that was distilled for INT8 may
differ from its FP32, and be right."""

_ANY_LATENCY = 1e9
"""Times are compared in the end, those of all students in turns."""


@dataclass(frozen=True, slots=True)
class CheckedStudent:
    """A bundle and what it gets right, of each share."""

    bundle: Path
    top1: tuple[float, ...]
    """In per cent."""
    wrong: tuple[Array, ...]
    """bool `(S,)`: which images it has wrong."""

    def beside(self, fp32: CheckedStudent) -> list[Classes]:
        """Right (0) and wrong (1) with FP32's, image by image."""
        return [
            Classes(before.astype(np.int64), after.astype(np.int64), np.zeros(len(after), np.int64))
            for before, after in zip(fp32.wrong, self.wrong, strict=True)
        ]


class Student:
    """A trained classifier, with a folder of its own for bundles and `result.json`.

    Raises:
        ConfigError: no checkpoint, one without a head, images that are not of its classes, or settings of INT8 that the
            engine cannot have.
    """

    def __init__(self, run: Path, folder: Path, config: ReportConfig) -> None:
        self.run, self.folder, self.config = run, folder, config
        self.checkpoint: Checkpoint = open_checkpoint(run)
        metadata = self.checkpoint.metadata
        if metadata.kind != "classifier":
            raise ConfigError(
                f"{run} is a {metadata.kind} without a head", hint="a report needs top-1: fine-tune it first"
            )
        trained = metadata.provenance.get("config", {})
        self.shares = config.keep_ratio or _trained_shares(trained.get("keep_ratio"))
        self.tokens = "full" if self.shares == (1.0,) else "visible"
        self._learned = trained.get("edge", {}).get("quantize", "none")
        images = labelled_val(config.data, metadata.class_names)
        announce(config.data, {"": images})
        if metadata.class_names is None:
            check_order(images, "the student")
        self._samples = images.root if isinstance(images, ImageList) else None
        self._exports = {part: self._export_config(part, int8) for part, int8 in _quantizations(config).items()}
        self._key = {
            "mae_deploy": __version__,
            "weights": sha256(self.checkpoint.weights),
            "data": images.fingerprint(),
            "engine": config.engine,
            "judged": "image by image",
            "shares": list(self.shares),
            "int8": fixed_settings(config.int8),
            "calibration": str(self._exports[INT8].int8.calib_data),
            "seed": config.seed,
        }
        found = read_json(folder / RESULT) if (folder / RESULT).is_file() else {}
        self._parts: dict[str, Any] = found if found.get("key") == self._key else {}

    def check(self) -> None:
        """Export and evaluate what is missing: FP32, everything in INT8, and where that loses too much, the fastest mix
        that export finds.
        """
        if (
            not self._parts
        ):  # of other weights or settings, nothing is of use; what is made now is known by the key if it is cut off
            remove(self.folder)
            self._parts["key"] = self._key
            write_json(self.folder / RESULT, self._parts)
        for part in self._exports:
            if part != MIX or self._may_gain_by_a_mix():
                self._do(part)

    @property
    def fp32(self) -> CheckedStudent:
        """The bundle that INT8 is compared with."""
        return self._checked(FP32)

    @property
    def int8(self) -> CheckedStudent | None:
        """The bundle that loses less; None where there is none."""
        found = [part for part in (INT8, MIX) if math.isfinite(self._worst_drop(part))]
        return self._checked(min(found, key=self._worst_drop)) if found else None

    @property
    def rejected(self) -> str | None:
        """Why there is no INT8."""
        return None if self.int8 is not None else str(self._parts[MIX if MIX in self._parts else INT8]["rejected"])

    @property
    def images(self) -> int:
        """Images that it was evaluated on."""
        return int(self._parts[FP32]["images"])

    @property
    def parameters(self) -> int:
        """Numbers in the checkpoint: encoder, position embeddings and head."""
        return sum(tensor.numel() for tensor in self.checkpoint.tensors().values())

    @property
    def _most(self) -> float:
        assert self.config.int8.max_drop is not None
        return self.config.int8.max_drop

    def _checked(self, part: str) -> CheckedStudent:
        found = self._parts[part]
        numbers = np.arange(found["images"])
        return CheckedStudent(
            self.folder / part, tuple(found["top1"]), tuple(np.isin(numbers, wrong) for wrong in found["wrong"])
        )

    def _may_gain_by_a_mix(self) -> bool:
        """Whether everything in INT8 loses too much, or is not shown not to by images that could show it of a mix."""
        if self._worst_drop(INT8) > self._most:
            return True
        enough = difference_interval(0, 0, self.images)[1] * 100 <= self._most
        return enough and not all(classes.rule(self._most).passed for classes in self._checked(INT8).beside(self.fp32))

    def _worst_drop(self, part: str) -> float:
        """The largest loss of top-1 of any share, in points."""
        if "top1" not in self._parts.get(part, {}):
            return math.inf
        return max(map(drop, self.fp32.top1, self._checked(part).top1))

    def _do(self, part: str) -> None:
        if part not in self._parts:
            self._parts[part] = self._made(part)
            write_json(self.folder / RESULT, self._parts)

    def _made(self, part: str) -> dict[str, Any]:
        """A bundle and its top-1, or why there is none."""
        config, out = self.config, self.folder / part
        if not (out / MANIFEST_FILE).is_file():
            try:
                export.run_export(self._exports[part])
            except CheckFailed as error:
                if part == FP32:
                    raise
                return {"rejected": str(error)}
        asked = EvalConfig(
            model=out,
            data=config.data,
            keep_ratio=self.shares,
            engine=config.engine,
            threads=config.threads,
            affinity=config.affinity,
            seed=config.seed,
            device=config.device,
        )
        data, shares = evaluate.count_right(asked)
        return {
            "images": data["images"],
            "top1": [accuracy.top1 for accuracy in shares],
            "wrong": [accuracy.wrong for accuracy in shares],
        }

    def _export_config(self, part: str, int8: Int8Config) -> ExportConfig:
        config = self.config
        export_config = ExportConfig(
            checkpoint=self.checkpoint.path,
            out=self.folder / part,
            engine=config.engine,
            tokens=self.tokens,
            precision="fp32" if part == FP32 else "int8",
            int8=int8,
            samples=self._samples,
            threads=config.threads,
            seed=config.seed,
            device=config.device,
        )
        if (
            self._learned == export_config.policy == "dynamic" and config.int8.calib_data is None
        ):  # it was smoothed by its weights alone
            return replace(export_config, int8=replace(int8, calib_data=None))
        return export_config


def drop(fp32: float, int8: float) -> float:
    """What INT8 loses of a top-1 in per cent, in points, without the last digits of the floating-point difference, on
    which no result may hang.
    """
    return round(fp32 - int8, 9)


def linears_in_int8(bundle: Bundle) -> str:
    """How many of the Linears are in INT8, such as '20 of 24'."""
    record = bundle.manifest["quantization"]
    assert record is not None
    return f"{len(record['quantized'])} of {record['linears']}"


def _trained_shares(keep_ratio: Any) -> tuple[float, ...]:
    """What a run was trained on, from the largest share down."""
    if keep_ratio is None:
        return (1.0,)
    low, high = keep_ratio
    return tuple(sorted({low, high, *(share for share in SHARES if low < share < high)}, reverse=True))


def _quantizations(config: ReportConfig) -> dict[str, Int8Config]:
    """What is tried, by its folder."""
    int8, train = config.int8, config.data / "train"
    if int8.calib_data is None and _calibrates(train):
        int8 = replace(int8, calib_data=train)
    if int8.calib_data is not None and not _calibrates(int8.calib_data):
        raise ConfigError(
            f"--calib-data {int8.calib_data} has not the {CALIBRATION_IMAGES} images that calibration needs"
        )
    whole = replace(
        int8,
        min_sqnr=int8.min_sqnr or _LOOSE_SQNR,
        min_cosine=int8.min_cosine or _LOOSE_COSINE,
        max_drop=99.0,
        search=False,
    )
    found = {FP32: Int8Config(), INT8: replace(whole, max_latency=_ANY_LATENCY)}
    return found | {MIX: replace(int8, max_drop=None, max_latency=_ANY_LATENCY)} if int8.search else found


def _calibrates(folder: Path) -> bool:
    """Whether it has enough images, as files."""
    try:
        return len(find_images(folder, say=False)) >= CALIBRATION_IMAGES
    except ConfigError:
        return False
