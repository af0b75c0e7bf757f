"""torchvision's Mask R-CNN on an encoder's feature pyramid (ViTDet): train it here, run its backbone anywhere.

python examples/detector.py runs/mae --out detector.safetensors
mae-deploy export runs/mae --out bundles/pyramid --pyramid detector.safetensors --outputs p2,p3,p4,p5
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_model
from torchvision.models.detection import MaskRCNN

from mae_deploy.models.pyramid import OUT_CHANNELS, SimpleFeaturePyramid
from mae_deploy.models.vit import run_blocks
from mae_deploy.weights.load import encoder_of, read_weights


class ViTDet(torch.nn.Module):
    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.encoder = encoder_of(read_weights(checkpoint)).requires_grad_(False)
        self.pyramid, self.out_channels = SimpleFeaturePyramid(self.encoder.config.width), OUT_CHANNELS

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = run_blocks(self.encoder.blocks, self.encoder.embed(images))[:, 1:]  # before the final norm
        maps = self.pyramid(tokens.transpose(1, 2).unflatten(2, self.encoder.config.grid_size)).values()
        return {**dict(zip("0123", maps, strict=True)), "pool": list(maps)[-1][:, :, ::2, ::2]}  # torchvision's names


# Your images and boxes take the place of these, bright squares on noise.
def made_images(side: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    image, size, (left, top) = 0.3 * torch.rand(3, side, side), side // 3, torch.randint(0, side // 2, (2,)).tolist()
    image[:, top : top + size, left : left + size] += 0.6
    boxes = torch.tensor([[left, top, left + size, top + size]], dtype=torch.float32)
    masks = (image.mean(0) > 0.5).to(torch.uint8)[None]
    return [image], [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64), "masks": masks}]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args(arguments)
    side = (vitdet := ViTDet(given.checkpoint)).encoder.config.image_size[0]
    detector = MaskRCNN(vitdet, num_classes=2, min_size=side, max_size=side)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)
    for step in range(given.steps):
        loss = sum(detector(*made_images(side)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}/{given.steps}  loss {loss.item():.3f}")
    save_model(detector, given.out)


if __name__ == "__main__":
    main()
