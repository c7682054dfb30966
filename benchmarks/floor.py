"""The least a step can take here: its matrix products at the best rate, its bytes at the disk's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import GPT, SIZES
from offload.machine.bench_ssd import check_target, measure
from offload.machine.facts import PROBE

_MEASURE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Floor:
    """What bounds a step from below.

    Attributes:
        flops: of the step's products, forward and backward.
        flops_per_s: best rate of one large fp32 product on the device, with the threads of the measurement.
        read_bytes_per_s, write_bytes_per_s: of the folder's disk, nothing else running.
    """

    flops: int
    flops_per_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float

    @classmethod
    def of(cls, size: str, rows: int, seq: int, device: str, folder: Path) -> Floor:
        """Measure rates (about two seconds, a file of 64 MiB in ``folder``) and count the step's products."""
        folder.mkdir(parents=True, exist_ok=True)
        (point,) = measure(check_target(folder, PROBE.file_bytes), PROBE).points
        return cls(
            step_flops(size, rows, seq), _product_rate(device), point.read_gb_per_s * 1e9, point.write_gb_per_s * 1e9
        )

    @property
    def compute_s(self) -> float:
        """The step's products at the best rate."""
        return self.flops / self.flops_per_s

    def disk_s(self, read_bytes: float, written_bytes: float) -> float:
        """A step's bytes at the disk's rates, one after the other as one disk serves them."""
        return read_bytes / self.read_bytes_per_s + written_bytes / self.write_bytes_per_s


def step_flops(size: str, rows: int, seq: int) -> int:
    """Of a step's products, counted without values."""
    with torch.device("meta"):
        model = GPT(*SIZES[size], seq)
        tokens = torch.zeros(rows, seq, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    flops: int = counter.get_total_flops()
    return flops


def _product_rate(device: str) -> float:
    left, right = torch.randn(1024, 2048, device=device), torch.randn(2048, 2048, device=device)
    best_s, end_s = float("inf"), time.perf_counter() + _MEASURE_S
    while (began_s := time.perf_counter()) < end_s:
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * 1024 * 2048 * 2048 / best_s
