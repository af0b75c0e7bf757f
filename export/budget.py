"""How many images --max-drop takes, and whether there are enough."""

from __future__ import annotations

from mae_deploy.errors import CheckFailed
from mae_deploy.export.config import ExportConfig
from mae_deploy.runtime.parity.bounds import CONFIDENCE, difference_interval, images_needed


def class_count(config: ExportConfig) -> int:
    """Images of which the classes are compared: where --max-drop is to be shown, twice as many as that takes if
    not one is lost.
    """
    if config.num_samples is not None or config.int8.max_drop is None:
        return config.sample_count
    return max(config.sample_count, 2 * (images_needed(config.int8.max_drop / 100) or 0))


def check_enough(most: float, count: int) -> None:
    """Whether a --max-drop of so many points can be shown on so many images at all.

    Raises:
        CheckFailed: it cannot, whatever is exported.
    """
    needed = images_needed(most / 100)
    if needed is None or count < needed:
        high = 100 * difference_interval(0, 0, count)[1]
        raise CheckFailed(
            f"--max-drop {most:g} cannot be shown on {count} images: even if not one is lost, it may be {high:.2f}"
            f" points with {CONFIDENCE:.0%} confidence",
            hint="no number of images shows that nothing is lost: give a larger one"
            if needed is None
            else f"at least {needed} images are needed: --samples FOLDER, and no smaller --num-samples",
        )
