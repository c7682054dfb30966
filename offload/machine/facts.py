"""What this machine offers, as plain facts: gathered here, judged in `offload.machine.doctor`.

Nothing is changed, but for the temporary folder of a bandwidth probe, see `offload.machine.bench_ssd`.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]
import torch

from offload.budget.verdict import Available
from offload.config import Config, ConfigError
from offload.config_loading import load_config_file
from offload.machine.bench_ssd import (
    DEFAULT_THREADS,
    USUAL_REQUEST_BYTES,
    BenchPlan,
    Point,
    Setting,
    check_target,
    file_system,
    measure,
)
from pagemem.devices.host_memory import cgroup_limit
from pagemem.errors import DiskFullError, OffloadError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.folders.own_file import naming
from pagemem.folders.run_directory import FolderUse, folder_use
from pagemem.units import MiB, format_bytes

PACKAGES: Final = ("pagemem", "scheduler", "optim", "offload")
COPY_BYTES: Final = 64 * MiB
_PINNED_BYTES: Final = MiB
#: The engine's default setting, briefly.
PROBE: Final = BenchPlan(64 * MiB, 0.2, (Setting(USUAL_REQUEST_BYTES, DEFAULT_THREADS),))


@dataclass(frozen=True, slots=True)
class PackageFact:
    """Where a package of this name is found, in the order of sys.path, and which installed distributions bring one."""

    name: str
    home: str
    found: tuple[str, ...]
    in_current_directory: str | None
    distributions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CpuFact:
    """Cores this process may use, cores there are, and torch's compute threads."""

    usable: int
    logical: int
    physical: int | None
    torch_threads: int


@dataclass(frozen=True, slots=True)
class MemoryFact:
    """RAM and what limits its use; None is no limit. ``cgroup_free_bytes``: what is left under the tightest
    ``memory.max``."""

    total_bytes: int
    available_bytes: int
    data_limit_bytes: int | None
    address_limit_bytes: int | None
    locked_limit_bytes: int | None
    open_files_limit: int | None
    cgroup_limit_bytes: int | None
    cgroup_free_bytes: int | None

    @property
    def usable_bytes(self) -> int:
        """What a new process can have of RAM."""
        free_bytes = self.available_bytes if self.cgroup_free_bytes is None else self.cgroup_free_bytes
        return min(self.available_bytes, free_bytes)

    @property
    def limits(self) -> tuple[tuple[str, int], ...]:
        """Limits that count what is mapped, by their names."""
        known = (("RLIMIT_DATA", self.data_limit_bytes), ("RLIMIT_AS", self.address_limit_bytes))
        return tuple((name, n_bytes) for name, n_bytes in known if n_bytes is not None)


@dataclass(frozen=True, slots=True)
class CudaFact:
    """One device; ``pinning`` is None where pinned host memory can be had, else what went wrong."""

    name: str
    total_bytes: int
    free_bytes: int
    pinning: str | None


@dataclass(frozen=True, slots=True)
class FolderFact:
    """A folder for page files.

    Attributes:
        wanted: whether it is one of a configuration's ``ssd.paths``.
        existing: the folder itself, or where it is absent the nearest one above it that is there.
        use: what it is to the engine, None where it cannot be read.
        backend: what the probe of O_DIRECT chose, None where it was not tried.
        not_measured: why no bandwidth was to be measured.
        failure: why it could not be measured, though it was to be.
    """

    path: str
    wanted: bool
    existing: str
    writable: bool
    file_system: str
    free_bytes: int
    use: FolderUse | None
    backend: str | None
    point: Point | None = None
    not_measured: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class ConfigFact:
    """A configuration file: what it holds, or one line for each thing that is wrong."""

    file: str
    config: Config | None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """All there is to judge."""

    versions: Mapping[str, str]
    packages: tuple[PackageFact, ...]
    cpu: CpuFact
    memory: MemoryFact
    copy_gb_per_s: float | None
    cuda_build: bool
    nvidia_device: bool
    cuda: tuple[CudaFact, ...]
    folders: tuple[FolderFact, ...]
    config: ConfigFact | None


def gather(file: Path | None, changes: Sequence[str] = (), *, bench: bool = True) -> Facts:
    """Everything, for a configuration's folders or, without one, for the current directory; some seconds with
    ``bench``.

    Args:
        changes: of the configuration, as ``section.key=value``.
    """
    config = None if file is None else config_fact(file, changes)
    if config is None:
        paths = [Path.cwd()]
    else:
        paths = [] if config.config is None else [Path(path) for path in config.config.ssd.paths]
    return Facts(
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": version("numpy"),
            "offload": sys.modules["offload"].__version__,
        },
        packages=package_facts(sys.path),
        cpu=CpuFact(
            len(os.sched_getaffinity(0)), os.cpu_count() or 1, psutil.cpu_count(logical=False), torch.get_num_threads()
        ),
        memory=memory_fact(),
        copy_gb_per_s=copy_gb_per_s() if bench else None,
        cuda_build=torch.version.cuda is not None,
        nvidia_device=Path("/dev/nvidia0").exists(),
        cuda=cuda_facts(),
        folders=tuple(folder_fact(path, wanted=config is not None, bench=bench) for path in paths),
        config=config,
    )


def config_fact(file: Path, changes: Sequence[str] = ()) -> ConfigFact:
    """A configuration file, with changes, read and checked."""
    try:
        return ConfigFact(str(file), load_config_file(file, changes))
    except ConfigError as error:
        return ConfigFact(str(file), None, tuple(str(error).splitlines()))


def package_facts(search_path: Sequence[str]) -> tuple[PackageFact, ...]:
    """The four packages, as this search path finds them."""
    home = Path(__file__).resolve().parents[2]
    distributions = packages_distributions()
    facts = []
    for name in PACKAGES:
        places = [_find(name, entry or os.getcwd()) for entry in search_path]
        found = tuple(dict.fromkeys(place for place in places if place is not None))
        here = _find(name, os.getcwd())
        brought_by = tuple(sorted(set(distributions.get(name, ()))))
        facts.append(PackageFact(name, str(home / name), found, here, brought_by))
    return tuple(facts)


def _find(name: str, entry: str) -> str | None:
    """The package's folder, or the module's file, that one entry of the search path has; a folder without code counts
    for nothing."""
    spec = PathFinder.find_spec(name, [entry])
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin).resolve()
    return str(origin.parent if spec.submodule_search_locations is not None else origin)


def memory_fact() -> MemoryFact:
    """RAM and limits of this process."""
    memory = psutil.virtual_memory()
    limit, free = cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_AS, resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE)
    limits = [None if soft == resource.RLIM_INFINITY else soft for soft, _ in map(resource.getrlimit, kinds)]
    return MemoryFact(memory.total, memory.available, limits[0], limits[1], limits[2], limits[3], limit, free)


def available_here(config: Config) -> Available:
    """What this machine has now: RAM that is free, limits, and the free bytes of the file systems that ``ssd.paths``
    lie on, or would, with the page files that are there already, which the run would use.

    Raises:
        StorageError: a folder cannot be looked at.
    """
    with naming("looking at", ", ".join(config.ssd.paths)):
        disk_bytes = _disk_bytes(config)
    memory = memory_fact()
    return Available(memory.usable_bytes, disk_bytes, limits=memory.limits)


def _disk_bytes(config: Config) -> int:
    folders = [
        next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.is_dir())
        for path in config.ssd.paths
    ]
    by_device = {folder.stat().st_dev: shutil.disk_usage(folder).free for folder in folders}
    files = [Path(path) / PAGE_FILE_NAME for path in config.ssd.paths]
    there_bytes = sum(file.stat().st_blocks * 512 for file in files if file.is_file())
    return sum(by_device.values()) + there_bytes


def copy_gb_per_s() -> float:
    """Bytes a second, in 10^9, of a copy in RAM on torch's threads: the best of five."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)
    return COPY_BYTES / min(timeit.repeat(lambda: target.copy_(source), number=1, repeat=5)) / 1e9


def cuda_facts() -> tuple[CudaFact, ...]:
    """Every CUDA device that torch can use; pinning is found out by pinning."""
    if not torch.cuda.is_available():
        return ()
    facts = []
    for device in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        try:
            with torch.cuda.device(device):
                pinned = torch.empty(_PINNED_BYTES, dtype=torch.uint8).pin_memory()
            pinning = None if pinned.is_pinned() else "torch gave memory that is not pinned"
        except RuntimeError as error:
            pinning = str(error).splitlines()[0]
        facts.append(CudaFact(torch.cuda.get_device_name(device), total_bytes, free_bytes, pinning))
    return tuple(facts)


def folder_fact(path: Path, *, wanted: bool, bench: bool) -> FolderFact:
    """A folder and its disk. With ``bench`` it is measured, unless a run is using it."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    use: FolderUse | None
    try:
        use = folder_use(path)
    except OSError:
        use = None  # judged as a folder that cannot be read
    backend, point, not_measured, failure = None, None, "", ""
    if not bench:
        not_measured = "not asked for"
    elif use is not None and use.holder is not None:
        not_measured = f"process {use.holder} uses it, and is not to be slowed down"
    elif not writable:
        not_measured = "nothing can be written there"
    else:
        try:
            measured = measure(check_target(existing, PROBE.file_bytes), PROBE)
            backend, point = measured.backend, measured.points[0]
        except DiskFullError:
            failure = f"there is no room for a test file of {format_bytes(PROBE.file_bytes)}"
        except (OffloadError, OSError) as error:
            failure = str(error)
    return FolderFact(
        path=str(path),
        wanted=wanted,
        existing=str(existing),
        writable=writable,
        file_system=file_system(existing),
        free_bytes=shutil.disk_usage(existing).free,
        use=use,
        backend=backend,
        point=point,
        not_measured=not_measured,
        failure=failure,
    )
