"""How much RAM is left: what the machine has, or what the control group allows, whichever is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagemem.devices import host_memory
from pagemem.units import GiB, MiB


@pytest.mark.parametrize(
    ("limit", "used", "reclaimable", "expected"),
    [
        (None, 0, 0, 4 * GiB),
        ("max", GiB, 0, 4 * GiB),
        (3 * GiB, GiB, 0, 2 * GiB),
        (3 * GiB, GiB, 512 * MiB, 2 * GiB + 512 * MiB),
        (64 * GiB, GiB, 0, 4 * GiB),
        (GiB, 2 * GiB, 0, 0),
    ],
)
def test_the_lesser_of_what_the_machine_and_the_group_have_left(
    limit: int | str | None, used: int, reclaimable: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text(
        f"MemTotal:       24684096 kB\nMemFree:        1 kB\nMemAvailable:   {4 * GiB // 1024} kB\nHugePages_Total:   "
        "    0\n"
    )
    (tmp_path / "own").write_text("0::/job/step\n")
    group = tmp_path / "cgroup" / "job" / "step"
    group.mkdir(parents=True)
    if limit is not None:
        for folder in (group, group.parent):  # the tighter one is above
            (folder / "memory.max").write_text("max\n" if folder is group else f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 7\ninactive_file {reclaimable}\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_OWN", tmp_path / "own")
    monkeypatch.setattr(host_memory, "_ROOT", tmp_path / "cgroup")
    assert host_memory.usable_bytes() == expected


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    """Where both are mounted, memory is in the first one's."""
    (tmp_path / "own").write_text("9:name=systemd:/\n4:cpu,memory:/docker/a\n3:memorial:/\n0::/\n")
    group = tmp_path / "cgroup" / "memory" / "docker" / "a"
    group.mkdir(parents=True)
    for folder, limit in ((group, 3 * GiB), (group.parent, 9223372036854771712)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{2 * GiB}\n")
        (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {MiB}\n")
    assert host_memory.cgroup_limit(tmp_path / "own", tmp_path / "cgroup") == (3 * GiB, GiB + MiB)


def test_here_there_is_some() -> None:
    assert MiB < host_memory.usable_bytes() < 1 << 50
