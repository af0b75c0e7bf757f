"""What is found in the data and not used: counted by reason, so that no file disappears unsaid."""

from __future__ import annotations

_SHOWN = 8
"""Reasons that are told; a folder that is no data set has hundreds."""


class LeftOut:
    """Counts by reason, each with the first name that it was met under."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count one more."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self._first.setdefault(reason, name)

    def merge(self, other: LeftOut) -> None:
        """Count what another one counted."""
        for reason, count in other.counts.items():
            self.add(reason, other._first[reason], count)

    def without(self, other: LeftOut) -> LeftOut:
        """What is counted here for reasons that another one does not know."""
        rest = LeftOut()
        for reason, count in self.counts.items():
            if reason not in other.counts:
                rest.add(reason, self._first[reason], count)
        return rest

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Such as `4 .heic (pip install pillow-heif) such as trip/a.heic, 1 without a suffix such as IMG_1`."""
        ranked = sorted(self.counts.items(), key=lambda pair: -pair[1])
        shown = [f"{count} {reason} such as {self._first[reason]}" for reason, count in ranked[:_SHOWN]]
        if rest := ranked[_SHOWN:]:
            shown.append(f"{sum(count for _, count in rest)} of {len(rest)} other kinds")
        return ", ".join(shown)
