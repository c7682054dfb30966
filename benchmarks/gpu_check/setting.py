"""What a check of `benchmarks.gpu_check.checks` is given and what it answers, and a small model to train in one."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import offload
from benchmarks.common import GPT, batch, fused_adamw
from pagemem.devices.accelerator import Accelerator, RamDevice
from pagemem.devices.cuda import CudaDevice
from pagemem.units import MiB

#: Steps after which everything follows its plan and nothing is timed any more.
PLANNED: Final = 9
_SEQ: Final = 128


class Status(enum.Enum):
    """How a check ended. SKIPPED: it cannot be made here, and says why."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """What a check found: a number with its unit, and what else is to be said in a few words."""

    status: Status
    number: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Setting:
    """What is checked: ``device`` as in a configuration, an empty folder for page files, and the size of timed
    models."""

    device: str
    folder: Path
    size: str

    @property
    def emulated(self) -> bool:
        """Whether there is no GPU in it."""
        return self.device == "cpu-emulated"

    @property
    def torch_device(self) -> torch.device:
        """Where compute is."""
        return torch.device("cpu" if self.emulated else self.device)

    def accelerator(self) -> Accelerator:
        """The device itself."""
        return RamDevice() if self.emulated else CudaDevice(self.torch_device.index)

    def config(self, device: str = "16MiB", ram: str = "256MiB", **memory: Any) -> dict[str, Any]:
        """An engine whose parameters come and go, unless it is asked for otherwise."""
        sizes = {"ram": ram, "device": device, "device_states": "never", "page": MiB, **memory}
        return {"device": self.device, "memory": sizes, "ssd": {"paths": [str(self.folder / "pages")]}}


def judged(good: bool, number: str, detail: str = "") -> Outcome:
    """Ok or failed."""
    return Outcome(Status.OK if good else Status.FAILED, number, detail)


class Run:
    """A small GPT in an engine."""

    def __init__(self, setting: Setting, config: dict[str, Any]) -> None:
        self._device = setting.torch_device
        self.engine = offload.initialize(GPT(256, 4, _SEQ), config, fused_adamw)
        self._n_batches = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next one, on the device."""
        self._n_batches += 1
        x, y = batch(self._n_batches, 4, _SEQ)
        return x.to(self._device), y.to(self._device)

    def step(self) -> None:
        """One step; nobody looks at the loss."""
        self.engine.backward(self.engine(*self.batch()))
        self.engine.step()

    def steps(self, count: int) -> None:
        """Some, and what the device has to do for them."""
        for _ in range(count):
            self.step()
        synchronize(self._device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
