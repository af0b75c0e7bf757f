"""The NaN guard: a step whose loss or gradient is not finite is skipped, then the run goes back, then it stops.

Every process sees the same reduced loss and gradient, and all that is decided follows from them and the step, so
processes need not talk about it and a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mae_deploy.checkpoint import save_tensors
from mae_deploy.data.dataset import Batch
from mae_deploy.errors import CheckFailed
from mae_deploy.files import atomic_path, write_json
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.progress import notice
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.state.progress import Progress

LR_FACTOR = 0.5
"""The learning rate's factor for each time that the run goes back."""

_MOST_SAVED = 20
"""Steps whose batches are saved in one run; more would fill the disk of a run that skips one step an epoch for
months."""


_LARGEST_INPUT = 1000
"""Deviations from the mean beyond which the input is to blame: 255 where all of 8 bits is one deviation."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step gave, as far as the guard cares."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over processes and accumulated batches."""
    grad_norm: float
    own_losses: tuple[float, ...]
    """Of each accumulated batch of this process."""
    batches: tuple[Batch, ...]
    scale: float | None = None
    """The fp16 loss scale of this step."""

    @property
    def finite(self) -> bool:
        """Whether the optimiser took this step."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def overflow(self) -> bool:
        """Whether fp16's loss scale was only too large, which the scaler mends by itself."""
        return self.scale is not None and self.scale > 1 and math.isfinite(self.loss)


class Guard:
    """Counts skipped steps, saves their batches, and says when to go back."""

    def __init__(
        self,
        state: Progress,
        loop: LoopConfig,
        run: Path,
        spec: Preprocess,
        *,
        process: int | None,
        late: int,
        total_steps: int,
    ) -> None:
        self.state = state
        self.spec = spec
        self.loop = loop
        self.folder = run / "nonfinite"
        self.process = process
        """Number of this process, None where it is the only one."""
        self.late = late
        """Steps after which a step's numbers are known on this device."""
        self.total_steps = total_steps

    def observe(self, outcome: StepOutcome) -> CheckFailed | None:
        """Take in one step; sets `state.rollback_at` where too many in a row were skipped, or returns the error that
        ends the run.
        """
        state = self.state
        if outcome.finite:
            state.consecutive_skips = 0
            return None
        state.skipped += 1
        if outcome.overflow:
            return None
        self._save(outcome)
        if state.rollback_at is not None:
            return None  # already on the way back; this step was launched before that was known
        state.consecutive_skips += 1
        if state.consecutive_skips < self.loop.max_skips:
            return None
        if state.rollbacks < self.loop.max_rollbacks and outcome.step + self.late < self.total_steps:
            state.rollback_at = outcome.step + self.late
            return None
        return CheckFailed(
            f"the loss or its gradient was not finite in {state.consecutive_skips} step(s) in a row, after going back"
            f" {state.rollbacks} time(s); step {outcome.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm};"
            f" its batch: {self._saved_file(outcome.step)}",
            hint=input_fault(outcome.batches, self.spec)
            or "look at the images of that batch; start a new run with a smaller --blr, --clip-grad 1, or --precision"
            " fp32",
        )

    def check_end(self, numbers: Mapping[str, float]) -> None:
        """Whether the weights that the run ends with give numbers, by what was computed with them.

        Raises:
            CheckFailed: one is NaN or infinite.
        """
        wrong = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            good = "none is kept" if self.state.good is None else f"step-{self.state.good}"
            raise CheckFailed(
                f"the weights after the last step, {self.state.step}, give no numbers ({', '.join(wrong)}), so they are"
                f" not kept; the last checkpoint that gave some: {good}",
                hint="start a new run with a smaller --lr or --blr, --clip-grad 1, or --precision fp32",
            )

    def rolled_back(self, to: str) -> None:
        """The run has gone back."""
        state = self.state
        state.rollback_at, state.consecutive_skips = None, 0
        state.rollbacks += 1
        state.lr_factor *= LR_FACTOR
        if not self.process:
            notice(
                "rolled back",
                f"after step {state.step} to {to}; the learning rate is now {state.lr_factor:g} times the schedule's",
            )

    def _save(self, outcome: StepOutcome) -> None:
        """The batches whose own loss was not finite; all of this process where every process's loss was, and only the
        gradient was not.
        """
        guilty = [
            batch for batch, loss in zip(outcome.batches, outcome.own_losses, strict=True) if not math.isfinite(loss)
        ]
        if math.isfinite(outcome.loss):
            guilty = list(outcome.batches)
        file = self._file(outcome.step)
        if not guilty or len(list(self.folder.glob("*.json"))) >= _MOST_SAVED:
            return
        with atomic_path(file) as aside:
            images, labels = (torch.cat([getattr(b, name) for b in guilty]) for name in ("images", "labels"))
            save_tensors(aside, {"images": images, "labels": labels})
        found = {
            "step": outcome.step,
            "loss": str(outcome.loss),
            "grad_norm": str(outcome.grad_norm),
            "own_losses": [str(loss) for loss in outcome.own_losses],
            "names": [name for batch in guilty for name in batch.names],
        }
        write_json(file.with_suffix(".json"), found)
        fault = input_fault(tuple(guilty), self.spec)
        notice(
            "skipped step",
            f"{outcome.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}; its batch is saved in {file}"
            + (f"; {fault}" if fault else ""),
            own=True,
        )

    def _file(self, step: int) -> Path:
        return self.folder / (
            f"step-{step}.safetensors" if self.process is None else f"step-{step}-rank-{self.process}.safetensors"
        )

    def _saved_file(self, step: int) -> Path:
        """Of this step, else of the one that was saved last: the count is limited, and another process may have met
        it.
        """
        if (own := self._file(step)).is_file():
            return own
        found = sorted(
            self.folder.glob("*.safetensors"), key=lambda file: (f"step-{step}" in file.name, file.stat().st_mtime)
        )
        return found[-1] if found else self.folder


def input_fault(batches: Sequence[Batch], spec: Preprocess) -> str | None:
    """What is wrong with the images before any network has seen them, as mean and deviation leave them."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (spec.mean, spec.std))
    for batch in batches:
        inputs = (batch.images.double() / spec.divisor - mean) / std
        largest = inputs.abs().movedim(-3, 0).flatten(1).amax(dim=1)  # NaN where there is one
        channel = int(torch.where(largest.isnan(), math.inf, largest).argmax())
        if not float(largest[channel]) <= _LARGEST_INPUT:
            return (
                f"the input is at fault: channel {channel} (counted from 0) reaches {float(largest[channel]):.3g}"
                f" deviations with --mean {spec.mean[channel]:g}, --std {spec.std[channel]:g} and pixels divided by"
                f" {spec.divisor:g}; mae-deploy data stats prints what fits"
            )
    return None
