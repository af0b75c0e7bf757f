"""The machine that this runs on: the cores that it grants, its CPU's name and features, and the folder of caches."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from functools import cache
from pathlib import Path, PurePosixPath

CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""What makes INT8 (vnni, amx_int8, asimddp, i8mm) and BF16 fast on a CPU, under the names that Linux has for it."""

CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""mallopt's numbers, from glibc's malloc.h."""


# --- processes ------------------------------------------------------------------------------------------------------


def process_start(process: int) -> str | None:
    """When a process began, which tells it from another one of its number; None where nobody says."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def process_numbers() -> str | None:
    """What counts this process: containers of one host may have its name, and count from 1 each; None: not told."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


# --- cores -----------------------------------------------------------------------------------------------------------


def granted_cores() -> int:
    """Cores that this process may use: the least of the machine's, its affinity mask's and its container's CPU quota,
    rounded up; at least 1.
    """
    quota = _cpu_quota()
    cores = len(_allowed())
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def default_threads() -> int | None:
    """Threads for arithmetic where nobody says how many: none more than the granted cores, nor than there are cores
    behind hyper-threads. None where the whole machine is granted: libraries then choose well by themselves, but they
    know nothing of masks and quotas.
    """
    granted = granted_cores()
    return None if granted >= (os.cpu_count() or 1) else min(granted, _physical(_allowed()))


def _allowed() -> set[int]:
    """The cores of the affinity mask; without one, all."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _physical(cores: set[int]) -> int:
    """Cores, hyper-threads of one counted once; where the system does not say, all."""
    siblings = [_read(_CPUS / f"cpu{core}" / "topology" / "thread_siblings_list") or str(core) for core in cores]
    return len(set(siblings))


def _cpu_quota() -> float | None:
    """Cores that a container's control group grants, in all versions of Linux's cgroups; None where there is no limit.

    A group is limited by those around it too. In a container, the names of its groups may be those of the host, whose
    folders are not there: the container's own group is then the root.
    """
    quotas = []
    for line in (_read(_CGROUP) or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (_CGROUPS / "cpu",) if controllers else (_CGROUPS, _CGROUPS / "unified"):
            group = PurePosixPath(name.lstrip("/"))
            quotas += [_quota(root / parent, version=1 if controllers else 2) for parent in (group, *group.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path, *, version: int) -> float | None:
    """Of one control group: microseconds of CPU time in a period, over the period."""
    if version == 2:
        words = (_read(group / "cpu.max") or "").split()
    else:
        words = [_read(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None  # "max", -1, or no such group
    return int(words[0]) / int(words[1])


# --- the CPU ---------------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """As its maker calls it, where the system says."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str] | None:
    """Those of `CPU_FEATURES` that this CPU has; None where the system does not say."""
    if not CPUINFO.is_file():
        return None
    entries = _cpuinfo()
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first core."""
    return _parse(_read(CPUINFO) or "")


@cache
def _parse(text: str) -> dict[str, str]:
    first = text.strip().split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


# --- caches ----------------------------------------------------------------------------------------------------------


def set_malloc(*, keeps: int, arenas: int | None = None) -> None:
    """How much freed memory the C library keeps for the next request; other libraries than glibc are left as they are.

    Args:
        keeps: buffers of more bytes than that, and the top of the heap beyond, go back to the system at once.
        arenas: heaps that threads share; None: glibc's default, eight for each core.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, min(keeps, 2**31 - 1))
        libc.mallopt(_MMAP_THRESHOLD, min(keeps, 2**30))
        if arenas is not None:
            libc.mallopt(_ARENA_MAX, arenas)


def cache_folder(name: str) -> Path:
    """Where the named cache is kept from run to run, below the one folder of all caches: `$MAE_DEPLOY_CACHE`, else
    `mae-deploy` in `$XDG_CACHE_HOME`, else in `~/.cache`. It need not be there yet.
    """
    if own := os.environ.get("MAE_DEPLOY_CACHE"):
        return Path(own).expanduser() / name
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "mae-deploy" / name


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
