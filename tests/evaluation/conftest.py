"""Exported bundles, and images for them."""

from tests.commands.conftest import exported, photos

__all__ = ["exported", "photos"]
