"""A trace of a few training steps by PyTorch's profiler, and a table of what cost most in them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mae_deploy.files import atomic_path, write_text
from mae_deploy.progress import notice

_BEFORE, _WARM_UP, _STEPS = 3, 2, 3
"""Steps before the profiler starts, with it but without record, and recorded."""

_ROWS = 40


class Profiler:
    """Records steps of the process that writes; does nothing unless enabled.

    Writes `FOLDER/trace.json`, which chrome://tracing and Perfetto open, and `FOLDER/operators.txt`.
    """

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self.folder = folder
        self._profile: profile | None = None
        if enabled:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            plan = schedule(wait=_BEFORE, warmup=_WARM_UP, active=_STEPS, repeat=1)
            self._profile = profile(
                activities=activities,
                schedule=plan,
                on_trace_ready=self._write,
                record_shapes=True,
                acc_events=True,  # of the one cycle that there is: torch 2.11 warns where it is left out
            )

    def step(self) -> None:
        """Called after each step."""
        if self._profile is not None:
            self._profile.step()

    def __enter__(self) -> Profiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, found: Any) -> None:
        with atomic_path(self.folder / "trace.json") as aside:
            found.export_chrome_trace(str(aside))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_text(self.folder / "operators.txt", found.key_averages().table(sort_by=by, row_limit=_ROWS) + "\n")
        notice("profile:", f"{_STEPS} steps in {self.folder}")
