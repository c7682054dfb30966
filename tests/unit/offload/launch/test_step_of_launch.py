"""What one step of `offload launch` asks of a device, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.launch import loop as launch
from offload.launch.batches import on_device
from offload.launch.loop import one_step


class Loss:
    """A loss on a device: its value is there when the device has come that far."""

    def __init__(self, log: list[str], value: float) -> None:
        self.log, self.value = log, value

    def detach(self) -> Loss:
        return self

    def __float__(self) -> float:
        self.log.append("read")
        return self.value


@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_are_read_when_the_device_has_all_of_the_step_to_do(
    accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "loss_of", lambda output, reference, trains: output)
    log: list[str] = []
    values = iter([0.1, 0.2, 0.4])

    class Engine:
        torch_device = torch.device("cpu")
        config = SimpleNamespace(update=SimpleNamespace(accumulation=accumulation))

        def __call__(self, x: Any, y: Any) -> Loss:
            log.append("forward")
            return Loss(log, next(values))

        def backward(self, loss: Loss) -> None:
            log.append("backward")

        def step(self) -> None:
            log.append("step")

    batches: Any = SimpleNamespace(batch=lambda number: (torch.ones(2, 3), torch.ones(2, 3)))
    engine: Any = Engine()
    loss = one_step(engine, batches, "a model", 0, range(accumulation))
    assert log == ["forward", "backward"] * accumulation + ["step"] + ["read"] * accumulation
    assert loss == (0.1 if accumulation == 1 else (0.1 + 0.2 + 0.4) / 3), "added up in order"


def test_a_batch_goes_to_a_device_from_pinned_memory_without_waiting() -> None:
    log: list[Any] = []

    class Batch:
        def pin_memory(self) -> Batch:
            log.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
            log.append((device, non_blocking))
            return self

    batch: Any = Batch()
    on_device(batch, torch.device("cuda", 1))
    on_device(batch, torch.device("cpu"))
    assert log == ["pinned", (torch.device("cuda", 1), True), (torch.device("cpu"), False)]
