"""Without anything in front of the background there is nothing to train a probe on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mae_deploy.cli import main
from mae_deploy.commands.stream_eval.config import StreamEvalConfig
from mae_deploy.commands.stream_eval.halves import FirstHalf
from mae_deploy.runtime.backbone import Backbone
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_encoder


def test_a_probe_needs_something_to_find(tmp_path: Path) -> None:
    checkpoint, bundle = write_checkpoint(tmp_path / "checkpoint", tiny_encoder()), tmp_path / "cached"
    assert main(["export", str(checkpoint), "--out", str(bundle), "--tokens", "cached"]) == 0
    config = StreamEvalConfig(videos=(tmp_path,), bundle=bundle)
    frame = np.zeros((*ENCODER.image_size, 3), np.uint8)
    with Backbone.load(bundle, "onnxruntime", threads=1) as backbone:
        for labels, trained in ((np.zeros(ENCODER.num_patches, bool), False), (np.arange(15) == 3, True)):
            half = FirstHalf(backbone, config, None)
            half.add(frame, labels)
            assert (half.probe() is not None) == trained
