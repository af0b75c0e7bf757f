"""What is said about the licence of weights when something is made from them."""

from __future__ import annotations

from mae_deploy.checkpoint import NON_COMMERCIAL, UNKNOWN_LICENCE
from mae_deploy.progress import notice


def say_licence(licence: str, made: str) -> None:
    """A line on stderr where the weights may not be used for everything, or nobody said what for."""
    if NON_COMMERCIAL in licence:
        notice("licence:", f"{licence}: these weights derive from a non-commercial release, and so does {made}")
    elif UNKNOWN_LICENCE in licence:
        notice(
            "licence:", f"{licence}: pass --license to 'mae-deploy import' to record what these weights may be used for"
        )
