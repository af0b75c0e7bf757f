"""Whether a setting may change where a command goes on is said on the field, for every field of every command."""

from __future__ import annotations

import dataclasses

import pytest

from mae_deploy.commands.data.config import PackConfig
from mae_deploy.commands.report.config import ReportConfig
from mae_deploy.commands.sweep.config import SweepConfig
from mae_deploy.config import Settings, resume_of, section, setting
from mae_deploy.distill.config import DistillConfig
from mae_deploy.evaluation.config import LinprobeConfig
from mae_deploy.pretrain.config import FinetuneConfig, PretrainConfig
from tests.shipped_settings import commands, fields_of

# What runs, sweeps and packs had as lists of names, before it was said on the fields.
OF_RUNS = {
    *("data", "out", "resume", "device", "num_workers", "max_corrupt", "cache", "teacher_cache", "checkpoint_every"),
    "max_pixels",
    *("checkpoint_minutes", "keep_checkpoints", "eval_every", "pictures_every", "batch_size", "accum_iter"),
    *("max_skips", "max_rollbacks", "sharding", "compile", "teacher_compile", "tracker", "profile"),
    "measure_kernels",  # added since: it is not used any more
    "plan",  # added since
    "deterministic",  # added since
}
OF_SWEEPS = {
    "data",
    "out",
    "labelled",
    "mask_ratio",
    "over",
    "seeds",
    "device",
    "num_workers",
    "max_corrupt",
    "max_pixels",
    "threads",
}
OF_PACKS = {"out", "source", "num_workers", "max_corrupt", "max_pixels", "device"}
FREE: dict[type, set[str]] = {
    PretrainConfig: OF_RUNS,
    FinetuneConfig: OF_RUNS,
    LinprobeConfig: OF_RUNS,
    DistillConfig: OF_RUNS,
    SweepConfig: OF_SWEEPS,
    PackConfig: OF_PACKS,
}


def unsaid(command: type) -> list[str]:
    """The settings of a command that do not say whether they may change. A section may say it for all of its fields; a
    command may not, unless it always starts anew.
    """
    found = fields_of(command)
    anew = all(field.metadata.get("resume") is None for cls, field in found.values() if cls is command)
    if anew and getattr(command, "_resume", None) == "never":
        return [name for name, (cls, field) in found.items() if resume_of(cls, field) is None]
    return [
        name
        for name, (cls, field) in found.items()
        if (field.metadata.get("resume") if cls is command else resume_of(cls, field)) not in ("fixed", "free")
    ]


def test_the_commands_are_found() -> None:
    assert len(commands()) >= 23
    assert {*FREE, ReportConfig} <= {*commands()}


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.__name__)
def test_every_setting_says_whether_it_may_change(command: type) -> None:
    assert issubclass(command, Settings)
    assert unsaid(command) == []


@pytest.mark.parametrize(("command", "free"), FREE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_may_change_is_what_could_before(command: type, free: set[str]) -> None:
    for name, (cls, field) in fields_of(command).items():
        assert (resume_of(cls, field) == "free") == (field.name in free), name


def test_a_field_that_says_nothing_is_found() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class Silent(Settings):
        said: int = setting(1, resume="fixed")
        unsaid: int = 1

    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class Said(Settings, resume="fixed"):
        one: int = 1
        other: int = setting(1, resume="free")

    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class Command(Settings, resume="fixed"):
        top: int = 1
        loop: Silent = section(Silent)
        optim: Said = section(Said)

    Command.__annotations__.update(loop=Silent, optim=Said)
    assert unsaid(Command) == ["top", "loop.unsaid"]
