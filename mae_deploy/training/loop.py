"""The loop: Accelerate for devices and processes, one stream of batches, checkpoints that resume to the same losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mae_deploy.checkpoint import METADATA, Metadata, open_checkpoint, write_checkpoint
from mae_deploy.data.dataset import Batch, ImageDataset
from mae_deploy.data.loader import StreamSampler, train_loader
from mae_deploy.data.transforms import Normalise
from mae_deploy.errors import CheckFailed, ConfigError, MissingDependency
from mae_deploy.files import atomic_path, point_link
from mae_deploy.models.load import load_strict
from mae_deploy.preprocess import Preprocess
from mae_deploy.progress import Bar, notice, progress
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.config import Device, LoopConfig, OptimConfig, Precision
from mae_deploy.training.optim import ParamGroup, adamw
from mae_deploy.training.run_folder import STATE, RunFolder, read_metrics
from mae_deploy.training.schedule import learning_rate, resolve_warmup
from mae_deploy.training.state import Progress, load_optimizer, load_progress, load_rest, save_rest, save_state

Evaluation = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a stage gives to the loop."""

    title: str
    """Shown beside the progress bar."""
    model: nn.Module
    """What is trained."""
    saved: nn.Module
    """What the checkpoint holds: the model, or the part of it that outlives training."""
    groups: list[ParamGroup]
    """The optimiser's parameter groups."""
    dataset: ImageDataset
    """Training images."""
    spec: Preprocess
    """Mean and standard deviation of the images."""
    loss: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
    """`(model, images (B, C, H, W), labels (B,))` to scalars; `loss` is minimised, the others are logged."""
    metadata: Callable[[], Metadata]
    """The checkpoint's metadata, but for step and metrics."""
    paper_warmup: float
    """Warm-up epochs of the paper's recipe for this stage."""
    evaluate: Callable[[Accelerator, nn.Module], Evaluation] | None = None
    """Validation of the bare model; `top1` picks the best checkpoint."""
    epoch_end: Callable[[nn.Module, int, bool], None] | None = None
    """Called on the main process with the bare model, the number of finished epochs, and whether it is the last."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers that follow from the config and the size of the data."""

    batch_size: int
    accum_iter: int
    steps_per_epoch: int
    total_steps: int
    peak_lr: float
    warmup_epochs: float


def make_accelerator(device: Device, precision: Precision, out: Path) -> Accelerator:
    """The distributed engine for this machine, with TensorBoard."""
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("--device cuda, but torch sees no CUDA device", hint="use --device auto or cpu")
    AcceleratorState._reset_state()  # an earlier stage in this process may have used another precision
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if precision == "fp16" and on_cpu:
        raise MissingDependency("--precision fp16 needs a CUDA device", hint="use --precision bf16 or fp32")
    if precision == "auto":
        precision = "fp32" if on_cpu or not torch.cuda.is_bf16_supported() else "bf16"
    return Accelerator(cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision, log_with="tensorboard", project_dir=out)


def fit(
    job: Job, folder: RunFolder, accelerator: Accelerator, *, optim: OptimConfig, loop: LoopConfig, num_workers: int, max_corrupt: int, seed: int
) -> dict[str, Any]:
    """Train to the end, from wherever the run folder's last checkpoint is; returns a summary."""
    plan = make_plan(len(job.dataset), optim, world_size=accelerator.num_processes, paper_warmup=job.paper_warmup)
    optimizer = adamw(job.groups, betas=optim.betas)
    state = Progress(processes=accelerator.num_processes)
    if folder.last is not None:
        state = load_progress(folder.last / STATE)
        if state.processes != accelerator.num_processes:
            raise ConfigError(f"--resume on {accelerator.num_processes} process(es) of a run on {state.processes}", hint="start as many as before")
        load_strict(job.saved, open_checkpoint(folder.last).tensors())
        load_rest(folder.last / STATE, job.model)
    model, prepared = accelerator.prepare(job.model, optimizer)
    if folder.last is not None:
        load_optimizer(folder.last / STATE, job.groups, optimizer)
        if state.scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
    if accelerator.is_main_process:
        folder.forget_after(state.step)
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": state.step + 1}})
    runner = _Runner(job, folder, accelerator, optim, loop, plan, model, prepared, state, _Unreadable(folder, max_corrupt), seed)
    try:
        runner.run(num_workers)
    finally:
        accelerator.end_training()
    return runner.summary()


def make_plan(num_images: int, optim: OptimConfig, *, world_size: int, paper_warmup: float) -> Plan:
    """Batch size, steps and learning rate; a data set smaller than one batch makes the batch smaller, and says so.

    Raises:
        ConfigError: not even one image for each process.
    """
    if num_images < world_size:
        raise ConfigError(f"{num_images} image(s) cannot be shared among {world_size} processes")
    batch_size = min(optim.batch_size, max(1, num_images // world_size))
    if batch_size < optim.batch_size:
        notice("batch size:", f"{num_images} images do not fill {optim.batch_size} on {world_size} process(es): using {batch_size}")
    batches = num_images // (batch_size * world_size)
    accum = min(optim.accum_iter, batches)
    steps_per_epoch = batches // accum
    effective = batch_size * accum * world_size
    peak = optim.lr if optim.lr is not None else optim.blr * effective / 256
    return Plan(
        batch_size, accum, steps_per_epoch, steps_per_epoch * optim.epochs, peak, resolve_warmup(optim.warmup_epochs, paper=paper_warmup, epochs=optim.epochs)
    )


class _Unreadable:
    """Counts broken files, names each once, gives up at the limit."""

    def __init__(self, folder: RunFolder, limit: int) -> None:
        self.path = folder.path / "unreadable.txt"
        self.limit = limit
        self.seen = self._listed()

    def report(self, lines: tuple[str, ...]) -> None:
        if not self.seen.issuperset(lines):
            self.seen = self._listed()  # another process may have met them before
        for line in lines:
            if line not in self.seen:
                self.seen.add(line)
                with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(line + "\n")
                notice("skipped", line)
        if len(self.seen) > self.limit:
            raise CheckFailed(f"{len(self.seen)} unreadable images, listed in {self.path}", hint=f"mend them, or allow more than --max-corrupt {self.limit}")

    def _listed(self) -> set[str]:
        # File names are bytes; those that are no UTF-8 are kept as they are.
        return set(self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()) if self.path.is_file() else set()


@dataclass(slots=True)
class _Runner:
    """The running state of one `fit`."""

    job: Job
    folder: RunFolder
    accelerator: Accelerator
    optim: OptimConfig
    loop: LoopConfig
    plan: Plan
    model: nn.Module
    optimizer: Any
    state: Progress
    unreadable: _Unreadable
    seed: int

    def run(self, num_workers: int) -> None:
        """Steps, evaluations and checkpoints to the end of the run."""
        plan, accelerator = self.plan, self.accelerator
        stream = self._stream(num_workers)
        normalise = Normalise(self.job.spec).to(accelerator.device)
        saved = time.monotonic()
        with progress(self.job.title, plan.total_steps, done=self.state.step, enabled=accelerator.is_main_process) as bar:
            while self.state.step < plan.total_steps:
                self._step(stream, normalise, bar)
                epochs, within = divmod(self.state.step, plan.steps_per_epoch)
                last = self.state.step == plan.total_steps
                top1 = None
                if within == 0:
                    if last or epochs % self.loop.eval_every == 0:
                        top1 = self._evaluate(epochs)
                    if self.job.epoch_end is not None and accelerator.is_main_process:
                        self.job.epoch_end(accelerator.unwrap_model(self.model), epochs, last)
                due = within == 0 and (last or epochs % self.loop.checkpoint_every == 0)
                if due or top1 is not None or time.monotonic() - saved > 60 * self.loop.checkpoint_minutes:
                    self._save(top1)
                    saved = time.monotonic()
        accelerator.wait_for_everyone()

    def summary(self) -> dict[str, Any]:
        """First and last loss, images seen, and the last and best evaluation."""
        metrics = read_metrics(self.folder.path)
        summary: dict[str, Any] = {"out": str(self.folder.path), "steps": self.state.step, "unreadable": len(self.unreadable.seen)}
        if metrics:
            window = metrics[-self.plan.steps_per_epoch :]
            rates = sorted(line["images_per_second"] for line in metrics)
            summary |= {
                "first_loss": metrics[0]["loss"],
                "last_loss": sum(line["loss"] for line in window) / len(window),
                "images_per_second": rates[len(rates) // 2],
            }
        if evaluations := read_metrics(self.folder.path, "eval.jsonl"):
            summary |= {**{k: v for k, v in evaluations[-1].items() if k not in ("step", "epoch")}, "best_top1": self.state.best}
        return summary

    def _stream(self, num_workers: int) -> Iterator[Batch]:
        accum = self.plan.accum_iter
        sampler = StreamSampler(
            len(self.job.dataset),
            self.plan.batch_size,
            seed=self.seed,
            start=self.state.step * accum,
            stop=self.plan.total_steps * accum,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            batches_per_epoch=self.plan.steps_per_epoch * accum,
        )
        loader = train_loader(self.job.dataset, sampler, num_workers=num_workers, pin_memory=self.accelerator.device.type == "cuda")
        return iter(loader)

    def _step(self, stream: Iterator[Batch], normalise: Normalise, bar: Bar) -> None:
        """One optimiser step and its line in the metrics."""
        plan, accelerator, step, accum = self.plan, self.accelerator, self.state.step, self.plan.accum_iter
        started, waited, images_seen = time.monotonic(), 0.0, 0
        lr = learning_rate(step / plan.steps_per_epoch, peak=plan.peak_lr, min_lr=self.optim.min_lr, warmup_epochs=plan.warmup_epochs, epochs=self.optim.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.model.train()
        losses: dict[str, Tensor] = {}
        for micro in range(accum):
            before = time.monotonic()
            batch = next(stream)
            waited += time.monotonic() - before
            self.unreadable.report(batch.unreadable)
            if len(batch.images) == 0:
                raise CheckFailed(f"no readable image found below {self.job.dataset.images.root}", hint=f"the files are listed in {self.unreadable.path}")
            images_seen += len(batch.images) * accelerator.num_processes
            images = normalise(batch.images.to(accelerator.device, non_blocking=True))
            labels = batch.labels.to(accelerator.device, non_blocking=True)
            seed_everything(derive_seed(self.seed, "step", step, micro, accelerator.process_index))
            with accelerator.no_sync(self.model) if micro < accum - 1 else nullcontext(), accelerator.autocast():
                parts = self.job.loss(self.model, images, labels)
                accelerator.backward(parts["loss"] / accum)
            for name, value in parts.items():
                losses[name] = losses.get(name, torch.zeros((), device=accelerator.device)) + value.detach().float() / accum
        values = {name: value.item() for name, value in zip(losses, accelerator.reduce(torch.stack(list(losses.values())), "mean"), strict=True)}
        if not math.isfinite(values["loss"]):
            raise CheckFailed(
                f"the loss is {values['loss']} at step {step + 1}",
                hint="start a new run with a smaller --blr, --clip-grad 1, or --precision fp32",
            )
        if self.optim.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self._log(values, lr, images_seen, time.monotonic() - started, waited, bar)

    def _log(self, values: dict[str, float], lr: float, images: int, seconds: float, waited: float, bar: Bar) -> None:
        if not self.accelerator.is_main_process:
            return
        step, rate, wait = self.state.step, images / seconds, waited / seconds
        line = {"step": step, "epoch": step / self.plan.steps_per_epoch, **values, "lr": lr, "images_per_second": round(rate, 2), "data_wait": round(wait, 4)}
        self.folder.append("metrics.jsonl", line)
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        bar.advance(1, f"loss {values['loss']:.4f}  {rate:.0f} img/s  wait {wait:.0%}")

    def _evaluate(self, epochs: int) -> float | None:
        """Validate; returns top-1 where the stage has it."""
        if self.job.evaluate is None:
            return None
        found = self.job.evaluate(self.accelerator, self.accelerator.unwrap_model(self.model))
        if self.accelerator.is_main_process:
            self.folder.append("eval.jsonl", {"step": self.state.step, "epoch": epochs, **found})
            self.accelerator.log({f"eval/{name}": value for name, value in found.items()}, step=self.state.step)
        return found["top1"]

    def _save(self, top1: float | None) -> None:
        """Write `step-N` aside, rename it, then move `best` and `last`; the other processes go on: each has a clock of its own, and they need not agree."""
        accelerator, folder, state = self.accelerator, self.folder, self.state
        is_best = top1 is not None and (state.best is None or top1 > state.best)
        if is_best:
            state.best = top1
        if accelerator.scaler is not None:
            state.scaler = accelerator.scaler.state_dict()
        if accelerator.is_main_process:
            target = folder.checkpoints / f"step-{state.step}"
            metrics = {} if top1 is None else {"top1": top1}
            metadata = replace(self.job.metadata(), step=state.step, metrics=metrics)
            if not (target / METADATA).is_file():
                with atomic_path(target) as aside:
                    write_checkpoint(aside, self.job.saved.state_dict(), metadata)
                    save_state(aside / STATE, self.job.groups, getattr(self.optimizer, "optimizer", self.optimizer), state)
                    save_rest(aside / STATE, self.job.model, self.job.saved)
            if is_best:
                point_link(folder.checkpoints / "best", target.name)
            point_link(folder.checkpoints / "last", target.name)
            folder.prune(self.loop.keep_checkpoints)
