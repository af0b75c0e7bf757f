"""Which patches of a frame are worth computing: small rules that combine with `|`, `&` and `Budget`."""

from mae_deploy.runtime.selection.base import Scene, Selection, Selector
from mae_deploy.runtime.selection.motion import Motion
from mae_deploy.runtime.selection.region import Region
from mae_deploy.runtime.selection.rules import Budget, Every, Grid, Oldest, Random, Saliency

__all__ = [
    "Budget",
    "Every",
    "Grid",
    "Motion",
    "Oldest",
    "Random",
    "Region",
    "Saliency",
    "Scene",
    "Selection",
    "Selector",
]
