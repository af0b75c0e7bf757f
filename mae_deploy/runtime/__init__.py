"""The torch-free side: load a bundle, check it, run it."""

from mae_deploy.runtime.backbone import Backbone, Features
from mae_deploy.runtime.bundle import Bundle

__all__ = ["Backbone", "Bundle", "Features"]
