"""How much RAM this process can still have: what the machine has left, and what its control group (cgroup v2) allows. Read anew each time."""

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


def cgroup_limit(own: Path, root: Path) -> tuple[int | None, int | None]:
    """The least ``memory.max`` (cgroup v2) over this process, and the least that is left under one; None where there is none."""
    names = [line[3:] for line in own.read_text().splitlines() if line.startswith("0::")] if own.exists() else []
    if not names:
        return None, None
    group = root / names[0].lstrip("/")
    limits, left = [], []  # of the process's own group and of every one above it
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        maximum, current = folder / "memory.max", folder / "memory.current"
        text = maximum.read_text().strip() if maximum.exists() else "max"
        if text != "max":
            limits.append(int(text))
            left.append(max(0, int(text) - int(current.read_text()) + _reclaimable_bytes(folder / "memory.stat")))
    return min(limits, default=None), min(left, default=None)


def _reclaimable_bytes(stat: Path) -> int:
    """Page cache that a group gives up when it needs memory; it counts as used."""
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(fields.get("inactive_file", 0))
