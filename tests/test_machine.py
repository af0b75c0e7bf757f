"""What is granted is the least of what there is: cores, affinity mask, quotas of both kinds of control groups."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mae_deploy import machine
from mae_deploy.data.workers import resolve_workers
from mae_deploy.machine import CPU_FEATURES, cache_folder, cpu_features, cpu_name, default_threads, set_malloc
from mae_deploy.runtime.engines.base import EngineOptions

CORES = 13

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9B14
flags\t\t: fpu avx2 avx512f avx512_vnni

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: 99
model name\t: another
flags\t\t: fpu avx2
"""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 13 cores without limits; its files are below this folder."""
    monkeypatch.setattr(os, "cpu_count", lambda: CORES)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)
    for name, path in (("CPUINFO", "cpuinfo"), ("_CGROUP", "cgroup"), ("_CGROUPS", "groups"), ("_CPUS", "cpus")):
        monkeypatch.setattr(machine, name, tmp_path / path)
    return tmp_path


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_a_machine_without_limits(system: Path) -> None:
    assert machine.granted_cores() == CORES
    assert default_threads() is None
    assert EngineOptions().num_threads is None
    assert resolve_workers(-1) == CORES - 1


@pytest.mark.parametrize("name", ["/", "/docker/of/the/host", "/pod/box"])
@pytest.mark.parametrize(
    ("version", "quota", "granted"),
    [
        (2, "300000 100000", 3),
        (2, "250000 100000", 3),  # half a core more is worth a thread
        (2, "10000 100000", 1),
        (2, "9900000 100000", CORES),
        (2, "max 100000", CORES),
        (2, "", CORES),
        (1, "500000 100000", 5),
        (1, "-1 100000", CORES),
    ],
)
def test_the_quota_of_a_container(version: int, quota: str, granted: int, name: str, system: Path) -> None:
    write(system / "cgroup", f"0::{name}\n" if version == 2 else f"9:memory:/m\n4:cpu,cpuacct:{name}\n0::/\n")
    group = system / "groups" / ("" if version == 2 else "cpu") / (name[1:] if name == "/pod/box" else "")
    if version == 2:
        write(group / "cpu.max", f"{quota}\n")
    else:
        for file, figure in zip(("quota", "period"), quota.split(), strict=True):
            write(group / f"cpu.cfs_{file}_us", f"{figure}\n")
    assert machine.granted_cores() == granted
    assert EngineOptions().num_threads == (None if granted == CORES else granted)
    assert EngineOptions(threads=7).num_threads == 7
    assert EngineOptions(affinity=(0, 1)).num_threads == 2
    assert resolve_workers(-1) == max(1, granted - 1)


def test_more_workers_than_could_ever_work_are_not_started(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    most = max(16, 8 * CORES)
    assert resolve_workers(most) == most
    assert capsys.readouterr().err == ""
    assert [resolve_workers(1000), resolve_workers(1000)] == [most, most]
    assert (
        capsys.readouterr().err
        == f"--num-workers: 1000 processes on {CORES} cores only wait for each other: using {most}\n"
    )


def test_the_least_of_nested_groups(system: Path) -> None:
    write(system / "cgroup", "0::/slice/pod/box\n")
    write(system / "groups/cpu.max", "max 100000")
    write(system / "groups/slice/cpu.max", "200000 100000")
    write(system / "groups/slice/pod/box/cpu.max", "700000 100000")
    assert machine.granted_cores() == 2


@pytest.mark.parametrize(
    ("mask", "quota", "granted"), [({3, 5, 8}, 700000, 3), ({3, 5, 8}, 200000, 2), ({11}, 50000, 1)]
)
def test_mask_and_quota(
    mask: set[int], quota: int, granted: int, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: mask)
    write(system / "cgroup", "0::/\n")
    write(system / "groups/cpu.max", f"{quota} 100000")
    assert machine.granted_cores() == granted
    assert EngineOptions().num_threads == granted


def test_two_threads_of_one_core_compute_as_one(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    for core in range(6):
        write(system / f"cpus/cpu{core}/topology/thread_siblings_list", f"{core // 2 * 2},{core // 2 * 2 + 1}\n")
    assert machine.granted_cores() == 6
    assert default_threads() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="affinity masks are Linux's")
def test_the_mask_of_a_process() -> None:
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{core}}})\n"
        "from mae_deploy.machine import default_threads, granted_cores\n"
        "print(granted_cores(), default_threads() if os.cpu_count() > 1 else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"


def test_the_cpu(system: Path) -> None:
    write(system / "cpuinfo", X86)
    assert cpu_name() == "AMD EPYC 9B14"
    assert cpu_features() == ["avx2", "avx512f", "avx512_vnni"]


@pytest.mark.parametrize(
    ("cpuinfo", "features"),
    [
        ("processor\t: 0\nFeatures\t: fp asimd i8mm asimddp\n", ["asimddp", "i8mm"]),
        ("processor : 0\n", []),
        (None, None),
    ],
    ids=["Arm", "neither", "not Linux"],
)
def test_features_elsewhere(cpuinfo: str | None, features: list[str] | None, system: Path) -> None:
    if cpuinfo is not None:
        write(system / "cpuinfo", cpuinfo)
    assert cpu_features() == features
    assert set(features or []) <= set(CPU_FEATURES)
    assert cpu_name()


def test_one_folder_for_all_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("MAE_DEPLOY_CACHE", "~/own")
    assert cache_folder("tensorrt") == tmp_path / "home" / "own" / "tensorrt"
    monkeypatch.setenv("MAE_DEPLOY_CACHE", "")
    assert cache_folder("tensorrt") == tmp_path / "shared" / "mae-deploy" / "tensorrt"
    for value in ("", "relative/path"):  # which the desktop standard says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder("tensorrt") == tmp_path / "home" / ".cache" / "mae-deploy" / "tensorrt"
    assert not list(tmp_path.iterdir()), "a folder that nobody writes to is not made"


@pytest.mark.parametrize(
    ("library", "keeps", "arenas", "expected"),
    [
        ("glibc", 2**31 - 1, None, [(-1, 2**31 - 1), (-3, 2**30)]),
        ("glibc", 10**6, 2, [(-1, 10**6), (-3, 10**6), (-8, 2)]),
        ("", 10**6, 2, []),
    ],
)
def test_memory_settings_are_those_of_glibc(
    monkeypatch: pytest.MonkeyPatch, library: str, keeps: int, arenas: int | None, expected: list[tuple[int, int]]
) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "2"))
    set_malloc(keeps=keeps, arenas=arenas)
    assert calls == expected
