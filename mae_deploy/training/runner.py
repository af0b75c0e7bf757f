"""The running state of one training run: steps, what is read back of them, evaluations, checkpoints, and its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from mae_deploy.data.dataset import Batch
from mae_deploy.data.order import RunSlice
from mae_deploy.data.transforms import NormaliseImages
from mae_deploy.images.left_out import LeftOut
from mae_deploy.progress import Bar, notice, progress
from mae_deploy.training.checkpoints import Checkpoints
from mae_deploy.training.config import LoopConfig, OptimConfig
from mae_deploy.training.cpu import keep_freed_memory
from mae_deploy.training.job import TrainingJob
from mae_deploy.training.monitor.guard import Guard, StepOutcome
from mae_deploy.training.monitor.profiling import Profiler
from mae_deploy.training.monitor.readback import Readback
from mae_deploy.training.monitor.signals import EXIT_STOPPED, Stopped, StopSignals
from mae_deploy.training.monitor.timing import StepTimer, StepTimes
from mae_deploy.training.monitor.trackers import Trackers
from mae_deploy.training.monitor.unreadable import Unreadable
from mae_deploy.training.optim.groups import adamw
from mae_deploy.training.plan import RunPlan, learning_rate
from mae_deploy.training.state.ema import WeightAverage
from mae_deploy.training.state.progress import Progress
from mae_deploy.training.state.run_folder import RunFolder, read_metrics
from mae_deploy.training.state.sharding import Network
from mae_deploy.training.step import StepNumbers, Stepper


@dataclass(frozen=True, slots=True)
class _Launched:
    """What the host knows of a step whose numbers are still on the device."""

    step: int
    names: tuple[str, ...]
    num_flags: int
    batches: tuple[Batch, ...]
    lr: float
    images: int
    seconds: float
    waited: float
    timer: StepTimer


class TrainingRunner:
    """One `fit`: built from wherever the run folder's last checkpoint is, then run to the end."""

    def __init__(
        self,
        job: TrainingJob,
        folder: RunFolder,
        accelerator: Accelerator,
        plan: RunPlan,
        state: Progress,
        trackers: Trackers,
        unreadable: Unreadable,
        *,
        optim: OptimConfig,
        loop: LoopConfig,
        seed: int,
    ) -> None:
        self.job, self.folder, self.accelerator, self.plan, self.state = job, folder, accelerator, plan, state
        self.trackers, self.unreadable, self.optim, self.loop, self.seed = trackers, unreadable, optim, loop, seed
        self.checkpoints = Checkpoints(job, folder, state, keep=loop.keep_checkpoints)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        network = Network(job.model, accelerator, sharded=loop.sharding == "fsdp2", compiled=loop.compile)
        groups = network.groups(job.groups)
        optimizer = adamw(groups, betas=optim.betas) if job.optimizer is None else job.optimizer(groups)
        self.network = network
        self.average = WeightAverage(job.model, optim.ema) if optim.ema is not None else None
        self.checkpoints.assemble(network, optimizer, self.average)
        normalise = NormaliseImages(job.spec).to(accelerator.device)
        self.stepper = Stepper(job.loss, network, optimizer, normalise, plan, clip_grad=optim.clip_grad, seed=seed)
        self.readback: Readback[_Launched] = Readback(accelerator.device)
        process = accelerator.process_index if accelerator.num_processes > 1 else None
        self.guard = Guard(
            state, loop, folder.path, job.spec, process=process, late=self.readback.late, total_steps=plan.total_steps
        )
        self.signals = StopSignals(launched=accelerator.num_processes > 1)
        self.batches: list[Batch] = []
        self.waited = 0.0
        self.new_unreadable = 0
        self.left_out = LeftOut()
        self.save_asked = self.stop_asked = False
        self.since = self.saved = time.monotonic()
        self.top1: float | None = None
        """Of the last evaluation."""
        self.losses: list[float] = []
        """Of this epoch's steps, as far as they were read."""

    def run(self, num_workers: int) -> None:
        """Steps, evaluations and checkpoints to the end of the run, or until a signal asks to stop.

        Raises:
            Stopped: on the main process, after a checkpoint; SystemExit with the same code on the others.
        """
        main, state, total = self.accelerator.is_main_process, self.state, self.plan.total_steps
        stream = self.stream(num_workers)
        if main and state.step == total:  # a kill may have come between the last checkpoint and this
            self.folder.prune(self.loop.keep_checkpoints)
        profiler = Profiler(self.folder.path / "profile", enabled=self.loop.profile and main)
        with progress(self.job.title, total, done=state.step, enabled=main) as bar, self.signals, profiler:
            self.since = self.saved = time.monotonic()
            while state.step < total:
                self._launch(stream)
                self._read(bar)
                if state.rollback_at == state.step:
                    self._read(bar, all_of_them=True)
                    self.guard.rolled_back(self.checkpoints.go_back())
                self._finish_step(bar)
                profiler.step()
                if self.stop_asked and state.step < total:
                    self._stop()
        self.accelerator.wait_for_everyone()

    def summary(self) -> dict[str, Any]:
        """First and last loss, images seen, and the last and best evaluation."""
        state, metrics = self.state, read_metrics(self.folder.path)
        summary: dict[str, Any] = {
            "out": str(self.folder.path),
            "steps": state.step,
            "unreadable": len(self.unreadable.seen),
        }
        if self.left_out:
            summary["left_out"] = self.left_out.counts
        if state.skipped:
            summary |= {"skipped": state.skipped, "rollbacks": state.rollbacks}
        if finite := [line for line in metrics if line["loss"] is not None]:
            window = [line["loss"] for line in metrics[-self.plan.steps_per_epoch :] if line["loss"] is not None] or [
                finite[-1]["loss"]
            ]
            rates = sorted(line["images_per_second"] for line in metrics)
            summary |= {
                "first_loss": finite[0]["loss"],
                "last_loss": sum(window) / len(window),
                "images_per_second": rates[len(rates) // 2],
            }
        if evaluations := read_metrics(self.folder.path, "eval.jsonl"):
            summary |= {
                **{k: v for k, v in evaluations[-1].items() if k not in ("step", "epoch")},
                "best_top1": state.best,
            }
        return summary

    def trial(self, stream: Iterator[Batch], steps: int) -> tuple[float, float]:
        """Take some steps and nothing else: no evaluation, no picture, no checkpoint.

        Returns the seconds until their numbers have arrived, and of them those in which there was no batch.
        """
        began, waited = time.monotonic(), 0.0
        with progress("", 0, enabled=False) as bar:
            for _ in range(steps):
                self._launch(stream)
                waited += self.waited
                self._read(bar)
            self._read(bar, all_of_them=True)
        return time.monotonic() - began, waited

    def stream(self, num_workers: int) -> Iterator[Batch]:
        """The micro-batches from where the run is to its end."""
        accum = self.plan.accum_iter
        where = RunSlice(
            batch_size=self.plan.batch_size,
            batches_per_epoch=self.plan.steps_per_epoch * accum,
            start=self.state.step * accum,
            stop=self.plan.total_steps * accum,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        return self.job.dataset.stream(
            where, seed=self.seed, num_workers=num_workers, pin_memory=self.accelerator.device.type == "cuda"
        )

    # --- a step ------------------------------------------------------------------------------------------------------

    def _launch(self, stream: Iterator[Batch]) -> None:
        """Start one optimiser step and the copy of its numbers."""
        plan, state, optim = self.plan, self.state, self.optim
        epoch = state.step / plan.steps_per_epoch
        scheduled = learning_rate(
            epoch, peak=plan.peak_lr, min_lr=optim.min_lr, warmup_epochs=plan.warmup_epochs, epochs=optim.epochs
        )
        lr = state.lr_factor * scheduled
        self.batches, self.waited, self.new_unreadable = [], 0.0, 0
        numbers = self.stepper.take(self._next_batches(stream), state.step, lr, self._flags)
        state.step += 1
        if self.average is not None:
            self.average.update(state.step)
        self._push(numbers, lr)

    def _next_batches(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of one step, each fetched when it is its turn."""
        for _ in range(self.plan.accum_iter):
            before = time.monotonic()
            batch = next(stream)
            self.waited += time.monotonic() - before
            self.new_unreadable += self.unreadable.add(batch.unreadable)
            if batch.left_out and self.accelerator.is_main_process:
                self._say_left_out(batch.left_out)
            if len(batch.images) == 0:
                raise self.unreadable.nothing_left(self.job.dataset.name)
            self.batches.append(batch)
            yield batch

    def _say_left_out(self, found: LeftOut) -> None:
        """Of a stream, each reason when it is first met; how often stands in the summary."""
        if new := found.without(self.left_out):
            notice("left out", f"of {self.job.dataset.name}: {new}")
        self.left_out.merge(found)

    def _flags(self) -> tuple[float, float, float]:
        """What this process has to say to all: files that it cannot read, a signal, and the main process's clock."""
        late = self.accelerator.is_main_process and time.monotonic() - self.saved > 60 * self.loop.checkpoint_minutes
        return float(self.new_unreadable), float(self.signals.received is not None), float(late)

    def _push(self, numbers: StepNumbers, lr: float) -> None:
        now = time.monotonic()
        images = sum(len(batch.images) for batch in self.batches) * self.accelerator.num_processes
        launched = _Launched(
            self.state.step,
            numbers.names,
            numbers.num_flags,
            tuple(self.batches),
            lr,
            images,
            now - self.since,
            self.waited,
            numbers.timer,
        )
        self.since = now
        self.readback.push(launched, numbers.values)

    def _read(self, bar: Bar, *, all_of_them: bool = False) -> None:
        """Take in the numbers of steps that are due; on every process at the same steps.

        Raises:
            CheckFailed: losses stay non-finite, or too many images cannot be read.
        """
        for launched, numbers in self.readback.due(all_of_them=all_of_them):
            values, split = numbers.tolist(), len(launched.names)
            parts = dict(zip(launched.names, values[:split], strict=True))
            unreadable, stop, save = values[split : split + launched.num_flags]
            norm, scale, *own = values[split + launched.num_flags :]
            fp16 = self.accelerator.scaler is not None
            outcome = StepOutcome(
                launched.step, parts["loss"], norm, tuple(own), launched.batches, scale if fp16 else None
            )
            end = self.guard.observe(outcome)
            if outcome.finite:
                self.checkpoints.confirm(launched.step)
            self._log(launched, parts | {"grad_norm": norm}, bar)
            self.stop_asked |= stop > 0
            self.save_asked |= save > 0
            if end is not None:
                raise end
            if unreadable > 0:
                self.unreadable.share()

    def _log(self, launched: _Launched, parts: dict[str, float], bar: Bar) -> None:
        if not self.accelerator.is_main_process:
            return
        step, times = (
            launched.step,
            StepTimes(launched.images, launched.seconds, launched.waited, launched.timer.seconds()),
        )
        line = {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            **parts,
            "lr": launched.lr,
            "skipped": self.state.skipped,
        }
        line |= times.metrics()
        self.folder.append("metrics.jsonl", line)
        self.trackers.log({name: value for name, value in line.items() if name != "step"}, step)
        self.losses.append(parts["loss"])
        bar.advance(1, "  ".join([f"loss {parts['loss']:.4f}", *self._accuracy(), times.note()]))

    def _accuracy(self) -> list[str]:
        """Top-1 in words, once there is one."""
        if self.top1 is None:
            return []
        best = f" (best {self.state.best:.2f})" if self.state.best not in (None, self.top1) else ""
        return [f"top-1 {self.top1:.2f} %{best}"]

    # --- between steps -----------------------------------------------------------------------------------------------

    def _finish_step(self, bar: Bar) -> None:
        """At the end of an epoch evaluate, and write a checkpoint where one is due."""
        if self.accelerator.num_processes == 1:
            self.stop_asked |= self.signals.received is not None  # no one else to agree with
        epochs, within = divmod(self.state.step, self.plan.steps_per_epoch)
        last = self.state.step == self.plan.total_steps
        due = within == 0 and (last or epochs % self.loop.checkpoint_every == 0)
        top1 = None
        if within == 0:
            top1 = self._end_epoch(epochs, last)
        if due or top1 is not None or self.save_asked or self.stop_asked:
            self._read(bar, all_of_them=True)
            self._save(top1)
        if within == 0:
            self.top1 = self.top1 if top1 is None else top1
            self._report_epoch(epochs, bar)
        if within == 0 or self.saved > self.since:
            self.since = time.monotonic()  # the next step's seconds are its own

    def _report_epoch(self, epochs: int, bar: Bar) -> None:
        """A line an epoch, for logs."""
        if self.losses:
            mean = sum(self.losses) / len(self.losses)
            of = f"epoch {epochs}/{self.optim.epochs}"
            bar.report("  ".join([of, f"mean loss {mean:.4f}", *self._accuracy()]))
        self.losses.clear()

    def _end_epoch(self, epochs: int, last: bool) -> float | None:
        """Validate and draw with the weights that are exported; returns top-1 where the stage has it and it is its
        turn.

        Raises:
            CheckFailed: the run ends with weights that give no numbers.
        """
        evaluate = self.job.evaluate if last or epochs % self.loop.eval_every == 0 else None
        if evaluate is None and self.job.epoch_end is None and not last:
            return None
        top1 = None
        with self.checkpoints.shown(), self.network.whole() as bare:
            found = {}
            if evaluate is not None:
                found = evaluate(self.accelerator, bare)
                top1 = found.get("top1")
                if self.accelerator.is_main_process:
                    self.folder.append("eval.jsonl", {"step": self.state.step, "epoch": epochs, **found})
                    self.trackers.log({f"eval/{name}": value for name, value in found.items()}, self.state.step)
            if last:
                self.guard.check_end(
                    found or {"loss": self.stepper.loss_of(bare, self.batches[-1], self.state.step - 1)}
                )
            if self.job.epoch_end is not None and self.accelerator.is_main_process:
                self.job.epoch_end(bare, epochs, last)
        return top1

    def _save(self, top1: float | None) -> None:
        known = None if top1 is None or math.isnan(top1) else top1
        best = known is not None and (self.state.best is None or known > self.state.best)
        if best:
            self.state.best = known
        metadata = replace(self.job.metadata(), metrics={} if known is None else {"top1": known})
        self.checkpoints.save(metadata, best=best, finished=self.state.step == self.plan.total_steps)
        self.save_asked = False
        self.saved = time.monotonic()

    def _stop(self) -> None:
        """End the run after a signal; its checkpoint has been written."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            raise SystemExit(EXIT_STOPPED)
        signal = self.signals.received or "a signal to another process"
        raise Stopped(
            f"stopped by {signal} after step {self.state.step} of {self.plan.total_steps}; its checkpoint is in"
            f" {self.folder.path}",
            hint=f"go on with --resume {self.folder.path}",
        )
