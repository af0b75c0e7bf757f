"""What the student minimises: features on visible patches while it reconstructs (DMAE), and the teacher's logits (KD).

Bai et al., Masked Autoencoders Enable Efficient Knowledge Distillers: https://arxiv.org/abs/2208.12256
Hinton et al., Distilling the Knowledge in a Neural Network: https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.data.sources import UNLABELLED
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking
from mae_deploy.models.vit import run_blocks


class FeatureDistiller(nn.Module):
    """A student autoencoder and the projector from its width to the teacher's."""

    def __init__(self, student: MaskedAutoencoder, *, block: int, teacher_dim: int, feature_weight: float, pixel_weight: float) -> None:
        super().__init__()
        self.student = student
        self.projector = nn.Linear(student.config.width, teacher_dim)
        self.block = block
        self.feature_weight = feature_weight
        self.pixel_weight = pixel_weight
        if pixel_weight == 0:
            # What lies behind the tap gets no gradient, which would stall distributed training.
            for part in (student.blocks[block:], student.norm, student.decoder_embed, student.decoder_blocks, student.decoder_norm, student.decoder_pred):
                part.requires_grad_(False)
            student.mask_token.requires_grad_(False)

    def forward(self, images: Tensor, masking: Masking, features: Tensor) -> dict[str, Tensor]:
        """Both losses and their weighted sum.

        Args:
            features: the teacher's normalised tokens of the same patches, `(B, 1 + K, D')`.
        """
        student = self.student
        tapped = run_blocks(student.blocks[: self.block], student.embed(images, masking.ids_keep))
        feature = feature_loss(self.projector(tapped), features)
        if self.pixel_weight == 0:
            return {"loss": self.feature_weight * feature, "feature_loss": feature}
        latent = student.norm(run_blocks(student.blocks[self.block :], tapped))
        pixel = student.forward_loss(images, student.forward_decoder(latent, masking.ids_restore), masking.mask)
        return {"loss": self.feature_weight * feature + self.pixel_weight * pixel, "feature_loss": feature, "pixel_loss": pixel}


def feature_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 (beta 2) between `(B, 1 + K, D)` tokens, a scalar in float32."""
    return F.smooth_l1_loss(projected.float(), target.float(), beta=2.0)


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of `(B, classes)` softmax distributions at a temperature, times its square, mean over the batch."""
    return (
        F.kl_div(
            F.log_softmax(student.float() / temperature, dim=1), F.log_softmax(teacher.float() / temperature, dim=1), reduction="batchmean", log_target=True
        )
        * temperature**2
    )


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the labelled images of the batch; 0 where none is labelled: `(B, classes), (B,)` to a scalar."""
    labelled = labels != UNLABELLED
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    return total / labelled.sum().clamp(min=1)
