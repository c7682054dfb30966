"""Saved tensors that a device is still copying when something goes wrong, or when the model changes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from late_device import LateDevice, LateEvent, late_device
from small_runs import assert_closed, assert_equal, config
from torch import Tensor, nn

import offload
from offload import knobs
from offload.activations.saved import SavedActivations
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.paged_tensor import PagedTensor

PAGE_BYTES = 64 << 10
#: Bytes of a storage that is saved: four chunks.
ROWS, WIDTH = 128, 512


class Tower(nn.Module):
    """Two layers with a saved sigmoid between, which ``edit`` may change after the second layer has used it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 64)
        self.edit = False

    def forward(self, x: Tensor) -> Tensor:
        """(ROWS, 64) to the same."""
        hidden = torch.sigmoid(self.first(x))
        y: Tensor = self.second(hidden)
        if self.edit:
            with torch.no_grad():
                hidden.add_(1)
        return y


class Again(Tower):
    """Tries the second layer once more where it failed, as a model that lowers its batch would."""

    def forward(self, x: Tensor) -> Tensor:
        """(ROWS, 64) to the same."""
        hidden = torch.sigmoid(self.first(x))
        try:
            y: Tensor = self.second(hidden)
        except offload.BudgetError:
            y = self.second(hidden)
        return y


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def step(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    """A device that is slow to copy."""
    with late_device(monkeypatch, late_s=0.005) as made:
        yield made


def engine_of(model: nn.Module, folder: Path) -> offload.Engine:
    made = config(folder, ram=4 << 20)
    made |= {
        "device": "cpu-emulated",
        "memory": made["memory"] | {"device": "8MiB", "activations": 0, "recompute": "never"},
    }
    return offload.initialize(model, made, adamw)


def saved_of(engine: offload.Engine) -> SavedActivations:
    saved = engine.debug.binder.activations
    assert saved is not None and saved._chunk_bytes == PAGE_BYTES
    return saved


def inputs() -> Tensor:
    return torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(5))


def test_a_tensor_changed_while_it_is_copied_is_an_error_as_in_plain_torch(
    device: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is not ordered with the change: nobody knows which values it has."""
    monkeypatch.setattr(knobs, "LEAVING_SHARE", 1)
    x, plain = inputs(), Tower()
    plain.edit = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(plain, x).backward()
    with engine_of(Tower(), tmp_path) as engine:
        saved_of(engine)._leaving_limit_bytes = 1 << 20
        engine.model.edit = True
        loss = step(engine.model, x)
        assert any(not leaving.event.reached() for leaving in saved_of(engine)._leaving)
        with pytest.raises(RuntimeError, match="was changed by an inplace operation after it was saved"):
            engine.backward(loss)
        del loss
    assert_closed(engine)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> list[LateEvent]:
    """Have a move of `DeviceMover` fail once, the ``at``-th time; returns the events of those before."""
    events: list[LateEvent] = []
    move = getattr(DeviceMover, name)

    def maybe(self: DeviceMover, *arguments: Any) -> Any:
        if len(events) == at:
            events.append(LateEvent())
            raise offload.BudgetError("no pages for a test", 1)
        events.append(move(self, *arguments))
        return events[-1]

    monkeypatch.setattr(DeviceMover, name, maybe)
    return events


@pytest.mark.parametrize("at", range(4))
def test_a_storage_whose_copy_down_fails_midway_is_whole_and_tried_again(
    at: int, device: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, plain = inputs(), Tower()
    optimizer = adamw(plain.parameters())
    with engine_of(Again(), tmp_path) as engine:
        events = failing(monkeypatch, "save", at)
        for number in range(4):
            loss = step(engine.model, x)
            if not number:
                assert len(events) > at + 1 and all(event.reached() for event in events[:at]), (
                    "compute went on behind what was under way"
                )
            engine.backward(loss)
            engine.step()
            expected = step(plain, x)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(loss.detach(), expected.detach()), f"step {number}"
        assert_equal(engine.model, plain)
        saved = saved_of(engine)
        del loss
        assert not saved._waiting and not saved._used and saved.bytes.now.saved == 0
    assert_closed(engine)


@pytest.mark.parametrize("at", range(4))
def test_memory_of_a_storage_whose_copy_up_fails_midway_is_nobodys_before_the_copies_are_made(
    at: int, device: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs()
    with engine_of(Tower(), tmp_path) as engine:
        loss = step(engine.model, x)
        events = failing(monkeypatch, "restore", at)
        with pytest.raises(offload.BudgetError, match="no pages for a test"):
            engine.backward(loss)
        assert len(events) == at + 1 and all(event.reached() for event in events[:at])
        del loss
    assert_closed(engine)


def test_pages_of_a_storage_that_was_not_copied_are_free_again(
    device: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(Tower(), tmp_path) as engine:
        failing(monkeypatch, "save", 2)
        with pytest.raises(offload.BudgetError, match="no pages for a test"):
            step(engine.model, inputs())
        saved, mover = saved_of(engine), engine.debug.mover
        assert not saved._used and saved.bytes.now.saved == 0
        mover.monitor.settle()
        mover.collect_leases()
        left: list[PagedTensor] = [
            tensor
            for tensor in mover.tensors.values()
            if tensor.name.startswith("saved tensor") and tensor.frame is not None
        ]
        assert not left
    assert_closed(engine)
