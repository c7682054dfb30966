"""How much RAM this process can still have: what the machine has left, and what its control groups (cgroup v2, or v1)
allow. Read anew each time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pagemem.units import KiB

_MEMINFO: Final = Path("/proc/meminfo")
_OWN: Final = Path("/proc/self/cgroup")
_ROOT: Final = Path("/sys/fs/cgroup")


def usable_bytes() -> int:
    """What this process can have of RAM beside what it has; page cache that can be given up counts."""
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available_bytes = int(fields["MemAvailable"].split()[0]) * KiB
    _, left_bytes = cgroup_limit(_OWN, _ROOT)
    return available_bytes if left_bytes is None else min(available_bytes, left_bytes)


#: Of a version of cgroup: the folder, and the names of the limit, of what is used, and of what can be reclaimed.
_V2: Final = ("", "memory.max", "memory.current", "inactive_file")
_V1: Final = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
#: v1 writes no limit as the largest number of whole pages.
_NO_LIMIT_BYTES: Final = 1 << 62


def cgroup_limit(own: Path, root: Path) -> tuple[int | None, int | None]:
    """The least limit on memory over this process, and the least that is left under one; None where there is none.

    Args:
        own: the process's groups, as in /proc/self/cgroup. root: where they are mounted.
    """
    limits, left = [], []  # of the process's own groups and of every one above them
    for line in own.read_text().splitlines() if own.exists() else []:
        number, controllers, name = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        controller, limit, used, reclaimable = _V2 if number == "0" else _V1
        top = root / controller
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            text = (folder / limit).read_text().strip() if (folder / limit).exists() else "max"
            if text != "max" and int(text) < _NO_LIMIT_BYTES:
                limits.append(int(text))
                used_bytes = int((folder / used).read_text()) - _reclaimable_bytes(folder / "memory.stat", reclaimable)
                left.append(max(0, int(text) - used_bytes))
    return min(limits, default=None), min(left, default=None)


def _reclaimable_bytes(stat: Path, key: str) -> int:
    """Page cache that a group gives up when it needs memory; it counts as used."""
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(fields.get(key, 0))
