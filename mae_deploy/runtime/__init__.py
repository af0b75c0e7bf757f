"""The torch-free side: load a bundle, check it, run it."""

from mae_deploy.images.read import UnreadableImage
from mae_deploy.runtime.backbone import Backbone, Features
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.predict import Predictions, Unreadable, top_k

__all__ = ["Backbone", "Bundle", "Features", "Predictions", "Unreadable", "UnreadableImage", "top_k"]
