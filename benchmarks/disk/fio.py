"""Running fio as the yardstick of raw direct I/O on a file system."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Buffers in huge pages, as the engine's are: a request of 4 MiB is then few segments, and up to twice as fast. Without
#: this, fio's figure is a matter of luck (how scattered its memory happens to be) and the comparison flatters us.
_HUGE_PAGES: Final = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: bytes moved, wall-clock seconds, processor seconds of the measured process."""

    n_bytes: int
    wall_s: float
    cpu_s: float

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second."""
        return self.n_bytes / self.wall_s / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds for 10^9 bytes."""
        return self.cpu_s / self.n_bytes * 1e9


@dataclass(frozen=True, slots=True)
class Fio:
    """fio on one file, which must be there.

    Attributes:
        direct: whether to use O_DIRECT, as the page file it is compared with does.
    """

    file: Path
    size_bytes: int
    request_bytes: int
    direct: bool

    @staticmethod
    def version() -> str | None:
        """fio's version, or None where there is no fio."""
        if shutil.which("fio") is None:
            return None
        return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()

    def run(self, way: str, depth: int, seconds: float) -> Sample:
        """Measure sequential ``"read"`` or ``"write"`` with ``depth`` requests under way.

        Raises:
            subprocess.CalledProcessError: fio failed; its message is on stderr.
        """
        command = self._command(way, depth, seconds)
        finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=_environment())
        (job,) = json.loads(finished.stdout)["jobs"]
        moved = job[way]
        cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        return Sample(moved["io_bytes"], moved["runtime"] / 1000, cpu_s)

    def start(self, way: str, depth: int, seconds: float, bytes_per_s: int) -> subprocess.Popen[bytes]:
        """Begin the same at a limited rate; returns the process, for the caller to end and to wait for."""
        # A thread, not a forked process, so that the process's counters in /proc are those of the I/O.
        command = [*self._command(way, depth, seconds), f"--rate={bytes_per_s}", "--thread"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environment())

    def _command(self, way: str, depth: int, seconds: float) -> list[str]:
        return [
            "fio",
            "--name=page",
            f"--filename={self.file}",
            f"--size={self.size_bytes}",
            f"--bs={self.request_bytes}",
            f"--rw={way}",
            f"--iodepth={depth}",
            f"--direct={int(self.direct)}",
            "--ioengine=libaio",
            "--iomem_align=2M",
            "--randrepeat=0",
            "--time_based",
            f"--runtime={int(seconds * 1000)}ms",
            "--output-format=json",
        ]


def _environment() -> dict[str, str]:
    return {**os.environ, **_HUGE_PAGES}
