"""What a teacher costs that is cut behind a block, against its whole encoder: in turns, medians.

python scripts/measure_teacher.py [--model vit_base_patch16] [--image-size 224] [--mask-ratio 0.75] [--batch-size 16]
[--precision auto]
    [--device cpu] [--rounds 9] [--bundle BUNDLE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import to_dict
from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import Teacher
from mae_deploy.distill.teachers.checkpoint_teacher import CheckpointTeacher
from mae_deploy.distill.teachers.open import open_teacher
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.models.taps import Tap
from mae_deploy.training.step import StepBatch
from mae_deploy.weights.load import LoadedWeights


def main() -> None:
    """Print the time of each cut, its share, and the share that its blocks and the embedding would have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--bundle", type=Path, help="also the same cuts of this bundle, on the engine that it was checked on"
    )
    options = parser.parse_args()
    encoder = EncoderConfig(name=options.model, image_size=(options.image_size, options.image_size))
    device, size = torch.device(options.device), (options.batch_size, 3, *encoder.image_size)
    batch = StepBatch(torch.randn(size, device=device), torch.zeros(options.batch_size, dtype=torch.int64))
    noise = torch.rand(options.batch_size, encoder.num_patches, device=device)
    masking = random_masking(noise, options.mask_ratio) if options.mask_ratio > 0 else None
    settings = TeacherConfig(teacher_precision=options.precision)
    cuts = {
        f"block {block}": block for block in sorted({max(1, encoder.blocks * quarter // 4) for quarter in (1, 2, 3, 4)})
    }

    def asked(teacher: Teacher, *wanted: Tap) -> Callable[[], object]:
        teacher.watch(wanted, student=encoder, spec=teacher.preprocess)
        teacher.to(device)
        return lambda: teacher(batch, masking, whole=False)

    loaded = _random_weights(encoder)
    full = CheckpointTeacher(loaded, settings)
    ways = {"whole autoencoder": asked(full, Tap("pixels"))}
    ways["embedding"] = lambda: _embedded(full, batch.images, None if masking is None else masking.ids_keep)
    ways |= {name: asked(CheckpointTeacher(loaded, settings), Tap("tokens", block)) for name, block in cuts.items()}
    if options.bundle is not None:
        ways |= {
            f"bundle, {name}": asked(open_teacher(options.bundle, TeacherConfig()), Tap("tokens", block))
            for name, block in cuts.items()
        }
    seconds = _measured(ways, options.rounds, device)
    encoder_ms, embed_ms = (statistics.median(seconds[name]) * 1e3 for name in (f"block {encoder.blocks}", "embedding"))
    for name, found in seconds.items():
        ms = statistics.median(found) * 1e3
        block = cuts.get(name.removeprefix("bundle, "))
        limit = f"{(embed_ms + (encoder_ms - embed_ms) * block / encoder.blocks) / encoder_ms:6.1%}" if block else ""
        print(
            f"{name:20s} {ms:8.1f} ms {options.batch_size / ms * 1e3:8.1f} images/s  {ms / encoder_ms:6.1%} of the"
            f" encoder  {limit}"
        )


def _embedded(teacher: CheckpointTeacher, images: Tensor, ids_keep: Tensor | None) -> Tensor:
    with teacher.arithmetic():
        return teacher.model.embed(images, ids_keep)


def _random_weights(encoder: EncoderConfig) -> LoadedWeights:
    torch.manual_seed(0)
    decoder = DecoderConfig()
    metadata = Metadata(
        kind="mae",
        encoder=to_dict(encoder),
        decoder=to_dict(decoder),
        preprocess=to_dict(default_preprocess(encoder.image_size)),
    )
    return LoadedWeights(metadata, MaskedAutoencoder(encoder, decoder).state_dict(), {"sha256": "random"})


def _measured(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in every round but the first; on a CPU those of this process, which others on the machine do
    not lengthen.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, way in ways.items():
                started = clock()
                way()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:
                    seconds[name].append(clock() - started)
    return seconds


if __name__ == "__main__":
    main()
