"""A checkpoint and images to export."""

from tests.export.conftest import robust

__all__ = ["robust"]
